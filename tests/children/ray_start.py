"""Starts a Ray of its own, with OPTIONS as JSON, and prints as JSON: the line of its refusal, how long it took, and
what is left of it: processes, and folders for its files."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

import psutil

from tracer.errors import TracerError
from tracer.runs.workers.cluster import RayPool

options = json.loads(sys.argv[1])
if "files" in options:
    resource.setrlimit(resource.RLIMIT_NOFILE, (options["files"],) * 2)
    del options["files"]
begun, line = time.monotonic(), ""
try:
    RayPool("local", **({"num_cpus": 1} | options)).close()
except TracerError as error:
    line = str(error)
took = time.monotonic() - begun
left = [
    f"{one.name()} {one.pid}"
    for one in psutil.Process().children(recursive=True)
    if one.status() != psutil.STATUS_ZOMBIE
]
folder = Path(os.environ["RAY_TMPDIR"])
left += [str(one) for one in folder.glob("*")]
print(json.dumps({"line": line, "took": took, "left": left}))
