"""Tasks: pairs that split cleanly, files that come back as they were, and every reason an item is left out."""

from __future__ import annotations

import functools
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import tiny as t
import tracer
from helpers import refused
from tracer.data import tasks
from tracer.data.tasks import Pair, capitals, sva
from tracer.demo import data
from tracer.errors import JobError
from tracer.prompts import Prompt, encode

ITEM = {
    "clean_prefix": "The keys near the cabinet",
    "patch_prefix": "The key near the cabinet",
    "clean_answer": " are",
    "patch_answer": " is",
    "case": "plural_singular",
}


@functools.cache
def demo() -> tracer.Model:
    return tracer.load("demo")


def single(text: str) -> bool:
    return len(demo().tokenizer.encode(text, add_special_tokens=False)) == 1


def file(folder: Path, *items: object) -> Path:
    path = folder / "items.json"
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in items))
    return path


# ------------------------------------------------------------------------------------------- agreement


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("structure", data.STRUCTURES)
@pytest.mark.parametrize(("split", "count"), [("train", 300), ("test", 40)])
def test_the_protocols_numbers_are_there_and_every_pair_can_be_asked(structure: str, split: str, count: int) -> None:
    pairs = sva.generate(structure, split, count)
    assert len(pairs) == len({(one.prompt, one.target) for one in pairs}) == count
    assert len({one.id for one in pairs}) == count
    encoded = [encode(one.to_prompt(), demo()) for one in pairs]
    assert len({len(one.token_ids) for one in encoded}) == 1
    for pair, one in zip(pairs, encoded, strict=True):
        assert len(one.target_ids) == len(one.foil_ids) == 1
        assert one.counterfactual_ids is not None
        changed = [a != b for a, b in zip(one.token_ids, one.counterfactual_ids, strict=True)]
        assert sum(changed) == 1
        assert one.id == pair.id


@pytest.mark.parametrize("structure", data.STRUCTURES)
def test_no_prompt_is_on_both_sides_whatever_the_seed(structure: str) -> None:
    n_test = 60 if structure == "simple" else 400
    train = [pair for seed in range(3) for pair in sva.generate(structure, "train", 400, seed)]
    test = [pair for seed in range(3) for pair in sva.generate(structure, "test", n_test, seed)]
    tasks.check_split(train, test)
    texts = [{text for pair in side for text in (pair.prompt, pair.counterfactual)} for side in (train, test)]
    assert not texts[0] & texts[1]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("structure", data.STRUCTURES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_pairs_are_of_the_demo_models_own_split(structure: data.Structure, split: str) -> None:
    held = split == "test"
    known = {
        (one.prompt, one.answer): one
        for one in data.agreements(structure, "held_out" if held else "train", 2400, seed=7)
    }
    for pair in sva.generate(structure, split, 40, seed=7):
        one = known[pair.prompt, pair.target]
        assert one.is_held_out == held
        assert (one.other, one.foil) == (pair.counterfactual, pair.foil)


@pytest.mark.parametrize(
    ("structure", "prompt", "case"),
    [
        ("simple", "The women", "plural"),
        ("nounpp", "The secretaries near the car", "plural_singular"),
        ("rc", "The boat that the men like", "singular_plural"),
        ("within_rc", "The buses that the child", "plural_singular"),
    ],
)
def test_the_case_names_the_numbers_of_the_nouns(structure: data.Structure, prompt: str, case: str) -> None:
    assert sva._case(data.Agreement(structure, prompt, " are", " is", prompt, ())) == case
    for pair in sva.generate(structure, "train", 50):
        governing = pair.case.split("_")[1 if structure == "within_rc" else 0]
        forms = data.CLAUSE_VERBS if structure == "within_rc" else data.MAIN_VERBS
        verb = next(one for one in forms if pair.target[1:] in one)
        assert pair.target[1:] == (verb.plural if governing == "plural" else verb.singular)


def test_a_prompt_repeats_only_when_all_others_are_used() -> None:
    pairs = sva.generate("simple", "test", 60)
    prompts = [pair.prompt for pair in pairs]
    n_different = len(set(prompts))
    assert n_different >= 40
    assert len(set(prompts[:n_different])) == n_different
    assert max(Counter(prompt for prompt in prompts).values()) > 1


def test_generation_is_seeded() -> None:
    assert sva.generate("rc", "test", 30, 3) == sva.generate("rc", "test", 30, 3)
    assert sva.generate("rc", "test", 30, 3) != sva.generate("rc", "test", 30, 4)


def test_one_verb_alone_can_be_asked_for() -> None:
    assert {pair.target for pair in sva.generate("nounpp", "train", 50, verb="are")} == {" are", " is"}


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("simples", "train", 5), ("structure", "'simples'", "nounpp")),
        (("simple", "held_out", 5), ("split", "'held_out'", "test")),
        (("simple", "test", 0), ("count=0",)),
        (("simple", "test", 500), ("count=500", "simple has", "use at most")),
    ],
)
def test_what_cannot_be_generated_is_refused(arguments: tuple[Any, ...], parts: tuple[str, ...]) -> None:
    with refused(JobError, *parts):
        sva.generate(*arguments)


def test_a_verb_of_another_structure_is_refused() -> None:
    with refused(JobError, "verb 'are'", "like"):
        sva.generate("within_rc", "train", 5, verb="are")


def test_what_the_error_says_is_there_can_be_had() -> None:
    with pytest.raises(JobError) as caught:
        sva.generate("simple", "test", 500)
    most = int(caught.value.next_step.split()[-1])
    assert len(sva.generate("simple", "test", most)) == most


# ----------------------------------------------------------------------------------------- check_split


def pair(prompt: str, verb: str = " are") -> Pair:
    return Pair("x", prompt, prompt + "s", verb, " is", "plural")


def test_the_same_prompt_in_both_is_refused_even_with_another_verb() -> None:
    tasks.check_split([pair("The car")], [pair("The key")])
    with refused(JobError, "'The key'", "train and test"):
        tasks.check_split([pair("The car"), pair("The key")], [pair("The key", " were"), pair("The key")])
    with refused(JobError, "and 1 more"):
        tasks.check_split([pair("The car"), pair("The key")], [pair("The key"), pair("The car")])


def test_shared_prompts_are_counted_and_may_be_allowed() -> None:
    train, test = [pair("The car"), pair("The key")], [pair("The key"), pair("The key", " were"), pair("The cat")]
    with refused(JobError, "2 of 3 test pairs of simple", "allow_overlap: true"):
        tasks.check_split(train, test, name="simple")
    assert tasks.check_split(train, test, allow=True) == 2
    assert tasks.check_split(train, [pair("The cat")], allow=True) == 0


def test_unpaired_prompts_have_no_counterfactual() -> None:
    one = sva.generate("nounpp", "test", 1)[0]
    assert one.to_prompt().counterfactual == one.counterfactual
    assert one.to_prompt(paired=False).counterfactual is None


# ----------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("structure", data.STRUCTURES)
def test_what_is_written_is_read(structure: str, tmp_path: Path) -> None:
    pairs = sva.generate(structure, "test", 40)
    got = sva.read(sva.write(pairs, tmp_path / "pairs.json"), demo())
    assert list(got.pairs) == pairs
    assert got.skipped == {}
    assert got.summary() == "40 of 40 pairs"


class _Characters:
    """A tokenizer whose tokens are characters, but for one-token answers of a space and the rest."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        head, space, tail = text.rpartition(" ")
        ids = [ord(char) for char in head] + [
            -hash(tail) if space else ord(char) for char in (tail if not space else "x")
        ]
        return [1, *ids] if add_special_tokens else ids


@dataclass(frozen=True)
class Characters:
    tokenizer: Any = field(default_factory=_Characters)
    vocab_size: int = 1 << 21
    context_length: int = 1 << 10


WORD = st.text(st.characters(exclude_categories=["Cs", "Zs"]), min_size=1, max_size=8).filter(lambda text: text.strip())


@given(WORD, WORD, WORD, WORD)
def test_any_text_survives_the_file(tmp_path: Path, one: str, two: str, name: str, case: str) -> None:
    """Line separators, quotes, other scripts: whatever is text."""
    wrote = [Pair(name, one, one[::-1] if one[::-1].strip() else one, " " + two, " other" + two, case)]
    got = sva.read(sva.write(wrote, tmp_path / "x.json"), Characters())
    assert list(got.pairs) == wrote


def test_the_published_form_is_read_and_named_by_line(tmp_path: Path) -> None:
    got = sva.read(file(tmp_path, ITEM, "", ITEM | {"clean_answer": " were", "patch_answer": " was"}), demo())
    assert [one.id for one in got.pairs] == ["items:1", "items:3"]
    assert got.pairs[0] == Pair(
        "items:1", "The keys near the cabinet", "The key near the cabinet", " are", " is", "plural_singular"
    )


def test_written_files_have_the_published_keys_and_a_name(tmp_path: Path) -> None:
    path = sva.write(sva.generate("nounpp", "test", 2), tmp_path / "x.json")
    for line in path.read_text().splitlines():
        assert list(json.loads(line)) == [*ITEM, "id"]


def test_every_reason_is_counted_with_examples(tmp_path: Path) -> None:
    assert not single(" goes")
    items = [
        ITEM,
        *[ITEM | {"clean_answer": " goes"}] * 5,
        ITEM | {"patch_answer": " goes"},
        ITEM | {"patch_prefix": "The key"},
        ITEM | {"patch_answer": " are"},
        ITEM | {"clean_prefix": "The keys", "patch_prefix": "The key"},
    ]
    got = sva.read(file(tmp_path, *items), demo(), length=6)
    assert {why: one.count for why, one in got.skipped.items()} == {
        "an answer is not one token": 6,
        "the prefixes differ in token length": 1,
        "both answers are the same token": 1,
        "the prefixes are not 6 tokens long": 1,
    }
    assert got.skipped["an answer is not one token"].examples == tuple(f"line {i}: ' goes'" for i in (2, 3, 4))
    assert got.summary().startswith("1 of 10 pairs; 6 skipped because an answer is not one token (line 2: ' goes'); 1 ")
    assert len(got.pairs) == 1


def test_answers_without_their_space_are_taken_as_they_are_and_left_out(tmp_path: Path) -> None:
    """Older published files have them: "do" may be one token, but not the one that follows a word."""
    (bare,) = [text for text in ("a", "b") if single(text)][:1]
    other = "b" if bare == "a" else "a"
    items = [ITEM, ITEM | {"clean_prefix": "Th", "patch_prefix": "Th", "clean_answer": "e", "patch_answer": other}]
    got = sva.read(file(tmp_path, *items), demo())
    assert list(got.skipped) == ["the answer joins the prefix to other tokens"]


def test_a_prefix_longer_than_the_model_reads_is_left_out(tmp_path: Path) -> None:
    long = "The keys" + " near the cabinet" * demo().context_length
    got = sva.read(file(tmp_path, ITEM, ITEM | {"clean_prefix": long, "patch_prefix": long}), demo())
    assert [why.split(" than")[0] for why in got.skipped] == ["a prefix is longer"]


def test_another_tokenizer_leaves_out_other_items(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Tiny:
        tokenizer: Any
        vocab_size: int = t.VOCAB
        context_length: int = 64

    path = sva.write(sva.generate("nounpp", "test", 40), tmp_path / "x.json")
    got = sva.read(path, Tiny(t.tokenizer()))
    assert set(got.skipped) == {"an answer is not one token", "the prefixes differ in token length"}
    assert sum(one.count for one in got.skipped.values()) + len(got.pairs) == 40


@dataclass(frozen=True)
class Words:
    """A vocabulary of whole words whose normaliser puts a space before every text, as SentencePiece's do."""

    tokenizer: Any
    vocab_size: int
    context_length: int = 64


@functools.cache
def prepending() -> Words:
    words = ["<unk>", "<s>", "\u2581", *(f"\u2581{word}" for word in "The keys key car are is".split())]
    fast = Tokenizer(
        models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[], ignore_merges=True)
    )
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    fast.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    fast.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return Words(PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>", bos_token="<s>"), len(words))


def test_answers_are_single_tokens_by_the_rule_of_every_target(tmp_path: Path) -> None:
    """A tokenizer that prepends a space reads " are" by itself as two tokens; after a word it is one."""
    vocabulary = prepending()
    alone = vocabulary.tokenizer.encode(" are", add_special_tokens=False)
    item = {"clean_prefix": "The keys", "patch_prefix": "The key", "clean_answer": " are", "patch_answer": " is"}
    prompt = Prompt(item["clean_prefix"], target=" are", foil=" is", counterfactual="The key")
    encoded = encode(prompt, vocabulary)
    assert len(alone) == 2
    assert len(encoded.target_ids) == len(encoded.foil_ids) == 1
    got = sva.read(file(tmp_path, *[item | {"case": "plural"}] * 2), vocabulary, length=3)
    assert (len(got.pairs), got.skipped) == (2, {})
    for answer, why in ((" near", "an answer is not one token"), ("are", "an answer is not one token")):
        got = sva.read(file(tmp_path, item | {"case": ""}, item | {"case": "", "clean_answer": answer}), vocabulary)
        assert list(got.skipped) == [why], answer


def test_all_left_out_is_an_error_that_says_why(tmp_path: Path) -> None:
    with refused(JobError, "items.json", "0 of 2 pairs", "2 skipped because an answer is not one token"):
        sva.read(file(tmp_path, *[ITEM | {"clean_answer": " goes"}] * 2), demo())


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "items.json"
    path.write_text(content)
    with refused(JobError, "items.json", "no item"):
        sva.read(path, demo())


@pytest.mark.parametrize(
    ("bad", "parts"),
    [
        ('{"clean_prefix": ', ("is not JSON",)),
        ("[" * 100_000, ("is not JSON",)),
        ("[1, 2]", ("is a list",)),
        ("null", ("is a NoneType",)),
        ({key: ITEM[key] for key in list(ITEM)[:3]}, ("has no patch_answer, case",)),
        (ITEM | {"case": None}, ("case None", "not text")),
        (ITEM | {"clean_answer": [" are"]}, ("clean_answer", "list")),
        (ITEM | {"id": 3}, ("id 3", "int")),
        (ITEM | {"clean_prefix": "  "}, ("clean_prefix", "is empty")),
        (json.dumps(ITEM | {"patch_prefix": "\ud800"}), ("patch_prefix", "surrogate")),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, bad: object, parts: tuple[str, ...]) -> None:
    with refused(JobError, "line 3 of 'items.json'", *parts):
        sva.read(file(tmp_path, ITEM, "", bad), demo())


def test_a_file_that_cannot_be_read_or_written_is_refused(tmp_path: Path) -> None:
    with refused(JobError, "nowhere.json", "No such file"):
        sva.read(tmp_path / "nowhere.json", demo())
    (tmp_path / "file").touch()
    with refused(JobError, "Not a directory"):
        sva.write(sva.generate("nounpp", "test", 1), tmp_path / "file" / "x.json")
    with refused(JobError, "nothing to write"):
        sva.write([], tmp_path / "x.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe{}")
    with refused(JobError, "bytes.json", "UTF-8"):
        sva.read(tmp_path / "bytes.json", demo())


# -------------------------------------------------------------------------------------------- two hops


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("split", "count"), [("train", 300), ("test", 117)])
def test_pairs_are_of_cities_in_different_states(split: str, count: int) -> None:
    pairs = capitals.pairs(split, count)
    assert len({(one.prompt, one.counterfactual) for one in pairs}) == count
    for pair in pairs:
        asked, other = (text.split()[6] for text in (pair.prompt, pair.counterfactual))
        assert pair.prompt == data.two_hop(asked).prompt
        assert data.CITY_STATE[asked] != data.CITY_STATE[other]
        assert pair.case == f"{data.CITY_STATE[asked].name} / {data.CITY_STATE[other].name}"
        assert pair.target == " " + data.CITY_STATE[asked].capital.split()[0]
        assert pair.foil == " " + data.CITY_STATE[other].capital.split()[0]
        assert (asked in data.HELD_CITIES) == (other in data.HELD_CITIES) == (split == "test")
        assert encode(pair.to_prompt(), demo()).counterfactual_ids is not None


def test_every_city_is_asked_about_once_before_any_twice() -> None:
    prompts = [pair.prompt for pair in capitals.pairs("test", 150)]
    assert len(set(prompts[:117])) == 117
    assert max(Counter(prompts).values()) == 2


def test_capitals_are_seeded_and_split() -> None:
    assert capitals.pairs("test", 20, 1) == capitals.pairs("test", 20, 1)
    assert capitals.pairs("test", 20, 1) != capitals.pairs("test", 20, 2)
    tasks.check_split(capitals.pairs("train", 233), capitals.pairs("test", 117))


def test_the_demo_tokenizer_agrees_with_the_words() -> None:
    assert capitals.pairs("test", 117, vocabulary=demo()) == capitals.pairs("test", 117)
    assert capitals.states(vocabulary=demo()) == capitals.states()


def test_states_have_their_prompts_and_one_answer() -> None:
    found = capitals.states()
    assert len(found) == len({state.target for state in found}) == 50
    texas = next(state for state in found if state.name == "Texas")
    assert (texas.capital, texas.target, len(texas.prompts)) == ("Austin", " Austin", 7)
    assert texas.prompts["Dallas"] == "the capital of the state containing Dallas is"
    assert all(single(state.target) for state in found)
    sides = [{city for state in capitals.states(split) for city in state.prompts} for split in ("train", "test")]
    assert not sides[0] & sides[1]
    assert sides[1] == set(data.HELD_CITIES)
    assert all(len(state.prompts) >= 2 for split in ("train", "test") for state in capitals.states(split))


@dataclass(frozen=True)
class _Letters:
    """Every letter a token: capitals share first tokens and cities differ in length."""

    vocab_size: int = 1 << 21
    context_length: int = 1 << 10
    loses_space: bool = False

    @property
    def tokenizer(self) -> _Letters:
        return self

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        # A leading space belongs to its letter, unless the tokenizer loses it.
        spaced = text.startswith(" ")
        first = [ord(text[1]) + (1 << 20)] if spaced else [ord(text[0])]
        return first + [ord(char) for char in text[1 + spaced :]]

    def decode(self, ids: list[int], clean_up_tokenization_spaces: bool = False) -> str:
        letter = chr(ids[0] % (1 << 20))
        return letter if self.loses_space else " " + letter


def test_other_tokenizers_pair_equal_lengths_and_different_first_tokens() -> None:
    template = "What is the capital of the state containing {city}?"
    pairs = capitals.pairs("test", 500, vocabulary=_Letters(), template=template)
    for pair in pairs:
        assert len(pair.prompt) == len(pair.counterfactual)
        assert pair.target != pair.foil
        assert pair.prompt.startswith("What is")
        assert pair.prompt.endswith("?")
    assert {len(pair.target) for pair in pairs} == {2}


def test_a_first_token_that_is_no_text_is_refused() -> None:
    with refused(JobError, "capital 'Montgomery'", "stands alone"):
        capitals.states(vocabulary=_Letters(loses_space=True))


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda: capitals.pairs("held_out", 5), ("split 'held_out'", "train, test")),
        (lambda: capitals.pairs("test", 0), ("count=0",)),
        (lambda: capitals.pairs("test", 99_999), ("count=99999", "use at most")),
        (lambda: capitals.states(template="the capital"), ("template", "{city}")),
        (lambda: tasks.load("svo"), ("task 'svo'", "sva, capitals")),
        (lambda: tasks.load("sva", splits="train"), ("option 'splits'", "structure")),
        (lambda: tasks.load("sva", structure="rc"), ("task sva", "needs split, count")),
    ],
)
def test_what_is_not_there_is_refused(call: Any, parts: tuple[str, ...]) -> None:
    with refused(JobError, *parts):
        call()


def test_tasks_are_loaded_by_name() -> None:
    assert tasks.load("sva", structure="rc", split="test", count=5, seed=2) == sva.generate("rc", "test", 5, 2)
    assert tasks.load("capitals", split="test", count=5) == capitals.pairs("test", 5)
