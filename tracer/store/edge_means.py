"""A run's edges averaged over prompts and positions: one row for each pair of neurons, written as a Parquet file.

Streams the nodes and edges files of each shard, in shard order; where there are more pairs than memory it does so
several times. Float sums are left folds in the order of the rows, in float64, so neither the number of passes nor of
threads nor the cut into files changes a bit. Refuses to know run folders and models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow.fs import FileSystem

from tracer.store.columns import (
    CHUNK,
    KINDS,
    Array,
    Columns,
    Ints,
    Rows,
    StringTable,
    Sums,
    ahead,
    as_table,
    changes,
    coalesce,
    ends,
    filled,
    joined,
    kinds,
    neuron_key,
    ordered,
    read,
    shards,
)
from tracer.store.parquet import OrderedWrites, writer

_MEANS = ["mean_weight", "mean_share", "mean_attribution", "mean_abs_attribution", "prompt_mean_attribution"]
EDGES_MEAN = pa.schema(
    [
        ("source_kind", pa.string()),
        ("source_layer", pa.int16()),
        ("source_neuron", pa.int32()),
        ("target_kind", pa.string()),
        ("target_layer", pa.int16()),
        ("target_neuron", pa.int32()),
        ("n_prompts", pa.int64()),
        ("n_occurrences", pa.int64()),
        *((name, pa.float64()) for name in _MEANS),
    ]
)
_PAIR_BYTES = 192
"""Bytes that a pair takes at the peak, measured (benchmarks/aggregation.py): sums, and rows that wait for theirs."""
_ROW_BYTES = 64
"""Bytes that an edge takes at the peak where all are held as they were read: its columns, their order, its key."""


def write_edges_mean(
    node_files: Sequence[str],
    edge_files: Sequence[str],
    fs: FileSystem,
    out: Any,
    memory: int = 2**30,
) -> int:
    """Edges per pair of neurons, over all prompts and positions, written as a Parquet file.

    An end is a kind, a layer and a neuron; for an embedding and a logit the ``neuron`` is the token's id. Means are
    over the ``n_occurrences`` edges, but ``prompt_mean_attribution``, which is the sum over ``n_prompts``. An edge
    without a share (a target of activation zero) counts in neither the mean share nor the attributions; a mean is null
    where no edge has one. Sorted by target, then source, each by layer, kind and neuron.

    More pairs than `memory` holds take several passes over the files, each for a range of targets, with the same
    result to the bit.

    Args:
        node_files: nodes files in shard order.
        edge_files: edges files of the same shards; empty if the run has no edges.
        fs: where they are.
        out: an open binary file, or a path on this machine, which is written in place: give a temporary name.
        memory: bytes to hold, beside the nodes' names and two shards.

    Returns:
        The rows of the table.

    Raises:
        RunError: a file is missing or damaged, prompts are out of order, or an edge's end is not a node.
    """
    rows = 0
    with writer(out, EDGES_MEAN) as parquet, OrderedWrites(parquet) as writes:
        for table in _tables(node_files, edge_files, fs, memory) if edge_files else ():
            writes.add(table)
            rows += table.num_rows
    return rows


def _tables(node_files: Sequence[str], edge_files: Sequence[str], fs: FileSystem, memory: int) -> Iterator[pa.Table]:
    """The table in parts. Edges that fit into memory as they are read are sorted once; of more the sums are held."""
    names = _names(node_files, fs)
    with closing(_pairs(node_files, edge_files, fs, names)) as pairs:
        held = _held(pairs, memory // _ROW_BYTES)
    if held is not None:
        for rows in _by_key(held):
            sums = _no_sums()
            _add_edges(sums, rows)
            yield _edge_table(sums, names, slice(None))
        return
    low: int | None = 0
    while low is not None:
        with closing(_pairs(node_files, edge_files, fs, names)) as pairs:
            sums, low = _edge_pass(pairs, low, max(2, memory // _PAIR_BYTES))
        for at in range(0, len(sums.keys), CHUNK):
            yield _edge_table(sums, names, slice(at, at + CHUNK))


def _held(pairs: Iterator[Columns], limit: int) -> Columns | None:
    """All rows in one piece; None if they are more than `limit`."""
    parts: list[Columns] = []
    size = 0
    for rows in pairs:
        size += len(rows["key"])
        if size > limit:
            return None
        parts.append(rows)
    return joined(parts) if parts else {}


def _by_key(rows: Columns) -> Iterator[Columns]:
    """The rows in the stable order of their keys, `CHUNK` of them at a time or a few more: no key is in two parts."""
    if not rows:
        return
    order = ordered(rows["key"])
    key = rows.pop("key")[order]
    start = 0
    while start < len(key):
        last = key[min(start + CHUNK, len(key)) - 1]
        stop = int(np.searchsorted(key, last, side="right"))
        part = order[start:stop]
        yield {"key": key[start:stop]} | {name: column[part] for name, column in rows.items()}
        start = stop


def _no_sums() -> Sums:
    whole, real = np.int64, np.float64
    sums = Sums(n_prompts=whole, n=whole, n_share=whole, n_attribution=whole, weight=real, share=real)
    sums.columns |= {name: np.empty(0) for name in ("attribution", "abs")}
    return sums


def _edge_pass(pairs: Iterator[Columns], low: int, limit: int) -> tuple[Sums, int | None]:
    """The sums of pairs from `low` on, as many as fit, and the first pair that did not."""
    sums = _no_sums()
    high: int | None = None

    def within(rows: Columns) -> Columns:
        mask = rows["key"] >= low
        if high is not None:
            mask &= rows["key"] < high
        return rows if mask.all() else {name: column[mask] for name, column in rows.items()}

    for part in coalesce(map(within, pairs), lambda: min(sums.min_rows(), max(1, limit // 4))):
        rows = within(part)  # while they waited the pass may have been cut
        if len(rows["key"]):
            _add_edges(sums, rows)
        if len(sums.keys) > limit:
            high = int(sums.keys[limit // 2])
            sums.cut(limit // 2)
    return sums, high


@np.errstate(invalid="ignore")
def _add_edges(sums: Sums, rows: Columns) -> None:
    order = ordered(rows["key"])
    key, prompt = rows["key"][order], rows["prompt"][order]
    start = changes(key)
    group, _ = sums.indices_for(key[start])
    slot = group[np.cumsum(start) - 1]
    sums.add("n", slot, 1)
    sums.add("n_prompts", slot[changes(key, prompt)], 1)
    sums.add("weight", slot, rows["weight"][order].astype(np.float64))
    for name in ("share", "attribution"):
        value = rows[name][order].astype(np.float64)
        there = ~np.isnan(value)
        value, at = value[there], slot[there]
        sums.add(f"n_{name}", at, 1)
        sums.add(name, at, value)
        if name == "attribution":
            sums.add("abs", at, np.abs(value))


def _edge_table(sums: Sums, names: Ints, part: slice) -> pa.Table:
    of = {name: column[part] for name, column in sums.columns.items()}
    target, source = (names[at] for at in np.divmod(sums.keys[part], len(names)))
    columns: list[Array | pa.Array] = []
    for end in (source, target):
        kind, neuron = (end >> 32) & 3, (end & (2**32 - 1)) - 2**31
        columns += [StringTable(KINDS).strings(kind), end >> 34, neuron]
    columns += [of["n_prompts"], of["n"], of["weight"] / of["n"]]
    for name, by in (("share", "n_share"), ("attribution", "n_attribution"), ("abs", "n_attribution")):
        columns.append(pa.array(of[name] / np.maximum(of[by], 1), mask=of[by] == 0))
    columns.append(pa.array(of["attribution"] / of["n_prompts"], mask=of["n_attribution"] == 0))
    return as_table(EDGES_MEAN, columns)


def _name(nodes: pa.Table) -> Ints:
    """One number for a node whatever its position, in the order of layer, kind and neuron."""
    of = filled(nodes, ["layer", "neuron"])
    return neuron_key(of["layer"].astype(np.int64) * 4 + kinds(nodes["kind"]), of["neuron"].astype(np.int64) + 2**31)


def _names(files: Sequence[str], fs: FileSystem) -> Ints:
    """Every name of a node that is in the files, ascending."""
    names, held = np.empty(0, np.int64), []
    with (
        closing(read(files, fs, "nodes", ["kind", "layer", "neuron"])) as nodes,
        closing(ahead(lambda table: _distinct(_name(table)), nodes)) as tables,
    ):
        for own in tables:
            held.append(own)
            if sum(map(len, held)) > max(CHUNK, len(names)):
                names, held = _distinct(np.concatenate([names, *held])), []
    return _distinct(np.concatenate([names, *held]))


def _distinct(keys: Ints) -> Ints:
    keys = np.sort(keys)  # NumPy's own unique hashes, which takes several times as long
    return keys[changes(keys)]


def _pairs(node_files: Sequence[str], edge_files: Sequence[str], fs: FileSystem, names: Ints) -> Rows[Columns]:
    """The edges of each shard; ``key`` is the pair of their ends, as places in `names`, target first."""

    def keyed(both: tuple[pa.Table, pa.Table]) -> Columns:
        nodes, edges = both
        source, target = ends(nodes, edges)
        own = _name(nodes)
        order, place = ordered(own), np.empty(len(own), np.int64)
        place[order] = np.searchsorted(names, own[order])  # in order, a search stays in the processor's cache
        rows = {name: edges[name].to_numpy() for name in ("weight", "share", "attribution")}
        return rows | {"prompt": edges["prompt_id"].to_numpy(), "key": place[target] * len(names) + place[source]}

    with (
        closing(shards(node_files, edge_files, fs, ["kind", "layer", "neuron"])) as both,
        closing(ahead(keyed, both)) as rows,
    ):
        yield from rows
