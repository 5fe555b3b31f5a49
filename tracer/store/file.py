"""A file that was written, as whoever commits it must know it."""

from __future__ import annotations

from tracer.records import Record


class File(Record):
    """A file that a worker wrote: its place in the folder, size in bytes, SHA-256, and rows if it is a table."""

    name: str
    size: int
    sha256: str
    rows: int
