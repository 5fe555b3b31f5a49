"""Generated texts: the likeliest one, those that are drawn beside it, and what a judge says of them.

Knows what may be asked of sampling. Refuses to know how tokens come about (model/traces.py), and steering.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tracer.errors import JobError, TracerError, first_line, option, quoted
from tracer.model import passes
from tracer.records import as_int, as_python


@dataclass(frozen=True)
class Generated:
    """Generated tokens after the prompt, an end token included, and their text without it; what a judge says of it."""

    token_ids: tuple[int, ...]
    text: str
    score: float | None = None


@dataclass(frozen=True)
class Samples:
    """Texts drawn from the model instead of the likeliest one.

    Text i of each is drawn with the generator of `seed` + i, so that they differ by the steering alone.

    Attributes:
        temperature, top_p: as given. seed: of the first text.
        control: under the first control draw; empty without one.
    """

    temperature: float
    top_p: float
    seed: int
    unsteered: tuple[Generated, ...]
    steered: tuple[Generated, ...]
    control: tuple[Generated, ...]


LEAST = 0.001
"""A lower temperature is greedy in all but name, and has no float32 numbers."""

Judge = Callable[[str], float]
"""What scores a generated text."""


@dataclass(frozen=True)
class Drawn:
    """How texts are drawn beside the greedy one: how many, and with which seeds."""

    temperature: float
    top_p: float
    n: int
    seed: int

    def sampling(self, part: range) -> passes.Sampling | None:
        """Of some of the texts; None where they are greedy."""
        if not self.temperature:
            return None
        return passes.Sampling(self.temperature, self.top_p, tuple(self.seed + i for i in part))


def sampled(
    temperature: float | int | None, top_p: float | int | None, n: int | None, seed: int, max_new_tokens: int
) -> Drawn | None:
    """How texts are drawn; None where none are asked for.

    Raises:
        JobError: a number out of range, or what has no effect.
    """
    if temperature is top_p is n is None and seed == 0:
        return None
    heat, share, count = (1.0 if temperature is None else temperature), (1.0 if top_p is None else top_p), n or 1
    if not _is_number(heat) or not (heat == 0 or LEAST <= heat <= 1 / LEAST):
        rule = f"must be a number from {LEAST} to {1 / LEAST:g}, or 0"
        raise JobError(option("temperature", quoted(heat)), rule, "use 1; 0 is greedy")
    if not _is_number(share) or not 0 < share <= 1:
        raise JobError(option("top_p", quoted(share)), "must be above 0 and at most 1", "use 0.9, or leave it out")
    if (n is not None and (as_int(n) is None or n < 1)) or as_int(seed) is None or seed < 0:
        raise JobError(f"n={quoted(n)}, sample_seed={quoted(seed)}", "must be whole numbers, 1 and 0 or more", "use 5")
    if heat == 0 and (top_p is not None or count > 1 or seed):
        rule = "is greedy: every text is the same, and top_p and a seed have no effect"
        raise JobError("temperature=0", rule, "leave the others out, or use a temperature above 0")
    if not max_new_tokens:
        raise JobError("max_new_tokens=0", "leaves no text to draw", "use 20, or leave the sampling out")
    return Drawn(float(heat), float(share), int(count), int(seed))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def judged(one: Generated, judge: Judge | None) -> Generated:
    """A text with its score, where there is a judge.

    Raises:
        JobError: it fails, or says no number.
    """
    if judge is None:
        return one
    try:
        score = as_python(judge(one.text))
    except TracerError:
        raise
    except Exception as error:
        rule = f"failed on {quoted(one.text)} ({type(error).__name__}: {first_line(error)})"
        raise JobError("judge", rule, "give a function from a text to a number") from error
    if isinstance(score, bool) or not isinstance(score, int | float):
        rule = f"says {quoted(score)} of {quoted(one.text)}, no number"
        raise JobError("judge", rule, "give a function from a text to a number")
    return replace(one, score=float(score))
