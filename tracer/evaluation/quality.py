"""How good a circuit's estimate was: its attributions against exact ablation of single nodes (method.md 2 and 5).

Knows which nodes are sampled, what ablating one alone does to the metric, and which neurons look strong on any prompt
yet change nothing. Refuses to know how attributions are computed, how correlations are resampled (in
evaluation/statistics.py), nnsight (model/passes.py), and files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tracer.attribution.attribute import Reference, attribute
from tracer.attribution.exact import Progress
from tracer.attribution.result import Attribution
from tracer.attribution.running import Running
from tracer.choices import SingleAblation
from tracer.circuit.circuit import Circuit
from tracer.errors import JobError, quoted
from tracer.evaluation import ablations, statistics
from tracer.evaluation.ablations import AblatedRow, Ranking, Replacement
from tracer.evaluation.faithfulness import as_prompt, own_prompt
from tracer.model.model import Model
from tracer.model.named import AnyModel, model_of
from tracer.model.state import undisturbed
from tracer.prompts import Asked, Encoded, Prompt, as_prompts, encode
from tracer.settings import SINGLE_ABLATIONS as ABLATIONS
from tracer.settings import Settings
from tracer.system import bars
from tracer.system.display import Shown

STRATA = ("strong", "middle", "random")

_ROUNDING = 1e-6  # of the largest logit: changes of the metric below it are float32 rounding


@dataclass(frozen=True)
class Sample:
    """The nodes that were measured, stratum by stratum.

    Attributes:
        attribution: the circuit's estimate, in metric units.
        exact: the metric's fall when the node alone is ablated.
        stratum: index into `STRATA`.
    """

    layer: Int[Tensor, " node"]
    position: Int[Tensor, " node"]
    neuron: Int[Tensor, " node"]
    attribution: Float[Tensor, " node"]
    exact: Float[Tensor, " node"]
    stratum: Int[Tensor, " node"]

    def __len__(self) -> int:
        return len(self.layer)


@dataclass(frozen=True)
class Correlation:
    """How well the estimate follows the exact effects of `n` nodes, or why that cannot be said."""

    n: int
    agreement: statistics.Agreement | None
    reason: str | None = None

    def __str__(self) -> str:
        if self.agreement is None:
            return f"no correlation over {self.n} nodes: {self.reason}"
        parts = [
            f"{name} {float(one.estimate):.2f} [{float(one.low):.2f}, {float(one.high):.2f}]"
            for name, one in (("Pearson", self.agreement.pearson), ("Spearman", self.agreement.spearman))
        ]
        return f"{', '.join(parts)} over {self.n} nodes"

    def record(self) -> dict[str, Any]:
        """The correlations as plain numbers, for JSON."""
        found: dict[str, Any] = {"n": self.n, "reason": self.reason}
        for name in ("pearson", "spearman"):
            one = None if self.agreement is None else getattr(self.agreement, name)
            found[name] = None if one is None else one.record()
        return found


@dataclass(frozen=True, repr=False)
class Quality(Shown):
    """A circuit's attributions against exact single-node ablation, on a stratified sample of nodes.

    Attributes:
        whole: over the whole sample, in which strong nodes are over-represented on purpose.
        strata: within each of `STRATA`.
        sample: the nodes and both numbers.
        method, baseline: of the estimate. ablation: of the exact effects.
        metric: of the prompt, unablated.
        seed: of the sample and the intervals.
    """

    whole: Correlation
    strata: dict[str, Correlation]
    sample: Sample
    method: str
    baseline: str
    ablation: str
    metric: float
    seed: int

    def to_pandas(self) -> Any:
        """The sample as a pandas DataFrame, a row for each node: `layer`, `position`, `neuron`, `attribution` and
        `exact` (metric units), and its `stratum`."""
        import pandas

        return pandas.DataFrame(self.record()["sample"])

    def __str__(self) -> str:
        return f"{self.method} from {self.baseline} against exact {self.ablation} ablation: {self.whole}"

    def record(self) -> dict[str, Any]:
        """Everything as plain numbers, names and lists, for JSON."""
        columns = {name: getattr(self.sample, name).tolist() for name in Sample.__dataclass_fields__}
        columns["stratum"] = [STRATA[i] for i in columns["stratum"]]
        return {
            "method": self.method,
            "baseline": self.baseline,
            "ablation": self.ablation,
            "metric": self.metric,
            "seed": self.seed,
            "whole": self.whole.record(),
            "strata": {name: one.record() for name, one in self.strata.items()},
            "sample": columns,
        }


@dataclass(frozen=True)
class AlwaysOn:
    """A neuron with a strong attribution on unrelated prompts and next to no effect.

    Attributes:
        share: of the unrelated prompts, on how many it is strong.
        attribution: mean, over those, of ``|attribution|`` of its strongest node. spread: its standard deviation.
        exact: mean ``|change of the metric|`` when that node alone goes to its mean over the prompts.
        n_nodes: of the circuit that are this neuron.
    """

    layer: int
    neuron: int
    share: float
    attribution: float
    exact: float
    n_nodes: int
    spread: float = 0.0

    def __str__(self) -> str:
        return (
            f"layer {self.layer} neuron {self.neuron}: attribution {self.attribution:.3g} on {self.share:.0%} of the "
            f"prompts, exact effect {self.exact:.3g}, {self.n_nodes} nodes of the circuit"
        )


@dataclass(frozen=True)
class Constancy:
    """Which neurons count as always on; see `always_on`.

    Attributes:
        share: strong on more than this share of the prompts. threshold: strong, as a share of ``|metric|``.
        exact_below: the exact effect is below this share of the attribution.
    """

    share: float = 0.5
    threshold: float = 0.005
    exact_below: float = 0.1

    def check(self) -> None:
        """Refuse what is no share.

        Raises:
            JobError: that.
        """
        for name, value in vars(self).items():
            if not 0 <= value < 1 or (name != "share" and value == 0):
                raise JobError(f"{name}={value}", "must be a share between 0 and 1", "leave it out for the default")


@dataclass(frozen=True)
class Question:
    """How prompts are attributed: the settings, and of a selection what is left out of it (`skip_first`)."""

    settings: Settings
    selection: Mapping[str, Any]


@undisturbed()
def estimate_quality(
    model: AnyModel,
    circuit: Circuit,
    prompt: Prompt | None = None,
    *,
    n_each: int = 100,
    ablation: SingleAblation | str | None = None,
    reference: Sequence[Asked] | None = None,
    seed: int = 0,
    memory: int | None = None,
    progress: Progress | bool | None = None,
) -> Quality:
    """Pearson's and Spearman's correlation of a circuit's attributions with exact single-node ablation.

    Every node is attributed again as the circuit was; nodes that its selection left out (`skip_first`, `exclude`) are
    not sampled, nor are neurons of experts that did not run. An ablation other than the circuit's baseline asks another
    question of the same estimate: zero-baseline attributions follow mean ablation badly where a neuron is always on,
    and this shows it.

    Args:
        model: from `tracer.load`, or the name of a model (``"demo"``, a folder, a Hugging Face id), which is loaded and
            kept until a call names another.
        circuit: whose attributions are judged.
        prompt: the circuit's own; needed only for a counterfactual that the circuit was traced without.
        n_each: nodes per stratum: of the strongest, of those in the middle, and of all at random.
        ablation: what a node alone is set to, ``zero``, ``mean`` (per position over `reference`) or
            ``counterfactual``; the circuit's baseline if None.
        reference: prompts behind ``mean``; where the circuit's baseline is ``mean``, those it was traced with.
        seed: of the sample and the intervals.
        memory: bytes one batch may use; by default a GiB, or a quarter of a GPU.
        progress: a bar appears on a terminal and in a notebook after half a second; False for none, or a function
            that is called with (done, total), of the attribution and then of the ablations.

    Returns:
        The correlations over the sample and within each stratum, with the sample itself.

    Raises:
        JobError: another model or prompt than the circuit's, a reference or counterfactual that is missing or has no
            effect, settings out of range.
    """
    model, reference = model_of(model), None if reference is None else as_prompts(reference)
    ablation = circuit.settings.baseline if ablation is None else ablation
    mine = _own_prompt(model, circuit, prompt)
    _check(model, circuit, ablation, reference, mine.counterfactual_ids, n_each, memory)
    with bars.shown(progress, "checking the estimate") as report:
        return _estimated(model, circuit, mine, ablation, reference, (n_each, seed), memory, report)


def _estimated(
    model: Model,
    circuit: Circuit,
    mine: Encoded,
    ablation: str,
    reference: Sequence[Prompt] | None,
    drawn: tuple[int, int],
    memory: int | None,
    progress: Progress | None,
) -> Quality:
    """`estimate_quality`, of what is checked; `drawn` is how many nodes of each stratum, and the seed."""
    n_each, seed = drawn
    found = _attributed(model, circuit, [_as_prompt(mine, circuit)], reference, memory, progress)
    if set(found.target_ids[0]) != set(circuit.target_ids):
        raise JobError(f"circuit of {quoted(circuit.text)}", "has other top tokens here", "trace it again")
    there = Running.of(model, [circuit.token_ids], circuit.settings.basis).mask(len(circuit.token_ids))
    picked, stratum = _sampled(found.nodes[0], there, circuit, n_each, seed)
    layer, position, neuron = picked.unbind(-1)
    exact = _alone(model, circuit, mine, picked, _replacement(model, mine, ablation, reference), memory, progress)
    sample = Sample(layer, position, neuron, found.nodes[0][layer, position, neuron], exact, stratum)
    return _judged(circuit, sample, float(found.metric[0]), ablation, seed)


@undisturbed()
def always_on(
    model: AnyModel,
    circuit: Circuit,
    prompts: Sequence[Asked],
    *,
    share: float = 0.5,
    threshold: float = 0.005,
    exact_below: float = 0.1,
    memory: int | None = None,
    progress: Progress | bool | None = None,
) -> list[AlwaysOn]:
    """Neurons whose attribution is strong on unrelated prompts though ablating them to their mean does next to nothing.

    A neuron is strong on a prompt where one of its nodes has ``|attribution| >= threshold * |metric|``, the metric
    being the prompt's or the circuit's own, whichever is larger: a question that is foreign to a prompt may have an
    answer near 0, of which every attribution is a large share. The neuron's strongest node is then ablated to its mean
    over the prompts. Positions at which the prompts do not differ yet (BOS) are left out: all is constant there.

    Args:
        model: from `tracer.load`, or the name of a model (``"demo"``, a folder, a Hugging Face id), which is loaded and
            kept until a call names another.
        circuit: its method, baseline, basis and metric are used, and its question of prompts without a target.
        prompts: unrelated to the circuit's; of any lengths. With the circuit's baseline ``counterfactual`` they need
            one; with ``mean`` they are their own reference.
        share: strong on more than this share of the prompts.
        threshold: of ``|metric|``; the paper's threshold for circuits is .005.
        exact_below: the exact effect is below this share of the attribution.
        memory: bytes one batch may use; by default a GiB, or a quarter of a GPU.
        progress: a bar appears on a terminal and in a notebook after half a second; False for none, or a function
            that is called with (done, total).

    Returns:
        The neurons, strongest attribution first.

    Raises:
        JobError: fewer than two prompts, the circuit's own or the same one twice, settings out of range.
    """
    model, prompts = model_of(model), as_prompts(prompts)
    rules = Constancy(share, threshold, exact_below)
    rules.check()
    asked = [_as_prompt(one, circuit) for one in _unrelated(model, circuit, prompts)]
    how = Question(circuit.settings, circuit.selection)
    with bars.shown(progress, "looking at unrelated prompts") as report:
        found = constant_neurons(model, asked, how, rules, abs(circuit.metric), memory, report)
    held = Counter((row["layer"], row["neuron"]) for row in circuit.rows("neuron"))
    return [replace(one, n_nodes=held[one.layer, one.neuron]) for one in found]


@undisturbed()
def constant_neurons(
    model: Model,
    prompts: Sequence[Prompt],
    how: Question,
    rules: Constancy,
    floor: float = 0.0,
    memory: int | None = None,
    progress: Progress | None = None,
) -> list[AlwaysOn]:
    """`always_on` among any prompts that have a question of their own: those of a dataset, say.

    Args:
        floor: the least that a prompt's ``|metric|`` counts as.

    Raises:
        JobError: prompts that cannot be asked, or do not differ.
    """
    encoded = [encode(one, model) for one in prompts]
    found = _attributed(model, how, prompts, None, memory, progress)
    encoded = [
        replace(one, target_ids=target, foil_ids=foil)
        for one, target, foil in zip(encoded, found.target_ids, found.foil_ids, strict=True)
    ]
    strength = found.nodes.abs() * _differing(found.token_ids, how)[:, None]
    largest, position = strength.max(2)
    scale = found.metric.abs().clamp_min(floor)
    strong = (largest >= rules.threshold * scale[:, None, None]) & (largest > 0)
    often = strong.double().mean(0)
    candidates = strong & (often > rules.share)
    exact = _to_the_mean(model, how, encoded, candidates, position, memory, progress)
    count = candidates.sum(0).clamp_min(1)
    estimate, effect = (largest * candidates).sum(0) / count, exact.sum(0) / count
    spread = (((largest - estimate) * candidates).square().sum(0) / count).sqrt()
    kept = (candidates.any(0) & (effect < rules.exact_below * estimate)).nonzero().tolist()
    numbers = torch.stack([often.float(), estimate, effect, spread], -1)
    listed = list[AlwaysOn]()
    for at, one in kept:
        share, attribution, exact, wide = numbers[at, one].tolist()
        listed.append(AlwaysOn(at, one, share, attribution, exact, n_nodes=0, spread=wide))
    return sorted(listed, key=lambda one: -one.attribution)


def _check(
    model: Model,
    circuit: Circuit,
    ablation: str,
    reference: Sequence[Prompt] | None,
    paired: tuple[int, ...] | None,
    n_each: int,
    memory: int | None,
) -> None:
    """Refuse settings that cannot be meant, before anything is computed."""
    baseline = circuit.settings.baseline
    if ablation not in ABLATIONS:
        raise JobError(f"ablation={ablation!r}", f"must be one of {', '.join(ABLATIONS)}", "choose one")
    if n_each < 3:
        raise JobError(f"n_each={n_each}", "a correlation needs at least three nodes", "use 3 or more; 100 is usual")
    if memory is not None and memory < 1:
        raise JobError(f"memory={memory}", "must be a positive number of bytes", "leave it out for the default")
    needed = [
        name for name, kind in ((f"ablation={ablation!r}", ablation), ("the circuit", baseline)) if kind == "mean"
    ]
    if needed and not reference:
        raise JobError(needed[0], "a mean needs prompts to be over", "give reference= with more prompts")
    if reference is not None and not needed:
        raise JobError("reference", f"has no effect with ablation {ablation!r}", "leave it out")
    if baseline == "mean" and Reference(reference or ()).hash(model) != circuit.reference:
        raise JobError("reference", "is not what the circuit was traced with", "give the same prompts in their order")
    if ablation == "counterfactual" and paired is None:
        raise JobError("ablation='counterfactual'", "the prompt has no counterfactual", "give prompt= with one")
    if ablation == "counterfactual" and paired == circuit.token_ids:
        raise JobError("ablation='counterfactual'", "the counterfactual is the prompt itself", "give one that differs")


def _own_prompt(model: Model, circuit: Circuit, prompt: Prompt | None) -> Encoded:
    """What the circuit was asked, with the counterfactual of `prompt` if it has none itself."""
    model.check_traced(circuit.model, circuit.text)
    paired = circuit.counterfactual_ids
    if prompt is not None:
        given = encode(prompt, model)
        same = given.token_ids == circuit.token_ids and given.positions == circuit.positions
        asked = given.target_ids in ((), circuit.target_ids) and given.foil_ids == circuit.foil_ids
        if not (same and asked):
            raise JobError(
                f"prompt {quoted(given.text)}",
                f"is not what the circuit of {quoted(circuit.text)} asks",
                "leave it out",
            )
        if None not in (paired, given.counterfactual_ids) and paired != given.counterfactual_ids:
            raise JobError(
                f"prompt {quoted(given.text)}", "has another counterfactual than the circuit", "leave it out"
            )
        paired = paired or given.counterfactual_ids
    return replace(own_prompt(circuit), counterfactual_ids=paired)


def _as_prompt(one: Encoded, circuit: Circuit) -> Prompt:
    """Back to a prompt: without a target it gets the circuit's question, unless the metric finds its own tokens."""
    if not one.target_ids:
        one = replace(one, target_ids=circuit.target_ids, foil_ids=circuit.foil_ids)
    return as_prompt(one, circuit.settings)


def _attributed(
    model: Model,
    how: Circuit | Question,
    prompts: Sequence[Prompt],
    reference: Sequence[Prompt] | None,
    memory: int | None,
    progress: Progress | None,
) -> Attribution:
    """All nodes, attributed as the circuit's were."""
    chosen = how.settings
    return attribute(
        model,
        prompts,
        chosen.method,
        chosen.baseline,
        chosen.basis,
        chosen.rules,
        chosen.steps,
        metric=chosen.metric,
        top_k=chosen.top_k,
        share=chosen.share,
        of=chosen.of,
        seed=chosen.seed,
        reference=reference if chosen.baseline == "mean" else None,
        memory=memory,
        progress=progress,
    )


def _sampled(
    nodes: Float[Tensor, "layer pos neuron"],
    there: Bool[Tensor, "layer pos neuron"] | None,
    circuit: Circuit,
    n_each: int,
    seed: int,
) -> tuple[Int[Tensor, "node 3"], Int[Tensor, " node"]]:
    """A stratified sample of what the circuit could have held, as (layer, position, neuron), and each one's stratum;
    `there` says which nodes there are, all if None."""
    allowed = torch.ones_like(nodes, dtype=torch.bool) if there is None else there
    if circuit.selection.get("skip_first"):
        allowed[:, 0] = False
    for layer, neuron in circuit.selection.get("exclude") or ():
        allowed[layer, :, neuron] = False
    places = allowed.nonzero()
    drawn = statistics.stratified(nodes[allowed], n_each, seed)
    parts = [drawn.strong, drawn.middle, drawn.random]
    stratum = torch.cat([torch.full_like(part, i) for i, part in enumerate(parts)])
    return places[torch.cat(parts)], stratum


def _replacement(model: Model, prompt: Encoded, ablation: str, reference: Sequence[Prompt] | None) -> Replacement:
    """What each node of the prompt is ablated to."""
    if ablation == "mean":
        return Replacement(tuple(encode(one, model).token_ids for one in reference or ()), mean=True)
    if ablation == "counterfactual" and prompt.counterfactual_ids is not None:
        return Replacement((prompt.counterfactual_ids,))
    return Replacement()


def _alone(
    model: Model,
    circuit: Circuit,
    prompt: Encoded,
    nodes: Int[Tensor, "node 3"],
    to: Replacement,
    memory: int | None,
    progress: Progress | None,
) -> Float[Tensor, " node"]:
    """How far the prompt's metric falls when each node alone is ablated."""
    return _falls(model, circuit, [(prompt, nodes)], to, memory, progress)


def _falls(
    model: Model,
    how: Circuit | Question,
    asked: Sequence[tuple[Encoded, Int[Tensor, "_ 3"]]],
    to: Replacement,
    memory: int | None,
    progress: Progress | None,
) -> Float[Tensor, " node"]:
    """How far the metric of each prompt falls when each of its nodes alone is ablated, in order."""
    chosen, budget = how.settings, memory or model.budget()
    to = to.here(model, max(len(one.token_ids) for one, _ in asked), chosen.basis, budget)
    rows, order = list[AblatedRow](), list[Tensor]()
    for one, nodes in asked:  # by layer, so that most layers of a forward stay as they are
        alone, by_layer = Ranking.of(nodes), nodes[:, 0].argsort(stable=True)
        order.append(by_layer + len(rows))
        rows += [AblatedRow(one, alone, (0, place, place + 1)) for place in by_layer.tolist()]
    found = ablations.measured(model, rows, to, chosen, chosen.basis, budget, falls=True, progress=progress)
    return torch.empty_like(found).index_copy_(0, torch.cat(order), found)


def _judged(circuit: Circuit, sample: Sample, metric: float, ablation: str, seed: int) -> Quality:
    """The correlations over the sample and each stratum."""
    rounding = _ROUNDING * max(abs(row["activation"]) for row in circuit.ends)
    everything = torch.ones(len(sample), dtype=torch.bool)
    return Quality(
        whole=_correlated(sample, everything, rounding, seed),
        strata={name: _correlated(sample, sample.stratum == i, rounding, seed) for i, name in enumerate(STRATA)},
        sample=sample,
        method=circuit.settings.method,
        baseline=circuit.settings.baseline,
        ablation=ablation,
        metric=metric,
        seed=seed,
    )


def _correlated(sample: Sample, part: Tensor, rounding: float, seed: int) -> Correlation:
    """The correlation over part of the sample; a side without variation has none."""
    estimate, exact = sample.attribution[part], sample.exact[part]
    count = len(exact)
    if count < 3:
        return Correlation(count, None, "a correlation needs at least three nodes")
    if bool((estimate == estimate[0]).all()):
        return Correlation(count, None, f"every attribution is {float(estimate[0]) + 0.0:.3g}")
    if float(exact.max() - exact.min()) <= rounding:
        return Correlation(count, None, f"exact effects differ by no more than rounding, {rounding:.1g}")
    return Correlation(count, statistics.agreement(estimate, exact, seed))


def _unrelated(model: Model, circuit: Circuit, prompts: Sequence[Prompt]) -> list[Encoded]:
    """The unrelated prompts, checked."""
    model.check_traced(circuit.model, circuit.text)
    if isinstance(prompts, Prompt | str) or not all(isinstance(one, Prompt) for one in prompts):
        raise JobError(f"prompts={quoted(prompts)}", "must be a list of tracer.Prompt", "write [tracer.Prompt(...)]")
    if len(prompts) < 2:
        raise JobError(f"{len(prompts)} unrelated prompts", "at least 2 are needed", "give more; 20 is usual")
    encoded = [encode(one, model) for one in prompts]
    seen = {circuit.token_ids}
    for one in encoded:
        if one.token_ids in seen:
            rule = "is the circuit's own" if one.token_ids == circuit.token_ids else "is given twice"
            raise JobError(f"prompt {quoted(one.text)}", rule, "give different, unrelated prompts")
        seen.add(one.token_ids)
    return encoded


def _differing(token_ids: Sequence[tuple[int, ...]], how: Question) -> Float[Tensor, "prompt pos 1"]:
    """1 at the positions of each prompt where the prompts, up to there, are not all the same; 0 where they are, or
    where only one is that long: a mean over them would be the prompt's own value."""
    width = max(len(ids) for ids in token_ids)
    differ = torch.zeros(len(token_ids), width, 1)
    for position in range(1 if how.selection.get("skip_first") else 0, width):
        longer = [row for row, ids in enumerate(token_ids) if len(ids) > position]
        if len({token_ids[row][: position + 1] for row in longer}) > 1:
            differ[longer, position] = 1.0
    if not bool(differ.any()):
        raise JobError("unrelated prompts", "do not differ at any common position", "give more prompts, as long")
    return differ


def _to_the_mean(
    model: Model,
    how: Circuit | Question,
    prompts: Sequence[Encoded],
    candidates: Tensor,
    position: Tensor,
    memory: int | None,
    progress: Progress | None,
) -> Float[Tensor, "prompt layer neuron"]:
    """|change of the metric| when each candidate's node at `position` alone goes to its mean; 0 elsewhere."""
    effects = torch.zeros(candidates.shape)
    if bool(candidates.any()):
        at = [one.nonzero().unbind(-1) for one in candidates]
        asked = [
            (one, torch.stack([layer, position[row, layer, neuron], neuron], -1))
            for row, (one, (layer, neuron)) in enumerate(zip(prompts, at, strict=True))
        ]
        to = Replacement(tuple(one.token_ids for one in prompts), mean=True)
        effects[candidates] = _falls(model, how, asked, to, memory, progress).abs()
    return effects
