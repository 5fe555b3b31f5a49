"""Checkpoints as they lie on disks: in pieces, in halves, of 8 and 4 bit, against weights that are known as floats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import tiny as t
import tracer
import truth
import wholes
from helpers import Question, refused
from tracer import ModelError
from tracer.model import quantised
from tracer.model.families import FAMILIES
from tracer.model.sizes import Shape
from tracer.settings import RULES

IDS = torch.tensor([[1, 5, 40, 41, 42, 43, 7, 9, 60]])
Formats = dict[str, Tensor]


def configure(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def replace(folder: Path, weights: Formats) -> None:
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


# ------------------------------------------------------------------------------------------- pieces and halves


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_in_pieces_is_the_model(tied: bool, tmp_path: Path) -> None:
    known = t.tiny("qwen2", tie_word_embeddings=tied)
    known.save_pretrained(tmp_path, max_shard_size="20KB")
    t.tokenizer().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2
    assert ("lm_head.weight" in index) != tied
    assert truth.close(tracer.load(tmp_path).module(input_ids=IDS).logits, known(input_ids=IDS).logits)


def test_a_piece_that_is_missing_is_refused(tmp_path: Path) -> None:
    t.tiny("qwen2").save_pretrained(tmp_path, max_shard_size="20KB")
    t.tokenizer().save_pretrained(tmp_path)
    sorted(tmp_path.glob("model-*.safetensors"))[1].unlink()
    with refused(ModelError, "model-00002", "complete"):
        tracer.load(tmp_path)


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_read_as_the_numbers_they_are(dtype: torch.dtype, field: str, tmp_path: Path) -> None:
    known, halved = t.tiny("llama"), cast(Any, t.tiny("llama"))
    t.save(halved.to(dtype), tmp_path)
    known.load_state_dict({name: value.to(dtype).float() for name, value in known.state_dict().items()})
    config = json.loads((tmp_path / "config.json").read_text())
    config[field] = config.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = tracer.load(tmp_path)
    assert (model.dtype, model.conserves) == (torch.float32, True)
    assert truth.close(model.module(input_ids=IDS).logits, known(input_ids=IDS).logits)


# ------------------------------------------------------------------------------------------------ 8 and 4 bit


def in_blocks(value: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight as fp8, the scale of each of its blocks, and the floats that these are."""
    cut = value.reshape(value.shape[0] // rows, rows, value.shape[1] // columns, columns)
    scale = cut.abs().amax((1, 3)) / 448
    stored = (cut / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    return stored.reshape(value.shape), scale, (stored.float() * scale[:, None, :, None]).reshape(value.shape)


def blocks(value: Tensor) -> tuple[Formats, Tensor]:
    stored, scale, floats = in_blocks(value, 16, 16)
    return {"weight": stored, "weight_scale_inv": scale}, floats


def static(value: Tensor) -> tuple[Formats, Tensor]:
    scale = value.abs().max() / 448
    stored = (value / scale).to(torch.float8_e4m3fn)
    held = {"weight": stored, "weight_scale_inv": scale, "activation_scale": torch.tensor(0.01)}
    return held, stored.float() * scale


def exponents(value: Tensor) -> tuple[Formats, Tensor]:
    """MXFP8: a power of two for each 16 of a row, as its biased exponent."""
    cut = value.reshape(len(value), -1, 16)
    power = (cut.abs().amax(-1) / 448).log2().ceil()
    stored = (cut / power.exp2()[..., None]).to(torch.float8_e4m3fn)
    held = {"weight": stored.reshape(value.shape), "weight_scale_inv": (power + 127).to(torch.uint8)}
    return held, (stored.float() * power.exp2()[..., None]).reshape(value.shape)


FP8 = {
    "blocks": (blocks, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}),
    "static": (static, {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}),
    "exponents": (exponents, {"quant_method": "mxfp8", "activation_scheme": "dynamic", "weight_block_size": [1, 16]}),
}


def in_eight_bits(known: Any, folder: Path, form: str, inside: str = "") -> Any:
    """Write the model's projections (those whose name has `inside`) as fp8, and give it the floats that they are."""
    convert, fields = FP8[form]
    known.save_pretrained(folder)
    t.tokenizer().save_pretrained(folder)
    written, floats = {}, {}
    for name, value in known.state_dict().items():
        if inside in name and name.endswith("proj.weight") and value.ndim == 2 and "modal" not in name:
            held, floats[name] = convert(value)
            written |= {name.replace("weight", part): one.contiguous() for part, one in held.items()}
        else:
            written[name] = value.clone()
    replace(folder, written)
    left = ["lm_head", "model.vision_tower", "model.multi_modal_projector"]
    configure(folder, quantization_config={**fields, "modules_to_not_convert": left})
    assert len(floats) >= 14
    known.load_state_dict(floats, strict=False)
    return known


@pytest.mark.parametrize("form", FP8)
def test_weights_of_eight_bits_are_read_as_the_floats_they_are(form: str, tmp_path: Path) -> None:
    known = in_eight_bits(t.tiny("llama"), tmp_path, form)
    with pytest.warns(tracer.TracerWarning, match=r"fp8 and are dequantised to float32"):
        model = tracer.load(tmp_path)
    assert {value.dtype for value in model.module.parameters()} == {torch.float32}
    assert truth.close(model.module(input_ids=IDS).logits, known(input_ids=IDS).logits)
    assert model.conserves
    assert model.replays(RULES)


def test_a_circuit_of_weights_of_eight_bits_conserves(tmp_path: Path) -> None:
    known = in_eight_bits(t.tiny("llama"), tmp_path, "blocks")
    model = tracer.load(tmp_path)
    asked = Question(metric="difference")
    rows = torch.stack([known(input_ids=torch.tensor([ids])).logits[0, -1] for ids in asked.ids()])
    ends = zip(rows, asked.targets, asked.foils, strict=True)
    wanted = torch.cat([row[list(target)] - row[list(foil)] for row, target, foil in ends])
    result = tracer.attribute(model, asked.prompts(), baseline="zero")
    assert truth.close(result.metric, wanted, of=rows)
    assert truth.close(result.embeddings.sum(1), wanted, of=rows)


def test_weights_of_eight_bits_are_read_in_halves_too(tmp_path: Path) -> None:
    in_eight_bits(t.tiny("llama"), tmp_path, "blocks")  # whose norms are float32
    model = tracer.load(tmp_path, dtype="bfloat16")
    assert {value.dtype for value in model.module.parameters()} == {torch.bfloat16}
    assert model.module(input_ids=IDS).logits.isfinite().all()
    assert Shape.of(str(tmp_path), dtype="bfloat16").weight_bytes == Shape.of_model(model).weight_bytes


def test_the_text_part_of_a_whole_of_eight_bits_is_read(tmp_path: Path) -> None:
    known = in_eight_bits(wholes.whole("mistral3"), tmp_path, "static", "language_model")
    model = tracer.load(tmp_path)
    assert truth.close(model.module(input_ids=IDS).logits, known(input_ids=IDS).logits)
    assert model.conserves


def test_a_scale_that_is_missing_is_refused(tmp_path: Path) -> None:
    in_eight_bits(t.tiny("llama"), tmp_path, "blocks")
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight_scale_inv"]
    replace(tmp_path, weights)
    with refused(ModelError, "weight model.layers.1.mlp.up_proj.weight", "still float8_e4m3fn"):
        tracer.load(tmp_path)


def test_weights_of_eight_bits_that_the_configuration_does_not_tell_of_are_refused(tmp_path: Path) -> None:
    in_eight_bits(t.tiny("llama"), tmp_path, "blocks")
    configure(tmp_path, quantization_config=None)
    with refused(ModelError, "no place for 21 weights", "weight_scale_inv"):
        tracer.load(tmp_path)


CODES = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""The numbers of 4 bits, e2m1."""


def in_four_bits(shape: tuple[int, int, int], draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks and scales of a random MXFP4 weight [expert, out, in], and the floats that they are."""
    experts, rows, columns = shape
    codes = torch.randint(16, shape, generator=draw)
    powers = torch.randint(-4, -1, (experts, rows, columns // 32), generator=draw)
    floats = CODES[codes] * powers.repeat_interleave(32, -1).float().exp2()
    pairs = codes.reshape(experts, rows, columns // 32, 16, 2)
    return (pairs[..., 0] + 16 * pairs[..., 1]).to(torch.uint8), (powers + 127).to(torch.uint8), floats


@pytest.fixture
def four_bits(tmp_path: Path) -> Any:
    """A tiny gpt-oss in `tmp_path` whose experts are MXFP4, and the same model with the floats that they are."""
    sizes = {"vocab_size": t.VOCAB, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
    parts = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    masks = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4, "max_position_embeddings": 64}
    special = {"pad_token_id": t.PAD, "bos_token_id": t.BOS, "eos_token_id": t.EOS}
    config = AutoConfig.for_model("gpt_oss", **sizes, **parts, **masks, **special, rope_parameters=None)
    known: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    draw = torch.Generator().manual_seed(0)
    for name, value in known.named_parameters():
        value.data.copy_(0.3 * torch.randn(value.shape, generator=draw) + (value.ndim == 1 and "norm" in name))
    known.eval().requires_grad_(False).save_pretrained(tmp_path)
    t.tokenizer().save_pretrained(tmp_path)
    written = {name: value.clone() for name, value in known.state_dict().items()}
    for name in [name for name in written if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = written.pop(name).shape  # in memory they are [expert, in, out]
        packed, scales, floats = in_four_bits((experts, rows, columns), draw)
        written |= {f"{name}_blocks": packed, f"{name}_scales": scales}
        known.get_parameter(name).data.copy_(floats.transpose(1, 2))
    replace(tmp_path, written)
    left = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    configure(tmp_path, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": left})
    return known


def test_experts_of_four_bits_are_read_as_the_floats_they_are(four_bits: Any, tmp_path: Path) -> None:
    if "gpt_oss" in FAMILIES:
        model = tracer.load(tmp_path)
        module = model.module
        assert model.replays(RULES)
    else:
        config = AutoConfig.from_pretrained(tmp_path)
        (said,) = quantised.prepare(config, "it", torch.float32)
        assert said == "the weights of it are mxfp4 and are dequantised to float32"
        module = AutoModelForCausalLM.from_pretrained(tmp_path, config=config, dtype=torch.float32)
        quantised.settle(module, "it", torch.float32)
    assert getattr(module.config, "quantization_config", None) is None
    assert {value.dtype for value in module.parameters()} == {torch.float32}
    for name, value in four_bits.named_parameters():
        assert torch.equal(module.get_parameter(name), value), name
    assert truth.close(module(input_ids=IDS).logits, four_bits(input_ids=IDS).logits)


# ------------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "quanto", "exl2"])
def test_other_formats_are_refused_by_name_before_weights_are_read(method: str, tmp_path: Path) -> None:
    t.save(t.tiny("llama"), tmp_path)
    configure(tmp_path, quantization_config={"quant_method": method, "bits": 4})
    for ask in (tracer.load, Shape.of):
        with refused(ModelError, f"quantised by '{method}'", "read are fp8, mxfp8, mxfp4", "as floats"):
            ask(str(tmp_path))  # type: ignore[operator]


def test_what_is_dequantised_is_not_quantised_again(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    in_eight_bits(t.tiny("llama"), tmp_path, "blocks")
    with refused(ModelError, "dtype", "dequantised when they are read", "bfloat16"):
        tracer.load(tmp_path, dtype="nf4")
