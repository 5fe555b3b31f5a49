"""YAML as data: files that cannot be read, changes by key, and unknown keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers import refused
from tracer.errors import JobError
from tracer.runs.yamlfile import check_keys, override, parsed


def file(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "job.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("a: [1", ("not YAML",)),
        (b"\xff\xfe\x00", ("not YAML",)),
        ("a: !!python/object/apply:os.system ['true']", ("not YAML",)),
        (f"a: {'1' * 5000}", ("line 1", "a whole number of 5000 digits")),
        (f"a: {'1' * 65}", ("a whole number of 65 digits",)),
        ("a: &x [*x]", ("holds itself",)),
        (
            "\n".join(["a0: &a0 [x]", *(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]" for i in range(9))]),
            ("values",),
        ),
        ("a: 1\nb: 2\na: 3", ("not YAML", "line 3: 'a' is there twice")),
        ("a: {b: 1, b: 2}", ("'b' is there twice",)),
        ("? [a]\n: 1", ("not YAML",)),
        ("[" * 3000, ("not YAML",)),
        ("- 1", ("holds a list",)),
        ("text", ("holds a single value",)),
        ("", ("holds nothing",)),
    ],
)
def test_files_that_hold_no_mapping_are_refused(tmp_path: Path, content: str | bytes, parts: tuple[str, ...]) -> None:
    with refused(JobError, "job 'x'", *parts):
        parsed(file(tmp_path, content), "job 'x'")


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with refused(JobError, "check the path"):
            parsed(path, "job")
    with refused(JobError, "null"):
        parsed(Path("a\0b"), "job")


def test_yaml_is_read_as_it_is_written(tmp_path: Path) -> None:
    text = "a: &x {b: 1, c: false}\nd:\n  <<: *x\n  b: 2\ne: [1.5, ü]"
    assert parsed(file(tmp_path, text), "job") == {
        "a": {"b": 1, "c": False},
        "d": {"b": 2, "c": False},
        "e": [1.5, "ü"],
    }


TRAPS = [
    "010",
    "1:30",
    "1:30:15.5",
    "1_000",
    "0b1",
    "0x1F",
    "0o17",
    "yes",
    "No",
    "on",
    "OFF",
    "y",
    "2020-01-01",
    "00",
    "=",
]


@pytest.mark.parametrize("written", [*TRAPS, "2020-99-99", "1.5.2", "+", "."])
def test_what_versions_of_yaml_read_differently_is_the_text_that_is_written(tmp_path: Path, written: str) -> None:
    assert parsed(file(tmp_path, f"a: {written}\nb: [{written}, {written}]"), "job") == {
        "a": written,
        "b": [written, written],
    }
    content: dict[Any, Any] = {}
    override(content, f"a={written}")
    assert content == {"a": written}


@pytest.mark.parametrize(
    ("written", "value"),
    [
        *(("10", 10), ("-3", -3), ("+1", 1), ("0", 0), ("1.5", 1.5), ("1e-3", 0.001), ("1E5", 1e5), (".5", 0.5)),
        *(("true", True), ("FALSE", False), ("~", None), ("null", None), ("", None), ("-.inf", float("-inf"))),
    ],
)
def test_what_all_read_alike_is_a_number_a_truth_or_nothing(tmp_path: Path, written: str, value: Any) -> None:
    found = parsed(file(tmp_path, f"a: {written}"), "job")["a"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a=2", {"a": 2}),
        (" a = [x, y]", {"a": ["x", "y"]}),
        ("b=k=v", {"a": 1, "b": "k=v"}),
        ("a=", {"a": None}),
        ("b.c=3", {"a": 1, "b": {"c": 3}}),
        ("b.c.d= e f ", {"a": 1, "b": {"c": {"d": "e f"}}}),
        ("a={c: {d: 1}}", {"a": {"c": {"d": 1}}}),
    ],
)
def test_keys_are_set(text: str, wanted: dict[str, Any]) -> None:
    content: dict[Any, Any] = {"a": 1}
    override(content, text)
    assert content == wanted


def test_a_key_within_another_leaves_the_others() -> None:
    content: dict[Any, Any] = {"a": {"b": {"c": 1, "d": 2}, "e": 3}, "f": None}
    override(content, "a.b.c=5")
    override(content, "f.g=6")
    assert content == {"a": {"b": {"c": 5, "d": 2}, "e": 3}, "f": {"g": 6}}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a", ("key=value",)),
        ("a=[", ("not YAML", "[a, b]")),
        ("a={b: 1, b: 2}", ("is there twice",)),
        ("a.b=1", ("'a' holds 1", "set it whole")),
        ("b.c.d=1", ("'b.c' holds 'text'",)),
    ],
)
def test_changes_that_cannot_be_are_refused(text: str, parts: tuple[str, ...]) -> None:
    with refused(JobError, "--set", *parts):
        override({"a": 1, "b": {"c": "text"}}, text)


def test_unknown_keys_are_named_with_the_known_ones() -> None:
    known: dict[str, Any] = {"a": None, "b": {"c": None, "d": {"e": None}}}
    check_keys({"a": {"anything": 1}, "b": {"c": 1, "d": {"e": 2}}}, known, "a job")
    check_keys({"b": "no mapping, which is not for this check"}, known, "a job")
    with refused(JobError, "key 'x'", "is not known to a job", "use a, b"):
        check_keys({"x": 1}, known, "a job")
    with refused(JobError, "key 'b.x'", "in b of a job", "use c, d"):
        check_keys({"b": {"x": 1}}, known, "a job")
    with refused(JobError, "key 'b.d.x'", "in b.d of a job", "use e"):
        check_keys({"b": {"d": {"x": 1}}}, known, "a job")
    with refused(JobError, "key 1", "use a, b"):
        check_keys({1: 2}, known, "a job")
