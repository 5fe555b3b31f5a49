"""A pool of one worker in the test's own process: what is monkeypatched there is patched in the worker."""

from __future__ import annotations

from collections.abc import Sequence

from tracer.errors import TracerError, described
from tracer.runs.worker import make, refused
from tracer.runs.workers.messages import Began, Broke, Done, Event, Part, Setup, Stage, Started, Task


class InlinePool:
    """Does its work where events are asked for."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._tasks: list[tuple[str, Task]] = []

    def start(self, worker: str, setup: Setup) -> None:
        self._worker = make(setup)
        self._events.append(Started.of(worker, self._worker, "here"))

    def give(self, worker: str, task: Task) -> None:
        self._tasks.append((worker, task))

    def kill(self, worker: str) -> None:
        raise AssertionError("nothing to kill")

    def events(self, timeout: float) -> Sequence[Event]:
        if self._tasks:
            worker, task = self._tasks.pop(0)

            def began(
                prompts: Sequence[int], done: int, note: str = "", part: Part | None = None, at: Stage | None = None
            ) -> None:
                said = Began(worker=worker, prompts=tuple(prompts), done=done, note=note, part=part, at=at)
                self._events.append(said)

            try:
                self._events.append(Done(worker=worker, report=self._worker.work(task, began)))
            except TracerError as error:
                self._events.append(refused(worker, error))
            except Exception as error:  # noqa: BLE001  as the real worker does
                self._events.append(Broke(worker=worker, error=described(error)))
        found, self._events = self._events, []
        return found

    def describe(self) -> str:
        return "this process"

    def close(self) -> None:
        pass
