"""The neurons of a mixture of experts, in a trace: those of the experts that ran, and no others.

A router sends each token to some experts. Their neurons stand side by side in *slots*, one for each expert that ran,
the neurons of shared experts behind them: [prompt, column, slot and neuron, then shared neuron]. Which expert has a
slot differs from token to token, so a neuron is known by its number in the layer, ``expert * d_expert + neuron``
(shared ones follow the last expert's), and is turned into its place when it is looked up.

transformers keeps all experts' weights in one tensor, and runs them in one of several ways. What the model computes
stays as it is to the bit; beside it the neurons are computed here from the same weights, expert by expert, and they
carry the gradient. Knows the algebra of a mixture from a model's `plan`; like model/interventions.py, which uses it, it
travels to a server as its source. Refuses to know attention, metrics and tracer's records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tracer.model import rules as linearize


class Dense:
    """The neurons of an MLP in a trace: what enters its down projection (`read`, `set`), and what leaves it (`output`,
    `set_output`); or what leaves another module, the first of what it returns."""

    slots = None

    def __init__(self, down: Any) -> None:
        self.down = down

    def read(self) -> Tensor:
        return self.down.input

    def set(self, value: Tensor) -> None:
        self.down.input = value

    def output(self) -> Tensor:
        out = self.down.output
        return out[0] if isinstance(out, tuple) else out

    def set_output(self, value: Tensor) -> None:
        out = self.down.output
        self.down.output = (value, *out[1:]) if isinstance(out, tuple) else value


class Mixture:
    """The same of a block's experts: `read` gives the neurons that ran [prompt, column, place], `output` what all
    experts write together [prompt, column, d_model]. `slots` says where neurons are.

    The router's choice and its weights are constants under rule 2, like an attention pattern. What leaves the mixture
    is the model's own value to the bit, plus what changed neurons change; its gradient is that of the neurons here.

    Args:
        block: the envoy of the block. laid: of its mixture (`Model.plan`). rules: of the linearisation.
    """

    def __init__(self, block: Any, laid: SimpleNamespace, rules: frozenset[str]) -> None:
        self.block, self.laid, self.whole = block._module, laid, Dense(block.get(laid.block))
        state = self.whole.read()
        self.shape, flat = state.shape, state.flatten(0, -2)
        expert, weights = routing(block, laid)
        expert, order = expert.sort(-1)
        weights, shared = weights.gather(-1, order), torch.ones_like(weights[:, :1])
        if laid.shared_gate is not None:
            gate = self.block.get_submodule(laid.shared_gate)
            shared = torch.nn.functional.linear(flat, gate.weight, gate.bias).sigmoid()
        if "attention" in rules:
            weights, shared = weights.detach(), shared.detach()
        into = laid.scaled == "input"
        self.reads = weights if into else None
        self.writes = torch.cat([torch.ones_like(weights) if into else weights, shared.to(weights.dtype)], -1)
        self.expert, self.slots = expert, slots(expert.unflatten(0, self.shape[:-1]), laid)
        both = entering(self.block, laid, flat, expert, self.reads)
        self.gate, self.up = both.unbind(1)
        found = linearize.gated(gating(self.block, laid), self.gate, self.up, rules)
        self.neurons = found.unflatten(0, self.shape[:-1])
        self.first, self.value = self.neurons, None
        if torch.is_grad_enabled():
            self.write()

    def write(self) -> None:
        """Put out what the neurons write."""
        if self.value is None:
            self.value = self.whole.output()
        out, value = self.written(self.neurons), self.value.detach()
        if self.neurons is not self.first:
            value = value + (out - self.written(self.first)).detach().view_as(value)
        self.whole.set_output(linearize.straight(value, out.view_as(value)) if torch.is_grad_enabled() else value)

    def written(self, neurons: Tensor) -> Tensor:
        return leaving(self.block, self.laid, neurons.flatten(0, -2), self.expert, self.writes)

    def read(self) -> Tensor:
        return self.neurons

    def set(self, value: Tensor) -> None:
        self.neurons = value
        self.write()

    def output(self) -> Tensor:
        value = self.whole.output()
        if value.shape != self.shape:  # tokens in a row: what is read here is what goes on
            flat, value = value, value.view(self.shape)
            self.whole.set_output(value.view_as(flat))
        return value

    def set_output(self, value: Tensor) -> None:
        self.whole.set_output(value.view_as(self.whole.output()))


def routing(block: Any, laid: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """Which experts each token goes to [token, slot], and the weight of each: as the experts are given them or, where a
    router gives each expert's weight for each token, its largest."""
    if laid.routing == "experts":
        (_, expert, weights), _ = block.get(laid.path).inputs
        return expert, weights
    scores = block.get(laid.router).output[0]
    weights, expert = scores.topk(laid.n_slots, dim=-1)
    return expert, weights


def gating(block: Any, laid: SimpleNamespace) -> SimpleNamespace:
    """How a mixture's gates and ups become neurons: its activation, or the bounds of one that is clamped."""
    module = block.get_submodule(laid.path)
    if laid.gating == "clamped":
        return SimpleNamespace(kind="clamped", alpha=module.alpha, limit=module.limit)
    return SimpleNamespace(kind="product", act=module.act_fn)


# Where neurons are.


def slots(expert: Tensor, laid: SimpleNamespace) -> SimpleNamespace:
    """Which expert has each slot, `expert` [prompt, column, slot]; its `width` in neurons, and how many experts there
    are (`count`)."""
    return SimpleNamespace(expert=expert, width=laid.width, count=laid.count, shared=laid.shared_width)


def numbers(where: SimpleNamespace) -> Tensor:
    """The number in the layer of each place [prompt, column, place]."""
    inside = torch.arange(where.width, device=where.expert.device)
    routed = (where.expert[..., None] * where.width + inside).flatten(-2)
    shared = torch.arange(where.shared, device=routed.device) + where.count * where.width
    return torch.cat([routed, shared.expand(*routed.shape[:-1], -1)], -1)


def places(where: SimpleNamespace | None, row: Any, column: Any, number: Tensor) -> Tensor:
    """Where neurons of these numbers are at these tokens; -1 where their expert did not run.

    Args:
        where: None where the layer has no experts: a number is its place. row, column: index tensors, or numbers.
    """
    if where is None:
        return number
    number = number.to(where.expert.device)
    match = where.expert[row, column] == (number // where.width)[..., None]
    slot = match.int().argmax(-1)
    place = torch.where(match.any(-1), slot * where.width + number % where.width, -1)
    behind = number - where.count * where.width
    return torch.where(behind >= 0, where.expert.shape[-1] * where.width + behind, place)


def numbered(values: Tensor, where: SimpleNamespace | None, n_neurons: int) -> Tensor:
    """Values by place [prompt, column, place] as values by number [prompt, column, neuron], 0 where nothing ran."""
    if where is None:
        more = n_neurons - values.shape[-1]
        return torch.nn.functional.pad(values, (0, more)) if more else values
    found = values.new_zeros(*values.shape[:-1], n_neurons)
    return found.scatter(-1, numbers(where).to(values.device), values)


def placed(values: Tensor, where: SimpleNamespace | None, width: int) -> Tensor:
    """Values by number [prompt or 1, column or 1, neuron] at the places of a layer [prompt, column, place]."""
    if where is None:
        return values[..., :width]
    at = numbers(where).to(values.device)
    return values.expand(*at.shape[:-1], -1).gather(-1, at)


def moved(values: Tensor, old: SimpleNamespace | None, new: SimpleNamespace | None) -> Tensor:
    """Values of one pass at the places of another over as many tokens; 0 of an expert that ran in the other alone."""
    if old is None or new is None:
        return values
    split = old.expert.shape[-1] * old.width
    same = (new.expert[..., :, None] == old.expert[..., None, :]).to(values.dtype)
    routed = same @ values[..., :split].unflatten(-1, (-1, old.width))
    return torch.cat([routed.flatten(-2), values[..., split:]], -1)


# The algebra of experts. States are [token, d], or [token, slot, d]; experts are [token, slot].


def by_expert(states: Tensor, expert: Tensor, through: Callable[[Tensor, int], Tensor]) -> Tensor:
    """What each slot's expert makes of its token's state, or of the slot's own [token, slot, out].

    Args:
        through: of the states that an expert sees [row, d], and its number.
    """
    n_slots = expert.shape[-1]
    order = expert.flatten().argsort(stable=True)
    ids, counts = expert.flatten()[order].unique_consecutive(return_counts=True)
    parts = []
    for number, rows in zip(ids.tolist(), order.split(counts.tolist()), strict=True):
        seen = states[rows // n_slots] if states.dim() == 2 else states.flatten(0, 1)[rows]
        parts.append(through(seen, number))
    return torch.cat(parts)[order.argsort()].unflatten(0, (-1, n_slots))


def weights_in(module: Any, laid: SimpleNamespace, expert: int) -> tuple[Tensor, Tensor | None]:
    """An expert's map into its gates and ups together [2 * d_expert, d_model], and its bias, as they lie: what a
    backward keeps is then no copy. `apart` and `together` order what comes out and goes in."""
    whole, bias = module.gate_up_proj[expert], getattr(module, "gate_up_proj_bias", None)
    return whole.T if laid.transposed else whole, None if bias is None else bias[expert]


def apart(both: Tensor, laid: SimpleNamespace) -> Tensor:
    """Gates and ups as they lie [..., 2 * d_expert], gates first."""
    return torch.cat([both[..., ::2], both[..., 1::2]], -1) if laid.interleaved else both


def together(both: Tensor, laid: SimpleNamespace) -> Tensor:
    """Gates and ups, gates first [..., 2 * d_expert], as they lie."""
    return both.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2) if laid.interleaved else both


def weights_out(module: Any, laid: SimpleNamespace, expert: int) -> Tensor:
    """An expert's down projection [d_model, d_expert]."""
    return module.down_proj[expert].T if laid.transposed else module.down_proj[expert]


def by_own(number: Tensor, laid: SimpleNamespace) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Neurons by their numbers in the layer, expert by expert, shared ones last: the expert, which of them are its, and
    their numbers in it."""
    number = number.cpu()
    each = (number // laid.width).clamp_max(laid.count)
    for expert in each.unique().tolist():
        mine = (each == expert).nonzero()[:, 0]
        yield expert, mine, number[mine] - expert * laid.width


def rows_in(block: Any, laid: SimpleNamespace, number: Tensor, which: str) -> tuple[Tensor, Tensor]:
    """What neurons read by their ``gate`` or ``up`` [neuron, d_model], float32, and its bias [neuron], 0 without one.

    Args:
        number: in the layer.
    """
    found, bias = torch.zeros(len(number), laid.d_model), torch.zeros(len(number))
    for expert, mine, inside in by_own(number, laid):
        if expert < laid.count:
            whole, shift = weights_in(block.get_submodule(laid.path), laid, expert)
            at = apart(torch.arange(2 * laid.width), laid)[inside + (laid.width if which == "up" else 0)]
        else:
            part = block.get_submodule(f"{laid.shared}.{which}_proj")
            whole, shift, at = part.weight, part.bias, inside
        found[mine] = whole[at.to(whole.device)].float().cpu()
        if shift is not None:
            bias[mine] = shift[at.to(shift.device)].float().cpu()
    return found, bias


def rows_out(block: Any, laid: SimpleNamespace, number: Tensor) -> Tensor:
    """What a unit of neurons writes [neuron, d_model], float32, but for the weight that the router gives their
    expert."""
    found = torch.zeros(len(number), laid.d_model)
    for expert, mine, inside in by_own(number, laid):
        if expert < laid.count:
            whole = weights_out(block.get_submodule(laid.path), laid, expert)
        else:
            whole = block.get_submodule(f"{laid.shared}.down_proj").weight
        found[mine] = whole[:, inside.to(whole.device)].T.float().cpu()
    return found


def entering(
    block: Any,
    laid: SimpleNamespace,
    state: Tensor,
    expert: Tensor,
    reads: Tensor | None,
    biased: bool = True,
) -> Tensor:
    """The gates and ups of all neurons that ran [token, 2, place]; without biases in float32.

    Args:
        state: what enters the mixture [token, d_model]. reads: what an expert's input is multiplied by [token, slot].
    """
    module = block.get_submodule(laid.path)
    seen = state if reads is None else state[:, None] * reads[..., None].to(state.dtype)

    def through(rows: Tensor, one: int) -> Tensor:
        weight, bias = weights_in(module, laid, one)
        return apart(torch.nn.functional.linear(rows, weight, bias) if biased else rows @ weight.float().T, laid)

    routed = by_expert(seen, expert, through).unflatten(-1, (2, -1)).transpose(1, 2).flatten(-2)
    if laid.shared is None:
        return routed
    parts = [block.get_submodule(f"{laid.shared}.{name}_proj") for name in ("gate", "up")]
    both = [
        torch.nn.functional.linear(state, one.weight, one.bias) if biased else state @ one.weight.float().T
        for one in parts
    ]
    return torch.cat([routed, torch.stack(both, 1)], -1)


def leaving(
    block: Any, laid: SimpleNamespace, neurons: Tensor, expert: Tensor, writes: Tensor, biased: bool = True
) -> Tensor:
    """What all neurons that ran write together [token, d_model].

    Args:
        neurons: [token, place]. writes: what each slot's output is multiplied by, and that of the shared experts, last
            [token, slot + 1]. biased: with what experts write whatever their neurons are.
    """
    module, split = block.get_submodule(laid.path), expert.shape[-1] * laid.width
    bias = getattr(module, "down_proj_bias", None) if biased else None

    def through(rows: Tensor, one: int) -> Tensor:
        return torch.nn.functional.linear(rows, weights_out(module, laid, one), None if bias is None else bias[one])

    inside = neurons[:, :split].unflatten(-1, (-1, laid.width))
    out = (by_expert(inside, expert, through) * writes[:, :-1, None].to(neurons.dtype)).sum(1)
    if laid.shared is None:
        return out
    down = block.get_submodule(f"{laid.shared}.down_proj").weight
    return out + torch.nn.functional.linear(neurons[:, split:], down) * writes[:, -1:].to(neurons.dtype)
