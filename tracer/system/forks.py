"""What a forked process has to make anew: a lock that a thread of its parent held is never released there.

Knows owners, and what renews each; and the one lock that Python itself would leave behind. Refuses to know what owners
are. Imports nothing of tracer.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

Owner = TypeVar("Owner")
Value = TypeVar("Value")

_RENEWALS: WeakKeyDictionary[Any, Callable[[Any], None]] = WeakKeyDictionary()


class cached_property(functools.cached_property[Value], Generic[Value]):  # noqa: N801 - as the one of Python
    """As Python has it from 3.12 on: without a lock. Before, one lock for all instances of a class is held while any of
    them is computed, and a process that is forked meanwhile would wait for it for ever. Threads may compute a value
    twice."""

    def __init__(self, func: Callable[[Any], Value]) -> None:
        super().__init__(func)
        self.lock = nullcontext()


def after_fork(owner: Owner, renew: Callable[[Owner], None]) -> None:
    """Call `renew` with `owner` in every process that is forked from this one while `owner` is there."""
    _RENEWALS[owner] = renew


def _renew() -> None:
    for owner, renew in list(_RENEWALS.items()):
        renew(owner)


if hasattr(os, "register_at_fork"):  # not on Windows, which cannot fork
    os.register_at_fork(after_in_child=_renew)
