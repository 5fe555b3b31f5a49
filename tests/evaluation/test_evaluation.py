"""Interventions against plain hooks, and evaluation against a plain-PyTorch evaluation written here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
import tracer
from helpers import Change, hooked, refused
from tracer.circuit.circuit import Circuit
from tracer.errors import JobError
from tracer.evaluation.curves import Evaluation, shuffled
from tracer.evaluation.faithfulness import evaluate, minimality
from tracer.evaluation.testset import Job
from tracer.model import passes
from tracer.model.model import Model
from tracer.prompts import Batch, Prompt

TOKENS = ((1, 6, 7, 8, 9), (1, 12, 13))


def random_model(family: str = "llama", attn: str = "eager", **over: Any) -> Model:
    return tracer.load(tiny.tiny(family, attn=attn, **over), tokenizer=tiny.tokenizer(101))


def by_hooks(model: Model, batch: Batch, change: Change, basis: str = "activation") -> Tensor:
    """Logits with a function applied to every layer's neurons by plain PyTorch hooks."""
    with hooked(model, change, basis):
        return model.module(**batch.inputs("cpu", batch.width)).logits.float()


def some_mask(model: Model, batch: Batch, seed: int, basis: str) -> Tensor:
    shape = (len(batch.token_ids), batch.width, model.n_neurons(basis))
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.3


@pytest.mark.parametrize("basis", ["activation", "output"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_interventions_equal_plain_hooks_to_the_bit(family: str, basis: str) -> None:
    """Ablate, multiply, set and add, on different layers, positions and rows, composed in one padded pass."""
    model, batch = random_model(family), Batch(TOKENS)
    masks = [some_mask(model, batch, seed, basis) for seed in range(5)]
    given = torch.randn(masks[0].shape, generator=torch.Generator().manual_seed(9))
    plan = [(0, 0.0, 0.0), (1, -2.0, 0.0), (1, 0.0, 0.7), (2, 1.0, 0.3), (0, 0.0, given)]
    edits = [passes.Edit(layer, masks[i], scale, shift) for i, (layer, scale, shift) in enumerate(plan)]

    def change(layer: int, value: Tensor) -> Tensor:
        for i, (at, scale, shift) in enumerate(plan):
            if at == layer:
                changed = value * scale + shift
                value = torch.where(masks[i], changed, value)
        return value

    found = passes.intervened(model, batch, edits, basis=basis, kept=batch.width)
    real = batch.padded(batch.real(), 1)
    assert torch.equal(found[real], by_hooks(model, batch, change, basis)[real])
    untouched = passes.logits(model, batch, batch.width)
    assert not torch.equal(found[real], untouched[real])


def test_nothing_is_left_of_an_intervention() -> None:
    model, batch = random_model(), Batch(TOKENS)
    before = passes.logits(model, batch)
    passes.intervened(model, batch, [passes.Edit(0, some_mask(model, batch, 0, "activation"), 0.0, 0.0)])
    assert torch.equal(passes.logits(model, batch), before)


@pytest.mark.parametrize("factor", [0.0, -3.0])
def test_generation_under_edits_equals_hooks(factor: float) -> None:
    """The edit holds on the prompt and on every new token; rows that end early are padded by the model."""
    model = tracer.load("demo")
    ids = tuple(model.tokenizer.encode(text)[:] for text in ("The secretaries near the car", "The key"))
    mask = torch.zeros(1, 1, model.d_mlp, dtype=torch.bool)
    mask[..., :200] = True
    found = passes.generated(
        model, Batch(tuple(map(tuple, ids))), [], everywhere=[passes.Edit(1, mask, factor, 0.0)], max_new_tokens=5
    )
    down = model.part(1, model.layouts[1].down)
    handle = down.register_forward_pre_hook(lambda part, args: (torch.where(mask, args[0] * factor, args[0]),))
    try:
        for row, one in enumerate(ids):
            alone = model.module.generate(input_ids=torch.tensor([one]), max_new_tokens=5, do_sample=False)
            new = alone[0, len(one) :]
            assert torch.equal(found[row, : len(new)], new)
    finally:
        handle.remove()


def plain_evaluation(
    model: Model, nodes: list[tuple[int, int, int]], prompts: list[Prompt], ablated_to: Tensor, sizes: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Faithfulness and completeness, one prompt and one size at a time, with hooks alone."""
    length = ablated_to.shape[2]

    def score(row: int, stays: Tensor) -> float:
        prompt = prompts[row]
        ids = torch.tensor([list(prompt.token_ids or model.tokenizer.encode(prompt.text))])
        handles = []
        for layer in range(model.n_layers):
            down = model.part(layer, model.layouts[layer].down)
            to = ablated_to[row, layer]
            hook = lambda part, args, at=layer, to=to: (torch.where(stays[at], args[0], to),)  # noqa: E731
            handles.append(down.register_forward_pre_hook(hook))
        with torch.no_grad():
            logits = model.module(input_ids=ids).logits[0, -1]
        for handle in handles:
            handle.remove()
        target, foil = (one if isinstance(one, int) else model.tokenizer.encode(one, add_special_tokens=False)[0]
                        for one in (prompt.target, prompt.foil))  # fmt: skip
        return float(logits[target] - logits[foil])

    whole_set = torch.ones(model.n_layers, length, model.d_mlp, dtype=torch.bool)
    rows = range(len(prompts))
    whole, empty = (sum(score(row, keep) for row in rows) for keep in (whole_set, ~whole_set))
    faithful, complete = [], []
    for size in sizes:
        keep = torch.zeros_like(whole_set)
        for node in nodes[:size]:
            keep[node] = True
        faithful.append((sum(score(row, keep) for row in rows) - empty) / (whole - empty))
        complete.append((sum(score(row, ~keep) for row in rows) - empty) / (whole - empty))
    return torch.tensor(faithful), torch.tensor(complete)


def places(circuit: Circuit) -> list[tuple[int, int, int]]:
    return [(row["layer"], row["position"], row["neuron"]) for row in circuit.neurons.to_pylist()]


def sva_prompts(count: int = 5) -> list[Prompt]:
    nouns = ["keys", "teachers", "parents", "managers", "doctors"][:count]
    return [Prompt(f"The {noun} near the cabinet", " are", " is",
                   counterfactual=f"The {noun[:-1]} near the cabinet") for noun in nouns]  # fmt: skip


@pytest.mark.parametrize("ablation", ["zero", "mean", "counterfactual"])
def test_evaluation_equals_a_plain_one_on_the_demo_model(ablation: str) -> None:
    model, prompts, sizes = tracer.load("demo"), sva_prompts(), (1, 10, 60)
    circuit = tracer.trace(model, prompts[0], nodes=60, edges=False)
    found = evaluate(model, circuit, prompts, ablation, sizes)
    texts = [prompt.counterfactual for prompt in prompts]
    paired = passes.values(model, Batch(tuple(tuple(model.tokenizer.encode(text)) for text in texts)))[0]
    to = {"zero": torch.zeros_like(paired), "mean": paired.mean(0, keepdim=True).expand_as(paired)}.get(
        ablation, paired
    )
    faithful, complete = plain_evaluation(model, places(circuit), prompts, to, sizes)
    assert torch.allclose(found.faithfulness.estimate.float(), faithful, atol=1e-4)
    assert torch.allclose(found.completeness.estimate.float(), complete, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "phi3"])
def test_evaluation_equals_a_plain_one_on_a_random_model(family: str) -> None:
    model, sizes = random_model(family), (3, 30, 200)
    generator = torch.Generator().manual_seed(1)
    prompts = [Prompt(token_ids=[1, *torch.randint(5, 100, (4,), generator=generator).tolist()], target=20, foil=30)
               for _ in range(4)]  # fmt: skip
    circuit = tracer.trace(model, prompts[0], nodes=200, edges=False)
    found = _measured(model, circuit, prompts, sizes)
    values = torch.zeros(len(prompts), model.n_layers, 5, model.d_mlp)
    faithful, complete = plain_evaluation(model, places(circuit), prompts, values, sizes)
    inside, outside = (_ratio(found[0], found[1], one) for one in found[2:])
    assert torch.allclose(inside, faithful, atol=1e-4)
    assert torch.allclose(outside, complete, atol=1e-4)


def _ratio(whole: Tensor, empty: Tensor, part: Tensor) -> Tensor:
    return (part - empty[:, None]).mean(0) / (whole - empty).mean()


def _measured(model: Model, circuit: Circuit, prompts: list[Prompt], sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The raw measurements: a random model's denominator may be too small for an interval."""
    from tracer.evaluation import faithfulness

    test, _ = faithfulness.test_set(model, circuit, prompts, "zero", faithfulness.How(memory=2**30))
    ranks = faithfulness._ranks(model, circuit, 5, True)
    rows = range(len(prompts))
    whole, empty = (test.measure([Job(row, ranks, 0, stays) for row in rows]) for stays in (False, True))
    inside, outside = (
        test.measure([Job(row, ranks, size, stays) for row in rows for size in sizes]).view(len(prompts), -1)
        for stays in (True, False)
    )
    return whole, empty, inside, outside


def everything(model: Model, prompt: Prompt) -> Circuit:
    return tracer.trace(model, prompt, mass=1.0, edges=False)


def test_the_whole_model_is_faithful_and_complete_exactly() -> None:
    model, prompts = tracer.load("demo"), sva_prompts()
    circuit = everything(model, prompts[0])
    found = evaluate(model, circuit, prompts, "mean")
    if circuit.n_nodes == found.n_total:
        assert found.faithfulness.estimate[-1] == 1
        assert found.completeness.estimate[-1] == 0
    assert float(found.faithfulness.estimate[-1]) == pytest.approx(1, abs=1e-5)
    assert float(found.completeness.estimate[-1]) == pytest.approx(0, abs=1e-5)


def test_random_nodes_are_as_many_in_each_layer() -> None:
    from tracer.evaluation import faithfulness

    model = tracer.load("demo")
    circuit = tracer.trace(model, sva_prompts()[0], nodes=100, edges=False)
    ranks = faithfulness._ranks(model, circuit, 6, True)
    random = shuffled(ranks, 0)
    for size in (1, 10, 100):
        assert torch.equal((ranks < size).sum((1, 2)), (random < size).sum((1, 2)))
    assert not torch.equal(ranks, random)
    assert torch.equal(random, shuffled(ranks, 0))


def test_two_evaluations_and_any_memory_agree() -> None:
    model, prompts = tracer.load("demo"), sva_prompts()
    circuit = tracer.trace(model, prompts[0], nodes=20, edges=False)
    first, again = (evaluate(model, circuit, prompts, "resample", seed=3) for _ in range(2))
    assert torch.equal(first.inside, again.inside)
    assert torch.equal(first.faithfulness.low, again.faithfulness.low)
    small = evaluate(model, circuit, prompts, "resample", seed=3, memory=1)
    assert torch.allclose(small.inside, first.inside, atol=1e-5)


def test_position_free_circuits_ablate_a_neuron_everywhere() -> None:
    model, prompts = tracer.load("demo"), sva_prompts()
    circuit = tracer.trace(model, prompts[0], nodes=50, edges=False)
    found: Evaluation = evaluate(model, circuit, prompts, "mean", aligned=False)
    assert found.sizes[-1] == circuit.n_neurons == found.n_neurons[-1]
    aligned = evaluate(model, circuit, prompts, "mean")
    assert not torch.equal(found.inside[:, -1], aligned.inside[:, -1])


def test_minimality_is_the_fall_when_a_node_is_taken_out() -> None:
    model, prompts = tracer.load("demo"), sva_prompts()
    circuit = tracer.trace(model, prompts[0], nodes=8, edges=False)
    falls = minimality(model, circuit, prompts, "counterfactual")
    paired = [prompt.counterfactual for prompt in prompts]
    to = passes.values(model, Batch(tuple(tuple(model.tokenizer.encode(text)) for text in paired)))[0]
    nodes = places(circuit)
    whole = plain_evaluation(model, nodes, prompts, to, (8,))[0]
    for index in (0, 5):
        fewer = plain_evaluation(model, nodes[:index] + nodes[index + 1 :], prompts, to, (7,))[0]
        assert float(falls[index]) == pytest.approx(float(whole - fewer), abs=1e-4)


def test_a_group_is_worth_what_plain_ablation_says() -> None:
    model, prompts = tracer.load("demo"), sva_prompts()
    circuit = tracer.trace(model, prompts[0], nodes=12, edges=False)
    embedding = circuit.rows("embedding")[0]["node_id"]
    grouped = circuit.model_copy(update={"groups": {"a": (7, 1), "ends": (embedding,), "b": (3, 0, 11)}})
    found = tracer.knockouts(model, grouped, prompts, "counterfactual", seed=4)
    assert (found.names, found.n_nodes) == (("a", "b"), (2, 3))
    paired = [prompt.counterfactual for prompt in prompts]
    to = passes.values(model, Batch(tuple(tuple(model.tokenizer.encode(text)) for text in paired)))[0]
    nodes = places(circuit)
    whole = plain_evaluation(model, nodes, prompts, to, (12,))[0]
    assert float(found.circuit.estimate) == pytest.approx(float(whole), abs=1e-4)
    for number, own in enumerate(((7, 1), (3, 0, 11))):
        members = [nodes[node] for node in own]
        rest = [node for node in nodes if node not in members]
        without = plain_evaluation(model, rest, prompts, to, (len(rest),))[0]
        alone, left = plain_evaluation(model, members, prompts, to, (len(own),))
        assert float(found.without.estimate[number]) == pytest.approx(float(without), abs=1e-4)
        assert float(found.cost.estimate[number]) == pytest.approx(float(whole - without), abs=1e-4)
        assert float(found.alone.estimate[number]) == pytest.approx(float(alone), abs=1e-4)
        assert float(found.left.estimate[number]) == pytest.approx(float(left), abs=1e-4)
    rows = list(found.rows())
    assert rows[1]["cost_low"] <= rows[1]["cost"] <= rows[1]["cost_high"]
    one = tracer.knockouts(model, grouped, prompts[:1], "counterfactual", allow_overlap=True)
    assert next(one.rows())["cost_low"] is None
    with refused(JobError, "has no groups of neurons"):
        tracer.knockouts(model, circuit, prompts)
    with refused(JobError, "shares a node"):
        tracer.knockouts(model, circuit.model_copy(update={"groups": {"a": (1,), "b": (1, 2)}}), prompts)


def test_what_cannot_be_evaluated_is_refused() -> None:
    model, prompts = tracer.load("demo"), sva_prompts()
    circuit = tracer.trace(model, prompts[0], nodes=10, edges=False)
    run: Callable[..., Evaluation] = lambda *args, **kwargs: evaluate(model, circuit, *args, **kwargs)  # noqa: E731
    with refused(JobError, "nothing to test on"):
        run([])
    with refused(JobError, "at most 10"):
        run(prompts, sizes=[5, 11])
    with refused(JobError, "must be one of"):
        run(prompts, "median")
    with refused(JobError, "both a train and a test"):
        run(prompts, train=prompts[:1])
    with refused(JobError, "needs a foil"):
        run([Prompt("The keys near the cabinet", " are"), *prompts])
    with refused(JobError, "tokens"):
        run([Prompt("The keys", " are", " is"), *prompts])
    with refused(JobError, "no effect"):
        run(prompts, "zero", reference=prompts)
    with refused(JobError, "no counterfactual"):
        run([Prompt("The keys near the cabinet", " are", " is"), *prompts], "counterfactual")
    with refused(JobError, "another model"):
        evaluate(random_model(), circuit, prompts)
    same = [Prompt("The keys near the cabinet", " are", " is", counterfactual="The keys near the cabinet")] * 3
    with refused(JobError, "F(model) - F(empty)"):
        run(same, "counterfactual")
