"""The report of a dataset's run on what its neurons do: supernodes, concepts, steering, descriptions.

Knows in which order these come, and which of them a job asks for. Refuses to know how each is shown (reports), and how
it came about (meaning, runs/units).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from tracer.circuit import supernodes_file
from tracer.circuit.circuit import Graph
from tracer.circuit.from_run import circuit_of
from tracer.circuit.supernodes_file import Supernodes
from tracer.errors import RunError
from tracer.evaluation.sweep import Sweep
from tracer.meaning import describe
from tracer.meaning.collapse import Collapsed, collapse
from tracer.reports import concepts, page, supernodes, sweeps
from tracer.reports.page import Block, Section
from tracer.reports.sheet import Sheet
from tracer.runs.jobs import DatasetJob
from tracer.runs.units.steering import sweep_of
from tracer.store.run_folder import RunFolder
from tracer.text import printable

ROWS = 30
"""Rows of a table of edges or descriptions."""


@dataclass(frozen=True)
class Meaning:
    """What a run's folder holds of what its neurons do.

    Attributes:
        groups: supernodes.json. graph: the circuit with these groups. problem: why they cannot be shown.
        tokens: tokens.parquet. concepts: concepts.parquet. steering: its tables.
        descriptions: rows as `describe.rows` gives them.
    """

    groups: Supernodes | None = None
    graph: Graph | None = None
    problem: str | None = None
    tokens: pa.Table | None = None
    concepts: pa.Table | None = None
    steering: Sweep | None = None
    descriptions: tuple[dict[str, object], ...] = ()


def meaning_of(folder: RunFolder) -> Meaning:
    """What is there."""
    address, groups, graph, problem = folder.place.address, None, None, None
    try:
        groups = supernodes_file.of_run(address)
        if groups is not None and groups.groups:
            graph = supernodes_file.apply(groups, circuit_of(address))
    except RunError as error:  # the file is there to be edited
        problem = f"{error.value} {error.rule}"
    tokens, scores = (folder.find_output(f"{name}.parquet") for name in ("tokens", "concepts"))
    return Meaning(groups, graph, problem, tokens, scores, sweep_of(folder), tuple(describe.rows(address)))


def lacking(found: Meaning, job: DatasetJob) -> Iterator[str]:
    """What the job asks for and is not there, a sentence each."""
    asked = {
        "tokens": (job.tokens, found.tokens),
        "supernodes": (job.supernodes, found.groups or found.problem),
        "concepts": (job.concepts, found.concepts),
        "steering": (job.steering, found.steering),
    }
    for name, (wanted, there) in asked.items():
        if wanted is not None and there is None:
            yield f"What the job asks for by {name}: it is made when all prompts are done."


def sections(found: Meaning, job: DatasetJob) -> Iterator[Section]:
    """A section for each thing that is there."""
    if found.groups is not None or found.problem is not None:
        yield Section("supernodes", "Supernodes", tuple(_supernodes(found)))
    if found.steering is not None:
        seed = 0 if job.steering is None else job.steering.seed
        shown = found.steering.responses(seed), found.steering.group_responses(seed)
        yield Section("steering", "Steering", tuple(sweeps.blocks(*shown)))
    if found.concepts is not None:
        yield Section("concepts", "Concepts", tuple(concepts.blocks(found.concepts, found.tokens)))
    if found.descriptions:
        yield Section("descriptions", "Descriptions", tuple(_descriptions(found)))


def _supernodes(found: Meaning) -> Iterator[Block]:
    if found.groups is None or found.problem is not None:
        yield page.missing("The groups cannot be shown.", printable(f"{found.problem}.", 400))
        return
    if found.graph is None:
        yield page.note(f"No supernodes: {printable(str(found.groups.how.get('problem', 'the file has no groups')))}.")
        return
    yield page.text(
        "Neurons that answer to the same tokens and push the same answers, found by their attribution profiles. What a "
        "group promotes is read from the weights of its members; what it does is shown by steering and by nothing else."
    )
    yield from supernodes.blocks(found.groups, found.graph, found.tokens)
    if found.graph.links is not None and found.graph.links.num_rows:
        yield page.table(_edges(collapse(found.graph)))
        yield page.note("Sums over the edges between members; they add up to those of the circuit.")


def _edges(found: Collapsed) -> Sheet:
    names = found.nodes["name"].to_pylist()
    kinds = found.nodes["kind"].to_pylist()

    def name(node: int) -> str:
        shown = printable(names[node], 80)
        return shown if kinds[node] in ("supernode", "ungrouped") else f"{kinds[node]} {shown}"

    def ends(row: dict[str, int]) -> tuple[str, str]:
        return name(row["source"]), name(row["target"])

    rows = [row for row in found.edges.to_pylist() if row["source"] != row["target"]]
    rows.sort(key=lambda row: -abs(row["attribution"]))  # of equal ones the heavier comes first, as in the table
    cells = [
        (
            name(row["source"]),
            name(row["target"]),
            f"{row['weight']:+.4f}",
            f"{row['attribution']:+.4f}",
            str(row["n_edges"]),
        )
        for row in rows[:ROWS]
    ]
    title = f"The {len(cells):,} strongest of {len(rows):,} edges between supernodes"
    return Sheet.of("supernode-edges", title, ["<from", "<to", "weight", "attribution", "edges"], cells)


def _descriptions(found: Meaning) -> Iterator[Block]:
    rows = found.descriptions[:ROWS]
    cells = [
        (
            str(row["neuron"]),
            printable(str(row["description"]), 400),
            "-" if row["score"] is None else f"{row['score']:.2f}",
            str(row["measured"]) or "-",
            printable(str(row["source"]), 80),
        )
        for row in rows
    ]
    heads = ["<neuron", "<description", "score", "<measured on", "<source"]
    yield page.table(Sheet.of("descriptions", f"{len(rows):,} of {len(found.descriptions):,}", heads, cells))
    yield page.note("The score is the correlation of simulated with true activations on texts that were held out.")
