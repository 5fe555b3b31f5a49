"""What folders know of a graph's neurons beside the graph itself: texts where they are strong, and which are always on.

Knows the tables and records in which that is kept, and that texts must be of the model that the graph is of. Refuses to
know how it came about, and how it is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ConfigDict, FiniteFloat, NonNegativeInt, ValidationError

from tracer.circuit.circuit import Graph, Traced
from tracer.circuit.said import Key, key_of
from tracer.errors import JobError, RunError, first_line, option, quoted, say
from tracer.meaning import exemplars
from tracer.meaning.exemplars import TOP, Exemplar, window
from tracer.records import Record
from tracer.settings import ModelRecord
from tracer.store import one_prompt
from tracer.store.run_folder import RunFolder

TOPS, QUANTILES = 5, 3
"""Texts of a neuron, at most: the strongest, and one of each of the highest quantiles."""
MOST = 1500
"""Texts of a graph, at most."""
EVALUATION = "evaluation.json"


class Constant(Record):
    """A neuron that is strong on unrelated prompts and next to without effect there; `evaluation.quality.AlwaysOn`."""

    model_config = ConfigDict(extra="ignore")

    layer: NonNegativeInt
    neuron: NonNegativeInt
    share: FiniteFloat
    attribution: FiniteFloat
    exact: FiniteFloat


@dataclass(frozen=True)
class Texts:
    """Of a neuron of one sign: exemplars, the strongest first, and how many `more` its table has."""

    kept: tuple[Exemplar, ...]
    more: int


@dataclass(frozen=True)
class Around:
    """What is known beside a graph.

    Attributes:
        texts: by neuron and sign. always_on: by (layer, neuron); None where nobody looked for them.
        left_out: neurons of the graph that have texts, of which none is kept, since there are more than `MOST`.
    """

    texts: Mapping[Key, Texts] = field(default_factory=dict)
    always_on: Mapping[tuple[int, int], Constant] | None = None
    left_out: int = 0


def around(graph: Graph, run: Any = None, collected: Any = None) -> Around:
    """What folders know of a graph's neurons.

    Args:
        run: the folder that the graph is of, if any: whether neurons were looked for that are always on (of a dataset's
            run, or of what `tracer evaluate` wrote there), and texts if it has any.
        collected: the folder of a run of exemplars.

    Raises:
        JobError: the texts are of another model, or the graph is of none.
        RunError: no exemplars in `collected`, or a table or record is damaged.
    """
    folder = None if run is None else RunFolder(run)
    texts = None
    if collected is not None:
        texts = _table(graph, collected)
    elif folder is not None and folder.place.exists(exemplars.FILE):
        texts = exemplars.read(folder)
    kept, left_out = ({}, 0) if texts is None else _texts(graph, texts)
    return Around(kept, _always_on(graph, folder), left_out)


def _table(graph: Graph, collected: Any) -> pa.Table:
    value = f"texts of {quoted(str(collected), 300)}"
    if not isinstance(graph, Traced) or graph.settings.basis != "activation":
        rule = "are of a model's MLP activations, which this graph's nodes are not"
        raise JobError(value, rule, f"leave out {option('exemplars')}")
    table, record = exemplars.read(collected), one_prompt.read_record(collected)
    try:
        model = ModelRecord.model_validate(record.get("model"))
    except ValidationError as error:
        raise RunError(value, f"do not say of which model ({first_line(error)})", "collect them again") from error
    if model.fingerprint != graph.model.fingerprint:
        step = "collect them on the graph's model: tracer exemplars TEXTS --of RUN"
        raise JobError(value, f"are of another model ({model.name}, {model.dtype})", step)
    return table


def _texts(graph: Graph, table: pa.Table) -> tuple[dict[Key, Texts], int]:
    """The texts of its neurons, those of the strongest first where there are too many; how many neurons got none."""
    keys = list(dict.fromkeys(key for row in _neurons(graph) for key in key_of(row)))
    wanted = {(key.layer, key.neuron) for key in keys}
    layers, numbers = ({pair[at] for pair in wanted} for at in (0, 1))
    own = table.filter(pc.field("layer").isin(sorted(layers)) & pc.field("neuron").isin(sorted(numbers)))
    there = {Key(*one) for one in exemplars.neurons_of(own)}
    found, room, left_out = dict[Key, Texts](), MOST, 0
    for key in keys:
        if key not in there:
            continue
        every = exemplars.of_neuron(own, *key)
        if room < TOPS + QUANTILES:
            left_out += 1
            continue
        kept = _chosen(every)
        found[key] = Texts(kept, len(every) - len(kept))
        room -= len(kept)
    return found, left_out


def _neurons(graph: Graph) -> list[dict[str, Any]]:
    rows = graph.nodes.filter(pc.field("kind") == "neuron")
    return rows.select(["layer", "neuron", "activation"]).to_pylist()


def _chosen(every: list[Exemplar]) -> tuple[Exemplar, ...]:
    """The strongest, and the first of each of the highest quantiles; `window` has seen that each is whole."""
    tops = [one for one in every if one.kind == TOP][:TOPS]
    firsts = {one.kind: one for one in reversed(every) if one.kind != TOP}
    quantiles = [one for one in every if firsts.get(one.kind) is one][:QUANTILES]
    for one in (*tops, *quantiles):
        window(one)
    return (*tops, *quantiles)


def _always_on(graph: Graph, folder: RunFolder | None) -> dict[tuple[int, int], Constant] | None:
    """Of a graph's own notes, its run's record, and its evaluation: what was found in any of them."""
    lists: list[Any] = [(graph.notes.get("always_on") or {}).get("neurons")]
    if folder is not None:
        lists.append(((folder.record() or {}).get("always_on") or {}).get("neurons"))
    try:
        known = [_constants(found) for found in lists if found is not None]
    except (ValidationError, TypeError) as error:
        rule = f"lists an always-on neuron that is none ({first_line(error)})"
        value = "the graph" if folder is None else f"run {quoted(str(folder.place), 300)}"
        raise RunError(value, rule, "it is damaged: make it again") from error
    tested = None if folder is None else _tested(folder)
    every = known if tested is None else [*known, tested]
    return {(one.layer, one.neuron): one for found in every for one in found} if every else None


def _constants(found: Any) -> list[Constant]:
    return [Constant.model_validate(one) for one in found]


def _tested(folder: RunFolder) -> list[Constant] | None:
    """What an evaluation found; None where it did not look, or is damaged, which is said: the graph stands without."""
    if not folder.place.exists(EVALUATION):
        return None
    try:
        found = folder.place.read_json(EVALUATION, "evaluate it again").get("always_on")
        return None if found is None else _constants(found)
    except (RunError, ValidationError, TypeError) as error:
        say([f"the always-on neurons of {EVALUATION} are not shown: {first_line(error)}"])
        return None
