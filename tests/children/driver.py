"""A run, told of as it goes, to be killed or stopped: JOB, OUT and OPTIONS as one JSON list."""

from __future__ import annotations

import json
import sys

from tracer.runs import driver

job, out, options = json.loads(sys.argv[1])
print("begun", flush=True)
try:
    driver.run(job, out, **options, watch=lambda status: print("done", status.done, status.state, flush=True))
except driver.Stopped as stopped:
    print("stopped", stopped, flush=True)
    sys.exit(stopped.code)
