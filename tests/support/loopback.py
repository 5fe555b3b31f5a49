"""The loop-back server as tests hold it: its process, the models it serves, and prompts for them (see conftest.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

import tiny as t
import tracer
from tracer import demo
from tracer.ndif import server as ndif

FAMILIES = (
    "gemma2",
    "gpt2",
    "qwen3_moe",
)  # soft-caps, sandwich norms; biases, LayerNorm, no gate; experts beside an MLP
LIMITS = ndif.Limits(wait=30.0, patience=5.0, busy=5.0, lost=0.6, quiet=0.0)


@dataclass
class Loopback:
    """The server's process, how it is told to behave, and the models it serves."""

    host: str
    process: subprocess.Popen[str]
    folders: dict[str, str]
    local: dict[str, tracer.Model] = field(default_factory=dict)
    there: dict[tuple[str, str | None], tracer.Model] = field(default_factory=dict)

    def mode(self, **how: Any) -> None:
        httpx.post(f"{self.host}/_mode", json=how).raise_for_status()

    def seen(self) -> dict[str, int]:
        return httpx.get(f"{self.host}/_seen").json()

    def load(self, name: str = "demo", limits: ndif.Limits = LIMITS, **options: Any) -> tracer.Model:
        return tracer.load(self.folders.get(name, name), remote=True, host=self.host, limits=limits, **options)

    def pair(self, name: str, weights: str | None = None) -> tuple[tracer.Model, tracer.Model]:
        """A model there and here, loaded once."""
        if name not in self.local:
            self.local[name] = tracer.load(self.folders.get(name, name), device="cpu", attention="eager")
        if (name, weights) not in self.there:
            self.there[name, weights] = self.load(name, attention="eager", weights=weights)
        return self.there[name, weights], self.local[name]


def start(models: dict[str, str], cwd: Path) -> Loopback:
    script = Path(__file__).with_name("ndif_server.py")
    given = [f"{name}={folder}" for name, folder in models.items()]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "NDIF"))}
    with (cwd / "server.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(script), *given],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=cwd,
            env=clean,
        )
    assert process.stdout is not None
    port = process.stdout.readline().strip()
    assert port, (cwd / "server.log").read_text()
    return Loopback(f"http://127.0.0.1:{port}", process, {})


def stop(server: Loopback) -> None:
    server.process.kill()
    server.process.wait()
    assert server.process.stdout is not None
    server.process.stdout.close()


def served(place: Path) -> Iterator[Loopback]:
    """A server of the demo model and of tiny models, saved below `place`; it ends with the generator."""
    folders = {family: str(t.save(t.tiny(family, n_layers=2), place / family)) for family in FAMILIES}
    other = str(t.save(t.tiny("llama", seed=1), place / "other"))
    folders["changed"] = str(t.save(t.tiny("llama", seed=2), place / "changed"))
    half = folders["half"] = str(t.save(t.tiny("qwen3"), place / "half"))
    served = {
        "demo": str(demo.path()),
        half: f"{half}@bfloat16",
        **{folders[family]: folders[family] for family in FAMILIES},
    }
    server = start(served | {folders["changed"]: other}, place)
    server.folders = folders
    try:
        yield server
    finally:
        stop(server)


def prompts(name: str) -> list[tracer.Prompt]:
    """Of different lengths, so that a batch is padded."""
    if name == "demo":
        texts = ("The secretaries near the car", "The key near the cabinet"), ("The parents", "The parent")
        return [tracer.Prompt(a, target=" are", foil=" is", counterfactual=b) for a, b in texts]
    rows, others = ([1, 30, 45, 52, 60], [1, 44, 36]), ([1, 31, 46, 53, 61], [1, 45, 37])
    return [
        tracer.Prompt(token_ids=row, target=7, foil=8, counterfactual=other)
        for row, other in zip(rows, others, strict=True)
    ]
