"""What is shown to a person, before any medium: tables of text, facts by their names, and sentences.

Knows what a table is. Refuses to know what stands in one (reports/sheet.py and its neighbours), and how it is drawn: on
a terminal of some width (reports/folded.py), or on a page (reports/document.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from tracer.errors import option

TERMINAL, PAGE = "terminal", "page"


@dataclass(frozen=True)
class Bar:
    """A cell that shows a number as a length: where it starts, its width and where zero is, in percent of the cell."""

    left: float
    width: float
    zero: float
    look: str


@dataclass(frozen=True)
class Mark:
    """A cell that says whether something is well: ``good`` or ``bad``."""

    text: str
    look: str

    def __str__(self) -> str:
        return self.text


Cell = str | Bar | Mark


@dataclass(frozen=True)
class Column:
    """A column: its heading, whether it is of text (set to the left), its unit, and where alone it is shown; `joined`
    to the one before it, as an interval is, it goes wherever that goes; `short` is its heading where there is little
    room."""

    head: str
    left: bool = False
    unit: str = ""
    only: str = ""
    joined: bool = False
    short: str = ""


@dataclass(frozen=True)
class Sheet:
    """A table. `name` is its id on a page; `more` says what is left out, and how to see it."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    more: str = ""

    @staticmethod
    def of(name: str, title: str, columns: Sequence[str | Column], rows: Sequence[Sequence[Cell]]) -> Sheet:
        """A column may be its heading alone, which starts with ``<`` if it is of text and with ``&`` if it is joined to
        the one before it."""
        made = (one if isinstance(one, Column) else _column(one) for one in columns)
        return Sheet(name, title, tuple(made), tuple(map(tuple, rows)))

    def on(self, medium: str) -> Sheet:
        """The table as a terminal or a page shows it."""
        kept = [i for i, column in enumerate(self.columns) if column.only in ("", medium)]
        rows = tuple(tuple(row[i] for i in kept) for row in self.rows)
        return replace(self, columns=tuple(self.columns[i] for i in kept), rows=rows)

    def of_all(self, count: int, where: str = "") -> Sheet:
        """The table with what it says of rows that it leaves out, of `count` that there are.

        Args:
            where: those are; by default the option `rows` shows them.
        """
        left = count - len(self.rows)
        how = f", in {where}" if where else f"; {option('rows', count)} shows all {count:,}"
        return replace(self, more=f"{left:,} more{how}") if left > 0 else self


def _column(head: str) -> Column:
    return Column(head.lstrip("<&"), "<" in head[:2], joined=head.startswith("&"))


@dataclass(frozen=True)
class Facts:
    """Values by their names, one under the other; a name may be empty where a value belongs to the one above."""

    rows: tuple[tuple[str, str], ...]
    title: str = ""

    @staticmethod
    def of(rows: Iterable[tuple[str, str]], title: str = "") -> Facts:
        """Of any pairs."""
        return Facts(tuple(rows), title)


Part = Sheet | Facts | str
"""A table, facts, or a paragraph, which may have several lines."""


def sentences(parts: Iterable[Part]) -> list[str]:
    """What is said beside the tables, a line each."""
    found = list[str]()
    for part in parts:
        if isinstance(part, Facts):
            found += [f"{name}: {value}" if name else value for name, value in part.rows]
        elif isinstance(part, str):
            found += part.split("\n")
    return found
