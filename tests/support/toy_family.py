"""A family that is not in the package, as a package of someone else's would have it: configuration, model, and what
registers it. Its norms and activation are of classes that tracer does not know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import tracer
from tracer import Family, Layout, Step, Weight, Wiring


class ToyConfig(LlamaConfig):
    model_type = "toy_outside"


class ToyRMSNorm(LlamaRMSNorm):
    """A norm of a class of its own."""


class ToyAct(nn.Module):
    """An activation of its own: z times a sigmoid that is twice as steep."""

    def forward(self, z: Tensor) -> Tensor:
        return z * torch.sigmoid(2.0 * z)


class ToyForCausalLM(LlamaForCausalLM):
    config_class: Any = ToyConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        blocks: Any = self.model.layers
        for block in blocks:
            block.mlp.act_fn = ToyAct()
            block.input_layernorm = ToyRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


def factor(z: Tensor) -> Tensor:
    """act(z) / z."""
    return torch.sigmoid(2.0 * z)


def family(**over: Any) -> Family:
    """Where the parts are, as its author writes it."""
    steps = (
        Step("rms_norm", "input_layernorm"),
        Step("attention", "self_attn"),
        Step("rms_norm", "post_attention_layernorm"),
        Step("activation", "mlp.act_fn"),
        Step("gate", "mlp.act_fn"),
        Step("product", "mlp.down_proj"),
        Step("neurons", "mlp.down_proj"),
    )
    wiring = Wiring(
        attention_in="input_layernorm",
        attention_out=None,
        mlp_in="post_attention_layernorm",
        mlp_out=None,
        value=Weight("self_attn.v_proj"),
        output=Weight("self_attn.o_proj"),
        gate=Weight("mlp.gate_proj"),
        up=Weight("mlp.up_proj"),
    )
    given: dict[str, Any] = {
        "name": "toy_outside",
        "embedding": "model.embed_tokens",
        "blocks": "model.layers",
        "final_norm": Step("rms_norm", "model.norm"),
        "layouts": (Layout(steps, wiring),),
    }
    return Family(**(given | over))


def config(**over: Any) -> ToyConfig:
    sizes: dict[str, Any] = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return ToyConfig(**(sizes | heads | over))


def known_to_transformers() -> None:
    AutoConfig.register("toy_outside", ToyConfig, exist_ok=True)
    AutoModelForCausalLM.register(ToyConfig, ToyForCausalLM, exist_ok=True)


def register() -> None:
    """The entry point of the package that the toy would come in."""
    known_to_transformers()
    tracer.register_family(family(), norms={"rms_norm": [ToyRMSNorm]}, activations={ToyAct: factor})
