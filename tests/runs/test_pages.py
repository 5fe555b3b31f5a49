"""The reports of runs: their numbers are those of the run's tables, whatever is in prompts and however far it came."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

import s3
import tracer
from helpers import refused
from inline import InlinePool
from parsed import Page
from tracer.cli.app import app
from tracer.errors import RunError
from tracer.evaluation.curves import LEVELS, Curves
from tracer.evaluation.edge_curves import EdgeCurves
from tracer.evaluation.statistics import Interval, Size
from tracer.reports.page import Link
from tracer.runs.jobs import load_job
from tracer.runs.pages import benchmark, claim, dataset, graphs, write
from tracer.runs.units.benchmark_report import BenchmarkResult, Outcome
from tracer.settings import ModelRecord
from tracer.store.run_folder import RunFolder

TEXTS = ["The keys near the cabinet", "The secretaries near the car", "The key near the cabinets", "The parents"]
HOSTILE = '<script>alert("x")</script> & <b>'
BENCHMARK = {
    "kind": "benchmark", "task": "sva", "structures": ["simple", "nounpp"], "train": 6, "test": 4,
    "methods": ["relp", "random"], "bases": ["activation", "output"], "sizes": [3, 30, 300], "rankings": "absolute",
}  # fmt: skip


@functools.cache
def model_record() -> ModelRecord:
    return ModelRecord(
        name="m", revision=None, family="f", fingerprint="0", dtype="float32", n_layers=1, d_model=2, d_mlp=3,
        n_heads=1, parallel=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def compared(folder: Path) -> Path:
    tracer.run(BENCHMARK, folder / "compared", pool=InlinePool())
    return folder / "compared"


def job(folder: Path, **changes: Any) -> dict[str, Any]:
    rows = [{"text": text, "target": " are", "foil": " is"} for text in TEXTS]
    rows.append({"text": "The keys", "target": f" are {HOSTILE}", "foil": " is"})  # cannot be asked
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    test = {"task": "sva", "structure": "nounpp", "count": 4, "split": "test"}
    made: dict[str, Any] = {"kind": "dataset", "input": {"path": str(path)}, "shard_size": 2, "nodes": 12}
    made |= {"circuit": "aligned", "evaluate": {"test": test, "sizes": [3, 12, 100], "edges": True}}
    return made | changes


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    tracer.run(job(folder), folder / "run", pool=InlinePool())
    return folder / "run"


def parsed(path: Path) -> Page:
    return checked(path.read_text(encoding="utf-8"))


def checked(text: str) -> Page:
    """A page that is well formed and loads nothing."""
    found = Page(text)
    assert len(found.ids) == len(set(found.ids))
    assert not found.tags & {"script", "iframe", "object", "link", "img", "form"}
    assert not re.search(r"https?:|@import|javascript:", text)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(found.ids)
    assert all(link[1:] in found.ids for link in found.links if link.startswith("#"))
    assert "default-src 'none'" in text
    return found


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def number(cell: str) -> float:
    return float(cell.replace(",", "").rstrip("%"))


def head(page: Page) -> str:
    return " ".join(page.sections["head"].split())


# ------------------------------------------------------------------------------------------------ a benchmark


def test_the_table_of_a_benchmark_is_table_csv(compared: Path) -> None:
    page = parsed(compared / "report.html")
    table = rows(compared / "table.csv")
    assert len(table) == 8
    for shown, wanted in zip(page.tables["combinations"], table, strict=True):
        assert shown[:6] == [wanted[name] for name in ("structure", "method", "basis", "baseline", "rules", "ranking")]
        assert shown[12].replace(",", "") == (wanted["settles"] or "-")
        for at, level in ((6, "0.8"), (8, "0.9"), (10, "0.95")):
            assert shown[at].replace(",", "") == (wanted[f"size_{level}"] or "-")
        assert number(shown[14]) == pytest.approx(float(wanted["cpr"]), abs=1e-3)
        assert number(shown[16]) == pytest.approx(float(wanted["cmd"]), abs=1e-3)


def test_what_needs_fewest_is_so_in_table_csv_and_stands_at_the_top(compared: Path) -> None:
    page = parsed(compared / "report.html")
    table, curves = rows(compared / "table.csv"), rows(compared / "curves.csv")
    names = {"activation": "activations", "output": "MLP outputs"}
    for shown in page.tables["fewest"]:
        mine = [row for row in table if row["structure"] == shown[0] and names[row["basis"]] == shown[1]]
        relp = next(row for row in mine if row["method"] == "relp")  # random is no method, however small it is
        assert shown[2].replace(",", "") == relp["size_0.9"]
        at = next(
            row
            for row in curves
            if (row["structure"], row["method"], row["basis"], row["size"])
            == (shown[0], "relp", relp["basis"], relp["size_0.9"])
        )
        for cell, name in ((8, "faithfulness"), (10, "control"), (12, "completeness")):
            assert number(shown[cell]) == pytest.approx(float(at[name]), abs=6e-4)
        assert number(shown[5]) == pytest.approx(100 * int(relp["size_0.9"]) / int(relp["n_total"]), abs=6e-4)
        assert f"{int(relp['size_0.9']):,}" in head(page)
    assert "4 held-out pairs" in head(page)


def test_the_mean_over_structures_is_that_of_curves_csv(compared: Path) -> None:
    curves, found = rows(compared / "curves.csv"), rows(compared / "mean.csv")
    values: dict[tuple[str, ...], list[dict[str, str]]] = defaultdict(list)
    for row in curves:
        values[row["method"], row["basis"], row["baseline"], row["size"]].append(row)
    whole = {key: both for key, both in values.items() if len(both) == 2}
    assert {(row["method"], row["basis"], row["baseline"], row["size"]) for row in found} == whole.keys()
    assert len(whole) >= 12
    for row in found:
        both = whole[row["method"], row["basis"], row["baseline"], row["size"]]
        for name in ("faithfulness", "completeness", "control"):
            two = [float(one[name]) for one in both]
            assert float(row[name]) == pytest.approx(sum(two) / 2)
            assert (float(row[f"{name}_lowest"]), float(row[f"{name}_highest"])) == pytest.approx((min(two), max(two)))
    page = parsed(compared / "report.html")
    for shown, row in zip(page.tables["means"], found, strict=True):
        assert (shown[0], shown[3].replace(",", "")) == (row["method"], row["size"])
        assert number(shown[4]) == pytest.approx(float(row["faithfulness"]), abs=6e-4)
        assert number(shown[6]) == pytest.approx(float(row["completeness"]), abs=6e-4)
    assert "no confidence interval" in page.sections["mean"]
    for name in ("claim", "mean.activation", "mean.output"):
        assert (compared / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_benchmark_says_what_it_was_measured_on(compared: Path) -> None:
    page = parsed(compared / "report.html")
    assert [(row[0], row[2], row[3], row[4]) for row in page.tables["measured"]] == [
        (structure, "6", "4", "0") for structure in ("simple", "simple", "nounpp", "nounpp")
    ]
    record = json.loads((compared / "run.json").read_text())
    assert ["weights fingerprint", record["model"]["fingerprint"]] in page.tables["settings"]
    assert (compared / "report.html").read_text().count("<svg") == 1 + 2 + 4


def test_half_a_benchmark_shows_what_is_there(compared: Path, tmp_path: Path) -> None:
    shutil.copytree(compared, tmp_path / "half")
    folder = RunFolder(tmp_path / "half")
    folder.delete_outputs()
    for unit in (0, 5):
        folder.uncommit(unit)
    page = checked(write.report_text(tmp_path / "half"))
    assert "Not finished. 6 of 8 combinations are there." in head(page)
    assert "simple/relp/activation/counterfactual, nounpp/random/activation/none" in page.sections["missing"]
    assert len(page.tables["combinations"]) == 6
    assert "needs all of the job's structures" not in page.sections["mean"]
    for unit in range(8):
        folder.uncommit(unit)
    assert "Nothing can be said yet" in head(checked(write.report_text(tmp_path / "half")))
    assert not (tmp_path / "half" / "report.html").exists()


# ------------------------------------------------------------------------------------------------ its claim


def interval(*estimate: float, wide: float = 0.01) -> Interval:
    values = torch.tensor(estimate, dtype=torch.double)
    return Interval(low=values - wide, high=values + wide, estimate=values)


def outcome(
    basis: str,
    ends: tuple[int | None, int | None, int | None],
    method: str = "relp",
    chance: float = 0.0,
    highest: float = 0.95,
    structure: str = "one",
) -> Outcome:
    """Sizes 10, 100 and 1000; the level is reached at the second of the ends (low, estimate, high)."""
    size = Size(low=ends[0], estimate=ends[1], high=ends[2])
    one = interval(0.9)
    curves = Curves(
        sizes=(10, 100, 1000),
        n_neurons=(10, 100, 1000),
        faithfulness=interval(0.92, highest, 1.0),
        completeness=interval(0.5, 0.3, 0.0),
        control_faithfulness=interval(chance, chance, 1.0),
        cpr=Interval(*(getattr(one, name)[0] for name in ("low", "high", "estimate"))),
        cmd=Interval(*(getattr(one, name)[0] for name in ("low", "high", "estimate"))),
        sizes_for=dict.fromkeys(LEVELS, size),
        settles=size,
    )
    return Outcome(
        structure=structure, method=method, basis=basis, baseline="none" if method == "random" else "counterfactual",
        n_train=3, n_test=4, skipped={}, n_total=2000, whole=1.0, empty=0.0, rankings={"absolute": curves},
        attribution_seconds=1.0, evaluation_seconds=1.0,
    )  # fmt: skip


def result(*outcomes: Outcome) -> BenchmarkResult:
    made = {**BENCHMARK, "input": {"name": "one", "train": "a", "test": "b"}}
    job = load_job({name: value for name, value in made.items() if name not in ("task", "structures")})
    return BenchmarkResult(job, model_record(), outcomes, "x", 0, 2.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("small", "large", "chance", "holds", "ratio"),
    [
        ((10, 10, 10), (1000, 1000, 1000), 0.0, True, (100, 100, 100)),
        ((10, 10, 100), (100, 1000, 1000), 0.0, False, (100, 1, 100)),  # the intervals touch
        ((10, 100, 100), (1000, 1000, None), 0.0, True, (10, 10, float("inf"))),
        ((10, 100, None), (1000, 1000, 1000), 0.0, False, (10, 10, 100)),
        ((10, 10, 10), (None, None, None), 0.0, True, None),
        ((10, 10, 10), (1000, 1000, 1000), 0.93, False, (100, 100, 100)),  # chance does as well
        ((None, None, None), (1000, 1000, 1000), 0.0, False, None),
    ],
)
def test_a_structure_counts_by_its_intervals(small: Any, large: Any, chance: float, holds: bool, ratio: Any) -> None:
    given = result(outcome("activation", small, chance=chance), outcome("output", large))
    (found,) = claim.claims(given)
    assert (found.holds, found.ratio) == (holds, ratio)
    assert benchmark._verdict([found], 0, 2).word == ("Held" if holds else "Did not hold")
    assert benchmark._verdict([found], 1, 3).word == "Not finished"


def test_controls_never_need_fewest_and_one_basis_is_judged_alone() -> None:
    given = [outcome("activation", (10, 10, 10), method=name) for name in ("delta", "random")]
    given.append(outcome("activation", (100, 100, 100)))
    (found,) = claim.claims(result(*given))
    assert found.main is not None
    assert (found.main.nodes, found.ratio, found.is_smaller, found.holds) == (100, None, None, True)
    text = "".join(benchmark.page_of(result(*given), {}).findings)
    assert "100 activations (95 % interval 100 to 100) hold 90%" in text
    assert "these are 5.00% of all 2,000" in text
    assert "chance fails" in text


def test_a_curve_that_passes_1_is_named() -> None:
    (one,) = claim.overshoots([outcome("activation", (10, 10, 10), highest=1.3)], "absolute")
    assert one[1:] == (100, (1.3, 1.29, 1.31))
    assert not [*claim.overshoots([outcome("activation", (10, 10, 10), highest=1.05)], "absolute")]
    page = benchmark.page_of(result(outcome("activation", (10, 10, 10), highest=1.3)), {})
    assert (
        "the curve overshoots. Faithfulness passes 1 on its way: 1.300 [1.290, 1.310] at 100 nodes" in page.findings[-1]
    )


# ------------------------------------------------------------------------------------------------ a dataset


def test_the_verdict_of_a_dataset_is_its_evaluations(run: Path) -> None:
    page, about = parsed(run / "report.html"), json.loads((run / "evaluation.json").read_text())
    at = about["curves"]["sizes"].index(12)
    value = about["curves"]["faithfulness"]
    shown = f"{value['estimate'][at]:.1%} (95 % interval {value['low'][at]:.1%} to {value['high'][at]:.1%})"
    assert (
        f"With everything outside the circuit's 12 nodes replaced by the mean over reference prompts, {shown}"
        in head(page)
    )
    assert "4 held-out prompts" in head(page)
    assert [row[0] for row in page.tables["curves"]] == [f"{size:,}" for size in about["curves"]["sizes"]]
    for row, wanted in zip(page.tables["curves"], value["estimate"], strict=True):
        assert number(row[2]) == pytest.approx(wanted, abs=6e-4)
    assert (run / "report.html").read_text().count("<svg") == 2
    edges = list(EdgeCurves.of(about["edge_curves"]).rows())
    assert [row[1] for row in page.tables["edge-curves"]] == [f"{one['n_edges']:,}" for one in edges]
    assert number(page.tables["edge-curves"][-1][3]) == pytest.approx(edges[-1]["faithfulness"], abs=6e-4)


def test_the_tables_of_a_dataset_are_those_of_its_files(run: Path) -> None:
    page = parsed(run / "report.html")
    circuit = pq.read_table(run / "circuit.parquet").to_pylist()
    total = sum(abs(row["mean_attribution"]) for row in circuit)
    for shown, row in zip(page.tables["circuit"], circuit, strict=True):
        assert [int(cell) for cell in shown[1:4]] == [row["layer"], row["position"], row["neuron"]]
        assert number(shown[4]) == pytest.approx(row["mean_attribution"], abs=6e-5)
        assert number(shown[6]) == pytest.approx(100 * abs(row["mean_attribution"]) / total, abs=0.06)
    neurons = {(row["layer"], row["neuron"]): row for row in pq.read_table(run / "neurons.parquet").to_pylist()}
    top = {
        (row["layer"], row["neuron"]): row["prompt_id"]
        for row in pq.read_table(run / "top_prompts.parquet").sort_by([("rank", "descending")]).to_pylist()
    }
    assert len(page.tables["neurons"]) == min(len(neurons), dataset.ROWS)
    for shown in page.tables["neurons"]:
        key = (int(shown[0]), int(shown[1]))
        assert int(shown[2]) == neurons[key]["n_prompts"]
        assert number(shown[3]) == pytest.approx(100 * neurons[key]["n_prompts"] / 4, abs=0.06)
        assert number(shown[4]) == pytest.approx(neurons[key]["prompt_mean_attribution"], abs=6e-5)
        assert shown[7] == f"prompt {top[key]}"
    prompts = [row for row in committed(run, "prompts") if row["status"] == "ok"]
    assert sum(int(row[1]) for row in page.tables["conservation"]) == len(prompts) == 4
    small = sum(abs(row["unexplained"] / row["metric"]) < 1e-7 for row in prompts)
    assert int(page.tables["conservation"][0][1]) == small
    assert "every prompt has 12 nodes" in page.sections["sizes"]


def committed(run: Path, name: str) -> list[dict[str, Any]]:
    folder = RunFolder(run)
    return [row for commit in folder.commits() for row in folder.read_committed(commit, name).to_pylist()]


def test_graphs_are_of_the_prompts_that_hold_most_of_the_circuit(run: Path) -> None:
    """The shares once more, from the tables, row by row."""
    page = parsed(run / "report.html")
    weights = {
        (row["layer"], row["position"], row["neuron"]): abs(row["mean_attribution"])
        for row in pq.read_table(run / "circuit.parquet").to_pylist()
    }
    held: dict[int, float] = defaultdict(float)
    for row in committed(run, "nodes"):
        if row["kind"] == "neuron" and row["prompt_id"] != 3:  # "The parents" is of another length
            held[row["prompt_id"]] += weights.get((row["layer"], row["position"], row["neuron"]), 0.0)
    order = sorted(held, key=lambda one: (-held[one], one))
    links = [link for link in page.links if not link.startswith("#")]
    assert links == ["graphs/circuit.html", *(f"graphs/prompt-{one}.html" for one in order)]
    for one in order:
        assert f"{held[one] / sum(weights.values()):.1%} of the circuit; {TEXTS[one]}" in page.sections["graphs"]
        assert TEXTS[one] in (run / f"graphs/prompt-{one}.html").read_text(encoding="utf-8")
    for link in links:
        assert '"report":"../report.html"' in (run / link).read_text(encoding="utf-8")
    assert str(run) not in (run / "graphs/circuit.html").read_text(encoding="utf-8")
    sealed = json.loads((run / "_SUCCESS.json").read_text())["files"]
    assert {"report.html", *links} <= sealed.keys()


def test_failures_and_texts_of_prompts_are_text(run: Path) -> None:
    page = parsed(run / "report.html")
    ((count, message),) = page.tables["failures"]
    assert count == "1"
    assert "<script>alert" in message
    assert "<script>" not in (run / "report.html").read_text()
    assert "1 of 5 prompts have no result (1 failed)" in page.sections["failures"]


def test_hostile_names_and_texts_are_escaped(run: Path) -> None:
    folder, made, commits, record = write.opened(run)
    found = write._found(made, folder, commits, record)  # type: ignore[arg-type]
    found = dataclasses.replace(found, links=[Link('x"y', "n", HOSTILE)])
    bad = {**record, "model": {**record["model"], "name": HOSTILE}, "packages": {HOSTILE: HOSTILE}}
    bad["notes"] = [HOSTILE, "\x1b[31m\u202e"]
    text = dataset.page_of(dataclasses.replace(found, record=bad)).html()
    page = checked(text)
    assert HOSTILE in head(page)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert page.links[-1] == 'x"y'
    given = result(outcome("activation", (10, 10, 10)))
    named = dataclasses.replace(given, model=model_record().model_copy(update={"name": HOSTILE}))
    assert HOSTILE in head(checked(benchmark.page_of(named, bad).html()))


def test_half_a_dataset_shows_what_is_there(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "half")
    folder = RunFolder(tmp_path / "half")
    folder.delete_outputs()
    assert not (tmp_path / "half" / "graphs" / "circuit.html").exists()
    folder.uncommit(0)
    names = write.refresh(tmp_path / "half")
    page = parsed(tmp_path / "half" / "report.html")
    assert "Not finished. 3 of 5 prompts are there." in head(page)
    assert "2 of 5 prompts" in page.sections["missing"]
    assert "evaluate" in page.sections["missing"]
    assert "Not measured" in page.sections["holds"]
    assert len(page.tables["circuit"]) == 12
    assert sum(int(row[1]) for row in page.tables["conservation"]) == 2
    assert {*names[1:]} == {link for link in page.links if not link.startswith("#")}
    assert names[1:]
    assert not (tmp_path / "half" / "_SUCCESS.json").exists()
    for unit in (1, 2):
        folder.uncommit(unit)
    page = checked(write.report_text(tmp_path / "half"))
    assert "0 of 5 prompts are there" in head(page)


def test_a_run_that_nobody_tested_says_so(folder: Path, tmp_path: Path) -> None:
    """And a free circuit has no page of its own, since it has no positions."""
    tracer.run(job(folder, circuit="free", evaluate=None), tmp_path / "free", pool=InlinePool())
    page = parsed(tmp_path / "free" / "report.html")
    assert "Not tested." in head(page)
    assert "Not measured." in page.sections["holds"]
    assert "missing" not in page.sections
    assert {row[2] for row in page.tables["circuit"]} == {"any"}
    assert "graphs/circuit.html: the circuit of the whole dataset (not drawn: a free circuit" in page.sections["graphs"]
    links = [link for link in page.links if not link.startswith("#")]
    assert len(links) == 4
    assert all((tmp_path / "free" / link).exists() for link in links)
    assert RunFolder(tmp_path / "free").check_outputs() == []


def test_a_graph_that_is_too_large_is_named_and_not_kept(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run, tmp_path / "run")
    monkeypatch.setattr(graphs, "MOST_EDGES", 3)
    assert write.refresh(tmp_path / "run") == ["report.html"]  # a dataset's circuit has edges too
    page = parsed(tmp_path / "run" / "report.html")
    assert "the page draws at most 3)" in page.sections["graphs"]
    assert not list((tmp_path / "run" / "graphs").iterdir())
    assert RunFolder(tmp_path / "run").check_outputs() == []


def test_the_same_folder_gives_the_same_bytes(run: Path, compared: Path) -> None:
    for folder in (run, compared):
        before = {
            path.name: path.read_bytes() for path in (folder.glob("*.html"), folder.glob("graphs/*")) for path in path
        }
        write.refresh(folder)
        after = (*folder.glob("*.html"), *folder.glob("graphs/*"))
        assert before == {path.name: path.read_bytes() for path in after}
        assert RunFolder(folder).check_outputs() == []


def test_a_quality_is_shown_as_it_was_measured(run: Path) -> None:
    folder, made, commits, record = write.opened(run)
    correlation = {"n": 7, "reason": None, "pearson": {"estimate": 0.5, "low": 0.25, "high": 0.75}, "spearman": None}
    one = {"prompt_id": 2, "method": "relp", "baseline": "zero", "ablation": "zero", "whole": correlation}
    found = write._found(made, folder, commits, record)  # type: ignore[arg-type]
    page = checked(dataset.page_of(dataclasses.replace(found, qualities=[one])).html())
    assert page.tables["quality"] == [
        ["2", "relp from zero", "zero ablation", "7", "0.500", "[0.250, 0.750]", "-", "-"]
    ]


# ------------------------------------------------------------------------------------------------ the verb


def said(*words: object) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, words)])


def test_a_report_elsewhere_links_back_and_leaves_the_folder_alone(run: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    out = tmp_path / "deep" / "page.html"
    assert said(run, "--out", out).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    links = [link for link in parsed(out).links if not link.startswith("#")]
    assert len(links) == 4
    assert all((out.parent / link).resolve().is_relative_to(run.resolve()) for link in links)
    assert all((out.parent / link).exists() for link in links)


def test_folders_that_have_no_report_are_refused(run: Path, tmp_path: Path) -> None:
    with refused(RunError, "holds no run"):
        write.report_text(tmp_path)
    shutil.copytree(run, tmp_path / "run")
    with RunFolder(tmp_path / "run").place.locked():
        found = said(tmp_path / "run")
        assert found.exit_code == 2
        assert "is being written by process" in found.stderr
        assert "--out" in found.stderr
    (tmp_path / "run" / "neurons.parquet").write_bytes(b"x")
    with refused(RunError, "neurons.parquet has other content"):
        write.report_text(tmp_path / "run")


@pytest.fixture(scope="module")
def store() -> Iterator[s3.Store]:
    with s3.server() as made:
        yield made


def test_a_run_in_an_object_store_has_its_report_there(folder: Path, store: s3.Store, tmp_path: Path) -> None:
    address = store.address()
    tracer.run(job(folder, evaluate=None, edges=False), address, pool=InlinePool())
    place = RunFolder(address).place
    page = checked(place.read("report.html").decode())
    links = [link for link in page.links if not link.startswith("#")]
    assert len(links) == 4
    assert all(place.exists(link) for link in links)
    assert RunFolder(address).check_outputs() == []
    assert write.refresh(address) == ["report.html", *links]
    assert said(address, "--out", tmp_path / "x.html").exit_code == 0
    elsewhere = parsed(tmp_path / "x.html")
    assert [link for link in elsewhere.links if not link.startswith("#")] == []
    assert "graphs/circuit.html" in elsewhere.sections["graphs"]
