"""Somebody else on this machine, who reaches for a Ray cluster: ADDRESS MARK. Leaves the mark if code of his runs."""

from __future__ import annotations

import sys
from pathlib import Path

import ray


@ray.remote(num_cpus=0)
def mark(path: str) -> None:
    Path(path).touch()


try:
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level=50)
    ray.get(mark.remote(sys.argv[2]), timeout=20)
except Exception as error:  # noqa: BLE001 - whatever keeps him out
    print("refused:", type(error).__name__, *str(error).split()[:40])
