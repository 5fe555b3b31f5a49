"""Two hops: from a city to its state to that state's capital, for pairs and for swapping one state for another.

Knows the states' cities and capitals and their split. Refuses to know models beyond a tokenizer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from tracer.data.tasks.pairs import Pair, check_split_name, n_tokens, numbered, partners
from tracer.demo import data
from tracer.errors import JobError, quoted
from tracer.prompts import Vocabulary, decode

TEMPLATE = "the capital of the state containing {city} is"
"""The wording that the demo model is taught; another needs ``{city}`` once."""

SPLITS: dict[str, data.Split] = {"train": "train", "test": "held_out"}
"""The demo model was trained on the two-hop sentences of the train cities, and on none of the test cities."""


@dataclass(frozen=True)
class State:
    """A state's two-hop prompts and their common answer.

    Attributes:
        name: such as ``"Texas"``.
        capital: such as ``"Austin"`` or ``"Salt Lake City"``.
        target: the first token of the capital, with its leading space: ``" Salt"``.
        prompts: the prompt of each city, in the order of the word list.
    """

    name: str
    capital: str
    target: str
    prompts: dict[str, str]


def states(
    split: str | None = None, *, vocabulary: Vocabulary | None = None, template: str = TEMPLATE
) -> tuple[State, ...]:
    """The 50 states with their prompts, for taking out one state's neurons and putting in another's.

    Args:
        split: only ``train`` or ``test`` cities (2 to 5 a state); all 7 if None.
        vocabulary: whose first token of each capital is the target; without it the first word, which is one token of
            the demo model.
        template: the prompt, with ``{city}`` once.

    Raises:
        JobError: an unknown split, a template without its city, or a first token that is not text by itself.
    """
    if split is not None:
        check_split_name(split)
    if template.count("{city}") != 1:
        raise JobError(f"template {quoted(template)}", "must hold {city} once", f"the demo's is {quoted(TEMPLATE)}")
    held = {None: {True, False}, "train": {False}, "test": {True}}[split]
    chosen = []
    for state in data.STATES:
        cities = [city for city in state.cities if (city in data.HELD_CITIES) in held]
        prompts = {city: template.replace("{city}", city) for city in cities}
        chosen.append(State(state.name, state.capital, _first_token(state.capital, vocabulary), prompts))
    return tuple(chosen)


def _first_token(capital: str, vocabulary: Vocabulary | None) -> str:
    if vocabulary is None:
        return " " + capital.split(maxsplit=1)[0]
    encode = vocabulary.tokenizer.encode
    first = encode(f" {capital}", add_special_tokens=False)[0]
    text = decode(vocabulary, first)
    if encode(text, add_special_tokens=False) != [first]:
        raise JobError(
            f"capital {quoted(capital)}",
            f"its first token {quoted(text)} is not that token when it stands alone",
            "use a model whose tokenizer keeps the space with the word",
        )
    return text


def pairs(
    split: str, count: int, seed: int = 0, *, vocabulary: Vocabulary | None = None, template: str = TEMPLATE
) -> list[Pair]:
    """`count` different pairs of cities in different states: one asked about, the other its counterfactual.

    Every city of the split is asked about once before any is asked about again. The case names the two states.

    Args:
        split: ``train`` or ``test``; both cities of a pair are of the split.
        vocabulary: as for `states`; with it only prompts of equal length in tokens are paired, and no two capitals
            with the same first token.

    Raises:
        JobError: as for `states`, or fewer pairs than `count`.
    """
    if count < 1:
        raise JobError(f"count={count}", "at least one pair is needed", "use 1 or more; there are 117 test cities")
    cities = [
        (city, state) for state in states(split, vocabulary=vocabulary, template=template) for city in state.prompts
    ]
    length = {city: n_tokens(state.prompts[city], vocabulary) for city, state in cities}

    def fits(one: _City, two: _City) -> bool:
        return one[1].target != two[1].target and length[one[0]] == length[two[0]]

    both = partners(cities, fits, random.Random(f"{seed} {split}"))
    contents = (
        (
            *(one.prompts[city], two.prompts[other], one.target, two.target),
            *(f"{one.name} / {two.name}", {"city": city, "state": one.name, "capital": one.capital}),
        )
        for (city, one), (other, two) in both
    )
    return numbered(f"capitals-{split}-{seed}", contents, count, split)


_City = tuple[str, State]
