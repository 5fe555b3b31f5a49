"""The verb sweep: what it prints and saves is what the library measures, within 80 columns."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

import tracer
from inline import InlinePool
from parsed import Page as Parsed
from tracer.cli.app import app
from tracer.cli.sweeping import FILES
from tracer.evaluation.sweep import Sweep
from tracer.prompts import Prompt
from tracer.reports import sweeps
from tracer.reports.page import Page, Section
from tracer.reports.verdict import Verdict

GROUPS = {
    "format": "tracer-supernodes",
    "version": 1,
    "groups": [
        {"name": "<b>plural</b> nouns of a long name", "nodes": [{"layer": 0, "position": 2, "neuron": 5}]},
        {"name": "verbs", "nodes": [{"layer": 1, "position": -1, "neuron": 7}]},
    ],
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A circuit of one prompt, and a run with a file of supernodes."""
    home = tmp_path_factory.mktemp("sweep")
    prompt = Prompt("The secretaries near the car", target=" are", foil=" is")
    tracer.trace(tracer.load("demo"), prompt, nodes=20, edges=False).save(home / "one")
    job = {"kind": "dataset", "input": {"task": "sva", "structure": "nounpp", "count": 4}, "nodes": 10, "edges": False}
    tracer.run(job | {"circuit": "aligned", "baseline": "counterfactual"}, home / "many", pool=InlinePool())
    (home / "groups.json").write_text(json.dumps(GROUPS))
    return home / "one", home / "many"


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["sweep", *map(str, words)])


def done(*words: object) -> str:
    result = run(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_rows_and_files_are_the_librarys_numbers(places: tuple[Path, Path], tmp_path: Path) -> None:
    one, many = places
    how = ("--factor", "-1", "--factor", "0", "--token", " was", "--random", "2", "--seed", "1")
    given = (many, "--groups", one.parent / "groups.json", *how, "--count", "3", "--out", tmp_path / "out")
    rows = list(csv.DictReader(io.StringIO(done(*given, "--format", "csv"))))
    found = Sweep(*(pq.read_table(tmp_path / "out" / name) for name in FILES[:2]))
    assert set(found.tokens["prompt_id"].to_pylist()) == {0, 1, 2}
    wanted = sweeps.rows(found.responses(1))
    assert [(row["group"], row["factor"], row["token"]) for row in rows] == [
        (row["group"], str(row["factor"]), row["token"]) for row in wanted
    ]
    for row, other in zip(rows, wanted, strict=True):
        for name in ("before", "after", "change", "change_low", "control", "changed", "kl"):
            assert float(row[name]) == other[name]
    content = json.loads((tmp_path / "out" / "steering.json").read_text())
    assert content["tokens"] == wanted
    assert len(content["groups"]) == 3 * 2 * 3
    assert (tmp_path / "out" / "steering.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(FILES)


def test_a_circuits_own_prompt_and_a_file_of_prompts(places: tuple[Path, Path], tmp_path: Path) -> None:
    one, _ = places
    found = csv.DictReader(io.StringIO(done(one, "--factor", "0", "--format", "csv")))
    (row,) = (row for row in found if row["role"] == "foil")
    assert (row["group"], row["token"], row["n_prompts"], row["change_low"]) == ("whole circuit", " is", "1", "")
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"text": text, "target": " are"}) + "\n" for text in ("The keys", "The cars")))
    words = (one, "--prompts", path, "--everywhere", "--factor", "2", "--random", "0", "--format", "json")
    (found,) = (row for row in json.loads(done(*words))["tokens"] if row["role"] == "target")
    assert (found["n_prompts"], found["control"]) == (2, None)
    (tmp_path / "prompts.txt").write_text("The keys\nThe cars\nThe dogs\n")
    words = (one, "--prompts", tmp_path / "prompts.txt", "--everywhere", "--count", "2", "--format", "json")
    assert {row["n_prompts"] for row in json.loads(done(*words))["tokens"]} == {2}


def test_the_table_fits_in_80_columns_and_the_page_is_whole(places: tuple[Path, Path], tmp_path: Path) -> None:
    one, many = places
    out = done(many, "--groups", one.parent / "groups.json", "--out", tmp_path)
    assert "whole circuit" in out
    found = Sweep(*(pq.read_table(tmp_path / name) for name in FILES[:2]))
    shown, kept = found.responses(), found.group_responses()
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(sweeps.table(shown, kept))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert all(f"{float(row.change.estimate):+.3f}" in "\n".join(lines) for row in shown)
    blocks = tuple(sweeps.blocks(shown, kept))
    text = Page("k", "t", "s", Verdict("a", "b", "open"), (), (), (Section("steering", "Steering", blocks),)).html()
    parsed = Parsed(text)
    assert "<b>plural" not in text
    assert "&lt;b&gt;plural" in text
    assert len(parsed.tables["steering"]) == len(shown)
    assert [block.kind for block in sweeps.blocks([], [])] == ["missing"]


def test_what_cannot_be_is_one_line(places: tuple[Path, Path], tmp_path: Path) -> None:
    many = places[1]
    (tmp_path / "short.txt").write_text("The key\n")
    for words, parts in (
        ((many, "--factor", "nan"), ("--factor nan", "finite")),
        ((many, "--factor", "0", "--factor", "0"), ("--factor", "once")),
        ((many, "--group", "x"), ("'x'", "'whole circuit'")),
        ((many, "--token", " several words"), ("one is needed",)),
        ((many, "--prompts", tmp_path / "short.txt"), ("position", "--everywhere")),
        ((many, "--prompts", tmp_path / "none.txt"), ("--prompts", "cannot be read")),
        ((many, "--groups", tmp_path / "short.txt"), ("is not JSON",)),
        ((tmp_path,), ("no run",)),
    ):
        result = run(*words)
        assert result.exit_code == 2, result.output
        for part in parts:
            assert part in result.stderr, (words, result.stderr)
        assert "Traceback" not in result.stderr


def test_steer_draws_texts() -> None:
    words = [
        "steer",
        "The secretaries near the car",
        "--factor",
        "-1",
        "--top",
        "5",
        "--samples",
        "2",
        "--top-p",
        "0.9",
    ]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "drawn at temperature 1, top_p 0.9, seed 0" in result.stdout
    assert result.stdout.count("unsteered") == result.stdout.count("random nodes  ") - 1 == 3
    bad = CliRunner().invoke(app, [*words, "--temperature", "0"])
    assert "--temperature 0: is greedy" in bad.stderr
