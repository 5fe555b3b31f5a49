"""The verb group: its options, and where its file goes.

Knows which arguments of `tracer.supernodes` the options are. Refuses to know how neurons are grouped
(meaning/supernodes.py), and how groups look (reports/supernodes.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from tracer import choices
from tracer.cli import output, terminal
from tracer.cli.options import MOST, Folder, Format, OfRun, Style, flat


@dataclass(frozen=True)
class HowMany:
    """The number of groups."""

    PANEL: ClassVar[str] = "Method"

    clusters: Annotated[int | None, typer.Option(help="Groups. Default: by the mean silhouette.", min=1, max=MOST)] = (
        None
    )
    range: Annotated[str, typer.Option(help="Numbers of groups that are tried.", metavar="MIN:MAX")] = "2:20"


@dataclass(frozen=True)
class Alike:
    """How neurons are compared."""

    PANEL: ClassVar[str] = "Method"

    method: Annotated[choices.Clustering, typer.Option(help="How neurons are put together: {} (average linkage).")] = (
        "spectral"
    )
    free: Annotated[
        bool | None,
        typer.Option("--free/--aligned", help="A neuron counts wherever it is, or at its position. As the circuit is."),
    ] = None
    bootstraps: Annotated[
        int, typer.Option(help="Of the prompts, for the groups' stability; 0 for none.", min=0, max=1000)
    ] = 20
    seed: Annotated[int, typer.Option(help="Of k-means and the bootstraps.", min=0, max=MOST)] = 0


@terminal.report_errors
@flat
def group(
    folder: Folder,
    how_many: HowMany,
    alike: Alike,
    out: Annotated[
        Path | None, typer.Option(help="The groups file. Default: supernodes.json in the run folder.")
    ] = None,
    prompt: OfRun = None,
    *,
    style: Style = Format.auto,
) -> None:
    """Group a circuit's neurons into supernodes by what drives them and what they do, and name the groups.

    Needs a run with attribution profiles. The file can be edited; view, steer, evaluate and export read it.
    Example: tracer group runs/capitals --range 2:12
    """
    import tracer
    from tracer.circuit import notes, supernodes_file
    from tracer.errors import JobError
    from tracer.meaning.supernodes import table_of
    from tracer.reports import supernodes

    if prompt is not None and out is None:
        rule = "has groups of its own, and the folder's are the dataset's"
        raise JobError(f"--prompt {prompt}", rule, "name a file for them with --out")
    found = tracer.supernodes(folder, **vars(how_many), **vars(alike), prompt=prompt)
    where: Any = out
    if out is None:
        supernodes_file.write_to_run(folder, notes.with_marks(folder, found.file))
        where = f"{folder.rstrip('/')}/{supernodes_file.SUPERNODES}"
    else:
        supernodes_file.write(out, found.file)
    shown = found.file, found.graph, table_of(folder, "tokens")
    output.put(
        style,
        lambda: supernodes.table(*shown),
        lambda: supernodes.as_rows(*shown),
        lambda: supernodes.as_json(*shown),
    )
    output.also(style, f"saved {where}; edit names there, and see it with 'tracer view'")
