"""The agreement benchmark as a job: its record, its folder, resuming, and its numbers against `evaluate`'s."""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from helpers import refused
from rich.console import Console

import tracer
from tracer import run, tasks
from tracer.circuit import Circuit
from tracer.errors import JobError, RunError
from tracer.evaluation import evaluate
from tracer.run import Job, benchmark_table, load_job, ordered, read_results, run_benchmark
from tracer.tasks import Pair

DEFAULT = Path(__file__).parents[1] / "jobs" / "sva.yaml"
TINY = (
    "structures=nounpp",
    "train=10",
    "test=6",
    "methods=[relp, random]",
    "bases=activation",
    "baselines=counterfactual",
    "sizes=[3, 30, 300]",
)


def tiny(*more: str) -> Job:
    return load_job(DEFAULT, [*TINY, *more])


@functools.cache
def demo() -> tracer.Model:
    return tracer.load("demo")


# ------------------------------------------------------------------------------------------------ job files


def test_the_default_job_is_the_benchmark_of_the_paper() -> None:
    job = load_job(DEFAULT)
    assert (job.train, job.test, job.ablation) == (300, 40, "mean")
    assert job.structures == ("simple", "nounpp", "rc", "within_rc")
    # 5 methods on 3 baselines and random once, in 2 bases, on 4 structures
    assert len(job.combinations()) == len(set(job.combinations())) == 4 * 2 * (5 * 3 + 1)
    assert ("rc", "random", "output", "none") in job.combinations()


def test_overrides_are_yaml_values_and_win() -> None:
    job = load_job(DEFAULT, ["train=7", "methods=[relp, delta]", "baselines=mean", "train=8", " seed =3", "model=a b"])
    assert (job.train, job.methods, job.baselines, job.seed) == (8, ("relp", "delta"), ("mean",), 3)
    assert job.model == "a b"
    assert load_job(DEFAULT) == load_job(str(DEFAULT), [])


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("train", "key=value"),
        ("trian=3", "structures, train"),
        ("=3", "not known"),
        ("train=[", "not YAML"),
        ("train=0", "greater than or equal to 1"),
        ("test=1", "greater than or equal to 2"),
        ("methods=[relp, magic]", "relp"),
        ("methods=[]", "at least one"),
        ("methods=[relp, relp]", "each once"),
        ("bases=logits", "activation"),
        ("sizes=[5, 3]", "rise"),
        ("sizes=[0, 3]", "rise"),
        ("rankings=weird", "absolute"),
        ("task=capitals", "sva"),
        ("kind=trace", "benchmark"),
        ("train=", "integer"),
    ],
)
def test_bad_overrides_are_refused(override: str, part: str) -> None:
    with refused(JobError, part):
        load_job(DEFAULT, [override])


def test_settings_without_effect_are_refused() -> None:
    with refused(JobError, "steps"):
        load_job(DEFAULT, ["methods=relp", "steps=5"])
    with refused(JobError, "conductance"):
        load_job(DEFAULT, ["methods=conductance", "baselines=mean"])


def test_bad_files_are_refused(tmp_path: Path) -> None:
    def file(text: str | bytes) -> Path:
        path = tmp_path / "job.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    with refused(JobError, "check the path"):
        load_job(tmp_path / "none.yaml")
    with refused(JobError, "not YAML"):
        load_job(file("a: [1"))
    with refused(JobError, "not YAML"):
        load_job(file(b"\xff\xfe\x00"))
    with refused(JobError, "not YAML"):
        load_job(file("a: !!python/object/apply:os.system ['true']"))
    with refused(JobError, "holds a list"):
        load_job(file("- 1"))
    with refused(JobError, "holds a NoneType"):
        load_job(file(""))
    with refused(JobError, "has no"):
        load_job(file("kind: benchmark"))
    with refused(JobError, "'colour'", "not known"):
        load_job(file(DEFAULT.read_text() + "\ncolour: red\n"))


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
def test_numbers_equal_evaluates_on_the_same_ranking(tmp_path: Path, structure: str, ranking: str) -> None:
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
    for theirs, mine in (*pairs, (found.control_faithfulness, curves.control)):
        for end in ("estimate", "low", "high"):
            wanted = getattr(theirs, end)
            assert torch.allclose(torch.tensor(getattr(mine, end)[: len(sizes)]).double(), wanted, atol=1e-5)
    for level, size in found.sizes_for.items():
        if size.estimate is not None:
            assert curves.sizes_for[f"{level:g}"].estimate == size.estimate
    assert outcome.whole == pytest.approx(float(found.whole.mean()), abs=1e-5)
    assert outcome.empty == pytest.approx(float(found.empty.mean()), abs=1e-5)


def test_areas_are_over_mibs_sizes(tmp_path: Path) -> None:
    outcome = run_benchmark(tiny("methods=relp"), tmp_path / "out").outcomes[0]
    for curves in outcome.rankings.values():
        areas = [round(share * outcome.n_total) for share in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)]
        value = torch.tensor(
            [curves.faithfulness.estimate[curves.sizes.index(size)] for size in areas], dtype=torch.double
        )
        at = torch.tensor(areas).double() / outcome.n_total
        assert curves.cpr.estimate == pytest.approx(float(torch.trapezoid(value, at)))
        assert curves.cmd.estimate == pytest.approx(float(torch.trapezoid((1 - value).abs(), at)))
        assert (curves.faithfulness.estimate[-1], curves.completeness.estimate[-1]) == (1.0, 0.0)


def test_a_ranking_is_of_places() -> None:
    given = torch.tensor([[[0.5, -2.0, 0.0]], [[2.0, 0.5, -0.1]]])
    assert ordered(given, "absolute").flatten().tolist() == [2, 0, 5, 1, 3, 4]
    assert ordered(given, "signed").flatten().tolist() == [1, 5, 3, 0, 2, 4]


def test_attributions_do_not_depend_on_how_prompts_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    job = tiny()
    pairs = tasks.load("sva", structure="nounpp", split="train", count=7)
    for baseline in ("counterfactual", "mean"):
        whole = run.mean_attribution(job, demo(), pairs, "grad", "activation", baseline)
        with monkeypatch.context() as patch:
            patch.setattr(run, "_ATTRIBUTED", 1)
            one_by_one = run.mean_attribution(job, demo(), pairs, "grad", "activation", baseline)
        assert torch.allclose(whole, one_by_one, atol=1e-5)


# ----------------------------------------------------------------------------------------------- its folder


def test_the_folder_holds_job_results_curves_table_and_plots(tmp_path: Path) -> None:
    job, out, seen = tiny("rankings=absolute"), tmp_path / "deep" / "out", []
    result = run_benchmark(job, out, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    assert sorted(path.name for path in out.iterdir()) == [
        "_SUCCESS.json", "curves.csv", "plots", "results.json", "run.json", "table.csv"]  # fmt: skip
    record = json.loads((out / "run.json").read_text())
    assert Job.model_validate(record["job"]) == job
    assert record["kind"] == "benchmark"
    assert record["packages"]["torch"]
    assert record["model"]["fingerprint"] == demo().fingerprint
    assert read_results(out).outcomes == result.outcomes
    assert (out / "plots" / "nounpp-activation.png").read_bytes().startswith(b"\x89PNG")
    with (out / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    relp = result.outcomes[0].rankings["absolute"]
    assert [int(row["size"]) for row in rows if row["method"] == "relp"] == list(relp.sizes)
    assert [float(row["faithfulness_low"]) for row in rows if row["method"] == "relp"] == list(relp.faithfulness.low)
    with (out / "table.csv").open() as file:
        assert [row["baseline"] for row in csv.DictReader(file)] == ["counterfactual", "none"]


def test_the_table_says_what_was_run(tmp_path: Path) -> None:
    result = run_benchmark(tiny(), tmp_path / "out")
    console = Console(width=220, record=True, file=io.StringIO())
    console.print(benchmark_table(result))
    text = console.export_text()
    for part in ("relp", "random", "nodes for 0.95", "CPR signed", "CMD absolute", "10 pairs", "6 others", "mean"):
        assert part in text


def test_a_finished_run_is_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_benchmark(tiny(), tmp_path)
    monkeypatch.setattr(run, "_outcome", None)
    again = run_benchmark(tiny(), tmp_path)
    assert again.outcomes == first.outcomes
    assert (first.resumed, again.resumed) == (0, 2)


def test_what_was_done_before_an_error_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = run.mean_attribution, []

    def failing(job: Job, model: object, pairs: object, method: str, *rest: str) -> torch.Tensor:
        asked.append(method)
        if method == "random" and asked.count("random") == 1:
            raise JobError("power", "is cut", "plug it in")
        return real(job, model, pairs, method, *rest)  # pyright: ignore

    monkeypatch.setattr(run, "mean_attribution", failing)
    with refused(JobError, "nounpp/random/activation/none: power", "plug it in"):
        run_benchmark(tiny(), tmp_path)
    assert [one.method for one in read_results(tmp_path).outcomes] == ["relp"]
    assert not (tmp_path / "_SUCCESS.json").exists()
    result = run_benchmark(tiny(), tmp_path)
    assert asked == ["relp", "random", "random"]
    assert result.resumed == 1
    assert [one.method for one in result.outcomes] == ["relp", "random"]


def test_results_of_other_packages_are_computed_again(tmp_path: Path) -> None:
    run_benchmark(tiny(), tmp_path)
    path = tmp_path / "results.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"packages": {"torch": "0.1"}}))
    assert run_benchmark(tiny(), tmp_path).resumed == 0


def test_another_jobs_folder_is_refused_and_can_be_replaced(tmp_path: Path) -> None:
    run_benchmark(tiny("structures=simple"), tmp_path)
    with refused(RunError, "holds another run"):
        run_benchmark(tiny(), tmp_path)
    assert read_results(tmp_path).outcomes[0].structure == "simple"
    assert run_benchmark(tiny(), tmp_path, overwrite=True).resumed == 0
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["nounpp-activation.png"]


def test_folders_that_are_not_runs_and_damage_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with refused(RunError, "not a run"):
        run_benchmark(tiny(), tmp_path)
    with refused(RunError, "is a file"):
        run_benchmark(tiny(), tmp_path / "notes.txt")
    with refused(RunError, "cannot be read"):
        read_results(tmp_path)
    out = tmp_path / "out"
    run_benchmark(tiny("methods=random"), out)
    (out / "results.json").write_text('{"fingerprint": "a"')
    with refused(RunError, "damaged", "delete it"):
        run_benchmark(tiny("methods=random"), out)


# --------------------------------------------------------------------------------- what cannot be measured


def changed_pairs(monkeypatch: pytest.MonkeyPatch, split: str, **fields: object) -> None:
    real = tasks.load

    def load(name: str, **options: object) -> list[Pair]:
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

    def load(name: str, **options: object) -> list[Pair]:
        first, *rest = real(name, **options)
        return [dataclasses.replace(first, foil=" is are"), *rest]

    monkeypatch.setattr(tasks, "load", load)
    outcome = run_benchmark(tiny("methods=random"), tmp_path).outcomes[0]
    assert (outcome.n_train, outcome.n_test) == (9, 5)
    assert outcome.skipped == {f"{split}: an answer is not one token": 1 for split in ("train", "test")}


def test_an_ablation_that_changes_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = demo()
    monkeypatch.setattr(run, "load", lambda name: model)
    monkeypatch.setattr(run.evaluation._Test, "measure", lambda self, jobs, progress=None: torch.ones(len(jobs)))
    with refused(JobError, "nounpp/relp/activation/counterfactual", "F(model) - F(empty)"):
        run_benchmark(tiny(), tmp_path)


def test_more_pairs_than_there_are_is_refused(tmp_path: Path) -> None:
    with refused(JobError, "simple has"):
        run_benchmark(tiny("structures=simple", "test=100000"), tmp_path)


def test_sizes_above_all_nodes_are_left_out(tmp_path: Path) -> None:
    outcome = run_benchmark(tiny("methods=random", "sizes=[10, 10000000]"), tmp_path).outcomes[0]
    assert outcome.rankings["absolute"].sizes[-1] == outcome.n_total
