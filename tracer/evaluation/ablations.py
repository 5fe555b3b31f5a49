"""Ablations of sets of nodes: what they are set to, and the metric of many such sets, here or on a server.

Here nodes are set to dense values, one for each node of each prompt. Those never travel: a server is told the prompts
behind them, works the values out itself, and sends the metric alone. Refuses to know where sets of nodes come from, and
nnsight (model/passes.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import ceil
from types import SimpleNamespace
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from tracer import metrics
from tracer.attribution.attribute import check_reach, mean_values, metric_of
from tracer.attribution.methods import Progress
from tracer.batching import chunked, chunked_alike
from tracer.evaluation import on_server
from tracer.metrics import Metric
from tracer.model import passes
from tracer.model.backend import Of
from tracer.model.model import Model
from tracer.prompts import Batch, Encoded
from tracer.settings import settings
from tracer.shapes import Nodes, PerPrompt

NO_NODES = torch.empty(0, 3, dtype=torch.int32)
FORWARDS = 8
"""Forwards of one request, where there is work for as many: a small one takes less than its way to the server."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class AblatedRow:
    """A prompt whose metric is wanted with some of its nodes ablated.

    Attributes:
        nodes: a set, as `interventions.members` takes it: rows of (layer, position, neuron), or a bit for each node.
        stays: whether everything but this set is ablated.
        other: which of the other prompts its nodes' values come from.
    """

    prompt: Encoded
    nodes: Tensor
    stays: bool = False
    other: int = 0


@dataclass(frozen=True)
class Replacement:
    """What the nodes of some prompts are ablated to, told by the prompts that the values come from.

    Attributes:
        others: token ids of those prompts; none where nodes are set to zero.
        drawn: which of `others` each prompt's values are of; None for the mean over all of them, per position.
    """

    others: tuple[tuple[int, ...], ...] = ()
    drawn: tuple[int, ...] | None = None

    def values(self, model: Model, n_prompts: int, length: int, basis: str, memory: int | None = None) -> Nodes:
        """The values of every node of `n_prompts` prompts of one length.

        Raises:
            JobError: a mean over prompts that are all shorter.
        """
        if not self.others:
            return torch.zeros(1, 1, 1, 1).expand(n_prompts, model.n_layers, length, model.n_neurons(basis))
        if self.drawn is None:
            return mean_values(model, self.others, length, basis, memory).expand(n_prompts, -1, -1, -1)
        values = passes.values(model, Batch(self.others), basis=basis)[0]
        return values if self.drawn == tuple(range(len(values))) else values[list(self.drawn)]


def listed(mask: Bool[Tensor, "layer pos neuron"]) -> Tensor:
    """A set of nodes as it travels: rows of (layer, position, neuron); or a bit for each node [layer, byte], where that
    is less."""
    if 96 * int(mask.sum()) <= mask.numel():
        return mask.nonzero().int()
    return torch.from_numpy(np.packbits(mask.flatten(1).numpy(), axis=1, bitorder="little"))


def measure_on_server(
    model: Model,
    rows: Sequence[AblatedRow],
    to: Replacement,
    metric: str | None,
    basis: str,
    memory: int,
    *,
    falls: bool = False,
    progress: Progress | None = None,
) -> Tensor:
    """The metric of each row [row], from a server; several requests at a time, and only this number comes back.

    A mean's reference prompts are sent again with each request, so a request has at least as many forwards of rows as
    of reference prompts, where there is work for as many.

    Args:
        metric: as in `Settings`, settled; None for the greedy next token.
        memory: bytes one forward may use, and a request's replacement values for each of its forwards.
        falls: return how far the metric falls from that of the unablated prompt in the same forward: a difference of
            rows that went through the same kernels.

    Raises:
        JobError: a mean over prompts that are all shorter than a row's.
        RemoteError: as any pass.
    """
    lengths = [len(row.prompt.token_ids) for row in rows]
    mean = to.drawn is None and bool(to.others)
    if mean:
        check_reach(to.others, max(lengths, default=1))
    longest = max([1, *lengths, *map(len, to.others)])
    step = max(1, min(len(rows), memory // (model.bytes_per_token(gradient=False, length=longest) * longest)))
    forwards = max(FORWARDS, ceil(len(to.others) / step)) if mean else FORWARDS
    size = max(1, ceil(len(rows) / max(1, ceil(len(rows) / (step * forwards)))))

    def some(part: range) -> Tensor:
        mine = [rows[i] for i in part]
        few = ceil(step * len(part) / size)  # the forwards of a request that was halved are half as large
        groups = (
            list(_chunks_with_unablated(mine, few))
            if falls
            else chunked_alike(mine, few, lambda row: model.side(len(row.prompt.token_ids)))
        )
        metrics_of = _request(model, groups, to, metric, basis, few)
        if progress is not None:
            progress(part.stop, len(rows))
        return torch.cat([group[0] - group[1:] for group in metrics_of] if falls else metrics_of)

    parts = chunked(range(len(rows)), size)
    return torch.cat([torch.empty(0), *model.each(some, parts)])


def _request(
    model: Model, groups: list[list[AblatedRow]], to: Replacement, metric: str | None, basis: str, few: int
) -> list[Tensor]:
    """One request: a forward for each group of rows, and the reference prompts in forwards of at most `few`."""
    others = to.others
    if to.drawn is not None:  # only those that this request's rows need
        used = sorted({row.other for group in groups for row in group})
        index, others = {other: i for i, other in enumerate(used)}, tuple(to.others[other] for other in used)
        groups = [[replace(row, other=index[row.other]) for row in group] for group in groups]
    reads = [
        None if metric is None else metric_of([row.prompt for row in group], settings(metric=metric))
        for group in groups
    ]
    asked = list(zip(groups, reads, strict=True))
    batches = [Batch(tuple(part)) for part in chunked_alike(others, few, lambda ids: model.side(len(ids)))]
    return ablated_sets(model, asked, batches, mean=to.drawn is None, basis=basis)


def ablated_sets(
    model: Model,
    forwards: Sequence[tuple[Sequence[AblatedRow], Metric | None]],
    others: Sequence[Batch],
    *,
    mean: bool,
    basis: str = "activation",
) -> list[PerPrompt]:
    """What is read of rows with sets of their nodes ablated, of several forwards: one request to a server, which works
    out the values that nodes are set to and sends one number for each row.

    Args:
        forwards: of each its rows, and their metric; None for the greedy next token.
        others: prompts whose values are put in place, one forward each; none for zero.
        mean: whether their mean per position is; else each row's own of them.
    """
    longest = max(len(row.prompt.token_ids) for rows, _ in forwards for row in rows)
    asked = []
    for rows, metric in forwards:
        batch = Batch(tuple(row.prompt.token_ids for row in rows))
        asked.append(
            SimpleNamespace(
                inputs=passes.inputs(model, batch, 1 if metric is None else metric.kept),
                read=metrics.greedy if metric is None else metric.reader,
                rows=[
                    (row.nodes, row.stays, 0 if mean else row.other, int(first))
                    for row, first in zip(rows, batch.padding, strict=True)
                ],
            )
        )
    behind = [(passes.inputs(model, batch), [len(ids) for ids in batch.token_ids]) for batch in others]
    ask = SimpleNamespace(forwards=asked, others=behind, mean=mean, longest=longest, basis=basis)
    return passes.session(model, on_server.ablated, ask, [Of((len(rows),), finite=True) for rows, _ in forwards])


def _chunks_with_unablated(rows: Sequence[AblatedRow], few: int) -> Iterable[list[AblatedRow]]:
    """Chunks of at most `few` of one prompt's rows, each preceded by its unablated row."""
    for _, mine in groupby(rows, key=lambda row: row.prompt):
        for part in chunked(list(mine), max(1, few - 1)):
            yield [replace(part[0], nodes=NO_NODES, stays=False), *part]
