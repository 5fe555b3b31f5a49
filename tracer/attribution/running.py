"""Which neurons there are at each position of prompts: all of a layer, or of a mixture those of the experts that ran.

What is drawn at random beside a circuit is drawn among these, and a node that a person names must be one of them. Knows
how the experts that ran are found. Refuses to know what is done to neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tracer.batching import chunked_alike
from tracer.errors import JobError, quoted
from tracer.experts import Neuron
from tracer.model import passes
from tracer.model.model import LayerExperts, Model
from tracer.prompts import Batch


@dataclass(frozen=True, eq=False)
class Running:
    """Where neurons are.

    Attributes:
        widths: neurons of each layer. mixtures: their experts; None where all neurons are at every position.
        ran: of each mixture the experts that ran at each position of any of the prompts.
    """

    widths: tuple[int, ...]
    mixtures: tuple[LayerExperts | None, ...]
    ran: dict[int, Bool[Tensor, "pos expert"]]

    @staticmethod
    def of(model: Model, prompts: Sequence[tuple[int, ...]], basis: str = "activation") -> Running:
        """Of some prompts together, by their tokens; of a model without experts, and of outputs, nothing is computed.

        One forward of each prompt, without the head.
        """
        if basis != "activation" or not model.mixtures:
            widths = (model.d_model,) * model.n_layers if basis != "activation" else model.widths
            return Running(widths, (None,) * model.n_layers, {})
        longest = max(map(len, prompts))
        ran = {
            layer: torch.zeros(longest, one.n_experts, dtype=torch.bool)
            for layer, one in enumerate(model.experts)
            if one is not None
        }
        each = model.bytes_per_token(gradient=False, length=longest) * longest
        for part in chunked_alike(prompts, max(1, model.budget() // each), len):
            for layer, expert in zip(ran, passes.routed(model, Batch(tuple(part))), strict=True):
                length = expert.shape[1]
                ran[layer][:length].scatter_(1, expert.transpose(0, 1).flatten(1).long(), True)
        return Running(model.widths, model.experts, ran)

    def numbers(self, layer: int, position: int | None) -> Int[Tensor, " neuron"]:
        """The neurons of a layer at a position, rising; at any of them if None. Behind the prompts no expert ran."""
        every, one = torch.arange(self.widths[layer]), self.mixtures[layer]
        if one is None:
            return every
        at = slice(None) if position is None else slice(position, position + 1)
        ran = self.ran[layer][at].any(0)
        shared = torch.ones(one.d_shared, dtype=torch.bool)
        return every[torch.cat([ran.repeat_interleave(one.d_expert), shared])]

    def nodes(self, length: int) -> Int[Tensor, "node 3"]:
        """Every node of a prompt of so many tokens, as (layer, position, neuron)."""
        found = [torch.zeros(0, 3, dtype=torch.long)]
        for layer, one in enumerate(self.mixtures):
            alike = None if one is not None else self.numbers(layer, 0)
            for position in range(length):
                inside = self.numbers(layer, position) if alike is None else alike
                at = torch.tensor([[layer, position]]).expand(len(inside), -1)
                found.append(torch.cat([at, inside[:, None]], -1))
        return torch.cat(found)

    def others(self, layer: int, position: int | None, own: set[int]) -> Int[Tensor, " neuron"]:
        """The same but for some."""
        found = self.numbers(layer, position)
        return found[~torch.isin(found, torch.tensor(sorted(own), dtype=found.dtype))]

    def has(self, layer: int, position: int, neuron: int) -> bool:
        """Whether there is such a neuron at a position."""
        one = self.mixtures[layer]
        if one is None or neuron >= one.n_experts * one.d_expert:
            return True
        return bool(self.ran[layer][position, neuron // one.d_expert])

    def lacking(self, layer: int, position: int, neuron: int, text: str = "") -> JobError:
        """The error of a neuron that is not there (see `has`): it names the experts that ran, and the prompt."""
        one = self.mixtures[layer]
        assert one is not None
        expert, inside = divmod(neuron, one.d_expert)
        ran = ", ".join(f"E{number}" for number in self.ran[layer][position].nonzero()[:, 0].tolist())
        where = f"position {position}" + (f" of {quoted(text)}" if text else "")
        value = f"neuron {Neuron(layer, expert, inside)} at {where}"
        rule = f"its expert did not run there, so that it has no value; {ran} did"
        return JobError(value, rule, "name a neuron of those, or another position")

    def mask(self, length: int) -> Bool[Tensor, "layer pos neuron"] | None:
        """Whether there is a neuron, at the positions of prompts of so many tokens, of all layers as wide as the
        widest; None where there is every one."""
        if not self.ran and len({*self.widths}) == 1:
            return None
        found = torch.zeros(len(self.widths), length, max(self.widths), dtype=torch.bool)
        for layer, one in enumerate(self.mixtures):
            if one is None:
                found[layer, :, : self.widths[layer]] = True
                continue
            for position in range(length):
                found[layer, position, self.numbers(layer, position)] = True
        return found
