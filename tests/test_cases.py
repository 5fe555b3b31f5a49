"""Inputs that once gave a wrong number in silence, as their users met them: from the shell, from a folder, in a run.

Where each kind is tested:

- tables that depend on the longest prompt (LongRoPE): model/test_config_options.py, and a run here
- a checkpoint with biases, layers or heads that its config has not: model/test_model_folder.py
- a tokenizer that appends an end, or puts no beginning: test_special_tokens.py
- an adapter beside full weights: model/test_adapters.py
- code that a known type brings along: model/test_model_folder.py
- a tokenizer that transformers builds otherwise than the files say, or makes up: model/test_tokens.py
- columns target_ids and foil_ids, and numbers as targets: data/test_dataset.py, and runs here
- a generation config that is not greedy: evaluation/test_steering.py, and from a folder here
- graphs of other tools: circuit/test_foreign.py
- a tokenizer that prepends in its normaliser: test_prompts.py, data/test_tasks.py, and an evaluation here
- a multimodal checkpoint: model/test_multimodal.py
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import tiny as t
import tracer
from helpers import Question
from inline import InlinePool
from runs import lines
from tracer.cli.app import app


def ran(tmp_path: Path, name: str, path: Path, model: Path, note: Any = None, **options: Any) -> tracer.Run:
    job = {"kind": "dataset", "model": str(model), "input": {"path": str(path)}, "baseline": "zero", "nodes": 5}
    job |= {"edges": False, "circuit": "none", "device": "cpu"}
    return tracer.run(job | options, tmp_path / name, pool=InlinePool(), note=note)


def shell(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def plain(folder: Path, ids: Any) -> torch.Tensor:
    """Logits of the last position, from transformers alone."""
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([list(ids)])).logits[0, -1]


def test_a_runs_numbers_do_not_depend_on_what_shares_a_batch(tmp_path: Path) -> None:
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 2, "long_factor": [4.0] * 2, "rope_theta": 1e4}
    scaling |= {"original_max_position_embeddings": 8, "partial_rotary_factor": 0.5}
    model = t.save(t.tiny("phi3", rope_parameters=scaling, original_max_position_embeddings=8), tmp_path / "model")
    rows = Question(lengths=(12, 5, 11, 7), targets=((9,),) * 4).ids()
    path = Path(lines(tmp_path / "p.jsonl", [{"token_ids": ids, "target_ids": 70} for ids in rows]))
    wanted = [float(plain(model, ids)[70]) for ids in rows]
    for batch in (1, 4):
        table = ran(tmp_path, f"by{batch}", path, model, batch=batch).table("prompts").sort_by("prompt_id")
        assert table["metric"].to_pylist() == pytest.approx(wanted, abs=1e-5), batch


@pytest.mark.parametrize(
    ("name", "content", "target", "foil"),
    [
        ("ids.jsonl", '{"text": "The car", "target_ids": [58], "foil_ids": 59}\n', 58, [59]),
        ("ids.csv", "text,target_ids,foil_ids\nThe car,58,59\n", 58, [59]),
        ("text.csv", "text,target\nThe car,7\n", t.tokenizer().convert_tokens_to_ids("7"), []),
        ("number.jsonl", '{"text": "The car", "target": 7}\n', 7, []),
        ("text.jsonl", '{"text": "The car", "target": "7"}\n', t.tokenizer().convert_tokens_to_ids("7"), []),
    ],
)
def test_a_run_asks_for_the_token_that_is_meant(
    name: str, content: str, target: int, foil: list[int], tmp_path: Path
) -> None:
    model = t.save(t.tiny("llama"), tmp_path / "model")
    (tmp_path / name).write_text(content)
    run = ran(tmp_path, "run", tmp_path / name, model)
    (row,) = run.table("prompts").to_pylist()
    assert (row["status"], row["target_ids"], row["foil_ids"]) == ("ok", [target], foil)
    logits = plain(model, row["token_ids"])
    assert row["metric"] == pytest.approx(float(logits[target] - logits[foil].sum()), abs=1e-5)
    said = (run.folder.record() or {})["notes"]
    assert len(said) == (name in ("text.csv", "number.jsonl"))
    assert all("'target'" in note for note in said)


def test_a_run_says_once_what_is_left_out_of_its_model(tmp_path: Path) -> None:
    model = t.save(t.tiny("llama"), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "mine.Model"}}))
    path = Path(lines(tmp_path / "p.jsonl", [{"token_ids": [1, 7, 8], "target_ids": 9}] * 2))
    heard: list[str] = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run = ran(tmp_path, "run", path, model, note=heard.append)
    # By the worker as it loads, which a process of its own keeps to itself, and by the run.
    assert len([text for text in (*heard, *(str(one.message) for one in said)) if "mine.Model" in text]) == 2
    assert "mine.Model" in (run.folder.record() or {})["warnings"][0]


@pytest.mark.parametrize(
    "generation",
    [
        {"repetition_penalty": 5.0},
        {"do_sample": True, "temperature": 9.0, "top_k": 0},
        {"num_beams": 4, "length_penalty": 5.0},
    ],
)
def test_a_steered_text_of_a_folder_is_greedy(generation: dict[str, Any], tmp_path: Path) -> None:
    model = t.save(t.tiny("llama"), tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": t.EOS, **generation}))
    text = "The keys near the car"
    ids = list(t.tokenizer()(text).input_ids)
    wanted = [*ids, int(plain(model, ids).argmax())]
    wanted.append(int(plain(model, wanted).argmax()))
    printed = shell("steer", text, "--model", model, "--top", 3, "--factor", 1, "--max-new-tokens", 2)
    text = str(t.tokenizer().decode(wanted[-2:], clean_up_tokenization_spaces=False)).replace(" ", "␣")
    texts = dict(line.split(maxsplit=1) for line in printed.splitlines() if line.startswith(("unsteered", "steered")))
    assert {name: said.strip() for name, said in texts.items()} == {"unsteered": text, "steered": text}


def prepending() -> PreTrainedTokenizerFast:
    """A tokenizer to which " are" by itself is two tokens, since a space is put before every text."""
    words = [*t.vocabulary()[:4], "▁", *(f"▁{word}" for word in "The key keys car cars is are".split())]
    fast = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [], ignore_merges=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    fast.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", t.BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>", bos_token="<bos>")


def test_pairs_are_asked_of_a_tokenizer_that_prepends(tmp_path: Path) -> None:
    model = t.save(t.tiny("llama"), tmp_path / "model")
    prepending().save_pretrained(model)
    answers = {"clean_answer": " are", "patch_answer": " is", "case": "plural"}
    rows = [("The keys", "The key"), ("The cars", "The car")]
    path = lines(tmp_path / "p.jsonl", [{"clean_prefix": one, "patch_prefix": two, **answers} for one, two in rows])
    shell("trace", "The key", "--target", " is", "--foil", " are", "--model", model, "--out", tmp_path / "run")
    shell("evaluate", tmp_path / "run", "--pairs", path)
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    words = prepending()
    metrics = []
    for text, _ in rows:
        logits = plain(model, words(text).input_ids)
        metrics.append(float(logits[words.convert_tokens_to_ids("▁are")] - logits[words.convert_tokens_to_ids("▁is")]))
    assert found["whole"] == pytest.approx(metrics, abs=1e-5)
