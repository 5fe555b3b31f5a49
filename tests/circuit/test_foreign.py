"""Graph files of other tools: every public writer's form of layer, feature and label; nothing made up, nothing lost."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

import tracer
from tracer.circuit.circuit import Graph, load_graph
from tracer.circuit.exchange import cantor, export, from_neuronpedia, import_graph, to_neuronpedia
from tracer.errors import JobError, RunError

Content = dict[str, Any]
TOKENS = ["<s>", "The", " keys"]


def node(node_id: str, kind: str, layer: str | int, ctx_idx: int = 2, **more: Any) -> Content:
    return {"node_id": node_id, "feature_type": kind, "layer": layer, "ctx_idx": ctx_idx, "jsNodeId": node_id,
            "feature": None, "clerp": "", **more}  # fmt: skip


def file(nodes: list[Content], links: list[tuple[str, str]], **about: Any) -> Content:
    metadata = {"slug": "s", "scan": "m", "prompt": "The keys", "prompt_tokens": TOKENS, **about}
    return {
        "metadata": metadata,
        "qParams": {},
        "nodes": nodes,
        "links": [{"source": low, "target": high, "weight": 0.5} for low, high in links],
    }


TRANSCODER = "cross layer transcoder"


def attribute() -> Content:
    """As EleutherAI's attribute: no schema version, positions in ids counted from another start, logits in layer -1."""
    nodes = [
        node("input_1", "embedding", "E"),
        node("intermediate_1_1_57", TRANSCODER, "1", feature=cantor(1, 57), influence=0.5),
        node("error_1_2", "mlp reconstruction error", "2"),
        node("output_1_0", "logit", "-1", clerp='output: " are" (p=0.412)', token_prob=0.412),
        node("output_1_1", "logit", "-1", clerp='output: " "is"" (p=0.1)'),
    ]
    links = [("input_1", "intermediate_1_1_57"), ("intermediate_1_1_57", "output_1_0"), ("error_1_2", "output_1_1")]
    return file(nodes, links, n_layers=4)


def crm() -> Content:
    """As Neuronpedia's second engine: attention features, biases, whole numbers as layers, logits right above."""
    nodes = [
        node("E_5_2", "embedding", "E", token=" keys"),
        node(
            "0_lor_7_2",
            "lorsa",
            0,
            feature=cantor(0, 7),
            clerp="F35",
            qk_tracing_results={"pair_wise_contributors": []},
        ),
        node("0_cro_7_2", TRANSCODER, 0, feature=cantor(0, 7), clerp="F35", activation=2.0),
        node("0_error_attn_2", "lorsa error", 0),
        node("0_error_mlp_2", "mlp reconstruction error", 0),
        node("1_bias_attn_bO_2", "bias", 1, clerp="L1 Bias (attn_bO)"),
        node("1_bias_mlp_bout_2", "bias", 1, clerp="L1 Bias (mlp_bout)"),
        node("1_unknown_x_2", "unknown", 1, clerp="x"),
        node("2_11_2", "logit", 2, feature=11, clerp='Logit "c" (p=0.900)', token="c"),
    ]
    links = [("E_5_2", "0_lor_7_2"), ("0_lor_7_2", "0_cro_7_2"), ("0_error_attn_2", "0_cro_7_2"),
             ("0_cro_7_2", "2_11_2"), ("0_error_mlp_2", "2_11_2"), ("1_bias_attn_bO_2", "2_11_2")]  # fmt: skip
    return file(nodes, links, schema_version=1) | {"qk_only_nodes": {"x": node("x", "bias", 0)}}


def relp(logit: str | int = "logit", embedding: str = "embedding") -> Content:
    """As tools that trace MLP neurons: plain numbers, attributions as influence, words as layers."""
    nodes = [
        node("E_791_2", "embedding", embedding, feature=791, clerp="Token: keys"),
        node("5_1234_2", "mlp_neuron", 5, feature=1234, clerp="L5/N1234: plural nouns", influence=0.8),
        node("6_1234_2", "mlp_neuron", 6, feature=1234, clerp="", influence=0.3),
        node("L_527_2", "logit", logit, feature=527, clerp=" are (p=0.4100)"),
    ]
    return file(nodes, [("E_791_2", "5_1234_2"), ("5_1234_2", "6_1234_2"), ("6_1234_2", "L_527_2")])


def rows(graph: Graph, kind: str) -> list[tuple[int, int, int, str]]:
    return [(row["layer"], row["position"], row["neuron"], row["token"]) for row in graph.rows(kind)]


def test_what_attribute_writes() -> None:
    graph = from_neuronpedia(attribute())
    assert graph.n_layers == 4
    assert rows(graph, "neuron") == [(1, 2, 57, " keys")]
    assert rows(graph, "error") == [(2, 2, -1, " keys")]
    assert rows(graph, "embedding") == [(-1, 2, -1, " keys")], "no token id is made of the position"
    assert rows(graph, "logit") == [(4, 2, -1, " are"), (4, 2, -2, ' "is"')]


def test_what_neuronpedias_second_engine_writes() -> None:
    graph = from_neuronpedia(crm())
    assert graph.n_layers == 2
    assert rows(graph, "attention") == rows(graph, "neuron") == [(0, 2, 7, " keys")]
    assert rows(graph, "error") == [(0, 2, -2, " keys"), (0, 2, -1, " keys")]
    assert [row[2] for row in rows(graph, "other")] == [-1, -2, -3]
    assert rows(graph, "logit") == [(2, 2, 11, "c")]
    assert graph.labels[1] == "F35"
    assert graph.labels[5] == "L1 Bias (attn_bO)"
    assert "qk_tracing_results, qk_only_nodes" in graph.notes["not shown"]


@pytest.mark.parametrize(("logit", "n_layers"), [("logit", 7), (32, 32), ("32", 32), ("E1", 7)])
def test_what_tools_for_neurons_write(logit: str | int, n_layers: int) -> None:
    graph = from_neuronpedia(relp(logit))
    assert graph.n_layers == n_layers
    assert rows(graph, "neuron") == [(5, 2, 1234, " keys"), (6, 2, 1234, " keys")]
    assert rows(graph, "embedding") == [(-1, 2, 791, " keys")]
    assert rows(graph, "logit") == [(n_layers, 2, 527, " are")]
    assert graph.labels == {1: "L5/N1234: plural nouns"}
    assert graph.nodes["influence"].null_count == graph.nodes.num_rows
    assert "influence" in graph.notes
    assert from_neuronpedia(relp(embedding="E")).nodes.equals(from_neuronpedia(relp()).nodes)


@pytest.mark.parametrize(
    ("more", "token"),
    [
        ({"clerp": 'Output " are" (p=0.412)'}, " are"),
        ({"clerp": "output: ' are' (p=1.000)"}, " are"),
        ({"clerp": "Logit: Paris (p=0.41)"}, "Paris"),
        ({"clerp": "Logit: Paris"}, "Paris"),
        ({"clerp": "\n (p=0.5)"}, "\n"),
        ({"clerp": 'Output "a\nb"'}, "a\nb"),
        ({"clerp": ""}, ""),
        ({"clerp": "x", "token": " y"}, " y"),
    ],
)
def test_a_logit_is_called_what_the_file_calls_it_or_nothing(more: Content, token: str, tmp_path: Path) -> None:
    content = attribute()
    content["nodes"][3] |= more
    graph = from_neuronpedia(content)
    assert rows(graph, "logit")[0][3] == token
    assert tracer.view(graph, tmp_path / "page.html").stat().st_size > 100_000


@pytest.mark.parametrize("coded", [True, False])
def test_numbers_of_ids_in_no_known_form_are_cantors_where_all_name_their_layer(coded: bool) -> None:
    places = [(1, 57), (0, 3), (2, 9)]
    nodes = [
        node(f"n{i}", TRANSCODER, str(layer), feature=cantor(layer, index) if coded else index)
        for i, (layer, index) in enumerate(places)
    ]
    nodes.append(node("9_4_2", "logit", "9", feature=4))
    graph = from_neuronpedia(file(nodes, [("n0", "9_4_2")]))
    assert [row[::2] for row in rows(graph, "neuron")] == [(place[0], place[1]) for place in places]


@pytest.mark.parametrize("write", [attribute, crm, relp])
def test_every_form_is_shown_saved_and_exported_as_it_came(write: Any, tmp_path: Path) -> None:
    content = write()
    (tmp_path / "theirs.json").write_text(json.dumps(content))
    graph = import_graph(tmp_path / "theirs.json")
    graph.save(tmp_path / "run")
    assert load_graph(tmp_path / "run") == graph
    assert tracer.view(graph, tmp_path / "page.html").stat().st_size > 100_000
    again = to_neuronpedia(graph)
    assert {name: again.get(name) for name in content if name not in ("qParams", "links")} == {
        name: value for name, value in content.items() if name not in ("qParams", "links")
    }
    for form in ("graphml", "csv"):
        export(graph, tmp_path / f"g.{form}", form)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"node_id": "0_cro_7_1"}, "contradicts its layer"),
        ({"node_id": "1_cro_7_2"}, "contradicts its layer"),
        ({"feature": 999}, "contradicts its feature number"),
        ({"node_id": "x", "feature": cantor(3, 7)}, "its feature number is of 3"),
        ({"node_id": "x", "feature": None}, "no layer or no feature number"),
        ({"node_id": "x", "layer": "E"}, "no layer or no feature number"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(change: Content, rule: str) -> None:
    content = crm()
    content["links"] = []
    content["nodes"][2] |= change
    with pytest.raises(RunError, match=rule):
        from_neuronpedia(content)


def test_within_a_layer_edges_rise_from_attention_to_the_mlp_alone() -> None:
    content = crm()
    content["links"] = [{"source": "0_cro_7_2", "target": "0_lor_7_2", "weight": 1.0}]
    with pytest.raises(RunError, match="rise"):
        from_neuronpedia(content)


# ------------------------------------------------------------------------------------------------ on the way out


def test_pins_and_groups_can_be_seen_on_the_other_page() -> None:
    """There a group is drawn only where its members are pinned."""
    circuit = tracer.trace(tracer.load("demo"), tracer.Prompt("The keys", target=" are"), nodes=20)
    chosen = circuit.model_copy(update={"groups": {"plural": (0, 2)}, "pins": (1,)})
    content = to_neuronpedia(chosen)
    ids = [one["node_id"] for one in content["nodes"]]
    assert content["qParams"]["pinnedIds"] == [ids[1], ids[0], ids[2]]
    assert content["qParams"]["supernodes"] == [["plural", ids[0], ids[2]]]
    assert from_neuronpedia(copy.deepcopy(content)) == chosen
    theirs = relp()
    theirs["qParams"] = {"pinnedIds": ["L_527_2", "5_1234_2", "gone"], "supernodes": [["g", "5_1234_2"]]}
    graph = from_neuronpedia(theirs)
    assert (graph.pins, graph.groups) == ((3,), {"g": (1,)})
    assert set(to_neuronpedia(graph)["qParams"]["pinnedIds"]) == {"L_527_2", "5_1234_2", "gone"}


def test_names_for_an_upload(tmp_path: Path) -> None:
    circuit = tracer.trace(tracer.load("demo"), tracer.Prompt("The keys", target=" are"), nodes=20)
    done = export(circuit, tmp_path / "g.json", scan="llama3-1-8b", slug="my_graph-2")
    content = json.loads(done.files[0].read_text())
    assert (content["metadata"]["scan"], content["metadata"]["slug"]) == ("llama3-1-8b", "my_graph-2")
    assert import_graph(done.files[0]) == circuit
    for name in ("a b", "a.b", "", "ä", "a/b", "a\n"):
        with pytest.raises(JobError, match="refuses"):
            export(circuit, tmp_path / "x.json", slug=name)
    with pytest.raises(JobError, match="has no effect with format"):
        export(circuit, tmp_path / "x.csv", "csv", scan="m")
    again = to_neuronpedia(from_neuronpedia(relp()), scan="other")
    assert (again["metadata"]["scan"], again["metadata"]["slug"]) == ("other", "s")
    dotted = relp()
    dotted["metadata"]["scan"] = "llama-3.1"
    assert any("give scan=" in lost for lost in export(from_neuronpedia(dotted), tmp_path / "y.json").lost)


@pytest.mark.parametrize("form", ["neuronpedia", "mib", "graphml", "csv"])
@pytest.mark.parametrize("name", ["/home/someone/models/my model", "./models/tiny", "..\\models\\tiny", "~/m/tiny"])
def test_no_path_of_this_machine_is_exported(name: str, form: str, tmp_path: Path) -> None:
    circuit = tracer.trace(tracer.load("demo"), tracer.Prompt("The keys", target=" are"), nodes=20)
    mine = circuit.model_copy(update={"model": circuit.model.model_copy(update={"name": name})})
    done = export(mine, tmp_path / "g.json", form)
    text = "".join(file.read_text() for file in done.files)
    assert not any(part in text for part in ("home", "someone", "models", "~"))
    if form == "neuronpedia":
        content = json.loads(text)
        assert content["metadata"]["scan"] in ("my-model", "tiny")
        assert any("folder" in lost for lost in done.lost)
        assert from_neuronpedia(content).nodes.equals(circuit.nodes)


def test_ids_of_the_hub_stay_whole(tmp_path: Path) -> None:
    circuit = tracer.trace(tracer.load("demo"), tracer.Prompt("The keys", target=" are"), nodes=20)
    theirs = circuit.model_copy(update={"model": circuit.model.model_copy(update={"name": "org/Model-1.5"})})
    content = to_neuronpedia(theirs)
    assert content["metadata"]["scan"] == "Model-1-5"
    assert content["metadata"]["tracer"]["model"]["name"] == "org/Model-1.5"
    assert from_neuronpedia(content) == theirs
