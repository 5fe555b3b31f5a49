"""How verbs print: golden tables at three widths and in a pipe, one option for all of them, and rows that are bounded.

``TRACER_GOLDEN=1 pytest tests/cli/test_formats.py`` writes the golden files again, and fails so that they are read.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from inspect import signature
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from rich.cells import cell_len
from typer.testing import CliRunner

import children
import tracer
from tracer.circuit.circuit import Circuit
from tracer.cli.app import VERBS, app
from tracer.cli.options import Format, Style
from tracer.errors import surface
from tracer.reports import tables
from tracer.reports.parts import Sheet
from tracer.text import tsv_text

GOLDEN = Path(__file__).parent / "golden"
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]\d+)?")
SHOWN = {
    "show": ["show", "RUN", "--rows", "6"],
    "neuron": ["neuron", "1", "324", "--top", "4"],
    "evaluate": ["evaluate", "RUN", "--sizes", "5,50", "--out", "OUT"],
}
WITHOUT = {"view", "export", "report", "submit", "init", "config"}
"""Verbs that print no table."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("formats") / "run"
    prompt = tracer.Prompt("The secretaries near the car", target=" are", foil=" is")
    model = tracer.load("demo")
    tracer.with_tokens(model, tracer.trace(model, prompt, nodes=200)).save(folder)
    return folder


def printed(*words: str, columns: int | None = 80, **environment: str | None) -> str:
    """What a verb prints; without `columns` into a pipe."""
    given = {"TRACER_FORMAT": None if columns is None else "table", "COLUMNS": str(columns or 80)} | environment
    done = CliRunner().invoke(app, list(words), env=given)
    assert done.exit_code == 0, done.output
    return done.stdout


def alike(line: str, golden: str) -> bool:
    """Whether two lines are the same but for the last digits, which differ between processors."""
    if "unexplained" in golden or "embedding attributions" in golden:
        return NUMBER.sub("#", line).split() == NUMBER.sub("#", golden).split()
    one, other = (NUMBER.sub(lambda found: "#" * len(found[0]), text) for text in (line, golden))
    pairs = zip(NUMBER.findall(line), NUMBER.findall(golden), strict=False)
    values = [[float(text.replace(",", "")) for text in pair] for pair in pairs]
    close = all(mine == pytest.approx(its, rel=2e-3, abs=0.02) for mine, its in values)
    return close and (one == other if "\t" not in golden else one.count("\t") == other.count("\t"))


@pytest.mark.parametrize("width", [60, 80, 120, None])
@pytest.mark.parametrize("name", SHOWN)
def test_golden_tables(name: str, width: int | None, run: Path, tmp_path: Path) -> None:
    words = [{"RUN": str(run), "OUT": str(tmp_path)}.get(word, word) for word in SHOWN[name]]
    text = printed(*words, columns=width)
    kept = [line for line in text.splitlines() if not line.startswith("saved ")]
    file = GOLDEN / f"{name}-{width or 'pipe'}.txt"
    if os.environ.get("TRACER_GOLDEN"):
        file.write_text("\n".join(kept) + "\n", encoding="utf-8")
        pytest.fail(f"{file.name} was written: read it")
    wanted = file.read_text(encoding="utf-8").splitlines()
    assert len(kept) == len(wanted)
    for line, golden in zip(kept, wanted, strict=True):
        assert alike(line, golden), (line, golden)
        assert width is None or cell_len(line) <= width


def test_a_pipe_gets_one_plain_table_and_standard_error_the_rest(run: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRACER_FORMAT"}
    command = [sys.executable, "-m", "tracer", "show", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    head, *rows = (line.split("\t") for line in done.stdout.splitlines())
    circuit = Circuit.load(run)
    assert {len(row) for row in rows} == {len(head)}
    assert [row[head.index("neuron")] for row in rows] == [str(one) for one in circuit.nodes["neuron"].to_pylist()]
    assert [float(row[head.index("attribution")]) for row in rows] == circuit.nodes["attribution"].to_pylist()
    assert "conservation: unexplained" in done.stderr
    assert "logit difference ␣are minus ␣is = +6.2822" in done.stderr
    as_csv = list(csv.reader(io.StringIO(printed("show", str(run), "--format", "csv"))))
    assert as_csv == [head, *rows]


def test_a_terminal_gets_tables_in_its_own_width(run: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("TRACER_FORMAT", "COLUMNS")}
    command = [sys.executable, "-m", "tracer", "show", str(run), "--rows", "2"]
    said, code = children.on_terminal(command, environment | {"TERM": "xterm"}, size=(40, 72))
    assert code == 0
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in said.decode().split("\r\n")]
    assert any(line.startswith("Strongest nodes") for line in lines)
    assert 60 < max(map(cell_len, lines)) <= 72


def test_every_verb_that_prints_a_table_has_one_option_for_it() -> None:
    assert list(Format) == ["auto", "table", "tsv", "csv", "json"]
    for verb in VERBS:
        if verb.__name__.rstrip("_") not in WITHOUT:
            assert get_type_hints(verb, include_extras=True)["style"] == Style, verb.__name__
            assert signature(verb).parameters["style"].default is Format.auto, verb.__name__
    for style in ("tsv", "csv"):
        assert CliRunner().invoke(app, ["status", "nowhere", "--format", style]).exit_code == 2


@pytest.mark.parametrize(
    "words",
    [
        ["neuron", "1", "324", "--top", "2"],
        ["steer", "The keys", "--factor", "0", "--top", "2", "--max-new-tokens", "0", "--random", "1"],
        ["evaluate", "RUN", "--sizes", "5", "--out", "OUT"],
        ["show", "RUN", "--rows", "3"],
    ],
)
def test_formats_hold_the_same(words: list[str], run: Path, tmp_path: Path) -> None:
    words = [{"RUN": str(run), "OUT": str(tmp_path)}.get(word, word) for word in words]
    rows = list(csv.reader(io.StringIO(printed(*words, "--format", "csv"))))
    lines = printed(*words, "--format", "tsv").splitlines()
    assert [len(row) for row in rows] == [len(rows[0])] * len(rows)
    assert [re.split("\t", line) for line in lines] == rows
    json.loads(printed(*words, "--format", "json"))


def test_rows_bound_everything_and_say_what_is_left_out(run: Path) -> None:
    circuit = Circuit.load(run)
    with surface("shell"):
        shown = tables.circuit_table(circuit, 2)
    sheets = {part.name: part for part in shown.parts if isinstance(part, Sheet)}
    assert set(sheets) == {"embeddings", "nodes", "edges", "paths"}
    assert {len(sheet.rows) for sheet in sheets.values()} == {2}
    assert (
        sheets["edges"].more == f"{circuit.n_edges - 2:,} more; --rows {circuit.n_edges} shows all {circuit.n_edges:,}"
    )
    assert "--rows" in sheets["paths"].more
    whole = tables.circuit_table(circuit, circuit.n_edges, 1)
    assert [part.more for part in whole.parts if isinstance(part, Sheet)][:3] == [""] * 3
    largest = sorted(circuit.rows("embedding"), key=lambda row: -abs(row["attribution"]))[:2]
    assert {row[0] for row in sheets["embeddings"].rows} == {str(row["position"]) for row in largest}
    assert len(printed("show", str(run), "--format", "tsv", "--rows", "2").splitlines()) == 3


def test_a_field_of_tsv_is_one_field(run: Path) -> None:
    hostile: list[Any] = ["a\tb", "c\nd", "e\\tf", "\x1b[2J", " are", None, 0.1, True, [1, "x\ty"], {"a": "\n"}, "漢"]
    names = [f"n{at}" for at in range(len(hostile))]
    head, line = tsv_text([dict(zip(names, hostile, strict=True))], names).splitlines()
    fields = line.split("\t")
    assert head.split("\t") == names
    assert fields[:7] == ["a\\tb", "c\\nd", "e\\\\tf", "\\x1b[2J", " are", "", "0.1"]
    assert fields[7:] == ["True", '[1, "x\\\\ty"]', '{"a": "\\\\n"}', "漢"]
    assert [field.encode().decode("unicode_escape") for field in fields[:4]] == hostile[:4]
