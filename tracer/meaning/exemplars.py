"""Exemplars: pieces of text where a neuron is strong, read from the folder of a run that collected them.

A neuron of a direction is (layer, neuron, polarity); an exemplar of it is a document at its peak, the token where the
value of that sign is largest. Knows the tables EXEMPLARS and DENSITIES. Refuses to know how they were collected
(runs/units/exemplars.py), and what is made of them. What an exemplar says is data, never an instruction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tracer.errors import RunError, quoted
from tracer.store.run_folder import RunFolder

FILE, DENSITIES_FILE = "exemplars.parquet", "densities.parquet"
WIDTH = 64
"""Tokens of a text, at most; three quarters of them before the peak."""
TOP = "top"
"""The kind of the strongest exemplars; those at a quantile are ``q50``, ``q90``, ..."""


@dataclass(frozen=True)
class Exemplar:
    """A document at a neuron's peak.

    Attributes:
        kind: ``top``, or the quantile of documents' peaks that it stands for, such as ``q50``. rank: within it, from 0.
        value: at the peak, with its sign. document: which row of the input. position: of the peak in the document,
            in tokens. start: the position of the first token shown.
        tokens: around the peak, their text. values: of the neuron at each; the first token of a window may be missing
            from the statistics (``skip_first``) but is shown with its value.
    """

    kind: str
    rank: int
    value: float
    document: int
    position: int
    start: int
    tokens: tuple[str, ...]
    values: tuple[float, ...]

    @property
    def peak(self) -> int:
        """Which of `tokens` the peak is."""
        return self.position - self.start


def read(folder: Any) -> pa.Table:
    """The exemplars of a run folder: a table of `schemas.EXEMPLARS`.

    Args:
        folder: a path, an object store's address, or a `RunFolder`.

    Raises:
        RunError: it holds none, or they are damaged.
    """
    return _read(folder, FILE)


def read_densities(folder: Any) -> pa.Table:
    """How often and how strongly each of its neurons is active: a table of `schemas.DENSITIES`; arguments and errors as
    in `read`."""
    return _read(folder, DENSITIES_FILE)


def _read(folder: Any, name: str) -> pa.Table:
    run = folder if isinstance(folder, RunFolder) else RunFolder(folder)
    if not run.place.exists(name):
        rule = f"holds no {name}"
        raise RunError(
            f"folder {quoted(str(run.place), 300)}", rule, "collect them: tracer exemplars TEXTS --out FOLDER"
        )
    return run.read_output(name)


def of_neuron(table: pa.Table, layer: int, neuron: int, polarity: int) -> list[Exemplar]:
    """A neuron's exemplars, the strongest first, then those at each quantile, the highest first; none if it has none.

    Args:
        table: as `read` gives it. polarity: 1 or -1, the sign of the neuron's value.
    """
    chosen = (pc.field("layer") == layer) & (pc.field("neuron") == neuron) & (pc.field("polarity") == polarity)
    rows = table.filter(chosen).drop_columns(["layer", "neuron", "polarity"]).to_pylist()
    found = [Exemplar(**row | {"tokens": tuple(row["tokens"]), "values": tuple(row["values"])}) for row in rows]
    return sorted(found, key=lambda one: (-_level(one.kind), one.rank))


def neurons_of(table: pa.Table) -> list[tuple[int, int, int]]:
    """The (layer, neuron, polarity)s that have exemplars, in that order."""
    rows = table.select(["layer", "neuron", "polarity"]).group_by(["layer", "neuron", "polarity"]).aggregate([])
    return sorted((row["layer"], row["neuron"], row["polarity"]) for row in rows.to_pylist())


def _level(kind: str) -> float:
    return 101.0 if kind == TOP else float(kind.removeprefix("q"))


def window(exemplar: Exemplar) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Tokens and values around the peak. A text's first token, where many models have a huge value, is left out where
    it is larger than the peak: its statistics left it out (``skip_first``)."""
    tokens, values, peak = exemplar.tokens, exemplar.values, exemplar.peak
    whole = len(tokens) == len(values) and 0 <= peak < len(tokens) and None not in (*tokens, *values)
    if not (whole and np.isfinite((exemplar.value, *values)).all()):
        rule = f"holds an exemplar of document {exemplar.document} whose tokens and values do not agree"
        raise RunError(f"file {FILE!r}", rule, "it is damaged: collect them again")
    first = max(0, peak - WIDTH * 3 // 4)
    if first == 0 == exemplar.start and peak > 0 and abs(values[0]) > abs(values[peak]):
        first = 1
    return tokens[first : first + WIDTH], values[first : first + WIDTH]
