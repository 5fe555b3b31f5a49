"""Does a circuit hold: the metric with everything else ablated, and with it ablated, at many sizes (method.md 5).

Knows which nodes a circuit's sizes are, and which prompts test it. Refuses to know how the circuit was found, how
prompts are measured (evaluation/testset.py) and what is made of that (evaluation/curves.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tracer.attribution.attribute import notes
from tracer.attribution.methods import Progress
from tracer.circuit.circuit import Circuit
from tracer.errors import JobError, say
from tracer.evaluation import statistics
from tracer.evaluation.curves import Evaluation, measure, shuffled
from tracer.evaluation.testset import NEVER, Job, Ranks, TestSet
from tracer.model.model import Model
from tracer.model.state import undisturbed
from tracer.prompts import Prompt, encode


@undisturbed()
def evaluate(
    model: Model,
    circuit: Circuit,
    prompts: Sequence[Prompt],
    ablation: str = "mean",
    sizes: Sequence[int] | None = None,
    *,
    reference: Sequence[Prompt] | None = None,
    train: Sequence[Prompt] = (),
    allow_overlap: bool = False,
    aligned: bool = True,
    seed: int = 0,
    memory: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Faithfulness and completeness of a circuit on test prompts, by ablation.

    Args:
        circuit: its neurons, strongest first, are what the sizes count.
        prompts: test prompts, all as long as one another; with `aligned` as long as the circuit's prompt. They need
            targets, and ask what the circuit's metric asks.
        ablation: what nodes are set to: ``zero``; ``mean``, per position over `reference`; ``counterfactual``, the
            value on each prompt's counterfactual; ``resample``, the value on a random reference prompt.
        sizes: circuit sizes; a grid up to the circuit's own if None.
        reference: prompts behind ``mean`` and ``resample``, as long as the test prompts; the test prompts'
            counterfactuals if they all have one, else the test prompts themselves.
        train: prompts that the circuit was found on; one of them among the test prompts is an error, unless
            `allow_overlap`: then the result says how many there are (`Evaluation.n_shared`).
        aligned: a node is a neuron at its position; if False its neuron at every position.
        seed: of the random control, the resampled prompts and the intervals.
        memory: bytes one batch may use.

    Raises:
        JobError: prompts that do not fit, a size above the circuit's, an ablation that changes nothing.

    Source: method.md section 5; Arora et al. 2026, section 4.
    """
    test = _test_set(model, circuit, prompts, ablation, reference, train, allow_overlap, aligned, seed, memory)
    say(notes(test.prompts, model))
    ranks = _ranks(model, circuit, len(test.prompts[0].token_ids), aligned)
    chosen = _sizes(circuit.n_nodes if aligned else circuit.n_neurons, sizes)
    return measure(test, ranks, shuffled(ranks, seed), chosen, ranks.numel(), seed, progress=progress)


@undisturbed()
def minimality(
    model: Model,
    circuit: Circuit,
    prompts: Sequence[Prompt],
    ablation: str = "mean",
    *,
    reference: Sequence[Prompt] | None = None,
    seed: int = 0,
    memory: int | None = None,
    progress: Progress | None = None,
) -> Float[Tensor, " node"]:
    """How much the circuit's faithfulness falls when each of its nodes, in order, is removed from it.

    Args: as for `evaluate`.

    Returns:
        For each neuron of the circuit, F(C) - F(C without it) over F(model) - F(empty).

    Raises:
        JobError: as `evaluate`.
    """
    test = _test_set(model, circuit, prompts, ablation, reference, (), False, True, seed, memory)
    ranks = _ranks(model, circuit, len(test.prompts[0].token_ids), True)
    size, rows = circuit.n_nodes, range(len(test.prompts))
    jobs = [Job(row, ranks, size, True, without) for row in rows for without in range(-1, size)]
    full, empty, left = test.measure_with_ends(jobs, progress)
    curve = statistics.faithfulness(left.view(len(rows), size + 1), empty, full)
    return (curve[0] - curve[1:]).float()


def _test_set(
    model: Model,
    circuit: Circuit,
    prompts: Sequence[Prompt],
    ablation: str,
    reference: Sequence[Prompt] | None,
    train: Sequence[Prompt],
    allow_overlap: bool,
    aligned: bool,
    seed: int,
    memory: int | None,
) -> TestSet:
    """The test prompts, asked what the circuit was asked."""
    model.check_traced(circuit.model, circuit.text)
    return TestSet.of(
        model,
        [encode(prompt, model) for prompt in prompts],
        ablation,
        circuit.settings.basis,
        seed,
        reference,
        metric=circuit.settings.metric,
        train=[encode(prompt, model) for prompt in train],
        allow_overlap=allow_overlap,
        length=len(circuit.token_ids) if aligned else None,
        memory=memory,
    )


def _ranks(model: Model, circuit: Circuit, length: int, aligned: bool) -> Ranks:
    """Each node's place in the circuit, from 0; `NEVER` outside it."""
    ranks = torch.full((model.n_layers, length, model.n_neurons(circuit.settings.basis)), NEVER, dtype=torch.int32)
    seen: dict[tuple[int, int], int] = {}
    for number, row in enumerate(circuit.neurons.to_pylist()):
        if aligned:
            ranks[row["layer"], row["position"], row["neuron"]] = number
        else:
            place = seen.setdefault((row["layer"], row["neuron"]), len(seen))
            ranks[row["layer"], :, row["neuron"]] = place
    return ranks


def _sizes(largest: int, sizes: Sequence[int] | None) -> tuple[int, ...]:
    if sizes is None:
        grid = (1, 2, 5, 10, 20, 35, 50, 75, 100, 150, 200, 300, 500, 1000, 2000, 5000)
        return (*(size for size in grid if size < largest), largest)
    if not sizes or min(sizes) < 1 or max(sizes) > largest or list(sizes) != sorted(set(sizes)):
        raise JobError(
            f"sizes={list(sizes)}", f"must rise from 1 to at most {largest}, the circuit's size", "change them"
        )
    return tuple(sizes)
