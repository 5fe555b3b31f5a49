"""Tiny seeded random causal language models of every supported family, for tests only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from reference import ONE_ABOVE
from tracer.testing import configs
from truth import placed

FAMILIES: tuple[str, ...] = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "olmo2",
    "phi3",
    "gpt_neox",
    "gpt2",
    "smollm3",
    "olmo",
    "olmo3",
    "gemma",
    "granite",
    "helium",
    "arcee",
    "apertus",
    "starcoder2",
    "stablelm",
    "cohere",
    "phi",
    "falcon",
    "cohere2",
    "glm",
    "glm4",
    "ministral",
    "ministral3",
    "nemotron",
    "exaone4",
    "seed_oss",
    "gemma4",
    "hunyuan_v1_dense",
    "ernie4_5",
    "gpt_bigcode",
    "gptj",
    "youtu",
    "qwen3_5",
    "qwen3_5_hybrid",
    "olmo_hybrid",
    "granite_swa",
    "minicpm3",
)
BIASED = frozenset(
    "qwen2 gpt_neox gpt2 starcoder2 stablelm phi falcon glm glm4 nemotron seed_oss gpt_bigcode gptj".split()
)
MAIN = FAMILIES[:10]
"""Those that everything is tried on in the quick tests."""
BIAS_FREE: tuple[str, ...] = tuple(family for family in FAMILIES if family not in BIASED)
"""Families without any bias: linear, norm or position embedding."""
SDPA: tuple[str, ...] = tuple(family for family in FAMILIES if family not in ("gemma2", "gptj", "granite_swa"))
"""Families that support scaled-dot-product attention."""
DELTA_NETS = frozenset({"qwen3_5_hybrid", "olmo_hybrid"})
"""Families with gated delta nets in the place of most attentions."""
UNGATED = frozenset("gpt_neox gpt2 arcee apertus starcoder2 phi falcon nemotron gpt_bigcode gptj".split())
"""Families whose MLPs have no gate."""

VOCAB, UNK, BOS, EOS, PAD, FIRST = 101, 0, 1, 2, 3, 4
_WORDS = (
    "The the car cars near secretaries secretary are is was were has have capital of state containing city "
    "What what Answer Dallas Texas Austin big small man men key keys cabinet parent parents runs run that"
).split()


def _shape(n_layers: int, d_mlp: int = 48) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": d_mlp,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }


def _gemma(n_layers: int, **extra: Any) -> dict[str, Any]:
    kinds = ["sliding_attention", "full_attention"]
    return {
        **_shape(n_layers),
        "head_dim": 16,
        "query_pre_attn_scalar": 7,
        "sliding_window": 4,
        "final_logit_softcapping": 2.0,
        "layer_types": [kinds[layer % 2] for layer in range(n_layers)],
        **extra,
    }


FULL, SLIDING = "full_attention", "sliding_attention"
TURNS = {"sliding_window": 4, "layer_types": [SLIDING, FULL] * 4}
MINISTRAL3_ROPE = {
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

DELTAS = {
    "layer_types": ["linear_attention", FULL, "linear_attention"] * 3,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
}
"""Gated delta nets around one layer of attention; two heads of values share a head of keys."""
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 10,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 7,
}
"""Multi-head latent attention; heads of values are of another size than those of queries."""

GRANITE = {
    "embedding_multiplier": 1.7,
    "residual_multiplier": 0.6,
    "logits_scaling": 2.5,
    "attention_multiplier": 0.4,
}

OPTIONS: dict[str, dict[str, Any]] = {
    **{family: {} for family in ("llama", "qwen2", "olmo2", "olmo", "arcee", "starcoder2", "stablelm", "phi")},
    "smollm3": {"no_rope_layer_interval": 2},
    "olmo3": TURNS,
    "gemma": {"head_dim": 16},
    "granite": GRANITE,
    "helium": {"head_dim": 8},
    "apertus": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "cohere": {"logit_scale": 0.3},
    "falcon": {"ffn_hidden_size": 48, "bias": True},
    "cohere2": {**TURNS, "logit_scale": 0.25},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 16},
    "ministral": {**TURNS, "head_dim": 16},
    "ministral3": {"head_dim": 8, "rope_parameters": MINISTRAL3_ROPE},
    "nemotron": {"partial_rotary_factor": 0.5},
    "exaone4": TURNS,
    "seed_oss": {"head_dim": 16},
    "gemma4": {  # full attention has wider heads, fewer of them for values, and no map for values alone
        "head_dim": 8,
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "sliding_window": 4,
        "layer_types": [FULL, SLIDING, FULL, FULL],
        "final_logit_softcapping": 2.0,
        "hidden_size_per_layer_input": 0,
    },
    "hunyuan_v1_dense": {"head_dim": 8},
    "ernie4_5": {"head_dim": 16},
    "youtu": {**LATENT, "pad_token_id": None},  # whose row of the embeddings transformers loads as zeros
    "qwen3_5": {"head_dim": 16, "layer_types": [FULL] * 8},
    "qwen3_5_hybrid": {"head_dim": 16, **DELTAS},
    "granite_swa": {**GRANITE, **TURNS, "layer_rope_theta": [10000.0, 0, 10000.0] * 3},
    "minicpm3": {**LATENT, "q_lora_rank": None, "scale_emb": 1.7, "scale_depth": 1.1, "dim_model_base": 20},
    "olmo_hybrid": {**DELTAS, "linear_allow_neg_eigval": True},
}
"""What a family's configuration has beside its sizes; of layers' types, the first."""


TYPES = {"gemma4": "gemma4_text", "qwen3_5": "qwen3_5_text", "qwen3_5_hybrid": "qwen3_5_text"}
"""Model types that are called otherwise than their family."""


def _config(family: str, n_layers: int) -> tuple[str, dict[str, Any]]:
    """The model type and the configuration of a family."""
    shape = _shape(n_layers)
    if family in OPTIONS:
        options = {**shape, **OPTIONS[family]}
        kind = TYPES.get(family, family)
        return kind, {
            name: value[:n_layers] if name in ("layer_types", "layer_rope_theta") else value
            for name, value in options.items()
        }
    if family == "mistral":
        return family, {**shape, "sliding_window": 5}
    if family == "qwen3":
        return family, {**shape, "head_dim": 16}
    if family == "phi3":
        return family, {**shape, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 64}
    if family == "gemma2":
        return family, _gemma(n_layers, attn_logit_softcapping=1.5)
    if family == "gemma3":
        return "gemma3_text", _gemma(n_layers)
    if family == "gpt_neox":
        shape.pop("num_key_value_heads")
        return family, {**shape, "rotary_pct": 0.5, "use_parallel_residual": True}
    if family in ("gpt2", "gpt_bigcode", "gptj"):
        sizes = {"n_embd": 32, "n_inner": 48, "n_layer": n_layers, "n_head": 4, "n_positions": 64}
        return family, {"vocab_size": VOCAB, **sizes, **({"rotary_dim": 4} if family == "gptj" else {})}
    options = {**configs.SIZES, **configs.OPTIONS[family][""], "num_hidden_layers": n_layers}  # mixtures of experts
    return family, {name: one[:n_layers] if name == "layer_types" else one for name, one in options.items()}


def _randomise(model: PreTrainedModel, seed: int, biases: bool) -> None:
    """Draw every parameter at a scale where norms, activations and attention all matter."""
    draw = torch.Generator().manual_seed(seed)
    embeddings = model.get_input_embeddings()
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is embeddings.weight
    for module in model.modules():
        kind = type(module).__name__
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=draw)
            if name == "bias":
                value = 0.3 * noise * biases
            elif parameter.ndim == 1:
                value = 0.3 * noise + (0.0 if kind in ONE_ABOVE else 1.0)
            elif module is embeddings:
                small = tied or kind.startswith("Gemma")
                value = noise * (1.5 * parameter.shape[1] ** -0.5 if small else 1.0)
            elif isinstance(module, nn.Embedding):
                value = 0.3 * noise * biases
            else:
                fan_in = parameter.shape[0] if kind == "Conv1D" else parameter.shape[1]
                value = 1.3 * noise * fan_in**-0.5
            if not (tied and module is head):
                parameter.data.copy_(value)
            parameter.requires_grad_(False)
        for name, buffer in module.named_buffers(recurse=False):
            if name == "layer_scalar":
                buffer.copy_(0.6 + 0.3 * torch.rand(buffer.shape, generator=draw))


def tiny(
    family: str,
    *,
    seed: int = 0,
    attn: str = "eager",
    dtype: torch.dtype = torch.float32,
    n_layers: int = 3,
    biases: bool = True,
    **over: Any,
) -> PreTrainedModel:
    """A random model in eval mode; `biases=False` zeroes every bias and GPT-2's position embedding."""
    model_type, settings = _config(family, n_layers)
    special = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    config = AutoConfig.for_model(model_type, **{**special, **settings, **over})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn)
    _randomise(model, seed, biases)
    return placed(model.to(dtype).eval())


def batch(model: PreTrainedModel, lengths: Sequence[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random prompts that start with BOS, left-padded: `(input_ids, attention_mask)`."""
    draw = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        words = torch.randint(FIRST, model.config.vocab_size, (length - 1,), generator=draw)
        ids[row, width - length :] = torch.cat([torch.tensor([BOS]), words])
        mask[row, width - length :] = 1
    return ids, mask


def vocabulary(size: int = VOCAB) -> list[str]:
    """Specials, single characters, a few words after a space, then fillers."""
    tokens = ["<unk>", "<bos>", "<eos>", "<pad>", "Ġ", "Ċ", *"0123456789", *"abcdefghijklmnopqrstuvwxyz"]
    tokens += [*".,?!:+'", *[f"Ġ{word}" for word in _WORDS], "The", "What", "Answer"]
    tokens += [f"Ġfill{number}" for number in range(size - len(tokens))]
    return tokens[:size]


def tokenizer(size: int = VOCAB) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of whole words and single characters that puts BOS first and pads left."""
    tokens = {token: number for number, token in enumerate(vocabulary(size))}
    model = models.BPE(vocab=tokens, merges=[], unk_token="<unk>", ignore_merges=True)
    fast = Tokenizer(model)
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


def edit_config(folder: Path, **changes: Any) -> None:
    """Change a saved folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def save(model: PreTrainedModel, folder: str | Path) -> Path:
    """Write the model and its tokenizer so that the Auto classes load the folder.

    For qwen2 AutoTokenizer rebuilds the tokenizer by its own class, to single characters; tracer does not.
    """
    path = Path(folder)
    model.save_pretrained(path)
    tokenizer(model.config.vocab_size).save_pretrained(path)
    return path
