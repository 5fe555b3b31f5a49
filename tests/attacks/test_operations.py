"""A driver dies before every operation on a file, each once, and the next one goes on: the tables are the same."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

import children
from tally import Attack

LARGE = [pytest.mark.slow, pytest.mark.long]


@pytest.mark.parametrize(
    ("what", "step"),
    [
        ("run", 7),
        *(pytest.param(what, 1, marks=LARGE) for what in ("run", "grow", "retry")),
        pytest.param("parts", 5, marks=LARGE),
    ],
)
def test_a_driver_that_dies_before_any_file_operation_is_followed(
    what: str, step: int, tmp_path: Path, attack: Attack
) -> None:
    with attack(f"deaths before a file operation, {what}") as tally:
        done = subprocess.run(
            children.command("operations", tmp_path, what, step, 3 % step),
            capture_output=True,
            text=True,
            check=False,
            timeout=550,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "FAKE_RUNS_STATE": str(tmp_path)},
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        tally.tried += found["tried"]
        tally.lost += found["lost"]
        tally.silent += found["silent"]
        tally.tracebacks += found["tracebacks"]
        tally.worst = found["worst"] + (done.stderr[-800:] if found["tracebacks"] else "")
    assert tally.tried >= found["operations"] // step
