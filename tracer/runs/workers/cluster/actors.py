"""What runs inside the cluster: a worker's process, and the journal of the prompts it began.

Plain classes, made actors by pool.py; Ray sends them by name, so tracer must be installed on every node. Everything
they are given and answer is JSON text or plain numbers. Refuses to know any model or file.
"""

from __future__ import annotations

import importlib
import itertools
import os
import socket
from collections.abc import Sequence
from typing import Any

from tracer.errors import TracerError, described, kind_of
from tracer.runs.workers.cluster.connection import last_line, load_ray
from tracer.runs.workers.messages import Part, Setup, Stage, Started, Task
from tracer.version import VERSION

WRITE = 60.0
"""Seconds a worker waits for the journal before it gives its unit back."""


Entry = tuple[tuple[int, ...], int, str, int, str]
"""Prompts in flight, how many of the unit are done, wait reason, and a heartbeat counter (a repeated message still
counts as a heartbeat)."""
NOTHING: Entry = ((), 0, "", 0, "")


class Journal:
    """The last entry of each worker; an actor beside the driver, so that it outlives the workers."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[int, Entry]] = {}
        self._parts: dict[str, tuple[int, list[str]]] = {}

    def write(self, worker: str, turn: int, entry: Entry) -> None:
        """What `worker` says in its `turn`."""
        self._entries[worker] = (turn, entry)

    def keep(self, worker: str, turn: int, part: str) -> None:
        """What `worker` has kept of its unit in its `turn`: one part more."""
        then, parts = self._parts.get(worker, (turn, []))
        self._parts[worker] = turn, [*(parts if then == turn else ()), part]

    def parts(self, turn: int) -> list[str]:
        """All that was kept in that turn."""
        return next((parts for then, parts in self._parts.values() if then == turn), [])

    def read(self, turns: list[int]) -> dict[int, Entry]:
        """The entries of those turns."""
        return {turn: entry for turn, entry in self._entries.values() if turn in turns}


class JournalLostError(BaseException):
    """The journal did not answer. Not an `Exception`: a worker must not mistake it for a prompt's error."""


class Actor:
    """A worker's process. What it raises is returned as text: not every exception can be pickled."""

    def __init__(self, worker: str, version: str, setup: str, journal: Any) -> None:
        self._worker, self._version, self._setup, self._journal = worker, version, setup, journal
        self._made: Any = None
        self._beats = itertools.count(1)

    def ping(self) -> tuple[str]:
        """Whether anyone is there."""
        return ("pong",)

    def ready(self) -> tuple[str, ...]:
        """Make the worker: ``started``, ``refused`` or ``failed``."""
        if self._version != VERSION:
            value, rule = f"tracer {VERSION} on a node", f"the driver has {self._version}"
            return ("refused", "RunError", value, rule, "install the same version everywhere")
        try:
            setup = Setup.model_validate_json(self._setup)
            module, _, name = setup.factory.partition(":")
            self._made = getattr(importlib.import_module(module), name)(setup)
        except TracerError as error:
            return _refusal(error)
        except Exception as error:  # noqa: BLE001 - the edge of a process
            return ("failed", described(error))
        context = load_ray().get_runtime_context()
        gpus = context.get_accelerator_ids().get("GPU", [])
        where = f"{socket.gethostname()}, process {os.getpid()}" + (f", GPU {' '.join(gpus)}" if gpus else "")
        record = Started.of(self._worker, self._made, where)
        return ("started", record.model_dump_json(), context.get_node_id())

    def work(self, turn: int, task: str) -> tuple[str, ...]:
        """Do a unit: ``done``, ``refused`` or ``broke``."""
        ray = load_ray()

        def began(
            prompts: Sequence[int], done: int, note: str = "", part: Part | None = None, at: Stage | None = None
        ) -> None:
            where = "" if at is None else at.model_dump_json()
            entry = (tuple(int(prompt) for prompt in prompts), int(done), note, next(self._beats), where)
            try:
                if part is not None:
                    ray.get(self._journal.keep.remote(self._worker, turn, part.model_dump_json()), timeout=WRITE)
                ray.get(self._journal.write.remote(self._worker, turn, entry), timeout=WRITE)
            except ray.exceptions.RayError as error:
                raise JournalLostError(f"the driver's journal does not answer: {last_line(error)}") from None

        try:
            report = self._made.work(Task.model_validate_json(task), began)
        except TracerError as error:
            return _refusal(error)
        except (Exception, JournalLostError) as error:  # noqa: BLE001 - the edge of a process
            return ("broke", described(error))
        return ("done", report.model_dump_json())


def _refusal(error: TracerError) -> tuple[str, ...]:
    return ("refused", kind_of(error).__name__, error.value, error.rule, error.next_step)
