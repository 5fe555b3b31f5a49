"""Contrastive search on a server: the local table, and no position of a neuron on the wire."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tracer
from loopback import Loopback
from tracer.model import passes
from tracer.prompts import Batch
from truth import close


def drawn(count: int, length: int) -> list[tuple[int, ...]]:
    draw = torch.Generator().manual_seed(1)
    return [tuple(row) for row in torch.randint(10, 90, (count, length), generator=draw).tolist()]


@pytest.mark.parametrize("name", ["demo", "gpt2"])
@pytest.mark.parametrize("how", ["last", "mean", "max"])
def test_values_on_a_server_are_those_here(server: Loopback, name: str, how: str) -> None:
    there, here = server.pair(name)
    batch = Batch((*drawn(2, 6), *drawn(2, 3)))
    assert close(passes.pooled(there, batch, how), passes.pooled(here, batch, how))


def test_a_contrast_on_a_server_finds_the_same_and_sends_no_positions(server: Loopback) -> None:
    there, here = server.pair("demo")
    prompts = [tracer.Prompt(token_ids=one) for one in drawn(16, 12)]
    assert there.remote is not None
    before = replace(there.remote.server.traffic)
    found = tracer.contrast(there, prompts[:8], prompts[8:], permutations=99)
    received = there.remote.server.traffic.received - before.received
    wanted = tracer.contrast(here, prompts[:8], prompts[8:], permutations=99)
    names = ["layer", "neuron", "polarity"]
    assert found.table.select(names).equals(wanted.table.select(names))
    values = 16 * here.n_layers * 2 * here.n_neurons("activation") * 4
    assert received < values  # of all 12 positions it is six times as much
