"""Take docs/page.png: the graph page of a run folder, in headless Chromium.

python tools/screenshot.py runs/demo docs/page.png
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import tracer
from tracer.circuit.circuit import load_graph

FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
FLAGS += "--disable-component-update --disable-sync --hide-scrollbars --window-size=1440,860 --virtual-time-budget=3000"


def main() -> None:
    """Write the page and photograph it."""
    source, target = Path(sys.argv[1]), Path(sys.argv[2]).resolve()
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or sys.exit("no chromium on this machine")
    with tempfile.TemporaryDirectory() as folder:
        page = tracer.view(load_graph(source), Path(folder) / "page.html")
        command = [
            browser,
            *FLAGS.split(),
            f"--user-data-dir={folder}/profile",
            f"--screenshot={target}",
            page.as_uri(),
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=120)


if __name__ == "__main__":
    main()
