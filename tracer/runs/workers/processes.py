"""Workers as processes of this machine, which speak JSON lines over pipes: no Ray, no pickle, nothing shared.

A process that dies loses nothing but its unit, and the prompts it had begun are known, since a pipe outlives its
writer. A worker ends when its driver does. Knows processes. Refuses to know what a unit is.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO

from pydantic import TypeAdapter

from tracer.runs.workers.messages import Began, Broke, Died, Done, Event, Refused, Setup, Started, Task
from tracer.system import machine

_KINDS: dict[str, type[Started | Began | Done | Refused | Broke]] = {
    kind.__name__: kind for kind in (Started, Began, Done, Refused, Broke)
}
_LAST = 2000  # characters of a worker's errors that are kept
_NO_MEMORY = re.compile(r"bad_alloc|MemoryError|out of memory|(can't|cannot) allocate memory", re.IGNORECASE)
GRACE = 10.0
"""Seconds a process that has ended, or was killed, has to be done with: a child of its own may hold its pipe open, and
one that waits for a disk that does not answer cannot be killed."""


@dataclass
class _Process:
    popen: subprocess.Popen[bytes]
    errors: IO[bytes]
    begun: tuple[int, ...] = ()
    thread: threading.Thread | None = field(default=None)
    limit: float = 0.0  # when its `Died` is overdue
    told: bool = False  # that it died


class LocalPool:
    """A pool of processes on this machine."""

    def __init__(self) -> None:
        self._events: queue.Queue[Event] = queue.Queue()
        self._processes: dict[str, _Process] = {}
        self._gpus = _gpu_names()
        self._taken: dict[str, dict[str, float]] = {}

    def start(self, worker: str, setup: Setup) -> None:
        """Start a process; its threads, of every library, are the setup's."""
        errors = tempfile.TemporaryFile()  # noqa: SIM115  closed when the process has ended
        popen = subprocess.Popen(
            [sys.executable, "-P", "-m", "tracer.runs.worker", worker],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=_environment(setup.threads) | self._seat(worker, setup.gpus),
            start_new_session=True,  # Ctrl-C is the driver's to handle
        )
        process = _Process(popen, errors)
        self._processes[worker] = process
        self._say(process, setup)  # not as an argument: a job may exceed its maximal length
        process.thread = threading.Thread(target=self._listen, args=(worker, process), daemon=True)
        process.thread.start()

    def give(self, worker: str, task: Task) -> None:
        """Send a unit."""
        process = self._processes[worker]
        process.begun = ()
        self._say(process, task)

    def kill(self, worker: str) -> None:
        """SIGKILL; `Died` follows with the prompts it had begun."""
        if worker in self._processes:
            self._processes[worker].popen.kill()
            self._processes[worker].limit = time.monotonic() + GRACE

    def events(self, timeout: float) -> Sequence[Event]:
        """What the processes said, in order."""
        events: list[Event] = []
        end = time.monotonic() + timeout
        while True:
            try:
                events.append(self._events.get(timeout=0 if events else max(0.0, end - time.monotonic())))
            except queue.Empty:
                return events or self._overdue()

    def describe(self) -> str:
        """Cores and memory of this machine, or of the part of it that this process may use."""
        return f"{machine.cores()}, {machine.memory()}"

    def close(self) -> None:
        """End all processes."""
        for process in self._processes.values():
            process.popen.kill()
        end = time.monotonic() + GRACE
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):  # it waits for a disk, and ends when that answers
                process.popen.wait(max(0.0, end - time.monotonic()))
            if process.thread is not None:
                process.thread.join(0.1 if process.told else max(0.1, end - time.monotonic()))
        self._processes.clear()

    def _overdue(self) -> list[Event]:
        """The deaths that a listener should have told by now."""
        now, found = time.monotonic(), list[Event]()
        for worker, process in self._processes.items():
            if not process.limit and process.popen.poll() is not None:
                process.limit = now + GRACE
            if process.limit and now > process.limit and not process.told:
                process.told = True
                code = process.popen.returncode
                reason = "killed, but still there" if code is None else _reason(code, _last_words(process.errors))
                found.append(Died(worker=worker, prompts=process.begun, reason=reason))
        return found

    @staticmethod
    def _say(process: _Process, what: Setup | Task) -> None:
        """Send a line, without waiting for a process that does not read."""

        def write(pipe: IO[bytes] | None = process.popen.stdin) -> None:
            assert pipe is not None
            # A pipe without a reader, or closed since the process ended: its `Died` is on the way.
            with contextlib.suppress(BrokenPipeError, ValueError):
                pipe.write(what.model_dump_json().encode() + b"\n")
                pipe.flush()

        threading.Thread(target=write, daemon=True).start()

    def _seat(self, worker: str, gpus: float) -> dict[str, str]:
        """GPUs for a worker: parts of one, or several whole ones, the emptiest first."""
        if not gpus or not self._gpus:
            return {}
        load = dict.fromkeys(self._gpus, 0.0)
        for name, taken in self._taken.items():
            if name in self._processes and self._processes[name].popen.poll() is None:
                for gpu, part in taken.items():
                    load[gpu] += part
        chosen = sorted(self._gpus, key=lambda gpu: (load[gpu], self._gpus.index(gpu)))[: max(1, int(gpus))]
        self._taken[worker] = dict.fromkeys(chosen, min(1.0, gpus))
        return {"CUDA_VISIBLE_DEVICES": ",".join(chosen)}

    def _listen(self, worker: str, process: _Process) -> None:
        """Turn what a process writes into events, until it ends."""
        assert process.popen.stdout is not None
        assert process.popen.stdin is not None
        for line in process.popen.stdout:
            event = _read(worker, line)
            if isinstance(event, Began):
                process.begun = event.prompts
            elif event is not None:
                process.begun = ()
            if event is not None:
                self._events.put(event)
        code = process.popen.wait()
        process.popen.stdout.close()
        with contextlib.suppress(BrokenPipeError):  # a task it never read
            process.popen.stdin.close()
        last = _last_words(process.errors)
        process.errors.close()
        starved = code == -signal.SIGKILL or bool(_NO_MEMORY.search(last))
        if not process.told:
            process.told = True
            self._events.put(Died(worker=worker, prompts=process.begun, reason=_reason(code, last), starved=starved))


def visible_gpus() -> int:
    """GPUs that this process may use."""
    return len(_gpu_names())


def _gpu_names() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]


def _read(worker: str, line: bytes) -> Event | None:
    """One line as an event; None for half a line, which is what a process killed in the middle leaves."""
    try:
        content = json.loads(line)
        kind = _KINDS[content.pop("kind_of_event")]
    except (ValueError, KeyError, RecursionError):
        return None
    return TypeAdapter(kind).validate_python({**content, "worker": worker})


def _last_words(errors: IO[bytes]) -> str:
    """The last line of a process's errors."""
    size = errors.seek(0, os.SEEK_END)
    errors.seek(max(0, size - _LAST))
    said = errors.read().decode(errors="replace").strip().splitlines()
    return said[-1] if said else ""


def _reason(code: int, last: str) -> str:
    """How a process ended, and the last line of its errors."""
    if code < 0:
        try:
            how = f"killed by {signal.Signals(-code).name}"
        except ValueError:
            how = f"killed by signal {-code}"
    else:
        how = f"ended with exit code {code}"
    return f"{how} ({last[:200]})" if last and code != -signal.SIGKILL else how


def _environment(threads: int) -> dict[str, str]:
    """The environment of a worker: one number of threads for every library that reads one, set before it loads."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "ARROW_NUM_THREADS")
    return {**os.environ, **dict.fromkeys(names, str(threads)), "TOKENIZERS_PARALLELISM": "false"}
