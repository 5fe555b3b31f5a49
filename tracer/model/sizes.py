"""What memory depends on in a model, read from its config: widths, counts and exact bytes of its weights.

The module is built on torch's meta device, where weights have a shape and no memory. Refuses to know what is computed
on it (runs/plan/memory.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tracer.errors import ModelError, quoted
from tracer.model import folder, quantised
from tracer.model import model as loading
from tracer.model.families import ROTARY, Layout, family_of, inputs_of, value_heads
from tracer.model.model import DTYPES, QUANTIZED, Model

# Tensors of a neuron's width that an activation saves for its own backward, beside its result.
_SAVED_BY_ACTIVATION = {
    "NewGELUActivation": 4,
    "AccurateGELUActivation": 4,
    "FastGELUActivation": 7,
    "QuickGELUActivation": 2,
    "XIELUActivation": 4,
    "ReLU": 0,
    "LinearActivation": 0,
    "clamped": 4,
}
_BITS = {"int8": 8, "nf4": 4, "fp4": 4}


@dataclass(frozen=True)
class Shape:
    """What memory depends on in a model. Sizes are in bytes.

    Attributes:
        name, family: of the model.
        d_mlp: neurons that run at a token, in the layer where most do. numbered: that a layer has numbers for: more, in
            a mixture. routed: experts that a token goes to, 0 without any.
        value_width: coordinates of all value heads together. attention_width: of all heads.
        itemsize: of an activation. weight_bytes: of all weights. block_bytes: of the largest block.
        outer_bytes: of embedding, head and final norm. checkpoint_bytes: read beside the weights while these are
            converted to another dtype, or dequantised; 0 where they are not.
        attention: the kernel that it runs by default.
        gated: whether an MLP has a gate. saved_by_activation: tensors of the neurons' width its backward needs.
        norms: around one block. norm_itemsize: of what the backward of one saves. qk_norms: of queries and keys.
        soft_cap: of the attention scores. window: of sliding attention, in tokens.
        fused_values: whether values are a part of the tensor that queries and keys were rotated out of.
        replays: whether edges come from the replay (float weights in memory).
    """

    name: str
    family: str
    n_layers: int
    d_model: int
    d_mlp: int
    numbered: int
    routed: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    itemsize: int
    weight_bytes: int
    block_bytes: int
    outer_bytes: int
    checkpoint_bytes: int
    attention: str
    gated: bool
    saved_by_activation: int
    norms: int
    norm_itemsize: int
    qk_norms: bool
    soft_cap: bool
    window: int | None
    fused_values: bool
    replays: bool

    @property
    def attention_width(self) -> int:
        return self.head_dim * self.n_heads

    @property
    def value_width(self) -> int:
        return self.head_dim * self.n_kv_heads

    @property
    def largest_module_bytes(self) -> int:
        """What must be on one device: a block, or embedding and head."""
        return max(self.block_bytes, self.outer_bytes)

    def n_neurons(self, basis: str) -> int:
        """Nodes of a layer at one position."""
        return self.d_mlp if basis == "activation" else self.d_model

    def n_numbered(self, basis: str) -> int:
        """Numbers that nodes of a layer have: of experts that did not run too."""
        return self.numbered if basis == "activation" else self.d_model

    def bytes_per_token(self, gradient: bool = True, length: int = 1024) -> int:
        """As `Model.bytes_per_token`, by which batches are split."""
        sizes = loading.Sizes(
            self.n_layers, self.d_model, self.d_mlp, self.numbered, self.routed, self.vocab_size, self.itemsize
        )
        return loading.bytes_per_token(sizes, self.n_heads * min(self.context_length, length), gradient)

    @classmethod
    def of(
        cls,
        name: str,
        revision: str | None = None,
        dtype: str = "float32",
        attention: str | None = None,
        gguf_file: str | None = None,
    ) -> Shape:
        """The shape of a model that is not loaded: its config is read (or downloaded), its weights are not.

        Weights of a GGUF file count as what they are once they are dequantised to `dtype`.

        Raises:
            ModelError: no such model, an architecture without rules, or an unknown dtype.
        """
        from transformers import AutoModelForCausalLM

        if dtype not in (*DTYPES, *QUANTIZED):
            known = ", ".join((*DTYPES, *QUANTIZED))
            raise ModelError(f"dtype={quoted(dtype)}", f"must be one of {known}", "choose one")
        source = folder.find(name, revision, weights=False, gguf_file=gguf_file)
        if source.gguf is not None:
            loading.check_dequantised(source, dtype)
        options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
        with folder.building(source.where):
            config = loading.configuration(source)
            quantised.prepare(config, source.shown, DTYPES.get(dtype, dtype))
            stored = getattr(config, "dtype", None) or torch.float32  # building on the config changes it
            loading.check_architecture(config, attention)
            options |= {"dtype": DTYPES.get(dtype, torch.bfloat16), "trust_remote_code": False}
            with torch.device("meta"):
                module = AutoModelForCausalLM.from_config(config, **options)
            stored = getattr(torch, stored) if isinstance(stored, str) else stored
            bits, converted = _bits(config, dtype), dtype in QUANTIZED or DTYPES[dtype] != stored
            sizes = [value.numel() for value in module.parameters()]
            read = sum(sizes) * stored.itemsize if converted else 0
            if source.gguf is not None:
                read = max(sizes) * torch.float32.itemsize  # each tensor is dequantised in float32
            return _shape(module, name, bits, read)

    @classmethod
    def of_model(cls, model: Model) -> Shape:
        """The shape of a loaded model."""
        return _shape(model.module, model.name, None, 0, model.weights_readable)


def _shape(module: Any, name: str, bits: int | None, checkpoint: int, replays: bool = True) -> Shape:
    """Read a module, on the meta device or loaded. `bits`: of its blocks' linear weights, if they will be quantised."""
    config, family = module.config, family_of(module, module.config)
    blocks = list(module.get_submodule(family.blocks))
    sizes = [_bytes(block, bits) for block in blocks]
    inside = sum(_bytes(block, None) for block in blocks)
    outer = _bytes(module, None) - inside
    laid_out, heads = list(zip(blocks, family.laid_out(module), strict=True)), int(config.num_attention_heads)
    each = [_mlp(block, laid) for block, laid in laid_out]
    widest = max(each, key=lambda one: one.running)
    layout = widest.layout
    norms = [step for step in layout.steps if step.kind in ("rms_norm", "layer_norm")]
    around = [step for step in norms if step.path in layout.wiring.norms]
    before, d_model = blocks[0].get_submodule(around[0].path), int(config.hidden_size)
    written_out = around[0].kind == "layer_norm" and hasattr(before, "variance_epsilon")  # centres twice
    rotary = any(ROTARY in type(part).__name__ for part in module.modules())
    return Shape(
        name=name,
        family=family.name,
        n_layers=len(blocks),
        d_model=d_model,
        **_widths(each, widest),
        n_heads=heads,
        n_kv_heads=max(value_heads(block, one, heads) for block, one in laid_out),
        head_dim=max(inputs_of(block.get_submodule(one.wiring.output.path)) // heads for block, one in laid_out),
        vocab_size=int(config.vocab_size),
        context_length=int(config.max_position_embeddings),
        itemsize=module.dtype.itemsize,
        weight_bytes=sum(sizes) + outer,
        block_bytes=max(sizes),
        outer_bytes=outer,
        checkpoint_bytes=checkpoint,
        attention="eager" if config._attn_implementation == "eager" else "sdpa",
        norms=len(around),
        norm_itemsize=(module.dtype.itemsize if isinstance(before, nn.LayerNorm) else 4) * (2 if written_out else 1),
        qk_norms=len(norms) > len(around),
        soft_cap=bool(getattr(config, "attn_logit_softcapping", None)),
        window=_window(config),
        fused_values=layout.wiring.value is not None and layout.wiring.value.part != "all" and rotary,
        replays=replays and bits is None and all(one.replayed for _, one in laid_out),
    )


@dataclass(frozen=True)
class _Mlp:
    """The MLP of one block, or its mixture: what `Shape` says of it."""

    layout: Layout
    running: int
    numbered: int
    routed: int
    gated: bool
    saved_by_activation: int


def _widths(each: Sequence[_Mlp], widest: _Mlp) -> dict[str, Any]:
    """What `Shape` says of all blocks' MLPs."""
    numbered, routed = max(one.numbered for one in each), max(one.routed for one in each)
    found = {"d_mlp": widest.running, "numbered": numbered, "routed": routed}
    return found | {"gated": widest.gated, "saved_by_activation": widest.saved_by_activation}


def _mlp(block: nn.Module, layout: Layout) -> _Mlp:
    if layout.experts is not None:
        one = loading.experts_in(block, layout)
        saved = _SAVED_BY_ACTIVATION.get(layout.experts.gating, 1)
        return _Mlp(layout, one.n_running, one.n_neurons, one.n_used, True, saved)
    width, act = loading.width_of(block, layout), type(block.get_submodule(layout.path("activation"))).__name__
    return _Mlp(layout, width, width, 0, layout.wiring.gate is not None, _SAVED_BY_ACTIVATION.get(act, 1))


def _bits(config: Any, dtype: str) -> int | None:
    """Bits of a linear weight, where the dtype or the checkpoint itself is quantised; else None."""
    given = getattr(config, "quantization_config", None) or {}
    given = given if isinstance(given, dict) else given.to_dict()
    if given.get("load_in_4bit") or given.get("load_in_8bit"):
        return 4 if given.get("load_in_4bit") else 8
    return _BITS.get(dtype)


def _window(config: Any) -> int | None:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    return getattr(config, "sliding_window", None)


def _bytes(module: nn.Module, bits: int | None) -> int:
    """Bytes of all weights; those of linear maps at `bits` each, if given (without their scales, a few percent)."""
    linear = {id(part.weight) for part in module.modules() if type(part).__name__ in ("Linear", "Conv1D")}
    return sum(
        value.numel() * bits // 8 if bits and id(value) in linear else value.numel() * value.element_size()
        for value in module.parameters()
    )
