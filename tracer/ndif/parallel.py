"""Ordered, bounded map over threads; the first exception cancels the rest, nested maps included.

Threads notice a cancellation at their next pause. Knows threads. Refuses to know what is computed.
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
    """The map that this thread belongs to was cancelled."""


class _Cancellation:
    """Cancels the threads of one map, and the maps that these threads started."""

    def __init__(self, outer: _Cancellation | None) -> None:
        self._outer, self._cancelled = outer, False
        # Shared by nested maps, so that cancelling an outer one wakes threads that wait in an inner one.
        self._changed: threading.Condition = threading.Condition() if outer is None else outer._changed

    def cancel(self) -> None:
        """Cancel the map, and wake whoever waits."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()

    def is_cancelled(self) -> bool:
        """Whether this map or one around it was cancelled."""
        return self._cancelled or (self._outer is not None and self._outer.is_cancelled())

    def wait(self, seconds: float) -> bool:
        """Wait until it is cancelled, at most so many seconds; whether it was."""
        with self._changed:
            return self._changed.wait_for(self.is_cancelled, seconds)


class OrderedMap:
    """Ordered map over at most `limit` threads at a time."""

    def __init__(self, limit: int) -> None:
        self.limit, self._thread = limit, threading.local()

    def stream(self, function: Callable[[Part], Answer], parts: Sequence[Part]) -> Iterator[Answer]:
        """`function` of every part, in order, each answer as soon as those before it are out. At most twice as many
        parts as threads are submitted at a time. With one thread the caller's own does the work."""
        count = min(len(parts), self.limit)
        if count <= 1:
            yield from map(function, parts)
            return
        cancellation, failed = _Cancellation(getattr(self._thread, "cancellation", None)), list[BaseException]()

        def begin() -> None:
            self._thread.cancellation = cancellation

        def done(part: Part) -> Answer:
            try:
                self.sleep(0.0)
                return function(part)
            except BaseException as error:
                failed.append(error)
                cancellation.cancel()
                raise

        def taken(future: Future[Answer]) -> Answer:
            if future.exception() is not None:
                raise failed[0]  # the others only say that they were stopped
            return future.result()

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
                cancellation.cancel()
                for future in waiting:
                    future.cancel()

    def sleep(self, seconds: float) -> None:
        """Wait, unless the map that this thread belongs to is cancelled.

        Raises:
            EndedError: it was.
        """
        cancellation: _Cancellation | None = getattr(self._thread, "cancellation", None)
        if cancellation is None:
            time.sleep(seconds)
        elif cancellation.wait(seconds):
            raise EndedError
