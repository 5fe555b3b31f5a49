"""What the numbers of a saved circuit must obey among themselves (method.md sections 2, 4 and 8).

A file may be intact and still not be a circuit: written by hand, or by another program. Knows the identities that can
be checked from a circuit's own tables. Refuses to know models and files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from tracer.settings import VALUE_TIMES_GRADIENT

if TYPE_CHECKING:
    from tracer.circuit.circuit import Circuit

_CLOSE = 1e-3
"""Of the larger number: columns are float32, and a path method's gradient is a mean over its steps."""


def broken(circuit: Circuit) -> str | None:
    """The first identity that a circuit breaks, as the rule of an error; None if it obeys all."""
    return next(_broken(circuit), None)


def _broken(circuit: Circuit) -> Iterator[str]:
    """All that are broken."""
    if not all(0 <= share <= 1 + _CLOSE for share in (circuit.kept_mass, *circuit.probabilities)):
        yield "a share or a probability is not between 0 and 1"
    if not circuit.n_nodes <= circuit.n_selected <= circuit.n_total:
        yield "more nodes are kept than there are"
    yield from _of_nodes(circuit)
    if circuit.links is not None:
        yield from _of_edges(circuit, circuit.links)
    if circuit.profiles is not None:
        yield from _of_profiles(circuit, circuit.profiles)


def _of_nodes(circuit: Circuit) -> Iterator[str]:
    nodes, kinds = circuit.nodes, np.array(circuit.nodes["kind"].to_pylist())
    if not all(_finite(nodes[name]) for name in ("activation", "attribution", "gradient")):
        yield "an activation, an attribution or a gradient is not finite"
    numbering = circuit.numbering
    named = [
        numbering.expert(layer, neuron) if kind == "neuron" else None
        for kind, layer, neuron in zip(*(nodes[name].to_pylist() for name in ("kind", "layer", "neuron")), strict=True)
    ]
    if nodes["expert"].to_pylist() != named:
        yield "a node's expert is not the one that its neuron belongs to"
    attribution = nodes["attribution"].to_numpy()
    parts = attribution[kinds == "embedding"].astype(np.float64)
    if len(parts) == len(circuit.tokens):
        scale = max(np.abs(parts).sum(), abs(circuit.metric), abs(circuit.unexplained))
        if not abs(circuit.metric - parts.sum() - circuit.unexplained) <= _CLOSE * scale:
            yield "the metric is not what its tokens' embeddings attribute and leave unexplained"
    if circuit.settings.baseline == "zero" and circuit.settings.method in ("relp", "grad"):
        product = nodes["activation"].to_numpy() * nodes["gradient"].to_numpy()
        here = (kinds == "neuron") & np.isfinite(product)
        if not _equal(attribution[here], product[here]):
            yield "a neuron's attribution is not its activation times its gradient"


def _of_edges(circuit: Circuit, links: pa.Table) -> Iterator[str]:
    nodes = {name: circuit.nodes[name].to_numpy() for name in ("layer", "activation", "attribution")}
    source, target = (links[end].to_numpy() for end in ("source", "target"))
    weight, share, attribution = (links[name].to_numpy() for name in ("weight", "share", "attribution"))
    if not (_finite(links["weight"]) and _finite(links["attribution"])):
        yield "an edge's weight or attribution is not finite"
    if (nodes["layer"][source] >= nodes["layer"][target]).any():
        yield "an edge does not lead into a later layer"
    known = np.isfinite(share)
    if not _equal(weight[known], (share * nodes["activation"][target])[known]):
        yield "an edge's weight is not its share of its target's activation"
    if circuit.settings.baseline != "zero":
        return
    by_share = circuit.settings.method in VALUE_TIMES_GRADIENT
    whole = share * nodes["attribution"][target] if by_share else weight * circuit.nodes["gradient"].to_numpy()[target]
    known = np.isfinite(whole)
    if not _equal(attribution[known], whole[known]):
        yield "an edge's attribution is not its part of its target's"


def _of_profiles(circuit: Circuit, profiles: pa.Table) -> Iterator[str]:
    sides = [profiles[name].combine_chunks().flatten() for name in ("input", "output")]
    if any(side.null_count or not np.isfinite(side.to_numpy()).all() for side in sides):
        yield "a profile is not finite"
    weights = np.array([row["gradient"] for row in circuit.ends], np.float64)
    if circuit.settings.method == "relp" and np.isfinite(weights).all():
        output = sides[1].to_numpy().reshape(-1, len(weights)).astype(np.float64)
        attribution = circuit.neurons["attribution"].to_numpy()
        scale = np.maximum((np.abs(output) * np.abs(weights)).sum(1), np.abs(attribution))
        if not (np.abs(output @ weights - attribution) <= _CLOSE * scale + 1e-6 * np.abs(attribution).max()).all():
            yield "what a neuron does to the logits is not its attribution"


def _finite(column: pa.ChunkedArray) -> bool:
    return bool(np.isfinite(column.drop_null().to_numpy()).all())


def _equal(left: np.ndarray, right: np.ndarray) -> bool:
    """Whether two columns are equal but for rounding."""
    scale = np.maximum(np.maximum(np.abs(left), np.abs(right)), np.finfo(np.float32).tiny / _CLOSE)
    return bool((np.abs(left - right) <= _CLOSE * scale + 1e-6 * np.abs(left).max(initial=0)).all())
