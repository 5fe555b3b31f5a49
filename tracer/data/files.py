"""Files of records, local or in a bucket: found, recognised by name, opened and hashed.

Knows paths, folders, globs, addresses and compression. Refuses to know what is in a file.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from fsspec.implementations.arrow import ArrowFSWrapper
from pyarrow import fs

from tracer.errors import JobError, first_line, quoted

FORMATS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".csv": "csv", ".parquet": "parquet"}
"""What a file is, by the end of its name; ``.gz`` may follow those of text."""

BLOCK = 1 << 20  # bytes read at once
_SCHEMES = ("s3://", "gs://", "gcs://", "file://")
_USE = "use .jsonl, .json or .ndjson (JSON lines), .csv, .parquet, or .gz of the text ones"


@dataclass(frozen=True)
class File:
    """An existing file.

    Attributes:
        filesystem, path: where pyarrow finds it.
        name: the path from the folder that was named, or that a glob begins with.
        kind: ``json``, ``csv`` or ``parquet``.
    """

    filesystem: Any
    path: str
    name: str
    kind: str

    @property
    def shown(self) -> str:
        """The path as messages name it."""
        return f"file {quoted(self.path, 300)}"

    def digest(self) -> str:
        """SHA-256 of the bytes, in hexadecimal digits."""
        sha256 = hashlib.sha256()
        with reading(self), self.filesystem.open_input_stream(self.path, compression=None) as stream:
            while block := stream.read(BLOCK):
                sha256.update(block)
        return sha256.hexdigest()


# ------------------------------------------------------------------------------------------------- finding


def find(paths: str | Sequence[str]) -> list[File]:
    """The files that paths name: each a file, a folder (all below it that is not hidden) or a glob, here or as a URI.

    Files of one path are sorted, paths keep their order. Names that begin with ``.`` or ``_`` are hidden.

    Raises:
        JobError: a path that names no file, a file of an unknown format or named twice, or several formats.
    """
    paths = [paths] if isinstance(paths, str) else paths
    files = [file for path in paths for file in _found(path)]
    if unknown := [file for file in files if not file.kind]:
        raise JobError(unknown[0].shown, "is of no known format", f"{_USE}; name some files of a folder by a glob")
    if len(kinds := {file.kind: file for file in files}) > 1:
        first, other = list(kinds.values())[:2]
        rule = f"is {other.kind}, and {quoted(first.path, 100)} is {first.kind}"
        raise JobError(other.shown, rule, "name files of one format, such as FOLDER/*.jsonl")
    seen: set[str] = set()
    for file in files:
        if file.path in seen:
            raise JobError(file.shown, "is named twice", "name each file once")
        seen.add(file.path)
    return files


def _found(given: str) -> list[File]:
    remote = "://" in given
    shown = f"path {quoted(given.partition('?')[0] if remote else given, 300)}"
    if remote:
        _check_address(given, shown)
    elif not given.strip() or "\0" in given:
        raise JobError(shown, "is not a path", "name a file, a folder or a glob")
    with _accessing(shown):
        system, path = _located(given)
        kind = system.get_file_info(path).type
        if kind == fs.FileType.File:
            start, names = path.rfind("/") + 1, [path]
        elif kind == fs.FileType.Directory:
            start, below = len(path) + 1, system.get_file_info(fs.FileSelector(path, recursive=True))
            names = [entry.path for entry in below if entry.is_file]
        else:
            start, names = _literal(path, "*?["), _matching(system, path)
    # A file that is named explicitly is read, even if hidden.
    if kind != fs.FileType.File:
        names = [name for name in names if not any(part[:1] in {".", "_"} for part in name[start:].split("/"))]
    if not names:
        raise JobError(shown, "names no file", "check the path, or the glob's pattern")
    return [File(system, name, name[start:], _kind(name)) for name in sorted(names)]


def _check_address(given: str, shown: str) -> None:
    if "@" in given or "secret" in given.lower() or "access_key" in given.lower():
        next_step = "give keys in the environment or the cloud's own file"
        raise JobError(f"path {given.partition('://')[0]}://...", "holds a key", next_step)
    if not given.startswith(_SCHEMES):
        next_step = f"use {', '.join(_SCHEMES)}; what is on the Hub is a dataset, not a path"
        raise JobError(shown, "is not an address of a known kind", next_step)


def _matching(system: Any, pattern: str) -> list[str]:
    if isinstance(system, fs.LocalFileSystem):
        return [name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)]
    try:
        names = [str(name) for name in ArrowFSWrapper(system).glob(pattern)]
    except ValueError as error:
        raise JobError(
            f"path {quoted(pattern, 300)}", "is not a valid pattern", "let ** be a folder, as in a/**/*.csv"
        ) from error
    return [name for name in names if system.get_file_info(name).is_file]


def _literal(path: str, special: str) -> int:
    """The end of the last folder before any special character."""
    length = next((i for i, char in enumerate(path) if char in special), len(path))
    return path.rfind("/", 0, length) + 1


def _located(given: str) -> tuple[Any, str]:
    """File system, and the path in it."""
    if "://" not in given:
        return fs.LocalFileSystem(), os.path.abspath(given)
    address, _, options = given.replace("gcs://", "gs://", 1).partition("?")
    # A pattern cannot be parsed as part of a URI.
    start = _literal(address, "*[") if any(char in address for char in "*[") else len(address)
    system, path = fs.FileSystem.from_uri(address[:start] + (f"?{options}" if options else ""))
    return system, "/".join(part for part in (path.rstrip("/"), address[start:]) if part)


def _kind(path: str) -> str:
    """The format, or empty where the name does not say."""
    stem, end = os.path.splitext(path.lower())
    if end != ".gz":
        return FORMATS.get(end, "")
    kind = FORMATS.get(os.path.splitext(stem)[1], "")
    return "" if kind == "parquet" else kind


@contextmanager
def _accessing(shown: str) -> Iterator[None]:
    """Errors of the file system, a decompressor or Arrow as a `JobError`."""
    try:
        yield
    except (OSError, EOFError, zlib.error, UnicodeError, pa.ArrowException) as error:
        said = first_line(getattr(error, "strerror", None) or error, 200)
        raise JobError(shown, f"cannot be read: {said}", "check the path, and that the file is whole") from error


def reading(file: File) -> Any:
    return _accessing(file.shown)


@contextmanager
def opened(file: File) -> Iterator[io.BufferedReader]:
    """The bytes of a text file, decompressed."""
    with reading(file), file.filesystem.open_input_stream(file.path, compression=None, buffer_size=BLOCK) as stream:
        packed = file.path.lower().endswith(".gz")
        raw: Any = gzip.GzipFile(fileobj=stream) if packed else stream
        with closing(io.BufferedReader(raw, BLOCK)) as buffered:
            if buffered.peek(2)[:2] in {b"\xff\xfe", b"\xfe\xff"}:
                raise JobError(file.shown, "is UTF-16 text", "save it as UTF-8")
            yield buffered
