"""Where a model runs: `Backend`, what a `Model` needs of that place, and `Local`, this process.

The other one is a server (ndif/server.py). What differs between the two is here and there, and nowhere else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from tracer.model import interventions, state
from tracer.system import machine

BUDGET_WITHOUT_GPU = 2**30

Part = TypeVar("Part", bound=Sequence[Any])
Answer = TypeVar("Answer")


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
class Backend(Protocol):
    """Where a model runs."""

    @property
    def server(self) -> Any:
        """The service that it runs on; None in this process."""

    @property
    def host(self) -> str:
        """What to call the place in a message."""
        ...

    @property
    def gradients(self) -> bool:
        """Whether gradients can be taken there; `reason` says why not."""
        ...

    @property
    def reason(self) -> str: ...

    @property
    def quantized(self) -> bool:
        """Whether it is known to hold weights that are not floating-point, which the model's configuration may hide."""
        ...

    @property
    def near(self) -> bool:
        """Whether functions and large tensors can be given to what runs there."""
        ...

    @property
    def transfer_dtype(self) -> torch.dtype:
        """In which values and gradients of all nodes leave it."""
        ...

    def trace(self, form: Any = None) -> Any:
        """What runs the next traced block: nnsight's ``backend=``.

        Args:
            form: of what the block sends back, which a server's answer must have; see `Of`.
        """

    def session(
        self, nn: Any, plan: SimpleNamespace, function: Callable[..., Answer], ask: Any, form: Any, /
    ) -> Answer:
        """What ``function(nn, plan, ask)`` returns, with all its traces: to a server one request."""
        ...

    def each(self, function: Callable[[Part], Answer], parts: Sequence[Part]) -> list[Answer]:
        """Ordered map over parts of some work: sequential here, several at a time on a server, which also gets a part
        in halves where it is too large."""
        ...

    def stream(self, function: Callable[[Part], Answer], parts: Sequence[Part]) -> Iterator[Answer]:
        """`each` without halving, each answer as soon as those before it are out."""
        ...

    def sleep(self, seconds: float) -> None:
        """Wait; in a thread of `each` or `stream` only until that work is cancelled."""

    def check(self, module: Any, /) -> None:
        """Refuse a pass over a module that is not fit for it any more; see `state.check`."""

    def survives_fork(self, module: Any, /) -> bool:
        """Whether a forked process can use the module."""
        ...

    def device(self, module: Any, /) -> torch.device:
        """Where inputs go."""
        ...

    def dtype(self, module: Any, /) -> torch.dtype:
        """Of the activations."""
        ...

    def fingerprint(self, module: Any, /) -> str:
        """`interventions.fingerprint` of the weights that compute, or a text that says that they are hidden."""
        ...

    def shows_weights(self, module: Any, /) -> bool:
        """Whether what runs there can read every weight as a float tensor: not quantised, offloaded or hidden."""
        ...

    def budget(self, module: Any, /) -> int:
        """Bytes one batch may use by default. Independent of what is free now, so that the same call is always split
        the same way."""
        ...


@dataclass(frozen=True)
class Local:
    """This process: nnsight runs every block, on the module itself."""

    server: None = None
    host: str = "this machine"
    gradients: bool = True
    near: bool = True
    reason: str = ""
    quantized: bool = False
    transfer_dtype: torch.dtype = torch.float32

    def trace(self, form: Any = None) -> None:
        """nnsight's own way."""

    def session(self, nn: Any, plan: SimpleNamespace, function: Callable[..., Answer], ask: Any, _: Any) -> Answer:
        return function(nn, plan, ask)

    def each(self, function: Callable[[Part], Answer], parts: Sequence[Part]) -> list[Answer]:
        return [function(part) for part in parts]

    def stream(self, function: Callable[[Part], Answer], parts: Sequence[Part]) -> Iterator[Answer]:
        return map(function, parts)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def check(self, module: Any) -> None:
        state.check_threads()
        state.check(module)

    def survives_fork(self, module: Any) -> bool:
        """A GPU is lost to it."""
        return all(value.device.type in ("cpu", "meta") for value in module.parameters())

    def device(self, module: Any) -> torch.device:
        """The embedding's."""
        return module.get_input_embeddings().weight.device

    def dtype(self, module: Any) -> torch.dtype:
        return module.dtype

    def fingerprint(self, module: Any) -> str:
        return interventions.fingerprint(module)

    def shows_weights(self, module: Any) -> bool:
        return readable(module)

    def budget(self, module: Any) -> int:
        """A GiB (less where this process may hold little), or a quarter of a GPU."""
        device = self.device(module)
        if device.type != "cuda":
            return budget_without_gpu()
        return torch.cuda.get_device_properties(device).total_memory // 4


def readable(module: Any) -> bool:
    """Whether every weight is a float tensor in memory: not quantised, not offloaded."""
    return all(value.is_floating_point() and value.device.type != "meta" for value in module.parameters())


def budget_without_gpu() -> int:
    """Bytes one batch may use on a CPU: a GiB, or a quarter of the most that this process could ever hold."""
    return min(BUDGET_WITHOUT_GPU, machine.largest() // 4)
