"""The run of one prompt: a run folder of one shard, written at once and read as a whole, wherever it is.

Knows which folders may be written over, and in which order files appear: a reader finds a whole run or none. Refuses
to know how files are stored and hashed (store/run_folder.py), and what a circuit is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tracer.errors import RunError, first_line, option, quoted
from tracer.store import aggregation
from tracer.store.run_folder import Commit, RunFolder, is_ours
from tracer.store.schemas import SCHEMA_VERSION, SCHEMAS

_GIVEN = ["user_id", "text", "token_ids", "target_ids", "foil_ids"]
"""What the prompts table tells of the prompts as they were given."""
_SMALL = 2**16
"""Bytes of the marks and records of a run."""


def write_run(
    address: Any,
    record: Mapping[str, Any],
    tables: Mapping[str, pa.Table],
    overwrite: bool = False,
    beside: Mapping[str, pa.Table] | None = None,
) -> None:
    """Write a finished run of one shard.

    A folder that holds the same job (by fingerprint) is replaced; any other content is never touched.

    Args:
        address: a path, created if it is not there, or ``s3://`` or ``gs://``.
        record: what run.json holds; its ``fingerprint`` names the job.
        tables: by name, in the schemas of `schemas.SCHEMAS`; other columns are refused by Arrow.
        overwrite: replace another job's run.
        beside: further tables of the whole run, by file.

    Raises:
        RunError: the folder cannot be written, or holds something else.
    """
    folder = RunFolder(address)
    with _can_be_written(folder):
        folder.check()
        there = None if overwrite else folder.record()
        if there is not None and there.get("fingerprint") != record["fingerprint"]:
            raise _another(folder)
        # What is there goes when what takes its place is on the disk, and there is room for the rest.
        files = {name: folder.write_shard(name, 0, table, SCHEMAS[name]) for name, table in tables.items()}
        folder.place.make_room(sum(file.size for file in files.values()) + len(json.dumps(record)) + _SMALL)
        folder.clear(keep=[file.name for file in files.values()])
        folder.begin(record)
        commit, prompts = Commit.naming(0, files), tables["prompts"]
        folder.write_input(prompts.select(_GIVEN).to_pylist(), max(1, prompts.num_rows))
        _write_neurons(folder, commit.files["nodes"], tables["nodes"])
        for name, table in (beside or {}).items():
            folder.write_table(name, table)
        folder.commit(commit)
        folder.place.write_json("progress.json", {"shards": 1, "committed": 1, "prompts": prompts.num_rows})
        folder.seal(shards=1, rows=commit.rows)


def check_writable(address: Any, overwrite: bool = True, same: Callable[[dict[str, Any]], bool] | None = None) -> None:
    """Refuse, before anything is computed, a folder that could not be written afterwards; leaves nothing behind.

    Args:
        overwrite: another run that is there may be replaced.
        same: whether the run of this record, which is there, can be the one that is to be written; never if None.

    Raises:
        RunError: it holds something else, or it, or the folder it would be made in, is not a writable folder.
    """
    folder = RunFolder(address)
    local = folder.place.local
    with _can_be_written(folder):
        missing = [] if local is None else [path for path in (local, *local.parents) if not path.exists()]
        folder.check()
        for path in missing:
            path.rmdir()
        there = None if overwrite else folder.record()
        if there is not None and not (same is not None and same(there)):
            raise _another(folder)


def read_record(address: Any) -> dict[str, Any]:
    """What run.json holds.

    Raises:
        RunError: no run there, a damaged record, or another schema version.
    """
    folder = RunFolder(address)
    record = folder.record()
    if record is None:
        value, step = f"folder {quoted(str(folder.place), 300)}", "give the folder of a run"
        raise RunError(value, "holds no run (no run.json)", step)
    return record


def read_run(address: Any) -> tuple[dict[str, Any], dict[str, pa.Table]]:
    """The record and the committed tables of a run, each file as it was committed to the last byte.

    Raises:
        RunError: no run there, another schema version, or a file that is missing or damaged.
    """
    folder, record = RunFolder(address), read_record(address)
    tables: dict[str, list[pa.Table]] = {}
    for commit in _commits(folder):
        # Version 2 kept no hashes of a single prompt's files.
        hashed = record["schema_version"] == SCHEMA_VERSION or bool(commit.sha256)
        for problem in folder.problems(commit) if hashed else ():
            raise RunError(f"run {quoted(str(folder.place), 300)}", problem, "it is damaged: run it again")
        for name, file in commit.files.items():
            tables.setdefault(name, []).append(_read_table(folder, name, file, commit.rows[name]))
    for problem in folder.check_outputs():
        raise RunError(f"run {quoted(str(folder.place), 300)}", problem, "it is damaged: run it again")
    if not tables.keys() >= {"prompts", "nodes"}:
        rule = "holds a run with nothing committed"
        raise RunError(f"folder {quoted(str(folder.place), 300)}", rule, "run it again")
    return record, {name: pa.concat_tables(parts) for name, parts in tables.items()}


def read_beside(address: Any, name: str, schema: pa.Schema) -> pa.Table | None:
    """A table of the whole run that it need not have, in its schema; None where it is not there.

    Raises:
        RunError: it is damaged, or has other columns.
    """
    folder = RunFolder(address)
    if not folder.place.exists(name):
        return None
    try:
        return folder.read_output(name).select(schema.names).cast(schema)
    except (KeyError, pa.ArrowException) as error:
        rule = f"is damaged ({first_line(error)})"
        step = "make it again, or remove it: the run does not need it"
        raise RunError(f"file {quoted(name)} of run {quoted(str(folder.place), 300)}", rule, step) from error


def _commits(folder: RunFolder) -> Iterator[Commit]:
    """The commits of a run; a file that is none would have been another's part of it."""
    for name, _ in folder.place.files("_commits"):
        if name.endswith(".json") and not is_ours(name):
            raise RunError(f"commit {quoted(name)}", "is not that of a unit", "it is damaged: run it again")
    yield from folder.commits()


def _read_table(folder: RunFolder, name: str, file: str, rows: int) -> pa.Table:
    table = folder.read_table(file)
    if name not in SCHEMAS or not table.schema.equals(SCHEMAS[name]):
        raise RunError(f"file {quoted(file)}", "has other columns than this version of tracer", "run it again")
    if table.num_rows != rows:
        rule = f"has {table.num_rows} rows, its commit says {rows}"
        raise RunError(f"file {quoted(file)}", rule, "it is damaged: run it again")
    return table


def _write_neurons(folder: RunFolder, file: str, nodes: pa.Table) -> None:
    """neurons.parquet; an imported graph whose neurons have no numbers has none."""
    neurons = nodes.filter(pc.field("kind") == "neuron")
    if not neurons["attribution"].null_count and not neurons["activation"].null_count:
        folder.write_table("neurons.parquet", aggregation.neurons([folder.place.path(file)], folder.place.fs))


def _another(folder: RunFolder) -> RunError:
    step = f"choose another, or give {option('overwrite', True)}"
    return RunError(f"folder {quoted(str(folder.place), 300)}", "holds another run", step)


@contextmanager
def _can_be_written(folder: RunFolder) -> Iterator[None]:
    """What a file system refuses is the user's to fix."""
    try:
        yield
    except OSError as error:
        rule = f"cannot be written ({error.strerror or error})"
        raise RunError(f"folder {quoted(str(folder.place), 300)}", rule, "choose another") from error
