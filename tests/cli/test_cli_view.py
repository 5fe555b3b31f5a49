"""The verb view: two graphs on one page, facts of a run, and what cannot be served."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import tracer
from inline import InlinePool
from tracer.circuit.circuit import Circuit
from tracer.circuit.from_run import read_graph
from tracer.cli.app import app
from tracer.reports.facts import facts

PROMPTS = {"one": "The keys near the cabinet", "other": "The key near the cabinet"}


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, text in PROMPTS.items():
        done = run("trace", text, "--target", " are", "--foil", " is", "--nodes", "30", "--out", folder / name)
        assert done.exit_code == 0, done.output
    return folder


def header(page: Path) -> dict[str, Any]:
    found = re.search(r'id="header">(.*?)</script>', page.read_text(encoding="utf-8"))
    assert found is not None
    return json.loads(found[1])


def column(page: Path, name: str) -> np.ndarray:
    text = page.read_text(encoding="utf-8")
    block = base64.b64decode(text.partition('id="block">')[2].partition("<")[0])
    code, offset, length = header(page)["columns"]["nodes"][name]
    return np.frombuffer(block, f"<{code}" if code != "u1" else "u1", length, offset)


def test_two_runs_are_one_page(runs: Path, tmp_path: Path) -> None:
    page = tmp_path / "both.html"
    done = run("view", runs / "one", runs / "other", "--out", page)
    assert done.exit_code == 0, done.output
    assert header(page)["sides"] == ["one", "other"]
    circuits = [Circuit.load(runs / name) for name in PROMPTS]
    keys = [
        {(row["layer"], row["position"], row["neuron"]): row["attribution"] for row in one.neurons.to_pylist()}
        for one in circuits
    ]
    names = ("layer", "position", "neuron", "side", "first", "last", "kind")
    rows = list(zip(*(column(page, name).tolist() for name in names), strict=True))
    seen = {tuple(row[:3]): row for row in rows if row[6] == 0}
    assert seen.keys() == keys[0].keys() | keys[1].keys()
    for key, row in seen.items():
        ends = [side.get(key) for side in keys]
        there = [one for one in ends if one is not None]
        signs = len(there) == 2 and there[0] * there[1] < 0
        assert row[3] == (1 if ends[1] is None else 2 if ends[0] is None else 4 if signs else 3)
        for value, end in zip(row[4:6], ends, strict=True):
            assert np.isnan(value) if end is None else value == pytest.approx(end, rel=1e-5)
    assert run("view", runs / "one", runs / "other").exit_code == 0
    assert (runs / "one" / "compared.html").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("one", "one"), "compared with itself"),
        (("one", "other", "one"), "two at most"),
        (("one", "other", "--serve"), "is of one graph"),
        (("one", "other", "--prompt", "1"), "is given 1 times"),
        (("one", "--counterfactual"), "of one prompt of one run"),
        (("one", "--prompt", "0", "--counterfactual"), "holds no run of a dataset"),
        (("one", "--serve", "--out", "x.html"), "has no effect with --serve"),
        (("one/run.json", "--serve"), "is no run folder"),
    ],
)
def test_what_does_not_go_together_is_refused(
    runs: Path, arguments: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    done = run("view", *arguments)
    assert done.exit_code == 2, done.output
    assert said in " ".join(done.stderr.split())


def test_the_page_says_what_the_run_says(runs: Path) -> None:
    assert run("view", runs / "one").exit_code == 0
    found, circuit = header(runs / "one" / "graph.html")["facts"], Circuit.load(runs / "one")
    assert found["predictions"] == [[one.token, pytest.approx(one.probability)] for one in circuit.predictions]
    assert (found["holds"], found["report"], found["evaluation"]) == (True, None, [])
    assert f"{circuit.metric:+.4f}" in found["metric"]
    curve = {"estimate": [0.5, 0.75], "low": [0.25, None], "high": [0.625, None]}
    content = {"sizes": [20, 5], "faithfulness": curve, "control_faithfulness": curve, "whole": [1.0] * 6,
               "n_shared": 0, "ablation": "mean"}  # fmt: skip
    (runs / "one" / "evaluation.json").write_text(json.dumps(content))
    (runs / "one" / "report.html").write_text("<p>")
    assert run("view", runs / "one").exit_code == 0
    found = header(runs / "one" / "graph.html")["facts"]
    assert found["evaluation"] == [[5, 0.75, None, None, 0.75], [20, 0.5, 0.25, 0.625, 0.5]]
    assert (found["tested"], found["report"]) == ("6 test prompts, mean ablation", "report.html")
    circuit = Circuit.load(runs / "one")
    curves = {"sizes": [20, 5], "faithfulness": curve, "control": curve}
    of_job = {"curves": curves, "whole": 2.5, "n_test": 6, "n_shared": 0, "ablation": "mean"}
    (runs / "one" / "evaluation.json").write_text(json.dumps(of_job))
    of_a_job = facts(circuit, runs / "one")
    assert [list(vars(one).values()) for one in of_a_job.evaluation] == found["evaluation"]
    assert of_a_job.tested == found["tested"]
    for damaged in ("{", "[]", '{"sizes": "x"}', json.dumps(content | {"sizes": [1] * 2000})):
        (runs / "one" / "evaluation.json").write_text(damaged)
        with pytest.warns(UserWarning, match=r"evaluation\.json is not shown"):
            assert facts(circuit, runs / "one").evaluation == ()
        done = run("view", runs / "one")
        assert done.exit_code == 0, done.output
        assert "evaluation.json is not shown" in " ".join(done.stderr.split())
    (runs / "one" / "evaluation.json").write_text(json.dumps(content | {"always_on": [{"layer": -1}]}))
    done = run("view", runs / "one")
    assert done.exit_code == 0, done.output
    assert "the always-on neurons of evaluation.json are not shown" in " ".join(done.stderr.split())
    assert header(runs / "one" / "graph.html")["alwaysOn"] is None
    (runs / "one" / "evaluation.json").unlink()
    assert facts(circuit, runs / "one", runs / "elsewhere.html").report is None
    assert facts(circuit, runs / "one", runs / "one" / "x.html").report == "report.html"


ROWS = (
    ("The key near the cabinet", "The keys near the cabinet"),
    ("The keys near the cabinet", "The key near the cabinet"),
    ("The door near the keys", "The doors near the keys"),  # which is not among them
    ("The doors to the cabinet", None),
)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run over four prompts in two shards; the first two are each other's counterfactual."""
    place = tmp_path_factory.mktemp("many")
    rows = [
        {"text": text, "target": " are", "foil": " is"} | ({"counterfactual": other} if other else {})
        for text, other in ROWS
    ]
    (place / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = {"kind": "dataset", "input": {"path": [str(place / "in.jsonl")]}, "shard_size": 2, "nodes": 20}
    tracer.run(job | {"baseline": "zero", "circuit": "aligned"}, place / "run", pool=InlinePool())
    return place / "run"


@pytest.mark.parametrize("arguments", [("--prompt", 0, "--prompt", 1), ("--prompt", 0, "--counterfactual")])
def test_two_prompts_of_a_run_are_one_page(many: Path, arguments: tuple[Any, ...], tmp_path: Path) -> None:
    page = tmp_path / "pair.html"
    done = run("view", many, *arguments, "--out", page)
    assert done.exit_code == 0, done.output
    assert [side.partition(": ")[0] for side in header(page)["sides"]] == ["0", "1"]
    assert [ROWS[i][0] in side for i, side in enumerate(header(page)["sides"])] == [True, True]
    kind = column(page, "kind")
    nodes = list(
        zip(*(column(page, name)[kind == 0].tolist() for name in ("layer", "position", "neuron")), strict=True)
    )
    for prompt, name in enumerate(("first", "last")):
        graph = read_graph(many, prompt).nodes.to_pylist()
        own = {
            (row["layer"], row["position"], row["neuron"]): row["attribution"]
            for row in graph
            if row["kind"] == "neuron"
        }
        found = dict(zip(nodes, column(page, name)[kind == 0].tolist(), strict=True))
        assert own
        assert {key for key, value in found.items() if not np.isnan(value)} == own.keys()
        assert all(found[key] == pytest.approx(value, rel=1e-5) for key, value in own.items())


@pytest.mark.parametrize(
    ("prompt", "said"), [(2, "is not among the run's prompts"), (3, "has no counterfactual"), (4, "has prompts 0 to 3")]
)
def test_a_counterfactual_that_is_not_there_is_refused(many: Path, prompt: int, said: str) -> None:
    done = run("view", many, "--prompt", prompt, "--counterfactual")
    assert done.exit_code == 2, done.output
    assert said in " ".join(done.stderr.split())
