"""The verb exemplars: where in a corpus chosen neurons are strong.

Knows how its options become a job. What it does is `tracer run` on that job.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from tracer.cli import manner, terminal
from tracer.cli.loading import Adapter, Device, GgufFile
from tracer.cli.options import MOST, Format, Style, flat
from tracer.cli.runs import Again, Change, Crew, Out, Part, Served, carry_out, changes
from tracer.errors import JobError, quoted
from tracer.experts import FORMS

if TYPE_CHECKING:
    from tracer.runs.jobs import AnyJob

JOBS = (".yaml", ".yml")
"""How the names of job files end."""

Input = Annotated[
    str,
    typer.Argument(
        help="Texts: .jsonl, .csv or .parquet with a column text, a folder or glob of them; or a job file (.yaml).",
        metavar="INPUT",
    ),
]


@dataclass(frozen=True)
class Loaded:
    """Which model; without one that of the run in --of, or the demo."""

    PANEL: ClassVar[str] = "Model"

    model: Annotated[str | None, typer.Option(help="A folder or a Hugging Face id. Default: the run's, or demo.")] = (
        None
    )
    revision: Annotated[str | None, typer.Option(help="Of the model.")] = None
    adapter: Adapter = None
    gguf_file: GgufFile = None
    device: Device = None
    bos: Annotated[
        bool | None, typer.Option("--bos/--no-bos", help="Begin texts with the beginning-of-sequence token.")
    ] = None

    def keys(self, of: str | None, usual: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """As keys of a job.

        Args:
            usual: the user's defaults, which a run's own model and numbers go before.
        """
        given = {name: value for name, value in vars(self).items() if value is not None}
        usual = dict(usual or {})
        if of is None or self.model is not None:
            return usual | given
        from tracer.meaning.strongest import strongest

        if (traced := strongest(of, 1).model) is None:
            return usual | given
        same = usual | {"model": traced.name, "dtype": traced.dtype} | traced.loading()
        return {name: value for name, value in same.items() if value is not None} | given


@dataclass(frozen=True)
class Asked:
    """Which neurons, and how many exemplars of each."""

    PANEL: ClassVar[str] = "Neurons"

    of: Annotated[str | None, typer.Option(help="A run folder: its strongest neurons, of a dataset or a prompt.")] = (
        None
    )
    top: Annotated[int | None, typer.Option(help="With --of: so many neurons. Default: 100.", min=1, max=4096)] = None
    neurons: Annotated[
        list[str] | None, typer.Option("--neurons", help=f"{FORMS}, instead of --of. Repeatable; or with commas.")
    ] = None
    column: Annotated[str | None, typer.Option(help="The column that holds the text. Default: text.")] = None
    exemplars: Annotated[
        int | None, typer.Option(help="Strongest documents of each neuron and sign. Default: 20.", min=1, max=1000)
    ] = None
    window: Annotated[
        int | None, typer.Option(help="Tokens read at a time. Default: 128, or the model's context.", min=2, max=MOST)
    ] = None

    def keys(self) -> dict[str, Any]:
        """As keys of a job."""
        plain = ("of", "top", "exemplars", "window")
        given = {name: value for name in plain if (value := getattr(self, name)) is not None}
        named = [one for text in self.neurons or () for one in _separate(text)]
        return given | ({"neurons": named} if named else {})


def _separate(text: str) -> list[str]:
    """The neurons of an option: separated by commas or, where they have no spaces in them, by spaces."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return [one for part in parts for one in ([part] if "N" in part.upper() else part.split())]


@dataclass(frozen=True)
class Doing:
    """How a run is done, as of `tracer run`."""

    crew: Crew
    part: Part
    served: Served
    again: Again

    def usual(self, given: str) -> dict[str, Any]:
        """The user's defaults: none for a job file, which says all of it; on a server no device and no numbers."""
        apart = ("device", "dtype") if self.served.remote else ()
        values = {} if given.endswith(JOBS) else manner.now().fallback
        return {name: value for name, value in values.items() if name not in apart}

    def changes(self, change: list[str] | None) -> list[str]:
        """Changes of a job's keys."""
        remote = "true" if self.served.remote else None
        return changes(change, **vars(self.part), in_flight=self.served.in_flight, remote=remote)


@terminal.report_errors
@flat
def exemplars(
    given: Input,
    out: Out,
    asked: Asked,
    loaded: Loaded,
    doing: Doing,
    change: Change = None,
    style: Style = Format.auto,
) -> None:
    """Where in a corpus neurons are strong: exemplars by sign, how often, a histogram. Stop it, repeat it: it resumes.

    Example: tracer exemplars texts.jsonl --of runs/dataset --out runs/exemplars
    """
    from tracer.runs import jobs

    terminal.quiet()
    doing.again.check(out)
    keys, more = asked.keys() | loaded.keys(asked.of, doing.usual(given)), doing.changes(change)
    if given.endswith(JOBS):
        chosen = _changed(given, asked, keys, more)
    elif {"of", "neurons"} & keys.keys():
        columns = {} if asked.column is None else {"columns": {"text": asked.column}}
        chosen = jobs.load_job({"kind": "exemplars", "input": {"path": given, **columns}, **keys}, more)
    else:
        step = "name them with --neurons LAYER:NEURON, or a run with --of"
        raise JobError("tracer exemplars", "neither --neurons nor --of says which neurons are meant", step)
    carry_out(chosen, out, doing.crew, doing.again, Path(given).name, style)


def _changed(path: str, asked: Asked, keys: dict[str, Any], more: list[str]) -> AnyJob:
    """A job file's job, with the options that were given."""
    from tracer.runs import jobs

    if asked.column is not None:
        raise JobError(f"--column {asked.column}", "has no effect on a job", "use --set input.columns.text=COLUMN")
    known = jobs.load_job(path, more)
    if known.kind != "exemplars":
        raise JobError(f"job {quoted(path)}", f"is of kind {known.kind}", "run it with 'tracer run'")
    content: dict[str, Any] = {"kind": known.kind, **known.model_dump(exclude_unset=True)}
    for name, others in (("of", ("neurons",)), ("neurons", ("of", "top"))):
        for other in others if name in keys else ():
            content.pop(other, None)
    return jobs.load_job(content | keys)


VERBS = (exemplars,)
