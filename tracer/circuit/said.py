"""What is known of a graph's neurons beside their numbers: the tokens they promote, and descriptions in words.

Knows how those tables are joined to nodes, and how a neuron is named by them. Refuses to know where they come from
(meaning/), and how a text is drawn: it is data, and whoever shows it escapes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from tracer.experts import DENSE, Numbering

if TYPE_CHECKING:
    from tracer.circuit.circuit import Graph

SHOWN = 3
"""Tokens that name a neuron."""


class Key(NamedTuple):
    """A neuron as its meaning has it; `polarity` 1 or -1 is the sign of its value."""

    layer: int
    neuron: int
    polarity: int

    def __str__(self) -> str:
        return f"L{self.layer} N{self.neuron}{sign(self.polarity)}"


def sign(polarity: int) -> str:
    """How a polarity is written."""
    return "+" if polarity > 0 else "-"


def polarities(activation: float | None) -> tuple[int, ...]:
    """The sign of a neuron's value, by which it promotes one thing or its opposite; both where it is not known."""
    return (1, -1) if activation is None else (-1,) if activation < 0 else (1,)


def key_of(row: Mapping[str, Any]) -> list[Key]:
    """The neuron of a node's row (`layer`, `neuron`, `activation`); of a node without an activation both polarities."""
    return [Key(row["layer"], row["neuron"], polarity) for polarity in polarities(row.get("activation"))]


class Described(NamedTuple):
    """A neuron in words; `score` and `source` as in `schemas.DESCRIPTIONS`, None where they are not known."""

    text: str
    score: float | None
    source: str | None


def best_by_neuron(table: pa.Table) -> dict[Key, Described]:
    """The descriptions of a table of `schemas.DESCRIPTIONS`, by neuron; of several of one neuron that of the best
    score, and the first where none has one."""
    best: dict[Key, tuple[float, Described]] = {}
    for row in table.select(["layer", "neuron", "polarity", "description", "score", "source"]).to_pylist():
        key = Key(row["layer"], row["neuron"], row["polarity"])
        rank = float("-inf") if row["score"] is None else row["score"]
        if key not in best or rank > best[key][0]:
            best[key] = rank, Described(row["description"], row["score"], row["source"])
    return {key: one for key, (_, one) in best.items()}


def by_neuron(table: pa.Table) -> dict[Key, str]:
    """The texts alone of `best_by_neuron`."""
    return {key: one.text for key, one in best_by_neuron(table).items()}


def problem(table: pa.Table) -> str | None:
    """What is wrong with a table of tokens or descriptions, which a file may hold; None if nothing is."""
    for name in ("layer", "neuron", "polarity"):
        if table[name].null_count:
            return f"a row has no {name}"
    if set(table["polarity"].to_pylist()) - {1, -1}:
        return "a polarity is not 1 or -1"
    if "description" in table.column_names:
        return "a row has no description" if table["description"].null_count else None
    for row in table.select(["promoted", "suppressed", "driven_by"]).to_pylist():
        if any(text is None for texts in row.values() for text in texts or ()):
            return "a token is missing"
    for name in ("promoted", "suppressed", "driven_by"):
        for texts, values in zip(table[name].to_pylist(), table[f"{name}_values"].to_pylist(), strict=True):
            if len(texts or ()) != len(values or ()) or not all(
                v is not None and math.isfinite(v) for v in values or ()
            ):
                return f"tokens and numbers of {name} do not fit together"
    return None


class Said:
    """What is known of neurons, by neuron.

    Attributes:
        tokens: rows of `schemas.TOKENS`. best: descriptions, with score and source; described: their texts. numbering:
            by which neurons are named.
    """

    def __init__(
        self,
        tokens: pa.Table | None = None,
        descriptions: pa.Table | None = None,
        numbering: Numbering = DENSE,
    ) -> None:
        self.numbering = numbering
        rows = [] if tokens is None else tokens.to_pylist()
        self.tokens = {Key(row["layer"], row["neuron"], row["polarity"]): row for row in rows}
        self.best = {} if descriptions is None else best_by_neuron(descriptions)
        self.described = {key: one.text for key, one in self.best.items()}

    @classmethod
    def of(cls, graph: Graph) -> Said:
        """What a graph holds."""
        return cls(graph.neuron_tokens, graph.descriptions, graph.numbering)

    def __bool__(self) -> bool:
        return bool(self.tokens or self.described)

    def label(self, row: Mapping[str, Any], count: int = SHOWN) -> str:
        """What a node's neuron does in a few words: its description or, without one, the tokens that it promotes most;
        empty where nothing is known. Of a node whose polarity is not known, of both, the positive one first."""
        parts = [(key, self._words(key, count)) for key in key_of(row)]
        known = [(key, text) for key, text in parts if text]
        if len(parts) == 1 or len({text for _, text in known}) == 1:
            return known[0][1] if known else ""
        return "; ".join(f"{sign(key.polarity)} {text}" for key, text in known)

    def plain(self, row: Mapping[str, Any]) -> str:
        """A neuron's name alone: ``L3 N1414``, or of an expert ``L3 E17 N45``."""
        return self.numbering.name(row["layer"], row["neuron"])

    def name(self, row: Mapping[str, Any]) -> str:
        """A neuron's name with what it does: ``L3 N1414+ says Texas, Houston``; without its sign and what it does where
        that is not known."""
        keys, plain, label = key_of(row), self.plain(row), self.label(row)
        if not label:
            return plain
        name = plain if len(keys) > 1 else plain + sign(keys[0].polarity)
        described = any(key in self.described for key in keys)
        return f"{name}: {label}" if described or len(keys) > 1 else f"{name} says {label}"

    def _words(self, key: Key, count: int) -> str:
        return self.described.get(key) or words(self.tokens.get(key, {}).get("promoted"), count)


def words(tokens: Sequence[str] | None, count: int = SHOWN) -> str:
    """The first few tokens as a list in words: without spaces around them, those of one text once, and those that are
    nothing but spaces left out."""
    kept = dict.fromkeys(text.strip() for text in tokens or () if text.strip())
    return ", ".join(list(kept)[:count])
