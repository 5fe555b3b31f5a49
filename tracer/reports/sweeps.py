"""A sweep as a person or a script reads it: tables on a terminal, CSV, JSON, a heat map, and its part of a page.

Knows layout and wording. Computes no number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from tracer.reports import figures, page
from tracer.reports.folded import Folded, folded
from tracer.reports.page import Block
from tracer.reports.parts import Part, Sheet
from tracer.reports.sheet import token
from tracer.reports.tables import csv_bytes
from tracer.text import printable

if TYPE_CHECKING:
    from tracer.evaluation.responses import GroupResponse, Response
    from tracer.evaluation.statistics import Interval

MOST_ROWS, MOST_TOKENS = 90, 10
"""Rows (a group and a factor) and columns of a heat map; more cannot be read."""
SHOWN = 20
"""Effects on other groups that are shown, the largest."""


# ------------------------------------------------------------------------------------------------ for programs


def rows(found: Sequence[Response]) -> list[dict[str, Any]]:
    """Responses as rows: means over prompts with 95 % intervals; empty where there is none."""
    made = []
    for one in found:
        row: dict[str, Any] = {name: getattr(one, name) for name in ("group", "factor", "token", "role")}
        row |= {name: getattr(one, name) for name in ("n_prompts", "n_nodes", "before", "after")}
        for name in ("change", "logit_change", "control", "control_logit"):
            row |= _ends(name, getattr(one, name))
        row |= {name: getattr(one, name) for name in ("changed", "control_changed", "kl", "control_kl")}
        made.append(row)
    return made


def _ends(name: str, interval: Interval | None) -> dict[str, float | None]:
    names = {name: "estimate", f"{name}_low": "low", f"{name}_high": "high"}
    if interval is None:
        return dict.fromkeys(names)
    values = {one: float(getattr(interval, end)) for one, end in names.items()}
    return {one: None if math.isnan(value) else value for one, value in values.items()}


def as_csv(found: Sequence[Response]) -> str:
    """Responses as CSV."""
    return csv_bytes(rows(found)).decode()


def as_json(found: Sequence[Response], groups: Sequence[GroupResponse]) -> str:
    """Responses, and what is kept of groups' activations, as JSON."""
    kept = [
        {"group": one.group, "factor": one.factor, "other": one.other, "n_prompts": one.n_prompts}
        | _ends("kept", one.kept)
        | _ends("control", one.control)
        for one in groups
    ]
    return json.dumps({"tokens": rows(found), "groups": kept}, indent=1, allow_nan=False)


# ------------------------------------------------------------------------------------------------ for people


def table(found: Sequence[Response], groups: Sequence[GroupResponse]) -> Folded:
    """A sweep for a terminal."""
    n = max((one.n_prompts for one in found), default=0)
    title = f"Change of probability, mean of {n:,} prompt{'s' * (n != 1)} and 95 % interval"
    cells = []
    last = None
    for one in found:
        first = (one.group, one.factor) != last
        last = one.group, one.factor
        name = (one.group, f"{one.factor:g}") if first else ("", "")
        numbers = (f"{one.before:.3f}", f"{float(one.change.estimate):+.3f}", _span(one.change))
        at_random = "-" if one.control is None else f"{float(one.control.estimate):+.3f}"
        cells.append((*name, token(one.token), *numbers, at_random, f"{one.changed:.0%}" if first else ""))
    heads = ["<group", "factor", "<token", "before", "change", "&interval", "random", "says other"]
    parts: list[Part] = [Sheet.of("responses", title, heads, cells)]
    if others := _strongest(groups):
        cells = []
        for one in others:
            at_random = "-" if one.control is None else f"{float(one.control.estimate):.2f}"
            names = one.group, f"{one.factor:g}", one.other
            cells.append((*names, f"{float(one.kept.estimate):.2f}", _span(one.kept, ".2f"), at_random))
        heads = ["<group", "factor", "<other group", "kept", "&interval", "random"]
        parts.append(Sheet.of("others", "Activations kept in other groups", heads, cells))
    return folded([*parts, _about(found)])


def _span(interval: Interval, form: str = "+.3f") -> str:
    low, high = float(interval.low), float(interval.high)
    return "-" if math.isnan(low) else f"{low:{form}} {high:{form}}"


def _about(found: Sequence[Response]) -> str:
    drawn = any(one.control is not None for one in found)
    if not drawn:
        return "No random control was drawn."
    worst = max((one.control_changed or 0.0 for one in found), default=0.0)
    return (
        "random: as many other neurons in each layer at the same positions. "
        f"says other: prompts with another likeliest token; with random neurons at most {worst:.0%}."
    )


def _strongest(groups: Sequence[GroupResponse]) -> list[GroupResponse]:
    """The largest effects on other groups than the one that is steered, those that two digits show."""
    others = [one for one in groups if one.group != one.other and abs(float(one.kept.estimate) - 1) >= 0.005]
    return sorted(others, key=lambda one: -abs(float(one.kept.estimate) - 1))[:SHOWN]


def blocks(found: Sequence[Response], groups: Sequence[GroupResponse]) -> Iterator[Block]:
    """What a report shows of a sweep: the heat map, every response, and the largest effects on other groups."""
    if not found:
        yield page.missing("Nothing was steered.", "Give the job steering: with prompts and factors.")
        return
    n = max(one.n_prompts for one in found)
    yield page.text(
        f"Each group of neurons was multiplied by each factor on {n:,} prompts, and the next token's probability "
        "compared with the untouched model's. Beside it the same done to random neurons, as many in each layer at the "
        "same positions, none of them the group's."
    )
    yield page.figure(heat_map_svg(found), "Change of probability, mean over prompts; the right half is the control.")
    yield page.table(_sheet(found))
    if others := _strongest(groups):
        heads = ["<group", "factor", "<other group", "kept of its activations", "95 % interval", "random neurons"]
        cells = [
            (
                *(printable(one.group, 60), f"{one.factor:g}", printable(one.other, 60)),
                *(f"{float(one.kept.estimate):.3f}", _span(one.kept, ".3f")),
                "-" if one.control is None else f"{float(one.control.estimate):.3f}",
            )
            for one in others
        ]
        yield page.table(Sheet.of("steering-groups", "The largest effects on other groups' activations", heads, cells))
    yield page.note(f"{_about(found)} Intervals are over prompts. Every number is in steering.parquet.")


def _sheet(found: Sequence[Response]) -> Sheet:
    heads = [
        "<group",
        "factor",
        "<token",
        "<asked as",
        "before",
        "after",
        "change",
        "95 % interval",
    ]
    heads += ["random neurons", "95 % interval", "says another token", "random neurons", "KL (nats)"]
    cells = []
    for one in found:
        at_random = ("-", "-") if one.control is None else (f"{float(one.control.estimate):+.4f}", _span(one.control))
        cells.append(
            (
                *(printable(one.group, 60), f"{one.factor:g}", token(one.token), one.role),
                *(f"{one.before:.4f}", f"{one.after:.4f}", f"{float(one.change.estimate):+.4f}", _span(one.change)),
                *at_random,
                *(f"{one.changed:.0%}", "-" if one.control_changed is None else f"{one.control_changed:.0%}"),
                f"{one.kl:.3f}",
            )
        )
    return Sheet.of("steering", "What the next token's probability becomes", heads, cells)


# ------------------------------------------------------------------------------------------------ the heat map


def heat_map_png(found: Sequence[Response], title: str) -> bytes:
    """Groups and factors against tokens: the change of probability, and beside it that of random neurons, as PNG."""
    figure = heat_map(found, figures.PAPER)
    figure.suptitle(printable(title, 110), fontsize=10, parse_math=False)
    return figures.png(figure)


def heat_map_svg(found: Sequence[Response]) -> Markup:
    """The same for a page."""
    return figures.svg(heat_map(found, figures.PAGE), "steering-map", "Change of probability by group, factor, token")


def heat_map(found: Sequence[Response], palette: figures.Palette) -> Any:
    names = list(dict.fromkeys((one.role, one.token) for one in found))[:MOST_TOKENS]
    lines = list(dict.fromkeys((one.group, one.factor) for one in found))[:MOST_ROWS]
    values = {((one.group, one.factor), (one.role, one.token)): one for one in found}
    has_control = any(one.control is not None for one in found)
    panels = {"the group": "change"} | ({"random neurons": "control"} if has_control else {})
    drawn = {
        title: [[_value(values.get((line, name)), what) for name in names] for line in lines]
        for title, what in panels.items()
    }
    # Cells are wide enough for their number, which is what a reader without colours has.
    figure = figures.new(2.6 + len(panels) * max(1.4, 0.62 * len(names)), 1.5 + 0.25 * len(lines))
    limit = max((abs(value) for cells in drawn.values() for row in cells for value in row), default=0.0) or 1.0
    for axes, (title, cells) in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], drawn.items(), strict=True
    ):
        figures.draw_cells(axes, cells, limit)
        labels = [printable(token(name), 14) for _, name in names]
        axes.set_xticks([at + 0.5 for at in range(len(names))], labels, rotation=40, ha="right", parse_math=False)
        heads = [f"×{factor:g}  {printable(group, 24)}" for group, factor in lines]
        axes.set_yticks([at + 0.5 for at in range(len(lines))], heads, parse_math=False)
        axes.set_title(title, fontsize=10, color=palette.ink)
    return figure


def _value(one: Response | None, what: str) -> float:
    interval = None if one is None else getattr(one, what)
    return 0.0 if interval is None else float(interval.estimate)
