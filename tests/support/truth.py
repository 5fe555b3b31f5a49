"""Which truths are of bits and which of numbers; and a machine on which taking one for the other shows.

**Bits** (`same_bits`, `runs.same`) are asked for where the same arithmetic runs on the same memory: two calls on one
model in one process; models or runs whose weights were placed in the same way (the same file mapped, or fresh memory,
which torch aligns to 64 bytes), on one machine, in one build, with one number of threads and batches of one shape;
whatever is stored and read back; sums that are exact or whose order is fixed; and values that are copied, not computed.

**Numbers** (`close`, `same_tables`) are asked for everywhere else: a model in memory and the same one mapped from its
file, one batch and another, here and on a server, product and oracle. A matrix kernel chooses its way, which is to say
the order of its sums, by the address of what it reads modulo 64, by the number of rows and threads, and by the
processor: the same weights elsewhere give other last bits.

That cannot be seen on every processor, so `other_machine` plays one on which it can: see there.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

ROUNDINGS = 64
"""How many roundings of the largest value two orders of the same sums may lie apart.

A sum of n terms is off by at most n roundings of its largest partial sum, and by about their square root as a rule. The
models here sum 32 to 384 terms at a time (about 6 to 20 roundings), in some 10 to 30 products one after another, whose
errors add up as independent ones do: 64. In float32 that is 7.6e-6, below the 1e-5 that parity is held to.
"""
ROUNDINGS_OF_HALVES = 8
"""The same for bfloat16 and float16, whose kernels sum in float32 and round once for each product."""


def tolerance(dtype: torch.dtype = torch.float32) -> float:
    """Relative to the largest value, for arithmetic in `dtype`."""
    return (ROUNDINGS if dtype.itemsize > 2 else ROUNDINGS_OF_HALVES) * torch.finfo(dtype).eps


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal to the bit: only where the same arithmetic ran on the same memory (see above)."""
    return one.dtype == other.dtype and torch.equal(one, other)


def close(got: Tensor, wanted: Tensor, *, dtype: torch.dtype = torch.float32, of: Tensor | None = None) -> bool:
    """Whether two tensors are the same numbers, computed in `dtype` in another order, or from weights elsewhere.

    Args:
        of: what `wanted` are differences of, if they are: their roundings are those of its largest value.
    """
    assert got.shape == wanted.shape
    assert not wanted.isnan().any()
    if not wanted.numel():
        return True
    largest = (wanted if of is None else of).abs().max()
    return bool((got - wanted).abs().max() <= tolerance(dtype) * largest)


REMAINDERS = {"unexplained": "metric", "bias_share": None}
"""Columns of what is left where nearly equal numbers are subtracted, and of what: another column, or a share of one."""


def same_tables(one: pa.Table, other: pa.Table, rtol: float | None = None) -> bool:
    """Whether two tables hold the same rows in the same order, and their floats the same numbers.

    Floats are held to `rtol` (by default as `close`) of the column's largest, and remainders of what they remain of;
    everything else, and where floats are missing, must be equal.
    """
    if not one.schema.equals(other.schema) or one.num_rows != other.num_rows:
        return False
    bound = tolerance() if rtol is None else rtol
    return all(_same_column(one, other, name, bound) for name in one.column_names)


def _same_column(one: pa.Table, other: pa.Table, name: str, rtol: float) -> bool:
    mine, its = one[name], other[name]
    if not pa.types.is_floating(mine.type):
        return mine.equals(its)
    if not mine.is_null().equals(its.is_null()):
        return False
    if not len(mine.drop_null()):
        return True
    whole = REMAINDERS.get(name, name)
    largest = 1.0 if whole is None else _floats(other[whole]).abs().max()
    return bool(((_floats(mine) - _floats(its)).abs() <= rtol * largest).all())


def _floats(column: pa.ChunkedArray) -> Tensor:
    return torch.tensor(column.drop_null().to_numpy(), dtype=torch.float64)


_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def same_text(one: str, other: str) -> bool:
    """Whether two printed tables say the same: in a number of three digits the last may be rounded the other way, a
    remainder (below 1e-5) may be any, and columns are as wide as their numbers."""
    words = [_NUMBER.sub("0", text).split() for text in (one, other)]
    mine, its = ([float(number) for number in _NUMBER.findall(text)] for text in (one, other))
    return words[0] == words[1] and mine == pytest.approx(its, rel=1e-2, abs=1e-5)


# ---------------------------------------------------------------- a machine on which it shows


def shifted(module: nn.Module, count: int) -> nn.Module:
    """Each parameter copied to where it starts `count` bytes (whole elements) further, modulo 64, than it did."""
    for parameter in module.parameters():
        size = parameter.numel() * parameter.element_size()
        memory = torch.empty(size + 128, dtype=torch.uint8)
        further = -(-count // parameter.element_size()) * parameter.element_size()
        start = (parameter.data_ptr() + further - memory.data_ptr()) % 64
        placed = memory[start : start + size].view(parameter.dtype).view(parameter.shape)
        parameter.data = placed.copy_(parameter.data)
    return module


def _cut(one: Tensor, other: Tensor) -> int:
    """Where a sum of products is cut in two: by the addresses of both factors, the rows and the threads."""
    places = one.data_ptr() % 64 // 2 + 3 * (other.data_ptr() % 64 // 2)
    return (places + one.shape[-2] + 7 * torch.get_num_threads()) % max(one.shape[-1], 1)


def _mm(one: Tensor, other: Tensor) -> Tensor:
    cut, out = _cut(one, other), one.new_empty(one.shape[0], other.shape[1])
    torch.mm(one[:, :cut], other[:cut], out=out)
    return out.addmm_(one[:, cut:], other[cut:])


def _addmm(start: Tensor, one: Tensor, other: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return beta * start + alpha * _mm(one, other)


def _bmm(one: Tensor, other: Tensor) -> Tensor:
    cut, out = _cut(one, other), one.new_empty(one.shape[0], one.shape[1], other.shape[2])
    torch.bmm(one[..., :cut], other[:, :cut], out=out)
    return out.baddbmm_(one[..., cut:], other[:, cut:])


_SHIFT = [0]


def placed(module: nn.Module) -> Any:
    """A model as a test gets it: on the other machine its weights lie elsewhere."""
    return shifted(module, _SHIFT[0]) if _SHIFT[0] else module


@contextmanager
def other_machine(shift: int = 0, threads: int = 1) -> Iterator[None]:
    """A processor whose matrix kernels choose their way by address, rows and threads; and weights `shift` bytes off.

    Many processors do choose so. Where this one does not, placing weights elsewhere shows nothing, so it is made to:
    every sum of products is cut in two where `_cut` says. Models of `tiny.tiny`, or that transformers reads from a
    file, get their weights `shifted`; those made before keep theirs.
    """
    from transformers import AutoModelForCausalLM

    library: Any = torch.library.Library("aten", "IMPL")
    kernels: dict[str, Callable[..., Tensor]] = {"mm": _mm, "addmm": _addmm, "bmm": _bmm}
    read, threads_before, shift_before = AutoModelForCausalLM.from_pretrained, torch.get_num_threads(), _SHIFT[0]
    plain = getattr(read, "plain", read)  # inside another such machine

    def reads(*given: Any, **options: Any) -> Any:
        loaded = plain(*given, **options)
        return (placed(loaded[0]), *loaded[1:]) if isinstance(loaded, tuple) else placed(loaded)

    reads.plain = plain  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        for name, kernel in kernels.items():
            library.impl(name, kernel, "CPU", allow_override=True)
        patch.setattr(AutoModelForCausalLM, "from_pretrained", reads)
        _SHIFT[0] = shift
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            library._destroy()
            _SHIFT[0] = shift_before
            torch.set_num_threads(threads_before)
