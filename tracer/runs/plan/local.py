"""The plan of a job on this machine: its prompts' lengths, its model's shape, and what there is to run on.

Knows how a job becomes the planner's question, and which of its answers a run needs. Refuses to know how memory is
predicted (runs/plan/memory.py) and batches are chosen (runs/plan/planner.py). Reads some prompts and a tokenizer,
never weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tracer import data
from tracer.errors import JobError, TracerError
from tracer.model.backend import budget_without_gpu
from tracer.model.model import read_tokenizer
from tracer.model.sizes import Shape
from tracer.prompts import tokenize
from tracer.runs.jobs import BenchmarkJob, Job, load_job
from tracer.runs.plan import planner
from tracer.runs.plan.planner import Plan, check, demands
from tracer.runs.split import check_overlap, train_and_test
from tracer.runs.workers.placement import seats
from tracer.system import machine
from tracer.system.machine import gib

SAMPLE = 256
"""Prompts whose lengths are looked at: the first ones."""
_SAMPLE_TEXT = 1 << 24


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


def plan(job: str | Path | Mapping[str, Any] | Job, *, set: Sequence[str] = (), workers: int | None = None) -> Plan:
    """What a job will need, from its first prompts and the model's configuration, without weights; as ``tracer plan``.

    Args:
        job, set: as of `tracer.run`. workers: as asked for; as many as fit on this machine if None.

    Raises:
        JobError: the job or its data. ModelError: no such model.
    """
    chosen = load_job(job, set)
    shared = check_overlap(chosen)
    made = plan_job(chosen, workers)
    return replace(made, notes=(*made.notes, *shared))


def plan_job(
    job: Job, workers: int | None = None, gpus_per_worker: float | None = None, least: int | None = None
) -> Plan:
    """What a job needs, and how much of it this machine has.

    Args:
        workers: as asked for; as many as fit if None. gpus_per_worker: a part of a GPU, if workers share one.
        least: bytes that a batch needs on a CPU, with fewer workers if necessary.

    Raises:
        JobError: the job's data. ModelError: no such model.
    """
    import torch

    shape = Shape.of(job.model, job.revision, job.dtype or "float32", job.attention)
    notes: list[str] = []
    lengths = list(_lengths(job, shape.context_length, notes.append))
    fitting = [length for length in lengths if length <= shape.context_length]
    on_gpu = torch.cuda.is_available() and not (job.device or "").startswith("cpu")
    gpus = torch.cuda.device_count() if on_gpu else 0
    part = min(1.0, gpus_per_worker or 1.0)
    memory = machine.memory()
    ask = partial(
        planner.plan,
        shape,
        demands(job),
        fitting or [1],
        host=max(1, memory.available),
        device=int(part * torch.cuda.get_device_properties(0).total_memory) if gpus else None,
        n_devices=seats(float(gpus), part),
    )
    made = first = ask(cpus=workers or machine.cores().count)
    while least is not None and made.device is None and made.memory < least and made.workers > 1:
        made = ask(cpus=made.workers - 1)
    advice = list(first.advice)
    if long := len(lengths) - len(fitting):
        advice.append(
            f"{long} of {len(lengths)} prompts sampled are longer than the {shape.context_length} tokens that "
            "the model reads: they will fail"
        )
    if getattr(job, "circuit", "none") != "none":
        positions = made.longest if getattr(job, "circuit", "none") == "aligned" else 1
        size = shape.n_layers * shape.n_neurons(demands(job)[0].basis) * positions * 8
        if size > 2**26:
            advice.append(
                f"the circuit of the dataset takes {gib(size)} of memory for each length of prompt in a shard, and as "
                "much disk for each shard: use larger shards, or circuit: none"
            )
    return replace(made, advice=tuple(advice), notes=tuple(notes), room=str(memory))


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
        made = plan_job(job, workers, gpus_per_worker, least=budget_without_gpu() if here else None)
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


def _lengths(job: Job, most: int, heard: Callable[[str], None]) -> Iterator[int]:
    """Tokens of the first prompts, as many of them as have `_SAMPLE_TEXT` characters together; a text that the model
    cannot read has one more than it can. The run itself reports those that are not valid prompts.

    Args:
        most: tokens that the model reads.
        heard: as of `data.read`.
    """
    tokenizer, read = read_tokenizer(job.model, job.revision), 0

    def length(text: str) -> int:
        try:
            return len(tokenize(text, tokenizer, most))
        except JobError:
            return most + 1

    if isinstance(job, BenchmarkJob):
        for name in job.sets:
            yield from (length(pair.prompt) for pair in train_and_test(job, name, most=16)[0])
        return
    for row in itertools.islice(data.read(job.source, heard=heard), SAMPLE):
        if row.token_ids is not None:
            yield len(row.token_ids)
        elif row.text:
            yield length(row.text)
            read += len(row.text)
        if read > _SAMPLE_TEXT:
            return
