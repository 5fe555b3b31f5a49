"""The floor plan: what each room says at its door is what others use, and the public names are these."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import tracer

ROOT = Path(tracer.__file__).parent
ROOMS = sorted(door.parent.name for door in ROOT.glob("*/__init__.py") if door.parent.name != "demo")
NAMES = """
Attribution Circuit Evaluation Graph JobError Model ModelError Prompt Pruning RemoteError Run RunError Steering
TracerError attribute estimate_quality evaluate export import_graph knockouts load minimality run steer supernodes trace
view
"""
VERBS = """
compact doctor evaluate export group import plan query report run show status steer submit trace view
"""


def imports() -> Iterator[tuple[Path, str, str]]:
    """Every name of tracer's that a module imports: the file, the module it comes from, the name."""
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tracer":
                for name in node.names:
                    yield path, str(node.module), name.name


def visits() -> Iterator[tuple[str, str, str]]:
    """Imports from one room into another: who imports, the room, and the module in it."""
    for path, module, name in imports():
        parts = [*module.split(".")[1:], name]
        if parts[0] in ROOMS and path.relative_to(ROOT).parts[0] != parts[0] and len(parts) > 1:
            yield str(path.relative_to(ROOT)), parts[0], parts[1]


def door(room: str) -> str:
    """What a room says of itself."""
    return ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text(encoding="utf-8"))) or ""


@pytest.mark.parametrize("room", ROOMS)
def test_a_door_says_what_the_room_knows_and_what_others_may_use(room: str) -> None:
    said = door(room)
    assert "Refuses to" in said
    for who, where, name in visits():
        if where == room and (ROOT / room / f"{name}.py").exists():
            assert re.search(rf"`{name}\b", said.partition("Door:")[2]), (
                f"{who} imports {room}.{name}, unnamed at the door"
            )


def test_no_module_imports_what_another_calls_private() -> None:
    assert [(str(path), name) for path, _, name in imports() if re.match(r"_[a-z]", name)] == []


def test_public_names_are_these_and_answer() -> None:
    assert set(tracer.__all__) >= set(NAMES.split())
    for name in tracer.__all__:
        assert getattr(tracer, name).__doc__, name


def test_verbs_are_these() -> None:
    from tracer.cli.app import app

    verbs = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert verbs >= set(VERBS.split())
