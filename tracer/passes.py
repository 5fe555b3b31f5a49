"""One function per nnsight trace: the only file with ``with model.nn.trace(...)``.

Each pass is one forward, and one backward where it says so, over a left-padded batch, and returns plain tensors.
Nothing is left on the model. What a pass means (attribution, ablation) is decided by its callers; how a module is
linearised is linearize.py; where modules are is families.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import nnsight
import torch
from torch import Tensor

from tracer import linearize
from tracer.families import Family
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
    with model.lock, torch.no_grad():
        with model.nn.trace(**batch.inputs(model.device, kept)):
            if rules:
                _through_blocks(model, rules, "activation")
            out = nnsight.save(_logits(model, rules).float().cpu())
    return out


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
    with model.lock, torch.inference_mode(False), torch.enable_grad():
        with model.nn.trace(**batch.inputs(model.device, metric.kept)):
            entered = _enter(model, embedding)
            neurons = _through_blocks(model, rules, basis)
            score = metric.read(_logits(model, rules))
            slopes = torch.autograd.grad(score.sum(), [entered, *neurons])
            values, slopes_of_neurons = _stack(neurons), _stack(slopes[1:])
            saved = nnsight.save((values, slopes_of_neurons, *_to_cpu(entered, slopes[0], score)))
    return Reading(*saved)


def values(
    model: Model, batch: Batch, *, basis: str = "activation", embedding: Embedded | None = None
) -> tuple[PaddedNodes, Embedded]:
    """Values of every neuron, and what left the embedding. One forward."""
    with model.lock, torch.no_grad():
        with model.nn.trace(**batch.inputs(model.device)):
            entered = _enter(model, embedding)
            neurons = _through_blocks(model, NO_RULES, basis)
            saved = nnsight.save((_stack(neurons), *_to_cpu(entered)))
    return saved


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
    with model.lock, torch.inference_mode(False), torch.enable_grad():
        with model.nn.trace(**batch.inputs(model.device, metric.kept)):
            leaf = neurons.to(model.device, model.dtype).requires_grad_(True)
            _through_blocks(model, NO_RULES, basis, lambda at, value: leaf.to(value.device) if at == layer else value)
            score = metric.read(_logits(model, NO_RULES))
            (slope,) = torch.autograd.grad(score.sum(), [leaf])
            saved = nnsight.save(_to_cpu(slope, score))
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
    with model.lock, torch.no_grad():
        with model.nn.trace(**batch.inputs(model.device, metric.kept)):
            _through_blocks(model, NO_RULES, basis, lambda at, value: _put(value, where, to) if at == layer else value)
            score = nnsight.save(metric.read(_logits(model, NO_RULES)).cpu())
    return score


def from_embedding(model: Model, batch: Batch, metric: Metric, embedding: Embedded) -> PerPrompt:
    """The metric with the embedding's output replaced. One forward."""
    with model.lock, torch.no_grad():
        with model.nn.trace(**batch.inputs(model.device, metric.kept)):
            _enter(model, embedding)
            score = nnsight.save(metric.read(_logits(model, NO_RULES)).cpu())
    return score


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

    def __call__(self, value: Tensor) -> Tensor:
        """The edited neurons [prompt, column, neuron], in their own dtype."""
        scale, shift = (
            part.to(value.device, value.dtype) if isinstance(part, Tensor) else part
            for part in (self.scale, self.shift)
        )
        return torch.where(self.mask.to(value.device), value * scale + shift, value)


def intervened(
    model: Model, batch: Batch, edits: Sequence[Edit], *, basis: str = "activation", kept: int = 1
) -> Logits:
    """The logits of the last `kept` columns with the edits in force, in their order. One forward.

    An edit whose mask has a column axis covers the batch's columns, padding included.
    """
    with model.lock, torch.no_grad():
        with model.nn.trace(**batch.inputs(model.device, kept)):
            _through_blocks(model, NO_RULES, basis, lambda at, value: _edited(edits, at, value))
            out = nnsight.save(model.nn.output.logits.float().cpu())
    return out


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
    with model.lock, torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*was never reached", category=UserWarning)  # every prompt ended
        with model.nn.generate(max_new_tokens=max_new_tokens, do_sample=False) as tracer:
            with tracer.invoke(inputs):
                for step in tracer.iter[:max_new_tokens]:
                    active = [*edits, *everywhere] if step == 0 else list(everywhere)
                    _through_blocks(model, NO_RULES, basis, lambda at, value, now=active: _edited(now, at, value))
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
    batch, at = Batch((tuple(token_ids),)), logits_at[:, 0]
    kept = len(token_ids) - int(at.min()) if len(at) else 1
    with model.lock, torch.no_grad():
        with model.nn.trace(**batch.inputs(model.device, kept)):
            embedding = model.embedding.output[0].float()
            linearize.prepare(model.blocks, model.family.steps)
            blocks = [_freeze(model.family, block, nodes[i], basis) for i, block in enumerate(model.blocks)]
            final = model.family.final_norm
            final_scale = linearize.scale(final.kind, model.nn.get(final.path))[0]
            uncapped, capped = model.head.output[0].float(), model.nn.output.logits[0].float()
            places = (logits_at[:, 0] - len(token_ids) + kept).to(capped.device), logits_at[:, 1].to(capped.device)
            saved = nnsight.save(Frozen(embedding, blocks, final_scale, capped[places], uncapped[places]))
    return saved


def direct_gradients(
    model: Model,
    token_ids: Sequence[int],
    targets: Sequence[Tensor],
    logits_at: Tensor,
    *,
    basis: str = "activation",
    rules: frozenset[str] = NO_RULES,
    chunk: int = 16,
) -> Iterator[tuple[slice, list[Tensor], Tensor]]:
    """Gradients of target neurons, then target logits, to every neuron and the embedding over direct paths only.

    One forward per chunk of targets, and one batched backward. Every MLP is cut: its neurons (its output, in the
    basis ``output``) are leaves, so that no path runs through one.

    Args:
        targets: for each layer, the (position, neuron) pairs of its targets [target, 2].
        logits_at: (position, token) pairs [target, 2].

    Yields:
        The targets' slice, layer by layer in order and logits last; gradients per layer [target, pos, neuron]; and
        to the embedding [target, pos, d_model].
    """
    total = sum(len(one) for one in targets) + len(logits_at)
    for start in range(0, total, chunk):
        part = slice(start, min(start + chunk, total))
        yield part, *_direct_chunk(model, token_ids, targets, logits_at, basis, rules, part)


def _direct_chunk(
    model: Model,
    token_ids: Sequence[int],
    targets: Sequence[Tensor],
    logits_at: Tensor,
    basis: str,
    rules: frozenset[str],
    part: slice,
) -> tuple[list[Tensor], Tensor]:
    batch = Batch((tuple(token_ids),))
    kept = len(token_ids) - int(logits_at[:, 0].min()) if len(logits_at) else 1
    with model.lock, torch.inference_mode(False), torch.enable_grad():
        with model.nn.trace(**batch.inputs(model.device, kept)):
            entered = _enter(model, None)
            whole, leaves = [], []

            def cut(at: int, value: Tensor) -> Tensor:
                whole.append(value)
                leaves.append(value.detach().clone().requires_grad_(True))
                return leaves[at]

            _through_blocks(model, rules, basis, cut)
            picked = [layer[0, where[:, 0], where[:, 1]] for layer, where in zip(whole, targets, strict=True)]
            logits = _logits(model, rules)
            picked.append(logits[0, logits_at[:, 0] - len(token_ids) + kept, logits_at[:, 1]])
            aims = torch.cat([one.to(logits.device) for one in picked])[part]
            slopes = torch.autograd.grad(
                aims,
                [*leaves, entered],
                torch.eye(len(aims), device=aims.device, dtype=aims.dtype),
                is_grads_batched=True,
                allow_unused=True,
                materialize_grads=True,
            )
            saved = nnsight.save(_to_cpu(*(slope[:, 0] for slope in slopes)))
    return list(saved[:-1]), saved[-1]


# Trace-body functions: they touch modules in the order the model runs them, as nnsight requires.


def _enter(model: Model, embedding: Embedded | None) -> Tensor:
    """Make the embedding's output (or its replacement) the leaf that the trace starts from."""
    output = model.embedding.output
    chosen = output if embedding is None else embedding.to(output.device, output.dtype)
    leaf = chosen.detach().clone().requires_grad_(torch.is_grad_enabled())
    model.embedding.output = leaf
    return leaf


def _through_blocks(
    model: Model,
    rules: frozenset[str],
    basis: str,
    edit: Callable[[int, Tensor], Tensor] | None = None,
) -> list[Tensor]:
    """Walk the blocks, linearise their modules, set what `edit` changes, and return each layer's neurons."""
    found = []
    linearize.prepare(model.blocks, model.family.steps)
    for layer, block in enumerate(model.blocks):
        for step in model.family.steps:
            module = block.get(step.path)
            if step.kind == "neurons":
                found.append(_neurons(module, layer, basis, edit))
            else:
                linearize.apply(step.kind, module, rules)
    return found


def _freeze(family: Family, block: Any, nodes: Tensor, basis: str) -> FrozenBlock:
    """The constants of one block, read in the order its modules run."""
    scales: dict[str, Tensor] = {}
    pattern = gate = up = values = output = torch.empty(0)
    wiring = family.wiring
    fused = wiring.gate is not None and wiring.gate.path == wiring.up.path
    position, neuron = nodes.unbind(-1)

    def pick(tensor: Tensor) -> Tensor:
        return (tensor[0][position, neuron] if basis == "activation" else tensor[0][position]).float()

    for step in family.steps:
        module = block.get(step.path)
        if step.kind in ("rms_norm", "layer_norm"):
            scales[step.path] = linearize.scale(step.kind, module)[0]
        elif step.kind == "attention":
            pattern = linearize.pattern(module)[0].float()
        elif step.kind == "activation":
            if fused:
                up = pick(block.get(wiring.up.path).output.chunk(2, dim=-1)[1])
            gate = pick(module.input)
            if not fused and wiring.gate is not None:
                up = pick(block.get(wiring.up.path).output)
        elif step.kind == "neurons":
            neurons, output, bias = module.input, module.output[0].float(), getattr(module._module, "bias", None)
            if basis == "activation" and bias is not None:
                output = output - bias.float()
            values = (neurons[0].float() if basis == "activation" else output)[position, neuron]
    return FrozenBlock(scales, pattern, gate, None if wiring.gate is None else up, values, output)


def _neurons(down: Any, layer: int, basis: str, edit: Callable[[int, Tensor], Tensor] | None) -> Tensor:
    """The neurons of one layer, after `edit` if there is one."""
    if basis == "activation":
        if edit is not None:
            down.input = edit(layer, down.input)
        return down.input
    if edit is not None:
        down.output = edit(layer, down.output)
    return down.output


def _logits(model: Model, rules: frozenset[str]) -> Tensor:
    """The model's logits, behind the linearised final norm and soft-cap."""
    final = model.family.final_norm
    linearize.apply(final.kind, model.nn.get(final.path), rules)
    uncapped = model.head.output
    out = model.nn.output.logits
    if model.soft_cap is None or "activation" not in rules:
        return out
    return linearize.soft_cap(out, uncapped, model.soft_cap)


def _edited(edits: Sequence[Edit], layer: int, value: Tensor) -> Tensor:
    for edit in edits:
        if edit.layer == layer:
            value = edit(value)
    return value


def _put(value: Tensor, where: tuple[Tensor, Tensor, Tensor], to: Tensor) -> Tensor:
    index = tuple(part.to(value.device) for part in where)
    return value.clone().index_put(index, to.to(value.device, value.dtype))


def _stack(layers: Any) -> Tensor:
    """Layers of [prompt, column, neuron], on any devices, as one float32 tensor on the CPU."""
    return torch.stack([layer.detach().float().cpu() for layer in layers], dim=1)


def _to_cpu(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().float().cpu() for tensor in tensors)
