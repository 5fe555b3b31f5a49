"""A run's nodes and edges rewritten by layer and neuron, so that one neuron's rows are found in milliseconds.

    compact/nodes/layer_LAYER.parquet   sorted by neuron, prompt_id and position; embeddings are layer -1
    compact/edges/layer_LAYER.parquet   by the layer of the target, both ends spelt out; sorted by target_neuron,
                                        prompt_id and target_position
    compact/compact.json                written last: rows by table and layer, and a hash of the files' names

Small row groups with statistics, a page index and the order said in the footer: any Parquet reader that filters skips
what it does not need. Knows table files and places. Refuses to know commits and models.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow.fs import FileSystem
from pydantic import BaseModel, ValidationError

from tracer.errors import RunError, quoted
from tracer.store.columns import InOrder, Rows, changes, ends, filled, ordered, read, shards
from tracer.store.parquet import opened, rows_of, writer
from tracer.store.schemas import EDGES, NODES
from tracer.store.storage import Storage

_END = [("kind", pa.string()), ("layer", pa.int16()), ("position", pa.int32()), ("neuron", pa.int32())]
COMPACT_EDGES = pa.schema(
    [
        ("prompt_id", pa.int64()),
        *((f"{end}_{name}", kind) for end in ("source", "target") for name, kind in _END),
        *((name, EDGES.field(name).type) for name in ("weight", "share", "attribution")),
    ]
)
SCHEMAS: dict[str, pa.Schema] = {"nodes": NODES, "edges": COMPACT_EDGES}
_ORDER = {"nodes": ["neuron", "prompt_id", "position"], "edges": ["target_neuron", "prompt_id", "target_position"]}
_RECORD = "compact/compact.json"
_ROW_GROUP = 2**13
"""Rows that a look-up reads at least: fewer make footers long, more make it slow."""


def compact(
    node_files: Sequence[str], edge_files: Sequence[str], fs: FileSystem, folder: Storage, memory: int = 2**30
) -> dict[str, int]:
    """Write the compacted tables; an earlier compaction in the same place is replaced.

    Rows are first parted by layer into temporary files on this machine (as large as the tables, uncompressed), then
    sorted a layer at a time; a layer that is too large for `memory` is sorted by ranges of neurons.

    Args:
        node_files: nodes files in shard order.
        edge_files: edges files of the same shards; empty if the run has no edges.
        fs: where they are.
        folder: gets the folder ``compact``; nothing else in it is touched.
        memory: bytes to hold, beside a few shards; one neuron's rows must fit in a quarter of it.

    Returns:
        Rows by table.

    Raises:
        RunError: a file is missing or damaged, prompts are out of order, or an edge's end is not a node.
        OSError: there is no room, or no right to write.
    """
    folder.remove(_RECORD)
    for name in SCHEMAS:
        for file in folder.files(f"compact/{name}"):
            folder.remove(file.name)
    rows: dict[str, dict[str, int]] = {}
    sources = {"nodes": _nodes(node_files, fs), "edges": _edges(node_files, edge_files, fs)}
    for name, tables in sources.items():
        with closing(tables), tempfile.TemporaryDirectory(prefix="tracer-compact-") as scratch:
            layers = _part(tables, "layer" if name == "nodes" else "target_layer", Path(scratch))
            rows[name] = {
                str(layer): _sort(layers[layer], folder, f"compact/{name}/layer_{layer}.parquet", name, memory)
                for layer in sorted(layers)
            }
    folder.write_json(_RECORD, {"rows": rows, "files": digest(node_files, edge_files)})
    return {name: sum(layers.values()) for name, layers in rows.items()}


def digest(node_files: Sequence[str], edge_files: Sequence[str]) -> str:
    """A hash of the files' names, which no two files of a run share: another one, and the compaction is out of date."""
    names = [[path.rpartition("/")[2] for path in files] for files in (node_files, edge_files)]
    return hashlib.sha256(repr(names).encode()).hexdigest()


def compacted(folder: Storage) -> str | None:
    """`digest` of the files that were compacted here; None if none were."""
    return _record(folder).files if folder.exists(_RECORD) else None


class _Compacted(BaseModel):
    """compact.json."""

    rows: dict[str, dict[str, int]]
    files: str


def _record(folder: Storage) -> _Compacted:
    try:
        return _Compacted.model_validate(folder.read_json(_RECORD, "compact the run again"))
    except ValidationError as error:
        raise RunError(f"file {quoted(_RECORD)}", "is damaged", "compact the run again") from error


def lookup(folder: Storage, layer: int, neuron: int, table: str = "nodes") -> pa.Table:
    """All rows of one neuron, over all prompts, sorted by prompt and position.

    Args:
        folder: what `compact` was given.
        layer: -1 for embeddings, the number of layers for logits.
        neuron: a token's id for embeddings and logits.
        table: ``nodes``, or ``edges`` for the edges into it (`COMPACT_EDGES`).

    Raises:
        RunError: nothing was compacted there, or a file is missing or damaged.
    """
    if not folder.exists(_RECORD):
        rule = "holds no compacted tables"
        raise RunError(f"folder {quoted(str(folder), 300)}", rule, "run `tracer compact` on the run folder")
    schema, key = SCHEMAS[table], _ORDER[table][0]
    if not _record(folder).rows.get(table, {}).get(str(layer)):
        return schema.empty_table()
    path = folder.path(f"compact/{table}/layer_{layer}.parquet")
    try:
        with opened(path, folder.fs) as file:
            rows = rows_of(file, groups=[number for number, low, high in _ranges(file, key) if low <= neuron <= high])
        rows = rows.cast(schema)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise RunError(f"file {quoted(path, 300)}", "is missing or damaged", "compact the run again") from error
    return rows.filter(pc.field(key) == neuron)


def _ranges(file: pq.ParquetFile, column: str) -> Iterator[tuple[int, int, int]]:
    """Number, least and largest value of every row group."""
    at = file.schema_arrow.get_field_index(column)
    for number in range(file.metadata.num_row_groups):
        statistics = file.metadata.row_group(number).column(at).statistics
        yield number, statistics.min, statistics.max


def _nodes(files: Sequence[str], fs: FileSystem) -> Rows[pa.Table]:
    order = InOrder()
    with closing(read(files, fs, "nodes", NODES.names)) as tables:
        for table in tables:
            order.check(filled(table, ["prompt_id", "layer", "neuron", "position"])["prompt_id"])
            yield table.cast(NODES)


def _edges(node_files: Sequence[str], edge_files: Sequence[str], fs: FileSystem) -> Rows[pa.Table]:
    names = [name for name, _ in _END]
    with closing(shards(node_files, edge_files, fs, names)) as both:
        for nodes, edges in both:
            filled(nodes, names)
            parts: list[Any] = [edges["prompt_id"]]
            for rows in ends(nodes, edges):
                parts += nodes.select(names).take(pa.array(rows)).columns
            parts += edges.select(["weight", "share", "attribution"]).columns
            yield pa.Table.from_arrays(parts, COMPACT_EDGES.names).cast(COMPACT_EDGES)


def _part(tables: Iterator[pa.Table], column: str, scratch: Path) -> dict[int, Path]:
    """Arrow files of the rows of each layer, in the order they come."""
    writers: dict[int, pa.ipc.RecordBatchStreamWriter] = {}
    try:
        for table in tables:
            order = ordered(table[column].to_numpy().astype(np.int64))
            parted = table.take(pa.array(order)).combine_chunks()
            layers = parted[column].to_numpy()
            first = np.flatnonzero(changes(layers))
            for at, size in zip(first.tolist(), np.diff(first, append=len(layers)).tolist(), strict=True):
                layer = int(layers[at])
                if layer not in writers:
                    writers[layer] = pa.ipc.new_stream(scratch / f"{layer}.arrow", table.schema)
                writers[layer].write_table(parted.slice(at, size))
    finally:
        for part in writers.values():
            part.close()
    return {layer: scratch / f"{layer}.arrow" for layer in writers}


def _sort(path: Path, folder: Storage, name: str, table: str, memory: int) -> int:
    """Sort one layer's rows into its file; how many there are."""
    schema, order, rows = SCHEMAS[table], _ORDER[table], 0
    with folder.writing(name) as stream, pa.memory_map(str(path)) as source:
        batches = [batch for batch in pa.ipc.open_stream(source) if batch.num_rows]
        with writer(stream, schema, order, page_index=True) as parquet:
            for part in _parts(pa.Table.from_batches(batches), order[0], memory):
                keys = [part[name].to_numpy() for name in reversed(order)]
                parquet.write_table(part.take(pa.array(np.lexsort(keys))), row_group_size=_ROW_GROUP)
                rows += part.num_rows
    return rows


def _parts(rows: pa.Table, column: str, memory: int) -> Iterator[pa.Table]:
    """The rows in parts by ranges of neurons, each of a size that can be sorted in `memory`."""
    most_bytes = min(memory // 4, 2**30)  # a sort holds the rows, their copy in order, and keys; text has 2 GB at most
    if rows.nbytes <= most_bytes:
        yield rows
        return
    neurons, counts = np.unique(rows[column].to_numpy(), return_counts=True)
    most = max(1, most_bytes * rows.num_rows // rows.nbytes)
    first = np.flatnonzero(changes((np.cumsum(counts) - counts) // most))
    for low, high in zip(neurons[first].tolist(), [*neurons[first[1:] - 1].tolist(), int(neurons[-1])], strict=True):
        yield rows.filter((pc.field(column) >= low) & (pc.field(column) <= high))
