"""The collapsed graph: supernodes in place of their members, with the edges between members added up.

Knows a graph with groups. Refuses to know how groups come about, and how a graph is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from tracer.circuit.circuit import Graph
from tracer.circuit.supernodes_file import Supernodes, apply
from tracer.errors import JobError

UNGROUPED = "ungrouped"
"""The node that holds the neurons of no group."""
NODES = pa.schema(
    [
        ("node_id", pa.int32()),
        ("kind", pa.string()),
        ("name", pa.string()),
        ("n_members", pa.int32()),
        ("attribution", pa.float64()),
        ("absolute_attribution", pa.float64()),
        ("members", pa.list_(pa.int32())),
    ]
)
"""`kind` is ``supernode``, ``ungrouped``, or that of a node that stands for itself; `members` are node_ids of the
graph. `attribution` is their sum, `absolute_attribution` that of absolute values; null counts 0."""
EDGES = pa.schema(
    [
        ("source", pa.int32()),
        ("target", pa.int32()),
        ("weight", pa.float64()),
        ("attribution", pa.float64()),
        ("absolute_weight", pa.float64()),
        ("n_edges", pa.int32()),
    ]
)
"""Sums over the edges between the members, strongest |weight| first; one whose source is its target holds what is
inside. A null counts 0."""


@dataclass(frozen=True, eq=False)
class Collapsed:
    """A graph with supernodes as nodes.

    Attributes:
        nodes: in `NODES`: supernodes in the order of the groups, ungrouped neurons, then embeddings, logits and others
            each by itself. edges: in `EDGES`; of all of them together weight and attribution are those of the graph.
    """

    nodes: pa.Table
    edges: pa.Table


def collapse(graph: Graph, groups: Supernodes | None = None) -> Collapsed:
    """Put supernodes in place of their members.

    Args:
        graph: of one prompt, or a dataset's circuit, with its `groups`. groups: in place of those.

    Raises:
        JobError: a circuit without edges or groups, or a node that is in two groups. RunError: groups of another.
    """
    graph = graph if groups is None else apply(groups, graph)
    if not graph.groups:
        raise JobError("circuit", "has no groups", "group it with tracer.supernodes")
    if graph.links is None:
        raise graph.without_edges("trace it again with edges (the default)")
    kinds, names, place = _places(graph)
    size = len(names)
    value = _numbers(graph.nodes, "attribution")
    nodes = {
        "node_id": range(size),
        "kind": kinds,
        "name": names,
        "n_members": np.bincount(place, minlength=size),
        "attribution": np.bincount(place, value, size),
        "absolute_attribution": np.bincount(place, np.abs(value), size),
        "members": [np.flatnonzero(place == one).tolist() for one in range(size)],
    }
    return Collapsed(
        pa.table({field.name: pa.array(nodes[field.name], field.type) for field in NODES}),
        _edges(graph.links, place, size),
    )


def _places(graph: Graph) -> tuple[list[str], list[str], np.ndarray]:
    """Kinds and names of the collapsed nodes, and the one that each node goes to."""
    rows = graph.nodes.select(["kind", "position", "token"]).to_pylist()
    place = np.full(len(rows), -1)
    kinds, names = list[str](), list[str]()
    for name, members in graph.groups.items():
        if (place[list(members)] >= 0).any():
            raise JobError(f"group {name!r}", "shares a node with another group", "put each node into one")
        place[list(members)] = len(names)
        kinds.append("supernode")
        names.append(name)
    alone = [node for node, row in enumerate(rows) if place[node] < 0 and row["kind"] == "neuron"]
    if alone:
        place[alone] = len(names)
        kinds.append("ungrouped")
        names.append(UNGROUPED)
    for node, row in enumerate(rows):
        if place[node] < 0:
            place[node] = len(names)
            kinds.append(row["kind"])
            names.append(graph.labels.get(node) or row["token"] or "")
    return kinds, names, place


def _edges(links: pa.Table, place: np.ndarray, size: int) -> pa.Table:
    """The edges between members, added up."""
    source, target = (place[links[end].to_numpy()] for end in ("source", "target"))
    pairs, which = np.unique(source * size + target, return_inverse=True)
    weight = _numbers(links, "weight")
    columns = {
        "source": pairs // size,
        "target": pairs % size,
        "weight": np.bincount(which, weight, len(pairs)),
        "attribution": np.bincount(which, _numbers(links, "attribution"), len(pairs)),
        "absolute_weight": np.bincount(which, np.abs(weight), len(pairs)),
        "n_edges": np.bincount(which, minlength=len(pairs)),
    }
    order = np.argsort(-np.abs(columns["weight"]), kind="stable")
    return pa.table({field.name: pa.array(columns[field.name][order], field.type) for field in EDGES})


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    """A column as float64; null is 0."""
    return table[name].cast(pa.float64()).fill_null(0.0).to_numpy()
