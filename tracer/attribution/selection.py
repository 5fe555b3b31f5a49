"""Which nodes make the circuit: index arithmetic on one prompt's attributions, no model and no files.

The three rules of method.md section 5: the k strongest, everything above a share of the metric, or the smallest
set that holds a share of the total. All rank by absolute attribution; ties keep the order layer, position, neuron.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tracer.errors import JobError, quoted

DEFAULT_NODES = 200

NodeIndex = Int[Tensor, "node 3"]


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
    check_selection(nodes, threshold, mass)
    exclude = list(exclude)
    for layer, neuron in exclude:
        check_excluded(attributions.shape, layer, neuron)
    limit = node_limit(nodes, threshold, mass)
    return strongest(attributions, metric, limit, threshold, mass, skip_first, exclude)


def strongest(
    attributions: Tensor,
    metric: float,
    limit: int | None,
    threshold: float | None,
    mass: float | None,
    skip_first: bool,
    exclude: Iterable[tuple[int, int]],
) -> Tensor:
    """`select` with resolved rules; it may travel to a server, and uses nothing but tensors."""
    strength = attributions.abs().clone()
    if skip_first:
        strength[:, 0] = 0
    for layer, neuron in exclude:
        strength[layer, :, neuron] = 0
    values, order = strength.flatten().sort(descending=True, stable=True)
    keep = int((values > 0).sum())
    if threshold is not None:
        keep = min(keep, int((values >= threshold * abs(metric)).sum()))
    if mass is not None:
        share = values.double().cumsum(0) / values.double().sum().clamp_min(torch.finfo(torch.double).tiny)
        keep = min(keep, int((share < mass).sum()) + 1)
    if limit is not None:
        keep = min(keep, limit)
    return torch.stack(torch.unravel_index(order[:keep], strength.shape), dim=-1)


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
