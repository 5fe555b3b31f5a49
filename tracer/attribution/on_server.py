"""What one session on a server does: several traces, and the arithmetic that reduces them before anything is returned.

All nodes' values and gradients of a large model are gigabytes; what a circuit keeps of them is kilobytes. So the server
attributes, selects and computes the edges in one request, with the functions that do the same here. They travel as
source: arguments are plain values (see `selected.circuits`), and so are results.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tracer.attribution.result import along_activations, along_path, noises
from tracer.attribution.selection import strongest
from tracer.metrics import logit_summary
from tracer.model import traces


def circuits(nn: Any, plan: SimpleNamespace, ask: SimpleNamespace) -> list[dict[str, Any]]:
    """The parts of each prompt's circuit, for one batch: see `selected.circuits`."""
    answers = selected(nn, plan, ask)
    if ask.edge_rules is None:
        return answers
    width = max(len(ids) for ids in ask.token_ids)
    shift = [width - len(ids) for ids in ask.token_ids]
    columns = [answer["nodes"].long() + torch.tensor([0, by, 0]) for answer, by in zip(answers, shift, strict=True)]
    rules, basis, away = ask.edge_rules, ask.basis, baselines(nn, plan, ask, answers)
    linked = traces.direct_weights(nn, plan, ask.inputs, columns, ask.logits_at, rules, basis, ask.max_bytes, away)
    for answer, by, (values, weight, embedded, incoming, moved) in zip(answers, shift, linked, strict=True):
        real = [*range(weight.shape[1]), *range(weight.shape[1] + by, weight.shape[1] + width)]
        from_baseline = None if moved is None else moved[:, real]
        answer["edges"] = (torch.cat([weight, embedded[:, by:]], -1), incoming, values, from_baseline)
    return answers


def selected(nn: Any, plan: SimpleNamespace, ask: SimpleNamespace) -> list[dict[str, Any]]:
    """Of each prompt, what is `reduced` of its attributions; those of all nodes end here."""
    nodes, values, embeddings, metric, start, grads, base = attributions(nn, plan, ask)
    logits, answers = traces.logits(nn, plan, ask.inputs), []
    for row, ids in enumerate(ask.token_ids):
        first = nodes.shape[2] - len(ids)
        begin = None if start is None else float(start[row])
        of_prompt = nodes[row, :, first:], values[row, :, first:], embeddings[row, first:].clone()
        more = [None if of_all is None else of_all[row, :, first:] for of_all in (grads, base)]
        summary = logit_summary(logits[row], ask.logits_at[row], ask.last[row], ask.top)
        answers.append(reduced(*of_prompt, float(metric[row]), begin, ask.selection, summary, *more))
    return answers


def baselines(nn: Any, plan: SimpleNamespace, ask: SimpleNamespace, answers: list[dict[str, Any]]) -> Any:
    """Of each prompt's nodes, and of all embeddings [prompt, column, d_model]; None where all are zero."""
    nodes = [answer["baselines"] for answer in answers]
    if ask.paired is not None:
        return nodes, traces.embedding(nn, plan, ask.paired)
    if all(values is None or not bool(values.any()) for values in nodes):
        return None
    return nodes, torch.zeros(())


def reduced(
    nodes: Tensor,
    values: Tensor,
    embeddings: Tensor,
    metric: float,
    start: float | None,
    selection: Any,
    said: tuple[Tensor, ...],
    grads: Tensor | None = None,
    base: Tensor | None = None,
) -> dict[str, Any]:
    """What a circuit keeps of one prompt's attributions and values of all nodes [layer, pos, neuron], attributions of
    embeddings [pos], metric, and the `logit_summary` of its logits; and of all nodes' gradients and baselines, if
    there are any: see `selected.circuits`."""
    kept, strength = strongest(nodes, metric, *selection), nodes.abs()
    layer, position, neuron = kept.unbind(-1)
    return {
        "nodes": kept.int(),
        "attributions": nodes[layer, position, neuron],
        "activations": values[layer, position, neuron],
        "gradients": None if grads is None else grads[layer, position, neuron],
        "baselines": None if base is None else base[layer, position, neuron],
        "largest": float(strength.max()),
        "total": float(strength.double().sum()),
        "embeddings": embeddings,
        "metric": metric,
        "start": start,
        "logits": said[0],
        "chances": said[1],
        "ranks": said[2],
        "top": said[3],
        "top_chances": said[4],
    }


def attributions(nn: Any, plan: SimpleNamespace, ask: SimpleNamespace) -> tuple[Any, ...]:
    """Attributions and values of all nodes [prompt, layer, column, neuron], attributions of embeddings
    [prompt, column], the metric [prompt], the metric where a path begins or None; all nodes' gradients (RelP's for
    methods without, None where no edges need them) and baselines (None where they are zero)."""
    if ask.method in ("relp", "grad"):
        values, grads, embedding, embedding_grad, metric = traces.gradients(
            nn, plan, ask.inputs, ask.read, ask.rules, ask.basis
        )
        base = None if ask.paired is None else traces.values(nn, plan, ask.paired, ask.basis)[0]
        away = values - (torch.zeros(()) if base is None else base)
        return away * grads, values, (embedding * embedding_grad).sum(-1), metric, None, grads, base
    values, embedding = traces.values(nn, plan, ask.inputs, ask.basis)
    before, start = torch.zeros_like(values), torch.zeros_like(embedding)
    if ask.paired is not None:
        before, start = traces.values(nn, plan, ask.paired, ask.basis)
    elif ask.method in ("ig", "conductance"):
        before, start = traces.values(nn, plan, ask.inputs, ask.basis, start)
    if ask.method in ("delta", "random"):
        metric, lent = traces.from_embedding(nn, plan, ask.inputs, ask.read, embedding), None
        if ask.edge_rules is not None:
            lent = traces.gradients(nn, plan, ask.inputs, ask.read, ask.edge_rules, ask.basis)[1]
        if ask.method == "delta":
            base = None if ask.paired is None else before
            return (values - before).abs(), values, (embedding - start).abs().sum(-1), metric, None, lent, base
        nodes, embeddings = noises(ask.token_ids, values.shape, ask.seed)
        return nodes, values, embeddings, metric, None, lent, None
    nodes, embeddings, metric, grads = along(nn, plan, ask, (before, values), (start, embedding))
    begin = traces.from_embedding(nn, plan, ask.inputs, ask.read, start)
    return nodes, values, embeddings, metric, begin, grads, before


def along(
    nn: Any,
    plan: SimpleNamespace,
    ask: SimpleNamespace,
    values: tuple[Tensor, Tensor],
    embeddings: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The path methods, from values and embeddings at both ends of the path."""

    def reading(at: Tensor) -> tuple[Tensor, ...]:
        return traces.gradients(nn, plan, ask.inputs, ask.read, ask.rules, ask.basis, at)

    def layer_grad(layer: int, at: Tensor) -> Tensor:
        return traces.replaced(nn, plan, ask.inputs, ask.read, layer, at, ask.basis)[0]

    (before, after), (start, end) = values, embeddings
    if ask.method == "ig-activation":
        return along_activations(layer_grad, reading, after, after - before, end, end - start, ask.steps)
    return along_path(reading, start, end, values, before, ask.steps, ask.method == "conductance")
