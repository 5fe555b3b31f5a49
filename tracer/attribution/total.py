"""Total effects by the frozen linear replay: what each token's embedding does to each of a prompt's nodes, and what
each node does to each target logit, through everything between (method.md section 7).

With norms, patterns and activations frozen, the whole model is a linear map. The inputs' side is walked up: a stream
for each source position, from its own position on, read by all nodes of all layers at once, so that hundreds of nodes
cost as much as one. The outputs' side is walked down: a stream for each logit. Streams are rows of one matrix, (source,
position) or (logit, position), of all prompts together, so that a block is a few products with its own weights.

Knows the linear algebra of whole blocks, from a model's `plan` and with the matrices of the replay of edges
(attribution/replay.py); runs beside the model, here or on a server: functions travel as their source. Refuses to know
autograd, nnsight and files.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tracer.attribution import replay
from tracer.model import experts


def profiled(
    module: Any, plan: SimpleNamespace, prompts: Sequence[SimpleNamespace], max_bytes: int
) -> list[tuple[Tensor, Tensor]]:
    """For each prompt its nodes' profiles, on the CPU: the effect of each position's embedding [node, pos], in units of
    the node, and that of the node on each logit [node, logit].

    Args:
        prompts: as `replay.linked` takes them, but with the constants of all neurons (`replay.unpadded`).
        max_bytes: bytes of residual streams that are held at a time.
    """
    walks = [begun(prompt) for prompt in prompts]
    for going in together((run for walk in walks for run in risen(plan, walk, max_bytes)), plan, max_bytes):
        rise(module, plan, going, max_bytes)
    for going in together((run for walk in walks for run in sunk(module, plan, walk, max_bytes)), plan, max_bytes):
        sink(module, plan, going, max_bytes)
    return [(walk.inputs.cpu(), (walk.outputs * away(plan, walk.prompt)[:, None]).cpu()) for walk in walks]


def begun(prompt: SimpleNamespace) -> SimpleNamespace:
    """A prompt with what is to be found of it, and the first and last layer and position that matter."""
    nodes, blocks, length = prompt.neurons, prompt.frozen.blocks, len(prompt.frozen.embedding)
    causal, some = not any(bool(block.pattern.triu(1).any()) for block in blocks), len(nodes) > 0
    top = int(nodes[:, 0].max()) if some else -1
    device = prompt.frozen.embedding.device
    return SimpleNamespace(
        prompt=prompt,
        causal=causal,
        length=length,
        top=top,
        bottom=int(nodes[:, 0].min()) if some else len(blocks),
        reach=(int(nodes[:, 1].max()) + 1 if causal else length) if some else 0,
        wanted=nodes[nodes[:, 0] == top, 1].unique(),
        inputs=torch.zeros(len(nodes), length, device=device),
        outputs=torch.zeros(len(nodes), len(prompt.logits), device=device),
    )


def away(plan: SimpleNamespace, prompt: SimpleNamespace) -> Tensor:
    """How far the nodes are from their baselines [node]."""
    values = torch.zeros(len(prompt.neurons), device=prompt.frozen.embedding.device)
    for layer, block in enumerate(prompt.frozen.blocks):
        mine = (prompt.neurons[:, 0] == layer).nonzero()[:, 0]
        inside = block.values if prompt.basis == "activation" else block.output
        position, neuron = prompt.neurons[mine, 1:].unbind(-1)
        place = neuron if prompt.basis != "activation" else replay.places(plan, layer, block, position, neuron)
        found = inside[position, place.clamp_min(0)].to(values.device).float()
        values[mine] = torch.where(place.to(values.device) < 0, 0.0, found)
    return values if prompt.baselines is None else values - prompt.baselines[0].to(values.device)


# Rows: streams at positions.


def risen(plan: SimpleNamespace, walk: SimpleNamespace, max_bytes: int) -> Iterator[SimpleNamespace]:
    """A prompt's sources in runs that fit: the embeddings that differ from their baselines, each a stream over the
    positions that it reaches."""
    vectors, bases = walk.prompt.frozen.embedding.float(), walk.prompt.baselines
    vectors = plan.embedding_scale * (vectors if bases is None else vectors - bases[1].to(vectors.device))
    sources = vectors.any(-1).nonzero()[:, 0].cpu()
    sources = sources[sources < walk.reach]
    while len(sources):
        first = int(sources[0]) if walk.causal else 0
        each = 4 * plan.d_model * (walk.reach - first)
        mine, sources = sources.tensor_split([max(1, max_bytes // each)])
        yield run_of(walk, mine, torch.arange(first, walk.reach), mine, vectors[mine])


def sunk(module: Any, plan: SimpleNamespace, walk: SimpleNamespace, max_bytes: int) -> Iterator[SimpleNamespace]:
    """A prompt's logits in runs that fit, each a stream over the positions that it looks at."""
    vectors, _ = replay.logit_rows(module, plan, walk.prompt)
    if walk.top < 0:
        return
    for place in walk.prompt.logits[:, 0].unique().tolist():
        reach = place + 1 if walk.causal else walk.length
        logits = (walk.prompt.logits[:, 0] == place).nonzero()[:, 0]
        for mine in logits.split(max(1, max_bytes // (4 * plan.d_model * reach))):
            yield run_of(walk, mine, torch.arange(reach), torch.full_like(mine, place), vectors[mine])


def run_of(walk: SimpleNamespace, ends: Tensor, position: Tensor, enters: Tensor, vector: Tensor) -> SimpleNamespace:
    """Streams of a prompt: what they lead from or to (`ends`), where they enter, and as what [stream, d_model]; and
    their rows, by position and then by stream: a stream that is walked up is nowhere before it enters."""
    there = torch.ones(len(position), len(ends), dtype=torch.bool)
    if walk.causal and torch.equal(ends, enters):
        there = enters[None] <= position[:, None]
    at, stream = there.nonzero(as_tuple=True)
    return SimpleNamespace(walk=walk, ends=ends, enters=enters, vector=vector, position=position[at], stream=stream)


def together(runs: Iterator[SimpleNamespace], plan: SimpleNamespace, max_bytes: int) -> Iterator[list[SimpleNamespace]]:
    """Runs in groups whose streams are held at a time."""
    going, held = list[SimpleNamespace](), 0
    for run in runs:
        size = 4 * plan.d_model * len(run.position)
        if going and held + size > max_bytes:
            yield going
            going, held = [], 0
        going.append(run)
        held += size
    if going:
        yield going


def begin(plan: SimpleNamespace, runs: Sequence[SimpleNamespace], max_bytes: int) -> SimpleNamespace:
    """Runs that are walked together: the state of each of their rows [row, d_model], of which run, position and stream
    it is, its place `at` among the positions of all the prompts, and whether its stream has entered there (`fresh`)."""
    walks: list[SimpleNamespace] = []
    for run in runs:
        if not any(run.walk is walk for walk in walks):
            walks.append(run.walk)
    offsets = torch.tensor([0, *(walk.length for walk in walks)]).cumsum(0).tolist()
    mine = [next(i for i, walk in enumerate(walks) if run.walk is walk) for run in runs]
    sizes = torch.tensor([len(run.position) for run in runs])
    group = SimpleNamespace(
        runs=runs,
        walks=walks,
        max_bytes=max_bytes,
        run=torch.arange(len(runs)).repeat_interleave(sizes),
        position=torch.cat([run.position for run in runs]),
        stream=torch.cat([run.stream for run in runs]),
        at=torch.cat([run.position + offsets[i] for run, i in zip(runs, mine, strict=True)]),
        fresh=torch.cat([run.position == run.enters[run.stream] for run in runs]),
        state=torch.zeros(int(sizes.sum()), plan.d_model, device=runs[0].vector.device),
    )
    vectors = torch.cat([run.vector.to(group.state.device) for run in runs])
    first = torch.tensor([0, *(len(run.ends) for run in runs)]).cumsum(0)[:-1]
    group.state[group.fresh] = vectors[(first[group.run] + group.stream)[group.fresh]]
    return group


def only(group: SimpleNamespace, stays: Tensor) -> SimpleNamespace:
    """Some rows of a group, without their state, and which they are `of` it; the group itself if that is all."""
    if bool(stays.all()):
        return group
    of = stays.nonzero()[:, 0]
    parts = {name: getattr(group, name)[of] for name in ("run", "position", "stream", "at", "fresh")}
    return SimpleNamespace(of=of, runs=group.runs, walks=group.walks, max_bytes=group.max_bytes, **parts)


def spans(group: SimpleNamespace) -> list[slice]:
    """Where the rows of each run are."""
    begins = torch.searchsorted(group.run, torch.arange(len(group.runs) + 1)).tolist()
    return [slice(begin, end) for begin, end in itertools.pairwise(begins)]


def joined(group: SimpleNamespace, layer: int, path: str | None) -> Tensor | None:
    """A norm's statistic at all positions of all the prompts; None where there is no norm."""
    if path is None:
        return None
    return torch.cat([walk.prompt.frozen.blocks[layer].scales[path] for walk in group.walks])


def factors(module: Any, plan: SimpleNamespace, group: SimpleNamespace, layer: int) -> tuple[Tensor | None, Tensor]:
    """What the gate's and the up map's products are multiplied by, at all positions of all the prompts."""
    blocks = [walk.prompt.frozen.blocks[layer] for walk in group.walks]
    gate = torch.cat([block.gate for block in blocks]).float()
    up = None if blocks[0].up is None else torch.cat([block.up for block in blocks]).float()
    return replay.coefficients(module, plan, layer, gate, up, group.walks[0].prompt.linear_gate)


def mixed(group: SimpleNamespace, layer: int) -> SimpleNamespace:
    """What a mixture has beside an MLP, at all positions of all the prompts: see `replay.of_prompt`."""
    blocks = [walk.prompt.frozen.blocks[layer] for walk in group.walks]
    parts = {name: [getattr(block, name) for block in blocks] for name in ("expert", "writes", "reads")}
    return SimpleNamespace(**{name: None if one[0] is None else torch.cat(one) for name, one in parts.items()})


def readings(group: SimpleNamespace, layer: int) -> tuple[Tensor, Tensor, list[tuple[SimpleNamespace, Tensor, Tensor]]]:
    """Which rows the nodes of a layer read, and at which neuron, in the order of rows; and for each run how these
    readings are of its nodes and streams."""
    key, most = group.run * 2**32 + group.position, 2**32
    rows, neurons, found = [torch.zeros(0, dtype=torch.long)], [torch.zeros(0, dtype=torch.long)], []
    for number, run in enumerate(group.runs):
        nodes = run.walk.prompt.neurons
        mine = (nodes[:, 0] == layer).nonzero()[:, 0]
        wanted = number * most + nodes[mine, 1]
        begins, ends = torch.searchsorted(key, wanted), torch.searchsorted(key, wanted, right=True)
        counts = ends - begins
        node = mine.repeat_interleave(counts)
        inside = torch.arange(len(node)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        row = begins.repeat_interleave(counts) + inside
        order = row.argsort(stable=True)
        rows.append(row[order])
        neurons.append(nodes[node[order], 2])
        found.append((run, node[order], run.ends[group.stream[row[order]]]))
    return torch.cat(rows), torch.cat(neurons), found


def keep(found: Sequence[tuple[SimpleNamespace, Tensor, Tensor]], values: Tensor, side: str) -> None:
    """Put what was read in its place."""
    for (run, node, end), part in zip(found, values.split([len(node) for _, node, _ in found]), strict=True):
        into = getattr(run.walk, side)
        into[node, end] = part.to(into.device)


def pieces(group: SimpleNamespace, rows: Tensor, width: int) -> Iterator[tuple[slice, slice]]:
    """Rows of a group that go through an MLP of this width at a time, and which readings are of them."""
    most = replay.CPU_ROWS if group.state.device.type == "cpu" else replay.GPU_ROWS
    most, count = max(1, min(most, group.max_bytes // (12 * width))), len(group.state)
    step = -(-count // max(1, -(-count // most)))  # pieces of like size
    for first in range(0, count, max(1, step)):
        ends = torch.searchsorted(rows, torch.tensor([first, first + step])).tolist()
        yield slice(first, first + step), slice(*ends)


def flowed(
    module: Any,
    plan: SimpleNamespace,
    layer: int,
    source: SimpleNamespace,
    target: SimpleNamespace,
    values: Tensor,
    shared: int,
    back: bool,
) -> Tensor:
    """What attention carries between positions: of the values at some rows [row, value head and coordinate], what
    arrives at others [row, head and coordinate]; or `back`, from the latter to the former.

    Args:
        shared: heads that read one value head.
    """
    parts = []
    for run, mine, into in zip(source.runs, spans(source), spans(target), strict=True):
        if into.start == into.stop:
            continue
        begins, key = source.position[mine].unique(return_inverse=True)
        ends, query = target.position[into].unique(return_inverse=True)
        mixed = replay.mixing(module, plan, layer, run.walk.prompt.frozen.blocks[layer])
        pattern = mixed.pattern.to(values.device)
        if mixed.entry is not None:  # a convolution moves values between positions: all are needed
            begins = ends = torch.arange(run.walk.length)
            key, query = source.position[mine], target.position[into]
        dense = values.new_zeros(len(begins), len(run.ends), values.shape[1])
        dense[key, source.stream[mine]] = values[mine]
        if back:
            grouped = pattern[:, begins][:, :, ends].unflatten(0, (-1, shared))
            heads = replay.gated(dense, mixed, begins).unflatten(-1, (*grouped.shape[:2], -1))
            flow = torch.einsum("gsqk,qngsd->nkgd", grouped, heads).flatten(2)
            flow = replay.entered(flow, mixed, back=True).transpose(0, 1)
        else:
            grouped = pattern[:, ends][:, :, begins].unflatten(0, (-1, shared))
            inside = replay.entered(dense.transpose(0, 1), mixed).unflatten(-1, (len(grouped), -1))
            flow = torch.einsum("gsqk,nkgd->qngsd", grouped, inside).flatten(2)
            flow = replay.gated(flow, mixed, ends)
        parts.append(flow[query, target.stream[into]])
    return torch.cat(parts)


# Up, from the embeddings.


def rise(module: Any, plan: SimpleNamespace, runs: Sequence[SimpleNamespace], max_bytes: int) -> None:
    """Walk sources up through the blocks, as far as nodes read them."""
    group, last = begin(plan, runs, max_bytes), max(run.walk.top for run in runs)
    for layer in range(last + 1):
        left = only(group, still_read(group, layer))
        if not len(left.run):
            return
        value, output = replay.attention(module, plan, layer)
        state, shared = group.state.to(value.device), output.shape[1] // value.shape[0]
        flow = flowed(module, plan, layer, group, left, state @ value.T, shared, back=False) @ output.T
        left.state = state if left is group else state[left.of]
        if not plan.layers[layer].parallel:
            left.state += flow
        through_mlp(module, plan, layer, left, layer == last)
        if plan.layers[layer].parallel:
            left.state += flow
        group = left


def still_read(group: SimpleNamespace, layer: int) -> Tensor:
    """Which rows are needed behind a block's attention: of a prompt whose last nodes are in it, those that they
    read."""
    found = []
    for run, span in zip(group.runs, spans(group), strict=True):
        if run.walk.top == layer:
            found.append(torch.isin(group.position[span], run.walk.wanted))
        else:
            found.append(torch.full((span.stop - span.start,), run.walk.top > layer))
    return torch.cat(found)


def through_mlp(module: Any, plan: SimpleNamespace, layer: int, group: SimpleNamespace, last: bool) -> None:
    """Add what a block's MLP writes, but in the `last` block, and let the nodes of its layer read."""
    rows, neurons, found = readings(group, layer)
    inside, mlp = group.walks[0].prompt.basis == "activation", mlp_of(module, plan, group, layer)
    laid = plan.layers[layer]
    scales = [joined(group, layer, path) for path in (laid.mlp_in, laid.mlp_out)]
    values = torch.zeros(len(rows), device=group.state.device)
    for part, mine in pieces(group, rows, mlp.width):
        at, state = group.at[part], group.state[part]
        before, behind = (None if scale is None else scale[at] for scale in scales)
        read = replay.through_norm(module, plan, layer, laid.mlp_in, before, state, False)
        neuron, row = mlp.up(read, at), rows[mine] - part.start
        if inside:
            values[mine] = mlp.read(neuron, at, row, neurons[mine])
            if last:
                continue
        written = mlp.down(neuron, at)
        if not inside:
            values[mine] = written[row, neurons[mine]]
        state += replay.out_of_mlp(module, plan, layer, behind, written)
    keep(found, values, "inputs")


def mlp_of(module: Any, plan: SimpleNamespace, group: SimpleNamespace, layer: int) -> Any:
    """A block's linearised MLP or mixture, at all positions of all the prompts."""
    kind = _Mlp if plan.layers[layer].experts is None else _Mixture
    return kind(module, plan, group, layer)


class _Mlp:
    """From rows of states through an MLP whose activations are constants, and back. `at` are the rows' positions among
    those of all the prompts."""

    def __init__(self, module: Any, plan: SimpleNamespace, group: SimpleNamespace, layer: int) -> None:
        self.of_gate, self.of_up = factors(module, plan, group, layer)
        self.gate, self.maps_up, self.maps_down = matrices(module, plan, layer)
        self.width = len(self.maps_up)

    def up(self, state: Tensor, at: Tensor) -> Tensor:
        """Neurons [row, neuron]."""
        neuron = (state @ self.maps_up.T).mul_(self.of_up[at])
        if self.gate is not None and self.of_gate is not None:
            neuron += (state @ self.gate.T).mul_(self.of_gate[at])
        return neuron

    def down(self, neuron: Tensor, _at: Tensor) -> Tensor:
        """What they write [row, d_model]."""
        return neuron @ self.maps_down.T

    def back(self, written: Tensor, _at: Tensor) -> Tensor:
        """The transpose of `down`."""
        return written @ self.maps_down

    def out(self, neuron: Tensor, at: Tensor) -> Tensor:
        """The transpose of `up`."""
        read = (neuron * self.of_up[at]) @ self.maps_up
        if self.gate is not None and self.of_gate is not None:
            read += neuron.mul_(self.of_gate[at]) @ self.gate
        return read

    def read(self, neuron: Tensor, _at: Tensor, row: Tensor, number: Tensor) -> Tensor:
        """Some rows' neurons of these numbers."""
        return neuron[row, number]


class _Mixture:
    """The same of a mixture: each row through the experts that ran at its position."""

    def __init__(self, module: Any, plan: SimpleNamespace, group: SimpleNamespace, layer: int) -> None:
        self.of_gate, self.of_up = factors(module, plan, group, layer)
        self.inside, self.block = replay.part(module, plan, layer, ""), mixed(group, layer)
        self.plan, self.layer, self.laid = plan, layer, plan.layers[layer].experts
        self.width = self.of_up.shape[-1]

    def factors(self, at: Tensor) -> tuple[Tensor | None, Tensor]:
        return None if self.of_gate is None else self.of_gate[at], self.of_up[at]

    def up(self, state: Tensor, at: Tensor) -> Tensor:
        return replay.through_gates(self.inside, self.laid, self.block, at, *self.factors(at), state)

    def down(self, neuron: Tensor, at: Tensor) -> Tensor:
        return experts.leaving(self.inside, self.laid, neuron, self.block.expert[at], self.block.writes[at], False)

    def back(self, written: Tensor, at: Tensor) -> Tensor:
        return replay.into_experts(self.inside, self.laid, self.block, at, written)

    def out(self, neuron: Tensor, at: Tensor) -> Tensor:
        return replay.out_of_gates(self.inside, self.laid, self.block, at, *self.factors(at), neuron)

    def read(self, neuron: Tensor, at: Tensor, row: Tensor, number: Tensor) -> Tensor:
        place = replay.places(self.plan, self.layer, self.block, at[row], number)
        return torch.where(place.to(neuron.device) < 0, 0.0, neuron[row, place.clamp_min(0)])


def matrices(module: Any, plan: SimpleNamespace, layer: int) -> tuple[Tensor | None, Tensor, Tensor]:
    """A block's maps into its neurons, by the gate (None where it has none) and up, and out of them, float32."""
    laid = plan.layers[layer]
    gate = None if laid.gate_part is None else replay.matrix(module, plan, layer, laid.gate_part).float()
    up, down = replay.matrix(module, plan, layer, laid.up_part), replay.matrix(module, plan, layer, (laid.down, "all"))
    return gate, up.float(), down.float()


# Down, from the logits.


def sink(module: Any, plan: SimpleNamespace, runs: Sequence[SimpleNamespace], max_bytes: int) -> None:
    """Walk logits down through the blocks, as far as nodes are. Until the first attention each is at its own position
    alone."""
    group, bottom = begin(plan, runs, max_bytes), min(run.walk.bottom for run in runs)
    n_layers, live = len(runs[0].walk.prompt.frozen.blocks), only(group, group.fresh)
    live.state = group.state if live is group else group.state[live.of]
    for layer in reversed(range(bottom, n_layers)):
        value, output = replay.attention(module, plan, layer)
        live.state = live.state.to(value.device)
        state = back_through_mlp(module, plan, layer, live, layer == bottom)
        if layer == bottom:
            return
        heads = (live.state if plan.layers[layer].parallel else state) @ output
        shared = output.shape[1] // value.shape[0]
        flow = flowed(module, plan, layer, live, group, heads, shared, back=True) @ value
        flow[slice(None) if live is group else live.of] += state
        live, group.state = group, flow


def back_through_mlp(module: Any, plan: SimpleNamespace, layer: int, group: SimpleNamespace, last: bool) -> Tensor:
    """What reads a block's output and its MLP's input [row, d_model], and what reads the nodes of its layer; in the
    `last` block only the latter."""
    rows, neurons, found = readings(group, layer)
    inside, mlp = group.walks[0].prompt.basis == "activation", mlp_of(module, plan, group, layer)
    laid = plan.layers[layer]
    scales = [joined(group, layer, path) for path in (laid.mlp_in, laid.mlp_out)]
    values, through = torch.zeros(len(rows), device=group.state.device), group.state.clone()
    for part, mine in pieces(group, rows, mlp.width):
        at, row = group.at[part], rows[mine] - part.start
        before, behind = (None if scale is None else scale[at] for scale in scales)
        written = replay.out_of_mlp(module, plan, layer, behind, group.state[part], True)
        neuron = mlp.back(written, at)
        values[mine] = mlp.read(neuron, at, row, neurons[mine]) if inside else written[row, neurons[mine]]
        if last:
            continue
        read = mlp.out(neuron, at)
        through[part] += replay.through_norm(module, plan, layer, laid.mlp_in, before, read, True)
    keep(found, values, "outputs")
    return through
