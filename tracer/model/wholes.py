"""Types of models that take images or sound beside text: data. Which have a text part that is loaded alone, and what
lies beside it in their checkpoints; which are refused, and why.

Knows names of types and of their weights. What becomes of a text part is multimodal.py's business; what its family is,
families.py's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from tracer.errors import ModelError


class TextPart(NamedTuple):
    """What a model that takes more than text has beside its text part, which is loaded alone (multimodal.py).

    Attributes:
        beside: what its other weights' names begin with, behind ``model.`` where it has that.
        takes: what it reads beside text.
        heeds: those of `HEAD_OPTIONS` that the whole heeds too.
        own_head: whether its text part is a language model with a head of its own, so that it is what the options of
            its own configuration say.
        inside: what the configuration of the model with the text part is called, where that is itself a part.
    """

    beside: tuple[str, ...]
    takes: str = "images"
    heeds: tuple[str, ...] = ()
    own_head: bool = False
    inside: str | None = None


HEAD_OPTIONS: dict[str, Any] = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}
"""What a language model does to its logits behind the head, and the value of each that does nothing. A whole model
around it has a head without these, but for those that it `heeds`."""

_TOWER = ("vision_tower", "multi_modal_projector")
_LLAVA = TextPart((*_TOWER, "image_newline"))
_IDEFICS = TextPart(("vision_model", "connector"))
_MINICPM = TextPart(("vision_tower", "merger"))
_QWEN = TextPart(("visual",))
_OMNI = TextPart(
    ("visual", "audio_tower", "talker", "token2wav", "code2wav"), "images and sound", inside="thinker_config"
)
_HEARS = TextPart(("audio_tower", "multi_modal_projector"), "sound")
_GEMMA4 = ("vision_tower", "embed_vision", "audio_tower", "embed_audio")
_SPEECH = ("acoustic_tokenizer_encoder", "semantic_tokenizer_encoder", "multi_modal_projector")
_JANUS = ("vision_model", "aligner", "vqmodel", "generation_embeddings", "generation_aligner", "generation_head")
_HIGH_RES = (*(f"high_res_vision_{part}" for part in ("model", "neck", "proj", "alpha")), "vision_model", "aligner")

TEXT_PARTS: dict[str, TextPart] = {
    "audioflamingo3": _HEARS,
    "aya_vision": TextPart(_TOWER),
    "cohere2_vision": TextPart(_TOWER),
    "deepseek_vl": TextPart(("vision_model", "aligner")),
    "deepseek_vl_hybrid": TextPart(_HIGH_RES),
    "exaone4_5": _QWEN,
    "fast_vlm": TextPart(_TOWER),
    "fun_asr_nano": _HEARS,
    "gemma3": TextPart(_TOWER),
    "gemma4": TextPart(_GEMMA4, "images and sound", ("final_logit_softcapping",)),
    "glm46v": _QWEN,
    "glm4v": _QWEN,
    "glm4v_moe": _QWEN,
    "glm_ocr": _QWEN,
    "glmasr": _HEARS,
    "glmga": _QWEN,
    "got_ocr2": TextPart(_TOWER),
    "hyperclovax_vision_v2": TextPart(("vision_model", "projector", "vision_projector"), heeds=("logits_scaling",)),
    "idefics2": _IDEFICS,
    "idefics3": _IDEFICS,
    "internvl": TextPart(_TOWER),
    "janus": TextPart(_JANUS),
    "kimi_k25": TextPart(("vision_tower", "mm_projector")),
    "lighton_ocr": TextPart(("vision_encoder", "vision_projection")),
    "llama4": TextPart(("vision_model", "multi_modal_projector"), own_head=True),
    "llava": TextPart(_TOWER),
    "llava_next": _LLAVA,
    "llava_next_video": TextPart((*_LLAVA.beside, "vision_resampler")),
    "llava_onevision": _LLAVA,
    "minicpm_ocr": _MINICPM,
    "minicpmv4_6": _MINICPM,
    "minicpmv4_7": _MINICPM,
    "mistral3": TextPart(_TOWER),
    "moss_transcribe_diarize": _HEARS,
    "musicflamingo": _HEARS,
    "ovis2": TextPart(("vision_tower", "visual_embeddings_table")),
    "perception_lm": TextPart(_TOWER),
    "pp_chart2table": TextPart(_TOWER),
    "qianfan_ocr": TextPart((*_TOWER, "vision_model", "mlp1")),
    "qwen2_5_omni": _OMNI,
    "qwen2_5_omni_thinker": TextPart(_OMNI.beside, _OMNI.takes),
    "qwen2_5_vl": _QWEN,
    "qwen2_audio": _HEARS,
    "qwen2_vl": _QWEN,
    "qwen3_5": _QWEN,
    "qwen3_asr": _HEARS,
    "qwen3_omni_moe": _OMNI,
    "qwen3_omni_moe_thinker": TextPart(_OMNI.beside, _OMNI.takes),
    "qwen3_vl": _QWEN,
    "smolvlm": _IDEFICS,
    "vibevoice_asr": TextPart(_SPEECH, "sound"),
    "video_llama_3": TextPart(("vision_model", "projector")),
    "video_llava": TextPart(("video_tower", "image_tower", "multi_modal_projector")),
    "vipllava": TextPart(_TOWER),
    "voxtral": _HEARS,
}
"""Types that take more than text and whose text part, if it is of a known family, gives on text what the whole gives:
each was compared with the whole in transformers (tests/model/test_multimodal.py)."""

SAME_TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "glm4v_text": ("glm4", {}),
    "glm4v_moe_text": ("glm4_moe", {}),
    "glm_ocr_text": ("glm4", {"attention_bias": False}),
    "qwen2_vl_text": ("qwen2", {}),
    "qwen2_5_vl_text": ("qwen2", {}),
    "qwen2_5_omni_text": ("qwen2", {}),
    "qwen3_vl_text": ("qwen3", {}),
    "qwen3_omni_moe_text": ("qwen3_moe", {}),
}
"""Types of text parts that on text are a family, and options of it that they have not: they turn positions by three
numbers, which are one where there is no image."""
IMAGE_ROPE = ("mrope_section", "mrope_interleaved")
"""Options of rotary positions that have no effect where the three numbers are one."""

_CROSS = "its text part reads images by cross-attention, which no rule covers"
_BOTH = "reads its prompt in both directions: no token has a text before it alone"
_ENCODER = "has an encoder beside its decoder, which reads it by cross-attention: no rule covers that"
_STATES = "its text part mixes in convolutions or a state, whose value path no rule covers"
_UNREAD: dict[str, str] = {
    _CROSS: "blip evolla idefics mllama",
    _BOTH: "paligemma",
    _ENCODER: "florence2 pix2struct pp_formulanet t5gemma2 udop vision-encoder-decoder",
    _STATES: "lfm2_vl nemo_speechlm nemotron_h_omni qwen4_exp",
    "its language model runs with an adapter where there is sound or an image, and without it on text": (
        "granite_speech granite_speech_plus phi4_multimodal"
    ),
    "gives no next token: it classifies images": "shieldgemma2",
    "gives no next token: it moves a robot": "pi0",
    "gives no next token: it fills in blocks of them": "diffusion_gemma",
    "reads sound beside every token of text": "kyutai_speech_to_text",
    "its text part is of a type that is no known family": (
        "aria blip-2 chameleon cohere_compass cosmos3_edge deepseek_ocr2 emu3 ernie4_5_vl_moe fuyu gemma3n "
        "gemma4_unified git glm5_next granite4_vision hunyuan_vl inkling_mm_model "
        "instructblip instructblipvideo kosmos-2 kosmos-2.5 minimax_m3_vl mistral4 mistral_large4 molmo2 muse_glimmer "
        "muse_spark paddleocr_vl qwen3_5_moe step3p7 unlimited_ocr voxtral_realtime"
    ),
    "its text part keeps experts' weights the other way round, which is not read": "qwen3_vl_moe",
    "has a generator beside its text part, whose weights have names that are not read": ("cosmos3_omni"),
}
UNREAD: dict[str, str] = {name: reason for reason, names in _UNREAD.items() for name in names.split()}
"""Types that take more than text and are not loaded, and why: with `TEXT_PARTS` all that transformers has for text and
images."""


def check_inputs(config: Any) -> None:
    """Refuse a model that takes images or sound beside text.

    Raises:
        ModelError: it does, by its configuration; says what becomes of its type.
    """
    kind, parts = config.model_type, getattr(config, "sub_configs", None) or {}
    if kind not in UNREAD and not any(name in parts for name in ("text_config", "vision_config", "audio_config")):
        return
    rule = f"takes other inputs beside text, and {UNREAD[kind]}" if kind in UNREAD else "takes other inputs beside text"
    step = "use a language model for text alone, or a model whose text part is loaded (docs/families.md lists them)"
    if kind in TEXT_PARTS:
        step = "give its folder or Hugging Face id, from which its text part alone is loaded"
    elif kind not in UNREAD:
        rule += ", and is of a type that nobody has compared with its text part"
    raise ModelError(f"model type {kind!r}", rule, step)
