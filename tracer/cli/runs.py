"""The verbs for runs over many prompts: run, status, plan, query, compact.

Knows their options and what they print. Each imports what it needs inside itself, as the verbs of cli/app.py do.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

import typer

from tracer import choices
from tracer.cli import manner, output, terminal, waiting
from tracer.cli.dressing import folders, job_files
from tracer.cli.options import MOST, Format, Style, flat
from tracer.errors import JobError, RemoteError, RunError, quoted, writing
from tracer.text import printable

if TYPE_CHECKING:
    from tracer.reports.folded import Folded
    from tracer.runs.driver import Run
    from tracer.runs.jobs import AnyJob
    from tracer.runs.status import Status
    from tracer.store.run_folder import RunFolder
    from tracer.text import Rows

JobFile = Annotated[
    str,
    typer.Argument(help="A job file; 'tracer init' writes one to start from.", metavar="JOB", autocompletion=job_files),
]
Out = Annotated[str, typer.Option(help="The run folder, or s3://bucket/folder, gs://...; the same job is continued.")]
RunDir = Annotated[
    str, typer.Argument(help="A run folder, or its s3:// or gs:// address.", metavar="DIR", autocompletion=folders)
]
Change = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a key of the job: --set nodes=500 --set input.path=x.jsonl. Repeatable."),
]
Workers = Annotated[
    int | None, typer.Option(help="Processes. Default: one per GPU, or per core as memory allows; one with --remote.")
]
Gpus = Annotated[float | None, typer.Option(help="Of each worker: a part of a GPU (0.5), or several with device_map.")]
Limit = Annotated[int | None, typer.Option(help="Only the first so many prompts.", min=1, max=MOST)]
Dtype = Annotated[
    choices.Dtype | None, typer.Option(help="Of the model: {}. Default: what the job says, else float32.")
]


@dataclass(frozen=True)
class Crew:
    """Who does a job."""

    PANEL: ClassVar[str] = "Workers"

    ray: Annotated[
        str | None,
        typer.Option(
            help="local: a new Ray on this machine. auto, or HOST:6379: a running cluster this machine is part of."
        ),
    ] = None
    workers: Workers = None
    gpus_per_worker: Gpus = None
    threads: Annotated[
        int, typer.Option(help="Of torch, in each worker on a CPU. The last bits depend on it.", min=1, max=MOST)
    ] = 1


@dataclass(frozen=True)
class Part:
    """Keys of a job with options of their own."""

    PANEL: ClassVar[str] = "Job"

    limit: Limit = None
    shard_size: Annotated[
        int | None, typer.Option(help="Prompts in one unit of work and of commitment.", min=1, max=MOST)
    ] = None
    dtype: Dtype = None


def changes(change: list[str] | None, **options: Any) -> list[str]:
    """The ``--set`` values, then those of shorthand options, which win."""
    return [*(change or ()), *(f"{name}={value}" for name, value in options.items() if value is not None)]


@dataclass(frozen=True)
class Served:
    """Whether the model runs on a server."""

    PANEL: ClassVar[str] = "Remote"

    remote: Annotated[
        bool, typer.Option("--remote", help="On an NDIF server (NDIF_HOST, NDIF_API_KEY): no weights here.")
    ] = False
    in_flight: Annotated[
        int | None,
        typer.Option(
            help="With --remote: requests at the server at a time, over all workers. Default: 4.", min=1, max=MOST
        ),
    ] = None


@dataclass(frozen=True)
class Again:
    """What becomes of prompts that fail, and of a run that is there already."""

    PANEL: ClassVar[str] = "Again"

    strict: Annotated[bool, typer.Option("--strict", help="Exit with 2 if any prompt failed.")] = False
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Do the prompts again that failed or were quarantined.")
    ] = False
    resume: Annotated[bool, typer.Option("--resume", help="Only a reminder: the same command always resumes.")] = False
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another job's run in that folder.")] = False
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Make a damaged or lost run.json or input.parquet again from JOB and what is committed, where both "
            "agree, and go on.",
        ),
    ] = False
    start_timeout: Annotated[
        float | None,
        typer.Option(help="Seconds to wait for the first worker. Default: 600; 3600 with --remote.", min=1),
    ] = None

    def check(self, out: str) -> None:
        """Refuse to resume a run that is not there."""
        from tracer.store.run_folder import RunFolder

        if self.resume and not self.repair and RunFolder(out).record() is None:
            raise JobError(f"--resume with --out {out!r}", "there is no run to resume", "leave out --resume")

    def arguments(self) -> dict[str, Any]:
        """As `tracer.run` takes it."""
        return {name: value for name, value in vars(self).items() if name != "resume"}


@terminal.report_errors
@flat
def run(
    job: JobFile,
    out: Out,
    crew: Crew,
    part: Part,
    served: Served,
    change: Change = None,
    *,
    again: Again,
    style: Style = Format.auto,
) -> None:
    """Run a job over many prompts: a dataset's circuits, the same on several weights, the agreement benchmark,
    exemplars. Repeated, it resumes.

    Example: tracer run jobs/dataset.yaml --out runs/dataset        with --ray local, or --ray auto on a cluster
    """
    from tracer.runs import jobs

    terminal.quiet()
    again.check(out)
    remote = "true" if served.remote else None
    chosen = jobs.load_job(job, changes(change, **vars(part), in_flight=served.in_flight, remote=remote))
    carry_out(chosen, out, crew, again, job, style)


def carry_out(chosen: AnyJob, out: str, crew: Crew, again: Again, name: str, style: Format) -> None:
    """Run a job into a folder with its progress shown, and print what it found.

    Args:
        name: of the job, for whoever watches.
    """
    from tracer.runs import driver

    watch = _Watch(name)
    try:
        with watch:
            result = driver.run(chosen, out, **vars(crew), **again.arguments(), watch=watch, note=terminal.note)
    except driver.Stopped as stopped:
        terminal.complain(f"stopped: {stopped} and committed; repeat the command to resume")
        raise typer.Exit(stopped.code) from None
    except RemoteError as error:
        if not watch.done:
            raise
        step = f"{error.next_step}; {watch.done:,} prompts are committed, repeat the command to resume"
        raise RemoteError(error.value, error.rule, step) from error
    _tell(result, out, style)


def _tell(result: Run, out: str, style: Format) -> None:
    """Print what a run found, and what failed."""
    from tracer.runs import report

    found = _found(result)
    output.put(style, lambda: found.table, lambda: found.rows, lambda: _as_json(result, found))
    output.also(style, report.run_summary(result.status, out, result.seconds, result.resumed))
    output.also(style, f"report.html there says what was found; 'tracer report {out}' makes it again")
    if result.status.failed:
        failed = f"{result.status.failed:,} {result.status.what} failed"
        output.also(style, f"{failed}; --retry-failed does them again. Most often:")
        for reason in result.reasons:
            output.also(style, f"  {reason}")
        output.also(style, f"all of them: tracer query {out} 'select prompt_id, user_id, error from failed'")


class _Found(NamedTuple):
    """What a run found, for people and for programs."""

    table: Folded
    rows: Rows


MOST_NEURONS = 15
"""Neurons that are printed of a run when it ends; its tables have all."""


def _found(result: Run) -> _Found:
    """Of a run what it is about: its combinations, differences, densities, or strongest neurons."""
    from tracer.reports import comparison
    from tracer.reports.folded import Folded
    from tracer.runs import jobs, report
    from tracer.runs.pages import exemplars
    from tracer.runs.pages.compared import comparison_of
    from tracer.settings import numbering_in
    from tracer.store.aggregation import in_most_circuits

    record = result.folder.record() or {}
    if isinstance(result.job, jobs.BenchmarkJob):
        return _benchmark(result)
    if isinstance(result.job, jobs.RevisionsJob):
        found = comparison_of(result.folder)
        return _Found(comparison.table(found, where="the table comparison"), comparison.as_rows(found))
    if isinstance(result.job, jobs.ExemplarsJob):
        both = result.table("densities"), result.table("exemplars")
        rows = exemplars.rows_of(*both, numbering_in(record))
        table = report.exemplars_table(rows, exemplars.HEADS, MOST_NEURONS)
        plain = both[0].drop_columns(["edges", "counts"])  # histograms
        return _Found(Folded((*table.parts, exemplars.first_token(result.job))), report.rows_of(plain, MOST_NEURONS))
    neurons = result.table("neurons")
    table = report.neurons_table(neurons, numbering_in(record, result.job.basis), MOST_NEURONS)
    tested = report.tested(result.folder.place)
    said = Folded((*table.parts, tested)) if tested else table
    return _Found(said, report.rows_of(in_most_circuits(neurons, MOST_NEURONS)))


def _benchmark(result: Run) -> _Found:
    from tracer.runs import finish, jobs
    from tracer.runs.units import benchmark_report
    from tracer.text import Rows

    assert isinstance(result.job, jobs.BenchmarkJob)
    folder = result.folder
    about = list(folder.commits()), folder.record() or {}, result.resumed, result.status.total_seconds
    outcomes = finish.benchmark_result(result.job, folder, *about)
    return _Found(benchmark_report.benchmark_table(outcomes), Rows.of(benchmark_report.compared(outcomes)))


def _as_json(result: Run, found: _Found) -> str:
    content = {"folder": str(result.folder.place), "status": result.status.model_dump(mode="json")}
    return json.dumps(content | {"rows": list(found.rows.rows)}, indent=1, default=str)


@terminal.report_errors
def status(
    folder: RunDir,
    quick: Annotated[bool, typer.Option("--quick", help="Do not read the committed files to check them.")] = False,
    style: Style = Format.auto,
) -> None:
    """How far a run is, from any shell beside it, and whether what it committed is intact."""
    from tracer.runs import report
    from tracer.runs.status import condition

    seen = condition(folder, contents=not quick)
    output.put(
        style,
        lambda: report.condition_table(seen),
        lambda: report.condition_rows(seen),
        lambda: seen.model_dump_json(indent=1, exclude={"record"}),
        said=tuple,
    )
    if seen.problems:
        raise typer.Exit(1)


@terminal.report_errors
def query(
    folder: RunDir,
    sql: Annotated[str, typer.Argument(help="One SELECT over prompts, nodes, edges, neurons, ...", metavar="SQL")],
    rows: Annotated[
        int | None,
        typer.Option(help="Rows that are shown. Default: 1000 in a table, else all.", min=1, max=MOST),
    ] = None,
    style: Style = Format.auto,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse a run that is unfinished or has lost a file, instead of a note.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Do not compare the tables' files with their hashes.")] = False,
) -> None:
    """Ask a run's tables in SQL, with DuckDB, which the extra 'query' installs: prompts, nodes, edges, neurons,
    edges_mean, top_prompts, failed, circuit, circuit_nodes, circuit_edges, tokens, concepts, steering; of exemplars,
    exemplars and densities; of a run over revisions comparison, compared and courses.

    Example: tracer query runs/dataset "select layer, neuron, n_prompts from neurons order by n_prompts desc limit 5"
    """
    from tracer.store import query as querying
    from tracer.store.run_folder import RunFolder

    place = RunFolder(folder)
    files = _tables(place, querying.tables_named(sql), contents=not quick, strict=strict)
    answer = querying.query(files, place.place.fs, sql)
    _put(style, answer, rows, rows or 1000)


@terminal.report_errors
def compact(
    folder: RunDir,
    neuron: Annotated[
        str | None, typer.Option(help="Look one neuron up in the compacted tables: LAYER/NEURON.")
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(help="Rows shown of a look-up. Default: 20 in a table, else all.", min=1, max=MOST),
    ] = None,
    style: Style = Format.auto,
) -> None:
    """Rewrite a run's nodes and edges sorted by (layer, neuron), so that one neuron is found in milliseconds.

    Example: tracer compact runs/dataset      then      tracer compact runs/dataset --neuron 1/13
    """
    from tracer.store import compaction
    from tracer.store.run_folder import RunFolder

    layer, _, number = (neuron or "0/0").partition("/")
    if not all(part.isdecimal() and len(part) < 10 for part in (layer.removeprefix("-"), number)):
        raise JobError(f"--neuron {quoted(neuron)}", "must be LAYER/NEURON", "write it as in 3/120")
    run_folder = RunFolder(folder)
    place, files = run_folder.place, _tables(run_folder, ("nodes", "edges"), contents=neuron is None)
    nodes, edges = files.get("nodes", []), files.get("edges", [])
    started = time.perf_counter()
    if neuron is None:
        with writing(place, "folder", "make room there and in the folder of temporary files, or choose another disk"):
            written = compaction.compact(nodes, edges, place.fs, place)
        counts = ", ".join(f"{count:,} {name}" for name, count in written.items())
        terminal.line(f"{counts} sorted by neuron in {time.perf_counter() - started:.1f} s: {folder}/compact")
        return
    if compaction.compacted(place) != compaction.digest(nodes, edges):
        raise RunError(
            f"{folder}/compact", "is not there, or not of the run as it is now", "run 'tracer compact' first"
        )
    started = time.perf_counter()
    table = compaction.lookup(place, int(layer), int(number))
    took = time.perf_counter() - started
    _put(style, table, rows, rows or 20)
    output.also(style, f"{table.num_rows:,} rows of layer {layer} neuron {number} in {1000 * took:.1f} ms")


def _put(style: Format, table: Any, rows: int | None, tall: int) -> None:
    """Print an Arrow table: `tall` rows of it for people, for a program all or as many as were asked for."""
    from tracer.runs import report

    output.put(
        style,
        lambda: report.rows_table(table, tall),
        lambda: report.rows_of(table, rows),
        lambda: report.rows_json(table.slice(0, rows)),
        said=tuple,
    )


@terminal.report_errors
def plan(
    job: JobFile,
    workers: Workers = None,
    limit: Limit = None,
    dtype: Dtype = None,
    change: Change = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Load the model, trace some of the prompts: time and disk of all of them.")
    ] = False,
    style: Style = Format.auto,
) -> None:
    """What a job will need: memory of a worker by prompt length, batch, GPUs, disk, time; and what will not fit."""
    from tracer.runs.plan import local, planner
    from tracer.runs.plan import table as planner_report

    terminal.quiet()
    made = local.plan(job, set=changes(change, limit=limit, dtype=dtype), workers=workers, measure=measure)
    output.put(
        style,
        lambda: planner_report.plan_table(made),
        lambda: planner_report.plan_rows(made),
        lambda: planner_report.plan_json(made),
    )
    planner.check(made)


VERBS: tuple[Callable[..., None], ...] = (run, status, plan, query, compact)


def _tables(folder: RunFolder, wanted: Collection[str], contents: bool, strict: bool = False) -> dict[str, list[str]]:
    """The files of tables; what is not among them is said, or refused if `strict`."""
    files, gaps = folder.tables(wanted, contents)
    if gaps and strict:
        raise RunError(f"run {folder.place}", gaps[0], "repeat the run command, or leave out --strict")
    for gap in gaps:
        terminal.note(f"{folder.place}: {gap}; the answer is of what is there")
    return files


class _Watch:
    """A run's progress: a bar on a terminal, else a line now and then, both on standard error."""

    def __init__(self, name: str) -> None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        self.console = terminal.console(stderr=True)
        self.is_bar = self.console.is_terminal and not manner.now().quiet
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[line]}", markup=False),
        )
        self.bar = Progress(*columns, console=self.console, transient=True, disable=not self.is_bar)
        self.task = self.bar.add_task(printable(Path(name).name, 80), total=None, line="")
        self.said, self.state, self.done = -terminal.LOG_EVERY, "", 0
        self.question = waiting.Question()
        self.quiet = manner.now().quiet

    def __call__(self, status: Status) -> None:
        from tracer.runs import report

        text, self.done = report.line(status), status.done
        if self.question.due(status.seconds, status.eta if status.rate else None):
            self._ask(status.eta or 0)
        if self.is_bar:
            total = status.n_prompts or None
            done = status.done + status.in_flight + status.partial
            self.bar.update(self.task, completed=done, total=total, line=text)
            return
        now = time.monotonic()
        if self.quiet:
            return
        if now - self.said >= terminal.LOG_EVERY or status.state not in (self.state, "starting"):
            self.said, self.state = now, status.state
            terminal.line(f"{report.clock()} {text}", err=True)

    def __enter__(self) -> None:
        self.bar.__enter__()

    def _ask(self, left: float) -> None:
        """Ask before work of hours, while it goes on."""
        if waiting.can_ask():
            self.bar.stop()
        self.question.ask_meanwhile(left, "what is committed is kept; it goes on meanwhile", self._again)

    def _again(self) -> None:
        if self.is_bar:
            self.bar.start()

    def __exit__(self, *error: Any) -> None:
        self.question.close()
        self.bar.__exit__(*error)
