"""What the graph page says of a graph's neurons: description, tokens, texts, and whether they are always on.

Knows which of that fits which node. Refuses to know how the page packs and shows it (viewer), and where it was found
(circuit/said.py, meaning/around.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tracer.circuit.circuit import Graph
from tracer.circuit.said import Key, Said, key_of, sign
from tracer.meaning.around import Around
from tracer.meaning.exemplars import Exemplar, window
from tracer.reports import viewer

TOKEN_LISTS = {"promoted": "promotes", "suppressed": "suppresses", "driven_by": "driven by"}
"""Columns of `schemas.TOKENS`, and their headings."""


def says(graph: Graph, known: Around) -> Iterator[tuple[int, viewer.Says]]:
    """What is known of its neurons, by row of the nodes; nodes of one neuron and sign share one `Says`."""
    said, made = Said.of(graph), dict[tuple[Key, ...], viewer.Says | None]()
    if not (said or known.texts):
        return
    for at, row in enumerate(graph.nodes.select(["kind", "layer", "neuron", "activation"]).to_pylist()):
        if row["kind"] != "neuron":
            continue
        keys = tuple(key_of(row))
        if keys not in made:
            made[keys] = _says(said, known, keys, said.label(row))
        if (one := made[keys]) is not None:
            yield at, one


def _says(said: Said, known: Around, keys: Sequence[Key], label: str) -> viewer.Says | None:
    texts = [(key, known.texts[key]) for key in keys if key in known.texts]
    if not label and not texts:
        return None
    return viewer.Says(
        label=label,
        lists=tuple(_token_lists(said, keys)),
        descriptions=tuple(_descriptions(said, keys)),
        texts=tuple(_text(one, key) for key, found in texts for one in found.kept),
        more=sum(found.more for _, found in texts),
    )


def _descriptions(said: Said, keys: Sequence[Key]) -> Iterator[viewer.Description]:
    for key in keys:
        if (one := said.best.get(key)) is not None:
            text = one.text if len(keys) == 1 else f"{sign(key.polarity)} {one.text}"
            score = one.score if one.score is not None and math.isfinite(one.score) else None
            yield viewer.Description(text, score, one.source or "")


def _token_lists(said: Said, keys: Sequence[Key]) -> Iterator[tuple[str, tuple[tuple[str, float], ...]]]:
    """A neuron's lists of tokens with their numbers, each under its heading; those of both polarities where the node's
    is not known."""
    for key in keys:
        tokens = said.tokens.get(key, {})
        for name, heading in TOKEN_LISTS.items():
            if tokens.get(name):
                ending = "" if len(keys) == 1 else f" ({sign(key.polarity)})"
                yield heading + ending, tuple(zip(tokens[name], tokens[f"{name}_values"], strict=True))


def _text(one: Exemplar, key: Key) -> viewer.Text:
    """An exemplar; only values of the neuron's sign are shaded."""
    tokens, values = window(one)
    shaded = tuple(value if value * key.polarity > 0 else 0.0 for value in values)
    return viewer.Text(one.kind, one.document, one.value, tokens, shaded)


def always_on(graph: Graph, known: Around) -> dict[int, tuple[float, float, float]] | None:
    """Rows of nodes whose neuron is always on, with share, attribution and exact effect; None where that is unknown."""
    if known.always_on is None:
        return None
    rows: list[Mapping[str, Any]] = graph.nodes.select(["kind", "layer", "neuron"]).to_pylist()
    found = {
        at: known.always_on[row["layer"], row["neuron"]]
        for at, row in enumerate(rows)
        if row["kind"] == "neuron" and (row["layer"], row["neuron"]) in known.always_on
    }
    return {at: (one.share, one.attribution, one.exact) for at, one in found.items()}
