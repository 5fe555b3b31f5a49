"""The formats of files of records: JSON lines, CSV and Parquet, one record at a time.

Reads each in memory that does not grow with it. A line that is not a record becomes an `Unreadable`; a file that
cannot be read to its end is an error. Refuses to know where a file is and what a record means.
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tracer.data.files import BLOCK, File, opened, reading
from tracer.data.rows import Unreadable
from tracer.errors import JobError, quoted
from tracer.system import jsontext
from tracer.text import is_text

RawRecord = dict[str, Any] | Unreadable

_HEAD = 1000  # lines of a JSON file whose keys are taken for its columns
_BATCH = 1024  # rows of a Parquet file decoded at once
_LINE = 1 << 24  # bytes or characters of a line, or of a cell: far beyond any prompt, a bound on what is held
_HELD = 1 << 25  # bytes of a column of a row group of a Parquet file
_LONG_TEXT = 1 << 16  # bytes of a text there, on average
_LONG = f"is longer than {_LINE >> 20} MiB"


def columns(file: File, wanted: Iterable[str] = ()) -> list[str] | None:
    """The names of a file's columns; None for one without any record.

    Of JSON lines those of the first 1,000 records, or of as many as hold all that is `wanted`.
    """
    if file.kind == "json":
        return _json_columns(file, set(wanted))
    return _csv_heading(file) if file.kind == "csv" else _parquet_columns(file)


def records(file: File, names: Sequence[str]) -> Iterator[tuple[str, RawRecord]]:
    """Every record's place, such as ``line 7 of 'a.csv'``, and its values of at least these columns."""
    if file.kind == "json":
        return _json_records(file)
    return _csv_records(file, names) if file.kind == "csv" else _parquet_records(file, names)


# --------------------------------------------------------------------------------------------- JSON lines


def _object(line: bytes) -> RawRecord:
    try:
        content = jsontext.parse(line)
    except jsontext.TwiceError as error:
        return Unreadable(f"an object {error}")
    except jsontext.JsonError as error:
        known = "is not UTF-8 text", "is nested too deeply"
        why = str(error) if str(error) in known or "whole number" in str(error) else "is not JSON"
        return Unreadable(f"{quoted(line if why == known[0] else line.decode().strip(), 40)} {why}")
    return content if isinstance(content, dict) else Unreadable(f"{quoted(content, 40)} is not a JSON object")


def _json_records(file: File) -> Generator[tuple[str, RawRecord], None, None]:
    shown = quoted(file.name, 100)
    with opened(file) as stream:
        if stream.peek(3)[:3] == b"\xef\xbb\xbf":
            stream.read(3)
        if stream.peek(1024)[:1024].lstrip()[:1] == b"[":
            rule = "is a JSON array, which cannot be read piece by piece"
            raise JobError(file.shown, rule, "write one object per line: jq -c '.[]' FILE > FILE.jsonl")
        for number, line in enumerate(_lines(stream), start=1):
            if isinstance(line, Unreadable):
                yield f"line {number} of {shown}", line
            elif line.strip():
                yield f"line {number} of {shown}", _object(line)


def _lines(stream: io.BufferedReader) -> Iterator[bytes | Unreadable]:
    """Lines, read in bounded pieces. They end at \\n alone: a JSON string may hold other separators, such as U+2028."""
    while line := stream.readline(_LINE + 1):
        if len(line) <= _LINE or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(_LINE)
        yield Unreadable(_LONG)


def _json_columns(file: File, wanted: set[str]) -> list[str] | None:
    keys: dict[str, None] = {}
    number = 0
    with closing(_json_records(file)) as records:
        for number, (_, record) in enumerate(records, start=1):
            if isinstance(record, dict):
                keys.update(dict.fromkeys(record))
            if number >= _HEAD and wanted <= set(keys):
                break
    return list(keys) if number else None


# ---------------------------------------------------------------------------------------------------- CSV


def _csv_lines(file: File) -> Generator[tuple[int, list[str] | Unreadable], None, None]:
    """Number and cells of every row that is not blank, the heading first."""
    csv.field_size_limit(max(csv.field_size_limit(), _LINE))
    with opened(file) as stream:
        # Bytes that are not UTF-8 become surrogates, which affect their own cell only.
        text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
        lines = _TextLines(text)
        reader = csv.reader(lines, strict=True)
        while True:
            number = lines.number + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                # What follows a long line is rows again only if no quote was open before it or after it.
                open_quote = isinstance(error, _LongError) and (error.quotes % 2 or lines.number > number)
                if open_quote or any(part in str(error) for part in ("unexpected end", "field larger")):
                    rule = "a quote is opened and never closed, or closed after too long a text"
                    raise JobError(
                        f"line {number} of {file.shown}", rule, 'write a quote inside a cell as ""'
                    ) from error
                yield number, Unreadable(str(error) if isinstance(error, _LongError) else f"is not CSV: {error}")
                continue
            if cells is None:
                return
            if cells:
                yield number, cells


class _LongError(csv.Error):
    """A line that is too long to be a row; how many quotes it has."""

    def __init__(self, quotes: int) -> None:
        super().__init__(_LONG)
        self.quotes = quotes


class _TextLines:
    """Lines of text, read in bounded pieces; one that is too long is passed over, and raises `_LongError`."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text, self.number = text, 0

    def __iter__(self) -> _TextLines:
        return self

    def __next__(self) -> str:
        line = self._text.readline(_LINE + 1)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) <= _LINE or line.endswith(("\n", "\r")):
            return line
        quotes = line.count('"')
        while line and not line.endswith(("\n", "\r")):
            line = self._text.readline(_LINE)
            quotes += line.count('"')
        raise _LongError(quotes)


def _csv_heading(file: File) -> list[str] | None:
    with closing(_csv_lines(file)) as lines:
        number, names = next(lines, (0, None))
    if isinstance(names, Unreadable):
        raise JobError(f"line {number} of {file.shown}", names.problem, "give the names of the columns there")
    return names


def _csv_records(file: File, names: Sequence[str]) -> Iterator[tuple[str, RawRecord]]:
    shown = quoted(file.name, 100)
    heading = _csv_heading(file) or []
    places = {name: heading.index(name) for name in names}
    for number, cells in itertools.islice(_csv_lines(file), 1, None):
        where = f"line {number} of {shown}"
        if isinstance(cells, Unreadable):
            yield where, cells
        elif len(cells) != len(heading):
            yield where, Unreadable(f"has {len(cells)} cells, the heading has {len(heading)}")
        else:
            yield where, {name: _cell(cells[place]) for name, place in places.items()}


def _cell(text: str) -> str | Unreadable | None:
    if text.isascii():
        return text or None
    return text if is_text(text) else Unreadable(f"{quoted(text, 40)} is not UTF-8 text")


# ------------------------------------------------------------------------------------------------ Parquet


@contextmanager
def _parquet(file: File) -> Iterator[pq.ParquetFile]:
    with (
        reading(file),
        file.filesystem.open_input_file(file.path) as stream,
        pq.ParquetFile(stream) as heading,
        # Buffered: otherwise a row group's whole column would be in memory.
        pq.ParquetFile(
            stream, buffer_size=BLOCK, pre_buffer=False, metadata=heading.metadata, read_dictionary=_texts(heading)
        ) as table,
    ):
        yield table


def _texts(file: pq.ParquetFile) -> list[str]:
    """Columns of texts or bytes that are read as dictionaries, so that one that is in many rows is there once: those of
    which a row group can be held, and those of long texts."""
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]

    def as_dictionary(at: int) -> bool:
        sizes = [(group.column(at).total_uncompressed_size, group.num_rows) for group in groups]
        return all(size < _HELD or size > _LONG_TEXT * rows for size, rows in sizes)

    columns = [file.schema.column(at) for at in range(len(file.schema))]
    named = set(file.schema_arrow.names)
    return [
        column.path
        for at, column in enumerate(columns)
        if column.path in named and column.physical_type == "BYTE_ARRAY" and as_dictionary(at)
    ]


def _parquet_columns(file: File) -> list[str] | None:
    with _parquet(file) as table:
        return table.schema_arrow.names


def _parquet_records(file: File, names: Sequence[str]) -> Iterator[tuple[str, RawRecord]]:
    shown, number = quoted(file.name, 100), 0
    with _parquet(file) as table:
        for batch in table.iter_batches(_BATCH, columns=list(names), use_threads=False):
            values = [_values(batch.column(name)) for name in names]
            for cells in zip(*values, strict=True):
                number += 1
                yield f"row {number} of {shown}", dict(zip(names, cells, strict=True))


def _values(column: pa.Array) -> list[Any]:
    if isinstance(column, pa.DictionaryArray):
        used = column.indices.unique().drop_null()
        texts = dict(zip(used.to_pylist(), _values(column.dictionary.take(used)), strict=True))
        return [texts.get(index) for index in column.indices.to_pylist()]
    if (pa.types.is_string(column.type) or pa.types.is_binary(column.type)) and (
        pc.max(pc.binary_length(column)).as_py() or 0  # type: ignore[attr-defined]
    ) > _LINE:
        return [_value(scalar) for scalar in column]
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar) -> Any:
    if isinstance(scalar, pa.StringScalar | pa.BinaryScalar) and scalar.is_valid and scalar.as_buffer().size > _LINE:
        return Unreadable(_LONG)
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return Unreadable("is not UTF-8 text")
    except (ValueError, OverflowError) as error:
        return Unreadable(f"cannot be read: {error}")
