"""The verbs for runs: what they print, where they write, and one line for what cannot be."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

import old_folders
from loaded import COMPUTES, loaded_by
from tracer.cli.app import app
from tracer.errors import RemoteError
from tracer.runs import driver, status
from tracer.runs.status import Status
from tracer.store.run_folder import RunFolder

JOBS = Path(__file__).parents[2] / "jobs"


def run(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    rows = [
        {"id": "a", "text": "The keys near the cabinet", "target": " are", "foil": " is", "topic": "keys"},
        {"id": "b", "text": "The secretaries near the car", "target": " are", "foil": " is", "topic": "people"},
        {"id": "c", "text": "", "target": " are", "foil": " is", "topic": "nothing"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def words(lines: Path, out: Path) -> list[str]:
    return [
        *("run", str(JOBS / "dataset.yaml"), "--out", str(out), "--workers", "1", "--shard-size", "2"),
        *("--set", f"input={{path: {lines}, labels: [topic]}}", "--set", "baseline=zero", "--set", "nodes=20"),
        *("--set", "evaluate=null", "--set", "circuit=free", "--set", "quality=0"),
    ]


@pytest.fixture(scope="module")
def done(lines: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    out = tmp_path_factory.mktemp("runs") / "run"
    return out, run(*words(lines, out))


def test_run_says_what_became_of_every_prompt(done: tuple[Path, Result]) -> None:
    out, result = done
    assert result.exit_code == 0, result.output
    assert "3 prompts (1 failed, 2 ok)" in result.stdout
    assert "error from failed" in result.stdout
    assert "Neurons in most circuits" in result.stdout
    failed = pq.read_table(out / "failed.parquet").to_pylist()
    assert [(row["user_id"], row["status"], row["error_type"]) for row in failed] == [("c", "failed", "JobError")]
    prompts = [row for file in (out / "prompts").iterdir() for row in pq.read_table(file).to_pylist()]
    assert {row["user_id"]: dict(row["labels"])["topic"] for row in prompts} == {
        "a": "keys",
        "b": "people",
        "c": "nothing",
    }
    circuit = pq.read_table(out / "circuit.parquet")
    assert circuit.num_rows == 20
    assert set(circuit["position"].to_pylist()) == {-1}


def test_the_same_command_again_has_nothing_to_do(done: tuple[Path, Result], lines: Path) -> None:
    out, _ = done
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}
    again = run(*words(lines, out), "--resume")
    assert again.exit_code == 0, again.output
    assert "2 of 2 units were there already" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")} == before
    strict = run(*words(lines, out), "--strict")
    assert strict.exit_code == 2
    assert "1 of 3 prompts: failed" in strict.stderr
    other = run(*words(lines, out), "--set", "nodes=21")
    assert other.exit_code == 2
    assert "nodes differ" in other.stderr


def test_status_of_a_finished_run_and_of_damage(done: tuple[Path, Result]) -> None:
    out, _ = done
    found = run("status", str(out))
    assert found.exit_code == 0, found.output
    for part in ("done", "3 of 3 committed", "2 ok", "1 JobError", "all there"):
        assert part in found.stdout
    assert json.loads(run("status", str(out), "--format", "json").stdout)["status"]["statuses"] == {
        "failed": 1,
        "ok": 2,
    }
    file = next(iter((out / "nodes").iterdir()))
    whole = file.read_bytes()
    file.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    try:
        damaged = run("status", str(out))
        assert damaged.exit_code == 1
        assert file.name in damaged.stdout
        assert run("status", str(out), "--quick").exit_code == 0
    finally:
        file.write_bytes(whole)


def test_a_run_of_schema_version_2_shows_the_same(done: tuple[Path, Result], tmp_path: Path) -> None:
    out, _ = done
    asked = [("show", "--prompt", "0"), ("show", "--prompt", "0", "--format", "csv"), ("status",)]
    before = [run(verb, str(out), *words) for verb, *words in asked]
    shutil.copytree(out, tmp_path / "old")
    old_folders.make_old(tmp_path / "old")
    for (verb, *words), wanted in zip(asked, before, strict=True):
        found = run(verb, str(tmp_path / "old"), *words)
        assert found.exit_code == wanted.exit_code == 0, found.output
        if verb == "show":
            assert len(found.stdout.splitlines()) == len(wanted.stdout.splitlines())
    assert run("query", str(tmp_path / "old"), "select unexplained, status from prompts").exit_code == 0


def test_query_and_compact(done: tuple[Path, Result]) -> None:
    out, _ = done
    found = run("query", str(out), "select user_id, status from prompts order by prompt_id", "--format", "csv")
    assert found.stdout.split() == ["user_id,status", "a,ok", "b,ok", "c,failed"]
    assert run("query", str(out), "select nothing from prompts").exit_code == 2
    early = run("compact", str(out), "--neuron", "1/13")
    assert early.exit_code == 2
    assert "tracer compact" in early.stderr
    assert "sorted by neuron" in run("compact", str(out)).stdout
    row = next(row for file in (out / "nodes").iterdir() for row in pq.read_table(file).to_pylist())
    look = run("compact", str(out), "--neuron", f"{row['layer']}/{row['neuron']}")
    assert look.exit_code == 0, look.output
    assert f"rows of layer {row['layer']} neuron {row['neuron']}" in look.stdout


def test_one_prompt_of_a_run_is_shown_and_drawn(done: tuple[Path, Result], tmp_path: Path) -> None:
    out, _ = done
    shown = run("show", str(out), "--prompt", "1")
    assert shown.exit_code == 0, shown.output
    assert "The secretaries near the car" in shown.stdout
    assert run("view", str(out), "--prompt", "0", "--out", str(tmp_path / "page.html")).exit_code == 0
    for number, part in (("2", "failed"), ("3", "0 to 2")):
        refused = run("show", str(out), "--prompt", number)
        assert refused.exit_code == 2
        assert part in refused.stderr
    own = run("show", str(out))  # the circuit that the prompts have in common
    assert own.exit_code == 0, own.output
    assert "2 prompts" in own.stdout


def test_plan_says_what_a_job_needs() -> None:
    found = run(
        "plan", str(JOBS / "dataset.yaml"), "--limit", "10", "--set", "input={task: sva, structure: rc, count: 20}"
    )
    assert found.exit_code == 0, found.output
    for part in ("predicted memory", "workers on this machine", "prompts: 10, about", "disk: about", "time: --measure"):
        assert part in found.stdout


def test_plan_measures_what_the_job_takes() -> None:
    small = ("--set", "input={task: sva, structure: rc, count: 8}", "--set", "shard_size=4", "--workers", "1")
    found = run("plan", str(JOBS / "dataset.yaml"), *small, "--measure")
    assert found.exit_code == 0, found.output
    assert re.search(r"time: about \d+ s with 1 worker, beside \d+ s of loading", found.stdout)
    refused = run("plan", str(JOBS / "sva.yaml"), "--measure")
    assert refused.exit_code == 2
    assert "--measure: only a dataset can be measured" in refused.stderr


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["run", str(JOBS / "dataset.yaml"), "--out", "OUT", "--resume"], "no run to resume"),
        (["run", str(JOBS / "dataset.yaml"), "--out", "OUT", "--gpus-per-worker", "1.5"], "1.5"),
        (["run", str(JOBS / "dataset.yaml"), "--out", "OUT", "--workers", "0"], "--workers 0"),
        (["run", str(JOBS / "dataset.yaml"), "--out", "OUT", "--set", "input={path: nowhere.jsonl}"], "nowhere.jsonl"),
        (["run", str(JOBS / "dataset.yaml"), "--out", "s3://key:secret@bucket/x"], "holds a key"),
        (["status", "OUT"], "no run"),
        (["query", "OUT", "select 1"], "holds no run"),
        (["compact", "OUT", "--neuron", "x"], "LAYER/NEURON"),
        (["plan", "nowhere.yaml"], "nowhere.yaml"),
        (["submit"], "needs one of"),
        (["submit", str(JOBS / "dataset.yaml")], "--out"),
        (["submit", "--follow", "x", "--address", "http://127.0.0.1:9"], "127.0.0.1:9"),
    ],
)
def test_bad_input_is_one_line(given: list[str], expected: str, tmp_path: Path) -> None:
    result = run(*(word.replace("OUT", str(tmp_path / "out")) for word in given))
    assert result.exit_code == 2, result.output
    assert result.stderr.splitlines()[-1].count(expected) >= 1, result.stderr
    assert "secret" not in result.stderr


def test_a_service_that_goes_away_is_told_with_what_is_kept(
    lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Status(kind="dataset", state="running", statuses={"ok": 48}, started=0.0, updated=0.0)

    def gone(*_: object, watch: Callable[[Status], None], **__: object) -> None:
        watch(seen)
        raise RemoteError("server a.host", "cannot be reached", "try again later")

    monkeypatch.setattr(driver, "run", gone)
    result = run(*words(lines, tmp_path / "run"))
    assert result.exit_code == 2
    said = "cannot be reached; try again later; 48 prompts are committed, repeat the command to resume"
    assert said in " ".join(result.stderr.split())


def test_status_says_what_is_waited_for(done: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch) -> None:
    found = status.condition(done[0])
    waits = found.status.model_copy(update={"state": "running", "waiting": "a.host, 12 s, queued: 3rd in the queue"})
    monkeypatch.setattr(status, "condition", lambda *_, **__: found.model_copy(update={"status": waits}))
    said = " ".join(run("status", str(done[0])).stdout.split())
    assert "waiting for a.host, 12 s, queued: 3rd in the queue" in said


@pytest.mark.parametrize("words", [("status",), ("query", "select count(*) from nodes"), ("compact",)])
def test_verbs_that_read_a_run_import_nothing_that_computes(done: tuple[Path, Result], words: tuple[str, ...]) -> None:
    verb, *more = words
    assert loaded_by(verb, str(done[0]), *more) & COMPUTES == set()


def test_query_says_what_a_run_has_lost_and_refuses_under_strict(done: tuple[Path, Result], tmp_path: Path) -> None:
    out, sql = tmp_path / "run", "select count(*) as n from prompts"
    shutil.copytree(done[0], out)
    whole = run("query", str(out), sql, "--format", "csv", "--strict")
    assert (whole.exit_code, whole.stdout.split(), whole.stderr) == (0, ["n", "3"], "")
    assert run("query", str(out), "select user_id from failed", "--format", "csv").stdout.split() == ["user_id", "c"]
    RunFolder(out).uncommit(0)
    RunFolder(out).delete_outputs()
    found = run("query", str(out), sql, "--format", "csv")
    assert "unfinished" in found.stderr
    assert found.stdout.split() != ["n", "3"]
    strict = run("query", str(out), sql, "--strict")
    assert (strict.exit_code, strict.stdout) == (2, "")
    assert "leave out --strict" in strict.stderr
