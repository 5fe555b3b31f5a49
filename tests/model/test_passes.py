"""Passes leave the forward as it is and nothing behind (method.md section 8, identity 1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import reference as ref
import tiny as t
import tracer
from helpers import KERNELS, Question, direct_logits, error, fresh, load, padded
from tracer.metrics import Metric
from tracer.model import interventions, passes
from tracer.model import rules as linearize
from tracer.prompts import Batch
from tracer.settings import RULES

ROWS = Question().ids()
BATCH = Batch(ROWS)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def last(tokens: tuple[int, ...] = (7, 11, 23), kind: str = "logit") -> Metric:
    rows = torch.arange(len(tokens))
    return Metric(kind, rows, torch.full_like(rows, -1), torch.tensor(tokens), torch.ones(len(tokens)), len(tokens))


def every_logit() -> Metric:
    """A metric whose read picks all logits of the last column, to compare them all."""
    rows = torch.arange(3).repeat_interleave(t.VOCAB)
    weight = torch.linspace(-1, 1, t.VOCAB).repeat(3)
    return Metric("logit", rows, torch.full_like(rows, -1), torch.arange(t.VOCAB).repeat(3), weight, 3)


def snapshot(module: torch.nn.Module) -> dict[str, Any]:
    """Everything of a model that a pass could leave changed."""
    return {
        name: (
            type(part),
            part.__dict__.get("forward"),
            dict(part._forward_hooks),
            dict(part._forward_pre_hooks),
            dict(part._backward_hooks),
            part.training,
            [(key, id(p), p._version, p.requires_grad, p.grad) for key, p in part.named_parameters(recurse=False)],
            [(key, id(b), b._version) for key, b in part.named_buffers(recurse=False)],
        )
        for name, part in module.named_modules()
    }


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize(("family", "attn"), KERNELS)
def test_linearised_forward_equals_the_models_own_to_the_bit(
    family: str, attn: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(family, attn, dtype=DTYPES[dtype])
    before = direct_logits(model, ROWS)
    wanted = last().read(before)
    seen, final = [], interventions.final

    def spied(*given: Any) -> Tensor:
        seen.append(final(*given))
        return seen[-1]

    monkeypatch.setattr(interventions, "final", spied)
    plain = passes.gradients(model, BATCH, last())
    for rules in (RULES, {"norm", "activation"}, {"attention"}, {"product"}):
        reading = passes.gradients(model, BATCH, last(), rules=frozenset(rules))
        assert torch.equal(reading.metric, plain.metric)  # of the rows of the head that it needs
        assert torch.equal(reading.values, plain.values)
        assert torch.equal(reading.embedding, plain.embedding)
    assert error(plain.metric, wanted) < (1e-6 if DTYPES[dtype].itemsize > 2 else 1e-2)
    assert len(seen) == 5
    for hidden in seen:
        assert hidden.dtype == DTYPES[dtype]
        assert torch.equal(hidden, seen[0])
    uncapped = ref.scaled_logits(model.module, model.module.get_output_embeddings()(seen[0][:, -1:].detach()))
    cap = model.soft_cap
    capped = uncapped if cap is None else torch.tanh(uncapped / cap) * cap
    if hasattr(model.config, "dim_model_base"):  # what enters the head is divided, and rounded
        assert error(capped / model.config.logits_scaling, before[:, -1:]) < 1e-2
    else:
        assert torch.equal(capped, before[:, -1:])
    assert torch.equal(passes.logits(model, BATCH), before.float())
    assert torch.equal(direct_logits(model, ROWS), before)


@pytest.mark.parametrize("method", ["relp", "grad", "ig", "conductance", "ig-activation", "exact", "delta", "random"])
@pytest.mark.parametrize("family", ["gemma2", "qwen3", "gpt2"])
def test_nothing_is_changed_after_a_call(family: str, method: str) -> None:
    model = fresh(family, n_layers=2)
    before, logits = snapshot(model.module), direct_logits(model, ROWS)
    weights = {name: value.clone() for name, value in model.module.state_dict().items()}
    steps = {"steps": 2} if method in ("ig", "conductance", "ig-activation") else {}
    tracer.attribute(model, Question(lengths=(3, 2)).prompts(), method, **steps)  # type: ignore[arg-type]
    assert snapshot(model.module) == before
    assert torch.equal(direct_logits(model, ROWS), logits)
    assert all(torch.equal(value, weights[name]) for name, value in model.module.state_dict().items())


def break_rule(patch: pytest.MonkeyPatch, kind: str, at: int) -> None:
    """Let a rule raise when it is applied for the `at`-th time."""
    rule, function = linearize.RULE_OF[kind]
    calls = []

    def broken(envoy: Any) -> None:
        calls.append(envoy)
        if len(calls) == at:
            raise RuntimeError("stop")
        function(envoy)

    patch.setitem(linearize.RULE_OF, kind, (rule, broken))


def break_metric(patch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> Tensor:
        raise RuntimeError("stop")

    patch.setattr("tracer.model.head.weighed", broken)


def break_module(patch: pytest.MonkeyPatch, module: torch.nn.Module) -> None:
    """Let a module of the model itself raise: what nnsight runs as its body."""

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("stop")

    patch.setattr(module.__dict__["__nnsight__"], "body", broken)


BREAKERS: dict[str, Callable[[pytest.MonkeyPatch, tracer.Model], None]] = {
    "first attention": lambda patch, model: break_rule(patch, "attention", 1),
    "last activation": lambda patch, model: break_rule(patch, "activation", 3),
    "a norm in the middle": lambda patch, model: break_rule(patch, "rms_norm", 4),
    "the metric": lambda patch, model: break_metric(patch),
    "a module": lambda patch, model: break_module(patch, ref.mlps(model.module)[1].act),
}


@pytest.mark.parametrize("where", sorted(BREAKERS))
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_nothing_is_changed_after_an_error_inside_a_pass(
    family: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fresh(family)
    prompts = Question().prompts()
    wanted = tracer.attribute(model, prompts)
    before, logits = snapshot(model.module), direct_logits(model, ROWS)
    with monkeypatch.context() as patch:
        BREAKERS[where](patch, model)
        with pytest.raises(Exception, match="stop"):
            tracer.attribute(model, prompts)
    assert snapshot(model.module) == before
    assert torch.equal(direct_logits(model, ROWS), logits)
    assert model.lock.acquire(blocking=False)
    model.lock.release()
    assert torch.equal(tracer.attribute(model, prompts).nodes, wanted.nodes)


@pytest.mark.parametrize("method", ["relp", "grad", "ig", "ig-activation", "exact"])
@pytest.mark.parametrize("family", t.FAMILIES)
def test_no_attribution_to_later_positions(family: str, method: str) -> None:
    prompt = tracer.Prompt(token_ids=(1, 20, 30, 40, 50), target=7, positions=2)
    got = tracer.attribute(load(family, n_layers=2), [prompt], method)
    rounding = 1e-6 if family in t.DELTA_NETS else 0.0  # a delta net computes tokens in chunks
    assert got.nodes[:, :, 3:].abs().max() <= rounding
    assert got.embeddings[:, 3:].abs().max() <= rounding
    assert got.nodes[:, :, :3].abs().sum() > 0


@pytest.mark.parametrize("basis", ["activation", "output"])
@pytest.mark.parametrize("family", t.FAMILIES)
def test_values_are_what_hooks_see(family: str, basis: str) -> None:
    model = load(family)
    seen: list[Any] = []
    hooks = [
        mlp.down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        if basis == "activation"
        else mlp.down.register_forward_hook(lambda _, args, out: seen.append(out.clone()))  # a block may add to it
        for mlp in ref.mlps(model.module)
    ]
    direct_logits(model, ROWS)
    for hook in hooks:
        hook.remove()
    values, embedding = passes.values(model, BATCH, basis=basis)
    assert torch.equal(values, torch.stack(seen, dim=1))
    assert torch.equal(embedding, model.module.get_input_embeddings()(BATCH.inputs("cpu")["input_ids"]))


def test_plain_gradient_is_autograds(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rules: the embedding gradient is what torch says of the untouched model."""
    model = load("gemma2")
    inputs = BATCH.inputs("cpu")
    leaf = model.module.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    last().read(model.module(inputs_embeds=leaf, **inputs).logits).sum().backward()
    reading = passes.gradients(model, BATCH, last())
    assert leaf.grad is not None
    assert error(reading.embedding_gradient, leaf.grad) < 1e-6


def test_replacing_the_embedding_changes_the_run() -> None:
    model = load("llama")
    plain = passes.gradients(model, BATCH, last())
    again = passes.gradients(model, BATCH, last(), embedding=plain.embedding)
    other = passes.gradients(model, BATCH, last(), embedding=0.5 * plain.embedding)
    assert torch.equal(again.metric, plain.metric)
    assert torch.equal(other.embedding, 0.5 * plain.embedding)
    assert error(other.metric, plain.metric) > 1e-3
    assert torch.equal(passes.from_embedding(model, BATCH, last(), 0.5 * plain.embedding), other.metric)


@pytest.mark.parametrize("basis", ["activation", "output"])
def test_ablated_and_edited_put_the_same_values(basis: str) -> None:
    """Setting single neurons by either way gives the same metric, another than unset."""
    model = load("qwen2")
    values, _ = passes.values(model, BATCH, basis=basis)
    mask, shift = torch.zeros(2, *values[:, 1].shape)
    mask[torch.arange(3), 6, torch.tensor([3, 4, 5])] = 1
    shift[torch.arange(3), 6, torch.tensor([3, 4, 5])] = torch.tensor([1.0, -2.0, 3.0])
    where = (torch.arange(3), torch.full((3,), 6), torch.tensor([3, 4, 5]))
    to = torch.tensor([1.0, -2.0, 3.0])
    ablated = passes.ablated(model, BATCH, last(), layer=1, where=where, to=to, basis=basis)
    edited = passes.intervened(model, BATCH, [passes.Edit(1, mask.bool(), 0.0, shift)], basis=basis)
    same = passes.gradients(model, BATCH, last()).metric
    assert error(ablated, last().read(edited)) < 1e-6
    assert error(ablated, same) > 1e-4


def test_logits_of_several_columns() -> None:
    model = load("gpt_neox")
    ids, mask = padded(ROWS)
    wanted = ref.run(model.module, ids, mask).logits[:, -3:].detach()
    real = mask[:, -3:, None]
    assert error(passes.logits(model, BATCH, 3) * real, wanted * real) < 1e-6


def test_a_caller_may_be_in_no_grad() -> None:
    """The passes that need a gradient say so themselves."""
    prompts = Question().prompts()
    wanted = tracer.attribute(load("llama"), prompts)
    with torch.no_grad():
        got = tracer.attribute(load("llama"), prompts)
    assert torch.equal(got.nodes, wanted.nodes)


def test_a_metric_of_all_logits_needs_one_pass() -> None:
    reading = passes.gradients(load("phi3"), BATCH, every_logit(), rules=RULES)
    wanted = (direct_logits(load("phi3"), ROWS)[:, -1] * torch.linspace(-1, 1, t.VOCAB)).sum(-1)
    assert error(reading.metric, wanted) < 1e-5
