"""The edges of a dataset's circuit, against the mean of plain PyTorch's over the same prompts, and its identities."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import networkx
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

import reference
import tiny
import tracer
from helpers import refused
from inline import InlinePool
from tracer.circuit.exchange import export, import_graph
from tracer.circuit.from_run import circuit_of
from tracer.cli.app import app
from tracer.errors import JobError
from tracer.runs.units import mean_edges
from truth import tolerance

PROMPTS = [[1, 6, 7, 8, 9, 10], [1, 11, 7, 12, 9, 13], [1, 14, 15, 8, 16, 17], [1, 20, 21, 22, 23, 24], [1, 6, 7, 8, 9]]
OTHERS = [
    [1, 30, 7, 8, 9, 10],
    [1, 31, 7, 12, 9, 13],
    [1, 32, 15, 8, 16, 17],
    [1, 33, 21, 22, 23, 24],
    [1, 34, 7, 8, 9],
]
ENDS = [(40, 50), (41, 51), (42, 52), (43, 53), (44, 54)]
ALL: dict[str, Any] = {"pruning": {"share": 0}}


def ran(folder: Path, family: str | None = None, pool: Any = None, **changes: Any) -> Path:
    """A finished run over `PROMPTS`, on a tiny random model of a family, or over agreement pairs on the demo model."""
    job: dict[str, Any] = {"kind": "dataset", "shard_size": 2, "nodes": 12, "circuit": "aligned"}
    if family is None:
        job["input"] = {"task": "sva", "structure": "nounpp", "count": 6}
    else:
        rows = [
            {"token_ids": ids, "target_ids": [one], "foil_ids": [other], "counterfactual_ids": paired}
            for ids, paired, (one, other) in zip(PROMPTS, OTHERS, ENDS, strict=True)
        ]
        folder.mkdir(parents=True, exist_ok=True)
        file = folder.parent / f"{folder.name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        model = tiny.save(tiny.tiny(family), folder.parent / f"model-{folder.name}")
        job |= {"input": {"path": str(file)}, "model": str(model)}
    tracer.run(job | changes, folder, pool=pool or InlinePool())
    return folder


def table(folder: Path, name: str) -> list[dict[str, Any]]:
    return pq.read_table(folder / f"{name}.parquet").to_pylist()


def oracle(model: Any, nodes: list[dict[str, Any]], row: int, baseline: str, free: bool) -> list[np.ndarray]:
    """Weights and attributions [target, source] of one prompt, numbered as the circuit's nodes."""
    ids, other = torch.tensor([PROMPTS[row]]), torch.tensor([OTHERS[row]])
    (target, foil), length, layers = ENDS[row], ids.shape[1], model.config.num_hidden_layers
    metric = reference.Metric("logit_difference", torch.tensor([[target]]), torch.tensor([[foil]]))
    paired: dict[str, Any] = {"counterfactual_ids": other} if baseline == "counterfactual" else {}
    slope, base = reference.gradients(model, ids, metric, baseline=baseline, **paired)
    entry = reference.embed(model, other)[0] if paired else 0.0
    places: list[tuple[int, tuple[int, ...], float]] = []
    for node in nodes:
        if node["kind"] == "neuron":
            for position in range(length) if free else [node["position"]]:
                place = (node["layer"], position, node["neuron"])
                places.append((node["node_id"], place, float(slope[0][place])))
        elif node["kind"] == "logit":
            sign = {-1: 1.0, -2: -1.0}[node["neuron"]]
            places.append((node["node_id"], (layers, length - 1, target if sign > 0 else foil), sign))
    found = reference.edges(model, ids, [place for _, place, _ in places], base=base[0], entry_base=entry)
    weight, attribution = np.zeros((2, len(nodes), len(nodes)))
    embeddings = [(one["node_id"], one["position"]) for one in nodes if one["kind"] == "embedding"]
    neurons = [(number, place) for number, place, _ in places if place[0] < layers]
    sources = [(number, lambda part, at=place: part[0][:, *at]) for number, place in neurons]
    for number, position in embeddings:
        for at in range(length) if free else [position]:
            sources.append((number, lambda part, at=at: part[1][:, at]))
    for number, of in sources:
        for row_number, (into, _, gradient) in enumerate(places):
            weight[into, number] += float(of((found.neurons, found.embeddings))[row_number])
            attribution[into, number] += float(of(found.from_baseline)[row_number]) * gradient
    return [weight, attribution]


@pytest.mark.parametrize("circuit", ["aligned", "free"])
@pytest.mark.parametrize(("family", "baseline"), [("llama", "counterfactual"), ("gemma3", "zero"), ("gpt2", "zero")])
def test_edges_are_the_means_of_plain_ones(tmp_path: Path, family: str, baseline: str, circuit: str) -> None:
    place = ran(tmp_path / "run", family, circuit=circuit, baseline=baseline, **ALL)
    nodes, edges = table(place, "circuit_nodes"), table(place, "circuit_edges")
    rows = range(5) if circuit == "free" else range(4)
    model = tiny.tiny(family)
    every = [oracle(model, nodes, row, baseline, circuit == "free") for row in rows]
    for which, name in enumerate(("mean_weight", "mean_attribution")):
        parts = np.stack([one[which] for one in every])
        wanted, got = parts.mean(0), np.zeros(parts.shape[1:])
        for edge in edges:
            got[edge["target"], edge["source"]] = edge[name]
        assert np.abs(got - wanted).max() < 5e-5 * np.abs(wanted).max(), name
    spread = np.stack([one[1] for one in every]).std(0, ddof=1) / np.sqrt(len(every))
    for edge in edges:
        assert edge["standard_error"] == pytest.approx(spread[edge["target"], edge["source"]], abs=5e-5 * spread.max())
        assert edge["n_prompts"] == len(rows)
    strengths = [abs(edge["mean_attribution"]) for edge in edges]
    assert strengths == sorted(strengths, reverse=True)


@pytest.mark.parametrize("circuit", ["aligned", "free"])
def test_what_comes_into_a_node_from_all_others_is_its_own_attribution(tmp_path: Path, circuit: str) -> None:
    """Baseline zero, no biases: a circuit of all nodes."""
    place = ran(tmp_path / "run", "llama", circuit=circuit, nodes=None, mass=1.0, limit=2, **ALL)
    nodes, edges = table(place, "circuit_nodes"), table(place, "circuit_edges")
    into = np.zeros(len(nodes))
    for edge in edges:
        into[edge["target"]] += edge["mean_attribution"]
    wanted = np.array([node["mean_attribution"] for node in nodes])
    assert len(nodes) == (
        3 * 48 + 1 + 2 if circuit == "free" else (2 * 6 + 1) * 48 + 6 + 2
    )  # of the last layer, the last position alone
    is_target = np.array([node["kind"] != "embedding" for node in nodes])
    assert np.abs(into - wanted)[is_target].max() < 1e-4 * np.abs(wanted).max()
    explained = [node["explained"] for node in nodes if node["kind"] == "logit"]
    assert explained == pytest.approx([1.0, 1.0], abs=1e-4)


def test_nodes_are_the_circuits_with_its_means(tmp_path: Path) -> None:
    place = ran(tmp_path / "run")
    neurons = [node for node in table(place, "circuit_nodes") if node["kind"] == "neuron"]
    names = ("layer", "position", "neuron", "mean_attribution", "n_prompts")
    assert [[one[name] for name in names] for one in neurons] == [
        [one[name] for name in names] for one in table(place, "circuit")
    ]
    graph = circuit_of(place)
    edges = table(place, "circuit_edges")
    assert graph.links is not None
    assert graph.links["attribution"].to_pylist() == pytest.approx([one["mean_attribution"] for one in edges])
    share = tracer.Pruning().least_share
    assert edges
    assert all(abs(one["share"]) >= share for one in edges)


def test_the_jobs_rule_prunes_by_the_mean(tmp_path: Path) -> None:
    whole = table(ran(tmp_path / "whole", **ALL), "circuit_edges")
    place = ran(tmp_path / "top", pruning={"top": 20, "drop_dangling": True})
    nodes, edges = table(place, "circuit_nodes"), table(place, "circuit_edges")
    assert len(edges) <= 20
    assert {one["mean_attribution"] for one in edges} <= {one["mean_attribution"] for one in whole[:20]}
    graph = networkx.DiGraph((edge["source"], edge["target"]) for edge in edges)
    for node in nodes:
        if node["kind"] == "neuron":
            assert graph.in_degree(node["node_id"]) and graph.out_degree(node["node_id"])  # noqa: PT018


@pytest.mark.parametrize("circuit", ["aligned", pytest.param("free", marks=[pytest.mark.slow, pytest.mark.long])])
def test_many_nodes_in_several_passes_are_the_same_edges(
    tmp_path: Path, circuit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ran(tmp_path / "whole", circuit=circuit, **ALL)
    monkeypatch.setattr(mean_edges, "MOST", 6 if circuit == "aligned" else 40)
    monkeypatch.setattr(mean_edges, "_BYTES", 1)
    parts = ran(tmp_path / "parts", circuit=circuit, **ALL)
    scale = max(abs(one["mean_attribution"]) for one in table(whole, "circuit_edges"))
    wanted = {(one["source"], one["target"]): one for one in table(whole, "circuit_edges")}
    got = {(one["source"], one["target"]): one for one in table(parts, "circuit_edges")}
    for ends in wanted.keys() | got.keys():
        for name in ("mean_attribution", "mean_weight", "standard_error"):
            one, other = (found.get(ends, {}).get(name, 0.0) for found in (wanted, got))
            assert one == pytest.approx(other, abs=100 * tolerance() * max(scale, 1)), (ends, name)
    for one, other in zip(table(whole, "circuit_nodes"), table(parts, "circuit_nodes"), strict=True):
        assert one["mean_activation"] == pytest.approx(other["mean_activation"], abs=1e-5)
        assert one["explained"] == pytest.approx(other["explained"], abs=1e-3, nan_ok=True)


def test_a_stage_that_was_stopped_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ran(tmp_path / "whole")
    plain, asked = mean_edges.links_among, list[int]()

    def dies(model: Any, prompts: Any, *rest: Any, **how: Any) -> Iterator[Any]:
        asked.append(len(prompts))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return plain(model, prompts, *rest, **how)

    monkeypatch.setattr(mean_edges, "KEPT_EVERY", -1.0)
    monkeypatch.setattr(mean_edges, "links_among", dies)
    with pytest.raises(KeyboardInterrupt):
        ran(tmp_path / "run")
    assert (tmp_path / "run" / mean_edges.CHECKPOINT).exists()
    ran(tmp_path / "run")
    assert asked == [2, 2, 2, 2]  # the two shards that were kept are not asked again
    for name in ("circuit_nodes.parquet", "circuit_edges.parquet"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()
    assert not (tmp_path / "run" / mean_edges.CHECKPOINT).exists()


@pytest.mark.parametrize("damage", [b"", b"PK", b"\x93NUMPY"])
def test_a_damaged_checkpoint_costs_time_alone(tmp_path: Path, damage: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    place = ran(tmp_path / "run")
    wanted = (place / "circuit_edges.parquet").read_bytes()
    for name in ("circuit_edges.parquet", "circuit_nodes.parquet", "_SUCCESS.json"):
        (place / name).unlink()
    (place / mean_edges.CHECKPOINT).write_bytes(damage)
    ran(place)
    assert (place / "circuit_edges.parquet").read_bytes() == wanted


def test_edges_false_leaves_them_out(tmp_path: Path) -> None:
    place = ran(tmp_path / "run", edges=False)
    assert not (place / "circuit_edges.parquet").exists()
    assert circuit_of(place).links is None
    with refused(JobError, "has no edges"):
        circuit_of(place).edges  # noqa: B018


def test_a_datasets_circuit_is_shown_drawn_and_exported_with_edges(tmp_path: Path) -> None:
    place = ran(tmp_path / "run")
    graph = circuit_of(place)
    assert graph.n_edges > 20
    shown = CliRunner().invoke(app, ["show", str(place), "--rows", "3"])
    assert shown.exit_code == 0, shown.output
    for head in ("strongest of 12 nodes", "Strongest edges", "logit target @5", "mean attribution"):
        assert head in shown.stdout
    drawn = CliRunner().invoke(app, ["view", str(place), "--out", str(tmp_path / "page.html")])
    assert drawn.exit_code == 0, drawn.output
    assert "no edges" not in drawn.stderr
    for form in ("neuronpedia", "graphml", "csv"):
        assert export(graph, tmp_path / f"graph.{form}", form).files[0].exists()
    again = import_graph(tmp_path / "graph.neuronpedia")
    assert again.n_edges == graph.n_edges
    weights, wanted = (sorted(one.edges["weight"].to_pylist()) for one in (again, graph))
    assert weights == pytest.approx(wanted)
    with refused(JobError, "has no paths", "prompt=0"):
        graph.paths()


def test_a_damaged_edges_file_is_refused(tmp_path: Path) -> None:
    place = ran(tmp_path / "run")
    shutil.copytree(place, tmp_path / "other")
    file = tmp_path / "other" / "circuit_edges.parquet"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    shown = CliRunner().invoke(app, ["show", str(tmp_path / "other")])
    assert shown.exit_code == 2
    assert "repeat the run command" in shown.stderr
