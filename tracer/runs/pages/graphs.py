"""The prompts that a dataset's circuit is most at home in, and the graph pages that a run keeps of them.

Knows which part of a circuit a prompt's own graph holds, and which pages are too large to keep. Refuses to know how a
page draws.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tracer.circuit.circuit import Graph
from tracer.circuit.from_run import circuit_of, graph_of, length_of
from tracer.errors import TracerError, first_line
from tracer.meaning.around import around
from tracer.reports.facts import facts
from tracer.reports.tables import graph_page
from tracer.store.run_folder import Commit, RunFolder

GRAPHS = 5
"""Prompts whose graphs a run draws."""
MOST_EDGES = 2**18
"""Edges of a page that is kept beside a report: some 7 MB of it."""
REPORT = "../report.html"
"""The report of the run, as its graph pages see it."""

Kept = dict[tuple[int, int, int], float]
"""Weights of a circuit's nodes by layer, position (-1: any) and neuron."""


class Strong(NamedTuple):
    """A prompt, and how much of the circuit's summed |mean attribution| lies in nodes that its own graph has."""

    prompt_id: int
    share: float
    text: str


class Drawn(NamedTuple):
    """A graph page in the folder, or why there is none."""

    name: str
    text: str
    problem: str | None = None


def strongest(folder: RunFolder, commits: Sequence[Commit], kept: Kept) -> list[Strong]:
    """The prompts that hold the largest share of a circuit, the earlier of equal ones first; memory is that of a unit.

    Only prompts as long as those that an aligned circuit is of have its positions.

    Args:
        kept: of an aligned circuit at positions; of a free one, or of a run's strongest neurons, at any.
    """
    total = sum(kept.values())
    if not total:
        return []
    any_position = all(position < 0 for _, position, _ in kept)
    length, found = None if any_position else length_of(folder, commits), list[tuple[float, int, int]]()
    for commit in commits:
        if "nodes" not in commit.files:
            continue
        prompts = folder.read_committed(commit, "prompts", ["prompt_id", "status", "token_ids"]).to_pylist()
        fits = {
            row["prompt_id"]
            for row in prompts
            if row["status"] == "ok" and (length is None or len(row["token_ids"] or ()) == length)
        }
        for prompt_id, held in _held(folder, commit, kept, any_position).items():
            if prompt_id in fits:
                found.append((-held / total, prompt_id, commit.shard))
        found = sorted(found)[:GRAPHS]
    return [Strong(prompt_id, -share, _text(folder, commits, shard, prompt_id)) for share, prompt_id, shard in found]


def _held(folder: RunFolder, commit: Commit, kept: Kept, any_position: bool) -> dict[int, float]:
    """The summed weights of a circuit's nodes that each prompt of a unit has, each counted once."""
    table = folder.read_committed(commit, "nodes", ["prompt_id", "kind", "layer", "position", "neuron"])
    table = table.filter(pc.field("kind") == "neuron")
    if not table.num_rows:
        return {}
    names = ("prompt_id", "layer", "position", "neuron")
    rows = np.stack([table[name].to_numpy().astype(np.int64) for name in names], axis=1)
    if any_position:
        rows[:, 2] = -1
    rows = np.unique(rows, axis=0)
    places = np.array(sorted(kept), np.int64)
    weights = np.array([kept[key] for key in sorted(kept)])
    base = np.concatenate([rows[:, 1:], places]).max(0) + 2  # positions may be -1
    codes, wanted = (((part[:, 0] * base[1]) + part[:, 1] + 1) * base[2] + part[:, 2] for part in (rows[:, 1:], places))
    order = np.argsort(wanted)
    at = np.minimum(np.searchsorted(wanted[order], codes), len(wanted) - 1)
    hit = wanted[order][at] == codes
    ids, inverse = np.unique(rows[hit, 0], return_inverse=True)
    sums = np.bincount(inverse, weights=weights[order][at[hit]], minlength=len(ids))
    return dict(zip(ids.tolist(), sums.tolist(), strict=True))


def _text(folder: RunFolder, commits: Sequence[Commit], shard: int, prompt_id: int) -> str:
    commit = next(one for one in commits if one.shard == shard)
    table = folder.read_committed(commit, "prompts", ["prompt_id", "text"])
    (text,) = table.filter(pc.field("prompt_id") == prompt_id)["text"].to_pylist()
    return text or ""


def draw(folder: RunFolder, prompts: Sequence[Strong], has_circuit: bool) -> Iterator[tuple[Drawn, str | None]]:
    """The graph pages of a run's circuit and of some of its prompts, and what each holds; None where there is none."""
    if has_circuit:
        yield _drawn(folder, None, "the circuit of the whole dataset")
    for one in prompts:
        yield _drawn(folder, one.prompt_id, f"{one.share:.1%} of the circuit; {one.text}")


def _drawn(folder: RunFolder, prompt_id: int | None, text: str) -> tuple[Drawn, str | None]:
    name = "graphs/circuit.html" if prompt_id is None else f"graphs/prompt-{prompt_id}.html"
    address = folder.place.address
    try:
        graph: Graph = circuit_of(address) if prompt_id is None else graph_of(address, prompt_id)
        notes = {key: value for key, value in graph.notes.items() if key != "run"}  # the page is in that folder
        known, whole = around(graph, address), dataclasses.replace(facts(graph), report=REPORT)
        return Drawn(name, text), graph_page(graph.model_copy(update={"notes": notes}), MOST_EDGES, known, whole)
    except TracerError as error:
        return Drawn(name, text, f"{error.value} {error.rule}"), None
    except (ValueError, KeyError, TypeError, pa.ArrowException) as error:  # rows that the page cannot draw
        return Drawn(name, text, first_line(error)), None
