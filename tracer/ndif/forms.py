"""Whether a server's answer has the form that was asked for; numbers themselves cannot be checked so.

Knows tensors and containers. Refuses to know what a form stands for (model/passes.py says it).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tracer.errors import quoted
from tracer.model.backend import Maybe, Of


def wrong(value: Any, form: Any) -> str:
    """What is wrong with an answer of this form; nothing if nothing is."""
    return _wrong(value, form, "saved", {})


def _wrong(value: Any, form: Any, where: str, sizes: dict[str, int]) -> str:
    if isinstance(form, Maybe):
        return "" if value is None else _wrong(value, form.form, where, sizes)
    if isinstance(form, Of):
        return _tensor(value, form, where, sizes)
    if form is None or isinstance(form, type):
        kind = type(None) if form is None else form
        return "" if type(value) is kind else f"{where} is {_shown(value)}, not {kind.__name__}"
    named = isinstance(form, dict)
    if type(value) is not type(form) or (value.keys() != form.keys() if named else len(value) != len(form)):
        return f"{where} is {_shown(value)}, not {_shown(form)}"
    for name in form if named else range(len(form)):
        if said := _wrong(value[name], form[name], f"{where}[{name!r}]", sizes):
            return said
    return ""


def _tensor(value: Any, form: Of, where: str, sizes: dict[str, int]) -> str:
    if type(value) is not Tensor or value.dtype != form.dtype or not _fits(value.shape, form.shape, sizes):
        return f"{where} is {_shown(value)}, not {_kind(form.dtype, form.shape)}"
    if value.requires_grad or vars(value) or value.is_neg() or value.is_conj():
        return f"{where} is no plain tensor"
    if form.below is not None and value.numel():
        low, high = value.amin(), (value - torch.tensor(form.below)).max()
        if int(low) < 0 or int(high) >= 0:
            return f"{where} points outside of the model or the prompt"
    if form.finite and not bool(value.isfinite().all()):
        return f"{where} has a number that is not finite"
    return ""


def _fits(shape: Sequence[int], wanted: Sequence[Any], sizes: dict[str, int]) -> bool:
    """Whether a shape is as wanted; sizes that had only a name are known from then on."""
    if wanted and wanted[-1] is ...:
        shape, wanted = shape[: len(wanted) - 1], wanted[:-1]
    if len(shape) != len(wanted):
        return False
    for size, axis in zip(shape, wanted, strict=True):
        name, more = axis if isinstance(axis, tuple) else (axis, 0)
        if isinstance(name, str) and size - more != sizes.setdefault(name, size - more):
            return False
        if isinstance(name, int | range) and size not in (name if isinstance(name, range) else (name,)):
            return False
    return True


def _axes(shape: Sequence[Any]) -> str:
    named = {None: "any", ...: "..."}
    return " x ".join(
        f"({axis[0]} + {axis[1]})" if isinstance(axis, tuple) else named.get(axis, str(axis)) for axis in shape
    )


def _kind(dtype: torch.dtype, shape: Sequence[Any]) -> str:
    return f"{str(dtype).removeprefix('torch.')} of {_axes(shape) or 'one number'}"


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return _kind(value.dtype, value.shape)
    kind = type(value).__name__
    if isinstance(value, dict):
        return f"{kind} of {quoted(', '.join(map(str, value)))}"
    return f"{kind} of {len(value)}" if isinstance(value, tuple | list) else kind
