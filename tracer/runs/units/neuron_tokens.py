"""The end of a run, ``tokens``: what the weights say of the strongest neurons.

Knows which neurons of a run are strongest. Refuses to know what is read of the weights (meaning/tokens.py).
"""

from __future__ import annotations

from tracer.meaning import tokens
from tracer.model.model import Model
from tracer.runs.jobs import DatasetJob
from tracer.store.run_folder import RunFolder

LIST = 10
"""Tokens of each list."""


def write_tokens(model: Model, job: DatasetJob, folder: RunFolder) -> None:
    """Write tokens.parquet, both polarities of each neuron, the strongest first; nothing where no neuron was kept.

    Raises:
        ModelError, RemoteError: the weights cannot be read.
    """
    if job.tokens is not None and (neurons := strongest(folder, job.tokens)):
        found = tokens.neuron_tokens(model, neurons, LIST, basis=job.basis)
        folder.write_table("tokens.parquet", tokens.table_of(found))


def strongest(folder: RunFolder, count: int) -> list[tuple[int, int]]:
    """The neurons, wherever they are, that the dataset's circuit holds, strongest mean attribution first; without a
    circuit those of the prompts' circuits, by their |attribution| summed over prompts."""
    if folder.place.exists("circuit.parquet"):
        rows = folder.read_output("circuit.parquet").to_pylist()
    else:
        rows = folder.read_output("neurons.parquet").to_pylist()
        rows.sort(key=lambda row: -row["n_prompts"] * row["prompt_mean_abs"])
    return list(dict.fromkeys((row["layer"], row["neuron"]) for row in rows))[:count]
