"""The reference implementation against the identities of the method (section 8)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import deltas
import reference as ref
import tiny as t
from reference import ALL, LINEAR_GATE, Metric, Node
from truth import close

torch.set_num_threads(1)
LENGTHS = (9, 6, 1)
KERNELS = [(family, "eager") for family in t.FAMILIES] + [(family, "sdpa") for family in t.SDPA]
VARIANTS: list[tuple[str, dict[str, bool]]] = [
    *[(family, {}) for family in t.FAMILIES],
    ("gpt_neox", {"use_parallel_residual": False}),
]
NO_BIAS: list[tuple[str, dict[str, bool]]] = [
    *[(family, {}) for family in t.BIAS_FREE],
    ("qwen2", {"biases": False}),
    ("gpt2", {"biases": False}),
    ("gpt_neox", {"biases": False}),
    ("gpt_neox", {"biases": False, "use_parallel_residual": False}),
    *[(family, {"biases": False}) for family in ("falcon", "glm", "glm4", "nemotron", "seed_oss")],
]
TARGET = Metric("target_logit", targets=torch.tensor([[7], [11], [23]]))


def error(got: Tensor, wanted: Tensor) -> float:
    """The largest difference relative to the largest wanted value."""
    got, wanted = got.detach(), wanted.detach()
    return float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))


def model_and_batch(family: str, **over: Any) -> tuple[PreTrainedModel, Tensor, Tensor]:
    model = t.tiny(family, **over)
    return model, *t.batch(model, LENGTHS, seed=1)


def logits_of(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, attention_mask=mask, position_ids=ref.positions(mask), use_cache=False).logits


@pytest.mark.parametrize(("family", "attn"), KERNELS)
def test_forward_is_unchanged_bit_for_bit(family: str, attn: str) -> None:
    model, ids, mask = model_and_batch(family, attn=attn)
    plain = logits_of(model, ids, mask)
    assert not plain.isnan().any()
    for rules in (ALL, LINEAR_GATE, {"gate"}, frozenset(), {"norm", "activation"}, {"attention", "product"}):
        with ref.linearized(model, rules):
            assert torch.equal(logits_of(model, ids, mask), plain)
    assert torch.equal(ref.run(model, ids, mask).logits, plain)


@pytest.mark.parametrize("family", t.FAMILIES)
def test_model_is_restored(family: str) -> None:
    model, ids, mask = model_and_batch(family)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    plain = logits_of(model, ids, mask)
    with pytest.raises(RuntimeError, match="stop"), ref.linearized(model):
        raise RuntimeError("stop")
    ref.attribute(model, ids, mask, TARGET)
    ref.edges(model, ids[:1], [(3, -1, 7)])
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits_of(model, ids, mask), plain)


@pytest.mark.parametrize(("family", "over"), NO_BIAS)
def test_embeddings_conserve_the_logit(family: str, over: dict[str, bool]) -> None:
    model, ids, mask = model_and_batch(family, **over)
    got = ref.attribute(model, ids, mask, TARGET)
    assert error(got.embeddings.sum(1), got.metric) < 1e-4
    twice = ref.attribute(model, ids, mask, TARGET, rules=ALL - {"product"})
    gated = ref.mlps(model)[0].project(torch.zeros(1, 32))[1] is not None
    assert (error(twice.embeddings.sum(1), got.metric) > 0.05) == gated


@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize(("family", "over"), NO_BIAS)
def test_with_a_linear_gate_embeddings_conserve_the_logit_too(
    family: str, over: dict[str, bool], activation: bool
) -> None:
    """Without the activation rule as well: of what it is about, a soft-cap is left, which bends the logit, and what a
    delta net's values pass."""
    model, ids, mask = model_and_batch(family, **over)
    got = ref.attribute(model, ids, mask, TARGET, rules=LINEAR_GATE - ({"activation"} if not activation else set()))
    gated = ref.mlps(model)[0].project(torch.zeros(1, 32))[1] is not None
    conserved = gated or activation
    if not activation and (ref.cap_of(model) is not None or any(map(deltas.is_delta, model.modules()))):
        conserved = False
    assert (error(got.embeddings.sum(1), got.metric) < 1e-4) == conserved
    half = ref.attribute(model, ids, mask, TARGET)
    assert (error(half.nodes, got.nodes) > 0.01) == (gated or not activation)


@pytest.mark.parametrize("family", [family for family in t.FAMILIES if family not in t.BIAS_FREE])
def test_biases_leave_a_remainder(family: str) -> None:
    model, ids, mask = model_and_batch(family)
    got = ref.attribute(model, ids, mask, TARGET)
    assert error(got.embeddings.sum(1), got.metric) > 1e-3


@pytest.mark.parametrize("rules", [ALL, LINEAR_GATE], ids=["half", "linear-gate"])
@pytest.mark.parametrize("basis", ["activation", "output"])
@pytest.mark.parametrize(("family", "over"), NO_BIAS)
def test_incoming_shares_sum_to_one(family: str, over: dict[str, bool], basis: str, rules: frozenset[str]) -> None:
    model, ids, _ = model_and_batch(family, **over)
    targets: list[Node] = [(layer, pos, unit) for layer in range(3) for pos in (0, 4, 8) for unit in (1, 17)]
    targets += [(3, 8, 7), (3, 5, 11), (3, 8, 7, 11)]
    got = ref.edges(model, ids[:1], targets, basis, rules)
    incoming = got.neurons.sum((1, 2, 3)) + got.embeddings.sum(1)
    assert error(incoming, got.values) < 1e-4
    plain = logits_of(model, ids[:1], torch.ones_like(ids[:1]))
    assert torch.equal(got.values[-3], plain[0, 8, 7])
    for row, (layer, pos, *_) in enumerate(targets):
        assert got.neurons[row, layer:].abs().sum() == 0
        assert got.neurons[row, :, pos + 1 :].abs().sum() == 0
        assert got.embeddings[row, pos + 1 :].abs().sum() == 0


@pytest.mark.parametrize("rules", [ALL, LINEAR_GATE], ids=["half", "linear-gate"])
@pytest.mark.parametrize(("family", "over"), VARIANTS)
def test_edges_equal_interventions(family: str, over: dict[str, bool], rules: frozenset[str]) -> None:
    model, ids, _ = model_and_batch(family, **over)
    one = ids[:1]
    targets: list[Node] = [(1, 6, 5), (2, 8, 9), (3, 8, 7), (3, 8, 7, 23)]
    sources: list[Node] = [(-1, 0), (-1, 6), (0, 6, 3), (0, 2, 20), (1, 5, 11), (1, 8, 2), (2, 8, 30)]
    got = ref.edges(model, one, targets, rules=rules)
    for row, target in enumerate(targets):
        for source in sources:
            layer, pos, *unit = source
            weight = got.embeddings[row, pos] if layer < 0 else got.neurons[row, layer, pos, unit[0]]
            change = ref.nudge(model, one, source, target, epsilon=0.7, rules=rules)
            assert change == pytest.approx(0.7 * float(weight), rel=1e-3, abs=2e-5)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("family", t.FAMILIES)
def test_alone_equals_padded_in_a_batch(family: str, attn: str) -> None:
    if attn == "sdpa" and family not in t.SDPA:
        pytest.skip("eager only")
    model, ids, mask = model_and_batch(family, attn=attn)
    for method in ("relp", "grad", "ig"):
        together = ref.attribute(model, ids, mask, TARGET, method, steps=2)
        assert not together.nodes.isnan().any()
        for row, length in enumerate(LENGTHS):
            alone = ref.attribute(model, ids[row : row + 1, -length:], None, TARGET.rows([row]), method, steps=2)
            assert error(together.nodes[row, :, -length:], alone.nodes[0]) < 1e-4
            assert error(together.embeddings[row, -length:], alone.embeddings[0]) < 1e-4
            assert together.nodes[row, :, :-length].abs().sum() == 0
            assert together.embeddings[row, :-length].abs().sum() == 0


@pytest.mark.parametrize("family", t.SDPA)
def test_the_kernel_does_not_matter(family: str) -> None:
    results = []
    for attn in ("eager", "sdpa"):
        model, ids, mask = model_and_batch(family, attn=attn)
        results.append(ref.attribute(model, ids, mask, TARGET).nodes)
    assert error(results[1], results[0]) < 1e-4


@pytest.mark.parametrize("family", t.FAMILIES)
def test_no_gradient_to_later_positions(family: str) -> None:
    model, ids, mask = model_and_batch(family)
    early = Metric("target_logit", targets=torch.tensor([[7]]), positions=(-4,))
    for method in ("relp", "grad"):
        got = ref.attribute(model, ids[:1], mask[:1], early, method)
        assert got.nodes[:, :, -3:].abs().sum() == 0
        assert got.embeddings[:, -3:].abs().sum() == 0
        assert got.nodes[:, :, :-3].abs().sum() > 0


@pytest.mark.parametrize(("family", "over"), VARIANTS)
def test_no_rules_is_the_plain_gradient(family: str, over: dict[str, bool]) -> None:
    model, ids, mask = model_and_batch(family, **over)
    plain = ref.attribute(model, ids, mask, TARGET, "grad")
    none = ref.attribute(model, ids, mask, TARGET, "relp", rules=set())
    assert torch.equal(none.nodes, plain.nodes)
    every = ref.attribute(model, ids, mask, TARGET)
    for rule in sorted(ALL):
        without = ref.attribute(model, ids, mask, TARGET, rules=ALL - {rule})
        gated = ref.mlps(model)[0].project(torch.zeros(1, 32))[1] is not None
        assert (error(without.embeddings, every.embeddings) > 1e-3) == (rule != "product" or gated)


@pytest.mark.parametrize("basis", ["activation", "output"])
@pytest.mark.parametrize(("family", "over"), VARIANTS)
def test_plain_gradient_matches_finite_differences(family: str, over: dict[str, bool], basis: str) -> None:
    model, ids, _ = model_and_batch(family, **over)
    one, full = ids[:1], torch.ones_like(ids[:1])
    metric = TARGET.rows([0])
    got = ref.attribute(model, one, full, metric, "grad", basis=basis)
    unit = 5 if got.activations[0, 1, 3, 5] != 0 else int(got.activations[0, 1, 3].abs().argmax())
    node, step = (0, 1, 3, unit), 0.05
    ends = []
    for sign in (1.0, -1.0):

        def put(layer: int, value: Tensor, sign: float = sign) -> Tensor:
            value = value.clone()
            if layer == node[1]:
                value[0, node[2], node[3]] += sign * step
            return value

        with torch.no_grad():
            ends.append(metric(ref.run(model, one, full, basis=basis, replacement=put).logits))
    slope = float(ends[0] - ends[1]) / (2 * step)
    wanted = float(got.nodes[node] / got.activations[node])
    assert slope == pytest.approx(wanted, rel=2e-2, abs=2e-4)


LONG = (pytest.mark.slow, pytest.mark.long)


@pytest.mark.parametrize("baseline", ["zero", "counterfactual"])
@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(one, marks=LONG) for one in ("gemma2", "gpt2", "gpt_neox"))]
)
def test_integrated_gradients_are_complete(family: str, baseline: str) -> None:
    """With a large epsilon: the path from zero embeddings is otherwise a jump at its start."""
    name = {"llama": "rms_norm_eps", "gemma2": "rms_norm_eps", "gpt2": "layer_norm_epsilon"}
    model, ids, mask = model_and_batch(family, n_layers=2, **{name.get(family, "layer_norm_eps"): 1.0})
    ids, mask, metric = ids[:2], mask[:2], TARGET.rows([0, 1])
    other = torch.where(mask.bool(), (ids * 7 + 3) % 97 + 4, ids)
    settings = {"baseline": baseline, "counterfactual_ids": other}
    end = ref.embed(model, other) if baseline == "counterfactual" else torch.zeros_like(ref.embed(model, ids))
    with torch.no_grad():
        change = metric(logits_of(model, ids, mask)) - metric(ref.run(model, ids, mask, embeddings=end).logits)
    gaps = []
    for steps in (25, 400):
        got = ref.attribute(model, ids, mask, metric, "ig", steps=steps, **settings)
        gaps.append(error(got.embeddings.sum(1), change))
    assert gaps[1] < 0.02
    assert gaps[1] < gaps[0] or gaps[0] < 0.01
    paths = [ref.attribute(model, ids, mask, metric, "conductance", steps=steps, **settings) for steps in (200, 400)]
    assert error(paths[1].nodes, paths[0].nodes) < 0.1
    assert torch.allclose(paths[1].embeddings, got.embeddings)


def test_conductance_telescopes_where_the_metric_is_linear_in_the_neurons() -> None:
    """One layer, no attention output, no final norm: neurons plus the direct path are the whole change."""
    model, ids, mask = model_and_batch("llama", n_layers=1)
    model.model.layers[0].self_attn.o_proj.weight.zero_()
    model.model.norm = torch.nn.Identity()
    other = torch.where(mask.bool(), (ids * 5 + 1) % 97 + 4, ids)
    settings = {"baseline": "counterfactual", "counterfactual_ids": other, "steps": 4}
    got = ref.attribute(model, ids, mask, TARGET, "conductance", **settings)
    assert TARGET.targets is not None
    moved = (ref.embed(model, ids) - ref.embed(model, other))[:, -1]
    direct = (moved * model.lm_head.weight[TARGET.targets[:, 0]]).sum(-1)
    change = got.metric - TARGET(logits_of(model, other, mask))
    assert error(got.nodes.sum((1, 2, 3)) + direct, change) < 1e-5


def test_one_step_of_ig_is_grad_at_the_prompt() -> None:
    model, ids, mask = model_and_batch("qwen3")
    other = torch.where(mask.bool(), (ids * 5 + 1) % 97 + 4, ids)
    settings = {"baseline": "counterfactual", "counterfactual_ids": other}
    plain = ref.attribute(model, ids, mask, TARGET, "grad", **settings)
    for method in ("ig", "conductance", "ig-activation"):
        got = ref.attribute(model, ids, mask, TARGET, method, steps=1, **settings)
        assert error(got.nodes, plain.nodes) < 1e-5
    ten = ref.attribute(model, ids, mask, TARGET, "ig", steps=10, **settings)
    assert error(ten.nodes, plain.nodes) > 1e-2


@pytest.mark.parametrize("basis", ["activation", "output"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_exact_equals_naive_hooks(family: str, basis: str) -> None:
    model, ids, mask = model_and_batch(family)
    mean = torch.randn(3, 9, 48 if basis == "activation" else 32, generator=torch.Generator().manual_seed(2))
    got = ref.attribute(model, ids, mask, TARGET, "exact", "mean", basis, mean_values=mean)
    plain = logits_of(model, ids, mask)[1, -1, 11]
    for layer, pos, unit in [(0, 4, 3), (1, 3, 20), (2, 8, 31), (2, 5, 0)]:

        def change(value: Tensor, at: tuple[int, int, int] = (layer, pos, unit)) -> Tensor:
            value = value.clone()
            value[1, at[1], at[2]] = mean[at]
            return value

        down, side = ref.neurons(model, basis)[layer]
        if side == "input":
            hook = down.register_forward_pre_hook(lambda _, args, change=change: (change(args[0]),))
        else:
            hook = down.register_forward_hook(lambda _, args, out, change=change: change(out))
        changed = logits_of(model, ids, mask)[1, -1, 11]
        hook.remove()
        assert float(got.nodes[1, layer, pos, unit]) == pytest.approx(float(plain - changed), abs=2e-6)
    assert got.nodes[1, :, :3].abs().sum() == 0


def test_methods_agree_on_a_model_linear_in_its_neurons() -> None:
    """One layer and a final norm of constant statistic: relp, grad, exact, ig-activation agree."""
    model, ids, mask = model_and_batch("llama", n_layers=1)
    model.model.norm = torch.nn.Identity()
    results = [
        ref.attribute(model, ids, mask, TARGET, method, steps=3).nodes
        for method in ("relp", "grad", "exact", "ig-activation")
    ]
    for other in results[1:]:
        assert error(other, results[0]) < 1e-4


def test_half_rule_halves_each_factor() -> None:
    model = t.tiny("llama")
    mlp = ref.mlps(model)[0]
    x = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    slopes = {}
    for name, rules in {"half": {"activation", "product"}, "whole": {"activation"}}.items():
        with ref.linearized(model, rules):
            slopes[name] = torch.autograd.grad(mlp.module(x)[0, 0, 4], x)[0]
    assert error(2 * slopes["half"], slopes["whole"]) < 1e-6
    gate, up = mlp.project(x)
    assert up is not None
    slope = gate[0, 0, :, None] * mlp.module.up_proj.weight + up[0, 0, :, None] * mlp.module.gate_proj.weight
    middle = torch.sigmoid(gate)[0, 0, :, None] * slope
    by_hand = 0.5 * mlp.down.weight[4] @ middle
    assert error(slopes["half"][0, 0], by_hand) < 1e-5


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "quick_gelu", "relu2"])
def test_ratio_is_the_activation_over_its_input(name: str) -> None:
    from transformers.activations import ACT2FN

    act = ACT2FN[name]
    z = torch.linspace(-4, 4, 82, dtype=torch.float64)
    assert torch.allclose(ref.ratio(act, z), act(z) / z, atol=1e-6)
    zero = ref.ratio(act, torch.zeros(1)).item()
    assert zero == (0.0 if name in ("relu", "relu2") else 0.5)
    with pytest.raises(ValueError, match="no rule"):
        ref.ratio(torch.nn.Tanh(), z)


def test_soft_cap_ratio() -> None:
    z = torch.tensor([0.0, 1e-6, -3.0, 40.0])
    assert torch.allclose(ref.cap_ratio(z, 2.0) * z, 2.0 * torch.tanh(z / 2.0))
    assert ref.cap_ratio(z, 2.0)[0] == 1


def test_hand_computed_example() -> None:
    """One layer, no attention output: every number of section 3 and 4 by hand."""
    model, ids, _ = model_and_batch("llama", n_layers=1)
    layer = model.model.layers[0]
    layer.self_attn.o_proj.weight.zero_()
    one = ids[:1]
    e = ref.embed(model, one)[0, -1]
    rms = torch.rsqrt(e.pow(2).mean() + layer.post_attention_layernorm.variance_epsilon)
    x = e * rms * layer.post_attention_layernorm.weight
    gate, up = layer.mlp.gate_proj.weight @ x, layer.mlp.up_proj.weight @ x
    a = gate * torch.sigmoid(gate) * up
    h = e + layer.mlp.down_proj.weight @ a
    scale = model.model.norm.weight * torch.rsqrt(h.pow(2).mean() + model.model.norm.variance_epsilon)
    direction = model.lm_head.weight[7] * scale
    by_hand = a * (layer.mlp.down_proj.weight.T @ direction)
    got = ref.attribute(model, one, None, TARGET.rows([0]))
    assert error(got.nodes[0, 0, -1], by_hand) < 1e-5
    graph = ref.edges(model, one, [(1, 8, 7), (0, 8, 5)])
    assert error(graph.neurons[0, 0, 8], by_hand) < 1e-5
    assert float(graph.embeddings[0, 8]) == pytest.approx(float(e @ direction), rel=1e-4)
    assert float(graph.embeddings[1, 8]) == pytest.approx(float(a[5]), rel=1e-4)
    assert float(got.embeddings[0, -1]) == pytest.approx(float(h @ direction), rel=1e-4)


def test_metrics_by_hand() -> None:
    model, ids, mask = model_and_batch("gemma2")
    logits = logits_of(model, ids, mask)
    tokens, foils = torch.tensor([[4, 9], [5, 8], [6, 7]]), torch.tensor([[10], [11], [12]])
    last = logits[:, -1]
    want, foil = last.gather(1, tokens).mean(1), last.gather(1, foils)[:, 0]
    value = {
        "target_logit": want,
        "logit_difference": want - foil,
        "log_probability": last.log_softmax(-1).gather(1, tokens).mean(1),
        "centred_logit": want - last.mean(1),
    }
    for kind, wanted in value.items():
        assert torch.allclose(Metric(kind, tokens, foils)(logits), wanted, atol=1e-6)
    top = ref.resolve(model, ids, mask, Metric("top_k", k=3))
    assert torch.allclose(top(logits), last.topk(3).values.sum(1))
    two = Metric("target_logit", tokens, positions=(-1, -2))
    assert torch.allclose(two(logits), 0.5 * (want + logits[:, -2].gather(1, tokens).mean(1)))
    for kind in ref.KINDS:
        nodes = ref.attribute(model, ids, mask, Metric(kind, None if kind == "top_k" else tokens, foils)).nodes
        assert nodes.abs().sum() > 0


def test_families_matter() -> None:
    """The settings that are easy to lose do change the logits."""
    ids, mask = t.batch(t.tiny("llama"), LENGTHS)
    for family, over in [
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"sliding_window": 32}),
        ("gemma3", {"sliding_window": 32}),
        ("gemma3", {"query_pre_attn_scalar": 16}),
        ("mistral", {"sliding_window": None}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("phi3", {"partial_rotary_factor": 1.0}),
    ]:
        plain, other = (logits_of(t.tiny(family, **extra), ids, mask) for extra in ({}, over))
        assert (plain - other)[0, -1].abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_saved_folder_loads(family: str, tmp_path: Path) -> None:
    model = t.tiny(family)
    folder = t.save(model, tmp_path / family)
    settings = {"dtype": torch.float32, "attn_implementation": "eager"}
    loaded = AutoModelForCausalLM.from_pretrained(folder, **settings)
    words = AutoTokenizer.from_pretrained(folder)
    text = ["The secretaries near the car", "What is 3+4?"]
    tokens = words(text, return_tensors="pt", padding=True)
    assert words.decode(tokens.input_ids[1], skip_special_tokens=True) == text[1]
    assert tokens.input_ids[0, 0] == t.PAD
    assert tokens.attention_mask[0, 0] == 0
    assert len(words.encode(" are", add_special_tokens=False)) == 1
    ids, mask = t.batch(model, LENGTHS)
    assert close(logits_of(loaded, ids, mask), logits_of(model, ids, mask))
