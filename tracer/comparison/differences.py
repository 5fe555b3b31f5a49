"""How much a mean differs between two sides, and how sure that is: intervals, tests, correlations, overlap.

Knows arrays of numbers by prompt and column. Refuses to know nodes, models and runs.

Intervals are percentile bootstraps over prompts: of the differences where prompts are the same, of both samples
apart where they are not. A p-value is that of a permutation test of the mean difference: the two sides of a prompt
exchanged (signs of the differences), or prompts exchanged between the sides; every arrangement where there are few,
else random ones. Which columns are tested must not depend on which side is which; then p-values hold under any such
choice, and q is after Benjamini and Hochberg over all columns tested.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tracer.errors import JobError, option
from tracer.evaluation.statistics import Interval, Resamples, resampled_means

Array = NDArray[Any]

RATE = 0.05
"""The false discovery rate up to which a difference counts as found."""
RESAMPLES, PERMUTATIONS = 2000, 10_000
_COLUMNS = 1024  # resampled or permuted at once
_ROUNDING = 1e-9  # of the sum of sizes: two arrangements that differ by less are equal


@dataclass(frozen=True)
class Design:
    """How differences are tested."""

    permutations: int = PERMUTATIONS
    seed: int = 0

    def check(self) -> None:
        """Refuse settings that are none.

        Raises:
            JobError: too few permutations, or a negative seed.
        """
        if self.permutations < 99:
            raise JobError(option("permutations", self.permutations), "must be 99 or more", "10000 is usual")
        if self.seed < 0:
            raise JobError(option("seed", self.seed), "must be 0 or more", "leave it out for 0")


@dataclass(frozen=True, eq=False)
class Differences:
    """Of each column the means of both sides, other minus one with its 95 % interval, p and q; the ends, p and q are
    NaN where a side has one prompt."""

    one: Array
    other: Array
    difference: Array
    low: Array
    high: Array
    p: Array
    q: Array


def differences(one: Array, other: Array, paired: bool, design: Design) -> Differences:
    """The differences of two tables [prompt, column].

    Args:
        paired: row i of one is the same prompt as row i of the other.
    """
    from scipy.stats import false_discovery_control

    parts = [
        _of_columns(one[:, at : at + _COLUMNS], other[:, at : at + _COLUMNS], paired, design)
        for at in range(0, one.shape[1], _COLUMNS)
    ]
    low, high, p = (np.concatenate([np.empty(0), *each]) for each in zip(*parts, strict=True)) if parts else [_NONE] * 3
    known = np.isfinite(p)
    q = np.full(len(p), math.nan)
    q[known] = false_discovery_control(p[known]) if known.any() else []
    mean, its = one.mean(0), other.mean(0)
    difference = (other - one).mean(0) if paired else its - mean
    return Differences(mean, its, difference, low, high, p, q)


_NONE = np.empty(0)


def _of_columns(one: Array, other: Array, paired: bool, design: Design) -> tuple[Array, Array, Array]:
    found = interval(one, other, paired, design.seed)
    if min(len(one), len(other)) < 2:
        return found.low.numpy(), found.high.numpy(), np.full(one.shape[1], math.nan)
    p = _signs_exchanged(other - one, design) if paired else _prompts_exchanged(one, other, design)
    return found.low.numpy(), found.high.numpy(), p


def interval(one: Array, other: Array, paired: bool, seed: int) -> Interval:
    """The mean of other minus one by column, with its interval over prompts, of which a sample of one has none."""
    if paired:
        return resampled_means(torch.from_numpy(other - one), n_resamples=RESAMPLES, seed=seed).interval()
    mine, its = (
        resampled_means(torch.from_numpy(rows), n_resamples=RESAMPLES, seed=2 * seed + of)
        for of, rows in enumerate((one, other))
    )
    if not len(mine.values) or not len(its.values):
        return Resamples(its.estimate - mine.estimate, mine.values[:0]).interval()
    return Resamples(its.estimate - mine.estimate, its.values - mine.values).interval()


def _signs_exchanged(rows: Array, design: Design) -> Array:
    """Two-sided p-values of the means of differences [prompt, column]: signs exchanged."""
    n = len(rows)
    if 2**n <= design.permutations:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=n)))
    else:
        signs = np.random.default_rng(design.seed).choice((1.0, -1.0), size=(design.permutations, n))
    return _p(np.abs(rows.sum(0)), np.abs(signs @ rows), np.abs(rows).sum(0), whole=2**n <= design.permutations)


def _prompts_exchanged(one: Array, other: Array, design: Design) -> Array:
    """Two-sided p-values of the difference of two samples' means: prompts exchanged between them."""
    rows, n = np.concatenate([one, other]), len(one)
    whole = math.comb(len(rows), n) <= design.permutations
    chosen = np.array(
        list(itertools.combinations(range(len(rows)), n)) if whole else list(_drawn(len(rows), n, design))
    )
    weights = np.full((len(chosen), len(rows)), 1 / len(other))
    np.put_along_axis(weights, chosen, -1 / n, axis=1)
    mine = np.concatenate([np.full(n, -1 / n), np.full(len(other), 1 / len(other))])
    return _p(np.abs(mine @ rows), np.abs(weights @ rows), (np.abs(mine) @ np.abs(rows)), whole)


def _drawn(count: int, size: int, design: Design) -> Iterator[Array]:
    generator = np.random.default_rng(design.seed)
    for _ in range(design.permutations):
        yield generator.permutation(count)[:size]


def _p(found: Array, arranged: Array, scale: Array, whole: bool) -> Array:
    """The share of arrangements [arrangement, column] that are as far from 0 as what was found; where they are a sample
    of all, what was found counts as one of them."""
    count = (arranged >= found - _ROUNDING * scale).sum(0)
    return count / len(arranged) if whole else (count + 1) / (len(arranged) + 1)


# ------------------------------------------------------------------------------------------- over all nodes


def pearson(one: Array, other: Array) -> float:
    """Pearson's correlation of two columns; NaN where one is constant, or they are shorter than three."""
    from scipy.stats import pearsonr

    found: Any = (math.nan,) if _has_none(one, other) else pearsonr(one, other)
    return float(found[0])


def spearman(one: Array, other: Array) -> float:
    """Spearman's, which is Pearson's of ranks; ties share theirs; NaN as `pearson`."""
    from scipy.stats import spearmanr

    found: Any = (math.nan,) if _has_none(one, other) else spearmanr(one, other)
    return float(found[0])


def _has_none(one: Array, other: Array) -> bool:
    return bool(len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0)


def overlap(one: Array, other: Array) -> float:
    """How many of two sets of columns are in both, as a share of those in either (Jaccard); NaN of two empty ones."""
    either = int((one | other).sum())
    return int((one & other).sum()) / either if either else math.nan


def weighted_overlap(one: Array, other: Array) -> float:
    """The same of signed weights: the sum of what both have over that of what either has, of each column the smaller
    and the larger size; columns of opposite signs have nothing in common. NaN where all are 0."""
    size, its = np.abs(one), np.abs(other)
    alike = np.sign(one) * np.sign(other)  # their product may be 0 where neither is
    same = np.where(alike > 0, np.minimum(size, its), 0.0)
    whole = np.where(alike >= 0, np.maximum(size, its), size + its).sum()
    return float(same.sum() / whole) if whole else math.nan
