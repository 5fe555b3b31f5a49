"""Indirect object identification (Wang et al. 2022): of two names, the one that is not the giver's is given to.

Knows the names, the sentences and their split. Refuses to know models beyond a tokenizer.
"""

from __future__ import annotations

import random
from itertools import permutations

from tracer.data.tasks.pairs import Pair, check_split_name
from tracer.errors import JobError
from tracer.prompts import Vocabulary

NAMES = {
    "train": (
        "Tom James Sarah Mark Paul Anna Peter Emma David Laura Kate Jack Alice Robert Michael Daniel Susan Linda Kevin "
        "Brian Lisa Jason Jessica Adam Rachel Martin Helen George Thomas William Charles Henry Edward Frank Andrew Eric"
    ).split(),
    "test": (
        "Mary John Richard Joseph Maria Julia Karen Nancy Sam Ben Max Luke Grace Jane Simon Scott Steve Amy"
    ).split(),
}
FRAMES = {
    "train": (
        "After {} and {} walked to the {place}, {} handed a {thing} to",
        "When {} and {} drove to the {place}, {} gave a {thing} to",
        "After {} and {} came to the {place}, {} passed a {thing} to",
        "While {} and {} waited at the {place}, {} offered a {thing} to",
    ),
    "test": (
        "When {} and {} went to the {place}, {} gave a {thing} to",
        "After {} and {} met at the {place}, {} handed a {thing} to",
    ),
}
"""Three names each: two, and the giver again."""
PLACES = {
    "train": "park office school restaurant hospital beach house market library museum".split(),
    "test": "store station garden church hotel".split(),
}
THINGS = {
    "train": "book ball letter gift ring key map phone card hat box".split(),
    "test": "drink pen ticket cup bag".split(),
}
ORDERS = ("abba", "baba")
"""Whether the giver is the second of the two names, or the first."""


def pairs(split: str, count: int, seed: int = 0, *, vocabulary: Vocabulary | None = None) -> list[Pair]:
    """`count` different pairs; the counterfactual has the other name give, so that the answers change places.

    Every second is ABBA ("Mary and John ..., John gave a drink to"), the others BABA ("John and Mary ..., John gave a
    drink to"); the case says which. No name, sentence, place or thing of ``train`` is in ``test``.

    Args:
        split: ``train`` or ``test``.
        vocabulary: only names that are one token of it where they stand.

    Raises:
        JobError: an unknown split, no pair asked for, or more than there are.
    """
    check_split_name(split)
    if count < 1:
        raise JobError(f"count={count}", "at least one pair is needed", "use 1 or more")
    names = [name for name in NAMES[split] if vocabulary is None or _is_token(f" {name}", vocabulary)]
    most = len(names) * (len(names) - 1) * len(FRAMES[split])
    if count > most:
        raise JobError(f"count={count}", f"there are {most} {split} pairs", f"use at most {most}")
    rng = random.Random(f"indirect {seed} {split}")
    # Every two names with every sentence once, so that no two pairs are the same; place and thing are drawn.
    combinations = [(*both, frame) for both in permutations(names, 2) for frame in FRAMES[split]]
    found = []
    for number, (receiver, giver, frame) in enumerate(rng.sample(combinations, count)):
        order = ORDERS[number % 2]
        two = (receiver, giver) if order == "abba" else (giver, receiver)
        place, thing = rng.choice(PLACES[split]), rng.choice(THINGS[split])
        prompt, other = (frame.format(*two, last, place=place, thing=thing) for last in (giver, receiver))
        labels = {"receiver": receiver, "giver": giver, "place": place, "thing": thing}
        found.append(
            Pair(f"indirect-{split}-{seed}-{number}", prompt, other, f" {receiver}", f" {giver}", order, labels)
        )
    return found


def _is_token(text: str, vocabulary: Vocabulary) -> bool:
    return len(vocabulary.tokenizer.encode(text, add_special_tokens=False)) == 1
