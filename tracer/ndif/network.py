"""A time by which an exchange has ended, however slowly the other side sends: a byte a second holds off a timeout of
silence for ever.

Knows the sockets under httpx. Refuses to know what is sent over them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from typing import Any

import httpcore
import httpx


class Deadline(threading.local):
    """When the exchange of this thread must have ended, by the monotonic clock."""

    end = inf

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Bound whatever is exchanged inside."""
        before, self.end = self.end, min(self.end, time.monotonic() + seconds)
        try:
            yield
        finally:
            self.end = before

    def cut(self, timeout: float | None, error: type[Exception]) -> float | None:
        """A timeout of silence, no longer than what is left."""
        left = self.end - time.monotonic()
        if left <= 0:
            raise error("it took too long as a whole")
        return timeout if left == inf else left if timeout is None else min(left, timeout)


class _Stream(httpcore.NetworkStream):
    def __init__(self, plain: httpcore.NetworkStream, deadline: Deadline) -> None:
        self._plain, self._deadline = plain, deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._plain.read(max_bytes, self._deadline.cut(timeout, httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for first in range(0, len(buffer), 2**16):  # each of these may wait for as long as the timeout
            self._plain.write(buffer[first : first + 2**16], self._deadline.cut(timeout, httpcore.WriteTimeout))

    def close(self) -> None:
        self._plain.close()

    def start_tls(self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None) -> _Stream:
        left = self._deadline.cut(timeout, httpcore.ConnectTimeout)
        return _Stream(self._plain.start_tls(ssl_context, server_hostname, left), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._plain.get_extra_info(info)


class _Backend(httpcore.NetworkBackend):
    def __init__(self, plain: httpcore.NetworkBackend, deadline: Deadline) -> None:
        self._plain, self._deadline = plain, deadline

    def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, local_address: Any = None, socket_options: Any = None
    ) -> httpcore.NetworkStream:
        left = self._deadline.cut(timeout, httpcore.ConnectTimeout)
        return _Stream(self._plain.connect_tcp(host, port, left, local_address, socket_options), self._deadline)


def bounded(client: httpx.Client, deadline: Deadline) -> httpx.Client:
    """A client whose exchanges end by the deadline of the thread that makes them, proxies' included."""
    for transport in (client._transport, *client._mounts.values()):
        pool: Any = getattr(transport, "_pool", None)  # httpx takes no backend of ours; without one nothing is bounded
        if pool is not None:
            pool._network_backend = _Backend(pool._network_backend, deadline)
    return client
