"""The result of an attribution, and its arithmetic on plain tensors: no nnsight, no model, no files.

Knows that attribution is (value - baseline) times a gradient, what the controls are, and when what is unexplained
proves a number wrong (method.md sections 2 and 8). Where values and gradients come from is not known here.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tracer.errors import ModelError
from tracer.settings import Settings
from tracer.shapes import Nodes, PerPrompt, PerToken
from tracer.system.display import Shown

# Above this share of the summed |embedding attributions|, a conserved quantity was not conserved.
CONSERVATION_TOLERANCE = 1e-3


@dataclass(frozen=True, repr=False)
class Attribution(Shown):
    """Every node of every prompt. Positions are token indices: a shorter prompt has zeros after its end.

    `nodes`, `activations` are float32 [prompt, layer, position, neuron], `embeddings` [prompt, position], `metric` and
    `unexplained` [prompt]; attributions in the metric's units.

    Attributes:
        nodes: attribution in metric units, signed.
        activations: the nodes' values, in the chosen basis.
        embeddings: attribution of each token's embedding, in metric units.
        metric: of each prompt.
        unexplained: ``metric - embeddings.sum(-1)``: what the embeddings leave over. It vanishes for RelP with
            all rules, a logit metric and a bias-free model; it is not small for the controls delta and random.
        token_ids: of each prompt, without padding.
        target_ids, foil_ids: of each prompt, resolved.
        settings: how it was computed.
        start_metric: the metric at the start of a path method's path (zero embeddings, or the counterfactual), which
            its embedding attributions do not account for; None for other methods.
        gradients: of the metric at each node, by which its distance from its baseline was multiplied: the mean over a
            path's steps, and of the linearised model for ``exact``, ``delta`` and ``random``. baselines: of each node.
            Both are kept for `tracer.trace` alone; no baselines where all are zero.
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
    gradients: Nodes | None = None
    baselines: Nodes | None = None

    @property
    def unexplained(self) -> PerPrompt:
        """What conservation leaves over, per prompt, in metric units."""
        return self.metric - self.embeddings.sum(-1)

    @property
    def residual(self) -> PerPrompt:
        """The old name of `unexplained`, for this version alone: a *residual* is the model's residual stream."""
        warnings.warn("Attribution.residual is now Attribution.unexplained", DeprecationWarning, stacklevel=2)
        return self.unexplained

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each prompt."""
        return tuple(len(ids) for ids in self.token_ids)

    def to_pandas(self, top: int | None = 1000) -> Any:
        """The strongest nodes of each prompt as a pandas DataFrame: `prompt`, `layer`, `position`, `neuron`,
        `attribution` (metric units), `activation`; by prompt, largest ``|attribution|`` first.

        Args:
            top: nodes of each prompt; all of them if None, which are many.
        """
        import pandas

        frames = []
        for number, (signed, length) in enumerate(zip(self.nodes, self.lengths, strict=True)):
            own = signed[:, :length]
            order = own.abs().flatten().sort(descending=True, stable=True).indices[:top].cpu()
            layer, position, neuron = np.unravel_index(order.numpy(), tuple(own.shape))
            columns = {"prompt": number, "layer": layer, "position": position, "neuron": neuron}
            for name, values in (("attribution", own), ("activation", self.activations[number, :, :length])):
                columns[name] = values.flatten().cpu()[order].numpy()
            frames.append(pandas.DataFrame(columns))
        return pandas.concat(frames, ignore_index=True)

    def relative_unexplained(self) -> PerPrompt:
        """``|unexplained|`` as a share of the summed absolute embedding attributions."""
        return relative_unexplained(self.metric, self.embeddings)

    def check_finite(self) -> None:
        """Refuse a result with a NaN or an infinity in it.

        Raises:
            ModelError: which prompt, and what to do.
        """
        check_finite(
            {
                "metric": self.metric,
                "embedding attribution": self.embeddings,
                "attribution": self.nodes,
                "value": self.activations,
            }
        )


def relative_unexplained(metric: PerPrompt, embeddings: PerToken) -> PerPrompt:
    """What conservation leaves over, as a share of the summed absolute embedding attributions."""
    scale = embeddings.abs().sum(-1)
    return (metric - embeddings.sum(-1)).abs() / scale.clamp_min(torch.finfo(scale.dtype).tiny)


def check_finite(named: Mapping[str, Tensor]) -> None:
    """Refuse tensors, prompts first, with a NaN or an infinity in them.

    Raises:
        ModelError: which prompt, and what to do.
    """
    for name, tensor in named.items():
        if bool(tensor.sum().isfinite()):  # a NaN or an infinity would show in the sum, at a tenth of the cost
            continue
        bad = ~tensor.isfinite().reshape(len(tensor), -1).all(-1)
        if bad.any():
            raise ModelError(
                f"prompt {int(bad.nonzero()[0])}",
                f"its {name} is not finite",
                "load the model with dtype='float32', or check its weights",
            )


def check_conservation(metric: PerPrompt, embeddings: PerToken) -> None:
    """Refuse a result that breaks conservation (method.md section 8, identity 2).

    Args:
        metric: of each prompt. embeddings: attribution of each token's, zeros after a prompt's end.

    Raises:
        ModelError: `unexplained` is above a thousandth of the summed absolute embedding attributions.
    """
    relative = relative_unexplained(metric, embeddings)
    worst = int(relative.argmax())
    if float(relative[worst]) > CONSERVATION_TOLERANCE:
        raise ModelError(
            f"prompt {worst}: conservation off by {float((metric - embeddings.sum(-1))[worst]):.3g} "
            f"(metric {float(metric[worst]):.3g})",
            f"RelP on a bias-free float32 model must stay within {CONSERVATION_TOLERANCE:g} of the summed "
            "|embedding attributions|",
            "these attributions are wrong: run 'tracer doctor' and report the model",
        )


def noise(token_ids: Sequence[int], shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal control attributions that depend on the prompt and the seed, not on the batch."""
    key = zlib.crc32(repr((seed, tuple(token_ids))).encode())
    return torch.randn(shape, generator=torch.Generator().manual_seed(key))


def noises(token_ids: Sequence[Sequence[int]], shape: Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
    """`noise` of a padded batch: of nodes, in the shape [prompt, layer, column, neuron], and of embeddings."""
    nodes, embeddings = torch.zeros(*shape), torch.zeros(shape[0], shape[2])
    for row, ids in enumerate(token_ids):
        first = shape[2] - len(ids)
        drawn = noise(ids, (shape[1] + 1, len(ids), shape[3]), seed)
        nodes[row, :, first:], embeddings[row, first:] = drawn[:-1], drawn[-1, :, 0]
    return nodes, embeddings
