"""What a benchmark says of its claim: how few nodes hold the behaviour, against MLP outputs and against chance.

Knows the rule by which a structure counts, and picks combinations by their curves. Refuses to know wording
(runs/pages/benchmark.py) and how a curve was measured. Computes nothing but ratios of sizes that were measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tracer.evaluation.curves import Curves
from tracer.evaluation.statistics import Size
from tracer.reports.verdict import Point, point
from tracer.runs.jobs import Ranking
from tracer.runs.units.benchmark_report import BenchmarkResult, Outcome

LEVEL = 0.9
"""The faithfulness that a circuit is asked to hold."""
CONTROLS = frozenset({"random", "delta"})
"""Methods that are no attribution, and never the one that needs fewest."""
NOTHING = 0.1
"""The upper end of random circuits' faithfulness below which they are said to fail."""
PASSED = 1.1
"""A faithfulness above this, whose interval excludes 1, overshoots."""


@dataclass(frozen=True)
class Fewest:
    """The combination that reaches `LEVEL` with the fewest nodes, the first of equal ones.

    Attributes:
        curves: of the job's first ranking. size: of the circuit; its estimate is not None.
    """

    outcome: Outcome
    curves: Curves
    size: Size

    @property
    def nodes(self) -> int:
        """The fewest measured."""
        assert self.size.estimate is not None
        return self.size.estimate

    def at(self, name: str) -> Point:
        """A curve's value there: ``faithfulness``, ``completeness`` or ``control_faithfulness``."""
        return point(getattr(self.curves, name), self.curves.sizes.index(self.nodes))


@dataclass(frozen=True)
class Claim:
    """One structure: the fewest activations, and the fewest MLP outputs; None where none suffice.

    Attributes:
        bases: that were measured.
    """

    structure: str
    bases: tuple[str, ...]
    fewest: dict[str, Fewest | None]

    @property
    def main(self) -> Fewest | None:
        """The circuit that the claim is about: of activations, or of the one basis there is."""
        return self.fewest["activation" if "activation" in self.bases else self.bases[0]]

    @property
    def ratio(self) -> Point | None:
        """MLP outputs needed for each activation needed, and the least and the most it can be by the ends of both
        intervals (infinite where outputs may not reach it at all); None without both."""
        small, large = self.fewest.get("activation"), self.fewest.get("output")
        if small is None or large is None:
            return None
        low = (large.size.low or large.nodes) / (small.size.high or small.nodes)
        high = large.size.high / (small.size.low or small.nodes) if large.size.high else float("inf")
        return large.nodes / small.nodes, low, high

    @property
    def beats_chance(self) -> bool:
        """Whether random nodes of the same layers, as many, are clearly worse."""
        main = self.main
        return main is not None and main.at("control_faithfulness")[2] < main.at("faithfulness")[1]

    @property
    def is_smaller(self) -> bool | None:
        """Whether clearly fewer activations than outputs suffice; None where there is nothing to compare."""
        small = self.fewest.get("activation")
        if small is None or "output" not in self.bases:
            return None
        large = self.fewest["output"]
        if large is None or large.size.low is None:
            return True
        return small.size.high is not None and small.size.high < large.size.low

    @property
    def holds(self) -> bool:
        """A circuit reaches the level, random ones do not come near, and fewer activations than outputs suffice."""
        return self.beats_chance and self.is_smaller is not False


def claims(result: BenchmarkResult) -> list[Claim]:
    """Of every structure that has an outcome, in the job's order."""
    found = []
    for structure in result.job.sets:
        mine = [one for one in result.outcomes if one.structure == structure]
        bases = tuple(basis for basis in result.job.bases if any(one.basis == basis for one in mine))
        if bases:
            ranking = result.job.rankings[0]
            fewest = {basis: _fewest([one for one in mine if one.basis == basis], ranking) for basis in bases}
            found.append(Claim(structure, bases, fewest))
    return found


def _fewest(outcomes: Sequence[Outcome], ranking: Ranking) -> Fewest | None:
    reached = [one for one in by_size(outcomes, ranking) if one.outcome.method not in CONTROLS]
    return next(iter(reached), None)


def by_size(outcomes: Sequence[Outcome], ranking: Ranking) -> list[Fewest]:
    """The combinations that reach the level, those that need fewest first."""
    curves = [(one, one.rankings[ranking]) for one in outcomes]
    made = [Fewest(one, its, its.sizes_for[LEVEL]) for one, its in curves if its.sizes_for[LEVEL].estimate is not None]
    return sorted(made, key=lambda one: one.nodes)


def overshoots(outcomes: Sequence[Outcome], ranking: Ranking) -> Iterator[tuple[Outcome, int, Point]]:
    """Where a curve is highest, of those that pass 1: the combination, the size, the faithfulness."""
    for outcome in outcomes:
        curves = outcome.rankings[ranking]
        values = [(point(curves.faithfulness, i), size) for i, size in enumerate(curves.sizes)]
        passed = [(value, size) for value, size in values if value[0] > PASSED and value[1] > 1]
        if passed:
            value, size = max(passed)
            yield outcome, size, value
