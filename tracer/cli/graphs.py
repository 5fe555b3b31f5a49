"""The verbs for circuits that are there already: show, view, export, import.

Knows what they print and where files go by default. Refuses to know formats (circuit/exchange.py) and how circuits look
(reports).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tracer.cli import terminal
from tracer.cli.options import MOST, Folder, Format, OfRun, Overwrite, Shown, flat
from tracer.errors import JobError, quoted, say

if TYPE_CHECKING:
    from tracer.circuit.circuit import Graph

Groups = Annotated[
    Path | None,
    typer.Option(help="Groups and pins: a file of 'tracer group', or saved from the page. Default: the run folder's."),
]
Source = Annotated[str, typer.Argument(help="A run folder, or a graph file.")]


@terminal.report_errors
@flat
def show(folder: Folder, shown: Shown, prompt: OfRun = None) -> None:
    """Print a saved circuit again, a dataset's circuit, or one prompt's graph of a run."""
    from tracer.circuit.from_run import read_graph

    show_graph(read_graph(folder, prompt), shown)


@terminal.report_errors
def view(
    source: Source,
    out: Annotated[Path | None, typer.Option(help="The page. Default: graph.html in the run folder.")] = None,
    groups: Groups = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    prompt: OfRun = None,
) -> None:
    """Write the graph page: one HTML file that opens from disk and needs no network."""
    from tracer.reports import tables

    graph = grouped(_graph(source, prompt), source, groups)
    page = tables.view(graph, out or beside(source, "graph.html", file_too=True))
    terminal.line(f"wrote {page} ({_size(page)}); open it in a browser")
    if open_page:
        typer.launch(page.resolve().as_uri())


@terminal.report_errors
def export(
    source: Source,
    form: Annotated[str, typer.Option("--format", help="neuronpedia, mib, graphml, csv.")] = "neuronpedia",
    out: Annotated[
        Path | None, typer.Option(help="The file. Default: FORMAT.json (.graphml, .csv) in the folder.")
    ] = None,
    groups: Groups = None,
    scan: Annotated[str | None, typer.Option(help="The model's name on Neuronpedia: letters, digits, - and _.")] = None,
    slug: Annotated[
        str | None, typer.Option(help="The graph's name there: letters, digits, - and _. Default: from the prompt.")
    ] = None,
    prompt: OfRun = None,
) -> None:
    """Write a circuit for another tool, and say what its format cannot hold."""
    from tracer.circuit import exchange

    graph = _graph(source, prompt)
    if groups is not None and form != "neuronpedia":
        raise JobError("--groups", f"has no effect with format {form!r}", "leave it out")
    if form == "neuronpedia":
        graph = grouped(graph, source, groups)
    ending = form if form in ("graphml", "csv") else "json"
    done = exchange.export(graph, out or beside(source, f"{form}.{ending}"), form, scan=scan, slug=slug)
    for file in done.files:
        terminal.line(f"wrote {file} ({_size(file)})")
    terminal.line(f"left out: {'; '.join(done.lost)}")


@terminal.report_errors
@flat
def import_(
    file: Annotated[Path, typer.Argument(help="A Neuronpedia or circuit-tracer graph file (JSON).")],
    out: Annotated[str | None, typer.Option(help="Save it as a run folder here: a path, s3:// or gs://.")] = None,
    overwrite: Overwrite = False,
    max_mib: Annotated[int, typer.Option(help="Refuse a larger file unread.", min=1, max=MOST)] = 256,
    *,
    shown: Shown,
) -> None:
    """Read a graph file as data; one that tracer wrote comes back as the same circuit."""
    from tracer.circuit import exchange

    graph = exchange.import_graph(file, max_mib * 2**20)
    show_graph(graph, shown)
    if out is not None:
        graph.save(out, overwrite)
        terminal.line(f"saved to {out}; 'tracer view {out}' draws it", err=shown.style is not Format.table)


def _graph(source: str, prompt: int | None) -> Graph:
    """What a run folder or a graph file holds; of a run over many prompts its circuit, or one prompt's graph."""
    from tracer.circuit.exchange import import_graph
    from tracer.circuit.from_run import read_graph

    if prompt is None and Path(source).is_file():
        return import_graph(source)
    return read_graph(source, prompt)


def grouped(graph: Graph, source: str, groups: Path | None) -> Graph:
    """The graph with the groups and pins of a file, or of the run folder's own file, if it has one; what a prompt's
    graph does not have of a dataset's groups is left out."""
    from tracer.circuit import supernodes_file
    from tracer.store.storage import is_remote

    if groups is not None:
        file = supernodes_file.read(groups)
    elif is_remote(source) or Path(source).is_dir():
        file = supernodes_file.of_run(source)
    else:
        file = None
    return graph if file is None else supernodes_file.apply(file, graph, partial="prompt_id" in graph.notes)


def beside(source: str, name: str, file_too: bool = False) -> Path:
    """Where a file goes by default: into a run folder, or beside a graph file (`file_too`: under its name)."""
    from tracer.store.storage import is_remote

    if is_remote(source):
        raise JobError(f"run {quoted(source, 200)}", "is not on this machine", "name a file here with --out")
    path = Path(source)
    if path.is_dir():
        return path / name
    return path.with_suffix(Path(name).suffix) if file_too else path.parent / name


def _size(file: Path) -> str:
    return f"{max(0.1, file.stat().st_size / 1024):,.1f} KiB"


def show_graph(graph: Graph, shown: Shown) -> None:
    """Print a circuit, as a table with what is to be said of it, or for a program."""
    from tracer.circuit.circuit import Circuit
    from tracer.reports import tables

    if shown.style is Format.csv:
        terminal.data(tables.graph_csv(graph).rstrip())
        return
    if shown.style is Format.json:
        terminal.data(tables.graph_json(graph))
        return
    table = (
        tables.circuit_table(graph, shown.rows) if isinstance(graph, Circuit) else tables.graph_table(graph, shown.rows)
    )
    terminal.tables().print(table)
    if isinstance(graph, Circuit):
        say(graph.warnings)
