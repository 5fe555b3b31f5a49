"""Rows that are too long to be prompts: each fails as one row, whatever its file is packed as, in bounded memory."""

from __future__ import annotations

import gzip
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tracer
from helpers import refused
from inline import InlinePool
from runs import tables
from tally import Attack
from tracer import JobError, Prompt, data
from tracer.data.source import Source
from tracer.prompts import encode, tokenize

MIB = 1 << 20
GOOD = {"text": "The keys near the car", "target": " are", "foil": " is"}


def pieces(count: int, piece: bytes = b"a" * MIB) -> Iterator[bytes]:
    for _ in range(count):
        yield piece


def packed(path: Path, *parts: bytes | Iterator[bytes]) -> Path:
    with gzip.open(path, "wb", 6) as out:
        for part in parts:
            for piece in [part] if isinstance(part, bytes) else part:
                out.write(piece)
    return path


def json_lines(folder: Path, mib: int) -> Path:
    good = json.dumps(GOOD).encode() + b"\n"
    return packed(folder / "rows.jsonl.gz", good, b'{"text": "', pieces(mib), b'"}\n', good)


def no_line_end(folder: Path, mib: int) -> Path:
    good = json.dumps(GOOD).encode() + b"\n"
    return packed(folder / "rows.jsonl.gz", good, good, b'{"text": "', pieces(mib))


def csv(folder: Path, mib: int) -> Path:
    head, good = b"text,target,foil\n", b"The keys near the car, are, is\n"
    return packed(folder / "rows.csv.gz", head, good, pieces(mib), b", are, is\n", good)


def csv_quoted(folder: Path, mib: int) -> Path:
    head, good = b"text,target,foil\n", b"The keys near the car, are, is\n"
    return packed(folder / "rows.csv.gz", head, good, b'"', pieces(mib), b'", are, is\n', good)


def parquet(folder: Path, mib: int) -> Path:
    text = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0], pa.int32()), pa.array([GOOD["text"], "a" * (mib * MIB)]))
    rest = {name: pa.array([GOOD[name]] * 3) for name in ("target", "foil")}
    pq.write_table(pa.table({"text": text, **rest}), folder / "rows.parquet", compression="zstd")
    return folder / "rows.parquet"


FILES = {"json": json_lines, "no line end": no_line_end, "csv": csv, "csv in quotes": csv_quoted, "parquet": parquet}


@pytest.mark.parametrize("kind", FILES)
def test_a_long_row_is_one_row_that_cannot_be_read(kind: str, tmp_path: Path, attack: Attack) -> None:
    with attack("one long row") as tally:
        rows = list(data.read(Source(path=(str(FILES[kind](tmp_path, 20)),))))
        tally.tried, tally.lost = 1, abs(2 - sum(row.error is None for row in rows))
        assert [row.error is None for row in rows].count(False) == 1
        assert all(row.text == GOOD["text"] for row in rows if row.error is None)
        assert "long" in next(row.error for row in rows if row.error is not None)


def test_what_follows_a_long_text_in_quotes_is_not_taken_for_rows(tmp_path: Path) -> None:
    file = packed(tmp_path / "rows.csv.gz", b'text,target\n"a\n', pieces(20), b'\nThe key, is\n", are\nThe car, is\n')
    with refused(JobError, "line 2", "quote"):
        list(data.read(Source(path=(str(file),))))
    file = packed(tmp_path / "rows.csv.gz", b'text,target\n"a', pieces(20), b'\nThe key, is\n", are\nThe car, is\n')
    with refused(JobError, "line 2", "quote"):
        list(data.read(Source(path=(str(file),))))


def test_one_text_in_many_rows_is_held_once(tmp_path: Path) -> None:
    count = 2000
    text = pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array(["a" * MIB]))
    pq.write_table(pa.table({"text": text}), tmp_path / "rows.parquet")
    seen = {row.text for row in data.read(Source(path=(str(tmp_path / "rows.parquet"),)))}
    assert seen == {"a" * MIB}


class _Counting:
    """A tokenizer that counts the characters it is given, and panics at a word."""

    class PanicException(BaseException):
        """As of Rust, by way of PyO3."""

    def __init__(self) -> None:
        self.given = 0
        self.real = tracer.load().tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def encode(self, text: str, **options: Any) -> list[int]:
        self.given += len(text)
        if "panic" in text:
            raise self.PanicException("called `Option::unwrap()` on a `None` value")
        return self.real.encode(text, **options)


def test_a_text_that_cannot_fit_is_never_tokenised() -> None:
    model, counting = tracer.load(), _Counting()

    class Vocabulary:
        tokenizer, vocab_size, context_length = counting, model.vocab_size, model.context_length

    with refused(JobError, "prompt 'aaaa", "bytes", f"at most {model.context_length:,} tokens", "shorten"):
        encode(Prompt("a" * 10 * MIB), Vocabulary())
    with refused(JobError, "target", "bytes", "shorten"):
        encode(Prompt(GOOD["text"], target="a" * 10 * MIB), Vocabulary())
    with refused(JobError, "counterfactual", "bytes", "shorten"):
        encode(Prompt(GOOD["text"], counterfactual="a" * 10 * MIB), Vocabulary())
    assert counting.given < 1000


def test_the_bound_is_of_bytes_and_never_refuses_what_fits() -> None:
    model = tracer.load()
    for text in ("x", "\U0001f600", " ", "The keys "):
        most = 64
        many = text * (4 * most)
        ids = model.tokenizer.encode(many, add_special_tokens=False)
        assert len(tokenize(many, model.tokenizer, len(ids), special=False)) == len(ids)


def test_a_panic_of_the_tokenizer_fails_its_prompt() -> None:
    class Vocabulary:
        tokenizer, vocab_size, context_length = _Counting(), 1000, 64

    with refused(JobError, "prompt 'do panic'", "its tokenizer fails on it", "PanicException"):
        encode(Prompt("do panic"), Vocabulary())


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("kind", FILES)
def test_a_run_with_a_row_of_300_mib_ends_with_that_row_failed(kind: str, tmp_path: Path, attack: Attack) -> None:
    """The driver, and the plan, in a process whose memory is bounded."""
    file = FILES[kind](tmp_path, 300)
    job = {"kind": "dataset", "model": "demo", "input": {"path": str(file)}, "edges": False}
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    with attack("a row of 300 MiB, in a run") as tally:
        for verb in (["plan", "job.yaml"], ["run", "job.yaml", "--out", "run", "--workers", "1"]):
            ran = subprocess.run(
                [Path(sys.executable).parent / "tracer", *verb],
                check=False,
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=300,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30)),
            )
            tally.tried += 1
            tally.tracebacks += ran.stderr.count("Traceback")
            tally.lost += int(ran.returncode != 0)
            tally.worst = ran.stderr[-300:]
        found = tables(tmp_path / "run")["prompts"]
        assert sorted(found["status"].to_pylist()) == ["failed", "ok", "ok"]


def test_a_run_with_a_long_row_fails_that_row(tmp_path: Path) -> None:
    rows = [GOOD, {**GOOD, "text": "a " * MIB}, {**GOOD, "text": "a" * 5 * MIB}, GOOD]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = {"kind": "dataset", "model": "demo", "input": {"path": str(file)}, "edges": False}
    done = tracer.run(job, tmp_path / "run", pool=InlinePool())
    assert done.status.statuses == {"ok": 2, "failed": 2}
    said = done.folder.read_output("failed.parquet")["error"].to_pylist()
    assert all(len(one) < 400 for one in said)
