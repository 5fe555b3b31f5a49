"""Pages to try the viewer on: random circuits of any size, one as others make them, and text that would like to run."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from tracer.circuit.circuit import Graph, edges_table, nodes_table
from tracer.reports import viewer
from tracer.store.schemas import NODES

MALICIOUS = [
    "</script><script>window.hacked = 1</script>",
    "<!--<script>",
    "<img src=x onerror=window.hacked=1>",
    "\"'`&amp;${window.hacked=1}",
    "{{script}}",
    "\u2028\u2029\u202e\x00\x07\ufffe",
    "\ud800",
    "\n\t\r",
    " 猫🐈",
    "",
]


def payload(n_neurons: int, n_edges: int, n_layers: int = 6, tokens: list[str] | None = None) -> viewer.Payload:
    """A random circuit: one embedding per token, neurons, and two logits at the last position."""
    tokens = tokens or ["The", " keys", " to", " the", " cabinet", " near", " the", " old", " door"]
    rng = np.random.default_rng(7)
    n_tokens, last = len(tokens), len(tokens) - 1
    rows = [(viewer.EMBEDDING, -1, at, 100 + at) for at in range(n_tokens)]
    cells = rng.choice(n_layers * n_tokens * 4096, n_neurons, replace=False)
    rows += [(viewer.NEURON, int(c) // 4096 % n_layers, int(c) // 4096 // n_layers, int(c) % 4096) for c in cells]
    rows += [(viewer.LOGIT, n_layers, last, 5), (viewer.LOGIT, n_layers, last, 7)]
    kind, layer, position, neuron = np.array(rows).T
    n = len(rows)
    attribution = (rng.pareto(1.5, n) * 0.03 * rng.choice([1, -1], n)).clip(-1, 1)
    attribution[-2:] = 2.5, -1
    source, target = _ends(rng, layer, position, n_edges)
    weight = rng.pareto(1.5, len(source)) * rng.choice([1, -1], len(source))
    share = weight / (1 + np.bincount(target, np.abs(weight), n))[target]
    nodes = viewer.Nodes(
        kind=kind.astype(np.uint8),
        layer=layer.astype(np.int16),
        position=position.astype(np.int32),
        neuron=neuron.astype(np.int32),
        activation=np.where(kind == viewer.EMBEDDING, np.nan, rng.normal(0, 2, n)).astype(np.float32),
        attribution=attribution.astype(np.float32),
        explained=np.where(kind == viewer.EMBEDDING, np.nan, rng.uniform(0.4, 1, n)).astype(np.float32),
        labels=[*tokens, " are", " is"],
    )
    nodes = dataclasses.replace(nodes, influence=rng.uniform(0, 1, n).astype(np.float32))
    columns = [column.astype(np.float32) for column in (weight, share, share * attribution[target])]
    edges = viewer.Edges(source.astype(np.int32), target.astype(np.int32), *columns)
    about = {"rules": ["half"], "keep": 100}
    return viewer.Payload("The keys", "a model", "RelP", "logit( are)", about, tokens, n_layers, 3.5, nodes, edges)


def foreign() -> viewer.Payload:
    """A circuit as others make them: errors, no attributions and no metric, shares of some edges, groups."""
    made = payload(80, 400)
    kind, neuron = made.nodes.kind.copy(), made.nodes.neuron.copy()
    cells = {(int(made.nodes.layer[row]), int(made.nodes.position[row])): row for row in range(9, 89)}
    errors = list(cells.values())[:12]
    kind[errors], neuron[errors] = viewer.ERROR, -1
    nothing, lost = np.full(len(kind), np.nan, np.float32), np.full(400, np.nan, np.float32)
    made = changed(made, "nodes", kind=kind, neuron=neuron, attribution=nothing, explained=nothing)
    into_logit = kind[made.edges.target] == viewer.LOGIT
    made = changed(made, "edges", attribution=lost, share=np.where(into_logit, lost, made.edges.share))
    groups = {"subject </b>": (12, 15, 20), "verb": (20, 30, 31, 30), "gone": (12,), "v" * 70: (40, errors[0])}
    return dataclasses.replace(made, metric=float("nan"), metric_text="no metric", groups=groups)


def _ends(rng: Any, layer: np.ndarray, position: np.ndarray, n_edges: int) -> tuple[np.ndarray, np.ndarray]:
    pairs = rng.integers(0, len(layer), (8 * n_edges, 2))
    rises = layer[pairs[:, 0]] < layer[pairs[:, 1]]
    follows = position[pairs[:, 0]] <= position[pairs[:, 1]]
    pairs = rng.permutation(np.unique(pairs[rises & follows], axis=0))[:n_edges]
    assert len(pairs) == n_edges
    return pairs[:, 0], pairs[:, 1]


def changed(made: viewer.Payload, table: str, **columns: Any) -> viewer.Payload:
    return dataclasses.replace(made, **{table: dataclasses.replace(getattr(made, table), **columns)})


def linked() -> Graph:
    """Two neurons of opposite signs below a logit."""
    columns: dict[str, Any] = {
        "kind": ["neuron", "neuron", "embedding", "logit"],
        "layer": [0, 0, -1, 1],
        "position": [0, 1, 0, 1],
        "neuron": [3, 4, 7, 9],
        "token": ["a", " b", "a", " c"],
        "activation": [1.0, -1.0, None, None],
    }
    links = {"source": [0, 1], "target": [3, 3], "weight": [1.0, -2.0], "share": [None] * 2, "attribution": [None] * 2}
    nodes = nodes_table(dict.fromkeys(NODES.names[2:], [None] * 4) | columns)
    return Graph(nodes=nodes, links=edges_table(links), text="a b", tokens=("a", " b"), n_layers=1)
