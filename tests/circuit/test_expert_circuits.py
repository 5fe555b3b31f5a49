"""Neurons of experts in circuits, tables, exports, files of groups and on the page: everywhere the same neuron."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import networkx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

import tracer
from helpers import refused
from mixtures import D_EXPERT, FAMILIES, N_EXPERTS, N_USED, mixture
from tracer import Circuit, JobError, Prompt, RunError
from tracer.circuit import supernodes_file
from tracer.circuit.exchange import export, import_graph
from tracer.circuit.identities import broken
from tracer.circuit.neuronpedia import to_neuronpedia
from tracer.cli.app import app
from tracer.reports import sheet, tables

PROMPT = Prompt("the car near the keys", target=" are", foil=" is")


@pytest.fixture(scope="module", params=FAMILIES)
def circuit(request: pytest.FixtureRequest) -> Circuit:
    return tracer.trace(mixture(request.param), PROMPT, nodes=40)


def experts(circuit: Circuit) -> list[dict[str, Any]]:
    """The nodes of experts."""
    return [row for row in circuit.rows("neuron") if row["expert"] is not None]


def name(row: dict[str, Any]) -> str:
    """By hand: the name of an expert's neuron."""
    return f"L{row['layer']} E{row['neuron'] // D_EXPERT} N{row['neuron'] % D_EXPERT}"


def test_nodes_say_their_expert_and_dense_layers_none(circuit: Circuit) -> None:
    assert experts(circuit)
    dense = circuit.model.family == "qwen3_moe"
    for row in circuit.rows("neuron"):
        wanted = None if dense and row["layer"] == 0 else row["neuron"] // D_EXPERT
        assert row["expert"] == wanted
    assert all(row["expert"] is None for kind in ("embedding", "logit") for row in circuit.rows(kind))
    per_token = (48 if dense else N_USED * D_EXPERT) + 2 * N_USED * D_EXPERT
    assert circuit.n_total == per_token * len(circuit.tokens)
    (shape,) = circuit.model.experts
    assert (shape.n_experts, shape.d_expert, shape.d_shared) == (N_EXPERTS, D_EXPERT, 0)
    assert shape.layers == ((1, 2) if dense else (0, 1, 2))


def test_an_expert_that_is_not_its_neurons_is_no_circuit(circuit: Circuit) -> None:
    column = circuit.nodes.schema.get_field_index("expert")
    other = [None if one is None else (one + 1) % N_EXPERTS for one in circuit.nodes["expert"].to_pylist()]
    field = circuit.nodes.schema.field(column)
    changed = circuit.nodes.set_column(column, field, pa.array(other, field.type))
    assert broken(circuit) is None
    assert broken(circuit.model_copy(update={"nodes": changed})) == (
        "a node's expert is not the one that its neuron belongs to"
    )


def test_a_saved_circuit_comes_back_and_neurons_say_their_expert(circuit: Circuit, tmp_path: Path) -> None:
    circuit.save(tmp_path / "run")
    assert Circuit.load(tmp_path / "run") == circuit
    found = pq.read_table(tmp_path / "run" / "neurons.parquet").to_pylist()
    wanted = {(row["layer"], row["neuron"]): row["expert"] for row in circuit.rows("neuron")}
    assert {(row["layer"], row["neuron"]): row["expert"] for row in found} == wanted


def test_exports_name_the_experts_and_come_back(circuit: Circuit, tmp_path: Path) -> None:
    again = import_graph(export(circuit, tmp_path / "graph.json").files[0])
    assert again == circuit
    content = to_neuronpedia(circuit)
    for row, node in zip(circuit.nodes.to_pylist(), content["nodes"], strict=True):
        if row["kind"] == "neuron":
            assert node["tracer"].get("expert") == row["expert"]
            assert node["clerp"].startswith(f"L{row['layer']} N{row['neuron']}" if row["expert"] is None else name(row))
    content["metadata"]["tracer"]["metric"] = 1.0
    other = tracer.circuit.exchange.from_neuronpedia(content)  # edited, so that it is no circuit of ours
    assert type(other) is tracer.Graph
    assert other.nodes["expert"].to_pylist() == circuit.nodes["expert"].to_pylist()
    made: Any = networkx.read_graphml(export(circuit, tmp_path / "graph.graphml", "graphml").files[0])
    row = experts(circuit)[0]
    node = made.nodes[str(row["node_id"])]
    assert (int(node["expert"]), node["name"]) == (row["expert"], name(row))
    lines = export(circuit, tmp_path / "g.csv", "csv").files[0].read_text().splitlines()
    assert "expert" in lines[0].split(",")


def test_a_file_with_an_expert_that_cannot_be_is_refused(circuit: Circuit) -> None:
    for wrong in (-1, 2**31, "1", 1.5):
        content = to_neuronpedia(circuit)
        content["nodes"][0]["tracer"]["expert"] = wrong
        with refused(RunError, "breaks the schema"):
            tracer.circuit.exchange.from_neuronpedia(content)


def test_tables_name_the_expert(circuit: Circuit) -> None:
    row, shown = experts(circuit)[0], sheet.nodes(circuit, 40)
    assert [cells[2] for cells in shown.rows][row["node_id"]] == name(row).partition(" ")[2]
    assert any(name(row) in str(cells) for cells in sheet.edges(circuit, 500).rows)


def test_the_page_knows_the_experts(circuit: Circuit) -> None:
    page = tables.graph_page(circuit)
    found = re.search(r'<script type="application/json" id="header">(.*?)</script>', page, re.S)
    assert found is not None
    wanted = [[row["node_id"], row["expert"], row["neuron"] % D_EXPERT] for row in experts(circuit)]
    assert json.loads(found[1])["experts"] == wanted


def test_groups_take_neurons_by_their_experts(circuit: Circuit, tmp_path: Path) -> None:
    row = experts(circuit)[0]
    place = {"layer": row["layer"], "position": row["position"]}
    inside = row["neuron"] % D_EXPERT
    forms: list[dict[str, Any]] = [
        {"neuron": row["neuron"]},
        {"neuron": f"E{row['expert']} N{inside}"},
        {"neuron": f"{row['expert']}:{inside}"},
        {"neuron": inside, "expert": row["expert"]},
        {"neuron": row["neuron"], "expert": row["expert"]},
    ]
    for form in forms:
        content = {"format": "tracer-supernodes", "version": 1, "groups": [{"name": "x", "nodes": [place | form]}]}
        found = supernodes_file.parsed(json.dumps(content).encode())
        assert supernodes_file.apply(found, circuit).groups == {"x": (row["node_id"],)}
        assert supernodes_file.parsed(supernodes_file.encoded(found)) == found
    plain = supernodes_file.of_graph(circuit.model_copy(update={"groups": {"x": (row["node_id"],)}}))
    assert b"expert" not in supernodes_file.encoded(plain)
    wrong = {"neuron": 0, "expert": N_EXPERTS}
    content = {"format": "tracer-supernodes", "version": 1, "groups": [{"name": "x", "nodes": [place | wrong]}]}
    with refused(RunError, f"L{row['layer']} E{N_EXPERTS} N0", f"the layer has {N_EXPERTS} experts"):
        supernodes_file.apply(supernodes_file.parsed(json.dumps(content).encode()), circuit)


def test_a_model_without_experts_refuses_them() -> None:
    demo = tracer.load("demo")
    with refused(JobError, "layer 1 has no experts", "leave the expert out"):
        tracer.steer(demo, ["L1 E2 N3"], Prompt("The car"), factor=0)
    found = CliRunner().invoke(app, ["neuron", "1", "2:3"])
    assert (found.exit_code, "layer 1 has no experts" in found.output) == (2, True)
    found = CliRunner().invoke(app, ["trace", "The car", "--exclude", "1:2:3"])
    assert (found.exit_code, "layer 1 has no experts" in found.output) == (2, True)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_an_experts_neuron_are_those_of_its_own_weights(family: str) -> None:
    model, (layer, expert, inside) = mixture(family), (2, 5, 7)
    module = model.module
    block, norm = module.model.layers[layer], module.model.norm.weight
    held = block.mlp.experts
    transposed = family == "gpt_oss"
    down = held.down_proj[expert][inside] if transposed else held.down_proj[expert][:, inside]
    effect = module.lm_head.weight @ (norm * down)
    embedded = module.model.embed_tokens.weight
    entered = embedded * (embedded.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    if transposed:
        both = entered * block.post_attention_layernorm.weight @ held.gate_up_proj[expert]
        both = both + held.gate_up_proj_bias[expert]
        gate, up = both[:, 2 * inside].clamp(max=7), both[:, 2 * inside + 1].clamp(-7, 7)
        value = gate * (1.702 * gate).sigmoid() * (up + 1)
    else:
        both = entered * block.post_attention_layernorm.weight @ held.gate_up_proj[expert].T
        value = torch.nn.functional.silu(both[:, inside]) * both[:, D_EXPERT + inside]
    (found,) = tracer.neuron_tokens(model, [(layer, expert * D_EXPERT + inside, 1)], 5)
    wanted = effect.topk(5)
    assert [one.token_id for one in found.promoted] == wanted.indices.tolist()
    assert [one.value for one in found.promoted] == pytest.approx(wanted.values.tolist(), rel=1e-4)
    top = zip(value.topk(5).indices.tolist(), value.topk(5).values.tolist(), strict=True)
    driven = [(at, one) for at, one in top if one > 0]
    assert [one.token_id for one in found.driven_by] == [at for at, _ in driven]
    assert [one.value for one in found.driven_by] == pytest.approx([one for _, one in driven], rel=1e-3)
