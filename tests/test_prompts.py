"""Prompts: what can be meant is encoded exactly, everything else is refused; padding and batching laws."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import children
import tiny as t
from helpers import aligned, padded, refused
from tracer.batching import batches
from tracer.errors import JobError
from tracer.prompts import Batch, Prompt, decode, encode


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


PIECES = ("▁The", "▁car", "▁are", "are", "▁keys", "▁,", ",")
"""Whole words of the SentencePiece-like tokenizers; ``are`` and ``,`` also without the space before."""


def sentencepiece(kind: str, bos: bool = True) -> Words:
    """A byte-fallback tokenizer that puts a space before a text and drops it again: as Llama-2, or by Metaspace."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdehikrsyTA1.,"]
    merges: dict[tuple[str, str], None] = {}
    for word in PIECES:
        for end in range(2, len(word) + 1):
            merges[word[: end - 1], word[end - 1]] = None
            tokens += [word[:end]] if word[:end] not in tokens else []
    numbers = {token: number for number, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(numbers, list(merges), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if kind == "llama-2":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        core.decoder = decoders.Sequence(strip)
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
        core.decoder = decoders.Metaspace(prepend_scheme="first")
    if bos:
        core.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    return Words(fast, len(tokens))


KINDS = ("llama-2", "metaspace")


@pytest.mark.parametrize("kind", KINDS)
def test_sentencepiece_tokens_keep_their_leading_space(kind: str) -> None:
    words = sentencepiece(kind)
    found = [decode(words, one) for one in words.tokenizer.encode("The car are")]
    assert found == ["<s>", " The", " car", " are"]
    number = words.tokenizer.convert_tokens_to_ids
    assert [decode(words, number(piece)) for piece in PIECES] == [piece.replace("▁", " ") for piece in PIECES]
    assert decode(words, number("▁")) == " "


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_reads_as_something(kind: str) -> None:
    words = sentencepiece(kind)
    assert all(decode(words, one) for one in range(words.vocab_size))
    assert decode(words, words.tokenizer.convert_tokens_to_ids("<0xC3>")) in ("�", "<0xC3>")


def test_a_byte_that_is_no_text_alone_is_decoded_without_a_crash() -> None:
    core = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words = Words(PreTrainedTokenizerFast(tokenizer_object=core), 256)
    assert [decode(words, one) for one in words.tokenizer.encode("é a")] == ["�", "�", " ", "a"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("text", "piece"), [(" are", "▁are"), (" keys", "▁keys"), (",", ","), (" ,", "▁,")])
def test_a_target_is_the_token_that_follows_text(kind: str, text: str, piece: str) -> None:
    words = sentencepiece(kind)
    (found,) = encode(Prompt("The car", target=text), words).target_ids
    assert words.tokenizer.convert_ids_to_tokens(found) == piece
    assert decode(words, found) == text


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_with_two_meanings_is_refused(kind: str) -> None:
    with refused(JobError, "'are'", "could be ' are' (token", "or 'are' (token", "leading space"):
        encode(Prompt("The car", target="are"), sentencepiece(kind))
    with refused(JobError, "'keys'", "' keys' (token", "did you mean ' keys' with its leading space?"):
        encode(Prompt("The car", target="keys"), sentencepiece(kind))


def test_an_empty_target_gets_no_hint_of_a_space() -> None:
    with pytest.raises(JobError) as caught:
        encode(Prompt("The car", target=""), WORDS)
    assert "target '': is empty" in str(caught.value)
    assert "space" not in str(caught.value)


def test_spaces_in_a_target_are_shown_as_they_are() -> None:
    with refused(JobError, "target '  are'"):
        encode(Prompt("The car", target="  are"), WORDS)
    with refused(JobError, "prompt '   '"):
        encode(Prompt("   "), WORDS)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"text": "The car", "target": 5}, "prompt 'The car'"),
        ({"token_ids": [1], "target": " are"}, "target ' are'"),
        ({"token_ids": [1], "foil": [" are"], "target": 5}, "foil ' are'"),
        ({"token_ids": [1, 2], "counterfactual": "The"}, "counterfactual 'The'"),
    ],
)
def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(arguments: dict[str, Any], name: str) -> None:
    small = Words(vocab_size=40)
    with refused(JobError, name, "the model has 40", "not this model's"):
        encode(Prompt(**arguments), small)


@pytest.mark.parametrize("where", ["text", "target", "counterfactual", "id"])
def test_bytes_that_are_no_text_are_refused(where: str) -> None:
    given: dict[str, Any] = {"text": "The car", where: "a\udcff"}
    with refused(JobError, "'\\udcff'", "not Unicode text"):
        encode(Prompt(**given), WORDS)


def test_a_second_start_token_is_refused() -> None:
    for text in ("<bos> The car", "<bos>The car"):
        with refused(JobError, "begins with <bos>", "token_ids"):
            encode(Prompt(text), WORDS)
        with refused(JobError, "counterfactual", "begins with <bos>"):
            encode(Prompt("The car", counterfactual=text), WORDS)
    words = sentencepiece("llama-2", bos=False)
    assert encode(Prompt("<s> The car"), words).token_ids[0] == 1, "nothing is doubled where none is added"


NUMBERS = [np.array([7, 50, 9]), torch.tensor([7, 50, 9]), [np.int64(7), torch.tensor(50), 9], (7, np.uint8(50), 9)]


@pytest.mark.parametrize("ids", NUMBERS, ids=lambda value: type(value).__name__)
def test_ids_of_numpy_and_torch_become_ints(ids: Any) -> None:
    got = encode(Prompt(token_ids=ids, counterfactual=ids, target=ids, positions=np.int64(-1)), WORDS)
    for found in (got.token_ids, got.counterfactual_ids, got.target_ids):
        assert found == (7, 50, 9)
        assert all(type(one) is int for one in found or ())
    assert got.positions == (2,)
    assert type(got.positions[0]) is int
    one = encode(Prompt(token_ids=[7], target=np.int64(5), foil=torch.tensor(6), positions=torch.tensor([0])), WORDS)
    assert (one.target_ids, one.foil_ids, one.positions) == ((5,), (6,), (0,))


@pytest.mark.parametrize(
    ("ids", "part"),
    [
        (np.array([True, False]), "token id True"),
        (torch.tensor([1.0, 2.0]), "token id 1.0"),
        ([1, torch.tensor(True)], "token id"),
        (torch.tensor([[1, 2]]), "token id [1, 2]"),
        (torch.tensor(5), "token_ids 5"),
    ],
    ids=str,
)
def test_arrays_that_are_no_token_ids_are_refused(ids: Any, part: str) -> None:
    with refused(JobError, part):
        encode(Prompt(token_ids=ids), WORDS)


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
    ({"text": "The car", "target": ""}, ("target ''", "is empty")),
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


@pytest.mark.process
def test_values_of_a_wrong_type_are_refused_without_the_test_suites_type_checks() -> None:
    """In a process of its own, since here beartype refuses them first."""
    done = subprocess.run(children.command("mistyped"), capture_output=True, text=True, check=True, timeout=120)
    lines = done.stdout.splitlines()
    values = "2.5 'a' 0.5 None 2.5 55 56 1.5 57 '58' b'59' {60} 61 '62' 63".split()
    assert len(lines) == len(values), done.stdout
    for line, value in zip(lines, values, strict=True):
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
