"""The strongest neurons of a run: of a dataset's circuit, or of one prompt's.

Knows which of a run's tables says so. Refuses to know what is then asked of them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from tracer.circuit.circuit import load_graph
from tracer.errors import RunError, quoted
from tracer.meaning.known import check_of_neurons, texts_of
from tracer.settings import ModelRecord
from tracer.store.one_prompt import read_record
from tracer.store.run_folder import RunFolder


class Strongest(NamedTuple):
    """(Layer, neuron)s, the strongest first, or a job's own, which may be (layer, expert, neuron); and the model that
    the run was on, if it says which."""

    neurons: tuple[tuple[int, ...], ...]
    model: ModelRecord | None


def strongest(address: Any, count: int) -> Strongest:
    """The `count` neurons of a run folder whose |attribution| is largest, summed over positions.

    Of a dataset's run that is the mean over prompts in its circuit, or where it has none the sum over the prompts that
    kept the neuron; of equal ones the lower comes first.

    Raises:
        RunError: no run there, one without attributions of MLP activations, or one that has not ended.
    """
    record, folder = read_record(address), RunFolder(address)
    name, kind = f"run {quoted(str(folder.place), 300)}", record["kind"]
    if kind == "dataset":
        check_of_neurons(address, record)
        rows = _of_dataset(folder)
        model = None if record.get("model") is None else ModelRecord.model_validate(record["model"])
    elif kind in ("trace", "graph"):
        check_of_neurons(address, record)
        graph = load_graph(address)
        model = getattr(graph, "model", None)
        rows = ((row["layer"], row["neuron"], row["attribution"]) for row in graph.rows("neuron"))
    else:
        raise RunError(name, f"is a run of kind {kind}, which keeps no circuit", "give the run of a dataset or prompt")
    if not (ranked := _ranked(rows)):
        raise RunError(name, "holds no neuron with an attribution", "give another, or name neurons")
    return Strongest(tuple(ranked[:count]), model)


def of_dataset(folder: RunFolder) -> list[tuple[int, int]]:
    """The (layer, neuron)s of a dataset's run in the order of `strongest`, whatever their basis.

    Raises:
        RunError: it has not ended.
    """
    return _ranked(_of_dataset(folder))


def _ranked(rows: Iterable[tuple[int, int, float | None]]) -> list[tuple[int, int]]:
    sums: dict[tuple[int, int], float] = defaultdict(float)
    for layer, neuron, value in rows:
        if value is not None and math.isfinite(value):
            sums[layer, neuron] += abs(value)
    return sorted(sums, key=lambda one: (-sums[one], one))


def asked_beside(address: Any, neurons: Sequence[tuple[int, int]]) -> pa.Table | None:
    """The prompts of a dataset's run where these neurons' |attribution| is largest: their rows of its top_prompts, each
    with the prompt's `text`. None of a run that has no such table.

    Raises:
        RunError: the run is damaged.
    """
    folder = RunFolder(address)
    if (table := folder.find_output("top_prompts.parquet")) is None:
        return None
    wanted = {*neurons}
    pairs = zip(table["layer"].to_pylist(), table["neuron"].to_pylist(), strict=True)
    table = table.filter(pa.array([pair in wanted for pair in pairs], pa.bool_()))
    texts = texts_of(folder, {*table["prompt_id"].to_pylist()})
    return table.append_column("text", pa.array([texts.get(at) for at in table["prompt_id"].to_pylist()], pa.string()))


def _of_dataset(folder: RunFolder) -> Iterable[tuple[int, int, float]]:
    if (table := folder.find_output("circuit.parquet")) is not None:
        return list(zip(*(table[key].to_pylist() for key in ("layer", "neuron", "mean_attribution")), strict=True))
    if not folder.place.exists("neurons.parquet"):
        name = f"run {quoted(str(folder.place), 300)}"
        raise RunError(name, "has no neurons.parquet: it is not finished", "repeat the run command")
    rows = folder.read_output("neurons.parquet").to_pylist()
    return [(row["layer"], row["neuron"], row["n_prompts"] * row["prompt_mean_abs"]) for row in rows]
