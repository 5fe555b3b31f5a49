"""The verb describe: its options, and what it prints of what neurons are said to do.

Knows which arguments of `tracer.describe` the options are. Refuses to know endpoints and how neurons are described.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from tracer.cli import output, terminal
from tracer.cli.options import MOST, Format, Style, flat
from tracer.errors import JobError

if TYPE_CHECKING:
    from tracer.meaning.describe import Described


@dataclass(frozen=True)
class What:
    """Which neurons, and by what."""

    PANEL: ClassVar[str] = "Neurons"

    exemplars: Annotated[
        str | None, typer.Option(help="The folder of 'tracer exemplars'. Default: the run's own texts, if it has any.")
    ] = None
    top: Annotated[int, typer.Option(help="Strongest neurons of the run to describe.", min=1, max=MOST)] = 20
    candidates: Annotated[int, typer.Option(help="Descriptions of each; the best is kept.", min=1, max=100)] = 3
    out: Annotated[str | None, typer.Option(help="A folder for the descriptions. Default: the run's.")] = None


@dataclass(frozen=True)
class Bound:
    """What it may cost."""

    PANEL: ClassVar[str] = "Bounds"

    max_calls: Annotated[int, typer.Option(help="Requests, further tries included.", min=1, max=MOST)] = 1000
    max_tokens_total: Annotated[int, typer.Option(help="Tokens in and out.", min=1, max=MOST)] = 2_000_000
    parallel: Annotated[int, typer.Option(help="Requests at a time.", min=1, max=64)] = 4


@terminal.report_errors
@flat
def describe(
    run: Annotated[str, typer.Argument(help="A run folder: of one prompt, of a dataset, or of exemplars.")],
    file: Annotated[
        Path | None,
        typer.Option("--import", help="Take descriptions from a file instead: CSV, Parquet or JSON lines."),
    ] = None,
    *,
    what: What,
    bound: Bound,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say how many calls and tokens it may take at most.")
    ] = False,
    style: Style = Format.auto,
) -> None:
    """Describe a run's strongest neurons in words by a language model (TRACER_LLM_URL, TRACER_LLM_MODEL,
    TRACER_LLM_KEY), scored by simulation on held-out texts. Repeated after an interruption it asks for nothing twice.

    Example: tracer describe runs/dallas --exemplars runs/texts --top 10
    """
    import tracer
    from tracer.meaning import describe as describing

    terminal.quiet()
    if dry_run and file is not None:
        raise JobError("--dry-run", "has no effect with --import, which asks nobody", "leave one of them out")
    if dry_run:
        found = describing.cost(run, **vars(what))
        terminal.line(
            f"{found.neurons:,} neurons: at most {found.calls:,} calls, about {found.prompt_tokens:,} tokens in and at "
            f"most {found.completion_tokens:,} out; {found.kept:,} answers are there already; nothing was sent"
        )
        return
    try:
        with terminal.ProgressBar("neurons described") as progress:
            how: dict[str, Any] = {**vars(what), **vars(bound), "progress": progress}
            done = tracer.describe(run, file, **how, report=lambda text: terminal.line(text, err=True))
    except KeyboardInterrupt:
        terminal.complain("interrupted; answers so far are kept: repeat the command, and nothing is asked twice")
        raise typer.Exit(130) from None
    _show(done, style)


def _show(done: Described, style: Format) -> None:
    from tracer.runs import report

    output.put(
        style,
        lambda: report.rows_table(done.table, done.table.num_rows),
        lambda: report.rows_of(done.table),
        lambda: report.rows_json(done.table),
    )
    output.also(style, f"{done.table.num_rows:,} descriptions in {done.address}/descriptions.parquet")
    for one in done.outcomes:
        if not one.candidates and one.stopped is None:
            terminal.note(f"no description of {one.known.key}: {one.none}")
    if done.outcomes:
        terminal.note(f"asked: {done.spent.summary}")
