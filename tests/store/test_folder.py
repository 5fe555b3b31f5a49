"""Run folders: what counts is what a commit names and what is intact; nobody else's file is ever touched."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import children
import s3
from helpers import refused
from tracer.errors import RunError
from tracer.runs import status
from tracer.runs.workers.messages import Report
from tracer.store import compaction, edge_means, run_folder, schemas
from tracer.store.file import File
from tracer.store.run_folder import Commit, RunFolder, is_ours


@pytest.fixture(scope="module")
def store() -> Iterator[s3.Store]:
    with s3.server() as made:
        yield made


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run" if request.param == "local" else request.getfixturevalue("store").address())


def row(number: int, **more: Any) -> dict[str, Any]:
    empty = {field.name: None for field in schemas.INPUT if field.name != "prompt_id"}
    return {**empty, "text": f"prompt {number}", "labels": [("n", str(number))], **more}


def nodes(prompts: list[int]) -> pa.Table:
    columns = {field.name: [None] * len(prompts) for field in schemas.NODES}
    return pa.table({**columns, "prompt_id": prompts, "node_id": [0] * len(prompts)}, schemas.NODES)


def edges(count: int) -> pa.Table:
    """Edges of one node to itself."""
    columns = {name: [0] * count for name in ("prompt_id", "source", "target")}
    return pa.table({**columns, **{name: [0.1] * count for name in ("weight", "share", "attribution")}}, schemas.EDGES)


RECORD: dict[str, Any] = {"kind": "dataset", "fingerprint": "f", "job": {}, "numbers": {}, "input": "i", "packages": {}}
RECORD |= {"n_units": 3, "n_prompts": 3}


def done(folder: RunFolder, unit: int, **more: Any) -> Commit:
    """A unit with one node of one prompt, committed."""
    file = folder.write_shard("nodes", unit, nodes([unit]), schemas.NODES)
    commit = Commit.of(Report(unit=unit, files={"nodes": file}, statuses={"ok": 1}, **more))
    folder.commit(commit)
    return commit


# --------------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize(("count", "size"), [(1, 1), (7, 3), (6, 3), (5, 100), (3000, 64), (2500, 1024), (10, 1)])
def test_every_prompt_is_in_one_shard_in_order(tmp_path: Path, count: int, size: int) -> None:
    folder = RunFolder(tmp_path)
    assert folder.write_input((row(number) for number in range(count)), size) == count
    shards = -(-count // size)
    for reader in (folder, RunFolder(tmp_path)):
        assert reader.count_input() == (count, shards)
    found = [one for shard in range(shards) for one in folder.read_input(shard)]
    assert [one["prompt_id"] for one in found] == list(range(count))
    assert [one["text"] for one in found] == [f"prompt {number}" for number in range(count)]
    assert found[-1]["labels"] == [("n", str(count - 1))]
    assert [len(folder.read_input(shard)) for shard in range(shards - 1)] == [size] * (shards - 1)
    for shard in (-1, shards):
        with refused(RunError, "input.parquet"):
            folder.read_input(shard)


def test_row_groups_hold_whole_shards_and_stay_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    folder.write_input((row(number) for number in range(5000)), 100)
    groups = _groups(tmp_path)
    assert set(groups[:-1]) == {1100}
    monkeypatch.setattr(run_folder, "_GROUP_BYTES", 100_000)
    folder.write_input((row(number, text="x" * 1000) for number in range(500)), 10)
    assert set(_groups(tmp_path)) == {100}
    assert [one["prompt_id"] for one in folder.read_input(33)] == list(range(330, 340))


def _groups(path: Path) -> list[int]:
    with pq.ParquetFile(path / "input.parquet") as file:
        return [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]


def test_what_fails_while_it_is_planned_leaves_nothing(tmp_path: Path) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield row(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RunFolder(tmp_path).write_input(rows(), 1)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_that_is_missing_damaged_or_anothers_is_told(tmp_path: Path) -> None:
    def fails() -> None:
        for ask in (RunFolder(tmp_path).count_input, lambda: RunFolder(tmp_path).read_input(0)):
            with refused(RunError, "input.parquet", "repair=True"):
                ask()

    fails()
    with refused(RunError, "input.parquet"):
        RunFolder(tmp_path).digest_input()
    (tmp_path / "input.parquet").write_bytes(b"PAR1 and nothing")
    fails()
    pq.write_table(pa.table({"a": [1]}), tmp_path / "input.parquet")
    fails()


def test_the_digest_of_a_plan_tells_every_byte(folder: RunFolder) -> None:
    folder.write_input((row(number) for number in range(10)), 4)
    first = folder.digest_input()
    content = bytearray(folder.place.read("input.parquet"))
    content[len(content) // 3] ^= 1
    folder.place.write("input.parquet", bytes(content))
    assert folder.digest_input() != first


# -------------------------------------------------------------------------------------------------- commits


def test_commits_are_read_back_in_the_order_of_units(folder: RunFolder) -> None:
    wanted = {unit: done(folder, unit, errors={"ValueError": 1}, seconds=1.5) for unit in (10, 2, 0)}
    assert list(folder.commits()) == [wanted[unit] for unit in (0, 2, 10)]
    assert all(folder.problems(commit) == [] for commit in wanted.values())
    folder.uncommit(2)
    folder.uncommit(2)
    assert [commit.shard for commit in folder.commits()] == [0, 10]


def test_a_report_becomes_a_commit_with_nothing_lost() -> None:
    file = File(name="nodes/3-0123456789ab.parquet", size=12, sha256="f" * 64, rows=4)
    report = Report(unit=3, files={"nodes": file}, statuses={"ok": 2, "failed": 1}, errors={"E": 1}, halved=2)
    commit = Commit.of(report)
    assert (commit.shard, commit.files, commit.rows) == (3, {"nodes": file.name}, {"nodes": 4})
    assert (commit.sizes, commit.sha256, commit.halved, commit.n_prompts) == ({"nodes": 12}, {"nodes": "f" * 64}, 2, 3)
    assert Commit.model_validate_json(commit.model_dump_json()) == commit


@pytest.mark.parametrize("how", ["missing", "short", "flipped"])
def test_a_file_that_is_not_as_committed_is_found(folder: RunFolder, how: str) -> None:
    commit = done(folder, 0)
    name = commit.files["nodes"]
    content = bytearray(folder.place.read(name))
    if how == "missing":
        folder.place.remove(name)
    elif how == "short":
        folder.place.write(name, bytes(content[:-1]))
    else:
        content[100] ^= 1
        folder.place.write(name, bytes(content))
    (problem,) = folder.problems(commit)
    words = {"missing": "is missing", "short": "bytes, its commit says", "flipped": "other content"}
    assert name in problem
    assert words[how] in problem
    assert bool(folder.problems(commit, contents=False)) == (how != "flipped")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"shard": "x"}', b"\xff", b'{"shard": 3, "files": 1}'])
def test_a_commit_that_is_damaged_says_what_to_do(tmp_path: Path, content: bytes) -> None:
    folder = RunFolder(tmp_path)
    folder.place.write("_commits/3.json", content)
    with refused(RunError, "_commits/3.json", "delete it"):
        list(folder.commits())


def test_a_commit_under_anothers_name_is_damaged(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.place.write_json("_commits/3.json", {"shard": 4})
    with refused(RunError, "_commits/3.json", "delete it"):
        list(folder.commits())


def test_the_record_of_another_version_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.record() is None
    folder.begin(RECORD)
    assert folder.record() == RECORD | {"schema_version": schemas.SCHEMA_VERSION}
    folder.place.write_json("run.json", {"schema_version": "0"})
    with refused(RunError, "schema version '0'"):
        folder.record()


def test_tables_are_written_in_their_schema_and_read_back(folder: RunFolder) -> None:
    file = folder.write_shard("nodes", 5, nodes([7, 8]), schemas.NODES)
    assert (file.rows, file.size) == (2, folder.place.size(file.name))
    assert folder.read_table(file.name).schema.equals(schemas.NODES)
    assert folder.write_shard("nodes", 5, nodes([7, 8]), schemas.NODES).name != file.name
    folder.place.remove(file.name)
    with refused(RunError, file.name):
        folder.read_table(file.name)


def test_a_page_that_has_changed_is_found_without_the_commit(tmp_path: Path) -> None:
    """Every page has a checksum: a reader of one table need not hash the file. The last byte of a column's chunk is in
    its last page."""
    folder = RunFolder(tmp_path)
    file = folder.write_shard("edges", 0, edges(64), schemas.EDGES)
    whole = folder.place.read(file.name)
    group = pq.read_metadata(tmp_path / file.name).row_group(0)
    for number in range(group.num_columns):
        column = group.column(number)
        last = (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 1
        folder.place.write(file.name, whole[:last] + bytes([whole[last] ^ 1]) + whole[last + 1 :])
        with refused(RunError, file.name, "damaged"):
            folder.read_table(file.name)
    folder.place.write(file.name, whole)
    assert folder.read_table(file.name).equals(edges(64))


def test_every_table_has_one_layout(tmp_path: Path) -> None:
    """Shards, the input, sums and compacted tables: Zstandard, dictionaries on keys, byte-stream split on floats."""
    folder = RunFolder(tmp_path)
    folder.write_input([row(0)], 1)
    one = nodes([0])
    one = one.set_column(2, "kind", pa.array(["neuron"])).set_column(3, "layer", pa.array([1], pa.int16()))
    for name, value in (("position", 0), ("neuron", 3)):
        one = one.set_column(one.column_names.index(name), name, pa.array([value], pa.int32()))
    paths = [folder.place.path(folder.write_shard("nodes", 0, one, schemas.NODES).name)]
    links = [folder.place.path(folder.write_shard("edges", 0, edges(1), schemas.EDGES).name)]
    with folder.place.writing("edges_mean.parquet") as file:
        edge_means.write_edges_mean(paths, links, folder.place.fs, file)
    compaction.compact(paths, links, folder.place.fs, folder.place)
    tables = list(tmp_path.rglob("*.parquet"))
    assert len(tables) == 6
    for path in tables:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            assert (file.schema_arrow.metadata or {})[b"schema_version"] == schemas.SCHEMA_VERSION.encode()
            group = file.metadata.row_group(0)
            for column in map(group.column, range(group.num_columns)):
                assert column.compression == "ZSTD"
                assert ("BYTE_STREAM_SPLIT" in column.encodings) == (column.physical_type in ("FLOAT", "DOUBLE"))
            assert bool(group.sorting_columns) == ("compact" in path.parts)


# ---------------------------------------------------------------------------------------------- what is whose

LEFT = ["nodes/3-0123456789ab.parquet", "nodes/.3-0123456789ab.parquet.00ff00ff", "_commits/.3.json.00ff00ff"]
LEFT += [".input.parquet.0123abcd", ".progress.json.0123abcd", "prompts/0-aaaaaaaaaaaa.parquet"]
FOREIGN = ["nodes/mine.parquet", "nodes/notes.txt", "nodes/3-backup.parquet", "_commits/readme.md", "_journal/log.txt"]
FOREIGN += ["paper.tex", ".hidden", ".hidden.0123abcd", "input.csv", "plots/mine.png", "compact/nodes/mine.parquet"]


def test_names_tell_what_is_ours() -> None:
    made = ["input.parquet", "run.json", "progress.json", "_SUCCESS.json", "_commits/0.json", "_journal/deaths.json"]
    made += [f"{run_folder.ANSWERS}/{'0a' * 32}.json", f"{run_folder.ANSWERS}/.{'0a' * 32}.json.00ff00ff"]
    made += run_folder.KEPT
    assert all(map(is_ours, [*made, *LEFT, *run_folder.OUTPUTS, "plots/nounpp-activation.png", "compact/compact.json"]))
    assert not any(map(is_ours, FOREIGN))


def test_sweeping_and_clearing_leave_foreign_files_alone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.begin(RECORD)
    commit = done(folder, 0)
    for name in (*LEFT, *FOREIGN, *run_folder.OUTPUTS, "_SUCCESS.json", "_journal/deaths.json", "progress.json"):
        folder.place.write(name, b"x")
    assert folder.sweep(commit.files.values()) == len(LEFT)
    there = {name for name, _ in folder.place.files(recursive=True)}
    assert not there & {*LEFT}
    assert {*FOREIGN, *commit.files.values(), "_commits/0.json", "run.json"} <= there
    folder.clear()
    assert {name for name, _ in folder.place.files(recursive=True)} == {*FOREIGN}


def test_taking_back_the_end_leaves_no_result_that_is_out_of_date(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for name in (*run_folder.OUTPUTS, "_SUCCESS.json", "plots/rc-output.png", "compact/nodes/layer_-1.parquet"):
        folder.place.write(name, b"x")
    folder.delete_outputs()
    assert folder.place.files(recursive=True) == []


def test_descriptions_stay_when_more_units_come_and_answers_whatever_comes(tmp_path: Path) -> None:
    folder, answer = RunFolder(tmp_path), f"{run_folder.ANSWERS}/{'0a' * 32}.json"
    folder.begin(RECORD)
    for name in (*run_folder.KEPT, answer):
        folder.place.write(name, b"x")
    folder.delete_outputs()
    folder.seal()
    assert folder.check_outputs() == []
    folder.place.write(run_folder.KEPT[0], b"y")
    assert folder.check_outputs() != []
    folder.clear()
    assert [name for name, _ in folder.place.files(recursive=True)] == [answer]
    assert folder.is_empty()


def test_an_unfinished_plan_is_empty_and_anything_else_is_not(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.check()
    assert folder.is_empty()
    for name in (*LEFT, "progress.json", "input.parquet", ".lock"):
        folder.place.write(name, b"x")
    (tmp_path / "run" / "edges").mkdir()
    folder.check()
    assert folder.is_empty()
    for name in ("paper.tex", "nodes/mine.parquet"):
        folder.place.write(name, b"x")
        assert not folder.is_empty()
        with refused(RunError, "holds files that are not a run"):
            folder.check()
        folder.place.remove(name)
    folder.place.write("_commits/0.json", b"{}")  # whose run.json was lost: hours of work, perhaps
    with refused(RunError, "holds files that are not a run"):
        folder.check()


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with refused(RunError, "is a file, not a folder"):
        RunFolder(tmp_path / "run").check()


def test_a_driver_that_dies_while_it_clears_can_be_followed(tmp_path: Path) -> None:
    """Whenever that is: the old run is still one, or there is none."""
    for steps in (0, 1, 3, 5, 7):
        path = tmp_path / str(steps)
        folder = RunFolder(path)
        folder.write_input([row(0), row(1)], 1)
        folder.begin(RECORD)
        folder.place.write_json("_SUCCESS.json", {})
        for unit in range(2):
            done(folder, unit)
        folder.place.write_json("progress.json", {})
        folder.place.write_json("_journal/deaths.json", {})
        assert subprocess.run(children.command("clear", path, steps), check=False, timeout=60).returncode == 9
        folder.check()
        assert not folder.place.exists("_SUCCESS.json") or steps == 0
        if folder.record() is None:
            assert folder.is_empty()
        else:
            assert all(folder.problems(commit) == [] for commit in folder.commits())


# ------------------------------------------------------------------------------------------- seen from outside


def test_a_run_seen_from_outside_is_what_its_commits_say(folder: RunFolder) -> None:
    folder.begin(RECORD)
    done(folder, 0)
    bad = done(folder, 2, errors={"ValueError": 1})
    address = folder.place.address
    found = status.condition(address)
    assert (found.status.state, found.problems) == ("stopped", ())
    folder.place.write_json(
        "progress.json", {"kind": "dataset", "state": "running", "started": 1.0, "updated": 2.0, "committed": 1}
    )
    folder.place.write(bad.files["nodes"], b"x" * bad.sizes["nodes"])
    found = status.condition(address)
    assert (found.status.state, found.status.committed, found.status.n_prompts) == ("running", 2, 3)
    assert (found.status.rows, found.status.errors) == ({"nodes": 2}, {"ValueError": 1})
    assert found.problems == (f"{bad.files['nodes']} has other content than was committed",)
    assert status.condition(address, contents=False).problems == ()


def test_a_folder_without_a_run_has_no_status(tmp_path: Path) -> None:
    with refused(RunError, "holds no run"):
        status.condition(tmp_path)
    one = {"schema_version": schemas.SCHEMA_VERSION, "kind": "trace", "fingerprint": "f"}
    (tmp_path / "run.json").write_text(json.dumps(one))
    with refused(RunError, "run of one prompt"):
        status.condition(tmp_path)


@pytest.mark.parametrize("name", ["job", "numbers", "input", "n_units", "n_prompts", "packages", "fingerprint", "kind"])
@pytest.mark.parametrize("value", [None, "x", -1, 1.5, [1], {"a": 1}, 10**30, True])
def test_a_record_with_a_key_gone_or_of_another_type_says_what_to_do(tmp_path: Path, name: str, value: Any) -> None:
    folder = RunFolder(tmp_path)
    content = {"schema_version": schemas.SCHEMA_VERSION, **RECORD}
    fits = (
        type(value) is type(content[name])
        and value not in (-1, 10**30)
        and not isinstance(value, dict)
        and name != "kind"
    )
    for wrong in (content | {name: value}, {key: one for key, one in content.items() if key != name}):
        folder.place.write_json("run.json", wrong)
        if name in wrong and (fits or (isinstance(value, dict) and name in ("job", "numbers"))):
            assert folder.record() == wrong
        else:
            with refused(RunError, "run.json", "is damaged", name, "repair"):
                folder.record()
