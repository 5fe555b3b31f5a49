"""GGUF files on the command line, in jobs and in workers: loaded by name, recorded, and found again."""

from __future__ import annotations

import html
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import ggufs
import tracer
from helpers import refused
from inline import InlinePool
from tracer.cli.app import app
from tracer.errors import JobError, RunError
from tracer.runs.jobs import DatasetJob, load_job
from tracer.runs.plan.local import plan
from tracer.store.run_folder import RunFolder

ASKED = ("The keys near the cabinet", "--target", " are", "--foil", " is", "--bos")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two files, of unequal models."""
    folder = tmp_path_factory.mktemp("two")
    for seed, name in enumerate(("a.gguf", "b.gguf")):
        ggufs.write(ggufs.tiny("gemma3", seed=seed), folder / name, "gemma3")
    return folder


@pytest.mark.parametrize("by_file", [True, False])
def test_trace_reads_a_file_and_evaluate_and_steer_find_it_again(by_file: bool, place: Path, tmp_path: Path) -> None:
    out, which = str(tmp_path / "run"), ["--model", str(place / "b.gguf")]
    if not by_file:
        which = ["--model", str(place), "--gguf-file", "b.gguf"]
    done = run("trace", *ASKED, *which, "--out", out)
    assert done.exit_code == 0, done.stderr
    circuit = tracer.Circuit.load(out)
    assert circuit.model.fingerprint == tracer.load(place / "b.gguf").fingerprint
    assert circuit.tokens[:2] == ("<bos>", "The")
    assert "read from F32 (b.gguf, SHA-256" in " ".join(done.stdout.split())
    pairs = tmp_path / "pairs.jsonl"
    pair = {"clean_prefix": "The keys near the cabinet", "patch_prefix": "The key near the cabinet"}
    pairs.write_text(f"{json.dumps(pair | {'clean_answer': ' are', 'patch_answer': ' is', 'case': 'a_b'})}\n" * 3)
    how = ("--ablation", "zero", "--sizes", "50,100", "--allow-overlap")
    told = run("evaluate", out, "--pairs", str(pairs), *how)
    assert told.exit_code == 0, told.stderr
    page = html.unescape(Path(f"{out}/report.html").read_text())
    assert "read from F32 (b.gguf, SHA-256" in page
    assert (", gguf_file='b.gguf')" in page) is not by_file
    steered = run("steer", *ASKED, "--nodes", out, "--factor", "0", "--max-new-tokens", "0", "--random", "0")
    assert steered.exit_code == 0, steered.stderr


def test_a_folder_of_several_is_one_line_with_the_option(place: Path) -> None:
    for verb, how in (("trace", ()), ("steer", ("--factor", "0"))):
        told = run(verb, *ASKED, *how, "--model", str(place))
        assert told.exit_code == 2
        assert told.stderr.count("\n") == 1
        assert "a.gguf, b.gguf" in told.stderr
        assert "--gguf-file a.gguf" in told.stderr


def test_doctor_measures_the_identities_on_a_file(place: Path) -> None:
    told = run("doctor", str(place), "--gguf-file", "a.gguf")
    assert told.exit_code == 0, told.stderr
    refusal = run("doctor", str(place), "--gguf-file", "a.gguf", "--remote").stderr
    assert "--gguf-file a.gguf: is dequantised here" in refusal


def test_a_job_names_a_file_in_its_identity_only_if_it_names_one(place: Path) -> None:
    job = {"kind": "dataset", "model": str(place), "input": {"task": "sva", "structure": "simple", "count": 4}}
    plain, named = load_job(job), load_job(job | {"gguf_file": "a.gguf"})
    assert "gguf_file" not in plain.numbers()
    assert isinstance(named, DatasetJob)
    assert named.numbers()["gguf_file"] == named.loading()["gguf_file"] == "a.gguf"
    with refused(JobError, "gguf_file", "no server"):
        load_job(job | {"gguf_file": "a.gguf", "remote": True})
    assert plan(named).shape.weight_bytes == 4 * sum(
        value.numel() for value in tracer.load(place / "a.gguf").module.parameters()
    )


def test_workers_of_a_run_read_the_file_and_another_in_its_place_is_refused(tmp_path: Path) -> None:
    ggufs.write(ggufs.tiny("gemma3"), tmp_path / "m.gguf", "gemma3")
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"text": f"The {word} near the cabinet", "target": " are"} for word in ("key", "keys", "cabinet")]
    prompts.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    job = {"kind": "dataset", "model": str(tmp_path / "m.gguf"), "input": {"path": str(prompts)}, "bos": True}
    job |= {"nodes": 10, "shard_size": 1, "edges": False}
    done = tracer.run(job, out=str(tmp_path / "run"), pool=InlinePool())
    assert done.status.statuses == {"ok": 3}
    record = RunFolder(str(tmp_path / "run")).record()
    assert record is not None
    assert record["model"]["gguf"]["types"] == ["F32"]
    assert record["model"]["fingerprint"] == tracer.load(tmp_path / "m.gguf").fingerprint
    shown = run("status", str(tmp_path / "run"))
    assert "read from F32 (m.gguf, SHA-256" in " ".join(shown.stdout.split())
    sorted((tmp_path / "run" / "_commits").glob("*.json"))[-1].unlink()
    ggufs.write(ggufs.tiny("gemma3", seed=1), tmp_path / "m.gguf", "gemma3")
    with refused(RunError, "is not the one the run was started with (gguf, fingerprint differ)"):
        tracer.run(job, out=str(tmp_path / "run"), pool=InlinePool())
