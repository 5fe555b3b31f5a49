"""Storage: folders on this machine, on a shared file system or in an object store, with whole files only.

A file appears under its name when all of it is there: by rename on a file system, by the end of the upload in an
object store. A folder on this machine holds its own files: nothing is read or written through a link in it, nor by a
name that leads out of it. One driver holds a folder's writer lock: an flock, which ends with its process, or where
there is none a lease that is renewed. Knows bytes and names. Refuses to know what is in them.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import stat
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
from tracer.system import jsontext, wholefile
from tracer.text import is_text

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
            if "\0" in self.address or not is_text(self.address):
                raise RunError(f"path {quoted(self.address, 200)}", "is not a name in UTF-8", "give another folder")
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
        """The full path of a file, for Arrow with `fs`.

        Raises:
            RunError: the name leads out of the folder, by itself or by a link in it, or is that of a device or a pipe.
        """
        self._check_own(name)
        return f"{self.root}/{name}" if name else self.root

    def _check_own(self, name: str) -> None:
        parts = name.split("/") if name else []
        if any(part in ("", ".", "..") or "\0" in part for part in parts):
            raise RunError(f"file {quoted(name, 200)}", f"is not in the folder {self}", "it is another's: remove it")
        at = self.root
        for part in parts if self.local is not None else ():
            at = f"{at}/{part}"
            try:
                mode = os.lstat(at).st_mode
            except OSError:  # whoever asks for it will say so
                return
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                what = "a link" if stat.S_ISLNK(mode) else "a device or a pipe"
                rule = f"is {what}: a run folder holds its own files"
                raise RunError(f"path {quoted(at, 300)}", rule, "put the file or folder itself there")

    def exists(self, name: str = "") -> bool:
        """Whether a file or folder is there.

        Raises:
            RunError: that cannot be seen.
        """
        return self._info(name).type != fs.FileType.NotFound

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if it is not there.

        Raises:
            RunError: that cannot be seen.
        """
        info = self._info(name)
        return info.size if info.type == fs.FileType.File else None

    def _info(self, name: str) -> fs.FileInfo:
        with self._seen():
            return self.fs.get_file_info(self.path(name))

    @contextmanager
    def _seen(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, pa.ArrowException) as error:
            said = first_line(getattr(error, "strerror", None) or error)
            rule, step = f"cannot be read ({said})", "check the address and its rights"
            raise RunError(f"folder {quoted(str(self), 300)}", rule, step) from error

    def files(self, folder: str = "", recursive: bool = False) -> list[Found]:
        """The files in a folder, by name, links and others too; none if it is not there.

        Raises:
            RunError: it cannot be read, is no folder, or a link.
        """
        path, start = self.path(folder), len(self.root) + 1
        with self._seen():
            if self.local is not None:
                if not self.local.is_dir():
                    return []
                return sorted(_listed(path, start, recursive))
            selector = fs.FileSelector(path, recursive=recursive, allow_not_found=True)
            found = self.fs.get_file_info(selector)
            return sorted(Found(file.path[start:], file.size) for file in found if file.type == fs.FileType.File)

    def folders(self, folder: str) -> list[str]:
        """The names of the folders in a folder of this machine; an object store has none of its own.

        Raises:
            RunError: it cannot be read.
        """
        path = self.path(folder)
        with self._seen():
            if self.local is None or not os.path.isdir(path):
                return []
            return sorted(entry.name for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False))

    def read(self, name: str) -> bytes:
        """All of a file.

        Raises:
            FileNotFoundError, OSError: it cannot be read.
        """
        with self.fs.open_input_file(self.path(name)) as file:
            return file.readall()

    def read_json(self, name: str, step: str = "run it again") -> dict[str, Any]:
        """A JSON object.

        Args:
            step: what to do where it is none.

        Raises:
            RunError: it is not there, or no JSON object.
        """
        value = f"file {quoted(name)}"
        try:
            content = jsontext.parse(self.read(name))
        except jsontext.JsonError as error:
            raise RunError(value, str(error), step) from error
        except OSError as error:
            raise RunError(value, f"cannot be read ({first_line(error.strerror or error)})", step) from error
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
        self._check_own(name.rpartition("/")[0])
        with wholefile.writing(self.local / name) as file:
            yield file

    def remove(self, name: str) -> None:
        """Remove a file, or a link of that name, if it is there."""
        if self.local is not None:
            self._check_own(name.rpartition("/")[0])
            (self.local / name).unlink(missing_ok=True)
            return
        try:
            self.fs.delete_file(self.path(name))
        except FileNotFoundError:
            return
        except OSError:
            if self.exists(name):
                raise

    def make_room(self, size: int) -> None:
        """Find out, before something that is there goes, that so many bytes can be written.

        Raises:
            OSError: there is no room, or no right to write.
        """
        if self.local is not None:
            with tempfile.TemporaryFile(dir=self.local) as file:
                file.write(bytes(size))
                file.flush()
                os.fsync(file.fileno())

    def is_held(self) -> bool | None:
        """Whether a driver holds the lock now; None where only a lease tells, and not at once."""
        if self.local is None or self.size(LOCK) is None:
            return None
        with open(self.path(LOCK), "rb") as file:
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
        with open(os.open(self.path(LOCK), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+b") as file:
            try:
                _flock(file)
            except BlockingIOError:
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
        lease = Lease(self, me)
        if self.exists(LEASE_FILE) and abs(self._age(LEASE_FILE, f".{LEASE_FILE}.{me['owner'][:8]}")) < LEASE:
            raise self._held(self.read(LEASE_FILE), lease=True)
        lease.take()
        time.sleep(1.0)  # of two that came at once, the later to write is the one that stays
        if not lease.mine():
            raise self._held(self.read(LEASE_FILE), lease=True)
        over = threading.Event()
        keeper = threading.Thread(target=lease.keep, args=(over,), daemon=True)
        keeper.start()
        try:
            yield lease
        finally:
            over.set()
            keeper.join(LEASE)  # a store that does not answer holds nobody up: the lease runs out by itself
            if lease.mine():
                self.remove(LEASE_FILE)

    def _age(self, name: str, probe: str) -> float:
        """Seconds since a file was written, by the clock of the store: that of another file which is written now. The
        clocks of hosts may be days apart; a store has one."""
        self.write(probe, b"x")
        try:
            now, then = (self._info(one).mtime for one in (probe, name))
            return 0.0 if now is None else LEASE if then is None else (now - then).total_seconds()
        finally:
            self.remove(probe)

    def _held(self, content: bytes, lease: bool = False) -> RunError:
        wait = f"wait for it ({LEASE:g} s if it was killed)" if lease else "wait for it"
        try:
            holder = jsontext.parse(content)
            who = f"process {holder['pid']} on {holder['host']}"
        except (ValueError, KeyError, TypeError):
            who = "another process"
        return RunError(
            f"run {quoted(str(self), 300)}", f"is being written by {who}", f"{wait}, or choose another folder"
        )


def _listed(path: str, start: int, recursive: bool) -> Iterator[Found]:
    """What is in a folder of this machine and is no folder; links are not followed."""
    try:
        entries = list(os.scandir(path))
    except FileNotFoundError:
        return
    for entry in entries:
        if not entry.is_dir(follow_symlinks=False):
            yield Found(entry.path[start:], entry.stat(follow_symlinks=False).st_size)
        elif recursive:
            yield from _listed(entry.path, start, recursive)


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
        self._taken = time.monotonic()

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
            self._taken = time.monotonic()

    def keep(self, over: threading.Event) -> None:
        """Renew it until it is over, or lost."""
        while not over.wait(LEASE / 4) and self._lost is None:
            try:
                self._again()
            except (OSError, RunError):
                continue  # the next renewal is long before the lease expires

    def _again(self) -> None:
        """Renew it unless another driver holds it; a lease that is empty, damaged or gone is nobody else's."""
        assert self._storage is not None
        try:
            content = self._storage.read(LEASE_FILE)
            owner = jsontext.parse(content).get("owner")
        except (FileNotFoundError, AttributeError, jsontext.JsonError):
            content, owner = b"", None
        if owner in (None, self._me["owner"]):
            self.take()
        else:
            self._lost = self._storage._held(content, lease=True)

    def renew(self) -> None:
        """Check that it is still held; cheap to call often.

        Raises:
            RunError: the lease ran out, and another driver took it.
            OSError: the lease ran out, and its store cannot be reached.
        """
        if self._storage is not None and self._lost is None and time.monotonic() - self._taken > LEASE:
            self._again()
        if self._lost is not None:
            raise self._lost
