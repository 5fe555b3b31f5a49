"""One prompt's graph out of a run over many: its rows of the nodes and edges tables, as a `Graph`.

Knows which unit holds a prompt. Refuses to know how graphs are shown. A run's tables hold no predictions and no checks
of single prompts, so that this is a graph to look at, draw and export; `tracer trace` makes a whole circuit.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tracer.circuit.circuit import Graph
from tracer.errors import JobError, RunError, option, quoted
from tracer.store.run_folder import RunFolder


def graph_of(address: Any, prompt_id: int) -> Graph:
    """The graph of one prompt of a dataset run.

    Args:
        prompt_id: as in the prompts table, from 0.

    Raises:
        JobError: no such prompt, or one without a result. RunError: no such run, or one that has not come that far.
    """
    folder = RunFolder(address)
    record = folder.record()
    if record is None or record.get("kind") != "dataset":
        rule = "holds no run of a dataset"
        raise RunError(
            f"folder {quoted(str(folder.place), 300)}", rule, f"leave out {option('prompt')}, or give another folder"
        )
    count = int(record["n_prompts"])
    if not 0 <= prompt_id < count:
        raise JobError(f"prompt {prompt_id}", f"the run has prompts 0 to {count - 1}", "choose one of them")
    unit = prompt_id // int(record["job"]["shard_size"])
    commit = folder.find(unit)
    if commit is None:
        raise RunError(f"prompt {prompt_id}", "is not done yet", "wait, or repeat the run command")
    rows = {name: _rows(folder.read_committed(commit, name), prompt_id) for name in commit.files if name != "means"}
    prompt = rows["prompts"].to_pylist()[0]
    if prompt["status"] != "ok":
        raise JobError(f"prompt {prompt_id}", f"{prompt['status']} ({prompt['error']})", "choose one that went well")
    nodes = rows["nodes"]
    tokens = nodes.filter(pc.field("kind") == "embedding").sort_by("position")["token"].to_pylist()
    return Graph(
        nodes=_own(nodes),
        links=_own(rows["edges"]) if "edges" in rows else None,
        text=prompt["text"],
        tokens=tuple(tokens),
        n_layers=int(record["model"]["n_layers"]),
        notes={"run": str(folder.place), "prompt_id": prompt_id, "user_id": prompt["user_id"]},
    )


def _rows(table: pa.Table, prompt_id: int) -> pa.Table:
    return table.filter(pc.field("prompt_id") == prompt_id)


def _own(table: pa.Table) -> pa.Table:
    """As the tables of a single prompt are: it is number 0."""
    return table.set_column(0, "prompt_id", pa.array([0] * table.num_rows, pa.int64())).combine_chunks()
