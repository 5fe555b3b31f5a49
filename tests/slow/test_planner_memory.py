"""What the planner predicts against what processes really take: each case traces one batch in a process of its own."""

from __future__ import annotations

import sys

import pytest

import scripts

pytestmark = [
    pytest.mark.long,
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the kernel's high-water mark"),
]

TOLERANCE = 0.25
BENCHMARK = scripts.benchmark("planner")


@pytest.mark.parametrize("case", BENCHMARK.QUICK, ids=lambda case: " ".join(case.label().split()))
def test_the_peak_is_predicted_within_a_quarter(case: object) -> None:
    found = BENCHMARK.measure(case)
    assert abs(found.error) <= TOLERANCE
    assert abs(found.growth_error) <= TOLERANCE
