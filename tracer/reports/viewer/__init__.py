"""The page: one HTML file that shows a circuit and needs nothing else, no network included.

Knows how nodes, edges and strings are packed into the page. Its scripts are written, checked and bundled in `web/`
(`make page`); what ships is beside this file. Refuses to
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from typing import Any, NamedTuple

import numpy as np

NEURON, EMBEDDING, LOGIT, ERROR = 0, 1, 2, 3
MOST_EDGES, MOST_NODES = 2**22, 2**20
"""What the page can rank (data.js) and a browser can still move about."""
LONGEST_NAME = 60  # of a group, in UTF-16 units, as groups.js counts
LONGEST_TOKEN, LONGEST_TEXT = 120, 2000  # of a text's token and of a description, in the same
# Wide types first, so that every column starts at a multiple of its item size.
NODE_TYPES = {
    "position": "<i4",
    "neuron": "<i4",
    "activation": "<f4",
    "attribution": "<f4",
    "explained": "<f4",
    "influence": "<f4",
    "first": "<f4",
    "last": "<f4",
    "layer": "<i2",
    "kind": "|u1",
    "side": "|u1",
}
EDGE_TYPES = {"source": "<i4", "target": "<i4", "weight": "<f4", "share": "<f4", "attribution": "<f4", "side": "<i4"}


class Description(NamedTuple):
    """A neuron in words. score: how well it predicts the neuron on held-out texts, None where that was not measured."""

    text: str
    score: float | None = None
    source: str = ""


class Text(NamedTuple):
    """A piece of text where a neuron is strong: `kind` is ``top`` or a quantile such as ``q50``, `document` its number,
    `value` the neuron's at its peak, `values` that at each token (0 where it has the other sign)."""

    kind: str
    document: int
    value: float
    tokens: tuple[str, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Says:
    """What a neuron does.

    Attributes:
        label: in a few words.
        lists: by heading, tokens with their numbers, the first ones first.
        descriptions: in words. texts: where it is strong, and how many `more` there are that the page does not have.
    """

    label: str
    lists: tuple[tuple[str, tuple[tuple[str, float], ...]], ...] = ()
    descriptions: tuple[Description, ...] = ()
    texts: tuple[Text, ...] = ()
    more: int = 0


@dataclass(frozen=True, eq=False)
class Nodes:
    """One row per node.

    Attributes:
        kind: uint8, `NEURON`, `EMBEDDING`, `LOGIT` or `ERROR` (what a replacement model fails to reconstruct).
        layer: int16; -1 for embeddings, `Payload.n_layers` for logits.
        position: int32, index into `Payload.tokens`.
        neuron: int32; the token id for embeddings and logits; may be -1 for errors.
        activation: float32, NaN where a node has none.
        attribution: float32, to the metric; NaN if unknown.
        explained: float32, share of the incoming weight that the kept edges hold; NaN if unknown.
        labels: token text of the embedding and logit nodes alone, in the order of their rows.
        influence: float32, NaN if unknown; nodes are sized by it where none has an attribution.
        names: what a row is called instead of its layer and neuron, where it is not a neuron of the model's MLPs or its
            file has a name for it. Such a row may stand where another does, and lead to one of its own layer.
        says: what the neuron of a row does, where that is known.
        experts: the expert and the number in it of a row's neuron, where it belongs to one.
        always_on: of rows whose neuron is strong on unrelated prompts too and does next to nothing there: the share of
            those prompts, its |attribution| and its exact effect there; None where nobody looked.
        side: of a comparison: 1 for a node of the first graph alone, 2 of the last, 3 of both, 4 of both with
            attributions of opposite signs. first, last: float32, its attribution in each, NaN where it is not there.
    """

    kind: np.ndarray
    layer: np.ndarray
    position: np.ndarray
    neuron: np.ndarray
    activation: np.ndarray
    attribution: np.ndarray
    explained: np.ndarray
    labels: list[str]
    influence: np.ndarray | None = None
    names: Mapping[int, str] = field(default_factory=dict)
    says: Mapping[int, Says] = field(default_factory=dict)
    experts: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    always_on: Mapping[int, tuple[float, float, float]] | None = None
    side: np.ndarray | None = None
    first: np.ndarray | None = None
    last: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Edges:
    """One row per edge.

    Attributes:
        source, target: int32, row numbers of `Nodes`; a source lies in a lower layer than its target.
        weight: float32, the direct attribution of source to target.
        share: float32, weight over the target's activation; NaN if unknown.
        attribution: float32, of the edge to the metric; NaN if unknown.
        side: int32, as of `Nodes`.
    """

    source: np.ndarray
    target: np.ndarray
    weight: np.ndarray
    share: np.ndarray
    attribution: np.ndarray
    side: np.ndarray | None = None


@dataclass(frozen=True)
class Held:
    """What an evaluation found at one size: the share of the behaviour that so many nodes hold, with its 95 % interval,
    and that of as many random nodes; None where a number is not known."""

    size: int
    faithfulness: float | None
    low: float | None = None
    high: float | None = None
    control: float | None = None


@dataclass(frozen=True)
class Facts:
    """What is known of the prompt and the graph as a whole, for the strip below the page's title.

    Attributes:
        predictions: the model's most likely next tokens and their probabilities. asked: what was asked about and how
            likely the model finds it, in words. metric: its name, value and unit, in words.
        conservation: in words; holds: whether it does, None where that says nothing.
        evaluation: how this graph was tested, by rising size; tested: on what, in words.
        report: name of the report that lies beside the page.
    """

    predictions: tuple[tuple[str, float], ...] = ()
    asked: tuple[str, ...] = ()
    metric: str = ""
    conservation: str = ""
    holds: bool | None = None
    evaluation: tuple[Held, ...] = ()
    tested: str = ""
    report: str | None = None


NO_FACTS = Facts()


@dataclass(frozen=True, eq=False)
class Payload:
    """Everything one page shows.

    Attributes:
        title: of the page, for example the prompt.
        model, method, metric_text: one short line each, shown under the title.
        settings: shown in the page's "About"; keys and values go through `str`.
        tokens: of the prompt, by position.
        n_layers: of the model.
        metric: of the prompt; shares of nodes are shares of it; NaN for none. cancels: it is near 0 beside its parts,
            and shares of it are not shown. flows: attributions are distance times gradient and edges parts of them, so
            that what paths carry follows from them (subgraph-flow.js).
        groups: rows of `nodes` by name, the groups the page starts with. A node in two is kept in the first, a group
            left without nodes goes, and a name is cut or numbered until the page's own rules for names hold.
        pins: rows that are pinned at the start.
        called, remarks: what a reader calls nodes and wrote about them, by row.
        circuit: fingerprint that a groups file of this page names, and must have where it names one.
        facts: about the whole, for the strip below the title.
        sides: names of the two graphs that are compared, where that is so: nodes and edges have a `side`.
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
    groups: Mapping[str, Sequence[int]] = field(default_factory=dict)
    cancels: bool = False
    flows: bool = False
    circuit: str | None = None
    sides: tuple[str, str] | None = None
    pins: Sequence[int] = ()
    called: Mapping[int, str] = field(default_factory=dict)
    remarks: Mapping[int, str] = field(default_factory=dict)
    facts: Facts = NO_FACTS


def page(payload: Payload, served: str | None = None) -> str:
    """The page as text, to be written as UTF-8.

    Args:
        served: the version of the notes' file, of a page that `reports.served` serves: it may connect there and saves
            there. A page that is opened from a file connects to nothing.

    Raises:
        ValueError: columns of different lengths, or a value out of range.
    """
    _check_nodes(payload)
    _check_edges(payload)
    _check_groups(payload)
    header, block = _pack(payload)
    header["served"] = served
    parts = {
        "title": _as_text(payload.title),
        "style": _static("page.css"),
        "guard": _static("guard.js"),
        "served": "" if served is None else _static("served.js"),
        "script": _static("page.js"),
        "header": _as_json(header),
        "block": block,
    }
    own = [parts[name] for name in ("guard", "served", "script") if parts[name]]
    parts["policy"] = _policy(own, parts["style"], connects=served is not None)
    parts["served"] = parts["served"] and f"<script>{parts['served']}</script>\n"
    # One pass, so that nothing inside a part is taken for a place to fill.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _static("page.html"))


def _check_nodes(payload: Payload) -> None:
    nodes, n_tokens, top = payload.nodes, len(payload.tokens), payload.n_layers
    n = _check_lengths("nodes", nodes, NODE_TYPES)
    kind, layer = nodes.kind, nodes.layer
    _need(top > 0, f"n_layers is {top}")
    _need(n_tokens > 0, "there are no tokens")
    _need(not math.isinf(payload.metric), f"metric is {payload.metric}")
    _need(bool(np.isin(kind, (NEURON, EMBEDDING, LOGIT, ERROR)).all()), "kind holds other values than 0 to 3")
    _need(bool((layer[kind == EMBEDDING] == -1).all()), "an embedding's layer is not -1")
    _need(bool((layer[kind == LOGIT] == top).all()), f"a logit's layer is not {top}")
    inner = layer[(kind == NEURON) | (kind == ERROR)]
    _need(bool(((inner >= 0) & (inner < top)).all()), f"a neuron's layer is outside 0..{top - 1}")
    inside = (nodes.position >= 0) & (nodes.position < n_tokens)
    _need(bool(inside.all()), f"a position is outside 0..{n_tokens - 1}")
    lowest = np.where(kind == NEURON, 0, np.iinfo(np.int32).min)
    _need(bool((nodes.neuron >= lowest).all()), "a neuron or token id is negative")
    _need((nodes.side is None) == (payload.sides is None), "nodes have sides and the page none, or the other way")
    for name in ("activation", "attribution", "explained", "influence", "first", "last"):
        values = getattr(nodes, name)
        _need(values is None or not bool(np.isinf(values).any()), f"a node's {name} is infinite")
    named = int(np.isin(kind, (EMBEDDING, LOGIT)).sum())
    _need(len(nodes.labels) == named, f"{len(nodes.labels)} labels for {named} embedding and logit nodes")
    rows = (*nodes.names, *nodes.says, *nodes.experts, *(nodes.always_on or ()))
    _need(all(0 <= row < n for row in rows), f"a name's node is outside 0..{n - 1}")
    _need(all(kind[row] == NEURON for row in nodes.experts), "a node of an expert is not a neuron")
    _need(all(min(one) >= 0 for one in nodes.experts.values()), "an expert, or a number in one, is negative")
    _check_says(nodes)
    own = [row for row in range(n) if row not in nodes.names]
    keys = np.stack([np.asarray(column, np.int64) for column in (layer, nodes.position, nodes.neuron)], axis=1)[own]
    _need(len(np.unique(keys, axis=0)) == len(own), "two nodes have the same layer, position and neuron")


def _check_says(nodes: Nodes) -> None:
    every = set(nodes.says.values())
    values = [value for said in every for _, tokens in said.lists for _, value in tokens]
    _need(all(map(math.isfinite, values)), "a token's number is not finite")
    texts = [text for said in every for text in said.texts]
    _need(
        all(len(text.tokens) == len(text.values) for text in texts), "a text has another number of values than tokens"
    )
    values = [value for text in texts for value in (text.value, *text.values)]
    _need(all(map(math.isfinite, values)), "a text's value is not finite")
    scores = [one.score for said in every for one in said.descriptions if one.score is not None]
    known = [value for evidence in (nodes.always_on or {}).values() for value in evidence]
    _need(all(map(math.isfinite, (*scores, *known))), "a score, or a number of an always-on neuron, is not finite")


def _check_edges(payload: Payload) -> None:
    edges, nodes = payload.edges, payload.nodes
    n_nodes = len(nodes.kind)
    _check_lengths("edges", edges, EDGE_TYPES)
    for name in ("source", "target"):
        ends = getattr(edges, name)
        _need(bool(((ends >= 0) & (ends < n_nodes)).all()), f"an edge's {name} is outside 0..{n_nodes - 1}")
    named = np.isin(edges.source, list(nodes.names))
    rises = nodes.layer[edges.source].astype(np.int32) < nodes.layer[edges.target].astype(np.int32) + named
    _need(bool(rises.all()), "an edge's source does not lie below its target")
    _need(bool(np.isfinite(edges.weight).all()), "an edge's weight is not finite")
    for name in ("share", "attribution"):
        _need(not bool(np.isinf(getattr(edges, name)).any()), f"an edge's {name} is infinite")


def _check_groups(payload: Payload) -> None:
    n_nodes = len(payload.nodes.kind)
    inside = all(0 <= row < n_nodes for rows in payload.groups.values() for row in rows)
    _need(inside, f"a group's node is outside 0..{n_nodes - 1}")
    marked = (*payload.pins, *payload.called, *payload.remarks)
    _need(all(0 <= row < n_nodes for row in marked), f"a pinned or named node is outside 0..{n_nodes - 1}")


def _check_lengths(name: str, table: Nodes | Edges, types: dict[str, str]) -> int:
    columns = {one.name: getattr(table, one.name) for one in fields(table) if one.name in types}
    columns = {column: values for column, values in columns.items() if values is not None}
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
    columns, content = _columns(payload)
    says = {said: at for at, said in enumerate(dict.fromkeys(payload.nodes.says.values()))}
    always_on = payload.nodes.always_on
    header = {
        "title": payload.title,
        "model": payload.model,
        "method": payload.method,
        "metricText": payload.metric_text,
        "settings": [[str(key), _in_words(value)] for key, value in payload.settings.items()],
        "tokens": payload.tokens,
        "labels": payload.nodes.labels,
        "names": sorted(payload.nodes.names.items()),
        "says": [_said(said) for said in says],
        "saysOf": sorted((row, says[said]) for row, said in payload.nodes.says.items()),
        "alwaysOn": None if always_on is None else [[row, *evidence] for row, evidence in sorted(always_on.items())],
        "experts": [[row, *one] for row, one in sorted(payload.nodes.experts.items())],
        "layers": payload.n_layers,
        "metric": None if math.isnan(payload.metric) else payload.metric,
        "cancels": payload.cancels,
        "flows": payload.flows,
        "groups": _disjoint(payload.groups),
        "circuit": payload.circuit,
        "sides": payload.sides,
        "pins": [int(row) for row in dict.fromkeys(payload.pins)],
        "called": sorted(payload.called.items()),
        "remarks": sorted(payload.remarks.items()),
        "facts": _facts(payload.facts),
        "columns": columns,
    }
    header["key"] = payload.circuit or hashlib.sha256(content + _as_json(payload.tokens).encode()).hexdigest()
    return header, base64.b64encode(content).decode("ascii")


def _columns(payload: Payload) -> tuple[dict[str, dict[str, list[Any]]], bytes]:
    """Where each column lies, and all of them end to end."""
    blobs: list[bytes] = []
    columns: dict[str, dict[str, list[Any]]] = {"nodes": {}, "edges": {}}
    offset = 0
    tables = (("edges", payload.edges, EDGE_TYPES), ("nodes", payload.nodes, NODE_TYPES))
    for name, table, types in tables:
        for column, code in types.items():
            if getattr(table, column) is None:
                continue
            values = _fitted(name, column, getattr(table, column), code)
            blobs.append(values.tobytes())
            columns[name][column] = [code[1:], offset, len(values)]
            offset += values.nbytes
    return columns, b"".join(blobs)


def _facts(facts: Facts) -> dict[str, Any]:
    """The facts as the page reads them; what is no finite number is None."""

    def finite(value: float | None) -> float | None:
        return float(value) if value is not None and math.isfinite(value) else None

    held = [
        [int(one.size), *map(finite, (one.faithfulness, one.low, one.high, one.control))] for one in facts.evaluation
    ]
    likely = [[token, finite(chance)] for token, chance in facts.predictions]
    texts = {name: getattr(facts, name) for name in ("asked", "metric", "conservation", "holds", "tested", "report")}
    return {"predictions": likely, "evaluation": held, **texts}


def _in_words(value: Any) -> str:
    """A setting in words, and not as Python writes it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_in_words(one)}" for key, one in value.items()) or "none"
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, str | bytes):
        return ", ".join(map(_in_words, value)) or "none"
    return str(value)


def _said(said: Says) -> dict[str, Any]:
    """What a neuron does, once for all its nodes: texts as long as the page shows, their numbers to three digits."""
    return {
        "label": said.label,
        "lists": said.lists,
        "descriptions": [[_cut(one.text, LONGEST_TEXT), one.score, one.source] for one in said.descriptions],
        "texts": [
            [
                *(text.kind, text.document, _rounded(text.value)),
                [_cut(token, LONGEST_TOKEN) for token in text.tokens],
                [_rounded(value) for value in text.values],
            ]
            for text in said.texts
        ],
        "more": said.more,
    }


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def _disjoint(groups: Mapping[str, Sequence[int]]) -> list[tuple[str, list[int]]]:
    """Groups as the page holds them: no node twice, none empty, names that its own file reader takes."""
    taken: set[int] = set()
    found: dict[str, list[int]] = {}
    for name, rows in groups.items():
        own = [int(row) for row in dict.fromkeys(rows) if row not in taken]
        taken.update(own)
        if own:
            found[_free_name(name, found)] = own
    return list(found.items())


def _free_name(name: str, taken: Mapping[str, Any]) -> str:
    blank = not name.replace("\ufeff", "").strip()
    wanted = shown = "group" if blank else _cut(name, LONGEST_NAME)
    number = 2
    while shown in taken:
        ending = f" {number}"
        shown, number = _cut(wanted, LONGEST_NAME - len(ending)) + ending, number + 1
    return shown


def _cut(name: str, most: int) -> str:
    units = name.encode("utf-16-le", "surrogatepass")
    return name if len(units) <= 2 * most else units[: 2 * most - 2].decode("utf-16-le", "ignore") + "\u2026"


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
    """`value` as HTML text in ASCII; control characters become spaces, those that turn text around their code."""
    plain = "".join(" " if ord(sign) < 32 or 127 <= ord(sign) < 160 else sign for sign in value)
    plain = re.sub("[\u202a-\u202e\u2066-\u2069]", lambda found: f"<{ord(found[0]):x}>", plain)
    return html.escape(plain).encode("ascii", "xmlcharrefreplace").decode("ascii")


def _policy(scripts: Sequence[str], style: str, connects: bool) -> str:
    """No script, style or picture but the page's own; it connects to nothing, or to the server that it came from."""
    hashes = " ".join(_hash(script) for script in scripts)
    reached = "'self'" if connects else "'none'"
    return (
        f"default-src 'none'; script-src {hashes}; style-src {_hash(style)}; img-src data: blob:; "
        f"connect-src {reached}; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii") + "'"


def _static(path: str) -> str:
    return resources.files(__name__).joinpath(*path.split("/")).read_text(encoding="utf-8")
