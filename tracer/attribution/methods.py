"""Which passes each attribution method needs, and how they combine, for one batch (method.md section 2).

Knows the methods as arithmetic over passes: every tensor here is left-padded, as passes see it. Refuses to know
nnsight (model/passes.py), prompts beyond their token ids, and what is done with the result (attribution/attribute.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tracer.attribution import replay
from tracer.attribution.result import along_activations, along_path, noises
from tracer.batching import chunked
from tracer.metrics import Metric
from tracer.model import passes
from tracer.model.model import Model
from tracer.prompts import Batch
from tracer.settings import Settings
from tracer.shapes import PaddedNodes, PerPrompt

Progress = Callable[[int, int], None]

# Rows of one batch of ablations: more gain nothing on a CPU and little on a GPU.
EXACT_ROWS = 512
FORWARD_ONLY = frozenset({"exact", "delta", "random"})
"""Methods without gradients; the replay of relp takes none either."""


class Result(NamedTuple):
    """What a method returns: padded, float32 on the CPU, not yet cleared of padding. `start` is the metric at the
    start of a path; `gradients` and `baselines` as in `Attribution`."""

    nodes: PaddedNodes
    activations: PaddedNodes
    embeddings: Float[Tensor, "prompt column"]
    metric: PerPrompt
    start: PerPrompt | None = None
    gradients: PaddedNodes | None = None
    baselines: PaddedNodes | None = None


@dataclass(frozen=True)
class Work:
    """One batch, as a method gets it.

    Attributes:
        paired: the counterfactual batch, where the baseline is ``counterfactual``.
        baseline: of every node, padded; zero where it is a number.
        max_bytes: bytes a pass may use.
        lend_gradients: whether a method without gradients is to find RelP's too.
    """

    model: Model
    batch: Batch
    paired: Batch | None
    metric: Metric
    settings: Settings
    baseline: Tensor | float
    max_bytes: int
    progress: Progress | None
    lend_gradients: bool = False

    @property
    def baselines(self) -> Tensor | None:
        """Of every node, padded; None where they are zero."""
        return self.baseline if isinstance(self.baseline, Tensor) else None

    def report(self, done: int, total: int) -> None:
        """Report progress to the caller."""
        if self.progress is not None:
            self.progress(done, total)


def check_permitted(model: Model, chosen: Settings) -> None:
    """Refuse a method that needs gradients where there are none, before anything is computed.

    Raises:
        RemoteError: the server takes none, and the linearised model cannot be replayed here.
    """
    if chosen.method not in FORWARD_ONLY and not model.replays(frozenset(chosen.rules)):
        passes.needs_gradients(model, f"method {chosen.method}")


def run(work: Work) -> Result:
    """Attribute one batch by the method its settings name."""
    return METHODS[work.settings.method](work)


def _by_gradient(work: Work) -> Result:
    """relp and grad: one pass. The embedding's own baseline is zero, so that RelP's conservation shows.

    Where a server takes no gradients, RelP is replayed here if the weights are here.
    """
    reading = _linearised(work, frozenset(work.settings.rules))
    work.report(1, 1)
    nodes = (reading.values - work.baseline) * reading.gradients
    embeddings = (reading.embedding * reading.embedding_gradient).sum(-1)
    return Result(nodes, reading.values, embeddings, reading.metric, None, reading.gradients, work.baselines)


def _linearised(work: Work, rules: frozenset[str]) -> passes.Gradients:
    """Gradients of the model linearised by these rules."""
    model, basis = work.model, work.settings.basis
    if model.remote and not model.remote.gradients and model.replays(rules):
        return replay.reading(model, work.batch, work.metric, basis=basis)
    return passes.gradients(model, work.batch, work.metric, rules=rules, basis=basis)


def _lent(work: Work) -> Tensor | None:
    """RelP's gradients, for a method that has none of its own and is asked for edges."""
    return _linearised(work, work.settings.edge_rules).gradients if work.lend_gradients else None


def _along_path(work: Work) -> Result:
    """ig and conductance: the embedding moves from e' (zero, or the counterfactual's) to e in equal steps."""
    chosen, model = work.settings, work.model
    start_values, end_values, start, end = _path_ends(work)
    baseline = work.baseline if isinstance(work.baseline, Tensor) else start_values
    nodes, embeddings, score, gradients = along_path(
        _readings(work, count(1), chosen.steps),
        start,
        end,
        (start_values, end_values),
        baseline,
        chosen.steps,
        chosen.method == "conductance",
    )
    begin = passes.from_embedding(model, work.batch, work.metric, start)
    return Result(nodes, end_values, embeddings, score, begin, gradients, baseline)


def _readings(work: Work, done: Iterator[int], total: int) -> Callable[[Tensor], Sequence[Tensor]]:
    """The function that a path method calls: a pass with the embedding at a point of the path."""

    def reading(at: Tensor) -> Sequence[Tensor]:
        at_point = passes.gradients(work.model, work.batch, work.metric, basis=work.settings.basis, embedding=at)
        work.report(next(done), total)
        return at_point.values, at_point.gradients, at_point.embedding, at_point.embedding_gradient, at_point.metric

    return reading


def _path_ends(work: Work) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Node values and embeddings at both ends of the path."""
    basis = work.settings.basis
    end_values, end = passes.values(work.model, work.batch, basis=basis)
    if work.paired is not None:
        start_values, start = passes.values(work.model, work.paired, basis=basis)
    else:
        start = torch.zeros_like(end)
        start_values, _ = passes.values(work.model, work.batch, basis=basis, embedding=start)
    return start_values, end_values, start, end


def _along_activations(work: Work) -> Result:
    """ig-activation: one layer's neurons at a time, then the embeddings, move towards their baselines."""
    chosen, model, done = work.settings, work.model, count(1)
    total = (model.n_layers + 1) * chosen.steps
    values, embedding = passes.values(model, work.batch, basis=chosen.basis)
    start = _start(work, embedding)

    def layer_grad(layer: int, at: Tensor) -> Tensor:
        grad, _ = passes.replaced(model, work.batch, work.metric, layer=layer, neurons=at, basis=chosen.basis)
        work.report(next(done), total)
        return grad

    nodes, embeddings, score, gradients = along_activations(
        layer_grad,
        _readings(work, done, total),
        values,
        values - work.baseline,
        embedding,
        embedding - start,
        chosen.steps,
    )
    begin = passes.from_embedding(model, work.batch, work.metric, start)
    return Result(nodes, values, embeddings, score, begin, gradients, work.baselines)


def _start(work: Work, embedding: Tensor) -> Tensor:
    """What embeddings are compared with: zero, or the counterfactual's."""
    if work.paired is None:
        return torch.zeros_like(embedding)
    return passes.values(work.model, work.paired, basis=work.settings.basis)[1]


def _by_ablation(work: Work) -> Result:
    """exact: the metric's true change when one node goes to its baseline, many nodes to a batch."""
    values, embedding = passes.values(work.model, work.batch, basis=work.settings.basis)
    start = _start(work, embedding)
    baseline = work.baseline if isinstance(work.baseline, Tensor) else torch.zeros_like(values)
    nodes, embeddings, scores = torch.zeros_like(values), torch.zeros(embedding.shape[:2]), []
    total = sum(len(ids) for ids in work.batch.token_ids) * work.model.n_layers * values.shape[-1]
    more = counter(work.progress, total)
    for row, ids in enumerate(work.batch.token_ids):
        first = work.batch.width - len(ids)
        to = baseline[row, :, first:]
        nodes[row, :, first:] = single_effects(
            work.model,
            ids,
            work.metric.repeat(row, 1),
            torch.cartesian_prod(*map(torch.arange, to.shape)),
            to.flatten(),
            basis=work.settings.basis,
            max_bytes=work.max_bytes,
            more=more,
        ).view_as(to)
        embeddings[row, first:], score = _ablate_embeddings(work, row, start[row, first:])
        scores.append(score)
    return Result(nodes, values, embeddings, torch.stack(scores), None, _lent(work), work.baselines)


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


def _ablate_embeddings(work: Work, row: int, start: Tensor) -> tuple[Tensor, Tensor]:
    """Effect of each token's embedding going to zero (or to the counterfactual's), and the metric itself."""
    token_ids = work.batch.token_ids[row]

    def effects(part: range) -> tuple[Tensor, Tensor]:
        at, rows = torch.arange(part.start, part.stop), len(part) + 1
        batch, metric = Batch((token_ids,) * rows), work.metric.repeat(row, rows)
        where = torch.arange(1, rows), at
        score = passes.embeddings_ablated(work.model, batch, metric, where=where, to=start[at])
        return score[0] - score[1:], score[0]

    answers = work.model.each(effects, _parts(work.model, len(token_ids), work.max_bytes, range(len(start))))
    return torch.cat([part for part, _ in answers]), answers[0][1]


def _control(work: Work) -> Result:
    """delta and random: how far values are from their baseline, and noise. One forward for the metric."""
    values, embedding = passes.values(work.model, work.batch, basis=work.settings.basis)
    score = passes.from_embedding(work.model, work.batch, work.metric, embedding)
    work.report(1, 1)
    if work.settings.method == "delta":
        nodes, embeddings = (values - work.baseline).abs(), (embedding - _start(work, embedding)).abs().sum(-1)
    else:
        nodes, embeddings = noises(work.batch.token_ids, values.shape, work.settings.seed)
    return Result(nodes, values, embeddings, score, None, _lent(work), work.baselines)


METHODS: dict[str, Callable[[Work], Result]] = {
    "relp": _by_gradient,
    "grad": _by_gradient,
    "ig": _along_path,
    "conductance": _along_path,
    "ig-activation": _along_activations,
    "exact": _by_ablation,
    "delta": _control,
    "random": _control,
}
