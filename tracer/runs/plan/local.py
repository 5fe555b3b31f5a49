"""The plan of a job on this machine: its prompts' lengths, its model's shape, and what there is to run on.

Knows how a job becomes the planner's question, and which of its answers a run needs. Refuses to know how memory is
predicted (runs/plan/memory.py) and batches are chosen (runs/plan/planner.py). Reads some prompts and a tokenizer;
weights only where prompts are to be measured (runs/plan/measure.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from tracer import data
from tracer.batching import chunked
from tracer.errors import JobError, TracerError
from tracer.model.backend import budget_without_gpu
from tracer.model.model import read_tokenizer
from tracer.model.sizes import Shape
from tracer.prompts import Prompt, rendered, tokenize
from tracer.runs.jobs import AnyJob, BenchmarkJob, DatasetJob, ExemplarsJob, Job, RevisionsJob, load_job
from tracer.runs.plan import measure as measuring
from tracer.runs.plan import planner
from tracer.runs.plan.planner import PROMPTS, Plan, check, workloads
from tracer.runs.split import check_overlap, train_and_test
from tracer.runs.workers.placement import seats
from tracer.system import machine
from tracer.system.machine import gib

SAMPLE = 256
"""Prompts whose lengths are looked at: the first ones."""
_SAMPLE_TEXT = 1 << 24
COUNTED = 100_000
"""Rows of files that are counted; of more it is not known how many there are."""


@dataclass(frozen=True)
class Start:
    """The planner's answer for a run that is about to start.

    Attributes:
        workers: that fit on this machine with batches as they are always cut; at least 1.
        max_bytes: that a batch may use; None for the model's own default, which does not depend on free memory, so
            that a job is split the same way everywhere.
        advice: what a user should know.
    """

    workers: int
    max_bytes: int | None
    advice: tuple[str, ...]


@dataclass(frozen=True)
class _Sample:
    """A job's first prompts.

    Attributes:
        shape: of the job's model.
        rows: of a dataset. lengths: their tokens, of each row or pair.
        prompts: how many the job has, if that is known. most: whether that is the most that it may have.
    """

    shape: Shape
    rows: tuple[data.Row, ...]
    lengths: tuple[int, ...]
    prompts: int | None
    most: bool = False
    notes: tuple[str, ...] = ()


def plan(
    job: str | Path | Mapping[str, Any] | AnyJob,
    *,
    set: Sequence[str] = (),
    workers: int | None = None,
    measure: bool = False,
) -> Plan:
    """What a job will need, from its first prompts and the model's configuration, without weights; as ``tracer plan``.

    Args:
        job: a job file, or its content.
        set: changes to it, ``key=value``.
        workers: as asked for; as many as fit on this machine if None.
        measure: load the model here, trace some of the prompts, and say what time and disk all of them will take.

    Returns:
        Memory, batches, workers and disk of the run, and what does not fit.

    Raises:
        JobError: the job or its data; or none of its prompts can be measured. ModelError: no such model, or to be
            measured and too large.
    """
    asked = load_job(job, set)
    if isinstance(asked, RevisionsJob):
        first, *rest = asked.parts().values()
        made = plan(first, workers=workers, measure=measure)
        said = f"this is what one of {1 + len(rest)} revisions needs: they are run one after the other"
        return replace(made, notes=(*made.notes, said))
    chosen = asked
    if measure:
        measuring.check(chosen)
    shared = check_overlap(chosen)
    sample = _sample(chosen)
    made = plan_sample(chosen, sample, workers)
    if measure:
        check(made)
        made = _measured(chosen, made, sample)
    return replace(made, notes=(*made.notes, *shared))


def _measured(job: Job, made: Plan, sample: _Sample) -> Plan:
    """A plan with what some of the prompts took, and all of them will: in proportion to their tokens."""
    assert isinstance(job, DatasetJob)
    prompts = made.prompts or PROMPTS
    found = measuring.measured(job, sample.rows, sample.lengths, made.memory)
    share = prompts * made.mean / found.tokens
    units = -(-prompts // job.shard_size)  # no more workers than these have work
    seconds = found.seconds * share / max(1, min(made.workers, units))
    disk = int(found.disk * share) + _sums(job, made.shape, sample.lengths, prompts)
    return replace(made, measured=found, seconds=seconds, disk=disk)


def plan_sample(
    job: Job,
    sample: _Sample,
    workers: int | None = None,
    gpus_per_worker: float | None = None,
    least: int | None = None,
) -> Plan:
    """What a job needs, and how much of it this machine has.

    Args:
        workers: as asked for; as many as fit if None. gpus_per_worker: a part of a GPU, if workers share one.
        least: bytes that a batch needs on a CPU, with fewer workers if necessary.
    """
    import torch

    shape = sample.shape
    fitting = [length for length in sample.lengths if length <= shape.context_length]
    on_gpu = torch.cuda.is_available() and not (job.device or "").startswith("cpu")
    gpus = torch.cuda.device_count() if on_gpu else 0
    part = min(1.0, gpus_per_worker or 1.0)
    memory = machine.memory()
    ask = partial(
        planner.plan,
        shape,
        workloads(job),
        fitting or [1],
        host=max(1, memory.available),
        device=int(part * torch.cuda.get_device_properties(0).total_memory) if gpus else None,
        n_devices=seats(float(gpus), part),
        prompts=sample.prompts,
    )
    made = first = ask(cpus=workers or machine.cores().count)
    while least is not None and made.device is None and made.memory < least and made.workers > 1:
        made = ask(cpus=made.workers - 1)
    disk = made.disk + _sums(job, shape, fitting, made.prompts or PROMPTS)
    if isinstance(job, DatasetJob) and job.values:
        disk += 4 * shape.n_layers * shape.n_neurons(job.basis) * (made.prompts or PROMPTS)
    advice = (*first.advice, *_said(job, made, sample))
    return replace(made, advice=advice, disk=disk, notes=sample.notes, room=str(memory), most=sample.most)


def _said(job: Job, made: Plan, sample: _Sample) -> Iterator[str]:
    """What a user should know of the job's prompts and its circuit."""
    shape, long = made.shape, sum(length > made.shape.context_length for length in sample.lengths)
    if long:
        yield (
            f"{long} of {len(sample.lengths)} prompts sampled are longer than the {shape.context_length} tokens that "
            "the model reads: they will fail"
        )
    if isinstance(job, DatasetJob) and job.circuit != "none":
        positions = made.longest if job.circuit == "aligned" else 1
        size = shape.n_layers * shape.n_numbered(job.basis) * positions * 8
        if size > 2**26:
            yield (
                f"the circuit of the dataset takes {gib(size)} of memory for each length of prompt in a shard, and as "
                "much disk for each shard: use larger shards, or circuit: none"
            )


def _sums(job: Job, shape: Shape, lengths: Sequence[int], prompts: int) -> int:
    """Bytes on disk of the sums behind a dataset's circuit: of each shard, for every length or one for all."""
    if not isinstance(job, DatasetJob) or job.circuit == "none" or not lengths:
        return 0
    free, shards = job.circuit == "free", chunked(lengths, job.shard_size)
    positions = fmean(1 if free else sum({*shard}) for shard in shards)
    units = -(-prompts // job.shard_size)
    return int(8 * shape.n_layers * shape.n_numbered(job.basis) * positions * units)


def plan_local_run(job: Job, workers: int | None, gpus_per_worker: float | None, here: bool) -> Start | None:
    """The plan of a run that is about to start; None for remote workers, which must measure for themselves, and for
    remote models.

    Args:
        here: whether workers run on this machine.

    Raises:
        ModelError: on this machine not even one prompt fits. JobError: the job's data.
    """
    if job.remote and job.weights is None:
        return None
    try:
        least = budget_without_gpu() if here else None
        made = plan_sample(job, _sample(job, count=False), workers, gpus_per_worker, least)
    except TracerError:
        if here:
            raise
        return None
    if not here:
        return Start(1, None, made.advice)
    check(made)
    if made.device is not None:
        return Start(made.workers, None, made.advice)
    advice = list(made.advice)
    if workers is not None and made.workers < workers:
        advice.append(
            f"there is memory for {made.workers} of the {workers} workers that are asked for: some may die, and fewer "
            "go on"
        )
    if made.memory >= (usual := budget_without_gpu()):
        return Start(made.workers, None, tuple(advice))
    advice.append(
        f"memory is short ({made.room}): batches may use {gib(made.memory)}, not {gib(usual)}, and last bits may "
        "differ from those of a machine with more; batch: 1 in the job rules that out"
    )
    return Start(made.workers, made.memory, tuple(advice))


def _sample(job: Job, count: bool = True) -> _Sample:
    """The first prompts, as many of them as have `_SAMPLE_TEXT` characters together. The run itself reports those that
    are not valid prompts.

    Args:
        count: whether to read on for how many there are.

    Raises:
        JobError: the job's data. ModelError: no such model.
    """
    shape = Shape.of(job.model, job.revision, job.dtype or "float32", job.attention, job.gguf_file)
    tokenizer, notes = read_tokenizer(job.model, job.revision, job.gguf_file), list[str]()

    def length(text: str, row: data.Row | None = None) -> int:
        """A text, or messages, that the model cannot read has one token more than it can."""
        try:
            if row is not None and row.messages is not None:
                asked = Prompt(messages=row.messages, seed=row.seed)
                text = rendered(asked.messages, asked.seed, tokenizer)
                return len(tokenize(text, tokenizer, shape.context_length, special=False))
            return len(tokenize(text, tokenizer, shape.context_length))
        except JobError:
            return shape.context_length + 1

    def read(length: int) -> int:
        """Tokens that are read at a time, of so many."""
        return min(length, job.window_of(shape.context_length)) if isinstance(job, ExemplarsJob) else length

    if isinstance(job, BenchmarkJob):
        pairs = [train_and_test(job, name)[0] for name in job.sets]
        lengths = [length(pair.prompt) for some in pairs for pair in some[:16]]
        return _Sample(shape, (), tuple(lengths), sum(map(len, pairs)))
    source, rows, lengths, looked, text = data.read(job.source, heard=notes.append), list[data.Row](), [], 0, 0
    for row in itertools.islice(source, SAMPLE):
        looked += 1
        if row.token_ids is not None or row.text or row.messages:
            rows.append(row)
            length_of = len(row.token_ids) if row.token_ids is not None else length(row.text or "", row)
            lengths.append(read(length_of))
        if (text := text + len(row.text or "")) > _SAMPLE_TEXT:
            break
    prompts, most = _count(job, source, looked) if count else (None, False)
    return _Sample(shape, tuple(rows), tuple(lengths), prompts, most, tuple(notes))


def _count(job: DatasetJob | ExemplarsJob, left: Iterator[data.Row], looked: int) -> tuple[int | None, bool]:
    """How many prompts a job has, and whether that is only the most: rows are counted as far as that is cheap, and then
    it is the job's limit, if it has one."""
    if job.source.dataset is None or looked < SAMPLE:
        looked += sum(1 for _ in itertools.islice(left, COUNTED))
        if next(left, None) is None:
            return looked, False
    return job.source.most, job.source.most is not None
