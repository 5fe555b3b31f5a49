"""What a key may do: halved where memory ends, refused before anything is computed, and with what works instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import tracer
from helpers import error, refused
from loopback import Loopback, prompts
from tracer.cli.app import app
from tracer.errors import JobError, RemoteError
from tracer.evaluation.quality import always_on
from tracer.ndif import server as ndif
from truth import close

PARENTS = tracer.Prompt("The parents", target=" are", foil=" is")
CHILDREN = tracer.Prompt("The children", target=" are", foil=" is")
NEEDING = ("relp", "grad", "ig", "conductance", "ig-activation")
USES: tuple[Callable[..., Any], ...] = (
    lambda model, circuit: tracer.steer(model, circuit, PARENTS, factor=-1.0, max_new_tokens=1),
    lambda model, circuit: tracer.evaluate(model, circuit, [CHILDREN, PARENTS], "zero", [1, 5]),
    tracer.estimate_quality,
    lambda model, circuit: always_on(model, circuit, [CHILDREN, *prompts("demo")[:1]]),
)


# --------------------------------------------------------------------------------------- exact, in parts


@pytest.mark.slow
@pytest.mark.long
def test_exact_is_halved_where_the_server_runs_out_of_memory(server: Loopback) -> None:
    there, here = server.pair("demo")
    told: list[tuple[int, int]] = []
    server.mode(oom_rows=50)
    got = tracer.trace(there, PARENTS, nodes=5, method="exact", progress=lambda *done: told.append(done))
    wanted = tracer.trace(here, PARENTS, nodes=5, method="exact")
    assert got.neurons.select(["layer", "position", "neuron"]) == wanted.neurons.select(["layer", "position", "neuron"])
    assert close(*(torch.tensor(one.nodes["attribution"].to_pylist()[:5]) for one in (got, wanted)))
    total = here.n_layers * here.n_neurons() * len(got.token_ids)
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1] == (total, total)


@pytest.mark.slow
@pytest.mark.long
def test_exact_halves_what_it_asks_of_embeddings(server: Loopback) -> None:
    there, here = server.pair("gpt2")
    asked = [tracer.Prompt(token_ids=[1, 44, 30], target=7, foil=8, counterfactual=[1, 30, 44])]
    server.mode(oom_rows=3)
    got, wanted = (tracer.attribute(one, asked, "exact", "counterfactual", "output") for one in (there, here))
    assert error(got.embeddings, wanted.embeddings) < 1e-5
    assert error(got.nodes, wanted.nodes) < 1e-5


def test_exact_has_several_requests_in_flight_and_sends_small_ones(server: Loopback) -> None:
    there = server.load("demo", ndif.Limits(wait=30.0, patience=5.0, in_flight=3), attention="eager")
    asked = [tracer.Prompt(token_ids=[1, *range(10, 29)], target=7)]
    one = there.bytes_per_token(gradient=False, length=20) * 20
    server.mode(queued=0.02)
    tracer.attribute(there, asked, "exact", basis="output", memory=514 * one)
    seen = server.seen()
    assert 1 < seen["most_open"] <= 3
    dense = 21 * 20 * there.d_model * 4
    assert seen["largest"] < dense / 2


# --------------------------------------------------------------------------------------- what needs gradients


@pytest.mark.parametrize("method", ["delta", "exact", "random"])
def test_edges_are_refused_before_anything_is_computed(server: Loopback, method: str) -> None:
    server.mode(sandboxed=True)
    there = server.load("demo")
    before = server.seen()["requests"]
    for edges in (None, True):
        with refused(RemoteError, "edges needs gradients", "edges=False", "weights='local'"):
            tracer.trace(there, PARENTS, nodes=5, method=method, edges=edges)
    assert server.seen()["requests"] == before
    if method != "exact":
        assert tracer.trace(there, PARENTS, nodes=5, method=method, edges=False).n_selected == 5


def test_methods_are_refused_before_anything_is_sent(server: Loopback) -> None:
    server.mode(sandboxed=True)
    hidden, local = (server.load("demo", weights=weights) for weights in (None, "local"))
    before = server.seen()["requests"]
    targetless = [tracer.Prompt("The parents"), tracer.Prompt("The key near")]  # its top token would be asked for
    for method in NEEDING:
        with refused(RemoteError, f"method {method} needs gradients", "weights='local'", "'trusted'"):
            tracer.attribute(hidden, targetless, method, "zero" if method == "conductance" else "mean")
        with refused(RemoteError, "needs gradients", "weights='local'"):
            tracer.trace(hidden, PARENTS, method=method, edges=False)
    ways: list[dict[str, Any]] = [{"method": "grad"}, {"rules": ["norm"]}, {"method": "ig", "edges": False}]
    for options in ways:
        with refused(RemoteError, "needs gradients", "only method relp with all its rules", "'trusted'"):
            tracer.trace(local, PARENTS, **options)
    assert server.seen()["requests"] == before
    assert tracer.trace(local, PARENTS, nodes=5).links is not None


def test_a_next_step_does_not_name_what_is_done_already(server: Loopback) -> None:
    server.mode(sandboxed=True)
    with pytest.raises(RemoteError) as caught:
        tracer.trace(server.load("demo", weights="local"), PARENTS, method="grad")
    assert "local" not in caught.value.next_step


def test_the_command_names_its_own_options(server: Loopback) -> None:
    server.mode(sandboxed=True)
    command = ["trace", "The parents", "--target", " are", "--remote", "--nodes", "5"]
    result = CliRunner().invoke(app, [*command, "--method", "delta"])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "--no-edges" in result.stderr
    assert "--weights local" in result.stderr
    local = ["--weights", "local"]
    for more in (["--method", "delta", "--no-edges"], ["--method", "delta", *local], local):
        result = CliRunner().invoke(app, [*command, *more])
        assert result.exit_code == 0, result.output


# --------------------------------------------------------------------------------------- whose circuit it is


def test_hidden_weights_are_no_other_model(server: Loopback) -> None:
    _, here = server.pair("demo")
    circuit = tracer.trace(here, PARENTS, nodes=5, method="delta", edges=False)
    server.mode(sandboxed=True)
    there = server.load("demo")
    before = server.seen()["requests"]
    for use in USES:
        with refused(RemoteError, "are hidden and cannot be compared", "weights='local'"):
            use(there, circuit)
    assert server.seen()["requests"] == before
    with refused(JobError, "was traced on another model"):
        USES[0](server.load("gpt2"), circuit)


def test_a_circuit_of_a_key_is_used_with_that_key(server: Loopback) -> None:
    server.mode(sandboxed=True)
    there, local = (server.load("demo", weights=weights, attention="eager") for weights in (None, "local"))
    circuit = tracer.trace(there, PARENTS, nodes=5, method="delta", edges=False)
    for use in USES:
        use(there, circuit)
    with refused(RemoteError, "was traced where weights are hidden", "trace it again with weights='local'"):
        USES[0](local, circuit)


def test_a_circuit_of_another_dtype_says_so(server: Loopback) -> None:
    there = server.load("half")
    whole = tracer.load(server.folders["half"], device="cpu")
    asked = tracer.Prompt(token_ids=[1, 44], target=7)
    circuit = tracer.trace(whole, asked, nodes=5, edges=False)
    with refused(JobError, "was traced in float32", "in bfloat16", "trace it again"):
        tracer.steer(there, circuit, asked, factor=-1.0, max_new_tokens=1)


def test_only_a_dtype_that_was_given_is_compared_with_the_servers(
    server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tracer.Prompt(token_ids=[1, 44], target=7)
    whole = tracer.load(server.folders["half"], device="cpu")
    tracer.trace(whole, asked, nodes=5, edges=False).save(tmp_path / "run")
    loaded: dict[str, Any] = {}
    load = tracer.load
    monkeypatch.setattr(tracer, "load", lambda *name, **options: loaded.update(options) or load(*name, **options))
    command = ["evaluate", str(tmp_path / "run"), "--structure", "simple", "--count", "2"]
    told = CliRunner().invoke(app, [*command, "--remote"])
    assert loaded["dtype"] is None
    assert "--dtype" not in told.output
    told = CliRunner().invoke(app, [*command, "--remote", "--dtype", "float32"])
    assert "--dtype float32" in told.stderr
    CliRunner().invoke(app, command)
    assert loaded["dtype"] == "float32"
