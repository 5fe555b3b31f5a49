"""Figures: what is drawn is what was measured, lines are told apart without colour, and tables of numbers as CSV."""

from __future__ import annotations

import csv
import io
import re
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


def test_more_lines_than_there_are_looks_differ_in_marker_and_dashes() -> None:
    axes = figures.new(4.0, 3.0).subplots()
    figures.draw_curves(
        axes, [figures.Line(str(look), SIZES, curve(1), look) for look in (*range(64), figures.CONTROL)]
    )
    drawn = axes.get_lines()[:65]
    assert len({(line.get_marker(), str(line._unscaled_dash_pattern)) for line in drawn}) == 65


def test_panels_share_a_legend_in_which_the_strongest_stands_first() -> None:
    weak, strong = (
        figures.Line(name, SIZES, curve(height), look) for look, (name, height) in enumerate([("a", 0.2), ("b", 1)])
    )
    panel = figures.Panel("one", [weak, strong], ((10, 0.5),))
    figure = figures.grid({"faithfulness": [panel, panel], "completeness": [panel]}, figures.PAGE)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["b", "a"]
    assert [axes.get_ylabel() for axes in figure.axes] == ["faithfulness", "", "completeness", ""]
    assert [axes.get_visible() for axes in figure.axes] == [True, True, True, False]
    assert [text.get_text() for text in figure.axes[0].texts] == ["10"]
    assert [text.get_text() for text in figure.axes[2].get_xticklabels()] == ["1", "10", "100"]
    svg = figures.svg(figure, "two", "x & y")
    assert 'aria-label="x &amp; y"' in svg
    assert "#1122" not in svg
    assert {"var(--blue)", "var(--orange)"} <= set(re.findall(r"var\(--[a-z]+\)", svg))


def test_highest_counts_up_to_1_and_over_all_panels() -> None:
    lines = [figures.Line("high", SIZES, curve(5), 0), figures.Line("low", SIZES, curve(0.1), 1)]
    assert figures.by_strength([*lines, figures.Line("low", SIZES, curve(0.9), 1)]) == ["high", "low"]
    assert figures.by_strength([figures.Line("mid", SIZES, curve(0.95), 2), *lines]) == ["high", "mid", "low"]


def test_a_prompt_in_a_title_is_text_and_no_formula() -> None:
    lines = figures.three(three(*[curve(1)] * 3), ("a", "b", "c"))
    assert figures.evaluation_png(lines, "from $5 to $6 in {").startswith(b"\x89PNG")


def test_rows_as_csv() -> None:
    rows = [{"a": 1, "b": 'x,"y"'}, {"a": None, "b": 0.1}]
    assert list(csv.reader(io.StringIO(csv_bytes(rows).decode()))) == [["a", "b"], ["1", 'x,"y"'], ["", "0.1"]]
    assert csv_bytes([], ["a", "b"]) == b"a,b\n"
