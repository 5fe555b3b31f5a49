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
from tracer.model import rules as linearize
from tracer.model.backend import Maybe, Of
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
        raise ValueError(f"prompts on both sides of {model.borders} tokens share a batch")
    return batch.inputs(model.device, kept)


def logits(model: Model, batch: Batch, kept: int = 1, *, rules: frozenset[str] = NO_RULES) -> Logits:
    """The logits of the last `kept` columns, float32. One forward."""
    with model.ready():
        backend = model.backend.trace((_logits(model, batch, kept),))
        return traces.logits(model.nn, model.plan, inputs(model, batch, kept), rules, backend)


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
    read, given = _differentiable(model, metric), inputs(model, batch, metric.kept)
    nodes, embedded = _nodes(model, batch, basis), _embedded(model, batch)
    with model.ready():
        backend = model.backend.trace((nodes, nodes, embedded, embedded, _each(batch)))
        parts = traces.gradients(model.nn, model.plan, given, read, rules, basis, embedding, backend)
    return Gradients(parts[0].float(), parts[1].float(), *parts[2:])


def values(
    model: Model, batch: Batch, *, basis: str = "activation", embedding: Embedded | None = None
) -> tuple[PaddedNodes, Embedded]:
    """Values of every neuron, and the embedding's output. One forward."""
    with model.ready():
        backend = model.backend.trace((_nodes(model, batch, basis), _embedded(model, batch)))
        parts = traces.values(model.nn, model.plan, inputs(model, batch), basis, embedding, backend)
    return parts[0].float(), parts[1]


def replaced(
    model: Model,
    batch: Batch,
    metric: Metric,
    *,
    layer: int,
    neurons: Tensor,
    basis: str = "activation",
) -> tuple[Tensor, PerPrompt]:
    """The metric and its plain gradient to one layer's neurons, set to `neurons` [prompt, column, neuron].

    One forward, one backward that ends at that layer.
    """
    read, given = _differentiable(model, metric), inputs(model, batch, metric.kept)
    with model.ready():
        backend = model.backend.trace((Of((len(batch.token_ids), batch.width, model.n_neurons(basis))), _each(batch)))
        parts = traces.replaced(model.nn, model.plan, given, read, layer, neurons, basis, backend)
    return parts[0], parts[1]


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
    nn, plan, rules, read = model.nn, model.plan, NO_RULES, metric.reader
    with model.ready(), torch.no_grad():
        with nn.trace(**inputs(model, batch, metric.kept), backend=model.backend.trace((_each(batch),))):
            interventions.through_blocks(
                nn,
                plan,
                rules,
                basis,
                lambda at, value: interventions.set_values(value, where, to) if at == layer else value,
            )
            saved = nnsight.save(interventions.to_cpu(read(interventions.logits(nn, plan, rules))))
    return saved[0]


def embedding(model: Model, batch: Batch) -> Embedded:
    """What leaves the embedding. The forward ends there."""
    with model.ready():
        return traces.embedding(
            model.nn, model.plan, inputs(model, batch), model.backend.trace((_embedded(model, batch),))
        )


def embeddings_ablated(
    model: Model, batch: Batch, metric: Metric, *, where: tuple[Tensor, Tensor], to: Tensor
) -> PerPrompt:
    """The metric after setting the embedding's output at single tokens. One forward.

    Args:
        where: (row, column) index tensors, one entry per token that is set.
        to: the vector of each [token, d_model].
    """
    nn, plan, rules, read = model.nn, model.plan, NO_RULES, metric.reader
    with model.ready(), torch.no_grad():
        with nn.trace(**inputs(model, batch, metric.kept), backend=model.backend.trace((_each(batch),))):
            nn.get(plan.embedding).output = interventions.set_values(nn.get(plan.embedding).output, where, to)
            saved = nnsight.save(interventions.to_cpu(read(interventions.logits(nn, plan, rules))))
    return saved[0]


def from_embedding(model: Model, batch: Batch, metric: Metric, embedding: Embedded) -> PerPrompt:
    """The metric with the embedding's output replaced. One forward."""
    read, given = metric.reader, inputs(model, batch, metric.kept)
    with model.ready():
        return traces.from_embedding(model.nn, model.plan, given, read, embedding, model.backend.trace((_each(batch),)))


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
                nn, plan, rules, basis, lambda at, value: interventions.apply_edits(parts, at, value)
            )
            saved = nnsight.save(interventions.to_cpu(nn.output.logits))
    return saved[0]


def generated(
    model: Model,
    batch: Batch,
    edits: Sequence[Edit],
    *,
    everywhere: Sequence[Edit] = (),
    max_new_tokens: int,
    basis: str = "activation",
) -> Tensor:
    """Greedily generated token ids [prompt, new], under `edits` on the prompt and `everywhere` on it and every new
    token. Generation ends early where every prompt has ended.

    Each token is the one of the largest logit, whatever the model's generation_config says: its sampling, penalties and
    forbidden tokens are left alone, only its end tokens count.
    """
    always = [edit.parts for edit in everywhere]
    ask = SimpleNamespace(
        inputs=inputs(model, batch),
        most=max_new_tokens,
        basis=basis,
        first=[edit.parts for edit in edits] + always,
        later=always,
        ends=model.end_tokens,
    )
    form = Of((len(batch.token_ids), range(1, max_new_tokens + 1)), torch.int64, n_logits(model))
    return session(model, traces.continued, ask, form)


@dataclass(frozen=True)
class FrozenBlock:
    """One block of one prompt, reduced to the constants of its linearisation; tensors stay on the block's device.

    Attributes:
        scales: statistic of each norm [pos], by path.
        pattern: of the attention [head, query, key].
        gate: input of the activation, up: the other factor (None without one); at the nodes asked for, either
            [node] (basis activation) or [node, d_mlp] (basis output).
        values: of the nodes asked for [node].
        output: of the MLP [pos, d_model]; in the basis activation without its bias, which belongs to no neuron.
    """

    scales: dict[str, Tensor]
    pattern: Tensor
    gate: Tensor
    up: Tensor | None
    values: Tensor
    output: Tensor


@dataclass(frozen=True)
class Frozen:
    """One prompt's linearised model as constants, for edges.

    Attributes:
        embedding: the embedding's output [pos, d_model].
        blocks: in order.
        final_scale: statistic of the final norm [pos].
        logits, uncapped: after and before the soft-cap, at the target logits [target].
    """

    embedding: Tensor
    blocks: list[FrozenBlock]
    final_scale: Tensor
    logits: Tensor
    uncapped: Tensor


def frozen(
    model: Model, token_ids: Sequence[int], nodes: Sequence[Tensor], logits_at: Tensor, *, basis: str = "activation"
) -> Frozen:
    """The constants of one prompt's linearisation. One forward.

    Args:
        nodes: for each layer, the (position, neuron) pairs whose coefficients are wanted [node, 2].
        logits_at: (position, token) pairs of the target logits [target, 2].
    """
    at = logits_at[:, 0]
    kept = len(token_ids) - int(at.min()) if len(at) else 1
    embedding, blocks, final_scale, capped, uncapped = coefficients(
        model, Batch((tuple(token_ids),)), kept, nodes, basis=basis
    )
    places = (at - len(token_ids) + kept).to(capped.device), logits_at[:, 1].to(capped.device)
    frozen_blocks = []
    for layer, (scales, pattern, gate, up, values, output) in enumerate(blocks):
        bias = getattr(model.part(layer, model.family.down), "bias", None)
        written = output[0] if basis == "output" or bias is None else output[0] - bias.float()
        rows = {path: scale[0] for path, scale in scales.items()}
        frozen_blocks.append(FrozenBlock(rows, pattern[0], gate, up, values, written))
    return Frozen(embedding[0], frozen_blocks, final_scale[0], capped[0][places], uncapped[0][places])


def coefficients(
    model: Model, batch: Batch, kept: int, nodes: Sequence[Tensor] | None = None, *, basis: str = "activation"
) -> tuple[Tensor, list[tuple[Any, ...]], Tensor, Tensor, Tensor]:
    """All constants of a batch's linearisation: the embedding, every block's `interventions.frozen_block`, the
    final norm's scale, and the logits of the last `kept` columns after and before the soft-cap. One forward.

    Args:
        nodes: for each layer, the (position, neuron) pairs of prompt 0 that are wanted [node, 2]; every neuron if None.
    """
    nn, plan = model.nn, model.plan
    with model.ready(), torch.no_grad():
        with nn.trace(
            **inputs(model, batch, kept), backend=model.backend.trace(_constants(model, batch, kept, nodes, basis))
        ):
            embedding = nn.get(plan.embedding).output.float()
            envoys = list(nn.get(plan.blocks))
            linearize.prepare(envoys, plan.steps)
            blocks = [
                interventions.frozen_block(block, plan, None if nodes is None else nodes[i], basis)
                for i, block in enumerate(envoys)
            ]
            final_scale = linearize.scale(plan.final_norm[0], nn.get(plan.final_norm[1]))
            uncapped, capped = nn.get(plan.head).output.float(), nn.output.logits.float()
            saved = nnsight.save((embedding, blocks, final_scale, capped, uncapped))
    return beside_weights(model, saved)


def beside_weights(model: Model, constants: tuple[Any, ...]) -> tuple[Any, ...]:
    """`coefficients` on the devices of the weights here that they are multiplied with, where there are any."""
    embedding, blocks, *last = constants

    def place(value: Any, device: torch.device) -> Any:
        if isinstance(value, dict):
            return {name: place(item, device) for name, item in value.items()}
        return value if value is None or device.type == "meta" else value.to(device)

    down, head = model.family.down, model.module.get_output_embeddings().weight.device
    devices = [next(model.part(layer, down).parameters()).device for layer in range(len(blocks))]
    placed = [
        tuple(place(constant, device) for constant in block) for block, device in zip(blocks, devices, strict=True)
    ]
    return place(embedding, devices[0]), placed, *(place(constant, head) for constant in last)


def direct_weights(
    model: Model,
    token_ids: Sequence[int],
    nodes: Tensor,
    logits_at: Tensor,
    *,
    basis: str = "activation",
    rules: frozenset[str] = NO_RULES,
    max_bytes: int,
    baselines: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Weights of the direct edges from every node and embedding into every node and logit, over direct paths only.

    One forward, and batched backwards. Every MLP is detached, so that no path runs through it. Nodes that are not asked
    for are only summed, where they are computed.

    Args:
        nodes: rows of (layer, position, neuron), sources and targets. logits_at: rows of (position, token), targets.
        max_bytes: bytes of gradients held at a time.
        baselines: of the nodes [node] and of the embeddings [pos, d_model].

    Returns:
        The targets' values, nodes then logits [target]; weights into them from the nodes [target, node], from each
        embedding [target, pos], and from all nodes and embeddings together [target]; and with each source's distance
        from its baseline in the place of its value [target, node + pos], None without baselines.
    """
    needs_gradients(model)
    kept = len(token_ids) - int(logits_at[:, 0].min()) if len(logits_at) else 1
    given = inputs(model, Batch((tuple(token_ids),)), kept)
    at = torch.stack([logits_at[:, 0] - len(token_ids) + kept, logits_at[:, 1]], -1)
    away = None if baselines is None else ([baselines[0]], baselines[1][None])
    targets, sources = len(nodes) + len(at), len(nodes) + len(token_ids)
    into = Of((targets,)), Of((targets, len(nodes))), Of((targets, len(token_ids))), Of((targets,))
    form = [(*into, Maybe(Of((targets, sources))))]
    with model.ready():
        (parts,) = traces.direct_weights(
            model.nn, model.plan, given, [nodes], [at], rules, basis, max_bytes, away, model.backend.trace(form)
        )
    return parts[0], parts[1], parts[2], parts[3], parts[4]


def session(model: Model, function: Callable[..., Any], ask: SimpleNamespace, form: Any) -> Any:
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
            read = (out.float() * projection.to(out.device)).sum((1, 2))
            measured = interventions.to_cpu(read, nn.output.logits[:, -1])
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


def _constants(model: Model, batch: Batch, kept: int, nodes: Sequence[Tensor] | None, basis: str) -> tuple[Any, ...]:
    """The form of `coefficients`."""
    plan, (rows, columns) = model.plan, (len(batch.token_ids), batch.width)
    scale = Of((rows, columns, ...))
    scales = {path: scale for kind, path in plan.steps if kind in ("rms_norm", "layer_norm")}
    pattern, output, blocks = Of((rows, None, columns, columns)), _embedded(model, batch), list[Any]()
    for layer in range(model.n_layers):
        count = None if nodes is None else len(nodes[layer])
        factor = Of((rows, columns, model.d_mlp) if count is None else (count,))
        value = factor
        if basis == "output":
            value = output if count is None else factor
            factor = factor if count is None else Of((count, model.d_mlp))
        blocks.append((scales, pattern, factor, None if plan.gate is None else factor, value, output))
    logits = _logits(model, batch, kept)
    return output, blocks, scale, logits, logits


def _differentiable(model: Model, metric: Metric) -> Callable[[Tensor], Tensor]:
    """How a pass with gradients reads the metric."""
    needs_gradients(model)
    return metric.reader


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
