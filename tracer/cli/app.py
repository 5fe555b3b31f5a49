"""The command line: its verbs, how it begins and how it ends.

Each verb imports what it needs inside itself, so that --help is instant. A `TracerError` is printed as one line and
ends with code 2; anything else is a bug and keeps its traceback. Knows no method and no format.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from tracer.cli import collecting, runs, terminal
from tracer.cli.comparing import compare
from tracer.cli.concepts import concepts, contrast
from tracer.cli.describing import describe
from tracer.cli.evaluating import evaluate
from tracer.cli.graphs import export, import_, show, view
from tracer.cli.grouping import group
from tracer.cli.loading import Adapter, GgufFile, report
from tracer.cli.neuron import neuron
from tracer.cli.reporting import report_
from tracer.cli.steering import steer
from tracer.cli.submitting import submit
from tracer.cli.swapping import swap
from tracer.cli.sweeping import sweep
from tracer.cli.tracing import trace
from tracer.errors import JobError, TracerError, quoted
from tracer.text import is_text

if TYPE_CHECKING:
    from rich.table import Table

# The base class of click's usage errors, or of those of the copy that newer typer bundles.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    help="Find circuits of MLP neurons in language models, and prove what was found.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(asked: bool) -> bool:
    if asked:
        from tracer import __version__

        typer.echo(f"tracer {__version__}")
        raise typer.Exit
    return asked


@app.callback()
def root(
    version: Annotated[  # its callback prints it
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Find circuits of MLP neurons in language models, and prove what was found."""


@terminal.report_errors
def doctor(
    model: Annotated[
        str | None, typer.Option(help="The model to measure the identities on: demo if none is given.")
    ] = None,
    adapter: Adapter = None,
    gguf_file: GgufFile = None,
    remote: Annotated[bool, typer.Option("--remote", help="What NDIF grants, and the identities there.")] = False,
    given: Annotated[
        str | None, typer.Argument(help="The model, instead of --model.", metavar="[MODEL]", show_default=False)
    ] = None,
) -> None:
    """Versions, devices, memory, and the method's identities measured on a model, here or on NDIF."""
    from tracer.cli import doctor as checkup
    from tracer.reports.tables import cell

    terminal.quiet()
    if given is not None and model is not None:
        raise JobError(f"model {quoted(given)} and --model {quoted(model)}", "one is measured at a time", "give one")
    model = given or model or "demo"
    for title, values in (("Installation", checkup.environment()), ("Optional", checkup.optional())):
        terminal.tables().print(_listed(title, [(name, cell(value)) for name, value in values.items()]), "")
    if remote and adapter is not None:
        raise JobError(f"--adapter {adapter}", "cannot be merged into weights on a server", "leave one of them out")
    if remote and gguf_file is not None:
        raise JobError(f"--gguf-file {gguf_file}", "is dequantised here, which no server does", "leave one of them out")
    checks = checkup.remote(model, report=report) if remote else checkup.identities(model, adapter, gguf_file)
    shown = [("[green]ok[/]" if one.holds else "[red]FAILED[/]", one.name, cell(one.measured)) for one in checks]
    terminal.tables().print(_listed(f"{'NDIF and identities' if remote else 'Identities'} on {cell(model)}", shown))
    if all(check.holds for check in checks):
        return
    if remote:
        terminal.complain("what FAILED above is not granted, or wrong there: without gradients use --local-weights")
    else:
        terminal.complain(
            "an identity fails: numbers from this installation cannot be trusted; run it on 'demo' and report it"
        )
    raise typer.Exit(1)


def _listed(title: str, rows: Iterable[tuple[str, ...]]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, show_header=False, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*row)
    return table


VERBS = (
    *(trace, show, view, export, import_, group, evaluate, steer, sweep, swap, neuron, describe, concepts, contrast),
    compare,
    *(doctor, *runs.VERBS, *collecting.VERBS, report_, submit),
)
for verb in VERBS:
    app.command(verb.__name__.rstrip("_"))(verb)


def main() -> None:
    """The console script: every error a user can fix is one line on standard error, with exit code 2."""
    try:
        terminal.Output.take()
        for given in sys.argv[1:]:
            if not is_text(given):
                step = "give texts as UTF-8, and rename a file whose name is not"
                raise JobError(f"argument {quoted(given)}", "holds bytes that are not UTF-8 text", step)
        code = app(standalone_mode=False)
        if sys.stdout is not None:  # it was closed, as by >&-
            sys.stdout.flush()
    except TracerError as error:
        terminal.complain(str(error))
        sys.exit(2)
    except OSError as error:
        # What a name given here cannot be is the user's to mend; any other error of the system is a bug of ours.
        if not isinstance(error.filename, str) or not any(error.filename in given for given in sys.argv[1:]):
            raise
        terminal.complain(f"path {quoted(error.filename, 200)}: {error.strerror}; give another name")
        sys.exit(2)
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
            sys.exit(2)
        message = " ".join(error.format_message().split()).rstrip(".?")  # type: ignore[attr-defined]
        terminal.complain(f"{message}; see --help for what is possible")
        sys.exit(2)
    except (typer.Abort, KeyboardInterrupt):
        terminal.complain("interrupted; nothing was saved")
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)
