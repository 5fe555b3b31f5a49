"""The reference of the command line: a page for each verb, read off the typer app itself.

Knows what click and typer know of a command: usage, help, options with their panels, types and defaults. Duck-typed,
since typer may bring a click of its own. Refuses to know any verb.
"""

from __future__ import annotations

import re
import types
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import typer.main

from tracer.cli.app import app

OPTIONS = "Options"


def verbs() -> dict[str, Any]:
    """Every verb's command, in the order of ``tracer --help``."""
    group: Any = typer.main.get_command(app)
    return {name: command for name, command in group.commands.items() if not command.hidden}


def path(verb: str) -> str:
    """Where a verb's page lies."""
    return f"reference/cli/{verb}.md"


def escaped(text: str) -> str:
    """Help as Markdown in a cell of a table: no markup of rich's, no cell ends, no tags."""
    text = re.sub(r"\[/?[a-z ]*\]", "", text) if "[/" in text else text
    text = " ".join(text.split())
    text = text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
    return re.sub(r"(?<![\w`-])(--[a-z][a-z-]*)", r"`\1`", text)


def names(option: Any) -> list[str]:
    """How an option, or an argument, is written."""
    if option.param_type_name == "argument":
        return [str(option.metavar or option.name).strip("[]{}").upper()]
    return [*option.opts, *option.secondary_opts]


def _kinds(command: Any) -> dict[str, Any]:
    """The type of each option, as the verb's signature has it: without Annotated, and without None."""
    found = {}
    for name, hint in get_type_hints(command.callback).items():
        parts = [one for one in get_args(hint) if one is not type(None)]
        found[name] = parts[0] if get_origin(hint) in (Union, types.UnionType) and len(parts) == 1 else hint
    return found


def _kind(option: Any, hint: Any) -> str:
    if getattr(option, "is_flag", False):
        return ""
    if option.metavar:
        return f"`{escaped(str(option.metavar)).strip('[]{}')}`"
    return _said(hint)


def _said(hint: Any) -> str:
    """A type in a word; of closed choices all of them."""
    if get_origin(hint) in (list, tuple):
        return f"{_said(get_args(hint)[0])}, repeatable"
    if get_origin(hint) is Literal:
        return ", ".join(f"`{one}`" for one in get_args(hint))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return ", ".join(f"`{one.value}`" for one in hint)
    return {int: "whole number", float: "number", Path: "path"}.get(hint, "text")


def _default(option: Any) -> str:
    given = option.default
    if callable(given) or given is None or given in ((), [], False) or getattr(option, "required", False):
        return ""
    if getattr(option, "is_flag", False):
        return f"`{option.opts[0]}`"
    return f"`{getattr(given, 'value', given)}`"


def rows(command: Any) -> dict[str, list[Any]]:
    """A command's options by their panel, arguments and ``--help`` left out."""
    found: dict[str, list[Any]] = {}
    for option in command.params:
        if option.param_type_name == "option" and option.name != "help" and not getattr(option, "hidden", False):
            found.setdefault(getattr(option, "rich_help_panel", None) or OPTIONS, []).append(option)
    return found


def page(verb: str, command: Any) -> str:
    """A verb's page."""
    arguments = [
        one for one in command.params if one.param_type_name == "argument" and not getattr(one, "hidden", False)
    ]
    shown = " ".join(_argument(one) for one in arguments)
    lines = [
        f"# tracer {verb}",
        "",
        *_help(command.help or ""),
        "",
        "```text",
        f"tracer {verb} {shown} [OPTIONS]",
        "```",
        "",
    ]
    if arguments:
        lines += ["| argument | what it is |", "| --- | --- |"]
        lines += [f"| `{names(one)[0]}` | {escaped(one.help or '')} |" for one in arguments] + [""]
    kinds = _kinds(command)
    for panel, options in rows(command).items():
        lines += [
            f"## {panel}",
            "",
            '<div class="options" markdown>',
            "",
            "| option | value | default | what it does |",
            "| --- | --- | --- | --- |",
        ]
        for one in options:
            written = " ".join(f"`{name}`" for name in names(one))
            needed = " **Required.**" if getattr(one, "required", False) else ""
            lines.append(
                f"| {written} | {_kind(one, kinds.get(one.name))} | {_default(one)} "
                f"| {escaped(one.help or '')}{needed} |"
            )
        lines += ["", "</div>", ""]
    return "\n".join(lines)


def _argument(one: Any) -> str:
    name = names(one)[0]
    name += "..." if one.nargs != 1 or getattr(one, "multiple", False) else ""
    return name if one.required else f"[{name}]"


def _help(text: str) -> list[str]:
    """The verb's help, its example as code."""
    paragraphs = [" ".join(part.split()) for part in text.replace("\f", "").split("\n\n")]
    lines: list[str] = []
    for part in paragraphs:
        before, found, example = part.partition("Example: ")
        if before.strip():
            lines += [before.strip().replace("<", "&lt;"), ""]
        if found:
            lines += ["```text", *re.split(r" {3,}|; (?=of |then )", example.strip()), "```", ""]
    return lines


def pages() -> dict[str, tuple[str, str]]:
    """Every page by its path: title and text."""
    return {path(verb): (f"tracer {verb}", page(verb, command)) for verb, command in verbs().items()}


def index() -> str:
    """A table of all verbs: what each does, in its help's first sentence."""
    lines = ["| verb | what it does |", "| --- | --- |"]
    for verb, command in verbs().items():
        said = " ".join((command.help or "").split("\n\n")[0].split())
        lines.append(f"| [`tracer {verb}`](cli/{verb}.md) | {escaped(said)} |")
    return "\n".join(lines)
