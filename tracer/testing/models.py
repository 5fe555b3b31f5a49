"""Tiny random models of any configuration, with weights at a scale where everything in them matters.

Knows nothing of families. A fresh model of transformers' own initialisation has uniform attention and activations near
zero, on which a wrong rule hardly shows.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tracer.errors import ModelError, first_line

MOST_PARAMETERS = 20_000_000
"""A model of more is no tiny one: the checks take gradients to all its neurons at once."""
SPECIAL = ("<unk>", "<bos>", "<eos>", "<pad>")


def random_model(config: Any, *, seed: int = 0, attention: str = "eager", dtype: torch.dtype = torch.float32) -> Any:
    """A model in evaluation mode, the same for the same seed, whatever its attention kernel.

    Args:
        config: of transformers; it is copied.

    Raises:
        ModelError: transformers cannot make a language model of it, or it is too large.
    """
    config, value = deepcopy(config), f"a configuration of type {getattr(config, 'model_type', None)!r}"
    _without_foreign_tokens(config.get_text_config())
    try:
        with torch.device("meta"):
            size = sum(part.numel() for part in AutoModelForCausalLM.from_config(config).parameters())
        if size > MOST_PARAMETERS:
            step = "give one with few layers, small widths and a small vocabulary"
            raise ModelError(value, f"makes {size:,} parameters, and a tiny model has {MOST_PARAMETERS:,}", step)
        module = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    except (ValueError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        step = "give a configuration that AutoModelForCausalLM.from_config takes"
        raise ModelError(value, f"makes no language model ({first_line(error)})", step) from error
    randomise(module, seed)
    return module.to(dtype).eval()


def _without_foreign_tokens(config: Any) -> None:
    """Leave out special tokens outside a tiny vocabulary: those of the checkpoints are defaults of configurations."""
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        given = getattr(config, name, None)
        size = getattr(config, "vocab_size", 0)
        if any(token >= size for token in (given if isinstance(given, list) else [given or 0])):
            setattr(config, name, None)


def randomise(module: Any, seed: int) -> None:
    """Draw every parameter anew: maps keep the size of what they read, norms stay near where they begin, biases are
    0.3 of their outputs, embeddings are of size 1, or small where they are tied to the head or multiplied."""
    draw = torch.Generator().manual_seed(seed)
    embeddings, head = module.get_input_embeddings(), module.get_output_embeddings()
    tied = head is not None and head.weight is embeddings.weight
    scaled = any("scale" in name for name, _ in embeddings.named_buffers()) or hasattr(embeddings, "embed_scale")
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if tied and part is head:
                continue
            noise = torch.randn(parameter.shape, generator=draw)
            if parameter.ndim == 1 or name.endswith("bias"):
                begin = torch.ones_like(noise) if bool((parameter == 1).all()) else torch.zeros_like(noise)
                value = begin + 0.3 * noise
            elif part is embeddings:
                value = noise * (1.5 * parameter.shape[1] ** -0.5 if tied or scaled else 1.0)
            elif isinstance(part, nn.Embedding):
                value = 0.3 * noise
            else:
                first = parameter.ndim == 2 and type(part).__name__ == "Conv1D"
                value = 1.3 * noise * parameter.shape[0 if first else -1] ** -0.5
            parameter.data.copy_(value)
            parameter.requires_grad_(False)


def tiny_tokenizer(size: int) -> Any:
    """A tokenizer of `size` words, which are ``t4``, ``t5`` and so on; it puts its first token before no text."""
    words = {word: number for number, word in enumerate((*SPECIAL, *(f"t{n}" for n in range(len(SPECIAL), size))))}
    fast = Tokenizer(WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = WhitespaceSplit()
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=fast, padding_side="left", **names)
