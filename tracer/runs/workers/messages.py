"""The messages between a driver and its workers, and the interface of a pool of workers: plain records.

A run is cut into units (a shard of prompts, a combination of a benchmark). The driver gives a worker a `Task` for one
unit; the worker answers with a `Report`, and reports progress through other `Event`s. A `Pool` is where workers live:
processes of this machine (processes.py) or actors of a Ray cluster (cluster/). Knows no model, no file and no Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from pydantic import ConfigDict, Field

from tracer.records import Record
from tracer.settings import ModelRecord
from tracer.store.file import File


class _Message(Record):
    # NaN and infinities survive the journey, which JSON would turn into null.
    model_config = ConfigDict(ser_json_inf_nan="constants")


class Setup(_Message):
    """What a worker is started with, as it travels to another process.

    Attributes:
        folder: the run folder: a path or an ``s3://`` or ``gs://`` address.
        job: the resolved job, as JSON holds it.
        factory: ``module:callable`` that makes the worker from this record.
        threads: of torch, in the worker; the last bits of a number depend on it.
        cpus, gpus: what it is given (Ray counts them; fractions of a GPU are shared).
        in_flight: requests that it may have at a service at a time: its share of what the run may.
    """

    folder: str
    job: dict[str, Any]
    factory: str = "tracer.runs.worker:Worker"
    threads: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    in_flight: int = 1


class Part(_Message):
    """Prompts of a unit that are done before the unit is: their tables, which no commit names yet.

    Attributes:
        files: by table; ``means`` are the sums over all prompts that were done by then, not over these alone.
        notes, halved: as of a `Report`.
    """

    files: dict[str, File]
    notes: dict[str, int] = Field(default_factory=dict)
    halved: int = 0


class Task(_Message):
    """One unit of work.

    Attributes:
        unit: its number. attempt: from 1.
        most: how many prompts a batch may have that holds this one: processes died on larger ones. batch: the same for
            all others; None for no limit.
        quarantined: prompts to be left out, and why: they get a row that says so.
        deaths: how many processes died on a prompt alone.
        parts: what workers that died had finished of the unit, in the order in which they wrote it.
        only: the prompts to do again, of a unit that was committed; the others are kept from `files`.
        files: of that commit, by table.
        max_bytes: bytes one batch may use; the model's own default if None.
        finish: this is not a unit but the stage after all of them. first: or the one before.
    """

    unit: int
    attempt: int = 1
    most: dict[int, int] = Field(default_factory=dict)
    batch: int | None = None
    quarantined: dict[int, tuple[str, str]] = Field(default_factory=dict)
    deaths: dict[int, int] = Field(default_factory=dict)
    parts: tuple[Part, ...] = ()
    only: tuple[int, ...] | None = None
    files: dict[str, str] = Field(default_factory=dict)
    max_bytes: int | None = None
    finish: bool = False
    first: bool = False


class Report(_Message):
    """A unit that is done.

    Attributes:
        unit: its number.
        files: by table (``prompts``, ``nodes``, ``edges``, ``means``); not yet committed.
        statuses: how many prompts ended ``ok``, ``failed``, ``quarantined``.
        errors: the error types of the others, counted.
        seconds: it took. halved: how often a batch was halved because memory ran out.
        notes: what should be known of the prompts, and of how many.
        outcome: of a benchmark's combination.
    """

    unit: int
    files: dict[str, File] = Field(default_factory=dict)
    statuses: dict[str, int] = Field(default_factory=dict)
    errors: dict[str, int] = Field(default_factory=dict)
    seconds: float = 0.0
    halved: int = 0
    notes: dict[str, int] = Field(default_factory=dict)
    outcome: dict[str, Any] | None = None


class Started(_Message):
    """A worker is ready: its model is loaded. `max_bytes`: bytes a batch may use by default on its device. `warnings`:
    what should be known of how the model was loaded."""

    worker: str
    model: ModelRecord
    max_bytes: int
    where: str
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str, worker: Any, where: str) -> Started:
        """What a worker says of itself."""
        said = getattr(worker, "warnings", ())
        return cls(worker=name, model=worker.model, max_bytes=worker.max_bytes, where=where, warnings=said)


class Stage(_Message):
    """Where a worker is in what takes long.

    Attributes:
        what: is done, such as ``train pairs attributed``: `done` of `total`.
        share: of the unit's work that is done, 0 to 1; of a shard's, of the prompts in flight.
    """

    what: str
    done: int
    total: int
    share: float

    def __str__(self) -> str:
        return f"{self.done:,} of {self.total:,} {self.what}"


class Began(_Message):
    """A heartbeat: a worker began prompts (a batch at once), or still has them in flight. `done`: prompts of the unit
    that it has finished. `note`: what it waits for, if it waits for a service. `part`: what it has kept just now. `at`:
    how far it is in what takes long."""

    worker: str
    prompts: tuple[int, ...]
    done: int
    note: str = ""
    part: Part | None = None
    at: Stage | None = None


@runtime_checkable
class Beat(Protocol):
    """How a worker sends `Began` while it works; from any thread."""

    def __call__(
        self,
        prompts: Sequence[int],
        done: int,
        note: str = "",
        part: Part | None = None,
        at: Stage | None = None,
    ) -> None: ...


class Done(_Message):
    """A worker finished its unit."""

    worker: str
    report: Report


class Refused(_Message):
    """A worker met an error that the user must fix (a `TracerError`): its class and three parts. The run ends."""

    worker: str
    kind: str
    value: str
    rule: str
    next_step: str


class Broke(_Message):
    """A worker's unit raised an error that is no prompt's fault; the worker stays alive."""

    worker: str
    error: str


class Died(_Message):
    """A worker died.

    Attributes:
        prompts: begun and not finished, as far as is known.
        reason: e.g. "killed by signal 9".
        blame: whether the prompts may be the cause; a lost machine is not their fault.
        starved: whether memory may have run out: it was killed without a word, or said so last.
        parts: what it had kept of its unit and nobody heard of.
    """

    worker: str
    prompts: tuple[int, ...] = ()
    reason: str
    blame: bool = True
    starved: bool = False
    parts: tuple[Part, ...] = ()


Event = Started | Began | Done | Refused | Broke | Died


@runtime_checkable
class Pool(Protocol):
    """Where workers live. Names are the driver's; no call blocks for longer than a message takes, `events` apart."""

    def start(self, worker: str, setup: Setup) -> None:
        """Ask for a worker; `Started`, `Refused` or `Died` follows in time."""

    def give(self, worker: str, task: Task) -> None:
        """Give a unit to a worker that has none; `Done`, `Refused`, `Broke` or `Died` follows."""

    def kill(self, worker: str) -> None:
        """End a worker at once, whatever it does; `Died` follows with the prompts it had begun."""

    def events(self, timeout: float) -> Sequence[Event]:
        """What happened, in order for each worker; empty after `timeout` seconds without events."""
        ...

    def describe(self) -> str:
        """The available resources, for the message when no worker starts."""
        ...

    def close(self) -> None:
        """End all workers."""
