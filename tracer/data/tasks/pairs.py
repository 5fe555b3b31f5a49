"""A pair: a prompt and its counterfactual, with the right and the wrong next token; and train and test kept apart.

Knows text, how pairs are drawn from items with an answer each, and which of these are train and which test. Refuses to
know what a task is about, and tokens but for counting those of two prompts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

from tracer.errors import JobError, quoted
from tracer.prompts import Prompt, Vocabulary

SPLITS = ("train", "test")

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Pair:
    """Two prompts that differ in one word, for which target and foil change places.

    Attributes:
        id: names the pair within its set.
        prompt: the text asked about; `clean_prefix` in the files of Marks et al.
        counterfactual: the same text with one word changed; `patch_prefix`.
        target: the next token of `prompt`, usually with its leading space; `clean_answer`.
        foil: the next token of `counterfactual`; `patch_answer`.
        case: what kind of pair it is, e.g. ``"plural_singular"``.
        labels: what the prompt is about, by name, e.g. ``{"state": "Texas"}``; in them concepts are looked for.
    """

    id: str
    prompt: str
    counterfactual: str
    target: str
    foil: str
    case: str
    labels: Mapping[str, str] = field(default_factory=dict, compare=False)

    def to_prompt(self, *, paired: bool = True) -> Prompt:
        """The pair as a `Prompt`, with its counterfactual unless `paired` is False."""
        counterfactual = self.counterfactual if paired else None
        return Prompt(self.prompt, target=self.target, foil=self.foil, counterfactual=counterfactual, id=self.id)


def check_split(train: Iterable[Pair], test: Iterable[Pair], allow: bool = False, name: str = "") -> int:
    """Refuse prompts that are both trained and tested on, unless that is allowed; how many test pairs have one.

    Args:
        name: of the set of pairs, for the error.

    Raises:
        JobError: says how many, and names the first such prompt.
    """
    trained, tested = {pair.prompt for pair in train}, list(test)
    both = [pair.prompt for pair in tested if pair.prompt in trained]
    if both and not allow:
        of, others = f" of {name}" if name else "", len(set(both)) - 1
        more = f" and {others} more" if others else ""
        raise JobError(
            f"{len(both)} of {len(tested)} test pairs{of}, with prompt {quoted(both[0])}{more}",
            "are in both train and test: a circuit must be tested on prompts it was not found on",
            "take them out of one of the two, or allow it with allow_overlap: true in the job, which every result says",
        )
    return len(both)


@dataclass(frozen=True)
class Item:
    """What a prompt is about, such as a city: the prompt and its right next token.

    Attributes:
        name: in a pair's case. prompt: the text. answer: with its leading space. labels: as of a `Pair`.
    """

    name: str
    prompt: str
    answer: str
    labels: Mapping[str, str] = field(default_factory=dict, compare=False)


def drawn(
    task: str, split: str, items: Sequence[Item], count: int, seed: int, vocabulary: Vocabulary | None
) -> list[Pair]:
    """`count` different pairs of items with different answers: one asked about, the other its counterfactual.

    Every item is asked about once before any is asked about again. The case names the two items.

    Args:
        task: begins the pairs' ids, with the split. items: of the split alone.
        vocabulary: only prompts of equal length in its tokens are paired, and only answers that are one token; without
            it any, and who asks a model says which it cannot be asked.

    Raises:
        JobError: no pair asked for, or fewer pairs than `count`.
    """
    if count < 1:
        raise JobError(f"count={count}", "at least one pair is needed", f"use 1 or more; {task} has {len(items)} items")
    sizes = {item: _size(item, vocabulary) for item in items}
    known = [item for item in items if sizes[item] is not None]

    def fits(one: Item, other: Item) -> bool:
        return one.answer != other.answer and sizes[one] == sizes[other]

    both = partners(known, fits, random.Random(f"{task} {seed} {split}"))
    contents = (
        (one.prompt, other.prompt, one.answer, other.answer, f"{one.name} / {other.name}", one.labels)
        for one, other in both
    )
    return numbered(f"{task}-{split}-{seed}", contents, count, split)


_Content = tuple[str, str, str, str, str, Mapping[str, str]]


def numbered(name: str, contents: Iterable[_Content], count: int, split: str) -> list[Pair]:
    """The first `count` of pairs, whose ids are a name and their number.

    Args:
        contents: of each the fields of a `Pair` after its id.

    Raises:
        JobError: there are fewer.
    """
    found = [Pair(f"{name}-{number}", *one) for number, one in enumerate(islice(contents, count))]
    if len(found) < count:
        raise JobError(f"count={count}", f"there are {len(found)} {split} pairs", f"use at most {len(found)}")
    return found


def partners(
    items: Sequence[_Item], fits: Callable[[_Item, _Item], bool], rng: random.Random
) -> Iterator[tuple[_Item, _Item]]:
    """Each item with its first partner that fits, then each with its second, and so on; both in random order."""
    order = rng.sample(items, len(items))
    waiting: list[tuple[_Item, Iterator[_Item]]] = [(item, iter(rng.sample(items, len(items)))) for item in order]
    while waiting:
        left = []
        for item, others in waiting:
            partner = next((other for other in others if fits(item, other)), None)
            if partner is not None:
                yield item, partner
                left.append((item, others))
        waiting = left


def of_split(split: str, groups: Sequence[_Item], task: str) -> list[_Item]:
    """The groups of a split, a third of them test: a group is what must not be on both sides, such as a word and its
    opposite. The same whatever the seed of the pairs.

    Raises:
        JobError: an unknown split.
    """
    check_split_name(split)
    test = set(random.Random(f"{task} split").sample(range(len(groups)), len(groups) // 3))
    return [group for index, group in enumerate(groups) if (index in test) == (split == "test")]


def check_split_name(split: str) -> None:
    """Refuse a split that is neither train nor test.

    Raises:
        JobError: it is another.
    """
    if split not in SPLITS:
        raise JobError(f"split {quoted(split)}", "is not known", f"use {', '.join(SPLITS)}")


def n_tokens(text: str, vocabulary: Vocabulary | None) -> int:
    """Tokens of a text, special ones too; 0 of any without a vocabulary."""
    return 0 if vocabulary is None else len(vocabulary.tokenizer.encode(text))


def _size(item: Item, vocabulary: Vocabulary | None) -> int | None:
    """Tokens of an item's prompt; None where its answer is not one token that follows it."""
    if vocabulary is None:
        return 0
    encode = vocabulary.tokenizer.encode
    prompt, whole = (encode(text, add_special_tokens=False) for text in (item.prompt, item.prompt + item.answer))
    return n_tokens(item.prompt, vocabulary) if whole[:-1] == prompt else None
