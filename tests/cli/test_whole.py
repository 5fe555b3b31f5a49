"""Nothing dead-ends: circuits without a foil, of a dataset, and in a colleague's folder; and what is checked first."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner, Result

import s3
import tiny
import tracer
from helpers import refused
from inline import InlinePool
from tracer.circuit.circuit import Graph, Traced
from tracer.circuit.from_run import circuit_of, graph_of, read_graph
from tracer.cli.app import app
from tracer.data import tasks
from tracer.errors import JobError, RunError
from tracer.evaluation.steering import read_nodes
from tracer.prompts import Prompt
from tracer.runs.units import dataset_circuit

KEYS = ["The keys near the cabinet", "--target", " are"]
TASK = {"task": "sva", "structure": "nounpp", "count": 10}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def done(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


def fails(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.count("error: ") == 1
    assert "; " in result.stderr, "no next step"
    return result.stderr


def made(path: Path, **changes: Any) -> Path:
    """A finished run over the demo model's agreement pairs."""
    job = {"kind": "dataset", "input": TASK, "shard_size": 4, "nodes": 20, "edges": False, "baseline": "counterfactual"}
    tracer.run(job | {"circuit": "aligned"} | changes, path, pool=InlinePool())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


@pytest.fixture(scope="module")
def aligned(folder: Path) -> Path:
    return made(folder / "aligned")


@pytest.fixture(scope="module")
def free(folder: Path) -> Path:
    return made(folder / "free", circuit="free")


@pytest.fixture(scope="module")
def none(folder: Path) -> Path:
    return made(folder / "none", circuit="none", edges=True)


@pytest.fixture(scope="module")
def one(folder: Path) -> Path:
    done("trace", *KEYS, "--foil", " is", "--nodes", "20", "--out", folder / "one")
    return folder / "one"


# ------------------------------------------------------------------------------------------ one prompt


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("words", [["--metric", "logprob", "--no-edges"], ["--metric", "centred"], ["--no-edges"]])
def test_a_circuit_without_a_foil_goes_all_the_way(words: list[str], tmp_path: Path) -> None:
    place = tmp_path / "run"
    done("trace", *KEYS, "--nodes", "20", "--out", place, *words)
    text = done("evaluate", place)
    assert "the prompt that the circuit was found on, zero ablation" in text
    assert "Pearson" in text
    assert "test prompts" in done("evaluate", place, "--structure", "nounpp", "--count", "4", "--sizes", "5,20")
    content = json.loads((place / "evaluation.json").read_text())
    assert any("foils of test prompts are not used" in said for said in content["warnings"])
    assert len(content["whole"]) == 4
    for verb in ("show", "view"):
        done(verb, place)
    for form in ("mib", "graphml", "csv"):
        done("export", place, "--format", form)
    assert "factor 0 on 5 neurons" in done("steer", KEYS[0], "--nodes", place, "--factor", "0", "--top", "5")


@pytest.mark.slow
@pytest.mark.long
def test_a_sum_of_top_logits_goes_all_the_way(tmp_path: Path) -> None:
    done("trace", KEYS[0], "--top-k", "3", "--nodes", "20", "--out", tmp_path / "run")
    done("evaluate", tmp_path / "run")
    own = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert own["whole"][0] == pytest.approx(tracer.Circuit.load(tmp_path / "run").metric, abs=1e-4)
    done("evaluate", tmp_path / "run", "--structure", "nounpp", "--count", "3", "--ablation", "counterfactual")
    content = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    model = tracer.load("demo")
    for pair, whole in zip(tasks.sva.generate("nounpp", "test", 3), content["whole"], strict=True):
        with torch.no_grad():
            logits = model.module(torch.tensor([model.tokenizer.encode(pair.prompt)])).logits[0, -1]
        assert whole == pytest.approx(float(logits.topk(3).values.sum()), abs=1e-4)


def test_evaluate_takes_a_reference_and_a_place(one: Path, tmp_path: Path) -> None:
    others = tmp_path / "others.txt"
    others.write_text("The key near the cabinet\nThe teacher near the cabinet\n")
    before = {path.name for path in one.iterdir()}
    text = done("evaluate", one, "--reference", others, "--out", tmp_path / "deep" / "here")
    assert "mean ablation" in text
    assert {path.name for path in one.iterdir()} == before
    assert {path.name for path in (tmp_path / "deep" / "here").iterdir()} == {
        "evaluation.json",
        "evaluation.png",
        "report.html",
    }
    content = json.loads((tmp_path / "deep" / "here" / "evaluation.json").read_text())
    wanted = tracer.evaluate(
        tracer.load("demo"),
        tracer.Circuit.load(one),
        reference=[Prompt(line) for line in others.read_text().splitlines()],
    )
    assert content["faithfulness"]["estimate"] == pytest.approx(wanted.faithfulness.estimate.tolist(), abs=1e-5)
    assert content["faithfulness"]["low"] == [None] * len(wanted.sizes)
    assert [kind["ablation"] for kind in content["estimate"]] == ["zero", "mean"]


@pytest.mark.slow
@pytest.mark.long
def test_a_paired_circuit_is_evaluated_on_its_counterfactual_and_beside_unrelated_prompts(tmp_path: Path) -> None:
    done("trace", *KEYS, "--foil", " is", "--counterfactual", "The key near the cabinet", "--out", tmp_path / "run")
    assert "counterfactual ablation" in done("evaluate", tmp_path / "run", "--sizes", "20")
    assert "always on" in done("evaluate", tmp_path / "run", "--structure", "nounpp", "--count", "4", "--sizes", "20")


def test_a_circuit_in_an_object_store_is_evaluated_and_steered(tmp_path: Path) -> None:
    with s3.server() as store:
        address = store.address()
        done("trace", *KEYS, "--nodes", "10", "--out", address)
        assert "--out" in fails("evaluate", address)
        done("evaluate", address, "--out", tmp_path / "here")
        assert (tmp_path / "here" / "evaluation.json").exists()
        assert "factor 0 on" in done("steer", KEYS[0], "--nodes", address, "--factor", "0", "--max-new-tokens", "2")


# ------------------------------------------------------------------------------------------ a dataset


def test_a_datasets_circuit_is_shown(aligned: Path, free: Path) -> None:
    for place in (aligned, free):
        rows = pq.read_table(place / "circuit.parquet").to_pylist()
        found = json.loads(done("show", place, "--format", "json"))
        assert [(one["layer"], one["position"], one["neuron"]) for one in found["nodes"]] == [
            (row["layer"], row["position"], row["neuron"]) for row in rows
        ]
        assert [one["attribution"] for one in found["nodes"]] == pytest.approx(
            [row["mean_attribution"] for row in rows], rel=1e-6
        )
        text = done("show", place, "--rows", "3")
        assert "circuit of 10 prompts" in text
        assert f"{rows[0]['mean_attribution']:+.4f}" in text
        assert len(list(csv.DictReader(done("show", place, "--format", "csv").split()))) == len(rows)
    assert " any " in done("show", free, "--rows", "3")


def test_tokens_of_an_aligned_circuit_are_those_that_all_prompts_share(aligned: Path) -> None:
    model = tracer.load("demo")
    ids = [model.tokenizer.encode(pair.prompt) for pair in tasks.sva.generate("nounpp", "train", 10)]
    for position, token in enumerate(circuit_of(aligned).tokens):
        mine = {row[position] for row in ids}
        assert token == (f"any-of-{len(mine)}" if len(mine) > 1 else tracer.prompts.decode(model, mine.pop()))


def test_a_datasets_circuit_is_drawn_and_exported(aligned: Path, free: Path, tmp_path: Path) -> None:
    shown = run("view", aligned, "--out", tmp_path / "page.html")
    assert shown.exit_code == 0
    assert "no edges" in shown.stderr
    assert "aligned circuit of 10 prompts" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "--prompt 0" in fails("view", free)
    assert "--prompt 0" in fails("export", free)
    assert "left out: edges (it has none)" in done("export", aligned, "--out", tmp_path / "x.json")
    back = tracer.import_graph(tmp_path / "x.json")
    assert [(row["layer"], row["position"], row["neuron"]) for row in back.rows("neuron")] == [
        (row["layer"], row["position"], row["neuron"]) for row in pq.read_table(aligned / "circuit.parquet").to_pylist()
    ]
    for place in (aligned, free):
        rows = pq.read_table(place / "circuit.parquet").to_pylist()
        for form in ("mib", "graphml", "csv"):
            done("export", place, "--format", form, "--out", tmp_path / f"x.{form}")
        with (tmp_path / "x.nodes.csv").open() as file:
            assert [int(row["position"]) for row in csv.DictReader(file)] == [row["position"] for row in rows]
        scores = json.loads((tmp_path / "x.mib").read_text())["nodes"]
        for layer in range(4):
            wanted = sum(row["mean_attribution"] for row in rows if row["layer"] == layer)
            assert scores[f"m{layer}"]["score"] == pytest.approx(wanted, abs=1e-5)


def test_one_prompt_of_a_run_is_exported_in_every_format(none: Path, tmp_path: Path) -> None:
    for form in ("neuronpedia", "mib", "graphml", "csv"):
        done("export", none, "--prompt", "3", "--format", form, "--out", tmp_path / f"x.{form}")
    rows = [
        row for row in pq.read_table(none / "nodes").to_pylist() if row["prompt_id"] == 3 and row["kind"] == "neuron"
    ]
    scores = json.loads((tmp_path / "x.mib").read_text())["nodes"]
    assert sum(one["score"] for one in scores.values()) == pytest.approx(
        sum(row["attribution"] for row in rows), abs=1e-4
    )


def test_steering_by_a_datasets_circuit_is_steering_by_its_neurons(aligned: Path, free: Path) -> None:
    model, prompt = tracer.load("demo"), Prompt(KEYS[0], " are", " is")
    how: dict[str, Any] = {"factor": -1, "top": 6, "max_new_tokens": 0, "random": 1}
    for place in (aligned, free):
        rows = pq.read_table(place / "circuit.parquet").to_pylist()
        nodes: list[Any] = [
            (row["layer"], row["position"], row["neuron"]) if place == aligned else (row["layer"], row["neuron"])
            for row in rows
        ]
        found, wanted = tracer.steer(model, read_nodes(place), prompt, **how), tracer.steer(model, nodes, prompt, **how)
        assert found.effects == wanted.effects
        assert found.everywhere == (place == free)
        text = done("steer", KEYS[0], "--target", " are", "--nodes", place, "--factor", "-1", "--top", "6")
        assert f"{wanted.effects[0].probability.after:.4f}" in text
    other = tracer.load(tiny.tiny("llama"), tokenizer=tiny.tokenizer())
    with refused(JobError, "another model"):
        tracer.steer(other, read_nodes(free), Prompt(token_ids=[1, 2, 3, 4, 5, 6]), factor=0)


def test_a_circuit_of_outputs_is_steered_as_such(tmp_path: Path) -> None:
    place = made(tmp_path / "outputs", basis="output", nodes=5)
    model, prompt = tracer.load("demo"), Prompt(KEYS[0], " are", " is")
    found = tracer.steer(model, read_nodes(place), prompt, factor=0, max_new_tokens=0, random=1)
    rows = pq.read_table(place / "circuit.parquet").to_pylist()
    nodes = [(row["layer"], row["position"], row["neuron"]) for row in rows]
    assert found.effects == tracer.steer(
        model, nodes, prompt, factor=0, max_new_tokens=0, random=1, basis="output"
    ).effects  # fmt: skip
    assert "of 1,152 nodes" not in done("evaluate", place, "--count", "3", "--sizes", "5")
    assert json.loads((place / "evaluate" / "evaluation.json").read_text())["n_total"] == 4 * 6 * model.d_model


@pytest.mark.parametrize("kind", ["aligned", "free"])
def test_evaluating_a_dataset_again_is_its_jobs_own_evaluation(kind: str, tmp_path: Path) -> None:
    asked = {"test": {**TASK, "count": 6, "split": "test"}, "sizes": [3, 30]}
    place = made(tmp_path / "run", circuit=kind, evaluate=asked, batch=1)
    kept = (place / "evaluation.json").read_bytes()
    text = done("evaluate", place, "--structure", "nounpp", "--count", "6", "--sizes", "3,30")
    assert "6 test prompts, mean ablation" in text
    assert (place / "evaluation.json").read_bytes() == kept
    mine, found = json.loads(kept)["curves"], json.loads((place / "evaluate" / "evaluation.json").read_text())
    assert found["sizes"] == mine["sizes"]
    for name, theirs in (
        ("faithfulness", "faithfulness"),
        ("completeness", "completeness"),
        ("control_faithfulness", "control"),
    ):
        for end in ("estimate", "low", "high"):
            assert found[name][end] == pytest.approx(mine[theirs][end], abs=2e-5)
    assert "all there" in done("status", place)
    assert done("show", place)


def test_a_dataset_is_evaluated_on_its_own_prompts(aligned: Path, tmp_path: Path) -> None:
    shown = run("evaluate", aligned, "--count", "4", "--sizes", "5", "--out", tmp_path / "a")
    assert shown.exit_code == 0, shown.output
    assert "4 prompts that it was found on" in shown.stderr
    own = json.loads((tmp_path / "a" / "evaluation.json").read_text())
    assert (own["n_shared"], own["ablation"], len(own["whole"])) == (4, "counterfactual", 4)
    lines = tmp_path / "pairs.jsonl"
    tasks.sva.write(tasks.sva.generate("nounpp", "train", 10)[:4], lines)
    said = fails("evaluate", aligned, "--pairs", lines)
    assert "--allow-overlap" in said
    assert "in the job" not in said
    words = ["--allow-overlap", "--ablation", "counterfactual", "--sizes", "5", "--out", tmp_path / "b"]
    done("evaluate", aligned, "--pairs", lines, *words)
    again = json.loads((tmp_path / "b" / "evaluation.json").read_text())
    assert again["n_shared"] == 4
    assert again["whole"] == pytest.approx(own["whole"], abs=1e-5)
    assert again["faithfulness"]["estimate"] == pytest.approx(own["faithfulness"]["estimate"], abs=1e-5)


@pytest.mark.parametrize("metric", ["topk", "logit", "logprob"])
def test_a_dataset_without_foils_is_evaluated(metric: str, tmp_path: Path) -> None:
    """In its job too: a sum of top logits had no target there."""
    asked = {"test": {**TASK, "count": 4, "split": "test"}, "sizes": [20], "ablation": "zero"}
    place = made(tmp_path / "run", metric=metric, baseline="zero", evaluate=asked)
    whole = json.loads((place / "evaluation.json").read_text())["whole"]
    done("evaluate", place, "--structure", "nounpp", "--count", "4", "--ablation", "zero", "--sizes", "20")
    found = json.loads((place / "evaluate" / "evaluation.json").read_text())
    assert sum(found["whole"]) / 4 == pytest.approx(whole, abs=1e-4)
    done("evaluate", place, "--count", "3", "--sizes", "20")
    own = json.loads((place / "evaluate" / "evaluation.json").read_text())["whole"]
    metrics = [row["metric"] for row in pq.read_table(place / "prompts").to_pylist()[:3]]
    assert own == pytest.approx(metrics, abs=1e-4)


def test_runs_without_a_circuit_say_what_to_do(none: Path, tmp_path: Path) -> None:
    for verb in (["show"], ["view"], ["export"], ["evaluate"], ["steer", "The keys", "--factor", "0", "--nodes"]):
        said = fails(*verb, none)
        assert "circuit: none" in said
        assert "--prompt 0" in said
    bench = tmp_path / "bench"
    tracer.run(
        {"kind": "benchmark", "task": "sva", "structures": "simple", "train": 4, "test": 4, "methods": "relp",
         "bases": "activation", "sizes": [3]},
        bench,
        pool=InlinePool(),
    )  # fmt: skip
    for verb in ("show", "view", "export", "evaluate"):
        assert "benchmark" in fails(verb, bench)
    unfinished = tmp_path / "unfinished"
    shutil.copytree(none, unfinished)
    record = json.loads((unfinished / "run.json").read_text())
    record["job"]["circuit"] = "aligned"
    del record["digest"]
    (unfinished / "run.json").write_text(json.dumps(record))
    (unfinished / "_SUCCESS.json").unlink()
    with refused(RunError, "not finished", "repeat the run command"):
        circuit_of(unfinished)


def test_read_graph_reads_whatever_there_is(aligned: Path, one: Path, tmp_path: Path) -> None:
    assert isinstance(read_graph(one), tracer.Circuit)
    assert read_graph(aligned) == circuit_of(aligned)
    assert read_graph(aligned, 2) == graph_of(aligned, 2)
    saved = circuit_of(aligned).save(tmp_path / "graph")
    again = read_graph(saved)
    assert type(again) is Graph
    assert again.nodes.equals(circuit_of(aligned).nodes)
    assert isinstance(graph_of(aligned, 0), Traced)


def test_a_damaged_circuit_of_a_dataset_is_refused(aligned: Path, tmp_path: Path) -> None:
    shutil.copytree(aligned, tmp_path / "run")
    file = tmp_path / "run" / "circuit.parquet"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert "repeat the run command" in fails("show", tmp_path / "run")


# ------------------------------------------------------------------------------------------ a colleague's folder


def test_a_model_that_has_moved_is_named_anew(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(Path(tracer.__file__).parent / "demo" / "model", here)
    asked = ["The car near", "--target", " are", "--foil", " is", "--nodes", "20"]
    done("trace", *asked, "--model", here, "--out", tmp_path / "run")
    tracer.run(
        {"kind": "dataset", "input": {"path": str(prompts(tmp_path))}, "nodes": 10, "edges": False, "circuit": "free",
         "model": str(here)},
        tmp_path / "many",
        pool=InlinePool(),
    )  # fmt: skip
    here.rename(there)
    steering = ["steer", "The car near", "--factor", "0", "--max-new-tokens", "1", "--nodes"]
    for words in (["evaluate", tmp_path / "run"], ["evaluate", tmp_path / "many", "--ablation", "zero"],
                  [*steering, tmp_path / "run"], [*steering, tmp_path / "many"]):  # fmt: skip
        assert "--model" in fails(*words)
        done(*words, "--model", there)
    other = tiny.save(tiny.tiny("llama", seed=5), tmp_path / "other")
    for words in (["evaluate", tmp_path / "run"], [*steering, tmp_path / "many"]):
        assert "another model" in fails(*words, "--model", other)
        assert str(there) not in fails(*words, "--model", other)


def prompts(place: Path) -> Path:
    lines = [{"text": f"The {noun} near", "target": " are", "foil": " is"} for noun in ("keys", "teachers", "parents")]
    (place / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place / "prompts.jsonl"


def test_steering_uses_the_circuits_own_model_and_dtype(tmp_path: Path) -> None:
    tiny.save(tiny.tiny("llama"), tmp_path / "model")
    asked = ["The car near", "--target", " are", "--foil", " is", "--nodes", "20", "--dtype", "bfloat16"]
    done("trace", *asked, "--model", tmp_path / "model", "--out", tmp_path / "run")
    done("steer", "The car near", "--nodes", tmp_path / "run", "--factor", "0", "--max-new-tokens", "1")
    said = fails("steer", "The car near", "--nodes", tmp_path / "run", "--factor", "0", "--dtype", "float32")
    assert "bfloat16" in said


# ------------------------------------------------------------------------------------------ checked first


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--pairs", "x", "--structure", "nounpp"], "--pairs or --structure"),
        (["--pairs", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--structure", "haiku"], "nounpp"),
        (["--structure", "nounpp", "--ablation", "median"], "--ablation median: must be one of"),
        (["--structure", "nounpp", "--ablation", "zero", "--reference", "LINES"], "no effect with --ablation zero"),
        (["--ablation", "counterfactual"], "no counterfactual"),
        (["--ablation", "mean"], "--reference"),
        (["--ablation", "resample"], "--reference"),
        (["--reference", "nowhere.txt"], "cannot be read"),
        (["--sizes", "5,9999"], "--sizes '5,9999': must rise from 1 to at most 20"),
        (["--sizes", "5,x"], "whole numbers"),
        (["--sizes", "5,5"], "must rise"),
        (["--no-aligned", "--sizes", "9999"], "at most"),
        (["--count", "5"], "no effect"),
        (["--structure", "simple", "--count", "999999"], "use at most"),
        (["--pairs", "PAIRS", "--count", "5"], "no effect"),
        (["--unrelated", "nowhere.txt"], "--unrelated 'nowhere.txt'"),
        (["--unrelated", "LINE"], "at least 2"),
        (["--out", "/proc/nowhere/x"], "cannot be written"),
        (["--out", "LINES"], "is a file"),
        (["--weights", "local"], "--remote"),
    ],
)
def test_evaluate_checks_everything_before_a_model_is_loaded(
    words: list[str], expected: str, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tracer.ndif.probe.load", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr("tracer.load", lambda *_, **__: pytest.fail("a model was loaded"), raising=False)
    files = {"LINES": "a b\nc d\n", "LINE": "a b\n", "PAIRS": ""}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    tasks.sva.write(tasks.sva.generate("nounpp", "test", 3), tmp_path / "PAIRS")
    assert expected in fails("evaluate", one, *(str(tmp_path / word) if word in files else word for word in words))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--ablation", "median"], "must be one of"),
        (["--ablation", "zero", "--reference", "LINES"], "no effect"),
        (["--sizes", "5,9999999"], "at most 9216"),
        (["--sizes", "0"], "must rise"),
        (["--no-aligned"], "circuit:"),
        (["--unrelated", "LINES"], "no effect"),
        (["--out", "/proc/nowhere/x"], "cannot be written"),
    ],
)
def test_a_datasets_evaluation_is_checked_before_a_model_is_loaded(
    words: list[str], expected: str, aligned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tracer.load", lambda *_, **__: pytest.fail("a model was loaded"), raising=False)
    (tmp_path / "LINES").write_text("a b\nc d\n")
    assert expected in fails(
        "evaluate", aligned, *(str(tmp_path / word) if word == "LINES" else word for word in words)
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "exactly one of --factor, --set-to and --add"),
        (["--factor", "0", "--add", "1"], "--factor 0.0 and --add 1.0"),
        (["--factor", "nan"], "finite"),
        (["--factor", "0", "--everywhere", "--positions", "1"], "contradict"),
        (["--factor", "0", "--positions", "a"], "whole numbers"),
        (["--factor", "0", "--nodes", "nowhere.csv"], "nowhere.csv"),
        (["--factor", "0", "--nodes", "RUN", "--top", "21"], "--top 21: there are 20 nodes"),
        (["--factor", "0", "--nodes", "FILE", "--top", "3"], "--top 3: there are 2 nodes"),
        (["--factor", "0", "--foil", " is"], "target"),
    ],
)
def test_steer_checks_everything_before_a_model_is_loaded(
    words: list[str], expected: str, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tracer.load", lambda *_, **__: pytest.fail("a model was loaded"), raising=False)
    (tmp_path / "nodes.csv").write_text("layer,neuron\n1,13\n2,5\n")
    there = {"RUN": one, "FILE": tmp_path / "nodes.csv"}
    assert expected in fails("steer", "The keys", *(there.get(word, word) for word in words))


def test_steering_more_nodes_than_are_traced_by_default() -> None:
    assert "factor 0 on" in done(
        "steer", KEYS[0], "--factor", "0", "--top", "300", "--max-new-tokens", "0", "--random", "0"
    )


def test_sizes_above_all_there_are_are_said(aligned: Path) -> None:
    with pytest.warns(tracer.TracerWarning, match="sizes 99,999 are left out: there are 9,216 nodes"):
        found, *_ = dataset_circuit.evaluate_again(
            tracer.load("demo"),
            dataset_circuit.DatasetJob.model_validate(
                {"input": TASK, "circuit": "aligned", "baseline": "counterfactual"}
            ),
            tracer.store.run_folder.RunFolder(aligned),
            dataset_circuit.Again(sizes=[5, 99_999], count=3),
        )
    assert any("left out" in said for said in found.warnings)
    assert 99_999 not in found.sizes
