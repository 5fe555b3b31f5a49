"""Several requests at a time: no more than the key may have, the same bytes whatever their number, one end for all."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import runs
import tracer
from helpers import refused
from inline import InlinePool
from loopback import LIMITS, Loopback, start, stop
from tracer import data, demo
from tracer.cli.app import app
from tracer.errors import JobError, RemoteError
from tracer.ndif import server as ndif
from tracer.runs import report as run_report
from tracer.runs.jobs import DatasetJob, load_job
from tracer.runs.units import shards
from tracer.runs.units.shards import ShardWork, input_row
from tracer.runs.workers.messages import Began, Task
from tracer.runs.workers.placement import check_asked, place
from tracer.runs.workers.processes import LocalPool
from tracer.store.run_folder import Commit, RunFolder

PATIENCE = 30.0  # seconds until a thread that should have been heard of was not


def job(count: int = 8, **changes: Any) -> dict[str, Any]:
    """Every prompt is a batch, two shards."""
    source = {"task": "sva", "structure": "simple", "count": count}
    made = {"kind": "dataset", "input": source, "shard_size": count // 2, "batch": 1, "nodes": 10, "remote": True}
    return made | changes


def dataset_job(**keys: Any) -> DatasetJob:
    made = load_job(job(**keys))
    assert isinstance(made, DatasetJob)
    return made


def inline(made: dict[str, Any], out: Path, **more: Any) -> tracer.Run:
    return tracer.run(made, out, pool=InlinePool(), **more)


def first_waits(monkeypatch: pytest.MonkeyPatch, others: int) -> None:
    """In every shard, the first batch is done after so many others."""
    plain, lock, state = shards.trace_all, threading.Lock(), {"begun": 0, "done": threading.Semaphore(0)}

    def trace_all(*args: Any, **options: Any) -> Any:
        with lock:
            mine, state["begun"] = state["begun"] % (others + 1), state["begun"] + 1
        found = list(plain(*args, **options))
        for _ in range(others if mine == 0 else 0):
            assert state["done"].acquire(timeout=PATIENCE)
        if mine:
            state["done"].release()
        return found

    monkeypatch.setattr(shards, "trace_all", trace_all)


# ------------------------------------------------------------------------------------------- threads of a server


def client(in_flight: int) -> ndif.Server:
    return ndif.Server("http://127.0.0.1:9", ndif.Limits(in_flight=in_flight))


def test_answers_come_in_order_and_few_wait_for_their_turn() -> None:
    gate, seen, beyond = threading.Event(), list[int](), threading.Event()

    def work(part: Sequence[int]) -> int:
        seen.append(part[0])
        if len(seen) == 6:
            gate.set()
        elif len(seen) > 6 and not taken:
            beyond.set()
        if part[0] == 0:
            assert gate.wait(PATIENCE)
        return part[0]

    taken: list[int] = []
    for answer in client(3).stream(work, [[number] for number in range(20)]):
        taken.append(answer)
    assert taken == list(range(20))
    assert not beyond.is_set()


def test_one_at_a_time_is_done_in_the_thread_that_asks() -> None:
    names = list(client(1).stream(lambda _part: threading.current_thread(), [[0], [1]]))
    assert names == [threading.current_thread()] * 2


def test_the_first_error_ends_the_others_and_what_they_began() -> None:
    server, waiting, ended = client(2), threading.Semaphore(0), list[str]()

    def inner(_part: Sequence[int]) -> None:
        waiting.release()
        try:
            server.sleep(PATIENCE)
        except RemoteError as error:
            ended.append(error.rule)
            raise

    def outer(part: Sequence[int]) -> None:
        if part[0] == 1:
            for _ in range(2):
                assert waiting.acquire(timeout=PATIENCE)
            raise RemoteError("server", "is gone", "wait")
        assert part[0] == 0, "no other part may be begun"
        server.each(inner, [[0], [1]])

    with refused(RemoteError, "is gone"):
        list(server.stream(outer, [[0], [1], [2], [3]]))
    assert ended == ["a job was abandoned, since another one failed"] * 2


def test_an_error_within_ends_no_more_than_what_is_within() -> None:
    server = client(2)

    def inner(part: Sequence[int]) -> None:
        if part[0] == 1:
            raise ndif.JobFailedError("job", "failed", "mend it")
        server.sleep(PATIENCE)

    def outer(part: Sequence[int]) -> int:
        with refused(ndif.JobFailedError, "failed"):
            server.each(inner, [[0], [1]])
        server.sleep(0.0)
        return part[0]

    assert list(server.stream(outer, [[0], [1], [2]])) == [0, 1, 2]


# ----------------------------------------------------------------------------------- how many, and in which worker


def test_workers_share_what_the_key_may_have() -> None:
    def placed(workers: int | None, n_units: int = 100, most: int | None = None, **keys: Any) -> tuple[int, int]:
        made = place(dataset_job(**keys), None, workers, None, n_units, None, most)
        return made.workers, made.in_flight

    assert placed(None) == (1, 4)
    assert placed(None, in_flight=9) == (1, 9)
    assert [placed(count, in_flight=5) for count in (1, 2, 3, 5)] == [(1, 5), (2, 2), (3, 1), (5, 1)]
    assert placed(5, n_units=2, in_flight=5) == (2, 2)
    assert placed(None, most=3, weights="local", device="cpu", in_flight=1) == (1, 1)
    workers, share = placed(None, weights="local", device="cpu")
    assert 1 <= workers * share <= 4


def test_more_workers_than_requests_are_refused() -> None:
    check_asked(dataset_job(in_flight=2), 2, None)
    check_asked(dataset_job(remote=False), 20, None)
    with refused(JobError, "workers=3", "2 requests", "in_flight"):
        check_asked(dataset_job(in_flight=2), 3, None)
    with refused(JobError, "workers=5", "4 requests"):
        check_asked(dataset_job(weights="local"), 5, None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--in-flight", "2"], "in_flight has no effect without remote: true"),
        (["--remote", "--in-flight", "2", "--workers", "3"], "--workers 3: are more than the 2 requests"),
        (["--remote", "--set", "in_flight=0"], "--in-flight 0"),
    ],
)
def test_the_command_refuses_in_one_line(tmp_path: Path, options: list[str], said: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps({name: value for name, value in job().items() if name != "remote"}))
    result = CliRunner().invoke(app, ["run", str(path), "--out", str(tmp_path / "out"), *options])
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_has_several_requests_in_flight_and_no_more_than_it_may(
    server: Loopback, tmp_path: Path, workers: int
) -> None:
    server.mode(queued=0.02)
    pool = InlinePool() if workers == 1 else LocalPool()
    try:
        found = tracer.run(job(in_flight=4, edges=False), tmp_path / "run", workers=workers, pool=pool)
    finally:
        pool.close()
    assert found.status.statuses == {"ok": 8}
    assert 2 <= server.seen()["most_open"] <= 4


# ------------------------------------------------------------------------------------------------ what is written


@pytest.mark.parametrize("circuit", ["aligned", "free"])
def test_the_tables_are_the_same_bytes(
    server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, circuit: str
) -> None:
    inline(job(circuit=circuit, in_flight=1), tmp_path / "one")
    assert server.seen()["most_open"] == 1
    first_waits(monkeypatch, others=3)
    inline(job(circuit=circuit, in_flight=4), tmp_path / "four")
    assert server.seen()["most_open"] > 1
    runs.same(tmp_path / "one", tmp_path / "four")
    commits = [list(RunFolder(tmp_path / name).commits()) for name in ("one", "four")]
    for one, four in zip(*commits, strict=True):
        assert {"nodes", "edges"} <= one.files.keys()
        for name in one.files.keys() - {"prompts"}:  # these tell seconds
            got, wanted = (
                (tmp_path / run / made.files[name]).read_bytes() for run, made in (("one", one), ("four", four))
            )
            assert got == wanted, name


def test_a_queue_is_heard_of(server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run says what it waits for, and waiting does not count as hanging: the driver hears of it in time."""
    monkeypatch.setattr(ndif, "Limits", partial(ndif.Limits, wait=60.0, quiet=0.1))
    server.mode(queued=0.5)
    heard, plain = list[Any](), InlinePool.events

    def events(pool: InlinePool, timeout: float) -> Any:
        found = plain(pool, timeout)
        heard.extend(one for one in found if isinstance(one, Began) and one.note)
        return found

    monkeypatch.setattr(InlinePool, "events", events)
    found = inline(job(2), tmp_path / "run")
    assert found.status.statuses == {"ok": 2}
    assert heard
    assert all(one.prompts for one in heard)
    assert any("queued: Your job is 1st in the queue" in one.note for one in heard)
    line = run_report.line(found.status.model_copy(update={"waiting": heard[0].note}))
    assert f"waiting for {heard[0].note}" in line
    assert found.status.waiting is None


def test_where_weights_are_here_one_batch_fills_the_memory(server: Loopback, tmp_path: Path) -> None:
    found = inline(job(weights="local", device="cpu", in_flight=4), tmp_path / "run")
    assert (found.status.statuses, server.seen()["most_open"]) == ({"ok": 8}, 1)


def test_a_prompt_that_fails_among_others_is_a_row_and_the_others_go_on(
    server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = shards.trace_all
    bad = {row.text for number, row in enumerate(data.read(dataset_job().source)) if number in (1, 6)}

    def trace_all(model: Any, prompts: list[tracer.Prompt], **options: Any) -> Any:
        if prompts[0].text in bad:
            raise ndif.JobFailedError("job", "failed there", "mend it")
        return plain(model, prompts, **options)

    monkeypatch.setattr(shards, "trace_all", trace_all)
    found = inline(job(), tmp_path / "run")
    assert (found.status.statuses, found.status.errors) == ({"ok": 6, "failed": 2}, {"JobFailedError": 2})
    rows = found.table("prompts").to_pylist()
    assert [row["prompt_id"] for row in rows if row["status"] == "failed"] == [1, 6]


def test_memory_that_runs_out_halves_batches_under_way(
    server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = shards.trace_all

    def trace_all(model: Any, prompts: list[tracer.Prompt], **options: Any) -> Any:
        if len(prompts) > 1:
            raise ndif.TooLargeError("job", "the server ran out of memory", "use fewer")
        return plain(model, prompts, **options)

    monkeypatch.setattr(shards, "trace_all", trace_all)
    found = inline(job(batch=2, edges=False), tmp_path / "run")
    assert found.status.statuses == {"ok": 8}
    assert [commit.halved for commit in found.folder.commits()] == [2, 2]


@pytest.mark.slow
def test_a_server_that_dies_keeps_what_is_committed_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NDIF_API_KEY", raising=False)
    monkeypatch.setattr(ndif, "Limits", partial(ndif.Limits, wait=30.0, patience=1.0, lost=0.6))
    made, out = job(12, shard_size=4, edges=False), tmp_path / "run"
    alone, commit = start({"demo": str(demo.path())}, tmp_path), RunFolder.commit

    def last(folder: RunFolder, what: Commit) -> None:
        commit(folder, what)
        alone.mode(die=True)

    try:
        monkeypatch.setenv("NDIF_HOST", alone.host)
        with monkeypatch.context() as patch, refused(RemoteError, "cannot be reached"):
            patch.setattr(RunFolder, "commit", last)
            inline(made, out)
    finally:
        stop(alone)
    assert len(list(RunFolder(out).commits())) == 1
    assert not any("ThreadPool" in thread.name for thread in threading.enumerate())
    alone = start({"demo": str(demo.path())}, tmp_path)
    try:
        monkeypatch.setenv("NDIF_HOST", alone.host)
        again = inline(made, out)
        assert (again.resumed, again.status.statuses) == (1, {"ok": 12})
        inline(made, tmp_path / "undisturbed")
    finally:
        stop(alone)
    runs.same(out, tmp_path / "undisturbed")


def test_a_folder_from_before_there_was_a_limit_is_gone_on_with(server: Loopback, tmp_path: Path) -> None:
    out = tmp_path / "run"
    inline(job(edges=False, in_flight=3), out)
    record = json.loads((out / "run.json").read_text())
    assert "in_flight" not in record["numbers"]
    del record["job"]["in_flight"], record["digest"]
    (out / "run.json").write_text(json.dumps(record))
    (out / "_SUCCESS.json").unlink()
    RunFolder(out).uncommit(1)
    found = inline(job(edges=False, in_flight=2), out)
    assert (found.resumed, found.status.statuses) == (1, {"ok": 8})


# --------------------------------------------------------------------------------- what the driver is told of


class Told:
    """A shard of a remote model, and which prompts were told to be under way."""

    def __init__(self, model: tracer.Model, path: Path, **keys: Any) -> None:
        made, folder = dataset_job(edges=False, **keys), RunFolder(path)
        folder.write_input((input_row(row) for row in data.read(made.source)), 1000)
        self.work, self.began = ShardWork(model, made, folder), list[tuple[tuple[int, ...], int]]()

    def run(self, **order: Any) -> None:
        report = self.work.run(
            Task(unit=0, **order),
            lambda prompts, done, note="", part=None, at=None: self.began.append((tuple(prompts), done)),
        )
        assert sum(report.statuses.values()) == 8


@pytest.fixture
def told(server: Loopback, tmp_path: Path) -> Callable[..., Told]:
    model = server.load("demo", ndif.Limits(wait=30.0, patience=5.0, in_flight=LIMITS.in_flight))
    return lambda **keys: Told(model, tmp_path, **keys)


def test_all_that_is_under_way_is_told(told: Callable[..., Told], monkeypatch: pytest.MonkeyPatch) -> None:
    first_waits(monkeypatch, others=7)
    shard = told(batch=1)
    shard.run()
    sizes = [len(ids) for ids, _ in shard.began]
    assert max(sizes) == 4
    assert all(len({*ids}) == len(ids) for ids, _ in shard.began)
    assert shard.began[-2][1] == 7  # the first batch was the last to be done: by then it was told alone
    assert len(shard.began[-2][0]) == 1
    assert shard.began[-1] == ((), 8)
    assert [done for _, done in shard.began] == sorted(done for _, done in shard.began)


def test_who_is_to_be_alone_is(told: Callable[..., Told]) -> None:
    shard = told(batch=2)
    shard.run(most={2: 1, 3: 1}, deaths={2: 2, 3: 2}, quarantined={5: ("ProcessDied", "twice")})
    for ids, _ in shard.began:
        assert not {2, 3} & {*ids} or len(ids) == 1
        assert 5 not in ids
    assert max(len(ids) for ids, _ in shard.began) > 2


@pytest.mark.slow
def test_a_prompt_that_kills_its_process_among_others_is_found(
    server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(runs.TESTS), prepend=":")
    rows = [{"id": f"{'kill' if number == 3 else 'slow'}/{number}", "text": "The keys near the"} for number in range(8)]
    source = {"path": runs.lines(tmp_path / "rows.jsonl", rows)}
    pool = LocalPool()
    try:
        made = job(input=source, shard_size=8, edges=False)
        found = tracer.run(made, tmp_path / "run", workers=1, pool=pool, factory="fake_runs:Faulty")
    finally:
        pool.close()
    assert found.status.statuses == {"ok": 7, "quarantined": 1}
    assert runs.statuses(tmp_path / "run")["kill/3"] == ("quarantined", "ProcessDied")
