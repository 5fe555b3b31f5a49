"""What a run folder knows of one neuron: its row, its strongest prompts, its description and its exemplars.

Knows which tables a folder may have beside its nodes. Refuses to know how they came about, and how they are shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tracer.errors import RunError, quoted
from tracer.settings import ModelRecord
from tracer.store import aggregation, one_prompt, schemas
from tracer.store.run_folder import RunFolder

_TABLES = {
    "neurons": aggregation.NEURONS,
    "top_prompts": aggregation.TOP_PROMPTS,
    "descriptions": schemas.DESCRIPTIONS,
    "exemplars": schemas.EXEMPLARS,
    "densities": schemas.DENSITIES,
}


@dataclass(frozen=True)
class Known:
    """What a folder knows of a neuron; an empty list where it has no such table, or nothing in it.

    Attributes:
        neurons: its row of neurons.parquet: how often, and how strongly, it is in circuits.
        top_prompts: where its attribution is largest, with the prompt's ``text``.
        descriptions, exemplars, densities: rows of these tables.
    """

    neurons: list[dict[str, Any]] = field(default_factory=list)
    top_prompts: list[dict[str, Any]] = field(default_factory=list)
    descriptions: list[dict[str, Any]] = field(default_factory=list)
    exemplars: list[dict[str, Any]] = field(default_factory=list)
    densities: list[dict[str, Any]] = field(default_factory=list)


def read(address: Any, layer: int, neuron: int) -> Known:
    """What a run folder knows of a neuron.

    Raises:
        RunError: there is no run, one without MLP activations, or a table of it is damaged.
    """
    check_of_neurons(address, one_prompt.read_record(address))
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, schema in _TABLES.items():
        table = one_prompt.read_beside(address, f"{name}.parquet", schema)
        rows[name] = [] if table is None else _of(table, layer, neuron)
    texts = texts_of(RunFolder(address), {row["prompt_id"] for row in rows["top_prompts"]})
    rows["top_prompts"] = [row | {"text": texts.get(row["prompt_id"])} for row in rows["top_prompts"]]
    return Known(**rows)


def check_of_neurons(address: Any, record: Mapping[str, Any]) -> None:
    """Refuse a run whose nodes are no MLP activations.

    Raises:
        RunError: it is in another basis.
    """
    made: Any = record.get("job") or (record.get("circuit") or {}).get("settings") or {}
    if (basis := made.get("basis", "activation")) != "activation":
        rule = f"is in the basis {basis!r}, which has no neurons"
        raise RunError(f"run {quoted(str(address), 300)}", rule, "give a run in the basis 'activation'")


def model_of(address: Any) -> ModelRecord:
    """The model that a run is of.

    Raises:
        RunError: there is no run, or it says of no model.
    """
    record = one_prompt.read_record(address)
    found: Any = record.get("model") or (record.get("circuit") or {}).get("model")
    if not isinstance(found, Mapping):
        raise RunError(f"run {quoted(str(address), 300)}", "does not say of which model it is", "give --model")
    return ModelRecord.model_validate(found)


def _of(table: pa.Table, layer: int, neuron: int) -> list[dict[str, Any]]:
    return table.filter((pc.field("layer") == layer) & (pc.field("neuron") == neuron)).to_pylist()


def texts_of(folder: RunFolder, prompts: set[int]) -> dict[int, str]:
    """The texts of some prompts of a run, by their ids."""
    found = dict[int, str]()
    for commit in folder.commits() if prompts else ():
        table = folder.read_committed(commit, "prompts", ["prompt_id", "text"])
        rows = table.filter(pc.field("prompt_id").isin(sorted(prompts))).to_pylist()
        found |= {row["prompt_id"]: row["text"] for row in rows}
    return found
