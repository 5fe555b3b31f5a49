"""The page in a real Chromium, opened from a file: the browser, a page in it with the moves that tests make, and what
a circuit's arrays say that the page must show.

`tests/slow/conftest.py` gives the fixtures to the tests there; a module of such tests says
``pytestmark = browser.MARKS``. Needs selenium, chromium and chromedriver, and is skipped without.
"""

from __future__ import annotations

import json
import shutil
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from payloads import payload
from tracer.reports import viewer

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MARKS = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="no chromium and chromedriver on this machine"),
    pytest.mark.filterwarnings("default"),
]
FLAGS = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update "
    "disable-sync window-size=1440,900"
)
SVG = "{http://www.w3.org/2000/svg}"
SMALL = payload(49, 300, n_layers=6)
"""The page that most tests are about: 60 nodes."""


class Page:
    """One page in the browser, with the few moves the tests make."""

    def __init__(self, driver: Any, downloads: Path) -> None:
        self.driver, self.downloads = driver, downloads

    def moves(self) -> Any:
        """A chain of what a hand does, to be performed."""
        from selenium.webdriver.common.action_chains import ActionChains

        return ActionChains(self.driver)

    def js(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def state(self) -> dict[str, Any]:
        return self.js("return tracerPage.state()")

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def text(self, selector: str) -> str:
        return self.js("return document.querySelector(arguments[0]).textContent", selector)

    def click(self, selector: str) -> None:
        self.find(selector).click()

    def select(self, row: int) -> None:
        self.js("tracerPage.select(arguments[0])", row)
        self.frames()

    def frames(self) -> None:
        """Wait until what was asked for is drawn."""
        self.driver.execute_async_script(
            "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done)))"
        )

    def slide(self, name: str, step: int) -> None:
        self.js(
            "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
            "e.dispatchEvent(new Event('input', { bubbles: true }))",
            name,
            step,
        )
        self.frames()

    def keys(self, *pressed: str) -> None:
        self.moves().send_keys(*pressed).perform()
        self.frames()

    def place(self, row: int) -> tuple[int, int]:
        """Where a node is, in pixels from the middle of the canvas."""
        at, size = self.js("return tracerPage.position(arguments[0])", row), self.find("#canvas").rect
        return round(at["x"] - size["width"] / 2), round(at["y"] - size["height"] / 2)

    def hover(self, row: int) -> None:
        self.moves().move_to_element_with_offset(self.find("#canvas"), *self.place(row)).perform()
        self.frames()

    def click_node(self, row: int, *held: str) -> None:
        """Click on a node while keys are held."""
        moves = self.moves()
        for key in held:
            moves.key_down(key)
        moves.move_to_element_with_offset(self.find("#canvas"), *self.place(row)).click()
        for key in held:
            moves.key_up(key)
        moves.perform()
        self.frames()

    def draw(self, points: Sequence[tuple[int, int]], *held: str) -> None:
        """Drag the pointer along points, in pixels from the middle of the canvas, while keys are held."""
        moves, canvas = self.moves(), self.find("#canvas")
        for key in held:
            moves.key_down(key)
        moves.move_to_element_with_offset(canvas, *points[0]).click_and_hold()
        for x, y in points[1:]:
            moves.move_to_element_with_offset(canvas, x, y)
        moves.release()
        for key in held:
            moves.key_up(key)
        moves.perform()
        self.frames()

    def change(self, name: str, value: str | bool) -> None:
        """Set a field, a choice or a box by its id, as a reader does at the end."""
        self.js(
            "const e = document.getElementById(arguments[0]), v = JSON.parse(arguments[1]);"
            "if (typeof v === 'boolean') e.checked = v; else e.value = v;"
            "for (const t of ['input', 'change']) e.dispatchEvent(new Event(t, { bubbles: true }))",
            name,
            json.dumps(value),  # a lone surrogate goes no other way
        )
        self.frames()

    def drawn(self, shape: str, name: str) -> list[ET.Element]:
        """The marks of a name in the picture as SVG."""
        return ET.fromstring(self.js("return tracerPage.svg()")).findall(f".//{SVG}{shape}[@class='{name}']")

    def pin(self, *rows: int) -> None:
        for row in rows:
            self.select(row)
            self.click("#chosen [data-key=pin]")

    def group(self, name: str, *rows: int) -> None:
        self.pin(*rows)
        self.find("#group-name").send_keys(name)
        self.click("#group-form button")

    def saved(self, name: str) -> bytes:
        path, deadline = self.downloads / name, time.monotonic() + 20
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        return path.read_bytes()

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in FLAGS.split():
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[Callable[[viewer.Payload], Page]]:
    """Opens pages from files, and sees at the end that none complained."""
    pages: list[Page] = []

    def opened(made: viewer.Payload) -> Page:
        path = tmp_path / f"page{len(pages)}.html"
        path.write_text(viewer.page(made), encoding="utf-8")
        browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
        forget(browser)
        browser.get(path.as_uri())
        pages.append(Page(browser, tmp_path))
        pages[-1].frames()
        return pages[-1]

    yield opened
    assert [text for page in pages for text in page.complaints()] == []


def forget(browser: Any) -> None:
    """Leave the page, and forget what pages that are opened from files kept in the browser."""
    browser.get("about:blank")
    kept = {"origin": "file://", "storageTypes": "local_storage"}
    browser.execute_cdp_cmd("Storage.clearDataForOrigin", kept)


@pytest.fixture
def small(open_page: Callable[[viewer.Payload], Page]) -> Page:
    return open_page(SMALL)


@pytest.fixture
def phone(browser: Any) -> Iterator[None]:
    """The window as wide as a phone: narrower than Chromium lets a window be."""
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    yield
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def strongest(made: viewer.Payload, end: str, row: int, measure: str = "attribution", sign: int = 0) -> list[int]:
    """The other ends of a node's edges, strongest first; those of one sign alone, if it is not 0."""
    other = "target" if end == "source" else "source"
    value = np.nan_to_num(getattr(made.edges, measure))
    wanted = (value >= 0) if sign > 0 else (value < 0) if sign < 0 else np.ones(len(value), bool)
    mine = np.flatnonzero((getattr(made.edges, end) == row) & wanted)
    order = mine[np.argsort(-np.abs(value)[mine], kind="stable")]
    return [int(at) for at in getattr(made.edges, other)[order]]


def busiest(made: viewer.Payload) -> int:
    n = len(made.nodes.kind)
    into, out = (np.bincount(ends, minlength=n) for ends in (made.edges.target, made.edges.source))
    return int(np.argmax(np.minimum(into, out)))


def wait_for(said: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not said() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert said()
