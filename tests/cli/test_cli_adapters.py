"""Adapters on the command line and in jobs: merged, named by the record, refused in the words of the surface."""

from __future__ import annotations

import html
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import tiny as t
import tracer
from helpers import refused
from tracer.cli.app import app
from tracer.errors import JobError, TracerWarning
from tracer.runs.jobs import DatasetJob, load_job
from tracer.runs.plan.local import plan
from tracer.store.run_folder import RunFolder

peft = pytest.importorskip("peft")

ASKED = ("The car near", "--target", " are", "--foil", " is")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, an adapter, and the two in one folder."""
    place = tmp_path_factory.mktemp("adapters")
    t.save(t.tiny("llama"), place / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["v_proj", "up_proj"], r=2)
        peft.get_peft_model(t.tiny("llama"), settings).save_pretrained(str(place / "lora"))
    path = place / "lora" / "adapter_model.safetensors"
    save_file({name: torch.full_like(value, 0.2) for name, value in load_file(path).items()}, path)
    t.save(t.tiny("llama"), place / "both")
    for file in (place / "lora").glob("adapter_*"):
        (place / "both" / file.name).write_bytes(file.read_bytes())
    return place


def test_trace_merges_an_adapter_and_evaluate_and_show_know_it(place: Path, tmp_path: Path) -> None:
    base, lora, out = str(place / "base"), str(place / "lora"), str(tmp_path / "run")
    done = run("trace", *ASKED, "--model", base, "--adapter", lora, "--out", out)
    assert done.exit_code == 0, done.stderr
    merged = tracer.load(base, adapter=lora)
    circuit = tracer.Circuit.load(out)
    assert circuit.model.adapter == lora
    assert circuit.model.fingerprint == merged.fingerprint
    assert f"{base} with {lora} merged" in done.stdout
    pairs = tmp_path / "pairs.jsonl"
    pair = {"clean_prefix": "The cars near", "patch_prefix": "The car near", "case": "plural_singular"}
    pairs.write_text(f"{json.dumps(pair | {'clean_answer': ' are', 'patch_answer': ' is'})}\n" * 3)
    told = run("evaluate", out, "--pairs", str(pairs), "--ablation", "zero", "--sizes", "50,100")
    assert told.exit_code == 0, told.stderr
    assert f"adapter={lora!r}" in html.unescape(Path(f"{out}/report.html").read_text())
    moved = Path(shutil.move(lora, f"{lora}-moved"))
    try:
        assert "is no folder" in run("evaluate", out, "--pairs", str(pairs)).stderr
        again = run("evaluate", out, "--pairs", str(pairs), "--sizes", "50,100", "--adapter", str(moved))
        assert "was traced on another model" not in again.stderr
    finally:
        shutil.move(moved, lora)


def test_steer_and_doctor_take_an_adapter(place: Path) -> None:
    base, lora = str(place / "base"), str(place / "lora")
    plain = run("steer", *ASKED, "--model", base, "--factor", "1", "--max-new-tokens", "0", "--random", "0")
    merged = run("steer", *ASKED, "--model", base, "--adapter", lora, "--factor", "1", "--max-new-tokens", "0")
    assert plain.exit_code == merged.exit_code == 0
    assert plain.stdout != merged.stdout
    done = run("doctor", base, "--adapter", lora)
    assert done.exit_code == 0, done.stdout
    assert "peft" in done.stdout
    refused = run("doctor", base, "--adapter", lora, "--remote")
    assert refused.exit_code == 2
    assert "--adapter" in refused.stderr


def test_an_adapter_beside_the_weights_is_noted_once_and_by_show(place: Path, tmp_path: Path) -> None:
    both = str(place / "both")
    done = run("trace", *ASKED, "--model", both, "--out", str(tmp_path))
    assert done.exit_code == 0
    assert done.stderr.count("note: the adapter beside the weights") == 1
    again = run("show", str(tmp_path))
    assert again.stderr.count("note: the adapter beside the weights") == 1
    apart = run("trace", *ASKED, "--model", str(place / "base"), "--adapter", str(place / "lora"), "--format", "json")
    assert json.loads(apart.stdout)["metric"] == pytest.approx(tracer.Circuit.load(tmp_path).metric, rel=1e-6)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--adapter", "./nowhere"], "adapter './nowhere': is no folder"),
        (["--adapter", "./nowhere", "--remote"], "--adapter ./nowhere: cannot be merged into weights on a server"),
    ],
)
def test_a_wrong_adapter_is_one_line(place: Path, more: list[str], expected: str) -> None:
    found = run("trace", *ASKED, "--model", str(place / "base"), *more)
    assert found.exit_code == 2
    assert found.stderr.startswith(f"error: {expected}")
    assert found.stderr.count("\n") == 1


def test_an_adapter_as_the_model_names_the_option(place: Path) -> None:
    found = run("trace", *ASKED, "--model", str(place / "lora"))
    assert found.exit_code == 2
    assert "is an adapter alone" in found.stderr
    assert f"--adapter {place / 'lora'}" in found.stderr


# -------------------------------------------------------------------------------------------------------- jobs


def job(place: Path, **keys: Any) -> dict[str, Any]:
    prompts = place / "prompts.jsonl"
    prompts.write_text('{"text": "The car near", "target": " are", "foil": " is"}\n')
    return {"kind": "dataset", "input": {"path": str(prompts)}, "nodes": 10, **keys}


@pytest.mark.slow
@pytest.mark.long
def test_a_run_merges_its_jobs_adapter_and_keeps_what_was_said(place: Path, tmp_path: Path) -> None:
    base, lora, both = (str(place / name) for name in ("base", "lora", "both"))
    asked = load_job(job(place, model=base, adapter=lora))
    assert isinstance(asked, DatasetJob)
    assert asked.loading() == {"adapter": lora}
    assert asked.numbers()["adapter"] == lora
    assert plan(asked).shape == plan(load_job(job(place, model=base))).shape  # merged, it is no larger
    tracer.run(job(place, model=base, adapter=lora), out=tmp_path / "apart")
    with pytest.warns(TracerWarning, match="adapter beside the weights"):
        tracer.run(job(place, model=both), out=tmp_path / "both")
    apart, beside = (RunFolder(str(tmp_path / name)).record() for name in ("apart", "both"))
    assert apart is not None
    assert beside is not None
    assert apart["model"]["adapter"] == lora
    assert "warnings" not in apart
    assert ["is merged into them" in text for text in beside["warnings"]] == [True]
    assert apart["model"]["fingerprint"] == beside["model"]["fingerprint"] != tracer.load(base).fingerprint


def test_a_job_without_an_adapter_is_the_job_it_was(place: Path) -> None:
    assert "adapter" not in load_job(job(place)).numbers()


def test_a_remote_job_takes_no_adapter(place: Path) -> None:
    with refused(JobError, "adapter", "on a server"):
        load_job(job(place, remote=True, adapter="a/b"))
