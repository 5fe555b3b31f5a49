"""Progress of what takes long, as a bar where somebody watches: on a terminal, or in a notebook.

Knows when there is nobody to watch (a pipe, a worker, a thread), and that one bar is enough. Refuses to know what is
counted. Uses tqdm, whose bar is a widget in notebooks that have widgets, and text elsewhere.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tracer.errors import in_python
from tracer.system.display import in_notebook

Report = Callable[[int, int], None]
"""Called with (done, total)."""
DELAY = 0.5
"""Seconds before there is a bar: what is done sooner needs none."""
_taken: ContextVar[bool] = ContextVar("taken", default=False)


@contextmanager
def shown(progress: Report | bool | None, name: str) -> Iterator[Report | None]:
    """Whom to tell of progress, while something runs; None where nobody wants to know. A bar that is shown goes away at
    the end, and what is called meanwhile shows none of its own.

    Args:
        progress: a function that is called instead of a bar; None or true for a bar where there is a terminal or a
            notebook; false for none.
        name: of what runs, before the bar.
    """
    if progress is False or callable(progress):
        token = _taken.set(True)
        try:
            yield progress or None
        finally:
            _taken.reset(token)
        return
    if _taken.get() or not is_watched():
        yield None
        return
    token, bar = _taken.set(True), _Bar(name)
    try:
        yield bar
    finally:
        _taken.reset(token)
        bar.close()


def is_watched() -> bool:
    """Whether a bar would be seen: by whoever called from Python, in the main thread. The command line has its own."""
    if not in_python() or threading.current_thread() is not threading.main_thread():
        return False
    return in_notebook() or (sys.stderr is not None and sys.stderr.isatty())


class _Bar:
    """A bar that appears once something takes longer than `DELAY`."""

    def __init__(self, name: str) -> None:
        self.name, self.started, self.bar = name, time.time(), None

    def __call__(self, done: int, total: int) -> None:
        if self.bar is None:
            if time.time() - self.started < DELAY:
                return
            self.bar: Any = _tqdm()(total=total, desc=self.name, leave=False, file=sys.stderr, dynamic_ncols=True)
            self.bar.start_t = self.started
        if done < self.bar.n:  # another count begins
            self.bar.n = self.bar.last_print_n = 0
        self.bar.total = total
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _tqdm() -> Any:
    """tqdm's class for where this runs; without widgets its text, which notebooks show as well."""
    widgets = in_notebook() and importlib.util.find_spec("ipywidgets") is not None
    module: Any = importlib.import_module("tqdm.notebook" if widgets else "tqdm.std")
    return module.tqdm


def told(parts: Iterable[range], report: Report | None, total: int) -> Iterator[range]:
    """Parts of a count, one after the other, each told when the next is asked for."""
    for part in parts:
        yield part
        if report is not None:
            report(part.stop, total)
