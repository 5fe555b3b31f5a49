"""One forward and one backward give a whole circuit; a batch's prompts are those each is alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny as t
import tracer
from helpers import load
from tracer.attribution.selection import Selection, strongest
from tracer.attribution.trace import trace_all
from tracer.model import interventions
from tracer.prompts import Prompt

ASKED = Prompt(token_ids=[1, 20, 30, 40, 50, 21], target=7, foil=9)
PAIRED = Prompt(token_ids=[1, 20, 30, 40, 50, 21], target=7, foil=9, counterfactual=[1, 20, 31, 40, 50, 21])
OPEN = Prompt(token_ids=[1, 20, 30, 40, 50, 21])
CALLS: dict[str, tuple[Prompt, dict[str, Any], int]] = {
    "nodes": (ASKED, {"edges": False}, 1),
    "nodes and edges": (ASKED, {}, 1),
    "the model's own token": (OPEN, {}, 1),
    "its five likeliest": (OPEN, {"metric": "topk"}, 1),
    "a counterfactual": (PAIRED, {}, 2),
    "grad and its edges": (ASKED, {"method": "grad"}, 1),
    "noise and its edges": (ASKED, {"method": "random"}, 1),
    "ig": (ASKED, {"method": "ig", "steps": 3}, 2 + 3),
    "edges by autograd": (ASKED, {"rules": ["norm", "attention"]}, 2),
}


@pytest.mark.parametrize("call", CALLS)
def test_how_often_the_blocks_are_walked(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, how, wanted = CALLS[call]
    runs, walk = [], interventions.walk
    monkeypatch.setattr(interventions, "walk", lambda *given, **more: runs.append(1) or walk(*given, **more))
    tracer.trace(load("llama"), prompt, nodes=10, **how)
    assert len(runs) == wanted


@pytest.mark.parametrize("how", [{}, {"basis": "output"}, {"baseline": "counterfactual"}, {"metric": "logprob"}])
@pytest.mark.parametrize("family", t.FAMILIES)
def test_a_batch_is_its_prompts_alone(family: str, how: dict[str, Any]) -> None:
    """Attributed and replayed together, each with its own selection, targets, edges and predictions."""
    model, draw = load(family), torch.Generator().manual_seed(1)
    prompts = []
    for length in (3, 7, 5, 7):
        ids = [1, *torch.randint(t.FIRST, t.VOCAB, (length - 1,), generator=draw).tolist()]
        other = [*ids[:-1], t.FIRST + (ids[-1] - t.FIRST + 1) % (t.VOCAB - t.FIRST)]
        paired = other if how.get("baseline") == "counterfactual" else None
        prompts.append(Prompt(token_ids=ids, counterfactual=paired, target=length))
    how = {"nodes": 25, "pruning": tracer.Pruning(share=0.0), **how}
    if how.get("metric") == "logprob":
        how.pop("pruning")
    for one, prompt in zip(trace_all(model, prompts, **how), prompts, strict=True):
        alone = tracer.trace(model, prompt, **how)
        for name in ("layer", "position", "neuron"):
            assert one.nodes[name].to_pylist() == alone.nodes[name].to_pylist()
        for name in ("activation", "attribution"):
            mine, theirs = (torch.tensor([x or 0.0 for x in c.nodes[name].to_pylist()]) for c in (one, alone))
            assert float((mine - theirs).abs().max()) < 1e-5 * max(1.0, float(theirs.abs().max()))
        assert one.ranks == alone.ranks
        assert [p.token_id for p in one.predictions] == [p.token_id for p in alone.predictions]
        if one.links is not None and alone.links is not None:
            weights = [
                {(row["source"], row["target"]): row["weight"] for row in links.to_pylist()}
                for links in (one.links, alone.links)
            ]
            large = max(map(abs, weights[1].values()))
            for edge in weights[0].keys() | weights[1].keys():
                assert abs(weights[0].get(edge, 0.0) - weights[1].get(edge, 0.0)) < 1e-4 * large


def by_sorting(signed: torch.Tensor, first: int, metric: float, rules: Selection) -> list[list[int]]:
    """The rules of method.md section 5, on all nodes sorted."""
    strength = signed[:, first:].abs().clone()
    if rules.skip_first:
        strength[:, 0] = 0
    for layer, neuron in rules.exclude:
        strength[layer, :, neuron] = 0
    values, order = strength.flatten().sort(descending=True, stable=True)
    keep = int((values > 0).sum())
    if rules.threshold is not None:
        keep = min(keep, int((values >= rules.threshold * abs(metric)).sum()))
    if rules.mass is not None:
        share = values.double().cumsum(0) / values.double().sum().clamp_min(1e-300)
        keep = min(keep, int((share < rules.mass).sum()) + 1)
    keep = min(keep, rules.limit or keep)
    return torch.stack(torch.unravel_index(order[:keep], strength.shape), -1).tolist()


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(
    "rules",
    [
        Selection(7),
        Selection(40, skip_first=True, exclude=((0, 1), (2, 3))),
        Selection(None, threshold=0.4),
        Selection(None, mass=0.6),
        Selection(None, mass=1.0),
        Selection(12, threshold=0.1, mass=0.7, skip_first=True),
        Selection(10**6),
    ],
)
def test_the_strongest_of_a_padded_batch_are_those_of_all_sorted(rules: Selection, seed: int) -> None:
    """Ties, which every second draw has, keep the order of layer, position and neuron."""
    draw = torch.Generator().manual_seed(seed)
    signed, metric, first = torch.randn(3, 4, 6, 11, generator=draw), torch.tensor([1.0, -2.5, 0.0]), [0, 2, 5]
    if seed % 2:
        signed = (2 * signed).round()
    if seed % 3 == 0:
        signed[:, :, :, ::2] = 0
    found = strongest(lambda layer: signed[:, layer], [None] * 4, first, metric, rules.plain())
    for row, column in enumerate(first):
        wanted = by_sorting(signed[row], column, float(metric[row]), rules)
        assert found.nodes[row].tolist() == wanted
        at = found.nodes[row] + torch.tensor([0, column, 0])
        assert torch.equal(found.attributions[row], signed[row][at.unbind(-1)])
        assert float(found.total[row]) == pytest.approx(float(signed[row, :, column:].abs().sum()), rel=1e-6)
