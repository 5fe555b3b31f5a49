"""RelP's backward pass without autograd: for servers that take no gradients, where the weights are here.

The linearised model's backward pass is a linear map whose constants one forward brings; it is walked here, one prompt
at a time, from the logits down, with the matrices of the replay of edges (attribution/replay.py).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tracer.attribution import circuits, replay
from tracer.metrics import Metric
from tracer.model import head, passes
from tracer.model.backend import Of
from tracer.model.model import Model
from tracer.prompts import Batch
from tracer.settings import RULES


def constants(model: Model, batch: Batch, nodes: Tensor | None = None, basis: str = "activation") -> SimpleNamespace:
    """The constants of a batch's linearisation, on the devices of the weights that they are multiplied with; see
    `traces.constants` and, of one prompt's `nodes` alone, `replay.frozen`. One forward, which may run on a server."""
    ask = SimpleNamespace(inputs=passes.inputs(model, batch), nodes=nodes, basis=basis)
    return beside_weights(model, passes.session(model, circuits.constants, ask, _form(model, batch, nodes, basis)))


def beside_weights(model: Model, sent: dict[str, Any]) -> SimpleNamespace:
    """What `circuits.constants` sends, on the devices of the weights here."""

    def placed(value: Any, device: torch.device) -> Any:
        if isinstance(value, dict):
            return {name: placed(one, device) for name, one in value.items()}
        return value if value is None or device.type == "meta" else value.to(device)

    inside = [next(model.part(at, laid.down).parameters()).device for at, laid in enumerate(model.plan.layers)]
    none = dict.fromkeys(("slots", "expert", "writes", "reads"))  # no mixture is computed here
    blocks = [SimpleNamespace(**none | placed(block, at)) for block, at in zip(sent["blocks"], inside, strict=True)]
    head = model.module.get_submodule(model.family.head).weight.device
    places = {"embedding": inside[0], "final_scale": head, "read": head}
    return SimpleNamespace(blocks=blocks, **{name: placed(sent[name], device) for name, device in places.items()})


def _form(model: Model, batch: Batch, nodes: Tensor | None, basis: str) -> dict[str, Any]:
    """What `circuits.constants` must send."""
    rows, columns = (len(batch.token_ids),) if nodes is None else (), batch.width
    scale, output, blocks = Of((*rows, columns)), Of((*rows, columns, model.d_model)), []
    for layer, laid in enumerate(model.plan.layers):
        norms = {laid.attention_in, laid.attention_out, laid.mlp_in, laid.mlp_out} - {None}
        scales = dict.fromkeys(norms, Of((*rows, columns)))
        count = None if nodes is None else int((nodes[:, 0] == layer).sum())
        every = Of((*rows, columns, model.d_mlp))
        factor = every if count is None else Of((count,) if basis == "activation" else (count, model.d_mlp))
        block = {"scales": scales, "pattern": Of((*rows, None, columns, columns)), "output": output, "gate": factor}
        block |= {"up": None if laid.gate is None else factor}
        wide = Of((*rows, columns, None))
        gated = any(kind == "output_gate" for kind, _ in laid.steps)
        block |= {"output_gate": wide if gated or laid.heads_norm else None}
        block |= {"value_factor": wide if laid.value_conv else None}
        blocks.append(block | {"values": every if count is None else Of((count,))})
    read = Of((len(batch.token_ids), columns, model.d_model))
    return {"embedding": output, "final_scale": scale, "read": read, "blocks": blocks}


def reading(
    model: Model, batch: Batch, metric: Metric, *, basis: str = "activation", rules: frozenset[str] = RULES
) -> passes.Gradients:
    """The result of `passes.gradients` with all RelP rules, the half rule or the linear gate among them, without
    autograd: one forward, then matrix products."""
    found, plan = constants(model, batch), model.plan
    unit = head.of(model.nn, plan, rules)
    rows = found.read[metric.row, metric.column]
    with torch.enable_grad():
        leaf = rows.detach().float().requires_grad_(True)
        score = head.weighed(unit, leaf, metric.token, SimpleNamespace(**vars(metric)))
        (slope,) = torch.autograd.grad(score.sum(), [leaf])
    kind, path = plan.final_norm
    grad = torch.zeros(found.embedding.shape, device=slope.device)
    grad.index_put_((metric.row, metric.column), slope, accumulate=True)
    factor = found.final_scale[..., None] * replay.gain(model.module, plan, path).to(slope.device)
    state = replay.scaled(kind, factor, grad, True)
    inside = [block.values if basis == "activation" else block.output for block in found.blocks]
    values = torch.stack([one.float().cpu() for one in inside], 1)
    grads, to_embedding = torch.zeros_like(values), torch.zeros(found.embedding.shape)
    for row, first in enumerate(batch.padding.tolist()):
        back = _down(model.module, plan, replay.unpadded(found, row, first).blocks, state[row, first:], basis, rules)
        grads[row, :, first:], to_embedding[row, first:] = back
        values[row, :, :first] = 0.0
    return passes.Gradients(values, grads, found.embedding.float().cpu(), to_embedding, score.detach().cpu())


def _down(
    module: Any,
    plan: SimpleNamespace,
    blocks: list[SimpleNamespace],
    state: Tensor,
    basis: str,
    rules: frozenset[str],
) -> tuple[Tensor, Tensor]:
    """Gradients to every neuron [layer, pos, neuron] and to the embedding [pos, d_model], on the CPU, from the one to
    the residual stream behind the last block [pos, d_model]."""
    by_layer = []
    for layer, block in reversed(list(enumerate(blocks))):
        laid, state = plan.layers[layer], state.to(block.pattern.device)
        written = replay.out_of_mlp(module, plan, layer, block.scales.get(laid.mlp_out), state, True)
        to_neurons = written @ replay.matrix(module, plan, layer, (laid.down, "all")).float()
        by_layer.append((to_neurons if basis == "activation" else written).cpu())
        read, path = _through_mlp(module, plan, layer, block, to_neurons, rules), laid.mlp_in
        read = replay.through_norm(module, plan, layer, path, block.scales.get(path), read, True)
        state = state + read + _attended(module, plan, layer, block, state if laid.parallel else state + read)
    return torch.stack(by_layer[::-1]), plan.embedding_scale * state.cpu()


def _through_mlp(
    module: Any, plan: SimpleNamespace, layer: int, block: SimpleNamespace, grad: Tensor, rules: frozenset[str]
) -> Tensor:
    """From the neurons' gradient to that of the MLP's input, by rules 3 and 4, or by the linear gate."""
    up = None if block.up is None else block.up.float()
    of_gate, of_up = replay.coefficients(module, plan, layer, block.gate.float(), up, "gate" in rules)
    read = (of_up * grad) @ replay.matrix(module, plan, layer, plan.layers[layer].up_part).float()
    if of_gate is None:
        return read
    return (of_gate * grad) @ replay.matrix(module, plan, layer, plan.layers[layer].gate_part).float() + read


def _attended(module: Any, plan: SimpleNamespace, layer: int, block: SimpleNamespace, state: Tensor) -> Tensor:
    """What flows back through a block's attention [pos, d_model]."""
    value, output = replay.attention(module, plan, layer)
    mixed = replay.mixing(module, plan, layer, block)
    grouped = mixed.pattern.unflatten(0, (-1, output.shape[1] // value.shape[0]))
    heads = replay.gated(state @ output, mixed).unflatten(-1, (*grouped.shape[:2], -1))
    return replay.entered(torch.einsum("gsqk,qgsd->kgd", grouped, heads).flatten(1), mixed, back=True) @ value
