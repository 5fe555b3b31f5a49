"""The verb compare: what differs between circuits of runs, models, checkpoints, adapters or prompts.

Knows which options name a side, and where what is found goes. Refuses to know how sides are compared (comparison) and
how that is shown (reports).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from tracer import choices
from tracer.cli import manner, output, terminal
from tracer.cli.loading import There
from tracer.cli.options import MOST, Bos, Format, Style, flat, lines
from tracer.errors import JobError, option, quoted

if TYPE_CHECKING:
    from tracer.comparison.compare import Comparison
    from tracer.comparison.sides import Side
    from tracer.prompts import Prompt


@dataclass(frozen=True)
class Asked:
    """What models are asked, where models are compared and not runs."""

    PANEL: ClassVar[str] = "Prompt"

    text: Annotated[
        list[str] | None,
        typer.Option(help="A prompt that models are asked; twice: two prompts, which are compared on one model."),
    ] = None
    target: Annotated[
        list[str] | None, typer.Option(help='Of --text: the token asked about, with its space: " are". Once, or each.')
    ] = None
    foil: Annotated[list[str] | None, typer.Option(help="Of --text: the wrong token. Once, or for each.")] = None
    prompts: Annotated[
        list[Path] | None,
        typer.Option(help="Prompts that models are asked: .txt, or .jsonl, .csv, .parquet. Twice: two sets of them."),
    ] = None
    bos: Bos = False

    def sets(self) -> list[list[Prompt]]:
        """The sets of prompts: none, one that all models are asked, or two.

        Raises:
            JobError: both kinds are given, or a file that cannot be read.
        """
        if self.text and self.prompts:
            raise JobError("--text and --prompts", "both say what models are asked", "give one of them")
        if not self.text:
            for name, value in (("--target", self.target), ("--foil", self.foil)):
                if value:
                    raise JobError(f"{name} {quoted(value[0])}", "only has an effect with --text", "leave it out")
        return self._texts() if self.text else [_read(path, self.bos) for path in self.prompts or ()]

    def _texts(self) -> list[list[Prompt]]:
        from tracer.prompts import Prompt

        texts, given = self.text or [], []
        for name, value in (("target", self.target), ("foil", self.foil)):
            if value and len(value) not in (1, len(texts)):
                rule = f"is given {len(value)} times, for {len(texts)} prompts"
                raise JobError(f"--{name}", rule, "give it once, or once for each --text")
            each = (value or [None]) * (len(texts) if not value or len(value) == 1 else 1)
            given.append(each)
        found = zip(texts, *given, strict=True)
        return [[Prompt(text, target=target, foil=foil, bos=self.bos)] for text, target, foil in found]


def _read(path: Path, bos: bool) -> list[Prompt]:
    """The prompts of a file: one a line of a text file, else rows as a job's input has them."""
    from tracer import data
    from tracer.data.source import Source
    from tracer.prompts import Prompt

    if path.suffix == ".txt":
        return lines(path, bos, "--prompts") or []
    found = []
    for row in data.read(Source(path=(str(path),)), heard=terminal.note):
        if row.error is not None:
            raise data.row_error(row)
        fields = ("text", "token_ids", "target", "foil", "counterfactual", "positions", "messages", "seed")
        found.append(
            Prompt(**{name: getattr(row, name) for name in fields}, id=row.user_id, bos=bos and not row.messages)
        )
    return found


@dataclass(frozen=True)
class Models:
    """Which models are asked, beside those that are named."""

    PANEL: ClassVar[str] = "Model"

    model: Annotated[
        str | None, typer.Option(help="The model of --revision, --adapter, and of two prompts. Default: demo.")
    ] = None
    revision: Annotated[
        list[str] | None, typer.Option(help="A revision of --model, such as step1000. Repeat it, in their order.")
    ] = None
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="An adapter (LoRA) on --model: compared with the model without. Repeatable."),
    ] = None
    dtype: Annotated[choices.Dtype | None, typer.Option(help="Default: float32. Of these: {}.")] = None
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1.")] = None

    def named(self, names: list[str], n_sets: int) -> list[dict[str, Any]]:
        """The arguments of `tracer.load` for each model, in their order.

        Raises:
            JobError: options that do not go together, or too few models.
        """
        if names and (self.model or self.revision or self.adapter):
            raise JobError(
                f"{quoted(names[0])} and --model, --revision or --adapter", "both name models", "give one kind"
            )
        if self.revision and self.adapter:
            raise JobError("--revision and --adapter", "each makes sides of its own", "give one of them")
        base = {"name": self.model or manner.now().fallback.get("model", "demo")}
        found: list[dict[str, Any]] = [{"name": name} for name in names]
        found += [base | {"revision": one} for one in self.revision or ()]
        found += [base, *(base | {"adapter": one} for one in self.adapter)] if self.adapter else []
        found = found or [base]
        if n_sets == 1 and len(found) < 2:
            step = "name another, or give --revision twice, --adapter, or a second --text or --prompts"
            raise JobError(
                f"one model {quoted(found[0]['name'])} and one set of prompts", "leave nothing to compare", step
            )
        if n_sets > 1 and len(found) > 1:
            rule = "sets of prompts are compared on one model"
            raise JobError(f"{n_sets} sets of prompts and {len(found)} models", rule, "give one set, or one model")
        return found


@dataclass(frozen=True)
class Traced:
    """How models are traced."""

    PANEL: ClassVar[str] = "Method"

    nodes: Annotated[int | None, typer.Option(help="Of each prompt, and of a side's circuit. Default: 200.", min=1)] = (
        None
    )
    threshold: Annotated[float | None, typer.Option(help="Keep nodes of this share of |metric|: 0.005.")] = None
    mass: Annotated[float | None, typer.Option(help="Keep the fewest with this share of |attribution|: 0.9.")] = None
    metric: Annotated[choices.MetricName, typer.Option(help="What is explained: {}.")] = "auto"
    method: Annotated[choices.Method, typer.Option(help="How nodes are attributed: {}.")] = "relp"

    def given(self) -> dict[str, Any]:
        """Those that are not at their default."""
        plain = {"metric": "auto", "method": "relp"}
        return {name: value for name, value in vars(self).items() if value not in (None, plain.get(name))}


@dataclass(frozen=True)
class Matched:
    """How sides are matched and tested."""

    PANEL: ClassVar[str] = "Method"

    name: Annotated[list[str] | None, typer.Option(help="What a side is called. Repeat it for each.")] = None
    positions: Annotated[
        bool, typer.Option("--positions", help="Match nodes at their positions: prompts of one length.")
    ] = False
    groups: Annotated[
        Path | None, typer.Option(help="Supernodes whose attribution is followed over the sides: supernodes.json.")
    ] = None
    permutations: Annotated[int, typer.Option(help="Of the tests.", min=99, max=MOST)] = 10_000
    seed: Annotated[int, typer.Option(help="Of the permutations and intervals.", min=0, max=MOST)] = 0


@dataclass(frozen=True)
class Saved:
    """How a comparison is shown, and where it goes besides."""

    PANEL: ClassVar[str] = "Output"

    rows: Annotated[int, typer.Option(help="Nodes shown; all are saved.", min=1)] = 20
    out: Annotated[
        Path | None,
        typer.Option(help="A folder: the tables (Parquet and CSV), the figure, report.html and graphs.html."),
    ] = None
    open_page: Annotated[bool, typer.Option("--open", help="Open the report of --out in the browser.")] = False
    style: Style = Format.auto

    def check(self) -> None:
        """Refuse what has no effect."""
        if self.open_page and self.out is None:
            raise JobError("--open", "has no effect without --out", "name a folder with --out")


@terminal.report_errors
@flat
def compare(
    sides: Annotated[
        list[str] | None,
        typer.Argument(help="Two or more: run folders; or models, where --text or --prompts say what they are asked."),
    ] = None,
    *,
    asked: Asked,
    models: Models,
    traced: Traced,
    matched: Matched,
    there: There,
    saved: Saved,
) -> None:
    """What differs between circuits: runs, models, checkpoints, adapters or prompts, node by node.

    Example: tracer compare runs/before runs/after        or
    tracer compare --model EleutherAI/pythia-160m --revision step1000 --revision step143000 --prompts prompts.jsonl
    """
    from tracer.comparison import compare as comparing
    from tracer.comparison.differences import Design

    saved.check()
    sets = asked.sets()
    design = Design(matched.permutations, matched.seed)
    terminal.quiet()
    if sets:
        made = list(
            _of_models(models, list(sides or ()), sets, traced.given() | {"positions": matched.positions}, there)
        )
    else:
        made = _of_runs(list(sides or ()), models, traced)
    if matched.name is not None:
        if len(matched.name) != len(made):
            raise JobError(f"--name, {len(matched.name)} times", f"there are {len(made)} sides", "name each, in order")
        made = [side.named(name) for side, name in zip(made, matched.name, strict=True)]
    found = comparing.compared(made, positions=matched.positions, groups=matched.groups, design=design)
    _show(found, saved)


def _of_runs(names: list[str], models: Models, traced: Traced) -> list[Side]:
    """The sides of runs."""
    from tracer.comparison import compare as comparing
    from tracer.comparison import sides

    for name, value in {**vars(models), **traced.given()}.items():
        if value:
            step = "give --text or --prompts too, which models are asked; runs are compared as they are"
            raise JobError(option(name), "only has an effect on models", step)
    folders = [one for name in names for one in comparing.parts_of(name) or [name]]
    if not folders:
        raise JobError(
            "compare", "is given no side", "name two run folders, or models and what they are asked (--prompts)"
        )
    return [sides.of_run(folder, name) for folder, name in zip(folders, comparing.apart(folders), strict=True)]


def _of_models(
    models: Models, names: list[str], sets: list[list[Prompt]], how: dict[str, Any], there: There
) -> Iterator[Side]:
    """The sides of models, loaded one after the other."""
    from tracer.comparison import compare as comparing
    from tracer.comparison import sides

    given = models.named(names, len(sets))
    options = {name: value for name, value in (("dtype", models.dtype), ("device", models.device)) if value is not None}
    parts = [(one["name"], one.get("revision"), one.get("adapter")) for one in given]
    titles = comparing.apart([comparing.model_name(*each) for each in parts])
    if len(sets) > 1:
        titles = [_set_name(one, number) for number, one in enumerate(sets, 1)]
    each = [(one, sets[0]) for one in given] if len(sets) == 1 else [(given[0], one) for one in sets]
    model: Any = None
    for at, ((load, prompts), title) in enumerate(zip(each, titles, strict=True)):
        if at == 0 or load is not each[at - 1][0]:
            model = None
            gc.collect()  # one model at a time
            model = there.load(
                load["name"], **{name: value for name, value in load.items() if name != "name"}, **options
            )
        with terminal.ProgressBar(title) as bar:
            edges = {"edges": None if len(prompts) == 1 else False}
            yield sides.of_model(model, prompts, title, progress=bar, **edges, **how)


def _set_name(prompts: list[Prompt], number: int) -> str:
    text = prompts[0].text
    return text if len(prompts) == 1 and text else f"prompts {number}"


def _show(found: Comparison, saved: Saved) -> None:
    from tracer.reports import comparison as reports

    written = [] if saved.out is None else reports.write(found, saved.out)
    output.put(
        saved.style,
        lambda: reports.table(found, saved.rows),
        lambda: reports.as_rows(found),
        lambda: reports.as_json(found),
    )
    for name in written:
        output.also(saved.style, f"wrote {name}")
    if saved.open_page and saved.out is not None:
        typer.launch((saved.out / reports.REPORT).resolve().as_uri())
