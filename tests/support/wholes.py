"""Tiny seeded random models that take images or sound beside text, of every type whose text part is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel
from transformers.models.auto import modeling_auto

import tiny as t
from truth import placed

NAMES: dict[str, str] = {
    **modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    **modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    "audioflamingo3": "AudioFlamingo3ForConditionalGeneration",
    "musicflamingo": "MusicFlamingoForConditionalGeneration",
}
"""Every type for text and more that transformers has, and its class."""
_TOWER: dict[str, Any] = {
    **dict.fromkeys(("num_hidden_layers", "depth", "encoder_layers", "num_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads", "n_window", "n_window_infer"), 2),
    **dict.fromkeys(("hidden_size", "embed_dim", "intermediate_size", "encoder_ffn_dim", "d_model", "hidden_dim"), 16),
    **dict.fromkeys(("encoder_hidden_size", "projector_input_dim", "mlp_dim", "n_filters", "num_filters"), 16),
    **dict.fromkeys(("num_position_embeddings", "max_source_positions", "output_channels"), 16),
    **dict.fromkeys(("downsample_hidden_size", "num_embeddings", "base_channels"), 32),
    **dict.fromkeys(("out_hidden_size", "output_dim", "vision_output_dim", "projector_output_dim"), 32),
    **{key: [0] for key in ("fullatt_block_indexes", "deepstack_visual_indexes")},
    "image_size": 28,
    "patch_size": 14,
    "position_embedding_size": 64,
    "vision_soft_tokens_per_image": 4,
    "num_mel_bins": 8,
    "channel_ratios": [1],
    "downsampling_ratios": [2],
    "depths": [1, 1],
    "model_args": {"embed_dim": 16},
    "vocab_size": t.VOCAB,
}
_TEXT: dict[str, Any] = {
    **dict.fromkeys(("head_dim", "global_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("num_attention_heads", "n_routed_experts", "num_experts", "num_local_experts"), 4),
    **dict.fromkeys(("num_hidden_layers", "num_key_value_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), t.VOCAB),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    "hidden_size": 32,
    "moe_intermediate_size": 16,
    "max_position_embeddings": 64,
    "pad_token_id": t.PAD,
    "bos_token_id": t.BOS,
    "eos_token_id": t.EOS,
}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
}
_ROPE: dict[str, dict[str, Any]] = {
    "glm4v_text": {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5},
    "glm4v_moe_text": {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5},
    "glm_ocr_text": {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5},
    "qwen3_omni_moe_text": {"mrope_section": [2, 1, 1], "mrope_interleaved": True},
    "qwen2_vl_text": {"mrope_section": [1, 1, 2]},
    "qwen2_5_vl_text": {"mrope_section": [1, 1, 2]},
    "qwen2_5_omni_text": {"mrope_section": [1, 1, 2]},
    "qwen3_5_text": {"mrope_section": [1, 1, 0], "mrope_interleaved": True, "partial_rotary_factor": 0.5},
    "qwen3_vl_text": {"mrope_section": [2, 1, 1], "mrope_interleaved": True},
}
_WITHOUT_TIMM = ("fast_vlm", "perception_lm")


def config(kind: str, text: str | None = None, *, tied: bool = False, **options: Any) -> Any:
    """A small configuration. `text`: the type of the text part, if not the usual; `options`: of the text part."""
    parts: dict[str, Any] = {}
    made: Any = CONFIG_MAPPING[kind]
    for name in made.sub_configs:
        if (part := getattr(made(), name)) is None:
            continue
        chosen, sizes = (part, _TOWER) if name != "text_config" else (CONFIG_MAPPING[text or part.model_type](), _TEXT)
        known = {*chosen.to_dict(), *chosen.attribute_map}
        parts[name] = {key: size for key, size in sizes.items() if key in known} | {"model_type": chosen.model_type}
        if "kv_lora_rank" in parts[name]:  # every head has keys of its own
            parts[name]["num_key_value_heads"] = _TEXT["num_attention_heads"]
        if "linear_num_key_heads" in known and name == "text_config":
            parts[name] |= {"layer_types": ["linear_attention", "full_attention"], **_DELTA}
        if name == "text_config":
            if more := _ROPE.get(chosen.model_type):
                parts[name]["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, **more}
            parts[name] |= options
        if name == "adaptor_config":
            parts[name] |= {"hidden_size": 32, "intermediate_size": 8}
    sizes = {key: _TEXT[key] for key in ("hidden_size", "vocab_size") if kind == "ovis2"}
    whole = made(**parts, **sizes, tie_word_embeddings=tied)
    whole._attn_implementation = "eager"
    return whole


@contextmanager
def towers(kind: str) -> Iterator[None]:
    """Where a type's tower needs a package that is not here (timm), in the place of it one that is a linear map."""
    with pytest.MonkeyPatch.context() as patch:
        if kind in _WITHOUT_TIMM:
            own = AutoModel.from_config
            patch.setattr(
                AutoModel,
                "from_config",
                lambda given, **more: nn.Linear(2, 2) if "timm" in given.model_type else own(given, **more),
            )
        yield


def whole(kind: str, text: str | None = None, *, tied: bool = False, **options: Any) -> Any:
    """A small random model with its towers; see `config`."""
    with torch.random.fork_rng(), towers(kind):
        torch.manual_seed(0)
        model: Any = getattr(transformers, NAMES[kind])(config(kind, text, tied=tied, **options))
    draw = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=draw)
        if value.ndim < 2 or "embed_tokens" in name:
            value.data.copy_(0.3 * noise + (value.ndim == 1 and not name.endswith("bias")))
        else:
            value.data.copy_(1.3 * noise * value.shape[-1] ** -0.5)
    return placed(model.eval().requires_grad_(False))
