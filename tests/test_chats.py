"""Chats: what a model's own template makes of messages, and nothing else; where it is read, and what is refused."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import chats
import tiny as t
import tracer
from helpers import direct_logits, refused
from inline import InlinePool
from tracer.cli.app import app
from tracer.errors import JobError, surface
from tracer.prompts import TEMPLATE_DATE, Prompt, encode, rendered

FAMILIES = tuple(chats.FAMILIES)
ASKED = "What is the capital of the state containing Dallas?"
USER = [{"role": "user", "content": ASKED}]
TALK = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Hello!"},
    *USER,
]
EVERY = pytest.mark.parametrize("name", FAMILIES)


def words(name: str, template: str | None = None) -> chats.Words:
    return chats.Words(chats.tokenizer(name, template))


# --------------------------------------------------------------------------------------- the model's own template


@EVERY
@pytest.mark.parametrize("messages", [USER, TALK], ids=["one", "several"])
def test_without_a_seed_it_is_the_template_with_the_answer_open(name: str, messages: list[dict[str, str]]) -> None:
    known = words(name)
    got = encode(Prompt(messages=messages), known)
    make = known.tokenizer.apply_chat_template
    assert got.text == make(messages, tokenize=False, add_generation_prompt=True)
    assert list(got.token_ids) == make(messages, add_generation_prompt=True)["input_ids"]
    assert got.positions == (len(got.token_ids) - 1,)
    assert got.warnings == ()


@EVERY
@pytest.mark.parametrize("messages", [USER, TALK], ids=["one", "several"])
def test_a_seed_is_the_assistants_message_that_goes_on(name: str, messages: list[dict[str, str]]) -> None:
    known = words(name)
    got = encode(Prompt(messages=messages, seed="Answer:"), known)
    answered = [*messages, {"role": "assistant", "content": "Answer:"}]
    make = known.tokenizer.apply_chat_template
    assert got.text == make(answered, tokenize=False, continue_final_message=True)
    assert list(got.token_ids) == make(answered, continue_final_message=True)["input_ids"]
    assert known.tokenizer.decode(got.token_ids[got.positions[0]]) == ":"


@EVERY
@pytest.mark.parametrize("seed", ["Answer: ", " Answer:", "\nThe sum is  "])
def test_spaces_around_a_seed_stay_as_they_are_written(name: str, seed: str) -> None:
    known = words(name)
    got = encode(Prompt(messages=USER, seed=seed), known)
    bare = encode(Prompt(messages=USER, seed=seed.strip()), known)
    assert got.text == bare.text.removesuffix(seed.strip()) + seed
    assert got.token_ids[-1] == known.tokenizer.encode(seed, add_special_tokens=False)[-1]


def test_the_published_formats_of_three_families() -> None:
    """Written out by hand, after the formats' documentation."""
    texts = {
        name: encode(Prompt(messages=USER, seed="Answer:", system="Be brief."), words(name)).text for name in FAMILIES
    }
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert texts["llama"] == (
        "<|begin_of_text|>" + head.format("system") + "Cutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\nBe brief.<|eot_id|>" + head.format("user") + ASKED + "<|eot_id|>"
        "" + head.format("assistant") + "Answer:"
    )
    im = f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{ASKED}<|im_end|>\n<|im_start|>assistant\n"
    assert texts["qwen2"] == f"{im}Answer:"
    assert texts["qwen3"] == f"{im}<think>\n\n</think>\n\nAnswer:"
    assert texts["gemma"] == (
        f"<bos><start_of_turn>user\nBe brief.\n\n{ASKED}<end_of_turn>\n<start_of_turn>model\nAnswer:"
    )


@EVERY
def test_special_tokens_come_once(name: str) -> None:
    known = words(name)
    ids = encode(Prompt(messages=USER, seed="Answer:"), known).token_ids
    bos = known.tokenizer.bos_token_id
    assert ids.count(bos) == (0 if bos is None else 1)
    assert bos is None or ids[0] == bos
    plain = known.tokenizer.encode(ASKED)  # which is begun by the tokenizer itself, in those that have a beginning
    assert (plain[0] == bos) == (bos is not None)


def test_a_system_message_is_the_first_of_the_messages() -> None:
    told = Prompt(messages=USER, system="Be brief.")
    assert told == Prompt(messages=[{"role": "system", "content": "Be brief."}, *USER])
    for name in FAMILIES:
        assert "Be brief." in encode(told, words(name)).text


def test_a_template_that_asks_for_the_day_gets_the_same_every_day() -> None:
    known = words("llama", chats.DATED)
    with_date = known.tokenizer.apply_chat_template(USER, tokenize=False, add_generation_prompt=True)
    assert datetime.datetime.now().strftime("%d %b %Y") in with_date  # the template does ask
    got = encode(Prompt(messages=USER, counterfactual=ASKED.replace("Dallas", "Boston")), known)
    assert got.text == encode(Prompt(messages=USER), words("llama")).text
    assert len(got.warnings) == 1
    assert TEMPLATE_DATE in got.warnings[0]


def test_a_template_that_takes_no_begun_answer_is_opened_and_followed_by_the_seed() -> None:
    strict = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('no') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[answer]{% endif %}"
    )
    assert encode(Prompt(messages=USER, seed="It is "), words("qwen2", strict)).text == f"[user]{ASKED}[answer]It is "


# ------------------------------------------------------------------------------------------------- counterfactuals


@EVERY
def test_a_text_takes_the_place_of_what_the_user_says_last(name: str) -> None:
    known, other = words(name), ASKED.replace("Dallas", "Boston")
    swapped = [*TALK[:-1], {"role": "user", "content": other}]
    wanted = encode(Prompt(messages=swapped, seed="Answer:"), known).token_ids
    for given in (other, swapped):
        got = encode(Prompt(messages=TALK, seed="Answer:", counterfactual=given), known)
        assert got.counterfactual_ids == wanted
    by_ids = encode(Prompt(messages=TALK, seed="Answer:", counterfactual=list(wanted)), known)
    assert by_ids.counterfactual_ids == wanted
    with refused(JobError, "counterfactual", "tokens", "equally long"):
        encode(Prompt(messages=TALK, counterfactual="What of Boston?"), known)


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"messages": []}, ("messages []", "list of messages")),
        ({"messages": [{"role": "user"}]}, ("role", "content")),
        ({"messages": [{"role": "user", "content": 5}]}, ("content that is text",)),
        ({"messages": [{"role": "user", "content": "Hi", "name": "x"}]}, ("and no more",)),
        ({"messages": [{"role": "tool", "content": "Hi"}]}, ("role 'tool'", "system, user, assistant")),
        ({"messages": [{"role": "user", "content": " "}]}, ("says nothing",)),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, ("not Unicode text",)),
        ({"messages": [*USER, {"role": "assistant", "content": "Hi"}]}, ("must be the user's", "seed=")),
        ({"messages": [*USER, *TALK]}, ("system", "before all others")),
        ({"messages": TALK, "system": "Again."}, ("beside system=",)),
        ({"messages": USER, "text": "Hi"}, ("both text and messages",)),
        ({"messages": USER, "token_ids": [1]}, ("both token_ids and messages",)),
        ({"messages": USER, "seed": "  "}, ("seed=", "text with words")),
        ({"messages": USER, "bos": True}, ("bos=True", "template")),
        ({"text": "Hi", "seed": "Answer:"}, ("seed=", "without messages")),
        ({"text": "Hi", "system": "Brief."}, ("system=", "without messages")),
        ({"text": "Hi", "counterfactual": USER}, ("is messages, and the prompt is none",)),
        ({}, ("neither text nor token_ids nor messages",)),
    ],
)
def test_what_is_no_conversation_is_refused_before_a_model_is_there(
    given: dict[str, Any], parts: tuple[str, ...]
) -> None:
    with refused(JobError, *parts):
        Prompt(**given)


def test_a_tokenizer_without_a_template_says_so() -> None:
    bare = chats.Words(t.tokenizer(), t.VOCAB)
    with refused(JobError, "has no chat template", "tuned for chats"):
        encode(Prompt(messages=[{"role": "user", "content": "The car"}]), bare)


def test_a_template_that_fails_is_a_line() -> None:
    with refused(JobError, "chat template fails", "must alternate"):
        encode(Prompt(messages=[*USER, *USER]), words("gemma"))
    with refused(JobError, "chat template fails"):
        encode(Prompt(messages=USER), words("gemma", "{{ messages[0].content.nothing.more }}"))
    with refused(JobError, "chat template fails"):
        encode(Prompt(messages=USER), words("gemma", "{% for"))


@EVERY
def test_a_name_of_a_special_token_is_refused_wherever_somebody_writes_it(name: str) -> None:
    known = words(name)
    for token in chats.FAMILIES[name].special:
        said = f"Stop {token} now"
        for prompt in (
            Prompt(messages=[{"role": "user", "content": said}]),
            Prompt(messages=USER, system=said),
            Prompt(messages=USER, seed=said),
            Prompt(messages=USER, counterfactual=said),
        ):
            with refused(JobError, "holds", token, "special token", "write it otherwise"):
                encode(prompt, known)


def test_what_the_user_says_is_no_part_of_the_template() -> None:
    said = "{{ 7 * 7 }} {% raw %} {{ messages }}"
    for name in FAMILIES:
        assert said in encode(Prompt(messages=[{"role": "user", "content": said}]), words(name)).text


def test_a_conversation_longer_than_the_context_is_refused() -> None:
    with refused(JobError, "messages", "tokens", "at most 1000"):
        encode(Prompt(messages=[{"role": "user", "content": "a " * 600}]), words("llama"))


# ------------------------------------------------------------------------------------------- numbers, verbs, runs


def chatty() -> Any:
    """The tests' tokenizer with a small template, whose words are tokens."""
    made = t.tokenizer()
    made.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ ' What' if m.role == 'user' else ' Answer' }} {{ m.content }}"
        "{% endfor %}{% if add_generation_prompt %} Answer{% endif %}"
    )
    return made


def chat_model() -> tracer.Model:
    return tracer.load(t.tiny("llama"), tokenizer=chatty())


SAID = [{"role": "user", "content": "the key near the car"}]


def test_a_circuit_of_a_chat_is_that_of_its_tokens_and_shows_its_text() -> None:
    model = chat_model()
    prompt = Prompt(target=" are", foil=" is", messages=SAID, seed="the")
    one = encode(prompt, model)
    got = tracer.trace(model, prompt, 20)
    wanted = tracer.trace(model, Prompt(token_ids=one.token_ids, target=" are", foil=" is"), 20)
    assert got.text == one.text == rendered(prompt.messages, "the", model.tokenizer)
    assert got.text.endswith("the")
    assert got.nodes.equals(wanted.nodes)
    assert got.positions == (len(one.token_ids) - 1,)
    logits = direct_logits(model, [one.token_ids])[0][-1]
    assert got.metric == pytest.approx(float(logits[one.target_ids[0]] - logits[one.foil_ids[0]]), abs=1e-4)


def test_a_rollout_asks_about_the_models_own_continuation() -> None:
    model = chat_model()
    prompt = Prompt(messages=SAID, counterfactual="the car near the key")
    start = encode(prompt, model)
    ids = list(start.token_ids)
    for n in (1, 2, 3):
        got = encode(tracer.rollout(model, prompt, n), model)
        assert list(got.token_ids) == ids
        (said,) = got.target_ids
        assert said == int(direct_logits(model, [ids])[0][-1].argmax())  # plain PyTorch's greedy
        assert got.counterfactual_ids == (*(start.counterfactual_ids or ()), *ids[len(start.token_ids) :])
        ids.append(said)
    first = tracer.trace(model, tracer.rollout(model, Prompt(messages=SAID)), 10)
    assert first.nodes.equals(tracer.trace(model, Prompt(messages=SAID), 10).nodes)  # the default target is the same


def test_a_rollout_past_the_end_and_other_slips_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from tracer.evaluation import answers

    model, prompt = chat_model(), Prompt(messages=SAID)
    for n in (0, True):
        with refused(JobError, f"n={n!r}", "from 1"):
            tracer.rollout(model, prompt, n)
    with refused(JobError, "has a target"):
        tracer.rollout(model, Prompt("The car", target=" are"))
    with refused(JobError, "read elsewhere"):
        tracer.rollout(model, Prompt("The car", positions=0))
    monkeypatch.setattr(answers, "greedy", lambda *_: [t.EOS])
    assert tracer.rollout(model, prompt, 1).target == t.EOS
    with refused(JobError, "n=2", "ends its answer after 1 tokens"):
        tracer.rollout(model, prompt, 2)


def folder(path: Path) -> str:
    made = t.save(t.tiny("llama"), path)
    chatty().save_pretrained(made)
    return str(made)


def test_verbs_ask_a_chat(tmp_path: Path) -> None:
    model, out = folder(tmp_path / "model"), str(tmp_path / "run")
    run = CliRunner()
    chat = ["--chat", "--seed-answer", "the", "--model", model]
    asked = ["trace", "the key near the car", "--target", " are", *chat, "--no-edges", "--nodes", "5"]
    found = run.invoke(app, [*asked, "--out", out])
    assert found.exit_code == 0, found.output
    text = json.loads((tmp_path / "run" / "run.json").read_text())["circuit"]["text"]
    known = tracer.load(model)
    assert text == encode(Prompt(messages=SAID, seed="the"), known).text
    assert text in " ".join(found.stdout.split())
    assert run.invoke(app, [*asked, "--out", out]).exit_code == 0  # the same circuit again
    steered = run.invoke(
        app, ["steer", "the key", *chat, "--factor", "0", "--top", "2", "--random", "0", "--max-new-tokens", "0"]
    )
    assert steered.exit_code == 0, steered.output
    assert encode(Prompt(messages=[{"role": "user", "content": "the key"}], seed="the"), known).text in steered.stdout
    swapped = run.invoke(
        app,
        ["swap", "the key", "the car", "--target", " are", "--foil", " is", *chat, "--ks", "3", "--format", "json"],
    )
    assert swapped.exit_code == 0, swapped.output
    assert json.loads(swapped.stdout)["pairs"][0]["text"].endswith("the")
    rolled = run.invoke(
        app, ["trace", "the key", *chat, "--rollout", "2", "--no-edges", "--nodes", "5", "--format", "json"]
    )
    assert rolled.exit_code == 0, rolled.output


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (["The car", "--seed-answer", "Answer:"], ("--seed-answer 'Answer:'", "without --chat")),
        (["The car", "--system", "Be brief."], ("--system 'Be brief.'", "without --chat")),
        (["--token-ids", "1,2", "--chat"], ("--chat", "token ids")),
        (["The car", "--chat", "--bos"], ("--bos", "template")),
        (["The car", "--rollout", "1", "--target", " are"], ("--rollout", "--target")),
        (["The car", "--chat"], ("no chat template",)),
    ],
)
def test_slips_of_the_command_line_are_a_line(given: list[str], parts: tuple[str, ...]) -> None:
    found = CliRunner().invoke(app, ["trace", *given])
    assert found.exit_code == 2
    for part in parts:
        assert part in found.stderr


def test_a_job_says_it_in_its_words() -> None:
    with surface("job"), refused(JobError, "seed:", "without messages", "messages:"):
        Prompt("Hi", seed="Answer")


def test_a_run_asks_messages_as_python_does(tmp_path: Path) -> None:
    model = folder(tmp_path / "model")
    other = [{"role": "user", "content": "the car near the key"}]
    rows = [
        {"messages": SAID, "seed": "the", "target": " are", "foil": " is", "counterfactual_messages": other},
        {"messages": SAID, "target": " are", "foil": " is", "counterfactual": "the car near the key"},
        {"messages": [{"role": "user", "content": "stop <eos>"}], "target": " are", "foil": " is"},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    job = {"kind": "dataset", "model": model, "nodes": 5, "edges": False, "device": "cpu", "baseline": "counterfactual"}
    run = tracer.run(job | {"input": {"path": str(tmp_path / "p.jsonl")}}, tmp_path / "run", pool=InlinePool())
    found = run.table("prompts").sort_by("prompt_id").to_pylist()
    assert [row["status"] for row in found] == ["ok", "ok", "failed"]
    assert "special token" in found[2]["error"]
    loaded = tracer.load(model)
    for row, seed in zip(found[:2], ("the", None), strict=True):
        prompt = Prompt(messages=SAID, seed=seed, target=" are", foil=" is", counterfactual=other)
        one = encode(prompt, loaded)
        assert (row["text"], tuple(row["token_ids"])) == (one.text, one.token_ids)
        logits = direct_logits(loaded, [one.token_ids])[0][-1]
        wanted = logits[one.target_ids[0]] - logits[one.foil_ids[0]]
        torch.testing.assert_close(torch.tensor(row["metric"]), wanted.float(), atol=1e-4, rtol=1e-4)
