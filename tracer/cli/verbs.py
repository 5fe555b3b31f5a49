"""The command as a whole: how it begins and ends, and how what is wrong with its words is said.

A `TracerError` is one line on standard error and ends with code 2, as what the parser refuses does, with the option or
verb that was meant; anything else is a bug and keeps its traceback. Knows typer's errors. Refuses to know any verb.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from tracer.cli import defaults, manner, terminal
from tracer.errors import JobError, TracerError, meant, quoted
from tracer.system import wholefile
from tracer.text import is_text

# The base class of click's usage errors, or of those of the copy that newer typer bundles.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class Commands(TyperGroup):
    """The verbs of a command whose every error that a user can fix is one line."""

    def main(self, args: Sequence[str] | None = None, *given: Any, **options: Any) -> Any:
        """Run one, and end the process, or return its code where that is asked for (``standalone_mode=False``)."""
        alone = options.pop("standalone_mode", True)
        code = self._ended(sys.argv[1:] if args is None else list(args), *given, **options)
        if alone:
            sys.exit(code)
        return code

    def invoke(self, ctx: Any) -> Any:
        """Run the verb, with the user's defaults in place of the built-in ones."""
        manner.speak(verbose=ctx.params.get("verbose") or 0, quiet=bool(ctx.params.get("quiet")))
        ctx.default_map = defaults.take(dict(self.commands))
        return super().invoke(ctx)

    def _ended(self, args: list[str], *given: Any, **options: Any) -> int:
        """The exit code of a call."""
        manner.begin()
        wholefile.WRITTEN.clear()
        try:
            terminal.Output.take()
            for one in args:
                if not is_text(one):
                    step = "give texts as UTF-8, and rename a file whose name is not"
                    raise JobError(f"argument {quoted(one)}", "holds bytes that are not UTF-8 text", step)
            code = super().main(args, *given, standalone_mode=False, **{"prog_name": "tracer"} | options)
            if sys.stdout is not None:  # it was closed, as by >&-
                sys.stdout.flush()
        except TracerError as error:
            return _said(str(error))
        except OSError as error:
            # What a name given here cannot be is the user's to mend; any other error of the system is a bug of ours.
            if not isinstance(error.filename, str) or not any(error.filename in one for one in args):
                raise
            return _said(f"path {quoted(error.filename, 200)}: {error.strerror}; give another name")
        except UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()  # type: ignore[attr-defined]
                return 2
            return _said(refusal(error, list(self.commands), args))
        except (typer.Abort, KeyboardInterrupt):
            return _said("interrupted; nothing was saved", 130)
        return code if isinstance(code, int) else 0


def _said(message: str, code: int = 2) -> int:
    terminal.complain(message)
    return code


def refusal(error: Any, verbs: Sequence[str], args: Sequence[str]) -> str:
    """What the parser refuses, as value, rule and next step.

    Args:
        error: typer's. verbs: those there are. args: the words of the command.
    """
    text = " ".join(error.format_message().split()).rstrip(".?")
    context: Any = getattr(error, "ctx", None)
    named = next((f"tracer {one}" for one in args if one in verbs), "tracer")
    path = context.command_path if context is not None else named
    if context is not None and type(error).__name__ == "NoSuchOption":
        return f"{error.option_name}: is no option of {path}; {_meant_option(error) or f'see {path} --help'}"
    if verb := re.match(r"No such command '(.*?)'", text):
        return f"{verb[1]}: is no verb of tracer; {meant(verb[1], verbs) or 'see tracer --help'}"
    if value := re.match(r"Invalid value for '?(.*?)'?: (.*)", text):
        given = _given(value[1].split(" / ")[0].strip("'"), args)
        rule = value[2].replace("Input should be", "must be").replace("a valid integer", "a whole number")
        return f"{value[1]}{given}: {rule.partition(', unable')[0]}; see {path} --help"
    if missing := re.match(r"Missing (\w+) '?(.*?)'?(\. .*)?$", text):
        kind, name = missing[1], missing[2]
        return f"{path}: needs the {kind} {name.upper() if kind == 'argument' else name}; see {path} --help"
    return f"{path}: {text}; see {path} --help"


def _given(name: str, args: Sequence[str]) -> str:
    """The value of an option as it was typed, with a space before it; empty where it is not found."""
    for at, word in enumerate(args):
        if word.startswith(f"{name}="):
            return f" {quoted(word.partition('=')[2])}"
        if word == name and at + 1 < len(args):
            return f" {quoted(args[at + 1])}"
    return ""


def _meant_option(error: Any) -> str:
    """The option of its verb that one that is not there was meant to be."""
    shown = [one for one in error.ctx.command.params if not getattr(one, "hidden", False)]
    known = [name for one in shown for name in (*one.opts, *one.secondary_opts) if name.startswith("--")]
    return meant(error.option_name, [*known, "--help"])
