"""Whatever breaks while tables are read, no thread that read ahead is left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow.fs import LocalFileSystem

from inline import InlinePool
from runs import lines
from tally import Attack
from tracer import run
from tracer.errors import TracerError
from tracer.store import aggregation, compaction, edge_means
from tracer.store.storage import Storage

READERS: dict[str, Callable[[list[str], list[str], Path], Any]] = {
    "neurons": lambda nodes, _edges, _out: aggregation.neurons(nodes, LocalFileSystem()),
    "top prompts": lambda nodes, _edges, _out: aggregation.top_prompts(nodes, LocalFileSystem()),
    "edge means": lambda nodes, edges, out: edge_means.write_edges_mean(nodes, edges, LocalFileSystem(), str(out)),
    "compact": lambda nodes, edges, out: compaction.compact(nodes, edges, LocalFileSystem(), Storage(str(out))),
}


def readers_alive() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("tracer-read")]


def test_no_thread_outlives_a_read_that_broke(attack: Attack, tmp_path: Path) -> None:
    file = lines(tmp_path / "prompts.jsonl", ({"text": f"prompt {number}"} for number in range(40)))
    job = {"kind": "dataset", "input": {"path": file}, "shard_size": 4}
    folder = run(job, tmp_path / "run", pool=InlinePool(), factory="fake_runs:Tiny").folder
    tables, _ = folder.tables(["nodes", "edges"])
    with attack("tables that break while they are read") as tally:
        for name, read in READERS.items():
            for table in ("nodes", "edges"):
                for broken in range(0, 10, 3):
                    files = {one: list(paths) for one, paths in tables.items()}
                    if broken >= len(files[table]):
                        continue
                    bad = tmp_path / "bad.parquet"
                    bad.write_bytes(b"PAR1" + b"\x00" * 64 + b"PAR1")
                    files[table][broken] = str(bad)
                    tally.tried += 1
                    error: Exception | None = None
                    try:
                        read(files["nodes"], files["edges"], tmp_path / f"out-{tally.tried}")
                    except (TracerError, pa.ArrowException) as caught:
                        error = caught  # which keeps the frames, and what they own, alive
                    if left := readers_alive():
                        tally.hung += 1
                        tally.worst = f"{name}, {table}: {left}"
                    assert error is not None or table == "edges"


@pytest.mark.parametrize("reader", [*READERS])
def test_a_read_that_ends_leaves_no_thread(reader: str, tmp_path: Path) -> None:
    file = lines(tmp_path / "prompts.jsonl", ({"text": f"prompt {number}"} for number in range(8)))
    job = {"kind": "dataset", "input": {"path": file}, "shard_size": 4}
    tables, _ = run(job, tmp_path / "run", pool=InlinePool(), factory="fake_runs:Tiny").folder.tables(
        ["nodes", "edges"]
    )
    READERS[reader](list(tables["nodes"]), list(tables["edges"]), tmp_path / "out")
    assert readers_alive() == []
