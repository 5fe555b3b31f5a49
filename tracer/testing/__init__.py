"""Checks of a family: every identity that must hold, on a tiny random model, for whoever adds one.

    from tracer.testing import check_family

    report = check_family(MyConfig(num_hidden_layers=3, hidden_size=32))
    report.require()

Knows the identities of method.md section 8 and a second, plain linearisation to compare with. Refuses to know single
families, but for a tiny configuration of each that tracer ships (configs.py).

Door: `check_family`, which returns a `FamilyReport` of `Check`s; ``python -m tracer.testing`` checks all families.
"""

from tracer.testing.family import check_family as check_family
from tracer.testing.report import Check as Check
from tracer.testing.report import FamilyReport as FamilyReport

__all__ = ["Check", "FamilyReport", "check_family"]
