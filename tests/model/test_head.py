"""Single logits by rows of the head, and the vocabulary in pieces, are what the whole head gives."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tracer.metrics import logit_summary
from tracer.model import head as heads
from tracer.model.rules import soft_cap

VOCAB, WIDTH = 57, 8
HEADS = {"plain": (False, None, False, 1.0), "bias": (True, None, False, 1.0), "capped": (True, 1.5, False, 1.0),
         "capped by a rule": (False, 1.5, True, 1.0), "scaled": (True, 1.5, True, 0.3)}  # fmt: skip


@pytest.fixture(params=[1, 10, 64, 2**24], ids=lambda piece: f"pieces of {piece}")
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "PIECE", request.param)


def made(kind: str) -> tuple[SimpleNamespace, Tensor]:
    """A head and some hidden states [prompt, column, d_model]."""
    bias, cap, linear, scale = HEADS[kind]
    draw = torch.Generator().manual_seed(3)
    weight = torch.randn(VOCAB, WIDTH, generator=draw)
    unit = SimpleNamespace(weight=weight, bias=torch.randn(VOCAB, generator=draw) if bias else None)
    unit.cap, unit.linear, unit.scale = cap, linear, scale
    return unit, torch.randn(3, 4, WIDTH, generator=draw)


def whole(unit: SimpleNamespace, hidden: Tensor) -> Tensor:
    """All logits, differentiable as the head's rules say."""
    raw = unit.scale * (hidden @ unit.weight.T + (0 if unit.bias is None else unit.bias))
    if unit.cap is None:
        return raw
    value = unit.cap * torch.tanh(raw / unit.cap)
    return soft_cap(value, raw, unit.cap) if unit.linear else value


@pytest.mark.parametrize("kind", HEADS)
def test_a_tokens_logit_is_that_of_the_whole_head(kind: str) -> None:
    unit, hidden = made(kind)
    rows, tokens = hidden.flatten(0, 1).requires_grad_(), torch.arange(12) * 4
    got, wanted = heads.of_tokens(unit, rows, tokens), whole(unit, rows).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(got, wanted)
    for one, other in zip(*(torch.autograd.grad(value.sum(), [rows]) for value in (got, wanted)), strict=True):
        torch.testing.assert_close(one, other)
    value, shrunk = heads.targets(unit, rows, tokens)
    raw = whole(SimpleNamespace(**{**vars(unit), "cap": None, "scale": 1.0}), rows).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(value, raw * shrunk)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("metric", ["logprob", "centred"])
@pytest.mark.parametrize("kind", HEADS)
def test_sums_over_the_vocabulary_and_their_gradient(kind: str, metric: str) -> None:
    unit, hidden = made(kind)
    rows = hidden.flatten(0, 1).requires_grad_()
    got, logits = heads.summed(unit, rows, metric), whole(unit, rows)
    wanted = logits.logsumexp(-1) if metric == "logprob" else logits.mean(-1)
    torch.testing.assert_close(got, wanted)
    mine, theirs = (torch.autograd.grad(value.sum(), rows)[0] for value in (got, wanted))
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("kind", HEADS)
def test_the_summary_is_that_of_all_logits(kind: str) -> None:
    unit, hidden = made(kind)
    at = torch.tensor([[0, 3, 5], [0, 1, 6], [1, 3, 50], [2, 2, 0], [2, 2, 56], [2, 0, 9]])
    last = [3, 3, 2]
    got = heads.summary(unit, hidden, at, last, 4)
    logits = whole(unit, hidden)
    for row in range(3):
        mine = at[:, 0] == row
        wanted = logit_summary(logits[row], at[mine, 1:], last[row], 4)
        for one, other in zip((*(part[mine] for part in got[:3]), got[3][row], got[4][row]), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert torch.equal(heads.likeliest(unit, hidden[:, -1], 3), logits[:, -1].topk(3).indices)


@pytest.mark.usefixtures("pieces")
def test_a_token_with_the_same_logit_is_not_likelier() -> None:
    unit, hidden = made("plain")
    unit.weight[7] = unit.weight[40]
    at = torch.tensor([[0, 3, 7], [0, 3, 40]])
    ranks = heads.summary(unit, hidden[:1], at, [3], 1)[2]
    assert ranks[0] == ranks[1] == 1 + int((whole(unit, hidden)[0, 3] > whole(unit, hidden)[0, 3, 7] + 1e-6).sum())
