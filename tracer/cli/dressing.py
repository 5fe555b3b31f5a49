"""How a verb's options look, and what of their values the parser checks before anything is imported.

Knows typer's records of options: panels of --help, short names of types, choices and bounds with the value that was
meant, completion. Refuses to know any verb, and what values mean.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo, OptionInfo

from tracer.cli import manner
from tracer.errors import JobError, meant, quoted

MOST = 2**31 - 1
"""The largest whole number that an option takes: more of anything is a slip of the keyboard."""
_NAMES: dict[Any, str] = {int: "N", float: "X", Path: "PATH", str: "TEXT"}
"""What stands for a value in --help."""

_IN_PANEL: dict[str, str] = dict.fromkeys(("out", "overwrite", "style", "form", "open_page", "rows"), "Output")
"""Options that are in one panel of --help wherever they stand."""

OLD: dict[str, tuple[str, Any]] = {"--top": ("top_k", None), "--local-weights": ("weights", "local")}
"""Names that options had in the last release: the argument that each is now, and the value of what was a switch. They
are taken for one release more, where a verb has the argument and no other option of that name."""

Verbose = Annotated[
    int,
    typer.Option(
        "--verbose", "-v", count=True, metavar="", show_default=False, help="Say what is done; -vv: every step."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", metavar="", help="No notes and no progress; errors stay.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before work of more than an hour.")]


def dressed(verb: Callable[..., None], asks: bool = False) -> Callable[..., None]:
    """A verb as it is given to typer: its options with panels, names of values, choices, bounds and completion, and
    those that every verb has.

    Args:
        asks: whether it may take hours, so that it has ``--yes``.
    """
    hints = get_type_hints(verb, include_extras=True)
    given = [
        one.replace(annotation=_option(name, in_panel(hints[name], _IN_PANEL.get(name))))
        for name, one in signature(verb).parameters.items()
    ]
    more = {"verbose": (Verbose, 0), "quiet": (Quiet, False)} | ({"yes": (Yes, False)} if asks else {})

    @wraps(verb)
    def run(**values: Any) -> None:
        manner.speak(**{name: values.pop(name) for name in more})
        for parameter, flag in old:
            _renamed(flag, values.pop(parameter.name), values)
        if (problem := manner.now().problem) is not None:
            raise problem
        verb(**values)

    old = _old(given)
    own = [
        Parameter(name, Parameter.KEYWORD_ONLY, annotation=hint, default=default)
        for name, (hint, default) in more.items()
    ]
    every = [one.replace(kind=Parameter.KEYWORD_ONLY) for one in given] + own
    every += [parameter for parameter, _ in old]
    vars(run).update(__signature__=Signature(every))
    run.__annotations__ = {one.name: one.annotation for one in every}
    return run


def _old(given: Sequence[Parameter]) -> list[tuple[Parameter, str]]:
    """Hidden options for the old names of a verb's options."""
    there, found = {one.name: one for one in given}, []
    for flag, (name, value) in OLD.items():
        if name in there and flag[2:] not in there:
            kind: Any = get_args(there[name].annotation)[0] if value is None else bool
            hint = Annotated[kind, typer.Option(flag, hidden=True)]
            default = None if value is None else False
            found.append((Parameter(f"old_{name}", Parameter.KEYWORD_ONLY, annotation=hint, default=default), flag))
    return found


def _renamed(flag: str, value: Any, values: dict[str, Any]) -> None:
    """Take an option by its old name, and say the new one."""
    from tracer.cli import terminal

    name, constant = OLD[flag]
    if not value:
        return
    now = f"--{name.replace('_', '-')}" + (f" {constant}" if constant else "")
    terminal.note(f"{flag} is now {now}; the old name goes with the next release")
    values[name] = constant or value


def in_panel(hint: Any, panel: str | None) -> Any:
    """An option's annotation in a panel of --help, unless it has one."""
    if (
        panel is None
        or not (info := _info(hint))
        or not isinstance(info, OptionInfo)
        or info.rich_help_panel is not None
    ):
        return hint
    made = copy.copy(info)
    made.rich_help_panel = panel
    return Annotated[get_args(hint)[0], made]


def choices_of(hint: Any) -> tuple[Any, ...]:
    """The values that a type allows, where it names them; none where it does not."""
    kind, _ = _kind(hint)
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(kind) if isinstance(kind, type) and issubclass(kind, Enum) else ()


def _info(hint: Any) -> OptionInfo | ArgumentInfo | None:
    made = [one for one in getattr(hint, "__metadata__", ()) if isinstance(one, OptionInfo | ArgumentInfo)]
    return made[0] if made else None


def _kind(hint: Any) -> tuple[Any, bool]:
    """A type without None and list, and whether it was a list."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) in (Union, UnionType):
        (hint,) = (one for one in get_args(hint) if one is not type(None))
    if get_origin(hint) is list:
        return get_args(hint)[0], True
    return hint, False


def _option(name: str, hint: Any) -> Any:
    """An option's annotation as typer gets it: choices and bounds are checked by a callback of our own, which says what
    was meant; the long lists of types are left out of --help."""
    info = _info(hint)
    if info is None:
        return hint
    made, (kind, many), allowed = copy.copy(info), _kind(hint), choices_of(hint)
    if made.metavar is None and isinstance(made, OptionInfo):
        made.metavar = "" if kind is bool else "NAME" if allowed else _NAMES.get(kind)
        made.metavar = "" if made.count else made.metavar
        made.show_default = made.show_default and kind is not bool
    if allowed:
        made.callback = _among(flag_of(name, info), allowed, kind, made.callback)
        made.autocompletion = _completing([str(one) for one in allowed])
        made.help = _with_choices(made.help or "", [str(one) for one in allowed])
        return Annotated[_plain(hint, many), made]
    if made.min is not None or made.max is not None:
        made.callback = _within(flag_of(name, info), made.min, made.max)
        made.min = made.max = None
    return Annotated[get_args(hint)[0], made]


def _plain(hint: Any, many: bool) -> Any:
    """Choices as typer takes them: text."""
    optional = type(None) in get_args(get_args(hint)[0])
    plain: Any = list[str] if many else str
    return plain | None if optional else plain


def _with_choices(text: str, allowed: Sequence[str]) -> str:
    """Help that names the choices: in the place of {}, or before it."""
    listed = ", ".join(allowed)
    return text.replace("{}", listed) if "{}" in text else f"{listed}. {text}".rstrip()


def _completing(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [one for one in allowed if one.startswith(incomplete)]

    return complete


def _among(
    flag: str, allowed: tuple[Any, ...], kind: Any, then: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """A callback that refuses what is not among the choices, in front of an option's own."""
    names = [str(one) for one in allowed]

    def check(value: Any) -> Any:
        if value is None:
            return None
        for one in value if isinstance(value, list | tuple) else [value]:
            if str(one) not in names:
                raise JobError(
                    f"{flag} {shown(str(one))}",
                    f"must be one of {', '.join(names)}",
                    meant(str(one), names) or "choose one",
                )
        made = kind(value) if isinstance(kind, type) and issubclass(kind, Enum) else value
        return made if then is None else then(made)

    return check


def flag_of(name: str, info: OptionInfo | ArgumentInfo) -> str:
    """An option as it is typed, or an argument as --help has it.

    Args:
        name: of its argument in Python.
    """
    if isinstance(info, ArgumentInfo):
        return (info.metavar or name).strip("[]").upper()
    every = (info.default, *(info.param_decls or ()))  # within Annotated the first name is the default
    given = [one.partition("/")[0] for one in every if isinstance(one, str) and one.startswith("--")]
    return given[0] if given else "--" + name.replace("_", "-")


def _within(flag: str, least: int | float | None, most: int | float | None) -> Callable[..., Any]:
    """A callback that refuses a number out of bounds."""

    def check(value: Any) -> Any:
        for one in value if isinstance(value, list | tuple) else [value]:
            if one is None or ((least is None or one >= least) and (most is None or one <= most)):
                continue
            rule = f"must be at least {least:,}" if least is not None and one < least else f"must be at most {most:,}"
            raise JobError(f"{flag} {one}", rule, "change it, or leave it out")
        return value

    return check


def shown(value: str) -> str:
    """A value as one types it: in quotes only where that is needed."""
    return value if value.replace("-", "").replace("_", "").isalnum() else quoted(value)


def folders(incomplete: str) -> Iterable[str]:
    """Completions of a run folder: run folders, and folders on the way to one."""
    start = Path(incomplete) if incomplete.endswith("/") else Path(incomplete).parent
    try:
        there = sorted(one for one in start.iterdir() if one.is_dir() and not one.name.startswith("."))
    except OSError:
        return []
    named = [(one, str(one)) for one in there]
    return [name if (one / "run.json").is_file() else f"{name}/" for one, name in named if name.startswith(incomplete)]


def job_files(incomplete: str) -> Iterable[str]:
    """Completions of a job file."""
    start = Path(incomplete) if incomplete.endswith("/") else Path(incomplete).parent
    try:
        there = sorted(start.iterdir())
    except OSError:
        return []
    names = [
        f"{one}/" if one.is_dir() else str(one) for one in there if one.is_dir() or one.suffix in (".yaml", ".yml")
    ]
    return [name for name in names if name.startswith(incomplete) and not Path(name).name.startswith(".")]
