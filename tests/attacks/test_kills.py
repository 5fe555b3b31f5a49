"""Workers and drivers are killed at random moments: every prompt is there once, and the tables are those of an
undisturbed run, to the bit."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import runs
from sabotage import Sabotage
from tally import Attack, Tally
from tracer.errors import TracerError
from tracer.runs.driver import Run, run
from tracer.runs.jobs import Source
from tracer.runs.workers.processes import LocalPool
from tracer.store.run_folder import RunFolder

LARGE = [pytest.mark.slow, pytest.mark.long]
COUNT = 48
Whole = Callable[[str], Run]


@pytest.fixture(scope="module", autouse=True)
def _environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(runs.TESTS))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield


def job(path: Path, worker: str) -> dict[str, Any]:
    """Two prompts a shard, each slow enough to be met."""
    from tracer import data

    rows = [
        {"id": f"slow/{number}", "text": row.text, "target": " are", "foil": " is"}
        for number, row in enumerate(data.read(Source(task="sva", structure="nounpp", count=COUNT)))
    ]
    made = {"kind": "dataset", "input": {"path": runs.lines(path / "prompts.jsonl", rows)}, "shard_size": 2}
    return made | ({"nodes": 12, "batch": 1, "circuit": "free"} if worker == "Faulty" else {})


@pytest.fixture(scope="module")
def whole(_environment: None, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The undisturbed run of a kind of worker: one at a time."""
    made: dict[str, Run] = {}

    def of(worker: str) -> Run:
        if worker not in made:
            path = tmp_path_factory.mktemp(worker)
            made[worker] = run(job(path, worker), path / "run", workers=1, factory=f"fake_runs:{worker}")
        return made[worker]

    return of


def compare(tally: Tally, out: Path, undisturbed: Run) -> None:
    """Count what was lost, what is there twice, and what is other than in the undisturbed run."""
    folder = RunFolder(out)
    ids = [i for commit in folder.commits() for i in folder.read_committed(commit, "prompts")["prompt_id"].to_pylist()]
    told = {row: status for row, (status, _) in runs.statuses(out).items()} if len(ids) == COUNT else {}
    tally.lost += COUNT - len(set(ids)) + sum(status != "ok" for status in told.values())
    tally.doubled += len(ids) - len(set(ids))
    try:
        runs.same(out, undisturbed.address)
    except AssertionError as error:
        tally.silent += 1
        tally.worst = str(error)
    tally.lost += len(runs.orphans(out))


@pytest.mark.parametrize(
    ("kind", "worker", "kills"),
    [
        ("local", "Tiny", 4),
        pytest.param("local", "Tiny", 20, marks=LARGE),
        pytest.param("local", "Faulty", 20, marks=LARGE),
        pytest.param("ray", "Faulty", 20, marks=LARGE),
    ],
)
def test_workers_killed_at_random(
    kind: str, worker: str, kills: int, tmp_path: Path, whole: Whole, attack: Attack
) -> None:
    undisturbed = whole(worker)
    with attack(f"kills of workers, {kind}") as tally:
        if kind == "ray":
            pytest.importorskip("ray")
            from tracer.runs.workers.cluster import RayPool

            inner: Any = RayPool("local", num_cpus=2)
        else:
            inner = LocalPool()
        pool = Sabotage(inner, kills, kills, pause=0.3)
        try:
            run(job(tmp_path, worker), tmp_path / "run", workers=2, pool=pool, factory=f"fake_runs:{worker}")
        except TracerError as error:
            tally.lost += COUNT
            tally.worst = str(error)
        else:
            compare(tally, tmp_path / "run", undisturbed)
        tally.tried += kills - pool.left
    assert pool.left == 0


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    ("ray", "worker", "kills"),
    [
        (None, "Tiny", 1),
        pytest.param(None, "Tiny", 20, marks=LARGE),
        pytest.param(None, "Faulty", 20, marks=LARGE),
        pytest.param("local", "Tiny", 5, marks=LARGE),
    ],
)
def test_drivers_killed_at_random(
    ray: str | None, worker: str, kills: int, tmp_path: Path, whole: Whole, attack: Attack
) -> None:
    """Each is followed by the next, in the same folder, until a run ends; then in another folder."""
    if ray:
        pytest.importorskip("ray")
    undisturbed, dice, made = whole(worker), random.Random(kills), job(tmp_path, worker)
    options: dict[str, Any] = {"workers": 2, "factory": f"fake_runs:{worker}", "ray": ray}
    with attack(f"kills of drivers, {'ray' if ray else 'local'}") as tally:
        for number in range(kills):
            out = tmp_path / f"run-{number}"
            while tally.tried < kills:
                driver = runs.Driver(made, out, **options)
                driver.wait_for(lambda line: line.startswith("done "))  # it has begun to write
                time.sleep(dice.random() * 4)
                if driver.process.poll() is not None:
                    break  # it was faster
                tally.tried += 1
                driver.end(signal.SIGKILL)
            last = runs.Driver(made, out, **options)
            if last.end() != 0:
                tally.tracebacks += "Traceback" in last.said[-1]
                tally.lost += COUNT
                tally.worst = last.said[-1][-500:]
            else:
                compare(tally, out, undisturbed)
            if tally.tried >= kills:
                break
