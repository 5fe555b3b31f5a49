"""A run over many prompts against a loop of tracer.trace, and two workers against one; aggregation of many rows.

    python benchmarks/scale.py [--prompts 300] [--rows 10000000] [--ray]

Every side has one thread a process, and is measured from the moment its models are loaded; loading is printed beside
it. The loop writes nothing; the run writes and commits its tables. One side after the other, in one session, each
twice; the better of the two counts, since other programs on the machine only ever make one slower.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")


def job(prompts: int, batch: int | None) -> dict[str, Any]:
    """Realistic work: 200 nodes and their edges of each prompt."""
    made: dict[str, Any] = {
        "kind": "dataset",
        "input": {"task": "sva", "structure": "nounpp", "count": prompts},
        "nodes": 200,
        "shard_size": 10,
    }
    return made if batch is None else {**made, "batch": batch}


def loop(prompts: int) -> tuple[float, float]:
    """Seconds to load the model, and prompts per second of tracer.trace in a loop."""
    import torch

    import tracer
    from tracer.data import tasks

    torch.set_num_threads(1)
    started = time.perf_counter()
    model = tracer.load("demo")
    pairs = tasks.load("sva", structure="nounpp", split="train", count=prompts)
    loaded = time.perf_counter() - started
    tracer.trace(model, pairs[0].to_prompt(paired=False))
    started = time.perf_counter()
    for pair in pairs:
        tracer.trace(model, pair.to_prompt(paired=False))
    return loaded, prompts / (time.perf_counter() - started)


def run(prompts: int, workers: int, batch: int | None, ray: str | None) -> tuple[float, float]:
    """Seconds until the last worker was ready, and prompts per second from then on."""
    import tracer

    times: list[tuple[float, int, int]] = []
    started = time.perf_counter()

    def watch(status: Any) -> None:
        times.append((time.perf_counter(), status.workers, status.done + status.in_flight))

    with tempfile.TemporaryDirectory() as folder:
        tracer.run(job(prompts, batch), Path(folder) / "run", workers=workers, ray=ray, watch=watch)
    ready = next(i for i, (_, there, _) in enumerate(times) if there == workers)
    # From the first news with all workers at work to the last unit's commit.
    first, last = times[ready], next(one for one in times if one[2] >= prompts)
    return first[0] - started, (last[2] - first[2]) / (last[0] - first[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--rows", type=int, default=10_000_000, help="of the aggregation; 0 leaves it out")
    parser.add_argument("--ray", action="store_true", help="also with Ray (a cluster of its own)")
    parser.add_argument("--loop", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.loop:
        print(*loop(given.prompts))
        return
    sides: dict[str, Any] = {
        "tracer.trace in a loop": lambda: _loop_apart(given.prompts),
        "run, 1 worker, prompts one by one": lambda: run(given.prompts, 1, 1, None),
        "run, 1 worker": lambda: run(given.prompts, 1, None, None),
        "run, 2 workers": lambda: run(given.prompts, 2, None, None),
    }
    if given.ray:
        sides |= {f"run, Ray, {n} workers": lambda n=n: run(given.prompts, n, None, "local") for n in (1, 2)}
    found = dict.fromkeys(sides, (0.0, 0.0))
    for _ in range(2):
        for name, side in sides.items():
            measured = side()
            found[name] = max(found[name], measured, key=lambda one: one[1])
    base = found["tracer.trace in a loop"][1]
    print(f"{given.prompts} prompts of 6 tokens, 200 nodes and their edges each, demo model, {os.cpu_count()} cores\n")
    print("| side | loading s | prompts/s | of the loop |\n|---|---|---|---|")
    for name, (loading, rate) in found.items():
        print(f"| {name} | {loading:.1f} | {rate:.1f} | {rate / base:.2f} |")
    one, two = found["run, 1 worker"][1], found["run, 2 workers"][1]
    overhead = base / found["run, 1 worker, prompts one by one"][1] - 1
    print(f"\noverhead of a run over the loop, prompt by prompt: {overhead:+.1%}")
    print(f"efficiency of 2 workers: {two / (2 * one):.2f} of linear")
    if given.rows:
        print()
        here = Path(__file__).parent / "aggregation.py"
        subprocess.run([sys.executable, str(here), "--rows", str(given.rows)], check=True)


def _loop_apart(prompts: int) -> tuple[float, float]:
    """The loop in a process of its own, as a worker is."""
    words = [sys.executable, __file__, "--loop", "--prompts", str(prompts)]
    loading, rate = subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()
    return float(loading), float(rate)


if __name__ == "__main__":
    main()
