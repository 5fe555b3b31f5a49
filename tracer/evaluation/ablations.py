"""Ablations of sets of nodes: what they are set to, and the metric of many such sets, here or on a server.

Sets are told by index, as parts of rankings. What nodes are set to is worked out here once; a server is told the
prompts behind it, works the values out itself, and sends the metric alone. Refuses to know where rankings come from,
and nnsight (model/passes.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import ceil
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tracer.attribution.attribute import check_reach, metric_of
from tracer.attribution.exact import Progress
from tracer.batching import chunked, chunked_alike
from tracer.evaluation import on_server
from tracer.model import passes
from tracer.model.backend import Of
from tracer.model.model import Model
from tracer.prompts import Batch, Encoded
from tracer.settings import Settings

FORWARDS = 8
"""Forwards of one request, where there is work for as many: a small one takes less than its way to the server."""


@dataclass(frozen=True, eq=False)
class Ranking:
    """Nodes in an order, of which sets are parts.

    Attributes:
        places: of each node, from 0; several may share one.
        nodes: rows of (layer, position, neuron); None where every node of a prompt has a place.
    """

    places: Int[Tensor, " node"] | Int[Tensor, "layer pos neuron"]
    nodes: Int[Tensor, "node 3"] | None = None

    @staticmethod
    def of(nodes: Int[Tensor, "node 3"]) -> Ranking:
        """The order in which the nodes are given."""
        return Ranking(torch.arange(len(nodes)), nodes)


_NONE = torch.empty(0, 5, dtype=torch.int32)
_LISTED = _NONE.shape[1] * _NONE.itemsize
"""Bytes of a node that is told by itself."""

EMPTY = Ranking.of(torch.empty(0, 3, dtype=torch.int32))


@dataclass(frozen=True)
class AblatedRow:
    """A prompt whose metric is wanted with some of its nodes ablated.

    Attributes:
        cuts: three places of `ranking`, rising: the set are the nodes before the first, and those from the second to
            before the third.
        stays: whether everything but this set is ablated.
        other: which of the other prompts its nodes' values come from.
    """

    prompt: Encoded
    ranking: Ranking
    cuts: tuple[int, int, int]
    stays: bool = False
    other: int = 0


@dataclass(frozen=True)
class Replacement:
    """What the nodes of some prompts are ablated to, told by the prompts that the values come from.

    Attributes:
        others: token ids of those prompts; none where nodes are set to zero.
        mean: whether it is the mean over all of them, per position; else each row's own of them.
        values: that, where it was worked out beforehand; one of a mean.
    """

    others: tuple[tuple[int, ...], ...] = ()
    mean: bool = False
    values: Float[Tensor, "other layer pos neuron"] | None = None

    def here(self, model: Model, length: int, basis: str, memory: int) -> Replacement:
        """The same with its values worked out, up to `length` positions, unless that is a server's to do.

        Args:
            memory: bytes one forward may use.

        Raises:
            JobError: a mean over prompts that are all shorter.
        """
        if self.mean:
            check_reach(self.others, length)
        if not self.others or model.remote is not None:
            return self
        behind = _behind(model, self.others, _step(model, max(map(len, self.others)), memory))
        n_neurons = model.n_neurons(basis)
        ask = SimpleNamespace(others=behind, mean=self.mean, longest=length, basis=basis, n_neurons=n_neurons)
        return replace(self, values=passes.session(model, on_server.replacements, ask, Of((None,) * 4)))


def _behind(model: Model, others: Sequence[tuple[int, ...]], few: int) -> list[tuple[dict[str, Any], list[int]]]:
    """Reference prompts as a request takes them, at most `few` to a forward."""
    batches = [Batch(tuple(part)) for part in chunked_alike(others, few, lambda ids: model.side(len(ids)))]
    return [(passes.inputs(model, batch), [len(ids) for ids in batch.token_ids]) for batch in batches]


def _step(model: Model, length: int, memory: int) -> int:
    """How many prompts of this length one forward may hold."""
    return max(1, memory // (model.bytes_per_token(gradient=False, length=length) * length))


def measured(
    model: Model,
    rows: Sequence[AblatedRow],
    to: Replacement,
    metric: Settings | None,
    basis: str,
    memory: int,
    *,
    falls: bool = False,
    progress: Progress | None = None,
) -> Tensor:
    """The metric of each row [row]; of a server several requests at a time, and only this number comes back.

    A mean's reference prompts are sent again with each request, so a request has at least as many forwards of rows as
    of reference prompts, where there is work for as many.

    Args:
        metric: the settings of the metric, settled; None for the greedy next token.
        memory: bytes one forward may use, and a request's replacement values for each of its forwards.
        falls: return how far the metric falls from that of the unablated prompt in the same forward: a difference of
            rows that went through the same kernels.

    Raises:
        JobError: a mean over prompts that are all shorter than a row's.
        RemoteError: as any pass.
    """
    lengths = [len(row.prompt.token_ids) for row in rows]
    if to.mean:
        check_reach(to.others, max(lengths, default=1))
    others = to.others if to.values is None else ()
    step = max(1, min(len(rows), _step(model, max([1, *lengths, *map(len, others)]), memory)))
    forwards = 1 if model.remote is None else FORWARDS
    if to.mean:
        forwards = max(forwards, ceil(len(others) / step))
    size = max(1, ceil(len(rows) / max(1, ceil(len(rows) / (step * forwards)))))

    def some(part: range) -> Tensor:
        mine = [rows[i] for i in part]
        few = ceil(step * len(part) / size)  # the forwards of a request that was halved are half as large
        groups = (
            list(_chunks_with_unablated(mine, few))
            if falls
            else chunked_alike(mine, few, lambda row: model.side(len(row.prompt.token_ids)))
        )
        found = _request(model, groups, to, metric, basis, few)
        if progress is not None:
            progress(part.stop, len(rows))
        return torch.cat([group[0] - group[1:] for group in found] if falls else found)

    parts = chunked(range(len(rows)), size)
    return torch.cat([torch.empty(0), *model.each(some, parts)])


def _request(
    model: Model, groups: list[list[AblatedRow]], to: Replacement, metric: Settings | None, basis: str, few: int
) -> list[Tensor]:
    """One request: a forward for each group of rows, and the reference prompts in forwards of at most `few`."""
    rows = [row for group in groups for row in group]
    rankings, known = _travelling(rows)
    used = sorted({row.other for row in rows})
    others, source = to.others, {other: 0 if to.mean else other for other in used}
    if to.values is not None:
        others = ()
    elif others and not to.mean:  # only those that this request's rows need
        others, source = tuple(others[other] for other in used), {other: i for i, other in enumerate(used)}

    def forward(group: list[AblatedRow]) -> SimpleNamespace:
        prompts = [row.prompt for row in group]
        batch = Batch(tuple(prompt.token_ids for prompt in prompts))
        asked = None if metric is None else metric_of(prompts, metric)
        sets = [(known[row.ranking], row) for row in group]
        told = [(place.number, *(place.levels[cut] for cut in row.cuts), row.stays) for place, row in sets]
        return SimpleNamespace(
            **passes.asking(model, batch, asked),
            rows=[*zip(*told, strict=True), [source[row.other] for row in group], batch.padding.tolist()],
        )

    ask = SimpleNamespace(
        forwards=[forward(group) for group in groups],
        rankings=rankings,
        others=_behind(model, others, few),
        mean=to.mean,
        to=to.values,
        longest=max(len(row.prompt.token_ids) for row in rows),
        basis=basis,
        n_neurons=model.n_neurons(basis),
    )
    return passes.session(model, on_server.ablated, ask, [Of((len(group),), finite=True) for group in groups])


class _Told(NamedTuple):
    """How a request speaks of a ranking: its number, and of each place that sets are cut at the first level from there
    on. A level is all places between two cuts."""

    number: int
    levels: dict[int, int]


def _travelling(
    rows: Sequence[AblatedRow],
) -> tuple[tuple[int, int, Tensor, list[Tensor]], dict[Ranking, _Told]]:
    """The rows' rankings as `interventions.ordered` takes them, and how to speak of each. All nodes' levels are told, a
    byte each, where the nodes that are in any set would take more than an eighth of that."""
    cuts: dict[Ranking, set[int]] = {}
    for row in rows:
        cuts.setdefault(row.ranking, set()).update(row.cuts)
    bounds = {ranking: sorted(places - {0}) for ranking, places in cuts.items()}
    most = 1 + max(map(len, bounds.values()))
    listed, dense = dict[Ranking, Tensor](), dict[Ranking, Tensor]()
    for ranking, places in bounds.items():
        ends = torch.tensor(places, dtype=ranking.places.dtype)
        levels = torch.bucketize(ranking.places.contiguous(), ends, right=True, out_int32=True)
        inside = levels < len(places)
        if ranking.nodes is None and _LISTED * int(inside.sum()) > inside.numel() // 8:
            dense[ranking] = levels.to(torch.uint8) if most <= 256 else levels
        else:
            nodes = inside.nonzero() if ranking.nodes is None else ranking.nodes[inside]
            listed[ranking] = torch.cat([nodes.int(), levels[inside].int()[:, None]], 1)
    numbers = {ranking: number for number, ranking in enumerate([*listed, *dense])}
    known = {
        one: _Told(numbers[one], {0: 0} | {place: level for level, place in enumerate(places, 1)})
        for one, places in bounds.items()
    }
    every = [torch.nn.functional.pad(nodes, (1, 0), value=numbers[one]) for one, nodes in listed.items()]
    return (most, len(listed), torch.cat([_NONE, *every]), list(dense.values())), known


def _chunks_with_unablated(rows: Sequence[AblatedRow], few: int) -> Iterable[list[AblatedRow]]:
    """Chunks of at most `few` of one prompt's rows, each preceded by its unablated row."""
    for _, mine in groupby(rows, key=lambda row: row.prompt):
        for part in chunked(list(mine), max(1, few - 1)):
            yield [replace(part[0], cuts=(0, 0, 0), stays=False), *part]
