"""Load what is no name, without the type checks of the test suite."""

from __future__ import annotations

from typing import Any

import tracer

WRONG: tuple[Any, ...] = (None, 5, b"demo")
for wrong in WRONG:
    try:
        tracer.load(wrong)
    except tracer.ModelError as problem:
        print(problem)
