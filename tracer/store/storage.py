"""Storage: folders on this machine, on a shared file system or in an object store, with whole files only.

A file appears under its name when all of it is there: by rename on a file system, by the end of the upload in an
object store. One driver holds a folder's writer lock: an flock, which ends with its process, or where there is none a
lease that is renewed. Knows bytes and names. Refuses to know what is in them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from tracer.errors import RunError, first_line, quoted

SCHEMES = ("s3", "gs", "gcs")
LEASE = 120.0  # seconds after which a lease that was not renewed has expired
LOCK = ".lock"
LEASE_FILE = "_lock.json"


class Found(NamedTuple):
    """A file in a folder: its name relative to it, and its size in bytes."""

    name: str
    size: int


def is_remote(address: str | Path) -> bool:
    """Whether this is an object store's address, not a path."""
    return isinstance(address, str) and urlsplit(address).scheme in SCHEMES


class Storage:
    """A folder, wherever it is.

    Args:
        address: a path, or ``s3://bucket/folder`` or ``gs://bucket/folder``; how to reach another server goes into
            the address (``?endpoint_override=HOST:PORT&scheme=http``), keys never do.

    Raises:
        RunError: an address that holds keys, or cannot be understood.
    """

    def __init__(self, address: str | Path) -> None:
        self.address = str(address)
        self.local: Path | None = None
        if not is_remote(address):
            self.local = Path(address)
            self.fs: fs.FileSystem = fs.LocalFileSystem()
            self.root = str(self.local.absolute())
            return
        parts = urlsplit(self.address)
        if "@" in parts.netloc or "secret" in parts.query.lower() or "access_key" in parts.query.lower():
            raise RunError(
                f"address {parts.scheme}://...", "holds a key", "give keys in the environment or the cloud's own file"
            )
        try:
            self.fs, self.root = fs.FileSystem.from_uri(self.address.replace("gcs://", "gs://", 1))
        except (pa.ArrowException, OSError, ValueError) as error:
            rule = f"is not an address that Arrow can open ({first_line(error)})"
            raise RunError(f"address {quoted(self.address, 200)}", rule, "write s3://bucket/folder") from error

    def __str__(self) -> str:
        return self.address.partition("?")[0]

    def path(self, name: str) -> str:
        """The full path of a file, for Arrow with `fs`."""
        return f"{self.root}/{name}" if name else self.root

    def exists(self, name: str = "") -> bool:
        """Whether a file or folder is there."""
        return self.fs.get_file_info(self.path(name)).type != fs.FileType.NotFound

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if it is not there."""
        info = self.fs.get_file_info(self.path(name))
        return info.size if info.type == fs.FileType.File else None

    def files(self, folder: str = "", recursive: bool = False) -> list[Found]:
        """The files in a folder, by name; none if it is not there."""
        selector = fs.FileSelector(self.path(folder), recursive=recursive, allow_not_found=True)
        start = len(self.root) + 1
        return sorted(
            Found(file.path[start:], file.size)
            for file in self.fs.get_file_info(selector)
            if file.type == fs.FileType.File
        )

    def read(self, name: str) -> bytes:
        """All of a file.

        Raises:
            FileNotFoundError, OSError: it cannot be read.
        """
        with self.fs.open_input_file(self.path(name)) as file:
            return file.readall()

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object.

        Raises:
            RunError: it is not there, or no JSON object.
        """
        value, step = f"file {quoted(name)}", "run it again"
        try:
            content = json.loads(self.read(name))
        except (OSError, ValueError) as error:
            raise RunError(
                value, f"cannot be read ({first_line(getattr(error, 'strerror', None) or error)})", step
            ) from error
        if not isinstance(content, dict):
            raise RunError(value, "does not hold a JSON object", step)
        return content

    def write(self, name: str, content: bytes) -> None:
        """Write a whole file, in place of one that is there."""
        with self.writing(name) as file:
            file.write(content)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON object."""
        self.write(name, json.dumps(content, indent=1, sort_keys=True, allow_nan=False).encode())

    @contextmanager
    def writing(self, name: str) -> Iterator[Any]:
        """A stream whose content is the file `name` once it ends well; nothing is left of it if it does not.

        Raises:
            OSError: there is no room, or no right to write.
        """
        if self.local is None:
            with tempfile.TemporaryFile() as file:  # what fails before it is whole never leaves this machine
                yield file
                file.seek(0)
                with self.fs.open_output_stream(self.path(name)) as stream:
                    shutil.copyfileobj(file, stream, 2**22)
            return
        target = self.local / name
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
            _sync_folder(target.parent)
        finally:
            temporary.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        try:
            self.fs.delete_file(self.path(name))
        except FileNotFoundError:
            return
        except OSError:
            if self.exists(name):
                raise

    def is_held(self) -> bool | None:
        """Whether a driver holds the lock now; None where only a lease tells, and not at once."""
        if self.local is None or not (self.local / LOCK).exists():
            return None
        with (self.local / LOCK).open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            except OSError:
                return None
            return False

    @contextmanager
    def locked(self) -> Iterator[Lease]:
        """Take the exclusive writer lock.

        Raises:
            RunError: another driver holds it; the message says which.
        """
        me = {"host": socket.gethostname(), "pid": os.getpid(), "owner": uuid.uuid4().hex}
        if self.local is None:
            with self._leased(me) as lease:
                yield lease
            return
        self.local.mkdir(parents=True, exist_ok=True)
        with (self.local / LOCK).open("a+b") as file:
            try:
                _flock(file)
            except BlockingIOError:
                file.seek(0)
                raise self._held(file.read()) from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                with self._leased(me) as lease:
                    yield lease
                return
            file.truncate(0)
            file.write(json.dumps(me).encode())
            file.flush()
            try:
                yield Lease(None, me)
            finally:
                file.truncate(0)

    @contextmanager
    def _leased(self, me: dict[str, Any]) -> Iterator[Lease]:
        if self.exists(LEASE_FILE):
            there = self.read_json(LEASE_FILE)
            if time.time() - _time(there) < LEASE:
                raise self._held(json.dumps(there).encode())
        lease = Lease(self, me)
        lease.take()
        time.sleep(1.0)  # of two that came at once, the later to write is the one that stays
        if not lease.mine():
            raise self._held(self.read(LEASE_FILE))
        over = threading.Event()
        keeper = threading.Thread(target=lease.keep, args=(over,), daemon=True)
        keeper.start()
        try:
            yield lease
        finally:
            over.set()
            keeper.join()
            if lease.mine():
                self.remove(LEASE_FILE)

    def _held(self, content: bytes) -> RunError:
        step = "wait for it, or choose another folder"
        try:
            holder = json.loads(content)
            who = f"process {holder['pid']} on {holder['host']}"
            if "time" in holder:
                step = f"wait for it ({LEASE:g} s if it was killed), or choose another folder"
        except (ValueError, KeyError, TypeError):
            who = "another process"
        return RunError(f"run {quoted(str(self), 300)}", f"is being written by {who}", step)


def _flock(file: Any) -> None:
    """Take a lock, or raise BlockingIOError. The child of a driver that was killed may briefly inherit its lock."""
    for pause in (0.05, 0.1, 0.15, 0.0):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not pause:
                raise
            time.sleep(pause)
        else:
            return


class Lease:
    """The right to write a folder. With a lock of the file system there is nothing to do; elsewhere it is a file that
    must be renewed, which a thread does whatever else its driver is busy with."""

    def __init__(self, storage: Storage | None, me: dict[str, Any]) -> None:
        self._storage, self._me = storage, me
        self._lost: RunError | None = None

    def mine(self) -> bool:
        """Whether no other driver has taken it meanwhile."""
        if self._storage is None:
            return True
        try:
            return self._storage.read_json(LEASE_FILE).get("owner") == self._me["owner"]
        except RunError:
            return False

    def take(self) -> None:
        """Claim it for `LEASE` seconds from now."""
        if self._storage is not None:
            self._storage.write_json(LEASE_FILE, {**self._me, "time": time.time()})

    def keep(self, over: threading.Event) -> None:
        """Renew it until it is over, or lost."""
        assert self._storage is not None
        while not over.wait(LEASE / 4):
            try:
                there = json.loads(self._storage.read(LEASE_FILE))
                if there.get("owner") != self._me["owner"]:
                    self._lost = self._storage._held(json.dumps(there).encode())
                    return
                self.take()
            except (OSError, ValueError):
                continue  # the next renewal is long before the lease expires

    def renew(self) -> None:
        """Check that it is still held; cheap to call often.

        Raises:
            RunError: the lease ran out, and another driver took it.
        """
        if self._lost is not None:
            raise self._lost


def _time(lease: dict[str, Any]) -> float:
    renewed = lease.get("time")
    return float(renewed) if isinstance(renewed, int | float) else 0.0


def _sync_folder(folder: Path) -> None:
    """Make a rename last, where a file system lets folders be synced."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
