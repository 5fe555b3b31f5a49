"""JSON as data: what is read, and the traps that are refused in a phrase."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracer.system import jsontext
from tracer.system.jsontext import JsonError, TwiceError, parse

LEAVES = st.none() | st.booleans() | st.integers(-(10**60), 10**60) | st.floats(allow_nan=False) | st.text(max_size=9)
KEYS = st.text(max_size=5)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner), max_leaves=20)


@given(VALUES)
def test_what_python_writes_is_read_back(value: Any) -> None:
    assert parse(json.dumps(value)) == value


TRAPS: dict[str | bytes, str] = {
    "": "is not JSON",
    "{": "is not JSON",
    "[" * 200_000: "nested too deeply",
    '{"a":' * 200_000: "nested too deeply",
    "[" * 101 + "]" * 101: "nested too deeply",
    '{"a": 1, "b": {"c": 1, "c": 2}}': "has the key 'c' twice",
    "9" * 5000: "a whole number of 5000 digits",
    "[-" + "9" * 64 + "]": "a whole number of 65 digits",
    b"\xff\xfe{}": "is not UTF-8",
    '{"a": 1}'.encode("utf-16"): "is not UTF-8",
}


@pytest.mark.parametrize("number", range(len(TRAPS)))
def test_traps_are_refused_in_a_phrase(number: int) -> None:
    content, rule = list(TRAPS.items())[number]
    with pytest.raises(JsonError, match=rule) as caught:
        parse(content)
    assert len(str(caught.value)) < 200
    assert isinstance(caught.value, TwiceError) == ("twice" in rule)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", "-Infinity", "1e999", "-1e999", "1" * 400 + ".0"])
def test_numbers_that_json_has_not_are_read_where_they_are_ours_alone(text: str) -> None:
    found = parse(text)
    assert not math.isfinite(found[0] if isinstance(found, list) else found)
    with pytest.raises(JsonError, match="holds"):
        parse(text, constants=False)


def test_limits_are_far_beyond_what_is_written() -> None:
    assert parse("[" * jsontext.MOST_DEPTH + "]" * jsontext.MOST_DEPTH)
    assert parse(str(2**64)) == 2**64
    assert parse(b"\xef\xbb\xbf[1]") == [1]
    assert parse(json.dumps([[1]] * 500)) == [[1]] * 500
