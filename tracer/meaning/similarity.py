"""How alike neurons are by their attribution profiles: cosines per prompt, averaged over prompts, both sides combined.

Knows which rows of the profiles are occurrences of which item, and streams prompts through in bounded memory. Refuses
to know where profiles come from (meaning/profiles.py) and what is made of likeness (meaning/clusters.py).

Source: ADAG, arXiv 2604.07615; method.md section 7.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from tracer.errors import RunError

CELLS = 2**24
"""Numbers of the dense cosines that are held at a time, for each side: 64 MiB."""
ROOM = 2**29
"""Bytes of the sums that are held at a time; more bootstraps than fit take another pass over the prompts."""

Parts = Callable[[], Iterable[pa.Table]]
"""Profiles in the columns of `meaning.profiles.SCHEMA`, from the first prompt on at every call; a prompt's rows lie
together in one table."""
Matrix = Float[np.ndarray, "item item"]


@dataclass(frozen=True, eq=False)
class Items:
    """What is compared: neurons of one polarity, each at a position or (-1) wherever it is, in canonical order.

    Attributes:
        layer, position, neuron, polarity: a whole number each.
        n_tokens: only prompts of this length count, as an aligned circuit's; all if None.
    """

    layer: np.ndarray
    position: np.ndarray
    neuron: np.ndarray
    polarity: np.ndarray
    n_tokens: int | None = None

    @staticmethod
    def of(rows: Iterable[tuple[int, int, int, int]], n_tokens: int | None = None) -> Items:
        """Each (layer, position, neuron, polarity) once, sorted, so that nothing depends on the order of nodes."""
        found = np.array(sorted(set(rows)), np.int64).reshape(-1, 4)
        return Items(*found.T, n_tokens=n_tokens)

    def __len__(self) -> int:
        return len(self.layer)

    @property
    def free(self) -> bool:
        """Whether a neuron counts wherever it is: its profiles within a prompt are summed."""
        return bool((self.position < 0).all())

    def rows(self) -> list[tuple[int, int, int, int]]:
        """As `of` takes them."""
        columns = (self.layer, self.position, self.neuron, self.polarity)
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def take(self, chosen: np.ndarray) -> Items:
        """Those items, by a mask or by rising places."""
        columns = (self.layer, self.position, self.neuron, self.polarity)
        return Items(*(column[chosen] for column in columns), n_tokens=self.n_tokens)

    def find(self, table: pa.Table) -> np.ndarray:
        """The item that each row of profiles is, or -1."""
        names = ("layer", "position", "neuron", "polarity")
        layer, position, neuron, polarity = (table[name].to_numpy().astype(np.int64) for name in names)
        own = _keys(self.layer, self.position, self.neuron, self.polarity)
        wanted = _keys(layer, np.full_like(position, -1) if self.free else position, neuron, polarity)
        place = np.minimum(np.searchsorted(own, wanted), len(own) - 1)
        return np.where(own[place] == wanted, place, -1)


class Occurrences(NamedTuple):
    """The items of one prompt, rising, and their profiles: [item, source position] and [item, target logit]."""

    items: np.ndarray
    input: np.ndarray
    output: np.ndarray


@dataclass(frozen=True, eq=False)
class Counted:
    """What a first pass over the prompts finds.

    Attributes:
        n_prompts: prompts in which an item occurs. times: the prompts of each item. without: nodes of prompts that have
            no profile. elsewhere: prompts left out, as they have another length.
    """

    n_prompts: int
    times: np.ndarray
    without: int
    elsewhere: int


@dataclass(frozen=True, eq=False)
class Likeness:
    """How alike items are.

    Attributes:
        similarity: [item, item], 0 to 1: the harmonic mean of both sides' cosines, 1 of an item with itself.
        together: [item, item], prompts (by weight) in which both occur.
    """

    similarity: Matrix
    together: Matrix


def count(parts: Parts, items: Items) -> Counted:
    """Go over the prompts once, and count.

    Raises:
        RunError: a prompt's profiles differ in length.
    """
    tally, times, n_prompts = _Tally(), np.zeros(len(items), np.int64), 0
    for prompt in _prompts(parts(), items, tally):
        times[prompt.items] += 1
        n_prompts += 1
    return Counted(n_prompts, times, tally.without, tally.elsewhere)


def likeness(parts: Parts, items: Items, weights: np.ndarray) -> Iterator[Likeness]:
    """The items' likeness for each row of weights, in their order.

    The cosine of two items' profiles is averaged over the prompts where both occur, each side for itself; a side of
    zeros is like nothing. The two are combined by the harmonic mean of values clamped at 0, which is 0 if either is.
    Pairs that never occur together have 0. Memory is that of a few matrices of all pairs, whatever the number of
    prompts; time is one pass over them for as many rows of weights as `ROOM` holds.

    Args:
        weights: [row, prompt], how often each prompt counts, in the order in which prompts come.
    """
    held = max(1, ROOM // (24 * len(items) ** 2))
    for first in range(0, len(weights), held):
        sums = _summed(_prompts(parts(), items, _Tally()), len(items), weights[first : first + held])
        for into, out_of, together in zip(*sums, strict=True):
            yield Likeness(_combined(into, out_of, together), together)


def _summed(prompts: Iterable[Occurrences], n_items: int, weights: np.ndarray) -> np.ndarray:
    """Cosines of the inputs, of the outputs, and ones, summed over prompts by their weights: [3, row, item, item]."""
    sums = np.zeros((3, len(weights), n_items, n_items))
    size = max(1, min(64, CELLS // n_items**2))
    dense = np.zeros((3, size, n_items, n_items), np.float32)
    filled = first = 0

    def flush() -> None:
        factors = weights[:, first : first + filled].astype(np.float32)
        for side, part in enumerate(dense):
            sums[side] += (factors @ part[:filled].reshape(filled, -1)).reshape(sums[side].shape)
        dense[:, :filled] = 0

    for prompt in prompts:
        pairs = np.ix_(prompt.items, prompt.items)
        for part, values in zip(dense, (_cosines(prompt.input), _cosines(prompt.output), 1.0), strict=True):
            part[filled][pairs] = values
        filled += 1
        if filled == size:
            flush()
            filled, first = 0, first + filled
    if filled:
        flush()
    return sums


def _cosines(profiles: np.ndarray) -> np.ndarray:
    """[item, item]; 0 where one of both is all zeros. Scaled first, so that squares neither vanish nor overflow."""
    largest = np.abs(profiles).max(axis=1, initial=0.0, keepdims=True)
    scaled = np.divide(profiles, largest, out=np.zeros_like(profiles), where=largest > 0)
    length = np.linalg.norm(scaled, axis=1, keepdims=True)
    unit = np.divide(scaled, length, out=np.zeros_like(profiles), where=length > 0)
    return unit @ unit.T


def _combined(into: Matrix, out_of: Matrix, together: Matrix) -> Matrix:
    means = (np.divide(side, together, out=np.zeros_like(side), where=together > 0) for side in (into, out_of))
    one, other = (np.clip(mean, 0.0, 1.0) for mean in means)
    total = one + other
    found = np.divide(2 * one * other, total, out=np.zeros_like(total), where=total > 0)
    found = (found + found.T) / 2
    np.fill_diagonal(found, 1.0)
    return found


@dataclass
class _Tally:
    """What is left out."""

    without: int = 0
    elsewhere: int = 0


def _prompts(parts: Iterable[pa.Table], items: Items, tally: _Tally) -> Iterator[Occurrences]:
    """The occurrences of items, prompt by prompt; prompts without any are none."""
    for table in parts:
        ids, found = table["prompt_id"].to_numpy(), items.find(table)
        sides = [_Lists(table[name]) for name in ("input", "output")]
        borders = [*np.flatnonzero(np.diff(ids, prepend=ids[:1] - 1)).tolist(), len(ids)]
        for low, high in itertools.pairwise(borders):
            there = np.flatnonzero((sides[0].lengths[low:high] > 0) & (sides[1].lengths[low:high] > 0)) + low
            tally.without += high - low - len(there)
            own = there[found[there] >= 0]
            if not len(own):
                continue
            profiles = [side.rows(own) for side in sides]
            if items.n_tokens not in (None, profiles[0].shape[1]):
                tally.elsewhere += 1
                continue
            yield _merged(found[own], *profiles)


def _merged(found: np.ndarray, into: np.ndarray, out_of: np.ndarray) -> Occurrences:
    """Occurrences in the order of items; those of one item are summed, in the order of their rows."""
    order = np.argsort(found, kind="stable")
    items, starts = np.unique(found[order], return_index=True)
    return Occurrences(items, *(np.add.reduceat(side[order], starts, axis=0) for side in (into, out_of)))


class _Lists:
    """A column of lists of numbers; none and null are of no length."""

    def __init__(self, column: Any) -> None:
        lists = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        self.lengths = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        self._values = lists.flatten().to_numpy(zero_copy_only=False).astype(np.float64)
        self._starts = np.cumsum(self.lengths) - self.lengths

    def rows(self, chosen: Sequence[int] | np.ndarray) -> np.ndarray:
        """[row, number] of rows that are of one length.

        Raises:
            RunError: they are not, or hold what is not a number.
        """
        lengths = self.lengths[chosen]
        if len(set(lengths.tolist())) != 1:
            raise RunError("the table profiles", "has profiles of different lengths in one prompt", "run it again")
        found = self._values[self._starts[chosen][:, None] + np.arange(lengths[0])]
        if not np.isfinite(found).all():
            raise RunError("the table profiles", "holds a value that is not finite", "run it again")
        return found


def _keys(layer: np.ndarray, position: np.ndarray, neuron: np.ndarray, polarity: np.ndarray) -> np.ndarray:
    """One whole number for each item, rising in canonical order: 15 bits of layer, 21 of position, 25 of neuron."""
    return (((layer << 21) + position + 1 << 25) + neuron << 1) + (polarity > 0)
