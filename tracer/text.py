"""Text that is not plain, where it goes: a line of a terminal, a CSV file, an XML file.

Knows characters and what each place does with them. Refuses to know what a text means. Imports nothing of tracer.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

LONG = 1000
"""Characters of a text that a terminal shows."""

# What XML 1.0 has no place for, and a carriage return, which its readers take for a line end.
_NOT_XML = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def printable(text: str, limit: int | None = None) -> str:
    """A text on one line with what cannot be seen spelt out: control characters, line ends, marks that turn the reading
    direction, halves of characters. Terminals obey some of these; none reaches one.

    Args:
        limit: of the text's characters; a longer one is cut and ends with an ellipsis.
    """
    if limit is not None and len(text) > limit:
        text = text[: limit - 1] + "\u2026"
    return text if text.isprintable() else "".join(one if one.isprintable() else _escaped(one) for one in text)


def printable_lines(text: str) -> str:
    """The same of several lines: their ends stay."""
    return "\n".join(map(printable, text.split("\n")))


def is_text(text: str) -> bool:
    """Whether all of it is Unicode: bytes of a command line or of a file's name that are not UTF-8 become halves of
    characters, which can be neither encoded nor saved."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def xml_text(text: str) -> str:
    r"""A text as XML can hold it: other characters are spelt out, such as \x00."""
    return _NOT_XML.sub(lambda found: _escaped(found[0]), text)


def _escaped(one: str) -> str:
    return one.encode("unicode_escape").decode()


class CsvLines(io.StringIO):
    r"""Where a writer of CSV whose lines end in \r\n writes; its text has lines that end in \n.

    Before Python 3.13 the csv module quotes a lone \r only where lines end in one; unquoted, it ends the line for
    whoever reads.
    """

    def write(self, text: str) -> int:
        return super().write(text.removesuffix("\r\n") + "\n")


class Rows(NamedTuple):
    """A table for a program: the names of its columns, and its rows."""

    names: Sequence[str]
    rows: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], names: Sequence[str] | None = None) -> Rows:
        """Rows; the first one's keys are the columns, if they are not given."""
        return cls((list(rows[0]) if rows else []) if names is None else names, rows)


def tsv_text(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    r"""Rows with tabs between their fields, a line each, with a heading.

    A field holds neither a tab nor a line end nor anything else that controls a terminal: these are spelt out as \t,
    \n, \x1b, and a backslash as \\, so that what was there can be had again. What is missing is empty.
    """
    lines = ["\t".join(map(_field, names)), *("\t".join(_field(row[name]) for name in names) for row in rows)]
    return "".join(f"{line}\n" for line in lines)


def _field(value: Any) -> str:
    if value is None:
        return ""
    text = json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else str(value)
    return printable(text.replace("\\", "\\\\"))


def csv_text(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Rows as CSV, with a heading."""
    out = CsvLines()
    writer = csv.DictWriter(out, names, lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def frame_csv(frame: Any) -> str:
    """A pandas table as CSV, without its index."""
    out = CsvLines()
    frame.to_csv(out, index=False, lineterminator="\r\n")
    return out.getvalue()


def kept_of(kept: int, left: Mapping[str, int]) -> str:
    """How many prompts were kept, and why the others were not: ``61 of 80 prompts kept: 19 answered otherwise``.

    Args:
        left: how many the model answers otherwise (``filtered``), its tokenizer cannot be asked (``skipped``), and
            ``failed``. Skipped are built-in pairs with an answer of several tokens, or of unequal or other lengths.
    """
    says = {"filtered": "answered otherwise", "skipped": "skipped for their tokens", "failed": "failed"}
    why = ", ".join(f"{left[name]:,} {text}" for name, text in says.items() if left.get(name))
    return f"{kept:,} of {kept + sum(left.values()):,} prompts kept" + (f": {why}" if why else "")
