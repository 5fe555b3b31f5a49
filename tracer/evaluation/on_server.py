"""What one request does for ablations: the values that nodes are set to, and the metric with each set in force."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tracer.model import interventions, traces


def ablated(nn: Any, plan: SimpleNamespace, ask: SimpleNamespace) -> list[Tensor]:
    """What is read [prompt] of each forward with its nodes ablated: see `ablations.measured`."""
    to = replacements(nn, plan, ask) if ask.others else ask.to
    return [traces.ablated(nn, plan, one, ask.rankings, to, ask.basis) for one in ask.forwards]


def replacements(nn: Any, plan: SimpleNamespace, ask: SimpleNamespace) -> Tensor:
    """What nodes are set to [other, layer, position, neuron]: the values of each reference prompt, zero after its end,
    or their mean per position. Of a mixture by number, 0 where an expert did not run.

    One forward for each batch of them; batches are padded on the left.
    """
    found, total, count = [], torch.zeros(()), torch.zeros(ask.longest)
    for inputs, lengths in ask.others:
        seen = traces.values(nn, plan, inputs, ask.basis)
        values = interventions.stack(torch.float32, seen.values, seen.slots, ask.n_neurons)
        for row, length in zip(values, lengths, strict=True):
            reach = min(length, ask.longest)
            mine = row[:, row.shape[1] - length :][:, :reach]
            if ask.mean:
                total = total if total.dim() else row.new_zeros(len(row), ask.longest, row.shape[2]).double()
                total[:, :reach] += mine.double()
                count[:reach] += 1
            else:
                found.append(torch.nn.functional.pad(mine, (0, 0, 0, ask.longest - reach)))
    return (total / count[None, :, None]).float()[None] if ask.mean else torch.stack(found)
