"""The circuit of a dataset and its evaluation, against the benchmark's and `minimality`'s own numbers."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_benchmark import ranked_circuit

import tracer
from helpers import refused
from inline import InlinePool
from tracer.data import tasks
from tracer.errors import JobError
from tracer.evaluation.curves import ordered
from tracer.evaluation.faithfulness import minimality
from tracer.runs.jobs import BenchmarkJob, load_job
from tracer.runs.units.benchmark import Benchmark
from truth import tolerance

TRAIN = {"task": "sva", "structure": "nounpp", "count": 10}
TEST = {"task": "sva", "structure": "nounpp", "count": 6, "split": "test"}


@functools.cache
def demo() -> tracer.Model:
    return tracer.load("demo")


def evaluated(path: Path, **changes: Any) -> dict[str, Any]:
    asked = {"test": TEST, "sizes": [3, 30, 300]} | changes.pop("evaluate", {})
    made = {"kind": "dataset", "input": TRAIN, "shard_size": 4, "nodes": 20, "edges": False, "evaluate": asked}
    made |= {"baseline": "counterfactual", "circuit": "aligned"}
    tracer.run(made | changes, path, pool=InlinePool())
    return json.loads((path / "evaluation.json").read_text())


def test_the_evaluation_is_the_benchmarks_on_the_same_pairs(tmp_path: Path) -> None:
    found = evaluated(tmp_path, batch=1)
    job = load_job(
        {
            "kind": "benchmark",
            "task": "sva",
            "structures": "nounpp",
            "train": 10,
            "test": 6,
            "methods": "relp",
            "bases": "activation",
            "baselines": "counterfactual",
            "sizes": [3, 30, 300],
        }
    )
    assert isinstance(job, BenchmarkJob)
    wanted = Benchmark(job, demo()).outcome(job.combinations()[0])
    curves = wanted.rankings["absolute"].record()
    assert found["curves"]["sizes"] == curves["sizes"]
    for name in ("faithfulness", "completeness"):
        for end in ("estimate", "low", "high"):
            assert found["curves"][name][end][:8] == pytest.approx(curves[name][end][:8], abs=2e-5)
    assert (found["whole"], found["empty"]) == (pytest.approx(wanted.whole), pytest.approx(wanted.empty))
    assert (tmp_path / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "evaluation.csv").read_text().splitlines()) == len(curves["sizes"]) + 1


def test_minimality_is_the_librarys(tmp_path: Path) -> None:
    found = evaluated(tmp_path, evaluate={"minimality": 5}, batch=1)["minimality"]
    pairs = tasks.load("sva", structure="nounpp", split="train", count=10)
    prompts = [pair.to_prompt() for pair in pairs]
    mean = tracer.attribute(demo(), prompts, baseline="counterfactual").nodes.double().mean(0).float()
    test = tasks.load("sva", structure="nounpp", split="test", count=6)
    circuit = ranked_circuit(ordered(mean, "absolute"), 5, test[0])
    wanted = minimality(demo(), circuit, [pair.to_prompt() for pair in test], "mean")
    assert [one["change"] for one in found] == pytest.approx(wanted.tolist(), abs=1e-5)
    rows = circuit.neurons.to_pylist()
    assert [(one["layer"], one["position"], one["neuron"]) for one in found] == [
        (row["layer"], row["position"], row["neuron"]) for row in rows
    ]


@pytest.mark.parametrize("circuit", ["aligned", "free"])
def test_what_is_excluded_is_neither_in_the_circuit_nor_in_its_evaluation(tmp_path: Path, circuit: str) -> None:
    whole = evaluated(tmp_path / "whole", circuit=circuit, evaluate={"minimality": 3})
    first = whole["minimality"][0]
    name = f"{first['layer']}/{first['neuron']}"
    less = evaluated(tmp_path / "less", circuit=circuit, exclude=[name], evaluate={"minimality": 3})
    assert (first["layer"], first["neuron"]) not in {(one["layer"], one["neuron"]) for one in less["minimality"]}
    assert less["curves"]["faithfulness"]["estimate"][0] != whole["curves"]["faithfulness"]["estimate"][0]
    assert less["curves"]["faithfulness"]["estimate"][-1] == pytest.approx(1.0, abs=tolerance())
    assert all((one["position"] == -1) == (circuit == "free") for one in less["minimality"])


def test_prompts_of_the_run_and_other_lengths_are_refused_as_tests(tmp_path: Path) -> None:
    pair = tasks.load("sva", structure="nounpp", split="test", count=6)[2]
    row = {"text": pair.prompt, "target": " are", "foil": " is"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    with refused(JobError, "both in the run and among its test prompts"):
        evaluated(tmp_path / "a", input={"path": str(tmp_path / "prompts.jsonl")}, baseline="zero")
    with refused(JobError, "tokens", "6"):
        evaluated(tmp_path / "b", evaluate={"test": TEST | {"structure": "simple"}})


def test_shared_prompts_are_found_while_planning_and_may_be_allowed(tmp_path: Path) -> None:
    pairs = tasks.load("sva", structure="nounpp", split="test", count=6)
    rows = [{"text": pair.prompt, "target": pair.target, "foil": pair.foil} for pair in pairs[:3]]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given: dict[str, Any] = {"input": {"path": str(tmp_path / "prompts.jsonl")}, "baseline": "zero"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tracer.ndif.probe.load", lambda *_, **__: pytest.fail("loaded"))
        for _ in range(2):
            with refused(JobError, "3 of 6 test prompts", "evaluate.allow_overlap: true"):
                evaluated(tmp_path / "a", **given)
    found = evaluated(tmp_path / "b", **given, evaluate={"allow_overlap": True})
    assert (found["n_test"], found["n_shared"]) == (6, 3)
    record = json.loads((tmp_path / "b" / "run.json").read_text())
    assert "3 of 6 test prompts are in the run as well" in record["notes"]


def test_an_aligned_circuit_is_of_the_length_that_is_most_frequent(tmp_path: Path) -> None:
    lines = tmp_path / "prompts.jsonl"
    texts = ["The keys near the cabinet", "The secretaries near the car", "The parents"]
    lines.write_text("".join(json.dumps({"text": text, "target": " are", "foil": " is"}) + "\n" for text in texts))
    made = {"kind": "dataset", "input": {"path": str(lines)}, "nodes": 15, "edges": False, "circuit": "aligned"}
    found = tracer.run(made, tmp_path / "run", pool=InlinePool())
    rows = found.table("circuit").to_pylist()
    prompts = [tracer.Prompt(text, target=" are", foil=" is") for text in texts[:2]]
    mean = tracer.attribute(demo(), prompts).nodes.double().mean(0)
    wanted = mean.abs().flatten().topk(15).values
    assert torch.tensor([abs(row["mean_attribution"]) for row in rows]).double() == pytest.approx(wanted, abs=1e-5)
    assert {row["n_prompts"] for row in rows} == {2}
