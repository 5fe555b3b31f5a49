"""The edges among nodes that are given, of many prompts: the part of a trace that selects nothing and prunes nothing.

Knows that a prompt's numbers come from the same pass as its circuit would. Refuses to know what is made of them
(runs/units/mean_edges.py), how edges are found (attribution/circuits.py) and files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tracer.attribution.attribute import Reference
from tracer.attribution.graph import edges_among
from tracer.attribution.request import Request, SelectedNodes
from tracer.attribution.selection import Selection
from tracer.attribution.trace import answers, checked, prepared_request
from tracer.model.model import Model
from tracer.prompts import Prompt


@dataclass(frozen=True)
class Links:
    """All direct edges among one prompt's given nodes, dense. Sources are the nodes, then every embedding by position;
    targets are the nodes, then the metric's logits, each as the part of the metric's term that it is: multiplied by
    the size of its weight.

    Attributes:
        nodes: attributions, activations and gradients are theirs.
        weight: of each edge, in units of the target. moved: the same with the source's distance from its baseline in
            the place of its value. attribution: of each edge, in metric units (method.md section 4).
        incoming: of each target, the weight of all nodes and embeddings of the model. values: of the targets.
        gradients: of the metric at each target: of a logit the sign of its weight.
    """

    prompt: SelectedNodes
    weight: Float[Tensor, "target source"]
    moved: Float[Tensor, "target source"]
    attribution: Float[Tensor, "target source"]
    incoming: Float[Tensor, " target"]
    values: Float[Tensor, " target"]
    gradients: Float[Tensor, " target"]


def links_among(
    model: Model,
    prompts: Sequence[Prompt],
    nodes: Sequence[tuple[int, int, int]],
    *,
    skip_first: bool = False,
    memory: int | None = None,
    **options: Any,
) -> Iterator[Links]:
    """The edges among the same nodes on each of several prompts, attributed together in batches of at most `memory`
    bytes.

    Args:
        nodes: (layer, position, neuron), once each; all at position -1 for neurons at every position of a prompt, but
            the first with `skip_first`.
        options: how nodes are attributed, as in `tracer.trace`.

    Raises:
        JobError, ModelError, RemoteError: as `tracer.trace`.
    """
    reference = options.pop("reference", None)
    chosen, _ = checked(prompts, edges=True, **options)
    reference = Reference(reference) if isinstance(reference, Sequence) else reference
    selection = Selection(None, skip_first=skip_first, given=tuple(nodes))
    request, encoded = prepared_request(model, prompts, Request(chosen, selection, edges=True), reference)
    others = reference or (Reference(prompts) if chosen.baseline == "mean" else None)
    for selected in answers(model, encoded, request, others, memory, None):
        yield _links(model, selected, request)


def _links(model: Model, selected: SelectedNodes, request: Request) -> Links:
    direct = edges_among(model, selected, request.settings)
    assert selected.gradients is not None  # every method brings them where edges are asked for
    weights = torch.tensor([weight for _, _, weight in selected.terms])
    size = torch.cat([torch.ones(len(selected.nodes)), weights.abs()])
    gradients = torch.cat([selected.gradients, weights.sign()])
    weight = direct.weight * size[:, None]
    moved = weight if direct.from_baseline is None else direct.from_baseline * size[:, None]
    return Links(
        prompt=selected,
        weight=weight,
        moved=moved,
        attribution=moved * gradients[:, None],
        incoming=direct.incoming * size,
        values=direct.target_values * size,
        gradients=gradients,
    )
