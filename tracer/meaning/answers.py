"""What a language model answered, kept on disk, so that nothing is paid for twice.

One small file for each request, named by a hash of what was asked and written as a whole: a process that is killed
leaves whole answers or none, and a file that is damaged counts as none. Knows names and records. Refuses to know what
was asked, and keys.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from tracer.errors import RunError, writing
from tracer.store.record import is_as_written, signed
from tracer.store.run_folder import ANSWERS
from tracer.store.storage import Storage


def name_of(asked: Any) -> str:
    """A hash of everything that decides an answer, as JSON."""
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


class Answers:
    """The answers in a folder: that of a run, or another one."""

    def __init__(self, place: Storage) -> None:
        self._place = place

    def get(self, name: str) -> dict[str, Any] | None:
        """What was answered; None where nothing was, or the file is not as it was written."""
        file = f"{ANSWERS}/{name}.json"
        try:
            kept = self._place.read_json(file) if self._place.exists(file) else None
        except RunError:
            return None
        return kept if kept is not None and is_as_written(kept) else None

    def put(self, name: str, answer: dict[str, Any]) -> None:
        """Keep an answer.

        Raises:
            RunError: the folder cannot be written.
        """
        with writing(self._place, "folder", "make room there, or choose another place for the answers"):
            self._place.write_json(f"{ANSWERS}/{name}.json", signed(answer))
