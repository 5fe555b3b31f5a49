"""How well columns of numbers tell some rows from the others: areas under the ROC curve that chance cannot explain.

Knows sparse columns, ranks with ties, how rows are cut into two halves, and tests by permutation: columns are chosen on
one half and scored on the other, since the best of thousands of columns is good on the rows that it was chosen on
whatever it is. Refuses to know what a column or a row stands for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

from tracer.errors import JobError, option

Array = NDArray[Any]
Sparse = Any
"""A `scipy.sparse.csc_array` [row, column]; what is not in it is 0."""

LEAST = 4
"""Rows of either kind that are needed: two in each half."""
LEAST_PERMUTATIONS = 99
CONFIDENCE = 0.95
_HELD = 2**21  # labels permuted at once


@dataclass(frozen=True)
class Design:
    """How columns are chosen and tested.

    Attributes:
        candidates: columns chosen on one half for each kind of row, the farthest from .5 first.
        permutations: of the labels of the other half. seed: of the halves and the permutations.
    """

    candidates: int = 50
    permutations: int = 10_000
    seed: int = 0

    def check(self) -> None:
        """Refuse numbers with which nothing can be found.

        Raises:
            JobError: one is too small.
        """
        for name, least in (("candidates", 1), ("permutations", LEAST_PERMUTATIONS), ("seed", 0)):
            if getattr(self, name) < least:
                step = f"the default is {getattr(Design(), name):,}"
                raise JobError(option(name, getattr(self, name)), f"must be {least} or more", step)


@dataclass(frozen=True)
class Labels:
    """What rows are.

    Attributes:
        codes: the kind of each row. asked: the kinds that are told from all other rows, one at a time.
        groups: rows that belong together, which are never cut apart; each row by itself if None.
    """

    codes: Int[np.ndarray, " row"]
    asked: tuple[int, ...]
    groups: Int[np.ndarray, " row"] | None = None

    def only(self, rows: Bool[np.ndarray, " row"]) -> Labels:
        """Of these rows."""
        return Labels(self.codes[rows], self.asked, None if self.groups is None else self.groups[rows])

    @property
    def units(self) -> Int[np.ndarray, " row"]:
        """The group of each row, from 0; the rows themselves where there are none."""
        given = np.arange(len(self.codes)) if self.groups is None else self.groups
        return np.unique(given, return_inverse=True)[1]

    @property
    def constant(self) -> bool:
        """Whether the rows of each group are all of one kind."""
        first = np.unique(self.units, return_index=True)[1]
        return bool((self.codes == self.codes[first][self.units]).all())


@dataclass(frozen=True)
class Block:
    """Some of the columns: what each is, [column, 3] whole numbers, and its values."""

    keys: Int[np.ndarray, "column 3"]
    values: Sparse


@dataclass(frozen=True)
class Scores:
    """Columns that were chosen for one kind of row, the farthest from .5 on the half they were chosen on first.

    Attributes:
        keys: what each is [column, 3].
        auroc: on the other half, with the ends of its interval `low` and `high`. chosen_on: on the half of the choice.
        p: share of permutations of the other half's labels with an area as far in the direction of `chosen_on`.
        n_positive, n_negative: rows of the other half.
    """

    keys: Int[np.ndarray, "column 3"]
    auroc: Float[np.ndarray, " column"]
    chosen_on: Float[np.ndarray, " column"]
    low: Float[np.ndarray, " column"]
    high: Float[np.ndarray, " column"]
    p: Float[np.ndarray, " column"]
    n_positive: int
    n_negative: int


# -------------------------------------------------------------------------------------------------- the area


def ranks(values: Sparse) -> tuple[Sparse, Float[np.ndarray, " column"]]:
    """Twice each value's midrank in its column, less twice the mean rank: whole numbers, of which a column's zeros all
    have the same.

    Returns:
        What a value's exceeds that of a zero, where there are values; and that of a zero.
    """
    from scipy.sparse import csc_array

    found: Sparse = csc_array(values, dtype=np.float64, copy=True)
    found.sum_duplicates()
    found.eliminate_zeros()
    rows, columns = found.shape
    counts = np.diff(found.indptr)
    column = np.repeat(np.arange(columns), counts)
    below = np.bincount(column[found.data < 0], minlength=columns)
    zero = 2.0 * below - counts  # of the zeros: values below less values above
    order = np.lexsort((found.data, column))
    sorted_values, sorted_column = found.data[order], column[order]
    start = np.ones(len(order), bool)
    start[1:] = (sorted_values[1:] != sorted_values[:-1]) | (sorted_column[1:] != sorted_column[:-1])
    first = np.flatnonzero(start)
    last = np.append(first[1:], len(order)) - 1
    tied = np.cumsum(start) - 1
    twice = (first + last)[tied] - 2 * found.indptr[sorted_column] + 2.0  # among the values of the column
    twice += np.where(sorted_values > 0, 2.0 * (rows - counts)[sorted_column], 0.0) - (rows + 1.0)
    found.data[order] = twice - zero[sorted_column]
    return found, zero


def auroc(values: Sparse, positive: Bool[np.ndarray, "row kind"]) -> Float[np.ndarray, "column kind"]:
    """P(value of a positive row > of a negative one) + P(equal) / 2, of every column for every kind of row; NaN where a
    kind has no rows, or all.

    From midranks, whose cost is that of the values that are not 0.
    """
    found, zero = ranks(values)
    n_positive = positive.sum(0)
    pairs = (n_positive * (len(positive) - n_positive)).astype(float)
    with np.errstate(invalid="ignore", divide="ignore"):
        sums = found.T @ positive.astype(np.float64) + zero[:, None] * n_positive
        return 0.5 + sums / (2 * pairs)


def interval(
    values: Float[np.ndarray, "column row"],
    positive: Bool[np.ndarray, " row"],
    units: Int[np.ndarray, " row"],
    confidence: float = CONFIDENCE,
) -> tuple[Float[np.ndarray, " column"], Float[np.ndarray, " column"]]:
    """The confidence interval of each column's AUROC: the wider end of two intervals, of which each alone misses too
    often somewhere. DeLong's on the logit scale, with rows of one unit as one observation (Obuchowski), is short of few
    rows and has no width where the separation is perfect; Newcombe's score interval, of as many units, assumes a shape.

    Source: DeLong et al. 1988; Obuchowski 1997; Newcombe 2006, method 5.
    """
    from scipy.special import expit, logit
    from scipy.stats import norm, rankdata

    yes, no = values[:, positive], values[:, ~positive]
    all_ranks = rankdata(values, axis=1)
    above = (all_ranks[:, positive] - rankdata(yes, axis=1)) / no.shape[1]
    below = 1 - (all_ranks[:, ~positive] - rankdata(no, axis=1)) / yes.shape[1]
    area = above.mean(1)
    variance, n_yes, n_no = _variance(above - area[:, None], below - area[:, None], units[positive], units[~positive])
    z = float(norm.ppf(0.5 + confidence / 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        reach = z * np.sqrt(variance) / (area * (1 - area))
        low, high = expit(logit(area) - reach), expit(logit(area) + reach)
    scored = _newcombe(area, n_yes, n_no, z)
    return np.fmin(low, scored[0]), np.fmax(high, scored[1])


def _variance(above: Array, below: Array, of_above: Array, of_below: Array) -> tuple[Array, int, int]:
    """Obuchowski's variance of each column's area from the centred placements of positive and negative rows, and how
    many units there are of either; with units of one row it is DeLong's."""
    n_units = int(max(of_above.max(), of_below.max())) + 1

    def summed(placed: Array, of: Array) -> Array:
        one_hot = np.zeros((len(of), n_units))
        one_hot[np.arange(len(of)), of] = 1
        return placed @ one_hot

    n_yes, n_no, n_all = (len(np.unique(of)) for of in (of_above, of_below, np.concatenate([of_above, of_below])))
    if len(of_above) == n_yes and len(of_below) == n_no and n_yes + n_no == n_all:
        return above.var(1, ddof=1) / n_yes + below.var(1, ddof=1) / n_no, n_yes, n_no
    yes, no = summed(above, of_above), summed(below, of_below)
    m, n = len(of_above), len(of_below)
    variance = n_yes / max(1, n_yes - 1) * (yes**2).sum(1) / m**2 + n_no / max(1, n_no - 1) * (no**2).sum(1) / n**2
    return np.maximum(variance + 2 * n_all / max(1, n_all - 1) * (yes * no).sum(1) / (m * n), 0), n_yes, n_no


def _newcombe(area: Array, n_yes: int, n_no: int, z: float) -> tuple[Array, Array]:
    """The areas from which those found are `z` standard errors away, by Hanley and McNeil's variance; by bisection."""
    more = (n_yes + n_no) / 2 - 1

    def beyond(true: Array) -> Array:
        variance = true * (1 - true) * (1 + more * (1 - true) / (2 - true) + more * true / (1 + true)) / (n_yes * n_no)
        return (area - true) ** 2 > z**2 * variance

    ends = []
    for outer in (0.0, 1.0):
        far, near = np.full_like(area, outer), area.clip(1e-9, 1 - 1e-9)  # at 0 and 1 themselves the variance is 0
        for _ in range(50):
            middle = (far + near) / 2
            out = beyond(middle)
            far, near = np.where(out, middle, far), np.where(out, near, middle)
        ends.append(np.where(area == outer, outer, far))
    return ends[0], ends[1]


# --------------------------------------------------------------------------------------- halves, permutations


def halved(labels: Labels, seed: int) -> Bool[np.ndarray, " row"]:
    """Which rows are of the first half: of every kind the half, at random; groups are never cut apart."""
    units = labels.units
    first = np.unique(units, return_index=True)[1]
    order = np.random.default_rng([seed, 0]).permutation(len(first))
    order = order[np.argsort(labels.codes[first[order]], kind="stable")]
    chosen = np.zeros(len(first), bool)
    chosen[order[::2]] = True
    return chosen[units]


def permuted(labels: Labels, count: int, rng: np.random.Generator) -> Int[np.ndarray, "permutation row"]:
    """Kinds of rows as they could as well be: those of groups exchanged where each has one kind, else those of rows
    within their groups; without groups, of all rows."""
    codes, units = labels.codes, labels.units
    if labels.groups is None or labels.constant:
        each = np.unique(units, return_index=True)[1]
        return rng.permuted(np.broadcast_to(codes[each], (count, len(each))), axis=1)[:, units]
    found = np.empty((count, len(codes)), codes.dtype)
    for unit in range(int(units.max()) + 1):
        rows = np.flatnonzero(units == unit)
        found[:, rows] = rng.permuted(np.broadcast_to(codes[rows], (count, len(rows))), axis=1)
    return found


def tail(
    columns: Sequence[Float[np.ndarray, "_column row"]],
    signs: Sequence[Float[np.ndarray, " _column"]],
    labels: Labels,
    design: Design,
) -> list[Float[np.ndarray, " _column"]]:
    """Permutation p-values of each asked kind's columns, one-sided: (1 + as far or farther) / (1 + permutations), the
    same permutations for all.

    Args:
        columns: for each kind, doubled centred midranks.
        signs: 1 where a large area is far, -1 where a small one is.
    """
    rng = np.random.default_rng([design.seed, 1])
    beyond = [np.zeros(len(one), np.int64) for one in columns]
    there = [_area(one, (labels.codes == kind)[None])[:, 0] for one, kind in zip(columns, labels.asked, strict=True)]
    step, left = max(1, _HELD // len(labels.codes)), design.permutations
    while left > 0:
        drawn = permuted(labels, min(step, left), rng)
        left -= len(drawn)
        for i, kind in enumerate(labels.asked):
            if len(columns[i]):
                areas = _area(columns[i], drawn == kind)
                beyond[i] += (signs[i][:, None] * (areas - there[i][:, None]) >= -1e-12).sum(1)
    return [(1 + one) / (1 + design.permutations) for one in beyond]


def _area(columns: Array, positive: Array) -> Array:
    """Areas, less a half, of columns of doubled centred midranks, [column, labelling]."""
    n_positive = positive.sum(1)
    return (columns @ positive.T.astype(np.float64)) / (2.0 * n_positive * (positive.shape[1] - n_positive))


# -------------------------------------------------------------------------------------------- chosen and scored


class _Best:
    """The columns farthest from .5 so far, of equal ones those of larger values; their values on the other half."""

    def __init__(self, count: int, rows: int) -> None:
        self.count = count
        self.keys, self.areas, self.sizes = np.empty((0, 3), np.int64), np.empty(0), np.empty(0)
        self.held = np.empty((0, rows))

    def add(self, keys: Array, areas: Array, sizes: Array, other: Sparse) -> None:
        """Take the columns of a block: their areas and summed |values| on one half, their values on the other."""
        far = self._first(areas, sizes)
        far = far[areas[far] != 0.5]
        both = zip((self.keys, self.areas, self.sizes), (keys[far], areas[far], sizes[far]), strict=True)
        keys, areas, sizes = (np.concatenate(one) for one in both)
        held = np.concatenate([self.held, other[:, far].toarray().T])
        best = self._first(areas, sizes)
        self.keys, self.areas, self.sizes, self.held = keys[best], areas[best], sizes[best], held[best]

    def _first(self, areas: Array, sizes: Array) -> Array:
        return np.lexsort((-sizes, -np.abs(areas - 0.5).round(12)))[: self.count]


def separate(blocks: Iterable[Block], labels: Labels, design: Design) -> tuple[list[Scores], int]:
    """The columns that tell each asked kind of row from the others: chosen on one half, scored on the other.

    Args:
        blocks: all columns, some at a time; memory is that of one block and of the candidates.
        labels: `checked` has found that each asked kind is in both halves, and other rows too.

    Returns:
        For each asked kind its columns, and how many columns there were.
    """
    from scipy.sparse import csc_array

    here = halved(labels, design.seed)
    positive = labels.codes[here][:, None] == np.array(labels.asked)
    best = [_Best(design.candidates, int((~here).sum())) for _ in labels.asked]
    n_columns = 0
    for block in blocks:
        n_columns += len(block.keys)
        by_row = block.values.tocsr()
        own, other = by_row[here], csc_array(by_row[~here])
        sizes = np.asarray(abs(own).sum(0), dtype=np.float64)
        for one, area in zip(best, auroc(own, positive).T, strict=True):
            one.add(block.keys, area, sizes, other)
    rest = labels.only(~here)
    doubled = [_dense_ranks(one.held) for one in best]
    signs = [np.where(one.areas > 0.5, 1.0, -1.0) for one in best]
    p = tail(doubled, signs, rest, design)
    found = []
    for one, rank, each, kind in zip(best, doubled, p, labels.asked, strict=True):
        yes = rest.codes == kind
        low, high = interval(one.held, yes, rest.units)
        area = 0.5 + _area(rank, yes[None])[:, 0]
        found.append(Scores(one.keys, area, one.areas, low, high, each, int(yes.sum()), int((~yes).sum())))
    return found, n_columns


def _dense_ranks(values: Array) -> Array:
    """Twice each value's midrank in its row of the table, less twice the mean rank."""
    from scipy.stats import rankdata

    return 2 * rankdata(values, axis=1) - (values.shape[1] + 1.0) if len(values) else values


def lacking(labels: Labels, kind: int, design: Design) -> str | None:
    """Why a kind of row cannot be told from the others here; None if it can."""
    yes = labels.codes == kind
    counts = int(yes.sum()), int((~yes).sum())
    if min(counts) < LEAST:
        return f"has {counts[0]} prompts, and {counts[1]} have another; at least {LEAST} of either are needed"
    here = halved(labels, design.seed)
    if min(int((yes == one)[half].sum()) for half in (here, ~here) for one in (True, False)) < LEAST // 2:
        return f"is in too few groups: each half of the prompts needs {LEAST // 2} with it and {LEAST // 2} without"
    return None
