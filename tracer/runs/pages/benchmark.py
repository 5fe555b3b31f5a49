"""The report of a benchmark: which circuits are small and hold, against MLP outputs, other methods and chance.

Knows wording, order and which curves are drawn. Refuses to know how an outcome is measured, by which rule a structure
counts (runs/pages/claim.py), and how a page looks (reports/page.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tracer.reports import figures
from tracer.reports import page as pages
from tracer.reports.page import Block, Page, Section
from tracer.reports.sheet import ABLATIONS, Sheet, decimal, ends
from tracer.reports.tables import csv_bytes
from tracer.reports.verdict import Point, Verdict, percent, point
from tracer.runs.jobs import NO_BASELINE, Ranking
from tracer.runs.pages import made
from tracer.runs.pages.claim import LEVEL, NOTHING, PASSED, Claim, Fewest, by_size, claims, overshoots
from tracer.runs.pages.mean import Mean, means
from tracer.runs.report import duration
from tracer.runs.units.benchmark_report import BenchmarkResult, Outcome, compared, named, panels, series
from tracer.settings import BASIS_NAMES
from tracer.text import printable

MOST_FIGURES, MOST_ROWS, MOST_SAID = 16, 400, 12
"""Drawings of a structure and a basis, rows of a table, and sentences of a list: pages stay readable and bounded."""

_UNITS = BASIS_NAMES | {"activation": "activations", "residual": "coordinates of the residual stream"}
_LEVELS = (0.8, 0.9, 0.95)
_LIMITS = (
    "A size is one of those that were measured: the true one lies above the next smaller measured size, which is "
    "named.",
    "The method that needs fewest is chosen on the same test pairs that it is reported on, of activations and of MLP "
    "outputs alike; the other methods are in the table.",
    "Faithfulness is a ratio of means over test pairs. Intervals are over these pairs, not over other sentences, "
    "models or ways to choose the training pairs.",
    "Circuits are cut out by setting everything else to one ablation; another ablation may give other sizes.",
    "Only MLP neurons are ablated. Attention, norms and embeddings work in every circuit, and in the random ones.",
    "Nothing here says what a neuron stands for, nor that the same neurons work on other prompts.",
)


def page_of(result: BenchmarkResult, record: Mapping[str, Any]) -> Page:
    """The report of a benchmark, whole or not.

    Args:
        record: what run.json holds.
    """
    found, over = claims(result), _over(result)
    lacking = _lacking(result)
    whole = () if not result.outcomes else _sections(result, found, over)
    parts = (
        [Section("missing", "What is missing", (_missing(lacking, len(result.job.combinations())),))] if lacking else []
    )
    return Page(
        kind="Benchmark report",
        title=f"How few neurons hold the behaviour? {printable(result.model.name, 120)}",
        summary=_summary(result),
        verdict=_verdict(found, len(lacking), len(result.job.combinations())),
        findings=tuple(line for claim in found[:MOST_SAID] for line in _findings(result, claim)),
        cards=tuple(card for claim in found[:6] for card in _cards(claim)),
        sections=(*parts, *whole, _limits(result), made.section(record, result.job)),
    )


def files(result: BenchmarkResult) -> Iterator[tuple[str, bytes]]:
    """Beside the page: the mean over structures as a table and as plots, and the claim as a plot."""
    if averaged := means(result):
        yield "mean.csv", csv_bytes([row for mean in averaged for row in mean.rows()])
        for basis in result.job.bases:
            if mine := [mean for mean in averaged if mean.first.basis == basis]:
                yield f"plots/mean.{basis}.png", figures.png(_mean_figure(result, mine, figures.PAPER))
    if shown := [claim for claim in claims(result) if claim.main is not None]:
        yield "plots/claim.png", figures.png(_claim_figure(shown, figures.PAPER))


# ------------------------------------------------------------------------------------------------ the head


def _summary(result: BenchmarkResult) -> str:
    job = result.job
    sets = "structure" if job.input is None else "set of pairs"
    return (
        f"For each {sets}, nodes of the model were ranked by how much they were found to matter on training pairs. "
        f"Then only the strongest were left to work on other pairs, and all others replaced by "
        f"{ABLATIONS[job.ablation]}. Faithfulness is the share of the behaviour that remains (1 is all of it)."
    )


def _verdict(found: Sequence[Claim], n_lacking: int, n_all: int) -> Verdict:
    good = [claim for claim in found if claim.holds]
    sound, smaller = sum(one.beats_chance for one in found), sum(one.is_smaller is True for one in found)
    of = f"{len(found)} structures"
    text = f"{sound} of {of} have a circuit that holds {LEVEL:.0%} of the behaviour, with random ones behind."
    if any(claim.is_smaller is not None for claim in found):
        text += f" On {smaller} of {of} clearly fewer activations than MLP outputs suffice."
    if n_lacking:
        there = f"{n_all - n_lacking} of {n_all} combinations are there. "
        return Verdict("Not finished", there + (f"So far, {text}" if found else "Nothing can be said yet."), "open")
    if len(good) == len(found):
        return Verdict("Held", text, "good")
    failed = ", ".join(claim.structure for claim in found if not claim.holds)
    return Verdict("Held in part" if good else "Did not hold", f"{text} Not so: {failed}.", "partly" if good else "bad")


def _findings(result: BenchmarkResult, claim: Claim) -> Iterator[str]:
    """What one structure says, in sentences."""
    main, basis = claim.main, "activation" if "activation" in claim.bases else claim.bases[0]
    if main is None:
        yield f"{claim.structure}: no circuit of {_UNITS[basis]} that was measured holds {LEVEL:.0%}."
        return
    yield (
        f"{claim.structure}: {main.nodes:,} {_UNITS[basis]}{_span(main)} hold {LEVEL:.0%} of the behaviour on "
        f"{_tested(main.outcome)}; these are {main.nodes / main.outcome.n_total:.2%} of all {main.outcome.n_total:,}, "
        f"found by {_label(result, main.outcome)}. {_against_outputs(result, claim)}"
    )
    chance, without = main.at("control_faithfulness"), main.at("completeness")
    yield (
        f"{claim.structure}: as many random {_UNITS[basis]} of the same layers keep {percent(chance)}: "
        f"{_chance(claim)}. With the circuit itself switched off, {percent(without)} remains (completeness; 0 is "
        "wanted)."
    )
    if high := next(_passed([main.outcome], result.job.rankings[0]), None):
        yield f"{claim.structure}: the curve overshoots. Faithfulness passes 1 on its way: {high}."


def _against_outputs(result: BenchmarkResult, claim: Claim) -> str:
    """How many MLP outputs it takes instead, if that was measured."""
    if "output" not in claim.bases or "activation" not in claim.bases:
        return ""
    large = claim.fewest["output"]
    if large is None:
        return "No measured number of MLP outputs reaches that."
    assert claim.ratio is not None
    times, low, high = claim.ratio
    most = "any number" if high == float("inf") else f"{high:,.3g}"
    return (
        f"Of MLP outputs it takes {large.nodes:,}{_span(large)}, found by {_label(result, large.outcome)}: "
        f"{times:,.3g} times as many ({low:,.3g} to {most} by the ends of both intervals)."
    )


def _chance(claim: Claim) -> str:
    assert claim.main is not None
    if claim.main.at("control_faithfulness")[2] < NOTHING:
        return "chance fails"
    return "chance does worse, but not badly" if claim.beats_chance else "chance does no worse"


def _cards(claim: Claim) -> Iterator[tuple[str, str, str]]:
    main = claim.main
    if main is None:
        return
    against = "" if claim.ratio is None else f"; {claim.fewest['output'].nodes:,} MLP outputs"  # pyright: ignore
    what = _UNITS[main.outcome.basis]
    yield f"{claim.structure}: {what} for {LEVEL:.0%}", f"{main.nodes:,}", f"of {main.outcome.n_total:,}{against}"


# ------------------------------------------------------------------------------------------------ sections


def _sections(result: BenchmarkResult, found: Sequence[Claim], over: Sequence[tuple[Any, ...]]) -> list[Section]:
    blocks: list[Block] = []
    if shown := [claim for claim in found if claim.main is not None][:6]:
        picture = figures.svg(
            _claim_figure(shown, figures.PAGE), "claim", "Faithfulness of activations and MLP outputs"
        )
        said = "Faithfulness of the method that needs fewest, of activations, of MLP outputs, and of as many random "
        blocks.append(
            pages.figure(
                picture, f"{said}activations. The number is the size at which {LEVEL:.0%} is reached. {_SHADED}"
            )
        )
    blocks += [pages.table(_fewest(found)), pages.note(_RULE)]
    averaged = means(result)
    return [
        Section("claim", "The claim", tuple(blocks)),
        Section("methods", "Which method needs fewest", (pages.points(_ranked(result)[:MOST_SAID]),)),
        Section("overshoot", "Curves that pass 1", tuple(_overshoot(over))),
        Section("mean", "Mean over structures", tuple(_mean(result, averaged))),
        Section("curves", "Curves", tuple(_curves(result))),
        Section("table", "All combinations", tuple(_all(result))),
        *(
            [Section("means", "Mean over structures, every size", (pages.table(_mean_table(averaged)),))]
            if averaged
            else ()
        ),
        Section("measured", "What was measured on", (pages.table(_measured(result)), pages.table(_settings(result)))),
    ]


_SHADED = "Shaded: 95 % bootstrap intervals over test pairs. What lies far outside 0 to 1 is cut off."
_RULE = (
    f"A structure counts where a circuit reaches {LEVEL:g}, the upper end of random circuits of that size lies below "
    f"the lower end of its faithfulness, and, where both were measured, the interval of its size lies below that of "
    f"MLP outputs. Random ones fail where their upper end is below {NOTHING:g}. Controls (random, delta) do not "
    "count as methods here."
)


def _fewest(found: Sequence[Claim]) -> Sheet:
    heads = ["<structure", "<nodes are", "fewest nodes", "95 %", "next smaller", "share of all", "<method", "<baseline"]
    heads += ["faithfulness", "95 %", "random nodes", "95 %", "completeness", "95 %"]
    rows = []
    for claim in found[:MOST_ROWS]:
        for basis in claim.bases:
            one = claim.fewest[basis]
            if one is None:
                rows.append((claim.structure, _UNITS[basis], "not reached", *["-"] * (len(heads) - 3)))
                continue
            at = one.curves.sizes.index(one.nodes)
            smaller = f"{one.curves.sizes[at - 1]:,}" if at else "-"
            values = (one.at(name) for name in ("faithfulness", "control_faithfulness", "completeness"))
            cells = (text for value in values for text in (decimal(value[0]), ends(*value[1:])))
            size = (f"{one.nodes:,}", _ends(one), smaller, f"{one.nodes / one.outcome.n_total:.3%}")
            rows.append((claim.structure, _UNITS[basis], *size, series(one.outcome), one.outcome.baseline, *cells))
    return Sheet.of("fewest", f"The fewest nodes that hold {LEVEL:.0%}", heads, rows)


def _ranked(result: BenchmarkResult) -> list[str]:
    """Of each structure and basis, the methods by how few they need."""
    lines = []
    for structure in result.job.sets:
        for basis in result.job.bases:
            mine = [one for one in result.outcomes if (one.structure, one.basis) == (structure, basis)]
            reached = by_size(mine, result.job.rankings[0])
            words = [f"{_label(result, one.outcome)} {one.nodes:,}" for one in reached]
            words += [
                f"{_label(result, one)} not reached" for one in mine if all(one is not its.outcome for its in reached)
            ]
            if words:
                lines.append(f"{structure}, {_UNITS[basis]} for {LEVEL:.0%}: {'; '.join(words)}.")
    return lines


def _over(result: BenchmarkResult) -> list[tuple[Outcome, int, Point]]:
    return list(overshoots(result.outcomes, result.job.rankings[0]))


def _overshoot(over: Sequence[tuple[Outcome, int, Point]]) -> Iterator[Block]:
    if not over:
        yield pages.text(f"None: no curve is above {PASSED:g} with an interval that excludes 1.")
        return
    yield pages.text(
        "These circuits bring out more of the behaviour than the whole model shows: what they lack works against it. A "
        "first size that reaches a level says little there; look at where the curve comes back."
    )
    heads = ["<structure", "<nodes are", "<method", "<baseline", "highest faithfulness", "95 %", "at nodes"]
    rows = [
        (one.structure, _UNITS[one.basis], series(one), one.baseline, decimal(value[0]), ends(*value[1:]), f"{size:,}")
        for one, size, value in over[:MOST_ROWS]
    ]
    yield pages.table(Sheet.of("overshoots", "Where a curve is highest", heads, rows))


def _passed(outcomes: Sequence[Outcome], ranking: Ranking) -> Iterator[str]:
    for _, size, value in overshoots(outcomes, ranking):
        yield f"{decimal(value[0])} {ends(*value[1:])} at {size:,} nodes"


def _mean(result: BenchmarkResult, averaged: Sequence[Mean]) -> Iterator[Block]:
    if not averaged:
        yield pages.text("A mean needs all of the job's structures, two at least, of one combination.")
        return
    n = averaged[0].n_structures
    yield pages.text(
        f"The mean over {n} structures, which count alike, at the sizes that all of them have. Shaded, and in "
        "brackets: from the lowest to the highest structure. That is no confidence interval, and none is given: the "
        "intervals of a structure are over its own pairs, and say nothing of how structures differ."
    )
    for basis in result.job.bases:
        if mine := [mean for mean in averaged if mean.first.basis == basis]:
            label = f"Mean faithfulness and completeness of {_UNITS[basis]} against circuit size"
            picture = figures.svg(_mean_figure(result, mine, figures.PAGE), f"mean-{basis}", label)
            yield pages.figure(picture, f"{label}, a line per method.")


def _mean_table(averaged: Sequence[Mean]) -> Sheet:
    heads = ["<method", "<nodes are", "<baseline", "nodes", "faithfulness", "lowest to highest"]
    heads += ["completeness", "lowest to highest", "random nodes", "lowest to highest"]
    rows = []
    for mean in averaged:
        one = mean.first
        for i, size in enumerate(mean.sizes):
            values = (point(curve, i) for curve in mean.curves.values())
            cells = (text for value in values for text in (decimal(value[0]), ends(*value[1:])))
            rows.append((series(one), _UNITS[one.basis], one.baseline, f"{size:,}", *cells))
    return Sheet.of("means", _cut("Mean over structures", rows, "mean.csv"), heads, rows[:MOST_ROWS])


def _curves(result: BenchmarkResult) -> Iterator[Block]:
    """Every structure and basis, while there is room."""
    pairs = [(structure, basis) for structure in result.job.sets for basis in result.job.bases]
    drawn = 0
    for structure, basis in pairs:
        mine = [one for one in result.outcomes if (one.structure, one.basis) == (structure, basis)]
        if not mine:
            continue
        if drawn == MOST_FIGURES:
            yield pages.note(f"The first {MOST_FIGURES} are drawn here; all are in the folder plots of the run.")
            return
        drawn += 1
        rows = panels(result, [(one, one.rankings[result.job.rankings[0]]) for one in mine])
        label = f"{structure}, {_UNITS[basis]}: faithfulness and completeness against circuit size"
        picture = figures.svg(figures.grid(rows, figures.PAGE), f"curves-{drawn}", label)
        yield pages.figure(picture, f"{label}. {mine[0].n_total:,} nodes, {_tested(mine[0])}. {_SHADED}")


def _all(result: BenchmarkResult) -> Iterator[Block]:
    rows, cells = compared(result), []
    names = [*named(result.outcomes[0]), "ranking"]
    heads = [f"<{name}" for name in names]
    heads += [text for level in _LEVELS for text in (f"nodes for {level:g}", "95 %")]
    heads += ["stays within .1 of 1 from", "95 %", "CPR", "95 %", "CMD", "95 %", "seconds"]
    for row in rows[:MOST_ROWS]:
        sizes = (text for level in _LEVELS for text in _size(row, f"size_{level:g}"))
        stays = _size(row, "settles")
        areas = (text for area in ("cpr", "cmd") for text in _area(row, area))
        seconds = f"{row['attribution_seconds'] + row['evaluation_seconds']:.1f}"
        cells.append((*(str(row[name]) for name in names), *sizes, *stays, *areas, seconds))
    yield pages.table(Sheet.of("combinations", _cut("All combinations", rows, "table.csv"), heads, cells))
    yield pages.note(
        "Nodes are the fewest measured that reach that faithfulness; - is not reached. CPR (large is good) and CMD "
        "(0 is best) are areas over MIB's sizes, and half of each lies above 50 % of all nodes. Every size is in "
        "curves.csv."
    )


def _size(row: Mapping[str, Any], name: str) -> tuple[str, str]:
    values = ["-" if row[name + end] is None else f"{row[name + end]:,}" for end in ("", "_low", "_high")]
    return values[0], f"[{values[1]}, {values[2]}]"


def _area(row: Mapping[str, Any], name: str) -> tuple[str, str]:
    nan = float("nan")
    estimate, low, high = (nan if row[name + end] is None else row[name + end] for end in ("", "_low", "_high"))
    return decimal(estimate), ends(low, high)


def _measured(result: BenchmarkResult) -> Sheet:
    heads = ["<structure", "<nodes are", "train pairs", "test pairs", "of these trained on", "pairs skipped", "nodes"]
    heads += ["metric of the model", "all nodes ablated", "<why pairs were skipped"]
    rows = []
    first = {(one.structure, one.basis): one for one in reversed(result.outcomes)}
    for one in [first[key] for key in sorted(first, key=lambda key: (result.job.sets.index(key[0]), key[1]))]:
        why = "; ".join(f"{count} {printable(reason, 160)}" for reason, count in one.skipped.items())
        counts = (one.n_train, one.n_test, one.n_shared, sum(one.skipped.values()), one.n_total)
        cells = (f"{one.whole:+.4f}", f"{one.empty:+.4f}", why or "-")
        rows.append((one.structure, _UNITS[one.basis], *(f"{count:,}" for count in counts), *cells))
    return Sheet.of("measured", _cut("Pairs", rows, "results.json"), heads, rows[:MOST_ROWS])


def _settings(result: BenchmarkResult) -> Sheet:
    job, model = result.job, result.model
    worked = sum((one.attribution_seconds + one.evaluation_seconds for one in result.outcomes), 0.0)
    rows = [
        ("model", f"{printable(model.name)}: {model.n_layers} layers, {model.d_mlp:,} neurons each, {model.dtype}"),
        ("weights fingerprint", model.fingerprint),
        ("metric", "logit difference of the two verb forms, averaged over pairs"),
        ("ablation", f"{job.ablation}: {ABLATIONS[job.ablation]}"),
        ("ranking shown", f"{job.rankings[0]} attribution, averaged over the training pairs"),
        ("sizes measured", ", ".join(f"{size:,}" for size in job.sizes) + ", and MIB's shares of all nodes"),
        ("steps of path methods", f"{job.steps}"),
        ("seed", f"{job.seed}: of the pairs, random nodes and the intervals"),
        ("beginning of sequence", "put first" if job.bos else "as the tokenizer has it"),
        ("time", f"{duration(worked)} of attribution and evaluation, over all workers"),
    ]
    return Sheet.of("settings", "Settings", ("<setting", "<value"), rows)


def _limits(result: BenchmarkResult) -> Section:
    shared = sorted({f"{one.n_shared} of {one.structure}" for one in result.outcomes if one.n_shared})
    more = [f"Some test pairs were trained on as well ({', '.join(shared)}): they are not held out."] if shared else []
    return Section("limits", "Limits", (pages.points([*more, *_LIMITS]),))


def _lacking(result: BenchmarkResult) -> list[str]:
    there = {one.combination for one in result.outcomes}
    return [str(one) for one in result.job.combinations() if one not in there]


def _missing(lacking: Sequence[str], n_all: int) -> Block:
    some = ", ".join(lacking[:MOST_SAID]) + (", ..." if len(lacking) > MOST_SAID else "")
    what = f"{len(lacking)} of {n_all} combinations are not there: {some}."
    return pages.missing(what, "Repeat the run command to go on; this page shows what there is.")


# ------------------------------------------------------------------------------------------------ drawings


def _claim_figure(shown: Sequence[Claim], palette: figures.Palette) -> Any:
    """Activations against MLP outputs and chance, a panel per structure."""
    row = []
    for claim in shown[:6]:
        lines, marks = [], []
        for look, basis in enumerate(claim.bases):
            one = claim.fewest[basis]
            if one is not None:
                lines.append(figures.Line(_UNITS[basis], one.curves.sizes, one.curves.faithfulness, look))
                marks.append((one.nodes, one.at("faithfulness")[0]))
        assert claim.main is not None
        main, name = claim.main.curves, _UNITS[claim.main.outcome.basis]
        lines.append(figures.Line(f"random {name}", main.sizes, main.control_faithfulness, figures.CONTROL))
        row.append(figures.Panel(claim.structure, lines, tuple(marks)))
    return figures.grid({"faithfulness": row}, palette)


def _mean_figure(result: BenchmarkResult, mine: Sequence[Mean], palette: figures.Palette) -> Any:
    return figures.grid(panels(result, [(mean.first, mean) for mean in mine]), palette)


# ------------------------------------------------------------------------------------------------ wording


def _label(result: BenchmarkResult, outcome: Outcome) -> str:
    """A method, and its baseline where there are several."""
    several = len({one.baseline for one in result.outcomes} - {NO_BASELINE}) > 1
    return f"{series(outcome)} ({outcome.baseline})" if several and outcome.baseline != NO_BASELINE else series(outcome)


def _tested(outcome: Outcome) -> str:
    shared = f" ({outcome.n_shared} of them trained on as well)" if outcome.n_shared else ""
    return f"{outcome.n_test} held-out pairs" if not shared else f"{outcome.n_test} test pairs{shared}"


def _span(one: Fewest) -> str:
    return f" (95 % interval {_ends(one)})"


def _ends(one: Fewest) -> str:
    return " to ".join("not reached" if end is None else f"{end:,}" for end in (one.size.low, one.size.high))


def _cut(title: str, rows: Sequence[Any], file: str) -> str:
    """A table's title, which says where the rest is."""
    return (
        f"{title}: the first {MOST_ROWS} of {len(rows):,} rows, all are in {file}" if len(rows) > MOST_ROWS else title
    )
