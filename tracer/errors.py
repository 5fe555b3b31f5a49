"""The exception tree of tracer.

    TracerError             everything a user can fix; the CLI prints it and exits with code 2
    +-- JobError            a prompt, a setting, a job file or its data
    +-- ModelError          an architecture, weights, a device
    +-- RunError            a run folder
    +-- RemoteError         NDIF

    TracerWarning           what a user should know of a result: said when it is found, kept in its record

Every message has three parts: the value that was given, the rule it breaks, and what to do next. It names settings as
the surface in use writes them: ``bos=True``, ``--bos`` or ``bos: true``. This module imports no other; anything that
is not a `TracerError` is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

from tracer.text import printable

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
"""Line ends of every kind and other control characters; spaces are kept as the user wrote them."""


_LONG = 1000
"""Characters of a part of a message that are shown."""
_surface: ContextVar[Literal["python", "shell", "job"]] = ContextVar("surface", default="python")


class TracerWarning(UserWarning):
    """What a user should know of a result: what was read otherwise than it was given, or is easily misread."""


class TracerError(Exception):
    """A problem the user can fix: value, rule and next step.

    Args:
        value: what was given, e.g. ``"target ' arent'"``.
        rule: the rule it breaks, e.g. ``"is 2 tokens, one is needed"``.
        next_step: what to do, e.g. ``"choose a one-token word"``.
    """

    def __init__(self, value: str, rule: str, next_step: str) -> None:
        self.value, self.rule, self.next_step = value, rule, next_step
        super().__init__(value, rule, next_step)

    def __str__(self) -> str:
        value, rule, next_step = (
            part if len(part) <= _LONG else part[: _LONG - 3] + "..."
            for part in (self.value, self.rule, self.next_step)
        )
        return _line(f"{value}: {rule}; {next_step}")


class JobError(TracerError):
    """A prompt, a setting, a job file or its data is wrong."""


class ModelError(TracerError):
    """An architecture is not covered, or weights cannot be used."""


class RunError(TracerError):
    """A run folder cannot be written or read."""


class RemoteError(TracerError):
    """The remote service did not do what the request needs."""


@contextmanager
def surface(name: Literal["python", "shell", "job"]) -> Iterator[None]:
    """Word messages inside for who reads them: arguments, options of the command line, or keys of a job file."""
    token = _surface.set(name)
    try:
        yield
    finally:
        _surface.reset(token)


def in_python() -> bool:
    """Whether whoever is served called from Python."""
    return _surface.get() == "python"


def option(name: str, value: object = None) -> str:
    """A setting as the surface in use writes it: ``skip_first=True``, ``--skip-first``, ``skip_first: true``.

    Args:
        name: of the argument, as Python has it.
        value: what to give it; None names the setting alone.
    """
    shown = value if not isinstance(value, str) or re.fullmatch(r"[\w./-]+", value) else repr(value)
    match _surface.get():
        case "shell":
            return "--" + name.replace("_", "-") + ("" if value is None or value is True else f" {shown}")
        case "job":
            return f"{name}:" if value is None else f"{name}: {'true' if value is True else shown}"
        case _:
            return f"{name}=" if value is None else f"{name}={value!r}"


def say(notes: Iterable[str]) -> None:
    """Warn of each, as a `TracerWarning`: a line on a terminal, and elsewhere Python's own warning of the line that
    called tracer."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("tracer", "contextlib"):
        level, frame = level + 1, frame.f_back
    for text in notes:
        warnings.warn(_line(text), TracerWarning, stacklevel=level)


def _line(text: str) -> str:
    return printable(_CONTROL.sub(" ", text))


def _short(part: str) -> str:
    return part if len(part) <= _LONG else part[: _LONG - 3] + "..."


def kind_of(error: TracerError) -> type[TracerError]:
    """The public class of an error: what callers catch and users read."""
    return next(kind for kind in (JobError, ModelError, RunError, RemoteError, TracerError) if isinstance(error, kind))


def quoted(value: object, limit: int = 60) -> str:
    """`value` as it goes into a message: its repr on one line, spaces kept, shortened to `limit` characters."""
    if isinstance(value, str | bytes | list | tuple) and len(value) > 2 * limit:
        value = value[: 2 * limit]  # more is not shown, and may be gigabytes
    text = _line(repr(value))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def meant(given: object, known: Iterable[object]) -> str:
    """The next step for a name that is not known: which of those that are was meant; empty where none is near."""
    from difflib import get_close_matches

    names = {str(one).lower().replace("_", "-"): str(one) for one in known}
    near = get_close_matches(str(given).lower().replace("_", "-")[:100], names, 1)
    return f"did you mean {quoted(names[near[0]])}?" if near else ""


def first_line(error: object, limit: int = 160) -> str:
    """The first line of what an error says, shortened; its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:limit].rstrip(".") if lines else type(error).__name__


def described(error: BaseException) -> str:
    """An exception on one line: class, message, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" (in {frames[-1].name}, {os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    message = printable(" ".join(str(error).split())[:500]) or type(error).__name__
    return f"{type(error).__name__}: {message}{place}"


@contextmanager
def writing(
    path: object, kind: str = "file", next_step: str = "choose another", rule: str = "cannot be written"
) -> Iterator[None]:
    """Turn what a file system refuses into a `RunError` about the `kind` at `path`."""
    try:
        yield
    except OSError as error:
        reason = f"{rule} ({error.strerror or error})"
        raise RunError(f"{kind} {quoted(str(path), 300)}", reason, next_step) from error
