"""Options in groups: a group is a record, declared once, and a verb takes records instead of every option by itself.

Knows how a verb's records become the flat signature that typer reads, the options that several verbs share, and how
what they hold is read. Refuses to know any verb.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from enum import StrEnum
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_type_hints

import typer

from tracer.cli.dressing import MOST, folders, in_panel
from tracer.errors import JobError, first_line, quoted

if TYPE_CHECKING:
    from tracer.prompts import Prompt


def flat(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb that takes records of options, as typer wants it: with one keyword for each option.

    A record is a dataclass whose fields are options, ``Annotated[T, typer.Option(...)]``, or records again. Options
    stand in --help where they stand here, those of a record together, under the heading that its ``PANEL`` says.

    Raises:
        ValueError: two options have one name.
    """

    @wraps(verb)
    def run(**given: Any) -> None:
        _called(verb, given)

    parameters = list(_parameters(verb, None))
    vars(run).update(__signature__=Signature(parameters))
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run


def _parameters(made: Callable[..., Any], panel: str | None) -> Iterator[Parameter]:
    """The options of a verb or of a record, those of a record in its panel of --help, or in that around it."""
    panel = getattr(made, "PANEL", panel)
    hints = get_type_hints(made, include_extras=True)
    for name, parameter in signature(made).parameters.items():
        if is_dataclass(hints[name]):
            yield from _parameters(hints[name], panel)
        else:
            yield parameter.replace(annotation=in_panel(hints[name], panel), kind=Parameter.KEYWORD_ONLY)


def _called(made: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    """A verb's outcome, or a record, of the options that are `given` by name."""
    hints = get_type_hints(made)
    names = signature(made).parameters
    return made(**{name: _called(hints[name], given) if is_dataclass(hints[name]) else given[name] for name in names})


class Format(StrEnum):
    """How a result is printed. `auto` is a table on a terminal, else tsv; no verb sees it."""

    auto = "auto"
    table = "table"
    tsv = "tsv"
    csv = "csv"
    json = "json"


def _of_output(style: Format) -> Format:
    """What `auto` is for standard output as it is now."""
    if style is not Format.auto:
        return style
    return Format.table if sys.stdout is not None and sys.stdout.isatty() else Format.tsv


Style = Annotated[
    Format,
    typer.Option(
        "--format",
        callback=_of_output,
        help="{}: tables for people; tsv, csv or json for programs. auto: a table on a terminal, else tsv.",
        rich_help_panel="Output",
    ),
]
OfRun = Annotated[
    int | None,
    typer.Option("--prompt", help="Of a run over many: a prompt's number (prompt_id). Default: the dataset's circuit."),
]
Bos = Annotated[
    bool,
    typer.Option(
        "--bos/--no-bos", help="Begin the text with the beginning-of-sequence token where the tokenizer does not."
    ),
]
Folder = Annotated[
    str,
    typer.Argument(help="A run folder: of one prompt, or a dataset's with its circuit.", autocompletion=folders),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace another run in that folder.", rich_help_panel="Output")
]


@dataclass(frozen=True)
class Shown:
    """How a circuit is printed."""

    PANEL: ClassVar[str] = "Output"

    rows: Annotated[
        int | None,
        typer.Option(
            help="Rows of each table that is shown. Default: 20, and 5 paths; of tsv and csv all. All are kept and "
            "saved, and json has all.",
            min=1,
            max=MOST,
        ),
    ] = None
    style: Style = Format.auto

    @property
    def tall(self) -> int:
        """Rows of a table for people."""
        return self.rows or 20


def numbers(value: str | None, option: str) -> list[int] | None:
    """Whole numbers that are separated by commas or spaces.

    Raises:
        JobError: something else is among them.
    """
    if value is None:
        return None
    parts = value.replace(",", " ").split()
    if not all(re.fullmatch(r"[-+]?[0-9]{1,18}", part) for part in parts):
        raise JobError(
            f"{option} {quoted(value)}", "must be whole numbers", "separate them by commas, as in '1,351,95'"
        )
    return [int(part) for part in parts]


@dataclass(frozen=True)
class Chat:
    """Whether a text is what a user says to a model that is tuned for chats, and what stands around it."""

    PANEL: ClassVar[str] = "Prompt"

    chat: Annotated[
        bool, typer.Option("--chat", help="The text is a user's message: asked by the model's own chat template.")
    ] = False
    system: Annotated[str | None, typer.Option(help="With --chat: the system's message before it.")] = None
    seed_answer: Annotated[
        str | None, typer.Option(help="With --chat: how the answer begins: 'Answer:'. Read at its last token.")
    ] = None

    def check(self) -> None:
        """Refuse what has no effect.

        Raises:
            JobError: the surroundings of a chat without one.
        """
        for name, value in (("--system", self.system), ("--seed-answer", self.seed_answer)):
            if value is not None and not self.chat:
                raise JobError(f"{name} {quoted(value)}", "has no effect without --chat", "give --chat too")

    def asked(self, prompt: Prompt) -> Prompt:
        """A prompt as it is asked.

        Raises:
            JobError: a chat of token ids, or of a text that begins with what only a text begins with.
        """
        self.check()
        if not self.chat:
            return prompt
        if prompt.text is None:
            raise JobError("--chat", "has no effect on token ids, which are used as they are", "leave it out")
        return prompt.as_chat(self.system, self.seed_answer)


NO_CHAT = Chat()


def lines(path: Path | None, bos: bool, option: str = "--reference", chat: Chat = NO_CHAT) -> list[Prompt] | None:
    """The prompts of a text file, one a line.

    Args:
        chat: how each is asked.

    Raises:
        JobError: the file cannot be read, or holds none.
    """
    from tracer.prompts import Prompt
    from tracer.system import wholefile

    if path is None:
        return None
    try:
        found = [line for line in wholefile.read(path).decode("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(
            f"{option} {str(path)!r}", f"cannot be read ({first_line(error)})", "give a text file, a prompt a line"
        ) from None
    if not found:
        raise JobError(f"prompts {str(path)!r}", "holds no prompt", "give a text file, a prompt a line")
    return [chat.asked(Prompt(line, bos=bos)) for line in found]
