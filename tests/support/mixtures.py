"""Tiny seeded random mixtures of experts, for tests only."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import tiny
import tracer
from truth import placed

N_EXPERTS, N_USED, D_EXPERT = 8, 2, 12
FAMILIES = ("qwen3_moe", "gpt_oss")


def mixture(family: str = "qwen3_moe", *, seed: int = 0, n_layers: int = 3, **over: Any) -> tracer.Model:
    """A loaded model of 3 layers: of qwen3_moe the first is dense, the others have 8 experts of 12 neurons, of which 2
    run; of gpt_oss all have."""
    shape = {
        "vocab_size": tiny.VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "pad_token_id": tiny.PAD,
        "bos_token_id": tiny.BOS,
        "eos_token_id": tiny.EOS,
        "num_experts_per_tok": N_USED,
    }
    if family == "qwen3_moe":
        more = {"intermediate_size": 48, "moe_intermediate_size": D_EXPERT, "num_experts": N_EXPERTS}
        shape |= more | {"mlp_only_layers": [0]}
    else:
        shape |= {"intermediate_size": D_EXPERT, "num_local_experts": N_EXPERTS}
    config = AutoConfig.for_model(family, **{**shape, **over})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=draw)
        if name.endswith("norm.weight"):
            parameter.data.copy_(1 + 0.3 * noise)
        elif parameter.ndim < 2 or "bias" in name:
            parameter.data.copy_(0.3 * noise)
        else:
            parameter.data.copy_(noise if "embed" in name else 1.3 * noise * parameter.shape[-1] ** -0.5)
        parameter.requires_grad_(False)
    return tracer.load(placed(model.eval()), tokenizer=tiny.tokenizer())
