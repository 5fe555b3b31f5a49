"""What is checked: a tiny random model in tracer, its plain copy, and the questions that both are asked.

Knows how to ask, here and there; what must be equal is checks.py's business. Refuses to know single families.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from tracer.attribution.attribute import attribute
from tracer.attribution.edges import Edges, direct_edges, edges_of
from tracer.attribution.profiles import Profiles
from tracer.attribution.result import Attribution
from tracer.model.model import Model, load
from tracer.prompts import Batch, Prompt
from tracer.system.forks import cached_property
from tracer.testing.models import random_model, tiny_tokenizer
from tracer.testing.plain import Neurons, Pass, Plain, batch

LENGTHS = (9, 5, 2)
"""Tokens of the prompts."""
FIRST = 4
"""The first token id that is a word."""
NODES = 24
"""How many nodes edges are asked of."""


class Numbers(NamedTuple):
    """What plain PyTorch says of all prompts: `nodes` and `activations` [prompt, layer, pos, neuron], `embeddings`
    [prompt, pos], the `metric` [prompt], and how much of it comes of `biases` [prompt]."""

    nodes: Tensor
    activations: Tensor
    embeddings: Tensor
    metric: Tensor
    biases: Tensor


class Direct(NamedTuple):
    """Edges into the nodes and the logits: the `weight` of each from the nodes and embeddings [target, source], what
    comes in from all neurons and embeddings together (`incoming`), the targets' `values`, and how much of these comes
    of `biases` [target]."""

    weight: Tensor
    incoming: Tensor
    values: Tensor
    biases: Tensor


class Case:
    """A tiny random model in tracer, a copy of it on which nothing of tracer ever ran, and what is asked of both."""

    def __init__(self, config: Any, module: Any, tokenizer: Any, seed: int) -> None:
        self.config, self.seed = config, seed
        self.bare: Any = deepcopy(module)
        if self.bare._can_set_experts_implementation():
            self.bare.set_experts_implementation("eager")
        self.size = int(module.config.get_text_config().vocab_size)
        self.tokenizer = tiny_tokenizer(self.size) if tokenizer is None else tokenizer
        self.model: Model = load(module, tokenizer=self.tokenizer)
        draw = torch.Generator().manual_seed(seed)
        longest = min(max(LENGTHS), self.model.context_length)
        self.rows = [torch.randint(FIRST, self.size, (min(n, longest),), generator=draw).tolist() for n in LENGTHS]
        self.targets = torch.randint(FIRST, self.size, (len(LENGTHS),), generator=draw)

    def another(self, *, attention: str = "eager", dtype: torch.dtype = torch.float32) -> Case:
        """The same weights and questions with another kernel or in another dtype."""
        module = random_model(self.config, seed=self.seed, attention=attention, dtype=dtype)
        return Case(self.config, module, self.tokenizer, self.seed)

    @cached_property
    def plain(self) -> Plain:
        """The copy, and where its parts are."""
        family, at = self.model.family, self.bare.get_submodule
        paths = [f"{family.blocks}.{layer}" for layer in range(self.model.n_layers)]
        blocks = list(zip(paths, self.model.layouts, strict=True))
        acts = {f"{path}.{step.path}" for path, layout in blocks for step in layout.steps if step.kind == "activation"}
        layers = tuple(self._neurons(layer, path) for layer, path in enumerate(paths))
        biases = tuple(self._biases(at(family.embedding)))
        return Plain(self.bare, at(family.embedding), layers, tuple(at(path) for path in sorted(acts)), biases)

    def _biases(self, embedding: Any) -> Iterator[Any]:
        """What the copy adds whatever the prompt, from now on with gradients."""
        for part in self.bare.modules():
            for name, parameter in part.named_parameters(recurse=False):
                positions = isinstance(part, torch.nn.Embedding) and part is not embedding
                if name.endswith("bias") or (positions and parameter is not embedding.weight):
                    yield parameter.requires_grad_()

    def _neurons(self, layer: int, path: str) -> Neurons:
        """Where the neurons of a block are: behind those of experts come those of shared experts."""
        layout, mixture, width = self.model.layouts[layer], self.model.experts[layer], self.model.widths[layer]
        at = self.bare.get_submodule
        if mixture is None or layout.experts is None:
            return Neurons(width, ((at(f"{path}.{layout.down}"), 0),))
        first, shared = mixture.n_experts * mixture.d_expert, layout.experts.shared
        downs = () if shared is None else ((at(f"{path}.{shared}.down_proj"), first),)
        return Neurons(width, downs, at(f"{path}.{layout.experts.path}"))

    def prompts(self, rows: Sequence[int] = (0, 1, 2), **more: Any) -> list[Prompt]:
        """Questions about the target's logit."""
        return [Prompt(token_ids=self.rows[row], target=int(self.targets[row]), **more) for row in rows]

    def attributed(self, method: str = "relp", rows: Sequence[int] = (0, 1, 2), **more: Any) -> Attribution:
        """What tracer says of some of the prompts."""
        return attribute(self.model, self.prompts(rows, **more), method)

    @cached_property
    def relp(self) -> Attribution:
        """All prompts, by the method and rules of the default."""
        return self.attributed()

    @cached_property
    def gradients(self) -> Numbers:
        """By plain PyTorch, with the model's own gradients."""
        return self._numbers(linear=False)

    @cached_property
    def linearised(self) -> Numbers:
        """By plain PyTorch, with the gradients of the linearised model."""
        return self._numbers(linear=True)

    @torch.enable_grad()
    def _numbers(self, linear: bool) -> Numbers:
        """Of all prompts, aligned as tracer aligns them: positions from the prompt's start, zeros after its end."""
        found = self.plain.run(batch(self.rows), linear=linear)
        total = found.logits[torch.arange(len(self.rows)), -1, self.targets]
        slopes, entry = found.gradients(total.sum())
        lay = Batch(tuple(map(tuple, self.rows)))
        real = lay.real()
        values, at_nodes = _stacked(found.values), _stacked(slopes)
        nodes = lay.aligned(values * at_nodes, 2) * real[:, None, :, None]
        activations = lay.aligned(values, 2) * real[:, None, :, None]
        embeddings = lay.aligned((found.embedding * entry).sum(-1).detach().float(), 1) * real
        biases = torch.stack([found.of_biases(one) for one in total])
        return Numbers(nodes, activations, embeddings, total.detach().float(), biases)

    @cached_property
    def nodes(self) -> Tensor:
        """Some nodes of the first prompt that are not zero, rows of (layer, position, neuron)."""
        ran = self.relp.activations[0].nonzero()
        chosen = torch.randperm(len(ran), generator=torch.Generator().manual_seed(self.seed))[:NODES]
        return ran[chosen]

    @cached_property
    def logits(self) -> Tensor:
        """Some logits of the first prompt, rows of (position, token)."""
        last = len(self.rows[0]) - 1
        return torch.tensor([[last, int(self.targets[0])], [last, FIRST], [max(last - 2, 0), FIRST + 1]])

    @cached_property
    def held(self) -> Pass:
        """The first prompt through the plain linearised model, with all neurons held."""
        return self.plain.run(batch(self.rows[:1]), linear=True, hold=True)

    @cached_property
    @torch.enable_grad()
    def direct(self) -> Direct:
        """By plain PyTorch, a backward for each target."""
        found, values, rows, sums, biases = self.held, [], [], [], []
        for layer, position, neuron in self.nodes.tolist():
            values.append(found.raw[layer][0, position, neuron])
        values += [found.logits[0, position, token] for position, token in self.logits.tolist()]
        for value in values:
            slopes, entry = found.gradients(value)
            each = (_stacked(found.values) * _stacked(slopes))[0]
            inputs = (found.embedding * entry).sum(-1)[0]
            rows.append(torch.cat([each[self.nodes.unbind(-1)], inputs]))
            sums.append(each.sum() + inputs.sum())
            biases.append(found.of_biases(value))
        return Direct(*(torch.stack(part).detach() for part in (rows, sums, values, biases)))

    def nudged(self, source: int, by: float) -> Tensor:
        """The values of the nodes and the logits [target], where one source (a node, or behind them a position's
        embedding) is multiplied by 1 + `by`, every other neuron stays at its value, and so do the constants of the
        linearisation: plain forward arithmetic, without any gradient."""
        clean, node, entry = self.held, None, self.held.embedding.detach().clone()
        if source < len(self.nodes):
            node = self.nodes[source].tolist()
        else:
            entry[0, source - len(self.nodes)] *= 1.0 + by

        def put(layer: int, _: Tensor) -> Tensor:
            values = clean.values[layer].clone()
            if node is not None and node[0] == layer:
                values[0, node[1], node[2]] *= 1.0 + by
            return values

        found = self.plain.run(
            batch(self.rows[:1]), linear=True, hold=True, change=put, entry=entry, held=clean.kept
        )  # fmt: skip
        ends = [found.raw[layer][0, position, neuron] for layer, position, neuron in self.nodes.tolist()]
        ends += [found.logits[0, position, token] for position, token in self.logits.tolist()]
        return torch.stack(ends).detach()

    @cached_property
    @torch.enable_grad()
    def profiles(self) -> Profiles:
        """By plain PyTorch: a backward of its own for each node and each logit, through everything between."""
        found = self.plain.run(batch(self.rows[:1]), linear=True)
        inputs, outputs = [], []
        for layer, position, neuron in self.nodes.tolist():
            entry = found.gradients(found.raw[layer][0, position, neuron])[1]
            inputs.append((found.embedding * entry).sum(-1)[0])
        for position, token in self.logits.tolist():
            slopes, _ = found.gradients(found.logits[0, position, token])
            outputs.append((_stacked(found.values) * _stacked(slopes))[0][self.nodes.unbind(-1)])
        return Profiles(torch.stack(inputs).detach(), torch.stack(outputs, -1))

    def edges(self, engine: str, nodes: Tensor | None = None, idle: bool = False, **more: Any) -> Edges:
        """What tracer says of the edges among some nodes (the case's own, if None), the embeddings and the logits.

        Args:
            idle: some may be of experts that did not run.
        """
        given, find = self.nodes if nodes is None else nodes, edges_of if idle else direct_edges
        return find(self.model, tuple(self.rows[0]), given, self.logits, engine=engine, **more)


def _stacked(layers: Sequence[Tensor]) -> Tensor:
    """One tensor [prompt, layer, column, neuron], as wide as the widest layer."""
    widest = max(layer.shape[-1] for layer in layers)
    return torch.stack([pad(layer.detach(), (0, widest - layer.shape[-1])) for layer in layers], 1).float()
