"""Prompt in, circuit out: the nodes selected, the edges between them, and what a reader needs beside them.

Knows how attributions, selection, edges and pruning make one `Circuit`. Refuses to know nnsight (passes.py), how
attributions are computed (attributing.py) and files (store.py).
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tracer import passes
from tracer.attributing import attribute
from tracer.attribution import Attribution
from tracer.circuit import Circuit, Prediction, edges_table, nodes_table
from tracer.config import RULES, SUMS_OF_LOGITS, Settings
from tracer.edges import direct_edges
from tracer.errors import JobError, quoted
from tracer.methods import Progress
from tracer.metrics import entries
from tracer.model import Model
from tracer.prompts import Batch, Encoded, Prompt, decode, encode
from tracer.pruning import EdgeColumns, Pruning, prune
from tracer.selection import check_selection, node_limit, select

if TYPE_CHECKING:
    import pyarrow as pa


def trace(
    model: Model,
    prompt: Prompt,
    nodes: int | None = None,
    method: str = "relp",
    edges: bool | None = None,
    *,
    baseline: str = "zero",
    basis: str = "activation",
    rules: Iterable[str] | None = None,
    steps: int = 10,
    metric: str = "auto",
    top_k: int = 5,
    seed: int = 0,
    reference: Sequence[Prompt] | None = None,
    threshold: float | None = None,
    mass: float | None = None,
    skip_first: bool = False,
    exclude: Iterable[tuple[int, int]] = (),
    pruning: Pruning | None = None,
    progress: Progress | None = None,
) -> Circuit:
    """One prompt's circuit: its strongest nodes and the direct edges between them, with the metric and the checks.

    Args:
        model, prompt: as in `attribute`, and so are method, baseline, basis, rules, steps, metric, top_k, seed,
            reference and progress.
        nodes, threshold, mass, skip_first, exclude: which nodes to keep; see `selection.select`.
            Without any rule the 200 strongest.
        edges: trace the direct edges among them; by default where the metric is a sum of logits, which edges can
            lead into. They are edges of the RelP linearisation whatever the method.
        pruning: which edges to keep; shares of .01 and more if None.

    Raises:
        JobError, ModelError: as `attribute`.

    Source: method.md sections 2, 4 and 5.
    """
    started = time.perf_counter()
    exclude = sorted(exclude)
    selection = {
        "nodes": node_limit(nodes, threshold, mass),
        "threshold": threshold,
        "mass": mass,
        "skip_first": skip_first,
        "exclude": [list(pair) for pair in exclude],
    }
    check_selection(nodes, threshold, mass)
    if not isinstance(prompt, Prompt):
        raise JobError(f"prompt={quoted(prompt)}", "must be a tracer.Prompt", "write tracer.Prompt(...)")
    if edges and metric not in SUMS_OF_LOGITS | {"auto"}:
        raise JobError(f"edges with metric {metric!r}", "edges lead into single logits", "use edges=False")
    edges = metric in SUMS_OF_LOGITS | {"auto"} if edges is None else edges
    if pruning is not None and not edges:
        raise JobError("pruning", "has no effect without edges", "leave one of them out")
    rules_of_edges = pruning or Pruning()
    selection["pruning"] = asdict(rules_of_edges) | {"share": rules_of_edges.least_share} if edges else None
    encoded = encode(prompt, model)
    result = attribute(
        model,
        [prompt],
        method,
        baseline,
        basis,
        rules,
        steps,
        metric=metric,
        top_k=top_k,
        seed=seed,
        reference=reference,
        progress=progress,
    )
    kept = select(
        result.nodes[0],
        float(result.metric[0]),
        nodes=nodes,
        threshold=threshold,
        mass=mass,
        skip_first=skip_first,
        exclude=exclude,
    )
    if not len(kept):
        top, value = float(result.nodes[0].abs().max()), float(result.metric[0])
        raise JobError(
            f"threshold={threshold}" if threshold is not None and top else f"prompt {quoted(encoded.text)}",
            f"no node is kept: the strongest has |attribution| {top:.3g}, the metric is {value:.3g}",
            "lower the threshold" if threshold is not None and top else "choose another baseline or prompt",
        )
    back = len(encoded.token_ids) - min(encoded.positions)
    logits = passes.logits(model, Batch((encoded.token_ids,)), back)[0]
    columns, weights = _node_columns(model, encoded, result, kept, logits)
    table, links, n_links = nodes_table(columns), None, 0
    if edges:
        table, links, n_links = _graph(model, encoded, columns, weights, result.settings, pruning or Pruning())
    return Circuit(
        nodes=table,
        links=links,
        n_links=n_links,
        text=encoded.text,
        token_ids=encoded.token_ids,
        tokens=tuple(decode(model, token) for token in encoded.token_ids),
        n_layers=model.n_layers,
        target_ids=result.target_ids[0],
        foil_ids=result.foil_ids[0],
        positions=encoded.positions,
        counterfactual_ids=encoded.counterfactual_ids,
        reference=None if reference is None else _hash([encode(one, model) for one in reference]),
        metric=float(result.metric[0]),
        residual=float(result.residual[0]),
        start_metric=None if result.start_metric is None else float(result.start_metric[0]),
        kept_mass=_mass(result.nodes[0], table),
        n_total=result.nodes[0].numel(),
        n_selected=len(kept),
        conserves=result.settings.conserves and model.conserves,
        predictions=_predictions(model, logits[max(encoded.positions) - len(encoded.token_ids)]),
        probabilities=_probabilities(table, logits, len(encoded.token_ids)),
        settings=result.settings,
        selection=selection,
        model=model.record(),
        user_id=encoded.id,
        seconds=time.perf_counter() - started,
    )


def _graph(
    model: Model,
    encoded: Encoded,
    columns: dict[str, list[Any]],
    weights: list[float],
    chosen: Settings,
    pruning: Pruning,
) -> tuple[pa.Table, pa.Table, int]:
    """The pruned graph: nodes table, edges table, and how many edges there were before pruning."""
    kinds, n_nodes = columns["kind"], len(columns["kind"])
    is_neuron = torch.tensor([kind == "neuron" for kind in kinds])
    is_logit = torch.tensor([kind == "logit" for kind in kinds])
    is_embedding = ~(is_neuron | is_logit)
    place = torch.tensor([columns["layer"], columns["position"], columns["neuron"]]).T
    found = direct_edges(
        model,
        encoded.token_ids,
        place[is_neuron],
        place[is_logit][:, 1:],
        basis=chosen.basis,
        rules=frozenset(chosen.rules) if chosen.method == "relp" else RULES,
    )
    # Sources are neurons then embeddings, in the order of the table; targets are neurons then logits.
    sources, targets = (~is_logit).nonzero()[:, 0], (is_neuron | is_logit).nonzero()[:, 0]
    row, column = found.weight.nonzero(as_tuple=True)
    weight = found.weight[row, column]
    # Of the activation in the table, so that share = weight / activation holds to the bit for whoever reads it.
    value = torch.tensor([math.nan if one is None else one for one in columns["activation"]])[targets][row]
    share = torch.where(value == 0, torch.nan, weight / value)
    whole = EdgeColumns(
        sources[column], targets[row], weight, share, share * torch.tensor(columns["attribution"])[targets[row]]
    )
    logit_weight, incoming = torch.zeros(n_nodes), torch.zeros(n_nodes)
    logit_weight[is_logit], incoming[targets] = torch.tensor(weights), found.incoming
    left = prune(whole, is_neuron, logit_weight, incoming, pruning)
    kept = {name: [values[i] for i in left.nodes.tolist()] for name, values in columns.items()}
    kept["explained"] = [None if math.isnan(value) else value for value in left.explained.tolist()]
    kept["influence"] = left.influence.tolist()
    value = torch.tensor([math.nan if one is None else one for one in columns["activation"]])
    remainder = torch.where((value == 0) | is_embedding, torch.nan, 1 - incoming / value)[left.nodes]
    kept["remainder"] = [None if math.isnan(one) else one for one in remainder.tolist()]
    edges = left.edges
    links = {name: getattr(edges, name).numpy() for name in ("source", "target", "weight", "share", "attribution")}
    return nodes_table(kept), edges_table(links), len(whole)


def _node_columns(
    model: Model, encoded: Encoded, result: Attribution, kept: Tensor, logits: Tensor
) -> tuple[dict[str, list[Any]], list[float]]:
    """The kept neurons, then every embedding, then the target logits, as columns of the nodes table; and the weight
    of each logit in the metric."""
    layer, position, neuron = kept.unbind(-1)
    length = len(encoded.token_ids)
    terms = entries(encoded.positions, result.target_ids[0], result.foil_ids[0], result.settings.metric)
    places, tokens, weights = (list(part) for part in zip(*terms, strict=True))
    value = logits[torch.tensor(places) - length, torch.tensor(tokens)]
    at = [*position.tolist(), *range(length)]
    size = len(at) + len(terms)
    columns: dict[str, list[Any]] = {
        "kind": ["neuron"] * len(kept) + ["embedding"] * length + ["logit"] * len(terms),
        "layer": layer.tolist() + [-1] * length + [model.n_layers] * len(terms),
        "position": at + places,
        "neuron": [*neuron.tolist(), *encoded.token_ids, *tokens],
        "token": [decode(model, one) for one in [*(encoded.token_ids[pos] for pos in at), *tokens]],
        "activation": result.activations[0][layer, position, neuron].tolist() + [None] * length + value.tolist(),
        "attribution": result.nodes[0][layer, position, neuron].tolist()
        + result.embeddings[0].tolist()
        + _logit_attributions(value * torch.tensor(weights), result.settings),
        "explained": [None] * size,
        "influence": [None] * size,
        "remainder": [None] * size,
    }
    return columns, weights


def _logit_attributions(parts: Tensor, chosen: Settings) -> list[float | None]:
    """What each logit adds to the metric; null where the metric is no sum of logits."""
    return parts.tolist() if chosen.metric in SUMS_OF_LOGITS else [None] * len(parts)


def _hash(prompts: Sequence[Encoded]) -> str:
    return hashlib.sha256(repr([prompt.token_ids for prompt in prompts]).encode()).hexdigest()


def _mass(nodes: Tensor, table: pa.Table) -> float:
    """Share of the summed |attribution| of all neuron nodes that the kept ones hold."""
    total = float(nodes.abs().double().sum())
    kept = sum(
        abs(attribution)
        for kind, attribution in zip(table["kind"].to_pylist(), table["attribution"].to_pylist(), strict=True)
        if kind == "neuron"
    )
    return kept / total if total else 0.0


def _probabilities(table: pa.Table, logits: Tensor, length: int) -> tuple[float, ...]:
    """The probability of each logit node's token at its position."""
    at = [
        (position - length, token)
        for kind, position, token in zip(
            *(table[name].to_pylist() for name in ("kind", "position", "neuron")), strict=True
        )
        if kind == "logit"
    ]
    return tuple(float(torch.softmax(logits[column].double(), -1)[token]) for column, token in at)


def _predictions(model: Model, logits: Tensor, count: int = 5) -> tuple[Prediction, ...]:
    top = torch.softmax(logits.double(), -1).topk(min(count, logits.numel()))
    return tuple(
        Prediction(token=decode(model, token), token_id=token, probability=probability)
        for token, probability in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    )
