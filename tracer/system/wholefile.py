"""Files as a whole: the one way to write a file on this machine, and one to read it.

The content goes into a temporary file of the same folder, is flushed to the disk, and takes the name by a rename: a
link of that name is replaced and not followed, and where the writing fails, what was there before stays. Knows paths.
Refuses to know what is written.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from tracer.errors import RunError, quoted

WRITTEN: deque[str] = deque(maxlen=1000)
"""Files that this process has written, the last ones: what is there when it is interrupted."""


@contextmanager
def writing(path: str | Path) -> Iterator[BinaryIO]:
    """A stream whose content is the file once it ends well; its folders are made.

    Raises:
        RunError: a folder, a device or a pipe has that name.
        OSError: there is no room, or no right to write.
    """
    target = Path(path)
    mode = check(target)
    if target.parent.exists() and not target.parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target.parent))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name[:60]}.{uuid.uuid4().hex[:8]}")
    number = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        with open(number, "wb") as file:
            yield file
            file.flush()
            if mode is not None:
                os.fchmod(number, mode)
            os.fsync(number)
        os.replace(temporary, target)
        WRITTEN.append(str(path))
        _sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write(path: str | Path, content: str | bytes) -> Path:
    """Write a whole file, text as UTF-8, and return where."""
    with writing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
    return Path(path)


def read(path: str | Path, most: int | None = None) -> bytes:
    """All of a file, or of a pipe.

    Args:
        most: read no more than one byte beyond so many; the caller refuses those.

    Raises:
        OSError: it cannot be read, or is a device, which may have no end.
    """
    with open(path, "rb") as file:
        if any(is_kind(os.fstat(file.fileno()).st_mode) for is_kind in (stat.S_ISCHR, stat.S_ISBLK)):
            raise OSError(errno.EINVAL, "it is a device, not a file")
        return file.read() if most is None else file.read(most + 1)


def check(path: Path) -> int | None:
    """The rights of a file that is about to be replaced; None where there is none, or a link.

    Raises:
        RunError: what has the name is not a file.
    """
    try:
        kind = there = path.lstat().st_mode
        with contextlib.suppress(OSError):  # of a link that leads nowhere
            kind = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    if stat.S_ISDIR(there):
        raise RunError(f"path {quoted(str(path), 300)}", "is a folder, not a file", "move it away, or give a file name")
    if not any(is_kind(kind) for is_kind in (stat.S_ISREG, stat.S_ISDIR, stat.S_ISLNK)):
        raise RunError(f"path {quoted(str(path), 300)}", "is a device or a pipe, not a file", "give a file name")
    return stat.S_IMODE(there) if stat.S_ISREG(there) else None


def _sync_folder(folder: Path) -> None:
    """Make a rename last, where a file system lets folders be synced."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
