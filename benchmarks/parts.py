"""Where the time of a call goes, and the operations of its matrix products: functions of tracer wrapped by name.

PARTS says which functions make which part; a name that tracer does not have is left out. Time is counted once, for the
innermost part: a pass that the search for edges runs is a pass. What no part has is "rest".
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from common import clock
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

PARTS: dict[str, tuple[str, ...]] = {
    "passes": ("tracer.model.passes", "tracer.model.traces"),
    "selection": ("tracer.attribution.selection", "tracer.attribution.circuits:reduced"),
    "edges": (
        "tracer.attribution.edges:direct_edges",
        "tracer.attribution.replay",
        "tracer.attribution.circuits:by_replay",
    ),
}
"""Modules, all of whose functions and public methods are meant, or single functions as "module:name"."""
REST = "rest"


class Meter:
    """Seconds of each part and, if asked for, floating-point operations of its matrix products.

    Counting operations takes time: seconds are then too long. A multiplication and an addition are two operations.
    nnsight runs what is between two modules in threads that take turns, so one stack of parts serves them all, and
    each has a counter of its own.
    """

    def __init__(self, operations: bool = False) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.operations: dict[str, int] = defaultdict(int)
        self._counts, self._counting = operations, set[int]()
        self._stack = [REST]
        self.begin()

    def begin(self) -> None:
        """Time counts from now."""
        self._since = clock.read()

    @property
    def part(self) -> str:
        """What runs now."""
        return self._stack[-1]

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """What runs inside is of this part."""
        thread = threading.get_ident()
        first = self._counts and thread not in self._counting
        with _Operations(self) if first else nullcontext():
            self._credit()
            self._stack.append(part)
            self._counting |= {thread} if first else set()
            try:
                yield
            finally:
                self._credit()
                self._stack.pop()
                self._counting -= {thread} if first else set()

    def share(self, part: str) -> float:
        """Of all the time."""
        return self.seconds[part] / sum(self.seconds.values())

    def _credit(self) -> None:
        """Give the time since the last change to the part that spent it."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = clock.read()
        self.seconds[self.part] += now - self._since
        self._since = now


class _Operations(TorchDispatchMode):
    """Counts as `torch.utils.flop_counter.FlopCounterMode` does, without its hooks on modules: tracer refuses a model
    that has any."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self._meter = meter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, count = kwargs or {}, flop_registry.get(_out_of_place(func._overloadpacket))
        if count is None and func is not torch.ops.prim.device.default:
            with self:  # in inference mode einsum and matmul arrive whole
                parts = func.decompose(*args, **given)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **given)
        if count is not None:
            self._meter.operations[self._meter.part] += count(*args, **given, out_val=out)
        return out


def _out_of_place(packet: Any) -> Any:
    """The operation that an in-place one is of, such as addmm of addmm_, which the registry of formulas lacks."""
    name = str(packet).rpartition(".")[2]
    return getattr(torch.ops.aten, name[:-1], packet) if name.endswith("_") and not name.endswith("__") else packet


def metered(run: Callable[[], Any], operations: bool = False) -> Meter:
    """Run it once and say where its time went. What it uses must have been imported."""
    meter, undo, names = Meter(operations), list[tuple[Any, str, Any]](), _names()
    try:
        for part, places in PARTS.items():
            for owner, name, function in (one for place in places for one in _functions(place)):
                wrapped = _wrapped(meter, part, function)
                for holder, key in names.get(id(function), [(owner, name)]):
                    undo.append((holder, key, function))
                    setattr(holder, key, wrapped)
        meter.begin()
        with meter.within(REST):
            run()
        return meter
    finally:
        for holder, key, function in undo:
            setattr(holder, key, function)


def known(part: str) -> bool:
    """Whether tracer has any function of this part."""
    return any(True for place in PARTS[part] for _ in _functions(place))


def _functions(place: str) -> list[tuple[Any, str, Any]]:
    """The functions of a place as (owner, name, function), the owner being a module or a class."""
    path, _, wanted = place.partition(":")
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError:
        return []
    mine = [(name, value) for name, value in vars(module).items() if getattr(value, "__module__", None) == path]
    found = [(module, name, value) for name, value in mine if _plain(value) and wanted in ("", name)]
    for _, kind in mine if not wanted else ():
        if inspect.isclass(kind):
            public = [(name, value) for name, value in vars(kind).items() if name == "__init__" or name[0] != "_"]
            found += [(kind, name, value) for name, value in public if _plain(value)]
    return found


def _plain(value: Any) -> bool:
    """Whether it is a function that returns when it is done."""
    return inspect.isfunction(value) and not inspect.isgeneratorfunction(value)


def _wrapped(meter: Meter, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def within(*args: Any, **options: Any) -> Any:
        with meter.within(part):
            return function(*args, **options)

    return within


def _names() -> dict[int, list[tuple[Any, str]]]:
    """Where the modules of tracer have each function, by its id: it is called by any of these names."""
    names = defaultdict[int, list[tuple[Any, str]]](list)
    for path, module in list(sys.modules.items()):
        for key, value in vars(module).items() if path.partition(".")[0] == "tracer" else ():
            if inspect.isfunction(value):
                names[id(value)].append((module, key))
    return names
