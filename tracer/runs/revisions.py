"""A run over revisions: one dataset's job on several weights, each a run of its own below it, then what differs.

Knows the order in which parts are run, what of them is told, and what is written at the end. A part is an ordinary run
folder: stopped and repeated, it goes on; so does this. Refuses to know how a part is run (runs/driver.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tracer.circuit.circuit import provenance
from tracer.errors import RunError, TracerError, option, quoted, writing
from tracer.runs.identity import is_resumable
from tracer.runs.jobs import DatasetJob, RevisionsJob
from tracer.runs.pages.compared import files_of
from tracer.runs.status import RunState, Status, joined, seconds_before
from tracer.store import parquet
from tracer.store.run_folder import RunFolder
from tracer.store.schemas import SCHEMA_VERSION

Watch = Callable[[Status], None]
RunPart = Callable[[DatasetJob, str, Watch], Status]
"""Runs a part into its folder, told of its progress; what came of it."""

_WRITE_EVERY = 2.0


def run_parts(
    job: RevisionsJob,
    out: Any,
    run_part: RunPart,
    *,
    overwrite: bool = False,
    repair: bool = False,
    watch: Watch | None = None,
) -> Status:
    """Run every part of a job that is not done, then write what differs between them.

    Args:
        run_part: runs one. overwrite: replace another job's run. repair: make a lost or damaged run.json again.
        watch: called with the progress over all parts.

    Raises:
        RunError: the folder, or what a part raises. JobError: parts that cannot be compared.
    """
    folder = RunFolder(out)
    step = "make room or choose another folder; what is committed is kept, repeat the command to resume"
    with writing(folder.place, "folder", step, "cannot be written or read"):
        folder.check(repair)
        with folder.place.locked() as lease:
            parts = job.parts()
            _begin(folder, job, list(parts), overwrite, repair)
            told = _Told(folder, len(parts), watch, lease.renew, seconds_before(folder))
            with told.failing():
                for name, part in parts.items():
                    told.ended(run_part(part, folder.part(name), told.hear))
                told.show("finishing")
                made = files_of(folder)
                for name, content in made.items():
                    folder.place.write(name, content)
                folder.seal(units=0, rows={}, parts=list(parts))
            return told.show("done")


def _begin(folder: RunFolder, job: RevisionsJob, names: list[str], overwrite: bool, repair: bool) -> None:
    """Make the folder this job's: which parts there are may change, and nothing else."""
    there = None if folder.is_empty() else _there(folder, overwrite or repair)
    if there is not None and not overwrite:
        _check_same(folder, there, job)
    if overwrite:
        folder.clear()
    if there is not None and not overwrite and there["parts"] == names:
        return
    folder.delete_outputs()
    numbers = job.numbers()
    fingerprint = parquet.fingerprint({"job": numbers, "parts": names, "schema": SCHEMA_VERSION})
    content = {"kind": job.kind, "job": {"kind": job.kind, **job.model_dump(mode="json", exclude_unset=True)}}
    folder.begin(
        {"fingerprint": fingerprint, **provenance(), **content, "numbers": numbers, "parts": names, "n_units": 0}
    )


def _there(folder: RunFolder, overwrite: bool) -> dict[str, Any] | None:
    try:
        return folder.record(resume=True)
    except RunError:
        if not overwrite:
            raise
        return None


def _check_same(folder: RunFolder, there: Mapping[str, Any], job: RevisionsJob) -> None:
    value, again = f"folder {quoted(str(folder.place), 300)}", f"choose another, or give {option('overwrite', True)}"
    if there.get("kind") != job.kind:
        raise RunError(value, f"holds a run of another kind ({there.get('kind')})", again)
    if (known := there["numbers"]) != (mine := job.numbers()):
        differing = sorted(
            f"{part}.{name}"
            for part in mine
            for name in {*mine[part], *known.get(part, {})}
            if mine[part].get(name) != known.get(part, {}).get(name)
        )
        raise RunError(value, f"holds another run: {', '.join(differing)} differ", again)
    if not is_resumable(there):
        raise RunError(value, "was started with other versions of what decides numbers", again)


@dataclass
class _Told:
    """The progress over all parts, out of that of each."""

    folder: RunFolder
    n_parts: int
    watch: Watch | None
    renew: Callable[[], None]
    before: float
    done: list[Status] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    started: float = field(default_factory=time.time)
    written: float = 0.0

    def hear(self, part: Status) -> None:
        """A part's progress."""
        self.renew()
        self._tell(joined([*self.done, part], self.n_parts, part.state if part.state != "done" else "running"))

    def ended(self, part: Status) -> None:
        """A part is done."""
        self.done.append(part)

    def show(self, state: RunState, message: str | None = None) -> Status:
        """Tell, and write, where it is now."""
        status = joined(self.done, self.n_parts, state).model_copy(update={"message": message})
        self.written = 0.0
        return self._tell(status)

    def _tell(self, status: Status) -> Status:
        seconds = time.monotonic() - self.began
        own = {"seconds": seconds, "total_seconds": self.before + seconds, "started": self.started}
        status = status.model_copy(update=own | {"updated": time.time()})
        if time.monotonic() - self.written >= _WRITE_EVERY:
            self.written = time.monotonic()
            self.folder.place.write_json("progress.json", status.model_dump(mode="json"))
        if self.watch is not None:
            self.watch(status)
        return status

    @contextmanager
    def failing(self) -> Iterator[None]:
        """An error inside is the last thing that progress.json tells."""
        try:
            yield
        except (TracerError, OSError) as error:
            self.show("failed", str(error))
            raise
        except KeyboardInterrupt:
            self.show("stopped")
            raise
