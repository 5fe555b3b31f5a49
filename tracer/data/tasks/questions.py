"""A question: a prompt with labels and no counterfactual; how they are drawn, and which are train and which test.

Knows text, labels and splits. Refuses to know what a task is about, and tokens.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from tracer.data.tasks.pairs import of_split
from tracer.errors import JobError, quoted
from tracer.prompts import Prompt

SPLITS = ("all", "train", "test")

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Question:
    """One prompt, and what is known of it.

    Attributes:
        asked: the text; of a chat what the user says.
        target: the right next token, if it is one: who asks a model says which it cannot be asked.
        labels: what the prompt is about, by name; in them concepts are looked for.
        seed: of a chat, how the answer begins; None where `asked` is a text to go on with.
        id: names the question within its set.
    """

    asked: str
    target: str
    labels: Mapping[str, str] = field(hash=False)
    seed: str | None = None
    id: str = ""

    def to_prompt(self) -> Prompt:
        """The question as a `Prompt`."""
        if self.seed is None:
            return Prompt(self.asked, target=self.target, id=self.id)
        said = [{"role": "user", "content": self.asked}]
        return Prompt(messages=said, seed=self.seed, target=self.target, id=self.id)


def part(split: str, groups: Sequence[_Item], task: str) -> list[_Item]:
    """The groups of a split: all of them, or train or test (a third), which share none.

    Raises:
        JobError: an unknown split.
    """
    if split not in SPLITS:
        raise JobError(f"split {quoted(split)}", "is not known", f"use {', '.join(SPLITS)}")
    return list(groups) if split == "all" else of_split(split, groups, task)


def drawn(
    task: str,
    split: str,
    items: Sequence[Question],
    count: int,
    seed: int,
    by: str | None = None,
    rounds: Sequence[int] | None = None,
) -> list[Question]:
    """`count` different questions in random order, with their ids.

    Args:
        task: begins the ids, with the split. items: of the split alone.
        by: a label whose values come equally often, as far as there are as many of each.
        rounds: of each item which round it is of, instead: all of an earlier one come first.

    Raises:
        JobError: none asked for, or more than there are.
    """
    if count < 1:
        raise JobError(f"count={count}", "at least one question is needed", f"use 1 or more; {task} has {len(items)}")
    if count > len(items):
        raise JobError(f"count={count}", f"there are {len(items)} {split} questions", f"use at most {len(items)}")
    order = random.Random(f"{task} {seed} {split}").sample(range(len(items)), len(items))
    seen = Counter[str]()
    turn = dict[int, int]()
    for index in order:
        value = items[index].labels[by] if by is not None else ""
        turn[index] = rounds[index] if rounds is not None else seen[value] if by is not None else 0
        seen[value] += 1
    chosen = sorted(order, key=turn.__getitem__)[:count]
    return [replace(items[index], id=f"{task}-{split}-{seed}-{number}") for number, index in enumerate(chosen)]
