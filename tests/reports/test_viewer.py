"""The page as text: what is embedded, what is escaped, what is refused, and that it asks no network for anything."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import refused
from tracer import JobError
from tracer.circuit.circuit import Graph, edges_table, nodes_table
from tracer.reports import tables as report
from tracer.reports import viewer
from tracer.store.schemas import NODES

FOLDER = Path(viewer.__file__).parent
ARRAYS = {"i4": "<i4", "f4": "<f4", "i2": "<i2", "u1": "|u1"}
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


class _Reader(HTMLParser):
    """What a browser would see: tags with their attributes, and the text of scripts, styles and the title."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.texts.append("")
        self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.texts[-1] += data

    def all(self, name: str) -> list[tuple[dict[str, str | None], str]]:
        found = zip(self.tags, self.texts, strict=True)
        return [(attributes, text) for (tag, attributes), text in found if tag == name]


def read(text: str) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
    """The header and the columns of a page."""
    scripts = {attributes.get("id"): body for attributes, body in _Reader(text).all("script")}
    header, block = json.loads(scripts["header"]), base64.b64decode(scripts["block"])
    tables = {
        table: {
            name: np.frombuffer(block, ARRAYS[code], length, offset) for name, (code, offset, length) in columns.items()
        }
        for table, columns in header["columns"].items()
    }
    return header, tables


def changed(made: viewer.Payload, table: str, **columns: Any) -> viewer.Payload:
    return dataclasses.replace(made, **{table: dataclasses.replace(getattr(made, table), **columns)})


def test_columns_and_strings_come_back_as_they_went_in() -> None:
    made = payload(60, 200)
    header, tables = read(viewer.page(made))
    for table, columns in tables.items():
        for name, values in columns.items():
            np.testing.assert_array_equal(values, getattr(getattr(made, table), name), err_msg=f"{table}.{name}")
    assert header["tokens"] == made.tokens
    assert header["labels"] == made.nodes.labels
    assert (header["title"], header["layers"], header["metric"]) == ("The keys", 6, 3.5)
    assert header["settings"] == [["rules", "['half']"], ["keep", "100"]]


def test_a_foreign_graph_comes_back_as_it_went_in() -> None:
    made = foreign()
    header, tables = read(viewer.page(made))
    for table, columns in tables.items():
        for name, values in columns.items():
            np.testing.assert_array_equal(values, getattr(getattr(made, table), name), err_msg=f"{table}.{name}")
    assert header["metric"] is None
    _, tables = read(viewer.page(changed(made, "nodes", influence=None)))
    assert "influence" not in tables["nodes"]


def test_a_node_is_in_one_group_and_names_are_those_the_page_can_load() -> None:
    made = payload(60, 0)
    long = "\U0001f408" * 40
    groups = {"a": [3, 4, 3], "b": [4, 5], "none": [4], " \n": [6], "group": [7], long: [8], f"{long}!": [9]}
    header, _ = read(viewer.page(dataclasses.replace(made, groups=groups)))
    names, rows = zip(*header["groups"], strict=True)
    assert rows == ([3, 4], [5], [6], [7], [8], [9])
    assert names[:4] == ("a", "b", "group", "group 2")
    assert len(set(names)) == len(names)
    assert all(0 < len(name.encode("utf-16-le")) <= 2 * viewer.LONGEST_NAME for name in names)
    script = (FOLDER / "groups.js").read_text()
    assert f"LONGEST_NAME = {viewer.LONGEST_NAME};" in script
    for row in (-1, 71):
        with pytest.raises(ValueError, match="a group's node is outside"):
            viewer.page(dataclasses.replace(made, groups={"a": [row]}))


def test_the_title_cannot_turn_text_around() -> None:
    text = viewer.page(dataclasses.replace(payload(5, 5), title="a\u202eb\u2066c\u2069"))
    ((_, title),) = _Reader(text).all("title")
    assert title == "a<202e>b<2066>c<2069> - tracer"


def test_an_imported_graph_keeps_its_errors_groups_and_unknowns() -> None:
    names = ("kind", "layer", "position", "neuron", "token", "activation", "attribution", "explained", "influence")
    rows = [
        ("neuron", 0, 1, 5, " b", 1.0, None, None, 0.5),
        ("error", 0, 0, -1, "a", None, None, None, 0.25),
        ("error", 0, 1, -1, " b", None, None, None, None),
        ("embedding", -1, 0, 7, "a", None, None, None, None),
        ("logit", 1, 1, 9, " c", None, None, None, None),
    ]
    links = {"source": [0, 1], "target": [4, 4], "weight": [1.0, -2.0], "share": [None] * 2, "attribution": [None] * 2}
    columns: dict[str, Any] = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    graph = Graph(
        nodes=nodes_table(dict.fromkeys(NODES.names[2:], [None] * len(rows)) | columns),
        links=edges_table(links),
        text="a b",
        tokens=("a", " b"),
        n_layers=1,
        groups={"both": (0, 1)},
    )
    made = report.payload(graph)
    header, tables = read(viewer.page(made))
    assert tables["nodes"]["kind"].tolist() == [
        viewer.NEURON,
        viewer.ERROR,
        viewer.ERROR,
        viewer.EMBEDDING,
        viewer.LOGIT,
    ]
    assert np.isnan(tables["nodes"]["attribution"]).all()
    np.testing.assert_array_equal(tables["nodes"]["influence"], np.array([0.5, 0.25, *[np.nan] * 3], np.float32))
    assert (header["labels"], header["metric"], header["groups"]) == (["a", " c"], None, [["both", [0, 1]]])


def test_every_column_starts_at_a_multiple_of_its_item_size() -> None:
    header, _ = read(viewer.page(payload(13, 7)))
    for columns in header["columns"].values():
        for code, offset, _ in columns.values():
            assert offset % int(code[1]) == 0


def test_an_empty_circuit_makes_a_page() -> None:
    made = payload(3, 0)
    fields = {field.name: getattr(made.nodes, field.name) for field in dataclasses.fields(made.nodes)}
    none = {name: value[:0] for name, value in fields.items() if isinstance(value, np.ndarray | list)}
    _, tables = read(viewer.page(changed(made, "nodes", **none)))
    assert len(tables["nodes"]["kind"]) == len(tables["edges"]["source"]) == 0


def test_what_neurons_say_comes_back_and_its_rows_and_numbers_are_checked() -> None:
    made = payload(3, 0)
    row = int(np.flatnonzero(made.nodes.kind == viewer.NEURON)[1])
    said = {row: viewer.Says("Texas", (("promotes", ((" Texas", 0.5),)),))}
    header, _ = read(viewer.page(changed(made, "nodes", says=said)))
    assert header["says"] == [[row, "Texas", [["promotes", [[" Texas", 0.5]]]]]]
    with pytest.raises(ValueError, match="a name's node is outside"):
        viewer.page(changed(made, "nodes", says={10**6: viewer.Says("x")}))
    with pytest.raises(ValueError, match="a token's number is not finite"):
        viewer.page(changed(made, "nodes", says={row: viewer.Says("x", (("y", (("z", float("nan")),)),))}))


@pytest.mark.parametrize("token", MALICIOUS)
def test_text_cannot_leave_its_place(token: str) -> None:
    plain = _Reader(viewer.page(payload(5, 5)))
    made = payload(5, 5, tokens=["a", token])
    made = dataclasses.replace(made, title=token, model=token, settings={token: token})
    text = viewer.page(made)
    assert [tag for tag, _ in _Reader(text).tags] == [tag for tag, _ in plain.tags]
    header, _ = read(text)
    assert header["tokens"] == ["a", token]
    assert header["labels"][1] == header["title"] == header["model"] == token
    text.encode("utf-8")


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet=st.characters(), max_size=30))
def test_any_token_comes_back(token: str) -> None:
    header = viewer._as_json({"token": token})
    assert json.loads(header) == {"token": token}
    assert not re.search(r"[<>&]|[^\x20-\x7e]", header)


def test_an_edge_takes_less_than_30_bytes() -> None:
    few, many = (len(viewer.page(payload(3000, n))) for n in (0, 50_000))
    assert (many - few) / 50_000 < 30


def test_the_page_without_data_is_small() -> None:
    assert len(viewer.page(payload(1, 0)).encode()) < 200_000


@pytest.mark.parametrize(
    ("table", "column", "value", "message"),
    [
        ("nodes", "kind", 4, "other values"),
        ("nodes", "layer", 6, "a neuron's layer"),
        ("nodes", "layer", -1, "a neuron's layer"),
        ("nodes", "position", 9, "a position is outside"),
        ("nodes", "neuron", -1, "negative"),
        ("nodes", "attribution", np.inf, "attribution is infinite"),
        ("nodes", "influence", -np.inf, "influence is infinite"),
        ("nodes", "activation", np.inf, "activation is infinite"),
        ("nodes", "explained", np.inf, "explained is infinite"),
        ("edges", "source", 71, "source is outside"),
        ("edges", "target", -1, "target is outside"),
        ("edges", "target", 0, "does not lie below"),
        ("edges", "weight", np.nan, "weight is not finite"),
        ("edges", "share", -np.inf, "share is infinite"),
        ("edges", "attribution", np.inf, "attribution is infinite"),
    ],
)
def test_a_value_out_of_range_is_refused(table: str, column: str, value: float, message: str) -> None:
    made = payload(60, 200)
    values = getattr(getattr(made, table), column).copy()
    row = 20 if table == "nodes" else 0
    values = values.astype(np.int64) if values.dtype.kind in "iu" else values
    values[row] = value
    with pytest.raises(ValueError, match=message):
        viewer.page(changed(made, table, **{column: values}))


def test_wrong_kinds_of_columns_are_refused() -> None:
    made = payload(60, 200)
    nodes, edges = made.nodes, made.edges
    cases = [
        (changed(made, "nodes", layer=nodes.layer[1:]), "differ in shape"),
        (changed(made, "edges", weight=edges.weight[:, None]), "differ in shape"),
        (changed(made, "nodes", kind=nodes.kind.astype(np.float32)), "has dtype float32"),
        (changed(made, "edges", share=edges.share.astype(np.int32)), "has dtype int32"),
        (changed(made, "nodes", labels=nodes.labels[1:]), "labels for 11"),
        (changed(made, "nodes", neuron=nodes.neuron.astype(np.int64) + 2**40), "does not fit"),
        (changed(made, "nodes", layer=np.where(nodes.kind == 2, 5, nodes.layer)), "a logit's layer"),
        (changed(made, "nodes", layer=np.where(nodes.kind == 1, 0, nodes.layer)), "an embedding's layer"),
        (dataclasses.replace(made, metric=float("inf")), "metric is inf"),
        (dataclasses.replace(made, tokens=[]), "no tokens"),
        (dataclasses.replace(made, n_layers=0), "n_layers is 0"),
    ]
    for broken, message in cases:
        with pytest.raises(ValueError, match=message):
            viewer.page(broken)


def test_two_nodes_of_one_name_are_refused() -> None:
    made = payload(60, 0)
    twice = {}
    for column in ("layer", "position", "neuron"):
        values = getattr(made.nodes, column).copy()
        values[20] = values[21]
        twice[column] = values
    with pytest.raises(ValueError, match="same layer, position and neuron"):
        viewer.page(changed(made, "nodes", **twice))


def test_the_policy_lets_only_our_own_scripts_and_style_run() -> None:
    seen = _Reader(viewer.page(payload(5, 5)))
    policies = [a["content"] for a, _ in seen.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    (policy,) = policies
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert "unsafe" not in policy
    running = [text for attributes, text in seen.all("script") if attributes.get("type") in (None, "module")]
    assert rules["script-src"].split() == [_hash(text) for text in running]
    assert rules["style-src"].split() == [_hash(text) for _, text in seen.all("style")]


def _hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


def test_nothing_is_fetched() -> None:
    text = viewer.page(payload(5, 5))
    spaces = r"http://www\.w3\.org/(2000/svg|1999/xhtml|1999/xlink|XML/1998/namespace|2000/xmlns/)"
    homes = r"https://d3js\.org/d3-\w+/"
    for found in re.findall(r"https?://[^\s\"'`<>)]*", text):
        assert re.fullmatch(f"{spaces}|{homes}", found), found
    assert not re.search(r"fetch\(|XMLHttpRequest|WebSocket|sendBeacon|import\(|@import|\burl\(['\"]?(?!#)", text)
    for tag, attributes in _Reader(text).tags:
        assert "src" not in attributes
        assert tag != "link" or attributes["href"] == "data:,"


def test_vendored_files_are_those_of_the_list() -> None:
    folder = FOLDER / "vendor"
    listed = (folder / "VENDOR.md").read_text()
    rows = re.findall(r"^\| (\S+\.js) \| [\d.]+ \| [\w-]+ \| ([0-9a-f]{64}) \|$", listed, re.M)
    assert {name for name, _ in rows} == {path.name for path in folder.glob("*.js")}
    for name, digest in rows:
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name
    assert (folder / "LICENSE").read_text() in viewer.page(payload(1, 0))


def test_our_scripts_are_joined_whole() -> None:
    assert {"guard", *viewer.SCRIPTS} == {path.stem for path in FOLDER.glob("*.js")}
    joined = viewer._joined()
    assert not re.search(r"^(import|export)\b", joined, re.M)
    assert "</script" not in joined.lower()
    for name in viewer.SCRIPTS:
        head = (FOLDER / f"{name}.js").read_text().split("\n\n")[0]
        assert "Knows" in head, name
        assert "efuses to know" in head or "Knows no" in head, name
    names = re.findall(r"^(?:const|let|function|class) (\w+)", joined, re.M)
    assert len(names) == len(set(names)), "two scripts give one name in the scope they share"


def test_the_page_and_its_writer_have_one_limit_of_edges() -> None:
    found = re.search(r"const MOST_EDGES = 2 \*\* (\d+);", (FOLDER / "data.js").read_text(encoding="utf-8"))
    assert found is not None
    assert 2 ** int(found[1]) == viewer.MOST_EDGES


@pytest.mark.parametrize(("limit", "what"), [("MOST_EDGES", "edges"), ("MOST_NODES", "nodes")])
def test_what_the_page_cannot_draw_is_refused_before_it_is_written(
    limit: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = {
        "kind": ["embedding", "logit"],
        "layer": [-1, 1],
        "position": [0, 0],
        "neuron": [3, 4],
        "token": ["a", "b"],
    }
    numbers = {key: [1.0, 1.0] for key in set(NODES.names) - {*columns, "prompt_id", "node_id"}}
    links = {"source": [0], "target": [1], "weight": [1.0], "share": [1.0], "attribution": [1.0]}
    graph = Graph(
        nodes=nodes_table({**columns, **numbers}), links=edges_table(links), text="a", tokens=("a",), n_layers=1
    )
    assert report.view(graph, tmp_path / "page.html").exists()
    monkeypatch.setattr(viewer, limit, {"edges": 0, "nodes": 1}[what])
    with refused(JobError, f"{what}, the page draws at most"):
        report.view(graph, tmp_path / "more.html")
    assert not (tmp_path / "more.html").exists()
