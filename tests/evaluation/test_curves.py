"""Curves of one ranking: areas, rankings, position-free rankings, and which test prompts are refused."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import pytest
import torch

import tracer
from helpers import refused
from tracer.attribution import attribute
from tracer.data import tasks
from tracer.errors import JobError
from tracer.evaluation import statistics
from tracer.evaluation.curves import Curves, curves, ordered
from tracer.evaluation.statistics import Size
from tracer.evaluation.testset import NEVER, Fit, Job, TestSet
from tracer.prompts import Encoded, Prompt, encode
from tracer.settings import settings
from truth import tolerance


@functools.cache
def demo() -> tracer.Model:
    return tracer.load("demo")


def pairs(split: str = "test", count: int = 5, structure: str = "nounpp") -> list[Prompt]:
    return [one.to_prompt() for one in tasks.load("sva", structure=structure, split=split, count=count)]


def encoded(prompts: list[Prompt]) -> list[Encoded]:
    return [encode(one, demo()) for one in prompts]


@functools.cache
def bench() -> TestSet:
    return TestSet.of(demo(), encoded(pairs()), "mean", settings(), 0).with_known_ends()


def ends(test: TestSet) -> tuple[torch.Tensor, torch.Tensor]:
    """The metric of the full model and of the empty one."""
    assert test.known is not None
    return test.known


@functools.cache
def mean() -> torch.Tensor:
    found = tracer.attribute(demo(), pairs("train", 8), baseline="counterfactual")
    return found.nodes.double().mean(0).float()


@functools.cache
def aligned() -> Curves:
    return curves(bench(), ordered(mean(), "absolute"), [10, 100], 0)


@functools.cache
def free_ranks() -> torch.Tensor:
    return ordered(mean().sum(1, keepdim=True), "absolute").expand_as(mean())


def test_a_ranking_is_of_places() -> None:
    given = torch.tensor([[[0.5, -2.0, 0.0]], [[2.0, 0.5, -0.1]]])
    assert ordered(given, "absolute").flatten().tolist() == [2, 0, 5, 1, 3, 4]
    assert ordered(given, "signed").flatten().tolist() == [1, 5, 3, 0, 2, 4]


def test_areas_are_over_mibs_sizes() -> None:
    for found, total in ((aligned(), mean().numel()), (free(), free_ranks()[:, 0].numel())):
        areas = sorted({max(1, round(share * total)) for share in statistics.MIB_SIZES})
        value = torch.tensor([found.faithfulness.estimate[found.sizes.index(size)] for size in areas]).double()
        at = torch.tensor(areas).double() / total
        assert found.cpr.estimate == pytest.approx(float(torch.trapezoid(value, at)), abs=1e-6)
        assert found.cmd.estimate == pytest.approx(float(torch.trapezoid((1 - value).abs(), at)), abs=1e-6)
        assert found.sizes[-1] == total
        ends = (found.faithfulness.estimate[-1], found.completeness.estimate[-1])
        assert ends == pytest.approx((1.0, 0.0), abs=tolerance())  # measured in other batches than the whole


@functools.cache
def free() -> Curves:
    return curves(bench(), free_ranks(), [7, 70, 10**9], 0)


def test_sizes_are_those_asked_for_and_mibs() -> None:
    total = mean().numel()
    assert set(aligned().sizes) == {10, 100} | {max(1, round(share * total)) for share in statistics.MIB_SIZES}
    assert list(aligned().sizes) == sorted(aligned().sizes)


def test_a_position_free_circuit_is_its_neurons_at_every_position() -> None:
    """Against the test set's own measurement of masks made by hand."""
    ranks, found = free_ranks(), free()
    first = set(ranks[:, 0].flatten().argsort()[:7].tolist())
    n_layers, length, n_neurons = ranks.shape
    mask = torch.tensor([place in first for place in range(n_layers * n_neurons)]).view(n_layers, 1, n_neurons)
    by_hand = torch.where(mask.expand(-1, length, -1), 0, 9).int()
    full, empty = ends(bench())
    rows = range(len(full))
    span = (full - empty).double().mean()
    for stays, curve, start in ((True, found.faithfulness, empty), (False, found.completeness, empty)):
        measured = bench().measure([Job(row, by_hand, 5, stays) for row in rows])
        value = (measured - start).double().mean() / span
        assert curve.estimate[found.sizes.index(7)] == pytest.approx(float(value), abs=1e-5)
    assert found.n_neurons == found.sizes  # a node of such a circuit is a neuron


def test_the_control_of_a_position_free_circuit_is_position_free(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = TestSet.measure

    def measure(self: Any, jobs: Any, progress: Any = None) -> torch.Tensor:
        seen.extend(jobs)
        return real(self, jobs, progress)

    monkeypatch.setattr(TestSet, "measure", measure)
    curves(bench(), free_ranks(), [7], 3)
    control = seen[-1][1]
    assert torch.equal(control, control[:, :1].expand_as(control))
    assert not torch.equal(control, free_ranks())
    for size in (1, 7, 70):
        assert torch.equal((control < size).sum((1, 2)), (free_ranks() < size).sum((1, 2)))


def test_seeds_decide_control_and_intervals_alone() -> None:
    again = curves(bench(), ordered(mean(), "absolute"), [10, 100], 0)
    other = curves(bench(), ordered(mean(), "absolute"), [10, 100], 1)
    assert again.record() == aligned().record()
    assert torch.equal(other.faithfulness.estimate, aligned().faithfulness.estimate)
    assert not torch.equal(other.control_faithfulness.estimate, aligned().control_faithfulness.estimate)


def test_a_record_from_before_there_was_settles_is_read() -> None:
    found = aligned()
    record = json.loads(json.dumps(found.record()))
    assert Curves.of(record).settles == found.settles
    sizes, values = found.sizes, found.faithfulness.estimate.tolist()
    wanted = next(size for i, size in enumerate(sizes) if all(0.9 <= value <= 1.1 for value in values[i:]))
    assert found.settles.estimate == wanted
    del record["settles"]
    old = Curves.of(record)
    assert old.settles == Size(None, None, wanted)
    assert dataclasses.replace(old, settles=found.settles).record() == found.record()


def test_a_bench_with_little_memory_measures_the_same() -> None:
    small = TestSet.of(demo(), encoded(pairs()), "mean", settings(), 0, memory=1).with_known_ends()
    assert torch.allclose(ends(small)[0], ends(bench())[0], atol=1e-5)
    found = curves(small, ordered(mean(), "absolute"), [10], 0)
    at = [aligned().sizes.index(size) for size in found.sizes]
    assert torch.allclose(found.faithfulness.estimate, aligned().faithfulness.estimate[at], rtol=0, atol=1e-4)


def test_a_reference_is_what_nodes_are_ablated_to() -> None:
    others = pairs("train", 4)
    found = TestSet.of(demo(), encoded(pairs()), "mean", settings(), 0, others).with_known_ends()
    wanted = attribute.mean_values(demo(), [one.token_ids for one in encoded(others)], 6, "activation")
    assert found.to.values is not None
    assert torch.allclose(found.to.values[0], wanted)
    assert not torch.allclose(ends(found)[1], ends(bench())[1])


def test_the_metric_is_settled_by_the_prompts() -> None:
    plain = [Prompt(one.text, target=one.target, counterfactual=one.counterfactual) for one in pairs()]
    assert bench().metric.metric == "difference"
    assert TestSet.of(demo(), encoded(plain), "mean", settings(), 0).metric.metric == "logit"
    asked = TestSet.of(demo(), encoded(plain), "mean", settings(metric="logprob"), 0).with_known_ends()
    assert asked.metric.metric == "logprob"
    assert bool((ends(asked)[0] < 0).all())


def test_what_cannot_be_tested_is_refused() -> None:
    def made(prompts: list[Prompt], ablation: str = "mean", metric: str = "auto", **more: Any) -> TestSet:
        asked = settings(metric=metric)
        return TestSet.of(demo(), encoded(prompts), ablation, asked, 0, **more).with_known_ends()

    with refused(JobError, "at least 2"):
        made(pairs(count=1))
    with refused(JobError, "no target"):
        made([*pairs(), Prompt("The keys near the cabinet")])
    with refused(JobError, "tokens"):
        made([*pairs(), Prompt("The keys", target=" are", foil=" is")])
    with refused(JobError, "both a train and a test"):
        made(pairs(), fit=Fit(train=encoded(pairs())))
    with refused(JobError, "no effect"):
        made(pairs(), "zero", reference=pairs())
    with refused(JobError, "a foil has no effect"):
        made(pairs(), metric="logit")
    same = [Prompt(one.text, target=one.target, foil=one.foil, counterfactual=one.text) for one in pairs()]
    with refused(JobError, "F(model) - F(empty)"):
        made(same, "counterfactual")


def test_rankings_that_do_not_fit_are_refused() -> None:
    ranks = ordered(mean(), "absolute")
    with refused(JobError, "same length"):
        curves(bench(), ranks[:, :-1], [3], 0)
    with refused(JobError, "every place"):
        curves(bench(), ranks + 1, [3], 0)
    with refused(JobError, "every place"):
        curves(bench(), torch.where(ranks < 10, ranks, NEVER), [3], 0)
    with refused(JobError, "every place"):
        curves(bench(), torch.zeros_like(ranks), [3], 0)
