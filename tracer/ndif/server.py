"""The client of NDIF: one server as one key sees it, requests in flight, and what comes of a job.

A traced block is serialised here, submitted without a socket, polled until it is done, and its saved values put where
the block's own would be. Forgotten jobs and lost results are submitted again; whatever remains is one `RemoteError`.
Knows nnsight's protocol; refuses to know HTTP (ndif/connection.py), how a result is read (ndif/results.py), what a
block computes, and to write the key anywhere: it is in no representation, message or file.
"""

from __future__ import annotations

import os
import random
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NoReturn

import nnsight
import torch
from nnsight.intervention.backends import remote as nnsight_remote
from nnsight.schema.config import CONFIG
from nnsight.schema.request import RequestModel
from nnsight.schema.response import ResponseModel, Status
from nnsight.tracing.backend import Backend
from nnsight.tracing.tracer import mark
from nnsight.tracing.util import push
from pydantic import ValidationError

from tracer.errors import RemoteError, option, quoted, say
from tracer.model.backend import Answer, Part
from tracer.ndif import forms, payload, results
from tracer.ndif.connection import (
    GONE,
    Connection,
    Key,
    Limits,
    Notify,
    RefusedError,
    TooLargeError,
    Traffic,
    address,
    in_clear,
    is_address,
    shown,
)
from tracer.ndif.parallel import OrderedMap
from tracer.system.forks import after_fork

PASSING = ("try again", "evicted", "preempted", "temporarily", "restarting", "cached (warm)", "was cancelled")
"""What a failed job says where the server, not the job, was at fault."""
VERSION = re.compile(r"[0-9A-Za-z.+!_-]{1,60}")
"""A package's version; a message tells the user to install it."""
UNKNOWN = "?"
"""Instead of a version that is none."""
NUMBER = re.compile(r"[0-9A-Za-z_-]{1,100}")
"""A job's, which goes into an address."""
CHECK = "check the versions with 'tracer doctor --remote'"


@dataclass(frozen=True)
class Grants:
    """What a server was measured to grant one key on one model (see ndif/probe.py).

    Attributes:
        gradients: whether gradients can be taken there; `reason` says why not.
        weights: whether a block can read them.
        fingerprint: of the weights there, or a text that says that they were not read.
        dtype: of the activations there. quantized: whether some weights are not floating-point.
    """

    gradients: bool
    reason: str
    weights: bool
    fingerprint: str
    dtype: torch.dtype
    quantized: bool


@dataclass(frozen=True, eq=False)
class Remote:
    """The backend of a remote model.

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
    near: bool = False

    @property
    def host(self) -> str:
        return self.server.host

    @property
    def gradients(self) -> bool:
        return self.grants.gradients

    @property
    def reason(self) -> str:
        return self.grants.reason

    @property
    def quantized(self) -> bool:
        return self.grants.quantized

    def trace(self, form: Any = None) -> Request:
        """What sends the next traced block, and refuses an answer that has not the form."""
        guard = None if self.grants.weights else self.guard
        return Request(self.server, self.deployment, self.environment, guard, form)

    def session(self, nn: Any, plan: SimpleNamespace, function: Callable[..., Answer], ask: Any, form: Any) -> Answer:
        """`function` travels as its source."""
        with nn.session(backend=self.trace(form)):
            result = nnsight.save(function(nn, plan, ask))
        return result  # noqa: RET504  what the block saved

    def each(self, function: Callable[[Part], Answer], parts: Sequence[Part]) -> list[Answer]:
        return self.server.each(function, parts)

    def stream(self, function: Callable[[Part], Answer], parts: Sequence[Part]) -> Iterator[Answer]:
        return self.server.stream(function, parts)

    def sleep(self, seconds: float) -> None:
        self.server.sleep(seconds)

    def check(self, module: Any) -> None:
        """Whatever the module here is, it computes nothing."""

    def shows_weights(self, _: Any) -> bool:
        return self.grants.weights and not self.grants.quantized

    def survives_fork(self, _: Any) -> bool:
        return True

    def device(self, _: Any) -> torch.device:
        """The CPU: the server moves inputs itself."""
        return torch.device("cpu")

    def dtype(self, _: Any) -> torch.dtype:
        return self.grants.dtype

    def fingerprint(self, _: Any) -> str:
        """As it was taken there."""
        return self.grants.fingerprint

    def budget(self, _: Any) -> int:
        """Four times what one request may hold."""
        return 4 * self.server.limits.request


def unencrypted(host: str | None) -> str:
    """What to say before a key is sent to a host where others can read it on its way; nothing where they cannot.

    Args:
        host: as `Server` takes it.
    """
    given = _given(host)
    if not _key().given or not in_clear(given):
        return ""
    where = "NDIF_HOST" if host is None else option("host")
    rule = "http:// to another machine sends the key and all results unencrypted: who is on the way can read and change"
    return f"{where} {address(given)}: {rule} them; use https:// if the server has it"


def _given(host: str | None) -> str:
    return (os.environ.get("NDIF_HOST") or CONFIG.API.HOST) if host is None else host


def _key() -> Key:
    return Key((os.environ.get("NDIF_API_KEY") or CONFIG.API.APIKEY or "").strip())


class Server:
    """One NDIF service and one key for it.

    Args:
        host: its URL; by default ``NDIF_HOST``, or nnsight's configuration. The key is ``NDIF_API_KEY``, or nnsight's.
        report: called with each change of a job's state.

    Raises:
        RemoteError: the host is not a URL.
    """

    def __init__(self, host: str | None = None, limits: Limits | None = None, report: Notify | None = None) -> None:
        nnsight.register("tracer")  # not installed on the server: our functions travel as source
        self.limits, self.report = limits or Limits(), report
        self._parallel = OrderedMap(self.limits.in_flight)
        self._slots = threading.BoundedSemaphore(self.limits.in_flight)
        self._http = Connection(_given(host), _key(), self.limits, self._parallel, report)
        after_fork(self, Server._forked)
        if warning := unencrypted(host):
            say([warning])

    def _forked(self) -> None:
        """In a child process: what the parent's threads hold, and its connections, are not the child's."""
        self._slots = threading.BoundedSemaphore(self.limits.in_flight)
        self._http.forked()

    def __repr__(self) -> str:
        return f"Server({self.host})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a connection to NDIF is never written")

    @property
    def has_key(self) -> bool:
        return self._http.key.given

    @property
    def host(self) -> str:
        """Its name, and port."""
        return self._http.host

    @property
    def traffic(self) -> Traffic:
        return self._http.traffic

    def status(self) -> dict[str, dict[str, Any]]:
        """The deployments that can be used, by model key.

        Raises:
            RemoteError: the server cannot be reached, or is not an NDIF server.
        """
        body = self._http.exchange("GET", "/status")
        deployments = body.get("deployments") if isinstance(body, dict) else None
        if not isinstance(deployments, dict):
            raise self._http.stranger("/status")
        usable: dict[str, dict[str, Any]] = {}
        for name, deployment in deployments.items():
            up = isinstance(deployment, dict) and deployment.get("deployment_level") in ("HOT", "WARM")
            if up and deployment.get("application_state") != "UNHEALTHY":
                usable.setdefault(str(deployment.get("model_key") or name), deployment)
        return usable

    def environment(self) -> dict[str, str]:
        """Package versions there, and ``python``; empty where the server does not say."""
        try:
            body = self._http.exchange("GET", "/env")
        except RefusedError as error:
            if error.status == 404:
                return {}
            raise
        packages = body.get("packages") if isinstance(body, dict) else None
        if not isinstance(packages, dict):
            raise self._http.stranger("/env")
        python = str(body.get("python_version", "")).split(" ")[0]
        versions = {str(name): str(version) for name, version in packages.items()} | {"python": python}
        return {name: version if VERSION.fullmatch(version) else UNKNOWN for name, version in versions.items()}

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
            rule = f"at most {shown(self.limits.request)} are sent at a time"
            raise TooLargeError(f"a request of {shown(len(blob))}", rule, "use fewer prompts")
        with self._slot():
            started, attempt = time.monotonic(), 0
            while True:
                attempt += 1
                number = self._submit(deployment, environment, blob, compressed)
                job, reason = self._wait(number, started), "the server lost it"
                if job is not None and job.status == Status.COMPLETED:
                    try:
                        return self._result(job.data, compressed)
                    except RefusedError as error:
                        if error.status not in GONE:
                            raise
                        reason = error.rule
                elif job is not None:
                    if not _passing(job.description):
                        raise self._failed(job.description)
                    reason = self._reason(job.description)
                if attempt >= self.limits.attempts:
                    raise self.error(f"gave up after {attempt} submissions ({reason})", "try again later")
                self._http.again("submitting a job again", attempt, started)

    @contextmanager
    def _slot(self) -> Iterator[None]:
        """One of the requests that may be in flight."""
        ends = time.monotonic() + self.limits.wait * self.limits.attempts
        while not self._slots.acquire(timeout=1.0):
            self.sleep(0.0)  # while it waits, its map may be cancelled
            if time.monotonic() > ends:
                raise self.error("had no request to spare", "try again later, with fewer prompts")
        try:
            self.sleep(0.0)
            yield
        finally:
            self._slots.release()

    def sleep(self, seconds: float) -> None:
        """As `Connection.sleep`."""
        self._http.sleep(seconds)

    # From submission to result.

    def _submit(self, deployment: str, environment: dict[str, Any], blob: bytes, compressed: bool) -> str:
        envelope = RequestModel(model_key=deployment, compress=compressed, env=environment).metadata()
        headers = {"nnsight-version": nnsight_remote._NNSIGHT_VERSION, "python-version": sys.version}
        answer = self._http.exchange(
            "POST",
            "/request",
            data={"data": envelope},
            files={"blob": ("request", blob, "application/octet-stream")},
            headers=headers | {"ndif-timestamp": repr(time.time())},
            work=True,
        )
        self._http.sent(len(blob))
        number = self._response(answer).id
        if not NUMBER.fullmatch(number):
            raise self._http.stranger("a request")
        return number

    def _wait(self, number: str, started: float) -> ResponseModel | None:
        """The job's last state; None if the server does not know it (any more)."""
        submitted, reported, pause = time.monotonic(), ("", 0.0), 0.01
        while True:
            answer = self._http.exchange("GET", f"/response/{number}", missing=True)
            now = time.monotonic()
            if answer is not None:
                job = self._response(answer)
                if job.id != number:
                    raise self.error("answered for another job than the one that was asked for", "try again")
                if job.status in (Status.COMPLETED, Status.ERROR):
                    return job
                reported = self._report_state(job, now - started, reported)
            elif now - submitted > (min(self.limits.lost, 5.0) if reported[0] else self.limits.lost):
                return None
            if now - started > self.limits.wait:
                state = reported[0] or "not known to the server"
                raise self.error(
                    f"a job was not done after {now - started:.0f} s ({state})",
                    "try again later, or use fewer prompts at a time",
                )
            self.sleep(pause * (0.5 + random.random()))
            pause = min(1.5 * pause, 2.0)

    def _report_state(self, job: ResponseModel, seconds: float, before: tuple[str, float]) -> tuple[str, float]:
        """Report a job's state if it changed; returns the state, and when it was last reported."""
        state = self._http.said(f"{job.status.value.lower()}: {job.description}".strip(": "), 200)
        previous, last = before
        changed = seconds >= self.limits.quiet and (
            state != previous or not last or seconds - last > self.limits.quiet + 5
        )
        if changed and self.report is not None:
            self.report(f"{self.host}, {seconds:.0f} s, {state}")
        return state, seconds if changed else last

    def _result(self, data: Any, compressed: bool) -> dict[str, Any]:
        """What a job saved."""
        if not is_address(data):
            raise self.error("sent no address for a result", CHECK)
        try:
            try:
                return self._read(data, compressed)
            except results.UnreadableError:
                return self._read(data, compressed)  # what was damaged on its way comes whole the second time
        except results.UnreadableError as error:
            why, step = self._http.said(str(error), 100), "try again; then check the versions"
            raise self.error(f"sent a result that cannot be read ({why})", step) from None
        except MemoryError:
            rule, step = "is more than there is memory for here", "use fewer prompts at a time"
            raise TooLargeError(f"a result of {self.host}", rule, step) from None

    def _read(self, where: str, compressed: bool) -> dict[str, Any]:
        return results.values(self._http.download(where), compressed, self._http.check_size)

    def _failed(self, description: str) -> RemoteError:
        """The error that a failed job's description stands for."""
        said = self._reason(description)
        text = said.lower()
        if "out of memory" in text or "outofmemory" in text:
            rule = f"the server ran out of memory ({said})"
            return TooLargeError(f"job on {self.host}", rule, "use fewer or shorter prompts")
        if any(part in text for part in ("could not be read", "no module at", "persistentid", "unpickling")):
            return self.error(f"cannot read our request ({said})", "compare the versions: tracer doctor --remote")
        return JobFailedError(f"job on {self.host}", f"failed there ({said})", "check it with 'tracer doctor --remote'")

    def _reason(self, description: str) -> str:
        """The exception of a traceback, on one line; otherwise the first line."""
        lines = [line for line in description.strip().splitlines() if line.strip()]
        frames = [number for number, line in enumerate(lines) if line.startswith(" ")]
        if description.startswith("Traceback") and frames:
            lines = lines[frames[-1] + 1 :] or lines[-1:]
        said = lines[0].strip() if lines else "it did not say why"
        return self._http.said(said, 200)

    def error(self, rule: str, step: str) -> RemoteError:
        """About this server."""
        return self._http.error(rule, step)

    def _response(self, body: Any) -> ResponseModel:
        try:
            return ResponseModel.model_validate(body)
        except ValidationError:
            raise self._http.stranger("a request") from None


class JobFailedError(RemoteError):
    """A block raised on the server."""


def _passing(description: str) -> bool:
    """Whether a job failed because of the server's state, not because of what it computes."""
    return "Traceback" not in description and any(part in description.lower() for part in PASSING)


@dataclass(eq=False)
class Request(Backend):
    """Runs one traced block on a server: what nnsight calls when the block ends."""

    server: Server
    deployment: str
    environment: dict[str, Any] = field(default_factory=dict)
    guard: Callable[[], Any] | None = None
    form: Any = None

    def __call__(self, tracer: Any = None) -> None:
        receipt = uuid.uuid4().hex
        blob = payload.serialized(tracer, self.guard, receipt)
        saved = self.server.run(self.deployment, self.environment, blob, compressed=True)
        if saved.get(payload.RECEIPT) != receipt:
            raise self.server.error("sent another request's result, or none that says whose it is", CHECK)
        may, must = payload.saved_names(tracer.node)
        if missing := must - saved.keys():
            raise self.server.error(f"sent a result without {quoted(min(missing))}", CHECK)
        if self.form is not None and (wrong := forms.wrong(saved[min(must)], self.form)):
            raise self.server.error(f"sent something else than was asked for ({wrong})", CHECK)
        values = {name: value for name, value in saved.items() if name in may}  # nothing else of the caller's changes
        for value in values.values():
            mark(value)
        push(tracer.info.frame, values)
