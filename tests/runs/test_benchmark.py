"""The agreement benchmark: its numbers against `evaluate`'s, its folder, resuming, and what cannot be measured."""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from rich.console import Console

import tracer
from helpers import load as loaded
from helpers import refused
from inline import InlinePool
from tracer.circuit.circuit import Circuit
from tracer.data import tasks
from tracer.data.tasks import Pair
from tracer.errors import JobError, RunError
from tracer.evaluation.curves import curves, ordered
from tracer.evaluation.faithfulness import evaluate
from tracer.evaluation.testset import TestSet
from tracer.runs import finish
from tracer.runs.jobs import BenchmarkJob, Combination, Ranking, load_job
from tracer.runs.units import benchmark
from tracer.runs.units.benchmark import Benchmark
from tracer.runs.units.benchmark_report import BenchmarkResult, Outcome, benchmark_table, files

DEFAULT = Path(__file__).parents[2] / "jobs" / "sva.yaml"
TINY = (
    "structures=nounpp",
    "train=10",
    "test=6",
    "methods=[relp, random]",
    "bases=activation",
    "baselines=counterfactual",
    "sizes=[3, 30, 300]",
)


def tiny(*more: str) -> BenchmarkJob:
    job = load_job(DEFAULT, [*TINY, *more])
    assert isinstance(job, BenchmarkJob)
    return job


def run_benchmark(job: BenchmarkJob, out: Path, **options: Any) -> BenchmarkResult:
    """The benchmark by the runner that every job has, its worker in this process."""
    found = tracer.run(job, out, pool=InlinePool(), **options)
    record = found.folder.record()
    assert record is not None
    return finish.benchmark_result(job, found.folder, list(found.folder.commits()), record, found.resumed)


def outcomes(out: Path) -> list[Outcome]:
    return [Outcome.model_validate(one) for one in json.loads((out / "results.json").read_text())["outcomes"]]


@functools.cache
def demo() -> tracer.Model:
    return tracer.load("demo")


# ---------------------------------------------------------------------------------------------- its numbers


def ranked_circuit(ranks: torch.Tensor, nodes: int, pair: Pair) -> Circuit:
    """A circuit that holds the first nodes of a ranking, in its order."""
    prompt = pair.to_prompt()
    traced = tracer.trace(demo(), prompt, nodes=nodes, edges=False)
    order = ranks.flatten().argsort()[:nodes]
    places = [part.tolist() for part in torch.unravel_index(order, ranks.shape)]
    rows = traced.nodes.to_pylist()
    neurons = [row for row in rows if row["kind"] == "neuron"]
    for row, layer, position, neuron in zip(neurons, *places, strict=True):
        row |= {"layer": layer, "position": position, "neuron": neuron}
    return traced.model_copy(update={"nodes": pa.Table.from_pylist(rows, schema=traced.nodes.schema)})


@pytest.mark.parametrize("ranking", ["absolute", "signed"])
@pytest.mark.parametrize("structure", ["nounpp", "within_rc"])
def test_numbers_equal_evaluates_on_the_same_ranking(tmp_path: Path, structure: str, ranking: Ranking) -> None:
    """Faithfulness, completeness, random control, intervals, sizes and unique neurons; answers differ by pair."""
    job = tiny(f"structures={structure}", "methods=relp", "seed=2")
    outcome = run_benchmark(job, tmp_path / "out").outcomes[0]
    splits = {
        split: tasks.load("sva", structure=structure, split=split, count=count, seed=2)
        for split, count in (("train", 10), ("test", 6))
    }
    prompts = {name: [pair.to_prompt() for pair in pairs] for name, pairs in splits.items()}
    mean = tracer.attribute(demo(), prompts["train"], baseline="counterfactual").nodes.double().mean(0).float()
    curves = outcome.rankings[ranking]
    sizes = [size for size in curves.sizes if size <= 300]
    circuit = ranked_circuit(ordered(mean, ranking), 300, splits["test"][0])
    found = evaluate(demo(), circuit, prompts["test"], "mean", sizes, train=prompts["train"], seed=2)
    assert found.n_total == outcome.n_total
    assert found.n_neurons == curves.n_neurons[: len(sizes)]
    pairs = ((found.faithfulness, curves.faithfulness), (found.completeness, curves.completeness))
    for theirs, mine in (*pairs, (found.control_faithfulness, curves.control_faithfulness)):
        for end in ("estimate", "low", "high"):
            wanted = getattr(theirs, end)
            assert torch.allclose(getattr(mine, end)[: len(sizes)], wanted, atol=1e-5)
    for level, size in found.sizes_for.items():
        if size.estimate is not None:
            assert curves.sizes_for[level].estimate == size.estimate
    assert outcome.whole == pytest.approx(float(found.whole.mean()), abs=1e-5)
    assert outcome.empty == pytest.approx(float(found.empty.mean()), abs=1e-5)


def test_attributions_do_not_depend_on_how_prompts_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    job = tiny()
    pairs = tasks.load("sva", structure="nounpp", split="train", count=7)
    for baseline in ("counterfactual", "mean"):
        what = Combination("nounpp", "grad", "activation", baseline)
        whole = benchmark.mean_attribution(job, demo(), pairs, what)
        with monkeypatch.context() as patch:
            patch.setattr(benchmark, "_ATTRIBUTED", 1)
            one_by_one = benchmark.mean_attribution(job, demo(), pairs, what)
        assert torch.allclose(whole, one_by_one, atol=1e-5)


# ----------------------------------------------------------------------------------------------- its folder


def test_the_folder_holds_job_results_curves_table_and_plots(tmp_path: Path) -> None:
    job, out, seen = tiny("rankings=absolute"), tmp_path / "deep" / "out", []
    result = run_benchmark(job, out, watch=lambda status: seen.append((status.done, status.n_prompts)))
    assert seen[-1] == (2, 2)
    assert sorted(path.name for path in out.iterdir() if not path.name.startswith(".")) == [
        "_SUCCESS.json", "_commits", "curves.csv", "plots", "progress.json", "report.html", "results.json",
        "run.json", "table.csv"]  # fmt: skip
    record = json.loads((out / "run.json").read_text())
    assert BenchmarkJob.model_validate(record["job"]) == job
    assert record["kind"] == "benchmark"
    assert record["packages"]["torch"]
    assert record["model"]["fingerprint"] == demo().fingerprint
    assert tuple(outcomes(out)) == result.outcomes
    assert (out / "plots" / "nounpp-activation.png").read_bytes().startswith(b"\x89PNG")
    with (out / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    relp = result.outcomes[0].rankings["absolute"]
    assert [int(row["size"]) for row in rows if row["method"] == "relp"] == list(relp.sizes)
    assert [float(row["faithfulness_low"]) for row in rows if row["method"] == "relp"] == list(relp.faithfulness.low)
    with (out / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["baseline"] for row in rows] == ["counterfactual", "none"]
    ends = [rows[0][name] for name in ("settles", "settles_low", "settles_high")]
    assert ends == [str(getattr(relp.settles, name)) for name in ("estimate", "low", "high")]


def test_the_table_says_what_was_run(tmp_path: Path) -> None:
    result = run_benchmark(tiny(), tmp_path / "out")
    console = Console(width=220, record=True, file=io.StringIO())
    console.print(benchmark_table(result))
    text = console.export_text()
    for part in (
        "relp",
        "random",
        "nodes for 0.95",
        "stays from",
        "CPR signed",
        "CMD absolute",
        "10 pairs",
        "6 others",
        "mean",
    ):
        assert part in text


def test_a_finished_run_is_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_benchmark(tiny(), tmp_path)
    monkeypatch.setattr(Benchmark, "outcome", None)
    again = run_benchmark(tiny(), tmp_path)
    assert again.outcomes == first.outcomes
    assert (first.resumed, again.resumed) == (0, 2)


def test_what_was_done_before_an_error_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = benchmark.mean_attribution, []

    def failing(job: Any, model: tracer.Model, pairs: Any, combination: Combination, *more: Any) -> torch.Tensor:
        asked.append(method := combination.method)
        if method == "random" and asked.count("random") == 1:
            raise JobError("power", "is cut", "plug it in")
        return real(job, model, pairs, combination, *more)

    monkeypatch.setattr(benchmark, "mean_attribution", failing)
    with refused(JobError, "nounpp/random/activation/none: power", "plug it in"):
        run_benchmark(tiny(), tmp_path)
    assert [path.name for path in (tmp_path / "_commits").iterdir()] == ["0.json"]
    assert not (tmp_path / "_SUCCESS.json").exists()
    result = run_benchmark(tiny(), tmp_path)
    assert asked == ["relp", "random", "random"]
    assert result.resumed == 1
    assert [one.method for one in result.outcomes] == ["relp", "random"]


def test_a_run_of_other_packages_is_not_gone_on_with(tmp_path: Path) -> None:
    run_benchmark(tiny("methods=random"), tmp_path)
    path = tmp_path / "run.json"
    content = json.loads(path.read_text())
    del content["digest"]
    (tmp_path / "_SUCCESS.json").unlink()
    path.write_text(json.dumps(content | {"packages": content["packages"] | {"torch": "0.1"}}))
    with refused(RunError, "torch 0.1, now", "overwrite=True"):
        run_benchmark(tiny("methods=random"), tmp_path)
    assert run_benchmark(tiny("methods=random"), tmp_path, overwrite=True).resumed == 0


def test_another_jobs_folder_is_refused_and_can_be_replaced(tmp_path: Path) -> None:
    run_benchmark(tiny("structures=simple"), tmp_path)
    with refused(RunError, "holds another run"):
        run_benchmark(tiny(), tmp_path)
    assert outcomes(tmp_path)[0].structure == "simple"
    assert run_benchmark(tiny(), tmp_path, overwrite=True).resumed == 0
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"nounpp-activation.png", "claim.png"}


def test_folders_that_are_not_runs_and_damage_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with refused(RunError, "not a run"):
        run_benchmark(tiny(), tmp_path)
    with refused(RunError, "is a file"):
        run_benchmark(tiny(), tmp_path / "notes.txt")
    out = tmp_path / "out"
    run_benchmark(tiny("methods=random"), out)
    (out / "_commits" / "0.json").write_text('{"shard": "a"')
    assert run_benchmark(tiny("methods=random"), out).resumed == 0  # a damaged record is made again


@pytest.mark.slow
@pytest.mark.long
def test_a_combination_alone_is_as_in_the_run(tmp_path: Path) -> None:
    """What a worker process computes does not depend on the combinations before it."""
    job = tiny("structures=[simple, nounpp]", "bases=[activation, output]")
    run = run_benchmark(job, tmp_path)
    measured = {"rankings", "whole", "empty", "n_total", "skipped", "n_train", "n_test"}
    one = Benchmark(job, demo())
    for combination in reversed(job.combinations()):  # every test set is made anew
        wanted = next(outcome for outcome in run.outcomes if outcome.combination == combination)
        found = one.outcome(combination)
        assert found.model_dump(include=measured) == wanted.model_dump(include=measured)
    last = job.combinations()[0]
    test = one._test(last[0], last[2])
    one.outcome(job.combinations()[1])
    assert one._test(last[0], last[2]) is test


def test_the_end_writes_outcomes_in_the_jobs_order(tmp_path: Path) -> None:
    result = run_benchmark(tiny(), tmp_path)
    assert [one.combination for one in result.outcomes] == tiny().combinations()
    assert dict(files(result))["table.csv"] == (tmp_path / "table.csv").read_bytes()


# ------------------------------------------------------------------------------------------ variants of RelP


@pytest.mark.slow
@pytest.mark.long
def test_each_variant_of_the_rules_is_measured_apart_and_named(tmp_path: Path) -> None:
    job, out = tiny("rules=[all, no-half, linear-gate, [attention, norm]]"), tmp_path / "out"
    result = run_benchmark(job, out)
    names = ["all", "no-half", "linear-gate", "norm+attention"]
    assert [(one.method, one.rules) for one in result.outcomes] == [
        *(("relp", name) for name in names),
        ("random", "all"),
    ]
    assert tuple(outcomes(out)) == result.outcomes
    prompts = [pair.to_prompt() for pair in tasks.load("sva", structure="nounpp", split="train", count=10)]
    sets = {"all": None, "no-half": {"norm", "attention", "activation"}, "norm+attention": {"norm", "attention"},
            "linear-gate": {"norm", "attention", "gate"}}  # fmt: skip
    test = Benchmark(job, demo())._test("nounpp", "activation")
    for outcome in result.outcomes[:4]:
        mean = tracer.attribute(demo(), prompts, rules=sets[outcome.rules]).nodes.double().mean(0).float()
        wanted = curves(test, ordered(mean, "absolute"), job.sizes, job.seed)
        assert outcome.rankings["absolute"].faithfulness.estimate == pytest.approx(
            wanted.faithfulness.estimate.tolist(), abs=1e-4
        )
    plain = run_benchmark(tiny(), tmp_path / "plain")
    assert plain.outcomes[0].rankings == result.outcomes[0].rankings
    assert len({tuple(one.rankings["absolute"].faithfulness.estimate) for one in result.outcomes}) == 5
    for name in ("table.csv", "curves.csv"):
        with (out / name).open() as file:
            assert list(dict.fromkeys(row["rules"] for row in csv.DictReader(file))) == names
    console = Console(width=220, file=io.StringIO())
    console.print(benchmark_table(result))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for name in names[1:]:
        assert f"relp {name} " in text
    assert (out / "plots" / "nounpp-activation.png").read_bytes() != (
        tmp_path / "plain" / "plots" / "nounpp-activation.png"
    ).read_bytes()


def test_a_run_from_before_there_were_variants_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_benchmark(tiny(), tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())
    assert "rules" not in record["numbers"]
    (tmp_path / "_SUCCESS.json").unlink()
    record["job"].pop("rules")
    record.pop("digest")
    (tmp_path / "run.json").write_text(json.dumps(record))
    old = json.loads((tmp_path / "_commits" / "0.json").read_text())
    old["outcome"].pop("rules")
    old.pop("digest", None)
    (tmp_path / "_commits" / "0.json").write_text(json.dumps(old))
    monkeypatch.setattr(Benchmark, "outcome", None)
    again = run_benchmark(tiny(), tmp_path)
    assert (again.resumed, again.outcomes) == (2, first.outcomes)
    monkeypatch.undo()
    with refused(RunError, "holds another run: rules differ"):
        run_benchmark(tiny("rules=no-half"), tmp_path)


def test_a_linear_gate_is_refused_before_anything_is_measured_where_there_is_none(tmp_path: Path) -> None:
    model = loaded("gpt2")
    with refused(JobError, "'gate'", "has no effect on a gpt2 model", "gated MLPs"):
        Benchmark(tiny("rules=[all, linear-gate]"), model)


# --------------------------------------------------------------------------------- what cannot be measured


def changed_pairs(monkeypatch: pytest.MonkeyPatch, split: str, **fields: object) -> None:
    real = tasks.load

    def load(name: str, **options: Any) -> list[Pair]:
        pairs = real(name, **options)
        return [dataclasses.replace(one, **fields) for one in pairs] if options["split"] == split else pairs

    monkeypatch.setattr(tasks, "load", load)


def test_pairs_in_both_splits_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tasks.load
    monkeypatch.setattr(tasks, "load", lambda name, **options: real(name, **options | {"split": "test"}))
    with refused(JobError, "both train and test"):
        run_benchmark(tiny(), tmp_path)


@pytest.mark.parametrize("split", ["train", "test"])
def test_pairs_that_are_all_skipped_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str) -> None:
    changed_pairs(monkeypatch, split, target=" is are")
    with refused(JobError, f"{split} pairs of nounpp", "an answer is not one token"):
        run_benchmark(tiny(), tmp_path)


def test_some_skipped_pairs_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tasks.load

    def load(name: str, **options: Any) -> list[Pair]:
        first, *rest = real(name, **options)
        return [dataclasses.replace(first, foil=" is are"), *rest]

    monkeypatch.setattr(tasks, "load", load)
    outcome = run_benchmark(tiny("methods=random"), tmp_path).outcomes[0]
    assert (outcome.n_train, outcome.n_test) == (9, 5)
    assert outcome.skipped == {f"{split}: an answer is not one token": 1 for split in ("train", "test")}


def test_an_ablation_that_changes_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TestSet, "measure", lambda self, jobs, progress=None: torch.ones(len(jobs)))
    with refused(JobError, "nounpp/relp/activation/counterfactual", "F(model) - F(empty)"):
        run_benchmark(tiny(), tmp_path)


def test_more_pairs_than_there_are_is_refused(tmp_path: Path) -> None:
    with refused(JobError, "simple has"):
        run_benchmark(tiny("structures=simple", "test=100000"), tmp_path)


def test_sizes_above_all_nodes_are_left_out(tmp_path: Path) -> None:
    outcome = run_benchmark(tiny("methods=random", "sizes=[10, 10000000]"), tmp_path).outcomes[0]
    assert outcome.rankings["absolute"].sizes[-1] == outcome.n_total


# ------------------------------------------------------------------------------------------- pairs of one's own


def own(folder: Path, **over: Any) -> dict[str, Any]:
    """A job on files: ten pairs to train on and four to test on, two of which are trained on as well."""
    train = tasks.load("sva", structure="nounpp", split="train", count=10)
    test = [*tasks.load("sva", structure="nounpp", split="test", count=2), *train[:2]]
    files = {
        "train": tasks.sva.write(train, folder / "train.json"),
        "test": tasks.sva.write(test, folder / "test.json"),
    }
    content: dict[str, Any] = {"kind": "benchmark", "input": {name: str(path) for name, path in files.items()}}
    return content | {"methods": "relp", "bases": "activation", "sizes": [3, 30]} | over


def test_shared_prompts_are_refused_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tracer.ndif.probe.load", lambda *_, **__: pytest.fail("loaded"))
    for _ in range(2):  # and nothing is left in the folder that would be in the way
        with refused(JobError, "2 of 4 test pairs of pairs", "allow_overlap: true"):
            tracer.run(own(tmp_path), tmp_path / "out", pool=InlinePool())
    with refused(JobError, "2 of 4 test pairs of pairs"):
        tracer.plan(own(tmp_path), workers=1)


def test_pairs_of_ones_own_are_measured_and_say_how_many_are_shared(tmp_path: Path) -> None:
    job = load_job(own(tmp_path, allow_overlap=True))
    assert isinstance(job, BenchmarkJob)
    result = run_benchmark(job, tmp_path / "out")
    (outcome,) = result.outcomes
    assert outcome.combination == Combination("pairs", "relp", "activation", "counterfactual")
    assert (outcome.n_train, outcome.n_test, outcome.n_shared) == (10, 4, 2)
    assert outcomes(tmp_path / "out")[0].n_shared == 2
    (row, *_) = csv.DictReader(io.StringIO((tmp_path / "out" / "table.csv").read_text()))
    assert row["n_shared"] == "2"
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["notes"] == ["2 of 4 test pairs of pairs have a prompt that is trained on as well"]
    assert record["job"]["allow_overlap"] is True
    assert (tmp_path / "out" / "plots" / "pairs-activation.png").stat().st_size > 1000
    console = Console(width=200, file=io.StringIO())
    console.print(benchmark_table(result))
    text = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "tested on 4 others (2 of these have a prompt that was trained on)" in text


@pytest.mark.slow
@pytest.mark.long
def test_pairs_of_ones_own_equal_the_built_in_ones(tmp_path: Path) -> None:
    built_in = run_benchmark(tiny("methods=relp"), tmp_path / "a").outcomes[0]
    files = {
        split: str(
            tasks.sva.write(tasks.load("sva", structure="nounpp", split=split, count=40), tmp_path / f"{split}.json")
        )
        for split in ("train", "test")
    }
    (tmp_path / "other").mkdir()
    content = own(tmp_path / "other", input=[{"name": "mine", **files}], train=10, test=6, sizes=[3, 30, 300])
    mine = run_benchmark(load_job(content), tmp_path / "b").outcomes[0]  # type: ignore[arg-type]
    assert (mine.structure, mine.n_train, mine.n_test, mine.n_shared) == ("mine", 10, 6, 0)
    # The built-in draws depend on how many are asked for, so only sizes are the same.
    assert (mine.n_total, mine.rankings["absolute"].sizes) == (built_in.n_total, built_in.rankings["absolute"].sizes)


def test_what_pairs_of_ones_own_cannot_be(tmp_path: Path) -> None:
    for over, rule in (
        ({"task": "sva"}, "give one of them"),
        ({"input": None}, "give one of them"),
        ({"structures": ["simple"]}, "structures has no effect with input"),
        ({"input": [{"train": "a", "test": "b"}] * 2}, "a name of its own"),
        ({"input": {"train": "a", "test": "b", "name": "../x"}}, "name"),
        ({"input": {"train": "a", "tests": "b"}}, "'input.tests'"),
    ):
        with refused(JobError, rule):
            load_job(own(tmp_path, **over))
    with refused(JobError, "nowhere.json"):
        tracer.run(own(tmp_path, input={"train": "nowhere.json", "test": "b"}), tmp_path / "x", pool=InlinePool())


def test_files_that_changed_are_another_run(tmp_path: Path) -> None:
    job = own(tmp_path, allow_overlap=True)
    tracer.run(job, tmp_path / "out", pool=InlinePool())
    tasks.sva.write(tasks.load("sva", structure="nounpp", split="test", count=3), tmp_path / "test.json")
    with pytest.raises(RunError, match="has changed"):
        tracer.run(job, tmp_path / "out", pool=InlinePool())
