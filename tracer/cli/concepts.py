"""The verbs concepts and contrast: which neurons tell prompts apart, by a run's labels or by two files of prompts.

Knows their options and where what they find goes. Refuses to know how neurons are scored (meaning) and shown (reports).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from tracer import choices
from tracer.cli import output, terminal
from tracer.cli.loading import There
from tracer.cli.options import MOST, Bos, Format, Style, flat, lines
from tracer.cli.runs import RunDir
from tracer.cli.tracing import Source
from tracer.errors import JobError, RunError

if TYPE_CHECKING:
    from tracer.meaning.concepts import Concepts
    from tracer.prompts import Prompt


@dataclass(frozen=True)
class Tested:
    """How neurons are chosen and tested."""

    PANEL: ClassVar[str] = "Method"

    candidates: Annotated[
        int, typer.Option(help="Neurons chosen on one half of the prompts for each value.", min=1, max=MOST)
    ] = 50
    permutations: Annotated[int, typer.Option(help="Of the labels of the other half.", min=99, max=MOST)] = 10_000
    seed: Annotated[int, typer.Option(help="Of the halves and the permutations.", min=0, max=MOST)] = 0


@dataclass(frozen=True)
class Saved:
    """How the scores are shown, and where they go besides."""

    PANEL: ClassVar[str] = "Output"

    rows: Annotated[int, typer.Option(help="Neurons shown of each value; all candidates are saved.", min=1)] = 10
    figure: Annotated[Path | None, typer.Option(help="A PNG file: areas by layer.")] = None
    style: Style = Format.auto


@dataclass(frozen=True)
class Sets:
    """The two sets of prompts."""

    PANEL: ClassVar[str] = "Prompt"

    positive: Annotated[Path, typer.Argument(help="Text file, a prompt a line.")]
    negative: Annotated[Path, typer.Argument(help="Text file, a prompt a line: what the first are told from.")]
    bos: Bos = False

    def read(self) -> tuple[list[Prompt], list[Prompt]]:
        """Their prompts."""
        return lines(self.positive, self.bos, "POSITIVE") or [], lines(self.negative, self.bos, "NEGATIVE") or []


@dataclass(frozen=True)
class Values:
    """Which values of neurons are compared."""

    PANEL: ClassVar[str] = "Method"

    position: Annotated[
        choices.ValueAt, typer.Option(help="Where values are taken: {} (the last two over all positions).")
    ] = "last"
    paired: Annotated[
        bool, typer.Option("--paired", help="Line i of one file belongs to line i of the other, as minimal pairs.")
    ] = False
    basis: Annotated[choices.Basis, typer.Option(help="Whose values: {}.")] = "activation"


@terminal.report_errors
@flat
def concepts(
    folder: RunDir,
    label: Annotated[list[str], typer.Option(help="A label of the run's prompts. Repeatable.")],
    value: Annotated[
        list[str] | None,
        typer.Option(
            help="A value of the label, against all others. Repeatable. Default: each that enough prompts have; of two "
            "the last."
        ),
    ] = None,
    group: Annotated[
        str | None, typer.Option(help="A label that names prompts which belong together, as of one sentence.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The table. Default: concepts.parquet in the run folder.")] = None,
    *,
    tested: Tested,
    saved: Saved,
) -> None:
    """Which neurons tell prompts with one value of a label from the others: areas under the ROC curve, on held-out
    prompts.

    Example: tracer concepts runs/agreement --label case --value plural
    """
    from tracer.meaning import concepts as meaning

    found = meaning.concepts(folder, label, value, group=group, **vars(tested))
    tokens = meaning.tokens_of(folder)
    if out is not None:
        written = [_written(found, out)]
    elif meaning.write(folder, found):
        written = ["concepts.parquet"]
    else:
        terminal.note(
            "the run has not ended, and its end would replace the table: it is not saved; name a file (--out)"
        )
        written = []
    _show(found, saved, written, tokens)


@terminal.report_errors
@flat
def contrast(
    sets: Sets,
    out: Annotated[Path | None, typer.Option(help="The table, as a Parquet file. Default: none.")] = None,
    *,
    taken: Values,
    source: Source,
    there: There,
    tested: Tested,
    saved: Saved,
) -> None:
    """Which neurons tell one set of prompts from another by their values alone: no target token is needed.

    Example: tracer contrast plural.txt singular.txt --model demo --paired
    """
    import tracer
    from tracer.meaning import contrast as meaning
    from tracer.meaning.separation import Design

    positive, negative = sets.read()
    design = Design(**vars(tested))
    meaning.checked(len(positive), len(negative), **vars(taken), design=design)
    terminal.quiet()
    model = source.load(there)
    how: dict[str, Any] = vars(taken) | vars(tested)
    with terminal.ProgressBar("prompts") as bar:
        found = tracer.contrast(model, positive, negative, **how, progress=bar)
    _show(found, saved, [] if out is None else [_written(found, out)], None)


def _written(found: Concepts, out: Path) -> str:
    """Write the table into a file; its name."""
    from tracer.reports.tables import write_page
    from tracer.store.parquet import encoded

    if out.is_dir():
        raise JobError(f"--out {out}", "is a folder", "name a file, such as concepts.parquet")
    return str(write_page(encoded(found.table), out))


def _show(found: Concepts, saved: Saved, written: list[str], tokens: Any) -> None:
    from tracer.reports import concepts as reports
    from tracer.reports import tables

    if saved.figure is not None:
        if not found.table.num_rows:
            raise RunError("a figure", "has nothing to show: no neuron differs between the prompts", "leave it out")
        written.append(str(tables.write_page(reports.png(found.table), saved.figure)))
    output.put(
        saved.style,
        lambda: reports.table(found, saved.rows, tokens),
        lambda: reports.as_rows(found),
        lambda: reports.as_json(found),
    )
    for name in written:
        output.also(saved.style, f"wrote {name}")
