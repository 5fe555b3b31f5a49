"""The RelP rules as functions for the body of an nnsight trace (method.md section 3).

Each takes the envoy of one module, leaves its forward value as it is to the bit, and replaces what the backward
pass sees. Nothing outlives the trace: values are set on this run only, no module is replaced, so there is nothing
to restore after an error. Knows how a *kind* of module is linearised; which modules a model has is in
model/families.py.
"""

from __future__ import annotations

import inspect
import math
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

KERNEL = "attention_interface_"
"""What the operations are called that choose and run the attention kernel."""
CONVOLUTION, DELTA_RULE = "causal_conv1d_fn", "chunk_gated_delta_rule"
"""What the operations of a gated delta net are called, by a part of their names."""
L2_EPS = 1e-6
"""What transformers adds to the squared length of its queries and keys."""
SINKS = "sinks"
"""The parameter of an attention with a logit that takes part of the softmax and has no value."""
DOT_PRODUCT, SOFTMAX = "scaled_dot_product_attention", "softmax"
"""What is in the names of the operations of an attention that calls PyTorch's kernel itself, or that is written out."""
INNER = "self__attn_"
"""What the operation is called that is such an attention, in one that calls it."""
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
    """Rule 1: the centring stays linear, the standard deviation is a constant, the bias carries nothing. A module that
    computes it step by step has its reciprocal to hold, as an RMSNorm has."""
    call = _whole_norm(norm)
    if call is None:
        rms_norm(norm)
        return
    x, weight, bias, eps = _given(call)
    centred = x.float() - x.float().mean(-1, keepdim=True)
    scale = (centred.pow(2).mean(-1, keepdim=True) + eps).rsqrt().detach()
    linear = centred * scale if weight is None else centred * scale * weight.float()
    call.output = straight(call.output, linear if bias is None else linear + bias.float())


def attention(attn: Any) -> None:
    """Rule 2: the pattern is a constant; only values and the output projection carry gradient.

    Detaching what enters the attention function freezes the pattern of any kernel, masks and soft-caps included. An
    attention that is written out has its softmax to hold.
    """
    name, call = attention_call(attn)
    if SOFTMAX in name:
        call.output = call.output.detach()
        return
    given, named = call.inputs
    at = 1 if name.startswith(KERNEL) else 0  # behind the module
    call.inputs = ((*given[:at], given[at].detach(), given[at + 1].detach(), *given[at + 2 :]), named)


def output_gate(attn: Any) -> None:
    """Rule 2 for a gate on what an attention has mixed: it comes of the query's token, and is a constant as it is."""
    call = output_gate_call(attn)
    call.output = call.output.detach()


def delta_values(attn: Any) -> None:
    """Rule 3 for the SiLU behind the short convolution of a delta net."""
    call = _operation(attn, CONVOLUTION)
    before = convolved(*call.inputs)
    call.output = straight(call.output, before * torch.sigmoid(before.detach().float()).to(before.dtype))


def delta(attn: Any) -> None:
    """Rule 2 for a gated delta net: what it writes to and reads from its state with are constants, as is how that
    decays; what comes out is then linear in the values, with a pattern as attention has one (`delta_pattern`)."""
    call = _operation(attn, DELTA_RULE)
    (query, key, *rest), named = call.inputs
    frozen = {name: named[name].detach() for name in ("g", "beta")}
    call.inputs = ((query.detach(), key.detach(), *rest), {**named, **frozen})


def norm_gate(norm: Any) -> None:
    """Rule 2 for the gate that a norm of mixed values multiplies by, as for `output_gate`."""
    (heads, gate, *rest), named = norm.inputs
    norm.inputs = ((heads, gate.detach(), *rest), named)


def activation(act: Any) -> None:
    """Rule 3: ``act(z)`` becomes ``z`` times the constant ``act(z) / z``, with its limit at 0."""
    z = act.input
    act.output = straight(act.output, z * factor(act._module, z.detach().float()).to(z.dtype))


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
        return factor(how.act, gate), None
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


def constant(module: Any) -> None:
    """Rule 2 for what gates by the token alone, as the pattern gates by positions: it is a constant."""
    module.output = module.output.detach()


def soft_cap(logits: Tensor, uncapped: Tensor, cap: float) -> Tensor:
    """Rule 3 for ``cap * tanh(z / cap)``, whose factor tends to 1 at 0."""
    z = uncapped.detach().float()
    factor = torch.where(z == 0, 1.0, cap * torch.tanh(z / cap) / torch.where(z == 0, 1.0, z))
    return straight(logits, uncapped * factor.to(uncapped.dtype))


RULE_OF: dict[str, tuple[str, Callable[[Any], None]]] = {
    "rms_norm": ("norm", rms_norm),
    "layer_norm": ("norm", layer_norm),
    "attention": ("attention", attention),
    "output_gate": ("attention", output_gate),
    "delta_values": ("activation", delta_values),
    "delta": ("attention", delta),
    "norm_gate": ("attention", norm_gate),
    "activation": ("activation", activation),
    "product": ("product", product),
    "gate": ("gate", gate),
    "constant": ("attention", constant),
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
            if kind in ("attention", "delta"):
                _ = block.get(path).source


def attention_call(attn: Any) -> tuple[str, Any]:
    """The operation that runs the attention kernel, or the softmax of one that is written out: found by name, since its
    number differs between versions. An attention that has both for scores with and without ALiBi has the latter
    first."""
    source, config = attn.source, attn._module.config
    if inner := [name for name in source.names if name.startswith(INNER)]:
        source = getattr(source, inner[0]).source
    names = source.names
    kernels = [name for name in names if name.startswith(KERNEL)]
    if kernels:
        return kernels[-1], getattr(source, kernels[-1])
    own = [name for name in names if DOT_PRODUCT in name] if config._attn_implementation == "sdpa" else []
    own = own or [name for name in names if SOFTMAX in name]
    chosen = own[-1 if getattr(config, "alibi", False) else 0]
    return chosen, getattr(source, chosen)


def output_gate_call(attn: Any) -> Any:
    """The operation that makes the gate on an attention's output."""
    return _operation(attn, "sigmoid")


def _operation(attn: Any, part: str) -> Any:
    """The first operation of a module's forward whose name has this part."""
    return getattr(attn.source, next(name for name in attn.source.names if part in name))


def convolved(given: Sequence[Tensor | None], named: Mapping[str, Any]) -> Tensor:
    """The short causal convolution of a delta net [prompt, coordinate, column], before its activation, of what its
    operation is given: positions, weights and a bias."""
    x, weight, bias = (*given, *(named[name] for name in ("weight", "bias") if name in named))[:3]
    assert x is not None
    assert weight is not None
    out = torch.nn.functional.conv1d(
        x.to(weight.dtype), weight[:, None], bias, padding=weight.shape[-1] - 1, groups=len(weight)
    )
    return out[..., : x.shape[-1]]


def value_factor(attn: Any) -> Tensor:
    """What `delta_values` multiplies by, of all coordinates [prompt, column, coordinate]."""
    before = convolved(*_operation(attn, CONVOLUTION).inputs)
    return torch.sigmoid(before.detach().float()).transpose(1, 2)


def delta_pattern(attn: Any) -> tuple[Tensor, int]:
    """How a gated delta net carries values from position to position [prompt, head, query, key], float32, and how many
    coordinates all its heads have.

    The state decays by exp(g), forgets what it holds at the key and learns the value there, by the share beta:
    S[t] = exp(g[t]) S[t-1] (1 - beta k k') + beta v k'; out[t] = S[t] q[t]. So what is learnt at t is
    u[t] = beta[t] (v[t] - sum over s < t of exp(g[s+1] + ... + g[t]) (k[s] . k[t]) u[s]): triangular equations.
    """
    (query, key, value, *_), named = _operation(attn, DELTA_RULE).inputs
    query, key = (x.detach().float().transpose(1, 2) for x in (query, key))
    shared = value.shape[2] // query.shape[1]  # heads of values by head of keys, repeated in the rule or before it
    query, key = (x.repeat_interleave(shared, 1) for x in (query, key))
    if named.get("use_qk_l2norm_in_kernel"):
        query, key = (x * (x.square().sum(-1, keepdim=True) + L2_EPS).rsqrt() for x in (query, key))
    since = named["g"].detach().double().transpose(1, 2).cumsum(-1)
    decay = (since[..., :, None] - since[..., None, :]).tril().exp().tril().float()
    beta = named["beta"].detach().float().transpose(1, 2)
    held = (beta[..., None] * (key @ key.transpose(-1, -2)) * decay).tril(-1)
    learnt = torch.linalg.solve_triangular(held, torch.diag_embed(beta), upper=False, unitriangular=True)
    return (query @ key.transpose(-1, -2) * decay * query.shape[-1] ** -0.5) @ learnt, value[0, 0].numel()


def kernel(attn: Any) -> Any:
    """The function that runs the attention kernel, read before its inputs are; None where a model has its own."""
    return next((getattr(attn.source, name).output for name in attn.source.names if name.startswith(KERNEL)), None)


def pattern(attn: Any, function: Any) -> Tensor:
    """The attention pattern [prompt, head, query, key], once the kernel has run: what a kernel returns of it, if it
    does. PyTorch's own is computed from queries, keys and mask; of any other, and where part of the attention goes to a
    sink, which some kernels leave out of what they return, the kernel is called once more with the identity in the
    place of the values, which gives the pattern with all that it does.

    Args:
        function: the attention's `kernel`.
    """
    name, call = attention_call(attn)
    if SOFTMAX in name:
        return call.output.detach()
    if function is None:
        (query, key, _), named = call.inputs
        return _scaled_dot_product(attn._module, query.detach(), key.detach(), named["attn_mask"], **named)
    (module, query, key, value, *rest), named = call.inputs
    given = call.output[1]
    if given is not None and not hasattr(module, SINKS):
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
    call = _whole_norm(norm)
    if call is None:
        return _statistic(norm.source).output.float().squeeze(-1)
    x, _, _, eps = _given(call)
    return (x.float().var(-1, correction=0) + eps).rsqrt()


def epsilon(norm: Any) -> float:
    """What a norm adds to its mean square."""
    written = EPSILONS.get(type(norm).__name__)
    if written is not None:
        return written
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


def _whole_norm(norm: Any) -> Any:
    """The call of PyTorch's LayerNorm in a norm; None where its steps are written out."""
    return next((getattr(norm.source, name) for name in norm.source.names if "layer_norm" in name), None)


def _given(call: Any) -> tuple[Tensor, Tensor | None, Tensor | None, float]:
    """Input, weight, bias and epsilon of a call of PyTorch's LayerNorm, however it is written."""
    given, named = call.inputs
    bound = inspect.signature(torch.nn.functional.layer_norm).bind(*given, **named)
    bound.apply_defaults()
    return tuple(bound.arguments[name] for name in ("input", "weight", "bias", "eps"))


def _statistic(source: Any) -> Any:
    """The reciprocal root mean square of an RMSNorm, one call deeper in Gemma's; Gemma 4 takes a power for it."""
    for name in source.names:
        if "rsqrt" in name or name.startswith("torch_pow"):
            return getattr(source, name)
    return _statistic(source.self__norm_0.source)


def factor(act: Any, z: Tensor) -> Tensor:
    """``act(z) / z`` of an activation module, with its limit at 0."""
    learned = LEARNED.get(type(act).__name__)
    return FACTORS[type(act).__name__](z) if learned is None else learned(act, z)


def xielu(act: Any, z: Tensor) -> Tensor:
    """The factor of xIELU, ``alpha_p z + beta`` above 0 and ``alpha_n (expm1(z) / z - 1) + beta`` below, which tends to
    beta. The module itself is ``-1e-6 alpha_n`` at 0, since it computes expm1 no nearer than that: the factor leaves
    these 1e-6 out, where it would have to be infinite."""
    softplus = torch.nn.functional.softplus
    above, beta = softplus(act.alpha_p.detach()).to(z), act.beta.detach().to(z)
    below = (act.beta + softplus(act.alpha_n)).detach().to(z)
    small = z.clamp_max(float(act.eps))
    return torch.where(z > 0, above * z, below * (torch.expm1(small) / small - 1)) + beta


EPSILONS = {"OlmoLayerNorm": 1e-5}
"""Of norms that have it in their code alone."""


def _tanh_gelu(z: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(SQRT_2_OVER_PI * (z + 0.044715 * z.pow(3))))


# act(z) / z of each activation class, written so that no division happens: exact at 0 and in half precision. A class
# that is not 0 at 0 (sigmoid, laplace) has no limit there, and so no factor.
FACTORS: dict[str, Callable[[Tensor], Tensor]] = {
    "SiLUActivation": torch.sigmoid,
    "SiLU": torch.sigmoid,
    "GELUActivation": lambda z: 0.5 * (1.0 + torch.erf(z / SQRT_2)),
    "GELUTanh": _tanh_gelu,
    "NewGELUActivation": _tanh_gelu,
    "FastGELUActivation": _tanh_gelu,
    "AccurateGELUActivation": _tanh_gelu,
    "QuickGELUActivation": lambda z: torch.sigmoid(1.702 * z),
    "MishActivation": lambda z: torch.tanh(torch.nn.functional.softplus(z)),
    "ReLU": lambda z: (z > 0).to(z.dtype),
    "ReLUSquaredActivation": torch.relu,
    "LinearActivation": torch.ones_like,
}
LEARNED: dict[str, Callable[[Any, Tensor], Tensor]] = {"XIELUActivation": xielu}
"""The same of those that have weights, of the module and its input."""
ACTIVATIONS = ChainMap[str, Any](FACTORS, LEARNED)
"""Classes that rule 3 covers."""
