"""The page in a real Chromium, opened from a file: what a reader sees, reaches, saves and loads.

Times are printed, never asserted: they belong to the machine. Skipped where there is no chromium or no selenium.
"""

from __future__ import annotations

import dataclasses
import json
import math
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from browser import MARKS, SMALL, SVG, Page, busiest, strongest, wait_for
from payloads import MALICIOUS, changed, foreign, payload
from tracer.circuit import supernodes_file
from tracer.reports import viewer

pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.common.keys import Keys

pytestmark = MARKS
LARGE = payload(4989, 100_000, n_layers=24)
FOREIGN = foreign()
SHARES = np.full(len(FOREIGN.edges.share), 0.5, np.float32)


@pytest.mark.parametrize(
    "size",
    [(49, 300, 6), (1989, 20_000, 12), (4989, 100_000, 24), pytest.param((4989, 10**6, 24), marks=pytest.mark.long)],
)
def test_opens_and_answers(
    size: tuple[int, int, int],
    open_page: Callable[[viewer.Payload], Page],
    record_property: Callable[[str, object], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = payload(
        size[0], size[1], n_layers=size[2], tokens=[f" token{at}" for at in range(40)] if size[0] > 49 else None
    )
    page, times = open_page(made), {}
    n = len(made.nodes.kind)

    def note(what: str) -> None:
        page.frames()
        stats = page.js("return tracerPage.stats")
        times[what] = stats["lastInteractionMs"]

    page.select(busiest(made))
    note("select")
    page.hover(n - 1)
    note("hover")
    page.slide("node-threshold", 500)
    note("node slider")
    page.slide("node-threshold", 0)
    page.change("position-zero", False)
    note("layout")
    page.change("position-zero", True)
    page.slide("edge-threshold", 300)
    note("edge slider")
    page.find("#search").send_keys(" the")
    note("search")
    page.click("#zoom-in")
    note("zoom")
    page.js("document.getElementById('measure').value = 'share'")
    page.js("document.getElementById('measure').dispatchEvent(new Event('change', { bubbles: true }))")
    note("other measure")
    first = page.js("return tracerPage.stats.firstPaintMs")
    contentful = page.js("return performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? NaN")
    told = ", ".join(f"{what} {value:.0f}" for what, value in times.items())
    told = f"{n} nodes, {len(made.edges.source)} edges: first paint {first:.0f} ms (browser: {contentful:.0f}); {told}"
    record_property("milliseconds", told)
    with capsys.disabled():
        print(f"\n{told}")  # noqa: T201
    assert math.isfinite(first)
    assert all(math.isfinite(value) for value in times.values())
    assert page.state()["shownNodes"] == n


def test_an_empty_circuit_opens(open_page: Callable[[viewer.Payload], Page]) -> None:
    made = payload(3, 0)
    columns = {field.name: getattr(made.nodes, field.name) for field in dataclasses.fields(made.nodes)}
    none = {
        name: {} if isinstance(of, dict) else of if of is None else of[:0]
        for name, of in columns.items()
        if name != "names"
    }
    page = open_page(dataclasses.replace(made, nodes=dataclasses.replace(made.nodes, **none)))
    page.click("#canvas")
    page.keys(Keys.ARROW_UP, Keys.ENTER, "p", "]")
    assert page.state()["shownNodes"] == 0


def test_the_chosen_nodes_edges_are_listed_strongest_first(small: Page) -> None:
    row = busiest(SMALL)
    small.select(row)
    for direction, end in (("incoming", "target"), ("outgoing", "source")):
        for sign, name in ((1, "for"), (-1, "against")):
            assert listed(small, direction, name) == strongest(SMALL, end, row, sign=sign)[:30]
            assert len(listed(small, direction, name)) > 1
    first = small.find("[data-direction=incoming] button")
    goal = int(first.get_attribute("data-row"))
    first.click()
    assert small.state()["selected"] == goal
    assert small.js("return document.activeElement.id") == "chosen"


def listed(page: Page, direction: str, sign: str) -> list[int]:
    """The nodes at the other ends of the chosen node's edges, as its panel has them."""
    entries = page.all(f"[data-direction={direction}][data-sign={sign}] button")
    return [int(one.get_attribute("data-row")) for one in entries]


def test_directions_and_measure_can_be_changed(small: Page) -> None:
    row = busiest(SMALL)
    small.select(row)
    small.click("#incoming")
    edges = small.js("const e = tracerPage.chosenEdges(); return [e.incoming.length, e.outgoing.length]")
    assert edges == [0, len(strongest(SMALL, "source", row))]
    small.js("document.getElementById('measure').value = 'share'")
    small.js("document.getElementById('measure').dispatchEvent(new Event('change', { bubbles: true }))")
    assert listed(small, "outgoing", "for") == strongest(SMALL, "source", row, "share", sign=1)[:30]
    assert listed(small, "outgoing", "against") == strongest(SMALL, "source", row, "share", sign=-1)[:30]


def test_the_strongest_edges_overall_are_as_many_as_asked(small: Page) -> None:
    def drawn() -> int:
        small.frames()
        return len(ET.fromstring(small.js("return tracerPage.svg()")).findall(f".//{SVG}path[@class='edge']"))

    assert drawn() == 100
    box = small.find("#overall-count")
    box.clear()
    box.send_keys("37")
    assert drawn() == 37
    small.click("#overall")
    assert drawn() == 0


def queries() -> list[tuple[str, Callable[[int], bool]]]:
    nodes = SMALL.nodes
    row = int(np.flatnonzero(nodes.kind == viewer.NEURON)[7])
    layer, neuron = int(nodes.layer[row]), int(nodes.neuron[row])

    def named(i: int) -> bool:
        return bool(nodes.kind[i] == 0 and nodes.layer[i] == layer and nodes.neuron[i] == neuron)

    return [
        (f"L{layer} N{neuron}", named),
        (f"{layer}/{neuron}", named),
        (f"l{layer}n{neuron}", named),
        (f"N{neuron}", lambda i: bool(nodes.kind[i] == 0 and nodes.neuron[i] == neuron)),
        (f"L{layer}", lambda i: bool(nodes.layer[i] == layer)),
        ("pos 4", lambda i: bool(nodes.position[i] == 4)),
        (f"pos 4 L{layer}", lambda i: bool(nodes.position[i] == 4 and nodes.layer[i] == layer)),
        (" are", lambda i: i == len(nodes.kind) - 2),
        (" CAB", lambda i: bool(nodes.position[i] == 4)),
        ("\u2423cab", lambda i: bool(nodes.position[i] == 4)),
        (f"\u2423cab L{layer}", lambda i: bool(nodes.position[i] == 4 and nodes.layer[i] == layer)),
        ("no such token", lambda i: False),
    ]


@pytest.mark.parametrize(("query", "fits"), queries(), ids=[query for query, _ in queries()])
def test_search_finds(small: Page, query: str, fits: Callable[[int], bool]) -> None:
    expected = {i for i in range(len(SMALL.nodes.kind)) if fits(i)}
    small.find("#search").send_keys(query)
    small.frames()
    assert set(small.state()["matches"]) == expected
    listed = {int(button.get_attribute("data-row")) for button in small.all("#results button")}
    assert listed <= expected
    assert len(listed) == min(40, len(expected))
    assert small.text("#found").startswith(f"{len(expected)} found")
    if expected:
        small.find("#search").send_keys(Keys.ENTER)
        assert small.state()["selected"] in expected


def test_sliders_filter_what_they_say(small: Page) -> None:
    nodes, edges = SMALL.nodes, SMALL.edges
    for step in (300, 700, 1000):
        small.slide("node-threshold", step)
        state = small.state()
        kept = (nodes.kind != viewer.NEURON) | (np.abs(nodes.attribution.astype(float)) >= state["nodeThreshold"])
        assert state["shownNodes"] == kept.sum()
        assert f"{kept.sum()} of {len(kept)} nodes" in small.text("#node-threshold-value")
        both = kept[edges.source] & kept[edges.target]
        assert state["shownEdges"] == both.sum()
    small.slide("node-threshold", 0)
    small.slide("edge-threshold", 600)
    state = small.state()
    kept = np.abs(edges.attribution.astype(float)) >= state["edgeThreshold"]
    assert 0 < kept.sum() < len(kept)
    assert state["shownEdges"] == kept.sum()
    small.slide("edge-threshold", 1000)
    assert small.state()["shownEdges"] == 1


def test_marked_nodes_stay_when_filtered(small: Page) -> None:
    weakest = int(np.argmin(np.where(SMALL.nodes.kind == 0, np.abs(SMALL.nodes.attribution), np.inf)))
    small.slide("node-threshold", 1000)
    assert small.state()["shown"][weakest] == 0
    small.pin(weakest)
    small.keys(Keys.ESCAPE)
    assert small.state()["shown"][weakest] == 1


def test_groups_come_back_from_a_file(small: Page) -> None:
    small.group("subject </b>", 12, 15, 20)
    small.group("verb", 30, 31)
    small.pin(40, 41)
    before = small.state()
    assert [(group["name"], sorted(group["rows"])) for group in before["groups"]] == [
        ("subject </b>", [12, 15, 20]),
        ("verb", [30, 31]),
    ]
    small.click("#save-groups")
    content = json.loads(small.saved("groups.json"))
    assert (content["format"], content["version"], len(content["pinned"])) == ("tracer-supernodes", 1, 2)
    file = supernodes_file.parsed((small.downloads / "groups.json").read_bytes())  # as every verb reads it
    assert [(group.name, len(group.nodes)) for group in file.groups] == [("subject </b>", 3), ("verb", 2)]
    signs = [node.polarity for group in file.groups for node in group.nodes]
    rows = [row for group in before["groups"] for row in group["rows"]]
    assert signs == [(None if SMALL.nodes.kind[row] else -1 if SMALL.nodes.activation[row] < 0 else 1) for row in rows]
    small.js("location.reload()")
    wait_for(lambda: small.js("return typeof tracerPage === 'object'"))
    wait_for(lambda: small.state()["groups"] == before["groups"])
    small.find("[aria-label='Delete group verb']").click()
    small.click("#unpin-all")
    small.find("#groups-file").send_keys(str(small.downloads / "groups.json"))
    wait_for(lambda: small.text("#message"))
    after = small.state()
    assert (after["groups"], after["pins"]) == (before["groups"], before["pins"])
    assert len(ET.fromstring(small.js("return tracerPage.svg()")).findall(f".//{SVG}polygon[@class='group']")) == 2


def test_groups_can_be_renamed_and_deleted(small: Page) -> None:
    small.group("one", 12, 15)
    small.group("two", 30)
    small.find("#groups input").send_keys(Keys.CONTROL, "a", Keys.NULL, "two", Keys.ENTER)
    assert "already a group" in small.text("#message")
    small.find("#groups input").send_keys(Keys.CONTROL, "a", Keys.NULL, "first", Keys.ENTER)
    assert [group["name"] for group in small.state()["groups"]] == ["first", "two"]
    small.group("three", 12, 15)
    assert [group["name"] for group in small.state()["groups"]] == ["two", "three"]
    small.find("[aria-label='Delete group two']").click()
    assert [group["name"] for group in small.state()["groups"]] == ["three"]
    small.click("#group-form button")
    assert "pin some nodes first" in small.text("#message")


def test_groups_of_the_graph_are_listed_drawn_and_saved(open_page: Callable[[viewer.Payload], Page]) -> None:
    page = open_page(FOREIGN)
    groups = page.state()["groups"]
    assert [group["name"] for group in groups] == ["subject </b>", "verb", "v" * 59 + "\u2026"]
    assert [group["rows"] for group in groups[:2]] == [[12, 15, 20], [30, 31]]
    listed = page.js("return [...document.querySelectorAll('#groups input')].map((one) => one.value)")
    assert listed == [group["name"] for group in groups]
    assert page.text("#group-count") == "Groups (3)"
    assert page.text("#groups .where") == "3 nodes"
    root = ET.fromstring(page.js("return tracerPage.svg()"))
    assert len(root.findall(f".//{SVG}polygon[@class='group']")) == 3
    page.click("#save-groups")
    page.saved("groups.json")
    page.find("[aria-label='Delete group verb']").click()
    page.find("#groups-file").send_keys(str(page.downloads / "groups.json"))
    wait_for(lambda: page.text("#message"))
    assert page.text("#message").startswith("Loaded 3 groups")
    assert page.state()["groups"] == groups


def test_error_nodes_have_a_mark_a_name_and_a_legend(small: Page, open_page: Callable[[viewer.Payload], Page]) -> None:
    assert not small.find("#legend-error").is_displayed()
    page = open_page(FOREIGN)
    assert page.find("#legend-error").is_displayed()
    errors = np.flatnonzero(FOREIGN.nodes.kind == viewer.ERROR)
    root = ET.fromstring(page.js("return tracerPage.svg()"))
    marks = [len(e.get("points", "").split()) for e in root.findall(f".//{SVG}polygon[@class='node']")]
    assert (marks.count(12), marks.count(4)) == (len(errors), 2)
    row = int(errors[0])
    page.select(row)
    assert page.text("#chosen .name") == f"error L{FOREIGN.nodes.layer[row]}"
    page.hover(row)
    assert page.find("#tooltip").text.startswith(f"error L{FOREIGN.nodes.layer[row]}")
    page.find("#search").send_keys("error")
    page.frames()
    assert set(page.state()["matches"]) == set(errors.tolist())
    page.slide("node-threshold", 1000)
    assert page.state()["shown"][int(errors[1])] == 0


def test_a_graph_without_attributions_shows_none(open_page: Callable[[viewer.Payload], Page]) -> None:
    page, nodes = open_page(FOREIGN), FOREIGN.nodes
    subtitle = page.text("#subtitle")
    assert subtitle.endswith("no metric")
    page.select(40)
    facts = page.js("return [...document.querySelectorAll('#chosen dd')].map((one) => one.textContent)")
    names = page.js("return [...document.querySelectorAll('#chosen dt')].map((one) => one.textContent)")
    shown = dict(zip(names, facts, strict=True))
    assert shown["attribution"] == shown["share of metric"] == shown["explained"] == "\u2013"
    assert nodes.influence is not None
    assert float(shown["influence"]) == pytest.approx(float(nodes.influence[40]), rel=0.01)
    assert page.text("#node-threshold-label") == "Neurons and errors by influence"
    sizes = np.array([page.js("return tracerPage.position(arguments[0]).r", row) for row in range(len(nodes.kind))])
    assert (np.argsort(sizes) == np.argsort(nodes.influence)).mean() > 0.9
    page.slide("node-threshold", 900)
    state = page.state()
    inner = np.isin(nodes.kind, (viewer.NEURON, viewer.ERROR))
    grouped = {row for group in state["groups"] for row in group["rows"]} | {40}
    kept = ~inner | (nodes.influence >= state["nodeThreshold"]) | np.isin(range(len(inner)), list(grouped))
    assert 0 < state["shownNodes"] == kept.sum() < len(kept)


def test_the_first_measure_is_one_that_the_graph_has(open_page: Callable[[viewer.Payload], Page]) -> None:
    shares = changed(FOREIGN, "edges", share=SHARES)
    for made, measure in ((SMALL, "attribution"), (FOREIGN, "weight"), (shares, "share")):
        page = open_page(made)
        assert page.state()["measure"] == page.js("return document.getElementById('measure').value") == measure
        off = page.js("return [...document.querySelectorAll('#measure option')].map((one) => one.disabled)")
        assert off == [measure != "attribution", False, False]


def test_edges_have_the_colour_that_the_legend_gives_them(open_page: Callable[[viewer.Payload], Page]) -> None:
    edges = SMALL.edges
    opposite = changed(SMALL, "edges", attribution=-np.abs(edges.attribution), weight=np.abs(edges.weight))
    page = open_page(opposite)
    row = busiest(opposite)
    page.select(row)

    def colours() -> set[str]:
        root = ET.fromstring(page.js("return tracerPage.svg()"))
        return {str(path.get("stroke")) for path in root.findall(f".//{SVG}path[@class='edge']")}

    def colour(name: str) -> str:
        return page.js(f"return getComputedStyle(document.documentElement).getPropertyValue('--edge-{name}').trim()")

    assert colours() == {colour("minus")}
    assert page.text("#legend-edge-minus") == "edge against"
    page.js("document.getElementById('measure').value = 'weight'")
    page.js("document.getElementById('measure').dispatchEvent(new Event('change', { bubbles: true }))")
    assert colours() == {colour("plus")}
    assert page.text("#legend-edge-plus") == "edge of positive weight"


def test_groups_of_other_makers_are_read(small: Page) -> None:
    neuron = int(np.flatnonzero(SMALL.nodes.kind == 0)[0])
    place = {name: int(getattr(SMALL.nodes, name)[neuron]) for name in ("layer", "neuron")}
    sign = -1 if SMALL.nodes.activation[neuron] < 0 else 1
    same = (SMALL.nodes.kind == 0) & (SMALL.nodes.layer == place["layer"]) & (SMALL.nodes.neuron == place["neuron"])
    wanted = np.flatnonzero(same & ((SMALL.nodes.activation < 0) == (sign < 0))).tolist()
    members = [{**place, "position": -1, "polarity": sign}]
    made = {"format": "tracer-supernodes", "version": 1, "circuit": None, "pinned": [], "how": {"method": "spectral"}}
    old = {"format": "tracer-groups", "version": 1, "title": "x", "pins": [NODE], "groups": []}
    path = small.downloads / "made.json"
    for content, groups in (
        (made | {"groups": [{"name": "any", "description": "says so", "nodes": members}]},
         [{"name": "any", "description": "says so", "rows": wanted}]),
        (old, []),
    ):  # fmt: skip
        path.write_text(json.dumps(content))
        small.js("document.getElementById('message').textContent = ''")
        small.find("#groups-file").send_keys(str(path))
        wait_for(lambda: small.text("#message"))
        assert small.text("#message").startswith("Loaded")
        assert small.state()["groups"] == groups


NODE = {"layer": -1, "position": 0, "neuron": 100}
FILE = {"format": "tracer-supernodes", "version": 1, "pinned": [NODE], "groups": [{"name": "a", "nodes": [NODE]}]}
BROKEN = [
    ("{", "not JSON"),
    ("[]", '"format"'),
    ({**FILE, "version": 3}, "its version is 3"),
    ({**FILE, "pinned": None}, '"pinned" is not a list'),
    ({**FILE, "groups": {}}, '"groups" is not a list'),
    ({**FILE, "pinned": [{"layer": 0.5, "position": 0, "neuron": 1}]}, "whole numbers"),
    ({**FILE, "pinned": [{"layer": 99, "position": 0, "neuron": 1}]}, "not on this page"),
    ({**FILE, "groups": [{"name": "", "nodes": [NODE]}]}, "needs a name"),
    ({**FILE, "groups": [{"name": "a" * 61, "nodes": [NODE]}]}, "at most 60"),
    ({**FILE, "groups": [{"name": "a", "nodes": []}]}, "no list of nodes"),
    ({**FILE, "groups": [{"name": "a", "nodes": [NODE, NODE]}]}, "a second time"),
    ({**FILE, "groups": [*FILE["groups"], {"name": "a", "nodes": [NODE]}]}, "already a group"),
    ({**FILE, "groups": [*FILE["groups"], None]}, "group 2 is not an object"),
]


def test_a_malformed_file_changes_nothing(small: Page) -> None:
    small.group("kept", 12, 15)
    small.pin(20)
    before = small.state()
    for content, message in BROKEN:
        path = small.downloads / "broken.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        small.js("document.getElementById('message').textContent = ''")
        small.find("#groups-file").send_keys(str(path))
        wait_for(lambda: small.text("#message"))
        assert message in small.text("#message"), small.text("#message")
        assert "Nothing was changed" in small.text("#message")
        assert small.state() == before


def test_exports_hold_every_mark(small: Page) -> None:
    small.click("#save-svg")
    root = ET.fromstring(small.saved("circuit.svg"))
    assert root.tag == f"{SVG}svg"
    kind = SMALL.nodes.kind
    for shape, wanted in (("circle", 0), ("rect", 1), ("polygon", 2)):
        assert len(root.findall(f".//{SVG}{shape}[@class='node']")) == (kind == wanted).sum()
    texts = [element.text for element in root.findall(f".//{SVG}text")]
    assert {"\u2423cabinet", "L5", "logits"} <= set(texts)
    small.click("#save-png")
    png = small.saved("circuit.png")
    assert png.startswith(b"\x89PNG")
    assert int.from_bytes(png[16:20]) == 2 * round(float(root.get("width", "0")))


def test_the_keyboard_reaches_everything(small: Page) -> None:
    small.js("document.getElementById('canvas').focus()")
    small.keys(Keys.HOME)
    top = len(SMALL.nodes.kind) - 2
    assert small.state()["cursor"] == top
    assert "logit" in small.text("#live")
    small.keys(Keys.ARROW_RIGHT)
    assert small.state()["cursor"] == top + 1
    small.keys(Keys.ARROW_DOWN)
    below = small.state()["cursor"]
    assert SMALL.nodes.layer[below] < 6
    small.keys(Keys.ENTER)
    assert small.state()["selected"] == below
    assert small.text("#live").startswith("Chosen: ")
    small.keys("p")
    assert small.state()["pins"] == [below]
    small.keys(Keys.ESCAPE)
    assert (small.state()["selected"], small.state()["cursor"]) == (-1, -1)
    small.keys("]", "]")
    seen = {small.state()["cursor"]}
    for _ in SMALL.nodes.kind:
        small.keys("]")
        seen.add(small.state()["cursor"])
    assert len(seen) == len(SMALL.nodes.kind)
    small.keys("?")
    assert small.js("return document.getElementById('help-dialog').open") is True
    small.keys(Keys.ESCAPE)
    assert small.js("return document.activeElement.id") in ("help", "canvas")


def test_tab_visits_every_control_with_a_visible_focus(small: Page) -> None:
    wanted = set(
        small.js(
            "return [...document.querySelectorAll('button:enabled, input:not([type=file]), select, canvas')]"
            ".filter((e) => e.checkVisibility() && !e.closest('dialog, .entries')).map((e) => e.id || e.textContent)"
        )
    )
    small.js("document.body.focus()")
    seen = set()
    for _ in range(80):
        small.keys(Keys.TAB)
        seen.add(small.js("const e = document.activeElement; return e.id || e.textContent"))
        ringed = (
            "const s = getComputedStyle(document.activeElement); return s.outlineStyle + parseFloat(s.outlineWidth)"
        )
        if small.js("return document.activeElement !== document.body"):
            assert small.js(ringed) == "solid3"
    assert wanted <= seen, wanted - seen


def test_the_tooltip_shows_the_numbers(small: Page) -> None:
    row = int(np.argmax(np.where(SMALL.nodes.kind == 0, np.abs(SMALL.nodes.attribution), 0)))
    small.hover(row)
    assert small.state()["cursor"] == row
    tooltip = small.find("#tooltip")
    assert tooltip.is_displayed()
    nodes = SMALL.nodes
    shown = tooltip.text.replace("\u2212", "-")
    for value, unit in (
        (nodes.activation[row], ""),
        (nodes.attribution[row], ""),
        (100 * nodes.attribution[row] / SMALL.metric, " %"),
        (100 * nodes.explained[row], " %"),
    ):
        assert f"{float(f'{value:.3g}'):g}{unit}" in shown
    assert f"L{nodes.layer[row]} N{nodes.neuron[row]}" in shown
    small.hover(len(nodes.kind) - 1)
    assert "logit" in tooltip.text


def test_every_node_can_be_hit(small: Page) -> None:
    for row in range(len(SMALL.nodes.kind)):
        small.hover(row)
        assert small.state()["cursor"] == row


def test_nodes_do_not_overlap(open_page: Callable[[viewer.Payload], Page]) -> None:
    page = open_page(LARGE)
    places = page.js(
        "return Array.from({ length: arguments[0] }, (_, i) => tracerPage.position(i))", len(LARGE.nodes.kind)
    )
    x, y, r = (np.array([place[name] for place in places]) for name in "xyr")
    gaps = np.hypot(x[:, None] - x, y[:, None] - y) - r[:, None] - r
    np.fill_diagonal(gaps, 1)
    assert gaps.min() > 0


def test_what_a_neuron_says_is_beside_it_in_the_list_and_on_the_picture(
    open_page: Callable[[viewer.Payload], Page],
) -> None:
    first, other = (int(row) for row in np.flatnonzero(SMALL.nodes.kind == viewer.NEURON)[:2])
    lists = (("promotes", ((" Texas", 0.1194), (" TX", 0.05))), ("suppresses", ((" Idaho", -0.25),)))
    said = {first: viewer.Says("Texas, TX", lists), other: viewer.Says("names of <b>states</b>")}
    page = open_page(changed(SMALL, "nodes", says=said))
    page.select(first)
    shown = page.text("#chosen")
    assert "promotes logit\u2423Texas 0.119\u2423TX 0.05" in shown
    assert "suppresses logit\u2423Idaho \u22120.25" in shown
    names = [text.text for text in ET.fromstring(page.js("return tracerPage.svg()")).iter(f"{SVG}text")]
    assert f"N{SMALL.nodes.neuron[first]} Texas" in names
    page.hover(first)
    assert "Texas, TX" in page.text("#tooltip")
    assert "Texas, TX" in page.text("#live")
    page.select(other)
    assert "names of <b>states</b>" in page.text("#chosen")
    assert not page.all("#chosen b")
    page.find("#search").send_keys("texas")
    page.frames()
    assert page.state()["matches"] == [first]


@pytest.mark.parametrize("token", MALICIOUS, ids=range(len(MALICIOUS)))
def test_what_a_neuron_says_is_never_run(token: str, open_page: Callable[[viewer.Payload], Page]) -> None:
    row = int(np.flatnonzero(SMALL.nodes.kind == viewer.NEURON)[0])
    said = {row: viewer.Says(token, ((token, ((token, 1.0), (token, -1.0))),))}
    page = open_page(changed(SMALL, "nodes", says=said))
    page.select(row)
    page.hover(row)
    assert ET.fromstring(page.js("return tracerPage.svg()")).tag == f"{SVG}svg"
    assert page.js("return window.hacked === undefined && document.images.length === 0")
    assert page.js("return document.querySelectorAll('script').length") == 4


@pytest.mark.parametrize("token", MALICIOUS, ids=range(len(MALICIOUS)))
def test_text_is_never_run(token: str, open_page: Callable[[viewer.Payload], Page]) -> None:
    made = payload(20, 40, tokens=["The", token, " end"])
    made = dataclasses.replace(made, title=token, model=token, method=token, settings={token: token})
    page = open_page(made)
    page.select(1)
    page.hover(1)
    page.find("#search").send_keys("pos 1")
    page.js("document.getElementById('about').click()")
    root = ET.fromstring(page.js("return tracerPage.svg()"))
    assert root.tag == f"{SVG}svg"
    assert page.js("return window.hacked === undefined && document.images.length === 0")
    assert page.js("return document.querySelectorAll('script').length") == 4


def test_light_and_dark_follow_the_system_until_switched(
    open_page: Callable[[viewer.Payload], Page], browser: Any
) -> None:
    def prefer(theme: str) -> None:
        feature = {"name": "prefers-color-scheme", "value": theme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    try:
        prefer("dark")
        page = open_page(SMALL)
        assert page.state()["theme"] == "dark"
        prefer("light")
        page.frames()
        assert page.state()["theme"] == "light"
        page.click("#theme")
        assert page.state()["theme"] == "dark"
        assert page.js("return getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_the_picture_follows_the_window(small: Page) -> None:
    try:
        for width, height in ((900, 700), (500, 800), (1440, 900)):
            small.driver.set_window_size(width, height)
            small.frames()
            sizes = small.js(
                "const c = document.getElementById('canvas'); return [c.width, c.clientWidth, innerWidth,"
                "document.documentElement.scrollWidth]"
            )
            assert sizes[0] == sizes[1] <= sizes[2]
            assert sizes[3] <= sizes[2], "the page scrolls sideways"
            places = small.js("return Array.from({ length: 60 }, (_, i) => tracerPage.position(i).x)")
            assert min(places) > 0
            assert max(places) < sizes[1]
    finally:
        small.driver.set_window_size(1440, 900)


def test_a_page_that_is_damaged_says_so(browser: Any, tmp_path: Path) -> None:
    text = viewer.page(SMALL)
    path = tmp_path / "damaged.html"
    path.write_text(text.replace('id="block">', 'id="block">!', 1), encoding="utf-8")
    browser.get(path.as_uri())
    place = browser.find_element("css selector", "#failure")
    assert place.is_displayed()
    assert place.text.startswith("This page cannot be shown whole:")
    browser.get_log("browser")


def mixed() -> viewer.Payload:
    """The small page with neurons of experts: each neuron's number by 64, in every layer but the first."""
    rows = np.flatnonzero((SMALL.nodes.kind == viewer.NEURON) & (SMALL.nodes.layer > 0)).tolist()
    own = {row: divmod(int(SMALL.nodes.neuron[row]), 64) for row in rows}
    return dataclasses.replace(SMALL, nodes=dataclasses.replace(SMALL.nodes, experts=own))


def test_neurons_of_experts_are_named_found_filtered_and_loaded(
    open_page: Callable[[viewer.Payload], Page], tmp_path: Path
) -> None:
    made = mixed()
    page, nodes = open_page(made), made.nodes
    row, (expert, inside) = next(iter(nodes.experts.items()))
    layer = int(nodes.layer[row])
    page.select(row)
    assert page.text("#chosen .name") == f"L{layer} E{expert} N{inside}"
    for query in (f"L{layer} E{expert} N{inside}", f"{layer}/{expert}/{inside}", f"{layer}/{int(nodes.neuron[row])}"):
        page.js("const box = document.getElementById('search'); box.value = arguments[0];"
                "box.dispatchEvent(new Event('input', { bubbles: true }))", query)  # fmt: skip
        assert str(row) in [one.get_attribute("data-row") for one in page.all("#results button")]
        assert len(page.all("#results button")) == 1
    page.js("const box = document.getElementById('search'); box.value = arguments[0];"
            "box.dispatchEvent(new Event('input', { bubbles: true }))", f"E{expert}")  # fmt: skip
    found = {int(one.get_attribute("data-row")) for one in page.all("#results button")}
    assert found == {at for at, (other, _) in nodes.experts.items() if other == expert}
    names = [one.get_attribute("value") for one in page.all("#expert option")]
    assert names == ["", *dict.fromkeys(f"L{a} E{b}" for a, b in sorted((int(nodes.layer[at]), e) for at, (e, _) in nodes.experts.items()))]  # fmt: skip # noqa: E501
    page.js("tracerPage.select(-1)")
    page.js("const one = document.getElementById('expert'); one.value = arguments[0];"
            "one.dispatchEvent(new Event('change', { bubbles: true }))", f"L{layer} E{expert}")  # fmt: skip
    page.frames()
    own = [at for at, (other, _) in nodes.experts.items() if (int(nodes.layer[at]), other) == (layer, expert)]
    always = int((nodes.kind != viewer.NEURON).sum())
    assert f"{len(own) + always} of {len(nodes.kind)} nodes" in page.text("#node-threshold-value")
    member = {"layer": layer, "position": int(nodes.position[row]), "neuron": f"E{expert} N{inside}"}
    file = tmp_path / "groups.json"
    file.write_text(json.dumps({"format": "tracer-supernodes", "version": 1, "circuit": None, "pinned": [],
                                "groups": [{"name": "by hand", "nodes": [member]}]}))  # fmt: skip
    page.find("#groups-file").send_keys(str(file))
    page.frames()
    assert page.text("#message") == "Loaded 1 groups and 0 pins."


def test_a_page_without_experts_has_no_choice_of_them(small: Page) -> None:
    assert not small.find("#expert-line").is_displayed()
