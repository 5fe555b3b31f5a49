"""The helpers that tell bits from numbers see what they should (support/truth.py)."""

from __future__ import annotations

import pyarrow as pa
import pytest
import torch

from truth import close, same_bits, same_tables, same_text, tolerance

TABLE = pa.table(
    {
        "layer": pa.array([0, 1, 1]),
        "attribution": pa.array([100.0, None, -2.0]),
        "bias_share": pa.array([1e-8, 2e-9, 0.0]),
        "token": ["a", "b", "c"],
    }
)


def test_a_tolerance_is_within_what_parity_is_held_to() -> None:
    assert tolerance() < 1e-5
    assert tolerance(torch.float64) < 1e-13


@pytest.mark.parametrize(("by", "found"), [(0.0, True), (5e-6, True), (2e-5, False), (float("nan"), False)])
def test_numbers_may_differ_by_roundings_of_the_largest(by: float, found: bool) -> None:
    values = torch.tensor([1.0, -4.0, 1e-3])
    assert close(values * torch.tensor([1.0, 1 + by, 1.0]), values) == found
    assert same_bits(values * (1 + by), values) == (by == 0)
    changed = TABLE.set_column(1, "attribution", pa.array([100.0 * (1 + by), None, -2.0]))
    assert same_tables(changed, TABLE) == found


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("layer", [0, 1, 2]),
        ("attribution", [100.0, 1e-9, -2.0]),
        ("bias_share", [1e-4, 2e-9, 0.0]),
        ("token", ["a", "b", "d"]),
    ],
)
def test_what_is_no_rounding_differs(name: str, values: list[object]) -> None:
    column = TABLE.column_names.index(name)
    assert not same_tables(TABLE.set_column(column, name, pa.array(values, TABLE.schema.field(name).type)), TABLE)
    assert not same_tables(TABLE.slice(1), TABLE)
    assert same_tables(TABLE.set_column(2, "bias_share", pa.array([-1e-8, 0.0, 0.0])), TABLE)


def test_printed_numbers_are_numbers() -> None:
    assert same_text("metric +6.90  unexplained +4.77e-07", "metric +6.91 unexplained +9.54e-07")
    assert not same_text("metric +6.90", "metric +7.10")
    assert not same_text("metric +6.90", "logit +6.90")
    assert not same_text("rank 1 2", "rank 1 2 3")
