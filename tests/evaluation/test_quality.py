"""Estimate quality against the method `exact` and plain correlations, and an always-on neuron built on purpose."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

import tracer
from helpers import fresh, load, refused
from tracer.circuit.circuit import Circuit
from tracer.errors import JobError
from tracer.evaluation.quality import STRATA, Quality, always_on, estimate_quality
from tracer.model.model import Model
from tracer.prompts import Prompt

CUT = {"edges": False, "nodes": 20}
IDS = (1, 9, 14, 30, 22, 17)
PAIRED = (1, 9, 15, 33, 22, 17)


def prompt(**over: Any) -> Prompt:
    return Prompt(**{"token_ids": IDS, "target": 7, "foil": 8, "counterfactual": PAIRED, **over})  # type: ignore[arg-type]


def others(count: int = 4, length: int = 6, seed: int = 3) -> list[Prompt]:
    """Prompts of random ids that begin with BOS."""
    drawn = torch.randint(4, 100, (count, length - 1), generator=torch.Generator().manual_seed(seed))
    return [Prompt(token_ids=(1, *row)) for row in drawn.tolist()]


def traced(model: Model, **how: Any) -> Circuit:
    return tracer.trace(model, prompt(), **{"baseline": "zero", **CUT, **how})  # type: ignore[arg-type]


def at_nodes(quality: Quality, nodes: Tensor) -> Tensor:
    """Values at the sampled nodes, from [layer, pos, neuron]."""
    return nodes[quality.sample.layer, quality.sample.position, quality.sample.neuron]


@pytest.mark.parametrize("ablation", ["zero", "mean", "counterfactual"])
@pytest.mark.parametrize(("family", "basis"), [("llama", "activation"), ("gpt2", "activation"), ("gemma2", "output")])
def test_exact_effects_are_those_of_the_method_exact(family: str, basis: str, ablation: str) -> None:
    model = load(family, n_layers=2)
    reference = others() if ablation == "mean" else None
    circuit = traced(model, basis=basis)
    quality = estimate_quality(model, circuit, ablation=ablation, reference=reference, n_each=30, memory=1 << 22)
    how = {"method": "exact", "baseline": ablation, "basis": basis, "reference": reference}
    wanted = tracer.attribute(model, [prompt()], **how).nodes[0]  # type: ignore[arg-type]
    assert torch.allclose(quality.sample.exact, at_nodes(quality, wanted), atol=1e-5)
    estimate = tracer.attribute(model, [prompt()], baseline="zero", basis=basis).nodes[0]
    assert torch.equal(quality.sample.attribution, at_nodes(quality, estimate))
    assert quality.ablation == ablation
    assert quality.baseline == "zero"


@pytest.mark.parametrize("baseline", ["zero", "mean", "counterfactual"])
def test_an_exact_circuit_correlates_perfectly(baseline: str) -> None:
    """By default the ablation is the circuit's own baseline."""
    model = load("llama", n_layers=2)
    reference = others() if baseline == "mean" else None
    circuit = traced(model, method="exact", baseline=baseline, reference=reference)
    quality = estimate_quality(model, circuit, prompt(), n_each=40, reference=reference)
    assert quality.ablation == baseline
    assert quality.whole.agreement is not None
    assert float(quality.whole.agreement.pearson.estimate) == pytest.approx(1, abs=1e-4)
    strong = quality.strata["strong"].agreement
    assert strong is not None
    assert float(strong.spearman.estimate) == pytest.approx(1, abs=1e-4)


def test_the_sample_is_stratified_and_the_correlations_are_numpys() -> None:
    model = load("llama", n_layers=2)
    quality = estimate_quality(model, traced(model, method="grad"), n_each=25)
    sample = quality.sample
    assert sample.stratum.bincount().tolist() == [25, 25, 25]
    assert len({*zip(sample.layer.tolist(), sample.position.tolist(), sample.neuron.tolist(), strict=True)}) == 75
    weakest = sample.attribution[sample.stratum == 0].abs().min()
    assert bool((sample.attribution[sample.stratum > 0].abs() <= weakest).all())
    for i, name in enumerate((*STRATA, "whole")):
        found = quality.whole if name == "whole" else quality.strata[name]
        part = (sample.stratum == i) | (name == "whole")
        assert found.n == int(part.sum())
        assert found.agreement is not None
        wanted = torch.corrcoef(torch.stack([sample.attribution[part], sample.exact[part]]).double())[0, 1]
        assert float(found.agreement.pearson.estimate) == pytest.approx(float(wanted), abs=1e-6)
        for one in (found.agreement.pearson, found.agreement.spearman):
            assert -1 <= float(one.low) <= float(one.estimate) <= float(one.high) <= 1


def test_the_seed_decides_the_sample_and_the_intervals() -> None:
    model = load("llama", n_layers=2)
    circuit = traced(model)
    one, same, other = (estimate_quality(model, circuit, n_each=20, seed=seed).record() for seed in (1, 1, 2))
    assert one == same
    assert one["sample"]["neuron"] != other["sample"]["neuron"]
    assert one["sample"]["neuron"][:20] == other["sample"]["neuron"][:20]  # the strongest
    assert json.loads(json.dumps(one)) == one
    assert set(one["sample"]["stratum"]) == set(STRATA)


def test_a_stratum_without_variation_says_so() -> None:
    """With one layer only the last position matters: what is not strong is zero, estimate and truth."""
    model = load("llama", n_layers=1)
    quality = estimate_quality(model, traced(model), n_each=48)
    assert quality.whole.agreement is not None
    for name in ("middle", "random"):
        assert quality.strata[name].agreement is None
        assert "every attribution is 0" in str(quality.strata[name])
        assert quality.strata[name].record()["pearson"] is None
    assert "Pearson" in str(quality)


def test_nodes_that_the_circuit_could_not_hold_are_not_sampled() -> None:
    model = load("llama", n_layers=2)
    out = {(int(row["layer"]), int(row["neuron"])) for row in traced(model).rows("neuron")[:3]}
    sample = estimate_quality(model, traced(model, skip_first=True, exclude=out), n_each=200).sample
    assert int(sample.position.min()) == 1
    assert not out & {*zip(sample.layer.tolist(), sample.neuron.tolist(), strict=True)}
    assert len(sample) == (2 * 48 - 3) * 5


@pytest.mark.parametrize("metric", ["topk", "logprob"])
def test_other_metrics_and_positions(metric: str) -> None:
    """The tokens that the model chose itself are asked about again."""
    model = load("llama", n_layers=2)
    asked = Prompt(token_ids=IDS, positions=(3,), target=None if metric == "topk" else (7, 9))
    circuit = tracer.trace(model, asked, metric=metric, method="exact", nodes=10, edges=False)
    quality = estimate_quality(model, circuit, asked, n_each=20)
    assert quality.whole.agreement is not None
    assert float(quality.whole.agreement.pearson.estimate) == pytest.approx(1, abs=1e-4)
    assert quality.metric == pytest.approx(circuit.metric)


def with_constant(layer: int = 1, neuron: int = 5) -> Model:
    """A model in which one neuron is 30 whatever the prompt; in the last layer, where it drowns no other."""
    model = fresh("gpt2", n_layers=2)
    block = model.module.transformer.h[layer].mlp
    block.c_fc.weight.data[:, neuron] = 0
    block.c_fc.bias.data[neuron] = 30
    return model


def test_an_always_on_neuron_is_found_and_no_other() -> None:
    model = with_constant()
    circuit = traced(model, nodes=40)
    found = always_on(model, circuit, others(12))
    assert [(one.layer, one.neuron) for one in found] == [(1, 5)]
    (one,) = found
    assert one.share > 0.5
    assert one.attribution > 0.1
    assert one.exact < 1e-4
    assert one.n_nodes == sum((row["layer"], row["neuron"]) == (1, 5) for row in circuit.rows("neuron")) > 0
    assert "layer 1 neuron 5" in str(one)
    longer = [*others(6), *others(6, length=9, seed=8), *others(1, length=12)]
    assert [(one.layer, one.neuron) for one in always_on(model, circuit, longer)] == [(1, 5)]


def test_without_one_none_is_found() -> None:
    model = fresh("gpt2", n_layers=2)
    assert always_on(model, traced(model), others(12)) == []


def test_both_numbers_of_an_always_on_neuron_are_means_over_its_strong_prompts() -> None:
    """With lenient bounds every neuron is listed; one is worked out again from whole tables."""
    model, given = (
        load("llama", n_layers=2),
        [prompt(token_ids=one.token_ids, counterfactual=None) for one in others(5)],
    )
    circuit = traced(model, skip_first=True)
    found = always_on(model, circuit, others(5), share=0.0, threshold=0.02, exact_below=0.999)
    estimate = tracer.attribute(model, given)
    exact = tracer.attribute(model, given, "exact", "mean").nodes[:, :, 1:].abs()
    largest, place = estimate.nodes[:, :, 1:].abs().max(2)
    assert found
    for one in found[:5]:
        size = largest[:, one.layer, one.neuron]
        strong = size >= 0.02 * estimate.metric.abs().clamp_min(abs(circuit.metric))
        effect = exact[torch.arange(5), one.layer, place[:, one.layer, one.neuron], one.neuron]
        assert one.share == pytest.approx(float(strong.double().mean()))
        assert one.attribution == pytest.approx(float(size[strong].mean()), rel=1e-4)
        assert one.exact == pytest.approx(float(effect[strong].mean()), rel=1e-3, abs=1e-5)


def test_mean_ablation_shows_what_zero_baseline_hides() -> None:
    """The constant neuron is strong by the estimate and nothing by mean ablation: the correlation falls."""
    model = with_constant()
    circuit = traced(model)
    own = estimate_quality(model, circuit, n_each=40)
    mean = estimate_quality(model, circuit, n_each=40, ablation="mean", reference=others(8))
    assert own.whole.agreement is not None
    assert mean.whole.agreement is not None
    assert float(mean.whole.agreement.pearson.estimate) < float(own.whole.agreement.pearson.estimate) - 0.1


def test_wrong_input_is_refused() -> None:
    model = load("llama", n_layers=2)
    circuit, plain = traced(model), tracer.trace(model, prompt(counterfactual=None), nodes=5, edges=False)
    mean = traced(model, baseline="mean", reference=others())
    cases: list[tuple[Circuit, dict[str, Any], str]] = [
        (circuit, {"ablation": "resample"}, "ablation='resample'"),
        (circuit, {"ablation": "mean"}, "give reference="),
        (circuit, {"reference": others()}, "no effect"),
        (circuit, {"n_each": 2}, "n_each=2"),
        (circuit, {"memory": 0}, "memory=0"),
        (circuit, {"prompt": prompt(target=9)}, "is not what the circuit"),
        (circuit, {"prompt": prompt(counterfactual=IDS)}, "another counterfactual"),
        (plain, {"ablation": "counterfactual"}, "no counterfactual"),
        (plain, {"ablation": "counterfactual", "prompt": prompt(counterfactual=IDS)}, "the prompt itself"),
        (mean, {}, "give reference="),
        (mean, {"ablation": "zero"}, "the circuit: a mean needs prompts"),
        (mean, {"reference": others(5)}, "not what the circuit was traced with"),
    ]
    for one, how, part in cases:
        with refused(JobError, part):
            estimate_quality(model, one, **how)  # type: ignore[arg-type]
    with refused(JobError, "another model"):
        estimate_quality(load("gpt2", n_layers=2), circuit)
    paired = estimate_quality(model, plain, prompt(), ablation="counterfactual", n_each=10)
    assert paired.ablation == "counterfactual"


def test_wrong_unrelated_prompts_are_refused() -> None:
    model = load("llama", n_layers=2)
    circuit, given = traced(model), others()
    cases: list[tuple[list[Prompt], dict[str, Any], str]] = [
        (given[:1], {}, "1 unrelated prompts"),
        ([*given, prompt()], {}, "is the circuit's own"),
        ([*given, given[0]], {}, "is given twice"),
        ([Prompt(token_ids=(1, 5)), Prompt(token_ids=(1, 5, 6))], {}, "do not differ"),
        (given, {"share": 1.0}, "share=1.0"),
        (given, {"threshold": 0.0}, "threshold=0.0"),
        (given, {"exact_below": -0.5}, "exact_below=-0.5"),
    ]
    for prompts, how, part in cases:
        with refused(JobError, part):
            always_on(model, circuit, prompts, **how)
    with refused(JobError, "another model"):
        always_on(load("gpt2", n_layers=2), circuit, given)
