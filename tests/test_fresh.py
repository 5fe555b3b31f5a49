"""Versions: what is tested lies in the bounds, and other sets of versions are told from it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import fresh

ROOT = Path(__file__).resolve().parent.parent


def pins() -> dict[str, str]:
    return fresh.pinned((ROOT / "constraints.txt").read_text())


@pytest.mark.parametrize("wanted", fresh.requirements(), ids=lambda one: one.name)
def test_the_tested_version_lies_in_the_bounds(wanted: Requirement) -> None:
    pinned = pins()
    assert fresh.canonicalize_name(wanted.name) in pinned
    assert wanted.specifier.contains(pinned[fresh.canonicalize_name(wanted.name)])


def test_every_requirement_has_a_lower_bound_to_try() -> None:
    for one in fresh.requirements():
        assert [part.operator for part in one.specifier].count(">=") == 1, one


def test_without_upper_bounds_the_lower_ones_are_left() -> None:
    assert any("<" in str(one.specifier) for one in fresh.requirements())
    for one, free in zip(fresh.requirements(), fresh.requirements(bounded=False), strict=True):
        assert (one.name, one.extras) == (free.name, free.extras)
        assert [part.operator for part in free.specifier] == [">="]
        assert set(free.specifier) <= set(one.specifier)


def test_pins_are_read_under_one_name_whatever_its_spelling() -> None:
    text = "# a comment\nJinja2==3.1.6\nhuggingface_hub==2.4.0 ; python_version > '3'\ntorch==2.13.0+cpu\n-e .\n"
    assert fresh.pinned(text) == {"jinja2": "3.1.6", "huggingface-hub": "2.4.0", "torch": "2.13.0"}


def test_what_moved_is_said_and_what_a_bound_holds_back() -> None:
    then = {"same": "1.0", "newer": "1.0", "held": "1.9", "gone": "2.0", "older": "3.0"}
    now = {"same": "1.0", "newer": "1.1", "held": "1.9", "new": "0.1", "older": "2.0"}
    beyond = {"same": "1.0", "newer": "1.1", "held": "2.0", "older": "3.0", "new": "0.1"}
    assert fresh.moves(then, now, beyond) == [
        ("gone", "2.0", "–", ""),
        ("held", "1.9", "1.9", "2.0"),
        ("new", "–", "0.1", ""),
        ("newer", "1.0", "1.1", ""),
        ("older", "3.0", "2.0", ""),
    ]


def test_the_readme_says_which_versions_were_tried() -> None:
    """The oldest and the newest that it names are the bounds' and lie in them."""
    readme = (ROOT / "README.md").read_text()
    bounds = {one.name: one.specifier for one in fresh.requirements()}
    named = re.findall(r"(transformers|nnsight|torch) ([\d.]+\d)(?: to ([\d.]+\d))?", readme)
    assert {name for name, _, _ in named} == {"transformers", "nnsight", "torch"}
    for name, oldest, newest in named:
        lower = next(part.version for part in bounds[name] if part.operator == ">=")
        assert bounds[name].contains(oldest)
        assert bounds[name].contains(newest or oldest)
        assert name == "torch" or Version(oldest) == Version(lower)
