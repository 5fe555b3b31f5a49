"""Plan or run a job: the seconds it took, and this process's peak memory in MiB. WHAT JOB OUT"""

from __future__ import annotations

import json
import sys
import time

from tracer import data
from tracer.runs.driver import run
from tracer.runs.jobs import DatasetJob, load_job
from tracer.runs.units.shards import input_row
from tracer.store.run_folder import RunFolder

what, job, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
started = time.perf_counter()
if what == "plan":
    made = load_job(job)
    assert isinstance(made, DatasetJob)
    rows = (input_row(row) for row in data.read(made.source))
    count = RunFolder(out).write_input(rows, made.shard_size)
    assert RunFolder(out).count_input()[0] == count
else:
    run(job, out, workers=2, factory="fake_runs:Tiny")
with open("/proc/self/status") as file:
    peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
print(json.dumps({"seconds": time.perf_counter() - started, "peak": peak}))
