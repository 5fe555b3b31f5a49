"""One hop: from a city to its state, as a sentence that a pretrained model goes on with.

Knows the cities of the 40 states whose names are one word, and their split. Refuses to know models beyond a tokenizer.
"""

from __future__ import annotations

from tracer.data.tasks.pairs import Item, Pair, check_split_name, drawn
from tracer.demo import data
from tracer.prompts import Vocabulary

TEMPLATE = "{city} is a city in the state of"


def items(split: str) -> list[Item]:
    """The cities of a split, with their states. A third of each state's are test: those that the demo model holds out,
    Dallas among them.

    Raises:
        JobError: an unknown split.
    """
    check_split_name(split)
    return [
        Item(
            f"{city}, {state.name}",
            TEMPLATE.format(city=city),
            f" {state.name}",
            {"city": city, "state": state.name},
        )
        for state in data.STATES
        if " " not in state.name  # a name of two words is not one token
        for city in state.cities
        if (city in data.HELD_CITIES) == (split == "test")
    ]


def pairs(split: str, count: int, seed: int = 0, *, vocabulary: Vocabulary | None = None) -> list[Pair]:
    """`count` different pairs of cities in different states: the counterfactual is a city of the foil's state.

    Args:
        split: ``train`` or ``test``; both cities of a pair are of the split.
        vocabulary: as of `pairs.drawn`.

    Raises:
        JobError: an unknown split, or as `pairs.drawn`.
    """
    return drawn("states", split, items(split), count, seed, vocabulary)
