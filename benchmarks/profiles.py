"""What attribution profiles of hundreds of nodes take, over one forward and backward of the bare model.

Both sides run in this process, in turn, with one thread on a CPU; ratios are medians over pairs. The bare side is that
of benchmarks/trace.py: embeddings as a leaf, the logits of the last token, one backward to the embeddings. The other is
`attribution_profiles` of the nodes that a trace kept: a forward of its own, every node's input side, and its effect on
the target and the foil. *autograd* are batched backwards through the linearised model, which the replay replaces.
`trace` is a circuit without edges, `trace, profiles` the same with them. Memory is the growth over the loaded model.

    OMP_NUM_THREADS=1 python benchmarks/profiles.py [--shape gemma] [--lengths 32 128] [--nodes 300 1000]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import common
import torch
from common import BARE, SHAPES, bare

import tracer
from tracer.attribution.profiles import attribution_profiles

GOAL = 6.0
"""Times one forward and backward, of 300 nodes at 32 tokens."""


def calls(model: tracer.Model, length: int, nodes: int) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    prompts = common.random_prompts(model, length, 1)
    circuit = tracer.trace(model, prompts[0], nodes, edges=False)
    columns = circuit.neurons.to_pydict()
    kept = torch.tensor([columns[name] for name in ("layer", "position", "neuron")]).T
    logits = torch.tensor([(row["position"], row["neuron"]) for row in circuit.rows("logit")])
    of = partial(attribution_profiles, model, circuit.token_ids, kept, logits)
    trace = partial(tracer.trace, model, prompts[0], nodes, edges=False)
    return {
        BARE: partial(bare, model, prompts, nodes),
        "profiles": of,
        "profiles, autograd": partial(of, engine="autograd"),
        "trace": trace,
        "trace, profiles": partial(trace, profiles=True),
    }


def peak(options: argparse.Namespace, name: str, length: int, nodes: int) -> int | None:
    """Bytes over the loaded model, from a process of its own."""
    if not sys.platform.startswith("linux"):
        return None
    what = ["--peak", name, "--shape", options.shape, "--lengths", str(length), "--nodes", str(nodes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return int(subprocess.check_output([sys.executable, __file__, *what], text=True, env=environment).split()[-1])


def measure(model: tracer.Model, options: argparse.Namespace, length: int, nodes: int) -> None:
    """Print the rows of one length and number of nodes."""
    timed = calls(model, length, nodes)
    for name in timed if options.autograd else [name for name in timed if "autograd" not in name]:
        seconds, _, ratio = common.in_turn(timed[name], timed[BARE], options.pairs, options.limit)
        grown = peak(options, name, length, nodes)
        size = "-" if grown is None else f"{grown / 2**20:.0f}"
        goal = "" if name != "profiles" or (length, nodes) != (32, 300) else f"   goal: {GOAL:g}"
        print(f"{length:7} {nodes:6}  {name:20} {seconds:9.3f} {ratio:7.2f} {size:>6}{goal}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama", choices=[*SHAPES])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32])
    parser.add_argument("--nodes", type=int, nargs="+", default=[300])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for each row")
    parser.add_argument("--autograd", action="store_true", help="time batched backwards as well")
    parser.add_argument("--cpu-time", action="store_true", help="this process's own seconds, on a shared machine")
    parser.add_argument("--peak", metavar="CALL", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    warnings.simplefilter("ignore", tracer.TracerWarning)
    torch.set_num_threads(1)
    if options.cpu_time:
        common.clock.count_cpu()
    model = common.random_model(SHAPES[options.shape])
    if options.peak:
        (length,), (nodes,) = options.lengths, options.nodes
        calls(model, 4, 4)[options.peak]()
        print(common.grown(calls(model, length, nodes)[options.peak]))
        return
    print(f"{options.shape} shape, random weights, 1 thread, torch {torch.__version__}")
    print(f"{'tokens':>7} {'nodes':>6}  {'call':20} {'seconds':>9} {'x bare':>7} {'MiB':>6}")
    for length in options.lengths:
        for nodes in options.nodes:
            measure(model, options, length, nodes)


if __name__ == "__main__":
    main()
