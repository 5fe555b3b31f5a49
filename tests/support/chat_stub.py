"""A chat endpoint on 127.0.0.1 that behaves as a test says, and remembers what it was asked and what it answered.

An answer is made by the stub's ``answers``: a function of the request (its JSON) and of how often the same was answered
before. It returns a text, or one of the records below; what it raises is a fault of the test.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Raw:
    """An HTTP answer as it is; `length` is what its header says, if not the truth."""

    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    length: int | None = None


class Silence:
    """No answer, until the stub ends."""


class Dribble:
    """An answer that never ends: a byte now and then."""


def completion(text: Any, **more: Any) -> dict[str, Any]:
    """A chat completion as servers give it; `message`, `finish_reason` and `usage` can be given."""
    message = {"role": "assistant", "content": text, **more.get("message", {})}
    choice = {"index": 0, "message": message, "finish_reason": more.get("finish_reason", "stop")}
    usage = {"usage": more["usage"]} if "usage" in more else {}
    return {"id": "x", "object": "chat.completion", "choices": [choice], **usage}


def data_of(body: dict[str, Any]) -> Any:
    """What a request asks about: the document between the marks, which is all of the user's message."""
    (system, user) = body["messages"]
    assert (system["role"], user["role"]) == ("system", "user")
    text = user["content"]
    assert text.startswith("<data>")
    assert text.endswith("</data>")
    assert text.count("<") == text.count(">") == 2
    return json.loads(text.removeprefix("<data>").removesuffix("</data>"))


class Stub:
    """What the server does, and what it saw: every request's JSON and headers, and how many were answered."""

    def __init__(self) -> None:
        self.answers: Callable[[dict[str, Any], int], Any] = lambda body, before: '{"description": "cities"}'
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answered: Counter[str] = Counter()
        self.lock, self.over = threading.Lock(), threading.Event()
        self.url = ""

    @property
    def calls(self) -> int:
        return len(self.asked)

    def take(self, body: dict[str, Any], headers: dict[str, str]) -> Any:
        with self.lock:
            self.asked.append(body)
            self.headers.append(headers)
            name = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
            found = self.answers(body, self.answered[name])
            if isinstance(found, str | dict):
                self.answered[name] += 1
            return found


class _Handler(BaseHTTPRequestHandler):
    stub: Stub
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one piece: a second would wait for the first to be acknowledged

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions"
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        found = self.stub.take(body, {name.lower(): value for name, value in self.headers.items()})
        with suppress(BrokenPipeError, ConnectionResetError):
            self._give(found)

    def _give(self, found: Any) -> None:
        if isinstance(found, Silence):
            self.stub.over.wait()
            self.close_connection = True
            return
        if isinstance(found, Dribble):
            self.send_response(200)
            self.send_header("content-length", "1000000")
            self.end_headers()
            self.close_connection = True
            while not self.stub.over.wait(0.02):
                self.wfile.write(b" ")
                self.wfile.flush()
            return
        if isinstance(found, str):
            found = completion(found)
        if isinstance(found, dict):
            found = Raw(body=json.dumps(found).encode())
        self.send_response(found.status)
        for name, value in found.headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(found.body) if found.length is None else found.length))
        self.end_headers()
        self.wfile.write(found.body)
        if found.length is not None:
            self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


@contextmanager
def served() -> Iterator[Stub]:
    """A stub that listens while the block runs."""
    stub = Stub()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"stub": stub}))
    stub.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield stub
    finally:
        stub.over.set()
        server.shutdown()
        thread.join()
        server.server_close()
