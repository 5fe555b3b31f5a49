"""Traces that run here, as one request to a server, or inside a session there: functions over the envoys of a model.

Each is one forward, and one backward where it says so, over a left-padded batch. Like the functions of
model/interventions.py they travel to a server as their source: they take a model's `plan` and a batch's keyword
arguments, and know none of tracer's records. `backend` is what runs the trace; None inside a session.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import nnsight
import torch
from torch import Tensor

from tracer.model import interventions

NO_RULES: frozenset[str] = frozenset()


def gradients(
    nn: Any,
    plan: SimpleNamespace,
    inputs: dict[str, Any],
    read: Callable[[Tensor], Tensor],
    rules: frozenset[str],
    basis: str,
    embedding: Tensor | None = None,
    backend: Any = None,
) -> tuple[Tensor, ...]:
    """Values of all neurons and the metric's gradients to them [prompt, layer, column, neuron]; the embedding's output
    (or its replacement) and the gradient to it [prompt, column, d_model]; the metric [prompt]."""
    with torch.inference_mode(False), torch.enable_grad():
        with nn.trace(**inputs, backend=backend):
            entered = interventions.embed_leaf(nn, plan, embedding, True)
            neurons = interventions.through_blocks(nn, plan, rules, basis)
            score = read(interventions.logits(nn, plan, rules))
            grads = torch.autograd.grad(score.sum(), [entered, *neurons])
            both = interventions.stack(plan, neurons), interventions.stack(plan, grads[1:])
            saved = nnsight.save((*both, *interventions.to_cpu(entered, grads[0], score)))
    return saved


def values(
    nn: Any,
    plan: SimpleNamespace,
    inputs: dict[str, Any],
    basis: str,
    embedding: Tensor | None = None,
    backend: Any = None,
) -> tuple[Tensor, ...]:
    """Values of all neurons [prompt, layer, column, neuron], and the embedding's output [prompt, column, d_model]."""
    with torch.no_grad():
        with nn.trace(**inputs, backend=backend):
            entered = interventions.embed_leaf(nn, plan, embedding, False)
            neurons = interventions.through_blocks(nn, plan, NO_RULES, basis)
            saved = nnsight.save((interventions.stack(plan, neurons), *interventions.to_cpu(entered)))
    return saved


def embedding(nn: Any, plan: SimpleNamespace, inputs: dict[str, Any], backend: Any = None) -> Tensor:
    """What leaves the embedding [prompt, column, d_model]. The forward ends there."""
    with torch.no_grad():
        with nn.trace(**inputs, backend=backend) as tracer:
            saved = nnsight.save(interventions.to_cpu(nn.get(plan.embedding).output))
            tracer.stop()
    return saved[0]


def replaced(
    nn: Any,
    plan: SimpleNamespace,
    inputs: dict[str, Any],
    read: Callable[[Tensor], Tensor],
    layer: int,
    neurons: Tensor,
    basis: str,
    backend: Any = None,
) -> tuple[Tensor, ...]:
    """The metric's plain gradients to one layer's neurons, set to `neurons` [prompt, column, neuron], and the metric
    [prompt]. The backward ends at that layer."""
    with torch.inference_mode(False), torch.enable_grad():
        with nn.trace(**inputs, backend=backend):
            leaf = neurons.detach().clone().requires_grad_(True)
            interventions.through_blocks(
                nn, plan, NO_RULES, basis, lambda at, value: interventions.replace_layer(value, leaf, at == layer)
            )
            score = read(interventions.logits(nn, plan, NO_RULES))
            (grad,) = torch.autograd.grad(score.sum(), [leaf])
            saved = nnsight.save(interventions.to_cpu(grad, score))
    return saved


def logits(
    nn: Any, plan: SimpleNamespace, inputs: dict[str, Any], rules: frozenset[str] = NO_RULES, backend: Any = None
) -> Tensor:
    """The logits of the columns that `inputs` keep [prompt, column, vocab]."""
    with torch.no_grad():
        with nn.trace(**inputs, backend=backend):
            if rules:
                interventions.through_blocks(nn, plan, rules, "activation")
            saved = nnsight.save(interventions.to_cpu(interventions.logits(nn, plan, rules)))
    return saved[0]


def from_embedding(
    nn: Any,
    plan: SimpleNamespace,
    inputs: dict[str, Any],
    read: Callable[[Tensor], Tensor],
    embedding: Tensor,
    backend: Any = None,
) -> Tensor:
    """The metric [prompt] with the embedding's output replaced."""
    with torch.no_grad():
        with nn.trace(**inputs, backend=backend):
            interventions.embed_leaf(nn, plan, embedding, False)
            saved = nnsight.save(interventions.to_cpu(read(interventions.logits(nn, plan, NO_RULES))))
    return saved[0]


def ablated(
    nn: Any,
    plan: SimpleNamespace,
    one: SimpleNamespace,
    rankings: tuple[int, int, Tensor, Sequence[Tensor]],
    to: Tensor | None,
    basis: str,
) -> Tensor:
    """What is read [prompt] with sets of nodes replaced, as `interventions.ablate_sets` takes them.

    `one` has the batch's `inputs`, its `rows`, what to `read`, and whether that is `linear` in a few logits: these
    alone are then computed, where they are what a linear head makes, and the forward ends before the head.
    """
    rows = torch.tensor(one.rows)
    with torch.no_grad():
        with nn.trace(**one.inputs) as tracer:
            interventions.through_blocks(
                nn, plan, NO_RULES, basis, lambda at, value: interventions.ablate_sets(value, at, rows, rankings, to)
            )
            head = interventions.plain_head(nn, plan) if one.linear else None  # in the trace hidden weights look so
            if head is None:
                saved = nnsight.save(interventions.to_cpu(one.read(interventions.logits(nn, plan, NO_RULES))))
            else:
                saved = nnsight.save(interventions.to_cpu(one.read(nn.get(plan.head).input, head=head)))
                tracer.stop()
    return saved[0]


def continued(nn: Any, plan: SimpleNamespace, ask: SimpleNamespace) -> Tensor:
    """The tokens that follow [prompt, new], each the one of the largest logit: one forward each, over a cache.

    `ask` has the batch's `inputs`, how many tokens are wanted at `most`, the `basis`, the edits of the `first` forward
    and those of `later` ones, and the tokens that are an end (`ends`); after its end a prompt repeats it.
    """
    inputs = {**ask.inputs, "use_cache": True}
    ends = torch.tensor(ask.ends, dtype=torch.long)
    ended = torch.zeros(len(inputs["input_ids"]), dtype=torch.bool)
    found: list[Tensor] = []
    while len(found) < ask.most and not bool(ended.all()):
        edits = ask.later if found else ask.first
        with torch.no_grad():
            with nn.trace(**inputs):
                interventions.through_blocks(
                    nn,
                    plan,
                    NO_RULES,
                    ask.basis,
                    lambda at, value, now=edits: interventions.apply_edits(now, at, value),
                )
                saved = nnsight.save((*interventions.to_cpu(nn.output.logits[:, -1]), nn.output.past_key_values))
        chosen = saved[0].argmax(-1)
        found.append(torch.where(ended, found[-1], chosen) if found else chosen)
        ended |= torch.isin(found[-1], ends)
        mask, places = inputs["attention_mask"], inputs["position_ids"]
        inputs |= {
            "input_ids": found[-1][:, None].to(mask.device),
            "attention_mask": torch.cat([mask, torch.ones_like(mask[:, :1])], 1),
            "position_ids": places[:, -1:] + 1,
            "past_key_values": saved[1],
        }
    return torch.stack(found, 1)


def direct_weights(
    nn: Any,
    plan: SimpleNamespace,
    inputs: dict[str, Any],
    nodes: Sequence[Tensor],
    logits_at: Sequence[Tensor],
    rules: frozenset[str],
    basis: str,
    max_bytes: int,
    baselines: tuple[Sequence[Tensor], Tensor] | None = None,
    backend: Any = None,
) -> list[tuple[Any, ...]]:
    """For each prompt: its targets' values [target], and what `interventions.direct_weights` returns.

    Args:
        nodes: rows of (layer, column, neuron), sources and targets. logits_at: rows of (column of the logits, token),
            targets.
        max_bytes, baselines: as there.
    """
    with torch.inference_mode(False), torch.enable_grad():
        with nn.trace(**inputs, backend=backend):
            entered = interventions.embed_leaf(nn, plan, None, True)
            cuts = interventions.walk(nn, plan, rules, lambda down, _: interventions.detach_mlp(down, basis))
            out = interventions.logits(nn, plan, rules)
            targets = interventions.target_values([parts[0] for parts in cuts], nodes, out, logits_at)
            weights = interventions.direct_weights(cuts, entered, targets, nodes, max_bytes, baselines)
            saved = nnsight.save(
                [(*interventions.to_cpu(values), *rest) for values, rest in zip(targets, weights, strict=True)]
            )
    return saved
