"""What a language model is asked about neurons: to explain one, to simulate it, to name a group, to judge a text.

A description is scored as Bills et al. do (Language models can explain neurons in language models, 2023): from it alone
the model says how active the neuron is at each token of texts that it was not shown, and the score is the correlation
with what the neuron did. Knows the questions, and what an answer must hold. Refuses to know where answers come from,
and runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tracer.meaning.chat import Request
from tracer.meaning.endpoint import Endpoint

LONGEST = 400
"""Characters of a description that are kept; fewer are asked for."""
LEVELS = 10
"""Activations are told and simulated from 0 to so many."""

_EXPLAIN = """You explain what a neuron of a language model does. "texts" are pieces of text where it is most active: \
lists of [token, activation], activations from 0 to 10. "promoted" and "suppressed" are tokens that it makes more and \
less likely as the next token, strongest first; they may be missing. Say in at most 30 words what it is active on, and \
what it promotes if that is clear; name what is specific, not what holds of any text. \
Answer {"description": "..."}."""
_SIMULATE = """A neuron of a language model is described by "description". For each token of each of "texts", which \
are lists of [index, token], say how active the neuron is there, from 0 (not at all) to 10. A token's activation can \
only depend on it and on tokens before it. Most tokens of most texts are 0: list only those that are not. \
Answer {"active": [[text, index, activation], ...]} with the texts counted from 0; an empty list if none is."""
_NAME = """These neurons of a language model do something together. "members" says what is known of each: a \
description, tokens that it promotes and suppresses, its share of the effect. \
Answer {"name": "...", "description": "..."}: a name of at most 4 words and a description of at most 30 words of what \
they have in common."""
_JUDGE = """A text is to be judged by a question. Answer {"score": s, "reason": "..."}: s from 0 (no, not at all) to \
1 (yes, entirely), and a reason of at most 30 words."""


class Piece(NamedTuple):
    """Tokens of a text, and how active the neuron is at each: the size of its value, 0 if that has the other sign."""

    tokens: tuple[str, ...]
    values: tuple[float, ...]


class Tokens(NamedTuple):
    """Tokens that a neuron promotes and suppresses, strongest first."""

    promoted: tuple[str, ...] = ()
    suppressed: tuple[str, ...] = ()


class Name(NamedTuple):
    """What a group of neurons is called, and what they do."""

    name: str
    description: str


class Judgement(NamedTuple):
    """How far the answer to a question about a text is yes, 0 to 1, and why."""

    score: float
    reason: str


@dataclass(frozen=True)
class Score:
    """How well a description says where a neuron is active.

    Attributes:
        value: Pearson correlation over all tokens; None where there is none, and `why` says it.
    """

    value: float | None
    why: str = ""


def explaining(shown: Sequence[Piece], tokens: Tokens, sample: int = 0) -> Request:
    """What does a neuron do, from texts where it is most active.

    Args:
        sample: which of several candidates.
    """
    largest = max((max(piece.values) for piece in shown), default=0.0) or 1.0
    texts = [
        [[token, round(LEVELS * value / largest)] for token, value in zip(piece.tokens, piece.values, strict=True)]
        for piece in shown
    ]
    data = {"texts": texts, **{name: list(value) for name, value in tokens._asdict().items() if value}}
    return Request(_EXPLAIN, data, temperature=1.0, max_tokens=1000, sample=sample)


def description_of(content: Mapping[str, Any]) -> str:
    """A description.

    Raises:
        ValueError: there is none.
    """
    return _text(content, "description", LONGEST)


def simulating(description: str, pieces: Sequence[Piece]) -> Request:
    """Where is a neuron active, from its description alone."""
    texts = [[[index, token] for index, token in enumerate(piece.tokens)] for piece in pieces]
    return Request(_SIMULATE, {"description": description, "texts": texts}, max_tokens=4000)


def activations_of(content: Mapping[str, Any], pieces: Sequence[Piece]) -> list[list[float]]:
    """The simulated activation of each token of each text, 0 to 10; tokens that are not listed are 0.

    Raises:
        ValueError: an entry is not of three numbers, of no such token, out of range, or there twice.
    """
    rows, found = content.get("active"), [[0.0] * len(piece.tokens) for piece in pieces]
    if not isinstance(rows, list):
        raise ValueError("the answer has no list 'active'")
    said = set[tuple[int, int]]()
    for row in rows:
        match row:
            case [int(text), int(index), (int() | float()) as value] if not any(isinstance(one, bool) for one in row):
                pass
            case _:
                raise ValueError(f"the answer has an entry {str(row)[:60]!r}, not [text, index, activation]")
        if not (0 <= text < len(pieces) and 0 <= index < len(pieces[text].tokens) and 0 <= value <= LEVELS):
            raise ValueError(f"the answer has an entry {row} of no such token, or out of range")
        if (text, index) in said:
            raise ValueError(f"the answer has token {index} of text {text} twice")
        said.add((text, index))
        found[text][index] = float(value)
    return found


def score(simulated: Sequence[Sequence[float]], pieces: Sequence[Piece]) -> Score:
    """Pearson correlation of simulated with true activations, over all tokens of all texts."""
    guessed = np.array([value for row in simulated for value in row], dtype=np.float64)
    true = np.array([value for piece in pieces for value in piece.values], dtype=np.float64)
    if guessed.size < 2 or np.ptp(true) == 0:
        return Score(None, "the true activations are the same at all held-out tokens")
    if np.ptp(guessed) == 0:
        return Score(None, "the simulated activations are the same at all held-out tokens")
    return Score(float(np.corrcoef(guessed, true)[0, 1]))


def name_group(endpoint: Endpoint, members: Sequence[Mapping[str, Any]]) -> Name:
    """What a group of neurons is called by a language model, from what is known of its members.

    Args:
        members: of each whatever there is of ``neuron`` (a label), ``description``, ``promoted``, ``suppressed``,
            ``share``: texts, numbers and lists of them.

    Raises:
        NoAnswerError, BoundError, RemoteError: as `Endpoint.ask`.
    """
    request = Request(_NAME, {"members": [dict(one) for one in members]}, max_tokens=500)
    return endpoint.ask(
        request, lambda content: Name(_text(content, "name", 60), _text(content, "description", LONGEST))
    )


def judge(endpoint: Endpoint, question: str, text: str) -> Judgement:
    """How far a language model answers a question about a text with yes: "Is this about Texas?".

    Raises:
        NoAnswerError, BoundError, RemoteError: as `Endpoint.ask`.
    """

    def read(content: Mapping[str, Any]) -> Judgement:
        value = content.get("score")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ValueError(f"the answer has the score {str(value)[:40]!r}, not one from 0 to 1")
        return Judgement(float(value), _text(content, "reason", LONGEST))

    return endpoint.ask(Request(_JUDGE, {"question": question, "text": text}, max_tokens=500), read)


def _text(content: Mapping[str, Any], name: str, most: int) -> str:
    """A text of an answer on one line, cut where it is too long."""
    value = content.get(name)
    if not isinstance(value, str) or not (text := " ".join(value.split())):
        raise ValueError(f"the answer has no text {name!r}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the answer's {name!r} is not Unicode") from None
    return text if len(text) <= most else text[: most - 1] + "…"
