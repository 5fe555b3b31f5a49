"""What is said of a circuit where a user looks: how likely its target is, and what its numbers cannot say."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import tracer
from helpers import refused
from tracer import Circuit, JobError, Model, Prompt
from tracer.errors import surface
from tracer.prompts import encode
from tracer.reports import sheet

TEXT = "The secretaries near the car"


@pytest.fixture(scope="module")
def model() -> Model:
    return tracer.load()


def traced(model: Model, target: str | int, foil: str | int | None = None, **how: object) -> Circuit:
    return tracer.trace(model, Prompt(TEXT, target=target, foil=foil), edges=False, **how)  # type: ignore[arg-type]


@cache
def cancelling(model: Model) -> tuple[int, int]:
    """A target and a foil whose logits are nearly equal, though the tokens of the prompt tell them apart."""
    top = tracer.trace(model, Prompt(TEXT), metric="topk", top_k=12, edges=False).target_ids
    pairs = [(one, other) for one in top for other in top if one < other]
    found = tracer.attribute(model, [Prompt(TEXT, target=one, foil=other) for one, other in pairs])
    return pairs[int((found.metric.abs() / found.embeddings.abs().sum(-1)).argmin())]


def test_probabilities_and_ranks_are_those_of_plain_pytorch(model: Model) -> None:
    circuit = traced(model, " are", " near")
    ids = torch.tensor([encode(Prompt(TEXT), model).token_ids])
    logits = model.module(ids).logits[0, -1].double()
    wanted = [row["neuron"] for row in circuit.rows("logit")]
    assert circuit.ranks == tuple(sorted(logits.tolist(), reverse=True).index(float(logits[one])) + 1 for one in wanted)
    chances = logits.softmax(-1)[wanted]
    assert circuit.probabilities == pytest.approx(chances.tolist(), rel=1e-4)
    assert sheet.chances_text(circuit).startswith("p(␣are) = 0.570, number 1")


def test_a_target_that_the_model_does_not_say_is_warned_of(model: Model) -> None:
    with pytest.warns(tracer.TracerWarning, match="not of what the model says") as said:
        circuit = traced(model, " car")
    (one,) = said
    assert circuit.warnings == (str(one.message),)
    (rank,) = circuit.ranks
    assert f"is number {rank} of the model's next tokens (p = {circuit.probabilities[0]:.2g})" in circuit.warnings[0]


@pytest.mark.parametrize("foil", [None, " car"])
def test_a_likely_target_is_not_whatever_its_foil(model: Model, foil: str | None) -> None:
    assert traced(model, " are", foil).warnings == ()


def test_every_position_read_is_looked_at(model: Model) -> None:
    prompt = Prompt(TEXT, target=" are", positions=[1, -1])
    with pytest.warns(tracer.TracerWarning, match="at position 1"):
        tracer.trace(model, prompt, edges=False)


def test_a_top_k_metric_has_no_unlikely_target(model: Model) -> None:
    circuit = tracer.trace(model, Prompt(TEXT), metric="topk", top_k=20, edges=False)
    assert (circuit.warnings, max(circuit.ranks)) == ((), 20)


def test_more_nodes_than_there_are_is_said_in_the_words_of_the_surface(model: Model) -> None:
    prompt, rule = Prompt("The"), {"edges": False, "exclude": [(0, number) for number in range(3)]}
    with surface("shell"), pytest.warns(tracer.TracerWarning, match="^--nodes 99999 is more"):
        circuit = tracer.trace(model, prompt, 99999, **rule)
    (said,) = [text for text in circuit.warnings if "99999" in text]
    assert f"more than the {circuit.n_selected:,} nodes" in said
    assert circuit.n_selected < circuit.n_total
    assert traced(model, " are", nodes=5, mass=0.9999).warnings == ()


def test_shares_of_a_metric_near_0_are_left_out(model: Model) -> None:
    near = traced(model, *cancelling(model))
    assert near.cancels == (abs(near.metric) < 0.05 * sum(abs(row["attribution"]) for row in near.rows("embedding")))
    assert near.cancels
    assert {row[-1] for row in sheet.embeddings(near).rows} == {"-"}
    assert "shares of it are left out" in sheet.nature_text(near)
    plain = traced(model, " are", " is")
    assert not plain.cancels
    assert all(str(row[-1]).endswith("%") for row in sheet.embeddings(plain).rows)


def test_a_threshold_of_a_metric_near_0_is_warned_of(model: Model) -> None:
    with pytest.warns(tracer.TracerWarning, match=r"threshold=0.01 is a share of it"):
        traced(model, *cancelling(model), threshold=0.01)


@pytest.mark.parametrize("share", [5.0, 1.01, -0.1, float("nan")])
def test_a_share_that_is_a_percentage_is_refused(share: float) -> None:
    with refused(JobError, "from 0 to 1"):
        tracer.Pruning(share=share)
