"""A file that changed must never read as other numbers, and what is not there must be said: every reader of a run."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tracer
from helpers import refused
from inline import InlinePool
from runs import lines
from tracer import Circuit, Run, RunError, run
from tracer.circuit.from_run import graph_of
from tracer.store import compaction, query
from tracer.store.run_folder import RunFolder

PROMPT = tracer.Prompt("The secretaries near the car", target=" are", foil=" is")


@pytest.fixture(scope="module")
def circuit() -> Circuit:
    return tracer.trace(tracer.load(), PROMPT, nodes=12)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return dataset(tmp_path_factory.mktemp("damage"))


def dataset(folder: Path) -> Run:
    file = lines(folder / "prompts.jsonl", ({"text": f"prompt {number}"} for number in range(12)))
    job = {"kind": "dataset", "input": {"path": file}, "shard_size": 4}
    return run(job, folder / "layer=3" / "run", pool=InlinePool(), factory="fake_runs:Tiny")


def flipped(path: Path, bit: int) -> bytes:
    """Flip one bit of a file; what it held before."""
    content = path.read_bytes()
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(changed))
    return content


@pytest.mark.parametrize("table", ["run.json", "_commits", "nodes", "edges", "prompts", "_SUCCESS.json"])
def test_no_flipped_bit_of_a_saved_circuit_reads_as_other_numbers(circuit: Circuit, table: str, tmp_path: Path) -> None:
    circuit.save(tmp_path / "run")
    place = tmp_path / "run" / table
    path = place if place.is_file() else next(iter(place.iterdir()))
    chance = random.Random(0)
    for _ in range(90):
        before = flipped(path, chance.randrange(8 * path.stat().st_size))
        try:
            found = Circuit.load(tmp_path / "run")
        except RunError:
            pass
        else:
            assert found == circuit
        path.write_bytes(before)
    assert Circuit.load(tmp_path / "run") == circuit


def answer(done: Run, table: str, sql: str | None = None) -> Any:
    """What a query says, as the command line asks it."""
    folder = done.folder
    files, _ = folder.tables([table])
    return query.query(files, folder.place.fs, sql or f"FROM {table}").to_pylist()


READERS: dict[str, Callable[[Run, str], Any]] = {
    "query": answer,
    "table": lambda done, table: done.table(table).to_pylist(),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("table", ["nodes", "edges", "prompts", "neurons", "failed"])
def test_no_flipped_bit_of_a_run_reads_as_other_numbers(done: Run, reader: str, table: str) -> None:
    read = READERS[reader]
    before = read(done, table)
    folder = Path(done.address)
    path = next(iter((folder / table).iterdir())) if (folder / table).is_dir() else folder / f"{table}.parquet"
    chance = random.Random(1)
    for _ in range(12):
        content = flipped(path, chance.randrange(8 * path.stat().st_size))
        try:
            assert read(done, table) == before
        except RunError:
            pass
        finally:
            path.write_bytes(content)
    assert read(done, table) == before


def test_no_flipped_bit_reads_as_another_graph_of_one_prompt(tmp_path: Path) -> None:
    job = {"kind": "dataset", "input": {"task": "sva", "structure": "simple", "count": 2}, "nodes": 20}
    made = run(job, tmp_path, pool=InlinePool())
    before = graph_of(made.address, 1)
    path, chance = next(iter((tmp_path / "edges").iterdir())), random.Random(3)
    for _ in range(12):
        content = flipped(path, chance.randrange(8 * path.stat().st_size))
        with refused(RunError, "other content"):
            graph_of(made.address, 1)
        path.write_bytes(content)
    assert graph_of(made.address, 1) == before


def test_the_folders_name_is_no_column_and_a_lost_file_is_said(done: Run, tmp_path: Path) -> None:
    assert {row["layer"] for row in answer(done, "nodes")} != {3}
    lost = dataset(tmp_path)
    next(iter((Path(lost.address) / "nodes").iterdir())).unlink()
    (Path(lost.address) / "neurons.parquet").unlink()
    files, gaps = lost.folder.tables(["nodes", "neurons"])
    assert (len(files["nodes"]), [gap.rpartition("/")[2][-10:] for gap in gaps]) == (2, ["is missing"] * 2)
    assert lost.folder.tables(["prompts"])[1] == []


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    made = dataset(tmp_path)
    made.folder.delete_outputs()
    made.folder.uncommit(1)
    files, gaps = made.folder.tables(["prompts", "neurons"])
    assert len(files["prompts"]) == 2
    assert gaps[0] == "the run is unfinished: 8 of 12 prompts are there"
    assert "neurons is made when a run ends" in gaps[1]


def test_a_record_that_was_changed_by_hand_is_not_believed(circuit: Circuit, tmp_path: Path) -> None:
    circuit.save(tmp_path)
    path = tmp_path / "run.json"
    path.write_text(path.read_text().replace(f'"metric": {circuit.metric}', '"metric": 9.5'))
    with refused(RunError, "run.json", "other content"):
        Circuit.load(tmp_path)


def test_a_run_that_was_damaged_is_not_compacted(done: Run) -> None:
    path = next(iter((Path(done.address) / "nodes").iterdir()))
    content = flipped(path, 8 * (path.stat().st_size // 2))
    with refused(RunError, path.name):
        done.folder.tables(["nodes", "edges"])
    path.write_bytes(content)


def changed(circuit: Circuit, table: str, column: str, change: Callable[[Any], Any]) -> Circuit:
    """A circuit whose table has another column."""
    rows = getattr(circuit, table)
    values = [None if value is None else change(value) for value in rows[column].to_pylist()]
    at = rows.schema.get_field_index(column)
    return circuit.model_copy(update={table: rows.set_column(at, column, pa.array(values, rows.schema.field(at).type))})


@pytest.mark.parametrize(
    ("table", "column", "change", "rule"),
    [
        ("nodes", "activation", lambda value: value * 2, "activation times its gradient"),
        ("nodes", "gradient", lambda value: -value, "activation times its gradient"),
        ("nodes", "attribution", lambda value: value * 1e39, "not finite"),
        ("links", "attribution", lambda value: value * 1.01, "its part of its target's"),
        ("links", "weight", lambda value: value * 1.01, "its share of its target's activation"),
        ("links", "target", lambda value: 0, "does not lead into a later layer"),
    ],
)
def test_a_circuit_that_breaks_an_identity_is_not_loaded(
    circuit: Circuit, table: str, column: str, change: Callable[[Any], Any], rule: str, tmp_path: Path
) -> None:
    changed(circuit, table, column, change).save(tmp_path)
    with refused(RunError, "is not a circuit", rule):
        Circuit.load(tmp_path)


@pytest.mark.parametrize(
    ("fields", "rule"),
    [({"unexplained": 0.5}, "leave unexplained"), ({"n_total": 3}, "more nodes"), ({"kept_mass": 1.5}, "a share")],
)
def test_a_record_that_breaks_an_identity_is_not_loaded(
    circuit: Circuit, fields: dict[str, Any], rule: str, tmp_path: Path
) -> None:
    circuit.model_copy(update=fields).save(tmp_path)
    with refused(RunError, "is not a circuit", rule):
        Circuit.load(tmp_path)


def test_sealing_again_after_a_change_is_what_makes_it_count(circuit: Circuit, tmp_path: Path) -> None:
    circuit.save(tmp_path)
    sealed = RunFolder(tmp_path).place.read_json("_SUCCESS.json")
    assert set(sealed["files"]) == {"run.json", "neurons.parquet"}
    pq.write_table(pq.read_table(tmp_path / "neurons.parquet"), tmp_path / "neurons.parquet")
    with refused(RunError, "neurons.parquet has other content"):
        RunFolder(tmp_path).tables(["neurons"])
    RunFolder(tmp_path).seal()
    assert RunFolder(tmp_path).tables(["neurons"])[1] == []


def test_a_look_up_is_of_what_was_compacted(done: Run) -> None:
    files, place = done.folder.tables(["nodes", "edges"])[0], done.folder.place
    compaction.compact(files["nodes"], files["edges"], place.fs, place)
    path = next(iter((Path(done.address) / "compact" / "nodes").iterdir()))
    layer = int(path.stem.removeprefix("layer_"))
    neuron = pq.read_table(path)["neuron"][0].as_py()
    before, chance = compaction.lookup(place, layer, neuron), random.Random(2)
    for _ in range(60):
        content = flipped(path, chance.randrange(8 * path.stat().st_size))
        try:
            assert compaction.lookup(place, layer, neuron).equals(before)
        except RunError:
            pass
        finally:
            path.write_bytes(content)
