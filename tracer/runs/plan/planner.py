"""What a run needs before it starts: whether a prompt fits, how many go into a batch, GPUs and workers, disk.

Predictions are runs/plan/memory.py's and hold within 25 %, so that at most four fifths of what there is are planned
for. Knows jobs, machines and what to change where they do not fit together. Loads no model and reads no prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any

from tracer.attribution.selection import node_limit
from tracer.errors import JobError, ModelError
from tracer.model.backend import BUDGET_WITHOUT_GPU
from tracer.model.sizes import Shape
from tracer.runs.plan.memory import CUDA_CONTEXT, LIBRARIES, Memory, Workload, predict
from tracer.settings import BASELINES, RULES, rules_of
from tracer.system.machine import gib

USED = 0.8
"""The share of a memory that is planned for."""
TIGHT = 1.25
"""What is predicted to need more than so many times what there is cannot fit."""
MOST_PROMPTS = 4096
"""In one batch."""
PROMPTS = 1000
"""That disk and time are said for where it is not known how many there are."""
LEAST_BUDGET = 2**24

# Bytes of the run folder by row of a table (measured: nodes 3 to 10, edges 4 to 12), and edges kept
# by node at the default share (10 to 17 on the demo; a random model keeps more).
NODE_ROW, EDGE_ROW, PROMPT_ROW = 10, 12, 400
# Of each number of a profile, in float32: they hardly repeat, but for those that are 0.
PROFILE_NUMBER = 4
EDGES_OF_NODE = 20


def workloads(job: Any) -> tuple[Workload, ...]:
    """What a job does with a prompt, or each way in which a benchmark attributes one."""
    if job.kind == "benchmark":
        ways = {
            (one.method, one.basis, one.baseline if one.baseline in BASELINES else "zero", one.rules)
            for one in job.combinations()
        }
        how: dict[str, Any] = {"metric": "difference", "circuits": False, "attention": job.attention}
        return tuple(
            Workload(method=method, basis=basis, baseline=baseline, rules=rules_of(rules), **how)
            for method, basis, baseline, rules in sorted(ways)
        )
    if job.kind == "exemplars":  # values of all nodes are never held together: less than this
        return (Workload(method="random", edges=False, circuits=False, attention=job.attention, batch=job.batch),)
    return (
        Workload(
            method=job.method,
            basis=job.basis,
            baseline=job.baseline,
            metric=job.asks,
            nodes=node_limit(job.nodes, job.threshold, job.mass),
            edges=job.edges,
            profiles=job.profiles,
            rules=RULES if job.rules is None else frozenset(job.rules),
            top_k=job.top_k,
            mass=job.mass is not None,
            whole=job.circuit != "none" or job.values,
            attention=job.attention,
            batch=job.batch,
        ),
    )


@dataclass(frozen=True)
class LengthRow:
    """One length of prompt: the memory of one prompt and of a whole batch, and how many prompts that is."""

    length: int
    prompts: int
    single: Memory
    batch: Memory


@dataclass(frozen=True)
class Measured:
    """What some prompts took: one worker's `seconds` for so many `prompts` of so many `tokens` together, the bytes on
    `disk` of what was written, and the seconds of `loading` the model."""

    prompts: int
    tokens: int
    seconds: float
    disk: int
    loading: float


@dataclass(frozen=True)
class Plan:
    """How a run is spread. Sizes are in bytes.

    Attributes:
        shape, workloads: the model, and what is done with each prompt.
        longest, median, mean: tokens of the prompts sampled.
        prompts: how many there are; None where that is not known.
        host: of the machine, or of the part of it that this process may use. room: the same in words.
        device: of one GPU, None without. n_devices: GPUs of the machine.
        fits: whether one prompt of the longest length fits. tight: it may, since a prediction holds within 25 %.
        gpus_per_worker: 0 on a CPU; above 1 the model is spread with ``device_map="auto"``.
        workers: on this machine; 0 where nothing fits.
        memory: what one batch may use, as `tracer.attribute` takes it.
        rows: by length, 8, 16, 32... to the longest.
        disk: of the run folder, for all prompts, or for 1,000 where it is not known how many there are.
        advice: what does not fit and what to change.
        notes: how the prompts sampled are read: columns that are not used, numbers and empty cells.
        most: whether `prompts` are the most that there may be.
        measured: what some of the prompts took, if that was asked for. seconds: that all of them will take, or 1,000.
    """

    shape: Shape
    workloads: tuple[Workload, ...]
    longest: int
    median: int
    mean: float
    prompts: int | None
    host: int
    device: int | None
    n_devices: int
    fits: bool
    gpus_per_worker: int
    workers: int
    memory: int
    rows: tuple[LengthRow, ...]
    disk: int
    advice: tuple[str, ...]
    notes: tuple[str, ...] = ()
    tight: bool = False
    room: str = ""
    most: bool = False
    measured: Measured | None = None
    seconds: float | None = None

    @property
    def circuits(self) -> bool:
        """Whether every prompt has a circuit, as a dataset's have."""
        return any(work.circuits for work in self.workloads)


@dataclass(frozen=True)
class _Capacity:
    """The memory that one worker may use, and over how many GPUs its model is spread."""

    shape: Shape
    workloads: tuple[Workload, ...]
    host: float
    device: int | None
    gpus: int
    max_bytes: int

    def memories(self, length: int, batch: int) -> list[Memory]:
        """What each workload takes."""
        how: dict[str, Any] = {"padded": batch > 1, "max_bytes": self.max_bytes, "gpu": self.device}
        return [predict(self.shape, work, length, batch, **how) for work in self.workloads]

    def memory(self, length: int, batch: int) -> Memory:
        """The most demanding workload's memory."""
        return max(self.memories(length, batch), key=lambda memory: memory.peak)

    def holds(self, length: int, batch: int) -> bool:
        """Whether every workload fits, on the host and on each GPU."""
        for need in self.memories(length, batch):
            over = 0 if self.device is None else on_one_gpu(self.shape, need, self.gpus) - USED * self.device
            if need.host > self.host or over > 0:
                return False
        return True

    def most(self, length: int) -> int:
        """Prompts of a length that fit together; 0 if not even one does."""
        low, high = 0, 1
        while high <= MOST_PROMPTS and self.holds(length, high):
            low, high = high, 2 * high
        high = min(high, MOST_PROMPTS + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.holds(length, middle) else (low, middle)
        return low


def on_one_gpu(shape: Shape, need: Memory, gpus: int) -> int:
    """Bytes on the fullest of the GPUs that share a model: whole blocks, beside embedding and head."""
    if gpus == 1:
        return need.device
    blocks = -(-shape.n_layers // gpus)
    work = need.device - CUDA_CONTEXT - shape.weight_bytes
    return CUDA_CONTEXT + shape.outer_bytes + blocks * shape.block_bytes + work * blocks // shape.n_layers


def plan(
    shape: Shape,
    wanted: Workload | Sequence[Workload],
    lengths: Sequence[int],
    *,
    host: int,
    device: int | None = None,
    n_devices: int = 0,
    cpus: int = 1,
    prompts: int | None = None,
) -> Plan:
    """Choose batch, GPUs and workers for prompts of these lengths on one machine.

    Args:
        shape: from `Shape.of`.
        wanted: from `workloads`; of several, the most demanding counts.
        lengths: tokens of some or all prompts.
        host: bytes of memory of the machine that may be used. device: of one GPU; None for a CPU. n_devices: GPUs.
        cpus: the most workers on a machine without a GPU.
        prompts: how many there are, if that is known.

    Raises:
        JobError: no prompts, or a length or an impossible number of devices.
    """
    several = (wanted,) if isinstance(wanted, Workload) else tuple(wanted)
    _check(several, lengths, host, device, n_devices, cpus)
    longest, most_workers = max(lengths), n_devices if device is not None else cpus
    capacity = _capacity(shape, several, longest, host, device, most_workers)
    fits = capacity.holds(longest, 1)
    tight = not fits and replace(capacity, host=TIGHT * host).holds(longest, 1)
    workers = _workers(capacity, longest, host, most_workers) if fits else int(tight)
    capacity = replace(capacity, host=_each(host, max(1, workers)))
    memory, rows = _batches(capacity, sorted({2**power for power in range(3, 64) if 2**power < longest} | {longest}))
    made = Plan(
        shape=shape,
        workloads=several,
        longest=longest,
        median=int(median(lengths)),
        mean=fmean(lengths),
        prompts=prompts,
        host=host,
        device=device,
        n_devices=n_devices,
        fits=fits,
        gpus_per_worker=capacity.gpus if device is not None else 0,
        workers=workers,
        memory=memory,
        rows=rows,
        disk=int((prompts or PROMPTS) * max(fmean(_disk(shape, work, n) for n in lengths) for work in several)),
        advice=(),
        tight=tight,
    )
    return replace(made, advice=tuple(_advice(made, capacity)))


def _workers(capacity: _Capacity, longest: int, host: int, most: int) -> int:
    """How many workers have room beside each other, each for one longest prompt."""
    workers = most // max(1, capacity.gpus)
    while workers > 1 and not replace(capacity, host=_each(host, workers)).holds(longest, 1):
        workers -= 1
    return workers


def _each(host: int, workers: int) -> float:
    """What each of several workers may hold: the libraries are there once."""
    return max(0.0, USED * host - LIBRARIES) / workers + min(LIBRARIES, USED * host)


def _check(
    several: Sequence[Workload], lengths: Sequence[int], host: int, device: int | None, n_devices: int, cpus: int
) -> None:
    if not several or not lengths:
        raise JobError("lengths []" if several else "workloads []", "there is nothing to plan", "give at least one")
    if min(lengths) < 1:
        raise JobError(f"length {min(lengths)}", "a prompt has at least one token", "check the prompts")
    for name, value in {"host": host, "device": 1 if device is None else device, "cpus": cpus}.items():
        if value < 1:
            raise JobError(f"{name}={value}", "must be 1 or more", "change it")
    if (device is None) != (n_devices == 0) or n_devices < 0:
        rule = "device is the memory of one GPU, n_devices how many there are"
        raise JobError(f"device={device}, n_devices={n_devices}", rule, "give both or neither")


def _capacity(
    shape: Shape, several: tuple[Workload, ...], longest: int, host: int, device: int | None, n_devices: int
) -> _Capacity:
    """The fewest GPUs on which one longest prompt fits, for ``exact`` the largest `max_bytes` with which it does."""
    max_bytes = BUDGET_WITHOUT_GPU if device is None else max(BUDGET_WITHOUT_GPU, device // 4)
    first = _Capacity(shape, several, USED * host, device, 1, max_bytes)
    sizes = range(1, n_devices + 1) if device is not None else range(1, 2)
    smaller = [max_bytes]
    while any(work.method == "exact" for work in several) and smaller[-1] // 4 >= LEAST_BUDGET:
        smaller.append(smaller[-1] // 4)
    for gpus in sizes:
        for size in smaller:
            if (spread := replace(first, gpus=gpus, max_bytes=size)).holds(longest, 1):
                return spread
    return replace(first, gpus=sizes[-1])


def _batches(capacity: _Capacity, marks: Sequence[int]) -> tuple[int, tuple[LengthRow, ...]]:
    """What a batch may use so that it fits at every length, and how many prompts of each that is.

    Batches are split by an estimate of their own (`Model.bytes_per_token`), so its unit is used here.
    """
    each = {length: length * capacity.shape.bytes_per_token(length=length) for length in marks}
    most = {length: capacity.most(length) for length in marks}
    exact = any(work.method == "exact" for work in capacity.workloads)
    limit = capacity.max_bytes if capacity.device is None or exact else None
    memory = min(max(1, most[length]) * each[length] for length in marks)
    if limit is not None:
        memory = min(memory, limit)
    asked = min((work.batch for work in capacity.workloads if work.batch is not None), default=MOST_PROMPTS)
    rows = []
    for length in marks:
        prompts = min(most[length], asked, max(1, memory // each[length]))
        rows.append(LengthRow(length, prompts, capacity.memory(length, 1), capacity.memory(length, max(1, prompts))))
    return memory, tuple(rows)


def _disk(shape: Shape, work: Workload, length: int) -> int:
    """Bytes of the tables of one prompt of so many tokens."""
    if not work.circuits:
        return 0
    nodes = min(work.kept, shape.n_layers * shape.n_neurons(work.basis) * length) + length + 2
    edges = EDGES_OF_NODE * nodes if work.links else 0
    profiles = PROFILE_NUMBER * nodes * (length + work.logits) if work.profiled else 0
    return NODE_ROW * nodes + EDGE_ROW * edges + profiles + PROMPT_ROW + 4 * length


def _advice(made: Plan, capacity: _Capacity) -> list[str]:
    """What does not fit or limits the run, and what to change."""
    shape, need, lines = made.shape, capacity.memory(made.longest, 1), []
    if made.tight:
        needs = f"one prompt of {made.longest} tokens needs about {gib(need.host)} of memory"
        lines.append(f"{needs}, more than is safe: one worker tries it, as few prompts at a time as it can")
    if made.fits or made.tight:
        if made.gpus_per_worker > 1:
            lines.append(f"the model takes {made.gpus_per_worker} GPUs: load it with device_map='auto'")
        if made.device is not None and made.workers * made.gpus_per_worker < made.n_devices:
            lines.append(f"{made.n_devices - made.workers * made.gpus_per_worker} GPUs stay idle: "
                         "host memory or the GPUs that one worker takes leave no room for another")  # fmt: skip
        if any(work.nodes is None and work.circuits for work in made.workloads):
            lines.append("how many nodes a threshold or mass keeps is not known before: 2,000 are counted; set nodes")
    else:
        where = f"{gib(need.peak)}, most of it in {need.phase}"
        if made.device is not None:
            where = f"{gib(need.device)} on GPUs and {gib(need.host)} of host memory"
        what = f"one prompt of {made.longest} tokens needs {where}"
        lines += [what, *_remedies(made, capacity, need)]
    if made.longest > shape.context_length:
        lines.append(f"the longest prompt has {made.longest} tokens, the model reads {shape.context_length}")
    return lines


def _remedies(made: Plan, capacity: _Capacity, need: Memory) -> list[str]:
    shape, lines = made.shape, []
    if made.device is not None and shape.largest_module_bytes + CUDA_CONTEXT > USED * made.device:
        lines.append(f"a single module takes {gib(shape.largest_module_bytes)}: use larger GPUs or a smaller dtype")
    elif made.device is not None and need.host <= USED * made.host:
        enough = next((n for n in range(1, 65) if on_one_gpu(shape, need, n) <= USED * made.device), None)
        lines += [] if enough is None else [f"{enough} GPUs of this size are enough, with device_map='auto'"]
    if shape.itemsize == 4:
        lines.append("dtype: bfloat16 halves weights and activations")
    plain = tuple(replace(work, edges=False) for work in made.workloads)
    if any(work.links for work in made.workloads) and replace(capacity, workloads=plain).holds(made.longest, 1):
        lines.append("edges: false fits")
    bare = tuple(replace(work, profiles=False) for work in made.workloads)
    if bare != made.workloads and replace(capacity, workloads=bare).holds(made.longest, 1):
        lines.append("profiles: false fits")
    fewer = tuple(replace(work, nodes=min(200, work.nodes or 200)) for work in made.workloads)
    if fewer != made.workloads and replace(capacity, workloads=fewer).holds(made.longest, 1):
        lines.append("nodes: 200 fits")
    if capacity.most(1):
        fitting = max(length for length in _lengths_below(made.longest) if capacity.holds(length, 1))
        lines.append(f"prompts of up to {fitting} tokens fit")
    else:
        taken = f"libraries take {gib(need.runtime)} and weights {gib(shape.weight_bytes)}"
        lines.append(f"{taken}: use a smaller model or a larger machine")
    return lines


def _lengths_below(longest: int) -> list[int]:
    return sorted({1, *(2**power for power in range(64) if 2**power < longest)})


def check(made: Plan) -> None:
    """Refuse a plan in which one prompt of the longest length cannot fit.

    Raises:
        ModelError: what it needs, what there is, and what to change.
    """
    if made.fits or made.tight:
        return
    where = made.room or f"{gib(made.host)} of memory"
    if made.device is not None:
        where = f"{made.n_devices} x {gib(made.device)} of GPU and {where}"
    first, *rest = made.advice
    raise ModelError(
        f"model {made.shape.name} with a prompt of {made.longest} tokens",
        f"does not fit into {USED:.0%} of {where}: {first}",
        "; or ".join(rest) or "use a larger machine",
    )
