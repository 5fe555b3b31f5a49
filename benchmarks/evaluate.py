"""What an evaluation costs over plain forwards of the same tokens, and what batching it over sizes and prompts gains.

`evaluate` measures a circuit at 20 sizes on test prompts, `curves` a ranking of all nodes, as the agreement benchmark
does. Beside each, in the same process, in turn, with one thread: the bare module's forwards of the batches that it ran
(the same rows, tokens and kept logits, under no_grad, without tracer). Ratios are medians over pairs; an evaluation's
bootstrap is part of its time. On the demo model `evaluate` is also run with one row to a batch: its numbers must agree.

    OMP_NUM_THREADS=1 python benchmarks/evaluate.py [--model demo|llama|gemma] [--pairs 3]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import common
import torch

import tracer
from tracer.circuit.circuit import Circuit
from tracer.data.tasks import sva
from tracer.evaluation.curves import Evaluation, curves, ordered
from tracer.evaluation.faithfulness import evaluate
from tracer.evaluation.testset import TestSet
from tracer.model import passes
from tracer.prompts import encode
from tracer.settings import settings

SIZES = (1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 50, 70, 100, 140, 200, 280, 400, 560, 800, 1000)
LENGTH = 12
"""Tokens of a random model's prompts."""
ONE_ROW = 1
"""Bytes to a batch: less than any row needs, so that every batch holds one."""


def asked(model: tracer.Model, count: int) -> list[tracer.Prompt]:
    """Random prompts, each about the token that the model puts first there against the one that it puts last."""
    drawn = torch.randint(10, 1000, (count, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model.module(input_ids=drawn, use_cache=False, logits_to_keep=1).logits[:, -1]
    ends = zip(drawn.tolist(), logits.argmax(-1).tolist(), logits.argmin(-1).tolist(), strict=True)
    return [tracer.Prompt(token_ids=ids, target=first, foil=last) for ids, first, last in ends]


def build(name: str, count: int) -> tuple[tracer.Model, Circuit, list[tracer.Prompt]]:
    """A model, a circuit found on a prompt, and others to test it on."""
    if name == "demo":
        model = tracer.load("demo")
        pair = sva.generate("nounpp", "train", 1)[0].to_prompt()
        prompts = [one.to_prompt() for one in sva.generate("nounpp", "test", count)]
    else:
        model = common.random_model(common.SHAPES[name])
        pair, *prompts = asked(model, count + 1)
    baseline = "counterfactual" if name == "demo" else "zero"
    return model, tracer.trace(model, pair, nodes=SIZES[-1], baseline=baseline, edges=False), prompts


@contextmanager
def recorded() -> Iterator[list[dict[str, Any]]]:
    """The keyword arguments of every forward in this context."""
    real, seen = passes.inputs, list[dict[str, Any]]()

    def inputs(*args: Any, **how: Any) -> dict[str, Any]:
        seen.append(real(*args, **how))
        return seen[-1]

    passes.inputs = inputs
    try:
        yield seen
    finally:
        passes.inputs = real


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def against_plain(name: str, model: tracer.Model, work: Callable[[], Any], pairs: int) -> None:
    """Print what some work costs over the plain forwards of what it ran."""
    with recorded() as batches:
        work()  # a warm-up too

    def plain() -> None:
        with torch.no_grad():
            for batch in batches:
                model.module(**batch)

    plain()
    timed = [(seconds(work), seconds(plain)) for _ in range(pairs)]
    rows = sum(len(batch["input_ids"]) for batch in batches)
    mine, bare = (median(column) for column in zip(*timed, strict=True))
    ratio = median(one / other for one, other in timed)
    print(f"{name:<10}{len(batches):>9}{rows:>7}{mine:>10.2f}{bare:>10.2f}{ratio:>8.2f}", flush=True)


def check(one: Evaluation, other: Evaluation) -> None:
    """Both sides measured the same."""
    for name in ("whole", "empty", "inside", "outside", "control"):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4), f"the two sides disagree on {name}"
    for name in ("faithfulness", "completeness"):
        for end in ("estimate", "low", "high"):
            mine, theirs = getattr(getattr(one, name), end), getattr(getattr(other, name), end)
            assert torch.allclose(mine, theirs, atol=1e-3), f"the two sides disagree on the {end} of {name}"


def one_by_one(evaluated: Callable[..., Evaluation], pairs: int) -> None:
    """Print what batching gains over one row to a batch."""
    timed: list[tuple[float, float]] = []
    for _ in range(pairs):
        found: list[Evaluation] = []
        timed.append(
            (
                seconds(lambda found=found: found.append(evaluated(None))),
                seconds(lambda found=found: found.append(evaluated(ONE_ROW))),
            )
        )
        check(*found)
    gain = median(single / batched for batched, single in timed)
    print(f"one row to a batch takes {gain:.1f} times as long; the numbers agree")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", choices=("demo", "llama", "gemma"), default="demo")
    arguments.add_argument("--prompts", type=int, help="test prompts; 40 of the demo model, else 8")
    arguments.add_argument("--pairs", type=int, default=3, help="timed pairs")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    model, circuit, prompts = build(options.model, options.prompts or (40 if options.model == "demo" else 8))
    test = TestSet.of(model, [encode(one, model) for one in prompts], "mean", settings(), 0).with_known_ends()
    ranks = ordered(tracer.attribute(model, prompts[:1]).nodes[0], "absolute")

    def evaluated(memory: int | None = None) -> Evaluation:
        return evaluate(model, circuit, prompts, "mean", SIZES, memory=memory)

    print(f"{options.model}: {len(prompts)} prompts of {len(circuit.token_ids)} tokens, mean ablation, 1 thread")
    print(f"{'':<10}{'batches':>9}{'rows':>7}{'s':>10}{'plain s':>10}{'ratio':>8}")
    against_plain("evaluate", model, evaluated, options.pairs)
    against_plain("curves", model, lambda: curves(test, ranks, SIZES, 0), options.pairs)
    if options.model == "demo":
        one_by_one(evaluated, options.pairs)


if __name__ == "__main__":
    main()
