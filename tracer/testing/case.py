"""What is checked: a tiny random model in tracer, its plain copy, and the questions that both are asked.

Knows how to ask, here and there; what must be equal is checks.py's business. Refuses to know single families.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tracer.attribution.attribute import attribute
from tracer.attribution.edges import Edges, direct_edges
from tracer.attribution.profiles import Profiles
from tracer.attribution.result import Attribution
from tracer.model.model import Model, load
from tracer.prompts import Batch, Prompt
from tracer.system.forks import cached_property
from tracer.testing.models import random_model, tiny_tokenizer
from tracer.testing.plain import Pass, Plain, batch

LENGTHS = (9, 5, 2)
"""Tokens of the prompts."""
FIRST = 4
"""The first token id that is a word."""
NODES = 24
"""How many nodes edges are asked of."""


class Numbers(NamedTuple):
    """What plain PyTorch says of all prompts: `nodes` and `activations` [prompt, layer, pos, neuron], `embeddings`
    [prompt, pos], and the `metric` [prompt]."""

    nodes: Tensor
    activations: Tensor
    embeddings: Tensor
    metric: Tensor


class Case:
    """A tiny random model in tracer, a copy of it on which nothing of tracer ever ran, and what is asked of both."""

    def __init__(self, config: Any, module: Any, tokenizer: Any, seed: int) -> None:
        self.config, self.seed = config, seed
        self.bare: Any = deepcopy(module)
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
        downs = tuple(at(f"{path}.{layout.down}") for path, layout in blocks)
        return Plain(self.bare, at(family.embedding), downs, tuple(at(path) for path in sorted(acts)))

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
        values, at_nodes = _stacked(found.neurons), _stacked(slopes)
        nodes = lay.aligned(values * at_nodes, 2) * real[:, None, :, None]
        activations = lay.aligned(values, 2) * real[:, None, :, None]
        embeddings = lay.aligned((found.embedding * entry).sum(-1).detach().float(), 1) * real
        return Numbers(nodes, activations, embeddings, total.detach().float())

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
    def direct(self) -> tuple[Tensor, Tensor, Tensor]:
        """By plain PyTorch: weights of the direct edges into the nodes and logits, from the nodes and embeddings
        [target, source], from everything [target]; and the targets' values."""
        found, values, rows, sums = self.held, [], [], []
        for layer, position, neuron in self.nodes.tolist():
            values.append(found.raw[layer][0, position, neuron])
        values += [found.logits[0, position, token] for position, token in self.logits.tolist()]
        for value in values:
            slopes, entry = found.gradients(value)
            each = torch.stack([neurons * slope for neurons, slope in zip(found.neurons, slopes, strict=True)])[:, 0]
            inputs = (found.embedding * entry).sum(-1)[0]
            rows.append(torch.cat([each[self.nodes.unbind(-1)], inputs]))
            sums.append(each.sum() + inputs.sum())
        return torch.stack(rows).detach(), torch.stack(sums).detach(), torch.stack(values).detach()

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
            outputs.append((_stacked(found.neurons) * _stacked(slopes))[0][self.nodes.unbind(-1)])
        return Profiles(torch.stack(inputs).detach(), torch.stack(outputs, -1))

    def edges(self, engine: str, **more: Any) -> Edges:
        """What tracer says of the edges among the nodes, the embeddings and the logits."""
        return direct_edges(self.model, tuple(self.rows[0]), self.nodes, self.logits, engine=engine, **more)


def _stacked(layers: Sequence[Tensor]) -> Tensor:
    """One tensor [prompt, layer, column, neuron]."""
    return torch.stack([layer.detach() for layer in layers], 1).float()
