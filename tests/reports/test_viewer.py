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
from payloads import MALICIOUS, changed, foreign, payload
from tracer import JobError
from tracer.circuit.circuit import Graph, edges_table, nodes_table
from tracer.reports import tables as report
from tracer.reports import viewer
from tracer.store.schemas import NODES

FOLDER = Path(viewer.__file__).parent
SOURCES = Path(__file__).parents[2] / "web" / "src"
ARRAYS = {"i4": "<i4", "f4": "<f4", "i2": "<i2", "u1": "|u1"}


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


def test_columns_and_strings_come_back_as_they_went_in() -> None:
    made = payload(60, 200)
    header, tables = read(viewer.page(made))
    for table, columns in tables.items():
        for name, values in columns.items():
            np.testing.assert_array_equal(values, getattr(getattr(made, table), name), err_msg=f"{table}.{name}")
    assert header["tokens"] == made.tokens
    assert header["labels"] == made.nodes.labels
    assert (header["title"], header["layers"], header["metric"]) == ("The keys", 6, 3.5)
    assert header["settings"] == [["rules", "half"], ["keep", "100"]]


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
    script = (SOURCES / "groups.js").read_text()
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
    assert header["saysOf"] == [[row, 0]]
    assert header["says"] == [
        {"label": "Texas", "lists": [["promotes", [[" Texas", 0.5]]]], "descriptions": [], "texts": [], "more": 0}
    ]
    assert header["alwaysOn"] is None
    with pytest.raises(ValueError, match="a name's node is outside"):
        viewer.page(changed(made, "nodes", says={10**6: viewer.Says("x")}))
    with pytest.raises(ValueError, match="a token's number is not finite"):
        viewer.page(changed(made, "nodes", says={row: viewer.Says("x", (("y", (("z", float("nan")),)),))}))


def test_texts_and_evidence_come_back_once_and_are_checked() -> None:
    made = payload(5, 0)
    rows = np.flatnonzero(made.nodes.kind == viewer.NEURON)[:3].tolist()
    text = viewer.Text("q90", 4, 1.23456, ("x" * 500, " b"), (0.0, 1.23456))
    said = viewer.Says("a", (), (viewer.Description("y" * 5000, 0.5, "me"),), (text,), 7)
    known = {rows[0]: said, rows[2]: dataclasses.replace(said), rows[1]: viewer.Says("b")}
    header, _ = read(viewer.page(changed(made, "nodes", says=known, always_on={rows[1]: (0.9, 2.0, 0.1)})))
    at = dict(header["saysOf"])
    assert at[rows[0]] == at[rows[2]] != at[rows[1]]
    assert len(header["says"]) == 2
    found = header["says"][at[rows[0]]]
    kind, document, value, tokens, values = found["texts"][0]
    assert (kind, document, value, values, found["more"]) == ("q90", 4, 1.23, [0.0, 1.23], 7)
    assert [len(token) for token in tokens] == [viewer.LONGEST_TOKEN, 2]
    assert len(found["descriptions"][0][0]) == viewer.LONGEST_TEXT
    assert header["alwaysOn"] == [[rows[1], 0.9, 2.0, 0.1]]
    for wrong, rule in (
        (text._replace(values=(1.0,)), "another number of values"),
        (text._replace(value=float("inf")), "a text's value is not finite"),
    ):
        with pytest.raises(ValueError, match=rule):
            viewer.page(changed(made, "nodes", says={rows[0]: viewer.Says("a", texts=(wrong,))}))
    with pytest.raises(ValueError, match="a number of an always-on neuron"):
        viewer.page(changed(made, "nodes", always_on={rows[0]: (float("nan"), 0.0, 0.0)}))
    with pytest.raises(ValueError, match="a name's node is outside"):
        viewer.page(changed(made, "nodes", always_on={10**6: (0.0, 0.0, 0.0)}))


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
    assert len(viewer.page(payload(1, 0)).encode()) < 280_000


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
    assert rules["connect-src"] == "'none'"
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


def test_only_a_served_page_may_connect_and_only_to_its_server() -> None:
    text = viewer.page(payload(5, 5), served='"v"')
    scripts = [body for attributes, body in _Reader(text).all("script") if attributes.get("type") in (None, "module")]
    assert len(scripts) == 3
    assert [("fetch(" in body) for body in scripts] == [False, True, False]
    (policy,) = [a["content"] for a, _ in _Reader(text).all("meta") if a.get("http-equiv")]
    assert policy is not None
    assert "connect-src 'self';" in policy
    assert all(_hash(body) in policy for body in scripts)
    assert read(text)[0]["served"] == '"v"'
    assert read(viewer.page(payload(5, 5)))[0]["served"] is None


def test_marks_and_facts_come_back_and_are_checked() -> None:
    made = payload(5, 5)
    facts = viewer.Facts(predictions=((" a", float("nan")),), evaluation=(viewer.Held(3, 0.5, None, float("inf")),))
    marked = dataclasses.replace(made, pins=[3, 3], called={4: "</script>"}, remarks={2: "b"}, facts=facts)
    header, _ = read(viewer.page(marked))
    assert (header["pins"], header["called"], header["remarks"]) == ([3], [[4, "</script>"]], [[2, "b"]])
    assert header["facts"]["predictions"] == [[" a", None]]
    assert header["facts"]["evaluation"] == [[3, 0.5, None, None, None]]
    for wrong in ({"pins": [99]}, {"called": {-1: "x"}}, {"remarks": {99: "x"}}):
        with pytest.raises(ValueError, match="a pinned or named node"):
            viewer.page(dataclasses.replace(made, **wrong))


def test_every_script_says_what_it_knows_and_what_not() -> None:
    for path in SOURCES.glob("*.js"):
        head = path.read_text(encoding="utf-8").split("\n\n")[0]
        assert "Knows" in head, path.name
        assert "efuses to know" in head or "Knows no" in head, path.name


def test_what_ships_is_plain_and_carries_its_licences() -> None:
    locked = json.loads((SOURCES.parent / "package.json").read_text())["dependencies"]
    for name in ("guard.js", "page.js"):
        text = (FOLDER / name).read_text(encoding="ascii")
        assert "</script" not in text.lower()
    for name, version in locked.items():
        assert f"\n{name} {version}\n" in text, "its licence stands in front"


def test_the_page_and_its_writer_have_one_limit_of_edges() -> None:
    found = re.search(r"const MOST_EDGES = 2 \*\* (\d+);", (SOURCES / "data.js").read_text(encoding="utf-8"))
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
