"""Ray, the only package that imports it: a pool of workers on a cluster, and jobs submitted to one.

Knows Ray's actors, errors, addresses and job server, and starts a Ray that stays on this machine (local.py); imports
ray inside functions, so that tracer works without it.
Refuses to know any model or run folder.
"""

from __future__ import annotations

from tracer.runs.workers.cluster.pool import RayPool as RayPool
from tracer.runs.workers.cluster.submission import Submission as Submission
from tracer.runs.workers.cluster.submission import follow as follow
from tracer.runs.workers.cluster.submission import status as status
from tracer.runs.workers.cluster.submission import stop as stop
from tracer.runs.workers.cluster.submission import submit as submit
