"""Train and test kept apart, before a model is loaded: which prompts of a job are among its test prompts.

Knows prompts as they are written. Refuses to know tokens: a prompt that is text here and token ids there is found when
both are tokens (runs/units/dataset_circuit.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tracer import data
from tracer.data import Row, tasks
from tracer.data.tasks import Pair, sva
from tracer.errors import JobError, quoted
from tracer.runs.jobs import BenchmarkJob, DatasetJob, Job


def train_and_test(job: BenchmarkJob, name: str, most: int | None = None) -> tuple[list[Pair], list[Pair]]:
    """The pairs of one of a benchmark's sets, whatever the model can be asked of them; of files all.

    Args:
        most: no more train pairs than this, and no test pairs.

    Raises:
        JobError: a file that cannot be read or is no pairs', or fewer built-in pairs than asked for.
    """
    if job.input is not None:
        files = job.files[name]
        train = sva.pairs_of(files.train)[:most]
        return train, [] if most else sva.pairs_of(files.test)
    splits = [("train", min(job.train, most or job.train)), *([] if most else [("test", job.test)])]
    made = [tasks.load("sva", structure=name, split=split, count=count, seed=job.seed) for split, count in splits]
    return made[0], made[1] if len(made) > 1 else []


def check_overlap(job: Job) -> list[str]:
    """Refuse a job that tests on prompts its circuit is found on, unless it allows that: then a sentence on each.

    Raises:
        JobError: says how many prompts are shared; a source that cannot be read.
    """
    if isinstance(job, BenchmarkJob):
        found = []
        for name in job.sets:
            train, test = train_and_test(job, name)
            if shared := tasks.check_split(train, test, job.allow_overlap, name):
                found.append(f"{shared} of {len(test)} test pairs of {name} have a prompt that is trained on as well")
        return found
    said: list[str] = []
    if isinstance(job, DatasetJob) and job.evaluate is not None:
        for _ in apart(job, data.read(job.source), said.append):
            pass
    return said


def apart(job: DatasetJob, rows: Iterable[Row], heard: Callable[[str], None]) -> Iterator[Row]:
    """The rows of a job as they come, looked at for its test prompts.

    Args:
        heard: is told at the end how many there are, if any are and the job allows it.

    Raises:
        JobError: at the end, where it does not.
    """
    asked = job.evaluate
    test = [_asked(row) for row in data.read(asked.test)] if asked is not None else []
    wanted, found = set(filter(None, test)), dict[str | tuple[Any, ...], None]()
    for row in rows:
        if (prompt := _asked(row)) in wanted:
            found[prompt] = None
        yield row
    shared = sum(prompt in found for prompt in test)
    if not shared:
        return
    if asked is not None and asked.allow_overlap:
        heard(f"{shared} of {len(test)} test prompts are in the run as well")
        return
    raise JobError(
        f"{shared} of {len(test)} test prompts (the first: {quoted(next(iter(found)))})",
        "are both in the run and among its test prompts",
        "hold them out of one, or allow it with evaluate.allow_overlap: true in the job, which every result says",
    )


def _asked(row: Row) -> str | tuple[Any, ...]:
    """A prompt as it is written; nothing of a row that is not one."""
    if row.messages is not None:
        return (*(tuple(one.items()) for one in row.messages), row.seed)
    return row.text or row.token_ids or ""
