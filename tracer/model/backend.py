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


@runtime_checkable
class Remote(Protocol):
    """A backend outside this process."""

    server: Any
    deployment: str
    environment: dict[str, Any]
    grants: Grants
    transfer_dtype: torch.dtype
    guard: Callable[[], Any] | None

    def backend(self) -> Any:
        """What runs the next traced block there."""
