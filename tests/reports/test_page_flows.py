"""Whether the page may sum over paths: only where an edge is a part of its source's attribution."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from test_viewer import read

import tracer
from payloads import payload
from tracer.reports import tables, viewer


@pytest.mark.parametrize(("method", "flows"), [("relp", True), ("grad", False)])
def test_paths_are_summed_for_relp_alone(method: str, flows: bool) -> None:
    prompt = tracer.Prompt("The secretaries near the car", " are", foil=" is")
    circuit = tracer.trace(tracer.load("demo"), prompt, nodes=10, method=method)
    assert tables.payload(circuit).flows is flows
    # What a part of the flow is divided by: the distance from the baseline (zero) times the gradient.
    neurons = circuit.neurons.to_pydict()
    product = np.array(neurons["activation"]) * np.array(neurons["gradient"])
    np.testing.assert_allclose(neurons["attribution"], product, rtol=1e-4)


def test_the_page_is_told() -> None:
    made = payload(20, 40)
    for flows in (False, True):
        header, _ = read(viewer.page(dataclasses.replace(made, flows=flows)))
        assert header["flows"] is flows
