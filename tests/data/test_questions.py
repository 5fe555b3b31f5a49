"""Tasks without counterfactuals, labels of every task, and columns of messages: counted and computed apart."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tracer
from helpers import refused
from tracer.data import Row, read, tasks
from tracer.data.source import Source
from tracer.data.tasks import antonyms, users
from tracer.demo import data
from tracer.errors import JobError
from tracer.prompts import encode
from tracer.runs.jobs import DatasetJob, RevisionsJob, load_job

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"state-capitals": (250, 100), "addition": (6663, 3337), "antonyms": (36, 18)}
ASKED: list[tuple[str, dict[str, str], int, int]] = [(name, {}, *sizes) for name, sizes in SIZES.items()]
ASKED += [
    ("users", {"structure": name}, 2 * n, n) for name, n in {"country": 12, "occupation": 12, "religion": 10}.items()
]
ASKED += [("users", {"structure": "gender"}, 18, 6)]
EVERY = pytest.mark.parametrize(("name", "kind", "n_train", "n_test"), ASKED)


def rows(**given: Any) -> list[Row]:
    return list(read(Source(**given)))


# ---------------------------------------------------------------------------------------------------- the questions


@EVERY
def test_splits_are_apart_and_together_all(name: str, kind: dict[str, str], n_train: int, n_test: int) -> None:
    parts = {
        split: {one.asked for one in tasks.ask(name, split=split, count=count, **kind)}
        for split, count in {"train": n_train, "test": n_test, "all": n_train + n_test}.items()
    }
    assert [len(parts[split]) for split in ("train", "test", "all")] == [n_train, n_test, n_train + n_test]
    assert not parts["train"] & parts["test"]
    assert parts["train"] | parts["test"] == parts["all"]
    with refused(JobError, f"count={n_test + 1}", f"there are {n_test} test questions", f"use at most {n_test}"):
        tasks.ask(name, split="test", count=n_test + 1, **kind)


@EVERY
def test_draws_are_seeded_and_named(name: str, kind: dict[str, str], n_train: int, n_test: int) -> None:
    one = tasks.ask(name, split="train", count=n_test, **kind)
    assert one == tasks.ask(name, split="train", count=n_test, **kind)
    assert [q.asked for q in one] != [q.asked for q in tasks.ask(name, split="train", count=n_test, seed=1, **kind)]
    assert len({q.id for q in one}) == n_test
    given = rows(task=name, count=n_test, **kind)
    assert [row.error for row in given] == [None] * n_test
    assert [row.messages[0]["content"] if row.messages else row.text for row in given] == [q.asked for q in one]
    assert all({**kind, **q.labels} == row.labels for q, row in zip(one, given, strict=True))


def test_every_state_is_asked_about_once_before_any_is_again() -> None:
    known = {city: (state.name, state.capital) for state in data.STATES for city in state.cities}
    first = rows(task="state-capitals", count=50)
    assert Counter(row.labels["state"] for row in first) == {state.name: 1 for state in data.STATES}
    assert "Dallas" in {row.labels["city"] for row in first}
    assert set(Counter(row.labels["state"] for row in rows(task="state-capitals", count=100)).values()) == {2}
    for row in rows(task="state-capitals", split="all", count=350):
        assert row.messages is not None
        city = re.fullmatch(r"What is the capital of the state containing (.*)\?", row.messages[0]["content"])
        assert city is not None
        assert known[city[1]] == (row.labels["state"], row.labels["capital"])
        assert row.target == (f" {row.labels['capital']}",)
        assert (row.messages[0]["role"], row.seed, row.text) == ("user", "Answer:", None)


def test_sums_and_their_labels() -> None:
    seen = set()
    for row in rows(task="addition", split="all", count=10_000):
        assert row.messages is not None
        x, y = map(int, re.findall(r"\d+", row.messages[0]["content"]))
        assert row.messages[0]["content"] == f"What is {x} + {y}?"
        total = str(x + y)
        assert (row.labels["sum"], row.target) == (total, (total,))
        assert row.labels["tens"] == (total[-2] if len(total) > 1 else "0")
        for n in range(2, 11):
            assert (x + y - int(row.labels[f"mod{n}"])) % n == 0
            assert 0 <= int(row.labels[f"mod{n}"]) < n
        assert row.seed == "Answer: "
        seen.add((x, y))
    assert seen == {(x, y) for x in range(100) for y in range(100)}
    test = {(int(row.labels["x"]), int(row.labels["y"])) for row in rows(task="addition", split="test", count=3337)}
    assert all((y, x) in test for x, y in test)  # the same sum is not on both sides, whatever its order


def test_antonyms_are_balanced_and_opposite_in_every_language() -> None:
    every = rows(task="antonyms", split="all", count=54)
    assert set(Counter(row.labels["language"] for row in every).values()) == {6}
    assert set(Counter(row.labels["word"] for row in every).values()) == {9}
    assert set(Counter(row.labels["axis"] for row in every).values()) == {18}
    said = {(row.labels["language"], row.labels["word"]): row for row in every}
    for (language, word), row in said.items():
        (one, two) = antonyms.AXES[row.labels["axis"]]
        back = said[language, two if word == one else one]
        assert row.text is not None
        assert back.text is not None
        assert str((row.target or ("",))[0]) in back.text  # the answer to one is what the other asks about
        assert row.text.endswith('"')
    assert said["German", "big"].text == 'Das Gegenteil von "groß" ist "'
    assert said["German", "big"].target == ("klein",)
    assert len(rows(task="antonyms", count=9)) == len(
        {row.labels["language"] for row in rows(task="antonyms", count=9)}
    )


def test_users_are_balanced_and_do_not_name_what_is_asked() -> None:
    for attribute, values in users.SENTENCES.items():
        sizes = {len(sentences) for sentences in values.values()}
        assert len(sizes) == 1
        (n,) = sizes
        every = rows(task="users", structure=attribute, split="all", count=n * len(values))
        for row in every:
            assert row.messages is not None
            value = row.labels[attribute]
            assert row.messages[0]["content"] in values[value]
            assert (row.target, row.seed) == ((f" {value}",), f"{{{{Infobox person | {attribute} =")
            assert not re.search(rf"\b{value}\b", row.messages[0]["content"], re.IGNORECASE)
        for split, share in (("train", 2), ("test", 1)):
            some = rows(task="users", structure=attribute, split=split, count=len(values) * (n // 3) * share)
            assert len(set(Counter(row.labels[attribute] for row in some).values())) == 1
    sentences = [one for values in users.SENTENCES.values() for some in values.values() for one in some]
    assert len(set(sentences)) == len(sentences) == 126


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("addition", {"split": "dev", "count": 5}, ("split 'dev'", "all, train, test")),
        ("state-capitals", {"split": "dev", "count": 5}, ("split 'dev'",)),
        ("users", {"structure": "age", "split": "all", "count": 5}, ("'age'", "country, gender")),
        ("users", {"split": "all", "count": 5}, ("needs structure",)),
        ("addition", {"split": "all", "count": 0}, ("count=0", "at least one question")),
        ("sums", {"split": "all", "count": 5}, ("task 'sums'", "state-capitals, addition")),
    ],
)
def test_what_cannot_be_asked_is_refused(name: str, options: dict[str, Any], parts: tuple[str, ...]) -> None:
    with refused(JobError, *parts):
        tasks.ask(name, **options)


def test_questions_are_no_pairs() -> None:
    for name in tasks.QUESTIONS:
        with refused(JobError, f"task {name}", "has no counterfactuals", "states"):
            tasks.load(name, split="train", count=3)
    with pytest.raises(ValueError, match="train or test or all, not 'dev'"):
        Source(task="addition", count=3, split="dev")
    with pytest.raises(ValueError, match="train or test, not 'all'"):
        Source(task="states", count=3, split="all")


def test_what_a_tokenizer_has_not_as_one_token_is_said_when_it_is_asked() -> None:
    model = tracer.load("demo")
    whole = {row.labels["capital"] for row in rows(task="state-capitals", count=50)}
    several = {name for name in whole if len(name.split()) > 1}
    for one in tasks.ask("state-capitals", split="train", count=50):
        text = tracer.Prompt(one.asked, target=one.target)
        if one.labels["capital"] in several:
            with refused(JobError, "tokens", "one is needed"):
                encode(text, model)
        else:
            assert len(encode(text, model).target_ids) == 1


# --------------------------------------------------------------------------------------------------- labels of pairs


def test_pairs_are_labelled_with_what_they_are_about() -> None:
    states = {city: state for state in data.STATES for city in state.cities}
    for row in [*rows(task="states", count=40), *rows(task="capitals", count=40)]:
        assert row.text is not None
        city = next(name for name in states if name == row.labels["city"])
        assert city in row.text
        assert row.labels["state"] == states[city].name
    for row in rows(task="capitals", count=40):
        assert row.labels["capital"].startswith(str((row.target or ("",))[0]).strip())
    for row in rows(task="countries", count=40):
        assert (row.text or "").endswith(f"\n{row.labels['country']}:")
        assert row.target == (f" {row.labels['capital']}",)
    for row in rows(task="opposites", structure="english", count=40):
        assert row.text == f"The opposite of {row.labels['word']} is"
        assert row.target == (f" {row.labels['opposite']}",)
    for row in rows(task="indirect", count=40):
        assert row.target == (f" {row.labels['receiver']}",)
        assert row.foil == (f" {row.labels['giver']}",)


def test_agreement_is_labelled_with_the_number_of_its_noun() -> None:
    forms = {verb.plural: "plural" for verb in (*data.MAIN_VERBS, *data.CLAUSE_VERBS)}
    for structure in ("simple", "within_rc"):
        for row in rows(task="sva", structure=structure, count=60):
            assert row.labels["number"] == forms.get(str((row.target or ("",))[0]).strip(), "singular")
            assert ("attractor" in row.labels) == (structure != "simple")
            assert sorted(row.labels["case"].split("_")) == sorted(
                row.labels[name] for name in ("number", "attractor") if name in row.labels
            )


# ----------------------------------------------------------------------------------------------- columns of messages

SAID = [{"role": "user", "content": "Hello"}]


def test_messages_are_read_from_every_format(tmp_path: Path) -> None:
    other = [{"role": "user", "content": "Bye"}]
    record = {"messages": SAID, "seed": "It is", "counterfactual_messages": other, "target": " so"}
    (tmp_path / "p.jsonl").write_text(json.dumps(record))
    pq.write_table(pa.table({name: [value] for name, value in record.items()}), tmp_path / "p.parquet")
    with (tmp_path / "p.csv").open("w", newline="") as file:
        cells = [json.dumps(value) if isinstance(value, list) else value for value in record.values()]
        csv.writer(file).writerows([list(record), cells])
    for name in ("p.jsonl", "p.parquet", "p.csv"):
        (row,) = rows(path=str(tmp_path / name))
        assert (row.messages, row.seed, row.counterfactual) == (tuple(SAID), "It is", tuple(other))
        assert (row.error, row.text) == (None, None)
    extra = pa.table({"messages": [[{"role": "user", "content": "Hello", "tool_calls": None}]]})
    pq.write_table(extra, tmp_path / "extra.parquet")
    assert rows(path=str(tmp_path / "extra.parquet"))[0].messages == tuple(SAID)


@pytest.mark.parametrize(
    ("record", "part"),
    [
        ({"messages": "hello"}, "not JSON text of a list"),
        ({"messages": []}, "not a list of messages"),
        ({"messages": ["hello"]}, "not a list of messages"),
        ({"messages": [{"role": "user"}]}, "a role and a content"),
        ({"messages": [{"role": "user", "content": "a", "tools": [1]}]}, "and no more"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "not text"),
        ({"messages": SAID, "text": "Hello"}, "both given"),
        ({"messages": SAID, "seed": 5}, "not text"),
        ({"text": "Hello", "counterfactual_messages": SAID}, "without messages"),
    ],
)
def test_what_is_no_messages_is_its_rows_error(tmp_path: Path, record: dict[str, Any], part: str) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps(record))
    (row,) = rows(path=str(tmp_path / "p.jsonl"))
    assert part in str(row.error)


def test_a_seed_beside_a_text_is_somebodys_random_one(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"text": "Hello", "seed": 42}))
    pq.write_table(pa.table({"text": ["Hello"], "seed": [42]}), tmp_path / "p.parquet")
    for name in ("p.jsonl", "p.parquet"):
        (row,) = rows(path=str(tmp_path / name))
        assert (row.text, row.seed, row.error) == ("Hello", None, None)
    (row,) = rows(path=str(tmp_path / "p.parquet"), columns={"text": "text", "seed": "seed"})
    assert "seed" in str(row.error)


# ------------------------------------------------------------------------------------------------- the case studies


@pytest.mark.parametrize("path", sorted((ROOT / "jobs" / "cases").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_case_study_is_a_job_whose_prompts_are_there(path: Path) -> None:
    given = load_job(path)
    job = given.trace if isinstance(given, RevisionsJob) else given
    assert isinstance(job, DatasetJob)
    assert job.circuit != "none"
    found = list(read(job.source))
    assert len(found) == job.input.count
    assert not any(row.error for row in found)
    if job.evaluate is not None:
        assert len(list(read(job.evaluate.test))) == job.evaluate.test.count
    labels = re.search(r"^(?:# )?concepts: {labels: \[(.*?)\]}", path.read_text(), re.MULTILINE)
    assert (labels is None) == isinstance(given, RevisionsJob)  # which compares weights, not labels
    assert labels is None or set(labels[1].split(", ")) <= {name for row in found for name in row.labels}


def test_the_papers_settings_are_those_of_the_method_page() -> None:
    jobs = {name: load_job(ROOT / "jobs" / "cases" / f"{name}.yaml") for name in ("capitals", "addition")}
    two, sums = jobs["capitals"], jobs["addition"]
    assert isinstance(two, DatasetJob)
    assert isinstance(sums, DatasetJob)
    assert (two.metric, two.top_k, two.threshold, two.input.count) == ("topk", 5, 0.005, 50)
    assert two.pruning is not None
    assert (two.pruning.share, sums.nodes, sums.edges, sums.input.count) == (0.01, 500, False, 10_000)
    assert {two.model, sums.model} == {"meta-llama/Llama-3.1-8B-Instruct"}
