"""A query reads the run's tables and nothing else: 73 statements that try."""

from __future__ import annotations

from pathlib import Path

import pytest

from inline import InlinePool
from runs import lines
from tally import Attack
from tracer import Run, run
from tracer.errors import TracerError
from tracer.store import query

pytest.importorskip("duckdb")

SECRET = "the secret of another file"

READS = [
    "select * from read_text('{secret}')",
    "select * from read_blob('{secret}')",
    "select * from read_csv('{secret}')",
    "select * from read_csv_auto('{secret}')",
    "select * from read_json('{secret}')",
    "select * from read_json_auto('{secret}')",
    "select * from read_ndjson('{secret}')",
    "select * from read_parquet('{parquet}')",
    "select * from parquet_scan('{parquet}')",
    "select * from parquet_metadata('{parquet}')",
    "select * from parquet_schema('{parquet}')",
    "select * from parquet_file_metadata('{parquet}')",
    "select * from parquet_kv_metadata('{parquet}')",
    "select * from parquet_bloom_probe('{parquet}', 'x', 1)",
    "select * from '{secret}'",
    "select * from '{parquet}'",
    "from '{parquet}'",
    "from '{secret}'",
    "select * from glob('{folder}/*')",
    "select * from sniff_csv('{secret}')",
    "select * from '{folder}/*.parquet'",
    "select * from read_parquet(['{parquet}', '{parquet}'])",
    "select * from prompts, read_text('{secret}')",
    "with x as (select * from read_text('{secret}')) select * from x",
    "select (select content from read_text('{secret}')) as content from prompts",
    "select * from query('select * from read_text(''{secret}'')')",
    "select * from query_table('{secret}')",
    "select * from 'http://127.0.0.1:9/x.parquet'",
    "select * from read_parquet('s3://bucket/x.parquet')",
    "select * from read_csv('/etc/passwd')",
    "select * from read_text('/proc/self/environ')",
    "select * from read_text('../../../../../../etc/hostname')",
    "select getenv('HOME')",
    "describe select * from read_text('{secret}')",
    "summarize select * from '{parquet}'",
    "select * from sqlite_scan('{secret}', 'x')",
    "select * from postgres_scan('host=127.0.0.1', 'public', 'x')",
    "select * from python_table",
    "select * from secret_frame",
    "pivot (select * from read_text('{secret}')) on filename using first(content)",
]
"""Statements that read something else than the run's tables."""

WRITES = [
    "copy prompts to '{out}'",
    "copy (select * from prompts) to '{out}' (format parquet)",
    "copy prompts from '{secret}'",
    "export database '{out}'",
    "import database '{folder}'",
    "attach '{out}' as other",
    "attach '{out}' as other; create table other.x as select 1",
    "create table x as select * from prompts",
    "create view x as select 1",
    "create or replace view prompts as select 1",
    "create macro f(a) as a",
    "create type t as enum ('a')",
    "create schema s",
    "create sequence s",
    "create secret (type s3, key_id 'x', secret 'y')",
    "drop view prompts",
    "alter table prompts rename to other",
    "insert into prompts values (1)",
    "update prompts set text = 'x'",
    "delete from prompts",
    "install httpfs",
    "load httpfs",
    "load '{secret}'",
    "set enable_external_access = true",
    "set lock_configuration = false",
    "reset enable_external_access",
    "pragma disable_verify_parallelism",
    "pragma enable_profiling",
    "call pragma_version()",
    "checkpoint",
    "vacuum",
    "begin transaction",
    "use memory",
]
"""Statements that do something else than reading."""

secret_frame = [SECRET]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("statements")
    file = lines(folder / "prompts.jsonl", ({"text": f"prompt {number}"} for number in range(8)))
    return run(
        {"kind": "dataset", "input": {"path": file}, "shard_size": 4},
        folder / "run",
        pool=InlinePool(),
        factory="fake_runs:Tiny",
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_statements_read_the_tables_and_nothing_else(done: Run, tmp_path: Path, attack: Attack) -> None:
    assert len(READS + WRITES) == 73
    (tmp_path / "secret.txt").write_text(SECRET)
    (tmp_path / "secret.parquet").write_bytes(done.folder.place.read("neurons.parquet"))
    places = {"secret": "secret.txt", "parquet": "secret.parquet", "out": "out.db"}
    names = {name: str(tmp_path / place) for name, place in places.items()} | {"folder": str(tmp_path)}
    files, _ = done.folder.tables(["prompts", "nodes", "neurons"])
    before = contents(tmp_path.parent)
    with attack("hostile SQL statements") as tally:
        for statement in READS + WRITES:
            tally.tried += 1
            sql = statement.format(**names)
            try:
                answer = query.query(files, done.folder.place.fs, sql)
            except TracerError as error:
                told = str(error)
                tally.silent += SECRET in told
            except Exception as error:  # noqa: BLE001
                tally.tracebacks += 1
                tally.worst = f"{sql}: {type(error).__name__}: {error}"
            else:
                tally.silent += 1
                tally.worst = f"{sql}: {answer.to_pylist()[:2]}"
        tally.marks = int(contents(tmp_path.parent) != before)
    assert query.query(files, done.folder.place.fs, "select count(*) as n from prompts").to_pylist() == [{"n": 8}]
