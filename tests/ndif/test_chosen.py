"""Values of chosen neurons on a server: those of all neurons there, and the local ones."""

from __future__ import annotations

import pytest

from loopback import Loopback
from tracer.model import passes
from tracer.prompts import Batch
from truth import close


@pytest.mark.parametrize("name", ["demo", "gemma2"])
def test_chosen_values_are_the_local_ones_and_those_of_all_neurons(server: Loopback, name: str) -> None:
    there, here = server.pair(name)
    batch, neurons = Batch(((1, 44, 9, 12), (1, 30))), [(0, 3), (1, 0), (1, 7)]
    got, wanted = (passes.chosen(model, batch, neurons) for model in (there, here))
    assert close(got, wanted)
    everything, _ = passes.values(here, batch)
    for at, (layer, neuron) in enumerate(neurons):
        assert close(wanted[..., at], everything[:, layer, :, neuron])
    with pytest.raises(ValueError, match="rise"):
        passes.chosen(here, batch, neurons[::-1])
