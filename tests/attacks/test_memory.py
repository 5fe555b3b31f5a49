"""Memory that is not there: a run finds a size that fits, or ends and says what there is; no prompt is blamed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import runs
import tracer
from tally import Attack, Tally
from tracer.errors import RunError
from tracer.runs import status
from tracer.runs.driver import run
from tracer.store.run_folder import RunFolder
from tracer.system import machine
from tracer.system.machine import Memory

COUNT, MIB = 96, 2**20
GROUPS = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(runs.TESTS))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def job(path: Path, tokens: int = 0) -> dict[str, Any]:
    """Good prompts, of so many tokens or of some words, in one shard."""
    dice = random.Random(1)
    rows = [
        {"target": " are", "foil": " is", "token_ids": [dice.randrange(10, 900) for _ in range(tokens)]}
        if tokens
        else {"text": f"prompt {number}"}
        for number in range(COUNT)
    ]
    return {"kind": "dataset", "input": {"path": runs.lines(path / "prompts.jsonl", rows)}, "shard_size": COUNT}


def blamed(tally: Tally, out: Path, done: int = COUNT) -> None:
    """Count prompts that are not ok, or doubled; and those that the journal blames."""
    found = status.condition(out).status
    tally.lost += done - found.statuses.get("ok", 0)
    if (journal := out / "_journal" / "deaths.json").exists():
        tally.lost += len(json.loads(journal.read_text())["quarantined"])
    ids = [i for one in RunFolder(out).commits() for i in RunFolder(out).read_committed(one, "prompts")["prompt_id"]]
    tally.doubled += len(ids) - len(set(ids))


# ------------------------------------------------------------------------------------------- workers that are killed


@pytest.mark.parametrize("holds", [20, pytest.param(3, marks=[pytest.mark.slow, pytest.mark.long])])
def test_a_batch_that_memory_does_not_hold_is_halved_until_it_does(
    holds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: Attack
) -> None:
    made = job(tmp_path)
    with attack("batches larger than memory") as tally:
        tally.tried += 1
        monkeypatch.setenv("FAKE_RUNS_HOLDS", str(COUNT))
        run(made, tmp_path / "whole", workers=1, factory="fake_runs:Hungry")
        monkeypatch.setenv("FAKE_RUNS_HOLDS", str(holds))
        try:
            found = run(made, tmp_path / "run", workers=1, factory="fake_runs:Hungry")
        except RunError as error:
            tally.worst, deaths = str(error), 0
        else:
            deaths = found.status.deaths
        blamed(tally, tmp_path / "run")
    runs.same(tmp_path / "run", tmp_path / "whole")
    assert runs.orphans(tmp_path / "run") == set(), "what was kept is not left over"
    assert deaths == {20: 4, 3: 6}[holds], "as it was, and in halves"


@pytest.mark.slow
@pytest.mark.long
def test_where_nothing_fits_the_run_ends_says_what_there_is_and_goes_on_where_there_is_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: Attack
) -> None:
    """Memory is gone in the middle: what was done before is kept, and not done again."""
    made = job(tmp_path)
    with attack("no memory at all") as tally:
        tally.tried += 1
        monkeypatch.setenv("FAKE_RUNS_HOLDS", "0")
        started, said = time.monotonic(), ""
        try:
            run(made, tmp_path / "run", workers=1, factory="fake_runs:Hungry")
        except RunError as error:
            said = str(error)
        tally.hung += time.monotonic() - started > 300
        blamed(tally, tmp_path / "run", done=0)
        tally.silent += "memory" not in said
        tally.worst = said
    assert "10 workers in a row: died while no prompt was done" in said
    assert f"of memory free of {machine.gib(machine.memory().total)}" in said
    monkeypatch.setenv("FAKE_RUNS_HOLDS", str(COUNT))
    assert run(made, tmp_path / "run", workers=1, factory="fake_runs:Hungry").status.statuses == {"ok": COUNT}


@pytest.mark.slow
@pytest.mark.long
def test_what_was_kept_outlives_its_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: Attack) -> None:
    made = job(tmp_path)
    with attack("no memory from the middle on") as tally:
        tally.tried += 1
        monkeypatch.setenv("FAKE_RUNS_HOLDS", str(COUNT))
        run(made, tmp_path / "whole", workers=1, factory="fake_runs:Hungry")
        monkeypatch.setenv("FAKE_RUNS_HOLDS", f"{COUNT} 0")
        try:
            run(made, tmp_path / "run", workers=1, factory="fake_runs:Hungry")
        except RunError as error:
            tally.worst = str(error)
        parts = json.loads((tmp_path / "run" / "_journal" / "deaths.json").read_text()).get("parts", {})
        kept = sum(part["files"]["prompts"]["rows"] for part in parts.get("0", ()))
        tally.lost += COUNT // 2 - kept
        monkeypatch.setenv("FAKE_RUNS_HOLDS", f"0 {COUNT}")
        found = run(made, tmp_path / "run", workers=1, factory="fake_runs:Hungry")
        blamed(tally, tmp_path / "run")
    assert found.status.deaths == 0
    runs.same(tmp_path / "run", tmp_path / "whole")


def test_a_plan_is_made_with_what_the_process_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: Attack
) -> None:
    with attack("plans for a host that is not theirs") as tally:
        for size in (440, 800, 2000):
            there = Memory(760 * MIB, size * MIB, "of the cgroup")
            monkeypatch.setattr(machine, "memory", lambda there=there: there)
            made = tracer.plan(job(tmp_path, 70))
            tally.tried += 1
            tally.silent += made.workers * (made.rows[-1].single.host - 150 * MIB) > size * MIB
            assert "of the cgroup" in made.room
    monkeypatch.setattr(machine, "memory", lambda: Memory(300 * MIB, 90 * MIB, "of SLURM"))
    assert tracer.plan(job(tmp_path, 70)).workers == 0


# ------------------------------------------------------------------------------------------------- the real thing


@contextlib.contextmanager
def group(size: int) -> Iterator[Path]:
    """A control group of so many bytes, of either version; skipped where none can be made."""
    first = (GROUPS[0] / "memory.limit_in_bytes").exists()
    top, limit = (GROUPS[0], "memory.limit_in_bytes") if first else (GROUPS[1], "memory.max")
    made = top / f"tracer-test-{os.getpid()}"
    try:
        made.mkdir()
        (made / limit).write_text(str(size))
    except OSError:
        with contextlib.suppress(OSError):
            made.rmdir()
        pytest.skip("no control group can be made here")
    try:
        yield made
    finally:
        end = time.monotonic() + 30
        while made.exists() and time.monotonic() < end:
            with contextlib.suppress(OSError):  # the last of its processes is still ending
                made.rmdir()
            time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("options", "shard_size"), [((), COUNT), (("--workers", "2"), 24)])
def test_in_760_mib_every_prompt_is_ok(
    options: tuple[str, ...], shard_size: int, tmp_path: Path, attack: Attack
) -> None:
    made = job(tmp_path, 70) | {"nodes": 50, "shard_size": shard_size}
    (tmp_path / "job.yaml").write_text(json.dumps(made))
    with attack("a cgroup of 760 MiB") as tally, group(760 * MIB) as place:
        enter = f'echo $$ > {place}/cgroup.procs && exec "$@"'
        command = [sys.executable, "-m", "tracer", "run", str(tmp_path / "job.yaml"), "--out", str(tmp_path / "run")]
        done = subprocess.run(
            ["sh", "-c", enter, "sh", *command, *options], capture_output=True, text=True, check=False, timeout=550
        )
        tally.tried += 1
        tally.tracebacks += "Traceback" in done.stderr
        tally.worst = (done.stdout + done.stderr)[-600:]
        blamed(tally, tmp_path / "run")
    assert done.returncode == 0
    assert "of 760 MiB of the cgroup" in done.stderr + done.stdout
