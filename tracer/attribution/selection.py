"""Which nodes make the circuit: index arithmetic on attributions, no model and no files.

The three rules of method.md section 5: the k strongest, everything above a share of the metric, or the smallest
set that holds a share of the total. All rank by absolute attribution; ties keep the order layer, position, neuron.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tracer.errors import JobError, quoted
from tracer.model import experts

DEFAULT_NODES = 200

NodeIndex = Int[Tensor, "node 3"]


@dataclass(frozen=True)
class Selection:
    """Which nodes are kept; see `select`. `limit` is None where no number does.

    Attributes:
        given: nodes that are kept whatever their attribution, in this order, and no others; those at position -1 at
            every position of the prompt (but the first, with `skip_first`); all are, or none is.
    """

    limit: int | None
    threshold: float | None = None
    mass: float | None = None
    skip_first: bool = False
    exclude: tuple[tuple[int, int], ...] = ()
    given: tuple[tuple[int, int, int], ...] | None = None

    @staticmethod
    def of(
        nodes: int | None = None,
        threshold: float | None = None,
        mass: float | None = None,
        skip_first: bool = False,
        exclude: Iterable[tuple[int, int]] = (),
    ) -> Selection:
        """From the arguments of `select`.

        Raises:
            JobError: a rule out of range.
        """
        check_selection(nodes, threshold, mass)
        pairs = tuple((int(layer), int(neuron)) for layer, neuron in sorted(exclude))
        return Selection(node_limit(nodes, threshold, mass), threshold, mass, skip_first, pairs)

    def plain(self) -> SimpleNamespace:
        """Its fields, as `strongest` takes them and as they travel."""
        return SimpleNamespace(**vars(self))

    def record(self) -> dict[str, Any]:
        """Its fields, as a circuit keeps them."""
        kept = {"nodes": self.limit, "threshold": self.threshold, "mass": self.mass, "skip_first": self.skip_first}
        return kept | {"exclude": [list(pair) for pair in self.exclude]}


def select(
    attributions: Float[Tensor, "layer pos neuron"],
    metric: float,
    *,
    nodes: int | None = None,
    threshold: float | None = None,
    mass: float | None = None,
    skip_first: bool = False,
    exclude: Iterable[tuple[int, int]] = (),
) -> NodeIndex:
    """The selected nodes, strongest first, as rows of (layer, position, neuron).

    Args:
        attributions: one prompt's, in metric units.
        metric: the prompt's metric; `threshold` is a share of its absolute value.
        nodes: at most this many; if None, 200 where neither other rule is given, and all that they keep else.
        threshold: keep ``|attribution| >= threshold * |metric|`` (paper: .005).
        mass: keep the fewest whose ``|attribution|`` add up to this share of all that may be taken.
        skip_first: leave out position 0 (BOS).
        exclude: (layer, neuron) pairs never taken, at any position.

    Raises:
        JobError: a rule out of range.
    """
    selection = Selection.of(nodes, threshold, mass, skip_first, exclude)
    for layer, neuron in selection.exclude:
        check_excluded(attributions.shape, layer, neuron)
    slots = [None] * attributions.shape[0]
    found = strongest(lambda layer: attributions[layer][None], slots, [0], torch.tensor([metric]), selection.plain())
    return found.nodes[0]


def strongest(
    attribution: Callable[[int], Tensor],
    slots: Sequence[SimpleNamespace | None],
    first: Sequence[int],
    metric: Tensor,
    rules: SimpleNamespace,
) -> SimpleNamespace:
    """`select` for each prompt of a batch, where its attributions are: layer by layer, so that a layer's nodes alone
    are looked at at a time, and those of them alone are sorted that may be among the strongest. It may travel to a
    server.

    Args:
        attribution: of a layer [prompt, column, place]. slots: of each layer, see `experts.slots`; None where a place
            is a neuron. first: of each prompt, the column where it begins. metric: of each prompt.
        rules: the fields of a `Selection`.

    Returns:
        For each prompt its `nodes`, rows of (layer, position, neuron), the same with their `places`, and their
        `attributions`, on the CPU; the `largest` |attribution| of all nodes and their `total` [prompt], float64.
    """
    share = metric.double().abs() * (0.0 if rules.threshold is None else rules.threshold)
    found = SimpleNamespace(count=0)
    if rules.given is not None:
        return among(attribution, slots, first, rules, found)
    limit = 4096 if rules.limit is None and rules.mass is not None else rules.limit
    while True:
        values, places = pool(attribution, slots, first, share, limit, rules, found)
        orders = [value.abs().sort(descending=True, stable=True) for value in values]
        most = [len(value) if limit is None else limit for value in values]
        if rules.mass is not None:
            most = [held(one.values[:limit], mass, rules.mass) for one, mass in zip(orders, found.kept, strict=True)]
        if limit in (None, rules.limit) or limit >= found.count or all(number < limit for number in most):
            break
        limit *= 8  # how many hold that mass is seen as more are looked at
    most = [min(number, rules.limit or number) for number in most]
    taken = [one.indices[:number] for one, number in zip(orders, most, strict=True)]
    found.places = [place[order] for place, order in zip(places, taken, strict=True)]
    found.nodes = [by_number(one, slots, row, first[row]) for row, one in enumerate(found.places)]
    found.attributions = [value[order] for value, order in zip(values, taken, strict=True)]
    return found


def by_number(places: Tensor, slots: Sequence[SimpleNamespace | None], row: int, first: int) -> Tensor:
    """Nodes of one prompt as rows of (layer, position, neuron), of their (layer, position, place)."""
    nodes = places.clone()
    for layer, where in enumerate(slots):
        mine = (places[:, 0] == layer).nonzero()[:, 0] if where is not None else places[:0, 0]
        if len(mine):
            _, position, place = places[mine].unbind(-1)
            nodes[mine, 2] = experts.numbers(of_tokens(where, row, position + first)).gather(-1, place[:, None])[:, 0]
    return nodes


def of_tokens(where: SimpleNamespace | None, row: Any, column: Tensor) -> Any:
    """Where neurons are at some tokens [token, slot], on the CPU."""
    return where and SimpleNamespace(**vars(where) | {"expert": where.expert[row, column].cpu()})


def among(
    attribution: Callable[[int], Tensor],
    slots: Sequence[SimpleNamespace | None],
    first: Sequence[int],
    rules: SimpleNamespace,
    found: Any,
) -> SimpleNamespace:
    """What `strongest` returns where the nodes are given; one whose expert did not run has no attribution."""
    found.largest, found.total, found.kept = torch.zeros(3, len(first), dtype=torch.float64)
    given, found.nodes = torch.tensor(rules.given).view(-1, 3), []
    for layer, where in enumerate(slots):
        signed = attribution(layer)
        allowed(signed, layer, first, rules, found, where)
        if not found.nodes:
            found.nodes = [everywhere(given, int(rules.skip_first), signed.shape[1] - column) for column in first]
            found.attributions = [torch.zeros(len(nodes)) for nodes in found.nodes]
            found.places = [nodes.clone() for nodes in found.nodes]
        for row, column in enumerate(first):
            mine = found.nodes[row][:, 0] == layer
            _, position, neuron = found.nodes[row][mine].unbind(-1)
            at = experts.places(where, row, position + column, neuron).cpu()
            found.places[row][mine, 2] = at
            values = signed[row, position + column, at.clamp_min(0)].float().cpu()
            found.attributions[row][mine] = torch.where(at < 0, 0.0, values)
    return found


def everywhere(nodes: Tensor, start: int, length: int) -> Tensor:
    """Nodes [node, 3] of a prompt of this length: those at position -1 at each of its positions from `start` on."""
    if not len(nodes) or int(nodes[0, 1]) >= 0:
        return nodes
    every = nodes.repeat_interleave(length - start, 0)
    every[:, 1] = torch.arange(start, length).repeat(len(nodes))
    return every


def held(strengths: Tensor, total: Tensor, mass: float) -> int:
    """How many of the strongest hold this share of the total; all of them, and one more, where they do not."""
    share = strengths.double().cumsum(0) / total.clamp_min(torch.finfo(torch.double).tiny)
    return min(int((share < mass).sum()) + 1, len(strengths) + 1)


def pool(
    attribution: Callable[[int], Tensor],
    slots: Sequence[SimpleNamespace | None],
    first: Sequence[int],
    share: Tensor,
    limit: int | None,
    rules: SimpleNamespace,
    found: SimpleNamespace,
) -> tuple[list[Tensor], list[Tensor]]:
    """Of each prompt, attribution and place of all nodes that may be among the `limit` strongest, in the order of
    layer, position and neuron; `found` gets the sums over all of them.

    Args:
        share: of each prompt, what |attribution| is kept from.
    """
    kept: list[tuple[Tensor, ...]] = []
    found.largest, found.total, found.kept = torch.zeros(3, len(first), dtype=torch.float64)
    least = share.float()[:, None].clamp_min(2.0**-149)
    found.count = 0
    for layer, where in enumerate(slots):
        signed = attribution(layer)
        shape, least = signed.shape, least.to(signed.device)
        found.count += signed[0].numel()
        strength = allowed(signed, layer, first, rules, found, where)
        inside = strength >= least
        if limit is not None and limit < strength.shape[1] and int(inside.sum(-1).max()) > 2 * limit:
            least = torch.maximum(least, strength.topk(limit).values[:, -1:])
            inside = strength >= least
        row, flat = inside.nonzero(as_tuple=True)
        column, neuron = flat // shape[2], flat % shape[2]
        kept.append((row, signed.flatten(1)[row, flat], torch.full_like(row, layer), column, neuron))
    parts = [torch.cat([part.cpu() for part in some]) for some in zip(*kept, strict=True)]
    mine = [(parts[0] == number).nonzero()[:, 0] for number in range(len(first))]
    signed, layer, column, neuron = parts[1:]
    places = [torch.stack([layer[at], column[at] - first[i], neuron[at]], -1) for i, at in enumerate(mine)]
    return [signed[at] for at in mine], places


def allowed(
    signed: Tensor,
    layer: int,
    first: Sequence[int],
    rules: SimpleNamespace,
    found: SimpleNamespace,
    where: SimpleNamespace | None,
) -> Tensor:
    """A layer's |attributions| [prompt, column and neuron], 0 where none may be taken; `found` gets their sums, of all
    of them and of those that may."""
    strength = signed.abs()
    for row, column in enumerate(first):
        strength[row, :column] = 0
    found.total += strength.flatten(1).sum(-1, dtype=torch.float64).cpu()
    found.largest = torch.maximum(found.largest, strength.flatten(1).amax(-1).double().cpu())
    if rules.skip_first:
        strength[range(len(first)), list(first)] = 0
    given = [neuron for at, neuron in rules.exclude if at == layer]
    excluded = torch.tensor(given, dtype=torch.long, device=strength.device)
    if where is not None:
        strength[torch.isin(experts.numbers(where).to(strength.device), excluded)] = 0
    elif len(excluded):
        strength[..., excluded] = 0
    strength = strength.flatten(1)
    if rules.mass is not None:
        found.kept += strength.sum(-1, dtype=torch.float64).cpu()
    return strength


def node_limit(nodes: int | None, threshold: float | None, mass: float | None) -> int | None:
    """How many nodes are kept at most: the number given, or 200 where no rule is given at all."""
    return DEFAULT_NODES if nodes is None and threshold is None and mass is None else nodes


def check_selection(nodes: int | None, threshold: float | None, mass: float | None) -> None:
    """Refuse a selection rule out of range, before anything is computed."""
    if nodes is not None and nodes < 1:
        raise JobError(f"nodes={nodes}", "at least one node must be kept", "use 1 or more; 200 is usual")
    if threshold is not None and not threshold >= 0:
        raise JobError(f"threshold={threshold}", "must be 0 or more", "the paper uses 0.005")
    if mass is not None and not 0 < mass <= 1:
        raise JobError(f"mass={mass}", "must be above 0 and at most 1", "0.9 keeps nine tenths of the total")


def check_excluded(shape: Sequence[int], layer: int, neuron: int) -> None:
    """Refuse a neuron outside a model of this many [layer, pos, neuron]."""
    n_layers, _, n_neurons = shape
    if not (0 <= layer < n_layers and 0 <= neuron < n_neurons):
        raise JobError(
            f"exclude={quoted((layer, neuron))}",
            f"the model has layers 0..{n_layers - 1} and neurons 0..{n_neurons - 1}",
            "give (layer, neuron) pairs inside the model",
        )
