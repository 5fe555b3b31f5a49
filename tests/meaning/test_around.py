"""What folders know of a graph's neurons: which texts are kept, whose they must be, and which neurons are always on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from typer.testing import CliRunner

import described
import tracer
from helpers import refused
from tracer.circuit.circuit import Circuit, Graph
from tracer.circuit.said import Key, key_of
from tracer.cli.app import app
from tracer.errors import JobError, RunError
from tracer.meaning import around as module
from tracer.meaning.around import QUANTILES, TOPS, around
from tracer.reports import tables
from tracer.store import one_prompt, schemas
from tracer.store.run_folder import RunFolder


@pytest.fixture(scope="module")
def circuit() -> Circuit:
    prompt = tracer.Prompt("the capital of the state containing Dallas is", target=" Austin", foil=" Saint")
    return tracer.trace(tracer.load("demo"), prompt, nodes=12)


def keys(graph: Graph) -> list[Key]:
    """Its neurons with the sign of each node's value, strongest first."""
    return list(dict.fromkeys(key for row in graph.rows("neuron") for key in key_of(row)))


def collected(folder: Path, circuit: Circuit, of: list[Key], **record: Any) -> Path:
    """A run of exemplars by hand: of each neuron ten texts, with the other sign's as well."""
    both = [Key(key.layer, key.neuron, sign) for key in of for sign in (1, -1)]
    rows = [row for key in dict.fromkeys(both) for row in described.exemplars(*key)]
    prompts = pa.Table.from_pylist([{"prompt_id": 0, "text": "x", "status": "ok"}], schemas.PROMPTS)
    made = {"kind": "exemplars", "fingerprint": "f", "model": circuit.model.model_dump(mode="json")} | record
    made |= {"job": {}, "numbers": {}, "input": "x", "n_prompts": 1, "n_units": 1, "packages": {}}
    one_prompt.write_run(folder, made, {"prompts": prompts, "nodes": schemas.NODES.empty_table()})
    run = RunFolder(folder)
    run.write_table("exemplars.parquet", pa.Table.from_pylist(rows, schemas.EXEMPLARS))
    run.reseal(["exemplars.parquet"])
    return folder


def test_texts_are_those_of_each_nodes_sign_and_the_rest_is_counted(circuit: Circuit, tmp_path: Path) -> None:
    of = keys(circuit)
    found = around(circuit, collected=collected(tmp_path / "texts", circuit, of[:4]))
    assert list(found.texts) == of[:4]
    assert found.left_out == 0
    for key, texts in found.texts.items():
        written = described.exemplars(*key)
        kinds = Counter(one.kind for one in texts.kept)
        assert kinds == {"top": TOPS, "q90": 1, "q50": 1}
        assert kinds.total() <= TOPS + QUANTILES
        assert len(texts.kept) + texts.more == len(written)
        tops = sorted((row["value"] for row in written if row["kind"] == "top"), key=lambda value: -abs(value))
        assert [one.value for one in texts.kept[:TOPS]] == pytest.approx(tops[:TOPS])
        assert all(one.value * key.polarity > 0 for one in texts.kept)


def test_where_there_is_no_room_the_strongest_neurons_have_texts(
    circuit: Circuit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = keys(circuit)
    monkeypatch.setattr(module, "MOST", 2 * (TOPS + QUANTILES))
    folder = collected(tmp_path / "texts", circuit, of)
    found = around(circuit, collected=folder)
    assert list(found.texts) == of[: len(found.texts)]
    assert 2 <= len(found.texts) < len(of)
    assert found.left_out == len(of) - len(found.texts)
    about = tables.payload(circuit, found).settings
    assert about["texts"] == f"of the strongest neurons alone; those of {found.left_out} others are left out"


def test_texts_of_another_model_or_for_no_model_are_refused(circuit: Circuit, tmp_path: Path) -> None:
    other = circuit.model.model_copy(update={"fingerprint": "0" * 64, "name": "other"})
    folder = collected(tmp_path / "other", circuit, keys(circuit), model=other.model_dump(mode="json"))
    with refused(JobError, "another model (other"):
        around(circuit, collected=folder)
    plain = Graph(nodes=circuit.nodes, text="x", tokens=circuit.tokens, n_layers=circuit.n_layers)
    mine = collected(tmp_path / "mine", circuit, keys(circuit))
    with refused(JobError, "which this graph's nodes are not"):
        around(plain, collected=mine)
    nothing = collected(tmp_path / "nothing", circuit, keys(circuit))
    (nothing / "exemplars.parquet").unlink()
    with refused(RunError, "holds no exemplars.parquet"):
        around(circuit, collected=nothing)
    silent = collected(tmp_path / "silent", circuit, keys(circuit), model=None)
    with refused(RunError, "do not say of which model"):
        around(circuit, collected=silent)


def test_always_on_neurons_are_those_of_notes_record_and_evaluation(circuit: Circuit, tmp_path: Path) -> None:
    assert around(circuit).always_on is None
    assert tables.payload(circuit).nodes.always_on is None
    first, second = keys(circuit)[:2]
    one = {"layer": first.layer, "neuron": first.neuron, "share": 0.9, "attribution": 0.5, "exact": 0.01, "spread": 0.1}
    noted = circuit.model_copy(update={"notes": {"always_on": {"prompts": 5, "neurons": [one]}}})
    assert set(around(noted).always_on or {}) == {(first.layer, first.neuron)}
    circuit.save(tmp_path / "run")
    other = one | {"layer": second.layer, "neuron": second.neuron, "n_nodes": 1}
    evaluation = tmp_path / "run" / "evaluation.json"
    evaluation.write_text(json.dumps({"always_on": [other]}))
    found = around(noted, tmp_path / "run")
    assert set(found.always_on or {}) == {(key.layer, key.neuron) for key in (first, second)}
    rows = tables.payload(noted, found).nodes.always_on
    expected = [
        at
        for at, row in enumerate(noted.nodes.to_pylist())
        if row["kind"] == "neuron" and (row["layer"], row["neuron"]) in {first[:2], second[:2]}
    ]
    assert sorted(rows or {}) == expected
    assert set((rows or {}).values()) == {(0.9, 0.5, 0.01)}
    kept = {"always_on": {"prompts": 9, "of": "prompts of the run", "neurons": [other]}, "kind": "dataset"}
    dataset = collected(tmp_path / "dataset", circuit, keys(circuit)[:1], **kept)
    assert set(around(circuit, dataset).always_on or {}) == {(second.layer, second.neuron)}
    evaluation.write_text(json.dumps({"always_on": None}))
    assert around(circuit, tmp_path / "run").always_on is None
    for wrong in ([{"layer": 0}], [other | {"share": float("nan")}], [other | {"neuron": "x"}], 7):
        evaluation.write_text(json.dumps({"always_on": wrong}))
        with pytest.warns(UserWarning, match=r"always-on neurons of evaluation\.json are not shown"):
            assert around(circuit, tmp_path / "run").always_on is None
        graph = circuit.model_copy(update={"notes": {"always_on": {"prompts": 5, "neurons": wrong}}})
        with refused(RunError, "it is damaged"):
            around(graph)


def test_the_page_has_the_texts_and_one_entry_for_a_neuron(circuit: Circuit, tmp_path: Path) -> None:
    circuit.save(tmp_path / "run")
    texts = collected(tmp_path / "texts", circuit, keys(circuit))
    out = tmp_path / "page.html"
    said = CliRunner().invoke(app, ["view", str(tmp_path / "run"), "--exemplars", str(texts), "--out", str(out)])
    assert said.exit_code == 0, said.output
    text = out.read_text(encoding="utf-8")
    header = json.loads(text.split('id="header">', 1)[1].split("</script>", 1)[0])
    neurons = circuit.rows("neuron")
    assert [row for row, _ in header["saysOf"]] == [row["node_id"] for row in neurons]
    assert len(header["says"]) == len(keys(circuit))
    for row, at in header["saysOf"]:
        key = key_of(neurons[row])[0]
        first = header["says"][at]["texts"][0]
        written = described.exemplars(*key)[0]
        assert first[:3] == ["top", written["document"], pytest.approx(written["value"], rel=1e-2)]
        shaded = [value if value * key.polarity > 0 else 0 for value in written["values"]]
        assert first[4] == pytest.approx(shaded, rel=1e-2)
        assert first[3] == written["tokens"]
    wrong = CliRunner().invoke(app, ["view", str(tmp_path / "run"), "--exemplars", str(tmp_path / "run")])
    assert wrong.exit_code == 2
    assert "holds no exemplars.parquet" in wrong.output


def test_descriptions_keep_their_score_and_source(circuit: Circuit) -> None:
    first, second, *_ = keys(circuit)
    rows = [
        {**first._asdict(), "description": "worse", "score": 0.1, "source": "a"},
        {**first._asdict(), "description": "better", "score": 0.6, "source": "b"},
        {**second._asdict(), "description": "no number", "score": float("nan"), "source": None},
    ]
    made = circuit.model_copy(update={"descriptions": pa.Table.from_pylist(rows, schemas.DESCRIPTIONS)})
    said = tables.payload(made).nodes.says
    described_as = {one.text: (one.score, one.source) for says in said.values() for one in says.descriptions}
    assert described_as == {"better": (pytest.approx(0.6), "b"), "no number": (None, "")}
