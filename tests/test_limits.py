"""A function has at most 40 lines and 8 parameters: one that needs more does two things, or lacks a record."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import tracer

ROOT = Path(tracer.__file__).parent
LINES, PARAMETERS = 40, 8
PUBLIC = {f"{module}.{name}" for name, module in tracer._HOME.items()}
PUBLIC |= {f"{name}.__init__" for name in PUBLIC} | {"model.model.load"}  # what `tracer.load` does with a model here
"""What users call by keywords may take as many as there are."""


class Function(NamedTuple):
    """A function of tracer's: where it is, and how large."""

    name: str
    lines: int
    parameters: int


def functions(tree: ast.AST, within: str) -> Iterator[Function]:
    """Every function in a module or a class, and every function in those."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from functions(node, within)
            continue
        name = f"{within}.{node.name}"
        if not isinstance(node, ast.ClassDef):
            yield Function(name, lines(node), parameters(node))
        yield from functions(node, name)


def lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function, but for its docstring."""
    said = node.body[0] if ast.get_docstring(node, clean=False) is not None else None
    return extent(node) - (0 if said is None else extent(said))


def extent(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Parameters of a function, but for the object that it is a method of."""
    given = node.args
    named = [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    named += [one.arg for one in (given.vararg, given.kwarg) if one is not None]
    return len(named) - (named[:1] in (["self"], ["cls"]))


def too_large(function: Function) -> bool:
    return function.lines > LINES or (function.parameters > PARAMETERS and function.name not in PUBLIC)


def test_functions_are_small() -> None:
    found = {
        function.name: function
        for path in sorted(ROOT.rglob("*.py"))
        for function in functions(
            ast.parse(path.read_text(encoding="utf-8")), ".".join(path.relative_to(ROOT).with_suffix("").parts)
        )
        if too_large(function)
    }
    assert found == {}


@pytest.mark.parametrize(
    ("code", "size"),
    [
        ("def f(a, /, b, *c, d, **e):\n    pass", (2, 5)),
        ('def f(self, a):\n    """Said.\n\n    More.\n    """\n    return 1', (2, 1)),
        ("class A:\n    @classmethod\n    def f(cls): ...", (1, 0)),
        ("if x:\n    async def f(a): ...", (1, 1)),
        ("def g():\n    def f(): ...", (1, 0)),
    ],
)
def test_sizes_are_counted_as_said(code: str, size: tuple[int, int]) -> None:
    *_, last = functions(ast.parse(code), "")
    assert (last.lines, last.parameters) == size
