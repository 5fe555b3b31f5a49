"""Whole runs with a worker that has no model: planned once, done once, resumed, repaired, refused."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import runs
import s3
import tracer
from helpers import refused
from inline import InlinePool
from tracer.errors import JobError, RunError
from tracer.runs import driver as running
from tracer.runs import status
from tracer.runs.driver import Run, Stopped, run
from tracer.runs.status import Status
from tracer.runs.workers.processes import LocalPool
from tracer.store import storage
from tracer.store.run_folder import Commit, RunFolder

TINY = "fake_runs:Tiny"


@pytest.fixture(scope="module", autouse=True)
def _environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(runs.TESTS))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("FAKE_RUNS_STATE", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="module")
def store() -> Iterator[s3.Store]:
    with s3.server() as made:
        yield made


def job(path: Path, count: int = 20, ids: dict[int, str] | None = None, **more: Any) -> dict[str, Any]:
    """A job of so many prompts, some of them with an id of their own; four in a shard."""
    ids = ids or {}
    file = runs.lines(
        path / f"prompts-{count}-{len(ids)}.jsonl",
        ({"id": ids.get(number, f"p/{number}"), "text": f"prompt {number}"} for number in range(count)),
    )
    return {"kind": "dataset", "input": {"path": file}, "shard_size": 4, **more}


def inline(made: dict[str, Any], out: Any, **more: Any) -> Run:
    return run(made, out, pool=InlinePool(), factory=TINY, **more)


@contextmanager
def told_to_stop(number: int = signal.SIGTERM, after: int = 1) -> Iterator[None]:
    """The run within is sent a signal when so many units are committed, and stops."""
    commit, left = RunFolder.commit, [after]

    def counted(self: RunFolder, what: Commit) -> None:
        commit(self, what)
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "commit", counted)
        with pytest.raises(Stopped, match="of 20 done") as stopped:
            yield
    assert (stopped.value.code, stopped.value.status.state) == (128 + number, "stopped")


@pytest.fixture
def undisturbed(tmp_path: Path) -> Run:
    return inline(job(tmp_path), tmp_path / "undisturbed")


# ------------------------------------------------------------------------------------------------- all is well


def test_a_run_gives_every_prompt_one_row_and_what_is_made_of_all(tmp_path: Path) -> None:
    states: list[str] = []
    found = inline(job(tmp_path, 10), tmp_path / "run", watch=lambda one: states.append(one.state))
    assert (found.status.state, found.status.n_units, found.status.committed) == ("done", 3, 3)
    assert (found.status.n_prompts, found.status.done, found.status.failed) == (10, 10, 0)
    assert found.status.statuses == {"ok": 10}
    assert found.status.rows == {"prompts": 10, "nodes": 20, "edges": 10}
    assert (found.resumed, found.status.in_flight, found.status.deaths) == (0, 0, 0)
    for name in ("prompts", "nodes", "edges", "neurons", "edges_mean", "top_prompts", "failed"):
        assert found.table(name).num_columns > 3
    assert found.table("prompts")["user_id"].to_pylist() == [f"p/{number}" for number in range(10)]
    assert found.table("failed").num_rows == 0
    with refused(RunError, "table 'circuit'"):
        found.table("circuit")
    assert [states[0], states[-1]] == ["planning", "done"]
    assert runs.orphans(tmp_path / "run") == set()
    assert status.condition(tmp_path / "run").status.state == "done"
    assert status.condition(tmp_path / "run").problems == ()


def test_one_prompt_is_a_run_as_well_and_tracer_names_it(tmp_path: Path) -> None:
    assert tracer.run is run
    found = inline(job(tmp_path, 1), tmp_path / "run")
    assert (found.status.n_units, found.status.done) == (1, 1)


def test_workers_change_no_bit(tmp_path: Path, undisturbed: Run) -> None:
    for workers in (1, 3):
        out = tmp_path / f"{workers}"
        run(job(tmp_path), out, workers=workers, factory=TINY)
        runs.same(out, undisturbed.address)


def test_a_finished_run_is_not_done_again_and_says_so(tmp_path: Path, undisturbed: Run) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(undisturbed.address).rglob("*.parquet")}
    again = inline(job(tmp_path), undisturbed.address, watch=(seen := list[Status]()).append)
    assert again.resumed == 5
    assert {path: path.stat().st_mtime_ns for path in Path(undisturbed.address).rglob("*.parquet")} == before
    assert again.status.done == 20
    assert seen[-1].state == "done"
    assert status.condition(undisturbed.address).status.state == "done"


def test_a_run_in_a_thread_catches_no_signal(tmp_path: Path) -> None:
    found = list[Run]()
    thread = threading.Thread(target=lambda: found.append(inline(job(tmp_path), tmp_path / "run")))
    thread.start()
    thread.join()
    assert found[0].status.state == "done"


# ------------------------------------------------------------------------------------------ stopped and resumed


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_told_to_stop_keeps_what_is_done_and_goes_on(
    tmp_path: Path, undisturbed: Run, number: int, code: int
) -> None:
    before = signal.getsignal(number)
    assert 128 + number == code
    with told_to_stop(number, 2):
        inline(job(tmp_path), tmp_path / "run")
    assert signal.getsignal(number) is before
    found = status.condition(tmp_path / "run")
    assert found.status.state == "stopped"
    assert signal.Signals(number).name in str(found.status.message)
    assert found.status.done == 8
    again = inline(job(tmp_path), tmp_path / "run")
    assert again.resumed == found.status.committed > 0
    runs.same(tmp_path / "run", undisturbed.address)


def test_a_second_signal_acts_at_once() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with running._Signals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.number == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_a_driver_that_is_killed_at_any_moment_is_followed(tmp_path: Path, undisturbed: Run, seed: int) -> None:
    """SIGKILL while it plans, runs or finishes, again and again; the same command ends with the same bits."""
    slow = {number: f"slow/{number}" for number in range(20)}
    made, dice = job(tmp_path, 20, slow), random.Random(seed)
    driver = runs.Driver(made, tmp_path / "run", workers=2, factory=TINY)
    driver.committed(dice.choice([0, 4, 12]))
    time.sleep(dice.random() * 0.3)
    driver.end(signal.SIGKILL)
    inline(made, tmp_path / "run")
    inline(made, tmp_path / "whole")
    runs.same(tmp_path / "run", tmp_path / "whole")
    assert runs.orphans(tmp_path / "run") == set()


_MOMENTS = ["planning", "after the plan", "before the record", "before a commit", "after a commit", "finishing"]


@pytest.mark.parametrize("moment", _MOMENTS)
def test_a_driver_that_ends_at_the_worst_moment_is_followed(
    tmp_path: Path, undisturbed: Run, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The files of that moment, made by an exception that no driver expects."""

    class PowerCutError(BaseException):
        pass

    def cut(*_: Any, **__: Any) -> Any:
        raise PowerCutError

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        if moment == "planning":
            patch.setattr(running, "input_row", cut)
            patch.setattr(Path, "unlink", lambda *_a, **_k: None)  # its temporary file stays
        elif moment == "after the plan":
            patch.setattr(running.RunFolder, "digest_input", cut)
        elif moment == "before the record":
            patch.setattr(running.RunFolder, "begin", cut)
        elif moment == "before a commit":
            patch.setattr(running.RunFolder, "commit", cut)
        elif moment == "after a commit":
            patch.setattr(running.Tally, "add", cut)
        else:
            patch.setattr(running, "finish_run", cut)
        with pytest.raises(PowerCutError):
            inline(job(tmp_path), out)
    assert list(out.glob(".input.parquet.*")) or moment != "planning"
    inline(job(tmp_path), out)
    runs.same(out, undisturbed.address)
    assert runs.orphans(out) == set()
    assert list(out.glob(".input.parquet.*")) == []


# -------------------------------------------------------------------------------------------- prompts go wrong


def test_each_misfortune_has_its_status_and_all_others_are_ok(tmp_path: Path, undisturbed: Run) -> None:
    ids = {1: "raise/a", 6: "kill/b", 9: "once-kill/c", 14: "hang/d", 18: "once-hang/e"}
    made = job(tmp_path, 20, ids, prompt_timeout=2.0)
    found = run(made, tmp_path / "run", workers=2, factory=TINY)
    told = runs.statuses(tmp_path / "run")
    wanted = {"raise/a": ("failed", "ValueError"), "kill/b": ("quarantined", "ProcessDied")}
    wanted |= {"hang/d": ("quarantined", "PromptTimeout")}
    assert {name: how for name, how in told.items() if how != ("ok", None)} == wanted
    assert found.status.statuses == {"ok": 17, "failed": 1, "quarantined": 2}
    assert found.status.errors == {"PromptTimeout": 1, "ProcessDied": 1, "ValueError": 1}
    assert found.status.deaths in (6, 7)  # once more if another worker was there
    assert found.table("failed")["user_id"].to_pylist() == ["raise/a", "kill/b", "hang/d"]
    mine, whole = (runs.tables(one)["nodes"] for one in (tmp_path / "run", undisturbed.address))
    bad = {1, 6, 14}
    rows = [row for row in whole.to_pylist() if row["prompt_id"] not in bad]
    assert mine.to_pylist() == rows


def test_what_killed_a_driver_before_is_remembered(tmp_path: Path) -> None:
    made = job(tmp_path, 4, {2: "kill/x"})
    driver = runs.Driver(made, tmp_path / "run", workers=1, factory=TINY)
    journal = tmp_path / "run" / "_journal" / "deaths.json"
    end = time.monotonic() + 60
    while not journal.exists() and time.monotonic() < end:
        time.sleep(0.02)
    driver.end(signal.SIGKILL)
    assert json.loads(journal.read_text())["deaths"] == {"2": 1}
    found = run(made, tmp_path / "run", workers=1, factory=TINY)
    assert found.status.deaths == 1
    assert found.status.statuses == {"ok": 3, "quarantined": 1}


def test_the_failed_are_done_again_when_that_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = job(tmp_path, 20, {1: "raise/a", 2: "raise/b", 13: "kill/c"})
    first = run(made, tmp_path / "run", workers=1, factory=TINY)
    assert first.status.statuses == {"ok": 17, "failed": 2, "quarantined": 1}
    assert inline(made, tmp_path / "run").status.failed == 3  # not without being asked
    monkeypatch.setenv("FAKE_RUNS_MENDED", "1")
    again = run(made, tmp_path / "run", workers=1, factory=TINY, retry_failed=True)
    assert (again.status.statuses, again.status.errors) == ({"ok": 20}, {})
    assert again.table("failed").num_rows == 0
    inline(made, tmp_path / "whole")
    runs.same(tmp_path / "run", tmp_path / "whole")
    assert runs.orphans(tmp_path / "run") == set()


def test_a_second_try_that_is_stopped_loses_nothing(tmp_path: Path) -> None:
    made = job(tmp_path, 20, {number: f"raise/{number}" for number in (1, 6, 9, 14, 17)})
    inline(made, tmp_path / "run")
    with told_to_stop():
        inline(made, tmp_path / "run", retry_failed=True)
    found = inline(made, tmp_path / "run")
    assert found.status.statuses == {"ok": 15, "failed": 5}
    runs.tables(tmp_path / "run")


def test_strict_is_an_error_at_the_end_each_time_it_is_asked(tmp_path: Path) -> None:
    made = job(tmp_path, 8, {3: "raise/x"})
    for _ in range(2):
        with refused(RunError, "1 of 8 prompts", "ValueError 1", "retry_failed=True"):
            inline(made, tmp_path / "run", strict=True)
        assert status.condition(tmp_path / "run").status.state == "done"
    assert inline(made, tmp_path / "run").status.failed == 1
    inline(job(tmp_path), tmp_path / "well", strict=True)


def test_too_many_failures_end_the_run_and_what_is_done_stays(tmp_path: Path) -> None:
    made = job(tmp_path, 60, {number: f"raise/{number}" for number in range(12, 60)})
    with refused(RunError, "more than the 50% that is allowed", "ValueError"):
        inline(made, tmp_path / "run")
    found = status.condition(tmp_path / "run")
    assert found.status.state == "failed"
    assert 20 <= found.status.done < 40
    assert found.problems == ()
    again = inline(made | {"max_error_rate": 1.0}, tmp_path / "run")
    assert (again.resumed, again.status.done) == (found.status.committed, 60)


# ------------------------------------------------------------------------------------------- folders go wrong


def test_a_second_driver_is_refused_at_once_and_the_first_is_unharmed(tmp_path: Path) -> None:
    slow = {number: f"slow/{number}" for number in range(80)}
    made = job(tmp_path, 80, slow)
    first = runs.Driver(made, tmp_path / "run", workers=1, factory=TINY)
    first.committed(4)
    started = time.monotonic()
    for more in ({}, {"overwrite": True}, {"retry_failed": True}):
        with refused(RunError, f"process {first.process.pid}"):
            inline(made, tmp_path / "run", **more)
    with refused(RunError, f"process {first.process.pid}"):
        inline(job(tmp_path, 3), tmp_path / "run", overwrite=True)
    assert time.monotonic() - started < 3
    assert first.end() == 0
    inline(made, tmp_path / "whole")
    runs.same(tmp_path / "run", tmp_path / "whole")


def test_another_jobs_folder_is_refused_and_can_be_replaced(tmp_path: Path, undisturbed: Run) -> None:
    other = job(tmp_path, 20, nodes=7, shard_size=3)
    with refused(RunError, "holds another run: nodes, shard_size differ", "overwrite=True"):
        inline(other, undisturbed.address)
    runs.tables(undisturbed.address)
    inline(other, undisturbed.address, overwrite=True)
    inline(other, tmp_path / "whole")
    runs.same(undisturbed.address, tmp_path / "whole")
    assert runs.orphans(Path(undisturbed.address)) == set()


def test_what_does_not_decide_numbers_may_change(tmp_path: Path, undisturbed: Run) -> None:
    more = {"prompt_timeout": 5.0, "retries": 1, "max_error_rate": 0.9, "device": "cpu"}
    assert inline(job(tmp_path) | more, undisturbed.address).resumed == 5


def test_an_input_that_changed_is_refused(tmp_path: Path, undisturbed: Run) -> None:
    made = job(tmp_path)
    path = Path(made["input"]["path"])
    path.write_text(path.read_text().replace("prompt 3", "Prompt 3"))
    with refused(RunError, "the input", "has changed", "overwrite=True"):
        inline(made, undisturbed.address)
    inline(made, undisturbed.address, overwrite=True)
    assert "Prompt 3" in runs.tables(undisturbed.address)["prompts"]["text"].to_pylist()


def test_other_versions_are_refused(tmp_path: Path, undisturbed: Run) -> None:
    place = undisturbed.folder.place
    record = place.read_json("run.json")
    record["packages"]["torch"] = "1.0"
    del record["digest"]
    place.remove("_SUCCESS.json")
    place.write_json("run.json", record)
    with refused(RunError, "other versions", "torch 1.0"):
        inline(job(tmp_path), undisturbed.address)
    inline(job(tmp_path), undisturbed.address, overwrite=True)


def test_another_model_is_refused(tmp_path: Path) -> None:
    made = job(tmp_path)
    with told_to_stop():
        inline(made, tmp_path / "run")
    place = storage.Storage(tmp_path / "run")
    record = place.read_json("run.json")
    record["model"]["fingerprint"] = "1" * 16
    del record["digest"]
    place.write_json("run.json", record)
    with refused(RunError, "the model on here", "fingerprint differ"):
        inline(made, tmp_path / "run")


@pytest.mark.parametrize("how", ["flipped", "missing", "short"])
def test_a_shard_file_that_is_damaged_is_found_and_made_again(tmp_path: Path, undisturbed: Run, how: str) -> None:
    inline(job(tmp_path), tmp_path / "run")
    bad = sorted((tmp_path / "run" / "nodes").glob("2-*.parquet"))[0]
    content = bytearray(bad.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 1
        bad.write_bytes(content)
    elif how == "short":
        bad.write_bytes(content[:-20])
    else:
        bad.unlink()
    found = status.condition(tmp_path / "run")
    assert len(found.problems) == 1
    assert bad.name in found.problems[0]
    assert inline(job(tmp_path), tmp_path / "run").resumed == 4
    runs.same(tmp_path / "run", undisturbed.address)
    assert status.condition(tmp_path / "run").problems == ()


def test_a_plan_that_was_damaged_is_noticed(tmp_path: Path) -> None:
    with told_to_stop():
        inline(job(tmp_path), tmp_path / "run")
    path = tmp_path / "run" / "input.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 8] ^= 1
    path.write_bytes(content)
    with refused(RunError, "input.parquet", "overwrite=True"):
        inline(job(tmp_path), tmp_path / "run")


def test_foreign_files_are_never_touched_and_a_foreign_folder_never_written(tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "paper.tex").write_text("x")
    for more in ({}, {"overwrite": True}):
        with refused(RunError, "holds files that are not a run"):
            inline(job(tmp_path), out, **more)
    assert [path.name for path in out.iterdir()] == ["paper.tex"]
    inline(job(tmp_path), tmp_path / "run")
    foreign = [tmp_path / "run" / name for name in ("paper.tex", "nodes/mine.parquet", "_commits/notes.txt")]
    for path in foreign:
        path.write_text("x")
    inline(job(tmp_path, 6), tmp_path / "run", overwrite=True)
    assert all(path.read_text() == "x" for path in foreign)


@pytest.mark.parametrize("where", ["progress.json", "_commits/", "neurons.parquet", "input.parquet"])
def test_a_disk_that_is_full_ends_the_run_in_one_line_and_room_lets_it_go_on(
    tmp_path: Path, undisturbed: Run, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    with monkeypatch.context() as patch:
        real, left = os.fsync, [0]

        def writing(self: storage.Storage, name: str) -> Any:
            left[0] += name.startswith(where)
            if name.startswith(where) and left[0] > (where == "_commits/"):
                raise OSError(errno.ENOSPC, "No space left on device")
            return plain(self, name)

        plain = storage.Storage.writing
        patch.setattr(storage.Storage, "writing", writing)
        with refused(RunError, "No space left on device", "make room"):
            inline(job(tmp_path), tmp_path / "run")
        assert os.fsync is real
    inline(job(tmp_path), tmp_path / "run")
    runs.same(tmp_path / "run", undisturbed.address)


def test_a_place_that_cannot_be_is_told_before_anything_is_done(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with refused(RunError, "file"):
            inline(job(tmp_path), out)
    with refused(JobError, "workers=0"):
        run(job(tmp_path), tmp_path / "run", workers=0, factory=TINY)


def test_workers_that_cannot_start_end_the_run_with_the_reason(tmp_path: Path) -> None:
    with refused(RunError, "died while starting", "no_such"):
        run(job(tmp_path), tmp_path / "run", workers=1, factory="no_such:Worker")
    assert status.condition(tmp_path / "run").status.state == "failed"


def test_no_process_outlives_a_run(tmp_path: Path) -> None:
    pool = LocalPool()
    found = list[int]()

    def watch(_status: Status) -> None:
        found.extend(process.popen.pid for process in pool._processes.values())

    with refused(RunError, "more than the 50%"):
        bad = {number: f"raise/{number}" for number in range(40)}
        run(job(tmp_path, 40, bad), tmp_path / "run", workers=2, pool=pool, factory=TINY, watch=watch)
    assert found
    assert not any(_lives(pid) for pid in found)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# ------------------------------------------------------------------------------------------- an object store


def test_a_run_in_an_object_store_is_the_same_stopped_and_resumed(
    tmp_path: Path, store: s3.Store, undisturbed: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.time, "sleep", lambda _seconds: None)
    address = store.address()
    with told_to_stop(after=2):
        inline(job(tmp_path), address)
    found = inline(job(tmp_path), address)
    assert found.resumed == 2
    runs.same(address, undisturbed.address)
    assert status.condition(address).problems == ()
    commit = next(iter(found.folder.commits()))
    found.folder.place.remove(commit.files["edges"])
    assert len(status.condition(address).problems) == 1
    assert inline(job(tmp_path), address).resumed == 4
    runs.same(address, undisturbed.address)
    with refused(RunError, "holds another run"):
        inline(job(tmp_path, nodes=3), address)


def test_processes_write_to_an_object_store(tmp_path: Path, store: s3.Store, undisturbed: Run) -> None:
    address = store.address("deep/er")
    run(job(tmp_path), address, workers=2, factory=TINY)
    runs.same(address, undisturbed.address)


# ------------------------------------------------------------------------------- how its columns were read


def test_a_run_records_and_says_how_its_columns_were_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,target,topic\nx,7,t\ny,8,t\n")
    said: list[str] = []
    made = {"kind": "dataset", "input": {"path": str(path)}, "shard_size": 4}
    done = inline(made, tmp_path / "run", note=said.append)
    record = done.folder.record()
    assert record is not None
    assert record["notes"] == said
    assert said[0] == "unused columns: 'topic'"
    assert "holds '7' (line 2 of 'a.csv'), which is read as text" in said[1]


def test_a_plan_says_how_its_columns_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "The keys", "target_ids": 7, "topic": 1}\n')
    made = tracer.plan({"kind": "dataset", "input": {"path": str(path)}, "baseline": "zero"}, workers=1)
    assert made.notes == ("unused columns: 'topic'",)
    path.write_text('{"text": "The keys", "answer": " are"}\n')
    with refused(JobError, "column 'answer'", "looks like target"):
        tracer.plan({"kind": "dataset", "input": {"path": str(path)}, "baseline": "zero"}, workers=1)
