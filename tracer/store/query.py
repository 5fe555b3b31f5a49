"""One SQL query over a run's tables, with DuckDB if it is installed: read only, and nothing but those tables.

Knows lists of table files and where they are. Refuses to know run folders and what the tables mean.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
from pyarrow.fs import FileSystem, LocalFileSystem

from tracer.errors import JobError, RunError, first_line, quoted, writing
from tracer.store import aggregation, edge_means, schemas
from tracer.store.parquet import opened

SCHEMAS: dict[str, pa.Schema] = {
    **schemas.SCHEMAS,
    "neurons": aggregation.NEURONS,
    "edges_mean": edge_means.EDGES_MEAN,
    "top_prompts": aggregation.TOP_PROMPTS,
    "failed": schemas.PROMPTS,
    "circuit": schemas.CIRCUIT,
    "circuit_nodes": schemas.CIRCUIT_NODES,
    "circuit_edges": schemas.CIRCUIT_EDGES,
    "tokens": schemas.TOKENS,
    "concepts": schemas.CONCEPTS,
    "steering": schemas.STEERING,
    "steering_groups": schemas.STEERING_GROUPS,
    "exemplars": schemas.EXEMPLARS,
    "densities": schemas.DENSITIES,
    "descriptions": schemas.DESCRIPTIONS,
    "comparison": schemas.COMPARISON,
    "compared": schemas.COMPARED,
    "courses": schemas.COURSES,
}
"""The tables that a query can name."""
_SQL = {pa.float32(): "FLOAT", pa.int32(): "INTEGER"}
"""Types of columns that older folders lack."""
_FORMAT = ds.ParquetFileFormat(page_checksum_verification=True)


def query(files: Mapping[str, Sequence[str]], fs: FileSystem, sql: str) -> pa.Table:
    """The result of one SELECT (or FROM, WITH, DESCRIBE, SHOW, SUMMARIZE, VALUES) over the tables in `SCHEMAS`.

    The statement sees these tables only: no other file, no network, no extension, no Python variable.

    Args:
        files: Parquet files by table; a table without files is there and empty.
        fs: where they are.
        sql: the statement.

    Raises:
        JobError: DuckDB is not installed or too old, or the statement is not one that only reads, or it fails.
        RunError: a table's files cannot be read.
    """
    duckdb: Any = _duckdb()
    _check(duckdb, sql)
    with _scratch() as folder:
        settings = {"autoinstall_known_extensions": False, "autoload_known_extensions": False}
        with duckdb.connect(":memory:", config={**settings, "temp_directory": folder}) as connection:
            try:
                for name, schema in SCHEMAS.items():
                    _show(connection, name, list(files.get(name, ())), fs, schema)
            except (duckdb.Error, pa.ArrowException, OSError) as error:
                raise RunError(
                    "a table of the run", f"cannot be read ({first_line(error, 1000)})", "run it again"
                ) from error
            for setting in ("python_enable_replacements", "enable_external_access"):
                connection.execute(f"SET {setting} = false")
            connection.execute("SET lock_configuration = true")
            try:
                return connection.execute(sql).to_arrow_table()
            except (duckdb.Error, pa.ArrowException, OSError) as error:
                raise _failed(sql, error) from error


@contextmanager
def _scratch() -> Iterator[str]:
    """A folder for what does not fit in memory."""
    with ExitStack() as stack:
        with writing(tempfile.gettempprefix(), "a temporary folder", "make room for it, or set TMPDIR"):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tracer-query-"))
        yield folder


def tables_named(sql: str) -> frozenset[str]:
    """The tables in `SCHEMAS` that a statement reads; all of them where that cannot be told.

    Raises:
        JobError: as `query`.
    """
    duckdb: Any = _duckdb()
    _check(duckdb, sql)
    try:
        with duckdb.connect(":memory:") as connection:
            named = {name.lower() for name in connection.get_table_names(sql)}
    except duckdb.Error:
        named = set[str]()
    return frozenset(named & SCHEMAS.keys()) or frozenset(SCHEMAS)


def _show(connection: Any, name: str, files: list[str], fs: FileSystem, schema: pa.Schema) -> None:
    """Give a table its name in the database, and today's names to its columns."""
    if not files:
        connection.register(name, schema.empty_table())
        return
    with opened(files[0], fs) as file:
        stored = file.schema_arrow.remove_metadata()
    columns = schemas.stored_names(stored.names)
    if isinstance(fs, LocalFileSystem):
        known = connection.execute("SELECT current_setting('allowed_paths')").fetchone()[0]
        connection.execute(f"SET allowed_paths = {_list([*known, *files])}")
        source = f"read_parquet({_list(files)}, hive_partitioning = false)"  # a folder may be called layer=3
    elif all(new == old for new, old in columns.items()):
        connection.register(name, ds.dataset(files, schema, format=_FORMAT, filesystem=fs))
        return
    else:
        source = f'"{name} as stored"'
        connection.register(f"{name} as stored", ds.dataset(files, stored, format=_FORMAT, filesystem=fs))
    kinds = {name: _SQL[schema.field(name).type] for name, old in columns.items() if not old}
    shown = ", ".join(
        f'"{old}" AS "{new}"' if old else f'NULL::{kinds[new]} AS "{new}"' for new, old in columns.items()
    )
    connection.execute(f'CREATE VIEW "{name}" AS SELECT {shown} FROM {source}')


def _list(paths: Sequence[str]) -> str:
    return "[" + ", ".join("'" + path.replace("'", "''") + "'" for path in paths) + "]"


def _duckdb() -> Any:
    step = "pip install 'neuron-tracer[query]', or read the Parquet files with pyarrow or pandas"
    try:
        import duckdb
    except ImportError as error:
        raise JobError("a query", "needs DuckDB, which is not installed", step) from error
    if not hasattr(duckdb.DuckDBPyConnection, "to_arrow_table"):
        raise JobError(f"DuckDB {duckdb.__version__}", "is too old", step)
    return duckdb


def _check(duckdb: Any, sql: str) -> None:
    """Refuse what is not one reading statement."""
    try:
        statements = duckdb.extract_statements(sql)
    except duckdb.Error as error:
        raise _failed(sql, error) from error
    if len(statements) != 1:
        raise JobError(f"query {quoted(sql)}", f"is {len(statements)} statements, one is needed", "give one SELECT")
    if (kind := statements[0].type) != duckdb.StatementType.SELECT:
        raise JobError(
            f"query {quoted(sql)}", f"is a statement of kind {kind.name}", "only SELECT and its like are run"
        )


def _failed(sql: str, error: Exception) -> JobError:
    rule = f"fails: {first_line(error, 1000)}"
    return JobError(f"query {quoted(sql)}", rule, "fix the statement; DESCRIBE TABLE shows the columns")
