"""Supernodes as a person or a script reads them: a table with what it rests on, JSON, CSV.

Knows layout and wording. Computes no number.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from tracer.choices import Clustering
from tracer.circuit.circuit import Graph
from tracer.circuit.supernodes_file import Supernodes, encoded
from tracer.meaning.grouping import Row, rows
from tracer.reports import page
from tracer.reports.folded import Folded, folded
from tracer.reports.parts import PAGE, Column, Sheet
from tracer.reports.sheet import bars, number
from tracer.text import Rows

if TYPE_CHECKING:
    import pyarrow as pa

_METHODS = {"spectral": "spectral clustering", "agglomerative": "agglomerative clustering, average linkage"}


def sheet(found: Sequence[Row]) -> Sheet:
    """The groups as a table."""
    described = any(row.description for row in found)
    columns = ["<supernode", "neurons", "attribution", Column("", left=True, only=PAGE), "share", "<promotes"]
    columns += [Column("description", left=True, only=PAGE)] if described else []
    columns += ["silhouette", "stability"]
    cells = [
        (
            *(row.name, f"{row.members:,}", f"{row.attribution:+.3f}", bar, f"{row.share:.1%}"),
            ", ".join(row.promotes) or "-",
            *((row.description,) if described else ()),
            *(number(row.silhouette, ".2f"), number(row.stability, ".2f")),
        )
        for row, bar in zip(found, bars([row.attribution for row in found]), strict=True)
    ]
    return Sheet.of("supernodes", "Supernodes", columns, cells)


def said(file: Supernodes) -> list[str]:
    """What the groups rest on, a sentence each; nothing of groups that someone chose by hand."""
    return list(_said(file.how))


def table(file: Supernodes, graph: Graph, tokens: pa.Table | None = None) -> Folded:
    """The groups for a terminal.

    Args:
        graph: the circuit with these groups. tokens: in `schemas.TOKENS`.
    """
    about = said(file)
    return folded([sheet(rows(file, graph, tokens)), *(["\n".join(about)] if about else [])])


def blocks(file: Supernodes, graph: Graph, tokens: pa.Table | None = None) -> list[page.Block]:
    """The groups for a section of a page; arguments as of `table`."""
    if not file.groups:
        return [page.note(f"No supernodes: {file.how.get('problem', 'the file has no groups')}.")]
    made = [page.table(sheet(rows(file, graph, tokens))), page.points(said(file))]
    return made if said(file) else made[:1]


def as_json(file: Supernodes, graph: Graph, tokens: pa.Table | None = None) -> str:
    """The file, with the rows of the table in it."""
    content = json.loads(encoded(file))
    return json.dumps(content | {"rows": [row._asdict() for row in rows(file, graph, tokens)]}, indent=1)


def as_rows(file: Supernodes, graph: Graph, tokens: pa.Table | None = None) -> Rows:
    """The rows of the table."""
    found = [row._asdict() | {"promotes": ", ".join(row.promotes)} for row in rows(file, graph, tokens)]
    return Rows(list(Row._fields), found)


class _Spread(BaseModel):
    mean: float
    low: float
    high: float


class _Rests(BaseModel):
    """What `tracer.supernodes` keeps of how groups were found; a file that was edited may say something else."""

    method: Clustering
    chosen_by: str
    clusters: int
    scores: dict[Annotated[str, Field(pattern="^[0-9]+$")], float | None]
    silhouette: float | None
    stability: _Spread | None
    bootstraps: int
    n_prompts: int
    n_neurons: int
    never_together: int
    ungrouped: list[Any]


def _said(how: Mapping[str, Any]) -> Iterator[str]:
    try:
        rests = _Rests.model_validate(how)
    except ValidationError:
        return
    scores = {count: score for count, score in rests.scores.items() if score is not None}
    chosen = "asked for"
    if rests.chosen_by == "silhouette" and scores:
        counts = sorted(map(int, scores))
        chosen = f"chosen of {counts[0]} to {counts[-1]} by the mean silhouette"
    grouped, prompts = rests.n_neurons - len(rests.ungrouped), "prompt" if rests.n_prompts == 1 else "prompts"
    yield (
        f"{rests.clusters} groups of {grouped:,} neurons by {_METHODS[rests.method]} of their attribution profiles "
        f"over {rests.n_prompts:,} {prompts}, {chosen}; mean silhouette {number(rests.silhouette, '.2f')}."
    )
    if len(scores) > 1:
        shown = sorted((int(count), score) for count, score in scores.items())
        yield "Silhouettes: " + ", ".join(f"{count}: {score:.2f}" for count, score in shown) + "."
    if (stable := rests.stability) is not None:
        yield (
            f"Stability over {rests.bootstraps} bootstraps of the prompts: adjusted Rand {stable.mean:.2f} "
            f"[{stable.low:.2f}, {stable.high:.2f}]; of a group the mean Jaccard index with its best match."
        )
    elif rests.n_prompts == 1:
        yield "Stability over prompts is not known: there is one."
    if rests.ungrouped:
        yield f"Neurons in no group, as they are like no other: {len(rests.ungrouped):,}."
    if rests.never_together:
        yield f"Pairs of neurons that never occur in one prompt, counted as not alike: {rests.never_together:,}."
