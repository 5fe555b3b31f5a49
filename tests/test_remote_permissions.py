"""What a key may do: halved where memory ends, refused before anything is computed, and with what works instead."""

from __future__ import annotations

import torch

import tracer
from helpers import error
from loopback import Loopback, same
from tracer import ndif

PARENTS = tracer.Prompt("The parents", target=" are", foil=" is")


# --------------------------------------------------------------------------------------- exact, in parts


def test_exact_is_halved_where_the_server_runs_out_of_memory(server: Loopback) -> None:
    there, here = server.pair("demo")
    told: list[tuple[int, int]] = []
    server.mode(oom_rows=50)
    got = tracer.trace(there, PARENTS, nodes=5, method="exact", progress=lambda *done: told.append(done))
    wanted = tracer.trace(here, PARENTS, nodes=5, method="exact")
    assert got.neurons.select(["layer", "position", "neuron"]) == wanted.neurons.select(["layer", "position", "neuron"])
    assert same(*(torch.tensor(one.nodes["attribution"].to_pylist()[:5]) for one in (got, wanted)))
    total = here.n_layers * here.n_neurons() * len(got.token_ids)
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1] == (total, total)


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
