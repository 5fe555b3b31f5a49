"""The planner's prediction beside the measured peak memory of a worker, on seeded random models.

Every measurement is a process of its own: it does what a worker does (`limit_malloc_retention`, load, trace a short
prompt, then one batch) and reads the kernel's high-water mark of its resident set. "grown" is that over what it held
before the batch, the part that depends on the prompts.

    python benchmarks/planner.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import common
import torch

import tracer
from tracer.attribution.trace import trace_all
from tracer.model.sizes import Shape
from tracer.runs.plan.memory import Memory, Workload, predict
from tracer.runs.worker import limit_malloc_retention
from tracer.settings import DEFAULT_STEPS, PATH_METHODS

MODELS: dict[str, dict[str, Any]] = {
    "llama-34M": {
        "model_type": "llama",
        "vocab_size": 1000,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    },
    "llama-300M": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "max_position_embeddings": 2048,
    },
    "gpt2-124M": {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
    },
    "gemma2-27M": {
        "model_type": "gemma2",
        "vocab_size": 8000,
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 2048,
    },
    "qwen3_moe-88M": {
        "model_type": "qwen3_moe",
        "vocab_size": 1000,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "moe_intermediate_size": 256,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 2048,
    },
    "llama-tiny": {
        "model_type": "llama",
        "vocab_size": 500,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
    "llama-1M": {
        "model_type": "llama",
        "vocab_size": 500,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
}


@dataclass(frozen=True)
class Case:
    """One measurement: a model, how it is loaded, and one batch of prompts of random tokens.

    `what`: ``trace`` their circuits, with the attributions of all nodes beside them (``whole``, as for a dataset's
    circuit), or ``attribute`` all nodes and nothing else.
    """

    model: str
    method: str = "relp"
    length: int = 64
    batch: int = 1
    edges: bool = False
    nodes: int = 200
    attention: str | None = None
    dtype: str = "float32"
    basis: str = "activation"
    baseline: str = "zero"
    shortest: int | None = None
    budget: int | None = None
    metric: str = "difference"
    what: str = "trace"

    def workload(self) -> Workload:
        """As the planner is asked about it."""
        return Workload(
            method=self.method,
            basis=self.basis,
            baseline=self.baseline,
            nodes=self.nodes,
            edges=self.edges,
            metric=self.metric,
            whole=self.what == "whole",
            circuits=self.what != "attribute",
        )

    def label(self) -> str:
        """The case in one line."""
        extra = [f"edges {self.nodes}"] if self.edges else []
        extra += [
            value for value in (self.attention, self.basis, self.baseline) if value not in (None, "activation", "zero")
        ]
        extra += [value for value in (self.dtype, self.metric) if value not in ("float32", "difference")]
        extra += [self.what] if self.what != "trace" else []
        extra += [f"from {self.shortest}"] if self.shortest else []
        return f"{self.model:<11}{self.method:<12}{self.length:>5} x {self.batch:<3}{' '.join(extra)}"


@dataclass(frozen=True)
class Measured:
    """Bytes: the peak, what was held before the batch, and what was predicted for the same process."""

    peak: int
    before: int
    predicted: Memory

    @property
    def error(self) -> float:
        """Of the predicted peak, as a share of the measured one."""
        return self.predicted.peak / self.peak - 1

    @property
    def grown(self) -> int:
        return self.peak - self.before

    @property
    def predicted_growth(self) -> int:
        return self.predicted.peak - self.predicted.runtime - self.predicted.weights

    @property
    def growth_error(self) -> float:
        """Of the growth alone, as a share of the measured one."""
        return self.predicted_growth / self.grown - 1


# Sizes where the parts that depend on prompts are large, and the corners: short, padded, other dtypes and kernels.
GRID = (
    *(Case("llama-34M", method, 1024, 1) for method in ("relp", "grad", "ig", "conductance", "delta", "random")),
    *(Case("llama-34M", method, 128, 8) for method in ("relp", "grad", "ig")),
    Case("llama-34M", "ig-activation", 64, 8),
    *(Case("llama-34M", "relp", length, 16) for length in (8, 32, 128)),
    Case("llama-34M", "relp", 1024, 1, attention="eager"),
    Case("llama-34M", "grad", 512, 2, attention="eager"),
    Case("llama-34M", "relp", 256, 8, shortest=128),
    Case("llama-34M", "relp", 256, 8, shortest=128, attention="eager"),
    Case("llama-34M", "relp", 256, 8, basis="output"),
    Case("llama-34M", "relp", 256, 4, dtype="bfloat16"),
    Case("llama-34M", "grad", 256, 4, dtype="bfloat16"),
    Case("llama-34M", "relp", 256, 4, baseline="mean"),
    Case("llama-34M", "relp", 256, 4, baseline="counterfactual"),
    *(Case("llama-34M", "relp", 256, 4, what=what) for what in ("whole", "attribute")),
    Case("llama-34M", "ig", 256, 4, what="attribute"),
    *(
        Case("llama-34M", "relp", 256, batch, edges=True, nodes=nodes)
        for batch, nodes in ((1, 200), (1, 2000), (8, 1000))
    ),
    Case("llama-34M", "relp", 1024, 1, edges=True, nodes=1000),
    Case("llama-34M", "relp", 512, 1, edges=True, nodes=1000, attention="eager"),
    Case("llama-34M", "relp", 128, 1, edges=True, nodes=500, basis="output"),
    Case("llama-300M", "relp", 8, 16, edges=True),
    Case("llama-300M", "relp", 256, 4, edges=True),
    Case("llama-300M", "relp", 1024, 1, edges=True, nodes=1000),
    Case("llama-300M", "ig", 256, 2),
    Case("llama-300M", "relp", 512, 1, edges=True, nodes=500, dtype="bfloat16"),
    Case("gpt2-124M", "relp", 8, 1, edges=True),
    Case("gpt2-124M", "relp", 256, 8, edges=True),
    Case("gpt2-124M", "grad", 256, 4),
    Case("gpt2-124M", "relp", 16, 64),
    Case("gpt2-124M", "relp", 16, 16, metric="logprob"),
    Case("gpt2-124M", "ig", 512, 1),
    Case("gpt2-124M", "relp", 1024, 1, edges=True, nodes=1000),
    Case("gpt2-124M", "delta", 1024, 2),
    Case("gemma2-27M", "relp", 1024, 1),
    Case("gemma2-27M", "grad", 512, 2),
    Case("gemma2-27M", "ig", 256, 4, edges=True),
    Case("gemma2-27M", "relp", 512, 1, edges=True, nodes=1000),
    *(Case("qwen3_moe-88M", method, 512, 1) for method in ("relp", "grad")),
    Case("qwen3_moe-88M", "relp", 128, 8),
    Case("qwen3_moe-88M", "relp", 256, 1, edges=True, nodes=1000),
    Case("qwen3_moe-88M", "relp", 128, 2, what="whole"),
    Case("llama-tiny", "exact", 16, 2, budget=2**28),
    Case("llama-tiny", "exact", 32, 1, edges=True, budget=2**28),
    Case("llama-tiny", "exact", 64, 1, budget=2**27),
    Case("llama-1M", "relp", 1024, 16, edges=True),
)
QUICK = (
    GRID[0],
    GRID[2],
    GRID[8],
    Case("llama-34M", "relp", 256, 8, shortest=128),
    Case("llama-34M", "relp", 256, 1, edges=True, nodes=2000),
    Case("gemma2-27M", "grad", 512, 2),
    Case("qwen3_moe-88M", "relp", 256, 4),
    Case("llama-tiny", "exact", 32, 1, edges=True, budget=2**28),
)


def measure(case: Case) -> Measured:
    """Run one case in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--case", json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{case.label()}: {done.stderr[-2000:]}")
    told = json.loads(done.stdout.splitlines()[-1])
    return Measured(told["peak"], told["before"], Memory(**told["predicted"]))


def run_case(case: Case) -> None:
    """Print one case's figures; run in a process of its own."""
    limit_malloc_retention()
    torch.set_num_threads(1)
    options = {} if case.attention is None else {"attn_implementation": case.attention}
    model = common.random_model(MODELS[case.model], dtype=getattr(torch, case.dtype), **options)

    def prompt(length: int, seed: int) -> tracer.Prompt:
        draw = torch.Generator().manual_seed(1000 * length + seed)
        ids, other = torch.randint(10, model.vocab_size, (2, length), generator=draw).tolist()
        paired = {"counterfactual": other} if case.baseline == "counterfactual" else {}
        foil = 8 if case.metric == "difference" else None
        return tracer.Prompt(token_ids=ids, target=7, foil=foil, **paired)

    def traced(prompts: list[tracer.Prompt], nodes: int, memory: int) -> None:
        how: dict[str, Any] = {"baseline": case.baseline, "basis": case.basis, "metric": case.metric, "memory": memory}
        how["steps"] = 2 if case.method in PATH_METHODS else DEFAULT_STEPS
        if case.what == "attribute":
            tracer.attribute(model, prompts, case.method, **how)
            return
        every: list[Any] = []  # kept until the batch is done, as a worker does
        how["whole"] = every.append if case.what == "whole" else None
        for _ in trace_all(model, prompts, nodes=nodes, method=case.method, edges=case.edges, **how):
            pass

    lengths = [case.length] * case.batch
    if case.shortest:
        lengths = [case.shortest + (case.length - case.shortest) * i // (case.batch - 1) for i in range(case.batch)]
    traced([prompt(4, 0), prompt(4, 1)], 4, 2**26)
    before = common.begin_peak()
    traced([prompt(length, i) for i, length in enumerate(lengths)], case.nodes, case.budget or 2**50)
    padded = case.shortest is not None
    predicted = predict(
        Shape.of_model(model), case.workload(), case.length, case.batch, padded=padded, max_bytes=case.budget
    )
    print(json.dumps({"peak": common.status("VmHWM"), "before": before, "predicted": asdict(predicted)}))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true", help="the slow test's cases only")
    arguments.add_argument("--json", type=Path, help="also write the figures here")
    arguments.add_argument("--case", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.case:
        run_case(Case(**json.loads(options.case)))
        return
    print("Peak of a worker and its growth over the loaded model, MiB, predicted beside measured; one thread")
    print(f"{'':<52}{'peak':>7}{'pred.':>7}{'error':>7}{'grown':>8}{'pred.':>7}{'error':>7}  phase")
    rows = []
    for case in QUICK if options.quick else GRID:
        found = measure(case)
        rows.append((case, found))
        print(f"{case.label():<52}{found.peak / 2**20:>7.0f}{found.predicted.peak / 2**20:>7.0f}{found.error:>+7.0%}"
              f"{found.grown / 2**20:>8.0f}{found.predicted_growth / 2**20:>7.0f}{found.growth_error:>+7.0%}"
              f"  {found.predicted.phase}", flush=True)  # fmt: skip
    for name in ("error", "growth_error"):
        errors = sorted(abs(getattr(found, name)) for _, found in rows)
        print(f"|{name.replace('_', ' ')}|: median {median(errors):.0%}, largest {errors[-1]:.0%} of {len(errors)}")
    if options.json:
        told = [{**asdict(case), "peak": one.peak, "before": one.before, **asdict(one.predicted)} for case, one in rows]
        options.json.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
