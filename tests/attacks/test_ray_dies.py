"""A Ray of tracer's own, a part of which dies in the middle of a run: it ends at once, and nothing done is lost."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import runs
from tally import Attack
from tracer.errors import RunError
from tracer.runs import status
from tracer.runs.driver import run

ray: Any = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.long]

SOON = 30.0  # seconds in which a run ends, Ray's own shutdown among them; it was ten minutes
TINY = "fake_runs:Tiny"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", str(runs.TESTS))
    if ray.is_initialized():
        ray.shutdown()


@pytest.mark.parametrize("at", [1, 40], ids=["early", "late"])
@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_a_ray_that_dies_ends_the_run(attack: Attack, tmp_path: Path, name: str, at: int) -> None:
    rows = [{"id": f"slow/{number}", "text": f"prompt {number}"} for number in range(80)]
    made = {"kind": "dataset", "input": {"path": runs.lines(tmp_path / "rows.jsonl", rows)}, "shard_size": 4}
    killed, there = list[float](), list[psutil.Process]()
    seen: list[int] = []

    def watch(found: status.Status) -> None:
        seen.append(found.done)
        if found.done >= at and not killed:
            there.extend(psutil.Process().children(recursive=True))
            next(one for one in there if one.name() == name).kill()
            killed.append(time.monotonic())

    run(made, tmp_path / "whole", workers=1, factory=TINY)
    with attack("kills of a local Ray") as tally:
        tally.tried += 1
        try:
            run(made, tmp_path / "run", ray="local", workers=1, factory=TINY, watch=watch, start_timeout=60.0)
            tally.silent += 1
        except RunError as error:
            tally.worst = str(error)
        tally.hung += time.monotonic() - killed[0] > SOON
        before = status.condition(tmp_path / "run")
        tally.lost += max(0, max(seen) - before.status.done)
        tally.silent += before.status.state != "failed"
        tally.marks += len(psutil.wait_procs(there, timeout=5)[1])  # its workers too, whose raylet is gone
        again = run(made, tmp_path / "run", workers=1, factory=TINY)
        tally.lost += before.status.committed - again.resumed
        runs.same(tmp_path / "run", tmp_path / "whole")
        assert f"has lost its {name}" in tally.worst
