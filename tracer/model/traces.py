"""Traces that run here, or inside a session on a server: functions over the envoys of a model.

Each is one forward, and one backward where it says so, over a left-padded batch. Like the functions of
model/interventions.py they travel to a server as their source: they take a model's `plan` and a batch's keyword
arguments, and know none of tracer's records.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    metric: SimpleNamespace,
    rules: frozenset[str],
    basis: str,
    embedding: Tensor | None = None,
    constants: bool = False,
) -> SimpleNamespace:
    """A forward and a backward, of which nothing leaves the device.

    Args:
        metric: the fields of a `Metric`; see `interventions.score`.
        embedding: put in the place of the embedding's output.
        constants: keep those of the linearisation.

    Returns:
        `values` of all neurons and the metric's `gradients` to them, for each layer [prompt, column, neuron], and where
        they are in it (`slots`, None of a layer without experts); the
        `embedding`'s output (or its replacement) and its `embedding_gradient` [prompt, column, d_model]; the `metric`
        [prompt], the `tokens` of its terms and what they were `read` from, or their values `inside` the model; `blocks`
        and `final_scale`, the constants.
    """
    kept, scales = ([], []) if constants else (None, None)
    reads, stops, slots = interventions.inside(metric), list[BaseException](), list[Any]()
    with torch.inference_mode(False), torch.enable_grad():
        with nn.trace(**inputs) as tracer:
            entered = interventions.embed_leaf(nn, plan, embedding, True)
            neurons = interventions.through_blocks(nn, plan, rules, basis, None, kept, reads, slots)
            score, tokens, source = interventions.score(nn, plan, rules, metric, scales, reads)
            later = reads is not None  # nodes behind what is read, which have no part in it
            grads = torch.autograd.grad(score.sum(), [entered, *neurons], allow_unused=later, materialize_grads=later)
            saved = nnsight.save(
                ([value.detach() for value in neurons], grads, entered.detach(), score, tokens, source)
            )
            interventions.stop(tracer, plan, stops)
    interventions.release(stops)
    values, grads, entered, score, tokens, source = saved
    return SimpleNamespace(
        values=values,
        gradients=grads[1:],
        embedding=entered,
        embedding_gradient=grads[0],
        metric=score.detach(),
        tokens=tokens,
        read=source.detach(),
        slots=slots,
        inside=None if reads is None else reads.values.detach(),
        blocks=kept,
        final_scale=scales[0] if scales else None,
    )


def values(
    nn: Any,
    plan: SimpleNamespace,
    inputs: dict[str, Any],
    basis: str,
    embedding: Tensor | None = None,
    metric: SimpleNamespace | None = None,
    constants: bool = False,
) -> SimpleNamespace:
    """A forward, as `gradients` but for what needs a backward; without a metric it ends behind the last block."""
    kept, scales = ([], []) if constants else (None, None)
    reads, stops, slots = interventions.inside(metric), list[BaseException](), list[Any]()
    with torch.no_grad():
        with nn.trace(**inputs) as tracer:
            entered = interventions.embed_leaf(nn, plan, embedding, False)
            neurons = interventions.through_blocks(nn, plan, NO_RULES, basis, None, kept, reads, slots)
            found = (None, None, None)
            if metric is not None:
                found = interventions.score(nn, plan, NO_RULES, metric, scales, reads)
            saved = nnsight.save((neurons, entered, *found))
            interventions.stop(tracer, plan, stops)
    interventions.release(stops)
    neurons, entered, score, tokens, source = saved
    return SimpleNamespace(
        values=neurons,
        embedding=entered,
        metric=score,
        tokens=tokens,
        read=source,
        slots=slots,
        inside=None if reads is None else reads.values,
        blocks=kept,
        final_scale=scales[0] if scales else None,
    )


def embedding(nn: Any, plan: SimpleNamespace, inputs: dict[str, Any]) -> Tensor:
    """What leaves the embedding [prompt, column, d_model], on the CPU. The forward ends there."""
    stops: list[BaseException] = []
    with torch.no_grad():
        with nn.trace(**inputs) as tracer:
            saved = nnsight.save(interventions.to_cpu(nn.get(plan.embedding).output))
            interventions.stop(tracer, plan, stops)
    interventions.release(stops)
    return saved[0]


def constants(nn: Any, plan: SimpleNamespace, inputs: dict[str, Any]) -> SimpleNamespace:
    """The constants of a linearisation without reading the head: `embedding` [prompt, column, d_model], `blocks` (see
    `interventions.observe`), `final_scale` [prompt, column], and what leaves the final norm, `read`."""
    kept, scales = [], []
    stops: list[BaseException] = []
    with torch.no_grad():
        with nn.trace(**inputs) as tracer:
            entered = nn.get(plan.embedding).output
            interventions.through_blocks(nn, plan, NO_RULES, "activation", None, kept)
            saved = nnsight.save((entered, interventions.final(nn, plan, NO_RULES, scales)))
            interventions.stop(tracer, plan, stops)
    interventions.release(stops)
    return SimpleNamespace(embedding=saved[0], blocks=kept, final_scale=scales[0], read=saved[1])


def read(nn: Any, plan: SimpleNamespace, ask: SimpleNamespace) -> Tensor:
    """What leaves the final norm [prompt, column, d_model], on the CPU. The forward ends there."""
    stops: list[BaseException] = []
    with torch.no_grad():
        with nn.trace(**ask.inputs) as tracer:
            saved = nnsight.save(interventions.to_cpu(interventions.final(nn, plan, NO_RULES)))
            interventions.stop(tracer, plan, stops)
    interventions.release(stops)
    return saved[0]


def terms(nn: Any, plan: SimpleNamespace, ask: SimpleNamespace) -> Tensor:
    """The values [term] that a metric of something inside the model is read from, on the CPU."""
    return interventions.to_cpu(values(nn, plan, ask.inputs, "activation", None, ask.metric).inside)[0]


def stacked(nn: Any, plan: SimpleNamespace, ask: SimpleNamespace) -> tuple[Tensor, ...]:
    """Values of all neurons and the metric's gradients to them [prompt, layer, column, neuron], the embedding's output
    (or its replacement) and the gradient to it [prompt, column, d_model], the metric [prompt]; without a `metric`, the
    values and the embedding's output alone. They leave the device."""
    if ask.metric is None:
        found = values(nn, plan, ask.inputs, ask.basis, ask.embedding)
        values_of = interventions.stack(ask.dtype, found.values, found.slots, ask.n_neurons)
        return (values_of, *interventions.to_cpu(found.embedding))
    found = gradients(nn, plan, ask.inputs, ask.metric, ask.rules, ask.basis, ask.embedding)
    both = [interventions.stack(ask.dtype, one, found.slots, ask.n_neurons) for one in (found.values, found.gradients)]
    return (*both, *interventions.to_cpu(found.embedding, found.embedding_gradient, found.metric))


def pooled(nn: Any, plan: SimpleNamespace, ask: SimpleNamespace) -> Tensor:
    """How far each neuron is on either side of 0, over a prompt's positions, on the CPU [prompt, layer, side, neuron]:
    see `interventions.pooled`. `ask` has the batch's `inputs`, the `basis`, `how`, and the `dtype`."""
    found = values(nn, plan, ask.inputs, ask.basis)
    mask = ask.inputs["attention_mask"]
    pairs = zip(found.values, found.slots, strict=True)
    pooled_each = [interventions.pooled(one, mask, ask.how, where, ask.n_neurons) for one, where in pairs]
    return interventions.stack(ask.dtype, pooled_each)


def routed(nn: Any, plan: SimpleNamespace, ask: SimpleNamespace) -> tuple[Tensor, ...]:
    """Which experts each token goes to, of every layer that has some [prompt, column, slot], on the CPU."""
    slots = values(nn, plan, ask.inputs, "activation").slots
    return tuple(where.expert.cpu() for where in slots if where is not None)


def chosen(nn: Any, plan: SimpleNamespace, ask: SimpleNamespace) -> Tensor:
    """Values of some neurons at every column [prompt, column, neuron], on the CPU; nothing else is kept.

    `ask` has the batch's `inputs` and, of each layer, which `neurons`; they follow one another by layer.
    """
    stops: list[BaseException] = []
    with torch.no_grad():
        with nn.trace(**ask.inputs) as tracer:
            found = interventions.walk(
                nn, plan, NO_RULES, lambda site, layer: interventions.pick(site, ask.neurons[layer])
            )
            saved = nnsight.save(interventions.to_cpu(torch.cat([some for some in found if some.numel()], dim=-1)))
            interventions.stop(tracer, plan, stops)
    interventions.release(stops)
    return saved[0]


def replaced(
    nn: Any,
    plan: SimpleNamespace,
    inputs: dict[str, Any],
    metric: SimpleNamespace,
    layer: int,
    neurons: Tensor,
    basis: str,
) -> Tensor:
    """The metric's plain gradients to one layer's neurons, set to `neurons` [prompt, column, neuron]. The backward ends
    at that layer."""
    reads, stops = interventions.inside(metric), list[BaseException]()
    with torch.inference_mode(False), torch.enable_grad():
        with nn.trace(**inputs) as tracer:
            leaf = neurons.detach().clone().requires_grad_(True)
            interventions.through_blocks(
                nn,
                plan,
                NO_RULES,
                basis,
                lambda at, value, _: interventions.replace_layer(value, leaf, at == layer),
                None,
                reads,
            )
            score, _, _ = interventions.score(nn, plan, NO_RULES, metric, None, reads)
            (grad,) = torch.autograd.grad(score.sum(), [leaf])
            saved = nnsight.save(grad)
            interventions.stop(tracer, plan, stops)
    interventions.release(stops)
    return saved


def from_embedding(
    nn: Any, plan: SimpleNamespace, inputs: dict[str, Any], metric: SimpleNamespace, embedding: Tensor
) -> Tensor:
    """The metric [prompt] with the embedding's output replaced."""
    reads, stops = interventions.inside(metric), list[BaseException]()
    with torch.no_grad():
        with nn.trace(**inputs) as tracer:
            interventions.embed_leaf(nn, plan, embedding, False)
            if reads is not None:
                interventions.through_blocks(nn, plan, NO_RULES, "activation", None, None, reads)
            score, _, _ = interventions.score(nn, plan, NO_RULES, metric, None, reads)
            saved = nnsight.save(score)
            interventions.stop(tracer, plan, stops)
    interventions.release(stops)
    return saved


def set_nodes(nn: Any, plan: SimpleNamespace, ask: SimpleNamespace) -> Tensor:
    """The metric [prompt] after setting single neurons of one `layer` or, where that is None, the embedding's output at
    single tokens, on the CPU: `where` and `to` as `interventions.set_values` takes them."""
    reads, stops = interventions.inside(ask.metric), list[BaseException]()
    with torch.no_grad():
        with nn.trace(**ask.inputs) as tracer:
            if ask.layer is None:
                entered = nn.get(plan.embedding).output
                nn.get(plan.embedding).output = interventions.set_values(entered, ask.where, ask.to)
            interventions.through_blocks(
                nn,
                plan,
                NO_RULES,
                ask.basis,
                lambda at, value, slots: (
                    interventions.set_values(value, ask.where, ask.to, slots) if at == ask.layer else value
                ),
                None,
                reads,
            )
            saved = nnsight.save(interventions.to_cpu(interventions.asked(nn, plan, ask.metric, reads)))
            interventions.stop(tracer, plan, stops)
    interventions.release(stops)
    return saved[0]


def metric_from(nn: Any, plan: SimpleNamespace, ask: SimpleNamespace) -> Tensor:
    """`from_embedding`, on the CPU."""
    return interventions.to_cpu(from_embedding(nn, plan, ask.inputs, ask.metric, ask.embedding))[0]


def ablated(
    nn: Any,
    plan: SimpleNamespace,
    one: SimpleNamespace,
    rankings: tuple[int, int, Tensor, Sequence[Tensor]],
    to: Tensor | None,
    basis: str,
) -> Tensor:
    """What is read [prompt] with sets of nodes replaced, as `interventions.ablate_sets` takes them.

    `one` has the batch's `inputs`, its `rows`, and the fields of the `metric`; without one the greedy next token is
    read. Where rows of the head can be read, the forward ends before it.
    """
    rows, reads, stops = torch.tensor(one.rows), interventions.inside(one.metric), list[BaseException]()
    with torch.no_grad():
        with nn.trace(**one.inputs) as tracer:
            interventions.through_blocks(
                nn,
                plan,
                NO_RULES,
                basis,
                lambda at, value, where: interventions.ablate_sets(value, at, rows, rankings, to, where),
                None,
                reads,
            )
            saved = nnsight.save(interventions.to_cpu(interventions.asked(nn, plan, one.metric, reads)))
            interventions.stop(tracer, plan, stops)
    interventions.release(stops)
    return saved[0]


def continued(nn: Any, plan: SimpleNamespace, ask: SimpleNamespace) -> Tensor:
    """The tokens that follow [prompt, new], each the one of the largest logit or drawn: one forward each, over a cache.

    `ask` has the batch's `inputs`, how many tokens are wanted at `most`, the `basis`, the edits of the `first` forward
    and those of `later` ones, the tokens that are an end (`ends`), and how tokens are drawn (`sampling`, see `draw`) or
    None; after its end a prompt repeats it.
    """
    sources = [torch.Generator().manual_seed(seed) for seed in (ask.sampling.seeds if ask.sampling else ())]
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
                    lambda at, value, where, now=edits: interventions.apply_edits(now, at, value, where),
                )
                out = nn.output  # the cache is called so from transformers 5.24 on, in and out
                cache = "cache" if "cache" in out else "past_key_values"
                saved = nnsight.save((*interventions.to_cpu(out.logits[:, -1]), {cache: out[cache]}))
        chosen = draw(saved[0], ask.sampling, sources) if ask.sampling else saved[0].argmax(-1)
        found.append(torch.where(ended, found[-1], chosen) if found else chosen)
        ended |= torch.isin(found[-1], ends)
        mask, places = inputs["attention_mask"], inputs["position_ids"]
        inputs |= {
            "input_ids": found[-1][:, None].to(mask.device),
            "attention_mask": torch.cat([mask, torch.ones_like(mask[:, :1])], 1),
            "position_ids": places[:, -1:] + 1,
            **saved[1],
        }
    return torch.stack(found, 1)


def draw(logits: Tensor, how: SimpleNamespace, sources: Sequence[torch.Generator]) -> Tensor:
    """A token of each row [row], drawn with the row's own generator.

    Args:
        logits: [row, vocab], float32 on the CPU.
        how: `temperature`, which logits are divided by; `top_p`: only the likeliest tokens whose probabilities reach
            that sum, one at least, of equal ones the lower id first.
    """
    chances = (logits / how.temperature).softmax(-1)
    if how.top_p < 1:
        order = torch.sort(chances, dim=-1, descending=True, stable=True)
        before = order.values.cumsum(-1) - order.values
        kept = torch.zeros_like(chances).scatter(-1, order.indices, (before < how.top_p).float())
        chances = chances * kept
    rows = [torch.multinomial(row, 1, generator=source) for row, source in zip(chances, sources, strict=True)]
    return torch.cat(rows)


def swept(nn: Any, plan: SimpleNamespace, ask: SimpleNamespace) -> tuple[Tensor, ...]:
    """One prompt in many rows, of which the first is as it is and others have nodes multiplied: one forward.

    Args:
        ask: the batch's `inputs` and the `basis`; the `entries` and their `scale` (`interventions.scale_nodes`);
            `members` whose values are read, in the order of layers; the `tokens` asked for.

    Returns:
        Of the last position, float32 on the CPU: logits of the tokens and of the first row's greedy one, last [row,
        token + 1]; their probabilities; the greedy token [row]; KL(first row, row) in nats [row]. And the members'
        values [row, member].
    """
    with torch.no_grad():
        with nn.trace(**ask.inputs):
            read = interventions.walk(
                nn,
                plan,
                NO_RULES,
                lambda site, layer: interventions.values_at(
                    interventions.neurons(
                        site,
                        layer,
                        ask.basis,
                        lambda at, value, where: interventions.scale_nodes(value, at, ask.entries, ask.scale, where),
                    ),
                    layer,
                    ask.members,
                    site.slots if ask.basis == "activation" else None,
                ),
                basis=ask.basis,
            )
            saved = nnsight.save(([part.float().cpu() for part in read], nn.output.logits[:, -1].float()))
    members, logits = saved
    greedy = logits.argmax(-1)
    tokens = torch.cat([ask.tokens.to(logits.device), greedy[:1]])
    logs = logits.log_softmax(-1)
    apart = (logs[:1].exp() * (logs[:1] - logs)).sum(-1)
    asked, likely, apart = interventions.to_cpu(logits[:, tokens], logs[:, tokens].exp(), apart)
    return asked, likely, greedy.cpu(), apart, torch.cat(members, -1)


def direct_weights(
    nn: Any,
    plan: SimpleNamespace,
    inputs: dict[str, Any],
    nodes: Sequence[Tensor],
    logits_at: Sequence[Tensor],
    how: SimpleNamespace,
    max_bytes: int,
    baselines: tuple[Sequence[Tensor], Tensor] | None = None,
) -> list[tuple[Any, ...]]:
    """For each prompt: its targets' values [target], and what `interventions.direct_weights` returns.

    Args:
        nodes: rows of (layer, column, neuron), sources and targets. logits_at: rows of (column, token), targets;
            columns count from the end.
        how: `rules` of the linearisation, the `basis`, and the `metric`'s fields, for targets inside the model.
        max_bytes, baselines: as there.
    """
    reads, stops, slots = interventions.inside(how.metric), list[BaseException](), list[Any]()
    with torch.inference_mode(False), torch.enable_grad():
        with nn.trace(**inputs) as tracer:
            entered = interventions.embed_leaf(nn, plan, None, True)
            cuts = interventions.walk(
                nn,
                plan,
                how.rules,
                lambda site, _: interventions.detach_mlp(site, how.basis),
                None,
                reads,
                slots=slots,
            )
            placed, there = interventions.at_places(nodes, slots if how.basis == "activation" else [])
            ends = interventions.target_logits(nn, plan, how.rules, logits_at, how.metric, reads)
            targets = interventions.target_values([parts[0] for parts in cuts], placed, ends)
            weights = interventions.direct_weights(cuts, entered, targets, placed, max_bytes, baselines)
            saved = nnsight.save(
                [
                    interventions.only_there(ran, interventions.to_cpu(values)[0], rest)
                    for ran, values, rest in zip(there, targets, weights, strict=True)
                ]
            )
            interventions.stop(tracer, plan, stops)
    interventions.release(stops)
    return saved


def total_effects(
    nn: Any,
    plan: SimpleNamespace,
    inputs: dict[str, Any],
    nodes: Sequence[Tensor],
    logits_at: Sequence[Tensor],
    how: SimpleNamespace,
    max_bytes: int,
    baselines: tuple[Sequence[Tensor], Tensor] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """For each prompt what `interventions.effects_on_nodes` and `effects_on_logits` give; arguments as of
    `direct_weights`."""
    reads, stops, slots = interventions.inside(how.metric), list[BaseException](), list[Any]()
    with torch.inference_mode(False), torch.enable_grad():
        with nn.trace(**inputs) as tracer:
            entered = interventions.embed_leaf(nn, plan, None, True)
            neurons = interventions.through_blocks(nn, plan, how.rules, how.basis, None, None, reads, slots)
            placed, there = interventions.at_places(nodes, slots)
            ends = interventions.target_logits(nn, plan, how.rules, logits_at, how.metric, reads)
            before = interventions.effects_on_nodes(neurons, entered, placed, max_bytes, baselines)
            behind = interventions.effects_on_logits(neurons, ends, placed, max_bytes, baselines)
            sides = zip(there, before, behind, strict=True)
            saved = nnsight.save([tuple(interventions.rows_there(ran, part) for part in two) for ran, *two in sides])
            interventions.stop(tracer, plan, stops)
    interventions.release(stops)
    return saved
