"""Models on a server: loading one, and the probe that says what can be trusted there.

A remote model is a `Model` whose weights are elsewhere: the same passes run on it. Before it is used it answers small
questions: is it deployed, do the versions fit, are weights readable and the client's own, does an intervention have
an effect, does a gradient equal its finite difference. What a server grants a key is measured, not assumed.
Refuses to know the protocol (ndif/server.py) and what a trace does (model/passes.py).
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tracer import demo
from tracer.attribution import request
from tracer.attribution.selection import Selection
from tracer.choices import AttentionKernel, Dtype, Spread, Wire
from tracer.errors import ModelError, RemoteError, option, quoted
from tracer.model import interventions, passes
from tracer.model.model import DTYPES, HASH, QUANTIZED, Model, skeleton
from tracer.model.model import load as load_here
from tracer.model.state import undisturbed
from tracer.ndif.server import UNKNOWN, Grants, JobFailedError, Limits, Notify, Remote, Server
from tracer.prompts import Batch, Encoded
from tracer.settings import settings
from tracer.text import printable

COMPARED = {"nnsight": 2, "transformers": 1, "torch": 1}
"""How many leading numbers of each package's version must be the same here and there."""
WIRES = get_args(Wire)
STEPS = {torch.float32: 0.03, torch.float64: 0.03}
COARSE = 0.25
"""Of the finite difference, relative to the embedding; by the activations' dtype, coarse where rounding would show."""
TOKENS = 4
MAX_BYTES = 2**24
"""Bytes of gradients that the probe's edges may hold there."""


@dataclass(frozen=True)
class Probe:
    """What was measured of a model on a server.

    Attributes:
        host, deployment: where.
        deployed: every repository that the server serves.
        here, there: versions of the packages that matter; `there` is empty if the server does not say.
        grants: what the key may do.
        effect: how far the intervention moved the first block's output, relative to it.
        derivative, difference: the gradient and the finite difference; the gradient is NaN where it could not be taken.
        logits_gap: between the server's logits and the client's, relative; None without weights on the client.
        request, result: bytes of a typical request (a circuit of 200 nodes with its edges; all nodes' values where no
            gradients are granted), and of what came back. seconds: that it took.
    """

    host: str
    deployment: str
    deployed: tuple[str, ...]
    here: dict[str, str]
    there: dict[str, str]
    grants: Grants
    effect: float
    derivative: float
    difference: float
    logits_gap: float | None
    request: int
    result: int
    seconds: float


@undisturbed()
def load(
    name: str | Path | nn.Module = "demo",
    *,
    remote: bool = False,
    host: str | None = None,
    weights: Literal["local"] | str | None = None,
    wire: Wire | str | None = None,
    limits: Limits | None = None,
    report: Notify | None = None,
    device: str | None = None,
    dtype: Dtype | str | torch.dtype | None = None,
    revision: str | None = None,
    device_map: Spread | str | dict[str, Any] | None = None,
    attention: AttentionKernel | str | None = None,
    adapter: str | Path | None = None,
    gguf_file: str | None = None,
    tokenizer: Any = None,
    seed: int = 0,
) -> Model:
    """Load a model to trace, here or on an NDIF server.

    Args:
        name: ``demo``, a folder in Hugging Face format (always a path if it is a `Path`), a GGUF file or a folder with
            one and no other weights, a Hugging Face id, or a module already in memory (which needs `tokenizer`, is put
            in evaluation mode and frozen, and otherwise kept as it is; never remote). Of a model that also takes images
            or sound the text part is loaded.
        remote: run it on a server: no weights are loaded here, its configuration and tokenizer are. The key is
            ``NDIF_API_KEY``, or nnsight's own.
        host: the server's address; ``NDIF_HOST``, or nnsight's own.
        weights: ``local`` loads the weights here as well: for edges, and for RelP where the server takes no gradients.
        wire: ``bfloat16`` halves what comes back; nodes are then right to about 1 in 250. By default they come as they
            are there, in float32.
        limits: of waiting and sending; the defaults if None.
        report: called with each change of a remote job's state, as a line.
        device: ``cpu``, ``cuda``, ``cuda:1``..., or ``mps``, ``xpu`` where there is one; a GPU if there is one.
        dtype: ``float32``, the default (attributions are noisy in less), ``bfloat16``, ``float16``, ``float64``, by
            name or torch's own, or ``int8``, ``nf4``, ``fp4`` with bitsandbytes.
        revision: of a Hugging Face id.
        device_map: ``auto`` spreads the model over several GPUs (also ``balanced``, ``balanced_low_0``,
            ``sequential``, a device, or a dict of module to device); instead of `device`.
        attention: ``eager`` or ``sdpa``; the architecture's default if None. Attributions do not depend on it.
        adapter: the folder or Hugging Face id of an adapter (LoRA and its kin) that peft merges into the weights; one
            that lies beside the weights is merged without being asked for, and said.
        gguf_file: the GGUF file of the folder or Hugging Face id that holds weights, configuration and tokenizer; the
            weights are dequantised to `dtype` (with the package gguf). Its tokenizer puts no special token first.
        tokenizer: of a module in memory: a Hugging Face tokenizer, or the folder or id of one.
        seed: torch's, set before loading.

    Of a remote model without local weights only `revision` and `attention` have an effect, and `dtype` must be the
    server's; an adapter or a GGUF file is never remote.

    Returns:
        The model, in evaluation mode; nothing changes it afterwards.

    Raises:
        ModelError: nothing there, not reachable, an architecture with a part that no rule covers, weights missing,
            without a place or not finite, an option that cannot be, an adapter that cannot be merged, or too little
            memory.
        RemoteError: the server cannot be reached, refuses the key, does not serve the model, or fails the probe.
    """
    here: dict[str, Any] = {"device": device, "device_map": device_map, "tokenizer": tokenizer}
    if not remote:
        _refuse("a model that runs here", host=host, weights=weights, wire=wire, limits=limits, report=report)
        here |= {"attention": attention, "adapter": adapter, "gguf_file": gguf_file}
        return load_here(name, dtype=dtype, revision=revision, seed=seed, **here)
    if isinstance(name, nn.Module) or adapter is not None or gguf_file is not None:
        raise _never_remote(name, adapter, gguf_file)
    if weights not in (None, "local"):
        raise ModelError(f"weights={quoted(weights)}", "must be 'local', or left out", "leave it out")
    if wire not in (None, *WIRES):
        raise ModelError(f"wire={quoted(wire)}", f"must be one of {', '.join(WIRES)}", "leave it out")
    if limits is not None and not isinstance(limits, Limits):
        raise ModelError(f"limits={quoted(limits)}", "must be a tracer.Limits", "leave them out for the defaults")
    if isinstance(dtype, str) and dtype not in (*DTYPES, *QUANTIZED):
        raise ModelError(f"dtype={dtype!r}", f"must be one of {', '.join((*DTYPES, *QUANTIZED))}", "choose one")
    if weights is None:
        _refuse("a remote model without local weights", **here, seed=seed or None)
    client = skeleton(name, revision=revision, attention=attention)
    server = Server(host, limits, report)
    local = {**here, "dtype": dtype, "seed": seed} if weights else None
    return connect(client, server, local, dtype, DTYPES[wire or "float32"])[0]


def _never_remote(name: Any, adapter: str | Path | None, gguf_file: str | None) -> ModelError:
    """The error where an adapter, a GGUF file, or a module in memory, is asked for on a server."""
    if adapter is not None:
        rule = "cannot be merged into weights on a server"
        return ModelError(option("adapter", str(adapter)), rule, "leave it out, or trace here, without remote")
    if gguf_file is not None:
        rule = "is dequantised here, which no server does"
        return ModelError(option("gguf_file", gguf_file), rule, "leave it out, or trace here, without remote")
    return ModelError(f"module {type(name).__name__}", "is in memory; no server has it", "give the model's name")


def _refuse(what: str, **options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise ModelError(f"{name}={quoted(value)}", f"has no effect on {what}", "leave it out")


def connect(
    client: Model,
    server: Server,
    local: dict[str, Any] | None = None,
    dtype: str | torch.dtype | None = None,
    transfer_dtype: torch.dtype = torch.float32,
) -> tuple[Model, Probe]:
    """A model on a server, probed.

    Args:
        client: from `skeleton`.
        local: options of `tracer.model.load`, where weights are wanted here as well.
        dtype: that the server must have, if any.
        transfer_dtype: in which values and gradients of all nodes come back.

    Raises:
        RemoteError: as `load`.
    """
    deployments, there, here = server.status(), server.environment(), _versions()
    deployment = _deployment(client, server, deployments)
    _check_versions(server, here, there)
    unknown = Grants(True, "", False, "", client.dtype, False)
    environment = client.nn._remoteable_get_env()
    backend = Remote(server, deployment, environment, unknown, transfer_dtype, interventions.Guard)
    asked = replace(client, backend=backend, lock=nullcontext())
    measured = _Measured(asked, server)
    grants = measured.grants()
    if dtype is not None and str(dtype).removeprefix("torch.") != str(grants.dtype).removeprefix("torch."):
        rule = f"the server runs {client.name!r} in {str(grants.dtype).removeprefix('torch.')}"
        raise RemoteError(f"dtype={dtype}", rule, "leave it out")
    backend = replace(backend, grants=grants)
    model, gap = replace(asked, backend=backend), None
    if local is not None:
        model, gap = _with_weights(model, backend, measured, local)
    probe = Probe(
        host=server.host,
        deployment=deployment,
        deployed=tuple(sorted({str(deployed.get("repo_id")) for deployed in deployments.values()})),
        here=here,
        there=there,
        grants=grants,
        effect=measured.effect,
        derivative=measured.derivative,
        difference=measured.difference,
        logits_gap=gap,
        request=measured.request,
        result=measured.result,
        seconds=measured.seconds,
    )
    return model, probe


def _deployment(client: Model, server: Server, deployments: dict[str, dict[str, Any]]) -> str:
    """The server's own key of the model."""
    names = {name.casefold() for name in _spellings(client.name)}
    wanted = client.revision or "main"
    mine = {
        key: deployed
        for key, deployed in deployments.items()
        if str(deployed.get("repo_id")).casefold() in names and deployed.get("task") in (None, "text-generation")
    }
    for key, deployed in mine.items():
        if (deployed.get("revision") or "main") == wanted:
            return key
    if mine:
        revisions = sorted({printable(str(deployed.get("revision") or "main"), 60) for deployed in mine.values()})
        rule = f"is not deployed on {server.host}; there it is {', '.join(revisions[:8])}"
        raise RemoteError(f"revision {quoted(wanted)} of {quoted(client.name)}", rule, "use that revision")
    known = sorted({str(deployed.get("repo_id")) for deployed in deployments.values()})
    listed = ", ".join(printable(one, 100) for one in known[:8]) + (
        f" and {len(known) - 8} more" if len(known) > 8 else ""
    )
    raise RemoteError(
        f"model {quoted(client.name)}",
        f"is not deployed on {server.host}; deployed: {listed or 'nothing'}",
        "choose one of those, or ask the server's operator for it",
    )


def _spellings(name: str) -> Iterator[str]:
    """How a server may call a model: by its id as the hub spells it, or by its folder."""
    yield name
    if name == "demo":
        yield str(demo.path())
    if os.path.isdir(name):
        yield os.path.realpath(name)


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in COMPARED} | {"python": platform.python_version()}


def _check_versions(server: Server, here: dict[str, str], there: dict[str, str]) -> None:
    for name, parts in COMPARED.items():
        ours, theirs = here[name].split(".")[:parts], there.get(name, here[name]).split(".")[:parts]
        if ours != theirs:
            pinned = f"pip install '{name}=={'.'.join(theirs)}.*'"
            raise RemoteError(
                f"{name} {here[name]} here, {there[name]} on {server.host}",
                "what they compute may differ",
                "tell its operator" if there[name] == UNKNOWN else pinned,
            )


class _Measured:
    """The probe's numbers of one model.

    Raises:
        RemoteError: an intervention without effect, a gradient that is not the finite difference, or a mixture of
            experts whose weights are hidden there.
    """

    def __init__(self, model: Model, server: Server) -> None:
        self.ids = tuple(range(1, 1 + min(TOKENS, model.vocab_size - 1)))
        draw = torch.Generator().manual_seed(0)
        shape = len(self.ids), model.d_model
        direction, projection = (torch.randn(shape, generator=draw) for _ in range(2))
        self.server, self.model = server, model
        steps = [sign * step for size in (0.03, COARSE) for step in (size, size / 2) for sign in (1, -1)]
        read, self.logits, unit, dtype, self.weights = passes.probe(
            model, self.ids, (0.0, *steps), direction, projection
        )
        if model.mixtures and not all(self.weights[:2]):
            rule = f"computes neurons of experts from weights that are not readable on {server.host}"
            step = "load it here, without remote, or ask its operator for the tag 'trusted'"
            raise RemoteError(f"model {quoted(model.name)}", rule, step)
        self.dtype = DTYPES.get(dtype.removeprefix("torch."), torch.float32)
        self.difference, self.effect = self._difference(read, unit)
        self.derivative, self.reason = self._gradient(direction, projection)
        before, started = replace(server.traffic), time.perf_counter()
        self._typical()
        self.seconds = time.perf_counter() - started
        self.request, self.result = server.traffic.sent - before.sent, server.traffic.received - before.received

    def _typical(self) -> None:
        """Send a typical request: a circuit with its edges, or, without gradients, all values."""
        if self.reason:
            passes.values(self.model, Batch((self.ids,)))
            return
        prompt = Encoded(self.ids, self.ids[:1], (), None, (len(self.ids) - 1,), "", None)
        request.ask(self.model, [prompt], request.Request(settings(metric="logit"), Selection.of(), edges=True), None)

    def grants(self) -> Grants:
        readable, floating, weights_hash = self.weights
        if readable and not HASH.fullmatch(weights_hash):
            raise self._untrusted("sent no hash of its weights")
        name = f"{self.model.name} {self.model.revision or ''}".strip()
        fingerprint = weights_hash if readable else f"weights of {name} are not readable on {self.server.host}"
        gradients = not self.reason
        return Grants(gradients, self.reason, readable, fingerprint, self.dtype, not floating)

    def _difference(self, read: Tensor, unit: float) -> tuple[float, float]:
        """The derivative by differences of two steps, extrapolated to step 0; and the intervention's effect."""
        step = STEPS.get(self.dtype, COARSE)
        rows = read.double()[1:5] if self.dtype in STEPS else read.double()[5:]
        ahead, behind, near, far = rows.tolist()
        wide, narrow = (ahead - behind) / (2 * step * unit), (near - far) / (step * unit)
        moved = max(abs(value - float(read[0])) for value in (ahead, behind))
        scale = max(abs(float(read[0])), 1e-6)
        if not moved or bool((self.logits[1:] == self.logits[0]).all()):
            raise self._untrusted("ignored an intervention: the embedding was changed, what follows it was not")
        return (4 * narrow - wide) / 3, moved / scale

    def _gradient(self, direction: Tensor, projection: Tensor) -> tuple[float, str]:
        """The derivative by gradient, or NaN and the reason why it was refused."""
        try:
            derivative = passes.probe_gradient(self.model, self.ids, direction, projection)
        except JobFailedError as error:
            return float("nan"), error.rule
        allowed = 0.02 if self.dtype in STEPS else 0.15
        if not abs(derivative - self.difference) <= allowed * max(abs(self.difference), 1e-6):
            raise self._untrusted(
                f"took a gradient of {derivative:.6g} where the finite difference is {self.difference:.6g}"
            )
        return derivative, ""

    def _untrusted(self, rule: str) -> RemoteError:
        return RemoteError(f"server {self.server.host}", rule, "its numbers cannot be trusted: tell its operator")


def _with_weights(model: Model, backend: Remote, measured: _Measured, options: dict[str, Any]) -> tuple[Model, float]:
    """The remote model with its weights here as well, which must be the same; and how far their logits differ."""
    dtype = model.dtype if options["dtype"] is None else options["dtype"]
    attention = model.nn._remoteable_get_env()["attn_implementation"]
    local = load_here(model.name, **{**options, "dtype": dtype}, revision=model.revision, attention=attention)
    if backend.grants.weights and local.fingerprint != model.fingerprint:
        raise _other_weights(model, backend.host, "by a hash of a sample")
    own = passes.logits(local, Batch((measured.ids,)))[0, -1]
    gap = float((measured.logits[0] - own).abs().max() / own.abs().max().clamp_min(1e-12))
    if not gap < (1e-3 if local.dtype in STEPS else 0.1):
        raise _other_weights(model, backend.host, f"by their logits, which differ by {gap:.2g} of the largest")
    # Hidden weights that give the same logits are taken to be the local ones.
    known = replace(backend, grants=replace(backend.grants, fingerprint=local.fingerprint))
    return replace(local, backend=known, lock=nullcontext()), gap


def _other_weights(model: Model, host: str, how: str) -> RemoteError:
    return RemoteError(
        f"model {quoted(model.name)}", f"its weights on {host} are not the ones here ({how})", "check the revision"
    )
