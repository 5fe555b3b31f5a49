"""What tracing costs on a GPU, on Llama 3.1 8B's shape with random bfloat16 weights; on a CPU, on a float32 toy.

Nothing is downloaded: time and memory do not depend on what the weights are. For prompts of 32 and 256 tokens: seconds
of one RelP attribution of all nodes, of a 1,000-node graph with its edges, and of one plain forward and backward of the
bare module, all in turn in one process; the ratio is the median over pairs. Then prompts per hour at the batch that the
planner chose, and its predicted memory beside the measured peak.

    python benchmarks/gpu.py [--toy] [--pairs 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import nodes as common
import planner as memory_benchmark
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import tracer
from tracer.attribution.trace import trace_all
from tracer.model.sizes import Shape
from tracer.runs.plan.planner import Demand, Plan, plan
from tracer.runs.worker import limit_malloc_retention

LLAMA_8B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": False,
}
TOY: dict[str, Any] = {
    **LLAMA_8B,
    "vocab_size": 4000,
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
LENGTHS = (32, 256)
NODES = 1000
SPAN = 20.0
"""Seconds of batches behind a throughput on a GPU; at least one batch, and one on a CPU."""
MOST_IN_BATCH = {"cuda": 256, "cpu": 4}


@dataclass(frozen=True)
class Row:
    """Figures of one length; seconds are medians, bytes are of the device (of the process on a CPU)."""

    length: int
    plain_seconds: float
    node_seconds: float
    node_ratio: float
    graph_seconds: float
    graph_ratio: float
    batch: int
    prompts_per_hour: float
    graphs_per_hour: float
    peak: int
    predicted: int


def build(settings: dict[str, Any], device: str) -> tracer.Model:
    """The seeded random model, made where it runs: bfloat16 on a GPU, float32 on a CPU, where bfloat16 is slow."""
    torch.manual_seed(0)
    config = LlamaConfig(**settings, bos_token_id=1, eos_token_id=1, pad_token_id=0)
    with torch.device(device):
        module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(config.vocab_size)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
    return tracer.load(module, tokenizer=tokenizer)


def prompts_of(model: tracer.Model, length: int, count: int) -> list[tracer.Prompt]:
    """Prompts of random tokens, seeded."""
    draw = torch.Generator().manual_seed(length)
    ids = torch.randint(10, model.vocab_size, (count, length), generator=draw).tolist()
    return [tracer.Prompt(token_ids=one, target=7, foil=8) for one in ids]


def plain(model: tracer.Model, prompt: tracer.Prompt) -> None:
    """One forward and one backward of the bare module, to the embeddings."""
    ids = torch.tensor([list(prompt.token_ids or ())], device=model.device)
    embedded = model.module.get_input_embeddings()(ids).detach().requires_grad_(True)
    logits = model.module(inputs_embeds=embedded, use_cache=False, logits_to_keep=1).logits
    torch.autograd.grad(logits[:, -1, 7].sum() - logits[:, -1, 8].sum(), embedded)


def waited(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run`, and the device done with it."""

    def both() -> None:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return both


def in_turn(first: Callable[[], Any], *others: Callable[[], Any], pairs: int) -> tuple[list[float], list[float]]:
    """Median seconds of each, and the median of each one's ratio to the first, after one warm-up."""
    rounds = []
    for _ in range(pairs + 1):
        times = []
        for run in (first, *others):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        rounds.append(times)
    columns = list(zip(*rounds[1:], strict=True))
    ratios = [median(a / b for a, b in zip(column, columns[0], strict=True)) for column in columns]
    return [median(column) for column in columns], ratios


def rate(run: Callable[[], int]) -> float:
    """Prompts per hour: `run` does some and says how many, again and again."""
    done, started, span = 0, time.perf_counter(), SPAN if torch.cuda.is_available() else 0.0
    while not done or time.perf_counter() - started < span:
        done += run()
    return done / (time.perf_counter() - started) * 3600


def row(model: tracer.Model, planned: Plan, wanted: Demand, length: int, pairs: int) -> Row:
    """Time, throughput and memory at one length of prompt."""
    (prompt,) = prompts_of(model, length, 1)

    def graphs(prompts: list[tracer.Prompt]) -> int:
        return sum(1 for _ in trace_all(model, prompts, NODES, edges=True, memory=2**60))

    runs = (lambda: plain(model, prompt), lambda: tracer.attribute(model, [prompt]), lambda: graphs([prompt]))
    seconds, ratios = in_turn(*map(waited, runs), pairs=pairs)
    batch = min(next(one.prompts for one in planned.rows if one.length >= length), MOST_IN_BATCH[model.device.type])
    several = prompts_of(model, length, batch)
    on_gpu = model.device.type == "cuda"
    reset(on_gpu)
    graphs(several)
    peak = torch.cuda.max_memory_allocated() if on_gpu else memory_benchmark.status("VmHWM")
    expected = wanted.predict(planned.shape, length, batch, max_bytes=None, cuda=on_gpu)
    return Row(
        length,
        *(seconds[0], seconds[1], ratios[1], seconds[2], ratios[2]),
        batch,
        prompts_per_hour=rate(lambda: len(tracer.attribute(model, several, memory=2**60).metric)),
        graphs_per_hour=rate(lambda: graphs(several)),
        peak=peak,
        # The allocator does not count the context.
        predicted=expected.device - expected.context if on_gpu else expected.peak,
    )


def reset(on_gpu: bool) -> None:
    """Begin a new high-water mark."""
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        common.peak(lambda: None)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--toy", action="store_true", help="a model of CPU size; the default without a GPU")
    arguments.add_argument("--pairs", type=int, default=5, help="timed rounds per length")
    arguments.add_argument("--json", type=Path, help="also write the figures here")
    options = arguments.parse_args()
    on_gpu = torch.cuda.is_available()
    limit_malloc_retention()
    torch.set_num_threads(1)
    model = build(TOY if options.toy or not on_gpu else LLAMA_8B, "cuda" if on_gpu else "cpu")
    gpu = torch.cuda.get_device_properties(0) if on_gpu else None
    place = gpu.name if gpu else f"{platform.processor() or platform.machine()}, 1 thread"
    wanted = Demand(metric="difference", nodes=NODES)
    host = memory_of_host()
    planned = plan(Shape.of_model(model), wanted, LENGTHS, host=host if gpu else 4 * 2**30,
                   device=gpu.total_memory if gpu else None, n_devices=1 if gpu else 0)  # fmt: skip
    print(
        f"Llama of {planned.shape.weight_bytes / 2**30:.2f} GiB of random {model.dtype} weights on {place}; "
        f"{NODES}-node graphs"
    )
    print(f"{'tokens':>7}{'fwd+bwd s':>11}{'nodes s':>9}{'ratio':>7}{'graph s':>9}{'ratio':>7}{'batch':>7}"
          f"{'nodes/h':>10}{'graphs/h':>10}{'peak MiB':>10}{'predicted':>11}")  # fmt: skip
    rows = []
    for length in LENGTHS:
        one = row(model, planned, wanted, length, options.pairs)
        rows.append(one)
        print(f"{one.length:>7}{one.plain_seconds:>11.3f}{one.node_seconds:>9.3f}{one.node_ratio:>7.2f}"
              f"{one.graph_seconds:>9.3f}{one.graph_ratio:>7.2f}{one.batch:>7}{one.prompts_per_hour:>10.0f}"
              f"{one.graphs_per_hour:>10.0f}{one.peak / 2**20:>10.0f}{one.predicted / 2**20:>11.0f}",
              flush=True)  # fmt: skip
    if options.json:
        told = {"device": place, "torch": torch.__version__, "rows": [asdict(one) for one in rows]}
        options.json.write_text(json.dumps(told, indent=1))


def memory_of_host() -> int:
    """Bytes of memory of this machine."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemTotal"))


if __name__ == "__main__":
    main()
