"""Attribution profiles with the neurons that they are of: what supernodes are compared by.

Knows how a circuit's profiles, or those of a run over many prompts, are joined with their nodes. Refuses to know how
profiles are computed (attribution/profiles.py) and what is made of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tracer.circuit.circuit import Traced, load_graph
from tracer.errors import JobError, RunError, option, quoted
from tracer.store import one_prompt
from tracer.store.run_folder import RunFolder
from tracer.store.schemas import NODES, PROFILES

_OF_NODES = ("layer", "position", "neuron", "activation")
SCHEMA = pa.schema(
    [
        PROFILES.field("prompt_id"),
        PROFILES.field("node_id"),
        *(NODES.field(name) for name in ("layer", "position", "neuron")),
        ("polarity", pa.int8()),
        PROFILES.field("input"),
        PROFILES.field("output"),
        ("n_tokens", pa.int32()),
    ]
)
"""A row for each neuron node of each prompt, prompts in order, the strongest node first. The polarity is the sign of
the neuron's value, 1 of zero; `input` has `n_tokens` numbers, those of a prompt."""


def read(source: Any) -> pa.Table:
    """The profiles of a circuit, or of all prompts of a run, each with its neuron: a table in `SCHEMA`.

    Args:
        source: a circuit or graph of one prompt; or the folder of a run of one prompt, which is number 0, or of many
            (a path, ``s3://`` or ``gs://``), whose committed prompts are read.

    Raises:
        JobError: a circuit that was traced without profiles. RunError: no run there, one without profiles, or a damaged
            one.
    """
    return pa.concat_tables(parts(source))


def parts(source: Any) -> Iterator[pa.Table]:
    """The same as `read`, a table for each unit of a run: what need not be held at a time."""
    if isinstance(source, Traced):
        if source.profiles is None:
            step = f"trace it again with {option('profiles', True)}"
            raise JobError("circuit", "was traced without attribution profiles", step)
        return iter([_joined(source.nodes, source.profiles)])
    if one_prompt.read_record(source).get("kind") != "dataset":
        graph = load_graph(source)
        if not isinstance(graph, Traced) or graph.profiles is None:
            step = f"trace the prompt again with {option('profiles', True)}"
            raise RunError(f"run {quoted(str(source), 300)}", "has no attribution profiles", step)
        return iter([_joined(graph.nodes, graph.profiles)])
    return _of_run(RunFolder(source))


def _of_run(folder: RunFolder) -> Iterator[pa.Table]:
    """The profiles of the prompts of a run that are committed, unit by unit."""
    found = False
    for commit in folder.commits():
        if "profiles" in commit.files:
            found = True
            nodes = folder.read_committed(commit, "nodes", ["prompt_id", "node_id", "kind", *_OF_NODES])
            yield _joined(nodes, folder.read_committed(commit, "profiles"))
    if not found:
        value, rule = f"run {quoted(str(folder.place), 300)}", "has no attribution profiles"
        raise RunError(value, rule, "run the job with profiles: true, into another folder")


def _joined(nodes: pa.Table, profiles: pa.Table) -> pa.Table:
    """Profiles with their neurons, both in the order of prompts and nodes, as they are stored."""
    neurons = nodes.filter(pc.field("kind") == "neuron")
    if not all(neurons[name].equals(profiles[name]) for name in ("prompt_id", "node_id")):
        raise RunError("the table profiles", "is not of the neurons in the table nodes", "it is damaged: run it again")
    columns: dict[str, Any] = {name: neurons[name] for name in ("prompt_id", "node_id", "layer", "position", "neuron")}
    columns["polarity"] = np.where(neurons["activation"].to_numpy() < 0, -1, 1)
    columns |= {name: profiles[name] for name in ("input", "output")}
    columns["n_tokens"] = profiles["input"].combine_chunks().value_lengths()
    return pa.table(columns).cast(SCHEMA)
