"""A Ray of its own on this machine: nobody else gets in, its end is noticed, and it leaves no process and no file.

Everything that Ray starts here (GCS, raylet, agents, workers, and this process as a driver) listens on 127.0.0.1 alone,
and answers only who shows the token: a random one for each cluster, which is nowhere but in the memory and environment
of these processes, as /proc shows them to this user and root. Without the token, any process of this machine may still
read two pages of metrics. Sockets, logs and spilled objects are in a folder that only this user may enter: Ray itself
lets everyone write to its own. Knows processes, ports and Ray's variables. Refuses to know clusters of others, which
keep their settings.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

from tracer.errors import RunError, first_line
from tracer.text import printable

HOST = "127.0.0.1"
STORE = 75 * 2**20
"""Bytes of the object store: Ray's minimum; only short texts go through it."""
LIMIT = 120.0
"""Seconds Ray has to start: it takes 3 to 10, and by itself gives up after 30 of most of what goes wrong."""
LOOK = 0.5
"""Seconds between two looks at its processes."""

_TOKEN = {"RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""What every process of the cluster finds in its environment besides the token. The second keeps Ray on the loopback,
on Linux too."""
_ELSEWHERE = ("RAY_AUTH_TOKEN_PATH", "RAY_REDIS_ADDRESS", "RAY_ADDRESS")
"""Another token, and another place for the cluster's state than this machine."""
_ESSENTIAL = ("gcs_server", "raylet")
_LONGEST = 22
"""Characters of the folder that holds ours: a socket's path has 107 at most, of which Ray takes 65."""
_LOGGED = re.compile(r"^\[[^\]]* [ECF] \d+ \d+\] \(\w+\) \S+:\d+:\s++(?!\*\*\*|PC: |@|Stack)(?:.*Check failed: )?(.+)")

_running: list[LocalRay] = []


def running() -> LocalRay | None:
    """The one that this process started, if it has not ended."""
    return _running[-1] if _running else None


class LocalRay:
    """Ray, started here and connected to; to be closed.

    Args:
        ray: the package. options: of ``ray.init``.

    Raises:
        RunError: it did not start, in a line; nothing of it is left.
    """

    def __init__(self, ray: Any, options: dict[str, Any]) -> None:
        self._ray, self._essential, self._looked, self._lost = ray, list[psutil.Process](), 0.0, ""
        self._begun = set[psutil.Process]()
        self._token, self._pid = secrets.token_hex(32), os.getpid()
        _check_loopback()
        self.folder = _folder()
        atexit.register(self.close)
        late = threading.Timer(LIMIT, self._kill)
        late.daemon = True
        late.start()
        handler = signal.getsignal(signal.SIGTERM)
        try:
            with _asking_for(self._token):
                ray.init(address="local", _temp_dir=str(self.folder / "r"), **options)
            self._essential = [one for one in self._processes() if one.name() in _ESSENTIAL]
            self._remember()
        except BaseException as error:  # noqa: BLE001 - Ray raises whatever it likes, and nothing may stay
            cause = _logged(self.folder)
            self.close()
            if not isinstance(error, Exception):
                _terminated(error, handler)
            said = cause or printable(first_line(error, 200))
            raise RunError("--ray local", f"Ray did not start: {said}", "fix that, or run without --ray") from None
        finally:
            late.cancel()
        _running.append(self)

    def lost(self, sure: bool = False) -> str:
        """Which of its processes has ended, without which there is no cluster; empty as long as all are there.

        Args:
            sure: look now, not just every half second.
        """
        if not self._lost and (sure or time.monotonic() - self._looked >= LOOK):
            self._looked = time.monotonic()
            self._lost = next((one.name() for one in self._essential if not _lives(one)), "")
            if not self._lost:
                self._remember()
        return self._lost

    def close(self) -> None:
        """End it: its processes, its files, and the token that this process shows."""
        if os.getpid() != self._pid:
            return  # forked from the one that has it
        atexit.unregister(self.close)
        if self in _running:
            _running.remove(self)
        with contextlib.suppress(Exception):  # of a cluster that is half there
            self._ray.shutdown()
        self._kill()
        shutil.rmtree(self.folder, ignore_errors=True)
        forget_token()

    def _remember(self) -> None:
        """Note what its processes have begun: agents write their title over their environment, and outlive a raylet."""
        for one in self._essential:
            with contextlib.suppress(psutil.Error):
                self._begun.update(one.children(recursive=True))

    def _processes(self) -> list[psutil.Process]:
        """Whoever has its token, a worker too that a raylet left to nobody when it died."""
        found: list[psutil.Process] = []
        for one in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if one.pid != self._pid and one.environ().get("RAY_AUTH_TOKEN") == self._token:
                    found.append(one)
        return found

    def _kill(self) -> None:
        """SIGKILL to what is left of it, by id."""
        left = [*self._processes(), *(one for one in self._begun if one.is_running())]
        for one in left[:]:
            with contextlib.suppress(psutil.Error):
                left += one.children(recursive=True)
        for one in left:
            with contextlib.suppress(psutil.Error):
                one.kill()
        psutil.wait_procs(left, timeout=10)


def check_variables() -> None:
    """Refuse variables that Ray cannot read, before it is imported: it would end this process without a word.

    Raises:
        RunError: names them.
    """
    names = sorted(name for name in os.environ if re.match(r"RAY_[a-z]", name))
    if not names or "ray" in sys.modules:
        return
    command = [sys.executable, "-c", "import ray"]
    try:
        code = subprocess.run(command, capture_output=True, timeout=LIMIT, check=False).returncode
    except subprocess.TimeoutExpired:  # a slow disk, not a wrong word
        return
    if code < 0:
        value = f"environment with {printable(', '.join(names), 200)}"
        raise RunError(value, "ends Ray while it is loaded", "unset what is no number, or not of its type")


def forget_token() -> None:
    """Read Ray's variables anew, without which this process would show its last cluster's token to the next."""
    raylet = sys.modules.get("ray._raylet")
    if raylet is not None:
        # In this order: a thread of Ray that still runs must not look for a token that is gone.
        raylet.Config.initialize("")  # type: ignore[attr-defined]
        raylet.AuthenticationTokenLoader.instance().reset_cache()  # type: ignore[attr-defined]


@contextlib.contextmanager
def _asking_for(token: str) -> Iterator[None]:
    """Start Ray in here: every process that it starts keeps what is set, this one only what Ray read of it."""
    before = dict(os.environ)
    for name in _ELSEWHERE:
        os.environ.pop(name, None)
    os.environ.update(_TOKEN, RAY_AUTH_TOKEN=token)
    constants: ModuleType = importlib.import_module("ray._private.ray_constants")
    clusters, constants.ENABLE_RAY_CLUSTER = constants.ENABLE_RAY_CLUSTER, False  # type: ignore[attr-defined]
    try:
        forget_token()
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = clusters  # type: ignore[attr-defined]
        for name in (*_ELSEWHERE, *_TOKEN, "RAY_AUTH_TOKEN"):
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]


def _terminated(error: BaseException, handler: Any) -> None:
    """SIGTERM means what it meant before: Ray's own handler ends this process by an exception, in the middle of its
    start. Anything else that is no error of Ray is raised again."""
    if not isinstance(error, SystemExit) or error.code != signal.SIGTERM or handler is None:
        raise error
    signal.signal(signal.SIGTERM, handler)
    signal.raise_signal(signal.SIGTERM)


def _folder() -> Path:
    """A new folder of this user alone, with a path that is short enough for sockets."""
    try:
        there = (os.environ.get("RAY_TMPDIR"), tempfile.gettempdir(), "/tmp")
        root = next(one for one in there if one and len(one) <= _LONGEST)
        return Path(tempfile.mkdtemp(prefix="tracer-", dir=root))
    except OSError as error:
        rule = f"Ray needs a folder for its sockets ({error.strerror or error})"
        raise RunError("--ray local", rule, "set TMPDIR to one that can be written") from None


def _check_loopback() -> None:
    """Refuse a machine without ports of its own, on which Ray would wait for minutes."""
    try:
        with socket.socket() as server:
            server.bind((HOST, 0))
            server.listen()
            socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError as error:
        rule = f"no connection to {HOST} can be made ({error.strerror or error})"
        raise RunError("--ray local", rule, "run without --ray, or free some ports") from None


def _lives(one: psutil.Process) -> bool:
    try:
        return one.is_running() and one.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _logged(folder: Path) -> str:
    """The last error in the logs of what must run."""
    for name in (f"{one}.{end}" for one in _ESSENTIAL for end in ("err", "out")):
        for path in folder.glob(f"r/session_*[0-9]/logs/{name}"):
            with contextlib.suppress(OSError):
                lines = path.read_text(errors="replace").splitlines()[-1000:]
                found = [match[1] for match in map(_LOGGED.match, lines) if match]
                if found:
                    return printable(found[-1], 160)
    return ""
