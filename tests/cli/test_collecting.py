"""The verb exemplars: how its options become a job, what it prints, and one line for what cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import tracer
from inline import InlinePool
from tracer.cli import collecting
from tracer.cli.app import app
from tracer.runs import driver
from tracer.runs.jobs import ExemplarsJob

JOBS = Path(__file__).parents[2] / "jobs"


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[ExemplarsJob]:
    """The jobs that the verb ran, each by a worker in this process."""
    seen: list[ExemplarsJob] = []
    whole = driver.run

    def run(job: Any, out: Any, **options: Any) -> Any:
        seen.append(job)
        how: dict[str, Any] = options | {"pool": InlinePool()}
        return whole(job, out, **how)

    monkeypatch.setattr(driver, "run", run)
    return seen


def said(*words: str) -> Result:
    return CliRunner().invoke(app, ["exemplars", *words])


def texts(folder: Path, column: str = "text") -> str:
    path = folder / "texts.jsonl"
    lines = ("the cars near the old house are red", "he said the girls run")
    path.write_text("".join(json.dumps({column: line}) + "\n" for line in lines))
    return str(path)


def test_a_file_is_read_and_the_same_command_resumes(tmp_path: Path, jobs: list[ExemplarsJob]) -> None:
    words = [
        texts(tmp_path, "body"),
        "--column",
        "body",
        "--neurons",
        "1/13,3/1",
        "--neurons",
        "0/2",
        "--exemplars",
        "2",
    ]
    first = said(*words, "--out", str(tmp_path / "run"))
    assert first.exit_code == 0, first.output
    assert jobs[0].neurons == ((1, 13), (3, 1), (0, 2))
    assert "Where neurons are strong" in first.stdout
    assert "2 documents (2 ok)" in first.stdout
    assert "beginning-of-sequence token does not count" in first.stdout
    assert "1 of 1 units were there already" in said(*words, "--out", str(tmp_path / "run")).stdout


def test_a_job_takes_the_options_and_a_run_names_neurons_and_model(
    tmp_path: Path, jobs: list[ExemplarsJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tracer.load("demo")
    tracer.trace(model, tracer.Prompt("The cars near the house", target=" are"), nodes=4, edges=False).save(
        tmp_path / "one"
    )
    words = [str(JOBS / "exemplars.yaml"), "--of", str(tmp_path / "one"), "--top", "2", "--limit", "4"]
    result = said(*words, "--out", str(tmp_path / "run"))
    assert result.exit_code == 0, result.output
    assert (jobs[0].of, jobs[0].top, jobs[0].neurons, jobs[0].limit) == (str(tmp_path / "one"), 2, (), 4)
    assert (jobs[0].model, jobs[0].window) == ("demo", 64)
    loaded = collecting.Loaded().keys(str(tmp_path / "one"))
    assert loaded == {"model": "demo", "dtype": "float32"}
    assert collecting.Loaded(model="other").keys(str(tmp_path / "one")) == {"model": "other"}


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ("--neurons", "--of")),
        (["--neurons", "3"], ("LAYER/NEURON",)),
        (["--neurons", "1/2", "--top", "3"], ("top only has an effect with of",)),
        (["--of", "nowhere"], ("nowhere", "holds no run")),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path: Path, words: list[str], parts: tuple[str, ...]) -> None:
    result = said(texts(tmp_path), *words, "--out", str(tmp_path / "run"))
    assert result.exit_code == 2
    assert all(part in result.stderr for part in parts), result.stderr
    assert "Traceback" not in result.output


def test_another_kind_of_job_is_for_run(tmp_path: Path) -> None:
    result = said(str(JOBS / "dataset.yaml"), "--neurons", "1/2", "--out", str(tmp_path / "run"))
    assert (result.exit_code, "tracer run" in result.stderr) == (2, True)
