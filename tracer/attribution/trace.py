"""Prompt in, circuit out: the nodes selected, the edges between them, and what is needed to read them.

Knows how attributions, selection, edges and pruning make one `Circuit`. Refuses to know nnsight (model/passes.py), how
attributions are computed (attribution/attribute.py) and files (store/).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tracer.attribution.attribute import Reference, notes, prepared, settled
from tracer.attribution.attribute import attributed as attributions_of
from tracer.attribution.edges import check_permitted, direct_edges
from tracer.attribution.methods import FORWARD_ONLY, Progress
from tracer.attribution.pruning import EdgeColumns, Pruning, prune
from tracer.attribution.result import Attribution
from tracer.attribution.selected import (
    SelectedNodes,
    SelectionRules,
    can_reduce_on_server,
    local_circuits,
    server_circuits,
)
from tracer.attribution.selection import check_excluded, check_selection, node_limit
from tracer.circuit.circuit import Circuit, Prediction, edges_table, nodes_table
from tracer.errors import JobError, option, quoted, say
from tracer.model import passes
from tracer.model.model import Model
from tracer.model.state import undisturbed
from tracer.prompts import Batch, Prompt, decode
from tracer.settings import SUMS_OF_LOGITS, VALUE_TIMES_GRADIENT, ModelRecord, Settings, settings

if TYPE_CHECKING:
    import pyarrow as pa

FIRST_SHARE = 0.2
"""Of the kept |attribution|: when more is at position 0, it is said."""


@undisturbed()
def trace(
    model: Model,
    prompt: Prompt,
    nodes: int | None = None,
    method: str = "relp",
    edges: bool | None = None,
    *,
    baseline: str | None = None,
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
        JobError, ModelError, RemoteError: as `attribute`; edges need gradients too, or weights here.

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
    say(note for note in circuit.warnings if note not in model.warnings)  # `load` said those
    return circuit


def trace_all(
    model: Model,
    prompts: Sequence[Prompt],
    nodes: int | None = None,
    method: str = "relp",
    edges: bool | None = None,
    *,
    baseline: str | None = None,
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
        JobError, ModelError, RemoteError: as `trace`; nothing is returned for the prompts after one that raises.
    """
    started = time.perf_counter()
    exclude = sorted(exclude)
    choice: dict[str, Any] = {"threshold": threshold, "mass": mass, "skip_first": skip_first}
    how: dict[str, Any] = {"method": method, "baseline": baseline, "basis": basis, "rules": rules, "steps": steps}
    how |= {"metric": metric, "top_k": top_k, "seed": seed}
    chosen, edges = checked(prompts, nodes, edges, threshold=threshold, mass=mass, pruning=pruning, **how)
    pruning = pruning or Pruning()
    if isinstance(reference, Sequence):
        reference = Reference(reference)
    chosen, encoded = prepared(model, prompts, chosen, reference)
    if edges:
        check_permitted(model, chosen.edge_rules)
    for layer, neuron in exclude:
        check_excluded((model.n_layers, 1, model.n_neurons(chosen.basis)), layer, neuron)
    limits: SelectionRules = (node_limit(nodes, threshold, mass), threshold, mass, skip_first, exclude)
    every: Iterable[SelectedNodes]
    if attributed is None and can_reduce_on_server(model, chosen):
        every = server_circuits(model, encoded, chosen, limits, edges=edges, memory=memory, progress=progress)
    else:
        keep = edges or chosen.method not in FORWARD_ONLY
        result = attributions_of(model, encoded, chosen, reference or Reference(prompts), memory, progress, keep)
        if attributed is not None:
            attributed(result)
        every = local_circuits(model, encoded, result, limits)
    selection = {
        "nodes": node_limit(nodes, threshold, mass),
        **choice,
        "exclude": [list(pair) for pair in exclude],
        "pruning": asdict(pruning) | {"share": pruning.least_share} if edges else None,
    }
    record = model.record()  # once for all: its fingerprint reads some of every weight
    each, begun = (time.perf_counter() - started) / len(prompts), time.perf_counter()
    for selected in every:
        if not len(selected.nodes):
            raise _nothing(selected, threshold)
        circuit = _circuit(model, selected, chosen, pruning if edges else None, selection, record)
        reference_hash = None if reference is None else reference.hash(model)
        known = (*circuit.warnings, *_remarks(circuit, nodes if threshold is None and mass is None else None))
        done = {"reference": reference_hash, "seconds": each + time.perf_counter() - begun, "warnings": known}
        yield circuit.model_copy(update=done)
        begun = time.perf_counter()


def checked(
    prompts: Sequence[Prompt],
    nodes: int | None = None,
    edges: bool | None = None,
    *,
    baseline: str | None = None,
    threshold: float | None = None,
    mass: float | None = None,
    pruning: Pruning | None = None,
    **how: Any,
) -> tuple[Settings, bool]:
    """The settings that the arguments of `trace` come to, and whether edges are traced; needs no model.

    Raises:
        JobError: what `trace` refuses and no model decides.
    """
    check_selection(nodes, threshold, mass)
    metric = how.get("metric", "auto")
    if edges and metric not in SUMS_OF_LOGITS | {"auto"}:
        raise JobError(f"edges with metric {metric!r}", "edges lead into single logits", "use edges=False")
    edges = metric in SUMS_OF_LOGITS | {"auto"} if edges is None else edges
    if pruning is not None and not edges:
        raise JobError("pruning", "has no effect without edges", "leave one of them out")
    return settings(baseline=settled(baseline, prompts, how.get("method", "relp")), **how), edges


def _nothing(selected: SelectedNodes, threshold: float | None) -> JobError:
    """The error where no node is kept."""
    top, value = selected.largest, selected.metric
    return JobError(
        f"threshold={threshold}" if threshold is not None and top else f"prompt {quoted(selected.encoded.text)}",
        f"no node is kept: the strongest has |attribution| {top:.3g}, the metric is {value:.3g}",
        "lower the threshold" if threshold is not None and top else "choose another baseline or prompt",
    )


def _circuit(
    model: Model,
    selected: SelectedNodes,
    chosen: Settings,
    pruning: Pruning | None,
    selection: dict[str, Any],
    record: ModelRecord,
) -> Circuit:
    """One prompt's circuit; with edges if `pruning` is given."""
    encoded = selected.encoded
    columns, weights = _node_columns(model, selected, chosen)
    table, links, n_links = nodes_table(columns), None, 0
    if pruning is not None:
        table, links, n_links = _graph(model, selected, columns, weights, chosen, pruning)
    return Circuit(
        nodes=table,
        links=links,
        n_links=n_links,
        text=encoded.text,
        token_ids=encoded.token_ids,
        tokens=tuple(decode(model, token) for token in encoded.token_ids),
        n_layers=model.n_layers,
        target_ids=encoded.target_ids,
        foil_ids=encoded.foil_ids,
        positions=encoded.positions,
        counterfactual_ids=encoded.counterfactual_ids,
        metric=selected.metric,
        unexplained=selected.unexplained,
        start_metric=selected.start,
        kept_mass=_mass(selected.total, table),
        n_total=selected.n_total,
        n_selected=len(selected.nodes),
        conserves=chosen.conserves and model.conserves,
        predictions=tuple(
            Prediction(token=decode(model, token), token_id=token, probability=probability)
            for token, probability in zip(*(part.tolist() for part in selected.top), strict=True)
        ),
        probabilities=_by_logit_node(table, selected, selected.chances.tolist()),
        ranks=_by_logit_node(table, selected, selected.ranks.tolist()),
        settings=chosen,
        selection=selection,
        model=record,
        user_id=encoded.id,
        warnings=notes((encoded,), model),
    )


def much_at_first(circuit: Circuit) -> bool:
    """Whether so much of a circuit is at the first token that it is said; of a prompt of one token all is."""
    return circuit.first_share > FIRST_SHARE and len(circuit.token_ids) > 1


def first_note(share: str, no_foil: bool) -> str:
    """What is said where much of a circuit is at the first token. `no_foil`: whether a foil could be asked for."""
    other = f"; or ask for a difference, with {option('foil')}" if no_foil else ""
    return (
        f"{share} of the kept |attribution| is at position 0, which is much the same for every prompt: "
        f"{option('skip_first', True)} leaves that position out{other}"
    )


def _remarks(circuit: Circuit, nodes: int | None) -> Iterator[str]:
    """What is easily misread of a circuit, in sentences.

    Args:
        nodes: how many were asked for.
    """
    if much_at_first(circuit):
        yield first_note(f"{circuit.first_share:.0%}", circuit.settings.metric == "logit")
    for row, chance, rank in circuit.unlikely:
        yield (
            f"the target {quoted(row['token'])} is number {rank:,} of the model's next tokens "
            f"(p = {chance:.2g}) at position {row['position']}: the circuit is not of what the model says"
        )
    if nodes is not None and circuit.n_selected < nodes:
        yield (
            f"{option('nodes', nodes)} is more than the {circuit.n_selected:,} nodes that have an attribution "
            "and may be taken: all of them are kept"
        )
    if circuit.cancels and circuit.selection["threshold"] is not None:
        yield (
            f"the metric is {circuit.metric:+.3g}, near 0 beside what the tokens give it: "
            f"{option('threshold', circuit.selection['threshold'])} is a share of it and keeps nearly everything"
        )


def _graph(
    model: Model,
    selected: SelectedNodes,
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
    direct = selected.edges or direct_edges(
        model,
        selected.encoded.token_ids,
        place[is_neuron],
        place[is_logit][:, 1:],
        basis=chosen.basis,
        rules=chosen.edge_rules,
        baselines=_baselines(model, selected, chosen),
    )
    # Sources are neurons then embeddings, in the order of the table; targets are neurons then logits.
    sources, targets = (~is_logit).nonzero()[:, 0], (is_neuron | is_logit).nonzero()[:, 0]
    moved = direct.weight if direct.from_baseline is None else direct.from_baseline
    row, column = ((direct.weight != 0) | (moved != 0)).nonzero(as_tuple=True)
    weight, moved = direct.weight[row, column], moved[row, column]
    # Of the activation in the table, so that share = weight / activation holds to the bit for whoever reads it.
    activation = _column(columns["activation"])
    value = activation[targets][row]
    share = torch.where(value == 0, torch.nan, weight / value)
    if direct.from_baseline is None and chosen.method in VALUE_TIMES_GRADIENT:
        attribution = share * torch.tensor(columns["attribution"])[targets[row]]
    else:
        attribution = moved * _column(columns["gradient"])[targets[row]]
    whole = EdgeColumns(sources[column], targets[row], weight, share, attribution, moved)
    logit_weight, incoming = torch.zeros(n_nodes), torch.zeros(n_nodes)
    logit_weight[is_logit], incoming[targets] = torch.tensor(weights), direct.incoming
    by_flow = None if direct.from_baseline is None else activation
    left = prune(whole, is_neuron, logit_weight, incoming, pruning, by_flow)
    kept = {name: [values[i] for i in left.nodes.tolist()] for name, values in columns.items()}
    kept["explained"] = [None if math.isnan(value) else value for value in left.explained.tolist()]
    kept["influence"] = left.influence.tolist()
    bias_share = torch.where((activation == 0) | is_embedding, torch.nan, 1 - incoming / activation)[left.nodes]
    kept["bias_share"] = [None if math.isnan(share) else share for share in bias_share.tolist()]
    edges = left.edges
    links = {name: getattr(edges, name).numpy() for name in ("source", "target", "weight", "share", "attribution")}
    return nodes_table(kept), edges_table(links), len(whole)


def _column(values: Sequence[float | None]) -> Tensor:
    """NaN where there is none."""
    return torch.tensor([math.nan if value is None else value for value in values])


def _baselines(model: Model, selected: SelectedNodes, chosen: Settings) -> tuple[Tensor, Tensor] | None:
    """Of a prompt's nodes, and of its embeddings [pos, d_model]; None where all are zero. An embedding's baseline is
    zero but for the counterfactual's."""
    paired = selected.encoded.counterfactual_ids if chosen.baseline == "counterfactual" else None
    if selected.baselines is None and paired is None:
        return None
    nodes = torch.zeros(len(selected.nodes)) if selected.baselines is None else selected.baselines
    if paired is None:
        return nodes, torch.zeros(len(selected.encoded.token_ids), model.d_model)
    return nodes, passes.embedding(model, Batch((paired,)))[0].float()


def _node_columns(model: Model, selected: SelectedNodes, chosen: Settings) -> tuple[dict[str, list[Any]], list[float]]:
    """The kept neurons, then every embedding, then the target logits, as columns of the nodes table; and the weight
    of each logit in the metric."""
    layer, position, neuron = (part.tolist() for part in selected.nodes.unbind(-1))
    token_ids, n_kept = selected.encoded.token_ids, len(selected.nodes)
    places, tokens, weights = (list(part) for part in zip(*selected.terms, strict=True))
    length, n_terms = len(token_ids), len(selected.terms)
    at = [*position, *range(length)]
    size = len(at) + n_terms
    columns: dict[str, list[Any]] = {
        "kind": ["neuron"] * n_kept + ["embedding"] * length + ["logit"] * n_terms,
        "layer": layer + [-1] * length + [model.n_layers] * n_terms,
        "position": at + places,
        "neuron": [*neuron, *token_ids, *tokens],
        "token": [decode(model, token) for token in [*(token_ids[pos] for pos in at), *tokens]],
        "activation": selected.activations.tolist() + [None] * length + selected.logits.tolist(),
        "attribution": selected.attributions.tolist()
        + selected.embeddings.tolist()
        + _of_logits(selected.logits * torch.tensor(weights), chosen),
        "gradient": ([None] * n_kept if selected.gradients is None else selected.gradients.tolist())
        + [None] * length
        + _of_logits(torch.tensor(weights), chosen),
        "explained": [None] * size,
        "influence": [None] * size,
        "bias_share": [None] * size,
    }
    return columns, weights


def _of_logits(parts: Tensor, chosen: Settings) -> list[float | None]:
    """What each logit adds to the metric, or its weight in it; null where the metric is not a sum of logits."""
    return parts.tolist() if chosen.metric in SUMS_OF_LOGITS else [None] * len(parts)


def _mass(total: float, table: pa.Table) -> float:
    """Share of the summed |attribution| of all neuron nodes that the kept ones hold."""
    kept = sum(
        abs(attribution)
        for kind, attribution in zip(table["kind"].to_pylist(), table["attribution"].to_pylist(), strict=True)
        if kind == "neuron"
    )
    return kept / total if total else 0.0


def _by_logit_node(table: pa.Table, selected: SelectedNodes, values: Sequence[Any]) -> tuple[Any, ...]:
    """Values of the metric's terms in the order of the logit nodes."""
    known = {(place, token): value for (place, token, _), value in zip(selected.terms, values, strict=True)}
    columns = (table[name].to_pylist() for name in ("kind", "position", "neuron"))
    return tuple(known[place, token] for kind, place, token in zip(*columns, strict=True) if kind == "logit")
