"""`check_family`: a tiny random model is made of a configuration, and everything that must hold is checked on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any

from torch import nn

from tracer.errors import ModelError, described, quoted
from tracer.model.state import undisturbed
from tracer.testing.case import Case
from tracer.testing.checks import CHECKS, Found
from tracer.testing.models import random_model
from tracer.testing.report import Check, FamilyReport


@undisturbed()
def check_family(
    config: Any, *, tokenizer: Any = None, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> FamilyReport:
    """Check every identity that RelP must obey (method.md, section 8) on a tiny random model.

    What tracer says is compared with plain PyTorch: hooks, autograd, and a second linearisation that knows operations
    and no modules. A check that does not apply says why; one that breaks is a check that failed.

    Args:
        config: of transformers, small: it makes the model, with random weights at a scale where norms, attention and
            activations all matter. Set the options that your checkpoints have. Or a module in memory, float32, whose
            weights are left as they are; two checks do not apply to it.
        tokenizer: of the model; by default a tiny one is made.
        seed: of weights and prompts.
        progress: called with (done, total) checks.

    Raises:
        ModelError: no language model can be made of it, it is not tiny, or it is of no family that is known: the
            message says how to register one.
    """
    given = isinstance(config, nn.Module)
    if not given and not hasattr(config, "model_type"):
        raise ModelError(f"config={quoted(config)}", "is no configuration of transformers", "give one, or a module")
    module = deepcopy(config) if given else random_model(config, seed=seed)
    case = Case(None if given else config, module, tokenizer, seed)
    done = []
    for name, group, function in CHECKS:
        done.append(_checked(case, name, group, function))
        if progress is not None:
            progress(len(done), len(CHECKS))
    size = sum(part.numel() for part in case.bare.parameters())
    return FamilyReport(case.model.family.name, tuple(done), size)


def _checked(case: Case, name: str, group: str, function: Callable[[Case], Found]) -> Check:
    """One check as a record; whatever it raises is what went wrong."""
    start = time.perf_counter()
    try:
        value, tolerance, note = function(case)
    except Exception as error:  # noqa: BLE001  whatever a family that is wrong makes of it
        return Check(name, group, passed=False, note=described(error), seconds=time.perf_counter() - start)
    passed = None if tolerance is None or value is None else value <= tolerance
    return Check(name, group, value, tolerance, passed, note, time.perf_counter() - start)
