"""What a pass held is freed when its circuits are made, at once: not when Python next looks for circles of objects."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

import tiny
import tracer
from tracer.attribution.trace import trace_all

WIDE = 20 * 64
"""More numbers than any tensor of a circuit has here, and no more than one layer's neurons."""


def wide() -> int:
    """Tensors that are alive and as large as a layer's neurons, weights apart."""
    live = [one for one in gc.get_objects() if type(one) is torch.Tensor]
    return sum(one.numel() >= WIDE for one in live)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"method": "grad", "basis": "output"},
        {"method": "ig", "steps": 2},
        {"method": "ig-activation", "steps": 2},
        {"method": "delta", "baseline": "mean"},
        {"method": "random", "edges": False},
        {"baseline": "counterfactual"},
        {"rules": ["norm", "product"]},
    ],
    ids=str,
)
def test_nothing_of_a_pass_outlives_its_circuits(how: dict[str, Any]) -> None:
    model = tracer.load(tiny.tiny("llama"), tokenizer=tiny.tokenizer())  # type: ignore[arg-type]
    prompts = [
        tracer.Prompt(
            token_ids=[4 + (3 * i + one) % 90 for i in range(40)],
            target=7,
            foil=8,
            counterfactual=[5 + (7 * i + one) % 90 for i in range(40)],
        )
        for one in range(2)
    ]
    how = {"baseline": "zero", "nodes": 5} | how
    list(trace_all(model, prompts, **how))  # what a first call alone makes stays
    gc.collect()
    before = wide()
    gc.disable()
    try:
        list(trace_all(model, prompts, **how))
        assert wide() <= before
    finally:
        gc.enable()
