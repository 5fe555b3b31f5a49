"""The output head without all logits: single tokens' logits by its rows, the whole vocabulary in pieces.

Like model/interventions.py these functions run inside a trace or beside one, here or on a server, and travel as their
source. They take hidden states behind the final norm, one row for each logit or each position that is read, and know
the head as `of` gives it. What is asked of the logits (metrics, predictions) is tracer/metrics.py's business.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tracer.model import rules as linearize

PIECE = 2**24
"""Logits held at a time."""


def of(nn: Any, plan: SimpleNamespace, rules: frozenset[str] = frozenset()) -> SimpleNamespace:
    """The head of a model: its `weight` [vocab, d_model] and `bias` (or None), the constant `scale` of its logits,
    their soft-`cap` (or None), and whether that is `linear`: an activation that a rule replaces."""
    part = nn.get(plan.head)._module
    bias, scale = getattr(part, "bias", None), plan.logit_scale
    return SimpleNamespace(weight=part.weight, bias=bias, scale=scale, cap=plan.soft_cap, linear="activation" in rules)


def capped(head: SimpleNamespace, raw: Tensor) -> Tensor:
    """Logits of what the head gives: times their constant, and behind the soft-cap, if there is one."""
    raw = raw if head.scale == 1 else raw * head.scale
    if head.cap is None:
        return raw
    value = head.cap * torch.tanh(raw / head.cap)
    return linearize.soft_cap(value, raw, head.cap) if head.linear else value


def of_tokens(head: SimpleNamespace, hidden: Tensor, tokens: Tensor) -> Tensor:
    """The logit of one token for each row of `hidden` [row, d_model], float32, differentiable in it [row]."""
    tokens = tokens.to(head.weight.device)
    raw = (hidden.to(head.weight.device).float() * head.weight[tokens].float()).sum(-1)
    return capped(head, raw if head.bias is None else raw + head.bias[tokens].float())


def targets(head: SimpleNamespace, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """As `of_tokens`, and what the logits' constant and soft-cap multiply each of them by [row]."""
    raw = of_tokens(SimpleNamespace(**{**vars(head), "scale": 1.0, "cap": None}), hidden, tokens)
    value = capped(head, raw)
    return value, torch.where(raw == 0, head.scale, value / torch.where(raw == 0, 1.0, raw))


def pieces(head: SimpleNamespace, hidden: Tensor, width: int = 1) -> Iterator[tuple[int, Tensor]]:
    """The first token of each piece of the vocabulary, and the logits of its tokens [row, token], float32.

    Args:
        width: how many numbers are held for each row and token.
    """
    hidden, plain = hidden.detach().to(head.weight.device), SimpleNamespace(**{**vars(head), "linear": False})
    size = max(1, PIECE // max(1, len(hidden) * width))
    for first in range(0, len(head.weight), size):
        raw = (hidden @ head.weight[first : first + size].T).float()
        bias = None if head.bias is None else head.bias[first : first + size].float()
        yield first, capped(plain, raw if bias is None else raw + bias)


def summed(head: SimpleNamespace, hidden: Tensor, kind: str) -> Tensor:
    """The log of the summed exponentials of each row's logits (`kind` ``logprob``), or their mean (``centred``), in
    pieces [row], float32, with the gradient to `hidden` [row, d_model] that the whole vocabulary gives."""
    largest = torch.full((len(hidden),), -torch.inf, device=head.weight.device)
    total, slope = torch.zeros_like(largest), torch.zeros(hidden.shape, device=head.weight.device)
    with torch.no_grad():
        for first, value in pieces(head, hidden, 2):
            weight = head.weight[first : first + value.shape[1]].float()
            share = torch.full_like(value, 1 / len(head.weight))
            if kind == "logprob":
                most = torch.maximum(largest, value.max(-1).values)
                fade, share = (largest - most).exp(), (value - most[:, None]).exp()
                total, slope, largest = total * fade + share.sum(-1), slope * fade[:, None], most
            else:
                total = total + (value * share).sum(-1)
            slope += (share * _slope(head, value)) @ weight
        if kind == "logprob":
            slope, total = slope / total[:, None], largest + total.log()
    return linearize.straight(total, (hidden.to(slope.device).float() * slope).sum(-1))


def _slope(head: SimpleNamespace, value: Tensor) -> Tensor | float:
    """The derivative of logits to what the head gives, from their values: the constant times the soft-cap's, or times
    the factor that a rule puts in the place of that."""
    if head.cap is None:
        return head.scale
    tanh = value / head.cap
    if not head.linear:
        return head.scale * (1 - tanh.square())
    return head.scale * torch.where(tanh == 0, 1.0, tanh / torch.where(tanh == 0, 1.0, torch.atanh(tanh)))


def weighed(head: SimpleNamespace, rows: Tensor, tokens: Tensor, metric: SimpleNamespace) -> Tensor:
    """The metric [prompt] of its terms' hidden states [term, d_model] and tokens, differentiable in the former.

    Args:
        metric: the fields of a `Metric`.
    """
    value = of_tokens(head, rows, tokens)
    if metric.kind in ("logprob", "centred"):
        value = value - summed(head, rows.to(value.device), metric.kind)
    total = torch.zeros(metric.n_prompts, dtype=value.dtype, device=value.device)
    return total.index_add(0, metric.row.to(value.device), value * metric.weight.to(value.device))


def likeliest(head: SimpleNamespace, hidden: Tensor, count: int) -> Tensor:
    """The tokens of the `count` largest logits of each row, the largest first [row, count]."""
    best = None
    for first, value in pieces(head, hidden):
        best = _larger(best, first, value, count)
    assert best is not None
    return best[1]


def _larger(best: tuple[Tensor, Tensor] | None, first: int, value: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest logits so far and their tokens [row, count], after one more piece."""
    top = value.topk(min(count, value.shape[1]))
    values, tokens = top.values, top.indices + first
    if best is None:
        return values, tokens
    values, tokens = torch.cat([best[0], values], 1), torch.cat([best[1], tokens], 1)
    kept = values.topk(min(count, values.shape[1]))
    return kept.values, tokens.gather(1, kept.indices)


def summary(
    head: SimpleNamespace, hidden: Tensor, at: Tensor, last: Sequence[int], count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits, probabilities and ranks of target tokens (1: no token is likelier) [target], and each prompt's likeliest
    tokens with their probabilities [prompt, count], from `hidden` [prompt, column, d_model].

    Args:
        at: the targets as (prompt, column, token). last: for each prompt the column at which its `count` predictions
            are read.
    """
    device = head.weight.device
    ends = torch.stack([torch.arange(len(last)), torch.tensor(last)], -1)
    places, row = torch.cat([at[:, :2], ends]).unique(dim=0, return_inverse=True)
    row, end, token = row[: len(at)].to(device), row[len(at) :].to(device), at[:, 2].to(device)
    rows, width = hidden[places[:, 0], places[:, 1]].to(device), max(1, len(at) // len(places))
    spread, best, held = torch.full((len(places),), -torch.inf, dtype=torch.float64, device=device), None, []
    own = torch.zeros(len(at), device=device)
    for first, value in pieces(head, rows, width):
        spread = torch.logaddexp(spread, value.double().logsumexp(-1))
        inside = (token >= first) & (token < first + value.shape[1])
        own[inside] = value[row[inside], token[inside] - first]
        best = _larger(best, first, value[end], count)
        held = [(first, value)]
    assert best is not None
    ranks = torch.ones_like(token)  # one piece is all of them; several are made again
    for _, value in held if held[0][0] == 0 else pieces(head, rows, width):
        ranks += (value[row] > own[:, None]).sum(-1)
    chances = (own.double() - spread[row]).exp(), (best[0].double() - spread[end, None]).exp()
    return of_tokens(head, rows[row], token), chances[0], ranks, best[1], chances[1]
