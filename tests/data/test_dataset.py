"""Datasets: what is written is read back, what is wrong is a row's error or one line, memory stays flat."""

from __future__ import annotations

import csv
import gzip
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import children
from helpers import refused
from tracer import data
from tracer.data import Row, tasks
from tracer.errors import JobError
from tracer.runs.jobs import Source

ROOT = Path(__file__).resolve().parents[2]

# ------------------------------------------------------------------------------------------------- helpers


def source(path: Path | str | list[str], **over: Any) -> Source:
    paths = [str(one) for one in path] if isinstance(path, list) else str(path)
    return Source(path=paths, **over)  # type: ignore[arg-type]


def rows(path: Path | str | list[str], **over: Any) -> list[Row]:
    return list(data.read(source(path, **over)))


def lines(path: Path, *records: Any) -> Path:
    """A JSON-lines file; bytes and text go in as they are."""
    texts = [one if isinstance(one, str | bytes) else json.dumps(one) for one in records]
    parts = [one.encode() if isinstance(one, str) else one for one in texts]
    path.parent.mkdir(parents=True, exist_ok=True)
    content = b"".join(part + b"\n" for part in parts)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def table(path: Path, *records: list[str]) -> Path:
    """A CSV file."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(records)
    return path


def parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def one(path: Path, **over: Any) -> Row:
    (found,) = rows(path, **over)
    return found


# ---------------------------------------------------------------------------------------------- round trips

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
WRITTEN = TEXT.filter(bool)
ID = st.integers(0, 2**31 - 1)
IDS = st.lists(ID, min_size=1, max_size=4).map(tuple)
POSITIONS = st.lists(st.integers(-(2**31) + 1, 2**31 - 1), min_size=1, max_size=3).map(tuple)


Given = list[dict[str, Any]]


def rows_of(text: st.SearchStrategy[str], tokens: st.SearchStrategy[Any]) -> st.SearchStrategy[Given]:
    """Fields of rows without an error; beartype draws random numbers, which no strategy may."""
    fields = st.fixed_dictionaries(
        {
            "prompt": st.one_of(st.tuples(text, st.none()), st.tuples(st.none(), IDS)),
            "user_id": st.none() | text,
            "target": st.none() | tokens,
            "foil": st.none() | tokens,
            "counterfactual": st.none() | text | IDS,
            "positions": st.none() | POSITIONS,
            "labels": st.dictionaries(st.sampled_from(["topic", "kind"]), text, max_size=2),
        }
    )
    return st.lists(fields, min_size=1, max_size=6)


def made(given_: Given) -> list[Row]:
    found = []
    for fields in given_:
        rest = {name: value for name, value in fields.items() if name != "prompt"}
        found.append(Row(text=fields["prompt"][0], token_ids=fields["prompt"][1], **rest))
    return found


def record(row: Row) -> dict[str, Any]:
    """A row as the columns of its source."""
    paired = row.counterfactual
    ids = {
        name: None if value is None else list(value)
        for name, value in (
            ("token_ids", row.token_ids),
            ("target", row.target),
            ("foil", row.foil),
            ("positions", row.positions),
        )
    }
    return {
        **ids,
        "text": row.text,
        "id": row.user_id,
        "counterfactual": paired if isinstance(paired, str) else None,
        "counterfactual_ids": list(paired) if isinstance(paired, tuple) else None,
        "topic": row.labels.get("topic"),
        "kind": row.labels.get("kind"),
    }


MIXED = st.lists(TEXT | ID, min_size=1, max_size=3).map(tuple)
TEXTS = st.lists(TEXT, min_size=1, max_size=3).map(tuple)


@given(rows_of(TEXT, MIXED), st.booleans(), st.booleans())
def test_json_lines_round_trip(tmp_path: Path, fields: Given, packed: bool, escaped: bool) -> None:
    wanted = made(fields)
    name = "a.jsonl.gz" if packed else "a.jsonl"
    path = lines(tmp_path / name, *(json.dumps(record(row), ensure_ascii=escaped) for row in wanted))
    assert rows(path, labels=["topic", "kind"]) == wanted


@given(rows_of(TEXT, TEXTS))
def test_parquet_round_trip_of_texts(tmp_path: Path, fields: Given) -> None:
    wanted = made(fields)
    records = [record(row) for row in wanted]
    schema = pa.schema(
        [(name, pa.string()) for name in ("text", "id", "counterfactual", "topic", "kind")]
        + [(name, pa.list_(pa.int64())) for name in ("token_ids", "counterfactual_ids", "positions")]
        + [(name, pa.list_(pa.string())) for name in ("target", "foil")]
    )
    pq.write_table(pa.Table.from_pylist(records, schema), tmp_path / "a.parquet", row_group_size=2)
    assert rows(tmp_path / "a.parquet", labels=["topic", "kind"]) == wanted


@given(rows_of(TEXT, IDS))
def test_parquet_round_trip_of_ids(tmp_path: Path, fields: Given) -> None:
    wanted = made(fields)
    records = [record(row) for row in wanted]
    schema = pa.schema(
        [(name, pa.large_string()) for name in ("text", "id", "counterfactual", "topic", "kind")]
        + [(n, pa.list_(pa.int32())) for n in ("token_ids", "counterfactual_ids", "positions", "target", "foil")]
    )
    pq.write_table(pa.Table.from_pylist(records, schema), tmp_path / "a.parquet")
    assert rows(tmp_path / "a.parquet", labels=["topic", "kind"]) == wanted


# The csv module of Python 3.11 and 3.12 writes a lone carriage return without quotes where lines end in another way.
CELLS = WRITTEN.filter(lambda text: "\r" not in text)
WRITINGS = [
    lambda ids: " ".join(map(str, ids)),
    lambda ids: ",".join(map(str, ids)),
    lambda ids: f" {list(ids)} ",
    lambda ids: str(list(ids)).replace(",", ""),
]


@given(
    rows_of(CELLS, CELLS.map(lambda text: (text,))),
    st.sampled_from(WRITINGS),
    st.sampled_from(["a.csv", "a.csv.gz"]),
)
def test_csv_round_trip(tmp_path: Path, fields: Given, write: Any, name: str) -> None:
    wanted = made(fields)
    names = list(record(wanted[0]))
    cells = []
    for row in wanted:
        record_ = record(row) | {"target": row.target and row.target[0], "foil": row.foil and row.foil[0]}
        cells.append(["" if (v := record_[n]) is None else write(v) if isinstance(v, list) else v for n in names])
    path = table(tmp_path / name, names, *cells)
    assert rows(path, labels=["topic", "kind"]) == wanted


def test_csv_keeps_cells_as_written(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(
        '\ufefftext,target,foil,id\r\n The dog , are,007,1.50\r\n"a\r\nb ""c"""," is",[1],\r\n\r\n'.encode()
    )
    first, second = rows(path)
    assert first == Row(text=" The dog ", target=(" are",), foil=("007",), user_id="1.50")
    assert second == Row(text='a\r\nb "c"', target=(" is",), foil=("[1]",))


def test_csv_takes_null_words_as_text(tmp_path: Path) -> None:
    words = ["NA", "null", "None", "nan", "True", "1e5", "2020-01-01"]
    assert [row.text for row in rows(table(tmp_path / "a.csv", ["text"], *([word] for word in words)))] == words


# ------------------------------------------------------------------------------------------------- columns


def test_mapped_columns_alone_are_read(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"q": "a b", "answer": " c", "foil": " d", "n": 3, "ok": True, "x": None})
    found = one(path, columns={"text": "q", "target": "answer"}, labels=["n", "ok", "x"])
    assert found == Row(text="a b", target=(" c",), labels={"n": "3", "ok": "true"})


def test_one_column_may_be_several_fields(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"q": "a b"})
    assert one(path, columns={"text": "q", "id": "q"}, labels=["q"]) == Row("a b", "a b", labels={"q": "a b"})


def test_every_field_is_read_by_its_own_name(tmp_path: Path) -> None:
    given_ = {
        "id": 7,
        "token_ids": [1, 2],
        "target": 5,
        "foil": ["x", 6],
        "counterfactual_ids": [1, 3],
        "positions": -1,
    }
    wanted = Row("7", None, (1, 2), (5,), ("x", 6), (1, 3), (-1,))
    assert one(lines(tmp_path / "a.jsonl", given_)) == wanted


@pytest.mark.parametrize("write", ["jsonl", "csv", "parquet"])
def test_a_missing_column_is_refused_before_the_first_row(tmp_path: Path, write: str) -> None:
    path = tmp_path / f"a.{write}"
    {
        "jsonl": lambda: lines(path, {"text": "a", "answer": "b"}),
        "csv": lambda: table(path, ["text", "answer"], ["a", "b"]),
        "parquet": lambda: parquet(path, {"text": ["a"], "answer": ["b"]}),
    }[write]()
    with refused(JobError, "column 'nope'", f"a.{write}", "'text', 'answer'"):
        data.read(source(path, columns={"text": "text", "target": "nope"}))
    with refused(JobError, "column 'topic'", f"a.{write}", "'text', 'answer'"):
        data.read(source(path, labels=["topic"]))
    with refused(JobError, f"a.{write}", "text or token_ids", "'text', 'answer'"):
        data.read(source(path, columns={"target": "answer"}))


@pytest.mark.parametrize("write", ["jsonl", "csv", "parquet"])
def test_no_column_of_a_prompt(tmp_path: Path, write: str) -> None:
    path = tmp_path / f"a.{write}"
    {
        "jsonl": lambda: lines(path, {"question": "a"}),
        "csv": lambda: table(path, ["question"], ["a"]),
        "parquet": lambda: parquet(path, {"question": ["a"]}),
    }[write]()
    with refused(JobError, f"a.{write}", "text or token_ids", "'question'"):
        data.read(source(path))


def test_a_column_that_almost_has_a_fields_name_is_not_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text, target\na, b\n")
    with refused(JobError, "' target'", "target"):
        data.read(source(path))
    assert one(path, columns={"text": "text", "target": " target"}).target == (" b",)
    with refused(JobError, "'Foil'"):
        data.read(source(lines(tmp_path / "a.jsonl", {"text": "a", "Foil": "b"})))


def test_a_column_that_is_there_twice_is_refused_if_it_is_read(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", ["text", "x", "x"], ["a", "1", "2"])
    assert one(path).text == "a"
    with refused(JobError, "column 'x'", "more than once"):
        data.read(source(path, labels=["x"]))


def test_a_key_that_json_lines_have_late_is_found(tmp_path: Path) -> None:
    many = [{"text": "a"}] * 1500
    path = lines(tmp_path / "a.jsonl", *many, {"text": "b", "foil": "c", "answer": " d"})
    assert rows(path)[-1].foil == ("c",)
    assert rows(path, columns={"text": "text", "target": "answer"})[-1].target == (" d",)
    with refused(JobError, "'nope'", "'answer'"):
        data.read(source(path, columns={"text": "text", "target": "nope"}))


@pytest.mark.parametrize("write", ["jsonl", "csv", "parquet"])
def test_files_of_different_columns_are_refused(tmp_path: Path, write: str) -> None:
    for name, columns in (("a", {"text": "x", "target": " y"}), ("b", {"text": "x", "answer": " y"})):
        path = tmp_path / f"{name}.{write}"
        if write == "jsonl":
            lines(path, columns)
        elif write == "csv":
            table(path, list(columns), list(columns.values()))
        else:
            parquet(path, {key: [value] for key, value in columns.items()})
    with refused(JobError, f"b.{write}", f"a.{write}", "'target'"):
        data.read(source(tmp_path))


def test_json_files_may_differ_in_what_is_not_read(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", {"text": "a", "note": 1})
    lines(tmp_path / "b.jsonl", *[{"text": "b"}] * 3, {"text": "c"})
    assert [row.text for row in rows(tmp_path)] == ["a", "b", "b", "b", "c"]


def test_columns_in_another_order_are_the_same(tmp_path: Path) -> None:
    table(tmp_path / "a.csv", ["text", "target"], ["a", " b"])
    table(tmp_path / "b.csv", ["target", "text"], [" d", "c"])
    assert [(row.text, row.target) for row in rows(tmp_path)] == [("a", (" b",)), ("c", (" d",))]


# ------------------------------------------------------------------------------------- ids, numbers, nulls


def written(path: Path, columns: dict[str, list[Any]]) -> Path:
    """The same records in the format that the file's name says; a list goes into a CSV cell as it is printed."""
    names, records = list(columns), list(zip(*columns.values(), strict=True))
    if path.suffix == ".jsonl":
        return lines(path, *(dict(zip(names, record, strict=True)) for record in records))
    if path.suffix == ".csv":
        return table(path, names, *(["" if cell is None else str(cell) for cell in record] for record in records))
    return parquet(path, columns)


@pytest.mark.parametrize("write", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize(
    ("given_", "wanted"), [({"target_ids": [[913]], "foil_ids": [[914, 7]]}, ((913,), (914, 7))),
                           ({"target_ids": [5], "foil_ids": [6]}, ((5,), (6,))),
                           ({"target_ids": [5], "foil": [" is"]}, ((5,), (" is",)))]
)  # fmt: skip
def test_target_ids_and_foil_ids_are_ids_in_every_format(
    tmp_path: Path, write: str, given_: dict[str, Any], wanted: Any
) -> None:
    found = one(written(tmp_path / f"a.{write}", {"text": ["a"], **given_}))
    assert (found.target, found.foil, found.error) == (*wanted, None)
    mapped = {"text": "text", **{name: f"their {name}" for name in given_}}
    theirs = {f"their {name}": value for name, value in given_.items()}
    found = one(written(tmp_path / f"b.{write}", {"text": ["a"], **theirs}), columns=mapped)
    assert (found.target, found.foil, found.error) == (*wanted, None)


@pytest.mark.parametrize(
    ("record_", "message"),
    [
        ({"target": " b", "target_ids": [1]}, "target ' b' and target_ids are both given"),
        ({"target": " b", "foil": " c", "foil_ids": 3}, "foil ' c' and foil_ids are both given"),
        ({"target_ids": "7"}, "target_ids is '7'|target_ids holds '7'"),
        ({"target_ids": [1.5]}, "target_ids holds 1.5"),
        ({"target_ids": []}, "target_ids is an empty list"),
        ({"target_ids": -1}, "target_ids holds -1"),
    ],
)
def test_ids_that_contradict_or_are_none_fail_their_row(tmp_path: Path, record_: dict[str, Any], message: str) -> None:
    found = one(lines(tmp_path / "a.jsonl", {"text": "a"} | record_))
    assert re.search(message, str(found.error)), found.error


def heard(path: Path, **over: Any) -> tuple[list[Row], list[str]]:
    notes: list[str] = []
    return list(data.read(source(path, **over), heard=notes.append)), notes


def test_a_number_is_an_id_text_is_text_and_a_csv_cell_is_text(tmp_path: Path) -> None:
    for write, wanted, said in (("jsonl", 7, "token id"), ("parquet", 7, "token id"), ("csv", "7", "text")):
        found, notes = heard(written(tmp_path / f"a.{write}", {"text": ["a", "b"], "target": [7, 8]}))
        assert found[0].target == (wanted,)
        assert len(notes) == 1, notes
        assert "column 'target' (target)" in notes[0]
        assert said in notes[0]
    for write in ("jsonl", "parquet"):
        found, notes = heard(written(tmp_path / f"b.{write}", {"text": ["a"], "target": ["7"]}))
        assert (found[0].target, notes) == (("7",), [])
    found, notes = heard(
        written(tmp_path / "c.csv", {"text": ["a"], "x": [7]}), columns={"text": "text", "foil_ids": "x"}
    )
    assert (found[0].foil, notes) == ((7,), [])


@pytest.mark.parametrize("write", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("field", ["target", "foil", "target_ids"])
def test_an_empty_cell_of_a_mapped_column_fails_its_row(tmp_path: Path, write: str, field: str) -> None:
    values: list[Any] = [5, None] if field == "target_ids" else [" b", None]
    path = written(tmp_path / f"a.{write}", {"text": ["a", "b"], "t": [" x", " y"], "answer": values})
    more = {"target": "t"} if field == "foil" else {}
    good, bad = rows(path, columns={"text": "text", field: "answer", **more})
    assert good.error is None
    assert f"{field} (column 'answer') is empty" in str(bad.error)


def test_nan_in_a_mapped_column_and_a_missing_key_fail_their_row(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"q": "a", "answer": " b"}, '{"q": "a", "answer": NaN}', {"q": "c"})
    found = rows(path, columns={"text": "q", "target": "answer"})
    assert [row.error is None for row in found] == [True, False, False]
    path = parquet(tmp_path / "b.parquet", {"q": ["a", "b"], "n": pa.array([1.0, float("nan")])})
    found = rows(path, columns={"text": "q", "target": "n"})
    assert found[0].target == (1,)
    assert "is empty" in str(found[1].error)
    either = lines(tmp_path / "c.jsonl", {"q": "a", "t": " b", "i": None}, {"q": "a", "t": None, "i": 4})
    found = rows(either, columns={"text": "q", "target": "t", "target_ids": "i"})
    assert [row.target for row in found] == [(" b",), (4,)]


def test_an_empty_cell_of_a_column_that_was_not_mapped_is_said(tmp_path: Path) -> None:
    found, notes = heard(table(tmp_path / "a.csv", ["text", "target"], ["a", " b"], ["c", ""], ["d", ""]))
    assert [row.error for row in found] == [None] * 3
    assert len(notes) == 1
    assert "the first: line 3 of 'a.csv'" in notes[0]
    assert "own top token" in notes[0]


THEIRS = {
    "answer": "target", "label": "target", "correct": "target", "Gold": "target", "tagret": "target",
    "clean": "text", "prompt": "text", "corrupted": "counterfactual", "patch_prefix": "counterfactual",
    "prompt_ids": "token_ids", "inputIds": "token_ids", "wrong": "foil", "foils": "foil", "Distractor": "foil",
    "target_id": "target_ids", "answer ids": "target_ids", "position": "positions", "cf_ids": "counterfactual_ids",
}  # fmt: skip


@pytest.mark.parametrize("write", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("name", THEIRS)
def test_a_column_that_looks_like_a_field_is_not_passed_over(tmp_path: Path, write: str, name: str) -> None:
    path = written(tmp_path / f"a.{write}", {"text": ["a"], name: ["7"], "note": ["x"]})
    with refused(JobError, f"column {name!r}", f"looks like {THEIRS[name]},", "columns: {", f"{THEIRS[name]}: "):
        data.read(source(path))
    assert one(path, labels=[name]).labels == {name: "7"}
    found, notes = heard(path, columns={"text": "text"})
    assert (found[0].error, notes) == (None, [f"unused columns: {name!r}, 'note'"])


def test_names_that_mean_nothing_of_ours_are_named_as_unused(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "a.jsonl", {"text": "a", "target": " b", "next": 1, "topic": 2, "label": 3, "test": 4, "idx": 5}
    )
    found, notes = heard(path, labels=["topic"])
    assert found[0].target == (" b",)
    assert notes == ["unused columns: 'next', 'label', 'test', 'idx'"], "label: the target has a column already"


@pytest.mark.parametrize(("name", "wanted"), [("question", "text: question"), ("the prompt", "text: 'the prompt'"),
                                              ("Input IDs", "token_ids: 'Input IDs'")])  # fmt: skip
def test_without_a_prompt_the_likely_column_is_suggested(tmp_path: Path, name: str, wanted: str) -> None:
    path = lines(tmp_path / "a.jsonl", {"n": 1, name: "a"})
    if name == "the prompt":
        wanted = "text: COLUMN"  # no name in use, and far from text
    with refused(JobError, "text or token_ids", wanted):
        data.read(source(path))


def test_pairs_of_marks_et_al_are_read_as_they_are(tmp_path: Path) -> None:
    item = {
        "clean_prefix": "The keys",
        "patch_prefix": "The key",
        "clean_answer": " are",
        "patch_answer": " is",
        "case": "plural",
    }
    wanted = Row(text="The keys", target=(" are",), foil=(" is",), counterfactual="The key", labels={"case": "plural"})
    assert one(lines(tmp_path / "simple_train.json", item)) == wanted
    assert one(lines(tmp_path / "b.jsonl", item), columns={"text": "patch_prefix"}) == Row(text="The key")


# ---------------------------------------------------------------------------------------- values of a row

WRONG = [
    ({"text": 3.5}, "text is 3.5, not text"),
    ({"text": True}, "text is True"),
    ({"text": ["a"]}, "text is ['a']"),
    ({"text": "a\ud800"}, "not Unicode text"),
    ({"token_ids": "1 2"}, "token_ids is '1 2'"),
    ({"token_ids": 7}, "token_ids is 7"),
    ({"token_ids": []}, "token_ids is an empty list"),
    ({"token_ids": [1, 2.5]}, "token_ids holds 2.5"),
    ({"token_ids": [1, True]}, "token_ids holds True"),
    ({"token_ids": [1, None]}, "token_ids holds None"),
    ({"token_ids": [1, -2]}, "token_ids holds -2"),
    ({"token_ids": [2**31]}, "token_ids holds 2147483648"),
    ({"token_ids": [1e300]}, "token_ids holds 1e+300"),
    ({"token_ids": [[1]]}, "token_ids holds [1]"),
    ({"text": "a", "target": {"x": 1}}, "target"),
    ({"text": "a", "target": 1.5}, "target holds 1.5"),
    ({"text": "a", "target": []}, "target is an empty list"),
    ({"text": "a", "target": [" b", None]}, "target holds None"),
    ({"text": "a", "foil": False}, "foil holds False"),
    ({"text": "a", "foil": "\udfff"}, "foil"),
    ({"text": "a", "counterfactual": [1]}, "counterfactual is [1], not text"),
    ({"text": "a", "counterfactual": "b", "counterfactual_ids": [1]}, "both given"),
    ({"text": "a", "positions": "1"}, "positions holds '1'"),
    ({"text": "a", "positions": [0.5]}, "positions holds 0.5"),
    ({"text": "a", "positions": 2**31}, "positions"),
    ({"text": "a", "id": [1]}, "id is [1], not a single value"),
    ({"text": "a", "token_ids": [1]}, "both given"),
    ({"text": None}, "neither text nor token_ids"),
    ({}, "neither text nor token_ids"),
]


@pytest.mark.parametrize(("record_", "message"), WRONG)
def test_a_wrong_value_is_the_rows_error(tmp_path: Path, record_: dict[str, Any], message: str) -> None:
    good = {"text": "good"}
    first, wrong, last = rows(lines(tmp_path / "a.jsonl", good, record_, good))
    assert first == last == Row(text="good")
    assert wrong.error is not None
    assert message in wrong.error
    assert "line 2 of 'a.jsonl'" in wrong.error
    wrong.error.encode()


def test_a_wrong_row_keeps_what_is_right(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"id": 5, "text": "a", "target": 1.5, "topic": "x"})
    found = one(path, labels=["topic"])
    assert (found.user_id, found.text, found.target, found.labels) == ("5", "a", None, {"topic": "x"})
    assert "target holds 1.5" in str(data.row_error(found))
    assert "target holds 1.5" in str(data.row_error({"error": found.error}))


def test_labels_become_text(tmp_path: Path) -> None:
    given_ = {"a": 1, "b": 2.5, "c": True, "d": None, "e": "x", "f": float("nan"), "g": [1]}
    path = lines(tmp_path / "a.jsonl", {"text": "t"} | given_)
    found = one(path, labels=list("abcdef"))
    assert found.labels == {"a": "1", "b": "2.5", "c": "true", "e": "x"}
    assert found.error is None
    assert "label 'g' is [1]" in str(one(path, labels=["g"]).error)


def test_ids_of_any_scalar_become_text(tmp_path: Path) -> None:
    given_ = [1, 2.5, True, "x", None]
    path = lines(tmp_path / "a.jsonl", *({"text": "t", "id": value} for value in given_))
    assert [row.user_id for row in rows(path)] == ["1", "2.5", "true", "x", None]


def test_nan_is_nothing(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", '{"text": "a", "target": NaN, "counterfactual": NaN, "token_ids": NaN}')
    assert one(path) == Row(text="a")


BROKEN: list[tuple[str | bytes, str]] = [
    ('{"text": "a"', "is not JSON"),
    ("nonsense", "is not JSON"),
    (b'{"text": "\xff"}', "is not UTF-8 text"),
    ("3", "is not a JSON object"),
    ('["a"]', "is not a JSON object"),
    ('{"text": "a", "text": "b"}', "the key 'text' twice"),
    ("[" * 100_000, "is nested too deeply"),
    ('{"token_ids": [' + "1" * 5000 + "]}", "a whole number of 5000 digits"),
]


@pytest.mark.parametrize(("line", "message"), BROKEN)
def test_a_broken_line_of_json_keeps_its_place(tmp_path: Path, line: str | bytes, message: str) -> None:
    first, wrong, last = rows(lines(tmp_path / "a.jsonl", {"text": "a"}, line, "", {"text": "b"}))
    assert (first.text, last.text) == ("a", "b")
    assert message in str(wrong.error)
    assert "line 2 of 'a.jsonl'" in str(wrong.error)


def test_broken_rows_of_csv_keep_their_place(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'text,target\na, b\nc\nd,e,f\n"g"h,i\n\xff, b\nj,\xfe\nk, l\n')
    found = rows(path)
    assert [row.error is None for row in found] == [True, False, False, False, False, False, True]
    messages = ["has 1 cells", "has 3 cells", "is not CSV", "text '", "target '"]
    for number, (row, message) in enumerate(zip(found[1:-1], messages, strict=True), start=3):
        assert message in str(row.error)
        assert f"line {number} of 'a.csv'" in str(row.error)
    assert found[-1] == Row(text="k", target=(" l",))


def test_csv_lines_are_counted_as_an_editor_does(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,target\n"a\nb", c\nd\n')
    assert "line 4 of 'a.csv'" in str(rows(path)[1].error)


@pytest.mark.parametrize("cell", ["1.5", "1 x", "[1, 2", "1,,2", "[]", "-1", "1e3", "99999999999", "１"])
def test_ids_of_a_csv_cell_are_whole_numbers(tmp_path: Path, cell: str) -> None:
    assert "token_ids" in str(one(table(tmp_path / "a.csv", ["token_ids"], [cell])).error)


def test_a_csv_file_with_an_open_quote_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,target\na, b\n"c, d\ne, f\n')
    with refused(JobError, "line 3", "a.csv", "never closed"):
        list(data.read(source(path)))


# ------------------------------------------------------------------------------------------- Parquet's types


def test_parquet_values_of_many_types(tmp_path: Path) -> None:
    columns = {
        "text": pa.array(["a", "b"]).dictionary_encode(),
        "target": pa.array([5.0, None]),
        "foil": pa.array([[1.0, 2.0], None]),
        "positions": pa.array([0, -1], pa.int8()),
        "counterfactual_ids": pa.array([[1, 2], [3, 4]], pa.list_(pa.uint16(), 2)),
        "id": pa.array([b"x", b"y"]),
        "flag": pa.array([True, None]),
    }
    first, second = rows(parquet(tmp_path / "a.parquet", columns), labels=["flag"])
    assert first == Row("x", "a", None, (5,), (1, 2), (1, 2), (0,), {"flag": "true"})
    assert second == Row("y", "b", None, None, None, (3, 4), (-1,))


def test_undecodable_text_of_parquet_keeps_its_place(tmp_path: Path) -> None:
    buffers = pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffc")
    path = parquet(tmp_path / "a.parquet", {"text": pa.StringArray.from_buffers(3, *buffers)})
    assert [row.text for row in rows(path)] == ["a", None, "c"]
    assert "row 2 of 'a.parquet'" in str(rows(path)[1].error)
    path = parquet(tmp_path / "b.parquet", {"text": pa.array([b"a", b"\xff"])})
    assert "not UTF-8" in str(rows(path)[1].error)


def test_parquet_ids_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"token_ids": pa.array([[1.0, 2.0], [1.5]])})
    good, wrong = rows(path)
    assert good.token_ids == (1, 2)
    assert "token_ids holds 1.5" in str(wrong.error)


# --------------------------------------------------------------------------------------------------- files


def test_folders_and_globs_are_sorted_and_skip_what_is_hidden(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.json", "c.jsonl.gz", ".hidden.jsonl", "_temporary/x.jsonl", "_SUCCESS", "sub/d.ndjson"):
        lines(tmp_path / name, {"text": name})
    everything = ["a.json", "b.jsonl", "c.jsonl.gz", "sub/d.ndjson"]
    assert [row.text for row in rows(tmp_path)] == everything
    assert [row.text for row in rows(f"{tmp_path}/**/*.*json*")] == everything
    assert [row.text for row in rows(f"{tmp_path}/[ab].*")] == everything[:2]
    assert [row.text for row in rows([f"{tmp_path}/sub", f"{tmp_path}/b.jsonl"])] == ["sub/d.ndjson", "b.jsonl"]
    assert one(tmp_path / ".hidden.jsonl").text == ".hidden.jsonl"


def test_relative_paths_and_names_with_glob_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines(tmp_path / "a[1].jsonl", {"text": "x"})
    monkeypatch.chdir(tmp_path)
    assert rows("a[1].jsonl") == rows(".") == rows("*.jsonl") == [Row(text="x")]


def test_files_that_are_not_there_or_not_ours(tmp_path: Path) -> None:
    for path in (tmp_path / "nope.jsonl", f"{tmp_path}/*.csv", tmp_path):
        with refused(JobError, "names no file"):
            data.read(source(path))
    lines(tmp_path / "x" / "a.txt", {"text": "a"})
    with refused(JobError, "a.txt", "no known format", ".jsonl"):
        data.read(source(tmp_path / "x"))
    lines(tmp_path / "y" / "a.jsonl", {"text": "a"})
    table(tmp_path / "y" / "b.csv", ["text"], ["a"])
    with refused(JobError, "b.csv", "a.jsonl"):
        data.read(source(tmp_path / "y"))
    with refused(JobError, "named twice"):
        data.read(source([f"{tmp_path}/y/a.jsonl", f"{tmp_path}/y/*.jsonl"]))
    for wrong in (" ", "a\0b"):
        with refused(JobError, "is not a path"):
            data.read(source(wrong))


def test_addresses_that_cannot_be(tmp_path: Path) -> None:
    for address in ("zz://x/y.jsonl", "hf://datasets/x/y.jsonl", "https://x/y.jsonl"):
        with refused(JobError, address, "s3://"):
            data.read(source(address))
    with refused(JobError, "gs://x", "cannot be read"):
        data.read(source("gs://x/y.jsonl?foo=1"))
    for address in ("s3://me:word@bucket/a.jsonl", "s3://b/a.jsonl?secret_key=word"):
        with pytest.raises(JobError, match="holds a key") as caught:
            data.read(source(address))
        assert "word" not in str(caught.value)
    lines(tmp_path / "a.jsonl", {"text": "a"})
    assert rows(f"file://{tmp_path}/*.jsonl") == [Row(text="a")]


def test_json_arrays_are_refused_with_a_hint(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content in ('[{"text": "a"}]', '\n  [\n{"text": "a"}\n]', '\ufeff[{"text": "a"}]'):
        path.write_text(content, encoding="utf-8")
        with refused(JobError, "a.json", "array", "jq"):
            data.read(source(path))


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b\xe2\x80\xa8c"}')
    assert [row.text for row in rows(path)] == ["a", "b\u2028c"]
    for name in ("b.jsonl", "b.csv"):
        (tmp_path / name).write_bytes("text\na\n".encode("utf-16"))
        with refused(JobError, name, "UTF-16", "UTF-8"):
            data.read(source(tmp_path / name))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    for name, content in (
        ("a.parquet", b"PAR1 nonsense"),
        ("b.parquet", b""),
        ("c.jsonl.gz", b"nonsense"),
        ("d.csv.gz", b"x"),
    ):
        (tmp_path / name).write_bytes(content)
        with refused(JobError, name, "cannot be read"):
            data.read(source(tmp_path / name))
    whole = gzip.compress("".join(json.dumps({"text": str(os.urandom(9))}) + "\n" for _ in range(9999)).encode())
    (tmp_path / "e.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with refused(JobError, "e.jsonl.gz", "cannot be read"):
        list(data.read(source(tmp_path / "e.jsonl.gz")))
    path = parquet(tmp_path / "f.parquet", {"text": [str(os.urandom(9)) for _ in range(9999)]})
    content = bytearray(path.read_bytes())
    content[1000:50_000] = bytes(49_000)
    path.write_bytes(content)
    with refused(JobError, "f.parquet", "cannot be read"):
        list(data.read(source(path)))


def test_sources_without_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n")
    (tmp_path / "b.csv").write_text("")
    table(tmp_path / "c.csv", ["text"])
    parquet(tmp_path / "d.parquet", {"text": pa.array([], pa.string())})
    for name in ("a.jsonl", "b.csv", "c.csv", "d.parquet"):
        with refused(JobError, name, "holds no prompt"):
            data.read(source(tmp_path / name))


def test_an_empty_file_among_others_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    lines(tmp_path / "b.jsonl", {"text": "b"})
    assert rows(tmp_path, columns={"text": "text"}) == [Row(text="b")]


def test_the_smaller_limit_counts(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *({"text": str(i)} for i in range(9)))
    assert len(list(data.read(source(path, limit=3)))) == 3
    assert len(list(data.read(source(path, limit=3), limit=2))) == 2
    assert len(list(data.read(source(path), limit=5))) == 5
    with refused(JobError, "limit=0"):
        data.read(source(path), limit=0)


def test_several_gzip_members_are_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n') + gzip.compress(b'{"text": "b"}\n'))
    assert [row.text for row in rows(path)] == ["a", "b"]


# --------------------------------------------------------------------------------------------------- tasks


def test_task_rows_are_its_pairs() -> None:
    given_ = Source(task="sva", structure="rc", split="test", count=5, seed=3)
    pairs = tasks.load("sva", structure="rc", split="test", count=5, seed=3)
    found = list(data.read(given_))
    assert [(row.text, row.counterfactual) for row in found] == [(pair.prompt, pair.counterfactual) for pair in pairs]
    assert [(row.target, row.foil) for row in found] == [((pair.target,), (pair.foil,)) for pair in pairs]
    assert found[4].user_id == "rc/test/4"
    assert found[4].labels == {"structure": "rc", "case": pairs[4].case, **pairs[4].labels}
    capitals = next(data.read(Source(task="capitals", count=2)))
    assert capitals.user_id == "capitals/train/0"
    assert set(capitals.labels) == {"case", "city", "state", "capital"}
    with refused(JobError, "count=100000"):
        data.read(Source(task="capitals", count=100000))


# -------------------------------------------------------------------------------------------------- digests


def test_digests_change_with_content(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"text": "a"})
    first = data.digest(source(path))
    assert first == data.digest(source(tmp_path)) == data.digest(source(f"{tmp_path}/*.jsonl"))
    assert len(first) == 64
    lines(path, {"text": "b"})
    second = data.digest(source(path))
    lines(tmp_path / "b.jsonl", {"text": "a"})
    third = data.digest(source(tmp_path))
    (tmp_path / "b.jsonl").rename(tmp_path / "c.jsonl")
    fourth = data.digest(source(tmp_path))
    (tmp_path / "a.jsonl").write_bytes(b"")
    assert len({first, second, third, fourth, data.digest(source(tmp_path))}) == 5
    with refused(JobError, "names no file"):
        data.digest(source(tmp_path / "nope.csv"))


def test_digests_of_tasks_are_their_parameters() -> None:
    given_: dict[str, Any] = {"task": "sva", "structure": "rc", "count": 5}
    changes: list[dict[str, Any]] = [{}, {"seed": 1}, {"count": 6}, {"split": "test"}, {"structure": "simple"}]
    found = [data.digest(Source(**(given_ | change))) for change in changes]
    assert len(set(found)) == len(changes)
    assert found[0] == data.digest(Source(**given_, limit=3))


# ------------------------------------------------------------------------------------ Hugging Face datasets


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for datasets, with the caches of `datasets` beside it."""
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "data"


def named(path: Path | str, **over: Any) -> Source:
    return Source(dataset=str(path), **over)


def test_a_folder_of_json_lines_as_a_dataset(hub: Path) -> None:
    lines(hub / "train.jsonl", {"text": "a", "target": " b", "n": 1}, {"text": "c", "target": None, "n": 2})
    lines(hub / "test.jsonl", {"text": "d", "target": " e", "n": 3})
    found = list(data.read(named(hub, labels=["n"])))
    assert found == [Row(text="a", target=(" b",), labels={"n": "1"}), Row(text="c", labels={"n": "2"})]
    assert [row.text for row in data.read(named(hub, split="test"))] == ["d"]
    mapped = named(hub, columns={"counterfactual": "target", "text": "text"}, limit=1)
    assert list(data.read(mapped)) == [Row(text="a", counterfactual=" b")]


def test_a_folder_of_parquet_as_a_dataset(hub: Path) -> None:
    parquet(hub / "train-00000.parquet", {"token_ids": [[1, 2], [3]], "target": [5, 6]})
    parquet(hub / "train-00001.parquet", {"token_ids": [[4, 4]], "target": [7]})
    wanted = [((1, 2), (5,)), ((3,), (6,)), ((4, 4), (7,))]
    assert [(row.token_ids, row.target) for row in data.read(named(hub))] == wanted


def test_datasets_that_cannot_be_read(hub: Path) -> None:
    lines(hub / "train.jsonl", {"text": "a", "answer": 1.5})
    with refused(JobError, "'nope'", "'text', 'answer'"):
        data.read(named(hub, columns={"text": "text", "target": "nope"}))
    with refused(JobError, "cannot be read", "dev"):
        data.read(named(hub, split="dev"))
    with refused(JobError, "cannot be read", "config"):
        data.read(named(hub, config="other"))
    with refused(JobError, "revision 'v1'", "no effect"):
        data.read(named(hub, revision="v1"))
    with refused(JobError, "no/where", "cannot be read"):
        data.read(named("no/where"))
    with refused(JobError, "no/where", "cannot be read"):
        data.digest(named("no/where"))
    wrong = next(data.read(named(hub, columns={"text": "text", "target": "answer"})))
    assert "target holds 1.5" in str(wrong.error)
    assert f"row 1 of {str(hub)!r}"[:30] in str(wrong.error)


def test_datasets_that_break_off_or_are_empty(hub: Path) -> None:
    lines(hub / "train-1.jsonl", {"text": "a"})
    lines(hub / "train-2.jsonl", {"text": "b"}, "nonsense")
    found = data.read(named(hub))
    assert next(found).text == "a"
    with refused(JobError, "data", "cannot be read"):
        list(found)
    (hub / "train-2.jsonl").unlink()
    (hub / "train-1.jsonl").write_text("")
    with refused(JobError, "data", "holds no prompt"):
        data.read(named(hub))


def test_a_class_is_no_target(hub: Path) -> None:
    library = importlib.import_module("datasets")
    features = library.Features({"text": library.Value("string"), "target": library.ClassLabel(names=["no", "yes"])})
    hub.mkdir()
    library.Dataset.from_dict({"text": ["a"], "target": [1]}, features=features).to_parquet(hub / "train.parquet")
    with refused(JobError, "column 'target'", "class numbers"):
        data.read(named(hub))
    assert next(data.read(named(hub, columns={"text": "text"}, labels=["target"]))).labels == {"target": "1"}


def test_digests_of_a_local_dataset_are_its_data_files(hub: Path) -> None:
    path = lines(hub / "train.jsonl", {"text": "a"})
    first = data.digest(named(hub))
    os.utime(path, (1, 1))
    assert data.digest(named(hub)) == first
    lines(path, {"text": "b"})
    second = data.digest(named(hub))
    lines(hub / "train-2.jsonl", {"text": "a"})
    assert len({first, second, data.digest(named(hub))}) == 3


def test_digests_of_a_dataset_on_the_hub_are_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    import huggingface_hub

    commits = iter(["abc", "abd"])

    class Info:
        def __init__(self) -> None:
            self.sha = next(commits)

    monkeypatch.setattr(huggingface_hub, "dataset_info", lambda *_, **__: Info())
    assert data.digest(named("some/where")) != data.digest(named("some/where"))


def test_without_the_package_it_is_said_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with refused(JobError, "some/where", "pip install 'neuron-tracer[datasets]'"):
        data.read(named("some/where"))


# --------------------------------------------------------------------------------------------------- memory


@pytest.mark.slow
@pytest.mark.parametrize("write", ["jsonl", "csv", "parquet"])
@pytest.mark.process
def test_a_large_file_is_read_in_flat_memory(tmp_path: Path, write: str) -> None:
    count, text = 300_000, "The key to the cabinets near the door of the house " * 4
    path = tmp_path / f"a.{write}"
    if write == "parquet":
        parquet(path, {"text": [text + str(i) for i in range(count)], "topic": ["x"] * count}, compression="none")
    else:
        with path.open("w") as file:
            file.write("text,topic\n" if write == "csv" else "")
            line = '{{"text": "{}{}", "topic": "x"}}\n' if write == "jsonl" else "{}{},x\n"
            file.writelines(line.format(text, i) for i in range(count))
    assert path.stat().st_size > 60e6
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        children.command("growth", path), env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    n_rows, growth = done.stdout.split()
    assert int(n_rows) == count
    assert float(growth) < 60


# ------------------------------------------------------------------------------------------------- a bucket


@pytest.mark.slow
def test_files_in_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "testing")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        options = f"?scheme=http&endpoint_override={host}:{port}&region=us-east-1"
        from pyarrow import fs

        system, _ = fs.FileSystem.from_uri(f"s3://bucket{options}&allow_bucket_creation=true")
        system.create_dir("bucket")
        here = {
            "j/a.jsonl.gz": lines(tmp_path / "a.jsonl.gz", {"text": "a"}),
            "j/sub/b.jsonl": lines(tmp_path / "b.jsonl", {"text": "b"}),
            "j/.c.jsonl": lines(tmp_path / "c.jsonl", {"text": "c"}),
            "c/a.csv": table(tmp_path / "a.csv", ["text", "target"], ["a", " b"]),
            "p/a.parquet": parquet(tmp_path / "a.parquet", {"text": ["a", "b"]}),
        }
        for name, path in here.items():
            with system.open_output_stream(f"bucket/{name}", compression=None) as stream:
                stream.write(path.read_bytes())
        for path in ("j", "j/", "j/**/*.jsonl*", "j/**"):
            assert [row.text for row in rows(f"s3://bucket/{path}{options}")] == ["a", "b"], path
        assert [row.text for row in rows(f"s3://bucket/j/*.gz{options}")] == ["a"]
        assert one(f"s3://bucket/c/a.csv{options}").target == (" b",)  # type: ignore[arg-type]
        assert [row.text for row in rows(f"s3://bucket/p/a.parquet{options}")] == ["a", "b"]
        assert len(data.digest(source(f"s3://bucket/j{options}"))) == 64
        with refused(JobError, "'bucket/j/**.jsonl'", "not a valid pattern"):
            data.read(source(f"s3://bucket/j/**.jsonl{options}"))
        for path in ("nope", "j/*.csv"):
            with refused(JobError, f"s3://bucket/{path}'", "names no file"):
                data.read(source(f"s3://bucket/{path}{options}"))
    finally:
        server.stop()
