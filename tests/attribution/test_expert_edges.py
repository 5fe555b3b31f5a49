"""Edges, profiles and targets among neurons of experts: only where an expert ran, and by what plain arithmetic says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tracer
from helpers import refused
from mixtures import D_EXPERT, FAMILIES, N_EXPERTS, mixture
from tracer.attribution.among import links_among
from tracer.attribution.edges import direct_edges, edges_of
from tracer.attribution.profiles import attribution_profiles
from tracer.attribution.running import Running
from tracer.attribution.targets import target
from tracer.errors import JobError
from tracer.model.model import Model
from tracer.settings import LINEAR_GATE, TargetNeuron

IDS = (1, 7, 9, 20, 33, 12)
LAYER, LAST = 2, len(IDS) - 1
LOGITS = torch.tensor([[LAST, 11], [LAST - 1, 5]])


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Model:
    return mixture(request.param)


def ran(model: Model, position: int = LAST, layer: int = LAYER) -> tuple[list[int], list[int]]:
    """The experts that ran, by a hook on the router, and those that did not."""
    seen = list[Tensor]()
    mlp = model.module.model.layers[layer].mlp
    router = mlp.router if hasattr(mlp, "router") else mlp.gate
    hook = router.register_forward_hook(lambda _, __, out: seen.append(out[-1]))
    try:
        with torch.no_grad():
            model.module(input_ids=torch.tensor([IDS]))
    finally:
        hook.remove()
    some = sorted(seen[0][position].tolist())
    return some, [expert for expert in range(N_EXPERTS) if expert not in some]


def node(expert: int, inside: int = 5, position: int = LAST, layer: int = LAYER) -> list[int]:
    return [layer, position, expert * D_EXPERT + inside]


@pytest.mark.parametrize("engine", ["replay", "autograd"])
def test_a_neuron_of_an_expert_that_did_not_run_is_refused_in_words(model: Model, engine: str) -> None:
    on, off = ran(model)
    nodes = torch.tensor([node(on[0]), node(off[0])])
    said = f"L2 E{off[0]} N5 at position {LAST}", ", ".join(f"E{expert}" for expert in on), "did not run there"
    for asked in (direct_edges, attribution_profiles):
        with refused(JobError, *said):
            asked(model, IDS, nodes, LOGITS, engine=engine)
    found = direct_edges(model, IDS, nodes[:1], LOGITS, engine=engine)
    both = edges_of(model, IDS, nodes, LOGITS, engine=engine)
    assert float(found.target_values[0]) != 0
    assert torch.allclose(both.weight[[0, 2, 3]][:, [0, *range(2, 2 + len(IDS))]], found.weight, atol=1e-6)
    assert not both.weight[1].any()
    assert not both.weight[:, 1].any()
    assert float(both.target_values[1]) == float(both.incoming[1]) == 0


def test_a_node_outside_its_own_narrower_layer_is_refused() -> None:
    model = mixture("qwen3_moe")
    assert model.widths == (48, 96, 96)
    with refused(JobError, "(0, 1, 60)", "neurons 0 to 47 in layer 0"):
        direct_edges(model, IDS, torch.tensor([[0, 1, 60]]), LOGITS)
    with refused(JobError, "(0, 60)", "neurons 0 to 47 in layer 0"):
        tracer.trace(model, tracer.Prompt(token_ids=IDS, target=11), 10, exclude=[(0, 60)])
    with refused(JobError, "L0 N60", "neurons 0 to 47 in layer 0"):
        tracer.trace(model, tracer.Prompt(token_ids=IDS), 10, of="L0 N60")
    with refused(JobError, "layer 0, neuron 60", "neurons 0 to 47 in layer 0"):
        tracer.promoted(model, [(0, 60)])


@pytest.mark.parametrize("engine", ["replay", "autograd"])
def test_links_among_nodes_that_run_on_some_prompts_are_zero_on_the_others(model: Model, engine: str) -> None:
    on, off = ran(model)
    nodes = [(layer, position, neuron) for layer, position, neuron in map(tuple, (node(on[0]), node(off[0])))]
    rules: dict[str, Any] = {} if engine == "replay" else {"rules": ("norm", "attention", "activation")}
    (found,) = links_among(model, [tracer.Prompt(token_ids=IDS, target=11)], nodes, **rules)
    assert found.weight[2, 0] != 0
    assert not found.weight[1].any()
    assert not found.weight[:, 1].any()
    assert float(found.values[1]) == 0


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("L3 E17 N45", TargetNeuron(layer=3, expert=17, neuron=45)),
        (" l3  e0 n4- ", TargetNeuron(layer=3, expert=0, neuron=4, sign=-1)),
        ("3/17/45+", TargetNeuron(layer=3, expert=17, neuron=45)),
        ("3/45-", TargetNeuron(layer=3, neuron=45, sign=-1)),
    ],
)
def test_a_neuron_of_an_expert_is_written_as_people_read_it(text: str, wanted: TargetNeuron) -> None:
    assert target(text) == wanted
    assert target(wanted.name) == wanted


def test_a_circuit_of_a_neuron_of_an_expert(model: Model, tmp_path: Path) -> None:
    (expert, *_), off = ran(model)
    prompt = tracer.Prompt(token_ids=IDS)
    circuit = tracer.trace(model, prompt, 30, of=f"L2 E{expert} N5")
    (end,) = circuit.rows("target")
    nodes = torch.tensor([[row["layer"], row["position"], row["neuron"]] for row in circuit.rows("neuron")])
    wanted = direct_edges(model, IDS, torch.cat([nodes, torch.tensor([node(expert)])]), LOGITS[:0], engine="autograd")
    assert end["activation"] == pytest.approx(float(wanted.target_values[-1]), rel=1e-5)
    assert circuit.metric == pytest.approx(end["activation"], rel=1e-6)
    ids = {row["node_id"]: at for at, row in enumerate(circuit.rows("neuron"))}
    links = [row for row in circuit.edges.to_pylist() if row["target"] == end["node_id"] and row["source"] in ids]
    assert links
    for row in links:
        weight = float(wanted.weight[-1, ids[row["source"]]])
        assert row["weight"] == pytest.approx(weight, rel=1e-4, abs=1e-6)
    assert end["neuron"] == expert * D_EXPERT + 5
    assert end["token"] == circuit.settings.of.name == f"L2 E{expert} N5"  # type: ignore[union-attr]
    plain = tracer.trace(model, prompt, 30, of=f"L2 N{expert * D_EXPERT + 5}")
    assert plain.fingerprint == circuit.fingerprint
    circuit.save(tmp_path / "circuit")
    assert tracer.Circuit.load(tmp_path / "circuit").settings == circuit.settings
    assert float(tracer.evaluate(model, circuit, sizes=[5, 30]).whole[0]) == pytest.approx(circuit.metric, rel=1e-5)
    with refused(JobError, f"L2 E{off[0]} N5 at position {LAST}", "did not run there", f"E{expert}"):
        tracer.trace(model, prompt, 30, of=f"L2 E{off[0]} N5")


NO_SUCH: list[tuple[str, tuple[str, ...]]] = [
    ("L2 E9 N5", ("L2 E9 N5", "8 experts")),
    ("L2 E3 N99", ("L2 E3 N99", "12 neurons")),
    ("L0 E1 N3", ("L0 E1 N3", "no experts")),
    ("L2 N96", ("L2 N96", "neurons 0 to 95 in layer 2")),
]


@pytest.mark.parametrize(("of", "said"), NO_SUCH)
def test_a_neuron_that_no_expert_has_is_refused(of: str, said: tuple[str, ...]) -> None:
    with refused(JobError, *said):
        tracer.attribute(mixture("qwen3_moe"), [tracer.Prompt(token_ids=IDS)], of=of)


def test_what_no_expert_knows_is_asked_of_prompts_where_it_ran(model: Model) -> None:
    on, _ = ran(model)
    there = Running.of(model, [IDS])
    assert [expert for expert in range(N_EXPERTS) if there.ran[LAYER][LAST, expert]] == on
    with pytest.raises(ValueError, match="not known"):
        _ = TargetNeuron(layer=2, expert=1, neuron=3).number


def test_the_linear_gate_is_the_same_by_both_engines_and_conserves(model: Model) -> None:
    on, _ = ran(model)
    nodes = torch.tensor([node(on[0]), node(on[1], 3), node(ran(model, 1, 1)[0][0], 2, 1, 1)])
    found = [direct_edges(model, IDS, nodes, LOGITS, rules=LINEAR_GATE, engine=one) for one in ("replay", "autograd")]
    assert torch.allclose(found[0].weight, found[1].weight, rtol=1e-4, atol=1e-5)
    other = direct_edges(model, IDS, nodes, LOGITS)
    assert float((other.weight[:2] - found[0].weight[:2]).abs().max()) > 1e-2
    both = [
        attribution_profiles(model, IDS, nodes, LOGITS, rules=LINEAR_GATE, engine=e) for e in ("replay", "autograd")
    ]
    assert torch.allclose(both[0].inputs, both[1].inputs, rtol=1e-4, atol=1e-5)
    assert torch.allclose(both[0].outputs, both[1].outputs, rtol=1e-4, atol=1e-5)
    if not model.has_biases:
        assert torch.allclose(found[0].incoming, found[0].target_values, rtol=1e-4, atol=1e-5)
        assert torch.allclose(both[0].inputs.sum(-1), found[0].source_values, rtol=1e-4, atol=1e-5)
