"""Prompt in, circuit out: the nodes selected, the edges between them, and what is needed to read them.

Knows which arguments go together, and which prompts are worked out where the model is and which here. Refuses to know
nnsight (model/passes.py), how numbers are computed (attribution/circuits.py), how they become a `Circuit`
(attribution/graph.py) and files (store/).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypedDict, Unpack

from torch import Tensor

from tracer.attribution.attribute import Reference, attributed, means_of, prepared, settled, split
from tracer.attribution.edges import check_permitted
from tracer.attribution.exact import FORWARD_ONLY, Progress
from tracer.attribution.graph import Making
from tracer.attribution.pruning import Pruning
from tracer.attribution.reduce import from_attributions
from tracer.attribution.request import Request, SelectedNodes, answered
from tracer.attribution.selection import Selection, check_selection
from tracer.attribution.targets import Of, target
from tracer.choices import Baseline, Basis, Method, MetricKind, Rule, RulesName
from tracer.circuit.circuit import Circuit
from tracer.errors import JobError, option, quoted, say
from tracer.model.model import Model
from tracer.model.named import AnyModel, model_of
from tracer.model.state import undisturbed
from tracer.prompts import Asked, Encoded, Ids, Prompt, Target, as_prompt
from tracer.settings import (
    BASES,
    EDGE_BASES,
    SUMS_OF_TARGETS,
    Settings,
    settings,
)
from tracer.system import bars


@undisturbed()
def trace(
    model: AnyModel,
    prompt: Asked,
    nodes: int | None = None,
    method: Method | str = "relp",
    edges: bool | None = None,
    *,
    target: Target | None = None,
    foil: Target | None = None,
    counterfactual: str | Ids | None = None,
    answer: str | Ids | None = None,
    bos: bool = False,
    baseline: Baseline | str | None = None,
    basis: Basis | str = "activation",
    rules: RulesName | Iterable[Rule | str] | None = None,
    steps: int = 10,
    metric: MetricKind | str = "auto",
    top_k: int = 5,
    share: float | None = None,
    of: Of = None,
    seed: int = 0,
    reference: Sequence[Asked] | Reference | None = None,
    threshold: float | None = None,
    mass: float | None = None,
    skip_first: bool = False,
    exclude: Iterable[tuple[int, int]] = (),
    pruning: Pruning | None = None,
    profiles: bool = False,
    progress: Progress | bool | None = None,
) -> Circuit:
    """One prompt's circuit: its strongest nodes and the direct edges between them, with the metric and the checks.

        tracer.trace("demo", "The secretaries near the car", target=" are", foil=" is")

    Args:
        model: from `tracer.load`, or the name of a model (``"demo"``, a folder, a Hugging Face id), which is loaded and
            kept until a call names another.
        prompt: a `tracer.Prompt`, or its text; without a target, the model's own top token is asked about.
        nodes: how many neurons to keep, by ``|attribution|``; without this, `threshold` or `mass` the 200 strongest.
        method: ``relp``, ``grad``, ``ig``, ``conductance``, ``ig-activation``, ``relp-ig`` (``ig`` with the linearised
            model's gradient at every step), ``exact`` (every node ablated, the oracle), or the controls ``delta`` and
            ``random``.
        edges: trace the direct edges among them; by default where the metric is a sum of logits, which edges can
            lead into. They are edges of the RelP linearisation whatever the method.
        target, foil, counterfactual, answer, bos: of a prompt that is a text, as `tracer.Prompt` has them.
        baseline: what a node's value is compared with: ``zero``, ``mean`` (per position over `reference`) or
            ``counterfactual``; if None, ``counterfactual`` where the prompt has one, else ``zero``.
        basis: ``activation`` (d_mlp nodes per layer and position), or with d_model: ``output`` (of the MLP),
            ``residual`` (what a block leaves in the residual stream), ``attention`` (what its attention adds to it).
        rules: which RelP rules are on: any of ``norm``, ``attention``, ``activation``, and ``product`` (the half rule)
            or ``gate`` (the linear gate); all with ``product`` if None. Also a name: ``all``, ``no-half``,
            ``linear-gate``.
        steps: of the path methods.
        metric: ``logit``, ``difference``, ``topk``, ``share``, ``logprob``, ``centred``; ``auto`` takes the difference
            where a foil is given, the log-probability of an answer, else the target's logit.
        top_k: tokens that ``topk`` sums: the model's own at the position read.
        share: of the next token's probability, between 0 and 1: the metric is the mean logit of the fewest of the
            model's own tokens that hold it, each weighed by its probability, which is a constant.
        of: instead of tokens, what is asked about inside the model: a neuron, ``"L12 N345"``, of an expert that runs
            there ``"L3 E17 N45"`` (with ``-`` behind it what drives it below 0), or what `tracer.direction` makes. The
            metric is its value where the logits would be read.
        seed: of ``random``.
        reference: prompts whose mean activations are the baseline ``mean``.
        threshold: keep nodes whose ``|attribution|`` is at least this share of ``|metric|``.
        mass: keep the fewest nodes that hold this share of the summed ``|attribution|``.
        skip_first: leave out nodes at position 0.
        exclude: leave out these neurons, as (layer, neuron), at every position.
        pruning: which edges to keep; shares of .01 and more if None.
        profiles: keep the attribution profile of each node: what each token's embedding does to it, and what it does to
            each target logit (`Circuit.profiles`). They are total effects in the RelP linearisation, as edges are its
            direct ones, whatever the method.
        progress: a bar appears on a terminal and in a notebook after half a second; False for none, or a function
            that is called with (done, total): steps of the method; prompts, where they take more than one batch.

    Returns:
        The circuit. In a notebook it is a table; `Circuit.show`, `Circuit.plot` and `Circuit.view` show more.

    Raises:
        JobError: a prompt or setting is wrong, or has no effect.
        ModelError: a number is not finite, or conservation fails where it must hold.
        RemoteError: a server fails, or does not permit it for this key; edges and profiles need gradients there, or
            weights here.

    Source: Arora et al. 2026 (arXiv 2601.22594), sections 2 and 3.
    """
    model = model_of(model)
    asked = {"target": target, "foil": foil, "counterfactual": counterfactual, "answer": answer, "bos": bos}
    prompt = as_prompt(prompt, **asked)
    how: dict[str, Any] = {"baseline": baseline, "basis": basis, "rules": rules, "steps": steps, "metric": metric}
    how |= {"top_k": top_k, "share": share, "of": of, "seed": seed, "reference": reference, "threshold": threshold}
    how |= {"mass": mass, "skip_first": skip_first, "exclude": exclude, "pruning": pruning, "profiles": profiles}
    with bars.shown(progress, f"tracing by {method}") as report:
        (circuit,) = trace_all(model, [prompt], nodes=nodes, method=method, edges=edges, progress=report, **how)
    say(note for note in circuit.warnings if note not in model.warnings)  # `load` said those
    return circuit


class Options(TypedDict, total=False):
    """The arguments of `trace` but for the model, the prompt and the progress, with their defaults."""

    nodes: int | None
    method: Method | str
    edges: bool | None
    baseline: Baseline | str | None
    basis: Basis | str
    rules: RulesName | Iterable[Rule | str] | None
    steps: int
    metric: MetricKind | str
    top_k: int
    share: float | None
    of: Of
    seed: int
    reference: Sequence[Asked] | Reference | None
    threshold: float | None
    mass: float | None
    skip_first: bool
    exclude: Iterable[tuple[int, int]]
    pruning: Pruning | None
    profiles: bool


def trace_all(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    memory: int | None = None,
    progress: Progress | None = None,
    whole: Callable[[Tensor], None] | None = None,
    **options: Unpack[Options],
) -> Iterator[Circuit]:
    """The circuits of many prompts, attributed together in batches of at most `memory` bytes.

    The circuits are those that `trace` gives for each prompt alone, up to the last bits, which a batch's padding may
    change; the same call gives the same bits.

    Args:
        whole: called with each prompt's attributions of all nodes [layer, pos, neuron], before its circuit comes.
        options: as in `trace`.

    Raises:
        JobError, ModelError, RemoteError: as `trace`; nothing is returned for the prompts after one that raises.
    """
    started, how = time.perf_counter(), dict[str, Any](options)
    kept = {name: how.pop(name) for name in ("skip_first", "exclude") if name in how}
    reference, pruning, nodes = how.pop("reference", None), options.get("pruning"), options.get("nodes")
    profiles = bool(options.get("profiles"))
    chosen, edges = checked(prompts, **how)
    reference = None if reference is None else Reference.of(reference)
    selection = Selection.of(nodes, options.get("threshold"), options.get("mass"), **kept)
    request = Request(chosen, selection, edges, whole=whole is not None, profiles=profiles)
    request, encoded = prepared_request(model, prompts, request, reference)
    others = reference or (Reference(prompts) if chosen.baseline == "mean" else None)
    every = answers(model, encoded, request, others, memory, progress)
    pruned = (pruning or Pruning()) if edges else None
    made = Making(model, request.settings, pruned, request.selection, nodes, reference, profiles)
    yield from made.circuits(every, (time.perf_counter() - started) / len(prompts), whole)


def prepared_request(
    model: Model, prompts: Sequence[Prompt], request: Request, reference: Reference | None
) -> tuple[Request, list[Encoded]]:
    """The request with its metric resolved, and the prompts as tokens; refused before anything is computed."""
    chosen, encoded = prepared(model, prompts, request.settings, reference)
    for what in ("edges", "profiles"):
        if getattr(request, what):
            check_permitted(model, chosen.edge_rules, what)
    for layer, neuron in request.selection.exclude:
        model.check_neuron(f"exclude={quoted((layer, neuron))}", layer, neuron, chosen.basis)
    return replace(request, settings=chosen), encoded


def answers(
    model: Model,
    encoded: Sequence[Encoded],
    request: Request,
    reference: Reference | None,
    memory: int | None,
    progress: Progress | None,
) -> Iterable[SelectedNodes]:
    """The selected nodes of every prompt that is `prepared`: worked out where the model is or, where that cannot be
    asked in one request, from the attributions of all nodes."""
    chosen = request.settings
    if can_ask(model, chosen, request.linearised):
        parts = list(split(model, [len(prompt.token_ids) for prompt in encoded], memory))
        means = means_of(model, encoded, chosen, reference, memory)
        return answered(model, encoded, replace(request, means=means), parts, progress)
    keep = request.linearised or chosen.method not in FORWARD_ONLY
    result = attributed(model, encoded, chosen, reference, memory, progress, keep)
    return from_attributions(model, encoded, result, request)


def can_ask(model: Model, chosen: Settings, linearised: bool) -> bool:
    """Whether circuits are worked out where the model is, and with them what is `linearised`: edges and profiles. Not
    so by ``exact``, which takes more passes than one request should hold; nor on a server that takes no gradients, or
    would have to be sent the means of all nodes."""
    if chosen.method == "exact" or (chosen.baseline == "mean" and not model.backend.near):
        return False
    return model.backend.gradients or (chosen.method in FORWARD_ONLY and not linearised)


def checked(
    prompts: Sequence[Prompt],
    nodes: int | None = None,
    edges: bool | None = None,
    *,
    baseline: str | None = None,
    threshold: float | None = None,
    mass: float | None = None,
    pruning: Pruning | None = None,
    **how: Any,
) -> tuple[Settings, bool]:
    """The settings that the arguments of `trace` come to, and whether edges are traced; needs no model.

    Raises:
        JobError: what `trace` refuses and no model decides.
    """
    check_selection(nodes, threshold, mass)
    profiles = how.pop("profiles", False)
    metric, basis = how.get("metric", "auto"), how.get("basis", "activation")
    how["of"] = target(how.get("of"))
    if metric == "auto" and how["of"] is None and any(prompt.answer for prompt in prompts):
        metric = "logprob"
    may = metric in SUMS_OF_TARGETS | {"auto"} and (basis in EDGE_BASES or basis not in BASES)
    if edges and not may and metric in SUMS_OF_TARGETS | {"auto"}:
        rule = "has no direct edges, which run between what MLPs hold or write"
        raise JobError(option("basis", basis), rule, f"use {option('edges', False)}, or another basis")
    if edges and not may:
        step = f"use {option('edges', False)}"
        if any(prompt.answer for prompt in prompts):
            step += f", or {option('metric', 'logit')} for the sum of an answer's logits"
        raise JobError(f"edges with metric {metric!r}", "edges lead into single logits", step)
    edges = may if edges is None else edges
    if profiles and basis in BASES and basis not in EDGE_BASES:
        rule = "has no attribution profiles, which are of what MLPs hold or write"
        raise JobError(option("basis", basis), rule, f"leave out {option('profiles')}")
    if pruning is not None and not edges:
        raise JobError("pruning", "has no effect without edges", "leave one of them out")
    return settings(baseline=settled(baseline, prompts, how.get("method", "relp")), **how), edges
