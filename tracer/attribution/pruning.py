"""Which edges stay, and which nodes with them: arithmetic on one prompt's edges as columns, no model and no files.

Four rules, all optional and combined: a least share, a least attribution, the k strongest, and influence as in
attribution graphs. Nodes left without a way in or out can be removed with them. What the kept edges explain of each
node is computed here, so that a sparse graph cannot pass for a complete one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tracer.errors import JobError

PAPER_SHARE = 0.01


@dataclass(frozen=True)
class Pruning:
    """The rules; a rule that is None keeps everything.

    Attributes:
        share: least ``|share|`` of the target's activation (paper: .01); if None, .01 unless another rule is given. 0
            keeps every edge.
        attribution: least ``|attribution|``, in metric units.
        top: at most this many edges, strongest ``|attribution|`` first.
        node_influence: keep the fewest nodes that hold this share of all influence on the logits (usual: .8).
        edge_influence: keep the fewest edges that hold this share of the influence that flows (usual: .98).
        drop_dangling: remove neurons that no kept edge leads into or none leads out of, until none is left; always
            done with `node_influence`, which removes nodes already. Otherwise selected nodes stay, edges or not.
    """

    share: float | None = None
    attribution: float | None = None
    top: int | None = None
    node_influence: float | None = None
    edge_influence: float | None = None
    drop_dangling: bool = False

    @property
    def least_share(self) -> float | None:
        """The share in force: the paper's where nothing else prunes edges."""
        others = (self.attribution, self.top, self.node_influence, self.edge_influence)
        return PAPER_SHARE if self.share is None and all(rule is None for rule in others) else self.share

    def __post_init__(self) -> None:
        if self.share is not None and not 0 <= self.share <= 1:
            rule = "is a part of the target's activation: from 0 to 1"
            raise JobError(f"edge share={self.share}", rule, "the paper keeps shares of 0.01 and more")
        if self.attribution is not None and not 0 <= self.attribution < math.inf:
            raise JobError(f"edge attribution={self.attribution}", "must be 0 or more, in logits", "0.01 is usual")
        for name in ("node_influence", "edge_influence"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise JobError(f"{name}={value}", "must be above 0 and at most 1", "0.8 for nodes, 0.98 for edges")
        if self.top is not None and (isinstance(self.top, bool) or self.top != int(self.top) or self.top < 1):
            raise JobError(f"top edges={self.top}", "must be 1 or more", "leave it out to keep all")


@dataclass(frozen=True)
class EdgeColumns:
    """Edges as columns; `source` and `target` number the nodes of one prompt.

    `share` is NaN where the target's activation is 0: the weight then has no ratio to it. `flow` is what influence is
    counted with: the weight, or what of it comes from the source's distance from its baseline.
    """

    source: Int[Tensor, " edge"]
    target: Int[Tensor, " edge"]
    weight: Float[Tensor, " edge"]
    share: Float[Tensor, " edge"]
    attribution: Float[Tensor, " edge"]
    flow: Float[Tensor, " edge"]

    def __len__(self) -> int:
        return len(self.source)

    def where(self, keep: Tensor) -> EdgeColumns:
        """The edges at a mask or an index."""
        columns = (self.source, self.target, self.weight, self.share, self.attribution, self.flow)
        return EdgeColumns(*(column[keep] for column in columns))


@dataclass(frozen=True)
class Pruned:
    """What is left. Nodes are numbered anew in their old order.

    Attributes:
        edges: kept edges, strongest ``|attribution|`` first.
        nodes: old numbers of the kept nodes.
        explained: of each kept node, kept incoming weight over all incoming weight; NaN without any.
        influence: of each kept node on the logits, before pruning; the logits' own add up to 1.
    """

    edges: EdgeColumns
    nodes: Int[Tensor, " node"]
    explained: Float[Tensor, " node"]
    influence: Float[Tensor, " node"]


def prune(
    edges: EdgeColumns,
    is_neuron: Bool[Tensor, " node"],
    logit_weight: Float[Tensor, " node"],
    incoming: Float[Tensor, " node"],
    rules: Pruning,
    activation: Float[Tensor, " node"] | None = None,
) -> Pruned:
    """Apply the rules, and say what is left and what it explains.

    Args:
        is_neuron: which nodes may be removed: embeddings and logits always stay.
        logit_weight: of each logit in the metric, 0 elsewhere.
        incoming: total incoming weight of each node over all sources of the model; 0 where there is none.
        activation: of each node, where `flow` is not the weight: an edge whose flow is a large enough share of its
            target's activation stays, small as its weight may be.
    """
    flow = influence(edges, logit_weight)
    kept = torch.ones(len(edges), dtype=torch.bool)
    stays = torch.ones_like(is_neuron)
    if rules.node_influence is not None:
        through = flow - _of_logits(logit_weight)  # the logits' own is not counted, as in circuit-tracer
        stays = ~is_neuron | _fewest(through, rules.node_influence)
        kept &= stays[edges.source] & stays[edges.target]
    if rules.edge_influence is not None:
        left = edges.where(kept)  # what is left is normalised anew, as attribution graphs do
        strength = normalised(left, len(is_neuron)) * influence(left, logit_weight)[left.target]
        kept[kept.nonzero()[:, 0]] = _fewest(strength, rules.edge_influence)
    share = rules.least_share
    if share is not None:
        large = edges.share.abs() >= share
        if activation is not None:
            large |= (edges.flow / activation[edges.target]).abs() >= share
        kept &= large & edges.share.isfinite()
    if rules.attribution is not None:
        kept &= edges.attribution.abs() >= rules.attribution
    left = edges.where(kept)
    order = left.attribution.nan_to_num().abs().argsort(descending=True, stable=True)
    left = left.where(order[: rules.top] if rules.top is not None else order)
    if rules.drop_dangling or rules.node_influence is not None:
        stays, left = _without_dangling(left, is_neuron, stays)
    total = torch.zeros(len(is_neuron)).index_add(0, left.target, left.weight)
    explained = torch.where(incoming == 0, torch.nan, total / torch.where(incoming == 0, 1.0, incoming))
    nodes, number = stays.nonzero()[:, 0], stays.cumsum(0) - 1
    edges = replace(left, source=number[left.source], target=number[left.target])
    return Pruned(edges, nodes, explained[nodes], flow[nodes])


def influence(edges: EdgeColumns, logit_weight: Float[Tensor, " node"]) -> Float[Tensor, " node"]:
    """How much of the logits flows through each node: |flow| normalised per target, summed over all paths.

    It is relative to the nodes of this graph: what nodes outside it contribute is not counted, so that a node's
    influence falls as more nodes are selected. `Pruned.explained` says how much is missing.

    Edges form a graph without cycles, so that the sum over paths ends after as many steps as the longest path.

    Source: attribution graphs (Ameisen et al. 2025), as in circuit-tracer's pruning.
    """
    start = _of_logits(logit_weight)
    share = normalised(edges, len(start))
    total, step = start, start
    while bool(step.any()):
        step = torch.zeros_like(start).index_add(0, edges.source, share * step[edges.target])
        total = total + step
    return total


def _of_logits(logit_weight: Tensor) -> Tensor:
    """What influence begins with: the logits' shares of the metric."""
    return logit_weight.abs() / logit_weight.abs().sum().clamp_min(torch.finfo(torch.float32).tiny)


def normalised(edges: EdgeColumns, n_nodes: int) -> Float[Tensor, " edge"]:
    """Each edge's |flow| as a share of all |flow| into its target."""
    total = torch.zeros(n_nodes).index_add(0, edges.target, edges.flow.abs())
    return edges.flow.abs() / total[edges.target].clamp_min(torch.finfo(torch.float32).tiny)


def _fewest(strength: Tensor, mass: float) -> Tensor:
    """The fewest entries that hold a share of the total, as a mask."""
    values, order = strength.sort(descending=True, stable=True)
    before = values.double().cumsum(0) - values.double()
    keep = (before < mass * values.double().sum()) & (values > 0)
    return torch.zeros_like(keep).index_put((order,), keep)


def _without_dangling(edges: EdgeColumns, is_neuron: Tensor, stays: Tensor) -> tuple[Tensor, EdgeColumns]:
    """Remove neurons without an edge in or without one out, until none is left."""
    while True:
        has_in, has_out = torch.zeros_like(stays), torch.zeros_like(stays)
        has_in[edges.target] = True
        has_out[edges.source] = True
        next_stays = stays & (~is_neuron | (has_in & has_out))
        if torch.equal(next_stays, stays):
            return stays, edges
        stays = next_stays
        edges = edges.where(stays[edges.source] & stays[edges.target])
