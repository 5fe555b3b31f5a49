"""One function per nnsight trace: the only file with ``with model.nn.trace(...)``.

Each pass is one forward, and one backward where it says so, over a left-padded batch, and returns plain tensors.
Nothing is left on the model. A remote model's pass is the same function: its block travels to the server, with the
plain values that it names, and its result comes back (ndif.py). What a pass means (attribution, ablation) is decided
by its callers; what runs inside a trace is bodies.py; where modules are is families.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import nnsight
import torch
from torch import Tensor

from tracer import bodies, linearize, metrics
from tracer.errors import RemoteError
from tracer.metrics import Metric
from tracer.model import Model
from tracer.prompts import Batch
from tracer.shapes import Embedded, Logits, PaddedNodes, PerPrompt

NO_RULES: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Reading:
    """What a pass with a backward brings back; neurons are float32 on the CPU.

    Attributes:
        values: of the neurons, in the chosen basis.
        gradients: of the metric with respect to them.
        embedding: the tensor that left the embedding (or replaced it).
        embedding_gradient: of the metric with respect to it.
        metric: of each prompt.
    """

    values: PaddedNodes
    gradients: PaddedNodes
    embedding: Embedded
    embedding_gradient: Embedded
    metric: PerPrompt


def logits(model: Model, batch: Batch, kept: int = 1, *, rules: frozenset[str] = NO_RULES) -> Logits:
    """The logits of the last `kept` columns, float32. One forward."""
    nn, plan = model.nn, model.plan
    with model.lock, torch.no_grad():
        with nn.trace(**batch.inputs(model.device, kept), backend=model.backend()):
            if rules:
                bodies.through_blocks(nn, plan, rules, "activation")
            saved = nnsight.save(bodies.to_cpu(bodies.logits(nn, plan, rules)))
    return saved[0]


def gradients(
    model: Model,
    batch: Batch,
    metric: Metric,
    *,
    rules: frozenset[str] = NO_RULES,
    basis: str = "activation",
    embedding: Embedded | None = None,
) -> Reading:
    """Values of every neuron and the metric's gradient to each. One forward, one backward.

    Args:
        rules: the RelP rules in force; none is the plain gradient.
        embedding: put in place of the embedding's output.
    """
    nn, plan, read = model.nn, model.plan, _differentiable(model, metric)
    with model.lock, torch.inference_mode(False), torch.enable_grad():
        with nn.trace(**batch.inputs(model.device, metric.kept), backend=model.backend()):
            entered = bodies.enter(nn, plan, embedding, True)
            neurons = bodies.through_blocks(nn, plan, rules, basis)
            score = read(bodies.logits(nn, plan, rules))
            slopes = torch.autograd.grad(score.sum(), [entered, *neurons])
            both = bodies.stack(plan, neurons), bodies.stack(plan, slopes[1:])
            saved = nnsight.save((*both, *bodies.to_cpu(entered, slopes[0], score)))
    return Reading(saved[0].float(), saved[1].float(), *saved[2:])


def values(
    model: Model, batch: Batch, *, basis: str = "activation", embedding: Embedded | None = None
) -> tuple[PaddedNodes, Embedded]:
    """Values of every neuron, and what left the embedding. One forward."""
    nn, plan, rules = model.nn, model.plan, NO_RULES
    with model.lock, torch.no_grad():
        with nn.trace(**batch.inputs(model.device), backend=model.backend()):
            entered = bodies.enter(nn, plan, embedding, False)
            neurons = bodies.through_blocks(nn, plan, rules, basis)
            saved = nnsight.save((bodies.stack(plan, neurons), *bodies.to_cpu(entered)))
    return saved[0].float(), saved[1]


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
    nn, plan, rules, read = model.nn, model.plan, NO_RULES, _differentiable(model, metric)
    given = neurons.to(model.device, model.dtype)
    with model.lock, torch.inference_mode(False), torch.enable_grad():
        with nn.trace(**batch.inputs(model.device, metric.kept), backend=model.backend()):
            leaf = given.detach().clone().requires_grad_(True)
            bodies.through_blocks(
                nn, plan, rules, basis, lambda at, value: leaf.to(value.device) if at == layer else value
            )
            score = read(bodies.logits(nn, plan, rules))
            (slope,) = torch.autograd.grad(score.sum(), [leaf])
            saved = nnsight.save(bodies.to_cpu(slope, score))
    return saved


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
    nn, plan, rules, read = model.nn, model.plan, NO_RULES, _reader(model, metric)
    with model.lock, torch.no_grad():
        with nn.trace(**batch.inputs(model.device, metric.kept), backend=model.backend()):
            bodies.through_blocks(
                nn, plan, rules, basis, lambda at, value: bodies.put(value, where, to) if at == layer else value
            )
            saved = nnsight.save(bodies.to_cpu(read(bodies.logits(nn, plan, rules))))
    return saved[0]


def from_embedding(model: Model, batch: Batch, metric: Metric, embedding: Embedded) -> PerPrompt:
    """The metric with the embedding's output replaced. One forward."""
    nn, plan, rules, read = model.nn, model.plan, NO_RULES, _reader(model, metric)
    with model.lock, torch.no_grad():
        with nn.trace(**batch.inputs(model.device, metric.kept), backend=model.backend()):
            bodies.enter(nn, plan, embedding, False)
            saved = nnsight.save(bodies.to_cpu(read(bodies.logits(nn, plan, rules))))
    return saved[0]


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
        """Its fields, as `bodies.edited` takes them."""
        return self.layer, self.mask, self.scale, self.shift


def intervened(
    model: Model, batch: Batch, edits: Sequence[Edit], *, basis: str = "activation", kept: int = 1
) -> Logits:
    """The logits of the last `kept` columns with the edits in force, in their order. One forward.

    An edit whose mask has a column axis covers the batch's columns, padding included.
    """
    nn, plan, rules, parts = model.nn, model.plan, NO_RULES, [edit.parts for edit in edits]
    with model.lock, torch.no_grad():
        with nn.trace(**batch.inputs(model.device, kept), backend=model.backend()):
            bodies.through_blocks(nn, plan, rules, basis, lambda at, value: bodies.edited(parts, at, value))
            saved = nnsight.save(bodies.to_cpu(nn.output.logits))
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
    """
    inputs = {name: batch.inputs(model.device)[name] for name in ("input_ids", "attention_mask")}
    nn, plan, rules = model.nn, model.plan, NO_RULES
    always = [edit.parts for edit in everywhere]
    first = [edit.parts for edit in edits] + always
    with model.lock, torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*was never reached", category=UserWarning)  # every prompt ended
        with nn.generate(max_new_tokens=max_new_tokens, do_sample=False, backend=model.backend()) as tracer:
            with tracer.invoke(inputs):
                for step in tracer.iter[:max_new_tokens]:
                    active = first if step == 0 else always
                    bodies.through_blocks(
                        nn, plan, rules, basis, lambda at, value, now=active: bodies.edited(now, at, value)
                    )
            with tracer.invoke():
                out = nnsight.save(tracer.result)
    return out[:, batch.width :].cpu()


@dataclass(frozen=True)
class FrozenBlock:
    """One block of one prompt, reduced to the constants of its linearisation; tensors stay on the block's device.

    Attributes:
        scales: statistic of each norm [pos], by path.
        pattern: of the attention [head, query, key].
        gate: input of the activation, up: the other factor (None without one); at the nodes asked for, either
            [node] (basis activation) or [node, d_mlp] (basis output).
        values: of the nodes asked for [node].
        output: of the MLP [pos, d_model]; without its bias, which is no neuron's, in the basis activation.
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
        embedding: what left the embedding [pos, d_model].
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
    found = []
    for layer, (scales, pattern, gate, up, values, output) in enumerate(blocks):
        bias = getattr(model.part(layer, model.family.down), "bias", None)
        written = output[0] if basis == "output" or bias is None else output[0] - bias.float()
        rows = {path: scale[0] for path, scale in scales.items()}
        found.append(FrozenBlock(rows, pattern[0], gate, up, values, written))
    return Frozen(embedding[0], found, final_scale[0], capped[0][places], uncapped[0][places])


def coefficients(
    model: Model, batch: Batch, kept: int, nodes: Sequence[Tensor] | None = None, *, basis: str = "activation"
) -> tuple[Tensor, list[tuple[Any, ...]], Tensor, Tensor, Tensor]:
    """All constants of a batch's linearisation: what left the embedding, `bodies.frozen_block` of every block, the
    final norm's scale, and the logits of the last `kept` columns after and before the soft-cap. One forward.

    Args:
        nodes: for each layer, the (position, neuron) pairs of prompt 0 that are wanted [node, 2]; every neuron if None.
    """
    nn, plan = model.nn, model.plan
    with model.lock, torch.no_grad():
        with nn.trace(**batch.inputs(model.device, kept), backend=model.backend()):
            embedding = nn.get(plan.embedding).output.float()
            envoys = list(nn.get(plan.blocks))
            linearize.prepare(envoys, plan.steps)
            blocks = [
                bodies.frozen_block(block, plan, None if nodes is None else nodes[i], basis)
                for i, block in enumerate(envoys)
            ]
            final_scale = linearize.scale(plan.final_norm[0], nn.get(plan.final_norm[1]))
            uncapped, capped = nn.get(plan.head).output.float(), nn.output.logits.float()
            saved = nnsight.save((embedding, blocks, final_scale, capped, uncapped))
    return saved


def direct_weights(
    model: Model,
    token_ids: Sequence[int],
    nodes: Sequence[Tensor],
    logits_at: Tensor,
    part: range,
    *,
    basis: str = "activation",
    rules: frozenset[str] = NO_RULES,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Weights of the direct edges from every node and embedding into some targets, over direct paths only.

    One forward, and one batched backward. Every MLP is cut: its neurons (its output, in the basis ``output``) are
    leaves, so that no path runs through one. What is not asked for is summed where it is computed.

    Args:
        nodes: for each layer, the (position, neuron) pairs of its nodes [node, 2], which are sources and targets.
        logits_at: (position, token) pairs [target, 2].
        part: which targets: the nodes layer by layer, then the logits.

    Returns:
        Weights from each layer's nodes [target, node]; from each embedding [target, pos]; and from everything there
        is, nodes or not [target].
    """
    batch = Batch((tuple(token_ids),))
    kept = len(token_ids) - int(logits_at[:, 0].min()) if len(logits_at) else 1
    nn, plan, columns = model.nn, model.plan, logits_at[:, 0] - len(token_ids) + kept
    first, last = part.start, part.stop
    _needs_gradients(model)
    with model.lock, torch.inference_mode(False), torch.enable_grad():
        with nn.trace(**batch.inputs(model.device, kept), backend=model.backend()):
            entered = bodies.enter(nn, plan, None, True)
            whole, leaves = [], []

            def cut(at: int, value: Tensor) -> Tensor:
                whole.append(value)
                leaves.append(value.detach().clone().requires_grad_(True))
                return leaves[at]

            bodies.through_blocks(nn, plan, rules, basis, cut)
            picked = [layer[0, where[:, 0], where[:, 1]] for layer, where in zip(whole, nodes, strict=True)]
            logits = bodies.logits(nn, plan, rules)
            picked.append(logits[0, columns, logits_at[:, 1]])
            aims = torch.cat([one.to(logits.device) for one in picked])[first:last]
            slopes = torch.autograd.grad(
                aims,
                [*leaves, entered],
                torch.eye(len(aims), device=aims.device, dtype=aims.dtype),
                is_grads_batched=True,
                allow_unused=True,
                materialize_grads=True,
            )
            weights = [
                slope[:, 0].float() * leaf[0].detach().float() for slope, leaf in zip(slopes[:-1], leaves, strict=True)
            ]
            embedded = (slopes[-1][:, 0].float() * entered[0].detach().float()).sum(-1)
            total = torch.stack(list(bodies.to_cpu(*[one.sum((1, 2)) for one in weights], embedded.sum(-1)))).sum(0)
            chosen = [one[:, where[:, 0], where[:, 1]] for one, where in zip(weights, nodes, strict=True)]
            saved = nnsight.save((bodies.to_cpu(*chosen), bodies.to_cpu(embedded)[0], total))
    return list(saved[0]), saved[1], saved[2]


def probe(
    model: Model, token_ids: Sequence[int], steps: Sequence[float], direction: Tensor, projection: Tensor
) -> tuple[Tensor, Tensor, float, str, tuple[bool, bool, str]]:
    """What a server answers to small questions, one row for each of `steps`. One forward.

    The embedding of a row is moved by its step times `direction` [pos, d_model], in units of their norms' ratio.

    Returns:
        The first block's output times `projection` [row], the last logits [row, vocab], the unit, the activations'
        dtype, and `bodies.weights`.
    """
    batch, sizes = Batch((tuple(token_ids),) * len(steps)), torch.tensor(list(steps))[:, None, None]
    nn, plan = model.nn, model.plan
    with model.lock, torch.no_grad():
        with nn.trace(**batch.inputs(model.device), backend=model.backend()):
            output = nn.get(plan.embedding).output
            unit = output[0].float().norm() / direction.norm().to(output.device)
            moved = output.float() + (sizes * direction[None]).to(output.device) * unit
            nn.get(plan.embedding).output = moved.to(output.dtype)
            out = bodies.first_output(nn, plan)
            read = (out.float() * projection.to(out.device)).sum((1, 2))
            found = bodies.to_cpu(read, nn.output.logits[:, -1])
            saved = nnsight.save((*found, float(unit), str(output.dtype), bodies.weights(nn._module)))
    return saved


def probe_gradient(model: Model, token_ids: Sequence[int], direction: Tensor, projection: Tensor) -> float:
    """The derivative along `direction` of what `probe` reads of the first block. One forward, one backward."""
    batch = Batch((tuple(token_ids),))
    nn, plan = model.nn, model.plan
    with model.lock, torch.inference_mode(False), torch.enable_grad():
        with nn.trace(**batch.inputs(model.device), backend=model.backend()):
            entered = bodies.enter(nn, plan, None, True)
            out = bodies.first_output(nn, plan)
            (slope,) = torch.autograd.grad((out.float() * projection.to(out.device)).sum(), [entered])
            saved = nnsight.save(bodies.to_cpu((slope[0].float() * direction.to(slope.device)).sum()))
    return float(saved[0])


def _reader(model: Model, metric: Metric) -> Callable[[Tensor], Tensor]:
    """How a trace reads the metric; for a remote model as a function that can travel."""
    return metric.read if model.remote is None else partial(metrics.read, **vars(metric))


def _differentiable(model: Model, metric: Metric) -> Callable[[Tensor], Tensor]:
    """As `_reader`, where gradients are to be taken."""
    _needs_gradients(model)
    return _reader(model, metric)


def _needs_gradients(model: Model) -> None:
    if model.remote is not None and not model.remote.grants.gradients:
        raise RemoteError(
            f"model {model.name!r} on {model.remote.server.host}",
            f"this needs gradients, which the server does not grant this key ({model.remote.grants.reason})",
            "ask its operator for the tag 'trusted', or use method relp with weights='local'",
        )
