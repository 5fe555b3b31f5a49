"""Work in pieces: by count, and prompts by the memory that a padded batch of them takes.

Knows arithmetic on lengths. Refuses to know what a piece is of.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, TypeVar

Item = TypeVar("Item")
Items = TypeVar("Items", bound=Sequence[Any])


def chunked(items: Items, size: int) -> list[Items]:
    """Consecutive slices of at most `size` items."""
    return [items[start : start + size] for start in range(0, len(items), size)]  # type: ignore[misc]


def side(length: int, borders: Sequence[int]) -> int:
    """On which side of the borders (rising; a length on a border is below it) a prompt of this length lies: how many it
    exceeds. Prompts of two sides never share a batch."""
    return bisect_left(borders, length)


def chunked_alike(items: Sequence[Item], size: int, kind: Callable[[Item], Any]) -> list[list[Item]]:
    """Consecutive slices of at most `size` items of one kind."""
    return [part for _, alike in groupby(items, kind) for part in chunked(list(alike), size)]


def batches(
    lengths: Sequence[int], bytes_per_token: int, max_bytes: int, borders: Sequence[int] = ()
) -> Iterator[range]:
    """Consecutive runs of prompts on one side of the borders whose padded batch stays within `max_bytes` bytes; one
    prompt at least.

    The split depends on lengths alone, so two calls compute the same bits.
    """
    start = 0
    while start < len(lengths):
        stop, widest = start + 1, lengths[start]
        while stop < len(lengths) and side(lengths[stop], borders) == side(lengths[start], borders):
            wider = max(widest, lengths[stop])
            if (stop + 1 - start) * wider * bytes_per_token > max_bytes:
                break
            stop, widest = stop + 1, wider
        yield range(start, stop)
        start = stop
