"""A plan as a table for the terminal. Knows rich and how sizes are read; decides nothing."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tracer.errors import option
from tracer.reports.tables import cell
from tracer.runs.plan.planner import PROMPTS, Plan
from tracer.runs.report import duration
from tracer.system.machine import gib
from tracer.text import printable


def plan_table(made: Plan) -> RenderableType:
    """The predicted memory by length of prompt, then what follows from it."""
    shape, gpu = made.shape, made.device is not None
    table = Table(title=f"{cell(shape.name)}: {gib(shape.weight_bytes)} of weights; predicted memory of one worker")
    parts = ("one prompt: GPU", "host", "batch", "batch: GPU", "host") if gpu else ("one prompt", "batch", "a batch")
    for name in ("tokens", *parts):
        table.add_column(name, justify="right")
    table.add_column("most in")
    for row in made.rows:
        single, batch = ((memory.device, memory.host) if gpu else (memory.peak,) for memory in (row.single, row.batch))
        cells = [str(row.length), *map(gib, single), str(row.prompts), *map(gib, batch)]
        table.add_row(*(cells if row.prompts else [*cells[: 2 + len(single)], *["-"] * len(batch)]), row.batch.phase)
    return Group(table, *(Text(printable(line)) for line in _lines(made)))


def _lines(made: Plan) -> list[str]:
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
