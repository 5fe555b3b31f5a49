"""Figures: curves against circuit size and estimates against truth, as PNG files and as SVG inside a page.

Knows matplotlib, how lines are told apart without colour, and how an SVG file becomes part of an HTML page. Refuses to
know how any number was computed, and the text around a figure.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from markupsafe import Markup

if TYPE_CHECKING:
    from tracer.evaluation.curves import Curves
    from tracer.evaluation.edge_curves import EdgeCurves
    from tracer.evaluation.quality import Quality
    from tracer.evaluation.statistics import Interval

VIEW = (-0.4, 1.6)
"""Of a share's axis, where what lies far outside 0 to 1 may be cut off."""
CONTROL = -1
"""The look of a random control: the last one."""

_MARKERS = "osDvPX*p^"
_DASHES: tuple[Any, ...] = (
    "-",
    (0, (6, 2)),
    (0, (6, 2, 1.2, 2)),
    (0, (1.2, 1.6)),
    (0, (6, 2, 1.2, 2, 1.2, 2)),
    (0, (11, 3)),
    (0, (3, 1.6)),
    (0, (11, 2, 3, 2)),
    (0, (1, 3.2)),
)
_INK, _FAINT = "#010203", "#040506"  # drawn in these, then replaced by the page's own colours
_NAMES = ("blue", "orange", "green", "purple", "gold", "teal", "pink", "brown", "grey")
_PAGE = {f"#1122{i:02d}": f"var(--{name})" for i, name in enumerate(_NAMES, start=1)}


class Palette(NamedTuple):
    """What is drawn in: the colours of lines, of what stands behind them, and of text."""

    colours: Sequence[str]
    faint: str
    ink: str


PAPER = Palette(
    ("#2166ac", "#b2552c", "#1b7837", "#762a83", "#b8860b", "#2a8c82", "#c51b7d", "#7f4f24", "#777777"),
    "#bbbbbb",
    "#000000",
)
"""Of a file on white."""
LOOKS = len(PAPER.colours) - 1
"""How many lines look different, beside the control's."""
PAGE = Palette(tuple(_PAGE), _FAINT, _INK)
"""Of a page, which has its own, by day and by night."""


class Line(NamedTuple):
    """One curve by circuit size.

    Attributes:
        curve: a value for each size.
        look: which colour, marker and dashes, from 0; `CONTROL` is a look of its own.
    """

    label: str
    sizes: Sequence[int]
    curve: Interval
    look: int


class Panel(NamedTuple):
    """Curves that share a pair of axes; `marks` are points (size, value) that are pointed out, their size below."""

    title: str
    lines: Sequence[Line]
    marks: Sequence[tuple[int, float]] = ()


def new(width: float, height: float) -> Any:
    """An empty figure, in inches."""
    return _figure()(figsize=(width, height), layout="constrained")


@functools.cache
def _figure() -> Any:
    """matplotlib's figure, which a notebook shows though no window and no pyplot is there."""
    import matplotlib.figure  # the figure alone: no window, whatever the machine

    class Figure(matplotlib.figure.Figure):
        def _repr_png_(self) -> bytes:
            return png(self)

    return Figure


def three(found: Curves, labels: Sequence[str]) -> list[Line]:
    """The curves of one circuit: faithfulness, completeness and the random control."""
    curves = zip(
        labels, (found.faithfulness, found.completeness, found.control_faithfulness), (0, 1, CONTROL), strict=True
    )
    return [Line(label, found.sizes, curve, look) for label, curve, look in curves]


def draw_curves(axes: Any, lines: Sequence[Line], palette: Palette = PAPER, **labels: Any) -> None:
    """Curves on a logarithmic axis of sizes, their intervals shaded, 0 and 1 marked; `labels` as of ``axes.set``."""
    for label, sizes, curve, look in lines:
        drawn = style(look, palette)
        axes.plot(sizes, curve.estimate, label=label, **drawn)
        axes.fill_between(sizes, curve.low, curve.high, color=drawn["color"], alpha=0.13, linewidth=0)
    for level in (0.0, 1.0):
        axes.axhline(level, color=palette.faint, linewidth=0.8, zorder=0)
    axes.set(xscale="log", **labels)


def style(look: int, palette: Palette) -> dict[str, Any]:
    """Colour, marker and dashes of a line; no two of the first 64 share marker and dashes, nor of the first 16
    marker and filling."""
    last = len(_MARKERS) - 1
    turn, kind = (0, last) if look == CONTROL else divmod(look, last)
    dashes = _DASHES[kind if kind == last else (kind + turn) % last]
    drawn = {"color": palette.colours[kind], "marker": _MARKERS[kind], "linestyle": dashes, "linewidth": 1.6}
    return drawn | {"markersize": 5, "markerfacecolor": "none" if (kind + turn) % 2 else palette.colours[kind]}


def by_strength(lines: Sequence[Line]) -> list[str]:
    """Labels of lines, highest first: by the mean of the curve, what is above 1 as 1, over its sizes."""
    heights: dict[str, list[float]] = {}
    for line in lines:
        shares = np.nan_to_num(np.clip(np.asarray(line.curve.estimate), 0, 1))
        heights.setdefault(line.label, []).append(float(shares.mean()))
    return sorted(heights, key=lambda label: -float(np.mean(heights[label])))


def grid(rows: Mapping[str, Sequence[Panel]], palette: Palette = PAPER, xlabel: str = "nodes in the circuit") -> Any:
    """A figure of rows of panels, a row per label of the upright axis, that share their axes and one legend, in which
    the strongest line of the first row stands first.

    What lies far outside 0 to 1 is cut off.
    """
    width = max(map(len, rows.values()))
    figure = new(min(3.4, 11 / width) * width + 2.2, 2.9 * len(rows) + 0.3)
    drawn = figure.subplots(len(rows), width, sharex=True, sharey=True, squeeze=False)
    for row, (ylabel, panels) in zip(drawn, rows.items(), strict=True):
        row[0].set_ylabel(ylabel)
        for axes, panel in zip(row, panels, strict=False):
            draw_curves(axes, panel.lines, palette, ylim=VIEW)
            for number, (size, value) in enumerate(panel.marks):
                axes.plot([size, size], [VIEW[0], value], color=palette.ink, linewidth=0.9, zorder=1)
                place = {"textcoords": "offset points", "color": palette.ink, "fontsize": 9}
                axes.annotate(f"{size:,}", (size, VIEW[0]), (3, 4 + 11 * number), **place)
        for axes in row[len(panels) :]:
            axes.set_visible(False)
    first = next(iter(rows.values()))
    for axes, bottom, panel in zip(drawn[0], drawn[-1], first, strict=False):
        axes.set_title(panel.title, fontsize=10, parse_math=False)
        bottom.set_xlabel(xlabel)
    _mark_sizes(drawn[0, 0], [size for panel in first for line in panel.lines for size in line.sizes])
    handles = {label: one for axes in drawn[0] for one, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    order = [label for label in by_strength([line for panel in first for line in panel.lines]) if label in handles]
    figure.legend([handles[one] for one in order], order, loc="outside right center", frameon=False, handlelength=4.2)
    return figure


def _mark_sizes(axes: Any, sizes: Sequence[int]) -> None:
    """Name powers of ten on an axis of sizes, as plain numbers; or some sizes where there is one power at most."""
    some = sorted(set(sizes))
    ticks = [10**power for power in range(9) if some[0] <= 10**power <= some[-1]]
    ticks = ticks if len(ticks) > 1 else some[:: max(1, len(some) // 4)]
    short = (
        f"{size // 10**6:,}M" if size >= 10**6 else f"{size // 1000}k" if size >= 10**4 else f"{size:,}"
        for size in ticks
    )
    axes.set_xticks(ticks, [*short])
    axes.set_xticks([], minor=True)


def png(figure: Any) -> bytes:
    """A figure as a PNG file."""
    content = io.BytesIO()
    with _any_script():
        figure.savefig(content, dpi=140, format="png")
    return content.getvalue()


def evaluation_png(lines: Sequence[Line], title: str, **labels: Any) -> bytes:
    """The curves of one circuit as a PNG file."""
    figure = new(7.0, 4.3)
    axes = figure.subplots()
    draw_curves(axes, lines, **labels)
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.legend(frameon=False, handlelength=4.2)
    return png(figure)


def curves_svg(found: Curves, unit: str = "nodes") -> Markup:
    """Faithfulness, completeness and the random control against size, for a page."""
    figure = new(7.6, 3.9)
    axes = figure.subplots()
    labels = ("faithfulness (wanted: 1)", "completeness (wanted: 0)", "faithfulness of random nodes")
    lines = three(found, labels)
    axis = {"xlabel": f"{unit} in the circuit (log scale)", "ylabel": "share of F(model) - F(empty)"}
    draw_curves(axes, lines, PAGE, **axis)
    ticks = [size for size in found.sizes if str(size)[0] in "125" and not str(size)[1:].strip("0")]
    if len(ticks) > 1:
        axes.set_xticks(ticks, [f"{size:,}" for size in ticks])
        axes.set_xticks([], minor=True)
    figure.legend(
        *axes.get_legend_handles_labels(),
        frameon=False,
        loc="outside upper center",
        ncols=3,
        handlelength=3,
        columnspacing=1.2,
    )
    return svg(figure, "curves", "Faithfulness, completeness and random nodes against circuit size")


def edge_lines(found: EdgeCurves) -> list[Line]:
    """Neurons as pruned by edges, beside as many of the strongest and random ones."""
    edges, ranked = found.by_edges, found.by_attribution
    named = (
        ("by edges", edges.faithfulness, 0),
        ("by attribution", ranked.faithfulness, 1),
        ("random nodes", edges.control_faithfulness, CONTROL),
    )
    return [Line(label, edges.sizes, curve, look) for label, curve, look in named]


def edge_curves_png(found: EdgeCurves, title: str) -> bytes:
    """Faithfulness by how many nodes are left, pruned by edges and ranked by attribution, as a PNG file."""
    labels = {"xlabel": "nodes left", "ylabel": "faithfulness", "ylim": VIEW}
    return evaluation_png(edge_lines(found), title, **labels)


def edge_curves_svg(found: EdgeCurves) -> Markup:
    """The same for a page."""
    figure = new(7.6, 3.6)
    axes = figure.subplots()
    axis = {"xlabel": "nodes left (log scale)", "ylabel": "faithfulness"}
    draw_curves(axes, edge_lines(found), PAGE, **axis)
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=3)
    return svg(figure, "edge-curves", "Faithfulness against the number of nodes, pruned by edges and by attribution")


def scatter_svg(found: Quality, unit: str) -> Markup:
    """Attribution against exact effect, for a page: every node, and the weaker ones alone, which the strong ones would
    hide."""
    figure, sample = new(7.6, 4.1), found.sample
    pairs = zip(sample.attribution.tolist(), sample.exact.tolist(), strict=True)
    reach = sorted(max(abs(estimate), abs(exact)) for estimate, exact in pairs) or [0.0]
    limits = {"all sampled nodes": reach[-1], "the weaker three quarters, enlarged": reach[3 * (len(reach) - 1) // 4]}
    panels = {title: limit for title, limit in limits.items() if limit}
    for axes, title in zip(figure.subplots(1, max(1, len(panels)), squeeze=False)[0], panels, strict=False):
        _draw_points(axes, found, panels[title])
        axes.set(xlabel=f"attribution ({unit})", ylabel=f"exact effect ({unit})", title=title)
    if panels:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], frameon=False, loc="outside lower center", ncols=3)
    return svg(figure, "scatter", "Attribution of sampled nodes against the exact effect of ablating each")


def _draw_points(axes: Any, found: Quality, limit: float) -> None:
    """The sampled nodes of which neither number exceeds `limit`, by stratum, and the line on which both agree."""
    table = np.stack([found.sample.attribution.numpy(), found.sample.exact.numpy()], -1)
    near, stratum, names = abs(table).max(-1) <= limit, found.sample.stratum.numpy(), list(found.strata)
    for i, look, marker in ((2, CONTROL, "^"), (1, 1, "s"), (0, 0, "o")):
        axes.scatter(
            *table[near & (stratum == i)].T,
            s=15,
            c=PAGE.colours[look],
            marker=marker,
            alpha=0.75,
            linewidths=0,
            label=f"{names[i]} nodes",
        )
    axes.axline((0, 0), slope=1, color=_FAINT, linewidth=1, zorder=0)
    low, high = min(0.0, float(table[near].min())), max(0.0, float(table[near].max()))
    edges = low - 0.08 * limit, high + 0.08 * limit
    axes.set(xlim=edges, ylim=edges, aspect="equal")
    axes.locator_params(nbins=5)


def draw_cells(axes: Any, cells: Sequence[Sequence[float]], limit: float) -> None:
    """Numbers as cells, first row on top: purple below 0, white at 0, orange above, the number itself in each, since
    both ends are equally dark in grey.

    Args:
        limit: the number that has the full colour.
    """
    table = np.asarray(cells, dtype=float)
    axes.pcolormesh(table, cmap="PuOr_r", vmin=-limit, vmax=limit, edgecolors="white", linewidth=0.8)
    axes.set(xlim=(0, table.shape[1]), ylim=(table.shape[0], 0))
    for row, column in np.ndindex(*table.shape):
        value = table[row, column]
        ink = "#ffffff" if abs(value) > 0.7 * limit else "#111111"
        text = f"{value:+.2f}" if abs(value) >= 0.005 else "0"
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=7, color=ink)


@contextlib.contextmanager
def _any_script() -> Iterator[None]:
    """Tokens are of any script and the font is not: a letter that it lacks is a box, and no warning of matplotlib's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        yield


def svg(figure: Any, name: str, label: str) -> Markup:
    """A figure as SVG to stand in the page: its colours the page's, its names its own, no address in it."""
    import matplotlib as mpl

    for axes in figure.axes:
        axes.set_facecolor("none")
        axes.tick_params(which="both", color=_FAINT, labelcolor=_INK)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(_FAINT)
        for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
            text.set(color=_INK, fontsize=10)
    for legend in figure.legends:
        for text in legend.get_texts():
            text.set_color(_INK)
    out = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        with _any_script():
            figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    return Markup(_embedded(out.getvalue(), name, label))


def _embedded(svg: str, name: str, label: str) -> str:
    """An SVG file of matplotlib's as an element of an HTML page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    for drawn, own in {**_PAGE, _INK: "var(--ink)", _FAINT: "var(--faint)"}.items():
        svg = svg.replace(drawn, own)
    svg = re.sub(r"font: [^;\"]*?(\d+)px [^;\"]*", r"font: \1px var(--sans)", svg)
    size = re.compile(r'(<svg[^>]*?) width="([^"]*)"')
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    own = rf'\1 style="max-width:\2" role="img" aria-label="{Markup.escape(label)}"'
    return size.sub(own, svg, count=1).strip()
