"""A neuron's values over a corpus as sums that add up exactly, whatever the order and the parts they come in.

Counts are whole numbers, and so are the sums: a float32 is a whole number of the smallest one there is, and so is its
square of that one's square. What is divided is divided once, at the end. Knows values and tables; refuses to know
where values come from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa

from tracer.store.schemas import COUNTS, DENSITIES

EDGES = (2.0 ** (np.arange(-32, 33) / 2)).astype(np.float32)
"""Sizes of values between which they are counted, two a doubling, from 2^-16 to 2^16."""
BINS = len(EDGES)
BORDERS = np.concatenate([[-np.inf], -EDGES[::-1], EDGES, [np.inf]]).astype(np.float32)
"""The edges of the histogram: a value that is one lies in the bin that is farther from 0."""
_UNIT = 173
"""Sums are in units of 2^-173: a float32 is a 24-bit whole number times 2^-149 or more, once shifted."""
_AT_ONCE = 2**20
"""Values that are looked at together: some 60 bytes each are held meanwhile."""


def bin_of(sizes: np.ndarray) -> np.ndarray:
    """The bin of values' sizes: 0 below `EDGES[0]`, i from ``EDGES[i - 1]`` on."""
    return np.searchsorted(EDGES, sizes, side="right")


@dataclass
class Totals:
    """What is known of neurons' values over some tokens, by neuron.

    Attributes:
        n_tokens, n_documents: that they are over. sums, squares: whole numbers of 2^-173 and of 2^-346.
        counts: histogram between `BORDERS` [neuron, bin]. peaks: of documents by the bin of their largest value, and of
            their smallest [neuron, sign, bin]. above: tokens whose size is at least that asked for, by sign
            [neuron, sign]. smallest, largest: values [neuron].
    """

    n_tokens: int
    n_documents: int
    sums: list[int]
    squares: list[int]
    counts: np.ndarray
    peaks: np.ndarray
    above: np.ndarray
    smallest: np.ndarray
    largest: np.ndarray

    @staticmethod
    def none(n: int) -> Totals:
        """Of `n` neurons, over nothing."""
        counts, peaks = np.zeros((n, 2 * BINS + 1), np.int64), np.zeros((n, 2, BINS + 1), np.int64)
        ends = np.full(n, np.inf, np.float32)
        return Totals(0, 0, [0] * n, [0] * n, counts, peaks, np.zeros((n, 2), np.int64), ends, -ends)

    def add(self, values: np.ndarray, above: float | None = None) -> None:
        """Add the values of some tokens.

        Args:
            values: finite float32 [token, neuron]. above: the size from which a token counts as one of `above`.
        """
        n = len(self.sums)
        for first in range(0, len(values), step := max(1, _AT_ONCE // max(1, n))):
            self._add(values[first : first + step], above)

    def _add(self, values: np.ndarray, above: float | None) -> None:
        n, which = len(self.sums), np.arange(len(self.sums))
        self.n_tokens += len(values)
        self.smallest = np.minimum(self.smallest, values.min(0))
        self.largest = np.maximum(self.largest, values.max(0))
        sizes, negative = np.abs(values), values < 0
        bins = bin_of(sizes)
        place = np.where(negative, BINS - bins, BINS + bins) + which * (2 * BINS + 1)
        self.counts += np.bincount(place.ravel(), minlength=self.counts.size).reshape(self.counts.shape)
        if above is not None:
            strong = sizes >= np.float32(above)
            self.above += np.stack([(strong & ~negative).sum(0), (strong & negative).sum(0)], 1)
        share, exponent = np.frexp(values)
        whole, power = np.ldexp(share, 24).astype(np.int64), exponent.astype(np.int64) + 149
        square = whole * whole
        group = (which * 300 + power).ravel()
        # Each weight is below 2^25, and a chunk has 2^20 values at most: float64 adds them without rounding.
        parts = [
            np.bincount(group, weights=part.ravel(), minlength=300 * n).astype(np.int64).reshape(n, 300)
            for part in (whole, square >> 24, square & (2**24 - 1))
        ]
        for at, exp in np.argwhere((parts[0] != 0) | (parts[1] != 0) | (parts[2] != 0)).tolist():
            self.sums[at] += int(parts[0][at, exp]) << exp
            self.squares[at] += ((int(parts[1][at, exp]) << 24) + int(parts[2][at, exp])) << 2 * exp

    def merge(self, other: Totals) -> None:
        """Add what is known over other tokens."""
        self.n_tokens, self.n_documents = self.n_tokens + other.n_tokens, self.n_documents + other.n_documents
        self.sums = [mine + its for mine, its in zip(self.sums, other.sums, strict=True)]
        self.squares = [mine + its for mine, its in zip(self.squares, other.squares, strict=True)]
        self.counts, self.peaks, self.above = (
            self.counts + other.counts,
            self.peaks + other.peaks,
            self.above + other.above,
        )
        self.smallest = np.minimum(self.smallest, other.smallest)
        self.largest = np.maximum(self.largest, other.largest)

    # ------------------------------------------------------------------------------------------------ tables

    def table(self, neurons: Sequence[tuple[int, int]]) -> pa.Table:
        """As a part of a run, in `schemas.COUNTS`.

        Args:
            neurons: the (layer, neuron)s that these are of.
        """
        columns = {
            "layer": [layer for layer, _ in neurons],
            "neuron": [neuron for _, neuron in neurons],
            "n_tokens": [self.n_tokens] * len(neurons),
            "n_documents": [self.n_documents] * len(neurons),
            "sum": [f"{one:x}" for one in self.sums],
            "squares": [f"{one:x}" for one in self.squares],
            "smallest": self.smallest,
            "largest": self.largest,
            "counts": list(self.counts),
            "peaks": list(self.peaks.reshape(len(neurons), -1)),
            "above": list(self.above),
        }
        return pa.table(columns, COUNTS)

    @staticmethod
    def of(table: pa.Table) -> Totals:
        """Back from such a table."""
        rows = table.to_pydict()
        n = table.num_rows
        return Totals(
            n_tokens=rows["n_tokens"][0],
            n_documents=rows["n_documents"][0],
            sums=[int(one, 16) for one in rows["sum"]],
            squares=[int(one, 16) for one in rows["squares"]],
            counts=np.array(rows["counts"], np.int64),
            peaks=np.array(rows["peaks"], np.int64).reshape(n, 2, BINS + 1),
            above=np.array(rows["above"], np.int64),
            smallest=np.array(rows["smallest"], np.float32),
            largest=np.array(rows["largest"], np.float32),
        )

    def densities(self, neurons: Sequence[tuple[int, int]], share: float, above: float | None) -> pa.Table:
        """What they come to, in `schemas.DENSITIES`; no rows where there was no token.

        Args:
            share: a token is strong from the first edge of the histogram on that is at least this share of the
                neuron's largest size; without effect where `above` (as of `add`) says from which size on.
        """
        rows = [] if not self.n_tokens else [self._row(at, share, above) for at in range(len(neurons))]
        named = [{"layer": layer, "neuron": neuron} for layer, neuron in neurons]
        return pa.Table.from_pylist([name | row for name, row in zip(named, rows, strict=False)], DENSITIES)

    def _row(self, at: int, share: float, above: float | None) -> dict[str, Any]:
        mean = Fraction(self.sums[at], self.n_tokens << _UNIT)
        square = Fraction(self.squares[at], self.n_tokens << 2 * _UNIT)
        positive, negative, threshold = self._strong(at, share, above)
        return {
            "n_tokens": self.n_tokens,
            "mean": float(mean),
            "std": math.sqrt(square - mean * mean),
            "smallest": float(self.smallest[at]),
            "largest": float(self.largest[at]),
            "threshold": threshold,
            "density_positive": positive / self.n_tokens,
            "density_negative": negative / self.n_tokens,
            "edges": BORDERS,
            "counts": self.counts[at],
        }

    def _strong(self, at: int, share: float, above: float | None) -> tuple[int, int, float]:
        """Tokens that are strongly positive, and negative; and from which size on."""
        if above is not None:
            return int(self.above[at, 0]), int(self.above[at, 1]), float(np.float32(above))
        most = max(abs(float(self.smallest[at])), abs(float(self.largest[at])))
        edge = min(int(np.searchsorted(EDGES, share * most, side="left")), BINS - 1)
        counts = self.counts[at]
        return int(counts[BINS + edge + 1 :].sum()), int(counts[: BINS - edge].sum()), float(EDGES[edge])
