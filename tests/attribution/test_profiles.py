"""Attribution profiles against one-at-a-time autograd in plain PyTorch, and the identities that they must obey."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
import tiny
import tracer
from helpers import load, refused
from tracer.attribution import edges, total
from tracer.attribution.profiles import Profiles, attribution_profiles
from tracer.attribution.trace import trace_all
from tracer.errors import JobError, ModelError
from tracer.model.model import Model
from tracer.settings import LINEAR_GATE, METHODS, RULES, rules_name

IDS, OTHER = (1, 6, 7, 8, 9, 10, 11), (1, 6, 27, 8, 30, 10, 11)
LOGITS = torch.tensor([[6, 20], [6, 30], [4, 22]])
CASES = [
    (family, attn) for family in tiny.FAMILIES for attn in ("eager", "sdpa") if family in tiny.SDPA or attn == "eager"
]


def some_nodes(model: Model, basis: str = "activation", count: int = 24) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    sizes = (model.n_layers, len(IDS), model.n_neurons(basis))
    nodes = torch.stack([torch.randint(0, size, (count,), generator=draw) for size in sizes], -1).unique(dim=0)
    return nodes[torch.randperm(len(nodes), generator=draw)]


def one_at_a_time(model: Model, nodes: Tensor, basis: str, rules: frozenset[str], paired: bool = False) -> Profiles:
    """A backward of its own for each node and each logit, through the oracle's linearised forward."""
    module, ids = model.module, torch.tensor([IDS])
    entry = reference.embed(module, ids).detach().requires_grad_(True)
    far = entry.detach() - (reference.embed(module, torch.tensor([OTHER])) if paired else 0.0)
    other = reference.run(module, torch.tensor([OTHER]), basis=basis) if paired else None
    with reference.linearized(module, rules), torch.enable_grad():
        there = reference.run(module, ids, embeddings=entry, basis=basis)
        inputs, outputs = [], torch.zeros(len(nodes), len(LOGITS))
        for layer, position, neuron in nodes.tolist():
            value = there.raw[layer][0, position, neuron]
            (grad,) = torch.autograd.grad(value, entry, retain_graph=True)
            inputs.append((grad * far)[0].sum(-1))
        for number, (position, token) in enumerate(LOGITS.tolist()):
            grads = torch.autograd.grad(there.logits[0, position, token], there.raw, retain_graph=True)
            for row, (layer, at, neuron) in enumerate(nodes.tolist()):
                value = there.raw[layer][0, at, neuron]
                before = 0.0 if other is None else other.raw[layer][0, at, neuron]
                outputs[row, number] = (grads[layer][0, at, neuron] * (value - before)).detach()
    return Profiles(torch.stack(inputs), outputs)


def gap(found: Profiles, wanted: Profiles) -> float:
    """The largest difference of either side, of its largest number."""
    pairs = (found.inputs, wanted.inputs), (found.outputs, wanted.outputs)
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)


def baselines(model: Model, nodes: Tensor, basis: str) -> tuple[Tensor, Tensor]:
    """Of the nodes and the embeddings, on the other prompt."""
    ids = torch.tensor([OTHER])
    raw = reference.run(model.module, ids, basis=basis).raw
    values = torch.stack([raw[layer][0, position, neuron] for layer, position, neuron in nodes.tolist()])
    return values.detach(), reference.embed(model.module, ids)[0]


@pytest.mark.parametrize("basis", ["activation", "output"])
@pytest.mark.parametrize(("family", "attn"), CASES)
def test_both_engines_equal_autograd_one_at_a_time(family: str, attn: str, basis: str) -> None:
    model = load(family, attn)
    nodes = some_nodes(model, basis)
    paired = basis == "activation"
    wanted = one_at_a_time(model, nodes, basis, RULES, paired)
    other = baselines(model, nodes, basis) if paired else None
    for engine in ("replay", "autograd"):
        found = attribution_profiles(model, IDS, nodes, LOGITS, basis=basis, engine=engine, baselines=other)
        assert gap(found, wanted) < 1e-5, engine
    late = torch.arange(len(IDS)) > nodes[:, 1:2]
    assert not found.inputs[late].any()  # no token looks at a later one


@pytest.mark.parametrize("rules", [LINEAR_GATE, RULES - {"product"}, frozenset({"norm"})], ids=rules_name)
def test_other_rules_equal_autograd_one_at_a_time(rules: frozenset[str]) -> None:
    model = load("gemma2")
    nodes = some_nodes(model)
    wanted = one_at_a_time(model, nodes, "activation", rules)
    for engine in ("auto", "autograd"):
        assert gap(attribution_profiles(model, IDS, nodes, LOGITS, rules=rules, engine=engine), wanted) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_little_memory_changes_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources, logits and pieces of an MLP one by one, and chunks of one backward."""
    model = load(family)
    nodes = some_nodes(model)
    whole = attribution_profiles(model, IDS, nodes, LOGITS)
    monkeypatch.setattr(edges, "workspace", lambda *_: 1)
    for engine in ("replay", "autograd"):
        assert gap(attribution_profiles(model, IDS, nodes, LOGITS, engine=engine), whole) < 1e-6


def test_what_is_held_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    model, held = load("llama"), list[int]()
    begin = total.begin

    def watched(*given: Any) -> Any:
        group = begin(*given)
        held.append(group.state.nbytes)
        return group

    monkeypatch.setattr(total, "begin", watched)
    most = 12 * 4 * model.d_model
    monkeypatch.setattr(edges, "workspace", lambda *_: most)
    attribution_profiles(model, IDS, some_nodes(model), LOGITS)
    assert len(held) > 4
    assert max(held) <= most


@pytest.mark.parametrize("family", tiny.BIAS_FREE)
def test_the_embeddings_give_a_node_its_value(family: str) -> None:
    model = load(family)
    nodes = some_nodes(model)
    found = attribution_profiles(model, IDS, nodes, LOGITS)
    raw = reference.run(model.module, torch.tensor([IDS])).raw
    values = torch.stack([raw[layer][0, position, neuron] for layer, position, neuron in nodes.tolist()])
    assert float((found.inputs.sum(-1) - values).abs().max() / values.abs().max()) < 1e-5


PROMPTS = [
    tracer.Prompt(token_ids=ids, target=[20, 22], foil=[30], counterfactual=other)
    for ids, other in ((IDS, OTHER), ((1, 9, 12), (1, 9, 13)), ((1, 6, 7, 40, 41), (1, 16, 7, 40, 42)))
]


def sides(circuit: tracer.Circuit) -> Profiles:
    assert circuit.profiles is not None
    return Profiles(*(torch.tensor(circuit.profiles[name].to_pylist()) for name in ("input", "output")))


def attributed(circuit: tracer.Circuit) -> Tensor:
    """What the outputs' side says of each node's attribution."""
    weights = torch.tensor([row["gradient"] for row in circuit.rows("logit")])
    return sides(circuit).outputs @ weights


@pytest.mark.parametrize("how", [
    {"baseline": "zero", "edges": True},
    {"baseline": "counterfactual"},
    {"baseline": "mean"},
    {"basis": "output"},
    {"rules": sorted(RULES - {"product"})},
    {"metric": "topk", "top_k": 3},
], ids=str)  # fmt: skip
def test_outputs_add_up_to_the_attribution(how: dict[str, Any]) -> None:
    """Of every prompt of a left-padded batch, whose profiles are those of each prompt alone."""
    model, how = load("gemma3"), {"edges": False, **how}
    asked = [replace(one, target=None, foil=None) for one in PROMPTS] if "top_k" in how else PROMPTS
    how["reference"] = PROMPTS if how.get("baseline") == "mean" else None
    circuits = list(trace_all(model, asked, nodes=12, profiles=True, **how))
    for prompt, circuit in zip(asked, circuits, strict=True):
        wanted = torch.tensor(circuit.neurons["attribution"].to_pylist())
        assert float((attributed(circuit) - wanted).abs().max() / wanted.abs().max()) < 1e-5
        alone = circuit if len(circuit.tokens) == 7 else tracer.trace(model, prompt, nodes=12, profiles=True, **how)
        assert alone.neurons["neuron"].equals(circuit.neurons["neuron"])
        assert gap(sides(circuit), sides(alone)) < 1e-5
        assert (circuit.links is None) != how["edges"]


@pytest.mark.parametrize("method", [method for method in METHODS if method != "relp"])
def test_profiles_are_of_the_linearisation_whatever_the_method(method: str) -> None:
    model = load("llama")
    how: dict[str, Any] = {"baseline": "zero", "steps": 2} if method in ("ig", "conductance") else {}
    circuit = tracer.trace(model, PROMPTS[0], nodes=10, method=method, edges=False, profiles=True, **how)
    columns = circuit.neurons.to_pydict()
    nodes = torch.tensor([columns[name] for name in ("layer", "position", "neuron")]).T
    logits = torch.tensor([(row["position"], row["neuron"]) for row in circuit.rows("logit")])
    paired = circuit.settings.baseline == "counterfactual"
    other = baselines(model, nodes, "activation") if paired else None
    wanted = attribution_profiles(model, IDS, nodes, logits, baselines=other, engine="autograd")
    assert gap(sides(circuit), wanted) < 1e-5


def test_a_model_in_half_precision(tmp_path: Path) -> None:
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = load("gemma3", dtype=dtype)
        nodes = some_nodes(model)
        found[dtype] = attribution_profiles(model, IDS, nodes, LOGITS)
        by_autograd = attribution_profiles(model, IDS, nodes, LOGITS, engine="autograd")
        assert gap(found[dtype], by_autograd) < (1e-5 if dtype == torch.float32 else 0.05)
    assert gap(found[torch.bfloat16], found[torch.float32]) < 0.1


def test_pruned_circuits_keep_the_profiles_of_what_is_left(tmp_path: Path) -> None:
    model = load("llama")
    how: dict[str, Any] = {"nodes": 30, "profiles": True, "baseline": "zero"}
    whole = tracer.trace(model, PROMPTS[0], **how)
    left = tracer.trace(model, PROMPTS[0], **how, pruning=tracer.Pruning(node_influence=0.6))
    assert left.profiles is not None
    assert 0 < left.n_nodes < whole.n_nodes
    assert left.profiles["node_id"].to_pylist() == list(range(left.n_nodes))
    keys = [list(zip(*(one.neurons[name].to_pylist() for name in ("layer", "position", "neuron")), strict=True))
            for one in (whole, left)]  # fmt: skip
    rows = [keys[0].index(key) for key in keys[1]]
    assert gap(sides(left), Profiles(sides(whole).inputs[rows], sides(whole).outputs[rows])) < 1e-6
    left.save(tmp_path / "run")
    assert tracer.Circuit.load(tmp_path / "run") == left
    plain = tracer.trace(model, PROMPTS[0], nodes=30, baseline="zero")
    assert plain.profiles is None
    assert plain.fingerprint != whole.fingerprint
    assert plain.nodes.equals(whole.nodes)
    assert plain.links is not None
    assert plain.links.equals(whole.links)


def test_what_cannot_be_is_refused() -> None:
    model, nodes = load("llama"), torch.tensor([[0, 0, 1]])
    with refused(JobError, "node (9, 0, 1)", "lies outside the model"):
        attribution_profiles(model, IDS, torch.tensor([[9, 0, 1]]), LOGITS)
    with refused(JobError, "engine='guess'", "replay"):
        attribution_profiles(model, IDS, nodes, LOGITS, engine="guess")
    with refused(ModelError, "engine='replay'", "four rules"):
        attribution_profiles(model, IDS, nodes, LOGITS, engine="replay", rules=frozenset())
    none = attribution_profiles(model, IDS, nodes[:0], LOGITS)
    assert none.inputs.shape == (0, 7)
    assert none.outputs.shape == (0, 3)
