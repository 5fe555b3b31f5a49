"""The run folder: what a run leaves on disk, and the only file that writes Parquet.

    run.json           what was run: the resolved job, its fingerprint, versions, model and weight hash
    input.parquet      the prompts as given; row group k is shard k
    prompts/ nodes/ edges/   uniquely named Parquet files; only those that a commit names count
    _commits/SHARD.json      the shard is done; names its files and rows
    neurons.parquet    the nodes, aggregated per (layer, neuron)
    progress.json, _SUCCESS.json

Knows table schemas, files and their order of writing (a commit after its files, by rename). Refuses to know models
and circuits. Nothing here is ever unpickled: Parquet and JSON only.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow.fs import FileSystem, LocalFileSystem
from pydantic import BaseModel, Field, ValidationError

from tracer.errors import RunError, quoted
from tracer.store.schemas import EDGES, INPUT, NODES, PROMPTS, READABLE, SCHEMA_VERSION, SCHEMAS, stored_names

__all__ = ["EDGES", "INPUT", "NODES", "PROMPTS", "SCHEMAS", "SCHEMA_VERSION"]


def fingerprint(job: Mapping[str, Any]) -> str:
    """A hash of everything that decides a run's numbers."""
    return hashlib.sha256(json.dumps(job, sort_keys=True, default=str).encode()).hexdigest()


def write_run(folder: Path, record: Mapping[str, Any], tables: Mapping[str, pa.Table], overwrite: bool = False) -> None:
    """Write a finished run of one shard.

    A folder that holds the same job (by fingerprint) is replaced; any other content is never touched.

    Args:
        folder: created if it is not there.
        record: what run.json holds; its ``fingerprint`` names the job.
        tables: by name, in the schemas of this module; other columns are refused by Arrow.
        overwrite: replace another job's run.

    Raises:
        RunError: the folder cannot be written, or holds something else.
    """
    try:
        _clear(folder, str(record["fingerprint"]), overwrite)
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / "run.json", {"schema_version": SCHEMA_VERSION, **record})
        files = {name: _write_shard(folder, name, table) for name, table in tables.items()}
        _write_table(folder / "input.parquet", _as_input(tables["prompts"]))
        _write_neurons(folder, files["nodes"], tables["nodes"])
        rows = {name: table.num_rows for name, table in tables.items()}
        (folder / "_commits").mkdir(exist_ok=True)
        _write_json(folder / "_commits" / "0.json", {"shard": 0, "files": files, "rows": rows})
        _write_json(folder / "progress.json", {"shards": 1, "committed": 1, "prompts": rows["prompts"]})
        _write_json(folder / "_SUCCESS.json", {"shards": 1, "rows": rows})
    except OSError as error:
        raise RunError(
            f"folder {quoted(str(folder), 300)}",
            f"cannot be written ({error.strerror or error})",
            "choose another with --out",
        ) from error


def check_place(folder: Path) -> None:
    """Refuse, before anything is computed, a folder that could not be written afterwards.

    Raises:
        RunError: it, or the folder it would be made in, is not a writable folder.
    """
    _check_ours(folder)
    try:
        made = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{uuid.uuid4().hex[:8]}"
        probe.touch()
        probe.unlink()
        for place in made:  # what comes after may yet fail, and leaves nothing behind then
            place.rmdir()
    except OSError as error:
        raise RunError(
            f"folder {quoted(str(folder), 300)}",
            f"cannot be written ({error.strerror or error})",
            "choose another with --out",
        ) from error


def read_run(folder: Path) -> tuple[dict[str, Any], dict[str, pa.Table]]:
    """The record and the committed tables of a run.

    Raises:
        RunError: no run there, another schema version, or a file that is missing or damaged.
    """
    record = read_record(folder)
    tables: dict[str, list[pa.Table]] = {name: [] for name in SCHEMAS}
    commits = sorted((folder / "_commits").glob("*.json"), key=lambda path: (len(path.stem), path.stem))
    if not commits:
        raise RunError(f"folder {quoted(str(folder), 300)}", "holds a run with nothing committed", "run it again")
    for commit in commits:
        shard = _read_commit(commit)
        for name, file in shard.files.items():
            table = _read_table(folder / file, SCHEMAS[name])
            if table.num_rows != shard.rows.get(name):
                rule = f"has {table.num_rows} rows, its commit says {shard.rows.get(name)}"
                raise RunError(f"file {quoted(file)}", rule, "it is damaged: run it again")
            tables[name].append(table)
    return record, {name: pa.concat_tables(parts) for name, parts in tables.items() if parts}


def _check_ours(folder: Path) -> bool:
    """Refuse a place that holds anything but a run; whether it holds one."""
    if folder.exists() and not folder.is_dir():
        raise RunError(f"path {quoted(str(folder), 300)}", "is a file, not a folder", "choose another with --out")
    # A leading dot marks a temporary file of ours: what an interrupted write leaves behind.
    if not folder.exists() or all(path.name.startswith(".") for path in folder.iterdir()):
        return False
    if not (folder / "run.json").is_file():
        rule = "holds files that are not a run"
        raise RunError(f"folder {quoted(str(folder), 300)}", rule, "choose another with --out")
    return True


def _clear(folder: Path, fingerprint_of_job: str, overwrite: bool) -> None:
    """Make way for a run: remove the same job's run, refuse anything else."""
    if not _check_ours(folder):
        return
    if not overwrite and read_record(folder).get("fingerprint") != fingerprint_of_job:
        raise RunError(
            f"folder {quoted(str(folder), 300)}",
            "holds another run",
            "choose another with --out, or pass --overwrite",
        )
    for marker in (*(folder / "_commits").glob("*.json"), folder / "_SUCCESS.json"):
        marker.unlink(missing_ok=True)
    for name in SCHEMAS:
        for file in (folder / name).glob("*.parquet"):
            file.unlink()


def _write_shard(folder: Path, name: str, table: pa.Table) -> str:
    (folder / name).mkdir(exist_ok=True)
    file = f"{name}/0-{uuid.uuid4().hex[:12]}.parquet"
    _write_table(folder / file, table.cast(SCHEMAS[name]))
    return file


def _write_table(path: Path, table: pa.Table) -> None:
    with _whole(path) as temporary:
        temporary.write_bytes(encoded(table))


def encoded(table: pa.Table) -> bytes:
    """A table as a Parquet file: Zstandard, dictionaries on keys and byte-stream split on floats, the smallest and
    fastest to read of the layouts we tried."""
    sink = pa.BufferOutputStream()
    with writer(sink, table.schema) as parquet:
        parquet.write_table(table)
    return sink.getvalue().to_pybytes()


def writer(sink: Any, schema: pa.Schema) -> pq.ParquetWriter:
    """A Parquet writer in the layout of `encoded`, for tables that are written in parts."""
    floats = [field.name for field in schema if pa.types.is_floating(field.type)]
    keys = [field.name for field in schema if field.name not in floats and not pa.types.is_nested(field.type)]
    return pq.ParquetWriter(
        sink,
        schema.with_metadata({"schema_version": SCHEMA_VERSION}),
        compression="zstd",
        compression_level=3,
        use_dictionary=keys,  # pyright: ignore[reportArgumentType]
        use_byte_stream_split=floats or False,  # pyright: ignore[reportArgumentType]
    )


def opened(source: Any, fs: FileSystem | None = None, **options: Any) -> pq.ParquetFile:
    """A table file for reading.

    Raises:
        OSError, pa.ArrowException: it is missing or damaged.
    """
    try:
        return pq.ParquetFile(source, filesystem=fs, **options)
    except UnicodeDecodeError as error:
        raise pa.ArrowInvalid("the names of its columns are not text") from error


def rows_of(
    file: pq.ParquetFile,
    columns: Sequence[str] | None = None,
    groups: Sequence[int] | None = None,
    threads: bool = True,
) -> pa.Table:
    """The rows of a table file under today's column names; the one place that knows how older versions named them.

    Args:
        columns: those to read, in this order; all by default.
        groups: the row groups to read; all by default.
        threads: decode columns in several threads.

    Raises:
        KeyError: the file lacks a column.
        OSError, pa.ArrowException: it is damaged.
    """
    stored = {name: its for name, its in stored_names(file.schema_arrow.names).items() if name in (columns or (name,))}
    groups = range(file.num_row_groups) if groups is None else groups
    rows = file.read_row_groups(list(groups), [its for its in stored.values() if its], use_threads=threads)
    table = pa.table(
        {name: rows[its] if its else pa.nulls(rows.num_rows, NODES.field(name).type) for name, its in stored.items()}
    )
    return table if columns is None else table.select(list(columns))


def _read_table(path: Path, schema: pa.Schema) -> pa.Table:
    try:
        with opened(path) as file:
            table = rows_of(file)
    except (OSError, pa.ArrowException, KeyError) as error:
        raise RunError(f"file {quoted(path.name)}", "is missing or damaged", "run it again") from error
    if not table.schema.equals(schema):
        raise RunError(f"file {quoted(path.name)}", "has other columns than this version of tracer", "run it again")
    return table


def _write_neurons(folder: Path, file: str, nodes: pa.Table) -> None:
    """neurons.parquet; an imported graph whose neurons have no numbers has none."""
    from tracer.store import aggregation

    mine = nodes.filter(pc.field("kind") == "neuron")
    if not mine["attribution"].null_count and not mine["activation"].null_count:
        found = aggregation.neurons([str((folder / file).absolute())], LocalFileSystem())
        _write_table(folder / "neurons.parquet", found)


def _as_input(prompts: pa.Table) -> pa.Table:
    """The prompts as they were given, as far as the prompts table tells."""
    given = {"prompt_id", "user_id", "text", "token_ids", "target_ids", "foil_ids"}
    empty = {field.name: pa.nulls(prompts.num_rows, field.type) for field in INPUT}
    return pa.table({name: prompts[name] if name in given else nulls for name, nulls in empty.items()}, INPUT)


def read_record(folder: Path) -> dict[str, Any]:
    """What run.json holds.

    Raises:
        RunError: no run there, or another schema version.
    """
    path = folder / "run.json"
    if not path.is_file():
        raise RunError(
            f"folder {quoted(str(folder), 300)}", "holds no run (no run.json)", "give a folder made with --out"
        )
    record = _read_json(path)
    if record.get("schema_version") not in READABLE:
        raise RunError(
            f"run {quoted(str(folder), 300)}",
            f"has schema version {record.get('schema_version')!r}, this tracer reads {SCHEMA_VERSION!r}",
            "read it with the version that wrote it, or run it again",
        )
    return record


class _Commit(BaseModel):
    """What a commit marker holds: the shard, its files and their rows, by table."""

    shard: int
    files: dict[Literal["prompts", "nodes", "edges"], Annotated[str, Field(pattern=r"^[a-z]+/[\w.-]+\.parquet$")]]
    rows: dict[str, int]


def _read_commit(path: Path) -> _Commit:
    try:
        commit = _Commit.model_validate(_read_json(path))
    except ValidationError as error:
        raise RunError(f"commit {quoted(path.name)}", "does not name the files of its shard", "run it again") from error
    if path.stem != str(commit.shard) or set(commit.rows) != set(commit.files):
        raise RunError(f"commit {quoted(path.name)}", "is not that of its shard", "it is damaged: run it again")
    return commit


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"file {quoted(path.name)}", f"cannot be read ({error})", "run it again") from error
    if not isinstance(found, dict):
        raise RunError(f"file {quoted(path.name)}", "does not hold a JSON object", "run it again")
    return found


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with _whole(path) as temporary, temporary.open("w") as file:
        json.dump(content, file, indent=1, sort_keys=True, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name when it is written, and is removed when that fails."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
