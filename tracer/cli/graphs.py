"""The verbs for circuits that are there already: show, export, import; and what view shares with them.

Knows what they print and where files go by default. Refuses to know formats (circuit/exchange.py) and how circuits look
(reports).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tracer import choices
from tracer.cli import output, terminal
from tracer.cli.dressing import folders
from tracer.cli.options import MOST, Folder, Format, OfRun, Overwrite, Shown, flat
from tracer.errors import JobError, quoted, say

if TYPE_CHECKING:
    from tracer.circuit.circuit import Graph

Groups = Annotated[
    Path | None,
    typer.Option(help="Groups and pins: a file of 'tracer group', or saved from the page. Default: the run folder's."),
]
"""A groups file, for the verbs that show groups."""
Source = Annotated[str, typer.Argument(help="A run folder, or a graph file.", autocompletion=folders)]


@terminal.report_errors
@flat
def show(folder: Folder, shown: Shown, prompt: OfRun = None) -> None:
    """Print a saved circuit again, a dataset's circuit, or one prompt's graph of a run."""
    from tracer.circuit.from_run import read_graph

    show_graph(read_graph(folder, prompt), shown)


@terminal.report_errors
def export(
    source: Source,
    form: Annotated[choices.GraphFormat, typer.Option("--format", help="Of which tool: {}.")] = "neuronpedia",
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

    graph = read(source, prompt)
    if groups is not None and form != "neuronpedia":
        raise JobError("--groups", f"has no effect with format {form!r}", "leave it out")
    if form == "neuronpedia":
        graph = grouped(graph, source, groups)
    ending = form if form in ("graphml", "csv") else "json"
    done = exchange.export(graph, out or beside(source, f"{form}.{ending}"), form, scan=scan, slug=slug)
    for file in done.files:
        terminal.line(f"wrote {file} ({sized(file)})")
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
        output.also(shown.style, f"saved to {out}; 'tracer view {out}' draws it")


def read(source: str, prompt: int | None) -> Graph:
    """What a run folder or a graph file holds; of a run over many prompts its circuit, or one prompt's graph."""
    from tracer.circuit.exchange import import_graph
    from tracer.circuit.from_run import read_graph

    if prompt is None and Path(source).is_file():
        return import_graph(source)
    return read_graph(source, prompt)


def grouped(graph: Graph, source: str, groups: Path | None, prompt: int | None = None) -> Graph:
    """The graph with the groups, pins, names and notes of a file, or of the run folder's own file, if it has one: of a
    prompt's graph the prompt's, else what the graph has of the dataset's."""
    from tracer.circuit import supernodes_file
    from tracer.circuit.notes import Notes
    from tracer.store.storage import is_remote

    if groups is not None:
        file = supernodes_file.read(groups)
    elif is_remote(source) or Path(source).is_dir():
        return Notes(source, graph, prompt).shown()[0]
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


def sized(file: Path) -> str:
    """How large a file is, in words."""
    return f"{max(0.1, file.stat().st_size / 1024):,.1f} KiB"


def show_graph(graph: Graph, shown: Shown) -> None:
    """Print a circuit, as tables with what is to be said of it, or for a program."""
    from tracer.circuit.circuit import Circuit
    from tracer.reports import tables
    from tracer.reports.parts import sentences

    one = graph if isinstance(graph, Circuit) else None
    head = tables.graph_heading(graph) if one is None else tables.heading(one)
    tall, paths = shown.tall, shown.rows
    output.put(
        shown.style,
        lambda: tables.graph_table(graph, tall) if one is None else tables.circuit_table(one, tall, paths),
        lambda: tables.graph_rows(graph, shown.rows),
        lambda: tables.graph_json(graph),
        lambda: sentences([head] if one is None else [head, tables.footer(one)]),
    )
    if one is not None and shown.style is not Format.json:  # which holds them
        say(one.warnings)
