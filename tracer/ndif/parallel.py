"""Work on parts, several at a time in threads: answers in order, a bound on what waits, one end for all.

The first error stops the other threads at their next pause, and what these gave to other threads in turn. Knows
threads. Refuses to know what is worked on.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Part = TypeVar("Part")
Answer = TypeVar("Answer")


class EndedError(Exception):
    """The work that this thread is part of has ended."""


class _Stop:
    """Says that the work of some threads has ended, and so has what these gave to other threads in turn."""

    def __init__(self, outer: _Stop | None) -> None:
        self._outer, self._set = outer, False
        # One for all that hang together, so that who waits for an inner one hears of the outer one too.
        self._news: threading.Condition = threading.Condition() if outer is None else outer._news

    def set(self) -> None:
        """It has ended."""
        with self._news:
            self._set = True
            self._news.notify_all()

    def is_set(self) -> bool:
        """Whether it has ended, or what it is a part of."""
        return self._set or (self._outer is not None and self._outer.is_set())

    def wait(self, seconds: float) -> bool:
        """Wait until it has ended, no longer than that; whether it has."""
        with self._news:
            return self._news.wait_for(self.is_set, seconds)


class OrderedMap:
    """Does work in so many threads at a time."""

    def __init__(self, limit: int) -> None:
        self.limit, self._thread = limit, threading.local()

    def stream(self, function: Callable[[Part], Answer], parts: Sequence[Part]) -> Iterator[Answer]:
        """`function` of every part, in order, every answer as soon as it is its turn. Of those that wait for theirs
        there are never more than twice as many as there are threads. One at a time is done in the thread that asks."""
        count = min(len(parts), self.limit)
        if count <= 1:
            yield from map(function, parts)
            return
        stop, failed = _Stop(getattr(self._thread, "stop", None)), list[BaseException]()

        def begin() -> None:
            self._thread.stop = stop

        def done(part: Part) -> Answer:
            try:
                self.sleep(0.0)
                return function(part)
            except BaseException as error:
                failed.append(error)
                stop.set()
                raise

        def taken(one: Future[Answer]) -> Answer:
            if one.exception() is not None:
                raise failed[0]  # the others only say that they were stopped
            return one.result()

        with ThreadPoolExecutor(count, initializer=begin) as pool:
            waiting: deque[Future[Answer]] = deque()
            try:
                for part in parts:
                    if len(waiting) == 2 * count:
                        yield taken(waiting.popleft())
                    waiting.append(pool.submit(done, part))
                while waiting:
                    yield taken(waiting.popleft())
            finally:
                stop.set()
                for one in waiting:
                    one.cancel()

    def sleep(self, seconds: float) -> None:
        """Wait, unless the work that this thread is part of has ended.

        Raises:
            EndedError: it has.
        """
        stop: _Stop | None = getattr(self._thread, "stop", None)
        if stop is None:
            time.sleep(seconds)
        elif stop.wait(seconds):
            raise EndedError
