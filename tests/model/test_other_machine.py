"""Parity where kernels choose their way by address, rows and threads, and weights lie elsewhere (support/truth.py).

`make shifted` runs all of the parity tests so.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiny as t
import tracer
from helpers import Question, compare, fresh
from truth import close, other_machine, same_bits, shifted

ASKED = Question(lengths=(5, 2), metric="difference", targets=((7,), (11,)), foils=((8,), (12,)))


@pytest.fixture(params=[(shift, threads) for shift in (4, 8, 16, 32) for threads in (1, 2)], ids=str)
def elsewhere(request: pytest.FixtureRequest) -> Iterator[None]:
    with other_machine(*request.param):
        yield


@pytest.mark.parametrize(
    ("family", "method", "how"),
    [
        ("gemma2", "relp", {"baseline": "zero"}),
        ("gpt2", "grad", {"baseline": "counterfactual", "basis": "output"}),
        ("gpt2", "ig", {"baseline": "counterfactual", "steps": 2}),
    ],
)
@pytest.mark.usefixtures("elsewhere")
def test_methods_equal_the_oracle(family: str, method: str, how: dict[str, Any]) -> None:
    assert compare(fresh(family, n_layers=2), ASKED, method, **how).worst < 1e-5


@pytest.mark.usefixtures("elsewhere")
def test_bits_are_of_a_place_and_numbers_are_not(tmp_path: Path) -> None:
    """One model twice, and one file mapped twice, give equal bits; the same weights elsewhere do not."""
    here, folder = fresh("qwen3"), t.save(t.tiny("qwen3"), tmp_path)
    there, again = (tracer.load(folder, attention="eager", device="cpu") for _ in range(2))
    with other_machine(0):
        aligned = fresh("qwen3")
    models = (here, here, there, again, aligned)
    one, two, three, four, five = (tracer.attribute(model, ASKED.prompts()).nodes for model in models)
    assert same_bits(one, two)
    assert same_bits(three, four)
    assert close(three, one)
    assert not same_bits(five, one)
    assert close(five, one)


@pytest.mark.parametrize("shift", [0, 4, 8, 16, 32])
def test_shifted_weights_are_the_same_numbers_elsewhere(shift: int) -> None:
    layer = nn.Linear(5, 3)
    before = [(one.detach().clone(), one.data_ptr()) for one in layer.parameters()]
    for parameter, (value, address) in zip(shifted(layer, shift).parameters(), before, strict=True):
        assert same_bits(parameter.detach(), value)
        assert (parameter.data_ptr() - address) % 64 == shift


def test_the_other_machine_is_left_as_it_was_entered() -> None:
    one, other = torch.randn(6, 31), torch.randn(31, 7)
    before, threads = one @ other, torch.get_num_threads()
    address = next(t.tiny("llama").parameters()).data_ptr() % 64
    with other_machine(4, threads + 1):
        assert not same_bits(one @ other, before)
        assert close(one @ other, before)
        assert next(t.tiny("llama").parameters()).data_ptr() % 64 == 4
    assert same_bits(one @ other, before)
    assert torch.get_num_threads() == threads
    assert next(t.tiny("llama").parameters()).data_ptr() % 64 == address
