"""Supernodes at the end of a run: its circuit's neurons grouped by their profiles over all prompts, in supernodes.json.

Knows what becomes of a circuit that cannot be grouped: a file without groups that says why, since a run that took long
does not fail by it. Refuses to know how neurons are grouped (meaning/supernodes.py).
"""

from __future__ import annotations

import functools

from tracer.circuit import supernodes_file
from tracer.circuit.from_run import circuit_of
from tracer.circuit.supernodes_file import Supernodes
from tracer.errors import JobError, first_line
from tracer.meaning import profiles
from tracer.meaning.supernodes import grouped, table_of
from tracer.runs.jobs import DatasetJob
from tracer.store.run_folder import RunFolder


def write_supernodes(job: DatasetJob, folder: RunFolder) -> None:
    """Write supernodes.json of a run that has a circuit; nothing where the job does not ask for it.

    Promoted tokens and descriptions that lie in the folder name the groups.

    Raises:
        RunError: tables that are damaged.
    """
    if job.supernodes is None or not folder.place.exists("circuit.parquet"):
        return
    address = folder.place.address
    graph = circuit_of(address)
    try:
        tokens, descriptions = (table_of(address, name) for name in ("tokens", "descriptions"))
        found = grouped(graph, functools.partial(profiles.parts, address), job.supernodes, tokens, descriptions)
        file = found.file.model_copy(update={"how": {**found.file.how, "notes": list(found.notes)}})
    except JobError as error:
        file = Supernodes(circuit=graph.fingerprint, how={"problem": first_line(error)})
    supernodes_file.write_to_run(address, file)
