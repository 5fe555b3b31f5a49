"""A run's report, made from its folder: when the run ends, and at any time before or after that.

Knows which files a report is made of and where it goes. Everything is a function of what is committed and of the files
that were made of it, so that the same run gives the same bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from tracer.circuit.circuit import read_beside
from tracer.circuit.said import Said
from tracer.errors import RunError, option, quoted, writing
from tracer.experts import Numbering
from tracer.reports.page import Link
from tracer.runs.jobs import BenchmarkJob, DatasetJob, ExemplarsJob, Job, RevisionsJob, load_job
from tracer.runs.pages import benchmark, compared, dataset, exemplars
from tracer.runs.pages.graphs import Drawn, Kept, draw, strongest
from tracer.runs.pages.meaning import meaning_of
from tracer.runs.status import reasons
from tracer.runs.units.benchmark_report import BenchmarkResult, Outcome
from tracer.runs.units.dataset_circuit import circuit_of_units
from tracer.settings import ModelRecord, numbering_in
from tracer.store import aggregation
from tracer.store.record import MANY
from tracer.store.run_folder import Commit, RunFolder, is_ours
from tracer.text import printable

REPORT = "report.html"
TOP = 10
"""Prompts kept of each neuron in top_prompts.parquet."""
_READ = (
    *("neurons.parquet", "top_prompts.parquet", "circuit.parquet", "tokens.parquet"),
    *("exemplars.parquet", "densities.parquet", "evaluation.json", "quality.json"),
    *("concepts.parquet", "steering.parquet", "steering_groups.parquet", "descriptions.parquet"),
)
_COLUMNS = ("n_nodes", "n_edges", "metric", "unexplained")


def benchmark_result(
    job: BenchmarkJob,
    folder: RunFolder,
    commits: Sequence[Commit],
    record: Mapping[str, Any],
    resumed: int = 0,
    seconds: float = 0.0,
) -> BenchmarkResult:
    """A benchmark's outcomes from its commits; `seconds` that it took, if they are known.

    Raises:
        RunError: a commit without one.
    """
    outcomes = []
    for commit in commits:
        if commit.outcome is None:
            raise RunError(f"commit {commit.shard}.json", "holds no outcome", "delete it and repeat the run command")
        try:
            outcomes.append(Outcome.model_validate(commit.outcome))
        except ValidationError as error:
            step = "delete it and repeat the run command"
            raise RunError(f"commit {commit.shard}.json", "is damaged: its outcome is none", step) from error
    model = ModelRecord.model_validate(record["model"])
    return BenchmarkResult(job, model, tuple(outcomes), str(folder.place), resumed, seconds)


def write_report(job: Job, folder: RunFolder, commits: Sequence[Commit], record: Mapping[str, Any]) -> list[str]:
    """Write report.html and the graph pages into the folder; their names. Graph pages of before are gone."""
    names = []
    for name, _ in folder.place.files("graphs"):
        if is_ours(name):
            folder.place.remove(name)
    if isinstance(job, BenchmarkJob):
        page = benchmark.page_of(benchmark_result(job, folder, commits, record), record)
    elif isinstance(job, ExemplarsJob):
        page = exemplars.page_of(_collected(job, folder, commits, record))
    else:
        found, links = _found(job, folder, commits, record), []
        for drawn, content in _graphs(folder, commits, found):
            if content is not None:
                folder.place.write(drawn.name, content.encode())
                names.append(drawn.name)
            links.append(_link(drawn, drawn.name if content is not None else None))
        page = dataset.page_of(replace(found, links=links))
    folder.place.write(REPORT, page.html().encode())
    return [REPORT, *names]


def refresh(address: Any) -> list[str]:
    """Write the report of a run, finished or not, and its graph pages into its folder again; their names.

    Raises:
        RunError: as `report_text`; or the folder cannot be written, or a driver is writing it now.
    """
    parts = is_over_revisions(address)
    folder, job, commits, record = (RunFolder(address), None, [], {}) if parts else opened(address)
    with writing(folder.place, "folder", f"write the report elsewhere: {option('out')}"), ExitStack() as held:
        try:
            held.enter_context(folder.place.locked())
        except RunError as error:
            step = f"wait for it, or write the report elsewhere: {option('out')}"
            raise RunError(error.value, error.rule, step) from error
        if job is None:
            return compared.refresh(folder)
        names = write_report(job, folder, commits, record)
        folder.reseal(names)
    return names


def report_text(address: Any, beside: Path | None = None) -> str:
    """The report of a run, finished or not, to be written elsewhere; nothing in the folder changes.

    Args:
        beside: the file it is for: graph pages that are in the run's folder are linked from there.

    Raises:
        RunError: no run there, or one of a single prompt, or a damaged one.
    """
    if is_over_revisions(address):
        return compared.report_text(RunFolder(address))
    folder, job, commits, record = opened(address)
    if isinstance(job, BenchmarkJob):
        return benchmark.page_of(benchmark_result(job, folder, commits, record), record).html()
    if isinstance(job, ExemplarsJob):
        return exemplars.page_of(_collected(job, folder, commits, record)).html()
    found = _found(job, folder, commits, record)
    return dataset.page_of(replace(found, links=list(_links(folder, commits, found, beside)))).html()


def is_over_revisions(address: Any) -> bool:
    """Whether a run is one over revisions, whose report is a comparison."""
    return (RunFolder(address).record() or {}).get("kind") == "revisions"


def opened(address: Any) -> tuple[RunFolder, Job, list[Commit], dict[str, Any]]:
    """A run over many prompts, finished or not, with what is committed.

    Raises:
        RunError: no run there, or one of a single prompt, or a damaged one.
    """
    folder = RunFolder(address)
    name = f"run {quoted(str(folder.place), 300)}"
    if (record := folder.record()) is None:
        raise RunError(f"folder {quoted(str(folder.place), 300)}", "holds no run (no run.json)", "give a run's folder")
    if record.get("kind") not in MANY:
        raise RunError(name, "is the run of one prompt", "'tracer evaluate' writes its report")
    if problems := folder.check_outputs(_READ):
        raise RunError(name, problems[0], "it is damaged: repeat the run command")
    if "model" not in record:
        raise RunError(name, "has not begun: no worker has loaded its model yet", "wait, or repeat the run command")
    job = load_job(record["job"])
    assert not isinstance(job, RevisionsJob)
    return folder, job, list(folder.commits()), record


# ------------------------------------------------------------------------------------------------ what is there


def _found(job: DatasetJob, folder: RunFolder, commits: Sequence[Commit], record: Mapping[str, Any]) -> dataset.Found:
    """What is there of a dataset's run, without links to its graph pages."""
    statuses: Counter[str] = Counter()
    columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    for commit in commits:
        statuses.update(commit.statuses)
        table = folder.read_committed(commit, "prompts", ["status", *_COLUMNS])
        table = table.filter(pc.field("status") == "ok")
        for name in _COLUMNS:
            columns[name] += table[name].to_pylist()
    qualities = _json(folder, "quality.json")
    return dataset.Found(
        job=job,
        record=record,
        n_planned=int(record["n_prompts"]),
        statuses=dict(sorted(statuses.items())),
        columns=columns,
        neurons=neurons(folder, commits),
        top=top_prompts(folder, commits),
        circuit=circuit(job, folder, commits),
        evaluation=_json(folder, "evaluation.json"),
        qualities=qualities,
        links=(),
        reasons=reasons(folder, commits, 20),
        said=_said(folder, numbering_in(record, job.basis)),
        meaning=meaning_of(folder),
    )


def _said(folder: RunFolder, numbering: Numbering) -> Said:
    """What the folder says of what neurons do."""
    known = read_beside(folder.place.address)
    return Said(known.get("neuron_tokens"), known.get("descriptions"), numbering)


def _collected(
    job: ExemplarsJob, folder: RunFolder, commits: Sequence[Commit], record: Mapping[str, Any]
) -> exemplars.Collected:
    """What is there of an exemplars run."""
    names = ("exemplars", "densities", "top_prompts")
    tables = {name: folder.find_output(f"{name}.parquet") for name in names}
    statuses = sum((Counter(commit.statuses) for commit in commits), Counter[str]())
    return exemplars.Collected(
        job=job,
        record=record,
        statuses=dict(sorted(statuses.items())),
        reasons=reasons(folder, commits, 20),
        exemplars=tables["exemplars"],
        densities=tables["densities"],
        top=tables["top_prompts"],
    )


def _json(folder: RunFolder, name: str) -> Any:
    """What a JSON file of the run holds; None where there is none."""
    return json.loads(folder.place.read(name)) if folder.place.exists(name) else None


def neurons(folder: RunFolder, commits: Sequence[Commit]) -> pa.Table:
    """neurons.parquet, or what it would be of what is committed."""
    if (there := folder.find_output("neurons.parquet")) is not None:
        return there
    return aggregation.neurons(_nodes(folder, commits), folder.place.fs)


def top_prompts(folder: RunFolder, commits: Sequence[Commit]) -> pa.Table:
    """top_prompts.parquet, or what it would be."""
    if (there := folder.find_output("top_prompts.parquet")) is not None:
        return there
    return aggregation.top_prompts(_nodes(folder, commits), folder.place.fs, TOP)


def circuit(job: DatasetJob, folder: RunFolder, commits: Sequence[Commit]) -> pa.Table | None:
    """circuit.parquet, or what it would be; None where the job asks for none, or no prompt has an attribution."""
    if (there := folder.find_output("circuit.parquet")) is not None:
        return there
    return circuit_of_units(job, folder, commits)


def _nodes(folder: RunFolder, commits: Sequence[Commit]) -> list[str]:
    return [folder.place.path(commit.files["nodes"]) for commit in commits if "nodes" in commit.files]


# ------------------------------------------------------------------------------------------------ its graphs


def _graphs(folder: RunFolder, commits: Sequence[Commit], found: dataset.Found) -> Iterator[tuple[Drawn, str | None]]:
    kept = _weights(found.circuit, found.neurons)
    return draw(folder, strongest(folder, commits, kept), folder.place.exists("circuit.parquet"))


def _weights(found: pa.Table | None, neurons: pa.Table) -> Kept:
    """What a prompt may hold of: the circuit's nodes by their |mean attribution|; without one the neurons that are in
    most circuits, by theirs summed over prompts."""
    if found is not None:
        rows = [(row, row["position"], abs(row["mean_attribution"])) for row in found.to_pylist()]
    else:
        strong = aggregation.in_most_circuits(neurons, 100).to_pylist()
        rows = [(row, -1, row["n_prompts"] * row["prompt_mean_abs"]) for row in strong]
    return {(row["layer"], at, row["neuron"]): value for row, at, value in rows if value and math.isfinite(value)}


def _links(folder: RunFolder, commits: Sequence[Commit], found: dataset.Found, beside: Path | None) -> Iterator[Link]:
    """The graph pages that are in the folder, from a file elsewhere."""
    there = {file.name for file in folder.place.files("graphs")}
    for drawn, content in _graphs(folder, commits, found) if there else ():
        if drawn.name in there and content is not None:
            local = folder.place.local
            address = None
            if local is not None and beside is not None:
                path = os.path.relpath(local.absolute() / drawn.name, beside.absolute().parent)
                address = quote(path.replace(os.sep, "/"))
            yield _link(drawn, address)


def _link(drawn: Drawn, address: str | None) -> Link:
    text = printable(drawn.text, 300)
    return Link(address, drawn.name, text if drawn.problem is None else f"{text} (not drawn: {drawn.problem})")
