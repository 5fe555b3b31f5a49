"""Tables, facts and paragraphs in lines of so many columns of a terminal: folded to fit, and never cut.

One rule for all tables. As long as a table is too wide: (1) its headings are shortened, and folded between words;
(2) its texts are folded, to three lines a row at most; (3) its columns move together by one space; (4) columns go below
their row, each as ``heading: value``: wide ones first, then the last, the first never. A number is folded only where it
alone is wider than a line.

Knows widths of characters and where a text may be folded. Refuses to know what is said.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.text import Text

from tracer.reports.parts import TERMINAL, Cell, Facts, Mark, Part, Sheet
from tracer.text import printable

GAPS = (2, 1)
"""Spaces between columns: where there is room, and where there is little."""
TALL = 3
"""Lines to which a text in a column is folded."""
NARROW = 12
"""Columns of a terminal that a text needs not to fold to less than."""
WIDE = 24
"""Columns of a terminal from which on what stands there goes below its row first."""
APART = 3
"""Spaces between two values below a row."""
INDENT = 4
_PIECES = re.compile(r" +|(?:-> )?␣*[^ ␣]+(?: @[^ ␣]+)?|␣+")
"""What is not folded: a word with the visible spaces before it, with an arrow before and a position behind it."""
_WORDS = re.compile(r" +|␣*[^ ␣]+|␣+")
_LOOKS = {"good": "green", "bad": "red"}


@dataclass(frozen=True)
class Folded:
    """Parts one under the other; rich prints them in the width that there is."""

    parts: tuple[Part, ...]

    @staticmethod
    def of(*parts: Part) -> Folded:
        """Of any parts."""
        return Folded(parts)

    def lines(self, width: int) -> Iterator[Text]:
        """Lines of at most `width` columns (2 at least), with their styles."""
        for number, part in enumerate(self.parts):
            if number:
                yield Text()
            if isinstance(part, Sheet):
                yield from sheet_lines(part, width)
            elif isinstance(part, Facts):
                yield from _facts(part, width)
            else:
                yield from (_line(line) for one in part.split("\n") for line in fold(printable(one), width))

    def text(self, width: int) -> str:
        """The lines as plain text."""
        return "\n".join(line.plain for line in self.lines(width))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield from self.lines(options.max_width)


def fold(text: str, width: int) -> list[str]:
    """A text in lines of at most so many columns: at spaces, before visible ones, and within a word that is longer than
    a line. Spaces at which it is folded are left out, nothing else."""
    lines, line = list[str](), ""
    for piece in _pieces(text, width):
        if cell_len(line + piece) <= width:
            line += piece
            continue
        if line.strip():
            lines.append(line.rstrip(" "))
        line = "" if piece.isspace() else piece
        while cell_len(line) > width:
            at = _end(line, width)
            lines.append(line[:at])
            line = line[at:]
    return [*lines, line.rstrip(" ")] if line.strip() or not lines else lines


def _pieces(text: str, width: int) -> Iterator[str]:
    for piece in _PIECES.findall(text):
        yield from (_WORDS.findall(piece) if cell_len(piece) > width else (piece,))


def _end(text: str, width: int) -> int:
    """How many characters stand in so many columns; one at least."""
    at = 1
    while at < len(text) and cell_len(text[: at + 1]) <= width:
        at += 1
    return at


# ------------------------------------------------------------------------------------------------ where columns stand


class _Column(NamedTuple):
    """A column to be placed: its number, its heading, and how wide its widest cell is."""

    at: int
    head: str
    left: bool
    joined: bool
    cells: int

    @property
    def whole(self) -> int:
        """What it takes unfolded."""
        return max(self.cells, cell_len(self.head))

    @property
    def least(self) -> int:
        """What it takes folded: a number none but its heading's."""
        word = max(map(cell_len, self.head.split()), default=0)
        return max(word, min(self.cells, max(NARROW, math.ceil(self.cells / TALL))) if self.left else self.cells)


class Layout(NamedTuple):
    """Where the columns of a table stand: the width of each that is in line, by its number; the space between them; and
    those that go below their row; and the headings of all."""

    widths: dict[int, int]
    gap: int
    below: tuple[int, ...]
    heads: dict[int, str]


def layout(sheet: Sheet, width: int) -> Layout:
    """Where the columns of a table stand in so many columns of a terminal."""
    cells = [max((cell_len(_shown(row[at])) for row in sheet.rows), default=0) for at in range(len(sheet.columns))]
    whole, short = (_columns(sheet, cells, short) for short in (False, True))
    if sum(one.whole for one in whole) + GAPS[0] * (len(whole) - 1) <= width:
        return Layout({one.at: one.whole for one in whole}, GAPS[0], (), {one.at: one.head for one in whole})
    groups, heads, below = list[list[_Column]](), {one.at: one.head for one in short}, list[int]()
    for column in short:
        if column.joined:
            groups[-1].append(column)
        else:
            groups.append([column])
    while True:
        for gap in GAPS:
            if (widths := _widths([column for group in groups for column in group], width, gap)) is not None:
                return Layout(widths, gap, tuple(sorted(below)), heads)
        if len(groups) == 1:
            first, *rest = groups[0]
            return Layout({first.at: width}, 1, tuple(sorted([*below, *(one.at for one in rest)])), heads)
        below += [column.at for column in groups.pop(_goes(groups))]


def _columns(sheet: Sheet, cells: Sequence[int], short: bool) -> list[_Column]:
    return [
        _Column(at, printable((one.short if short else "") or one.head), one.left, one.joined and at > 0, cells[at])
        for at, one in enumerate(sheet.columns)
    ]


def _goes(groups: Sequence[Sequence[_Column]]) -> int:
    """Which group of columns goes below: that of the widest column, if it is wide, else the last; not the first."""
    takes = [max(max(one.least, one.cells) for one in group) for group in groups]
    widest = max(range(1, len(groups)), key=lambda at: (takes[at], at))
    return widest if takes[widest] > WIDE else len(groups) - 1


def _widths(columns: Sequence[_Column], width: int, gap: int) -> dict[int, int] | None:
    """The width of each column, where they fit in one line."""
    room = width - gap * (len(columns) - 1)
    if sum(one.least for one in columns) > room:
        return None
    found = {one.at: one.whole if one.left else one.least for one in columns}
    caps = range(max(found.values(), default=0), 0, -1)
    while sum(found.values()) > room:
        cap = next(one for one in caps if one < max(found[c.at] for c in columns if c.left and found[c.at] > c.least))
        found |= {one.at: max(one.least, min(found[one.at], cap)) for one in columns if one.left}
    for one in sorted(columns, key=lambda one: one.whole - one.least):
        free = room - sum(found.values())
        found[one.at] += 0 if one.left else _widened(one.head, found[one.at], free)
    return found


def _widened(head: str, width: int, free: int) -> int:
    """By how much, of what is free, a heading becomes wider, so that it takes fewer lines."""
    lines = {more: len(fold(head, width + more)) for more in range(min(free, cell_len(head)) + 1)}
    return min(lines, key=lambda more: (lines[more], more))


# ------------------------------------------------------------------------------------------------ lines


def sheet_lines(sheet: Sheet, width: int) -> Iterator[Text]:
    """A table in lines of at most so many columns."""
    shown = sheet.on(TERMINAL)
    placed = layout(shown, width)
    if shown.title:
        yield from (_line(line, "italic") for line in fold(printable(shown.title), width))
    heads = {at: fold(placed.heads[at], wide) for at, wide in placed.widths.items()}
    high = max(map(len, heads.values()), default=0)
    if any(map(str.strip, (line for lines in heads.values() for line in lines))):
        raised = {at: [""] * (high - len(lines)) + lines for at, lines in heads.items()}
        yield from _row(shown, placed, raised, dict.fromkeys(heads, "bold"))
    for row in shown.rows:
        cells = {at: fold(_shown(row[at]), wide) for at, wide in placed.widths.items()}
        yield from _row(shown, placed, cells, {at: _look(row[at]) for at in cells})
        yield from _below(shown, placed, row, width)
    if shown.more:
        yield from (_line(line, "dim") for line in fold(printable(shown.more), width))


def _row(sheet: Sheet, placed: Layout, cells: dict[int, list[str]], looks: dict[int, str]) -> Iterator[Text]:
    for number in range(max(map(len, cells.values()), default=0)):
        line = Text(no_wrap=True, overflow="ignore")
        for order, (at, wide) in enumerate(placed.widths.items()):
            text = cells[at][number] if number < len(cells[at]) else ""
            space = " " * (wide - cell_len(text))
            line.append(" " * placed.gap if order else "")
            line.append(text + space if sheet.columns[at].left else space + text, looks[at])
        line.rstrip()
        yield line


def _below(sheet: Sheet, placed: Layout, row: Sequence[Cell], width: int) -> Iterator[Text]:
    """What goes below a row, a value after its heading; what belongs together in one line, where that holds it."""
    indent = " " * min(INDENT, width // 10)
    room = width - len(indent)
    line = Text(no_wrap=True, overflow="ignore")
    for head, value in _values(sheet, placed, row):
        pair = f"{head}: {value}" if head else value
        if line and cell_len(line.plain) + APART + cell_len(pair) <= width:
            line.append(" " * APART).append(head and f"{head}:", "dim").append(pair[len(head) + bool(head) :])
            continue
        if line:
            yield line
        *full, last = fold(pair, room)
        for number, part in enumerate([*full, last]):
            line = _line(indent + part)
            if not number and head:
                line.stylize("dim", len(indent), len(indent) + min(len(head) + 1, len(part)))
            if number < len(full):
                yield line
    if line:
        yield line


def _values(sheet: Sheet, placed: Layout, row: Sequence[Cell]) -> Iterator[tuple[str, str]]:
    """Headings and values below a row; a joined one stands behind the value that it belongs to, if that is there."""
    head, value = "", ""
    for at in placed.below:
        text = _shown(row[at])
        if not text:
            continue
        if sheet.columns[at].joined and at - 1 in placed.below and value:
            value += f", {printable(sheet.columns[at].head)} {text}"
            continue
        if value:
            yield head, value
        head, value = printable(sheet.columns[at].head), text
    if value:
        yield head, value


def _facts(facts: Facts, width: int) -> Iterator[Text]:
    if facts.title:
        yield from (_line(line, "italic") for line in fold(printable(facts.title), width))
    named = max((cell_len(printable(name)) for name, _ in facts.rows), default=0)
    wide, gap = min(named, width // 3), min(GAPS[0], width // 10) if named else 0
    for name, value in facts.rows:
        left, right = fold(printable(name), max(wide, 2)), fold(printable(value), width - wide - gap)
        for number in range(max(len(left), len(right))):
            head = left[number] if number < len(left) else ""
            line = Text(head, "bold", no_wrap=True, overflow="ignore") if head else _line("")
            line.append(" " * (wide - cell_len(head) + gap)).append(right[number] if number < len(right) else "")
            line.rstrip()
            yield line


def _line(text: str, style: str = "") -> Text:
    return Text(text, style, no_wrap=True, overflow="ignore")


def _shown(value: Cell) -> str:
    return printable(str(value))


def _look(value: Cell) -> str:
    return _LOOKS.get(value.look, "") if isinstance(value, Mark) else ""


def folded(parts: Iterable[Part]) -> Folded:
    """Parts for a terminal."""
    return Folded(tuple(parts))
