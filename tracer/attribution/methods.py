"""Which passes each attribution method needs, and how they combine, for one batch (method.md section 2).

Everything is worked out where the model is, in this process or on a server, whose requests carry these functions as
their source: layer by layer, left-padded as passes see it, nothing copied from the device. Knows the methods as
arithmetic over traces; only ``exact``, which takes more passes than one request should hold, is elsewhere
(attribution/exact.py). Refuses to know records of prompts, and what is done with the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tracer.attribution.result import noises
from tracer.model import experts, traces

Layers = Sequence[Tensor]
"""Of each layer [prompt, column, neuron]."""


def attributions(nn: Any, plan: SimpleNamespace, ask: SimpleNamespace) -> SimpleNamespace:
    """One batch's attributions, by the function that `ask` brings: one of `METHODS`.

    Args:
        ask: the function to `find` them; `inputs` of the batch and, with a counterfactual, of the `paired` one; the
            prompts' `token_ids`; the `metric`'s fields; `method`, `rules`, `basis`, `steps`, `seed`; `means` [layer,
            pos, neuron], the baseline where it is given; `edge_rules` of the linearisation of edges, None without;
            whether the `constants` of that are kept; and `report`, which progress is told, or None.

    Returns:
        `attribution`, a function of the layer [prompt, column, neuron], float32; the nodes' `values`, the metric's
        `gradients` to them (RelP's, of methods without, where edges are asked for; else None) and `baseline`, a
        function of the layer, None where it is zero; attributions of the `embeddings` [prompt, column]; the `metric`
        [prompt], and `start`, the metric where a path begins, or None; the `tokens` of the metric's terms and what they
        were `read` from; `embedding` and the counterfactual's `paired` one [prompt, column, d_model]; `blocks` and
        `final_scale`, the constants.
    """
    found = ask.find(nn, plan, ask)
    first = reach(plan, ask, len(found.values))
    if first < len(found.values):
        attribution = found.attribution
        found.attribution = lambda layer: (
            attribution(layer) if layer < first else torch.zeros_like(found.values[layer], dtype=torch.float32)
        )
        if found.gradients is not None:
            found.gradients = [
                one if layer < first else torch.zeros_like(one) for layer, one in enumerate(found.gradients)
            ]
    return found


def reach(plan: SimpleNamespace, ask: SimpleNamespace, n_layers: int) -> int:
    """The first layer whose nodes come too late for what the metric is read from, which neither they nor, of a neuron,
    it itself can move."""
    of = ask.metric.of
    if of is None or of.layer is None:
        return n_layers
    before = of.kind == "neuron" and (ask.basis != "attention" or plan.layers[of.layer].parallel)
    return of.layer + (not before)


def reported(ask: SimpleNamespace, done: int, total: int) -> None:
    """Tell progress to whoever asked to be told."""
    if ask.report is not None:
        ask.report(done, total)


def baseline_of(
    ask: SimpleNamespace, paired: SimpleNamespace | None, found: SimpleNamespace
) -> Callable[[int], Tensor] | None:
    """What nodes are compared with: the counterfactual's values (0 of an expert that did not run there) or the means of
    their positions; None for zero."""
    values, slots = found.values, found.slots  # `found` in its own function is a circle
    if paired is not None:
        return lambda layer: experts.moved(paired.values[layer].float(), paired.slots[layer], slots[layer])
    if ask.means is None:
        return None

    def mean(layer: int) -> Tensor:
        width = values[layer].shape[-1]
        padded = torch.zeros(*values[layer].shape[:2], ask.means[layer].shape[-1], device=values[layer].device)
        for row, ids in zip(padded, ask.token_ids, strict=True):
            row[row.shape[0] - len(ids) :] = ask.means[layer][: len(ids)].to(row.device)
        return experts.placed(padded, slots[layer], width)

    return mean


def away(values: Tensor, baseline: Callable[[int], Tensor] | None, layer: int) -> Tensor:
    """How far a layer's values are from their baseline, float32."""
    return values.float() if baseline is None else values.float() - baseline(layer)


def by_gradient(nn: Any, plan: SimpleNamespace, ask: SimpleNamespace) -> SimpleNamespace:
    """relp and grad: one forward and one backward. The embedding's own baseline is zero, so that RelP's conservation
    shows."""
    found = traces.gradients(nn, plan, ask.inputs, ask.metric, ask.rules, ask.basis, constants=ask.constants)
    paired = None if ask.paired is None else traces.values(nn, plan, ask.paired, ask.basis)
    reported(ask, 1, 1)
    found.baseline = baseline_of(ask, paired, found)
    values, slopes, baseline = found.values, found.gradients, found.baseline
    found.attribution = lambda layer: away(values[layer], baseline, layer) * slopes[layer].float()
    found.embeddings = (found.embedding.float() * found.embedding_gradient.float()).sum(-1)
    found.start, found.paired = None, None if paired is None else paired.embedding
    return found


def control(nn: Any, plan: SimpleNamespace, ask: SimpleNamespace) -> SimpleNamespace:
    """delta and random: how far values are from their baseline, and noise. One forward for the metric; a RelP pass
    where edges need gradients."""
    if ask.edge_rules is None:
        found = traces.values(nn, plan, ask.inputs, ask.basis, None, ask.metric)
        found.gradients = None
    else:
        found = traces.gradients(nn, plan, ask.inputs, ask.metric, ask.edge_rules, ask.basis, constants=ask.constants)
    paired = None if ask.paired is None else traces.values(nn, plan, ask.paired, ask.basis)
    reported(ask, 1, 1)
    found.baseline = baseline_of(ask, paired, found)
    found.start, found.paired = None, None if paired is None else paired.embedding
    values, baseline = found.values, found.baseline
    if ask.method == "delta":
        start = 0.0 if paired is None else paired.embedding.float()
        found.attribution = lambda layer: away(values[layer], baseline, layer).abs()
        found.embeddings = (found.embedding.float() - start).abs().sum(-1)
        return found
    widest = max(one.shape[-1] for one in values)
    shape = values[0].shape[0], len(values), values[0].shape[1], widest
    noise, found.embeddings = noises(ask.token_ids, shape, ask.seed)
    found.attribution = lambda layer: noise[:, layer, :, : values[layer].shape[-1]].to(values[layer].device)
    return found


def along(nn: Any, plan: SimpleNamespace, ask: SimpleNamespace) -> SimpleNamespace:
    """The path methods; ``relp-ig`` is ``ig`` with the linearised model's gradient at every step. The path leads from
    embeddings of zero, or the counterfactual's, to the prompt's in equal steps; of ``ig-activation`` each layer's
    neurons have one of their own."""
    found = traces.values(nn, plan, ask.inputs, ask.basis, None, ask.metric, ask.constants)
    ask.metric.token = found.tokens  # fixed for all passes
    end, start, before = found.embedding.float(), torch.zeros_like(found.embedding, dtype=torch.float32), None
    if ask.paired is not None:
        before = traces.values(nn, plan, ask.paired, ask.basis)
        start = before.embedding.float()
    elif ask.method != "ig-activation":
        before = traces.values(nn, plan, ask.inputs, ask.basis, start)
    found.baseline = baseline_of(ask, before if ask.means is None else None, found)
    found.paired = start if ask.paired is not None else None
    if before is None or ask.method == "ig-activation":
        means, to_embedding, score = along_activations(nn, plan, ask, found, end - start)
        totals = None
    else:
        means, totals, to_embedding, score = along_path(nn, plan, ask, (start, end), (before, found))
    found.gradients, found.metric = means, score
    values, baseline = found.values, found.baseline
    found.attribution = lambda layer: (
        totals[layer] if totals is not None else means[layer] * away(values[layer], baseline, layer)
    )
    found.embeddings = ((end - start) * to_embedding).sum(-1)
    found.start = traces.from_embedding(nn, plan, ask.inputs, ask.metric, start)
    return found


def along_path(
    nn: Any,
    plan: SimpleNamespace,
    ask: SimpleNamespace,
    ends: tuple[Tensor, Tensor],
    passes: tuple[SimpleNamespace, SimpleNamespace],
) -> tuple[Layers, Layers | None, Tensor, Tensor]:
    """ig, relp-ig and conductance: each layer's mean gradient over the path and, for conductance, its steps' gradients
    times what its values move; the mean gradient to the embedding; and the metric at the path's end.

    Experts that run along the path and not at its end have no neurons there, and are left out.

    Args:
        ends: of the path, embeddings. passes: at both, whose values have `slots`.
    """
    (start, end), (before, found) = ends, passes

    def at_end(values: Layers, slots: Sequence[SimpleNamespace | None]) -> Layers:
        return [experts.moved(one.float(), *two) for one, *two in zip(values, slots, found.slots, strict=True)]

    previous = at_end(before.values, before.slots)
    means = [torch.zeros_like(one, dtype=torch.float32) for one in found.values]
    totals = [torch.zeros_like(one) for one in means] if ask.method == "conductance" else None
    to_embedding, score = torch.zeros_like(end), torch.empty(0)
    for step in range(1, ask.steps + 1):
        at = start + (end - start) * (step / ask.steps) if step < ask.steps else end
        reached = traces.gradients(nn, plan, ask.inputs, ask.metric, ask.rules, ask.basis, at)
        values, slopes = (at_end(one, reached.slots) for one in (reached.values, reached.gradients))
        for layer, slope in enumerate(slopes):
            means[layer] += slope / ask.steps
            if totals is not None:
                totals[layer] += slope * (values[layer] - previous[layer])
        previous, score = values, reached.metric
        to_embedding += reached.embedding_gradient.float() / ask.steps
        reported(ask, step, ask.steps)
    return means, totals, to_embedding, score


def along_activations(
    nn: Any, plan: SimpleNamespace, ask: SimpleNamespace, found: SimpleNamespace, back: Tensor
) -> tuple[Layers, Tensor, Tensor]:
    """ig-activation: one layer's neurons at a time move from their values towards the baseline; the embeddings are one
    more such layer, and `back` is how far they are from theirs. Returns each layer's mean gradient, the mean gradient
    to the embedding, and the metric of the whole model."""
    means, to_embedding, score = [], torch.zeros_like(back), torch.empty(0)
    steps, total = range(ask.steps), (len(found.values) + 1) * ask.steps
    for layer, value in enumerate(found.values):
        if layer >= reach(plan, ask, len(found.values)):
            means.append(torch.zeros_like(value, dtype=torch.float32))
            continue
        whole, far = value.float(), away(value, found.baseline, layer)
        mean = torch.zeros_like(whole)
        for step in steps:
            at = whole - far * (step / ask.steps)
            slope = traces.replaced(nn, plan, ask.inputs, ask.metric, layer, at, ask.basis)
            mean += slope.float() / ask.steps
            reported(ask, layer * ask.steps + step + 1, total)
        means.append(mean)
    for step in reversed(steps):  # the last is the whole model, whose metric is kept
        at = found.embedding.float() - back * (step / ask.steps)
        reached = traces.gradients(nn, plan, ask.inputs, ask.metric, ask.rules, ask.basis, at)
        to_embedding += reached.embedding_gradient.float() / ask.steps
        score = reached.metric
        reported(ask, total - step, total)
    return means, to_embedding, score


METHODS: dict[str, Callable[[Any, SimpleNamespace, SimpleNamespace], SimpleNamespace]] = {
    "relp": by_gradient,
    "grad": by_gradient,
    "ig": along,
    "conductance": along,
    "ig-activation": along,
    "relp-ig": along,
    "delta": control,
    "random": control,
}
"""Functions as `attributions` runs them: a request carries one."""
