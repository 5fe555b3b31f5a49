"""A circuit's request as one record, and its answers: what travels to where the model is, and what comes back of it.

Knows which prompts share a request, the form of an answer, and the checks that every number passes. What is computed is
attribution/circuits.py; pruning and circuits are attribution/trace.py. Refuses to know nnsight (model/passes.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tracer.attribution import circuits
from tracer.attribution.edges import Edges, check_sum, workspace
from tracer.attribution.exact import FORWARD_ONLY, Progress
from tracer.attribution.methods import METHODS
from tracer.attribution.profiles import Profiles, check_profiles
from tracer.attribution.result import check_conservation, check_finite
from tracer.attribution.selection import NodeIndex, Selection
from tracer.errors import JobError, RemoteError, quoted
from tracer.metrics import Metric, entries
from tracer.model import passes
from tracer.model.backend import Maybe, Of
from tracer.model.model import Model
from tracer.prompts import Batch, Encoded
from tracer.settings import Settings, TargetNeuron
from tracer.shapes import MeanValues

TOP = 5
"""Predictions that are kept."""


@dataclass(frozen=True)
class Request:
    """What is asked of every prompt.

    Attributes:
        settings: how nodes are attributed. selection: which of them are kept.
        edges: whether the direct edges among them are found. profiles: whether their attribution profiles are.
        means: of every node per position, where they are the baseline.
        whole: whether the attributions of all nodes are wanted beside the circuit.
    """

    settings: Settings
    selection: Selection
    edges: bool
    means: MeanValues | None = None
    whole: bool = False
    profiles: bool = False

    @property
    def linearised(self) -> bool:
        """Whether anything of the RelP linearisation is asked for, whatever the method."""
        return self.edges or self.profiles


@dataclass(frozen=True)
class SelectedNodes:
    """One prompt's selected nodes, and what else its circuit reports.

    Attributes:
        encoded: the prompt, its targets resolved.
        nodes: selected, strongest first; attributions and activations are theirs.
        embeddings: attribution of each token's embedding, in metric units.
        metric, unexplained, start: as in `Attribution`, numbers.
        largest, total: the largest |attribution| of all nodes, and their sum. n_total: how many there are.
        terms: the (position, token, weight) of each logit in the metric; logits, chances and ranks are their values,
            probabilities, and places among all tokens' probabilities, from 1.
        top: the likeliest tokens where the metric is read, and their probabilities.
        edges: among the selected nodes, if they were asked for.
        gradients: of the metric at the nodes, if they are known. baselines: of the nodes; None where all are zero.
        whole: attributions of all nodes [layer, pos, neuron], if they were asked for.
        profiles: of the selected nodes, if they were asked for.
    """

    encoded: Encoded
    nodes: NodeIndex
    attributions: Float[Tensor, " node"]
    activations: Float[Tensor, " node"]
    embeddings: Float[Tensor, " pos"]
    metric: float
    unexplained: float
    start: float | None
    largest: float
    total: float
    n_total: int
    terms: list[tuple[int, int, float]]
    logits: Float[Tensor, " term"]
    chances: Float[Tensor, " term"]
    ranks: Int[Tensor, " term"]
    top: tuple[Tensor, Tensor]
    edges: Edges | None = None
    gradients: Float[Tensor, " node"] | None = None
    baselines: Float[Tensor, " node"] | None = None
    whole: Float[Tensor, "layer pos neuron"] | None = None
    profiles: Profiles | None = None


def answered(
    model: Model, encoded: Sequence[Encoded], request: Request, parts: Sequence[range], progress: Progress | None
) -> Iterator[SelectedNodes]:
    """The answer of every prompt, worked out where the model is: a batch, or a request to a server, for each of
    `parts`.

    Raises:
        JobError: a prompt without a target whose top tokens differ between positions.
        ModelError: a number is not finite, conservation fails, or edges do not add up.
        RemoteError: as any pass.
    """

    def batch(part: range) -> list[SelectedNodes]:
        # Here a method's steps are progress; a server only says when it is done.
        near = model.backend.near
        found = ask(model, [encoded[i] for i in part], request, progress if near else None)
        if progress is not None and not near:
            progress(part.stop, len(encoded))
        return found

    for some in model.each(batch, parts):
        check(model, some, request.settings)
        for selected in some:
            if selected.edges is not None:
                check_sum(model, selected.edges, request.settings.edge_rules)
            if selected.profiles is not None:
                check_profiles(model, selected.profiles, selected.activations, request.settings)
        yield from some


def ask(model: Model, encoded: Sequence[Encoded], request: Request, progress: Progress | None) -> list[SelectedNodes]:
    """The answers of one batch."""
    asked = question(
        model, encoded, request.settings, request.means, progress, edges=request.edges, profiles=request.profiles
    )
    asked.selection, asked.top, asked.whole = request.selection.plain(), TOP, request.whole
    forms = [_form(model, asked, row) for row in range(len(encoded))]
    answers = passes.session(model, circuits.circuits, asked, forms)
    for answer in answers:
        nodes, most = answer["nodes"], request.selection.limit or len(answer["nodes"])
        if len(nodes) > most or len({*map(tuple, nodes.tolist())}) < len(nodes):
            rule = f"was to select up to {most} nodes, each once, and sent {len(nodes)}"
            raise RemoteError(f"model {quoted(model.name)} on a server", rule, "tell its operator")
    return [
        read(model, settled(prompt, answer["tokens"], request.settings), answer, request.settings)
        for prompt, answer in zip(encoded, answers, strict=True)
    ]


def question(
    model: Model,
    encoded: Sequence[Encoded],
    chosen: Settings,
    means: Tensor | None = None,
    progress: Progress | None = None,
    *,
    edges: bool = False,
    profiles: bool = False,
) -> SimpleNamespace:
    """What `methods.attributions` is asked of one batch, as plain values; a prompt without a target is asked about the
    model's own top tokens, which the same pass finds."""
    batch, paired = Batch(tuple(prompt.token_ids for prompt in encoded)), None
    metric = metric_of(opened(model, encoded, chosen), chosen)
    if chosen.baseline == "counterfactual":
        paired = passes.inputs(model, Batch(tuple(prompt.counterfactual_ids or () for prompt in encoded)))
    linearised = edges or profiles
    by_replay = linearised and model.replays_there(chosen.edge_rules)
    if metric.of is not None and (metric.of.kind != "neuron" or chosen.basis != "activation"):
        by_replay = False  # which knows what logits read, and nodes of the basis
    if chosen.method not in FORWARD_ONLY or linearised:
        passes.needs_gradients(model, f"method {chosen.method}")
    return SimpleNamespace(
        **passes.asking(model, batch, metric),
        paired=paired,
        token_ids=batch.token_ids,
        find=METHODS[chosen.method],
        method=chosen.method,
        rules=frozenset(chosen.rules),
        basis=chosen.basis,
        n_neurons=model.n_neurons(chosen.basis),
        steps=chosen.steps,
        seed=chosen.seed,
        means=means,
        edge_rules=chosen.edge_rules if linearised else None,
        constants=by_replay,
        link=None if not edges else circuits.by_replay if by_replay else circuits.by_autograd,
        profile=None if not profiles else circuits.profiles_of(metric.of, by_replay),
        max_bytes=workspace(model, by_replay),
        report=progress,
    )


def opened(model: Model, encoded: Sequence[Encoded], chosen: Settings) -> list[Encoded]:
    """Prompts whose targets are settled, or where none is given stand for the model's n-th likeliest token: -n.

    Raises:
        JobError: more tokens than there are, or one prompt's would differ between positions.
    """
    if chosen.of is not None:
        return list(encoded)
    count = wanted(chosen)
    if count > model.vocab_size:
        raise JobError(f"top_k={count}", f"the vocabulary has {model.vocab_size} tokens", "use fewer")
    for prompt in encoded:
        if not prompt.target_ids and len(prompt.positions) > 1:
            raise JobError(
                f"positions {list(prompt.positions)}",
                "the model's top tokens differ between positions",
                "give a target",
            )
    own = tuple(range(-1, -1 - count, -1))
    return [prompt if prompt.target_ids else replace(prompt, target_ids=own) for prompt in encoded]


def wanted(chosen: Settings) -> int:
    """How many of the model's own top tokens stand for a target that is not given."""
    return chosen.top_k if chosen.metric == "topk" else 1


def settled(prompt: Encoded, tokens: Tensor, chosen: Settings) -> Encoded:
    """A prompt with its targets, from the tokens of its metric's terms; without any where what is asked about is inside
    the model."""
    if prompt.target_ids or chosen.of is not None:
        return prompt
    return replace(prompt, target_ids=tuple(tokens.tolist()))


def terms_of(prompt: Encoded, chosen: Settings) -> list[tuple[int, int, float]]:
    """The (position, token, weight) of each entry of a prompt's metric, its targets known; the token is 0 where what is
    read is inside the model."""
    if chosen.of is not None:
        weight = (chosen.of.sign if isinstance(chosen.of, TargetNeuron) else 1) / len(prompt.positions)
        return [(position, 0, weight) for position in prompt.positions]
    if prompt.answer:
        return [(position, token, 1.0) for position, token in zip(prompt.positions, prompt.target_ids, strict=True)]
    if chosen.metric == "share":
        (position,) = prompt.positions
        return [(position, token, weight) for token, weight in zip(prompt.target_ids, prompt.weights, strict=True)]
    return entries(prompt.positions, prompt.target_ids, prompt.foil_ids, chosen.metric)


def metric_of(prompts: Sequence[Encoded], chosen: Settings) -> Metric:
    """The metric of a batch of prompts whose targets are known."""
    terms = [
        (row, pos - len(prompt.token_ids), token, weight)
        for row, prompt in enumerate(prompts)
        for pos, token, weight in terms_of(prompt, chosen)
    ]
    row, column, token, weight = (torch.tensor(part) for part in zip(*terms, strict=True))
    return Metric(chosen.metric, row, column, token, weight.float(), len(prompts), inside_of(chosen))


def inside_of(chosen: Settings) -> SimpleNamespace | None:
    """What is asked about inside the model, as `Metric.of` has it."""
    of = chosen.of
    if of is None:
        return None
    if isinstance(of, TargetNeuron):
        return SimpleNamespace(kind=of.kind, layer=of.layer, neuron=of.number, vector=None)
    return SimpleNamespace(kind=of.kind, layer=of.layer, neuron=None, vector=torch.tensor(of.vector))


def _form(model: Model, ask: SimpleNamespace, row: int) -> dict[str, Any]:
    """What `circuits.circuits` must send of one prompt."""
    length, terms, nodes = len(ask.token_ids[row]), int((ask.metric.row == row).sum()), f"nodes {row}"
    vocabulary, n_neurons = passes.n_logits(model), model.n_neurons(ask.basis)
    of_nodes, of_terms, top = Of((nodes,)), Of((terms,), torch.float64), min(ask.top, vocabulary)
    form: dict[str, Any] = {
        "nodes": Of((nodes, 3), torch.int32, (model.n_layers, length, n_neurons)),
        "attributions": of_nodes,
        "activations": of_nodes,
        "gradients": Maybe(of_nodes),
        "baselines": Maybe(of_nodes),
        "largest": float,
        "total": float,
        "embeddings": Of((length,)),
        "metric": float,
        "start": Maybe(float),
        "tokens": Of((terms,), torch.int64, vocabulary),
        "logits": Of((terms,)),
        "chances": of_terms,
        "ranks": Of((terms,), torch.int64),
        "top": Of((top,), torch.int64, vocabulary),
        "top_chances": Of((top,), torch.float64),
        "whole": Of((model.n_layers, length, n_neurons)) if ask.whole else None,
    }
    if ask.profile is not None:
        form["profiles"] = Of((nodes, length)), Of((nodes, terms))
    if ask.link is not None:
        targets, sources = (nodes, terms), (nodes, length)
        weight, into = Of((targets, sources)), Of((targets,))
        form["edges"] = weight, into, into, Maybe(weight)
    return form


def read(model: Model, encoded: Encoded, answer: dict[str, Any], chosen: Settings) -> SelectedNodes:
    """The answer of `circuits.circuits` for one prompt, its targets settled, as a record."""
    edges = None
    if "edges" in answer:
        weight, incoming, values, from_baseline = answer["edges"]
        edges = Edges(weight, incoming, values[: len(answer["nodes"])], values, from_baseline)
    base = answer["baselines"]
    same = ("attributions", "activations", "embeddings", "metric", "start", "largest", "total", "logits", "chances")
    return SelectedNodes(
        encoded=encoded,
        nodes=answer["nodes"].long(),
        unexplained=float(torch.tensor(answer["metric"]) - answer["embeddings"].sum()),
        n_total=model.n_nodes(chosen.basis) * len(encoded.token_ids),
        terms=terms_of(encoded, chosen),
        top=(answer["top"], answer["top_chances"]),
        edges=edges,
        baselines=base if base is not None and base.any() else None,
        profiles=Profiles(*answer["profiles"]) if "profiles" in answer else None,
        **{name: answer[name] for name in (*same, "ranks", "gradients", "whole")},
    )


def _sum(prompt: SelectedNodes) -> Tensor:
    """Of all other numbers, which is finite if they are."""
    edges = prompt.edges
    linked = () if edges is None else (edges.weight, edges.incoming, edges.target_values, edges.from_baseline)
    nodes = prompt.attributions, prompt.activations, prompt.gradients, prompt.baselines
    sides = () if prompt.profiles is None else (prompt.profiles.inputs, prompt.profiles.outputs)
    said = prompt.logits, prompt.chances, prompt.top[1], *sides
    return torch.stack([one.double().sum() for one in (*nodes, *said, *linked) if one is not None]).sum()


def check(model: Model, selected: Iterable[SelectedNodes], chosen: Settings) -> None:
    """The checks that `attribute` makes. The total covers every node's attribution, and so its value."""
    selected = list(selected)
    metric = torch.tensor([prompt.metric for prompt in selected])
    embeddings = torch.nn.utils.rnn.pad_sequence([prompt.embeddings for prompt in selected], batch_first=True)
    total = torch.tensor([prompt.total for prompt in selected], dtype=torch.float64)
    others = torch.stack([_sum(prompt) for prompt in selected])
    check_finite({"metric": metric, "embedding attribution": embeddings, "attribution": total, "result": others})
    if chosen.conserves and model.conserves:
        check_conservation(metric, embeddings)
