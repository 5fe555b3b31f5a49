"""What circuits of every size do: faithfulness, completeness and a control, by size.

Knows how a ranking of nodes is measured and becomes curves, areas and sizes with intervals. Refuses to know where a
ranking comes from, and jobs, tasks and files.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tracer.attribution.exact import Progress
from tracer.errors import JobError, say
from tracer.evaluation import statistics
from tracer.evaluation.statistics import Interval, Size
from tracer.evaluation.testset import Job, Ranks, TestSet
from tracer.shapes import PerPrompt
from tracer.system.display import Plotted

LEVELS = (0.5, 0.8, 0.9, 0.95)

_INTERVALS = ("faithfulness", "completeness", "control_faithfulness", "cpr", "cmd")


@dataclass(frozen=True, repr=False)
class Curves(Plotted):
    """What circuits do, by size.

    Attributes:
        sizes: nodes of the circuit, strongest first. n_neurons: unique (layer, neuron) among them.
        faithfulness, completeness, control_faithfulness: ratios of means, with 95 % intervals over prompts; the control
            is of random nodes, as many in each layer as the circuit has.
        cpr, cmd: areas over size as MIB defines them; NaN of a single size.
        sizes_for: the fewest of `sizes` that reach a faithfulness, by level; None where none does.
        settles: the fewest of `sizes` from which faithfulness stays within .1 of 1, at every larger one; None where it
            is outside at the largest.
    """

    sizes: tuple[int, ...]
    n_neurons: tuple[int, ...]
    faithfulness: Interval
    completeness: Interval
    control_faithfulness: Interval
    cpr: Interval
    cmd: Interval
    sizes_for: dict[float, Size]
    settles: Size

    def record(self) -> dict[str, Any]:
        """As files hold it: numbers, lists and names."""
        return {
            "sizes": list(self.sizes),
            "n_neurons": list(self.n_neurons),
            **{name.removesuffix("_faithfulness"): getattr(self, name).record() for name in _INTERVALS},
            "sizes_for": {f"{level:g}": size.record() for level, size in self.sizes_for.items()},
            "settles": self.settles.record(),
        }

    @staticmethod
    def of(record: Mapping[str, Any]) -> Curves:
        """Curves from their `record`; of one from before there was `settles`, that is without its interval."""
        sizes, faithfulness = tuple(record["sizes"]), Interval.of(record["faithfulness"])
        settled = record.get("settles") or {
            "low": None,
            "high": None,
            "estimate": statistics.settled_size(sizes, faithfulness.estimate),
        }
        return Curves(
            sizes=sizes,
            n_neurons=tuple(record["n_neurons"]),
            **{name: Interval.of(record[name.removesuffix("_faithfulness")]) for name in _INTERVALS},
            sizes_for={float(level): Size(**size) for level, size in record["sizes_for"].items()},
            settles=Size(**settled),
        )

    def to_pandas(self) -> Any:
        """The curves as a pandas DataFrame, a row per size: `size`, `n_neurons`; then `faithfulness`, `completeness`
        and `control` (the faithfulness of random nodes), each with its `_low` and `_high`."""
        import pandas

        return pandas.DataFrame(list(self.rows()))

    def up_to(self, size: int) -> int:
        """Which of `sizes` is the largest up to that one; the first where all are larger."""
        return max((i for i, one in enumerate(self.sizes) if one <= size), default=0)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The curves as a table, a row per size."""
        record = self.record()
        for i, size in enumerate(self.sizes):
            row: dict[str, Any] = {"size": size, "n_neurons": self.n_neurons[i]}
            for name in ("faithfulness", "completeness", "control"):
                row |= columns(name, {end: values[i] for end, values in record[name].items()})
            yield row


def columns(name: str, ends: Mapping[str, Any]) -> dict[str, Any]:
    """An interval's or a size's record as three columns of a table."""
    return {name: ends["estimate"], f"{name}_low": ends["low"], f"{name}_high": ends["high"]}


@dataclass(frozen=True, repr=False)
class Evaluation(Curves):
    """What ablations say of a circuit, at each of its sizes.

    Attributes:
        sizes: nodes of the circuit, strongest first. n_neurons: unique (layer, neuron) among them.
        faithfulness, completeness, control_faithfulness: ratios of means, with 95 % intervals over prompts; the control
            is of random nodes, as many in each layer as the circuit has.
        cpr, cmd: areas over size as MIB defines them; NaN of a single size.
        sizes_for: the fewest of `sizes` that reach a faithfulness, by level; None where none does.
        settles: the fewest of `sizes` from which faithfulness stays within .1 of 1, at every larger one; None where it
            is outside at the largest.
        n_total: nodes the model has on these prompts.
        whole, empty: the metric of each prompt, of the model as it is and with every node ablated.
        inside, outside: of each prompt and size, with everything outside the circuit ablated, and the circuit ablated.
        control: the same as inside, for random nodes, as many in each layer as the circuit has.
        ablation, seed: how it was measured.
        n_shared: test prompts that the circuit was found on as well, where that was allowed.
        warnings: what whoever reads it should know, a sentence each.
    """

    n_total: int
    whole: PerPrompt
    empty: PerPrompt
    inside: Float[Tensor, "prompt size"]
    outside: Float[Tensor, "prompt size"]
    control: Float[Tensor, "prompt size"]
    ablation: str
    seed: int
    n_shared: int = 0
    warnings: tuple[str, ...] = ()


def measure(
    test: TestSet,
    ranks: Ranks,
    control: Ranks,
    sizes: Sequence[int],
    n_total: int,
    seed: int,
    *,
    areas: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Circuits of every size, what is without them and random ones on all test prompts, in shared passes. One prompt
    alone has no intervals.

    Args:
        ranks: each node's place in the ranking, from 0. control: of the random one.
        n_total: nodes, of which `sizes` are shares.
        seed: of the intervals.
        areas: those of `sizes` that `cpr` and `cmd` are areas over; all if None.
    """
    n, rows, areas = len(sizes), range(len(test.prompts)), areas or sizes
    kinds = ((ranks, True), (ranks, False), (control, True))
    jobs = [Job(row, ranking, size, stays) for ranking, stays in kinds for row in rows for size in sizes]
    full, empty, measured = test.measure_with_ends(jobs, progress)
    tables = measured.view(3, len(rows), n)
    every = torch.cat([empty[:, None], full[:, None], *tables], -1)
    ratios = statistics.resample(every, _restored, seed=seed)
    parts = [ratios.map(lambda values, i=i: values[..., i * n : (i + 1) * n]) for i in range(3)]
    over = parts[0].map(lambda values: values[..., [sizes.index(size) for size in areas]])
    cpr, cmd = _areas(over, [size / n_total for size in areas])
    return Evaluation(
        tuple(sizes),
        _unique(ranks, sizes),
        *(part.interval() for part in parts),
        cpr=cpr,
        cmd=cmd,
        sizes_for={level: statistics.size_for(list(sizes), parts[0], level) for level in LEVELS},
        settles=statistics.settles(list(sizes), parts[0]),
        n_total=n_total,
        whole=full,
        empty=empty,
        inside=tables[0],
        outside=tables[1],
        control=tables[2],
        ablation=test.ablation,
        seed=seed,
        n_shared=test.n_shared,
    )


def _restored(rows: Tensor) -> statistics.Ratio:
    """Of rows (empty, full, measured...), how much of the metric each restores."""
    return statistics.restored(rows[..., 2:], rows[..., 0], rows[..., 1])


def curves(
    test: TestSet, ranks: Ranks, sizes: Sequence[int], seed: int, progress: Progress | None = None
) -> Evaluation:
    """One ranking's curves: all sizes and prompts, circuits, what is without them and random ones, in shared passes.

    Args:
        ranks: the place of every node from 0, each given once, from `ordered`; or of every neuron, the same at every
            position, where a circuit of n is n neurons at all positions, and so is its random control.
        sizes: of the circuits. Those above all there are are left out, which is said; MIB's shares of all are added.
        seed: of the random control and the intervals.

    Raises:
        JobError: a ranking of other nodes than the test prompts', or one that leaves some out or names one twice.
    """
    total = _n_ranked(test, ranks)
    areas = sorted({max(1, round(share * total)) for share in statistics.MIB_SIZES})
    kept = sorted({*(size for size in sizes if size <= total), *areas})
    found = measure(test, ranks, control(ranks, seed, test.there), kept, total, seed, areas=areas, progress=progress)
    if too_large := [f"{size:,}" for size in sizes if size > total]:
        what = "neurons" if _is_free(ranks) else "nodes"
        left = f"sizes {', '.join(too_large)} are left out: there are {total:,} {what} on these prompts"
        say([left])
        found = replace(found, warnings=(*found.warnings, left))
    return found


def ordered(attributions: Float[Tensor, "layer pos neuron"], ranking: str) -> Ranks:
    """The place of every node in a ranking, from 0; ties in order of layer, position, neuron.

    ``absolute``: strongest first, whatever the sign. ``signed``: largest first, so that what speaks against the answer
    comes last. For a position-free ranking give one position, and expand what comes back to all of them.
    """
    strength = attributions.abs() if ranking == "absolute" else attributions
    order = strength.flatten().sort(descending=True, stable=True).indices
    ranks = torch.empty(len(order), dtype=torch.int32)
    ranks[order] = torch.arange(len(order), dtype=torch.int32)
    return ranks.view_as(attributions)


def shuffled(ranks: Ranks, seed: int, there: Bool[Tensor, "layer place neuron"] | None = None) -> Ranks:
    """The same ranks at random places of their layers: at every size as many nodes in each layer as the circuit.

    Args:
        there: which nodes change places, where a mixture does not have all (`TestSet.there`).
    """
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for number, layer in enumerate(ranks):
        flat = layer.flatten().clone()
        some = slice(None) if there is None else there[number].flatten()
        flat[some] = flat[some][torch.randperm(len(flat[some]), generator=generator)]
        layers.append(flat.view_as(layer))
    return torch.stack(layers)


def count_nodes(ranks: Ranks, there: Bool[Tensor, "layer pos neuron"] | None) -> int:
    """How many nodes a ranking is of, of those that are there; neurons, where it is of such."""
    return placed(ranks).numel() if there is None else int(_as_placed(there, ranks).sum())


def _as_placed(there: Bool[Tensor, "layer pos neuron"], ranks: Ranks) -> Bool[Tensor, "layer place neuron"]:
    return there.any(1, keepdim=True) if _is_free(ranks) else there


def _areas(over: statistics.Resamples, shares: Sequence[float]) -> list[Interval]:
    """`Curves.cpr` and `Curves.cmd` of the faithfulness at these shares of all nodes."""
    if len(shares) == 1:
        return [Interval(*torch.full((3,), torch.nan, dtype=torch.double))] * 2
    return [over.map(functools.partial(area, shares)).interval() for area in (statistics.cpr, statistics.cmd)]


def _n_ranked(test: TestSet, ranks: Ranks) -> int:
    """How many are ranked: all nodes, or all neurons where a neuron has one place at every position."""
    nodes = test.shape
    if tuple(ranks.shape) != nodes:
        shapes = f"[layer, pos, neuron] is {list(ranks.shape)}, of the test prompts {list(nodes)}"
        raise JobError("ranking", shapes, "test on prompts of the same length, on the same model and basis")
    mine = placed(ranks).flatten()
    if not torch.equal(mine.sort().values, torch.arange(len(mine), dtype=mine.dtype)):
        raise JobError("ranking", "must give every place from 0 once", "make it with curves.ordered")
    return count_nodes(ranks, test.there)


def _is_free(ranks: Ranks) -> bool:
    return bool((ranks == ranks[:, :1]).all())


def control(ranks: Ranks, seed: int, there: Bool[Tensor, "layer pos neuron"] | None = None) -> Ranks:
    """Random nodes, as many in each layer at every size; random neurons at all positions if the ranking is of such;
    `there` as of `shuffled`."""
    some = None if there is None else _as_placed(there, ranks)
    return shuffled(placed(ranks), seed, some).expand_as(ranks)


def placed(ranks: Ranks) -> Int[Tensor, "layer place neuron"]:
    """Every node's place; where a neuron has one at all positions, one position of them."""
    return ranks[:, :1] if _is_free(ranks) else ranks


def _unique(ranks: Ranks, sizes: Sequence[int]) -> tuple[int, ...]:
    """(layer, neuron) pairs among the first nodes: each counts from its best position on."""
    best = ranks.amin(1).flatten()
    return tuple(int((best < size).sum()) for size in sizes)
