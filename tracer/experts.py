"""How neurons of mixtures of experts are numbered in their layer, and how people read and write them.

A layer's neurons have one number each: expert e's neuron i is ``e * d_expert + i``, and those of shared experts, which
belong to none, come after all of these. Tables hold that number; a person sees ``L3 E17 N45``. Refuses to know models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from tracer.errors import JobError, quoted
from tracer.records import Count, Natural, Record

FORMS = "LAYER:NEURON or LAYER:EXPERT:NEURON"
"""How options say a neuron; a slash in the place of the colon, and ``L3 E17 N45``, are read too."""
_SPLIT = re.compile(r"[0-9]{1,9}(?:[:/][0-9]{1,9}){1,2}")
_NAMED = re.compile(r"L(?P<layer>[0-9]{1,9})\s*(?:E(?P<expert>[0-9]{1,9})\s*)?N(?P<neuron>[0-9]{1,9})", re.IGNORECASE)
_WITHIN = re.compile(r"(?:(?P<e>[0-9]{1,9})[:/]|E(?P<expert>[0-9]{1,9})\s*)?N?(?P<neuron>[0-9]{1,9})", re.IGNORECASE)


class Experts(Record):
    """The mixtures of a model that have one shape.

    Attributes:
        layers: where they are. n_experts: that a router chooses from. d_expert: neurons of each.
        d_shared: neurons of the experts that run at every token.
    """

    layers: Annotated[tuple[Natural, ...], Field(min_length=1)]
    n_experts: Count
    d_expert: Count
    d_shared: Natural = 0

    @property
    def n_routed(self) -> int:
        """Neurons that belong to an expert; numbers from here on are those of shared experts."""
        return self.n_experts * self.d_expert

    @property
    def n_neurons(self) -> int:
        """All neurons of such a layer."""
        return self.n_routed + self.d_shared


class Neuron(NamedTuple):
    """A neuron as a person or a file writes it: without an expert by its number in the layer; with one by its number in
    that, or in the layer as tables have it (at least the width of an expert then, but for expert 0, where both are the
    same)."""

    layer: int
    expert: int | None
    neuron: int

    def __str__(self) -> str:
        return f"L{self.layer} " + ("" if self.expert is None else f"E{self.expert} ") + f"N{self.neuron}"


class Numbering:
    """Numbers and names of a model's neurons.

    Args:
        experts: its mixtures; none of a dense model, and where neurons are counted in the basis ``output``.
    """

    def __init__(self, experts: Iterable[Experts] = ()) -> None:
        self._at = {layer: one for one in experts for layer in one.layers}

    def __bool__(self) -> bool:
        """Whether any neuron belongs to an expert."""
        return bool(self._at)

    def split(self, layer: int, number: int) -> Neuron:
        """A neuron of a layer as its expert and its number there; without an expert where it belongs to none."""
        one = self._at.get(layer)
        if one is None or not 0 <= number < one.n_routed:
            return Neuron(layer, None, number)
        return Neuron(layer, *divmod(number, one.d_expert))

    def expert(self, layer: int, number: int) -> int | None:
        """The expert that a neuron belongs to; None where it belongs to none."""
        return self.split(layer, number).expert

    def width(self, layer: int) -> int | None:
        """Neurons of each expert of a layer; None where it has none."""
        return one.d_expert if (one := self._at.get(layer)) else None

    def name(self, layer: int, number: int) -> str:
        """A neuron's name: ``L3 E17 N45``, or ``L3 N45`` where it belongs to no expert."""
        return str(self.split(layer, number))

    def short(self, layer: int, number: int) -> str:
        """A neuron's name without its layer, for a table that has a column for that: ``E17 N45``, or ``45``."""
        one = self.split(layer, number)
        return str(number) if one.expert is None else f"E{one.expert} N{one.neuron}"

    def experts_of(self, layers: Sequence[int], numbers: Sequence[int]) -> list[int | None]:
        """The experts of many neurons: the column of a table."""
        return [self.expert(layer, number) for layer, number in zip(layers, numbers, strict=True)]

    def number(self, given: Neuron) -> int:
        """A neuron's number in its layer; whether the layer has that many is not checked where no expert is given.

        Raises:
            JobError: the layer has no experts, or not that one, or it has no such neuron.
        """
        if given.expert is None:
            return given.neuron
        one = self._at.get(given.layer)
        if one is None:
            step = f"leave the expert out; layers with experts are {self._layers()}" if self else "leave the expert out"
            raise JobError(f"neuron {given}", f"layer {given.layer} has no experts", step)
        if given.expert >= one.n_experts:
            rule, step = f"the layer has {one.n_experts} experts", f"use E0 to E{one.n_experts - 1}"
            raise JobError(f"neuron {given}", rule, step)
        if given.neuron >= one.d_expert:
            if self.expert(given.layer, given.neuron) == given.expert:
                return given.neuron
            rule, step = f"an expert of that layer has {one.d_expert} neurons", f"use N0 to N{one.d_expert - 1}"
            raise JobError(f"neuron {given}", rule, step)
        return given.expert * one.d_expert + given.neuron

    def pair(self, given: Neuron) -> tuple[int, int]:
        """A neuron as layer and number; errors as of `number`."""
        return given.layer, self.number(given)

    def of_parts(self, parts: Sequence[int]) -> tuple[int, int]:
        """Layer and number of a neuron that is given as (layer, neuron) or (layer, expert, neuron); errors as of
        `number`."""
        layer, *expert, neuron = parts
        return self.pair(Neuron(layer, expert[0] if expert else None, neuron))

    def numbered(self, given: int | Neuron) -> int:
        """The number of what may be a number already; errors as of `number`."""
        return self.number(given) if isinstance(given, Neuron) else given

    def _layers(self) -> str:
        layers = sorted(self._at)
        whole = layers == [*range(layers[0], layers[-1] + 1)]
        return f"{layers[0]} to {layers[-1]}" if whole and len(layers) > 2 else ", ".join(map(str, layers))


DENSE = Numbering()
"""Of a model without experts."""


def parse(text: Any) -> Neuron:
    """A neuron as written: ``3:45``, ``3/45``, ``L3 N45``, and of an expert ``3:17:45``, ``3/17/45``, ``L3 E17 N45``.

    Raises:
        JobError: it is none of these.
    """
    if isinstance(text, str):
        plain = text.strip()
        if match := _NAMED.fullmatch(plain):
            expert = match["expert"]
            return Neuron(int(match["layer"]), None if expert is None else int(expert), int(match["neuron"]))
        if _SPLIT.fullmatch(plain):
            layer, *expert, neuron = map(int, re.split("[:/]", plain))
            return Neuron(layer, expert[0] if expert else None, neuron)
    raise JobError(
        f"neuron {quoted(text)}", f"is not {FORMS}", "write it as 3:45, or of an expert 3:17:45 (L3 E17 N45)"
    )


def parse_within(layer: int, text: Any) -> Neuron:
    """A neuron of a known layer as written: ``45``, ``17:45`` or ``E17 N45``.

    Raises:
        JobError: it is none of these.
    """
    if isinstance(text, str) and (match := _WITHIN.fullmatch(text.strip())):
        expert = match["e"] or match["expert"]
        return Neuron(layer, None if expert is None else int(expert), int(match["neuron"]))
    rule = "is neither a neuron's number in its layer nor EXPERT:NEURON"
    raise JobError(f"neuron {quoted(text)}", rule, "write it as 45, or of an expert 17:45 (E17 N45)")


def by_shape(layers: Iterable[tuple[int, int, int, int]]) -> Iterator[Experts]:
    """Mixtures of layers, given as (layer, n_experts, d_expert, d_shared), those of one shape together."""
    shapes: dict[tuple[int, int, int], list[int]] = {}
    for layer, *shape in layers:
        shapes.setdefault((shape[0], shape[1], shape[2]), []).append(layer)
    for (n_experts, d_expert, d_shared), found in shapes.items():
        yield Experts(layers=tuple(found), n_experts=n_experts, d_expert=d_expert, d_shared=d_shared)
