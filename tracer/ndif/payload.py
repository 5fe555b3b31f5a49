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
import types
from collections.abc import Callable
from typing import Any, ClassVar

import zstandard
from nnsight.intervention.serialization import CustomCloudPickler, reduce_block

from tracer.forks import after_fork

_PARSING = threading.Lock()
"""Held while source is parsed: Python 3.11 counts the depth of syntax trees over all threads at once, and raises
SystemError where two threads parse at once."""
after_fork(sys.modules[__name__], lambda module: setattr(module, "_PARSING", threading.Lock()))


class _Pickler(CustomCloudPickler):
    """nnsight's pickler, for functions and modules of ours as they are on disk: not wrapped by a type checker, and
    without what a module knows of its loading."""

    _kept: ClassVar[dict[types.FunctionType, tuple[Any, ...]]] = {}

    def _dynamic_function_reduce(self, func: types.FunctionType) -> tuple[Any, ...]:
        plain: Any = inspect.unwrap(func)
        if plain.__closure__ is not None or "<locals>" in plain.__qualname__:
            return super()._dynamic_function_reduce(plain)
        # Finding a function's source takes longer than the rest of a request together.
        if plain not in self._kept:
            self._kept[plain] = super()._dynamic_function_reduce(plain)
        return self._kept[plain]

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, types.ModuleType) and obj.__name__.partition(".")[0] == "tracer":
            contents = {name: value for name, value in vars(obj).items() if not name.startswith("__")}
            contents.pop("jaxtyping", None)  # put there by a type checker's import hook
            return types.ModuleType, (obj.__name__,), contents
        return super().reducer_override(obj)


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


def serialized(tracer: Any, guard: Callable[[], Any] | None = None) -> bytes:
    """A traced block, its values and the functions it calls, as `RequestModel.serialize` writes them.

    Args:
        guard: makes the context in which the block runs.
    """
    frame, node = tracer.info.frame, tracer.node
    variables = dict(frame.f_locals)
    if guard is not None:
        node = _Guarding().visit(copy.deepcopy(node))  # nnsight keeps its own for the next time
        variables[_Guarding.NAME] = guard
    buffer = io.BytesIO()
    with _PARSING:
        block = reduce_block(node, frame.f_globals, variables)
        _Pickler(buffer, protocol=4).dump((tracer, block))
    return zstandard.ZstdCompressor(level=6).compress(buffer.getvalue())
