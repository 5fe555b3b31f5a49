"""Statistics by hand-computed values, by laws, and by a simulation whose truth is known."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers import refused
from tracer.errors import JobError
from tracer.evaluation import statistics

FINITE = st.floats(-100, 100, allow_nan=False, width=32)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


@st.composite
def conditions(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """(circuit [prompt, size], empty, whole) with F(model) - F(empty) not 0, in layouts of every kind.

    Float32, whose float64 sums are exact, and float64, where the order of a sum shows in the last bit.
    """
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    n_prompts, n_sizes = draw(st.integers(1, 40)), draw(st.integers(1, 19))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    circuit = torch.randn(n_sizes, n_prompts, generator=generator, dtype=dtype).T
    if draw(st.booleans()):
        circuit = circuit.contiguous()
    empty = torch.randn(n_prompts, generator=generator, dtype=dtype)
    return circuit, empty, empty + 1 + torch.rand(n_prompts, generator=generator, dtype=dtype)


def of_table(rows: Tensor) -> statistics.Ratio:
    """Rows [empty, whole, circuit...]."""
    return statistics.restored(rows[..., 2:], rows[..., 0], rows[..., 1])


# ------------------------------------------------------------------------------------- ratios of means


def test_faithfulness_is_a_ratio_of_means() -> None:
    circuit = torch.tensor([[1.0, 3.0], [2.0, 7.0]])
    # F(empty) = 1, F(model) = 6, F(circuit) = 1.5 and 5: not the mean of the prompts' own ratios.
    got = statistics.faithfulness(circuit, tensor(0.0, 2.0), tensor(4.0, 8.0))
    assert got.tolist() == pytest.approx([0.1, 0.8])
    assert statistics.completeness(circuit, tensor(0.0, 2.0), tensor(4.0, 8.0)).tolist() == got.tolist()


def test_one_circuit_needs_no_size_axis() -> None:
    got = statistics.faithfulness(tensor(2.0, 4.0), tensor(0.0, 0.0), tensor(4.0, 4.0))
    assert got.shape == ()
    assert float(got) == 0.75


@given(conditions(), st.data())
def test_all_is_one_and_nothing_is_zero_exactly(found: tuple[Tensor, Tensor, Tensor], data: st.DataObject) -> None:
    circuit, empty, whole = found
    size = data.draw(st.integers(0, circuit.shape[1] - 1))
    for ends, wanted in ((whole, 1.0), (empty, 0.0)):
        curve = circuit.clone(memory_format=torch.preserve_format)
        curve[:, size] = ends
        assert float(statistics.faithfulness(curve, empty, whole)[size]) == wanted
        assert float(statistics.completeness(curve, empty, whole)[size]) == wanted
        assert float(statistics.faithfulness(ends, empty, whole)) == wanted


@given(conditions())
def test_the_identities_hold_in_every_resample(found: tuple[Tensor, Tensor, Tensor]) -> None:
    _, empty, whole = found
    if len(empty) < 2:
        return
    table = torch.stack([empty, whole, empty, whole], dim=-1)
    drawn = statistics.resample(table, of_table, n_resamples=50)
    assert (drawn.values == torch.tensor([0.0, 1.0])).all()


@given(conditions(), st.floats(0.1, 10), st.floats(-5, 5))
def test_faithfulness_ignores_unit_and_origin(found: tuple[Tensor, Tensor, Tensor], unit: float, origin: float) -> None:
    moved = (values.double() * unit + origin for values in found)
    assert torch.allclose(statistics.faithfulness(*moved), statistics.faithfulness(*found), atol=1e-9)


@pytest.mark.parametrize("shift", [0.0, 1e-9])
def test_nothing_to_share_is_refused(shift: float) -> None:
    with refused(JobError, "F(model) - F(empty)"):
        statistics.faithfulness(tensor(1.0, 2.0), tensor(3.0, 5.0).double(), tensor(5.0, 3.0).double() + shift)
    with refused(JobError, "F(model) - F(empty)"):
        statistics.faithfulness(tensor(0.0), tensor(0.0), tensor(0.0))


def test_a_small_metric_is_not_nothing() -> None:
    assert float(statistics.faithfulness(tensor(1e-20), tensor(0.0), tensor(2e-20))) == pytest.approx(0.5)


@pytest.mark.parametrize("where", range(3))
def test_a_metric_that_is_not_finite_is_refused(where: int) -> None:
    values = [tensor(1.0, 2.0), tensor(0.0, 0.0), tensor(2.0, 2.0)]
    values[where][1] = math.nan
    with refused(JobError, "prompt 1", "not finite"):
        statistics.faithfulness(*values)


def test_no_prompt_is_refused() -> None:
    with refused(JobError, "0 prompts"):
        statistics.faithfulness(torch.zeros(0, 3), torch.zeros(0), torch.zeros(0))


# ------------------------------------------------------------------------------------------- bootstrap


def test_the_interval_is_scipys() -> None:
    """Same method, other random numbers: the ends agree within the noise of 20,000 resamples."""
    rng = np.random.default_rng(0)
    values = rng.lognormal(size=30)
    got = statistics.bootstrap(torch.tensor(values), statistics.mean, n_resamples=20_000)
    want = scipy.stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1)
    ).confidence_interval
    assert float(got.estimate) == pytest.approx(values.mean())
    assert float(got.low) == pytest.approx(want.low, abs=0.02)
    assert float(got.high) == pytest.approx(want.high, abs=0.02)


def test_the_ends_are_the_percentiles_of_the_resamples() -> None:
    values = torch.randn(25, 3, generator=torch.Generator().manual_seed(1))
    drawn = statistics.resample(values, statistics.mean, n_resamples=500, seed=3)
    got = drawn.interval(0.9)
    assert torch.allclose(got.low, drawn.values.quantile(0.05, dim=0))
    assert torch.allclose(got.high, drawn.values.quantile(0.95, dim=0))
    assert torch.allclose(got.estimate, values.double().mean(0))


def test_it_is_seeded_and_chunking_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.rand(20, 4, generator=torch.Generator().manual_seed(2))
    one = statistics.resample(values, statistics.mean, seed=5).values
    assert torch.equal(one, statistics.resample(values, statistics.mean, seed=5).values)
    assert not torch.equal(one, statistics.resample(values, statistics.mean, seed=6).values)
    monkeypatch.setattr(statistics, "_CHUNK", 1000)
    assert torch.equal(one, statistics.resample(values, statistics.mean, seed=5).values)


def test_the_same_prompts_are_drawn_whatever_the_rows_hold() -> None:
    """So intervals of two methods on the same prompts can be compared, and columns stay paired."""
    values = torch.rand(20, generator=torch.Generator().manual_seed(2))
    both = statistics.resample(torch.stack([values, values + 1], dim=-1), statistics.mean).values
    assert torch.allclose(both[:, 1] - both[:, 0], torch.ones(2000, dtype=torch.double))
    assert torch.equal(both[:, 0], statistics.resample(values, statistics.mean).values)


@given(st.lists(FINITE, min_size=2, max_size=12), st.integers(0, 100))
def test_an_interval_holds_what_it_must(values: list[float], seed: int) -> None:
    got = statistics.bootstrap(tensor(*values), statistics.mean, n_resamples=200, seed=seed)
    assert min(values) - 1e-9 <= float(got.low) <= float(got.high) <= max(values) + 1e-9


def test_booleans_and_constants_are_values_too() -> None:
    got = statistics.bootstrap(torch.ones(5, dtype=torch.bool), statistics.mean)
    assert (float(got.low), float(got.high), float(got.estimate)) == (1, 1, 1)


@pytest.mark.parametrize("n", [0, 1])
def test_no_interval_from_one_prompt(n: int) -> None:
    with refused(JobError, f"{n} prompts", "at least two"):
        statistics.bootstrap(torch.ones(n, 3), statistics.mean)


@pytest.mark.parametrize(
    ("how", "part"),
    [({"confidence": 0.0}, "confidence"), ({"confidence": 1.0}, "confidence"), ({"n_resamples": 30}, "n_resamples=30")],
)
def test_settings_out_of_range_are_refused(how: dict[str, float], part: str) -> None:
    with refused(JobError, part):
        statistics.bootstrap(torch.arange(5.0), statistics.mean, **how)  # type: ignore[arg-type]


def test_a_value_that_is_not_finite_is_named() -> None:
    with refused(JobError, "prompt 2"):
        statistics.bootstrap(torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, math.inf]]), statistics.mean)


def test_a_denominator_of_zero_in_the_sample_is_refused() -> None:
    table = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    with refused(JobError, "F(model) - F(empty)"):
        statistics.bootstrap(table, of_table)


def test_a_denominator_that_may_be_zero_is_refused() -> None:
    """Mean 0.1 with standard error 0.3: a third of the resamples have the other sign."""
    whole = torch.randn(10, generator=torch.Generator().manual_seed(0))
    whole = whole - whole.mean() + 0.1
    table = torch.stack([torch.zeros(10), whole, whole], dim=-1)
    with refused(JobError, "resamples", "F(model) - F(empty)"):
        statistics.bootstrap(table, of_table)


def test_a_few_degenerate_resamples_widen_the_interval() -> None:
    """They lie beyond both ends: never inf, and never quietly dropped."""
    values = torch.arange(1000, dtype=torch.double)[:, None].repeat(1, 2)
    values[:20, 1] = math.nan
    got = statistics.Resamples(torch.zeros(2, dtype=torch.double), values).interval()
    # Column 1 has 980 values 20...999; its ends cut 5 of them, not 24.5.
    assert float(got.low[0]) == pytest.approx(0.025 * 999)
    assert float(got.low[1]) == pytest.approx(20 + 979 * 0.005 / 0.98)
    assert float(got.high[1]) == pytest.approx(20 + 979 * 0.975 / 0.98)
    assert float(got.high[1]) > float(got.high[0])
    assert torch.isfinite(got.low).all()


def test_the_other_sign_is_degenerate_and_the_own_sign_is_not() -> None:
    whole = statistics.Ratio(tensor(1.0, 1.0), tensor(-2.0), tensor(2.0))
    found = statistics.Ratio(torch.ones(4, 2), torch.tensor([[-2.0], [2.0], [-1e-9], [-1e-5]]), torch.ones(4, 1))
    got = statistics._divided(found, whole)
    assert got.isnan().any(1).tolist() == [False, True, True, False]
    assert got[0].tolist() == [-0.5, -0.5]


def test_resampled_curves_have_areas_with_intervals() -> None:
    table = torch.rand(12, 5, generator=torch.Generator().manual_seed(4)) + torch.tensor([0.0, 4.0, 1.0, 2.0, 3.0])
    curves = statistics.resample(table, of_table)
    area = curves.map(functools.partial(statistics.cpr, (0.1, 0.5, 1.0)))
    assert float(area.estimate) == pytest.approx(float(statistics.cpr((0.1, 0.5, 1.0), curves.estimate)))
    got = area.interval()
    assert float(got.low) < float(got.estimate) < float(got.high)


@pytest.mark.parametrize(("n_prompts", "skewed"), [(40, False), (40, True)])
def test_intervals_cover_the_truth(n_prompts: int, skewed: bool) -> None:
    """500 trials with a known ratio of means: a 95 % interval covers it in 90 to 98 % of them."""
    rng, truth, covered = np.random.default_rng(11), 0.8, 0
    for trial in range(500):
        spread = rng.lognormal(0, 0.8, n_prompts) - math.exp(0.32) if skewed else rng.normal(size=n_prompts)
        empty = 0.5 + 0.5 * rng.normal(size=n_prompts)
        whole = 5 + 2 * spread + rng.normal(size=n_prompts)
        circuit = empty + truth * (whole - empty) + rng.normal(size=n_prompts)
        table = torch.tensor(np.stack([empty, whole, circuit], axis=-1))
        got = statistics.bootstrap(table, of_table, n_resamples=1000, seed=trial)
        covered += float(got.low) <= truth <= float(got.high)
    assert 0.90 <= covered / 500 <= 0.98


# ------------------------------------------------------------------------------------- areas and sizes


def test_areas_by_hand() -> None:
    sizes = (0.1, 0.5, 1.0)
    curve = tensor(0.0, 0.5, 1.5)
    assert float(statistics.cpr(sizes, curve)) == pytest.approx(0.4 * 0.25 + 0.5 * 1.0)
    assert float(statistics.cmd(sizes, curve)) == pytest.approx(0.4 * 0.75 + 0.5 * 0.5)


def test_a_perfect_circuit_has_the_range_of_sizes() -> None:
    assert float(statistics.cpr(statistics.MIB_SIZES, torch.ones(10))) == pytest.approx(0.999)
    assert float(statistics.cmd(statistics.MIB_SIZES, torch.ones(10))) == 0
    assert statistics.MIB_SIZES[0] == 0.001
    assert statistics.MIB_SIZES[-1] == 1


def mib(faithfulnesses: list[float]) -> tuple[float, float]:
    """The two areas as a loop over neighbours, the definition."""
    under = distance = 0.0
    for i in range(len(faithfulnesses) - 1):
        width = statistics.MIB_SIZES[i + 1] - statistics.MIB_SIZES[i]
        under += width * (faithfulnesses[i] + faithfulnesses[i + 1]) / 2
        distance += width * (abs(1 - faithfulnesses[i]) + abs(1 - faithfulnesses[i + 1])) / 2
    return under, distance


@given(st.lists(FINITE, min_size=10, max_size=10))
def test_areas_are_those_of_mib(curve: list[float]) -> None:
    under, distance = mib(curve)
    rows = torch.tensor([curve, [1.0] * 10])
    assert float(statistics.cpr(statistics.MIB_SIZES, rows)[0]) == pytest.approx(under, abs=1e-6)
    assert float(statistics.cmd(statistics.MIB_SIZES, rows)[0]) == pytest.approx(distance, abs=1e-6)


@given(st.lists(st.floats(0, 1, width=32), min_size=10, max_size=10))
def test_below_one_the_areas_add_up_to_the_range(curve: list[float]) -> None:
    total = statistics.cpr(statistics.MIB_SIZES, tensor(*curve)) + statistics.cmd(statistics.MIB_SIZES, tensor(*curve))
    assert float(total) == pytest.approx(0.999)


@pytest.mark.parametrize(
    ("sizes", "part"),
    [
        ((1.0,), "at least two"),
        ((0.5, 0.1), "increase"),
        ((0.5, 0.5), "increase"),
        ((1, 200), "shares"),
        ((-0.5, 1.0), "shares"),
    ],
)
def test_sizes_that_have_no_area_are_refused(sizes: tuple[float, ...], part: str) -> None:
    for area in (statistics.cpr, statistics.cmd):
        with refused(JobError, part):
            area(sizes, torch.ones(len(sizes)))


def test_another_number_of_values_is_refused() -> None:
    with refused(JobError, "2 sizes", "3 values"):
        statistics.cpr((0.1, 1.0), torch.ones(3))
    with refused(JobError, "2 sizes", "3 values"):
        statistics.first_size([1, 2], torch.ones(3), 0.5)


@pytest.mark.parametrize(("level", "wanted"), [(0.5, 10), (0.8, 20), (0.9, 20), (0.95, 100), (1.2, None)])
def test_the_first_size_that_reaches_a_level(level: float, wanted: int | None) -> None:
    curve = tensor(0.1, 0.5, 0.9, 0.7, 1.0)  # the dip at 50 does not count against 20
    assert statistics.first_size([5, 10, 20, 50, 100], curve.double(), level - 1e-6) == wanted


@given(st.lists(st.floats(-1, 2, width=32), min_size=1, max_size=8), st.floats(0, 1))
def test_first_size_is_where_the_envelope_crosses(curve: list[float], level: float) -> None:
    sizes = list(range(1, len(curve) + 1))
    envelope = torch.cummax(tensor(*curve), dim=0).values
    assert statistics.first_size(sizes, tensor(*curve), level) == statistics.first_size(sizes, envelope, level)


@pytest.mark.parametrize(
    ("curve", "wanted"),
    [
        ((0.2, 0.9, 1.27, 1.05, 1.0), 100),  # .9 is reached at 20, and passed
        ((0.2, 0.95, 0.85, 1.1, 1.0), 100),  # a dip
        ((0.9, 1.1, 1.0, 1.0, 1.0), 10),
        ((0.0, 0.0, 0.0, 0.0, 1.0), 200),
        ((1.0, 1.0, 1.0, 1.0, 1.11), None),
        ((1.0, 1.0, 1.0, 1.0, math.nan), None),
        ((0.3, math.nan, 1.0, 1.0, 1.0), 50),
    ],
)
def test_the_size_from_which_a_curve_stays_near_one(curve: tuple[float, ...], wanted: int | None) -> None:
    values = torch.tensor(curve, dtype=torch.double)
    assert statistics.settled_size([10, 20, 50, 100, 200], values) == wanted


@given(st.lists(st.floats(0.5, 1.5, width=32) | st.sampled_from([0.9, 1.0, 1.1, math.nan]), min_size=1, max_size=8))
def test_where_a_curve_stays_is_as_defined(curve: list[float]) -> None:
    """By brute force: the first size such that no value from there on is outside."""
    sizes = [3 * i + 1 for i in range(len(curve))]
    wanted = [size for i, size in enumerate(sizes) if all(0.9 <= value <= 1.1 for value in curve[i:])]
    assert statistics.settled_size(sizes, torch.tensor(curve, dtype=torch.double)) == (wanted[0] if wanted else None)


def curves(*rows: list[float]) -> statistics.Resamples:
    values = torch.tensor(rows, dtype=torch.double)
    return statistics.Resamples(values.nanmedian(0).values, values)


def test_size_for_has_an_interval_of_measured_sizes() -> None:
    rows = [[1.0, 1, 1]] * 10 + [[0.0, 1, 1]] * 80 + [[0.0, 0, 1]] * 10
    assert statistics.size_for([10, 50, 200], curves(*rows), 0.9) == statistics.Size(10, 200, 50)
    assert statistics.size_for([10, 50, 200], curves(*rows), 0.9, confidence=0.5) == statistics.Size(50, 50, 50)


def test_not_reached_is_none() -> None:
    never = [[0.0, 0.5]] * 100
    assert statistics.size_for([1, 2], curves(*never), 0.9) == statistics.Size(None, None, None)
    sometimes = [[0.0, 0.5]] * 10 + [[0.0, 1.0]] * 90
    assert statistics.size_for([1, 2], curves(*sometimes), 0.9) == statistics.Size(2, None, 2)


def test_a_degenerate_resample_lies_beyond_both_sizes() -> None:
    rows = [[0.0, 1, 1]] * 90 + [[math.nan] * 3] * 10
    assert statistics.size_for([10, 50, 200], curves(*rows), 0.9) == statistics.Size(10, None, 50)


def test_where_a_curve_stays_has_an_interval_over_resamples() -> None:
    rows = [[1.0, 1, 1]] * 10 + [[1.3, 1, 1]] * 80 + [[1.3, 1.2, 1]] * 10
    assert statistics.settles([10, 50, 200], curves(*rows)) == statistics.Size(10, 200, 50)
    lost = [[1.3, 1, 1]] * 90 + [[1.3, 1, 0.7]] * 10
    assert statistics.settles([10, 50, 200], curves(*lost)) == statistics.Size(50, None, 50)
    degenerate = [[1.3, 1, 1]] * 90 + [[math.nan] * 3] * 10
    assert statistics.settles([10, 50, 200], curves(*degenerate)) == statistics.Size(10, None, 50)
    alone = statistics.Resamples(tensor(1.3, 1, 1).double(), torch.zeros(0, 3, dtype=torch.double))
    assert statistics.settles([10, 50, 200], alone) == statistics.Size(None, None, 50)


def test_where_a_curve_stays_is_counted_over_resampled_prompts() -> None:
    """Against every resample counted one by one."""
    table = torch.rand(12, 7, generator=torch.Generator().manual_seed(1)) * 2 + torch.linspace(0, 10, 7)
    found = statistics.resample(table[:, [0, 6, 1, 2, 3, 4, 5, 6]], of_table)
    sizes = [1, 2, 5, 10, 20, 50]
    each = [statistics.settled_size(sizes, curve) for curve in found.values]
    order = sorted(math.inf if size is None else size for size in each)
    size = statistics.settles(sizes, found)
    assert size.estimate == statistics.settled_size(sizes, found.estimate)
    assert size.low == order[math.floor(0.025 * (len(order) - 1))]
    assert (size.high or math.inf) == order[math.ceil(0.975 * (len(order) - 1))]


def test_more_is_needed_for_a_higher_level() -> None:
    table = torch.rand(15, 8, generator=torch.Generator().manual_seed(0)) * 4 + torch.linspace(0, 12, 8)
    table = torch.stack([table[:, 0], table[:, 7], *table[:, 1:].unbind(1)], dim=-1)
    found = statistics.resample(table, of_table)
    sizes = [1, 2, 5, 10, 20, 50, 100]
    reached = [statistics.size_for(sizes, found, level) for level in (0.3, 0.5, 0.8, 0.95)]
    for one in reached:
        assert one.low is not None
        assert one.estimate is not None
        assert one.low <= one.estimate
        assert one.high is None or one.estimate <= one.high
    estimates = [one.estimate or 0 for one in reached]
    assert estimates == sorted(estimates)


# ------------------------------------------------------------------------- how good was the estimate


def test_agreement_is_scipys() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(60, generator=generator)
    estimate = (truth**3 + torch.randn(60, generator=generator)).round(decimals=1)  # with ties
    got = statistics.agreement(estimate, truth)
    assert got.n == 60
    assert float(got.pearson.estimate) == pytest.approx(scipy.stats.pearsonr(estimate, truth)[0])
    assert float(got.spearman.estimate) == pytest.approx(scipy.stats.spearmanr(estimate, truth)[0])
    for one in (got.pearson, got.spearman):
        assert -1 <= float(one.low) < float(one.estimate) < float(one.high) <= 1
    again = statistics.agreement(estimate, truth)
    assert float(again.spearman.low) == float(got.spearman.low)
    assert float(statistics.agreement(estimate, truth, seed=1).spearman.low) != float(got.spearman.low)


@given(st.lists(FINITE, min_size=3, max_size=20, unique=True), st.floats(0.5, 3), st.floats(-9, 9))
def test_a_straight_line_agrees_fully(values: list[float], slope: float, origin: float) -> None:
    truth = torch.tensor(values, dtype=torch.double)
    estimate = truth * slope + origin
    if len(estimate.unique()) < len(values):
        return
    for sign in (1, -1):
        got = statistics.agreement(estimate * sign, truth, n_resamples=100)
        assert float(got.pearson.estimate) == pytest.approx(sign, abs=1e-6)
        assert float(got.spearman.estimate) == pytest.approx(sign)


def test_scale_does_not_matter_even_where_squares_underflow() -> None:
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randn(20, generator=generator).double(), torch.randn(20, generator=generator).double()
    small = statistics.agreement(one * 1e-200, two * 1e-180)
    assert float(small.pearson.estimate) == pytest.approx(float(statistics.agreement(one, two).pearson.estimate))


def test_one_node_that_makes_the_whole_correlation_is_an_interval_of_everything() -> None:
    """Without that node, which a third of the resamples miss, one side is constant."""
    got = statistics.agreement(torch.arange(10.0), torch.tensor([0.0] * 9 + [1.0]))
    assert float(got.pearson.estimate) > 0.4
    assert (float(got.pearson.low), float(got.pearson.high)) == (-1, 1)


@pytest.mark.parametrize("side", ["estimate", "truth"])
def test_a_constant_side_is_refused(side: str) -> None:
    values: dict[str, Any] = {"estimate": torch.arange(5.0), "truth": torch.arange(5.0)} | {side: torch.full((5,), 0.1)}
    with refused(JobError, side, "same at every node"):
        statistics.agreement(**values)


def test_too_few_nodes_and_values_that_are_not_finite_are_refused() -> None:
    with refused(JobError, "2 nodes"):
        statistics.agreement(torch.arange(2.0), torch.arange(2.0))
    with refused(JobError, "not finite"):
        statistics.agreement(tensor(1.0, 2.0, math.nan), torch.arange(3.0))


@given(st.integers(0, 60), st.integers(1, 9), st.integers(0, 9))
def test_strata_are_disjoint_and_as_large_as_can_be(n_nodes: int, n_each: int, seed: int) -> None:
    strength = torch.randn(n_nodes, generator=torch.Generator().manual_seed(seed))
    got = statistics.stratified(strength, n_each, seed)
    flat = torch.cat([got.strong, got.middle, got.random]).tolist()
    assert len(set(flat)) == len(flat)
    assert set(flat) <= set(range(n_nodes))
    assert len(flat) == n_nodes or len(got.strong) == len(got.middle) == n_each
    order = strength.abs().argsort(descending=True)
    assert got.strong.tolist() == order[:n_each].tolist()
    assert set(got.middle.tolist()) <= set(order[n_each : 10 * n_each].tolist())
    if n_nodes <= n_each:
        assert sorted(flat) == list(range(n_nodes))


def test_strata_are_seeded_and_index_the_flat_tensor() -> None:
    strength = torch.zeros(3, 4, 5)
    strength[1, 2, 3], strength[2, 0, 0] = -9.0, 4.0
    got = statistics.stratified(strength, 2, seed=1)
    assert [tuple(map(int, torch.unravel_index(i, strength.shape))) for i in got.strong] == [(1, 2, 3), (2, 0, 0)]
    assert len(got.random) == 2  # zeros are drawn too
    again, other = statistics.stratified(strength, 2, seed=1), statistics.stratified(strength, 2, seed=2)
    assert torch.equal(got.random, again.random)
    assert not torch.equal(torch.cat([got.middle, got.random]), torch.cat([other.middle, other.random]))


def test_strata_of_nothing_are_refused() -> None:
    with refused(JobError, "n_each=0"):
        statistics.stratified(torch.ones(3), 0)
    with refused(JobError, "not finite"):
        statistics.stratified(tensor(1.0, math.nan), 1)
