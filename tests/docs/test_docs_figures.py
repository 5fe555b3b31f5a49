"""The figures of the concept pages show what the demo model does now, and the text quotes what they show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

figures = pytest.importorskip("figures", reason="tools/docs is not there")

NUMBERS = json.loads((figures.IMAGES / "figures.json").read_text(encoding="utf-8"))
CONCEPTS = Path(figures.IMAGES).parent / "concepts"


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", list(figures.FIGURES))
def test_a_figure_is_what_the_demo_does(name: str) -> None:
    import tracer

    compute, _ = figures.FIGURES[name]
    assert figures.moved(NUMBERS[name], compute(tracer.load("demo"))) == []


def test_numbers_that_moved_are_named() -> None:
    assert figures.moved({"a": [1.0, 2.0]}, {"a": [1.0, 2.001]}) == []
    assert figures.moved({"a": [1.0, 2.0]}, {"a": [1.0, 2.1]}) == ["/a/1: 2.0 is now 2.1"]
    assert figures.moved({"a": 1}, {"b": 1}) != []


def said(page: str, *quoted: str) -> None:
    text = " ".join((CONCEPTS / f"{page}.md").read_text(encoding="utf-8").replace("−", "-").split())
    assert [one for one in quoted if one not in text] == []


def short(number: float) -> str:
    return f"{number:.2f}".replace("0.", ".", 1)


def test_the_text_quotes_the_figures() -> None:
    explained, holding, groups = NUMBERS["explained"], NUMBERS["holding"], NUMBERS["supernodes"]
    by_size = dict(zip(explained["sizes"], explained["kept all edges"], strict=True))
    said("edges", *(short(by_size[size]) for size in (5, 200, 1000)), short(explained["kept .01 share"][-1]))
    at = {size: place for place, size in enumerate(holding["sizes"])}
    own, other = holding["own prompt"], holding["other prompts"]
    for size in (20, 200):
        said("holding", f"{short(own['faithfulness'][at[size]])} and {short(other['faithfulness'][at[size]])}")
    said(
        "holding",
        f"{short(own['random'][at[200]])} and {short(other['random'][at[200]])}",
        f"on {holding['pairs']} prompts",
    )
    first, second = list(groups["groups"].values())[:2]
    said("meaning", f"group of {first['nodes']}", f"{first['after']:.4f}".lstrip("0"), short(groups["before"]))
    said("meaning", f"group of {second['nodes']} to {short(second['after'])}")
    without = NUMBERS["conservation"]["RelP without the half rule"]
    said("relp", f"{min(without):.1f} to {max(without):.1f}")
    gradient = NUMBERS["conservation"]["plain gradient"]
    assert max(map(abs, gradient)) < 0.06
    assert all(abs(one - 1) < 5e-7 for one in NUMBERS["conservation"]["RelP"])
    assert [row[:2] for row in NUMBERS["baselines"]["counterfactual"]] == [[0.0, 0.0]] * 4
