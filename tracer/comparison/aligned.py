"""Two graphs as one, for a page: each node once, at one place, with which of the two has it.

Knows how nodes and edges of two graphs are matched. Refuses to know how they are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pydantic import PrivateAttr

from tracer.circuit.circuit import Graph, edges_table, nodes_table
from tracer.comparison.compare import APPEARED, NEITHER, VANISHED, Comparison
from tracer.experts import DENSE, Numbering

ONE, OTHER, BOTH, FLIPPED = 1, 2, 3, 4
"""Which graph has a node or an edge: the first, the last, both, or both with attributions of opposite signs."""

_ORDER = ("neuron", "embedding", "logit")
_Key = tuple[str, int, int, int]


class Union(Graph):
    """Nodes and edges of two graphs of one architecture."""

    _numbering: Numbering = PrivateAttr(default=DENSE)

    @property
    def numbering(self) -> Numbering:
        """How the neurons of both are numbered."""
        return self._numbering


@dataclass(frozen=True, eq=False)
class Aligned:
    """The union of two graphs.

    Attributes:
        graph: nodes and edges of both; of one that both have the numbers of the last. node_sides, edge_sides: which
            graph has each. first, last: the nodes' attributions in each graph, NaN where it has none.
    """

    graph: Graph
    node_sides: list[int]
    edge_sides: list[int]
    first: list[float]
    last: list[float]


def aligned(found: Comparison) -> Aligned:
    """The graphs of a comparison's first and last side: their own where both have one, else their circuits' nodes.

    Where prompts are of other lengths, or a graph has no positions, all positions are one.
    """
    first, last = found.graphs
    if first is None or last is None:
        first, last = (_nodes_alone(found, end) for end in ("first", "last"))
    placed = len(first.tokens) == len(last.tokens) and all(
        min(graph.nodes["position"].to_pylist(), default=0) >= 0 for graph in (first, last)
    )
    sides = [_Read(graph, placed) for graph in (first, last)]
    keys = sorted(sides[0].nodes.keys() | sides[1].nodes.keys(), key=lambda key: _rank(key, sides))
    values = [[side.value(key) for key in keys] for side in sides]
    ends = {key: number for number, key in enumerate(keys)}
    edges = list(dict.fromkeys([*sides[1].edges, *sides[0].edges]))
    strengths = [[side.edges.get(pair, {}).get("attribution", math.nan) for pair in edges] for side in sides]
    tokens = _tokens(first, last) if placed else ("any position",)
    title = first.text if first.text == last.text else f"{first.text} | {last.text}"
    rows = [(sides[1].nodes.get(key) or sides[0].nodes[key]) for key in keys]
    union = last.model_copy(
        update={
            "nodes": nodes_table({name: [row[name] for row in rows] for name in rows[0]}) if rows else last.nodes,
            "links": _links(sides, edges, ends) if first.links is not None and last.links is not None else None,
            "text": title,
            "tokens": tokens,
            "groups": {},
            "pins": (),
            "labels": {},
            "called": {},
            "remarks": {},
            "profiles": None,
        }
    )
    graph = Union.model_construct(**{name: getattr(union, name) for name in Graph.model_fields})
    graph._numbering = found.numbering
    marks = (
        [_sides(*pair) for pair in zip(*values, strict=True)],
        [_sides(*pair) for pair in zip(*strengths, strict=True)],
    )
    return Aligned(graph, *marks, *values)


def _sides(one: float, other: float) -> int:
    if math.isnan(other):
        return ONE
    if math.isnan(one):
        return OTHER
    return FLIPPED if one * other < 0 else BOTH


def _tokens(first: Graph, last: Graph) -> tuple[str, ...]:
    pairs = zip(first.tokens, last.tokens, strict=True)
    return tuple(one if one == other else f"{one} |{other}" for one, other in pairs)


def _nodes_alone(found: Comparison, end: str) -> Graph:
    """A side's circuit as a graph without edges."""
    absent = {"first": APPEARED, "last": VANISHED}[end]
    rows = [row for row in found.nodes.to_pylist() if row["change"] not in (NEITHER, absent)]
    width = max((row["position"] for row in found.nodes.to_pylist()), default=-1) + 1
    names = ("layer", "neuron", "expert", "position")
    columns: dict[str, Sequence[Any]] = {name: [row[name] for row in rows] for name in names}
    columns["activation"] = [row[f"activation_{end}"] for row in rows]
    columns["attribution"] = [row[f"attribution_{end}"] for row in rows]
    nothing = [None] * len(rows)
    columns |= {"kind": ["neuron"] * len(rows), "token": [""] * len(rows)}
    columns |= dict.fromkeys(("gradient", "explained", "influence", "bias_share"), nothing)
    tokens = tuple(f"position {at}" for at in range(width)) or ("any position",)
    side = found.sides.to_pylist()[0 if end == "first" else -1]
    return Graph(nodes=nodes_table(columns), text=side["name"], tokens=tokens, n_layers=found.n_layers)


class _Read:
    """A graph's nodes by key, and its edges by the keys of both ends."""

    def __init__(self, graph: Graph, placed: bool) -> None:
        self.nodes: dict[_Key, dict[str, Any]] = {}
        self.edges: dict[tuple[_Key, _Key], dict[str, float]] = {}
        names: list[_Key] = []
        for row in graph.nodes.drop_columns(["prompt_id", "node_id"]).to_pylist():
            row["position"] = row["position"] if placed else 0
            key = self._key(row)
            names.append(key)
            self.nodes[key] = _added(self.nodes.get(key), row, ("activation", "attribution"))
        for row in [] if graph.links is None else graph.links.to_pylist():
            pair = names[row["source"]], names[row["target"]]
            columns = {name: row[name] for name in ("weight", "share", "attribution")}
            self.edges[pair] = _added(self.edges.get(pair), columns, tuple(columns))

    @staticmethod
    def _key(row: Mapping[str, Any]) -> _Key:
        """An embedding is that of its position, whatever the token."""
        neuron = -1 if row["kind"] == "embedding" else row["neuron"]
        return row["kind"], row["layer"], row["position"], neuron

    def value(self, key: _Key) -> float:
        """A node's attribution; NaN where the graph has no such node."""
        row = self.nodes.get(key)
        return math.nan if row is None or row["attribution"] is None else row["attribution"]


def _added(before: dict[str, Any] | None, row: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A row, with the sums of these columns where positions fall together."""
    if before is None:
        return row
    sums = {name: None if before[name] is None or row[name] is None else before[name] + row[name] for name in names}
    return before | sums | {name: None for name in ("explained", "influence", "gradient") if name in row}


def _rank(key: _Key, sides: Sequence[_Read]) -> tuple[Any, ...]:
    """Neurons strongest first, then embeddings and logits by position."""
    size = max((abs(value) for side in sides if not math.isnan(value := side.value(key))), default=0.0)
    kind = _ORDER.index(key[0]) if key[0] in _ORDER else len(_ORDER)
    return kind, -size if kind == 0 else key[2], key


def _links(sides: Sequence[_Read], edges: Sequence[tuple[_Key, _Key]], ends: Mapping[_Key, int]) -> pa.Table:
    """The edges of both, of one that both have the numbers of the last."""
    rows = [sides[1].edges.get(pair) or sides[0].edges[pair] for pair in edges]
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in ("weight", "share", "attribution")}
    columns |= {"source": [ends[one] for one, _ in edges], "target": [ends[other] for _, other in edges]}
    return edges_table(columns)
