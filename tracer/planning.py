"""The plan of a job on this machine: its prompts' lengths, its model's shape, and what there is to run on.

Knows how a job becomes the planner's question, and which of its answers a run needs. Refuses to know how memory is
predicted (memory.py) and batches are chosen (planner.py). Reads some prompts and a tokenizer, never weights.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import replace

import psutil

from tracer import dataset, tasks
from tracer.errors import TracerError
from tracer.jobs import BenchmarkJob, Job
from tracer.model import read_tokenizer
from tracer.planner import Plan, check, demands, plan
from tracer.sizes import Shape

SAMPLE = 256
"""Prompts whose lengths are looked at: the first ones."""


def plan_job(job: Job, workers: int | None = None) -> Plan:
    """What a job needs, and how much of it this machine has.

    Args:
        workers: as asked for; as many as fit if None.

    Raises:
        JobError: the job's data. ModelError: no such model.
    """
    import torch

    shape = Shape.of(job.model, job.revision, job.dtype or "float32", job.attention)
    lengths = list(_lengths(job))
    on_gpu = torch.cuda.is_available() and not (job.device or "").startswith("cpu")
    gpus = torch.cuda.device_count() if on_gpu else 0
    made = plan(
        shape,
        demands(job),
        lengths or [1],
        host=psutil.virtual_memory().available,
        device=torch.cuda.get_device_properties(0).total_memory if gpus else None,
        n_devices=gpus,
        cpus=workers or os.cpu_count() or 1,
    )
    if max(lengths, default=0) <= shape.context_length:
        return made
    long = sum(length > shape.context_length for length in lengths)
    told = f"{long} of {len(lengths)} prompts sampled are longer than the {shape.context_length} tokens that fit: "
    return replace(made, advice=(*made.advice, told + "they will fail"))


def before(job: Job, workers: int | None, here: bool) -> Plan | None:
    """The plan of a run that is about to start; None where workers run elsewhere and only they can see the model.

    Args:
        here: whether workers run on this machine.

    Raises:
        ModelError: on this machine not even one prompt fits. JobError: the job's data.
    """
    try:
        made = plan_job(job, workers)
    except TracerError:
        if here:
            raise
        return None
    if here:
        check(made)
    return made


def _lengths(job: Job) -> Iterator[int]:
    """Tokens of the first prompts; those that are no prompts at all are the run's to tell."""
    tokenizer = read_tokenizer(job.model, job.revision)
    if isinstance(job, BenchmarkJob):
        for structure in job.structures:
            pairs = tasks.load(job.task, structure=structure, split="train", count=min(job.train, 16), seed=job.seed)
            yield from (len(tokenizer.encode(pair.prompt)) for pair in pairs)
        return
    for row in itertools.islice(dataset.read(job.source), SAMPLE):
        if row.token_ids is not None:
            yield len(row.token_ids)
        elif row.text:
            yield len(tokenizer.encode(row.text))
