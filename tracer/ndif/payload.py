"""A traced block as the bytes that a server takes: its source, its values, and the functions it calls as theirs.

Knows how nnsight serialises. Refuses to know servers, and what a block computes.
"""

from __future__ import annotations

import ast
import copy
import inspect
import io
import sys
import threading
import tokenize
import types
from collections.abc import Callable
from typing import Any, ClassVar

import zstandard
from nnsight import save
from nnsight.intervention.serialization import CustomCloudPickler, _load_function, reduce_block

from tracer.system.forks import after_fork

RECEIPT = "_receipt_of_this_request"
"""The name under which a result says which request it is of."""
_PARSING = threading.Lock()
"""Held while source is parsed: Python 3.11 counts the depth of syntax trees over all threads at once, and raises
SystemError where two threads parse at once."""
after_fork(sys.modules[__name__], lambda module: setattr(module, "_PARSING", threading.Lock()))


class _Pickler(CustomCloudPickler):
    """nnsight's pickler, for functions of ours as they are on disk, not wrapped by a type checker; of their source
    travels what runs, and of the modules of ours that they name, what they read of them."""

    _kept: ClassVar[dict[types.FunctionType, tuple[tuple[Any, ...], dict[str, set[str]]]]] = {}

    def _dynamic_function_reduce(self, func: types.FunctionType) -> tuple[Any, ...]:
        plain: Any = inspect.unwrap(func)
        reduced, read = self._kept.get(plain) or self._lean(plain)
        if plain.__closure__ is None and "<locals>" not in plain.__qualname__:
            # Finding a function's source takes longer than the rest of a request together.
            self._kept[plain] = reduced, read
        load, args, scope, *rest = reduced
        return load, args, _narrowed(scope, read) if read else scope, *rest

    def _lean(self, func: types.FunctionType) -> tuple[tuple[Any, ...], dict[str, set[str]]]:
        """A function as nnsight reduces it, but without comments and annotations; and its `_attributes`."""
        load, args, *rest = super()._dynamic_function_reduce(func)
        if load is not _load_function:
            return (load, args, *rest), {}  # nothing has its source
        source, name, defaults, of_keywords, _, *origin = args
        lean = _uncommented(source), name, defaults, of_keywords, None, *origin
        return (load, lean, *rest), _attributes(ast.parse(source))


def _attributes(tree: ast.AST) -> dict[str, set[str]]:
    """Which attributes are read of each name."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.setdefault(node.value.id, set()).add(node.attr)
    return found


def _narrowed(scope: dict[str, Any], read: dict[str, set[str]]) -> dict[str, Any]:
    """Names and what they stand for; for modules of ours, which a server does not have, only what is read of them."""
    return {
        name: types.SimpleNamespace(**{one: getattr(value, one) for one in read[name]})
        if name in read and isinstance(value, types.ModuleType) and value.__name__.partition(".")[0] == "tracer"
        else value
        for name, value in scope.items()
    }


def _uncommented(source: str) -> str:
    """A function's source without comments, and ``pass`` for docstrings; what is left stays on its line."""
    lines, tokens = source.split("\n"), list(tokenize.generate_tokens(io.StringIO(source).readline))
    for token in tokens:
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column].rstrip()
    parts = [token for token in tokens if token.type not in (tokenize.COMMENT, tokenize.NL)]
    for before, said, after in zip(parts, parts[1:], parts[2:], strict=False):
        begins = before.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        if begins and said.type == tokenize.STRING and after.type == tokenize.NEWLINE:
            (row, column), (last, _) = said.start, said.end
            lines[row - 1 : last] = [lines[row - 1][:column] + "pass", *[""] * (last - row)]
    return "\n".join(lines)


class _Guarding(ast.NodeTransformer):
    """Wrap every ``with`` body in the guard; an invoke's body runs after its enclosing block exits."""

    NAME = "_guard_of_hidden_weights"

    def visit_With(self, node: ast.With) -> ast.With:
        self.generic_visit(node)
        made = ast.Call(ast.Name(self.NAME, ast.Load()), [], [])
        guarded = ast.copy_location(ast.With([ast.withitem(made)], node.body), node.body[0])
        guarded.lineno -= 1  # so that the body's lines keep their numbers
        node.body = [ast.fix_missing_locations(guarded)]
        return node


def serialized(tracer: Any, guard: Callable[[], Any] | None = None, receipt: str | None = None) -> bytes:
    """A traced block, its values and the functions it calls, as `RequestModel.serialize` writes them.

    Args:
        guard: makes the context in which the block runs.
        receipt: what the block saves besides.
    """
    frame, node = tracer.info.frame, copy.deepcopy(tracer.node)  # nnsight keeps its own for the next time
    variables = dict(frame.f_locals)
    if receipt is not None:
        call = ast.Call(ast.Name("_save_receipt", ast.Load()), [ast.Constant(receipt)], [])
        made = ast.copy_location(ast.Assign([ast.Name(RECEIPT, ast.Store())], call), node.body[0])
        made.lineno -= 1  # so that the body's lines keep their numbers
        node.body.insert(0, ast.fix_missing_locations(made))
        variables["_save_receipt"] = save
    if guard is not None:
        node = _Guarding().visit(node)
        variables[_Guarding.NAME] = guard
    buffer = io.BytesIO()
    with _PARSING:
        source, *scopes = reduce_block(node, frame.f_globals, variables)
        read = _attributes(node)
        block = source, *(_narrowed(scope, read) for scope in scopes)
        _Pickler(buffer, protocol=4).dump((tracer, block))
    return zstandard.ZstdCompressor(level=12).compress(buffer.getvalue())


def saved_names(node: ast.With) -> tuple[frozenset[str], frozenset[str]]:
    """The names that a block may save, and those among them that it always does."""
    may, must, statements = set[str](), set[str](), list[ast.stmt](node.body)
    for one in ast.walk(ast.Module(node.body, [])):
        if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store):
            may.add(one.id)
        elif isinstance(one, ast.Call) and _saves(one):
            inside = one.args or [getattr(one.func, "value", None)]
            may.update(name.id for name in inside if isinstance(name, ast.Name))
    while statements:
        match statements.pop():
            case ast.With(body=body):
                statements.extend(body)
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call() as call) if _saves(call):
                must.add(name)
    return frozenset(may), frozenset(must)


def _saves(call: ast.Call) -> bool:
    """Whether it is ``save(value)``, ``nnsight.save(value)`` or ``value.save()``."""
    return getattr(call.func, "attr", getattr(call.func, "id", None)) == "save"
