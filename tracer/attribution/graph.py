"""One prompt's circuit as tables: its answer, pruned, named and remarked on.

Knows how selected nodes and their edges become the rows of a `Circuit`, and what of one is easily misread. Refuses to
know nnsight (model/passes.py), how numbers are computed (attribution/circuits.py) and files (store/).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tracer.attribution.attribute import Reference, notes
from tracer.attribution.edges import Edges, Inside, edges_of
from tracer.attribution.profiles import Profiles, check_profiles, profiles_of
from tracer.attribution.pruning import EdgeColumns, Pruned, Pruning, prune
from tracer.attribution.request import SelectedNodes, inside_of
from tracer.attribution.selection import Selection
from tracer.circuit.circuit import ENDS, Circuit, Prediction, edges_table, nodes_table, profiles_table
from tracer.errors import JobError, option, quoted
from tracer.model import passes
from tracer.model.model import Model
from tracer.prompts import Batch, decode
from tracer.settings import SUMS_OF_TARGETS, VALUE_TIMES_GRADIENT, ModelRecord, Settings, TargetNeuron
from tracer.system.forks import cached_property

if TYPE_CHECKING:
    import pyarrow as pa

FIRST_SHARE = 0.2
"""Of the kept |attribution|: when more is at position 0, it is said."""


@dataclass(frozen=True)
class Making:
    """What every circuit of one call has in common.

    Attributes:
        chosen: how nodes were attributed. pruning: which edges are kept; None without edges.
        selection: which nodes are kept. nodes: how many were asked for.
        reference: the prompts behind the baseline ``mean``, if they were given.
        profiled: whether attribution profiles are kept.
    """

    model: Model
    chosen: Settings
    pruning: Pruning | None
    selection: Selection
    nodes: int | None
    reference: Reference | None
    profiled: bool = False

    @cached_property
    def record(self) -> ModelRecord:
        return self.model.record()  # once for all: its fingerprint reads some of every weight

    @cached_property
    def kept(self) -> dict[str, Any]:
        """The selection as circuits keep it."""
        pruning = None if self.pruning is None else asdict(self.pruning) | {"share": self.pruning.least_share}
        asked = {"profiles": True} if self.profiled else {}
        return self.selection.record() | {"pruning": pruning} | asked

    def circuits(
        self, every: Iterable[SelectedNodes], each: float, whole: Callable[[Tensor], None] | None
    ) -> Iterator[Circuit]:
        """The circuits of answers as these come.

        Args:
            each: seconds that every prompt took before. whole: called with a prompt's attributions of all nodes.
        """
        begun = time.perf_counter()
        for selected in every:
            if whole is not None and selected.whole is not None:
                whole(selected.whole)
            yield self.circuit(selected, each + time.perf_counter() - begun)
            begun = time.perf_counter()

    def circuit(self, selected: SelectedNodes, seconds: float) -> Circuit:
        """One prompt's circuit, its answer having taken so long.

        Raises:
            JobError: no node is kept.
        """
        begun, alone = time.perf_counter(), self.selection.threshold is None and self.selection.mass is None
        if not len(selected.nodes):
            raise _nothing(selected, self.selection.threshold)
        table, links, n_links, kept = self._tables(selected)
        circuit = Circuit(
            nodes=table,
            links=links,
            n_links=n_links,
            profiles=self._profiles(selected, kept) if self.profiled else None,
            n_layers=self.model.n_layers,
            kept_mass=_mass(selected.total, table),
            n_total=selected.n_total,
            n_selected=len(selected.nodes),
            conserves=self.chosen.conserves and self.model.conserves,
            settings=self.chosen,
            selection=self.kept,
            model=self.record,
            reference=None if self.reference is None else self.reference.hash(self.model),
            **self._of_prompt(selected),
            **_said(self.model, selected, table),
        )
        known = (*circuit.warnings, *_remarks(circuit, self.nodes if alone else None))
        took = seconds + time.perf_counter() - begun
        return circuit.model_copy(update={"seconds": took, "warnings": known})

    def _of_prompt(self, selected: SelectedNodes) -> dict[str, Any]:
        encoded = selected.encoded
        return {
            "text": encoded.text,
            "token_ids": encoded.token_ids,
            "tokens": tuple(decode(self.model, token) for token in encoded.token_ids),
            "target_ids": encoded.target_ids,
            "foil_ids": encoded.foil_ids,
            "positions": encoded.positions,
            "answer": encoded.answer,
            "weights": encoded.weights,
            "counterfactual_ids": encoded.counterfactual_ids,
            "user_id": encoded.id,
            "metric": selected.metric,
            "unexplained": selected.unexplained,
            "start_metric": selected.start,
            "warnings": notes((encoded,), self.model),
        }

    def _profiles(self, selected: SelectedNodes, kept: Tensor) -> pa.Table:
        """The profiles of the nodes that are `kept` of those selected."""
        found = profiles_among(self.model, selected, self.chosen)
        node_ids = range(len(kept))  # they come first in the nodes table
        return profiles_table(node_ids, found.inputs[kept].tolist(), found.outputs[kept].tolist())

    def _tables(self, selected: SelectedNodes) -> tuple[pa.Table, pa.Table | None, int, Tensor]:
        """The nodes, the edges (None without), how many edges there were before pruning, and which of the selected
        nodes are left."""
        columns, weights = _node_columns(self.model, self.record, selected, self.chosen)
        if self.pruning is None:
            return nodes_table(columns), None, 0, torch.arange(len(selected.nodes))
        kinds = columns["kind"]
        is_neuron, is_logit = (torch.tensor([kind in some for kind in kinds]) for some in (("neuron",), ENDS))
        direct = edges_among(self.model, selected, self.chosen)
        whole = _edge_columns(direct, columns, is_logit, self.chosen)
        activation = _column(columns["activation"])
        logit_weight, incoming = torch.zeros(2, len(kinds))
        logit_weight[is_logit], incoming[is_neuron | is_logit] = torch.tensor(weights), direct.incoming
        by_flow = None if direct.from_baseline is None else activation
        left = prune(whole, is_neuron, logit_weight, incoming, self.pruning, by_flow)
        is_embedding = ~(is_neuron | is_logit)
        bias_share = torch.where((activation == 0) | is_embedding, torch.nan, 1 - incoming / activation)
        kept = left.nodes[left.nodes < len(selected.nodes)]
        return *_pruned_tables(left, columns, bias_share), len(whole), kept


def edges_among(model: Model, selected: SelectedNodes, chosen: Settings) -> Edges:
    """All direct edges among a prompt's selected nodes, its embeddings and its logits; those that came with the nodes,
    where they did."""
    if selected.edges is not None:
        return selected.edges
    return edges_of(model, *_ends(selected, chosen), **_how(model, selected, chosen))


def profiles_among(model: Model, selected: SelectedNodes, chosen: Settings) -> Profiles:
    """The attribution profiles of a prompt's selected nodes; those that came with the nodes, where they did."""
    if selected.profiles is not None:
        return selected.profiles
    found = profiles_of(model, *_ends(selected, chosen), **_how(model, selected, chosen))
    check_profiles(model, found, selected.activations, chosen)
    return found


def _ends(selected: SelectedNodes, chosen: Settings) -> tuple[tuple[int, ...], Tensor, Tensor | Inside]:
    """Tokens, nodes and logits or what stands in their place, as `direct_edges` takes them."""
    at, of = torch.tensor([(place, token) for place, token, _ in selected.terms]), inside_of(chosen)
    return selected.encoded.token_ids, selected.nodes, at if of is None else Inside(at, of)


def _how(model: Model, selected: SelectedNodes, chosen: Settings) -> dict[str, Any]:
    """The linearisation and the baselines, as `edges_of` takes them."""
    baselines = _baselines(model, selected, chosen)
    return {"basis": chosen.basis, "rules": chosen.edge_rules, "baselines": baselines}


def _edge_columns(direct: Edges, columns: dict[str, list[Any]], is_logit: Tensor, chosen: Settings) -> EdgeColumns:
    """All edges as columns, numbered by the rows of the nodes table."""
    # Sources are neurons then embeddings, in the order of the table; targets are neurons then logits.
    is_target = torch.tensor([kind != "embedding" for kind in columns["kind"]])
    sources, targets = (~is_logit).nonzero()[:, 0], is_target.nonzero()[:, 0]
    moved = direct.weight if direct.from_baseline is None else direct.from_baseline
    row, column = ((direct.weight != 0) | (moved != 0)).nonzero(as_tuple=True)
    weight, moved = direct.weight[row, column], moved[row, column]
    # Of the activation in the table, so that share = weight / activation holds to the bit for whoever reads it.
    value = _column(columns["activation"])[targets][row]
    share = torch.where(value == 0, torch.nan, weight / value)
    if direct.from_baseline is None and chosen.method in VALUE_TIMES_GRADIENT:
        attribution = share * torch.tensor(columns["attribution"])[targets[row]]
    else:
        attribution = moved * _column(columns["gradient"])[targets[row]]
    return EdgeColumns(sources[column], targets[row], weight, share, attribution, moved)


def _pruned_tables(left: Pruned, columns: dict[str, list[Any]], bias_share: Tensor) -> tuple[pa.Table, pa.Table]:
    """What pruning leaves, as the nodes table and the edges table."""
    kept = {name: [values[i] for i in left.nodes.tolist()] for name, values in columns.items()}
    kept["explained"] = [None if math.isnan(value) else value for value in left.explained.tolist()]
    kept["influence"] = left.influence.tolist()
    kept["bias_share"] = [None if math.isnan(share) else share for share in bias_share[left.nodes].tolist()]
    names = ("source", "target", "weight", "share", "attribution")
    return nodes_table(kept), edges_table({name: getattr(left.edges, name).numpy() for name in names})


def _said(model: Model, selected: SelectedNodes, table: pa.Table) -> dict[str, Any]:
    """What the model says: its predictions, and the probabilities and ranks of the logit nodes."""
    top = zip(*(part.tolist() for part in selected.top), strict=True)
    return {
        "predictions": tuple(
            Prediction(token=decode(model, token), token_id=token, probability=probability)
            for token, probability in top
        ),
        "probabilities": _by_logit_node(table, selected, selected.chances.tolist()),
        "ranks": _by_logit_node(table, selected, selected.ranks.tolist()),
    }


def _nothing(selected: SelectedNodes, threshold: float | None) -> JobError:
    """The error where no node is kept."""
    top, value = selected.largest, selected.metric
    return JobError(
        f"threshold={threshold}" if threshold is not None and top else f"prompt {quoted(selected.encoded.text)}",
        f"no node is kept: the strongest has |attribution| {top:.3g}, the metric is {value:.3g}",
        "lower the threshold" if threshold is not None and top else "choose another baseline or prompt",
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


def _node_columns(
    model: Model, made: ModelRecord, selected: SelectedNodes, chosen: Settings
) -> tuple[dict[str, list[Any]], list[float]]:
    """The kept neurons, then every embedding, then the target logits, or what stands in their place, as columns of the
    nodes table; and the weight of each in the metric."""
    layer, position, neuron = (part.tolist() for part in selected.nodes.unbind(-1))
    token_ids, n_kept = selected.encoded.token_ids, len(selected.nodes)
    places, tokens, weights = (list(part) for part in zip(*selected.terms, strict=True))
    length, n_terms, of = len(token_ids), len(selected.terms), chosen.of
    at = [*position, *range(length)]
    size = len(at) + n_terms
    ids = [*(token_ids[pos] for pos in at), *([] if of is not None else tokens)]
    names = {token: decode(model, token) for token in set(ids)}
    if of is not None:
        tokens = [of.number if isinstance(of, TargetNeuron) else -1] * n_terms
    columns: dict[str, list[Any]] = {
        "kind": ["neuron"] * n_kept + ["embedding"] * length + ["logit" if of is None else "target"] * n_terms,
        "layer": layer + [-1] * length + [model.n_layers] * n_terms,
        "position": at + places,
        "neuron": [*neuron, *token_ids, *tokens],
        "expert": made.numbering(chosen.basis).experts_of(layer, neuron) + [None] * (length + n_terms),
        "token": [names[token] for token in ids] + ([] if of is None else [of.name] * n_terms),
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
    return parts.tolist() if chosen.metric in SUMS_OF_TARGETS else [None] * len(parts)


def _mass(total: float, table: pa.Table) -> float:
    """Share of the summed |attribution| of all neuron nodes that the kept ones hold."""
    kept = sum(
        abs(attribution)
        for kind, attribution in zip(table["kind"].to_pylist(), table["attribution"].to_pylist(), strict=True)
        if kind == "neuron"
    )
    return kept / total if total else 0.0


def _by_logit_node(table: pa.Table, selected: SelectedNodes, values: Sequence[Any]) -> tuple[Any, ...]:
    """Values of the metric's terms in the order of the logit nodes; none where there are none."""
    known = {(place, token): value for (place, token, _), value in zip(selected.terms, values, strict=True)}
    columns = (table[name].to_pylist() for name in ("kind", "position", "neuron"))
    return tuple(known[place, token] for kind, place, token in zip(*columns, strict=True) if kind == "logit")
