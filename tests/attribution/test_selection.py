"""Selection against a naive implementation: sort everything in Python and take from the front."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers import refused
from tracer.attribution.selection import check_selection, select
from tracer.errors import JobError

Node = tuple[int, int, int]


@st.composite
def attributions(draw: st.DrawFn) -> Tensor:
    """Small whole numbers, so that ties and zeros are common and sums are exact."""
    shape = tuple(draw(st.integers(1, 4)) for _ in range(3))
    size = shape[0] * shape[1] * shape[2]
    values = draw(st.lists(st.integers(-4, 4), min_size=size, max_size=size))
    return torch.tensor(values, dtype=torch.float32).view(shape)


def naive(
    values: Tensor,
    metric: float,
    nodes: int | None,
    threshold: float | None,
    mass: float | None,
    skip_first: bool,
    exclude: list[tuple[int, int]],
) -> list[Node]:
    """The definition of method.md section 5."""
    found: list[tuple[float, Node]] = []
    for layer, rows in enumerate(values.tolist()):
        for pos, row in enumerate(rows):
            for neuron, value in enumerate(row):
                allowed = not (skip_first and pos == 0) and (layer, neuron) not in exclude
                if value != 0 and allowed:
                    found.append((abs(value), (layer, pos, neuron)))
    found.sort(key=lambda one: (-one[0], one[1]))
    if mass is not None:
        total, held, kept = sum(strength for strength, _ in found), 0.0, []
        for strength, node in found:
            if kept and held / total >= mass:
                break
            held += strength
            kept.append((strength, node))
        found = kept
    if threshold is not None:
        found = [one for one in found if one[0] >= threshold * abs(metric)]
    return [node for _, node in found][:nodes]


@given(
    attributions(),
    st.sampled_from([-8.0, -1.0, 0.0, 2.0, 8.0]),
    st.one_of(st.none(), st.integers(1, 30)),
    st.one_of(st.none(), st.sampled_from([0.0, 0.125, 0.25, 0.5, 3.0])),
    st.one_of(st.none(), st.sampled_from([0.01, 0.25, 0.5, 0.75, 1.0])),
    st.booleans(),
    st.data(),
)
def test_selection_equals_the_naive_one(
    values: Tensor,
    metric: float,
    nodes: int | None,
    threshold: float | None,
    mass: float | None,
    skip_first: bool,
    data: st.DataObject,
) -> None:
    if nodes is None and threshold is None and mass is None:
        nodes = 5
    pair = st.tuples(st.integers(0, values.shape[0] - 1), st.integers(0, values.shape[2] - 1))
    exclude = data.draw(st.lists(pair, max_size=3))
    before = values.clone()
    got = select(values, metric, nodes=nodes, threshold=threshold, mass=mass, skip_first=skip_first, exclude=exclude)
    assert got.shape[1:] == (3,)
    wanted = naive(values, metric, nodes, threshold, mass, skip_first, exclude)
    assert [tuple(row) for row in got.tolist()] == wanted
    assert torch.equal(values, before)


@given(attributions(), st.integers(1, 70))
def test_more_nodes_only_add_at_the_end(values: Tensor, nodes: int) -> None:
    fewer, more = select(values, 1.0, nodes=nodes), select(values, 1.0, nodes=nodes + 1)
    assert torch.equal(more[: len(fewer)], fewer)
    assert len(more) - len(fewer) in (0, 1)


def test_ties_keep_layer_position_neuron_order() -> None:
    values = torch.ones(2, 2, 2)
    values[0, 1, 1] = -1.0
    values[1, 0, 0] = 2.0
    order = [(1, 0, 0), (0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 1, 1)]
    for nodes in range(1, 9):
        assert [tuple(row) for row in select(values, 1.0, nodes=nodes).tolist()] == order[:nodes]


def test_many_ties_are_stable() -> None:
    """Beyond the size where an unstable sort shows."""
    values = torch.ones(3, 50, 40)
    got = select(values, 1.0, nodes=None, mass=1.0)
    flat = got[:, 0] * 2000 + got[:, 1] * 40 + got[:, 2]
    assert torch.equal(flat, torch.arange(6000))


@pytest.mark.parametrize("metric", [-2.0, 2.0])
def test_a_threshold_is_a_share_of_the_absolute_metric(metric: float) -> None:
    values = torch.tensor([[[0.5, -1.0, 0.999, 3.0, 0.0]]])
    got = select(values, metric, nodes=None, threshold=0.5)
    assert got[:, 2].tolist() == [3, 1]


def test_a_mass_that_is_reached_exactly_needs_no_further_node() -> None:
    values = torch.tensor([[[4.0, -2.0, 1.0, 1.0]]])
    for mass, wanted in [(0.4, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.875, 3), (0.9, 4), (1.0, 4)]:
        assert len(select(values, 1.0, nodes=None, mass=mass)) == wanted


def test_nodes_that_are_exactly_zero_are_never_kept() -> None:
    assert len(select(torch.zeros(2, 3, 4), 1.0, nodes=10)) == 0
    assert len(select(torch.zeros(2, 3, 4), 0.0, nodes=None, threshold=0.0)) == 0
    assert len(select(torch.zeros(2, 3, 4), 0.0, nodes=None, mass=0.5)) == 0


def test_an_excluded_neuron_is_left_out_at_every_position() -> None:
    values = torch.arange(1.0, 25.0).view(2, 3, 4)
    got = select(values, 1.0, nodes=24, exclude=[(1, 3), (0, 0)])
    assert len(got) == 24 - 6
    assert not {(1, 3), (0, 0)} & {(layer, neuron) for layer, _, neuron in got.tolist()}


@pytest.mark.parametrize(
    ("rule", "part"),
    [
        ({"nodes": 0}, "nodes=0"),
        ({"nodes": -3}, "nodes=-3"),
        ({"threshold": -0.1}, "threshold=-0.1"),
        ({"threshold": float("nan")}, "threshold=nan"),
        ({"mass": 0.0}, "mass=0.0"),
        ({"mass": 1.5}, "mass=1.5"),
        ({"mass": float("nan")}, "mass=nan"),
        ({"exclude": [(0, 4)]}, "exclude=(0, 4)"),
        ({"exclude": [(2, 0)]}, "exclude=(2, 0)"),
        ({"exclude": [(-1, 0)]}, "exclude=(-1, 0)"),
    ],
)
def test_a_rule_out_of_range_is_refused(rule: dict[str, Any], part: str) -> None:
    with refused(JobError, part):
        select(torch.ones(2, 3, 4), 1.0, **rule)  # type: ignore[arg-type]


def test_the_check_alone_accepts_what_select_accepts() -> None:
    check_selection(1, None, None)
    check_selection(None, 0.0, None)
    check_selection(None, None, 1.0)
