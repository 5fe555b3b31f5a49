"""YAML as data: a file's mapping, `key=value` changes to it, and keys checked against those that are known.

Knows YAML's safe part, and that a key given twice or unknown is a mistake. Refuses to know what the keys mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from tracer.errors import JobError, quoted


class _Loader(yaml.SafeLoader):
    """YAML's safe part, where a key given twice is an error: the first value would be lost silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def parsed(path: Path, where: str) -> dict[Any, Any]:
    """The mapping that a file holds.

    Args:
        where: what it is, for errors.

    Raises:
        JobError: it cannot be read, is not YAML, or holds no mapping.
    """
    try:
        content = _yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise JobError(where, f"cannot be read ({error.strerror or error})", "check the path") from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:  # an impossible date is a ValueError
        raise JobError(where, f"is not YAML ({_why(error)})", "fix that line") from error
    if not isinstance(content, dict):
        raise JobError(where, f"holds a {type(content).__name__}, not keys with values", "write lines of key: value")
    return content


def _why(error: Exception) -> str:
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    text = " ".join((problem or str(error)).split())[:120]
    return f"line {mark.line + 1}: {text}" if problem and mark else text


def override(content: dict[Any, Any], text: str) -> None:
    """Set one key from ``key=value``, dotted if it lies within another; the value is YAML.

    Raises:
        JobError: not of that form, or a key within something that holds no keys.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise JobError(f"--set {quoted(text)}", "must be key=value", "write e.g. --set limit=100")
    *outer, last = (part.strip() for part in name.split("."))
    for depth, part in enumerate(outer, 1):
        inner = content.get(part)
        inner = inner.model_dump(exclude_unset=True) if isinstance(inner, BaseModel) else {} if inner is None else inner
        if not isinstance(inner, Mapping):
            rule = f"{quoted('.'.join(outer[:depth]))} holds {quoted(inner)}, no keys"
            raise JobError(f"--set {quoted(text)}", rule, "set it whole, e.g. --set 'input={path: prompts.jsonl}'")
        content[part] = dict(inner)
        content = content[part]
    try:
        content[last] = _yaml(value)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise JobError(
            f"--set {quoted(text)}", f"its value is not YAML ({_why(error)})", "write lists as [a, b]"
        ) from error


def check_keys(content: Mapping[Any, Any], known: Mapping[str, Any], kind: str, inside: str = "") -> None:
    """Refuse a key that is not known.

    Args:
        known: the keys there may be; those that hold keys themselves with theirs, the others with None.
        kind: of what they are keys, for errors. inside: the keys that `content` lies within, each with its dot.

    Raises:
        JobError: the first unknown key, with the known ones.
    """
    for key, value in content.items():
        if key not in known:
            where = quoted(f"{inside}{key}" if isinstance(key, str) else key)
            of = f"in {inside[:-1]} of {kind}" if inside else f"to {kind}"
            raise JobError(f"key {where}", f"is not known {of}", f"use {', '.join(known)}")
        if isinstance(known[key], dict) and isinstance(value, Mapping):
            check_keys(value, known[key], kind, f"{inside}{key}.")
