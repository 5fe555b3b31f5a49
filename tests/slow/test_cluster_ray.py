"""RayPool against a worker that misbehaves: every event, lost nodes, and connections that are not the pool's own."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import children
import faulty
from helpers import refused
from tracer.errors import JobError, RunError
from tracer.runs.workers.cluster import RayPool, connection
from tracer.runs.workers.messages import Began, Broke, Died, Done, Event, Refused, Setup, Started, Task

ray: Any = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.long]  # whole runs on Ray are in test_run_faults.py
HERE = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def _environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE.parent / "support"))  # for the nodes, where faulty.py must be found
        yield


@pytest.fixture(scope="module")
def cluster(_environment: None) -> Iterator[None]:
    RayPool("local", num_cpus=2)  # stays connected: each test's pool finds it and leaves it open
    yield
    ray.shutdown()


@pytest.fixture
def pool(cluster: None) -> Iterator[RayPool]:
    one = RayPool("local")
    yield one
    one.close()
    assert ray.is_initialized()


def setup(*units: list[str], **fields: Any) -> Setup:
    job = {"units": list(units)} | fields.pop("job", {})
    return Setup(folder="nowhere", job=job, factory="faulty:Worker", **fields)


def until(pool: RayPool, kind: type, limit: float = 60.0) -> list[Event]:
    """Events up to the first of `kind`."""
    found: list[Event] = []
    end = time.monotonic() + limit
    while not any(isinstance(one, kind) for one in found):
        assert time.monotonic() < end, found
        found += pool.events(1.0)
    return found


def started(pool: RayPool, name: str, *units: list[str], **fields: Any) -> Started:
    pool.start(name, setup(*units, **fields))
    while not (found := pool.events(30.0)):
        pass
    (event,) = found
    assert isinstance(event, Started)
    return event


def test_units_are_done_with_the_threads_asked_for(pool: RayPool) -> None:
    event = started(pool, "a", ["ok", "slow:0.4"], ["ok"], threads=3)
    assert (event.worker, event.model, event.max_bytes) == ("a", faulty.MODEL, 1 << 20)
    pool.give("a", Task(unit=0))
    first = until(pool, Done)
    assert [one for one in first if isinstance(one, Began)][-1] == Began(worker="a", prompts=(1,), done=1)
    assert isinstance(first[-1], Done)
    outcome = first[-1].report.outcome
    assert outcome is not None
    assert outcome["OMP_NUM_THREADS"] == "3"
    assert (outcome["TOKENIZERS_PARALLELISM"], outcome["CUDA_VISIBLE_DEVICES"]) == ("false", "")
    assert f"process {outcome['pid']}" in event.where
    pool.give("a", Task(unit=1))
    assert all(one.prompts == (2,) for one in until(pool, Done) if isinstance(one, Began))
    assert pool.events(0.2) == []


def test_an_exception_leaves_the_worker_alive(pool: RayPool) -> None:
    started(pool, "a", ["raise"], ["odd"], ["refuse"], ["ok"])
    pool.give("a", Task(unit=0))
    broke = until(pool, Broke)[-1]
    assert isinstance(broke, Broke)
    assert broke.error.startswith("ValueError: a worker's bug (in behave, faulty.py:")
    pool.give("a", Task(unit=1))
    assert "OddError: odd 12" in str(until(pool, Broke)[-1])
    pool.give("a", Task(unit=2))
    refused = Refused(worker="a", kind="JobError", value="the prompt", rule="is wrong", next_step="mend it")
    assert until(pool, Refused)[-1] == refused
    pool.give("a", Task(unit=3))
    until(pool, Done)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("kill", "killed or crashed"),
        ("segv", "killed or crashed"),
        ("exit:3", "killed or crashed"),
        ("quit:4", "code 4"),
    ],
)
def test_a_dead_process_tells_what_it_had_begun(pool: RayPool, how: str, words: str) -> None:
    started(pool, "a", ["ok", "ok"], ["ok", "ok", "ok", how], job={"batch": 2})
    pool.give("a", Task(unit=0))
    until(pool, Done)
    pool.give("a", Task(unit=1))
    died = until(pool, Died)[-1]
    assert isinstance(died, Died)
    assert (died.prompts, died.blame) == ((4, 5), True)
    assert words in died.reason
    assert died.starved == (how != "quit:4"), "memory may have run out"
    started(pool, "a", ["ok"])  # its name is free again


def test_a_hanging_worker_is_killed(pool: RayPool) -> None:
    started(pool, "a", ["ok", "hang"])
    pool.give("a", Task(unit=0))
    assert until(pool, Began)[-1] in [Began(worker="a", prompts=(n,), done=n) for n in (0, 1)]
    time.sleep(0.5)
    begin = time.monotonic()
    pool.kill("a")
    assert until(pool, Died)[-1] == Died(worker="a", prompts=(1,), reason="killed by the driver", blame=True)
    assert time.monotonic() - begin < 5


def test_killing_idle_and_waiting_workers(pool: RayPool) -> None:
    started(pool, "idle", ["ok"])
    pool.kill("idle")
    assert until(pool, Died) == [Died(worker="idle", reason="killed by the driver")]
    pool.start("nowhere", setup(["ok"], gpus=8))
    assert pool.events(1.0) == []
    assert "0 GPUs" in pool.describe()
    assert "1 node, 2 CPUs (" in pool.describe()
    pool.kill("nowhere")
    assert until(pool, Died) == [Died(worker="nowhere", reason="killed by the driver")]


def test_a_done_unit_is_not_lost_by_a_kill(pool: RayPool) -> None:
    started(pool, "a", ["ok"])
    pool.give("a", Task(unit=0))
    time.sleep(1.0)
    pool.kill("a")
    kinds = [type(one) for one in until(pool, Died)]
    assert [kind for kind in kinds if kind is not Began] == [Done, Died]


@pytest.mark.parametrize("how", ["raise", "exit:5", "refuse"])
def test_a_worker_that_cannot_be_made(pool: RayPool, how: str) -> None:
    pool.start("a", setup(job={"start": how}))
    (event,) = until(pool, Refused if how == "refuse" else Died)
    if isinstance(event, Died):
        assert event.prompts == ()
        assert how != "raise" or event.reason.startswith("did not start: ValueError: a worker's bug")


def test_the_same_again_is_news(pool: RayPool) -> None:
    """A long batch says now and then that it lives: else it would count as hanging."""
    started(pool, "a", ["ok"], job={"repeats": 6})
    pool.give("a", Task(unit=0))
    found = until(pool, Done)
    assert found.count(Began(worker="a", prompts=(0,), done=0)) >= 3


def test_two_workers_at_once(pool: RayPool) -> None:
    for name in "ab":
        pool.start(name, setup(["slow:0.5"], ["kill"]))
    found: list[Event] = []
    while len(found) < 2:
        found += pool.events(5.0)
    pool.give("a", Task(unit=0))
    pool.give("b", Task(unit=1))
    found = until(pool, Done)
    found += [] if any(isinstance(one, Died) for one in found) else until(pool, Died)
    assert Began(worker="a", prompts=(0,), done=0) in found
    assert [(one.worker, one.prompts) for one in found if isinstance(one, Died)] == [("b", (1,))]
    assert [one.worker for one in found if isinstance(one, Done)] == ["a"]


def test_a_unit_outlives_the_journal(pool: RayPool) -> None:
    started(pool, "a", ["slow:1.5", "ok", "slow:1", "kill"])
    pool.give("a", Task(unit=0))
    until(pool, Began)
    ray.kill(pool._journal, no_restart=False)
    died = until(pool, Died)[-1]
    assert isinstance(died, Died)
    assert (died.prompts, died.blame) == ((3,), True)


def test_misuse(pool: RayPool) -> None:
    started(pool, "a", ["slow:0.5"])
    with pytest.raises(ValueError, match="already"):
        pool.start("a", setup())
    pool.give("a", Task(unit=0))
    with pytest.raises(ValueError, match="not answered"):
        pool.give("a", Task(unit=0))
    with pytest.raises(JobError, match="only one GPU can be shared"):
        pool.start("b", setup(gpus=1.5))
    with pytest.raises(RunError, match="already uses Ray at"):
        RayPool("10.1.2.3:6379")


def twice(address: str, folder: Path) -> list[str]:
    """What a process of its own prints with two pools, one after the other."""
    environment = os.environ | {"PYTHONPATH": str(HERE.parent / "support")}
    command = children.command("pool_twice", address, warnings="error")
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment, cwd=folder, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_pool_of_its_own_closes_what_it_opened(tmp_path: Path) -> None:
    assert twice("local", tmp_path) == ["Started", "1", "(2,)"] * 2 + ["False"]


def test_a_lost_node_is_no_prompts_fault(tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    small: dict[str, Any] = {"object_store_memory": 75 * 2**20}
    if ray.is_initialized():
        ray.shutdown()
    many = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **small})
    try:
        node = many.add_node(num_cpus=1, **small)
        pool = RayPool(str(many.address))
        assert pool.describe() == "Ray with 2 nodes, 1 CPUs (1 free), 0 GPUs (0 free)"
        started(pool, "a", ["ok", "hang"])
        pool.give("a", Task(unit=0))
        while Began(worker="a", prompts=(1,), done=1) not in until(pool, Began):
            pass
        many.remove_node(node, allow_graceful=False)
        died = until(pool, Died)[-1]
        assert died == Died(worker="a", prompts=(1,), reason="its node was lost", blame=False)
        pool.start("a", setup(["ok"]))
        assert pool.events(1.0) == []
        many.add_node(num_cpus=1, **small)
        until(pool, Started)
        pool.close()
        assert not ray.is_initialized()
    finally:
        ray.shutdown()
        many.shutdown()


@pytest.mark.parametrize(
    ("name", "words"), [("gcs_server", "has lost its head at"), ("raylet", "node of this machine")]
)
def test_a_cluster_of_others_that_dies(name: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Ray ends the driver's process, a minute later; it is not asked anything while its head is away."""
    from ray.cluster_utils import Cluster

    if ray.is_initialized():
        ray.shutdown()
    monkeypatch.setattr(connection, "SILENT", 3.0)
    monkeypatch.setattr(connection, "PROBE", 1.0)
    small: dict[str, Any] = {"object_store_memory": 75 * 2**20}
    many = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **small})
    try:
        pool = RayPool(str(many.address))
        started(pool, "a", ["ok", "hang"])
        pool.give("a", Task(unit=0))
        time.sleep(0.5)
        next(one for one in psutil.Process().children(recursive=True) if one.name() == name).kill()
        end = time.monotonic() + 40
        with refused(RunError, words, "what is committed is kept"):
            while time.monotonic() < end:
                pool.events(1.0)
        pool.close()
        assert not ray.is_initialized()
    finally:
        ray.shutdown()
        many.shutdown()
