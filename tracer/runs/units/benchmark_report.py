"""What a benchmark leaves: the outcome of each combination, its curves and table as CSV, plots, a terminal's table.

Knows the records and their forms. Refuses to know how an outcome is measured (runs/units/benchmark.py,
evaluation/curves.py), models and the folder: a file is a name with its bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, InstanceOf, PlainSerializer

from tracer.evaluation.curves import Curves, columns
from tracer.evaluation.statistics import Size
from tracer.records import Record
from tracer.reports import figures
from tracer.reports.folded import Folded, folded
from tracer.reports.parts import Sheet
from tracer.reports.tables import csv_bytes
from tracer.runs.jobs import NO_BASELINE, BenchmarkJob, Combination, Ranking
from tracer.settings import ModelRecord

Recorded = Annotated[
    InstanceOf[Curves],
    BeforeValidator(lambda given: given if isinstance(given, Curves) else Curves.of(given)),
    PlainSerializer(Curves.record),
]
"""Curves, which a file holds as their record."""


class Outcome(Record):
    """One combination: its curves by ranking, and what they were measured on.

    Attributes:
        rules: the variant of RelP's rules.
        n_train, n_test: pairs used; skipped: how many of the others were left out, by reason.
        n_shared: of the test pairs, those whose prompt is trained on as well, where the job allows it.
        n_total: nodes the model has on these prompts. whole, empty: F of the model, and with every node ablated.
        attribution_seconds, evaluation_seconds: they took.
    """

    structure: str
    method: str
    basis: str
    baseline: str
    rules: str = "all"
    n_train: int
    n_test: int
    n_shared: int = 0
    skipped: dict[str, int]
    n_total: int
    whole: float
    empty: float
    rankings: dict[Ranking, Recorded]
    attribution_seconds: float
    evaluation_seconds: float

    @property
    def combination(self) -> Combination:
        """What it is the outcome of."""
        return Combination(self.structure, self.method, self.basis, self.baseline, self.rules)


@dataclass(frozen=True)
class BenchmarkResult:
    """A benchmark that ran.

    Attributes:
        outcomes: of every combination, in the job's order.
        folder: where it was written. resumed: how many combinations were there already.
        seconds: by the clock, over all calls on the run; 0 where they are not known.
    """

    job: BenchmarkJob
    model: ModelRecord
    outcomes: tuple[Outcome, ...]
    folder: str
    resumed: int
    seconds: float


def files(result: BenchmarkResult) -> Iterator[tuple[str, bytes]]:
    """Every file that the outcomes become: its name in the run folder, and what it holds."""
    yield "curves.csv", csv_bytes(list(_curve_rows(result.outcomes)))
    yield "table.csv", csv_bytes(list(_table_rows(result.outcomes)))
    for structure in result.job.sets:
        for basis in result.job.bases:
            yield f"plots/{structure}-{basis}.png", plot_benchmark(result, structure, basis)


def _names(outcome: Outcome, ranking: str) -> dict[str, Any]:
    return {**outcome.combination._asdict(), "ranking": ranking}


def _curve_rows(outcomes: Sequence[Outcome]) -> Iterator[dict[str, Any]]:
    for outcome in outcomes:
        for ranking, curves in outcome.rankings.items():
            yield from ({**_names(outcome, ranking), **row} for row in curves.rows())


def _table_rows(outcomes: Sequence[Outcome]) -> Iterator[dict[str, Any]]:
    """One row per combination and ranking; a size that was not reached is empty."""
    for outcome in outcomes:
        for ranking, curves in outcome.rankings.items():
            row = {**_names(outcome, ranking), "n_train": outcome.n_train, "n_test": outcome.n_test}
            row["n_shared"] = outcome.n_shared
            row |= {"n_total": outcome.n_total, "whole": outcome.whole, "empty": outcome.empty}
            for level, size in curves.sizes_for.items():
                row |= columns(f"size_{level:g}", size.record())
            row |= columns("settles", curves.settles.record())
            row |= columns("cpr", curves.cpr.record()) | columns("cmd", curves.cmd.record())
            seconds = {"attribution": outcome.attribution_seconds, "evaluation": outcome.evaluation_seconds}
            yield row | {f"{name}_seconds": round(one, 3) for name, one in seconds.items()}


def plot_benchmark(result: BenchmarkResult, structure: str, basis: str) -> bytes:
    """A PNG: faithfulness above completeness against circuit size, one line per method and variant of its rules, one
    column per baseline.

    Log x, 95 % intervals shaded, the job's first ranking; what lies far outside 0 to 1 is cut off.
    """
    mine = [one for one in result.outcomes if (one.structure, one.basis) == (structure, basis)]
    figure = figures.grid(panels(result, [(one, one.rankings[result.job.rankings[0]]) for one in mine]))
    n_total = f"{mine[0].n_total:,}"
    title = (
        f"{structure}, {basis} basis: {n_total} nodes, {mine[0].n_test} test pairs{_shared(mine[:1], ' trained on')}"
    )
    ranking = result.job.rankings[0]
    figure.suptitle(f"{title}\n{result.job.ablation} ablation, {ranking} ranking", fontsize=11, parse_math=False)
    return figures.png(figure)


def panels(result: BenchmarkResult, drawn: Sequence[tuple[Outcome, Any]]) -> dict[str, list[figures.Panel]]:
    """Rows of a figure, faithfulness and completeness, with a panel per baseline.

    Args:
        drawn: outcomes of one basis, and what has the curves of each: `sizes`, `faithfulness`, `completeness`.
    """
    order = list(dict.fromkeys(map(series, result.outcomes)))
    looks = {name: i % figures.LOOKS for i, name in enumerate(order)}
    looks |= {series(one): figures.CONTROL for one, _ in drawn if one.method == "random"}
    named = list(dict.fromkeys(one.baseline for one, _ in drawn if one.baseline != NO_BASELINE)) or [NO_BASELINE]
    return {
        name: [
            figures.Panel(
                f"baseline: {baseline}",
                [
                    figures.Line(series(one), made.sizes, getattr(made, name), looks[series(one)])
                    for one, made in drawn
                    if one.baseline in (baseline, NO_BASELINE)
                ],
            )
            for baseline in named
        ]
        for name in ("faithfulness", "completeness")
    }


def series(outcome: Outcome) -> str:
    """What a line is called where structure, basis and baseline are clear."""
    return outcome.combination.way


def named(outcome: Outcome) -> dict[str, Any]:
    """What tells a combination from others, by name."""
    names = _names(outcome, "")
    names.pop("ranking")
    return names


def compared(result: BenchmarkResult) -> list[dict[str, Any]]:
    """The rows of table.csv."""
    return list(_table_rows(result.outcomes))


def benchmark_table(result: BenchmarkResult) -> Folded:
    """A benchmark for a terminal: a line per combination, the sizes for .8, .9 and .95 and that from which it stays,
    CPR and CMD, seconds."""
    rankings = result.job.rankings
    first = rankings[0]
    levels = (0.8, 0.9, 0.95)
    heads = ["<structure", "<basis", "<method", "<baseline", *(f"nodes for {level}" for level in levels), "stays from"]
    heads += [f"{area} {ranking}" for area in ("CPR", "CMD") for ranking in rankings]
    cells = []
    for outcome in result.outcomes:
        curves = outcome.rankings[first]
        shown = [_reach(size) for size in (*(curves.sizes_for[level] for level in levels), curves.settles)]
        shown += [
            f"{getattr(outcome.rankings[ranking], area).estimate:.3f}"
            for area in ("cpr", "cmd")
            for ranking in rankings
        ]
        seconds = f"{outcome.attribution_seconds:.2f} + {outcome.evaluation_seconds:.2f}"
        named = outcome.structure, outcome.basis, outcome.combination.way, outcome.baseline
        cells.append((*named, *shown, seconds))
    return folded([Sheet.of("combinations", "", [*heads, "seconds"], cells), _about(result)])


def _reach(size: Size) -> str:
    ends = ("-" if one is None else f"{one:,}" for one in (size.low, size.high))
    return f"{'-' if size.estimate is None else f'{size.estimate:,}'} ({', '.join(ends)})"


def _about(result: BenchmarkResult) -> str:
    job, some = result.job, result.outcomes[0]
    skipped = sum(sum(one.skipped.values()) for one in {one.structure: one for one in result.outcomes}.values())
    return (
        f"{result.model.shown}: circuits found on {some.n_train} pairs of a structure, tested on {some.n_test} others"
        f"{_shared(result.outcomes, ' of these have a prompt that was trained on')} "
        f"by {job.ablation} ablation; {skipped} pairs skipped. Nodes, in brackets the 95 % interval over test pairs, "
        f"are the fewest measured that reach that faithfulness, ranked by {job.rankings[0]} attribution; - is not "
        "reached. It stays from the fewest measured from which it is within .1 of 1, there and at every larger size. "
        "CPR (large is good) and CMD (0 is best) are areas over MIB's sizes, and half of each lies above 50 % "
        "of all nodes. Seconds: attribution of the train pairs + evaluation. "
        f"{len(result.outcomes)} combinations"
        + (f" in {result.seconds:.0f} s by the clock" if result.seconds else "")
        + (f", {result.resumed} of them there before." if result.resumed else ".")
    )


def _shared(outcomes: Sequence[Outcome], what: str) -> str:
    """How many test pairs were trained on as well, in brackets; nothing where none was."""
    counts = {one.structure: one.n_shared for one in outcomes if one.n_shared}
    each = ", ".join(
        f"{count} of {structure}" if len(outcomes) > 1 else str(count) for structure, count in counts.items()
    )
    return f" ({each}{what})" if counts else ""
