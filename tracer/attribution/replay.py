"""The frozen linear replay: every direct edge of some prompts as plain matrix products (method.md section 4).

With norms, patterns and MLPs frozen, the residual stream is a linear map. A source leaves into it as a vector, a target
reads it with another, and an edge is their product across the blocks between. What sources write is walked up, all
sources of all prompts together, each from its own layer and position to the last position that a target reads; norms
are folded into the matrices, so that a block is three products. A source's first attention sees it at one position
alone, and the last is needed at the targets' positions alone. Only selected rows of MLP weights are used. Positions
before a source do not matter where no token looks at a later one; the patterns themselves say whether one does.

Knows the linear algebra of a block from the model's `plan`, and runs beside the model, here or on a server: functions
travel as their source. Refuses to know autograd, nnsight and files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tracer.model import experts
from tracer.model import rules as linearize

CPU_ROWS, GPU_ROWS = 512, 2**15
"""Positions of all sources that are multiplied at a time: on a CPU, what its cache holds."""


def linked(module: Any, plan: SimpleNamespace, prompts: Sequence[SimpleNamespace], max_bytes: int) -> list[Any]:
    """For each prompt: weights of all edges [target, source], the incoming weight of each target over every neuron and
    embedding [target], the targets' values [target], and what the sources' distances from their baselines carry, None
    without baselines. Sources are the neurons, then every embedding; targets are the neurons, then the logits.

    Args:
        prompts: of each its `frozen` constants (see `frozen`), `neurons` (layer, position, neuron) and `logits`
            (position, token) with their `logit_values` and by how much a soft-cap `shrunk` them; the `basis`; whether
            MLPs have a `linear_gate` in the place of the half rule; and `baselines`: of the neurons [neuron] and
            embeddings [pos, d_model], or None.
        max_bytes: bytes of residual streams that are held at a time.
    """
    walks, going, held = [prepared(module, plan, prompt) for prompt in prompts], [], 0
    for run in (run for walk in walks for run in runs(walk)):
        size = 4 * len(run.rows) * (run.walk.reach - run.first) * plan.d_model
        if going and held + size > max_bytes:
            sweep(module, plan, going)
            going, held = [], 0
        going.append(run)
        held += size
    sweep(module, plan, going)
    return [answer(walk) for walk in walks]


def frozen(found: SimpleNamespace, row: int, first: int, nodes: Tensor, basis: str) -> Any:
    """One prompt's constants, out of a batch's (`interventions.observe`): without its padding of `first` columns, and
    of gates, ups and values those of its nodes alone, rows of (layer, position, neuron) [node, 3].

    Returns:
        `embedding` [pos, d_model], `final_scale` [pos], and for each of `blocks` its `scales` by path [pos], `pattern`
        [head, query, key], `output_gate` and `value_factor` [pos, head and coordinate] or None, `output` [pos,
        d_model], and of its nodes `gate`, `up` and `values`, either [node] (basis ``activation``) or, of gate and up,
        [node, d_mlp] (basis ``output``).
    """
    blocks = []
    for layer, block in enumerate(found.blocks):
        position, neuron = nodes[nodes[:, 0] == layer, 1:].to(block.output.device).unbind(-1)
        column, where = position + first, block.slots
        place = neuron if basis != "activation" else experts.places(where, row, column, neuron)
        there = place >= 0

        def picked(every: Tensor | None, at: tuple[Any, ...] = (row, column, place.clamp_min(0))) -> Tensor | None:
            if every is None:
                return None
            return (every[at] if basis == "activation" else every[at[:2]]).float()

        inside = block.values if basis == "activation" else block.output
        blocks.append(
            SimpleNamespace(
                scales={path: scale[row, first:] for path, scale in block.scales.items()},
                pattern=block.pattern[row, :, first:, first:],
                output=block.output[row, first:],
                **carrying(block, row, first),
                gate=picked(block.gate),
                up=picked(block.up),
                values=torch.where(there, inside[row, column, place.clamp_min(0)].float(), 0.0),
                **of_prompt(block, row, first),
                place=place,
            )
        )
    embedding = found.embedding[row, first:].detach().float()
    return SimpleNamespace(embedding=embedding, blocks=blocks, final_scale=found.final_scale[row, first:])


def of_prompt(block: SimpleNamespace, row: int, first: int) -> dict[str, Any]:
    """What a mixture has beside an MLP, of one prompt without its padding: the `expert` of each slot and what its
    output and input are multiplied by (`writes`, `reads`) [pos, slot]; all None of a block without experts."""
    if block.slots is None:
        return {"expert": None, "writes": None, "reads": None}
    parts = {"expert": block.slots.expert, "writes": block.writes, "reads": block.reads}
    return {name: None if part is None else part[row, first:] for name, part in parts.items()}


def carrying(block: SimpleNamespace, row: int, first: int) -> dict[str, Tensor | None]:
    """Of one prompt, what an attention multiplies values by, one by one, beside its pattern."""
    found = {"output_gate": block.output_gate, "value_factor": block.value_factor}
    return {name: None if value is None else value[row, first:] for name, value in found.items()}


def unpadded(found: SimpleNamespace, row: int, first: int) -> SimpleNamespace:
    """The same of all of a prompt's neurons: `gate`, `up` and `values` [pos, d_mlp], without a copy."""
    blocks = [
        SimpleNamespace(
            scales={path: scale[row, first:] for path, scale in block.scales.items()},
            pattern=block.pattern[row, :, first:, first:],
            output=block.output[row, first:],
            **carrying(block, row, first),
            gate=block.gate[row, first:],
            up=None if block.up is None else block.up[row, first:],
            values=block.values[row, first:],
            **of_prompt(block, row, first),
        )
        for block in found.blocks
    ]
    embedding = found.embedding[row, first:].detach().float()
    return SimpleNamespace(embedding=embedding, blocks=blocks, final_scale=found.final_scale[row, first:])


# Weights.


def part(module: Any, plan: SimpleNamespace, layer: int, path: str) -> Any:
    """A module of a block."""
    return module.get_submodule(f"{plan.blocks}.{layer}.{path}".rstrip("."))


def activation(module: Any, plan: SimpleNamespace, layer: int) -> Any:
    """The activation module of a block."""
    return part(module, plan, layer, next(path for kind, path in plan.layers[layer].steps if kind == "activation"))


def matrix(module: Any, plan: SimpleNamespace, layer: int, weight: Sequence[str]) -> Tensor:
    """A linear map of a block [out, in], in the model's own dtype, without a copy where possible."""
    path, which = weight
    inside = part(module, plan, layer, path)
    whole = inside.weight.T if type(inside).__name__ == "Conv1D" else inside.weight
    half = len(whole) // 2
    if which in ("first half", "last half"):
        return whole[:half] if which == "first half" else whole[half:]
    return whole if which == "all" else of_values(module, plan, layer, whole, which)


def of_values(module: Any, plan: SimpleNamespace, layer: int, whole: Tensor, which: str) -> Tensor:
    """The rows of a map that lead to values, or to the latent that they come of."""
    laid = plan.layers[layer]
    if which == "latent":
        return whole[: matrix(module, plan, layer, laid.value).shape[1]]
    width = matrix(module, plan, layer, laid.output).shape[1]
    if which == "tail":
        return whole[-width:]
    if which == "values of heads":
        return whole.view(plan.n_heads, -1, whole.shape[1])[:, -(width // plan.n_heads) :].flatten(0, 1)
    head = len(whole) // (plan.n_heads + 2 * laid.n_values)
    if which == "values":
        return whole[-laid.n_values * head :]
    return whole.view(laid.n_values, -1, head, whole.shape[1])[:, -1].reshape(-1, whole.shape[1])


def gain(module: Any, plan: SimpleNamespace, path: str) -> Tensor:
    """What a norm multiplies each coordinate by, beside its statistic."""
    weight = getattr(module.get_submodule(path), "weight", None)
    return torch.ones(()) if weight is None else weight.detach().float() + plan.norm_offset


def kind_of(plan: SimpleNamespace, layer: int, path: str) -> str:
    """Of a norm of a block."""
    return next(kind for kind, at in plan.layers[layer].steps if at == path)


def through_norm(
    module: Any,
    plan: SimpleNamespace,
    layer: int,
    path: str | None,
    scale: Tensor | None,
    state: Tensor,
    transposed: bool,
) -> Tensor:
    """Vectors [row, d_model] through a frozen norm of a block, of `scale` [row]; as they are where there is none."""
    if path is None or scale is None:
        return state
    factor = scale[:, None] * gain(module, plan, f"{plan.blocks}.{layer}.{path}").to(state.device)
    return scaled(kind_of(plan, layer, path), factor, state, transposed)


def scaled(kind: str, factor: Tensor, state: Tensor, transposed: bool) -> Tensor:
    """A frozen norm; of a LayerNorm the centring stays."""
    if kind == "rms_norm":
        return state * factor
    if transposed:
        state = state * factor
        return state - state.mean(-1, keepdim=True)
    return (state - state.mean(-1, keepdim=True)) * factor


def out_of_mlp(
    module: Any, plan: SimpleNamespace, layer: int, scale: Tensor | None, state: Tensor, transposed: bool = False
) -> Tensor:
    """What an MLP gives [row, d_model] as it enters the residual stream: through the norm behind it, if there is one,
    and times the constant of the family's branches."""
    through = through_norm(module, plan, layer, plan.layers[layer].mlp_out, scale, state, transposed)
    return through if plan.branch_scale == 1 else plan.branch_scale * through


def attention(module: Any, plan: SimpleNamespace, layer: int) -> tuple[Tensor, Tensor]:
    """The maps of a block's attention, its norms' gains and the constant of the family's branches folded in, float32:
    into the values [value, d_model], and out of the mixed heads [d_model, head and coordinate]."""
    laid = plan.layers[layer]
    value, output = matrix(module, plan, layer, laid.value).float(), matrix(module, plan, layer, laid.output).float()
    if laid.latent is not None:
        value = behind_norm(module, plan, layer, laid.latent_norm, value)
        value = value @ matrix(module, plan, layer, laid.latent).float().to(value.device)
    value = behind_norm(module, plan, layer, laid.attention_in, value)
    if laid.attention_out is not None:
        if kind_of(plan, layer, laid.attention_out) == "layer_norm":
            output = output - output.mean(0, keepdim=True)
        output = output * gain(module, plan, f"{plan.blocks}.{layer}.{laid.attention_out}").to(output.device)[:, None]
    return value, output if plan.branch_scale == 1 else plan.branch_scale * output


def behind_norm(module: Any, plan: SimpleNamespace, layer: int, path: str | None, weight: Tensor) -> Tensor:
    """A map [out, in] of what leaves a norm of a block, as one of what enters it, but for the norm's statistic."""
    if path is None:
        return weight
    weight = weight * gain(module, plan, f"{plan.blocks}.{layer}.{path}").to(weight.device)
    centred = kind_of(plan, layer, path) == "layer_norm"
    return weight - weight.mean(1, keepdim=True) if centred else weight


def mixing(module: Any, plan: SimpleNamespace, layer: int, block: SimpleNamespace) -> SimpleNamespace:
    """How a block's attention carries from position to position: its `pattern` [head, query, key] between its norms'
    statistics; the `gate` on what it mixed [query, head and coordinate], None without one; and what is between the map
    into the values and the pattern (`entered`), None where nothing is."""
    pattern, laid, entry = block.pattern, plan.layers[layer], None
    scale = block.scales.get(laid.attention_in, torch.ones(pattern.shape[-1], device=pattern.device))
    if laid.value_conv is None:
        pattern = pattern * scale
    else:
        taps = part(module, plan, layer, laid.value_conv).weight[-block.value_factor.shape[-1] :, 0].float()
        entry = SimpleNamespace(scale=scale, taps=taps, factor=block.value_factor)
    if laid.attention_out is not None:
        pattern = pattern * block.scales[laid.attention_out][:, None]
    gate = None if block.output_gate is None else block.output_gate.float()
    return SimpleNamespace(pattern=pattern, gate=gate, entry=entry)


def entered(values: Tensor, mixed: SimpleNamespace, first: int = 0, back: bool = False) -> Tensor:
    """Values at all positions from the `first` on [..., pos, head and coordinate] through the norm's statistic, the
    short convolution and its activation; or `back`, what reads those as what reads the values."""
    if mixed.entry is None:
        return values
    at, taps = slice(first, first + values.shape[-2]), mixed.entry.taps.to(values.device)
    factor, scale = mixed.entry.factor[at].to(values.device), mixed.entry.scale[at, None].to(values.device)
    values, found = values * (factor if back else scale), torch.zeros_like(values)
    for by, tap in enumerate(taps.flip(1).T):  # how far a tap looks back
        pad = (0, 0, -by, by) if back else (0, 0, by, -by)
        if by < values.shape[-2]:
            found += tap * torch.nn.functional.pad(values, pad)
    return found * (scale if back else factor)


def gated(heads: Tensor, mixed: SimpleNamespace, at: Any = slice(None), axis: int = 0) -> Tensor:
    """What an attention mixed [..., head and coordinate], at some queries, which `axis` counts, through the gate on its
    output."""
    if mixed.gate is None:
        return heads
    gate = mixed.gate[at].to(heads.device)
    return heads * gate.view(len(gate), *[1] * (heads.ndim - 2 - axis), -1)


# One prompt: its sources and targets.


def prepared(module: Any, plan: SimpleNamespace, prompt: SimpleNamespace) -> SimpleNamespace:
    """A prompt's walk: its sources and targets, how far they reach, and what is found of them."""
    blocks, length = prompt.frozen.blocks, len(prompt.frozen.embedding)
    sources, targets, values = ends(module, plan, prompt)
    device, causal = values.device, not any(bool(block.pattern.triu(1).any()) for block in blocks)
    top = min(len(blocks), int(targets.layer.max()) + 1) if len(targets.layer) else 0
    return SimpleNamespace(
        prompt=prompt,
        sources=sources,
        targets=targets,
        readers=readers(targets),
        first=sources.position if causal else torch.zeros_like(sources.position),
        reach=(int(targets.position.max()) + 1 if causal else length) if len(targets.layer) else 0,
        top=top,
        wanted=targets.position[targets.layer >= top - 1].unique().tolist(),
        found=torch.zeros(len(targets.layer), len(sources.position), device=device),
        incoming=torch.zeros(len(targets.layer), device=device),
        values=values,
    )


def ends(
    module: Any, plan: SimpleNamespace, prompt: SimpleNamespace
) -> tuple[SimpleNamespace, SimpleNamespace, Tensor]:
    """Sources and targets as layers, positions and vectors, and the targets' values. Behind the neurons and embeddings,
    the sources are how far embeddings are from their baseline, where they are (`differing`)."""
    neurons, bases, embedding = prompt.neurons, prompt.baselines, plan.embedding_scale * prompt.frozen.embedding
    device, length = embedding.device, len(embedding)
    values = torch.zeros(len(neurons), device=device)
    written, read = torch.zeros(2, len(neurons), plan.d_model, device=device)
    for layer, block in enumerate(prompt.frozen.blocks):
        mine = (neurons[:, 0] == layer).nonzero()[:, 0]
        values[mine] = block.values.to(device)
        if len(mine):
            both = vectors(module, plan, layer, block, neurons[mine], prompt)
            written[mine], read[mine] = (end.to(device) for end in both)
    differing, away = torch.zeros(0, dtype=torch.long), torch.zeros(0, plan.d_model, device=device)
    if bases is not None:
        away = embedding - plan.embedding_scale * bases[1].to(device)
        differing = away.any(-1).nonzero()[:, 0].cpu()
        away = away[differing]
    rows, logits = logit_rows(module, plan, prompt)
    position = torch.cat([neurons[:, 1], torch.arange(length), differing])
    layer = torch.cat([neurons[:, 0], torch.full((length + len(differing),), -1)])
    sources = SimpleNamespace(layer=layer, position=position, vector=torch.cat([written, embedding, away]))
    sources.differing = differing
    targets = SimpleNamespace(
        layer=torch.cat([neurons[:, 0], torch.full((len(prompt.logits),), len(prompt.frozen.blocks))]),
        position=torch.cat([neurons[:, 1], prompt.logits[:, 0]]),
        vector=torch.cat([read, rows.to(device)]),
    )
    return sources, targets, torch.cat([values, logits.to(device)])


def readers(targets: SimpleNamespace) -> dict[int, list[tuple[int, Tensor]]]:
    """For each layer, the positions that its targets read and which targets do."""
    found: dict[int, list[tuple[int, Tensor]]] = {}
    for layer in targets.layer.unique().tolist():
        mine = (targets.layer == layer).nonzero()[:, 0]
        at = targets.position[mine]
        found[layer] = [(position, mine[at == position]) for position in at.unique().tolist()]
    return found


def vectors(
    module: Any, plan: SimpleNamespace, layer: int, block: SimpleNamespace, nodes: Tensor, prompt: SimpleNamespace
) -> tuple[Tensor, Tensor]:
    """What a unit of each node of a layer writes into the residual stream, and what it reads of it, linearised by rules
    1, 3 and 4 or, in the place of 4, with a linear gate [node, d_model]."""
    laid = plan.layers[layer]
    if laid.experts is not None:
        writes, reads = of_mixture(module, plan, layer, block, nodes, prompt)
        return around(module, plan, layer, block, nodes, writes, reads)
    down = matrix(module, plan, layer, (laid.down, "all"))
    neuron = nodes[:, 2].to(down.device)
    if prompt.basis == "activation":
        writes, through = down[:, neuron].T.float(), None
    else:
        writes, through = torch.nn.functional.one_hot(neuron, plan.d_model).float(), down[neuron].float()
    of_gate, of_up = coefficients(module, plan, layer, block.gate, block.up, prompt.linear_gate)

    def into(weight: Sequence[str], coefficient: Tensor) -> Tensor:
        rows = matrix(module, plan, layer, weight)
        if through is None:
            return coefficient[:, None] * rows[neuron.to(rows.device)].float()
        return (coefficient * through) @ rows.float()

    reads = into(laid.up_part, of_up) if of_gate is None else into(laid.gate_part, of_gate) + into(laid.up_part, of_up)
    return around(module, plan, layer, block, nodes, writes, reads)


def of_mixture(
    module: Any, plan: SimpleNamespace, layer: int, block: SimpleNamespace, nodes: Tensor, prompt: SimpleNamespace
) -> tuple[Tensor, Tensor]:
    """The same of nodes of a mixture, without its norms: the weight that the router gave an expert multiplies what its
    neurons write, or what they read; of one that did not run both are 0."""
    laid, inside = plan.layers[layer].experts, part(module, plan, layer, "")
    position, number, device = nodes[:, 1], nodes[:, 2], block.output.device
    of_gate, of_up = coefficients(module, plan, layer, block.gate, block.up, prompt.linear_gate)
    if prompt.basis != "activation":
        one = torch.nn.functional.one_hot(number, plan.d_model).float().to(device)
        grads = into_experts(inside, laid, block, position, one)
        return one, out_of_gates(inside, laid, block, position, of_gate, of_up, grads)
    slot = torch.where(block.place < 0, 0, (block.place // laid.width).clamp_max(laid.n_slots))
    there, rows = (block.place >= 0).float()[:, None], torch.arange(len(position))
    factor = block.writes[position.to(device)][rows, slot].float()[:, None] * there
    reads = experts.rows_in(inside, laid, number, "up")[0].to(device) * of_up[:, None]
    if of_gate is not None:
        reads = reads + experts.rows_in(inside, laid, number, "gate")[0].to(device) * of_gate[:, None]
    if block.reads is not None:
        of_slot = torch.nn.functional.pad(block.reads[position.to(device)].float(), (0, 1), value=1.0)
        reads = reads * of_slot[rows, slot][:, None]
    return experts.rows_out(inside, laid, number).to(device) * factor, reads * there


def places(plan: SimpleNamespace, layer: int, block: SimpleNamespace, position: Tensor, number: Tensor) -> Tensor:
    """Where neurons of these numbers are at these positions of a prompt; -1 where their expert did not run."""
    laid = plan.layers[layer].experts
    if laid is None:
        return number
    slots = experts.slots(block.expert[None], laid)
    return experts.places(slots, 0, position.to(block.expert.device), number).to(number.device)


def into_experts(inside: Any, laid: SimpleNamespace, block: SimpleNamespace, position: Tensor, state: Tensor) -> Tensor:
    """From what reads a mixture's output at some positions [row, d_model] to what reads its neurons there [row,
    place]."""
    expert, writes = block.expert[position].to(state.device), block.writes[position].float().to(state.device)
    module = inside.get_submodule(laid.path)
    back = experts.by_expert(state, expert, lambda rows, one: rows @ experts.weights_out(module, laid, one).float())
    found = (back * writes[:, :-1, None]).flatten(1)
    if laid.shared is None:
        return found
    down = inside.get_submodule(f"{laid.shared}.down_proj").weight
    return torch.cat([found, state @ down.float() * writes[:, -1:]], 1)


def out_of_gates(
    inside: Any,
    laid: SimpleNamespace,
    block: SimpleNamespace,
    position: Tensor,
    of_gate: Tensor | None,
    of_up: Tensor,
    grads: Tensor,
) -> Tensor:
    """From what reads a mixture's neurons at some positions [row, place] to what reads its input there [row,
    d_model]. `of_gate`, `of_up`: see `coefficients` [row, place]."""
    split, expert = laid.n_slots * laid.width, block.expert[position].to(grads.device)
    both = torch.stack([torch.zeros_like(grads) if of_gate is None else grads * of_gate, grads * of_up], 1)
    module = inside.get_submodule(laid.path)
    routed = experts.together(both[..., :split].unflatten(-1, (-1, laid.width)).transpose(1, 2).flatten(-2), laid)
    back = experts.by_expert(routed, expert, lambda rows, one: rows @ experts.weights_in(module, laid, one)[0].float())
    if block.reads is not None:
        back = back * block.reads[position].float().to(back.device)[..., None]
    found = back.sum(1)
    if laid.shared is None:
        return found
    maps = [inside.get_submodule(f"{laid.shared}.{name}_proj").weight.float() for name in ("gate", "up")]
    return found + both[:, 0, split:] @ maps[0] + both[:, 1, split:] @ maps[1]


def through_gates(
    inside: Any,
    laid: SimpleNamespace,
    block: SimpleNamespace,
    position: Tensor,
    of_gate: Tensor | None,
    of_up: Tensor,
    state: Tensor,
) -> Tensor:
    """From a mixture's input at some positions [row, d_model] to its neurons there [row, place], without biases: the
    transpose of `out_of_gates`."""
    expert = block.expert[position].to(state.device)
    reads = None if block.reads is None else block.reads[position].float().to(state.device)
    both = experts.entering(inside, laid, state, expert, reads, biased=False)
    found = both[:, 1] * of_up
    return found if of_gate is None else found + both[:, 0] * of_gate


def around(
    module: Any,
    plan: SimpleNamespace,
    layer: int,
    block: SimpleNamespace,
    nodes: Tensor,
    writes: Tensor,
    reads: Tensor,
) -> tuple[Tensor, Tensor]:
    """What nodes of a layer write and read, through the norms around their MLP."""
    laid, position = plan.layers[layer], nodes[:, 1]
    scales = {path: scale[position.to(scale.device)] for path, scale in block.scales.items()}
    return (
        out_of_mlp(module, plan, layer, scales.get(laid.mlp_out), writes),
        through_norm(module, plan, layer, laid.mlp_in, scales.get(laid.mlp_in), reads, True),
    )


def coefficients(
    module: Any, plan: SimpleNamespace, layer: int, gate: Tensor, up: Tensor | None, linear_gate: bool
) -> tuple[Tensor | None, Tensor]:
    """What neurons multiply what they read by the maps of gate and up by, of these inputs of the activation and values
    of the other factor: rules 3 and 4 or, in the place of 4, a linear gate. None where the gate's map carries
    nothing."""
    laid = plan.layers[layer]
    if laid.experts is not None:
        how = experts.gating(part(module, plan, layer, ""), laid.experts)
    else:
        how = SimpleNamespace(kind="product", act=activation(module, plan, layer))
    if up is None:
        return None, linearize.factor(how.act, gate)
    return linearize.coefficients(how, gate, up, linear_gate)


def logit_rows(module: Any, plan: SimpleNamespace, prompt: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """What each target logit reads of the residual stream before the final norm [logit, d_model], and the logits."""
    position, token = prompt.logits.unbind(-1)
    head = module.get_submodule(plan.head).weight
    rows = head[token.to(head.device)].float()
    rows = rows * prompt.shrunk.to(rows.device)[:, None]
    kind, path = plan.final_norm
    scale = prompt.frozen.final_scale[position.to(prompt.frozen.final_scale.device), None].to(rows.device)
    return scaled(kind, scale * gain(module, plan, path).to(rows.device), rows, True), prompt.logit_values


def answer(walk: SimpleNamespace) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What is found of a prompt, on the CPU: what units carried becomes weights, and distances from baselines."""
    count, found, bases = len(walk.prompt.neurons), walk.found, walk.prompt.baselines
    last, neurons = count + len(walk.prompt.frozen.embedding), walk.values[:count]
    weight, moved = found[:, :last].clone(), None
    weight[:, :count] *= neurons
    if bases is not None:
        moved = torch.zeros_like(weight)
        moved[:, :count] = found[:, :count] * (neurons - bases[0].to(found.device))
        moved[:, count + walk.sources.differing] = found[:, last:]
        moved = moved.cpu()
    return weight.cpu(), walk.incoming.cpu(), walk.values.cpu(), moved


# The walk up.


def runs(walk: SimpleNamespace) -> Iterator[SimpleNamespace]:
    """A prompt's sources in runs that are walked together: of like positions, so that each passes few positions before
    its own, and in the order in which they enter. The last is everything that is written, as one source."""
    if not walk.reach:
        return
    most = CPU_ROWS if walk.found.device.type == "cpu" else GPU_ROWS
    order = walk.first.argsort(stable=True)
    order = order[walk.first[order] < walk.reach]
    while len(order):
        first = int(walk.first[order[0]])
        rows, order = order.tensor_split([max(1, most // (walk.reach - first))])
        rows = rows[walk.sources.layer[rows].argsort(stable=True)]
        yield SimpleNamespace(walk=walk, rows=rows, first=first, everything=False)
    yield SimpleNamespace(walk=walk, rows=torch.zeros(1, dtype=torch.long), first=0, everything=True)


def sweep(module: Any, plan: SimpleNamespace, going: Sequence[SimpleNamespace]) -> None:
    """Walk runs of sources up through all blocks and let targets read them."""
    for run in going:
        positions = list(range(run.first, run.walk.reach))
        run.at = dict(zip(positions, range(len(positions)), strict=True))
        run.state = torch.zeros(len(run.rows), len(positions), plan.d_model, device=run.walk.found.device)
        run.moving = run.active = int(run.everything)
        if run.everything:
            run.state[0] = plan.embedding_scale * run.walk.prompt.frozen.embedding[: len(positions)]
        enter(run, -1)
    for layer in range(max((run.walk.top for run in going), default=0)):
        maps, mixed = attention(module, plan, layer), dict[int, SimpleNamespace]()
        for run in going:
            if layer < run.walk.top:
                key = id(run.walk)
                if key not in mixed:
                    mixed[key] = mixing(module, plan, layer, run.walk.prompt.frozen.blocks[layer])
                climb(module, plan, layer, run, mixed[key], maps)
    for run in going:
        let_read(run, len(run.walk.prompt.frozen.blocks))
        del run.state


def climb(
    module: Any,
    plan: SimpleNamespace,
    layer: int,
    run: SimpleNamespace,
    mixed: SimpleNamespace,
    maps: tuple[Tensor, Tensor],
) -> None:
    """Take a run through one block; its targets read what its attention leaves or, where attention and MLP are
    parallel, what it finds."""
    run.state = run.state.to(maps[0].device)
    parallel = plan.layers[layer].parallel
    if parallel:
        let_read(run, layer)
    if run.active:
        attend(run, mixed, maps, last=layer == run.walk.top - 1)
    if not parallel:
        let_read(run, layer)
    if run.everything:
        run.state[0] += written(module, plan, layer, run.walk.prompt)[list(run.at)]
    enter(run, layer)


def written(module: Any, plan: SimpleNamespace, layer: int, prompt: SimpleNamespace) -> Tensor:
    """What all nodes of a layer write into the residual stream together, kept or not [pos, d_model]: in the basis
    ``activation`` without the down projection's bias, which belongs to no neuron."""
    block, laid = prompt.frozen.blocks[layer], plan.layers[layer]
    output = block.output
    if prompt.basis != "output":
        own = getattr(part(module, plan, layer, laid.down), "bias", None)
        bias = own if laid.experts is None else of_experts(part(module, plan, layer, laid.experts.path), block)
        output = output if bias is None else output - bias.detach().float()
    return out_of_mlp(module, plan, layer, block.scales.get(laid.mlp_out), output)


def of_experts(module: Any, block: SimpleNamespace) -> Tensor | None:
    """What the experts that ran write whatever their neurons are [pos, d_model], if they have such biases."""
    bias = getattr(module, "down_proj_bias", None)
    if bias is None:
        return None
    return (bias[block.expert].float() * block.writes[:, :-1, None].float()).sum(1)


def enter(run: SimpleNamespace, layer: int) -> None:
    """Put a layer's sources in place, each at its position."""
    run.moving = run.active
    if run.everything:
        return
    layers = run.walk.sources.layer[run.rows]
    fresh = range(run.active, int((layers <= layer).sum()))
    run.active = fresh.stop
    rows = run.rows[fresh.start : fresh.stop]
    at = [run.at.get(position, -1) for position in run.walk.sources.position[rows].tolist()]
    here = [i for i, column in enumerate(at) if column >= 0]  # the last block keeps the targets' positions alone
    if here:
        into = torch.tensor(here) + fresh.start, torch.tensor(at)[here]
        run.state[into] = run.walk.sources.vector[rows[here]].to(run.state.device)


def attend(run: SimpleNamespace, mixed: SimpleNamespace, maps: tuple[Tensor, Tensor], last: bool) -> None:
    """Add what flows through a block's attention, in the last of them at positions that targets read alone. Sources
    that have just entered are at one position each."""
    (value, output), before = maps, run.state
    width, shared = before.shape[1], output.shape[1] // value.shape[0]
    pattern = mixed.pattern[:, run.first : run.first + width, run.first : run.first + width]
    if last:
        into = [run.at[position] for position in run.walk.wanted if position in run.at]
        run.at = {position: i for i, position in enumerate(p for p in run.walk.wanted if p in run.at)}
        run.state, pattern = before[:, into], pattern[:, into]
    grouped = pattern.unflatten(0, (-1, shared))
    moving = run.moving if mixed.gate is None else run.active  # what a gate opens is not one map a head
    if moving:
        inside = entered(before[:moving] @ value.T, mixed, run.first).unflatten(-1, (len(grouped), -1))
        flow = gated(torch.einsum("gsqk,nkgd->nqgsd", grouped, inside).flatten(2), mixed, list(run.at), 1)
        run.state[:moving].flatten(0, 1).addmm_(flow.flatten(0, 1), output.T)
        if moving == run.active:
            return
    if run.active > run.moving:
        rows = torch.arange(run.moving, run.active)
        at = run.walk.sources.position[run.rows[run.moving : run.active]] - run.first
        inside = (before[rows, at] @ value.T).unflatten(-1, (len(grouped), -1)).repeat_interleave(shared, dim=1)
        flow = torch.bmm(inside.transpose(0, 1), output.unflatten(1, (len(pattern), -1)).permute(1, 2, 0))
        run.state[run.moving : run.active].baddbmm_(pattern[..., at].permute(2, 1, 0), flow.transpose(0, 1))


def let_read(run: SimpleNamespace, layer: int) -> None:
    """The targets of a layer read a run's sources at their positions."""
    for position, mine in run.walk.readers.get(layer, ()):
        if position in run.at and run.active:
            state = run.state[: run.active, run.at[position]]
            read = run.walk.targets.vector[mine].to(state.device) @ state.T
            if run.everything:
                run.walk.incoming[mine] = read[:, 0].to(run.walk.found.device)
            else:
                run.walk.found[mine[:, None], run.rows[None, : run.active]] = read.to(run.walk.found.device)
