"""What circuits of every size do, for one ranking of all nodes: faithfulness, completeness and a control, by size.

Knows how a ranking becomes curves, areas and sizes with intervals, on test prompts that are prepared once for all
rankings. Refuses to know where a ranking comes from, and jobs, tasks and files.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tracer.attribution.attribute import with_metric
from tracer.errors import JobError
from tracer.evaluation import statistics
from tracer.evaluation.ablations import NEVER, AblationTest, Job, Ranks
from tracer.evaluation.faithfulness import LEVELS, ablation_values, check_test, shuffled
from tracer.model.model import Model
from tracer.prompts import Encoded, Prompt
from tracer.records import Record
from tracer.settings import settings

_ROWS = 256  # of one batch of ablations: more gain nothing on a CPU


class Number(Record):
    """A number with the ends of its 95 % interval."""

    estimate: float
    low: float
    high: float


class Band(Record):
    """A curve with the ends of its 95 % intervals, by size."""

    estimate: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


class Reach(Record):
    """The fewest nodes that reach a level of faithfulness; None where no measured size does."""

    estimate: int | None
    low: int | None
    high: int | None


class Curves(Record):
    """What the circuits of one ranking do, by size; fields as in `evaluation.Evaluation`.

    `cpr` and `cmd` are areas over MIB's sizes, `sizes_for` is over all sizes measured.
    """

    sizes: tuple[int, ...]
    n_neurons: tuple[int, ...]
    faithfulness: Band
    completeness: Band
    control: Band
    cpr: Number
    cmd: Number
    sizes_for: dict[str, Reach]

    def rows(self) -> Iterator[dict[str, Any]]:
        """The curves as a table, a row per size."""
        for i, size in enumerate(self.sizes):
            row: dict[str, Any] = {"size": size, "n_neurons": self.n_neurons[i]}
            for name in ("faithfulness", "completeness", "control"):
                band: Band = getattr(self, name)
                row |= {name: band.estimate[i], f"{name}_low": band.low[i], f"{name}_high": band.high[i]}
            yield row


@dataclass(frozen=True)
class Bench:
    """Test prompts with what their nodes are ablated to, and the metric of each: of the whole model, and of the empty
    one, with every node ablated."""

    test: AblationTest
    whole: Float[Tensor, " prompt"]
    empty: Float[Tensor, " prompt"]

    @staticmethod
    def of(
        model: Model,
        test: Sequence[Encoded],
        ablation: str,
        basis: str,
        seed: int,
        reference: Sequence[Prompt] | None = None,
        *,
        metric: str = "auto",
        train: Sequence[Encoded] = (),
        memory: int | None = None,
    ) -> Bench:
        """Prepare test prompts, all of one length.

        Args:
            ablation, reference: as in `evaluation.evaluate`. seed: of the prompts that ``resample`` draws.
            metric: as in `attribute`; ``auto`` is the difference where the prompts have foils, else the target's logit.
            train: prompts that the rankings come from; one of them among the test prompts is an error.
            memory: bytes one batch may use; the model's own default if None.

        Raises:
            JobError: prompts that do not fit, an ablation that changes nothing.
        """
        check_test(test, train)
        metric = with_metric(settings(metric=metric), test).metric
        values = ablation_values(model, test, ablation, reference, basis, seed)
        length = len(test[0].token_ids)
        most = _ROWS * model.bytes_per_token(gradient=False, length=length) * length
        made = AblationTest(model, tuple(test), metric, values, basis, min(most, memory or model.budget()))
        ranks = torch.full(made.shape, NEVER, dtype=torch.int32)
        rows = range(len(test))
        whole, empty = made.measure_apart([[Job(row, ranks, 0, stays) for row in rows] for stays in (False, True)])
        # Refuses an ablation that changes nothing, before anything else is measured.
        statistics.faithfulness(whole[:, None], empty, whole)
        return Bench(made, whole, empty)


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


def curves(bench: Bench, ranks: Ranks, sizes: Sequence[int], seed: int) -> Curves:
    """One ranking's curves: all sizes and prompts, circuits, what is without them and random ones, in shared passes.

    Args:
        ranks: the place of every node from 0, each given once, from `ordered`; or of every neuron, the same at every
            position, where a circuit of n is n neurons at all positions, and so is its random control.
        sizes: of the circuits. Those above all there are are left out; MIB's shares of all are added.
        seed: of the random control and the intervals.

    Raises:
        JobError: a ranking of other nodes than the bench's, or one that leaves some out or names one twice.
    """
    total, n_prompts = _n_ranked(bench, ranks), len(bench.whole)
    areas = sorted({max(1, round(share * total)) for share in statistics.MIB_SIZES})
    sizes = sorted({*(size for size in sizes if size <= total), *areas})
    kinds = ((ranks, True), (ranks, False), (_control(ranks, seed), True))
    jobs = [Job(row, one, size, stays) for one, stays in kinds for row in range(n_prompts) for size in sizes]
    measured = bench.test.measure(jobs).view(3, n_prompts, len(sizes))
    table = torch.cat([bench.empty[:, None], bench.whole[:, None], *measured], -1)
    found = statistics.resample(
        table, lambda rows: statistics.restored(rows[..., 2:], rows[..., 0], rows[..., 1]), seed=seed
    )
    n = len(sizes)
    parts = [found.map(lambda values, i=i: values[..., i * n : (i + 1) * n]) for i in range(3)]
    at, shares = [sizes.index(one) for one in areas], [one / total for one in areas]
    over = parts[0].map(lambda values: values[..., at])
    levels = {level: statistics.size_for(sizes, parts[0], level) for level in LEVELS}
    return Curves(
        sizes=tuple(sizes),
        n_neurons=_unique(ranks, sizes),
        faithfulness=_band(parts[0]),
        completeness=_band(parts[1]),
        control=_band(parts[2]),
        cpr=_number(over.map(functools.partial(statistics.cpr, shares))),
        cmd=_number(over.map(functools.partial(statistics.cmd, shares))),
        sizes_for={f"{k:g}": Reach(estimate=one.estimate, low=one.low, high=one.high) for k, one in levels.items()},
    )


def _n_ranked(bench: Bench, ranks: Ranks) -> int:
    """How many are ranked: all nodes, or all neurons where a neuron has one place at every position."""
    nodes = bench.test.shape
    if tuple(ranks.shape) != nodes:
        shapes = f"[layer, pos, neuron] is {list(ranks.shape)}, of the test prompts {list(nodes)}"
        raise JobError("ranking", shapes, "test on prompts of the same length, on the same model and basis")
    mine = (ranks[:, :1] if _is_free(ranks) else ranks).flatten()
    if not torch.equal(mine.sort().values, torch.arange(len(mine), dtype=mine.dtype)):
        raise JobError("ranking", "must give every place from 0 once", "make it with curves.ordered")
    return len(mine)


def _is_free(ranks: Ranks) -> bool:
    return bool((ranks == ranks[:, :1]).all())


def _control(ranks: Ranks, seed: int) -> Ranks:
    """Random nodes, as many in each layer at every size; random neurons at all positions if the ranking is of such."""
    return shuffled(ranks[:, :1], seed).expand_as(ranks) if _is_free(ranks) else shuffled(ranks, seed)


def _unique(ranks: Ranks, sizes: Sequence[int]) -> tuple[int, ...]:
    """(layer, neuron) pairs among the first nodes: each counts from its best position on."""
    best = ranks.amin(1).flatten()
    return tuple(int((best < size).sum()) for size in sizes)


def _band(found: statistics.Resamples) -> Band:
    one = found.interval()
    return Band(estimate=tuple(one.estimate.tolist()), low=tuple(one.low.tolist()), high=tuple(one.high.tolist()))


def _number(found: statistics.Resamples) -> Number:
    one = found.interval()
    return Number(estimate=float(one.estimate), low=float(one.low), high=float(one.high))
