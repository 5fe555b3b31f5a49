"""Is this installation sound: versions, devices, memory, and the identities measured on a model.

Every check is a number beside its bound, computed now; nothing is assumed from a version. Knows method.md section 8.
"""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass

import psutil
import torch

from tracer import passes, tracing
from tracer.circuit import versions
from tracer.config import RULES
from tracer.errors import TracerError
from tracer.model import Model, load
from tracer.prompts import Batch, Prompt, encode

PROMPTS = (
    Prompt("The secretaries near the car", target=" are", foil=" is"),
    Prompt("The parents", target=" are", foil=" is"),
)
OPTIONAL = {
    "bitsandbytes": "8- and 4-bit weights",
    "ray": "runs over several GPUs or hosts",
    "duckdb": "SQL on tables",
}


@dataclass(frozen=True)
class Check:
    """One identity: what was measured, and whether it is within its bound."""

    name: str
    measured: str
    holds: bool


def environment() -> dict[str, str]:
    """Versions, devices and memory of this machine."""
    found = {"python": platform.python_version(), **versions()}
    memory = psutil.virtual_memory()
    found["cpu"] = f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    found["memory"] = f"{memory.available / 2**30:.1f} GiB free of {memory.total / 2**30:.1f} GiB"
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found[f"cuda:{index}"] = f"{about.name}, {free / 2**30:.1f} GiB free of {total / 2**30:.1f} GiB"
    if not torch.cuda.is_available():
        found["cuda"] = "none: everything runs on the CPU"
    return found


def optional() -> dict[str, str]:
    """What optional packages would add, and whether they are there."""
    return {
        name: f"{use}: {'yes' if importlib.util.find_spec(name) else 'not installed'}" for name, use in OPTIONAL.items()
    }


def identities(name: str = "demo") -> list[Check]:
    """Measure the identities on a model; a model that does not load is a failed check.

    Prompts are in English and need one-token " are" and " is"; models without them get token ids instead.
    """
    try:
        model = load(name)
    except TracerError as error:
        return [Check("model loads", str(error), False)]
    prompts = [_suited(model, prompt) for prompt in PROMPTS]
    return [
        _same_forward(model, prompts),
        _conserved(model, prompts),
        _padding(model, prompts),
        _repeatable(model, prompts),
        _true_gradient(model, prompts[0]),
    ]


def _suited(model: Model, prompt: Prompt) -> Prompt:
    try:
        encode(prompt, model)
    except TracerError:
        length = len(str(prompt.text).split()) + 1
        return Prompt(token_ids=list(range(10, 10 + length)), target=5, foil=6)
    return prompt


def _same_forward(model: Model, prompts: list[Prompt]) -> Check:
    encoded = [encode(prompt, model) for prompt in prompts]
    batch = Batch(tuple(prompt.token_ids for prompt in encoded))
    metric = tracing.metric_of(encoded, tracing.settings(metric="difference"))
    plain = passes.gradients(model, batch, metric).metric
    linear = passes.gradients(model, batch, metric, rules=RULES).metric
    return Check("linearised forward = original, to the bit", f"{_gap(plain, linear):.1e}", torch.equal(plain, linear))


def _conserved(model: Model, prompts: list[Prompt]) -> Check:
    result = tracing.attribute(model, prompts)
    relative = float(result.relative_residual().max())
    if not model.conserves:
        return Check("conservation (biases or low precision: reported only)", f"residual {relative:.1e}", True)
    return Check("RelP conserves the metric", f"residual {relative:.1e}", relative < 1e-4)


def _padding(model: Model, prompts: list[Prompt]) -> Check:
    together = tracing.attribute(model, prompts).nodes
    alone = [tracing.attribute(model, [prompt]).nodes[0] for prompt in prompts]
    gap = max(_gap(mine, both[:, : mine.shape[1]]) for mine, both in zip(alone, together, strict=True))
    return Check("a prompt alone = padded in a batch", f"{gap:.1e}", gap < 1e-4)


def _repeatable(model: Model, prompts: list[Prompt]) -> Check:
    first, second = (tracing.attribute(model, prompts).nodes for _ in range(2))
    return Check("two calls give the same bits", f"{_gap(first, second):.1e}", torch.equal(first, second))


def _true_gradient(model: Model, prompt: Prompt) -> Check:
    """The plain gradient of the embedding against a central finite difference along one direction."""
    encoded = [encode(prompt, model)]
    batch = Batch((encoded[0].token_ids,))
    metric = tracing.metric_of(encoded, tracing.settings(metric="difference"))
    reading = passes.gradients(model, batch, metric)
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(reading.embedding.shape, generator=generator)
    step = 1e-2 * float(reading.embedding.norm() / direction.norm())
    ahead, behind = (
        passes.from_embedding(model, batch, metric, reading.embedding + sign * step * direction) for sign in (1, -1)
    )
    measured, expected = (ahead - behind) / (2 * step), (reading.embedding_gradient * direction).sum()
    gap = float((measured - expected).abs() / expected.abs().clamp_min(1e-6))
    return Check("gradient = finite difference", f"{gap:.1e} relative", gap < 0.02)


def _gap(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-12))
