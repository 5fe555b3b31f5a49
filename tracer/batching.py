"""Work in pieces: by count, and prompts by the memory that a padded batch of them takes.

Knows arithmetic on lengths. Refuses to know what a piece is of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

Items = TypeVar("Items", bound=Sequence[Any])


def chunked(items: Items, size: int) -> list[Items]:
    """Consecutive slices of at most `size` items."""
    return [items[start : start + size] for start in range(0, len(items), size)]  # type: ignore[misc]


def batches(lengths: Sequence[int], bytes_per_token: int, max_bytes: int) -> Iterator[range]:
    """Consecutive runs of prompts whose padded batch stays within `max_bytes` bytes; one prompt at least.

    The split depends on lengths alone, so two calls compute the same bits.
    """
    start = 0
    while start < len(lengths):
        stop, widest = start + 1, lengths[start]
        while stop < len(lengths):
            wider = max(widest, lengths[stop])
            if (stop + 1 - start) * wider * bytes_per_token > max_bytes:
                break
            stop, widest = stop + 1, wider
        yield range(start, stop)
        start = stop
