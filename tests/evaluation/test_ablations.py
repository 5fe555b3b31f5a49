"""Sets of nodes that are told as parts of rankings, beside dense masks on each prompt alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tiny as t
from helpers import error, load
from tracer.evaluation.ablations import EMPTY, AblatedRow, Ranking, Replacement, measured
from tracer.model import passes
from tracer.model.model import Model
from tracer.prompts import Batch, Encoded, Prompt, encode
from tracer.settings import settings

TARGET = 7


def prompts(model: Model, lengths: tuple[int, ...], seed: int) -> list[Encoded]:
    draw = torch.Generator().manual_seed(seed)
    return [
        encode(
            Prompt(token_ids=torch.randint(t.FIRST, t.VOCAB, (length,), generator=draw).tolist(), target=TARGET), model
        )
        for length in lengths
    ]


def members(row: AblatedRow, shape: tuple[int, int, int]) -> Tensor:
    """Which nodes are in a row's set, by the definition."""
    first, second, third = row.cuts
    places = row.ranking.places
    inside = (places < first) | ((places >= second) & (places < third))
    if row.ranking.nodes is None:
        return inside
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[row.ranking.nodes[inside].long().unbind(-1)] = True
    return mask


def alone(model: Model, row: AblatedRow, to: Tensor, basis: str) -> Tensor:
    """The metric of a row on its own, by a dense mask and values [layer, pos, neuron]."""
    ids = row.prompt.token_ids
    shape = (model.n_layers, len(ids), model.n_neurons(basis))
    gone = members(row, shape) != row.stays
    edits = [passes.Edit(layer, gone[layer][None], 0.0, to[layer][None]) for layer in range(model.n_layers)]
    return passes.intervened(model, Batch((ids,)), edits, basis=basis)[0, -1, TARGET]


@pytest.mark.parametrize("kind", ["zero", "others", "mean"])
@pytest.mark.parametrize("basis", ["activation", "output"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_sets_by_index_are_dense_masks(family: str, basis: str, kind: str) -> None:
    """Small and nearly whole sets, some with a hole, listed or of every node, in padded batches of several prompts."""
    model, draw = load(family), torch.Generator().manual_seed(5)
    lengths = (3, 6, 6) if kind != "others" else (4, 4, 4)
    asked, behind = prompts(model, lengths, 1), prompts(model, (4, 4, 4) if kind == "others" else (6, 6, 3), 2)
    ids = tuple(one.token_ids for one in behind)
    to = Replacement(() if kind == "zero" else ids, mean=kind == "mean")
    values = [passes.values(model, Batch((one,)), basis=basis)[0][0] for one in ids]
    rows, dense = list[AblatedRow](), list[Tensor]()
    for number, prompt in enumerate(asked):
        shape = (model.n_layers, len(prompt.token_ids), model.n_neurons(basis))
        count = shape[0] * shape[1] * shape[2]
        every = Ranking(torch.randperm(count, generator=draw).view(shape))
        some = torch.stack(torch.unravel_index(torch.randperm(count, generator=draw)[:20], shape), -1)
        cuts = [(0, 0, 9), (4, 6, 20), (20, 20, 20)]
        sets = [(Ranking.of(some), one) for one in cuts] + [(EMPTY, (0, 0, 0))]
        sets += [(every, one) for one in [*cuts, (0, 0, count - 3), (count // 2, count // 2 + 1, count - 1)]]
        for stays in (False, True):
            rows += [AblatedRow(prompt, ranking, one, stays, number) for ranking, one in sets]
        if kind == "mean":
            reached = [value for value in values if value.shape[1] >= len(prompt.token_ids)]
            mean = [torch.stack([v[:, p] for v in values if v.shape[1] > p]).mean(0) for p in range(shape[1])]
            new = torch.stack(mean, 1) if reached else torch.zeros(shape)
        else:
            new = torch.zeros(shape) if kind == "zero" else values[number]
        dense += [new] * (2 * len(sets))
    got = measured(model, rows, to, settings(metric="logit"), basis, 2**30)
    wanted = torch.stack([alone(model, row, new, basis) for row, new in zip(rows, dense, strict=True)])
    assert error(got, wanted) < 1e-5
    little = 5 * 6 * model.bytes_per_token(gradient=False, length=6)
    few = measured(model, rows, to, settings(metric="logit"), basis, little)
    assert error(few, wanted) < 1e-5


@pytest.mark.parametrize("metric", ["logit", "logprob", "centred"])
def test_a_metric_of_rows_of_the_head_is_that_of_all_logits(metric: str) -> None:
    """Beside the forward that makes every logit, with a soft-cap."""
    model = load("gemma3")
    asked = prompts(model, (5, 3), 3)
    rows = [AblatedRow(one, EMPTY, (0, 0, 0)) for one in asked]
    got = measured(model, rows, Replacement(), settings(metric=metric), "activation", 2**30)
    logits = torch.stack([passes.logits(model, Batch((one.token_ids,)))[0, -1] for one in asked])
    whole = {"logit": logits, "logprob": logits.log_softmax(-1), "centred": logits - logits.mean(-1, keepdim=True)}
    assert error(got, whole[metric][:, TARGET]) < 1e-5
