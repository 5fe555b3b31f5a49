"""A Hugging Face model made of a GGUF file: its configuration, and its weights as floats.

Both are made by transformers' own tables (names of metadata and of tensors, the order of llama's query and key rows,
Gemma's norms, GPT-2's transposed maps), and the blocks are dequantised by llama.cpp's package gguf. transformers' own
loader is not called: it reads the vocabulary four times over, fetches a hub's kernels where it can, and leaves out
without a word what it does not know. Here that is an error where it would change numbers, and said elsewhere.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tracer.errors import ModelError, quoted
from tracer.model.gguf import Header

READ: dict[str, str] = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
    "gpt2": "gpt2",
}
"""GGUF's architectures that both transformers' tables and the rules cover, and their model types."""
_UNCHANGED = frozenset(
    """attention.value_length rope.scaling.type rope.scaling.factor rope.scaling.original_context_length
    rope.scaling.finetuned attention.scale final_logit_softcapping attn_logit_softcapping attention.sliding_window
    attention.key_length rope.dimension_count rope.freq_base rope.freq_base_swa attention.causal vocab_size
    attention.head_count_kv feed_forward_length context_length expert_count expert_used_count""".split()
)
"""Metadata that is compared with the configuration, or has no effect on it."""
_OPTIONAL = frozenset(("vocab_size", "rope.dimension_count", "rope.freq_base", "attention.head_count_kv"))
"""Metadata that a file may leave out, since what is meant then is known."""


def configuration(header: Header) -> Any:
    """The file's configuration, as a new object.

    Raises:
        ModelError: an architecture that is not read, metadata that is missing or of another kind, or metadata that
            says something which transformers' configuration of that type would not do.
    """
    from transformers import AutoConfig
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    kind = READ.get(header.architecture)
    if kind is None:
        rule = f"is of the architecture {quoted(header.architecture)}, which is not read from GGUF"
        step = f"give its safetensors folder or id; read from GGUF are {', '.join(READ)}"
        raise ModelError(header.name, rule, step)
    made: dict[str, Any] = {"model_type": kind, "tie_word_embeddings": not _has(header, "output.weight")}
    for key, name in GGUF_CONFIG_MAPPING[header.architecture].items():
        value = _number(header, f"{header.architecture}.{key}")
        if value is not None and name is not None:
            made[name] = value
        elif value is None and key not in _OPTIONAL:
            raise ModelError(header.name, f"its metadata has no {header.architecture}.{key}", "convert the model again")
    for key, name in GGUF_CONFIG_MAPPING["tokenizer"].items():
        if (value := _number(header, f"tokenizer.{key}")) is not None:
            made[name] = value
    config = AutoConfig.for_model(**(made | _left_out(header, made)))
    for key, given, does in _differences(header, config):
        rule = f"its metadata has {header.architecture}.{key}={quoted(given)}, transformers has {does} there"
        raise ModelError(header.name, rule, "give the safetensors folder or id that it was made from")
    return config


def unread(header: Header) -> tuple[str, ...]:
    """A sentence where metadata of the architecture is neither used nor known to have no effect."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    known = _UNCHANGED | GGUF_CONFIG_MAPPING[header.architecture].keys()
    keys = [key for key in header.values if key.startswith(f"{header.architecture}.")]
    if left := [key for key in keys if key.partition(".")[2] not in known]:
        values = ", ".join(f"{key}={quoted(header.values[key])}" for key in left)
        return (f"{header.name} also says {values}, which is not used",)
    return ()


def weights(header: Header, config: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights by their names in the Hugging Face model, dequantised in float32 and then of `dtype`, one at a time.

    Raises:
        ModelError: the architecture has no place for a tensor of the file.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    heads = ("num_attention_heads", "num_key_value_heads")
    processor: Any = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(
        config={name: getattr(config, name, None) for name in heads}
    )
    places = get_gguf_hf_weights_map(empty(config), processor)
    _check_places(header, places)
    state: dict[str, Tensor] = {}
    with header.path.open("rb") as content, mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for tensor in header.tensors:
            rows = math.prod(tensor.shape[:-1])
            # A copy: a view of the file may not outlive it.
            held = np.frombuffer(data, np.uint8, tensor.size, tensor.start).reshape(rows, -1).copy()
            values = dequantize(held, GGMLQuantizationType(tensor.kind)).reshape(tensor.shape)
            put = {"tensors": state}  # GPT-2's head is put there by the processor itself
            made = processor.process(weights=values, name=tensor.name, tensor_key_mapping=places, parsed_parameters=put)
            if made.name is not None:
                state[places[made.name]] = torch.from_numpy(np.ascontiguousarray(made.weights)).to(dtype)
    return {name: value.to(dtype) for name, value in state.items()}


def empty(config: Any) -> nn.Module:
    """The model without weights, on torch's meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _check_places(header: Header, places: Mapping[str, str]) -> None:
    """Refuse tensors that would be left out, before any is read."""
    left = [tensor.name for tensor in header.tensors if tensor.name not in places]
    if not left:
        return
    rule = f"its architecture has no place for {len(left)} tensors of the file, first {', '.join(left[:3])}"
    if any(name.startswith("rope_") for name in left):
        rule += ": rotary frequencies that were scaled, which transformers does not read from GGUF"
    raise ModelError(header.name, rule, "give the safetensors folder or id that it was made from")


def _left_out(header: Header, made: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers' table leaves to the defaults of its configurations, and the file says."""
    given: dict[str, Any] = {}
    if "vocab_size" not in made:
        given["vocab_size"] = _number(header, "tokenizer.ggml.tokens")
    if header.architecture == "gpt2":
        given["n_positions"] = _number(header, "gpt2.context_length")
        given["n_inner"] = _number(header, "gpt2.feed_forward_length")
    else:
        if "num_key_value_heads" not in made:
            given["num_key_value_heads"] = made["num_attention_heads"]
        given["head_dim"] = _number(header, f"{header.architecture}.attention.key_length")
    return {name: value for name, value in given.items() if value is not None}


def _differences(header: Header, config: Any) -> Iterator[tuple[str, Any, Any]]:
    """Metadata by which llama.cpp would compute otherwise than the configuration: key, value, what that has."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotary = getattr(config, "rope_parameters", None) or {}
    window = getattr(config, "sliding_window", None)
    does: dict[str, tuple[Any, ...]] = {
        "rope.scaling.type": ("none",),
        "rope.scaling.factor": (1, 0),
        "expert_count": (0,),
        "attention.causal": (True,),
        "attention.sliding_window": (window, 0),
        "attention.value_length": (head,),
        "attention.scale": (getattr(config, "query_pre_attn_scalar", head) ** -0.5,),
        "final_logit_softcapping": (getattr(config, "final_logit_softcapping", None),),
        "attn_logit_softcapping": (getattr(config, "attn_logit_softcapping", None),),
        "rope.dimension_count": (int(head * (rotary.get("partial_rotary_factor") or 1)),),
        "rope.freq_base_swa": (rotary.get("sliding_attention", rotary).get("rope_theta"),),
    }
    for key, same in does.items():
        given = header.values.get(f"{header.architecture}.{key}")
        beyond = key == "attention.sliding_window" and given is not None and given >= config.max_position_embeddings
        if given is not None and not beyond and not any(_equal(given, value) for value in same):
            yield key, given, same[0]
    # llama.cpp scales attention by the head's width, but that of 27B, whose scale no metadata names.
    if (scale := getattr(config, "query_pre_attn_scalar", head)) != head:
        yield "attention.key_length", head, f"attention scaled by 1 / sqrt({scale})"


def _equal(given: Any, value: Any) -> bool:
    if isinstance(given, float) and isinstance(value, int | float):
        return math.isclose(given, value, rel_tol=1e-6)
    return given == value


def _has(header: Header, name: str) -> bool:
    return any(tensor.name == name for tensor in header.tensors)


def _number(header: Header, key: str) -> Any:
    """A number of the metadata; None where there is none.

    Raises:
        ModelError: it is no number, as where layers differ from each other.
    """
    value = header.values.get(key)
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    rule = f"its metadata has {key}={quoted(value)}, not one number"
    raise ModelError(header.name, rule, "use a model whose layers are alike")
