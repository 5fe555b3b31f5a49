"""GGUF files of tiny models, written as llama.cpp's converter writes them: names, order and metadata spelled out here,
apart from transformers' tables and tracer's code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf.quants import quantize
from transformers import PreTrainedModel

import tiny as t

WORDS = ("The", " keys", " key", " near", " the", " cabinet", " are", " is")
SPECIAL = ("<unk>", "<bos>", "<eos>", "<pad>")
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2")

_INSIDE = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
}
_LLAMA = _INSIDE | {"post_attention_layernorm": "ffn_norm"}
_GEMMA = _INSIDE | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_GPT2 = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_OUTSIDE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
}


def tiny(architecture: str, **over: Any) -> PreTrainedModel:
    """A tiny model that a GGUF file can say: its tokens are `tokens`', and nothing is what llama.cpp would not do."""
    plain: dict[str, Any] = {"vocab_size": len(tokens(architecture)[0])}
    if architecture.startswith("gemma"):
        # Attention is scaled by the head's width; the rest are the types' own.
        caps = {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}
        n_layers, period = over.get("n_layers", 3), 2 if architecture == "gemma2" else 6
        kinds = ["full_attention" if (layer + 1) % period == 0 else "sliding_attention" for layer in range(n_layers)]
        plain |= {"head_dim": 256, "query_pre_attn_scalar": 256, "layer_types": kinds}
        plain |= caps if architecture == "gemma2" else dict.fromkeys(caps)
    if architecture == "phi3":
        plain |= {"partial_rotary_factor": 1.0}
    return t.tiny(architecture, **(plain | over))


def tokens(architecture: str) -> tuple[list[str], list[str]]:
    """A vocabulary whose words merge letter by letter, and these merges."""
    space = "▁" if architecture.startswith("gemma") else "Ġ"
    found, merges = [*SPECIAL, space, *"abcdefghijklmnopqrstuvwxyzT"], list[str]()
    for word in WORDS:
        spelled = word.replace(" ", space)
        for end in range(2, len(spelled) + 1):
            if spelled[:end] not in found:
                found.append(spelled[:end])
                merges.append(f"{spelled[: end - 1]} {spelled[end - 1]}")
    return found, merges


def write(
    model: PreTrainedModel,
    path: Path,
    architecture: str,
    kind: Type = Type.F32,
    blocks: Mapping[str, np.ndarray] | None = None,
    change: Callable[[gguf.GGUFWriter], Any] = lambda writer: None,
) -> dict[str, np.ndarray]:
    """Write a model and give back, by the file's names, the bytes of each tensor as they are in the file.

    Args:
        kind: of all maps and embeddings whose rows it can hold; the others, norms and biases are F32.
        blocks: by Hugging Face name, raw bytes of `kind` for tensors that are not to be quantised from the model's.
        change: is given the writer after the metadata.
    """
    writer = gguf.GGUFWriter(path, architecture)
    _metadata(writer, model.config, architecture)
    change(writer)
    written: dict[str, np.ndarray] = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        where, array = place(name, architecture), turned(name, value.float().numpy(), architecture, model.config)
        if blocks is not None and name in blocks:
            array, used = blocks[name], kind
        else:
            fits = array.ndim == 2 and array.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
            used = kind if fits else Type.F32
            array = quantize(array, used)
        writer.add_tensor(where, array, raw_dtype=used)
        written[where] = array
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def place(name: str, architecture: str) -> str:
    """The name of a weight in the file."""
    inside = _GPT2 if architecture == "gpt2" else _GEMMA if architecture.startswith("gemma") else _LLAMA
    stem, _, kind = name.rpartition(".")
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3) if not stem.startswith("transformer") else ("", *stem.split(".", 3)[1:])
    return f"blk.{layer}.{inside[part]}.{kind}"


def turned(name: str, value: np.ndarray, architecture: str, config: Any) -> np.ndarray:
    """A weight as llama.cpp has it: rows of queries and keys in pairs, norms of Gemma with their 1, maps of GPT-2 as
    linear maps."""
    if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        return value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return value + 1
    if architecture == "gpt2" and value.ndim == 2 and ".h." in name:
        return np.ascontiguousarray(value.T)
    return value


def _metadata(writer: gguf.GGUFWriter, config: Any, architecture: str) -> None:
    writer.add_type("model")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if architecture == "gpt2":
        writer.add_feed_forward_length(config.n_inner)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_head_count_kv(config.num_key_value_heads)
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        writer.add_key_length(head)
        writer.add_value_length(head)
        rotary = config.rope_parameters
        writer.add_rope_freq_base(rotary.get("full_attention", rotary)["rope_theta"])
    if architecture.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    _tokenizer(writer, architecture)


def _tokenizer(writer: gguf.GGUFWriter, architecture: str) -> None:
    found, merges = tokens(architecture)
    gemma = architecture.startswith("gemma")
    writer.add_tokenizer_model("llama" if gemma else "gpt2")
    writer.add_token_list(found)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in found])
    if gemma:
        writer.add_token_scores([0.0] * len(found))
    else:
        writer.add_token_merges(merges)
    writer.add_bos_token_id(t.BOS)
    writer.add_eos_token_id(t.EOS)
    writer.add_unk_token_id(t.UNK)
    writer.add_pad_token_id(t.PAD)
