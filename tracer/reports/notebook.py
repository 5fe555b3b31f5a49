"""What a result looks like where it is asked for by name: a line at a prompt, a small table in a notebook, the graph
page in a frame. `tracer.system.display` finds this module by its name.

Knows HTML inside a page that is not ours: everything from prompts, models and files is escaped, nothing is a script or
a formula, colours are the page's own, and a result takes bounded room. Refuses to know what a result holds
(reports/cards.py) and figures (reports/plots.py).
"""

from __future__ import annotations

import html as escaping
import os
import re
import sys
import tempfile
import webbrowser
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console

from tracer.circuit.circuit import Circuit, Graph
from tracer.reports import plots, tables
from tracer.reports.cards import Card, card_of
from tracer.reports.sheet import TERMINAL, Sheet
from tracer.system.display import in_notebook
from tracer.text import printable

ROWS = 10
"""Of a table in a notebook."""
CELL, LINE = 60, 300
"""Characters of a cell, and of a line beside a table."""
INLINE = 2_500_000
"""Characters of a frame in a notebook: servers of notebooks drop what is more than 1 MB a second, over three seconds,
and the notebook's file holds it."""
_CELL = "padding:.1em .6em;text-align:{};vertical-align:top;white-space:pre-wrap;unicode-bidi:isolate"
_FORMULA = re.compile(r"[$\\]")


def text(result: Any) -> str:
    """A result in a line."""
    return card_of(result).line


def html(result: Any) -> str:
    """A result as a small table for a notebook, light or dark."""
    return card_html(card_of(result))


def card_html(card: Card, rows: int = ROWS) -> str:
    """A card as HTML.

    Args:
        rows: of a table, at most.
    """
    facts = "".join(
        f'<tr><th style="{_CELL.format("left")}">{safe(name, CELL)}</th>'
        f'<td style="{_CELL.format("left")}">{safe(value, LINE)}</td></tr>'
        for name, value in card.facts
    )
    # The classes keep MathJax away; so does each $ and \ in an element of its own, where it does not know them.
    parts = [
        '<div class="tracer-result mathjax_ignore tex2jax_ignore" style="overflow-x:auto;max-width:100%">',
        f'<div style="font-weight:600;padding:.2em 0">{safe(card.line, LINE)}</div>',
        f'<table style="border-collapse:collapse;margin:.2em 0">{facts}</table>' if facts else "",
        *(sheet_html(one, rows) for one in card.tables()),
        "</div>",
    ]
    return "".join(parts)


def sheet_html(found: Sheet, rows: int = ROWS) -> str:
    """A sheet as a table, of which the first `rows` are shown."""
    shown = found.on(TERMINAL)
    sides = ["left" if column.left else "right" for column in shown.columns]
    heads = "".join(
        f'<th scope="col" style="{_CELL.format(side)};border-bottom:1px solid currentColor">'
        f"{safe(column.head, CELL)}</th>"
        for column, side in zip(shown.columns, sides, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f'<td style="{_CELL.format(side)}">{safe(str(value), 3 * CELL if side == "left" else CELL)}</td>'
            for value, side in zip(row, sides, strict=True)
        )
        + "</tr>"
        for row in shown.rows[:rows]
    )
    left = len(shown.rows) - rows
    ending = "s" * (left > 1)
    more = f'<div style="opacity:.7">{left:,} more row{ending}</div>' if left > 0 else ""
    title = f'<caption style="text-align:left;opacity:.7;padding:.3em 0">{safe(shown.title, LINE)}</caption>'
    made = f"{title}<thead><tr>{heads}</tr></thead><tbody>{body}</tbody>"
    return f'<table style="border-collapse:collapse;margin:.4em 0">{made}</table>{more}'


def safe(value: str, limit: int) -> str:
    """A text as HTML that is only shown: escaped, cut, without what cannot be seen, and no formula to MathJax."""
    return _FORMULA.sub(r"<span>\g<0></span>", escaping.escape(printable(value, limit)))


def show(graph: Graph, rows: int) -> None:
    """A graph's table: the terminal's, or in a notebook its HTML."""
    if in_notebook():
        display: Any = import_module("IPython.display")
        display.display(Frame(card_html(card_of(graph, rows), rows), text(graph)))
        return
    found = tables.circuit_table(graph, rows) if isinstance(graph, Circuit) else tables.graph_table(graph, rows)
    console = Console(emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 140)  # a pipe has no width: nothing is cut
    console.print(found)


plot, plot_circuit = plots.plot, plots.circuit


class Frame:
    """HTML that a notebook shows; elsewhere its `text`."""

    def __init__(self, content: str, text: str) -> None:
        self._content, self._text = content, text

    def __repr__(self) -> str:
        return self._text

    def _repr_html_(self) -> str:
        return self._content


def view(graph: Graph, path: str | Path | None, *, open: bool, height: int) -> Any:
    """The graph page: in a notebook a frame, elsewhere a file; see `Graph.view`."""
    inline = in_notebook()
    if path is not None or not inline:
        file = tables.view(graph, _temporary() if path is None else path)
        if not inline:
            if open and _has_browser():
                webbrowser.open(file.resolve().as_uri())
            return file
    return framed(graph, height)


def framed(graph: Graph, height: int = 720, most: int = INLINE) -> Frame:
    """The graph page in a frame that a notebook shows and keeps: without an origin of its own, so that it reaches
    neither the notebook nor a network. With the strongest edges alone where all would be too many, which is said.

    Args:
        most: characters that it may take.
    """
    content = _document(graph)
    shown = graph
    while len(content) > most and shown.links is not None and shown.n_edges:
        bare = len(_document(shown.model_copy(update={"links": shown.links.slice(0, 0)})))
        share = max(0.0, most - bare) / (len(content) - bare) * 0.98
        shown = shown.model_copy(update={"links": shown.links.slice(0, int(share * shown.n_edges))})
        content = _document(shown)
    whole = f"circuit.view('graph.html') writes it as a file, with all {graph.n_edges:,} edges"
    if len(content) > most:
        size = f"The page of {len(graph.nodes):,} nodes takes {len(content) / 1e6:.1f} MB, too much for a notebook"
        return Frame(f"<div>{safe(f'{size}: {whole}.', LINE)}</div>", f"{size}: {whole}.")
    said = ""
    if shown is not graph:
        said = f"<div>The {shown.n_edges:,} strongest of {graph.n_edges:,} edges: {safe(whole, LINE)}.</div>"
    frame = (
        f'{said}<iframe title="The graph of a circuit" sandbox="allow-scripts allow-downloads" width="100%" '
        f'height="{int(height)}" style="border:1px solid #8888;background:#fff" srcdoc="{content}"></iframe>'
    )
    return Frame(frame, f"<graph page of {text(graph)}>")


def _document(graph: Graph) -> str:
    """The page as the attribute of an element."""
    return escaping.escape(tables.graph_page(graph), quote=True)


def _temporary() -> Path:
    """A file that stays until the machine tidies up, since the browser reads it after we end."""
    handle, name = tempfile.mkstemp(prefix="tracer-graph-", suffix=".html")
    os.close(handle)
    return Path(name)


def _has_browser() -> bool:
    """Whether a browser has somewhere to open: one in a terminal would take that over."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
