"""Take the pictures of the graph page and the report: a run folder's, in headless Chromium, of 256 colours each.

    tracer trace "the capital of the state containing Dallas is" --metric topk --profiles --nodes 60 --out runs/dallas
    tracer group runs/dallas --clusters 5 --method agglomerative
    tracer evaluate runs/dallas
    tracer view runs/dallas
    python tools/screenshot.py runs/dallas docs

writes docs/page.png and, in docs/img, page-phone.png, page-dark.png, subgraph.png and report.png.
"""

from __future__ import annotations

import base64
import io
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

FLAGS = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-sync "
FLAGS += "disable-component-update hide-scrollbars allow-file-access-from-files"
DESK, PHONE = (1280, 820), (390, 844)
LARGEST = 200_000
CHOOSE = """
const neuron = [...document.querySelectorAll('#chosen [data-row]')].find((one) => /^L\\d/.test(one.textContent));
tracerPage.select(Number(neuron.dataset.row));
"""
OPEN_SUBGRAPH = """
for (const id of ['fold-controls', 'fold-details', 'subgraph-toggle']) document.getElementById(id).click();
const split = document.getElementById('split');
for (let i = 0; i < 2; i += 1) split.dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowUp' }));
"""
FIT_SUBGRAPH = "document.getElementById('subgraph-fit').click()"
WAIT = 1.0
Shot = tuple[str, str, tuple[int, int], str, Sequence[str]]
SHOTS: list[Shot] = [
    ("page.png", "graph.html", DESK, "light", [CHOOSE]),
    ("img/page-phone.png", "graph.html", PHONE, "light", []),
    ("img/page-dark.png", "graph.html", DESK, "dark", [CHOOSE]),
    ("img/subgraph.png", "graph.html", (1280, 1000), "light", [OPEN_SUBGRAPH, FIT_SUBGRAPH]),
    ("img/report.png", "report.html", (1280, 1400), "light", []),
]
"""File, page, window, theme, and what is done before the picture is taken."""


def main() -> None:
    """Take every picture of the run folder's pages."""
    source, target = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    (target / "img").mkdir(parents=True, exist_ok=True)
    for shot in SHOTS:
        with tempfile.TemporaryDirectory() as profile:
            save(taken(source, shot, profile), target / shot[0])


def taken(source: Path, shot: Shot, profile: str) -> bytes:
    """The picture as PNG, of a browser that remembers nothing."""
    _, page, (width, height), theme, moves = shot
    driver = started(profile)
    try:
        tell = driver.execute_cdp_cmd
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < DESK[0]}
        tell("Emulation.setDeviceMetricsOverride", metrics)
        tell("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]})
        driver.get((source / page).as_uri())
        for move in moves:
            time.sleep(WAIT)
            driver.execute_script(move)
        time.sleep(WAIT)
        return base64.b64decode(tell("Page.captureScreenshot", {"format": "png"})["data"])
    finally:
        driver.quit()


def started(profile: str) -> Any:
    """Chromium with this folder as its profile."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = (
        shutil.which("chromium") or shutil.which("chromium-browser") or sys.exit("no chromium on this machine")
    )
    for flag in [*FLAGS.split(), f"user-data-dir={profile}"]:
        options.add_argument(f"--{flag}")
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))


def save(content: bytes, path: Path) -> None:
    """Write a picture in 256 colours; too large a file is an error."""
    picture = Image.open(io.BytesIO(content)).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    picture.save(path, optimize=True)
    size = path.stat().st_size
    print(f"{path}: {picture.width} x {picture.height}, {size / 1000:.0f} kB")
    if size > LARGEST:
        sys.exit(f"{path} has {size:,} bytes, more than {LARGEST:,}")


if __name__ == "__main__":
    main()
