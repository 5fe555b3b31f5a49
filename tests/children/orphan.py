"""A driver whose worker hangs: prints the worker's process id, and waits to be killed."""

from __future__ import annotations

import time

from tracer.runs.workers.messages import Setup, Task
from tracer.runs.workers.processes import LocalPool

pool = LocalPool()
pool.start("w0", Setup(folder="none", job={"units": [["hang"]]}, factory="faulty:Worker"))
while not pool.events(1):
    pass
pool.give("w0", Task(unit=0))
while not pool.events(1):
    pass
print(pool._processes["w0"].popen.pid, flush=True)
time.sleep(600)
