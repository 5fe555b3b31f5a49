"""The verb swap: what it prints is what the library measures, and one line for what cannot be."""

from __future__ import annotations

import csv
import functools
import io
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import tracer
from tracer.cli.app import app
from tracer.data import tasks
from tracer.data.tasks import sva
from tracer.evaluation.swap import Swap
from tracer.prompts import Prompt

CITY = "the capital of the state containing {} is"
TASK = ("--task", "capitals", "--count", "5", "--ks", "5,50")


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["swap", *words])


def done(*words: str) -> str:
    result = run(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


@functools.cache
def demo() -> tracer.Model:
    return tracer.load("demo")


@functools.cache
def wanted() -> Swap:
    pairs = tasks.load("capitals", split="test", count=5, vocabulary=demo())
    return tracer.swap(demo(), [pair.to_prompt() for pair in pairs], (5, 50))


def test_csv_and_json_are_the_librarys_numbers() -> None:
    rows = list(csv.DictReader(io.StringIO(done(*TASK, "--format", "csv"))))
    assert [(row["k"], row["done"]) for row in rows] == [
        (k, name) for k in ("5", "50") for name in ("swapped", "random", "zeroed")
    ]
    for row in rows:
        arm, at = wanted().arms[row["done"]], (5, 50).index(int(row["k"]))
        for name, share in (("becomes", arm.becomes), ("stays", arm.stays)):
            for end, values in (("", share.estimate), ("_low", share.low), ("_high", share.high)):
                assert float(row[name + end]) == float(values[at])
    found = json.loads(done(*TASK, "--format", "json"))
    assert found["rows"] == [
        {key: value if key == "done" else json.loads(value) for key, value in row.items()} for row in rows
    ]
    assert [pair["swapped"][1] for pair in found["pairs"]] == [pair["foil"] for pair in found["pairs"]]
    assert found["answered"] == 1.0


def test_the_table_shows_shares_with_intervals_beside_the_controls() -> None:
    text = " ".join(done(*TASK).split())
    share = wanted().swapped.becomes
    assert f"{float(share.estimate[1]):.2f} [{float(share.low[1]):.2f}, {float(share.high[1]):.2f}]" in text
    for part in ("as many random nodes", "own nodes, to 0", "100% of 5 pairs"):
        assert part in text


def test_two_prompts_show_their_answers_and_default_to_the_models_own() -> None:
    given = (CITY.format("Dallas"), CITY.format("Miami"), "--ks", "50")
    text = done(*given)
    assert "␣Tallahassee" in text
    assert "␣Austin" in text
    assert "answers both prompts as wanted" in text
    assert done(*given, "--target", " Austin", "--foil", " Tallahassee") == text
    found = json.loads(done(*given, "--format", "json"))
    prompt = Prompt(given[0], target=" Austin", foil=" Tallahassee", counterfactual=given[1])
    assert found["pairs"][0]["swapped"] == [" Tallahassee"]
    assert float(tracer.swap(demo(), [prompt], (50,)).swapped.becomes.estimate[0]) == 1.0


def test_pairs_of_ones_own_and_a_filter(tmp_path: Path) -> None:
    pairs = tasks.load("capitals", split="test", count=4, vocabulary=demo())
    file = sva.write(pairs, tmp_path / "pairs.jsonl")
    result = run("--pairs", str(file), "--ks", "20", "--filter", "correct", "--format", "json")
    assert result.exit_code == 0, result.output
    assert "4 of 4 prompts kept" in result.stderr
    assert [pair["text"] for pair in json.loads(result.stdout)["pairs"]] == [pair.prompt for pair in pairs]
    result = run("--task", "states", "--count", "3", "--filter", "correct", "--ks", "5")
    assert result.exit_code == 2
    assert "keeps no prompt" in result.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "--task states"),
        (("a",), "one prompt"),
        (("a", "b", "--task", "states"), "two sources"),
        (("--task", "states", "--pairs", "x"), "two sources"),
        (("--target", " x", "--task", "states"), "two sources"),
        (("a", "b", "--count", "3"), "--count"),
        (("a", "b", "--filter", "correct"), "--filter"),
        (("--pairs", "x", "--split", "test"), "--split"),
        (("--task", "cities"), "--task cities: must be one of"),
        (("--task", "states", "--count", "100000"), "use at most"),
        (("--task", "opposites"), "structure"),
        (("--task", "capitals", "--ks", "many"), "--ks"),
        (("--task", "capitals", "--ks", "50,5"), "--ks"),
        (("--task", "capitals", "--count", "3", "--filter", "right"), "one of correct, preferred"),
        (("--task", "capitals", "--count", "3", "--baseline", "mean"), "one of zero, counterfactual"),
        ((CITY.format("Dallas"), CITY.format("Houston"), "--ks", "5"), "answer to both"),
        ((CITY.format("Dallas"), "the capital", "--ks", "5"), "equally long"),
    ],
)
def test_what_cannot_be_is_one_line_with_code_2(words: tuple[str, ...], expected: str) -> None:
    result = run(*words)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert expected in result.stderr
    assert result.stdout == ""
