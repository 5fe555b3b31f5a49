"""Processes that tests start: the scripts of tests/children, read with a limit, and ended with their test.

A child is begun with its standard error in its output, unless that is asked for apart. What a test that fails leaves
running is ended by a fixture (conftest.py), so that no other test meets it.
"""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import threading
import time
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


def on_terminal(
    what: Sequence[str], env: Mapping[str, str], seconds: float = 60.0, size: tuple[int, int] | None = None
) -> tuple[bytes, int]:
    """What a command writes to a terminal of its own, standard error included, and its exit code; it is killed after so
    many seconds.

    Args:
        size: lines and columns of the terminal, where that matters.
    """
    mine, its = pty.openpty()
    if size is not None:
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    child = subprocess.Popen(what, stdin=its, stdout=its, stderr=its, env=env, close_fds=True)
    os.close(its)
    said, limit = b"", time.monotonic() + seconds
    try:
        while time.monotonic() < limit:
            if not select.select([mine], [], [], 1)[0]:
                continue
            try:
                part = os.read(mine, 1 << 16)
            except OSError:  # its end was closed
                break
            if not part:
                break
            said += part
        else:
            child.kill()
        return said, child.wait(max(5.0, limit - time.monotonic()))
    finally:
        child.kill()
        child.wait()
        os.close(mine)


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
