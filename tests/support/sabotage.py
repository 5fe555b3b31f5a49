"""Whoever kills the processes of a run at random, by their ids."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time
from collections.abc import Sequence
from typing import Any

from tracer.runs.workers.messages import Event, Setup, Started, Task


class Sabotage:
    """A pool that kills the process of a busy worker every now and then, for each unit once: a prompt that two
    processes died on would be left out."""

    def __init__(self, pool: Any, seed: int, kills: int, number: int = signal.SIGKILL, pause: float = 1.0) -> None:
        self.pool, self.dice, self.left, self.number = pool, random.Random(seed), kills, number
        self.pause = pause
        self.processes, self.busy, self.next, self.hit = dict[str, int](), dict[str, int](), 0.0, set[int]()

    def start(self, worker: str, setup: Setup) -> None:
        self.pool.start(worker, setup)

    def give(self, worker: str, task: Task) -> None:
        self.pool.give(worker, task)
        self.busy[worker] = task.unit

    def kill(self, worker: str) -> None:
        self.pool.kill(worker)

    def events(self, timeout: float) -> Sequence[Event]:
        found = self.pool.events(timeout)
        now = time.monotonic()
        for event in found:
            if isinstance(event, Started):
                pid = re.search(r"process (\d+)", event.where)
                assert pid is not None
                self.processes[event.worker] = int(pid[1])
                self.next = self.next or now + self.dice.random() * self.pause * 0.8
            elif type(event).__name__ in ("Done", "Died"):
                self.busy.pop(event.worker, None)
        there = sorted(worker for worker, unit in self.busy.items() if unit not in self.hit)
        if self.left and self.next and now > self.next and there:
            self.left, self.next = self.left - 1, now + self.dice.random() * self.pause
            worker = self.dice.choice(there)
            self.hit.add(self.busy[worker])
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.processes[worker], self.number)
        return found

    def describe(self) -> str:
        return self.pool.describe()

    def close(self) -> None:
        self.pool.close()
