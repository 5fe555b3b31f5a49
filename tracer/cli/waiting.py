"""What a person sees and is asked while something takes long: signs of life while a model loads, and a question before
work of hours.

Knows standard error, clocks, and that nobody can be asked where there is no terminal. Refuses to know what is waited
for; no time to go is said that was not measured on a part of the work itself.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from tracer.cli import manner, terminal
from tracer.text import printable

SILENT = 2.0
"""Seconds for which nothing is said."""
LONG = 3600.0
"""Seconds of work that is asked about."""
MEASURED = 20.0
"""Seconds of work that are done before its end is told."""


class Declined(KeyboardInterrupt):
    """The user would not go on: as an interrupt, whatever is kept of one is kept."""


class Signs:
    """Signs of life on standard error while something takes long: on a terminal a line that counts after two seconds,
    elsewhere a line every ten.

    Args:
        what: what happens, and of what size, asked anew for each line.
    """

    _live: Signs | None = None

    def __init__(self, what: Callable[[], str]) -> None:
        self.what, self._done, self._since = what, threading.Event(), time.monotonic()
        self._thread = threading.Thread(target=self._tell, daemon=True)
        self._status: Any = None

    def __enter__(self) -> Signs:
        if not manner.now().quiet:
            Signs._live = self
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        if self._thread.ident is not None:
            self._thread.join()
        Signs._live = None

    def _line(self) -> str:
        return f"{printable(self.what())}, {time.monotonic() - self._since:.0f} s"

    def _tell(self) -> None:
        console = terminal.console(stderr=True)
        if not console.is_terminal:
            while not self._done.wait(terminal.LOG_EVERY):
                terminal.line(self._line(), err=True)
            return
        if self._done.wait(SILENT):
            return
        from rich.markup import escape

        with console.status(escape(self._line())) as status:
            self._status = status
            while not self._done.wait(0.5):
                status.update(escape(self._line()))

    @classmethod
    def say(cls, text: str) -> None:
        """A line on standard error, above the one that counts, if there is one."""
        if cls._live is not None and cls._live._status is not None:
            cls._live._status.console.print(printable(text), markup=False)
        else:
            terminal.line(text, err=True)


class Question:
    """Whether work of hours is to go on, asked once, when enough of it is measured."""

    def __init__(self) -> None:
        self._asked = manner.now().yes
        self._answered = threading.Event()

    def due(self, measured: float, left: float | None) -> bool:
        """Whether it has to be asked now.

        Args:
            measured: seconds of the work that are done. left: seconds to go, by that measure.
        """
        if self._asked or left is None or left < LONG or measured < MEASURED:
            return False
        self._asked = True
        return True

    def ask(self, left: float, kept: str) -> None:
        """Ask, and wait for the answer.

        Raises:
            Declined: it is no.
        """
        if self._told(left):
            self._put(left, kept)
            if not _yes(self._answered):
                raise Declined

    def ask_meanwhile(self, left: float, kept: str, then: Callable[[], None]) -> bool:
        """Ask while the work goes on; an answer of no is an interrupt.

        Args:
            then: called once there is a yes.
        """
        if not self._told(left):
            return False

        def answer() -> None:
            self._put(left, kept)
            if _yes(self._answered):
                then()
            elif not self._answered.is_set():
                os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=answer, daemon=True).start()
        return True

    def close(self) -> None:
        """Wait for no answer any more."""
        self._answered.set()

    def _told(self, left: float) -> bool:
        """Whether somebody can be asked; else it is said, and goes on."""
        from tracer.runs.report import duration

        if can_ask():
            return True
        terminal.note(f"about {duration(left)} to go on this machine, by what is measured so far; it goes on")
        return False

    def _put(self, left: float, kept: str) -> None:
        from tracer.runs.report import duration

        with suppress(OSError):
            sys.stderr.write(f"about {duration(left)} to go on this machine ({kept}); go on? [y/N] ")
            sys.stderr.flush()


def can_ask() -> bool:
    """Whether a person is there who can answer."""
    return all(one is not None and one.isatty() for one in (sys.stdin, sys.stderr))


def _yes(over: threading.Event) -> bool:
    """The answer that is typed; no where there is none. It is read without Python's lock on standard input, which a
    thread must not hold when the process ends."""
    number, typed = sys.stdin.fileno(), b""
    while not over.is_set():
        if not select.select([number], [], [], 0.2)[0]:
            continue
        part = os.read(number, 100)
        typed += part
        if not part or b"\n" in typed:
            return typed.strip().lower() in (b"y", b"yes")
    return False
