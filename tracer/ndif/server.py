"""The client of NDIF: one server as one key sees it, requests in flight, retries, results.

A traced block is serialised here, submitted without a socket, polled until it is done, and its saved values put where
the block's own would be. Busy servers, timeouts, cut connections and forgotten jobs are tried again with growing,
jittered pauses; every wait has a limit; whatever remains is one `RemoteError`. Results are read as plain tensors and
containers, never as pickled objects. Knows nnsight's protocol; refuses to know what a block computes, and to write
the key anywhere: it is in no representation, message or file.
"""

from __future__ import annotations

import io
import logging
import math
import os
import random
import re
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

import httpx
import nnsight
import torch
import zstandard
from nnsight.intervention.backends import remote as nnsight_remote
from nnsight.schema.config import CONFIG
from nnsight.schema.request import RequestModel
from nnsight.schema.response import ResponseModel, Status
from nnsight.tracing.backend import Backend
from nnsight.tracing.tracer import mark
from nnsight.tracing.util import push
from pydantic import ValidationError

from tracer.errors import RemoteError, quoted
from tracer.forks import after_fork
from tracer.model.backend import Grants
from tracer.ndif import payload
from tracer.ndif.parallel import EndedError, OrderedMap
from tracer.settings import IN_FLIGHT

log = logging.getLogger(__name__)

MIB = 2**20
RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP answers that are worth another try."""
BUSY = frozenset({429, 503})
"""Those of a server that is there, and asks for patience."""
ANSWER = 20.0
"""Seconds for an answer that needs no work."""
TAKE = 60.0
"""Seconds without a byte while a request is taken, or a result sent."""
PASSING = ("try again", "evicted", "preempted", "temporarily", "restarting", "cached (warm)", "was cancelled")
"""What a failed job says where the server, not the job, was at fault."""

UNREADABLE = (
    zstandard.ZstdError,
    RuntimeError,
    ValueError,
    EOFError,
    OSError,
    torch.serialization.pickle.UnpicklingError,
)
"""What a damaged result raises, or one that holds more than tensors and plain containers."""

Part = TypeVar("Part", bound=Sequence[Any])
Answer = TypeVar("Answer")
Notify = Callable[[str], None]


class TooLargeError(RemoteError):
    """A request that the server may take in smaller parts: too many bytes, or more memory than it has."""


@dataclass(frozen=True)
class Limits:
    """How long to wait and how much to send.

    Attributes:
        wait: seconds from a job's submission to its result.
        patience: seconds without an answer from the server before it counts as down. busy: seconds that it may turn
            requests away as too many.
        lost: seconds after which a job that the server does not know is submitted again.
        attempts: submissions of one job.
        in_flight: jobs at a time, over all threads.
        quiet: seconds of a job after which its state is reported, and between reports of the same state.
        request: bytes of one request; larger ones are split where they can be. result: bytes of one result.
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


@dataclass(frozen=True, eq=False)
class Remote:
    """Where a remote model runs.

    Attributes:
        server, deployment: the service, and its own key of the model.
        environment: what nnsight has the server set for a request: the attention kernel.
        grants: what was measured there.
        transfer_dtype: the dtype in which nodes' values and gradients come back.
        guard: a context in which every block runs there, unless it can read the weights.
    """

    server: Server
    deployment: str
    environment: dict[str, Any]
    grants: Grants
    transfer_dtype: torch.dtype = torch.float32
    guard: Callable[[], Any] | None = None

    def backend(self) -> Request:
        """What sends the next traced block."""
        return Request(self.server, self.deployment, self.environment, None if self.grants.weights else self.guard)


class _Key(httpx.Auth):
    """The key, which is put on requests to the server and can be read by nothing else."""

    def __init__(self, key: str) -> None:
        if not re.fullmatch(r"[!-~]*", key):
            # Not quoted: apart from the wrong character it is secret.
            rule = "holds a line break, a space or another character that no key has"
            raise RemoteError("the key in NDIF_API_KEY or nnsight's configuration", rule, "copy it again, on one line")
        self._sign = lambda headers: headers.__setitem__("ndif-api-key", key) if key else None
        self.scrub = lambda text: text.replace(key, "<key>") if key else text
        self.given = bool(key)

    def auth_flow(self, request: httpx.Request) -> Iterator[httpx.Request]:  # type: ignore[override]
        self._sign(request.headers)
        yield request

    def __reduce__(self) -> NoReturn:
        raise TypeError("an NDIF key is never written")


@dataclass
class Traffic:
    """Requests and bytes so far."""

    requests: int = 0
    sent: int = 0
    largest: int = 0
    received: int = 0
    retries: int = 0


class Server:
    """One NDIF service and one key for it.

    Args:
        host: its URL; by default ``NDIF_HOST``, or nnsight's configuration. The key is ``NDIF_API_KEY``, or nnsight's.
        report: called with each change of a job's state.

    Raises:
        RemoteError: the host is not a URL.
    """

    def __init__(self, host: str | None = None, limits: Limits | None = None, report: Notify | None = None) -> None:
        given = (os.environ.get("NDIF_HOST") or CONFIG.API.HOST) if host is None else host
        self.host = _address(given)
        nnsight.register("tracer")  # not installed on the server: our functions travel as source
        self.limits, self.report, self.traffic = limits or Limits(), report, Traffic()
        self._key = _Key((os.environ.get("NDIF_API_KEY") or CONFIG.API.APIKEY or "").strip())
        timeout = httpx.Timeout(min(10.0, self.limits.patience), read=min(ANSWER, max(1.0, self.limits.patience / 4)))
        take = min(TAKE, max(1.0, self.limits.patience / 2))
        self._long = httpx.Timeout(min(10.0, self.limits.patience), read=take, write=take)
        # One connection for each request in flight: by default httpx lets those beyond 100 time out.
        pool = httpx.Limits(max_connections=None, max_keepalive_connections=self.limits.in_flight)
        self._client = httpx.Client(base_url=given.rstrip("/"), auth=self._key, timeout=timeout, limits=pool)
        # Result stores are other hosts: they never see the key.
        self._plain = httpx.Client(timeout=self._long, limits=pool)
        self._closing = [weakref.finalize(self, client.close) for client in (self._client, self._plain)]
        self._slots = threading.BoundedSemaphore(self.limits.in_flight)
        self._count = threading.Lock()
        self._parallel = OrderedMap(self.limits.in_flight)
        after_fork(self, lambda server: server._forked(given))

    def _forked(self, host: str) -> None:
        """Begin anew in a forked process: the parent goes on with its connections, and its threads hold the locks."""
        for closing in self._closing:
            closing.detach()
        Server.__init__(self, host, self.limits, self.report)

    def __repr__(self) -> str:
        return f"Server({self.host})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a connection to NDIF is never written")

    @property
    def has_key(self) -> bool:
        return self._key.given

    def status(self) -> dict[str, dict[str, Any]]:
        """The deployments that can be used, by model key.

        Raises:
            RemoteError: the server cannot be reached, or is not an NDIF server.
        """
        body = self._json("/status")
        deployments = body.get("deployments") if isinstance(body, dict) else None
        if not isinstance(deployments, dict):
            raise self._no_server("/status")
        usable: dict[str, dict[str, Any]] = {}
        for name, deployment in deployments.items():
            up = isinstance(deployment, dict) and deployment.get("deployment_level") in ("HOT", "WARM")
            if up and deployment.get("application_state") != "UNHEALTHY":
                usable.setdefault(str(deployment.get("model_key") or name), deployment)
        return usable

    def environment(self) -> dict[str, str]:
        """Package versions there, and ``python``; empty where the server does not say."""
        try:
            body = self._json("/env")
        except _RefusedError as error:
            if error.status == 404:
                return {}
            raise
        packages = body.get("packages") if isinstance(body, dict) else None
        if not isinstance(packages, dict):
            raise self._no_server("/env")
        python = str(body.get("python_version", "")).split(" ")[0]
        return {str(name): str(version) for name, version in packages.items()} | {"python": python}

    def each(self, function: Callable[[Part], Answer], parts: Sequence[Part]) -> list[Answer]:
        """`function` of every part, in order, as many at a time as may be in flight. A part that is too large is
        halved as long as it can be, so that there may be more answers than parts; the first error stops the rest."""

        def halved(part: Part) -> list[Answer]:
            try:
                return [function(part)]
            except TooLargeError:
                if len(part) < 2:
                    raise
            middle = len(part) // 2
            return halved(part[:middle]) + halved(part[middle:])  # type: ignore[arg-type]

        return [answer for answers in self.stream(halved, parts) for answer in answers]

    def stream(self, function: Callable[[Part], Answer], parts: Sequence[Part]) -> Iterator[Answer]:
        """`each` without halving, each answer as soon as those before it are out; see `OrderedMap.stream`."""
        return self._parallel.stream(function, parts)

    def run(self, deployment: str, environment: dict[str, Any], blob: bytes, compressed: bool) -> dict[str, Any]:
        """Submit a block, wait for it, and return what it saved.

        Raises:
            RemoteError: it failed, or took longer than the limits.
        """
        if len(blob) > self.limits.request:
            rule = f"at most {_size(self.limits.request)} are sent at a time"
            raise TooLargeError(f"a request of {_size(len(blob))}", rule, "use fewer prompts")
        with self._slots:
            self.sleep(0.0)  # while it waited for a slot, its map may have been cancelled
            started, attempt = time.monotonic(), 0
            while True:
                attempt += 1
                number = self._submit(deployment, environment, blob, compressed)
                job = self._wait(number, started)
                if job is not None and job.status == Status.COMPLETED:
                    return self._download(job.data, compressed)
                if job is not None and not _passing(job.description):
                    raise self._failed(job.description)
                if attempt >= self.limits.attempts:
                    reason = "the server lost it" if job is None else self._reason(job.description)
                    raise self._error(f"gave up after {attempt} submissions ({reason})", "try again later")
                self._again("submitting a job again", attempt, started)

    def sleep(self, seconds: float) -> None:
        """Wait, unless the map that this thread belongs to is cancelled.

        Raises:
            RemoteError: it was.
        """
        try:
            self._parallel.sleep(seconds)
        except EndedError:
            raise self._error(
                "a job was abandoned, since another one failed", "see the error before this one"
            ) from None

    # From submission to result.

    def _submit(self, deployment: str, environment: dict[str, Any], blob: bytes, compressed: bool) -> str:
        envelope = RequestModel(model_key=deployment, compress=compressed, env=environment).metadata()
        headers = {"nnsight-version": nnsight_remote._NNSIGHT_VERSION, "python-version": sys.version}
        answer = self._exchange(
            "POST",
            "/request",
            data={"data": envelope},
            files={"blob": ("request", blob, "application/octet-stream")},
            headers=headers | {"ndif-timestamp": repr(time.time())},
            timeout=self._long,
        )
        with self._count:
            self.traffic.requests += 1
            self.traffic.sent += len(blob)
            self.traffic.largest = max(self.traffic.largest, len(blob))
        return self._response(answer).id

    def _wait(self, number: str, started: float) -> ResponseModel | None:
        """The job's last state; None if the server does not know it (any more)."""
        submitted, reported, pause = time.monotonic(), ("", 0.0), 0.01
        while True:
            answer = self._exchange("GET", f"/response/{number}", missing=True)
            now = time.monotonic()
            if answer is not None:
                job = self._response(answer)
                if job.status in (Status.COMPLETED, Status.ERROR):
                    return job
                reported = self._report_state(job, now - started, reported)
            elif now - submitted > (min(self.limits.lost, 5.0) if reported[0] else self.limits.lost):
                return None
            if now - started > self.limits.wait:
                state = reported[0] or "not known to the server"
                raise self._error(
                    f"a job was not done after {now - started:.0f} s ({state})",
                    "try again later, or use fewer prompts at a time",
                )
            self.sleep(pause * (0.5 + random.random()))
            pause = min(1.5 * pause, 2.0)

    def _report_state(self, job: ResponseModel, seconds: float, before: tuple[str, float]) -> tuple[str, float]:
        """Report a job's state if it changed; returns the state, and when it was last reported."""
        state = self._key.scrub(f"{job.status.value.lower()}: {job.description}".strip(": "))[:200]
        previous, last = before
        changed = seconds >= self.limits.quiet and (
            state != previous or not last or seconds - last > self.limits.quiet + 5
        )
        if changed and self.report is not None:
            self.report(f"{self.host}, {seconds:.0f} s, {state}")
        return state, seconds if changed else last

    def _download(self, data: Any, compressed: bool) -> dict[str, Any]:
        if not isinstance(data, str) or not data.startswith(("http://", "https://")):
            raise self._error("sent no address for a result", "check the versions with 'tracer doctor --remote'")

        def fetch() -> bytes:
            parts, size = [], 0
            with self._plain.stream("GET", data) as answer:
                answer.raise_for_status()
                for part in answer.iter_bytes(MIB):
                    parts.append(part)
                    size += len(part)
                    if size > self.limits.result:
                        rule = f"is more than {_size(self.limits.result)}"
                        raise TooLargeError(f"a result of {self.host}", rule, "use fewer prompts at a time")
            return b"".join(parts)

        body = self._persist(fetch, "a result")
        with self._count:
            self.traffic.received += len(body)
        try:
            if compressed:
                body = zstandard.ZstdDecompressor().decompress(body, max_output_size=self.limits.result)
            saved = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
        except UNREADABLE as error:
            raise self._error(
                f"sent a result that cannot be read ({type(error).__name__})", "try again; then check the versions"
            ) from None
        if not isinstance(saved, dict) or not saved:
            raise self._error("sent a result without values", "check the versions with 'tracer doctor --remote'")
        return saved

    def _failed(self, description: str) -> RemoteError:
        """The error that a failed job's description stands for."""
        said = self._reason(description)
        text = said.lower()
        if "out of memory" in text or "outofmemory" in text:
            rule = f"the server ran out of memory ({said})"
            return TooLargeError(f"job on {self.host}", rule, "use fewer or shorter prompts")
        if any(part in text for part in ("could not be read", "no module at", "persistentid", "unpickling")):
            return self._error(f"cannot read our request ({said})", "compare the versions: tracer doctor --remote")
        return JobFailedError(f"job on {self.host}", f"failed there ({said})", "check it with 'tracer doctor --remote'")

    def _reason(self, description: str) -> str:
        """The exception of a traceback, on one line; otherwise the first line."""
        lines = [line for line in description.strip().splitlines() if line.strip()]
        frames = [number for number, line in enumerate(lines) if line.startswith(" ")]
        if description.startswith("Traceback") and frames:
            lines = lines[frames[-1] + 1 :] or lines[-1:]
        said = lines[0].strip() if lines else "it did not say why"
        return self._key.scrub(said)[:200].rstrip(".")

    # HTTP, with retries.

    def _exchange(self, method: str, path: str, missing: bool = False, **content: Any) -> Any:
        """One answer's JSON; None for a 404 where that may be."""

        def once() -> Any:
            answer = self._client.request(method, path, **content)
            if missing and answer.status_code == 404:
                return None
            answer.raise_for_status()
            return answer.json()

        return self._persist(once, path)

    def _json(self, path: str) -> Any:
        return self._exchange("GET", path)

    def _persist(self, once: Callable[[], Any], what: str) -> Any:
        """Retry until it works, patience ends, or another try would be useless."""
        started, attempt = time.monotonic(), 0
        while True:
            limit, asked = self.limits.patience, 0.0
            try:
                return once()
            except httpx.HTTPStatusError as error:
                status, said = error.response.status_code, self._said(error.response)
                problem = _RefusedError(status, *self._refusal(status, said))
                if status not in RETRIED:
                    raise problem from None
                if status in BUSY:
                    limit, asked = max(limit, self.limits.busy), _seconds(error.response.headers.get("retry-after"))
            except (httpx.TransportError, httpx.StreamError) as error:
                problem = self._unreachable(error)
                if isinstance(error, httpx.LocalProtocolError | httpx.UnsupportedProtocol):
                    raise problem from None  # the request itself is malformed: another try would fail too
                # No server at all, and no work there yet that waiting could save.
                if self.traffic.requests == 0 and isinstance(error, httpx.ConnectError) and attempt >= 2:
                    raise problem from None
            except ValueError:
                raise self._no_server(what) from None
            attempt += 1
            if time.monotonic() - started + asked > limit:
                raise problem
            self._again(problem.rule, attempt, started, asked)

    def _again(self, why: str, attempt: int, started: float, asked: float = 0.0) -> None:
        """Wait before the next try: exponential backoff with jitter, and at least as long as the server `asked` for."""
        with self._count:
            self.traffic.retries += 1
        longest = min(30.0, self.limits.patience / 4)
        pause = max(asked, min(longest, 0.25 * 2 ** min(attempt - 1, 20)) * (0.5 + random.random()))
        log.info("%s: %s; again in %d s", self.host, why, math.ceil(pause))
        if self.report is not None:
            self.report(f"{self.host}, {time.monotonic() - started:.0f} s, {why}; again in {math.ceil(pause)} s")
        self.sleep(pause)

    def _said(self, answer: httpx.Response) -> str:
        """The text of a refusal, with the key removed: the real server repeats a malformed key in it."""
        try:
            answer.read()
            body = answer.json()
            text = str(body.get("detail", body)) if isinstance(body, dict) else str(body)
        except (ValueError, httpx.HTTPError):
            text = answer.reason_phrase
        return re.sub(r"\s+", " ", self._key.scrub(text)).strip()[:160].rstrip(".")

    def _refusal(self, status: int, said: str) -> tuple[str, str, str]:
        server = f"server {self.host}"
        if status in (401, 403) or "api key" in said.lower():
            rule = f"refused the key ({said})" if self.has_key else "needs a key, and none is set"
            return server, rule, "set NDIF_API_KEY, or run 'nnsight login'; keys come from https://login.ndif.us"
        if status == 413:
            return server, f"takes no request of that size ({said})", "use fewer prompts at a time"
        if status in (400, 422) and "version" in said.lower():
            return server, f"refused this client's version ({said})", "install the versions that it names"
        if status in RETRIED:
            return server, f"is busy or failing: {status} {said}", "try again later"
        return server, f"answered {status} {said}", "check the address, and the versions with 'tracer doctor --remote'"

    def _unreachable(self, error: Exception) -> RemoteError:
        rule = "did not answer in time" if isinstance(error, httpx.TimeoutException) else "cannot be reached"
        # A protocol error quotes the request, the key included.
        quotes = isinstance(error, httpx.LocalProtocolError)
        reason = type(error).__name__ if quotes else self._key.scrub(str(error) or type(error).__name__)[:120]
        return self._error(f"{rule} ({reason})", "check NDIF_HOST and the network, or try again later")

    def _no_server(self, what: str) -> RemoteError:
        return self._error(f"gave an answer to {what} that does not come from an NDIF server", "check NDIF_HOST")

    def _error(self, rule: str, step: str) -> RemoteError:
        return RemoteError(f"server {self.host}", rule, step)

    def _response(self, body: Any) -> ResponseModel:
        try:
            return ResponseModel.model_validate(body)
        except ValidationError:
            raise self._no_server("a request") from None


class JobFailedError(RemoteError):
    """A block raised on the server."""


class _RefusedError(RemoteError):
    """An HTTP answer that refuses the request."""

    def __init__(self, status: int, value: str, rule: str, next_step: str) -> None:
        super().__init__(value, rule, next_step)
        self.status = status


def _passing(description: str) -> bool:
    """Whether a job failed because of the server's state, not because of what it computes."""
    return "Traceback" not in description and any(part in description.lower() for part in PASSING)


def _address(given: str) -> str:
    """The name, and the port, of the server at a URL.

    Raises:
        RemoteError: it is not a URL of a server.
    """
    try:
        parts = urlsplit(given)
        port, host = parts.port, parts.hostname if parts.scheme in ("http", "https") else None
        httpx.URL(given)
    except (ValueError, httpx.InvalidURL):
        host = port = None
    if not host:
        rule = "is not an http:// or https:// address"
        raise RemoteError(f"host {quoted(given)}", rule, "set NDIF_HOST, or host= (host: in a job)")
    return f"{host}:{port}" if port else host


def _seconds(header: str | None) -> float:
    """The seconds of a Retry-After header, two minutes at most; 0 where it holds no number."""
    return min(120.0, float(header)) if header is not None and header.strip().isdigit() else 0.0


def _size(count: int) -> str:
    return f"{count / MIB:,.0f} MiB" if count >= MIB else f"{count:,} bytes"


@dataclass(eq=False)
class Request(Backend):
    """Runs one traced block on a server: what nnsight calls when the block ends."""

    server: Server
    deployment: str
    environment: dict[str, Any] = field(default_factory=dict)
    guard: Callable[[], Any] | None = None

    def __call__(self, tracer: Any = None) -> None:
        blob = payload.serialized(tracer, self.guard)
        saved = self.server.run(self.deployment, self.environment, blob, compressed=True)
        for value in saved.values():
            mark(value)
        push(tracer.info.frame, saved)
