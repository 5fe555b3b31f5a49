"""A model folder is used, or it is said what is not: weights without a place, other formats, code, pointers."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny as t
import tracer
from helpers import Question, refused
from tracer import ModelError
from tracer.errors import TracerWarning, surface
from tracer.model.model import skeleton
from tracer.model.sizes import Shape


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return t.save(t.tiny("llama"), tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def folder(complete: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(complete, tmp_path / "model"))


def add_weights(folder: Path, **more: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    save_file(
        load_file(path) | {name.replace("__", "."): value for name, value in more.items()}, path, {"format": "pt"}
    )


# ------------------------------------------------------------------------------------- weights without a place


def test_biases_that_the_config_does_not_have_are_refused_by_name(tmp_path: Path) -> None:
    t.save(t.tiny("llama", attention_bias=True, mlp_bias=True), tmp_path)
    tracer.load(tmp_path)
    t.edit_config(tmp_path, attention_bias=False, mlp_bias=False)
    first = "model.layers.0.mlp.down_proj.bias, model.layers.0.mlp.gate_proj.bias, model.layers.0.mlp.up_proj.bias"
    with refused(ModelError, "no place for 21 weights", first, "config.json"):
        tracer.load(tmp_path)


def test_layers_that_the_config_does_not_have_are_refused(folder: Path) -> None:
    t.edit_config(folder, num_hidden_layers=2)
    with refused(ModelError, "no place for 9 weights", "model.layers.2.input_layernorm.weight"):
        tracer.load(folder)


@pytest.mark.parametrize(
    "name", ["score__weight", "v_head__summary__weight", "model__layers__0__self_attn__q_norm__weight"]
)
def test_heads_and_norms_that_the_architecture_lacks_are_refused(name: str, folder: Path) -> None:
    add_weights(folder, **{name: torch.ones(1, 32)})
    with refused(ModelError, "no place for 1 weights", name.replace("__", ".")):
        tracer.load(folder)


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", ["model__layers__0__self_attn__rotary_emb__inv_freq"]),
        ("gemma3", ["model__layers__0__self_attn__rotary_emb__inv_freq"]),
        ("gpt2", ["transformer__h__0__attn__bias", "transformer__h__0__attn__masked_bias"]),
        ("gpt_neox", ["gpt_neox__layers__0__attention__bias", "gpt_neox__layers__0__attention__masked_bias"]),
    ],
)
def test_tables_that_old_checkpoints_hold_and_models_compute_are_no_weights(
    family: str, names: list[str], tmp_path: Path
) -> None:
    wanted = tracer.load(t.save(t.tiny(family), tmp_path)).fingerprint
    add_weights(tmp_path, **{name: torch.ones(1) for name in names})
    assert tracer.load(tmp_path).fingerprint == wanted


# ------------------------------------------------------------------------------------------ kinds of folders


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def gguf(folder: Path) -> None:
    (folder / "model-q4.gguf").write_bytes(b"GGUF")
    (folder / "model.safetensors").unlink()


def gguf_alone(folder: Path) -> None:
    gguf(folder)
    (folder / "config.json").unlink()


def pointer(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")

    return make


def encoder(folder: Path) -> None:
    (folder / "modules.json").write_text('[{"idx": 0, "type": "sentence_transformers.models.Transformer"}]')


def encoder_of_folders(folder: Path) -> None:
    encoder(folder)
    (folder / "config.json").unlink()


def empty(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def adapter_alone(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "some/base"}')


KINDS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "pickled": (pickled, ("pytorch_model.bin", "never read", "save_pretrained")),
    "gguf": (gguf, ("model-q4.gguf", "damaged or cut short", "download it again")),
    "gguf alone": (gguf_alone, ("model-q4.gguf", "damaged or cut short", "download it again")),
    "pointer to weights": (pointer("model.safetensors"), ("model.safetensors", "Git LFS", "git lfs pull")),
    "pointer to a tokenizer": (pointer("tokenizer.json"), ("tokenizer.json", "Git LFS", "git lfs pull")),
    "pointer to a config": (pointer("config.json"), ("config.json", "Git LFS", "git lfs pull")),
    "encoder": (encoder, ("sentence-transformers", "no next token")),
    "encoder of folders": (encoder_of_folders, ("sentence-transformers", "no next token")),
    "empty": (empty, ("holds no weights", "complete")),
    "adapter alone": (adapter_alone, ("adapter alone, made on 'some/base'", "adapter='")),
}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_is_no_model_folder_is_named_with_a_next_step(kind: str, folder: Path) -> None:
    make, parts = KINDS[kind]
    make(folder)
    with refused(ModelError, str(folder)[-20:], *parts):
        tracer.load(folder)


def test_an_adapter_alone_names_the_option_of_the_surface(folder: Path) -> None:
    adapter_alone(folder)
    with surface("shell"), refused(ModelError, "base model, and --adapter "):
        tracer.load(folder)


def test_where_no_weights_are_needed_none_are_asked_for(folder: Path) -> None:
    empty(folder)
    assert Shape.of(str(folder)).n_layers == 3
    assert skeleton(folder).n_layers == 3


# ------------------------------------------------------------------------------------------ what is left unread


def stale_parts(folder: Path) -> None:
    t.tiny("llama", seed=5).save_pretrained(folder / "other", max_shard_size="20KB")
    for file in (folder / "other").glob("model*"):
        file.rename(folder / file.name)


def part_of_another(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    t.tiny("llama").save_pretrained(folder, max_shard_size="20KB")
    shutil.copy(folder / "model-00001-of-00007.safetensors", folder / "model-00001-of-00002.safetensors")


def consolidated(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (stale_parts, "model-00001-of-00007.safetensors, .* and 4 more"),
        (part_of_another, "model-00001-of-00002.safetensors"),
        (consolidated, "consolidated.safetensors"),
    ],
)
def test_weights_that_are_not_read_are_said(make: Callable[[Path], None], named: str, folder: Path) -> None:
    plain = tracer.load(folder)
    assert plain.warnings == ()
    make(folder)
    with pytest.warns(TracerWarning, match=f"also holds {named}: no weights are read from there") as said:
        model = tracer.load(folder)
    assert len(said) == len(model.warnings) == 1
    assert model.fingerprint == plain.fingerprint


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_a_backbone_whose_embedding_becomes_the_head_is_said(family: str, tmp_path: Path) -> None:
    model = t.tiny(family, tie_word_embeddings=True)
    t.save(model, tmp_path)
    getattr(model, "base_model").save_pretrained(tmp_path)  # noqa: B009
    with pytest.warns(TracerWarning, match=f"'{type(model.base_model).__name__}', which gives no next token"):
        loaded = tracer.load(tmp_path)
    ids = torch.tensor([[1, 7, 9]])
    assert torch.allclose(loaded.module(ids).logits, model(ids).logits, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ code


AUTO = {"AutoConfig": "configuration_custom.CustomConfig", "AutoModelForCausalLM": "modeling_custom.CustomLM"}


def test_code_of_a_known_type_is_not_run_and_said_once(folder: Path) -> None:
    plain = tracer.load(folder)
    t.edit_config(folder, auto_map=AUTO)
    (folder / "modeling_custom.py").write_text("raise SystemExit('this was run')\n")
    with pytest.warns(TracerWarning, match="modeling_custom.CustomLM.*is not run") as said:
        model = tracer.load(folder)
    assert len(said) == 1
    assert model.warnings == (str(said[0].message),)
    assert model.fingerprint == plain.fingerprint
    with warnings.catch_warnings(record=True) as again:  # said when it was loaded; the circuit keeps it
        warnings.simplefilter("always")
        circuit = tracer.trace(model, Question().prompts()[0], baseline="zero")
    assert circuit.warnings[0] == model.warnings[0]
    assert model.warnings[0] not in [str(one.message) for one in again]


def test_code_of_a_tokenizer_is_said(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["tok.Custom", None]}}))
    with pytest.warns(TracerWarning, match="tok.Custom"):
        tracer.load(folder)


def test_code_of_an_unknown_type_is_refused_without_a_question(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    t.edit_config(folder, auto_map=AUTO, model_type="mine")
    with refused(ModelError, "model type 'mine'", "modeling_custom.CustomLM", "never run", "llama"):
        tracer.load(folder)
    with refused(ModelError, "model type 'mine'", "never run"):
        Shape.of(str(folder))
    assert "trust_remote_code" not in "".join(capfd.readouterr())


def test_an_unknown_type_is_refused(folder: Path) -> None:
    t.edit_config(folder, model_type="mine")
    with refused(ModelError, "model type 'mine' is not known to transformers", "llama"):
        tracer.load(folder)
