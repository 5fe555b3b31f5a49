"""The verb swap: its options, and what is checked before a model is loaded.

Knows which prompts and which arguments of `tracer.swap` the options are. Refuses to know what is done to neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from tracer import choices
from tracer.cli import output, terminal
from tracer.cli.loading import Adapter, Device, GgufFile, There, Where
from tracer.cli.options import MOST, Bos, Chat, Format, Style, flat, numbers
from tracer.errors import JobError, option
from tracer.text import Rows

if TYPE_CHECKING:
    from tracer.data.tasks import Pair
    from tracer.model.model import Model
    from tracer.prompts import Prompt


@dataclass(frozen=True)
class Two:
    """Two prompts, and what is answered to each."""

    PANEL: ClassVar[str] = "Prompt"

    text: Annotated[str | None, typer.Argument(help="The prompt; or give --task, or --pairs.")] = None
    other: Annotated[
        str | None, typer.Argument(help="The prompt whose neurons take their place, of equal length in tokens.")
    ] = None
    target: Annotated[
        str | None, typer.Option(help='The answer to the prompt: " Texas". Default: the model\'s own top token.')
    ] = None
    foil: Annotated[
        str | None, typer.Option(help='The answer to the other: " Florida". Default: the model\'s own top token.')
    ] = None

    @property
    def given(self) -> list[str]:
        """Those that are given."""
        return [name for name, value in vars(self).items() if value is not None]


@dataclass(frozen=True)
class Many:
    """Many pairs of prompts."""

    PANEL: ClassVar[str] = "Prompt"

    task: Annotated[choices.Paired | None, typer.Option(help="Built-in pairs: {}.")] = None
    structure: Annotated[
        choices.PairStructure | None,
        typer.Option(help="Of the task sva simple to within_rc, of opposites english to shots: {}."),
    ] = None
    split: Annotated[choices.TaskSplit | None, typer.Option(help="Of the task: {}. Default: test.")] = None
    count: Annotated[int | None, typer.Option(help="Pairs of the task. Default: 40.", min=1, max=MOST)] = None
    pairs: Annotated[
        Path | None,
        typer.Option(help="Pairs of one's own, JSON lines as Marks et al.: clean_prefix, patch_prefix, ..."),
    ] = None
    keep: Annotated[
        choices.Keep | None,
        typer.Option("--filter", help="Only pairs whose prompt the model answers so: {} (to the foil)."),
    ] = None

    @property
    def given(self) -> list[str]:
        """Those that are given."""
        return [name for name, value in vars(self).items() if value is not None]

    def of(self, model: Model, seed: int) -> Sequence[Pair]:
        """The pairs that the model can be asked; the others are counted."""
        from tracer.data import tasks

        if self.pairs is not None:
            reading = tasks.sva.read(self.pairs, model)
        else:
            assert self.task is not None
            reading = tasks.askable(self.task, model, **self.options(seed))
        if reading.skipped:
            terminal.line(reading.summary(), err=True)
        return reading.pairs

    def options(self, seed: int) -> dict[str, Any]:
        """Of the task."""
        kind = {} if self.structure is None else {"structure": self.structure}
        return {"split": self.split or "test", "count": self.count or 40, "seed": seed, **kind}


@dataclass(frozen=True)
class Measured:
    """Which nodes are taken, and the control."""

    PANEL: ClassVar[str] = "Method"

    ks: Annotated[str, typer.Option(help="Strongest nodes taken of each of the two prompts.")] = "5,10,20,50"
    method: Annotated[choices.Method, typer.Option(help="By which nodes are ranked: {}.")] = "relp"
    baseline: Annotated[
        choices.SwapBaseline,
        typer.Option(
            help="{}. zero: the strongest for each prompt's own answer. counterfactual: those whose difference between "
            "the prompts is strongest for the difference of the answers, in large models the better choice."
        ),
    ] = "zero"
    seed: Annotated[int, typer.Option(help="Of the pairs and the random control.", min=0, max=MOST)] = 0


@dataclass(frozen=True, kw_only=True)
class Swapped(Where):
    """The model."""

    PANEL: ClassVar[str] = "Model"

    model: Annotated[str | None, typer.Option(help="'demo' (the default), a folder, or a Hugging Face id.")] = None
    revision: Annotated[str | None, typer.Option(help="Revision of a Hugging Face id.")] = None
    adapter: Adapter = None
    gguf_file: GgufFile = None
    device: Device = None
    dtype: Annotated[choices.Dtype | None, typer.Option(help="Default: float32. Of these: {}.")] = None
    there: There


@terminal.report_errors
@flat
def swap(
    two: Two,
    many: Many,
    bos: Bos = False,
    *,
    chat: Chat,
    measured: Measured,
    where: Swapped,
    style: Style = Format.auto,
) -> None:
    """Put one prompt's strongest neurons in another's place, and see whether the answer follows; beside it as many
    random neurons, and the prompt's own set to zero.

    Example: tracer swap --task capitals --count 20
    """
    import tracer
    from tracer.reports import swaps

    ks = numbers(measured.ks, "--ks")
    _check(two, many)
    chat.check()
    own = _own(two, bos, chat) if many.task is None and many.pairs is None else None
    terminal.quiet()
    model = where.load(None)
    prompts = _asked(many, model, bos, chat, measured) if own is None else [_answered(own, two.foil, model)]
    found = tracer.swap(
        model, prompts, ks or (), method=measured.method, baseline=measured.baseline, seed=measured.seed
    )
    output.put(
        style,
        lambda: swaps.table(found, model),
        lambda: Rows.of(found.rows()),
        lambda: swaps.as_json(found, prompts, model),
    )


def _check(two: Two, many: Many) -> None:
    """Refuse options that contradict each other, or say too little."""
    sources = [name for name in ("task", "pairs") if name in many.given]
    if two.given and sources:
        raise JobError(f"{two.given[0]} and {option(sources[0])}", "are two sources of prompts", "give one of them")
    if len(sources) == 2:
        raise JobError("--task and --pairs", "are two sources of pairs", "give one of them")
    if not sources and (two.text is None or two.other is None):
        rule = "two prompts of equal length are needed, or many pairs"
        raise JobError(
            "nothing to swap" if two.text is None else "one prompt", rule, "give TEXT OTHER, or --task states"
        )
    if not sources and many.given:
        name = "filter" if many.given[0] == "keep" else many.given[0]
        raise JobError(option(name), "has no effect on two prompts", "leave it out, or give --task")
    if "pairs" in sources and (of_task := [name for name in ("structure", "split", "count") if name in many.given]):
        raise JobError(option(of_task[0]), "has no effect with --pairs", "leave it out")
    if "task" in sources:  # refused before a model is loaded
        from tracer.data import tasks

        tasks.load(str(many.task), **many.options(0))


def _own(two: Two, bos: bool, chat: Chat) -> Prompt:
    """The two prompts as one."""
    from tracer.prompts import Prompt

    return chat.asked(Prompt(two.text, counterfactual=two.other, target=two.target, bos=bos))


def _answered(prompt: Prompt, foil: str | None, model: Model) -> Prompt:
    """Two prompts as one, with what the model itself answers where nothing else is said."""
    from dataclasses import replace

    from tracer.evaluation.answers import greedy
    from tracer.prompts import Prompt, decode, encode

    one = encode(prompt, model)
    assert one.counterfactual_ids is not None
    said = greedy(model, [one, encode(Prompt(token_ids=one.counterfactual_ids), model)])
    target, other = prompt.target or said[0], foil or said[1]
    if target == other:
        rule = "is the model's answer to both prompts, so that nothing could change"
        raise JobError(f"token {decode(model, said[0])!r}", rule, "give prompts with different answers")
    return replace(prompt, target=target, foil=other)


def _asked(many: Many, model: Model, bos: bool, chat: Chat, measured: Measured) -> list[Prompt]:
    """The pairs as prompts, those that a filter keeps."""
    import tracer
    from tracer.prompts import with_bos

    prompts = [chat.asked(with_bos(pair.to_prompt(), bos)) for pair in many.of(model, measured.seed)]
    if many.keep is None:
        return prompts
    found = tracer.filter_prompts(model, prompts, many.keep)
    terminal.line(found.summary, err=True)
    if not found.kept:
        raise JobError(f"--filter {many.keep}", "keeps no prompt: the model answers all otherwise", "leave it out")
    return list(found.kept)
