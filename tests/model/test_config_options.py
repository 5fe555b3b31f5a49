"""The options of the families' configurations, one by one: what each changes is right, in any company, or refused.

`LOOKED_AT` says what was decided of every option that a family's configuration has; a new one fails the first test.
Every value in `CASES` is held to three things: product and oracle agree (both run the real modules); a prompt alone is
the prompt padded in a batch; and both engines' edges are the oracle's, also where the replay works in small pieces.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

import reference
import tiny as t
import tracer
from helpers import Question, compare, error, fresh, load, refused
from tracer.attribution.attribute import mean_values
from tracer.attribution.edges import Edges, direct_edges
from tracer.batching import batches, chunked_alike, side
from tracer.errors import JobError, ModelError
from tracer.evaluation.ablations import AblatedRow, Ranking, Replacement, measured
from tracer.model import passes
from tracer.prompts import Batch, encode
from tracer.settings import settings

SIZES = """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    max_position_embeddings n_positions n_embd n_layer n_head n_inner initializer_range rms_norm_eps layer_norm_eps
    layer_norm_epsilon norm_epsilon pad_token_id bos_token_id eos_token_id
    ffn_hidden_size num_kv_heads norm_eps eod_token_id num_experts top_k_experts moe_intermediate_size
    vocab_size_per_layer_input kv_lora_rank qk_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim
    linear_num_key_heads linear_num_value_heads linear_key_head_dim linear_value_head_dim linear_conv_kernel_dim
"""
NO_EFFECT = """
    use_cache pretraining_tp attention_dropout resid_pdrop embd_pdrop attn_pdrop hidden_dropout classifier_dropout
    summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout is_decoder
    original_max_position_embeddings _sliding_window_pattern max_window_layers residual_dropout embedding_dropout
    ignore_keys_at_rope_validation sliding_window_pattern _heterogeneity_spec attention_softmax_in_fp32
    scale_attention_softmax_in_fp32 embedding_initializer_range linear_dt_min linear_dt_max linear_dt_init_floor
    linear_a_log_min linear_a_log_max
"""
"""Training, other heads than the language model's, caches; or read through another option (by which it is tested)."""
TESTED = """
    hidden_act hidden_activation activation_function rope_parameters attention_bias mlp_bias tie_word_embeddings
    sliding_window use_sliding_window layer_types query_pre_attn_scalar final_logit_softcapping attn_logit_softcapping
    use_bidirectional_attention use_parallel_residual scale_attn_weights scale_attn_by_inverse_layer_idx no_rope_layers
    no_rope_layer_interval use_bias use_qkv_bias qk_layernorm use_qk_norm embedding_multiplier residual_multiplier
    attention_multiplier logits_scaling logit_scale alibi bias multi_query new_decoder_architecture
    num_ln_in_parallel_attn parallel_attn activation attention_out_bias attention_k_eq_v rotary_dim
    hidden_size_per_layer_input num_kv_shared_layers q_lora_rank rope_interleave linear_allow_neg_eigval
    layer_rope_theta scale_emb scale_depth dim_model_base
"""
REFUSED = "add_cross_attention reorder_and_upcast_attn clip_qkv enable_moe_block use_double_wide_mlp"
LOOKED_AT = frozenset(f"{SIZES} {NO_EFFECT} {TESTED} {REFUSED}".split())

LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 10000.0,
}


def longrope(border: int, dim: int) -> dict[str, Any]:
    """Two tables that differ much, the second above `border` tokens."""
    return {
        "rope_type": "longrope",
        "short_factor": [1.0] * dim,
        "long_factor": [4.0 + place for place in range(dim)],
        "original_max_position_embeddings": border,
        "rope_theta": 10000.0,
    }


def phi3(border: int = 5) -> dict[str, Any]:
    """Phi-3's LongRoPE, as its checkpoints have it: rotary dimensions are a half of a head's 8."""
    rope = longrope(border, 2) | {"partial_rotary_factor": 0.5}
    return {"original_max_position_embeddings": border, "rope_parameters": rope}


NEMOTRON_ROPE = {**LINEAR, "partial_rotary_factor": 1.0}
FULL, SLIDING = "full_attention", "sliding_attention"
CASES: dict[str, list[dict[str, Any]]] = {
    "llama": [
        {"attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 1},
        {"head_dim": 12, "num_key_value_heads": 4},
        {"hidden_act": "gelu"},
        {"rms_norm_eps": 0.3},
        {"rope_parameters": LINEAR},
        {"rope_parameters": DYNAMIC},
        {"rope_parameters": YARN},
        {"rope_parameters": LLAMA3},
        {"rope_parameters": longrope(5, 4)},
        {"is_causal": False},
    ],
    "mistral": [{"sliding_window": None}, {"sliding_window": 2}, {"head_dim": 12}, {"is_causal": False}],
    "qwen2": [
        {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
        {"layer_types": [SLIDING, FULL, SLIDING], "sliding_window": 2, "use_sliding_window": True},
        {"rope_parameters": longrope(3, 4)},
        {"is_causal": False},
    ],
    "qwen3": [
        {"attention_bias": True},
        {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2},
        {"is_causal": False},
    ],
    "gemma2": [
        {"query_pre_attn_scalar": 40},
        {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        {"layer_types": [FULL, FULL, SLIDING], "sliding_window": 2},
        {"hidden_activation": "gelu"},
        {"attention_bias": True},
        {"is_causal": False},
    ],
    "gemma3": [
        {"use_bidirectional_attention": True},
        {"use_bidirectional_attention": True, "sliding_window": 2},
        {"attn_logit_softcapping": 1.5, "final_logit_softcapping": None},
        {"query_pre_attn_scalar": 40, "tie_word_embeddings": False},
        {
            "rope_parameters": {
                SLIDING: {"rope_type": "default", "rope_theta": 100.0},
                FULL: longrope(5, 8),
            }
        },
        {"is_causal": False},
    ],
    "olmo2": [{"attention_bias": True}, {"rope_parameters": YARN}, {"is_causal": False}],
    "phi3": [{"sliding_window": 3}, phi3(), {**phi3(3), "sliding_window": 4}, {"is_causal": False}],
    "gpt_neox": [
        {"use_parallel_residual": False},
        {"attention_bias": False},
        {"hidden_act": "gelu_new"},
        {"rope_parameters": {**LINEAR, "partial_rotary_factor": 1.0}},
        {"is_decoder": True},
        {"is_causal": False},
    ],
    "gpt2": [
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"activation_function": "relu"},
        {"tie_word_embeddings": False},
        {"is_causal": False},
    ],
    "smollm3": [
        {"no_rope_layers": [0, 0, 1]},
        {"no_rope_layer_interval": 1},
        {"use_sliding_window": True, "sliding_window": 3},
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
        {"is_causal": False},
    ],
    "olmo": [{"attention_bias": True}, {"tie_word_embeddings": True, "rope_parameters": YARN}, {"is_causal": False}],
    "olmo3": [
        {"attention_bias": True, "sliding_window": 2},
        {"layer_types": [FULL, FULL, SLIDING]},
        {"rope_parameters": {SLIDING: {"rope_type": "default", "rope_theta": 100.0}, FULL: longrope(5, 4)}},
        {"is_causal": False},
    ],
    "gemma": [
        {"attention_bias": True},
        {"hidden_act": "gelu", "tie_word_embeddings": False},
        {"hidden_act": "quick_gelu"},
        {"is_causal": False},
    ],
    "granite": [
        {"embedding_multiplier": 0.3},
        {"residual_multiplier": 2.0, "logits_scaling": 0.25},
        {"attention_multiplier": 2.0, "tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"is_causal": False},
    ],
    "helium": [{"attention_bias": True, "mlp_bias": True}, {"is_causal": False}],
    "arcee": [
        {"attention_bias": True, "mlp_bias": True},
        {"hidden_act": "gelu_fast", "head_dim": 12},
        {"rope_parameters": YARN},
        {"is_causal": False},
    ],
    "apertus": [
        {"attention_bias": True},
        {"hidden_act": "mish"},
        {"rope_parameters": LLAMA3},
        {"is_causal": False},
    ],
    "starcoder2": [
        {"use_bias": False},
        {"sliding_window": 3, "tie_word_embeddings": False},
        {"hidden_act": "gelu_accurate"},
        {"is_causal": False},
    ],
    "stablelm": [
        {"use_parallel_residual": True},
        {"use_parallel_residual": True, "qk_layernorm": True},
        {"qk_layernorm": True, "use_qkv_bias": True},
        {"rope_parameters": {**LINEAR, "partial_rotary_factor": 1.0}},
    ],
    "cohere": [
        {"use_qk_norm": True},
        {"logit_scale": 3.0, "tie_word_embeddings": False},
        {"attention_bias": True},
        {"is_causal": False},
    ],
    "phi": [
        {"qk_layernorm": True},
        {"hidden_act": "linear"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.25}},
        {"is_causal": False},
    ],
}
OWN = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": t.VOCAB}
CASES |= {
    "falcon": [
        {"bias": False, "multi_query": False},
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
        {"parallel_attn": False, "multi_query": False, "alibi": True, "activation": "relu"},
        {"alibi": True, "tie_word_embeddings": False},
        {"rope_parameters": longrope(5, 4)},
        {"is_causal": False},
        {"alibi": True, "is_causal": False},
    ],
    "cohere2": [
        {"logit_scale": 3.0, "attention_bias": True, "tie_word_embeddings": False},
        {"sliding_window": 2, "layer_types": [FULL, SLIDING, SLIDING]},
        {"layer_types": [FULL] * 3, "hidden_act": "gelu"},
        {"is_causal": False},
    ],
    "glm": [{"attention_bias": False, "rope_parameters": longrope(5, 2)}, {"is_causal": False}],
    "glm4": [{"attention_bias": False, "rope_parameters": longrope(5, 4)}, {"is_causal": False}],
    "ministral": [
        {"sliding_window": 2, "layer_types": None, "head_dim": 8},
        {"is_causal": False},
    ],
    "ministral3": [{"sliding_window": 3}, {"tie_word_embeddings": True}, {"is_causal": False}],
    "nemotron": [{"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}, {"rope_parameters": NEMOTRON_ROPE}],
    "exaone4": [
        {"sliding_window": None, "layer_types": [FULL] * 3},
        {"layer_types": [FULL, SLIDING, SLIDING], "sliding_window": 2},
        {"is_causal": False},
    ],
    "seed_oss": [
        {"attention_bias": False},
        {"attention_out_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
        {"is_causal": False},
    ],
    "gemma4": [
        {"attention_k_eq_v": False, "num_key_value_heads": 1},
        {"attention_k_eq_v": False, "global_head_dim": 8, "final_logit_softcapping": None},
        {"num_global_key_value_heads": None, "layer_types": [FULL] * 3, "hidden_activation": "gelu"},
        {"use_bidirectional_attention": "vision", "attention_bias": True},
        {"use_bidirectional_attention": "all"},
        {"layer_types": [SLIDING, SLIDING, FULL], "sliding_window": 2, "tie_word_embeddings": False},
        OWN,
        {"num_kv_shared_layers": 1},
        {"num_kv_shared_layers": 2, "layer_types": [FULL] * 3, "attention_k_eq_v": False, **OWN},
    ],
    "hunyuan_v1_dense": [{"attention_bias": True}, {"rope_parameters": DYNAMIC}, {"is_causal": False}],
    "ernie4_5": [{"use_bias": True}, {"tie_word_embeddings": False, "head_dim": 8}, {"is_causal": False}],
    "gpt_bigcode": [
        {"multi_query": False, "scale_attn_weights": False},
        {"activation_function": "relu", "tie_word_embeddings": False},
        {"is_causal": False},
    ],
    "youtu": [
        {"q_lora_rank": 10, "attention_bias": True, "mlp_bias": True},
        {"rope_interleave": False, "tie_word_embeddings": False},
        {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
        {"is_causal": False},
    ],
    "qwen3_5": [
        {"attention_bias": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}},
        {"tie_word_embeddings": True},
        {"is_causal": False},
    ],
    "qwen3_5_hybrid": [{"linear_conv_kernel_dim": 2, "linear_num_key_heads": 4}, {"attention_bias": True}],
    "olmo_hybrid": [
        {"linear_allow_neg_eigval": False},
        {"linear_conv_kernel_dim": 2, "attention_bias": True},
    ],
    "granite_swa": [
        {"layer_rope_theta": [0, 100.0, 10000.0]},
        {"sliding_window": 2, "layer_types": [FULL, SLIDING, SLIDING]},
        {"embedding_multiplier": 0.3, "residual_multiplier": 2.0, "attention_multiplier": 2.0},
        {"attention_bias": True, "mlp_bias": True, "logits_scaling": 0.25},
    ],
    "minicpm3": [
        {"scale_emb": 0.3, "dim_model_base": 64},
        {"scale_depth": 3.0, "q_lora_rank": 10},
        {"attention_bias": True, "tie_word_embeddings": False},
        {"is_causal": False},
    ],
    "gptj": [{"rotary_dim": 8, "activation_function": "relu"}, {"tie_word_embeddings": True}, {"is_causal": False}],
}
EVERY = [(family, over) for family, cases in CASES.items() for over in cases]
NAMES = [f"{family}-{'-'.join(f'{name}' for name in over)}-{number}" for number, (family, over) in enumerate(EVERY)]
BIDIRECTIONAL = [
    (family, over)
    for family, over in EVERY
    if over.get("is_causal") is False or over.get("use_bidirectional_attention") in (True, "all")
]
IDS = (1, 6, 7, 8, 9, 10, 11)
every_option = pytest.mark.parametrize(("family", "over"), EVERY, ids=NAMES)


def made(family: str, over: dict[str, Any], attn: str = "eager") -> tracer.Model:
    return tracer.load(t.tiny(family, attn=attn, **over), tokenizer=t.tokenizer())


def kernels(family: str, over: dict[str, Any]) -> list[str]:
    """The kernels that can run it; soft-caps on attention are eager's alone."""
    capped = over.get("attn_logit_softcapping") is not None
    return ["eager", "sdpa"] if family in t.SDPA and not capped else ["eager"]


@pytest.mark.parametrize("family", t.FAMILIES)
def test_every_option_of_every_family_was_looked_at(family: str) -> None:
    config = AutoConfig.for_model(t._config(family, 1)[0])
    assert set(vars(config)) - set(vars(PretrainedConfig())) - LOOKED_AT == set()


def test_every_option_that_changes_numbers_has_a_case() -> None:
    tried = {name for _, over in EVERY for name in over}
    assert set(TESTED.split()) <= tried


@every_option
def test_product_and_oracle_agree(family: str, over: dict[str, Any]) -> None:
    for attn in kernels(family, over):
        model = made(family, over, attn)
        for length in (7, 3):  # one at a time: the oracle pads, and LongRoPE looks at the longest
            found = compare(model, Question(lengths=(length,), targets=((7,),), foils=((8,),)))
            assert max(found.nodes, found.activations, found.embeddings) < 1e-5
            assert found.metric < 1e-4  # of itself, which may be near 0


@every_option
def test_a_prompt_alone_is_the_prompt_in_company(family: str, over: dict[str, Any]) -> None:
    for attn in kernels(family, over):
        model = made(family, over, attn)
        prompts = Question(lengths=(7, 4, 2)).ids()
        asked = [tracer.Prompt(token_ids=ids, target=7) for ids in prompts]
        together = tracer.attribute(model, asked)
        for row, prompt in enumerate(asked):
            alone, length = tracer.attribute(model, [prompt]), len(prompts[row])
            assert error(together.nodes[row, :, :length], alone.nodes[0]) < 1e-5
            assert error(together.embeddings[row, :length], alone.embeddings[0]) < 1e-5
            assert float((together.metric[row] - alone.metric[0]).abs()) < 1e-5


def some_nodes(model: tracer.Model, positions: tuple[int, ...]) -> Tensor:
    """Neurons of every layer at these positions."""
    neurons = torch.arange(0, model.d_mlp, 7)
    return torch.cartesian_prod(torch.arange(model.n_layers), torch.tensor(positions), neurons)


def oracle_edges(model: tracer.Model, nodes: Tensor, logits: Tensor) -> Tensor:
    targets = [tuple(node) for node in nodes.tolist()] + [(model.n_layers, *pair) for pair in logits.tolist()]
    found = reference.edges(model.module, torch.tensor([IDS]), targets)
    return torch.cat([found.neurons[:, *nodes.unbind(-1)], found.embeddings], 1)


def engines(model: tracer.Model, nodes: Tensor, logits: Tensor) -> list[Edges]:
    """The edges by every engine that applies."""
    names = ("autograd", "replay") if model.replayed else ("autograd",)
    return [direct_edges(model, IDS, nodes, logits, engine=engine) for engine in names]


@every_option
def test_edges_are_the_oracles(family: str, over: dict[str, Any]) -> None:
    for attn in kernels(family, over):
        model = made(family, over, attn)
        nodes, logits = some_nodes(model, (1, 3, 4)), torch.tensor([[4, 20], [2, 22]])
        wanted = oracle_edges(model, nodes, logits)
        for found in engines(model, nodes, logits):
            assert error(found.weight, wanted) < 1e-5
            if not model.has_biases:  # identity 3 and 4 of method.md: everything comes from somewhere
                assert error(found.incoming, found.target_values) < 1e-4


@pytest.mark.parametrize(("family", "over"), BIDIRECTIONAL)
def test_edges_lead_back_where_attention_looks_at_later_tokens(family: str, over: dict[str, Any]) -> None:
    model = made(family, over)
    nodes, logits = some_nodes(model, (1, 3, 5)), torch.tensor([[2, 20]])
    found = direct_edges(model, IDS, nodes, logits)
    later = torch.cat([nodes[:, 1], torch.arange(len(IDS))]) > 2
    assert (found.weight[-1, later] != 0).sum() > 10
    # The last embedding by intervention, without autograd: patterns, norms and neurons held (method.md section 8, 4a).
    for target in [(model.n_layers, 2, 20), tuple(nodes[nodes[:, 0] == 2][0].tolist())]:
        row = -1 if target[0] == model.n_layers else int((nodes == torch.tensor(target)).all(1).nonzero())
        change = reference.nudge(model.module, torch.tensor([IDS]), (-1, 6), target, 0.5)
        assert change == pytest.approx(0.5 * float(found.weight[row, -1]), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("method", ["zero", "counterfactual"])
@pytest.mark.parametrize(("family", "over"), BIDIRECTIONAL[:3])
def test_edge_attributions_of_a_bidirectional_model_obey_their_identity(
    family: str, over: dict[str, Any], method: str
) -> None:
    """Identity 4a: what is at its baseline carries nothing; with baseline zero, share times the target's."""
    other = (*IDS[:5], 30, IDS[6]) if method == "counterfactual" else None
    prompt = tracer.Prompt(token_ids=IDS, target=7, counterfactual=other, positions=2)
    circuit = tracer.trace(made(family, over), prompt, 60, pruning=tracer.Pruning(share=0.0))
    nodes, edges = circuit.nodes.to_pylist(), circuit.edges.to_pylist()
    assert any(nodes[edge["source"]]["position"] > nodes[edge["target"]]["position"] for edge in edges)
    for edge in edges:
        source, target = nodes[edge["source"]], nodes[edge["target"]]
        if method == "zero":
            wanted = edge["share"] * target["attribution"]
            assert edge["attribution"] == pytest.approx(wanted, rel=1e-4, abs=1e-6)
        elif source["kind"] == "embedding" and source["position"] != 5:
            assert edge["attribution"] == 0


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_attention_that_only_a_module_says_is_not_causal_is_refused(family: str, kernel: str) -> None:
    module = t.tiny(family, attn=kernel)
    for part in module.modules():
        if hasattr(part, "is_causal"):
            vars(part)["is_causal"] = False
    with refused(ModelError, "is_causal", "later tokens"):
        tracer.load(module, tokenizer=t.tokenizer())


@pytest.mark.parametrize("family", ["gemma2", "gemma"])
def test_an_option_that_transformers_reads_by_halves_is_refused(family: str) -> None:
    """Gemma and Gemma 2 read it in their attention, not in their masks."""
    with refused(ModelError, "is_causal", repr(family)):
        made(family, {"use_bidirectional_attention": True})


@pytest.mark.parametrize("family", ["qwen3_5_hybrid", "olmo_hybrid"])
def test_a_delta_net_with_another_activation_than_its_rule_knows_is_refused(family: str) -> None:
    """It is the MLPs' as well, which have a rule for each; the convolution's has one for SiLU."""
    with refused(ModelError, "hidden_act='gelu'", "SiLU"):
        made(family, {"hidden_act": "gelu"})
    assert made(family, {"hidden_act": "swish"}).family.name


@pytest.mark.parametrize("family", ["stablelm", "nemotron"])
def test_a_mask_that_attention_is_not_told_of_is_refused(family: str) -> None:
    """Their sdpa would be causal for a prompt alone, and not for a padded one."""
    with refused(ModelError, "is_causal=False", "later tokens"):
        made(family, {"is_causal": False})
    assert made(family, {"is_causal": True}).family.name == family


@pytest.mark.parametrize(
    ("family", "over"),
    [
        ("olmo", {"clip_qkv": 8.0}),
        ("gpt2", {"add_cross_attention": True}),
        ("gpt2", {"reorder_and_upcast_attn": True}),
        ("gpt_bigcode", {"add_cross_attention": True, "multi_query": False}),
        ("gemma4", {"use_double_wide_mlp": True, "num_kv_shared_layers": 1}),
        ("gemma4", {"enable_moe_block": True, "num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 8}),
    ],
)
def test_an_option_that_no_step_describes_is_refused_by_name(family: str, over: dict[str, Any]) -> None:
    name = next(iter(over))
    with refused(ModelError, f"{name}={over[name]!r}"):
        made(family, over)


@pytest.mark.parametrize(
    ("family", "over"),
    [
        ("llama", {"attention_dropout": 0.5}),
        ("phi3", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attention_dropout": 0.5}),
        ("gpt_neox", {"hidden_dropout": 0.5, "attention_dropout": 0.5}),
        ("gpt2", {"attn_pdrop": 0.9, "resid_pdrop": 0.9, "embd_pdrop": 0.9}),
        ("llama", {"use_cache": False, "pretraining_tp": 2}),
        ("starcoder2", {"residual_dropout": 0.5, "embedding_dropout": 0.5, "attention_dropout": 0.5}),
        ("stablelm", {"hidden_dropout": 0.5}),
        ("phi", {"resid_pdrop": 0.5, "embd_pdrop": 0.5}),
    ],
)
def test_what_only_training_reads_changes_no_bit(family: str, over: dict[str, Any]) -> None:
    asked = Question().prompts()
    with_it, without = (tracer.attribute(model, asked).nodes for model in (made(family, over), load(family)))
    assert torch.equal(with_it, without)


# -------------------------------------------------------------------------------- tables that depend on length

LONG = [("phi3", phi3(5)), ("llama", {"rope_parameters": longrope(4, 4)}), ("phi3", phi3(2))]


def test_batches_end_at_a_border() -> None:
    assert [side(length, (5, 9)) for length in (1, 5, 6, 9, 10)] == [0, 0, 1, 1, 2]
    lengths = [3, 5, 6, 9, 4, 12]
    assert list(batches(lengths, 1, 10**6, (5, 9))) == [range(2), range(2, 4), range(4, 5), range(5, 6)]
    assert list(batches(lengths, 1, 10**6)) == [range(6)]
    assert chunked_alike(lengths, 2, lambda length: length > 5) == [[3, 5], [6, 9], [4], [12]]


def test_borders_are_read_from_every_kind_of_configuration() -> None:
    layered = {"rope_parameters": {SLIDING: longrope(3, 8), FULL: longrope(9, 8)}}
    assert made("gemma3", layered).borders == (3, 9)
    assert made("phi3", phi3(5)).borders == (5,)
    for family in t.FAMILIES:
        assert load(family).borders == ()
    assert made("llama", {"rope_parameters": YARN}).borders == ()  # one table, whatever the length


@pytest.mark.parametrize(("family", "over"), LONG)
def test_a_border_matters_to_the_model(family: str, over: dict[str, Any]) -> None:
    """Otherwise its tests would test nothing: transformers gives a short prompt other logits beside a long one."""
    model, (long, short) = made(family, over), Question(lengths=(7, 2)).ids()
    together = model.module(**Batch((long, short)).inputs("cpu")).logits[1, -1]
    alone = model.module(**Batch((short,)).inputs("cpu")).logits[0, -1]
    assert float((together - alone).abs().max()) > 1e-3


@pytest.mark.parametrize(("family", "over"), LONG)
def test_no_pass_takes_prompts_of_both_sides(family: str, over: dict[str, Any]) -> None:
    model, both = made(family, over), Batch(Question(lengths=(7, 2)).ids())
    for one_pass in (passes.logits, passes.values, passes.embedding):
        with pytest.raises(ValueError, match="must not share one"):
            one_pass(model, both)


@pytest.mark.parametrize(("family", "over"), LONG)
def test_means_over_references_of_both_sides(family: str, over: dict[str, Any]) -> None:
    model, rows = made(family, over), Question(lengths=(7, 3, 7, 2)).ids()
    got = mean_values(model, rows, 7, "activation")
    each = [passes.values(model, Batch((ids,)))[0][0] for ids in rows]
    for position in range(7):
        wanted = torch.stack([one[:, position] for one in each if one.shape[1] > position]).mean(0)
        assert error(got[:, position], wanted) < 1e-5


@pytest.mark.parametrize("method", ["relp", "exact", "ig-activation", "conductance"])
def test_every_method_keeps_the_sides_apart(method: str) -> None:
    model, rows = made(*LONG[0]), Question(lengths=(7, 3, 6)).ids()
    others = Question(lengths=(7, 3, 6), seed=4).ids()
    asked = [
        tracer.Prompt(token_ids=ids, target=7, counterfactual=other) for ids, other in zip(rows, others, strict=True)
    ]
    options: dict[str, Any] = {} if method in ("relp", "exact") else {"steps": 2}
    together = tracer.attribute(model, asked, method, **options)
    for row, prompt in enumerate(asked):
        alone = tracer.attribute(model, [prompt], method, **options)
        assert error(together.nodes[row, :, : len(rows[row])], alone.nodes[0]) < 1e-5


@pytest.mark.parametrize("falls", [False, True])
def test_rows_as_a_server_takes_them_keep_the_sides_apart(falls: bool) -> None:
    """One request, run here, for rows of both sides, and replacements of both."""
    model, rows = made(*LONG[0]), Question(lengths=(7, 3, 6, 2)).ids()
    others = Question(lengths=(7, 3, 6, 2), seed=4).ids()
    encoded = [encode(tracer.Prompt(token_ids=ids, target=7), model) for ids in rows]
    nodes = Ranking.of(torch.tensor([[1, 1, 3], [2, 0, 5]]))
    for to in (Replacement(others), Replacement((*others, rows[0]), mean=True)):
        asked = [AblatedRow(one, nodes, (0, 0, 2), other=0 if to.mean else row) for row, one in enumerate(encoded)]
        found = [
            measured(model, some, to, settings(metric="logit"), "activation", 2**30, falls=falls)
            for some in (asked, *([row] for row in asked))
        ]
        assert error(found[0], torch.cat(found[1:])) < 1e-5


def test_a_text_that_would_grow_over_a_border_is_refused() -> None:
    model = made("phi3", phi3(8))
    prompt = tracer.Prompt(token_ids=IDS, target=7)  # 7 tokens; the 2nd new token is chosen after 8, the 3rd after 9
    with refused(JobError, "max_new_tokens=3", "8 tokens", "max_new_tokens=2"):
        tracer.steer(model, [(1, 3)], prompt, factor=0, max_new_tokens=3, random=0)
    fits = tracer.steer(model, [(1, 3)], prompt, factor=0, max_new_tokens=2, random=0)
    ids, greedy = IDS, []
    for _ in range(2):
        greedy.append(int(passes.logits(model, Batch((ids,)))[0, -1].argmax()))
        ids = (*ids, greedy[-1])
    assert fits.unsteered is not None
    assert list(fits.unsteered.token_ids) == greedy[: len(fits.unsteered.token_ids)]
    longer = tracer.Prompt(token_ids=(*IDS, 12, 13), target=7)
    assert tracer.steer(model, [(1, 3)], longer, factor=0, max_new_tokens=5, random=0).unsteered is not None


@pytest.mark.parametrize(("family", "over"), BIDIRECTIONAL[:2])
def test_what_looks_at_later_tokens_is_said_and_writes_no_text(family: str, over: dict[str, Any]) -> None:
    model, prompt = made(family, over), tracer.Prompt(token_ids=IDS, target=7)
    with pytest.warns(tracer.TracerWarning, match="later tokens"):
        circuit = tracer.trace(model, prompt, 5)
    assert [text for text in circuit.warnings if "later tokens" in text]
    with refused(JobError, "max_new_tokens=1", "later tokens", "max_new_tokens=0"):
        tracer.steer(model, [(1, 3)], prompt, factor=0, max_new_tokens=1, random=0)
    assert tracer.steer(model, [(1, 3)], prompt, factor=0, max_new_tokens=0, random=0).steered is None


def test_dynamic_scaling_starts_beyond_what_is_read() -> None:
    """Transformers stretches `dynamic` tables above max_position_embeddings, and no prompt is longer."""
    plain, dynamic = load("llama"), fresh("llama", rope_parameters=DYNAMIC)
    asked = Question(lengths=(64, 20, 3)).prompts()
    assert torch.equal(tracer.attribute(dynamic, asked).nodes, tracer.attribute(plain, asked).nodes)
    with refused(JobError, "65 tokens", "at most 64"):
        tracer.attribute(dynamic, [tracer.Prompt(token_ids=[1] * 65, target=7)])
