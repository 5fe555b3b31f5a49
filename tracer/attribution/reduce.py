"""Circuits' parts from the attributions of all nodes, where these are here already: those of ``exact``, and those of a
server that cannot be asked for circuits. Knows the same reduction as attribution/circuits.py, for one prompt at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tracer.attribution.circuits import SAID, unsaid
from tracer.attribution.request import TOP, Request, SelectedNodes, metric_of, read, terms_of
from tracer.attribution.result import Attribution
from tracer.attribution.selection import Selection, strongest
from tracer.metrics import logit_summary
from tracer.model import passes
from tracer.model.model import Model
from tracer.prompts import Batch, Encoded


def from_attributions(
    model: Model, encoded: Sequence[Encoded], result: Attribution, request: Request
) -> Iterator[SelectedNodes]:
    """Selected nodes of each prompt, from the attributions of all nodes. One forward each, for the logits."""
    for row, prompt in enumerate(encoded):
        yield _selected(model, replace(prompt, target_ids=result.target_ids[row]), result, row, request)


def nodes_of(result: Attribution, row: int, selection: Selection) -> SimpleNamespace:
    """One prompt's strongest nodes; see `selection.strongest`."""
    nodes, metric = result.nodes[row, :, : result.lengths[row]], result.metric[row : row + 1]
    return strongest(lambda layer: nodes[layer][None], [None] * len(nodes), [0], metric, selection.plain())


def _selected(model: Model, encoded: Encoded, result: Attribution, row: int, request: Request) -> SelectedNodes:
    length, found = len(encoded.token_ids), nodes_of(result, row, request.selection)
    at = found.nodes[0].unbind(-1)

    def of_nodes(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[row, :, :length][at]

    answer: dict[str, Any] = {
        "nodes": found.nodes[0],
        "attributions": found.attributions[0],
        "activations": of_nodes(result.activations),
        "gradients": of_nodes(result.gradients),
        "baselines": of_nodes(result.baselines),
        "largest": float(found.largest[0]),
        "total": float(found.total[0]),
        "embeddings": result.embeddings[row, :length],
        "metric": float(result.metric[row]),
        "start": None if result.start_metric is None else float(result.start_metric[row]),
        "whole": result.nodes[row, :, :length] if request.whole else None,
        **_said(model, encoded, request),
    }
    return read(model, encoded, answer, request.settings)


def _said(model: Model, encoded: Encoded, request: Request) -> dict[str, Tensor]:
    """What a circuit keeps of the logits. One forward."""
    length, terms = len(encoded.token_ids), terms_of(encoded, request.settings)
    at = torch.tensor([(place - length, token) for place, token, _ in terms])
    logits = passes.logits(model, Batch((encoded.token_ids,)), length - min(encoded.positions))[0]
    said: dict[str, Tensor] = dict(
        zip(SAID, logit_summary(logits, at, max(encoded.positions) - length, TOP), strict=True)
    )
    if request.settings.of is not None:  # whose values are no logits
        batch, alone = Batch((encoded.token_ids,)), metric_of([encoded], request.settings)
        said |= unsaid(passes.terms(model, batch, alone))
    return said
