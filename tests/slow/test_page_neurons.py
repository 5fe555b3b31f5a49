"""The page in a real Chromium: what neurons do, names and notes, pointing and picking, filters and their layout.

What is shown is held against the arrays that the page was made of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from browser import MARKS, SMALL, Page, busiest, strongest
from payloads import MALICIOUS, changed, payload
from tracer.reports import viewer

pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.common.keys import Keys

pytestmark = MARKS
Opened = Callable[[viewer.Payload], Page]
NODES = SMALL.nodes
NEURONS = np.flatnonzero(NODES.kind == viewer.NEURON)
SINGLE = int(NEURONS[0])
CONSTANT = {int(row): (0.8, 0.5, 0.01) for row in NEURONS[5:9]}


def same_neuron() -> tuple[viewer.Payload, list[int]]:
    """The small page with one neuron at three positions, and their rows in that order."""
    rows = [next(int(row) for row in NEURONS if NODES.position[row] == at) for at in (2, 4, 7)]
    layer, neuron = NODES.layer.copy(), NODES.neuron.copy()
    layer[rows], neuron[rows] = 3, 4095
    inside = layer[SMALL.edges.source] < layer[SMALL.edges.target]
    edges = {one.name: getattr(SMALL.edges, one.name) for one in dataclasses.fields(SMALL.edges)}
    kept = {name: None if values is None else values[inside] for name, values in edges.items()}
    return changed(changed(SMALL, "nodes", layer=layer, neuron=neuron), "edges", **kept), rows


def outline(page: Page, rows: list[int], margin: int = 12) -> list[tuple[int, int]]:
    """The corners of a box around nodes."""
    x, y = zip(*(page.place(row) for row in rows), strict=True)
    left, right, top, bottom = min(x) - margin, max(x) + margin, min(y) - margin, max(y) + margin
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def shown(page: Page) -> np.ndarray:
    return np.array(page.state()["shown"], bool)


# ------------------------------------------------------------------------------------------ what a neuron does


def test_a_neurons_panel_says_what_it_does(open_page: Opened) -> None:
    text = viewer.Text("top", 17, -2.0, ("The", " city", " of", " Dallas"), (0.0, -0.4, 0.0, -2.0))
    said = viewer.Says(
        "Texas",
        (("promotes", ((" Texas", 0.119), (" TX", 0.05))), ("driven by", ((" Dallas", -0.6),))),
        (viewer.Description("cities of <b>Texas</b>", 0.71, "a model"),),
        (text, text._replace(kind="q90", value=-1.0)),
        12,
    )
    page = open_page(changed(SMALL, "nodes", says={SINGLE: said}, always_on=CONSTANT))
    page.select(SINGLE)
    panel = page.text("#chosen")
    assert "cities of <b>Texas</b>" in panel
    assert "score 0.71 (a model)" in panel
    assert "promotes logit␣Texas 0.119␣TX 0.05" in panel
    assert "driven by value␣Dallas −0.6" in panel
    assert "On text (2, 12 more in the run of exemplars)" in panel
    sign = "−" if NODES.activation[SINGLE] < 0 else "+"
    assert f"polarity{sign} (its value is" in panel
    assert "Always on" not in panel
    assert page.text("#chosen .text").startswith("The city of Dallas")
    shades = page.js("return [...document.querySelectorAll('#chosen .text:first-of-type [class*=shade]')]"
                     ".map((one) => [one.localName, one.className, one.textContent, one.title])")  # fmt: skip
    assert shades == [["span", "minus shade1", " city", "−0.4"], ["strong", "minus shade5", " Dallas", "−2"]]
    page.select(next(iter(CONSTANT)))
    assert "Always on: strong on 80 % of unrelated prompts too (mean |attribution| 0.5)" in page.text("#chosen")
    assert "moves by 0.01" in page.text("#chosen")


def test_the_same_neuron_elsewhere_is_listed_and_ringed(open_page: Opened) -> None:
    made, rows = same_neuron()
    page = open_page(made)
    assert page.drawn("circle", "same") == []
    page.select(rows[0])
    buttons = page.all("#chosen .elsewhere button")
    assert [int(one.get_attribute("data-row")) for one in buttons] == rows[1:]
    assert [one.text.split("␣")[0].strip() for one in buttons] == ["pos 4", "pos 7"]
    places = page.js("return arguments[0].map((row) => tracerPage.position(row))", rows[1:])
    rings = {
        (round(float(one.get("cx", "nan"))), round(float(one.get("cy", "nan")))) for one in page.drawn("circle", "same")
    }
    assert rings == {(round(at["x"]), round(at["y"])) for at in places}
    buttons[1].click()
    assert page.state()["selected"] == rows[2]
    page.hover(rows[0])
    assert len(page.drawn("circle", "same")) == 2
    assert "same neuron at pos 4, 7" in page.text("#tooltip")


def test_hover_draws_a_nodes_links_over_the_others(small: Page) -> None:
    row = busiest(SMALL)
    own = len(strongest(SMALL, "source", row)) + len(strongest(SMALL, "target", row))
    small.hover(row)
    assert len(small.drawn("path", "edge pointed")) == own
    assert len(small.drawn("path", "edge")) == 100
    other = int(next(at for at in NEURONS if at != row))
    small.select(other)
    small.hover(row)
    assert len(small.drawn("path", "edge pointed")) == own
    small.js("document.getElementById('canvas').dispatchEvent(new PointerEvent('pointerleave'))")
    assert small.drawn("path", "edge pointed") == []


def test_many_edges_are_counted_apart_and_drawn_when_asked(open_page: Opened) -> None:
    made = payload(600, 0, n_layers=6)
    row, sources = len(made.nodes.kind) - 2, np.arange(9, 609, dtype=np.int32)
    value = np.random.default_rng(1).normal(0.3, 1, 600).astype(np.float32)
    edges = viewer.Edges(sources, np.full(600, row, np.int32), value, value, value)
    made = dataclasses.replace(made, edges=edges)
    page = open_page(made)
    into = {sign: strongest(made, "target", row, sign=sign) for sign in (1, -1)}
    total = sum(map(len, into.values()))
    assert total > 250
    page.select(row)
    for sign, name in ((1, "for"), (-1, "against")):
        entries = page.all(f"[data-direction=incoming][data-sign={name}] button")
        assert [int(one.get_attribute("data-row")) for one in entries] == into[sign][:30]
        assert f"{name} ({len(into[sign])})" in page.text("#chosen")
        assert f"and {len(into[sign]) - 30} weaker" in page.text("#chosen")
    assert f"250 of {total:,} drawn" in page.text("#chosen .drawn")
    assert len(page.drawn("path", "edge")) <= 250
    assert [one.text for one in page.drawn("text", "count")] == [f"edges drawn: 250 of {total:,} in"]
    page.click("[data-key='more incoming for']")
    entries = page.all("[data-direction=incoming][data-sign=for] button")
    assert [int(one.get_attribute("data-row")) for one in entries] == into[1][:60]
    page.click("#chosen .drawn button")
    assert len(page.drawn("path", "edge")) == total
    assert page.drawn("text", "count") == []
    assert page.find("#draw-all").is_selected()


# ---------------------------------------------------------------------------------------------- names and notes


def test_a_name_and_a_note_show_everywhere(small: Page) -> None:
    small.js("document.getElementById('canvas').focus()")
    small.select(SINGLE)
    plain = small.text("#chosen .name")
    small.js("document.getElementById('canvas').focus()")
    small.keys("n")
    small.keys(*"says Texas", Keys.TAB)
    small.keys(*"first line <i>", Keys.TAB)
    assert small.state()["names"] == [[SINGLE, "says Texas"]]
    assert small.state()["notes"] == [[SINGLE, "first line <i>"]]
    assert small.text("#chosen .name") == "says Texas"
    assert small.text("#chosen .place").startswith(f"{plain}, pos ")
    assert "says Texas" in [one.text for one in small.drawn("text", "name")]
    assert len(small.drawn("rect", "note")) == 1
    assert small.text("#written-count") == "Names and notes (1)"
    assert small.text("#written .note") == "first line <i>"
    small.select(-1)
    small.hover(SINGLE)
    assert small.text("#tooltip strong") == "says Texas"
    assert plain in small.text("#tooltip")
    assert "note: first line <i>" in small.text("#tooltip")
    assert "says Texas" in small.text("#live") or small.state()["cursor"] == SINGLE
    small.click("#written button")
    assert small.state()["selected"] == SINGLE
    small.change("node-name", "  ")
    assert small.state()["names"] == []
    assert small.text("#chosen .name") == plain


def test_a_click_right_after_typing_is_not_lost(small: Page) -> None:
    small.select(SINGLE)
    small.find("#node-name").send_keys("named")
    small.click("#chosen [data-key=pin]")
    assert small.state()["names"] == [[SINGLE, "named"]]
    assert small.state()["pins"] == [SINGLE]
    assert small.text("#pins .what") == "named"


@pytest.mark.parametrize("token", MALICIOUS, ids=range(len(MALICIOUS)))
def test_no_text_of_a_neuron_runs(token: str, open_page: Opened) -> None:
    text = viewer.Text(token[:8], 1, 1.0, (token, token), (1.0, -1.0))
    said = viewer.Says(token, ((token, ((token, 1.0),)),), (viewer.Description(token, None, token),), (text,), 1)
    page = open_page(changed(SMALL, "nodes", says={SINGLE: said}, always_on=CONSTANT))
    page.select(SINGLE)
    for name in ("node-name", "node-note"):
        page.change(name, token)
    page.js("document.activeElement.blur()")
    page.hover(SINGLE)
    page.click_node(SINGLE, Keys.SHIFT)
    page.change("picked-name", token)
    page.click("#picked-group")
    page.js("return tracerPage.svg()")
    assert page.js("return window.hacked === undefined && document.images.length === 0")
    assert page.js("return document.querySelectorAll('script').length") == 4
    assert page.js("return document.querySelectorAll('main b, main i, main script').length") == 0


# ------------------------------------------------------------------------------------------ pointing and picking


def test_control_click_pins_and_takes_the_pin_out(small: Page) -> None:
    small.click_node(SINGLE, Keys.CONTROL)
    assert (small.state()["pins"], small.state()["selected"]) == ([SINGLE], -1)
    assert small.text("#live").startswith("Pinned: ")
    small.click_node(SINGLE, Keys.META)
    assert small.state()["pins"] == []
    small.click_node(SINGLE)
    assert (small.state()["pins"], small.state()["selected"]) == ([], SINGLE)


def test_a_lasso_picks_what_is_inside_and_groups_it(small: Page) -> None:
    before = small.state()["transform"]
    wanted = [int(row) for row in NEURONS if NODES.position[row] == 4]
    corners = outline(small, wanted)
    inside = [
        row
        for row in range(len(NODES.kind))
        if corners[0][0] < small.place(row)[0] < corners[2][0] and corners[0][1] < small.place(row)[1] < corners[2][1]
    ]
    small.draw(corners, Keys.SHIFT)
    assert small.state()["picked"] == inside
    assert set(wanted) <= set(inside)
    assert small.state()["transform"] == before, "it panned"
    assert small.text("#picked-count") == f"{len(inside)} nodes picked"
    assert small.text("#live").endswith(f"{len(inside)} nodes picked")
    assert len(small.drawn("circle", "picked")) == len(inside)
    small.click("#picked-group")
    assert "needs a name" in small.text("#picked-problem")
    small.find("#picked-name").send_keys("at 4", Keys.ENTER)
    assert small.state()["groups"] == [{"name": "at 4", "rows": inside}]
    assert small.state()["picked"] == []
    assert not small.find("#picked").is_displayed()
    small.click("#lasso")
    small.draw(corners)
    assert small.state()["picked"] == inside
    small.find("#picked-name").send_keys("all alike")
    small.click("#picked-call")
    assert small.state()["names"] == [[row, "all alike"] for row in inside]
    small.draw(corners)
    small.click("#picked-pin")
    assert small.state()["pins"] == inside


def test_picking_by_click_and_by_keys(small: Page) -> None:
    small.click_node(SINGLE, Keys.SHIFT)
    assert (small.state()["picked"], small.state()["selected"]) == ([SINGLE], -1)
    small.click_node(SINGLE, Keys.SHIFT)
    assert small.state()["picked"] == []
    small.js("document.getElementById('canvas').focus()")
    small.keys(Keys.HOME)
    first = small.state()["cursor"]
    small.moves().key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()
    small.keys("]")
    second = small.state()["cursor"]
    small.moves().key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()
    assert small.state()["picked"] == [first, second]
    assert small.text("#live") == "1 node added; 2 nodes picked"
    small.keys("g")
    small.keys(*"two", Keys.ENTER)
    assert small.state()["groups"] == [{"name": "two", "rows": [first, second]}]
    assert small.js("return document.activeElement.id") == "canvas"
    small.moves().key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()
    small.keys(Keys.ESCAPE)
    assert small.state()["picked"] == []


# ------------------------------------------------------------------------------------------------------ filters


def inner(row: Any) -> Any:
    return NODES.kind[row] == viewer.NEURON


FILTERS: list[tuple[str, str | bool, Callable[[np.ndarray], np.ndarray]]] = [
    ("node-sign", "for", lambda row: ~inner(row) | (NODES.attribution[row] > 0)),
    ("node-sign", "against", lambda row: ~inner(row) | (NODES.attribution[row] < 0)),
    ("lowest-layer", "2", lambda row: ~inner(row) | (NODES.layer[row] >= 2)),
    ("highest-layer", "3", lambda row: ~inner(row) | (NODES.layer[row] <= 3)),
    ("position-zero", False, lambda row: NODES.position[row] != 0),
    ("kind-embedding", False, lambda row: NODES.kind[row] != viewer.EMBEDDING),
    ("kind-logit", False, lambda row: NODES.kind[row] != viewer.LOGIT),
    ("kind-neuron", False, lambda row: NODES.kind[row] != viewer.NEURON),
    ("always-on", False, lambda row: ~np.isin(row, list(CONSTANT))),
]


def test_each_filter_leaves_what_it_says(open_page: Opened) -> None:
    page, rows = open_page(changed(SMALL, "nodes", always_on=CONSTANT)), np.arange(len(NODES.kind))
    source, target = SMALL.edges.source, SMALL.edges.target
    for name, value, passes in FILTERS:
        page.change(name, value)
        kept = passes(rows)
        assert 0 < kept.sum() < len(kept)
        assert (shown(page) == kept).all(), name
        edges = int((kept[source] & kept[target]).sum())
        n, e = int(len(kept) - kept.sum()), len(source) - edges
        assert page.text("#hidden-count") == (
            f"{n} node{'s' * (n != 1)} and {e} edge{'s' * (e != 1)} hidden by filters."
        )
        page.click("#reset-filters")
        assert shown(page).all()
        assert page.text("#hidden-count") == "Nothing is hidden by filters."
    for name, positive in (("for", True), ("against", False)):
        page.change("edge-sign", name)
        wanted = (SMALL.edges.attribution > 0) if positive else (SMALL.edges.attribution < 0)
        assert page.state()["shownEdges"] == wanted.sum()
    page.click("#reset-filters")
    page.slide("influence-threshold", 950)
    least = page.state()["influenceThreshold"]
    assert NODES.influence is not None
    assert (shown(page) == (~inner(rows) | (NODES.influence.astype(float) >= least))).all()
    assert 0 < shown(page).sum() < len(rows)


def test_filters_that_a_graph_has_nothing_for_are_not_offered(small: Page) -> None:
    assert not small.find("#influence-line").is_displayed()  # folded away
    small.click("#more-filters-summary")
    assert not small.find("#always-on-line").is_displayed()
    assert not small.find("#kind-error").is_displayed()
    assert small.find("#influence-line").is_displayed()


def test_marked_nodes_stay_and_are_counted(small: Page) -> None:
    rows = [int(row) for row in NEURONS if NODES.position[row] == 0]
    small.pin(rows[0])
    small.select(-1)
    small.change("position-zero", False)
    assert shown(small)[rows[0]]
    hidden = int((NODES.position == 0).sum()) - 1
    assert small.text("#hidden-count").startswith(f"{hidden} node")
    assert "1 more stays" in small.text("#hidden-count")
    assert not small.find("#groups-stay").is_displayed()
    small.find("#group-name").send_keys("first", Keys.ENTER)
    assert small.state()["pins"] == []
    assert shown(small)[rows[0]]
    assert len(small.drawn("polygon", "group")) == 1
    small.change("groups-stay", False)
    assert not shown(small)[rows[0]]
    assert small.drawn("polygon", "group") == []


def test_the_layout_follows_the_filters(small: Page) -> None:
    def places() -> np.ndarray:
        found = small.js(
            "return Array.from({ length: arguments[0] }, (_, i) => tracerPage.position(i))", len(NODES.kind)
        )
        return np.array([(at["x"], at["y"], at["r"]) for at in found])

    small.frames()
    before = places()
    small.change("position-zero", False)
    small.change("kind-embedding", False)
    for layer in (2, 3):
        small.change("lowest-layer", str(layer))
    kept, after = shown(small), places()
    empty = ~np.isin(range(len(SMALL.tokens)), NODES.position[kept])
    assert empty.any()
    middles = {at: after[NODES.position == at, 0] for at in range(len(SMALL.tokens))}
    columns = [float(np.median(one)) for one in middles.values()]
    assert columns == sorted(columns)
    gaps = np.hypot(*(after[kept, None, at] - after[kept, at] for at in (0, 1)))
    gaps -= after[kept, None, 2] + after[kept, 2]
    np.fill_diagonal(gaps, 1)
    assert gaps.min() > 0
    for layer in range(6):
        for at in range(len(SMALL.tokens)):
            cell = np.flatnonzero(kept & (NODES.layer == layer) & (NODES.position == at) & (NODES.kind == 0))
            order = sorted(cell, key=lambda row: (round(after[row, 1]), after[row, 0]))
            sizes = np.abs(NODES.attribution[order])
            assert (np.diff(sizes) <= 0).all(), "strongest first, as without filters"
    assert after[:, 2].max() >= before[:, 2].max(), "what is left may be larger"
    small.click("#reset-filters")
    small.frames()
    assert np.allclose(places(), before, atol=0.5)


def test_a_layout_that_is_zoomed_into_keeps_the_chosen_node_in_place(small: Page) -> None:
    row = busiest(SMALL)
    small.select(row)
    for _ in range(4):
        small.click("#zoom-in")
    before = small.place(row)
    small.slide("node-threshold", 700)
    assert small.place(row) == pytest.approx(before, abs=1)


def test_names_are_whole_at_the_edges(small: Page) -> None:
    right = small.js("return document.getElementById('canvas').clientWidth")
    for at in (0, 8):
        small.select(int(np.flatnonzero(NODES.position == at)[1]))
        small.change("node-name", "a name that is rather long")
    names = [one for one in small.drawn("text", "name") if (one.text or "").startswith("a name that")]
    assert len(names) == 2
    width = (
        "const p = document.createElement('canvas').getContext('2d');"
        "p.font = \"11px system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif\";"
        "return p.measureText(arguments[0]).width"
    )
    for one in names:
        half, x = small.js(width, one.text) / 2, float(one.get("x", "nan"))
        assert 58 <= x - half < x + half <= right


def test_small_neurons_do_not_look_like_embeddings(open_page: Opened) -> None:
    page = open_page(payload(4000, 0, n_layers=48))
    circles = [float(one.get("r", "nan")) for one in page.drawn("circle", "node")]
    squares = [float(one.get("width", "nan")) for one in page.drawn("rect", "node")]
    assert (len(circles), len(squares)) == (4000, 9)
    assert min(circles) < 1.6
    assert min(squares) > 1.5 * 2 * min(circles)
    row = int(circles.index(min(circles))) + 9
    reds = page.js(
        "const at = tracerPage.position(arguments[0]), r = window.devicePixelRatio;"
        "const pen = document.getElementById('canvas').getContext('2d');"
        "const { data } = pen.getImageData(Math.floor(at.x * r) - 3, Math.floor(at.y * r) - 3, 7, 7);"
        "return [...data].filter((_, i) => i % 4 === 0)",
        row,
    )
    assert len(set(reds)) > 3, "its border is not that of a block"
