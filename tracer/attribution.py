"""The result of an attribution, and its arithmetic on plain tensors: no nnsight, no model, no files.

Knows that attribution is (value - baseline) times a gradient, what the controls are, and when a residual proves
a number wrong (method.md sections 2 and 8). Where values and gradients come from is not known here.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tracer.config import Settings
from tracer.errors import ModelError
from tracer.shapes import Nodes, PerPrompt, PerToken

# Above this share of the summed |embedding attributions|, a conserved quantity was not conserved.
CONSERVATION_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Attribution:
    """Every node of every prompt. Positions are token indices: a shorter prompt has zeros after its end.

    Attributes:
        nodes: attribution in metric units, signed.
        activations: the nodes' values, in the chosen basis.
        embeddings: attribution of each token's embedding, in metric units.
        metric: of each prompt.
        residual: ``metric - embeddings.sum(-1)``: what the method leaves unexplained. It vanishes for RelP with
            all rules, a logit metric and a bias-free model; it is not small for the controls delta and random.
        token_ids: of each prompt, without padding.
        target_ids, foil_ids: of each prompt, resolved.
        settings: how it was computed.
        start_metric: the metric at the start of a path method's path (zero embeddings, or the counterfactual), which
            its embedding attributions do not account for; None for other methods.
    """

    nodes: Nodes
    activations: Nodes
    embeddings: PerToken
    metric: PerPrompt
    token_ids: tuple[tuple[int, ...], ...]
    target_ids: tuple[tuple[int, ...], ...]
    foil_ids: tuple[tuple[int, ...], ...]
    settings: Settings
    start_metric: PerPrompt | None = None

    @property
    def residual(self) -> PerPrompt:
        """What conservation leaves over, per prompt, in metric units."""
        return self.metric - self.embeddings.sum(-1)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each prompt."""
        return tuple(len(ids) for ids in self.token_ids)

    def relative_residual(self) -> PerPrompt:
        """``|residual|`` as a share of the summed absolute embedding attributions."""
        scale = self.embeddings.abs().sum(-1)
        return self.residual.abs() / scale.clamp_min(torch.finfo(scale.dtype).tiny)


def check_finite(result: Attribution) -> None:
    """Refuse a result with a NaN or an infinity in it.

    Raises:
        ModelError: which prompt, and what to do.
    """
    tensors = {
        "metric": result.metric,
        "embedding attribution": result.embeddings,
        "attribution": result.nodes,
        "value": result.activations,
    }
    for name, tensor in tensors.items():
        if bool(tensor.sum().isfinite()):  # a NaN or an infinity would show in the sum, at a tenth of the cost
            continue
        bad = ~tensor.isfinite().reshape(len(result.metric), -1).all(-1)
        if bad.any():
            raise ModelError(
                f"prompt {int(bad.nonzero()[0])}",
                f"its {name} is not finite",
                "load the model with dtype='float32', or check its weights",
            )


def check_conservation(result: Attribution) -> None:
    """Refuse a result that breaks conservation (method.md section 8, identity 2).

    Raises:
        ModelError: the residual is above a thousandth of the summed absolute embedding attributions.
    """
    relative = result.relative_residual()
    worst = int(relative.argmax())
    if float(relative[worst]) > CONSERVATION_TOLERANCE:
        raise ModelError(
            f"prompt {worst}: conservation off by {float(result.residual[worst]):.3g} "
            f"(metric {float(result.metric[worst]):.3g})",
            f"RelP on a bias-free float32 model must stay within {CONSERVATION_TOLERANCE:g} of the summed "
            "|embedding attributions|",
            "these attributions are wrong: run 'tracer doctor' and report the model",
        )


def noise(token_ids: Sequence[int], shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal control attributions that depend on the prompt and the seed, not on the batch."""
    key = zlib.crc32(repr((seed, tuple(token_ids))).encode())
    return torch.randn(shape, generator=torch.Generator().manual_seed(key))
