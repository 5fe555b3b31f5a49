"""What grouping a circuit's neurons found: the groups with their names, how they came about, and what is shown of them.

Knows clusters of items, and how they become the file that keeps groups. Refuses to know likeness and clustering.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from tracer.circuit.circuit import Graph, Traced
from tracer.circuit.said import polarities
from tracer.circuit.supernodes_file import ANYWHERE, Group, Member, Supernodes, polarity_of
from tracer.meaning import naming
from tracer.meaning.clusters import Clusters, Stability
from tracer.meaning.naming import Weighed
from tracer.meaning.similarity import Counted, Items, Likeness, Matrix
from tracer.system.display import Shown

_DIGITS = 6
"""Of the statistics that the file keeps."""


class Row(NamedTuple):
    """What is shown of a supernode.

    Attributes:
        members: nodes; neurons of one polarity where positions do not count. attribution: their sum, metric units.
        share: their |attribution| of that of all neurons of the circuit.
        promotes: the tokens that its members promote together.
        silhouette: mean over its members; stability: mean Jaccard index over bootstraps; None where not known.
    """

    name: str
    description: str
    members: int
    attribution: float
    share: float
    promotes: tuple[str, ...]
    silhouette: float | None
    stability: float | None


@dataclass(frozen=True, eq=False, repr=False)
class Grouping(Shown):
    """What grouping a circuit's neurons found.

    Attributes:
        file: the groups, as they are kept.
        graph: with these groups. items: what was compared, in canonical order; `similarity` [item, item] of theirs.
        labels: of each item, its place among the file's groups, or -1 for those that are like no other.
        clusters: with the silhouettes. stability: over bootstraps; None of one prompt, or where it was not asked for.
        notes: what whoever reads it should know, a sentence each.
    """

    file: Supernodes
    graph: Traced
    items: Items
    similarity: Matrix
    labels: np.ndarray
    clusters: Clusters
    stability: Stability | None
    notes: tuple[str, ...]

    def rows(self) -> list[Row]:
        """What is shown of each group, those with the most |attribution| first."""
        return rows(self.file, self.graph, self.graph.neuron_tokens)

    def to_pandas(self) -> Any:
        """A pandas DataFrame with a row for each group: `name`, `description`, `members`, summed `attribution` (metric
        units), `share` of the circuit's |attribution|, `promotes`, `silhouette` and `stability`."""
        import pandas

        return pandas.DataFrame(self.rows(), columns=list(Row._fields))


def rows(file: Supernodes, graph: Graph, tokens: pa.Table | None = None) -> list[Row]:
    """What is shown of each group, those with the most |attribution| first.

    Args:
        graph: the circuit with these groups (`supernodes_file.apply`).
        tokens: promoted tokens, in `schemas.TOKENS`.
    """
    nodes = graph.nodes.select(["kind", "layer", "neuron", "activation", "attribution"]).to_pylist()
    total = sum(abs(row["attribution"] or 0.0) for row in nodes if row["kind"] == "neuron")
    known, found = file.how.get("groups", {}), list[Row]()
    for group in file.groups:
        own = [nodes[node] for node in graph.groups.get(group.name, ())]
        values = [row["attribution"] or 0.0 for row in own]
        members = [
            Weighed((row["layer"], row["neuron"], polarity_of(row["activation"])), abs(value))
            for row, value in zip(own, values, strict=True)
            if row["kind"] == "neuron"
        ]
        measured = known.get(group.name) if isinstance(known, Mapping) else None
        found.append(
            Row(
                name=group.name,
                description=group.description,
                members=len(group.nodes),
                attribution=sum(values),
                share=sum(map(abs, values)) / total if total else 0.0,
                promotes=tuple(token for token, _ in naming.promoted(members, tokens)),
                silhouette=_number(measured, "silhouette"),
                stability=_number(measured, "stability"),
            )
        )
    return sorted(found, key=lambda row: -row.share)


class Found(NamedTuple):
    """What was found, before it has names."""

    graph: Traced
    items: Items
    whole: Likeness
    counted: Counted
    clusters: Clusters
    stability: Stability | None

    def grouping(self, settings: dict[str, Any], tokens: pa.Table | None, descriptions: pa.Table | None) -> Grouping:
        """With names, and as the file keeps it: the groups with the most |attribution| first.

        Args:
            settings: what the file says of how they were asked for.
            tokens, descriptions: tables to name groups by.
        """
        attribution = _attribution(self.graph, self.items)
        strength = [float(np.abs(attribution[self.clusters.labels == one]).sum()) for one in self._each()]
        order = sorted(self._each(), key=lambda one: (-strength[one], one))
        labels = np.array([-1 if label < 0 else order.index(label) for label in self.clusters.labels.tolist()])
        members = [np.flatnonzero(labels == group) for group in self._each()]
        weighed = [self._weighed(own, attribution) for own in members]
        said = [naming.described(own, descriptions) for own in weighed]
        titles = [
            naming.from_tokens(own, tokens)
            or naming.from_description(words)
            or naming.from_profiles(*self._ends(places))
            or naming.from_members(own)
            for own, words, places in zip(weighed, said, members, strict=True)
        ]
        names = naming.unique(titles)
        rows = self.items.rows()
        groups = tuple(
            Group(name=name, description=words, nodes=tuple(_member(rows[place]) for place in places))
            for name, words, places in zip(names, said, members, strict=True)
        )
        how = settings | self._how(names, order)
        file = Supernodes(circuit=getattr(self.graph, "fingerprint", None), groups=groups, how=how)
        graph = self.graph.model_copy(update={"groups": self._ids(names, labels)})
        notes = tuple(self._notes(int((labels < 0).sum())))
        return Grouping(file, graph, self.items, self.whole.similarity, labels, self.clusters, self.stability, notes)

    def _each(self) -> Iterable[int]:
        return range(self.clusters.count)

    def _weighed(self, places: np.ndarray, attribution: np.ndarray) -> list[Weighed]:
        """The members as what promotes tokens: neurons of one polarity, positions summed."""
        found = dict[tuple[int, int, int], float]()
        rows = self.items.rows()
        for place in places.tolist():
            layer, _, neuron, sign = rows[place]
            found[layer, neuron, sign] = found.get((layer, neuron, sign), 0.0) + abs(float(attribution[place]))
        return [Weighed(*one) for one in found.items()]

    def _ends(self, places: np.ndarray) -> tuple[dict[str, float], dict[str, float]]:
        """What drives members, by token of the prompt, each member weighed by its |attribution|; and what they do to
        the logits, by target token. Nothing is known of many prompts' at once, which have other tokens."""
        table = self.graph.profiles
        if table is None:
            return {}, {}
        members = {node for node, item in node_items(self.graph, self.items).items() if item in set(places.tolist())}
        nodes, drives, effects = self.graph.nodes.to_pylist(), dict[str, float](), dict[str, float]()
        targets = [row["token"] for row in self.graph.ends]
        for row in table.filter(pa.array([node in members for node in table["node_id"].to_pylist()])).to_pylist():
            node, into = nodes[row["node_id"]], np.array(row["input"])
            size = float(np.abs(into).sum()) or 1.0
            parts = into * abs(node["attribution"]) * polarity_of(node["activation"]) / size
            _add(drives, self.graph.tokens, parts.tolist())
            _add(effects, targets, row["output"])
        return drives, effects

    def _ids(self, names: list[str], labels: np.ndarray) -> dict[str, tuple[int, ...]]:
        """Node ids of the graph by group."""
        found: dict[str, list[int]] = {name: [] for name in names}
        for node, item in node_items(self.graph, self.items).items():
            if labels[item] >= 0:
                found[names[labels[item]]].append(node)
        return {name: tuple(nodes) for name, nodes in found.items()}

    def _how(self, names: list[str], order: list[int]) -> dict[str, Any]:
        """Statistics, as the file keeps them."""
        apart = np.flatnonzero(self.clusters.labels < 0).tolist()
        upper = np.triu(self.whole.together == 0, 1)
        places, stable = self.items.rows(), self.stability
        groups = {
            name: {
                "silhouette": _rounded(_mean(self.clusters.silhouette[self.clusters.labels == one])),
                "stability": None if stable is None else _rounded(stable.groups[one]),
            }
            for name, one in zip(names, order, strict=True)
        }
        overall = {"mean": stable.mean, "low": stable.low, "high": stable.high} if stable is not None else {}
        return {
            "free": self.items.free,
            "clusters": self.clusters.count,
            "scores": {str(count): _rounded(score) for count, score in self.clusters.scores.items()},
            "silhouette": _rounded(self.clusters.scores[self.clusters.count]),
            "stability": {name: _rounded(value) for name, value in overall.items()} or None,
            "n_prompts": self.counted.n_prompts,
            "n_neurons": len(self.items),
            "never_together": int(upper.sum()),
            "ungrouped": [_member(places[place]).model_dump() for place in apart],
            "groups": groups,
        }

    def _notes(self, n_apart: int) -> Iterator[str]:
        n_items, counted = len(self.items), self.counted
        if absent := int((counted.times == 0).sum()):
            yield f"{absent} of {n_items} neurons have no profile in any prompt, and are in no group"
        if n_apart - absent > 0:
            yield f"{n_apart - absent} of {n_items} neurons are like no other, and are in no group"
        if counted.elsewhere:
            yield f"{counted.elsewhere:,} prompts of another length than the circuit's are left out"
        if counted.without:
            yield f"{counted.without:,} nodes of prompts have no profile, and are left out"
        if counted.n_prompts == 1:
            yield "of one prompt the groups' stability over prompts is not known"


def _add(total: dict[str, float], tokens: Sequence[str], values: Sequence[float]) -> None:
    for token, value in zip(tokens, values, strict=True):
        total[token] = total.get(token, 0.0) + value


def node_items(graph: Graph, items: Items) -> dict[int, int]:
    """The item of each neuron node that is one, by node id; of a node whose sign is not known by its place alone."""
    at = {row: number for number, row in enumerate(items.rows())}
    free, found = items.free, dict[int, int]()
    for row in graph.neurons.select(["node_id", "layer", "position", "neuron", "activation"]).to_pylist():
        position = ANYWHERE if free else row["position"]
        for sign in polarities(row["activation"]):
            if (item := at.get((row["layer"], position, row["neuron"], sign))) is not None:
                found[row["node_id"]] = item
    return found


def _attribution(graph: Graph, items: Items) -> np.ndarray:
    """Of each item: the sum over its nodes."""
    found, values = np.zeros(len(items)), graph.nodes["attribution"].to_pylist()
    for node, item in node_items(graph, items).items():
        found[item] += values[node] or 0.0
    return found


def _member(row: tuple[int, int, int, int]) -> Member:
    layer, position, neuron, sign = row
    return Member(layer=layer, position=position, neuron=neuron, polarity=1 if sign > 0 else -1)


def _mean(values: np.ndarray) -> float | None:
    return None if not len(values) or np.isnan(values).any() else float(values.mean())


def _number(measured: Any, name: str) -> float | None:
    """A number of a group that the file keeps; it may have been edited."""
    value = measured.get(name) if isinstance(measured, Mapping) else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, _DIGITS)
