"""One shard: every prompt gets its row, its failure is its own, and its circuit is the one `tracer.trace` gives."""

from __future__ import annotations

import errno
import functools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

import tracer
from helpers import refused
from tracer import data
from tracer.errors import RemoteError, RunError
from tracer.runs.jobs import DatasetJob, load_job
from tracer.runs.units import shards
from tracer.runs.units.dataset_circuit import mean_of
from tracer.runs.units.shards import ShardWork, input_row
from tracer.runs.workers.messages import Part, Report, Stage, Task
from tracer.store import schemas, storage
from tracer.store.run_folder import Commit, RunFolder
from truth import same_tables

SVA = {"task": "sva", "structure": "nounpp", "count": 6}


@functools.cache
def demo() -> tracer.Model:
    return tracer.load("demo")


def job(**more: Any) -> DatasetJob:
    made = load_job({"kind": "dataset", "nodes": 12, "input": SVA, **more})
    assert isinstance(made, DatasetJob)
    return made


class _DiedError(BaseException):
    """The process is gone."""


def _dying(patch: pytest.MonkeyPatch, after: int) -> None:
    """So many batches are traced, and the next ends everything."""
    plain, left = shards.trace_all, [after]

    def trace_all(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise _DiedError
        return plain(*args, **options)

    patch.setattr(shards, "trace_all", trace_all)


class Shard:
    """A planned folder of one shard, and what became of it."""

    def __init__(self, path: Path, rows: Sequence[data.Row] | None = None, **more: Any) -> None:
        self.job = job(**more)
        self.folder = RunFolder(path)
        self.rows = list(data.read(self.job.source)) if rows is None else list(rows)
        self.folder.write_input((input_row(row) for row in self.rows), 1000)
        self.began: list[tuple[tuple[int, ...], int]] = []
        self.parts: list[Part] = []
        self.died = False
        self.work = ShardWork(demo(), self.job, self.folder)

    def run(self, **task: Any) -> Report:
        def began(
            prompts: Sequence[int], done: int, note: str = "", part: Part | None = None, at: Stage | None = None
        ) -> None:
            self.parts += [] if part is None else [part]
            if [(tuple(prompts), done)] != self.began[-1:]:  # a long batch is told again and again
                self.began.append((tuple(prompts), done))

        try:
            self.report = self.work.run(Task(unit=0, **task), began)
        except _DiedError:
            self.died = True
            raise
        return self.report

    def table(self, name: str) -> pa.Table:
        return self.folder.read_table(self.report.files[name].name)

    def prompts(self) -> list[dict[str, Any]]:
        return self.table("prompts").to_pylist()

    def column(self, name: str) -> list[Any]:
        return self.table("prompts")[name].to_pylist()


def text(words: str, **more: Any) -> data.Row:
    return data.Row(text=words, **more)


@functools.cache
def sentences(count: int = 6) -> tuple[data.Row, ...]:
    return tuple(data.read(job(input=SVA | {"count": count}).source))


def lengths(rows: Sequence[data.Row]) -> list[int]:
    return [len(demo().tokenizer.encode(row.text)) for row in rows]


def raising(monkeypatch: pytest.MonkeyPatch, when: Callable[[list[tracer.Prompt]], Exception | None]) -> list[int]:
    """trace_all raises what `when` says; the sizes of the batches it was called with."""
    sizes, plain = list[int](), shards.trace_all

    def trace_all(model: Any, prompts: list[tracer.Prompt], **options: Any) -> Any:
        sizes.append(len(prompts))
        if (error := when(prompts)) is not None:
            raise error
        return plain(model, prompts, **options)

    monkeypatch.setattr(shards, "trace_all", trace_all)
    return sizes


# --------------------------------------------------------------------------------------------- what is right


def test_a_shard_is_what_tracing_each_prompt_gives(tmp_path: Path) -> None:
    shard = Shard(tmp_path, batch=1, circuit="aligned")
    report = shard.run()
    assert (report.statuses, report.errors, report.halved) == ({"ok": 6}, {}, 0)
    nodes, edges = shard.table("nodes"), shard.table("edges")
    for number, row in enumerate(shard.rows):
        prompt = tracer.Prompt(row.text, target=list(row.target or ()), foil=list(row.foil or ()))
        circuit = tracer.trace(demo(), prompt, nodes=12)
        mine = [table.filter(pc.field("prompt_id") == number).drop_columns(["prompt_id"]) for table in (nodes, edges)]
        assert mine[0].equals(circuit.nodes.drop_columns(["prompt_id"]).cast(mine[0].schema))
        assert circuit.links is not None
        assert mine[1].equals(circuit.links.drop_columns(["prompt_id"]).cast(mine[1].schema))
        found = shard.prompts()[number]
        assert (found["user_id"], dict(found["labels"])) == (row.user_id, row.labels)
        assert (found["n_nodes"], found["n_edges"], found["attempts"]) == (12, len(mine[1]), 1)
        assert (found["text"], found["token_ids"]) == (circuit.text, list(circuit.token_ids))
        assert found["metric"] == pytest.approx(circuit.metric, abs=0)
    for name in ("prompts", "nodes", "edges"):
        assert shard.table(name).schema.equals(schemas.SCHEMAS[name])
        assert report.files[name].rows == shard.table(name).num_rows
    assert nodes["prompt_id"].to_pylist() == sorted(nodes["prompt_id"].to_pylist())


def test_the_same_shard_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    tables = []
    for name in ("a", "b"):
        shard = Shard(tmp_path / name, sentences(), circuit="free")
        shard.run(attempt=7, deaths={2: 1})
        tables.append([shard.table(table) for table in ("nodes", "edges", "means")])
    assert all(one.equals(other) for one, other in zip(*tables, strict=True))


def test_batches_are_of_like_length_and_within_the_memory_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [text("the author near the guards"), text("the"), text("the author"), text("the guard near the authors")]
    rows += [text("the guards"), text("the author near the guard")]
    seen, plain = list[list[str]](), shards.trace_all

    def trace_all(model: Any, prompts: list[tracer.Prompt], **options: Any) -> Any:
        seen.append([str(prompt.text) for prompt in prompts])
        return plain(model, prompts, **options)

    monkeypatch.setattr(shards, "trace_all", trace_all)
    shard = Shard(tmp_path, rows, batch=2)
    shard.run()
    found = [len(demo().tokenizer.encode(one)) for batch in seen for one in batch]
    assert found == sorted(found)
    assert [len(batch) for batch in seen] == [2, 2, 2]
    assert [ids for ids, _ in shard.began if ids] == [(1, 2), (4, 0), (3, 5)]
    seen.clear()
    each = demo().bytes_per_token(length=max(lengths(rows)))
    Shard(tmp_path / "b", rows).run(max_bytes=3 * max(lengths(rows)) * each)
    assert [len(batch) for batch in seen] == [4, 2] or [len(batch) for batch in seen] == [3, 3]
    assert Counter(one for batch in seen for one in batch) == Counter(row.text for row in rows)


def test_after_the_last_batch_no_prompt_is_blamed(tmp_path: Path) -> None:
    shard = Shard(tmp_path, sentences(), batch=2)
    shard.run()
    assert shard.began[-1] == ((), 6)
    assert [done for _, done in shard.began] == sorted(done for _, done in shard.began)


def test_prompts_with_a_foil_and_without_share_a_shard_and_no_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row if number % 2 else text(str(row.text)) for number, row in enumerate(sentences())]
    sizes = raising(monkeypatch, lambda _prompts: None)
    shard = Shard(tmp_path, rows)
    assert shard.run().statuses == {"ok": 6}
    assert sizes == [3, 3]


# -------------------------------------------------------------------------------------------- what goes wrong


def test_every_misfortune_is_a_row_and_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = sentences(4)
    rows = [
        good[0],
        text(""),
        text("   "),
        text("the author " * demo().context_length),
        text("the author", target=(" a b c",)),
        good[1],
        text("the author", target=(" is",), foil=(" is",)),
        data.Row(token_ids=(1, 10**6)),
        data.Row(error="text is 3.5, not text (line 8)", user_id="eight", labels={"a": "b"}),
        good[2],
        text("raise"),
        good[3],
    ]
    raising(
        monkeypatch,
        lambda prompts: KeyError("no\nsuch") if any(prompt.text == "raise" for prompt in prompts) else None,
    )
    shard = Shard(tmp_path / "bad", rows, circuit="free", input={"path": "rows.jsonl"})  # built-in ones are skipped
    report = shard.run()
    status = ["ok" if number in (0, 5, 9, 11) else "failed" for number in range(12)]
    assert shard.column("status") == status
    assert report.statuses == {"ok": 4, "failed": 8}
    assert report.errors == {"JobError": 7, "KeyError": 1}
    told = shard.column("error")
    words = {1: "is empty", 2: "is empty", 3: "at most", 4: "tokens", 6: "both target and foil", 7: "vocabulary"}
    words |= {8: "text is 3.5, not text (line 8)", 10: "such"}
    for number, part in words.items():
        assert part in told[number], told[number]
    row = shard.prompts()[8]
    assert (row["user_id"], row["labels"], row["n_nodes"], row["metric"]) == ("eight", [("a", "b")], 0, None)
    assert {*shard.table("nodes")["prompt_id"].to_pylist()} == {0, 5, 9, 11}
    assert shard.table("means")["n_prompts"].to_pylist() == [4] * demo().n_layers
    alone = Shard(tmp_path / "good", good)
    alone.run()
    for name in ("nodes", "edges"):
        mine, other = (table.drop_columns(["prompt_id"]) for table in (shard.table(name), alone.table(name)))
        assert mine.equals(other)


def test_a_prompt_of_which_no_node_is_kept_has_no_rows_and_says_so(tmp_path: Path) -> None:
    shard = Shard(tmp_path, nodes=None, threshold=1e6)
    assert shard.run().statuses == {"failed": 6}
    assert all("no node is kept" in told for told in shard.column("error"))
    assert (shard.table("nodes").num_rows, shard.table("edges").num_rows) == (0, 0)
    assert shard.table("nodes").schema.equals(schemas.NODES)


def test_memory_that_runs_out_halves_the_batch_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Shard(tmp_path / "a", sentences())
    whole.run()
    sizes = raising(
        monkeypatch, lambda prompts: torch.OutOfMemoryError("CUDA out of memory") if len(prompts) > 2 else None
    )
    shard = Shard(tmp_path / "b", sentences())
    report = shard.run()
    assert sizes == [6, 3, 2, 1, 3, 2, 1]
    assert (report.statuses, report.halved) == ({"ok": 6}, 3)
    assert same_tables(shard.table("nodes"), whole.table("nodes"))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_prompt_for_which_memory_never_suffices_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    big = sentences()[4].text
    raising(monkeypatch, lambda prompts: error if any(prompt.text == big for prompt in prompts) else None)
    shard = Shard(tmp_path, sentences())
    assert shard.run().statuses == {"ok": 5, "failed": 1}
    assert shard.report.errors == {"OutOfMemory": 1}
    assert shard.column("status")[4] == "failed"


@pytest.mark.parametrize("kind", [ConnectionError, TimeoutError, ConnectionResetError])
def test_what_can_pass_is_tried_again_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    slept, left = list[float](), [kind("no route"), kind("no route")]
    monkeypatch.setattr(shards.time, "sleep", slept.append)
    sizes = raising(monkeypatch, lambda _prompts: left.pop() if left else None)
    shard = Shard(tmp_path, sentences())
    assert shard.run().statuses == {"ok": 6}
    assert (sizes, shard.column("attempts")) == ([6, 6, 6], [3] * 6)
    assert 0.5 <= slept[0] <= 1.5
    assert 1.0 <= slept[1] <= 3.0


def test_what_does_not_pass_is_a_failure_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept = list[float]()
    monkeypatch.setattr(shards.time, "sleep", slept.append)
    bad = sentences()[3].text
    error = ConnectionError("is busy")
    sizes = raising(monkeypatch, lambda prompts: error if any(prompt.text == bad for prompt in prompts) else None)
    shard = Shard(tmp_path, sentences(), retries=2)
    assert shard.run().errors == {"ConnectionError": 1}
    assert (shard.column("status")[3], shard.column("attempts")[3]) == ("failed", 3)
    assert sizes == [6] * 3 + [1] * 3 + [1] * 3 + [1] * 2  # as a batch, then one by one
    assert len(slept) == 4


def test_a_service_that_is_gone_ends_the_unit_and_is_no_prompts_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = raising(monkeypatch, lambda _prompts: RemoteError("service", "is gone", "wait"))
    with refused(RemoteError, "is gone"):
        Shard(tmp_path, sentences()).run()
    assert sizes == [6]


def test_a_device_that_can_compute_no_more_ends_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class AcceleratorError(RuntimeError):
        pass

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(torch, "AcceleratorError", AcceleratorError, raising=False)
    monkeypatch.setattr(shards.os, "_exit", leave)
    raising(monkeypatch, lambda _prompts: AcceleratorError("CUDA error: device-side assert triggered"))
    with pytest.raises(SystemExit, match="70"):
        Shard(tmp_path, sentences()).run()


def test_a_disk_that_is_full_is_the_users_to_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = Shard(tmp_path, sentences(2))

    def full(_place: storage.Storage, _name: str, _content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage.Storage, "write", full)
    with refused(RunError, "No space left on device", "make room"):
        shard.run()


# ------------------------------------------------------------------------------------- deaths and second tries


def test_a_batch_that_killed_is_taken_apart_and_the_others_stay_as_they_were(tmp_path: Path) -> None:
    whole = Shard(tmp_path / "a", sentences(), batch=2)
    whole.run()
    shard = Shard(tmp_path / "b", sentences(), batch=2)
    alone = whole.began[1][0]
    shard.run(most=dict.fromkeys(alone, 1), attempt=3, deaths=dict.fromkeys(alone, 2))
    assert [ids for ids, _ in shard.began if ids] == [
        *(ids for ids, _ in whole.began[:1]),
        *((one,) for one in alone),
        *(ids for ids, _ in whole.began[2:] if ids),
    ]
    kept = [number not in alone for number in whole.table("nodes")["prompt_id"].to_pylist()]
    assert shard.table("nodes").filter(pa.array(kept)).equals(whole.table("nodes").filter(pa.array(kept)))
    assert same_tables(shard.table("nodes"), whole.table("nodes"))
    assert shard.column("attempts") == [3 if number in alone else 1 for number in range(6)]


def test_a_batch_that_killed_is_halved_as_often_as_it_must(tmp_path: Path) -> None:
    shard = Shard(tmp_path, sentences())
    shard.run(most={0: 4, 1: 4, 2: 4, 3: 1, 4: 4, 5: 4}, attempt=3)
    assert [len(ids) for ids, _ in shard.began if ids] == [3, 1, 1, 1]
    assert shard.report.statuses == {"ok": 6}


@pytest.mark.parametrize("circuit", ["none", "aligned", "free"])
@pytest.mark.parametrize("dies", [1, 2, 4])
def test_what_was_kept_before_a_death_is_not_done_again_and_no_bit_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, circuit: str, dies: int
) -> None:
    """Each process dies as it begins one batch more, and keeps what it has done."""
    rows = [*_rows_of_two_lengths(), text(""), text("two", target=(" a b c",))]
    profiles = circuit == "none" and dies == 4
    options: dict[str, Any] = {"batch": 2, "circuit": circuit, "skip_first": False, "profiles": profiles}
    whole = Shard(tmp_path / "a", rows, **options)
    whole.run()
    monkeypatch.setattr(shards, "KEPT_EVERY", 0.0)
    monkeypatch.setattr(shards, "KEPT_AFTER_DEATH", 0.0)
    monkeypatch.setattr(shards, "KEPT_SHARE", 1e9)
    shard, attempt, begun = Shard(tmp_path / "b", rows, **options), 1, Counter[tuple[int, ...]]()
    while True:
        shard.began.clear()
        with monkeypatch.context() as patch, suppress(_DiedError):
            _dying(patch, dies)
            shard.run(parts=tuple(shard.parts), attempt=attempt)
        begun.update(ids for ids, _ in shard.began if ids)
        if not shard.died:
            break
        shard.died, attempt = False, attempt + 1
    assert attempt > 1
    assert set(begun) == {ids for ids, _ in whole.began if ids}, "the same batches"
    assert sum(begun.values()) == len(begun) + attempt - 1, "only those that died are begun again"
    assert shard.report.statuses == whole.report.statuses
    assert shard.report.notes == whole.report.notes
    assert ("profiles" in shard.report.files) == profiles
    for name in shard.report.files:
        mine, its = (one.table(name) for one in (shard, whole))
        drop = ["seconds"] if name == "prompts" else []
        assert mine.drop_columns(drop).equals(its.drop_columns(drop)), name


def test_a_quarantined_prompt_is_not_touched_and_says_why(tmp_path: Path) -> None:
    shard = Shard(tmp_path, sentences(), circuit="aligned")
    why = {2: ("ProcessDied", "2 processes died on it"), 77: ("ProcessDied", "another shard's")}
    report = shard.run(quarantined=why, deaths={2: 2, 77: 2})
    assert report.statuses == {"ok": 5, "quarantined": 1}
    assert report.errors == {"ProcessDied": 1}
    row = shard.prompts()[2]
    assert (row["status"], row["error_type"], row["attempts"]) == ("quarantined", "ProcessDied", 2)
    assert row["error"] == "2 processes died on it"
    assert not any(2 in ids for ids, _ in shard.began)
    assert 2 not in shard.table("nodes")["prompt_id"].to_pylist()


@pytest.mark.parametrize("circuit", ["none", "aligned", "free"])
def test_doing_the_failed_again_keeps_the_others_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, circuit: str
) -> None:
    whole = Shard(tmp_path / "a", sentences(), batch=1, circuit=circuit)
    whole.run()
    shard = Shard(tmp_path / "b", sentences(), batch=1, circuit=circuit)
    bad = {sentences()[number].text for number in (0, 3)}
    with monkeypatch.context() as patch:
        raising(patch, lambda prompts: ValueError("x") if {prompt.text for prompt in prompts} & bad else None)
        first = shard.run()
    assert first.statuses == {"ok": 4, "failed": 2}
    shard.began.clear()
    files = {name: file.name for name, file in first.files.items()}
    report = shard.run(only=(0, 3), files=files)
    assert report.statuses == {"ok": 6}
    assert report.errors == {}
    assert [ids for ids, _ in shard.began if ids] == [(0,), (3,)]
    for name in ("nodes", "edges"):
        assert shard.table(name).equals(whole.table(name))
    drop = ["seconds"]
    assert shard.table("prompts").drop_columns(drop).equals(whole.table("prompts").drop_columns(drop))
    if circuit != "none":
        mine, other = (mean_of(one.folder, [Commit.of(one.report)]) for one in (shard, whole))
        assert mine is not None
        assert other is not None
        assert (mine.n_prompts, mine.length) == (other.n_prompts, other.length)
        torch.testing.assert_close(mine.values, other.values, rtol=1e-6, atol=1e-9)


# ------------------------------------------------------------------------------------------------- the circuit


def _rows_of_two_lengths() -> list[data.Row]:
    other = tuple(data.read(job(input={"task": "sva", "structure": "simple", "count": 4}).source))
    rows = [*sentences(5), *other]
    random.Random(0).shuffle(rows)
    return rows


@pytest.mark.parametrize("skip_first", [False, True])
@pytest.mark.parametrize("circuit", ["aligned", "free"])
def test_sums_are_the_mean_attribution_of_all_nodes(tmp_path: Path, circuit: str, skip_first: bool) -> None:
    rows = _rows_of_two_lengths()
    shard = Shard(tmp_path, rows, circuit=circuit, skip_first=skip_first, edges=False)
    shard.run()
    mean = mean_of(shard.folder, [Commit.of(shard.report)])
    assert mean is not None
    wanted = []
    for row in rows:
        prompt = tracer.Prompt(row.text, target=list(row.target or ()), foil=list(row.foil or ()))
        wanted.append(tracer.attribute(demo(), [prompt]).nodes[0].double())
    if circuit == "aligned":
        assert sorted({one.shape[1] for one in wanted}) == sorted({*lengths(rows)})
        wanted = [one for one in wanted if one.shape[1] == mean.length]
        assert (mean.n_prompts, mean.n_left_out) == (5, 4)
    else:
        wanted = [one[:, int(skip_first) :].sum(1, keepdim=True) for one in wanted]
        assert (mean.length, mean.n_prompts, mean.n_left_out) == (-1, 9, 0)
    exact = torch.stack(wanted).mean(0)
    assert mean.values.shape == exact.shape
    torch.testing.assert_close(mean.values.double(), exact, rtol=1e-5, atol=1e-7)
