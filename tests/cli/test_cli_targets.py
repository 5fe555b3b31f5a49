"""What a circuit can be of beside tokens, on the command line and in job files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

import tracer
from helpers import refused
from tracer.cli.app import app
from tracer.runs.driver import run as run_job
from tracer.runs.jobs import load_job
from tracer.settings import TargetDirection, TargetNeuron

TEXT = "The secretaries near the car"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def traced(*arguments: str) -> dict[str, Any]:
    result = run("trace", TEXT, *arguments, "--format", "json", "--nodes", "20")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_options_ask_what_the_library_asks(tmp_path: Path) -> None:
    model = tracer.load("demo")
    row = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    save_file({"v": row}, tmp_path / "v.safetensors")
    asked: list[tuple[list[str], dict[str, Any], dict[str, Any]]] = [
        (["--of", "L2 N250-"], {}, {"of": "L2 N250-"}),
        (["--share", "0.8"], {}, {"share": 0.8}),
        (["--answer", " are was"], {"answer": " are was"}, {}),
        (
            ["--direction", str(tmp_path / "v.safetensors"), "--direction-layer", "1"],
            {},
            {"of": tracer.direction(row, 1, label="v")},
        ),
        (
            ["--target", " are", "--basis", "attention", "--method", "relp-ig", "--steps", "2"],
            {"target": " are"},
            {"basis": "attention", "method": "relp-ig", "steps": 2},
        ),
    ]
    for options, of_prompt, how in asked:
        wanted = tracer.trace(model, tracer.Prompt(TEXT, **of_prompt), 20, **how)
        assert traced(*options)["fingerprint"] == wanted.fingerprint


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--of", "L2 N250", "--target", " are"], ("target", "--of")),
        (["--of", "L2 N250", "--share", "0.5"], ("--share", "--of")),
        (["--metric", "logprob", "--of", "L2 N250"], ("--metric logprob", "--of")),
        (["--of", "L99 N1"], ("--of", "layers 0..3")),
        (["--of", "N1"], ("--of", "neither a neuron nor a direction")),
        (["--direction-layer", "1"], ("--direction-layer", "--direction")),
        (["--direction", "absent.json"], ("absent.json", "cannot be read")),
        (["--answer", " are", "--target", " is"], ("target", "--answer")),
        (["--answer", " are", "--edges"], ("edges", "--metric logit")),
        (["--answer", " are", "--rollout", "2"], ("--rollout", "--answer")),
        (["--target", " are", "--basis", "residual", "--edges"], ("--basis residual", "no direct edges")),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(options: list[str], parts: tuple[str, ...]) -> None:
    result = run("trace", TEXT, *options)
    assert result.exit_code == 2
    for part in parts:
        assert part in result.output


def test_a_neurons_circuit_is_shown_and_evaluated_from_its_folder(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    assert run("trace", TEXT, "--of", "L2 N250-", "--nodes", "15", "--out", folder).exit_code == 0
    text = run("show", folder).output
    for part in ("negative value of L2 N250", "L2 N250- = -3.9902", "target L2 N250- @5", "units of the neuron"):
        assert part in text
    result = run("evaluate", folder, "--sizes", "5,15")
    assert result.exit_code == 0, result.output
    assert run("export", folder, "--out", str(tmp_path / "g.json")).exit_code == 0
    again = tracer.import_graph(tmp_path / "g.json")
    assert isinstance(again, tracer.Circuit)
    assert again.fingerprint == tracer.Circuit.load(folder).fingerprint
    assert [row["token"] for row in again.ends] == ["L2 N250-"]


def job(**keys: Any) -> Any:
    return load_job({"kind": "dataset", "input": {"task": "sva", "structure": "simple", "count": 4}, **keys}, [])


def test_a_job_says_what_it_is_of(tmp_path: Path) -> None:
    (tmp_path / "v.json").write_text("[1.0, 0.5]")
    one = job(of="L2 N7-")
    assert one.of == TargetNeuron(layer=2, neuron=7, sign=-1)
    assert one.asks == "neuron"
    other = job(of={"file": str(tmp_path / "v.json"), "layer": 1})
    assert other.of == TargetDirection(vector=(1.0, 0.5), layer=1, label="v")
    assert job(share=0.5).asks == "share"
    for made in (one, other, job(share=0.5)):
        assert load_job(json.loads(json.dumps(made.model_dump(mode="json"))), []) == made
    assert "of" not in job().numbers()
    assert "share" not in job().numbers()
    assert not job(basis="residual").edges
    for keys, parts in (
        ({"of": "N7"}, ("neither a neuron",)),
        ({"of": "L1 N7", "metric": "logit"}, ("metric", "L1 N7")),
        ({"basis": "attention", "edges": True}, ("attention", "edges: false")),
        ({"basis": "attention", "profiles": True}, ("attention", "profiles")),
        ({"share": 0.5, "input": {"task": "sva", "structure": "simple", "count": 4, "filter": "correct"}}, ("filter",)),
    ):
        with refused(tracer.JobError, *parts):
            job(**keys)


@pytest.mark.slow
def test_a_run_is_of_a_neuron_and_of_answers(tmp_path: Path) -> None:
    rows = [{"text": TEXT, "reply": " are"}, {"text": "The keys near the cabinet", "reply": " are here"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = str(tmp_path / "rows.jsonl")
    model = tracer.load("demo")
    of = load_job({"kind": "dataset", "input": {"path": path}, "of": "L2 N250-", "nodes": 9, "circuit": "free"}, [])
    found = run_job(of, str(tmp_path / "of"))
    assert found.table("prompts").to_pylist()[0]["metric"] == pytest.approx(
        tracer.trace(model, tracer.Prompt(TEXT), 9, of="L2 N250-").metric, rel=1e-5
    )
    columns = {"text": "text", "answer": "reply"}
    job = {"kind": "dataset", "input": {"path": path, "columns": columns}, "metric": "logprob", "nodes": 9}
    found = run_job(load_job(job, []), str(tmp_path / "answers"))
    for number, row in enumerate(rows):
        wanted = tracer.attribute(model, [tracer.Prompt(row["text"], answer=row["reply"])])
        metric = found.table("prompts").to_pylist()[number]["metric"]
        assert metric == pytest.approx(float(wanted.metric), rel=1e-5)
