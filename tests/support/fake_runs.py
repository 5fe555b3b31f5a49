"""Workers for tests of whole runs, named to `run(..., factory="fake_runs:Tiny")`; prompts misbehave by their id.

`Tiny` has no model: it writes a few rows for each prompt, which are a function of its text alone. `Hungry` does so in
batches, and needs memory for them. `Faulty` is the real worker. An id that begins with one of these makes its prompt
so: raise, kill (SIGKILL, every time), hang, slow (50 ms each), once-kill and once-hang (the first time only:
FAKE_RUNS_STATE is a folder that remembers).
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from faulty import MODEL
from tracer.batching import chunked
from tracer.runs.workers.messages import Beat, Part, Report, Setup, Task
from tracer.store import schemas
from tracer.store.run_folder import RunFolder


def misbehave(user_id: str | None) -> None:
    """Do as the id says."""
    how = (user_id or "").split("/")[0]
    if how.startswith("once-"):
        mark = Path(os.environ["FAKE_RUNS_STATE"]) / (user_id or "").replace("/", "-")
        if mark.exists():
            return
        mark.touch()
        how = how.removeprefix("once-")
    if how == "raise" and not os.environ.get("FAKE_RUNS_MENDED"):
        raise ValueError("raised by a prompt")
    if how == "kill" and not os.environ.get("FAKE_RUNS_MENDED"):
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hang" and not os.environ.get("FAKE_RUNS_MENDED"):
        time.sleep(3600)
    if how == "slow":
        time.sleep(0.05)


class Faulty:
    """The real worker, in which `trace_all` misbehaves first."""

    def __init__(self, setup: Setup) -> None:
        from tracer.runs import worker
        from tracer.runs.units import shards

        plain = shards.trace_all

        def trace_all(model: Any, prompts: Sequence[Any], **options: Any) -> Any:
            for prompt in prompts:
                misbehave(prompt.id)
            return plain(model, prompts, **options)

        shards.trace_all = trace_all
        self._worker = worker.Worker(setup)
        self.model, self.max_bytes = self._worker.model, self._worker.max_bytes

    def work(self, task: Task, began: Beat) -> Report:
        return self._worker.work(task, began)


class Tiny:
    """A worker without a model, one prompt after the other."""

    model = MODEL.model_copy(update={"n_layers": 2})  # as many as its graphs have
    max_bytes = 1 << 20

    def __init__(self, setup: Setup) -> None:
        self.folder, self.edges = RunFolder(setup.folder), setup.job["edges"]

    def work(self, task: Task, began: Beat) -> Report:
        if task.finish:
            return Report(unit=task.unit, outcome={"quality": [{"prompt_id": 0}]})
        rows, kept = self.folder.read_input(task.unit), {name: list[Any]() for name in ("prompts", "nodes", "edges")}
        if task.only is not None:
            rows = [row for row in rows if row["prompt_id"] in task.only]
            for name, file in task.files.items():
                table = self.folder.read_table(file).to_pylist()
                kept[name] = [row for row in table if row["prompt_id"] not in task.only]
        for row in rows:
            if row["prompt_id"] not in task.quarantined:
                began((row["prompt_id"],), len(kept["prompts"]))
            self._add(kept, row, task)
        began((), len(kept["prompts"]))
        return self._written(task, kept)

    def _add(self, kept: dict[str, list[Any]], row: dict[str, Any], task: Task) -> None:
        """What becomes of one prompt."""
        number, why = row["prompt_id"], task.quarantined.get(row["prompt_id"])
        status, error = ("ok", (None, None)) if why is None else ("quarantined", why)
        if why is None:
            try:
                misbehave(row["user_id"])
            except ValueError as caught:
                status, error = "failed", ("ValueError", str(caught))
        nodes, edges = graph(number, row["text"]) if status == "ok" else ([], [])
        kept["nodes"] += nodes
        kept["edges"] += edges
        empty = dict.fromkeys(schemas.PROMPTS.names)
        told = {"status": status, "error_type": error[0], "error": error[1], "attempts": task.attempt}
        same = {name: row[name] for name in ("prompt_id", "user_id", "text", "labels")}
        kept["prompts"].append(empty | same | told | {"n_nodes": len(nodes), "n_edges": len(edges), "metric": 1.0})

    def _written(self, task: Task, kept: dict[str, list[Any]]) -> Report:
        files = {}
        for name, rows in kept.items():
            if name != "edges" or self.edges:
                rows.sort(key=lambda row: row["prompt_id"])
                table = pa.Table.from_pylist(rows, schemas.SCHEMAS[name])
                files[name] = self.folder.write_shard(name, task.unit, table, schemas.SCHEMAS[name])
        statuses = Counter(row["status"] for row in kept["prompts"])
        errors = Counter(row["error_type"] for row in kept["prompts"] if row["error_type"])
        return Report(unit=task.unit, files=files, statuses=dict(statuses), errors=dict(errors))


class Hungry(Tiny):
    """Works on a shard as two batches, or in halves of them as it is told, and is killed (SIGKILL) by one of more
    prompts than FAKE_RUNS_HOLDS says that memory holds, of which the second part is of the second batch: ``96 0``.
    Keeps what it has done after every batch."""

    def work(self, task: Task, began: Beat) -> Report:
        kept = {name: [] for name in ("prompts", "nodes", "edges")}
        for part in task.parts:
            for name, file in part.files.items():
                kept[name] += self.folder.read_table(file.name).to_pylist()
        done = {row["prompt_id"] for row in kept["prompts"]}
        most, holds = task.most | dict.fromkeys(task.quarantined, 1), os.environ["FAKE_RUNS_HOLDS"].split()
        rows = self.folder.read_input(task.unit)
        both = [list(halved(half, most, task.batch)) for half in chunked(rows, (len(rows) + 1) // 2)]
        for room, batch in [(int(holds[i % len(holds)]), batch) for i, part in enumerate(both) for batch in part]:
            if {row["prompt_id"] for row in batch} <= done:
                continue
            named = {row["prompt_id"] for row in batch} - task.quarantined.keys()
            if named:
                began(sorted(named), len(kept["prompts"]))
            if len(named) > room:
                os.kill(os.getpid(), signal.SIGKILL)
            made = {name: list[Any]() for name in kept}
            for row in batch:
                self._add(made, row, task)
            certain = made | {"prompts": [row for row in made["prompts"] if row["status"] != "quarantined"]}
            part = Part(files=self._written(task, certain).files)
            for name, rows in made.items():
                kept[name] += rows
            began((), len(kept["prompts"]), part=part)
        return self._written(task, kept)


def halved(batch: list[dict[str, Any]], most: dict[int, int], size: int | None) -> Iterator[list[dict[str, Any]]]:
    """As the real worker does it."""
    if len(batch) <= min(most.get(row["prompt_id"], size or len(batch)) for row in batch):
        yield batch
    else:
        for half in chunked(batch, (len(batch) + 1) // 2):
            yield from halved(half, most, size)


def graph(number: int, text: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A neuron, another one, and an edge between them."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    nodes = [
        dict.fromkeys(schemas.NODES.names)
        | {"prompt_id": number, "node_id": node, "kind": "neuron", "layer": node, "position": 0}
        | {"neuron": seed % 7 + node, "token": "x", "activation": 1.0, "attribution": (seed % 1000) / 999}
        for node in range(2)
    ]
    edge = {"prompt_id": number, "source": 0, "target": 1, "weight": 0.5, "share": 0.5, "attribution": seed / 2**33}
    return nodes, [edge]
