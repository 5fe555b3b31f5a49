"""Evaluating a circuit on a server: the local numbers, and neither masks nor values nor logits on the wire."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import tracer
from helpers import error, fresh, load, refused
from loopback import LIMITS, Loopback
from tracer.attribution.attribute import mean_values
from tracer.circuit.circuit import Circuit
from tracer.data.tasks import capitals, sva
from tracer.data.tasks.pairs import Pair
from tracer.errors import JobError, RemoteError
from tracer.evaluation import ablations, faithfulness, on_server
from tracer.evaluation.ablations import Replacement
from tracer.evaluation.curves import curves, ordered, shuffled
from tracer.evaluation.faithfulness import minimality
from tracer.evaluation.quality import always_on, estimate_quality
from tracer.evaluation.swap import swap
from tracer.evaluation.testset import ABLATIONS, Job, TestSet
from tracer.ndif import server as ndif
from tracer.prompts import Batch, Prompt, encode
from tracer.settings import settings
from truth import close

PARTS = ("whole", "empty", "inside", "outside", "control")
NAMES = ("demo", "gpt2")


@functools.cache
def questions(name: str, count: int = 8) -> list[Prompt]:
    """Of one length, each with its counterfactual."""
    if name == "demo":
        return [pair.to_prompt() for pair in sva.generate("simple", "test", count)]
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 90, (count, 2, 5), generator=draw).tolist()
    return [Prompt(token_ids=one, target=7, foil=8, counterfactual=other) for one, other in ids]


def circuit_of(model: tracer.Model, name: str, baseline: str = "zero", **how: Any) -> Circuit:
    return tracer.trace(model, questions(name)[0], nodes=20, edges=False, baseline=baseline, **how)


def measured(model: tracer.Model, circuit: Circuit, name: str, ablation: str, aligned: bool) -> Tensor:
    """What an evaluation and a minimality measure, without their ratios: a random model's may have no interval."""
    tests = questions(name, 4)
    how = faithfulness.How(aligned=aligned, memory=model.budget())
    test, _ = faithfulness.test_set(model, circuit, tests, ablation, how)
    ranks = faithfulness._ranks(model, circuit, len(test.prompts[0].token_ids), aligned)
    jobs = test.ends(ranks)
    for ranking in (ranks, shuffled(ranks, 0)):
        jobs += [Job(row, ranking, size, stays) for row in range(4) for size in (3, 15) for stays in (True, False)]
    return test.measure([*jobs, *(Job(row, ranks, 15, True, 2) for row in range(4))])


def known(model: tracer.Model, ablation: str) -> TestSet:
    """The test prompts of all rankings, their ends measured."""
    prompts = [encode(one, model) for one in questions("demo")]
    test = TestSet.of(model, prompts, ablation, settings(), 0).with_known_ends()
    assert test.known is not None
    return test


def traffic(model: tracer.Model, work: Callable[[], Any]) -> ndif.Traffic:
    """Requests and bytes of some work."""
    assert model.remote is not None
    traffic = model.remote.server.traffic
    before = replace(traffic)
    work()
    return replace(
        traffic,
        requests=traffic.requests - before.requests,
        sent=traffic.sent - before.sent,
        received=traffic.received - before.received,
    )


# ------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("basis", ["activation", "output"])
@pytest.mark.parametrize("name", NAMES)
def test_every_ablation_measures_what_it_does_here(server: Loopback, name: str, basis: str, aligned: bool) -> None:
    there, here = server.pair(name)
    circuit = circuit_of(here, name, basis=basis)
    for ablation in ABLATIONS:
        got, wanted = (measured(model, circuit, name, ablation, aligned) for model in (there, here))
        assert close(got, wanted), ablation
        assert len(set(wanted.tolist())) > 20, ablation


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_an_evaluation_is_the_local_one(server: Loopback, ablation: str) -> None:
    there, here = server.pair("demo")
    circuit = circuit_of(here, "demo")
    got, wanted = (tracer.evaluate(model, circuit, questions("demo"), ablation) for model in (there, here))
    for part in PARTS:
        assert close(getattr(got, part), getattr(wanted, part)), part
    assert got.sizes == wanted.sizes
    changes = [minimality(model, circuit, questions("demo"), ablation) for model in (there, here)]
    assert float((changes[0] - changes[1]).abs().max()) < 1e-6  # of a faithfulness, which is about 1


def test_rankings_of_all_nodes_are_measured_as_here(server: Loopback) -> None:
    there, here = server.pair("demo")
    ranks = ordered(tracer.attribute(here, questions("demo")).nodes.mean(0), "absolute")
    found = []
    for model in (there, here):
        test = known(model, "mean")
        found.append((test, curves(test, ranks, [10, 100], 0)))
    (there_test, got), (here_test, wanted) = found
    for mine, other in zip(there_test.known or (), here_test.known or (), strict=True):
        assert close(mine, other)
    for part in ("faithfulness", "completeness", "control_faithfulness"):
        estimates = [getattr(one, part).estimate for one in (got, wanted)]
        assert error(*estimates) < 1e-5, part
    jobs = [Job(row, ranks, 9, True, without) for without in (-1, 0, 8) for row in range(8)]
    assert close(there_test.measure(jobs), here_test.measure(jobs))


@pytest.mark.parametrize("name", NAMES)
def test_exact_effects_of_single_nodes_are_the_local_ones(server: Loopback, name: str) -> None:
    there, here = server.pair(name)
    circuit, prompt = circuit_of(here, name), questions(name)[0]
    others = [Prompt(token_ids=one) for one in ((5, 6, 7, 8, 9, 10, 11), (12, 13, 14), (15, 16, 17, 18, 19, 20))]
    logits = torch.tensor([abs(row["activation"]) for row in circuit.rows("logit")]).max()
    for ablation in ("zero", "mean", "counterfactual"):
        reference = others if ablation == "mean" else None
        got, wanted = (
            estimate_quality(model, circuit, prompt, n_each=20, ablation=ablation, reference=reference).sample
            for model in (there, here)
        )
        assert torch.equal(got.neuron, wanted.neuron)
        assert close(got.exact, wanted.exact, of=logits), ablation
    with refused(JobError, "at most 2 tokens"):
        estimate_quality(there, circuit, prompt, ablation="mean", reference=[Prompt(token_ids=(5, 6))])


def test_always_on_neurons_are_the_local_ones(server: Loopback) -> None:
    there, here = server.pair("demo")
    circuit = circuit_of(here, "demo")
    others = [*questions("demo")[1:], Prompt("The key near the cabinet", target=" is", foil=" are")]
    how: dict[str, Any] = {"share": 0.0, "threshold": 0.01, "exact_below": 0.999}
    found: list[list[Any]] = []
    work = traffic(there, lambda: found.append(always_on(there, circuit, others, **how)))
    got, wanted = found[0], always_on(here, circuit, others, **how)
    assert [(one.layer, one.neuron) for one in got] == [(one.layer, one.neuron) for one in wanted] != []
    for one, other in zip(got, wanted, strict=True):
        assert one.exact == pytest.approx(other.exact, rel=1e-4, abs=1e-5)
    assert work.requests == 2


@pytest.mark.parametrize("sandboxed", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_swapped_states_are_the_local_ones(server: Loopback, name: str, sandboxed: bool) -> None:
    _, here = server.pair(name)
    server.mode(**({"sandboxed": True} if sandboxed else {}))
    there = server.load(name, attention="eager", weights="local" if sandboxed else None)
    if name == "demo":
        pairs = capitals.pairs("test", 6, vocabulary=here)
    else:  # of two lengths, so that the batch is padded
        texts = [("the car near", "the key near"), ("the capital of state near car", "the cabinet of state near man")]
        pairs = [Pair(str(i), one, two, " is", " are", "") for i, (one, two) in enumerate(texts)]
    found: list[Any] = []
    asked = [pair.to_prompt() for pair in pairs]
    work = traffic(there, lambda: found.append(swap(there, asked, (2, 5, 20), seed=3)))
    got, wanted = found[0], swap(here, asked, (2, 5, 20), seed=3)
    for arm in ("swapped", "random", "zeroed"):
        assert torch.equal(getattr(got, arm).answers, getattr(wanted, arm).answers), arm
    assert torch.equal(got.n_nodes, wanted.n_nodes)
    assert torch.equal(got.answered.estimate, wanted.answered.estimate)
    assert work.requests == 4
    if not sandboxed:
        assert work.received < 20_000


@pytest.mark.parametrize("keep", ["correct", "preferred"])
def test_a_filter_keeps_what_it_keeps_here(server: Loopback, keep: str) -> None:
    there, here = server.pair("demo")
    pairs = capitals.pairs("test", 6, vocabulary=here)
    exchanged = [replace(pair, target=pair.foil, foil=pair.target) for pair in pairs[:3]]
    prompts = [pair.to_prompt() for pair in (*exchanged, *pairs[3:])]
    wanted = tracer.filter_prompts(here, prompts, keep)
    assert 0 < len(wanted.kept) < len(prompts)
    assert tracer.filter_prompts(there, prompts, keep) == wanted


# ------------------------------------------------------------------------------------------- what travels


def test_an_evaluation_is_one_small_request(server: Loopback) -> None:
    there, here = server.pair("demo")
    circuit, tests = circuit_of(here, "demo"), questions("demo")
    dense = 4 * here.n_layers * here.d_mlp * len(circuit.token_ids) * len(tests)
    for ablation in ABLATIONS:
        work = traffic(there, lambda ablation=ablation: tracer.evaluate(there, circuit, tests, ablation))
        assert work.requests == 1
        assert work.received < 4_000 < dense // 20  # a number for each row
        assert work.sent < 25_000 < dense // 4
    work = traffic(there, lambda: minimality(there, circuit, tests))
    assert (work.requests, work.received < 4_000, work.sent < 25_000) == (1, True, True)


def test_what_is_sent_grows_with_the_circuit_and_not_with_the_model(server: Loopback) -> None:
    there, here = server.pair("demo")
    sent = {}
    for basis in ("activation", "output"):  # four times as many nodes, and a few
        for nodes in (20, 100):
            circuit = tracer.trace(here, questions("demo")[0], nodes=nodes, edges=False, basis=basis, baseline="zero")
            work = traffic(
                there, lambda one=circuit, n=nodes: tracer.evaluate(there, one, questions("demo"), "mean", [n // 2, n])
            )
            sent[basis, nodes] = work.sent
    assert here.d_mlp >= 2 * here.d_model
    assert abs(sent["activation", 20] - sent["output", 20]) < 500
    assert 0 < sent["activation", 100] - sent["activation", 20] < 2 * 2 * 12 * 80


def test_the_wires_precision_does_not_touch_an_evaluation(server: Loopback) -> None:
    _, here = server.pair("demo")
    there = server.load("demo", wire="bfloat16", attention="eager")
    circuit = circuit_of(here, "demo")
    got, wanted = (measured(model, circuit, "demo", "mean", True) for model in (there, here))
    assert close(got, wanted)


# ------------------------------------------------------------------------------------------- sandboxes, small servers


def test_a_sandboxed_key_is_enough(server: Loopback) -> None:
    """Without the weights, and so without a circuit of the same fingerprint; and with them."""
    _, here = server.pair("demo")
    server.mode(sandboxed=True)
    there = server.load("demo", attention="eager")
    for ablation in ABLATIONS:
        got, wanted = (known(model, ablation).known for model in (there, here))
        for mine, other in zip(got or (), wanted or (), strict=True):
            assert close(mine, other), ablation
    both = server.load("demo", attention="eager", weights="local")
    circuit = circuit_of(here, "demo")
    for ablation in ABLATIONS:
        assert close(*(measured(model, circuit, "demo", ablation, True) for model in (both, here))), ablation


@pytest.mark.slow
@pytest.mark.long
def test_a_small_server_takes_halves(server: Loopback) -> None:
    there, here = server.pair("demo")
    circuit = circuit_of(here, "demo")
    for rows, ablation in ((7, "resample"), (1, "mean")):
        server.mode(oom_rows=rows)
        wanted = measured(here, circuit, "demo", ablation, True)
        found: list[Tensor] = []
        work = traffic(there, lambda one=ablation, to=found: to.append(measured(there, circuit, "demo", one, True)))
        assert close(found[0], wanted)
        assert work.requests > 2
    server.mode(oom_rows=3)
    exact = [
        estimate_quality(model, circuit, n_each=8, ablation="mean", reference=questions("demo")).sample.exact
        for model in (there, here)
    ]
    assert float((exact[0] - exact[1]).abs().max()) < 1e-5  # of logits of about 10
    server.mode(oom=1000)
    with refused(RemoteError, "ran out of memory"):
        measured(there, circuit, "demo", "mean", True)


def test_requests_stay_under_their_bound_and_several_are_in_flight(server: Loopback) -> None:
    _, here = server.pair("demo")
    there = server.load("demo", replace(LIMITS, in_flight=3), attention="eager")
    circuit, tests = circuit_of(here, "demo"), questions("demo")
    small = here.bytes_per_token(gradient=False, length=6) * 6 * 2  # two rows a forward, a few forwards a request
    server.mode(queued=0.05)
    got, wanted = (tracer.evaluate(model, circuit, tests, "mean", memory=small) for model in (there, here))
    for part in PARTS:
        assert close(getattr(got, part), getattr(wanted, part)), part
    assert 1 < server.seen()["most_open"] <= 3
    server.mode()
    large = tracer.trace(
        here, tests[0], nodes=1000, edges=False, baseline="zero"
    )  # its sets outweigh the source that travels with them
    wanted, whole = tracer.evaluate(here, large, tests, "mean"), []
    sent = traffic(there, lambda: whole.append(tracer.evaluate(there, large, tests, "mean"))).sent
    assert close(whole[0].inside, wanted.inside)
    assert isinstance(there.backend, ndif.Remote)
    narrow = ndif.Server(server.host, replace(LIMITS, request=sent * 19 // 20))
    bound = replace(there, backend=replace(there.backend, server=narrow))  # loading it would send a larger circuit
    server.mode()
    assert close(tracer.evaluate(bound, large, tests, "mean").inside, wanted.inside)
    assert 0 < server.seen()["largest"] <= sent * 19 // 20


# ------------------------------------------------------------------------------------------- the parts


def test_a_mean_over_prompts_is_the_one_worked_out_here() -> None:
    """Of different lengths, in several forwards, up to fewer positions than the longest has."""
    model = load("gemma2")
    ids = [(1, 2, 3, 4, 5), (6, 7), (8, 9, 10), (11, 12, 13, 14)]
    behind = [
        (batch.inputs("cpu"), [len(one) for one in batch.token_ids])
        for batch in (Batch(tuple(ids[:3])), Batch(tuple(ids[3:])))
    ]
    for basis in ("activation", "output"):
        ask = SimpleNamespace(others=behind, mean=True, longest=4, basis=basis, n_neurons=model.n_neurons(basis))
        (got,) = on_server.replacements(model.nn, model.plan, ask)
        assert close(got, mean_values(model, ids, 4, basis))


def test_requests_hold_enough_rows_for_their_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a large one at most doubles the work, however small a forward is."""
    model, sizes = fresh("gpt2"), []
    rows = [ablations.AblatedRow(encode(questions("gpt2")[0], model), ablations.EMPTY, (0, 0, 0))] * 320

    def request(_: Any, groups: list[Any], to: Replacement, *rest: Any) -> list[Tensor]:
        sizes.append((len(groups), [len(group) for group in groups], rest[-1]))
        return [torch.ones(len(group)) for group in groups]

    monkeypatch.setattr(ablations, "_request", request)
    two = 2 * 5 * model.bytes_per_token(gradient=False, length=5)
    to = Replacement(tuple((1, 2, 3, 4, 5 + i) for i in range(40)), mean=True)
    assert len(ablations.measured(model, rows, to, settings(metric="logit"), "activation", two)) == 320
    assert sizes == [(20, [2] * 20, 2)] * 8
