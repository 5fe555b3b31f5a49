"""Groups of a planted structure are found whatever the order of nodes; what is named, added up and kept of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from sklearn.cluster import SpectralClustering
from sklearn.metrics import adjusted_rand_score, silhouette_score

import tiny
import tracer
from planted import Planted, planted, shuffled
from tracer.circuit.circuit import Traced
from tracer.circuit.supernodes_file import apply, encoded, parsed
from tracer.errors import JobError
from tracer.meaning.clusters import alone, best_of
from tracer.meaning.collapse import UNGROUPED, collapse
from tracer.meaning.grouping import Grouping, rows
from tracer.meaning.supernodes import checked, grouped
from tracer.model.model import Model
from tracer.store.schemas import DESCRIPTIONS, TOKENS


@pytest.fixture(scope="module")
def made() -> Planted:
    return planted()


def truth(found: Grouping, made: Planted) -> list[int]:
    return [made.groups[layer, neuron] for layer, _, neuron, _ in found.items.rows()]


def together(made: Planted) -> tuple[Traced, Any]:
    """A circuit and the profiles of all prompts; a neuron has the sign that it has in the first."""
    return made.circuits[0], lambda: [made.table()]


@pytest.mark.parametrize("method", ["spectral", "agglomerative"])
@pytest.mark.parametrize("clusters", [5, None])
@pytest.mark.parametrize("seed", [0, 1])
def test_planted_groups_are_found(method: str, clusters: int | None, seed: int) -> None:
    made = planted(seed=seed)
    found = tracer.supernodes(made.circuits[0], clusters, method=method, bootstraps=0)
    assert len(found.file.groups) == 5
    assert adjusted_rand_score(truth(found, made), found.labels) >= 0.95
    how = found.file.how
    assert how["chosen_by"] == ("user" if clusters else "silhouette")
    assert len(how["scores"]) == (1 if clusters else 19)


def test_the_order_of_nodes_changes_nothing(made: Planted) -> None:
    found = tracer.supernodes(made.circuits[0])
    assert adjusted_rand_score(truth(found, made), found.labels) >= 0.95
    for seed in range(3):
        again = tracer.supernodes(shuffled(made.circuits[0], seed))
        assert encoded(again.file) == encoded(found.file)
        assert np.array_equal(again.labels, found.labels)
    assert encoded(tracer.supernodes(made.circuits[0]).file) == encoded(found.file)


def test_groups_over_many_prompts_have_a_stability(made: Planted) -> None:
    circuit, parts = together(made)
    found = grouped(circuit, parts, checked(clusters=5, bootstraps=8, seed=3))
    assert adjusted_rand_score(truth(found, made), found.labels) >= 0.95
    assert found.stability is not None
    assert found.stability.bootstraps == 8
    assert 0.8 < found.stability.low <= found.stability.mean <= found.stability.high <= 1
    assert found.file.how["n_prompts"] == 4
    noisy = planted(n_prompts=4, noise=4.0)
    loose = grouped(*together(noisy), checked(clusters=5, bootstraps=8, seed=3))
    assert loose.stability is not None
    assert loose.stability.mean < found.stability.mean - 0.2


def test_one_prompt_has_no_stability_which_is_said(made: Planted) -> None:
    with pytest.warns(tracer.TracerWarning, match="of one prompt the groups' stability"):
        found = tracer.supernodes(made.circuits[0], 5)
    assert found.stability is None
    assert found.file.how["stability"] is None
    assert {row.stability for row in rows(found.file, found.graph)} == {None}


def test_clusters_and_silhouettes_are_scikit_learns(made: Planted) -> None:
    found = tracer.supernodes(made.circuits[0], 4)
    noisy = np.clip(found.similarity + 1e-3, 0, 1)  # theirs wants a connected graph
    theirs = SpectralClustering(4, affinity="precomputed", random_state=0).fit_predict(noisy)
    assert adjusted_rand_score(theirs, found.labels) == 1
    score = silhouette_score(1 - found.similarity, found.labels, metric="precomputed")
    assert found.clusters.scores[4] == pytest.approx(score)


def test_parts_without_any_link_are_told_apart() -> None:
    labels = np.arange(40) % 10
    similarity = (labels[:, None] == labels).astype(float)
    similarity[3] = similarity[:, 3] = 0
    similarity[3, 3] = 1
    assert alone(similarity).tolist() == [item == 3 for item in range(40)]
    found = best_of(similarity, range(2, 21), "spectral", 0)
    kept = np.arange(40) != 3
    assert found.labels[3] == -1
    assert adjusted_rand_score(labels[kept], found.labels[kept]) == 1


def test_weights_between_supernodes_are_those_between_their_members(made: Planted) -> None:
    found = tracer.supernodes(made.circuits[0], 5)
    some = found.graph.model_copy(update={"groups": dict(list(found.graph.groups.items())[:3])})
    small = collapse(some)
    links, nodes = some.links, small.nodes.to_pylist()
    assert links is not None
    assert [row["kind"] for row in nodes[:4]] == ["supernode"] * 3 + ["ungrouped"]
    assert nodes[3]["name"] == UNGROUPED
    edges = {(row["source"], row["target"]): row for row in small.edges.to_pylist()}
    for one in nodes:
        for other in nodes:
            own = [
                link
                for link in links.to_pylist()
                if link["source"] in one["members"] and link["target"] in other["members"]
            ]
            assert (len(own) > 0) == ((one["node_id"], other["node_id"]) in edges)
            if own:
                row = edges[one["node_id"], other["node_id"]]
                assert row["n_edges"] == len(own)
                for name in ("weight", "attribution"):
                    assert row[name] == pytest.approx(sum(link[name] for link in own), rel=1e-5, abs=1e-9)
    for name in ("weight", "attribution"):
        total = sum(small.edges[name].to_pylist())
        assert total == pytest.approx(sum(links[name].to_pylist()), rel=1e-5)
    assert sum(small.nodes["attribution"].to_pylist()) == pytest.approx(sum(some.nodes["attribution"].to_pylist()))
    assert sorted(node for row in nodes for node in row["members"]) == list(range(some.nodes.num_rows))


def test_a_traced_circuit_collapses_too() -> None:
    prompt = tracer.Prompt("The keys near the cabinet", target=" are", foil=" is")
    circuit = tracer.trace(tracer.load("demo"), prompt, nodes=40)
    with pytest.raises(JobError, match="has no groups"):
        collapse(circuit)
    small = collapse(circuit.model_copy(update={"groups": {"a": (0, 3, 4), "b": (1, 2)}}))
    assert circuit.links is not None
    for name in ("weight", "attribution"):
        assert sum(small.edges[name].to_pylist()) == pytest.approx(sum(circuit.links[name].to_pylist()), rel=1e-5)
    shared = circuit.model_copy(update={"groups": {"a": (0, 3), "b": (3, 2)}})
    with pytest.raises(JobError, match="shares a node"):
        collapse(shared)
    with pytest.raises(JobError, match="without edges"):
        collapse(circuit.model_copy(update={"links": None, "groups": {"a": (0,)}}))


def test_what_cannot_be_grouped_says_so(made: Planted) -> None:
    circuit = made.circuits[0]
    few = circuit.model_copy(update={"nodes": circuit.nodes.slice(0, 0), "links": None, "profiles": None})
    with pytest.raises(JobError, match=r"clusters=31: only 30 of 30 neurons are like another"):
        tracer.supernodes(circuit, 31)
    with pytest.raises(JobError, match="traced without attribution profiles"):
        tracer.supernodes(circuit.model_copy(update={"profiles": None}))
    with pytest.raises(JobError, match="no neuron to group"):
        grouped(few, lambda: [made.table()], checked())
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"clusters": 0}, "clusters="),
        ({"range": (1, 4)}, "range must begin at 2"),
        ({"range": (5, 4)}, "range must begin at 2"),
        ({"method": "kmeans"}, "method="),
        ({"bootstraps": -1}, "bootstraps="),
        ({"seed": 2**32}, "seed must be below"),
    ]
    for given, said in wrong:
        with pytest.raises(JobError, match=said):
            tracer.supernodes(circuit, **given)
    with pytest.raises(JobError, match="prompt=1: has no effect on a circuit"):
        tracer.supernodes(circuit, prompt=1)


def test_two_neurons_are_one_group(made: Planted) -> None:
    circuit = made.circuits[0]
    rows_ = circuit.neurons.to_pylist()
    same = [row["node_id"] for row in rows_ if made.groups[row["layer"], row["neuron"]] == 4][:2]
    nodes = circuit.nodes.take(same).set_column(1, "node_id", pa.array([0, 1], pa.int32()))
    part = circuit.model_copy(update={"nodes": nodes, "profiles": None})
    found = grouped(part, lambda: [made.table()], checked(bootstraps=0))
    assert [len(group.nodes) for group in found.file.groups] == [2]


def test_neurons_without_a_profile_are_in_no_group_which_is_said(made: Planted) -> None:
    circuit = made.circuits[0]
    table = made.table().filter(pc.field("prompt_id") == 0)
    gone = circuit.neurons.to_pylist()[0]
    found = grouped(circuit, lambda: [table.slice(1)], checked(clusters=5))
    assert any("1 of 30 neurons have no profile" in note for note in found.notes)
    (left,) = found.file.how["ungrouped"]
    assert (left["layer"], left["neuron"]) == (gone["layer"], gone["neuron"])
    assert sum(len(group.nodes) for group in found.file.groups) == 29
    none = table.set_column(6, "input", pa.array([[0.0] * 6] * 30, pa.list_(pa.float32())))
    with pytest.raises(JobError, match="no two of its neurons"):
        grouped(circuit, lambda: [none], checked())


def test_positions_are_summed_where_they_do_not_count(made: Planted) -> None:
    circuit = made.circuits[0]
    found = tracer.supernodes(circuit, 5, free=True)
    assert {member.position for group in found.file.groups for member in group.nodes} == {-1}
    aligned = tracer.supernodes(circuit, 5)
    assert np.array_equal(found.labels, aligned.labels)  # each neuron is at one position
    assert apply(found.file, circuit).groups.values() == apply(aligned.file, circuit).groups.values() or {
        name: set(nodes) for name, nodes in apply(found.file, circuit).groups.items()
    } == {name: set(nodes) for name, nodes in apply(aligned.file, circuit).groups.items()}


def tokens_of(made: Planted) -> pa.Table:
    words = [[" Texas", " texas", "Austin"], [" Ohio", "\n"], [" red"], [" Texas"], ["<b>", " low"]]
    found = []
    for (layer, neuron), group in made.groups.items():
        for polarity in (1, -1):
            own = words[group]
            found.append(
                {"layer": layer, "neuron": neuron, "polarity": polarity, "promoted": own}
                | {"promoted_values": [2.0 / (rank + 1) for rank in range(len(own))], "promoted_ids": [0] * len(own)}
            )
    return pa.Table.from_pylist(found, TOKENS)


def test_names_are_the_tokens_that_members_promote(made: Planted) -> None:
    circuit, tokens = made.circuits[0], tokens_of(made)
    found = tracer.supernodes(circuit, 5, tokens=tokens)
    names = {group.name for group in found.file.groups}
    assert names == {"Texas", "Texas 2", "Ohio, \\n", "red", "<b>, low"}
    shown = rows(found.file, found.graph, tokens)
    assert sum(row.share for row in shown) == pytest.approx(1)
    assert [row.share for row in shown] == sorted((row.share for row in shown), reverse=True)
    assert all(row.members == 6 for row in shown)
    first = next(row for row in shown if row.name == "red")
    own = found.graph.groups["red"]
    assert first.attribution == pytest.approx(sum(circuit.nodes["attribution"].to_pylist()[node] for node in own))
    assert first.promotes == ("red",)


def test_names_without_tokens(made: Planted) -> None:
    circuit = made.circuits[0]
    (layer, neuron), *_ = made.groups
    said = [{"layer": layer, "neuron": neuron, "polarity": sign, "description": "names of states"} for sign in (1, -1)]
    found = tracer.supernodes(circuit, 5, descriptions=pa.Table.from_pylist(said, DESCRIPTIONS))
    names = [group.name for group in found.file.groups]
    assert "names of states" in names
    assert [group.description for group in found.file.groups if group.name == "names of states"] == ["names of states"]
    others = [name for name in names if name != "names of states"]
    assert {name.partition(": ")[2][:-1] for name in others} <= {"towards word", "against word"}
    assert {name.partition(": ")[0] for name in others} <= {f"t{position}" for position in range(6)}
    circuit_of_many, parts = together(made)
    bare = grouped(circuit_of_many.model_copy(update={"profiles": None}), parts, checked(clusters=5, bootstraps=0))
    assert all(group.name.startswith("L") and group.name.endswith(" and 5 more") for group in bare.file.groups)


def test_the_file_is_the_grouping(made: Planted, tmp_path: Path) -> None:
    circuit = made.circuits[0]
    found = tracer.supernodes(circuit, tokens=tokens_of(made))
    again = apply(parsed(encoded(found.file)), circuit)
    assert {name: set(nodes) for name, nodes in again.groups.items()} == {
        name: set(nodes) for name, nodes in found.graph.groups.items()
    }
    for group in found.file.groups:
        assert found.file.how["groups"][group.name]["silhouette"] > 0.3


def test_nothing_is_said_of_scikit_learns(made: Planted) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", tracer.TracerWarning)
        tracer.supernodes(made.circuits[0], method="agglomerative")


def hand_built(groups: int = 4, each: int = 6) -> tuple[Model, dict[int, int]]:
    """A Llama with so many neurons in its last layer that read and write a direction of their group, with some noise;
    all others write nothing. Each neuron's group."""
    made = torch.Generator().manual_seed(5)
    module = tiny.tiny("llama")
    layers, head = module.model.layers, module.lm_head.weight
    width = head.shape[1]
    members = {2 * number: number % groups for number in range(groups * each)}
    reads = torch.randn(groups, width, generator=made)
    reads[1] = reads[0]  # what drives two groups is the same; what they do is not
    with torch.no_grad():
        for layer in layers:
            layer.mlp.down_proj.weight.zero_()
        mlp = layers[-1].mlp
        for neuron, group in members.items():
            read = reads[group] + 0.1 * torch.randn(width, generator=made)
            mlp.gate_proj.weight[neuron] = mlp.up_proj.weight[neuron] = read  # silu(z) z is not negative
            noise = 0.1 * head[7].norm() / width**0.5 * torch.randn(width, generator=made)
            mlp.down_proj.weight[:, neuron] = head[7 + group] + noise
    return tracer.load(module, tokenizer=tiny.tokenizer(101)), members


def test_groups_of_a_hand_built_transformer_are_found() -> None:
    model, members = hand_built()
    prompt = tracer.Prompt(token_ids=[1, 20, 31, 42, 53, 64], target=[7, 8], foil=[9, 10])
    circuit = tracer.trace(model, prompt, nodes=len(members), profiles=True)
    assert {row["neuron"] for row in circuit.neurons.to_pylist()} == members.keys()
    for method in ("spectral", "agglomerative"):
        found = tracer.supernodes(circuit, method=method, seed=1)
        planted_ = [members[neuron] for _, _, neuron, _ in found.items.rows()]
        assert adjusted_rand_score(planted_, found.labels) >= 0.95
    small = collapse(found.graph)
    assert circuit.links is not None
    assert sum(small.edges["weight"].to_pylist()) == pytest.approx(sum(circuit.links["weight"].to_pylist()), rel=1e-5)
