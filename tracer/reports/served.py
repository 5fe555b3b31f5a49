"""The graph page by HTTP, for one reader on this machine: it is shown, and its notes are saved into the run folder.

Answers on 127.0.0.1 alone, to whoever has the token, and writes one file of the run folder. Knows HTTP and that file.
Refuses to know how the page looks (reports/viewer) and what notes are (circuit/notes.py); keeps no log, since addresses
hold the token.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from email.message import Message
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs

from tracer.circuit.circuit import Graph
from tracer.circuit.notes import Notes
from tracer.errors import JobError, TracerError, first_line, quoted
from tracer.meaning.around import around
from tracer.reports import tables
from tracer.reports.facts import REPORT, facts

HOST = "127.0.0.1"
MOST_BYTES = 5_000_000
"""Of what is saved at once: as much as the page loads from a file."""
NOTES = "/notes"
LONGEST_QUERY = 1000
SECONDS = 20
"""That a connection may take to say what it wants."""
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
REPORT_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""A run folder may be another's: nothing in its report runs, or reaches this server."""
PAGE, JSON, TEXT = "text/html; charset=utf-8", "application/json", "text/plain; charset=utf-8"


class Asked(NamedTuple):
    """A request: `body` reads so many bytes."""

    method: str
    target: str
    headers: Message
    body: Callable[[int], bytes]


class Answer(NamedTuple):
    """What is answered."""

    status: HTTPStatus
    content: bytes = b""
    kind: str = TEXT
    headers: tuple[tuple[str, str], ...] = ()


class _RefusedError(Exception):
    """What is not answered, and why."""

    def __init__(self, status: HTTPStatus, rule: str, **headers: str) -> None:
        super().__init__(rule)
        self.answer = Answer(status, f"{rule}\n".encode(), TEXT, tuple(headers.items()))


class PageServer:
    """Serves one graph's page until it is closed.

    Raises:
        JobError, RunError: the page cannot be made.
    """

    def __init__(self, notes: Notes, exemplars: Any = None) -> None:
        self.notes, self.token = notes, secrets.token_urlsafe(32)
        self._saved = 0
        self._known = around(notes.graph, notes.place.address, exemplars)
        self._whole = facts(notes.graph, notes.place.address)
        self._made: tuple[str, bytes] = ("", b"")
        self._page()
        self._server = _Server(self.answer)
        port = self._server.server_address[1]
        self.origin = f"http://{HOST}:{port}"
        self._hosts = {f"{HOST}:{port}", f"localhost:{port}"}
        self._origins = {f"http://{host}" for host in self._hosts}

    @property
    def url(self) -> str:
        """Where the page is, with the token."""
        return f"{self.origin}/?token={self.token}"

    def run(self) -> None:
        """Answer until `close`, or until the program is interrupted."""
        self._server.serve_forever(poll_interval=0.2)

    def close(self) -> None:
        """Answer no more."""
        self._server.server_close()

    def told(self) -> str:
        """What was saved, and where, in words."""
        times = "once" if self._saved == 1 else f"{self._saved:,} times"
        return f"notes were saved {times}, and are in {self.notes}" if self._saved else "nothing was saved"

    def stop(self) -> None:
        """End `run`, which another thread is in, and close."""
        self._server.shutdown()
        self.close()

    # ------------------------------------------------------------------------------------------------ answers

    def answer(self, asked: Asked) -> Answer:
        """What a request gets; whatever is not expected of the page itself is refused."""
        try:
            self._check(asked)
            return self._method(asked)(asked)
        except _RefusedError as refused:
            return refused.answer
        except TracerError as error:
            return _RefusedError(HTTPStatus.UNPROCESSABLE_ENTITY, str(error)).answer
        except OSError as error:
            rule = f"{self.notes} cannot be read or written ({first_line(error.strerror or error)})"
            return _RefusedError(HTTPStatus.INTERNAL_SERVER_ERROR, rule).answer

    def _check(self, asked: Asked) -> None:
        hosts = asked.headers.get_all("Host", [])
        if len(hosts) != 1 or hosts[0].lower() not in self._hosts:
            raise _RefusedError(HTTPStatus.MISDIRECTED_REQUEST, "this server is asked by its own address alone")
        if any(origin not in self._origins for origin in asked.headers.get_all("Origin", [])):
            raise _RefusedError(HTTPStatus.FORBIDDEN, "another page asks")
        if not self._has_token(asked):
            raise _RefusedError(
                HTTPStatus.FORBIDDEN, "the token is missing or wrong: open the address that was printed"
            )

    def _method(self, asked: Asked) -> Callable[[Asked], Answer]:
        known = {"/": {"GET": self._get_page}, NOTES: {"GET": self._get_notes, "PUT": self._put_notes}}
        if self._whole.report is not None:
            known[f"/{REPORT}"] = {"GET": self._get_report}
        methods = known.get(asked.target.partition("?")[0])
        if methods is None:
            raise _RefusedError(HTTPStatus.NOT_FOUND, "there is nothing here")
        if asked.method not in methods:
            raise _RefusedError(
                HTTPStatus.METHOD_NOT_ALLOWED, "that cannot be asked here", Allow=", ".join(sorted(methods))
            )
        return methods[asked.method]

    def _has_token(self, asked: Asked) -> bool:
        """Pages give it in their address; scripts in a header, which no other page can set."""
        path, _, query = asked.target.partition("?")
        given = [value.removeprefix("Bearer ") for value in asked.headers.get_all("Authorization", [])]
        if path != NOTES and len(query) < LONGEST_QUERY:
            given += parse_qs(query).get("token", [])
        told = (secrets.compare_digest(one.encode("utf-8", "replace"), self.token.encode()) for one in given)
        return len(given) == 1 and all(told)

    def _get_page(self, _asked: Asked) -> Answer:
        return Answer(HTTPStatus.OK, self._page(), PAGE)

    def _page(self) -> bytes:
        graph, version = self.notes.shown()
        if self._made[0] != version:
            self._made = (
                version,
                tables.graph_page(graph, known=self._known, whole=self._whole, served=version).encode(),
            )
        return self._made[1]

    def _get_report(self, _asked: Asked) -> Answer:
        content = self.notes.place.read(REPORT)
        return Answer(HTTPStatus.OK, content, PAGE, (("Content-Security-Policy", REPORT_POLICY),))

    def _get_notes(self, _asked: Asked) -> Answer:
        content, version = self.notes.read()
        return Answer(HTTPStatus.OK, content, JSON, (("ETag", version),))

    def _put_notes(self, asked: Asked) -> Answer:
        version = asked.headers.get("If-Match")
        if version is None:
            raise _RefusedError(HTTPStatus.PRECONDITION_REQUIRED, "the version that is replaced is not said")
        new = self.notes.write(_body(asked), version)
        if new is None:
            now, own = self.notes.read()
            return Answer(HTTPStatus.CONFLICT, now, JSON, (("ETag", own),))
        self._saved += 1
        return Answer(HTTPStatus.OK, b"saved\n", TEXT, (("ETag", new),))


def _body(asked: Asked) -> bytes:
    """What is sent, if it is JSON of a length that is said before."""
    if asked.headers.get_content_type() != JSON:
        raise _RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"notes are {JSON}")
    length = asked.headers.get("Content-Length", "")
    if "Transfer-Encoding" in asked.headers or not (length.isascii() and length.isdigit()):
        raise _RefusedError(HTTPStatus.LENGTH_REQUIRED, "the length of the notes is not said")
    if len(length) > 12 or int(length) > MOST_BYTES:
        raise _RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the notes are longer than {MOST_BYTES:,} bytes")
    content = asked.body(int(length))
    if len(content) != int(length):
        raise _RefusedError(HTTPStatus.BAD_REQUEST, "the notes are cut")
    return content


def served(address: Any, graph: Graph, prompt: int | None = None, exemplars: Any = None) -> PageServer:
    """A server of the graph's page, which saves notes into its run folder; `exemplars` as of `tables.view`.

    Raises:
        JobError: the page cannot be drawn, or there is no free port. RunError: the notes' file is a link or damaged.
    """
    try:
        return PageServer(Notes(address, graph, prompt), exemplars)
    except OSError as error:
        rule = f"cannot be served on {HOST} ({first_line(error.strerror or error)})"
        raise JobError(
            f"run {quoted(str(address), 200)}", rule, "leave out --serve: the page opens from a file"
        ) from error


class _Server(ThreadingHTTPServer):
    """Threads, so that one connection that says nothing holds up no other; none outlives the program."""

    daemon_threads = True

    def __init__(self, answer: Callable[[Asked], Answer]) -> None:
        self.answer = answer
        super().__init__((HOST, 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that breaks off is nothing to be told."""


class _Handler(BaseHTTPRequestHandler):
    """Reads a request and writes its answer."""

    timeout = SECONDS
    server_version, sys_version = "tracer", ""
    error_content_type, error_message_format = TEXT, "%(code)d\n"

    def log_message(self, format: str, *args: Any) -> None:
        """No log: addresses hold the token."""

    def answer(self) -> None:
        """Any method: what can be asked is not known here."""
        server = self.server
        assert isinstance(server, _Server)
        asked = Asked(self.command, self.path, self.headers, self.rfile.read)
        found = server.answer(asked)
        self.close_connection = True  # what was not read of a refused body is not the next request
        self.send_response(found.status)
        for name, value in (*HEADERS.items(), *found.headers):
            self.send_header(name, value)
        self.send_header("Content-Type", found.kind)
        self.send_header("Content-Length", str(len(found.content)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(found.content)


for _method in ("GET", "PUT", "HEAD", "POST", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT"):
    setattr(_Handler, f"do_{_method}", _Handler.answer)
