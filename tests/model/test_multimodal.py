"""The text part of a model that also takes images or sound, against the whole model in plain transformers."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
)
from typer.testing import CliRunner

import tiny as t
import tracer
import truth
import wholes
from helpers import Question, refused
from tracer import JobError, ModelError
from tracer.cli.app import app
from tracer.model import multimodal
from tracer.model.families import FAMILIES
from tracer.model.model import skeleton
from tracer.model.sizes import Shape
from tracer.model.wholes import SAME_TEXT, TEXT_PARTS, UNREAD
from tracer.prompts import Message, rendered

HOME = Path(__file__).parents[2]
IDS = torch.tensor([[1, 5, 40, 41, 42, 43, 7, 9, 60]])
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def whole(tied: bool = True, **text: Any) -> Gemma3ForConditionalGeneration:
    """A small random Gemma 3 with a vision tower. `tied`: the whole's own option; `text`: those of its text part."""
    part = t.tiny("gemma3").config.to_dict() | {"final_logit_softcapping": None} | text
    config = Gemma3Config(text_config=part, vision_config=VISION, tie_word_embeddings=tied, mm_tokens_per_image=4)
    config._attn_implementation = "eager"
    model: Any = Gemma3ForConditionalGeneration(config)
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        scale = 0.3 if parameter.ndim == 1 or "embed_tokens" in name else 1.3 * parameter.shape[-1] ** -0.5
        parameter.data.copy_(scale * torch.randn(parameter.shape, generator=draw))
    return truth.placed(model.eval().requires_grad_(False))


def save(model: Gemma3ForConditionalGeneration, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    t.tokenizer().save_pretrained(folder)
    return folder


def rename(folder: Path, old: str, new: str) -> None:
    path = folder / "model.safetensors"
    save_file({name.replace(old, new, 1): value for name, value in load_file(path).items()}, path, {"format": "pt"})


def add(folder: Path, name: str) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | {name: torch.ones(32)}, path, {"format": "pt"})


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(whole(), tmp_path_factory.mktemp("models") / "gemma3")


@pytest.fixture
def folder(complete: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(complete, tmp_path / "model"))


# ------------------------------------------------------------------------------------------------- its numbers


@pytest.mark.parametrize(
    ("tied", "text"),
    [
        (True, {}),
        (False, {}),  # the text part's own configuration says tied
        (True, {"tie_word_embeddings": False}),
        (True, {"final_logit_softcapping": 2.0}),  # which the whole does not heed
        (False, {"attn_logit_softcapping": 1.5, "sliding_window": 3}),
    ],
)
def test_its_logits_and_what_is_traced_are_the_wholes(tied: bool, text: dict[str, Any], tmp_path: Path) -> None:
    known = whole(tied, **text)
    model = tracer.load(save(known, tmp_path))
    wanted = known(input_ids=IDS).logits
    assert model.family.name == "gemma3_text"
    assert truth.close(model.module(input_ids=IDS).logits, wanted)
    asked = Question(metric="difference").prompts()  # of several lengths, so padded beside each other
    rows = [known(input_ids=torch.tensor([list(one.token_ids or ())])).logits[0, -1] for one in asked]
    differences = torch.stack(
        [row[one.target] - row[one.foil] for row, one in zip(rows, asked, strict=True)]  # type: ignore[index]
    ).flatten()
    result = tracer.attribute(model, asked, baseline="zero")
    assert truth.close(result.metric, differences, of=torch.stack(rows))
    assert truth.close(result.embeddings.sum(1), differences, of=torch.stack(rows))  # RelP conserves


def newer(folder: Path) -> None:
    rename(folder, "language_model.lm_head.", "lm_head.")
    rename(folder, "language_model.model.", "model.language_model.")
    rename(folder, "vision_tower.", "model.vision_tower.")
    rename(folder, "multi_modal_projector.", "model.multi_modal_projector.")


def test_older_and_newer_names_of_its_weights_are_the_same_model(tmp_path: Path) -> None:
    older = tracer.load(save(whole(tied=False), tmp_path))
    assert any(name.startswith("language_model.model.") for name in load_file(tmp_path / "model.safetensors"))
    newer(tmp_path)
    assert "lm_head.weight" in load_file(tmp_path / "model.safetensors")
    assert tracer.load(tmp_path).fingerprint == older.fingerprint


def test_a_checkpoint_in_pieces_and_in_halves_is_the_same_model(complete: Path, tmp_path: Path) -> None:
    save(whole(), tmp_path / "pieces", max_shard_size="20KB")
    assert len(list((tmp_path / "pieces").glob("*.safetensors"))) > 1
    assert tracer.load(tmp_path / "pieces").fingerprint == tracer.load(complete).fingerprint
    halves = tracer.load(complete, dtype="bfloat16")
    assert halves.module.dtype == torch.bfloat16
    assert truth.close(
        halves.module(input_ids=IDS).logits, whole().bfloat16()(input_ids=IDS).logits, dtype=torch.bfloat16
    )


def test_a_hugging_face_id_goes_the_same_way(complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = tmp_path / "models--some--gemma"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(complete, cached / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = tracer.load("some/gemma")
    assert model.fingerprint == tracer.load(complete).fingerprint
    assert "'some/gemma' (gemma3) also takes images" in model.warnings[0]
    assert replace(Shape.of("some/gemma"), name="") == replace(Shape.of(str(complete)), name="")


# ----------------------------------------------------------------------------------------------------- what is said


def test_it_is_said_once_that_the_vision_part_is_left_out(complete: Path) -> None:
    with pytest.warns(tracer.TracerWarning, match=r"\(gemma3\) also takes images.*text part is loaded alone") as said:
        model = tracer.load(complete)
    assert [str(one.message) for one in said] == list(model.warnings)
    with warnings.catch_warnings(record=True) as later:  # said when it was loaded; the circuit keeps it
        circuit = tracer.trace(model, Question().prompts()[0], baseline="zero")
    assert not any("takes images" in str(one.message) for one in later)
    assert circuit.warnings[0] == model.warnings[0]
    assert circuit.model.family == "gemma3_text"


def test_memory_is_planned_for_its_text_part(complete: Path) -> None:
    assert Shape.of(str(complete)) == Shape.of_model(tracer.load(complete))
    weights = sum(value.nbytes for name, value in load_file(complete / "model.safetensors").items() if "lang" in name)
    assert Shape.of(str(complete)).weight_bytes == weights


def test_a_job_on_it_is_planned_and_traced_from_the_shell(complete: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"text": "The car", "target": " are", "foil": " is"}\n')
    job = tmp_path / "job.yaml"
    job.write_text(f"kind: dataset\nmodel: {complete}\ninput: {{path: {tmp_path}/prompts.jsonl}}\nbaseline: zero\n")
    planned = CliRunner().invoke(app, ["plan", str(job)])
    assert planned.exit_code == 0, planned.output
    asked = ["trace", "The car", "--target", " are", "--foil", " is", "--no-edges", "--model", str(complete)]
    traced = CliRunner().invoke(app, asked)
    assert traced.exit_code == 0, traced.output
    assert traced.stderr.count("also takes images") == 1


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "name",
    [
        "language_model.model.layers.0.self_attn.q_proj.bias",
        "language_model.model.layers.3.input_layernorm.weight",
        "audio_tower.layers.0.weight",
        "score.weight",
        "vision_tower_2.weight",
    ],
)
def test_weights_that_neither_its_text_nor_its_vision_part_has_are_refused(name: str, folder: Path) -> None:
    add(folder, name)
    with refused(ModelError, "no place for 1 weights", name.replace("language_model.", "")):
        tracer.load(folder)


def test_vision_weights_have_no_place_in_another_model(tmp_path: Path) -> None:
    t.save(t.tiny("gemma3"), tmp_path)
    add(tmp_path, "vision_tower.post_layernorm.weight")
    with refused(ModelError, "no place for 1 weights", "vision_tower"):
        tracer.load(tmp_path)


def test_a_text_part_that_is_not_whole_is_refused(folder: Path) -> None:
    rename(folder, "language_model.model.layers.0.mlp.up_proj", "vision_tower.up_proj")
    with refused(ModelError, "1 weights are missing", "layers.0.mlp.up_proj"):
        tracer.load(folder)


def test_what_would_look_ahead_by_itself_and_not_in_the_whole_is_refused(tmp_path: Path) -> None:
    save(whole(use_bidirectional_attention=True), tmp_path)
    with refused(ModelError, "use_bidirectional_attention", "masks of 'gemma3'"):
        tracer.load(tmp_path)


def test_it_is_refused_on_a_server(complete: Path) -> None:
    with refused(ModelError, "takes images", "server", "load it here"):
        skeleton(complete)


@pytest.mark.parametrize(
    "kind", ["gemma3n", "paligemma", "mllama", "qwen3_5_moe", "aria", "granite_speech", "cosmos3_omni"]
)
def test_other_types_are_refused_with_the_reason(kind: str, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    for ask in (tracer.load, Shape.of, skeleton):
        with refused(
            ModelError, f"model type '{kind}'", f"other inputs beside text, and {UNREAD[kind]}", "families.md"
        ):
            ask(str(folder))  # type: ignore[operator]


def test_a_text_part_of_no_family_is_refused_by_its_type(folder: Path) -> None:
    wholes.config("llava", "stablelm").save_pretrained(folder)
    assert "stablelm" not in FAMILIES or pytest.skip("it is a family now")
    with refused(ModelError, "model type 'llava'", "text part is of the type 'stablelm'", "known family"):
        tracer.load(folder)


# ------------------------------------------------------------------------------------- every type that has more


def test_every_type_for_text_and_images_is_loaded_or_refused_with_a_reason() -> None:
    assert not TEXT_PARTS.keys() & UNREAD.keys()
    new = sorted(wholes.NAMES.keys() - TEXT_PARTS.keys() - UNREAD.keys())
    pinned = f"transformers=={transformers.__version__}" in (HOME / "constraints.txt").read_text().split()
    if pinned:  # a newer one has more, which are refused unseen
        assert new == []
    assert not [name for name in (*TEXT_PARTS, *UNREAD) if name not in CONFIG_MAPPING]


def loaded(folder: Path, kind: str) -> Any:
    """The text part of a folder: by tracer where its family is known, else as tracer would load it."""
    config = multimodal.text_configuration(AutoConfig.from_pretrained(folder))
    if config.model_type in FAMILIES:
        model = tracer.load(folder, attention="eager")
        assert model.family.name == config.model_type
        return model.module
    options = {"key_mapping": multimodal.KEYS, "attn_implementation": "eager", "dtype": torch.float32}
    found: Any = AutoModelForCausalLM.from_pretrained(folder, config=config, output_loading_info=True, **options)
    module, report = found
    assert report["missing_keys"] | report["mismatched_keys"] == set()
    assert [key for key in report["unexpected_keys"] if not multimodal.is_beside(kind, key)] == []
    return module


TEXTS = [
    *((kind, None) for kind, part in TEXT_PARTS.items() if part.inside is None),
    *(("llava", text) for text in ("mistral", "qwen2", "gemma2", "phi3", "granite")),
    *(("mistral3", text) for text in ("ministral3", "ministral")),
    *(("internvl", text) for text in ("qwen3", "llama", "qwen3_moe")),
    ("aya_vision", "cohere"),
]


@pytest.mark.parametrize(("kind", "text"), TEXTS)
def test_the_text_part_of_every_type_gives_what_the_whole_gives(kind: str, text: str | None, tmp_path: Path) -> None:
    known = wholes.whole(kind, text)
    wanted = known(input_ids=IDS).logits
    save(known, tmp_path)  # in the layout that transformers writes, the older one of most types
    part = loaded(tmp_path, kind)
    assert truth.close(part(input_ids=IDS).logits, wanted)
    mask = torch.ones_like(IDS).index_fill(1, torch.tensor([0, 1]), 0)
    if "omni" in kind:  # which looks for its own options there
        known.config.vision_start_token_id = known.config.audio_start_token_id = -1
    padded = known(input_ids=IDS, attention_mask=mask).logits[:, 2:]
    assert truth.close(part(input_ids=IDS, attention_mask=mask).logits[:, 2:], padded)
    assert not [name for name in known.state_dict() if not is_somewhere(kind, name, part)]


def is_somewhere(kind: str, name: str, part: Any) -> bool:
    return multimodal.is_beside(kind, name) != (multimodal.renamed(name) in part.state_dict())


@pytest.mark.parametrize("kind", ["gemma3", "llava", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3"])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_named_as_in_memory_are_read_too(kind: str, tied: bool, tmp_path: Path) -> None:
    known = wholes.whole(kind, tied=tied)
    save(known, tmp_path)
    named = {name: value.clone() for name, value in known.state_dict().items() if not (tied and "lm_head" in name)}
    save_file(named, tmp_path / "model.safetensors", {"format": "pt"})
    assert truth.close(loaded(tmp_path, kind)(input_ids=IDS).logits, known(input_ids=IDS).logits)


def test_the_oldest_names_of_qwen_vl_are_read_too(tmp_path: Path) -> None:
    known = wholes.whole("qwen2_vl")
    save(known, tmp_path)
    named = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): value.clone()
        for name, value in known.state_dict().items()
    }
    save_file(named, tmp_path / "model.safetensors", {"format": "pt"})
    assert truth.close(tracer.load(tmp_path).module(input_ids=IDS).logits, known(input_ids=IDS).logits)


@pytest.mark.parametrize("kind", SAME_TEXT)
def test_a_text_part_that_is_a_family_on_text_has_no_option_that_this_lacks(kind: str) -> None:
    family = SAME_TEXT[kind][0]
    lost = CONFIG_MAPPING[kind]().to_dict().keys() - CONFIG_MAPPING[family]().to_dict().keys()
    assert lost <= {"num_experts", "router_aux_loss_coef"}  # another name of one that it has; of training


def test_the_tokens_that_end_a_text_are_the_wholes(tmp_path: Path) -> None:
    known = wholes.whole("glm4v" if "glm4" in FAMILIES else "qwen3_vl")
    known.generation_config.eos_token_id = [t.EOS, 7]
    folder = tracer.load(save(known, tmp_path))
    assert folder.end_tokens == (t.EOS, 7)
    assert tracer.load(known, tokenizer=t.tokenizer()).end_tokens == (t.EOS, 7)


@pytest.mark.parametrize("kind", [kind for kind, part in TEXT_PARTS.items() if part.inside is not None])
@pytest.mark.parametrize("newer", [False, True])
def test_the_thinker_of_a_model_that_speaks_is_read(kind: str, newer: bool, tmp_path: Path) -> None:
    known = wholes.whole(f"{kind}_thinker")
    save(known, tmp_path)  # whose names are those of the whole, but for what is in front of them
    names = known.state_dict() if newer else load_file(tmp_path / "model.safetensors")
    beside = {"talker.model.norm.weight": torch.ones(3), f"{'token' if '2_5' in kind else 'code'}2wav.a": torch.ones(3)}
    named = {f"thinker.{name.removeprefix('thinker.')}": value.clone() for name, value in names.items()}
    save_file(named | beside, tmp_path / "model.safetensors", {"format": "pt"})
    config = {"model_type": kind, "thinker_config": known.config.to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    part = loaded(tmp_path, kind)
    assert truth.close(part(input_ids=IDS).logits, known(input_ids=IDS).logits)


@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen3_5"])
def test_a_traced_prompt_is_the_wholes_where_positions_are_of_three_numbers(kind: str, tmp_path: Path) -> None:
    known = wholes.whole(kind)
    save(known, tmp_path)
    if kind == "qwen3_5":
        add(tmp_path, "mtp.norm.weight")  # of what guesses further tokens, which transformers leaves out too
    model = tracer.load(tmp_path)
    assert not model.has_biases
    asked = Question(metric="difference").prompts()
    rows = torch.stack([known(input_ids=torch.tensor([list(one.token_ids or ())])).logits[0, -1] for one in asked])
    differences = [row[one.target] - row[one.foil] for row, one in zip(rows, asked, strict=True)]  # type: ignore[index]
    wanted = torch.stack(differences).flatten()
    result = tracer.attribute(model, asked, baseline="zero")
    assert truth.close(result.metric, wanted, of=rows)
    assert truth.close(result.embeddings.sum(1), wanted, of=rows)  # RelP conserves


# --------------------------------------------------------------------------------------------------- in memory


@pytest.mark.parametrize("kind", ["gemma3", "llava", "qwen2_5_vl", "qwen3_vl", "smolvlm", "qwen2_audio"])
def test_a_whole_in_memory_is_traced_on_its_own_weights(kind: str) -> None:
    known = wholes.whole(kind)
    held = [value.data_ptr() for value in known.parameters()]
    with pytest.warns(tracer.TracerWarning, match=r"also takes (images|sound): its text part is traced"):
        model = tracer.load(known, tokenizer=t.tokenizer())
    assert model.name == type(known).__name__
    assert {value.data_ptr() for value in model.module.parameters()} <= set(held)
    assert [value.data_ptr() for value in known.parameters()] == held
    assert truth.close(model.module(input_ids=IDS).logits, known(input_ids=IDS).logits)
    before = model.fingerprint
    known.get_output_embeddings().weight.data += 1
    assert model.fingerprint != before


def test_a_whole_in_memory_is_the_model_of_its_folder(tmp_path: Path) -> None:
    known = wholes.whole("llava", tied=True)
    folder = tracer.load(save(known, tmp_path))
    assert tracer.load(known, tokenizer=t.tokenizer()).fingerprint == folder.fingerprint


def test_a_whole_cast_to_halves_is_traced_as_it_is() -> None:
    known = wholes.whole("mistral3").bfloat16()  # which casts rotary frequencies too
    model = tracer.load(known, tokenizer=t.tokenizer())
    assert torch.equal(model.module(input_ids=IDS).logits, known(input_ids=IDS).logits)


def test_a_whole_that_computes_something_else_is_refused() -> None:
    known = wholes.whole("llava")
    layer = known.model.language_model.layers[0]
    layer.register_forward_hook(lambda *_: None)
    with refused(ModelError, "forward hook", "remove it"):
        tracer.load(known, tokenizer=t.tokenizer())
    changed = wholes.whole("llava")
    changed.model.language_model.layers[0].mlp.act_fn = torch.nn.ReLU()
    with refused(ModelError, "module LlavaForConditionalGeneration", "other logits on text", "load it by name"):
        tracer.load(changed, tokenizer=t.tokenizer())


def test_what_of_a_whole_in_memory_cannot_be_shared_is_refused() -> None:
    with refused(ModelError, "no language model with a head", "lm_head.weight", "AutoModelForImageTextToText"):
        tracer.load(wholes.whole("llava").model, tokenizer=t.tokenizer())
    mixed = wholes.whole("llava")
    mixed.lm_head.bfloat16()
    with refused(ModelError, "several devices or dtypes", "load it by name"):
        tracer.load(mixed, tokenizer=t.tokenizer())


def test_a_processor_is_no_tokenizer() -> None:
    processor = SimpleNamespace(tokenizer=t.tokenizer(), decode=len)
    with refused(ModelError, "processor", "only text is traced", "processor.tokenizer"):
        tracer.load(wholes.whole("llava"), tokenizer=processor)


@pytest.mark.parametrize(
    ("parts", "rule"),
    [
        ([{"type": "image", "url": "a.png"}, {"type": "text", "text": "What?"}], "types image, text, and only text"),
        ([{"type": "input_audio", "data": "..."}], "types input_audio, and only text"),
        ([{"type": "text", "text": "What?"}], "in parts, not one text"),
    ],
)
def test_messages_with_images_are_refused_in_words(parts: list[dict[str, str]], rule: str) -> None:
    with refused(JobError, "content", rule):
        tracer.Prompt(messages=[{"role": "user", "content": parts}])  # type: ignore[list-item]


PARTS = (
    "{% for one in messages %}<{{ one.role }}>{% for part in one.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% elif part.type == 'image' %}[image]{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""As templates for images are written: they look for parts, and make nothing of a text."""


@pytest.mark.parametrize("seed", [None, "The car"])
def test_a_template_that_looks_for_parts_is_given_them(seed: str | None, complete: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(complete, tmp_path / "model"))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": PARTS}))  # where processors had theirs
    model = tracer.load(folder)
    text = rendered((Message("user", "What is near"),), seed, model.tokenizer)
    assert text == "<user>What is near<assistant>" + (seed or "")


def test_a_template_that_leaves_out_what_is_said_is_refused() -> None:
    tokenizer = t.tokenizer()
    tokenizer.chat_template = "{% for one in messages %}<{{ one.role }}>{% endfor %}"
    with refused(JobError, "leaves out or changes what the user says"):
        rendered((Message("user", "What is near"),), None, tokenizer)
