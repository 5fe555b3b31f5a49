"""A file that was written, as whoever commits it must know it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class File(BaseModel):
    """A file that a worker wrote: its place in the folder, size in bytes, SHA-256, and rows if it is a table."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    size: int
    sha256: str
    rows: int
