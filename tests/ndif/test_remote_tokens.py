"""The tokens of neurons on a server: those of here; hidden weights are refused with what works instead."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tracer
from helpers import refused
from inline import InlinePool
from loopback import FAMILIES, Loopback
from tracer.errors import RemoteError
from truth import close

NEURONS = [(1, 3), (0, 17, -1)]


def listed(model: tracer.Model) -> list[tuple[tuple[str, ...], torch.Tensor]]:
    names = ("promoted", "suppressed", "driven_by", "gate", "up")
    lists = [getattr(one, name) for one in tracer.neuron_tokens(model, NEURONS, 5) for name in names]
    return [(tuple(one.text for one in some), torch.tensor([one.value for one in some])) for some in lists]


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_the_local_ones(server: Loopback, name: str) -> None:
    there, here = server.pair(name)
    for (texts, values), (wanted, numbers) in zip(listed(there), listed(here), strict=True):
        assert texts == wanted
        assert close(values, numbers)


def test_hidden_weights_are_refused_and_read_here_where_they_are_loaded(server: Loopback) -> None:
    server.mode(sandboxed=True)
    with refused(RemoteError, "hidden there", "weights='local'"):
        tracer.promoted(server.load("gpt2"), NEURONS)
    _, here = server.pair("gpt2")
    mine = tracer.promoted(server.load("gpt2", weights="local", attention="eager"), NEURONS, 5)
    assert mine.drop_columns([one for one in mine.column_names if "values" in one]) == tracer.promoted(
        here, NEURONS, 5
    ).drop_columns([one for one in mine.column_names if "values" in one])


def test_a_run_that_cannot_read_them_is_refused_before_it_computes(server: Loopback, tmp_path: Path) -> None:
    server.mode(sandboxed=True)
    job = {"kind": "dataset", "input": {"task": "capitals", "count": 2}, "method": "delta", "edges": False}
    job |= {"baseline": "counterfactual", "nodes": 5, "remote": True, "host": server.host}
    before = server.seen()["requests"]
    with refused(RemoteError, "hidden there", "weights: local"):
        tracer.run(job | {"tokens": 3}, tmp_path / "run", pool=InlinePool())
    asked = server.seen()["requests"] - before  # the probe's
    tracer.run(job, tmp_path / "plain", pool=InlinePool())
    assert server.seen()["requests"] - before > 2 * asked
