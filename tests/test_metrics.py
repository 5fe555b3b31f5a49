"""Metrics against their formulas written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers import error
from tracer.metrics import Metric, entries

LINEAR = ("logit", "difference", "topk")


def batch_metric(kind: str, rows: list[list[tuple[int, int, float]]]) -> Metric:
    """A metric from (column, token, weight) terms per prompt."""
    flat = [(row, *term) for row, terms in enumerate(rows) for term in terms]
    row, column, token, weight = (torch.tensor(part) for part in zip(*flat, strict=True))
    return Metric(kind, row, column, token, weight.float(), len(rows))


@st.composite
def metrics(draw: st.DrawFn, kinds: tuple[str, ...]) -> tuple[Metric, Tensor]:
    """Any metric of a few prompts, and logits for it."""
    n_prompts, kept, vocab = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(2, 9))
    weights = st.sampled_from([1.0, -1.0, 0.5, -0.25])
    term = st.tuples(st.integers(-kept, -1), st.integers(0, vocab - 1), weights)
    rows = [draw(st.lists(term, min_size=1, max_size=5)) for _ in range(n_prompts)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    logits = 3 * torch.randn(n_prompts, kept, vocab, generator=generator)
    return batch_metric(draw(st.sampled_from(kinds)), rows), logits


def by_hand(metric: Metric, logits: Tensor) -> Tensor:
    """The definition, one entry at a time, in double precision."""
    total = torch.zeros(metric.n_prompts, dtype=torch.float64)
    for row, column, token, weight in zip(metric.row, metric.column, metric.token, metric.weight, strict=True):
        at = logits[row, column].double()
        value = at[token]
        if metric.kind == "logprob":
            value = value - at.exp().sum().log()
        if metric.kind == "centred":
            value = value - at.sum() / len(at)
        total[row] += weight * value
    return total


@given(metrics((*LINEAR, "logprob", "centred")))
def test_read_is_the_weighted_sum_of_its_entries(case: tuple[Metric, Tensor]) -> None:
    metric, logits = case
    got = metric.read(logits)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), by_hand(metric, logits), atol=1e-5)


@given(metrics((*LINEAR, "logprob", "centred")))
def test_the_gradient_is_that_of_the_formula(case: tuple[Metric, Tensor]) -> None:
    metric, logits = case
    leaf = logits.clone().requires_grad_()
    (got,) = torch.autograd.grad(metric.read(leaf).sum(), leaf)
    wanted = torch.zeros_like(logits)
    for row, column, token, weight in zip(metric.row, metric.column, metric.token, metric.weight, strict=True):
        wanted[row, column, token] += weight
        if metric.kind == "logprob":
            wanted[row, column] -= weight * logits[row, column].softmax(-1)
        if metric.kind == "centred":
            wanted[row, column] -= weight / logits.shape[-1]
    assert torch.allclose(got, wanted, atol=1e-5)


@given(metrics((*LINEAR, "logprob", "centred")))
def test_more_columns_in_front_change_nothing(case: tuple[Metric, Tensor]) -> None:
    metric, logits = case
    wide = torch.cat([torch.full((logits.shape[0], 3, logits.shape[2]), float("nan")), logits], dim=1)
    assert torch.equal(metric.read(wide), metric.read(logits))
    assert 1 <= metric.kept <= logits.shape[1]
    assert torch.equal(metric.read(logits[:, -metric.kept :]), metric.read(logits))


@given(metrics((*LINEAR, "logprob", "centred")), st.integers(1, 4))
def test_repeat_is_the_prompts_own_metric_many_times(case: tuple[Metric, Tensor], times: int) -> None:
    metric, logits = case
    for prompt in range(metric.n_prompts):
        many = metric.repeat(prompt, times)
        got = many.read(logits[prompt].expand(times, -1, -1))
        assert got.shape == (times,)
        assert torch.allclose(got, metric.read(logits)[prompt].expand(times), atol=1e-6)


@given(metrics(("logit", "difference", "centred")), st.floats(-3, 3))
def test_a_difference_and_a_centred_logit_ignore_a_shift_of_all_logits(
    case: tuple[Metric, Tensor], shift: float
) -> None:
    metric, logits = case
    change = metric.read(logits + shift) - metric.read(logits)
    weights = torch.zeros(metric.n_prompts).index_add(0, metric.row, metric.weight)
    expected = torch.zeros_like(change) if metric.kind == "centred" else weights * shift
    assert torch.allclose(change, expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_read_in_float32(dtype: torch.dtype) -> None:
    logits = (8 * torch.randn(2, 1, 50, generator=torch.Generator().manual_seed(0))).to(dtype)
    metric = batch_metric("logprob", [[(-1, 3, 1.0)], [(-1, 4, 1.0)]])
    got = metric.read(logits)
    assert got.dtype == torch.float32
    assert error(got, by_hand(metric, logits).float()) < 1e-6


def test_prompts_do_not_mix() -> None:
    metric = batch_metric("logit", [[(-1, 0, 1.0), (-2, 1, 1.0)], [(-1, 2, 1.0)]])
    logits = torch.arange(12.0).view(2, 2, 3)
    assert metric.read(logits).tolist() == [3.0 + 1.0, 11.0]


@pytest.mark.parametrize(
    ("kind", "foils", "wanted"),
    [
        ("logit", (), [(4, 7, 0.25), (4, 8, 0.25), (2, 7, 0.25), (2, 8, 0.25)]),
        ("logprob", (), [(4, 7, 0.25), (4, 8, 0.25), (2, 7, 0.25), (2, 8, 0.25)]),
        ("topk", (), [(4, 7, 0.5), (4, 8, 0.5), (2, 7, 0.5), (2, 8, 0.5)]),
        (
            "difference",
            (9,),
            [(4, 7, 0.25), (4, 8, 0.25), (4, 9, -0.5), (2, 7, 0.25), (2, 8, 0.25), (2, 9, -0.5)],
        ),
    ],
)
def test_entries_average_tokens_and_positions_and_sum_the_top(
    kind: str, foils: tuple[int, ...], wanted: list[tuple[int, int, float]]
) -> None:
    assert sorted(entries((4, 2), (7, 8), foils, kind)) == sorted(wanted)
