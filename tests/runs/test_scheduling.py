"""Scheduling: every unit is reported exactly once or the run ends, and a prompt is left out by the rule, never else."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import refused
from tracer.errors import JobError, RunError
from tracer.runs.workers import scheduler
from tracer.runs.workers.messages import Began, Broke, Died, Done, Event, Part, Refused, Report, Setup, Started, Task
from tracer.runs.workers.scheduler import RetryLimits, Runner
from tracer.settings import ModelRecord
from tracer.store.file import File

SETUP = Setup(folder="none", job={})
MODEL = ModelRecord(
    name="fake",
    revision=None,
    family="none",
    fingerprint="0" * 16,
    dtype="float32",
    n_layers=1,
    d_model=1,
    d_mlp=1,
    n_heads=1,
    parallel=False,
)

Step = tuple[str, Any]
Script = Callable[["Fake", str, Task], Iterator[Step]]


@dataclass
class Fake:
    """A pool without processes. `script` says what a task leads to: ("began", prompts), ("wait", seconds),
    ("done", None), ("broke", text), ("died", blame), ("starved", None), ("silent", prompts), ("refused", None),
    ("hang", None), ("part", Part).
    """

    script: Script
    starts: Callable[[int], str] = lambda _number: "ready"
    now: float = 0.0
    queues: dict[str, deque[Event | float]] = field(default_factory=dict)
    alive: set[str] = field(default_factory=set)
    begun: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tasks: list[Task] = field(default_factory=list)
    deaths: list[tuple[tuple[int, ...], bool]] = field(default_factory=list)
    killed: list[str] = field(default_factory=list)
    number: int = 0

    def start(self, worker: str, setup: Setup) -> None:
        assert worker not in self.queues
        how, self.number = self.starts(self.number), self.number + 1
        self.queues[worker] = deque()
        if how == "ready":
            self.alive.add(worker)
            self.queues[worker].append(Started(worker=worker, model=MODEL, max_bytes=7, where="here"))
        elif how in ("dies", "lost", "starves"):
            died = Died(worker=worker, reason="no memory", blame=how != "lost", starved=how == "starves")
            self.queues[worker].append(died)

    def give(self, worker: str, task: Task) -> None:
        assert worker in self.alive, "a task to a worker that is gone"
        assert not self.queues[worker], "a task to a worker that has one"
        self.tasks.append(task.model_copy(deep=True))
        self.begun[worker] = ()
        queue = self.queues[worker]
        for kind, value in self.script(self, worker, task):
            if kind == "began":
                queue.append(Began(worker=worker, prompts=value, done=value[0]))
            elif kind == "waits":
                queue.append(Began(worker=worker, prompts=value, done=0, note="a.host, 3 s, queued: 2nd"))
            elif kind == "silent":  # begun, but the word of it was lost with the process
                queue.append(Died(worker=worker, prompts=value, reason="killed"))
                break
            elif kind == "wait":
                queue.append(value)
            elif kind == "part":
                queue.append(Began(worker=worker, prompts=(), done=0, part=value))
            elif kind == "left out":
                queue.append(Began(worker=worker, prompts=(), done=value))
            elif kind == "done":
                queue.append(Done(worker=worker, report=Report(unit=task.unit)))
            elif kind == "broke":
                queue.append(Broke(worker=worker, error=value))
            elif kind == "refused":
                queue.append(Refused(worker=worker, kind="JobError", value="v", rule="r", next_step="n"))
            elif kind == "died":
                queue.append(Died(worker=worker, reason="killed", blame=value))
                break
            elif kind == "starved":
                queue.append(Died(worker=worker, reason="killed by SIGKILL", starved=True))
                break
            else:
                break

    def kill(self, worker: str) -> None:
        self.killed.append(worker)
        self.queues[worker] = deque([Died(worker=worker, reason="killed by the driver")])

    def events(self, timeout: float) -> list[Event]:
        found: list[Event] = []
        for worker, queue in list(self.queues.items()):
            said = queue.popleft() if queue else None
            if isinstance(said, float | int):
                self.now += said
            elif said is not None:
                found.append(self._said(worker, said))
        self.now += 0.0 if found else timeout
        return found

    def _said(self, worker: str, event: Event) -> Event:
        if isinstance(event, Began):
            self.begun[worker] = event.prompts
        elif isinstance(event, Died):
            self.alive.discard(worker)
            if not event.prompts:
                event = event.model_copy(update={"prompts": self.begun.get(worker, ())})
            self.deaths.append((event.prompts, event.blame))
        elif not isinstance(event, Started):
            self.begun[worker] = ()
        return event

    def describe(self) -> str:
        return "nothing at all"

    def close(self) -> None:
        pass


def runner(pool: Fake, monkeypatch: pytest.MonkeyPatch, workers: int = 1, **more: Any) -> Runner:
    monkeypatch.setattr(scheduler, "time", SimpleNamespace(monotonic=lambda: pool.now))
    return Runner(pool=pool, setup=SETUP, workers=workers, **more)  # type: ignore[arg-type]


def finished(one: Runner, units: int) -> list[int]:
    return [report.unit for report in one.map(Task(unit=unit) for unit in range(units))]


def well(_pool: Fake, _worker: str, task: Task) -> Iterator[Step]:
    yield "began", (task.unit,)
    yield "done", None


def shard(size: int, batch: int, bad: Mapping[int, str]) -> Script:
    """Units of `size` prompts in batches; a bad one kills, starves or hangs its process, always or once."""
    seen: Counter[int] = Counter()

    def script(_pool: Fake, _worker: str, task: Task) -> Iterator[Step]:
        prompts = list(range(task.unit * size, (task.unit + 1) * size))
        for first in range(0, size, batch):
            for some in halved(
                prompts[first : first + batch], task.most | dict.fromkeys(task.quarantined, 1), task.batch
            ):
                if len(some) == 1 and some[0] in task.quarantined:
                    continue
                yield "began", tuple(some)
                for one in some:
                    how = bad.get(one, "ok")
                    if how.startswith("once-"):
                        seen[one] += 1
                        how = how.removeprefix("once-") if seen[one] == 1 else "ok"
                    if how == "kill":
                        yield "died", True
                    elif how == "starve":
                        yield "starved", None
                    elif how == "hang":
                        yield "hang", None
        yield "done", None

    return script


def halved(batch: list[int], most: dict[int, int], size: int | None) -> Iterator[list[int]]:
    """As a worker does it."""
    if len(batch) <= min(most.get(one, size or len(batch)) for one in batch):
        yield batch
        return
    middle = (len(batch) + 1) // 2
    for half in (batch[:middle], batch[middle:]):
        yield from halved(half, most, size)


# ------------------------------------------------------------------------------------------------- all is well


@pytest.mark.parametrize("workers", [1, 3, 9])
def test_units_are_given_to_all_workers_and_reported_once(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Fake(well)
    one = runner(pool, monkeypatch, workers)
    assert sorted(finished(one, 6)) == list(range(6))
    assert pool.number <= workers
    assert one.n_ready == min(workers, pool.number)
    assert one.broken == 0


def test_workers_live_on_for_the_next_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Fake(well)
    one = runner(pool, monkeypatch)
    assert finished(one, 2) == [0, 1]
    assert [report.unit for report in one.map([Task(unit=2, finish=True)])] == [2]
    assert pool.number == 1


def test_no_worker_is_started_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Fake(well)
    assert finished(runner(pool, monkeypatch), 0) == []
    assert pool.number == 0


def test_tasks_carry_the_byte_limit_that_the_driver_settles(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Fake(well)
    finished(runner(pool, monkeypatch, started=lambda _event: 123), 2)
    assert [task.max_bytes for task in pool.tasks] == [123, 123]


def test_tasks_are_drawn_as_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def source() -> Iterator[Task]:
        for unit in range(100):
            drawn.append(unit)
            yield Task(unit=unit)

    pool = Fake(well)
    for number, _ in enumerate(runner(pool, monkeypatch, 2).map(source())):
        assert len(drawn) <= number + 4


def test_stop_reports_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, got = Fake(well), list[int]()
    one = runner(pool, monkeypatch, stop=lambda: len(got) >= 2)
    for report in one.map(Task(unit=unit) for unit in range(10)):
        got.append(report.unit)
    assert got == [0, 1]


# ------------------------------------------------------------------------------------------ processes that die


def test_a_prompt_that_kills_once_is_tried_again_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Fake(shard(4, 4, {5: "once-kill"}))
    one = runner(pool, monkeypatch)
    assert sorted(finished(one, 3)) == [0, 1, 2]
    assert one.quarantined == one.deaths == {}, "a death of a batch is nobody's"
    again = next(task for task in pool.tasks if task.attempt == 2)
    assert (again.unit, again.most) == (1, {})


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_a_prompt_that_kills_always_is_found_and_left_out(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Fake(shard(4, batch, {6: "kill"}))
    one = runner(pool, monkeypatch, 2)
    assert sorted(finished(one, 4)) == [0, 1, 2, 3]
    assert list(one.quarantined) == [6]
    kind, said = one.quarantined[6]
    assert kind == "ProcessDied"
    assert said.startswith("2 processes died on it alone")
    assert one.deaths == {6: 2}
    assert [len(prompts) for prompts, _ in pool.deaths] == {1: [1, 1], 2: [2, 2, 1, 1], 4: [4, 4, 2, 1, 1]}[batch]


def test_a_batch_that_kills_twice_is_halved_until_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(_pool: Fake, _worker: str, task: Task) -> Iterator[Step]:
        first = 100 * task.unit
        for some in halved(list(range(first, first + 16)), task.most, task.batch):
            yield "began", tuple(some)
            if len(some) > 4:
                yield "starved", None
                return
        yield "done", None

    pool = Fake(script)
    one = runner(pool, monkeypatch)
    assert finished(one, 9) == list(range(9))
    assert one.quarantined == one.deaths == {}
    assert [len(prompts) for prompts, _ in pool.deaths] == [16, 16, 8], "and the units after it know"


def test_one_prompt_that_kills_makes_no_other_batch_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Fake(shard(8, 8, {3: "starve"}))
    one = runner(pool, monkeypatch)
    assert finished(one, 3) == [0, 1, 2]
    assert (list(one.quarantined), one.batch) == ([3], None)


def test_requests_in_flight_are_told_apart_however_they_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(pool: Fake, _worker: str, task: Task) -> Iterator[Step]:
        if len(task.most) < 6:
            yield "began", (0, 1, 2 + len(pool.tasks) % 4)
            yield "died", True
        for prompt in range(6):
            yield "began", (prompt,)
        yield "done", None

    one = runner(Fake(script), monkeypatch)
    assert finished(one, 1) == [0]
    assert one.broken < 9


def test_where_memory_may_have_run_out_fewer_workers_try_before_a_prompt_is_blamed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three processes at a time are one too many for the machine."""

    def script(pool: Fake, worker: str, task: Task) -> Iterator[Step]:
        yield "began", (task.unit,)
        yield ("starved", None) if len(pool.alive) > 2 else ("done", None)

    pool = Fake(script)
    one = runner(pool, monkeypatch, 4)
    assert sorted(finished(one, 12)) == list(range(12))
    assert one.quarantined == {}
    assert one.workers <= 2


def test_a_prompt_that_starves_any_machine_is_left_out_and_the_workers_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = Fake(shard(2, 1, {5: "starve"}))
    one = runner(pool, monkeypatch, 3)
    assert sorted(finished(one, 40)) == list(range(40))
    assert list(one.quarantined) == [5]
    assert 2 <= one.broken <= 4
    assert one.workers == 3


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("batch", [1, 8])
def test_deaths_in_a_row_end_the_run_and_blame_nobody(
    batch: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = Fake(shard(8, batch, dict.fromkeys(range(64), "starve")))
    one = runner(pool, monkeypatch, workers)
    with refused(RunError, "10 workers in a row", "memory", "nothing at all", "no prompt is blamed"):
        finished(one, 8)
    assert {*one.quarantined} <= one.doubtful
    one.acquit()
    assert one.quarantined == one.deaths == {}
    assert len(pool.deaths) < 50


def test_who_is_left_out_is_not_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker tells of each that it leaves out before it dies on the next."""

    def script(_pool: Fake, _worker: str, task: Task) -> Iterator[Step]:
        for number, _ in enumerate(task.quarantined):
            yield "left out", number + 1
        yield "began", (len(task.quarantined),)
        yield "starved", None

    one = runner(Fake(script), monkeypatch)
    with refused(RunError, "10 workers in a row"):
        finished(one, 1)


def test_a_row_of_bad_prompts_ends_nothing_while_others_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    bad: dict[int, str] = dict.fromkeys((3, 4, 7, 9, 11, 12, 20, 21, 22, 23), "starve")
    one = runner(Fake(shard(8, 1, bad)), monkeypatch)
    assert finished(one, 3) == [0, 1, 2]
    assert {*one.quarantined} == {*bad}


def test_what_is_left_out_and_kills_all_the_same_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit that is one prompt, as a benchmark's: there is nothing to leave out."""
    pool = Fake(lambda _pool, _worker, task: iter([("began", (task.unit,)), ("died", True)]))
    with refused(RunError, "unit 0", "3 times"):
        finished(runner(pool, monkeypatch), 1)
    assert len(pool.deaths) == 5


def test_what_is_kept_is_given_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [Part(files={"nodes": File(name=f"nodes/0-{n:012x}.parquet", size=1, sha256="", rows=1)}) for n in (1, 2)]

    def script(pool: Fake, _worker: str, task: Task) -> Iterator[Step]:
        if len(pool.tasks) <= 2:
            yield "part", parts[len(pool.tasks) - 1]
            yield "broke", "x"
            return
        yield "done", None

    told: list[int] = []
    pool = Fake(script)
    one = runner(pool, monkeypatch, kept=told.append)
    assert finished(one, 1) == [0]
    assert [task.parts for task in pool.tasks] == [(), tuple(parts[:1]), tuple(parts)]
    assert told == [0, 0]


def test_two_that_kill_in_one_batch_are_both_found(monkeypatch: pytest.MonkeyPatch) -> None:
    one = runner(Fake(shard(8, 8, {1: "kill", 6: "kill"})), monkeypatch)
    assert finished(one, 1) == [0]
    assert sorted(one.quarantined) == [1, 6]


def test_what_an_earlier_driver_knew_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    one = runner(Fake(shard(2, 1, {1: "kill"})), monkeypatch, deaths={1: 1}, quarantined={0: ("ProcessDied", "x")})
    assert finished(one, 1) == [0]
    assert sorted(one.quarantined) == [0, 1]
    assert one.broken == 1, "it was alone then as well"


def test_what_a_dead_worker_had_begun_comes_from_the_pool_or_else_from_what_it_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def script(pool: Fake, _worker: str, task: Task) -> Iterator[Step]:
        if len(pool.tasks) <= 2 and task.unit == 0:
            yield "began", (1,)
            yield "silent", (2,)
        yield "done", None

    told: list[tuple[int, ...]] = []
    one = runner(Fake(script), monkeypatch, died=lambda event: told.append(event.prompts))
    assert finished(one, 1) == [0]
    assert told == [(2,), (2,)]
    assert list(one.quarantined) == [2]


def test_a_lost_machine_is_no_prompts_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(pool: Fake, _worker: str, task: Task) -> Iterator[Step]:
        yield "began", (task.unit,)
        yield ("died", False) if len(pool.tasks) <= 5 else ("done", None)

    told: list[Died] = []
    one = runner(Fake(script), monkeypatch, died=told.append)
    assert finished(one, 1) == [0]
    assert (one.deaths, one.quarantined, one.broken) == ({}, {}, 5)
    assert all(event.prompts == () for event in told)


def test_machines_that_are_lost_again_and_again_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Fake(lambda _pool, _worker, _order: iter([("died", False)]))
    with refused(RunError, "unit 0", "9 times"):
        finished(runner(pool, monkeypatch), 1)


def test_lost_machines_are_counted_apart_from_units_that_break(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = iter([("died", False), ("broke", "x"), ("died", False), ("broke", "x"), ("died", False), ("done", None)])
    pool = Fake(lambda _pool, _worker, _order: iter([next(steps)]))
    assert finished(runner(pool, monkeypatch), 1) == [0]


@pytest.mark.parametrize("how", ["broke", "died"])
def test_a_unit_that_fails_through_no_prompts_fault_ends_the_run(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Fake(lambda _pool, _worker, _order: iter([(how, "OSError: no" if how == "broke" else True)]))
    with refused(RunError, "unit 0", "3 times"):
        finished(runner(pool, monkeypatch), 2)


def test_a_unit_that_breaks_twice_goes_on_with_the_same_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(pool: Fake, _worker: str, _order: Task) -> Iterator[Step]:
        yield ("broke", "x") if len(pool.tasks) <= 2 else ("done", None)

    pool = Fake(script)
    assert finished(runner(pool, monkeypatch), 1) == [0]
    assert pool.number == 1
    assert [task.attempt for task in pool.tasks] == [1, 2, 3]


def test_what_the_user_must_mend_ends_the_run_as_it_was_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Fake(lambda _pool, _worker, _order: iter([("refused", None)]))
    with pytest.raises(JobError, match="v: r; n"):
        finished(runner(pool, monkeypatch), 1)


def test_an_idle_worker_that_dies_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Fake(well)
    one = runner(pool, monkeypatch)
    assert finished(one, 1) == [0]
    pool.queues["w0"].append(Died(worker="w0", reason="killed"))
    pool.events(0)
    assert one._handle(Died(worker="w0", reason="killed")) is None
    assert finished(one, 1) == [0]
    assert (pool.number, one.deaths) == (2, {})


def test_a_report_of_a_unit_that_was_given_to_another_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Fake(well)
    one = runner(pool, monkeypatch)
    assert finished(one, 1) == [0]
    assert one._handle(Done(worker="w0", report=Report(unit=0))) is None
    assert one._handle(Done(worker="a zombie", report=Report(unit=0))) is None


# ---------------------------------------------------------------------------------------------------- the clock


@pytest.mark.parametrize("batch", [1, 4])
def test_a_prompt_that_hangs_is_killed_and_left_out(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Fake(shard(4, batch, {2: "hang"}))
    one = runner(pool, monkeypatch, limits=RetryLimits(prompt=5.0))
    assert sorted(finished(one, 2)) == [0, 1]
    assert list(one.quarantined) == [2]
    assert one.quarantined[2] == ("PromptTimeout", "no answer within 5 s, 2 times")
    assert len(pool.killed) == (2 if batch == 1 else 3)
    assert 10 < pool.now < 20


def test_who_waits_in_a_services_queue_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece of news comes before the limit, all of them together long after it."""
    notes = list[str]()

    def script(_pool: Fake, _worker: str, task: Task) -> Iterator[Step]:
        yield "began", (task.unit,)
        for _ in range(4):
            yield "wait", 4.0
            yield "waits", (task.unit,)
        yield "done", None

    pool = Fake(script)
    one = runner(pool, monkeypatch, limits=RetryLimits(prompt=5.0), heard=lambda: notes.append(one.waiting))
    assert finished(one, 1) == [0]
    assert pool.now > 16
    assert not pool.killed
    assert {*notes} == {"", "a.host, 3 s, queued: 2nd"}
    assert one.waiting == ""


def test_without_a_limit_nothing_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(_pool: Fake, _worker: str, task: Task) -> Iterator[Step]:
        yield "began", (task.unit,)
        yield "wait", 1e6
        yield "done", None

    pool = Fake(script)
    assert finished(runner(pool, monkeypatch, limits=RetryLimits(prompt=None)), 1) == [0]
    assert pool.killed == []


def test_news_of_a_batch_keep_it_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(_pool: Fake, _worker: str, task: Task) -> Iterator[Step]:
        for _ in range(20):
            yield "began", (task.unit,)
            yield "wait", 4.0
        yield "done", None

    pool = Fake(script)
    assert finished(runner(pool, monkeypatch, limits=RetryLimits(prompt=5.0)), 1) == [0]
    assert pool.killed == []


def test_the_stage_after_all_units_may_take_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(_pool: Fake, _worker: str, _order: Task) -> Iterator[Step]:
        yield "wait", 1e5
        yield "done", None

    pool = Fake(script)
    one = runner(pool, monkeypatch, limits=RetryLimits(prompt=5.0))
    assert [report.unit for report in one.map([Task(unit=0, finish=True)])] == [0]


def test_a_worker_that_answers_as_it_is_killed_gets_no_more_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(Fake):
        def kill(self, worker: str) -> None:
            self.killed.append(worker)
            unit = self.tasks[-1].unit
            self.queues[worker] = deque([Done(worker=worker, report=Report(unit=unit)), 0.1, 0.1])
            self.queues[worker].append(Died(worker=worker, reason="killed by the driver"))
            self.alive.discard(worker)

    def script(pool: Fake, _worker: str, task: Task) -> Iterator[Step]:
        yield "began", (task.unit,)
        yield ("hang", None) if len(pool.tasks) == 1 else ("done", None)

    pool = Late(script)
    one = runner(pool, monkeypatch, limits=RetryLimits(prompt=5.0))
    assert finished(one, 3) == [0, 1, 2]
    assert pool.number == 2
    assert (one.deaths, one._tries) == ({}, Counter())


def test_without_any_worker_the_run_ends_and_says_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Fake(well, starts=lambda _number: "never")
    with refused(RunError, "no worker started within 30 s", "nothing at all"):
        finished(runner(pool, monkeypatch, 2, limits=RetryLimits(start=30.0)), 1)
    assert 30 < pool.now < 31


def test_a_cluster_that_grows_later_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One worker of four is placed; the run goes on with it, however long the others take."""
    pool = Fake(shard(1, 1, {}), starts=lambda number: "ready" if number == 0 else "never")
    assert sorted(finished(runner(pool, monkeypatch, 4, limits=RetryLimits(start=0.3)), 20)) == list(range(20))


def test_workers_that_all_die_while_starting_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Fake(well, starts=lambda _number: "dies")
    with refused(RunError, "workers in a row", "no memory", "tracer plan"):
        finished(runner(pool, monkeypatch, 2), 4)
    assert pool.number <= 5


def test_workers_that_find_no_memory_beside_each_other_are_started_with_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """All four at once, and one after them."""
    pool = Fake(well, starts=lambda number: "starves" if number < 5 else "ready")
    one = runner(pool, monkeypatch, 4)
    assert finished(one, 3) == [0, 1, 2]
    assert one.workers == 1


def test_lost_machines_while_starting_are_waited_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Fake(well, starts=lambda number: "ready" if number > 6 else "lost")
    assert finished(runner(pool, monkeypatch), 1) == [0]


def test_the_run_goes_on_with_the_workers_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Fake(well, starts=lambda number: "ready" if number == 0 else "dies")
    one = runner(pool, monkeypatch, 4)
    assert sorted(finished(one, 30)) == list(range(30))
    assert one.n_ready == 1
    assert pool.number < 8


# -------------------------------------------------------------------------------------------------- at random

FAULTS = st.lists(
    st.tuples(
        st.sampled_from(["ok", "ok", "kill", "starve", "lost", "broke", "hang", "early", "silent"]), st.integers(0, 3)
    ),
    max_size=40,
)


@given(
    faults=FAULTS,
    workers=st.integers(1, 4),
    batch=st.integers(1, 4),
    poison=st.sets(st.integers(0, 15), max_size=3),
    hangs=st.sets(st.integers(0, 15), max_size=2),
)
def test_whatever_happens_every_unit_is_reported_once_or_the_run_ends(
    faults: list[tuple[str, int]], workers: int, batch: int, poison: set[int], hangs: set[int]
) -> None:
    size, units, left = 4, 4, deque(faults)
    bad = dict.fromkeys(sorted(hangs), "hang") | dict.fromkeys(sorted(poison), "kill")
    plain, failures = shard(size, batch, bad), Counter[tuple[int, str]]()

    def script(pool: Fake, worker: str, task: Task) -> Iterator[Step]:
        how, at = left.popleft() if left else ("ok", 0)
        begun = 0
        if how == "early":
            failures[task.unit, "unit"] += 1
            yield "died", True
            return
        for step in plain(pool, worker, task):
            if step[0] == "began" and begun == at and how != "ok":
                if how in ("broke", "lost"):
                    failures[task.unit, "machine" if how == "lost" else "unit"] += 1
                yield step
                if how == "broke":
                    yield "broke", "x"
                elif how == "silent":
                    yield "silent", step[1]
                elif how == "hang":
                    yield "hang", None
                elif how == "starve":
                    yield "starved", None
                else:
                    yield "died", how == "kill"
                return
            begun += step[0] == "began"
            yield step

    with pytest.MonkeyPatch.context() as patch:
        pool = Fake(script)
        one = runner(pool, patch, workers, limits=RetryLimits(prompt=3.0))
        try:
            found = finished(one, units)
        except RunError:
            assert any(count >= (9 if kind == "machine" else 3) for (_, kind), count in failures.items())
            return
    assert sorted(found) == list(range(units))
    seen, wanted = Counter[int](), set[int]()
    for prompts, blame in pool.deaths:
        if blame and len(prompts) == 1:
            seen.update(prompts)
            if seen[prompts[0]] >= 2:
                wanted.add(prompts[0])
    assert {*poison, *hangs} <= {*one.quarantined} <= wanted
    if "starve" not in (how for how, _ in faults):
        assert set(one.quarantined) == wanted
        assert one.deaths == dict(seen)
