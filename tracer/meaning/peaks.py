"""Which documents become exemplars of a neuron: the strongest, and a random sample at quantiles of their peaks.

A document counts once for each sign that it has: by its peak, the first token where the value of that sign is largest.
Documents are sorted into strata by the size of their peak, two a doubling; of each stratum those of the smallest key
are kept, a hash of seed, neuron and document. Both that and the strongest are the same whatever the order and the parts
that documents come in. Knows numbers and tables; refuses to know models and texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tracer.meaning.densities import BINS
from tracer.meaning.exemplars import TOP
from tracer.store.schemas import CANDIDATES, EXEMPLARS

SPARE = 2
"""So many times as many documents of a stratum are kept as a quantile shows, since some are among the strongest."""


@dataclass(frozen=True)
class Wanted:
    """How many exemplars of each neuron and sign.

    Attributes:
        top: the strongest. each: of every quantile. quantiles: percentages, 0 to 100.
    """

    top: int
    each: int
    quantiles: tuple[float, ...]


def keys(seed: int, layer: Any, neuron: Any, polarity: Any, document: Any) -> np.ndarray:
    """A hash for each neuron, sign and document (whole numbers that broadcast), as random as splitmix64."""
    state = np.asarray(seed, np.uint64)
    for part in (layer, neuron, np.asarray(polarity) > 0, document):
        state = _mixed(state ^ np.asarray(part, np.int64).astype(np.uint64))
    return state


def _mixed(state: Any) -> Any:
    with np.errstate(over="ignore"):
        state = state + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return state ^ (state >> np.uint64(31))


def one_a_document(group: np.ndarray, value: np.ndarray, document: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Of rows of one group (a neuron and sign) and document the one that is largest in size, the first of equal ones;
    their indices, by group and document."""
    order = np.lexsort((position, -np.abs(value), document, group))
    first = np.ones(len(order), bool)
    first[1:] = (np.diff(group[order]) != 0) | (np.diff(document[order]) != 0)
    return order[first]


def kept(group: np.ndarray, value: np.ndarray, document: np.ndarray, sample: tuple[Any, Any], wanted: Wanted) -> Any:
    """The rows that may be exemplars when all documents are known: of each group the strongest, and of each of its
    strata those of the smallest keys; their indices, rising.

    Args:
        group, value, document: of each row; a document has one row in a group. sample: its stratum and key.
    """
    stratum, key = sample
    strongest = np.lexsort((document, -np.abs(value), group))
    by_key = np.lexsort((document, key, stratum, group))
    chosen = np.zeros(len(group), bool)
    chosen[strongest[_rank(group[strongest]) < wanted.top]] = True
    rank = _rank(group[by_key].astype(np.int64) * (BINS + 1) + stratum[by_key])
    chosen[by_key[rank < SPARE * wanted.each]] = True
    return np.flatnonzero(chosen)


def _rank(group: np.ndarray) -> np.ndarray:
    """Places of sorted rows within their group, from 0."""
    if not len(group):
        return np.zeros(0, np.int64)
    first = np.flatnonzero(np.concatenate([[True], np.diff(group) != 0]))
    return np.arange(len(group)) - np.repeat(first, np.diff(first, append=len(group)))


def merged(parts: Sequence[pa.Table], wanted: Wanted) -> pa.Table:
    """The candidates (`schemas.CANDIDATES`) of several parts, those that are still some, by neuron, sign and document.

    Documents of different parts differ.
    """
    rows = pa.concat_tables(parts).combine_chunks()
    columns = {name: rows[name].to_numpy() for name in CANDIDATES.names[:8]}
    chosen = kept(
        groups(columns["layer"], columns["neuron"], columns["polarity"]),
        columns["value"],
        columns["document"],
        (columns["stratum"], columns["key"]),
        wanted,
    )
    found = rows.take(pa.array(chosen))
    return found.sort_by([(name, "ascending") for name in ("layer", "neuron", "polarity", "document")])


def groups(layer: Any, neuron: Any, polarity: Any) -> np.ndarray:
    """A whole number for each neuron and sign, rising with them."""
    code = np.asarray(layer, np.int64) * 2**32 + np.asarray(neuron, np.int64)
    return code * 2 + (np.asarray(polarity) > 0)


def exemplars(candidates: pa.Table, neurons: Sequence[tuple[int, int]], peaks: np.ndarray, wanted: Wanted) -> pa.Table:
    """The exemplars of a corpus, in `schemas.EXEMPLARS`: by neuron and sign, the strongest first, then the quantiles,
    the highest first.

    The exemplars of a quantile are drawn from the stratum that it lies in; none of them is among the strongest or at a
    higher quantile, so that there may be fewer, or none.

    Args:
        candidates: as `merged` gives them. neurons: (layer, neuron)s. peaks: how many documents have their peak in each
            stratum [neuron, sign, stratum]; the first sign is positive.
    """
    rows: list[dict[str, Any]] = []
    for at, (layer, neuron) in enumerate(neurons):
        for sign, polarity in ((1, -1), (0, 1)):
            mine = (pc.field("layer") == layer) & (pc.field("neuron") == neuron) & (pc.field("polarity") == polarity)
            found = candidates.filter(mine).to_pylist()
            for kind, some in _chosen(found, peaks[at, sign], wanted):
                rows += [one | {"kind": kind, "rank": rank} for rank, one in enumerate(some)]
    return pa.Table.from_pylist([{name: row[name] for name in EXEMPLARS.names} for row in rows], EXEMPLARS)


def _chosen(found: list[dict[str, Any]], peaks: np.ndarray, wanted: Wanted) -> list[tuple[str, list[dict[str, Any]]]]:
    """Of one neuron and sign the exemplars of each kind."""
    strongest = sorted(found, key=_strength)[: wanted.top]
    taken = {one["document"] for one in strongest}
    made = [(TOP, strongest)] if strongest else []
    for quantile in sorted(wanted.quantiles, reverse=True):
        stratum = stratum_of(peaks, quantile)
        inside = sorted((one for one in found if one["stratum"] == stratum), key=lambda one: one["key"])
        some = [one for one in inside[: SPARE * wanted.each] if one["document"] not in taken][: wanted.each]
        taken |= {one["document"] for one in some}
        if some:
            made.append((f"q{quantile:g}", sorted(some, key=_strength)))
    return made


def _strength(one: dict[str, Any]) -> tuple[float, int]:
    return -abs(one["value"]), one["document"]


def stratum_of(peaks: np.ndarray, quantile: float) -> int | None:
    """The stratum that holds a quantile of documents' peaks: that of the smallest peak which so many percent of them do
    not exceed; None of no documents.

    Args:
        peaks: documents by stratum, rising.
    """
    total = int(peaks.sum())
    place = max(0, -(-round(quantile * 1e6) * total // 100_000_000) - 1)
    return int(np.searchsorted(np.cumsum(peaks), place, side="right")) if total else None
