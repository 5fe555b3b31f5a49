"""Tables as Parquet files: one layout to write them in, and today's column names whichever version wrote them.

Knows the encoding, and what a job's fingerprint is. Refuses to know folders, and when a file is written. Nothing is
ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileSystem

from tracer.store.schemas import NODES, SCHEMA_VERSION, stored_names


def fingerprint(job: Mapping[str, Any]) -> str:
    """A hash of everything that decides a run's numbers."""
    return hashlib.sha256(json.dumps(job, sort_keys=True, default=str).encode()).hexdigest()


def table_of(schema: pa.Schema, columns: Mapping[str, Sequence[Any]]) -> pa.Table:
    """A table from its columns, by name."""
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in schema}, schema)


def encoded(table: pa.Table) -> bytes:
    """A table as a Parquet file: Zstandard, dictionaries on keys and byte-stream split on floats, the smallest and
    fastest to read of the layouts we tried."""
    sink = pa.BufferOutputStream()
    with writer(sink, table.schema) as parquet:
        parquet.write_table(table)
    return sink.getvalue().to_pybytes()


def writer(
    sink: Any, schema: pa.Schema, sorting: Sequence[str] | None = None, page_index: bool = False
) -> pq.ParquetWriter:
    """A Parquet writer in the layout of `encoded`, for tables that are written in parts; every page has a checksum.

    Args:
        sink: an open binary file, or a path on this machine.
        sorting: the columns that the rows are sorted by, for the footer to say so; the caller sorts them.
        page_index: keep the range of every page, for readers that look for few rows.
    """
    floats = [field.name for field in schema if pa.types.is_floating(field.type)]
    keys = [field.name for field in schema if field.name not in floats and not pa.types.is_nested(field.type)]
    return pq.ParquetWriter(
        sink,
        schema.with_metadata({"schema_version": SCHEMA_VERSION}),
        compression="zstd",
        compression_level=3,
        use_dictionary=keys,  # pyright: ignore[reportArgumentType]
        use_byte_stream_split=floats or False,  # pyright: ignore[reportArgumentType]
        write_page_checksum=True,
        write_page_index=page_index,
        sorting_columns=pq.SortingColumn.from_ordering(schema, [(name, "ascending") for name in sorting or ()]) or None,
    )


class OrderedWrites:
    """Writes tables to a Parquet file in a thread of its own, in their order, one while the next is made.

    A context manager; what could not be written is raised by the next `add`, or when it is left.
    """

    def __init__(self, parquet: pq.ParquetWriter) -> None:
        self._parquet = parquet
        self._pool = ThreadPoolExecutor(1, "tracer-write")
        self._waiting: Future[None] | None = None

    def __enter__(self) -> OrderedWrites:
        return self

    def add(self, table: pa.Table) -> None:
        """Write one more; waits for the one before."""
        self._wait()
        self._waiting = self._pool.submit(self._parquet.write_table, table)

    def _wait(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.result()

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None:
                self._wait()
        finally:
            self._pool.shutdown()


def opened(source: Any, fs: FileSystem | None = None, **options: Any) -> pq.ParquetFile:
    """A table file for reading, its pages' checksums compared.

    Raises:
        OSError, pa.ArrowException: it is missing or damaged.
    """
    try:
        return pq.ParquetFile(source, filesystem=fs, page_checksum_verification=True, **options)
    except UnicodeDecodeError as error:
        raise pa.ArrowInvalid("the names of its columns are not text") from error


def rows_of(
    file: pq.ParquetFile,
    columns: Sequence[str] | None = None,
    groups: Sequence[int] | None = None,
    threads: bool = True,
) -> pa.Table:
    """The rows of a table file under today's column names; the one place that knows how older versions named them.

    Args:
        columns: those to read, in this order; all by default.
        groups: the row groups to read; all by default.
        threads: decode columns in several threads.

    Raises:
        KeyError: the file lacks a column.
        OSError, pa.ArrowException: it is damaged.
    """
    stored = {name: its for name, its in stored_names(file.schema_arrow.names).items() if name in (columns or (name,))}
    groups = range(file.num_row_groups) if groups is None else groups
    rows = file.read_row_groups(list(groups), [its for its in stored.values() if its], use_threads=threads)
    table = pa.table(
        {name: rows[its] if its else pa.nulls(rows.num_rows, NODES.field(name).type) for name, its in stored.items()}
    )
    return table if columns is None else table.select(list(columns))
