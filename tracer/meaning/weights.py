"""What the weights alone say of neurons, in one product over the vocabulary: which logits they move, which tokens'
embeddings drive them.

Like attribution/circuits.py the functions run beside the model, here or on a server, and travel as their source: they
take a model's `plan` and plain values. They hold the products of one piece of the vocabulary at a time. Refuses to know
tokens' texts and tables (meaning/tokens.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tracer.attribution import replay
from tracer.model import experts
from tracer.model import rules as linearize


def extremes(nn: Any, plan: SimpleNamespace, ask: SimpleNamespace) -> dict[str, Any]:
    """The tokens with the largest and with the smallest numbers of each neuron, by what is numbered: their ids and
    numbers [neuron, 2, count], the largest first and the smallest first.

    ``effect``: by how much a unit of the neuron's value moves the logits. If `ask.driven`, also its ``value``, and the
    ``gate`` (None where the MLP has none) and ``up`` before it, with a token's embedding as the residual stream; and
    what gate and up are ``beside`` the tokens of extreme value [2, neuron, 2, count].

    Args:
        ask: the `neurons`, rows of (layer, neuron), in rising layers; the `basis`; how many tokens each (`count`); of
            the first `n_tokens` of the vocabulary; numbers held of a `piece` of it; and whether `driven`.
    """
    with torch.no_grad():
        parts = {"effect": effects(nn._module, plan, ask)}
        if ask.driven:
            parts |= drives(nn._module, plan, ask)
    return parts


# Out of a neuron.


def effects(module: Any, plan: SimpleNamespace, ask: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """See `extremes`. A write direction passes the norm behind the MLP, if there is one, and the final norm, both of
    statistic 1: their gains and, of a LayerNorm, the centring; no bias. Then the head, before a soft-cap. Constants of
    the family are in it."""
    head, written = module.get_submodule(plan.head).weight, []
    for layer, neuron in layers_of(ask.neurons):
        rows = writes(module, plan, layer, neuron, ask.basis)
        one = torch.ones(len(rows), device=rows.device)
        rows = replay.out_of_mlp(module, plan, layer, one, rows)
        written.append(rows.to(head.device))
    kind, path = plan.final_norm
    gain = plan.logit_scale * replay.gain(module, plan, path).to(head.device)
    read = replay.scaled(kind, gain, torch.cat(written), False)
    best = None
    for first, last in pieces(ask, plan.d_model):
        best = better(best, first, read @ head[first:last].float().T, ask.count)
    assert best is not None
    return best[0].cpu(), best[1].cpu()


def writes(module: Any, plan: SimpleNamespace, layer: int, neuron: Tensor, basis: str) -> Tensor:
    """What a unit of each neuron writes out of its MLP [neuron, d_model]; one of an expert where the router gives that
    the weight 1."""
    if basis == "output":
        return torch.nn.functional.one_hot(neuron, plan.d_model).float()
    if plan.layers[layer].experts is not None:
        block = module.get_submodule(f"{plan.blocks}.{layer}")
        return experts.rows_out(block, plan.layers[layer].experts, neuron)
    down = replay.matrix(module, plan, layer, (plan.layers[layer].down, "all"))
    return down[:, neuron.to(down.device)].T.float()


# Into a neuron.


def drives(module: Any, plan: SimpleNamespace, ask: SimpleNamespace) -> dict[str, Any]:
    """See `extremes`. A token's embedding, as it enters the first block, passes the norm before the MLP, with its own
    statistic, and the maps into the neurons, biases included: the neuron's value if nothing else were there."""
    table, best = module.get_submodule(plan.embedding), dict[str, Any]()
    up = into(module, plan, "up", ask.neurons, table.weight.device)
    gate = into(module, plan, "gate", ask.neurons, table.weight.device) if has_gates(plan) else None
    beside: list[Tensor | None] = [None, None]
    for first, last in pieces(ask, 2 * plan.d_model):
        entered = plan.embedding_scale * table(torch.arange(first, last, device=table.weight.device)).float()
        entered = normed(module, plan, entered)
        ups = torch.addmm(up[1][:, None], up[0], entered.T)
        gates = ups if gate is None else torch.addmm(gate[1][:, None], gate[0], entered.T)
        value = valued(module, plan, ask.neurons, gates, ups)
        before, parts = best.get("value"), (gates, ups)
        best["value"] = better(before, first, value, ask.count)
        beside = [carried(old, before, best["value"], first, new) for old, new in zip(beside, parts, strict=True)]
        best["up"] = better(best.get("up"), first, ups, ask.count)
        best["gate"] = None if gate is None else better(best.get("gate"), first, gates, ask.count)
    found = {name: None if one is None else (one[0].cpu(), one[1].cpu()) for name, one in best.items()}
    return found | {"beside": torch.stack([one for one in beside if one is not None]).cpu()}


def has_gates(plan: SimpleNamespace) -> bool:
    """Whether neurons have a gate; those of experts do."""
    return any(laid.gate_part is not None or laid.experts is not None for laid in plan.layers)


def valued(module: Any, plan: SimpleNamespace, neurons: Tensor, gates: Tensor, ups: Tensor) -> Tensor:
    """What gates and ups [neuron, token] make of the neurons: each layer in its own way."""
    layers, found = layers_of(neurons), []
    sizes = [len(mine) for _, mine in layers]
    for (layer, _), gate, up in zip(layers, gates.split(sizes), ups.split(sizes), strict=True):
        laid = plan.layers[layer]
        if laid.experts is not None:
            how = experts.gating(module.get_submodule(f"{plan.blocks}.{layer}"), laid.experts)
            found.append(linearize.gated(how, gate, up, frozenset()))
            continue
        value = gate * linearize.factor(replay.activation(module, plan, layer), gate)
        found.append(value if laid.gate_part is None else value * up)
    return torch.cat(found)


def into(
    module: Any, plan: SimpleNamespace, which: str, neurons: Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The rows of a map into some neurons, behind the norm's statistic, and their constants: the norm's gain and bias,
    and the map's own bias, are in them [neuron, d_model], [neuron].

    Args:
        which: the map, ``gate`` or ``up``.
    """
    rows, constants = [], []
    for layer, neuron in layers_of(neurons):
        laid = plan.layers[layer]
        mine, constant = maps(module, plan, layer, neuron, which)
        if laid.mlp_in is not None:
            path = f"{plan.blocks}.{layer}.{laid.mlp_in}"
            shift = getattr(module.get_submodule(path), "bias", None)
            if shift is not None:
                constant = constant + mine @ shift.float().to(mine.device)
            mine = mine * replay.gain(module, plan, path).to(mine.device)
        rows.append(mine.to(device))
        constants.append(constant.to(device))
    return torch.cat(rows), torch.cat(constants)


def maps(module: Any, plan: SimpleNamespace, layer: int, neuron: Tensor, which: str) -> tuple[Tensor, Tensor]:
    """The rows of a map into some neurons of a layer [neuron, d_model], and their biases [neuron]."""
    laid = plan.layers[layer]
    if laid.experts is not None:
        return experts.rows_in(module.get_submodule(f"{plan.blocks}.{layer}"), laid.experts, neuron, which)
    weight = getattr(laid, f"{which}_part")
    whole = replay.matrix(module, plan, layer, weight)
    mine, own = whole[neuron.to(whole.device)].float(), bias(module, plan, layer, weight)
    constant = torch.zeros(len(mine), device=mine.device)
    return mine, constant if own is None else constant + own[neuron.to(own.device)].float()


def bias(module: Any, plan: SimpleNamespace, layer: int, weight: Sequence[str]) -> Tensor | None:
    """The bias of a map into the neurons, if it has one."""
    path, which = weight
    whole = getattr(replay.part(module, plan, layer, path), "bias", None)
    if whole is None or which == "all":
        return whole
    half = len(whole) // 2
    return whole[:half] if which == "first half" else whole[half:]


def normed(module: Any, plan: SimpleNamespace, entered: Tensor) -> Tensor:
    """Embeddings [token, d_model] through the statistic of the norm before the MLP, its weights left out; all layers'
    norms have one epsilon, which is the configuration's."""
    path = plan.layers[0].mlp_in
    if path is None:
        return entered
    norm = replay.part(module, plan, 0, path)
    if replay.kind_of(plan, 0, path) == "layer_norm":
        entered = entered - entered.mean(-1, keepdim=True)
    return entered * (entered.square().mean(-1, keepdim=True) + linearize.epsilon(norm)).rsqrt()


# Pieces of the vocabulary.


def layers_of(neurons: Tensor) -> list[tuple[int, Tensor]]:
    """Each layer of rows of (layer, neuron) in rising layers, and its neurons."""
    layers, counts = neurons[:, 0].unique_consecutive(return_counts=True)
    return list(zip(layers.tolist(), neurons[:, 1].split(counts.tolist()), strict=True))


def pieces(ask: SimpleNamespace, width: int) -> list[tuple[int, int]]:
    """The vocabulary in pieces, for which at most `ask.piece` numbers are held beside a token's `width` each."""
    size = max(1, ask.piece // max(len(ask.neurons), width))
    return [(first, min(first + size, ask.n_tokens)) for first in range(0, ask.n_tokens, size)]


def better(best: tuple[Tensor, Tensor] | None, first: int, value: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The tokens of the largest numbers so far and of the smallest, and these numbers [neuron, 2, count], after one
    more piece [neuron, token]; of equal numbers the first token's."""
    found = []
    for end in (0, 1):
        sign = 1 - 2 * end
        at, numbers = largest(value, count, sign)
        at = at + first
        if best is not None:
            at, numbers = torch.cat([best[0][:, end], at], 1), torch.cat([best[1][:, end], numbers], 1)
            order = (sign * numbers).sort(dim=1, descending=True, stable=True).indices[:, :count]
            at, numbers = at.gather(1, order), numbers.gather(1, order)
        found.append((at, numbers))
    return torch.stack([at for at, _ in found], 1), torch.stack([numbers for _, numbers in found], 1)


def largest(value: Tensor, count: int, sign: int) -> tuple[Tensor, Tensor]:
    """Places and values of the `count` largest of each row, or with sign -1 of its smallest; of equal ones the first.

    Rows are cut into blocks. Those of the `count` largest are in the blocks with the `count` largest maxima, the first
    ones among equals: all but these blocks are only looked through once.
    """
    n_rows, size = value.shape
    width = max(8, int((size / count) ** 0.5))
    whole = size // width
    if whole <= count:
        order = (sign * value).sort(dim=1, descending=True, stable=True).indices[:, :count]
        return order, value.gather(1, order)
    blocks = value[:, : whole * width].view(n_rows, whole, width)
    tops = blocks.amax(2) if sign > 0 else -blocks.amin(2)
    kept = tops.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(1).values
    at = (kept[:, :, None] * width + torch.arange(width, device=value.device)).flatten(1)
    rest = torch.arange(whole * width, size, device=value.device).expand(n_rows, -1)
    at = torch.cat([at, rest], 1)
    order = (sign * value.gather(1, at)).sort(dim=1, descending=True, stable=True).indices[:, :count]
    at = at.gather(1, order)
    return at, value.gather(1, at)


def carried(
    old: Tensor | None, before: tuple[Tensor, Tensor] | None, now: tuple[Tensor, Tensor], first: int, new: Tensor
) -> Tensor:
    """Another number of the tokens that are best `now` [neuron, 2, count]: out of this piece's `new` ones [neuron,
    token], or of the `old` of those that were best `before`."""
    tokens = now[0]
    here = new.gather(1, (tokens.flatten(1) - first).clamp(0, new.shape[1] - 1)).view(tokens.shape)
    if old is None or before is None:
        return here
    same = tokens[..., :, None] == before[0][..., None, :]
    kept = old.gather(2, same.int().argmax(-1))
    return torch.where(same.any(-1), kept, here)
