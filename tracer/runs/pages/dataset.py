"""The report of a dataset's run: its circuit, whether it holds, what its prompts' circuits are like, what failed.

Knows wording and order. Refuses to know how tables come about (store, runs/units), which prompts are strongest
(runs/pages/graphs.py), and how a page looks (reports/page.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tracer.circuit.said import Said
from tracer.evaluation.curves import Curves
from tracer.evaluation.edge_curves import EdgeCurves
from tracer.reports import figures, sheet
from tracer.reports import page as pages
from tracer.reports.page import Block, Link, Page, Section
from tracer.reports.sheet import ABLATIONS, NO_DECOMPOSITION, Column, Sheet, bars, decimal, ends
from tracer.reports.verdict import RULE, Verdict, judged, percent, point
from tracer.runs.jobs import DatasetJob
from tracer.runs.pages import made, meaning
from tracer.runs.pages.graphs import GRAPHS
from tracer.runs.pages.meaning import Meaning
from tracer.runs.status import Reason
from tracer.settings import BASIS_NAMES
from tracer.store.aggregation import in_most_circuits
from tracer.text import printable

ROWS = 30
"""Rows of a table of neurons or nodes."""
_NODES = {"aligned": "nodes", "free": "neurons"}
_LIMITS = (
    "Attributions are first-order estimates, made at one point of each prompt. What the circuit causes is shown by "
    "ablations and by nothing else on this page.",
    "The dataset's circuit is of mean attributions: a neuron that speaks for the answer on some prompts and against it "
    "on others can be missing from it.",
    "A neuron in many circuits may be one that is strong on any prompt. The tokens that it promotes are read from its "
    "weights and say what it writes, not why it is there.",
    "Where attention looks is held fixed. Attention, norms and embeddings are never ablated.",
    "In bfloat16 or float16 attributions are noisy; compare circuits in float32.",
)


@dataclass(frozen=True)
class Found:
    """What a run's folder holds.

    Attributes:
        record: of run.json. n_planned: prompts. statuses: how many prompts came to what.
        columns: of the prompts that went well: ``n_nodes``, ``n_edges``, ``metric``, ``unexplained``.
        neurons, top: neurons.parquet and top_prompts.parquet, or those of what is there so far.
        circuit: circuit.parquet, or None.
        evaluation, qualities: evaluation.json and quality.json, or None.
        links: the graph pages. reasons: why prompts failed.
        said: what tokens.parquet and descriptions.parquet say of neurons. meaning: what else the folder says of them.
    """

    job: DatasetJob
    record: Mapping[str, Any]
    n_planned: int
    statuses: Mapping[str, int]
    columns: Mapping[str, Sequence[Any]]
    neurons: pa.Table
    top: pa.Table
    circuit: pa.Table | None
    evaluation: Mapping[str, Any] | None
    qualities: Sequence[Mapping[str, Any]] | None
    links: Sequence[Link]
    reasons: Sequence[Reason]
    said: Said = field(default_factory=Said)
    meaning: Meaning = field(default_factory=Meaning)

    @property
    def n_ok(self) -> int:
        """Prompts that went well."""
        return self.statuses.get("ok", 0)

    @property
    def n_done(self) -> int:
        """Prompts with a row."""
        return sum(self.statuses.values())

    @property
    def unit(self) -> str:
        """What the circuit is of."""
        return _NODES.get(self.job.circuit, "nodes")


def page_of(found: Found) -> Page:
    """The report of a dataset's run, whole or not."""
    model = (found.record.get("model") or {}).get("name", found.job.model)
    curves = None if found.evaluation is None else Curves.of(found.evaluation["curves"])
    lacking = list(_lacking(found))
    sections = [Section("missing", "What is missing", (pages.points(lacking),))] if lacking else []
    sections += [
        Section("holds", "Does it hold?", tuple(_evaluation(found, curves))),
        Section("circuit", "The circuit", tuple(_circuit(found))),
        *meaning.sections(found.meaning, found.job),
        Section("neurons", "Neurons in most circuits", tuple(_neurons(found))),
        Section("graphs", "Graphs", tuple(_graphs(found))),
        Section("sizes", "Sizes and conservation", tuple(_distributions(found))),
        Section("estimate", "How good was the estimate?", tuple(_quality(found))),
        Section("failures", "Failures", tuple(_failures(found))),
        Section("settings", "Settings", (pages.table(_settings(found)),)),
        Section("limits", "Limits", (pages.points(_LIMITS),)),
        made.section(found.record, found.job),
    ]
    return Page(
        kind="Dataset report",
        title=f"Circuits of {found.n_ok:,} prompts in {printable(str(model), 120)}",
        summary=_summary(found),
        verdict=_verdict(found, curves, bool(lacking)),
        findings=(),
        cards=tuple(_cards(found, curves)),
        sections=tuple(sections),
    )


# ------------------------------------------------------------------------------------------------ the head


def _summary(found: Found) -> str:
    failed = found.n_done - found.n_ok
    there = "" if found.n_done == found.n_planned else f" of {found.n_planned:,} that are planned"
    text = f"{found.n_done:,} prompts{there} were traced"
    text += f", {failed:,} of them without a result. " if failed else ". "
    if found.circuit is not None and found.circuit.num_rows:
        n = max(found.circuit["n_prompts"].to_pylist())
        where = "at their positions" if found.job.circuit == "aligned" else "at any position"
        text += f"Their mean attributions give one circuit of {found.circuit.num_rows:,} {found.unit}, {where}, "
        text += f"from {n:,} prompts."
    return text


def _verdict(found: Found, curves: Curves | None, unfinished: bool) -> Verdict:
    if unfinished:
        there = f"{found.n_done:,} of {found.n_planned:,} prompts are there."
        return Verdict("Not finished", f"{there} What follows is of these.", "open")
    if not found.n_ok:
        return Verdict("Nothing was found", "No prompt went well; the reasons are below.", "bad")
    if found.job.circuit == "none":
        return Verdict("No circuit was asked for", "Each prompt has its own; the job says circuit: none.", "open")
    if curves is None or found.evaluation is None:
        text = "Nobody has switched the rest of the model off to see whether this circuit is enough."
        return Verdict("Not tested", f"{text} It is an estimate and no proof.", "open")
    at = _own_size(found, curves)
    kept, chance = point(curves.faithfulness, at), point(curves.control_faithfulness, at)
    return judged(kept, chance, _facts(found, curves, at))


def _facts(found: Found, curves: Curves, at: int) -> str:
    about, size = found.evaluation or {}, curves.sizes[at]
    own = found.circuit is not None and found.circuit.num_rows == size
    which = "the circuit's" if own else "the strongest"
    shared = f" ({about['n_shared']:,} of them in the run as well)" if about.get("n_shared") else ""
    return (
        f"With everything outside {which} {size:,} {found.unit} replaced by {ABLATIONS[about['ablation']]}, "
        f"{percent(point(curves.faithfulness, at))} of the behaviour remains on {about['n_test']:,} "
        f"{'test' if shared else 'held-out'} prompts{shared} (faithfulness; 1 is all of it). As many random "
        f"{found.unit} keep {percent(point(curves.control_faithfulness, at))}. With the circuit itself switched off, "
        f"{percent(point(curves.completeness, at))} remains (completeness; 0 is wanted)."
    )


def _own_size(found: Found, curves: Curves) -> int:
    """The measured size that is the circuit's own, or the next smaller one; the smallest if all are larger."""
    return curves.up_to(0 if found.circuit is None else found.circuit.num_rows)


def _cards(found: Found, curves: Curves | None) -> Iterator[tuple[str, str, str]]:
    yield "prompts", f"{found.n_ok:,}", f"{found.n_done - found.n_ok:,} without a result"
    if found.circuit is not None:
        yield "circuit", f"{found.circuit.num_rows:,}", f"{found.unit}, {found.job.circuit}"
    if curves is not None:
        at = _own_size(found, curves)
        shown = {"faithfulness": curves.faithfulness, "completeness": curves.completeness}
        for name, curve in (shown | {"random circuits": curves.control_faithfulness}).items():
            value = point(curve, at)
            span = f"95 % interval {decimal(value[1])} to {decimal(value[2])}, {curves.sizes[at]:,} {found.unit}"
            yield name, decimal(value[0]), span


def _lacking(found: Found) -> Iterator[str]:
    if found.n_done < found.n_planned:
        yield f"{found.n_planned - found.n_done:,} of {found.n_planned:,} prompts: repeat the run command to go on."
    if found.n_ok and found.job.evaluate is not None and found.evaluation is None:
        yield "The evaluation that the job asks for (evaluate): it is made when all prompts are done."
    if found.n_ok and found.job.tokens and not found.said.tokens:
        yield "The neurons' tokens that the job asks for (tokens): they are read when all prompts are done."
    if found.n_ok and found.job.quality and found.qualities is None:
        yield "The quality of the estimates that the job asks for (quality): it is measured when all prompts are done."
    if found.n_ok:
        yield from meaning.lacking(found.meaning, found.job)


# ------------------------------------------------------------------------------------------------ sections


def _evaluation(found: Found, curves: Curves | None) -> Iterator[Block]:
    about = found.evaluation
    if curves is None or about is None:
        how = "Give the job evaluate: with test prompts, or run “tracer evaluate DIR” with some."
        yield pages.missing("Not measured.", f"Nothing here shows that these neurons cause the behaviour. {how}")
        return
    yield pages.text(
        f"Tested on {about['n_test']:,} prompts, ablation {about['ablation']}: what is switched off is replaced by "
        f"{ABLATIONS[about['ablation']]}. The measured number averages {about['whole']:+.4f} in the whole model and "
        f"{about['empty']:+.4f} with everything switched off; faithfulness and completeness are shares of the way "
        "between the two. "
        + " ".join(f"{printable(said[:1].upper() + said[1:])}." for said in about.get("warnings", ()))
    )
    caption = f"Strongest first. Random circuits have as many {found.unit} in each layer. Shaded: 95 % intervals."
    yield pages.figure(figures.curves_svg(curves, found.unit), caption)
    yield pages.table(_levels(found, curves))
    shown = sheet.curves(curves)
    yield pages.table(shown)
    if about.get("edge_curves"):
        yield from _edge_curves(EdgeCurves.of(about["edge_curves"]))
    elif why := about.get("no_edge_curves"):
        yield pages.missing("Its edges alone were not measured.", printable(why))
    if about.get("minimality"):
        rows = about["minimality"]
        heads = ["layer", "position", "neuron", "fall of faithfulness without it", sheet.BAR]
        drawn = bars([row["change"] for row in rows])
        cells = [
            (str(row["layer"]), _position(row["position"]), _short(found, row), f"{row['change']:+.4f}", bar)
            for row, bar in zip(rows[:ROWS], drawn, strict=False)
        ]
        yield pages.table(
            Sheet.of("minimality", f"Each of {len(rows):,} left out alone, strongest first", heads, cells)
        )
    yield pages.note(f"{RULE} Random circuits and intervals use seed {about['seed']}.")


def _edge_curves(found: EdgeCurves) -> Iterator[Block]:
    """What the circuit's strongest edges hold."""
    yield pages.text(
        "Neurons on a path of the strongest edges from an embedding to a logit, beside as many of the strongest nodes."
    )
    yield pages.figure(figures.edge_curves_svg(found), "Shaded: 95 % intervals.")
    yield pages.table(sheet.edge_curves(found))


def _levels(found: Found, curves: Curves) -> Sheet:
    heads = ("faithfulness of at least", f"{found.unit} needed", "95 % interval")
    named = [(f"{level:g}", size) for level, size in curves.sizes_for.items()]
    rows = [
        (name, _reach(size.estimate), f"{_reach(size.low)} to {_reach(size.high)}")
        for name, size in (*named, (sheet.SETTLES, curves.settles))
    ]
    return Sheet.of("levels", f"How many {found.unit} it takes", heads, rows)


def _reach(size: int | None) -> str:
    return "not reached" if size is None else f"{size:,}"


def _circuit(found: Found) -> Iterator[Block]:
    if found.circuit is None:
        why = "The job says circuit: none." if found.job.circuit == "none" else "No prompt has an attribution yet."
        yield pages.missing("There is none.", why)
        return
    rows = found.circuit.slice(0, ROWS).to_pylist()
    total = sum(map(abs, found.circuit["mean_attribution"].to_pylist())) or 1.0
    heads: list[Any] = ["", "layer", "position", "neuron", Column("mean attribution", unit=_unit(found)), sheet.BAR]
    heads += ["share of the circuit", *([sheet.SAYS] if found.said else [])]
    signs = _activations(found)
    drawn = bars([row["mean_attribution"] for row in rows])
    cells = [
        (
            *(str(rank), str(row["layer"]), _position(row["position"]), _short(found, row)),
            *(f"{row['mean_attribution']:+.4f}", bar, f"{abs(row['mean_attribution']) / total:.1%}"),
            *_says(found, row, signs),
        )
        for rank, (row, bar) in enumerate(zip(rows, drawn, strict=True), start=1)
    ]
    title = f"The {len(rows):,} strongest of {found.circuit.num_rows:,} {found.unit}"
    yield pages.text("A node's mean attribution is over the prompts of the circuit, with its sign.")
    yield pages.table(Sheet.of("circuit", title, heads, cells))
    yield pages.note("Positions count from 0. All are in circuit.parquet; “tracer show DIR” prints them.")


def _neurons(found: Found) -> Iterator[Block]:
    if not found.neurons.num_rows:
        yield pages.missing("There are none.", "No prompt has a circuit yet.")
        return
    rows = in_most_circuits(found.neurons, ROWS).to_pylist()
    wanted = {(row["layer"], row["neuron"]) for row in rows}
    best = {
        (row["layer"], row["neuron"]): row
        for row in found.top.filter(pc.field("rank") == _first_rank(found.top)).to_pylist()
        if (row["layer"], row["neuron"]) in wanted
    }
    heads: list[Any] = ["layer", "neuron", "prompts", "of all"]
    heads += [Column("mean attribution", unit=_unit(found)), sheet.BAR, "mean activation"]
    heads += ["<strongest in", "<at token", *([sheet.SAYS] if found.said else [])]
    signs = _activations(found)
    drawn = bars([row["prompt_mean_attribution"] for row in rows])
    cells = []
    for row, bar in zip(rows, drawn, strict=True):
        one = best.get((row["layer"], row["neuron"]))
        where = ("-", "-") if one is None else (f"prompt {one['prompt_id']}", _at(one))
        counts = (str(row["layer"]), _short(found, row), f"{row['n_prompts']:,}")
        share = f"{row['n_prompts'] / max(1, found.n_ok):.1%}"
        values = (f"{row['prompt_mean_attribution']:+.4f}", bar, f"{row['mean_activation']:+.4f}")
        cells.append((*counts, share, *values, *where, *_says(found, row, signs)))
    title = f"{len(rows):,} of {found.neurons.num_rows:,} neurons that any prompt's circuit has"
    yield pages.table(Sheet.of("neurons", title, heads, cells))
    yield pages.note("Means are over the prompts whose circuit has the neuron. All are in neurons.parquet.")


def _short(found: Found, row: Mapping[str, Any]) -> str:
    """A neuron's name without its layer."""
    return found.said.numbering.short(row["layer"], row["neuron"])


def _activations(found: Found) -> dict[tuple[int, int], float]:
    """The mean activation of each neuron, whose sign says what it promotes."""
    columns = found.neurons.select(["layer", "neuron", "mean_activation"]).to_pylist() if found.said else []
    return {(row["layer"], row["neuron"]): row["mean_activation"] for row in columns}


def _says(found: Found, row: Mapping[str, Any], signs: Mapping[tuple[int, int], float]) -> list[str]:
    """The cell of what a neuron does, by the sign of its mean activation; none where nothing is known of any."""
    activation = signs.get((row["layer"], row["neuron"]))
    return [sheet.says(found.said, {**row, "activation": activation})] if found.said else []


def _first_rank(top: pa.Table) -> int:
    return min(top["rank"].to_pylist(), default=0)


def _at(row: Mapping[str, Any]) -> str:
    return f"{row['position']} ({sheet.token(row['token'] or '')})"


def _graphs(found: Found) -> Iterator[Block]:
    if not found.links:
        yield pages.missing("None are drawn.", "“tracer view DIR --prompt N” draws the graph of any prompt.")
        return
    yield pages.text(
        f"The prompts whose own graphs hold most of the dataset's circuit, at most {GRAPHS} (of its summed |mean "
        "attribution|; without a circuit, of the strongest neurons). “tracer view DIR --prompt N” draws any other."
    )
    yield pages.links(found.links)


def _distributions(found: Found) -> Iterator[Block]:
    if not found.n_ok:
        yield pages.text("No prompt went well.")
        return
    for name, what in (("n_nodes", "nodes"), ("n_edges", "edges")):
        values = [value for value in found.columns[name] if value is not None]
        if what == "edges" and not found.job.edges:
            continue
        if len(set(values)) == 1:
            yield pages.text(f"The circuit of every prompt has {values[0]:,} {what}.")
        elif values:
            yield pages.table(_histogram(values, name.replace("n_", "by-"), what))
    yield from _conservation(found)


def _histogram(values: Sequence[int], name: str, what: str) -> Sheet:
    """How many prompts have so many: a row per number, or ten of equal width."""
    low, high = min(values), max(values)
    width = 1 if high - low < 12 else math.ceil((high - low + 1) / 10)
    counts = [0] * ((high - low) // width + 1)
    for value in values:
        counts[(value - low) // width] += 1
    names = [
        f"{start:,}" if width == 1 else f"{start:,} to {min(high, start + width - 1):,}"
        for start in range(low, high + 1, width)
    ]
    return _counted(name, f"How many {what} a prompt's circuit has", f"<{what}", names, counts)


def _counted(name: str, title: str, head: str, names: Sequence[str], counts: Sequence[int]) -> Sheet:
    cells = [
        (label, f"{count:,}", bar)
        for label, count, bar in zip(names, counts, bars([float(count) for count in counts]), strict=True)
    ]
    return Sheet.of(name, title, [head, "prompts", sheet.BAR], cells)


def _conservation(found: Found) -> Iterator[Block]:
    if found.job.method in NO_DECOMPOSITION:
        yield pages.text(f"{found.job.method} does not split the metric into parts: there is nothing to conserve.")
        return
    pairs = zip(found.columns["unexplained"], found.columns["metric"], strict=True)
    shares = [abs(left / metric) for left, metric in pairs if left is not None and metric]
    shares = [share for share in shares if math.isfinite(share)]
    if not shares:
        yield pages.text("No prompt says how much of its metric its tokens leave unexplained.")
        return
    edges = [10.0**power for power in range(-7, 1)]
    counts = [0] * (len(edges) + 1)
    for share in shares:
        counts[sum(share >= edge for edge in edges)] += 1
    names = ["below 1e-7", *(f"1e-{-power} to 1e-{-power - 1}" for power in range(-7, -1)), "0.1 to 1", "1 or more"]
    title = "How much of a prompt's metric its tokens leave unexplained"
    yield pages.table(_counted("conservation", title, "<|unexplained| / |metric|", names, counts))
    yield pages.note(
        f"Of {len(shares):,} prompts; the largest is {max(shares):.1e}. Where the method conserves, the attributions "
        "of a prompt's tokens sum to its metric, and this is rounding; biases, and methods that do not conserve, leave "
        "more. "
        "A metric near 0 makes a share large."
    )


def _quality(found: Found) -> Iterator[Block]:
    if not found.qualities:
        how = "Give the job quality: so many prompts, whose attributions are then compared with exact ablations."
        yield pages.missing("Not measured.", f"The attributions are estimates of unknown quality. {how}")
        return
    heads = ["prompt", "<estimate", "<exact", "nodes", "Pearson", "95 %", "Spearman", "95 %"]
    rows = []
    for one in found.qualities[:ROWS]:
        whole = one.get("whole") or {}
        cells = (text for name in ("pearson", "spearman") for text in _correlation(whole.get(name)))
        how = (f"{one.get('method', '-')} from {one.get('baseline', '-')}", f"{one.get('ablation', '-')} ablation")
        rows.append((str(one["prompt_id"]), *how, f"{whole.get('n', 0):,}", *cells))
    title = f"Attribution against exact ablation of single nodes, {len(rows)} of {len(found.qualities)} prompts"
    yield pages.table(Sheet.of("quality", title, heads, rows))
    yield pages.note("Over a sample of each prompt's nodes in which strong ones are over-represented on purpose.")


def _correlation(record: Mapping[str, Any] | None) -> tuple[str, str]:
    if record is None:
        return "-", "-"
    estimate, low, high = (math.nan if record[end] is None else record[end] for end in ("estimate", "low", "high"))
    return decimal(estimate), ends(low, high)


def _failures(found: Found) -> Iterator[Block]:
    failed = found.n_done - found.n_ok
    if not failed:
        yield pages.text("None.")
        return
    kinds = ", ".join(f"{count:,} {name}" for name, count in sorted(found.statuses.items()) if name != "ok" and count)
    yield pages.text(f"{failed:,} of {found.n_done:,} prompts have no result ({kinds}). Most often:")
    rows = [(f"{reason.prompts:,}", printable(reason.message, 400)) for reason in found.reasons]
    yield pages.table(
        Sheet.of("failures", "Messages that differ only in numbers and quoted text", ["prompts", "<such as"], rows)
    )
    yield pages.note("All are in failed.parquet; “tracer run ... --retry-failed” does them again.")


def _settings(found: Found) -> Sheet:
    job, model = found.job, found.record.get("model") or {}
    kept = {name: value for name, value in job.selection().items() if value}
    rows = [
        ("model", f"{printable(str(model.get('name', job.model)))}, {model.get('dtype', '-')}"),
        ("prompts", printable(json.dumps(job.input.model_dump(mode="json", exclude_defaults=True)), 1000)),
        ("method", f"{job.method}{sheet.options_text(job.settings())}"),
        ("baseline", job.baseline),
        ("basis", BASIS_NAMES[job.basis]),
        ("metric", job.metric),
        ("nodes of a prompt", printable(json.dumps(kept), 1000) if kept else "the default"),
        ("edges", "traced" if job.edges else "not traced"),
        ("circuit of the dataset", job.circuit),
        *((f"note {i}", printable(str(said), 400)) for i, said in enumerate(_notes(found), start=1)),
    ]
    return Sheet.of("settings", "What was asked, and how", ("<setting", "<value"), rows)


def _notes(found: Found) -> list[str]:
    said = [*found.record.get("warnings", ()), *found.record.get("notes", ())]
    said += [f"{text} ({count:,} prompts)" for text, count in found.record.get("prompt_notes", {}).items()]
    return said[:ROWS]


def _unit(found: Found) -> str:
    return "nats" if found.job.metric == "logprob" else "logits"


def _position(position: int) -> str:
    return "any" if position < 0 else str(position)
