"""One function per pass over a model: a batch in, plain tensors out.

Each pass is one forward, and one backward where it says so, over a left-padded batch. Nothing is left on the model. A
remote model's pass is the same function: its block travels to the server, with the plain values that it names, and its
result comes back (ndif/server.py). `with model.nn.trace(...)` stands here, and in model/traces.py where sessions on a
server run it too. What a pass means (attribution, ablation) is decided by its callers; what runs inside a trace is
model/interventions.py; where modules are is model/families.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import nnsight
import torch
from torch import Tensor

from tracer.errors import RemoteError
from tracer.metrics import Metric
from tracer.model import interventions, traces
from tracer.model.backend import Of
from tracer.model.model import Model
from tracer.prompts import Batch
from tracer.shapes import Embedded, Logits, PaddedNodes, PerPrompt

NO_RULES = traces.NO_RULES


@dataclass(frozen=True)
class Gradients:
    """What a pass with a backward returns; neurons are float32 on the CPU.

    Attributes:
        values: of the neurons, in the chosen basis.
        gradients: of the metric with respect to them.
        embedding: the embedding's output (or its replacement).
        embedding_gradient: of the metric with respect to it.
        metric: of each prompt.
    """

    values: PaddedNodes
    gradients: PaddedNodes
    embedding: Embedded
    embedding_gradient: Embedded
    metric: PerPrompt


def inputs(model: Model, batch: Batch, kept: int = 1) -> dict[str, Any]:
    """The model's keyword arguments for a batch, of which it returns logits of the last `kept` columns.

    Raises:
        ValueError: prompts that must not share a batch (`Model.borders`): their numbers would depend on one another.
    """
    if len({model.side(len(ids)) for ids in batch.token_ids}) > 1:
        raise ValueError(
            f"prompts of lengths that must not share one are in a batch: {sorted(map(len, batch.token_ids))}"
        )
    return batch.inputs(model.device, kept)


def asking(model: Model, batch: Batch, metric: Metric | None) -> dict[str, Any]:
    """The `inputs` of a batch and the `metric`'s fields as traces take them (`interventions.score`). Where these read
    rows of the head, the model itself makes as few logits as it can."""
    kept = 1 if metric is None or model.plan.head_rows else metric.kept
    fields = None if metric is None else SimpleNamespace(**vars(metric))
    return {"inputs": inputs(model, batch, kept), "metric": fields}


def logits(model: Model, batch: Batch, kept: int = 1, *, rules: frozenset[str] = NO_RULES) -> Logits:
    """The logits of the last `kept` columns, float32. One forward."""
    nn, plan = model.nn, model.plan
    with model.ready(), torch.no_grad():
        with nn.trace(**inputs(model, batch, kept), backend=model.backend.trace((_logits(model, batch, kept),))):
            if rules:
                interventions.through_blocks(nn, plan, rules, "activation")
            saved = nnsight.save(interventions.to_cpu(interventions.logits(nn, plan, rules)))
    return saved[0]


def gradients(
    model: Model,
    batch: Batch,
    metric: Metric,
    *,
    rules: frozenset[str] = NO_RULES,
    basis: str = "activation",
    embedding: Embedded | None = None,
) -> Gradients:
    """Values of every neuron and the metric's gradient to each. One forward, one backward.

    Args:
        rules: the RelP rules in force; none is the plain gradient.
        embedding: put in place of the embedding's output.
    """
    needs_gradients(model)
    nodes, embedded = _nodes(model, batch, basis), _embedded(model, batch)
    ask = SimpleNamespace(
        **asking(model, batch, metric),
        rules=rules,
        basis=basis,
        embedding=embedding,
        dtype=model.plan.transfer_dtype,
        n_neurons=model.n_neurons(basis),
    )
    parts = session(model, traces.stacked, ask, (nodes, nodes, embedded, embedded, _each(batch)))
    return Gradients(parts[0].float(), parts[1].float(), *parts[2:])


def values(
    model: Model, batch: Batch, *, basis: str = "activation", embedding: Embedded | None = None
) -> tuple[PaddedNodes, Embedded]:
    """Values of every neuron, and the embedding's output. One forward, without the head."""
    dtype, form = model.plan.transfer_dtype, (_nodes(model, batch, basis), _embedded(model, batch))
    ask = SimpleNamespace(
        **asking(model, batch, None), basis=basis, embedding=embedding, dtype=dtype, n_neurons=model.n_neurons(basis)
    )
    parts = session(model, traces.stacked, ask, form)
    return parts[0].float(), parts[1]


def pooled(model: Model, batch: Batch, how: str, *, basis: str = "activation") -> Tensor:
    """How far each neuron is above 0, and below, over a prompt's positions [prompt, layer, 2, neuron], float32. One
    forward, without the head; no position leaves the device.

    Args:
        how: at the ``last`` position, or the ``mean`` or ``max`` over all.
    """
    shape = len(batch.token_ids), model.n_layers, 2, model.n_neurons(basis)
    n_neurons, dtype = model.n_neurons(basis), model.plan.transfer_dtype
    ask = SimpleNamespace(inputs=inputs(model, batch), basis=basis, how=how, dtype=dtype, n_neurons=n_neurons)
    return session(model, traces.pooled, ask, Of(shape, model.plan.transfer_dtype)).float()


def routed(model: Model, batch: Batch) -> tuple[Tensor, ...]:
    """Which experts each token goes to, of every layer that has some [prompt, column, slot]. One forward, without the
    head; nothing else leaves the device."""
    mixtures = [one for one in model.experts if one is not None]
    form = tuple(Of((len(batch.token_ids), batch.width, one.n_used), torch.int64) for one in mixtures)
    return session(model, traces.routed, SimpleNamespace(inputs=inputs(model, batch)), form)


def chosen(model: Model, batch: Batch, neurons: Sequence[tuple[int, int]]) -> Tensor:
    """Values of some neurons at every column [prompt, column, neuron], float32 on the CPU; padding has some too. One
    forward, without the head; only these values leave the device.

    Args:
        neurons: (layer, neuron)s, each once, rising.
    """
    if list(neurons) != sorted({*neurons}) or not neurons:
        raise ValueError("neurons must rise, and there must be one")
    layers = [[neuron for at, neuron in neurons if at == layer] for layer in range(model.n_layers)]
    each = [torch.tensor(some, dtype=torch.long) for some in layers]
    ask = SimpleNamespace(inputs=inputs(model, batch), neurons=each)
    return session(model, traces.chosen, ask, Of((len(batch.token_ids), batch.width, len(neurons))))


def ablated(
    model: Model,
    batch: Batch,
    metric: Metric,
    *,
    layer: int,
    where: tuple[Tensor, Tensor, Tensor],
    to: Tensor,
    basis: str = "activation",
) -> PerPrompt:
    """The metric after setting single neurons of one layer. One forward.

    Args:
        where: (row, column, neuron) index tensors, one entry per neuron that is set.
        to: the value of each.
    """
    ask = SimpleNamespace(**asking(model, batch, metric), layer=layer, where=where, to=to, basis=basis)
    return session(model, traces.set_nodes, ask, _each(batch))


def embedding(model: Model, batch: Batch) -> Embedded:
    """What leaves the embedding. The forward ends there."""
    return session(model, traces.embedding, inputs(model, batch), _embedded(model, batch))


def embeddings_ablated(
    model: Model, batch: Batch, metric: Metric, *, where: tuple[Tensor, Tensor], to: Tensor
) -> PerPrompt:
    """The metric after setting the embedding's output at single tokens. One forward.

    Args:
        where: (row, column) index tensors, one entry per token that is set.
        to: the vector of each [token, d_model].
    """
    ask = SimpleNamespace(**asking(model, batch, metric), layer=None, where=where, to=to, basis="activation")
    return session(model, traces.set_nodes, ask, _each(batch))


def from_embedding(model: Model, batch: Batch, metric: Metric, embedding: Embedded) -> PerPrompt:
    """The metric with the embedding's output replaced. One forward."""
    ask = SimpleNamespace(**asking(model, batch, metric), embedding=embedding)
    return session(model, traces.metric_from, ask, _each(batch))


def read(model: Model, batch: Batch) -> Embedded:
    """What leaves the final norm. The forward ends there."""
    return session(model, traces.read, SimpleNamespace(inputs=inputs(model, batch)), _embedded(model, batch))


def terms(model: Model, batch: Batch, metric: Metric) -> Tensor:
    """The values [term] that a metric of something inside the model is read from, float32. One forward."""
    ask = SimpleNamespace(**asking(model, batch, metric))
    return session(model, traces.terms, ask, Of((len(metric.row),)))


@dataclass(frozen=True)
class Edit:
    """What is done to some neurons of one layer: ``value`` becomes ``scale * value + shift`` where `mask` holds.

    Ablating and setting are scale 0, multiplying is shift 0, adding is scale 1.

    Attributes:
        layer: whose neurons.
        mask: which of them [prompt or 1, column or 1, neuron]; a column axis of 1 means every column.
        scale, shift: numbers, or tensors of the mask's shape.
    """

    layer: int
    mask: Tensor
    scale: Tensor | float
    shift: Tensor | float

    @property
    def parts(self) -> tuple[int, Tensor, Tensor | float, Tensor | float]:
        """Its fields, as `interventions.apply_edits` takes them."""
        return self.layer, self.mask, self.scale, self.shift


def intervened(
    model: Model, batch: Batch, edits: Sequence[Edit], *, basis: str = "activation", kept: int = 1
) -> Logits:
    """The logits of the last `kept` columns with the edits in force, in their order. One forward.

    An edit whose mask has a column axis covers the batch's columns, padding included.
    """
    nn, plan, rules, parts = model.nn, model.plan, NO_RULES, [edit.parts for edit in edits]
    with model.ready(), torch.no_grad():
        with nn.trace(**inputs(model, batch, kept), backend=model.backend.trace((_logits(model, batch, kept),))):
            interventions.through_blocks(
                nn, plan, rules, basis, lambda at, value, where: interventions.apply_edits(parts, at, value, where)
            )
            saved = nnsight.save(interventions.to_cpu(nn.output.logits))
    return saved[0]


@dataclass(frozen=True)
class Multiplied:
    """What is done to single neurons of one prompt in several rows, and what is read.

    Attributes:
        entries: rows of (layer, row, position or -1 for every one, neuron), none twice. scale: of each.
        members: (layer, position, neuron) whose values are read, in the order of layers.
        tokens: whose logits and probabilities are read.
    """

    entries: Tensor
    scale: Tensor
    members: Tensor
    tokens: Tensor


def swept(
    model: Model, token_ids: tuple[int, ...], n_rows: int, what: Multiplied, *, basis: str = "activation"
) -> tuple[Tensor, ...]:
    """One prompt in `n_rows` rows, the first as it is: what `traces.swept` returns. One forward."""
    ask = SimpleNamespace(inputs=inputs(model, Batch((token_ids,) * n_rows)), basis=basis, **vars(what))
    read = Of((n_rows, len(what.tokens) + 1))
    form = read, read, Of((n_rows,), torch.int64, n_logits(model)), Of((n_rows,)), Of((n_rows, len(what.members)))
    return session(model, traces.swept, ask, form)


@dataclass(frozen=True)
class Sampling:
    """How generated tokens are drawn, instead of the likeliest ones.

    Attributes:
        temperature: above 0; logits are divided by it.
        top_p: only the likeliest tokens whose probabilities reach that sum; 1 for all.
        seeds: of each row's own generator.
    """

    temperature: float
    top_p: float
    seeds: tuple[int, ...]


def generated(
    model: Model,
    batch: Batch,
    edits: Sequence[Edit],
    *,
    everywhere: Sequence[Edit] = (),
    max_new_tokens: int,
    basis: str = "activation",
    sampling: Sampling | None = None,
) -> Tensor:
    """Generated token ids [prompt, new], under `edits` on the prompt and `everywhere` on it and every new token.
    Generation ends early where every prompt has ended.

    Each token is the one of the largest logit, or drawn as `sampling` says, whatever the model's generation_config has:
    its sampling, penalties and forbidden tokens are left alone, only its end tokens count.
    """
    always = [edit.parts for edit in everywhere]
    ask = SimpleNamespace(
        inputs=inputs(model, batch),
        most=max_new_tokens,
        basis=basis,
        first=[edit.parts for edit in edits] + always,
        later=always,
        ends=model.end_tokens,
        sampling=None if sampling is None else SimpleNamespace(**vars(sampling)),
    )
    form = Of((len(batch.token_ids), range(1, max_new_tokens + 1)), torch.int64, n_logits(model))
    return session(model, traces.continued, ask, form)


def session(model: Model, function: Callable[..., Any], ask: Any, form: Any) -> Any:
    """What `function(nn, plan, ask)` returns, all its traces in one request to a server; it travels as its source.

    Args:
        form: of what it returns; see `tracer.model.backend.Of`.
    """
    with model.ready():
        return model.backend.session(model.nn, model.plan, function, ask, form)


def top_tokens(model: Model, batch: Batch, columns: Sequence[int], count: int) -> Tensor:
    """The `count` likeliest tokens at each prompt's column, counted from the end [prompt, count]. One forward."""
    nn, plan, given = model.nn, model.plan, inputs(model, batch, -min(columns))
    form = Of((len(columns), count), torch.int64, n_logits(model))
    with model.ready(), torch.no_grad():
        with nn.trace(**given, backend=model.backend.trace(form)):
            out = interventions.logits(nn, plan, NO_RULES).float()
            at = torch.stack([row[column] for row, column in zip(out, columns, strict=True)])
            saved = nnsight.save(at.topk(count).indices.cpu())
    return saved


def probe(
    model: Model, token_ids: Sequence[int], steps: Sequence[float], direction: Tensor, projection: Tensor
) -> tuple[Tensor, Tensor, float, str, tuple[bool, bool, str]]:
    """The small measurements that show whether a server can be trusted, one row for each of `steps`. One forward.

    The embedding of a row is moved by its step times `direction` [pos, d_model], in units of their norms' ratio.

    Returns:
        The first block's output times `projection` [row], the last logits [row, vocab], the unit, the activations'
        dtype, and `interventions.weights`.
    """
    batch, sizes = Batch((tuple(token_ids),) * len(steps)), torch.tensor(list(steps))[:, None, None]
    nn, plan = model.nn, model.plan
    form = Of((len(steps),), finite=True), Of((len(steps), n_logits(model))), float, str, (bool, bool, str)
    with model.ready(), torch.no_grad():
        with nn.trace(**inputs(model, batch), backend=model.backend.trace(form)):
            output = nn.get(plan.embedding).output
            unit = output[0].float().norm() / direction.norm().to(output.device)
            moved = output.float() + (sizes * direction[None]).to(output.device) * unit
            nn.get(plan.embedding).output = moved.to(output.dtype)
            out = interventions.first_output(nn, plan)
            projected = (out.float() * projection.to(out.device)).sum((1, 2))
            measured = interventions.to_cpu(projected, nn.output.logits[:, -1])
            saved = nnsight.save((*measured, float(unit), str(output.dtype), interventions.weights(nn._module)))
    return saved


def probe_gradient(model: Model, token_ids: Sequence[int], direction: Tensor, projection: Tensor) -> float:
    """The derivative along `direction` of what `probe` reads of the first block. One forward, one backward."""
    batch = Batch((tuple(token_ids),))
    nn, plan = model.nn, model.plan
    with model.ready(), torch.inference_mode(False), torch.enable_grad():
        with nn.trace(**inputs(model, batch), backend=model.backend.trace((Of(()),))):
            entered = interventions.embed_leaf(nn, plan, None, True)
            out = interventions.first_output(nn, plan)
            (grad,) = torch.autograd.grad((out.float() * projection.to(out.device)).sum(), [entered])
            saved = nnsight.save(interventions.to_cpu((grad[0].float() * direction.to(grad.device)).sum()))
    return float(saved[0])


# What a server must send back.


def n_logits(model: Model) -> int:
    """Numbers that the output head makes, which may be more than there are tokens."""
    return int(model.module.get_output_embeddings().weight.shape[0])


def _logits(model: Model, batch: Batch, kept: int) -> Of:
    return Of((len(batch.token_ids), kept, n_logits(model)))


def _nodes(model: Model, batch: Batch, basis: str) -> Of:
    shape = len(batch.token_ids), model.n_layers, batch.width, model.n_neurons(basis)
    return Of(shape, model.plan.transfer_dtype)


def _embedded(model: Model, batch: Batch) -> Of:
    return Of((len(batch.token_ids), batch.width, model.d_model))


def _each(batch: Batch) -> Of:
    return Of((len(batch.token_ids),))


def needs_gradients(model: Model, what: str = "this", instead: str | None = None) -> None:
    """Refuse what cannot be done where a server takes no gradients.

    Args:
        what: needs them. instead: what works without; by default, of attributions.

    Raises:
        RemoteError: the server takes none.
    """
    if model.backend.gradients:
        return
    raise RemoteError(
        f"model {model.name!r} on {model.backend.host}",
        f"{what} needs gradients, which the server does not grant this key ({model.backend.reason})",
        instead or _without_gradients(model),
    )


def _without_gradients(model: Model) -> str:
    """What a user can do instead of taking gradients on a server."""
    trusted = "ask its operator for the tag 'trusted'"
    if not model.has_weights:
        return f"use method relp with all its rules and weights='local', or {trusted}"
    if not model.weights_readable:
        return f"{trusted}: weights here that are quantised or offloaded do not replace them"
    return f"only method relp with all its rules works without: use that, or {trusted}"
