"""GGUF files: what is loaded is the module that was written, in every quantisation; and what is refused, in words."""

from __future__ import annotations

import hashlib
import importlib.util
import random
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf as written_by
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter
from gguf.quants import dequantize
from huggingface_hub import constants
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.integrations.gguf import dequant

import ggufs
import tiny as t
import tracer
from helpers import refused
from tracer import ModelError
from tracer.errors import TracerWarning, surface
from tracer.model import gguf
from tracer.model.model import read_tokenizer, skeleton
from tracer.model.sizes import Shape
from truth import close

WIDE = {"hidden_size": 64, "intermediate_size": 96}
"""Rows of whole blocks of 32, in unequal numbers."""
LEVELS = {Type.Q8_0: 127, Type.Q5_0: 16, Type.Q4_0: 8, Type.Q5_1: 31, Type.Q4_1: 15}
"""Into how many steps a block's largest magnitude, or its range, is cut."""
SCALES = {
    Type.Q2_K: (80, 82),
    Type.Q3_K: (108,),
    Type.Q4_K: (0, 2),
    Type.Q5_K: (0, 2),
    Type.Q6_K: (208,),
    Type.IQ2_XXS: (0,),
    Type.IQ2_XS: (0,),
    Type.IQ2_S: (0,),
    Type.IQ3_XXS: (0,),
    Type.IQ3_S: (0,),
    Type.IQ1_S: (0,),
    Type.IQ4_NL: (0,),
    Type.IQ4_XS: (0,),
}
"""Where a block's scales are, in float16, of types that gguf does not quantise to."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one file, of a tiny Llama."""
    folder = tmp_path_factory.mktemp("one")
    ggufs.write(ggufs.tiny("llama"), folder / "tiny.gguf", "llama")
    return folder


def logits(module: Any) -> torch.Tensor:
    with torch.no_grad():
        return module(torch.arange(4, 14)[None]).logits


def as_written(model: PreTrainedModel, written: dict[str, np.ndarray], kind: Type, architecture: str) -> None:
    """The module with the weights that a file holds, by gguf's own arithmetic and this test's names."""
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        raw, shape = written[ggufs.place(name, architecture)], value.shape
        turned = shape[::-1] if architecture == "gpt2" and value.ndim == 2 and ".h." in name else shape
        held = torch.from_numpy(dequantize(raw, kind if raw.dtype != np.float32 else Type.F32).reshape(turned).copy())
        value.copy_(back(name, held, architecture, model.config))


def back(name: str, value: torch.Tensor, architecture: str, config: Any) -> torch.Tensor:
    """`ggufs.turned`, undone."""
    if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        return value.reshape(heads, -1, 2, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return value - 1
    return value.T if architecture == "gpt2" and value.ndim == 2 and ".h." in name else value


# -------------------------------------------------------------------------------------------- the same model


@pytest.mark.parametrize("architecture", ggufs.ARCHITECTURES)
def test_a_file_of_float32_is_the_module_it_was_written_from(architecture: str, tmp_path: Path) -> None:
    module = ggufs.tiny(architecture)
    ggufs.write(module, tmp_path / "m.gguf", architecture)
    model = tracer.load(tmp_path / "m.gguf")
    assert model.warnings == ()
    mine, wanted = model.module.state_dict(), module.state_dict()
    assert mine.keys() == wanted.keys()
    for name, value in wanted.items():  # 1 is added to Gemma's norms in the file, in float32
        tolerance = 2e-7 if architecture.startswith("gemma") and "norm" in name else 0
        assert torch.allclose(mine[name], value, rtol=0, atol=tolerance), name
    close(logits(model.module), logits(module))
    assert model.family.name == module.config.model_type
    assert model.dtype == torch.float32
    assert getattr(model.config, "quantization_config", None) is None
    assert model.conserves == (architecture not in ("qwen2", "gpt2"))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "gemma3", "gpt2"])
def test_a_file_is_read_as_transformers_itself_reads_it(architecture: str, tmp_path: Path) -> None:
    over = {"n_inner": 4 * 32} if architecture == "gpt2" else {}  # it takes no other, and 1,024 positions
    over |= {"n_positions": 1024} if architecture == "gpt2" else {}
    ggufs.write(ggufs.tiny(architecture, **over), tmp_path / "m.gguf", architecture, Type.Q8_0)
    model = tracer.load(tmp_path)
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    for name, value in theirs.state_dict().items():
        assert torch.equal(model.module.state_dict()[name], value), name
    config = AutoConfig.from_pretrained(tmp_path, gguf_file="m.gguf").to_dict()
    mine = model.config.to_dict()
    given = ("_name_or_path", "dtype", "n_positions", "n_inner", "head_dim")
    assert {k: v for k, v in config.items() if k not in given} == {k: mine[k] for k in config if k not in given}
    text, their_own = "The keys near the cabinet", AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert model.tokenizer(text).input_ids == their_own(text).input_ids


@pytest.mark.parametrize("kind", [Type.F16, Type.BF16, *LEVELS])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_quantised_weights_are_those_in_the_file_and_near_the_module(
    architecture: str, kind: Type, tmp_path: Path
) -> None:
    over = {"n_embd": 64, "n_inner": 96} if architecture == "gpt2" else WIDE
    module = ggufs.tiny(architecture, **over)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    written = ggufs.write(module, tmp_path / "m.gguf", architecture, kind)
    model = tracer.load(tmp_path / "m.gguf")
    as_written(module, written, kind, architecture)
    quantised = 0
    for name, value in model.module.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name
        if torch.equal(value, before[name]):
            continue
        quantised += value.ndim == 2
        near = (value - before[name]).abs().flatten()
        if kind not in LEVELS:
            assert bool((near <= before[name].abs().flatten() * 2 ** (-8 if kind == Type.BF16 else -11) + 2e-7).all())
        elif value.ndim == 2:
            parts = (before[name].numpy(), (value - before[name]).numpy())
            rows, off = (ggufs.turned(name, one, architecture, module.config).reshape(-1, 32) for one in parts)
            ranged = kind in (Type.Q4_1, Type.Q5_1)
            size = rows.max(1) - rows.min(1) if ranged else abs(rows).max(1)
            assert bool((abs(off).max(1) <= 1.01 * size / LEVELS[kind]).all()), name
    assert quantised > 10
    close(logits(model.module), logits(module))
    assert model.gguf is not None
    assert model.gguf.types == (kind.name, "F32")


@pytest.mark.parametrize("kind", SCALES, ids=lambda kind: kind.name)
def test_blocks_of_llama_cpp_are_dequantised_as_transformers_does_it(kind: Type, tmp_path: Path) -> None:
    """Random blocks; the oracle is transformers' arithmetic in torch, the file is read with llama.cpp's in numpy."""
    module = ggufs.tiny("qwen2", n_layers=1, hidden_size=256, intermediate_size=256)
    values, size = written_by.GGML_QUANT_SIZES[kind]
    draw, blocks = np.random.default_rng(0), dict[str, np.ndarray]()
    for name, value in module.state_dict().items():
        if value.ndim != 2:
            continue
        raw = draw.integers(0, 256, (value.shape[0], value.shape[1] // values, size), dtype=np.uint8)
        for at in SCALES[kind]:
            scales = draw.uniform(1, 2, raw.shape[:2]).astype(np.float16) * np.float16(2**-12)
            raw[..., at : at + 2] = scales[..., None].view(np.uint8)
        blocks[name] = raw.reshape(value.shape[0], -1)
        value.copy_(dequant.dequantize(torch.from_numpy(raw.reshape(-1, size)), int(kind)).reshape(value.shape))
    ggufs.write(module, tmp_path / "m.gguf", "qwen2", kind, blocks)
    model = tracer.load(tmp_path / "m.gguf")
    for name, value in model.module.state_dict().items():
        torch.testing.assert_close(value, module.state_dict()[name], rtol=1e-6, atol=1e-9)
    assert model.gguf is not None
    assert model.gguf.types == (kind.name, "F32")


def test_a_circuit_of_a_file_is_that_of_the_same_weights_in_a_folder(tmp_path: Path) -> None:
    module = ggufs.tiny("gemma3", **WIDE)
    as_written(module, ggufs.write(module, tmp_path / "m.gguf", "gemma3", Type.Q8_0), Type.Q8_0, "gemma3")
    t.save(module, tmp_path / "folder")
    prompt = tracer.Prompt(token_ids=[1, 33, 37, 41], target=52, foil=45)
    here, there = (tracer.trace(tracer.load(tmp_path / name), prompt, nodes=20) for name in ("m.gguf", "folder"))
    assert here.nodes.drop_columns("token").equals(there.nodes.drop_columns("token"))  # the folder's are others
    names = ["source_name", "target_name"]
    assert here.edges.drop_columns(names).equals(there.edges.drop_columns(names))
    assert here.metric == there.metric


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float64"])
def test_weights_are_dequantised_to_the_dtype_that_is_asked_for(name: str, place: Path) -> None:
    model, dtype = tracer.load(place, dtype=name), getattr(torch, name)
    for parameter, value in ggufs.tiny("llama").state_dict().items():
        assert torch.equal(model.module.state_dict()[parameter], value.to(dtype)), parameter
    assert model.dtype == dtype


def test_an_adapter_is_merged_into_dequantised_weights(place: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    how = {"target_modules": ["v_proj", "up_proj"], "r": 2, "init_lora_weights": False}
    settings = peft.LoraConfig(task_type="CAUSAL_LM", **how)
    whole = peft.get_peft_model(ggufs.tiny("llama"), settings)
    whole.save_pretrained(str(tmp_path))
    model = tracer.load(place / "tiny.gguf", adapter=tmp_path)
    close(logits(model.module), logits(whole.eval()))
    assert (model.record().adapter, model.gguf is None) == (str(tmp_path), False)


# ---------------------------------------------------------------------------------------------- what is recorded


def test_the_record_holds_the_file_and_old_records_are_read(place: Path) -> None:
    record = tracer.load(place).record()
    assert record.gguf is not None
    assert record.gguf.sha256 == hashlib.sha256((place / "tiny.gguf").read_bytes()).hexdigest()
    assert (record.gguf.file, record.gguf.types) == ("tiny.gguf", ("F32",))
    assert type(record).model_validate_json(record.model_dump_json()) == record
    plain = tracer.load("demo").record()
    assert "gguf" not in plain.model_dump()
    assert type(plain).model_validate(plain.model_dump()) == plain


def test_a_record_loads_the_same_file_again_where_others_have_come(place: Path, tmp_path: Path) -> None:
    content = (place / "tiny.gguf").read_bytes()
    (tmp_path / "tiny.gguf").write_bytes(content)
    records = [tracer.load(name).record() for name in (tmp_path, tmp_path / "tiny.gguf")]
    (tmp_path / "another.gguf").write_bytes(content)
    for record in records:
        assert tracer.load(record.name, **record.loading()).record() == record


def test_a_tokenizer_of_a_file_puts_no_bos_first_and_that_is_said(place: Path) -> None:
    model = tracer.load(place)
    with pytest.warns(TracerWarning, match="<bos>.*beginning-of-sequence token, is not put first by its tokenizer"):
        circuit = tracer.trace(model, tracer.Prompt("The keys near the cabinet", target=" are", foil=" is"), nodes=5)
    assert circuit.tokens[0] == "The"
    with_it = tracer.Prompt("The keys near the cabinet", target=" are", foil=" is", bos=True)
    assert tracer.trace(model, with_it, nodes=5).tokens[:2] == ("<bos>", "The")


def test_a_saved_circuit_names_the_file(place: Path, tmp_path: Path) -> None:
    model = tracer.load(place)
    circuit = tracer.trace(model, tracer.Prompt(token_ids=[1, 33, 37], target=52), nodes=5)
    circuit.save(tmp_path / "run")
    again = tracer.Circuit.load(tmp_path / "run")
    assert again.model == model.record()
    assert again.model.gguf is not None
    assert again.model.shown == f"{place}, read from F32 (tiny.gguf, SHA-256 {again.model.gguf.sha256[:12]})"


def test_a_plan_counts_dequantised_weights_and_not_the_file(tmp_path: Path) -> None:
    ggufs.write(ggufs.tiny("gemma3", **WIDE), tmp_path / "m.gguf", "gemma3", Type.Q4_0)
    name = str(tmp_path / "m.gguf")
    shape, model = Shape.of(name), tracer.load(name)
    weights = sum(value.numel() * 4 for value in model.module.parameters())
    assert shape.weight_bytes == Shape.of_model(model).weight_bytes == weights
    assert weights > 2 * (tmp_path / "m.gguf").stat().st_size
    assert Shape.of(name, dtype="bfloat16").weight_bytes == weights / 2
    assert shape.checkpoint_bytes == 4 * max(value.numel() for value in model.module.parameters())
    assert read_tokenizer(name)("The keys").input_ids == model.tokenizer("The keys").input_ids


# -------------------------------------------------------------------------------------------- which file


def test_a_folder_of_one_file_is_that_file(place: Path, tmp_path: Path) -> None:
    by_file, by_folder = tracer.load(place / "tiny.gguf"), tracer.load(place)
    assert by_file.fingerprint == by_folder.fingerprint == tracer.load(place, gguf_file="tiny.gguf").fingerprint


def test_what_lies_beside_the_file_is_said_not_to_be_read(place: Path, tmp_path: Path) -> None:
    t.save(t.tiny("llama"), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "tiny.gguf").write_bytes((place / "tiny.gguf").read_bytes())
    with pytest.warns(TracerWarning, match="also holds config.json, tokenizer.json, not read: .* the GGUF file"):
        model = tracer.load(tmp_path)
    assert model.vocab_size == len(ggufs.tokens("llama")[0])


def test_weights_in_safetensors_come_first_unless_the_file_is_named(place: Path, tmp_path: Path) -> None:
    t.save(t.tiny("llama"), tmp_path)
    (tmp_path / "tiny.gguf").write_bytes((place / "tiny.gguf").read_bytes())
    assert tracer.load(tmp_path).gguf is None
    assert tracer.load(tmp_path, gguf_file="tiny.gguf").gguf is not None


def test_several_files_are_named_with_the_option_that_chooses(place: Path, tmp_path: Path) -> None:
    for name in ("a-Q4_0.gguf", "b-Q8_0.gguf"):
        (tmp_path / name).write_bytes((place / "tiny.gguf").read_bytes())
    for ask in (tracer.load, Shape.of, read_tokenizer):
        with refused(ModelError, "2 GGUF files: a-Q4_0.gguf, b-Q8_0.gguf", "gguf_file='a-Q4_0.gguf'"):
            ask(str(tmp_path))
    with surface("shell"), refused(ModelError, "--gguf-file a-Q4_0.gguf"):
        tracer.load(tmp_path)
    assert tracer.load(tmp_path, gguf_file="b-Q8_0.gguf").gguf is not None


@pytest.mark.parametrize(
    ("file", "parts"),
    [
        ("none.gguf", ("none.gguf", "is not in", "give one of tiny.gguf")),
        ("tiny.bin", ("tiny.bin", ".gguf file")),
        ("../one/tiny.gguf", ("../one/tiny.gguf", "must be inside")),
        ("/tmp/tiny.gguf", ("/tmp/tiny.gguf", "must be inside")),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(file: str, parts: tuple[str, ...], place: Path) -> None:
    with refused(ModelError, *parts):
        tracer.load(place, gguf_file=file)


def test_a_name_of_a_file_has_no_effect_on_another_file_or_a_folder_without(place: Path, tmp_path: Path) -> None:
    with refused(ModelError, "gguf_file='tiny.gguf'", "has no effect"):
        tracer.load(place / "tiny.gguf", gguf_file="tiny.gguf")
    with refused(ModelError, "gguf_file='tiny.gguf'", "holds no .gguf file"):
        tracer.load(tmp_path, gguf_file="tiny.gguf")
    with refused(ModelError, "does not exist"):
        tracer.load(tmp_path / "none", gguf_file="tiny.gguf")
    with refused(ModelError, "gguf_file='tiny.gguf'", "has no effect on a module in memory"):
        tracer.load(t.tiny("llama"), gguf_file="tiny.gguf", tokenizer=t.tokenizer())


def test_a_file_of_a_hugging_face_id_is_named(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "models--some--tiny-GGUF" / "snapshots" / ("0" * 40)
    (there / "Q8").mkdir(parents=True)
    (there.parents[1] / "refs").mkdir()
    (there.parents[1] / "refs" / "main").write_text("0" * 40)
    (there / "Q8" / "tiny.gguf").write_bytes((place / "tiny.gguf").read_bytes())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = tracer.load("some/tiny-GGUF", gguf_file="Q8/tiny.gguf")
    record = model.record()
    assert model.fingerprint == tracer.load(place).fingerprint
    assert (record.name, record.loading()) == ("some/tiny-GGUF", {"gguf_file": "Q8/tiny.gguf"})
    assert replace(Shape.of("some/tiny-GGUF", gguf_file="Q8/tiny.gguf"), name="") == replace(
        Shape.of(str(place)), name=""
    )
    with refused(ModelError, "gguf_file='none.gguf'", "is not in model 'some/tiny-GGUF'"):
        tracer.load("some/tiny-GGUF", gguf_file="none.gguf")
    with refused(ModelError, "'some/tiny-GGUF'", "no config.json", "gguf_file='NAME.gguf'"):
        tracer.load("some/tiny-GGUF")


def test_a_server_runs_no_file(place: Path) -> None:
    with refused(ModelError, "GGUF", "no server"):
        skeleton(place)
    with refused(ModelError, "gguf_file='tiny.gguf'", "no server"):
        tracer.load(str(place), gguf_file="tiny.gguf", remote=True)


# -------------------------------------------------------------------------------------------- what is refused


def attribute(key: str, value: Any) -> Callable[[GGUFWriter], None]:
    """A change of the metadata."""

    def change(writer: GGUFWriter) -> None:
        adds: Any = ((str, writer.add_string), (bool, writer.add_bool), (int, writer.add_uint32))
        for kind, add in adds:
            if isinstance(value, kind):
                for data in writer.kv_data:
                    data.pop(key, None)
                return add(key, value)
        return writer.add_float32(key, value) if isinstance(value, float) else writer.add_array(key, value)

    return change


def tensor(name: str) -> Callable[[GGUFWriter], None]:
    return lambda writer: writer.add_tensor(name, np.ones(4, np.float32))


REFUSED: dict[str, tuple[str, Callable[[GGUFWriter], Any], tuple[str, ...]]] = {
    "scaled rotary frequencies": ("llama", tensor("rope_freqs.weight"), ("no place", "rope_freqs.weight", "rotary")),
    "biases": ("llama", tensor("blk.0.attn_q.bias"), ("no place", "blk.0.attn_q.bias")),
    "experts": ("llama", attribute("llama.expert_count", 8), ("llama.expert_count=8", "safetensors")),
    "linear scaling": ("gemma3", attribute("gemma3.rope.scaling.factor", 8.0), ("rope.scaling.factor=8.0",)),
    "yarn": ("qwen2", attribute("qwen2.rope.scaling.type", "yarn"), ("rope.scaling.type='yarn'",)),
    "a window": ("llama", attribute("llama.attention.sliding_window", 5), ("sliding_window=5", "has None")),
    "part of a head turned": ("qwen2", attribute("qwen2.rope.dimension_count", 4), ("rope.dimension_count=4",)),
    "other caps": ("gemma2", attribute("gemma2.final_logit_softcapping", 20.0), ("final_logit_softcapping=20.0",)),
    "looking ahead": ("qwen2", attribute("qwen2.attention.causal", False), ("attention.causal=False",)),
    "layers that differ": ("llama", attribute("llama.attention.head_count", [4, 2, 4]), ("[4, 2, 4]", "one number")),
    "too many layers": ("gemma3", attribute("gemma3.block_count", 2**31), ("block_count=2147483648",)),
    "other sizes": ("llama", attribute("llama.feed_forward_length", 64), ("misshapen", "mlp")),
    "missing layers": ("llama", attribute("llama.block_count", 4), ("weights are missing", "layers.3")),
    "no tokens": ("llama", lambda writer: writer.kv_data[0].pop("tokenizer.ggml.tokens"), ("token",)),
    "no epsilon": (
        "llama",
        lambda writer: writer.kv_data[0].pop("llama.attention.layer_norm_rms_epsilon"),
        ("has no llama.attention.layer_norm_rms_epsilon",),
    ),
    "a projector": ("llama", attribute("general.type", "mmproj"), ("general.type is 'mmproj'", "no model")),
    "a part": ("llama", attribute("split.count", 3), ("one of several parts", "llama-gguf-split --merge")),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_give_other_numbers_is_refused(what: str, tmp_path: Path) -> None:
    architecture, change, parts = REFUSED[what]
    ggufs.write(ggufs.tiny(architecture), tmp_path / "m.gguf", architecture, change=change)
    with refused(ModelError, *parts):
        tracer.load(tmp_path / "m.gguf")


def test_a_scale_of_attention_that_no_metadata_names_is_refused(tmp_path: Path) -> None:
    ggufs.write(ggufs.tiny("gemma3", head_dim=16), tmp_path / "m.gguf", "gemma3")
    with refused(ModelError, "gemma3.attention.key_length=16", "1 / sqrt(256)"):
        tracer.load(tmp_path / "m.gguf")


def test_metadata_that_is_not_used_is_said(tmp_path: Path) -> None:
    change = attribute("llama.embedding_scale", 2.0)
    ggufs.write(ggufs.tiny("llama"), tmp_path / "m.gguf", "llama", change=change)
    with pytest.warns(TracerWarning, match="also says llama.embedding_scale=2.0, which is not used"):
        tracer.load(tmp_path / "m.gguf")


def test_an_architecture_that_is_not_read_is_named(tmp_path: Path) -> None:
    ggufs.write(ggufs.tiny("llama"), tmp_path / "m.gguf", "llama", change=attribute("general.architecture", "falcon"))
    with refused(ModelError, "architecture 'falcon'", "read from GGUF are llama"):
        tracer.load(tmp_path / "m.gguf")


@pytest.mark.parametrize("dtype", ["nf4", "int8"])
def test_eight_and_four_bit_are_refused(dtype: str, place: Path) -> None:
    for ask in (tracer.load, Shape.of):
        with refused(ModelError, dtype, "dequantised when they are read", "float32"):
            ask(str(place), dtype=dtype)


def test_a_missing_package_is_one_line_with_its_command(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else find(name, *rest))
    with refused(ModelError, "tiny.gguf", "not installed", "pip install 'neuron-tracer[gguf]'"):
        tracer.load(place)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ("no GGUF file",)),
        (b"PK\x03\x04 a zip archive", ("no GGUF file", "PK")),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", ("Git LFS", "git lfs pull")),
        (b"GGUF", ("damaged or cut short",)),
        (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), ("damaged", "version 9")),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), ("damaged", "version")),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**40, 1), ("damaged", "entries")),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62), ("damaged",)),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), ("damaged", "no general.architecture")),
    ],
)
def test_what_is_no_whole_file_is_named(content: bytes, parts: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    for name in (tmp_path / "m.gguf", tmp_path):
        with refused(ModelError, "m.gguf", *parts):
            tracer.load(name)


def test_a_file_that_is_cut_short_is_refused_before_weights_are_read(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (place / "tiny.gguf").read_bytes()
    monkeypatch.setattr("tracer.model.dequantised.weights", lambda *_: pytest.fail("weights were read"))
    for kept in (len(content) - 40, len(content) // 2, 5000, 300, 30):
        (tmp_path / "m.gguf").write_bytes(content[:kept])
        with refused(ModelError, "m.gguf", "damaged or cut short", "download it again"):
            tracer.load(tmp_path / "m.gguf")


def test_a_damaged_header_is_an_error_in_words_or_a_header_whose_tensors_lie_in_the_file(
    place: Path, tmp_path: Path
) -> None:
    content, path, draw = (place / "tiny.gguf").read_bytes(), tmp_path / "m.gguf", random.Random(0)
    end = min(one.start for one in gguf.read(place / "tiny.gguf", "tiny.gguf", "m").tensors)
    refusals = 0
    for _ in range(400):
        damaged = bytearray(content)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(4, end)
            damaged[at : at + draw.choice((1, 4, 8))] = draw.randbytes(draw.choice((1, 4, 8)))
        path.write_bytes(damaged)
        try:
            header = gguf.read(path, "m.gguf", "m")
        except ModelError:  # anything else is a bug
            refusals += 1
        else:
            assert all(one.start >= 0 and one.start + one.size <= len(damaged) for one in header.tensors)
    assert 100 < refusals < 400


def test_a_part_of_several_is_named_by_its_name_alone(place: Path, tmp_path: Path) -> None:
    (tmp_path / "m-00001-of-00003.gguf").write_bytes((place / "tiny.gguf").read_bytes())
    with refused(ModelError, "one of several parts", "llama-gguf-split --merge"):
        tracer.load(tmp_path)
