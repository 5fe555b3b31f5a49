"""Attribution profiles of nodes that are known, from one forward (method.md section 7).

A profile says where a node's value comes from and what it does: the total effect of each position's embedding on it,
and its total effect on each target logit, both through everything between in the RelP linearisation, whatever method
ranked the nodes. *replay* (attribution/total.py) is matrix products over the frozen linear map. *autograd* takes the
same gradients by batched backwards through the linearised model: it is the truth that the replay is tested against,
and is used where weights cannot be read (quantised, offloaded) or rules are switched off.

Knows which engine applies and what a profile's numbers mean. Refuses to know nnsight, selection and files.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from tracer.attribution import backward, circuits, replay, total
from tracer.attribution.edges import Inside, check_nodes, posed
from tracer.attribution.result import check_finite
from tracer.errors import ModelError
from tracer.model import passes
from tracer.model.backend import Of
from tracer.model.model import Model
from tracer.prompts import Batch
from tracer.settings import LINEARISED, RULES, Settings


@dataclass(frozen=True)
class Profiles:
    """The attribution profiles of one prompt's nodes.

    Attributes:
        inputs: the effect of each position's embedding on each node, in units of the node's value: the embedding's
            distance from its baseline times the node's gradient. Without biases, and from baseline zero, those of a
            node add up to its value.
        outputs: the effect of each node on each logit, in logits: the node's distance from its baseline times the
            logit's gradient. Times the logits' weights in the metric they add up to the node's RelP attribution.
    """

    inputs: Float[Tensor, "node pos"]
    outputs: Float[Tensor, "node logit"]


def attribution_profiles(
    model: Model,
    token_ids: tuple[int, ...],
    neurons: Int[Tensor, "neuron 3"],
    logits: Int[Tensor, "logit 2"] | Inside,
    *,
    basis: str = "activation",
    rules: frozenset[str] = RULES,
    engine: str = "auto",
    baselines: tuple[Float[Tensor, " neuron"], Float[Tensor, "pos d_model"]] | None = None,
) -> Profiles:
    """The profiles of some neurons of one prompt; arguments as of `edges.direct_edges`.

    Raises:
        JobError: a node outside the model or the prompt, one whose expert did not run there, or an unknown basis or
            engine.
        ModelError: the replay was asked for where it does not apply, or effects do not add up where they must.
        RemoteError: neither gradients nor weights are available.
    """
    check_nodes(model, token_ids, neurons, logits, basis, engine)
    return profiles_of(model, token_ids, neurons, logits, basis=basis, rules=rules, engine=engine, baselines=baselines)


def profiles_of(
    model: Model,
    token_ids: tuple[int, ...],
    neurons: Int[Tensor, "neuron 3"],
    logits: Int[Tensor, "logit 2"] | Inside,
    *,
    basis: str = "activation",
    rules: frozenset[str] = RULES,
    engine: str = "auto",
    baselines: tuple[Float[Tensor, " neuron"], Float[Tensor, "pos d_model"]] | None = None,
) -> Profiles:
    """`attribution_profiles` of nodes that may be the same on many prompts: those of one whose expert did not run on
    this prompt are 0."""
    ask, there = posed(model, token_ids, neurons, logits, basis, rules, engine, baselines)
    ask.link = circuits.profiles_by_replay if ask.constants else circuits.profiles_by_autograd
    if ask.constants and not there:
        (parts,) = _from_constants(model, ask)
    else:
        if not ask.constants:
            passes.needs_gradients(model, "attribution profiles")
        form = Of((len(neurons), len(token_ids))), Of((len(neurons), ask.n_ends))
        (parts,) = passes.session(model, circuits.edges_of, ask, [form])
    return Profiles(*parts)


def _from_constants(model: Model, ask: SimpleNamespace) -> list[Any]:
    """The replay here, of a prompt's constants from a server that neither takes gradients nor shows weights."""
    (ids,) = ask.token_ids
    sent = backward.constants(model, Batch((ids,)))
    found = SimpleNamespace(tokens=ask.metric.token, read=sent.read, paired=ask.paired)
    prompts = circuits.walks(model.nn, model.plan, ask, found, ask.answers, [replay.unpadded(sent, 0, 0)])
    return total.profiled(model.module, model.plan, prompts, ask.max_bytes)


def check_profiles(model: Model, found: Profiles, values: Float[Tensor, " node"], chosen: Settings) -> None:
    """Refuse profiles that are no numbers, and those whose inputs do not add up to the nodes' `values` where they must:
    under all rules, without biases, and from embeddings of zero."""
    check_finite({"attribution profile": (found.inputs.sum(-1) + found.outputs.sum(-1))[None]})
    paired = chosen.baseline == "counterfactual"
    if chosen.edge_rules not in LINEARISED or model.has_biases or paired or not len(values):
        return
    off, scale = (found.inputs.sum(-1) - values).abs(), found.inputs.abs().sum(-1).clamp_min(float(values.abs().max()))
    worst = float((off / scale.clamp_min(1e-30)).max())
    if not worst <= (1e-3 if model.conserves else 0.2):
        raise ModelError(
            f"attribution profiles: effects of the embeddings miss their node's value by {worst:.2g} of it",
            "without biases they must add up to it",
            "these profiles are wrong: run 'tracer doctor' and report the model",
        )
