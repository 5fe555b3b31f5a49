"""Whether something held, by a fixed rule: the word at the top of a report, and how a number with its ends is said.

Knows thresholds and wording. Refuses to know what was measured, and how.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tracer.evaluation.statistics import Interval

HELD, PARTLY, OVERSHOOT = 0.8, 0.5, 1.2
"""Faithfulness: the lower end that counts as held, the estimate that counts as partly, and what is too much."""
RULE = (
    "The verdict at the top follows a fixed rule, stated here so that nobody has to trust it: “held” is a lower end of "
    "faithfulness of at least 0.8; “in part” an estimate of at least 0.5, or one above 1.2, which overshoots; and in "
    "any case the lower end must lie above the upper end of random nodes. Completeness is shown and not part of the "
    "rule."
)

Point = tuple[float, float, float]
"""Estimate, lower end, upper end."""


@dataclass(frozen=True)
class Verdict:
    """Whether the circuit held: in a word, as a sentence, and as a class of the page's style."""

    word: str
    text: str
    look: str


def judged(whole: Point, control: Point, facts: str) -> Verdict:
    """The verdict on a faithfulness and its control."""
    estimate, low, _ = whole
    if any(math.isnan(value) for value in (*whole, *control)):
        return Verdict("Cannot be said", f"An interval could not be computed. {facts}", "open")
    if low <= control[2]:
        return Verdict("Did not hold", f"It is not clearly better than random nodes. {facts}", "bad")
    if estimate > OVERSHOOT:
        text = f"It overshoots: what was left out pushes the other way, and the circuit lacks it. {facts}"
        return Verdict("Held in part", text, "partly")
    if low >= HELD:
        return Verdict("Held", facts, "good")
    if estimate >= PARTLY:
        return Verdict("Held in part", f"These nodes carry much of the behaviour, not all. {facts}", "partly")
    return Verdict("Did not hold", f"These nodes alone carry less than half of the behaviour. {facts}", "bad")


def point(curve: Interval, index: int | None = None) -> Point:
    """Estimate and both ends, of a curve at one of its sizes or of a single number."""
    values = (getattr(curve, name) for name in ("estimate", "low", "high"))
    estimate, low, high = (float(value if index is None else value[index]) for value in values)
    return estimate, low, high


def percent(given: Point) -> str:
    """A share with its interval, where it has one."""
    estimate, low, high = given
    if math.isnan(low) and math.isnan(high) and not math.isnan(estimate):
        return f"{estimate:z.1%}"
    if any(math.isnan(value) for value in given):
        return "an undefined share"
    return f"{estimate:z.1%} (95 % interval {low:z.1%} to {high:z.1%})"
