"""Remote equals local; what a server does wrong is one line, never a wrong number; a key is written nowhere.

The server is another process (ndif_server.py), in which nothing can be imported that a real one does not have.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import logging
import pickle
import signal
import time
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from typer.testing import CliRunner

import tiny as t
import tracer
from helpers import direct_logits, error, refused
from inline import InlinePool
from loopback import FAMILIES, LIMITS, Loopback, prompts, start, stop
from tracer import demo
from tracer.attribution import backward, request
from tracer.attribution.among import links_among
from tracer.attribution.attribute import prepared
from tracer.attribution.edges import direct_edges
from tracer.attribution.selection import Selection
from tracer.attribution.trace import trace_all
from tracer.cli.app import app
from tracer.errors import JobError, ModelError, RemoteError, RunError
from tracer.model import passes
from tracer.ndif import payload
from tracer.ndif import probe as remote
from tracer.ndif import server as ndif
from tracer.prompts import Batch
from tracer.runs.jobs import load_job
from tracer.runs.status import condition
from tracer.settings import settings
from truth import close, same_text, tolerance

KEY = "0badc0de-5ec2-4e70-8a11-5ec2e7a11cee"
FAILING = {"refused": {"keys": ["another-key"]}, "oom": {"keys": [KEY], "oom": 99}, "busy": {"keys": [KEY], "busy": 99}}
SHORT = {"ig": {"steps": 2}, "conductance": {"steps": 2}, "ig-activation": {"steps": 2}}
METHODS = ("relp", "grad", "ig", "conductance", "ig-activation", "exact", "delta", "random")


# --------------------------------------------------------------------------------------- remote equals local


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["demo", *FAMILIES])
def test_attributions_are_the_local_ones(server: Loopback, name: str, method: str) -> None:
    there, here = server.pair(name)
    asked = prompts(name)
    if method == "exact":
        asked = [tracer.Prompt(token_ids=[1, 44], target=7, foil=8)]
    how: dict[str, Any] = SHORT.get(method, {})
    if method in ("grad", "ig", "delta"):
        how = how | {"baseline": "counterfactual"}
    got, wanted = (tracer.attribute(model, asked, method, **how) for model in (there, here))
    logits = direct_logits(here, [[1, 44]])  # what exact takes differences of
    for part in ("nodes", "activations", "embeddings", "metric"):
        assert close(getattr(got, part), getattr(wanted, part), of=logits if method == "exact" else None), part
    assert got.token_ids == wanted.token_ids


@pytest.mark.parametrize("metric", ["logprob", "centred", "topk"])
def test_metrics_bases_and_baselines_are_the_local_ones(server: Loopback, metric: str) -> None:
    there, here = server.pair("gemma2")
    asked = [
        tracer.Prompt(token_ids=one.token_ids, target=None if metric == "topk" else 7) for one in prompts("gemma2")
    ]
    how: dict[str, Any] = {"metric": metric, "basis": "output", "baseline": "mean"}
    got, wanted = (tracer.attribute(model, asked, **how) for model in (there, here))
    assert close(got.nodes, wanted.nodes)
    assert got.target_ids == wanted.target_ids


@pytest.mark.parametrize("name", ["demo", *FAMILIES])
def test_edges_are_the_local_ones(server: Loopback, name: str) -> None:
    there, here = server.pair(name)
    prompt = prompts(name)[0]
    got, wanted = (tracer.trace(model, prompt, nodes=30) for model in (there, here))
    assert got.model == wanted.model
    assert got.neurons.select(["layer", "position", "neuron"]) == wanted.neurons.select(["layer", "position", "neuron"])
    nodes = torch.tensor([[row["layer"], row["position"], row["neuron"]] for row in wanted.rows("neuron")])
    logits = torch.tensor([[len(wanted.token_ids) - 1, 7]])
    one, other, replayed = (
        direct_edges(model, wanted.token_ids, nodes, logits, engine=engine)
        for model, engine in ((there, "auto"), (here, "autograd"), (here, "replay"))
    )
    for part in ("weight", "incoming", "source_values", "target_values"):
        assert close(getattr(one, part), getattr(other, part)), part
        assert error(getattr(one, part), getattr(replayed, part)) < 1e-5


def weights_of(circuit: tracer.Circuit) -> dict[tuple[int, int], float]:
    assert circuit.links is not None
    return {(row["source"], row["target"]): row["weight"] for row in circuit.links.to_pylist()}


def assert_same_circuit(got: tracer.Circuit, wanted: tracer.Circuit) -> None:
    """Everything but what rounding decides: an edge at the border of the pruning."""
    for column in ("kind", "layer", "position", "neuron", "token"):
        assert got.nodes[column] == wanted.nodes[column], column
    for column in ("activation", "attribution"):
        one, other = (
            torch.tensor([value or 0.0 for value in circuit.nodes[column].to_pylist()]) for circuit in (got, wanted)
        )
        assert close(one, other), column
    one, other = weights_of(got), weights_of(wanted)
    assert len(one.keys() ^ other.keys()) <= 0.001 * len(other)
    both = one.keys() & other.keys()  # to the rounding of the replay, which is what edges come from here
    assert error(torch.tensor([one[key] for key in both]), torch.tensor([other[key] for key in both])) < 1e-5
    for name in ("metric", "kept_mass", "start_metric"):
        assert (getattr(got, name) or 0.0) == pytest.approx(getattr(wanted, name) or 0.0, rel=tolerance()), name
    assert abs(got.unexplained - wanted.unexplained) < 1e-5 * abs(wanted.metric)
    assert got.probabilities == pytest.approx(wanted.probabilities, rel=1e-5)
    for name in ("n_total", "n_selected", "settings", "selection", "target_ids", "foil_ids", "conserves", "model"):
        assert getattr(got, name) == getattr(wanted, name), name
    assert [one.token_id for one in got.predictions] == [one.token_id for one in wanted.predictions]


@pytest.mark.parametrize("method", [method for method in METHODS if method != "exact"])
@pytest.mark.parametrize("name", ["demo", *FAMILIES])
def test_a_batch_of_circuits_is_one_request(server: Loopback, name: str, method: str) -> None:
    there, here = server.pair(name)
    assert there.remote is not None
    traffic = there.remote.server.traffic
    for baseline in ("zero",) if method == "random" else ("zero", "counterfactual"):
        how = {"method": method, "baseline": baseline, "nodes": 25, "pruning": tracer.Pruning(share=0.0)}
        how |= SHORT.get(method, {})
        before = traffic.requests
        got = list(trace_all(there, prompts(name), **how))
        assert traffic.requests == before + 1
        for one, other in zip(got, trace_all(here, prompts(name), **how), strict=True):
            assert_same_circuit(one, other)


@pytest.mark.parametrize("name", ["demo", *FAMILIES])
@pytest.mark.parametrize("basis", ["activation", "output"])
def test_edges_of_a_batch_are_those_of_each_prompt(server: Loopback, name: str, basis: str) -> None:
    """Found in one backward for all prompts, beside each other; few at a time where there is little room."""
    there, here = server.pair(name)
    chosen, encoded = prepared(there, prompts(name), settings(metric="difference", basis=basis))
    batch = request.ask(there, encoded, request.Request(chosen, Selection.of(15), edges=True), None)
    assert len({len(one.encoded.token_ids) for one in batch}) == 2
    for found in batch:
        assert found.edges is not None
        at = torch.tensor([(place, token) for place, token, _ in found.terms])
        wanted = direct_edges(here, found.encoded.token_ids, found.nodes, at, basis=basis, engine="autograd")
        for part in ("weight", "incoming", "source_values", "target_values"):
            assert close(getattr(found.edges, part), getattr(wanted, part)), part


@pytest.mark.parametrize(
    "rules",
    [
        {"threshold": 0.02, "skip_first": True},
        {"mass": 0.4, "exclude": [(1, 5)]},
        {"nodes": 12, "basis": "output", "metric": "difference"},
        {"nodes": 12, "rules": ["norm", "attention"]},
        {"nodes": 12, "rules": "linear-gate"},
    ],
)
def test_nodes_are_selected_there_by_the_same_rules(server: Loopback, rules: dict[str, Any]) -> None:
    there, here = server.pair("gemma2")
    both = [
        list(trace_all(model, prompts("gemma2"), pruning=tracer.Pruning(share=0.0), **rules)) for model in (there, here)
    ]
    for got, wanted in zip(*both, strict=True):
        assert_same_circuit(got, wanted)


def test_only_what_a_circuit_says_comes_back(server: Loopback) -> None:
    """Whatever the width of the model: what all neurons' values and gradients would weigh is many times as much."""
    there, here = server.pair("demo")
    assert there.remote is not None
    traffic, asked = there.remote.server.traffic, prompts("demo")[0]
    circuit = tracer.trace(there, asked, nodes=200, edges=False)
    before = traffic.received
    tracer.trace(there, asked, nodes=20, edges=False)
    few = traffic.received - before
    tracer.trace(there, asked, nodes=20)
    linked = traffic.received - before - few
    assert few < 0.1 * 2 * 4 * circuit.n_total
    assert linked < few + 4 * 22 * 26 + 2000
    assert here.n_layers * here.d_mlp * len(circuit.token_ids) == circuit.n_total


def test_a_prompt_without_target_asks_for_the_top_token_alone(server: Loopback) -> None:
    there, here = server.pair("demo")
    assert there.remote is not None
    traffic = there.remote.server.traffic
    before = traffic.requests, traffic.received
    got, wanted = (tracer.trace(model, tracer.Prompt("The parents"), nodes=5) for model in (there, here))
    assert got.target_ids == wanted.target_ids
    assert traffic.requests == before[0] + 1
    assert traffic.received - before[1] < 10_000


def test_a_selection_that_keeps_nothing_is_refused_as_locally(server: Loopback) -> None:
    there, here = server.pair("demo")
    said = []
    for model in (there, here):
        with pytest.raises(JobError) as caught:
            tracer.trace(model, prompts("demo")[0], threshold=1e6)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert "no node is kept" in said[0]
    with refused(JobError, "the model has layers"):
        tracer.trace(there, prompts("demo")[0], exclude=[(99, 0)])


def test_evaluation_is_the_local_one(server: Loopback) -> None:
    there, here = server.pair("demo")
    from tracer.data.tasks import sva

    tests = [pair.to_prompt() for pair in sva.generate("simple", "test", 3)]
    circuit = tracer.trace(here, tests[0], nodes=20, edges=False)
    got, wanted = (tracer.evaluate(model, circuit, tests, "mean", [5, 20]) for model in (there, here))
    for part in ("whole", "empty", "inside", "outside", "control"):
        assert close(getattr(got, part), getattr(wanted, part)), part


@pytest.mark.parametrize("name", ["demo", "gpt2"])
def test_steering_is_the_local_one(server: Loopback, name: str) -> None:
    there, here = server.pair(name)
    prompt = prompts(name)[0]
    for how in ({"factor": -1.0, "everywhere": True}, {"set_to": 0.5}):
        nodes = [(0, 1, 3), (1, 2, 5), (1, 2, 6)]
        got, wanted = (
            tracer.steer(model, nodes, prompt, max_new_tokens=4, random=2, **how)  # type: ignore[arg-type]
            for model in (there, here)
        )
        assert got.steered == wanted.steered
        assert got.unsteered == wanted.unsteered
        for one, other in zip(got.effects, wanted.effects, strict=True):
            assert one.token_id == other.token_id
            assert abs(one.logit.after - other.logit.after) < 1e-5


def test_many_prompts_are_several_requests_at_a_time(server: Loopback) -> None:
    _, here = server.pair("demo")
    there = server.load("demo", ndif.Limits(wait=30.0, patience=5.0, busy=5.0, in_flight=3), attention="eager")
    asked = prompts("demo") * 4
    small = here.bytes_per_token(length=6) * 7
    server.mode(queued=0.05)
    got, wanted = (tracer.attribute(model, asked, memory=small) for model in (there, here))
    assert close(got.nodes, wanted.nodes)
    assert 1 < server.seen()["most_open"] <= 3


def test_bfloat16_on_the_wire_halves_what_comes_back(server: Loopback) -> None:
    _, here = server.pair("demo")
    received = []
    for kind in ("float32", "bfloat16"):
        there = server.load("demo", wire=kind, attention="eager")
        assert there.remote is not None
        before = there.remote.server.traffic.received
        got, wanted = (tracer.attribute(model, prompts("demo") * 4) for model in (there, here))
        received.append(there.remote.server.traffic.received - before)
        assert error(got.nodes, wanted.nodes) < (1e-6 if kind == "float32" else 0.02)
        assert close(got.embeddings, wanted.embeddings)
    assert received[1] < 0.6 * received[0]


def test_circuits_are_not_rounded_on_the_wire(server: Loopback) -> None:
    """They are little: what shortens all nodes' values must not change which nodes are strongest."""
    _, here = server.pair("demo")
    there = server.load("demo", wire="bfloat16", attention="eager")
    got, wanted = (tracer.trace(model, prompts("demo")[0], nodes=40) for model in (there, here))
    assert_same_circuit(got, wanted)


def test_what_a_server_sends_goes_where_the_weights_are(server: Loopback) -> None:
    """Of a client with a GPU, which is made up here: no more than where things are can be seen of it."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._pytree import tree_leaves

    server.mode(sandboxed=True)
    there = server.load("demo", attention="eager", weights="local")
    found = backward.constants(there, Batch(((1, 30, 45, 52),)))
    sent = {**vars(found), "blocks": [vars(block) for block in found.blocks]}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in there.module.modules():
            for name, value in list(module._parameters.items()):
                if value is not None:
                    made = torch.nn.Parameter(torch.empty(value.shape, device="cuda"), requires_grad=False)
                    module._parameters[name] = made
        placed = backward.beside_weights(there, sent)
    flat = [
        one for part in (placed, *placed.blocks) for one in tree_leaves(vars(part)) if isinstance(one, torch.Tensor)
    ]
    assert len(flat) > 4 * there.n_layers
    assert {one.device.type for one in flat} == {"cuda"}


def test_nnsights_own_client_is_served(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    import nnsight  # after beartype, which its .save on every object breaks
    from nnsight.intervention.backends import remote as wire

    there, here = server.pair("demo")
    assert isinstance(there.backend, ndif.Remote)
    monkeypatch.setattr("nnsight.ndif._PULLED_ENV", True)
    backend = wire.RemoteBackend(there.backend.deployment, host=server.host)
    nn = there.nn
    with nn.trace(**Batch(((1, 2),)).inputs("cpu"), backend=backend):
        out = nnsight.save(nn.output.logits)
    assert close(out, passes.logits(here, Batch(((1, 2),))))


def test_a_server_of_less_precision_is_known_as_such(server: Loopback) -> None:
    there = server.load("half", attention="eager")
    here = tracer.load(server.folders["half"], dtype="bfloat16", device="cpu", attention="eager")
    assert there.dtype == torch.bfloat16
    assert there.record().dtype == "bfloat16"
    assert not there.conserves
    assert there.fingerprint == here.fingerprint
    got, wanted = (tracer.attribute(model, prompts("half")) for model in (there, here))
    assert close(got.nodes, wanted.nodes, dtype=torch.bfloat16)
    both = server.load("half", attention="eager", weights="local")
    assert both.module.dtype == torch.bfloat16
    with refused(RemoteError, "the server runs", "bfloat16"):
        server.load("half", dtype="float32")


def test_a_model_without_weights_holds_none(server: Loopback) -> None:
    there, here = server.pair("demo")
    assert {value.device.type for value in there.module.parameters()} == {"meta"}
    assert there.fingerprint == here.fingerprint
    assert there.device == torch.device("cpu")
    assert there.conserves == here.conserves


def test_the_package_is_not_on_the_server(server: Loopback) -> None:
    there, _ = server.pair("demo")
    with refused(RemoteError, "No module named 'tracer'"):
        imports(there)


def imports(model: tracer.Model) -> None:
    nn = model.nn
    with nn.trace(**Batch(((1, 2),)).inputs("cpu"), backend=model.backend.trace()):
        import tracer as package

        _saved = nn.output.logits.save() if package else None


@pytest.mark.parametrize(
    "package", ["jaxtyping", "beartype", "hypothesis", "pytest", "matplotlib", "sklearn", "pyarrow"]
)
def test_what_we_use_besides_torch_is_not_on_the_server(server: Loopback, package: str) -> None:
    there, _ = server.pair("demo")
    assert not has(there, package)  # who only asks gets an answer, no error
    assert has(there, "transformers")
    with refused(RemoteError, f"No module named '{package}'"):
        needs(there, package)


def has(model: tracer.Model, package: str) -> bool:
    import nnsight

    nn, find = model.nn, importlib.util.find_spec
    with nn.trace(**Batch(((1, 2),)).inputs("cpu"), backend=model.backend.trace()):
        found = nnsight.save([find(package) is not None])
    return found[0]


def needs(model: tracer.Model, package: str) -> None:
    nn, get = model.nn, importlib.import_module
    with nn.trace(**Batch(((1, 2),)).inputs("cpu"), backend=model.backend.trace()):
        _saved = nn.output.logits.save() if get(package) else None


def test_a_session_is_served_and_its_forwards_need_memory_one_by_one(server: Loopback) -> None:
    there, here = server.pair("demo")
    batches = [Batch(((1, 2),)), Batch(((1, 2), (1, 44)))]
    server.mode(oom_rows=2)
    for got, batch in zip(in_a_session(there, batches), batches, strict=True):
        assert close(got[:, -1:], passes.logits(here, batch))
    server.mode(oom_rows=1)
    for work in (in_a_session, lambda model, asked: passes.generated(model, asked[1], [], max_new_tokens=1)):
        with refused(RemoteError, "ran out of memory"):
            work(there, batches)


def in_a_session(model: tracer.Model, batches: list[Batch]) -> list[torch.Tensor]:
    import nnsight

    nn, inputs = model.nn, [batch.inputs("cpu") for batch in batches]
    with nn.session(backend=model.backend.trace()):
        found = nnsight.save([])
        for given in inputs:
            with nn.trace(**given):
                found.append(nn.output.logits)
    return found


# --------------------------------------------------------------------------------------- a sandbox


def test_a_sandbox_is_detected_and_refused_by_permission(server: Loopback) -> None:
    server.mode(sandboxed=True)
    there = server.load("demo")
    assert isinstance(there.backend, ndif.Remote)
    assert not there.backend.gradients
    assert not there.backend.grants.weights
    assert "not readable" in there.fingerprint
    assert str(demo.path()) not in there.fingerprint
    for method in ("relp", "grad", "ig"):
        with refused(RemoteError, "needs gradients", "'trusted'"):
            tracer.attribute(there, prompts("demo"), method)
    with refused(RemoteError, "needs gradients"):
        direct_edges(there, (1, 44), torch.tensor([[0, 0, 1]]), torch.tensor([[1, 7]]))


def test_a_sandbox_that_hides_experts_weights_is_refused(server: Loopback) -> None:
    server.mode(sandboxed=True)
    for weights in (None, "local"):
        with refused(RemoteError, "neurons of experts", "not readable", "load it here"):
            server.load("qwen3_moe", weights=weights, attention="eager")


@pytest.mark.parametrize("name", ["demo", *(name for name in FAMILIES if name != "qwen3_moe")])
def test_a_sandbox_gives_the_same_numbers_where_the_weights_are_here(server: Loopback, name: str) -> None:
    _, here = server.pair(name)
    server.mode(sandboxed=True)
    there = server.load(name, weights="local", attention="eager")
    for basis in ("activation", "output"):
        got, wanted = (tracer.attribute(model, prompts(name), basis=basis) for model in (there, here))
        for part in ("nodes", "activations", "embeddings", "metric"):
            assert error(getattr(got, part), getattr(wanted, part)) < 2e-6, part
    one, other = (tracer.trace(model, prompts(name)[0], nodes=20) for model in (there, here))
    assert one.neurons.select(["layer", "position", "neuron"]) == other.neurons.select(["layer", "position", "neuron"])
    weights = [torch.tensor(list(weights_of(circuit).values())) for circuit in (one, other)]
    assert error(*weights) < 1e-5
    with refused(RemoteError, "needs gradients"):
        tracer.attribute(there, prompts(name), "grad")


def test_a_linear_gate_works_in_a_sandbox_where_the_weights_are_here(server: Loopback) -> None:
    _, here = server.pair("gemma2")
    server.mode(sandboxed=True)
    there = server.load("gemma2", weights="local", attention="eager")
    both = [tracer.attribute(model, prompts("gemma2"), rules="linear-gate") for model in (there, here)]
    for part in ("nodes", "activations", "embeddings", "metric"):
        assert error(*(getattr(one, part) for one in both)) < 2e-6, part
    circuits = [tracer.trace(model, prompts("gemma2")[0], nodes=20, rules="linear-gate") for model in (there, here)]
    weights = [torch.tensor(list(weights_of(circuit).values())) for circuit in circuits]
    assert error(*weights) < 1e-5
    half = tracer.trace(here, prompts("gemma2")[0], nodes=20)
    assert half.nodes.column("attribution").to_pylist() != circuits[1].nodes.column("attribution").to_pylist()
    with refused(RemoteError, "needs gradients"):
        tracer.attribute(there, prompts("gemma2"), rules="no-half")


@pytest.mark.parametrize("sandboxed", [False, True])
@pytest.mark.parametrize("nodes", [[(0, 1, 5), (1, 2, 7), (1, 2, 3)], [(1, -1, 7), (0, -1, 5)]])
def test_edges_among_given_nodes_are_the_local_ones(
    server: Loopback, nodes: list[tuple[int, int, int]], sandboxed: bool
) -> None:
    _, here = server.pair("demo")
    server.mode(sandboxed=sandboxed)
    keys: dict[str, Any] = {"weights": "local"} if sandboxed else {}
    there = server.load("demo", attention="eager", **keys)
    asked = prompts("demo")[:2]
    for got, wanted in zip(*(links_among(model, asked, nodes) for model in (there, here)), strict=True):
        assert torch.equal(got.prompt.nodes, wanted.prompt.nodes)
        for part in ("weight", "attribution", "incoming", "values", "gradients"):
            assert error(getattr(got, part), getattr(wanted, part)) < 1e-5, part


def test_forward_only_work_needs_no_permission(server: Loopback) -> None:
    _, here = server.pair("demo")
    server.mode(sandboxed=True)
    there = server.load("demo", attention="eager")
    got, wanted = (tracer.attribute(model, prompts("demo"), "delta") for model in (there, here))
    assert close(got.nodes, wanted.nodes)


@pytest.mark.parametrize("method", ["exact", "delta", "random"])
@pytest.mark.parametrize("name", ["demo", "gpt2"])
def test_every_forward_only_method_is_right_where_weights_are_hidden(server: Loopback, name: str, method: str) -> None:
    _, here = server.pair(name)
    server.mode(sandboxed=True)
    there = server.load(name, attention="eager")
    asked = [tracer.Prompt(token_ids=[1, 44], target=7, foil=8, counterfactual=[1, 30])]
    for basis in ("activation", "output") if method == "delta" else ("activation",):
        got, wanted = (tracer.attribute(model, asked, method, basis=basis) for model in (there, here))
        logits = direct_logits(here, [[1, 44]])  # what exact, and the metric, are differences of
        for part in ("nodes", "activations", "embeddings", "metric"):
            of = logits if method == "exact" or part == "metric" else None
            assert close(getattr(got, part), getattr(wanted, part), of=of), part
    assert server.seen()["garbage"] == 0


def test_a_circuit_of_here_is_used_in_a_sandbox_where_the_weights_are_here(server: Loopback) -> None:
    _, here = server.pair("demo")
    from tracer.data.tasks import sva

    tests = [pair.to_prompt() for pair in sva.generate("simple", "test", 3)]
    circuit = tracer.trace(here, tests[0], nodes=20, edges=False)
    server.mode(sandboxed=True)
    there = server.load("demo", weights="local", attention="eager")
    assert there.fingerprint == here.fingerprint == circuit.model.fingerprint
    got, wanted = (tracer.evaluate(model, circuit, tests, "mean", [5, 20]) for model in (there, here))
    for part in ("whole", "empty", "inside", "outside", "control"):
        assert close(getattr(got, part), getattr(wanted, part)), part
    got, wanted = (
        tracer.steer(model, circuit, tests[0], top=5, factor=-1.0, everywhere=True, max_new_tokens=2, random=1)
        for model in (there, here)
    )
    assert (got.steered, got.unsteered) == (wanted.steered, wanted.unsteered)
    # Without the weights here nothing says that those there are the circuit's.
    with refused(RemoteError, "are hidden and cannot be compared", "weights='local'"):
        tracer.steer(server.load("demo"), circuit, tests[0], top=5, factor=-1.0)


def multiplied(model: tracer.Model) -> torch.Tensor:
    """A product with hidden weights, which torch answers with memory's garbage."""
    from tracer.model import interventions

    nn, plan = model.nn, model.plan
    with nn.trace(**Batch(((1, 2),)).inputs("cpu"), backend=model.backend.trace()):
        out = nn.get(plan.head).input[0] @ nn.get(plan.head)._module.weight.T
        saved = interventions.to_cpu(out).save()  # type: ignore[attr-defined]  nnsight puts it on every object
    return saved[0]


def summed(model: tracer.Model) -> None:
    """Of hidden weights alone: what comes out is hidden too."""
    from tracer.model import interventions

    nn, plan = model.nn, model.plan
    with nn.trace(**Batch(((1, 2),)).inputs("cpu"), backend=model.backend.trace()):
        _saved = interventions.to_cpu(nn.get(plan.head)._module.weight.sum()).save()  # type: ignore[attr-defined]


def invoked(model: tracer.Model) -> None:
    nn, plan, inputs = model.nn, model.plan, Batch(((1, 2),)).inputs("cpu")
    with nn.trace(backend=model.backend.trace()) as block:  # noqa: SIM117  each body is a block of its own
        with block.invoke(inputs):
            made: Any = torch.nn.functional.linear(nn.get(plan.head).input[0], nn.get(plan.head)._module.weight)
            _saved = made.save()


def in_a_sessions_trace(model: tracer.Model) -> None:
    nn, plan, inputs = model.nn, model.plan, Batch(((1, 2),)).inputs("cpu")
    with nn.session(backend=model.backend.trace()):
        with nn.trace(**inputs):
            out = nn.get(plan.head).input[0] @ nn.get(plan.head)._module.weight.T
        _saved = out.save()


def test_a_hidden_weight_never_becomes_a_number(server: Loopback) -> None:
    server.mode(sandboxed=True)
    there = server.load("gpt2")
    for block in (multiplied, summed, invoked, in_a_sessions_trace):
        with refused(RemoteError, "hidden"):
            block(there)
    assert torch.isfinite(passes.logits(there, Batch(((1, 2),)))).all()  # nothing of the guard is left there


def test_without_the_guard_it_would(server: Loopback) -> None:
    server.mode(sandboxed=True)
    there = server.load("gpt2")
    guarded: Any = there.backend
    found = multiplied(replace(there, backend=replace(guarded, guard=None)))
    assert found.device.type == "cpu"
    assert server.seen()["garbage"] == 1


# --------------------------------------------------------------------------------------- what a server does wrong


def test_the_weights_must_be_the_clients(server: Loopback) -> None:
    with refused(RemoteError, "are not the ones here", "hash"):
        server.load("changed", weights="local")
    server.mode(sandboxed=True)
    with refused(RemoteError, "are not the ones here", "logits"):
        server.load("changed", weights="local")


def test_ignored_interventions_are_detected(server: Loopback) -> None:
    server.mode(ignore=True)
    with refused(RemoteError, "ignored an intervention"):
        server.load("demo")


def test_wrong_gradients_are_detected(server: Loopback) -> None:
    server.mode(scramble=True)
    with refused(RemoteError, "finite difference"):
        server.load("demo")


def test_wrong_numbers_of_a_later_request_are_detected(server: Loopback) -> None:
    there, _ = server.pair("demo")
    server.mode(scramble=True)
    with refused(ModelError, "conservation"):
        tracer.attribute(there, prompts("demo"))


@pytest.mark.parametrize("edges", [False, True])
def test_a_circuit_of_wrong_gradients_is_refused(server: Loopback, edges: bool) -> None:
    """By what relp conserves: edges are found without gradients, and are right."""
    there, _ = server.pair("demo")
    server.mode(scramble=True)
    with refused(ModelError, "conservation"):
        tracer.trace(there, prompts("demo")[0], nodes=5, edges=edges)


def test_a_refused_key(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    server.mode(keys=[KEY])
    with refused(RemoteError, "needs a key", "NDIF_API_KEY"):
        server.load("demo")
    for wrong in ("malformed", KEY[::-1]):
        monkeypatch.setenv("NDIF_API_KEY", wrong)
        with pytest.raises(RemoteError) as caught:
            server.load("demo")
        assert "refused the key" in str(caught.value)
        assert wrong not in str(caught.value)


@pytest.mark.parametrize("bad", ["\n", "\r\n", " ", "\x01", "\x7f", "é"])
def test_a_key_that_cannot_be_sent_is_refused_without_being_quoted(
    server: Loopback, monkeypatch: pytest.MonkeyPatch, bad: str
) -> None:
    monkeypatch.setenv("NDIF_API_KEY", f"abc{bad}{KEY}")
    with pytest.raises(RemoteError, match=r"NDIF_API_KEY.*no key has.*on one line") as caught:
        server.load("demo")
    assert KEY not in str(caught.value)
    monkeypatch.setenv("NDIF_API_KEY", f" {KEY}\n")  # around it, space is no part of it
    server.load("demo")


def test_what_a_request_cannot_hold_is_not_quoted(server: Loopback) -> None:
    """Should such a key get so far, the client's own error would quote it."""
    there = ndif.Server(server.host, LIMITS)
    there._http._service.headers = httpx.Headers([(b"x-other", f"abc\n{KEY}".encode())])
    with pytest.raises(RemoteError, match="LocalProtocolError") as caught:
        there.status()
    assert KEY not in str(caught.value)
    assert there.traffic.retries == 0


@pytest.mark.parametrize(
    "host", ["http://[bad", "http://127.0.0.1:99999", "http://127.0.0.1:abc", "localhost:80", "", "ftp://a", "http://"]
)
def test_a_host_that_is_none(host: str) -> None:
    with refused(RemoteError, "is not an http:// or https:// address", "NDIF_HOST"):
        ndif.Server(host)


@pytest.mark.parametrize(
    "limits", [{"in_flight": 0}, {"in_flight": -1}, {"attempts": 0}, {"wait": -1.0}, {"patience": float("nan")}]
)
def test_limits_have_bounds(limits: dict[str, Any]) -> None:
    with refused(RemoteError, next(iter(limits)), "must be"):
        ndif.Limits(**limits)


def test_a_server_that_asks_for_time_is_given_it(server: Loopback) -> None:
    """Too many requests are not the end of a server: there is more patience, and as long a pause as it asks for."""
    there = server.load("demo", ndif.Limits(wait=30.0, patience=0.1, busy=30.0))
    assert there.remote is not None
    server.mode(limited=3, retry_after=1)
    started = time.monotonic()
    passes.logits(there, Batch(((1, 2),)))
    assert there.remote.server.traffic.retries == 3
    assert time.monotonic() - started >= 3.0


def test_a_server_that_hangs_is_told_of_and_left(tmp_path: Path) -> None:
    alone = start({"demo": str(demo.path())}, tmp_path)
    said: list[str] = []
    try:
        there = alone.load("demo", ndif.Limits(wait=30.0, patience=3.0), report=said.append)
        alone.process.send_signal(signal.SIGSTOP)
        with refused(RemoteError, "did not answer in time"):
            passes.logits(there, Batch(((1, 2),)))
    finally:
        alone.process.send_signal(signal.SIGCONT)
        stop(alone)
    assert any("did not answer in time" in line and "again in" in line for line in said)


def test_a_model_that_is_not_deployed(server: Loopback) -> None:
    here = str(Path(server.folders["gpt2"]).parent / "other")
    with refused(RemoteError, "is not deployed", "demo"):
        server.load(here)


@pytest.mark.parametrize(("package", "version"), [("nnsight", "0.7.1"), ("transformers", "4.57.0")])
def test_other_versions(server: Loopback, package: str, version: str) -> None:
    server.mode(versions={package: version})
    with refused(RemoteError, package, version, "pip install"):
        server.load("demo")


def test_a_busy_server_is_asked_again(server: Loopback) -> None:
    _, here = server.pair("demo")
    said: list[str] = []
    patient = server.load("demo", report=said.append, attention="eager")
    for how in ({"busy": 2}, {"limited": 2}, {"cut": 2}, {"cut_result": 1}, {"lose": 1}):
        server.mode(**how)
        assert close(passes.logits(patient, Batch(((1, 2),))), passes.logits(here, Batch(((1, 2),)))), how
    assert any("busy" in line for line in said)
    assert any("cannot be reached" in line for line in said)
    assert any("submitting" in line for line in said)


def test_a_queue_is_reported_and_ends_at_the_limit(server: Loopback) -> None:
    said: list[str] = []
    there = server.load("demo", ndif.Limits(wait=0.8, patience=5.0, busy=5.0, quiet=0.0), report=said.append)
    server.mode(queued=2.0)
    with refused(RemoteError, "not done after", "queued"):
        passes.logits(there, Batch(((1, 2),)))
    assert any("1st in the queue" in line for line in said)
    server.mode(slow=2.0)
    with refused(RemoteError, "not done after"):
        passes.logits(there, Batch(((1, 2),)))
    time.sleep(1.5)  # the server works them off


def test_a_server_that_stays_busy(server: Loopback) -> None:
    there = server.load("demo", ndif.Limits(wait=30.0, patience=0.5, busy=0.5))
    server.mode(busy=1000)
    started = time.monotonic()
    with refused(RemoteError, "busy or failing: 503"):
        passes.logits(there, Batch(((1, 2),)))
    assert time.monotonic() - started < 10


def test_a_job_that_is_lost_again_and_again(server: Loopback) -> None:
    there = server.load("demo", ndif.Limits(wait=30.0, patience=1.0, busy=1.0, lost=0.1, attempts=2))
    server.mode(lose=1000)
    with refused(RemoteError, "gave up after 2 submissions", "lost"):
        passes.logits(there, Batch(((1, 2),)))


def test_out_of_memory_halves_the_batch(server: Loopback) -> None:
    there, here = server.pair("demo")
    asked = prompts("demo") * 2
    server.mode(oom_rows=1)
    got, wanted = (tracer.attribute(model, asked) for model in (there, here))
    assert close(got.nodes, wanted.nodes)
    assert server.seen()["requests"] > len(asked)  # refused ones, and then one of each row
    server.mode(oom=1000)
    with refused(RemoteError, "ran out of memory", "fewer or shorter prompts"):
        tracer.attribute(there, asked)


def test_out_of_memory_halves_a_session(server: Loopback) -> None:
    there, here = server.pair("demo")
    asked = prompts("demo") * 2
    server.mode(oom_rows=2)
    for got, wanted in zip(*(trace_all(model, asked, nodes=9) for model in (there, here)), strict=True):
        assert close(*(torch.tensor(one.neurons["attribution"].to_pylist()) for one in (got, wanted)))
    assert server.seen()["requests"] == 3  # one that is refused, and its halves
    server.mode(oom=1000)
    with refused(RemoteError, "ran out of memory", "fewer or shorter prompts"):
        tracer.trace(there, asked[0])


def test_requests_and_results_have_bounds(server: Loopback) -> None:
    """A request that is too large is asked for in halves."""
    there, here = server.pair("gpt2")
    ids = torch.randint(4, 100, (120, 8), generator=torch.Generator().manual_seed(0)).tolist()
    asked = [tracer.Prompt(token_ids=one, target=3) for one in ids]
    server.mode()
    tracer.trace(there, asked[0], 3)
    most = server.seen()["largest"] + 500
    limits = ndif.Limits(wait=30.0, patience=5.0, busy=5.0, request=most)
    fewer = server.load("gpt2", limits, attention="eager")
    server.mode()
    got, wanted = (list(trace_all(model, asked, nodes=3, memory=2**30)) for model in (fewer, here))
    for one, other in zip(got, wanted, strict=True):
        assert one.metric == pytest.approx(other.metric, rel=1e-5, abs=1e-5)  # other batch sizes than here
    assert fewer.remote is not None
    assert server.seen()["largest"] <= most
    assert fewer.remote.server.traffic.requests > 4  # the probe's are fewer
    small = server.load("demo", ndif.Limits(wait=30.0, patience=5.0, busy=5.0, result=190_000))
    with refused(RemoteError, "a result of", "is more than"):
        tracer.attribute(small, [tracer.Prompt(token_ids=list(range(10, 26)), target=7)])
    tiny = server.load("demo", ndif.Limits(wait=30.0, patience=5.0, busy=5.0, request=30_000))
    with refused(RemoteError, "a request of", "are sent at a time"):
        wide = torch.randn(1, 60, tiny.d_model)
        passes.values(tiny, Batch((tuple(range(10, 70)),)), embedding=wide)


def test_a_result_that_is_code_is_not_run(server: Loopback) -> None:
    there, _ = server.pair("demo")
    server.mode(evil=True)
    with refused(RemoteError, "cannot be read", "it holds posix mkdir"):
        passes.logits(there, Batch(((1, 2),)))
    assert not Path("/tmp/tracer-was-here").exists()


def test_no_server_and_no_ndif_server(server: Loopback) -> None:
    started = time.monotonic()
    with refused(RemoteError, "cannot be reached", "NDIF_HOST"):
        tracer.load("demo", remote=True, host="http://127.0.0.1:9", limits=LIMITS)
    assert time.monotonic() - started < 10
    server.mode(broken="<html>hello</html>")
    with refused(RemoteError, "not come from an NDIF server"):
        server.load("demo")
    server.mode(broken="[]")
    with refused(RemoteError, "not come from an NDIF server"):
        server.load("demo")
    with refused(RemoteError, "is not an http"):
        tracer.load("demo", remote=True, host="ndif.us")


def test_options_without_effect_are_refused(server: Loopback) -> None:
    with refused(ModelError, "weights", "no effect"):
        tracer.load("demo", weights="local")
    with refused(ModelError, "device", "no effect"):
        server.load("demo", device="cpu")
    with refused(ModelError, "must be 'local'"):
        server.load("demo", weights="yes")
    with refused(RemoteError, "the server runs", "float32"):
        server.load("demo", dtype="bfloat16")
    with refused(ModelError, "is in memory"):
        tracer.load(t.tiny("llama"), remote=True)


def test_a_server_that_dies_in_a_request(tmp_path: Path) -> None:
    alone = start({"demo": str(demo.path())}, tmp_path)
    try:
        there = alone.load("demo", ndif.Limits(wait=30.0, patience=1.0, busy=1.0))
        arrived = tracer.attribute(there, prompts("demo"))
        alone.mode(die=True)
        started = time.monotonic()
        with refused(RemoteError, "cannot be reached"):
            tracer.attribute(there, prompts("demo") * 3, memory=1)
        assert time.monotonic() - started < 15
        assert arrived.metric.isfinite().all()
    finally:
        stop(alone)


# --------------------------------------------------------------------------------------- keys, payload, commands


def test_a_key_is_written_nowhere(
    server: Loopback,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("NDIF_API_KEY", KEY)
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.DEBUG)
    server.mode(keys=[KEY])
    said: list[str] = []
    there = server.load("demo", report=said.append)
    result = CliRunner().invoke(app, ["trace", "The parents", "--target", " are", "--remote", "--out", "run"])
    assert result.exit_code == 0, result.output
    texts = [result.output, repr(there), repr(there.remote), repr(vars(there.remote.server)), *said]  # type: ignore[union-attr]
    for why in FAILING:  # no key among this function's own variables
        server.mode(**FAILING.get(why, {}))
        with pytest.raises(RemoteError) as caught:
            tracer.attribute(server.load("demo", ndif.Limits(wait=5.0, patience=0.3, busy=0.3)), prompts("demo"))
        lines = traceback.TracebackException.from_exception(caught.value, capture_locals=True).format()
        texts += ["".join(lines), repr(caught.value), repr(vars(caught.value))]
    server.mode(keys=["another-key"])
    texts.append(CliRunner().invoke(app, ["trace", "The parents", "--remote"]).output)
    texts += [record.getMessage() for record in caplog.records] + list(capfd.readouterr())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    for text in texts:
        at = text.find(KEY)
        assert at < 0, text[max(0, at - 600) : at + 100]
    assert not any(KEY.encode() in path.read_bytes() for path in files)
    with pytest.raises(TypeError):
        pickle.dumps(there.remote)


def test_a_key_does_not_travel_in_a_block(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    import zstandard

    monkeypatch.setenv("NDIF_API_KEY", KEY)
    sent: list[bytes] = []
    serialized = payload.serialized
    monkeypatch.setattr(payload, "serialized", lambda *block: sent.append(serialized(*block)) or sent[-1])
    tracer.attribute(server.load("demo"), prompts("demo"))
    plain = [zstandard.ZstdDecompressor().stream_reader(io.BytesIO(one)).read() for one in sent]
    assert plain
    assert not any(KEY.encode() in one for one in plain)
    # No bytecode either: source runs on a server of another Python.
    assert not any(word in one for one in plain for word in (b"_make_function", b"CodeType"))


def test_the_probe_says_what_a_request_weighs(server: Loopback) -> None:
    model, probe = remote.connect(remote.skeleton("demo"), ndif.Server(server.host))
    assert 1000 < probe.request < 10**6
    assert probe.there["nnsight"] == probe.here["nnsight"]
    assert "demo" in probe.deployed
    assert abs(probe.derivative / probe.difference - 1) < 0.02
    assert model.record().name == "demo"


def test_doctor_remote(server: Loopback) -> None:
    result = CliRunner().invoke(app, ["doctor", "--remote", "demo"])
    assert result.exit_code == 0, result.output
    assert "FAILED" not in result.stdout
    assert "a request without tensors" in result.stdout
    server.mode(sandboxed=True)
    result = CliRunner().invoke(app, ["doctor", "--remote"])
    assert result.exit_code == 1
    assert result.stdout.count("FAILED") == 2


def test_commands_run_remotely(server: Loopback) -> None:
    command = ["trace", "The secretaries near the car", "--target", " are", "--foil", " is", "--nodes", "20"]
    # On a server tokens would be a request of their own, and are not asked for by default.
    got, wanted = (CliRunner().invoke(app, [*command, *more]) for more in (["--remote"], ["--no-tokens"]))
    assert got.exit_code == 0, got.output
    assert same_text(got.stdout, wanted.stdout)
    steering = ["steer", "The parents", "--target", " are", "--top", "5", "--factor", "-1", "--max-new-tokens", "3"]
    got, wanted = (CliRunner().invoke(app, [*steering, *more]) for more in (["--remote"], []))
    assert got.exit_code == 0, got.output
    assert same_text(got.stdout, wanted.stdout)


@pytest.mark.slow
def test_evaluate_runs_remotely(server: Loopback, tmp_path: Path) -> None:
    command = ["trace", "The secretaries near the car", "--target", " are", "--foil", " is", "--nodes", "20"]
    assert CliRunner().invoke(app, [*command, "--out", str(tmp_path / "run")]).exit_code == 0
    checking = ["evaluate", str(tmp_path / "run"), "--structure", "nounpp", "--count", "2", "--sizes", "5,20"]
    got, wanted = (CliRunner().invoke(app, [*checking, *more]) for more in (["--remote"], []))
    assert got.exit_code == 0, got.output
    assert same_text(got.stdout, wanted.stdout)


def test_commands_refuse_in_one_line(server: Loopback) -> None:
    server.mode(busy=0, versions={"nnsight": "0.9.0"})
    result = CliRunner().invoke(app, ["trace", "The parents", "--remote"])
    assert result.exit_code == 2
    assert "nnsight" in result.stderr
    assert result.stderr.count("\n") == 1
    assert CliRunner().invoke(app, ["trace", "The parents", "--weights", "local"]).exit_code == 2


# ---------------------------------------------------------------------------------------- runs over many prompts


def job(**changes: Any) -> dict[str, Any]:
    source = {"task": "sva", "structure": "simple", "count": 8}
    made = {"kind": "dataset", "input": source, "shard_size": 2, "nodes": 20, "pruning": {"share": 0.05}}
    return made | {"baseline": "counterfactual"} | changes


def test_a_run_through_a_server_equals_the_local_one_and_goes_on(
    server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NDIF_API_KEY", KEY)
    monkeypatch.setattr(ndif, "Limits", partial(ndif.Limits, wait=30.0, patience=1.0, busy=1.0, lost=0.6))
    here = tracer.run(job(), tmp_path / "here", pool=InlinePool())

    # The server refuses everything from some moment on: what was committed stays, and the run says what is wrong.
    server.mode(locked_after=5)  # the probe's three, and those of two shards
    with refused(RemoteError, "refused the key", "NDIF_API_KEY"):
        tracer.run(job(remote=True), tmp_path / "there", pool=InlinePool())
    done = len(list((tmp_path / "there" / "_commits").iterdir()))
    assert 0 < done < 4
    server.mode()
    there = tracer.run(job(remote=True), tmp_path / "there", pool=InlinePool())
    assert (there.resumed, there.status.statuses) == (done, {"ok": 8})
    for name, number in (("nodes", "attribution"), ("edges", "weight")):
        got, wanted = (one.table(name).to_pandas() for one in (there, here))
        keys = [column for column in ("prompt_id", "node_id", "source", "target") if column in wanted]
        got, wanted = (one.sort_values(keys).reset_index(drop=True) for one in (got, wanted))
        assert (got[keys] == wanted[keys]).to_numpy().all()
        assert close(torch.tensor(got[number].to_numpy()), torch.tensor(wanted[number].to_numpy()))
    content = b"".join(path.read_bytes() for path in (tmp_path / "there").rglob("*") if path.is_file())
    assert KEY.encode() not in content


def test_what_fails_on_the_server_for_one_prompt_is_that_prompts_failure(server: Loopback, tmp_path: Path) -> None:
    with refused(RunError, "all 8 prompts", "8 prompts, such as: threshold=", "no node is kept"):
        tracer.run(job(remote=True, nodes=None, threshold=1e9), tmp_path / "run", pool=InlinePool())
    assert condition(tmp_path / "run").status.statuses == {"failed": 8}


@pytest.mark.parametrize(
    "changes", [{"host": "http://x"}, {"weights": "local"}, {"wire": "bfloat16"}, {"in_flight": 2}]
)
def test_settings_of_remote_models_need_one(changes: dict[str, Any]) -> None:
    with refused(JobError, "remote: true"):
        load_job(job(**changes))
