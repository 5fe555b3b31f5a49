"""Descriptions of neurons that were made elsewhere: a file of (layer, neuron, polarity, description) as a table.

Knows the columns of such a file and what is wrong with a row of it. Refuses to know who wrote a description, and what
it is used for: it is text, never an instruction.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa

from tracer.circuit.said import Key, by_neuron
from tracer.data import formats
from tracer.data.files import File, find
from tracer.data.rows import Unreadable
from tracer.errors import JobError, quoted
from tracer.records import as_int
from tracer.store.schemas import DESCRIPTIONS
from tracer.text import is_text

__all__ = ["Key", "by_neuron", "read"]

NEEDED = ("layer", "neuron", "description")
COLUMNS = ("layer", "neuron", "polarity", "description", "score", "source")
"""What is read of a file; a column of another name is left alone."""
LONGEST = 10_000
"""Characters of a description."""
_LARGEST = {"layer": 2**15 - 1, "neuron": 2**31 - 1}
_POLARITIES = {"1": (1,), "+1": (1,), "+": (1,), "-1": (-1,), "-": (-1,), "both": (1, -1), "": (1, -1)}


def read(path: str | os.PathLike[str], size: tuple[int, int] | None = None) -> pa.Table:
    """Descriptions in a file, as `schemas.DESCRIPTIONS`, sorted by layer, neuron and polarity (1 first).

    Args:
        path: CSV, Parquet or JSON lines (``.gz`` too of the text ones), also a folder, a glob or a bucket, as for
            prompts. Columns: ``layer``, ``neuron``, ``description``; if there are any ``polarity`` (1 or +, -1 or -;
            both, empty or absent: the description is one of either sign's), ``score`` (a correlation, -1 to 1) and
            ``source`` (its author, by default the file's name). Others are left alone.
        size: layers of the model and neurons of a layer, which a row must be within.

    Raises:
        JobError: there is no such file, it lacks a column or holds no row, or a row is wrong: the first such is shown
            with its line, and how many more there are.
    """
    found: dict[Key, tuple[str, float | None, str]] = {}
    where: dict[Key, str] = {}
    problems: list[tuple[str, str]] = []
    for file in find(os.fspath(path)):
        for place, record in formats.records(file, _columns(file)):
            try:
                keys, described = _row(record, size, file.path.rpartition("/")[2])
                for key in keys:
                    if key in found:
                        raise ValueError(f"L{key.layer} N{key.neuron} is described already in {where[key]}")
                for key in keys:
                    found[key], where[key] = described, place
            except ValueError as error:
                problems.append((place, str(error)))
    if problems:
        place, problem = problems[0]
        more = f" ({len(problems) - 1:,} more rows are wrong)" if len(problems) > 1 else ""
        raise JobError(place, problem + more, "correct the row, or leave it out")
    if not found:
        raise JobError(f"path {quoted(os.fspath(path), 300)}", "holds no description", "give at least one row")
    ordered = sorted(found, key=lambda key: (key.layer, key.neuron, -key.polarity))
    rows = [(*key, *found[key]) for key in ordered]
    return pa.table({name: list(column) for name, column in zip(COLUMNS, zip(*rows, strict=True), strict=True)}).cast(
        DESCRIPTIONS
    )


def _columns(file: File) -> list[str]:
    """The columns to read of a file, none of an empty one."""
    there = formats.columns(file, COLUMNS)
    if there is None:
        return []
    if lacking := [name for name in NEEDED if name not in there]:
        rule = f"has no column {', '.join(map(quoted, lacking))}; its columns are {', '.join(map(quoted, there[:20]))}"
        raise JobError(file.shown, rule, f"name them {', '.join(COLUMNS)}")
    return [name for name in COLUMNS if name in there]


def _row(
    record: Mapping[str, Any] | Unreadable, size: tuple[int, int] | None, file: str
) -> tuple[list[Key], tuple[str, float | None, str]]:
    """The neurons of a row and what it says of them.

    Raises:
        ValueError: it is wrong; the message says what.
    """
    if isinstance(record, Unreadable):
        raise ValueError(record.problem)
    sizes = dict(zip(("layer", "neuron"), size or (None, None), strict=True))
    layer, neuron = (_index(name, record.get(name), sizes[name]) for name in ("layer", "neuron"))
    text, source = (_text(name, record.get(name)) for name in ("description", "source"))
    if text is None:
        raise ValueError("has no description")
    keys = [Key(layer, neuron, sign) for sign in _polarities(record.get("polarity"))]
    return keys, (text, _score(record.get("score")), source or file)


def _number(value: Any, kind: Callable[[str], Any]) -> Any:
    """A cell of text as a number, where it is one; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return kind(value)
    except ValueError:
        return value


def _index(name: str, value: Any, size: int | None) -> int:
    value = _number(value, int)
    whole = int(value) if isinstance(value, float) and value.is_integer() else as_int(value)
    largest = _LARGEST[name] if size is None else size - 1
    if whole is None:
        raise ValueError(f"{name} {_shown(value)} is not a whole number")
    if not 0 <= whole <= largest:
        raise ValueError(f"{name} {whole} is not one of 0 to {largest}")
    return whole


def _polarities(value: Any) -> tuple[int, ...]:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    signs = None if isinstance(value, bool) else _POLARITIES.get("" if value is None else str(value).strip().lower())
    if signs is None:
        raise ValueError(f"polarity {_shown(value)} is not 1, -1 or both")
    return signs


def _score(value: Any) -> float | None:
    value = _number(value, float)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1 <= value <= 1:
        raise ValueError(f"score {_shown(value)} is not a correlation, a number from -1 to 1")
    return float(value)


def _text(name: str, value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, Unreadable):
        raise ValueError(f"{name} {value.problem}")
    if not isinstance(value, str) or not is_text(value):
        raise ValueError(f"{name} {_shown(value)} is not text")
    if len(value) > LONGEST:
        raise ValueError(f"{name} {_shown(value)} has {len(value):,} characters, at most {LONGEST:,} are kept")
    return value.strip() or None


def _shown(value: Any) -> str:
    return value.problem if isinstance(value, Unreadable) else quoted(value, 40)
