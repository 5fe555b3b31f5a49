"""The verbs for runs over many prompts: run, status, plan, query, compact.

Knows their options and what they print. Each imports what it needs inside itself, as the verbs of cli/app.py do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tracer.cli import terminal
from tracer.cli.options import MOST, Format, Style, flat
from tracer.errors import JobError, RemoteError, RunError, quoted, writing
from tracer.text import printable

if TYPE_CHECKING:
    from tracer.runs.driver import Run
    from tracer.runs.jobs import AnyJob
    from tracer.runs.status import Status
    from tracer.store.run_folder import RunFolder

JobFile = Annotated[str, typer.Argument(help="A job file, such as jobs/sva.yaml or jobs/dataset.yaml.", metavar="JOB")]
Out = Annotated[str, typer.Option(help="The run folder, or s3://bucket/folder, gs://...; the same job is continued.")]
RunDir = Annotated[str, typer.Argument(help="A run folder, or its s3:// or gs:// address.", metavar="DIR")]
Change = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a key of the job: --set nodes=500 --set input.path=x.jsonl. Repeatable."),
]
Workers = Annotated[
    int | None, typer.Option(help="Processes. Default: one per GPU, or per core as memory allows; one with --remote.")
]
Gpus = Annotated[float | None, typer.Option(help="Of each worker: a part of a GPU (0.5), or several with device_map.")]
Limit = Annotated[int | None, typer.Option(help="Only the first so many prompts.", min=1, max=MOST)]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16, int8, nf4, ...")]


@dataclass(frozen=True)
class Crew:
    """Who does a job."""

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
def run(job: JobFile, out: Out, crew: Crew, part: Part, served: Served, change: Change = None, *, again: Again) -> None:
    """Run a job over many prompts: a dataset's circuits, the same on several weights, the agreement benchmark,
    exemplars. Repeated, it resumes.

    Example: tracer run jobs/dataset.yaml --out runs/dataset        with --ray local, or --ray auto on a cluster
    """
    from tracer.runs import jobs

    terminal.quiet()
    again.check(out)
    remote = "true" if served.remote else None
    chosen = jobs.load_job(job, changes(change, **vars(part), in_flight=served.in_flight, remote=remote))
    carry_out(chosen, out, crew, again, job)


def carry_out(chosen: AnyJob, out: str, crew: Crew, again: Again, name: str) -> None:
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
    _tell(result, out)


def _tell(result: Run, out: str) -> None:
    """Print what a run found, and what failed."""
    from tracer.runs import finish, jobs, report
    from tracer.runs.units import benchmark_report
    from tracer.settings import numbering_in

    if isinstance(result.job, jobs.BenchmarkJob):
        folder = result.folder
        outcomes = finish.benchmark_result(
            result.job,
            folder,
            list(folder.commits()),
            folder.record() or {},
            result.resumed,
            result.status.total_seconds,
        )
        terminal.tables().print(benchmark_report.benchmark_table(outcomes))
    elif isinstance(result.job, jobs.RevisionsJob):
        _tell_differences(result.folder)
    elif isinstance(result.job, jobs.ExemplarsJob):
        from tracer.runs.pages import exemplars

        both = result.table("densities"), result.table("exemplars")
        rows = exemplars.rows_of(*both, numbering_in(result.folder.record() or {}))
        terminal.tables().print(report.exemplars_table(rows, exemplars.HEADS))
        terminal.line(exemplars.first_token(result.job))
    else:
        numbering = numbering_in(result.folder.record() or {}, result.job.basis)
        terminal.tables().print(report.neurons_table(result.table("neurons"), numbering))
        if said := report.tested(result.folder.place):
            terminal.line(said)
    terminal.line(report.run_summary(result.status, out, result.seconds, result.resumed))
    terminal.line(f"report.html there says what was found; 'tracer report {out}' makes it again")
    if result.status.failed:
        terminal.line(
            f"{result.status.failed:,} {result.status.what} failed; --retry-failed does them again. Most often:"
        )
        for reason in result.reasons:
            terminal.line(f"  {reason}")
        terminal.line(f"all of them: tracer query {out} 'select prompt_id, user_id, error from failed'")


def _tell_differences(folder: RunFolder) -> None:
    """Print what differs between the parts of a run over revisions."""
    from tracer.reports import comparison
    from tracer.runs.pages.compared import comparison_of

    found = comparison_of(folder)
    terminal.tables().print(comparison.table(found))
    for line in comparison.lines(found):
        terminal.line(line)


@terminal.report_errors
def status(
    folder: RunDir,
    quick: Annotated[bool, typer.Option("--quick", help="Do not read the committed files to check them.")] = False,
    style: Annotated[Format, typer.Option("--format", help="table for people, json for scripts.")] = Format.table,
) -> None:
    """How far a run is, from any shell beside it, and whether what it committed is intact."""
    from tracer.runs import report
    from tracer.runs.status import condition

    if style is Format.csv:
        raise JobError("--format csv", "a status is not a table", "use table or json")
    seen = condition(folder, contents=not quick)
    if style is Format.json:
        terminal.data(seen.model_dump_json(indent=1, exclude={"record"}))
    else:
        terminal.tables().print(report.condition_table(seen))
    if seen.problems:
        raise typer.Exit(1)


@terminal.report_errors
def query(
    folder: RunDir,
    sql: Annotated[str, typer.Argument(help="One SELECT over prompts, nodes, edges, neurons, ...", metavar="SQL")],
    style: Style = Format.table,
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
    from tracer.runs import report
    from tracer.store import query as querying
    from tracer.store.run_folder import RunFolder

    place = RunFolder(folder)
    files = _tables(place, querying.tables_named(sql), contents=not quick, strict=strict)
    answer = querying.query(files, place.place.fs, sql)
    if style is Format.table:
        terminal.tables().print(report.rows_table(answer))
    else:
        terminal.data(report.rows_text(answer, style.value).rstrip())


@terminal.report_errors
def compact(
    folder: RunDir,
    neuron: Annotated[
        str | None, typer.Option(help="Look one neuron up in the compacted tables: LAYER/NEURON.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows shown of a look-up.", min=1, max=MOST)] = 20,
) -> None:
    """Rewrite a run's nodes and edges sorted by (layer, neuron), so that one neuron is found in milliseconds.

    Example: tracer compact runs/dataset      then      tracer compact runs/dataset --neuron 1/13
    """
    from tracer.runs import report
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
    terminal.tables().print(report.rows_table(table, rows))
    terminal.line(f"{table.num_rows:,} rows of layer {layer} neuron {number} in {1000 * took:.1f} ms")


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
) -> None:
    """What a job will need: memory of a worker by prompt length, batch, GPUs, disk, time; and what will not fit."""
    from tracer.runs.plan import local, planner
    from tracer.runs.plan import table as planner_report

    terminal.quiet()
    made = local.plan(job, set=changes(change, limit=limit, dtype=dtype), workers=workers, measure=measure)
    terminal.tables().print(planner_report.plan_table(made))
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
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[line]}", markup=False),
        )
        self.bar = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self.task = self.bar.add_task(printable(Path(name).name, 80), total=None, line="")
        self.said, self.state, self.done = -terminal.LOG_EVERY, "", 0

    def __call__(self, status: Status) -> None:
        from tracer.runs import report

        text, self.done = report.line(status), status.done
        if self.console.is_terminal:
            total = status.n_prompts or None
            done = status.done + status.in_flight + status.partial
            self.bar.update(self.task, completed=done, total=total, line=text)
            return
        now = time.monotonic()
        if now - self.said >= terminal.LOG_EVERY or status.state not in (self.state, "starting"):
            self.said, self.state = now, status.state
            terminal.line(f"{report.clock()} {text}", err=True)

    def __enter__(self) -> None:
        self.bar.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.bar.__exit__(*error)
