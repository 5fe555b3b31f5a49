"""What was checked of a family: one named record for each check, and whether all of them passed.

Knows plain values alone. Refuses to know models and how anything is checked.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tracer.errors import ModelError


@dataclass(frozen=True)
class Check:
    """One identity of method.md section 8, on one tiny random model.

    Attributes:
        name: of the check. group: ``parity``, ``conservation``, ``edges``, or ``state``.
        value: how far off it is, relative to the largest number compared; None where it does not apply or broke.
        tolerance: what `value` may be.
        passed: whether it is within; None where the check does not apply.
        note: why it does not apply, what went wrong, or what the value is of.
        seconds: that it took.
    """

    name: str
    group: str
    value: float | None = None
    tolerance: float | None = None
    passed: bool | None = None
    note: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        state = {True: "passed", False: "FAILED", None: "does not apply"}[self.passed]
        numbers = "" if self.value is None else f" {self.value:.2g}"
        numbers += "" if self.tolerance is None or self.value is None else f" (at most {self.tolerance:.2g})"
        return f"{self.group}: {self.name}: {state}{numbers}{': ' if self.note else ''}{self.note}"


@dataclass(frozen=True)
class FamilyReport:
    """Every check of one family.

    Attributes:
        family: its name, which is `config.model_type`.
        checks: in the order they ran.
        n_parameters: of the model that was made.
    """

    family: str
    checks: tuple[Check, ...]
    n_parameters: int

    @property
    def failed(self) -> tuple[Check, ...]:
        """Checks that did not pass."""
        return tuple(check for check in self.checks if check.passed is False)

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.failed

    @property
    def seconds(self) -> float:
        return sum(check.seconds for check in self.checks)

    def __getitem__(self, name: str) -> Check:
        """The check of that name."""
        return next(check for check in self.checks if check.name == name)

    def worst(self, group: str) -> Check | None:
        """The check of a group that is furthest off, as a share of what it may be; a failed one first."""
        mine = [check for check in self.checks if check.group == group and check.passed is not None]
        return max(mine, key=lambda check: (not check.passed, _share(check)), default=None)

    def require(self) -> FamilyReport:
        """This report, if all its checks passed.

        Raises:
            ModelError: names those that did not.
        """
        if self.passed:
            return self
        named = ", ".join(check.name for check in self.failed)
        rule = f"{len(self.failed)} of {len(self.checks)} checks failed: {named}"
        step = "print the report, mend the Layout or the rule of the module at fault, and check again"
        raise ModelError(f"family {self.family!r}", rule, step)

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "family": self.family,
            "passed": self.passed,
            "n_parameters": self.n_parameters,
            "seconds": self.seconds,
            "checks": [asdict(check) for check in self.checks],
        }

    def __str__(self) -> str:
        return "\n".join([f"{self.family}: {'passed' if self.passed else 'FAILED'}", *map(str, self.checks)])


def _share(check: Check) -> float:
    return 0.0 if check.value is None or not check.tolerance else check.value / check.tolerance
