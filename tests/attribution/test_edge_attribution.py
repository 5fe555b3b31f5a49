"""Edge attribution: (v_s - b_s) * dv_t/dv_s * g_t under every baseline, against the plain-PyTorch oracle and the tables
themselves (method.md sections 4 and 8, identity 4a)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import reference
import tiny
import tracer
from helpers import refused
from tracer.circuit.circuit import Circuit
from tracer.errors import JobError
from tracer.model.model import Model

IDS = (1, 6, 7, 8, 9, 10, 11)
PAIRED = (1, 6, 17, 8, 9, 10, 11)  # one token differs
OTHERS = ((1, 9, 7, 12, 9, 30, 11), (1, 6, 14, 8, 21, 10, 5))
TARGET, FOIL = 7, 8
METHODS = ("relp", "grad", "ig")
BASELINES = ("zero", "mean", "counterfactual")
EVERY = tracer.Pruning(share=0.0)


def loaded(family: str, **over: Any) -> Model:
    return tracer.load(tiny.tiny(family, **over), tokenizer=tiny.tokenizer(101))


def traced(model: Model, baseline: str = "counterfactual", method: str = "relp", **how: Any) -> Circuit:
    paired = PAIRED if baseline == "counterfactual" else None
    if baseline == "mean":
        how["reference"] = [tracer.Prompt(token_ids=row) for row in OTHERS]
    prompt = tracer.Prompt(token_ids=IDS, target=TARGET, foil=FOIL, counterfactual=paired)
    how = {"nodes": 40, "pruning": EVERY} | how
    return tracer.trace(model, prompt, method=method, baseline=baseline, **how)


def oracle(model: Model, circuit: Circuit, baseline: str, method: str, basis: str) -> dict[tuple[int, int], float]:
    """Attribution of every edge among a circuit's nodes, by the oracle alone."""
    module, ids, paired = model.module, torch.tensor([IDS]), torch.tensor([PAIRED])
    means = None
    if baseline == "mean":
        runs = [reference.run(module, torch.tensor([row]), basis=basis).acts for row in OTHERS]
        means = torch.stack([torch.stack([act.detach()[0] for act in run]) for run in runs]).mean(0)
    metric = reference.Metric("logit_difference", torch.tensor([[TARGET]]), torch.tensor([[FOIL]]), positions=(-1,))
    gradient, base = reference.gradients(
        module, ids, metric, method, baseline, basis, counterfactual_ids=paired, mean_values=means
    )
    rows = circuit.nodes.to_pylist()
    targets = [row for row in rows if row["kind"] != "embedding"]
    places = [tuple(row[name] for name in ("layer", "position", "neuron")) for row in targets]
    entry_base = reference.embed(module, paired)[0] if baseline == "counterfactual" else 0.0
    found = reference.edges(module, ids, places, basis=basis, base=base[0], entry_base=entry_base)
    wanted = {}
    for index, (row, place) in enumerate(zip(targets, places, strict=True)):
        into = {TARGET: 1.0, FOIL: -1.0}[place[2]] if row["kind"] == "logit" else float(gradient[0][place])
        for source in rows:
            if source["kind"] == "logit":
                continue
            moved = found.from_baseline[0 if source["kind"] == "neuron" else 1][index]
            at = (source["layer"], source["position"], source["neuron"])
            value = moved[at] if source["kind"] == "neuron" else moved[source["position"]]
            wanted[source["node_id"], row["node_id"]] = float(value) * into
    return wanted


def linked(circuit: Circuit) -> list[dict[str, Any]]:
    assert circuit.links is not None
    return circuit.links.to_pylist()


def links(circuit: Circuit) -> dict[tuple[int, int], float]:
    return {(row["source"], row["target"]): row["attribution"] for row in linked(circuit)}


def assert_equal(got: dict[tuple[int, int], float], wanted: dict[tuple[int, int], float]) -> None:
    scale = max(map(abs, wanted.values()))
    assert scale > 0
    assert got.keys() <= wanted.keys()
    for ends, value in wanted.items():
        assert got.get(ends, 0.0) == pytest.approx(value, abs=2e-5 * scale), ends


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_edge_attributions_are_the_oracles(family: str, baseline: str, method: str) -> None:
    model = loaded(family)
    circuit = traced(model, baseline, method)
    assert_equal(links(circuit), oracle(model, circuit, baseline, method, "activation"))


@pytest.mark.parametrize("baseline", BASELINES)
def test_of_outputs_too(baseline: str) -> None:
    model = loaded("llama")
    circuit = traced(model, baseline, basis="output")
    assert_equal(links(circuit), oracle(model, circuit, baseline, "relp", "output"))


@pytest.mark.parametrize(
    ("method", "baseline"),
    [("exact", "counterfactual"), ("delta", "counterfactual"), ("delta", "mean"), ("random", "zero")],
)
def test_methods_without_a_gradient_are_lent_relps(method: str, baseline: str) -> None:
    model = loaded("llama")
    circuit = traced(model, baseline, method)
    assert_equal(links(circuit), oracle(model, circuit, baseline, "relp", "activation"))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_token_that_both_prompts_share_has_no_attribution(family: str) -> None:
    """Exactly 0, whatever its weight is."""
    circuit = traced(loaded(family))
    rows = circuit.edges.to_pylist()
    equal = [row for row in rows if row["source_kind"] == "embedding" and row["source_position"] != 2]
    other = [row for row in rows if row["source_kind"] == "embedding" and row["source_position"] == 2]
    assert equal
    assert all(row["attribution"] == 0.0 for row in equal)
    assert any(row["weight"] != 0.0 for row in equal)
    assert any(row["attribution"] != 0.0 for row in other)


@pytest.mark.parametrize("baseline", BASELINES)
def test_the_gradient_in_the_table_makes_the_attribution(baseline: str) -> None:
    """attribution(t) = (v_t - b_t) * g_t; a logit's gradient is its weight in the metric."""
    model = loaded("llama")
    circuit = traced(model, baseline)
    module, paired = model.module, torch.tensor([PAIRED])
    runs = [reference.run(module, torch.tensor([row])).acts for row in OTHERS]
    base: Any = {
        "zero": lambda: torch.zeros(model.n_layers, len(IDS), model.d_mlp),
        "mean": lambda: torch.stack([torch.stack([act.detach()[0] for act in run]) for run in runs]).mean(0),
        "counterfactual": lambda: torch.stack([act.detach()[0] for act in reference.run(module, paired).acts]),
    }[baseline]()
    for row in circuit.rows("neuron"):
        value = row["activation"] - float(base[row["layer"], row["position"], row["neuron"]])
        assert row["attribution"] == pytest.approx(value * row["gradient"], rel=1e-4, abs=1e-6)
    assert [row["gradient"] for row in circuit.rows("logit")] == [1.0, -1.0]


def test_with_baseline_zero_it_is_share_times_the_targets_attribution() -> None:
    circuit = traced(loaded("llama"), "zero")
    attribution = dict(zip(circuit.nodes["node_id"].to_pylist(), circuit.nodes["attribution"].to_pylist(), strict=True))
    for row in linked(circuit):
        assert row["attribution"] == pytest.approx(row["share"] * attribution[row["target"]], rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("baseline", ["counterfactual", "mean"])
def test_the_engines_agree(baseline: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded("llama")
    replayed = links(traced(model, baseline))
    monkeypatch.setattr(Model, "replays", lambda self, rules: False)
    assert_equal(links(traced(model, baseline)), replayed)


@pytest.mark.parametrize("baseline", ["mean", "counterfactual"])
def test_a_source_that_is_zero_and_differs_carries_attribution(baseline: str) -> None:
    """The distance from the baseline counts, not the value: weight 0, attribution not. ReLUs are 0 half the time."""
    model = loaded("llama", hidden_act="relu")
    circuit = traced(model, baseline, nodes=400)
    zero = {row["node_id"] for row in circuit.rows("neuron") if row["activation"] == 0.0}
    carried = [row for row in linked(circuit) if row["source"] in zero]
    assert any(row["attribution"] != 0.0 for row in carried)
    assert all(row["weight"] == 0.0 for row in carried)
    assert_equal(links(circuit), oracle(model, circuit, baseline, "relp", "activation"))


def test_nudging_a_source_towards_its_baseline_moves_the_target_by_the_edge() -> None:
    """Identity 4a by intervention: everything between is held."""
    model = loaded("llama")
    circuit = traced(model)
    rows, ids, paired = circuit.edges.to_pylist(), torch.tensor([IDS]), torch.tensor([PAIRED])
    base = [act.detach()[0] for act in reference.run(model.module, paired).acts]
    gradient = {
        (row["layer"], row["position"], row["neuron"]): row["gradient"]
        for row in [*circuit.rows("neuron"), *circuit.rows("logit")]
    }
    strongest = sorted((r for r in rows if r["source_kind"] == "neuron"), key=lambda r: -abs(r["attribution"]))[:8]
    for row in strongest:
        source, target = (
            tuple(row[f"{end}_{name}"] for name in ("layer", "position", "neuron")) for end in ("source", "target")
        )
        value: Tensor = reference.run(model.module, ids).acts[source[0]][0, source[1], source[2]].detach()
        toward = float((value - base[source[0]][source[1], source[2]]) / value)
        change = reference.nudge(model.module, ids, source, target, 0.1 * toward)
        assert change * gradient[target] == pytest.approx(0.1 * row["attribution"], rel=1e-2, abs=1e-6)


def test_the_paths_to_a_node_carry_what_the_direct_edges_do() -> None:
    """In a graph of every neuron: a path of one edge is that edge, one of two is what the oracle's weights make it."""
    model = loaded("llama", n_layers=2)
    circuit = traced(model, nodes=2 * len(IDS) * model.d_mlp)
    rows, module, paired = circuit.nodes.to_pylist(), model.module, torch.tensor([PAIRED])
    routes = [route for route in circuit.paths(400) if len(route.nodes) <= 3]
    assert {len(route.nodes) for route in routes} == {2, 3}
    edges = links(circuit)
    entry_base = reference.embed(module, paired)[0]
    for route in routes[:40]:
        assert route.attribution is not None
        places = [tuple(rows[node][name] for name in ("layer", "position", "neuron")) for node in route.nodes]
        if len(places) == 2:
            assert route.attribution == pytest.approx(edges[route.nodes[0], route.nodes[1]], rel=1e-4)
            continue
        (_, start, _), middle, end = places
        found = reference.edges(module, torch.tensor([IDS]), [middle, end], entry_base=entry_base)
        slope = float(found.neurons[1][middle] / found.activations[middle])
        wanted = float(found.from_baseline[1][0, start]) * slope * rows[route.nodes[-1]]["gradient"]
        assert route.attribution == pytest.approx(wanted, rel=1e-3, abs=1e-7)


def test_a_counterfactual_that_is_given_is_used() -> None:
    """In Python as in the shell: by default where every prompt has one, and never for some of them."""
    model = loaded("llama")
    plain = tracer.Prompt(token_ids=IDS, target=TARGET, foil=FOIL)
    pair = tracer.Prompt(token_ids=IDS, target=TARGET, foil=FOIL, counterfactual=PAIRED)
    assert tracer.trace(model, pair).settings.baseline == "counterfactual"
    assert tracer.trace(model, plain).settings.baseline == "zero"
    assert torch.equal(
        tracer.attribute(model, [pair]).nodes, tracer.attribute(model, [pair], baseline="counterfactual").nodes
    )
    said = tracer.trace(model, pair, baseline="zero")
    assert said.settings.baseline == "zero"
    assert said.counterfactual_ids == PAIRED
    assert said.nodes.equals(tracer.trace(model, plain).nodes)
    with refused(JobError, "some prompts have a counterfactual", "baseline='zero'"):
        tracer.attribute(model, [plain, pair])
