"""The identities of method.md section 8, one function each: how far a family's tiny model is from them.

Each compares what tracer's functions say with plain PyTorch (plain.py), with an intervention, or with a sum that must
hold; nothing is compared with itself. Refuses to know single families.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tracer.attribution.attribute import attribute
from tracer.attribution.profiles import attribution_profiles
from tracer.attribution.result import Attribution
from tracer.errors import JobError, TracerError
from tracer.metrics import Metric
from tracer.model import passes
from tracer.prompts import Batch, Prompt
from tracer.settings import RULES
from tracer.testing.case import Case
from tracer.testing.plain import batch

PARITY, IDENTITY = 1e-5, 1e-4
"""How far numbers may be apart, relative to the largest of them: one number computed in two ways, and a sum."""


STRONGEST = 5
"""How many sources are moved."""


class Found(NamedTuple):
    """What a check found: how far off, what that may be (None: the check does not apply), and a remark."""

    value: float | None
    tolerance: float | None
    note: str = ""


def gap(got: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest wanted number; infinite where one is no number."""
    if got.shape != wanted.shape or not bool(got.isfinite().all() and wanted.isfinite().all()):
        return float("inf")
    return float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)) if wanted.numel() else 0.0


def _apart(one: Any, other: Any) -> float:
    """Of two attributions, or of one and plain PyTorch's numbers."""
    return max(
        gap(getattr(one, part), getattr(other, part)) for part in ("nodes", "activations", "embeddings", "metric")
    )


# ---------------------------------------------------------------- parity


def neuron_values(case: Case) -> Found:
    """Values of all neurons of a padded batch, and the metric, equal what plain hooks see."""
    plain = case.gradients
    return Found(max(gap(case.relp.activations, plain.activations), gap(case.relp.metric, plain.metric)), PARITY)


def plain_gradients(case: Case) -> Found:
    """The method ``grad`` equals plain autograd."""
    return Found(_apart(case.attributed("grad"), case.gradients), PARITY)


def linearised_gradients(case: Case) -> Found:
    """RelP equals a second linearisation, written by operations and not by modules."""
    return Found(_apart(case.relp, case.linearised), PARITY)


def forward_unchanged(case: Case) -> Found:
    """All rules on, the logits are the model's own to the bit, in float32."""
    return _same_bits(case)


def forward_unchanged_in_bfloat16(case: Case) -> Found:
    """All rules on, the logits are the model's own to the bit, in bfloat16."""
    if case.config is None:
        return Found(None, None, "a module was given, not a configuration")
    return _same_bits(case.another(dtype=torch.bfloat16))


def _same_bits(case: Case) -> Found:
    lay = Batch(tuple(map(tuple, case.rows)))
    with torch.no_grad():
        wanted = case.model.module(**lay.inputs("cpu", lay.width)).logits.float()
    got = passes.logits(case.model, lay, lay.width, rules=RULES).float()
    return Found(float((got - wanted).abs().max()) if got.shape == wanted.shape else float("inf"), 0.0)


def attention_kernels(case: Case) -> Found:
    """Attributions do not depend on the attention kernel."""
    if case.config is None or not getattr(type(case.bare), "_supports_sdpa", False):
        return Found(None, None, "a module was given" if case.config is None else "it has no sdpa kernel")
    return Found(_apart(case.another(attention="sdpa").relp, case.relp), PARITY)


def padding(case: Case) -> Found:
    """A prompt padded in a batch has the numbers that it has alone."""
    return Found(max(_row(case, case.attributed(rows=(row,)), 0, row) for row in range(len(case.rows))), PARITY)


def other_company(case: Case) -> Found:
    """A prompt's numbers do not depend on which others share its batch."""
    return Found(max(_row(case, case.attributed(rows=pair), 0, pair[0]) for pair in ((0, 2), (1, 2), (1, 0))), PARITY)


def _row(case: Case, one: Attribution, mine: int, row: int) -> float:
    """How far a prompt's numbers are from those it has among all prompts."""
    length = len(case.rows[row])
    parts = [(one.nodes[mine][:, :length], case.relp.nodes[row][:, :length])]
    parts.append((one.embeddings[mine, :length], case.relp.embeddings[row, :length]))
    return max(gap(*part) for part in parts)


def later_positions(case: Case) -> Found:
    """Nothing after the position that is read has any attribution."""
    read = len(case.rows[0]) // 2
    found = case.attributed(rows=(0,), positions=(read,))
    after = found.nodes[0, :, read + 1 :].abs().sum() + found.embeddings[0, read + 1 :].abs().sum()
    if case.model.looks_ahead:
        return Found(None, None, "its attention looks at later tokens")
    return Found(float(after), 0.0)


# ---------------------------------------------------------------- conservation


def conservation(case: Case) -> Found:
    """The embeddings' attributions, and what comes of biases, add up to the metric (identity 2)."""
    kept, biases = case.relp, case.linearised.biases
    scale = kept.embeddings.abs().sum(-1)
    return _sum(kept.unexplained - biases, biases, scale)


def incoming(case: Case) -> Found:
    """What comes directly into a neuron, biases included, adds up to it (identity 3)."""
    return _into(case, slice(0, len(case.nodes)))


def incoming_of_logits(case: Case) -> Found:
    """What comes directly into a logit, biases included, adds up to it (identity 4)."""
    return _into(case, slice(len(case.nodes), None))


def _into(case: Case, targets: slice) -> Found:
    found, biases = case.edges("auto"), case.direct.biases[targets]
    values = found.target_values[targets]
    return _sum(values - found.incoming[targets] - biases, biases, values.abs().max())


def _sum(left: Tensor, biases: Tensor, scale: Tensor) -> Found:
    """What a sum leaves over, and the share of it that comes of biases, which carry no relevance."""
    share = float((biases.abs() / scale).max())
    note = f"{share:.0%} of it comes of biases, which carry no relevance" if share else ""
    return Found(float((left.abs() / scale).max()), IDENTITY, note)


# ---------------------------------------------------------------- edges


def edges_of_autograd(case: Case) -> Found:
    """Edges equal plain autograd through the second linearisation with all neurons held."""
    found, plain = case.edges("autograd"), case.direct
    pairs = ((found.weight, plain.weight), (found.incoming, plain.incoming), (found.target_values, plain.values))
    return Found(max(gap(*pair) for pair in pairs), PARITY)


def edges_of_replay(case: Case) -> Found:
    """The linear replay equals autograd."""
    found, other = case.edges("replay"), case.edges("autograd")
    return Found(max(gap(found.weight, other.weight), gap(found.incoming, other.incoming)), PARITY)


def edges_of_interventions(case: Case) -> Found:
    """Moving a source, with everything between it and the target held, changes the target by the edge's weight; without
    any autograd."""
    weight = case.edges("auto").weight
    sources = weight.abs().amax(0).topk(min(STRONGEST, weight.shape[1])).indices.tolist()
    still, off = case.nudged(0, 0.0), 0.0
    for source in sources:
        moved = case.nudged(source, 0.5) - still
        off = max(off, float((moved - 0.5 * weight[:, source]).abs().max() / weight.abs().max()))
    return Found(off, IDENTITY)


def baselines_of_edges(case: Case) -> Found:
    """A source at its baseline has no edge attribution; one between has its share of the weight (identity 4a)."""
    found = case.edges("auto")
    nodes, inputs = found.source_values, case.held.embedding[0].detach()
    at = case.edges("auto", baselines=(nodes, inputs)).from_baseline
    half = case.edges("auto", baselines=(0.5 * nodes, 0.5 * inputs)).from_baseline
    if at is None or half is None:
        return Found(float("inf"), PARITY, "no weights from the baseline")
    return Found(max(float(at.abs().max() / found.weight.abs().max()), gap(half, 0.5 * found.weight)), PARITY)


def idle_experts(case: Case) -> Found:
    """A neuron of an expert that did not run at a position is refused there, and has no value and no edge where it is
    let in."""
    idle = []
    for layer, mixture in enumerate(case.model.experts):
        if mixture is not None:
            routed = case.relp.activations[0, layer, 0, : mixture.n_experts * mixture.d_expert]
            silent = (routed.view(mixture.n_experts, -1) == 0).all(-1).nonzero()[:1, 0].tolist()
            idle += [(layer, expert * mixture.d_expert) for expert in silent]
    if not idle:
        return Found(None, None, "every neuron runs at every position")
    nodes = torch.tensor([(layer, 0, neuron) for layer, neuron in idle])
    taken = 0
    for node in nodes:
        with suppress(JobError):
            case.edges("auto", nodes=node[None])
            taken += 1
    if taken:
        return Found(float("inf"), 0.0, f"{taken} of {len(nodes)} nodes of experts that did not run were not refused")
    found = case.edges("auto", nodes=torch.cat([nodes, case.nodes]), idle=True)
    mine = torch.arange(len(nodes))
    parts = found.weight[mine], found.weight[:, mine], found.incoming[mine], found.target_values[mine]
    return Found(max(float(part.abs().max()) for part in parts), 0.0)


def profiles(case: Case) -> Found:
    """Attribution profiles by the linear replay equal those by autograd, and plain PyTorch."""
    ask = (case.model, tuple(case.rows[0]), case.nodes, case.logits)
    replayed, taken = (attribution_profiles(*ask, engine=engine) for engine in ("replay", "autograd"))
    wanted = case.profiles
    pairs = ((replayed, taken), (taken, wanted), (replayed, wanted))
    return Found(max(max(gap(a.inputs, b.inputs), gap(a.outputs, b.outputs)) for a, b in pairs), PARITY)


# ---------------------------------------------------------------- interventions and state


def ablation(case: Case) -> Found:
    """Setting a neuron changes the logits as a plain hook does."""
    token, lay, off = int(case.targets[0]), Batch((tuple(case.rows[0]),)), 0.0
    row, column = torch.tensor([0]), torch.tensor([-1])
    metric = Metric("logit", row, column, torch.tensor([token]), torch.ones(1), 1)
    for layer, position, neuron in case.nodes[:6].tolist():
        where, to = (row, torch.tensor([position]), torch.tensor([neuron])), torch.tensor([0.75])

        def put(at: int, value: Tensor, node: tuple[int, int, int] = (layer, position, neuron)) -> Tensor:
            value = value.clone()
            if at == node[0]:
                value[0, node[1], node[2]] = 0.75
            return value

        logits = case.plain.run(batch(case.rows[:1]), change=put).logits[0, -1].detach()
        got = passes.ablated(case.model, lay, metric, layer=layer, where=where, to=to)[0]
        off = max(off, float((got - logits[token]).abs() / logits.abs().max()))
    return Found(off, PARITY)


def unchanged(case: Case) -> Found:
    """After everything, and after an error, the model is what it was."""
    with suppress(TracerError):
        attribute(case.model, [Prompt(token_ids=case.rows[0], target=case.size + 1)])
    named, kept = dict(case.bare.named_parameters()), dict(case.model.module.named_parameters())
    same = named.keys() == kept.keys() and all(torch.equal(named[name], kept[name]) for name in named)
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in case.model.module.modules())
    with torch.no_grad():
        logits = [module(**batch(case.rows)).logits[:, -1] for module in (case.model.module, case.bare)]
    return Found(float("inf") if hooked or not same else gap(*logits), PARITY)


CHECKS: tuple[tuple[str, str, Callable[[Case], Found]], ...] = (
    ("values of neurons", "parity", neuron_values),
    ("gradients", "parity", plain_gradients),
    ("linearised gradients", "parity", linearised_gradients),
    ("forward to the bit", "parity", forward_unchanged),
    ("forward to the bit in bfloat16", "parity", forward_unchanged_in_bfloat16),
    ("attention kernels", "parity", attention_kernels),
    ("padding", "parity", padding),
    ("other company", "parity", other_company),
    ("later positions", "parity", later_positions),
    ("ablation", "parity", ablation),
    ("embeddings add up", "conservation", conservation),
    ("incoming of neurons", "conservation", incoming),
    ("incoming of logits", "conservation", incoming_of_logits),
    ("edges by autograd", "edges", edges_of_autograd),
    ("edges by replay", "edges", edges_of_replay),
    ("edges by intervention", "edges", edges_of_interventions),
    ("edges from baselines", "edges", baselines_of_edges),
    ("experts that did not run", "edges", idle_experts),
    ("profiles", "edges", profiles),
    ("nothing changed", "state", unchanged),
)
"""Each check's name, its group, and what it does; the last one looks at what the others left."""
