"""Each RelP rule on its own: forward values to the bit, the gradient of section 3."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.activations import ACT2FN

import reference as ref
from helpers import error, load
from tracer.model import families, rules
from tracer.model.rules import FACTORS
from tracer.settings import ALL_RULES, RULES

NAMES = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
WIDTHS: dict[torch.dtype, Literal[16, 32]] = {torch.float16: 16, torch.float32: 32}
FINITE = {
    dtype: st.lists(st.floats(width=width, allow_nan=False, allow_infinity=False), min_size=1, max_size=30)
    for dtype, width in WIDTHS.items()
}


def factor(name: str) -> tuple[Any, Any]:
    module = ACT2FN[name]
    return module, FACTORS[type(module).__name__]


@pytest.mark.parametrize("name", NAMES)
def test_factor_is_the_activation_over_its_input(name: str) -> None:
    module, of = factor(name)
    z = torch.cat([torch.linspace(-12, 12, 240, dtype=torch.float64), torch.tensor([1e-9, -1e-9, 1e-3])])
    wanted = module(z) / z
    assert (of(z) - wanted).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_factor_has_its_limit_at_zero_in_every_precision(name: str, dtype: torch.dtype) -> None:
    _, of = factor(name)
    z = torch.tensor([0.0, -0.0, 65000.0, -65000.0], dtype=dtype)
    got = of(z)
    assert got[:2].tolist() == [0.0 if name == "relu" else 0.5] * 2
    assert bool(got.isfinite().all())
    assert got[2:].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("name", sorted(FACTORS))
def test_every_factor_belongs_to_a_known_activation(name: str) -> None:
    classes = {type(module).__name__ for module in (ACT2FN[act] for act in NAMES)} | {"SiLU", "SiLUActivation"}
    assert name in classes


@pytest.mark.parametrize("dtype", sorted(WIDTHS, key=str))
@given(data=st.data())
def test_half_keeps_every_value_to_the_bit(dtype: torch.dtype, data: st.DataObject) -> None:
    value = torch.tensor(data.draw(FINITE[dtype]), dtype=dtype).requires_grad_()
    out = rules.half(value)
    (slope,) = torch.autograd.grad(out.sum(), value)
    assert torch.equal(out, value)
    assert torch.equal(slope, torch.full_like(value, 0.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_keeps_the_smallest_numbers_to_the_bit(dtype: torch.dtype) -> None:
    """In float16 the numbers that halving would round away are those below 6e-5: common among neurons."""
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    value = (torch.arange(1, 8, dtype=torch.float64) * smallest).to(dtype)
    assert torch.equal(rules.half(value), value)
    assert torch.equal(rules.half(-value), -value)


@pytest.mark.parametrize("dtype", sorted(WIDTHS, key=str))
@given(data=st.data())
def test_straight_keeps_every_value_to_the_bit(dtype: torch.dtype, data: st.DataObject) -> None:
    value = torch.tensor(data.draw(FINITE[dtype]), dtype=dtype)
    linear = torch.randn(len(value), generator=torch.Generator().manual_seed(0)).requires_grad_()
    out = rules.straight(value, 3 * linear)
    (slope,) = torch.autograd.grad(out.sum(), linear)
    assert out.dtype == dtype
    assert torch.equal(out, value)
    assert torch.equal(slope, torch.full_like(linear, 3.0))


@pytest.mark.parametrize("cap", [0.5, 2.0, 30.0])
def test_soft_cap_is_a_constant_factor_with_limit_one(cap: float) -> None:
    z = torch.tensor([0.0, 1e-6, -3.0, 40.0], requires_grad=True)
    capped = cap * torch.tanh(z.detach() / cap)
    out = rules.soft_cap(capped, z, cap)
    (slope,) = torch.autograd.grad(out.sum(), z)
    assert torch.equal(out, capped)
    assert error(slope * z.detach(), capped) < 1e-6
    assert slope[0] == 1


def test_rule_names_are_those_of_the_settings() -> None:
    assert {rule for rule, _ in rules.RULE_OF.values()} == set(ALL_RULES)


class Envoy:
    """What a rule sees of a module outside a trace."""

    def __init__(self, module: torch.nn.Module, value: Tensor) -> None:
        self._module, self.input = module, value
        self.output = module(value)


@pytest.mark.parametrize("name", NAMES)
def test_activation_rule_multiplies_the_gradient_by_the_constant_factor(name: str) -> None:
    z = torch.linspace(-3, 3, 13, requires_grad=True)
    envoy = Envoy(ACT2FN[name], z)
    plain = envoy.output.detach().clone()
    rules.activation(envoy)
    (slope,) = torch.autograd.grad(envoy.output.sum(), z)
    assert torch.equal(envoy.output, plain)
    assert error(slope * z.detach(), plain) < 1e-6


def test_product_rule_halves_both_factors() -> None:
    gate, up = (torch.randn(9, generator=torch.Generator().manual_seed(s)).requires_grad_() for s in (0, 1))
    envoy = Envoy(torch.nn.Identity(), gate * up)
    rules.product(envoy)
    slopes = torch.autograd.grad(envoy.input.sum(), (gate, up))
    assert torch.equal(envoy.input, gate * up)
    assert torch.equal(slopes[0], 0.5 * up)
    assert torch.equal(slopes[1], 0.5 * gate)


def test_gate_rule_gives_all_of_the_gradient_to_the_other_factor() -> None:
    gate, up = (torch.randn(9, generator=torch.Generator().manual_seed(s)).requires_grad_() for s in (0, 1))
    envoy = Envoy(ACT2FN["silu"], gate)
    value = envoy.output.detach().clone()
    rules.gate(envoy)
    made = envoy.output * up
    slopes = torch.autograd.grad(made.sum(), (gate, up), allow_unused=True)
    assert torch.equal(envoy.output, value)
    assert slopes[0] is None
    assert torch.equal(slopes[1], value)


def test_apply_leaves_a_rule_out_that_is_off() -> None:
    value = torch.randn(4).requires_grad_()
    envoy = Envoy(torch.nn.Identity(), value)
    rules.apply("product", envoy, RULES - {"product"})
    assert envoy.input is value
    rules.apply("product", envoy, frozenset({"product"}))
    assert envoy.input is not value


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_every_activation_of_a_family_has_the_oracles_factor(family: str) -> None:
    act = ref.mlps(load({"gemma3_text": "gemma3"}.get(family, family)).module)[0].act
    z = torch.linspace(-4, 4, 81)
    assert error(FACTORS[type(act).__name__](z), ref.ratio(act, z)) < 1e-6
