"""The verb compare: which options name a side, what is printed and written, and one line for what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import tracer
from tracer.cli.app import app

TEXT, OTHER = "The keys near the cabinet", "The key near the cabinet"


def said(*words: str) -> Result:
    return CliRunner().invoke(app, ["compare", *words])


@pytest.fixture(scope="module")
def circuits(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Folders of two prompts' circuits on the demo."""
    root, model = tmp_path_factory.mktemp("circuits"), tracer.load("demo")
    made = []
    for name, text in (("plural", TEXT), ("singular", OTHER)):
        circuit = tracer.trace(model, tracer.Prompt(text, target=" are", foil=" is"), nodes=20)
        made.append(str(circuit.save(root / name)))
    return made


def test_two_circuits_are_compared_and_everything_is_written(circuits: list[str], tmp_path: Path) -> None:
    told = said(*circuits, "--out", str(tmp_path / "out"), "--rows", "5")
    assert told.exit_code == 0, told.output
    for part in ("plural and singular", "appeared", "different prompts", "One prompt has"):
        assert part in told.output
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"comparison.parquet", "compared.csv", "courses.png", "report.html", "graphs.html"} <= names


def test_scripts_get_json_and_csv(circuits: list[str]) -> None:
    found = json.loads(said(*circuits, "--format", "json").stdout)
    assert [side["name"] for side in found["sides"]] == ["plural", "singular"]
    rows = said(*circuits, "--format", "csv").stdout.strip().splitlines()
    assert len(rows) == len(found["nodes"]) + 1
    assert rows[0].startswith("layer,position,neuron,expert,change,attribution_first")


def test_two_prompts_on_one_model_have_the_changes_of_their_circuits(circuits: list[str]) -> None:
    words = ["--text", TEXT, "--text", OTHER, "--target", " are", "--foil", " is", "--nodes", "20"]
    one, other = (json.loads(said(*given, "--format", "json").stdout) for given in (words, circuits))
    assert one["all_neurons_known"]
    assert not other["all_neurons_known"]  # at the positions that a circuit keeps
    changes = [{(row["layer"], row["neuron"]): row["change"] for row in found["nodes"]} for found in (one, other)]
    assert changes[0].keys() == changes[1].keys()
    assert one["counts"]["appeared"] == other["counts"]["appeared"]
    assert [side["name"] for side in one["sides"]] == [TEXT, OTHER]


def test_models_are_asked_the_prompts_of_a_file(tmp_path: Path) -> None:
    rows = [{"text": text, "target": " are", "foil": " is", "id": str(at)} for at, text in enumerate((TEXT, OTHER))]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["demo", "demo", "--prompts", str(tmp_path / "p.jsonl"), "--name", "one", "--name", "two", "--nodes", "10"]
    found = json.loads(said(*words, "--format", "json").stdout)
    assert found["n_prompts"] == [2, 2]
    assert found["paired_by"] == "id"
    assert {row["difference"] for row in found["nodes"]} == {0.0}
    (tmp_path / "q.txt").write_text(f"{TEXT}\n{OTHER}\n")
    (tmp_path / "r.txt").write_text(f"{OTHER}\n{TEXT}\n")
    words = ["--prompts", str(tmp_path / "q.txt"), "--prompts", str(tmp_path / "r.txt"), "--metric", "topk"]
    found = json.loads(said(*words, "--format", "json").stdout)
    assert [side["name"] for side in found["sides"]] == ["prompts 1", "prompts 2"]
    assert found["paired_by"] == "text"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], "no side"),
        (["demo", "--text", "a"], "leave nothing to compare"),
        (["a", "b", "--nodes", "5"], "only has an effect on models"),
        (["--text", "a", "--prompts", "b.txt"], "give one of them"),
        (["--target", " are", "demo", "demo"], "only has an effect with --text"),
        (["a", "--revision", "x", "--text", "t"], "both name models"),
        (["--adapter", "x", "--revision", "y", "--text", "t"], "give one of them"),
        (["demo", "demo", "--text", "t", "--text", "u"], "compared on one model"),
        (["--text", "t", "--text", "u", "--text", "v", "--target", " a", "--target", " b"], "for 3 prompts"),
        (["a", "b", "--open"], "without --out"),
        (["nothing-here", "nor-here"], "nothing-here"),
    ],
)
def test_what_cannot_be_is_one_line(words: list[str], wanted: str) -> None:
    told = said(*words)
    assert told.exit_code == 2
    assert wanted in told.output
    assert told.output.count("\n") <= 2
