"""The text part of a model that also takes images or sound: a language model of a known family, loaded alone.

Knows what its weights are called in the whole checkpoint, and what the whole model computes otherwise than the part
would by itself: on text the numbers are the whole model's. Refuses every other type with inputs beside text, and the
whole to be run on more than text.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tracer.errors import ModelError, first_line
from tracer.model import state
from tracer.model.families import FAMILIES, listed
from tracer.model.wholes import HEAD_OPTIONS, IMAGE_ROPE, SAME_TEXT, TEXT_PARTS, check_inputs

KEYS = {
    r"^thinker\.": "",
    r"^(model\.)?language_model\.lm_head\.": "lm_head.",
    r"^(model\.)?language_model\.model\.((encoder\.)?layers|blocks)\.": "model.layers.",
    r"^(model\.)?language_model\.model\.": "model.",
    r"^model\.(language_model|text_model)\.": "model.",
}
"""Names of the text part's weights in whole checkpoints, older and newer, and its own: transformers' `key_mapping`."""
_NAMES_OF_PARTS = ("modules_to_not_convert", "llm_int8_skip_modules", "ignore")
"""What quantisations call the list of modules that they leave as they are."""
_PROBE = 8
"""Tokens on which a text part in memory is compared with its whole."""


def configuration(where: str, revision: str | None) -> Any:
    """The configuration of a language model, or of the text part of a model that has one (a new object at each call).

    Args:
        where: a folder or a Hugging Face id. revision: of the id.

    Raises:
        ModelError: a type with other inputs, or an option under which whole and part differ on text.
        OSError, ValueError: it cannot be read.
    """
    from transformers import AutoConfig

    whole = AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=False)
    if whole.model_type not in TEXT_PARTS:
        check_inputs(whole)
        return whole
    text = text_configuration(whole)
    check_text_type(text, whole.model_type)
    return text


def check_text_type(text: Any, kind: str) -> None:
    """Refuse a text part that is of no known family.

    Args:
        text: its configuration. kind: the type of the whole.
    """
    if text.model_type not in FAMILIES:
        rule = f"its text part is of the type {text.model_type!r}, which is no known family: {listed()}"
        raise ModelError(f"model type {kind!r}", rule, "use one whose text part is of a known family")


def text_configuration(whole: Any) -> Any:
    """The configuration of the language model that gives on text what the whole gives, from that of the whole.

    Raises:
        ModelError: an option under which there is none.
    """
    part, kind, told = TEXT_PARTS[whole.model_type], whole.model_type, whole
    whole = whole if part.inside is None else getattr(whole, part.inside)
    given = whole.get_text_config()
    if getattr(given, "use_bidirectional_attention", None) in (True, "all"):
        rule = f"the masks of {kind!r} on text are not those of its text part"
        option = f"use_bidirectional_attention={given.use_bidirectional_attention!r}"
        raise ModelError(option, rule, "save its text part as a model of its own")
    text = _of_family(given)
    if not part.own_head:
        text.tie_word_embeddings = getattr(whole, "tie_word_embeddings", False)
        for name, nothing in HEAD_OPTIONS.items():
            if hasattr(text, name) and name not in part.heeds:
                setattr(text, name, nothing)
    text.dtype = told.dtype or text.dtype
    each = (getattr(one, "quantization_config", None) for one in (told, given))
    if (quantized := next((one for one in each if one is not None), None)) is not None:
        text.quantization_config = _renamed_parts(quantized)
    return text


def _of_family(given: Any) -> Any:
    """A text part's configuration, or what is the same on text as a family's."""
    from transformers import AutoConfig

    if given.model_type not in SAME_TEXT:
        return copy.deepcopy(given)
    kind, options = SAME_TEXT[given.model_type]
    fields: dict[str, Any] = {"head_dim": given.hidden_size // given.num_attention_heads} | given.to_dict() | options
    del fields["model_type"]
    rope = fields.get("rope_parameters") or {}
    fields["rope_parameters"] = {name: value for name, value in rope.items() if name not in IMAGE_ROPE}
    text = AutoConfig.for_model(kind, **fields)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # the family's own would else be there
        setattr(text, name, fields.get(name))
    return text


def renamed(name: str) -> str:
    """What a weight of the whole is called in its text part."""
    for old, new in KEYS.items():
        name = re.sub(old, new, name, count=1)
    return name


def _renamed_parts(quantized: Any) -> Any:
    """A quantisation whose list of modules to leave as they are names those of the text part."""
    fields = quantized if isinstance(quantized, dict) else quantized.to_dict()
    lists = [name for name in _NAMES_OF_PARTS if isinstance(fields.get(name), list)]
    return fields | {name: [renamed(f"{one}.").removesuffix(".") for one in fields[name]] for name in lists}


def is_beside(kind: str, name: str) -> bool:
    """Whether a weight of a checkpoint of this type is none of its text part's."""
    return re.match(rf"(thinker\.)?(model\.)?({'|'.join(TEXT_PARTS[kind].beside)})(\.|$)", name) is not None


# ------------------------------------------------------------------------------------------- a whole in memory


def text_part(whole: Any) -> nn.Module:
    """The language model in a whole one in memory: a new module that shares its weights and buffers.

    Raises:
        ModelError: the whole is quantised, spread over devices or of several dtypes, lacks a head, does not compute
            what its weights say, or its logits on text are not those of its text part.
    """
    from transformers import AutoModelForCausalLM

    name = f"module {type(whole).__name__}"
    state.check_kind(whole)
    state.check(whole.eval().requires_grad_(False), loaded=False)
    check_text_type(config := text_configuration(whole.config), whole.config.model_type)
    with torch.device("meta"):
        empty: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    ours = {renamed(key): value for key, value in whole.state_dict().items()}
    ours = {key: ours[key] for key in empty.state_dict() if key in ours}
    if missing := sorted(empty.state_dict().keys() - ours.keys()):
        rule = f"has no language model with a head in it: {missing[0]} is missing"
        raise ModelError(name, rule, "pass the whole model, from AutoModelForImageTextToText")
    _check_alike(name, whole.config, ours.values())
    options: dict[str, Any] = {"dtype": whole.dtype, "device_map": {"": next(iter(ours.values())).device}}
    options["attn_implementation"] = whole.config.get_text_config()._attn_implementation
    text = type(empty).from_pretrained(None, config=config, state_dict=ours, **options)
    _share_buffers(whole, text)
    text.generation_config = getattr(whole, "generation_config", text.generation_config)
    _check_same(whole, text, name)
    return text.requires_grad_(False)


def _check_alike(name: str, config: Any, weights: Iterable[Tensor]) -> None:
    """Refuse weights that a new module could not share as they are."""
    places = {(str(value.device), value.dtype) for value in weights}
    quantized = getattr(config, "quantization_config", None) is not None
    if quantized or len(places) > 1:
        rule = "is quantised" if quantized else "is spread over several devices or dtypes"
        step = "load it by name, from which its text part alone is loaded"
        raise ModelError(name, f"{rule}, so that its text part cannot share its weights", step)


def _share_buffers(whole: nn.Module, text: nn.Module) -> None:
    """Rotary frequencies and scales, which were perhaps cast with the whole."""
    theirs = {renamed(key): value for key, value in whole.named_buffers()}
    for key, value in list(text.named_buffers()):
        if key in theirs and theirs[key].shape == value.shape:
            path, _, own = key.rpartition(".")
            setattr(text.get_submodule(path), own, theirs[key])


def _check_same(whole: Any, text: Any, name: str) -> None:
    """Compare the two on text: a whole may have been changed, or compute something that nobody has looked for."""
    ids = torch.arange(1, 1 + min(_PROBE, int(text.config.vocab_size) - 1), device=text.device)[None]
    try:
        wanted = whole(input_ids=ids, use_cache=False).logits.float()
    except Exception as error:  # whatever a model raises
        rule = f"gives no logits on text alone ({first_line(error)})"
        raise ModelError(name, rule, "load it by name, from which its text part alone is loaded") from error
    gap = float((text(input_ids=ids, use_cache=False).logits.float() - wanted).abs().max() / wanted.abs().max())
    if not gap < (1e-4 if text.dtype in (torch.float32, torch.float64) else 0.02):
        rule = f"gives other logits on text than its text part (by {gap:.2g} of the largest)"
        raise ModelError(name, rule, "load it by name, from which its text part alone is loaded")
