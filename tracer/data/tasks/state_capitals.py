"""Two hops as the paper asks them of a chat model: the capital of the state that a city is in.

Knows the 50 states with 7 cities each, and their split. Refuses to know models.
"""

from __future__ import annotations

from tracer.data.tasks.questions import Question, drawn, part
from tracer.demo import data

TEMPLATE = "What is the capital of the state containing {city}?"
SEED = "Answer:"
N_TRAIN = 5
"""Cities of each state, the first of the word list, that are train; the others are test."""


def questions(split: str, count: int, seed: int = 0) -> list[Question]:
    """`count` different cities: one of every state, then a second of every state, and so on.

    Labels: ``city``, ``state``, ``capital``. The target is the capital, where that is one token.

    Args:
        split: ``train`` (5 cities a state), ``test`` (2), or ``all``. The first round of ``train`` is the paper's: the
            50 states by one city each, Dallas for Texas.

    Raises:
        JobError: an unknown split, or more than there are.
    """
    part(split, (), "")  # it is one of the three
    first, last = {"all": (0, None), "train": (0, N_TRAIN), "test": (N_TRAIN, None)}[split]
    made = [
        (number, Question(TEMPLATE.format(city=city), f" {state.capital}", _labels(city, state), SEED))
        for state in data.STATES
        for number, city in enumerate(state.cities[first:last])
    ]
    return drawn("state-capitals", split, [one for _, one in made], count, seed, rounds=[number for number, _ in made])


def _labels(city: str, state: data.State) -> dict[str, str]:
    return {"city": city, "state": state.name, "capital": state.capital}
