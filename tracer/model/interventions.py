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
from tracer.model import experts, head
from tracer.model import rules as linearize

Edit = Callable[[int, Tensor, SimpleNamespace | None], Tensor]
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
    slots: list[SimpleNamespace | None] | None = None,
) -> list[Any]:
    """Walk the blocks, linearise their modules, and return what `visit` makes of each layer's nodes of a `basis`:
    `experts.Mixture`, or `experts.Dense` of the module whose input or output they are (`node_module`).

    Args:
        constants: receives those of each block's linearisation; see `observe`.
        reads: receives what the metric is read from; see `inside`.
        slots: receives where each layer's neurons are, None of a layer without experts; see `experts.slots`.
    """
    visited = []
    hold(nn, plan, rules)
    blocks = list(nn.get(plan.blocks))
    linearize.prepare(blocks, [part.steps for part in plan.layers])
    sizes = [] if constants is None else stream_sizes(nn, plan)
    for layer, (block, laid) in enumerate(zip(blocks, plan.layers, strict=True)):
        found = SimpleNamespace(scales={}, up=None, output_gate=None, value_factor=None)
        last = last_inside(laid, where := node_module(laid, basis))
        for number, (kind, path) in enumerate(laid.steps):
            module = block.get(path)
            if constants is not None:
                observe(found, kind, path, block, laid)
            if kind in ("neurons", "mixture"):
                site = experts.Dense(module) if laid.experts is None else experts.Mixture(block, laid.experts, rules)
                at_neurons(found, site, layer, constants, reads, slots)
                visited += [visit(site, layer)] if path == where else []
                behind_neurons(found, site, laid, constants)
            else:
                linearize.apply(kind, module, rules)
            if constants is not None and kind in ("attention", "delta"):  # runs once its inputs are set
                mixed(found, kind, module, laid)
            if number == last:
                visited.append(visit(experts.Dense(block.get(where)), layer))
        if where is None:
            visited.append(visit(experts.Dense(block), layer))
        if reads is not None and (reads.kind, reads.layer) == ("direction", layer):
            reads.state = experts.Dense(block).output()
        if constants is not None:
            constants.append(resized(found, laid, sizes[layer]))
    return visited


def hold(nn: Any, plan: SimpleNamespace, rules: frozenset[str]) -> None:
    """Linearise what runs before the blocks, and hold what it gives constant."""
    for kind, path in plan.constants:
        linearize.apply(kind, nn.get(path), rules)
        linearize.apply("constant", nn.get(path), rules)


def stream_sizes(nn: Any, plan: SimpleNamespace) -> list[float]:
    """What the residual stream is multiplied by before each block, and behind the last, by numbers of earlier blocks.

    The replay walks the stream without: what each part adds is divided by it, and what reads the stream multiplies. For
    an attention both cancel; for an MLP and the final norm it is put into the norms' statistics.
    """
    sizes = [1.0]
    for block, laid in zip(nn.get(plan.blocks), plan.layers, strict=True):
        sizes.append(sizes[-1] * (1.0 if laid.scalar is None else float(getattr(block._module, laid.scalar))))
    return sizes


def resized(found: SimpleNamespace, laid: SimpleNamespace, size: float) -> SimpleNamespace:
    """A block's constants with what the stream is multiplied by in the statistics of the norms around its MLP
    (`stream_sizes`)."""
    if size != 1.0:
        found.scales[laid.mlp_in] = found.scales[laid.mlp_in] * size
        found.scales[laid.mlp_out] = found.scales[laid.mlp_out] / size
    return found


def mixed(found: SimpleNamespace, kind: str, module: Any, laid: SimpleNamespace) -> None:
    """Add the pattern of what carries values from token to token, with the norms before it, to a block's constants."""
    if kind == "delta":
        found.pattern, width = linearize.delta_pattern(module)
        found.value_factor = found.value_factor[..., -width:]
        return
    found.pattern = linearize.pattern(module, found.kernel).float()
    for norm in (laid.value_norm, laid.latent_norm):
        found.pattern = of_normed(found.pattern, found.scales.pop(norm, None))


def of_normed(pattern: Tensor, scale: Tensor | None) -> Tensor:
    """A pattern [prompt, head, query, key] times the statistic of a norm before it, of values [prompt, column, value
    head] or of a latent [prompt, column]; None: there is none."""
    if scale is None:
        return pattern
    by_head = scale[:, None]
    if scale.ndim == 3:
        by_head = scale.transpose(1, 2).repeat_interleave(pattern.shape[1] // scale.shape[2], 1)
    return pattern * by_head[:, :, None].to(pattern.device)


def node_module(laid: SimpleNamespace, basis: str) -> str | None:
    """Path in a block of the module that has a basis's nodes: the down projection; of the basis ``attention`` the
    attention or the norm behind it, whose output is what is added to the residual stream; None for the block itself, of
    the basis ``residual``."""
    if basis == "residual":
        return None
    if basis == "attention":
        return laid.attention_out or next(path for kind, path in laid.steps if kind in ("attention", "delta"))
    return laid.down


def last_inside(laid: SimpleNamespace, where: str | None) -> int | None:
    """Number of a block's last step in the module at `where`: its output comes behind all that is read in it. None
    for the block itself, and for the neurons, which have a step of their own."""
    if where in (None, laid.down):
        return None
    return max(number for number, (_, path) in enumerate(laid.steps) if f"{path}.".startswith(f"{where}."))


def inside(metric: SimpleNamespace | None) -> SimpleNamespace | None:
    """Where a metric is read that is not one of logits: its `kind` and `layer`; `walk` puts the `state` there that is
    read [prompt, column, coordinate], `score` the `values` of its terms. None for a metric of logits."""
    if metric is None or metric.of is None:
        return None
    return SimpleNamespace(kind=metric.of.kind, layer=metric.of.layer, state=None, slots=None, values=None)


def at_neurons(
    found: SimpleNamespace,
    site: Any,
    layer: int,
    constants: Any,
    reads: SimpleNamespace | None,
    slots: list[SimpleNamespace | None] | None,
) -> None:
    """What is read of a layer's neurons before anything is done to them: for the constants of its block, for a metric
    that is one of them, and where they are."""
    if constants is not None:
        observe_neurons(found, site)
    if reads is not None and (reads.kind, reads.layer) == ("neuron", layer):
        reads.state, reads.slots = site.read(), site.slots
    if slots is not None:
        slots.append(site.slots)


def behind_neurons(found: SimpleNamespace, site: Any, laid: SimpleNamespace, constants: Any) -> None:
    """What is read behind them, and passed on as a copy where the block adds to it in place."""
    if constants is not None:
        found.output = site.output().detach().float()
    if laid.in_place:
        site.set_output(site.output().clone())


def observe(found: SimpleNamespace, kind: str, path: str, block: Any, laid: SimpleNamespace) -> None:
    """Add the constants of one module's linearisation to its block's, read in the order that modules run.

    Those are: norms' `scales` by path [prompt, column], but for queries' and keys', which the pattern has in it; the
    attention's `output_gate` [prompt, column, head and coordinate], None without one, with it the norm of a delta net's
    mixed values; the `value_factor` of its convolution's activation, alike; the activation's input `gate` and the other
    factor `up` (None without one) [prompt, column, d_mlp]. `walk` adds the neurons (`observe_neurons`), the attention
    `pattern` [prompt, head, query, key], which comes of its `kernel` and has the norms of values and of a latent in it,
    and the MLP's `output` [prompt, column, d_model].
    """
    module = block.get(path)
    if kind == "attention":
        found.kernel = linearize.kernel(module)
    elif kind == "output_gate":
        found.output_gate = linearize.output_gate_call(module).output.detach().flatten(2)
    elif kind == "delta_values":
        found.value_factor = linearize.value_factor(module)
    elif kind == "norm_gate":
        found.output_gate = torch.nn.functional.silu(module.inputs[0][1].detach().float())
    elif path == laid.heads_norm:
        heads = found.output_gate * module.weight.float() * linearize.scale(kind, module).detach()[..., None]
        found.output_gate = heads.reshape(len(found.pattern), found.pattern.shape[-1], -1)
    elif path in (laid.attention_in, laid.attention_out, laid.mlp_in, laid.mlp_out, laid.value_norm, laid.latent_norm):
        found.scales[path] = linearize.scale(kind, module).detach()
    elif kind == "activation":
        if laid.gate is not None and laid.gate == laid.up:
            found.up = block.get(laid.up).output.detach().chunk(2, dim=-1)[1]
        found.gate = module.input.detach()
    elif kind == "product" and laid.gate != laid.up:
        found.up = block.get(laid.up).output.detach()


def observe_neurons(found: SimpleNamespace, site: Any) -> None:
    """The same of neurons: their `values`, and where they are (`slots`); of a mixture also their `gate` and `up`
    [prompt, column, place], and what each slot's input and output are multiplied by (`reads`, None for 1, and
    `writes`, the shared experts' last) [prompt, column, slot]."""
    found.values, found.slots = site.read().detach(), site.slots
    if site.slots is not None:
        parts = site.gate, site.up, site.reads, site.writes
        split = [None if part is None else part.detach().unflatten(0, site.shape[:-1]) for part in parts]
        found.gate, found.up, found.reads, found.writes = split


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
    edit: Edit | None = None,
    constants: list[SimpleNamespace] | None = None,
    reads: SimpleNamespace | None = None,
    slots: list[SimpleNamespace | None] | None = None,
) -> list[Tensor]:
    """Walk the blocks, set what `edit` changes, and return each layer's neurons; `constants`, `reads` and `slots` as in
    `walk`, but that the nodes of other bases have no slots."""
    found = walk(nn, plan, rules, lambda site, layer: neurons(site, layer, basis, edit), constants, reads, basis, slots)
    if slots is not None and basis != "activation":
        slots[:] = [None] * len(slots)
    return found


def neurons(site: Any, layer: int, basis: str, edit: Edit | None) -> Tensor:
    """The nodes of one layer, after `edit` if given: of the layer, its nodes, and where they are."""
    if basis == "activation":
        if edit is not None:
            changed = edit(layer, site.read(), site.slots)
            if changed is not site.read():
                site.set(changed)
        return site.read()
    if edit is not None:
        site.set_output(edit(layer, site.output(), None))
    return site.output()


def final(nn: Any, plan: SimpleNamespace, rules: frozenset[str], scales: list[Tensor] | None = None) -> Tensor:
    """What leaves the linearised final norm [prompt, column, d_model]; `scales` receives that norm's, per column."""
    kind, path = plan.final_norm
    if scales is not None:
        scales.append(linearize.scale(kind, nn.get(path)).detach() * stream_sizes(nn, plan)[-1])
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
    uncapped = uncapped if plan.logit_scale == 1 else uncapped * plan.logit_scale
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
        at = torch.full_like(metric.row, metric.of.neuron)
        place = experts.places(reads.slots, metric.row, metric.column, at).to(rows.device)
        return torch.where(place < 0, 0.0, rows.gather(-1, place.clamp_min(0)[:, None])[:, 0])
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


def detach_mlp(site: Any, basis: str) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Detach one MLP's output, so that no path runs through it. Returns its neurons, the same as a leaf and that leaf's
    output (both None in the basis ``output``), and the detached output, a leaf too.

    Leaves are as wide as the residual stream: gradients to all layers' neurons would be several times larger.
    """
    if basis == "output":
        before, inner, inside = site.output(), None, None
    else:
        before = site.read()
        inner = before.detach().clone().requires_grad_(True)
        site.set(inner)
        inside = site.output()
    leaf = site.output().detach().clone().requires_grad_(True)
    site.set_output(leaf)
    return before, inner, inside, leaf


def pick(site: Any, neurons: Tensor) -> Tensor:
    """The values of some neurons of one layer, at every column [prompt, column, neuron], 0 where an expert did not run;
    what is not asked for is not read."""
    if not len(neurons):
        return torch.zeros(0)
    value = site.read().detach()
    if site.slots is None:
        return value[..., neurons.to(value.device)].float().cpu()
    row, column, number = torch.meshgrid(*(torch.arange(size) for size in value.shape[:2]), neurons, indexing="ij")
    at = experts.places(site.slots, row, column, number)
    return torch.where(at < 0, 0.0, value.gather(-1, at.clamp_min(0)).float()).cpu()


def at_places(
    nodes: Sequence[Tensor], slots: Sequence[SimpleNamespace | None]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Nodes, of each prompt rows of (layer, column, neuron), with neurons' places for their numbers; and which of them
    are there [node], None where all are: of those that are not, the place is any."""
    found, there = [], []
    for row, rows in enumerate(nodes):
        placed, ran = rows.clone(), torch.ones(len(rows), dtype=torch.bool)
        for layer, where in enumerate(slots):
            mine = (rows[:, 0] == layer).nonzero()[:, 0] if where is not None else rows[:0, 0]
            if len(mine):
                at = experts.places(where, row, rows[mine, 1], rows[mine, 2]).cpu()
                placed[mine, 2], ran[mine] = at.clamp_min(0), at >= 0
        found.append(placed)
        there.append(None if bool(ran.all()) else ran)
    return found, there


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


def only_there(
    ran: Tensor | None, values: Tensor, parts: tuple[Tensor, Tensor, Tensor, Tensor | None]
) -> tuple[Any, ...]:
    """What `direct_weights` gives of a prompt behind its targets' values, 0 where a node is not there."""
    weight, embedding, incoming, moved = parts
    if ran is None:
        return values, weight, embedding, incoming, moved
    target = torch.cat([ran, torch.ones(len(values) - len(ran), dtype=torch.bool)])
    weight = weight * target[:, None] * ran
    if moved is not None:
        source = torch.cat([ran, torch.ones(moved.shape[1] - len(ran), dtype=torch.bool)])
        moved = moved * target[:, None] * source
    return values * target, weight, embedding * target[:, None], incoming * target, moved


def rows_there(ran: Tensor | None, values: Tensor) -> Tensor:
    """Rows of nodes [node, ...], 0 where a node is not there."""
    return values if ran is None else values * ran[:, None]


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
    return experts.Dense(next(iter(nn.get(plan.blocks)))).output()


def apply_edits(
    edits: Sequence[tuple[int, Tensor, Tensor | float, Tensor | float]],
    layer: int,
    value: Tensor,
    where: SimpleNamespace | None,
) -> Tensor:
    """A layer's neurons after every edit (layer, mask, scale, shift) of that layer, in order."""
    width = value.shape[-1]
    for at, mask, *parts in edits:
        if at == layer:
            scale, shift = (
                experts.placed(part, where, width).to(value.device, value.dtype)
                if isinstance(part, torch.Tensor) and part.dim()
                else part
                for part in parts
            )
            value = torch.where(experts.placed(mask, where, width).to(value.device), value * scale + shift, value)
    return value


def scale_nodes(
    value: Tensor, layer: int, entries: Tensor, scale: Tensor, where: SimpleNamespace | None = None
) -> Tensor:
    """A layer's neurons with single ones multiplied, where they are there.

    Args:
        entries: rows of (layer, row, column or -1 for every one, neuron), none twice. scale: of each.
    """
    here = entries[:, 0] == layer
    if not bool(here.any()):
        return value
    if where is not None:
        return scale_placed(value, entries[here].long(), scale[here], where)
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


def scale_placed(value: Tensor, entries: Tensor, scale: Tensor, where: SimpleNamespace) -> Tensor:
    """`scale_nodes` of a mixture: all `entries` are of its layer."""
    wide = torch.promote_types(value.dtype, torch.float32)
    columns = torch.arange(value.shape[1])
    by = torch.ones(value.shape, dtype=wide, device=value.device)
    for (_, row, column, number), factor in zip(entries.tolist(), scale.tolist(), strict=True):
        at = columns if column < 0 else columns[column : column + 1]
        place = experts.places(where, row, at, torch.full_like(at, number))
        ran = place >= 0
        by[row, at.to(ran.device)[ran], place[ran]] = factor
    return torch.where(by == 1, value, (value.to(wide) * by).to(value.dtype))


def values_at(value: Tensor, layer: int, members: Tensor, where: SimpleNamespace | None = None) -> Tensor:
    """A layer's values [row, member] at those members, rows of (layer, column, neuron), that are of the layer; 0 where
    one is not there."""
    _, column, neuron = members[members[:, 0] == layer].long().to(value.device).unbind(-1)
    if where is None:
        return value[:, column, neuron]
    row = torch.arange(len(value), device=value.device)[:, None]
    at = experts.places(where, row, column, neuron.expand(len(value), -1))
    return torch.where(at < 0, 0, value[row, column, at.clamp_min(0)])


def ablate_sets(
    value: Tensor,
    layer: int,
    rows: Tensor,
    rankings: tuple[int, int, Tensor, Sequence[Tensor]],
    to: Tensor | None,
    where: SimpleNamespace | None = None,
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
    if where is not None:
        return ablate_placed(value, layer, rows, rankings, to, where)
    if to is not None and to.shape[-1] > value.shape[-1]:  # other layers have more neurons
        to = to[..., : value.shape[-1]].contiguous()
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


def ablate_placed(
    value: Tensor,
    layer: int,
    rows: Tensor,
    rankings: tuple[int, int, Tensor, Sequence[Tensor]],
    to: Tensor | None,
    where: SimpleNamespace,
) -> Tensor:
    """`ablate_sets` of a mixture, whose neurons are elsewhere in each row: the level of each is looked up."""
    _, n_listed, listed, dense = rankings
    number, changed = experts.numbers(where).cpu(), value.clone()
    rank, _, position, neuron, level = listed[listed[:, 1] == layer].long().unbind(-1)
    size = where.count * where.width + where.shared
    for row in range(len(value)):
        ranking, first, second, third, stays, source, begin = rows[:, row].tolist()
        mine, at = number[row, begin:], torch.arange(value.shape[1] - begin)[:, None]
        if ranking < n_listed:
            key, order = (position * size + neuron)[rank == ranking].sort()
            levels = looked_up(key, level[rank == ranking][order], at * size + mine)
        else:
            levels = dense[ranking - n_listed][layer][at, mine].long()
        chosen = (levels < first) | ((levels >= second) & (levels < third))
        gone = (~chosen if stays else chosen).to(value.device)
        new = 0.0 if to is None else to[source, layer][at, mine].to(value.device, value.dtype)
        changed[row, begin:] = torch.where(gone, new, value[row, begin:])
    return changed


def looked_up(keys: Tensor, values: Tensor, wanted: Tensor) -> Tensor:
    """The value of each wanted key, of rising `keys`; of those that are not among them one above all."""
    none = torch.full_like(wanted, torch.iinfo(torch.int64).max)
    if not len(keys):
        return none
    found = torch.searchsorted(keys, wanted).clamp_max(len(keys) - 1)
    return torch.where(keys[found] == wanted, values[found], none)


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
        mine = levels[layer][:, :n_neurons].flatten()
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


def set_values(value: Tensor, where: tuple[Tensor, ...], to: Tensor, slots: SimpleNamespace | None = None) -> Tensor:
    """`value` with the neurons at (row, column, neuron), or the embeddings at (row, column), set to `to`; those that
    are not there are left out."""
    index = tuple(part.to(value.device) for part in where)
    if slots is not None:
        at = experts.places(slots, *index)
        index, to = tuple(part[at >= 0] for part in (*index[:2], at)), to[(at >= 0).to(to.device)]
    return value.clone().index_put(index, to.to(value.device, value.dtype))


def pooled(values: Tensor, mask: Tensor, how: str, where: SimpleNamespace | None, n_neurons: int) -> Tensor:
    """Neurons [prompt, column, neuron] as how far above and below 0 they are [prompt, 2, neuron]: at the ``last``
    position, or the ``mean`` or ``max`` of that over the columns where `mask` [prompt, column] is 1."""
    values = values.detach()
    both = torch.stack([values.clamp_min(0), (-values).clamp_min(0)], dim=1)
    mask = mask.to(both.device)
    if how == "last":
        found = both[:, :, -1:]
        where = where and SimpleNamespace(**vars(where) | {"expert": where.expert[:, -1:]})
        return over_columns(found, where, n_neurons, "amax")
    both = both * mask[:, None, :, None].to(both.dtype)
    if how == "max":
        return over_columns(both, where, n_neurons, "amax")
    total = over_columns(both.float(), where, n_neurons, "sum")
    return (total / mask.sum(1)[:, None, None]).to(both.dtype)


def over_columns(both: Tensor, where: SimpleNamespace | None, n_neurons: int, how: str) -> Tensor:
    """Values of both sides [prompt, 2, column, place], none below 0, summed or their largest, over columns [prompt, 2,
    neuron]."""
    if where is None:
        found = both.amax(2) if how == "amax" else both.sum(2)
        return torch.nn.functional.pad(found, (0, n_neurons - found.shape[-1]))
    at = experts.numbers(where).to(both.device).flatten(1)[:, None].expand(-1, 2, -1)
    return both.new_zeros(*both.shape[:2], n_neurons).scatter_reduce(-1, at, both.flatten(2), how)


def stack(
    dtype: torch.dtype, layers: Any, slots: Sequence[SimpleNamespace | None] | None = None, n_neurons: int = 0
) -> Tensor:
    """Layers of [prompt, column, neuron], on any devices, as one tensor on the CPU, in a dtype; by number
    (`n_neurons` in the largest layer) where `slots` says that they have places."""
    found = [layer.to(dtype) for layer in to_cpu(*layers)]
    if slots is not None:
        found = [experts.numbered(layer, where, n_neurons) for layer, where in zip(found, slots, strict=True)]
    return torch.stack(found, dim=1)


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
    """A hash of the parameters' (and saved buffers') names, shapes and up to `SAMPLE` evenly spaced values of each, but
    for hidden ones."""
    digest = hashlib.sha256()
    for name, value in [*module.named_parameters(), *saved_buffers(module)]:
        digest.update(f"{name}{tuple(value.shape)}".encode())
        if value.device.type != "meta":
            flat = value.detach().flatten()
            sample = flat[:: max(1, flat.numel() // SAMPLE)]
            digest.update(sample.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()


def saved_buffers(module: Any) -> list[tuple[str, Tensor]]:
    """The buffers that a checkpoint has beside the parameters."""
    saved = module.state_dict(keep_vars=True)
    return [(name, value) for name, value in module.named_buffers() if name in saved]


def weights(module: Any) -> tuple[bool, bool, str]:
    """Whether every weight can be read, whether all are floating-point, and their fingerprint."""
    kinds = [(value.device.type != "meta", value.is_floating_point()) for _, value in module.named_parameters()]
    return all(kind[0] for kind in kinds), all(kind[1] for kind in kinds), fingerprint(module)
