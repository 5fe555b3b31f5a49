"""How much two sides differ: against plain NumPy, SciPy and counting by hand, and on data whose truth is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from helpers import refused
from tracer.comparison.differences import (
    RATE,
    RESAMPLES,
    Design,
    differences,
    interval,
    overlap,
    pearson,
    spearman,
    weighted_overlap,
)
from tracer.errors import JobError
from tracer.evaluation import statistics

DESIGN = Design(seed=3)


def drawn(n: int, columns: int, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, size=(n, columns))


# ------------------------------------------------------------------------------------------------ intervals


def test_interval_of_pairs_is_the_bootstrap_of_plain_numpy() -> None:
    one, other = drawn(9, 4), drawn(9, 4, 1)
    rows = other - one
    index = np.random.default_rng(5).integers(9, size=(RESAMPLES, 9))
    means = np.array([rows[draw].mean(0) for draw in index])
    found = interval(one, other, True, 5)
    np.testing.assert_allclose(found.estimate, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.low, np.quantile(means, 0.025, axis=0), atol=1e-12)
    np.testing.assert_allclose(found.high, np.quantile(means, 0.975, axis=0), atol=1e-12)


def test_interval_of_pairs_is_that_of_the_evaluations_bootstrap() -> None:
    rows = torch.from_numpy(drawn(12, 3))
    wanted = statistics.bootstrap(rows, statistics.mean, seed=2)
    made = statistics.resampled_means(rows, seed=2).interval()
    for end in ("estimate", "low", "high"):
        torch.testing.assert_close(getattr(made, end), getattr(wanted, end), rtol=0, atol=1e-12)


def test_interval_of_two_samples_is_the_bootstrap_of_each() -> None:
    one, other = drawn(7, 2), drawn(11, 2, 1)
    means = []
    for seed, rows in ((8, one), (9, other)):
        index = np.random.default_rng(seed).integers(len(rows), size=(RESAMPLES, len(rows)))
        means.append(np.array([rows[draw].mean(0) for draw in index]))
    found = interval(one, other, False, 4)
    np.testing.assert_allclose(found.low, np.quantile(means[1] - means[0], 0.025, axis=0), atol=1e-12)
    np.testing.assert_allclose(found.estimate, other.mean(0) - one.mean(0), atol=1e-12)


@pytest.mark.parametrize("paired", [True, False])
def test_intervals_hold_the_truth_as_often_as_they_say(paired: bool) -> None:
    columns, truth = 3000, 0.4
    one, other = drawn(40, columns, 1), drawn(40, columns, 2, truth)
    found = interval(one, other, paired, 0)
    held = ((found.low <= truth) & (truth <= found.high)).double().mean()
    assert 0.92 < float(held) < 0.965  # a percentile bootstrap of 40 is a little narrow


def test_one_prompt_has_no_interval_and_no_test() -> None:
    found = differences(drawn(1, 3), drawn(1, 3, 1), True, DESIGN)
    assert np.isfinite(found.difference).all()
    for name in ("low", "high", "p", "q"):
        assert np.isnan(getattr(found, name)).all()


# ------------------------------------------------------------------------------------------------ tests


def test_p_of_few_pairs_counts_every_exchange() -> None:
    one, other = drawn(5, 6), drawn(5, 6, 1, 0.7)
    rows = other - one
    counted = [
        np.mean(
            [
                abs(np.dot(signs, rows[:, column])) >= abs(rows[:, column].sum()) - 1e-9
                for signs in itertools.product((1, -1), repeat=5)
            ]
        )
        for column in range(6)
    ]
    np.testing.assert_allclose(differences(one, other, True, DESIGN).p, counted)


@pytest.mark.parametrize("paired", [True, False])
def test_p_is_scipys_permutation_test(paired: bool) -> None:
    one, other = drawn(6, 3), drawn(6 if paired else 5, 3, 1, 1.0)

    def statistic(x: np.ndarray, y: np.ndarray, axis: int = 0) -> np.ndarray:
        return np.abs(np.mean(y, axis=axis) - np.mean(x, axis=axis))

    kind = "samples" if paired else "independent"
    wanted = stats.permutation_test(
        (one, other), statistic, permutation_type=kind, alternative="greater", n_resamples=10**9
    )
    np.testing.assert_allclose(differences(one, other, paired, DESIGN).p, wanted.pvalue, atol=1e-12)


@pytest.mark.parametrize("paired", [True, False])
def test_random_arrangements_agree_with_all_of_them(paired: bool) -> None:
    one, other = drawn(12, 30), drawn(12 if paired else 7, 30, 1, 0.5)
    few, every = (differences(one, other, paired, Design(count, 1)).p for count in (3000, 10**5))
    assert not np.array_equal(few, every)
    np.testing.assert_allclose(few, every, atol=0.03)


def test_q_is_scipys() -> None:
    found = differences(drawn(20, 50), drawn(20, 50, 1, 0.4), True, DESIGN)
    np.testing.assert_allclose(found.q, stats.false_discovery_control(found.p))


@pytest.mark.parametrize("paired", [True, False])
def test_what_is_planted_is_found_and_nothing_else(paired: bool) -> None:
    one, other = drawn(30, 400), drawn(30, 400, 1)
    other[:, :6] += 3.0
    found = differences(one, other, paired, DESIGN)
    assert set(np.flatnonzero(found.q <= RATE)) == set(range(6))
    assert np.all(found.low[:6] > 1.5)


@pytest.mark.parametrize("paired", [True, False])
def test_equal_sides_differ_by_nothing(paired: bool) -> None:
    rows = drawn(15, 40)
    found = differences(rows, rows.copy(), paired, DESIGN)
    assert np.all(found.difference == 0)
    assert np.all(found.q == 1)
    if paired:
        assert np.all(found.low == 0)
        assert np.all(found.high == 0)


@pytest.mark.parametrize("paired", [True, False])
def test_exchanged_sides_make_no_discoveries(paired: bool) -> None:
    """Sides that are exchanged at random differ by chance alone: in no more than a twentieth of the runs, about, is
    anything found; rows are heavy-tailed, and columns depend on one another, as attributions are."""
    wrong = 0
    for seed in range(40):
        draw = np.random.default_rng(seed)
        common = draw.standard_t(3, size=(16, 4)) @ draw.normal(size=(4, 60))
        one, other = common + draw.standard_t(3, size=(16, 60)), common * 2 + 1
        swap = draw.integers(2, size=(16, 1)).astype(bool)
        one, other = np.where(swap, other, one), np.where(swap, one, other)
        found = differences(one, other, paired, Design(999, seed))
        wrong += bool((found.q <= RATE).any())
    assert wrong <= 5


def test_last_bits_do_not_make_two_arrangements_differ() -> None:
    rows = np.full((10, 1), 0.1) * np.array([[1, -1] * 5]).T
    assert differences(np.zeros((10, 1)), rows, True, DESIGN).p[0] == 1


@pytest.mark.parametrize(("permutations", "seed"), [(10, 0), (10_000, -1)])
def test_a_design_that_is_none_is_refused(permutations: int, seed: int) -> None:
    with refused(JobError):
        Design(permutations, seed).check()


# ------------------------------------------------------------------------------------------- over all nodes


def test_correlations_are_scipys() -> None:
    one, other = drawn(50, 1)[:, 0], drawn(50, 1, 1)[:, 0]
    other[:10] = other[0]
    assert pearson(one, other) == pytest.approx(stats.pearsonr(one, other)[0])
    assert spearman(one, other) == pytest.approx(stats.spearmanr(one, other)[0])
    assert math.isnan(pearson(one, np.ones(50)))


def test_overlaps_by_hand() -> None:
    one, other = np.array([True, True, False, False]), np.array([True, False, True, False])
    assert overlap(one, other) == pytest.approx(1 / 3)
    assert math.isnan(overlap(one & False, other & False))
    assert weighted_overlap(np.array([1.0, -2.0, 0.0, 3.0]), np.array([2.0, 1.0, 4.0, 3.0])) == pytest.approx(4 / 12)


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=20))
def test_weighted_overlap_is_one_of_equals_and_symmetric(pairs: list[tuple[float, float]]) -> None:
    one, other = np.array(pairs).T
    both, back = weighted_overlap(one, other), weighted_overlap(other, one)
    assert both == back or (math.isnan(both) and math.isnan(back))
    assert math.isnan(both) or 0 <= both <= 1
    if np.abs(one).sum() > 0:
        assert weighted_overlap(one, one) == 1
