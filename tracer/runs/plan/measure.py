"""What some prompts of a job take on this machine: seconds and disk, from a part of its run in a temporary folder.

Knows which prompts stand for all of them. What is measured is the work of a worker on a shard (runs/units/shards.py);
refuses to know what follows from it for a whole job (runs/plan/local.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory

from tracer import data
from tracer.errors import JobError, option
from tracer.model.model import Model, load
from tracer.runs.jobs import DatasetJob, Job
from tracer.runs.plan.planner import Measured
from tracer.runs.units.shards import ShardWork, input_row
from tracer.runs.workers.messages import Report, Task
from tracer.store.run_folder import RunFolder

SECONDS = 30.0
"""That measuring may take, beside loading the model, by what a single prompt took."""


def check(job: Job) -> None:
    """Refuse to measure what is not measured here.

    Raises:
        JobError: a benchmark, or a remote model.
    """
    asked = option("measure", True)
    if not isinstance(job, DatasetJob):
        rule = "only a dataset can be measured, most of a benchmark's time are its tests"
        raise JobError(asked, rule, "run it with fewer pairs")
    if job.remote:
        raise JobError(asked, "this machine would be measured, and the model is on a server", "leave it out")


def measured(job: DatasetJob, rows: Sequence[data.Row], lengths: Sequence[int], max_bytes: int) -> Measured:
    """Trace prompts of a job as a worker would, as many as one shard has and `SECONDS` allow, of all lengths alike.

    Args:
        rows: the job's first prompts. lengths: their tokens.
        max_bytes: that a batch may use, as planned; the model's own default where that is less.

    Raises:
        JobError: none of the prompts has a circuit. ModelError: no such model.
    """
    started = time.perf_counter()
    model = load(job.model, **job.loading())
    loading, room = time.perf_counter() - started, min(max_bytes, model.budget())
    order = sorted(range(len(rows)), key=lambda i: lengths[i])
    with _one_thread(model):
        usual = [rows[order[len(order) // 2]]]
        _traced(model, job, usual, room)  # what only the first prompt takes is not measured
        alone = _traced(model, job, usual, room)[0].seconds
        most = min(len(order), job.shard_size, max(1, int(SECONDS / max(alone, 1e-3))))
        chosen = [order[(2 * i + 1) * len(order) // (2 * most)] for i in range(most)]
        report, reason = _traced(model, job, [rows[i] for i in chosen], room)
    if not report.statuses.get("ok"):
        raise JobError(
            f"{len(chosen)} of the prompts", f"none has a circuit: {reason}", "see what the job asks of them"
        )
    disk = sum(file.size for name, file in report.files.items() if name != "means")
    return Measured(len(chosen), sum(lengths[i] for i in chosen), report.seconds, disk, loading)


def _traced(model: Model, job: DatasetJob, rows: Sequence[data.Row], max_bytes: int) -> tuple[Report, str]:
    """What a shard of these prompts comes to, and why one of them failed, if one did."""
    with TemporaryDirectory(prefix="tracer-plan-") as place:
        folder = RunFolder(place)
        folder.write_input(map(input_row, rows), len(rows))
        report = ShardWork(model, job, folder).run(Task(unit=0, max_bytes=max_bytes), lambda *_, **__: None)
        prompts = folder.read_table(report.files["prompts"].name)
        return report, next(filter(None, prompts["error"].to_pylist()), "")


@contextmanager
def _one_thread(model: Model) -> Iterator[None]:
    """With the threads that a worker has on a CPU."""
    import torch

    before = torch.get_num_threads()
    try:
        if model.device.type == "cpu":
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)
