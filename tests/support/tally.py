"""What an attack is counted by: see tests/attacks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass


@dataclass
class Tally:
    """Of one attack: how often it was tried, and the harm that was done.

    Attributes:
        tried: attacks. lost, doubled: prompts, or what had been computed. silent: other numbers, or a part of them,
            without an error. tracebacks: instead of a line. marks: traces of somebody's code or writing elsewhere.
            hung: had no end.
        worst: what one of them was, for whoever mends it.
    """

    tried: int = 0
    lost: int = 0
    doubled: int = 0
    silent: int = 0
    tracebacks: int = 0
    marks: int = 0
    hung: int = 0
    worst: str = ""

    @property
    def harm(self) -> int:
        """All that must be 0."""
        return self.lost + self.doubled + self.silent + self.tracebacks + self.marks + self.hung


Attack = Callable[[str], AbstractContextManager[Tally]]
