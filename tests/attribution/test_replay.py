"""The linearised backward pass as matrix products equals autograd's, in every family; edges are in test_edges.py."""

from __future__ import annotations

import pytest
import torch

import tiny as t
from helpers import Question, error, load
from tracer.attribution import backward
from tracer.attribution.attribute import metric_of, with_metric
from tracer.model import passes
from tracer.prompts import Batch, encode
from tracer.settings import LINEAR_GATE, RULES, settings


@pytest.mark.parametrize("rules", [RULES, LINEAR_GATE], ids=["half", "linear-gate"])
@pytest.mark.parametrize("metric", ["difference", "logprob", "centred"])
@pytest.mark.parametrize("basis", ["activation", "output"])
@pytest.mark.parametrize("family", t.FAMILIES)
def test_a_reading_without_gradients_is_that_with_them(
    family: str, basis: str, metric: str, rules: frozenset[str]
) -> None:
    if "gate" in rules and family in t.UNGATED:
        return  # has none: refused, see test_edges.py
    model, question = load(family), Question(metric=metric)
    encoded = [encode(prompt, model) for prompt in question.prompts()]
    chosen = with_metric(settings(metric=metric), encoded)
    batch, read = Batch(tuple(one.token_ids for one in encoded)), metric_of(encoded, chosen)
    wanted = passes.gradients(model, batch, read, rules=rules, basis=basis)
    got = backward.reading(model, batch, read, basis=basis, rules=rules)
    real = batch.padded(batch.real(), 1)
    assert torch.equal(got.metric, wanted.metric)
    assert error(got.gradients, wanted.gradients) < 2e-6
    assert error(got.embedding_gradient, wanted.embedding_gradient) < 2e-6
    assert error(got.values * real[:, None, :, None], wanted.values * real[:, None, :, None]) < 1e-6
    assert torch.equal(got.embedding * real[:, :, None], wanted.embedding * real[:, :, None])
