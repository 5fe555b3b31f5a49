"""Stands between a client and the loop-back server, in threads of the test, and may lie about every answer.

Answers name the proxy as the place of their results, so that downloads come by it too; it serves ranges of them, as
stores do. Nothing of it leaves the loop-back.
"""

from __future__ import annotations

import hashlib
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

HELD = 20.0
"""Seconds after which a connection that is held is let go, whatever the client does."""


@dataclass
class Answer:
    """What is about to be answered.

    Attributes:
        kind: status, env, request, response or result. status, headers, body: of HTTP.
        raw: writes to the connection instead, which is then closed.
    """

    kind: str
    status: int
    headers: dict[str, str]
    body: bytes
    raw: Callable[[socket.socket], None] | None = None


Lie = Callable[[Answer], None]


def honest(answer: Answer) -> None:
    """No lie."""


@dataclass
class Proxy:
    """A server's double.

    Attributes:
        host: its URL. lie: changes an answer before it is given. kept: the last true answer of each kind.
            heard: each request, its path and its headers.
    """

    upstream: str
    host: str = ""
    lie: Lie = honest
    kept: dict[str, bytes] = field(default_factory=dict)
    heard: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)


def _handler(proxy: Proxy, client: httpx.Client) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = HELD

        def log_message(self, format: str, *args: object) -> None:
            pass

        def answer(self) -> None:
            proxy.heard.append((self.path, dict(self.headers)))
            content = self.rfile.read(int(self.headers.get("content-length", 0)))
            passed = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "range")}
            got = client.request(self.command, proxy.upstream + self.path, content=content, headers=passed)
            body = got.content.replace(proxy.upstream.encode(), proxy.host.encode())
            given = Answer(self.path.split("/")[1], got.status_code, {}, body)
            if given.kind == "result":
                self._ranged(given)
            elif "content-type" in got.headers:
                given.headers["content-type"] = got.headers["content-type"]
            if proxy.lie is honest:
                proxy.kept[given.kind] = given.body
            proxy.lie(given)
            if given.raw is not None:
                given.raw(self.connection)
                self.close_connection = True
                return
            self.send_response(given.status)
            for name, value in ({"content-length": str(len(given.body))} | given.headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(given.body)

        def _ranged(self, given: Answer) -> None:
            tag = f'"{hashlib.sha1(given.body).hexdigest()}"'
            given.headers["etag"] = tag
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range", ""))
            if asked and self.headers.get("if-range", tag) == tag:
                first, whole = int(asked[1]), len(given.body)
                given.status, given.body = 206, given.body[first:]
                given.headers["content-range"] = f"bytes {first}-{whole - 1}/{whole}"

        def do_GET(self) -> None:
            try:
                self.answer()
            except (OSError, httpx.HTTPError):  # the client went, or the test is over
                self.close_connection = True

        do_POST = do_GET  # noqa: N815  as http.server has it

    return Handler


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        pass


@contextmanager
def between(upstream: str) -> Iterator[Proxy]:
    """A proxy before the server at a URL."""
    proxy = Proxy(upstream)
    with httpx.Client(timeout=60.0, limits=httpx.Limits(max_connections=None)) as client:
        server = _Quiet(("127.0.0.1", 0), _handler(proxy, client))
        proxy.host = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield proxy
        finally:
            proxy.over.set()
            server.shutdown()
            thread.join()
            server.server_close()


def cut(share: float) -> Lie:
    """Cuts the connection after a share of the body."""

    def lie(answer: Answer) -> None:
        head = "".join(f"{name}: {value}\r\n" for name, value in answer.headers.items())
        begin = f"HTTP/1.1 {answer.status} OK\r\ncontent-length: {len(answer.body)}\r\n{head}\r\n".encode()
        part = answer.body[: int(share * len(answer.body))]
        answer.raw = lambda connection: connection.sendall(begin + part)

    return lie


def refuse(status: int, body: bytes = b'{"detail": "no"}', **headers: str) -> Lie:
    """Answers with another status."""

    def lie(answer: Answer) -> None:
        answer.status, answer.body = status, body
        answer.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    return lie


def raw(*parts: bytes, every: float = 0.0, over: threading.Event) -> Lie:
    """Sends bytes as they are, again and again with a pause, if there is one, and holds the connection until `HELD`."""

    def send(connection: socket.socket) -> None:
        for part in parts:
            connection.sendall(part)
        for _ in range(int(HELD / every) if every else 1):
            if over.wait(every or HELD):
                return
            if every:
                connection.sendall(parts[-1])

    def lie(answer: Answer) -> None:
        answer.raw = send

    return lie
