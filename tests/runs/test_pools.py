"""The pool of processes: what a worker does and how it ends becomes events, in order, and nothing outlives the pool."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

import children
from tracer.runs.workers import processes
from tracer.runs.workers.messages import Began, Broke, Died, Done, Event, Pool, Refused, Setup, Started, Task
from tracer.runs.workers.processes import LocalPool
from tracer.runs.workers.scheduler import RetryLimits, Runner

TESTS = str(Path(__file__).parents[1] / "support")


@pytest.fixture(scope="module", autouse=True)
def _environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", TESTS)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture
def pool() -> Iterator[LocalPool]:
    made = LocalPool()
    yield made
    made.close()


def setup(units: list[list[str]], threads: int = 1, **job: object) -> Setup:
    return Setup(folder="none", job={"units": units, **job}, factory="faulty:Worker", threads=threads)


def until(pool: LocalPool, *kinds: type[Event], seconds: float = 30) -> list[Event]:
    """All events up to the first of a kind."""
    found: list[Event] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found += pool.events(0.2)
        if any(isinstance(event, kinds) for event in found):
            return found
    raise AssertionError(f"none of {kinds} in {seconds} s, only {found}")


def ready(pool: LocalPool, units: list[list[str]], name: str = "w0", **more: Any) -> None:
    pool.start(name, setup(units, **more))  # type: ignore[arg-type]
    until(pool, Started)


def test_it_is_a_pool(pool: LocalPool) -> None:
    checked: Pool = pool
    assert "cores" in checked.describe()
    assert checked.events(0.0) == []


def test_a_worker_starts_and_does_units_with_the_threads_asked_for(
    pool: LocalPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    pool.start("w0", setup([["ok", "ok"], ["ok"]], threads=3))
    (started,) = until(pool, Started)
    assert isinstance(started, Started)
    assert (started.worker, started.max_bytes, started.model.name) == ("w0", 1 << 20, "faulty")
    for unit, prompts in enumerate([[(0,), (1,)], [(2,)]]):
        pool.give("w0", Task(unit=unit))
        *began, done = until(pool, Done)
        assert [event.prompts for event in began if isinstance(event, Began)] == prompts
        assert isinstance(done, Done)
        assert done.report.outcome is not None
        assert (done.report.unit, done.report.outcome["OMP_NUM_THREADS"]) == (unit, "3")
        assert done.report.outcome["pid"] == pool._processes["w0"].popen.pid


def test_an_exception_leaves_the_worker_alive_and_a_users_error_comes_whole(pool: LocalPool) -> None:
    ready(pool, [["raise"], ["odd"], ["refuse"], ["ok"]])
    for unit, text in enumerate(["ValueError: a worker's bug (in behave, faulty.py:", "OddError: odd 12"]):
        pool.give("w0", Task(unit=unit))
        broke = until(pool, Broke)[-1]
        assert isinstance(broke, Broke)
        assert broke.error.startswith(text)
    pool.give("w0", Task(unit=2))
    event = until(pool, Refused)[-1]
    assert isinstance(event, Refused)
    assert (event.kind, event.value, event.rule, event.next_step) == ("JobError", "the prompt", "is wrong", "mend it")
    pool.give("w0", Task(unit=3))
    assert isinstance(until(pool, Done)[-1], Done)


@pytest.mark.parametrize(
    ("how", "words"),
    [("kill", "SIGKILL"), ("segv", "SIGSEGV"), ("exit:3", "exit code 3"), ("quit:4", "exit code 4")],
)
def test_a_dead_process_tells_what_it_had_begun(pool: LocalPool, how: str, words: str) -> None:
    ready(pool, [["ok"], ["ok", how, "ok"]])
    pool.give("w0", Task(unit=1))
    died = until(pool, Died)[-1]
    assert isinstance(died, Died)
    assert (died.worker, died.prompts, died.blame) == ("w0", (2,), True)
    assert words in died.reason
    assert died.starved == (how == "kill"), "who is killed without a word may have found no memory"


@pytest.mark.parametrize(
    ("said", "starved"),
    [
        ("terminate called after throwing an instance of 'std::bad_alloc'", True),
        ("MemoryError", True),
        ("RuntimeError: CUDA error: out of memory", True),
        ("OSError: [Errno 12] Cannot allocate memory", True),
        ("Segmentation fault", False),
    ],
)
def test_last_words_tell_of_memory(said: str, starved: bool) -> None:
    with tempfile.TemporaryFile() as errors:
        errors.write(f"Traceback\n{said}\n\n".encode())
        assert processes._last_words(errors) == said
    assert bool(processes._NO_MEMORY.search(said)) is starved
    assert processes._reason(-signal.SIGABRT, said) == f"killed by SIGABRT ({said})"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the kernel")
def test_where_memory_runs_out_a_worker_is_ended_before_its_driver(pool: LocalPool) -> None:
    ready(pool, [["ok"]])
    scores = [
        int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in (os.getpid(), pool._processes["w0"].popen.pid)
    ]
    assert scores[0] < scores[1]


def test_a_process_that_dies_between_units_had_begun_nothing_and_takes_no_order_with_an_error(pool: LocalPool) -> None:
    ready(pool, [["ok"], ["ok"]])
    pool.give("w0", Task(unit=0))
    until(pool, Done)
    popen = pool._processes["w0"].popen
    popen.kill()
    popen.wait()
    thread = pool._processes["w0"].thread
    assert thread is not None
    thread.join(10)  # its pipe is closed, and the driver does not know yet
    pool.give("w0", Task(unit=1))
    died = until(pool, Died)[-1]
    assert isinstance(died, Died)
    assert died.prompts == ()


def test_a_hanging_worker_is_killed_and_so_is_a_stopped_one(pool: LocalPool) -> None:
    ready(pool, [["hang"]])
    ready(pool, [["hang"]], "w1")
    for name in ("w0", "w1"):
        pool.give(name, Task(unit=0))
        until(pool, Began)
    os.kill(pool._processes["w1"].popen.pid, signal.SIGSTOP)
    for name in ("w0", "w1"):
        pool.kill(name)
        died = until(pool, Died)[-1]
        assert isinstance(died, Died)
        assert (died.worker, died.prompts) == (name, (0,))


def test_killing_is_possible_before_the_start_and_twice(pool: LocalPool) -> None:
    pool.start("w0", setup([["ok"]]))
    pool.kill("w0")
    pool.kill("w0")
    pool.kill("nobody")
    assert [type(event) for event in until(pool, Died)] == [Died]


@pytest.mark.parametrize(
    ("start", "kind", "words"),
    [("raise", Died, "ValueError: a worker's bug"), ("kill", Died, "SIGKILL"), ("refuse", Refused, "is wrong")],
)
def test_a_worker_that_cannot_be_made(pool: LocalPool, start: str, kind: type[Event], words: str) -> None:
    pool.start("w0", setup([["ok"]], start=start))
    assert words in str(until(pool, kind)[-1])
    assert not any(isinstance(event, Started) for event in pool.events(0.1))


def test_a_factory_that_is_not_there(pool: LocalPool) -> None:
    pool.start("w0", Setup(folder="none", job={}, factory="no_such_module:Worker"))
    died = until(pool, Died)[-1]
    assert isinstance(died, Died)
    assert "no_such_module" in died.reason


def test_a_job_and_an_order_may_be_longer_than_a_pipe_and_an_argument(pool: LocalPool) -> None:
    ready(pool, [["ok"]], note="x" * 1_000_000)
    deaths = dict.fromkeys(range(50000), 1)
    pool.give("w0", Task(unit=0, deaths=deaths, quarantined={5: ("ProcessDied", "ä\n\u2028")}))
    assert isinstance(until(pool, Done)[-1], Done)


def test_what_a_process_said_last_counts_and_half_a_line_does_not() -> None:
    whole = b'{"kind_of_event": "Began", "worker": "x", "prompts": [3], "done": 1}\n'
    assert processes._read("w0", whole) == Began(worker="w0", prompts=(3,), done=1)
    assert processes._read("w0", whole[:30]) is None
    assert processes._read("w0", b'{"kind_of_event": "Nothing"}\n') is None


def test_closing_ends_all_processes_and_can_be_repeated(pool: LocalPool) -> None:
    for name in ("w0", "w1"):
        pool.start(name, setup([["hang"]]))
    until(pool, Started)
    children = [process.popen.pid for process in pool._processes.values()]
    pool.close()
    pool.close()
    assert not any(psutil.pid_exists(pid) for pid in children)


def test_workers_end_with_a_driver_that_is_killed() -> None:
    driver = children.start("orphan")
    worker = psutil.Process(int(children.line(driver)))
    children.end(driver)
    with contextlib.suppress(psutil.NoSuchProcess):
        worker.wait(10)
    assert not worker.is_running()


def test_a_runner_on_processes_meets_every_misfortune_at_once(pool: LocalPool) -> None:
    units = [["ok", "kill"], ["once:segv"], ["hang", "ok"], ["once:raise"], ["ok", "ok", "ok"]]
    runner = Runner(pool=pool, setup=setup(units), workers=2, limits=RetryLimits(prompt=1.5, start=60.0))
    found = list(runner.map(Task(unit=unit) for unit in range(len(units))))
    assert sorted(report.unit for report in found) == list(range(len(units)))
    assert {prompt: kind for prompt, (kind, _) in runner.quarantined.items()} == {1: "ProcessDied", 3: "PromptTimeout"}
    assert runner.deaths == {1: 2, 2: 1, 3: 2}
    assert sum(sum(report.statuses.values()) for report in found) == sum(map(len, units))


def test_gpus_are_shared_out_the_emptiest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_gpu_names", lambda: ["0", "1", "3"])
    pool = LocalPool()
    seats = []
    for number, part in enumerate((0.5, 0.5, 0.5, 0.5, 1.0, 2.0)):
        name = f"w{number}"
        seats.append(pool._seat(name, part).get("CUDA_VISIBLE_DEVICES"))
        pool._processes[name] = SimpleNamespace(popen=SimpleNamespace(poll=lambda: None))  # type: ignore[assignment]
    assert seats == ["0", "1", "3", "0", "1", "3,0"]
    assert pool._seat("w9", 0.0) == {}
    pool._processes.clear()


def test_a_death_is_told_though_a_child_holds_the_pipe(pool: LocalPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its end of file does not come before the child's end."""
    monkeypatch.setattr(processes, "GRACE", 0.5)
    ready(pool, [["ok", "leave:20"]])
    pool.give("w0", Task(unit=0))
    died = until(pool, Died, seconds=15)[-1]
    assert died == Died(worker="w0", prompts=(1,), reason="killed by SIGKILL")
    assert [event for event in pool.events(0.5) if isinstance(event, Died)] == []


def test_a_worker_that_does_not_read_holds_nobody_up(pool: LocalPool) -> None:
    """More than a pipe holds, for a process that was stopped before it could read."""
    large = Setup(folder="none", job={"units": [], "start": "ok", "more": "x" * 2**20}, factory="faulty:Worker")
    pool.start("w0", large)
    pool._processes["w0"].popen.send_signal(signal.SIGSTOP)
    pool.start("w1", large)
    assert until(pool, Started)[-1].worker == "w1"
    pool.kill("w0")
    assert until(pool, Died)[-1].worker == "w0"
