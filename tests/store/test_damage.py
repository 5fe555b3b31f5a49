"""A file that changed must never read as other numbers, and what is not there must be said: every reader of a run.

Bits are flipped in tests/attacks/test_bits.py."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import runs
import tracer
from helpers import refused
from tracer import Circuit, Run, RunError
from tracer.store import aggregation, compaction, edge_means
from tracer.store.run_folder import RunFolder

PROMPT = tracer.Prompt("The secretaries near the car", target=" are", foil=" is")


@pytest.fixture(scope="module")
def circuit() -> Circuit:
    return tracer.trace(tracer.load(), PROMPT, nodes=12)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return runs.tiny(tmp_path_factory.mktemp("damage"))


def test_the_folders_name_is_no_column_and_a_lost_file_is_said(done: Run, tmp_path: Path) -> None:
    assert {row["layer"] for row in runs.answer(done, "nodes")} != {3}
    lost = runs.tiny(tmp_path)
    next(iter((Path(lost.address) / "nodes").iterdir())).unlink()
    (Path(lost.address) / "neurons.parquet").unlink()
    files, gaps = lost.folder.tables(["nodes", "neurons"])
    assert (len(files["nodes"]), [gap.rpartition("/")[2][-10:] for gap in gaps]) == (2, ["is missing"] * 2)
    assert lost.folder.tables(["prompts"])[1] == []


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    made = runs.tiny(tmp_path)
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
    content = runs.flipped(path, 8 * (path.stat().st_size // 2))
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


def test_readers_that_end_in_an_error_leave_no_thread(done: Run, tmp_path: Path) -> None:
    lost = runs.tiny(tmp_path)
    files, place = lost.folder.tables(["nodes", "edges"])[0], lost.folder.place
    Path(files["edges"][1]).write_bytes(b"x")
    kept: list[BaseException] = []  # whose tracebacks hold every frame
    for act in (
        lambda: compaction.compact(files["nodes"], files["edges"], place.fs, place),
        lambda: edge_means.write_edges_mean(files["nodes"], files["edges"], place.fs, io.BytesIO()),
        lambda: aggregation.neurons([*files["nodes"], files["edges"][0]], place.fs),
        lambda: aggregation.top_prompts([*files["nodes"], files["edges"][0]], place.fs),
    ):
        with pytest.raises(RunError) as caught:
            act()
        kept.append(caught.value)
        assert [one.name for one in threading.enumerate() if one.name.startswith("tracer-read")] == []
