"""The page: one HTML file that shows a circuit and needs nothing else, no network included.

Knows how nodes, edges and strings are packed into the page and how the static files beside it are joined. Refuses to
know models, runs and how any number was computed; what it is handed is checked, since a bad row would only show up
as a broken picture.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any

import numpy as np

NEURON, EMBEDDING, LOGIT = 0, 1, 2
# Wide types first, so that every column starts at a multiple of its item size.
NODE_TYPES = {
    "position": "<i4",
    "neuron": "<i4",
    "activation": "<f4",
    "attribution": "<f4",
    "explained": "<f4",
    "layer": "<i2",
    "kind": "|u1",
}
EDGE_TYPES = {"source": "<i4", "target": "<i4", "weight": "<f4", "share": "<f4", "attribution": "<f4"}
VENDORED = ("dispatch", "selection", "drag", "color", "interpolate", "timer", "ease", "transition", "zoom")
SCRIPTS = (
    "format",
    "data",
    "search",
    "layout",
    "groups",
    "state",
    "scene",
    "canvas",
    "export",
    "panel",
    "controls",
    "keys",
    "main",
)


@dataclass(frozen=True, eq=False)
class Nodes:
    """One row per node.

    Attributes:
        kind: uint8, `NEURON`, `EMBEDDING` or `LOGIT`.
        layer: int16; -1 for embeddings, `Payload.n_layers` for logits.
        position: int32, index into `Payload.tokens`.
        neuron: int32; the token id for embeddings and logits.
        activation: float32, NaN where a node has none.
        attribution: float32, to the metric.
        explained: float32, share of the incoming weight that the kept edges hold; NaN if unknown.
        labels: token text of the embedding and logit nodes alone, in the order of their rows.
    """

    kind: np.ndarray
    layer: np.ndarray
    position: np.ndarray
    neuron: np.ndarray
    activation: np.ndarray
    attribution: np.ndarray
    explained: np.ndarray
    labels: list[str]


@dataclass(frozen=True, eq=False)
class Edges:
    """One row per edge.

    Attributes:
        source, target: int32, row numbers of `Nodes`; a source lies in a lower layer than its target.
        weight: float32, the direct attribution of source to target.
        share: float32, of the target's incoming weight; NaN if unknown.
        attribution: float32, of the edge to the metric; NaN if unknown.
    """

    source: np.ndarray
    target: np.ndarray
    weight: np.ndarray
    share: np.ndarray
    attribution: np.ndarray


@dataclass(frozen=True, eq=False)
class Payload:
    """Everything one page shows.

    Attributes:
        title: of the page, for example the prompt.
        model, method, metric_text: one short line each, shown under the title.
        settings: shown in the page's "About"; keys and values go through `str`.
        tokens: of the prompt, by position.
        n_layers: of the model.
        metric: of the prompt, in logits; shares of nodes are shares of it.
    """

    title: str
    model: str
    method: str
    metric_text: str
    settings: dict[str, Any]
    tokens: list[str]
    n_layers: int
    metric: float
    nodes: Nodes
    edges: Edges


def page(payload: Payload) -> str:
    """The page as text, to be written as UTF-8.

    Raises:
        ValueError: columns of different lengths, or a value out of range.
    """
    _check_nodes(payload)
    _check_edges(payload)
    header, block = _pack(payload)
    vendored = "\n".join(_static(f"vendor/d3-{name}.min.js") for name in (*VENDORED, "quadtree", "polygon"))
    licence = "/*\n" + _static("vendor/LICENSE") + "*/\n"
    parts = {
        "title": _as_text(payload.title),
        "style": _static("page.css"),
        "vendored": licence + vendored,
        "script": _joined(),
        "header": _as_json(header),
        "block": block,
    }
    parts["policy"] = _policy(scripts=(parts["vendored"], parts["script"]), style=parts["style"])
    # One pass, so that nothing inside a part is taken for a place to fill.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _static("page.html"))


def _check_nodes(payload: Payload) -> None:
    nodes, n_tokens, top = payload.nodes, len(payload.tokens), payload.n_layers
    n = _check_lengths("nodes", nodes, NODE_TYPES)
    kind, layer = nodes.kind, nodes.layer
    _need(top > 0, f"n_layers is {top}")
    _need(n_tokens > 0, "there are no tokens")
    _need(math.isfinite(payload.metric), f"metric is {payload.metric}")
    _need(bool(np.isin(kind, (NEURON, EMBEDDING, LOGIT)).all()), "kind holds other values than 0, 1 and 2")
    _need(bool((layer[kind == EMBEDDING] == -1).all()), "an embedding's layer is not -1")
    _need(bool((layer[kind == LOGIT] == top).all()), f"a logit's layer is not {top}")
    inner = layer[kind == NEURON]
    _need(bool(((inner >= 0) & (inner < top)).all()), f"a neuron's layer is outside 0..{top - 1}")
    inside = (nodes.position >= 0) & (nodes.position < n_tokens)
    _need(bool(inside.all()), f"a position is outside 0..{n_tokens - 1}")
    _need(bool((nodes.neuron >= 0).all()), "a neuron or token id is negative")
    _need(bool(np.isfinite(nodes.attribution).all()), "a node's attribution is not finite")
    _need(not bool(np.isinf(nodes.activation).any()), "a node's activation is infinite")
    _need(not bool(np.isinf(nodes.explained).any()), "a node's explained share is infinite")
    named = int((kind != NEURON).sum())
    _need(len(nodes.labels) == named, f"{len(nodes.labels)} labels for {named} embedding and logit nodes")
    keys = np.stack([np.asarray(column, np.int64) for column in (layer, nodes.position, nodes.neuron)], axis=1)
    _need(len(np.unique(keys, axis=0)) == n, "two nodes have the same layer, position and neuron")


def _check_edges(payload: Payload) -> None:
    edges, nodes = payload.edges, payload.nodes
    n_nodes = len(nodes.kind)
    _check_lengths("edges", edges, EDGE_TYPES)
    for name in ("source", "target"):
        ends = getattr(edges, name)
        _need(bool(((ends >= 0) & (ends < n_nodes)).all()), f"an edge's {name} is outside 0..{n_nodes - 1}")
    rises = nodes.layer[edges.source] < nodes.layer[edges.target]
    _need(bool(rises.all()), "an edge's source does not lie below its target")
    _need(bool(np.isfinite(edges.weight).all()), "an edge's weight is not finite")
    for name in ("share", "attribution"):
        _need(not bool(np.isinf(getattr(edges, name)).any()), f"an edge's {name} is infinite")


def _check_lengths(name: str, table: Nodes | Edges, types: dict[str, str]) -> int:
    columns = {field.name: getattr(table, field.name) for field in fields(table) if field.name in types}
    shapes = {column: np.shape(values) for column, values in columns.items()}
    n = len(next(iter(columns.values())))
    _need(all(shape == (n,) for shape in shapes.values()), f"columns of {name} differ in shape: {shapes}")
    for column, values in columns.items():
        wanted = "f" if types[column][1] == "f" else "iu"
        _need(values.dtype.kind in wanted, f"{name}.{column} has dtype {values.dtype}")
    return n


def _need(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(f"page payload: {otherwise}")


def _pack(payload: Payload) -> tuple[dict[str, Any], str]:
    """The header that says what lies where, and the base64 text of all columns end to end."""
    blobs: list[bytes] = []
    columns: dict[str, dict[str, list[Any]]] = {"nodes": {}, "edges": {}}
    offset = 0
    tables = (("edges", payload.edges, EDGE_TYPES), ("nodes", payload.nodes, NODE_TYPES))
    for name, table, types in tables:
        for column, code in types.items():
            values = _fitted(name, column, getattr(table, column), code)
            blobs.append(values.tobytes())
            columns[name][column] = [code[1:], offset, len(values)]
            offset += values.nbytes
    header = {
        "title": payload.title,
        "model": payload.model,
        "method": payload.method,
        "metricText": payload.metric_text,
        "settings": [[str(key), str(value)] for key, value in payload.settings.items()],
        "tokens": payload.tokens,
        "labels": payload.nodes.labels,
        "layers": payload.n_layers,
        "metric": payload.metric,
        "columns": columns,
    }
    return header, base64.b64encode(b"".join(blobs)).decode("ascii")


def _fitted(table: str, column: str, values: np.ndarray, code: str) -> np.ndarray:
    if code[1] in "iu" and len(values):
        limits = np.iinfo(code)
        fits = limits.min <= int(values.min()) and int(values.max()) <= limits.max
        _need(fits, f"{table}.{column} does not fit {code}")
    return np.ascontiguousarray(values, dtype=code)


def _as_json(value: object) -> str:
    """JSON in ASCII in which nothing can end the script element it stands in, or start markup."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _as_text(value: str) -> str:
    """`value` as HTML text in ASCII; control characters become spaces."""
    plain = "".join(" " if ord(sign) < 32 or 127 <= ord(sign) < 160 else sign for sign in value)
    return html.escape(plain).encode("ascii", "xmlcharrefreplace").decode("ascii")


def _policy(scripts: tuple[str, ...], style: str) -> str:
    hashes = " ".join(_hash(script) for script in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src {_hash(style)}; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii") + "'"


def _joined() -> str:
    """Our scripts as one module: they share a scope, so lines that import or export fall away."""
    text = "\n".join(_static(f"{name}.js") for name in SCRIPTS)
    text = re.sub(r"^import [^;]*;\n", "", text, flags=re.MULTILINE)
    return re.sub(r"^export (?=const|function|class)", "", text, flags=re.MULTILINE)


def _static(path: str) -> str:
    return resources.files(__name__).joinpath(*path.split("/")).read_text(encoding="utf-8")
