"""The verb view: one graph's page, written or served, or the page of two graphs compared.

Knows which graphs the words on the command line mean, and where pages go. Refuses to know how graphs are compared
(comparison), drawn (reports) and served (reports/served.py).
"""

from __future__ import annotations

import contextlib
import html
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tracer.cli import terminal
from tracer.cli.graphs import Groups, beside, grouped, read, sized
from tracer.cli.options import flat
from tracer.errors import JobError, quoted

if TYPE_CHECKING:
    from tracer.circuit.circuit import Graph
    from tracer.comparison.sides import Side
    from tracer.reports.served import PageServer


@dataclass(frozen=True)
class Compared:
    """Which graphs are seen, of those that the sources hold."""

    prompt: Annotated[
        list[int] | None,
        typer.Option(
            "--prompt",
            help="Of a run over many: a prompt's number (prompt_id); twice: two of them, compared. "
            "Default: the dataset's circuit.",
        ),
    ] = None
    counterfactual: Annotated[
        bool,
        typer.Option("--counterfactual", help="Compare --prompt with its counterfactual, where the run has that too."),
    ] = False

    def of(self, sources: list[str]) -> list[tuple[str, int | None]]:
        """The source and the prompt of each graph: one, or two that are compared.

        Raises:
            JobError: more than two, or a prompt too many.
        """
        prompts: list[int | None] = [*(self.prompt or [])]
        if self.counterfactual:
            return self._pair(sources, prompts)
        if len(sources) > 2:
            raise JobError(f"{len(sources)} sources", "a page shows two at most", "see 'tracer compare' for more")
        if len(prompts) > 2 or (len(sources) == 2 and len(prompts) == 1):
            rule = f"is given {len(prompts)} times, for {len(sources)} source{'s' * (len(sources) != 1)}"
            raise JobError("--prompt", rule, "give it once or twice for one run, twice for two")
        if len(sources) == 1:
            found = [(sources[0], prompt) for prompt in prompts or (None,)]
        else:
            found = list(zip(sources, prompts or (None, None), strict=True))
        if len(found) == 2 and found[0] == found[1]:
            raise JobError(f"graph {quoted(sources[0], 200)}", "is compared with itself", "name another")
        return found

    def _pair(self, sources: list[str], prompts: list[int | None]) -> list[tuple[str, int | None]]:
        from tracer.circuit.from_run import counterfactual_of

        if len(sources) != 1 or len(prompts) != 1 or prompts[0] is None:
            step = "name one run over many prompts, and --prompt once"
            raise JobError("--counterfactual", "is of one prompt of one run", step)
        return [(sources[0], prompts[0]), (sources[0], counterfactual_of(sources[0], prompts[0]))]


@dataclass(frozen=True)
class Shown:
    """Where the page goes."""

    out: Annotated[
        Path | None,
        typer.Option(help="The page. Default: graph.html in the run folder; of two graphs compared.html."),
    ] = None
    groups: Groups = None
    exemplars: Annotated[
        str | None,
        typer.Option(help="The folder of 'tracer exemplars': texts where neurons are strong, beside what they do."),
    ] = None
    open_page: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False
    serve: Annotated[
        bool,
        typer.Option(
            "--serve",
            help="Serve the page on this machine (127.0.0.1, with a token), so that it saves groups and notes into the "
            "run folder. Ends with Ctrl-C.",
        ),
    ] = False


@terminal.report_errors
@flat
def view(
    sources: Annotated[list[str], typer.Argument(help="A run folder, or a graph file; two: compared.")],
    shown: Shown,
    compared: Compared,
) -> None:
    """Write the graph page: one HTML file that opens from disk and needs no network.

    Examples: tracer view runs/car --open        tracer view runs/before runs/after
    tracer view runs/many --prompt 3 --prompt 7        tracer view runs/car --serve
    """
    graphs = compared.of(sources)
    alone = {"--groups": shown.groups, "--exemplars": shown.exemplars, "--serve": shown.serve or None}
    for name, value in alone.items():
        if value is not None and len(graphs) == 2:
            raise JobError(name, "is of one graph", "leave it out, or name one graph")
    if shown.serve:
        _serve(*graphs[0], shown)
        return
    page = _one(*graphs[0], shown) if len(graphs) == 1 else _two(graphs, shown.out)
    terminal.line(f"wrote {page} ({sized(page)}); open it in a browser")
    if shown.open_page:
        typer.launch(page.resolve().as_uri())


def _one(source: str, prompt: int | None, shown: Shown) -> Path:
    from tracer.reports import tables
    from tracer.store.storage import is_remote

    graph = grouped(read(source, prompt), source, shown.groups, prompt)
    page = shown.out or beside(source, "graph.html", file_too=True)
    run = source if is_remote(source) or Path(source).is_dir() else None
    return tables.view(graph, page, exemplars=shown.exemplars, run=run)


def _two(graphs: list[tuple[str, int | None]], out: Path | None) -> Path:
    from tracer.comparison import compare as comparing
    from tracer.reports import comparison, tables

    names = comparing.apart([source for source, _ in graphs])
    one_run = graphs[0][0] == graphs[1][0]
    sides = []
    for (source, prompt), name in zip(graphs, names, strict=True):
        side = _side(source, prompt, name)
        if prompt is not None:
            text = side.graph.text if side.graph is not None else ""
            side = side.named(f"{prompt}: {text}" if one_run else f"{name}, {prompt}: {text}")
        sides.append(side)
    found = comparing.compared(sides)
    return tables.write_page(comparison.graph_page(found), out or beside(graphs[0][0], "compared.html"))


def _side(source: str, prompt: int | None, name: str) -> Side:
    from tracer.comparison import sides

    if prompt is None and not Path(source).is_file():
        return sides.of_run(source, name)
    return sides.of_graph(read(source, prompt), name)


def _serve(source: str, prompt: int | None, shown: Shown) -> None:
    from tracer.reports.served import served
    from tracer.store.storage import is_remote

    for name, value in {"--out": shown.out, "--groups": shown.groups}.items():
        if value is not None:
            raise JobError(name, "has no effect with --serve", "the run folder's own notes are shown and saved")
    if not is_remote(source) and Path(source).is_file():
        step = "save it as one: tracer import FILE --out FOLDER"
        raise JobError(f"file {quoted(source, 200)}", "is no run folder, into which notes are saved", step)
    graph: Graph = read(source, prompt)
    server = served(source, graph, prompt, shown.exemplars)
    terminal.line(f"serving {server.url}")
    terminal.line(f"notes are saved to {server.notes}; Ctrl-C ends this")
    with contextlib.ExitStack() as stack:
        stack.callback(server.close)
        if shown.open_page:
            stack.callback(_open(server).unlink, missing_ok=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.run()
    terminal.line(f"ended; {server.told()}")


def _open(server: PageServer) -> Path:
    """Open the page by a file that only this user can read, since all see the words that a browser is started with."""
    with tempfile.NamedTemporaryFile("w", suffix=".html", delete=False) as file:
        address = html.escape(server.url)
        file.write(f'<!DOCTYPE html><meta http-equiv="refresh" content="0; url={address}"><a href="{address}">page</a>')
    typer.launch(Path(file.name).as_uri())
    return Path(file.name)
