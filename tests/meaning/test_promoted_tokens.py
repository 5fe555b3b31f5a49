"""What weights say of neurons: equal to the modules' own arithmetic in plain PyTorch, in every family."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reference as ref
import tiny as t
import tracer
from helpers import load, refused
from tracer.circuit.said import Said, key_of
from tracer.data import tasks
from tracer.demo import data
from tracer.errors import JobError, ModelError
from tracer.meaning import tokens, weights
from tracer.model.backend import Local
from tracer.store.schemas import TOKENS
from truth import close

NEURONS = [(2, 40), (0, 3), (1, 17), (0, 47)]
BEFORE = dict.fromkeys(t.FAMILIES, "post_attention_layernorm") | {
    "gemma2": "pre_feedforward_layernorm",
    "gemma3": "pre_feedforward_layernorm",
    "olmo2": None,
    "olmo3": None,
    "gpt2": "ln_2",
    "apertus": "feedforward_layernorm",
    "cohere": "input_layernorm",
    "phi": "input_layernorm",
    "falcon": "input_layernorm",
    "cohere2": "input_layernorm",
    "exaone4": None,
    "gemma4": "pre_feedforward_layernorm",
    "gpt_bigcode": "ln_2",
    "gptj": "ln_1",
}
AFTER = dict.fromkeys(("gemma2", "gemma3", "olmo2", "olmo3", "exaone4", "gemma4"), "post_feedforward_layernorm") | {
    "glm4": "post_mlp_layernorm",
}
CENTRED = frozenset(
    "gpt2 gpt_neox olmo starcoder2 stablelm cohere phi falcon cohere2 nemotron gpt_bigcode gptj".split()
)
FUSED = ("phi3", "glm", "glm4")
DOWN = {
    "gpt2": "mlp.c_proj",
    "gpt_neox": "mlp.dense_4h_to_h",
    "starcoder2": "mlp.c_proj",
    "phi": "mlp.fc2",
    "falcon": "mlp.dense_4h_to_h",
    "gpt_bigcode": "mlp.c_proj",
    "gptj": "mlp.fc_out",
}
UP = {
    **dict.fromkeys(FUSED, "mlp.gate_up_proj"),
    "falcon": "mlp.dense_h_to_4h",
    "gpt_bigcode": "mlp.c_fc",
    "gptj": "mlp.fc_in",
    "gpt2": "mlp.c_fc",
    "gpt_neox": "mlp.dense_h_to_4h",
    "starcoder2": "mlp.c_fc",
    "phi": "mlp.fc1",
}


def unit(norm: nn.Module, rows: Tensor, centred: bool) -> Tensor:
    """Rows through a norm's own forward, with its statistic and its bias taken out again."""
    moved = rows - rows.mean(-1, keepdim=True) if centred else rows
    size = moved.square().mean(-1, keepdim=True).sqrt()
    bias = getattr(norm, "bias", None)
    out = norm(1e3 * rows / size)  # so that the epsilon is nothing
    return (out - (0 if bias is None else bias)) * size


def effects(family: str, model: tracer.Model) -> Tensor:
    """How a unit of each of `NEURONS` moves every logit [neuron, token], before the soft-cap."""
    module, centred = model.module, family in CENTRED
    rows = []
    for layer, neuron in NEURONS:
        down = model.part(layer, DOWN.get(family, "mlp.down_proj"))
        one = torch.zeros(1, model.d_mlp)
        one[0, neuron] = 1.0
        row = down(one) - down(0 * one)
        if family in AFTER:
            row = unit(model.part(layer, AFTER[family]), row, False)
        rows.append(row)
    final = module.get_submodule(model.family.final_norm.path)
    head = module.get_output_embeddings()
    hidden = unit(final, getattr(model.config, "residual_multiplier", 1.0) * torch.cat(rows), centred)
    return ref.scaled_logits(module, head(hidden) - head(0 * hidden))


@contextmanager
def caught(module: nn.Module) -> Iterator[list[Tensor]]:
    """What goes into a module, and what comes out of it."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda *call: seen.extend((call[1][0], call[2])))
    try:
        yield seen
    finally:
        handle.remove()


def driven(family: str, model: tracer.Model) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gate and up of `NEURONS` on every token's embedding [neuron, token]."""
    values, gates, ups = [], [], []
    for layer, neuron in NEURONS:
        entered = model.module.get_input_embeddings()(torch.arange(t.VOCAB))
        entered = getattr(model.config, "embedding_multiplier", 1.0) * entered
        path = BEFORE[family]
        block = model.part(layer, "mlp")
        with (
            caught(model.part(layer, DOWN.get(family, "mlp.down_proj"))) as inside,
            caught(model.part(layer, UP.get(family, "mlp.up_proj"))) as up,
        ):
            gate = []
            if family not in {*t.UNGATED, *FUSED}:
                with caught(model.part(layer, "mlp.gate_proj")) as gate:
                    block(entered if path is None else model.part(layer, path)(entered))
            else:
                block(entered if path is None else model.part(layer, path)(entered))
        values.append(inside[0][:, neuron])
        fused = up[1].chunk(2, -1) if family in FUSED else (gate[1] if gate else up[1], up[1])
        gates.append(fused[0][:, neuron])
        ups.append(fused[1][:, neuron])
    return torch.stack(values), torch.stack(gates), torch.stack(ups)


def numbers(listed: tuple[tokens.Token, ...], of: str = "value") -> Tensor:
    return torch.tensor([getattr(one, of) for one in listed])


@torch.no_grad()
@pytest.mark.parametrize("family", t.FAMILIES)
def test_tokens_are_those_of_the_modules_themselves(family: str) -> None:
    model = load(family)
    found = tracer.neuron_tokens(model, NEURONS, k=t.VOCAB)
    assert [(one.layer, one.neuron, one.polarity) for one in found] == [(*n, s) for n in NEURONS for s in (1, -1)]
    wanted, (values, gates, ups) = effects(family, model), driven(family, model)
    for one, row in zip(found, [row for row in range(len(NEURONS)) for _ in (1, -1)], strict=True):
        order = [token.token_id for token in one.promoted]
        assert sorted(order) == list(range(t.VOCAB))
        assert close(numbers(one.promoted), one.polarity * wanted[row, order])
        assert [token.token_id for token in one.suppressed] == sorted(
            order, key=lambda i: (numbers(one.promoted)[order.index(i)], i)
        )
        order = [token.token_id for token in one.driven_by]
        assert close(numbers(one.driven_by), values[row, order], of=values)
        assert close(numbers(one.driven_by, "up"), ups[row, order], of=ups)
        assert numbers(one.driven_by).abs().tolist() == sorted(numbers(one.driven_by).abs().tolist(), reverse=True)
        missing = sorted(set(range(t.VOCAB)) - set(order))
        assert (one.polarity * values[row, missing] <= 1e-6).all()
        assert (one.polarity * numbers(one.driven_by) > 0).all()
        up = [token.token_id for token in one.up]
        assert close(numbers(one.up), ups[row, up], of=ups)
        if family in t.UNGATED:
            assert one.gate == ()
            assert {token.gate for token in one.driven_by} <= {None}
        else:
            assert close(numbers(one.driven_by, "gate"), gates[row, order], of=gates)
            assert close(numbers(one.gate), gates[row, [token.token_id for token in one.gate]], of=gates)


@torch.no_grad()
def test_a_soft_cap_changes_no_order_and_the_tied_head_is_the_embedding() -> None:
    model = load("gemma2")
    assert model.soft_cap == 2.0
    assert model.module.get_output_embeddings().weight is model.module.get_input_embeddings().weight
    (one, *_) = tracer.neuron_tokens(model, [(1, 17)], k=t.VOCAB, driven=False)
    raw = numbers(one.promoted)
    assert (raw.diff() <= 0).all()
    assert (torch.tanh(raw / 2.0).diff() <= 0).all()


@torch.no_grad()
def test_coordinates_of_the_output_are_read_as_neurons_are() -> None:
    model = load("gemma3")
    (one, _) = tracer.neuron_tokens(model, [(1, 5)], k=t.VOCAB, basis="output")
    row = torch.zeros(1, model.d_model)
    row[0, 5] = 1.0
    row = unit(model.part(1, "post_feedforward_layernorm"), row, False)
    wanted = model.module.get_output_embeddings()(unit(model.module.model.norm, row, False))[0]
    assert close(numbers(one.promoted), wanted[[token.token_id for token in one.promoted]])
    assert one.driven_by == ()
    assert one.up == ()


@torch.no_grad()
def test_half_precision_weights_are_multiplied_in_float32() -> None:
    model = load("gemma3", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    rounded = t.tiny("gemma3", dtype=torch.bfloat16).float()  # the same weights
    whole = tracer.load(rounded, tokenizer=t.tokenizer())
    found, wanted = tracer.neuron_tokens(model, NEURONS, k=t.VOCAB, driven=False), effects("gemma3", whole)
    for one, row in zip(found[::2], wanted, strict=True):
        assert close(numbers(one.promoted), row[[token.token_id for token in one.promoted]])


def test_weights_that_are_no_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Local, "shows_weights", lambda *_: False)
    monkeypatch.setattr(tracer.Model, "weights_readable", False)
    with refused(ModelError, "quantised or offloaded", "leave tokens out"):
        tracer.promoted(load("llama"), NEURONS)


@pytest.mark.parametrize("piece", [1, 64, 500, 3000])
@pytest.mark.parametrize("family", ["gemma3", "gpt2", "phi3"])
def test_pieces_of_the_vocabulary_give_what_the_whole_does(
    family: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(family)
    whole = tracer.neuron_tokens(model, NEURONS, k=7)
    monkeypatch.setattr(tokens, "PIECE", piece)
    monkeypatch.setattr(tokens, "TOGETHER", 3)
    for one, other in zip(tracer.neuron_tokens(model, NEURONS, k=7), whole, strict=True):
        for name in ("promoted", "suppressed", "driven_by", "gate", "up"):
            mine, its = getattr(one, name), getattr(other, name)
            assert [token.token_id for token in mine] == [token.token_id for token in its], name
            assert close(numbers(mine), numbers(its))
            for of in ("gate", "up") if name == "driven_by" and family != "gpt2" else ():
                assert close(numbers(mine, of), numbers(its, of))


@pytest.mark.parametrize("size", [5, 40, 1000, 4001])
@pytest.mark.parametrize("count", [1, 3, 10])
def test_of_equal_numbers_the_first_tokens_count(size: int, count: int) -> None:
    draw = torch.Generator().manual_seed(size)
    value = torch.randint(-2, 3, (6, size), generator=draw).float()
    value[0] = 0.0
    value[1, ::2] = -0.0
    for sign in (1, -1):
        order = [sorted(range(size), key=lambda i, row=row: (-sign * row[i], i))[:count] for row in value.tolist()]
        at, numbers = weights.largest(value, count, sign)
        assert at.tolist() == order
        assert torch.equal(numbers, value.gather(1, at))
        best: Any = None
        for first in range(0, size, 37):
            best = weights.better(best, first, value[:, first : first + 37], count)
        assert best[0][:, (1 - sign) // 2].tolist() == order


def test_neurons_that_carry_a_state_promote_its_tokens() -> None:
    """Of all states' names, that of the city's state is one of the two that its circuit's neurons promote most."""
    model = tracer.load("demo")
    states = {f" {state.name}" for state in data.STATES if " " not in state.name}
    pairs = tasks.load("capitals", split="test", count=8, seed=0)
    asked = [pair for pair in pairs if " " not in pair.case.split(" / ")[0]]
    assert len(asked) >= 4
    for pair in asked[:4]:
        how: dict[str, Any] = {"target": pair.target, "foil": pair.foil, "counterfactual": pair.counterfactual}
        circuit = tracer.with_tokens(model, tracer.trace(model, tracer.Prompt(pair.prompt, **how), edges=False), k=3)
        known, says = Said.of(circuit).tokens, Counter[str]()
        for row in circuit.neurons.to_pylist():
            (key,) = key_of(row)
            for token in states.intersection(known[key]["promoted"]):
                says[token] += abs(row["attribution"])
        assert f" {pair.case.split(' / ')[0]}" in dict(says.most_common(2)), (pair, says.most_common(5))


def test_the_table_is_whole_and_both_polarities_are_one_product() -> None:
    model = load("llama")
    table = tracer.promoted(model, [(1, 17), (0, 3, -1), (1, 17, 1)], k=4)
    assert table.schema == TOKENS
    assert table.select(["layer", "neuron", "polarity"]).to_pylist() == [
        {"layer": layer, "neuron": neuron, "polarity": sign}
        for layer, neuron, sign in [(1, 17, 1), (1, 17, -1), (0, 3, -1)]
    ]
    plus, minus = table.slice(0, 2).to_pylist()
    assert plus["promoted_ids"] == minus["suppressed_ids"]
    assert plus["promoted_values"] == [-value for value in minus["suppressed_values"]]
    assert [len(row) for row in table["promoted"].to_pylist()] == [4, 4, 4]


def test_rows_behind_the_tokenizers_vocabulary_are_left_out() -> None:
    model = load("llama")
    assert tokens.n_tokens(model) == t.VOCAB
    shorter = replace(model, tokenizer=SimpleNamespace(vocab_size=90, added_tokens_decoder={95: "x"}))
    assert tokens.n_tokens(shorter) == 96


@pytest.mark.parametrize(
    ("neurons", "k", "parts"),
    [
        ([(3, 0)], 5, ("layer 3, neuron 0", "layers 0 to 2 and neurons 0 to 47")),
        ([(0, 48)], 5, ("layer 0, neuron 48",)),
        ([(-1, 0)], 5, ("layer -1",)),
        ([(0, 1, 0)], 5, ("polarity 1 or -1",)),
        ([(0,)], 5, ("must be (layer, neuron)",)),
        ([], 5, ("are none",)),
        ([(0, 1)], 0, ("k=0", "1 to 1,000")),
    ],
)
def test_what_is_no_neuron_is_refused(neurons: list[tuple[int, ...]], k: int, parts: tuple[str, ...]) -> None:
    with refused(JobError, *parts):
        tracer.neuron_tokens(load("llama"), neurons, k)
