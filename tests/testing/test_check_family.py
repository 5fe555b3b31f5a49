"""The families' own check: everything holds where it must, and what is wrong is found."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

import tiny
from tracer.testing import FamilyReport, check_family


def config_of(family: str, **over: Any) -> Any:
    kind, settings = tiny._config(family, 2)
    return AutoConfig.for_model(kind, **settings, **over)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_identity_holds(family: str) -> None:
    report = check_family(config_of(family))
    assert isinstance(report, FamilyReport)
    assert report.require() is report
    assert {check.group for check in report.checks} == {"parity", "conservation", "edges", "state"}
