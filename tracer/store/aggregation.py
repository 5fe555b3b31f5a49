"""A run's nodes tables summed over prompts: what each neuron does on average, and the prompts where it does most.

Streams the files in shard order and needs no more memory than a few shards and one row of sums per neuron. Float sums
are left folds in the order of the rows, in float64, so the same rows give the same bits, however they are cut into
files and whatever the number of threads. Refuses to know run folders and models.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

import numpy as np
import pyarrow as pa
from pyarrow.fs import FileSystem

from tracer.store.columns import (
    CHUNK,
    Array,
    Columns,
    Ints,
    StringTable,
    Sums,
    as_table,
    changes,
    coalesce,
    neuron_rows,
    or_null,
    ordered,
    split_key,
)

NEURONS = pa.schema(
    [
        ("layer", pa.int16()),
        ("neuron", pa.int32()),
        ("expert", pa.int32()),
        ("n_prompts", pa.int64()),
        ("n_occurrences", pa.int64()),
        ("mean_attribution", pa.float64()),
        ("mean_abs_attribution", pa.float64()),
        ("std", pa.float64()),
        ("max_abs", pa.float64()),
        ("mean_activation", pa.float64()),
        ("prompt_mean_attribution", pa.float64()),
        ("prompt_mean_abs", pa.float64()),
    ]
)
TOP_PROMPTS = pa.schema(
    [
        ("layer", pa.int16()),
        ("neuron", pa.int32()),
        ("expert", pa.int32()),
        ("rank", pa.int16()),
        ("prompt_id", pa.int64()),
        ("attribution", pa.float32()),
        ("position", pa.int32()),
        ("token", pa.string()),
        ("activation", pa.float32()),
    ]
)


@np.errstate(invalid="ignore")  # what is infinite has no spread
def neurons(files: Sequence[str], fs: FileSystem) -> pa.Table:
    """Neuron nodes per (layer, neuron), over all prompts and positions where they were kept; sorted.

    ``mean_attribution``, ``mean_abs_attribution``, ``std`` (of the population), ``max_abs`` and ``mean_activation``
    are over occurrences, that is rows. ``prompt_mean_attribution`` and ``prompt_mean_abs`` are means over the
    ``n_prompts`` prompts where the neuron was kept of its attribution summed over positions, and of that sum's size.

    Args:
        files: nodes files in shard order.
        fs: where they are.

    Returns:
        A table in `NEURONS`.

    Raises:
        RunError: a file is missing or damaged, or prompts are out of order.
    """
    whole, real = np.int64, np.float64
    sums = Sums(n_prompts=whole, n=whole, expert=whole, first=real, sum=real, abs=real, max=real, activation=real)
    sums.columns |= {name: np.empty(0) for name in ("shifted", "squared", "prompt_abs")}
    with closing(neuron_rows(files, fs, ["attribution", "activation"])) as parts:
        for rows in coalesce(parts, sums.min_rows):
            _add_neurons(sums, rows)
    layer, neuron = split_key(sums.keys)
    of, n, n_prompts = sums.columns, sums.columns["n"], sums.columns["n_prompts"]
    variance = (of["squared"] - of["shifted"] * (of["shifted"] / n)) / n
    columns = [layer, neuron, or_null(of["expert"]), n_prompts, n, of["sum"] / n, of["abs"] / n]
    columns += [np.sqrt(np.maximum(variance, 0)), of["max"]]
    columns += [of["activation"] / n, of["sum"] / n_prompts, of["prompt_abs"] / n_prompts]
    return as_table(NEURONS, columns)


def in_most_circuits(table: pa.Table, count: int) -> pa.Table:
    """The first rows of a `neurons` table by how many prompts have the neuron, then by its mean strength there."""
    order = [("n_prompts", "descending"), ("prompt_mean_abs", "descending")]
    return table.sort_by([*order, ("layer", "ascending"), ("neuron", "ascending")]).slice(0, count)


def _add_neurons(sums: Sums, rows: Columns) -> None:
    order = ordered(rows["key"])
    key, prompt = rows["key"][order], rows["prompt"][order]
    value = rows["attribution"][order].astype(np.float64)
    start, start_prompt = changes(key), changes(key, prompt)
    group, new = sums.indices_for(key[start])
    sums.columns["first"][group[new]] = value[start][new]
    sums.columns["expert"][group[new]] = rows["expert"][order][start][new]
    slot = group[np.cumsum(start) - 1]
    # Of differences to the first value: squares of the values themselves would lose a small spread in a large mean.
    shifted = value - sums.columns["first"][slot]
    sums.add("n", slot, 1)
    sums.add("sum", slot, value)
    sums.add("abs", slot, np.abs(value))
    sums.add("shifted", slot, shifted)
    sums.add("squared", slot, shifted * shifted)
    sums.add("activation", slot, rows["activation"][order].astype(np.float64))
    np.maximum.at(sums.columns["max"], slot, np.abs(value))
    of_prompt = np.bincount(np.cumsum(start_prompt) - 1, weights=value)
    sums.add("n_prompts", slot[start_prompt], 1)
    sums.add("prompt_abs", slot[start_prompt], np.abs(of_prompt))


def top_prompts(files: Sequence[str], fs: FileSystem, count: int = 10) -> pa.Table:
    """For every neuron the prompts where it matters most, ``count`` at most.

    Ranked by the size of ``attribution``, the signed sum over positions (summed in float64, then rounded to float32);
    of equal ones the earlier prompt comes first, and what is not a number comes last. ``position``, ``token`` and
    ``activation`` are those of the neuron's strongest occurrence in that prompt, the first of equal ones.

    Args:
        files: nodes files in shard order.
        fs: where they are.
        count: prompts per neuron, 1 to 32767.

    Returns:
        A table in `TOP_PROMPTS`, sorted by layer, neuron and rank.

    Raises:
        RunError: a file is missing or damaged, or prompts are out of order.
    """
    if not 1 <= count < 2**15:
        raise ValueError(f"count is {count}, between 1 and 32767 is needed")
    strings = StringTable()
    names = ["attribution", "position", "activation"]
    types = {"key": np.int64, "expert": np.int32, "prompt": np.int64}
    types |= {"attribution": np.float32, "position": np.int32}
    types |= {"activation": np.float32, "token": np.int32}
    best: Columns = {name: np.empty(0, kind) for name, kind in types.items()}
    rank = np.empty(0, np.int64)
    with closing(neuron_rows(files, fs, names, strings)) as parts:
        for rows in coalesce(parts, lambda: max(CHUNK, len(rank) // 2)):  # noqa: B023
            contenders = _contenders(best, _by_prompt(rows), count)
            for name in types:  # one after the other, so that only one is held twice
                best[name] = np.concatenate([best[name], contenders.pop(name)])
            order = _strongest_first(best["key"], best["attribution"])
            rank = _rank(best["key"][order])
            kept, rank = order[rank <= count], rank[rank <= count]
            for name in types:
                best[name] = best[name][kept]
    layer, neuron = split_key(best["key"])
    columns = [layer, neuron, or_null(best["expert"]), rank, best["prompt"], best["attribution"], best["position"]]
    return as_table(TOP_PROMPTS, [*columns, strings.strings(best["token"]), best["activation"]])


def _by_prompt(rows: Columns) -> Columns:
    """Rows summed over positions: one for each neuron and prompt, with what is said of its strongest occurrence. They
    are taken out of `rows` as they are put in order, so that one column is held twice."""
    order = ordered(rows["key"])
    rows = {name: rows.pop(name)[order] for name in list(rows)}
    start = changes(rows["key"], rows["prompt"])
    group, first = np.cumsum(start) - 1, np.flatnonzero(start)
    strength = _strength(rows["attribution"])
    at = np.flatnonzero(strength == np.maximum.reduceat(strength, first)[group])
    strongest = at[changes(group[at])]
    summed = {name: column[strongest] for name, column in rows.items()}
    total = np.bincount(group, weights=rows.pop("attribution").astype(np.float64))
    with np.errstate(over="ignore"):
        return summed | {"attribution": total.astype(np.float32)}


def _contenders(best: Columns, rows: Columns, count: int) -> Columns:
    """The rows that could still be among the best: all but those that are no stronger than their neuron's last one."""
    if not len(best["key"]):
        return rows
    first = np.flatnonzero(changes(best["key"]))
    size = np.diff(first, append=len(best["key"]))
    last = np.where(size == count, _strength(best["attribution"])[first + size - 1], -2)
    at = np.minimum(np.searchsorted(best["key"][first], rows["key"]), len(first) - 1)
    known = best["key"][first][at] == rows["key"]
    mask = ~known | (_strength(rows["attribution"]) > last[at])
    return {name: column[mask] for name, column in rows.items()}


def _strongest_first(key: Ints, values: Array) -> Ints:
    """The stable order of rows by their key, and within one by falling strength: of one number, so that a sort that
    knows runs, as the best that are in order already, does little."""
    known = np.sort(key[changes(key)])
    number = np.searchsorted(known[changes(known)], key)
    number *= 2**32
    number -= _strength(values)
    return np.argsort(number, kind="stable")


def _strength(values: Array) -> Ints:
    """Integers in the order of the values' sizes; -1 for what is not a number."""
    bits = np.abs(values).view(np.int32).astype(np.int64)  # floats of one sign are ordered as their bits are
    return np.where(np.isnan(values), -1, bits)


def _rank(key: Ints) -> Ints:
    """Places of rows within their key, from 1."""
    first = np.flatnonzero(changes(key))
    return np.arange(len(key)) - np.repeat(first, np.diff(first, append=len(key))) + 1
