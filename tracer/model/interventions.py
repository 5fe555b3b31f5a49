"""What runs inside a trace, in this process or on a server: plain functions over the envoys of a model.

They touch modules in the order the model runs them, as nnsight requires. A remote request carries these functions as
their source and nothing of the package around them, so they may use torch, model/rules.py and their arguments, which
are tensors, plain containers and the `plan` of a model (see `Model.plan`). They know none of tracer's records.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tracer.metrics import read as read_logits
from tracer.metrics import summed
from tracer.model import head
from tracer.model import rules as linearize

SAMPLE = 4096
"""Values of each parameter that a fingerprint covers."""


def embed_leaf(nn: Any, plan: SimpleNamespace, embedding: Tensor | None, leaf: bool) -> Tensor:
    """Set the embedding's output (or its replacement); with `leaf`, as the tensor that gradients are taken to."""
    output = nn.get(plan.embedding).output
    chosen = output if embedding is None else embedding.to(output.device, output.dtype)
    entered = chosen.detach().clone().requires_grad_(leaf)
    nn.get(plan.embedding).output = entered
    return entered


def walk(
    nn: Any,
    plan: SimpleNamespace,
    rules: frozenset[str],
    visit: Callable[[Any, int], Any],
    constants: list[SimpleNamespace] | None = None,
    reads: SimpleNamespace | None = None,
    basis: str = "activation",
) -> list[Any]:
    """Walk the blocks, linearise their modules, and return what `visit` makes of each layer's module whose input or
    output the nodes of a `basis` are: see `node_module`.

    Args:
        constants: receives those of each block's linearisation; see `observe`.
        reads: receives what the metric is read from; see `inside`.
    """
    visited = []
    blocks = list(nn.get(plan.blocks))
    linearize.prepare(blocks, [part.steps for part in plan.layers])
    for layer, block in enumerate(blocks):
        found, laid = SimpleNamespace(scales={}, up=None), plan.layers[layer]
        where = node_module(laid, basis)
        for kind, path in laid.steps:
            module = block.get(path)
            if constants is not None:
                observe(found, kind, path, block, laid)
            if kind == "neurons":
                if reads is not None and (reads.kind, reads.layer) == ("neuron", layer):
                    reads.state = module.input  # before anything is done to the neurons
                visited += [visit(module, layer)] if path == where else []
            else:
                linearize.apply(kind, module, rules)
            if constants is not None and kind == "attention":  # the kernel runs once its inputs are set
                found.pattern = linearize.pattern(module, found.kernel).float()
            elif constants is not None and kind == "neurons":
                found.output = module.output.detach().float()
            if path == where and path != laid.down:
                visited.append(visit(module, layer))
        if where is None:
            visited.append(visit(block, layer))
        if reads is not None and (reads.kind, reads.layer) == ("direction", layer):
            reads.state = outcome(block)
        if constants is not None:
            constants.append(found)
    return visited


def node_module(laid: SimpleNamespace, basis: str) -> str | None:
    """Path in a block of the module that has a basis's nodes: the down projection; of the basis ``attention`` the
    attention or the norm behind it, whose output is what is added to the residual stream; None for the block itself, of
    the basis ``residual``."""
    if basis == "residual":
        return None
    if basis == "attention":
        return laid.attention_out or next(path for kind, path in laid.steps if kind == "attention")
    return laid.down


def inside(metric: SimpleNamespace | None) -> SimpleNamespace | None:
    """Where a metric is read that is not one of logits: its `kind` and `layer`; `walk` puts the `state` there that is
    read [prompt, column, coordinate], `score` the `values` of its terms. None for a metric of logits."""
    if metric is None or metric.of is None:
        return None
    return SimpleNamespace(kind=metric.of.kind, layer=metric.of.layer, state=None, values=None)


def outcome(module: Any) -> Tensor:
    """The first thing that a module returns."""
    out = module.output
    return out[0] if isinstance(out, tuple) else out


def observe(found: SimpleNamespace, kind: str, path: str, block: Any, laid: SimpleNamespace) -> None:
    """Add the constants of one module's linearisation to its block's, read in the order that modules run.

    Those are: norms' `scales` by path [prompt, column], but for queries' and keys', which the pattern has in it; the
    activation's input `gate` and the other factor `up` (None without one) [prompt, column, d_mlp]; and the `values` of
    the down projection's input. `walk` adds the attention `pattern` [prompt, head, query, key], which comes of its
    `kernel`, and the MLP's `output` [prompt, column, d_model].
    """
    module = block.get(path)
    if kind == "attention":
        found.kernel = linearize.kernel(module)
    elif path in (laid.attention_in, laid.attention_out, laid.mlp_in, laid.mlp_out):
        found.scales[path] = linearize.scale(kind, module).detach()
    elif kind == "activation":
        if laid.gate is not None and laid.gate == laid.up:
            found.up = block.get(laid.up).output.detach().chunk(2, dim=-1)[1]
        found.gate = module.input.detach()
    elif kind == "product" and laid.gate != laid.up:
        found.up = block.get(laid.up).output.detach()
    elif kind == "neurons":
        found.values = module.input.detach()


def stop(tracer: Any, plan: SimpleNamespace, stops: list[BaseException]) -> None:
    """End a trace's forward here; `stops` receives what `release` needs. Where weights cannot be read it goes on: the
    head may have to be run, and a sandbox, which hides weights, loses what was saved before a stop."""
    if not plan.head_rows:
        return
    try:
        tracer.stop()
    except BaseException as end:
        stops.append(end)
        raise


def release(stops: list[BaseException]) -> None:
    """Let go of a forward that was ended: of frames that hold the exception, which its traceback holds, and with them
    all tensors of the pass, until Python looks for such circles; it seldom does."""
    while stops:
        end = stops.pop()
        end.__traceback__ = end.__context__ = None
        vars(end).clear()  # nnsight's own copy of the traceback


def through_blocks(
    nn: Any,
    plan: SimpleNamespace,
    rules: frozenset[str],
    basis: str,
    edit: Callable[[int, Tensor], Tensor] | None = None,
    constants: list[SimpleNamespace] | None = None,
    reads: SimpleNamespace | None = None,
) -> list[Tensor]:
    """Walk the blocks, set what `edit` changes, and return each layer's neurons; `constants` and `reads` as in
    `walk`."""
    return walk(nn, plan, rules, lambda part, layer: neurons(part, layer, basis, edit), constants, reads, basis)


def neurons(part: Any, layer: int, basis: str, edit: Callable[[int, Tensor], Tensor] | None) -> Tensor:
    """The neurons of one layer, after `edit` if given, at the module of `node_module`."""
    if basis == "activation":
        if edit is not None:
            part.input = edit(layer, part.input)
        return part.input
    if edit is not None:
        out, value = part.output, edit(layer, outcome(part))
        part.output = (value, *out[1:]) if isinstance(out, tuple) else value
    return outcome(part)


def final(nn: Any, plan: SimpleNamespace, rules: frozenset[str], scales: list[Tensor] | None = None) -> Tensor:
    """What leaves the linearised final norm [prompt, column, d_model]; `scales` receives that norm's, per column."""
    kind, path = plan.final_norm
    if scales is not None:
        scales.append(linearize.scale(kind, nn.get(path)).detach())
    linearize.apply(kind, nn.get(path), rules)
    return nn.get(path).output


def logits(nn: Any, plan: SimpleNamespace, rules: frozenset[str]) -> Tensor:
    """The model's logits, behind the linearised final norm and soft-cap."""
    kind, path = plan.final_norm
    linearize.apply(kind, nn.get(path), rules)
    uncapped = nn.get(plan.head).output
    out = nn.output.logits
    if plan.soft_cap is None or "activation" not in rules:
        return out
    return linearize.soft_cap(out, uncapped, plan.soft_cap)


def score(
    nn: Any,
    plan: SimpleNamespace,
    rules: frozenset[str],
    metric: SimpleNamespace,
    scales: list[Tensor] | None = None,
    reads: SimpleNamespace | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The metric [prompt], the tokens of its terms [term], and what they were read from: the hidden states behind the
    final norm [prompt, column, d_model] or, where rows of the head cannot be read, the logits of the last columns.

    Args:
        metric: the fields of a `Metric`. A token of -n is the model's own n-th likeliest at that place.
        scales: receives the final norm's, per column. reads: what was read inside the model, for a metric of that.
    """
    if reads is not None:
        state = final(nn, plan, rules, scales)
        source = state if plan.head_rows else nn.output.logits
        reads.values = inside_values(metric, reads, state)
        return summed(reads.values, metric.row, metric.weight, metric.n_prompts), metric.token, source
    if not plan.head_rows:
        source = logits(nn, plan, rules)
        tokens = metric.token
        if bool((tokens < 0).any()):
            order = source[metric.row.to(source.device), metric.column.to(source.device)].float()
            top = order.topk(max(1, int(-tokens.min()))).indices.cpu()
            tokens = torch.where(tokens < 0, top.gather(1, (-tokens - 1).clamp_min(0)[:, None])[:, 0], tokens)
        fields = {**vars(metric), "token": tokens}
        return read_logits(source, **fields), tokens, source
    source, unit = final(nn, plan, rules, scales), head.of(nn, plan, rules)
    rows = source[metric.row.to(source.device), metric.column.to(source.device)]
    tokens = metric.token
    if bool((tokens < 0).any()):
        asked = tokens < 0
        top = head.likeliest(unit, rows[asked.to(rows.device)].detach(), int(-tokens.min())).cpu()
        tokens = tokens.clone()
        tokens[asked] = top.gather(1, (-tokens[asked] - 1)[:, None])[:, 0]
    return head.weighed(unit, rows, tokens, metric), tokens, source


def inside_values(metric: SimpleNamespace, reads: SimpleNamespace, behind: Tensor) -> Tensor:
    """The values [term] that a metric of something inside the model is read from, float32; `behind` is the state behind
    the final norm."""
    state = behind if reads.state is None else reads.state
    rows = state[metric.row.to(state.device), metric.column.to(state.device)].float()
    if metric.of.kind == "neuron":
        return rows[:, metric.of.neuron]
    return (rows * metric.of.vector.to(rows.device)).sum(-1)


def asked(
    nn: Any, plan: SimpleNamespace, metric: SimpleNamespace | None, reads: SimpleNamespace | None = None
) -> Tensor:
    """The metric [prompt] or, without one, the likeliest next token."""
    return greedy(nn, plan) if metric is None else score(nn, plan, frozenset(), metric, None, reads)[0]


def greedy(nn: Any, plan: SimpleNamespace) -> Tensor:
    """The likeliest next token [prompt]."""
    if not plan.head_rows:
        return logits(nn, plan, frozenset())[:, -1].argmax(-1)
    return head.likeliest(head.of(nn, plan), final(nn, plan, frozenset())[:, -1], 1)[:, 0]


def target_logits(
    nn: Any,
    plan: SimpleNamespace,
    rules: frozenset[str],
    logits_at: Sequence[Tensor],
    metric: SimpleNamespace | None = None,
    reads: SimpleNamespace | None = None,
) -> list[Tensor]:
    """Each prompt's logits at rows of (column, token), columns counted from the end; or the values of a `metric` of
    something inside the model, which `reads` has."""
    if metric is not None and reads is not None:
        values = inside_values(metric, reads, final(nn, plan, rules))
        return list(values.split(torch.bincount(metric.row, minlength=metric.n_prompts).tolist()))
    if not plan.head_rows:
        out = logits(nn, plan, rules)
        return [out[row, at[:, 0], at[:, 1]] for row, at in enumerate(logits_at)]
    source, unit = final(nn, plan, rules), head.of(nn, plan, rules)
    return [head.of_tokens(unit, source[row, at[:, 0]], at[:, 1]) for row, at in enumerate(logits_at)]


def detach_mlp(down: Any, basis: str) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Detach one MLP's output, so that no path runs through it. Returns its neurons, the same as a leaf and that leaf's
    output (both None in the basis ``output``), and the detached output, a leaf too.

    Leaves are as wide as the residual stream: gradients to all layers' neurons would be several times larger.
    """
    if basis == "output":
        before, inner, inside = down.output, None, None
    else:
        before = down.input
        inner = before.detach().clone().requires_grad_(True)
        down.input = inner
        inside = down.output
    leaf = down.output.detach().clone().requires_grad_(True)
    down.output = leaf
    return before, inner, inside, leaf


def pick(down: Any, neurons: Tensor) -> Tensor:
    """The values of some neurons of one layer, at every column [prompt, column, neuron]; what is not asked for is not
    read."""
    if not len(neurons):
        return torch.zeros(0)
    value = down.input
    return value.detach()[..., neurons.to(value.device)].float().cpu()


def gather_nodes(layers: Sequence[Tensor], row: int, nodes: Tensor) -> Tensor:
    """The values of one prompt's nodes, rows of (layer, column, neuron), from each layer's [prompt, column, neuron]."""
    order = torch.argsort(nodes[:, 0], stable=True)
    parts = [layers[0].new_empty(0)]
    for layer, tensor in enumerate(layers):
        at = nodes[nodes[:, 0] == layer].to(tensor.device)
        parts.append(tensor[row, at[:, 1], at[:, 2]].to(layers[0].device))
    return torch.cat(parts)[torch.argsort(order).to(layers[0].device)]


def target_values(layers: Sequence[Tensor], nodes: Sequence[Tensor], ends: Sequence[Tensor]) -> list[Tensor]:
    """Each prompt's targets: its nodes, then its logits."""
    return [
        torch.cat([gather_nodes(layers, row, mine).to(logits.device), logits])
        for row, (mine, logits) in enumerate(zip(nodes, ends, strict=True))
    ]


def direct_weights(
    cuts: Sequence[tuple[Tensor, Tensor | None, Tensor | None, Tensor]],
    entered: Tensor,
    targets: Sequence[Tensor],
    nodes: Sequence[Tensor],
    max_bytes: int,
    baselines: tuple[Sequence[Tensor], Tensor] | None = None,
) -> list[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """For each prompt, the weights of the direct edges into its targets, from blocks with detached MLPs: from its nodes
    [target, node], from each column's embedding [target, column], and from everything together [target]; and with each
    source's distance from its baseline in the place of its value [target, node + column], None without baselines.

    Prompts are independent, so that one backward serves a target of each. Nodes that are not asked for are only summed.

    Args:
        max_bytes: bytes of gradients held at a time.
        baselines: of each prompt's nodes [node], and of all embeddings [prompt, column, d_model].
    """
    summed = added_up(targets)
    most = len(summed)
    leaf_size, widest = sum(parts[3].numel() for parts in cuts), max(parts[0].numel() for parts in cuts)
    step = max(1, min(64, max_bytes // (4 * (leaf_size + (2 if baselines is None else 3) * widest))))
    unit = torch.eye(most, device=summed.device, dtype=summed.dtype)
    chunks: list[list[tuple[Tensor, ...]]] = [[] for _ in targets]
    for first in range(0, most, step):
        parts = weights_into(cuts, entered, summed, unit[first : first + step], nodes, baselines)
        for row, values in enumerate(targets):
            left = max(0, min(step, len(values) - first))
            chunks[row].append(tuple(part[:left] for part in parts[row]))
    answers = []
    for parts, rows in zip(chunks, nodes, strict=True):
        weight, embedding, incoming, *more = (torch.cat(part) for part in zip(*parts, strict=True))
        order = torch.argsort(torch.argsort(rows[:, 0], stable=True))
        both = torch.cat([more[0][:, : len(rows)][:, order], more[0][:, len(rows) :]], -1) if more else None
        answers.append((weight[:, order], embedding, incoming, both))
    return answers


def weights_into(
    cuts: Sequence[tuple[Tensor, Tensor | None, Tensor | None, Tensor]],
    entered: Tensor,
    summed: Tensor,
    unit: Tensor,
    nodes: Sequence[Tensor],
    baselines: tuple[Sequence[Tensor], Tensor] | None,
) -> list[tuple[Tensor, ...]]:
    """For each prompt, what `direct_weights` gives for some of its targets, by one batched backward; nodes in the order
    of layers.

    Args:
        summed: each of the targets, added up over prompts [target]. unit: rows of the identity, one for each of those
            that are meant.
    """
    leaves, given = [parts[3] for parts in cuts], [None] * len(nodes) if baselines is None else baselines[0]
    grads = slopes(summed, [*leaves, entered], unit)
    parts: list[list[list[Tensor]]] = [[[], []] for _ in nodes]
    total = torch.zeros(len(unit), len(nodes))
    for layer, ((_, inner, inside, leaf), grad) in enumerate(zip(cuts, grads, strict=False)):
        slope, source = grad, leaf
        if inner is not None and inside is not None:
            source = inner
            (slope,) = torch.autograd.grad(inside, inner, grad, is_grads_batched=True, retain_graph=True)
        value, slope = source.detach().float(), slope.float()
        weight = slope * value
        total += weight.sum((2, 3)).cpu()
        for row, (rows, base) in enumerate(zip(nodes, given, strict=True)):
            here = rows[:, 0] == layer
            column, neuron = rows[here, 1:].to(weight.device).unbind(-1)
            parts[row][0].append(weight[:, row, column, neuron].cpu())
            if base is not None:
                far = value[row, column, neuron] - base[here].to(value.device)
                parts[row][1].append((slope[:, row, column, neuron] * far).cpu())
    slope, value = grads[-1].float(), entered.detach().float()
    embedded = (slope * value).sum(-1).cpu()
    total += embedded.sum(-1)
    if baselines is not None:
        far = (slope * (value - baselines[1].to(value.device))).sum(-1).cpu()
        for row, (_, moved) in enumerate(parts):
            moved.append(far[:, row])
    return [
        (torch.cat(weights, -1), embedded[:, row], total[:, row], *([torch.cat(moved, -1)] if moved else []))
        for row, (weights, moved) in enumerate(parts)
    ]


def slopes(values: Tensor, inputs: Sequence[Tensor], unit: Tensor) -> list[Tensor]:
    """The gradients to each input of some of the values, those of the rows of `unit` [row, *input]; zero to an input
    that has no part in them."""
    how = {"is_grads_batched": True, "allow_unused": True, "retain_graph": True}
    found = torch.autograd.grad(values, inputs, unit, **how)
    return [
        one.new_zeros(len(unit), *one.shape) if grad is None else grad for one, grad in zip(inputs, found, strict=True)
    ]


def added_up(parts: Sequence[Tensor]) -> Tensor:
    """Prompts' values, of which there may be more of one than of another, summed: prompts are independent, so that one
    backward serves a value of each."""
    most = max(len(values) for values in parts)
    return torch.stack([torch.nn.functional.pad(values, (0, most - len(values))) for values in parts]).sum(0)


def effects_on_nodes(
    layers: Sequence[Tensor],
    entered: Tensor,
    nodes: Sequence[Tensor],
    max_bytes: int,
    baselines: tuple[Sequence[Tensor], Tensor] | None,
) -> list[Tensor]:
    """For each prompt, the total effect of each column's embedding on each of its nodes [node, column]: the gradient
    times how far the embedding is from its baseline.

    Args:
        layers: each layer's neurons, in the graph of `entered`. nodes: of each prompt rows of (layer, column, neuron).
        max_bytes: bytes of gradients held at a time. baselines: see `direct_weights`.
    """
    far, found = entered.detach().float(), [torch.zeros(len(rows), entered.shape[1]) for rows in nodes]
    if baselines is not None:
        far = far - baselines[1].to(far.device)
    step = max(1, min(64, max_bytes // (4 * (entered.numel() + 3 * max(values.numel() for values in layers)))))
    for layer, values in enumerate(layers):
        mine = [(rows[:, 0] == layer).nonzero()[:, 0] for rows in nodes]
        if not any(len(one) for one in mine):
            continue
        at = [rows[one, 1:].to(values.device) for rows, one in zip(nodes, mine, strict=True)]
        summed = added_up([values[row, one[:, 0], one[:, 1]] for row, one in enumerate(at)])
        for unit in torch.eye(len(summed), dtype=summed.dtype, device=summed.device).split(step):
            first = int(unit[0].argmax())
            (grad,) = torch.autograd.grad(summed, entered, unit, is_grads_batched=True, retain_graph=True)
            effect = (grad.float() * far).sum(-1).cpu()
            for row, one in enumerate(mine):
                some = one[first : first + len(unit)]
                found[row][some] = effect[: len(some), row]
    return found


def effects_on_logits(
    layers: Sequence[Tensor],
    ends: Sequence[Tensor],
    nodes: Sequence[Tensor],
    max_bytes: int,
    baselines: tuple[Sequence[Tensor], Tensor] | None,
) -> list[Tensor]:
    """For each prompt, the total effect of each of its nodes on each of its logits [node, logit]: how far the node is
    from its baseline times the logit's gradient. Arguments as of `effects_on_nodes`; `ends` are the logits."""
    found = [torch.zeros(len(rows), len(logits)) for rows, logits in zip(nodes, ends, strict=True)]
    both, size = added_up(ends), sum(values.numel() for values in layers)
    for unit in torch.eye(len(both), dtype=both.dtype, device=both.device).split(
        max(1, min(64, max_bytes // (4 * size)))
    ):
        first = int(unit[0].argmax())
        grads = slopes(both, layers, unit)
        for row, (rows, into) in enumerate(zip(nodes, found, strict=True)):
            here = into[:, first : first + len(unit)]
            for layer, grad in enumerate(grads):
                mine = (rows[:, 0] == layer).nonzero()[:, 0]
                column, neuron = rows[mine, 1:].to(grad.device).unbind(-1)
                here[mine] = grad[: here.shape[1], row, column, neuron].float().cpu().T
    for row, rows in enumerate(nodes):
        far = gather_nodes(layers, row, rows).detach().float().cpu()
        found[row] *= (far if baselines is None else far - baselines[0][row].cpu())[:, None]
    return found


def first_output(nn: Any, plan: SimpleNamespace) -> Tensor:
    """What leaves the first block [prompt, column, d_model]."""
    return outcome(next(iter(nn.get(plan.blocks))))


def apply_edits(
    edits: Sequence[tuple[int, Tensor, Tensor | float, Tensor | float]], layer: int, value: Tensor
) -> Tensor:
    """A layer's neurons after every edit (layer, mask, scale, shift) of that layer, in order."""
    for at, mask, *parts in edits:
        if at == layer:
            scale, shift = (
                part.to(value.device, value.dtype) if isinstance(part, torch.Tensor) else part for part in parts
            )
            value = torch.where(mask.to(value.device), value * scale + shift, value)
    return value


def scale_nodes(value: Tensor, layer: int, entries: Tensor, scale: Tensor) -> Tensor:
    """A layer's neurons with single ones multiplied.

    Args:
        entries: rows of (layer, row, column or -1 for every one, neuron), none twice. scale: of each.
    """
    here = entries[:, 0] == layer
    if not bool(here.any()):
        return value
    changed = value.clone()
    wide = torch.promote_types(value.dtype, torch.float32)
    by = scale[here].to(wide).to(value.device)
    _, row, column, neuron = entries[here].long().to(value.device).unbind(-1)
    every = column < 0
    at = row[~every], column[~every], neuron[~every]
    changed[at] = (value[at].to(wide) * by[~every]).to(value.dtype)
    row, neuron = row[every], neuron[every]
    changed[row, :, neuron] = (value[row, :, neuron].to(wide) * by[every][:, None]).to(value.dtype)
    return changed


def values_at(value: Tensor, layer: int, members: Tensor) -> Tensor:
    """A layer's values [row, member] at those members, rows of (layer, column, neuron), that are of the layer."""
    _, column, neuron = members[members[:, 0] == layer].long().to(value.device).unbind(-1)
    return value[:, column, neuron]


def ablate_sets(
    value: Tensor, layer: int, rows: Tensor, rankings: tuple[int, int, Tensor, Sequence[Tensor]], to: Tensor | None
) -> Tensor:
    """A layer's neurons with a set of nodes of each row replaced, or all but that set. Padding stays as it is.

    Of a row's set and the nodes outside it, where these are known and fewer, the smaller one is set, by index.

    Args:
        rows: of each row [7, row] its ranking; three levels, rising: its set are the nodes below the first, and those
            from the second to below the third; whether the set is what stays; which of `to` is its replacement; and
            the column at which its prompt begins.
        rankings: see `ordered`.
        to: replacements [other, layer, position, neuron], as long as their rows' prompts or longer; None for zero.
    """
    inside, begins = ordered(layer, value.shape[-1], rankings)
    mine, first, source = begins[rows[0]], rows[6], rows[5]
    ends = torch.cat([mine[:, :1], mine.gather(1, rows[1:4].T), mine[:, -1:]], 1)
    count, real = (ends[:, 1] - ends[:, 0]) + (ends[:, 3] - ends[:, 2]), (value.shape[1] - first) * value.shape[2]
    smaller = (ends[:, 4] - ends[:, 0] == real) & (2 * count > real)  # all nodes have a place, most are in the set
    spans = torch.where(smaller[:, None], ends[:, 1:], ends[:, :4])
    kept = (rows[4] == 1) != smaller
    if not bool((kept | (count > 0)).any()):
        return value
    changed = replaced_rows(value, layer, kept, source, first, to)
    starts = (torch.arange(len(kept)) * value.shape[1] + first) * value.shape[2]
    (back,) = spanned(inside, spans[kept], starts[kept])
    back = back.to(value.device)
    changed.view(-1)[back] = value.reshape(-1)[back]
    there = 0 * source if to is None else (source * to.shape[1] + layer) * to[0, 0].numel()
    gone, new = spanned(inside, spans[~kept], starts[~kept], there[~kept])
    values = value.new_zeros(()) if to is None else to.reshape(-1)[new].to(value.device, value.dtype)
    changed.view(-1)[gone.to(value.device)] = values
    return changed


def replaced_rows(value: Tensor, layer: int, which: Tensor, source: Tensor, first: Tensor, to: Tensor | None) -> Tensor:
    """A copy of a layer's neurons, with all those of some rows' prompts replaced: arguments as in `ablate_sets`."""
    if not bool(which.any()):
        return value.clone(memory_format=torch.contiguous_format)
    place = torch.arange(value.shape[1]) - first[:, None]
    inside = (which[:, None] & (place >= 0))[:, :, None].to(value.device)
    if to is None:
        new = value.new_zeros(())
    else:
        alike = len(to) == 1 and not bool(first.any())
        new = to[:, layer, : value.shape[1]] if alike else to[source[:, None], layer, place.clamp_min(0)]
    return torch.where(inside, new.to(value.device, value.dtype), value).contiguous()


def ordered(layer: int, n_neurons: int, rankings: tuple[int, int, Tensor, Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
    """A layer's nodes of several rankings, one after another, each by level: where they are in a prompt's [position,
    neuron], and where each ranking's levels begin [ranking, level], its end last.

    Args:
        rankings: how many levels there are at most; of how many rankings only some nodes have one, and these nodes,
            rows of (ranking, layer, position, neuron, level); of each of the others the level of every node [layer,
            position, neuron].
    """
    most, n_listed, listed, dense = rankings
    number, _, position, neuron, level = listed[listed[:, 1] == layer].long().unbind(-1)
    key, inside = number * most + level, position * n_neurons + neuron
    found, counts = [inside[key.argsort(stable=True)]], [torch.bincount(key, minlength=n_listed * most)]
    for levels in dense:
        mine = levels[layer].flatten()
        found.append(mine.sort(stable=True)[1])
        counts.append(torch.bincount(mine, minlength=most))
    begins = torch.nn.functional.pad(torch.cat(counts).cumsum(0), (1, 0))
    return torch.cat(found), begins.unfold(0, most + 1, most)


def spanned(inside: Tensor, spans: Tensor, *starts: Tensor) -> list[Tensor]:
    """The nodes in each row's two spans [row, begin and end of each], counted from each of its starts [row]."""
    begin, size = spans[:, ::2].flatten(), (spans[:, 1::2] - spans[:, ::2]).flatten()
    picked = inside[torch.arange(int(size.sum())) + (begin - size.cumsum(0) + size).repeat_interleave(size)]
    return [picked + start.repeat_interleave(2).repeat_interleave(size) for start in starts]


def replace_layer(value: Tensor, other: Tensor, here: bool) -> Tensor:
    """A layer's neurons, or `other` where `here`."""
    return other.to(value.device, value.dtype) if here else value


def set_values(value: Tensor, where: tuple[Tensor, ...], to: Tensor) -> Tensor:
    """`value` with the neurons at (row, column, neuron), or the embeddings at (row, column), set to `to`."""
    index = tuple(part.to(value.device) for part in where)
    return value.clone().index_put(index, to.to(value.device, value.dtype))


def pooled(values: Tensor, mask: Tensor, how: str) -> Tensor:
    """Neurons [prompt, column, neuron] as how far above and below 0 they are [prompt, 2, neuron]: at the ``last``
    position, or the ``mean`` or ``max`` of that over the columns where `mask` [prompt, column] is 1."""
    values = values.detach()
    both = torch.stack([values.clamp_min(0), (-values).clamp_min(0)], dim=1)
    if how == "last":
        return both[:, :, -1]
    both = both * mask[:, None, :, None].to(both.device, both.dtype)
    if how == "max":
        return both.amax(2)
    return (both.float().sum(2) / mask.sum(1)[:, None, None].to(both.device)).to(both.dtype)


def stack(dtype: torch.dtype, layers: Any) -> Tensor:
    """Layers of [prompt, column, neuron], on any devices, as one tensor on the CPU, in a dtype."""
    return torch.stack([layer.to(dtype) for layer in to_cpu(*layers)], dim=1)


class Guard(TorchFunctionMode):
    """Raise when an op mixes real and meta tensors (weights the server hides): PyTorch would return uninitialised
    memory. Active around every block where weights are hidden (ndif/server.py)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (*args, *(kwargs or {}).values())
        parts = [item for part in given for item in (part if isinstance(part, (tuple, list)) else (part,))]
        hidden = [part.is_meta for part in parts if isinstance(part, torch.Tensor)]
        if any(hidden) and not all(hidden):
            raise RuntimeError("this computes with weights that are hidden here")
        return func(*args, **(kwargs or {}))


def to_cpu(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors as they leave a trace: float32, on the CPU. A meta tensor (from a weight that a server hides) raises: it
    would arrive as uninitialised memory."""
    for tensor in tensors:
        if tensor.device.type == "meta":
            raise RuntimeError("a result depends on weights that are hidden here")
    return tuple(tensor.detach().float().cpu() for tensor in tensors)


def fingerprint(module: Any) -> str:
    """A hash of the parameters' names, shapes and up to `SAMPLE` evenly spaced values of each, but for hidden ones."""
    digest = hashlib.sha256()
    for name, value in module.named_parameters():
        digest.update(f"{name}{tuple(value.shape)}".encode())
        if value.device.type != "meta":
            flat = value.detach().flatten()
            sample = flat[:: max(1, flat.numel() // SAMPLE)]
            digest.update(sample.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()


def weights(module: Any) -> tuple[bool, bool, str]:
    """Whether every weight can be read, whether all are floating-point, and their fingerprint."""
    kinds = [(value.device.type != "meta", value.is_floating_point()) for _, value in module.named_parameters()]
    return all(kind[0] for kind in kinds), all(kind[1] for kind in kinds), fingerprint(module)
