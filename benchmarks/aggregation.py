"""Seconds and peak memory of summing a run's tables, of compacting them, and of finding one neuron again.

Seeded random tables of a Llama-3.1-8B (32 layers of 14,336 neurons, some far more frequent than others), 512 neurons a
prompt and 64 prompts a shard, in a temporary folder and in the operating system's cache, as after a run. Every line is
a process of its own; peak memory is the growth of its resident set over the imports.

    python benchmarks/aggregation.py [--rows 10000000] [--edges 10000000] [--memory 1073741824]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import LocalFileSystem

from tracer.store.aggregation import neurons, top_prompts
from tracer.store.compaction import compact, lookup
from tracer.store.edge_means import write_edges_mean
from tracer.store.query import query
from tracer.store.schemas import EDGES, NODES
from tracer.store.storage import Storage

LAYERS, D_MLP, PER_PROMPT, PER_SHARD, LENGTH = 32, 14_336, 512, 64, 32
FS = LocalFileSystem()
LOOKUPS = 50


def make(folder: Path, rows: int, edges: int) -> None:
    """Write the tables: neurons are drawn by a power law."""
    rng = np.random.default_rng(0)
    prompts = rows // PER_PROMPT
    for name in ("nodes", "edges"):
        (folder / name).mkdir()
    words = pa.array([f" word{number}" for number in range(1000)])
    for shard, first in enumerate(range(0, prompts, PER_SHARD)):
        count = min(PER_SHARD, prompts - first)
        size = count * PER_PROMPT
        neuron = (LAYERS * D_MLP * rng.random(size) ** 3).astype(np.int64)
        position = rng.integers(0, LENGTH, size)
        attribution = rng.normal(size=size)
        columns: dict[str, Any] = {
            "prompt_id": np.repeat(np.arange(first, first + count), PER_PROMPT),
            "node_id": np.tile(np.arange(PER_PROMPT), count),
            "kind": pa.array(["neuron"] * size),
            "layer": neuron * 7 % LAYERS,
            "position": position,
            "neuron": neuron // LAYERS,
            "expert": pa.nulls(size, NODES.field("expert").type),
            "token": words.take(pa.array(position * 31 % 1000)),
            **dict.fromkeys(("activation", "attribution", "explained", "influence"), attribution),
            **dict.fromkeys(("gradient", "bias_share"), pa.nulls(size, pa.float32())),
        }
        save(folder / f"nodes/{shard}.parquet", columns, NODES)
        links = edges * count // prompts
        weight = rng.normal(size=links)
        columns = {
            "prompt_id": np.sort(rng.integers(first, first + count, links)),
            **{name: rng.integers(0, PER_PROMPT, links) for name in ("source", "target")},
            **dict.fromkeys(("weight", "share", "attribution"), weight),
        }
        save(folder / f"edges/{shard}.parquet", columns, EDGES)


def save(path: Path, columns: dict[str, Any], schema: pa.Schema) -> None:
    table = pa.table(
        {
            field.name: column.cast(field.type) if isinstance(column := columns[field.name], pa.Array) else
            pa.array(column.astype(field.type.to_pandas_dtype()))
            for field in schema
        },
        schema=schema,
    )  # fmt: skip
    pq.write_table(table, path, compression="zstd")


def tasks(folder: Path, memory: int) -> dict[str, Callable[[], Any]]:
    """What is measured, by name; each gives a note for its line."""
    nodes, edges = (
        sorted(map(str, (folder / name).glob("*")), key=lambda path: int(Path(path).stem))
        for name in ("nodes", "edges")
    )
    place = Storage(folder)
    counted = "SELECT layer, neuron, count(*) AS n, avg(attribution) AS mean FROM nodes GROUP BY ALL"
    return {
        "neurons": lambda: f"{neurons(nodes, FS).num_rows} neurons",
        "top_prompts": lambda: f"{top_prompts(nodes, FS).num_rows} rows",
        "write_edges_mean": lambda: f"{write_edges_mean(nodes, edges, FS, str(folder / 'mean'), memory)} pairs",
        "query (DuckDB)": lambda: f"{query({'nodes': nodes}, FS, counted).num_rows} neurons",
        "compact": lambda: " + ".join(f"{n} {name}" for name, n in compact(nodes, edges, FS, place, memory).items()),
        "lookup": lambda: looked_up(place, "nodes"),
        "lookup of edges": lambda: looked_up(place, "edges"),
    }


def looked_up(place: Storage, table: str) -> str:
    """Milliseconds to find one neuron, the first time in the process and then."""
    rng = np.random.default_rng(1)
    took = []
    for neuron in (LAYERS * D_MLP * rng.random(LOOKUPS) ** 3).astype(np.int64).tolist():
        started = time.perf_counter()
        lookup(place, neuron * 7 % LAYERS, neuron // LAYERS, table)
        took.append(1e3 * (time.perf_counter() - started))
    return f"{median(took):.1f} ms a neuron ({max(took):.1f} the slowest of {LOOKUPS})"


def measure(folder: Path, memory: int, name: str) -> dict[str, Any]:
    """Seconds, MiB by which the resident set grew, and the note of one task."""
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark starts anew
    before, started = status("VmRSS"), time.perf_counter()
    note = tasks(folder, memory)[name]()
    return {"seconds": time.perf_counter() - started, "peak": (status("VmHWM") - before) / 1024, "note": note}


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rows", type=int, default=10**7, help="of the nodes table")
    arguments.add_argument("--edges", type=int, default=10**7, help="rows of the edges table")
    arguments.add_argument("--memory", type=int, default=2**30, help="bytes that edge means and compaction may hold")
    arguments.add_argument("--one", nargs=2, metavar=("FOLDER", "TASK"), help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.one:
        print(json.dumps(measure(Path(options.one[0]), options.memory, options.one[1])))
        return
    with tempfile.TemporaryDirectory(prefix="tracer-aggregation-") as name:
        make(Path(name), options.rows, options.edges)
        print(f"{options.rows} node rows, {options.edges} edge rows, memory={options.memory / 2**20:.0f} MiB")
        print(f"{'':<18}{'s':>7}{'peak MiB':>10}")
        for task in tasks(Path(name), options.memory):
            command = [sys.executable, __file__, "--memory", str(options.memory), "--one", name, task]
            found = json.loads(subprocess.check_output(command, text=True))
            print(f"{task:<18}{found['seconds']:>7.2f}{found['peak']:>10.0f}  {found['note']}", flush=True)


if __name__ == "__main__":
    main()
