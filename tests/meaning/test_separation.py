"""Areas, intervals and permutation tests against scikit-learn, enumeration and simulation; and what chance finds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.sparse import csc_array, random_array
from scipy.stats import binom, false_discovery_control, norm
from sklearn.metrics import roc_auc_score

from tracer.meaning import separation
from tracer.meaning.separation import Block, Design, Labels, halved, interval, lacking, permuted, separate, tail

SMALL = Design(candidates=20, permutations=499)


def columns(count: int) -> np.ndarray:
    return np.stack([np.zeros(count, int), np.arange(count), np.ones(count, int)], axis=1)


def doubled(values: np.ndarray) -> np.ndarray:
    """Twice the midranks less twice their mean, by comparing every value with every other."""
    below = (values[:, None, :] < values[:, :, None]).sum(2)
    above = (values[:, None, :] > values[:, :, None]).sum(2)
    return (below - above).astype(float)


@pytest.mark.parametrize("density", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("ties", [True, False])
def test_areas_equal_scikit_learns(density: float, ties: bool) -> None:
    rng = np.random.default_rng(3)
    values = random_array((80, 15), density=density, format="csc", rng=rng)
    values.data = rng.integers(-2, 3, values.nnz).astype(float) if ties else rng.normal(size=values.nnz)
    kinds = rng.integers(0, 4, 80)
    found = separation.auroc(values, kinds[:, None] == np.arange(4))
    dense = values.toarray()
    truth = [[roc_auc_score(kinds == kind, dense[:, i]) for kind in range(4)] for i in range(15)]
    np.testing.assert_allclose(found, truth, rtol=0, atol=1e-12)


def test_ranks_are_whole_numbers_and_of_a_column_sum_to_zero() -> None:
    values = random_array((30, 20), density=0.4, format="csc", rng=np.random.default_rng(0))
    values.data = values.data.round(1) - 0.5
    above, zero = separation.ranks(values)
    dense = above.toarray() + zero
    np.testing.assert_array_equal(dense, doubled(values.toarray().T).T)
    np.testing.assert_array_equal(dense.sum(0), 0)


def test_areas_without_rows_of_a_kind_are_not_numbers() -> None:
    found = separation.auroc(csc_array(np.eye(4)), np.array([[True, False]] * 4))
    assert np.isnan(found).all()


@pytest.mark.parametrize("sizes", [(3, 24), (5, 5), (20, 20), (20, 200)])
@pytest.mark.parametrize("area", [0.5, 0.9, 0.98])
def test_intervals_hold_the_true_area_as_often_as_they_say(sizes: tuple[int, int], area: float) -> None:
    values = np.random.default_rng(0).normal(size=(1000, sum(sizes)))
    values[:, : sizes[0]] += np.sqrt(2) * norm.ppf(area)
    low, high = interval(values, np.arange(sum(sizes)) < sizes[0], np.arange(sum(sizes)))
    assert ((low <= area) & (area <= high)).sum() >= binom.ppf(0.001, 1000, 0.95)
    assert ((low >= 0) & (high <= 1)).all()


def test_of_many_rows_an_interval_is_delongs() -> None:
    rng = np.random.default_rng(1)
    yes, no = rng.normal(0.5, 1, 300), rng.normal(0, 1, 300)
    placed = (yes[:, None] > no[None]).astype(float)
    error = np.sqrt(placed.mean(1).var(ddof=1) / 300 + placed.mean(0).var(ddof=1) / 300)
    low, high = interval(np.concatenate([yes, no])[None], np.arange(600) < 300, np.arange(600))
    np.testing.assert_allclose(high - low, 2 * 1.96 * error, rtol=0.03)


def test_copies_in_a_group_count_once() -> None:
    values = np.random.default_rng(2).normal(size=(50, 24))
    values[:, :12] += 1
    yes, units = np.arange(24) < 12, np.arange(24)
    once = interval(values, yes, units)
    thrice = interval(values.repeat(3, 1), yes.repeat(3), units.repeat(3))
    np.testing.assert_allclose(once, thrice, atol=1e-12)
    assert (interval(values.repeat(3, 1), yes.repeat(3), np.arange(72))[0] > once[0] - 1e-12).all()


def test_an_interval_of_a_perfect_separation_has_a_width() -> None:
    low, high = interval(np.arange(20.0)[None], np.arange(20) >= 10, np.arange(20))
    assert low[0] == pytest.approx(0.83, abs=0.03)
    assert high[0] == 1


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_p_value_is_that_of_all_permutations(sign: float) -> None:
    rng = np.random.default_rng(5)
    values = rng.integers(0, 3, (6, 9)).astype(float)
    codes = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0])
    ranks, n = doubled(values), 20_000
    (p,) = tail([ranks], [np.full(6, sign)], Labels(codes, (1,)), Design(permutations=n))
    sums = np.array([ranks[:, list(chosen)].sum(1) for chosen in itertools.combinations(range(9), 4)])
    exact = (sign * sums >= sign * ranks[:, :4].sum(1)).mean(0)
    np.testing.assert_allclose(p, exact, atol=4 * 0.5 / np.sqrt(n))


def test_groups_are_permuted_whole_or_within() -> None:
    rng = np.random.default_rng(0)
    groups = np.array([0, 0, 0, 1, 1, 2, 3, 3])
    whole = permuted(Labels(np.array([1, 1, 1, 0, 0, 1, 0, 0]), (1,), groups), 500, rng)
    firsts = whole[:, [0, 3, 5, 6]]
    assert (whole == firsts[:, groups]).all()
    assert set(map(tuple, firsts.tolist())) == {one for one in itertools.product((0, 1), repeat=4) if sum(one) == 2}
    within = permuted(Labels(np.array([1, 0, 0, 1, 0, 1, 0, 1]), (1,), groups), 500, rng)
    assert (np.add.reduceat(within, [0, 3, 5, 6], axis=1) == [1, 1, 1, 1]).all()
    assert within.mean(0) == pytest.approx([1 / 3] * 3 + [0.5] * 2 + [1] + [0.5] * 2, abs=0.1)


def test_halves_hold_half_of_every_kind_and_never_cut_a_group() -> None:
    codes = np.repeat([0, 1, 2], [40, 7, 4])
    here = halved(Labels(codes, ()), 3)
    assert [int(here[codes == kind].sum()) for kind in range(3)] in ([20, 4, 2], [20, 4, 2], [20, 3, 2])
    groups = np.arange(51) // 3
    kept = halved(Labels(codes, (), groups), 3)
    assert all(len(set(kept[groups == group].tolist())) == 1 for group in range(17))
    assert not np.array_equal(here, halved(Labels(codes, ()), 4))


def test_shuffled_labels_find_no_more_than_the_rate() -> None:
    """200 repetitions on noise: in each, any discovery is a false one."""
    rng = np.random.default_rng(0)
    codes = np.repeat([0, 1], [35, 15])
    wrong = covered = above = 0
    for seed in range(200):
        values = random_array((50, 80), density=0.4, format="csc", rng=rng)
        values.data -= 0.5
        labels = Labels(rng.permutation(codes), (1,))
        scores, count = separate([Block(columns(80), values)], labels, Design(8, 199, seed))
        assert count == 80
        wrong += bool((false_discovery_control(np.concatenate([one.p for one in scores])) <= 0.05).any())
        covered += scores[0].low[0] <= 0.5 <= scores[0].high[0]
        above += abs(scores[0].chosen_on[0] - 0.5) > 0.2
    assert wrong <= binom.ppf(0.999, 200, 0.05)
    assert covered >= binom.ppf(0.001, 200, 0.95)  # the best of all, where it was not chosen: nothing
    assert above >= 195  # and where it was: a finding


def test_true_columns_are_found_among_others_and_the_rate_holds() -> None:
    rng = np.random.default_rng(1)
    codes = np.repeat([0, 1], 40)
    shares, found = [], []
    for seed in range(80):
        values = rng.normal(size=(80, 60)) * (rng.random((80, 60)) < 0.5)
        values[40:, :8] += 1.5
        ((one,), _) = separate([Block(columns(60), csc_array(values))], Labels(codes, (1,)), Design(20, 199, seed))
        q = false_discovery_control(one.p)
        hits = one.keys[q <= 0.05, 1]
        shares.append((hits >= 8).mean() if len(hits) else 0.0)
        found.append((hits < 8).sum())
    assert np.mean(shares) <= 0.05 + 2 * np.std(shares) / np.sqrt(80)
    assert np.mean(found) > 7


def test_columns_in_parts_are_columns_at_once() -> None:
    rng = np.random.default_rng(4)
    values = csc_array(rng.integers(-1, 3, (40, 60)).astype(float))
    labels = Labels(rng.integers(0, 3, 40), (0, 2))
    whole, count = separate([Block(columns(60), values)], labels, SMALL)
    cuts = ((0, 7), (7, 8), (8, 60))
    parts, again = separate([Block(columns(60)[a:b], values[:, a:b]) for a, b in cuts], labels, SMALL)
    assert count == again == 60
    for one, other in zip(whole, parts, strict=True):
        for name, value in vars(one).items():
            np.testing.assert_array_equal(value, getattr(other, name), err_msg=name)


def test_scores_are_of_the_other_half_alone() -> None:
    rng = np.random.default_rng(6)
    values, codes = rng.normal(size=(50, 30)), np.arange(50) % 2
    ((one,), _) = separate([Block(columns(30), csc_array(values))], Labels(codes, (1,)), SMALL)
    here = halved(Labels(codes, (1,)), SMALL.seed)
    for i, (_, column, _) in enumerate(one.keys.tolist()):
        assert one.chosen_on[i] == pytest.approx(roc_auc_score(codes[here], values[here, column]))
        assert one.auroc[i] == pytest.approx(roc_auc_score(codes[~here], values[~here, column]))
    assert (np.diff(abs(one.chosen_on - 0.5)) <= 1e-12).all()


def test_a_column_that_is_always_the_same_is_no_candidate() -> None:
    ((one,), count) = separate([Block(columns(3), csc_array((12, 3)))], Labels(np.arange(12) % 2, (1,)), SMALL)
    assert count == 3
    assert len(one.p) == 0


def test_too_few_rows_or_groups_are_said_to_be() -> None:
    assert "3 prompts" in str(lacking(Labels(np.repeat([0, 1], [9, 3]), (1,)), 1, SMALL))
    assert lacking(Labels(np.repeat([0, 1], [9, 4]), (1,)), 1, SMALL) is None
    groups = np.repeat([0, 1, 2], [5, 4, 4])
    assert "groups" in str(lacking(Labels(np.repeat([0, 1], [9, 4]), (1,), groups), 1, SMALL))
