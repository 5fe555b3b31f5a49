"""What `trace.py --peers` prints: the same numbers as tracer's by plain PyTorch hooks, and what they take there.

    hooks   RelP attributions of all nodes: one forward, one backward
    (a)     edges: one forward, then one backward per target through the linearised model, MLP outputs cut
    (b)     edges: a forward per pair of layers, with a batched Jacobian of the targets of the one to the neurons of
            the other; timed on some pairs and scaled to all
    single  exact ablation: one forward per node

The two sides must agree before they are timed. Of tracer's edges the time is what they add to a trace of nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import common
import torch
from torch import Tensor

import tracer

LENGTHS = (16, 64)
SIZES = (100, 400, 800)
SAMPLED_PAIRS = 4
ABLATED = common.SHAPES["llama"] | {"num_hidden_layers": 2, "intermediate_size": 32}
"""Few neurons: tracer ablates every one."""


def norm(part: Any, args: Any, out: Tensor) -> Tensor:
    """RMS norm, its statistic frozen."""
    x = args[0]
    return part.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + part.variance_epsilon).detach())


def activation(part: Any, args: Any, out: Tensor) -> Tensor:
    """SiLU by its secant, half of it frozen."""
    return half(part, args, args[0] * torch.sigmoid(args[0]).detach())


def half(part: Any, args: Any, out: Tensor) -> Tensor:
    """Half of the gradient."""
    return 0.5 * out + (0.5 * out).detach()


@contextmanager
def linearised(module: Any, cut: set[int], neurons: dict[int, Tensor], leaves: dict[int, Tensor]) -> Iterator[None]:
    """RelP by hooks. MLP outputs of the layers in `cut` are made leaves, and so is the embedding, as layer -1;
    `neurons` receives every layer's, uncut."""

    def watch(layer: int) -> Callable[..., None]:
        def before(part: Any, args: Any) -> None:
            neurons[layer] = args[0]

        return before

    def leaf(layer: int) -> Callable[..., Tensor]:
        def after(part: Any, args: Any, out: Tensor) -> Tensor:
            leaves[layer] = out.detach().requires_grad_(True)
            return leaves[layer]

        return after

    handles = [module.model.embed_tokens.register_forward_hook(leaf(-1)), module.model.norm.register_forward_hook(norm)]
    for layer, block in enumerate(module.model.layers):
        handles += [
            block.input_layernorm.register_forward_hook(norm),
            block.post_attention_layernorm.register_forward_hook(norm),
            block.self_attn.q_proj.register_forward_hook(lambda part, args, out: out.detach()),
            block.self_attn.k_proj.register_forward_hook(lambda part, args, out: out.detach()),
            block.mlp.act_fn.register_forward_hook(activation),
            block.mlp.up_proj.register_forward_hook(half),
            block.mlp.down_proj.register_forward_pre_hook(watch(layer)),
        ]
        handles += [block.mlp.down_proj.register_forward_hook(leaf(layer))] if layer in cut else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def by_hooks(module: Any, ids: Tensor, target: int, foil: int) -> Tensor:
    """RelP attributions of every node of the prompts `ids` [prompt, pos] as [prompt, layer, pos, neuron]."""
    neurons: dict[int, Tensor] = {}
    leaves: dict[int, Tensor] = {}
    with linearised(module, set(), neurons, leaves):
        logits = module(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        score = logits[:, -1, target] - logits[:, -1, foil]
        slopes = torch.autograd.grad(score.sum(), [leaves[-1], *neurons.values()])
    return torch.stack([one.detach() for one in neurons.values()], 1) * torch.stack(slopes[1:], 1)


def one_backward_each(module: Any, ids: Tensor, nodes: Tensor, logits: Tensor) -> Tensor:
    """(a): the weights [target, source] by one backward per target.

    Args:
        ids: of the prompt [1, pos].
        nodes: rows of (layer, position, neuron); they are sources and, before the logits, targets. Embeddings by
            position are sources too, after the nodes.
        logits: rows of (position, token).
    """
    neurons: dict[int, Tensor] = {}
    leaves: dict[int, Tensor] = {}
    blocks = module.model.layers
    with linearised(module, set(range(len(blocks))), neurons, leaves):
        out = module(input_ids=ids, use_cache=False).logits[0]
    aims = [(layer, neurons[layer][0, pos, neuron]) for layer, pos, neuron in nodes.tolist()]
    aims += [(len(blocks), out[pos, token]) for pos, token in logits.tolist()]
    weight = torch.zeros(len(aims), len(nodes) + ids.shape[1])
    mine = [(nodes[:, 0] == layer).nonzero()[:, 0] for layer in range(len(blocks))]
    for row, (top, aim) in enumerate(aims):
        below = [leaves[layer] for layer in range(-1, top)]
        slopes = torch.autograd.grad(aim, below, retain_graph=True, allow_unused=True, materialize_grads=True)
        weight[row, len(nodes) :] = (slopes[0][0] * leaves[-1][0].detach()).sum(-1)
        for layer, slope in enumerate(slopes[1:]):
            _, pos, neuron = nodes[mine[layer]].unbind(-1)
            reached = (slope[0, pos] * blocks[layer].mlp.down_proj.weight[:, neuron].T).sum(-1)
            weight[row, mine[layer]] = reached * neurons[layer].detach()[0, pos, neuron]
    return weight


def per_pair_of_layers(module: Any, ids: Tensor, nodes: Tensor, sampled: int) -> float:
    """(b): seconds for all pairs of layers, from `sampled` pairs spread over them: for each, a forward with the MLPs
    between cut, and the batched Jacobian of the upper layer's targets to the lower layer's neurons."""
    n_layers = len(module.model.layers)
    pairs = [(low, top) for top in range(1, n_layers) for low in range(top)]
    spread = [pairs[i * (len(pairs) - 1) // max(1, sampled - 1)] for i in range(sampled)]
    started = common.clock.read()
    for low, top in spread:
        neurons: dict[int, Tensor] = {}
        with linearised(module, set(range(n_layers)) - {low}, neurons, {}):
            module(input_ids=ids, use_cache=False, logits_to_keep=1)
        mine = nodes[nodes[:, 0] == top]
        aims = neurons[top][0, mine[:, 1], mine[:, 2]]
        for part in aims.split(64):
            torch.autograd.grad(
                part, neurons[low], torch.eye(len(part)), is_grads_batched=True, retain_graph=True, allow_unused=True
            )
    return (common.clock.read() - started) * len(pairs) / sampled


def zeroed(module: Any, ids: Tensor, layer: int, position: int, neuron: int) -> float:
    """The logit difference of one prompt with one neuron set to 0: one forward."""

    def zero(part: Any, args: Any) -> tuple[Tensor]:
        changed = args[0].clone()
        changed[0, position, neuron] = 0
        return (changed,)

    handle = module.model.layers[layer].mlp.down_proj.register_forward_pre_hook(zero)
    try:
        with torch.no_grad():
            logits = module(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1]
        return float(logits[common.TARGET] - logits[common.FOIL])
    finally:
        handle.remove()


# tracer beside them.


def agree(mine: Tensor, theirs: Tensor) -> None:
    """Raise where the two sides differ by more than rounding."""
    assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max(), "the two sides disagree"


def graph(model: tracer.Model, prompt: tracer.Prompt, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """tracer's edges unpruned: nodes [node, 3], logits [logit, 2] and weights [target, source], in the order of (a)."""
    circuit = tracer.trace(model, prompt, count, edges=True, pruning=tracer.Pruning(share=0.0))
    assert circuit.links is not None
    kinds = circuit.nodes["kind"].to_pylist()
    place = torch.tensor([circuit.nodes[name].to_pylist() for name in ("layer", "position", "neuron")]).T
    n_nodes, n_logits = kinds.count("neuron"), kinds.count("logit")
    weight = torch.zeros(len(kinds), len(kinds))
    source, target = (torch.tensor(circuit.links[name].to_pylist()) for name in ("source", "target"))
    weight[target, source] = torch.tensor(circuit.links["weight"].to_pylist(), dtype=torch.float32)
    targets = [i for i, kind in enumerate(kinds) if kind != "embedding"]
    return place[:n_nodes], place[len(kinds) - n_logits :, 1:], weight[targets, : len(kinds) - n_logits]


def compare_nodes(model: tracer.Model, pairs: int, limit: float) -> None:
    """All nodes' attributions beside hooks."""
    print(f"\n{'tokens':>7}{'attribute s':>13}{'hooks s':>9}{'ratio':>7}")
    for length in LENGTHS:
        (prompt,) = common.random_prompts(model, length, 1)
        ids = torch.tensor([prompt.token_ids])
        agree(tracer.attribute(model, [prompt]).nodes, by_hooks(model.module, ids, common.TARGET, common.FOIL))
        mine, theirs, ratio = common.in_turn(
            lambda prompt=prompt: tracer.attribute(model, [prompt]),
            lambda ids=ids: by_hooks(model.module, ids, common.TARGET, common.FOIL),
            pairs,
            limit,
        )
        print(f"{length:>7}{mine:>13.4f}{theirs:>9.4f}{ratio:>7.2f}", flush=True)


def compare_edges(model: tracer.Model, pairs: int, limit: float) -> None:
    """What edges add to a trace beside (a) and (b)."""
    print(f"\n{'tokens':>7}{'nodes':>7}{'edges s':>9}{'(a) s':>8}{'(b) s':>8}{'(a)/edges':>11}{'(b)/edges':>11}")
    for length in LENGTHS:
        (prompt,) = common.random_prompts(model, length, 1)
        ids = torch.tensor([prompt.token_ids])
        for count in SIZES:
            nodes, logits, weight = graph(model, prompt, count)
            agree(weight, one_backward_each(model.module, ids, nodes, logits))
            both, alone, _ = common.in_turn(
                lambda prompt=prompt, count=count: tracer.trace(model, prompt, count, edges=True),
                lambda prompt=prompt, count=count: tracer.trace(model, prompt, count, edges=False),
                pairs,
                limit,
            )
            a = common.seconds_of(
                lambda ids=ids, nodes=nodes, logits=logits: one_backward_each(model.module, ids, nodes, logits)
            )
            b, mine = per_pair_of_layers(model.module, ids, nodes, SAMPLED_PAIRS), both - alone
            print(f"{length:>7}{count:>7}{mine:>9.2f}{a:>8.2f}{b:>8.2f}{a / mine:>11.1f}{b / mine:>11.1f}", flush=True)


def compare_ablations() -> None:
    """Nodes a second of the method exact, batched, beside one forward each."""
    model = common.random_model(ABLATED)
    (prompt,) = common.random_prompts(model, 16, 1)
    ids, count = torch.tensor([prompt.token_ids]), 16 * model.d_mlp
    whole = float(tracer.attribute(model, [prompt]).metric[0])
    each = torch.cartesian_prod(torch.arange(16), torch.arange(model.d_mlp)).tolist()
    started = common.clock.read()
    found = tracer.attribute(model, [prompt], "exact").nodes[0]
    batched = found.numel() / (common.clock.read() - started)
    started = common.clock.read()
    effects = torch.tensor([whole - zeroed(model.module, ids, 0, *place) for place in each])
    single = count / (common.clock.read() - started)
    # A difference of two logits, each rounded.
    assert (found[0].flatten() - effects).abs().max() <= 1e-5 * max(1.0, abs(whole)), "the two sides disagree"
    print(f"\nexact ablation, 2 layers, 16 tokens: {batched:.0f} nodes/s batched, {single:.0f} one at a time: "
          f"{batched / single:.1f}x")  # fmt: skip


def compare(pairs: int, limit: float) -> None:
    """Print all three comparisons, on the seeded Llama."""
    model = common.random_model(common.SHAPES["llama"])
    compare_nodes(model, pairs, limit)
    compare_edges(model, pairs, limit)
    compare_ablations()
