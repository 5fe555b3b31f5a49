"""Estimates of a mixture's circuit are held against nodes that are there: neurons of experts that ran."""

from __future__ import annotations

import pytest
import torch

import tracer
from mixtures import D_EXPERT, FAMILIES, N_EXPERTS, N_USED, mixture
from tracer.attribution.running import Running

IDS = (1, 7, 9)
OTHERS = [(1, 8, 5, 30), (1, 40, 41, 42), (2, 9, 31, 7)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sample_is_of_nodes_that_ran(family: str) -> None:
    model = mixture(family)
    circuit = tracer.trace(model, tracer.Prompt(token_ids=IDS, target=11), 30, edges=False)
    found = tracer.estimate_quality(model, circuit, n_each=10**6)
    sample = found.sample
    there = Running.of(model, [IDS])
    nodes = {*zip(sample.layer.tolist(), sample.position.tolist(), sample.neuron.tolist(), strict=True)}
    dense = 48 if family == "qwen3_moe" else 0
    mixed = 2 if dense else 3
    assert len(nodes) == len(sample) == len(IDS) * (dense + mixed * N_USED * D_EXPERT) == len(IDS) * model.n_nodes()
    assert all(there.has(*node) and node[2] < model.widths[node[0]] for node in nodes)
    exact = tracer.attribute(model, [tracer.Prompt(token_ids=IDS, target=11)], "exact").nodes[0]
    at = sample.layer, sample.position, sample.neuron
    assert torch.allclose(sample.exact, exact[at], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_that_are_always_on_are_some_that_ran(family: str) -> None:
    model = mixture(family)
    circuit = tracer.trace(model, tracer.Prompt(token_ids=IDS, target=11), 30, edges=False)
    prompts = [tracer.Prompt(token_ids=ids) for ids in OTHERS]
    found = tracer.always_on(model, circuit, prompts, share=0.3, exact_below=0.99)
    assert found
    each = [Running.of(model, [ids]) for ids in OTHERS]
    for one in found:
        assert one.neuron < model.widths[one.layer]
        ran = sum(any(there.has(one.layer, at, one.neuron) for at in range(4)) for there in each)
        assert ran >= round(3 * one.share)
    assert max(one.neuron for one in found) < N_EXPERTS * D_EXPERT
