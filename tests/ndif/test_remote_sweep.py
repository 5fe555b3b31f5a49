"""Sweeps and drawn texts on a server: the local numbers, in a request for each batch."""

from __future__ import annotations

import pytest

import tracer
from loopback import Loopback
from tracer.prompts import Prompt

GROUPS = {"one": [(0, 1, 3), (1, 2, 5)], "two": [(1, 6)]}


@pytest.mark.parametrize("sandboxed", [False, True])
def test_a_sweep_is_the_local_one(server: Loopback, sandboxed: bool) -> None:
    _, here = server.pair("gpt2")
    server.mode(**({"sandboxed": True} if sandboxed else {}))
    there = server.load("gpt2", attention="eager")
    prompts = [Prompt(token_ids=(1, 20, 30, 40, 50), target=7), Prompt(token_ids=(1, 21, 33, 44), target=7, foil=9)]
    how = {"factors": [-1, 0], "random": 1, "tokens": [12]}
    got, wanted = (tracer.sweep(model, GROUPS, prompts, **how) for model in (there, here))  # type: ignore[arg-type]
    for mine, theirs in ((got.tokens, wanted.tokens), (got.groups, wanted.groups)):
        for one, other in zip(mine.to_pylist(), theirs.to_pylist(), strict=True):
            for name, value in other.items():
                close = one[name] == pytest.approx(value, abs=1e-5) if isinstance(value, float) else one[name] == value
                assert close, name


def test_drawn_texts_are_the_local_ones(server: Loopback) -> None:
    there, here = server.pair("gpt2")
    prompt = Prompt(token_ids=(1, 20, 30, 40, 50))
    got, wanted = (
        tracer.steer(model, GROUPS["two"], prompt, factor=-1, max_new_tokens=4, random=1, n=3, top_p=0.9)
        for model in (there, here)
    )
    assert got.samples == wanted.samples
