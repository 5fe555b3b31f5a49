"""Identities of method.md section 8 that need no edges, and what attribute and trace refuse."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

import reference as ref
import tiny as t
import tracer
from helpers import KERNELS, KINDS, Question, aligned, direct_logits, error, fresh, load, padded, refused
from reference import ONE_ABOVE
from tracer import JobError, ModelError, Prompt
from tracer.attribution.result import Attribution
from tracer.attribution.selection import select
from tracer.model import rules
from tracer.settings import LINEAR_GATE, LINEAR_METRICS, METHODS, PATH_METHODS, RULES

QUESTION = Question()
NO_BIAS: list[tuple[str, dict[str, Any]]] = [
    *[(family, {}) for family in t.BIAS_FREE],
    ("qwen2", {"biases": False}),
    ("gpt2", {"biases": False}),
    ("gpt_neox", {"biases": False}),
    ("gpt_neox", {"biases": False, "use_parallel_residual": False}),
    ("llama", {"tie_word_embeddings": True}),
    *[(family, {"biases": False}) for family in ("falcon", "glm", "nemotron", "seed_oss", "gpt_bigcode", "gptj")],
    ("gemma4", {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": t.VOCAB, "num_kv_shared_layers": 1}),
]
GATED = tuple(family for family in t.FAMILIES if family not in t.UNGATED)


def steps(method: str) -> dict[str, Any]:
    return {"steps": 3} if method in PATH_METHODS else {}


def same(one: Attribution, other: Attribution) -> bool:
    """Equal to the bit in every tensor."""
    names = ("nodes", "activations", "embeddings", "metric")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


# ---------------------------------------------------------------- conservation (identity 2)


@pytest.mark.parametrize("metric", sorted(LINEAR_METRICS & set(KINDS)))
@pytest.mark.parametrize(("family", "over"), NO_BIAS)
def test_relp_conserves_the_metric_without_biases(family: str, over: dict[str, Any], metric: str) -> None:
    asked = replace(QUESTION, metric=metric)
    if family in GATED:
        gate = tracer.attribute(load(family, **over), asked.prompts(), metric=metric, rules=LINEAR_GATE)
        assert float(gate.relative_unexplained().max()) < 1e-5
    for baseline in ("zero", "counterfactual"):
        got = tracer.attribute(load(family, **over), asked.prompts(), metric=metric, baseline=baseline)
        assert float(got.relative_unexplained().max()) < 1e-5
        assert torch.allclose(got.unexplained, got.metric - got.embeddings.sum(-1))


@pytest.mark.parametrize(("family", "attn"), [pair for pair in KERNELS if pair[0] in t.BIAS_FREE])
def test_relp_conserves_the_metric_with_every_kernel_baseline_and_basis(family: str, attn: str) -> None:
    for baseline in ("zero", "mean", "counterfactual"):
        for basis in ("activation", "output"):
            got = tracer.attribute(load(family, attn), QUESTION.prompts(), baseline=baseline, basis=basis)
            assert error(got.embeddings.sum(-1), got.metric) < 1e-4


@pytest.mark.parametrize("family", GATED)
def test_without_the_half_rule_relevance_is_not_conserved(family: str) -> None:
    got = tracer.attribute(load(family, biases=False), QUESTION.prompts(), rules=RULES - {"product"})
    assert error(got.embeddings.sum(-1), got.metric) > 0.05


@pytest.mark.parametrize(
    ("family", "over"), [("qwen2", {}), ("gpt2", {}), ("gpt_neox", {}), ("llama", {"mlp_bias": True})]
)
def test_biases_leave_a_residual_that_is_reported_and_no_error(family: str, over: dict[str, Any]) -> None:
    model = load(family, **over)
    got = tracer.attribute(model, QUESTION.prompts())
    ids, mask = padded(QUESTION.ids())
    wanted = ref.attribute(model.module, ids, mask, QUESTION.oracle())
    unexplained = wanted.metric - wanted.embeddings.sum(1)
    assert error(got.unexplained, unexplained) < 1e-4
    assert float(got.relative_unexplained().max()) > 1e-3
    assert not model.conserves


BREAKABLE = [("llama", kind) for kind in ("rms_norm", "attention", "activation", "product")]


@pytest.mark.parametrize(("family", "kind"), [*BREAKABLE, ("gemma3", "rms_norm"), ("phi3", "attention")])
def test_a_broken_rule_is_caught_by_conservation(family: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, _ = rules.RULE_OF[kind]
    monkeypatch.setitem(rules.RULE_OF, kind, (rule, lambda envoy: None))
    with refused(ModelError, "conservation", "tracer doctor"):
        tracer.attribute(load(family), QUESTION.prompts())


def test_a_broken_soft_cap_is_caught_by_conservation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "soft_cap", lambda logits, uncapped, cap: logits)
    with refused(ModelError, "conservation"):
        tracer.attribute(load("gemma2"), QUESTION.prompts())


def test_conservation_is_not_asked_where_it_need_not_hold() -> None:
    for how in ({"method": "grad"}, {"rules": RULES - {"norm"}}, {"metric": "logprob"}):
        got = tracer.attribute(load("llama"), QUESTION.prompts(), **how)  # type: ignore[arg-type]
        assert float(got.relative_unexplained().max()) > 1e-3


# ---------------------------------------------------------------- agreement on a linear model (identity 7)


def linear_in_neurons(family: str) -> tracer.Model:
    """One layer, and what follows its neurons made linear: norms of constant statistic and no soft-cap."""
    over = {"final_logit_softcapping": None} if family.startswith("gemma") else {}
    model = fresh(family, n_layers=1, **over)
    block = model.module.get_submodule(f"{model.family.blocks}.0")
    after = [model.module.get_submodule(model.family.final_norm.path)]
    if (behind := model.layouts[0].wiring.mlp_out) is not None:
        after.append(block.get_submodule(behind))
    for norm in after:
        name = next(name for name in ("variance_epsilon", "eps") if hasattr(norm, name))
        setattr(norm, name, 1e6)
        norm.weight.mul_(1e3)
        if type(norm).__name__ in ONE_ABOVE:
            norm.weight.add_(1e3)
    return model


@pytest.mark.parametrize("basis", ["activation", "output"])
@pytest.mark.parametrize("family", [family for family in t.FAMILIES if family != "olmo"])  # its epsilon is in its code
def test_methods_agree_on_a_model_linear_in_its_neurons(family: str, basis: str) -> None:
    model = linear_in_neurons(family)
    prompts = Question(lengths=(3, 2)).prompts()
    wanted = tracer.attribute(model, prompts, "exact", basis=basis).nodes
    assert wanted.abs().max() > 1e-2
    for method in ("relp", "grad", "ig-activation"):
        got = tracer.attribute(model, prompts, method, basis=basis, **steps(method)).nodes
        assert error(got, wanted) < 1e-4


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_methods_agree_for_every_baseline_on_a_linear_model(family: str) -> None:
    model, prompts = linear_in_neurons(family), Question(lengths=(3, 3)).prompts()
    for baseline in ("mean", "counterfactual"):
        wanted = tracer.attribute(model, prompts, "exact", baseline=baseline).nodes
        for method in ("relp", "grad"):
            assert error(tracer.attribute(model, prompts, method, baseline=baseline).nodes, wanted) < 1e-4


def test_methods_disagree_on_a_model_that_is_not_linear() -> None:
    """The agreement above is the model's doing, not the methods'."""
    prompts = Question(lengths=(3, 2)).prompts()
    found = [tracer.attribute(load("llama"), prompts, method).nodes for method in ("relp", "grad", "exact")]
    assert error(found[0], found[2]) > 1e-2
    assert error(found[1], found[2]) > 1e-2


def test_layers_of_nodes_do_not_add_up_to_the_logit() -> None:
    """Identity 5: node attributions are total effects and overlap."""
    got = tracer.attribute(load("llama"), QUESTION.prompts())
    per_layer = got.nodes.sum((2, 3))
    assert error(per_layer.sum(1), got.metric) > 0.05
    assert all(error(per_layer[:, layer], got.metric) > 0.05 for layer in range(3))


# ---------------------------------------------------------------- batches (identity 8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "attn"), [("llama", "sdpa"), ("gemma3", "eager"), ("gpt2", "sdpa")])
def test_a_prompt_alone_or_in_any_batch_has_the_same_attributions(family: str, attn: str, method: str) -> None:
    model = load(family, attn, n_layers=2)
    prompts = Question(lengths=(5, 3, 2)).prompts()
    how: dict[str, Any] = {"method": method, **steps(method)}
    if method != "random":
        how["baseline"] = "counterfactual"
    together = tracer.attribute(model, prompts, **how)
    reverse = tracer.attribute(model, prompts[::-1], **how)
    twice = tracer.attribute(model, [*prompts, *prompts], **how)
    for row, length in enumerate((5, 3, 2)):
        alone = tracer.attribute(model, [prompts[row]], **how)
        for other, at in ((reverse, 2 - row), (twice, row + 3)):
            assert error(other.nodes[at], together.nodes[row]) < 1e-5
        assert error(together.nodes[row, :, :length], alone.nodes[0]) < 1e-5
        assert error(together.activations[row, :, :length], alone.activations[0]) < 1e-5
        assert error(together.embeddings[row, :length], alone.embeddings[0]) < 1e-5
        assert error(together.metric[row : row + 1], alone.metric) < 1e-5
        for tensor in (together.nodes[row, :, length:], together.activations[row, :, length:]):
            assert tensor.abs().sum() == 0
        assert together.embeddings[row, length:].abs().sum() == 0


def test_random_is_the_same_to_the_bit_in_any_batch() -> None:
    prompts = QUESTION.prompts()
    together = tracer.attribute(load("llama"), prompts, "random", seed=3)
    for row, length in enumerate(QUESTION.lengths):
        alone = tracer.attribute(load("llama"), [prompts[row]], "random", seed=3)
        assert torch.equal(together.nodes[row, :, :length], alone.nodes[0])
        assert torch.equal(together.embeddings[row, :length], alone.embeddings[0])


@pytest.mark.parametrize("method", METHODS)
def test_two_calls_give_the_same_bits(method: str) -> None:
    model, prompts = load("qwen3", "sdpa", n_layers=2), Question(lengths=(4, 2)).prompts()
    one, two = (tracer.attribute(model, prompts, method, **steps(method)) for _ in range(2))
    assert same(one, two)
    assert same(one, tracer.attribute(fresh("qwen3", attn="sdpa", n_layers=2), prompts, method, **steps(method)))


@pytest.mark.parametrize("memory", [1, 30_000, 10**12])
@pytest.mark.parametrize("method", METHODS)
def test_any_memory_gives_the_same_results_in_the_same_order(method: str, memory: int) -> None:
    model, asked = load("olmo2", n_layers=2), Question(lengths=(2, 5, 3))
    how: dict[str, Any] = {"method": method, **steps(method)}
    wanted = tracer.attribute(model, asked.prompts(), **how)
    got = tracer.attribute(model, asked.prompts(), **how, memory=memory)
    assert (got.token_ids, got.target_ids) == (wanted.token_ids, wanted.target_ids)
    for name in ("nodes", "activations", "embeddings", "metric"):
        assert error(getattr(got, name), getattr(wanted, name)) < 1e-5


def test_little_memory_means_several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    from tracer.attribution import circuits

    model, sizes, run = load("llama"), [], circuits.attributions

    def counted(nn: Any, plan: Any, ask: Any) -> Any:
        sizes.append(len(ask.token_ids))
        return run(nn, plan, ask)

    monkeypatch.setattr(circuits, "attributions", counted)
    per_token = model.bytes_per_token()
    prompts = Question(lengths=(4, 4, 4)).prompts()
    for memory, wanted in [(1, [1, 1, 1]), (8 * per_token, [2, 1]), (12 * per_token, [3])]:
        sizes.clear()
        tracer.attribute(model, prompts, memory=memory)
        assert sizes == wanted


@pytest.mark.parametrize("baseline", ["mean", "counterfactual"])
def test_baselines_do_not_depend_on_memory(baseline: str) -> None:
    model, prompts = load("gpt_neox"), Question(lengths=(2, 5, 3)).prompts()
    wanted = tracer.attribute(model, prompts, baseline=baseline)
    assert error(tracer.attribute(model, prompts, baseline=baseline, memory=1).nodes, wanted.nodes) < 1e-5


def test_the_mean_is_per_position_over_the_reference() -> None:
    """Without a reference the prompts themselves are it; a longer reference is cut."""
    model, asked = load("llama"), Question(lengths=(4, 2, 4))
    own = tracer.attribute(model, asked.prompts(), "delta", baseline="mean")
    ids, mask = padded(asked.ids())
    acts = torch.stack(ref.run(model.module, ids, mask).acts, 1).detach() * mask[:, None, :, None]
    values = aligned(acts, asked.lengths, 2)
    mean = values.sum(0) / torch.tensor([3.0, 3.0, 2.0, 2.0])[None, :, None]
    real = (torch.arange(4)[None] < torch.tensor(asked.lengths)[:, None])[:, None, :, None]
    assert error(own.nodes, (values - mean).abs() * real) < 1e-5
    same_ones = tracer.attribute(model, asked.prompts(), "delta", baseline="mean", reference=asked.prompts())
    assert torch.equal(own.nodes, same_ones.nodes)
    longer = [Prompt(token_ids=(*ids, 5, 6)) for ids in asked.ids()]
    cut = tracer.attribute(model, asked.prompts()[1:2], "delta", baseline="mean", reference=longer)
    assert error(cut.nodes[0], own.nodes[1, :, :2]) < 1e-5


def test_several_threads_on_one_model_get_right_answers() -> None:
    model = fresh("llama", attn="sdpa")
    jobs = [
        (replace(QUESTION, seed=seed).prompts(), method)
        for seed in range(6)
        for method in ("relp", "grad", "ig", "delta")
    ]
    wanted = [tracer.attribute(model, prompts, method) for prompts, method in jobs]
    start = threading.Barrier(4)

    def work(job: int) -> Attribution:
        if job < 4:
            start.wait(timeout=60)
        return tracer.attribute(model, jobs[job][0], jobs[job][1])

    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(work, range(len(jobs))))
    assert all(same(one, other) for one, other in zip(got, wanted, strict=True))


def test_threads_on_different_models_get_right_answers() -> None:
    models = [fresh(family) for family in ("llama", "gpt2", "gemma3", "qwen3")]
    wanted = [tracer.attribute(load(family), QUESTION.prompts()) for family in ("llama", "gpt2", "gemma3", "qwen3")]
    start = threading.Barrier(4)

    def work(index: int) -> list[Attribution]:
        start.wait(timeout=60)
        return [tracer.attribute(models[index], QUESTION.prompts()) for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        for found, one in zip(pool.map(work, range(4)), wanted, strict=True):
            assert all(same(each, one) for each in found)


# ---------------------------------------------------------------- what is asked


def test_without_a_target_the_models_own_top_token_is_asked_about() -> None:
    model, asked = load("llama"), replace(QUESTION, lengths=(4, 7, 2))
    got = tracer.attribute(model, [Prompt(token_ids=ids) for ids in asked.ids()])
    top = direct_logits(model, asked.ids())[:, -1].argmax(-1)
    assert [ids[0] for ids in got.target_ids] == top.tolist()
    explicit = [Prompt(token_ids=ids, target=int(one)) for ids, one in zip(asked.ids(), top, strict=True)]
    assert same(got, tracer.attribute(model, explicit))


def test_the_top_token_is_read_at_the_prompts_own_position() -> None:
    model, (ids, *_) = load("llama"), QUESTION.ids()
    got = tracer.attribute(model, [Prompt(token_ids=ids, positions=2), Prompt(token_ids=ids[:2])])
    for row, upto in ((0, ids[:3]), (1, ids[:2])):
        assert got.target_ids[row] == (int(direct_logits(model, [upto])[0, -1].argmax()),)


def test_topk_sums_the_models_own_top_tokens() -> None:
    model, asked = load("qwen2"), replace(QUESTION, metric="topk")
    got = tracer.attribute(model, asked.prompts(), metric="topk", top_k=3)
    top = direct_logits(model, asked.ids())[:, -1].topk(3)
    assert [list(ids) for ids in got.target_ids] == top.indices.tolist()
    assert error(got.metric, top.values.sum(-1)) < 1e-6


def test_auto_is_the_difference_with_a_foil_and_else_the_logit() -> None:
    model = load("llama")
    one = tracer.attribute(model, [Prompt(token_ids=[1, 5], target=7)])
    two = tracer.attribute(model, [Prompt(token_ids=[1, 5], target=7, foil=8)])
    assert (one.settings.metric, two.settings.metric) == ("logit", "difference")
    logits = direct_logits(model, [(1, 5)])[0, -1]
    assert float(one.metric[0]) == pytest.approx(float(logits[7]), rel=1e-6)
    assert float(two.metric[0]) == pytest.approx(float(logits[7] - logits[8]), rel=1e-5)


def test_text_and_its_token_ids_are_the_same_prompt() -> None:
    model = load("llama")
    text = "The secretaries near the car"
    words = Prompt(text, target=" are", foil=" is", counterfactual="The secretary near the cars")
    encode = model.tokenizer.encode
    ids = Prompt(
        token_ids=encode(text),
        target=encode(" are", add_special_tokens=False)[0],
        foil=encode(" is", add_special_tokens=False)[0],
        counterfactual=encode("The secretary near the cars"),
    )
    assert same(*(tracer.attribute(model, [one], baseline="counterfactual") for one in (words, ids)))


PLAIN = Prompt(token_ids=[1, 5, 6], target=7)
FOILED = Prompt(token_ids=[1, 5, 6], target=7, foil=8)
OPEN = Prompt(token_ids=[1, 5, 6])
WRONG: list[tuple[list[Prompt], dict[str, Any], tuple[str, ...]]] = [
    ([], {}, ("prompts []", "nothing")),
    ([PLAIN], {"method": "attnlrp"}, ("method='attnlrp'", "relp")),
    ([PLAIN], {"rules": ["softmax"]}, ("softmax",)),
    ([PLAIN], {"method": "grad", "rules": ["norm"]}, ("rules", "effect")),
    ([PLAIN], {"steps": 4}, ("steps", "effect")),
    ([PLAIN], {"method": "ig", "steps": 0}, ("steps=0",)),
    ([PLAIN], {"method": "conductance", "baseline": "mean", "reference": [PLAIN]}, ("mean", "conductance")),
    ([PLAIN], {"method": "random", "baseline": "counterfactual"}, ("baseline", "random")),
    ([PLAIN], {"baseline": "counterfactual"}, ("counterfactual", "give it one")),
    ([PLAIN], {"baseline": "mean"}, ("mean", "reference")),
    ([PLAIN], {"reference": [PLAIN]}, ("reference", "no effect")),
    ([PLAIN], {"baseline": "mean", "reference": []}, ("reference",)),
    ([PLAIN], {"baseline": "mean", "reference": [Prompt(token_ids=[1, 5])]}, ("2 tokens", "3", "longer")),
    ([PLAIN, FOILED], {}, ("auto", "foil")),
    ([PLAIN], {"metric": "difference"}, ("difference", "foil")),
    ([FOILED], {"metric": "logit"}, ("foil", "no effect")),
    ([FOILED], {"metric": "logprob"}, ("foil", "no effect")),
    ([PLAIN], {"metric": "topk"}, ("target", "no effect")),
    ([OPEN], {"metric": "topk", "top_k": 102}, ("top_k=102", "101")),
    ([PLAIN], {"top_k": 3}, ("top_k", "effect")),
    ([PLAIN], {"seed": 3}, ("seed", "effect")),
    ([Prompt(token_ids=[1, 5, 6], positions=[1, 2])], {}, ("positions", "target")),
    ([PLAIN], {"memory": 0}, ("memory=0",)),
    ([PLAIN], {"memory": -1}, ("memory=-1",)),
    ([Prompt(token_ids=[1] * 65, target=7)], {}, ("65 tokens", "64")),
    ([Prompt(token_ids=[1, 101], target=7)], {}, ("101", "0 to 100")),
    ([Prompt("The car", target="are")], {}, ("'are'", "' are'")),
]


@pytest.mark.parametrize(("prompts", "how", "parts"), WRONG, ids=lambda value: str(value)[:50])
def test_what_cannot_be_attributed_is_refused(
    prompts: list[Prompt], how: dict[str, Any], parts: tuple[str, ...]
) -> None:
    with refused(JobError, *parts):
        tracer.attribute(load("llama"), prompts, **how)


LONG = "The" + " secretaries near the cars" * 14


@pytest.mark.parametrize(
    ("prompt", "how"),
    [
        (Prompt(LONG, target=" are"), {"baseline": "counterfactual"}),
        (Prompt(LONG, target=" are"), {"metric": "difference"}),
        (Prompt(LONG, target=" are", foil=" is"), {"metric": "logit"}),
        (Prompt(LONG, target=" are"), {"metric": "topk"}),
        (Prompt(LONG, target=" are", counterfactual=LONG[:100]), {}),
        (Prompt(LONG, target=LONG), {}),
    ],
)
def test_messages_about_a_long_prompt_stay_short(prompt: Prompt, how: dict[str, Any]) -> None:
    with pytest.raises(JobError) as caught:
        tracer.attribute(load("llama"), [prompt], **how)
    assert len(str(caught.value)) < 260


def test_a_result_that_is_not_finite_is_refused() -> None:
    """Weights that are finite and overflow: the answer would be NaN."""
    model = fresh("llama")
    model.module.model.layers[1].mlp.gate_proj.weight.mul_(1e30)
    model.module.model.layers[1].mlp.up_proj.weight.mul_(1e30)
    with refused(ModelError, "prompt 0", "not finite"):
        tracer.attribute(model, QUESTION.prompts())


# ---------------------------------------------------------------- trace


@pytest.mark.parametrize("method", ["relp", "grad", "exact", "random"])
def test_a_circuit_is_the_selection_of_the_attributions(method: str) -> None:
    model = load("llama", n_layers=2)
    prompt = Prompt("The secretaries near the car", target=" are", foil=" is", id="mine")
    found = tracer.attribute(model, [prompt], method)
    circuit = tracer.trace(model, prompt, nodes=20, method=method, edges=False)
    kept = select(found.nodes[0], float(found.metric[0]), nodes=20)
    rows = circuit.neurons.to_pylist()
    assert [(row["layer"], row["position"], row["neuron"]) for row in rows] == [tuple(r) for r in kept.tolist()]
    for row in rows:
        at = (0, row["layer"], row["position"], row["neuron"])
        assert row["attribution"] == float(found.nodes[at])
        assert row["activation"] == float(found.activations[at])
        assert row["token"] == circuit.tokens[row["position"]]
    assert circuit.n_nodes == 20
    assert circuit.n_neurons == len({(row["layer"], row["neuron"]) for row in rows})
    assert circuit.n_total == found.nodes[0].numel()
    assert circuit.metric == float(found.metric[0])
    assert circuit.unexplained == float(found.unexplained[0])
    mass = sum(abs(row["attribution"]) for row in rows) / float(found.nodes.abs().sum())
    assert circuit.kept_mass == pytest.approx(mass, rel=1e-5)
    assert circuit.user_id == "mine"
    assert circuit.conserves == (method == "relp")


def test_a_circuit_lists_every_embedding_and_every_logit() -> None:
    model = load("gemma3")
    prompt = Prompt(token_ids=[1, 20, 30, 40], target=(7, 9), foil=(8,), positions=(1, 3))
    circuit = tracer.trace(model, prompt, nodes=5)
    found = tracer.attribute(model, [prompt])
    table = circuit.nodes.to_pylist()
    assert [row["node_id"] for row in table] == list(range(len(table)))
    assert {row["prompt_id"] for row in table} == {0}
    assert [row["kind"] for row in table] == ["neuron"] * 5 + ["embedding"] * 4 + ["logit"] * 6
    embeddings = [row for row in table if row["kind"] == "embedding"]
    assert [(row["layer"], row["position"], row["neuron"]) for row in embeddings] == [
        (-1, pos, token) for pos, token in enumerate(prompt.token_ids or ())
    ]
    assert [row["attribution"] for row in embeddings] == found.embeddings[0].tolist()
    assert all(row["activation"] is None for row in embeddings)
    logits = [row for row in table if row["kind"] == "logit"]
    ids, mask = padded([[int(one) for one in prompt.token_ids or ()]])
    values = ref.run(model.module, ids, mask).logits[0]
    for row in logits:
        assert row["layer"] == 3
        assert row["activation"] == pytest.approx(float(values[row["position"], row["neuron"]]), rel=1e-5)
        weight = -0.5 if row["neuron"] == 8 else 0.25
        assert row["attribution"] == pytest.approx(weight * row["activation"], rel=1e-6)
    assert {(row["position"], row["neuron"]) for row in logits} == {(p, k) for p in (1, 3) for k in (7, 8, 9)}
    assert sum(row["attribution"] for row in logits) == pytest.approx(circuit.metric, rel=1e-4)
    assert [row["token"] for row in logits] == [model.tokenizer.decode([row["neuron"]]) for row in logits]


def test_predictions_are_the_models_top_probabilities() -> None:
    model = load("gpt2")
    circuit = tracer.trace(model, Prompt(token_ids=[1, 20, 30], target=7), nodes=1)
    top = direct_logits(model, [(1, 20, 30)])[0, -1].double().softmax(-1).topk(5)
    assert [one.token_id for one in circuit.predictions] == top.indices.tolist()
    assert [one.probability for one in circuit.predictions] == pytest.approx(top.values.tolist(), rel=1e-5)
    assert [one.token for one in circuit.predictions] == [model.tokenizer.decode([i]) for i in top.indices.tolist()]


def test_the_selection_rules_reach_the_circuit() -> None:
    model, prompt = load("llama"), Prompt(token_ids=[1, 20, 30, 40], target=7)
    every = tracer.attribute(model, [prompt])
    strength = every.nodes[0].abs()
    half = tracer.trace(model, prompt, nodes=None, mass=0.5)
    assert 0.5 <= half.kept_mass < 0.51
    above = tracer.trace(model, prompt, nodes=None, threshold=0.02)
    assert above.n_nodes == int((strength >= 0.02 * every.metric.abs()).sum())
    later = tracer.trace(model, prompt, nodes=30, skip_first=True)
    assert min(later.neurons["position"].to_pylist()) >= 1
    first = later.neurons.to_pylist()[0]
    without = tracer.trace(model, prompt, nodes=30, skip_first=True, exclude=[(first["layer"], first["neuron"])])
    pairs = {(row["layer"], row["neuron"]) for row in without.neurons.to_pylist()}
    assert (first["layer"], first["neuron"]) not in pairs


@pytest.mark.parametrize(
    ("how", "part"),
    [
        ({"nodes": 0}, "nodes=0"),
        ({"mass": 2.0}, "mass=2.0"),
        ({"threshold": -1.0}, "threshold=-1.0"),
        ({"exclude": [(3, 0)]}, "exclude=(3, 0)"),
        ({"exclude": [(0, 48)]}, "exclude=(0, 48)"),
    ],
)
def test_a_selection_out_of_range_is_refused(how: dict[str, Any], part: str) -> None:
    with refused(JobError, part):
        tracer.trace(load("llama"), PLAIN, **how)


def test_a_selection_out_of_range_is_refused_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    from tracer.attribution import circuits

    def never(*_: object) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr(circuits, "attributions", never)
    with refused(JobError, "nodes=0"):
        tracer.trace(load("llama"), PLAIN, nodes=0)


def test_a_trace_repeats_to_the_bit() -> None:
    one, two = (tracer.trace(load("llama"), FOILED, nodes=10) for _ in range(2))
    assert one.nodes.equals(two.nodes)
    assert one.fingerprint == two.fingerprint
    assert one.model_dump(exclude={"seconds", "nodes"}) == two.model_dump(exclude={"seconds", "nodes"})
