"""The verb neuron, and the job key tokens: what a run knows of a neuron beside what its weights say."""

from __future__ import annotations

import csv
import html
import io
import json
from pathlib import Path

import pyarrow as pa
import pytest
from typer.testing import CliRunner

import tracer
from helpers import refused
from inline import InlinePool
from tracer.circuit.from_run import read_graph
from tracer.circuit.said import Said
from tracer.cli.app import app
from tracer.errors import JobError, RunError
from tracer.meaning import strongest as of_runs
from tracer.reports import sheet
from tracer.runs.jobs import load_job
from tracer.store.parquet import encoded
from tracer.store.schemas import DESCRIPTIONS, EXEMPLARS, TOKENS

JOB = {
    "kind": "dataset", "input": {"task": "capitals", "count": 4}, "shard_size": 2, "nodes": 20, "edges": False,
    "circuit": "free", "tokens": 6,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens") / "run"
    tracer.run(JOB, folder, pool=InlinePool())
    return folder


def strongest(run: Path) -> tuple[int, int]:
    row = tracer.run(JOB, run, pool=InlinePool()).table("circuit").slice(0, 1).to_pylist()[0]
    return row["layer"], row["neuron"]


def shown(*words: str) -> str:
    done = CliRunner().invoke(app, ["neuron", *words])
    assert done.exit_code == 0, done.output
    return done.output


def test_a_neuron_is_shown_within_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = shown("1", "324", "--top", "12")
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    for word in ("promotes", "suppresses", "driven by", "gate", "up", "L1 N324 +", "L1 N324 -"):
        assert word in text
    (plus, minus) = tracer.neuron_tokens(tracer.load("demo"), [(1, 324)], 12)
    for one in (*plus.promoted, *minus.driven_by):
        assert sheet.token(one.text)[:9] in text


def test_json_and_csv_hold_every_list() -> None:
    found = tracer.neuron_tokens(tracer.load("demo"), [(0, 7)], 3)
    content = json.loads(shown("0", "7", "--top", "3", "--format", "json"))
    assert [tracer.NeuronTokens.model_validate(one) for one in content["neurons"]] == found
    rows = list(csv.DictReader(io.StringIO(shown("0", "7", "--top", "3", "--format", "csv"))))
    assert [row["token"] for row in rows if row["list"] == "promoted" and row["polarity"] == "-1"] == [
        token.text for token in found[1].promoted
    ]
    assert float(rows[0]["value"]) == found[0].promoted[0].value


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("4", "0"), ("layer 4, neuron 0", "layers 0 to 3 and neurons 0 to 383")),
        (("0", "384"), ("layer 0, neuron 384",)),
        (("0", "1", "--run", "nowhere"), ("holds no run",)),
    ],
)
def test_what_is_not_there_is_one_line(words: tuple[str, ...], parts: tuple[str, ...]) -> None:
    done = CliRunner().invoke(app, ["neuron", *words])
    assert done.exit_code == 2
    assert all(part in done.output for part in parts), done.output
    assert "Traceback" not in done.output


def test_a_run_writes_the_tokens_of_its_strongest_neurons(run: Path) -> None:
    done = tracer.run(JOB, run, pool=InlinePool())
    table, circuit = done.table("tokens"), done.table("circuit").to_pylist()
    assert table.schema.remove_metadata() == TOKENS
    keys = [(row["layer"], row["neuron"], sign) for row in circuit[:6] for sign in (1, -1)]
    assert list(zip(*(table[name].to_pylist() for name in ("layer", "neuron", "polarity")), strict=True)) == keys
    again = tracer.promoted(tracer.load("demo"), keys)
    for name in ("promoted", "suppressed", "driven_by"):
        assert table[f"{name}_ids"].to_pylist() == again[f"{name}_ids"].to_pylist()
        mine, its = (one[f"{name}_values"].to_pylist() for one in (table, again))
        assert all(row == pytest.approx(wanted, rel=1e-4, abs=1e-6) for row, wanted in zip(mine, its, strict=True))
    graph = read_graph(run)
    assert graph.neuron_tokens is not None
    assert read_graph(run, 0).neuron_tokens == graph.neuron_tokens
    assert "promotes" in CliRunner().invoke(app, ["show", str(run)]).output
    page = (run / "report.html").read_text()
    assert "promotes" in page
    known = {(row["layer"], row["neuron"]): row for row in done.table("neurons").to_pylist()}
    for row in circuit[:6]:  # named by the sign of their mean activation
        activation = known[row["layer"], row["neuron"]]["mean_activation"]
        assert html.escape(Said(table).label(row | {"activation": activation})) in page
    assert CliRunner().invoke(app, ["query", str(run), "select count(*) from tokens"]).exit_code == 0


def test_the_key_decides_nothing_else_and_is_checked() -> None:
    plain = {name: value for name, value in JOB.items() if name != "tokens"}
    assert "tokens" not in load_job(plain).numbers()
    assert load_job(JOB).numbers() == load_job(plain).numbers() | {"tokens": 6}
    assert load_job(JOB).ends_with_model  # type: ignore[union-attr]
    assert not load_job(plain).ends_with_model  # type: ignore[union-attr]
    with refused(JobError, "tokens"):
        load_job(JOB | {"tokens": 0})


@pytest.mark.parametrize("basis", ["residual", "attention"])
def test_bases_without_neurons_have_no_tokens(basis: str, tmp_path: Path) -> None:
    model = tracer.load("demo")
    place, words = str(tmp_path / "run"), ["trace", "The keys near the car", "--target", " are", "--basis", basis]
    done = CliRunner().invoke(app, [*words, "--nodes", "9", "--out", place])
    assert done.exit_code == 0, done.output
    assert "promotes" not in done.output
    circuit = tracer.Circuit.load(place)
    assert circuit.neuron_tokens is None
    for ask in (
        lambda: tracer.with_tokens(model, circuit),
        lambda: tracer.neuron_tokens(model, [(0, 1)], basis=basis),
        lambda: load_job(JOB | {"basis": basis}),
    ):
        with refused(JobError, basis, "leave tokens out"):
            ask()
    done = CliRunner().invoke(app, [*words, "--tokens"])
    assert done.exit_code == 2
    assert f"--basis {basis}" in done.output
    done = CliRunner().invoke(app, ["neuron", "0", "1", "--run", place])
    assert done.exit_code == 2
    assert "no neurons" in done.output
    with refused(RunError, basis, "no neurons"):
        of_runs.strongest(place, 3)


def test_what_a_run_knows_of_a_neuron_stands_beside(run: Path) -> None:
    layer, neuron = strongest(run)
    key = {"layer": layer, "neuron": neuron, "polarity": 1}
    said = [key | {"description": "says [states]\x1b[31m", "score": 0.25, "source": "us"}]
    (run / "descriptions.parquet").write_bytes(encoded(pa.Table.from_pylist(said, schema=DESCRIPTIONS)))
    piece = {"kind": "top", "rank": 1, "value": 2.0, "document": 0, "position": 5, "start": 4}
    piece |= {"tokens": ["in", " Texas", "."], "values": [0.0, 2.0, 0.0]}
    (run / "exemplars.parquet").write_bytes(encoded(pa.Table.from_pylist([key | piece], schema=EXEMPLARS)))
    try:
        text = shown(str(layer), str(neuron), "--run", str(run), "--top", "3")
        content = json.loads(shown(str(layer), str(neuron), "--run", str(run), "--format", "json"))
    finally:
        for name in ("descriptions", "exemplars"):
            (run / f"{name}.parquet").unlink()
    assert "says [states]\\x1b[31m" in text
    assert "in[ Texas]." in text
    assert "the capital of the state containing" in text
    top = content["run"]["top_prompts"]
    assert content["run"]["neurons"][0]["n_prompts"] == len({row["prompt_id"] for row in top})
    assert top[0]["text"].startswith("the capital of the state containing")
    assert content["run"]["exemplars"][0]["tokens"] == piece["tokens"]
