"""Processes that are forked while others compute (multiprocessing's way on Linux): each works or says a line."""

from __future__ import annotations

import json
import subprocess

import pytest

import children
from tally import Attack, Tally

BUSY = "was in use by another thread when this process was forked; load the model in this process"
NO_THREADS = "there are no 2 threads of torch in it; call torch.set_num_threads(1)"


def counted(tally: Tally, threads: int, count: int, *scenarios: str) -> dict[str, tuple[int, list[str]]]:
    """By scenario, of so many forked processes each: how many worked, and the lines of the others."""
    command = children.command("forks", threads, count, *scenarios, warnings="ignore")
    limit = 60 + 16 * 2 * count * len(scenarios)
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    assert done.returncode == 0, done.stderr
    told = {}
    for found in map(json.loads, done.stdout.splitlines()):
        name, lines = found.pop("scenario"), found.pop("lines")
        told[name] = found.get("worked", 0), lines
        tally.tried += sum(found.values())
        tally.hung += found.get("hung", 0)
        tally.silent += found.get("silent", 0)
        tally.tracebacks += found.get("traceback", 0)
        if set(found) - {"worked", "said"}:
            tally.worst = f"{name}: {found} {lines}"[:500]
    return told


@pytest.mark.parametrize("count", [4, pytest.param(60, marks=[pytest.mark.slow, pytest.mark.long])])
def test_a_fork_while_another_thread_computes(attack: Attack, count: int) -> None:
    """In the middle of a pass, or while a lock is held: of a model, of a reference's means, of a client."""
    with attack("forks while others compute") as tally:
        told = counted(tally, 1, count, "tracing", "held", "means", "server")
        assert told["tracing"][0] >= count // 2
        assert told["held"][0] == count
        assert told["means"] == told["server"] == (count, [])
        assert [BUSY in line for line in told["held"][1]] == [True]
        assert all(BUSY in line for line in told["tracing"][1])


@pytest.mark.slow
@pytest.mark.long
def test_torchs_threads_stay_behind(attack: Attack) -> None:
    """A forked process has one thread; where it asks for more, it is told instead of waiting for them."""
    with attack("forks without torch's threads") as tally:
        told = counted(tally, 2, 2, "threads", "threads_again")
        assert told["threads"] == (2, [])
        assert [NO_THREADS in line for line in told["threads_again"][1]] == [True]
