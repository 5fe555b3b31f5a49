"""Processes that tests start: the scripts of tests/children, read with a limit, and ended with their test.

A child is begun with its standard error in its output, unless that is asked for apart. What a test that fails leaves
running is ended by a fixture (conftest.py), so that no other test meets it.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[1] / "children"
Child = subprocess.Popen[str]
_BEGUN: list[Child] = []


def command(script: str, *arguments: object, warnings: str = "default") -> list[str]:
    """What runs a script of tests/children."""
    return [sys.executable, "-W", warnings, str(SCRIPTS / f"{script}.py"), *map(str, arguments)]


def begin(what: Sequence[str], stderr: int = subprocess.STDOUT, env: Mapping[str, str] | None = None) -> Child:
    """Begin any command, to be ended by `end`, or with the test."""
    child = subprocess.Popen(what, stdout=subprocess.PIPE, stderr=stderr, text=True, env=env)
    _BEGUN.append(child)
    return child


def start(script: str, *arguments: object, env: Mapping[str, str] | None = None) -> Child:
    """Begin a script of tests/children."""
    return begin(command(script, *arguments), env=env)


def line(child: Child, seconds: float = 60.0, before: str = "") -> str:
    """The child's next line. One that says nothing for so long is killed, and the test fails with what was `before`."""
    assert child.stdout is not None
    limit = threading.Timer(max(seconds, 0.0), child.kill)
    limit.start()
    try:
        said = child.stdout.readline()
    finally:
        limit.cancel()
    assert said, f"a child said nothing in {seconds:.0f} s, or ended; before: {before}"
    return said


def end(child: Child) -> None:
    """Kill it, if it still runs, and close what it wrote to."""
    if child.poll() is None:
        child.kill()
    child.wait()
    for stream in (child.stdout, child.stderr):
        if stream is not None:
            stream.close()


def end_all() -> None:
    """End every child that was begun."""
    while _BEGUN:
        end(_BEGUN.pop())
