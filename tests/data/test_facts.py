"""The tasks of a pretrained model: facts checked by hand, splits that share nothing, pairs that differ as they should,
and what a tokenizer cannot be asked."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, field
from typing import get_args

import pytest

import tracer
from helpers import refused
from tracer.data import tasks
from tracer.data.source import STRUCTURES, Paired, Source, Unpaired
from tracer.data.tasks import Pair, countries, indirect, opposites, states
from tracer.data.tasks.pairs import Item
from tracer.errors import JobError

COUNTS = {"states": (300, 180), "countries": (240, 100), "indirect": (80, 40)}
OPPOSITES = {"english": (120, 60), "spanish": (240, 120), "shots": (120, 60)}
ASKED = [(name, {}, *counts) for name, counts in COUNTS.items()]
ASKED += [("opposites", {"structure": structure}, *counts) for structure, counts in OPPOSITES.items()]
EVERY = pytest.mark.parametrize(("name", "kind", "n_train", "n_test"), ASKED)


@functools.cache
def demo() -> tracer.Model:
    return tracer.load("demo")


def both(name: str, kind: dict[str, str], n_train: int, n_test: int, seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    train = tasks.load(name, split="train", count=n_train, seed=seed, **kind)
    return train, tasks.load(name, split="test", count=n_test, seed=seed, **kind)


def changed(pair: Pair) -> list[tuple[str, str]]:
    """The words in which a pair's prompts differ."""
    words = [text.replace("\n", " \n ").split(" ") for text in (pair.prompt, pair.counterfactual)]
    return [two for two in zip(*words, strict=True) if two[0] != two[1]]


# -------------------------------------------------------------------------------------------------- every task


@EVERY
def test_pairs_are_different_and_differ_in_what_is_asked_about_alone(
    name: str, kind: dict[str, str], n_train: int, n_test: int
) -> None:
    for pairs in both(name, kind, n_train, n_test):
        assert len({(pair.prompt, pair.counterfactual) for pair in pairs}) == len(pairs)
        assert len({pair.id for pair in pairs}) == len(pairs)
        for pair in pairs:
            assert pair.target != pair.foil
            assert pair.target[0] == pair.foil[0] == " "
            assert len(pair.target.split()) == len(pair.foil.split()) == 1
            assert len(changed(pair)) == 1, pair


@EVERY
def test_no_test_item_is_trained_on_whatever_the_seed(
    name: str, kind: dict[str, str], n_train: int, n_test: int
) -> None:
    sides = [both(name, kind, n_train, n_test, seed) for seed in range(3)]
    texts = [
        {text for found in sides for pair in found[side] for text in (pair.prompt, pair.counterfactual)}
        for side in (0, 1)
    ]
    assert not texts[0] & texts[1]
    tasks.check_split(*sides[0])


@EVERY
def test_each_item_is_asked_about_before_any_is_again(
    name: str, kind: dict[str, str], n_train: int, n_test: int
) -> None:
    for pairs in both(name, kind, n_train, n_test):
        times = Counter(pair.prompt for pair in pairs)
        assert max(times.values()) - min(times.values()) <= 1
        assert len(times) == min(len(pairs), len(times))


@EVERY
def test_draws_are_seeded(name: str, kind: dict[str, str], n_train: int, n_test: int) -> None:
    assert both(name, kind, n_train, n_test) == both(name, kind, n_train, n_test)
    assert both(name, kind, n_train, n_test)[0] != both(name, kind, n_train, n_test, seed=1)[0]


@EVERY
def test_a_job_names_them_as_python_does(name: str, kind: dict[str, str], n_train: int, n_test: int) -> None:
    Source.model_validate({"task": name, "count": n_train, **kind})
    with pytest.raises(ValueError, match="structure"):
        Source.model_validate({"task": name, "count": n_train, "structure": "nounpp"})


def test_tasks_and_structures_are_those_of_the_record() -> None:
    assert tuple(tasks.TASKS) == get_args(Paired)
    assert tuple(tasks.QUESTIONS) == get_args(Unpaired)
    assert STRUCTURES["opposites"] == opposites.STRUCTURES


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("states", {"split": "held_out", "count": 5}, ("split", "'held_out'", "train, test")),
        ("states", {"split": "test", "count": 0}, ("count=0",)),
        ("countries", {"split": "test", "count": 10**6}, ("count=1000000", "test pairs", "use at most")),
        ("opposites", {"structure": "latin", "split": "test", "count": 5}, ("structure", "'latin'", "spanish")),
        ("opposites", {"split": "test", "count": 5}, ("needs structure",)),
        ("indirect", {"split": "test", "count": 10**6}, ("test pairs", "use at most")),
        ("indirect", {"split": "test", "count": 0}, ("count=0",)),
    ],
)
def test_what_cannot_be_drawn_is_refused(name: str, options: dict[str, object], parts: tuple[str, ...]) -> None:
    with refused(JobError, *parts):
        tasks.load(name, **options)


# ---------------------------------------------------------------------------------------------------- the facts


def asked(items: list[Item]) -> dict[str, str]:
    return {item.prompt: item.answer for item in items}


def test_states_are_right() -> None:
    known = asked([*states.items("train"), *states.items("test")])
    for city, state in {
        "Dallas": "Texas", "Miami": "Florida", "Oakland": "California", "Chicago": "Illinois", "Seattle": "Washington",
        "Detroit": "Michigan", "Memphis": "Tennessee", "Tucson": "Arizona", "Omaha": "Nebraska", "Boise": None,
    }.items():  # fmt: skip
        assert known.get(f"{city} is a city in the state of") == (state and f" {state}")
    assert "Dallas is a city in the state of" in asked(states.items("test"))
    assert len(states.items("train")) == 186
    assert len(states.items("test")) == 94
    cities = [item.prompt for item in (*states.items("train"), *states.items("test"))]
    assert len(set(cities)) == len(cities)  # no city of two states


def test_capitals_are_right() -> None:
    for country, capital in {
        "Italy": "Rome", "Australia": "Canberra", "Canada": "Ottawa", "Turkey": "Ankara", "Morocco": "Rabat",
        "Nigeria": "Abuja", "Kazakhstan": "Astana", "Pakistan": "Islamabad", "Switzerland": "Bern", "Vietnam": "Hanoi",
    }.items():  # fmt: skip
        assert countries.CAPITALS[country] == capital
    assert len(set(countries.CAPITALS.values())) == len(countries.CAPITALS) == 101
    assert not countries.SHOTS.keys() & countries.CAPITALS.keys()
    every = asked([*countries.items("train"), *countries.items("test")])
    assert every["France: Paris\nJapan: Tokyo\nItaly:"] == " Rome"


def test_opposites_are_right_both_ways_and_split_by_pair() -> None:
    for words in (opposites.ENGLISH, opposites.SPANISH):
        flat = [word for pair in words for word in pair]
        assert len(set(flat)) == len(flat)  # each word has one opposite
    assert {("big", "small")[::-1], ("hot", "cold")} <= {pair[::-1] for pair in opposites.ENGLISH} | {("hot", "cold")}
    every = {kind: asked([*opposites.items(kind, "train"), *opposites.items(kind, "test")]) for kind in OPPOSITES}
    assert every["english"]["The opposite of big is"] == " small"
    assert every["english"]["The opposite of small is"] == " big"
    assert every["spanish"]["El contrario de grande es"] == " pequeño"
    assert every["shots"]["hot: cold\nbig: small\nfast:"] == " slow"
    assert not {f"hot: cold\nbig: small\n{word}:" for word in ("hot", "cold", "big", "small")} & set(every["shots"])
    for kind in OPPOSITES:  # neither a word nor its opposite is on both sides
        sides = [
            {word.strip() for item in opposites.items(kind, split) for word in (item.name, item.answer)}
            for split in ("train", "test")
        ]
        assert not sides[0] & sides[1]
    shared = {item.name for item in opposites.items("english", "test")} & {
        item.name for item in opposites.items("shots", "train")
    }
    assert not shared  # the two ways to ask split alike


def test_the_indirect_object_is_the_name_that_does_not_give() -> None:
    for split, count in (("train", 200), ("test", 100)):
        pairs = tasks.load("indirect", split=split, count=count)
        assert Counter(pair.case for pair in pairs) == {"abba": count / 2, "baba": count / 2}
        for pair in pairs:
            before, after = pair.prompt.split(", ")
            first, second = (word for word in before.split() if word in indirect.NAMES[split])
            giver = after.split()[0]
            assert {giver, pair.target.strip()} == {first, second}
            assert (giver == second) == (pair.case == "abba")
            assert changed(pair) == [(giver, pair.target.strip())]
    for name in ("NAMES", "FRAMES", "PLACES", "THINGS"):
        table = getattr(indirect, name)
        assert not set(table["train"]) & set(table["test"])
        assert len(set(table["train"])) == len(table["train"])
    assert {"Mary", "John"} <= set(indirect.NAMES["test"])


# --------------------------------------------------------------------------------------------- with a tokenizer


def test_for_a_model_pairs_are_of_equal_length_and_answers_one_token() -> None:
    encode = demo().tokenizer.encode
    found = tasks.askable("states", demo(), split="test", count=20)
    assert len(found.pairs) + sum(group.count for group in found.skipped.values()) == 20
    for pair in found.pairs:
        assert len(encode(pair.prompt)) == len(encode(pair.counterfactual))
        for text, answer in ((pair.prompt, pair.target), (pair.counterfactual, pair.foil)):
            assert len(encode(text + answer)) == len(encode(text)) + 1


class _Letters:
    """A tokenizer of single letters: no answer is one token."""

    def encode(self, text: str, **_: object) -> list[int]:
        return list(map(ord, text))

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(map(chr, ids))


@dataclass(frozen=True)
class _Spelling:
    tokenizer: _Letters = field(default_factory=_Letters)
    vocab_size: int = 2**17
    context_length: int = 200


def test_what_a_tokenizer_cannot_be_asked_is_no_pair() -> None:
    with refused(JobError, "count=5", "there are 0 test pairs"):
        tasks.askable("states", _Spelling(), split="test", count=5)
    with refused(JobError, "task sva", "an answer is not one token"):
        tasks.askable("sva", _Spelling(), structure="simple", split="test", count=5)
