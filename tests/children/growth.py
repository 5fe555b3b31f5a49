"""Read a data set: how many rows it has, and by how many MiB the process grew meanwhile."""

from __future__ import annotations

import sys
from itertools import islice

import psutil

from tracer import data


def resident() -> int:
    return psutil.Process().memory_info().rss


source = data.Source(path=(sys.argv[1],), labels=("topic",))
for _ in islice(data.read(source), 2000):
    pass
before, most, count = resident(), 0, 0
for count, row in enumerate(data.read(source), start=1):
    assert row.error is None
    if not count % 10_000:
        most = max(most, resident())
print(count, (most - before) / 2**20)
