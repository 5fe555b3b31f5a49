"""The method ``exact``: every node ablated alone, the oracle for all others (method.md section 2).

Knows how many single ablations share a pass, and which progress they make. Refuses to know nnsight (model/passes.py)
and what is done with the result (attribution/attribute.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tracer.attribution.running import Running
from tracer.batching import chunked
from tracer.metrics import Metric
from tracer.model import passes
from tracer.model.model import Model
from tracer.prompts import Batch
from tracer.shapes import PaddedNodes

Progress = Callable[[int, int], None]

# Rows of one batch of ablations: more gain nothing on a CPU and little on a GPU.
EXACT_ROWS = 512
FORWARD_ONLY = frozenset({"exact", "delta", "random"})
"""Methods without gradients; the replay of relp takes none either."""


def by_ablation(
    model: Model,
    batch: Batch,
    metric: Metric,
    basis: str,
    *,
    paired: Batch | None,
    baseline: PaddedNodes | None,
    max_bytes: int,
    progress: Progress | None,
) -> dict[str, Any]:
    """The metric's true change when one node goes to its baseline, many nodes to a batch; as `circuits.everything`
    gives attributions, padded.

    Args:
        paired: the counterfactual batch, which embeddings are compared with, if that is the baseline; else zero.
        baseline: of every node; None for zero.
        max_bytes: bytes a pass may use.
    """
    values, embedding = passes.values(model, batch, basis=basis)
    start = torch.zeros_like(embedding) if paired is None else passes.values(model, paired, basis=basis)[1]
    to = torch.zeros_like(values) if baseline is None else baseline
    nodes, embeddings, scores = torch.zeros_like(values), torch.zeros(embedding.shape[:2]), []
    total = sum(len(ids) for ids in batch.token_ids) * model.n_nodes(basis)
    more = counter(progress, total)
    for row, ids in enumerate(batch.token_ids):
        first, alone = batch.width - len(ids), metric.repeat(row, 1)
        places = Running.of(model, [ids], basis).nodes(len(ids))
        at = (row, places[:, 0], places[:, 1] + first, places[:, 2])
        how = {"basis": basis, "max_bytes": max_bytes, "more": more}
        nodes[at] = single_effects(model, ids, alone, places, to[at], **how)
        embeddings[row, first:], score = _ablate_embeddings(model, ids, alone, start[row, first:], max_bytes)
        scores.append(score)
    found = {"nodes": nodes, "values": values, "gradients": None, "baselines": baseline, "embeddings": embeddings}
    return found | {"metric": torch.stack(scores), "start": None}


def counter(report: Progress | None, total: int) -> Callable[[int], None]:
    """A function that reports how many more are done; on a server several threads call it."""
    done, lock = 0, threading.Lock()

    def more(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            if report is not None:
                report(done, total)

    return more


def single_effects(
    model: Model,
    token_ids: tuple[int, ...],
    metric: Metric,
    nodes: Int[Tensor, "node 3"],
    to: Float[Tensor, " node"],
    *,
    basis: str,
    max_bytes: int,
    more: Callable[[int], None],
) -> Float[Tensor, " node"]:
    """How far one prompt's metric falls when each node (layer, position, neuron) alone is set to its value in `to`.

    Row 0 of each batch is not ablated: the difference is then between rows that went through the same kernels.
    """
    layer, position, neuron = nodes.unbind(-1)
    order = layer.argsort(stable=True)

    def effects(part: range) -> Tensor:
        at, rows = order[part.start : part.stop], len(part) + 1
        score = passes.ablated(
            model,
            Batch((token_ids,) * rows),
            metric.repeat(0, rows),
            layer=int(layer[at[0]]),
            where=(torch.arange(1, rows), position[at], neuron[at]),
            to=to[at],
            basis=basis,
        )
        more(len(part))
        return score[0] - score[1:]

    ends = [0, *layer.bincount().cumsum(0).tolist()]
    parts = [part for layer in pairwise(ends) for part in _parts(model, len(token_ids), max_bytes, range(*layer))]
    falls = torch.empty(len(nodes))
    falls[order] = torch.cat([torch.empty(0), *model.each(effects, parts)])
    return falls


def _parts(model: Model, length: int, max_bytes: int, whole: range) -> list[range]:
    """The nodes to ablate of one prompt, in parts of as many rows as the byte limit allows beside the unablated row."""
    rows = max_bytes // (model.bytes_per_token(gradient=False, length=length) * length) - 1
    return chunked(whole, min(max(1, rows), EXACT_ROWS))


def _ablate_embeddings(
    model: Model, token_ids: tuple[int, ...], metric: Metric, start: Tensor, max_bytes: int
) -> tuple[Tensor, Tensor]:
    """Effect of each token's embedding going to zero (or to the counterfactual's), and the metric itself."""

    def effects(part: range) -> tuple[Tensor, Tensor]:
        at, rows = torch.arange(part.start, part.stop), len(part) + 1
        batch = Batch((token_ids,) * rows)
        where = torch.arange(1, rows), at
        score = passes.embeddings_ablated(model, batch, metric.repeat(0, rows), where=where, to=start[at])
        return score[0] - score[1:], score[0]

    answers = list(model.each(effects, _parts(model, len(token_ids), max_bytes, range(len(start)))))
    return torch.cat([part for part, _ in answers]), answers[0][1]
