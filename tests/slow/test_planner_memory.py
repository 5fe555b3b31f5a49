"""What the planner predicts against what processes really take: each case traces one batch in a process of its own."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = [
    pytest.mark.long,
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the kernel's high-water mark"),
]

TOLERANCE = 0.25


def _benchmark() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "planner.py"
    spec = importlib.util.spec_from_file_location("planner_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


BENCHMARK = _benchmark()


@pytest.mark.parametrize("case", BENCHMARK.QUICK, ids=lambda case: " ".join(case.label().split()))
def test_the_peak_is_predicted_within_a_quarter(case: object) -> None:
    found = BENCHMARK.measure(case)
    assert abs(found.error) <= TOLERANCE
    assert abs(found.growth_error) <= TOLERANCE
