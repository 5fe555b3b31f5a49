"""A comparison as a person or a script reads it: tables, CSV, JSON, a figure over the sides, a report, a graph page.

Knows layout and words. Computes no number: everything is in the tables of a `Comparison`.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from tracer.circuit.said import Said, sign
from tracer.comparison.aligned import Aligned, aligned
from tracer.comparison.compare import APPEARED, BOTH, NEITHER, SIGN, VANISHED
from tracer.comparison.differences import RATE
from tracer.experts import Numbering
from tracer.reports import figures, page, tables, viewer
from tracer.reports.figures import PAGE, PAPER, Palette
from tracer.reports.folded import Folded, folded
from tracer.reports.page import Block, Page, Section
from tracer.reports.parts import Sheet
from tracer.reports.sheet import number
from tracer.reports.tables import csv_bytes
from tracer.reports.verdict import Verdict
from tracer.store.parquet import encoded
from tracer.text import Rows, printable

if TYPE_CHECKING:
    from tracer.comparison.compare import Comparison

ROWS = 20
"""Nodes that are shown, of those in a circuit; all are in the table."""
FOLLOWED = 7
"""Nodes or groups whose course is drawn."""
WORDS = {
    APPEARED: "appeared",
    VANISHED: "vanished",
    SIGN: "changed sign",
    BOTH: "in both",
    NEITHER: "in neither",
}
REPORT, GRAPHS, FIGURE = "report.html", "graphs.html", "courses.png"
SAYS = (
    "A node is a neuron, matched by its layer and number. attribution: the mean over prompts, in the metric's units; "
    "difference: the last side minus the first, with its 95 % bootstrap interval over prompts. q: of a permutation "
    "test of the difference, after Benjamini and Hochberg over all nodes tested: among the nodes with q <= {rate:g}, "
    "a share of {rate:g} is expected to be there by chance. appeared, vanished: in the circuit of the last side "
    "alone, of the first alone."
)


# ------------------------------------------------------------------------------------------------ for programs


def as_json(found: Comparison) -> str:
    """The whole comparison as JSON."""
    content = {
        "sides": found.sides.to_pylist(),
        "metric_difference": {name: _scalar(value) for name, value in found.metric.record().items()},
        "counts": found.counts,
        "found": found.found,
        "n_tested": found.n_tested,
        "n_prompts": list(found.n_prompts),
        "paired_by": found.by,
        "all_neurons_known": found.every,
        "design": vars(found.design),
        "notes": list(found.notes),
        "nodes": found.nodes.to_pylist(),
        "courses": found.courses.to_pylist(),
    }
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)


def _scalar(value: Any) -> float | None:
    return value[0] if isinstance(value, list) else value


def as_rows(found: Comparison) -> Rows:
    """The nodes."""
    return Rows(found.nodes.column_names, found.nodes.to_pylist())


# ------------------------------------------------------------------------------------------------ for people


def sides_sheet(found: Comparison) -> Sheet:
    """A row for each side."""
    heads = ["<side", "prompts", "metric", "&95 %", "nodes", "appeared", "vanished", "changed sign"]
    heads += ["overlap", "with the last", "Pearson", "of all neurons"]
    tested = any(row["faithfulness"] is not None for row in found.sides.to_pylist())
    heads += ["faithfulness"] if tested else []
    cells = []
    for row in found.sides.to_pylist():
        changes = (_count(row[name]) for name in ("appeared", "vanished", "changed_sign"))
        shown = [number(row["metric"], "+.3f"), _ends(row["metric_low"], row["metric_high"]), f"{row['n_nodes']:,}"]
        common = [number(row[name], ".2f") for name in ("overlap", "overlap_last", "pearson", "pearson_all")]
        kept = [number(row["faithfulness"], ".2f")] if tested else []
        cells.append((printable(row["name"]), f"{row['n_prompts']:,}", *shown, *changes, *common, *kept))
    title = "Sides; changes, overlap and correlations are with the side before"
    return Sheet.of("sides", title, heads, cells)


def nodes_sheet(found: Comparison, count: int = ROWS, where: str = "") -> Sheet:
    """The nodes of either circuit that differ most between the first and the last side; what a neuron does is that of
    the last side's, where its graph says so.

    Args:
        where: the others are.
    """
    said = Said(numbering=found.numbering) if found.graphs[1] is None else Said.of(found.graphs[1])
    rows = [row for row in found.nodes.to_pylist() if row["change"] != NEITHER]
    placed, spoken = found.positions, bool(said)
    heads = [
        "layer",
        "neuron",
        *(["position"] if placed else []),
        "<change",
        "first",
        "last",
        "difference",
        "&95 %",
        "q",
    ]
    heads += ["kept by", "<polarity", *(["<what it does"] if spoken else [])]
    cells = []
    for row in rows[:count]:
        numbers = (f"{row[f'attribution_{end}']:+.4f}" for end in ("first", "last"))
        known = said.label({**row, "activation": row["activation_last"]})
        neuron = found.numbering.short(row["layer"], row["neuron"])
        place = (str(row["layer"]), neuron, *([str(row["position"])] if placed else []))
        shown = (f"{row['difference']:+.4f}", _ends(row["low"], row["high"], "+.3f"), _chance(row["q"]))
        kept = f"{row['n_first']:,} / {row['n_last']:,}"
        cells.append(
            (*place, WORDS[row["change"]], *numbers, *shown, kept, _polarity(row), *([known] if spoken else []))
        )
    title = f"{_named(found, 0)} and {_named(found, -1)}: {len(cells):,} of {len(rows):,} nodes of either circuit"
    return Sheet.of("nodes", title, heads, cells).of_all(len(rows), where)


def _named(found: Comparison, at: int) -> str:
    return printable(found.names[at], 60)


def _polarity(row: Mapping[str, Any]) -> str:
    """The sign of the node's value in each side that keeps it; one where they agree."""
    known = [row[f"activation_{end}"] for end in ("first", "last")]
    signs = [sign(-1 if value < 0 else 1) for value in known if value is not None]
    return " to ".join(dict.fromkeys(signs)) or "-"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _ends(low: float | None, high: float | None, form: str = "+.3f") -> str:
    return "-" if low is None or high is None else f"[{low:{form}}, {high:{form}}]"


def _chance(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value >= 0.001 else f"{value:.1g}"


def summary(found: Comparison) -> str:
    """What came out, in a sentence or two."""
    counts = found.counts
    parts = [f"{counts[name]:,} {WORDS[name]}" for name in (APPEARED, VANISHED, SIGN, BOTH)]
    text = f"Of the nodes of either circuit {', '.join(parts)}."
    if found.n_tested and min(found.n_prompts) > 1:
        text += f" {found.found:,} of {found.n_tested:,} tested differ (q <= {RATE:g})."
    else:
        text += " One prompt has no intervals and no tests: give more prompts for these."
    estimate, low, high = (float(getattr(found.metric, end)[0]) for end in ("estimate", "low", "high"))
    if not math.isnan(estimate):
        ends = "" if math.isnan(low) else f" (95 % {low:+.3f} to {high:+.3f})"
        text += f" The metric differs by {estimate:+.3f}{ends}."
    return text


def about(found: Comparison) -> str:
    """How the numbers came about, and what should be known of them."""
    n, its = found.n_prompts
    same = f"the same {n:,} prompt{'s' * (n != 1)} on both, pair by pair"
    how = same if found.by else f"{n:,} and {its:,} prompts, as two samples"
    text = f"{how}; {found.design.permutations:,} permutations, seed {found.design.seed}."
    return "\n".join([text, *found.notes, SAYS.format(rate=RATE)])


def table(found: Comparison, rows: int = ROWS, where: str = "") -> Folded:
    """The comparison for a terminal.

    Args:
        where: nodes are that are not shown; by default the option `rows` shows them.
    """
    return folded([sides_sheet(found), nodes_sheet(found, rows, where), f"{summary(found)}\n{about(found)}"])


# ------------------------------------------------------------------------------------------------ the figure


def png(found: Comparison) -> bytes:
    """Metric, circuit and the course of nodes and groups over the sides, as a PNG file."""
    return figures.png(drawn(found, PAPER))


def svg(found: Comparison) -> Markup:
    """The same for a page."""
    return figures.svg(drawn(found, PAGE), "courses", "Metric, circuit size and attributions of nodes over the sides")


def drawn(found: Comparison, palette: Palette) -> Any:
    """Three panels: the metric with its interval, the size of the circuit with what is new in it, and the courses."""
    figure = figures.new(11.5, 3.6)
    first, second, third = figure.subplots(1, 3, width_ratios=(1, 1, 1.7))
    rows, at = found.sides.to_pylist(), _places(found.names)
    _course(first, at, [row["metric"] for row in rows], [_both(row, "metric") for row in rows], 0, palette)
    first.set(ylabel="metric, mean over prompts")
    for look, (name, label) in enumerate((("n_nodes", "in the circuit"), ("appeared", "not in that before"))):
        second.plot(at, [_nan(row[name]) for row in rows], label=label, **figures.style(look, palette))
    second.set(ylabel="nodes", ylim=(0, 1.25 * max(1, *(row["n_nodes"] for row in rows))))
    second.legend(frameon=False)
    for look, (name, course) in enumerate(followed(found).items()):
        values, ends = [row["attribution"] for row in course], [_both(row, "") for row in course]
        _course(third, at, values, ends, look, palette, name)
    third.axhline(0, color=palette.faint, linewidth=0.8, zorder=0)
    third.set(ylabel="attribution (units of the metric)")
    if third.lines[:-1]:
        figure.legend(*third.get_legend_handles_labels(), frameon=False, loc="outside right center", handlelength=3.6)
    for axes in (first, second, third):
        _name_sides(axes, found.names, at)
    return figure


def _places(names: Sequence[str]) -> Any:
    """Where sides stand: at their steps, where all are named by rising numbers (step1000, step-200); else one after
    another."""
    ends = [re.search(r"[0-9]{1,15}$", name) for name in names]
    steps = [int(end[0]) for end in ends if end is not None]
    rise = len(steps) == len(names) and all(one < other for one, other in itertools.pairwise(steps))
    return np.array(steps, float) if rise else np.arange(float(len(names)))


def _name_sides(axes: Any, names: Sequence[str], at: Any) -> None:
    """Name sides on the axis, where there is room; steps that differ a hundredfold stand by their logarithm."""
    if at[0] > 0 and at[-1] >= 100 * at[0]:
        axes.set_xscale("log")
    room, shown = (at[-1] - at[0]) / 9, list[int]()
    for one, place in enumerate(at):
        if not shown or place - at[shown[-1]] >= room or axes.get_xscale() == "log":
            shown.append(one)
    axes.set_xticks([at[one] for one in shown], [printable(names[one], 14) for one in shown], rotation=40, ha="right")
    axes.set_xticks([], minor=True)


def _course(
    axes: Any,
    at: Any,
    values: Sequence[float | None],
    ends: Sequence[tuple[float, float]],
    look: int,
    palette: Palette,
    label: str | None = None,
) -> None:
    style = figures.style(look, palette)
    axes.plot(at, [_nan(value) for value in values], label=label, **style)
    low, high = zip(*ends, strict=True)
    axes.fill_between(at, low, high, color=style["color"], alpha=0.13, linewidth=0)


def _both(row: Mapping[str, Any], name: str) -> tuple[float, float]:
    low, high = (f"{name}_low", f"{name}_high") if name else ("low", "high")
    return _nan(row[low]), _nan(row[high])


def _nan(value: float | int | None) -> float:
    return math.nan if value is None else float(value)


def followed(found: Comparison, count: int = FOLLOWED) -> dict[str, list[dict[str, Any]]]:
    """The courses that are drawn, by name: of groups where there are any, else of the nodes of the first and the last
    circuit that are strongest in any side."""
    courses: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in found.courses.to_pylist():
        courses.setdefault((row["group"], row["layer"], row["position"], row["neuron"]), []).append(row)
    groups = {key: rows for key, rows in courses.items() if key[0] is not None}
    ends = {key: rows for key, rows in courses.items() if rows[0]["in_circuit"] or rows[-1]["in_circuit"]}
    chosen = groups or ends
    strongest = sorted(chosen, key=lambda key: -max(abs(row["attribution"]) for row in chosen[key]))[:count]
    return {_course_name(key, found.numbering): chosen[key] for key in strongest}


def _course_name(key: tuple[Any, ...], numbering: Numbering) -> str:
    group, layer, position, neuron = key
    if group is not None:
        return printable(group, 28)
    return numbering.name(layer, neuron) + (f" @{position}" if position >= 0 else "")


# ------------------------------------------------------------------------------------------------ pages


def blocks(found: Comparison) -> list[Block]:
    """What a report shows of a comparison."""
    shown = [page.text(summary(found)), page.table(sides_sheet(found))]
    caption = "The mean metric, the circuits, and the strongest courses over the sides; shaded: 95 % intervals."
    shown += [page.figure(svg(found), caption), page.table(nodes_sheet(found, 2 * ROWS))]
    return [*shown, page.points(about(found).splitlines())]


def document(found: Comparison, links: Sequence[page.Link] = ()) -> str:
    """A report of its own."""
    counts, last = found.counts, found.sides.to_pylist()[-1]
    cards = (
        ("appeared", f"{counts[APPEARED]:,}", "in the last circuit alone"),
        ("vanished", f"{counts[VANISHED]:,}", "in the first circuit alone"),
        ("changed sign", f"{counts[SIGN]:,}", "in both circuits"),
        ("in both", f"{counts[BOTH]:,}", f"overlap {number(_overlap(found), '.2f')}"),
        ("metric", number(last["metric"], "+.3f"), f"of {_named(found, -1)}"),
    )
    made = Page(
        kind="comparison",
        title=f"{_named(found, 0)} and {_named(found, -1)}",
        summary=f"{len(found.names)} sides, node by node.",
        verdict=_verdict(found),
        findings=found.notes,
        cards=cards,
        sections=(
            Section("differences", "What differs", tuple(blocks(found))),
            *([Section("files", "Files", (page.links(links),))] if links else []),
        ),
    )
    return made.html()


def _overlap(found: Comparison) -> float | None:
    return found.sides.to_pylist()[0]["overlap_last"]


def _verdict(found: Comparison) -> Verdict:
    if min(found.n_prompts) < 2:
        return Verdict("Not tested", "One prompt says nothing of others.", "open")
    text = f"{found.found:,} of {found.n_tested:,} nodes, at a false discovery rate of {RATE:g}."
    return Verdict("They differ", text, "good") if found.found else Verdict("No difference found", text, "open")


def graph_page(found: Comparison) -> str:
    """Both graphs in one page, each node at one place: which are of the first side, of the last, or of both.

    Raises:
        JobError: they have more than the page can draw.
    """
    return viewer.page(_payload(found, aligned(found)))


def _payload(found: Comparison, both: Aligned) -> viewer.Payload:
    drawn = tables.payload(both.graph)
    sides = np.array(both.node_sides, np.uint8)
    nodes = replace(drawn.nodes, side=sides, first=_floats(both.first), last=_floats(both.last))
    edges = replace(drawn.edges, side=np.array(both.edge_sides, np.int32))
    names = tuple(printable(found.names[at], 60) for at in (0, -1))
    about = dict(drawn.settings) | {f"note {at}": text for at, text in enumerate(about_page(found), 1)}
    metric, prompts = [number(row["metric"], "+.3f") for row in _ends_of(found)], found.n_prompts[-1]
    return replace(
        drawn,
        nodes=nodes,
        edges=edges,
        sides=(names[0], names[1]),
        title=f"{names[0]} | {names[1]}",
        model=" | ".join(dict.fromkeys(row["model"] for row in _ends_of(found) if row["model"])) or drawn.model,
        method=f"compared on {prompts:,} prompt{'s' * (prompts != 1)}",
        metric_text=f"metric {' | '.join(metric)}",
        metric=math.nan,
        flows=False,
        settings=about,
    )


def _ends_of(found: Comparison) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rows of the first and the last side."""
    rows = found.sides.to_pylist()
    return rows[0], rows[-1]


def about_page(found: Comparison) -> list[str]:
    """What the graph page says of the comparison."""
    return [summary(found), *found.notes]


def _floats(values: Sequence[float]) -> np.ndarray:
    return np.array(values, np.float32)


def files(found: Comparison, links: Sequence[page.Link] = ()) -> dict[str, bytes]:
    """Everything that a folder of a comparison holds, by name: tables, figure and pages.

    Args:
        links: further files that the report names.
    """
    made = {f"{name}.parquet": encoded(rows) for name, rows in found.tables().items()}
    made |= {f"{name}.csv": csv_bytes(rows.to_pylist(), rows.column_names) for name, rows in found.tables().items()}
    made |= {FIGURE: png(found), GRAPHS: graph_page(found).encode()}
    about = {
        GRAPHS: "both graphs, each node at one place",
        "comparison.csv": "the first and the last side, node by node",
        "compared.csv": "each side, and what it has in common with the one before",
        "courses.csv": "every node of any circuit, over all sides",
        FIGURE: "the figure above",
    }
    own = [page.Link(name, name, text) for name, text in about.items()]
    return made | {REPORT: document(found, [*own, *links]).encode()}


def write(found: Comparison, folder: Path) -> list[Path]:
    """Write the files of a comparison into a folder, which is made; their paths.

    Raises:
        RunError: it cannot be written.
    """
    return [tables.write_page(content, folder / name) for name, content in files(found).items()]
