"""The exception tree of tracer.

    TracerError             everything a user can mend; the CLI prints it and exits with code 2
    +-- JobError            a prompt, a setting, a job file or its data
    +-- ModelError          an architecture, weights, a device
    +-- RunError            a run folder
    +-- RemoteError         NDIF

Every message has three parts: the value that was met, the rule it breaks, and what to do next.
This module knows no other; anything that is not a `TracerError` is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import re

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
"""Line ends of every kind and other control characters; spaces are the user's own and stay."""


class TracerError(Exception):
    """A problem the user can mend, told as value, rule and next step.

    Args:
        value: what was met, e.g. ``"target ' arent'"``.
        rule: the rule it breaks, e.g. ``"is 2 tokens, one is needed"``.
        next_step: what to do, e.g. ``"choose a one-token word"``.
    """

    def __init__(self, value: str, rule: str, next_step: str) -> None:
        self.value, self.rule, self.next_step = value, rule, next_step
        super().__init__(value, rule, next_step)

    def __str__(self) -> str:
        return _CONTROL.sub(" ", f"{self.value}: {self.rule}; {self.next_step}")


class JobError(TracerError):
    """A prompt, a setting, a job file or its data is wrong."""


class ModelError(TracerError):
    """An architecture is not covered, or weights cannot be used."""


class RunError(TracerError):
    """A run folder cannot be written or read."""


class RemoteError(TracerError):
    """The remote service did not do what the request needs."""


def kind_of(error: TracerError) -> type[TracerError]:
    """The public class of an error: what it is to whoever is told."""
    return next(kind for kind in (JobError, ModelError, RunError, RemoteError, TracerError) if isinstance(error, kind))


def quoted(value: object, limit: int = 60) -> str:
    """`value` as it goes into a message: its repr on one line, spaces kept, shortened to `limit` characters."""
    text = _CONTROL.sub(" ", repr(value))
    return text if len(text) <= limit else text[: limit - 3] + "..."
