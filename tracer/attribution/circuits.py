"""From a batch of prompts to the parts of their circuits, worked out where the model is: in this process, in a worker,
or on a server.

All nodes' values and gradients of a large model are gigabytes; what a circuit keeps of them is kilobytes. So one
function attributes, selects and finds the edges beside the model, and only its answer leaves the device. It travels to
a server as its source: `ask` holds plain values (see attribution/request.py), and so does the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tracer.attribution import replay, total
from tracer.attribution.methods import attributions
from tracer.attribution.selection import strongest
from tracer.metrics import logit_summary
from tracer.model import experts, head, interventions, traces

KEPT = {"kernel", "slots", "expert", "writes", "reads", "place"}
"""What of a block's constants is not sent: of experts, whose weights have to be readable where the model is."""
SAID = ("logits", "chances", "ranks", "top", "top_chances")
"""The parts of `head.summary` and `logit_summary` in an answer."""


def unsaid(values: Tensor) -> dict[str, Tensor]:
    """Those of targets inside the model, of their values: no token's, so that they have neither probability nor
    rank."""
    none = torch.zeros(len(values))
    return {"logits": values.float().cpu(), "chances": none.double(), "ranks": none.long()}


def circuits(nn: Any, plan: SimpleNamespace, ask: SimpleNamespace) -> list[dict[str, Any]]:
    """The parts of each prompt's circuit, for one batch: see `request.form`."""
    found = attributions(nn, plan, ask)
    answers = reduced(nn, plan, ask, found)
    for name, function in (("profiles", ask.profile), ("edges", ask.link)):
        if function is not None:
            for answer, part in zip(answers, function(nn, plan, ask, found, answers), strict=True):
                answer[name] = part
    return answers


def everything(nn: Any, plan: SimpleNamespace, ask: SimpleNamespace) -> dict[str, Any]:
    """Attributions of all nodes of a batch, on the device that is asked for: see `attribute.attribute`.

    `ask` also says in which `dtype` values go; whether values and gradients go as `factors`, whose product is left to
    whoever asked, at full precision; and whether other methods' `gradients` are wanted.
    """
    found, device = attributions(nn, plan, ask), ask.device
    layers = range(len(found.values))

    def stacked(of: Any) -> Tensor:
        each = [experts.numbered(of(layer), found.slots[layer], ask.n_neurons).to(device) for layer in layers]
        return torch.stack(each, 1)

    def sent(of: Any) -> Tensor:
        return stacked(lambda layer: of[layer].to(ask.dtype))

    def other(layer: int) -> Tensor:
        return found.baseline(layer).to(ask.dtype)

    return {
        "nodes": None if ask.factors else stacked(found.attribution),
        "values": sent(found.values),
        "gradients": sent(found.gradients) if ask.factors or (ask.gradients and found.gradients) else None,
        "baselines": None if found.baseline is None or ask.means is not None else stacked(other),
        "embeddings": found.embeddings.to(device),
        "metric": found.metric.to(device),
        "start": None if found.start is None else found.start.to(device),
        "tokens": found.tokens,
    }


def reduced(nn: Any, plan: SimpleNamespace, ask: SimpleNamespace, found: SimpleNamespace) -> list[dict[str, Any]]:
    """What circuits keep of a batch's attributions, without edges."""
    width, metric, said = found.values[0].shape[1], found.metric.cpu(), summaries(nn, plan, ask, found)
    first = [width - len(ids) for ids in ask.token_ids]
    kept = strongest(found.attribution, found.slots, first, metric, ask.selection)
    counts, rows = [len(nodes) for nodes in kept.places], list(zip(kept.places, first, strict=True))
    places = torch.cat([at + torch.tensor([0, column, 0]) for at, column in rows])
    places = torch.cat([torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[:, None], places], 1)

    def of_nodes(of: Callable[[int], Tensor] | None) -> Sequence[Tensor | None]:
        return [None] * len(counts) if of is None else gathered(of, places).split(counts)

    embeddings, slopes = found.embeddings.float().cpu(), found.gradients
    starts = [None] * len(counts) if found.start is None else found.start.tolist()
    activations = of_nodes(lambda layer: found.values[layer])
    gradients, baselines = of_nodes(slopes and (lambda layer: slopes[layer])), of_nodes(found.baseline)
    return [
        {
            "nodes": kept.nodes[row].int(),
            "attributions": kept.attributions[row],
            "activations": activations[row],
            "gradients": gradients[row],
            "baselines": baselines[row],
            "largest": float(kept.largest[row]),
            "total": float(kept.total[row]),
            "embeddings": embeddings[row, column:].clone(),
            "metric": float(metric[row]),
            "start": starts[row],
            "tokens": found.tokens[ask.metric.row == row],
            **said[row],
            "whole": whole(found, row, column, ask.n_neurons) if ask.whole else None,
        }
        for row, column in enumerate(first)
    ]


def whole(found: SimpleNamespace, row: int, column: int, n_neurons: int) -> Tensor:
    """One prompt's attributions of all nodes [layer, pos, neuron], for whoever sums them over prompts."""
    each = []
    for layer, where in enumerate(found.slots):
        every = experts.numbered(found.attribution(layer)[row : row + 1], of_row(where, row), n_neurons)
        each.append(every[0, column:].cpu())
    return torch.stack(each)


def of_row(where: SimpleNamespace | None, row: int) -> SimpleNamespace | None:
    """Where one prompt's neurons are."""
    return where and SimpleNamespace(**vars(where) | {"expert": where.expert[row : row + 1]})


def gathered(of: Callable[[int], Tensor], places: Tensor) -> Tensor:
    """Values of nodes at (prompt, layer, column, place), of each layer's [prompt, column, place], on the CPU; 0 at -1,
    where an expert did not run."""
    values = torch.zeros(len(places))
    for layer in places[:, 1].unique().tolist():
        mine = (places[:, 1] == layer).nonzero()[:, 0]
        row, _, column, place = places[mine].unbind(-1)
        found = of(layer)[row, column, place.clamp_min(0)].float().cpu()
        values[mine] = torch.where(place < 0, 0.0, found)
    return values


def summaries(nn: Any, plan: SimpleNamespace, ask: SimpleNamespace, found: SimpleNamespace) -> list[dict[str, Any]]:
    """Of each prompt's logits: those of the metric's terms, their probabilities and ranks; and the likeliest tokens
    where the metric is read last, with theirs. Of a metric of something inside the model its terms' values."""
    metric = ask.metric
    said = of_logits(nn, plan, ask, found)
    if metric.of is None:
        return said
    return [one | unsaid(found.inside[(metric.row == row).to(found.inside.device)]) for row, one in enumerate(said)]


def of_logits(nn: Any, plan: SimpleNamespace, ask: SimpleNamespace, found: SimpleNamespace) -> list[dict[str, Any]]:
    """`summaries` as if the metric were of logits."""
    metric = ask.metric
    at = torch.stack([metric.row, metric.column, found.tokens], -1)
    mine = [at[metric.row == row, 1:] for row in range(metric.n_prompts)]
    last = [int(one[:, 0].max()) for one in mine]
    if plan.head_rows:
        said = head.summary(head.of(nn, plan), found.read, at, last, ask.top)
        parts = [*(part.split([len(one) for one in mine]) for part in said[:3]), *said[3:]]
        return [dict(zip(SAID, (part[row].cpu() for part in parts), strict=True)) for row in range(len(mine))]
    every = zip(found.read.float(), mine, last, strict=True)
    return [
        dict(zip(SAID, (part.cpu() for part in logit_summary(one, at, column, ask.top)), strict=True))
        for one, at, column in every
    ]


def edges_of(nn: Any, plan: SimpleNamespace, ask: SimpleNamespace) -> list[tuple[Any, ...]]:
    """Edges among nodes that are known already: `ask` has them as `answers`, and the embeddings' baseline as
    `paired`."""
    found = SimpleNamespace(tokens=ask.metric.token)
    if ask.constants:
        found = traces.values(nn, plan, ask.inputs, ask.basis, None, ask.metric, True)
    found.paired = ask.paired
    return ask.link(nn, plan, ask, found, ask.answers)


def constants(nn: Any, plan: SimpleNamespace, ask: SimpleNamespace) -> dict[str, Any]:
    """The constants of a batch's linearisation, on the CPU, float32: of every neuron, or of one prompt's `nodes`."""
    found = traces.constants(nn, plan, ask.inputs)
    frozen = found if ask.nodes is None else replay.frozen(found, 0, 0, ask.nodes, ask.basis)

    def sent(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: sent(one) for name, one in value.items()}
        return None if value is None else interventions.to_cpu(value)[0]

    return {
        "embedding": sent(frozen.embedding),
        "final_scale": sent(frozen.final_scale),
        "read": sent(found.read),
        "blocks": [
            {name: sent(value) for name, value in vars(block).items() if name not in KEPT} for block in frozen.blocks
        ],
    }


def baselines(found: SimpleNamespace, answers: Sequence[dict[str, Any]]) -> list[tuple[Tensor, Tensor]] | None:
    """Of each prompt's nodes, and of its embeddings [column, d_model] or zero; None where all are zero."""
    nodes = [answer["baselines"] for answer in answers]
    if found.paired is None:
        if all(values is None or not bool(values.any()) for values in nodes):
            return None
        return [(values, torch.zeros(1)) for values in nodes]
    values = [torch.zeros(len(one["nodes"])) if one["baselines"] is None else one["baselines"] for one in answers]
    return list(zip(values, found.paired.float(), strict=True))


def by_replay(
    nn: Any, plan: SimpleNamespace, ask: SimpleNamespace, found: SimpleNamespace, answers: Sequence[dict[str, Any]]
) -> list[tuple[Any, ...]]:
    """The edges among what is selected, from the constants that the attribution's own pass brought."""
    width, frozen, kept = max(len(ids) for ids in ask.token_ids), [], answers
    answers = [with_targets(ask, row, answer) for row, answer in enumerate(kept)]
    for row, (answer, ids) in enumerate(zip(answers, ask.token_ids, strict=True)):
        frozen.append(replay.frozen(found, row, width - len(ids), answer["nodes"].long(), ask.basis))
    prompts = walks(nn, plan, ask, found, answers, frozen)
    for block in found.blocks:  # all nodes' numbers end here
        block.gate = block.up = block.values = None
    found.values = found.gradients = found.attribution = found.baseline = None
    linked = replay.linked(nn._module, plan, prompts, ask.max_bytes)
    if ask.metric.of is None:
        return linked
    return [as_targets(parts, len(answer["nodes"])) for parts, answer in zip(linked, kept, strict=True)]


def with_targets(ask: SimpleNamespace, row: int, answer: dict[str, Any]) -> dict[str, Any]:
    """A prompt's nodes, and behind them those that its metric is of."""
    if ask.metric.of is None:
        return answer
    column = ask.metric.column[ask.metric.row == row] + len(ask.token_ids[row])
    layer, neuron = (torch.full_like(column, number) for number in (ask.metric.of.layer, ask.metric.of.neuron))
    nodes, base = torch.stack([layer, column, neuron], -1), answer["baselines"]
    padded = None if base is None else torch.cat([base, torch.zeros(len(nodes))])
    return {**answer, "nodes": torch.cat([answer["nodes"].long(), nodes]), "baselines": padded}


def as_targets(parts: tuple[Any, ...], n_nodes: int) -> tuple[Any, ...]:
    """Edges among nodes of which all behind the first `n_nodes` are targets alone, and no sources."""
    weight, incoming, values, moved = parts
    sources = [*range(n_nodes), *range(len(weight), weight.shape[1])]
    return weight[:, sources], incoming, values, None if moved is None else moved[:, sources]


def profiles_of(of: SimpleNamespace | None, replayed: bool) -> Callable[..., list[tuple[Any, ...]]]:
    """The function that finds profiles: what is inside the model is reached by autograd alone."""
    return profiles_by_replay if replayed and of is None else profiles_by_autograd


def profiles_by_replay(
    nn: Any, plan: SimpleNamespace, ask: SimpleNamespace, found: SimpleNamespace, answers: Sequence[dict[str, Any]]
) -> list[tuple[Any, ...]]:
    """The profiles of what is selected, from the constants that the attribution's own pass brought."""
    width = max(len(ids) for ids in ask.token_ids)
    frozen = [replay.unpadded(found, row, width - len(ids)) for row, ids in enumerate(ask.token_ids)]
    return total.profiled(nn._module, plan, walks(nn, plan, ask, found, answers, frozen), ask.max_bytes)


def profiles_by_autograd(
    nn: Any, plan: SimpleNamespace, ask: SimpleNamespace, found: SimpleNamespace, answers: Sequence[dict[str, Any]]
) -> list[tuple[Any, ...]]:
    """The same from backward passes through the linearised model: where its weights cannot be read, or rules are off.
    One more forward."""
    columns, ends, away, shift = batched(ask, found, answers)
    how = SimpleNamespace(rules=ask.edge_rules, basis=ask.basis, metric=ask.metric)
    sides = traces.total_effects(nn, plan, ask.inputs, columns, ends, how, ask.max_bytes, away)
    return [(inputs[:, by:], outputs) for by, (inputs, outputs) in zip(shift, sides, strict=True)]


def batched(
    ask: SimpleNamespace, found: SimpleNamespace, answers: Sequence[dict[str, Any]]
) -> tuple[list[Tensor], list[Tensor], tuple[list[Tensor], Tensor] | None, list[int]]:
    """Of each prompt its nodes, rows of (layer, column, neuron), and its logits, rows of (column, token); the baselines
    of nodes and embeddings, None where all are zero; and of each prompt the columns before its first token."""
    width = max(len(ids) for ids in ask.token_ids)
    shift = [width - len(ids) for ids in ask.token_ids]
    columns = [answer["nodes"].long() + torch.tensor([0, by, 0]) for answer, by in zip(answers, shift, strict=True)]
    at = torch.stack([ask.metric.column, found.tokens], -1)
    ends, given, away = [at[ask.metric.row == row] for row in range(len(answers))], baselines(found, answers), None
    if given is not None:
        away = [nodes for nodes, _ in given], torch.zeros(()) if found.paired is None else found.paired
    return columns, ends, away, shift


def walks(
    nn: Any,
    plan: SimpleNamespace,
    ask: SimpleNamespace,
    found: SimpleNamespace,
    answers: Sequence[dict[str, Any]],
    frozen: Sequence[SimpleNamespace],
) -> list[SimpleNamespace]:
    """Prompts as `replay.linked` takes them, each with its `replay.frozen` constants."""
    unit, bases, prompts = head.of(nn, plan), baselines(found, answers), []
    for row, (answer, ids, constant) in enumerate(zip(answers, ask.token_ids, frozen, strict=True)):
        mine = (ask.metric.row == row) & (ask.metric.of is None)
        column, token = ask.metric.column[mine], found.tokens[mine]
        logits, shrunk = head.targets(unit, found.read[row, column.to(found.read.device)], token)
        prompt = SimpleNamespace(
            frozen=constant,
            neurons=answer["nodes"].long(),
            logits=torch.stack([column + len(ids), token], -1),
            logit_values=logits,
            shrunk=shrunk,
            basis=ask.basis,
            linear_gate="gate" in ask.edge_rules,
            baselines=None if bases is None else (bases[row][0], bases[row][1][-len(ids) :]),
        )
        prompts.append(prompt)
    return prompts


def by_autograd(
    nn: Any, plan: SimpleNamespace, ask: SimpleNamespace, found: SimpleNamespace, answers: Sequence[dict[str, Any]]
) -> list[tuple[Any, ...]]:
    """The same edges from backward passes through the linearised model with detached MLPs: where its weights cannot be
    read, or rules are off. One more forward."""
    width = max(len(ids) for ids in ask.token_ids)
    columns, ends, away, shift = batched(ask, found, answers)
    how = SimpleNamespace(rules=ask.edge_rules, basis=ask.basis, metric=ask.metric)
    linked = traces.direct_weights(nn, plan, ask.inputs, columns, ends, how, ask.max_bytes, away)
    found_edges = []
    for by, (values, weight, embedded, incoming, moved) in zip(shift, linked, strict=True):
        real = [*range(weight.shape[1]), *range(weight.shape[1] + by, weight.shape[1] + width)]
        from_baseline = None if moved is None else moved[:, real]
        found_edges.append((torch.cat([weight, embedded[:, by:]], -1), incoming, values, from_baseline))
    return found_edges
