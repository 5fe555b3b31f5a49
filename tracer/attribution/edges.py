"""Direct edges between nodes that are known, from one forward (method.md section 4).

*replay* (attribution/replay.py) is matrix products over the frozen linear map. *autograd* takes the same gradients
through the linearised model itself, with detached MLPs: it is the truth that the replay is tested against, and is used
where weights cannot be read (quantised, offloaded) or rules are switched off.

Knows which engine applies and what an edge's numbers mean. Refuses to know nnsight, selection and files.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tracer.attribution import backward, circuits, replay
from tracer.attribution.result import check_finite
from tracer.attribution.running import Running
from tracer.errors import JobError, ModelError, option
from tracer.metrics import Metric
from tracer.model import passes
from tracer.model.backend import Maybe, Of
from tracer.model.model import Model
from tracer.prompts import Batch
from tracer.settings import EDGE_BASES, LINEARISED, RULES

WHAT = {"edges": "the search for edges", "profiles": "attribution profiles"}
"""What needs the linearisation, by the option that asks for it."""
LEAST_WORKSPACE, AUTOGRAD_WORKSPACE = 2**26, 2**28
SHARE_OF_BUDGET = 16


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


class Inside(NamedTuple):
    """What stands in the place of logits.

    Attributes:
        at: (position, anything) rows: where it is read. of: what it is, as `Metric.of` has it.
    """

    at: Int[Tensor, "logit 2"]
    of: SimpleNamespace


def workspace(model: Model, by_replay: bool) -> int:
    """Bytes that the search for edges may hold at a time beside the edges themselves: of residual streams, and for the
    replay more on a larger device."""
    return max(LEAST_WORKSPACE, model.budget() // SHARE_OF_BUDGET) if by_replay else AUTOGRAD_WORKSPACE


def direct_edges(
    model: Model,
    token_ids: tuple[int, ...],
    neurons: Int[Tensor, "neuron 3"],
    logits: Int[Tensor, "logit 2"] | Inside,
    *,
    basis: str = "activation",
    rules: frozenset[str] = RULES,
    engine: str = "auto",
    baselines: tuple[Float[Tensor, " neuron"], Float[Tensor, "pos d_model"]] | None = None,
) -> Edges:
    """All direct edges among neurons, embeddings and logits of one prompt: from earlier layers to later ones, and to no
    earlier token unless attention looks at later ones.

    Without biases the incoming weights of a target add up to its value over all sources (method.md section 8, 3-4).

    Args:
        neurons: (layer, position, neuron) rows; `neuron` indexes the basis.
        logits: (position, token) rows; or what stands in their place, into which edges are found by autograd.
        rules: of the linearisation; the replay needs all of them, with the half rule or the linear gate.
        engine: ``replay``, ``autograd``, or ``auto``: the replay wherever it applies.
        baselines: of the neurons, and of the embeddings, where they are not all zero.

    Raises:
        JobError: a node outside the model or the prompt, one whose expert did not run there, or an unknown basis or
            engine.
        ModelError: the replay was asked for where it does not apply, or weights do not add up where they must.
    """
    check_nodes(model, token_ids, neurons, logits, basis, engine)
    return edges_of(model, token_ids, neurons, logits, basis=basis, rules=rules, engine=engine, baselines=baselines)


def edges_of(
    model: Model,
    token_ids: tuple[int, ...],
    neurons: Int[Tensor, "neuron 3"],
    logits: Int[Tensor, "logit 2"] | Inside,
    *,
    basis: str = "activation",
    rules: frozenset[str] = RULES,
    engine: str = "auto",
    baselines: tuple[Float[Tensor, " neuron"], Float[Tensor, "pos d_model"]] | None = None,
) -> Edges:
    """`direct_edges` of nodes that may be the same on many prompts: of one whose expert did not run on this prompt the
    value is 0, and so are its edges."""
    ask, there = posed(model, token_ids, neurons, logits, basis, rules, engine, baselines)
    ask.link = circuits.by_replay if ask.constants else circuits.by_autograd
    if ask.constants and not there:
        (parts,) = _from_constants(model, ask)
    else:
        if not ask.constants:
            passes.needs_gradients(model)
        targets, sources = len(neurons) + ask.n_ends, len(neurons) + len(token_ids)
        weight, into = Of((targets, sources)), Of((targets,))
        (parts,) = passes.session(model, circuits.edges_of, ask, [(weight, into, into, Maybe(weight))])
    weight, incoming, values, from_baseline = parts
    edges = Edges(weight, incoming, values[: len(neurons)], values, from_baseline)
    check_sum(model, edges, rules)
    return edges


def check_nodes(
    model: Model, token_ids: tuple[int, ...], neurons: Tensor, logits: Tensor | Inside, basis: str, engine: str
) -> None:
    """Refuse nodes that are not there: outside the model or the prompt, or of an expert that did not run.

    Raises:
        JobError: names one.
    """
    check_ends(model, token_ids, neurons, logits.at if isinstance(logits, Inside) else logits, basis, engine)
    check_running(model, token_ids, neurons, basis)


def posed(
    model: Model,
    token_ids: tuple[int, ...],
    neurons: Tensor,
    logits: Tensor | Inside,
    basis: str,
    rules: frozenset[str],
    engine: str,
    baselines: tuple[Tensor, Tensor] | None,
) -> tuple[SimpleNamespace, bool]:
    """What is asked of some nodes and the ends, checked, but for the function that answers; and whether the replay can
    run where the model is. `constants` says that the replay is used, `n_ends` how many logits there are, or what stands
    in their place."""
    logits, of = logits if isinstance(logits, Inside) else (logits, None)
    check_ends(model, token_ids, neurons, logits, basis, engine)
    model.check_rules(rules)
    by_replay, there = (False, False) if of is not None else engine_of(model, rules, engine)
    ask = question(model, token_ids, neurons, logits, basis, baselines, of)
    ask.constants, ask.edge_rules, ask.max_bytes = by_replay, rules, workspace(model, by_replay)
    ask.n_ends = len(logits)
    return ask, there


def engine_of(model: Model, rules: frozenset[str], engine: str) -> tuple[bool, bool]:
    """Whether the replay is used, and whether it can run where the model is.

    Raises:
        ModelError: it was asked for where it does not apply.
    """
    there, here = model.replays_there(rules), model.replays(rules)
    if engine == "replay" and not (there or here):
        raise ModelError(
            "engine='replay'",
            "needs all four rules, float weights in memory, and blocks that it knows (docs/families.md)",
            "use engine='auto' or 'autograd'",
        )
    return engine != "autograd" and (there or here), there


def question(
    model: Model,
    token_ids: tuple[int, ...],
    neurons: Tensor,
    logits: Tensor,
    basis: str,
    baselines: tuple[Tensor, Tensor] | None,
    of: SimpleNamespace | None = None,
) -> SimpleNamespace:
    """What `circuits.edges_of` is asked of some nodes and logits, but for the engine."""
    row, column = torch.zeros(len(logits), dtype=torch.long), logits[:, 0] - len(token_ids)
    metric = Metric("logit", row, column, logits[:, 1], torch.ones(len(logits)), 1, of)
    return SimpleNamespace(
        **passes.asking(model, Batch((tuple(token_ids),)), metric),
        token_ids=(tuple(token_ids),),
        basis=basis,
        answers=[{"nodes": neurons, "baselines": None if baselines is None else baselines[0]}],
        paired=None if baselines is None else baselines[1][None],
    )


def _from_constants(model: Model, ask: SimpleNamespace) -> list[Any]:
    """The replay here, of a prompt's constants from a server that neither takes gradients nor shows weights."""
    (answer,), (ids,) = ask.answers, ask.token_ids
    frozen = backward.constants(model, Batch((ids,)), answer["nodes"], ask.basis)
    found = SimpleNamespace(tokens=ask.metric.token, read=frozen.read, paired=ask.paired)
    prompts = circuits.walks(model.nn, model.plan, ask, found, ask.answers, [frozen])
    return replay.linked(model.module, model.plan, prompts, ask.max_bytes)


def check_permitted(model: Model, rules: frozenset[str] = RULES, what: str = "edges") -> None:
    """Refuse edges (or `profiles`) where neither gradients nor weights are available, before anything is computed.

    Raises:
        RemoteError: the server takes no gradients, and the replay does not apply.
    """
    if not (model.replays(rules) or model.replays_there(rules)):
        instead = "use edges=False" if what == "edges" else f"leave out {option(what, True)}"
        more = "ask its operator for the tag 'trusted'" if model.has_weights else "weights='local'"
        passes.needs_gradients(model, WHAT[what], f"{instead}, or {more}")


def check_sum(model: Model, edges: Edges, rules: frozenset[str]) -> None:
    """Refuse edges whose incoming weights do not add up to their target's value, where they must: under all rules
    (`LINEARISED`), without biases; and those that are no numbers."""
    check_finite({"edge weight": edges.weight[None]})
    if rules not in LINEARISED or model.has_biases:
        return
    scale = float(edges.target_values.abs().max()) if len(edges.target_values) else 0.0
    worst = float((edges.incoming - edges.target_values).abs().max()) if scale else 0.0
    if not worst <= (1e-3 if model.conserves else 0.2) * scale:
        raise ModelError(
            f"edges: incoming weights miss their target's value by {worst:.3g} of {scale:.3g}",
            "without biases they must add up to it",
            "these edges are wrong: run 'tracer doctor' and report the model",
        )


def check_ends(
    model: Model, token_ids: tuple[int, ...], neurons: Tensor, logits: Tensor, basis: str, engine: str
) -> None:
    """Refuse indices that would raise later, or silently read another node."""
    allowed = {"basis": (basis, sorted(EDGE_BASES)), "engine": (engine, ("auto", "replay", "autograd"))}
    for name, (value, known) in allowed.items():
        if value not in known:
            raise JobError(f"{name}={value!r}", f"must be one of {', '.join(known)}", "choose one")
    length = len(token_ids)
    bounds = torch.tensor([model.n_layers, length, model.n_neurons(basis)])
    check_widths(model, neurons, basis)
    for what, rows, limit in (("node", neurons, bounds), ("logit", logits, torch.tensor([length, model.vocab_size]))):
        outside = ((rows < 0) | (rows >= limit)).any(-1)
        if bool(outside.any()):
            bad = tuple(rows[outside][0].tolist())
            inside = "x".join(f"0..{size - 1}" for size in limit.tolist())
            raise JobError(
                f"{what} {bad}", f"lies outside the model on this prompt ({inside})", "check where it came from"
            )


def check_widths(model: Model, neurons: Tensor, basis: str) -> None:
    """Refuse neurons that their own layer does not have, though a wider one does."""
    if basis != "activation":
        return
    inside = neurons[((neurons[:, 0] >= 0) & (neurons[:, 0] < model.n_layers))]
    width = torch.tensor(model.widths)[inside[:, 0]]
    beyond = inside[(inside[:, 2] >= width) & (inside[:, 2] < model.d_mlp)]
    for layer, position, neuron in beyond[:1].tolist():
        model.check_neuron(f"node {(layer, position, neuron)}", layer, neuron)


def check_running(model: Model, token_ids: tuple[int, ...], neurons: Tensor, basis: str) -> None:
    """Refuse neurons of experts that did not run at their position. One more forward, where any belongs to an expert.

    Raises:
        JobError: names the experts that did run.
    """
    numbering = model.numbering(basis)
    mine = [node for node in neurons.tolist() if numbering.expert(node[0], node[2]) is not None]
    if not mine:
        return
    there = Running.of(model, [tuple(token_ids)], basis)
    for layer, position, neuron in mine:
        if not there.has(layer, position, neuron):
            raise there.lacking(layer, position, neuron)
