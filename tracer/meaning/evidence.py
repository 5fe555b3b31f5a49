"""What there is to describe neurons by: a run's strongest neurons, texts where they are active, tokens they promote.

Texts are divided into those that a describer is shown and those that its description is scored on. Knows the tables of
run folders. Refuses to know who describes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tracer.circuit.said import key_of, polarities
from tracer.errors import JobError, RunError, option, quoted
from tracer.meaning import exemplars as exemplar_tables
from tracer.meaning.descriptions import Key
from tracer.meaning.exemplars import TOP, Exemplar, window
from tracer.meaning.simulation import Piece, Tokens
from tracer.meaning.strongest import of_dataset
from tracer.store import one_prompt
from tracer.store.run_folder import RunFolder

SHOWN = 8
"""Strongest texts that a describer is shown, at most."""
HELD_TOP, HELD_OTHER = 5, 5
"""Texts that a description is scored on, at most: of the strongest, and of those at quantiles of the values."""
N_TOKENS = 10
"""Promoted and suppressed tokens, at most."""


@dataclass(frozen=True)
class Evidence:
    """What is known of a neuron.

    Attributes:
        shown: texts for the describer. held_out: others, for the score.
    """

    key: Key
    shown: tuple[Piece, ...]
    held_out: tuple[Piece, ...]
    tokens: Tokens

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to describe it by."""
        return not (self.shown or self.tokens.promoted)


def evidence(folder: RunFolder, exemplars: Any = None, top: int = 20) -> list[Evidence]:
    """What is known of a run's strongest neurons, the strongest first.

    Args:
        exemplars: the folder of a run that collected them; the run's own if None, where it has them.
        top: how many neurons.

    Raises:
        RunError: no run there, none of exemplars, or a damaged one.
        JobError: nothing is known of any of them.
    """
    texts = None
    if exemplars is not None or folder.place.exists(exemplar_tables.FILE):
        texts = exemplar_tables.read(folder if exemplars is None else exemplars)
    tokens = folder.find_output("tokens.parquet")
    found = [_of(key, texts, tokens) for key in strongest(folder, texts, top)]
    if all(one.is_empty for one in found):
        rule = f"has neither texts nor promoted tokens of its {len(found)} strongest neurons"
        step = f"collect texts with 'tracer exemplars', and name their folder: {option('exemplars')} FOLDER"
        raise JobError(f"run {quoted(str(folder.place), 300)}", rule, step)
    return found


def _of(key: Key, texts: pa.Table | None, tokens: pa.Table | None) -> Evidence:
    shown, held = split(exemplar_tables.of_neuron(texts, *key)) if texts is not None else ([], [])
    known = Tokens()
    if tokens is not None:
        chosen = (pc.field("layer") == key.layer) & (pc.field("neuron") == key.neuron)
        for row in tokens.filter(chosen & (pc.field("polarity") == key.polarity)).slice(0, 1).to_pylist():
            known = Tokens(*(tuple(row[name] or ())[:N_TOKENS] for name in Tokens._fields))
    pieces = [tuple(piece(one, key.polarity) for one in some) for some in (shown, held)]
    return Evidence(key, pieces[0], pieces[1], known)


def split(exemplars: Iterable[Exemplar]) -> tuple[list[Exemplar], list[Exemplar]]:
    """A neuron's exemplars as those to show and those to hold out: of the strongest every other one, and of the others
    some of every quantile. None that is held out is of a document, or the same text, as one that is shown."""
    every = list(exemplars)
    tops = sorted((one for one in every if one.kind == TOP), key=lambda one: (one.rank, one.document))
    others = sorted((one for one in every if one.kind != TOP), key=lambda one: (one.rank, one.kind, one.document))
    shown = tops[::2][:SHOWN]
    documents, texts = {one.document for one in shown}, {window(one)[0] for one in shown}

    def unseen(some: Sequence[Exemplar]) -> Iterator[Exemplar]:
        for one in some:
            text = window(one)[0]
            if one.document not in documents and text not in texts:
                documents.add(one.document)
                texts.add(text)
                yield one

    held = list(unseen(tops[1::2]))[:HELD_TOP]
    return shown, held + list(unseen(others))[:HELD_OTHER]


def piece(exemplar: Exemplar, polarity: int) -> Piece:
    """The tokens around an exemplar's peak, and how active the neuron is at each: its value where that has the sign of
    the polarity, else 0."""
    tokens, values = window(exemplar)
    return Piece(tokens, tuple(max(0.0, polarity * value) for value in values))


def strongest(folder: RunFolder, texts: pa.Table | None = None, top: int = 20) -> list[Key]:
    """The strongest neurons of a run: of one prompt's circuit by the sum of |attribution| over positions, of a
    dataset's as `strongest.of_dataset` has them. The polarity is the sign of the
    (mean) activation; both where there is none. Of a run without neurons those that have exemplars.

    Raises:
        RunError: no run there, or a damaged one.
    """
    kind = one_prompt.read_record(folder.place.address)["kind"]
    if kind in ("trace", "graph"):
        return _of_prompt(one_prompt.read_run(folder.place.address)[1]["nodes"])[:top]
    if not folder.place.exists("neurons.parquet"):
        if texts is None:
            rule, step = "names no neurons: it has no neurons.parquet", "wait until it has ended, or give another run"
            raise RunError(f"run {quoted(str(folder.place), 300)}", rule, step)
        return [Key(*key) for key in exemplar_tables.neurons_of(texts)][:top]
    neurons = folder.read_output("neurons.parquet")
    signs = {(row["layer"], row["neuron"]): row["mean_activation"] for row in neurons.to_pylist()}
    return [Key(*pair, sign) for pair in of_dataset(folder) for sign in polarities(signs.get(pair))][:top]


def _of_prompt(nodes: pa.Table) -> list[Key]:
    strength: dict[Key, float] = {}
    for row in nodes.filter(pc.field("kind") == "neuron").to_pylist():
        for key in key_of(row):
            strength[key] = strength.get(key, 0.0) + abs(row["attribution"] or 0.0)
    return sorted(strength, key=lambda key: (-strength[key], key))
