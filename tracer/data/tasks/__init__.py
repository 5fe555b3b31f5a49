"""Built-in tasks: sets of prompt pairs and of questions by name, and the reader and writer of sets of pairs.

Knows which tasks there are. Refuses to know models: a task gives text, and reads tokens only to leave out what a given
tokenizer cannot be asked.

    pairs = tasks.load("sva", structure="nounpp", split="train", count=300)
    prompts = [pair.to_prompt() for pair in pairs]
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from tracer.data.tasks import (
    addition,
    antonyms,
    capitals,
    countries,
    indirect,
    opposites,
    state_capitals,
    states,
    sva,
    users,
)
from tracer.data.tasks.pairs import Pair as Pair
from tracer.data.tasks.pairs import check_split as check_split
from tracer.data.tasks.questions import Question as Question
from tracer.errors import JobError, quoted
from tracer.prompts import Vocabulary

TASKS: dict[str, Callable[..., list[Pair]]] = {
    "sva": sva.generate,
    "capitals": capitals.pairs,
    "states": states.pairs,
    "countries": countries.pairs,
    "opposites": opposites.pairs,
    "indirect": indirect.pairs,
}
"""Every built-in task of pairs: a function from options, split, count and seed to pairs."""

QUESTIONS: dict[str, Callable[..., list[Question]]] = {
    "state-capitals": state_capitals.questions,
    "addition": addition.questions,
    "antonyms": antonyms.questions,
    "users": users.questions,
}
"""Every built-in task without counterfactuals: the same, to questions."""


def load(name: str, **options: Any) -> list[Pair]:
    """The pairs of a built-in task.

    Args:
        name: ``sva`` (agreement), ``capitals`` (two hops: city, state, capital; the demo's), ``states`` (city to
            state), ``countries`` (country to capital, with shots), ``opposites`` or ``indirect`` (indirect object).
        options: of `sva.generate`, `capitals.pairs` and so on: split, count, seed, and the task's own, such as the
            structure of sva and opposites. All but sva take the `vocabulary` of a model, for pairs it can be asked.

    Raises:
        JobError: an unknown task, an unknown or missing option, or what the task itself refuses.
    """
    if name in QUESTIONS:
        raise JobError(f"task {name}", "has no counterfactuals, which pairs have", f"use {', '.join(TASKS)}")
    return _made(TASKS, name, options)


def ask(name: str, **options: Any) -> list[Question]:
    """The questions of a built-in task.

    Args:
        name: ``state-capitals`` (two hops, of a chat model), ``addition``, ``antonyms`` (nine languages) or ``users``
            (what a model takes its user for).
        options: split, count, seed; of users the structure, its attribute.

    Raises:
        JobError: as `load`.
    """
    return _made(QUESTIONS, name, options)


def _made(known: dict[str, Callable[..., list[Any]]], name: str, options: dict[str, Any]) -> list[Any]:
    if name not in known:
        raise JobError(f"task {quoted(name)}", "is not known", f"use {', '.join(known)}")
    parameters = inspect.signature(known[name]).parameters
    if unknown := [option for option in options if option not in parameters]:
        raise JobError(f"option {quoted(unknown[0])} of task {name}", "is not known", f"use {', '.join(parameters)}")
    required = [key for key, parameter in parameters.items() if parameter.default is parameter.empty]
    needed = [key for key in required if key not in options]
    if needed:
        raise JobError(f"task {name}", f"needs {', '.join(needed)}", "give each a value")
    return known[name](**options)


def askable(name: str, vocabulary: Vocabulary, **options: Any) -> sva.Reading:
    """The pairs of a built-in task that a model can be asked, and by reason how many it cannot.

    Args:
        name, options: as in `load`.
        vocabulary: a model. Where the task takes one, its pairs are made for it.

    Raises:
        JobError: as `load`; none that can be asked.
    """
    if "vocabulary" in inspect.signature(TASKS.get(name, load)).parameters:
        options |= {"vocabulary": vocabulary}
    reading = sva.sifted([(pair.id, pair) for pair in load(name, **options)], vocabulary)
    if not reading.pairs:
        raise JobError(f"task {name}", reading.summary(), "use a model whose tokenizer keeps the answers whole")
    return reading
