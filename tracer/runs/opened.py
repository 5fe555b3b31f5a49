"""What a run folder holds, as one object: its tables, circuits, evaluation and report, whoever made it and whenever.

Knows which files a run of each kind has. Reads them when they are asked for, and writes nothing. Refuses to know how
they were made.
"""

from __future__ import annotations

import time
from calendar import timegm
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import csv

from tracer.circuit.circuit import Graph
from tracer.circuit.from_run import read_graph
from tracer.errors import JobError, RunError, option, quoted
from tracer.evaluation.curves import Curves
from tracer.runs.jobs import AnyJob, RevisionsJob, load_job
from tracer.runs.status import Reason, Status, condition, reasons
from tracer.settings import ModelRecord
from tracer.store import one_prompt
from tracer.store.parquet import opened
from tracer.store.record import MANY
from tracer.store.run_folder import KEPT, OUTPUTS, RunFolder
from tracer.store.schemas import SCHEMAS
from tracer.system.display import Shown

_SHOWN = 3
"""Reasons of failures that are told."""
_INSIDE = ("values", "means", "candidates", "counts")
"""Tables that are there for what a run adds up."""
_FILES = tuple(name for name in (*OUTPUTS, *KEPT) if name.endswith((".parquet", ".csv")))


@dataclass(frozen=True, repr=False)
class Run(Shown):
    """A run: what `tracer.run` did, or what `tracer.open_run` found in a folder.

    Attributes:
        job: what was run, a record of its keys; None of one prompt, and of a job that this version cannot read.
        address: where its folder is.
        status: of its prompts, and of the time that all calls on it took.
        resumed: units that were already committed. seconds: this call took, by the clock. Both 0 where it was opened.
    """

    job: Any
    address: str
    status: Status
    resumed: int = 0
    seconds: float = 0.0

    @property
    def folder(self) -> RunFolder:
        """Its folder."""
        return RunFolder(self.address)

    @property
    def record(self) -> dict[str, Any]:
        """What its run.json holds: job, model, versions, fingerprint.

        Raises:
            RunError: it is gone or damaged.
        """
        return one_prompt.read_record(self.address)

    @property
    def kind(self) -> str:
        """Of what it is: ``trace`` (one prompt), ``graph`` (an imported one), ``dataset``, ``benchmark``, ``exemplars``
        or ``revisions``."""
        return str(self.record["kind"])

    @property
    def model(self) -> ModelRecord | None:
        """Which model it belongs to, where that is known."""
        record = self.record
        made = record.get("model") or record.get("circuit", {}).get("model")
        return None if made is None else ModelRecord.model_validate(made)

    @property
    def reasons(self) -> list[Reason]:
        """Why prompts failed, the three most frequent reasons."""
        if isinstance(self.job, RevisionsJob):
            each = [RunFolder(self.folder.part(name)) for name in self.job.parts()]
            return [reason for part in each for reason in reasons(part, part.commits())][:_SHOWN]
        return reasons(self.folder, self.folder.commits()) if self.kind in ("dataset", "exemplars") else []

    @property
    def parts(self) -> dict[str, Run]:
        """The runs of a run over revisions, by name, those that have begun; of another run none."""
        if self.kind != "revisions":
            return {}
        each = {name: self.folder.part(name) for name in self.record["parts"]}
        return {name: open_run(address) for name, address in each.items() if RunFolder(address).record() is not None}

    @property
    def sizes(self) -> dict[str, int]:
        """Its tables by name, and their rows."""
        folder, found = self.folder, dict[str, int]()
        for commit in folder.commits():
            for name in commit.files.keys() - {*_INSIDE}:
                found[name] = found.get(name, 0) + commit.rows.get(name, 0)
        for file in _FILES:
            name, _, kind = file.rpartition(".")
            if name in found or not folder.place.exists(file):
                continue
            if kind == "parquet":
                with opened(folder.place.path(file), folder.place.fs) as table:
                    found[name] = table.metadata.num_rows
            else:
                found[name] = self.table(name).num_rows
        return dict(sorted(found.items(), key=lambda one: (one[0] not in SCHEMAS, one[0])))

    def table(self, name: str) -> pa.Table:
        """A table as a whole: ``prompts``, ``nodes``, ``edges``, ``profiles``, or ``neurons``, ``edges_mean``,
        ``top_prompts``, ``failed``, ``circuit``, ``circuit_nodes``, ``circuit_edges``, ``tokens``, ``concepts``,
        ``steering``, ``descriptions``; of exemplars ``exemplars`` and ``densities``; of a run over revisions
        ``comparison``, ``compared`` and ``courses``; of a benchmark ``curves``, ``table`` and ``mean``. `sizes` names
        those that are there.

        Args:
            name: of the table.

        Raises:
            RunError: the run has no such table, or a damaged one.
        """
        folder = self.folder
        parts = []
        if name in SCHEMAS:
            parts = [folder.read_committed(commit, name) for commit in folder.commits() if name in commit.files]
        elif folder.place.exists(f"{name}.parquet"):
            parts = [folder.read_output(f"{name}.parquet")]
        elif f"{name}.csv" in _FILES and folder.place.exists(f"{name}.csv"):
            parts = [csv.read_csv(pa.BufferReader(folder.place.read(f"{name}.csv")))]
        if not parts:
            raise RunError(f"table {quoted(name)}", "is not among this run's", "see run.sizes, or 'tracer status'")
        return pa.concat_tables(parts)

    def to_pandas(self, name: str = "prompts") -> Any:
        """A table as a pandas DataFrame, with the table's own columns.

        Args:
            name: as `table` has it.

        Raises:
            RunError: the run has no such table, or a damaged one.
        """
        return self.table(name).to_pandas()

    def circuit(self, prompt: int | None = None) -> Graph:
        """Its circuit: that of one prompt's run, or of a dataset as a whole, or of one of its prompts.

        Args:
            prompt: of a run over many, as in the prompts table, from 0; the dataset's own circuit if None.

        Raises:
            JobError: no such prompt, or one without a result. RunError: the run has no circuit, or a damaged one.
        """
        if prompt is not None and self.kind not in MANY:
            rule = "has no effect on the run of one prompt"
            raise JobError(option("prompt", prompt), rule, "leave it out")
        return read_graph(self.address, prompt)

    @property
    def evaluation(self) -> Curves | None:
        """The faithfulness and completeness of its circuit by size, where that was tested; else None.

        Raises:
            RunError: evaluation.json is damaged.
        """
        place = self.folder.place
        if not place.exists("evaluation.json"):
            return None
        content = place.read_json("evaluation.json")
        content = content.get("curves", content)
        if "control_faithfulness" in content:  # of one prompt's run, where `control` is every prompt's metric
            content = content | {"control": content["control_faithfulness"]}
        try:
            return Curves.of(content)
        except (KeyError, TypeError, ValueError) as error:
            rule = "is damaged: it holds no curves"
            raise RunError(f"evaluation.json of run {quoted(self.address, 300)}", rule, "evaluate it again") from error

    @property
    def report(self) -> str | None:
        """Where its report.html is; None where there is none."""
        place = self.folder.place
        if not place.exists("report.html"):
            return None
        return place.path("report.html") if place.local is None else str(Path(place.local) / "report.html")

    @property
    def facts(self) -> tuple[tuple[str, str], ...]:
        """What is said of it in short: names, and what they are."""
        return tuple(self._facts())

    def _facts(self) -> Iterator[tuple[str, str]]:
        yield "kind", self.kind
        if (model := self.model) is not None:
            yield "model", f"{model.shown} ({model.dtype})"
        status = self.status
        yield "state", status.state
        if self.kind in _OF_ONE:
            yield "prompt", str(self.record.get(_OF_ONE[self.kind], {}).get("text", ""))
        else:
            told = ", ".join(f"{number:,} {name}" for name, number in sorted(status.statuses.items()))
            yield status.what, f"{status.done:,} of {status.n_prompts:,} committed" + (f": {told}" if told else "")
        yield "report", self.report or "none"


_OF_ONE = {"trace": "circuit", "graph": "graph"}
"""Where the record of one prompt's run holds it."""


def open_run(folder: str | Path) -> Run:
    """What a run folder holds: the run of one prompt, of a dataset, a benchmark, exemplars or revisions, finished or
    not. Nothing is loaded and nothing is changed: tables are read when they are asked for.

        run = tracer.open_run("runs/dallas")
        run.circuit().plot()
        run.to_pandas("nodes")

    Args:
        folder: a path, or ``s3://`` or ``gs://``.

    Returns:
        Its tables (`Run.table`, `Run.to_pandas`), circuits (`Run.circuit`), evaluation and report.

    Raises:
        RunError: no run there, one of another version, or a damaged one.
    """
    address = str(folder)
    record = one_prompt.read_record(address)
    if record["kind"] in _OF_ONE:
        return Run(None, address, _one(address, record))
    return Run(_job(record), address, condition(address, contents=False).status)


def _one(address: str, record: dict[str, Any]) -> Status:
    """The status of one prompt's run, which is written at once."""
    made = timegm(time.strptime(record["created"], "%Y-%m-%dT%H:%M:%SZ")) if "created" in record else 0.0
    done = sum(1 for _ in RunFolder(address).commits())
    counts = {"n_units": 1, "committed": done, "n_prompts": 1, "statuses": {"ok": 1} if done else {}}
    state = "done" if done else "stopped"
    return Status(kind=record["kind"], state=state, started=made, updated=made, **counts)


def _job(record: dict[str, Any]) -> AnyJob | None:
    try:
        return load_job(record["job"])
    except JobError:  # another version's
        return None
