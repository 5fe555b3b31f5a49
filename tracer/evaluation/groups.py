"""Named groups of nodes, such as supernodes: where they come from, where they act, and random ones of the same size.

Knows a circuit's groups, the file supernodes.json and plain lists. Refuses to know how groups were found, and what is
done to them (evaluation/sweep.py).
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tracer.attribution.running import Running
from tracer.circuit import supernodes_file
from tracer.circuit.circuit import Graph
from tracer.circuit.supernodes_file import Supernodes
from tracer.errors import JobError, quoted
from tracer.evaluation.steering import is_index, written
from tracer.experts import DENSE, Neuron, Numbering
from tracer.records import is_list

WHOLE = "whole circuit"
"""The group of all neurons of a circuit."""

Place = tuple[int, int | None, int]
"""Layer, position (None: every one), neuron."""

Groups = Graph | Mapping[str, Any] | str | Path
"""A circuit (its groups, and the whole of it), nodes by the name of their group, or a file supernodes.json."""


@dataclass(frozen=True)
class Group:
    """Nodes that are acted on together; each place once."""

    name: str
    places: tuple[Place, ...]

    def on(self, length: int) -> tuple[tuple[int, int, int], ...]:
        """Its nodes (layer, position, neuron) on a prompt of that many tokens."""
        every = ((layer, at, neuron) for layer, position, neuron in self.places for at in _at(position, length))
        return tuple(dict.fromkeys(every))

    @property
    def longest(self) -> int:
        """Tokens that a prompt needs for all its positions to be there."""
        return max((position + 1 for _, position, _ in self.places if position is not None), default=1)

    def everywhere(self) -> Group:
        """The same neurons at every position."""
        return Group(self.name, tuple(dict.fromkeys((layer, None, neuron) for layer, _, neuron in self.places)))


def _at(position: int | None, length: int) -> Iterable[int]:
    return range(length) if position is None else (position,)


def groups_of(
    given: Groups,
    only: Sequence[str] | None = None,
    numbering: Numbering = DENSE,
) -> list[Group]:
    """The groups that are given, those in `only` alone if it is.

    A node is (layer, position, neuron), (layer, neuron) for every position, or a record with ``layer``, ``neuron`` and
    ``position`` (-1: every). A neuron of an expert may be ``"E17 N45"``, or a record have its ``expert``. A polarity is
    left alone: a neuron is acted on whatever its sign.

    Args:
        numbering: of the model's neurons; a circuit knows its own.

    Raises:
        JobError: no groups, one without nodes, what is not a node, an expert or a name in `only` that there is not.
        RunError: a file that cannot be read, or is damaged.
    """
    named = nodes_of(supernodes_file.read(given), numbering) if isinstance(given, str | Path) else given
    if isinstance(named, Graph):
        made = _of_graph(named)
    elif isinstance(named, Mapping):
        made = [Group(_name(name), _places(name, nodes, numbering)) for name, nodes in named.items()]
    else:
        rule = "is neither a circuit, a file, nor nodes by group"
        raise JobError(f"groups {quoted(given)}", rule, "give {'name': [(layer, neuron)]}")
    if not made:
        raise JobError("groups", "there is none to steer", "give at least one with nodes")
    if only is None:
        return made
    known = {group.name: group for group in made}
    if unknown := [name for name in only if name not in known]:
        names = ", ".join(quoted(name) for name in [*known][:20]) + (", ..." if len(known) > 20 else "")
        raise JobError(f"group {quoted(unknown[0])}", f"is none of the groups: {names}", "choose among these")
    return [known[name] for name in dict.fromkeys(only)]


def nodes_of(file: Supernodes, numbering: Numbering) -> dict[str, list[Place]]:
    """The nodes of each group of a groups file, as `groups_of` takes them; embeddings are not among them.

    Raises:
        JobError: an expert, or a neuron of one, that the model does not have.
    """
    named = {
        group.name: [_place(node.model_dump(), group.name, numbering) for node in group.nodes if node.layer >= 0]
        for group in file.groups
    }
    return {name: nodes for name, nodes in named.items() if nodes}


def whole_of(graph: Graph) -> list[Place]:
    """All neurons of a circuit as nodes; those of a free one at every position."""
    return [_place(_node(row), WHOLE) for row in graph.neurons.to_pylist()]


def _of_graph(graph: Graph) -> list[Group]:
    rows = graph.nodes.to_pylist()
    found = {
        name: [_node(rows[node]) for node in nodes if rows[node]["kind"] == "neuron"]
        for name, nodes in graph.groups.items()
    }
    made = [Group(_name(name), _places(name, nodes)) for name, nodes in found.items() if nodes]
    if WHOLE not in found and graph.n_nodes:
        made.append(Group(WHOLE, _places(WHOLE, whole_of(graph))))
    return made


def _name(value: Any) -> str:
    if isinstance(value, str) and value.strip():
        return value
    raise JobError(f"group {quoted(value)}", "has no name as text", "give each group a name")


_node = operator.itemgetter("layer", "position", "neuron")


def _places(name: Any, nodes: Any, numbering: Numbering = DENSE) -> tuple[Place, ...]:
    if not is_list(nodes) or not len(nodes):
        raise JobError(f"group {quoted(name)}", "has no nodes", "give at least one, such as (1, 5, 13)")
    found = dict.fromkeys(_place(node, name, numbering) for node in nodes)
    every = {(layer, neuron) for layer, position, neuron in found if position is None}
    return tuple(place for place in found if place[1] is None or (place[0], place[2]) not in every)


def _place(node: Any, name: Any, numbering: Numbering = DENSE) -> Place:
    """A node as a place."""
    parts = [node.get("layer"), node.get("position"), _neuron_in(node)] if isinstance(node, Mapping) else node
    if is_list(parts) and len(parts) == 2:
        parts = (parts[0], None, parts[1])
    known = is_list(parts) and len(parts) == 3 and is_index(parts[0])
    if not known or (given := written(int(parts[0]), parts[2])) is None:
        rule = "is neither (layer, position, neuron) nor (layer, neuron)"
        raise JobError(f"node {quoted(node)} of group {quoted(name)}", rule, "give whole numbers, such as (1, 5, 13)")
    neuron = numbering.numbered(given)
    layer, position, _ = parts
    if position is None or (is_index(position) and int(position) == -1):
        return int(layer), None, neuron
    if not is_index(position) or int(position) < 0:
        rule = "has a position that is neither a token's index nor -1, for every one"
        raise JobError(f"node {quoted(node)} of group {quoted(name)}", rule, "count positions from 0")
    return int(layer), int(position), neuron


def _neuron_in(node: Mapping[str, Any]) -> Any:
    """The neuron of a record, named by its expert where the record has one."""
    expert, neuron = node.get("expert"), node.get("neuron")
    return Neuron(node["layer"], int(expert), int(neuron)) if is_index(expert) and is_index(neuron) else neuron


def check_nodes(groups: Sequence[Group], widths: Sequence[int]) -> None:
    """Refuse nodes that a model with so many neurons in each layer does not have.

    Raises:
        JobError: names the layer or neuron.
    """
    for group in groups:
        for layer, _, neuron in group.places:
            where = f"of group {quoted(group.name)}"
            if not 0 <= layer < (n_layers := len(widths)):
                rule, step = f"the model has {n_layers} layers", f"use 0 to {n_layers - 1}"
                raise JobError(f"layer {layer} {where}", rule, step)
            width = widths[layer]
            if not 0 <= neuron < width:
                raise JobError(f"neuron {neuron} {where}", f"a layer has {width}", f"use 0 to {width - 1}")


def controls(group: Group, there: Running, random: int, seed: int) -> list[Group]:
    """Random groups of the same size: in each layer as many neurons at the same positions, among those that are there
    and that the group has nowhere in that layer. Drawn with `seed` and this group alone; none where there are too few
    others.

    Args:
        random: how many to draw.
    """
    counts = Counter((layer, position) for layer, position, _ in group.places)
    own: dict[int, set[int]] = {}
    for layer, _, neuron in group.places:
        own.setdefault(layer, set()).add(neuron)
    others = {place: there.others(*place, own[place[0]]) for place in counts}
    if any(count > len(others[place]) for place, count in counts.items()):
        return []
    generator = torch.Generator().manual_seed(seed)
    return [
        Group(
            group.name,
            tuple(
                (layer, position, neuron)
                for (layer, position), count in counts.items()
                for neuron in _drawn(others[layer, position], count, generator)
            ),
        )
        for _ in range(random)
    ]


def _drawn(pool: torch.Tensor, count: int, generator: torch.Generator) -> list[int]:
    return pool[torch.randperm(len(pool), generator=generator)[:count]].tolist()
