"""Runs over many prompts on a mixture of experts: their tables say experts, jobs name neurons by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import runs
import tiny
import tracer
from helpers import refused
from inline import InlinePool
from mixtures import D_EXPERT, N_EXPERTS, mixture
from tracer.circuit.from_run import circuit_of, graph_of
from tracer.errors import JobError, TracerError
from tracer.runs.jobs import load_job

TEXTS = [f"the {noun} near the keys" for noun in ("car", "man", "men", "key")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny.save(mixture().module, tmp_path_factory.mktemp("mixture") / "model"))


def job(path: Path, model: Path, **changes: Any) -> dict[str, Any]:
    rows = ({"id": f"p/{at}", "text": text, "target": " are", "foil": " is"} for at, text in enumerate(TEXTS))
    file = runs.lines(path / "prompts.jsonl", rows)
    made = {"kind": "dataset", "input": {"path": file}, "model": str(model), "shard_size": 2, "nodes": 30}
    return made | {"circuit": "free", "tokens": 5} | changes


def test_tables_say_experts_and_a_job_leaves_neurons_out_by_them(folder: Path, tmp_path: Path) -> None:
    first = tracer.run(job(tmp_path, folder), tmp_path / "first", pool=InlinePool())
    out = next(row for row in first.table("circuit").to_pylist() if row["expert"] is not None)
    name = f"L{out['layer']} E{out['expert']} N{out['neuron'] % D_EXPERT}"
    steering = {"prompts": 2, "factors": [0], "random": 2}
    made = job(tmp_path, folder, exclude=[name, "0/5"], steering=steering)
    run = tracer.run(made, tmp_path / "run", pool=InlinePool())
    left_out = {(out["layer"], out["neuron"]), (0, 5)}
    for table in ("nodes", "neurons", "top_prompts", "circuit", "circuit_nodes"):
        rows = run.table(table).to_pylist()
        neurons = [row for row in rows if row.get("kind", "neuron") == "neuron"]
        assert neurons
        for row in neurons:
            assert row["expert"] == (None if row["layer"] == 0 else row["neuron"] // D_EXPERT)
            assert (row["layer"], row["neuron"]) not in left_out
        assert all(row["expert"] is None for row in rows if row.get("kind", "neuron") != "neuron")
    circuit = circuit_of(tmp_path / "run")
    assert circuit.numbering.name(2, 13) == graph_of(tmp_path / "run", 1).numbering.name(2, 13) == "L2 E1 N1"
    page = (tmp_path / "run" / "report.html").read_text()
    row = next(row for row in run.table("circuit").to_pylist() if row["expert"] is not None)
    assert f"E{row['expert']} N{row['neuron'] % D_EXPERT}" in page
    steered = pq.read_table(tmp_path / "run" / "steering.parquet").to_pylist()
    assert {row["draw"] for row in steered} == {-1, 0, 1}


def test_a_job_that_names_an_expert_that_there_is_not_is_refused(folder: Path, tmp_path: Path) -> None:
    for name, rule in ((f"2/{N_EXPERTS}/0", f"has {N_EXPERTS} experts"), ("0/1/3", "layer 0 has no experts")):
        with refused(TracerError, rule):
            tracer.run(job(tmp_path, folder, exclude=[name]), tmp_path / "run", overwrite=True, pool=InlinePool())


def test_exemplars_are_of_the_neurons_named(folder: Path, tmp_path: Path) -> None:
    texts = runs.lines(tmp_path / "texts.jsonl", ({"text": text} for text in TEXTS))
    made = {"kind": "exemplars", "input": {"path": texts}, "model": str(folder), "exemplars": 2}
    named = tracer.run(made | {"neurons": ["L2 E0 N3", "2:3:4", "0/5"]}, tmp_path / "named", pool=InlinePool())
    flat = tracer.run(made | {"neurons": ["2/3", [2, 40], "0/5"]}, tmp_path / "flat", pool=InlinePool())
    for table in ("exemplars", "densities"):
        assert named.table(table).equals(flat.table(table))
    assert {(row["layer"], row["neuron"]) for row in named.table("densities").to_pylist()} == {(2, 3), (2, 40), (0, 5)}
    assert "Layer 2 neuron E3 N4" in (tmp_path / "named" / "report.html").read_text()


def test_jobs_read_every_form_and_keep_that_of_before() -> None:
    made = load_job(
        {"kind": "dataset", "input": {"task": "sva", "structure": "simple", "count": 2}, "exclude": ["3/120", [1, 2]]}
    )
    assert made.numbers()["exclude"] == [[3, 120], [1, 2]]
    made = load_job(
        {"kind": "dataset", "input": {"task": "sva", "structure": "simple", "count": 2}, "exclude": ["L3 E1 N2"]}
    )
    assert made.numbers()["exclude"] == [[3, 1, 2]]
    with refused(JobError, "LAYER/EXPERT/NEURON"):
        load_job({"kind": "dataset", "input": {"task": "sva", "structure": "simple", "count": 2}, "exclude": ["3.1"]})
