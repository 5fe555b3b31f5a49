"""Prompt in, circuit out: the nodes selected, the edges between them, and what a reader needs beside them.

Knows how attributions, selection, edges and pruning make one `Circuit`. Refuses to know nnsight (passes.py), how
attributions are computed (attributing.py) and files (store.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tracer import passes
from tracer.attributing import Reference, attribute
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
    reference: Sequence[Prompt] | Reference | None = None,
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
    if not isinstance(prompt, Prompt):
        raise JobError(f"prompt={quoted(prompt)}", "must be a tracer.Prompt", "write tracer.Prompt(...)")
    (circuit,) = trace_all(
        model,
        [prompt],
        nodes,
        method,
        edges,
        baseline=baseline,
        basis=basis,
        rules=rules,
        steps=steps,
        metric=metric,
        top_k=top_k,
        seed=seed,
        reference=reference,
        threshold=threshold,
        mass=mass,
        skip_first=skip_first,
        exclude=exclude,
        pruning=pruning,
        progress=progress,
    )
    return circuit


def trace_all(
    model: Model,
    prompts: Sequence[Prompt],
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
    reference: Sequence[Prompt] | Reference | None = None,
    threshold: float | None = None,
    mass: float | None = None,
    skip_first: bool = False,
    exclude: Iterable[tuple[int, int]] = (),
    pruning: Pruning | None = None,
    memory: int | None = None,
    progress: Progress | None = None,
    attributed: Callable[[Attribution], None] | None = None,
) -> Iterator[Circuit]:
    """The circuits of many prompts, attributed together in batches of at most `memory` bytes.

    Arguments are those of `trace`. The circuits are those that `trace` gives for each prompt alone, up to the last
    bits, which a batch's padding may change; the same call gives the same bits.

    Args:
        attributed: called once with the attributions of all nodes of all prompts, before the first circuit.

    Raises:
        JobError, ModelError: as `trace`; nothing is returned for the prompts after one that raises.
    """
    started = time.perf_counter()
    exclude = sorted(exclude)
    choice: dict[str, Any] = {"threshold": threshold, "mass": mass, "skip_first": skip_first}
    check_selection(nodes, threshold, mass)
    if edges and metric not in SUMS_OF_LOGITS | {"auto"}:
        raise JobError(f"edges with metric {metric!r}", "edges lead into single logits", "use edges=False")
    edges = metric in SUMS_OF_LOGITS | {"auto"} if edges is None else edges
    if pruning is not None and not edges:
        raise JobError("pruning", "has no effect without edges", "leave one of them out")
    pruning = pruning or Pruning()
    if isinstance(reference, Sequence):
        reference = Reference(reference)
    result = attribute(
        model,
        prompts,
        method,
        baseline,
        basis,
        rules,
        steps,
        metric=metric,
        top_k=top_k,
        seed=seed,
        reference=reference,
        memory=memory,
        progress=progress,
    )
    if attributed is not None:
        attributed(result)
    selection = {
        "nodes": node_limit(nodes, threshold, mass),
        **choice,
        "exclude": [list(pair) for pair in exclude],
        "pruning": asdict(pruning) | {"share": pruning.least_share} if edges else None,
    }
    each = (time.perf_counter() - started) / len(prompts)
    for row, prompt in enumerate(prompts):
        begun = time.perf_counter()
        encoded = encode(prompt, model)
        kept = select(
            result.nodes[row, :, : len(encoded.token_ids)],
            float(result.metric[row]),
            nodes=nodes,
            exclude=exclude,
            **choice,
        )
        if not len(kept):
            raise _nothing(encoded, result, row, threshold)
        circuit = _circuit(model, encoded, result, row, kept, pruning if edges else None, selection)
        told = None if reference is None else reference.hash(model)
        took = each + time.perf_counter() - begun
        yield circuit.model_copy(update={"reference": told, "seconds": took})


def _nothing(encoded: Encoded, result: Attribution, row: int, threshold: float | None) -> JobError:
    """What to say where no node is kept."""
    top, value = float(result.nodes[row].abs().max()), float(result.metric[row])
    return JobError(
        f"threshold={threshold}" if threshold is not None and top else f"prompt {quoted(encoded.text)}",
        f"no node is kept: the strongest has |attribution| {top:.3g}, the metric is {value:.3g}",
        "lower the threshold" if threshold is not None and top else "choose another baseline or prompt",
    )


def _circuit(
    model: Model,
    encoded: Encoded,
    result: Attribution,
    row: int,
    kept: Tensor,
    pruning: Pruning | None,
    selection: dict[str, Any],
) -> Circuit:
    """One prompt's circuit from its attributions, row `row` of `result`; with edges where there is a pruning."""
    length = len(encoded.token_ids)
    back = length - min(encoded.positions)
    logits = passes.logits(model, Batch((encoded.token_ids,)), back)[0]
    columns, weights = _node_columns(model, encoded, result, row, kept, logits)
    table, links, n_links = nodes_table(columns), None, 0
    if pruning is not None:
        table, links, n_links = _graph(model, encoded, columns, weights, result.settings, pruning)
    return Circuit(
        nodes=table,
        links=links,
        n_links=n_links,
        text=encoded.text,
        token_ids=encoded.token_ids,
        tokens=tuple(decode(model, token) for token in encoded.token_ids),
        n_layers=model.n_layers,
        target_ids=result.target_ids[row],
        foil_ids=result.foil_ids[row],
        positions=encoded.positions,
        counterfactual_ids=encoded.counterfactual_ids,
        metric=float(result.metric[row]),
        residual=float(result.residual[row]),
        start_metric=None if result.start_metric is None else float(result.start_metric[row]),
        kept_mass=_mass(result.nodes[row], table),
        n_total=result.nodes[row, :, :length].numel(),
        n_selected=len(kept),
        conserves=result.settings.conserves and model.conserves,
        predictions=_predictions(model, logits[max(encoded.positions) - length]),
        probabilities=_probabilities(table, logits, length),
        settings=result.settings,
        selection=selection,
        model=model.record(),
        user_id=encoded.id,
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
    model: Model, encoded: Encoded, result: Attribution, row: int, kept: Tensor, logits: Tensor
) -> tuple[dict[str, list[Any]], list[float]]:
    """The kept neurons, then every embedding, then the target logits, as columns of the nodes table; and the weight
    of each logit in the metric."""
    layer, position, neuron = kept.unbind(-1)
    length = len(encoded.token_ids)
    terms = entries(encoded.positions, result.target_ids[row], result.foil_ids[row], result.settings.metric)
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
        "activation": result.activations[row][layer, position, neuron].tolist() + [None] * length + value.tolist(),
        "attribution": result.nodes[row][layer, position, neuron].tolist()
        + result.embeddings[row, :length].tolist()
        + _logit_attributions(value * torch.tensor(weights), result.settings),
        "explained": [None] * size,
        "influence": [None] * size,
        "remainder": [None] * size,
    }
    return columns, weights


def _logit_attributions(parts: Tensor, chosen: Settings) -> list[float | None]:
    """What each logit adds to the metric; null where the metric is no sum of logits."""
    return parts.tolist() if chosen.metric in SUMS_OF_LOGITS else [None] * len(parts)


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
