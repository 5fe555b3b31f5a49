"""Names of groups of neurons: the tokens that they promote together, or what else is known of them.

Knows tables of promoted tokens and of descriptions. Refuses to know how groups and those tables come about.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import pyarrow as pa

from tracer.circuit.said import Key
from tracer.text import printable

LONGEST = 60
"""Characters of a name: the page's own limit."""
_IN_A_NAME, _SHOWN = 3, 5
_CLOSE = 0.5
"""A token is in the name where its weight is at least this part of the first one's."""

Neuron = tuple[int, int, int]
"""Layer, neuron, polarity."""


class Weighed(NamedTuple):
    """A member of a group, and how much it counts: its |attribution|."""

    neuron: Neuron
    weight: float


def promoted(members: Iterable[Weighed], tokens: pa.Table | None, count: int = _SHOWN) -> list[tuple[str, float]]:
    """The tokens that neurons promote together, with their weights: the sum over neurons of |attribution| times how far
    each moves the token's logit; spellings that differ in spaces and case count as one.

    Args:
        tokens: in `schemas.TOKENS`; neurons that it lacks promote nothing that is known.
    """
    known = _by_neuron(tokens)
    total, spelt = defaultdict[str, float](float), dict[str, dict[str, float]]()
    for neuron, weight in members:
        for token, value in known.get(neuron, ()):
            if value > 0 and weight > 0:
                shown = _plain(token)
                total[shown.casefold()] += weight * value
                own = spelt.setdefault(shown.casefold(), {})
                own[shown] = own.get(shown, 0.0) + weight * value
    ranked = sorted(total, key=lambda key: (-total[key], key))[:count]
    return [(min(spelt[key], key=lambda shown: (-spelt[key][shown], shown)), total[key]) for key in ranked]


def from_tokens(members: Iterable[Weighed], tokens: pa.Table | None) -> str:
    """The first of the tokens that they promote together, as a name; nothing where none is known."""
    found = promoted(members, tokens, _IN_A_NAME)
    name = ""
    for token, weight in found:
        longer = f"{name}, {token}" if name else token
        if name and (weight < _CLOSE * found[0][1] or len(longer) > LONGEST):
            break
        name = longer
    return _cut(name)


def described(members: Iterable[Weighed], descriptions: pa.Table | None, most: int = 3) -> str:
    """What is said of the strongest members that something is said of.

    Args:
        descriptions: in `schemas.DESCRIPTIONS`.
    """
    if descriptions is None:
        return ""
    rows = descriptions.select(["layer", "neuron", "polarity", "description"]).to_pylist()
    said = {(row["layer"], row["neuron"], row["polarity"]): row["description"] for row in rows if row["description"]}
    strongest = sorted(members, key=lambda member: (-member.weight, member.neuron))
    found = dict.fromkeys(said[member.neuron] for member in strongest if member.neuron in said)
    return "; ".join(list(found)[:most])


def from_description(description: str) -> str:
    """The first of several descriptions, as a name."""
    return _cut(printable(description.split("; ", maxsplit=1)[0].strip()))


def from_profiles(drives: Mapping[str, float], effects: Mapping[str, float]) -> str:
    """A name by the prompt's token that drives the group most and the target token that it moves most, such as
    ``keys: towards are``; nothing where it moves none.

    Args:
        drives: by token of the prompt. effects: by target token, on its logit.
    """
    moved = max(effects, key=lambda token: (abs(effects[token]), token), default="")
    if not effects.get(moved):
        return ""
    source = max(drives, key=lambda token: (drives[token], token), default="")
    way = f"{'towards' if effects[moved] > 0 else 'against'} {_plain(moved)}"
    return _cut(f"{_plain(source)}: {way}" if source and drives[source] > 0 else way)


def from_members(members: Sequence[Weighed]) -> str:
    """A name by the strongest member."""
    (layer, neuron, polarity), _ = min(members, key=lambda member: (-member.weight, member.neuron))
    more = f" and {len(members) - 1} more" if len(members) > 1 else ""
    return f"{Key(layer, neuron, polarity)}{more}"


def unique(names: Iterable[str]) -> list[str]:
    """Each name once: the second of two that are equal gets a number."""
    found: dict[str, None] = {}
    for name in names:
        own, number = name, 2
        while own in found:
            ending = f" {number}"
            own, number = name[: LONGEST - len(ending)] + ending, number + 1
        found[own] = None
    return list(found)


def _by_neuron(tokens: pa.Table | None) -> dict[Neuron, list[tuple[str, float]]]:
    if tokens is None:
        return {}
    rows = tokens.select(["layer", "neuron", "polarity", "promoted", "promoted_values"]).to_pylist()
    return {
        (row["layer"], row["neuron"], row["polarity"]): list(
            zip(row["promoted"] or (), row["promoted_values"] or (), strict=True)
        )
        for row in rows
    }


def _plain(token: str) -> str:
    """A token without the spaces around it; spelt out where it is nothing else."""
    return printable(token.strip()) or printable(repr(token)[1:-1])


def _cut(name: str) -> str:
    return printable(name, LONGEST)
