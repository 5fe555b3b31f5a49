"""A pool that opens Ray, or attaches to it, and closes it: twice in one process."""

from __future__ import annotations

import sys

from tracer.runs.workers.cluster import RayPool
from tracer.runs.workers.messages import Died, Done, Setup, Task

for _ in range(2):
    pool = RayPool(sys.argv[1], **({"num_cpus": 1} if sys.argv[1] == "local" else {}))
    pool.start("a", Setup(folder="", job={"units": [["ok"], ["hang"], ["kill"]]}, factory="faulty:Worker"))
    print(type(pool.events(60)[0]).__name__)
    pool.give("a", Task(unit=0))
    while not (done := [one for one in pool.events(60) if isinstance(one, Done)]):
        pass
    print(done[0].report.statuses["ok"])
    pool.give("a", Task(unit=2))
    while not (died := [one for one in pool.events(60) if isinstance(one, Died)]):
        pass
    print(died[0].prompts)
    pool.close()
    pool.close()

import ray  # noqa: E402  not before the pool, which tells it what to print

print(ray.is_initialized())
