"""A slow, plain-PyTorch reference of the method, for tests only: no tracing library, no product code.

Everything replaces `forward` of modules inside a context manager and puts it back in `finally`.
Positions of nodes index the padded prompt; positions of a metric may be negative (counted from the end).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import deltas

Forward = Callable[..., Any]
Replace = Callable[[int, Tensor], Tensor]

ALL: frozenset[str] = frozenset({"norm", "attention", "activation", "product"})
LINEAR_GATE: frozenset[str] = frozenset({"norm", "attention", "activation", "gate"})
"""In the place of the half rule: the gate's factor is a constant."""
METHODS = ("relp", "grad", "ig", "conductance", "ig-activation", "relp-ig", "exact", "delta")
KINDS = ("target_logit", "logit_difference", "top_k", "log_probability", "centred_logit")


# ---------------------------------------------------------------- replacing forwards


@contextmanager
def _replaced(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Give modules another forward for a while."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward


class _Swap(torch.autograd.Function):
    """The value of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, surrogate: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]


def _swap(value: Tensor, surrogate: Tensor) -> Tensor:
    return _Swap.apply(value.detach(), surrogate)


# ---------------------------------------------------------------- the parts of a model


@dataclass(frozen=True)
class Mlp:
    """An MLP: `down(act(gate) * up)`, or `down(act(gate))` where `project` gives no `up`."""

    module: Any
    down: Any
    act: Any
    project: Callable[[Tensor], tuple[Tensor, Tensor | None]]


def _mlp(module: Any) -> Mlp | None:
    if hasattr(module, "gate_proj"):
        return Mlp(module, module.down_proj, module.act_fn, lambda x: (module.gate_proj(x), module.up_proj(x)))
    if hasattr(module, "gate_up_proj"):
        return Mlp(module, module.down_proj, module.activation_fn, lambda x: module.gate_up_proj(x).chunk(2, dim=-1))
    if hasattr(module, "dense_h_to_4h"):
        return Mlp(module, module.dense_4h_to_h, module.act, lambda x: (module.dense_h_to_4h(x), None))
    if hasattr(module, "up_proj"):
        return Mlp(module, module.down_proj, module.act_fn, lambda x: (module.up_proj(x), None))
    if hasattr(module, "fc_in"):
        return Mlp(module, module.fc_out, module.act, lambda x: (module.fc_in(x), None))
    if hasattr(module, "fc1"):
        return Mlp(module, module.fc2, module.activation_fn, lambda x: (module.fc1(x), None))
    if hasattr(module, "c_fc"):
        return Mlp(module, module.c_proj, module.act, lambda x: (module.c_fc(x), None))
    return None


def mlps(model: PreTrainedModel) -> list[Mlp]:
    """The MLPs in layer order."""
    found = [mlp for module in model.modules() if (mlp := _mlp(module)) is not None]
    if len(found) != model.config.num_hidden_layers:
        raise ValueError(f"{len(found)} MLPs found for {model.config.num_hidden_layers} layers")
    return found


def neurons(model: PreTrainedModel, basis: str = "activation") -> list[tuple[nn.Module, str]]:
    """Per layer, the module and the side of it where nodes live: of the down projection its input or output, of a whole
    block or its attention (or the norm behind that) the output."""
    if basis == "residual":
        return [(block, "output") for block in blocks(model)]
    if basis == "attention":
        return [
            (_behind(block, part.module), "output")
            for block, part in zip(blocks(model), attentions(model), strict=True)
        ]
    side = {"activation": "input", "output": "output"}[basis]
    return [(mlp.down, side) for mlp in mlps(model)]


def _behind(block: nn.Module, attention: nn.Module) -> nn.Module:
    """What adds an attention's output to the stream: a norm behind it, where this block has one, or itself."""
    own = "post_self_attn_layernorm"
    name = own if hasattr(block, own) else "post_attention_layernorm"
    sandwich = name == own or hasattr(block, "post_feedforward_layernorm")
    return block.get_submodule(name) if sandwich else attention


def blocks(model: PreTrainedModel) -> list[Any]:
    """The blocks in layer order."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(next(found for found in lists if len(found) == model.config.num_hidden_layers))


def final_norm(model: PreTrainedModel) -> Any:
    """The norm before the head."""
    inside = {id(part) for block in blocks(model) for part in block.modules()}
    found = [norm for norm in norms(model) if id(norm) not in inside]
    return found[-1] if found else model.get_submodule("model.norm")  # an identity in its place


@dataclass(frozen=True)
class Attention:
    """An attention module, the linear maps that feed it, and its output projection.

    `fused` is the projection that makes queries, keys and values together, `columns` the mask of its values. `split`
    are modules that lead to queries and keys alone. `value_norm` is what values go through, head by head.
    `latent_norm` is that of a latent which all heads share; of the modules in `cut` the marked columns alone lead to
    values. `gate` makes, of what the attention reads, what the mixed values are multiplied by.
    """

    module: nn.Module
    out: nn.Module
    head_dim: int
    split: tuple[nn.Module, ...] = ()
    value: Any = None
    fused: Any = None
    columns: Tensor = field(default_factory=lambda: torch.empty(0))
    value_norm: Any = None
    latent_norm: Any = None
    cut: tuple[tuple[Any, Tensor], ...] = ()
    gate: Any = None


def _attention(module: Any) -> Attention | None:
    if deltas.is_delta(module):
        return Attention(module, deltas.maps(module)["out"], module.head_v_dim)
    if getattr(module, "is_kv_shared_layer", False):  # keys and values of an earlier block
        return Attention(module, module.o_proj, module.head_dim, (module.q_proj,))
    if hasattr(module, "v_norm"):
        same = module.v_proj is None  # values are what keys are, before the keys' norm
        split = (module.q_proj, module.k_norm if same else module.k_proj)
        value = module.k_proj if same else module.v_proj
        return Attention(module, module.o_proj, module.head_dim, split, value, value_norm=module.v_norm)
    if hasattr(module, "kv_b_proj"):
        return _latent_attention(module)
    if hasattr(module, "q_proj"):
        split = (module.q_proj, module.k_proj)
        out = getattr(module, next(name for name in ("o_proj", "out_proj", "dense") if hasattr(module, name)))
        if module.q_proj.out_features == 2 * out.in_features:  # each head's queries, then its gate

            def gate(x: Tensor) -> Tensor:
                return module.q_proj(x).unflatten(-1, (-1, 2, module.head_dim))[..., 1, :].flatten(-2).sigmoid()

            return Attention(module, out, module.head_dim, split, module.v_proj, gate=gate)
        return Attention(module, out, module.head_dim, split, module.v_proj)
    if hasattr(module, "qkv_proj"):
        width = module.qkv_proj.out_features
        columns = torch.arange(width) >= width - module.num_key_value_heads * module.head_dim
        return Attention(module, module.o_proj, module.head_dim, fused=module.qkv_proj, columns=columns)
    if hasattr(module, "query_key_value"):  # some queries, a key and a value, group by group
        size = module.dense.in_features // module.config.num_attention_heads
        width = module.query_key_value.out_features
        groups = (width // size - module.config.num_attention_heads) // 2
        columns = torch.arange(width) % (width // groups) >= width // groups - size
        return Attention(module, module.dense, size, fused=module.query_key_value, columns=columns)
    if hasattr(module, "kv_heads"):  # all queries, then a key and a value; or all three head by head
        size = module.head_dim
        columns = torch.arange(module.c_attn.out_features)
        of_head = 3 * size if module.kv_heads > 1 else module.c_attn.out_features
        return Attention(module, module.c_proj, size, fused=module.c_attn, columns=columns % of_head >= of_head - size)
    if hasattr(module, "c_attn"):
        columns = torch.arange(3 * module.embed_dim) >= 2 * module.embed_dim
        return Attention(module, module.c_proj, module.head_dim, fused=module.c_attn, columns=columns)
    return None


def _latent_attention(module: Any) -> Attention:
    """Keys and values of all heads come of one latent; a rotated key that all share comes beside it."""
    rank, size = module.kv_b_proj.in_features, module.o_proj.in_features // module.num_heads
    each = module.kv_b_proj.out_features // module.num_heads
    values = torch.arange(module.kv_b_proj.out_features) % each >= each - size
    query = module.q_proj if module.q_proj is not None else module.q_b_proj

    def value(x: Tensor) -> Tensor:
        inside = module.kv_a_layernorm(module.kv_a_proj_with_mqa(x)[..., :rank])
        return module.kv_b_proj(inside)[..., values]

    cut = (
        (module.kv_a_proj_with_mqa, torch.arange(module.kv_a_proj_with_mqa.out_features) < rank),
        (module.kv_b_proj, values),
    )
    return Attention(module, module.o_proj, size, (query,), value, latent_norm=module.kv_a_layernorm, cut=cut)


def attentions(model: PreTrainedModel) -> list[Attention]:
    """The attention modules in layer order."""
    found = [part for module in model.modules() if (part := _attention(module)) is not None]
    if len(found) != model.config.num_hidden_layers:
        raise ValueError(f"{len(found)} attention modules found for {model.config.num_hidden_layers} layers")
    return found


GATED_NORM = "RMSNormGated"
"""What a delta net's norm is called, which is linearised with it."""


def norms(model: PreTrainedModel) -> list[nn.Module]:
    """Every RMSNorm and LayerNorm."""
    named = [m for m in model.modules() if "Norm" in type(m).__name__ and not any(m.children())]
    unknown = [m for m in named if not (_centres(m) or type(m).__name__.endswith(("RMSNorm", GATED_NORM)))]
    if unknown:
        raise ValueError(f"unknown norm: {type(unknown[0]).__name__}")
    return named


def _centres(norm: nn.Module) -> bool:
    return isinstance(norm, nn.LayerNorm) or type(norm).__name__.endswith("LayerNorm")


ONE_ABOVE = frozenset({"GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm", "NemotronLayerNorm1P", "Qwen3_5RMSNorm"})
"""Norms that multiply by 1 + their weight."""


def norm_parts(norm: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """A norm at x as `scale * linear(x) + bias`: the linear part, the constant scale and the bias."""
    name = type(norm).__name__
    eps = next((getattr(norm, each) for each in ("eps", "variance_epsilon") if hasattr(norm, each)), 1e-5)
    weight = getattr(norm, "weight", torch.ones(()))
    if name in ONE_ABOVE:
        weight = 1.0 + weight
    if _centres(norm):
        centred = x - x.mean(-1, keepdim=True)
        scale = weight * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
        return centred, scale.detach(), getattr(norm, "bias", None)
    return x, (weight * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)).detach(), None


def ratio(act: Any, z: Tensor) -> Tensor:
    """`act(z) / z` in closed form, so that z = 0 gives the limit."""
    name = type(act).__name__
    if name in ("SiLUActivation", "SiLU"):
        return torch.sigmoid(z)
    if name in ("NewGELUActivation", "GELUTanh", "FastGELUActivation", "AccurateGELUActivation"):
        return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z.pow(3))))
    if name in ("GELUActivation", "GELU"):
        return 0.5 * (1.0 + torch.erf(z / math.sqrt(2.0)))
    if name == "QuickGELUActivation":
        return torch.sigmoid(1.702 * z)
    if name == "ReLUSquaredActivation":
        return torch.relu(z)
    if name in ("ReLU", "ReLUActivation"):
        return (z > 0).to(z.dtype)
    if name == "ReLUSquaredActivation":
        return z * (z > 0)
    if name == "MishActivation":
        return torch.tanh(torch.log1p(torch.exp(-z.abs())) + z.clamp(min=0))
    if name == "LinearActivation":
        return torch.ones_like(z)
    if name == "XIELUActivation":
        return torch.where(z.abs() < 1e-4, torch.full_like(z, float(act.beta)), act(z) / torch.where(z == 0, 1.0, z))
    raise ValueError(f"no rule for the activation {name}")


def _head(model: PreTrainedModel) -> nn.Module:
    """The unembedding."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise ValueError("the model has no unembedding")
    return head


def cap_of(model: PreTrainedModel) -> float | None:
    """The final logit soft-cap."""
    return getattr(model.config, "final_logit_softcapping", None)


def scaled_logits(model: PreTrainedModel, z: Tensor) -> Tensor:
    """The unembedding's output times the constant of the configuration, before a soft-cap."""
    if hasattr(model.config, "dim_model_base"):
        return z  # scaled before the head
    if hasattr(model.config, "logits_scaling"):
        return z / model.config.logits_scaling
    return z * model.config.logit_scale if hasattr(model.config, "logit_scale") else z


def cap_ratio(z: Tensor, cap: float) -> Tensor:
    """`cap * tanh(z / cap) / z`, with its limit 1 at z = 0."""
    safe = torch.where(z == 0, torch.ones_like(z), z)
    return torch.where(z == 0, torch.ones_like(z), cap * torch.tanh(safe / cap) / safe)


# ---------------------------------------------------------------- the linearised model


def _linear_norm(norm: nn.Module, original: Forward) -> Forward:
    def forward(x: Tensor) -> Tensor:
        linear, scale, _ = norm_parts(norm, x)
        return _swap(original(x.detach()), linear * scale)

    return forward


def _linear_mlp(mlp: Mlp, rules: frozenset[str]) -> Forward:
    def forward(x: Tensor) -> Tensor:
        gate, up = mlp.project(x)
        a = mlp.act(gate)
        if "activation" in rules:
            a = _swap(a, gate * ratio(mlp.act, gate).detach())
        if up is not None and "gate" in rules:
            a = mlp.act(gate).detach() * up
        elif up is not None:
            product = a * up
            half = 0.5 * (a * up.detach() + a.detach() * up)
            a = _swap(product, half) if "product" in rules else product
        return mlp.down(a)

    return forward


def own_embeddings(model: PreTrainedModel) -> list[Any]:
    """What gives each block's own embeddings of the tokens, if there are such: constants."""
    return [part for name, part in model.named_modules() if name.endswith("per_layer_projection_norm")]


def own_activations(model: PreTrainedModel) -> list[Any]:
    """The activations that these embeddings are multiplied with."""
    return [part.act_fn for part in model.modules() if hasattr(part, "per_layer_input_gate")]


def _held(original: Forward) -> Forward:
    return lambda x: original(x).detach()


def _linear_activation(act: nn.Module) -> Forward:
    original = act.forward
    return lambda z: _swap(original(z.detach()), z * ratio(act, z).detach())


def _values_only(columns: Tensor, original: Forward) -> Forward:
    def forward(x: Tensor) -> Tensor:
        y = original(x)
        return _swap(y, y * columns.to(y.dtype))

    return forward


def _plain_norms(model: PreTrainedModel) -> list[nn.Module]:
    return [norm for norm in norms(model) if not type(norm).__name__.endswith(GATED_NORM)]


def _linear_delta(module: nn.Module, original: Forward, rules: frozenset[str]) -> Forward:
    def forward(hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        value = original(hidden_states.detach(), attention_mask=attention_mask, **kwargs)
        return _swap(value, deltas.forward(module, hidden_states, attention_mask, rules))

    return forward


def _linear_cap(model: PreTrainedModel, cap: float) -> dict[nn.Module, Forward]:
    head, seen = _head(model), []
    inner, outer = head.forward, model.forward

    def keep(x: Tensor) -> Tensor:
        seen[:] = [inner(x)]
        return seen[0]

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = outer(*args, **kwargs)
        z = seen.pop()
        output.logits = _swap(output.logits, z * cap_ratio(z, cap).detach())
        return output

    return {head: keep, model: forward}


@contextmanager
def linearized(model: PreTrainedModel, rules: frozenset[str] | set[str] = ALL) -> Iterator[None]:
    """Forward values unchanged, the backward of section 3; each rule can be left out."""
    rules = frozenset(rules)
    if rules - ALL - LINEAR_GATE:
        raise ValueError(f"unknown rules {sorted(rules - ALL - LINEAR_GATE)}")
    forwards: dict[nn.Module, Forward] = {}
    if "norm" in rules:
        forwards.update({norm: _linear_norm(norm, norm.forward) for norm in _plain_norms(model)})
    for part in attentions(model):
        if deltas.is_delta(part.module):
            forwards[part.module] = _linear_delta(part.module, part.module.forward, rules)
    if "attention" in rules:
        for part in attentions(model):
            for linear in part.split:
                forwards[linear] = lambda x, original=linear.forward: original(x).detach()
            if part.fused is not None:
                forwards[part.fused] = _values_only(part.columns, part.fused.forward)
            forwards |= {linear: _values_only(columns, linear.forward) for linear, columns in part.cut}
    for own in own_embeddings(model) if "attention" in rules else ():
        forwards[own] = _held(forwards.get(own) or own.forward)
    if "activation" in rules:
        forwards.update({act: _linear_activation(act) for act in own_activations(model)})
    if rules & {"activation", "product", "gate"}:
        forwards.update({mlp.module: _linear_mlp(mlp, rules) for mlp in mlps(model)})
    cap = cap_of(model)
    if "activation" in rules and cap is not None:
        forwards.update(_linear_cap(model, cap))
    with _replaced(forwards):
        yield


# ---------------------------------------------------------------- one forward pass


@dataclass
class Trace:
    """Logits, token embeddings, and per layer the neurons as computed (`raw`) and as passed on (`acts`)."""

    logits: Tensor
    embeddings: Tensor
    raw: list[Tensor]
    acts: list[Tensor]
    inside: dict[tuple[str, int], Tensor]


def positions(mask: Tensor) -> Tensor:
    """Position ids that count real tokens only."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def embed(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The output of the token embedding module."""
    return model.get_input_embeddings()(ids).detach()


def run(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor | None = None,
    *,
    basis: str = "activation",
    embeddings: Tensor | None = None,
    replacement: Replace | None = None,
) -> Trace:
    """One forward pass; `replacement(layer, neurons)` gives what the layer passes on instead."""
    mask = torch.ones_like(ids) if mask is None else mask
    raw: dict[int, Tensor] = {}
    acts: dict[int, Tensor] = {}
    entry = embed(model, ids) if embeddings is None else embeddings

    def tap(layer: int, value: Tensor) -> Tensor:
        raw[layer] = value
        acts[layer] = value if replacement is None else replacement(layer, value)
        return acts[layer]

    def at(layer: int, side: str, original: Forward) -> Forward:
        def output(*args: Any, **kwargs: Any) -> Any:
            out = original(*args, **kwargs)
            if isinstance(out, tuple):
                return (tap(layer, out[0]), *out[1:])
            return tap(layer, out).clone()  # a block may add to it in place

        return (lambda x: original(tap(layer, x))) if side == "input" else output

    places = neurons(model, basis)
    forwards: dict[nn.Module, Forward] = {
        down: at(layer, side, down.forward) for layer, (down, side) in enumerate(places)
    }
    forwards[model.get_input_embeddings()] = lambda tokens: entry
    with _replaced(forwards), _watched(model) as inside:
        output = model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)
    layers = range(len(places))
    return Trace(output.logits, entry, [raw[i] for i in layers], [acts[i] for i in layers], inside)


@contextmanager
def _watched(model: PreTrainedModel) -> Iterator[dict[tuple[str, int], Tensor]]:
    """What enters each down projection (``neuron``), leaves each block and, as layer -1, the final norm
    (``direction``)."""
    found: dict[tuple[str, int], Tensor] = {}

    def first(out: Any) -> Tensor:
        return out[0] if isinstance(out, tuple) else out

    def keep(kind: str, layer: int) -> Callable[..., None]:
        if kind == "neuron":
            return lambda part, args: found.__setitem__((kind, layer), args[0])
        return lambda part, args, out: found.__setitem__((kind, layer), first(out))

    handles = [final_norm(model).register_forward_hook(keep("direction", -1))]
    for layer, (mlp, block) in enumerate(zip(mlps(model), blocks(model), strict=True)):
        handles.append(mlp.down.register_forward_pre_hook(keep("neuron", layer)))
        handles.append(block.register_forward_hook(keep("direction", layer)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


# ---------------------------------------------------------------- metrics


@dataclass(frozen=True)
class Metric:
    """What is explained, averaged over `positions` (and over the tokens, for several targets or foils).

    `targets` and `foils`: token ids [prompt, token] or [prompt, position, token].
    """

    kind: str
    targets: Tensor | None = None
    foils: Tensor | None = None
    k: int = 5
    positions: tuple[int, ...] = (-1,)

    def rows(self, index: Sequence[int] | Tensor) -> Metric:
        """The same metric for a selection of prompts."""
        index = torch.as_tensor(index)
        targets = None if self.targets is None else self.targets[index]
        return replace(self, targets=targets, foils=None if self.foils is None else self.foils[index])

    def read(self, trace: Trace) -> Tensor:
        """The metric of every prompt from a forward pass."""
        return self(trace.logits)

    def __call__(self, logits: Tensor) -> Tensor:
        """The metric of every prompt from logits [prompt, position, token]."""
        if self.targets is None:
            raise ValueError("this metric has no targets: resolve it first")
        read = logits[:, list(self.positions)]
        if self.kind == "target_logit":
            value = _pick(read, self.targets).mean(-1)
        elif self.kind == "logit_difference" and self.foils is not None:
            value = _pick(read, self.targets).mean(-1) - _pick(read, self.foils).mean(-1)
        elif self.kind == "top_k":
            value = _pick(read, self.targets).sum(-1)
        elif self.kind == "log_probability":
            value = _pick(torch.log_softmax(read, dim=-1), self.targets).mean(-1)
        elif self.kind == "centred_logit":
            value = _pick(read - read.mean(-1, keepdim=True), self.targets).mean(-1)
        else:
            raise ValueError(f"unknown or incomplete metric {self.kind!r}")
        return value.mean(-1)


@dataclass(frozen=True)
class Inside(Metric):
    """The mean over positions of what is inside the model: of a state `at` (see `_watched`) its product with a vector
    or, of a neuron, its coordinate `unit`."""

    at: tuple[str, int] = ("direction", -1)
    vector: Tensor | None = None
    unit: int = 0

    def read(self, trace: Trace) -> Tensor:
        state = trace.inside[self.at][:, list(self.positions)]
        return (state[..., self.unit] if self.vector is None else state @ self.vector).mean(-1)


@dataclass(frozen=True)
class Weighed(Metric):
    """A weighted sum of (position, token, weight) of every prompt: `of` its logits or log-probabilities."""

    terms: tuple[tuple[tuple[int, int, float], ...], ...] = ()
    logs: bool = False

    def rows(self, index: Sequence[int] | Tensor) -> Metric:
        return replace(self, terms=tuple(self.terms[i] for i in torch.as_tensor(index).tolist()))

    def __call__(self, logits: Tensor) -> Tensor:
        read = torch.log_softmax(logits, dim=-1) if self.logs else logits
        rows = [
            sum(weight * read[row, pos, token] for pos, token, weight in terms) for row, terms in enumerate(self.terms)
        ]
        return torch.stack([torch.as_tensor(row) for row in rows])


def _pick(read: Tensor, tokens: Tensor) -> Tensor:
    """Entries of [prompt, position, token] at token ids."""
    if tokens.ndim == 2:
        tokens = tokens[:, None].expand(-1, read.shape[1], -1)
    return read.gather(-1, tokens)


def resolve(model: PreTrainedModel, ids: Tensor, mask: Tensor | None, metric: Metric) -> Metric:
    """Fix the tokens of a top-k metric by the unmodified forward."""
    if metric.kind != "top_k" or metric.targets is not None:
        return metric
    with torch.no_grad():
        logits = run(model, ids, mask).logits[:, list(metric.positions)]
    return replace(metric, targets=logits.topk(metric.k, dim=-1).indices)


# ---------------------------------------------------------------- attribution of nodes


@dataclass(frozen=True)
class Attribution:
    """`nodes`, `activations` [prompt, layer, position, neuron]; `embeddings` [prompt, position]."""

    nodes: Tensor
    activations: Tensor
    embeddings: Tensor
    metric: Tensor


@dataclass(frozen=True)
class _Setting:
    """Everything the methods share: the prompts, both ends of every difference, and the metric."""

    model: PreTrainedModel
    ids: Tensor
    mask: Tensor
    metric: Metric
    basis: str
    steps: int
    rules: frozenset[str]
    clean: Tensor
    base: Tensor
    path_start: Tensor
    entry: Tensor
    entry_base: Tensor


def _stack(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([value.detach() for value in values], dim=1)


def _slopes(s: _Setting, entry: Tensor, replacement: Replace | None = None) -> tuple[Tensor, list[Tensor], Tensor]:
    """The neurons [prompt, layer, position, neuron], the metric's gradient at each, and at the embeddings."""
    leaf = entry.detach().clone().requires_grad_()
    trace = run(s.model, s.ids, s.mask, basis=s.basis, embeddings=leaf, replacement=replacement)
    total = s.metric.read(trace).sum()
    gradients = torch.autograd.grad(total, [*trace.acts, leaf], allow_unused=True, materialize_grads=True)
    return _stack(trace.acts), list(gradients[:-1]), gradients[-1]


def _local(s: _Setting, rules: frozenset[str] | None) -> tuple[Tensor, Tensor]:
    """relp (with rules) and grad (without); an embedding is always compared with zero, so that relp conserves."""
    with linearized(s.model, rules if rules is not None else frozenset()):
        _, gradients, at_entry = _slopes(s, s.entry)
    return (s.clean - s.base) * _stack(gradients), (s.entry * at_entry).sum(-1)


def _along_path(s: _Setting, conductance: bool) -> tuple[Tensor, Tensor]:
    """ig and conductance: plain gradients along the straight line of embeddings."""
    nodes = torch.zeros_like(s.clean)
    mean, at_entry = torch.zeros_like(s.clean), torch.zeros_like(s.entry)
    before = s.path_start
    for step in range(1, s.steps + 1):
        entry = s.entry_base + (step / s.steps) * (s.entry - s.entry_base)
        values, gradients, slope = _slopes(s, entry)
        nodes += _stack(gradients) * (values - before)
        mean += _stack(gradients) / s.steps
        at_entry += slope / s.steps
        before = values
    embeddings = ((s.entry - s.entry_base) * at_entry).sum(-1)
    return (nodes if conductance else mean * (s.clean - s.base)), embeddings


def _layer_by_layer(s: _Setting) -> tuple[Tensor, Tensor]:
    """ig-activation: one layer moves from its values to the baseline; the embeddings are one more layer."""
    mean, at_entry = torch.zeros_like(s.clean), torch.zeros_like(s.entry)
    for step in range(s.steps):
        alpha = step / s.steps
        moved = s.clean - alpha * (s.clean - s.base)
        for layer in range(s.clean.shape[1]):

            def put(at: int, value: Tensor, layer: int = layer, moved: Tensor = moved) -> Tensor:
                return moved[:, layer].clone().requires_grad_() if at == layer else value

            mean[:, layer] += _slopes(s, s.entry, put)[1][layer] / s.steps
        at_entry += _slopes(s, s.entry - alpha * (s.entry - s.entry_base))[2] / s.steps
    return mean * (s.clean - s.base), ((s.entry - s.entry_base) * at_entry).sum(-1)


@torch.no_grad()
def _one_by_one(s: _Setting, chunk: int = 384) -> tuple[Tensor, Tensor]:
    """exact: the metric minus the metric with that one node (or that one embedding) at its baseline."""
    nodes, embeddings = torch.zeros_like(s.clean), torch.zeros(s.ids.shape, dtype=s.clean.dtype)
    whole = s.metric.read(run(s.model, s.ids, s.mask))
    for prompt in range(len(s.ids)):
        real = s.mask[prompt].nonzero()[:, 0].tolist()
        for layer in range(s.clean.shape[1]):
            places = [(pos, unit) for pos in real for unit in range(s.clean.shape[3])]
            for start in range(0, len(places), chunk):
                pos, unit = torch.tensor(places[start : start + chunk]).unbind(1)
                changed = _ablated(s, prompt, layer, pos, unit)
                nodes[prompt, layer, pos, unit] = whole[prompt] - changed
        pos = torch.tensor(real)
        embeddings[prompt, pos] = whole[prompt] - _ablated(s, prompt, -1, pos, pos)
    return nodes, embeddings


def _ablated(s: _Setting, prompt: int, layer: int, pos: Tensor, unit: Tensor) -> Tensor:
    """The metric of one prompt with, in row i, node (layer, pos[i], unit[i]) at its baseline."""
    rows = torch.arange(len(pos))
    many = torch.full_like(rows, prompt)

    def put(at: int, value: Tensor) -> Tensor:
        if at != layer:
            return value
        value = value.clone()
        value[rows, pos, unit] = s.base[prompt, layer, pos, unit]
        return value

    entry = s.entry[many].clone()
    if layer < 0:
        entry[rows, pos] = s.entry_base[prompt, pos]
    trace = run(s.model, s.ids[many], s.mask[many], basis=s.basis, embeddings=entry, replacement=put)
    return s.metric.rows(many).read(trace)


def _setting(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, metric: Metric, method: str, baseline: str, basis: str,
    steps: int, rules: frozenset[str], counterfactual: Tensor | None, mean: Tensor | None,
) -> _Setting:  # fmt: skip
    """Both ends of the differences for a method and a baseline."""
    with torch.no_grad():
        clean = _stack(run(model, ids, mask, basis=basis).acts)
        entry = embed(model, ids)
        entry_base = torch.zeros_like(entry) if counterfactual is None else embed(model, counterfactual)
        path_start = _stack(run(model, ids, mask, basis=basis, embeddings=entry_base).acts)
    if baseline == "zero":
        base = path_start if method in ("ig", "relp-ig") else torch.zeros_like(clean)
    elif baseline == "counterfactual" and counterfactual is not None:
        base = path_start
    elif baseline == "mean" and mean is not None:
        base = mean.expand_as(clean)
    else:
        raise ValueError(f"unknown or incomplete baseline {baseline!r}")
    fixed = resolve(model, ids, mask, metric)
    return _Setting(model, ids, mask, fixed, basis, steps, rules, clean, base, path_start, entry, entry_base)


def attribute(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor | None,
    metric: Metric,
    method: str = "relp",
    baseline: str = "zero",
    basis: str = "activation",
    steps: int = 10,
    rules: frozenset[str] | set[str] = ALL,
    counterfactual_ids: Tensor | None = None,
    mean_values: Tensor | None = None,
) -> Attribution:
    """Section 2: the attribution of every node and every token embedding to the metric."""
    mask = torch.ones_like(ids) if mask is None else mask
    other = counterfactual_ids if baseline == "counterfactual" else None
    s = _setting(model, ids, mask, metric, method, baseline, basis, steps, frozenset(rules), other, mean_values)
    if method in ("relp", "grad"):
        nodes, embeddings = _local(s, s.rules if method == "relp" else None)
    elif method in ("ig", "conductance"):
        nodes, embeddings = _along_path(s, method == "conductance")
    elif method == "relp-ig":
        with linearized(model, s.rules):
            nodes, embeddings = _along_path(s, False)
    elif method == "ig-activation":
        nodes, embeddings = _layer_by_layer(s)
    elif method == "exact":
        nodes, embeddings = _one_by_one(s)
    elif method == "delta":
        nodes, embeddings = (s.clean - s.base).abs(), (s.entry - s.entry_base).abs().sum(-1)
    else:
        raise ValueError(f"unknown method {method!r}")
    with torch.no_grad():
        value = s.metric.read(run(model, ids, mask))
    real = mask.bool()
    nodes = torch.where(real[:, None, :, None], nodes, torch.zeros_like(nodes))
    return Attribution(nodes, s.clean, torch.where(real, embeddings, torch.zeros_like(embeddings)), value)


def gradients(
    model: PreTrainedModel,
    ids: Tensor,
    metric: Metric,
    method: str = "relp",
    baseline: str = "zero",
    basis: str = "activation",
    steps: int = 10,
    rules: frozenset[str] | set[str] = ALL,
    counterfactual_ids: Tensor | None = None,
    mean_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Section 4: the gradient g_t at every node (path methods: the mean over steps; methods without one: RelP's), and
    every node's baseline; both [prompt, layer, position, neuron]."""
    other = counterfactual_ids if baseline == "counterfactual" else None
    mask, kept = torch.ones_like(ids), frozenset(rules)
    s = _setting(model, ids, mask, metric, method, baseline, basis, steps, kept, other, mean_values)
    if method in ("ig", "conductance", "relp-ig"):
        points = [s.entry_base + (step / steps) * (s.entry - s.entry_base) for step in range(1, steps + 1)]
        with linearized(model, kept if method == "relp-ig" else frozenset()):
            return torch.stack([_stack(_slopes(s, entry)[1]) for entry in points]).mean(0), s.base
    with linearized(model, frozenset() if method == "grad" else kept):
        return _stack(_slopes(s, s.entry)[1]), s.base


# ---------------------------------------------------------------- edges

Node = tuple[int, ...]
"""(layer, position, neuron); an embedding is (-1, position); a logit is (L, position, token) and a logit
difference (L, position, target, foil), with L the number of layers."""


@dataclass(frozen=True)
class Edges:
    """Direct weights into each target: from `neurons` [target, layer, position, neuron] and `embeddings`; and
    `from_baseline`, the same two with each source's distance from its baseline in the place of its value."""

    targets: tuple[Node, ...]
    values: Tensor
    neurons: Tensor
    embeddings: Tensor
    activations: Tensor
    from_baseline: tuple[Tensor, Tensor]

    @property
    def shares(self) -> tuple[Tensor, Tensor]:
        """`w / v_t` of neurons and embeddings."""
        return self.neurons / self.values[:, None, None, None], self.embeddings / self.values[:, None]


def _read(logits: Tensor, raw: Sequence[Tensor], target: Node) -> Tensor:
    """The scalar of a target node on a single prompt."""
    layer, pos, unit, *foil = target
    if layer < len(raw):
        return raw[layer][0, pos, unit]
    return logits[0, pos, unit] - (logits[0, pos, foil[0]] if foil else 0.0)


def edges(
    model: PreTrainedModel,
    ids: Tensor,
    targets: Sequence[Node],
    basis: str = "activation",
    rules: frozenset[str] | set[str] = ALL,
    base: Tensor | float = 0.0,
    entry_base: Tensor | float = 0.0,
) -> Edges:
    """Section 4 for one unpadded prompt [1, position]: every source of every target, one backward each. `base`
    [layer, position, neuron] and `entry_base` [position, d_model]: the sources' baselines."""
    leaf = embed(model, ids).requires_grad_()
    with linearized(model, frozenset(rules)):
        trace = run(
            model,
            ids,
            basis=basis,
            embeddings=leaf,
            replacement=lambda layer, value: value.detach().clone().requires_grad_(),
        )
    values = [_read(trace.logits, trace.raw, target) for target in targets]
    weights, inputs, moved, moved_inputs = [], [], [], []
    for value in values:
        gradients = torch.autograd.grad(
            value, [*trace.acts, leaf], retain_graph=True, allow_unused=True, materialize_grads=True
        )
        pairs = zip(trace.acts, gradients[:-1], strict=True)
        weights.append(torch.stack([(act * gradient)[0].detach() for act, gradient in pairs]))
        inputs.append((leaf * gradients[-1]).sum(-1)[0].detach())
        moved.append((_stack(trace.acts)[0] - base) * _stack(gradients[:-1])[0])
        moved_inputs.append(((leaf - entry_base) * gradients[-1]).sum(-1)[0].detach())
    return Edges(
        tuple(tuple(target) for target in targets),
        torch.stack(values).detach(),
        torch.stack(weights),
        torch.stack(inputs),
        _stack(trace.acts)[0],
        (torch.stack(moved), torch.stack(moved_inputs)),
    )


# ---------------------------------------------------------------- the same weights by intervention


@dataclass
class _Frozen:
    """What a clean run leaves for the frozen arithmetic."""

    scales: dict[nn.Module, Tensor]
    patterns: dict[nn.Module, Tensor]
    opened: dict[nn.Module, Tensor]
    deltas: dict[nn.Module, deltas.Constants]
    hidden: dict[nn.Module, Tensor]
    gates: dict[nn.Module, tuple[Tensor, Tensor | None]]
    acts: list[Tensor]
    head: Tensor


def _with_sink(part: Attention, pattern: Tensor, mixed: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A pattern of which a sink took a share that the kernel may not say: what was mixed says how much is left."""
    if not hasattr(part.module, "sinks"):
        return pattern
    value = part.value(args[0] if args else kwargs["hidden_states"]).unflatten(-1, (-1, part.head_dim))
    value = value.repeat_interleave(pattern.shape[1] // value.shape[2], dim=2)
    whole, mixed = torch.einsum("bhqk,bkhd->bhqd", pattern, value), mixed.unflatten(-1, (-1, part.head_dim))
    left = (mixed.transpose(1, 2) * whole).sum(-1) / whole.square().sum(-1)
    return pattern * left[..., None]


def _freeze(model: PreTrainedModel, ids: Tensor) -> _Frozen:
    """Record norm scales, attention patterns (eager only) and MLP inputs of a clean run."""
    kept = _Frozen({}, {}, {}, {}, {}, {}, [], torch.empty(0))
    head = _head(model)

    def norm_of(norm: nn.Module, original: Forward, x: Tensor) -> Tensor:
        kept.scales[norm] = norm_parts(norm, x)[1]
        return original(x)

    def attention_of(part: Attention, original: Forward, *args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if deltas.is_delta(part.module):
            deltas.forward(part.module, kwargs["hidden_states"], None, ALL, kept.deltas.setdefault(part.module, {}))
            return output
        kept.patterns[part.module] = _with_sink(part, output[1], mixed.pop(), *args, **kwargs)
        if part.gate is not None:
            kept.opened[part.module] = part.gate(args[0] if args else kwargs["hidden_states"])
        return output

    mixed: list[Tensor] = []

    def out_of(original: Forward, x: Tensor) -> Tensor:
        mixed[:] = [x]
        return original(x)

    def mlp_of(mlp: Mlp, original: Forward, x: Tensor) -> Tensor:
        kept.gates[mlp.module] = mlp.project(x)
        return original(x)

    def head_of(original: Forward, x: Tensor) -> Tensor:
        kept.head = original(x)
        return kept.head

    forwards: dict[nn.Module, Forward] = {head: _bind(head_of, head.forward)}
    forwards.update({norm: _bind(norm_of, norm, norm.forward) for norm in _plain_norms(model)})
    for part in attentions(model):
        forwards[part.module] = _bind(attention_of, part, part.module.forward)
        forwards[part.out] = _bind(out_of, part.out.forward)
    for mlp in mlps(model):
        forwards[mlp.module] = _bind(mlp_of, mlp, mlp.module.forward)
    with torch.no_grad(), _replaced(forwards):
        kept.acts = run(model, ids).acts
    return kept


def _bind(function: Callable[..., Any], *first: Any) -> Forward:
    return lambda *args, **kwargs: function(*first, *args, **kwargs)


def _frozen_attention(part: Attention, pattern: Tensor, opened: Tensor | None = None) -> Forward:
    """Values mixed by a fixed pattern and projected out, written with einsum."""

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        whole = part.value is None
        flat = part.fused(hidden_states)[..., part.columns] if whole else part.value(hidden_states)
        value = flat.unflatten(-1, (-1, part.head_dim))
        if part.value_norm is not None:
            value = part.value_norm(value)
        value = value.repeat_interleave(pattern.shape[1] // value.shape[2], dim=2)
        mixed = torch.einsum("bhqk,bkhd->bqhd", pattern.to(value.dtype), value).flatten(-2)
        return part.out(mixed if opened is None else mixed * opened), None

    return forward


def _frozen_delta(module: nn.Module, constants: deltas.Constants, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    return deltas.forward(module, hidden_states, None, ALL, constants)


def _frozen_norm(norm: nn.Module, scale: Tensor) -> Forward:
    def forward(x: Tensor) -> Tensor:
        linear, _, bias = norm_parts(norm, x)
        return linear * scale + (0.0 if bias is None else bias)

    return forward


def _frozen_run(
    model: PreTrainedModel, ids: Tensor, kept: _Frozen, acts: list[Tensor], entry: Tensor
) -> tuple[dict[nn.Module, tuple[Tensor, Tensor | None]], Tensor]:
    """Every MLP's pre-activations and the uncapped logits when its neurons are the given ones."""
    seen: dict[nn.Module, tuple[Tensor, Tensor | None]] = {}
    logits: list[Tensor] = []
    head = _head(model)

    def mlp_of(mlp: Mlp, act: Tensor, x: Tensor) -> Tensor:
        seen[mlp.module] = mlp.project(x)
        return mlp.down(act)

    def head_of(original: Forward, x: Tensor) -> Tensor:
        logits.append(original(x))
        return logits[-1]

    forwards: dict[nn.Module, Forward] = {head: _bind(head_of, head.forward)}
    inner = [n for n in norms(model) if n in kept.scales and not _is_query_key(model, n)]
    forwards.update({norm: _frozen_norm(norm, kept.scales[norm]) for norm in inner})
    for part in attentions(model):
        if part.module in kept.deltas:
            forwards[part.module] = _bind(_frozen_delta, part.module, kept.deltas[part.module])
        else:
            opened = kept.opened.get(part.module)
            forwards[part.module] = _frozen_attention(part, kept.patterns[part.module], opened)
    for mlp, act in zip(mlps(model), acts, strict=True):
        forwards[mlp.module] = _bind(mlp_of, mlp, act)
    forwards[model.get_input_embeddings()] = lambda tokens: entry
    mask = torch.ones_like(ids)
    with torch.no_grad(), _replaced(forwards):
        model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)
    return seen, logits[-1]


def _is_query_key(model: PreTrainedModel, norm: nn.Module) -> bool:
    """Query and key norms are never reached: the pattern is given."""
    parts = attentions(model)
    inside = (part.module.modules() for part in parts)
    read = [norm for part in parts for norm in (part.value_norm, part.latent_norm)]
    return any(norm is child for some in inside for child in some) and all(norm is not one for one in read)


def nudge(
    model: PreTrainedModel,
    ids: Tensor,
    source: Node,
    target: Node,
    epsilon: float = 1.0,
    rules: frozenset[str] = ALL,
) -> float:
    """The change of the target when the source is multiplied by 1 + epsilon, without any autograd.

    Patterns, norm scales and all other neurons stay at their values; the target's own nonlinearity is RelP's: with
    the rule ``gate`` its gate stays at its value too, and `up` alone moves.
    It should equal `epsilon * w(source -> target)`. Eager attention and the activation basis only.
    """
    kept = _freeze(model, ids)
    before = _frozen_run(model, ids, kept, kept.acts, embed(model, ids))
    entry, acts = embed(model, ids), [act.clone() for act in kept.acts]
    if source[0] < 0:
        entry[0, source[1]] *= 1.0 + epsilon
    else:
        acts[source[0]][0, source[1], source[2]] *= 1.0 + epsilon
    after = _frozen_run(model, ids, kept, acts, entry)
    layer, pos, unit, *foil = target
    if layer == len(acts):
        change, cap = scaled_logits(model, after[1] - before[1]), cap_of(model)
        if cap is not None:
            change = change * cap_ratio(scaled_logits(model, kept.head), cap)
        return float(change[0, pos, unit] - (change[0, pos, foil[0]] if foil else 0.0))
    mlp = mlps(model)[layer]
    gate, up = kept.gates[mlp.module]
    (gate_before, up_before), (gate_after, up_after) = before[0][mlp.module], after[0][mlp.module]
    factor = ratio(mlp.act, gate)
    change = factor * (gate_after - gate_before)
    if up is not None and up_before is not None and up_after is not None and "gate" in rules:
        change = mlp.act(gate) * (up_after - up_before)
    elif up is not None and up_before is not None and up_after is not None:
        change = 0.5 * (change * up + factor * gate * (up_after - up_before))
    return float(change[0, pos, unit])
