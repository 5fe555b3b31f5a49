"""Concept scores of a run: from hand-made tables, and from the demo's agreement prompts, by Python, shell and job."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.fs import LocalFileSystem
from scipy.stats import false_discovery_control
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

import tracer
from helpers import refused
from inline import InlinePool
from parsed import Page as Parsed
from tracer.cli.app import app
from tracer.errors import JobError, RunError
from tracer.meaning.concepts import RATE, Concepts, scored, tokens_of, write
from tracer.meaning.labels import Asked, Labelled, asked_of, questions_of
from tracer.meaning.separation import Design, Labels, halved
from tracer.reports import concepts as reports
from tracer.reports.page import Page, Section
from tracer.reports.verdict import Verdict
from tracer.runs.jobs import load_job
from tracer.store.parquet import encoded
from tracer.store.run_folder import RunFolder
from tracer.store.schemas import CONCEPTS, NODES, PROMPTS, TOKENS

FAST = Design(candidates=10, permutations=999)
SVA = {"task": "sva", "structure": "simple", "count": 32}
JOB: dict[str, Any] = {"kind": "dataset", "input": SVA, "nodes": 60, "edges": False, "shard_size": 16}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tracer.Run:
    """Agreement prompts whose label `case` is the number of the subject, with concept scores."""
    place = tmp_path_factory.mktemp("concepts") / "run"
    return tracer.run(JOB | {"concepts": {"labels": ["case"], "permutations": 999}}, place, pool=InlinePool())


# --------------------------------------------------------------------------------------------- hand-made tables


def made(place: Path, prompts: list[dict[str, Any]], nodes: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Table files of prompts and nodes, two shards of each."""
    files: tuple[list[str], list[str]] = ([], [])
    half = len(prompts) // 2
    for shard, keep in enumerate((range(half), range(half, len(prompts)))):
        for name, schema, rows, paths in zip(
            ("prompts", "nodes"), (PROMPTS, NODES), (prompts, nodes), files, strict=True
        ):
            path = place / f"{name}-{shard}.parquet"
            path.write_bytes(encoded(pa.Table.from_pylist([r for r in rows if r["prompt_id"] in keep], schema)))
            paths.append(str(path))
    return files


def prompt(number: int, **labels: str) -> dict[str, Any]:
    return {"prompt_id": number, "token_ids": [number], "status": "ok", "labels": list(labels.items())}


def node(number: int, layer: int, neuron: int, activation: float, attribution: float, at: int = 0) -> dict[str, Any]:
    place = {"prompt_id": number, "kind": "neuron", "layer": layer, "neuron": neuron, "position": at}
    return place | {"activation": activation, "attribution": attribution}


def drawn(count: int = 48, seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Prompts of two kinds in three colours, with nodes at several positions and of both signs; neuron 1/7 with a
    negative value is planted: it is there for `kind` b alone."""
    rng = np.random.default_rng(seed)
    prompts = [prompt(i, kind="ab"[i % 2], colour=("red", "green", "blue")[i % 3]) for i in range(count)]
    nodes = []
    for i in range(count):
        for at in range(3):
            for neuron in rng.choice(6, 3, replace=False).tolist():
                nodes.append(node(i, int(rng.integers(2)), neuron, float(rng.normal()), float(rng.integers(-2, 3)), at))
        nodes.append({**node(i, -1, -1, 1.0, 9.0), "kind": "embedding"})
        if i % 2:
            nodes.append(node(i, 1, 7, -1.0, 1 + float(rng.random())))
    return prompts, nodes


def summed(nodes: list[dict[str, Any]]) -> dict[tuple[int, int, int], dict[int, float]]:
    """By neuron and sign, each prompt's sum: as the method says it, row by row."""
    found: dict[tuple[int, int, int], dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for row in nodes:
        if row["kind"] == "neuron":
            sign = 1 if row["activation"] >= 0 else -1
            found[row["layer"], row["neuron"], sign][row["prompt_id"]] += row["attribution"]
    return found


def test_scores_are_those_of_attributions_summed_by_neuron_and_sign(tmp_path: Path) -> None:
    prompts, nodes = drawn()
    found = scored(*made(tmp_path, prompts, nodes), LocalFileSystem(), Asked(("kind", "colour"), design=FAST))
    truth = summed(nodes)
    assert {(one.label, one.value, one.against) for one in found.concepts} == {
        ("kind", "b", "a"),
        *(("colour", value, None) for value in ("red", "green", "blue")),
    }
    for row in found.table.to_pylist():
        given = np.array([dict(one["labels"])[row["label"]] for one in prompts])
        codes = np.unique(given, return_inverse=True)[1]
        here = halved(Labels(codes, ()), 0)
        values = truth[row["layer"], row["neuron"], row["polarity"]]
        dense = np.array([values.get(i, 0.0) for i in range(48)])
        yes = given == row["value"]
        assert row["auroc_chosen_on"] == pytest.approx(roc_auc_score(yes[here], dense[here]))
        assert row["auroc"] == pytest.approx(roc_auc_score(yes[~here], dense[~here]))
        assert row["low"] <= row["auroc"] <= row["high"]
        assert (row["n_positive"], row["n_negative"]) == (int(yes[~here].sum()), int((~yes)[~here].sum()))
    assert found.concepts[0].n_columns == len(truth)
    for label in ("kind", "colour"):
        rows = [row for row in found.table.to_pylist() if row["label"] == label]
        np.testing.assert_allclose([row["q"] for row in rows], false_discovery_control([row["p"] for row in rows]))


def test_a_planted_neuron_is_found_and_the_noise_is_not(tmp_path: Path) -> None:
    asked = Asked(("kind", "colour"), design=FAST)
    found = scored(*made(tmp_path, *drawn()), LocalFileSystem(), asked)
    ((row,), *others) = [found.found("kind", "b"), *(found.found("colour", one) for one in ("red", "green", "blue"))]
    assert (row["layer"], row["neuron"], row["polarity"], row["auroc"]) == (1, 7, -1, 1.0)
    assert others == [[], [], []]
    assert "kind=b: 1" in repr(found)
    assert len(repr(found)) < 200
    assert scored(*made(tmp_path, *drawn()), LocalFileSystem(), asked).table.equals(found.table)


def test_a_neuron_of_both_signs_in_one_prompt_is_two_columns_there(tmp_path: Path) -> None:
    prompts = [prompt(i, kind="ab"[i % 2]) for i in range(16)]
    nodes = []
    for i in range(16):  # together they cancel; apart each tells the kinds
        nodes += [node(i, 0, 3, 2.0, 1.0 + i % 2, 0), node(i, 0, 3, -2.0, -1.0 - i % 2, 1)]
    found = scored(*made(tmp_path, prompts, nodes), LocalFileSystem(), Asked(("kind",), design=FAST))
    rows = {row["polarity"]: row["auroc"] for row in found.table.to_pylist()}
    assert rows == {1: 1.0, -1: 0.0}


def test_prompts_without_a_result_or_a_label_do_not_count(tmp_path: Path) -> None:
    prompts, nodes = drawn()
    prompts[3] |= {"status": "failed"}
    prompts[5] |= {"labels": [("colour", "red")]}
    found = scored(*made(tmp_path, prompts, [one for one in nodes if one["prompt_id"] != 3]), LocalFileSystem(),
                   Asked(("kind",), design=FAST))  # fmt: skip
    assert found.concepts[0].n_prompts == 46
    assert found.left_out == ("1 prompts have no label 'kind'",)


def test_the_same_prompt_is_never_in_both_halves(tmp_path: Path) -> None:
    labels = [{"kind": "ab"[i % 2]} for i in range(60)]
    same = Labelled([i // 6 * 2 + i % 2 for i in range(60)], labels)
    ((one,), _) = questions_of(same, Asked(("kind",)))
    here = halved(one.rest, 0)
    for unit in set(one.rest.units.tolist()):
        assert len(set(here[one.rest.units == unit].tolist())) == 1
    assert len(set(one.rest.units.tolist())) == 20


def test_numbers_are_in_their_order_and_rare_values_left_out() -> None:
    given = ["2"] * 9 + ["10"] * 9 + ["9"] * 9 + ["7"] * 3
    ((one,), said) = questions_of(Labelled(range(30), [{"n": value} for value in given]), Asked(("n",)))
    assert one.values == ("2", "9", "10")
    assert one.against is None
    assert said == ["value '7' of label 'n' has 3 prompts, and 27 have another; at least 4 of either are needed"]


@pytest.mark.parametrize(
    ("labels", "asked", "parts"),
    [
        ([{"a": "x"}, {"b": "y"}], {"label": "c"}, ["label 'c'", "'a', 'b'"]),
        ([{}] * 9, {"label": "c"}, ["label 'c'", "labels:"]),
        ([{"a": "x"}] * 9, {"label": "a"}, ["one value, 'x'", "9 prompts"]),
        ([{"a": "x"}] * 9 + [{"a": "y"}] * 3, {"label": "a"}, ["label 'a'", "'x' 9", "'y' 3", "4 prompts"]),
        ([{"a": "x"}] * 9 + [{"a": "y"}] * 9, {"label": "a", "values": "z"}, ["value 'z'", "'x', 'y'"]),
        (
            [{"a": v} for v in "xxxxxyyyyyzz"],
            {"label": "a", "values": ["x", "z"]},
            ["value 'z' of label 'a'", "2 prompts", "at least 4"],
        ),
        ([{"a": "x"}] * 9 + [{"a": "y"}] * 9, {"label": "a", "group": "g"}, ["group 'g'", "'a'"]),
        (
            [{"a": v, "g": v} for v in "xxxxxyyyyy"],
            {"label": "a", "group": "g"},
            ["label 'a'", "no value that can be told"],
        ),
    ],
)
def test_what_cannot_be_scored_is_refused(
    labels: list[dict[str, str]], asked: dict[str, Any], parts: list[str]
) -> None:
    how = {"values": None, "group": None, "candidates": 5, "permutations": 99, "seed": 0} | asked
    with refused(JobError, *parts):
        questions_of(Labelled(range(len(labels)), labels), asked_of(**how))
    assert questions_of(Labelled(range(len(labels)), labels), asked_of(**how), strict=False)[1]


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        ({"label": ["a", "b"], "values": ["x"]}, "one label"),
        ({"label": ["a", "a"]}, "each once"),
        ({"label": "a", "group": "a"}, "not the group"),
        ({"label": "a", "candidates": 0}, "candidates=0"),
        ({"label": "a", "permutations": 20}, "99 or more"),
    ],
)
def test_settings_that_find_nothing_are_refused(asked: dict[str, Any], part: str) -> None:
    how = {"values": None, "group": None, "candidates": 5, "permutations": 99, "seed": 0} | asked
    with refused(JobError, part):
        asked_of(**how)


# --------------------------------------------------------------------------------------------------- of a run


def test_neurons_of_number_are_found_in_agreement_prompts(run: tracer.Run) -> None:
    found = tracer.concepts(run, "case", values="plural", permutations=999)
    assert isinstance(found, Concepts)
    assert found.concepts[0].against == "singular"
    rows = found.found("case", "plural")
    assert len(rows) >= 20
    assert rows[0]["auroc"] in (0.0, 1.0)
    record = json.loads(json.dumps(found.record()))
    assert record["rows"] == found.table.to_pylist()
    assert record["concepts"][0]["n_found"] == len(rows)


def test_a_job_writes_what_the_call_finds_and_a_query_sees_it(run: tracer.Run) -> None:
    table = run.table("concepts")
    assert table.schema.equals(CONCEPTS)
    assert table.equals(tracer.concepts(run.address, "case", permutations=999).table)
    assert run.folder.check_outputs() == []


def test_a_run_that_is_resumed_ends_with_the_same_scores(run: tracer.Run) -> None:
    place = Path(run.address)
    before = (place / "concepts.parquet").read_bytes()
    (place / "concepts.parquet").unlink()
    again = tracer.run(run.job, place, pool=InlinePool())
    assert again.resumed == 2
    assert (place / "concepts.parquet").read_bytes() == before


def test_a_label_that_no_prompt_has_stops_a_run_before_it_begins(tmp_path: Path) -> None:
    with refused(JobError, "label 'colour'", "'case'", "'number'", "'structure'"):
        tracer.run(JOB | {"concepts": {"labels": ["colour"]}}, tmp_path / "run", pool=InlinePool())
    assert not (tmp_path / "run" / "run.json").exists()
    with refused(JobError, "label 'structure'", "one value, 'simple'"):
        tracer.run(JOB | {"concepts": {"labels": ["structure"]}}, tmp_path / "run", pool=InlinePool())


@pytest.mark.parametrize(
    ("concepts", "part"),
    [
        ({"labels": []}, "at least one"),
        ({"labels": ["topic", "source"], "values": ["x"]}, "values are of one label"),
        ({"labels": ["topic"], "group": "topic"}, "another label"),
        ({"labels": ["other"]}, "'other'"),
        ({"labels": ["topic"], "group": "other"}, "'other'"),
        ({"labels": ["topic"], "permutations": 10}, "99"),
        ({"labels": ["topic"], "shuffles": 10}, "shuffles"),
    ],
)
def test_a_jobs_concepts_are_checked(concepts: dict[str, Any], part: str) -> None:
    given = {"kind": "dataset", "input": {"path": "x.jsonl", "labels": ["topic", "source"]}}
    with refused(JobError, part):
        load_job(given | {"concepts": concepts})


def test_runs_from_before_concepts_go_on() -> None:
    job = load_job({"kind": "dataset", "input": {"path": "x.jsonl", "labels": ["topic"]}})
    assert "concepts" not in job.numbers()
    assert load_job(job, ["concepts={labels: topic}"]).numbers()["concepts"]["labels"] == ["topic"]


# ------------------------------------------------------------------------------------------- what people read


def test_the_verb_shows_saves_and_draws(run: tracer.Run, tmp_path: Path) -> None:
    given = ["concepts", run.address, "--label", "case", "--value", "plural", "--permutations", "999", "--rows", "3"]
    done = CliRunner().invoke(app, [*given, "--figure", str(tmp_path / "a.png")])
    assert done.exit_code == 0, done.output
    assert "case = plural: 3 of 50 candidates" in done.output
    assert "wrote concepts.parquet" in done.output
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert run.folder.check_outputs() == []
    assert set(run.table("concepts")["value"].to_pylist()) == {"plural"}
    out = str(tmp_path / "c.parquet")
    listed = json.loads(CliRunner().invoke(app, [*given, "--format", "json", "--out", out]).stdout)
    rows = list(csv.DictReader(io.StringIO(CliRunner().invoke(app, [*given, "--format", "csv", "--out", out]).stdout)))
    assert [float(row["auroc"]) for row in rows] == [row["auroc"] for row in listed["rows"]]
    assert pq.read_table(out).num_rows == len(rows) == 50
    wrong = CliRunner().invoke(app, ["concepts", run.address, "--label", "case", "--value", "dual"])
    assert wrong.exit_code == 2
    assert "use one of 'plural', 'singular'" in wrong.output
    assert "--candidates" in CliRunner().invoke(app, [*given, "--candidates", "0"]).output


def test_a_run_that_has_not_ended_keeps_no_scores(run: tracer.Run, tmp_path: Path) -> None:
    found = tracer.concepts(run, "case", permutations=99)
    mark = Path(run.address) / "_SUCCESS.json"
    content = mark.read_bytes()
    mark.unlink()
    assert not write(run, found)
    mark.write_bytes(content)
    assert write(run, found)
    with refused(RunError, "no run"):
        tracer.concepts(tmp_path, "case")


def hostile() -> pa.Table:
    """A value of a label, and tokens, that would be markup and commands of a terminal."""
    row: dict[str, Any] = {"layer": 0, "neuron": 1, "polarity": 1, "label": "<b>", "value": "\x1b[2J[red]$x$"}
    numbers = {"auroc": 1.0, "auroc_chosen_on": 0.9, "low": 0.8, "high": 1.0, "p": 0.001, "q": 0.002}
    return pa.Table.from_pylist([row | numbers | {"n_positive": 5, "n_negative": 6}], CONCEPTS)


def page_of(table: pa.Table, tokens: pa.Table | None = None) -> str:
    section = Section("concepts", "Concepts", reports.blocks(table, tokens))
    return Page("", "", "", Verdict("", "", ""), (), (), (section,)).html()


def test_a_report_says_scores_with_promoted_tokens_and_text_stays_text() -> None:
    known = {"layer": 0, "neuron": 1, "polarity": 1, "promoted": [" <script>", "b"]}
    text = page_of(hostile(), pa.Table.from_pylist([known], TOKENS))
    assert "<script>" not in text
    assert "\x1b" not in text
    page = Parsed(text)
    assert page.tables["concepts"][0][:2] == ["<b>", "\\x1b[2J[red]$x$"]
    assert page.tables["concept-0"][0][-1] == "␣<script> b"
    assert "+" in page.tables["concept-0"][0]


def test_a_report_of_no_scores_says_so() -> None:
    assert "could be told" in page_of(CONCEPTS.empty_table())


def test_tokens_of_a_run_are_shown_where_it_has_them(run: tracer.Run) -> None:
    assert tokens_of(run) is None
    first = tracer.concepts(run, "case", permutations=99).table.to_pylist()[0]
    known = {name: first[name] for name in ("layer", "neuron", "polarity")} | {"promoted": [" cats"]}
    folder = RunFolder(run.address)
    folder.write_table("tokens.parquet", pa.Table.from_pylist([known], TOKENS))
    done = CliRunner().invoke(app, ["concepts", run.address, "--label", "case", "--permutations", "99"])
    folder.place.remove("tokens.parquet")
    assert "promotes" in done.output
    assert "␣cats" in done.output


def test_a_figure_has_a_panel_for_each_value_and_is_the_same_again() -> None:
    rng = np.random.default_rng(0)
    rows = [
        hostile().to_pylist()[0] | {"value": str(value), "layer": layer, "auroc": rng.random()}
        for value in range(7)
        for layer in (0, 3)
    ]
    table = pa.Table.from_pylist(rows, CONCEPTS)
    assert reports.svg(table) == reports.svg(table)
    assert f"first {reports.PANELS} of 7" in page_of(table)
    assert f"q <= {RATE:g}" in page_of(table).replace("&lt;", "<")
