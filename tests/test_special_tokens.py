"""What a tokenizer puts around a text: its beginning is kept or said to be missing, its end is left off; everywhere.

Each tokenizer is the tests' own with another template; the right answer is always the one whose beginning is put by the
tokenizer itself, which every other test uses.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import normalizers, processors
from typer.testing import CliRunner

import tiny as t
import tracer
from helpers import refused
from inline import InlinePool
from tracer import TracerWarning
from tracer.cli.app import app
from tracer.errors import JobError, surface
from tracer.prompts import Prompt, bos_of, encode, lacks_bos, with_bos

TEXT = "The secretaries near the car"
IDS = {"<bos>": t.BOS, "<eos>": t.EOS, "<pad>": t.PAD, "<unk>": t.UNK}


def tokenizer(template: str = "<bos> $A", **roles: Any) -> Any:
    """The tests' tokenizer with what `template` puts around a text."""
    made = t.tokenizer()
    specials = [(name, number) for name, number in IDS.items() if name in template]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, pair=f"{template} $B", special_tokens=specials
    )
    for name, value in roles.items():
        setattr(made, name, value)
    return made


@dataclass(frozen=True)
class Words:
    """A tokenizer, and what a configuration says."""

    tokenizer: Any = field(default_factory=tokenizer)
    vocab_size: int = t.VOCAB
    context_length: int = 64
    config: Any = field(default_factory=lambda: SimpleNamespace(bos_token_id=None))


PLAIN = Words()
BODY = tuple(PLAIN.tokenizer.encode(TEXT, add_special_tokens=False))


def configured(bos: int | None, **more: Any) -> Words:
    """A tokenizer that puts and names no beginning, under a configuration that may."""
    return Words(tokenizer("$A", bos_token=None, **more), config=SimpleNamespace(bos_token_id=bos))


def test_what_puts_a_beginning_already_is_left_alone() -> None:
    asked = Prompt(TEXT, " are", counterfactual="The secretary near the car")
    plain = encode(asked, PLAIN)
    assert plain.token_ids == (t.BOS, *BODY)
    assert plain.warnings == ()
    assert encode(replace(asked, bos=True), PLAIN) == plain
    assert not lacks_bos(PLAIN)


def test_a_beginning_that_is_not_put_is_said_and_added_where_asked() -> None:
    words, asked = Words(tokenizer("$A")), Prompt(TEXT, " are", counterfactual="The secretary near the car")
    without = encode(asked, words)
    assert without.token_ids == BODY
    (said,) = without.warnings  # once, for prompt and counterfactual
    assert "'<bos>'" in said
    assert "bos=True" in said
    assert replace(encode(replace(asked, bos=True), words)) == encode(asked, PLAIN)
    assert lacks_bos(words)
    for name, wanted in (("shell", "--bos puts"), ("job", "bos: true puts")):
        with surface(name):  # type: ignore[arg-type]
            assert wanted in encode(asked, words).warnings[0]


@pytest.mark.parametrize(
    ("template", "n_before"),
    [("<bos> $A <eos>", 1), ("$A <eos>", 0), ("<bos> $A <eos> <pad>", 1), ("<bos> <unk> $A <pad> <eos>", 2)],
)
def test_what_is_appended_is_left_off_and_said_once(template: str, n_before: int) -> None:
    words = Words(tokenizer(template))
    for text in (TEXT, "The", "car", "1"):
        body = tuple(words.tokenizer.encode(text, add_special_tokens=False))
        got = encode(Prompt(text, counterfactual=text), words)
        assert got.token_ids[n_before:] == body
        assert got.counterfactual_ids == got.token_ids
        assert got.positions == (n_before + len(body) - 1,)
        assert sum("left off" in note for note in got.warnings) == 1
    whole = encode(Prompt(TEXT), words).token_ids
    assert encode(Prompt(TEXT, positions=[-1, -2]), words).positions == (len(whole) - 1, len(whole) - 2)
    with refused(JobError, f"position {len(whole)}", f"use 0 to {len(whole) - 1}"):
        encode(Prompt(TEXT, positions=len(whole)), words)


@pytest.mark.parametrize("text", [f"{TEXT}<eos>", "<eos>", "<eos><eos>", "a<eos>", "<eos>a"])
def test_a_special_token_of_the_text_itself_stays(text: str) -> None:
    words = Words(tokenizer("<bos> $A <eos>"))
    body = tuple(words.tokenizer.encode(text, add_special_tokens=False))
    assert encode(Prompt(text), words).token_ids == (t.BOS, *body)


def test_an_end_that_is_appended_only_where_there_is_none_is_told_apart() -> None:
    """As some tokenizers in Python do; the text's own end is then not appended."""

    class Sometimes:
        def __init__(self) -> None:
            self.inner = t.tokenizer()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            ids = self.inner.encode(text, add_special_tokens=add_special_tokens)
            return ids if not add_special_tokens or ids[-1] == t.EOS else [*ids, t.EOS]

    words = Words(Sometimes())
    assert encode(Prompt(TEXT), words).token_ids == (t.BOS, *BODY)
    assert encode(Prompt(f"{TEXT}<eos>"), words).token_ids == (t.BOS, *BODY, t.EOS)


@pytest.mark.parametrize("template", ["$A", "<bos> $A <eos>"])
def test_token_ids_are_never_altered(template: str) -> None:
    words = Words(tokenizer(template))
    got = encode(Prompt(token_ids=[7, 8, t.EOS], counterfactual=[9, 8, t.EOS]), words)
    assert (got.token_ids, got.counterfactual_ids) == ((7, 8, t.EOS), (9, 8, t.EOS))
    assert got.positions == (2,)
    assert got.warnings == ()
    ids = Prompt(token_ids=[7, 8])
    assert with_bos(ids, True) is ids
    mixed = encode(Prompt(TEXT, counterfactual=[7] * len(BODY), bos=False), Words(tokenizer("$A <eos>")))
    assert mixed.counterfactual_ids == (7,) * len(BODY)


def test_a_beginning_that_is_another_role_counts() -> None:
    """Post-processors of the BERT kind put cls first and sep last."""
    words = Words(tokenizer("<unk> $A <pad>", bos_token=None, cls_token="<unk>", sep_token="<pad>"))
    got = encode(Prompt(TEXT), words)
    assert got.token_ids == (t.UNK, *BODY)
    assert [note for note in got.warnings if "left off" not in note] == []
    bare = Words(tokenizer("$A", bos_token=None, cls_token="<unk>"))
    assert "'<unk>'" in encode(Prompt(TEXT), bare).warnings[0]
    assert encode(Prompt(TEXT, bos=True), bare).token_ids == (t.UNK, *BODY)


def test_a_beginning_that_only_the_configuration_names() -> None:
    assert encode(Prompt(TEXT), configured(None)).warnings == ()
    assert "<eos>" in encode(Prompt(TEXT), configured(t.EOS)).warnings[0]
    assert encode(Prompt(TEXT, bos=True), configured(t.EOS)).token_ids == (t.EOS, *BODY)
    ordinary = configured(int(BODY[0]))  # LlamaConfig's default is 1, whatever that is in a vocabulary
    assert bos_of(ordinary) is None
    assert encode(Prompt(TEXT), ordinary).warnings == ()
    for words in (ordinary, configured(None)):
        with refused(JobError, "bos=True", "beginning-of-sequence"):
            encode(Prompt(TEXT, bos=True), words)


def test_a_text_that_brings_its_beginning_as_chat_templates_do() -> None:
    bare = Words(tokenizer("$A"))
    for bos in (False, True):
        got = encode(Prompt(f"<bos>{TEXT}", bos=bos), bare)
        assert got.token_ids == (t.BOS, *BODY)
        assert got.warnings == ()
    for words in (PLAIN, Words(tokenizer("<bos> $A <eos>"))):
        with refused(JobError, "begins with <bos>", "adds too"):
            encode(Prompt(f"<bos>{TEXT}"), words)


def test_texts_without_a_token_are_refused() -> None:
    for template in ("$A", "<bos> $A", "<bos> $A <eos>"):
        silent = tokenizer(template)
        silent.backend_tokenizer.normalizer = normalizers.Replace("~", "")
        for bos in (False, True):
            with refused(JobError, "'~~'", "no token"):
                encode(Prompt("~~", bos=bos), Words(silent))
            with refused(JobError, "''", "is empty"):
                encode(Prompt("", bos=bos), Words(silent))


def test_a_beginning_is_no_option_of_token_ids() -> None:
    with refused(JobError, "bos=True", "token ids"):
        Prompt(token_ids=[1, 2], bos=True)


# ------------------------------------------------------------------------------------------------ its numbers


def model(template: str) -> tracer.Model:
    return tracer.load(t.tiny("llama"), tokenizer=tokenizer(template))


ASKED = Prompt(TEXT, " are", " is")


def test_numbers_are_those_of_a_tokenizer_that_does_it_right() -> None:
    wanted = tracer.trace(model("<bos> $A"), ASKED, 20)
    with pytest.warns(TracerWarning, match="<eos>, which is left off"):
        ended = tracer.trace(model("<bos> $A <eos>"), ASKED, 20)
    added = tracer.trace(model("$A"), replace(ASKED, bos=True), 20)
    for got in (ended, added):
        assert (got.metric, got.positions, got.token_ids) == (wanted.metric, wanted.positions, wanted.token_ids)
        assert got.nodes.equals(wanted.nodes)
        assert got.links is not None
        assert got.links.equals(wanted.links)


def known(said: Iterable[Any]) -> tuple[str, ...]:
    """What is said, but for how likely a target is to a random model."""
    texts = [str(getattr(one, "message", one)) for one in said]
    return tuple(text for text in texts if "the model's next tokens" not in text and "likeliest next" not in text)


def test_every_public_function_says_it() -> None:
    bare = model("$A")
    pairs = [
        replace(ASKED, counterfactual="The secretary near the car"),
        Prompt("The keys near the car", " are", " is"),
    ]
    pairs[1] = replace(pairs[1], counterfactual="The key near the car")
    with pytest.warns(TracerWarning, match="bos=True puts it there") as seen:
        circuit = tracer.trace(bare, ASKED, 10)
    assert len(known(seen)) == 1
    assert known(circuit.warnings) == known(seen)
    for call in (
        lambda: tracer.attribute(bare, [ASKED]),
        lambda: tracer.evaluate(bare, circuit, pairs, "zero", [5, 10]),
        lambda: tracer.steer(bare, [(1, 3)], ASKED, factor=0, random=0, max_new_tokens=0),
    ):
        with pytest.warns(TracerWarning, match="bos=True puts it there") as seen:
            call()
        assert len(known(seen)) == 1
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        begun = tracer.trace(bare, replace(ASKED, bos=True), 10)
        tracer.evaluate(bare, begun, [with_bos(pair, True) for pair in pairs], "zero", [5, 10])
    assert known(seen) == ()


def test_references_of_a_mean_are_read_as_prompts_are() -> None:
    others = [Prompt("The keys near the cabinet"), Prompt("The man was near the car")]
    means = [
        tracer.attribute(one, [with_bos(ASKED, True)], baseline="mean", reference=[with_bos(p, True) for p in others])
        for one in (model("<bos> $A"), model("$A"))
    ]
    with pytest.warns(TracerWarning, match="left off"):
        means.append(tracer.attribute(model("<bos> $A <eos>"), [ASKED], baseline="mean", reference=others))
    for got in means[1:]:
        assert torch.equal(got.nodes, means[0].nodes)


# ------------------------------------------------------------------------------------ the command line and runs


def folder(template: str, path: Path) -> str:
    made = t.save(t.tiny("llama"), path)
    tokenizer(template).save_pretrained(made)
    return str(made)


def shipped(template: str, path: Path) -> str:
    """The shipped model, which agrees verbs, with another template."""
    demo = tracer.load("demo")
    demo.module.save_pretrained(path)
    demo.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, pair=f"{template} $B", special_tokens=[("<s>", 0)] if "<s>" in template else []
    )
    demo.tokenizer.save_pretrained(path)
    return str(path)


def test_the_command_line_says_it_once_and_has_the_option(tmp_path: Path) -> None:
    bare, out = folder("$A", tmp_path / "bare"), str(tmp_path / "run")
    asked = ["trace", TEXT, "--target", " are", "--foil", " is", "--model", bare, "--no-edges", "--nodes", "8"]
    plain = CliRunner().invoke(app, [*asked, "--out", out])
    assert plain.exit_code == 0
    assert plain.stderr.count("--bos puts it there") == 1
    assert "read at 4 " in plain.stdout
    assert json.loads((tmp_path / "run" / "run.json").read_text())["circuit"]["warnings"]
    assert CliRunner().invoke(app, ["show", out]).stderr.count("--bos puts it there") == 1
    begun = CliRunner().invoke(app, [*asked, "--bos", "--out", out, "--overwrite"])
    assert known(line for line in begun.stderr.splitlines() if line.startswith("note:")) == ()
    assert "read at 5 " in begun.stdout
    steer = ["steer", TEXT, "--model", bare, "--factor", "0", "--top", "2", "--random", "0", "--max-new-tokens", "0"]
    assert CliRunner().invoke(app, steer).stderr.count("--bos puts it there") == 1
    assert "--bos puts" not in CliRunner().invoke(app, [*steer, "--bos"]).stderr
    wrong = CliRunner().invoke(app, ["trace", "--token-ids", "7,8", "--bos", "--model", bare])
    assert (wrong.exit_code, wrong.stderr[:12]) == (2, "error: --bos")


def test_an_evaluation_begins_its_texts_as_the_circuits_prompt(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [("The keys near the car", "The key near the car"), ("The cars near the key", "The car near the key")]
    rows += [("The men near the car", "The man near the car")]
    answers = {"clean_answer": " are", "patch_answer": " is", "case": "x"}
    lines = [json.dumps({"clean_prefix": clean, "patch_prefix": patch, **answers}) for clean, patch in rows]
    pairs.write_text("\n".join(lines))
    results = {}
    for name, template, more in (("right", "<bos> $A", []), ("bare", "$A", ["--bos"])):
        out, made = str(tmp_path / f"{name}-run"), shipped(template.replace("bos", "s"), tmp_path / name)
        asked = ["trace", TEXT, "--target", " are", "--foil", " is", "--model", made, "--nodes", "30", "--out", out]
        assert CliRunner().invoke(app, [*asked, *more]).exit_code == 0
        found = CliRunner().invoke(app, ["evaluate", out, "--pairs", str(pairs), "--format", "json"])
        assert found.exit_code == 0, found.output
        assert "--bos" not in found.stderr
        results[name] = json.loads((Path(out) / "evaluation.json").read_text())
    assert results["right"] == results["bare"]
    other = CliRunner().invoke(app, ["evaluate", str(tmp_path / "bare-run"), "--pairs", str(pairs), "--no-bos"])
    assert other.exit_code == 2
    assert "not 6 tokens long" in other.stderr


def test_a_run_says_it_and_keeps_it_with_the_number_of_prompts(tmp_path: Path) -> None:
    rows = [
        {"text": TEXT, "target": " are"},
        {"text": "The keys", "target": " are"},
        {"token_ids": [7, 8], "target": 5},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    metrics = {}
    for name, template, bos in (("right", "<bos> $A", False), ("bare", "$A", False), ("begun", "$A", True)):
        job = {"kind": "dataset", "model": folder(template, tmp_path / name), "nodes": 5, "edges": False, "bos": bos}
        job |= {"input": {"path": str(tmp_path / "p.jsonl")}, "device": "cpu", "skip_first": True}
        heard: list[str] = []
        run = tracer.run(job, tmp_path / f"{name}-run", pool=InlinePool(), note=heard.append)
        record = run.folder.record() or {}
        said = [text for text in heard if "beginning-of-sequence" in text]
        notes = record["prompt_notes"]
        assert {text: notes[text] for text in known(notes)} == ({said[0]: 2} if name == "bare" else {})
        assert [text for text in said if "bos: true puts it there" in text] == said
        metrics[name] = run.table("prompts").sort_by("prompt_id")["metric"].to_pylist()
    assert metrics["begun"] == metrics["right"]
    assert metrics["bare"][2] == metrics["right"][2]
    assert metrics["bare"][:2] != metrics["right"][:2]


def test_a_benchmark_begins_its_pairs_too(tmp_path: Path) -> None:
    tables = {}
    for name, template, bos in (("right", "<s> $A", False), ("bare", "$A", True)):
        made = shipped(template, tmp_path / name)
        job = {"kind": "benchmark", "task": "sva", "model": made, "structures": ["simple"], "bos": bos}
        job |= {"train": 4, "test": 3, "methods": ["relp"], "bases": ["activation"], "sizes": [10], "device": "cpu"}
        tracer.run(job, tmp_path / f"{name}-run", pool=InlinePool())
        (outcome,) = json.loads((tmp_path / f"{name}-run" / "results.json").read_text())["outcomes"]
        tables[name] = {key: value for key, value in outcome.items() if not key.endswith("_seconds")}
    assert tables["bare"] == tables["right"]


# ------------------------------------------------------------------------------------------- the first position


@pytest.mark.filterwarnings("default:.*of the kept .attribution. is at position 0")
def test_much_attribution_at_the_first_token_is_said_with_what_to_do() -> None:
    made = tracer.load(t.tiny("qwen2"), tokenizer=t.tokenizer())
    prompt, foil = Prompt("The keys", " are"), " is"
    with pytest.warns(TracerWarning, match="position 0") as seen:
        heavy = tracer.trace(made, prompt, 10, edges=False)
    nodes = heavy.neurons.to_pylist()
    held = sum(abs(row["attribution"]) for row in nodes if row["position"] == 0)
    assert heavy.first_share == pytest.approx(held / sum(abs(row["attribution"]) for row in nodes))
    assert heavy.first_share > 0.2
    assert known(heavy.warnings) == known(seen)
    assert len(known(seen)) == 1
    assert heavy.warnings[0].startswith(f"{heavy.first_share:.0%} of the kept")
    assert "skip_first=True" in heavy.warnings[0]
    assert heavy.warnings[0].endswith("with foil=")
    with pytest.warns(TracerWarning, match="position 0") as seen:
        tracer.trace(made, replace(prompt, foil=foil), 10, edges=False)
    assert "foil" not in known(seen)[0]
    without = tracer.trace(made, prompt, 10, edges=False, skip_first=True)
    assert (without.first_share, known(without.warnings)) == (0.0, ())
    other = tracer.trace(tracer.load("demo"), Prompt("The parents", " are"), 10, edges=False)
    assert 0 < other.first_share < 0.2
    assert other.warnings == ()
    one = tracer.trace(made, Prompt(token_ids=[1], target=" are"), 5, edges=False)
    assert (one.first_share, known(one.warnings)) == (1.0, ())  # nowhere else to look


def test_a_run_counts_the_prompts_with_much_attribution_at_the_first_token(tmp_path: Path) -> None:
    made = t.save(t.tiny("qwen2"), tmp_path / "model")
    rows = [{"token_ids": [1, n], "target": 5} for n in range(8, 20)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    job = {"kind": "dataset", "model": str(made), "nodes": 6, "edges": False, "device": "cpu"}
    run = tracer.run(job | {"input": {"path": str(tmp_path / "p.jsonl")}}, tmp_path / "run", pool=InlinePool())
    nodes = run.table("nodes").to_pandas()
    nodes = nodes[nodes.kind == "neuron"].assign(size=lambda rows: rows.attribution.abs())
    shares = nodes[nodes.position == 0].groupby("prompt_id")["size"].sum() / nodes.groupby("prompt_id")["size"].sum()
    notes = (run.folder.record() or {})["prompt_notes"]
    ((text, count),) = [(text, notes[text]) for text in known(notes) if "tokenizer.json" not in text]
    assert count == (shares > 0.2).sum() > 0
    assert text.startswith("more than 20% of the kept")
    assert "skip_first: true" in text
