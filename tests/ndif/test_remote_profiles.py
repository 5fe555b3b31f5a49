"""Attribution profiles of a model on a server are those of the same model here, and come with the circuit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tracer
from helpers import error, refused
from loopback import Loopback, prompts
from tracer.errors import RemoteError


def same_profiles(got: tracer.Circuit, wanted: tracer.Circuit) -> None:
    assert got.neurons.select(["layer", "position", "neuron"]) == wanted.neurons.select(["layer", "position", "neuron"])
    assert got.profiles is not None
    assert wanted.profiles is not None
    for name in ("input", "output"):
        one, other = (torch.tensor(circuit.profiles[name].to_pylist()) for circuit in (got, wanted) if circuit.profiles)
        assert error(one, other) < 1e-5, name


@pytest.mark.parametrize("rules", [None, "norm+attention"])
def test_profiles_come_with_the_circuit_in_one_request(server: Loopback, rules: str | None) -> None:
    """Worked out there by the replay or, where rules are off, by autograd."""
    there, here = server.pair("gemma2")
    how: dict[str, Any] = {} if rules is None else {"rules": rules.split("+"), "edges": False}
    before = server.seen()["requests"]
    got = tracer.trace(there, prompts("gemma2")[0], nodes=20, profiles=True, **how)
    assert server.seen()["requests"] == before + 1
    same_profiles(got, tracer.trace(here, prompts("gemma2")[0], nodes=20, profiles=True, **how))


def test_a_server_without_gradients_gives_profiles_where_the_weights_are_here(server: Loopback) -> None:
    _, here = server.pair("demo")
    server.mode(sandboxed=True)
    there = server.load("demo", weights="local", attention="eager")
    asked = prompts("demo")[0]
    same_profiles(*(tracer.trace(model, asked, nodes=20, edges=False, profiles=True) for model in (there, here)))


def test_profiles_are_refused_before_anything_is_computed(server: Loopback) -> None:
    server.mode(sandboxed=True)
    there = server.load("demo")
    before = server.seen()["requests"]
    with refused(RemoteError, "attribution profiles needs gradients", "leave out profiles=True", "weights='local'"):
        tracer.trace(there, prompts("demo")[0], nodes=5, method="delta", edges=False, profiles=True)
    assert server.seen()["requests"] == before
