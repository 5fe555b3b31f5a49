"""A worker process: a model loaded once, then one unit of a run after another.

    python -m tracer.runs.worker NAME   # speaks JSON lines (runs/workers/processes.py): setup and tasks in, events out

Knows which kind of unit a job has. A user's error is returned as data, any other as text. Refuses to know what other
workers do, and to write anything but its units' tables.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tracer.errors import TracerError, described, kind_of, surface
from tracer.runs.workers.messages import Beat, Began, Broke, Done, Part, Refused, Report, Setup, Stage, Started, Task
from tracer.settings import ModelRecord


def limit_malloc_retention() -> bool:
    """Make this process return freed tensors to the system at once; False where that is not possible (not glibc).

    By default glibc raises the size from which it maps memory up to 32 MiB and keeps what is freed below it, in
    pieces: a process grows by 1.3 to 2 times what it ever holds. A fixed limit of 1 MiB ends that.
    """
    if not sys.platform.startswith("linux"):
        return False
    change = getattr(ctypes.CDLL(None), "mallopt", None)
    map_from, trim_from = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    return change is not None and bool(change(map_from, 2**20)) and bool(change(trim_from, 2**20))


def die_first() -> None:
    """Where memory runs out the system ends this process rather than the driver, which can start another."""
    with contextlib.suppress(OSError):  # not Linux
        Path("/proc/self/oom_score_adj").write_text("500")


class Worker:
    """A job's model, and the work that is done on it.

    Attributes:
        model: its record. max_bytes: bytes one batch may use by default on its device. warnings: the model's.
    """

    def __init__(self, setup: Setup) -> None:
        import torch

        from tracer.ndif.probe import load
        from tracer.ndif.server import Limits
        from tracer.runs.jobs import BenchmarkJob, ExemplarsJob, RevisionsJob, load_job
        from tracer.store.run_folder import RunFolder

        self._beat: Callable[[str], None] | None = None
        limit_malloc_retention()
        torch.set_num_threads(setup.threads)
        job = load_job(setup.job)
        assert not isinstance(job, RevisionsJob), "a worker is given a part"
        options = job.loading()
        here = not job.remote or job.weights == "local"
        if here and not setup.gpus and not {"device", "device_map"} & options.keys():
            options["device"] = "cpu"  # a worker that was given no GPU still sees them
        if job.remote:
            options |= {"limits": Limits(in_flight=setup.in_flight), "report": self._waits}
        loaded = load(job.model, **options)
        self.model: ModelRecord = loaded.record()
        self.max_bytes: int = loaded.budget()
        self.warnings: tuple[str, ...] = loaded.warnings
        folder = RunFolder(setup.folder)
        if isinstance(job, BenchmarkJob):
            from tracer.runs.units.benchmark import Benchmark

            self._benchmark: Any = Benchmark(job, loaded)
            self._work = self._combination
        elif isinstance(job, ExemplarsJob):
            from tracer.runs.units.exemplars import ExemplarWork

            with surface("job"):
                self._work = ExemplarWork(loaded, job, folder).run
        else:
            self._of_dataset(loaded, job, folder)

    def _of_dataset(self, model: Any, job: Any, folder: Any) -> None:
        """The units of a dataset job, and the stages before and after them."""
        from tracer.runs.units.always_on import always_on_of
        from tracer.runs.units.ending import end_run
        from tracer.runs.units.shards import ShardWork
        from tracer.runs.units.steering import check_steering

        if job.tokens is not None:
            from tracer.meaning.tokens import check_readable

            with surface("job"):
                check_readable(model)  # now, and not when all units are done
        if job.steering is not None:
            with surface("job"):
                check_steering(model, job.steering)
        shards = ShardWork(model, job, folder)

        @functools.cache
        def settled() -> Any:
            """The job's work once it is known which neurons are left out."""
            now = job.leaving_out(folder.record() or {})
            return shards if now is job else ShardWork(model, now, folder)

        self._work = lambda task, began: settled().run(task, began)
        self._finish = lambda *how: end_run(model, settled().job, folder, *how)
        self._first = functools.partial(always_on_of, model, job, folder)

    def work(self, task: Task, began: Beat) -> Report:
        """Do one unit.

        Args:
            began: called with (prompts, how many of the unit are done) before each batch, and with news of a service.

        Raises:
            TracerError: what the user must fix, which ends the run.
        """
        last: tuple[Sequence[int], int, Stage | None] = (), 0, None

        def heard(
            prompts: Sequence[int], done: int, note: str = "", part: Part | None = None, at: Stage | None = None
        ) -> None:
            nonlocal last
            last = prompts, done, at
            began(prompts, done, note, part, at)

        self._beat = lambda note: heard(last[0], last[1], note, None, last[2])
        with surface("job"):
            if task.first:
                return Report(unit=task.unit, outcome=self._first(task.max_bytes))
            if task.finish:
                return Report(unit=task.unit, outcome=self._finish(task.max_bytes, lambda at: heard((), 0, at=at)))
            return self._work(task, heard)

    def _waits(self, line: str) -> None:
        """Send a heartbeat when a service reports on a request: waiting in its queue is not hanging."""
        if self._beat is not None:
            self._beat(line)

    def _combination(self, task: Task, began: Beat) -> Report:
        began((task.unit,), 0)
        combination = self._benchmark.job.combinations()[task.unit]
        outcome = self._benchmark.outcome(combination, lambda at: began((task.unit,), 0, at=at))
        said = self._benchmark.notes(combination)
        return Report(unit=task.unit, statuses={"ok": 1}, notes=said, outcome=outcome.model_dump(mode="json"))


def make(setup: Setup) -> Any:
    """The worker that a setup names."""
    module, _, name = setup.factory.partition(":")
    return getattr(importlib.import_module(module), name)(setup)


def refused(worker: str, error: TracerError) -> Refused:
    """A user's error as data."""
    kind = kind_of(error).__name__
    return Refused(worker=worker, kind=kind, value=error.value, rule=error.rule, next_step=error.next_step)


def main(name: str) -> None:
    """Serve tasks from standard input until it closes, which is when the driver ends."""
    die_first()
    with os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8") as out:
        os.dup2(2, 1)  # what a library prints is not an event
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=_listen, args=(lines,), daemon=True).start()

        saying = threading.Lock()

        def say(event: Any) -> None:
            text = json.dumps({"kind_of_event": type(event).__name__, **event.model_dump(mode="json")})
            with saying:  # a service reports from other threads
                out.write(text + "\n")

        try:
            worker = make(Setup.model_validate_json(lines.get()))
        except TracerError as error:
            say(refused(name, error))
            return
        say(Started.of(name, worker, f"process {os.getpid()}"))
        while True:
            task = Task.model_validate_json(lines.get())

            def began(
                prompts: Sequence[int], done: int, note: str = "", part: Part | None = None, at: Stage | None = None
            ) -> None:
                say(Began(worker=name, prompts=tuple(prompts), done=done, note=note, part=part, at=at))

            try:
                say(Done(worker=name, report=worker.work(task, began)))
            except TracerError as error:
                say(refused(name, error))
            except Exception as error:  # noqa: BLE001  the driver decides what happens to a unit that broke
                traceback.print_exc()
                say(Broke(worker=name, error=described(error)))


def _listen(lines: queue.Queue[str]) -> None:
    """Queue tasks as they come; end the process, even in the middle of a unit, when the driver is gone."""
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
