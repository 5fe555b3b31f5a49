"""What several benchmarks share: seeded random models and prompts, time in turn, and peak memory.

Nothing is downloaded: time and memory do not depend on what the weights are.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import tracer

TARGET, FOIL = 7, 8
"""Token ids that random prompts ask about."""
BARE = "forward + backward"
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "vocab_size": 1000,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 2048,
    },
    # Of Gemma 3 270M.
    "gemma": {
        "model_type": "gemma3_text",
        "vocab_size": 262144,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 512,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    # Of Llama 3.1 8B.
    "8b": {
        "model_type": "llama",
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
    },
    "toy": {
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    },
}


class Clock:
    """Seconds of the wall or, on a machine that others use too, of this process on a CPU."""

    def __init__(self) -> None:
        self.read: Callable[[], float] = time.perf_counter

    def count_cpu(self) -> None:
        self.read = time.process_time


clock = Clock()


def random_model(
    shape: dict[str, Any], *, device: str = "cpu", dtype: torch.dtype = torch.float32, **options: Any
) -> tracer.Model:
    """A seeded random model with a tokenizer of made-up words, made where it runs.

    Args:
        shape: the fields of its config, `model_type` among them.
        options: of `from_config`.
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model(**shape, bos_token_id=1, eos_token_id=1, pad_token_id=0)
    with torch.device(device):
        module = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(config.vocab_size)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
    return tracer.load(module, tokenizer=tokenizer)


def random_prompts(model: tracer.Model, length: int, count: int) -> list[tracer.Prompt]:
    """Prompts of seeded random tokens, all with the same target and foil."""
    draw = torch.Generator().manual_seed(length)
    ids = torch.randint(10, model.vocab_size, (count, length), generator=draw).tolist()
    return [tracer.Prompt(token_ids=one, target=TARGET, foil=FOIL) for one in ids]


def bare(model: tracer.Model, prompts: Sequence[tracer.Prompt], nodes: int) -> None:
    """One forward and one backward of the bare module, of the first prompt, to its embeddings."""
    ids = torch.tensor([list(prompts[0].token_ids or ())], device=model.device)
    embedded = model.module.get_input_embeddings()(ids).detach().requires_grad_(True)
    logits = model.module(inputs_embeds=embedded, use_cache=False, logits_to_keep=1).logits
    torch.autograd.grad(logits[:, -1, TARGET].sum() - logits[:, -1, FOIL].sum(), embedded)


def seconds_of(run: Callable[[], Any]) -> float:
    """How long `run` takes, the device done with it."""
    started = clock.read()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock.read() - started


def in_turn(one: Callable[[], Any], other: Callable[[], Any], pairs: int, limit: float) -> tuple[float, float, float]:
    """Median seconds of both, and the median of the ratio of `one` to `other` pair by pair, after one warm-up.

    Args:
        pairs: at most; no more are begun after `limit` seconds. Where the warm-up alone takes as long, it counts.
    """
    times: list[tuple[float, float]] = []
    started = time.perf_counter()
    while len(times) <= pairs and (not times or time.perf_counter() - started < limit):
        times.append((seconds_of(one), seconds_of(other)))
    timed = times[1:] or times
    return median(a for a, _ in timed), median(b for _, b in timed), median(a / b for a, b in timed)


def status(name: str) -> int:
    """A line of the kernel's account of this process, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def begin_peak() -> int:
    """Begin a new high-water mark of the resident set, and say what is held now, in bytes (Linux).

    Freed memory goes back to the system before, or what the set-up left behind would hide the growth.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def grown(run: Callable[[], Any], device: str = "cpu") -> int:
    """Bytes by which memory grows while `run` runs: the device's, or the resident set of this process."""
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    before = begin_peak()
    run()
    return status("VmHWM") - before
