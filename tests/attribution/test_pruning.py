"""Which edges stay: against a naive version, and on a graph small enough to work out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tracer.attribution.pruning import EdgeColumns, Pruning, influence, prune
from tracer.errors import JobError

# 0, 1: embeddings; 2, 3, 4: neurons; 5: a logit. 4 leads nowhere but to 5 by a weak edge.
SOURCE = [0, 1, 2, 2, 3, 4, 1, 0]
TARGET = [2, 2, 3, 5, 5, 5, 4, 5]
WEIGHT = [3.0, 1.0, 2.0, 6.0, 1.0, 0.01, 1.0, 3.0]
IS_NEURON = torch.tensor([False, False, True, True, True, False])
LOGIT = torch.tensor([0, 0, 0, 0, 0, 1.0])
INCOMING = torch.tensor([0, 0, 4.0, 2.0, 1.0, 10.01])


def graph() -> EdgeColumns:
    weight, target = torch.tensor(WEIGHT), torch.tensor(TARGET)
    share = weight / INCOMING[target]
    return EdgeColumns(
        torch.tensor(SOURCE), target, weight, share, share * torch.tensor([0, 0, 8, 1, 0.1, 10.0])[target], weight
    )


def test_nothing_is_pruned_without_a_rule() -> None:
    found = prune(graph(), IS_NEURON, LOGIT, INCOMING, Pruning(share=0.0))
    assert len(found.edges) == 8
    assert found.nodes.tolist() == [0, 1, 2, 3, 4, 5]
    assert found.explained[2:].tolist() == pytest.approx([1, 1, 1, 1])
    assert found.explained[:2].isnan().all()


def test_edges_are_sorted_by_attribution() -> None:
    strength = prune(graph(), IS_NEURON, LOGIT, INCOMING, Pruning(share=0.0)).edges.attribution.abs()
    assert (strength.diff() <= 0).all()


def test_dangling_nodes_go_and_take_their_edges_along() -> None:
    found = prune(graph(), IS_NEURON, LOGIT, INCOMING, Pruning(share=0.01, drop_dangling=True))
    assert found.nodes.tolist() == [0, 1, 2, 3, 5], "4 lost its only way out"
    pairs = set(zip(found.nodes[found.edges.source].tolist(), found.nodes[found.edges.target].tolist(), strict=True))
    assert pairs == {(0, 2), (1, 2), (2, 3), (2, 5), (3, 5), (0, 5)}
    assert float(found.explained[-1]) == pytest.approx(10 / 10.01)


def test_top_keeps_the_strongest() -> None:
    found = prune(graph(), IS_NEURON, LOGIT, INCOMING, Pruning(top=3))
    assert found.edges.attribution.tolist() == pytest.approx([6, 6 / 1.001, 3 / 1.001], rel=1e-4)


def test_influence_by_hand() -> None:
    flow = influence(graph(), LOGIT)
    total = 6 + 1 + 0.01 + 3
    three = 1 / total
    two = 6 / total + three
    assert flow.tolist() == pytest.approx(
        [3 / total + 0.75 * two, 0.25 * two + 0.01 / total, two, three, 0.01 / total, 1.0], rel=1e-5
    )


def test_influence_keeps_the_fewest_nodes_and_edges() -> None:
    found = prune(graph(), IS_NEURON, LOGIT, INCOMING, Pruning(node_influence=0.8))
    assert found.nodes.tolist() == [0, 1, 2, 5]
    few = prune(graph(), IS_NEURON, LOGIT, INCOMING, Pruning(edge_influence=0.9))
    assert len(few.edges) < 8


def test_a_silent_target_keeps_no_edge_by_share() -> None:
    edges = graph()
    edges.share[0] = math.nan
    found = prune(edges, IS_NEURON, LOGIT, INCOMING, Pruning())
    assert found.edges.share.isfinite().all()


@pytest.mark.parametrize(
    "rules",
    [
        {"share": -1.0},
        {"share": math.nan},
        {"attribution": -0.1},
        {"top": 0},
        {"node_influence": 0.0},
        {"edge_influence": 1.5},
    ],
)
def test_rules_out_of_range_are_refused(rules: dict[str, Any]) -> None:
    with pytest.raises(JobError):
        Pruning(**rules)


@given(st.data())
def test_laws(data: st.DataObject) -> None:
    """Kept edges are among the given ones, pass the threshold, and every kept neuron has a way in and out."""
    size = data.draw(st.integers(4, 12))
    pairs = [(s, t) for t in range(size) for s in range(t)]
    chosen = data.draw(st.lists(st.sampled_from(pairs), unique=True, min_size=1))
    numbers = st.floats(-2, 2, allow_nan=False, width=32)
    weight = torch.tensor(data.draw(st.lists(numbers, min_size=len(chosen), max_size=len(chosen))))
    source, target = torch.tensor(chosen).unbind(-1)
    edges = EdgeColumns(source, target, weight, weight, weight, weight)
    is_neuron = torch.ones(size, dtype=torch.bool)
    is_neuron[0] = is_neuron[-1] = False
    logit = torch.zeros(size)
    logit[-1] = 1
    found = prune(
        edges, is_neuron, logit, torch.ones(size), Pruning(share=data.draw(st.floats(0, 1)), drop_dangling=True)
    )
    given = {(s, t): w for (s, t), w in zip(chosen, weight.tolist(), strict=True)}
    back = found.nodes
    for s, t, w in zip(found.edges.source, found.edges.target, found.edges.weight, strict=True):
        assert given[int(back[s]), int(back[t])] == float(w)
    for node in back[is_neuron[back]].tolist():
        number = back.tolist().index(node)
        assert number in found.edges.source
        assert number in found.edges.target


def test_selected_nodes_stay_unless_dropping_is_asked_for() -> None:
    found = prune(graph(), IS_NEURON, LOGIT, INCOMING, Pruning(share=0.9))
    assert found.nodes.tolist() == [0, 1, 2, 3, 4, 5]
    assert len(found.edges) < 8
    assert found.explained[2] == 0
