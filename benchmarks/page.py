"""How fast the graph page answers in headless Chromium: random circuits of several sizes, opened from a file.

First paint runs from the start of navigation until the frame after the first picture; every other figure from the
event's own time stamp until the frame after the picture that answers it, so that waiting for the screen is in it.
Each is the median of several repetitions, each with another value.

    python benchmarks/page.py [--quick] [--repeat 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from tracer.reports import viewer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
from browser import BROWSER, DRIVER, FLAGS, Page, busiest, forget
from payloads import payload

SIZES = [(310, 10_000), (2_000, 100_000), (5_000, 100_000), (5_000, 1_000_000)]
"""Nodes and edges; 310 nodes have no more than about 3 * 10^4 pairs of which one lies below the other."""
TOKENS = [f" token{at}" for at in range(40)]
N_LAYERS = 24
WHEEL = """
const canvas = document.getElementById('canvas'), box = canvas.getBoundingClientRect();
canvas.dispatchEvent(new WheelEvent('wheel', {
  bubbles: true, cancelable: true, deltaY: arguments[0],
  clientX: box.x + box.width / 2, clientY: box.y + box.height / 2,
}));
"""
HOVER = """
const canvas = document.getElementById('canvas'), box = canvas.getBoundingClientRect();
const at = tracerPage.position(arguments[0]);
for (const type of ['pointermove', 'mousemove'])
  canvas.dispatchEvent(new PointerEvent(type, { bubbles: true, clientX: box.x + at.x, clientY: box.y + at.y }));
"""
Act = Callable[[int], Any]


def main() -> None:
    """Measure every size and print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help="the two smaller sizes alone")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="repetitions of each figure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, in ms, to this file")
    options = parser.parse_args()
    if not (BROWSER and DRIVER):
        sys.exit("no chromium and chromedriver on this machine")
    found = [measured(*size, options.repeat) for size in (SIZES[:2] if options.quick else SIZES)]
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def table(found: Sequence[dict[str, Any]]) -> str:
    """The figures as a table in Markdown, milliseconds."""
    names = list(found[0])
    lines = [names, ["---:"] * len(names)]
    lines += [[f"{row[name]:,.0f}" for name in names] for row in found]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def measured(n_nodes: int, n_edges: int, repeat: int) -> dict[str, Any]:
    """Every figure of a circuit of this size, in ms, by what the reader does."""
    made = payload(n_nodes - len(TOKENS) - 2, n_edges, n_layers=N_LAYERS, tokens=TOKENS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "page.html"
        file.write_text(viewer.page(made), encoding="utf-8")
        driver = opened(folder)
        try:
            page = Page(driver, folder)
            first = [_first(page, file) for _ in range(repeat)]
            rest = {what: median(_each(page, act, repeat)) for what, act in acts(page, made).items()}
        finally:
            driver.quit()
    return {"nodes": n_nodes, "edges": n_edges, "first paint": median(first), **rest}


def opened(folder: Path) -> Any:
    """A browser that keeps its things in `folder`."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER or ""
    for flag in FLAGS.split():
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={folder / 'profile'}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_script_timeout(60)
    return driver


def _first(page: Page, file: Path) -> float:
    forget(page.driver)
    page.driver.get(file.as_uri())
    page.frames()
    return page.js("return tracerPage.stats.firstPaintMs")


def _each(page: Page, act: Act, repeat: int) -> list[float]:
    """The time that each repetition takes; what is done ahead of time, such as ranking, is done before."""
    times = []
    for at in range(repeat):
        page.driver.execute_async_script("setTimeout(arguments[0], 700)")
        act(at)
        page.frames()
        times.append(page.js("return tracerPage.stats.lastInteractionMs"))
    return times


def acts(page: Page, made: viewer.Payload) -> dict[str, Act]:
    """What the reader does, in this order, by its name."""
    ends = np.concatenate([made.edges.source, made.edges.target])
    rows = np.argsort(-np.bincount(ends, minlength=len(made.nodes.kind)), kind="stable").tolist()

    def fill(at: int) -> None:
        page.js(
            "const box = document.getElementById('search'); box.value = arguments[0];"
            "box.dispatchEvent(new Event('input', { bubbles: true }))",
            f"token{at + 1}",
        )

    def slide(name: str, step: int) -> None:
        page.js(
            "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
            "e.dispatchEvent(new Event('input', { bubbles: true }))",
            name,
            step,
        )

    def pin(at: int) -> None:
        page.js("tracerPage.select(arguments[0])", rows[at])
        page.frames()
        page.js("document.querySelector('#chosen [data-key=pin]').click()")

    repeated = 20  # so that no node is unpinned that was pinned before
    return {
        "hover": lambda at: page.js(HOVER, rows[at]),
        "select": lambda at: page.js("tracerPage.select(arguments[0])", busiest(made) if not at else rows[at]),
        "node slider": lambda at: slide("node-threshold", 300 + 100 * at),
        "edge slider": lambda at: slide("edge-threshold", 300 + 40 * at),
        "both back": lambda at: (slide("node-threshold", at % 2), slide("edge-threshold", at % 2)),
        "search": fill,
        "zoom": lambda at: page.js(WHEEL, -60 if at % 2 else 60),
        "pin": pin,
        "pin, pane open": lambda at: (_open_pane(page), pin(repeated + at)),
    }


def _open_pane(page: Page) -> None:
    if not page.state()["subgraphOpen"]:
        page.click("#subgraph-toggle")
        page.frames()


if __name__ == "__main__":
    main()
