"""The graph engine: direct edges between nodes, from one forward (method.md section 4).

*replay* (attribution/replay.py) is matrix products over the frozen linear map. *autograd* takes the same gradients
through the linearised model itself, with detached MLPs: it is the truth that the replay is tested against, and is used
where weights cannot be read (quantised, offloaded) or rules are switched off.

Knows which engine applies and what an edge's numbers mean. Refuses to know nnsight, selection and files.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tracer.attribution.replay import EdgeRequest, Replay
from tracer.attribution.result import check_finite
from tracer.errors import JobError, ModelError
from tracer.model import passes
from tracer.model.model import Model
from tracer.settings import BASES, RULES

MAX_REPLAY_BYTES = 16 * 2**20
MAX_AUTOGRAD_BYTES = 2**28


@dataclass(frozen=True)
class Edges:
    """Direct edges of one prompt, dense. Sources: the neurons as given, then every embedding by position. Targets:
    the neurons as given, then the logits as given.

    Attributes:
        weight: of each edge, in units of the target's activation; 0 where no direct path exists.
        incoming: of each target, summed over *all* neurons and embeddings of the model, kept or not.
        source_values: of the neurons. target_values: of the neurons and logits.
        from_baseline: like weight, with the source's distance from its baseline in the place of its value; None where
            all baselines are zero.
    """

    weight: Float[Tensor, "target source"]
    incoming: Float[Tensor, " target"]
    source_values: Float[Tensor, " neuron"]
    target_values: Float[Tensor, " target"]
    from_baseline: Float[Tensor, "target source"] | None = None


def direct_edges(
    model: Model,
    token_ids: tuple[int, ...],
    neurons: Int[Tensor, "neuron 3"],
    logits: Int[Tensor, "logit 2"],
    *,
    basis: str = "activation",
    rules: frozenset[str] = RULES,
    engine: str = "auto",
    direction: str = "auto",
    max_bytes: int = MAX_REPLAY_BYTES,
    baselines: tuple[Float[Tensor, " neuron"], Float[Tensor, "pos d_model"]] | None = None,
) -> Edges:
    """All direct edges among neurons, embeddings and logits of one prompt: from earlier layers to later ones, and to no
    earlier token unless attention looks at later ones.

    Without biases the incoming weights of a target add up to its value over all sources (method.md section 8, 3-4).

    Args:
        neurons: (layer, position, neuron) rows; `neuron` indexes the basis.
        logits: (position, token) rows.
        rules: of the linearisation; the replay needs all of them.
        engine: ``replay``, ``autograd``, or ``auto``: the replay wherever it applies.
        direction: of the replay, ``up``, ``down``, or ``auto`` for the cheaper one.
        max_bytes: bytes of cotangents the replay may hold at a time, beside the edges themselves and, where the model
            is not float32, a float32 copy of one matrix.
        baselines: of the neurons, and of the embeddings, where they are not all zero.

    Raises:
        JobError: a node outside the model or the prompt, or an unknown basis, engine or direction.
        ModelError: the replay was asked for where it does not apply, or weights do not add up where they must.
    """
    _check(model, token_ids, neurons, logits, basis, engine, direction)
    graph = EdgeRequest(tuple(token_ids), neurons, logits, basis, baselines)
    possible = model.replays(rules)
    if engine == "replay" and not possible:
        raise ModelError(
            "engine='replay'", "needs all four rules and float weights in memory", "use engine='auto' or 'autograd'"
        )
    if engine == "autograd" or not possible:
        edges = _by_autograd(model, graph, rules)
    else:
        replay = Replay(model, graph, max_bytes)
        weight, incoming, from_baseline = replay.run(direction)
        values = torch.cat([replay.values, replay.frozen.logits.cpu()])
        edges = Edges(weight, incoming, replay.values, values, from_baseline)
    check_sum(model, edges, rules)
    return edges


def check_permitted(model: Model, rules: frozenset[str] = RULES) -> None:
    """Refuse edges where neither gradients nor weights are available, before anything is computed.

    Raises:
        RemoteError: the server takes no gradients, and the replay does not apply.
    """
    if not model.replays(rules):
        instead = "use edges=False"
        more = "ask its operator for the tag 'trusted'" if model.has_weights else "weights='local'"
        passes.needs_gradients(model, "the search for edges", f"{instead}, or {more}")


def check_sum(model: Model, edges: Edges, rules: frozenset[str]) -> None:
    """Refuse edges whose incoming weights do not add up to their target's value, where they must: under all rules,
    without biases; and those that are no numbers."""
    check_finite({"edge weight": edges.weight[None]})
    if rules != RULES or model.has_biases:
        return
    scale = float(edges.target_values.abs().max()) if len(edges.target_values) else 0.0
    worst = float((edges.incoming - edges.target_values).abs().max()) if scale else 0.0
    if not worst <= (1e-3 if model.conserves else 0.2) * scale:
        raise ModelError(
            f"edges: incoming weights miss their target's value by {worst:.3g} of {scale:.3g}",
            "without biases they must add up to it",
            "these edges are wrong: run 'tracer doctor' and report the model",
        )


def _check(
    model: Model, token_ids: tuple[int, ...], neurons: Tensor, logits: Tensor, basis: str, engine: str, direction: str
) -> None:
    """Refuse indices that would raise later, or silently read another node."""
    allowed = {
        "basis": (basis, BASES),
        "engine": (engine, ("auto", "replay", "autograd")),
        "direction": (direction, ("auto", "up", "down")),
    }
    for name, (value, known) in allowed.items():
        if value not in known:
            raise JobError(f"{name}={value!r}", f"must be one of {', '.join(known)}", "choose one")
    length = len(token_ids)
    bounds = torch.tensor([model.n_layers, length, model.n_neurons(basis)])
    for what, rows, limit in (("node", neurons, bounds), ("logit", logits, torch.tensor([length, model.vocab_size]))):
        outside = ((rows < 0) | (rows >= limit)).any(-1)
        if bool(outside.any()):
            bad = tuple(rows[outside][0].tolist())
            inside = "x".join(f"0..{size - 1}" for size in limit.tolist())
            raise JobError(
                f"{what} {bad}", f"lies outside the model on this prompt ({inside})", "check where it came from"
            )


def _by_autograd(model: Model, graph: EdgeRequest, rules: frozenset[str]) -> Edges:
    """Batched vector-Jacobian products through the linearised model, with detached MLPs."""
    values, weight, embedded, incoming, from_baseline = passes.direct_weights(
        model,
        graph.token_ids,
        graph.neurons,
        graph.logits,
        basis=graph.basis,
        rules=rules,
        max_bytes=MAX_AUTOGRAD_BYTES,
        baselines=graph.baselines,
    )
    return Edges(torch.cat([weight, embedded], -1), incoming, values[: len(graph.neurons)], values, from_baseline)
