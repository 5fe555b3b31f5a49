"""One prompt's selected nodes, with the numbers that its circuit reports beside them.

Computed here from the attributions of all nodes, or on a server, which then sends nothing else. Knows which settings a
server can reduce by itself. Refuses to know nnsight (model/passes.py), pruning and circuits (attribution/trace.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tracer.attribution import on_server
from tracer.attribution.attribute import metric_of, split, with_targets
from tracer.attribution.edges import Edges, check_sum
from tracer.attribution.methods import Progress
from tracer.attribution.result import Attribution, check_conservation, check_finite
from tracer.attribution.selection import NodeIndex
from tracer.errors import RemoteError, quoted
from tracer.metrics import Metric, entries, logit_summary
from tracer.model import passes
from tracer.model.backend import Maybe, Of
from tracer.model.model import Model
from tracer.prompts import Batch, Encoded
from tracer.settings import Settings

TOP = 5
"""Predictions that are kept."""
MAX_BYTES = 2**30
"""Bytes of gradients that edges may hold on a server: of a 70B model, those of some twenty targets at a time."""
SelectionRules = tuple[int | None, float | None, float | None, bool, Sequence[tuple[int, int]]]
"""What `selection.strongest` takes after the metric."""


@dataclass(frozen=True)
class SelectedNodes:
    """One prompt's selected nodes, and what else its circuit reports.

    Attributes:
        encoded: the prompt, its targets resolved.
        nodes: selected, strongest first; attributions and activations are theirs.
        embeddings: attribution of each token's embedding, in metric units.
        metric, unexplained, start: as in `Attribution`, numbers.
        largest, total: the largest |attribution| of all nodes, and their sum. n_total: how many there are.
        terms: the (position, token, weight) of each logit in the metric; logits, chances and ranks are their values,
            probabilities, and places among all tokens' probabilities, from 1.
        top: the likeliest tokens where the metric is read, and their probabilities.
        edges: among the selected nodes, if they were computed with them.
        gradients: of the metric at the nodes, if they are known. baselines: of the nodes; None where all are zero.
    """

    encoded: Encoded
    nodes: NodeIndex
    attributions: Float[Tensor, " node"]
    activations: Float[Tensor, " node"]
    embeddings: Float[Tensor, " pos"]
    metric: float
    unexplained: float
    start: float | None
    largest: float
    total: float
    n_total: int
    terms: list[tuple[int, int, float]]
    logits: Float[Tensor, " term"]
    chances: Float[Tensor, " term"]
    ranks: Int[Tensor, " term"]
    top: tuple[Tensor, Tensor]
    edges: Edges | None = None
    gradients: Float[Tensor, " node"] | None = None
    baselines: Float[Tensor, " node"] | None = None


def local_circuits(
    model: Model, encoded: Sequence[Encoded], result: Attribution, rules: SelectionRules
) -> Iterator[SelectedNodes]:
    """Selected nodes of each prompt, from the attributions of all nodes. One forward each, for the logits."""
    for row, prompt in enumerate(encoded):
        asked = replace(prompt, target_ids=result.target_ids[row])
        yield _selected(model, asked, result, row, rules)


def _selected(model: Model, encoded: Encoded, result: Attribution, row: int, rules: SelectionRules) -> SelectedNodes:
    length = len(encoded.token_ids)
    terms = entries(encoded.positions, encoded.target_ids, encoded.foil_ids, result.settings.metric)
    back = length - min(encoded.positions)
    at = torch.tensor([(place - length + back, token) for place, token, _ in terms])
    logits = passes.logits(model, Batch((encoded.token_ids,)), back)[0]
    answer = on_server.reduced(
        result.nodes[row, :, :length],
        result.activations[row, :, :length],
        result.embeddings[row, :length],
        float(result.metric[row]),
        None if result.start_metric is None else float(result.start_metric[row]),
        rules,
        logit_summary(logits, at, max(encoded.positions) - length + back, TOP),
        *(None if one is None else one[row, :, :length] for one in (result.gradients, result.baselines)),
    )
    return _read(model, encoded, answer, terms, result.settings, float(result.unexplained[row]))


def can_reduce_on_server(model: Model, chosen: Settings) -> bool:
    """Whether a server can compute circuits by itself: it grants gradients, and needs nothing large from here. (The
    method ``exact`` takes more passes than one request should hold.)"""
    return (
        model.remote is not None
        and model.remote.gradients
        and chosen.method != "exact"
        and chosen.baseline in ("zero", "counterfactual")
    )


def server_circuits(
    model: Model,
    encoded: Sequence[Encoded],
    chosen: Settings,
    rules: SelectionRules,
    *,
    edges: bool,
    memory: int | None = None,
    progress: Progress | None = None,
) -> Iterator[SelectedNodes]:
    """Selected nodes of each prompt, from a server; one request for each batch of prompts.

    Raises:
        JobError: as `attribute`.
        ModelError: a number is not finite, or conservation fails.
        RemoteError: as any pass.
    """
    linear = chosen.edge_rules

    def batch(part: range) -> list[SelectedNodes]:
        selected = _asked(model, [encoded[i] for i in part], chosen, rules, linear if edges else None)
        if progress is not None:
            progress(part.stop, len(encoded))
        return selected

    lengths = [len(prompt.token_ids) for prompt in encoded]
    for part in model.each(batch, list(split(model, lengths, memory))):
        _check(model, part, chosen)
        for selected in part:
            if selected.edges is not None:
                check_sum(model, selected.edges, linear)
        yield from part


def _asked(
    model: Model, encoded: Sequence[Encoded], chosen: Settings, rules: SelectionRules, edge_rules: frozenset[str] | None
) -> list[SelectedNodes]:
    """One batch."""
    batch, paired = Batch(tuple(prompt.token_ids for prompt in encoded)), None
    if chosen.baseline == "counterfactual":
        paired = Batch(tuple(prompt.counterfactual_ids or () for prompt in encoded))
    encoded = with_targets(model, batch, encoded, chosen)
    terms = [entries(prompt.positions, prompt.target_ids, prompt.foil_ids, chosen.metric) for prompt in encoded]
    lengths = [len(prompt.token_ids) for prompt in encoded]
    answers = circuits(
        model,
        batch,
        metric_of(encoded, chosen),
        chosen,
        paired,
        rules,
        [
            torch.tensor([(place - length, token) for place, token, _ in mine])
            for mine, length in zip(terms, lengths, strict=True)
        ],
        [max(prompt.positions) - length for prompt, length in zip(encoded, lengths, strict=True)],
        edge_rules=edge_rules,
        max_bytes=MAX_BYTES,
        top=TOP,
    )
    return [
        _read(model, prompt, answer, mine, chosen, answer["metric"] - float(answer["embeddings"].sum()))
        for prompt, answer, mine in zip(encoded, answers, terms, strict=True)
    ]


def circuits(
    model: Model,
    batch: Batch,
    metric: Metric,
    chosen: Settings,
    paired: Batch | None,
    selection: tuple[Any, ...],
    logits_at: Sequence[Tensor],
    last: Sequence[int],
    *,
    edge_rules: frozenset[str] | None,
    max_bytes: int,
    top: int,
) -> list[dict[str, Any]]:
    """The parts of each prompt's circuit, for one batch, computed where the model is: one request to a server.

    Args:
        chosen: any method but ``exact``, and a baseline of zero or the counterfactual.
        paired: the counterfactual batch, if that is the baseline.
        selection: what `selection.strongest` takes after the metric.
        logits_at: for each prompt, (position, token) pairs, from its end (negative). last: for each prompt, the
            position of the predictions, from its end; `top` of them.
        edge_rules: of the linearisation in which edges among what is selected are traced; None for no edges.
        max_bytes: bytes of gradients that edges may hold at a time.

    Returns:
        For each prompt, by name: nodes [node, 3]; their attributions, activations, gradients and baselines [node],
        the last two None where not known and where zero; the largest |attribution|, and their total, over all nodes;
        embeddings [pos]; metric, start; logits, chances and ranks of `logits_at`; top and top_chances; and edges, a
        tuple of weight [target, source], incoming [target], the targets' values, and `Edges.from_baseline`.
    """
    kept = max(metric.kept, *(int(-at[:, 0].min()) for at in logits_at), *(-position for position in last))
    passes.needs_gradients(model)
    ask = SimpleNamespace(
        inputs=passes.inputs(model, batch, kept),
        paired=None if paired is None else passes.inputs(model, paired),
        token_ids=batch.token_ids,
        read=metric.reader,
        rules=frozenset(chosen.rules),
        basis=chosen.basis,
        method=chosen.method,
        steps=chosen.steps,
        seed=chosen.seed,
        selection=selection,
        logits_at=[at + torch.tensor([kept, 0]) for at in logits_at],
        last=[position + kept for position in last],
        edge_rules=edge_rules,
        max_bytes=max_bytes,
        top=top,
    )
    forms = [_form(model, ask, row) for row in range(len(batch.token_ids))]
    answers = passes.session(model, on_server.circuits, ask, forms)
    for nodes in (answer["nodes"] for answer in answers):
        most = selection[0] or len(nodes)
        if len(nodes) > most or len({*map(tuple, nodes.tolist())}) < len(nodes):
            rule = f"was to select up to {most} nodes, each once, and sent {len(nodes)}"
            raise RemoteError(f"model {quoted(model.name)} on a server", rule, "tell its operator")
    return answers


def _form(model: Model, ask: SimpleNamespace, row: int) -> dict[str, Any]:
    """What `on_server.circuits` must send of one prompt."""
    length, terms, nodes = len(ask.token_ids[row]), len(ask.logits_at[row]), f"nodes {row}"
    vocabulary = passes.n_logits(model)
    inside = model.n_layers, length, model.n_neurons(ask.basis)
    of_nodes, of_terms = Of((nodes,)), Of((terms,), torch.float64)
    top = min(ask.top, vocabulary)
    form: dict[str, Any] = {
        "nodes": Of((nodes, 3), torch.int32, inside),
        "attributions": of_nodes,
        "activations": of_nodes,
        "gradients": Maybe(of_nodes),
        "baselines": Maybe(of_nodes),
        "largest": float,
        "total": float,
        "embeddings": Of((length,)),
        "metric": float,
        "start": Maybe(float),
        "logits": Of((terms,)),
        "chances": of_terms,
        "ranks": Of((terms,), torch.int64),
        "top": Of((top,), torch.int64, vocabulary),
        "top_chances": Of((top,), torch.float64),
    }
    if ask.edge_rules is not None:
        targets, sources = (nodes, terms), (nodes, length)
        weight, into = Of((targets, sources)), Of((targets,))
        form["edges"] = weight, into, into, Maybe(weight)
    return form


def _read(
    model: Model,
    encoded: Encoded,
    answer: dict[str, Any],
    terms: list[tuple[int, int, float]],
    chosen: Settings,
    unexplained: float,
) -> SelectedNodes:
    """The answer of `on_server.reduced` for one prompt, local or remote, as a record."""
    edges = None
    if "edges" in answer:
        weight, incoming, values, from_baseline = answer["edges"]
        edges = Edges(weight, incoming, values[: len(answer["nodes"])], values, from_baseline)
    return SelectedNodes(
        encoded=encoded,
        nodes=answer["nodes"].long(),
        attributions=answer["attributions"],
        activations=answer["activations"],
        embeddings=answer["embeddings"],
        metric=answer["metric"],
        unexplained=unexplained,
        start=answer["start"],
        largest=answer["largest"],
        total=answer["total"],
        n_total=model.n_layers * model.n_neurons(chosen.basis) * len(encoded.token_ids),
        terms=terms,
        logits=answer["logits"],
        chances=answer["chances"],
        ranks=answer["ranks"],
        top=(answer["top"], answer["top_chances"]),
        edges=edges,
        gradients=answer["gradients"],
        baselines=answer["baselines"] if answer["baselines"] is not None and answer["baselines"].any() else None,
    )


def _sum(prompt: SelectedNodes) -> Tensor:
    """Of all other numbers, which is finite if they are."""
    edges = prompt.edges
    linked = () if edges is None else (edges.weight, edges.incoming, edges.target_values, edges.from_baseline)
    nodes = prompt.attributions, prompt.activations, prompt.gradients, prompt.baselines
    said = prompt.logits, prompt.chances, prompt.top[1]
    return torch.stack([one.double().sum() for one in (*nodes, *said, *linked) if one is not None]).sum()


def _check(model: Model, selected: Sequence[SelectedNodes], chosen: Settings) -> None:
    """The checks that `attribute` makes. The total covers every node's attribution, and so its value."""
    metric = torch.tensor([prompt.metric for prompt in selected])
    embeddings = torch.nn.utils.rnn.pad_sequence([prompt.embeddings for prompt in selected], batch_first=True)
    total = torch.tensor([prompt.total for prompt in selected], dtype=torch.float64)
    others = torch.stack([_sum(prompt) for prompt in selected])
    check_finite({"metric": metric, "embedding attribution": embeddings, "attribution": total, "result": others})
    if chosen.conserves and model.conserves:
        check_conservation(metric, embeddings)
