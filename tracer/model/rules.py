"""The RelP rules as functions for the body of an nnsight trace (method.md section 3).

Each takes the envoy of one module, leaves its forward value as it is to the bit, and replaces what the backward
pass sees. Nothing outlives the trace: values are set on this run only, no module is replaced, so there is nothing
to restore after an error. Knows how a *kind* of module is linearised; which modules a model has is in
model/families.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

KERNEL = "attention_interface_"
"""What the operations are called that choose and run the attention kernel."""
SQRT_2 = math.sqrt(2.0)
SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)


class _Straight(torch.autograd.Function):
    """The value of one tensor with the gradient of another, at no cost in the forward pass."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, linear: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0]


class _Half(torch.autograd.Function):
    """Half the gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 0.5 * grads[0]


def straight(value: Tensor, linear: Tensor) -> Tensor:
    """`value` to the bit, with the gradient of `linear`."""
    return _Straight.apply(value.detach(), linear.to(value.dtype))


def half(value: Tensor) -> Tensor:
    """`value` to the bit, with half its gradient."""
    return _Half.apply(value)


def rms_norm(norm: Any) -> None:
    """Rule 1: the root mean square is a constant."""
    statistic = _statistic(norm.source)
    statistic.output = statistic.output.detach()


def layer_norm(norm: Any) -> None:
    """Rule 1: the centring stays linear, the standard deviation is a constant, the bias carries nothing."""
    call = norm.source.F_layer_norm_0
    (x, _, weight, bias, eps), _ = call.inputs
    centred = x.float() - x.float().mean(-1, keepdim=True)
    scale = (centred.pow(2).mean(-1, keepdim=True) + eps).rsqrt().detach()
    linear = centred * scale if weight is None else centred * scale * weight.float()
    call.output = straight(call.output, linear if bias is None else linear + bias.float())


def attention(attn: Any) -> None:
    """Rule 2: the pattern is a constant; only values and the output projection carry gradient.

    Detaching what enters the attention function freezes the pattern of any kernel, masks and soft-caps included.
    """
    call = attention_call(attn)
    (module, query, key, *rest), named = call.inputs
    call.inputs = ((module, query.detach(), key.detach(), *rest), named)


def activation(act: Any) -> None:
    """Rule 3: ``act(z)`` becomes ``z`` times the constant ``act(z) / z``, with its limit at 0."""
    factor = FACTORS[type(act._module).__name__]
    z = act.input
    act.output = straight(act.output, z * factor(z.detach().float()).to(z.dtype))


def product(down: Any) -> None:
    """Rule 4: each factor of ``gate * up`` gets half the gradient; halving the product halves both."""
    down.input = half(down.input)


def gate(act: Any) -> None:
    """The linear gate, in the place of rule 4: the factor ``act(gate)`` is a constant, ``up`` gets all the gradient."""
    act.output = act.output.detach()


def gated(how: Any, gate: Tensor, up: Tensor, rules: frozenset[str]) -> Tensor:
    """Neurons of their gates and ups, with rules 3 and 4 or, in the place of 4, the linear gate.

    Args:
        how: its `kind`: ``product``, ``act(gate) * up`` with the module `act`; or ``clamped``, ``(up' + 1) * gate' *
            sigmoid(alpha * gate')``, the gate clamped from above and up on both sides by `limit`. A clamp is an
            activation; of ``up' + 1`` only the product with up' is halved, since the 1 has no gradient to share.
    """
    inner = how.act(gate) if how.kind == "product" else _glu(how, gate)
    other = up if how.kind == "product" else up.clamp(-how.limit, how.limit)
    if "activation" in rules:
        of_gate, of_up = factors(how, gate.detach().float(), up.detach().float())
        inner = straight(inner, gate * of_gate.to(gate.dtype))
        other = other if of_up is None else straight(other, up * of_up.to(up.dtype))
    if "gate" in rules:
        inner = inner.detach()
    whole = inner * other
    whole = half(whole) if "product" in rules else whole
    return whole if how.kind == "product" else whole + inner


def _glu(how: Any, gate: Tensor) -> Tensor:
    clamped = gate.clamp(max=how.limit)
    return clamped * torch.sigmoid(clamped * how.alpha)


def factors(how: Any, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor | None]:
    """What the activation of a gate divides it by, and what a clamp of up divides that by (None without one): 1 where
    nothing is clamped, 0 included."""
    if how.kind == "product":
        return FACTORS[type(how.act).__name__](gate), None
    below, size = gate.clamp(max=how.limit), up.abs()
    kept = torch.where(gate > how.limit, how.limit / gate, 1.0)
    return kept * torch.sigmoid(below * how.alpha), torch.where(size > how.limit, how.limit / size, 1.0)


def coefficients(how: Any, gate: Tensor, up: Tensor, linear_gate: bool) -> tuple[Tensor | None, Tensor]:
    """What neurons multiply what they read by the maps of gate and up by, as `gated` has it: rules 3 and 4 or, in the
    place of 4, a linear gate, where the gate's map carries nothing (None)."""
    of_gate, of_up = factors(how, gate, up)
    inner, other = gate * of_gate, up if of_up is None else up * of_up
    through = inner if of_up is None else inner * of_up
    if linear_gate:
        return None, through
    more = 0.0 if how.kind == "product" else 1.0
    return (0.5 * other + more) * of_gate, 0.5 * through


def soft_cap(logits: Tensor, uncapped: Tensor, cap: float) -> Tensor:
    """Rule 3 for ``cap * tanh(z / cap)``, whose factor tends to 1 at 0."""
    z = uncapped.detach().float()
    factor = torch.where(z == 0, 1.0, cap * torch.tanh(z / cap) / torch.where(z == 0, 1.0, z))
    return straight(logits, uncapped * factor.to(uncapped.dtype))


RULE_OF: dict[str, tuple[str, Callable[[Any], None]]] = {
    "rms_norm": ("norm", rms_norm),
    "layer_norm": ("norm", layer_norm),
    "attention": ("attention", attention),
    "activation": ("activation", activation),
    "product": ("product", product),
    "gate": ("gate", gate),
}


def apply(kind: str, envoy: Any, rules: frozenset[str]) -> None:
    """Linearise one module if the rule for its kind is on."""
    rule, function = RULE_OF[kind]
    if rule in rules:
        function(envoy)


def prepare(blocks: Iterable[Any], steps: Iterable[Iterable[tuple[str, str]]]) -> None:
    """Open the source of every attention before the model runs.

    nnsight instruments a forward when its source is first asked for. An attention with norms inside would be running
    by then, since its norms come first.
    """
    for block, inside in zip(blocks, steps, strict=True):
        for kind, path in inside:
            if kind == "attention":
                _ = block.get(path).source


def attention_call(attn: Any) -> Any:
    """The operation that runs the attention kernel: found by name, since its number differs between versions."""
    names = [name for name in attn.source.names if name.startswith(KERNEL)]
    return getattr(attn.source, names[-1])


def kernel(attn: Any) -> Any:
    """The function that runs the attention kernel, read before its inputs are."""
    return next(getattr(attn.source, name).output for name in attn.source.names if name.startswith(KERNEL))


def pattern(attn: Any, function: Any) -> Tensor:
    """The attention pattern [prompt, head, query, key], once the kernel has run: what a kernel returns of it, if it
    does. PyTorch's own is computed from queries, keys and mask; of any other, the kernel is called once more with the
    identity in the place of the values, which gives the pattern with all that it does.

    Args:
        function: the attention's `kernel`.
    """
    call = attention_call(attn)
    (module, query, key, value, *rest), named = call.inputs
    given = call.output[1]
    if given is not None:
        return given.detach()
    if function.__name__ == "sdpa_attention_forward":
        return _scaled_dot_product(module, query.detach(), key.detach(), *rest, **named)
    length = key.shape[2]
    identity = torch.eye(length, dtype=value.dtype, device=value.device).expand(*value.shape[:2], length, length)
    out = function(module, query.detach(), key.detach(), identity.contiguous(), *rest, **named)[0]
    return out.transpose(1, 2)


def _scaled_dot_product(
    module: Any,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> Tensor:
    """The pattern of transformers' ``sdpa`` kernel, float32."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    grouped = query.float().unflatten(1, (key.shape[1], -1))
    scores = grouped @ key.float().transpose(2, 3)[:, :, None]
    scores = scores.flatten(1, 2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if mask is None and causal and query.shape[2] > 1:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask.float()
    return scores.softmax(-1)


def scale(kind: str, norm: Any) -> Tensor:
    """The frozen statistic of a norm, one number per token [prompt, column]: what it multiplies by, but for weights."""
    if kind == "rms_norm":
        return _statistic(norm.source).output.float().squeeze(-1)
    (x, _, _, _, eps), _ = norm.source.F_layer_norm_0.inputs
    return (x.float().var(-1, correction=0) + eps).rsqrt()


def _statistic(source: Any) -> Any:
    """The reciprocal root mean square of an RMSNorm, one call deeper in Gemma's."""
    for name in source.names:
        if "rsqrt" in name:
            return getattr(source, name)
    return _statistic(source.self__norm_0.source)


# act(z) / z of each activation class, written so that no division happens: exact at 0 and in half precision.
FACTORS: dict[str, Callable[[Tensor], Tensor]] = {
    "SiLUActivation": torch.sigmoid,
    "SiLU": torch.sigmoid,
    "GELUActivation": lambda z: 0.5 * (1.0 + torch.erf(z / SQRT_2)),
    "GELUTanh": lambda z: 0.5 * (1.0 + torch.tanh(SQRT_2_OVER_PI * (z + 0.044715 * z.pow(3)))),
    "NewGELUActivation": lambda z: 0.5 * (1.0 + torch.tanh(SQRT_2_OVER_PI * (z + 0.044715 * z.pow(3)))),
    "ReLU": lambda z: (z > 0).to(z.dtype),
}
