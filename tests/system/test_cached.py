"""Cached properties hold no lock: a process that is forked while one is computed would wait for it for ever."""

from __future__ import annotations

import threading

from tracer.system.forks import cached_property


class Owner:
    def __init__(self, entered: threading.Event | None = None, leave: threading.Event | None = None) -> None:
        self.entered, self.leave, self.calls = entered, leave, 0

    @cached_property
    def value(self) -> int:
        self.calls += 1
        if self.entered is not None and self.leave is not None:
            self.entered.set()
            assert self.leave.wait(60)
        return 7


def test_a_cached_property_is_computed_while_another_is() -> None:
    """Before Python 3.12 functools' own holds one lock for all instances; a forked process would never get it."""
    entered, leave, found = threading.Event(), threading.Event(), list[int]()
    slow = Owner(entered, leave)
    threading.Thread(target=lambda: slow.value, daemon=True).start()
    assert entered.wait(60)
    other = threading.Thread(target=lambda: found.append(Owner().value), daemon=True)
    other.start()
    other.join(20)
    leave.set()
    assert found == [7]


def test_a_cached_property_is_computed_once() -> None:
    one = Owner()
    assert [one.value, one.value, one.calls] == [7, 7, 1]
