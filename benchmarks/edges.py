"""Seconds and memory of a graph's edges, beside the two ways a plain implementation would take them.

Seeded random Llama (8 layers, d_model 512, d_mlp 2048), one thread, one run, each side in turn in one process:

    tracer   one forward, then the frozen linear replay of all targets together
    (a)      one forward, then one backward per target through the linearised model, MLP outputs cut
    (b)      a forward per pair of layers, with a batched Jacobian of the targets of the one to the neurons of the other

Peak memory is growth of the resident set over the loaded model, each in a process of its own. (b) is timed on some
pairs of layers and scaled to all of them, as its line says.

    python benchmarks/edges.py [--quick] [--large]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import nodes as common
import torch
from torch import Tensor

import tracer
from tracer.attribution.edges import direct_edges
from tracer.attribution.selection import select

SIZES = (100, 400, 800)
LENGTHS = (16, 64)
SAMPLED_PAIRS = 4


def chosen(model: tracer.Model, length: int, count: int) -> tuple[tuple[int, ...], Tensor, Tensor]:
    """Token ids, the strongest nodes of the prompt, and its two target logits."""
    prompt = common.prompt_of(length)
    nodes = select(tracer.attribute(model, [prompt]).nodes[0], 1.0, nodes=count)
    logits = torch.tensor([[length - 1, common.TARGET], [length - 1, common.FOIL]])
    return common.ids_of(length), nodes, logits


@contextmanager
def linearised(module: Any, cut: set[int], neurons: dict[int, Tensor], leaves: dict[int, Tensor]) -> Iterator[None]:
    """RelP by hooks, MLP outputs of the layers in `cut` made leaves; `neurons` receives every layer's, uncut."""

    def norm(part: Any, args: Any, out: Tensor) -> Tensor:
        x = args[0]
        return part.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + part.variance_epsilon).detach())

    def act(part: Any, args: Any, out: Tensor) -> Tensor:
        linear = args[0] * torch.sigmoid(args[0]).detach()
        return 0.5 * linear + (0.5 * linear).detach()

    def watch(layer: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
        def before(part: Any, args: Any) -> None:
            neurons[layer] = args[0]

        def after(part: Any, args: Any, out: Tensor) -> Tensor:
            if layer not in cut:
                return out
            leaves[layer] = out.detach().requires_grad_(True)
            return leaves[layer]

        return before, after

    def enter(part: Any, args: Any, out: Tensor) -> Tensor:
        leaves[-1] = out.detach().requires_grad_(True)
        return leaves[-1]

    handles = [module.model.embed_tokens.register_forward_hook(enter), module.model.norm.register_forward_hook(norm)]
    for layer, block in enumerate(module.model.layers):
        before, after = watch(layer)
        handles += [
            block.input_layernorm.register_forward_hook(norm),
            block.post_attention_layernorm.register_forward_hook(norm),
            block.self_attn.q_proj.register_forward_hook(lambda part, args, out: out.detach()),
            block.self_attn.k_proj.register_forward_hook(lambda part, args, out: out.detach()),
            block.mlp.act_fn.register_forward_hook(act),
            block.mlp.up_proj.register_forward_hook(lambda part, args, out: 0.5 * out + (0.5 * out).detach()),
            block.mlp.down_proj.register_forward_pre_hook(before),
            block.mlp.down_proj.register_forward_hook(after),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def one_backward_each(model: tracer.Model, ids: tuple[int, ...], nodes: Tensor, logits: Tensor) -> Tensor:
    """(a): the weights [target, source] by one backward per target."""
    module, n_layers = model.module, model.n_layers
    neurons: dict[int, Tensor] = {}
    leaves: dict[int, Tensor] = {}
    with linearised(module, set(range(n_layers)), neurons, leaves):
        out = module(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    aims = [(layer, neurons[layer][0, pos, neuron]) for layer, pos, neuron in nodes.tolist()]
    aims += [(n_layers, out[pos, token]) for pos, token in logits.tolist()]
    weight = torch.zeros(len(aims), len(nodes) + len(ids))
    downs = [module.model.layers[layer].mlp.down_proj.weight for layer in range(n_layers)]
    mine = [(nodes[:, 0] == layer).nonzero()[:, 0] for layer in range(n_layers)]
    for row, (top, aim) in enumerate(aims):
        below = [leaves[layer] for layer in range(-1, top)]
        slopes = torch.autograd.grad(aim, below, retain_graph=True, allow_unused=True, materialize_grads=True)
        weight[row, len(nodes) :] = (slopes[0][0] * leaves[-1][0].detach()).sum(-1)
        for layer, slope in enumerate(slopes[1:]):
            _, pos, neuron = nodes[mine[layer]].unbind(-1)
            reached = (slope[0, pos] * downs[layer][:, neuron].T).sum(-1)
            weight[row, mine[layer]] = reached * neurons[layer].detach()[0, pos, neuron]
    return weight


def per_pair_of_layers(model: tracer.Model, ids: tuple[int, ...], nodes: Tensor, sampled: int) -> float:
    """(b): seconds for all pairs of layers, from `sampled` pairs spread over them: for each, a forward with the MLPs
    between cut, and the batched Jacobian of the upper layer's targets to the lower layer's neurons."""
    pairs = [(low, top) for top in range(1, model.n_layers) for low in range(top)]
    spread = [pairs[i * (len(pairs) - 1) // max(1, sampled - 1)] for i in range(sampled)]
    started = time.perf_counter()
    for low, top in spread:
        neurons: dict[int, Tensor] = {}
        leaves: dict[int, Tensor] = {}
        with linearised(model.module, set(range(model.n_layers)) - {low}, neurons, leaves):
            model.module(input_ids=torch.tensor([ids]), use_cache=False, logits_to_keep=1)
        mine = nodes[nodes[:, 0] == top]
        aims = neurons[top][0, mine[:, 1], mine[:, 2]]
        for part in aims.split(64):
            torch.autograd.grad(
                part, neurons[low], torch.eye(len(part)), is_grads_batched=True, retain_graph=True, allow_unused=True
            )
    return (time.perf_counter() - started) * len(pairs) / sampled


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = run()
    return time.perf_counter() - started, result


def measure_peak(side: str, length: int, count: int) -> None:
    """Print the growth of the resident set of one side; run in a process of its own."""
    torch.set_num_threads(1)
    model = common.build()
    ids, nodes, logits = chosen(model, length, count)
    small = chosen(model, 4, 10)
    direct_edges(model, *small)
    one_backward_each(model, *small)
    run = direct_edges if side == "tracer" else one_backward_each
    print(common.peak(lambda: run(model, ids, nodes, logits)))


def peak_of(side: str, length: int, count: int) -> float:
    command = [sys.executable, __file__, "--peak", side, str(length), str(count)]
    return float(subprocess.check_output(command, text=True))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true", help="100 and 400 nodes only")
    arguments.add_argument("--large", action="store_true", help="also 256 tokens and 2,000 nodes, tracer alone")
    arguments.add_argument("--peak", nargs=3, metavar=("SIDE", "LENGTH", "NODES"), help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.peak:
        measure_peak(options.peak[0], int(options.peak[1]), int(options.peak[2]))
        return
    torch.set_num_threads(1)
    model = common.build()
    print("Edges of one prompt, seeded Llama 8 layers d 512 d_mlp 2048, 1 thread; seconds, then MiB over the model")
    print(f"{'tokens':>7}{'nodes':>7}{'tracer s':>10}{'(a) s':>8}{'(b) s':>8}{'(a)/tracer':>12}{'(b)/tracer':>12}"
          f"{'tracer MiB':>12}{'(a) MiB':>9}")  # fmt: skip
    for length in LENGTHS:
        for count in SIZES[:2] if options.quick else SIZES:
            row(model, length, count)
    if options.large:
        ids, nodes, logits = chosen(model, 256, 2000)
        mine, _ = seconds(lambda: direct_edges(model, ids, nodes, logits))
        print(f"{256:>7}{2000:>7}{mine:>10.2f}   tracer alone, {peak_of('tracer', 256, 2000):.1f} MiB")


def row(model: tracer.Model, length: int, count: int) -> None:
    """Print one line: tracer as the best of three, (a) once, (b) from a sample of pairs."""
    ids, nodes, logits = chosen(model, length, count)
    times = [seconds(lambda: direct_edges(model, ids, nodes, logits))]
    a, theirs = seconds(lambda: one_backward_each(model, ids, nodes, logits))
    times += [seconds(lambda: direct_edges(model, ids, nodes, logits)) for _ in range(2)]
    mine = sorted(took for took, _ in times)[1]
    found = times[0][1].weight
    assert (found - theirs).abs().max() < 1e-5 * theirs.abs().max(), "the two sides disagree"
    b = per_pair_of_layers(model, ids, nodes, SAMPLED_PAIRS)
    print(f"{length:>7}{count:>7}{mine:>10.2f}{a:>8.2f}{b:>8.2f}{a / mine:>12.1f}{b / mine:>12.1f}"
          f"{peak_of('tracer', length, count):>12.1f}{peak_of('(a)', length, count):>9.1f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
