"""What neurons say goes with a circuit: saved, shown, drawn, exported; and never decides what the circuit is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import tracer
from helpers import refused
from tracer.circuit.circuit import Circuit
from tracer.circuit.from_run import read_graph
from tracer.circuit.said import Key, Said, words
from tracer.cli.app import app
from tracer.errors import RunError
from tracer.reports import tables
from tracer.store.parquet import encoded
from tracer.store.schemas import DESCRIPTIONS, TOKENS

ASKED = ["the capital of the state containing Dallas is", "--target", " Austin", "--foil", " Saint"]
HOSTILE = "</script><img src=x onerror=alert(1)>\u202e\x1b[31m"


@pytest.fixture(scope="module")
def plain() -> Circuit:
    prompt = tracer.Prompt(ASKED[0], target=" Austin", foil=" Saint")
    return tracer.trace(tracer.load("demo"), prompt, nodes=30)


@pytest.fixture(scope="module")
def circuit(plain: Circuit) -> Circuit:
    return tracer.with_tokens(tracer.load("demo"), plain, 5, driven=True)


def strongest(circuit: Circuit) -> dict[str, Any]:
    return circuit.neurons.slice(0, 1).to_pylist()[0]


def described(circuit: Circuit, text: str) -> pa.Table:
    row = strongest(circuit)
    sign = 1 if row["activation"] >= 0 else -1
    names = {"layer": row["layer"], "neuron": row["neuron"], "polarity": sign, "description": text}
    return pa.Table.from_pylist([names | {"score": None, "source": "test"}], schema=DESCRIPTIONS)


def test_tokens_are_saved_and_come_back_and_decide_nothing(tmp_path: Path, plain: Circuit, circuit: Circuit) -> None:
    assert circuit.fingerprint == plain.fingerprint
    plain.save(tmp_path / "a")
    assert not (tmp_path / "a" / "tokens.parquet").exists()
    assert Circuit.load(tmp_path / "a") == plain
    circuit.save(tmp_path / "a")  # the same circuit: in its own place
    back = Circuit.load(tmp_path / "a")
    assert back == circuit
    assert back.neuron_tokens is not None
    assert back.neuron_tokens.schema == TOKENS
    assert len(Said.of(back).tokens) == back.neuron_tokens.num_rows > 20
    plain.save(tmp_path / "a")
    assert Circuit.load(tmp_path / "a").neuron_tokens is None


def test_a_damaged_table_is_said_to_be(tmp_path: Path, circuit: Circuit) -> None:
    circuit.save(tmp_path / "a")
    (tmp_path / "a" / "tokens.parquet").write_bytes(b"PAR1")
    with refused(RunError, "tokens.parquet"):
        read_graph(tmp_path / "a")
    circuit.save(tmp_path / "c")
    assert circuit.neuron_tokens is not None
    rows = circuit.neuron_tokens.to_pylist()
    rows[0]["promoted_values"].pop()
    (tmp_path / "c" / "_SUCCESS.json").unlink()
    (tmp_path / "c" / "tokens.parquet").write_bytes(encoded(pa.Table.from_pylist(rows, schema=TOKENS)))
    with refused(RunError, "do not fit together", "remove it"):
        read_graph(tmp_path / "c")
    circuit.save(tmp_path / "b")
    (tmp_path / "b" / "descriptions.parquet").write_bytes(encoded(pa.table({"layer": [1]})))
    with refused(RunError, "descriptions.parquet", "is damaged", "remove it"):
        read_graph(tmp_path / "b")


def test_a_description_is_preferred(tmp_path: Path, circuit: Circuit) -> None:
    circuit.save(tmp_path / "a")
    pq.write_table(described(circuit, "names Texas"), tmp_path / "a" / "descriptions.parquet")
    back = Circuit.load(tmp_path / "a")
    row = strongest(back)
    sign = "+" if row["activation"] >= 0 else "-"
    assert Said.of(back).name(row) == f"L{row['layer']} N{row['neuron']}{sign}: names Texas"
    content = tracer.export(back, tmp_path / "a.json").files[0].read_text()
    assert f"N{row['neuron']}{sign}: names Texas" in content
    assert "names Texas" in tables.graph_page(back)
    assert "names Texas" in CliRunner().invoke(app, ["show", str(tmp_path / "a")]).output


def test_names_in_exports_are_what_neurons_say(tmp_path: Path, plain: Circuit, circuit: Circuit) -> None:
    tracer.export(circuit, tmp_path / "a.json")
    content = json.loads((tmp_path / "a.json").read_text())
    names = {node["clerp"] for node in content["nodes"] if node["feature_type"] == "cross layer transcoder"}
    assert any(" says " in name and "Texas" in name for name in names)
    back = tracer.import_graph(tmp_path / "a.json")
    assert back == circuit
    assert back != plain
    tracer.export(circuit, tmp_path / "a.graphml", "graphml")
    assert "Texas" in (tmp_path / "a.graphml").read_text()


def test_of_a_node_without_activation_both_polarities_are_said() -> None:
    rows = [
        {"layer": 1, "neuron": 2, "polarity": 1, "promoted": [" a", "a", "\n", " b"]},
        {"layer": 1, "neuron": 2, "polarity": -1, "promoted": [" c"]},
    ]
    said = Said(pa.Table.from_pylist(rows, schema=TOKENS))
    node = {"layer": 1, "neuron": 2, "activation": None}
    assert said.label(node) == "+ a, b; - c"
    assert said.name(node) == "L1 N2: + a, b; - c"
    assert said.name(node | {"activation": -0.5}) == "L1 N2- says c"
    assert said.name(node | {"neuron": 3}) == "L1 N3"
    assert said.label(node | {"activation": 0.0}) == "a, b"
    assert Key(1, 2, 1) in said.tokens
    assert words(None) == ""


def test_a_hostile_token_is_text_everywhere(tmp_path: Path, circuit: Circuit) -> None:
    assert circuit.neuron_tokens is not None
    rows = circuit.neuron_tokens.to_pylist()
    for row in rows:
        row["promoted"][0] = HOSTILE
    hostile = circuit.model_copy(update={"neuron_tokens": pa.Table.from_pylist(rows, schema=TOKENS)})
    page = tables.graph_page(hostile)
    assert "onerror=alert" in page
    assert "<img src=x" not in page
    assert page.count("</script>") == tables.graph_page(circuit).count("</script>")
    hostile.save(tmp_path / "a")
    shown = CliRunner().invoke(app, ["show", str(tmp_path / "a")]).output
    assert "\\x1b[31m" in shown
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    for form, name in (("neuronpedia", "a.json"), ("graphml", "a.graphml"), ("csv", "a.csv")):
        tracer.export(hostile, tmp_path / name, form)


def test_the_verb_reads_tokens_unless_told_not_to(tmp_path: Path) -> None:
    run = CliRunner()
    done = run.invoke(app, ["trace", *ASKED, "--nodes", "12", "--rows", "3"])
    assert "promotes" in done.output
    assert done.output.count("Texas") >= 1
    folder = str(tmp_path / "a")
    done = run.invoke(app, ["trace", *ASKED, "--nodes", "12", "--rows", "3", "--out", folder])
    assert done.exit_code == 0
    assert read_graph(folder).neuron_tokens.num_rows == 12  # type: ignore[union-attr]
    done = run.invoke(app, ["trace", *ASKED, "--nodes", "12", "--no-tokens", "--out", folder])
    assert "promotes" not in done.output
    assert read_graph(folder).neuron_tokens is None
    content = json.loads(run.invoke(app, ["trace", *ASKED, "--nodes", "4", "--format", "json"]).stdout)
    assert len(content["neuron_tokens"]) == 4
