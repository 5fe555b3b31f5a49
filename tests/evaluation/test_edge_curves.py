"""Curves of a circuit's strongest edges: what is left of the nodes by brute force, and what they hold by `evaluate`."""

from __future__ import annotations

import functools
import itertools
import json
import math
from pathlib import Path
from typing import Any

import networkx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import tracer
from helpers import refused
from inline import InlinePool
from tracer.circuit.circuit import Circuit, Graph, edges_table, nodes_table
from tracer.circuit.from_run import circuit_of
from tracer.cli.app import app
from tracer.data import tasks
from tracer.errors import JobError
from tracer.evaluation.edge_curves import SHARES, edge_curves, on_paths, surviving
from tracer.store.schemas import NODES
from truth import tolerance

TEST = {"task": "sva", "structure": "nounpp", "count": 5, "split": "test"}


@functools.cache
def demo() -> tracer.Model:
    return tracer.load("demo")


@functools.cache
def circuit() -> Circuit:
    pair = tasks.sva.generate("nounpp", "train", 1)[0]
    rules = tracer.Pruning(share=0.02, drop_dangling=True)
    return tracer.trace(demo(), pair.to_prompt(), nodes=60, baseline="counterfactual", pruning=rules)


@functools.cache
def prompts() -> list[tracer.Prompt]:
    return [pair.to_prompt() for pair in tasks.sva.generate("nounpp", "test", 5)]


@functools.cache
def found() -> tracer.EdgeCurves:
    return edge_curves(demo(), circuit(), prompts(), seed=3)


def graph_of(edges: list[tuple[int, int, float | None]], layers: list[int]) -> Graph:
    """Nodes by layer: -1 embeddings, 0 to 2 neurons, 3 logits; each edge with its attribution."""
    kinds = ["embedding" if layer < 0 else "logit" if layer == 3 else "neuron" for layer in layers]
    size = len(layers)
    columns: dict[str, Any] = {name: [None] * size for name in NODES.names[2:]}
    columns |= {"kind": kinds, "layer": layers, "position": [0] * size, "neuron": list(range(size))}
    source, target, attribution = ([edge[part] for edge in edges] for part in range(3))
    values = {"weight": attribution, "share": attribution, "attribution": attribution}
    links = edges_table({"source": source, "target": target, **values})
    return Graph(nodes=nodes_table(columns), links=links, text="x", tokens=("x",), n_layers=3)


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    layers = sorted(draw(st.lists(st.integers(-1, 3), min_size=2, max_size=14)))
    pairs = [(i, j) for i in range(len(layers)) for j in range(len(layers)) if layers[i] < layers[j]]
    chosen = draw(st.lists(st.sampled_from(pairs), unique=True, max_size=40)) if pairs else []
    strengths = st.one_of(st.none(), st.integers(-5, 5).map(float))
    return graph_of([(*pair, draw(strengths)) for pair in chosen], layers)


@given(graphs(), st.lists(st.integers(1, 100), unique=True, min_size=1, max_size=4).map(sorted))
def test_what_is_left_is_what_brute_force_finds(graph: Graph, percents: list[int]) -> None:
    assert graph.links is not None
    rows = sorted(graph.links.to_pylist(), key=lambda row: -abs(row["attribution"] or 0.0))
    kinds = graph.nodes["kind"].to_pylist()
    wanted = []
    for percent in percents:
        kept = rows[: math.ceil(percent * len(rows) / 100)]
        net = networkx.DiGraph((row["source"], row["target"]) for row in kept)
        net.add_nodes_from(range(len(kinds)))
        paths = {
            node
            for node in net
            if kinds[node] == "neuron"
            and any(kinds[one] == "embedding" for one in networkx.ancestors(net, node))
            and any(kinds[one] == "logit" for one in networkx.descendants(net, node))
        }
        wanted.append((len(kept), tuple(sorted(paths))))
    if not wanted[-1][1]:
        with refused(JobError, "no neuron lies on a path"):
            surviving(graph, [percent / 100 for percent in percents])
        return
    left = surviving(graph, [percent / 100 for percent in percents])
    assert [(one.n_edges, one.nodes) for one in left] == wanted
    assert all(set(one.nodes) <= set(more.nodes) for one, more in itertools.pairwise(left))


def test_all_edges_of_a_circuit_are_the_whole_circuit() -> None:
    whole = tracer.evaluate(demo(), circuit(), prompts(), sizes=[circuit().n_nodes], seed=3)
    assert found().shares == SHARES
    assert (found().n_edges[-1], found().n_nodes[-1]) == (circuit().n_edges, circuit().n_nodes)
    last = list(found().rows())[-1]
    for name in ("faithfulness", "completeness"):
        for kind in (name, f"attribution_{name}"):
            assert last[kind] == pytest.approx(float(getattr(whole, name).estimate[0]), abs=tolerance())
    assert last["faithfulness_low"] == pytest.approx(float(whole.faithfulness.low[0]), abs=tolerance())


def test_every_set_holds_what_evaluate_says_of_it() -> None:
    """A circuit of these nodes alone, in another order, has the same faithfulness, completeness and control size."""
    left = surviving(circuit())
    middle = next(one for one in left if 3 < len(one.nodes) < circuit().n_nodes - 3)
    rows = [row for row in circuit().nodes.to_pylist() if row["kind"] != "neuron" or row["node_id"] in middle.nodes]
    columns = {name: [row[name] for row in rows] for name in NODES.names[2:]}
    alone = circuit().model_copy(update={"nodes": nodes_table(columns), "links": None})
    wanted = tracer.evaluate(demo(), alone, prompts(), sizes=[len(middle.nodes)])
    row = next(row for row in found().rows() if row["share"] == middle.share)
    assert row["faithfulness"] == pytest.approx(float(wanted.faithfulness.estimate[0]), abs=tolerance())
    assert row["completeness"] == pytest.approx(float(wanted.completeness.estimate[0]), abs=tolerance())


def test_beside_them_stand_the_strongest_nodes_as_evaluate_has_them() -> None:
    sizes = found().by_edges.sizes
    assert found().by_attribution.sizes == sizes
    wanted = tracer.evaluate(demo(), circuit(), prompts(), sizes=sizes, seed=3)
    got = found().by_attribution
    for name in ("faithfulness", "completeness", "control_faithfulness"):
        assert torch.allclose(getattr(got, name).estimate, getattr(wanted, name).estimate, atol=10 * tolerance())
    assert list(found().n_nodes) == sorted(found().n_nodes)


@pytest.mark.parametrize("shares", [[], [0.0, 1.0], [0.5, 0.1], [0.5, 1.5], [0.1, 0.1]])
def test_shares_out_of_range_are_refused(shares: list[float]) -> None:
    with refused(JobError, "must rise from above 0 to at most 1"):
        edge_curves(demo(), circuit(), prompts(), shares=shares)


def test_a_circuit_without_edges_is_refused() -> None:
    with refused(JobError, "without edges"):
        edge_curves(demo(), circuit().model_copy(update={"links": None}), prompts())


def test_nothing_is_left_by_too_few_edges() -> None:
    """A row of which nothing is measured."""
    row, whole = edge_curves(demo(), circuit(), prompts(), shares=[1 / circuit().n_edges, 1.0]).rows()
    assert (row["n_edges"], row["n_nodes"], row["faithfulness"], row["control_high"]) == (1, 0, None, None)
    assert whole["n_nodes"] == circuit().n_nodes
    edges: list[tuple[int, int, float | None]] = [(1, 3, 5.0), (0, 1, 2.0), (0, 3, 1.0)]
    graph = graph_of(edges, [-1, 0, 1, 3])
    assert [one.nodes for one in surviving(graph, [0.2, 0.6])] == [(), (1,)]
    assert on_paths(graph, []) == ()


# ------------------------------------------------------------------------------------------ the command line


@pytest.mark.parametrize("kind", ["aligned", pytest.param("free", marks=[pytest.mark.slow, pytest.mark.long])])
def test_the_datasets_own_edges(kind: str, tmp_path: Path) -> None:
    place, words = tmp_path / "run", ["--structure", "nounpp", "--count", "5", "--edges", "--format", "json"]
    job: dict[str, Any] = {"kind": "dataset", "input": {"task": "sva", "structure": "nounpp", "count": 6}, "nodes": 30}
    job |= {"circuit": kind, "baseline": "counterfactual", "evaluate": {"test": TEST, "sizes": [5], "edges": True}}
    tracer.run(job, place, pool=InlinePool())
    own = json.loads((place / "evaluation.json").read_text())["edge_curves"]
    told = CliRunner().invoke(app, ["evaluate", str(place), *words, "--ablation", "mean"])
    assert told.exit_code == 0, told.output
    again = json.loads(told.stdout)["edge_curves"]
    left = surviving(circuit_of(place))
    for one in (own, again):
        assert one["n_nodes"] == [len(some.nodes) for some in left]
        assert one["by_edges"]["faithfulness"]["estimate"] == pytest.approx(
            own["by_edges"]["faithfulness"]["estimate"], abs=10 * tolerance()
        )
    assert (place / "evaluate" / "edges.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.long
def test_evaluate_draws_and_reports_them(tmp_path: Path) -> None:
    circuit().save(tmp_path / "run")
    words = ["--structure", "nounpp", "--count", "5", "--sizes", "10"]
    plain = CliRunner().invoke(app, ["evaluate", str(tmp_path / "run"), *words])
    assert plain.exit_code == 0, plain.output
    assert "strongest edges alone" not in plain.stdout
    told = CliRunner().invoke(app, ["evaluate", str(tmp_path / "run"), *words, "--edges"])
    assert told.exit_code == 0, told.output
    assert "strongest edges alone" in told.stdout
    for name in ("edges.png", "report.html"):
        assert name in told.stdout
    page = (tmp_path / "run" / "report.html").read_text()
    assert "What the strongest edges hold" in page
    assert "edge-curves" in page


def test_edges_with_nothing_to_say_are_refused(tmp_path: Path) -> None:
    circuit().save(tmp_path / "run")
    refusals = {"--no-aligned": ["--edges", "--no-aligned", "--structure", "nounpp"]}
    for text, words in refusals.items():
        told = CliRunner().invoke(app, ["evaluate", str(tmp_path / "run"), *words])
        assert told.exit_code == 2
        assert text in told.stderr
    circuit().model_copy(update={"links": None}).save(tmp_path / "bare")
    told = CliRunner().invoke(app, ["evaluate", str(tmp_path / "bare"), "--edges"])
    assert told.exit_code == 2
    assert "without edges" in told.stderr
