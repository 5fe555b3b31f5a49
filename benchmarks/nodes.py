"""What a RelP attribution costs over the same computation with bare PyTorch hooks, and what batching ablations gains.

Both sides run in this process, in turn, on one seeded random Llama (8 layers, d_model 512, d_mlp 2048) with one
thread; ratios are medians over pairs. Peak memory is the growth of the process's resident set over the loaded model,
each side in a process of its own.

    python benchmarks/nodes.py [--pairs 30]
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import tracer
from tracer.metrics import Metric
from tracer.model import passes
from tracer.prompts import Batch

TARGET, FOIL, VOCABULARY = 7, 8, 1000


def build() -> tracer.Model:
    """The seeded model, wrapped."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
    )
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
    return tracer.load(LlamaForCausalLM(config), tokenizer=tokenizer)


def ids_of(length: int) -> tuple[int, ...]:
    """A seeded prompt's token ids."""
    generator = torch.Generator().manual_seed(length)
    return tuple(torch.randint(10, VOCABULARY, (length,), generator=generator).tolist())


def prompt_of(length: int) -> tracer.Prompt:
    return tracer.Prompt(token_ids=ids_of(length), target=TARGET, foil=FOIL)


def bare(module: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """RelP with forward hooks alone: nodes, activations, embedding attributions and metric of one prompt."""
    neurons: list[torch.Tensor] = []
    leaf: list[torch.Tensor] = []

    def norm(part: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        x = args[0]
        return part.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + part.variance_epsilon).detach())

    def act(part: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        linear = args[0] * torch.sigmoid(args[0]).detach()
        return 0.5 * linear + (0.5 * linear).detach()

    def half(part: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        return 0.5 * out + (0.5 * out).detach()

    def enter(part: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        leaf.append(out.detach().requires_grad_(True))
        return leaf[0]

    handles = [module.model.embed_tokens.register_forward_hook(enter), module.model.norm.register_forward_hook(norm)]
    for block in module.model.layers:
        handles += [
            block.input_layernorm.register_forward_hook(norm),
            block.post_attention_layernorm.register_forward_hook(norm),
            block.self_attn.q_proj.register_forward_hook(lambda part, args, out: out.detach()),
            block.self_attn.k_proj.register_forward_hook(lambda part, args, out: out.detach()),
            block.mlp.act_fn.register_forward_hook(act),
            block.mlp.up_proj.register_forward_hook(half),
            block.mlp.down_proj.register_forward_pre_hook(lambda part, args: neurons.append(args[0])),
        ]
    try:
        logits = module(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        score = logits[:, -1, TARGET] - logits[:, -1, FOIL]
        slopes = torch.autograd.grad(score.sum(), [leaf[0], *neurons])
        values = torch.stack([one.detach() for one in neurons], 1)
        embeddings = (leaf[0].detach() * slopes[0]).sum(-1)
        return values * torch.stack(slopes[1:], 1), values, embeddings, score.detach()
    finally:
        for handle in handles:
            handle.remove()


def in_turn(one: Callable[[], Any], other: Callable[[], Any], pairs: int) -> tuple[float, float, float]:
    """Median seconds of both, and the median of their ratio pair by pair, after one warm-up."""
    times: list[tuple[float, float]] = []
    for _ in range(pairs + 1):
        started = time.perf_counter()
        one()
        between = time.perf_counter()
        other()
        times.append((between - started, time.perf_counter() - between))
    del times[0]
    return median(a for a, _ in times), median(b for _, b in times), median(a / b for a, b in times)


def peak(run: Callable[[], Any]) -> float:
    """MiB by which the resident set grows while `run` runs (Linux: the kernel's high-water mark, reset first).

    Freed memory goes back to the system before, or what the set-up left behind would hide the growth.
    """
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def exact_rates(model: tracer.Model, ids: tuple[int, ...], count: int) -> tuple[float, float]:
    """Nodes per second of single-node ablation: batched as `method="exact"` does it, and one forward per node."""
    position = torch.arange(count) % len(ids)
    neuron = torch.arange(count) * 7 % model.d_mlp

    def ablate(rows: int) -> float:
        metric = Metric("logit", torch.arange(rows), torch.full((rows,), -1), torch.full((rows,), TARGET),
                        torch.ones(rows), rows)  # fmt: skip
        started = time.perf_counter()
        for part in torch.arange(count).split(rows):
            where = (torch.arange(len(part)), position[part], neuron[part])
            passes.ablated(model, Batch((ids,) * rows), metric, layer=4, where=where, to=torch.zeros(len(part)))
        return count / (time.perf_counter() - started)

    ablate(count)
    return ablate(count), ablate(1)


def measure_peak(side: str, length: int) -> None:
    """Print the peak memory of one side; run in a process of its own."""
    torch.set_num_threads(1)
    model, prompt = build(), prompt_of(length)
    ids = torch.tensor([ids_of(length)])
    short = prompt_of(4)
    tracer.attribute(model, [short])
    bare(model.module, torch.tensor([ids_of(4)]))
    print(peak((lambda: tracer.attribute(model, [prompt])) if side == "tracer" else (lambda: bare(model.module, ids))))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--pairs", type=int, default=30, help="timed pairs per length")
    arguments.add_argument("--peak", nargs=2, metavar=("SIDE", "LENGTH"), help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.peak:
        measure_peak(options.peak[0], int(options.peak[1]))
        return
    torch.set_num_threads(1)
    model = build()
    print("RelP attribution of one prompt, seeded Llama 8 layers d 512 d_mlp 2048, 1 thread")
    print(f"{'tokens':>7}{'tracer ms':>11}{'hooks ms':>10}{'ratio':>7}{'tracer MiB':>12}{'hooks MiB':>11}")
    for length in (16, 64):
        prompt = prompt_of(length)
        ids = torch.tensor([ids_of(length)])
        mine, theirs = tracer.attribute(model, [prompt]).nodes, bare(model.module, ids)[0]
        assert torch.allclose(mine, theirs, atol=1e-5 * float(theirs.abs().max())), "the two sides disagree"
        a, b, ratio = in_turn(
            lambda prompt=prompt: tracer.attribute(model, [prompt]),
            lambda ids=ids: bare(model.module, ids),
            options.pairs,
        )
        sizes = [
            float(subprocess.check_output([sys.executable, __file__, "--peak", side, str(length)], text=True))
            for side in ("tracer", "hooks")
        ]
        print(f"{length:>7}{1e3 * a:>11.1f}{1e3 * b:>10.1f}{ratio:>7.2f}{sizes[0]:>12.1f}{sizes[1]:>11.1f}")
    batched, single = exact_rates(model, ids_of(16), 256)
    print(
        f"exact ablation, 16 tokens: {batched:.0f} nodes/s batched, {single:.0f} one at a time: {batched / single:.1f}x"
    )


if __name__ == "__main__":
    main()
