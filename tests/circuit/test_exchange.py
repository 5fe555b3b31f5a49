"""Neuronpedia files out and in, validated both ways; nothing half imported."""

from __future__ import annotations

import copy
import csv
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tracer
from edits import Content, drop, put
from tracer.circuit.circuit import Circuit, Graph, load_graph
from tracer.circuit.exchange import (
    cantor,
    export,
    from_neuronpedia,
    import_graph,
    to_neuronpedia,
    uncantor,
)
from tracer.errors import JobError, RunError


@pytest.fixture(scope="module")
def circuit() -> Circuit:
    prompt = tracer.Prompt(
        "The keys near the cabinet", target=[" are", " were"], foil=[" is", " was"], positions=[-1, 3]
    )
    return tracer.trace(tracer.load("demo"), prompt, nodes=60)


@pytest.fixture
def content(circuit: Circuit) -> Content:
    return copy.deepcopy(to_neuronpedia(circuit))


@pytest.fixture
def foreign(content: Content) -> Content:
    """The file as a tool that knows nothing of tracer would have written it."""
    del content["metadata"]["tracer"]
    for node in content["nodes"]:
        del node["tracer"]
    return content


@pytest.mark.parametrize("options", [{}, {"basis": "output"}, {"method": "grad", "metric": "logit"}, {"top": 3}])
def test_export_then_import_is_the_same_circuit(tmp_path: Path, options: dict[str, Any]) -> None:
    foil = None if "metric" in options or "top" in options else " is"
    prompt = tracer.Prompt("The keys near the cabinet", target=None if "top" in options else " are", foil=foil)
    if options.pop("top", None):
        options |= {"metric": "topk", "top_k": 3}
    circuit = tracer.trace(tracer.load("demo"), prompt, nodes=40, **options)
    done = export(circuit, tmp_path / "graph.json")
    found = import_graph(done.files[0])
    assert isinstance(found, Circuit)
    assert found.nodes.equals(circuit.nodes)
    assert found.links is not None
    assert found.links.equals(circuit.links)
    assert found == circuit
    assert found.fingerprint == circuit.fingerprint
    assert any("share" in lost for lost in done.lost)


def test_facts_of_the_format(circuit: Circuit, content: Content) -> None:
    assert set(content) == {"metadata", "qParams", "nodes", "links"}
    assert content["metadata"]["schema_version"] == 1
    assert content["metadata"]["prompt_tokens"] == list(circuit.tokens)
    assert content["qParams"]["linkType"] == "both"
    rows = circuit.nodes.to_pylist()
    for row, node in zip(rows, content["nodes"], strict=True):
        if row["kind"] == "neuron":
            assert node["node_id"] == f"{row['layer']}_{row['neuron']}_{row['position']}"
            assert uncantor(node["feature"]) == (row["layer"], row["neuron"])
            assert node["feature_type"] == "cross layer transcoder"
        elif row["kind"] == "embedding":
            assert node["node_id"] == f"E_{row['neuron']}_{row['position']}"
            assert node["layer"] == "E"
        else:
            assert node["layer"] == str(circuit.n_layers + 1)
            assert node["is_target_logit"] == (row["token"] in (" are", " were"))
            assert node["clerp"].startswith(f'Output "{row["token"]}" (p=')
            assert 0 < node["token_prob"] < 1


def test_probabilities_of_logits_are_the_models(circuit: Circuit, content: Content) -> None:
    import torch

    model = tracer.load("demo")
    probabilities = torch.softmax(model.module(input_ids=torch.tensor([circuit.token_ids])).logits[0], -1)
    for node in content["nodes"]:
        if node["feature_type"] == "logit":
            expected = float(probabilities[node["ctx_idx"], node["feature"]])
            assert node["token_prob"] == pytest.approx(expected, rel=1e-4)


def test_influence_is_cumulative_for_the_pages_threshold(content: Content) -> None:
    values = sorted(node["influence"] for node in content["nodes"] if node["feature_type"] != "logit")
    assert all(node["influence"] is None for node in content["nodes"] if node["feature_type"] == "logit")
    assert values[-1] == pytest.approx(1)
    assert values[0] > 0


def test_a_foreign_file_is_a_graph_with_notes(circuit: Circuit, foreign: Content) -> None:
    graph = from_neuronpedia(foreign, "theirs.json")
    assert type(graph) is Graph
    assert graph.n_layers == circuit.n_layers
    assert graph.links is not None
    assert circuit.links is not None
    names = ("source", "target", "weight", "share")
    found, expected = (
        sorted(zip(*(table[name].to_pylist() for name in names), strict=True)) for table in (graph.links, circuit.links)
    )
    assert found == expected
    weights = [abs(weight) for weight in graph.links["weight"].to_pylist()]
    assert weights == sorted(weights, reverse=True), "strongest first"
    assert graph.links["attribution"].null_count == graph.n_edges
    assert graph.notes["file"] == "theirs.json"
    for name in ("kind", "layer", "position", "neuron", "token", "activation"):
        assert graph.nodes[name].equals(circuit.nodes[name]), name


def test_a_foreign_graph_is_saved_and_read_back(foreign: Content, tmp_path: Path) -> None:
    graph = from_neuronpedia(foreign)
    graph.save(tmp_path / "run")
    assert load_graph(tmp_path / "run") == graph
    with pytest.raises(RunError, match="imported graph"):
        Circuit.load(tmp_path / "run")
    assert from_neuronpedia(to_neuronpedia(graph)).nodes["layer"].equals(graph.nodes["layer"])


def test_ids_of_another_form_are_read_from_the_feature_number(foreign: Content) -> None:
    renamed = {node["node_id"]: f"n{i}" for i, node in enumerate(foreign["nodes"]) if "cross" in node["feature_type"]}
    expected = from_neuronpedia(copy.deepcopy(foreign)).nodes
    for node in foreign["nodes"]:
        node["node_id"] = renamed.get(node["node_id"], node["node_id"])
    for link in foreign["links"]:
        link["source"], link["target"] = (renamed.get(link[end], link[end]) for end in ("source", "target"))
    found = from_neuronpedia(foreign).nodes
    assert found["neuron"].equals(expected["neuron"])
    assert found["layer"].equals(expected["layer"])


def test_error_nodes_are_kept(foreign: Content) -> None:
    foreign["nodes"].append(
        {"node_id": "1_-1_2", "feature": -1, "layer": "1", "ctx_idx": 2, "feature_type": "mlp reconstruction error",
         "jsNodeId": "x", "clerp": ""}
    )  # fmt: skip
    assert from_neuronpedia(foreign).rows("error")[0]["layer"] == 1


def test_supernodes_travel(circuit: Circuit) -> None:
    grouped = circuit.model_copy(update={"groups": {"plural": (0, 2), "rest": (1,)}})
    found = from_neuronpedia(to_neuronpedia(grouped))
    assert found.groups == grouped.groups


DAMAGED = {
    "no nodes": (drop("nodes"), "schema"),
    "no links": (drop("links"), "schema"),
    "no metadata": (drop("metadata"), "schema"),
    "no qParams": (drop("qParams"), "schema"),
    "no slug": (drop("metadata", "slug"), "schema"),
    "no prompt tokens": (drop("metadata", "prompt_tokens"), "schema"),
    "empty nodes": (put([], "nodes"), "schema"),
    "a node without id": (drop("nodes", 0, "node_id"), "schema"),
    "a node without position": (drop("nodes", 0, "ctx_idx"), "schema"),
    "a link without weight": (drop("links", 0, "weight"), "schema"),
    "a weight that is text": (put("strong", "links", 0, "weight"), "schema"),
    "a weight that is not a number": (put(float("nan"), "links", 0, "weight"), "finite"),
    "an unknown source": (put("9_9_9", "links", 0, "source"), "unknown node '9_9_9'"),
    "a position beyond the prompt": (lambda content: content["metadata"]["prompt_tokens"].pop(), "beyond"),
    "an unknown node in a supernode": (put([["g", "nobody"]], "qParams", "supernodes"), "unknown node"),
    "a position that its id contradicts": (put(2, "nodes", 0, "ctx_idx"), "contradicts"),
    "a layer that its id contradicts": (put("9", "nodes", 0, "layer"), "contradicts"),
    "a number no model has": (put("1_99999999999_5", "nodes", 0, "node_id"), "contradicts|out of any"),
    "an activation beyond float32": (put(1e300, "nodes", 0, "activation"), "float32"),
    "half a character": (put("\ud800", "metadata", "prompt"), "surrogate"),
    "a link that does not rise": (
        lambda content: content["links"].append(
            {"source": content["nodes"][-1]["node_id"], "target": content["nodes"][0]["node_id"], "weight": 1.0}
        ),
        "rise",
    ),
    "a node twice": (lambda content: content["nodes"].append(content["nodes"][0]), "twice"),
    "a link twice": (lambda content: content["links"].append(content["links"][0]), "twice"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_refused_whole(case: str, content: Content) -> None:
    change, rule = DAMAGED[case]
    change(content)
    with pytest.raises(RunError, match=rule) as caught:
        from_neuronpedia(content)
    assert "\n" not in str(caught.value)


def test_two_ids_for_one_place_are_refused(foreign: Content) -> None:
    twin = foreign["nodes"][0] | {"node_id": "another"}
    foreign["nodes"].append(twin)
    with pytest.raises(RunError, match="two nodes"):
        from_neuronpedia(foreign)


@pytest.mark.parametrize(
    ("text", "rule"), [("", "not JSON"), ("[1, 2]", "schema"), ("{", "not JSON"), ('"a"', "schema")]
)
def test_a_file_that_is_no_graph_is_refused(text: str, rule: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(RunError, match=rule):
        import_graph(tmp_path / "x.json")


def test_a_file_that_is_too_large_is_refused_unread(circuit: Circuit, tmp_path: Path) -> None:
    export(circuit, tmp_path / "g.json")
    with pytest.raises(RunError, match="larger than"):
        import_graph(tmp_path / "g.json", max_bytes=1000)
    with pytest.raises(RunError, match="cannot be read"):
        import_graph(tmp_path / "nowhere.json")


def test_a_circuit_without_edges_is_not_exported_as_a_graph(tmp_path: Path) -> None:
    bare = tracer.trace(tracer.load("demo"), tracer.Prompt("The parents"), nodes=5, edges=False)
    with pytest.raises(JobError, match="without edges"):
        export(bare, tmp_path / "g.json")
    assert not (tmp_path / "g.json").exists()
    with pytest.raises(JobError, match="format"):
        export(bare, tmp_path / "g.json", format="svg")


def test_mib_scores_are_the_summed_attributions(circuit: Circuit, tmp_path: Path) -> None:
    content = json.loads(export(circuit, tmp_path / "m.json", "mib").files[0].read_text())
    frame = circuit.neurons.to_pandas().groupby("layer")["attribution"].sum()
    assert set(content["nodes"]) == {f"m{layer}" for layer in range(4)}
    for layer, score in frame.items():
        assert content["nodes"][f"m{layer}"]["score"] == pytest.approx(score, rel=1e-4)


def test_graphml_and_csv_hold_every_node_and_edge(circuit: Circuit, tmp_path: Path) -> None:
    graph = networkx.read_graphml(export(circuit, tmp_path / "g.graphml", "graphml").files[0])
    assert (graph.number_of_nodes(), graph.number_of_edges()) == (circuit.nodes.num_rows, circuit.n_edges)
    nodes, edges = export(circuit, tmp_path / "g.csv", "csv").files
    with nodes.open() as file:
        assert len(list(csv.DictReader(file))) == circuit.nodes.num_rows
    with edges.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == circuit.n_edges
    assert {"source_layer", "target_neuron", "weight", "share", "attribution"} <= set(rows[0])


@given(st.integers(0, 400), st.integers(0, 200_000))
def test_cantor_round_trip(layer: int, neuron: int) -> None:
    assert uncantor(cantor(layer, neuron)) == (layer, neuron)


@pytest.fixture
def theirs(foreign: Content) -> Content:
    """A file as circuit-tracer writes it: error nodes, logits without values, influence of its own."""
    for node in foreign["nodes"]:
        if node["feature_type"] == "logit":
            node["activation"] = None
    error = {"feature": -1, "feature_type": "mlp reconstruction error", "jsNodeId": "x", "clerp": "", "influence": 0.5}
    foreign["nodes"] += [
        error | {"node_id": "1_-1_2", "layer": "1", "ctx_idx": 2},
        error | {"node_id": "0_2_4x", "layer": "2", "ctx_idx": 4, "jsNodeId": "y"},
    ]
    logit = next(node["node_id"] for node in foreign["nodes"] if node["feature_type"] == "logit")
    foreign["links"].append({"source": "1_-1_2", "target": logit, "weight": 0.25})
    foreign["qParams"]["supernodes"] = [["same", "1_-1_2"], ["same", logit]]
    return foreign


def test_what_circuit_tracer_writes_can_be_seen_and_exported(theirs: Content, tmp_path: Path) -> None:
    graph = from_neuronpedia(copy.deepcopy(theirs), "theirs.json")
    assert [(row["layer"], row["neuron"]) for row in graph.rows("error")] == [(1, -1), (2, -1)]
    assert set(graph.groups) == {"same", "same (2)"}
    assert tracer.view(graph, tmp_path / "page.html").stat().st_size > 100_000
    for form in ("graphml", "csv"):
        export(graph, tmp_path / f"g.{form}", form)
    with pytest.raises(JobError, match="share"):
        graph.paths()
    graph.save(tmp_path / "run")
    assert load_graph(tmp_path / "run") == graph


def test_a_foreign_graph_is_exported_as_it_came(theirs: Content) -> None:
    again = to_neuronpedia(from_neuronpedia(copy.deepcopy(theirs)))
    assert again["nodes"] == theirs["nodes"]
    assert again["metadata"] == theirs["metadata"]
    key = lambda link: (link["source"], link["target"])  # noqa: E731
    assert sorted(again["links"], key=key) == sorted(theirs["links"], key=key)


def test_our_file_edited_is_no_circuit_any_more(circuit: Circuit, content: Content) -> None:
    content["nodes"][0]["activation"] += 1.0
    graph = from_neuronpedia(content)
    assert type(graph) is Graph
    assert "edited" in graph.notes
    assert isinstance(from_neuronpedia(to_neuronpedia(circuit)), Circuit)


EDITS: dict[str, Callable[[Content], Any]] = {
    "metric": put(9.5, "metadata", "tracer", "metric"),
    "method": put("grad", "metadata", "tracer", "settings", "method"),
    "no method": put("thin", "metadata", "tracer", "settings", "method"),
    "no model": drop("metadata", "tracer", "model"),
    "generation settings": put("grad", "metadata", "generation_settings", "method"),
    "prompt": put("The cats", "metadata", "prompt"),
    "token": put(" cats", "metadata", "prompt_tokens", 2),
    "target": put([5], "metadata", "tracer", "target_ids"),
    "a warning": put(["all is well"], "metadata", "tracer", "warnings"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_our_file_with_other_metadata_is_no_circuit_any_more(content: Content, edit: str) -> None:
    EDITS[edit](content)
    graph = from_neuronpedia(content)
    assert type(graph) is Graph
    assert "edited" in graph.notes


def test_what_neuronpedia_changes_leaves_our_file_ours(circuit: Circuit, content: Content) -> None:
    content["metadata"] |= {"scan": "another", "slug": "name", "info": {"url": "https://example.org"}}
    content["qParams"]["pinnedIds"] = []
    assert isinstance(from_neuronpedia(content), Circuit)


def _as_older(content: Content) -> Content:
    """As versions wrote it whose hash was of nodes and links alone."""
    record = content["metadata"]["tracer"]
    del record["sha256"]
    text = json.dumps([content["nodes"], content["links"]], sort_keys=True)
    record["digest"] = hashlib.sha256(text.encode()).hexdigest()
    return content


def test_a_file_of_an_older_version_is_the_circuit_it_was_and_says_what_its_hash_was_of(
    circuit: Circuit, content: Content
) -> None:
    found = from_neuronpedia(_as_older(content))
    assert isinstance(found, Circuit)
    assert found.nodes.equals(circuit.nodes)
    assert "of an older tracer" in found.warnings[-1]
    assert found.model_copy(update={"warnings": circuit.warnings}) == circuit
    content["metadata"]["tracer"]["metric"] += 1.0
    with pytest.raises(RunError, match="is not a circuit: the metric"):
        from_neuronpedia(content)
    content["metadata"]["tracer"]["model"] = None
    with pytest.raises(RunError, match="record is damaged"):
        from_neuronpedia(content)


def test_paths_of_a_graph_without_attributions_are_ranked_by_share(foreign: Content) -> None:
    paths = from_neuronpedia(foreign).paths(5)
    assert [path.attribution for path in paths] == [None] * 5
    shares = [abs(path.share) for path in paths]
    assert shares == sorted(shares, reverse=True)


def test_files_with_a_byte_order_mark_are_read_and_nonsense_is_refused(content: Content, tmp_path: Path) -> None:
    path = tmp_path / "g.json"
    path.write_text("\ufeff" + json.dumps(content), encoding="utf-8")
    assert isinstance(import_graph(path), Circuit)
    path.write_text("[" * 200_000)
    with pytest.raises(RunError, match="deep"):
        import_graph(path)
    path.write_text('{"a": NaN}')
    with pytest.raises(RunError, match="NaN"):
        import_graph(path)
