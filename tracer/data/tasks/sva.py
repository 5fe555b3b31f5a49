"""Subject-verb agreement: pairs from our own word lists, and the JSON-lines files of Marks et al. (2024).

Knows the four structures, their split and the five keys of a file's item. Refuses to know models beyond a tokenizer
and a context length, and never repairs an item: what a model cannot be asked is skipped, counted and reported.
"""

from __future__ import annotations

import functools
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracer.data.tasks.pairs import Pair
from tracer.demo import data
from tracer.errors import JobError, quoted
from tracer.prompts import Prompt, Vocabulary, encode, tokenize
from tracer.system import jsontext, wholefile
from tracer.text import is_text

SPLITS: dict[str, data.Split] = {"train": "train", "test": "held_out"}
"""Our names, and which of the demo model's training splits the pairs come from."""

_KEYS = {
    "clean_prefix": "prompt",
    "patch_prefix": "counterfactual",
    "clean_answer": "target",
    "patch_answer": "foil",
    "case": "case",
}
_EXAMPLES = 3  # of each reason that are kept
_PLURALS = frozenset(noun.plural for noun in data.NOUNS)
# Where the nouns stand: "The N", "The N near the N", "The N that the N (verb)".
_NOUN_PLACES: dict[str, tuple[int, ...]] = {"simple": (1,), "nounpp": (1, 4), "rc": (1, 4), "within_rc": (1, 4)}


# ------------------------------------------------------------------------------------------ our own pairs


def _test_nouns() -> frozenset[str]:
    """A third of the nouns, all with a held-out verb, so that `simple` has 40 test pairs and more."""
    verbs = {verb.plural for verb in data.MAIN_VERBS}
    held = {noun for noun, verb in data.HELD_NOUN_VERBS if verb in verbs}
    nouns = [noun.singular for noun in data.NOUNS if noun.singular in held]
    return frozenset(random.Random("sva simple").sample(nouns, len(data.NOUNS) // 3))


TEST_NOUNS = _test_nouns()
"""Nouns that `simple` tests and never trains on: its prompts hold one noun, so a split by verb would share them."""


def generate(structure: str, split: str, count: int, seed: int = 0, *, verb: str | None = None) -> list[Pair]:
    """`count` different pairs; the counterfactual has the other number of the noun that the verb agrees with.

    No prompt of ``train`` is a prompt or counterfactual of ``test``, whatever the seeds, and the demo model was not
    trained on what decides a test pair: `simple` splits by noun, the others by the pair of nouns. Prompts repeat, with
    another verb, only when there are no more different ones.

    Args:
        structure: ``simple``, ``nounpp``, ``rc`` or ``within_rc``.
        split: ``train`` or ``test``.
        verb: only pairs with this verb, by its plural, such as ``"are"``.

    Raises:
        JobError: an unknown structure, split or verb, or fewer pairs than `count`.
    """
    _known("structure", structure, data.STRUCTURES)
    _known("split", split, tuple(SPLITS))
    verbs = data.CLAUSE_VERBS if structure == "within_rc" else data.MAIN_VERBS
    if verb is not None:
        _known("verb", verb, tuple(known.plural for known in verbs))
    if count < 1:
        raise JobError(f"count={count}", "at least one pair is needed", "use 1 or more; 300 to train and 40 to test")
    examples = _found(structure, split, count, seed, verb)
    if len(examples) < count:
        raise JobError(
            f"count={count}", f"{structure} has {len(examples)} {split} pairs", f"use at most {len(examples)}"
        )
    return [
        Pair(
            f"{structure}-{split}-{seed}-{i}",
            example.prompt,
            example.other,
            example.answer,
            example.foil,
            _case(example),
            _labels(structure, _case(example)),
        )
        for i, example in enumerate(examples)
    ]


def _found(structure: str, split: str, count: int, seed: int, verb: str | None) -> list[data.Agreement]:
    if structure == "simple":
        kept = random.Random(f"{seed} {split}").sample(pool := _simple(split, verb), len(pool))
    else:
        kept = _drawn(structure, split, count, seed, verb)
    seen: Counter[str] = Counter()
    rounds: list[int] = []
    for example in kept:
        rounds.append(seen[example.prompt])
        seen[example.prompt] += 1
    order = sorted(range(len(kept)), key=rounds.__getitem__)
    return [kept[i] for i in order[:count]]


@functools.cache
def _simple(split: str, verb: str | None) -> tuple[data.Agreement, ...]:
    """All there are, listed once: so few that every draw would have to find them all again."""
    most = 2 * len(data.NOUNS) * len(data.MAIN_VERBS)
    return tuple(_of_split(data.agreements("simple", SPLITS[split], most, verb=verb), split))


def _drawn(structure: str, split: str, count: int, seed: int, verb: str | None) -> list[data.Agreement]:
    asked = 4 * count + 400
    while True:
        # `data` names the structures in its type, and `generate` has checked that it is one.
        drawn = data.agreements(structure, SPLITS[split], asked, seed=seed, verb=verb)  # pyright: ignore
        kept = _of_split(drawn, split)
        if len(kept) >= count or len(drawn) < asked:
            return kept
        asked *= 2


def _of_split(examples: list[data.Agreement], split: str) -> list[data.Agreement]:
    return [example for example in examples if _decided(example) == (split == "test")]


def _decided(example: data.Agreement) -> bool:
    """Whether the prompt itself, apart from the verb that follows, belongs to the test side."""
    if example.structure == "simple":
        return example.combinations[0][0] in TEST_NOUNS
    # The pair of nouns: after the subject's verb, except where that does not come into the sentence.
    return example.combinations[0 if example.structure == "within_rc" else 1] in data.HELD_NOUN_NOUNS


def _case(example: data.Agreement) -> str:
    words = example.prompt.split()
    return "_".join("plural" if words[i] in _PLURALS else "singular" for i in _NOUN_PLACES[example.structure])


def _labels(structure: str, case: str) -> dict[str, str]:
    """The number of the noun that the verb agrees with, and that of the other, where there is one."""
    agrees, *others = case.split("_")[:: -1 if structure == "within_rc" else 1]
    return {"number": agrees, **({"attractor": others[0]} if others else {})}


def _known(what: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise JobError(f"{what} {quoted(value)}", "is not known", f"use {', '.join(allowed)}")


# ------------------------------------------------------------------------------------------------ files


@dataclass(frozen=True)
class Skipped:
    """How many items were left out for one reason, and the first few of them."""

    count: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class Reading:
    """What a file gave: the pairs, and by reason what was left out."""

    pairs: tuple[Pair, ...]
    skipped: dict[str, Skipped]

    def summary(self) -> str:
        """One line, e.g. ``"38 of 40 pairs; 2 skipped because ... (line 7: ' arent')"``."""
        left = sum(group.count for group in self.skipped.values())
        reasons = [f"{group.count} skipped because {why} ({group.examples[0]})" for why, group in self.skipped.items()]
        return "; ".join([f"{len(self.pairs)} of {len(self.pairs) + left} pairs", *reasons])


def read(path: str | Path, vocabulary: Vocabulary, *, length: int | None = None) -> Reading:
    """The pairs of a JSON-lines file of Marks et al. that this vocabulary can be asked.

    Answers are taken as they are written, with their leading space. As in the authors' loader
    (github.com/saprmarks/feature-circuits), an item is left out when an answer is not one token (by the rule of
    ``Prompt(target=...)``), the prefixes differ in token length, or the answer joins the prefix to other tokens (an
    answer without its space). An ``id`` key, which `write` adds, names the pair; without one it is the file's name and
    the line.

    Args:
        length: leave out prefixes of another number of tokens (special tokens count), so that positions align.

    Raises:
        JobError: an unreadable file, a malformed line (named), or no item that is left.
    """
    path = Path(path)
    reading = sifted([(f"line {line}", pair) for line, pair in _numbered(path)], vocabulary, length)
    if not reading.pairs:
        rule = reading.summary() if reading.skipped else "holds no item"
        raise JobError(f"file {quoted(str(path), 300)}", rule, "give items that this model's tokenizer can be asked")
    return reading


def sifted(named: Iterable[tuple[str, Pair]], vocabulary: Vocabulary, length: int | None = None) -> Reading:
    """The pairs that this vocabulary can be asked, and by reason what was left out.

    Args:
        named: each pair, with where it is from. length: as of `read`.
    """
    pairs: list[Pair] = []
    left: dict[str, list[str]] = {}
    for where, pair in named:
        # Counted once, for the first reason, so that the counts add up to the items.
        if reason := next(reasons(pair, vocabulary, length), None):
            why, example = reason
            left.setdefault(why, []).append(f"{where}: {quoted(example)}")
        else:
            pairs.append(pair)
    return Reading(tuple(pairs), {why: Skipped(len(all_), tuple(all_[:_EXAMPLES])) for why, all_ in left.items()})


def pairs_of(path: str | Path) -> list[Pair]:
    """The pairs of such a file as they are written, whatever a model can be asked of them.

    Raises:
        JobError: an unreadable file, a malformed line (named), or no item.
    """
    pairs = [pair for _, pair in _numbered(Path(path))]
    if not pairs:
        raise JobError(f"file {quoted(str(path), 300)}", "holds no item", f"give lines with {', '.join(_KEYS)}")
    return pairs


def _numbered(path: Path) -> Iterator[tuple[int, Pair]]:
    for line, item in _items(path):
        prompt, other, target, foil, case = (item[key] for key in _KEYS)
        yield line, Pair(item.get("id", f"{path.stem}:{line}"), prompt, other, target, foil, case)


def write(pairs: Sequence[Pair], path: str | Path) -> Path:
    """A JSON-lines file that `read` and the authors' loader read; ``id`` is the one key added. Gives the path."""
    if not pairs:
        raise JobError("pairs []", "there is nothing to write", "give at least one pair")
    lines = [
        json.dumps({key: getattr(pair, name) for key, name in _KEYS.items()} | {"id": pair.id}, ensure_ascii=False)
        for pair in pairs
    ]
    path = Path(path)
    return _file(path, lambda: wholefile.write(path, "\n".join(lines) + "\n"))


def _file(path: Path, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except UnicodeError as error:
        raise JobError(f"file {quoted(str(path), 300)}", "is not UTF-8 text", "give a JSON-lines file") from error
    except OSError as error:
        rule = error.strerror or type(error).__name__
        raise JobError(f"file {quoted(str(path), 300)}", rule, "check the path") from error


def _items(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Number and checked content of every line that is not blank."""
    # Split at \n alone: a JSON string may hold other line separators, such as U+2028.
    lines: list[str] = _file(path, lambda: wholefile.read(path).decode("utf-8-sig")).split("\n")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, _item(line, f"line {number} of {quoted(path.name)}")


def _item(line: str, where: str) -> dict[str, str]:
    try:
        item = jsontext.parse(line)
    except jsontext.JsonError as error:
        rule = str(error) if isinstance(error, jsontext.TwiceError) else f"is not JSON ({quoted(line, 40)})"
        raise JobError(where, rule, "write one JSON object per line") from error
    if not isinstance(item, dict):
        raise JobError(where, f"is a {type(item).__name__}, not an object", "write one JSON object per line")
    if missing := [key for key in _KEYS if key not in item]:
        raise JobError(where, f"has no {', '.join(missing)}", f"give {', '.join(_KEYS)}")
    for key in [*_KEYS, "id"]:
        value = item.get(key, "")
        if not isinstance(value, str):
            raise JobError(
                f"{where}: {key} {quoted(value)}", f"is {type(value).__name__}, not text", "put it in quotes"
            )
        if key.endswith("prefix") and not value.strip():
            raise JobError(f"{where}: {key} {quoted(value)}", "is empty", "give at least one word")
        if not is_text(value):
            raise JobError(
                f"{where}: {key}", "holds half a surrogate pair, which is not text", "write whole characters"
            )
    return item


def reasons(pair: Pair, vocabulary: Vocabulary, length: int | None = None) -> Iterator[tuple[str, str]]:
    """Why this model cannot be asked the pair, each in a phrase with the piece of the pair that shows it.

    Args:
        length: tokens of the prefixes, special ones too, that are wanted; any if None.
    """
    prefixes = (pair.prompt, pair.counterfactual)
    for text in prefixes:
        if not _fits(text, vocabulary):
            yield f"a prefix is longer than the model's {vocabulary.context_length} tokens", text
            return
    answers = [_answer(*both, vocabulary) for both in zip(prefixes, (pair.target, pair.foil), strict=True)]
    for text, token in zip((pair.target, pair.foil), answers, strict=True):
        if token is None:
            yield "an answer is not one token", text
    if answers[0] == answers[1]:
        yield "both answers are the same token", pair.target
    lengths = [n_tokens(text, vocabulary) for text in prefixes]
    for text, count in zip(prefixes, lengths, strict=True):
        if count is None:
            yield "a prefix is not a prompt for this model", text
    if lengths[0] != lengths[1]:
        yield "the prefixes differ in token length", f"{pair.prompt} / {pair.counterfactual}"
    for text, answer, token in zip(prefixes, (pair.target, pair.foil), answers, strict=True):
        if _plain(text + answer, vocabulary) != [*_plain(text, vocabulary), token]:
            yield "the answer joins the prefix to other tokens", text + answer
    if length is not None and lengths[0] != length:
        yield f"the prefixes are not {length} tokens long", pair.prompt


def _fits(text: str, vocabulary: Vocabulary) -> bool:
    try:
        return len(_plain(text, vocabulary)) <= vocabulary.context_length
    except JobError:
        return False


def n_tokens(text: str, vocabulary: Vocabulary) -> int | None:
    """Tokens of a prompt as a model is asked it, special ones too; None where it cannot be asked."""
    try:
        return len(encode(Prompt(text), vocabulary).token_ids)
    except JobError:
        return None


def _answer(prefix: str, text: str, vocabulary: Vocabulary) -> int | None:
    """The token of an answer: the one that it is and that follows the prefix, else by the rule of every target; None
    where it is not one token."""
    try:
        alone = _plain(text, vocabulary)
        if len(alone) == 1 and _plain(prefix + text, vocabulary) == [*_plain(prefix, vocabulary), *alone]:
            return alone[0]
        return encode(Prompt(token_ids=[0], target=text), vocabulary).target_ids[0]
    except JobError:
        return None


def _plain(text: str, vocabulary: Vocabulary) -> list[int]:
    return list(tokenize(text, vocabulary.tokenizer, vocabulary.context_length, special=False))
