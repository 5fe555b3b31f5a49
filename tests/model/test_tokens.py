"""The tokenizer of a folder is that of its files: no other one that transformers builds, and none made up."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

import tiny as t
import tracer
from helpers import refused
from tracer import ModelError, TracerWarning
from tracer.cli.app import app
from tracer.model.model import read_tokenizer, skeleton

TEXT = "The keys near 2023 650\n\ncar"


def digits(model: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Each digit by itself, and line ends in pairs, where the classes of transformers do otherwise."""
    parts = [
        pre_tokenizers.Split(Regex(r"\d|\n+| ?[^\s\d]+"), "isolated"),
        pre_tokenizers.ByteLevel(False, use_regex=False),
    ]
    model.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    return model


def words() -> PreTrainedTokenizerFast:
    """The tests' vocabulary with numbers and line ends in it, so that how they are split is seen."""
    content = json.loads(t.tokenizer().backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    for number, token in ((80, "Ġ2023"), (81, "650"), (82, "ĊĊ"), (83, "Ġ650")):
        vocabulary.pop(next(name for name, id_ in vocabulary.items() if id_ == number))
        vocabulary[token] = number
    fast = Tokenizer.from_str(json.dumps(content))
    return digits(PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>", bos_token="<bos>"))


def saved(family: str, folder: Path, kind: str) -> Path:
    """A model with the tokenizer of `words`, which calls itself a `kind`."""
    t.tiny(family).save_pretrained(folder)
    words().save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": kind}))
    return folder


REBUILT = [
    ("gpt2", "GPT2Tokenizer"),
    ("gpt_neox", "GPTNeoXTokenizer"),
    ("llama", "GPT2TokenizerFast"),
    ("qwen2", "Qwen2Tokenizer"),
    ("qwen3", "Qwen2Tokenizer"),
]


@pytest.mark.parametrize(("family", "kind"), REBUILT)
def test_texts_are_split_as_the_file_says_and_this_is_said(family: str, kind: str, tmp_path: Path) -> None:
    saved(family, tmp_path, kind)
    wanted = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(TEXT).ids
    assert AutoTokenizer.from_pretrained(tmp_path)(TEXT).input_ids != wanted  # or nothing is tested
    with pytest.warns(TracerWarning, match=r"tokenizer\.json.*does it otherwise") as said:
        model = tracer.load(tmp_path)
    assert [str(one.message) for one in said] == list(model.warnings)
    circuit = tracer.trace(model, tracer.Prompt(TEXT), 5, edges=False, baseline="zero")
    assert list(circuit.token_ids) == wanted
    assert circuit.warnings[0] == model.warnings[0]
    assert read_tokenizer(str(tmp_path))(TEXT).input_ids == wanted  # as a plan sees it
    assert skeleton(tmp_path).tokenizer(TEXT).input_ids == wanted  # and a server's client
    with pytest.warns(TracerWarning, match=r"tokenizer\.json"):
        held = tracer.load(t.tiny(family), tokenizer=str(tmp_path))
    assert held.tokenizer(TEXT).input_ids == wanted
    assert held.warnings == model.warnings


def test_it_is_said_in_the_shell(tmp_path: Path) -> None:
    saved("llama", tmp_path, "GPT2Tokenizer")
    asked = ["trace", TEXT, "--no-edges", "--model", str(tmp_path)]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    assert done.stderr.count("GPT2Tokenizer does it otherwise") == 1


@pytest.mark.parametrize("family", [family for family in t.FAMILIES if family != "qwen2"])
def test_nothing_is_said_where_both_agree(family: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = tracer.load(t.save(t.tiny(family), tmp_path))
    assert model.warnings == ()


def none_at_all(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def settings_alone(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def half_a_vocabulary(folder: Path) -> None:
    content: Any = json.loads((folder / "tokenizer.json").read_text())
    settings_alone(folder)
    (folder / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))


@pytest.mark.parametrize("left", [none_at_all, settings_alone, half_a_vocabulary])
@pytest.mark.parametrize("family", ["gemma2", "qwen2", "gpt2", "llama"])
def test_no_tokenizer_is_made_up(family: str, left: Any, tmp_path: Path) -> None:
    left(t.save(t.tiny(family), tmp_path))
    for ask in (tracer.load, read_tokenizer, skeleton):
        with refused(ModelError, "holds no tokenizer", "tokenizer.json", "put the files"):
            ask(str(tmp_path))


def test_a_vocabulary_and_its_merges_are_a_tokenizer(tmp_path: Path) -> None:
    t.save(t.tiny("gpt2"), tmp_path)
    half_a_vocabulary(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    assert tracer.load(tmp_path).tokenizer("car").tokens() == ["c", "a", "r"]
