"""The arithmetic of a result, and the checks that refuse a wrong one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from helpers import refused
from tracer.attribution.result import CONSERVATION_TOLERANCE, Attribution, check_conservation, noise
from tracer.errors import ModelError
from tracer.settings import settings


def result(embeddings: list[list[float]], metric: list[float]) -> Attribution:
    n_prompts, width = len(metric), len(embeddings[0])
    return Attribution(
        nodes=torch.ones(n_prompts, 2, width, 4),
        activations=torch.ones(n_prompts, 2, width, 4),
        embeddings=torch.tensor(embeddings),
        metric=torch.tensor(metric),
        token_ids=tuple((1,) * (width - row % 2) for row in range(n_prompts)),
        target_ids=((5,),) * n_prompts,
        foil_ids=((),) * n_prompts,
        settings=settings(metric="logit"),
    )


def test_residual_is_the_metric_minus_all_embeddings() -> None:
    got = result([[1.0, 2.0, -4.0], [0.5, 0.25, 0.0]], [-1.0, 1.75])
    assert got.unexplained.tolist() == [0.0, 1.0]
    assert got.relative_unexplained().tolist() == [0.0, pytest.approx(1.0 / 0.75)]
    assert got.lengths == (3, 2)


@pytest.mark.parametrize("name", ["nodes", "activations", "embeddings", "metric"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_refused_by_prompt(name: str, bad: float) -> None:
    good = result([[1.0, 2.0, -4.0], [0.5, 0.25, 0.0]], [-1.0, 0.75])
    good.check_finite()
    tensor: Tensor = getattr(good, name).clone()
    tensor[1].view(-1)[-1] = bad
    with refused(ModelError, "prompt 1", "not finite", "float32"):
        replace(good, **{name: tensor}).check_finite()


def check_conserved(one: Attribution) -> None:
    check_conservation(one.metric, one.embeddings)


def test_conservation_is_refused_above_its_tolerance_only() -> None:
    edge = CONSERVATION_TOLERANCE * 2.0
    check_conserved(result([[1.0, -1.0]], [0.9 * edge]))
    check_conserved(result([[1.0, -1.0]], [-0.9 * edge]))
    for metric in (1.1 * edge, -1.1 * edge):
        with refused(ModelError, "prompt 0", "conservation", "tracer doctor"):
            check_conserved(result([[1.0, -1.0]], [metric]))


def test_conservation_names_the_worst_prompt() -> None:
    with refused(ModelError, "prompt 2", "off by 2"):
        check_conserved(result([[1.0, 1.0]] * 3, [2.0, 2.5, 4.0]))


def test_conservation_is_refused_where_nothing_reaches_the_embeddings() -> None:
    with refused(ModelError, "prompt 0", "conservation"):
        check_conserved(result([[0.0, 0.0]], [1.0]))


def test_noise_depends_on_prompt_and_seed_alone() -> None:
    one = noise((1, 2, 3), (2, 3, 4), 0)
    assert torch.equal(one, noise([1, 2, 3], (2, 3, 4), 0))
    assert not torch.equal(one, noise((1, 2, 4), (2, 3, 4), 0))
    assert not torch.equal(one, noise((1, 2, 3), (2, 3, 4), 1))
    state = torch.get_rng_state()
    noise((1, 2, 3), (2, 3, 4), 0)
    assert torch.equal(torch.get_rng_state(), state)
