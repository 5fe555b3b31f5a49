"""A benchmark's curves as their mean over structures, which is how the paper plots them.

Knows which curves can be averaged, and that their spread is no confidence interval. Refuses to know how they are shown.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tracer.evaluation.curves import Curves
from tracer.evaluation.statistics import Interval
from tracer.runs.jobs import Ranking
from tracer.runs.units.benchmark_report import BenchmarkResult, Outcome, named

CURVES = ("faithfulness", "completeness", "control_faithfulness")


@dataclass(frozen=True)
class Mean:
    """The curves of one combination, apart from the structure, as means over all structures, which count alike.

    Attributes:
        first: the combination's outcome on the first structure. n_structures: how many there are.
        sizes: those that all structures have.
        curves: by name (`CURVES`), of each size the mean; ``low`` and ``high`` are those of the lowest and the highest
            structure, and no confidence interval.
    """

    first: Outcome
    n_structures: int
    sizes: tuple[int, ...]
    curves: dict[str, Interval]

    @property
    def faithfulness(self) -> Interval:
        return self.curves["faithfulness"]

    @property
    def completeness(self) -> Interval:
        return self.curves["completeness"]

    def rows(self) -> Iterator[dict[str, Any]]:
        """As a table, a row per size."""
        names = {name: value for name, value in named(self.first).items() if name != "structure"}
        for i, size in enumerate(self.sizes):
            row: dict[str, Any] = names | {"n_structures": self.n_structures, "size": size}
            for name, curve in self.curves.items():
                short = name.removesuffix("_faithfulness")
                row |= {short: float(curve.estimate[i])}
                row |= {f"{short}_lowest": float(curve.low[i]), f"{short}_highest": float(curve.high[i])}
            yield row


def means(result: BenchmarkResult) -> list[Mean]:
    """Of every combination that all structures of the job have, in the job's order; none of a single structure."""
    groups: dict[tuple[Any, ...], list[Outcome]] = {}
    for outcome in result.outcomes:
        groups.setdefault(tuple(value for name, value in named(outcome).items() if name != "structure"), []).append(
            outcome
        )
    whole = [group for group in groups.values() if len(group) == len(result.job.sets) > 1]
    return [mean for group in whole if (mean := _mean(group, result.job.rankings[0])).sizes]


def _mean(outcomes: list[Outcome], ranking: Ranking) -> Mean:
    curves = [one.rankings[ranking] for one in outcomes]
    sizes = tuple(sorted(functools.reduce(set.intersection, (set(one.sizes) for one in curves))))
    return Mean(outcomes[0], len(outcomes), sizes, {name: _over(curves, name, sizes) for name in CURVES})


def _over(curves: list[Curves], name: str, sizes: tuple[int, ...]) -> Interval:
    values = torch.stack([getattr(one, name).estimate[[one.sizes.index(size) for size in sizes]] for one in curves])
    return Interval(low=values.amin(0), high=values.amax(0), estimate=values.mean(0))
