"""What batching an evaluation over sizes and prompts gains: 20 circuit sizes on 40 test prompts of the demo model.

Both sides run `evaluation.evaluate` in this process, in turn, with one thread: the same passes, first as many rows to
a batch as the memory bound allows, then one size and one prompt at a time. Their numbers must agree. The ratio is the
median over pairs; each side also draws the same bootstrap, whose seconds are part of both.

    OMP_NUM_THREADS=1 python benchmarks/evaluate.py [--pairs 3]
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch

import tracer
from tracer.circuit.circuit import Circuit
from tracer.data.tasks import sva
from tracer.evaluation.curves import Evaluation
from tracer.evaluation.faithfulness import evaluate

SIZES = (1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 50, 70, 100, 140, 200, 280, 400, 560, 800, 1000)
ONE_ROW = 1
"""Bytes to a batch: less than any row needs, so that every batch holds one."""


def build() -> tuple[tracer.Model, Circuit, list[tracer.Prompt]]:
    """The demo model, a circuit found on a training prompt, and the test prompts."""
    model = tracer.load("demo")
    pair = sva.generate("nounpp", "train", 1)[0].to_prompt()
    circuit = tracer.trace(model, pair, nodes=SIZES[-1], baseline="counterfactual", edges=False)
    return model, circuit, [one.to_prompt() for one in sva.generate("nounpp", "test", 40)]


def timed(
    model: tracer.Model, circuit: Circuit, prompts: list[tracer.Prompt], memory: int | None
) -> tuple[float, Evaluation]:
    """Seconds of one evaluation, and what it found."""
    started = time.perf_counter()
    found = evaluate(model, circuit, prompts, "mean", SIZES, memory=memory)
    return time.perf_counter() - started, found


def check(one: Evaluation, other: Evaluation) -> None:
    """Both sides measured the same."""
    for name in ("whole", "empty", "inside", "outside", "control"):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4), f"the two sides disagree on {name}"
    for name in ("faithfulness", "completeness"):
        for end in ("estimate", "low", "high"):
            mine, theirs = getattr(getattr(one, name), end), getattr(getattr(other, name), end)
            assert torch.allclose(mine, theirs, atol=1e-3), f"the two sides disagree on the {end} of {name}"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--pairs", type=int, default=3, help="timed pairs")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    model, circuit, prompts = build()
    timed(model, circuit, prompts, None)  # warm-up
    pairs: list[tuple[float, float]] = []
    for _ in range(options.pairs):
        batched, mine = timed(model, circuit, prompts, None)
        single, theirs = timed(model, circuit, prompts, ONE_ROW)
        check(mine, theirs)
        pairs.append((batched, single))
    print(f"evaluation of the demo model: {len(SIZES)} sizes, {len(prompts)} prompts, mean ablation, 1 thread")
    print(f"{'batched s':>10}{'one by one s':>14}{'ratio':>8}")
    for batched, single in pairs:
        print(f"{batched:>10.2f}{single:>14.2f}{single / batched:>8.1f}")
    print(f"median ratio {median(single / batched for batched, single in pairs):.1f}x; the numbers agree")


if __name__ == "__main__":
    main()
