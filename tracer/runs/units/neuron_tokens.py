"""The end of a run, ``tokens``: what the weights say of the strongest neurons.

Knows how many neurons and tokens. Refuses to know which are strongest (meaning/strongest.py), and what is read of the
weights (meaning/tokens.py).
"""

from __future__ import annotations

from tracer.meaning import tokens
from tracer.meaning.strongest import of_dataset
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
    if job.tokens is not None and (neurons := of_dataset(folder)[: job.tokens]):
        found = tokens.neuron_tokens(model, neurons, LIST, basis=job.basis)
        folder.write_table("tokens.parquet", tokens.table_of(found))
