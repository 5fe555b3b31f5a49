"""Profiles joined with their neurons: of a circuit, of a saved one, and of a run over many prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest

import tracer
from helpers import refused
from inline import InlinePool
from tracer.circuit.circuit import profiles_table
from tracer.circuit.from_run import graph_of
from tracer.errors import JobError, RunError
from tracer.meaning import profiles
from tracer.store.query import query
from tracer.store.run_folder import RunFolder

PARENTS = tracer.Prompt("The parents near the boy", target=" are", foil=" is")


def job(**more: Any) -> dict[str, Any]:
    source = {"task": "sva", "structure": "nounpp", "count": 5}
    return {"kind": "dataset", "input": source, "nodes": 8, "shard_size": 2, "edges": False, "profiles": True, **more}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tracer.Run:
    return tracer.run(job(), tmp_path_factory.mktemp("run"), pool=InlinePool())


def test_a_circuits_profiles_have_their_neurons(tmp_path: Path) -> None:
    circuit = tracer.trace(tracer.load("demo"), PARENTS, nodes=15, profiles=True)
    found = profiles.read(circuit)
    assert found.schema.equals(profiles.SCHEMA)
    for row, node in zip(found.to_pylist(), circuit.rows("neuron"), strict=True):
        assert all(row[name] == node[name] for name in ("node_id", "layer", "position", "neuron"))
        assert row["polarity"] == (-1 if node["activation"] < 0 else 1)
        assert (row["n_tokens"], len(row["input"]), len(row["output"])) == (len(circuit.tokens), len(circuit.tokens), 2)
        assert not any(row["input"][node["position"] + 1 :])
        assert sum(row["input"]) == pytest.approx(node["activation"], rel=1e-4, abs=1e-5)
        assert row["output"][0] - row["output"][1] == pytest.approx(node["attribution"], rel=1e-4, abs=1e-5)
    circuit.save(tmp_path / "one")
    assert profiles.read(tmp_path / "one").equals(found)


def test_a_runs_profiles_are_those_of_each_prompt(run: tracer.Run) -> None:
    found, model = profiles.read(run.address), tracer.load("demo")
    assert found["prompt_id"].to_pylist() == [prompt for prompt in range(5) for _ in range(8)]
    for row in run.table("prompts").to_pylist():
        prompt = tracer.Prompt(token_ids=row["token_ids"], target=row["target_ids"], foil=row["foil_ids"])
        wanted = profiles.read(tracer.trace(model, prompt, nodes=8, edges=False, profiles=True)).to_pylist()
        mine = found.filter(pc.field("prompt_id") == row["prompt_id"]).to_pylist()
        for one, other in zip(mine, wanted, strict=True):
            assert [one[name] for name in ("layer", "position", "neuron")] == [
                other[name] for name in ("layer", "position", "neuron")
            ]
            for side in ("input", "output"):
                assert one[side] == pytest.approx(other[side], rel=1e-4, abs=1e-5)
    graph = graph_of(run.address, 3)
    assert profiles.read(graph)["input"].to_pylist() == found["input"].to_pylist()[24:32]


def test_a_query_reads_profiles(run: tracer.Run) -> None:
    files, _ = RunFolder(run.address).tables(["nodes", "profiles"])
    sql = "select count(*) as n, min(len(output)) as logits from nodes join profiles using (prompt_id, node_id)"
    assert query(files, RunFolder(run.address).place.fs, sql).to_pylist() == [{"n": 40, "logits": 2}]


def test_what_has_no_profiles_says_so(tmp_path: Path) -> None:
    circuit = tracer.trace(tracer.load("demo"), PARENTS, nodes=5, edges=False)
    with refused(JobError, "without attribution profiles", "profiles=True"):
        profiles.read(circuit)
    circuit.save(tmp_path / "one")
    with refused(RunError, "has no attribution profiles", "profiles=True"):
        profiles.read(tmp_path / "one")
    tracer.run(job(profiles=False, limit=1), tmp_path / "many", pool=InlinePool())
    with refused(RunError, "has no attribution profiles", "profiles: true"):
        profiles.read(tmp_path / "many")


def test_a_damaged_profile_is_no_circuit(tmp_path: Path) -> None:
    circuit = tracer.trace(tracer.load("demo"), PARENTS, nodes=5, edges=False, profiles=True)
    assert circuit.profiles is not None
    inputs, outputs = (circuit.profiles[name].to_pylist() for name in ("input", "output"))
    wrong = profiles_table(range(5), inputs, [[2 * value for value in row] for row in outputs])
    circuit.model_copy(update={"profiles": wrong}).save(tmp_path / "one")
    with refused(RunError, "is not its attribution"):
        tracer.Circuit.load(tmp_path / "one")
