"""Prompts: what the user asks, the token ids it becomes, and left-padded batches of them.

Knows tokens and positions. Refuses to know models beyond a tokenizer, a vocabulary size and a context length,
and never repairs a prompt: what cannot be meant as written is a `JobError`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from tracer.errors import JobError, quoted

Target = str | int | Sequence[str | int]


@runtime_checkable
class Vocabulary(Protocol):
    """What encoding needs to know of a model."""

    @property
    def tokenizer(self) -> Any: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def context_length(self) -> int: ...


@dataclass(frozen=True)
class Prompt:
    """One question to a model; token ids are accepted everywhere text is.

    Args:
        text: the prompt; special tokens (BOS) are added as the tokenizer does.
        target: the token(s) asked about, each one token: text such as ``" are"`` or an id.
        foil: the wrong token(s); with them the metric is the logit difference.
        counterfactual: the paired prompt, of equal length in tokens; text or token ids.
        token_ids: the prompt as ids, used as they are, instead of `text`.
        positions: where the logits are read, as token indices (negative from the end); the last if None.
        id: the user's own name for it.
    """

    text: str | None = None
    target: Target | None = None
    foil: Target | None = None
    counterfactual: str | Sequence[int] | None = None
    token_ids: Sequence[int] | None = None
    positions: int | Sequence[int] | None = None
    id: str | None = None

    def __post_init__(self) -> None:
        if self.text is None and self.token_ids is None:
            raise JobError("prompt", "neither text nor token_ids was given", "give one of them")
        if self.text is not None and self.token_ids is not None:
            raise JobError(f"prompt {quoted(self.text)}", "both text and token_ids were given", "give one of them")
        if self.foil is not None and self.target is None:
            raise JobError(f"foil {quoted(self.foil)}", "a foil needs a target to differ from", "give a target")


@dataclass(frozen=True)
class Encoded:
    """A prompt as token ids, checked against a vocabulary. Positions are indices from 0."""

    token_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    foil_ids: tuple[int, ...]
    counterfactual_ids: tuple[int, ...] | None
    positions: tuple[int, ...]
    text: str
    id: str | None


def encode(prompt: Prompt, vocabulary: Vocabulary) -> Encoded:
    """Token ids of a prompt, its targets, foils and counterfactual.

    Raises:
        JobError: an empty or too long prompt, a target of several tokens, a target that is also a foil, an id out
            of the vocabulary, a counterfactual of another length, a position outside the prompt.
    """
    ids = _tokens(prompt.token_ids if prompt.text is None else prompt.text, vocabulary, "prompt")
    targets = _singles(prompt.target, vocabulary, "target")
    foils = _singles(prompt.foil, vocabulary, "foil")
    if both := set(targets) & set(foils):
        name = quoted(decode(vocabulary, both.pop()))
        raise JobError(f"token {name}", "is both target and foil", "give a foil that differs from the target")
    paired = None
    if prompt.counterfactual is not None:
        paired = _tokens(prompt.counterfactual, vocabulary, "counterfactual")
        if len(paired) != len(ids):
            raise JobError(
                f"counterfactual {quoted(prompt.counterfactual)}",
                f"is {len(paired)} tokens, the prompt {len(ids)}; they must be equally long",
                "choose words that are the same number of tokens",
            )
    text = prompt.text if prompt.text is not None else "".join(decode(vocabulary, i) for i in ids)
    return Encoded(ids, targets, foils, paired, _positions(prompt.positions, len(ids)), text, prompt.id)


def decode(vocabulary: Vocabulary, token: int) -> str:
    """One token as the user reads it, its leading space kept."""
    return vocabulary.tokenizer.decode([token], clean_up_tokenization_spaces=False)


def _tokens(value: str | Sequence[int] | None, vocabulary: Vocabulary, what: str) -> tuple[int, ...]:
    if value is None or len(value) == 0 or (isinstance(value, str) and not value.strip()):
        raise JobError(f"{what} {quoted(value)}", "is empty", "give at least one word")
    if isinstance(value, str):
        ids = tuple(vocabulary.tokenizer.encode(value))
    else:
        ids = tuple(_in_vocabulary(token, vocabulary, what) for token in value)
    if len(ids) > vocabulary.context_length:
        raise JobError(
            f"{what} {quoted(value, 30)}",
            f"is {len(ids)} tokens, the model reads at most {vocabulary.context_length}",
            "shorten it",
        )
    return ids


def _singles(value: Target | None, vocabulary: Vocabulary, what: str) -> tuple[int, ...]:
    if value is None:
        return ()
    several = [value] if not isinstance(value, Sequence) or isinstance(value, str) else list(value)
    if not several:
        raise JobError(f"{what} {quoted(value)}", "is empty", "give a token or leave it out")
    ids = tuple(_single(one, vocabulary, what) for one in several)
    if len(set(ids)) < len(ids):
        raise JobError(f"{what} {quoted(value)}", "names a token twice", "name each token once")
    return ids


def _single(value: str | int, vocabulary: Vocabulary, what: str) -> int:
    if not isinstance(value, str):
        return _in_vocabulary(value, vocabulary, what)
    ids = vocabulary.tokenizer.encode(value, add_special_tokens=False)
    if len(ids) != 1:
        pieces = [decode(vocabulary, token) for token in ids]
        spaced = vocabulary.tokenizer.encode(" " + value, add_special_tokens=False)
        hint = (
            f"did you mean {' ' + value!r} with its leading space?" if len(spaced) == 1 else "give one token, or its id"
        )
        raise JobError(f"{what} {quoted(value)}", f"is {len(ids)} tokens {quoted(pieces)}, one is needed", hint)
    return ids[0]


def _in_vocabulary(token: Any, vocabulary: Vocabulary, what: str) -> int:
    if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary.vocab_size:
        raise JobError(
            f"{what} token id {quoted(token)}",
            f"must be a whole number from 0 to {vocabulary.vocab_size - 1}, the model's vocabulary",
            "check which tokenizer made it",
        )
    return token


def _positions(value: int | Sequence[int] | None, length: int) -> tuple[int, ...]:
    several = [-1] if value is None else [value] if isinstance(value, int) else list(value)
    if not several:
        raise JobError("positions []", "is empty", "give a position or leave it out")
    for pos in several:
        if isinstance(pos, bool) or not isinstance(pos, int) or not -length <= pos < length:
            raise JobError(f"position {quoted(pos)}", f"the prompt has {length} tokens", f"use 0 to {length - 1}")
    found = tuple(pos % length for pos in several)
    if len(set(found)) < len(found):
        raise JobError(f"positions {quoted(value)}", "names a position twice", "name each position once")
    return found


@dataclass(frozen=True)
class Batch:
    """Prompts of any lengths, left-padded to one [prompt, column] tensor."""

    token_ids: tuple[tuple[int, ...], ...]

    @property
    def width(self) -> int:
        """Columns: the length of the longest prompt."""
        return max(len(ids) for ids in self.token_ids)

    @property
    def padding(self) -> Tensor:
        """Columns of padding before each prompt."""
        return torch.tensor([self.width - len(ids) for ids in self.token_ids])

    def inputs(self, device: torch.device | str, kept: int = 1) -> dict[str, Any]:
        """The model's keyword arguments; it returns logits of the last `kept` columns."""
        rows = [(0,) * (self.width - len(ids)) + tuple(ids) for ids in self.token_ids]
        columns = torch.arange(self.width)[None]
        mask = (columns >= self.padding[:, None]).long()
        places = (columns - self.padding[:, None]).clamp_min(0)
        return {
            "input_ids": torch.tensor(rows, device=device),
            "attention_mask": mask.to(device),
            "position_ids": places.to(device),
            "use_cache": False,
            "logits_to_keep": kept,
        }

    def real(self) -> Tensor:
        """Which positions exist, [prompt, pos]."""
        lengths = torch.tensor([len(ids) for ids in self.token_ids])
        return torch.arange(self.width)[None] < lengths[:, None]

    def aligned(self, padded: Tensor, dim: int) -> Tensor:
        """From columns to positions: each prompt moved to begin at 0, with zeros after its end.

        Args:
            padded: a tensor with prompts first and columns at `dim`.
            dim: of the columns.
        """
        return self._moved(padded, dim, torch.arange(self.width)[None] + self.padding[:, None].to(torch.long))

    def padded(self, aligned: Tensor, dim: int) -> Tensor:
        """From positions to columns: the inverse of `aligned`."""
        return self._moved(aligned, dim, torch.arange(self.width)[None] - self.padding[:, None].to(torch.long))

    def _moved(self, tensor: Tensor, dim: int, source: Tensor) -> Tensor:
        if not bool(self.padding.any()):
            return tensor
        shape = [1] * tensor.dim()
        shape[0], shape[dim] = source.shape
        inside = ((source >= 0) & (source < self.width)).view(shape).to(tensor.device)
        index = source.clamp(0, self.width - 1).view(shape).to(tensor.device).expand(tensor.shape)
        return torch.where(inside, tensor.gather(dim, index), torch.zeros((), dtype=tensor.dtype, device=tensor.device))


def batches(lengths: Sequence[int], bytes_per_token: int, budget: int) -> Iterator[range]:
    """Consecutive runs of prompts whose padded batch stays within `budget` bytes; one prompt at least.

    The split depends on lengths alone, so two calls compute the same bits.
    """
    start = 0
    while start < len(lengths):
        stop, widest = start + 1, lengths[start]
        while stop < len(lengths):
            wider = max(widest, lengths[stop])
            if (stop + 1 - start) * wider * bytes_per_token > budget:
                break
            stop, widest = stop + 1, wider
        yield range(start, stop)
        start = stop
