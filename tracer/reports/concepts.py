"""Concept scores as a person or a script reads them: tables, a figure of areas by layer, and what a report says.

Knows layout and words. Computes no number: everything is in a table of `schemas.CONCEPTS`, and tokens in one of
`schemas.TOKENS` where there is one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from tracer.circuit.said import sign
from tracer.meaning.concepts import RATE, Concepts
from tracer.reports import figures
from tracer.reports import page as pages
from tracer.reports.figures import PAGE, PAPER, Palette
from tracer.reports.folded import Folded, folded
from tracer.reports.page import Block
from tracer.reports.parts import Column, Sheet
from tracer.reports.sheet import decimal, ends, token
from tracer.text import Rows, printable

if TYPE_CHECKING:
    import pyarrow as pa

ROWS = 10
"""Neurons of a value that a table shows."""
PANELS = 6
"""Values that a figure shows."""
_TOKENS = 5
SAYS = (
    "AUROC is how often a neuron (of one polarity) is larger on a prompt with the value than on one without: 1 and 0 "
    "tell them apart, .5 is chance. Neurons were chosen on one half of the prompts, farthest from .5 first; AUROC, its "
    "95 % interval, and q (permutations, after Benjamini and Hochberg) are of the other half."
)
"""What a reader must know of the numbers."""

_Found = list[dict[str, Any]]


def by_value(table: pa.Table) -> dict[tuple[str, str], _Found]:
    """The rows of each label and value, in their order."""
    found: dict[tuple[str, str], _Found] = {}
    for row in table.to_pylist():
        found.setdefault((row["label"], row["value"]), []).append(row)
    return found


def summary(table: pa.Table) -> Sheet:
    """A row for each value: how many neurons tell it, and the one that was chosen first."""
    cells = []
    for (label, value), rows in by_value(table).items():
        first, count = rows[0], sum(row["q"] <= RATE for row in rows)
        prompts = f"{first['n_positive']:,} / {first['n_negative']:,}"
        named = f"layer {first['layer']}, neuron {first['neuron']} {sign(first['polarity'])}"
        shown = decimal(first["auroc"]), ends(first["low"], first["high"]), _chance(first["q"])
        cells.append((_text(label), _text(value), prompts, f"{count:,}", f"{len(rows):,}", named, *shown))
    heads = ["<label", "<value", "prompts with / without", f"neurons found (q <= {RATE:g})", "of candidates"]
    heads += ["<chosen first", "its AUROC", "&95 %", "q"]
    return Sheet.of("concepts", "Neurons that tell the values of labels", heads, cells)


def neurons(table: pa.Table, count: int = ROWS, tokens: pa.Table | None = None) -> list[Sheet]:
    """A table for each value: its first neurons.

    Args:
        tokens: in `schemas.TOKENS`: what neurons promote is shown where it is known.
    """
    known = _promoted(tokens)
    sheets = []
    for number, ((label, value), rows) in enumerate(by_value(table).items()):
        shown = rows[:count]
        named = any(_key(row) in known for row in shown)
        heads = [
            "layer",
            "neuron",
            Column("polarity", left=True),
            "AUROC",
            "&95 %",
            "AUROC where chosen",
            "q",
            "<larger",
        ]
        heads += ["<promotes"] if named else []
        cells = [
            (
                *(str(row["layer"]), str(row["neuron"]), sign(row["polarity"]), decimal(row["auroc"])),
                *(ends(row["low"], row["high"]), decimal(row["auroc_chosen_on"]), _chance(row["q"])),
                "with it" if row["auroc_chosen_on"] > 0.5 else "without it",
                *([known.get(_key(row), "")] if named else []),
            )
            for row in shown
        ]
        first, of = rows[0], f"{len(shown):,} of {len(rows):,} candidates"
        prompts = f"{first['n_positive']:,} prompts with it, {first['n_negative']:,} without"
        title = f"{_text(label)} = {_text(value)}: {of}, on {prompts}"
        sheets.append(Sheet.of(f"concept-{number}", title, heads, cells).of_all(len(rows)))
    return sheets


def blocks(table: pa.Table, tokens: pa.Table | None = None) -> tuple[Block, ...]:
    """What a report's section says of concept scores: words, a summary, a figure, and the neurons of each value."""
    if not table.num_rows:
        return (pages.missing("There are none.", "No value of a label could be told from the others."),)
    several = len(by_value(table))
    shown = f"The first {PANELS} of {several:,} values." if several > PANELS else ""
    caption = f"Candidates by layer, on the half that they were not chosen on. Filled: q <= {RATE:g}. {shown}".rstrip()
    tables = [pages.table(one) for one in neurons(table, ROWS if several == 1 else 5, tokens)]
    return (pages.text(SAYS), pages.table(summary(table)), pages.figure(svg(table), caption), *tables)


# ------------------------------------------------------------------------------------------------ the figure


def png(table: pa.Table) -> bytes:
    """Areas by layer as a PNG file."""
    return figures.png(drawn(table, PAPER))


def svg(table: pa.Table) -> Markup:
    """The same for a page."""
    return figures.svg(drawn(table, PAGE), "concepts", "Areas under the ROC curve of candidate neurons, by layer")


def drawn(table: pa.Table, palette: Palette) -> Any:
    """A panel for each value: the area of each candidate over its layer, with its interval."""
    found = list(by_value(table).items())[:PANELS]
    wide = min(3, max(1, len(found)))
    high = -(-len(found) // wide) or 1
    figure = figures.new(2.9 * wide + 0.8, 2.7 * high + 0.4)
    drawn = figure.subplots(high, wide, sharex=True, sharey=True, squeeze=False)
    for axes, ((label, value), rows) in zip(drawn.flat, found, strict=False):
        layers = sorted({row["layer"] for row in rows})
        for layer in layers:
            alike = [row for row in rows if row["layer"] == layer]
            for place, row in enumerate(alike):
                at = layer + (0.0 if len(alike) == 1 else 0.6 * (place / (len(alike) - 1) - 0.5))
                colour = palette.colours[0 if row["auroc_chosen_on"] > 0.5 else 1]
                filled = colour if row["q"] <= RATE else "none"
                axes.plot([at, at], [row["low"], row["high"]], color=colour, alpha=0.3, linewidth=0.8)
                axes.plot(at, row["auroc"], "o", color=colour, markerfacecolor=filled, markersize=3.5)
        axes.axhline(0.5, color=palette.faint, linewidth=0.8, zorder=0)
        axes.set(ylim=(-0.03, 1.03))
        axes.set_title(f"{_text(label, 24)} = {_text(value, 24)}", fontsize=10, parse_math=False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in drawn.flat[len(found) :]:
        axes.set_visible(False)
    for axes in drawn[:, 0]:
        axes.set_ylabel("AUROC, held-out half")
    for axes in drawn[-1]:
        axes.set_xlabel("layer")
    return figure


# ------------------------------------------------------------------------------------------------ for scripts


def as_json(found: Concepts) -> str:
    """The whole record as JSON."""
    return json.dumps(found.record(), indent=1, ensure_ascii=False)


def as_rows(found: Concepts) -> Rows:
    """The rows of the table."""
    return Rows(found.table.column_names, found.table.to_pylist())


def about(found: Concepts) -> str:
    """How the numbers came about, in a line or two."""
    one, how = found.concepts[0], found.design
    whole = f"{one.n_prompts:,} prompts, {one.n_columns:,} (layer, neuron, polarity)"
    least = found.table.num_rows / (1 + how.permutations)
    text = (
        f"{whole}; {how.candidates:,} candidates for each value, {how.permutations:,} permutations, seed {how.seed}. "
    )
    if least > RATE:
        need = int(least / RATE) + 1
        text += f"So few permutations can find {need:,} neurons or more, no fewer. "
    return text + SAYS


def table(found: Concepts, rows: int = ROWS, tokens: pa.Table | None = None) -> Folded:
    """The scores for a terminal: a summary, the first neurons of each value, and how the numbers came about.

    Args:
        tokens: in `schemas.TOKENS`.
    """
    return folded([summary(found.table), *neurons(found.table, rows, tokens), about(found)])


def _promoted(tokens: pa.Table | None) -> Mapping[tuple[int, int, int], str]:
    """The first tokens that neurons promote, by layer, neuron and polarity."""
    rows: Sequence[Mapping[str, Any]] = [] if tokens is None else tokens.to_pylist()
    return {_key(row): " ".join(token(one) for one in (row["promoted"] or ())[:_TOKENS]) for row in rows}


def _key(row: Mapping[str, Any]) -> tuple[int, int, int]:
    return row["layer"], row["neuron"], row["polarity"]


def _chance(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1g}"


def _text(text: str, limit: int | None = None) -> str:
    return printable(text, limit)
