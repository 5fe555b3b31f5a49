"""Each RelP rule on its own: forward values to the bit, the gradient of section 3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import nnsight
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.activations import ACT2FN

import reference as ref
import tiny as t
from helpers import error, load
from tracer.model import rules
from tracer.settings import ALL_RULES, RULES

LIMITS = {
    "silu": 0.5,
    "gelu": 0.5,
    "gelu_new": 0.5,
    "gelu_pytorch_tanh": 0.5,
    "gelu_fast": 0.5,
    "gelu_accurate": 0.5,
    "quick_gelu": 0.5,
    "mish": 0.6,
    "relu": 0.0,
    "relu2": 0.0,
    "linear": 1.0,
    "xielu": 0.5,
}
NAMES = tuple(LIMITS)
GROWS = {"relu2": (65000.0, 0.0), "linear": (1.0, 1.0), "xielu": (0.8 * 65000 + 0.5, 0.5 - 0.8)}
"""Factors far from 0, where they are not 1 and 0."""
WIDTHS: dict[torch.dtype, Literal[16, 32]] = {torch.float16: 16, torch.float32: 32}
FINITE = {
    dtype: st.lists(st.floats(width=width, allow_nan=False, allow_infinity=False), min_size=1, max_size=30)
    for dtype, width in WIDTHS.items()
}


def factor(name: str) -> tuple[Any, Callable[[Tensor], Tensor]]:
    module = ACT2FN[name]
    return module, lambda z: rules.factor(module, z)


@pytest.mark.parametrize("name", NAMES)
def test_factor_is_the_activation_over_its_input(name: str) -> None:
    module, of = factor(name)
    z = torch.cat([torch.linspace(-12, 12, 240, dtype=torch.float64), torch.tensor([1e-9, -1e-9, 1e-3])])
    wanted = module(z) / z
    if name == "xielu":  # which is 1e-6 off near 0
        z, wanted = z[z.abs() > 1e-5], wanted[z.abs() > 1e-5]
        assert (z * of(z) - module(z)).abs().max() < 1e-6
    assert (of(z) - wanted).abs().max() < (1e-4 if name == "xielu" else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_factor_has_its_limit_at_zero_in_every_precision(name: str, dtype: torch.dtype) -> None:
    _, of = factor(name)
    z = torch.tensor([0.0, -0.0, 65000.0, -65000.0], dtype=dtype)
    got = of(z)
    assert got[:2].tolist() == pytest.approx([LIMITS[name]] * 2, rel=1e-2 if dtype == torch.bfloat16 else 1e-3)
    assert bool(got.isfinite().all())
    assert got[2:].tolist() == pytest.approx(GROWS.get(name, (1.0, 0.0)), rel=1e-2)


@pytest.mark.parametrize("name", sorted({*rules.FACTORS, *rules.LEARNED}))
def test_every_factor_belongs_to_a_known_activation(name: str) -> None:
    assert name in {type(ACT2FN[act]).__name__ for act in (*NAMES, "swish")}


@pytest.mark.parametrize("name", ["sigmoid", "laplace"])
def test_what_is_not_zero_at_zero_has_no_factor(name: str) -> None:
    act = ACT2FN[name]
    assert float(act(torch.zeros(()))) > 1e-4
    assert type(act).__name__ not in {*rules.FACTORS, *rules.LEARNED}


def test_a_learned_factor_is_that_of_the_modules_own_weights() -> None:
    act: Any = ACT2FN["xielu"]
    act.alpha_p.data.fill_(1.5)
    act.alpha_n.data.fill_(-0.7)
    z = torch.linspace(-5, 5, 101)[torch.linspace(-5, 5, 101).abs() > 1e-3]
    with torch.no_grad():
        assert error(z * rules.factor(act, z), act(z).float()) < 1e-5
    assert float(rules.factor(act, torch.zeros(()))) == pytest.approx(0.5, rel=1e-5)


class Written(torch.nn.Module):
    """A LayerNorm whose steps are written out."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = torch.nn.Parameter(weight), 1e-5

    def forward(self, hidden: Tensor) -> Tensor:
        centred = hidden - hidden.mean(-1, keepdim=True)
        return self.weight * centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class Bare(torch.nn.Module):
    """One without weights, whose epsilon is left to PyTorch."""

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(hidden.float(), (8,)).to(hidden.dtype)


class Held(torch.nn.Module):
    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden)


@pytest.mark.parametrize("kind", ["torch", "written", "bare"])
def test_every_way_to_write_a_layer_norm_has_one_rule(kind: str) -> None:
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(8, generator=draw), torch.randn(2, 8, generator=draw)
    norm: Any = {"torch": torch.nn.LayerNorm(8, bias=False), "written": Written(weight), "bare": Bare()}[kind]
    if kind == "torch":
        norm.weight.data.copy_(weight)
    norm.requires_grad_(False)
    wrapped: Any = nnsight.NNsight(Held(norm))
    leaf = x.clone().requires_grad_()
    with wrapped.trace(leaf):
        statistic = nnsight.save(rules.scale("layer_norm", wrapped.norm))
        rules.layer_norm(wrapped.norm)
        out = nnsight.save(wrapped.norm.output)
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
    gain = torch.ones(8) if kind == "bare" else weight
    assert torch.equal(out, norm(x))
    assert error(statistic.detach(), scale[:, 0]) < 1e-6
    (slope,) = torch.autograd.grad((out * weight).sum(), leaf)
    held = weight * gain * scale
    assert error(slope, held - held.mean(-1, keepdim=True)) < 1e-5


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


@pytest.mark.parametrize("family", t.FAMILIES)
def test_every_activation_of_a_family_has_the_oracles_factor(family: str) -> None:
    act = ref.mlps(load(family).module)[0].act
    z = torch.linspace(-4, 4, 81)
    assert error(rules.factor(act, z), ref.ratio(act, z)) < 1e-6
