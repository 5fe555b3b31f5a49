"""What several test modules share: wrapped tiny models, one description of a batch for product and oracle."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import reference as ref
import tiny as t
import tracer
from tracer.errors import TracerError
from tracer.prompts import Batch

KINDS = {
    "logit": "target_logit",
    "difference": "logit_difference",
    "topk": "top_k",
    "logprob": "log_probability",
    "centred": "centred_logit",
}
KERNELS = [(family, "eager") for family in t.FAMILIES] + [(family, "sdpa") for family in t.SDPA]
TARGETS = ((7,), (11,), (23,))
FOILS = ((8,), (12,), (24,))


@functools.cache
def load(family: str, attn: str = "eager", **over: Any) -> tracer.Model:
    """A tiny model as the product wraps it; shared, since nothing may change it."""
    return tracer.load(t.tiny(family, attn=attn, **over), tokenizer=t.tokenizer())


def fresh(family: str, **over: Any) -> tracer.Model:
    """A tiny model of one's own, to be broken."""
    return tracer.load(t.tiny(family, **over), tokenizer=t.tokenizer())


def error(got: Tensor, wanted: Tensor) -> float:
    """The largest difference relative to the largest wanted value."""
    assert got.shape == wanted.shape
    assert not wanted.isnan().any()
    return float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))


@dataclass(frozen=True)
class Question:
    """A batch of prompts of different lengths and what is asked, for product and oracle alike."""

    lengths: tuple[int, ...] = (7, 4, 2)
    metric: str = "logit"
    targets: tuple[tuple[int, ...], ...] = TARGETS
    foils: tuple[tuple[int, ...], ...] = FOILS
    positions: tuple[int, ...] = (-1,)
    top_k: int = 5
    seed: int = 1

    def ids(self, seed: int = 0) -> tuple[tuple[int, ...], ...]:
        """Token ids of each prompt; another seed gives counterfactuals."""
        rows = zip(*t.batch(t.tiny("llama"), self.lengths, seed=self.seed + seed), strict=True)
        return tuple(tuple(row[mask.bool()].tolist()) for row, mask in rows)

    def prompts(self) -> list[tracer.Prompt]:
        """Every prompt with its counterfactual."""
        return [
            tracer.Prompt(
                token_ids=ids,
                target=None if self.metric == "topk" else self.targets[row],
                foil=self.foils[row] if self.metric == "difference" else None,
                positions=self.positions,
                counterfactual=other,
            )
            for row, (ids, other) in enumerate(zip(self.ids(), self.ids(100), strict=True))
        ]

    def oracle(self) -> ref.Metric:
        """The metric as the oracle writes it."""
        targets = None if self.metric == "topk" else torch.tensor(self.targets)
        return ref.Metric(KINDS[self.metric], targets, torch.tensor(self.foils), k=self.top_k, positions=self.positions)

    def row(self, row: int) -> Question:
        """The question about one prompt; its ids depend on the batch, so ask `ids` first."""
        return replace(self, lengths=(self.lengths[row],), targets=(self.targets[row],), foils=(self.foils[row],))


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Left-padded ids and mask, written apart from the product."""
    width = max(len(row) for row in rows)
    ids, mask = torch.full((len(rows), width), t.PAD), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.tensor(row)
        mask[index, width - len(row) :] = 1
    return ids, mask


def aligned(columns: Tensor, lengths: Sequence[int], dim: int) -> Tensor:
    """From columns of a left-padded batch to token positions, zeros after the end."""
    rows = []
    for row, length in zip(columns, lengths, strict=True):
        kept = row.narrow(dim - 1, row.shape[dim - 1] - length, length)
        shape = list(kept.shape)
        shape[dim - 1] = row.shape[dim - 1] - length
        rows.append(torch.cat([kept, row.new_zeros(shape)], dim - 1))
    return torch.stack(rows)


@dataclass(frozen=True)
class Differences:
    """Relative errors of one comparison."""

    nodes: float
    activations: float
    embeddings: float
    metric: float

    @property
    def worst(self) -> float:
        return max(self.nodes, self.activations, self.embeddings, self.metric)


def compare(model: tracer.Model, question: Question, method: str = "relp", **how: Any) -> Differences:
    """Product against oracle on one batch; `how` goes to both (baseline, basis, rules, steps)."""
    how = {"baseline": "zero"} | how  # every prompt of a question has a counterfactual
    baseline = str(how["baseline"])
    width, basis = max(question.lengths), str(how.get("basis", "activation"))
    extra: dict[str, Any] = {}
    oracle: dict[str, Any] = {}
    if baseline == "mean":
        others = replace(question, lengths=(width, width, width - 1, 3), seed=9).ids()
        extra["reference"] = [tracer.Prompt(token_ids=row) for row in others]
        oracle["mean_values"] = mean_columns(model, others, question.lengths, basis)
    if baseline == "counterfactual":
        oracle["counterfactual_ids"] = padded(question.ids(100))[0]
    if question.metric == "topk":
        extra["top_k"] = question.top_k
    got = tracer.attribute(
        model,
        question.prompts(),
        method,
        metric=question.metric,
        **extra,
        **how,  # type: ignore[arg-type]
    )
    ids, mask = padded(question.ids())
    wanted = ref.attribute(
        model.module,
        ids,
        mask,
        question.oracle(),
        method,
        **oracle,
        **how,  # type: ignore[arg-type]
    )
    real = mask.bool()[:, None, :, None]
    assert got.nodes.abs().sum() > 0
    return Differences(
        error(got.nodes, aligned(wanted.nodes, question.lengths, 2)),
        error(got.activations, aligned(wanted.activations * real, question.lengths, 2)),
        error(got.embeddings, aligned(wanted.embeddings, question.lengths, 1)),
        error(got.metric, wanted.metric),
    )


def mean_columns(model: tracer.Model, others: Sequence[Sequence[int]], lengths: Sequence[int], basis: str) -> Tensor:
    """Mean value per token position over other prompts, one prompt at a time, put where each prompt has it."""
    width = max(lengths)
    runs = []
    for row in others:
        with torch.no_grad():
            acts = ref.run(model.module, torch.tensor([row]), basis=basis).acts
        runs.append(torch.stack([act[0] for act in acts]))
    at = [torch.stack([run[:, pos] for run in runs if run.shape[1] > pos]).mean(0) for pos in range(width)]
    mean = torch.stack(at, dim=1)
    rows = []
    for length in lengths:
        rows.append(torch.cat([mean[:, :0].new_zeros(len(mean), width - length, mean.shape[2]), mean[:, :length]], 1))
    return torch.stack(rows)


def direct_logits(model: tracer.Model, rows: Sequence[Sequence[int]]) -> Tensor:
    """The logits of the last column by the Hugging Face model's own forward."""
    with torch.no_grad():
        return model.module(**Batch(tuple(tuple(row) for row in rows)).inputs("cpu")).logits


Change = Callable[[int, Tensor], Tensor]
"""From a layer and its neurons' values to other values."""


@contextmanager
def hooked(model: tracer.Model, change: Change, basis: str = "activation") -> Iterator[None]:
    """Every layer's neurons changed by plain hooks."""
    handles = []
    for layer in range(model.n_layers):
        down = model.part(layer, model.layouts[layer].down)
        if basis == "activation":
            handles.append(down.register_forward_pre_hook(lambda part, args, at=layer: (change(at, args[0]),)))
        else:
            handles.append(down.register_forward_hook(lambda part, args, out, at=layer: change(at, out)))
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def refused(kind: type[TracerError], *parts: str) -> Iterator[None]:
    """The block ends in a one-line error with value, rule and next step, which names all `parts`."""
    with pytest.raises(kind) as caught:
        yield
    problem = caught.value
    text = str(problem)
    assert "\n" not in text
    assert len(text) < 600
    for piece in (problem.value, problem.rule, problem.next_step):
        assert piece.strip()
    for part in parts:
        assert part in text, f"{part!r} is not in {text!r}"
