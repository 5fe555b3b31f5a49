"""What every verb needs of a terminal: one-line errors, tables that are never cut, a progress bar, no other output.

Knows standard output and error. Refuses to know any verb.
"""

from __future__ import annotations

import io
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import wraps
from typing import TYPE_CHECKING, Any, get_type_hints

import typer
from typer.models import OptionInfo

from tracer.cli import manner
from tracer.cli.dressing import flag_of
from tracer.errors import RunError, TracerError, TracerWarning, surface
from tracer.text import printable, printable_lines

if TYPE_CHECKING:
    from rich.console import Console

    from tracer.attribution.exact import Progress


_RENAMED = {
    "edge share": "--edge-share",
    "edge attribution": "--edge-attribution",
    "top edges": "--top-edges",
}
"""Of the fields of `Pruning`, which in one line of options need the word edge before them: what messages call them."""
_VALUE = r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]|[\w./+-]*\w"


def report_errors(verb: Callable[..., None]) -> Callable[..., None]:
    """Print a user's error as one line on standard error, and end with code 2; print what is warned of as a note, once.

    Messages name options as the command line writes them: those of modules that name arguments are translated.
    """

    @wraps(verb)
    def run(*args: Any, **kwargs: Any) -> None:
        options = _options(verb)
        try:
            with surface("shell"), _noted(options):
                verb(*args, **kwargs)
        except TracerError as error:
            complain(worded(str(error), options))
            raise typer.Exit(2) from None
        except KeyboardInterrupt as stop:
            complain(f"{'stopped' if type(stop).__name__ == 'Declined' else 'interrupted'}; {kept()}")
            raise typer.Exit(130) from None

    return run


def kept() -> str:
    """What is there of a verb that was interrupted: files are whole or not there."""
    from tracer.system import wholefile

    written = [printable(one) for one in wholefile.WRITTEN]
    if not written:
        return "nothing was saved"
    more = f" and {len(written) - 5:,} more" if len(written) > 5 else ""
    return f"written already: {', '.join(written[:5])}{more}; repeat the command for the rest"


def worded(text: str, options: Mapping[str, str]) -> str:
    """A message with its arguments as options: ``foil=' is'`` as ``--foil ' is'``, ``edges=False`` as ``--no-edges``.

    Args:
        options: by the names of their arguments. What else is in quotes is a user's, and stays.
    """

    def as_option(found: re.Match[str]) -> str:
        name, value = found["name"], found["value"] or ""
        if name is None:
            return found[0]
        if value == "False":
            return options[name].replace("--", "--no-", 1)
        plain = re.fullmatch(r"'([\w./+-]+)'", value)
        return options[name] if value == "True" else f"{options[name]} {plain[1] if plain else value}".rstrip()

    names = "|".join(map(re.escape, options)) or "(?!)"
    return re.sub(rf"(?<![\w.])(?P<name>{names})=(?P<value>{_VALUE})?|'[^']*'", as_option, text)


def _options(verb: Callable[..., None]) -> dict[str, str]:
    """The options of a verb, by the names that their arguments have in Python."""
    flags = {}
    for name, hint in get_type_hints(verb, include_extras=True).items():
        for made in getattr(hint, "__metadata__", ()):
            if isinstance(made, OptionInfo):
                flags[name] = flag_of(name, made)
    return flags | {name: flag for name, flag in _RENAMED.items() if flag in flags.values()}


@contextmanager
def _noted(options: Mapping[str, str]) -> Iterator[None]:
    """Each `TracerWarning` as one note; other warnings as Python shows them."""
    said, usual = set[str](), warnings.showwarning

    def show(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
        if not issubclass(category, TracerWarning):
            usual(message, category, *place, **more)
        elif (text := worded(str(message), options)) not in said:
            said.add(text)
            note(text)

    with warnings.catch_warnings():
        warnings.simplefilter("always", TracerWarning)
        warnings.showwarning = show
        yield


def console(stderr: bool = False, **options: Any) -> Console:
    """A console on which a user's text is never read as an emoji, and nothing that controls a terminal is printed but
    the console's own styles: whatever comes from prompts, files and servers is spelt out, wherever it is put."""
    from rich.console import Console
    from rich.segment import Segment

    class Plain(Console):
        def render(self, *what: Any, **how: Any) -> Any:
            for part in super().render(*what, **how):
                safe = part.control is not None or part.text.isprintable()
                yield part if safe else Segment(printable_lines(part.text), part.style)

    return Plain(stderr=stderr, emoji=False, highlight=False, **options)


def width() -> int:
    """Columns of a table: what COLUMNS says, else those of the terminal, and 80 where there is none."""
    asked = os.environ.get("COLUMNS", "")
    if re.fullmatch("[1-9][0-9]{0,5}", asked):
        return int(asked)
    for stream in (1, 2, 0):
        with suppress(OSError):
            if found := os.get_terminal_size(stream).columns:
                return found
    return 80


def complain(message: str) -> None:
    """One line on standard error, however narrow the terminal; coloured where that is wanted."""
    with suppress(OSError):  # where errors cannot be written nothing can be said of it
        console(stderr=True, soft_wrap=True).print(f"error: {printable(message)}", style="red", markup=False)


def note(message: str) -> None:
    """One line on standard error that is not an error; none where that is not wanted."""
    if manner.now().quiet:
        return
    with suppress(OSError):
        console(stderr=True, soft_wrap=True).print(f"note: {printable(message)}", markup=False)


def line(message: str, err: bool = False) -> None:
    """One line of our own on standard output or error; a path or a name in it is no command of the terminal."""
    typer.echo(printable(message), err=err)


def data(text: str) -> None:
    """JSON or CSV on standard output: as it is for a program; on a terminal with what would control it spelt out."""
    typer.echo(printable_lines(text) if sys.stdout is not None and sys.stdout.isatty() else text)


class Output(io.TextIOWrapper):
    """Standard output that says in a line why it cannot be written; a terminal may lack a token's letters."""

    @classmethod
    def take(cls) -> None:
        """Put it in place of Python's own."""
        there = sys.stdout
        if type(there) is io.TextIOWrapper:
            with _output():
                there.flush()
            encoding, each_line = there.encoding, there.line_buffering
            sys.stdout = cls(there.detach(), encoding, "replace", line_buffering=each_line)

    def write(self, text: str, /) -> int:
        """As Python's own.

        Raises:
            RunError: nothing can be written there.
        """
        with _output():
            return super().write(text)

    def flush(self) -> None:
        """As Python's own.

        Raises:
            RunError: what was written cannot be kept there.
        """
        with _output():
            super().flush()


@contextmanager
def _output() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that Python does not fail again when it ends
        if isinstance(error, BrokenPipeError):  # whoever read has enough, as of `| head`
            sys.exit(141)
        step = "send it elsewhere"
        raise RunError("standard output", f"cannot be written ({error.strerror or error})", step) from error


LOG_EVERY = 10.0
"""Seconds between two lines on standard error of what takes long, where that is no terminal."""


class ProgressBar:
    """A progress bar on standard error for methods of many passes; outside a terminal a line now and then, from the
    first `LOG_EVERY` seconds on."""

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from tracer.cli.waiting import Question

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        shown = console(stderr=True)
        self.quiet = manner.now().quiet
        self.is_bar = shown.is_terminal and not self.quiet
        self.name, self._clock = printable(name, 80), clock
        self.bar = Progress(*columns, console=shown, transient=True, disable=not self.is_bar)
        self.task = self.bar.add_task(self.name, total=None)
        self._question = Question()

    def __enter__(self) -> Progress:
        self.bar.__enter__()
        self._said = self._since = self._clock()
        self._first = self._done = 0
        return self._report

    def _report(self, done: int, total: int) -> None:
        now = self._clock()
        if done < self._done:  # another count begins
            self._since, self._first = now, done
        self._done = done
        if done > self._first:
            self._consider(now - self._since, (now - self._since) * (total - done) / (done - self._first))
        if self.is_bar:
            self.bar.update(self.task, completed=done, total=total)
            return
        if self.quiet or now - self._said < LOG_EVERY:
            return
        self._said = now
        text = f"{self.name}: {done:,} of {total:,}"
        if done > self._first:
            from tracer.runs.report import duration

            text += f", {duration((now - self._since) * (total - done) / (done - self._first))} to go"
        line(text, err=True)

    def _consider(self, measured: float, left: float) -> None:
        """Ask before work of hours."""
        if not self._question.due(measured, left):
            return
        self.bar.stop()
        self._question.ask(left, "nothing is saved before its end")
        if self.is_bar:
            self.bar.start()

    def __exit__(self, *error: Any) -> None:
        self.bar.__exit__(*error)


def quiet() -> None:
    """Keep the terminal for our own output: the libraries' warnings and bars are of no use to a user here."""
    import logging
    import os

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
