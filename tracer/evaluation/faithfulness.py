"""Does a circuit hold: the metric with everything else ablated, and with it ablated, at many sizes (method.md 5).

Knows which nodes a circuit's sizes are, and which prompts test it. Refuses to know how the circuit was found, how
prompts are measured (evaluation/testset.py) and what is made of that (evaluation/curves.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tracer.attribution.attribute import notes
from tracer.attribution.exact import Progress
from tracer.choices import Ablation
from tracer.circuit.circuit import Circuit
from tracer.errors import JobError, option, quoted, say
from tracer.evaluation import statistics
from tracer.evaluation.curves import Evaluation, measure, shuffled
from tracer.evaluation.testset import NEVER, Fit, Job, Ranks, TestSet, check_ablation
from tracer.model.model import Model
from tracer.model.named import AnyModel, model_of
from tracer.model.state import undisturbed
from tracer.prompts import Asked, Encoded, Prompt, as_prompts, encode
from tracer.settings import OWN_METRICS, Settings
from tracer.system import bars

GRID = (1, 2, 5, 10, 20, 35, 50, 75, 100, 150, 200, 300, 500, 1000, 2000, 5000)
"""Sizes by default: those below the circuit's own, and that."""


@undisturbed()
def evaluate(
    model: AnyModel,
    circuit: Circuit,
    prompts: Asked | Sequence[Asked] | None = None,
    ablation: Ablation | str | None = None,
    sizes: Sequence[int] | None = None,
    *,
    reference: Sequence[Asked] | None = None,
    train: Sequence[Asked] = (),
    allow_overlap: bool = False,
    aligned: bool = True,
    seed: int = 0,
    memory: int | None = None,
    progress: Progress | bool | None = None,
) -> Evaluation:
    """Faithfulness and completeness of a circuit on test prompts, by ablation.

    Args:
        model: from `tracer.load`, or the name of a model (``"demo"``, a folder, a Hugging Face id), which is loaded and
            kept until a call names another.
        circuit: its neurons, strongest first, are what the sizes count.
        prompts: test prompts, all as long as one another; with `aligned` as long as the circuit's prompt. They are
            asked what the circuit's metric asks: they need targets, and foils where it is a difference; other foils,
            and the targets of a sum of top logits, are not used, which is said. A text alone asks about the circuit's
            own tokens. The circuit's own prompt if None: that
            shows what suffices there, and nothing of other prompts. One prompt alone has no intervals.
        ablation: what nodes are set to: ``zero``; ``mean``, per position over `reference`; ``counterfactual``, the
            value on each prompt's counterfactual; ``resample``, the value on a random reference prompt. If None,
            ``mean`` on test prompts; on the circuit's own ``mean`` if there is a reference, else ``counterfactual`` if
            it has one, else ``zero``.
        sizes: circuit sizes; a grid up to the circuit's own if None.
        reference: prompts behind ``mean`` and ``resample``, as long as the test prompts; the test prompts'
            counterfactuals if they all have one, else the test prompts themselves.
        train: prompts that the circuit was found on; one of them among the test prompts is an error, unless
            `allow_overlap`.
        allow_overlap: test on prompts of `train` as well; the result says how many there are (`Evaluation.n_shared`).
        aligned: a node is a neuron at its position; if False its neuron at every position.
        seed: of the random control, the resampled prompts and the intervals.
        memory: bytes one batch may use; by default a GiB, or a quarter of a GPU.
        progress: a bar appears on a terminal and in a notebook after half a second; False for none, or a function
            that is called with (done, total).

    Returns:
        The curves of faithfulness and completeness by size, beside random nodes'; `Evaluation.plot` draws them.

    Raises:
        JobError: prompts that do not fit, a size above the circuit's, an ablation that changes nothing.

    Source: Arora et al. 2026 (arXiv 2601.22594), section 4.
    """
    model, prompts = model_of(model), asked_of(circuit, prompts)
    if prompts is None and train:
        raise JobError("train", "has no effect on the circuit's own prompt", "leave it out, or give test prompts")
    plan = planned(circuit, ablation, sizes, own=prompts is None, has_reference=reference is not None, aligned=aligned)
    test, said = test_set(
        model, circuit, prompts, plan.ablation, How.of(reference, train, allow_overlap, aligned, seed, memory)
    )
    alone = ("one test prompt alone has no interval",) if len(test.prompts) == 1 else ()
    said = (*notes(test.prompts, model), *plan.notes, *said, *alone)
    say(said)
    ranks = _ranks(model, circuit, len(test.prompts[0].token_ids), aligned)
    total = ranks.numel() if test.there is None else int(test.there.sum())
    with bars.shown(progress, "ablating") as report:
        found = measure(test, ranks, shuffled(ranks, seed, test.there), plan.sizes, total, seed, progress=report)
    return replace(found, warnings=said)


@undisturbed()
def minimality(
    model: AnyModel,
    circuit: Circuit,
    prompts: Asked | Sequence[Asked] | None = None,
    ablation: Ablation | str | None = None,
    *,
    reference: Sequence[Asked] | None = None,
    seed: int = 0,
    memory: int | None = None,
    progress: Progress | bool | None = None,
) -> Float[Tensor, " node"]:
    """How much the circuit's faithfulness falls when each of its nodes, in order, is removed from it.

    Args:
        model: from `tracer.load`, or the name of a model (``"demo"``, a folder, a Hugging Face id), which is loaded and
            kept until a call names another.
        circuit: its neurons, strongest first, are what is tested.
        prompts: test prompts, all as long as the circuit's. They are asked what the circuit's metric asks: they need
            targets, and foils where it is a difference; a text alone asks about the circuit's own tokens. The circuit's
            own prompt if None, which shows what suffices there and nothing of other prompts.
        ablation: what nodes are set to: ``zero``; ``mean``, per position over `reference`; ``counterfactual``, the
            value on each prompt's counterfactual; ``resample``, the value on a random reference prompt. If None,
            ``mean`` on test prompts; on the circuit's own ``mean`` if there is a reference, else ``counterfactual`` if
            it has one, else ``zero``.
        reference: prompts behind ``mean`` and ``resample``, as long as the test prompts; the test prompts'
            counterfactuals if they all have one, else the test prompts themselves.
        seed: of the resampled prompts.
        memory: bytes one batch may use; by default a GiB, or a quarter of a GPU.
        progress: a bar appears on a terminal and in a notebook after half a second; False for none, or a function
            that is called with (done, total).

    Returns:
        For each neuron of the circuit, F(C) - F(C without it) over F(model) - F(empty); float32 [node].

    Raises:
        JobError: prompts that do not fit, or an ablation that changes nothing.
    """
    model, prompts = model_of(model), asked_of(circuit, prompts)
    test = ready(model, circuit, prompts, ablation, How.of(reference, seed=seed, memory=memory))
    ranks = _ranks(model, circuit, len(test.prompts[0].token_ids), True)
    size, rows = circuit.n_nodes, range(len(test.prompts))
    jobs = [Job(row, ranks, size, True, without) for row in rows for without in range(-1, size)]
    with bars.shown(progress, "leaving out each node") as report:
        full, empty, left = test.measure_with_ends(jobs, report)
    curve = statistics.faithfulness(left.view(len(rows), size + 1), empty, full)
    return (curve[0] - curve[1:]).float()


class Plan(NamedTuple):
    """How a circuit is to be evaluated, and what should be said of that."""

    ablation: str
    sizes: tuple[int, ...]
    notes: tuple[str, ...]


def planned(
    circuit: Circuit,
    ablation: str | None = None,
    sizes: Sequence[int] | None = None,
    *,
    own: bool,
    has_reference: bool = False,
    aligned: bool = True,
) -> Plan:
    """What `evaluate` makes of its arguments, before there is a model.

    Args:
        own: on the circuit's own prompt. has_reference: whether there are reference prompts.

    Raises:
        JobError: an ablation or a size that cannot be.
    """
    paired, said = circuit.counterfactual_ids is not None, list[str]()
    if ablation is None and own and not has_reference:
        ablation = "counterfactual" if paired else "zero"
        why = "its counterfactual's values" if paired else "zero, as it has no counterfactual"
        said.append(f"the nodes of the circuit's own prompt are ablated to {why}: {option('ablation')} chooses another")
    ablation = ablation or "mean"
    check_ablation(ablation, has_reference)
    if own:
        where = "tested on the prompt that it was found on: that shows what suffices there, not on other prompts"
        said.insert(0, where)
        if ablation == "counterfactual" and not paired:
            rule, step = "the circuit's prompt has no counterfactual", "use another, or give test prompts"
            raise JobError(option("ablation", ablation), rule, step)
        if ablation in ("mean", "resample") and not has_reference and not paired:
            rule, step = "one prompt alone is no reference", f"give {option('reference')} with prompts as long as it"
            raise JobError(option("ablation", ablation), rule, step)
    return Plan(ablation, _sizes(circuit.n_nodes if aligned else circuit.n_neurons, sizes), tuple(said))


def asked_of(circuit: Circuit, prompts: Asked | Sequence[Asked] | None) -> list[Prompt] | None:
    """Test prompts, of which those that are texts are asked about the circuit's own tokens."""
    if prompts is None:
        return None
    own: dict[str, Any] = {"target": circuit.target_ids, "foil": circuit.foil_ids or None}
    if circuit.settings.metric in OWN_METRICS:
        own = {}  # which finds its own tokens
    elif circuit.answer:
        own = {"answer": circuit.target_ids}
    several = [prompts] if isinstance(prompts, Prompt | str) else prompts
    return as_prompts([Prompt(one, **own) if isinstance(one, str) else one for one in several])


def own_prompt(circuit: Circuit) -> Encoded:
    """The circuit's own prompt, asked what it was asked."""
    return Encoded(
        circuit.token_ids,
        circuit.target_ids,
        circuit.foil_ids,
        circuit.counterfactual_ids,
        circuit.positions,
        circuit.text,
        circuit.user_id,
        answer=circuit.answer,
        weights=circuit.weights,
    )


def as_prompt(one: Encoded, settings: Settings) -> Prompt:
    """What a circuit of these settings was asked, as a prompt; without a target where the metric finds its own."""
    first = one.positions[0] + 1 if one.answer else len(one.token_ids)
    asked = None if settings.metric in OWN_METRICS else one.target_ids
    return Prompt(
        token_ids=one.token_ids[:first],
        target=None if one.answer else asked,
        foil=None if asked is None else one.foil_ids or None,
        counterfactual=None if one.counterfactual_ids is None else one.counterfactual_ids[:first],
        positions=None if one.answer else one.positions,
        answer=asked if one.answer else None,
    )


@dataclass(frozen=True)
class How:
    """The options of `evaluate` that choose the test prompts and what their nodes are ablated to."""

    @staticmethod
    def of(reference: Sequence[Asked] | None = None, train: Sequence[Asked] = (), *more: Any, **named: Any) -> How:
        """Of prompts and texts."""
        return How(None if reference is None else as_prompts(reference), as_prompts(train), *more, **named)

    reference: Sequence[Prompt] | None = None
    train: Sequence[Prompt] = ()
    allow_overlap: bool = False
    aligned: bool = True
    seed: int = 0
    memory: int | None = None


def ready(model: Model, circuit: Circuit, prompts: Sequence[Prompt] | None, ablation: str | None, how: How) -> TestSet:
    """The test prompts with the ablation that they settle, as of `evaluate`; what is to be known of them is said.

    Raises:
        JobError: as `evaluate`.
    """
    plan = planned(circuit, ablation, own=prompts is None, has_reference=how.reference is not None)
    test, said = test_set(model, circuit, prompts, plan.ablation, how)
    say((*plan.notes, *said))
    return test


def test_set(
    model: Model,
    circuit: Circuit,
    prompts: Sequence[Prompt] | None,
    ablation: str,
    how: How,
) -> tuple[TestSet, tuple[str, ...]]:
    """The test prompts, asked what the circuit was asked; and what of them is not used."""
    model.check_traced(circuit.model, circuit.text)
    train, said = [encode(prompt, model) for prompt in how.train], tuple[str, ...]()
    if prompts is None:
        asked = train = [own_prompt(circuit)]
    else:
        asked, said = asked_alike([encode(prompt, model) for prompt in prompts], circuit.settings.metric)
        if any(len(one.token_ids) == len(circuit.token_ids) and one.positions != circuit.positions for one in asked):
            said += ("the test prompts' metric is read at other positions than the circuit's",)
    length = len(circuit.token_ids) if how.aligned else None
    fit = Fit(train, how.allow_overlap or prompts is None, length, least=1)
    return TestSet.of(model, asked, ablation, circuit.settings, how.seed, how.reference, fit, how.memory), said


def asked_alike(prompts: Sequence[Encoded], metric: str) -> tuple[list[Encoded], tuple[str, ...]]:
    """Test prompts without what a circuit's metric does not ask for, and a sentence where something was left out."""
    foils = metric != "difference" and any(one.foil_ids for one in prompts)
    targets = metric in OWN_METRICS and any(one.target_ids for one in prompts)
    unused = " and ".join(name for name, there in (("targets", targets), ("foils", foils)) if there)
    if not unused:
        return list(prompts), ()
    kept = [
        replace(one, foil_ids=() if foils else one.foil_ids, target_ids=() if targets else one.target_ids)
        for one in prompts
    ]
    return kept, (f"the circuit's metric is {quoted(metric)}: {unused} of test prompts are not used",)


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
        return (*(size for size in GRID if size < largest), largest)
    if not sizes or min(sizes) < 1 or max(sizes) > largest or list(sizes) != sorted(set(sizes)):
        given = option("sizes", ",".join(map(str, sizes)))
        raise JobError(given, f"must rise from 1 to at most {largest}, the circuit's size", "change them")
    return tuple(sizes)
