"""The subgraph pane in a real Chromium: its sums, layout, keys, files and the share of the metric, checked in NumPy."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import browser
import tracer
from browser import SMALL, SVG, Page
from payloads import MALICIOUS, changed, foreign, payload
from tracer.reports import tables, viewer

pytestmark = browser.MARKS
Keys = pytest.importorskip("selenium.webdriver.common.keys", reason="selenium is not installed").Keys
Opens = Callable[[viewer.Payload], Page]
GROUPS = {"subject": (12, 16, 13), "verb": (30, 45, 56)}  # each with edges inside
PINNED = (22, 40)
GROUPED = dataclasses.replace(SMALL, groups=GROUPS)


def pinned(page: Page, made: viewer.Payload, rows: Any, groups: Any = GROUPS) -> Page:
    """The page with these rows pinned and groups made, by a groups file."""

    def node(row: int) -> dict[str, int]:
        return {name: int(getattr(made.nodes, name)[row]) for name in ("layer", "position", "neuron")}

    members = [{"name": name, "nodes": [node(row) for row in of]} for name, of in groups.items()]
    content = {"format": "tracer-supernodes", "version": 1, "groups": members, "pinned": [node(row) for row in rows]}
    path = page.downloads / "marked.json"
    path.write_text(json.dumps(content))
    page.find("#groups-file").send_keys(str(path))
    browser.wait_for(lambda: page.text("#message"))
    assert page.text("#message").startswith("Loaded"), page.text("#message")
    return page


def shown(page: Page) -> dict[str, Any]:
    """What the pane shows, after opening it."""
    opened(page)
    return page.js("return tracerPage.subgraph()")


def opened(page: Page) -> None:
    if not page.js("return tracerPage.state().subgraphOpen"):
        page.click("#subgraph-toggle")
    page.frames()
    page.frames()


def near(value: float) -> Any:
    """As equal as float32 columns allow."""
    return pytest.approx(value, rel=1e-4, abs=1e-4)


def sums(made: viewer.Payload, boxes: list[dict[str, Any]], measure: str) -> dict[tuple[int, int], tuple[float, int]]:
    """Sum and number of the edges between two boxes, from the table of edges alone."""
    of = {row: i for i, box in enumerate(boxes) for row in box["rows"]}
    found: dict[tuple[int, int], tuple[float, int]] = {}
    values = getattr(made.edges, measure).astype(np.float64)
    for source, target, value in zip(made.edges.source.tolist(), made.edges.target.tolist(), values, strict=True):
        if source in of and target in of:
            total, n = found.get((of[source], of[target]), (0.0, 0))
            found[of[source], of[target]] = total + value, n + 1
    return found


def measured(page: Page, measure: str) -> None:
    page.js(
        "const one = document.getElementById('measure'); one.value = arguments[0];"
        "one.dispatchEvent(new Event('change', { bubbles: true }))",
        measure,
    )


def test_links_are_the_sums_of_all_edges_between_members(open_page: Opens) -> None:
    page = pinned(open_page(GROUPED), GROUPED, PINNED)
    page.slide("edge-threshold", 900)  # filters of the picture are not those of the sums
    for asked, measure in (("attribution", "attribution"), ("weight", "weight"), ("share", "attribution")):
        measured(page, asked)
        found = shown(page)
        boxes = found["boxes"]
        assert [box["rows"] for box in boxes[:4]] == [[12, 16, 13], [30, 45, 56], [22], [40]]
        expected = sums(GROUPED, boxes, measure)
        between = {pair: one for pair, one in expected.items() if pair[0] != pair[1]}
        told = {(one["source"], one["target"]): (one["value"], one["edges"]) for one in found["links"]}
        assert found["measure"] == measure
        assert told.keys() == between.keys()
        for pair, (value, n) in told.items():
            assert value == pytest.approx(between[pair][0], rel=1e-9, abs=1e-12)
            assert n == between[pair][1]
        for i, own in enumerate(found["within"]):
            assert (own["value"], own["edges"]) == pytest.approx(expected.get((i, i), (0, 0)))
        sizes = [abs(one["value"]) for one in found["links"]]
        assert sizes == sorted(sizes, reverse=True)
        said = page.text("#subgraph-note")
        assert ("Shares have no sum" in said, "own units" in said) == (asked == "share", asked == "weight")
    held = sum(float(SMALL.nodes.attribution[row]) for row in GROUPS["subject"])
    assert boxes[0]["attribution"] == pytest.approx(held)


def test_numbers_in_the_diagram_and_its_tips_are_the_sums(open_page: Opens) -> None:
    page = pinned(open_page(GROUPED), GROUPED, PINNED)
    found = shown(page)
    drawn = page.js(
        "return [...document.querySelectorAll('#diagram-numbers text')].map((e) => [e.dataset.link, e.textContent])"
    )
    values = {f"{one['source']},{one['target']}": one["value"] for one in found["links"]}
    assert len(drawn) > 5
    for link, text in drawn:
        assert float(text.replace("\u2212", "-")) == pytest.approx(values[link], rel=0.006)
    page.js("[...document.querySelectorAll('#diagram-boxes .box')].find((e) => e.textContent.includes('verb')).focus()")
    tip = page.text("#subgraph-tip").replace("\u2212", "-")
    verb = [box["name"] for box in found["boxes"]].index("verb")
    first = next(one for one in found["links"] if one["target"] == verb)
    assert f"from {found['boxes'][first['source']]['name']}" in tip
    told = re.search(rf"from {re.escape(found['boxes'][first['source']]['name'])} (\S+) \((\d+) edge", tip)
    assert told
    assert float(told[1]) == pytest.approx(first["value"], rel=0.006)
    assert int(told[2]) == first["edges"]
    own = found["within"][verb]
    told = re.search(r"within the group: (\S+) over (\d+) edge", tip)
    assert told
    assert (float(told[1]), int(told[2])) == (pytest.approx(own["value"], rel=0.006), own["edges"])


def linear(seed: int, keep: float) -> tuple[viewer.Payload, Callable[[set[int]], float]]:
    """A linear network as a page, some of its edges dropped, and its metric with a set of neurons at zero."""
    rng = np.random.default_rng(seed)
    layer = np.array([-1, -1, -1, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    kind = np.array([1] * 3 + [0] * 8 + [2] * 2)
    n, ends = len(layer), np.array([1.0, -0.5])
    slopes = np.where(layer[:, None] < layer, rng.normal(size=(n, n)), 0)

    def values(ablated: set[int]) -> np.ndarray:
        found = np.where(kind == 1, [*start, *[0] * (n - 3)], 0.0)
        for at in range(3, n):
            found[at] = 0 if at in ablated else found @ slopes[:, at]
        return found

    start = rng.normal(1, 1, 3)
    value, gradient = values(set()), np.zeros(n)
    gradient[-2:] = ends
    for at in range(n - 3, -1, -1):
        gradient[at] = slopes[at] @ gradient
    source, target = np.nonzero(slopes)
    kept = rng.random(len(source)) < keep
    source, target = source[kept], target[kept]
    columns = {
        "weight": value[source] * slopes[source, target],
        "share": value[source] * slopes[source, target] / value[target],
        "attribution": value[source] * slopes[source, target] * gradient[target],
    }
    small = payload(8, 0, n_layers=4, tokens=["a", "b", "c"])
    made = changed(
        small,
        "nodes",
        kind=kind.astype(np.uint8),
        layer=layer.astype(np.int16),
        position=np.array([0, 1, 2, *[2] * 10], np.int32),
        neuron=np.arange(n, dtype=np.int32),
        activation=value.astype(np.float32),
        attribution=(value * gradient).astype(np.float32),
    )
    edges = {name: column.astype(np.float32) for name, column in columns.items()}
    made = dataclasses.replace(
        made,
        edges=viewer.Edges(source.astype(np.int32), target.astype(np.int32), **edges),
        metric=float(value[-2:] @ ends),
        flows=True,
    )
    return made, lambda ablated: float(values(ablated)[-2:] @ ends)


def routes(made: viewer.Payload, first: int) -> Iterator[list[int]]:
    """All paths of kept edges from a node to a logit, one by one."""
    onward: dict[int, list[int]] = {}
    for source, target in zip(made.edges.source.tolist(), made.edges.target.tolist(), strict=True):
        onward.setdefault(source, []).append(target)
    open_ends = [[first]]
    while open_ends:
        path = open_ends.pop()
        if made.nodes.kind[path[-1]] == viewer.LOGIT:
            yield path
        open_ends += [[*path, step] for step in onward.get(path[-1], [])]


def carried(made: viewer.Payload, path: list[int]) -> float:
    """What a path carries from its first node: the product of its shares times the logit's attribution, which it has
    of the whole value of the first; for one that is no embedding too."""
    share = {
        (int(source), int(target)): float(value)
        for source, target, value in zip(made.edges.source, made.edges.target, made.edges.share, strict=True)
    }
    steps = [share[pair] for pair in itertools.pairwise(path)]
    return float(np.prod(steps)) * float(made.nodes.attribution[path[-1]])


@pytest.mark.parametrize("keep", [1.0, 0.7], ids=["all edges", "some dropped"])
def test_what_the_pins_hold_is_what_a_linear_network_loses_without_them(keep: float, open_page: Opens) -> None:
    for seed, rows in ((1, {4, 6, 8}), (2, {3, 5, 7, 10}), (3, {9}), (4, {0, 3, 4, 11})):
        made, metric = linear(seed, keep)
        page = pinned(open_page(made), made, sorted(rows), {})
        flow = shown(page)["flow"]
        inner = {row for row in rows if made.nodes.kind[row] == viewer.NEURON}
        assert flow["n"] == len(inner)
        paths = [path for first in range(3) for path in routes(made, first)]
        through = sum(carried(made, path) for path in paths if inner & set(path))
        around = sum(carried(made, path) for path in paths if not inner & set(path))
        assert flow["through"] == near(through)
        assert flow["around"] == near(around)
        assert flow["tokens"] == near(made.metric)
        summed = sum(float(made.nodes.attribution[row]) for row in inner)
        # Of what leaves a member, what meets another on its way counts twice.
        twice = sum(carried(made, path) for row in inner for path in routes(made, row) if inner & set(path[1:]))
        assert flow["sum"] == near(summed)
        assert flow["together"] == near(summed - lost_twice(made, inner, twice))
        into = [
            float(value)
            for source, target, value in zip(made.edges.source, made.edges.target, made.edges.attribution, strict=True)
            if int(source) in inner and made.nodes.kind[target] == viewer.LOGIT
        ]
        assert flow["direct"] == near(sum(into))
        if keep == 1:
            fall = made.metric - metric(inner)
            assert flow["together"] == near(fall)
            assert flow["through"] == near(fall)


def lost_twice(made: viewer.Payload, inner: set[int], by_whole_paths: float) -> float:
    """What passes from a member by kept edges to the next member, with all of that one's attribution behind it."""
    found = 0.0
    share = {
        (int(source), int(target)): float(value)
        for source, target, value in zip(made.edges.source, made.edges.target, made.edges.share, strict=True)
    }
    for row in inner:
        open_ends = [(row, 1.0)]
        while open_ends:
            at, part = open_ends.pop()
            if at in inner and at != row:
                found += part * float(made.nodes.attribution[at])
                continue
            open_ends += [(target, part * one) for (source, target), one in share.items() if source == at]
    whole = len(made.edges.source) == int((made.nodes.layer[:, None] < made.nodes.layer).sum())
    assert not whole or found == pytest.approx(by_whole_paths, rel=1e-3, abs=1e-3)
    return found


def test_of_a_traced_circuit_the_parts_are_those_of_its_shares(open_page: Opens) -> None:
    model = tracer.load("demo")
    circuit = tracer.trace(model, tracer.Prompt("The secretaries near the car", " are", foil=" is"), nodes=30)
    made = tables.payload(circuit)
    assert made.flows
    rows = [0, 1, 2, 5, 8, 13]
    page = pinned(open_page(made), made, rows, {})
    flow = shown(page)["flow"]
    nodes, links = circuit.nodes.to_pydict(), circuit.edges.to_pydict()
    n = len(nodes["kind"])

    def reaches(banned: set[int]) -> float:
        """What kept paths that avoid a set carry, forward along shares."""
        held = np.array([1.0 if kind == "embedding" else 0.0 for kind in nodes["kind"]])
        order = sorted(range(n), key=lambda at: nodes["layer"][at])
        into: dict[int, list[tuple[int, float]]] = {}
        for source, target, share in zip(links["source"], links["target"], links["share"], strict=True):
            into.setdefault(target, []).append((source, share))
        for at in order:
            if nodes["kind"][at] != "embedding":
                held[at] = 0 if at in banned else sum(share * held[source] for source, share in into.get(at, []))
        return sum(held[at] * nodes["attribution"][at] for at in range(n) if nodes["kind"][at] == "logit")

    assert flow["around"] == pytest.approx(reaches(set(rows)), rel=1e-3)
    assert flow["through"] == pytest.approx(reaches(set()) - reaches(set(rows)), rel=1e-3)
    assert flow["tokens"] == pytest.approx(circuit.metric - circuit.unexplained, rel=1e-4)
    percent = float(f"{100 * flow['together'] / circuit.metric:.3g}")
    assert f"{percent:g} %" in page.text("#subgraph-share").replace("\u2212", "-")
    page.click("#subgraph-parts summary")
    told = page.js("return [...document.querySelectorAll('#subgraph-rows dd')].map((e) => e.textContent)")
    last = [0.0 if "\u2248" in text else float(text.split(" ")[0].replace("\u2212", "-")) for text in told[-4:]]
    assert sum(last) == pytest.approx(circuit.metric, abs=0.03)


def test_where_paths_cannot_be_summed_the_share_is_not_said(open_page: Opens) -> None:
    for made in (GROUPED, foreign()):
        page = open_page(made)
        assert shown(page)["flow"] is None
        assert "not known" in page.text("#subgraph-share")
        assert not page.find("#subgraph-parts").is_displayed()


def test_layers_rise_and_positions_run_to_the_right(open_page: Opens) -> None:
    made = GROUPED
    page = pinned(open_page(made), made, range(22, 58))
    boxes = shown(page)["boxes"]
    assert any(box["isAdded"] for box in boxes)
    for a, b in itertools.combinations(boxes, 2):
        if a["layer"] < b["layer"] and not (a["isGroup"] or b["isGroup"]):
            assert a["y"] > b["y"]
        if a["y"] == b["y"] and round(a["position"]) < round(b["position"]):
            assert a["x"] < b["x"]
        apart = abs(a["x"] - b["x"]) >= (a["width"] + b["width"]) / 2
        assert apart or abs(a["y"] - b["y"]) >= (a["height"] + b["height"]) / 2


def test_keys_open_move_choose_and_close(open_page: Opens) -> None:
    page = pinned(open_page(GROUPED), GROUPED, PINNED)
    page.js("document.getElementById('canvas').focus()")
    page.keys("s")
    page.frames()
    found = page.js("return tracerPage.subgraph()")
    order = sorted(found["boxes"], key=lambda box: (-box["y"], box["x"]))
    focused = "return document.activeElement.dataset.box"
    seen = [page.js(focused)]
    for _ in order[1:]:
        page.keys(Keys.TAB)
        seen.append(page.js(focused))
    assert seen == [box["key"] for box in order]
    at = next(i for i, box in enumerate(order) if box["key"] == "group verb")
    page.js("[...document.querySelectorAll('#diagram .box')].find((e) => e.dataset.box === 'group verb').focus()")
    page.keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_UP)
    moved = next(box for box in page.js("return tracerPage.subgraph().boxes") if box["key"] == "group verb")
    assert (moved["x"], moved["y"]) == pytest.approx((order[at]["x"] + 16, order[at]["y"] - 8), abs=1)
    assert page.js(focused) == "group verb"
    assert [key for key, _ in page.state()["subgraph"]] == ["group verb"]
    page.keys(Keys.ENTER)
    strongest = max(GROUPS["verb"], key=lambda row: abs(float(SMALL.nodes.attribution[row])))
    assert page.state()["selected"] == strongest
    assert page.js("return document.querySelector('#diagram .chosen').dataset.box") == "group verb"
    page.keys(Keys.ESCAPE)
    assert page.js("return document.activeElement.id") == "subgraph-layout"
    page.keys(Keys.ENTER)
    page.frames()
    assert page.state()["subgraph"] == []
    back = next(box for box in page.js("return tracerPage.subgraph().boxes") if box["key"] == "group verb")
    assert (back["x"], back["y"]) == (order[at]["x"], order[at]["y"])
    page.keys("s")
    assert not page.find("#subgraph").is_displayed()
    assert page.js("return document.activeElement.id") == "canvas"
    page.find("#search").send_keys("s")
    assert not page.find("#subgraph").is_displayed()


def test_boxes_are_dragged_and_links_follow(open_page: Opens) -> None:
    page = pinned(open_page(GROUPED), GROUPED, PINNED)
    before = {box["key"]: box for box in shown(page)["boxes"]}
    lines = "return [...document.querySelectorAll('#diagram-links path')].map((e) => e.getAttribute('d')).join()"
    drawn = page.js(lines)
    box = next(one for one in page.all("#diagram .box") if "subject" in one.text)
    page.moves().drag_and_drop_by_offset(box, 60, 25).perform()
    page.frames()
    after = {one["key"]: one for one in page.js("return tracerPage.subgraph().boxes")}
    scale = page.js("return document.getElementById('diagram-plane').getCTM().a")
    step = after["group subject"]["x"] - before["group subject"]["x"]
    assert step == pytest.approx(60 / scale, rel=0.05)
    assert {key for key in after if after[key]["x"] != before[key]["x"]} == {"group subject"}
    assert page.js(lines) != drawn
    assert page.state()["selected"] == -1  # a drag is no click
    assert [key for key, _ in page.state()["subgraph"]] == ["group subject"]
    name = next(one for one in page.all("#groups input") if one.get_attribute("value") == "subject")
    name.send_keys(Keys.CONTROL, "a", Keys.NULL, "noun", Keys.ENTER)
    page.frames()
    renamed = {one["key"]: one for one in page.js("return tracerPage.subgraph().boxes")}
    assert renamed["group noun"]["x"] == pytest.approx(after["group subject"]["x"], abs=1)  # it stays where it was put
    assert [key for key, _ in page.state()["subgraph"]] == ["group noun"]


def test_the_slider_hides_weak_links(open_page: Opens) -> None:
    page = pinned(open_page(GROUPED), GROUPED, PINNED)
    links = shown(page)["links"]
    for step in (0, 600, 900, 1000):
        page.slide("subgraph-threshold", step)
        found = page.js("return tracerPage.subgraph()")
        passing = [one for one in links if abs(one["value"]) >= found["threshold"]]
        assert found["drawn"] == passing
        assert f"{len(passing)} of {len(links)} links" in page.text("#subgraph-threshold-value")
        assert len(page.all("#diagram-links .link")) == len(passing)
    assert len(passing) == 1


def test_an_empty_pane_says_how_to_fill_it(small: Page) -> None:
    shown(small)
    assert small.find("#subgraph-empty").is_displayed()
    assert "Pin nodes" in small.text("#subgraph-empty")
    small.pin(20)
    small.frames()
    assert not small.find("#subgraph-empty").is_displayed()
    assert small.text("#diagram-boxes")


def exported(page: Page, title: str = "") -> ET.Element:
    """The saved SVG, once it is there."""
    for name in ("subgraph.svg", "subgraph.png"):
        (page.downloads / name).unlink(missing_ok=True)
    page.click("#subgraph-export")
    page.js("document.getElementById('subgraph-title').value = arguments[0]", title)
    page.click("#subgraph-svg")
    root = ET.fromstring(page.saved("subgraph.svg"))
    page.click("#subgraph-png")
    browser.wait_for((page.downloads / "subgraph.png").exists)
    page.keys(Keys.ESCAPE)
    return root


def test_files_hold_the_diagram_on_white_whatever_the_theme(open_page: Opens) -> None:
    page = pinned(open_page(GROUPED), GROUPED, PINNED)
    if page.state()["theme"] == "light":
        page.click("#theme")
    found = shown(page)
    root = exported(page, "Agreement")
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"Agreement", "subject", "verb"} <= set(texts)
    assert any(str(text).startswith("Links: attribution summed") for text in texts)
    assert len(root.findall(f".//{SVG}g[@class='box']")) == len(found["boxes"])
    assert len(root.findall(f".//{SVG}path[@class='line']")) == len(found["drawn"])
    paper = root.find(f"{SVG}rect[@class='paper']")
    assert paper is not None
    assert paper.get("fill") == "#ffffff"
    assert str(root.get("font-family")).startswith("Arial, Helvetica")
    assert page.state()["theme"] == "dark"
    assert "var(" not in ET.tostring(root, encoding="unicode")
    png = page.saved("subgraph.png")
    assert png.startswith(b"\x89PNG")
    assert int.from_bytes(png[16:20]) == pytest.approx(float(root.get("width", "0")) * 300 / 96, abs=1)
    page.click("#subgraph-export")
    page.click("#subgraph-white")
    page.click("#subgraph-legend")
    page.keys(Keys.ESCAPE)
    root = exported(page)
    paper = root.find(f"{SVG}rect[@class='paper']")
    assert paper is not None
    assert paper.get("fill") == "#14171b"
    assert not root.findall(f".//{SVG}g[@class='legend']")


def test_hostile_names_run_nothing_and_leave_the_file_whole(open_page: Opens) -> None:
    names = [name for name in MALICIOUS if name.strip()]
    rows = range(12, 12 + len(names))
    made = payload(49, 300, tokens=["The", *names, " end"][:9])
    said = {row: viewer.Says(name, (("promotes", ((name, 1.0),)),)) for row, name in zip(rows, names, strict=True)}
    made = changed(made, "nodes", says=said)
    made = dataclasses.replace(
        made, title=names[0], groups={name: (row,) for row, name in zip(rows, names, strict=True)}
    )
    page = open_page(made)
    page.pin(40, 41)
    page.js("location.reload()")
    browser.wait_for(lambda: page.js("return typeof tracerPage === 'object' && tracerPage.state().pins.length") == 2)
    opened(page)
    assert page.js("return tracerPage.subgraph().boxes.length") >= len(names) + 2
    page.js("for (const one of document.querySelectorAll('#diagram .box')) one.focus()")
    root = exported(page, "".join(name for name in names if name.isprintable()))
    assert root.tag == f"{SVG}svg"
    assert not [one.tag for one in root.iter() if one.tag in (f"{SVG}script", f"{SVG}image", f"{SVG}foreignObject")]
    assert page.js("return window.hacked === undefined && document.images.length === 0")
    assert page.js("return document.querySelectorAll('script').length") == 4


def test_too_much_is_cut_to_the_strongest_and_said(
    open_page: Opens, capsys: pytest.CaptureFixture[str], record_property: Callable[[str, object], None]
) -> None:
    made = payload(3000, 60_000, n_layers=16)
    neurons = np.flatnonzero(made.nodes.kind == viewer.NEURON)
    groups = {f"g{i}": neurons[10 * i : 10 * i + 10].tolist() for i in range(60)}
    page = open_page(dataclasses.replace(made, flows=True))
    pinned(page, made, neurons[1000:1250].tolist(), groups)
    page.js("window.began = performance.now(); document.getElementById('subgraph-toggle').click()")
    page.frames()
    took = page.js("return performance.now() - window.began")
    found = shown(page)
    kept = {row for box in found["boxes"] if not (box["isGroup"] or box["isAdded"]) for row in box["rows"]}
    size = np.abs(made.nodes.attribution[neurons[1000:1250]])
    assert kept == set(neurons[1000:1250][np.argsort(-size, kind="stable")[:200]].tolist())
    assert sum(box["isGroup"] for box in found["boxes"]) == 50
    assert len(found["drawn"]) <= 400
    note = page.text("#subgraph-note")
    assert "50 pinned nodes more are too weak" in note
    assert "10 groups more are too weak" in note
    assert found["flow"]["n"] == 850  # what they hold is of all of them
    record_property("milliseconds", took)
    with capsys.disabled():
        print(f"\n280 boxes, 60,000 edges: open after {took:.0f} ms")  # noqa: T201


@pytest.mark.usefixtures("phone")
def test_it_fits_a_phone(open_page: Opens) -> None:
    page = open_page(GROUPED)
    page.click("#fold-controls")
    pinned(page, GROUPED, PINNED)
    shown(page)
    stage, pane = page.find("#stage").rect, page.find("#subgraph").rect
    assert pane["y"] >= stage["y"] + stage["height"] - 1
    assert pane["width"] == pytest.approx(390, abs=20)
    assert page.js("return document.documentElement.scrollWidth <= innerWidth && innerWidth === 390")


def test_the_split_follows_its_keys(open_page: Opens) -> None:
    page = pinned(open_page(GROUPED), GROUPED, PINNED)
    shown(page)
    before = page.find("#subgraph").rect["height"]
    page.js("document.getElementById('split').focus()")
    page.keys(Keys.ARROW_UP, Keys.ARROW_UP)
    grown = page.find("#subgraph").rect["height"]
    whole = page.find("#pictures").rect["height"]
    assert grown - before == pytest.approx(0.1 * whole, abs=3)
    assert page.find("#split").get_attribute("aria-valuenow") == "70"


def test_a_box_is_called_what_the_reader_calls_its_node(open_page: Opens) -> None:
    page = pinned(open_page(GROUPED), GROUPED, PINNED)
    page.select(PINNED[0])
    page.find("#node-name").send_keys("plural <b>subject</b>", Keys.TAB)
    page.frames()
    boxes = {box["rows"][0]: box for box in shown(page)["boxes"]}
    assert boxes[PINNED[0]]["name"] == "plural <b>subject</b>"
    neuron = f"L{SMALL.nodes.layer[PINNED[0]]} N{SMALL.nodes.neuron[PINNED[0]]}"
    assert any(neuron in line for line in boxes[PINNED[0]]["lines"])
    assert boxes[PINNED[1]]["name"].startswith("L")
    assert "plural <b>subject</b>" in [text.text for text in exported(page).iter(f"{SVG}text")]


def test_of_a_comparison_only_the_graph_that_is_looked_at_counts(open_page: Opens) -> None:
    rng = np.random.default_rng(3)
    sides = np.full(len(SMALL.nodes.kind), 3, np.uint8)
    of_edges = rng.integers(1, 5, len(SMALL.edges.source)).astype(np.int32)
    made = changed(SMALL, "nodes", side=sides, first=SMALL.nodes.attribution, last=SMALL.nodes.attribution)
    made = dataclasses.replace(changed(made, "edges", side=of_edges), sides=("a", "b"))
    page = pinned(open_page(made), made, PINNED)
    for seen in ("0", "1", "2"):
        page.js(
            "const one = document.getElementById('seen'); one.value = arguments[0];"
            "one.dispatchEvent(new Event('change', { bubbles: true }))",
            seen,
        )
        found = shown(page)
        counts = (seen == "0") | (of_edges > 2) | (of_edges == int(seen))
        own = {
            name: getattr(made.edges, name)[counts] for name in ("source", "target", "weight", "share", "attribution")
        }
        expected = sums(dataclasses.replace(made, edges=viewer.Edges(**own)), found["boxes"], "attribution")
        told = {(one["source"], one["target"]): one["value"] for one in found["links"]}
        assert told == {pair: pytest.approx(one[0]) for pair, one in expected.items() if pair[0] != pair[1]}
        assert found["flow"] is None
