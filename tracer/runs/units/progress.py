"""How far a unit is that takes long: told in stages, now and then, with its share of the unit's work.

Knows how much work a method is, in forward passes of one prompt: an estimate, which only the time to go depends on.
Refuses to know what a stage computes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from tracer.attribution.exact import Progress
from tracer.runs.jobs import BenchmarkJob, Combination
from tracer.runs.workers.messages import Stage

EVERY = 1.0
"""Seconds between two reports."""
BACKWARD = 2
"""A backward pass, in forward passes."""
AREAS = 10
"""Sizes that curves add to those that are asked for."""
TOKENS = 8
"""Of a prompt of the benchmark, where no prompt is known yet."""

Told = Callable[[Stage], None]


class Stages:
    """The stages of a unit, one after the other.

    Args:
        told: is given where the unit is, at most every `EVERY` seconds but for a stage's first report.
        work: what each stage is called, and how much work it is, in any measure.
        clock: seconds.
    """

    def __init__(
        self, told: Told, work: Sequence[tuple[str, float]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._told, self._work, self._clock = told, tuple(work), clock
        self._last, self._at, self._lock = 0.0, -1, threading.Lock()  # requests to a server report from threads

    def progress(self, stage: int) -> Progress:
        """What the stage of that number reports its steps to."""
        what, mine = self._work[stage]
        before, whole = sum(work for _, work in self._work[:stage]), sum(work for _, work in self._work)

        def report(done: int, total: int) -> None:
            with self._lock:
                now = self._clock()
                if stage == self._at and now - self._last < EVERY:
                    return
                self._last, self._at = now, stage
                share = (before + mine * done / max(total, 1)) / whole if whole else 0.0
                self._told(Stage(what=what, done=done, total=total, share=min(share, 1.0)))

        return report


def attribution_work(method: str, steps: int, n_layers: int, n_nodes: int) -> float:
    """Of attributing one pair, in forward passes of a prompt; see attribution/methods.py."""
    both = 1 + BACKWARD
    if method in ("ig", "conductance"):
        return float(steps * both + 3)
    if method == "ig-activation":
        return float((n_layers + 1) * steps * both + 3)
    return float({"exact": n_nodes, "delta": 2, "random": 1}.get(method, both + 1))


def curves_work(n_prompts: int, n_sizes: int) -> float:
    """Of one ranking's curves: circuits, what is without them, and random ones, of every size on every prompt."""
    return 3.0 * n_prompts * (n_sizes + AREAS)


def combination_work(job: BenchmarkJob, one: Combination, n_layers: int, width: int) -> float:
    """Of a combination as a whole, where its pairs are not known yet; `width`: nodes of a layer and position."""
    each = attribution_work(one.method, job.steps, n_layers, n_layers * width * TOKENS)
    return job.train * each + len(job.rankings) * curves_work(job.test, len(job.sizes))
