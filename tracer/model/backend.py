"""Where a model runs: what `Model` needs of a backend outside this process. `ndif` implements it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch


@dataclass(frozen=True)
class Grants:
    """What a server was measured to grant one key on one model (see ndif/probe.py).

    Attributes:
        gradients: whether gradients can be taken there; `reason` says why not.
        weights: whether a block can read them.
        fingerprint: of the weights there, or a text that says that they were not read.
        dtype: of the activations there. quantized: whether some weights are not floating-point.
    """

    gradients: bool
    reason: str
    weights: bool
    fingerprint: str
    dtype: torch.dtype
    quantized: bool


@dataclass(frozen=True)
class Of:
    """A tensor that a block is to send back.

    The form of a whole answer is made of these, of ``float``, ``bool``, ``str`` and None, of tuples, lists and dicts of
    such forms, and of `Maybe`.

    Attributes:
        shape: of each axis its size, a range of sizes, or None for any; a name for a size that is the same wherever
            that name is, or (name, more) for so many more. An ellipsis at the end is any further axes.
        below: whole numbers are 0 or more and below this, in a row below each of these.
        finite: no NaN and no infinity.
    """

    shape: tuple[Any, ...]
    dtype: torch.dtype = torch.float32
    below: int | tuple[int, ...] | None = None
    finite: bool = False


@dataclass(frozen=True)
class Maybe:
    """A form, or None."""

    form: Any


@runtime_checkable
class Remote(Protocol):
    """A backend outside this process."""

    server: Any
    deployment: str
    environment: dict[str, Any]
    grants: Grants
    transfer_dtype: torch.dtype
    guard: Callable[[], Any] | None

    def backend(self, form: Any = None) -> Any:
        """What runs the next traced block there, and refuses an answer that has not the form."""
