"""The progress of a run, as its driver writes it and as anyone else reads it.

Knows progress.json and how committed files are checked. Refuses to know how units are done.
"""

from __future__ import annotations

import itertools
import math
import re
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from tracer.errors import RunError, quoted
from tracer.store.record import MANY
from tracer.store.run_folder import LEFT_OUT, NOT_FAILED, Commit, RunFolder

_OURS = frozenset(("JobError", "ModelError", "RunError", "RemoteError"))
"""Errors whose messages say all."""
_VARIES = re.compile(r"\[[^\]]*\]|'[^']*'|\"[^\"]*\"|[0-9]+")

RunState = Literal["planning", "starting", "running", "finishing", "stopped", "failed", "done"]


class Status(BaseModel):
    """How far a run is.

    Attributes:
        kind: of the job. state: what its driver does or did last.
        n_units, committed: units of the run, and how many are done. n_prompts: planned (combinations, of a benchmark).
        statuses: prompts by outcome. errors: the error types of those that failed.
        rows: of every table.
        in_flight: prompts done in units that are not. partial: what is done beside, in prompts (of a benchmark in
            combinations). at: where workers are, in what takes long.
        workers: whose model is loaded. deaths: of workers, since this driver started.
        rate: prompts per second since the first worker was ready; None before there is one.
        left: seconds to go, by the work that is left; None where it is unknown.
        started, updated: Unix time. seconds: this call has taken, total_seconds: all calls on this run, by the clock.
        message: why it ended, where it did not end well.
        waiting: what a worker waits for, if it waits for a service.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    kind: str
    state: RunState
    n_units: int = 0
    committed: int = 0
    n_prompts: int = 0
    statuses: dict[str, int] = {}
    errors: dict[str, int] = {}
    rows: dict[str, int] = {}
    in_flight: int = 0
    partial: float = 0.0
    at: tuple[str, ...] = ()
    workers: int = 0
    deaths: int = 0
    rate: float | None = None
    left: float | None = None
    started: float
    updated: float
    seconds: float = 0.0
    total_seconds: float = 0.0
    message: str | None = None
    waiting: str | None = None

    @property
    def what(self) -> str:
        """What is counted."""
        return {"benchmark": "combinations", "exemplars": "documents"}.get(self.kind, "prompts")

    @property
    def done(self) -> int:
        """Prompts that have a committed row."""
        return sum(self.statuses.values())

    @property
    def failed(self) -> int:
        """Committed prompts without a result that should have one."""
        return self.done - sum(self.statuses.get(name, 0) for name in NOT_FAILED)

    @property
    def left_out(self) -> dict[str, int]:
        """Prompts left out by intent: ``filtered``, ``skipped``, those that there are."""
        return {name: self.statuses[name] for name in LEFT_OUT if self.statuses.get(name)}

    @property
    def eta(self) -> float | None:
        """Seconds to go, by the work that is left or else at this rate; None where it is unknown."""
        if self.state in ("done", "stopped", "failed"):
            return None
        if self.left is not None or not self.rate or self.state == "finishing":
            return self.left
        left = max(0.0, (self.n_prompts - self.done - self.in_flight) / self.rate)
        return left if math.isfinite(left) else None


class Tally:
    """What the commits of a run add up to."""

    def __init__(self) -> None:
        self.committed = 0
        self.statuses: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.rows: Counter[str] = Counter()

    def add(self, commit: Commit, sign: int = 1) -> None:
        """Count a commit, or take it back."""
        self.committed += sign
        for total, part in ((self.statuses, commit.statuses), (self.errors, commit.errors), (self.rows, commit.rows)):
            for name, count in part.items():
                total[name] += sign * count

    def record(self) -> dict[str, Any]:
        """These counts as fields of a `Status`."""
        parts = {"statuses": self.statuses, "errors": self.errors, "rows": self.rows}
        return {"committed": self.committed} | {
            name: {key: count for key, count in sorted(part.items()) if count} for name, part in parts.items()
        }


class Reason(NamedTuple):
    """Why prompts failed: how many so, and what was said of the first of them."""

    prompts: int
    message: str

    def __str__(self) -> str:
        return f"{self.prompts:,} prompt{'s' * (self.prompts > 1)}, such as: {self.message}"


def reasons(folder: RunFolder, commits: Iterable[Commit], most: int = 3) -> list[Reason]:
    """The most frequent reasons why prompts failed; messages that differ only in quoted text and in numbers are one.

    Args:
        commits: of the units to look at; only those with a failure are read, and of these a thousand.
    """
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    failing = (commit for commit in commits if commit.n_failed)
    for commit in itertools.islice(failing, 1000):
        table = folder.read_committed(commit, "prompts", ["error_type", "error", "status"])
        columns = (table[column].to_pylist() for column in ("error_type", "error", "status"))
        for name, text, status in zip(*columns, strict=True):
            if text is None or status in LEFT_OUT:
                continue
            message = text if name in _OURS else f"{name}: {text}"
            kind = _VARIES.sub("", message)
            counts[kind] += 1
            first.setdefault(kind, message)
    return [Reason(count, first[kind]) for kind, count in counts.most_common(most)]


class Condition(BaseModel):
    """A run seen from outside.

    Attributes:
        status: what its driver wrote last, with what the commits themselves add up to.
        problems: committed files that are missing or damaged.
        age: seconds since the driver last wrote; a running driver writes every few seconds.
        held: whether a driver is there now; None where it is unknown.
        reasons: why prompts failed, the three most frequent.
        model, job: from run.json.
    """

    model_config = ConfigDict(frozen=True)

    status: Status
    problems: tuple[str, ...]
    age: float
    held: bool | None
    reasons: tuple[Reason, ...] = ()
    record: dict[str, Any]


def seconds_before(folder: RunFolder) -> float:
    """Seconds that earlier calls on a run took, by the clock; of one that was killed, until it last wrote."""
    try:
        return Status.model_validate(folder.place.read_json("progress.json")).total_seconds
    except (RunError, ValidationError):  # there is none, or a driver died while it wrote one
        return 0.0


def _plan(folder: RunFolder) -> str | None:
    try:
        return folder.digest_input()
    except RunError:
        return None


def condition(address: Any, contents: bool = True) -> Condition:
    """Look at a run, finished or not, without touching it.

    Args:
        contents: read every committed file and compare its hash; else only names and sizes.

    Raises:
        RunError: no run there, or its own records are damaged.
    """
    folder = RunFolder(address)
    record = folder.record()
    if record is None:
        raise RunError(
            f"folder {quoted(str(folder.place), 300)}", "holds no run (no run.json)", "give the folder of a run"
        )
    if record.get("kind") == "revisions":
        return _of_revisions(folder, record, contents)
    if record.get("kind") not in MANY:
        raise RunError(
            f"run {quoted(str(folder.place), 300)}", "is the run of one prompt", "print it with 'tracer show'"
        )
    tally, problems = Tally(), []
    damaged: list[int] = []
    intact: list[Commit] = []
    for commit in folder.commits(damaged):
        tally.add(commit)
        wrong = folder.problems(commit, contents)
        problems += wrong
        if not wrong:
            intact.append(commit)
    problems += [f"_commits/{unit}.json is damaged" for unit in damaged]
    if contents:
        problems += folder.check_outputs()
        if record["kind"] != "benchmark" and _plan(folder) != record.get("plan"):
            problems.append("input.parquet is missing or not the one that was planned (start again, over it)")
    try:
        written = Status.model_validate(folder.place.read_json("progress.json"))
    except (RunError, ValidationError):  # a driver that died before it wrote one
        now = time.time()
        written = Status(kind=record["kind"], state="stopped", started=now, updated=now)
    planned = {"n_units": record.get("n_units", 0), "n_prompts": record.get("n_prompts", 0)}
    now = written.model_copy(update={**planned, **tally.record()})
    age, held = time.time() - written.updated, folder.place.is_held()
    why = tuple(reasons(folder, intact)) if contents and record["kind"] != "benchmark" else ()
    return Condition(status=now, problems=tuple(problems), age=age, held=held, reasons=why, record=record)


def _of_revisions(folder: RunFolder, record: dict[str, Any], contents: bool) -> Condition:
    """The condition of a run over revisions: of all its parts together."""
    there = [name for name in record["parts"] if RunFolder(folder.part(name)).record() is not None]
    parts = [condition(folder.part(name), contents) for name in there]
    problems = [f"{name}: {problem}" for name, part in zip(there, parts, strict=True) for problem in part.problems]
    problems += folder.check_outputs() if contents else []
    try:
        written = Status.model_validate(folder.place.read_json("progress.json"))
    except (RunError, ValidationError):
        now = time.time()
        written = Status(kind="revisions", state="stopped", started=now, updated=now)
    whole = joined([part.status for part in parts], len(record["parts"]), written.state)
    own = ("started", "updated", "seconds", "total_seconds", "message", "at", "rate")
    status = whole.model_copy(update={name: getattr(written, name) for name in own})
    return Condition(
        status=status,
        problems=tuple(problems),
        age=time.time() - written.updated,
        held=folder.place.is_held(),
        reasons=tuple(reason for part in parts for reason in part.reasons)[:3],
        record=record | {"model": (parts[0].record.get("model") if parts else None)},
    )


def joined(parts: list[Status], n_parts: int, state: RunState) -> Status:
    """One status of all parts; those that have not begun are taken to be as large as the last."""
    if not parts:
        now = time.time()
        return Status(kind="revisions", state=state, started=now, updated=now)
    last, left = parts[-1], n_parts - len(parts)
    counts: dict[str, Counter[str]] = {name: Counter() for name in ("statuses", "errors", "rows")}
    for part in parts:
        for name, total in counts.items():
            total.update(getattr(part, name))
    sums = {name: sum(getattr(part, name) for part in parts) for name in ("n_units", "committed", "n_prompts")}
    sums = {name: value + left * getattr(last, name) * (name != "committed") for name, value in sums.items()}
    at = (f"part {len(parts)} of {n_parts}", *last.at) if state == "running" else ()
    kept = {name: dict(total) for name, total in counts.items()} | sums
    return last.model_copy(update={"kind": "revisions", "state": state, "at": at, "left": None, **kept})
