"""Descriptions from a file: every format, and what is wrong with a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tracer.errors import JobError
from tracer.meaning import descriptions
from tracer.store.schemas import DESCRIPTIONS

ROWS: list[dict[str, Any]] = [
    {"layer": 3, "neuron": 14, "polarity": 1, "description": "says Texas", "score": 0.5, "source": "us"},
    {"layer": 1, "neuron": 2, "polarity": None, "description": "city, of\na state", "score": None, "source": None},
]


def written(folder: Path, name: str) -> Path:
    path = folder / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif name.endswith(".csv"):
        path.write_text(
            'layer,neuron,polarity,description,score,source\n3,14,+,says Texas,0.5,us\n1,2,,"city, of\na state",,\n'
        )
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.jsonl"])
def test_every_format_is_the_same_table(tmp_path: Path, name: str) -> None:
    table = descriptions.read(written(tmp_path, name))
    assert table.schema == DESCRIPTIONS
    assert table.to_pylist() == [
        {"layer": 1, "neuron": 2, "polarity": 1, "description": "city, of\na state", "score": None, "source": name},
        {"layer": 1, "neuron": 2, "polarity": -1, "description": "city, of\na state", "score": None, "source": name},
        {"layer": 3, "neuron": 14, "polarity": 1, "description": "says Texas", "score": 0.5, "source": "us"},
    ]
    assert descriptions.by_neuron(table)[descriptions.Key(3, 14, 1)] == "says Texas"


def test_without_a_polarity_a_description_is_of_both_signs(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("layer,neuron,description,notes\n0,5,plural,x\n")
    table = descriptions.read(tmp_path / "a.csv", size=(1, 6))
    assert table.column("polarity").to_pylist() == [1, -1]


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ({"layer": "x", "neuron": 1, "description": "a"}, "layer 'x' is not a whole number"),
        ({"layer": 1.5, "neuron": 1, "description": "a"}, "layer 1.5 is not a whole number"),
        ({"layer": True, "neuron": 1, "description": "a"}, "layer True is not a whole number"),
        ({"layer": 4, "neuron": 1, "description": "a"}, "layer 4 is not one of 0 to 3"),
        ({"layer": 0, "neuron": -1, "description": "a"}, "neuron -1 is not one of 0 to 47"),
        ({"layer": 0, "neuron": 1, "description": " "}, "has no description"),
        ({"layer": 0, "neuron": 1, "description": 7}, "description 7 is not text"),
        ({"layer": 0, "neuron": 1, "description": "\ud800"}, "is not text"),
        ({"layer": 0, "neuron": 1, "description": "a" * 10_001}, "at most 10,000 are kept"),
        ({"layer": 0, "neuron": 1, "polarity": 0, "description": "a"}, "polarity 0 is not 1, -1 or both"),
        ({"layer": 0, "neuron": 1, "description": "a", "score": 3}, "score 3 is not a correlation"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, row: dict[str, Any], rule: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"layer": 0, "neuron": 0, "description": "fine"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(JobError, match=r"line 2 of 'a\.jsonl'") as caught:
        descriptions.read(path, size=(4, 48))
    assert rule in caught.value.rule


def test_a_neuron_described_twice_and_more_wrong_rows_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("layer,neuron,description\n0,5,one\n0,5,two\n0,x,three\n")
    with pytest.raises(JobError) as caught:
        descriptions.read(tmp_path / "a.csv")
    assert caught.value.rule == "L0 N5 is described already in line 2 of 'a.csv' (1 more rows are wrong)"


def test_a_file_without_the_columns_and_one_without_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("layer,unit,text\n0,5,one\n")
    with pytest.raises(JobError, match="has no column 'neuron', 'description'"):
        descriptions.read(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("layer,neuron,description\n")
    with pytest.raises(JobError, match="holds no description"):
        descriptions.read(tmp_path / "b.csv")
    with pytest.raises(JobError, match="names no file"):
        descriptions.read(tmp_path / "c.csv")
