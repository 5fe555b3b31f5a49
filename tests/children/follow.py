"""Submit a job and follow it until interrupted: JOB ADDRESS."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it

from tracer.runs.workers.cluster import submit  # noqa: E402

done = submit(Path(sys.argv[1]), sys.argv[2], out="/o", log=lambda line: print(line, flush=True))
print(done.state, done.id, flush=True)
