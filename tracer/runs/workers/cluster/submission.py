"""Jobs submitted to a Ray cluster: sent, followed, asked about and stopped.

A submission is `tracer run JOB.yaml` on the cluster: only the job file travels, and the run folder is on storage that
the cluster reaches. Whoever may look at the cluster sees a job's command and variables, so nothing secret goes there.
Refuses to know what a job computes.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import logging
import os
import re
import shlex
import shutil
import tempfile
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracer.errors import JobError, RunError, quoted
from tracer.runs.workers.cluster.connection import REACH, last_line, load_ray
from tracer.runs.yamlfile import parsed

LOST = 120.0
"""Seconds without an answer after which a job is no longer followed; it keeps running."""
ANSWER = 60.0
"""Seconds a job server has to answer a request: Ray's own client would wait for ever."""
QUIET = 60.0
"""Seconds without output after which the server is asked whether it is there: the connection may be cut in silence."""
LARGEST = 2**20
"""Bytes of a job file; Ray takes up to 100 MiB, but a job is a page of text."""

_SECRET = re.compile(
    r"://[^/\s@]*@|(access_key|secret_key|session_token|password)=|\bhf_\w{20,}|\bAKIA[0-9A-Z]{12,}", re.IGNORECASE
)
_ENDED = ("STOPPED", "SUCCEEDED", "FAILED")
_SHARED = "s3://", "gs://", "/"


@dataclass(frozen=True)
class Submission:
    """A job on a cluster.

    Attributes:
        id: Ray's name for it. address: of the job server.
        state: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED.
        exit_code: of `tracer run` itself; None while it runs, and where Ray never started it.
        message: what Ray says about it.
    """

    id: str
    address: str
    state: str
    exit_code: int | None = None
    message: str = ""


def submit(
    job: Path,
    address: str | None = None,
    *,
    out: str,
    options: Sequence[str] = (),
    submission_id: str | None = None,
    wait: bool = True,
    log: Callable[[str], None],
) -> Submission:
    """Run a job file on a cluster, and follow it until it ends.

    Submitting the same job with the same `out` again resumes it.

    Args:
        job: the job file; what it names must be within the cluster's reach.
        address: of the job server, e.g. ``http://HEAD:8265``; None: RAY_API_SERVER_ADDRESS, or this machine's.
        out: the run folder: an absolute path on shared storage, or an ``s3://`` or ``gs://`` address.
        options: further words of `tracer run`.
        submission_id: a new name for Ray; by default made of `out` and the time.
        wait: follow it to its end. On Ctrl-C it keeps running, and `log` says how to reach it.
        log: takes the job's output and what is said about it, line by line.

    Raises:
        JobError: something would not reach the cluster, or is secret.
        RunError: the server does not answer or refuses.
    """
    _check_job(job)
    if not out.startswith(_SHARED):
        rule = "is relative, and a node of the cluster has another current folder"
        raise JobError(f"--out {quoted(out)}", rule, "give an absolute path that all nodes share, or s3://, gs://")
    words = ["python", "-m", "tracer", "run", job.name, "--out", out, "--ray", "auto", *options]
    for word in words:
        if _SECRET.search(word):
            rule = "looks like a secret, and Ray shows a job's command to everyone"
            raise JobError("a word of the command", rule, "keep keys in the nodes' environment or a file there")
    client, address = _client(address)
    name = submission_id or _name(out)
    with tempfile.TemporaryDirectory() as folder, _readable_errors(address):
        shutil.copyfile(job, Path(folder) / job.name)
        runtime = {"working_dir": folder, "env_vars": {"PYTHONUNBUFFERED": "1"}}
        client.submit_job(entrypoint=shlex.join(words), submission_id=name, runtime_env=runtime)
    log(f"submitted {name} to {address}")
    if not wait:
        return _asked(client, name, address)
    return _followed(client, name, address, log)


def follow(address: str | None, name: str, log: Callable[[str], None]) -> Submission:
    """Show a job's output from its beginning until it ends.

    Raises:
        RunError: the server does not answer, or knows no such job.
    """
    client, address = _client(address)
    _asked(client, name, address)
    return _followed(client, name, address, log)


def status(address: str | None, name: str) -> Submission:
    """How a job is doing.

    Raises:
        RunError: the server does not answer, or knows no such job.
    """
    client, address = _client(address)
    return _asked(client, name, address)


def stop(address: str | None, name: str, limit: float = 30.0) -> Submission:
    """Stop a job: it commits what is done (SIGTERM), and is killed 3 s later by Ray.

    Args:
        limit: seconds to wait for its end.

    Raises:
        RunError: the server does not answer, or knows no such job.
    """
    client, address = _client(address)
    with _readable_errors(address):
        client.stop_job(name)
    end = time.monotonic() + limit
    while (submission := _asked(client, name, address)).state not in _ENDED and time.monotonic() < end:
        time.sleep(0.5)
    return submission


def _check_job(job: Path) -> None:
    """A job file that means the same on the cluster as here."""
    try:
        if job.stat().st_size > LARGEST:
            raise JobError(
                quoted(str(job)), f"is larger than {LARGEST} bytes", "give a job file; data stay where they are"
            )
        content, text = parsed(job, f"job {quoted(str(job))}"), job.read_text()
    except OSError as error:
        rule = f"cannot be read ({error.strerror or error})"
        raise JobError(f"job {quoted(str(job))}", rule, "give a job file") from None
    if _SECRET.search(text):
        raise JobError(quoted(str(job)), "holds what looks like a secret", "keep keys in the nodes' environment")
    for where in _relative(content):
        rule = "is relative to this machine, and a node of the cluster has another current folder"
        raise JobError(quoted(where), rule, "give an absolute path that all nodes share, or s3://, gs://")


def _relative(content: Any, key: str = "") -> Iterator[str]:
    """Paths in a job that depend on the current folder: of `path` keys, and of a model or data set that is there."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _relative(value, str(name))
    elif isinstance(content, list):
        for value in content:
            yield from _relative(value, key)
    elif isinstance(content, str) and not content.startswith(_SHARED):
        local = content.startswith((".", "~")) or content.endswith(".gguf")
        if key in ("path", "of") or (
            key in ("model", "dataset") and (local or ("/" in content and Path(content).exists()))
        ):
            yield content


def _name(out: str) -> str:
    """A new name for Ray: letters, digits and dashes of the folder's name, and the time."""
    folder = re.sub(r"[^A-Za-z0-9]+", "-", out.rstrip("/").rsplit("/", 1)[-1]).strip("-") or "run"
    return f"tracer-{folder[:40]}-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"


def _client(address: str | None) -> tuple[Any, str]:
    """A connection to the job server that answers, and its address."""
    load_ray()
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265"
    step = "give the dashboard's address, http://HEAD:8265"
    if not re.fullmatch(r"https?://[^\s/@]+(/[^\s@]*)?", address):
        raise JobError(f"--address {quoted(address)}", "is not an address of a Ray job server", step)
    address, headers = address.rstrip("/"), {}
    try:
        with urllib.request.urlopen(f"{address}/api/version", timeout=REACH) as answer:
            _ = json.load(answer)["ray_version"]
    except urllib.error.HTTPError as error:
        error.close()
        if error.code not in (401, 403):
            raise RunError(f"--address {address}", f"is not a Ray job server (HTTP {error.code})", step) from None
        headers = _token()
    except (OSError, ValueError, KeyError, TypeError, importlib.import_module("http.client").HTTPException) as error:
        rule = f"no Ray job server answers ({last_line(error)})"
        raise RunError(f"--address {address}", rule, f"{step}; 6379 and 10001 are other ports of Ray") from None
    module = importlib.import_module("ray.job_submission")
    for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)  # they log every file they send
    hidden = {name: os.environ.pop(name) for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS") if name in os.environ}
    try:
        with _readable_errors(address):  # either variable would win over the address asked for
            return _patient(module.JobSubmissionClient)(address, headers=headers or None), address
    finally:
        os.environ.update(hidden)


def _patient(client: type[Any]) -> type[Any]:
    """Ray's client, with a limit on each of its requests."""

    class Patient(client):
        def _do_request(self, *words: Any, **options: Any) -> Any:
            return super()._do_request(*words, **{"timeout": ANSWER} | options)

    return Patient


def _token() -> dict[str, str]:
    """The token that Ray keeps for its clusters, as a header; Ray's client wants RAY_AUTH_MODE=token to look for it."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    token = os.environ.get("RAY_AUTH_TOKEN") or (path.read_text().strip() if path.is_file() else "")
    return {"Authorization": f"Bearer {token}"} if token else {}


@contextlib.contextmanager
def _readable_errors(address: str) -> Iterator[None]:
    """Ray's errors, which are RuntimeErrors with a page of text, as one line."""
    requests = importlib.import_module("requests")
    try:
        yield
    except requests.RequestException as error:
        raise RunError(f"--address {address}", f"does not answer ({last_line(error)})", "try again") from None
    except importlib.import_module("ray.exceptions").AuthenticationError as error:
        step = "set RAY_AUTH_TOKEN or ~/.ray/auth_token"
        raise RunError(f"--address {address}", f"refuses ({last_line(error)})", step) from None
    except (RuntimeError, ValueError, OSError) as error:
        text = str(error)
        if "already exists" in text:
            option = "--submission-id"
            raise RunError(
                option, "that job has been submitted before", f"leave {option} out: the run resumes"
            ) from None
        if "status code 404" in text or "does not exist" in text:
            raise RunError(f"--address {address}", "knows no such job", "look at: ray job list") from None
        raise RunError(f"--address {address}", f"refuses ({last_line(text)})", "look at the head node's logs") from None


def _asked(client: Any, name: str, address: str) -> Submission:
    """What the server says of a job."""
    with _readable_errors(address):
        info = client.get_job_info(name)
    state = str(getattr(info.status, "value", info.status))
    code = info.driver_exit_code if state in _ENDED else None
    return Submission(name, address, state, code, " ".join((info.message or "").split()))


def _followed(client: Any, name: str, address: str, log: Callable[[str], None]) -> Submission:
    """Show the output until the job ends, whatever happens to the connection."""
    try:
        _tail(client, name, address, _Lines(log))
        while (submission := _asked(client, name, address)).state not in _ENDED:
            time.sleep(0.5)
        return submission
    except KeyboardInterrupt:
        log(f"{name} keeps running; follow it: ray job logs --follow --address {address} {name}")
        log(f"stop it (what is done is kept): ray job stop --address {address} {name}")
        return Submission(name, address, "RUNNING")


def _tail(client: Any, name: str, address: str, lines: _Lines) -> None:
    """The output, from where it was cut off."""
    aiohttp = importlib.import_module("aiohttp")

    async def once() -> None:
        lines.rewind()
        pieces = client.tail_job_logs(name)
        while True:
            waiting = asyncio.ensure_future(anext(pieces))
            try:
                while not (await asyncio.wait({waiting}, timeout=QUIET))[0]:
                    _asked(client, name, address)
                lines.take(waiting.result())
            except StopAsyncIteration:
                return
            finally:  # where this ends earlier, the connection is closed
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)

    cut = None
    while True:
        seen = lines.seen
        try:
            with warnings.catch_warnings():  # Ray calls aiohttp in a way that is going to change
                warnings.simplefilter("ignore", DeprecationWarning)
                asyncio.run(once())
            if _asked(client, name, address).state in _ENDED:
                lines.close()
                return
        except (aiohttp.ClientError, RuntimeError, OSError, RunError) as error:
            cut = time.monotonic() if cut is None or lines.seen > seen else cut
            if time.monotonic() - cut > LOST:
                rule = f"no answer for {LOST:g} s ({last_line(error)}); {name} may still run"
                step = f"follow it: ray job logs --follow --address {address} {name}"
                raise RunError(f"--address {address}", rule, step) from None
        time.sleep(1.0)


class _Lines:
    """A job's output as whole lines; after a cut the server sends it from its beginning, and this skips what it saw."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log, self._rest, self._skip, self.seen = log, "", 0, 0

    def rewind(self) -> None:
        """The output comes from its beginning again."""
        self._skip = self.seen

    def take(self, text: str) -> None:
        """The next piece of it."""
        skipped = min(self._skip, len(text))
        self._skip -= skipped
        new = text[skipped:]
        self.seen += len(new)
        *whole, self._rest = (self._rest + new).split("\n")
        for line in whole:
            self._log(line)

    def close(self) -> None:
        """The end: what is left is a line too."""
        if self._rest:
            self._log(self._rest)
            self._rest = ""
