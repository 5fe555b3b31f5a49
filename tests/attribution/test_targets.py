"""What a circuit can be of beside single tokens, and the bases beside neurons, against plain PyTorch (reference.py)."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import reference as ref
import tiny as t
import tracer
from helpers import KERNELS, Question, aligned, error, load, padded, refused
from tracer import JobError
from tracer.settings import TargetDirection, TargetNeuron

TOLERANCE = 1e-5
LENGTHS = (7, 4, 2)
NEURON, LAYER = 7, 2
METHODS = ("relp", "grad", "ig", "conductance", "ig-activation", "relp-ig", "delta", "exact")
PLACES = ("neuron", "direction", "final")
MANY = ("llama", "gemma3", "qwen2", "olmo2", "phi3", "gpt_neox", "gpt2")


def vector(seed: int = 3) -> torch.Tensor:
    return torch.randn(32, generator=torch.Generator().manual_seed(seed))


def asked(place: str, layer: int = LAYER) -> tuple[Any, ref.Inside]:
    """What is asked about inside the model, for the product and for the oracle."""
    if place == "neuron":
        return f"L{layer} N{NEURON}", ref.Inside("inside", at=("neuron", layer), unit=NEURON)
    where = None if place == "final" else layer
    at = ("direction", -1 if where is None else where)
    return tracer.direction(vector(), where), ref.Inside("inside", at=at, vector=vector())


def compared(model: tracer.Model, place: str, method: str, *, layer: int = LAYER, **how: Any) -> float:
    """The worst relative difference of product and oracle, of a batch of prompts padded on the left."""
    lengths = LENGTHS if method != "exact" else (4, 2)
    question, (of, oracle) = Question(lengths=lengths), asked(place, layer)
    paired = how.get("baseline") == "counterfactual"
    prompts = [
        tracer.Prompt(token_ids=ids, counterfactual=other if paired else None)
        for ids, other in zip(question.ids(), question.ids(100), strict=True)
    ]
    got = tracer.attribute(model, prompts, method, of=of, **how)
    ids, mask = padded(question.ids())
    more = {"counterfactual_ids": padded(question.ids(100))[0]} if paired else {}
    wanted = ref.attribute(model.module, ids, mask, oracle, method, **more, **how)
    nodes = wanted.nodes.clone()
    if place == "neuron":  # it itself is no node of its own circuit, nor what comes after it
        first = layer + (how.get("basis") == "attention" and not model.plan.layers[layer].parallel)
        nodes[:, first:] = 0
    if place == "direction":
        nodes[:, layer + 1 :] = 0
    assert got.nodes.abs().sum() > 0
    return max(
        error(got.nodes, aligned(nodes, lengths, 2)),
        error(got.embeddings, aligned(wanted.embeddings, lengths, 1)),
        error(got.metric, wanted.metric),
    )


def some(method: str) -> dict[str, Any]:
    return {"steps": 3} if method not in ("relp", "grad", "delta", "exact") else {}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("family", "attn"), KERNELS)
def test_relp_of_a_neuron_or_a_direction_is_plain_autograd(family: str, attn: str, place: str) -> None:
    assert compared(load(family, attn, n_layers=3), place, "relp", layer=1) <= TOLERANCE


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_does(method: str, place: str) -> None:
    for family in ("llama", "gpt_neox"):
        model = load(family, n_layers=2)
        assert compared(model, place, method, layer=1, **some(method)) <= TOLERANCE


@pytest.mark.parametrize("basis", ["activation", "output", "residual", "attention"])
@pytest.mark.parametrize("baseline", ["zero", "counterfactual"])
def test_in_every_basis_and_from_a_counterfactual(basis: str, baseline: str) -> None:
    for family, place in itertools.product(("llama", "gemma3", "gpt_neox", "gpt2"), PLACES):
        model = load(family, n_layers=3)
        assert compared(model, place, "relp", layer=1, basis=basis, baseline=baseline) <= TOLERANCE


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", t.BIAS_FREE)
def test_the_embeddings_attributions_are_the_metric_without_biases(family: str, place: str) -> None:
    model, (of, _) = load(family), asked(place)
    found = tracer.attribute(model, [tracer.Prompt(token_ids=ids) for ids in Question().ids()], of=of)
    assert float(found.relative_unexplained().max()) < 1e-5


@pytest.mark.parametrize("family", t.BIAS_FREE)
def test_every_block_of_the_residual_stream_holds_the_whole_metric(family: str) -> None:
    model = load(family)
    found = tracer.attribute(
        model, [tracer.Prompt(token_ids=ids, target=7) for ids in Question().ids()], basis="residual"
    )
    sums = found.nodes.sum((2, 3))
    assert torch.allclose(sums, found.metric[:, None].expand_as(sums), rtol=1e-4, atol=1e-5)


def edges_of(circuit: tracer.Circuit) -> dict[tuple[Any, ...], float]:
    """The weights of edges into the target, by source."""
    return {
        (row["source_layer"], row["source_position"], row["source_neuron"] if row["source_layer"] >= 0 else -1): row[
            "weight"
        ]
        for row in circuit.edges.to_pylist()
        if row["target_kind"] == "target"
    }


ALL_EDGES = tracer.Pruning(share=0.0)


@pytest.mark.parametrize("basis", ["activation", "output"])
@pytest.mark.parametrize("family", MANY)
def test_edges_into_a_neuron_are_the_oracles(family: str, basis: str) -> None:
    model, ids = load(family), Question().ids()[0]
    circuit = tracer.trace(model, tracer.Prompt(token_ids=ids), 40, of="L2 N7", basis=basis, pruning=ALL_EDGES)
    target = (2, len(ids) - 1, 7)
    if basis == "activation":
        wanted = ref.edges(model.module, torch.tensor([ids]), [target])
    else:
        wanted = into(model, ids, ref.Inside("inside", at=("neuron", 2), unit=7), basis)
    check_edges(circuit, wanted.neurons[0], wanted.embeddings[0], float(wanted.values[0]), model)


@pytest.mark.parametrize("place", ["direction", "final"])
@pytest.mark.parametrize("family", MANY)
def test_edges_into_a_direction_are_the_oracles(family: str, place: str) -> None:
    model, ids, (of, oracle) = load(family), Question().ids()[0], asked(place)
    circuit = tracer.trace(model, tracer.Prompt(token_ids=ids), 40, of=of, pruning=ALL_EDGES)
    wanted = into(model, ids, oracle)
    check_edges(circuit, wanted.neurons[0], wanted.embeddings[0], float(wanted.values[0]), model)


def into(model: tracer.Model, ids: tuple[int, ...], oracle: ref.Inside, basis: str = "activation") -> ref.Edges:
    """Every source's direct weight into what is inside the model, all MLPs held."""
    leaf = ref.embed(model.module, torch.tensor([ids])).requires_grad_()
    with ref.linearized(model.module):
        trace = ref.run(
            model.module,
            torch.tensor([ids]),
            basis=basis,
            embeddings=leaf,
            replacement=lambda layer, value: value.detach().clone().requires_grad_(),
        )
    if oracle.at[0] == "neuron" and basis == "activation":
        trace.inside[oracle.at] = trace.raw[oracle.at[1]]
    value = oracle.read(trace).sum()
    grads = torch.autograd.grad(value, [*trace.acts, leaf], allow_unused=True, materialize_grads=True)
    weights = torch.stack([(act * grad)[0].detach() for act, grad in zip(trace.acts, grads[:-1], strict=True)])
    inputs = (leaf * grads[-1]).sum(-1)[0].detach()
    return ref.Edges((), value[None].detach(), weights[None], inputs[None], weights, (weights, inputs))


def check_edges(
    circuit: tracer.Circuit, weights: torch.Tensor, inputs: torch.Tensor, value: float, model: tracer.Model
) -> None:
    """The edges into the target, one by one, and what they add up to."""
    (end,) = circuit.rows("target")
    assert end["activation"] == pytest.approx(value, rel=1e-4, abs=1e-6)
    found = edges_of(circuit)
    assert len(found) > 10
    scale = float(weights.abs().max())
    for (layer, position, neuron), weight in found.items():
        wanted = inputs[position] if layer < 0 else weights[layer, position, neuron]
        assert weight == pytest.approx(float(wanted), rel=1e-3, abs=1e-4 * scale)
    if not model.has_biases:
        assert float(weights.sum() + inputs.sum()) == pytest.approx(value, rel=1e-3, abs=1e-5)
        assert end["bias_share"] == pytest.approx(0, abs=1e-3)


def test_a_neuron_is_read_at_the_positions_of_the_prompt_and_with_its_sign() -> None:
    model, ids = load("llama"), Question().ids()[0]
    both = tracer.Prompt(token_ids=ids, positions=[2, -1])
    found = tracer.attribute(model, [both], of="L2 N7")
    other = tracer.attribute(model, [both], of="L2 N7-")
    trace = ref.run(model.module, torch.tensor([ids]))
    assert float(found.metric) == pytest.approx(float(trace.raw[2][0, [2, -1], 7].mean()), rel=1e-5)
    assert torch.equal(found.nodes, -other.nodes)
    circuit = tracer.trace(model, both, 20, of="L2 N7")
    assert [(row["position"], row["layer"], row["neuron"], row["token"]) for row in circuit.rows("target")] == [
        (2, model.n_layers, 7, "L2 N7"),
        (6, model.n_layers, 7, "L2 N7"),
    ]
    assert sum(row["attribution"] for row in circuit.rows("target")) == pytest.approx(circuit.metric)
    assert {row["layer"] for row in circuit.rows("neuron")} <= {0, 1}


def test_a_circuit_of_a_neuron_is_saved_read_shown_and_evaluated(tmp_path: Path) -> None:
    model, ids = load("llama"), Question().ids()[0]
    circuit = tracer.trace(model, tracer.Prompt(token_ids=ids), 60, of="L2 N7-")
    circuit.save(tmp_path / "run")
    again = tracer.Circuit.load(tmp_path / "run")
    assert again.settings.of == TargetNeuron(layer=2, neuron=7, sign=-1)
    assert again.fingerprint == circuit.fingerprint
    assert again.nodes.equals(circuit.nodes)
    tracer.view(circuit, tmp_path / "graph.html")
    assert "target L2 N7-" in (tmp_path / "graph.html").read_text()
    found = tracer.evaluate(model, circuit, sizes=[10, 60])
    value = ref.run(model.module, torch.tensor([ids])).raw[2][0, -1, 7]
    assert float(found.whole[0]) == pytest.approx(-float(value), rel=1e-5)
    keep = {(row["layer"], row["position"], row["neuron"]) for row in circuit.neurons.to_pylist()}
    assert float(found.faithfulness.estimate[-1]) == pytest.approx(
        kept_alone(model, ids, keep, -1.0), rel=1e-3, abs=1e-4
    )


def kept_alone(model: tracer.Model, ids: tuple[int, ...], keep: set[tuple[int, ...]], sign: float) -> float:
    """Faithfulness of a set of nodes to L2 N7, by plain replacement; what is ablated of layer 2 does not matter."""

    def measured(keep: set[tuple[int, ...]]) -> float:
        def put(layer: int, value: torch.Tensor) -> torch.Tensor:
            out = torch.zeros_like(value)
            for at, position, neuron in keep:
                if at == layer:
                    out[0, position, neuron] = value[0, position, neuron]
            return out

        return sign * float(ref.run(model.module, torch.tensor([ids]), replacement=put).raw[2][0, -1, 7])

    with torch.no_grad():
        empty, part = measured(set()), measured(keep)
        whole = sign * float(ref.run(model.module, torch.tensor([ids])).raw[2][0, -1, 7])
    return (part - empty) / (whole - empty)


def test_an_answer_is_read_token_by_token_behind_its_prompt() -> None:
    model, ids, answer = load("llama"), Question().ids()[0], (9, 9, 14)
    for metric, logs in (("auto", True), ("logit", False)):
        found = tracer.attribute(model, [tracer.Prompt(token_ids=ids, answer=answer)], metric=metric)
        whole = torch.tensor([ids + answer[:-1]])
        terms = tuple((len(ids) - 1 + i, token, 1.0) for i, token in enumerate(answer))
        wanted = ref.attribute(model.module, whole, None, ref.Weighed("weighed", terms=(terms,), logs=logs))
        assert error(found.nodes, wanted.nodes) <= TOLERANCE
        assert error(found.embeddings, wanted.embeddings) <= TOLERANCE
        assert error(found.metric, wanted.metric) <= TOLERANCE
    logits = ref.run(model.module, torch.tensor([ids + answer])).logits[0].log_softmax(-1)
    summed = sum(float(logits[len(ids) - 1 + i, token]) for i, token in enumerate(answer))
    auto = tracer.attribute(model, [tracer.Prompt(token_ids=ids, answer=answer)])
    assert auto.settings.metric == "logprob"
    assert float(auto.metric) == pytest.approx(summed, rel=1e-5)


def test_answers_of_other_lengths_share_a_batch_and_change_nothing() -> None:
    model = load("gpt2")
    prompts = [
        tracer.Prompt(token_ids=ids, answer=answer)
        for ids, answer in zip(Question().ids(), ((9, 14), (5,), (8, 7, 6, 5)), strict=True)
    ]
    together = tracer.attribute(model, prompts)
    for row, prompt in enumerate(prompts):
        alone = tracer.attribute(model, [prompt])
        assert error(together.nodes[row, :, : alone.nodes.shape[2]], alone.nodes[0]) <= TOLERANCE
        assert float(together.metric[row]) == pytest.approx(float(alone.metric), rel=1e-5)


def test_an_answer_of_one_token_is_its_log_probability() -> None:
    model, ids = load("llama"), Question().ids()[0]
    one = tracer.attribute(model, [tracer.Prompt(token_ids=ids, answer=[9])])
    other = tracer.attribute(model, [tracer.Prompt(token_ids=ids, target=9)], metric="logprob")
    assert torch.equal(one.nodes, other.nodes)


def test_a_circuit_of_an_answer_has_a_logit_for_each_of_its_tokens(tmp_path: Path) -> None:
    model, ids = load("llama"), Question().ids()[0]
    prompt = tracer.Prompt(token_ids=ids, answer=(9, 9, 14), counterfactual=Question().ids(100)[0])
    circuit = tracer.trace(model, prompt, 50, metric="logit")
    ends = [(row["position"], row["neuron"], row["gradient"]) for row in circuit.rows("logit")]
    assert ends == [(6, 9, 1.0), (7, 9, 1.0), (8, 14, 1.0)]
    assert circuit.n_edges > 0
    circuit.save(tmp_path / "run")
    again = tracer.Circuit.load(tmp_path / "run")
    assert again.answer
    found = tracer.evaluate(model, again, sizes=[50])
    assert float(found.whole[0]) == pytest.approx(circuit.metric, rel=1e-5)
    assert tracer.trace(model, prompt, 50).links is None
    quality = tracer.estimate_quality(model, circuit, n_each=3)
    assert quality.metric == pytest.approx(circuit.metric, rel=1e-5)


def test_the_answer_of_a_text_is_read_as_it_follows_the_text() -> None:
    model = load("llama")
    found = tracer.attribute(model, [tracer.Prompt("The state containing Dallas", answer=" is Texas")])
    names = [model.tokenizer.decode([one]) for one in found.target_ids[0]]
    assert "".join(names).replace(" ", "") == "isTexas"
    assert found.token_ids[0][-1] == found.target_ids[0][0]


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"answer": [3, 4], "target": 5}, ("target", "answer")),
        ({"answer": [3, 4], "foil": 5}, ("foil", "another answer")),
        ({"answer": [3, 4], "positions": [0]}, ("positions", "answer")),
        ({"answer": []}, ("answer", "is empty")),
        ({"answer": ""}, ("answer", "is empty")),
        ({"answer": [9999]}, ("9999", "vocabulary")),
        ({"answer": [5] * 99}, ("prompt with its answer", "at most")),
    ],
)
def test_an_answer_that_cannot_be_asked_is_refused(given: dict[str, Any], parts: tuple[str, ...]) -> None:
    with refused(JobError, *parts):
        tracer.attribute(load("llama"), [tracer.Prompt(token_ids=[5, 6, 7], **given)])


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_share_is_of_the_fewest_tokens_that_hold_it(share: float) -> None:
    model = load("llama")
    prompts = [tracer.Prompt(token_ids=ids) for ids in Question().ids()]
    found = tracer.attribute(model, prompts, share=share)
    for row, ids in enumerate(Question().ids()):
        chances = ref.run(model.module, torch.tensor([ids])).logits[0, -1].softmax(-1)
        tokens = list(found.target_ids[row])
        assert tokens == chances.argsort(descending=True).tolist()[: len(tokens)]
        held = chances[tokens]
        assert float(held.sum()) >= share > float(held[:-1].sum())
        terms = tuple((-1, token, float(chance / held.sum())) for token, chance in zip(tokens, held, strict=True))
        wanted = ref.attribute(model.module, torch.tensor([ids]), None, ref.Weighed("weighed", terms=(terms,)))
        assert error(found.nodes[row, :, : len(ids)], wanted.nodes[0]) <= TOLERANCE
        assert float(found.metric[row]) == pytest.approx(float(wanted.metric), rel=1e-5)


def test_a_circuit_of_a_share_weighs_each_logit_and_is_evaluated(tmp_path: Path) -> None:
    model, ids = load("llama"), Question().ids()[0]
    circuit = tracer.trace(model, tracer.Prompt(token_ids=ids), 50, share=0.5)
    ends = circuit.rows("logit")
    assert sum(row["gradient"] for row in ends) == pytest.approx(1)
    assert sum(row["attribution"] for row in ends) == pytest.approx(circuit.metric, rel=1e-5)
    assert sum(circuit.probabilities) >= 0.5
    assert all(
        row["gradient"] == pytest.approx(chance / sum(circuit.probabilities), rel=1e-5)
        for row, chance in zip(ends, circuit.probabilities, strict=True)
    )
    circuit.save(tmp_path / "run")
    again = tracer.Circuit.load(tmp_path / "run")
    assert float(tracer.evaluate(model, again, sizes=[50]).whole[0]) == pytest.approx(circuit.metric, rel=1e-5)
    assert again.fingerprint == circuit.fingerprint


def test_a_share_that_too_many_tokens_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tracer.attribution.attribute.MOST_LIKELY", 3)
    with refused(JobError, "share=0.99", "likeliest 3 tokens", "smaller share"):
        tracer.attribute(load("llama"), [tracer.Prompt(token_ids=[5, 6, 7])], share=0.99)


REFUSED: list[tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = [
    ({}, {"of": "L9 N1"}, ("L9 N1", "layers 0..2")),
    ({}, {"of": "L2 N48"}, ("L2 N48", "neurons 0 to 47")),
    ({}, {"of": "L0 N3"}, ("L0 N3", "first layer")),
    ({}, {"of": "neuron 7"}, ("neuron 7", "neither a neuron nor a direction")),
    ({"target": 5}, {"of": "L2 N7"}, ("a target has no effect", "of='L2 N7'")),
    ({"target": 5}, {"share": 0.5}, ("a target has no effect", "share=0.5")),
    ({"answer": [5, 6]}, {"of": "L2 N7"}, ("an answer has no effect", "leave out the answer")),
    ({}, {"of": "L2 N7", "metric": "logprob"}, ("metric has no effect", "L2 N7")),
    ({}, {"of": "L2 N7", "share": 0.5}, ("share and of",)),
    ({}, {"metric": "neuron"}, ("neuron", "needs of")),
    ({}, {"metric": "share"}, ("share", "needs share")),
    ({}, {"share": 1.5}, ("share=1.5",)),
    ({"target": 5}, {"share": 0.5, "metric": "logit"}, ("share only has an effect",)),
    ({"positions": [0, 1]}, {"share": 0.5}, ("positions", "differ between positions")),
    ({}, {"of": TargetDirection(vector=(1.0, 2.0))}, ("2 coordinates", "32")),
]


@pytest.mark.parametrize(("prompt", "how", "parts"), REFUSED)
def test_what_cannot_be_asked_is_refused(prompt: dict[str, Any], how: dict[str, Any], parts: tuple[str, ...]) -> None:
    with refused(JobError, *parts):
        tracer.attribute(load("llama"), [tracer.Prompt(token_ids=[5, 6, 7], **prompt)], **how)


@pytest.mark.parametrize("basis", ["residual", "attention"])
def test_bases_without_edges_refuse_them_and_leave_them_out(basis: str) -> None:
    model, prompt = load("llama"), tracer.Prompt(token_ids=[5, 6, 7], target=9)
    with refused(JobError, basis, "no direct edges"):
        tracer.trace(model, prompt, basis=basis, edges=True)
    with refused(JobError, basis, "no attribution profiles"):
        tracer.trace(model, prompt, basis=basis, profiles=True)
    circuit = tracer.trace(model, prompt, 20, basis=basis)
    assert circuit.links is None
    assert max(row["neuron"] for row in circuit.rows("neuron")) < 32


@pytest.mark.parametrize("basis", ["residual", "attention"])
@pytest.mark.parametrize("family", MANY)
def test_ablations_in_other_bases_are_plain_hooks(family: str, basis: str) -> None:
    model, ids = load(family), Question().ids()[0]
    circuit = tracer.trace(model, tracer.Prompt(token_ids=ids, target=9), 40, basis=basis)
    found = tracer.evaluate(model, circuit, sizes=[40])
    keep = {(row["layer"], row["position"], row["neuron"]) for row in circuit.neurons.to_pylist()}

    def measured(keep: set[tuple[int, ...]] | None) -> float:
        def put(layer: int, value: torch.Tensor) -> torch.Tensor:
            if keep is None:
                return value
            out = torch.zeros_like(value)
            for at, position, neuron in keep:
                if at == layer:
                    out[0, position, neuron] = value[0, position, neuron]
            return out

        with torch.no_grad():
            run = ref.run(model.module, torch.tensor([ids]), basis=basis, replacement=put)
        return float(run.logits[0, -1, 9])

    whole, empty, part = measured(None), measured(set()), measured(keep)
    assert float(found.faithfulness.estimate[-1]) == pytest.approx((part - empty) / (whole - empty), rel=1e-3, abs=1e-4)


def test_directions_are_read_from_files_that_are_no_programs(tmp_path: Path) -> None:
    wanted = vector()
    save_file({"a": wanted, "b": torch.ones(1, 32)}, tmp_path / "two.safetensors")
    save_file({"a": wanted[None]}, tmp_path / "one.safetensors")
    (tmp_path / "v.json").write_text(json.dumps(wanted.tolist()))
    (tmp_path / "v.csv").write_text(",".join(map(repr, wanted.tolist())) + "\n")
    (tmp_path / "v.txt").write_text("\n".join(map(repr, wanted.tolist())))
    for name in ("one.safetensors", "v.json", "v.csv", "v.txt"):
        found = tracer.direction(tmp_path / name, 1)
        assert torch.equal(torch.tensor(found.vector), wanted)
        assert found.label == Path(name).stem
    assert tracer.direction(tmp_path / "two.safetensors", name="a").vector == tuple(wanted.tolist())
    assert tracer.direction(wanted).name == "direction behind the final norm"
    (tmp_path / "v.pt").write_bytes(b"x")
    (tmp_path / "words.csv").write_text("a,b")
    (tmp_path / "zero.json").write_text("[0, 0]")
    (tmp_path / "nan.json").write_text("[NaN, 1]")
    (tmp_path / "bad.safetensors").write_bytes(b"xxxx")
    for name, parts in {
        "two.safetensors": ("holds a, b", "name one"),
        "v.pt": (".pt", "safetensors"),
        "words.csv": ("cannot be read",),
        "zero.json": ("not 0",),
        "nan.json": ("finite",),
        "bad.safetensors": ("cannot be read",),
        "absent.json": ("cannot be read",),
    }.items():
        with refused(JobError, *parts):
            tracer.direction(tmp_path / name)
    with refused(JobError, "not a vector"):
        tracer.direction(["a", "b"])


def test_a_heads_row_as_direction_is_that_tokens_logit() -> None:
    model, ids = load("llama"), Question().ids()[0]
    row = model.module.lm_head.weight[9]
    one = tracer.attribute(model, [tracer.Prompt(token_ids=ids)], of=tracer.direction(row))
    other = tracer.attribute(model, [tracer.Prompt(token_ids=ids, target=9)])
    assert error(one.nodes, other.nodes) <= TOLERANCE


def margin(logits: torch.Tensor) -> torch.Tensor:
    chances = logits.softmax(-1)
    return chances[9] - chances[14] ** 2 + 0.1 * logits.logsumexp(-1)


class OfLogits(ref.Metric):
    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.stack([margin(row[-1].float()) for row in logits])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_function_of_the_logits_is_its_gradient(family: str) -> None:
    model, ids = load(family), Question().ids()[0]
    prompt = tracer.Prompt(token_ids=ids)
    of = tracer.direction_of(model, prompt, margin)
    assert of.name == "gradient of margin behind the final norm"
    found = tracer.attribute(model, [prompt], "grad", of=of)
    wanted = ref.attribute(model.module, torch.tensor([ids]), None, OfLogits("own"), "grad")
    assert error(found.nodes, wanted.nodes) <= 1e-4
    assert tracer.trace(model, prompt, 20, of=of).n_edges > 0


@pytest.mark.parametrize(
    ("function", "parts"),
    [
        (lambda logits: logits, ("no single number",)),
        (lambda logits: 3.0, ("no single number",)),
        (lambda logits: torch.ones(()), ("does not depend on the logits",)),
        (lambda logits: logits[999], ("fails on the logits",)),
    ],
    ids=["vector", "float", "constant", "error"],
)
def test_a_function_that_gives_no_number_of_logits_is_refused(function: Any, parts: tuple[str, ...]) -> None:
    with refused(JobError, "function", *parts):
        tracer.direction_of(load("llama"), tracer.Prompt(token_ids=[5, 6, 7]), function)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_profiles_of_a_neurons_circuit_add_up_to_its_attributions(family: str) -> None:
    model, ids = load(family), Question().ids()[0]
    for of in ("L2 N7", tracer.direction(vector(), 1)):
        circuit = tracer.trace(model, tracer.Prompt(token_ids=ids), 30, of=of, profiles=True)
        assert circuit.profiles is not None
        outputs = torch.tensor([row[0] for row in circuit.profiles["output"].to_pylist()])
        assert error(outputs, torch.tensor(circuit.neurons["attribution"].to_pylist())) <= 1e-4


def test_relp_along_a_path_is_relp_on_a_model_that_is_linear_in_its_neurons() -> None:
    model = load("llama", n_layers=1)
    ids = Question().ids()[0]
    prompt = tracer.Prompt(token_ids=ids, target=9)
    few, many = (tracer.attribute(model, [prompt], "relp-ig", steps=steps) for steps in (1, 7))
    relp = tracer.attribute(model, [prompt])
    start = ref.run(model.module, torch.tensor([ids]), embeddings=torch.zeros(1, len(ids), 32)).acts
    assert error(few.nodes, relp.nodes) <= TOLERANCE  # one step is the prompt itself; zero embeddings give neurons of 0
    assert all(float(act.abs().max()) == 0 for act in start)
    assert error(many.nodes, few.nodes) > 1e-3  # norms differ along the path
