"""What the page keeps: over a reload, in a link, in the browser, on the server; what is undone, unsaved, refused."""

from __future__ import annotations

import base64
import dataclasses
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from browser import MARKS, SMALL, Page, forget, wait_for
from payloads import MALICIOUS, changed, linked, payload
from tracer.circuit import supernodes_file
from tracer.reports import viewer
from tracer.reports.served import PageServer, served

pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.common.keys import Keys

pytestmark = MARKS
KEPT = ("selected", "pins", "groups", "names", "notes", "nodeThreshold", "edgeThreshold", "measure", "theme")
Open = Callable[[viewer.Payload], Page]


def kept(page: Page) -> dict[str, Any]:
    state = page.state()
    return {name: state[name] for name in KEPT} | {"zoom": page.js("return tracerPage.look()")}


def settle(page: Page) -> str:
    """Wait until the page's address has settled; the address."""
    page.frames()
    page.js("tracerPage.flush()")
    return page.js("return location.href")


def chosen(page: Page) -> None:
    """Choose and write something of every kind."""
    page.group("subject", 12, 15)
    page.pin(20, 21)
    page.js("tracerPage.write('names', 20, 'plural \\u732b')")
    page.js("tracerPage.write('notes', 20, 'fires on </script> nouns')")
    page.slide("node-threshold", 400)
    page.click("#theme")
    page.click("#zoom-in")
    page.select(30)


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    zooms = [held.pop("zoom") for held in (one, other)]
    assert one == other
    np.testing.assert_allclose(*zooms, rtol=1e-3)


def reload(page: Page) -> None:
    page.js("window.old = true; location.reload()")
    wait_for(lambda: page.js("return window.old === undefined && typeof tracerPage === 'object'"))
    page.frames()


def test_what_was_chosen_survives_a_reload_and_is_in_the_link(small: Page, browser: Any) -> None:
    chosen(small)
    link, before = settle(small), kept(small)
    assert before["pins"] == [20, 21]
    assert "#view=" in link
    reload(small)
    same(kept(small), dict(before))
    forget(browser)  # the link alone, in another browser
    browser.get(link)
    small.frames()
    same(kept(small), dict(before))
    assert small.all("#remarks p") == []
    assert small.find("#node-threshold").get_attribute("value") == "400"
    browser.get("about:blank")
    browser.get(link.partition("#")[0])  # the browser's storage alone
    small.frames()
    same(kept(small), dict(before))


def test_marks_are_undone_and_done_again(small: Page) -> None:
    assert not small.find("#undo").is_enabled()
    small.pin(12)
    small.group("one", 15)
    small.js("tracerPage.write('notes', 12, 'seen')")
    steps = [(s["pins"], len(s["groups"]), s["notes"]) for s in [small.state()]]
    small.js("document.activeElement.blur()")
    command(small, "z")
    assert small.state()["notes"] == []
    for _ in range(3):
        small.click("#undo")
    assert (small.state()["pins"], small.state()["groups"]) == ([], [])
    assert not small.find("#undo").is_enabled()
    for _ in range(3):
        command(small, "z", Keys.SHIFT)
    small.click("#redo")
    assert [(s["pins"], len(s["groups"]), s["notes"]) for s in [small.state()]] == steps
    assert not small.find("#redo").is_enabled()
    small.find("#search").send_keys("abc")
    command(small, "z")
    assert [(s["pins"], len(s["groups"]), s["notes"]) for s in [small.state()]] == steps


def command(page: Page, key: str, *held: str) -> None:
    """A key with Ctrl, and with others."""
    moves = page.moves()
    for one in (Keys.CONTROL, *held):
        moves = moves.key_down(one)
    moves = moves.send_keys(key)
    for one in (*held, Keys.CONTROL):
        moves = moves.key_up(one)
    moves.perform()
    page.frames()


def asks_to_stay(page: Page) -> bool:
    return page.js("const e = new Event('beforeunload', { cancelable: true }); return !window.dispatchEvent(e)")


def test_the_page_says_what_is_unsaved_until_it_is_saved(small: Page) -> None:
    assert (small.text("#unsaved"), asks_to_stay(small)) == ("", False)
    small.pin(12)
    assert (small.text("#unsaved"), asks_to_stay(small)) == ("Unsaved pins", False)
    small.js("tracerPage.write('names', 12, 'a name')")
    assert (small.text("#unsaved"), asks_to_stay(small)) == ("You have unsaved notes", True)
    small.click("#save")
    file = supernodes_file.parsed(small.saved("groups.json"))
    assert [(note.name, note.note) for note in file.notes] == [("a name", "")]
    assert (small.text("#unsaved"), asks_to_stay(small)) == ("", False)
    small.click("#undo")
    assert small.text("#unsaved") == "You have unsaved notes"
    small.click("#redo")
    assert small.text("#unsaved") == ""
    small.js("tracerPage.write('notes', 12, 'more')")
    reload(small)
    assert small.text("#unsaved") == "You have unsaved notes"


def test_names_and_notes_come_back_from_a_file(small: Page) -> None:
    note = {"layer": -1, "position": 0, "neuron": 100, "name": "<b>first</b>", "note": "line\nline"}
    file = {"format": "tracer-supernodes", "version": 2, "pinned": [], "groups": [], "notes": [note]}
    path = small.downloads / "notes.json"
    path.write_text(json.dumps(file))
    small.find("#groups-file").send_keys(str(path))
    wait_for(lambda: small.text("#message"))
    assert small.text("#message") == "Loaded 0 groups and 0 pins and 1 notes."
    assert (small.state()["names"], small.state()["notes"]) == ([[0, "<b>first</b>"]], [[0, "line\nline"]])
    for wrong in ({"notes": {}}, {"notes": [note | {"name": 3}]}, {"notes": [note | {"note": "x" * 10_001}]}):
        path.write_text(json.dumps(file | wrong))
        small.js("document.getElementById('message').textContent = ''")
        small.find("#groups-file").send_keys(str(path))
        wait_for(lambda: small.text("#message"))
        assert "Nothing was changed" in small.text("#message")


def encoded(content: Any) -> str:
    text = content if isinstance(content, str) else json.dumps(content)
    return base64.urlsafe_b64encode(text.encode("utf-8", "surrogatepass")).decode().rstrip("=")


def hostile(page: Page) -> list[Any]:
    """States that nobody's page wrote."""
    held = json.loads(page.js("return JSON.stringify(tracerPage.plain())"))
    marks = {"pins": [], "groups": [], "names": [], "notes": []}
    bad_marks = [
        {"pins": [999]}, {"pins": [-1]}, {"pins": [1.5]}, {"pins": "12"}, {"pins": {"length": 2}}, {"pins": [None]},
        {"groups": [["a", "", [1]], ["a", "", [2]]]}, {"groups": [["a", "", [1, 1]]]}, {"groups": [["", "", [1]]]},
        {"groups": [["a", "", []]]}, {"groups": [["x" * 61, "", [1]]]}, {"groups": [["a", "x" * 10_001, [1]]]},
        {"groups": [[{}, "", [1]]]}, {"groups": [["a", "", [1]]] * 1001}, {"groups": None},
        {"names": [[1, "x" * 201]]}, {"names": [[1, " "]]}, {"names": [[1, 3]]}, {"names": [["__proto__", "x"]]},
        {"notes": [[1]]}, {"notes": [[99999, "x"]]}, {"notes": "x"},
    ]  # fmt: skip
    bad = [
        {"v": 2}, {"of": "another"}, {"n": 3}, {"selected": 1e9}, {"selected": -2}, {"selected": "1"}, {"theme": "x"},
        {"look": [1, 2]}, {"look": [1, 2, "3"]}, {"look": [1e300, 0, 0]}, {"look": {}}, {"filters": []},
        {"filters": {"nodeThreshold": -1}}, {"filters": {"nodeThreshold": None}}, {"filters": {"expert": "L9 E9"}},
        {"filters": {"measure": "constructor"}}, {"filters": {"seen": 1}}, {"filters": {"overallCount": 1e9}},
        {"filters": {"overall": "yes"}}, {"filters": {"kinds": 999}}, {"filters": {"nodeSign": "x"}},
        {"boxes": [["a", 1]]}, {"boxes": [["a", 1, None]]}, {"boxes": [["x" * 201, 1, 1]]}, {"marks": []},
    ]  # fmt: skip
    whole = [held | one for one in bad] + [held | {"marks": marks | one} for one in bad_marks]
    return [*whole, "{", "null", "[]", "1", '"x"', "{}", "\ud800", "[" * 5000]


def state_of(page: Page) -> dict[str, Any]:
    """The state without the picture's place, which a remark above it moves."""
    return {name: value for name, value in page.state().items() if name != "transform"}


def test_a_state_that_is_not_ours_is_left_out_and_said(small: Page) -> None:
    small.select(5)
    small.pin(7)
    settle(small)
    before = state_of(small)
    for content in hostile(small):
        small.js("document.getElementById('remarks').replaceChildren()")
        small.js("location.hash = '#view=' + arguments[0]", encoded(content))
        wait_for(lambda: small.text("#remarks"))
        assert "nothing was taken" in small.text("#remarks"), content
        assert state_of(small) == before, content
    for text in ("%00%ff", "!!!", "A" * 200_000, "=" * 10):
        small.js("document.getElementById('remarks').replaceChildren()")
        small.js("location.hash = '#view=' + arguments[0]", text)
        small.frames()
        wait_for(lambda: small.text("#remarks"))
        assert state_of(small) == before
    key = small.js("return Object.keys(localStorage).find((one) => one.length > 60)")
    for content in ("{", "[]", '{"v":1,"marks":{"pins":[99999]}}'):
        code = f"sessionStorage.clear(); localStorage.setItem({json.dumps(key)}, {json.dumps(content)})"
        script = small.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": code})
        small.js("history.replaceState(null, '', location.pathname)")
        reload(small)
        small.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)
        assert "what this browser kept nothing was taken" in small.text("#remarks")
        assert small.state()["pins"] == []


def test_random_states_never_break_the_page(small: Page) -> None:
    """Single values of a good state replaced, removed or nested: taken whole, or left out with a remark."""
    chosen(small)
    settle(small)
    rng = np.random.default_rng(3)
    good = json.loads(small.js("return JSON.stringify(tracerPage.plain())"))
    odd = [None, -1, 1e308, "", "__proto__", [], {}, True, [[]], "\u202e", 0.5, 10**9, {"toString": 1}]

    def spoilt(held: Any) -> Any:
        if rng.random() < 0.25 or not isinstance(held, dict | list) or not held:
            return odd[rng.integers(len(odd))]
        if isinstance(held, dict):
            name = str(rng.choice(list(held)))
            return held | {name: spoilt(held[name])}
        at = int(rng.integers(len(held)))
        return [*held[:at], spoilt(held[at]), *held[at + 1 :]]

    for _ in range(120):
        text = encoded(spoilt(good))
        small.js("location.hash = '#view=' + arguments[0]", text)
        small.frames()
        state = small.state()
        assert all(0 <= row < 60 for row in state["pins"])
        assert -1 <= state["selected"] < 60
        assert len(small.all("#remarks p")) <= 4
    assert not small.find("#failure").is_displayed()


@pytest.mark.parametrize("token", MALICIOUS, ids=range(len(MALICIOUS)))
def test_names_and_notes_are_never_run(token: str, open_page: Open, browser: Any) -> None:
    text = token.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    facts = viewer.Facts(predictions=((token, 0.5),), asked=(token,), metric=token, conservation=token, tested=token,
                         evaluation=(viewer.Held(1, 0.5),), report=token)  # fmt: skip
    made = dataclasses.replace(SMALL, called={3: token}, remarks={3: token}, pins=[3], facts=facts)
    page = open_page(made)
    page.select(3)
    page.click("#facts summary")
    if text.strip():
        page.js("tracerPage.write('notes', 4, arguments[0])", text)
        browser.get(settle(page))
        browser.refresh()
        page.frames()
        assert page.js("return new Map(tracerPage.state().notes).get(4)") == text.strip()
    assert page.js("return window.hacked === undefined && document.images.length === 0")
    assert page.js("return document.querySelectorAll('script').length") == 4
    assert page.all("#facts a") == []


def test_a_very_long_state_stays_in_the_browser_and_that_is_said(small: Page) -> None:
    small.js("tracerPage.write('notes', 12, 'x'.repeat(9000))")
    link = settle(small)
    assert len(link) < 8500
    assert "too long for a link" in small.text("#remarks")
    reload(small)
    assert len(dict(small.state()["notes"])[12]) == 9000


def test_without_storage_the_page_works_and_says_so(small: Page, browser: Any) -> None:
    broken = (
        "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no', 'SecurityError') } })"
    )
    script = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": broken})
    try:
        reload(small)
        assert "stores nothing" in small.text("#remarks")
        small.pin(12)
        small.click("#fold-details")
        settle(small)
        reload(small)
        assert small.state()["pins"] == [12]
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


def test_marks_of_before_the_file_changed_are_offered_and_not_taken(open_page: Open, browser: Any) -> None:
    page = open_page(SMALL)
    page.pin(12)
    link = settle(page)
    newer = dataclasses.replace(SMALL, pins=[40])
    path = page.downloads / "page0.html"
    path.write_text(viewer.page(newer))
    browser.get("about:blank")
    browser.get(link)
    page.frames()
    assert page.state()["pins"] == [40]
    assert page.state()["selected"] == 12
    assert "before the file changed" in page.text("#remarks")
    page.click("#remarks p:last-child button")
    assert page.state()["pins"] == [12]
    page.click("#undo")
    assert page.state()["pins"] == [40]


def test_help_and_clear_need_no_focus_and_panels_fold(small: Page) -> None:
    small.select(12)
    small.js("document.activeElement.blur()")
    small.keys(Keys.ESCAPE)
    assert small.state()["selected"] == -1
    small.keys("?")
    assert small.js("return document.getElementById('help-dialog').open")
    small.keys(Keys.ESCAPE)
    assert not small.js("return document.getElementById('help-dialog').open")
    small.find("#search").send_keys("?")
    assert not small.js("return document.getElementById('help-dialog').open")
    wide = small.js("return document.getElementById('canvas').clientWidth")
    for name in ("controls", "details"):
        small.click(f"#fold-{name}")
        assert not small.find(f"#{name}").is_displayed()
    small.frames()
    assert small.js("return document.getElementById('canvas').clientWidth") > wide + 500
    reload(small)
    assert not small.find("#controls").is_displayed()
    small.click("#fold-controls")
    assert small.find("#fold-controls").get_attribute("aria-expanded") == "true"


def test_about_begins_at_its_top_and_speaks_no_python(open_page: Open) -> None:
    about = {f"line {i}": None for i in range(60)} | {"rules": ("half", "ln"), "on": True, "sub": {"a": [1, None]}}
    page = open_page(dataclasses.replace(SMALL, settings=about))
    page.click("#about")
    page.frames()
    assert page.js("return document.getElementById('about-dialog').scrollTop") == 0
    shown = page.text("#settings")
    assert "None" not in shown
    assert "half, ln" in shown
    assert "a 1, none" in shown


@pytest.mark.usefixtures("phone")
def test_a_phone_sees_the_picture_first_and_reaches_everything(open_page: Open) -> None:
    facts = viewer.Facts(predictions=((" are", 0.5), ("x" * 60, 0.1)), metric="m " * 60, conservation="holds " * 40,
                         evaluation=tuple(viewer.Held(10**i, 0.5, 0.25, 0.75, 0.125) for i in range(6)))  # fmt: skip
    page = open_page(dataclasses.replace(SMALL, facts=facts))
    assert not page.find("#controls").is_displayed()
    assert not page.find("#details").is_displayed()
    for selector in ("#facts summary", "#fold-controls", "#fold-details"):
        page.click(selector)
        page.frames()
    page.js("tracerPage.write('names', 5, 'y'.repeat(200))")
    page.select(5)
    width = page.js("return [document.documentElement.scrollWidth, innerWidth]")
    assert width[0] <= width[1] == 390
    outside = page.js(
        "return [...document.querySelectorAll('button, input, select')].filter((e) => e.checkVisibility())"
        ".filter((e) => !e.closest('.scroll'))"
        ".filter((e) => { const r = e.getBoundingClientRect(); return r.left < 0 || r.right > innerWidth })"
        ".map((e) => e.id || e.textContent)"
    )
    assert outside == []


def test_the_strip_says_what_the_payload_says(open_page: Open) -> None:
    facts = viewer.Facts(
        predictions=((" are", 0.625), (" is", 0.25)),
        asked=("p(are) = 0.625", "p(is) = 0.25"),
        metric="logit difference = +2.5 logits",
        conservation="unexplained +1e-7: holds",
        holds=True,
        evaluation=(viewer.Held(5, 0.5, 0.25, 0.75, 0.01), viewer.Held(50, 0.9375)),
        tested="6 test prompts, mean ablation",
        report="report.html",
    )
    page = open_page(dataclasses.replace(SMALL, facts=facts))
    summary = page.text("#facts-summary")
    assert summary == "says \u2423are (0.625) \u00b7 conservation holds \u00b7 93.8 % faithful at 50 nodes"
    page.click("#facts summary")
    rows = [[cell.text for cell in row.find_elements("css selector", "td")] for row in page.all("#facts tbody tr")]
    assert rows == [["5", "50 %", "25 % to 75 %", "1 %"], ["50", "93.8 %", "\u2013", "\u2013"]]
    shown = page.find("#facts").text
    for text in ("\u2423is", "0.25", "p(is) = 0.25", "logit difference = +2.5 logits", "6 test prompts"):
        assert text in shown
    assert page.find("#facts a").get_attribute("href").endswith("/report.html")


def test_differences_of_two_graphs_are_listed(open_page: Open) -> None:
    n = len(SMALL.nodes.kind)
    first, last = np.full(n, np.nan, np.float32), np.full(n, np.nan, np.float32)
    side = np.full(n, 3, np.uint8)
    first[:], last[:] = 0.5, 0.75
    for rows, which in (((10, 11), 1), ((12, 13, 14), 2), ((15,), 4)):
        side[list(rows)] = which
    first[[12, 13, 14]], last[[10, 11]] = np.nan, np.nan
    first[11], last[13], last[15] = -2, 3, -1
    edges = np.full(len(SMALL.edges.source), 3, np.int32)
    made = changed(changed(SMALL, "nodes", side=side, first=first, last=last), "edges", side=edges)
    page = open_page(dataclasses.replace(made, sides=("before", "after")))
    listed = {
        kind: [int(button.get_attribute("data-row")) for button in page.all(f"[data-kind={kind}] button")]
        for kind in ("appeared", "vanished", "flipped")
    }
    assert listed == {"appeared": [13, 12, 14], "vanished": [11, 10], "flipped": [15]}
    page.click("[data-kind=flipped] button")
    assert page.state()["selected"] == 15


# ------------------------------------------------------------------------------------------------- the server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PageServer]:
    linked().save(tmp_path / "run")
    made = served(tmp_path / "run", linked())
    thread = threading.Thread(target=made.run, daemon=True)
    thread.start()
    yield made
    made.stop()
    thread.join(10)


def test_a_served_page_saves_and_two_tabs_are_merged(server: PageServer, browser: Any, tmp_path: Path) -> None:
    page = Page(browser, tmp_path)
    browser.get(server.url)
    page.frames()
    first = browser.current_window_handle
    page.js("tracerPage.write('notes', 0, 'mine')")
    command(page, "s")
    wait_for(lambda: page.text("#remarks").startswith("Saved to the run folder"))
    assert page.text("#unsaved") == ""
    assert [note.note for note in supernodes_file.read(tmp_path / "run").notes] == ["mine"]
    browser.switch_to.new_window("tab")
    try:
        browser.get(server.url)
        page.frames()
        assert page.state()["notes"] == [[0, "mine"]]
        page.js("tracerPage.write('notes', 1, 'theirs')")
        page.click("#save")
        wait_for(lambda: page.text("#remarks").startswith("Saved"))
        browser.switch_to.window(first)
        page.js("tracerPage.write('names', 0, 'a name')")
        page.js("document.getElementById('remarks').replaceChildren()")
        page.click("#save")
        wait_for(lambda: "was changed since" in page.text("#remarks"))
        page.find("#remarks p button:nth-of-type(2)").click()
        assert (page.state()["names"], page.state()["notes"]) == ([[0, "a name"]], [[0, "mine"], [1, "theirs"]])
        page.click("#save")
        wait_for(lambda: len(supernodes_file.read(tmp_path / "run").notes) == 2)
        wait_for(lambda: page.text("#unsaved") == "")
        assert supernodes_file.read(tmp_path / "run").notes[0].name == "a name"
        reload(page)
        assert page.all("#remarks p") == []
        assert page.state()["names"] == [[0, "a name"]]
    finally:
        for handle in browser.window_handles:
            if handle != first:
                browser.switch_to.window(handle)
                browser.close()
        browser.switch_to.window(first)


def test_a_page_from_a_file_asks_no_network(open_page: Open) -> None:
    page = open_page(SMALL)
    settle(page)
    assert page.js("return performance.getEntriesByType('resource').length") == 0
    code = (
        "const done = arguments[1]; const seen = [];"
        "document.addEventListener('securitypolicyviolation', (e) => seen.push(e.effectiveDirective));"
        "fetch(arguments[0]).catch(() => 0).then(() => {"
        "new Image().src = arguments[0]; setTimeout(() => done(seen), 300) })"
    )
    with socket.create_server(("127.0.0.1", 0)) as there:
        seen = page.driver.execute_async_script(code, f"http://127.0.0.1:{there.getsockname()[1]}/")
        there.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody came
            there.accept()
    assert set(seen) == {"connect-src", "img-src"}
    page.complaints()  # that the policy says so


def test_thousands_of_notes_are_kept_in_the_browser(open_page: Open, record_property: Any) -> None:
    made = payload(4989, 100_000, n_layers=24)
    page = open_page(dataclasses.replace(made, remarks={row: f"note {row}" for row in range(2000)}))
    page.js("tracerPage.write('notes', 1, 'another')")
    took = page.js("const t = performance.now(); tracerPage.flush(); return performance.now() - t")
    record_property("milliseconds to keep 2,000 notes", took)
    assert "too long for a link" in page.text("#remarks")  # the address has the view alone
    page.js("location.reload()")
    wait_for(lambda: page.js("return typeof tracerPage === 'object'"))
    wanted = {row: f"note {row}" for row in range(2000)} | {1: "another"}
    wait_for(lambda: dict(page.state()["notes"]) == wanted)
