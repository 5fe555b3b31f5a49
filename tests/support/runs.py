"""What tests of whole runs share: inputs, what a finished run holds, and drivers in processes of their own."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import children
from inline import InlinePool
from tracer import Run, run
from tracer.store import query
from tracer.store.run_folder import RunFolder

TESTS = Path(__file__).parent
DERIVED = ("neurons.parquet", "edges_mean.parquet", "top_prompts.parquet", "failed.parquet", "circuit.parquet")
VARYING = ["seconds", "attempts"]


def lines(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    """A JSON lines file of prompts."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def tiny(folder: Path, count: int = 12) -> Run:
    """A run of so many prompts by a worker without a model, in a folder whose name looks like a column's."""
    file = lines(folder / "prompts.jsonl", ({"text": f"prompt {number}"} for number in range(count)))
    job = {"kind": "dataset", "input": {"path": file}, "shard_size": 4}
    return run(job, folder / "layer=3" / "run", pool=InlinePool(), factory="fake_runs:Tiny")


def answer(done: Run, table: str, sql: str | None = None) -> Any:
    """What a query says, as the command line asks it."""
    folder = done.folder
    files, _ = folder.tables([table])
    return query.query(files, folder.place.fs, sql or f"FROM {table}").to_pylist()


def flipped(path: Path, bit: int) -> bytes:
    """Flip one bit of a file; what it held before."""
    content = path.read_bytes()
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(changed))
    return content


def tables(address: Any, varying: Sequence[str] = VARYING) -> dict[str, pa.Table]:
    """The committed tables, sorted by prompt; each prompt has one row, and nodes and edges only where it has one."""
    folder = RunFolder(address)
    parts: dict[str, list[pa.Table]] = {}
    for commit in folder.commits():
        assert folder.problems(commit) == []
        for name, file in commit.files.items():
            if name != "means":
                parts.setdefault(name, []).append(folder.read_table(file))
    found = {name: pa.concat_tables(some) for name, some in parts.items()}
    keys = {"prompts": ["prompt_id"], "nodes": ["prompt_id", "node_id"], "edges": ["prompt_id", "source", "target"]}
    keys |= {"values": ["prompt_id", "layer"]}
    found = {name: table.sort_by([(key, "ascending") for key in keys[name]]) for name, table in found.items()}
    n_prompts, _ = folder.count_input()
    assert found["prompts"]["prompt_id"].to_pylist() == list(range(n_prompts)), "a prompt is lost or doubled"
    for name, names in keys.items():
        if name in found:
            assert found[name].group_by(names).aggregate([]).num_rows == found[name].num_rows, f"{name} are doubled"
    found["prompts"] = found["prompts"].drop_columns(list(varying))
    return found


def same(one: Any, other: Any) -> None:
    """Two runs hold the same tables, bit for bit, and the same files made of them."""
    mine, its = tables(one), tables(other)
    assert mine.keys() == its.keys()
    for name in mine:
        assert bits(mine[name]) == bits(its[name]), f"{name} differ"
    left, right = RunFolder(one).place, RunFolder(other).place
    for name in DERIVED:
        assert left.exists(name) == right.exists(name), name
        if left.exists(name) and name != "failed.parquet":
            assert left.read(name) == right.read(name), f"{name} differ"
    assert left.exists("_SUCCESS.json")
    assert right.exists("_SUCCESS.json")


def bits(table: pa.Table) -> bytes:
    """A table as bytes that tell every bit of every float."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks(), max_chunksize=2**20)
    return sink.getvalue().to_pybytes()


def statuses(address: Any) -> dict[str, tuple[str, str | None]]:
    """By the user's id (or number): what became of each prompt, and its error type."""
    return {
        row["user_id"] or str(row["prompt_id"]): (row["status"], row["error_type"])
        for row in tables(address)["prompts"].to_pylist()
    }


def orphans(path: Path) -> set[str]:
    """Files in a run's table folders that no commit names."""
    folder = RunFolder(path)
    named = {file for commit in folder.commits() for file in commit.files.values()}
    there = {found.name for name in ("prompts", "nodes", "edges", "means") for found in folder.place.files(name)}
    return there - named


class Driver:
    """A run in a process of its own, to be killed."""

    def __init__(self, job: dict[str, Any], out: Path, **options: Any) -> None:
        environment = {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        self.process = children.start("driver", json.dumps([job, str(out), options]), env=os.environ | environment)
        self.said: list[str] = []

    def wait_for(self, wanted: Any, seconds: float = 90) -> None:
        """Until a line it prints is the one."""
        end = time.monotonic() + seconds
        while not self.said or not wanted(self.said[-1]):
            self.said.append(children.line(self.process, end - time.monotonic(), "".join(self.said)))

    def committed(self, count: int) -> None:
        """Until so many prompts are committed."""
        self.wait_for(lambda line: line.startswith("done ") and int(line.split()[1]) >= count)

    def end(self, number: int | None = None) -> int:
        """Its exit code, after a signal if one is given."""
        if number is not None:
            self.process.send_signal(number)
        said, _ = self.process.communicate(timeout=90)
        self.said.append(said)
        return self.process.returncode


def rows_of(path: Path) -> int:
    """Rows of a Parquet file."""
    return pq.read_metadata(path).num_rows
