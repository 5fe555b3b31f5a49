"""A damaged or lost run.json or input.parquet is made again from the job and the commits, and nothing is made up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import runs
import tracer
from helpers import refused
from inline import InlinePool
from tracer import RunError, run
from tracer.cli.app import app
from tracer.store.run_folder import RunFolder

Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tracer.Run:
    return runs.tiny(tmp_path_factory.mktemp("repair"))


@pytest.fixture
def folder(whole: tracer.Run, tmp_path: Path) -> Path:
    """A run of which one unit of three is not done."""
    shutil.copytree(whole.address, tmp_path / "run")
    RunFolder(tmp_path / "run").delete_outputs()
    RunFolder(tmp_path / "run").uncommit(2)
    return tmp_path / "run"


def again(job: Any, folder: Path, **how: Any) -> tracer.Run:
    return run(job, folder, pool=InlinePool(), factory="fake_runs:Tiny", **how)


def edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Change:
    def act(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(change(content) or content))

    return act


DAMAGES: dict[str, Change] = {
    "run.json is lost": lambda at: (at / "run.json").unlink(),
    "run.json is empty": lambda at: (at / "run.json").write_bytes(b""),
    "a key is gone": edit("run.json", lambda content: content.pop("n_units") and None),
    "a key is another": edit("run.json", lambda content: content.update(n_units=7)),
    "the memory is another": edit("run.json", lambda content: content.update(memory=7)),
    "input.parquet is lost": lambda at: (at / "input.parquet").unlink(),
    "input.parquet is cut": lambda at: (at / "input.parquet").write_bytes((at / "input.parquet").read_bytes()[:-9]),
    "both are lost": lambda at: [(at / name).unlink() for name in ("run.json", "input.parquet")],
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("ended", [False, True], ids=["unfinished", "ended"])
def test_what_is_damaged_is_made_again_and_the_run_ends_as_if_it_had_not_been(
    whole: tracer.Run, folder: Path, damage: str, ended: bool
) -> None:
    if ended:
        again(whole.job, folder)
    before = json.loads((folder / "run.json").read_text())
    DAMAGES[damage](folder)
    with refused(RunError, "repair=True"):
        again(whole.job, folder)
    done = again(whole.job, folder, repair=True)
    assert done.resumed == (3 if ended else 2)
    runs.same(folder, whole.address)
    record = RunFolder(folder).record()
    assert record is not None
    kept = before.keys() - {"created", "digest", "prompt_notes"}
    assert {name: record[name] for name in kept} == {name: before[name] for name in kept}
    assert again(whole.job, folder, repair=True).resumed == 3  # nothing is damaged


def test_the_command_line_says_what_helps_and_it_does(whole: tracer.Run, folder: Path, tmp_path: Path) -> None:
    (folder / "run.json").write_text("{")
    for words in (["status"], ["query", "FROM nodes"], ["show", "--prompt", "1"]):
        result = CliRunner().invoke(app, [words[0], str(folder), *words[1:]])
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
        assert "repeat the run command with --repair" in result.stderr
    assert "--repair" in CliRunner().invoke(app, ["run", "--help"], env={"COLUMNS": "200"}).stdout


@pytest.mark.parametrize("key", ["nodes", "method", "shard_size"])
def test_commits_of_another_job_are_not_taken(whole: tracer.Run, folder: Path, key: str) -> None:
    (folder / "run.json").unlink()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    job = whole.job.model_copy(update={key: {"nodes": 7, "method": "grad", "shard_size": 3}[key]})
    with refused(RunError, "cannot be repaired", "give the job that made it"):
        again(job, folder, repair=True)
    for path, content in before.items():
        assert path.name in (".lock", "input.parquet") or path.read_bytes() == content


def test_commits_of_other_prompts_are_not_taken(whole: tracer.Run, folder: Path, tmp_path: Path) -> None:
    rows = [{"text": f"prompt {number}"} for number in range(12)]
    rows[5], rows[6] = rows[6], rows[5]
    other = {"kind": "dataset", "input": {"path": runs.lines(tmp_path / "o.jsonl", rows)}, "shard_size": 4}
    for name in ("run.json", "input.parquet"):
        (folder / name).unlink()
    with refused(RunError, "cannot be repaired", "another job"):  # of another path
        again(other, folder, repair=True)
    text = Path(whole.job.input.path[0])  # type: ignore[union-attr, index]
    kept = text.read_text()
    try:
        text.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with refused(RunError, "cannot be repaired", "unit 1 is of other prompts"):
            again(whole.job, folder, repair=True)
    finally:
        text.write_text(kept)
    assert not (folder / "input.parquet").exists()
    again(whole.job, folder, repair=True)
    runs.same(folder, whole.address)


def test_commits_of_other_versions_or_that_do_not_say_are_not_taken(whole: tracer.Run, folder: Path) -> None:
    record = (folder / "run.json").read_bytes()
    (folder / "run.json").unlink()
    commit = json.loads((folder / "_commits" / "0.json").read_text())
    del commit["digest"]
    for change in ({"job": "0" * 64}, {"model": None}, {"threads": "1"}, {"memory": None}):
        said = {**commit["made_by"], **change}
        (folder / "_commits" / "0.json").write_text(json.dumps({**commit, "made_by": said}))
        with refused(RunError, "cannot be repaired"):
            again(whole.job, folder, repair=True)
    del commit["made_by"]
    (folder / "_commits" / "0.json").write_text(json.dumps(commit))
    with refused(RunError, "nothing in it says which job"):
        again(whole.job, folder, repair=True)
    # What an older version left: its record must say what its commits do not.
    left = json.loads(record)
    del left["digest"], left["n_units"]
    (folder / "run.json").write_text(json.dumps(left))
    assert again(whole.job, folder, repair=True).resumed == 2
    runs.same(folder, whole.address)


def test_a_larger_limit_is_a_repair_and_more_prompts(whole: tracer.Run, folder: Path) -> None:
    small = whole.job.model_copy(update={"limit": 6})
    shutil.rmtree(folder)
    again(small, folder)
    (folder / "run.json").unlink()
    assert again(whole.job, folder, repair=True).resumed == 1  # the shard that was not full is done again
    runs.same(folder, whole.address)


def test_a_damaged_record_with_nothing_done_is_begun_again(whole: tracer.Run, folder: Path) -> None:
    for unit in range(2):
        RunFolder(folder).uncommit(unit)
    (folder / "run.json").write_text("[]")
    with refused(RunError, "run.json", "repair=True"):
        again(whole.job, folder)
    assert again(whole.job, folder, repair=True).resumed == 0
    runs.same(folder, whole.address)


def test_a_real_runs_prompts_are_those_of_its_input(tmp_path: Path) -> None:
    """Also where a prompt has no text, fails, or begins with a token of its own."""
    rows: list[dict[str, Any]] = [{"text": "The keys", "id": "a"}, {"token_ids": [5, 6, 7]}, {"text": "x " * 3000}]
    job = {"kind": "dataset", "input": {"path": runs.lines(tmp_path / "p.jsonl", rows)}, "nodes": 5, "bos": True}
    made = run(job, tmp_path / "run", pool=InlinePool())
    before = runs.tables(made.address)
    for name in ("run.json", "input.parquet"):
        (tmp_path / "run" / name).unlink()
    again_ = run(job, tmp_path / "run", pool=InlinePool(), repair=True)
    assert again_.resumed == 1
    assert {name: runs.bits(table) for name, table in runs.tables(made.address).items()} == {
        name: runs.bits(table) for name, table in before.items()
    }
