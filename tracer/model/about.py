"""What is said of each family in README and docs/families.md: data, from which tools/families.py writes them."""

from __future__ import annotations

from typing import NamedTuple

OLDEST = "5.17"
"""The oldest transformers that tracer allows: it has all families but those that say otherwise."""


class About(NamedTuple):
    """A family in words.

    Attributes:
        title: of the models, as people call them.
        since: the release of transformers that first had it; empty where that was not found.
        note: what to know of its linearisation beyond the rules, if anything.
    """

    title: str
    since: str = ""
    note: str = ""


_SHARE = "the position embedding has a share of its own too"
_LATENT = "multi-head latent attention: the norm of the latent is frozen token by token"
_DELTA = (
    "gated delta nets: what a state is written, read, forgotten and let out with is a constant, as a pattern is; their "
    "values pass a short convolution and its SiLU by rule 3"
)

ABOUT: dict[str, About] = {
    "llama": About("Llama 1 to 3", "4.28"),
    "mistral": About("Mistral", "4.34"),
    "qwen2": About("Qwen 2 and 2.5", "4.37"),
    "qwen3": About("Qwen 3", "4.51"),
    "gemma2": About("Gemma 2", "4.42", "both soft-caps; that of attention is in the pattern"),
    "gemma3_text": About("Gemma 3", "4.50"),
    "olmo2": About("OLMo 2", "4.47"),
    "phi3": About("Phi-3 and 4", "4.41", "LongRoPE turns a prompt by its own length alone"),
    "gpt_neox": About("GPT-NeoX and Pythia", "4.20"),
    "gpt2": About("GPT-2", "1.0", _SHARE),
    "falcon": About("Falcon", "4.33"),
    "cohere2": About("Command R7B and A", "4.48", "a logit scale; layers without rotary positions"),
    "glm": About("GLM-4-9B", "4.46"),
    "glm4": About("GLM-4-0414", "4.52"),
    "ministral": About("Ministral", "4.57"),
    "ministral3": About("Ministral 3", "5.0"),
    "nemotron": About("Nemotron and Minitron", "4.44"),
    "exaone4": About("EXAONE 4", "4.54", "layers without rotary positions"),
    "seed_oss": About("Seed-OSS", "4.56"),
    "hunyuan_v1_dense": About("HunYuan dense", "4.56"),
    "ernie4_5": About("ERNIE 4.5 dense", "4.54"),
    "gemma4_text": About("Gemma 4", "", "a norm of values; values that are keys; a scalar of each block"),
    "gpt_bigcode": About("StarCoder and SantaCoder", "4.28", _SHARE),
    "gptj": About("GPT-J", "4.11"),
    "smollm3": About("SmolLM3", "4.53", "layers without rotary positions"),
    "olmo": About("OLMo", "4.40", "norms without weights"),
    "olmo3": About("OLMo 3", "4.57"),
    "gemma": About("Gemma", "4.38"),
    "granite": About("Granite 3", "4.45", "multipliers of embedding, branches and logits"),
    "helium": About("Helium", "4.49"),
    "arcee": About("Arcee AFM", "4.53"),
    "apertus": About("Apertus", "", "xIELU, which is not 0 at 0 by 1e-6: that much is left out"),
    "starcoder2": About("StarCoder2", "4.39"),
    "stablelm": About("StableLM", "4.38"),
    "cohere": About("Command R", "4.39", "a logit scale"),
    "mixtral": About("Mixtral", "4.36"),
    "qwen2_moe": About("Qwen 1.5 and 2 MoE", "4.40", "the shared expert's gate is a constant"),
    "qwen3_moe": About("Qwen 3 MoE", "4.51"),
    "olmoe": About("OLMoE", "4.45"),
    "gpt_oss": About("gpt-oss", "4.55", "the clamps of gate and up are activations; sinks are in the pattern"),
    "glm4_moe": About("GLM-4.5 to 4.7", "4.54"),
    "deepseek_v2": About("DeepSeek V2", "4.54", "latent attention"),
    "deepseek_v3": About("DeepSeek V3 and R1", "4.51", "latent attention"),
    "llama4_text": About("Llama 4", "4.51", "experts read what the router multiplied"),
    "phi": About("Phi 1 and 2", "4.36"),
    "youtu": About("Youtu-LLM", "", _LATENT),
    "granite_swa": About("Granite with sliding windows", "", "what goes to a sink of attention is in the pattern"),
    "minicpm3": About("MiniCPM 3", "", _LATENT),
    "qwen3_5_text": About("Qwen 3.5 dense", "", f"a gate on what attention mixed is a constant; {_DELTA}"),
    "olmo_hybrid": About("OLMo hybrid", "", _DELTA),
}
