"""What a forked process has to make anew: a lock that a thread of its parent held is never released there.

Knows owners, and what renews each. Refuses to know what they are. Imports nothing of tracer.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

Owner = TypeVar("Owner")

_RENEWALS: WeakKeyDictionary[Any, Callable[[Any], None]] = WeakKeyDictionary()


def after_fork(owner: Owner, renew: Callable[[Owner], None]) -> None:
    """Call `renew` with `owner` in every process that is forked from this one while `owner` is there."""
    _RENEWALS[owner] = renew


def _renew() -> None:
    for owner, renew in list(_RENEWALS.items()):
        renew(owner)


if hasattr(os, "register_at_fork"):  # not on Windows, which cannot fork
    os.register_at_fork(after_in_child=_renew)
