"""What a run adds once all its units are committed: tables over all prompts, and its evaluation by a worker.

Knows which files a finished run holds. Each is a function of the committed tables alone, in the order of their units,
so that a run that was stopped and resumed ends with the same bytes. Refuses to know workers and when it is called.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow.compute as pc

from tracer.evaluation.curves import Curves
from tracer.meaning import exemplars, peaks
from tracer.meaning.densities import Totals
from tracer.meaning.strongest import asked_beside
from tracer.reports.tables import csv_bytes
from tracer.runs.jobs import BenchmarkJob, DatasetJob, ExemplarsJob, Job
from tracer.runs.pages import benchmark
from tracer.runs.pages.write import TOP, benchmark_result, write_report
from tracer.runs.report import evaluation_plot
from tracer.runs.units import benchmark_report, mean_edges, steering
from tracer.runs.units.benchmark_report import BenchmarkResult
from tracer.runs.units.concepts import write_concepts
from tracer.runs.units.dataset_circuit import circuit_of_units
from tracer.runs.units.exemplars import wanted_of
from tracer.settings import numbering_in
from tracer.store import aggregation, edge_means, schemas
from tracer.store.parquet import writer
from tracer.store.run_folder import NOT_FAILED, Commit, RunFolder

Ask = Callable[[], dict[str, Any] | None]


def finish_run(job: Job, folder: RunFolder, commits: Sequence[Commit], record: Mapping[str, Any], ask: Ask) -> None:
    """Write every file of the whole run but the mark that it ended.

    Args:
        ask: has a worker evaluate the run; None where the run was stopped meanwhile.
    """
    if isinstance(job, BenchmarkJob):
        _finish_benchmark(benchmark_result(job, folder, commits, record), folder)
    elif isinstance(job, ExemplarsJob):
        _finish_exemplars(job, folder, commits, record)
    else:
        _finish_dataset(job, folder, commits, ask)
    write_report(job, folder, commits, record)


# ------------------------------------------------------------------------------------------------ a dataset


def _finish_dataset(job: DatasetJob, folder: RunFolder, commits: Sequence[Commit], ask: Ask) -> None:
    nodes, edges = ([commit.files[name] for commit in commits if name in commit.files] for name in ("nodes", "edges"))
    place = folder.place
    paths = [place.path(name) for name in nodes]
    _write_failed(folder, commits)
    folder.write_table("neurons.parquet", aggregation.neurons(paths, place.fs))
    folder.write_table("top_prompts.parquet", aggregation.top_prompts(paths, place.fs, TOP))
    if edges:
        with place.writing("edges_mean.parquet") as file:
            edge_means.write_edges_mean(paths, [place.path(name) for name in edges], place.fs, file)
    if (circuit := circuit_of_units(job, folder, commits)) is not None:
        folder.write_table("circuit.parquet", circuit)
    if job.concepts is not None:
        write_concepts(folder, job.concepts, commits)
    if not job.ends_with_model:
        return
    if (outcome := ask()) is None:
        return
    for name, content in outcome.items():
        place.write(f"{name}.json", json.dumps(content, indent=1, allow_nan=True).encode())
    if "evaluation" in outcome:
        made = Curves.of(outcome["evaluation"]["curves"])
        place.write("evaluation.csv", csv_bytes(list(made.rows())))
        place.write("evaluation.png", evaluation_plot(made, outcome["evaluation"]))
    steering.draw_steering(folder, job)
    place.remove(mean_edges.CHECKPOINT)
    place.remove(steering.CHECKPOINT)


def _write_failed(folder: RunFolder, commits: Sequence[Commit]) -> None:
    """The rows of all prompts that failed, one shard's at a time in memory."""
    with folder.place.writing("failed.parquet") as file, writer(file, schemas.PROMPTS) as parquet:
        for commit in commits:
            if commit.n_failed:
                table = folder.read_committed(commit, "prompts")
                parquet.write_table(table.filter(~pc.field("status").isin(NOT_FAILED)).cast(schemas.PROMPTS))


# ------------------------------------------------------------------------------------------------ exemplars


def _finish_exemplars(
    job: ExemplarsJob, folder: RunFolder, commits: Sequence[Commit], record: Mapping[str, Any]
) -> None:
    """Units' parts added up, one at a time in memory; then exemplars are chosen."""
    _write_failed(folder, commits)
    neurons = sorted(set(map(numbering_in(record).of_parts, record["neurons"])))
    wanted, totals, candidates = wanted_of(job), Totals.none(len(neurons)), schemas.CANDIDATES.empty_table()
    for commit in commits:
        totals.merge(Totals.of(folder.read_committed(commit, "counts")))
        part = folder.read_committed(commit, "candidates").cast(schemas.CANDIDATES)
        candidates = peaks.merged([candidates, part], wanted)
    folder.write_table(exemplars.FILE, peaks.exemplars(candidates, neurons, totals.peaks, wanted))
    folder.write_table(exemplars.DENSITIES_FILE, totals.densities(neurons, job.active_share, job.active_above))
    if job.of is not None and (found := asked_beside(job.of, neurons)) is not None:
        folder.write_table("top_prompts.parquet", found)


# ---------------------------------------------------------------------------------------------- a benchmark


def _finish_benchmark(result: BenchmarkResult, folder: RunFolder) -> None:
    outcomes = [outcome.model_dump(mode="json") for outcome in result.outcomes]
    folder.place.write("results.json", json.dumps({"outcomes": outcomes}).encode())
    for name, content in (*benchmark_report.files(result), *benchmark.files(result)):
        folder.place.write(name, content)
