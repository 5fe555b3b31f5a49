"""One side of a comparison: prompts with their metric, and what every node of them was attributed.

Knows the three places that a side comes from: a run's folder, a circuit, or a model that is asked now. Refuses to know
any other side.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

import numpy as np
import pyarrow as pa

from tracer.attribution.selection import Selection
from tracer.attribution.trace import trace_all
from tracer.circuit.circuit import Circuit, Graph, Traced, load_graph
from tracer.circuit.from_run import circuit_of, settings_of
from tracer.comparison.differences import Array
from tracer.errors import JobError, RunError, quoted
from tracer.experts import DENSE, Numbering
from tracer.model.model import Model
from tracer.prompts import Prompt
from tracer.settings import ModelRecord, Settings
from tracer.store import one_prompt
from tracer.store.columns import neuron_rows, split_key
from tracer.store.parquet import opened, rows_of
from tracer.store.run_folder import RunFolder

Parts = Callable[[], Iterator[tuple[slice, Array]]]
"""Attributions of all neurons, some prompts at a time: [prompt, layer, position, neuron]; one position where they are
summed over all."""

_PROMPT = ("prompt_id", "user_id", "text", "token_ids", "status", "metric")
_SAME = frozenset({"name", "revision", "adapter", "gguf", "fingerprint", "dtype"})
"""What the records of two models may differ in that have the same neurons."""


@dataclass(frozen=True)
class Asked:
    """A prompt of a side; its `metric` is NaN where that is not known."""

    id: str | None
    text: str | None
    token_ids: tuple[int, ...]
    metric: float


@dataclass(frozen=True, eq=False)
class Kept:
    """The nodes that prompts keep, a row for each: the prompt's number, its place, its values (float64)."""

    prompt: Array
    layer: Array
    position: Array
    neuron: Array
    attribution: Array
    activation: Array

    def of(self, prompts: Array) -> Kept:
        """The rows of these prompts, which get the numbers 0, 1, ... in this order."""
        numbers = np.full(int(max(self.prompt.max(initial=-1), prompts.max(initial=-1))) + 1, -1)
        numbers[prompts] = np.arange(len(prompts))
        taken = numbers[self.prompt] >= 0
        rows = {name: values[taken] for name, values in vars(self).items()}
        return Kept(**rows | {"prompt": numbers[self.prompt][taken]})

    def keys(self, positions: bool) -> Array:
        """Layer, position and neuron of each row, int64 [row, 3]; position -1 where positions are summed over."""
        at = self.position if positions else np.full_like(self.position, -1)
        return np.stack([self.layer, at, self.neuron], axis=1).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Side:
    """What is compared.

    Attributes:
        name: of it, in tables. model, settings: how it was made; None of an imported graph.
        prompts: those that went well. kept: their nodes.
        rule: by which its circuit is chosen out of its mean attributions; None for all that is kept.
        parts: attributions of all neurons; None where only those that are kept are known.
        summed: whether those of `parts` are summed over positions.
        graph: what a page shows of it; None where there is none.
        faithfulness: size, estimate and both ends at each size that its circuit was tested at.
    """

    name: str
    n_layers: int
    model: ModelRecord | None
    settings: Settings | None
    prompts: tuple[Asked, ...]
    kept: Kept
    rule: Selection | None = None
    parts: Parts | None = None
    summed: bool = True
    graph: Graph | None = None
    faithfulness: tuple[tuple[float, ...], ...] = ()

    @property
    def numbering(self) -> Numbering:
        """How its neurons are numbered; of an imported graph no expert is known."""
        return DENSE if self.model is None or self.settings is None else self.model.numbering(self.settings.basis)

    def named(self, name: str) -> Side:
        """The same under another name."""
        return replace(self, name=name)

    def knows_all(self, positions: bool) -> bool:
        """Whether every neuron's attribution is known, at every position where that is asked."""
        return self.parts is not None and not (positions and self.summed)


# --------------------------------------------------------------------------------------------------- a graph


def of_graph(graph: Graph, name: str) -> Side:
    """A side of one prompt.

    Raises:
        JobError: the graph has no attributions, which an imported one may lack.
    """
    table = graph.neurons
    if table["attribution"].null_count:
        rule = "has neurons without an attribution, by which graphs are compared"
        raise JobError(f"graph {quoted(name)}", rule, "compare graphs that tracer made, or exported with attributions")
    metric = graph.metric if isinstance(graph, Circuit) else math.nan
    ids = tuple(row["neuron"] for row in graph.rows("embedding"))  # negative where an imported graph names none
    asked = Asked(getattr(graph, "user_id", None), graph.text, ids if min(ids, default=-1) >= 0 else (), metric)
    columns = {end: table[end].to_numpy().astype(np.float64) for end in ("attribution", "activation")}
    place = {end: table[end].to_numpy().astype(np.int64) for end in ("layer", "position", "neuron")}
    return Side(
        name=name,
        n_layers=graph.n_layers,
        model=graph.model if isinstance(graph, Traced) else None,
        settings=graph.settings if isinstance(graph, Traced) else None,
        prompts=(asked,),
        kept=Kept(prompt=np.zeros(table.num_rows, np.int64), **place, **columns),
        graph=graph,
    )


# ----------------------------------------------------------------------------------------------------- a run


def of_run(address: Any, name: str | None = None) -> Side:
    """A side from a run folder: of one prompt, or of a dataset.

    Raises:
        RunError: no such run, one of another kind, or damaged. JobError: an imported graph without attributions.
    """
    name = name or PurePath(str(address)).name
    kind = one_prompt.read_record(address).get("kind")
    if kind in ("trace", "graph"):
        return of_graph(load_graph(address), name)
    if kind != "dataset":
        step = "give the runs of datasets or prompts"
        raise RunError(f"run {quoted(str(address), 300)}", f"is a {kind}, which keeps no nodes of prompts", step)
    folder = RunFolder(address)
    files, gaps = folder.tables(("prompts", "nodes", "values"))
    if gaps:
        raise RunError(f"run {quoted(str(address), 300)}", gaps[0], "repeat the run command, then compare it")
    record, fs = folder.record() or {}, folder.place.fs
    ids, prompts = _prompts(files.get("prompts", ()), fs)
    if not prompts:
        raise RunError(f"run {quoted(str(address), 300)}", "has no prompt that went well", "see 'tracer status'")
    job, model = record["job"], ModelRecord.model_validate(record["model"])
    rule: dict[str, Any] = {end: job.get(end) for end in ("nodes", "threshold", "mass")}
    values = files.get("values")
    return Side(
        name=name,
        n_layers=model.n_layers,
        model=model,
        settings=settings_of(record),
        prompts=tuple(prompts),
        kept=_kept(files.get("nodes", ()), fs, ids),
        rule=Selection.of(**rule),
        parts=None if values is None else lambda: _values(values, fs, ids, model.n_layers),
        graph=circuit_of(address) if folder.place.exists("circuit.parquet") else None,
        faithfulness=_faithfulness(folder),
    )


def _prompts(files: Sequence[str], fs: Any) -> tuple[Array, list[Asked]]:
    """The prompts that have a result, and their ids, ascending."""
    ids, found = [], list[Asked]()
    for path in files:
        for row in _table(path, fs, _PROMPT).to_pylist():
            if row["status"] == "ok":
                ids.append(row["prompt_id"])
                metric = math.nan if row["metric"] is None else float(row["metric"])
                found.append(Asked(row["user_id"], row["text"], tuple(row["token_ids"] or ()), metric))
    return np.array(ids, np.int64), found


def _kept(files: Sequence[str], fs: Any, ids: Array) -> Kept:
    """The neurons' rows of nodes files."""
    names = {"prompt": np.int64, "layer": np.int64, "position": np.int64, "neuron": np.int64}
    found = {name: [np.empty(0, kind)] for name, kind in (names | dict.fromkeys(_VALUES, np.float64)).items()}
    with closing(neuron_rows(files, fs, ["position", *_VALUES])) as parts:
        for part in parts:
            part["layer"], part["neuron"] = split_key(part.pop("key"))
            part["prompt"] = np.searchsorted(ids, part["prompt"])
            for name, values in found.items():
                values.append(part[name].astype(values[0].dtype))
    return Kept(**{name: np.concatenate(values) for name, values in found.items()})


_VALUES = ("attribution", "activation")


def _values(files: Sequence[str], fs: Any, ids: Array, n_layers: int) -> Iterator[tuple[slice, Array]]:
    """All neurons' attributions, a file's prompts at a time."""
    first = 0
    for path in files:
        table = _table(path, fs, ("prompt_id", "layer", "attributions"))
        if not table.num_rows:
            continue
        flat = table["attributions"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        count = table.num_rows // n_layers
        mine = table["prompt_id"].to_numpy()[::n_layers]
        if table.num_rows % n_layers or not np.array_equal(mine, ids[first : first + count]):
            raise RunError(f"file {quoted(path, 200)}", "does not fit its run's prompts", "repeat the run command")
        yield slice(first, first + count), flat.reshape(count, n_layers, 1, -1)
        first += count


def _table(path: str, fs: Any, columns: Sequence[str]) -> pa.Table:
    """Some columns of a committed table file."""
    try:
        with opened(path, fs) as file:
            return rows_of(file, list(columns))
    except (OSError, pa.ArrowException, KeyError) as error:
        raise RunError(f"file {quoted(path, 200)}", "is missing or damaged", "repeat the run command") from error


def _faithfulness(folder: RunFolder) -> tuple[tuple[float, ...], ...]:
    """What a run's evaluation says of its circuit, by size; nothing where it has none."""
    if not folder.place.exists("evaluation.json"):
        return ()
    for problem in folder.check_outputs(["evaluation.json"]):
        raise RunError(f"run {quoted(str(folder.place), 300)}", problem, "it is damaged: repeat the run command")
    curves = json.loads(folder.place.read("evaluation.json"))["curves"]
    found, nothing = curves["faithfulness"], [None] * len(curves["sizes"])
    columns = (curves["sizes"], *(found.get(end) or nothing for end in ("estimate", "low", "high")))
    return tuple(tuple(math.nan if one is None else float(one) for one in row) for row in zip(*columns, strict=True))


# --------------------------------------------------------------------------------------------------- a model


def of_model(
    model: Model,
    prompts: Sequence[Prompt],
    name: str,
    *,
    positions: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **how: Any,
) -> Side:
    """A side that is traced now: every neuron's attribution on every prompt is kept, 4 bytes each.

    Args:
        positions: keep them by position. progress, how: as of `tracer.trace`.

    Raises:
        JobError, ModelError, RemoteError: as `tracer.trace`.
    """
    whole, skip = list[Array](), int(bool(how.get("skip_first")))

    def take(nodes: Any) -> None:
        at = nodes if positions else nodes[:, skip:].double().sum(1, keepdim=True)
        whole.append(at.float().cpu().numpy())

    rule: dict[str, Any] = {end: how.get(end) for end in ("nodes", "threshold", "mass")}
    chosen = Selection.of(**rule)
    circuits = list(trace_all(model, list(prompts), **how, whole=take, progress=progress))
    sides = [of_graph(circuit, name) for circuit in circuits]
    lengths = {len(circuit.token_ids) for circuit in circuits}
    if positions and len(lengths) > 1:
        raise _uneven(name, lengths)
    columns = {end: np.concatenate([getattr(side.kept, end) for side in sides]) for end in vars(sides[0].kept)}
    columns["prompt"] = np.repeat(np.arange(len(sides)), [side.kept.prompt.size for side in sides])
    return replace(
        sides[0],
        prompts=tuple(side.prompts[0] for side in sides),
        kept=Kept(**columns),
        rule=chosen,
        parts=lambda: ((slice(at, at + 1), one[None]) for at, one in enumerate(whole)),
        summed=not positions,
        graph=sides[0].graph if len(sides) == 1 else None,
    )


def _uneven(name: str, lengths: set[int]) -> JobError:
    rule = f"has prompts of {min(lengths)} to {max(lengths)} tokens, and nodes are matched by position"
    return JobError(f"side {quoted(name)}", rule, "give prompts of one length, or match neurons wherever they are")


# ------------------------------------------------------------------------------------------ what fits together


def check_alike(sides: Sequence[Side], positions: bool) -> list[str]:
    """Refuse sides whose nodes or numbers are not of one kind; what else they differ in, in sentences.

    Raises:
        JobError: other neurons, other tokens of the same text, another basis or metric; or prompts of several lengths
            where nodes are matched by position.
    """
    first, said = sides[0], list[str]()
    for other in sides[1:]:
        _check_models(first, other)
        said += _check_settings(first, other)
        _check_tokens(first, other)
    if positions:
        lengths = {len(asked.token_ids) for side in sides for asked in side.prompts}
        if len(lengths) > 1:
            raise _uneven(f"{first.name}, ...", lengths)
    return list(dict.fromkeys(said))


def _check_models(one: Side, other: Side) -> None:
    if one.n_layers != other.n_layers:
        raise _other_neurons(one, other, [f"{one.n_layers} and {other.n_layers} layers"])
    if one.model is None or other.model is None:
        return
    mine, its = (side.model.model_dump(mode="json") for side in (one, other) if side.model is not None)
    names = sorted((mine.keys() | its.keys()) - _SAME)
    if differing := [
        f"{name} {mine.get(name)} and {its.get(name)}" for name in names if mine.get(name) != its.get(name)
    ]:
        raise _other_neurons(one, other, differing)


def _other_neurons(one: Side, other: Side, differing: Sequence[str]) -> JobError:
    rule = f"are not of the same architecture ({', '.join(differing)}): a neuron of one has none of the other beside it"
    step = "compare checkpoints, adapters or prompts of one model"
    return JobError(f"{quoted(one.name)} and {quoted(other.name)}", rule, step)


def _check_settings(one: Side, other: Side) -> list[str]:
    """Refuse numbers in other units; say where the same number was found in another way."""
    if one.settings is None or other.settings is None:
        return []
    mine, its = one.settings.record(), other.settings.record()
    for name in ("basis", "metric"):
        if mine[name] != its[name]:
            rule = f"were traced with {name} {mine[name]} and {its[name]}, so that their numbers are not of one kind"
            raise JobError(f"{quoted(one.name)} and {quoted(other.name)}", rule, f"trace both with one {name}")
    differing = [f"{name} {mine[name]} and {its[name]}" for name in mine if mine[name] != its[name]]
    return [f"{one.name} and {other.name} were traced otherwise: {', '.join(differing)}"] if differing else []


def _check_tokens(one: Side, other: Side) -> None:
    """Refuse another tokenizer, which is seen by what it makes of the same text."""
    known = {asked.text: asked.token_ids for asked in one.prompts if asked.text is not None and asked.token_ids}
    for asked in other.prompts:
        ids = known.get(asked.text or "", asked.token_ids)
        if asked.token_ids and ids != asked.token_ids:
            rule = f"have other tokens for the same text ({quoted(asked.text, 80)}): another tokenizer, or another BOS"
            step = "compare models with the same tokenizer, asked in the same way"
            raise JobError(f"{quoted(one.name)} and {quoted(other.name)}", rule, step)
