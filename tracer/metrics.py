"""One number per prompt from the logits, as arithmetic on plain tensors.

Every metric of method.md section 2 is a weighted sum of entries of a function of the logits: the identity,
the log-softmax, or the logits minus their vocabulary mean; or, where a circuit is of something inside the model, of
values that are read there. Knows no model and no tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tracer.shapes import Logits, PerPrompt


@dataclass(frozen=True)
class Metric:
    """A batch's metric: ``metric[p] = sum of weight * f(logits)[row, column, token]`` over entries of row p.

    Attributes:
        kind: ``logit``, ``difference``, ``topk``, ``share`` (f: identity), ``logprob`` (log-softmax) or ``centred``;
            ``neuron`` or ``direction``, whose entries are values inside the model and no tokens.
        row, column, token: index of each entry; `column` counts from the end, -1 being the last.
        weight: of each entry.
        n_prompts: rows of the batch.
        of: plain values that say what is read inside the model: its `kind`, the `layer` (None: behind the final norm),
            and the `neuron` or the `vector` [d_model]; None where logits are read.
    """

    kind: str
    row: Int[Tensor, " entry"]
    column: Int[Tensor, " entry"]
    token: Int[Tensor, " entry"]
    weight: Float[Tensor, " entry"]
    n_prompts: int
    of: SimpleNamespace | None = None

    @property
    def kept(self) -> int:
        """How many columns, counted from the end, the metric needs."""
        return int(-self.column.min()) if len(self.column) else 1

    def read(self, logits: Logits) -> PerPrompt:
        """The metric of each prompt, float32, differentiable in `logits` (the last `kept` columns or more)."""
        return read(logits, self.kind, self.row, self.column, self.token, self.weight, self.n_prompts)

    def repeat(self, prompt: int, times: int) -> Metric:
        """The metric of one prompt for a batch that holds it `times` times."""
        mine = self.row == prompt
        entries = int(mine.sum())
        return Metric(
            self.kind,
            torch.arange(times).repeat_interleave(entries),
            self.column[mine].repeat(times),
            self.token[mine].repeat(times),
            self.weight[mine].repeat(times),
            times,
            self.of,
        )


def read(
    logits: Tensor,
    kind: str,
    row: Tensor,
    column: Tensor,
    token: Tensor,
    weight: Tensor,
    n_prompts: int,
    of: SimpleNamespace | None = None,
) -> Tensor:
    """`Metric.read` of a metric's fields."""
    assert of is None  # which no logit says
    row, column, token, weight = (part.to(logits.device) for part in (row, column, token, weight))
    if kind in ("logprob", "centred"):
        at = logits[row, column].float()
        picked = (at.log_softmax(-1) if kind == "logprob" else at).gather(-1, token[:, None])[:, 0]
        picked = picked - at.mean(-1) if kind == "centred" else picked
    else:
        picked = logits[row, column, token].float()
    return summed(picked, row, weight, n_prompts)


def summed(picked: Tensor, row: Tensor, weight: Tensor, n_prompts: int) -> Tensor:
    """The weighted sum of each prompt's entries [prompt], of their values [entry]."""
    total = torch.zeros(n_prompts, dtype=picked.dtype, device=picked.device)
    return total.index_add(0, row.to(picked.device), picked * weight.to(picked.device))


def entries(
    positions: Sequence[int], targets: Sequence[int], foils: Sequence[int], kind: str
) -> list[tuple[int, int, float]]:
    """The (position, token, weight) terms of one prompt's metric.

    Targets (and foils) are averaged, ``topk`` is summed; positions are averaged.
    """
    target_weight = 1.0 if kind == "topk" else 1.0 / len(targets)
    terms = [(token, target_weight) for token in targets]
    if kind == "difference":
        terms += [(token, -1.0 / len(foils)) for token in foils]
    return [(pos, token, weight / len(positions)) for pos in positions for token, weight in terms]


def logit_summary(logits: Tensor, at: Tensor, last: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits, probabilities and ranks of the target tokens (1: no token is likelier), and the top-k predictions with
    their probabilities, from one prompt's [column, vocab].

    `at` holds the targets as (column, token); the `count` predictions are read at the column `last`. It may travel to
    a server."""
    chances, (column, token) = torch.softmax(logits.double(), -1), at.to(logits.device).unbind(-1)
    top = chances[last].topk(min(count, chances.shape[-1]))
    ranks = 1 + (logits[column] > logits[column, token][:, None]).sum(-1)
    return logits[column, token], chances[column, token], ranks, top.indices, top.values
