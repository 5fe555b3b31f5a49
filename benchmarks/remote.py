"""What a question costs on a server beside the same question here: seconds, requests, bytes, and how far they differ.

Both sides run in turn, with the same model and one thread here; a server on the same machine shares its cores. `all
nodes` is what values and gradients of every node would weigh, which a circuit from a session does not bring back.

    export NDIF_HOST=... NDIF_API_KEY=...      # for example those of: python tools/ndif/serve.py demo=tracer/demo/model
    OMP_NUM_THREADS=1 python benchmarks/remote.py [--model demo] [--repeats 3]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch

import tracer
from tracer.attribution.trace import trace_all
from tracer.data.tasks import sva
from tracer.ndif.server import Traffic

Numbers = Callable[[tracer.Model], torch.Tensor]
PROMPTS = [pair.to_prompt() for pair in sva.generate("nounpp", "test", 8)]


@dataclass(frozen=True)
class Row:
    """One question's figures."""

    asked: str
    there: float
    here: float
    used: Traffic
    difference: float


def attributions(circuits: Sequence[tracer.Circuit]) -> torch.Tensor:
    """Of the nodes, in order; they must be the same nodes."""
    return torch.cat([torch.tensor(one.neurons["attribution"].to_pylist()) for one in circuits])


def circuits(prompts: Sequence[tracer.Prompt], **how: Any) -> Numbers:
    """Attributions of the prompts' strongest nodes."""
    return lambda model: attributions(list(trace_all(model, prompts, nodes=200, **how)))


def evaluation(model: tracer.Model, circuit: tracer.Circuit) -> torch.Tensor:
    """The metric of every prompt with the circuit alone, at several sizes."""
    return tracer.evaluate(model, circuit, PROMPTS, "mean", [10, 50, 200]).inside


def steering(model: tracer.Model) -> torch.Tensor:
    """Chances of some tokens under an intervention."""
    nodes = [(1, 5, 13), (2, 5, 250)]
    found = tracer.steer(model, nodes, PROMPTS[0], factor=-1.0, max_new_tokens=4, random=2)
    return torch.tensor([one.probability.after for one in found.effects])


def measured(asked: str, question: Numbers, there: tracer.Model, here: tracer.Model, repeats: int) -> Row:
    """Medians over repeats; the bytes of the last."""
    assert there.remote is not None
    times: tuple[list[float], list[float]] = [], []
    used, found = Traffic(), [torch.empty(0)] * 2
    for _ in range(repeats):
        for side, model in enumerate((there, here)):
            before, started = replace(there.remote.server.traffic), time.perf_counter()
            found[side] = question(model)
            times[side].append(time.perf_counter() - started)
            if side == 0:
                now = there.remote.server.traffic
                used = Traffic(
                    now.requests - before.requests, now.sent - before.sent, 0, now.received - before.received
                )
    gap = float((found[0] - found[1]).abs().max() / found[1].abs().max())
    return Row(asked, median(times[0]), median(times[1]), used, gap)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", default="demo", help="as the server calls it; the demo tasks' tokens are needed")
    arguments.add_argument("--repeats", type=int, default=3)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    there = tracer.load(options.model, remote=True)
    probed = time.perf_counter() - started
    here = tracer.load(options.model, device="cpu")
    circuit = tracer.trace(here, PROMPTS[0], nodes=200, edges=False)
    questions: dict[str, Numbers] = {
        "relp, 200 nodes": circuits(PROMPTS[:1], edges=False),
        "relp, 200 nodes and edges": circuits(PROMPTS[:1]),
        "relp and edges, 8 prompts": circuits(PROMPTS),
        "ig, 10 steps": circuits(PROMPTS[:1], method="ig", edges=False),
        "ig-activation, 10 steps": circuits(PROMPTS[:1], method="ig-activation", edges=False),
        "evaluation, 8 prompts, 3 sizes": partial(evaluation, circuit=circuit),
        "steering, 4 new tokens": steering,
    }
    nodes = len(circuit.token_ids) * here.n_layers * here.d_mlp
    print(f"{options.model}: {here.n_layers} layers, d_mlp {here.d_mlp}, {len(circuit.token_ids)} tokens a prompt")
    print(f"load and probe {probed:.1f} s; all nodes of a prompt {8 * nodes / 1000:,.0f} kB")
    print(f"{'':32}{'there s':>9}{'here s':>8}{'requests':>10}{'sent kB':>9}{'back kB':>9}{'difference':>12}")
    for asked, question in questions.items():
        row = measured(asked, question, there, here, options.repeats)
        used = f"{row.used.requests:>10}{row.used.sent / 1000:>9.1f}{row.used.received / 1000:>9.1f}"
        print(f"{row.asked:32}{row.there:>9.2f}{row.here:>8.2f}{used}{row.difference:>12.1e}")


if __name__ == "__main__":
    main()
