"""How a verb's result leaves: as tables for people, in the width that there is, or as one table or record for programs.

Knows formats and standard output. Refuses to know any verb and any table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import typer

from tracer.cli import manner, terminal
from tracer.cli.options import Format

if TYPE_CHECKING:
    from tracer.reports.folded import Folded
    from tracer.text import Rows


def put(
    style: Format,
    table: Callable[[], Folded],
    rows: Callable[[], Rows],
    record: Callable[[], str],
    said: Callable[[], Iterable[str]] | None = None,
) -> None:
    """Print a result on standard output.

    Args:
        table: for people. rows: what tsv and csv hold, without anything beside it. record: as JSON.
        said: what stands beside the rows, a line each, on standard error; by default what stands beside the tables.
    """
    from tracer.reports.parts import sentences
    from tracer.text import csv_text, tsv_text

    if style is Format.json:
        terminal.data(record().rstrip("\n"))
    elif style in (Format.tsv, Format.csv):
        made = rows()
        if style is Format.csv:
            terminal.data(csv_text(made.rows, made.names).removesuffix("\n"))
        else:  # nothing but its tabs and line ends controls a terminal
            typer.echo(tsv_text(made.rows, made.names), nl=False)
        if not manner.now().quiet:
            for one in sentences(table().parts) if said is None else said():
                terminal.line(one, err=True)
    else:
        show(table())


def show(table: Folded) -> None:
    """Print tables for people, in the width that there is."""
    printed = terminal.console(soft_wrap=True)
    for line in table.lines(terminal.width()):
        printed.print(line)


def also(style: Format, text: str) -> None:
    """A line beside a result, as where it was saved: under tables; on standard error where a program reads them, unless
    that is to be quiet."""
    if style is Format.table or not manner.now().quiet:
        terminal.line(text, err=style is not Format.table)
