"""Folders of the schema version before this one: they are read under today's names, and are not resumed."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import old_folders
import runs
import s3
import tracer
from helpers import load, refused
from inline import InlinePool
from tracer import Circuit, Prompt, RunError
from tracer.cli.app import app
from tracer.runs import status
from tracer.runs.driver import Run, run
from tracer.store import compaction, schemas
from tracer.store.query import SCHEMAS, query

PROMPT = Prompt("The secretaries near the car", target=" are", foil=" is")


@pytest.fixture(scope="module")
def circuit() -> Circuit:
    return tracer.trace(load("llama"), PROMPT, nodes=20)


def without_gradient(table: pa.Table) -> pa.Table:
    """A version-2 folder has none."""
    place = table.column_names.index("gradient")
    return table.set_column(place, "gradient", pa.nulls(table.num_rows, pa.float32()))


@pytest.fixture
def single(circuit: Circuit, tmp_path: Path) -> Path:
    circuit.save(tmp_path / "single")
    old_folders.make_old(tmp_path / "single")
    assert "remainder" in pq.read_schema(next((tmp_path / "single" / "nodes").iterdir())).names
    return tmp_path / "single"


def test_a_circuit_of_version_2_is_the_circuit_it_was(circuit: Circuit, single: Path) -> None:
    found = Circuit.load(single)
    assert found == circuit.model_copy(update={"nodes": without_gradient(circuit.nodes)})
    assert found.nodes.schema == schemas.NODES
    assert (found.unexplained, found.fingerprint) == (circuit.unexplained, circuit.fingerprint)


def test_the_verbs_read_a_circuit_of_version_2(circuit: Circuit, single: Path, tmp_path: Path) -> None:
    for words in (["show"], ["show", "--format", "json"], ["view"], ["export", "--out", str(tmp_path / "g.csv")]):
        more = ["--format", "csv"] if words[0] == "export" else []
        result = CliRunner().invoke(app, [words[0], str(single), *words[1:], *more])
        assert result.exit_code == 0, result.output
    with (tmp_path / "g.nodes.csv").open() as file:
        rows = list(csv.DictReader(file))
    wanted = circuit.nodes["bias_share"].to_pylist()[:20]
    assert [float(row["bias_share"]) for row in rows[:20]] == pytest.approx(wanted, rel=1e-6)


def test_the_same_circuit_replaces_one_of_version_2(circuit: Circuit, single: Path) -> None:
    circuit.save(single)
    assert Circuit.load(single) == circuit
    assert json.loads((single / "run.json").read_text())["schema_version"] == schemas.SCHEMA_VERSION


def test_the_old_name_of_unexplained_answers_with_a_warning(circuit: Circuit) -> None:
    with pytest.warns(DeprecationWarning, match="unexplained"):
        assert circuit.residual == circuit.unexplained


def test_a_record_with_both_names_is_damaged(single: Path) -> None:
    record = json.loads((single / "run.json").read_text())
    record["circuit"]["unexplained"] = 0.0
    (single / "run.json").write_text(json.dumps(record))
    with refused(RunError, "damaged"):
        Circuit.load(single)


@pytest.fixture(scope="module")
def store() -> Iterator[s3.Store]:
    with s3.server() as made:
        yield made


def job(path: Path) -> dict[str, object]:
    file = runs.lines(
        path / "prompts.jsonl", ({"id": f"p/{number}", "text": f"prompt {number}"} for number in range(6))
    )
    return {"kind": "dataset", "input": {"path": file}, "shard_size": 4}


@pytest.fixture(params=["local", "s3"])
def done(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    out = tmp_path / "run" if request.param == "local" else request.getfixturevalue("store").address()
    return run(job(tmp_path), out, pool=InlinePool(), factory="fake_runs:Tiny")


def test_a_run_of_version_2_is_read_under_todays_names(done: Run) -> None:
    before = {name: done.table(name) for name in ("prompts", "nodes", "edges", "neurons", "failed")}
    old_folders.make_old(done.address)
    for name, table in before.items():
        assert done.table(name).equals(table), name
    assert status.condition(done.address).problems == ()
    files, fs = done.folder.tables(SCHEMAS)[0], done.folder.place.fs
    for name in ("prompts", "nodes", "edges", "neurons"):
        assert query(files, fs, f"FROM {name}").column_names == before[name].column_names
    assert query(files, fs, "SELECT count(unexplained) AS n FROM prompts").to_pylist() == [{"n": 0}]
    assert query(files, fs, "SELECT max(attribution) AS m FROM nodes")["m"][0].as_py() == max(
        before["nodes"]["attribution"].to_pylist()
    )


def test_a_run_of_version_2_is_compacted_with_todays_columns(done: Run) -> None:
    old_folders.make_old(done.address)
    files, place = done.folder.tables(("nodes", "edges"))[0], done.folder.place
    compaction.compact(files["nodes"], files["edges"], place.fs, place)
    (neuron,) = {*done.table("nodes")["neuron"].to_pylist()[:1]}
    assert compaction.lookup(place, 0, neuron).schema == schemas.NODES


def test_a_run_of_version_2_is_not_resumed_and_can_be_replaced(done: Run, tmp_path: Path) -> None:
    old_folders.make_old(done.address)
    with refused(RunError, "schema version '2'", "this tracer reads '3'"):
        run(job(tmp_path), done.address, pool=InlinePool(), factory="fake_runs:Tiny")
    again = run(job(tmp_path), done.address, overwrite=True, pool=InlinePool(), factory="fake_runs:Tiny")
    assert (again.resumed, again.table("nodes").num_rows) == (0, 12)
