"""Run folders as the version before this one wrote them, made of fresh ones: schema version 2."""

from __future__ import annotations

import hashlib
from typing import Any

import pyarrow.parquet as pq

from tracer.store.storage import Storage

OLD_NAMES = {"unexplained": "residual", "bias_share": "remainder"}


def make_old(folder: Any) -> None:
    """Rewrite a run of one prompt or of many, in place: old column names, no gradient, the old record."""
    place = Storage(folder)
    tables = [name for name, _ in place.files(recursive=True) if name.endswith(".parquet") and name != "input.parquet"]
    for name in tables:
        _rewrite(place, name)
    record = place.read_json("run.json")
    record.pop("digest")
    place.write_json("run.json", _old_record(record))
    for name, _ in place.files("_commits"):
        commit = place.read_json(name)
        commit.pop("digest")
        if record["kind"] == "dataset":
            commit["sizes"] = {table: place.size(file) for table, file in commit["files"].items()}
            commit["sha256"] = {table: _sha256(place, file) for table, file in commit["files"].items()}
        else:
            commit = {key: commit[key] for key in ("shard", "files", "rows")}
        place.write_json(name, commit)
    success = place.read_json("_SUCCESS.json")
    files = [name for name in success.pop("files") if name != "run.json" and record["kind"] == "dataset"]
    del success["commits"]
    place.write_json("_SUCCESS.json", success | {"files": {name: _sha256(place, name) for name in files}})


def _rewrite(place: Storage, name: str) -> None:
    with pq.ParquetFile(place.path(name), filesystem=place.fs) as file:
        table = file.read()
    metadata = {**(table.schema.metadata or {}), b"schema_version": b"2"}
    table = table.drop_columns([column for column in table.column_names if column == "gradient"])
    table = table.rename_columns([OLD_NAMES.get(column, column) for column in table.column_names])
    with place.writing(name) as sink:
        pq.write_table(table.replace_schema_metadata(metadata), sink)


def _old_record(record: dict[str, Any]) -> dict[str, Any]:
    old = record | {"schema_version": "2"}
    if "circuit" in record:
        old["circuit"] = {OLD_NAMES.get(name, name): value for name, value in record["circuit"].items()}
    return old


def _sha256(place: Storage, name: str) -> str:
    return hashlib.sha256(place.read(name)).hexdigest()
