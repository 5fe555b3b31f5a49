"""The frozen linear replay: every direct edge of one prompt as plain matrix products (method.md section 4).

With norms, patterns and MLPs frozen, the residual stream is a linear map. A source leaves into it as a vector, a
target reads it with another, and an edge is their product across the blocks between. The map can be walked *up*,
carrying what sources write, or *down*, carrying what targets read, each entering at its own layer and position; both
give the same edges, and the one that touches fewer positions is taken. Only selected rows of MLP weights are used;
positions before a source and after a target are not, where no token looks at a later one. The patterns themselves say
whether one does.

Knows the linear algebra of a block from its `Wiring`. Refuses to know autograd, nnsight and files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tracer.metrics import Metric
from tracer.model import passes
from tracer.model.families import Weight
from tracer.model.model import Model
from tracer.model.rules import FACTORS
from tracer.prompts import Batch


@dataclass(frozen=True)
class EdgeRequest:
    """The edges that are wanted: neurons as rows of (layer, position, neuron), logits of (position, token).

    Sources are the neurons, then every embedding; targets are the neurons, then the logits. With `baselines`, of the
    neurons and of the embeddings, the sources' distance from them is followed too.
    """

    token_ids: tuple[int, ...]
    neurons: Int[Tensor, "neuron 3"]
    logits: Int[Tensor, "logit 2"]
    basis: str
    baselines: tuple[Float[Tensor, " neuron"], Float[Tensor, "pos d_model"]] | None = None

    def in_layer(self, layer: int) -> Tensor:
        """Which neurons are in a layer, as row numbers."""
        return (self.neurons[:, 0] == layer).nonzero()[:, 0]

    def by_layer(self, n_layers: int) -> list[Tensor]:
        """The (position, neuron) pairs of each layer."""
        return [self.neurons[self.in_layer(layer), 1:] for layer in range(n_layers)]


@dataclass(frozen=True)
class Ends:
    """One end of the edges: where each enters the residual stream, and with which vector."""

    layer: Int[Tensor, " end"]
    position: Int[Tensor, " end"]
    vector: Float[Tensor, "end d_model"]

    def __len__(self) -> int:
        return len(self.layer)

    def at(self, layer: int, chunk: Tensor | None = None) -> Tensor:
        """Which ends (of a chunk) are in a layer, as row numbers."""
        if chunk is None:
            return (self.layer == layer).nonzero()[:, 0]
        return chunk[self.layer[chunk] == layer]


class LinearMap:
    """The frozen linear map of a model's blocks, from its weights."""

    def __init__(self, model: Model) -> None:
        self.model, self.wiring = model, model.family.wiring

    def _attend(
        self, layer: int, block: passes.FrozenBlock, state: Tensor, first: int, *, transposed: bool = False
    ) -> Tensor:
        """What flows through a layer's attention from `state` [end, pos, d_model], whose positions begin at `first`."""
        span = slice(first, first + state.shape[1])
        value, output = self._matrix(layer, self.wiring.value), self._matrix(layer, self.wiring.output)
        before, after = self.wiring.attention_in, self.wiring.attention_out
        pattern = block.pattern[:, span, span]
        shared = output.shape[1] // value.shape[0]
        if transposed:
            before, after, pattern = after, before, pattern.transpose(1, 2)
        normed = self._through_norm(layer, before, block, state, span, transposed=transposed)
        moved = normed @ output if transposed else self._grown(normed @ value.T, shared)
        heads = moved.unflatten(-1, (pattern.shape[0], -1))
        mixed = torch.einsum("hqk,ekhd->eqhd", pattern, heads).flatten(2)
        moved = self._shrunk(mixed, shared) @ value if transposed else mixed @ output.T
        return self._through_norm(layer, after, block, moved, span, transposed=transposed)

    def _grown(self, state: Tensor, shared: int) -> Tensor:
        """Each value head repeated for the `shared` query heads that read it."""
        if shared == 1:
            return state
        return state.unflatten(-1, (-1, self.model.head_size)).repeat_interleave(shared, dim=2).flatten(2)

    def _shrunk(self, state: Tensor, shared: int) -> Tensor:
        """The transpose of `_grown`."""
        if shared == 1:
            return state
        return state.unflatten(-1, (-1, shared, self.model.head_size)).sum(3).flatten(2)

    def _through_norm(
        self,
        layer: int,
        path: str | None,
        block: passes.FrozenBlock,
        state: Tensor,
        at: slice | Tensor = slice(None),
        *,
        transposed: bool = False,
    ) -> Tensor:
        """A frozen norm of a block; the identity where there is none."""
        if path is None:
            return state
        kind = next(step.kind for step in self.model.family.steps if step.path == path)
        return self._scaled(kind, self.model.part(layer, path), block.scales[path][at, None], state, transposed)

    def _scaled(self, kind: str, norm: torch.nn.Module, scale: Tensor, state: Tensor, transposed: bool) -> Tensor:
        given = getattr(norm, "weight", None)
        weight = torch.ones((), device=state.device) if given is None else given.float()
        factor = scale * (weight + self.wiring.norm_offset)
        if kind == "rms_norm":
            return state * factor
        if transposed:
            state = state * factor
            return state - state.mean(-1, keepdim=True)
        return (state - state.mean(-1, keepdim=True)) * factor

    def _matrix(self, layer: int, weight: Weight) -> Tensor:
        """A linear map of a block as a float32 matrix [out, in]."""
        return self._part(layer, weight).float()

    def _part(self, layer: int, weight: Weight) -> Tensor:
        """A linear map of a block [out, in], in the model's own dtype, without a copy where possible."""
        part = self.model.part(layer, weight.path)
        matrix = part.weight
        matrix = matrix.T if type(part).__name__ == "Conv1D" else matrix
        if weight.part == "first half":
            return matrix[: len(matrix) // 2]
        if weight.part == "last half":
            return matrix[len(matrix) // 2 :]
        if weight.part == "values":
            return matrix[-self.model.value_width :]
        if weight.part == "values per head":
            heads = self.model.config.num_attention_heads
            return matrix.view(heads, 3, -1, matrix.shape[1])[:, 2].reshape(-1, matrix.shape[1])
        return matrix


class Replay(LinearMap):
    """One prompt's replay."""

    def __init__(self, model: Model, graph: EdgeRequest, max_bytes: int) -> None:
        super().__init__(model)
        self.graph, self.max_bytes, self.length = graph, max_bytes, len(graph.token_ids)
        self.frozen = passes.frozen(
            model, graph.token_ids, graph.by_layer(model.n_layers), graph.logits, basis=graph.basis
        )
        self.values = torch.zeros(len(graph.neurons))
        for layer, block in enumerate(self.frozen.blocks):
            self.values[graph.in_layer(layer)] = block.values.cpu()
        self.causal = not any(bool(block.pattern.triu(1).any()) for block in self.frozen.blocks)
        # A neuron that is 0 differs from its baseline all the same: it carries a unit instead.
        self._carries = self.values if graph.baselines is None else torch.where(self.values == 0, 1.0, self.values)
        self._differing = torch.zeros(0, dtype=torch.long)
        if graph.baselines is not None:
            away = self.frozen.embedding.cpu() - graph.baselines[1]
            self._differing = away.any(-1).nonzero()[:, 0]
        self.sources, self.targets = self._sources(), self._targets()
        # What all of a layer's neurons write together, kept or not: their sum makes the total incoming weight.
        self.written = [
            self._through_norm(layer, self.wiring.mlp_out, block, block.output)
            for layer, block in enumerate(self.frozen.blocks)
        ]

    def run(
        self, direction: str = "auto"
    ) -> tuple[Float[Tensor, "target source"], Float[Tensor, " target"], Float[Tensor, "target source"] | None]:
        """Weights of all edges, the incoming weight of each target over every neuron and embedding, and what the
        sources' distances from their baselines carry, None without baselines.

        Args:
            direction: ``up``, ``down``, or ``auto`` for the cheaper one.
        """
        weight = torch.zeros(len(self.targets), len(self.sources))
        incoming = torch.zeros(len(self.targets))
        if direction == "up" or (direction == "auto" and self._cost_up() < self._cost_down()):
            for chunk in self._chunks(self.sources, up=True):
                self._sweep_up(chunk, weight)
            self._sum_up(incoming)
        else:
            for chunk in self._chunks(self.targets, up=False):
                self._sweep_down(chunk, weight, incoming)
        if self.graph.baselines is None:
            return weight, incoming, None
        return self._weights(weight), incoming, self._from_baseline(weight)

    def _weights(self, carried: Tensor) -> Tensor:
        """The weights, of what sources carried: a neuron that is 0 carried a unit, and weighs nothing."""
        count = len(self.graph.neurons)
        weight = carried[:, : count + self.length].clone()
        weight[:, :count] *= self.values / self._carries
        return weight

    def _from_baseline(self, carried: Tensor) -> Tensor:
        """With the distance from its baseline in the place of each source's value; exactly 0 where there is none."""
        assert self.graph.baselines is not None
        count, found = len(self.graph.neurons), carried.new_zeros(len(carried), len(self.values) + self.length)
        found[:, :count] = carried[:, :count] * ((self.values - self.graph.baselines[0]) / self._carries)
        found[:, count + self._differing] = carried[:, count + self.length :]
        return found

    # Which way, and in which pieces.

    def _cost_up(self) -> int:
        """Positions times blocks that all sources pass on their way up; the sum of everything is one source more."""
        reach, ends = self._reach(self.targets), self.sources
        first = ends.position if self.causal else torch.zeros_like(ends.position)
        passed = (reach - first).clamp_min(0) * (self.model.n_layers - 1 - ends.layer)
        return int(passed.sum()) + reach * self.model.n_layers

    def _cost_down(self) -> int:
        width = self.targets.position + 1 if self.causal else torch.full_like(self.targets.position, self.length)
        return int((width * self.targets.layer.clamp_max(self.model.n_layers - 1)).sum())

    def _reach(self, targets: Ends, chunk: Tensor | slice = slice(None)) -> int:
        """How many positions, from the first, can lead to these targets."""
        at = targets.position[chunk]
        return 0 if not len(at) else int(at.max()) + 1 if self.causal else self.length

    def _chunks(self, ends: Ends, *, up: bool) -> Iterator[Tensor]:
        """Runs of ends that fit `max_bytes`: of neighbouring positions, so that each reaches no further than it
        must, and within a run in the order in which they enter."""
        order = ends.position.argsort(descending=up, stable=True)
        reach = self._reach(self.targets)
        inside = 4 * (4 * self.model.d_model + 4 * self.model.attention_width)
        start = 0
        while start < len(order):
            size = 1
            while start + size < len(order):
                last = int(ends.position[order[start + size]])
                width = self.length if not self.causal else reach - last if up else last + 1
                if (size + 1) * width * inside > self.max_bytes:
                    break
                size += 1
            part = order[start : start + size]
            yield part[ends.layer[part].argsort(descending=not up, stable=True)]
            start += size

    # Up: what sources write.

    def _sweep_up(self, chunk: Tensor, weight: Tensor) -> None:
        """Carry one run of sources from its first layer up to the last target that reads it."""
        first = int(self.sources.position[chunk].min()) if self.causal else 0
        width = self._reach(self.targets) - first
        if width <= 0:
            return
        layers = self.sources.layer[chunk]
        state = torch.zeros(len(chunk), width, self.model.d_model, device=self.frozen.embedding.device)
        inside = self.sources.position[chunk] < first + width
        active = 0
        for layer in range(int(layers.min()), int(self.targets.layer.max()) + 1):
            rows = chunk[:active]
            if layer >= 0 and active:
                state = self._climb(layer, state, rows, first, weight)
            fresh = torch.arange(active, active + int((layers == layer).sum()))
            mine = fresh[inside[fresh]]
            at = self.sources.position[chunk[mine]] - first
            state[mine, at] += self.sources.vector[chunk[mine]].to(state.device)
            active += len(fresh)

    def _climb(self, layer: int, state: Tensor, rows: Tensor, first: int, weight: Tensor) -> Tensor:
        """Take the active sources through one block (or to the logits) and let its targets read them."""
        moving = state[: len(rows)]
        if layer == self.model.n_layers:
            self._read_up(layer, moving, rows, first, weight)
            return state
        block = self.frozen.blocks[layer]
        state = state.to(block.output.device)
        moving = state[: len(rows)]
        if self.model.parallel:
            self._read_up(layer, moving, rows, first, weight)
        moving += self._attend(layer, block, moving, first)
        if not self.model.parallel:
            self._read_up(layer, moving, rows, first, weight)
        return state

    def _read_up(self, layer: int, state: Tensor, rows: Tensor, first: int, weight: Tensor) -> None:
        mine = self.targets.at(layer)
        positions = self.targets.position[mine]
        for pos in positions[positions >= first].unique().tolist():
            readers = mine[positions == pos]
            weights = state[:, pos - first] @ self.targets.vector[readers].to(state.device).T
            weight[readers[:, None], rows[None]] = weights.T.cpu()

    def _sum_up(self, incoming: Tensor) -> None:
        """The total incoming weight of every target: one walk of everything that is written, together."""
        state = self.frozen.embedding[None].clone()
        for layer, block in enumerate(self.frozen.blocks):
            state = state.to(block.output.device)
            before = state
            state = state + self._attend(layer, block, state, 0)
            self._total(layer, before if self.model.parallel else state, incoming)
            state = state + self.written[layer]
        self._total(self.model.n_layers, state, incoming)

    def _total(self, layer: int, state: Tensor, incoming: Tensor) -> None:
        mine = self.targets.at(layer)
        read = state[0, self.targets.position[mine].to(state.device)]
        incoming[mine] = (read * self.targets.vector[mine].to(state.device)).sum(-1).cpu()

    # Down: what targets read.

    def _sweep_down(self, chunk: Tensor, weight: Tensor, incoming: Tensor) -> None:
        """Carry one run of targets from its last layer down to the embedding."""
        width = self._reach(self.targets, chunk)
        layers = self.targets.layer[chunk]
        state = torch.zeros(len(chunk), width, self.model.d_model, device=self.frozen.final_scale.device)
        active = 0
        for layer in reversed(range(int(layers.max()) + 1)):
            fresh = torch.arange(active, active + int((layers == layer).sum()))
            if layer == self.model.n_layers:
                self._enter_down(state, chunk, fresh)
            else:
                block = self.frozen.blocks[layer]
                state = state.to(block.output.device)
                self._read_down(layer, self.written[layer], state[:active], chunk[:active], weight, incoming)
                if not self.model.parallel:
                    self._enter_down(state, chunk, fresh)
                moving = state[: active if self.model.parallel else active + len(fresh)]
                moving += self._attend(layer, block, moving, 0, transposed=True)
                if self.model.parallel:
                    self._enter_down(state, chunk, fresh)
            active += len(fresh)
        state = state.to(self.frozen.embedding.device)
        self._read_down(-1, self.frozen.embedding, state, chunk, weight, incoming)

    def _enter_down(self, state: Tensor, chunk: Tensor, fresh: Tensor) -> None:
        rows = chunk[fresh]
        state[fresh, self.targets.position[rows]] += self.targets.vector[rows].to(state.device)

    def _read_down(
        self, layer: int, written: Tensor, state: Tensor, rows: Tensor, weight: Tensor, incoming: Tensor
    ) -> None:
        width = state.shape[1]
        incoming[rows] += torch.einsum("tpd,pd->t", state, written[:width]).cpu()
        mine = self.sources.at(layer)
        positions = self.sources.position[mine]
        for pos in positions[positions < width].unique().tolist():
            writers = mine[positions == pos]
            weights = state[:, pos] @ self.sources.vector[writers].to(state.device).T
            weight[rows[:, None], writers[None]] = weights.cpu()

    # The vectors of sources and targets.

    def _sources(self) -> Ends:
        """What each neuron writes, value included, each embedding, and where embeddings differ from their baseline how
        much."""
        neurons, length = self.graph.neurons, self.length
        vectors = torch.zeros(len(neurons) + length, self.model.d_model)
        for layer, block in enumerate(self.frozen.blocks):
            mine = self.graph.in_layer(layer)
            if len(mine):
                rows = self._down_columns(layer, neurons[mine, 2])
                rows = rows * self._carries[mine, None].to(rows.device)
                at = neurons[mine, 1].to(rows.device)
                vectors[mine] = self._through_norm(layer, self.wiring.mlp_out, block, rows, at).cpu()
        vectors[len(neurons) :] = self.frozen.embedding.cpu()
        if self.graph.baselines is not None:
            vectors = torch.cat([vectors, (self.frozen.embedding.cpu() - self.graph.baselines[1])[self._differing]])
        positions = torch.cat([neurons[:, 1], torch.arange(length), self._differing])
        layers = torch.cat([neurons[:, 0], torch.full((len(positions) - len(neurons),), -1)])
        return Ends(layers, positions, vectors)

    def _targets(self) -> Ends:
        """What each neuron reads of the residual stream, linearised by rules 1, 3 and 4, and each logit."""
        neurons, logits, n_layers = self.graph.neurons, self.graph.logits, self.model.n_layers
        vectors = torch.zeros(len(neurons) + len(logits), self.model.d_model)
        for layer, block in enumerate(self.frozen.blocks):
            mine = self.graph.in_layer(layer)
            if len(mine):
                rows = self._neuron_rows(layer, block, neurons[mine, 2])
                at = neurons[mine, 1].to(rows.device)
                rows = self._through_norm(layer, self.wiring.mlp_in, block, rows, at, transposed=True)
                vectors[mine] = rows.cpu()
        vectors[len(neurons) :] = self._logit_rows().cpu()
        layers = torch.cat([neurons[:, 0], torch.full((len(logits),), n_layers)])
        return Ends(layers, torch.cat([neurons[:, 1], logits[:, 0]]), vectors)

    def _down_columns(self, layer: int, neuron: Tensor) -> Tensor:
        """What a unit of each node adds to the MLP's output."""
        down = self._part(layer, Weight(self.model.family.down))
        neuron = neuron.to(down.device)
        if self.graph.basis == "activation":
            return down[:, neuron].T.float()
        return torch.nn.functional.one_hot(neuron, self.model.d_model).float()

    def _neuron_rows(self, layer: int, block: passes.FrozenBlock, neuron: Tensor) -> Tensor:
        """Gradient of each target neuron to its MLP's input."""
        act = self.model.part(layer, self.model.family.path("activation"))
        factor = FACTORS[type(act).__name__](block.gate)
        to_neuron = None
        if self.graph.basis == "output":
            down = self._part(layer, Weight(self.model.family.down))
            to_neuron = down[neuron.to(down.device)].float()

        def into(weight: Weight, coefficient: Tensor) -> Tensor:
            matrix = self._part(layer, weight)
            if to_neuron is None:
                return coefficient[:, None] * matrix[neuron.to(matrix.device)].float()
            return (coefficient * to_neuron) @ matrix.float()

        if self.wiring.gate is None or block.up is None:
            return into(self.wiring.up, factor)
        return into(self.wiring.gate, 0.5 * block.up * factor) + into(self.wiring.up, 0.5 * block.gate * factor)

    def _logit_rows(self) -> Tensor:
        """Gradient of each target logit to the residual stream before the final norm."""
        tokens, frozen = self.graph.logits[:, 1], self.frozen
        head = self.model.module.get_output_embeddings().weight
        rows = head[tokens.to(head.device)].float()
        if self.model.soft_cap is not None:
            rows = rows * torch.where(frozen.uncapped == 0, 1.0, frozen.logits / frozen.uncapped)[:, None]
        final = self.model.family.final_norm
        scale = frozen.final_scale[self.graph.logits[:, 0].to(frozen.final_scale.device), None]
        return self._scaled(final.kind, self.model.module.get_submodule(final.path), scale, rows, True)


def reading(model: Model, batch: Batch, metric: Metric, *, basis: str = "activation") -> passes.Gradients:
    """The result of `passes.gradients` with all RelP rules, without autograd: one forward, then matrix products.

    The linearised model's backward pass is a linear map whose constants the forward brings; it is walked here, one
    prompt at a time, from the logits down. It needs the model's weights in memory.
    """
    embedding, blocks, final_scale, capped, uncapped = passes.coefficients(model, batch, metric.kept, basis=basis)
    with torch.enable_grad():
        leaf = capped.detach().requires_grad_(True)
        score = metric.read(leaf)
        (grad,) = torch.autograd.grad(score.sum(), [leaf])
    if model.soft_cap is not None:
        grad = grad * torch.where(uncapped == 0, 1.0, capped / uncapped)
    values, embedding = torch.stack([block[4].cpu() for block in blocks], 1), embedding.cpu()
    grads, to_embedding = torch.zeros_like(values), torch.zeros_like(embedding)
    for row, first in enumerate(batch.padding.tolist()):
        mine = [_of_prompt(block, row, first) for block in blocks]
        back = _Backward(model, basis).run(grad[row, -(batch.width - first) :], mine, final_scale[row, first:])
        grads[row, :, first:], to_embedding[row, first:] = back
        values[row, :, :first] = 0.0
    return passes.Gradients(values, grads, embedding, to_embedding, score.detach().cpu())


def _of_prompt(block: tuple[Any, ...], row: int, first: int) -> passes.FrozenBlock:
    """One prompt's constants of a block, without its padding."""
    scales, pattern, gate, up, values, output = block
    return passes.FrozenBlock(
        {path: scale[row, first:] for path, scale in scales.items()},
        pattern[row, :, first:, first:],
        gate[row, first:],
        None if up is None else up[row, first:],
        values[row, first:],
        output[row, first:],
    )


class _Backward(LinearMap):
    """The linearised backward pass of one prompt."""

    def __init__(self, model: Model, basis: str) -> None:
        super().__init__(model)
        self.basis = basis

    def run(self, grad: Tensor, blocks: list[passes.FrozenBlock], final_scale: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients to every neuron [layer, pos, neuron] and to the embedding [pos, d_model], on the CPU.

        Args:
            grad: of the metric to the logits of the last columns [kept, vocab].
        """
        kept, final = len(grad), self.model.family.final_norm
        rows = grad @ self.model.module.get_output_embeddings().weight.float()
        norm = self.model.module.get_submodule(final.path)
        state = torch.zeros(1, len(final_scale), self.model.d_model, device=rows.device)
        state[0, -kept:] = self._scaled(final.kind, norm, final_scale[-kept:, None], rows, True)
        by_layer = []
        for layer, block in reversed(list(enumerate(blocks))):
            state = state.to(block.output.device)
            written = self._through_norm(layer, self.wiring.mlp_out, block, state, transposed=True)
            to_neurons = written @ self._matrix(layer, Weight(self.model.family.down))
            by_layer.append((to_neurons if self.basis == "activation" else written)[0].cpu())
            read = self._through_mlp(layer, block, to_neurons)
            read = self._through_norm(layer, self.wiring.mlp_in, block, read, transposed=True)
            before = state if self.model.parallel else state + read
            state = state + read + self._attend(layer, block, before, 0, transposed=True)
        return torch.stack(by_layer[::-1]), state[0].cpu()

    def _through_mlp(self, layer: int, block: passes.FrozenBlock, grad: Tensor) -> Tensor:
        """From the neurons' gradient to that of the MLP's input, by rules 3 and 4."""
        act = self.model.part(layer, self.model.family.path("activation"))
        factor = FACTORS[type(act).__name__](block.gate)
        up = self._matrix(layer, self.wiring.up)
        if self.wiring.gate is None or block.up is None:
            return (factor * grad) @ up
        gate = self._matrix(layer, self.wiring.gate)
        return (0.5 * block.up * factor * grad) @ gate + (0.5 * block.gate * factor * grad) @ up
