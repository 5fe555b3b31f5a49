"""Circuits evaluated on their own prompt, and on pairs whatever their metric asks, against plain hooks."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import helpers
import tiny
import tracer
from helpers import hooked, refused
from tracer.circuit.circuit import Circuit
from tracer.errors import JobError, TracerWarning
from tracer.evaluation.curves import Evaluation
from tracer.evaluation.faithfulness import planned
from tracer.model.model import Model
from tracer.prompts import Prompt
from tracer.reports import document, tables

METRICS = ("logit", "logprob", "centred", "topk", "difference")
NOUNS = ("teachers", "parents", "managers")


def traced(model: Model, metric: str, paired: bool = False, **how: Any) -> Circuit:
    return tracer.trace(
        model,
        Prompt(
            "The keys near the cabinet",
            target=None if metric == "topk" else " are",
            foil=" is" if metric == "difference" else None,
            counterfactual="The key near the cabinet" if paired else None,
        ),
        metric=metric,
        edges=False,
        **dict[str, Any](nodes=20) | how,
    )


def pairs() -> list[Prompt]:
    return [
        Prompt(f"The {noun} near the cabinet", " are", " is", counterfactual=f"The {noun[:-1]} near the cabinet")
        for noun in NOUNS
    ]


def by_hand(metric: str, logits: Tensor, whole: Tensor, target: int, foil: int) -> float:
    """The metric of the last logits; `whole` are those of the untouched model, which decide what the top tokens are."""
    if metric == "topk":
        return float(logits[whole.topk(5).indices].sum())
    if metric == "logprob":
        return float(logits.log_softmax(-1)[target])
    value = logits[target] - (logits[foil] if metric == "difference" else 0)
    return float(value - (logits.mean() if metric == "centred" else 0))


def ratios(
    model: Model, circuit: Circuit, size: int, texts: list[str], values: Callable[[int], Tensor] | None = None
) -> tuple[float, float]:
    """Faithfulness and completeness with plain hooks; `values` [layer, pos, neuron] of a prompt, zero if None."""
    length = len(circuit.token_ids)
    keep = torch.zeros(model.n_layers, length, model.d_mlp, dtype=torch.bool)
    for row in circuit.neurons.to_pylist()[:size]:
        keep[row["layer"], row["position"], row["neuron"]] = True
    target, foil = (model.tokenizer.encode(text)[-1] for text in (" are", " is"))
    sums = dict[str, float](whole=0.0, empty=0.0, inside=0.0, outside=0.0)
    for number, text in enumerate(texts):
        ids = torch.tensor([model.tokenizer.encode(text)])
        to = torch.zeros(keep.shape) if values is None else values(number)

        def logits(stays: Tensor, ids: Tensor = ids, to: Tensor = to) -> Tensor:
            with hooked(model, lambda layer, value: torch.where(stays[layer], value, to[layer])):
                return model.module(input_ids=ids).logits[0, -1].float()

        whole = logits(torch.ones_like(keep))
        for name, stays in (("whole", torch.ones_like(keep)), ("empty", torch.zeros_like(keep)),
                            ("inside", keep), ("outside", ~keep)):  # fmt: skip
            sums[name] += by_hand(circuit.settings.metric, logits(stays), whole, target, foil)
    span = sums["whole"] - sums["empty"]
    return (sums["inside"] - sums["empty"]) / span, (sums["outside"] - sums["empty"]) / span


@pytest.mark.parametrize("metric", METRICS)
def test_on_the_own_prompt_every_metric_is_as_hooks_say(metric: str) -> None:
    model = tracer.load("demo")
    circuit = traced(model, metric)
    found = tracer.evaluate(model, circuit, sizes=[3, 20])
    assert (found.ablation, found.n_shared, len(found.whole)) == ("zero", 1, 1)
    assert float(found.whole) == pytest.approx(circuit.metric, abs=1e-4)
    for at, size in enumerate((3, 20)):
        faithful, complete = ratios(model, circuit, size, [circuit.text])
        assert float(found.faithfulness.estimate[at]) == pytest.approx(faithful, abs=1e-4)
        assert float(found.completeness.estimate[at]) == pytest.approx(complete, abs=1e-4)
    assert found.faithfulness.low.isnan().all()
    assert found.cpr.high.isnan()


@pytest.mark.parametrize("metric", METRICS)
def test_on_pairs_every_metric_is_as_hooks_say(metric: str) -> None:
    """Pairs always have a target and a foil; a sum of top logits is of each pair's own top tokens, fixed."""
    model = tracer.load("demo")
    circuit = traced(model, metric)
    found = tracer.evaluate(model, circuit, pairs(), "zero", [20])
    faithful, complete = ratios(model, circuit, 20, [str(pair.text) for pair in pairs()])
    assert float(found.faithfulness.estimate[0]) == pytest.approx(faithful, abs=1e-4)
    assert float(found.completeness.estimate[0]) == pytest.approx(complete, abs=1e-4)
    assert float(found.faithfulness.low[0]) <= faithful + 1e-6
    unused = {"topk": "targets and foils", "difference": None}.get(metric, "foils")
    assert any(f": {unused} of test prompts are not used" in said for said in found.warnings) == bool(unused)


@pytest.mark.parametrize("metric", ["topk", "logit"])
def test_minimality_of_circuits_without_a_foil(metric: str) -> None:
    model = tracer.load("demo")
    circuit = traced(model, metric, nodes=4)
    falls = tracer.minimality(model, circuit, pairs(), "zero")
    own = tracer.minimality(model, circuit)
    assert len(falls) == len(own) == 4
    fewer = circuit.model_copy(update={"nodes": circuit.nodes.slice(1)})
    for found, texts in ((falls, [str(pair.text) for pair in pairs()]), (own, [circuit.text])):
        whole, less = ratios(model, circuit, 4, texts)[0], ratios(model, fewer, 3, texts)[0]
        assert float(found[0]) == pytest.approx(whole - less, abs=1e-4)


def test_the_counterfactual_is_what_the_own_prompt_is_ablated_to_where_there_is_one() -> None:
    model = tracer.load("demo")
    circuit = traced(model, "difference", paired=True)
    found = tracer.evaluate(model, circuit, sizes=[20])
    wanted = tracer.evaluate(model, circuit, sizes=[20], ablation="counterfactual")
    assert found.ablation == "counterfactual"
    assert torch.equal(found.inside, wanted.inside)
    ids, seen = torch.tensor([list(circuit.counterfactual_ids or ())]), dict[int, Tensor]()
    with hooked(model, seen.setdefault):
        model.module(input_ids=ids)
    values = torch.stack([seen[layer][0] for layer in range(model.n_layers)])
    faithful, _ = ratios(model, circuit, 20, [circuit.text], lambda _: values)
    assert float(found.faithfulness.estimate[0]) == pytest.approx(faithful, abs=1e-4)
    reference = [Prompt("The key near the cabinet"), Prompt("The teacher near the cabinet")]
    mean = tracer.evaluate(model, circuit, sizes=[20], reference=reference)
    assert mean.ablation == "mean"
    assert not torch.equal(mean.inside, found.inside)


def test_what_the_own_prompt_shows_is_said() -> None:
    model = tracer.load("demo")
    circuit = traced(model, "logit")
    with pytest.warns(TracerWarning, match="what suffices there"), pytest.warns(TracerWarning, match="no interval"):
        found = tracer.evaluate(model, circuit)
    assert any("zero, as it has no counterfactual" in said for said in found.warnings)
    asked = tracer.evaluate(model, circuit, ablation="zero")
    assert not any("as it has no counterfactual" in said for said in asked.warnings)
    elsewhere = tracer.evaluate(
        model, circuit, [Prompt("The teachers near the cabinet", " are", positions=[3])], "zero"
    )
    assert any("other positions" in said for said in elsewhere.warnings)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_a_random_models_circuit_is_tested_on_its_own_prompt(family: str) -> None:
    model = helpers.load(family)
    circuit = tracer.trace(model, Prompt(token_ids=[1, 6, 7, 8, 9]), mass=1.0, edges=False)
    found = tracer.evaluate(model, circuit)
    assert float(found.faithfulness.estimate[-1]) == pytest.approx(1, abs=1e-4)
    assert float(found.completeness.estimate[-1]) == pytest.approx(0, abs=1e-4)
    free = tracer.evaluate(model, circuit, aligned=False)
    assert free.sizes[-1] == circuit.n_neurons


def test_one_size_has_a_curve_and_no_area() -> None:
    model = tracer.load("demo")
    found = tracer.evaluate(model, traced(model, "difference"), pairs(), "zero", [5])
    assert found.sizes == (5,)
    assert found.cpr.estimate.isnan()
    assert found.faithfulness.low[0] <= found.faithfulness.estimate[0] <= found.faithfulness.high[0]
    alone = tracer.evaluate(model, traced(model, "difference", nodes=1))
    assert alone.sizes == (1,)


def test_files_and_pages_of_one_prompt_have_no_interval() -> None:
    model = tracer.load("demo")
    circuit = traced(model, "logit")
    found = tracer.evaluate(model, circuit)
    content = json.loads(tables.evaluation_json(found))
    assert content["faithfulness"]["low"] == [None] * len(found.sizes)
    assert content["faithfulness"]["estimate"] == found.faithfulness.estimate.tolist()
    assert content["warnings"] == list(found.warnings)
    assert Evaluation.of(found.record()).record() == found.record()
    page = document.document(circuit, found)
    assert "Tested on one prompt" in page
    assert "the prompt that the circuit was found on" in page
    assert "what suffices there" in page
    assert "nan" not in page.lower().replace("financ", "").split("<style>")[0]
    assert "undefined" not in page


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"ablation": "counterfactual"}, "no counterfactual"),
        ({"ablation": "mean"}, "no reference"),
        ({"ablation": "resample"}, "no reference"),
        ({"ablation": "median"}, "must be one of"),
        ({"ablation": "zero", "has_reference": True}, "no effect"),
        ({"sizes": [21]}, "at most 20"),
        ({"sizes": [5, 5]}, "must rise"),
        ({"sizes": [0]}, "must rise"),
    ],
)
def test_what_cannot_be_planned_is_refused_without_a_model(how: dict[str, Any], expected: str) -> None:
    circuit = traced(tracer.load("demo"), "logit")
    with refused(JobError, expected):
        planned(circuit, **how, own=True)


def test_one_prompt_alone_is_no_reference_and_train_has_no_effect() -> None:
    model = tracer.load("demo")
    circuit = traced(model, "logit")
    with refused(JobError, "no reference"):
        tracer.evaluate(model, circuit, [Prompt("The teachers near the cabinet", " are")])
    with refused(JobError, "train", "no effect"):
        tracer.evaluate(model, circuit, train=pairs())
    with refused(JobError, "another model"):
        tracer.evaluate(tracer.load(tiny.tiny("llama"), tokenizer=tiny.tokenizer()), circuit)
