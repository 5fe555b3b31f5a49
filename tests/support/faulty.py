"""A worker that misbehaves as its job says: what pools are tested with, here and on Ray.

`Setup(job={"units": [["ok", "kill"], ["hang"]]}, factory="faulty:Worker")`: unit 0 has the prompts 0 and 1, unit 1 the
prompt 2. A prompt is one of ok, raise, odd (an exception that does not unpickle), refuse, hang, kill (SIGKILL), segv,
exit:CODE, quit:CODE (SystemExit), slow:SECONDS, leave:SECONDS (kill, and a child that lives on for so long); once:X is
X in the first attempt and ok later. `job["start"]` is one of these too, for the making of the worker. `job["batch"]`
prompts are begun together (1).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence

from tracer.errors import JobError
from tracer.runs.workers.messages import Report, Setup, Task
from tracer.settings import ModelRecord

MODEL = ModelRecord(
    name="faulty",
    revision=None,
    family="none",
    fingerprint="0" * 16,
    dtype="float32",
    n_layers=1,
    d_model=2,
    d_mlp=3,
    n_heads=1,
    parallel=False,
)


class OddError(Exception):
    """Does not unpickle: it is made from two arguments and keeps one."""

    def __init__(self, left: int, right: int) -> None:
        super().__init__(f"odd {left}{right}")


class Worker:
    """Does what the job says."""

    model = MODEL
    max_bytes = 1 << 20

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        behave(setup.job.get("start", "ok"), 1)

    def work(self, task: Task, began: Callable[[Sequence[int], int], None]) -> Report:
        """One prompt after the other; the outcome says in what process."""
        units = self.setup.job["units"]
        first = sum(len(unit) for unit in units[: task.unit])
        numbers = [first + index for index in range(len(units[task.unit]))]
        if task.only is not None:
            numbers = [one for one in numbers if one in task.only]
        wanted = [one for one in numbers if one not in task.quarantined]
        for _ in range(self.setup.job.get("repeats", 0)):  # the same again: a sign of life
            began(wanted, 0)
            time.sleep(0.5)
        size = self.setup.job.get("batch", 1)
        for start in range(0, len(wanted), size):
            batch = wanted[start : start + size]
            began(batch, start)
            for one in batch:
                behave(units[task.unit][one - first], task.attempt)
        statuses = {"ok": len(wanted), "quarantined": len(numbers) - len(wanted)}
        names = ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "CUDA_VISIBLE_DEVICES")
        seen = {name: os.environ.get(name) for name in names} | {"torch": "torch" in sys.modules, "pid": os.getpid()}
        return Report(unit=task.unit, statuses=statuses, outcome=seen)


def behave(how: str, attempt: int) -> None:
    """Do as one prompt says."""
    name, _, value = how.partition(":")
    if name == "once":
        if attempt == 1:
            behave(value, attempt)
    elif name == "raise":
        raise ValueError("a worker's bug")
    elif name == "odd":
        raise OddError(1, 2)
    elif name == "refuse":
        raise JobError("the prompt", "is wrong", "mend it")
    elif name == "hang":
        time.sleep(3600)
    elif name == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif name == "leave":  # a child of its own, which has its pipes, and SIGKILL
        if not os.fork():
            time.sleep(float(value))
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    elif name == "segv":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif name == "exit":
        os._exit(int(value))
    elif name == "quit":
        raise SystemExit(int(value))
    elif name == "slow":
        time.sleep(float(value))
    elif name != "ok":
        raise AssertionError(f"no such behaviour: {how}")
