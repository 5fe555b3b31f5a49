"""Two pools that attach to a cluster which is not theirs, one after the other."""

from __future__ import annotations

import sys
from typing import TypeVar

import faulty  # noqa: F401  its path is the driver's first
from tracer.runs.workers.cluster import RayPool
from tracer.runs.workers.messages import Died, Done, Event, Setup, Started, Task

Kind = TypeVar("Kind", bound=Event)


def until(pool: RayPool, kind: type[Kind]) -> Kind:
    while True:
        for event in pool.events(60):
            if isinstance(event, kind):
                return event


for _ in range(2):
    pool = RayPool(sys.argv[1])
    pool.start("a", Setup(folder="", job={"units": [["ok"], ["ok", "kill"]]}, factory="faulty:Worker"))
    until(pool, Started)
    pool.give("a", Task(unit=0))
    print(until(pool, Done).report.statuses["ok"])
    pool.give("a", Task(unit=1))
    print(until(pool, Died).prompts[0])
    print(pool.describe())
    pool.close()
