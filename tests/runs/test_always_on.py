"""Neurons that are always on, left out of a run and of a trace: exactly as if they had been excluded by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import tiny
import tracer
from helpers import fresh, refused
from inline import InlinePool
from tracer.cli.app import app
from tracer.errors import JobError
from tracer.evaluation.quality import Constancy, Question, constant_neurons
from tracer.prompts import Prompt
from tracer.runs.jobs import load_job
from tracer.runs.units import always_on as stage

NEURON = (1, 5)
PAIRS = {"task": "sva", "structure": "nounpp", "count": 4}
TABLES = ("circuit", "circuit_nodes", "circuit_edges", "neurons", "top_prompts", "edges_mean")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a neuron that is 30 whatever the prompt, a file of prompts, and one of unrelated prompts."""
    place, model = tmp_path_factory.mktemp("constant"), fresh("gpt2", n_layers=2)
    block = model.module.transformer.h[NEURON[0]].mlp
    block.c_fc.weight.data[:, NEURON[1]] = 0
    block.c_fc.bias.data[NEURON[1]] = 30
    tiny.save(model.module, place / "model")
    for name, seed in (("prompts", 3), ("unrelated", 8)):
        draw = torch.Generator().manual_seed(seed)
        rows = torch.randint(4, 90, (12, 6), generator=draw).tolist()
        target = {"target_ids": [40]} if name == "prompts" else {}
        lines = [json.dumps({"token_ids": [1, *row], **target}) for row in rows]
        (place / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return place


def ran(folder: Path, out: Path, said: list[str] | None = None, **changes: Any) -> dict[str, Any]:
    """The record of a finished run."""
    job = {"kind": "dataset", "model": str(folder / "model"), "input": {"path": str(folder / "prompts.jsonl")}}
    job |= {"shard_size": 5, "nodes": 20, "circuit": "aligned", "bos": False}
    tracer.run(job | changes, out, pool=InlinePool(), note=(said if said is not None else []).append)
    return json.loads((out / "run.json").read_text())


def tables(out: Path) -> dict[str, bytes]:
    run = {name: (out / f"{name}.parquet").read_bytes() for name in TABLES}
    parts = [path for name in ("nodes", "edges") for path in (out / name).iterdir()]
    return run | {path.name.partition("-")[0] + path.parent.name: path.read_bytes() for path in parts}


@pytest.mark.parametrize("unrelated", [pytest.param(False, marks=[pytest.mark.slow, pytest.mark.long]), True])
def test_a_run_without_them_is_the_run_that_excludes_them(folder: Path, tmp_path: Path, unrelated: bool) -> None:
    given = {"unrelated": {"path": str(folder / "unrelated.jsonl")}} if unrelated else {}
    said: list[str] = []
    record = ran(folder, tmp_path / "left", said, always_on={"leave_out": True, **given})
    ran(folder, tmp_path / "named", exclude=["1/5"])
    assert [(one["layer"], one["neuron"]) for one in record["always_on"]["neurons"]] == [NEURON]
    assert tables(tmp_path / "left") == tables(tmp_path / "named")
    what = "unrelated prompts" if unrelated else "prompts of the run"
    (note,) = [text for text in said if "always-on" in text]
    assert note.startswith(f"1 always-on neurons on 12 {what}, left out: L1 N5")


def test_by_default_they_are_named_alone(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    record = ran(folder, tmp_path / "named", said, always_on={})
    ran(folder, tmp_path / "plain")
    assert tables(tmp_path / "named") == tables(tmp_path / "plain")
    assert any("not left out: L1 N5" in text for text in said)
    model = tracer.load(folder / "model")
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    prompts = [Prompt(token_ids=row["token_ids"], target=row["target_ids"]) for row in rows]
    job = load_job(record["job"])
    assert job.kind == "dataset"
    (wanted,) = constant_neurons(model, prompts, Question(job.settings(), {}), Constancy())
    (one,) = record["always_on"]["neurons"]
    assert one == pytest.approx({name: getattr(wanted, name) for name in one}, rel=1e-4, abs=1e-6)
    mine = tracer.attribute(model, prompts).nodes[:, NEURON[0], 1:, NEURON[1]].abs().amax(1)
    strong = mine >= 0.005 * tracer.attribute(model, prompts).metric.abs()
    assert one["share"] == pytest.approx(float(strong.float().mean()))
    assert one["attribution"] == pytest.approx(float(mine[strong].mean()), rel=1e-4)
    assert one["spread"] == pytest.approx(float(mine[strong].std(correction=0)), rel=1e-3)


def test_they_are_looked_for_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, asked = stage.constant_neurons, list[int]()

    def counted(model: Any, prompts: Any, *rest: Any, **how: Any) -> Any:
        asked.append(len(prompts))
        return plain(model, prompts, *rest, **how)

    monkeypatch.setattr(stage, "constant_neurons", counted)
    record = ran(folder, tmp_path / "run", always_on={"leave_out": True, "prompts": 9}, limit=10)
    again = ran(folder, tmp_path / "run", always_on={"leave_out": True, "prompts": 9}, limit=12)  # it grows
    assert asked == [9]
    assert again["always_on"] == record["always_on"]
    ran(folder, tmp_path / "named", exclude=["1/5"])
    assert tables(tmp_path / "run") == tables(tmp_path / "named")


def test_too_few_prompts_are_refused(folder: Path, tmp_path: Path) -> None:
    with refused(JobError, "at least 2"):
        ran(folder, tmp_path / "run", limit=1, always_on={})
    with refused(JobError, "prompts"):
        load_job({"kind": "dataset", "input": PAIRS, "always_on": {"prompts": 1}})
    with refused(JobError, "share"):
        load_job({"kind": "dataset", "input": PAIRS, "always_on": {"share": 1.0}})


def test_older_runs_are_the_same_job() -> None:
    """Keys that are not given are not among a job's numbers."""
    job = load_job({"kind": "dataset", "input": PAIRS})
    assert "always_on" not in job.numbers()
    asked = {"test": PAIRS | {"split": "test"}, "sizes": [3]}
    job = load_job({"kind": "dataset", "input": PAIRS, "circuit": "free", "evaluate": asked})
    assert "edges" not in job.numbers()["evaluate"]
    assert load_job(job.numbers()) == job


# ------------------------------------------------------------------------------------------ trace


def test_a_trace_without_them_is_the_trace_that_excludes_them(folder: Path, tmp_path: Path) -> None:
    words = "The the car cars near secretaries secretary are is was were has have capital of state".split()
    lines = [" ".join(words[i:] + words[:i]) for i in range(8)]
    (tmp_path / "unrelated.txt").write_text("\n".join(lines) + "\n")
    asked = [
        "trace",
        "The keys near the cabinet",
        "--model",
        str(folder / "model"),
        "--nodes",
        "20",
        "--target",
        " are",
    ]
    more = ["--without-always-on", str(tmp_path / "unrelated.txt"), "--exclude", "0/3"]
    told = CliRunner().invoke(app, [*asked, *more, "--out", str(tmp_path / "left")])
    assert told.exit_code == 0, told.output
    assert "1 always-on neurons are left out, found on 8 unrelated prompts: L1 N5" in told.stderr
    named = CliRunner().invoke(app, [*asked, "--exclude", "0/3", "--exclude", "1/5", "--out", str(tmp_path / "named")])
    assert named.exit_code == 0, named.output
    left, wanted = (tracer.Circuit.load(tmp_path / name) for name in ("left", "named"))
    assert left.nodes.equals(wanted.nodes)
    assert left.links == wanted.links
    assert (left.selection, left.fingerprint) == (wanted.selection, wanted.fingerprint)
    (one,) = left.notes["always_on"]["neurons"]
    assert (one["layer"], one["neuron"]) == NEURON
    assert one["exact"] < 1e-3 < one["attribution"]


def test_a_paired_trace_has_no_unrelated_prompts(tmp_path: Path) -> None:
    (tmp_path / "unrelated.txt").write_text("The car near\nThe key near\n")
    asked = ["trace", "The keys near", "--counterfactual", "The key near", "--target", " are"]
    told = CliRunner().invoke(app, [*asked, "--without-always-on", str(tmp_path / "unrelated.txt")])
    assert told.exit_code == 2
    assert "--without-always-on" in told.stderr
    assert "counterfactual" in told.stderr
    (tmp_path / "unrelated.txt").write_text("The car near\n")
    told = CliRunner().invoke(app, [*asked[:2], "--without-always-on", str(tmp_path / "unrelated.txt")])
    assert told.exit_code == 2
    assert "at least 2" in told.stderr
