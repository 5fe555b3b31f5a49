"""Maps units over workers, and decides what happens after a worker's death.

Every unit is reported exactly once, whatever happens to the workers, and what a worker kept of it before it died is
not done again. A process's death counts against the batch it had begun: that is retried as it was, then in halves. A
prompt is quarantined when two processes died on it alone; where memory may be the cause, no process in place of those
is started first, and deaths in a row with no prompt done in between end the run with no prompt to blame. A lost machine
counts against nothing; a unit that breaks three times for other reasons ends the run. Knows tasks, reports and time.
Refuses to know files, models and what a unit is.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from tracer import errors
from tracer.errors import RunError, TracerError
from tracer.runs.workers.messages import (
    Began,
    Broke,
    Died,
    Done,
    Event,
    Part,
    Pool,
    Refused,
    Report,
    Setup,
    Stage,
    Started,
    Task,
)

log = logging.getLogger(__name__)

_TICK = 0.2  # seconds between two looks at the clock
_KINDS: dict[str, type[TracerError]] = {
    kind.__name__: kind for kind in (errors.JobError, errors.ModelError, errors.RunError, errors.RemoteError)
}


@dataclass(frozen=True)
class RetryLimits:
    """Timeouts and retry limits.

    Attributes:
        start: seconds without any worker. prompt: seconds without a heartbeat for a batch; None for no limit.
        tries: of a unit that breaks without a prompt to blame, and of starting a worker.
        deaths: processes that die on a prompt alone before it is left out.
        starved: processes that die in a row, as where memory runs out, while no prompt is done.
    """

    start: float = 600.0
    prompt: float | None = 600.0
    tries: int = 3
    deaths: int = 2
    starved: int = 10


@dataclass
class _Busy:
    task: Task
    since: float
    prompts: tuple[int, ...] = ()
    done: int = 0
    beside: bool = False  # whether other workers are or were there meanwhile
    note: str = ""
    at: Stage | None = None
    late: bool = False


@dataclass(frozen=True)
class Place:
    """Where a worker is: its unit, the prompts it has in flight, and how far it is in what takes long."""

    unit: int
    prompts: int
    at: Stage


@dataclass
class Runner:
    """Maps units over the workers of a pool.

    Attributes:
        pool, setup, workers: where workers are, how they are started, and how many.
        started: called for every worker that is ready; returns the bytes a batch may use (None: the worker's default).
        heard: called after every event and at least every second, e.g. to draw progress.
        deaths: of processes on a prompt alone, by prompt. quarantined: prompts that are left out, and why (error type,
            error). most: by unit, how many prompts a batch with a prompt may have. parts: by unit, what is kept of it.
            All four include those of earlier runs, and are updated here.
        batch: prompts that any batch may have, where memory did not hold more.
        stop: checked between events; once true, nothing more is reported.
        died: called for every worker's death, with the prompts that it counts against. kept: called with a unit of
            which a part is kept.
        doubtful: prompts that processes died on since one was last done; memory may be the cause.
    """

    pool: Pool
    setup: Setup
    workers: int
    limits: RetryLimits = field(default_factory=RetryLimits)
    started: Callable[[Started], int | None] = lambda _: None
    heard: Callable[[], None] = lambda: None
    died: Callable[[Died], None] = lambda _: None
    kept: Callable[[int], None] = lambda _: None
    stop: Callable[[], bool] = lambda: False
    deaths: dict[int, int] = field(default_factory=dict)
    quarantined: dict[int, tuple[str, str]] = field(default_factory=dict)
    most: dict[int, dict[int, int]] = field(default_factory=dict)
    parts: dict[int, list[Part]] = field(default_factory=dict)
    batch: int | None = None
    broken: int = field(default=0, init=False)
    doubtful: set[int] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        self._ready: set[str] = set()
        self._starting: set[str] = set()
        self._busy: dict[str, _Busy] = {}
        self._again: deque[Task] = deque()
        self._struck: set[int] = set()  # prompts of batches that a process died on
        self._small: set[int] = set()  # units whose batches are small for want of memory
        self._starved = 0  # deaths in a row for which memory may be the cause
        self._wanted: dict[int, int] = {}  # workers there were when a prompt was first suspected
        self._tries: Counter[tuple[int, bool]] = Counter()
        self._names, self._failures, self._max_bytes = 0, 0, None
        self._idle_since = time.monotonic()

    @property
    def n_ready(self) -> int:
        """Workers whose model is loaded."""
        return len(self._ready)

    @property
    def in_flight(self) -> int:
        """Prompts of unfinished units that workers have done."""
        return sum(busy.done for busy in self._busy.values())

    @property
    def places(self) -> list[Place]:
        """Where workers are that are at what takes long."""
        every = (Place(busy.task.unit, len(busy.prompts), busy.at) for busy in self._busy.values() if busy.at)
        return list(every)

    @property
    def waiting(self) -> str:
        """What a worker waits for, if one waits for a service."""
        return next((busy.note for busy in self._busy.values() if busy.note), "")

    def map(self, tasks: Iterable[Task]) -> Iterator[Report]:
        """Every task's report, in the order they end.

        Raises:
            RunError: no worker starts, or a unit breaks again and again. Another `TracerError`: a worker's own.
        """
        source = iter(tasks)
        waiting = next(source, None)
        self._idle_since = time.monotonic()
        while waiting is not None or self._again or self._busy:
            if self.stop():
                return
            wanted = len(self._busy) + len(self._again) + (waiting is not None and self.workers)
            self._start(min(self.workers, wanted))
            for worker in sorted(self._ready - self._busy.keys()):
                task = self._again.popleft() if self._again else waiting
                if task is None:
                    break
                if task is waiting:
                    waiting = next(source, None)
                self._give(worker, task)
            for event in self.pool.events(_TICK):
                report = self._handle(event)
                self.heard()
                if report is not None:
                    yield report
            self._check_clock()
            self.heard()

    def acquit(self) -> None:
        """The run ends while nothing was done any more: it is not the prompts that processes died on last."""
        for prompt in self.doubtful:
            self.deaths.pop(prompt, None)
            self.quarantined.pop(prompt, None)

    # ------------------------------------------------------------------------------------------- workers

    def _start(self, count: int) -> None:
        while len(self._ready) + len(self._starting) < count:
            worker, self._names = f"w{self._names}", self._names + 1
            self._starting.add(worker)
            for busy in self._busy.values():
                busy.beside = True
            self.pool.start(worker, self.setup)

    def _give(self, worker: str, task: Task) -> None:
        unit = {
            "most": self.most.get(task.unit, {}),
            "batch": self.batch,
            "quarantined": self.quarantined,
            "deaths": self.deaths,
            "parts": tuple(self.parts.get(task.unit, ())),
            "max_bytes": self._max_bytes if task.max_bytes is None else task.max_bytes,
        }
        self._busy[worker] = _Busy(task, time.monotonic(), beside=len(self._ready | self._starting) > 1)
        self.pool.give(worker, task.model_copy(update=unit))

    def _handle(self, event: Event) -> Report | None:
        busy = self._busy.get(event.worker)
        match event:
            case Started():
                self._starting.discard(event.worker)
                self._max_bytes = self.started(event)
                self._ready.add(event.worker)
                self._failures, self._idle_since = 0, time.monotonic()
            case Began() if busy is not None:
                if busy.prompts and event.done > busy.done:  # not those that are left out
                    self._went_well()
                busy.prompts, busy.done, busy.note, busy.at = event.prompts, event.done, event.note, event.at
                busy.since = time.monotonic()
                if event.part is not None:
                    self._keep(busy.task.unit, event.part)
            case Done() if busy is not None and busy.task.unit == event.report.unit:
                del self._busy[event.worker]
                self._learn(event.report.unit)
                self._went_well()
                return event.report
            case Refused():
                raise _KINDS.get(event.kind, RunError)(event.value, event.rule, event.next_step)
            case Broke() if busy is not None:
                del self._busy[event.worker]
                self._failed(busy, event.error)
            case Died():
                self._on_worker_death(event, busy)
            case _:
                pass
        return None

    def _on_worker_death(self, event: Died, busy: _Busy | None) -> None:
        """Give a dead worker's unit to another; count the death against its prompts."""
        log.warning("worker %s died: %s", event.worker, event.reason)
        self._ready.discard(event.worker)
        self._busy.pop(event.worker, None)
        was_starting = event.worker in self._starting
        self._starting.discard(event.worker)
        self._idle_since = max(self._idle_since, time.monotonic() if not was_starting else 0)
        self.broken += 1
        if busy is None:
            self.died(event)
            if was_starting and event.blame:
                self._failed_to_start(event)
            return
        prompts, unit = event.prompts or busy.prompts, busy.task.unit
        held = event.model_copy(update={"prompts": prompts if event.blame else ()})
        for part in event.parts:
            self._keep(unit, part)
        if not event.blame or not prompts:
            known = False
        elif len(prompts) == 1:
            known = self._suspect(prompts[0], event, busy)
        else:
            known = self._halve(unit, prompts, busy, event.starved)
        self.died(held)
        if known:
            self._again.append(busy.task.model_copy(update={"attempt": busy.task.attempt + 1}))
        else:
            self._failed(busy, event.reason, machine=not event.blame, starved=event.starved)

    def _halve(self, unit: int, prompts: tuple[int, ...], busy: _Busy, starved: bool) -> bool:
        """A batch that a process died on is retried as it was, then in halves; False where it cannot be taken apart.
        Where memory may be the cause, the unit's other batches are as small as that."""
        sizes = self.most.get(unit, {})
        known = [sizes[prompt] for prompt in prompts if prompt in sizes]
        if not (known or busy.late or (starved and sizes)) and self._struck.isdisjoint(prompts):
            self._struck.update(prompts)
            return True
        size = min([len(prompts), *known])
        half = 1 if busy.late else (size + 1) // 2
        if starved and not busy.late:
            self._small.add(unit)
            half = min([half, *sizes.values()])
            prompts = (*prompts, *sizes)
        self.most.setdefault(unit, {}).update(dict.fromkeys(prompts, half))
        return size > 1

    def _learn(self, unit: int) -> None:
        """A unit is done: where it was so in smaller batches for want of memory, so are those to come."""
        sizes = self.most.pop(unit, {})
        if unit in self._small and not self.quarantined.keys() & sizes.keys():
            self.batch = min([*sizes.values(), *([self.batch] if self.batch else [])])

    def _suspect(self, prompt: int, event: Died, busy: _Busy) -> bool:
        """A process died on a prompt alone; False if it is left out already, and processes die all the same."""
        if prompt in self.quarantined:
            return False
        starved = event.starved and not busy.late
        workers = self.workers
        if starved and self.deaths.get(prompt, 0) + 1 >= self.limits.deaths and self._fewer(busy):
            self._wanted.setdefault(prompt, workers)
            return True
        if starved:
            self._starved += 1
            self.doubtful.add(prompt)
        self.deaths[prompt] = self.deaths.get(prompt, 0) + 1
        if self.deaths[prompt] >= self.limits.deaths:
            self.quarantined[prompt] = self._quarantine_reason(prompt, event, busy)
            self.workers = self._wanted.pop(prompt, self.workers)
        if self._starved >= self.limits.starved:
            named = ", ".join(map(str, sorted(self.doubtful)))
            raise RunError(
                f"{self._starved} workers in a row",
                f"died while no prompt was done ({event.reason}), each with one of the prompts {named} alone; "
                f"memory may have run out: there is {self.pool.describe()}",
                "give the run more memory, a smaller model or shorter prompts (see 'tracer plan'), and repeat the "
                "command: what is done is kept, and no prompt is blamed",
            )
        return True

    def _fewer(self, busy: _Busy) -> bool:
        """Start no worker in place of one that died, which leaves the others more; False if it had none beside it."""
        if busy.beside:
            self.workers = max(1, len(self._ready | self._starting))
        return busy.beside

    def _went_well(self) -> None:
        """A prompt is done: what died before died of something else."""
        self._starved = 0
        self.doubtful.clear()

    def _keep(self, unit: int, part: Part) -> None:
        self.parts.setdefault(unit, []).append(part)
        self.kept(unit)

    def _failed_to_start(self, event: Died) -> None:
        """Where memory may be the cause, fewer are tried. After a few failures in a row the run continues with the
        existing workers, and ends if there is none."""
        if event.starved and self.workers > 1:
            self.workers -= 1
            return
        self._failures += 1
        if self._failures < self.limits.tries:
            return
        if not self._ready | self._starting:
            raise RunError(
                f"{self._failures} workers in a row",
                f"died while starting: {event.reason}; there is {self.pool.describe()}",
                "see that the model fits in memory: tracer plan",
            )
        self.workers = len(self._ready | self._starting)

    def _quarantine_reason(self, prompt: int, event: Died, busy: _Busy) -> tuple[str, str]:
        if busy.late:
            return "PromptTimeout", f"no answer within {self.limits.prompt:g} s, {self.deaths[prompt]} times"
        return "ProcessDied", f"{self.deaths[prompt]} processes died on it alone; the last: {event.reason}"

    def _failed(self, busy: _Busy, reason: str, machine: bool = False, starved: bool = False) -> None:
        """A unit ended without a prompt to blame; lost machines are tolerated more often than broken units."""
        task = busy.task
        self._tries[task.unit, machine] += 1
        tries = self._tries[task.unit, machine]
        if tries >= self.limits.tries * (3 if machine else 1) and not (starved and self._fewer(busy)):
            there = f"; memory may have run out: there is {self.pool.describe()}" if starved else ""
            raise RunError(
                f"unit {task.unit} of the run",
                f"failed {tries} times through no fault of a prompt ({reason}){there}",
                "fix that and repeat the command: what is committed is kept",
            )
        self._again.append(task.model_copy(update={"attempt": task.attempt + 1}))

    def _check_clock(self) -> None:
        now = time.monotonic()
        if self._ready or self._busy:
            self._idle_since = now
        elif now - self._idle_since > self.limits.start:
            raise RunError(
                f"no worker started within {self.limits.start:g} s",
                f"there is {self.pool.describe()}",
                "ask for less with --workers and --gpus-per-worker, or wait for machines and repeat the command",
            )
        if self.limits.prompt is None:
            return
        for worker, busy in self._busy.items():
            if not busy.late and not (busy.task.finish or busy.task.first) and now - busy.since > self.limits.prompt:
                busy.late = True
                self._ready.discard(worker)  # it gets no more work, whatever it still answers
                self.pool.kill(worker)
