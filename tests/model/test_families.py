"""Where the parts are, against the oracle's own search; what no rule covers is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import reference as ref
import tiny as t
import tracer
from helpers import load, refused
from tracer import ModelError
from tracer.model.families import FAMILIES, family_of
from tracer.testing.configs import OPTIONS

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
UNSUPPORTED = {
    "opt": {"ffn_dim": 16, "word_embed_proj_dim": 16},
    "bloom": {},
    "xglm": {"d_model": 16, "ffn_dim": 16, "num_layers": 1, "attention_heads": 2},
    "mamba": {},
}


def unsupported(kind: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **UNSUPPORTED[kind]))


KINDS = "neurons", "activation", "attention"


@pytest.mark.parametrize("family", t.FAMILIES)
def test_the_parts_are_where_the_oracle_finds_them(family: str) -> None:
    module = t.tiny(family)
    found = family_of(module, module.config)
    assert module.get_submodule(found.embedding) is module.get_input_embeddings()
    assert module.get_submodule(found.head) is module.get_output_embeddings()
    blocks = list(module.get_submodule(found.blocks).children())
    pairs = list(zip(blocks, found.laid_out(module), strict=True))
    paths = [{step.kind.replace("delta", "attention"): step.path for step in laid.steps} for _, laid in pairs]
    parts = {
        kind: [block.get_submodule(path[kind]) for (block, _), path in zip(pairs, paths, strict=True)] for kind in KINDS
    }
    assert parts["neurons"] == [mlp.down for mlp in ref.mlps(module)]
    assert parts["activation"] == [mlp.act for mlp in ref.mlps(module)]
    assert parts["attention"] == [part.module for part in ref.attentions(module)]


@pytest.mark.parametrize("family", t.FAMILIES)
def test_every_norm_has_a_step(family: str) -> None:
    module = t.tiny(family)
    found = family_of(module, module.config)
    pairs = zip(module.get_submodule(found.blocks).children(), found.laid_out(module), strict=True)
    norms = [(block, step) for block, laid in pairs for step in laid.steps if step.kind.endswith("_norm")]
    named = [block.get_submodule(step.path) for block, step in norms]
    named.append(module.get_submodule(found.final_norm.path))
    assert set(named) == set(ref.norms(module))
    assert len(named) == len(set(named))


@pytest.mark.parametrize("family", t.FAMILIES)
def test_the_half_rule_is_there_exactly_for_gated_mlps(family: str) -> None:
    module = t.tiny(family)
    found = family_of(module, module.config)
    gated = ref.mlps(module)[0].project(torch.zeros(1, 32))[1] is not None
    assert any(step.kind == "product" for step in found.laid_out(module)[0].steps) == gated


def test_all_families_are_tested() -> None:
    assert set(OPTIONS) == set(FAMILIES)  # each by tests/testing
    dense = {name for name, family in FAMILIES.items() if all(layout.experts is None for layout in family.layouts)}
    assert {t._config(family, 1)[0] for family in t.FAMILIES} == dense


@pytest.mark.parametrize("kind", sorted(UNSUPPORTED))
def test_an_unsupported_architecture_is_refused_by_module_and_what_to_add(kind: str) -> None:
    module = unsupported(kind)
    with refused(ModelError, repr(kind), "tracer/model/families.py", "tracer/model/rules.py", "llama") as _:
        tracer.load(module, tokenizer=t.tokenizer(64))
    with pytest.raises(ModelError) as caught:
        tracer.load(module, tokenizer=t.tokenizer(64))
    assert any(path and f"{path} ({type(part).__name__})" in str(caught.value) for path, part in module.named_modules())


def test_an_unsupported_folder_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    t.save(unsupported("opt"), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    with refused(ModelError, "'opt'", "tracer/model/families.py"):
        tracer.load(tmp_path)


@pytest.mark.parametrize("act", ["hardswish", "tanh", "laplace", "relu6", "sigmoid"])
def test_an_unknown_activation_is_refused(act: str, tmp_path: Path) -> None:
    module = t.tiny("llama", hidden_act=act)
    with refused(ModelError, "model.layers.0.mlp.act_fn", "FACTORS in tracer/model/rules.py"):
        tracer.load(module, tokenizer=t.tokenizer())
    with refused(ModelError, "model.layers.0.mlp.act_fn"):
        tracer.load(t.save(module, tmp_path))


def test_a_module_no_rule_covers_is_refused() -> None:
    for extra in (torch.nn.Tanh(), torch.nn.Softmax(dim=-1), torch.nn.LayerNorm(32), torch.nn.ReLU()):
        module = t.tiny("llama")
        module.model.layers[1].mlp.extra = extra
        with refused(ModelError, "model.layers.1.mlp.extra", type(extra).__name__, "tracer/model/rules.py"):
            tracer.load(module, tokenizer=t.tokenizer())


def test_a_replaced_module_is_refused() -> None:
    """A container with children of its own must not hide a nonlinearity, nor a norm its kind."""
    module = t.tiny("llama")
    module.model.layers[0].mlp.act_fn = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Tanh())
    with refused(ModelError, "model.layers.0.mlp.act_fn"):
        tracer.load(module, tokenizer=t.tokenizer())
    module = t.tiny("llama")
    module.model.norm = torch.nn.LayerNorm(32)
    with refused(ModelError, "model.norm", "LayerNorm"):
        tracer.load(module, tokenizer=t.tokenizer())


def test_a_linear_map_that_is_also_a_neuron_step_needs_no_rule() -> None:
    assert family_of(t.tiny("gpt2"), t.tiny("gpt2").config).name == "gpt2"


@pytest.mark.parametrize("option", ["add_cross_attention", "reorder_and_upcast_attn"])
def test_an_option_no_step_describes_is_refused(option: str) -> None:
    over: dict[str, Any] = {option: True}
    with refused(ModelError, f"{option}=True"):
        tracer.load(t.tiny("gpt2", **over), tokenizer=t.tokenizer())


def test_the_wrapped_model_knows_its_family() -> None:
    assert load("gemma3").family is FAMILIES["gemma3_text"]


SSM = {"intermediate_size": 32, "mamba_d_state": 8, "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_n_groups": 1}
HYBRIDS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "bamba": (
        {**SSM, "attn_layer_indices": [1], "num_key_value_heads": 1},
        ("3 layers", "(0, 2, 3)", "recurrent state"),
    ),
    "falcon_h1": ({**SSM, "mamba_d_ssm": 32, "num_key_value_heads": 1}, ("4 layers", "(0, 1, 2, 3)", "beside")),
    "lfm2": (
        {"intermediate_size": 32, "num_key_value_heads": 1, "full_attn_idxs": [2]},
        ("3 layers", "'conv'", "(0, 1, 3)", "three factors"),
    ),
    "recurrent_gemma": (
        {"intermediate_size": 32, "head_dim": 8, "lru_width": 16, "num_key_value_heads": 1},
        ("3 layers", "'recurrent'", "(0, 1, 3)", "no rule covers"),
    ),
}
"""Hybrids: what their configuration needs, and what is said of which layers."""


@pytest.mark.parametrize("kind", sorted(HYBRIDS))
def test_a_hybrid_is_refused_with_its_layers_and_what_they_have(kind: str) -> None:
    options, parts = HYBRIDS[kind]
    config = AutoConfig.for_model(kind, **{**SMALL, "num_hidden_layers": 4, **options})
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config)
    with refused(ModelError, repr(kind), *parts):
        family_of(module, config)
