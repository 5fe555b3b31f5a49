"""A circuit on disk is the circuit in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

import s3
import tracer
from helpers import load, refused
from tracer import Circuit, Prompt, RunError
from tracer.circuit.circuit import nodes_table, versions
from tracer.errors import JobError
from tracer.store.one_prompt import read_run, write_run
from tracer.store.run_folder import RunFolder
from tracer.store.schemas import NODES

PROMPT = Prompt("The secretaries near the car", target=" are", foil=[" is", " was"], id="mine")
KINDS: list[tuple[str, Prompt, dict[str, Any]]] = [
    ("llama", PROMPT, {"nodes": 20}),
    ("gpt2", Prompt(token_ids=[1, 20, 30], target=7), {"nodes": None, "mass": 0.3}),
    ("gemma3", Prompt(token_ids=[1, 20, 30]), {"nodes": 5, "exclude": [(0, 3), (1, 4)], "skip_first": True}),
    ("llama", Prompt(token_ids=[1, 20, 30]), {"nodes": 5, "exclude": {(0, 3)}, "threshold": 0.001}),
    ("qwen2", Prompt(token_ids=[1, 20, 30]), {"metric": "topk", "top_k": 3, "basis": "output"}),
    ("llama", Prompt(token_ids=[1, 20], target=7, positions=(0, 1)), {"method": "ig", "steps": 2}),
    ("llama", Prompt(token_ids=[1, 20], target=7, counterfactual=[1, 9]), {"baseline": "counterfactual"}),
    ("llama", Prompt(token_ids=[1, 20], target=7), {"rules": ["norm", "product"], "metric": "logprob"}),
    ("llama", Prompt(token_ids=[1, 20], target=7), {"nodes": 1, "threshold": 1e-9}),
    ("llama", Prompt("The car\n+3 are", target=" are"), {"method": "random", "seed": 4}),
]


@pytest.fixture(scope="module")
def circuit() -> Circuit:
    return tracer.trace(load("llama"), PROMPT, nodes=20)


@pytest.mark.parametrize(("family", "prompt", "how"), KINDS, ids=lambda value: str(value)[:40])
def test_a_saved_circuit_loads_as_an_equal_one(
    family: str, prompt: Prompt, how: dict[str, Any], tmp_path: Path
) -> None:
    made = tracer.trace(load(family), prompt, **how)
    assert made.save(tmp_path / "run") == tmp_path / "run"
    again = Circuit.load(tmp_path / "run")
    assert again.nodes.equals(made.nodes)
    assert again.nodes.schema == NODES
    for name in Circuit.model_fields:
        assert getattr(again, name) == getattr(made, name), name
    assert again == made
    assert again.fingerprint == made.fingerprint
    again.save(tmp_path / "run")
    assert Circuit.load(str(tmp_path / "run")) == made


@pytest.fixture(scope="module")
def store() -> Iterator[s3.Store]:
    with s3.server() as made:
        yield made


def test_a_circuit_in_an_object_store_is_the_one_saved(circuit: Circuit, store: s3.Store) -> None:
    address = store.address()
    assert circuit.save(address) == address
    assert Circuit.load(address) == circuit
    other = tracer.trace(load("llama"), PROMPT, nodes=21, edges=False)
    with refused(RunError, "another run", "overwrite"):
        other.save(address)
    other.save(address, overwrite=True)
    assert Circuit.load(address) == other


def test_the_prompts_table_says_what_was_asked_and_found(circuit: Circuit, tmp_path: Path) -> None:
    circuit.save(tmp_path)
    record, tables = read_run(tmp_path)
    (row,) = tables["prompts"].to_pylist()
    assert row["prompt_id"] == 0
    assert row["user_id"] == "mine"
    assert row["text"] == PROMPT.text
    assert row["token_ids"] == list(circuit.token_ids)
    assert (row["target_ids"], row["foil_ids"]) == (list(circuit.target_ids), list(circuit.foil_ids))
    assert row["metric"] == pytest.approx(circuit.metric)
    assert row["unexplained"] == pytest.approx(circuit.unexplained, abs=1e-9)
    assert (row["n_nodes"], row["n_edges"], row["status"], row["attempts"]) == (20, circuit.n_edges, "ok", 1)
    assert row["error"] is row["error_type"] is None
    assert record["kind"] == "trace"
    assert record["fingerprint"] == circuit.fingerprint
    assert record["packages"] == versions()
    assert record["packages"]["torch"] != "not installed"


def test_the_same_circuit_is_replaced_and_another_refused(circuit: Circuit, tmp_path: Path) -> None:
    circuit.save(tmp_path / "run")
    circuit.save(tmp_path / "run")
    other = tracer.trace(load("llama"), PROMPT, nodes=21)
    with refused(RunError, "another run", "overwrite"):
        other.save(tmp_path / "run")
    assert Circuit.load(tmp_path / "run") == circuit
    other.save(tmp_path / "run", overwrite=True)
    assert Circuit.load(tmp_path / "run") == other


@pytest.mark.parametrize(
    "how",
    [
        {"nodes": 21},
        {"nodes": 20, "skip_first": True},
        {"nodes": 20, "exclude": [(0, 1)]},
        {"nodes": 20, "method": "grad"},
        {"nodes": 20, "basis": "output"},
        {"nodes": 20, "rules": ["norm"]},
        {"nodes": 20, "method": "random", "seed": 1},
    ],
    ids=str,
)
def test_the_fingerprint_changes_with_whatever_decides_the_numbers(circuit: Circuit, how: dict[str, Any]) -> None:
    assert tracer.trace(load("llama"), PROMPT, nodes=20).fingerprint == circuit.fingerprint
    assert tracer.trace(load("llama"), PROMPT, **how).fingerprint != circuit.fingerprint


def test_the_fingerprint_changes_with_the_prompt_and_the_weights(circuit: Circuit) -> None:
    longer = Prompt("The secretaries near the cars", target=" are", foil=[" is", " was"])
    others = [
        tracer.trace(load("llama"), longer, nodes=20),
        tracer.trace(load("llama"), Prompt(PROMPT.text, target=" are", foil=" is"), nodes=20),
        tracer.trace(load("llama", seed=1), PROMPT, nodes=20),
    ]
    assert len({circuit.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_the_fingerprint_changes_with_the_counterfactual_and_the_reference() -> None:
    """They decide the numbers as much as the prompt does: a run of the one must not pass for the other."""
    model = load("llama")
    paired = [
        tracer.trace(model, Prompt(token_ids=[1, 20], target=7, counterfactual=[1, other]), baseline="counterfactual")
        for other in (9, 10)
    ]
    assert paired[0].nodes != paired[1].nodes
    assert paired[0].fingerprint != paired[1].fingerprint
    mean = [
        tracer.trace(
            model, Prompt(token_ids=[1, 20], target=7), baseline="mean", reference=[Prompt(token_ids=[1, other])]
        )
        for other in (9, 10)
    ]
    assert mean[0].nodes != mean[1].nodes
    assert mean[0].fingerprint != mean[1].fingerprint


def test_a_circuit_is_frozen(circuit: Circuit) -> None:
    with pytest.raises(ValidationError):
        circuit.metric = 0.0


def test_to_pandas_has_every_node(circuit: Circuit) -> None:
    nodes, edges = circuit.to_pandas()
    assert nodes.columns.tolist() == [*NODES.names, "name"]
    assert len(nodes) == 20 + len(circuit.token_ids) + 3
    assert len(edges) == circuit.n_edges > 0


def test_counts_are_of_neuron_nodes_alone() -> None:
    rows = {
        "kind": ["neuron", "neuron", "neuron", "embedding", "logit"],
        "layer": [0, 0, 1, -1, 3],
        "position": [0, 1, 1, 0, 1],
        "neuron": [5, 5, 5, 1, 7],
        "token": ["a"] * 5,
        "activation": [1.0, 1.0, 1.0, None, 1.0],
        "attribution": [1.0] * 5,
        "gradient": [None] * 5,
        "explained": [None] * 5,
        "influence": [None] * 5,
        "bias_share": [None] * 5,
    }
    made = tracer.trace(load("llama"), Prompt(token_ids=[1, 20], target=7), nodes=1)
    counted = made.model_copy(update={"nodes": nodes_table(rows)})
    assert counted.nodes.schema == NODES
    assert (counted.n_nodes, counted.n_neurons) == (3, 2)
    assert counted.nodes["node_id"].to_pylist() == [0, 1, 2, 3, 4]


def change_record(folder: Path, **changes: Any) -> None:
    path = folder / "run.json"
    record = json.loads(path.read_text())
    record["circuit"] = {**record["circuit"], **changes}
    del record["digest"]
    path.write_text(json.dumps(record))
    RunFolder(folder).seal()


@pytest.mark.parametrize(
    "changes",
    [
        {"metric": "high"},
        {"settings": {"method": "unknown"}},
        {"model": None},
        {"token_ids": 3},
        {"surprise": 1},
        {"predictions": [{"token": "a"}]},
    ],
    ids=str,
)
def test_a_damaged_record_is_refused(circuit: Circuit, changes: dict[str, Any], tmp_path: Path) -> None:
    circuit.save(tmp_path)
    change_record(tmp_path, **changes)
    with refused(RunError, "run.json", "is damaged"):
        Circuit.load(tmp_path)


@pytest.mark.parametrize("found", [None, 3, [], "text"])
def test_a_record_without_its_circuit_is_refused(circuit: Circuit, found: Any, tmp_path: Path) -> None:
    circuit.save(tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())
    record["circuit"] = found
    (tmp_path / "run.json").write_text(json.dumps(record))
    with refused(RunError, "damaged"):
        Circuit.load(tmp_path)
    del record["circuit"]
    (tmp_path / "run.json").write_text(json.dumps(record))
    with refused(RunError, "damaged"):
        Circuit.load(tmp_path)


def test_a_run_without_nodes_or_of_another_kind_is_no_circuit(circuit: Circuit, tmp_path: Path) -> None:
    circuit.save(tmp_path / "run")
    record, tables = read_run(tmp_path / "run")
    write_run(tmp_path / "job", {**record, "kind": "run"}, tables)
    with refused(RunError, "its kind is"):
        Circuit.load(tmp_path / "job")
    commit = tmp_path / "run" / "_commits" / "0.json"
    content = json.loads(commit.read_text())
    del content["files"]["nodes"]
    commit.write_text(json.dumps(content))
    with refused(RunError, "damaged"):
        Circuit.load(tmp_path / "run")


def test_neurons_parquet_aggregates_the_circuit(circuit: Circuit, tmp_path: Path) -> None:
    circuit.save(tmp_path)
    table = pq.read_table(tmp_path / "neurons.parquet")
    assert table.num_rows == circuit.n_neurons
    assert sum(table["n_occurrences"].to_pylist()) == circuit.n_nodes
    assert pa.types.is_floating(table.schema.field("mean_attribution").type)


def test_two_circuits_with_other_nodes_are_not_equal(circuit: Circuit) -> None:
    assert circuit != circuit.model_copy(update={"nodes": circuit.nodes.slice(0, 3)})


def every_path(circuit: Circuit) -> list[tuple[float, tuple[int, ...]]]:
    """All ways from an embedding to a logit, by walking."""
    kinds = circuit.nodes["kind"].to_pylist()
    attribution = circuit.nodes["attribution"].to_pylist()
    out: dict[int, list[tuple[int, float]]] = {}
    for row in circuit.links.to_pylist() if circuit.links is not None else ():
        out.setdefault(row["source"], []).append((row["target"], row["share"]))
    found: list[tuple[float, tuple[int, ...]]] = []

    def walk(node: int, share: float, way: tuple[int, ...]) -> None:
        if kinds[node] == "logit":
            found.append((share * attribution[node], way))
        for target, mine in out.get(node, ()):
            walk(target, share * mine, (*way, target))

    for node, kind in enumerate(kinds):
        if kind == "embedding":
            walk(node, 1.0, (node,))
    return sorted(found, key=lambda path: -abs(path[0]))


@pytest.mark.parametrize("count", [1, 7, 40])
def test_paths_are_the_strongest_of_all(count: int) -> None:
    circuit = tracer.trace(load("llama"), PROMPT, nodes=25)
    expected = every_path(circuit)[:count]
    found = circuit.paths(count)
    assert [path.attribution for path in found] == pytest.approx([one[0] for one in expected], rel=1e-6)
    assert len({path.nodes for path in found}) == len(found)


def test_edges_spell_out_both_ends(circuit: Circuit) -> None:
    nodes = circuit.nodes.to_pylist()
    for row in circuit.edges.to_pylist():
        for end in ("source", "target"):
            for name in ("kind", "layer", "position", "neuron"):
                assert row[f"{end}_{name}"] == nodes[row[end]][name]
        assert row["source_layer"] < row["target_layer"]
        assert row["source_position"] <= row["target_position"]


def test_shares_and_attributions_of_edges_follow_from_the_tables(circuit: Circuit) -> None:
    nodes = circuit.nodes.to_pylist()
    for row in circuit.edges.to_pylist():
        target = nodes[row["target"]]
        assert row["share"] == pytest.approx(row["weight"] / target["activation"], rel=1e-6)
        assert row["attribution"] == pytest.approx(row["share"] * target["attribution"], rel=1e-5)
        assert abs(row["share"]) >= 0.01 - 1e-7


def test_explained_is_the_kept_part_of_all_incoming_weight(circuit: Circuit) -> None:
    whole = tracer.trace(load("llama"), PROMPT, nodes=circuit.n_total, pruning=tracer.Pruning(share=0.0))
    assert [value for value in whole.nodes["explained"].to_pylist() if value is not None] == pytest.approx(
        [1.0] * sum(kind != "embedding" for kind in whole.nodes["kind"].to_pylist()), rel=5e-3
    )  # some nodes' weights cancel to a thousandth of what they are


def test_without_edges_asking_for_them_is_refused() -> None:
    bare = tracer.trace(load("llama"), PROMPT, nodes=5, edges=False)
    for ask in (lambda: bare.edges, bare.paths, bare.to_networkx):
        with refused(JobError, "without edges"):
            ask()


def test_networkx_has_every_node_and_edge(circuit: Circuit) -> None:
    graph = circuit.to_networkx()
    assert (graph.number_of_nodes(), graph.number_of_edges()) == (circuit.nodes.num_rows, circuit.n_edges)
    row = circuit.links.to_pylist()[0] if circuit.links is not None else {}
    assert graph.edges[row["source"], row["target"]]["weight"] == row["weight"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("positions", [77]), ("target_ids", [5]), ("tokens", ["a"]), ("token_ids", [1, 2]), ("metric", "high")],
)
def test_a_record_that_does_not_fit_its_tables_is_refused(
    circuit: Circuit, tmp_path: Path, field: str, value: object
) -> None:
    circuit.save(tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    record = json.loads(path.read_text())
    record["circuit"][field] = value
    path.write_text(json.dumps(record))
    with refused(RunError, "damaged"):
        Circuit.load(tmp_path / "run")


def test_a_prompt_on_which_nothing_is_kept_is_refused() -> None:
    with refused(JobError, "no node is kept", "lower the threshold"):
        tracer.trace(load("llama"), PROMPT, threshold=1e9)


def test_the_record_says_which_rules_were_in_force() -> None:
    """Defaults are written out: a run is repeated from its record, not from the defaults of the day."""
    given = tracer.trace(load("llama"), PROMPT, nodes=200, pruning=tracer.Pruning(share=0.01))
    default = tracer.trace(load("llama"), PROMPT)
    assert default.selection["nodes"] == 200
    assert default.selection["pruning"]["share"] == 0.01
    assert default.selection == given.selection
    assert default.fingerprint == given.fingerprint
    assert tracer.trace(load("llama"), PROMPT, mass=0.5).selection["nodes"] is None
