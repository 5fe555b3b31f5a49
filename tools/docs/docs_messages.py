"""Every error message that the package can give, read off the places that raise it.

Knows Python's syntax, and that an error is raised as ``JobError(value, rule, next_step)``. What is only known when it
happens stands as its expression in braces. Refuses to know what a message means.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import tracer

ROOT = Path(tracer.__file__).parent
KINDS = frozenset({"JobError", "ModelError", "RunError", "RemoteError", "TracerError"})


class Message(NamedTuple):
    """A message: what raises it, and its three parts as templates."""

    kind: str
    room: str
    value: str
    rule: str
    step: str


def messages() -> list[Message]:
    """All of them, by room; those whose rule is known as text."""
    found = set()
    for path in sorted(ROOT.rglob("*.py")):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for call in _calls(ast.parse(path.read_text(encoding="utf-8"))):
            value, rule, step = (_template(one) for one in call.args[:3])
            if rule.strip("{} .") and not rule.startswith("{"):
                found.add(Message(call.func.id, room, value, rule, step))  # type: ignore[attr-defined]
    return sorted(found, key=lambda one: (one.room, one.rule))


def _calls(tree: ast.AST) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and len(node.args) >= 3 and getattr(node.func, "id", None) in KINDS:
            yield node


def _template(node: ast.expr) -> str:
    """A text as its template: what is filled in stands as the last name of its expression, in braces."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_template(one) for one in node.values)
    if isinstance(node, ast.FormattedValue):
        return f"{{{_name(node.value)}}}"
    if isinstance(node, ast.BinOp):
        return _template(node.left) + _template(node.right)
    return f"{{{_name(node)}}}"


def _name(node: ast.expr) -> str:
    names = [one.id for one in ast.walk(node) if isinstance(one, ast.Name)]
    names += [one.attr for one in ast.walk(node) if isinstance(one, ast.Attribute)]
    return names[-1] if names else "..."


def page() -> str:
    """The page: a list for each room, the rule first, since that is what is searched for."""
    lines = ["# Every message", "", INTRODUCTION, ""]
    room = ""
    for one in messages():
        if one.room != room:
            room = one.room
            lines += [f"## {room}", ""]
        step = f" → {_code(one.step)}" if one.step.strip("{}") else ""
        lines.append(f"- {_code(one.rule)}{step} <small>{one.kind}, of {_code(one.value)}</small>")
    return "\n".join([*lines, ""])


def _code(text: str) -> str:
    text = " ".join(text.split())
    fence = "``" if "`" in text else "`"
    return f"{fence} {text} {fence}" if fence == "``" else f"`{text}`"


INTRODUCTION = """\
The rule that is broken, and after the arrow what to do; in braces what is filled in. Search for some words of what you
saw (the search field above finds them too). [Errors by symptom](../errors.md) explains those that people meet first."""
