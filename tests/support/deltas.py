"""A gated delta net in plain PyTorch, token by token, for the oracle (reference.py): independent of the product's
triangular equations and of transformers' chunks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Constants = dict[str, Tensor]


def is_delta(module: Any) -> bool:
    """Whether a module is one."""
    return hasattr(module, "A_log") and hasattr(module, "conv1d")


def maps(module: Any) -> dict[str, Any]:
    """Its linear maps and its norm: separate ones or fused."""
    if hasattr(module, "in_proj_qkv"):
        names = {"gate": "in_proj_z", "decay": "in_proj_a", "share": "in_proj_b", "out": "out_proj", "norm": "norm"}
        return {"mixed": module.in_proj_qkv, **{name: getattr(module, path) for name, path in names.items()}}
    names = {"gate": "g_proj", "decay": "a_proj", "share": "b_proj", "out": "o_proj", "norm": "o_norm"}
    each = (module.q_proj, module.k_proj, module.v_proj)
    found = {name: getattr(module, path) for name, path in names.items()}
    return {"mixed": lambda x: torch.cat([one(x) for one in each], -1), **found}


def forward(
    module: Any, x: Tensor, mask: Tensor | None, rules: frozenset[str], kept: Constants | None = None
) -> Tensor:
    """What it gives, linearised by the rules; with `kept`, its constants are those, or are put there if it is empty."""
    fixed: Constants = {} if kept is None else kept

    def constant(name: str, value: Tensor, rule: str) -> Tensor:
        if kept is None:
            return value.detach() if rule in rules else value
        return fixed.setdefault(name, value.detach())

    if mask is not None:
        x = x * mask[:, :, None].to(x.dtype)
    parts = maps(module)
    before = convolved(module, parts["mixed"](x))
    keys = module.key_dim
    query, key = (constant(*one, "attention") for one in _sides(module, torch.nn.functional.silu(before)))
    inside = before[..., 2 * keys :]
    value = inside * constant("factor", inside.sigmoid(), "activation")
    decay = -module.A_log.float().exp() * torch.nn.functional.softplus(parts["decay"](x).float() + module.dt_bias)
    decay = constant("decay", decay.exp(), "attention")
    twice = 1 + getattr(module, "allow_neg_eigval", False)
    share = constant("share", twice * parts["share"](x).sigmoid(), "attention")
    heads = recurrence(query, key, value.unflatten(-1, (-1, module.head_v_dim)), decay, share)
    size = (heads.square().mean(-1, keepdim=True) + parts["norm"].variance_epsilon).rsqrt()
    gate = constant("gate", torch.nn.functional.silu(parts["gate"](x)), "attention")
    normed = heads * constant("size", size, "norm") * parts["norm"].weight
    return parts["out"](normed.flatten(-2) * gate)


def convolved(module: Any, x: Tensor) -> Tensor:
    """Each coordinate's sum over the last few tokens [prompt, token, coordinate]."""
    taps = module.conv1d.weight[:, 0]
    late = [torch.nn.functional.pad(x, (0, 0, by, 0))[:, : x.shape[1]] for by in reversed(range(taps.shape[1]))]
    return sum((tap * one for tap, one in zip(taps.T, late, strict=True)), torch.zeros_like(x))


def _sides(module: Any, mixed: Tensor) -> list[tuple[str, Tensor]]:
    """Queries and keys of unit length, as many as there are heads of values [prompt, token, head, coordinate]."""
    found, keys = [], module.key_dim
    for name, flat in (("query", mixed[..., :keys]), ("key", mixed[..., keys : 2 * keys])):
        heads = flat.unflatten(-1, (-1, module.head_k_dim))
        heads = heads * (heads.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
        found.append((name, heads.repeat_interleave(module.num_v_heads // module.num_k_heads, dim=2)))
    return found


def recurrence(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, share: Tensor) -> Tensor:
    """The state forgets, learns the value at the key as far as it does not hold it, and is read by the query."""
    state = value.new_zeros(*value.shape[:1], value.shape[2], key.shape[-1], value.shape[-1])
    found = []
    for at in range(value.shape[1]):
        state = state * decay[:, at, :, None, None]
        held = torch.einsum("bhkv,bhk->bhv", state, key[:, at])
        learnt = share[:, at, :, None] * (value[:, at] - held)
        state = state + key[:, at, :, :, None] * learnt[:, :, None]
        found.append(torch.einsum("bhkv,bhk->bhv", state, query[:, at]) * key.shape[-1] ** -0.5)
    return torch.stack(found, 1)
