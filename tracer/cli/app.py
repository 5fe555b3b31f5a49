"""The command line: its verbs, how it begins and how it ends.

Each verb imports what it needs inside itself, so that --help is instant. Knows no method and no format, and not how
errors are shown (cli/verbs.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Annotated

import typer

from tracer.cli import collecting, manner, output, runs, terminal
from tracer.cli.comparing import compare
from tracer.cli.concepts import concepts, contrast
from tracer.cli.configuring import about_file, config
from tracer.cli.describing import describe
from tracer.cli.dressing import Quiet, Verbose, dressed
from tracer.cli.evaluating import evaluate
from tracer.cli.graphs import export, import_, show
from tracer.cli.grouping import group
from tracer.cli.init import init
from tracer.cli.loading import Adapter, GgufFile, report
from tracer.cli.neuron import neuron
from tracer.cli.options import Format, Style
from tracer.cli.reporting import report_
from tracer.cli.steering import steer
from tracer.cli.submitting import submit
from tracer.cli.swapping import swap
from tracer.cli.sweeping import sweep
from tracer.cli.tracing import trace
from tracer.cli.verbs import Commands
from tracer.cli.viewing import view
from tracer.errors import JobError, quoted

_HELP = {"help_option_names": ["-h", "--help"]}


app = typer.Typer(
    cls=Commands,
    help="Find circuits of MLP neurons in language models, and prove what was found.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings=_HELP,
)


def _printed(asked: bool) -> bool:
    if asked:
        from tracer import __version__

        typer.echo(f"tracer {__version__}")
        raise typer.Exit
    return asked


@app.callback()
def root(
    version: Annotated[  # its callback prints it
        bool,
        typer.Option(
            "--version", "-V", callback=_printed, is_eager=True, metavar="", help="Print the version and exit."
        ),
    ] = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Find circuits of MLP neurons in language models, and prove what was found."""
    del version  # its callback has printed it
    del verbose, quiet  # verbs.Commands has taken them


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
    style: Style = Format.auto,
) -> None:
    """Versions, devices, memory, and the method's identities measured on a model, here or on NDIF."""
    from tracer.cli import doctor as checkup

    terminal.quiet()
    if given is not None and model is not None:
        raise JobError(f"model {quoted(given)} and --model {quoted(model)}", "one is measured at a time", "give one")
    name = str(given or model or manner.now().fallback.get("model", "demo"))
    here = checkup.installation(about_file())
    if style is Format.table:
        output.show(here)  # before a model is loaded
        terminal.line("")
    if remote and adapter is not None:
        raise JobError(f"--adapter {adapter}", "cannot be merged into weights on a server", "leave one of them out")
    if remote and gguf_file is not None:
        raise JobError(f"--gguf-file {gguf_file}", "is dequantised here, which no server does", "leave one of them out")
    checks = checkup.remote(name, report=report) if remote else checkup.identities(name, adapter, gguf_file)
    title = f"{'NDIF and identities' if remote else 'Identities'} on {name}"
    output.put(
        style,
        lambda: checkup.checks_table(title, checks),
        lambda: checkup.rows(here, checks),
        lambda: checkup.as_json(name, here, checks),
        said=tuple,
    )
    if not all(check.holds for check in checks):
        _unsound(remote)


def _unsound(remote: bool) -> None:
    """End with what failed checks mean."""
    if remote:
        terminal.complain("what FAILED above is not granted, or wrong there: without gradients use --weights local")
    else:
        terminal.complain(
            "an identity fails: numbers from this installation cannot be trusted; run it on 'demo' and report it"
        )
    raise typer.Exit(1)


PANELS: dict[str, tuple[Callable[..., None], ...]] = {
    "Circuits": (trace, show, view, export, import_, evaluate, steer, sweep, swap, compare),
    "Neurons": (neuron, group, describe, concepts, contrast, *collecting.VERBS),
    "Runs over many prompts": (init, *runs.VERBS, report_, submit),
    "This installation": (doctor, config),
}
"""The verbs, under their headings of --help."""
VERBS = tuple(itertools.chain(*PANELS.values()))
ASK = frozenset({trace, evaluate, sweep, swap, compare, contrast, runs.run, *collecting.VERBS})
"""Verbs that may take hours."""
for _panel, _verbs in PANELS.items():
    for _verb in _verbs:
        app.command(_verb.__name__.rstrip("_"), rich_help_panel=_panel, context_settings=_HELP)(
            dressed(_verb, asks=_verb in ASK)
        )


def main() -> None:
    """The console script."""
    app()
