"""Table files in shard order, read as numpy columns and checked, with one way to sort and to sum by key.

Reads ahead, a file at a time, and refuses what would give wrong sums: a file that is damaged or of another schema,
prompts out of order or twice, an edge whose end is not a node. Knows the tables' schemas. Refuses to know run folders,
commits and models.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow.fs import FileSystem, LocalFileSystem

from tracer.errors import RunError, quoted
from tracer.store.parquet import opened, rows_of
from tracer.store.schemas import SCHEMAS

Array = NDArray[Any]
Columns = dict[str, Array]
Ints = NDArray[np.int64]
Kind = TypeVar("Kind")
Item = TypeVar("Item")
Rows = Generator[Kind, None, None]

KINDS = ("embedding", "neuron", "error", "logit", "target")
"""Kinds of nodes; in tables of this package's making a kind's number is its place here."""
NEURON = KINDS.index("neuron")
CHUNK = 2**20
"""Rows that are summed at once: enough that a group's cost is small, few enough to stay in a processor's cache."""


def ahead(function: Callable[[Item], Kind], items: Iterable[Item], depth: int = 1) -> Rows[Kind]:
    """What a function makes of each item, in their order; of the next `depth` items it is made in threads while the
    last one is worked on. An error comes where its item stands. It owns threads: whoever opens it closes it, and so on
    up."""
    with ThreadPoolExecutor(depth, "tracer-ahead") as pool:
        waiting: deque[Future[Kind]] = deque()
        try:
            for future in _submitted(pool, function, items):
                waiting.append(future)
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _submitted(pool: ThreadPoolExecutor, function: Callable[[Item], Kind], items: Iterable[Item]) -> Rows[Future[Kind]]:
    """What will be made of the items; the error that they end with, as what cannot be made."""
    try:
        for item in items:
            yield pool.submit(function, item)
    except RunError as error:
        failed = Future[Kind]()
        failed.set_exception(error)
        yield failed


def read(files: Sequence[str], fs: FileSystem, table: str, names: Sequence[str]) -> Rows[pa.Table]:
    """The files' tables in order, strings as dictionaries; a few are read while the last one is worked on. It owns
    threads, as `ahead`.

    Args:
        files: paths of Parquet files of one table, in shard order.
        fs: where they are.
        table: ``nodes`` or ``edges``; its schema is `tracer.schemas.SCHEMAS`.
        names: the columns to read.

    Raises:
        RunError: a file is missing, damaged or has other columns.
    """
    depth = 1 if isinstance(fs, LocalFileSystem) else 8  # far away it is the waiting that costs
    return ahead(lambda file: _read(file, fs, table, names), files, depth)


def _read(path: str, fs: FileSystem, table: str, names: Sequence[str]) -> pa.Table:
    schema = SCHEMAS[table]
    strings = [name for name in names if pa.types.is_string(schema.field(name).type)]
    other = RunError(f"file {quoted(path, 200)}", f"is not a {table} table of this version", "run it again")
    try:
        with opened(path, fs, read_dictionary=strings, pre_buffer=True) as file:
            rows = rows_of(file, names, threads=False)
        wanted = {name: schema.field(name).type for name in names}
        wanted |= {name: pa.dictionary(pa.int32(), pa.string()) for name in strings}
        if any(field.type != wanted[field.name] for field in rows.schema):
            raise other
    except KeyError as error:  # Arrow's, for a column of dictionaries that is not there
        raise other from error
    except (OSError, pa.ArrowException) as error:
        raise RunError(f"file {quoted(path, 200)}", "is missing or damaged", "run it again") from error
    return rows


class InOrder:
    """Checks that prompt ids ascend from file to file, which is what makes counts of prompts exact."""

    def __init__(self) -> None:
        self._last: int | None = None

    def check(self, prompts: Ints) -> None:
        """Take the next file's prompt ids.

        Raises:
            RunError: they do not ascend, or a prompt was in a file before.
        """
        if not len(prompts):
            return
        if len(back := np.flatnonzero(prompts[1:] < prompts[:-1])):
            rule = f"comes after prompt {prompts[back[0]]} of the same file"
            raise RunError(f"prompt {prompts[back[0] + 1]}", rule, "the file is damaged: run it again")
        if self._last is not None and prompts[0] <= self._last:
            rule = f"comes after prompt {self._last} of a file before"
            raise RunError(f"prompt {prompts[0]}", rule, "give every file once, in shard order")
        self._last = int(prompts[-1])


class StringTable:
    """Strings as numbers, the same over all files; null is -1."""

    def __init__(self, strings: Iterable[str] = ()) -> None:
        self._numbers = {string: number for number, string in enumerate(strings)}

    def numbers(self, column: pa.ChunkedArray) -> NDArray[np.int32]:
        """The numbers of a column of dictionaries; new strings get the next ones."""
        parts = [np.empty(0, np.int32)]
        for chunk in column.chunks:
            strings = chunk.dictionary.to_pylist()
            lookup = [
                -1 if string is None else self._numbers.setdefault(string, len(self._numbers)) for string in strings
            ]
            index = chunk.indices.fill_null(len(strings)).to_numpy(zero_copy_only=False)
            parts.append(np.array([*lookup, -1], np.int32)[index])
        return np.concatenate(parts)

    def strings(self, numbers: Array) -> pa.Array:
        """The column of these numbers."""
        strings = pa.array(list(self._numbers), pa.string())
        return strings.take(pa.array(numbers, pa.int64(), mask=numbers < 0))


def kinds(column: pa.ChunkedArray) -> NDArray[np.int32]:
    """Numbers of kinds, as in `KINDS`.

    Raises:
        RunError: an unknown kind.
    """
    numbers = StringTable(KINDS).numbers(column)
    if np.any(numbers < 0) or np.any(numbers >= len(KINDS)):
        raise RunError("a nodes table", "has a node of unknown kind", "it is damaged: run it again")
    return numbers


def filled(table: pa.Table, names: Sequence[str]) -> Columns:
    """Columns that have a value in every row.

    Raises:
        RunError: one has a null.
    """
    for name in names:
        if table[name].null_count:
            raise RunError(f"column {name}", "has a row without a value", "the table is damaged: run it again")
    return {name: table[name].to_numpy() for name in names}


def neuron_rows(
    files: Sequence[str], fs: FileSystem, names: Sequence[str], strings: StringTable | None = None
) -> Rows[Columns]:
    """The neurons' rows of nodes files, a file at a time: ``prompt``, ``key``, ``expert`` (-1: none) and `names`.

    Args:
        files, fs: the nodes files in shard order, and where they are.
        names: further columns, without nulls.
        strings: turns the column ``token`` into numbers; None: it is not read.

    Raises:
        RunError: as `read`, or a neuron without a value, or prompts out of order.
    """
    order, tokens = InOrder(), [] if strings is None else ["token"]
    given = ["prompt_id", "kind", "layer", "neuron", "expert", *names, *tokens]

    def rows_of_neurons(table: pa.Table) -> Columns:
        order.check(filled(table, ["prompt_id"])["prompt_id"])
        mask = kinds(table["kind"]) == NEURON
        rows = table.drop_columns(["kind", "expert", *tokens]).filter(pa.array(mask))
        columns = filled(rows, ["prompt_id", "layer", "neuron", *names])
        columns["prompt"], layer, neuron = (columns.pop(name) for name in ("prompt_id", "layer", "neuron"))
        columns["key"] = neuron_key(layer, neuron)
        columns["expert"] = table["expert"].fill_null(-1).to_numpy()[mask]
        if strings is not None:
            columns["token"] = strings.numbers(table["token"])[mask]
        return columns

    # In one thread, so that prompts are checked and strings numbered in the order of the files.
    with closing(read(files, fs, "nodes", given)) as tables, closing(ahead(rows_of_neurons, tables)) as parts:
        yield from parts


def neuron_key(layer: Array, neuron: Array) -> Ints:
    """One number for a neuron, in the order of (layer, neuron)."""
    return layer.astype(np.int64) * 2**32 + neuron


def split_key(key: Ints) -> tuple[Ints, Ints]:
    """Layers and neurons of `neuron_key`."""
    layer = (key + 2**31) >> 32
    return layer, key - layer * 2**32


def shards(
    node_files: Sequence[str], edge_files: Sequence[str], fs: FileSystem, names: Sequence[str]
) -> Rows[tuple[pa.Table, pa.Table]]:
    """The nodes (`names`, prompt and node ids) and the edges of each shard; nothing if the run has no edges.

    Raises:
        ValueError: the files are not of the same shards.
        RunError: as `read`, or prompts out of order, or an edge without a weight.
    """
    if edge_files and len(node_files) != len(edge_files):
        raise ValueError(f"{len(node_files)} nodes files and {len(edge_files)} edges files are not of the same shards")
    orders = InOrder(), InOrder()
    with (
        closing(read(node_files if edge_files else (), fs, "nodes", ["prompt_id", "node_id", *names])) as nodes_of,
        closing(read(edge_files, fs, "edges", SCHEMAS["edges"].names)) as edges_of,
    ):
        for both in zip(nodes_of, edges_of, strict=True):
            for order, table in zip(orders, both, strict=True):
                order.check(filled(table, ["prompt_id"])["prompt_id"])
            filled(both[1], ["weight"])
            yield both


def ends(nodes: pa.Table, edges: pa.Table) -> tuple[Ints, Ints]:
    """Rows in `nodes` of the source and the target of every edge of the same shard.

    Raises:
        RunError: node ids do not run from 0 within a prompt, or an edge has an end that is not a node.
    """
    place, linked = filled(nodes, ["prompt_id", "node_id"]), filled(edges, ["prompt_id", "source", "target"])
    first = np.flatnonzero(changes(place["prompt_id"]))  # they ascend, as `InOrder` checked
    prompts, count = place["prompt_id"][first], np.diff(first, append=nodes.num_rows)
    if np.any(place["node_id"] != np.arange(nodes.num_rows) - np.repeat(first, count)):
        raise RunError("a nodes table", "has node ids that do not run from 0", "it is damaged: run it again")
    if not edges.num_rows:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    at = np.searchsorted(prompts, linked["prompt_id"])
    there = at < len(prompts)
    there[there] = prompts[at[there]] == linked["prompt_id"][there]
    for name in ("source", "target"):
        there[there] = (linked[name][there] >= 0) & (linked[name][there] < count[at[there]])
    if not there.all():
        prompt = linked["prompt_id"][~there][0]
        raise RunError(
            f"an edge of prompt {prompt}", "has an end that is not a node of its shard", "it is damaged: run it again"
        )
    return first[at] + linked["source"], first[at] + linked["target"]


def coalesce(parts: Iterable[Columns], min_rows: Callable[[], int]) -> Rows[Columns]:
    """Join parts to at least `min_rows()` rows each; only the last may have fewer, and none is empty."""
    held: list[Columns] = []
    rows = 0
    for part in parts:
        size = len(next(iter(part.values())))
        if size:
            held.append(part)
            rows += size
        if rows >= max(1, min_rows()):
            rows = 0
            yield joined(held)
    if held:
        yield joined(held)


def joined(parts: list[Columns]) -> Columns:
    """Parts in one; they are taken out of the list, and column by column out of memory, so that one is held twice."""
    whole = {name: np.concatenate([part.pop(name) for part in parts]) for name in list(parts[0])}
    parts.clear()
    return whole


def ordered(keys: Ints) -> Ints:
    """The stable order of keys: rows of one key stay in the order they have."""
    bits = max(1, len(keys) - 1).bit_length()
    if not len(keys) or (int(keys.max()) - int(keys.min())) >> (63 - bits):
        return np.argsort(keys, kind="stable")
    packed = ((keys - keys.min()) << bits) | np.arange(len(keys))
    packed.sort()  # several times faster than a stable argsort, and as stable since no two are equal
    return packed & ((1 << bits) - 1)


def changes(*columns: Array) -> NDArray[np.bool_]:
    """Whether a row differs from the one before in any of the columns; the first does."""
    differs = np.ones(len(columns[0]), bool)
    differs[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return differs


class Sums:
    """Sums by key that grow as rows come.

    Every sum is a plain left fold over its rows in the order they come, in float64: how the rows are cut into parts
    and files changes no bit of it.

    Args:
        columns: types by name.
    """

    def __init__(self, **columns: type) -> None:
        self.keys: Ints = np.empty(0, np.int64)
        self.columns: Columns = {name: np.empty(0, kind) for name, kind in columns.items()}

    def min_rows(self) -> int:
        """Rows to collect before summing, so that making room for new keys costs little beside it."""
        return max(CHUNK, len(self.keys) // 4)

    def indices_for(self, keys: Ints) -> tuple[Ints, NDArray[np.bool_]]:
        """Where keys (ascending, no two equal) have their sums, and which are new; new ones start from zero."""
        if not len(self.keys):
            self.keys = keys.copy()
            self.columns = {name: np.zeros(len(keys), column.dtype) for name, column in self.columns.items()}
            return np.arange(len(keys)), np.ones(len(keys), bool)
        at = np.searchsorted(self.keys, keys)
        new = self.keys[np.minimum(at, len(self.keys) - 1)] != keys
        if new.any():
            at = np.searchsorted(self.keys, keys[new])
            for name in self.columns:  # one after the other, so that only one is held twice
                self.columns[name] = np.insert(self.columns[name], at, 0)
            self.keys = np.insert(self.keys, at, keys[new])
        return np.searchsorted(self.keys, keys), new

    def add(self, name: str, indices: Ints, values: Array | int | float) -> None:
        """Add values to the sums at `indices`, one after the other."""
        np.add.at(self.columns[name], indices, values)

    def cut(self, size: int) -> None:
        """Keep the first keys only."""
        self.keys = self.keys[:size].copy()
        for name in self.columns:
            self.columns[name] = self.columns[name][:size].copy()


def or_null(numbers: Array) -> pa.Array:
    """A column in which -1 stands for null."""
    return pa.array(numbers, pa.int32(), mask=numbers < 0)


def as_table(schema: pa.Schema, columns: Sequence[Array | pa.Array]) -> pa.Table:
    """A table of a schema from numpy columns in its order."""
    parts = [
        column if isinstance(column, pa.Array) else pa.array(column.astype(field.type.to_pandas_dtype(), copy=False))
        for column, field in zip(columns, schema, strict=True)
    ]
    return pa.Table.from_arrays(parts, schema=schema)
