"""A tiny configuration of every family that tracer ships, and more where its options compute something else: data.

Options are set so that what a family is known for does something: windows are shorter than prompts, multipliers are not
1, heads are fewer for values than for queries. Knows names of families; what they are is model/families.py's business.
"""

from __future__ import annotations

from typing import Any

LAYERS = 3
_TOKENS: dict[str, Any] = {"vocab_size": 101, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
SIZES: dict[str, Any] = {
    **_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
OLD_SIZES: dict[str, Any] = {
    **_TOKENS,
    "n_embd": 32,
    "n_inner": 48,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 64,
}
"""The same in the words of GPT-2."""

_KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
_SLIDING: dict[str, Any] = {"sliding_window": 4, "layer_types": _KINDS}
_FULL_AT_LAST: dict[str, Any] = {"sliding_window": 4, "layer_types": [*_KINDS[:2], "full_attention"]}
_GEMMA: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 7, "final_logit_softcapping": 2.0, **_SLIDING}
_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 4,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.5,
}
_GEMMA4: dict[str, Any] = {
    "head_dim": 8,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "final_logit_softcapping": 2.0,
    "hidden_size_per_layer_input": 0,
    **_FULL_AT_LAST,
}
_GRANITE: dict[str, Any] = {
    "embedding_multiplier": 1.7,
    "residual_multiplier": 0.6,
    "logits_scaling": 2.5,
    "attention_multiplier": 0.4,
}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 7,
}
_DELTA_NETS: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
}

_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 10,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 7,
}
"""Multi-head latent attention; heads of values are of another size than those of queries."""
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
}
"""Mixtures of experts; a first layer may be dense, and a fused product of matrices in bfloat16 wants widths of 8."""
_LLAMA4: dict[str, Any] = {
    **_LOCAL,
    "num_experts_per_tok": 1,
    "intermediate_size": 16,
    "intermediate_size_mlp": 40,
    "interleave_moe_layer_step": 2,
    "head_dim": 8,
    "attention_chunk_size": 4,
    "no_rope_layers": [1, 0, 1],
}

OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {"": {}, "biases, tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}},
    "mistral": {"": {"sliding_window": 5}},
    "qwen2": {"": {}, "sliding": {"use_sliding_window": True, **_SLIDING}},
    "qwen3": {"": {"head_dim": 16}, "biases": {"attention_bias": True}},
    "gemma2": {"": {**_GEMMA, "attn_logit_softcapping": 1.5}},
    "gemma3_text": {"": _GEMMA},
    "olmo2": {"": {}},
    "phi3": {"": {"partial_rotary_factor": 0.5, "original_max_position_embeddings": 64}},
    "gpt_neox": {"": {"rotary_pct": 0.5}, "sequential": {"rotary_pct": 0.5, "use_parallel_residual": False}},
    "gpt2": {"": OLD_SIZES},
    "falcon": {
        "": {"ffn_hidden_size": 48, "bias": True},
        "new decoder": {"ffn_hidden_size": 48, "new_decoder_architecture": True, "num_kv_heads": 2},
        "sequential": {"ffn_hidden_size": 48, "parallel_attn": False, "multi_query": False},
    },
    "cohere2": {"": {"logit_scale": 0.25, **_SLIDING}},
    "glm": {"": {"head_dim": 8}},
    "glm4": {"": {"head_dim": 16}},
    "ministral": {"": {"head_dim": 16, **_SLIDING}},
    "ministral3": {"": {"head_dim": 8, "rope_parameters": _YARN}},
    "nemotron": {"": {"partial_rotary_factor": 0.5}},
    "exaone4": {"": _SLIDING},
    "seed_oss": {"": {"head_dim": 16}},
    "hunyuan_v1_dense": {"": {"head_dim": 8}},
    "ernie4_5": {"": {"head_dim": 16}, "biases": {"head_dim": 16, "use_bias": True}},
    "gemma4_text": {"": _GEMMA4},
    "gpt_bigcode": {"": OLD_SIZES},
    "gptj": {"": {**OLD_SIZES, "rotary_dim": 4}},
    "smollm3": {"": {"no_rope_layer_interval": 2}},
    "olmo": {"": {}},
    "olmo3": {"": _SLIDING},
    "gemma": {"": {"head_dim": 16}},
    "granite": {"": _GRANITE},
    "helium": {"": {"head_dim": 8}},
    "arcee": {"": {}},
    "apertus": {"": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}},
    "starcoder2": {"": {}},
    "stablelm": {
        "": {"partial_rotary_factor": 0.5},
        "parallel, norms": {"use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True},
    },
    "cohere": {"": {"logit_scale": 0.3}, "norms": {"logit_scale": 0.3, "use_qk_norm": True}},
    "mixtral": {"": _LOCAL},
    "qwen2_moe": {"": {**_EXPERTS, "shared_expert_intermediate_size": 24}},
    "qwen3_moe": {"": {**_EXPERTS, "head_dim": 16, "mlp_only_layers": [1], "norm_topk_prob": True}},
    "olmoe": {"": {**_EXPERTS, "intermediate_size": 16}},
    "gpt_oss": {"": {**_LOCAL, "intermediate_size": 16, "head_dim": 16, "swiglu_limit": 1.0, **_SLIDING}},
    "glm4_moe": {
        "": {**_ROUTED, "head_dim": 16},
        "norms": {**_ROUTED, "head_dim": 16, "use_qk_norm": True, "attention_bias": True},
    },
    "deepseek_v2": {
        "": {**_ROUTED, **_LATENT, "topk_method": "group_limited_greedy"},
        "queries without a latent": {**_ROUTED, **_LATENT, "q_lora_rank": None, "topk_method": "greedy"},
    },
    "deepseek_v3": {"": {**_ROUTED, **_LATENT}},
    "llama4_text": {"": _LLAMA4},
    "phi": {"": {"partial_rotary_factor": 0.5}, "norms": {"qk_layernorm": True}},
    "youtu": {"": {**_LATENT, "q_lora_rank": 10}, "queries of one map": {**_LATENT, "q_lora_rank": None}},
    "granite_swa": {"": {**_GRANITE, **_SLIDING, "layer_rope_theta": [10000.0, 0, 10000.0]}},
    "minicpm3": {"": {**_LATENT, "q_lora_rank": 10, "scale_emb": 1.7, "scale_depth": 1.1, "dim_model_base": 20}},
    "qwen3_5_text": {
        "": {"head_dim": 16, **_DELTA_NETS},
        "attention alone": {"head_dim": 16, "layer_types": ["full_attention"] * 3},
    },
    "olmo_hybrid": {"": {**_DELTA_NETS, "linear_allow_neg_eigval": True}},
}
"""By family, then by what is special about it; the first is named by the family alone."""


def configurations(family: str) -> dict[str, Any]:
    """The tiny configurations of a family, by name: its own, then its own with what is special in brackets."""
    from transformers import AutoConfig

    found = {}
    for special, options in OPTIONS[family].items():
        sizes = {} if "n_embd" in options else SIZES
        name = f"{family} ({special})" if special else family
        found[name] = AutoConfig.for_model(family, **{**sizes, **options})
    return found
