"""18 full disks, and one that is read-only: one line, nothing that was there is lost, and with room it goes on.

A disk is a tmpfs where this process may mount one, filled to the last bytes; and, everywhere, one on which the n-th
file that is written finds no room, for every n.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import runs
import tracer
from inline import InlinePool
from tally import Attack, Tally
from tracer import Circuit, run
from tracer.cli.app import app
from tracer.errors import RunError, TracerError
from tracer.runs.status import condition
from tracer.store import one_prompt

PROMPT = tracer.Prompt("The secretaries near the car", target=" are", foil=" is")


@pytest.fixture(scope="module")
def circuit() -> Circuit:
    return tracer.trace(tracer.load(), PROMPT, nodes=12)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tracer.Run:
    return runs.tiny(tmp_path_factory.mktemp("disks"), 8)


@contextmanager
def no_room(monkeypatch: pytest.MonkeyPatch, at: int) -> Iterator[list[int]]:
    """From the `at`-th file that is written there is no room. Gives how many were, in a list."""
    real, count = os.fsync, [0]

    def full(number: int) -> None:
        if not os.path.isdir(f"/proc/self/fd/{number}"):
            count[0] += 1
            if count[0] > at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        yield count


@contextmanager
def disk(at: Path, options: str = "size=1m") -> Iterator[Path]:
    """A small disk of its own, where this process may mount one."""
    at.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", at], check=False).returncode:
        pytest.skip("this process may mount no disk")
    try:
        yield at
    finally:
        subprocess.run(["umount", at], check=True)


def fill(folder: Path, leave: int = 0) -> Path:
    """Fill a disk but for so many bytes."""
    path = folder / "filler"
    stats = os.statvfs(folder)
    with path.open("wb", buffering=0) as file:
        left = stats.f_bavail * stats.f_frsize - leave
        try:
            while left > 0:
                left -= file.write(bytes(min(left, 4096)))
        except OSError:
            pass
    return path


def asked(tally: Tally, what: str, act: Callable[[], Any]) -> TracerError | None:
    """What it is refused with."""
    try:
        act()
    except TracerError as error:
        tally.tracebacks += "\n" in str(error)
        return error
    except Exception as error:  # noqa: BLE001  what must not be
        tally.tracebacks += 1
        tally.worst = f"{what}: {type(error).__name__}: {error}"
    return None


def contents(folder: Path) -> dict[str, bytes]:
    return {str(one.relative_to(folder)): one.read_bytes() for one in sorted(folder.rglob("*")) if one.is_file()}


# ------------------------------------------------------------------------------------------------------ a run


def again(whole: tracer.Run, folder: Path, **how: Any) -> Any:
    return run(whole.job, folder, pool=InlinePool(), factory="fake_runs:Tiny", **how)


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.long])], ids=["some", "all"])
def test_a_run_that_finds_no_room_says_failed_loses_nothing_and_goes_on(
    whole: tracer.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: Attack, step: int
) -> None:
    at = 0
    with attack("full disks: the n-th file of a run") as tally:
        for at in range(1, 100, step):
            folder = tmp_path / str(at)
            with no_room(monkeypatch, at) as count:
                error = asked(tally, f"file {at}", lambda folder=folder: again(whole, folder))
            if count[0] <= at:
                break
            tally.tried += 1
            tally.silent += error is None or "No space left" not in str(error)
            done = {name for name in contents(folder) if name.startswith("_commits/") and Path(name).name[0] != "."}
            again(whole, folder)
            tally.lost += not done <= set(contents(folder))
            same(tally, folder, whole, f"file {at}")
        assert at > 10


def same(tally: Tally, folder: Path, whole: tracer.Run, what: str) -> None:
    try:
        runs.same(folder, whole.address)
    except AssertionError as error:
        tally.silent += 1
        tally.worst = f"{what}: {error}"


@pytest.mark.parametrize("leave", [0, 8_000, 16_000, 30_000, 60_000, 100_000])
def test_a_run_on_a_full_disk_says_failed_and_goes_on_when_there_is_room(
    whole: tracer.Run, tmp_path: Path, attack: Attack, leave: int
) -> None:
    with disk(tmp_path / "disk") as at, attack("18 full disks") as tally:
        (at / "run").mkdir()
        filler = fill(at, leave)
        tally.tried += 1
        error = asked(tally, f"{leave} bytes", lambda: again(whole, at / "run"))
        if error is None:
            assert leave >= 60_000
        elif (at / "run" / "run.json").exists():
            found = condition(at / "run").status
            if found.state != "failed" or "No space left" not in str(found.message):
                tally.silent += 1
                tally.worst = f"{leave} bytes: {found}"
        filler.unlink()
        again(whole, at / "run")
        same(tally, at / "run", whole, f"{leave} bytes")


def test_a_run_that_finds_no_room_midway_says_failed(
    whole: tracer.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: Attack
) -> None:
    """The disk is full until something of it is removed, as the last progress is."""
    real, full = os.fsync, [0]

    def fsync(number: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{number}"))
        if name.name.startswith(".1.json."):
            full[0] = 1
        if full[0] and not name.is_dir() and not (full[0] > 1 and "progress" in name.name):
            full[0] += "progress" in name.name
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(number)

    with monkeypatch.context() as patch, attack("18 full disks") as tally:
        tally.tried += 1
        patch.setattr(os, "fsync", fsync)
        asked(tally, "midway", lambda: again(whole, tmp_path))
        found = condition(tmp_path).status
        tally.silent += (found.state, found.committed) != ("failed", 1)


# --------------------------------------------------------------------------------------------- one prompt, outputs


@pytest.mark.parametrize("old", [False, True], ids=["new", "over the same"])
@pytest.mark.parametrize("leave", [0, 20_000, 60_000])
def test_a_circuit_on_a_full_disk_is_the_old_one_or_the_new_one(
    circuit: Circuit, tmp_path: Path, attack: Attack, old: bool, leave: int
) -> None:
    with disk(tmp_path / "disk", "size=400k") as at, attack("18 full disks") as tally:
        if old:
            circuit.save(at / "run")
        else:
            (at / "run").mkdir()
        filler = fill(at, leave)
        tally.tried += 1
        error = asked(tally, f"{leave} bytes", lambda: circuit.save(at / "run"))
        if old and Circuit.load(at / "run") != circuit:
            tally.lost += 1
        if error is not None:
            tally.silent += "No space left" not in str(error)
        filler.unlink()
        circuit.save(at / "run")
        tally.silent += Circuit.load(at / "run") != circuit


@pytest.mark.parametrize("overwrite", [False, True], ids=["the same", "another"])
def test_no_file_of_a_circuit_that_finds_no_room_loses_the_one_that_was_there(
    circuit: Circuit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: Attack, overwrite: bool
) -> None:
    """Until there is room for all of it the old one is whole."""
    other = circuit.model_copy(update={"text": "another", "seconds": 1.0}) if overwrite else circuit
    with attack("full disks: the n-th file of a circuit") as tally:
        for at in range(4):  # three tables, and the room for the rest
            folder = tmp_path / f"{at}"
            circuit.save(folder)
            with no_room(monkeypatch, at):
                tally.tried += 1
                error = asked(tally, f"file {at}", lambda folder=folder: other.save(folder, overwrite=True))
            tally.silent += error is None
            tally.lost += Circuit.load(folder) != circuit
            other.save(folder, overwrite=True)
            tally.silent += Circuit.load(folder) != other


VERBS: dict[str, list[str]] = {
    "view": ["view", "RUN"],
    "neuronpedia": ["export", "RUN"],
    "mib": ["export", "RUN", "--format", "mib"],
    "graphml": ["export", "RUN", "--format", "graphml"],
    "csv": ["export", "RUN", "--format", "csv"],
    "evaluate": ["evaluate", "RUN", "--sizes", "2", "--ablation", "zero"],
    "import": ["import", "RUN/neuronpedia.json", "--out", "RUN/again"],
    "compact": ["compact", "MANY"],
}


def filled(at: Path, circuit: Circuit, whole: tracer.Run, kind: str) -> list[str]:
    """A circuit and a run on a disk, and the words of a command on them."""
    circuit.save(at / "run")
    shutil.copytree(whole.address, at / "many")
    return [word.replace("RUN", str(at / "run")).replace("MANY", str(at / "many")) for word in VERBS[kind]]


@pytest.mark.parametrize("kind", VERBS)
def test_an_output_on_a_full_disk_is_refused_in_a_line_and_what_was_there_stays(
    circuit: Circuit, whole: tracer.Run, tmp_path: Path, attack: Attack, kind: str
) -> None:
    with disk(tmp_path / "disk", "size=2m") as at, attack("18 full disks") as tally:
        words = filled(at, circuit, whole, kind)
        if kind == "import":
            CliRunner().invoke(app, ["export", str(at / "run")])
        if kind not in ("evaluate", "compact", "import"):
            assert CliRunner().invoke(app, words).exit_code == 0
        fill(at)
        before = contents(at)
        tally.tried += 1
        result = CliRunner().invoke(app, words)
        line = result.stderr.strip().splitlines()[-1:]
        if result.exit_code != 2 or not line or not line[0].startswith("error:") or "No space left" not in line[0]:
            tally.tracebacks += 1
            tally.worst = f"{words[0]}: {result.exception!r} {result.stderr[-300:]}"
        tally.lost += contents(at) != before
        tally.silent += Circuit.load(at / "run") != circuit


@pytest.mark.parametrize("kind", VERBS)
def test_a_disk_that_is_read_only_is_said_in_a_line(
    circuit: Circuit, whole: tracer.Run, tmp_path: Path, attack: Attack, kind: str
) -> None:
    with disk(tmp_path / "disk", "size=4m") as at, attack("read-only disks") as tally:
        words = filled(at, circuit, whole, kind)
        CliRunner().invoke(app, ["export", str(at / "run")])
        subprocess.run(["mount", "-o", "remount,ro", at], check=True)
        tally.tried += 2
        result = CliRunner().invoke(app, words)
        if result.exit_code != 2 or not result.stderr.strip().splitlines()[-1].startswith("error:"):
            tally.tracebacks += 1
            tally.worst = f"{words[0]}: {result.exception!r} {result.stderr[-300:]}"
        error = asked(tally, "run", lambda: again(whole, at / "many", overwrite=True))
        tally.silent += error is None or "Read-only" not in str(error)
        tally.lost += Circuit.load(at / "run") != circuit or bool(condition(at / "many").problems)


def test_a_query_or_a_compaction_without_room_for_temporary_files_is_a_line(
    whole: tracer.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: Attack
) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with attack("full disks: temporary files") as tally:
        for words in (["query", whole.address, "FROM nodes"], ["compact", whole.address]):
            tally.tried += 1
            result = CliRunner().invoke(app, words)
            if result.exit_code != 2 or len(result.stderr.strip().splitlines()) != 1:
                tally.tracebacks += 1
                tally.worst = f"{words[0]}: {result.exception!r}"


def test_the_tables_of_a_circuit_are_on_the_disk_before_its_commit(
    circuit: Circuit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One way to write, for one prompt and for many: a file is flushed before it has its name."""
    flushed, order, fsync, replace = set[int](), list[str](), os.fsync, os.replace

    def flush(number: int) -> None:
        flushed.add(os.fstat(number).st_ino)
        fsync(number)

    def named(source: Any, target: Any) -> None:
        assert os.stat(source).st_ino in flushed, target
        order.append(str(Path(target).relative_to(tmp_path)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", named)
    circuit.save(tmp_path)
    tables = [order.index(name) for name in order if name.endswith(".parquet")]
    assert max(tables) < order.index("_commits/0.json") < order.index("_SUCCESS.json")
    assert {name.partition("/")[0] for name in order} >= {"nodes", "edges", "prompts", "run.json"}


def test_a_folder_that_holds_another_run_is_checked_before_anything_is_computed(
    circuit: Circuit, tmp_path: Path
) -> None:
    circuit.save(tmp_path)
    with pytest.raises(RunError, match="another run"):
        one_prompt.check_writable(tmp_path, overwrite=False)
