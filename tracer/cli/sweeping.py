"""The verb sweep: its options, which groups and prompts they mean, and the files that it leaves.

Knows what is checked before a model is loaded. Refuses to know what is done to neurons (evaluation/sweep.py), and how a
result looks (reports/sweeps.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from tracer.cli import output, terminal
from tracer.cli.options import MOST, Bos, Folder, Format, Style, flat, lines
from tracer.cli.steering import Steered
from tracer.errors import JobError, quoted
from tracer.text import Rows

if TYPE_CHECKING:
    from tracer.circuit.circuit import Graph
    from tracer.evaluation.sweep import Sweep
    from tracer.prompts import Prompt

FILES = ("steering.parquet", "steering_groups.parquet", "steering.csv", "steering.json", "steering.png")


@dataclass(frozen=True)
class What:
    """The groups, what is done to them, and what is asked."""

    PANEL: ClassVar[str] = "Action"

    factors: Annotated[
        list[float] | None, typer.Option("--factor", help="Multiply: 0 ablates, 2 amplifies, -1 inverts. Repeatable.")
    ] = None
    tokens: Annotated[
        list[str] | None,
        typer.Option("--token", help="A token reported besides targets, foils and the greedy one. Repeatable."),
    ] = None
    groups: Annotated[
        Path | None,
        typer.Option(help="Groups of nodes, a file as supernodes.json. Default: the folder's, and the whole circuit."),
    ] = None
    only: Annotated[list[str] | None, typer.Option("--group", help="Only the group of this name. Repeatable.")] = None
    everywhere: Annotated[
        bool, typer.Option("--everywhere", help="At every position of a prompt; else at the nodes' own.")
    ] = False

    def arguments(self) -> dict[str, Any]:
        """As `tracer.sweep` takes them."""
        from tracer.evaluation.sweep import FACTORS

        return {
            "factors": self.factors or FACTORS,
            "tokens": self.tokens or (),
            "only": self.only or None,
            "everywhere": self.everywhere,
        }


@dataclass(frozen=True)
class On:
    """The prompts."""

    PANEL: ClassVar[str] = "Prompt"

    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A text file, a prompt a line; or .jsonl, .csv, .parquet with text, target, foil. Default: the "
            "circuit's own prompt, or the first of the run."
        ),
    ] = None
    count: Annotated[int, typer.Option(help="No more prompts than this.", min=1, max=MOST)] = 20
    bos: Bos = False


@dataclass(frozen=True)
class Compared:
    """The random groups."""

    PANEL: ClassVar[str] = "Controls"

    random: Annotated[int, typer.Option(help="Draws of a random group of the same size.", min=0, max=MOST)] = 5
    seed: Annotated[int, typer.Option(help="Of the draws and the intervals.", min=0, max=MOST)] = 0


@terminal.report_errors
@flat
def sweep(
    folder: Folder,
    what: What,
    on: On,
    compared: Compared,
    out: Annotated[
        Path | None, typer.Option(help="Folder of steering.parquet, .csv, .json and .png, and steering_groups.parquet.")
    ] = None,
    style: Style = Format.auto,
    *,
    where: Steered,
) -> None:
    """Multiply each group of a circuit's neurons by each factor on many prompts, beside random groups of the same size.

    Example: tracer sweep runs/dataset --factor -1 --factor 0 --factor 2 --token " Texas"
    """
    import tracer
    from tracer.circuit.from_run import read_graph
    from tracer.evaluation.groups import groups_of
    from tracer.evaluation.sweep import check_factors
    from tracer.reports import sweeps

    how = what.arguments()
    check_factors(how["factors"])
    graph = read_graph(folder)
    named = _groups(folder, graph, what.groups)
    groups_of(named, how["only"])
    given = None if on.prompts is None else _read(on.prompts, on.bos)
    model, basis = _loaded(graph, where)
    prompts = _own(folder, graph, model, on, what.everywhere) if given is None else given[: on.count]
    with terminal.ProgressBar("steering") as bar:
        found = tracer.sweep(model, named, prompts, **how, **vars(compared), basis=basis, progress=bar)
    if out is not None:
        saved = _save(found, out, compared.seed, f"{graph.text}: change of probability, {len(prompts):,} prompts")
        output.also(style, f"saved {', '.join(map(str, saved))}")
    shown, kept = found.responses(compared.seed), found.group_responses(compared.seed)
    output.put(
        style,
        lambda: sweeps.table(shown, kept),
        lambda: Rows.of(sweeps.rows(shown)),
        lambda: sweeps.as_json(shown, kept),
    )


def _loaded(graph: Graph, where: Steered) -> tuple[Any, str | None]:
    """The model of a circuit, and the basis of its nodes; of an imported graph the model that is named."""
    from tracer.circuit.circuit import Traced

    terminal.quiet()
    if not isinstance(graph, Traced):
        return where.load(None), None
    model = where.load(graph.model)
    model.check_traced(graph.model, graph.text)
    return model, graph.settings.basis


def _groups(folder: str, graph: Graph, given: Path | None) -> dict[str, Any]:
    """The nodes of each group, by name: of a file, or the folder's; and the whole circuit."""
    from tracer.circuit import supernodes_file
    from tracer.evaluation import groups

    file = supernodes_file.of_run(folder) if given is None else supernodes_file.read(given)
    if file is None:
        return {group.name: group.places for group in groups.groups_of(graph)}
    supernodes_file.check_circuit(file, graph)
    return groups.nodes_of(file, graph.numbering) | ({groups.WHOLE: groups.whole_of(graph)} if graph.n_nodes else {})


def _read(path: Path, bos: bool) -> list[Prompt]:
    """The prompts of a file."""
    from tracer import data
    from tracer.data.source import Source
    from tracer.prompts import with_bos
    from tracer.runs.units.shards import as_prompt, input_row

    if not {".jsonl", ".ndjson", ".json", ".csv", ".parquet"} & set(path.suffixes):
        return lines(path, bos, "--prompts") or []
    rows = data.read(Source(path=(str(path),)))
    found = [with_bos(as_prompt(input_row(row), "auto", paired=False), bos) for row in rows]
    if not found:
        raise JobError(f"prompts {quoted(str(path), 300)}", "holds no prompt", "give one a row")
    return found


def _own(folder: str, graph: Graph, model: Any, on: On, everywhere: bool) -> list[Prompt]:
    """The circuit's own prompt, or the first of the run."""
    from tracer.circuit.circuit import Circuit
    from tracer.prompts import Prompt
    from tracer.runs.jobs import DatasetJob, SteeringRules, load_job
    from tracer.runs.units.steering import prompts_of_run
    from tracer.store.run_folder import RunFolder

    if isinstance(graph, Circuit):
        ids, targets, foils = graph.token_ids, graph.target_ids, graph.foil_ids
        return [Prompt(token_ids=ids, target=targets or None, foil=(foils or None) if targets else None)]
    if "circuit" not in graph.notes:
        return [Prompt(graph.text, bos=on.bos)]
    at = RunFolder(folder)
    job = load_job((at.record() or {})["job"])
    assert isinstance(job, DatasetJob)
    rules = SteeringRules(prompts=on.count, everywhere=everywhere)
    return [
        Prompt(token_ids=one.token_ids, target=one.target_ids or None, foil=one.foil_ids or None)
        for one in prompts_of_run(model, job, at, rules)[1]
    ]


def _save(found: Sweep, out: Path, seed: int, title: str) -> list[Path]:
    """Tables, rows and the heat map in a folder."""
    from tracer.reports import sweeps, tables
    from tracer.store.parquet import encoded

    shown, kept = found.responses(seed), found.group_responses(seed)
    contents = (
        *(encoded(found.tokens), encoded(found.groups)),
        *(sweeps.as_csv(shown), sweeps.as_json(shown, kept), sweeps.heat_map_png(shown, title)),
    )
    return [tables.write_page(content, out / name) for name, content in zip(FILES, contents, strict=True)]
