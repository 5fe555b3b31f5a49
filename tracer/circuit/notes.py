"""What readers marked and wrote of a run's graph, as the one file of the run folder that holds it.

Knows the file's name, which version of it a page was made of, and that one writer comes after the other. Refuses to
know what is in the file (supernodes_file.py) and who writes (reports/served.py).
"""

from __future__ import annotations

import hashlib
import threading
from typing import Any

from tracer.circuit import supernodes_file
from tracer.circuit.circuit import Graph
from tracer.circuit.supernodes_file import Supernodes
from tracer.errors import TracerError, say
from tracer.store.run_folder import SUPERNODES, RunFolder


class Notes:
    """The groups, pins, names and notes of a graph, as the one file of its run folder that holds them.

    Args:
        address: of the run folder, which may be in an object store. graph: as it was made, without them.
        prompt: of a run over many prompts, the one whose graph it is, which has a file of its own.

    Raises:
        RunError: the file is a link or no file, or the folder cannot be seen.
    """

    def __init__(self, address: Any, graph: Graph, prompt: int | None = None) -> None:
        self.place = RunFolder(address).place
        self.name = file_name(prompt)
        self.graph, self._partial = graph, prompt is not None
        self._lock = threading.Lock()
        self.place.path(self.name)  # refuses links before anything is served

    def __str__(self) -> str:
        return f"{str(self.place).rstrip('/')}/{self.name}"

    def read(self) -> tuple[bytes, str]:
        """The file's content, empty where there is none, and its version.

        Raises:
            RunError, OSError: it cannot be read.
        """
        content = self.place.read(self.name) if self.place.exists(self.name) else b""
        return content, f'"{hashlib.sha256(content).hexdigest()[:32] if content else "none"}"'

    def shown(self) -> tuple[Graph, str]:
        """The graph with what the file holds, and the file's version; of a prompt without a file of its own what the
        dataset's has of it.

        Raises:
            RunError: the file is damaged, or of another graph.
        """
        content, version = self.read()
        file = supernodes_file.parsed(content, self.name) if content else None
        if file is None and self._partial:
            file = supernodes_file.of_run(self.place.address)
        graph = self.graph if file is None else supernodes_file.apply(file, self.graph, self._partial)
        return graph, version

    def write(self, content: bytes, version: str) -> str | None:
        """Write what a page sends in place of the file of this version; the new version, or None where it has another.

        Raises:
            RunError: it is not such a file, or names nodes that the graph does not have. OSError: it cannot be written.
        """
        given = supernodes_file.parsed(content)
        supernodes_file.apply(given, self.graph)
        with self._lock:
            before, own = self.read()
            if own != version:
                return None
            self.place.write(self.name, supernodes_file.encoded(_with_old(given, before)))
            return self.read()[1]


def with_marks(address: Any, made: Supernodes) -> Supernodes:
    """Groups that were found anew, with the pins, names and notes that the run folder's file has of the same circuit;
    groups of that file go, and so does a file that cannot be read, which is said.

    Raises:
        RunError: the folder cannot be seen.
    """
    try:
        old = supernodes_file.of_run(address)
    except TracerError as error:
        say([f"{SUPERNODES} is made anew, without pins, names and notes of before: {error}"])
        return made
    if old is None or not (old.pinned or old.notes):
        return made
    if old.circuit is not None and old.circuit != made.circuit:
        say([f"{SUPERNODES} is made anew, without pins, names and notes of before: they are of another circuit"])
        return made
    return made.model_copy(update={"pinned": old.pinned, "notes": old.notes})


def file_name(prompt: int | None) -> str:
    """The file of a run folder that holds the notes of its graph, or of one prompt's."""
    return SUPERNODES if prompt is None else f"{SUPERNODES.removesuffix('.json')}-{prompt}.json"


def _with_old(given: Supernodes, before: bytes) -> Supernodes:
    """What a page sends, with what the file says and a page does not hold: how groups were found, and their texts."""
    try:
        old = supernodes_file.parsed(before)
    except TracerError:  # damaged: nothing to keep
        return given
    texts = {group.name: group.description for group in old.groups}
    groups = tuple(
        group if group.description else group.model_copy(update={"description": texts.get(group.name, "")})
        for group in given.groups
    )
    return given.model_copy(update={"groups": groups, "how": given.how or old.how})
