"""Does a circuit hold: the metric with everything else ablated, and with it ablated, at many sizes (method.md 5).

Knows which sets of nodes are measured on which prompts. Refuses to know how the circuit was found, how a set is ablated
(evaluation/ablations.py) and how resampling works (evaluation/statistics.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from tracer.attribution.attribute import check_reach, with_metric
from tracer.attribution.methods import Progress
from tracer.circuit.circuit import Circuit
from tracer.errors import JobError, quoted
from tracer.evaluation import statistics
from tracer.evaluation.ablations import NEVER, AblationTest, Job, Ranks, Replacement
from tracer.model.model import Model
from tracer.prompts import Encoded, Prompt, encode
from tracer.settings import settings

ABLATIONS = ("zero", "mean", "counterfactual", "resample")
LEVELS = (0.5, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Evaluation:
    """What ablations say of a circuit, at each of its sizes.

    Attributes:
        sizes: nodes of the circuit kept, strongest first. n_neurons: unique (layer, neuron) among them.
        n_total: nodes the model has on these prompts.
        whole, empty: the metric of each prompt, of the model as it is and with every node ablated.
        inside, outside: of each prompt and size, with everything outside the circuit ablated, and the circuit ablated.
        control: as `inside`, for random nodes, as many in each layer as the circuit has.
        faithfulness, completeness, control_faithfulness: ratios of means, with 95 % intervals over prompts.
        cpr, cmd: areas over size as MIB defines them; None without their sizes (shares of all nodes).
        sizes_for: the fewest of `sizes` that reach a faithfulness, by level; None where none does.
        ablation, seed: how it was measured.
    """

    sizes: tuple[int, ...]
    n_neurons: tuple[int, ...]
    n_total: int
    whole: Float[Tensor, " prompt"]
    empty: Float[Tensor, " prompt"]
    inside: Float[Tensor, "prompt size"]
    outside: Float[Tensor, "prompt size"]
    control: Float[Tensor, "prompt size"]
    faithfulness: statistics.Interval
    completeness: statistics.Interval
    control_faithfulness: statistics.Interval
    cpr: statistics.Interval
    cmd: statistics.Interval
    sizes_for: dict[float, statistics.Size]
    ablation: str
    seed: int


def evaluate(
    model: Model,
    circuit: Circuit,
    prompts: Sequence[Prompt],
    ablation: str = "mean",
    sizes: Sequence[int] | None = None,
    *,
    reference: Sequence[Prompt] | None = None,
    train: Sequence[Prompt] = (),
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
        train: prompts that the circuit was found on; one of them among the test prompts is an error.
        aligned: a node is a neuron at its position; if False its neuron at every position.
        seed: of the random control, the resampled prompts and the intervals.
        memory: bytes one batch may use.

    Raises:
        JobError: prompts that do not fit, a size above the circuit's, an ablation that changes nothing.

    Source: method.md section 5; Arora et al. 2026, section 4.
    """
    if ablation not in ABLATIONS:
        raise JobError(f"ablation={ablation!r}", f"must be one of {', '.join(ABLATIONS)}", "choose one")
    test = _test(model, circuit, prompts, ablation, reference, train, aligned, seed, memory or model.budget())
    ranks = _ranks(model, circuit, len(test.prompts[0].token_ids), aligned)
    chosen = _sizes(circuit.n_nodes if aligned else circuit.n_neurons, sizes)
    random = shuffled(ranks, seed)
    n_prompts = len(test.prompts)
    jobs = _whole_and_empty(ranks, n_prompts)
    for ranking, stays in ((ranks, True), (ranks, False), (random, True)):
        jobs += [Job(row, ranking, size, stays) for row in range(n_prompts) for size in chosen]
    found = test.measure(jobs, progress)
    whole, empty, rest = found[:n_prompts], found[n_prompts : 2 * n_prompts], found[2 * n_prompts :]
    inside, outside, control = rest.view(3, n_prompts, len(chosen))
    return _summed(circuit, ranks, chosen, whole, empty, inside, outside, control, ablation, seed, aligned)


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
    test = _test(model, circuit, prompts, ablation, reference, (), True, seed, memory or model.budget())
    ranks = _ranks(model, circuit, len(test.prompts[0].token_ids), True)
    size, n_prompts = circuit.n_nodes, len(test.prompts)
    jobs = _whole_and_empty(ranks, n_prompts)
    jobs += [Job(row, ranks, size, True, without) for row in range(n_prompts) for without in range(-1, size)]
    found = test.measure(jobs, progress)
    whole, empty, rest = found[:n_prompts], found[n_prompts : 2 * n_prompts], found[2 * n_prompts :]
    curve = statistics.faithfulness(rest.view(n_prompts, size + 1), empty, whole)
    return (curve[0] - curve[1:]).float()


def _whole_and_empty(ranks: Ranks, n_prompts: int) -> list[Job]:
    """The jobs that measure every prompt whole, then with every node ablated."""
    return [Job(row, ranks, 0, stays) for stays in (False, True) for row in range(n_prompts)]


def _test(
    model: Model,
    circuit: Circuit,
    prompts: Sequence[Prompt],
    ablation: str,
    reference: Sequence[Prompt] | None,
    train: Sequence[Prompt],
    aligned: bool,
    seed: int,
    memory: int,
) -> AblationTest:
    """Check the prompts and work out what their nodes are ablated to."""
    model.check_traced(circuit.model, circuit.text)
    encoded = [encode(prompt, model) for prompt in prompts]
    check_test(encoded, [encode(prompt, model) for prompt in train], len(circuit.token_ids) if aligned else None)
    metric = circuit.settings.metric
    with_metric(
        settings(metric=metric, top_k=circuit.settings.top_k) if metric == "topk" else settings(metric=metric), encoded
    )
    values = ablation_values(model, encoded, ablation, reference, circuit.settings.basis, seed)
    return AblationTest(model, tuple(encoded), metric, values, circuit.settings.basis, memory)


def check_test(encoded: Sequence[Encoded], train: Sequence[Encoded] = (), length: int | None = None) -> None:
    """Refuse test prompts that cannot be measured together.

    Args:
        train: prompts that the circuit was found on. length: in tokens, that the test prompts must have.

    Raises:
        JobError: fewer than 2, one without a target or of another length, one that was trained on.
    """
    if len(encoded) < 2:
        raise JobError(f"{len(encoded)} test prompts", "intervals need at least 2", "give more test prompts")
    if missing := [one for one in encoded if not one.target_ids]:
        raise JobError(f"prompt {quoted(missing[0].text)}", "has no target to measure", "give every test prompt one")
    lengths = {len(one.token_ids) for one in encoded}
    wanted = min(lengths) if length is None else length
    if lengths != {wanted}:
        other = next(one for one in encoded if len(one.token_ids) != wanted)
        raise JobError(
            f"prompt {quoted(other.text)}",
            f"is {len(other.token_ids)} tokens, {wanted} are needed: nodes are ablated position by position",
            "give test prompts of one length, the circuit's own unless aligned=False",
        )
    seen = {one.token_ids for one in train}
    if both := [one for one in encoded if one.token_ids in seen]:
        raise JobError(f"prompt {quoted(both[0].text)}", "is both a train and a test prompt", "hold it out of one")


def ablation_values(
    model: Model,
    encoded: Sequence[Encoded],
    ablation: str,
    reference: Sequence[Prompt] | None,
    basis: str,
    seed: int,
) -> Float[Tensor, "prompt layer pos neuron"] | Replacement:
    """What each prompt's nodes are ablated to; of a remote model where that comes from.

    Args:
        encoded: test prompts of one length. reference: behind ``mean`` and ``resample``, as in `evaluate`.
        seed: of the prompts that ``resample`` draws.

    Raises:
        JobError: a prompt without its counterfactual, a reference of another length or without effect.
    """
    found = _replacement(model, encoded, ablation, reference, seed)
    if model.remote is not None:
        return found
    return found.values(model, len(encoded), len(encoded[0].token_ids), basis)


def _replacement(
    model: Model, encoded: Sequence[Encoded], ablation: str, reference: Sequence[Prompt] | None, seed: int
) -> Replacement:
    length = len(encoded[0].token_ids)
    if reference is not None and ablation in ("zero", "counterfactual"):
        raise JobError("reference", f"has no effect with ablation {ablation!r}", "leave it out")
    if ablation == "zero":
        return Replacement()
    paired = [one.counterfactual_ids for one in encoded if one.counterfactual_ids is not None]
    if ablation == "counterfactual":
        if len(paired) < len(encoded):
            raise JobError(
                "ablation='counterfactual'", "a test prompt has no counterfactual", "give every one its pair"
            )
        return Replacement(tuple(paired), tuple(range(len(paired))))
    if reference is not None:
        others = [encode(prompt, model).token_ids for prompt in reference]
    else:
        others = paired if len(paired) == len(encoded) else [one.token_ids for one in encoded]
    if bad := [ids for ids in others if len(ids) != length]:
        raise JobError(
            f"a reference prompt of {len(bad[0])} tokens", f"the test prompts have {length}", "give equally long ones"
        )
    check_reach(others, length)
    if ablation == "mean":
        return Replacement(tuple(others))
    drawn = torch.randint(len(others), (len(encoded),), generator=torch.Generator().manual_seed(seed))
    return Replacement(tuple(others), tuple(drawn.tolist()))


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


def shuffled(ranks: Ranks, seed: int) -> Ranks:
    """The same ranks at random places of their layers: at every size as many nodes in each layer as the circuit."""
    generator = torch.Generator().manual_seed(seed)
    layers = [layer.flatten()[torch.randperm(layer.numel(), generator=generator)].view_as(layer) for layer in ranks]
    return torch.stack(layers)


def _sizes(largest: int, sizes: Sequence[int] | None) -> tuple[int, ...]:
    if sizes is None:
        grid = (1, 2, 5, 10, 20, 35, 50, 75, 100, 150, 200, 300, 500, 1000, 2000, 5000)
        return (*(size for size in grid if size < largest), largest)
    if not sizes or min(sizes) < 1 or max(sizes) > largest or list(sizes) != sorted(set(sizes)):
        raise JobError(
            f"sizes={list(sizes)}", f"must rise from 1 to at most {largest}, the circuit's size", "change them"
        )
    return tuple(sizes)


def _summed(
    circuit: Circuit,
    ranks: Ranks,
    sizes: tuple[int, ...],
    whole: Tensor,
    empty: Tensor,
    inside: Tensor,
    outside: Tensor,
    control: Tensor,
    ablation: str,
    seed: int,
    aligned: bool,
) -> Evaluation:
    """The ratios, areas and intervals of what was measured."""
    table = torch.stack([empty, whole, *inside.unbind(1), *outside.unbind(1), *control.unbind(1)], -1)
    curves = statistics.resample(
        table, lambda rows: statistics.restored(rows[..., 2:], rows[..., 0], rows[..., 1]), seed=seed
    )
    n = len(sizes)
    parts = [curves.map(lambda values, i=i: values[..., i * n : (i + 1) * n]) for i in range(3)]
    shares = [size / ranks.numel() for size in sizes]
    unique = circuit.neurons.to_pylist()
    return Evaluation(
        sizes=sizes,
        n_neurons=tuple(_unique(unique, size) if aligned else size for size in sizes),
        n_total=ranks.numel(),
        whole=whole,
        empty=empty,
        inside=inside,
        outside=outside,
        control=control,
        faithfulness=parts[0].interval(),
        completeness=parts[1].interval(),
        control_faithfulness=parts[2].interval(),
        cpr=parts[0].map(partial(statistics.cpr, shares)).interval(),
        cmd=parts[0].map(partial(statistics.cmd, shares)).interval(),
        sizes_for={level: statistics.size_for(list(sizes), parts[0], level) for level in LEVELS},
        ablation=ablation,
        seed=seed,
    )


def _unique(rows: Iterable[dict[str, int]], size: int) -> int:
    return len({(row["layer"], row["neuron"]) for row in list(rows)[:size]})
