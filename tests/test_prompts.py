"""Prompts: what can be meant is encoded exactly, everything else is refused; padding and batching laws."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
import tiny as t
import torch
from helpers import aligned, padded, refused
from hypothesis import given
from hypothesis import strategies as st

from tracer.errors import JobError
from tracer.prompts import Batch, Prompt, batches, decode, encode


@dataclass(frozen=True)
class Words:
    """A tokenizer with a vocabulary and a context, and no model."""

    tokenizer: Any = field(default_factory=t.tokenizer)
    vocab_size: int = t.VOCAB
    context_length: int = 12


WORDS = Words()
TEXT = "The secretaries near the car"
ROWS = st.lists(st.lists(st.integers(0, 100), min_size=1, max_size=9).map(tuple), min_size=1, max_size=6).map(tuple)


def token(text: str) -> int:
    (found,) = WORDS.tokenizer.encode(text, add_special_tokens=False)
    return int(found)


def test_text_is_encoded_as_the_tokenizer_does() -> None:
    got = encode(Prompt(TEXT, target=" are", foil=[" is", " was"], counterfactual="The secretary near the cars"), WORDS)
    assert list(got.token_ids) == WORDS.tokenizer.encode(TEXT)
    assert got.token_ids[0] == t.BOS
    assert got.target_ids == (token(" are"),)
    assert got.foil_ids == (token(" is"), token(" was"))
    assert list(got.counterfactual_ids or ()) == WORDS.tokenizer.encode("The secretary near the cars")
    assert got.positions == (len(got.token_ids) - 1,)
    assert got.text == TEXT


def test_token_ids_are_used_as_they_are() -> None:
    got = encode(Prompt(token_ids=[7, 50, 9], target=60, foil=[4], counterfactual=[1, 2, 3], id="mine"), WORDS)
    assert got.token_ids == (7, 50, 9)
    assert (got.target_ids, got.foil_ids, got.counterfactual_ids) == ((60,), (4,), (1, 2, 3))
    assert got.text == "".join(decode(WORDS, one) for one in (7, 50, 9))
    assert got.id == "mine"


def test_without_a_target_none_is_invented() -> None:
    got = encode(Prompt("The car"), WORDS)
    assert got.target_ids == got.foil_ids == ()
    assert got.counterfactual_ids is None


def test_decode_keeps_the_leading_space() -> None:
    assert decode(WORDS, token(" are")) == " are"


@pytest.mark.parametrize(
    ("positions", "wanted"), [(None, (4,)), (-1, (4,)), (0, (0,)), ([1, -2], (1, 3)), ([4, 0], (4, 0)), (-5, (0,))]
)
def test_positions_count_from_both_ends(positions: Any, wanted: tuple[int, ...]) -> None:
    assert encode(Prompt(token_ids=[1, 5, 6, 7, 8], positions=positions), WORDS).positions == wanted


WRONG: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({}, ("neither text nor token_ids",)),
    ({"text": "The car", "token_ids": [1]}, ("'The car'", "both")),
    ({"text": "The car", "foil": " is"}, ("' is'", "target")),
    ({"text": ""}, ("prompt ''", "empty")),
    ({"text": "  "}, ("empty",)),
    ({"token_ids": []}, ("prompt []", "empty")),
    ({"text": "The car", "counterfactual": ""}, ("counterfactual ''", "empty")),
    ({"text": "The car", "target": "are"}, ("'are'", "3 tokens", "' are'", "leading space")),
    ({"text": "The car", "target": " keeper"}, ("' keeper'", "tokens", "one is needed", "give one token, or its id")),
    ({"text": "The car", "target": ""}, ("target ''", "0 tokens")),
    ({"text": "The car", "target": []}, ("target []", "empty")),
    ({"text": "The car", "target": [" are", " are"]}, ("twice",)),
    ({"text": "The car", "target": " are", "foil": "is"}, ("foil 'is'", "' is'")),
    ({"text": "The car", "target": " are", "foil": " are"}, ("' are'", "both target and foil")),
    ({"text": "The car", "target": [" are", " is"], "foil": [" was", " is"]}, ("' is'", "both target and foil")),
    ({"text": "The car", "counterfactual": "The car near"}, ("'The car near'", "4 tokens", "the prompt 3")),
    ({"token_ids": [1, 2], "counterfactual": [1, 2, 3]}, ("[1, 2, 3]", "3 tokens", "the prompt 2")),
    ({"token_ids": [1, 101]}, ("token id 101", "0 to 100")),
    ({"token_ids": [1, -1]}, ("token id -1", "0 to 100")),
    ({"token_ids": [1, True]}, ("token id True",)),
    ({"token_ids": [1, 5], "target": 101}, ("target token id 101", "0 to 100")),
    ({"token_ids": [1, 5], "target": 6, "foil": -2}, ("foil token id -2",)),
    ({"token_ids": [1, 5], "counterfactual": [1, 300]}, ("counterfactual token id 300",)),
    ({"token_ids": [1] * 13}, ("13 tokens", "at most 12", "shorten")),
    ({"text": "The " * 20}, ("tokens", "at most 12")),
    ({"token_ids": [1, 5], "positions": 2}, ("position 2", "2 tokens")),
    ({"token_ids": [1, 5], "positions": -3}, ("position -3", "2 tokens")),
    ({"token_ids": [1, 5], "positions": []}, ("positions []", "empty")),
    ({"token_ids": [1, 5], "positions": [1, -1]}, ("twice",)),
    ({"text": "The car\nnear\n" * 8, "target": "a\nb"}, ("tokens",)),
]


@pytest.mark.parametrize(("arguments", "parts"), WRONG, ids=lambda value: str(value)[:60])
def test_what_cannot_be_meant_is_refused(arguments: dict[str, Any], parts: tuple[str, ...]) -> None:
    with refused(JobError, *parts):
        encode(Prompt(**arguments), WORDS)


MISTYPED = """
from types import SimpleNamespace
from tracer.prompts import Prompt, encode
tokenizer = SimpleNamespace(decode=lambda *_, **__: 'x')
words = SimpleNamespace(vocab_size=101, context_length=12, tokenizer=tokenizer)
for wrong in ({"token_ids": [1, 2.5]}, {"token_ids": [1, "a"]}, {"token_ids": [1, 5], "positions": [0.5]},
              {"token_ids": [1, None]}, {"token_ids": [1, 5], "target": 2.5}):
    try:
        encode(Prompt(**wrong), words)
    except Exception as problem:
        print(type(problem).__name__, problem)
"""


def test_values_of_a_wrong_type_are_refused_without_the_test_suites_type_checks() -> None:
    """In a process of its own, since here beartype refuses them first."""
    done = subprocess.run([sys.executable, "-c", MISTYPED], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    for line, value in zip(lines, ("2.5", "'a'", "0.5", "None", "2.5"), strict=True):
        assert line.startswith("JobError ")
        assert value in line


def test_a_prompt_as_long_as_the_context_is_accepted() -> None:
    assert len(encode(Prompt(token_ids=[1] * 12), WORDS).token_ids) == 12


@given(ROWS)
def test_inputs_are_left_padded(rows: tuple[tuple[int, ...], ...]) -> None:
    batch = Batch(rows)
    inputs = batch.inputs("cpu", kept=3)
    ids, mask = padded(rows)
    assert torch.equal(inputs["attention_mask"], mask)
    assert torch.equal(inputs["input_ids"] * mask, ids * mask)
    assert torch.equal(inputs["position_ids"], (mask.cumsum(1) - 1).clamp(min=0))
    assert inputs["use_cache"] is False
    assert inputs["logits_to_keep"] == 3
    assert batch.width == max(map(len, rows))
    assert batch.real().sum(1).tolist() == [len(row) for row in rows]
    assert bool((batch.real().int().diff(dim=1) <= 0).all())


@given(ROWS, st.integers(1, 3))
def test_aligned_begins_every_prompt_at_position_zero_and_padded_undoes_it(
    rows: tuple[tuple[int, ...], ...], dim: int
) -> None:
    batch = Batch(rows)
    shape = [len(rows), 2, 3, 2]
    shape[dim] = batch.width
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    got = batch.aligned(values, dim)
    assert torch.equal(got, aligned(values, [len(row) for row in rows], dim))
    mask = padded(rows)[1].view([len(rows) if at == 0 else batch.width if at == dim else 1 for at in range(4)])
    assert torch.equal(batch.padded(got, dim), values * mask)


@given(
    st.lists(st.integers(1, 50), max_size=30),
    st.integers(1, 7),
    st.integers(1, 1200),
)
def test_batches_hold_every_prompt_once_in_order_within_budget(lengths: list[int], size: int, budget: int) -> None:
    parts = list(batches(lengths, size, budget))
    assert [index for part in parts for index in part] == list(range(len(lengths)))

    def cost(part: range) -> int:
        return len(part) * max(lengths[i] for i in part) * size

    for part, following in zip(parts, [*parts[1:], None], strict=False):
        assert len(part) == 1 or cost(part) <= budget
        if following is not None:
            assert cost(range(part.start, part.stop + 1)) > budget
    assert parts == list(batches(lengths, size, budget))
