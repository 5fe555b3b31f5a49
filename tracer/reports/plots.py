"""Figures of results, as a notebook shows them: those of the reports, a circuit's places, and steered tokens.

Knows which figure shows a result. Refuses to know lines, colours and files (reports/figures.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tracer.circuit.circuit import Graph
from tracer.errors import JobError, option
from tracer.reports import figures, sheet
from tracer.reports.figures import CONTROL, PAPER, Line
from tracer.reports.sheet import token
from tracer.text import printable

NAMED = 40
"""Positions that are named by their tokens; more are numbered."""
BARS = 20
"""Nodes that have a bar."""
LABEL = 32
"""Characters of a node's name beside its bar."""


def plot(result: Any, axes: Any = None) -> Any:
    """The figure of a result.

    Args:
        axes: to draw into; a figure of its own if None.

    Raises:
        JobError: nothing to draw, or a figure of several panels in one pair of axes.
    """
    for kind in type(result).__mro__:
        if kind.__name__ in _INTO:
            return _into(result, axes, _INTO[kind.__name__])
        if kind.__name__ in _WHOLE:
            if axes is not None:
                raise JobError(option("axes"), "cannot hold a figure of several panels", "leave it out")
            return _WHOLE[kind.__name__](result)
    raise JobError(f"a {type(result).__name__}", "has no figure", "see its to_pandas()")


def circuit(graph: Graph, axes: Any, kind: str) -> Any:
    """Where a circuit is; see `Graph.plot`."""
    panels: Mapping[str, Callable[[Any, Any], None]] = {"positions": _positions, "nodes": _bars}
    if kind not in (*panels, "both"):
        raise JobError(option("kind", kind), f"must be both, {' or '.join(panels)}", "choose one")
    if not graph.n_nodes or None in graph.neurons["attribution"].to_pylist():
        raise JobError("graph", "has no neurons with attributions to draw", "trace the prompt")
    if kind != "both":
        return _into(graph, axes, panels[kind], figsize=_size(graph, kind))
    if axes is not None:
        raise JobError(option("axes"), "holds one of the two", f"give {option('kind', 'positions')} or 'nodes'")
    (wide, high), (bars, tall) = _size(graph, "positions"), _size(graph, "nodes")
    figure = figures.new(wide + bars, max(high, tall))
    for panel, draw in zip(figure.subplots(1, 2, width_ratios=(wide, bars)), panels.values(), strict=True):
        draw(graph, panel)
    figure.suptitle(printable(graph.text, 90), fontsize=10, parse_math=False)
    return figure


def _into(result: Any, axes: Any, draw: Callable[[Any, Any], None], figsize: tuple[float, float] = (7.0, 4.3)) -> Any:
    if axes is None:
        axes = figures.new(*figsize).subplots()
    draw(result, axes)
    return axes.figure


# ------------------------------------------------------------------------------------------------ circuits


def _size(graph: Graph, kind: str) -> tuple[float, float]:
    """Inches of a panel."""
    if kind == "nodes":
        return 4.6, 1.2 + 0.22 * min(BARS, graph.n_nodes)
    return min(9.0, 2.2 + 0.34 * len(graph.tokens)), min(7.0, 2.0 + 0.2 * graph.n_layers)


def by_place(graph: Graph) -> np.ndarray:
    """The summed attribution of the neurons at each layer and position [layer, position]; of a circuit that is free one
    position."""
    rows = graph.neurons.select(["layer", "position", "attribution"]).to_pydict()
    position = np.maximum(rows["position"], 0)
    sums = np.zeros((graph.n_layers, max(len(graph.tokens), 1)))
    np.add.at(sums, (np.array(rows["layer"]), position), np.array(rows["attribution"], float))
    return sums


def _positions(graph: Graph, axes: Any) -> None:
    sums = by_place(graph)
    limit = float(abs(sums).max()) or 1.0
    shown = axes.imshow(sums, cmap="RdBu", vmin=-limit, vmax=limit, origin="lower", aspect="auto")
    bar = axes.figure.colorbar(shown, ax=axes, fraction=0.05, pad=0.02)
    bar.set_label(f"attribution{_unit(graph)}")
    names = [printable(token(text), 14) for text in graph.tokens]
    if len(names) <= NAMED:
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8, parse_math=False)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="position", ylabel="layer")
    axes.set_title("Attribution of neurons by place", fontsize=10)


def _bars(graph: Graph, axes: Any) -> None:
    names = graph.names
    rows = graph.neurons.slice(0, BARS).select(["node_id", "attribution"]).to_pylist()
    values = [row["attribution"] for row in rows]
    colours = [PAPER.colours[0 if value >= 0 else 1] for value in values]
    axes.barh(range(len(rows)), values, color=colours)
    labels = [printable(names[row["node_id"]], LABEL) for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=8, parse_math=False)
    axes.invert_yaxis()
    axes.axvline(0, color=PAPER.faint, linewidth=0.8, zorder=0)
    axes.set_xlabel(f"attribution{_unit(graph)}")
    axes.set_title(f"The strongest of {graph.n_nodes:,} nodes", fontsize=10)


def _unit(graph: Any) -> str:
    return f" ({sheet.unit(graph)})" if hasattr(graph, "metric") else ""


# ------------------------------------------------------------------------------------------------ other results


def _curves(found: Any, axes: Any) -> None:
    lines = figures.three(found, ("faithfulness", "completeness", "random nodes"))
    figures.draw_curves(axes, lines, xlabel="nodes in the circuit", ylabel="share of F(model) - F(empty)")
    axes.legend(frameon=False, handlelength=4.2)


def _edge_curves(found: Any, axes: Any) -> None:
    labels = {"xlabel": "nodes left", "ylabel": "faithfulness", "ylim": figures.VIEW}
    figures.draw_curves(axes, figures.edge_lines(found), **labels)
    axes.legend(frameon=False, handlelength=4.2)


def _steering(found: Any, axes: Any) -> None:
    """Probabilities before and after, and of random neurons, with their range."""
    shifts = [effect.probability for effect in found.effects]
    at = np.arange(len(shifts))
    axes.barh(at - 0.2, [shift.before for shift in shifts], 0.38, label="before", color=PAPER.colours[CONTROL])
    axes.barh(at + 0.2, [shift.after for shift in shifts], 0.38, label="after", color=PAPER.colours[0])
    drawn = [(place, shift.control) for place, shift in zip(at, shifts, strict=True) if shift.control is not None]
    for number, (place, spread) in enumerate(drawn):
        label = None if number else "random neurons"
        axes.plot([spread.low, spread.high], [place, place], color=PAPER.ink, linewidth=1.4, label=label)
        axes.plot(spread.mean, place, "|", color=PAPER.ink, markersize=9)
    labels = [f"{printable(token(effect.token), 20)} ({effect.role})" for effect in found.effects]
    axes.set_yticks(at, labels, parse_math=False)
    axes.invert_yaxis()
    axes.set(xlabel="probability of the next token", xlim=(0, 1))
    axes.legend(frameon=False)


def _swap(found: Any, axes: Any) -> None:
    kinds = (("swapped", "swapped", 0), ("zeroed", "own nodes to 0", 1), ("random", "random nodes", CONTROL))
    lines = [Line(label, found.ks, found.arms[name].becomes, look) for name, label, look in kinds]
    figures.draw_curves(axes, lines, xlabel="k, nodes of each prompt", ylabel="share with the other's answer")
    axes.set_xticks(found.ks, [f"{k:,}" for k in found.ks])
    axes.set_xticks([], minor=True)
    axes.legend(frameon=False, handlelength=4.2)


def _sweep(found: Any) -> Any:
    from tracer.reports import sweeps

    return sweeps.heat_map(found.responses(), PAPER)


def _comparison(found: Any) -> Any:
    from tracer.reports import comparison

    return comparison.drawn(found, PAPER)


def _concepts(found: Any) -> Any:
    from tracer.reports import concepts

    return concepts.drawn(found.table, PAPER)


_INTO: dict[str, Callable[[Any, Any], None]] = {
    "Curves": _curves,
    "EdgeCurves": _edge_curves,
    "Steering": _steering,
    "Swap": _swap,
}
_WHOLE: dict[str, Callable[[Any], Any]] = {"Comparison": _comparison, "Concepts": _concepts, "Sweep": _sweep}
