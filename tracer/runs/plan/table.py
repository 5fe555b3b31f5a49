"""A plan as a table for the terminal. Knows how sizes are read; decides nothing."""

from __future__ import annotations

import json
from typing import Any

from tracer.errors import option
from tracer.reports.folded import Folded, folded
from tracer.reports.parts import Sheet
from tracer.runs.plan.planner import PROMPTS, Plan
from tracer.runs.report import duration
from tracer.system.machine import gib
from tracer.text import Rows


def plan_table(made: Plan) -> Folded:
    """The predicted memory by length of prompt, then what follows from it."""
    shape, gpu = made.shape, made.device is not None
    title = f"{shape.name}: {gib(shape.weight_bytes)} of weights; predicted memory of one worker"
    parts = ("one prompt: GPU", "host", "batch", "batch: GPU", "host") if gpu else ("one prompt", "batch", "a batch")
    cells = []
    for row in made.rows:
        single, batch = ((memory.device, memory.host) if gpu else (memory.peak,) for memory in (row.single, row.batch))
        shown = [str(row.length), *map(gib, single), *(map(str, (row.prompts, *map(gib, batch))))]
        shown = shown if row.prompts else [*shown[: 2 + len(single)], *["-"] * len(batch)]
        cells.append((*shown, row.batch.phase))
    return folded([Sheet.of("plan", title, ["tokens", *parts, "<most in"], cells), "\n".join(lines(made))])


def plan_rows(made: Plan) -> Rows:
    """The predicted memory by length of prompt, in bytes."""
    rows = []
    for one in made.rows:
        row: dict[str, Any] = {"tokens": one.length, "prompts_in_batch": one.prompts}
        for name, memory in (("prompt", one.single), ("batch", one.batch)):
            row |= {f"{name}_gpu_bytes": memory.device, f"{name}_host_bytes": memory.host}
            row |= {f"{name}_peak_bytes": memory.peak, f"{name}_most_in": memory.phase}
        rows.append(row)
    return Rows.of(rows)


def plan_json(made: Plan) -> str:
    """A plan as JSON: the rows, what follows from them, and sizes in bytes."""
    names = ("longest", "median", "mean", "prompts", "host", "device", "n_devices", "fits", "tight", "gpus_per_worker")
    about = {name: getattr(made, name) for name in (*names, "workers", "memory", "disk", "seconds", "most")}
    about |= {"weights": made.shape.weight_bytes, "advice": made.advice, "notes": made.notes}
    return json.dumps(about | {"rows": plan_rows(made).rows}, indent=1)


def lines(made: Plan) -> list[str]:
    """What follows from the predicted memory, a sentence each."""
    if not made.fits and not made.tight:
        return [*made.advice, *made.notes]
    if made.device is None:
        place = f"workers on this machine: {made.workers}, by {made.room or f'{gib(made.host)} of memory'}"
    else:
        gpus = "one GPU" if made.gpus_per_worker == 1 else f"{made.gpus_per_worker} GPUs"
        place = f"workers on this machine: {made.workers}, each on {gpus} of {gib(made.device)}"
    return [
        place,
        f"a batch may use {gib(made.memory)} by tracer's own estimate",
        *_whole_job(made),
        *made.advice,
        *made.notes,
    ]


def _whole_job(made: Plan) -> list[str]:
    """Prompts, disk and time of the job."""
    tokens = f"about {made.mean:.0f} tokens each"
    if made.prompts is None:
        lines = [f"how many prompts there are is not known; disk and time are for {PROMPTS:,} of {tokens}"]
    else:
        lines = [f"prompts: {'up to ' if made.most else ''}{made.prompts:,}, {tokens}"]
    if made.disk:
        lines.append(f"disk: about {gib(made.disk)}")
    if not made.circuits:
        return lines
    if made.measured is None or made.seconds is None:
        return [*lines, f"time: {option('measure', True)} traces some of the prompts here and says what all will take"]
    one = made.measured
    what = f"{one.prompts} prompts of {one.tokens:,} tokens took one worker {one.seconds:.1f} s here"
    workers = "1 worker" if made.workers == 1 else f"{made.workers} workers"
    taken = f"time: about {duration(made.seconds)} with {workers}, beside {duration(one.loading)} of loading"
    return [*lines, f"{taken} ({what}; what follows on all prompts is not counted)"]
