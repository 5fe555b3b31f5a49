"""Every method against the plain-PyTorch oracle (reference.py), on tiny models of every family."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import reference as ref
import tiny as t
import tracer
from helpers import FOILS, KERNELS, TARGETS, Question, aligned, compare, error, fresh, load, padded, refused
from helpers import KINDS as KINDS_OF_ORACLE
from tracer import JobError, settings
from tracer.settings import ALL_RULES, LINEAR_GATE, PATH_METHODS, RULES

TOLERANCE = 1e-5
SMALL = Question(lengths=(4, 2), targets=TARGETS[:2], foils=FOILS[:2])
BASES = ("activation", "output", "residual", "attention")
KINDS = tuple(KINDS_OF_ORACLE)
SUBSETS = [
    frozenset(part)
    for size in range(5)
    for part in itertools.combinations(sorted(ALL_RULES), size)
    if not {"product", "gate"} <= set(part)
]
GATED = tuple(family for family in t.FAMILIES if family not in t.UNGATED)
ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("gpt_neox", {"use_parallel_residual": False}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"num_key_value_heads": 1, "head_dim": 16}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ("gemma3", {"sliding_window": 32}),
    ("mistral", {"sliding_window": None}),
    ("qwen3", {"attention_bias": True}),
]


def question(method: str) -> Question:
    """Ablating every node is slow: fewer tokens."""
    return SMALL if method == "exact" else Question()


def depth(method: str) -> dict[str, Any]:
    return {"n_layers": 2} if method == "exact" or method in PATH_METHODS else {}


def steps(method: str) -> dict[str, Any]:
    return {"steps": 3} if method in PATH_METHODS else {}


def combinations() -> Iterator[tuple[str, str, str, str, str]]:
    """Every method with every baseline, basis and metric that go together, on two families that change each time."""
    families = itertools.cycle(t.MAIN), itertools.cycle(family for family in t.FAMILIES if family not in t.MAIN)
    baselines = ("zero", "mean", "counterfactual")
    for method, baseline, basis, metric in itertools.product(ref.METHODS, baselines, BASES, KINDS):
        if (method, baseline) == ("conductance", "mean") or (method == "delta" and metric != "logit"):
            continue
        if basis in ("residual", "attention") and metric != ("logit" if method == "delta" else "logprob"):
            continue  # of which a metric of all logits shows as much as every metric
        yield from ((next(those), method, baseline, basis, metric) for those in families)


@pytest.mark.parametrize("method", ref.METHODS)
@pytest.mark.parametrize(("family", "attn"), KERNELS)
def test_method_equals_oracle_in_every_family_and_kernel(family: str, attn: str, method: str) -> None:
    found = compare(load(family, attn, **depth(method)), question(method), method, **steps(method))
    assert found.worst <= TOLERANCE, found


@pytest.mark.parametrize(("family", "method", "baseline", "basis", "metric"), list(combinations()))
def test_method_equals_oracle_with_every_baseline_basis_and_metric(
    family: str, method: str, baseline: str, basis: str, metric: str
) -> None:
    model, asked = load(family, **depth(method)), replace(question(method), metric=metric)
    found = compare(model, asked, method, baseline=baseline, basis=basis, **steps(method))
    # what exact subtracts are sums of logits, rounded as such
    assert found.worst <= (3 if (method, metric) == ("exact", "topk") else 1) * TOLERANCE, found


@pytest.mark.parametrize("off", sorted(RULES))
@pytest.mark.parametrize(("family", "attn"), KERNELS)
def test_relp_equals_oracle_with_one_rule_off(family: str, attn: str, off: str) -> None:
    found = compare(load(family, attn), Question(), rules=RULES - {off})
    assert found.worst <= TOLERANCE, found


@pytest.mark.parametrize("rules", SUBSETS, ids=lambda rules: "+".join(sorted(rules)) or "none")
@pytest.mark.parametrize("family", ["gemma3", "gpt_neox"])
def test_relp_equals_oracle_with_every_subset_of_rules(family: str, rules: frozenset[str]) -> None:
    if "gate" in rules and family not in GATED:
        with refused(JobError, "'gate'", "has no effect on a gpt_neox model", "gated MLPs"):
            tracer.attribute(load(family), Question().prompts(), rules=rules)
        return
    found = compare(load(family), Question(metric="centred"), rules=rules, basis="output")
    assert found.worst <= TOLERANCE, found


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("baseline", ["zero", "mean", "counterfactual"])
@pytest.mark.parametrize(("family", "attn"), [pair for pair in KERNELS if pair[0] in GATED])
def test_relp_equals_oracle_with_a_linear_gate(family: str, attn: str, baseline: str, basis: str) -> None:
    found = compare(load(family, attn), Question(), rules=LINEAR_GATE, baseline=baseline, basis=basis)
    assert found.worst <= TOLERANCE, found


@pytest.mark.parametrize("family", GATED)
def test_with_a_linear_gate_nothing_flows_through_the_gates_weights(family: str) -> None:
    """The activation rule has nothing left but a soft-cap of the logits and a delta net's convolution, and the
    variant has a name."""
    model, prompts = load(family), Question().prompts()
    found = tracer.attribute(model, prompts, rules="linear-gate")
    assert error(found.nodes, tracer.attribute(model, prompts).nodes) > 0.01
    without = tracer.attribute(model, prompts, rules=LINEAR_GATE - {"activation"})
    convolved = any(layout.wiring.value_conv is not None for layout in model.layouts)  # with an activation behind it
    assert torch.equal(without.nodes, found.nodes) == (model.soft_cap is None and not convolved)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_without_rules_relp_is_the_plain_gradient_to_the_bit(family: str) -> None:
    prompts = Question().prompts()
    none = tracer.attribute(load(family), prompts, "relp", rules=())
    plain = tracer.attribute(load(family), prompts, "grad")
    assert torch.equal(none.nodes, plain.nodes)
    assert torch.equal(none.embeddings, plain.embeddings)


@pytest.mark.parametrize("family", t.FAMILIES)
def test_each_rule_changes_the_attributions(family: str) -> None:
    model, prompts = load(family), Question().prompts()
    every = tracer.attribute(model, prompts).nodes
    gated = ref.mlps(model.module)[0].project(torch.zeros(1, 32))[1] is not None
    for rule in RULES:
        without = tracer.attribute(model, prompts, rules=RULES - {rule}).nodes
        assert (error(without, every) > 1e-3) == (rule != "product" or gated)


@pytest.mark.parametrize("method", ["relp", "grad", "ig", "ig-activation", "exact"])
@pytest.mark.parametrize(("family", "over"), VARIANTS)
def test_method_equals_oracle_in_variants_of_a_family(family: str, over: dict[str, Any], method: str) -> None:
    found = compare(load(family, **depth(method), **over), question(method), method, **steps(method))
    assert found.worst <= TOLERANCE, found


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox"])
def test_relp_equals_oracle_with_every_activation(family: str, act: str) -> None:
    found = compare(load(family, hidden_act=act), Question())
    assert found.worst <= TOLERANCE, found


@pytest.mark.parametrize("method", ref.METHODS)
@pytest.mark.parametrize("metric", ["logit", "difference", "logprob", "centred"])
def test_several_targets_and_positions_equal_oracle(metric: str, method: str) -> None:
    asked = Question(
        lengths=(5, 3), metric=metric, targets=((7, 9), (11, 60)), foils=((8, 30), (12, 31)), positions=(-2, -1)
    )
    found = compare(load("qwen3", **depth(method)), asked, method, **steps(method))
    assert found.worst <= TOLERANCE, found


@pytest.mark.parametrize("method", ["relp", "grad", "ig", "exact"])
def test_own_positions_and_numbers_of_targets_equal_oracle(method: str) -> None:
    """Each prompt reads its own positions and tokens: the oracle sees one prompt at a time."""
    model = load("llama", n_layers=2)
    rows = Question(lengths=(6, 4, 3)).ids()
    asked = [((0, 5), (7, 8, 9), (20,)), ((-2,), (11,), (21, 22)), ((2, 1, 0), (23, 24), (25,))]
    prompts = [
        tracer.Prompt(token_ids=row, target=target, foil=foil, positions=positions)
        for row, (positions, target, foil) in zip(rows, asked, strict=True)
    ]
    got = tracer.attribute(model, prompts, method, **steps(method))
    for index, (row, (positions, target, foil)) in enumerate(zip(rows, asked, strict=True)):
        metric = ref.Metric("logit_difference", torch.tensor([target]), torch.tensor([foil]), positions=positions)
        wanted = ref.attribute(model.module, torch.tensor([row]), None, metric, method, **steps(method))
        assert error(got.nodes[index, :, : len(row)], wanted.nodes[0]) <= TOLERANCE
        assert error(got.embeddings[index, : len(row)], wanted.embeddings[0]) <= TOLERANCE
        assert error(got.metric[index : index + 1], wanted.metric) <= TOLERANCE


@pytest.mark.parametrize("top_k", [1, 3, t.VOCAB])
def test_topk_of_any_size_equals_oracle(top_k: int) -> None:
    found = compare(load("mistral"), Question(metric="topk", top_k=top_k))
    assert found.worst <= TOLERANCE, found


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("method", sorted(PATH_METHODS))
def test_any_number_of_steps_equals_oracle(method: str, steps: int) -> None:
    found = compare(load("olmo2"), Question(), method, steps=steps, baseline="counterfactual")
    assert found.worst <= TOLERANCE, found


@pytest.mark.parametrize("baseline", ["zero", "counterfactual"])
def test_integrated_gradients_approach_the_change_of_the_metric(baseline: str) -> None:
    """Completeness: with more steps the embeddings' attributions add up to the difference of both ends."""
    model = fresh("llama", rms_norm_eps=1.0, n_layers=2)
    asked = Question()
    ids, mask = padded(asked.ids())
    end = torch.zeros(*ids.shape, 32)
    if baseline == "counterfactual":
        end = ref.embed(model.module, padded(asked.ids(100))[0])
    with torch.no_grad():
        change = asked.oracle()(ref.run(model.module, ids, mask).logits)
        change = change - asked.oracle()(ref.run(model.module, ids, mask, embeddings=end).logits)
    gaps = []
    for number in (5, 80):
        got = tracer.attribute(model, asked.prompts(), "ig", baseline=baseline, steps=number)
        gaps.append(error(got.embeddings.sum(-1), change))
    assert gaps[1] < 0.02
    assert gaps[1] < gaps[0] / 5


def test_more_steps_change_every_path_method() -> None:
    """A path method reads its metric at every step: ten steps are not one."""
    for method in sorted(PATH_METHODS):
        one, ten = (tracer.attribute(load("llama"), Question().prompts(), method, steps=k).nodes for k in (1, 10))
        assert error(ten, one) > 1e-2


def test_embeddings_of_relp_and_grad_are_compared_with_zero_whatever_the_baseline() -> None:
    model, asked = load("llama"), Question()
    for method in ("relp", "grad"):
        zero = tracer.attribute(model, asked.prompts(), method, baseline="zero")
        other = tracer.attribute(model, asked.prompts(), method, baseline="counterfactual")
        mean = tracer.attribute(model, asked.prompts(), method, baseline="mean", reference=asked.prompts()[:1])
        assert torch.equal(zero.embeddings, other.embeddings)
        assert torch.equal(zero.embeddings, mean.embeddings)
        assert error(other.nodes, zero.nodes) > 1e-2
        assert error(mean.nodes, zero.nodes) > 1e-2


def test_exact_is_the_measured_change_of_the_metric() -> None:
    """A few nodes by hand, with a hook on the model itself."""
    model, row = load("gemma3"), (1, 20, 30, 40)
    got = tracer.attribute(model, [tracer.Prompt(token_ids=row, target=7)], "exact")
    ids = torch.tensor([row])
    with torch.no_grad():
        plain = model.module(ids).logits[0, -1, 7]
    for layer, pos, neuron in [(0, 0, 3), (1, 2, 40), (2, 3, 17)]:

        def ablate(_: object, args: tuple[torch.Tensor], at: tuple[int, int] = (pos, neuron)) -> tuple[torch.Tensor]:
            changed = args[0].clone()
            changed[0, at[0], at[1]] = 0
            return (changed,)

        hook = ref.mlps(model.module)[layer].down.register_forward_pre_hook(ablate)
        with torch.no_grad():
            changed = model.module(ids).logits[0, -1, 7]
        hook.remove()
        assert float(got.nodes[0, layer, pos, neuron]) == pytest.approx(float(plain - changed), abs=2e-6)


@pytest.mark.parametrize("name", sorted(settings.METHODS))
def test_progress_rises_to_its_total(name: str) -> None:
    seen: list[tuple[int, int]] = []
    tracer.attribute(
        load("llama", n_layers=2), SMALL.prompts(), name, progress=lambda done, total: seen.append((done, total))
    )
    assert seen
    done, totals = [one for one, _ in seen], {total for _, total in seen}
    assert done == sorted(set(done))
    assert totals == {done[-1]}


def test_random_is_seeded_noise_per_prompt() -> None:
    model, prompts = load("llama"), Question().prompts()
    one, same, other = (tracer.attribute(model, prompts, "random", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.nodes, same.nodes)
    assert error(other.nodes, one.nodes) > 0.1
    full = one.nodes[0]
    assert abs(float(full.mean())) < 0.1
    assert float(full.std()) == pytest.approx(1.0, abs=0.1)
    assert not torch.equal(one.nodes[0, :, :2], one.nodes[2, :, :2])


def test_delta_is_the_distance_to_the_baseline() -> None:
    model, asked = load("gpt2"), Question()
    got = tracer.attribute(model, asked.prompts(), "delta", baseline="counterfactual")
    ids, mask = padded(asked.ids())
    other = padded(asked.ids(100))[0]
    runs = [torch.stack(ref.run(model.module, one, mask).acts, 1).detach() for one in (ids, other)]
    wanted = (runs[0] - runs[1]).abs() * mask[:, None, :, None]
    assert error(got.nodes, aligned(wanted, asked.lengths, 2)) <= TOLERANCE
    assert bool((got.nodes >= 0).all())
