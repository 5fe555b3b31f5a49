"""What an attack counts, and the table that `make attacks` prints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import pytest
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from tally import Attack, Tally


@pytest.fixture
def attack(record_property: Callable[[str, object], None]) -> Attack:
    """``with attack("flipped bits") as tally:`` counts; at the end no harm must have been done."""

    @contextmanager
    def begun(name: str) -> Iterator[Tally]:
        tally = Tally()
        try:
            yield tally
        finally:
            record_property("attack", [name, asdict(tally)])
        assert tally.tried > 0
        assert tally.harm == 0, tally

    return begun


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The attacks of this session, added up by name."""
    sums: dict[str, dict[str, Any]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for key, value in getattr(report, "user_properties", ()) if getattr(report, "when", "") == "call" else ():
                if key == "attack":
                    row = sums.setdefault(value[0], {})
                    for name, count in value[1].items():
                        if name != "worst":
                            row[name] = row.get(name, 0) + count
    if not sums:
        return
    names = [name for name in asdict(Tally()) if name != "worst"]
    table = Table("attack", *names, box=SIMPLE)
    for name, row in sorted(sums.items()):
        table.add_row(name, *(str(row[one]) for one in names))
    Console(width=120).print(table)
