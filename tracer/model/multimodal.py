"""The text part of a model that also takes images: a language model of a supported family, loaded alone.

Knows what its weights are called in the whole checkpoint, and what the whole model computes otherwise than the part
would by itself: on text the numbers are the whole model's. Refuses every other type with inputs beside text.
"""

from __future__ import annotations

import re
from typing import Any

from tracer.errors import ModelError
from tracer.model.families import TEXT_PARTS, check_inputs

KEYS = {
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
    r"^model\.language_model\.": "model.",
}
"""Names of the text part's weights in whole checkpoints, older and newer, and its own: transformers' `key_mapping`."""
BESIDE = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\.")
"""Weights of the whole checkpoint that are not the text part's."""


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
    text: Any = whole.get_text_config()
    if text.model_type != TEXT_PARTS[whole.model_type]:
        rule = f"its text part is of the type {text.model_type!r}, not {TEXT_PARTS[whole.model_type]!r}"
        raise ModelError(f"model type {whole.model_type!r}", rule, "use a language model without other inputs")
    if getattr(text, "use_bidirectional_attention", False):
        rule = f"the masks of {whole.model_type!r} on text are not those of its text part"
        raise ModelError("use_bidirectional_attention=True", rule, "save its text part as a model of its own")
    # The head is tied by the whole's own option; the whole has no soft cap whatever its text part says.
    text.tie_word_embeddings, text.final_logit_softcapping = whole.tie_word_embeddings, None
    text.dtype = whole.dtype or text.dtype
    if getattr(whole, "quantization_config", None) is not None:
        text.quantization_config = whole.quantization_config
    return text
