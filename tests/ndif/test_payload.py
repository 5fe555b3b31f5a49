"""What a request carries: the functions that a block runs, as the part of their source that runs."""

from __future__ import annotations

import ast
import inspect
import io
import types
from typing import Any

import pytest
import torch
import zstandard

import tracer
from loopback import Loopback, prompts
from tracer.attribution import circuits, methods, replay, selection
from tracer.evaluation import on_server as ablating
from tracer.model import head, interventions, passes, rules, traces
from tracer.ndif import payload
from tracer.prompts import Batch

TRAVEL = [
    function
    for module in (head, interventions, rules, traces, circuits, methods, replay, selection, ablating)
    for function in vars(module).values()
    if isinstance(function, types.FunctionType) and function.__module__ == module.__name__
]


def without_docs(source: str) -> tuple[str, list[int]]:
    """Its syntax tree without docstrings or what stands for them, and the line of every node left."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = node.body[0]
            said = isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str)
            node.body = node.body[1:] if said or isinstance(first, ast.Pass) else node.body
    return ast.dump(tree), [node.lineno for node in ast.walk(tree) if isinstance(node, ast.stmt | ast.expr)]


@pytest.mark.parametrize("function", TRAVEL, ids=lambda function: f"{function.__module__}.{function.__name__}")
def test_what_travels_of_a_function_is_all_that_runs_of_it(function: types.FunctionType) -> None:
    source = inspect.getsource(inspect.unwrap(function))
    lean = payload._uncommented(source)
    assert without_docs(lean) == without_docs(source)
    assert not any(token in lean for token in ('"""', "  # "))


CASES = {
    "a docstring alone": ('def f():\n    """Said."""\n', "def f():\n    pass\n"),
    "in two lines": ('def f():\n    """Said\n    twice."""\n    return 1\n', "def f():\n    pass\n\n    return 1\n"),
    "on the line of another": ('def f(): "said"; return 1\n', 'def f(): "said"; return 1\n'),
    "a text that is used": ('def f():\n    x = """a\n    # b"""\n    return x\n', None),
    "a mark in a text": ("def f():\n    return \"#\", '#'  # said\n", "def f():\n    return \"#\", '#'\n"),
    "an argument": ('def f():\n    g(\n        "x"\n    )\n', None),
    "of a class inside": (
        'def f():\n    class A:\n        "said"\n\n    return A\n',
        "def f():\n    class A:\n        pass\n\n    return A\n",
    ),
    "a lambda": ("lambda x: x + 1", None),
}


@pytest.mark.parametrize("case", CASES)
def test_only_comments_and_docstrings_are_left_out(case: str) -> None:
    source, wanted = CASES[case]
    assert payload._uncommented(source) == (source if wanted is None else wanted)


def plain(monkeypatch: pytest.MonkeyPatch, ask: Any) -> str:
    """What is sent while `ask` runs, decompressed."""
    sent: list[bytes] = []
    serialized = payload.serialized
    with monkeypatch.context() as patch:
        patch.setattr(payload, "serialized", lambda *block: sent.append(serialized(*block)) or sent[-1])
        ask()
    return b"".join(zstandard.ZstdDecompressor().stream_reader(io.BytesIO(one)).read() for one in sent).decode("latin1")


def test_a_request_carries_no_function_that_it_does_not_run(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    there, _ = server.pair("demo")
    values = plain(monkeypatch, lambda: passes.values(there, Batch(((1, 2),))))
    assert "def through_blocks" in values
    for other in ("def ablate_sets", "def direct_weights", "def detach_mlp", "def sweep", '"""'):
        assert other not in values
    circuit = plain(monkeypatch, lambda: tracer.trace(there, prompts("demo")[0], nodes=5))
    assert "def sweep" in circuit
    for other in ("def direct_weights", "def apply_edits", "def continued", '"""'):
        assert other not in circuit


def test_what_is_changed_in_a_module_travels_as_it_is_now(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source of a function is kept, what its modules hold is not."""
    there, _ = server.pair("demo")
    before, _ = passes.values(there, Batch(((1, 2),)))
    monkeypatch.setattr(doubled, "__module__", interventions.__name__)
    monkeypatch.setattr(interventions, "stack", doubled)
    after, _ = passes.values(there, Batch(((1, 2),)))
    assert torch.equal(after, 2 * before)


def doubled(dtype: Any, layers: Any, slots: Any, n_neurons: int) -> torch.Tensor:
    return 2 * torch.stack([layer.float().cpu() for layer in layers], dim=1)
