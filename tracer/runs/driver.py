"""One run: planned, mapped over workers, committed unit by unit, finished; and resumed where it stopped.

Whatever ends a run, what was committed stays, and the same command resumes it: the tables at the end are those of an
undisturbed run. Knows the order in which things happen and are written. Refuses to know how a prompt is traced
(runs/units/shards.py), who does it (runs/workers/scheduler.py) and how files are written (store/run_folder.py).
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

from pydantic import Field, ValidationError

from tracer import data
from tracer.circuit.circuit import provenance
from tracer.errors import RunError, TracerError, option, quoted, say, writing
from tracer.records import Record
from tracer.runs.finish import finish_run
from tracer.runs.identity import (
    as_far,
    check_same,
    digests_of,
    fingerprint_of,
    grows,
    is_resumable,
    joined,
    made_by,
    neurons_of,
)
from tracer.runs.jobs import AnyJob, BenchmarkJob, DatasetJob, ExemplarsJob, Job, RevisionsJob, load_job
from tracer.runs.opened import Run
from tracer.runs.plan import local
from tracer.runs.repair import repaired
from tracer.runs.report import always_on_note
from tracer.runs.revisions import run_parts
from tracer.runs.split import apart, check_overlap
from tracer.runs.status import Reason, RunState, Status, Tally, reasons, seconds_before
from tracer.runs.units.concepts import check_ahead
from tracer.runs.units.progress import combination_work
from tracer.runs.units.shards import NO_ROOM, askable, input_row
from tracer.runs.workers.messages import Part, Pool, Setup, Started, Task
from tracer.runs.workers.placement import Placing, check_asked, place
from tracer.runs.workers.scheduler import Place, RetryLimits, Runner
from tracer.settings import ModelRecord, numbering_in
from tracer.store.run_folder import NOT_FAILED, Commit, RunFolder
from tracer.system import bars
from tracer.text import kept_of

Watch = Callable[[Status], None]

_WORKER = "tracer.runs.worker:Worker"
START, START_REMOTE = 600.0, 3600.0
_WRITE_EVERY = 2.0  # seconds between two writings of progress.json
_SHOWN = 3  # workers whose place is told
_FEW = 20  # prompts before a share of failures means anything


_Number = Annotated[int, Field(ge=0, lt=10**18)]


class _Journal(Record):
    """What is known of workers that died, by prompt, and of units that are not done; see `Runner`."""

    deaths: dict[_Number, Annotated[int, Field(ge=0, le=2**31)]] = Field(default_factory=dict)
    quarantined: dict[_Number, tuple[str, str]] = Field(default_factory=dict)
    most: dict[_Number, dict[_Number, _Number]] = Field(default_factory=dict)
    batch: _Number | None = None
    parts: dict[_Number, list[Part]] = Field(default_factory=dict)


class Stopped(KeyboardInterrupt):
    """A run was asked to stop: what is committed is kept. `code` is the exit code of the signal."""

    def __init__(self, status: Status, number: int) -> None:
        super().__init__(f"{status.done:,} of {status.n_prompts:,} done")
        self.status, self.code = status, 128 + number


def run(
    job: str | Path | Mapping[str, Any] | AnyJob,
    out: str | Path,
    *,
    set: Sequence[str] = (),
    ray: str | None = None,
    workers: int | None = None,
    gpus_per_worker: float | None = None,
    threads: int = 1,
    strict: bool = False,
    retry_failed: bool = False,
    overwrite: bool = False,
    repair: bool = False,
    start_timeout: float | None = None,
    watch: Watch | None = None,
    note: Callable[[str], None] | None = None,
    progress: bars.Report | bool | None = None,
    pool: Pool | None = None,
    factory: str = _WORKER,
) -> Run:
    """Run a job into a folder; a folder that holds part of the same job is resumed, one that holds the same job with
    fewer prompts (a smaller `limit`) is extended. A job over revisions runs each of them as a part of its own, and ends
    with what differs between them.

    Every prompt of the input gets exactly one row, ``ok``, ``failed`` or ``quarantined``; the tables are the same,
    bit for bit, however many workers there were, wherever, and however often the run was stopped. Only what takes a
    batch apart changes last bits: two processes that die on it, memory that runs out, `retry_failed`; with ``batch: 1``
    in the job not even that does.

    Args:
        job: a job file, or its content. set: changes to it, ``key=value``.
        out: the run folder: a path, or ``s3://`` or ``gs://``.
        ray: None for processes of this machine; ``local`` for a new Ray on this machine; ``auto`` or an address for a
            running cluster.
        workers: how many processes hold a model; by default one for every GPU, or for every core as memory allows, and
            one where the model is remote. Requests to a service are shared out among them (the job's `in_flight`).
        gpus_per_worker: a part of a GPU, or several for a model with ``device_map``.
        threads: of torch, of each worker on a CPU; a resumed run keeps those it started with.
        strict: raise at the end if a prompt failed.
        retry_failed: do the prompts again that failed or were quarantined, of a run with a limit as far as that.
        overwrite: replace another job's run.
        repair: where run.json or input.parquet is damaged or lost, make it again from the job and the commits, if those
            are of this job; then go on.
        start_timeout: seconds to wait for the first worker: ten minutes if None; an hour if it has a service's queue to
            pass first.
        watch: called with the progress about every second, as a status.
        note: called with the planner's advice, e.g. that some prompts are too long, with how columns were read, and
            once with what should be known of how prompts were read; run.json keeps that as ``prompt_notes``, with the
            number of prompts.
        progress: a bar appears on a terminal and in a notebook after half a second, unless there is `watch`; False for
            none, or a function that is called with (prompts done, all prompts).
        pool, factory: other workers, for tests.

    Returns:
        The run that ended, with its tables, circuits, evaluation and report.

    Raises:
        JobError: the job or its data. ModelError: the model. RunError: the folder, the workers, too many failures, or
            with `strict` any. Stopped: SIGINT or SIGTERM came.
    """
    chosen = load_job(job, set)
    for part in chosen.parts().values() if isinstance(chosen, RevisionsJob) else [chosen]:
        check_asked(part, workers, gpus_per_worker)
    asked = _Asked(
        ray=ray,
        workers=workers,
        gpus_per_worker=gpus_per_worker,
        threads=threads,
        retry_failed=retry_failed,
        overwrite=overwrite,
        repair=repair,
        start_timeout=start_timeout,
        watch=watch,
        note=note or (lambda _: None),
        pool=pool,
        factory=factory,
    )
    with bars.shown(progress if watch is None or progress else False, f"running {chosen.kind}") as report:
        go = _run_parts if isinstance(chosen, RevisionsJob) else _run_one
        return go(chosen, str(out), asked.telling(report), strict)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What `run` was asked for, beside a job and a folder."""

    ray: str | None
    workers: int | None
    gpus_per_worker: float | None
    threads: int
    retry_failed: bool
    overwrite: bool
    repair: bool
    start_timeout: float | None
    watch: Watch | None
    note: Callable[[str], None]
    pool: Pool | None
    factory: str

    def telling(self, report: bars.Report | None) -> _Asked:
        """The same, with progress as counts of prompts told to `report` too."""
        if report is None:
            return self

        def tell(status: Status) -> None:
            if status.n_prompts:
                report(min(status.n_prompts, int(status.done + status.in_flight + status.partial)), status.n_prompts)
            if self.watch is not None:
                self.watch(status)

        return replace(self, watch=tell)

    @property
    def here(self) -> bool:
        """Whether workers run on this machine."""
        return self.ray in (None, "local")

    def planned(self, job: Job) -> local.Start | None:
        """The plan of a job on this machine; None where it cannot be known, and for workers of a test."""
        real = self.pool is None and self.factory == _WORKER
        return local.plan_local_run(job, self.workers, self.gpus_per_worker, self.here) if real else None


def _run_one(job: Job, out: str, asked: _Asked, strict: bool) -> Run:
    """A run of one job that is at its end."""
    started = time.perf_counter()
    done = _driven(job, RunFolder(out), asked)
    result = Run(done.job, out, done.status("done"), done.resumed, time.perf_counter() - started)
    _check_failures(result, strict)
    return result


def _run_parts(job: RevisionsJob, out: str, asked: _Asked, strict: bool) -> Run:
    """A run over revisions that is at its end."""
    started, resumed = time.perf_counter(), 0

    def one(part: DatasetJob, address: str, watch: Watch) -> Status:
        nonlocal resumed
        done = _run_one(part, address, replace(asked, watch=watch), strict)
        resumed += done.resumed
        return done.status

    status = run_parts(job, out, one, overwrite=asked.overwrite, repair=asked.repair, watch=asked.watch)
    return Run(job, out, status, resumed, time.perf_counter() - started)


def _driven(job: Job, folder: RunFolder, asked: _Asked) -> _Driver:
    """A run that is at its end."""
    with ExitStack() as stack:
        stack.enter_context(writing(folder.place, "folder", NO_ROOM, "cannot be written or read"))
        folder.check(asked.repair)
        if asked.retry_failed and not asked.overwrite:
            job = as_far(job, folder.record(resume=True))
        lease = stack.enter_context(folder.place.locked())
        signals = stack.enter_context(_Signals())
        driver = _Driver(job, folder, asked, lease.renew, signals)
        # A new run is planned before it claims the folder, so that an error leaves nothing behind.
        early = folder.is_empty()
        planned = asked.planned(job) if early else None
        stack.enter_context(driver.failing())
        driver.plan()
        if driver.is_done:
            driver.show("done", force=True)
        else:
            driver.work(planned if early else asked.planned(job))
    return driver


def _check_failures(result: Run, strict: bool) -> None:
    """Refuse a run of which nothing went well, or, if it is strict, not everything."""
    status = result.status
    if strict and status.failed:
        counts = ", ".join(f"{name} {count}" for name, count in sorted(status.errors.items()))
        raise RunError(
            f"{status.failed} of {status.n_prompts} prompts",
            f"failed ({counts}), and the run is strict; {_most_often(result.reasons)}",
            f"see {result.folder.place}/failed.parquet; {option('retry_failed', True)} does them again",
        )
    if status.done and not status.statuses.get("ok") and status.left_out:
        rule = f"was traced: {kept_of(0, status.left_out | {'failed': status.failed})}"
        step = f"see the prompts' answers: tracer query {result.folder.place} 'select text, answer, error from prompts'"
        raise RunError(f"none of {status.done} prompts", rule, f"{step}, and change the input, the filter or the model")
    if status.done and not status.statuses.get("ok"):
        step = f"fix the job or its input; {option('retry_failed', True)} does them again"
        rule = f"failed; {_most_often(result.reasons)}"
        raise RunError(f"all {status.done} prompts", rule, f"see {result.folder.place}/failed.parquet and {step}")


def _unencrypted(job: Job) -> tuple[str, ...]:
    """That a key will be sent where others can read it, before any worker sends it."""
    if not job.remote:
        return ()
    from tracer.ndif.server import unencrypted  # nnsight takes a second to import

    said = unencrypted(job.host)
    return (said,) if said else ()


def _neurons(job: ExemplarsJob) -> dict[str, Any]:
    """What a run's record says of the neurons that it looks at: workers may not see where they are from."""
    found = neurons_of(job)
    model = None if found.model is None else found.model.model_dump(mode="json")
    return {"neurons": [list(one) for one in found.neurons], "neurons_model": model}


def _most_often(why: Sequence[Reason]) -> str:
    return "most often " + "; ".join(map(str, why)) if why else "none says why"


class _Driver:
    """The state of a running driver."""

    def __init__(
        self,
        job: Job,
        folder: RunFolder,
        asked: _Asked,
        renew: Callable[[], None],
        signals: _Signals,
    ) -> None:
        self.job, self.folder, self.asked, self.renew, self.signals = job, folder, asked, renew, signals
        self.note, self._said = asked.note, set[str]()
        self.kind = job.kind
        self.tally, self.record = Tally(), dict[str, Any]()
        self.runner: Runner | None = None
        self._redo: dict[int, Commit] = {}
        self._committed = bytearray()
        self._started, self._written, self._shown = time.time(), 0.0, 0.0
        self._began, self._earlier = time.monotonic(), 0.0  # seconds that earlier calls took
        self._first: float | None = None
        self._finishing: float | None = None
        self._before, self.resumed = 0, 0
        self._work, self._worked = list[float](), 0.0  # of each combination; and of those that were done since `_first`
        self._journal = _Journal()
        self._session = Tally()
        self._state: RunState = "starting"
        self._claimed = False  # whether the folder is this run's
        self._rate: float | None = None
        self.max_bytes: int | None = None  # bytes that a batch may use here, as planned

    # -------------------------------------------------------------------------------------- planning

    def plan(self) -> None:
        """Find out which units are to do: all of them, or those that an earlier run left."""
        digests, overwrite = digests_of(self.job), self.asked.overwrite
        repair = self.asked.repair and not overwrite
        content, others = joined(digests), [] if isinstance(self.job, BenchmarkJob) else digests[1:]
        self._earlier = seconds_before(self.folder)
        if repair:
            self._repair(content, others)
        # A record that is damaged, of a run that has nothing done, is nothing to keep.
        there = None if self.folder.is_empty() else self._there(overwrite or (repair and not self.folder.has_commits()))
        more = there is not None and not overwrite and self.folder.has_commits() and grows(there, self.job, others)
        has_parts = there is not None and there["kind"] == "revisions"
        if there is not None and not overwrite and not more and (has_parts or self.folder.has_commits()):
            check_same(self.folder, there, self.job, content)
        mine = there is not None and there.get("fingerprint") == fingerprint_of(self.job, content)
        if more and there is not None:
            self._extend(there, content, others)
        elif mine and there is not None and not overwrite and is_resumable(there) and "extended_from" not in there:
            self.record = there
        else:
            self._begin(content, others)
        self._committed = bytearray(self.n_units)
        self._resume()
        self.resumed = self.tally.committed
        self.show("starting", force=True)

    def _there(self, overwrite: bool) -> dict[str, Any] | None:
        try:
            there = self.folder.record(resume=True)
        except RunError:
            if not overwrite:
                raise
            return None
        if there is None:
            rule = "holds files that are not a run"
            raise RunError(f"folder {quoted(str(self.folder.place), 300)}", rule, "choose another")
        return there

    def _repair(self, content: str, others: list[str]) -> None:
        """Make damaged records again, where they can be."""

        def plan(known: int) -> dict[str, Any]:
            return self._plan_of(content, others, *self._planning(known))

        if (made := repaired(self.folder, self.job, content, plan)) is not None:
            self.record = made
            self._write_record({})
            self.note(f"run.json was made again from the job and {self.folder.place}/_commits")

    def _planning(self, known: int = 0) -> tuple[list[str], int]:
        """What was said of the input, and how many prompts, or combinations, there are."""
        if isinstance(self.job, BenchmarkJob):
            return check_overlap(self.job), len(self.job.combinations())
        return self._planned(self.job, known)

    def _begin(self, content: str, others: list[str]) -> None:
        """Plan a new run: its input in shards, then the record that makes it one."""
        self._claimed = True
        self.folder.clear()
        self.record, self._earlier = {}, 0.0
        self.show("planning", force=True)
        self._write_record(self._plan_of(content, others, *self._planning()) | {"threads": self.asked.threads})

    def _extend(self, there: Mapping[str, Any], content: str, others: list[str]) -> None:
        """Plan more prompts after those of a run, or finish doing so: what is done stays, but for a shard that was not
        full. Until the last line the record is that of before, and says that its plan may be ahead of it."""
        assert not isinstance(self.job, BenchmarkJob)
        known = int(there.get("extended_from", there["n_prompts"]))
        self.record = dict(there)
        self._write_record({"extended_from": known})
        try:
            notes, n_prompts = self._planned(self.job, known)
        except TracerError:  # the plan is as it was
            self.record = dict(there)
            self._write_record({})
            raise
        self._read_journal()
        self._journal = self._journal.model_copy(update={"most": {}, "parts": {}})  # their shard may have more prompts
        self._write_journal()
        if known % self.job.shard_size and n_prompts != known:
            self.folder.uncommit(known // self.job.shard_size)
        self.folder.delete_outputs()
        self.record = {name: value for name, value in there.items() if name not in ("extended_from", "prompt_notes")}
        self._write_record(self._plan_of(content, others, notes, n_prompts))

    def _planned(self, job: DatasetJob | ExemplarsJob, known: int = 0) -> tuple[list[str], int]:
        """Write the input in shards: what was said of it, and how many prompts it has."""
        notes: list[str] = []
        rows = data.read(job.source, heard=notes.append)
        if isinstance(job, DatasetJob):
            rows = apart(job, rows, notes.append)
        made: Iterator[dict[str, Any]] = (input_row(row) for row in self._counted(rows))
        if isinstance(job, DatasetJob):
            made = askable(made, job)
        count = self.folder.write_input(made, job.shard_size, known)
        if isinstance(job, DatasetJob) and job.concepts is not None:
            notes += check_ahead(self.folder, job.concepts)
        return notes, count

    def _plan_of(self, content: str, others: list[str], notes: list[str], n_prompts: int) -> dict[str, Any]:
        """What the record says of the job and its prompts."""
        return {
            "kind": self.kind,
            "fingerprint": fingerprint_of(self.job, content),
            **provenance(),
            "job": self.job.model_dump(mode="json"),
            "numbers": self.job.numbers(),
            "input": content,
            "others": others,
            "notes": notes,
            "n_prompts": n_prompts,
            "n_units": -(-n_prompts // getattr(self.job, "shard_size", 1)),
            "plan": None if self.kind == "benchmark" else self.folder.digest_input(),
            **(_neurons(self.job) if isinstance(self.job, ExemplarsJob) else {}),
        }

    def _counted(self, rows: Iterator[data.Row]) -> Iterator[data.Row]:
        """The rows, as they are planned."""
        for count, row in enumerate(rows, 1):
            if self.signals.number:
                raise self._stopped()
            if not count % 1000:
                self.record["n_prompts"] = count
                self.show("planning")
            yield row

    def _stopped(self) -> Stopped:
        self.show("stopped", force=True, message=f"stopped by {signal.Signals(self.signals.number).name}")
        return Stopped(self.status("stopped"), self.signals.number)

    def _resume(self) -> None:
        """Keep what is committed and intact; delete the rest."""
        if self.kind != "benchmark":
            planned = (*self.folder.count_input(), self.folder.digest_input())
            if planned != (self.record["n_prompts"], self.n_units, self.record.get("plan")):
                raise RunError(
                    "file 'input.parquet'", "is not the one that was planned", f"use {option('overwrite', True)}"
                )
        self._read_journal()
        kept: list[str] = []
        damaged: list[int] = []
        for commit in self.folder.commits(damaged):
            if self.folder.problems(commit) or commit.shard >= self.n_units:
                damaged.append(commit.shard)
                continue
            kept += commit.files.values()
            self.tally.add(commit)
            self._committed[commit.shard] = 1
            if self.asked.retry_failed and commit.n_failed:
                self._redo[commit.shard] = commit
        for unit in damaged:
            self.folder.uncommit(unit)
        if damaged or self._redo:
            self.folder.delete_outputs()
        if self._redo:
            self._journal = _Journal()
            self._write_journal()
        for unit, parts in list(self._journal.parts.items()):
            if unit in range(self.n_units) and not self._committed[unit] and self._are_intact(unit, parts):
                kept += (file.name for part in parts for file in part.files.values())
            else:
                del self._journal.parts[unit]
        self.folder.sweep(kept)

    def _are_intact(self, unit: int, parts: Sequence[Part]) -> bool:
        """Whether a unit's parts are as they were written; a file that no commit could name is none of ours."""
        with suppress(ValidationError):
            return not any(self.folder.problems(Commit.naming(unit, part.files)) for part in parts)
        return False

    def _read_journal(self) -> None:
        with suppress(RunError, ValidationError):  # an unreadable journal costs some attempts, but no result
            self._journal = _Journal.model_validate(self.folder.place.read_json("_journal/deaths.json"))

    @property
    def n_units(self) -> int:
        """Units of the run."""
        return int(self.record["n_units"])

    @property
    def n_left(self) -> int:
        """Units to do."""
        return self.n_units - self.tally.committed + len(self._redo)

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        return not self.n_left and self.folder.place.exists("_SUCCESS.json") and not self.folder.check_outputs()

    # --------------------------------------------------------------------------------------- running

    def work(self, planned: local.Start | None) -> None:
        """Do what is left, with workers as they are planned, and say what should be known of it."""
        advice = planned.advice if planned is not None else ()
        for text in (*advice, *self.record.get("notes", ()), *_unencrypted(self.job)):
            self.note(text)
        most = None
        if planned is not None and self.asked.here:
            most, self.max_bytes = planned.workers, planned.max_bytes
        made = self._placed(most)
        with closing(made.pool):
            self.signals.install()  # Ray has installed its own handlers
            if not self.asked.here and not made.gpus and not self.job.remote and self.job.device is None:
                more = option("gpus_per_worker", 1)
                self.note(f"the cluster shows no GPU now, so workers run on CPUs; if it grows, give {more}")
            self._drive(made)

    def _placed(self, most: int | None) -> Placing:
        """Where the run goes. Ray takes seconds to start, and a signal may stop that."""
        asked = self.asked
        try:
            return place(self.job, asked.ray, asked.workers, asked.gpus_per_worker, self.n_left, asked.pool, most)
        except RunError:
            if self.signals.number:
                raise self._stopped() from None
            raise

    def _setup(self, made: Placing) -> Setup:
        """What a worker is started with."""
        there = self.folder.place
        return Setup(
            folder=there.address if there.local is None else str(there.local.absolute()),
            job=self.job.model_dump(mode="json"),
            factory=self.asked.factory,
            threads=self.record["threads"],
            cpus=made.cpus,
            gpus=made.gpus,
            in_flight=made.in_flight,
        )

    def _runner(self, made: Placing) -> Runner:
        """What gives the units to workers, and hears from them."""
        start = self.asked.start_timeout
        if start is None:
            start = START_REMOTE if self.job.remote else START
        return Runner(
            pool=made.pool,
            setup=self._setup(made),
            workers=made.workers,
            limits=RetryLimits(start=start, prompt=getattr(self.job, "prompt_timeout", None)),
            started=self._on_start,
            heard=lambda: self.show(self._state),
            died=lambda _: self._write_journal(),
            kept=self._on_kept,
            stop=lambda: bool(self.signals.number),
            deaths=self._journal.deaths,
            quarantined=self._journal.quarantined,
            most=self._journal.most,
            batch=self._journal.batch,
            parts=self._journal.parts,
        )

    def _drive(self, made: Placing) -> None:
        """Do every unit, then what comes after all of them."""
        self._claimed = True
        self.runner = self._runner(made)
        try:
            self._leave_out()
            for report in self.runner.map(self._tasks()):
                self._commit(Commit.of(report).model_copy(update={"made_by": made_by(self.job, self.record)}))
            if not self.signals.number:
                self._finish()
        except TracerError:
            self.runner.acquit()
            with suppress(OSError, RunError):
                self._write_journal()
            raise
        if self.signals.number:
            raise self._stopped()
        self.show("done", force=True)

    def _leave_out(self) -> None:
        """Find out, once for all units, which neurons are always on, where the job wants that known."""
        if not isinstance(self.job, DatasetJob) or self.job.always_on is None:
            return
        assert self.runner is not None
        if "always_on" not in self.record:
            for report in self.runner.map([Task(unit=self.n_units, first=True)]):
                self._write_record({"always_on": report.outcome})
            if "always_on" not in self.record:  # the run was stopped
                return
        self.note(
            always_on_note(
                self.record["always_on"], self.job.always_on.leave_out, numbering_in(self.record, self.job.basis)
            )
        )

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Once the folder is this run's, an error inside is the last thing that progress.json tells."""
        try:
            yield
        except (TracerError, OSError) as error:
            if self._claimed:
                with suppress(TracerError, OSError):
                    self.show("failed", force=True, message=str(error))
            raise

    def _tasks(self) -> Iterator[Task]:
        for unit in range(self.n_units):
            if not self._committed[unit]:
                yield Task(unit=unit)
        for unit, commit in sorted(self._redo.items()):
            yield Task(unit=unit, files=commit.files, only=self._failed_of(commit))

    def _failed_of(self, commit: Commit) -> tuple[int, ...]:
        prompts = self.folder.read_committed(commit, "prompts", ["prompt_id", "status"]).to_pylist()
        return tuple(row["prompt_id"] for row in prompts if row["status"] not in NOT_FAILED)

    def _on_start(self, event: Started) -> int | None:
        """The first worker fixes the model and the memory of a batch; every other must have the same model."""
        model = event.model.model_dump(mode="json")
        if "model" not in self.record:
            memory = min(event.max_bytes, self.max_bytes or event.max_bytes)
            said = {"warnings": list(event.warnings)} if event.warnings else {}
            self._write_record({"model": model, "memory": memory, **said})
        elif self.record["model"] != model:
            differing = [name for name, value in model.items() if self.record["model"].get(name) != value]
            raise RunError(
                f"the model on {event.where}",
                f"is not the one the run was started with ({', '.join(differing)} differ)",
                f"load the same weights everywhere, or start again with {option('overwrite', True)}",
            )
        if self._first is None:
            say(event.warnings)
            self._said.update(event.warnings)  # every prompt's circuit has them too
            self._first, self._before = time.monotonic(), self.tally.statuses.total()
            self._work = self._works(event.model)
        if self._state == "starting":
            self._state = "running"
        return int(self.record["memory"])

    def _works(self, model: ModelRecord) -> list[float]:
        """How much work each combination of a benchmark is."""
        if not isinstance(self.job, BenchmarkJob):
            return []
        found = []
        for one in self.job.combinations():
            width = model.d_mlp if one.basis == "activation" else model.d_model
            found.append(combination_work(self.job, one, model.n_layers, width))
        return found

    def _write_record(self, more: Mapping[str, Any]) -> None:
        self.record |= more
        self.folder.begin({name: value for name, value in self.record.items() if name != "schema_version"})

    def _on_kept(self, unit: int) -> None:
        """Remember a part; its sums are over all prompts before it, so that those of the part before are not needed."""
        *_, before, _ = (None, *(parts := self._journal.parts[unit]))
        sums = None if before is None else before.files.get("means")
        if before is not None and sums is not None:
            others = {name: file for name, file in before.files.items() if name != "means"}
            parts[-2] = before.model_copy(update={"files": others})
        self._write_journal()
        if sums is not None:
            self.folder.place.remove(sums.name)

    def _write_journal(self) -> None:
        """Keep what is known of workers that died (the runner has the same dictionaries), but for what may change."""
        doubtful = set[int]() if self.runner is None else self.runner.doubtful
        certain = {prompt: why for prompt, why in self._journal.quarantined.items() if prompt not in doubtful}
        batch = self._journal.batch if self.runner is None else self.runner.batch
        known = self._journal.model_copy(update={"quarantined": certain, "batch": batch})
        self.folder.place.write_json("_journal/deaths.json", known.model_dump(mode="json"))

    def _commit(self, commit: Commit) -> None:
        old = self._redo.pop(commit.shard, None)
        if old is not None:  # notes are of prompts with a result, and those were kept
            commit = commit.model_copy(update={"notes": dict(Counter(old.notes) + Counter(commit.notes))})
        self.folder.commit(commit)
        for text in commit.notes:
            if text not in self._said:
                self.note(text)
            self._said.add(text)
        if old is not None:
            self.tally.add(old, -1)
            for name in old.files.values():
                self.folder.place.remove(name)
        if parts := self._journal.parts.pop(commit.shard, None):
            self._write_journal()
            for name in (file.name for part in parts for file in part.files.values()):
                self.folder.place.remove(name)
        self.tally.add(commit)
        self._committed[commit.shard] = 1
        self._session.add(commit)
        self._worked += self._work[commit.shard] if self._work else 0.0
        done, failed = self._session.statuses.total(), self._session.errors.total()
        most = getattr(self.job, "max_error_rate", 1.0)
        if done >= _FEW and failed > most * done:
            why = [] if self.kind == "benchmark" else reasons(self.folder, self.folder.commits())
            raise RunError(
                f"{failed} of {done} prompts",
                f"failed, more than the {most:.0%} that is allowed; {_most_often(why)}",
                f"see 'tracer status', fix the input or raise max_error_rate, and use {option('retry_failed', True)}",
            )
        self.show(self._state)

    def _finish(self) -> None:
        """Write everything that summarises all units; the mark that the run is complete comes last."""
        assert self.runner is not None
        self._state = "finishing"
        self.show(self._state, force=True)
        commits = list(self.folder.commits())
        self.folder.sweep(name for commit in commits for name in commit.files.values())
        said = sum((Counter(commit.notes) for commit in commits), Counter[str]())
        self._write_record({"prompt_notes": dict(sorted(said.items()))})
        # Where no prompt went well there is nothing to evaluate, and whoever started the run is told why.
        ask = self._asked if self.tally.statuses.get("ok") else lambda: None
        job = self.job.leaving_out(self.record) if isinstance(self.job, DatasetJob) else self.job
        finish_run(job, self.folder, commits, self.record, ask)
        if not self.signals.number:
            done = {"units": self.n_units, "rows": dict(self.tally.rows), "statuses": dict(self.tally.statuses)}
            self.folder.seal(**done)

    def _asked(self) -> dict[str, Any] | None:
        """A worker's outcome for the whole run; None if the run was stopped meanwhile."""
        assert self.runner is not None
        self._finishing = time.monotonic()
        outcomes = [report.outcome for report in self.runner.map([Task(unit=self.n_units, finish=True)])]
        return None if self.signals.number else outcomes[0]

    # ------------------------------------------------------------------------------------ being watched

    def status(self, state: RunState, message: str | None = None) -> Status:
        """How far it is."""
        runner, now = self.runner, time.monotonic()
        in_flight = 0 if runner is None or self.kind == "benchmark" else runner.in_flight
        places = [] if runner is None else runner.places
        running = self._first is not None and state == "running"
        places = places if running or state == "finishing" else []
        partial = float(sum(self._done_of(one) for one in places)) if running else 0.0
        if self._first is not None and running:
            new = self.tally.statuses.total() - self._before + in_flight + partial
            self._rate = new / max(1e-9, now - self._first)
        seconds = now - self._began
        return Status(
            kind=self.kind,
            state=state,
            n_units=int(self.record.get("n_units", 0)),
            n_prompts=int(self.record.get("n_prompts", 0)),
            in_flight=in_flight,
            partial=partial,
            at=tuple(self._where(one) for one in places[:_SHOWN]),
            workers=0 if runner is None else runner.n_ready,
            deaths=0 if runner is None else runner.broken,
            rate=self._rate,
            left=self._left(state, in_flight + partial, places),
            seconds=seconds,
            total_seconds=self._earlier + (seconds if self._claimed else 0.0),
            started=self._started,
            updated=time.time(),
            message=message,
            waiting=runner.waiting or None if runner is not None and state == "running" else None,
            **self.tally.record(),
        )

    def _done_of(self, one: Place) -> float:
        """What a worker has done of what takes long: of a combination, or of the prompts in flight."""
        return one.at.share * (1 if self.kind == "benchmark" else one.prompts)

    def _where(self, one: Place) -> str:
        """Where a worker is, for a person."""
        if not isinstance(self.job, BenchmarkJob):
            return str(one.at)
        return f"{self.job.combinations()[one.unit]}: {one.at}"

    def _left(self, state: RunState, under_way: float, places: Sequence[Place]) -> float | None:
        """Seconds to go: of the units by their work, then of what comes after them by its own."""
        now = time.monotonic()
        if state == "finishing" and self._finishing is not None and places:
            share = places[0].at.share
            return (now - self._finishing) * (1 - share) / share if share else None
        if state != "running" or self._first is None:
            return None
        if self._work:
            part = sum(one.at.share * self._work[one.unit] for one in places)
            left = sum(work for work, done in zip(self._work, self._committed, strict=True) if not done) - part
            worked = self._worked + part
        else:
            left = self.record["n_prompts"] - self.tally.statuses.total() - under_way
            worked = self.tally.statuses.total() - self._before + under_way
        return max(0.0, left) * (now - self._first) / worked if worked > 0 else None

    def show(self, state: RunState, force: bool = False, message: str | None = None) -> None:
        """Report progress to `watch`, and write progress.json, now and then."""
        now = time.monotonic()
        self.renew()
        if not force and now - min(self._shown, self._written) < 0.5:
            return
        status = self.status(state, message)
        if self.asked.watch is not None and (force or now - self._shown >= 0.5):
            self._shown = now
            self.asked.watch(status)
        if force or now - self._written >= _WRITE_EVERY:
            self._written = now
            self._write_progress(status)

    def _write_progress(self, status: Status) -> None:
        content = status.model_dump(mode="json")
        try:
            self.folder.place.write_json("progress.json", content)
        except OSError as error:
            if status.state != "failed" or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self.folder.place.remove("progress.json")  # its own room is enough
            self.folder.place.write_json("progress.json", content)


class _Signals:
    """SIGINT and SIGTERM as a number that the driver polls; a second signal acts at once. Outside the main thread
    nothing is caught."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        self.install()
        return self

    def install(self) -> None:
        """Catch them from now on, even if other handlers were installed meanwhile."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                previous = signal.signal(number, self._catch)
                self._before.setdefault(int(number), previous)

    def _catch(self, number: int, _frame: FrameType | None) -> None:
        if self.number:
            signal.signal(number, self._before[number])
            os.kill(os.getpid(), number)
        self.number = number

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
