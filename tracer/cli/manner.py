"""How this call of the command speaks: quiet or in detail, whether it asks, and what stands in place of defaults.

Knows the answers of -v, -q and --yes, which stand before the verb or behind it. Refuses to know where they are used,
and imports nothing that takes time.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field
from typing import Any

from tracer.errors import TracerError

LOGGER = "tracer"
"""Whose messages -v shows."""
_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)


@dataclass
class Manner:
    """The manner of one call.

    Attributes:
        quiet: no notes, no progress; errors and results stay. verbose: 1 shows what is done, 2 every step.
        yes: what takes hours is not asked about.
        fallback: of --model, --device, --dtype and --bos, what stands for the built-in default where a circuit's record
            does not say another. problem: what is wrong with the user's defaults.
    """

    quiet: bool = False
    verbose: int = 0
    yes: bool = False
    fallback: dict[str, Any] = field(default_factory=dict)
    problem: TracerError | None = None


_now = Manner()


def now() -> Manner:
    """The manner of the call that runs."""
    return _now


def begin() -> None:
    """Forget what an earlier call of this process was told."""
    vars(_now).update(vars(Manner()))
    _listen(0)


def speak(*, verbose: int = 0, quiet: bool = False, yes: bool = False) -> None:
    """Take the options of the command or of a verb; what either says holds."""
    _now.verbose = max(_now.verbose, verbose)
    _now.quiet = _now.quiet or quiet
    _now.yes = _now.yes or yes
    _listen(_now.verbose)


class _Shown(logging.Handler):
    """Messages as lines on standard error, as it is now."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one."""
        from tracer.text import printable

        if sys.stderr is not None:
            sys.stderr.write(f"{record.levelname.lower()}: {printable(record.getMessage())}\n")


def _listen(verbose: int) -> None:
    """Show the logger's messages from a level on; those of a program that imports tracer are its own to show."""
    logger = logging.getLogger(LOGGER)
    for handler in [one for one in logger.handlers if isinstance(one, _Shown)]:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    if verbose:
        logger.addHandler(_Shown())
        logger.setLevel(_LEVELS[min(verbose, 2)])
