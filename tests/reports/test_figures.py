"""Figures: what is drawn is what was measured, lines are told apart without colour, and tables of numbers as CSV."""

from __future__ import annotations

import csv
import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tracer.reports import figures
from tracer.reports.tables import csv_bytes
from tracer.settings import METHODS

SIZES = (1, 10, 100)


def curve(height: float) -> Any:
    estimate = height * np.array([0.2, 0.5, 0.9])
    return SimpleNamespace(estimate=estimate, low=estimate - 0.1, high=estimate + 0.1)


def three(faithful: Any, complete: Any, control: Any) -> Any:
    named = {"faithfulness": faithful, "completeness": complete, "control_faithfulness": control}
    return SimpleNamespace(sizes=SIZES, **named)


def test_every_method_has_a_line_of_its_own_without_colour() -> None:
    methods = [name for name in METHODS if name != "random"]
    looks = [*range(len(methods)), figures.CONTROL]
    axes = figures.new(4.0, 3.0).subplots()
    figures.draw_curves(axes, [figures.Line(str(look), SIZES, curve(1), look) for look in looks])
    drawn = [line for line in axes.get_lines() if line.get_label() in map(str, looks)]
    for kind in ("get_marker", "get_color"):
        assert len({getattr(line, kind)() for line in drawn}) == len(looks)
    assert len({str(line._unscaled_dash_pattern) for line in drawn}) == len(looks)


def test_lines_and_bands_are_the_numbers() -> None:
    axes = figures.new(4.0, 3.0).subplots()
    curves = [curve(height) for height in (1.0, 0.5, 0.1)]
    figures.draw_curves(axes, figures.three(three(*curves), ("a", "b", "c")), ylim=figures.VIEW, xlabel="nodes")
    assert (axes.get_xscale(), axes.get_ylim(), axes.get_xlabel()) == ("log", figures.VIEW, "nodes")
    for line, band, given in zip(axes.get_lines(), axes.collections, curves, strict=False):
        assert line.get_xydata() == pytest.approx(np.stack([SIZES, given.estimate], -1))
        corners = band.get_paths()[0].vertices
        for end in (given.low, given.high):
            assert all(np.isclose(corners, corner).all(-1).any() for corner in zip(SIZES, end, strict=True))


def test_a_prompt_in_a_title_is_text_and_no_formula() -> None:
    lines = figures.three(three(*[curve(1)] * 3), ("a", "b", "c"))
    assert figures.evaluation_png(lines, "from $5 to $6 in {").startswith(b"\x89PNG")


def test_rows_as_csv() -> None:
    rows = [{"a": 1, "b": 'x,"y"'}, {"a": None, "b": 0.1}]
    assert list(csv.reader(io.StringIO(csv_bytes(rows).decode()))) == [["a", "b"], ["1", 'x,"y"'], ["", "0.1"]]
    assert csv_bytes([], ["a", "b"]) == b"a,b\n"
