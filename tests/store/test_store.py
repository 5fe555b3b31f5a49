"""The run folder: what is written is read back, what is not ours is not touched, what is damaged is refused."""

from __future__ import annotations

import ast
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import old_folders
import s3
import tracer
from helpers import refused
from tracer import RunError
from tracer.store import one_prompt, schemas
from tracer.store.one_prompt import check_writable, read_run, write_run
from tracer.store.parquet import fingerprint
from tracer.store.run_folder import RunFolder
from tracer.store.schemas import EDGES, NODES, PROFILES, PROMPTS, SCHEMA_VERSION, SCHEMAS

Table = list[dict[str, Any]]


def columns(text: str) -> list[tuple[str, pa.DataType]]:
    """A schema as design.md section 3 writes it."""
    return [(name, pa.type_for_alias(kind)) for name, kind in (part.split() for part in text.split(", "))]


def test_node_and_edge_schemas_are_the_designs() -> None:
    nodes = columns(
        "prompt_id int64, node_id int32, kind string, layer int16, position int32, neuron int32, expert int32, "
        "token string, activation float32, attribution float32, gradient float32, explained float32, "
        "influence float32, bias_share float32"
    )
    edges = columns("prompt_id int64, source int32, target int32, weight float32, share float32, attribution float32")
    assert list(zip(NODES.names, NODES.types, strict=True)) == nodes
    assert list(zip(EDGES.names, EDGES.types, strict=True)) == edges


def test_prompt_schema_is_the_designs() -> None:
    wanted = (
        "prompt_id user_id text token_ids target_ids foil_ids metric unexplained n_nodes n_edges status error_type "
        "error attempts seconds labels answer"
    )
    assert wanted.split() == PROMPTS.names
    assert PROMPTS.field("prompt_id").type == pa.int64()
    assert all(pa.types.is_string(PROMPTS.field(name).type) for name in ("user_id", "text", "status", "error"))
    assert all(pa.types.is_list(PROMPTS.field(name).type) for name in ("token_ids", "target_ids", "foil_ids"))


INT32 = st.integers(-(2**31), 2**31 - 1)
FLOAT = st.floats(width=32)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
VALUES = {
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.int32(): INT32,
    pa.int16(): st.integers(-(2**15), 2**15 - 1),
    pa.float32(): FLOAT,
    pa.string(): TEXT,
    pa.list_(pa.int32()): st.lists(INT32, max_size=4),
    pa.map_(pa.string(), pa.string()): st.dictionaries(TEXT, TEXT, max_size=2).map(lambda d: list(d.items())),
}


def tables(schema: pa.Schema) -> st.SearchStrategy[pa.Table]:
    """Any table of a schema, nulls included."""
    row = st.fixed_dictionaries({field.name: st.none() | VALUES[field.type] for field in schema})
    return st.lists(row, max_size=8).map(lambda rows: pa.Table.from_pylist(rows, schema=schema))


def equal(one: pa.Table, other: pa.Table) -> bool:
    """Equal schemas and values, NaN equal to NaN."""
    if one.schema != other.schema or one.num_rows != other.num_rows:
        return False
    return all(
        repr(a) == repr(b)
        for name in one.column_names
        for a, b in zip(one[name].to_pylist(), other[name].to_pylist(), strict=True)
    )


@given(tables(PROMPTS), tables(NODES), tables(EDGES))
def test_any_tables_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, prompts: pa.Table, nodes: pa.Table, edges: pa.Table
) -> None:
    folder = tmp_path_factory.mktemp("run")
    written = {"prompts": prompts, "nodes": nodes, "edges": edges}
    record = {"fingerprint": "f", "kind": "trace", "number": 0.1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_prompt, "_write_neurons", lambda *_: None)  # any values at all are no nodes
        write_run(folder, record, written)
    read, found = read_run(folder)
    assert sorted(found) == sorted(written)
    assert all(equal(found[name], written[name]) for name in written)
    assert {name: read[name] for name in record} == record


def nodes(rows: Table) -> pa.Table:
    blank = {"prompt_id": 0, "node_id": 0, "kind": "neuron", "position": 0, "token": "", "activation": 1.0}
    return pa.Table.from_pylist([blank | row for row in rows], schema=NODES)


ROW = {"prompt_id": 0, "text": "a", "token_ids": [1], "target_ids": [2], "foil_ids": [], "status": "ok"}
PROMPT_TABLE = pa.Table.from_pylist([ROW], schema=PROMPTS)
NODE_TABLE = nodes([{"layer": 1, "neuron": 2, "attribution": 0.5}])
RECORD = {"fingerprint": "one", "kind": "trace"}
TABLES = {"prompts": PROMPT_TABLE, "nodes": NODE_TABLE}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    write_run(folder, RECORD, TABLES)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_folder_holds_the_designs_files_and_no_others(run: Path) -> None:
    named = {"run.json", "input.parquet", "neurons.parquet", "progress.json", "_SUCCESS.json", "_commits/0.json"}
    files = set(content(run))
    assert named <= files
    rest = files - named
    assert sorted(name.split("/")[0] for name in rest) == ["nodes", "prompts"]
    assert not any(part.startswith(".") for name in files for part in name.split("/"))


def test_every_parquet_file_has_the_schema_version_and_is_zstd(run: Path) -> None:
    files = list(run.rglob("*.parquet"))
    assert len(files) == 4
    for path in files:
        file = pq.ParquetFile(path)
        assert (file.schema_arrow.metadata or {})[b"schema_version"] == SCHEMA_VERSION.encode()
        if file.metadata.num_row_groups:
            group = file.metadata.row_group(0)
            assert {group.column(i).compression for i in range(group.num_columns)} == {"ZSTD"}
    assert json.loads((run / "run.json").read_text())["schema_version"] == SCHEMA_VERSION


def test_only_files_that_a_commit_names_count(run: Path) -> None:
    _, before = read_run(run)
    pq.write_table(NODE_TABLE, run / "nodes" / "0-leftover.parquet")
    (run / "nodes" / "0-broken.parquet").write_bytes(b"half a file")
    _, after = read_run(run)
    assert equal(before["nodes"], after["nodes"])


def test_the_same_job_twice_is_replaced(run: Path) -> None:
    other = nodes([{"layer": 0, "neuron": 1, "attribution": 2.0}] * 3)
    write_run(run, RECORD, {"prompts": PROMPT_TABLE, "nodes": other})
    assert equal(read_run(run)[1]["nodes"], other)
    assert len(list((run / "nodes").iterdir())) == 1
    assert len(list((run / "prompts").iterdir())) == 1


def test_another_job_is_refused_without_overwrite_and_nothing_changes(run: Path) -> None:
    before = content(run)
    with refused(RunError, "another run", "overwrite"):
        write_run(run, {**RECORD, "fingerprint": "two"}, TABLES)
    assert content(run) == before
    write_run(run, {**RECORD, "fingerprint": "two"}, TABLES, overwrite=True)
    assert read_run(run)[0]["fingerprint"] == "two"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_other_content_is_not_touched(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "nodes").mkdir()
    (tmp_path / "nodes" / "mine.parquet").write_bytes(b"mine")
    (tmp_path / "notes.txt").write_text("mine")
    before = content(tmp_path)
    with refused(RunError, "not a run", "choose another"):
        write_run(tmp_path, RECORD, TABLES, overwrite)
    assert content(tmp_path) == before


def test_overwriting_leaves_foreign_files_in_a_run_alone(run: Path) -> None:
    (run / "notes.txt").write_text("mine")
    write_run(run, {**RECORD, "fingerprint": "two"}, TABLES, overwrite=True)
    assert (run / "notes.txt").read_text() == "mine"


def test_an_empty_folder_and_missing_parents_are_filled(tmp_path: Path) -> None:
    write_run(tmp_path, RECORD, TABLES)
    write_run(tmp_path / "a" / "b" / "c", RECORD, TABLES)
    assert read_run(tmp_path / "a" / "b" / "c")[0]["kind"] == "trace"


@pytest.mark.parametrize("below", ["file", "file/run", "file/deep/run"])
def test_a_file_in_the_way_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("mine")
    with refused(RunError, "choose another"):
        write_run(tmp_path / below, RECORD, TABLES)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["nodes", "prompts", "_commits"])
def test_a_file_where_a_folder_of_the_run_goes_is_refused(run: Path, name: str) -> None:
    for path in (run / name).iterdir():
        path.unlink()
    (run / name).rmdir()
    (run / name).write_text("in the way")
    with refused(RunError, str(run)[:20]):
        write_run(run, RECORD, TABLES)


def test_a_folder_that_cannot_be_made_is_refused() -> None:
    with refused(RunError, "/proc/tracer", "choose another"):
        write_run(Path("/proc/tracer/run"), RECORD, TABLES)


@pytest.mark.parametrize("at", range(8))
def test_an_interrupted_write_is_never_read_as_a_run(tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up at the n-th file: an error, and no reader takes what is there for a finished run."""
    calls, replace = [], os.replace

    def full(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == at + 1:
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with refused(RunError, "No space left"):
            write_run(tmp_path / "run", RECORD, TABLES)
    if (tmp_path / "run" / "_commits" / "0.json").exists():
        assert equal(read_run(tmp_path / "run")[1]["nodes"], NODE_TABLE)
    else:
        with refused(RunError):
            read_run(tmp_path / "run")
    write_run(tmp_path / "run", RECORD, TABLES)
    assert equal(read_run(tmp_path / "run")[1]["nodes"], NODE_TABLE)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    found = json.loads(path.read_text())
    path.write_text(json.dumps(change(found)))


@pytest.mark.parametrize("name", ["run.json", "_commits/0.json"])
def test_everything_before_a_mark_is_on_the_disk_when_the_mark_is_made(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file is flushed before it has its name, and the tables have theirs before the commit."""
    events: list[tuple[str, str]] = []
    replace, fsync = os.replace, os.fsync

    def named(source: Any, target: Any) -> None:
        events.append(("named", str(Path(target).relative_to(tmp_path))))
        replace(source, target)

    def flushed(number: int) -> None:
        events.append(("flushed", os.readlink(f"/proc/self/fd/{number}")))
        fsync(number)

    monkeypatch.setattr(os, "replace", named)
    monkeypatch.setattr(os, "fsync", flushed)
    write_run(tmp_path, RECORD, TABLES)
    order = [what for kind, what in events if kind == "named"]
    assert order.index("_commits/0.json") > order.index("run.json")
    assert order.index("_commits/0.json") > max(order.index(file) for file in order if file.endswith(".parquet"))
    assert order[-1] == "_SUCCESS.json"
    before = events[: events.index(("named", name))]
    assert before[-1][0] == "flushed"
    assert Path(before[-1][1]).name.startswith(f".{Path(name).name}.")


def one_file(run: Path, table: str = "nodes") -> Path:
    (path,) = (run / table).glob("*.parquet")
    return path


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "run.json gone": lambda run: (run / "run.json").unlink(),
    "run.json empty": lambda run: (run / "run.json").write_text(""),
    "run.json cut": lambda run: (run / "run.json").write_text((run / "run.json").read_text()[:20]),
    "run.json binary": lambda run: (run / "run.json").write_bytes(b"\x80\x04\xff\xfe"),
    "run.json a list": lambda run: (run / "run.json").write_text("[1]"),
    "run.json a folder": lambda run: ((run / "run.json").unlink(), (run / "run.json").mkdir()),
    "another schema version": lambda run: edit(run / "run.json", lambda r: r | {"schema_version": "99"}),
    "no schema version": lambda run: edit(run / "run.json", lambda r: {"kind": r["kind"]}),
    "nothing committed": lambda run: (run / "_commits" / "0.json").unlink(),
    "commit cut": lambda run: (run / "_commits" / "0.json").write_text('{"files"'),
    "commit without files": lambda run: edit(run / "_commits" / "0.json", lambda c: {"shard": 0}),
    "commit with a list of files": lambda run: edit(run / "_commits" / "0.json", lambda c: {"files": ["nodes"]}),
    "commit with numbers": lambda run: edit(run / "_commits" / "0.json", lambda c: {"files": {"nodes": 3}}),
    "commit of an unknown table": lambda run: edit(
        run / "_commits" / "0.json", lambda c: {"files": {"secrets": c["files"]["nodes"]}}
    ),
    "commit of no number": lambda run: (run / "_commits" / "x.json").write_text("{}"),
    "nodes gone": lambda run: one_file(run).unlink(),
    "nodes cut": lambda run: one_file(run).write_bytes(one_file(run).read_bytes()[:-20]),
    "nodes empty": lambda run: one_file(run).write_bytes(b""),
    "nodes text": lambda run: one_file(run).write_text("not parquet at all"),
    "nodes of other columns": lambda run: pq.write_table(PROMPT_TABLE, one_file(run)),
    "nodes of other types": lambda run: pq.write_table(
        NODE_TABLE.set_column(3, "layer", NODE_TABLE["layer"].cast(pa.int64())), one_file(run)
    ),
    "prompts cut": lambda run: one_file(run, "prompts").write_bytes(one_file(run, "prompts").read_bytes()[:50]),
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", sorted(DAMAGE))
def test_a_damaged_run_is_refused(run: Path, name: str, old: bool) -> None:
    if old:
        old_folders.make_old(run)
    DAMAGE[name](run)
    with refused(RunError):
        read_run(run)


@pytest.mark.parametrize("table", ["nodes", "prompts"])
def test_a_flipped_byte_is_found_and_its_file_named(run: Path, table: str) -> None:
    path = one_file(run, table)
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        with refused(RunError, f"{table}/{path.name}", "other content than was committed", "run it again"):
            read_run(run)


def test_flipped_bytes_without_a_hash_are_refused_or_harmless(run: Path) -> None:
    """In version 2, whatever byte of a Parquet file changes: the table as it was, other values, or a RunError."""
    old_folders.make_old(run)
    path = one_file(run)
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            read_run(run)
        except RunError as problem:
            assert "\n" not in str(problem)  # noqa: PT017


@pytest.mark.parametrize("path", ["", "nowhere", "file"])
def test_what_is_no_run_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("mine")
    with refused(RunError, "holds no run"):
        read_run(tmp_path / path)


@pytest.mark.parametrize("act", ["write", "overwrite", "read", "below"])
def test_an_error_names_the_folder_to_its_end(run: Path, act: str) -> None:
    """A path cut off before the part the user chose says nothing."""
    if act == "write":
        with refused(RunError, str(run)):
            write_run(run, {**RECORD, "fingerprint": "two"}, TABLES)
    elif act == "overwrite":
        with refused(RunError, str(run.parent)):
            write_run(run.parent, RECORD, TABLES, overwrite=True)
    elif act == "read":
        with refused(RunError, str(run / "nowhere")):
            read_run(run / "nowhere")
    else:
        with refused(RunError, str(run / "run.json" / "deeper")):
            write_run(run / "run.json" / "deeper", RECORD, TABLES)


def test_shards_are_read_in_order_of_their_number(run: Path) -> None:
    commit = json.loads((run / "_commits" / "0.json").read_text())
    del commit["digest"], commit["files"]["prompts"]
    commit |= {name: {"nodes": 0} for name in ("rows", "sizes", "sha256")}
    for shard in (10, 2):
        file = f"nodes/{shard}-0123456789ab.parquet"
        pq.write_table(nodes([{"prompt_id": shard, "layer": 0, "neuron": 0}]), run / file)
        content = (run / file).read_bytes()
        more = {"files": file, "rows": 1, "sizes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        mine = {"shard": shard, **{key: {**commit[key], "nodes": value} for key, value in more.items()}}
        (run / "_commits" / f"{shard}.json").write_text(json.dumps(mine))
    RunFolder(run).seal()
    assert read_run(run)[1]["nodes"]["prompt_id"].to_pylist() == [0, 2, 10]


def test_other_columns_are_not_written(tmp_path: Path) -> None:
    wrong = NODE_TABLE.append_column("extra", pa.array([1]))
    with pytest.raises((ValueError, pa.ArrowInvalid)):
        write_run(tmp_path / "run", RECORD, {"prompts": PROMPT_TABLE, "nodes": wrong})


def test_numbers_that_json_cannot_hold_are_not_written_as_something_else(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_run(tmp_path / "run", {**RECORD, "metric": float("nan")}, TABLES)


def test_the_fingerprint_depends_on_content_and_not_on_order() -> None:
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": 1, "b": [1, 2]}) != fingerprint({"a": 1, "b": [2, 1]})


def test_schemas_are_complete() -> None:
    wanted = {"prompts": PROMPTS, "nodes": NODES, "edges": EDGES, "profiles": PROFILES, "values": schemas.VALUES}
    assert wanted == SCHEMAS


FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def test_no_module_of_the_library_reads_pickles() -> None:
    """No import of a pickling module, and no function that unpickles: torch.load, numpy with allow_pickle."""
    root = Path(tracer.__file__).parent
    for path in root.rglob("*.py"):
        for part in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(part, ast.Import):
                names = [alias.name.split(".")[0] for alias in part.names]
            elif isinstance(part, ast.ImportFrom):
                names = [(part.module or "").split(".")[0]]
            elif isinstance(part, ast.Call):
                names = [ast.unparse(part.func)]
                assert not any(word.arg == "allow_pickle" for word in part.keywords), path
                # NDIF answers in torch's format; read so, it holds tensors and plain containers, or is refused.
                if path.name == "results.py" and any(
                    ast.unparse(word) == "weights_only=True" for word in part.keywords
                ):
                    continue
            assert not FORBIDDEN & set(names), path
            assert not {"torch.load", "np.load", "numpy.load", "pd.read_pickle"} & set(names), path


@pytest.mark.parametrize(
    "damage", ["a second commit", "a shorter table", "a commit without a table", "another shard's"]
)
def test_a_run_whose_parts_disagree_is_refused(run: Path, damage: str) -> None:
    path = run / "_commits" / "0.json"
    commit = json.loads(path.read_text())
    if damage == "a second commit":
        (run / "_commits" / "1.json").write_text(path.read_text())
    elif damage == "a shorter table":
        table = pq.read_table(run / commit["files"]["nodes"])
        pq.write_table(table.slice(0, 0), run / commit["files"]["nodes"])
    elif damage == "a commit without a table":
        del commit["files"]["nodes"]
        path.write_text(json.dumps(commit))
    else:
        path.rename(run / "_commits" / "7.json")
    with refused(RunError, "damaged"):
        read_run(run)


def test_a_commit_of_today_has_hashes(run: Path) -> None:
    edit(run / "_commits" / "0.json", lambda commit: {key: commit[key] for key in ("shard", "files", "rows")})
    with refused(RunError, "its commit says None"):
        read_run(run)


@pytest.fixture(scope="module")
def store() -> Iterator[s3.Store]:
    with s3.server() as made:
        yield made


def test_an_object_store_holds_the_same_run(run: Path, store: s3.Store) -> None:
    address = store.address()
    check_writable(address)
    place = RunFolder(address).place
    assert place.files(recursive=True) == []
    write_run(address, RECORD, TABLES)
    there = {name.split("-")[0] for name, _ in place.files(recursive=True)}
    assert there == {name.split("-")[0] for name in content(run)}
    assert all(equal(table, read_run(run)[1][name]) for name, table in read_run(address)[1].items())
    with refused(RunError, "another run", "overwrite"):
        write_run(address, {**RECORD, "fingerprint": "two"}, TABLES)
    write_run(address, {**RECORD, "fingerprint": "two"}, TABLES, overwrite=True)
    (table,) = (name for name, _ in place.files("nodes"))
    whole = place.read(table)
    place.write(table, whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
    with refused(RunError, table, "other content than was committed"):
        read_run(address)


def test_an_object_store_that_holds_something_else_or_is_not_there_is_refused(store: s3.Store) -> None:
    address = store.address()
    RunFolder(address).place.write("notes.txt", b"mine")
    for overwrite in (False, True):
        with refused(RunError, "not a run", "choose another"):
            write_run(address, RECORD, TABLES, overwrite)
    for refuse in (check_writable, lambda there: write_run(there, RECORD, TABLES)):
        with refused(RunError, "cannot be written", "choose another"):
            refuse(address.replace("s3://bucket", "s3://nowhere"))
    with refused(RunError, "holds no run"):
        read_run(store.address())


@pytest.mark.parametrize("below", ["", "a/b/c"])
def test_a_check_leaves_nothing_behind(tmp_path: Path, below: str) -> None:
    check_writable(tmp_path / below)
    assert list(tmp_path.iterdir()) == []


def test_a_commit_cannot_name_a_file_outside_its_run(run: Path) -> None:
    path = run / "_commits" / "0.json"
    commit = json.loads(path.read_text())
    del commit["digest"]
    for name in ("../elsewhere.parquet", "nodes/../../x.parquet", "edges/0-0123456789ab.parquet", "nodes/x.parquet"):
        commit["files"]["nodes"] = name
        path.write_text(json.dumps(commit))
        with refused(RunError, "does not name the files"):
            read_run(run)
