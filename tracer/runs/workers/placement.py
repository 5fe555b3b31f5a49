"""Where workers go: processes of this machine or actors of a Ray cluster, how many, and what each is given.

Knows cores, GPUs, memory and how many requests a key may have in flight. Refuses to know what workers do.
"""

from __future__ import annotations

from dataclasses import dataclass

from tracer.errors import JobError, option
from tracer.runs.jobs import Job
from tracer.runs.workers.messages import Pool
from tracer.runs.workers.processes import LocalPool, visible_gpus
from tracer.system import machine

_MOST = 8  # processes on the cores of one machine, unless more are asked for


@dataclass(frozen=True)
class Placing:
    """A pool, how many workers it is asked for, and what each is given; `in_flight`: requests to a service."""

    pool: Pool
    workers: int
    cpus: float
    gpus: float
    in_flight: int


def seats(gpus: float, each: float) -> int:
    """Workers that fit on so many GPUs, without splitting one worker over two shared ones."""
    return int(int(gpus) * (1 // each)) if each < 1 else int(gpus / each)


def check_asked(job: Job, workers: int | None, gpus_per_worker: float | None) -> None:
    """Refuse impossible numbers of workers and GPUs.

    Raises:
        JobError: which number, and what is possible.
    """
    if workers is not None and workers < 1:
        raise JobError(f"workers={workers}", "must be 1 or more", "leave it out for as many as fit")
    if job.remote and workers is not None and workers > job.requests:
        raise JobError(
            f"workers={workers}",
            f"are more than the {job.requests} requests that the run may have in flight",
            "use fewer, one is enough without local weights, or raise in_flight",
        )
    if gpus_per_worker is not None:
        whole = gpus_per_worker == int(gpus_per_worker)
        if gpus_per_worker < 0 or (gpus_per_worker > 1 and not whole):
            raise JobError(
                f"gpus_per_worker={gpus_per_worker:g}", "must be a part of one GPU or a whole number", "use .5, 1 or 2"
            )
        if gpus_per_worker > 1 and job.device_map is None:
            raise JobError(
                f"gpus_per_worker={gpus_per_worker:g}",
                "has no effect on a model that sits on one GPU",
                "spread it with --set device_map=auto",
            )


def place(
    job: Job,
    ray: str | None,
    workers: int | None,
    gpus_per_worker: float | None,
    n_units: int,
    pool: Pool | None,
    most: int | None = None,
) -> Placing:
    """Choose where a job runs.

    Args:
        ray: None for processes here, ``local``, ``auto``, or a cluster's address.
        workers, gpus_per_worker: as asked for; None for what the machines offer.
        n_units: more workers than this would have nothing to do.
        pool: taken as it is, if given.
        most: workers that fit in this machine's memory, as planned; matters where their number was not asked for.

    Raises:
        JobError: more GPUs than this machine has. RunError: a cluster that cannot be reached.
    """
    if pool is not None:
        return Placing(pool, workers or 1, 1.0, float(gpus_per_worker or 0), _share(job, workers or 1))
    if ray is None:
        cpus, gpus, made = float(machine.cores().count), float(visible_gpus()), LocalPool()
    else:
        from tracer.runs.workers.cluster import RayPool

        made = RayPool(ray)
        cpus, gpus = made.capacity()
    wants_gpu = not (job.device or "").startswith("cpu") and (not job.remote or job.weights == "local")
    each = gpus_per_worker if gpus_per_worker is not None else float(bool(gpus) and wants_gpu)
    if ray is None and each > gpus:
        made.close()
        raise JobError(
            f"gpus_per_worker={each:g}",
            f"this machine has {gpus:g} GPUs",
            f"use fewer, or {option('ray')} with a cluster",
        )
    if workers is None:
        elsewhere = job.remote and job.weights is None
        workers = 1 if elsewhere else seats(gpus, each) if each else int(cpus) if ray else min(int(cpus), _MOST)
        workers = min(workers, workers if most is None else most, job.requests if job.remote else workers)
    workers = max(1, min(workers, n_units))
    # Workers that wait for a server need no core of their own.
    return Placing(made, workers, 0.1 if job.remote else 1.0, each, _share(job, workers))


def _share(job: Job, workers: int) -> int:
    """Requests that each worker may have in flight: equal shares, so that it does not matter which of them is
    replaced, and together never more than the key's limit."""
    return max(1, job.requests // workers)
