"""Maps units over workers, and decides what happens after a worker's death.

Every unit is reported exactly once, whatever happens to the workers. A process's death counts against the prompts it
had begun: its batch is retried as it was, then its prompts one by one, and a prompt that repeatedly kills a process by
itself is quarantined. A lost machine counts against no prompt; a unit that breaks three times for other reasons ends
the run, since more than a prompt is wrong. Knows tasks, reports and time.
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
from tracer.runs.workers.messages import Began, Broke, Died, Done, Event, Pool, Refused, Report, Setup, Started, Task

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
        deaths: processes that die on a prompt before it is left out.
    """

    start: float = 600.0
    prompt: float | None = 600.0
    tries: int = 3
    deaths: int = 2


@dataclass
class _Busy:
    task: Task
    since: float
    prompts: tuple[int, ...] = ()
    done: int = 0
    note: str = ""
    late: bool = False


@dataclass
class Runner:
    """Maps units over the workers of a pool.

    Attributes:
        pool, setup, workers: where workers are, how they are started, and how many.
        started: called for every worker that is ready; returns the bytes a batch may use (None: the worker's default).
        heard: called after every event and at least every second, e.g. to draw progress.
        deaths: of processes, by prompt, those of earlier runs included; updated here.
        quarantined: prompts that are left out, and why (error type, error).
        stop: checked between events; once true, nothing more is reported.
        died: called for every worker's death, with the prompts that it counts against.
    """

    pool: Pool
    setup: Setup
    workers: int
    limits: RetryLimits = field(default_factory=RetryLimits)
    started: Callable[[Started], int | None] = lambda _: None
    heard: Callable[[], None] = lambda: None
    died: Callable[[Died], None] = lambda _: None
    stop: Callable[[], bool] = lambda: False
    deaths: dict[int, int] = field(default_factory=dict)
    quarantined: dict[int, tuple[str, str]] = field(default_factory=dict)
    broken: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._ready: set[str] = set()
        self._starting: set[str] = set()
        self._busy: dict[str, _Busy] = {}
        self._again: deque[Task] = deque()
        self._alone: dict[int, set[int]] = {}
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

    # ------------------------------------------------------------------------------------------- workers

    def _start(self, count: int) -> None:
        while len(self._ready) + len(self._starting) < count:
            worker, self._names = f"w{self._names}", self._names + 1
            self._starting.add(worker)
            self.pool.start(worker, self.setup)

    def _give(self, worker: str, task: Task) -> None:
        unit = {
            "alone": tuple(sorted(self._alone.get(task.unit, ()))),
            "quarantined": self.quarantined,
            "deaths": self.deaths,
            "max_bytes": self._max_bytes if task.max_bytes is None else task.max_bytes,
        }
        self._busy[worker] = _Busy(task, time.monotonic())
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
                busy.prompts, busy.done, busy.note = event.prompts, event.done, event.note
                busy.since = time.monotonic()
            case Done() if busy is not None and busy.task.unit == event.report.unit:
                del self._busy[event.worker]
                self._alone.pop(event.report.unit, None)
                return event.report
            case Refused():
                raise _KINDS.get(event.kind, RunError)(event.value, event.rule, event.next_step)
            case Broke() if busy is not None:
                del self._busy[event.worker]
                self._failed(busy.task, event.error)
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
        prompts = event.prompts or busy.prompts
        held = event.model_copy(update={"prompts": prompts if event.blame else ()})
        if not event.blame or not prompts:
            self.died(held)
            self._failed(busy.task, event.reason, machine=not event.blame)
            return
        for prompt in prompts:
            self.deaths[prompt] = self.deaths.get(prompt, 0) + 1
        often = all(self.deaths[prompt] >= self.limits.deaths for prompt in prompts)
        if len(prompts) > 1 and (often or busy.late):
            self._alone.setdefault(busy.task.unit, set()).update(prompts)
        elif often:
            for prompt in prompts:
                self.quarantined[prompt] = self._quarantine_reason(prompt, event, busy)
        self.died(held)
        self._again.append(busy.task.model_copy(update={"attempt": busy.task.attempt + 1}))

    def _failed_to_start(self, event: Died) -> None:
        """After a few failures in a row the run continues with the existing workers, and ends if there is none."""
        self._failures += 1
        if self._failures < self.limits.tries:
            return
        if not self._ready | self._starting:
            raise RunError(
                f"{self._failures} workers in a row",
                f"died while starting: {event.reason}",
                "see that the model fits in memory: tracer plan",
            )
        self.workers = len(self._ready | self._starting)

    def _quarantine_reason(self, prompt: int, event: Died, busy: _Busy) -> tuple[str, str]:
        if busy.late:
            return "PromptTimeout", f"no answer within {self.limits.prompt:g} s, {self.deaths[prompt]} times"
        return "ProcessDied", f"{self.deaths[prompt]} processes died on it; the last: {event.reason}"

    def _failed(self, task: Task, reason: str, machine: bool = False) -> None:
        """A unit ended without a prompt to blame; lost machines are tolerated more often than broken units."""
        self._tries[task.unit, machine] += 1
        tries = self._tries[task.unit, machine]
        if tries >= self.limits.tries * (3 if machine else 1):
            raise RunError(
                f"unit {task.unit} of the run",
                f"failed {tries} times through no fault of a prompt ({reason})",
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
            if not busy.late and not busy.task.finish and now - busy.since > self.limits.prompt:
                busy.late = True
                self._ready.discard(worker)  # it gets no more work, whatever it still answers
                self.pool.kill(worker)
