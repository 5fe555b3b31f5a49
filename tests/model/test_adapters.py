"""Adapters: merged as plain PyTorch merges them, or refused in words; beside the weights, or asked for."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny as t
import tracer
import wholes
from helpers import Question, direct_logits, refused
from tracer import ModelError
from tracer.errors import TracerWarning, surface
from tracer.settings import ModelRecord
from truth import close

peft = pytest.importorskip("peft")

RANK, ALPHA = 4, 10
ROWS = Question().ids()


def adapter(folder: Path, family: str = "llama", seed: int = 5, base: str = "", **how: Any) -> Path:
    """A folder with a random LoRA of a tiny model; `how` goes to peft's configuration."""
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "v_proj", "down_proj"]} | how
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = peft.get_peft_model(t.tiny(family), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
        whole.save_pretrained(str(folder))
    draw = torch.Generator().manual_seed(seed)
    path = folder / "adapter_model.safetensors"
    save_file({k: 0.3 * torch.randn(v.shape, generator=draw) for k, v in load_file(path).items()}, path)
    edit(folder, base_model_name_or_path=base)
    return folder


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def by_hand(weights: dict[str, torch.Tensor], folder: Path, scale: float = ALPHA / RANK, turned: bool = False) -> int:
    """W + B A * scale, in place; how many weights changed."""
    parts = load_file(folder / "adapter_model.safetensors")
    names = [name for name in parts if name.endswith("lora_A.weight")]
    for name in names:
        change = parts[name.replace("lora_A", "lora_B")] @ parts[name] * scale
        weights[name.removeprefix("base_model.model.").replace(".lora_A", "")] += change.T if turned else change
    return len(names)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return t.save(t.tiny("llama"), tmp_path_factory.mktemp("models") / "base")


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_an_adapter_is_merged_as_plain_pytorch_merges_it(base: Path, tmp_path: Path, rank_stabilised: bool) -> None:
    lora = adapter(tmp_path, use_rslora=rank_stabilised)
    model = tracer.load(base, adapter=lora)
    weights = load_file(base / "model.safetensors")
    assert by_hand(weights, lora, ALPHA / (RANK**0.5 if rank_stabilised else RANK)) == 9
    assert {name for name, _ in model.module.named_parameters()} == weights.keys()
    for name, value in model.module.named_parameters():
        assert torch.allclose(value, weights[name], atol=1e-6), name
    assert model.fingerprint != tracer.load(base).fingerprint
    assert model.adapter == model.record().adapter == str(lora)


def test_an_adapter_of_transposed_maps_is_merged(tmp_path: Path) -> None:
    t.save(t.tiny("gpt2"), tmp_path / "base")
    lora = adapter(tmp_path / "lora", "gpt2", target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True)
    weights = dict(t.tiny("gpt2").state_dict())
    assert by_hand(weights, lora, turned=True) == 6
    for name, value in tracer.load(tmp_path / "base", adapter=lora).module.named_parameters():
        assert torch.allclose(value, weights[name], atol=1e-6), name


def test_a_merged_model_traces_as_the_same_weights_loaded_plainly(base: Path, tmp_path: Path) -> None:
    lora = adapter(tmp_path / "lora", use_dora=True)
    merged = tracer.load(base, adapter=lora)
    merged.module.save_pretrained(str(tmp_path / "saved"))
    merged.tokenizer.save_pretrained(str(tmp_path / "saved"))
    plain = tracer.load(tmp_path / "saved")
    assert close(direct_logits(merged, ROWS), direct_logits(plain, ROWS))
    mine, other = (tracer.trace(one, Question().prompts()[0], baseline="zero") for one in (merged, plain))
    assert close(
        torch.tensor(mine.nodes["attribution"].to_pylist()), torch.tensor(other.nodes["attribution"].to_pylist())
    )
    assert mine.model.adapter == str(lora)
    assert other.model.adapter is None
    saved = mine.save(tmp_path / "run")
    assert tracer.Circuit.load(tmp_path / "run").model.adapter == str(lora), saved


def test_an_adapter_beside_the_weights_is_merged_and_said(tmp_path: Path) -> None:
    t.save(t.tiny("llama"), tmp_path)
    adapter(tmp_path)
    with pytest.warns(TracerWarning, match="adapter beside the weights.*is merged"):
        model = tracer.load(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    by_hand(weights, tmp_path)
    for name, value in model.module.named_parameters():
        assert torch.allclose(value, weights[name], atol=1e-6), name
    with pytest.warns(TracerWarning):  # as `tracer evaluate` loads what a circuit's record names
        assert tracer.load(model.name, adapter=model.adapter).fingerprint == model.fingerprint
    with refused(ModelError, "there is one beside the weights", "move adapter_config.json away"):
        tracer.load(tmp_path, adapter="some/other")


def test_an_adapter_made_on_a_model_of_another_name_is_said(base: Path, tmp_path: Path) -> None:
    adapter(tmp_path, base="meta/other-model")
    with pytest.warns(TracerWarning, match="made on 'meta/other-model'"):
        tracer.load(base, adapter=tmp_path)
    edit(tmp_path, base_model_name_or_path=f"elsewhere/{base.name}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracer.load(base, adapter=tmp_path)


def test_lower_precision_is_merged_in_it(base: Path, tmp_path: Path) -> None:
    model = tracer.load(base, adapter=adapter(tmp_path), dtype="bfloat16", device="cpu")
    weights = load_file(base / "model.safetensors")
    by_hand(weights, tmp_path)
    assert model.dtype == torch.bfloat16
    for name, value in model.module.named_parameters():
        assert torch.allclose(value.float(), weights[name], rtol=0.02, atol=0.02), name


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def weights_edited(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        weights = load_file(folder / "adapter_model.safetensors")
        change(weights)
        save_file(weights, folder / "adapter_model.safetensors")

    return make


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
WRONG: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "no config": (without("adapter_config.json"), ("holds no adapter_config.json",)),
    "no weights": (without("adapter_model.safetensors"), ("holds no weights",)),
    "pickled": (pickled, ("adapter_model.bin", "never read")),
    "a prompt": (lambda folder: edit(folder, peft_type="PROMPT_TUNING"), ("PROMPT_TUNING", "cannot be merged")),
    "an unknown kind": (lambda folder: edit(folder, peft_type="NOVEL"), ("cannot be merged", "NOVEL")),
    "an unknown option": (lambda folder: edit(folder, novel_scale=3), ("novel_scale=3", "does not know")),
    "another rank": (lambda folder: edit(folder, r=8), ("cannot be merged",)),
    "no such module": (lambda folder: edit(folder, target_modules=["wide"]), ("cannot be merged", "wide")),
    "a module too many": (
        lambda folder: edit(folder, target_modules=["q_proj"]),
        ("12 weights without a place", FIRST),
    ),
    "a module too few": (weights_edited(lambda weights: weights.pop(FIRST)), ("1 weights missing", FIRST)),
    "not finite": (weights_edited(lambda weights: weights[FIRST].fill_(float("nan"))), ("cannot be merged",)),
    "damaged": (lambda folder: (folder / "adapter_model.safetensors").write_text("{"), ("cannot be merged",)),
    "a damaged config": (lambda folder: (folder / "adapter_config.json").write_text("{"), ("cannot be read",)),
    "layers replicated": (lambda folder: edit(folder, layer_replication=[[0, 2], [1, 3]]), ("replicates layers",)),
    "a pointer": (
        lambda folder: (folder / "adapter_model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\n"
        ),
        ("Git LFS", "git lfs pull"),
    ),
}


@pytest.mark.parametrize("what", sorted(WRONG))
def test_an_adapter_that_cannot_be_merged_is_refused(what: str, base: Path, tmp_path: Path) -> None:
    change, parts = WRONG[what]
    change(adapter(tmp_path))
    with refused(ModelError, *parts):
        tracer.load(base, adapter=tmp_path)


def test_an_adapter_of_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        deeper = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=RANK)
        peft.get_peft_model(t.tiny("llama", n_layers=4), deeper).save_pretrained(str(tmp_path))
    with refused(ModelError, "not made for this model: 2 weights without a place", "layers.3", "base model"):
        tracer.load(base, adapter=tmp_path)


def test_without_peft_it_is_said_what_to_install(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = adapter(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with refused(ModelError, "peft", "neuron-tracer[adapters]", "merge_and_unload"):
        tracer.load(base, adapter=lora)


def test_where_an_adapter_has_no_place_it_is_refused(base: Path, tmp_path: Path) -> None:
    lora = str(adapter(tmp_path))
    with refused(ModelError, "adapter=", "has no effect on a module in memory"):
        tracer.load(t.tiny("llama"), tokenizer=t.tokenizer(), adapter=lora)
    with refused(ModelError, "adapter='", "on a server"):
        tracer.load(base, adapter=lora, remote=True)
    with surface("shell"), refused(ModelError, "--adapter ", "on a server"):
        tracer.load(base, adapter=lora, remote=True)
    with refused(ModelError, "is no folder"):
        tracer.load(base, adapter="./nowhere")
    with refused(ModelError, "could not be fetched"):
        tracer.load(base, adapter="nobody/nothing-here-at-all")


def test_weights_of_few_bits_take_no_adapter(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1")
    with refused(ModelError, "8 or 4 bit", "bfloat16"):
        tracer.load(base, adapter=adapter(tmp_path), dtype="int8")


def test_a_record_from_before_adapters_is_read_and_stays_as_it_was() -> None:
    record = tracer.load("demo").record()
    old = record.model_dump(mode="json")
    assert "adapter" not in old
    assert ModelRecord.model_validate(old) == record
    assert ModelRecord.model_validate(old | {"adapter": "a/b"}).model_dump()["adapter"] == "a/b"


def of_whole(folder: Path, model: Any, **how: Any) -> Any:
    """A random LoRA of a model that takes images, saved by peft; the model with it beside its weights."""
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "v_proj", "down_proj"]} | how
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole: Any = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
    draw = torch.Generator().manual_seed(5)
    for name, value in whole.named_parameters():
        if "lora_" in name:
            value.data.copy_(0.3 * torch.randn(value.shape, generator=draw))
    whole.save_pretrained(str(folder))
    edit(folder, base_model_name_or_path="")
    return whole


OF_WHOLES = [
    ("gemma3", {}),  # whose tower has a q_proj too
    ("qwen2_vl", {"target_modules": r".*language_model.*\.(q_proj|up_proj)"}),
    ("llava", {"modules_to_save": ["lm_head"]}),
    ("idefics3", {"alpha_pattern": {"model.text_model.layers.0.self_attn.q_proj": 40}}),
]


@pytest.mark.parametrize(("kind", "how"), OF_WHOLES, ids=[kind for kind, _ in OF_WHOLES])
def test_an_adapter_of_a_whole_model_is_merged_into_its_text_part(kind: str, how: Any, tmp_path: Path) -> None:
    known = wholes.whole(kind)
    known.save_pretrained(tmp_path / "base")
    t.tokenizer().save_pretrained(tmp_path / "base")
    apart = of_whole(tmp_path / "lora", known, **how)
    model = tracer.load(tmp_path / "base", adapter=tmp_path / "lora")
    ids = torch.tensor([[1, 5, 40, 41, 42]])
    with torch.no_grad():
        wanted = apart(input_ids=ids).logits
    assert close(model.module(input_ids=ids).logits, wanted)
    assert not close(tracer.load(tmp_path / "base").module(input_ids=ids).logits, wanted)


def test_an_adapter_of_the_tower_alone_is_refused(tmp_path: Path) -> None:
    known = wholes.whole("gemma3")
    known.save_pretrained(tmp_path / "base")
    t.tokenizer().save_pretrained(tmp_path / "base")
    of_whole(tmp_path / "lora", known, target_modules=r".*vision_tower.*q_proj")
    with refused(ModelError, "changes nothing of the text part of 'gemma3'"):
        tracer.load(tmp_path / "base", adapter=tmp_path / "lora")
