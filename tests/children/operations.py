"""A run that dies before one of its file operations, each of them once, and is then gone on with: PATH WHAT STEP FIRST.

Everything is imported once, and each run is a fork. WHAT: run, grow, retry, or parts (the real worker, which keeps what
it has done of a shard). Of all operations every STEP-th is met, from FIRST on. Prints one JSON record of the harm.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import fake_runs  # noqa: F401  imported once
import runs
from inline import InlinePool
from tracer.runs.driver import run
from tracer.runs.units import shards
from tracer.store.storage import Storage

warnings.simplefilter("ignore")
torch.set_num_threads(1)
path, what, step, first = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
left = [1 << 60]
seen = [0]


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Python says so before it opens a file to write, renames, removes or makes anything."""
    if event == "open":
        counts = isinstance(arguments[2], int) and bool(arguments[2] & WRITES)
    else:
        counts = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
    if counts and str(path / "out") in str(arguments[0]):
        operation()


def operation() -> None:
    seen[0] += 1
    if seen[0] > left[0]:
        os._exit(9)


remove = Storage.remove


def removed(self: Storage, name: str) -> None:
    """Arrow removes files without a word."""
    if self.exists(name):
        operation()
    remove(self, name)


Storage.remove = removed  # type: ignore[method-assign]
sys.addaudithook(watch)


def forked(work: Callable[[], None], dies: int = 1 << 60) -> tuple[int, int]:
    """The exit code of some work in a process of its own, and how many operations it made."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            left[0] = dies
            work()
            code = 0
        except BaseException:  # noqa: BLE001  told to the parent, which counts it
            os.write(2, traceback.format_exc().encode())
        finally:
            os.write(writing, str(seen[0]).encode())
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as told:
        count = told.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), int(count or 0)


if what == "parts":  # loaded once
    from tracer.ndif import probe
    from tracer.runs.units import dataset_circuit  # noqa: F401

    model = probe.load("demo", device="cpu")
    probe.load = lambda *_, **__: model  # type: ignore[assignment]
COUNT = 10
QUESTION = {"target": " is", "foil": " are"}
FACTORY = "tracer.runs.worker:Worker" if what == "parts" else "fake_runs:Tiny"


def job(limit: int | None = None) -> dict[str, Any]:
    rows = [
        {"id": f"raise/{n}" if n in (2, 5) else f"p/{n}", **QUESTION, "text": f"the author {n}"} for n in range(COUNT)
    ]
    made = {"kind": "dataset", "input": {"path": runs.lines(path / "prompts.jsonl", rows)}, "shard_size": 4}
    made |= {"nodes": 5, "batch": 1, "circuit": "free"} if what == "parts" else {}
    return made | ({"limit": limit} if limit else {})


def whole(out: Path, **options: Any) -> None:
    shards.KEPT_EVERY, shards.KEPT_AFTER_DEATH, shards.KEPT_SHARE = 0.0, 0.0, 1e9
    run(job(), out, pool=InlinePool(), factory=FACTORY, **options)


def prepared(out: Path) -> None:
    """What was there before."""
    if what == "grow":
        run(job(6), out, pool=InlinePool(), factory=FACTORY)
    elif what == "retry":
        whole(out)


def attacked(out: Path) -> None:
    if what == "retry":
        os.environ["FAKE_RUNS_MENDED"] = "1"
    whole(out, retry_failed=what == "retry")


def main() -> dict[str, Any]:
    tally: dict[str, Any] = {"tried": 0, "lost": 0, "silent": 0, "tracebacks": 0, "worst": ""}
    clean = path / "out-clean"
    forked(lambda: prepared(clean))
    code, count = forked(lambda: attacked(clean))
    assert code == 0
    assert count > 10, count
    tally["operations"] = count
    for at in range(first, count, step):
        out = path / f"out-{at}"
        forked(lambda out=out: prepared(out))
        code, _ = forked(lambda out=out: attacked(out), at)
        assert code == 9, (code, at)
        tally["tried"] += 1
        code, _ = forked(lambda out=out: attacked(out))
        if code:
            tally["tracebacks"] += 1
            tally["worst"] = f"operation {at}: ended with {code}"
            continue
        try:
            runs.same(out, clean)
            assert runs.orphans(out) == set(), "files are left over"
        except AssertionError as error:
            tally["lost" if "lost" in str(error) else "silent"] += 1
            tally["worst"] = f"operation {at}: {error}"
    return tally


print(json.dumps(main()))
