"""Job files to start from: commented, shipped with the package, and they run as they are on the shipped model."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import tracer
from inline import InlinePool
from tracer.choices import Template
from tracer.cli.app import app
from tracer.cli.init import templates
from tracer.runs.jobs import load_job

ROOT = Path(__file__).parents[2]


def run(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


@pytest.mark.parametrize("kind", ["dataset", "sva", "exemplars", "cases"])
def test_what_is_written_is_planned_as_it_is(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written = run("init", kind)
    assert written.exit_code == 0, written.output
    command = written.stdout.split("next: tracer ")[1].splitlines()[0].split()
    path = Path(command[1])
    assert path.read_text().count("#") > 5
    assert str(path) in path.read_text(), "its commands name it"
    planned = run(*command)
    assert planned.exit_code == 0, planned.output
    again = run("init", kind)
    assert (again.exit_code, "is there already" in again.stderr) == (2, True)
    path.write_text("")
    assert run("init", kind, "--overwrite").exit_code == 0
    assert load_job(path).kind


def test_what_is_written_runs_as_it_is(tmp_path: Path) -> None:
    assert run("init", "exemplars", "--out", str(tmp_path / "job.yaml")).exit_code == 0
    job = load_job(tmp_path / "job.yaml", ["input.count=8", "shard_size=4"])
    done = tracer.run(job, tmp_path / "run", pool=InlinePool())
    assert done.table("exemplars").num_rows > 0


def test_templates_ship_with_the_package() -> None:
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["tracer.runs"]
    folder = ROOT / "tracer" / "runs"
    found = {one for form in shipped for one in folder.glob(form)}
    assert found == set((folder / "templates").rglob("*.yaml"))
    assert {"addition", "capitals"} < {one.stem for one in templates("cases", Path("x"))}
    for kind in set(Template.__args__) - {"cases"}:  # type: ignore[attr-defined]
        ((_, text),) = templates(kind, Path("mine.yaml")).items()
        assert f"jobs/{kind}.yaml" not in text
        assert load_job(ROOT / "jobs" / f"{kind}.yaml") == load_job(folder / "templates" / f"{kind}.yaml")
