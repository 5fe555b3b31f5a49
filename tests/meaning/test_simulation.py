"""What is asked about a neuron, what an answer may hold, and the score of a simulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracer.meaning import simulation
from tracer.meaning.chat import Request
from tracer.meaning.endpoint import Endpoint
from tracer.meaning.evidence import HELD_OTHER, HELD_TOP, SHOWN, piece, split
from tracer.meaning.exemplars import Exemplar
from tracer.meaning.simulation import Piece, Tokens

PIECES = [Piece((" The", " city", " of"), (0.0, 4.0, 1.0)), Piece((" a", " car"), (0.5, 0.0))]


def exemplar(
    kind: str, rank: int, document: int, tokens: tuple[str, ...], values: Any = None, **place: int
) -> Exemplar:
    values = values or tuple(float(i) for i in range(len(tokens)))
    start, position = place.get("start", 5), place.get("position", 5 + len(tokens) - 1)
    return Exemplar(kind, rank, values[position - start], document, position, start, tokens, values)


def test_a_describer_is_shown_tokens_with_activations_from_0_to_10() -> None:
    request = simulation.explaining(PIECES, Tokens((" Texas",), ()), 2)
    assert request.data == {
        "texts": [[[" The", 0], [" city", 10], [" of", 2]], [[" a", 1], [" car", 0]]],
        "promoted": [" Texas"],
    }
    assert request.sample == 2
    assert simulation.explaining([], Tokens((" Texas",))).data["texts"] == []
    assert simulation.explaining([Piece((" a",), (0.0,))], Tokens()).data["texts"] == [[[" a", 0]]]


def test_a_simulator_sees_tokens_and_the_description_alone() -> None:
    assert simulation.simulating("cities", PIECES).data == {
        "description": "cities",
        "texts": [[[0, " The"], [1, " city"], [2, " of"]], [[0, " a"], [1, " car"]]],
    }


def test_tokens_that_are_not_listed_are_0() -> None:
    found = simulation.activations_of({"active": [[0, 1, 9], [1, 0, 2.5]]}, PIECES)
    assert found == [[0.0, 9.0, 0.0], [2.5, 0.0]]


@pytest.mark.parametrize(
    "active",
    [
        None,
        {},
        [[0, 1]],
        [[0, 3, 1]],
        [[2, 0, 1]],
        [[-1, 0, 1]],
        [[0, 1, 11]],
        [[0, 1, -1]],
        [[0, 1, "9"]],
        [[0, True, 9]],
        [[0, 1, 9], [0, 1, 3]],
        [[0, 1.0, 9]],
        "[[0, 1, 9]]",
    ],
)
def test_an_answer_of_other_tokens_or_levels_is_malformed(active: Any) -> None:
    with pytest.raises(ValueError, match="the answer"):
        simulation.activations_of({"active": active}, PIECES)


def test_the_score_is_the_correlation_over_all_tokens() -> None:
    simulated = [[0.0, 9.0, 1.0], [2.0, 0.0]]
    x, y = np.array([0.0, 9.0, 1.0, 2.0, 0.0]), np.array([0.0, 4.0, 1.0, 0.5, 0.0])
    x, y = x - x.mean(), y - y.mean()
    assert simulation.score(simulated, PIECES).value == pytest.approx((x @ y) / np.sqrt((x @ x) * (y @ y)), rel=1e-12)
    for guesses, pieces in (([[0.0] * 3, [0.0] * 2], PIECES), ([[0.0, 1.0]], [Piece((" a", " b"), (2.0, 2.0))])):
        constant = simulation.score(guesses, pieces)
        assert constant.value is None
        assert "are the same at all held-out tokens" in constant.why


@pytest.mark.parametrize("content", [{}, {"description": None}, {"description": " \n"}, {"description": "\ud800"}])
def test_an_answer_without_a_description_is_malformed(content: Any) -> None:
    with pytest.raises(ValueError, match="description"):
        simulation.description_of(content)


def test_a_description_is_one_line_of_bounded_length() -> None:
    assert simulation.description_of({"description": " a\n b "}) == "a b"
    assert len(simulation.description_of({"description": "long " * 999})) == simulation.LONGEST


class Told(Endpoint):
    """In place of an endpoint: one answer."""

    def __init__(self, content: Any) -> None:
        self.content, self.request = content, Request("", {})

    def ask(self, request: Request, read: Callable[[Any], Any]) -> Any:
        self.request = request
        return read(self.content)


def test_a_group_is_named_and_a_text_judged() -> None:
    asked = Told({"name": "Say Texas", "description": "promote Texas"})
    members = [{"neuron": "L3 N7+", "promoted": [" Texas"]}]
    assert simulation.name_group(asked, members) == ("Say Texas", "promote Texas")
    assert asked.request.data == {"members": members}
    asked = Told({"score": 1, "reason": "it is"})
    assert simulation.judge(asked, "Is it about Texas?", "Austin") == (1.0, "it is")
    assert asked.request.data == {"question": "Is it about Texas?", "text": "Austin"}
    for score in (True, "1", 1.5, -0.1, None):
        with pytest.raises(ValueError, match="score"):
            simulation.judge(Told({"score": score, "reason": "it is"}), "?", "")


# ---------------------------------------------------------------------------------- what is shown, what is held out


@given(
    st.lists(
        st.tuples(st.sampled_from(["top", "q50", "q90"]), st.integers(0, 30), st.integers(0, 12), st.integers(0, 6)),
        max_size=40,
    )
)
def test_held_out_texts_are_never_among_the_shown(rows: list[tuple[str, int, int, int]]) -> None:
    every = [exemplar(kind, rank, document, (" a", f" {text}")) for kind, rank, document, text in rows]
    shown, held = split(every)
    assert {one.document for one in shown}.isdisjoint(one.document for one in held)
    assert {one.tokens for one in shown}.isdisjoint(one.tokens for one in held)
    assert len({one.tokens for one in held}) == len(held) <= HELD_TOP + HELD_OTHER
    assert len(shown) <= SHOWN
    assert all(one.kind == "top" for one in shown)


def test_the_strongest_are_shown_and_held_out_in_turn_and_quantiles_are_held_out() -> None:
    every = [exemplar("top", rank, rank, (" a", f" t{rank}")) for rank in range(6)]
    for level, kind in ((50, "q50"), (60, "q90")):
        every += [exemplar(kind, rank, level + rank, (" b", f" {kind}{rank}")) for rank in range(4)]
    shown, held = split(every)
    assert [one.rank for one in shown] == [0, 2, 4]
    assert [(one.kind, one.rank) for one in held] == [
        *(("top", rank) for rank in (1, 3, 5)),
        *(("q50", 0), ("q90", 0), ("q50", 1), ("q90", 1), ("q50", 2)),
    ]


def test_activity_is_the_size_of_values_of_the_polarity() -> None:
    one = exemplar("top", 0, 0, (" a", " b", " c"), (0.5, -2.0, -3.0))
    assert piece(one, -1) == ((" a", " b", " c"), (0.0, 2.0, 3.0))
    assert piece(one, 1).values == (0.5, 0.0, 0.0)


def test_a_first_token_beyond_the_peak_is_left_out_where_statistics_left_it_out() -> None:
    values = (900.0, 1.0, 3.0)
    begins = exemplar("top", 0, 0, ("<s>", " b", " c"), values, start=0, position=2)
    assert piece(begins, 1) == ((" b", " c"), (1.0, 3.0))
    later = exemplar("top", 0, 0, (" a", " b", " c"), values, start=5, position=7)
    assert len(piece(later, 1).tokens) == 3
    small = exemplar("top", 0, 0, ("<s>", " b", " c"), (2.0, 1.0, 3.0), start=0, position=2)
    assert len(piece(small, 1).tokens) == 3


def test_long_texts_are_cut_around_the_peak() -> None:
    tokens = tuple(f" {i}" for i in range(300))
    one = exemplar("top", 0, 0, tokens, tuple(float(i == 200) for i in range(300)), start=0, position=200)
    cut = piece(one, 1)
    assert (len(cut.tokens), cut.values[48], cut.tokens[48]) == (64, 1.0, " 200")
