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
        ("a: 2020-99-99", ("not YAML",)),
        ("a: 1\nb: 2\na: 3", ("not YAML", "line 3: 'a' is there twice")),
        ("a: {b: 1, b: 2}", ("'b' is there twice",)),
        ("? [a]\n: 1", ("not YAML",)),
        ("[" * 3000, ("not YAML",)),
        ("- 1", ("holds a list",)),
        ("text", ("holds a str",)),
        ("", ("holds a NoneType",)),
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
    text = "a: &x {b: 1, c: no}\nd:\n  <<: *x\n  b: 2\ne: [1.5, ü]"
    assert parsed(file(tmp_path, text), "job") == {
        "a": {"b": 1, "c": False},
        "d": {"b": 2, "c": False},
        "e": [1.5, "ü"],
    }


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
        ("a=2020-99-99", ("not YAML",)),
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
