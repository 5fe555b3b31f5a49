"""Is this installation sound: versions, devices, memory, and the identities measured on a model.

Every check is a number beside its bound, computed now; nothing is assumed from a version. Knows method.md section 8.
"""

from __future__ import annotations

import importlib.util
import json
import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from tracer.attribution.attribute import attribute, metric_of, notes, split
from tracer.attribution.edges import direct_edges
from tracer.attribution.trace import trace
from tracer.circuit.circuit import versions
from tracer.errors import TracerError, say
from tracer.model import passes
from tracer.model.model import Model, load, skeleton
from tracer.ndif.probe import connect
from tracer.ndif.server import Notify, Server
from tracer.prompts import Batch, Prompt, encode
from tracer.reports.folded import Folded, folded
from tracer.reports.parts import Facts, Mark, Sheet
from tracer.settings import RULES, settings
from tracer.system import machine
from tracer.text import Rows

PROMPTS = (
    Prompt("The secretaries near the car", target=" are", foil=" is"),
    Prompt("The parents", target=" are", foil=" is"),
)
LARGEST_REQUEST = 10**6
OPTIONAL = {
    "bitsandbytes": "8- and 4-bit weights",
    "gguf": "GGUF files, dequantised",
    "peft": "adapters (LoRA), merged",
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
    shown = {"python": platform.python_version(), **versions()}
    shown["cpu"] = f"{machine.cores()}, torch uses {torch.get_num_threads()} threads"
    shown["memory"] = str(machine.memory()).replace(" of memory", "", 1)
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        shown[f"cuda:{index}"] = f"{about.name}, {free / 2**30:.1f} GiB free of {total / 2**30:.1f} GiB"
    if not torch.cuda.is_available():
        shown["cuda"] = "none: everything runs on the CPU"
    return shown


def optional() -> dict[str, str]:
    """What optional packages would add, and whether they are there."""
    return {
        name: f"{use}: {'yes' if importlib.util.find_spec(name) else 'not installed'}" for name, use in OPTIONAL.items()
    }


def installation(defaults: str) -> Folded:
    """Both for a terminal.

    Args:
        defaults: where the user's defaults of options are.
    """
    here = environment() | {"defaults": defaults}
    return folded([Facts.of(here.items(), "Installation"), Facts.of(optional().items(), "Optional")])


def checks_table(title: str, checks: Sequence[Check]) -> Folded:
    """Checks for a terminal."""
    cells = [(Mark("ok", "good") if one.holds else Mark("FAILED", "bad"), one.name, one.measured) for one in checks]
    return folded([Sheet.of("checks", title, ["<", "<", "<"], cells)])


def rows(here: Folded, checks: Sequence[Check]) -> Rows:
    """What `installation` says, and the checks, for a program; `holds` is empty of what is no check."""
    facts = [part for part in here.parts if isinstance(part, Facts)]
    found: list[dict[str, Any]] = [
        {"part": part.title.lower(), "name": name, "value": value, "holds": None}
        for part in facts
        for name, value in part.rows
    ]
    found += [{"part": "check", "name": one.name, "value": one.measured, "holds": one.holds} for one in checks]
    return Rows.of(found)


def as_json(model: str, here: Folded, checks: Sequence[Check]) -> str:
    """The same as JSON."""
    return json.dumps({"model": model, "rows": rows(here, checks).rows}, indent=1)


def identities(name: str = "demo", adapter: str | None = None, gguf_file: str | None = None) -> list[Check]:
    """Measure the identities on a model.

    Prompts are in English and need one-token " are" and " is"; models without them get token ids instead.

    Raises:
        ModelError: the model does not load.
    """
    return _identities(load(name, adapter=adapter, gguf_file=gguf_file), CHECKS)


def remote(name: str = "demo", host: str | None = None, report: Notify | None = None) -> list[Check]:
    """What a server grants on a model, and the identities measured there, if it takes gradients.

    Raises:
        RemoteError: nothing can be measured, or what was measured says that the server cannot be trusted.
        ModelError: the model's configuration or tokenizer does not load.
    """
    server = Server(host, report=report)
    model, probe = connect(skeleton(name), server)
    grants, there = probe.grants, probe.there
    versions = ", ".join(f"{package} {probe.here[package]} ({there.get(package, 'unknown')})" for package in probe.here)
    small = probe.request < LARGEST_REQUEST
    gradient = (
        f"{probe.derivative:.6g}, finite difference {probe.difference:.6g}" if grants.gradients else grants.reason
    )
    asked = "a circuit with its edges" if grants.gradients else "one forward"
    checks = [
        Check(f"server {probe.host} answers", f"{probe.seconds:.2f} s for {asked}", True),
        Check("the key is accepted", "NDIF_API_KEY or nnsight's" if server.has_key else "none is set or needed", True),
        Check("the model is deployed", f"among {', '.join(probe.deployed)}"[:200], True),
        Check("versions fit, here (there)", versions, True),
        Check("an intervention has an effect", f"{probe.effect:.2g} of the first block's output", True),
        Check("gradients", gradient if grants.gradients else grants.reason, grants.gradients),
        Check("weights are readable", "yes" if grants.weights else "no: hidden", grants.weights),
        Check("activations", str(grants.dtype).removeprefix("torch."), True),
        Check("a request without tensors < 1 MB", f"{probe.request:,} bytes, {probe.result:,} came back", small),
    ]
    return checks + (_identities(model, CHECKS[1:]) if grants.gradients else [])


def _identities(model: Model, checks: Sequence[Callable[[Model, list[Prompt]], Check]]) -> list[Check]:
    with suppress(TracerError):  # a tokenizer that cannot be asked in English has nothing to be said of
        say(notes([encode(Prompt(PROMPTS[0].text), model)], model))
    prompts = [_suited(model, prompt) for prompt in PROMPTS]
    return [_measured(check, model, prompts) for check in checks]


def _measured(check: Callable[[Model, list[Prompt]], Check], model: Model, prompts: list[Prompt]) -> Check:
    """A check; one that the library refuses to answer has failed, and says why."""
    try:
        return check(model, prompts)
    except TracerError as error:
        return Check((check.__doc__ or "").split(".")[0], str(error), False)


def _suited(model: Model, prompt: Prompt) -> Prompt:
    try:
        encode(prompt, model)
    except TracerError:
        length = len(str(prompt.text).split()) + 1
        return Prompt(token_ids=list(range(10, 10 + length)), target=5, foil=6)
    return prompt


def _same_forward(model: Model, prompts: list[Prompt]) -> Check:
    """Linearised forward = the model's own."""
    encoded = [encode(prompt, model) for prompt in prompts]
    parts = split(model, [len(prompt.token_ids) for prompt in encoded], None)
    both = [_forwards(model, Batch(tuple(encoded[i].token_ids for i in part))) for part in parts]
    gap, same = max(_gap(*pair) for pair in both), all(torch.equal(*pair) for pair in both)
    return Check("linearised forward = the model's own, to the bit", f"{gap:.1e}", same)


def _forwards(model: Model, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The linearised model's logits and its own, where there is no padding."""
    with torch.no_grad():
        own = model.module(**passes.inputs(model, batch, batch.width)).logits.float().cpu()
    linear = passes.logits(model, batch, batch.width, rules=RULES)
    real = batch.padded(batch.real(), 1)
    return linear[real], own[real]


def _conserved(model: Model, prompts: list[Prompt]) -> Check:
    """RelP conserves the metric."""
    relative = float(attribute(model, prompts).relative_unexplained().max())
    if not model.conserves:
        return Check("conservation (biases or low precision: reported only)", f"unexplained {relative:.1e}", True)
    return Check("RelP conserves the metric", f"unexplained {relative:.1e}", relative < 1e-4)


def _padding(model: Model, prompts: list[Prompt]) -> Check:
    """A prompt alone = padded in a batch."""
    together = attribute(model, prompts).nodes
    alone = [attribute(model, [prompt]).nodes[0] for prompt in prompts]
    gap = max(_gap(mine, both[:, : mine.shape[1]]) for mine, both in zip(alone, together, strict=True))
    return Check("a prompt alone = padded in a batch", f"{gap:.1e}", gap < 1e-4)


def _repeatable(model: Model, prompts: list[Prompt]) -> Check:
    """Two calls give the same bits."""
    first, second = (attribute(model, prompts).nodes for _ in range(2))
    return Check("two calls give the same bits", f"{_gap(first, second):.1e}", torch.equal(first, second))


def _true_gradient(model: Model, prompts: list[Prompt]) -> Check:
    """Gradient = finite difference.

    Along one direction, by central differences of two steps extrapolated to none: curvature drops out. The larger of
    three base steps are for flat models, the smaller for curved ones; the best of them is the measure.
    """
    encoded = [encode(prompts[0], model)]
    batch = Batch((encoded[0].token_ids,))
    metric = metric_of(encoded, settings(metric="difference"))
    reading = passes.gradients(model, batch, metric)
    direction = torch.randn(reading.embedding.shape, generator=torch.Generator().manual_seed(0))
    unit = float(reading.embedding.norm() / direction.norm())

    def derivative(step: float) -> float:
        ahead, behind = (
            passes.from_embedding(model, batch, metric, reading.embedding + sign * step * unit * direction)
            for sign in (1, -1)
        )
        return float(ahead - behind) / (2 * step * unit)

    expected = float((reading.embedding_gradient * direction).sum())
    extrapolated = [(4 * derivative(step / 2) - derivative(step)) / 3 for step in (1e-2, 3e-3, 1e-3)]
    gap = min(abs(estimate - expected) for estimate in extrapolated) / max(abs(expected), 1e-6)
    return Check("gradient = finite difference", f"{gap:.1e} relative", gap < 0.02)


def _edges_add_up(model: Model, prompts: list[Prompt]) -> Check:
    """Incoming edge weights add up to the logit."""
    circuit = trace(model, prompts[0], nodes=50)
    ids, logits = circuit.token_ids, circuit.rows("logit")
    at = torch.tensor([[row["position"], row["neuron"]] for row in logits])
    edges = direct_edges(model, ids, torch.zeros(0, 3, dtype=torch.long), at)
    gap = _gap(edges.incoming, edges.target_values)
    if model.has_biases:
        return Check("edges into a logit (biases: the difference is reported only)", f"{gap:.1e}", True)
    return Check("incoming edge weights add up to the logit", f"{gap:.1e}", gap < (1e-4 if model.conserves else 0.1))


CHECKS = (_same_forward, _conserved, _padding, _repeatable, _true_gradient, _edges_add_up)


def _gap(value: torch.Tensor, other: torch.Tensor) -> float:
    return float((value - other).abs().max() / other.abs().max().clamp_min(1e-12))
