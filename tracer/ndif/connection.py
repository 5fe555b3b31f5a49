"""HTTP with one NDIF service, and with the stores that its results are taken from.

Busy servers, timeouts, cut connections and downloads are tried again with growing, jittered pauses, and a download goes
on where it stopped; every answer is bounded in size and every wait in time; whatever remains is one `RemoteError`. The
key is put on requests to the service alone, and no answer is followed elsewhere. Of what a server says, control
characters are spelt out and the key is struck out. Refuses to know jobs, and what a result holds.
"""

from __future__ import annotations

import ipaddress
import logging
import math
import random
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

import httpx

from tracer.errors import RemoteError, quoted
from tracer.ndif.network import Deadline, bounded
from tracer.ndif.parallel import EndedError, OrderedMap
from tracer.settings import IN_FLIGHT
from tracer.system import jsontext
from tracer.text import printable

log = logging.getLogger(__name__)

MIB = 2**20
RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP answers that are worth another try."""
BUSY = frozenset({429, 503})
"""Those of a server that is there, and asks for patience."""
GONE = frozenset({403, 404, 410})
"""Those of a store that does not have a result, or not any more."""
ANSWER = 20.0
"""Seconds without a byte of an answer that needs no work; in all it may take three times as long."""
TAKE = 60.0
"""Seconds without a byte while a request is taken, or a result sent."""
ANSWER_BYTES = 16 * MIB
"""Of an answer that is no result."""

Answer = TypeVar("Answer")
Notify = Callable[[str], None]


class TooLargeError(RemoteError):
    """A request that the server may take in smaller parts: too many bytes, or more memory than it has."""


class RefusedError(RemoteError):
    """An HTTP answer that refuses the request."""

    def __init__(self, status: int, value: str, rule: str, next_step: str) -> None:
        super().__init__(value, rule, next_step)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """How long to wait and how much to send.

    Attributes:
        wait: seconds from a job's submission until it is done, and again for its result's way here.
        patience: seconds without an answer from the server before it counts as down. busy: seconds that it may turn
            requests away as too many.
        lost: seconds after which a job that the server does not know is submitted again.
        attempts: submissions of one job.
        in_flight: jobs at a time, over all threads.
        quiet: seconds of a job after which its state is reported, and between reports of the same state.
        request: bytes of one request; larger ones are split where they can be. result: bytes of one result, as it
            comes and as what it is decompressed to.
    """

    wait: float = 3600.0
    patience: float = 120.0
    busy: float = 1800.0
    lost: float = 60.0
    attempts: int = 4
    in_flight: int = IN_FLIGHT
    quiet: float = 3.0
    request: int = 64 * MIB
    result: int = 4096 * MIB

    def __post_init__(self) -> None:
        for name in ("attempts", "in_flight", "request", "result"):
            if (value := getattr(self, name)) < 1 or value != int(value):
                raise RemoteError(f"limits: {name}={value}", "must be a whole number, 1 or more", "change it")
        for name in ("wait", "patience", "busy", "lost", "quiet"):
            if not getattr(self, name) >= 0:
                raise RemoteError(f"limits: {name}={getattr(self, name)}", "must be 0 seconds or more", "change it")


@dataclass
class Traffic:
    """Requests and bytes so far."""

    requests: int = 0
    sent: int = 0
    largest: int = 0
    received: int = 0
    retries: int = 0


class Key(httpx.Auth):
    """The key, which is put on requests to the server and can be read by nothing else.

    Args:
        where: it was found, for messages.
        header: that takes it. scheme: what stands before it there.

    Raises:
        RemoteError: no key looks like that; the message does not quote it.
    """

    def __init__(
        self,
        key: str,
        where: str = "NDIF_API_KEY or nnsight's configuration",
        header: str = "ndif-api-key",
        scheme: str = "",
    ) -> None:
        if not re.fullmatch(r"[!-~]*", key):
            # Not quoted: apart from the wrong character it is secret.
            rule = "holds a line break, a space or another character that no key has"
            raise RemoteError(f"the key in {where}", rule, "copy it again, on one line")
        self._sign = lambda headers: headers.__setitem__(header, scheme + key) if key else None
        self.scrub = lambda text: text.replace(key, "<key>") if key else text
        self.given = bool(key)

    def auth_flow(self, request: httpx.Request) -> Iterator[httpx.Request]:  # type: ignore[override]
        self._sign(request.headers)
        yield request

    def __reduce__(self) -> NoReturn:
        raise TypeError("a key is never written")


@dataclass(eq=False)
class _StatusError(Exception):
    """An HTTP answer other than 2xx."""

    status: int
    said: str
    asked: float


@dataclass
class _Result:
    """What has come of a download.

    Attributes:
        body: its bytes so far. total: that there will be, where the store says so.
        tag: the store's strong name of these bytes; without one a download begins anew.
    """

    body: bytearray = field(default_factory=bytearray)
    total: int | None = None
    tag: str = ""

    def headers(self) -> dict[str, str]:
        """What asks for the rest alone, unless it is of other bytes by now."""
        return {"range": f"bytes={len(self.body)}-", "if-range": self.tag} if self.body and self.tag else {}

    def begin(self, answer: httpx.Response) -> bool:
        """Take an answer's headers; False where it does not go on with what has come."""
        tag, length = answer.headers.get("etag", ""), answer.headers.get("content-length", "")
        if answer.status_code == 206:
            place = re.fullmatch(
                r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18})", answer.headers.get("content-range", "")
            )
            fits = place is not None and (int(place[1]), int(place[2])) == (len(self.body), self.total)
            return bool(self.body) and fits and tag in ("", self.tag)
        self.body.clear()
        self.total = int(length) if re.fullmatch(r"[0-9]{1,18}", length) else None
        self.tag = tag if re.fullmatch(r'"[!#-~]*"', tag) else ""
        return True


class Connection:
    """One service, by its URL, and one key for it.

    Args:
        parallel: whose threads use it, and end together.
        report: called with each wait for another try.

    Raises:
        RemoteError: the URL is none.
    """

    def __init__(self, given: str, key: Key, limits: Limits, parallel: OrderedMap, report: Notify | None) -> None:
        self.host, self.limits, self.key, self._parallel, self._report = address(given), limits, key, parallel, report
        self.traffic, self._deadline, self._given = Traffic(), Deadline(), given.rstrip("/")
        connect = min(10.0, limits.patience)
        self._silence = min(ANSWER, max(1.0, limits.patience / 4))
        take = min(TAKE, max(1.0, limits.patience / 2))
        self._short = httpx.Timeout(connect, read=self._silence)
        self._long = httpx.Timeout(connect, read=take, write=take)
        self.open()

    def open(self) -> None:
        """Begin without connections: they belong to one process, and a fork must not share them with its parent."""
        self._count = threading.Lock()
        # One connection for each request in flight: by default httpx lets those beyond 100 time out. Nothing is
        # compressed on the way: how large it becomes would be found out too late.
        how: dict[str, Any] = {
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=self.limits.in_flight),
            "headers": {"accept-encoding": "identity"},
            "follow_redirects": False,
        }
        service = httpx.Client(base_url=self._given, auth=self.key, **how)
        # Stores of results are other hosts: they never see the key.
        self._service, self._stores = (
            bounded(client, self._deadline) for client in (service, httpx.Client(timeout=self._long, **how))
        )
        self._closing = [weakref.finalize(self, client.close) for client in (self._service, self._stores)]

    def forked(self) -> None:
        """Begin anew in a forked process: the parent goes on with its connections, which are not closed here."""
        for closing in self._closing:
            closing.detach()
        self.open()

    def said(self, text: str, limit: int) -> str:
        """What a server says as it may be shown: on a line, without control characters, without the key."""
        return printable(re.sub(r"\s+", " ", self.key.scrub(text)).strip(), limit).rstrip(".")

    def exchange(self, method: str, path: str, missing: bool = False, work: bool = False, **content: Any) -> Any:
        """One answer's JSON; None for a 404 where that may be.

        Args:
            work: a request that takes its time to be sent.
        """
        timeout, most = (self._long, self.limits.wait) if work else (self._short, 3 * self._silence)

        def once() -> Any:
            with self._deadline.within(most), self._service.stream(method, path, timeout=timeout, **content) as answer:
                body = whole(answer)
                if missing and answer.status_code == 404:
                    return None
                self._accept(answer, body)
                return jsontext.parse(body)

        return self._persist(once, path)

    def download(self, where: str) -> bytearray:
        """The bytes of a result.

        Raises:
            TooLargeError: it is larger than a result may be.
            RefusedError: the store refuses it, or does not have it.
        """
        store, got, ends = address(where), _Result(), time.monotonic() + self.limits.wait

        def once() -> bytearray:
            headers, left = got.headers(), ends - time.monotonic()
            if left <= 0:
                come = f"{shown(len(got.body))} in {self.limits.wait:.0f} s"
                raise self.error(f"sent no more of a result than {come}", "try again later, or use fewer prompts")
            with self._deadline.within(left), self._stores.stream("GET", where, headers=headers) as answer:
                if answer.status_code not in (200, 206, 416):
                    self._accept(answer, whole(answer))
                if answer.status_code == 416 or not got.begin(answer):
                    got.body.clear()
                    raise httpx.RemoteProtocolError("it sent another part than was asked for")
                self.check_size(got.total or 0)
                for part in answer.iter_raw():
                    got.body += part
                    self.check_size(len(got.body))
                    self.sleep(0.0)
            if got.total not in (None, len(got.body)):
                raise httpx.RemoteProtocolError("it sent fewer bytes than it said")
            return got.body

        body = self._persist(once, "a result", store, lambda: len(got.body))
        with self._count:
            self.traffic.received += len(body)
        return body

    def check_size(self, size: int) -> None:
        """Refuse a result of so many bytes, or one that is decompressed to as many, if that is more than it may be."""
        if size > self.limits.result:
            rule = f"is more than {shown(self.limits.result)}"
            raise TooLargeError(f"a result of {self.host}", rule, "use fewer prompts at a time")

    def sent(self, size: int) -> None:
        """Count a request."""
        with self._count:
            self.traffic.requests += 1
            self.traffic.sent += size
            self.traffic.largest = max(self.traffic.largest, size)

    def again(self, why: str, attempt: int, started: float, asked: float = 0.0) -> None:
        """Wait before the next try: exponential backoff with jitter, and at least as long as the server `asked` for."""
        with self._count:
            self.traffic.retries += 1
        longest = min(30.0, self.limits.patience / 4)
        pause = max(asked, min(longest, 0.25 * 2 ** min(attempt - 1, 20)) * (0.5 + random.random()))
        log.info("%s: %s; again in %d s", self.host, why, math.ceil(pause))
        if self._report is not None:
            self._report(f"{self.host}, {time.monotonic() - started:.0f} s, {why}; again in {math.ceil(pause)} s")
        self.sleep(pause)

    def sleep(self, seconds: float) -> None:
        """Wait, unless the map that this thread belongs to is cancelled.

        Raises:
            RemoteError: it was.
        """
        try:
            self._parallel.sleep(seconds)
        except EndedError:
            raise self.error("a job was abandoned, since another one failed", "see the error before this one") from None

    def error(self, rule: str, step: str) -> RemoteError:
        """About the service."""
        return RemoteError(f"server {self.host}", rule, step)

    def stranger(self, what: str) -> RemoteError:
        """What answered is no NDIF server."""
        return self.error(f"gave an answer to {what} that does not come from an NDIF server", "check NDIF_HOST")

    def _persist(
        self, once: Callable[[], Answer], what: str, store: str = "", come: Callable[[], int] = lambda: 0
    ) -> Answer:
        """Retry until it works, patience ends, or another try would be useless.

        Args:
            store: of a result. come: how many bytes have; patience begins anew with more.
        """
        started, attempt, most = time.monotonic(), 0, 0
        while True:
            limit, asked = self.limits.patience, 0.0
            try:
                return once()
            except _StatusError as refusal:
                problem = self._refused(refusal, store)
                if refusal.status not in RETRIED:
                    raise problem from None
                if refusal.status in BUSY:
                    limit, asked = max(limit, self.limits.busy), refusal.asked
            except (httpx.TransportError, httpx.StreamError) as error:
                problem = self._unreachable(error, store)
                if isinstance(error, httpx.LocalProtocolError | httpx.UnsupportedProtocol):
                    raise problem from None  # the request itself is malformed: another try would fail too
                # No server at all, and no work there yet that waiting could save.
                if self.traffic.requests == 0 and isinstance(error, httpx.ConnectError) and attempt >= 2:
                    raise problem from None
            except ValueError:
                raise self.stranger(what) from None
            if come() > most:
                started, attempt, most = time.monotonic(), 0, come()
            attempt += 1
            if time.monotonic() - started + asked > limit:
                raise problem
            self.again(problem.rule, attempt, started, asked)

    def _accept(self, answer: httpx.Response, body: bytes) -> None:
        """Raise what a refusal says, its body read."""
        if not answer.is_success:
            text = answer.headers.get("location", "") if answer.is_redirect else _detail(body) or answer.reason_phrase
            asked = retry_after(answer.headers.get("retry-after", ""))
            raise _StatusError(answer.status_code, self.said(text, 160), asked)

    def _refused(self, refusal: _StatusError, store: str) -> RefusedError:
        return RefusedError(refusal.status, f"server {self.host}", *self._why(refusal.status, refusal.said, store))

    def _why(self, status: int, said: str, store: str) -> tuple[str, str]:
        """The rule and the next step."""
        if store and status not in RETRIED:  # the key was not sent there
            return f"its store of results, {store}, answered {status} {said}", "try again, and tell its operator"
        if status in (401, 403) or "api key" in said.lower():
            rule = f"refused the key ({said})" if self.key.given else "needs a key, and none is set"
            return rule, "set NDIF_API_KEY, or run 'nnsight login'; keys come from https://login.ndif.us"
        rule, step = f"answered {status} {said}", "check the address, and the versions with 'tracer doctor --remote'"
        if status in RETRIED:
            busy = f"is busy or failing: {status} {said}"
            rule, step = f"its store of results, {store}, {busy}" if store else busy, "try again later"
        elif status == 413:
            rule, step = f"takes no request of that size ({said})", "use fewer prompts at a time"
        elif status in (400, 422) and "version" in said.lower():
            rule, step = f"refused this client's version ({said})", "install the versions that it names"
        elif 300 <= status < 400:  # the key goes nowhere but where the user said
            rule = f"answered {status} and points to {said or 'nowhere'}"
            step = "set NDIF_HOST to the server's own address"
        return rule, step

    def _unreachable(self, error: Exception, store: str) -> RemoteError:
        rule = "did not answer in time" if isinstance(error, httpx.TimeoutException) else "cannot be reached"
        # A protocol error quotes the request, the key included.
        quotes = isinstance(error, httpx.LocalProtocolError)
        reason = type(error).__name__ if quotes else self.said(str(error) or type(error).__name__, 120)
        if store:
            step = "check the network; a server of your own names its store in NDIF_OBJECT_STORE_PUBLIC_URL"
            return self.error(f"its store of results, {store}, {rule} ({reason})", step)
        return self.error(f"{rule} ({reason})", "check NDIF_HOST and the network, or try again later")


def address(given: str) -> str:
    """The name, and the port, of the server at a URL.

    Raises:
        RemoteError: it is not a URL of a server.
    """
    host = _host(given)
    if not host:
        rule = "is not an http:// or https:// address"
        raise RemoteError(f"host {quoted(given)}", rule, "set NDIF_HOST, or host= (host: in a job)")
    return host


def _host(given: str) -> str:
    try:
        parts = urlsplit(given)
        port, host = parts.port, parts.hostname if parts.scheme in ("http", "https") else None
        httpx.URL(given)
    except (ValueError, httpx.InvalidURL):
        return ""
    return f"{host}:{port}" if host and port else host or ""


def is_address(given: object) -> bool:
    """Whether something that a server said is a URL of a server."""
    return isinstance(given, str) and bool(_host(given))


def in_clear(given: str) -> bool:
    """Whether what is sent to a URL can be read on its way: http:// to another machine."""
    parts = urlsplit(given)
    name = parts.hostname or ""
    try:
        here = ipaddress.ip_address(name).is_loopback
    except ValueError:
        here = name == "localhost" or name.endswith(".localhost")
    return parts.scheme == "http" and not here


def shown(count: int) -> str:
    """A number of bytes."""
    return f"{count / MIB:,.0f} MiB" if count >= MIB else f"{count:,} bytes"


def _parts(answer: httpx.Response) -> Iterator[bytes]:
    """The bytes of an answer; one that is compressed although that was not asked for is refused."""
    if answer.headers.get("content-encoding", "identity").lower() != "identity":
        raise ValueError("compressed")
    return answer.iter_raw()


def whole(answer: httpx.Response, most: int = ANSWER_BYTES) -> bytes:
    """The bytes of an answer that is no result.

    Raises:
        ValueError: there are more than `most`, or they are compressed.
    """
    body = bytearray()
    for part in _parts(answer):
        body += part
        if len(body) > most:
            raise ValueError("no answer is as long")
    return bytes(body)


def _detail(body: bytes) -> str:
    """What a refusal says; nothing if it is no JSON."""
    try:
        said = jsontext.parse(body)
        return str(said.get("detail", said) if isinstance(said, dict) else said)
    except ValueError:
        return ""


def retry_after(header: str) -> float:
    """The seconds of a Retry-After header, a number or a date, two minutes at most; 0 where it holds neither."""
    if re.fullmatch(r"[0-9]+", header.strip()):
        return min(120.0, float(header))
    try:
        then = parsedate_to_datetime(header)
        return min(120.0, max(0.0, (then - datetime.now(UTC)).total_seconds()))
    except (ValueError, TypeError, OverflowError):  # no date, or one without a zone
        return 0.0
