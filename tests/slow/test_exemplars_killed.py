"""An exemplars run by real processes, killed and resumed: the bytes of one that was left alone."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import pytest

import tracer
from runs import Driver

pytestmark = pytest.mark.slow
OUTPUTS = ("exemplars.parquet", "densities.parquet")


def test_a_killed_run_is_resumed_by_other_workers_to_the_same_bytes(tmp_path: Path) -> None:
    dice = random.Random(0)
    words = "the cars near a house run to Ohio and girls said he is happy".split()
    rows = [{"text": " ".join(dice.choices(words, k=dice.choice((4, 30, 200))))} for _ in range(400)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    neurons = [f"{layer}/{neuron}" for layer in range(4) for neuron in range(0, 40, 2)]
    job = {"kind": "exemplars", "input": {"path": str(path)}, "neurons": neurons, "shard_size": 20, "window": 32}
    killed = Driver(job, tmp_path / "killed", workers=1)
    killed.committed(40)
    killed.end(signal.SIGKILL)
    again = tracer.run(job, tmp_path / "killed", workers=3)
    assert again.resumed >= 2
    tracer.run(job, tmp_path / "whole", workers=1)
    for name in OUTPUTS:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
