"""YAML as data: a file's mapping, `key=value` changes to it, and keys checked against those that are known.

Knows YAML's safe part, its traps, and that a key given twice or unknown is a mistake. Refuses to know what the keys
mean.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from tracer.errors import JobError, meant, quoted
from tracer.system import jsontext, wholefile

MOST_NODES = 10**6
"""Values of a document, those of aliases counted wherever they are: ten lines of them could make any number."""


class _Loader(yaml.SafeLoader):
    """YAML's safe part, without traps. A key given twice is an error: the first value would be lost silently. Plain
    values are what they look like, as in YAML 1.2: 010, 1:30, 1_000, yes, no and dates, which older YAML takes for
    other numbers and truths, are the text that is written."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > jsontext.MOST_DIGITS:
            rule = f"it holds a whole number of {len(node.value)} digits"
            raise yaml.constructor.ConstructorError(None, None, rule, node.start_mark)
        return int(node.value)

    def get_single_node(self) -> yaml.Node | None:
        if (node := super().get_single_node()) is not None:
            self._count(node, {}, set())
        return node

    def _count(self, node: yaml.Node, known: dict[int, int], above: set[int]) -> int:
        """Values in a node; refuses what holds itself, or too many."""
        if isinstance(node, yaml.ScalarNode) or id(node) in known:
            return known.get(id(node), 1)
        if id(node) in above:
            raise yaml.constructor.ConstructorError(None, None, "it holds itself", node.start_mark)
        parts = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
        above.add(id(node))
        known[id(node)] = count = 1 + sum(self._count(part, known, above) for part in parts)
        above.remove(id(node))
        if count > MOST_NODES:
            rule = f"it holds more than {MOST_NODES:,} values"
            raise yaml.constructor.ConstructorError(None, None, rule, node.start_mark)
        return count


_Loader.yaml_implicit_resolvers = {}
for _tag, _form, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_form})$", re.ASCII), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


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
        content = _yaml(wholefile.read(path).decode())
    except OSError as error:
        raise JobError(where, f"cannot be read ({error.strerror or error})", "check the path") from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:  # an impossible date is a ValueError
        raise JobError(where, f"is not YAML ({_why(error)})", "fix that line") from error
    if not isinstance(content, dict):
        held = "nothing" if content is None else "a list" if isinstance(content, list) else "a single value"
        raise JobError(where, f"holds {held}, not keys with values", "write lines of key: value")
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
            near, listed = meant(key, known), ", ".join(known)
            step = f"{near} Else use {listed}" if near else f"use {listed}"
            raise JobError(f"key {where}", f"is not known {of}", step)
        if isinstance(known[key], dict) and isinstance(value, Mapping):
            check_keys(value, known[key], kind, f"{inside}{key}.")
