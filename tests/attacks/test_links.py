"""Nothing is read or written through a link, by a name that leads out of the folder, or over what is not a file."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import runs
import tracer
from inline import InlinePool
from tally import Attack, Tally
from tracer import run
from tracer.cli.app import app
from tracer.errors import TracerError
from tracer.store.run_folder import RunFolder
from tracer.store.storage import Storage

PROMPT = tracer.Prompt("The secretaries near the car", target=" are", foil=" is")
SECRET = b"not the run's"


def some(names: list[str], *few: str) -> list[Any]:
    """All of them; by default a few."""
    byhand = [pytest.mark.slow, pytest.mark.long]
    return [name if name in few else pytest.param(name, marks=byhand) for name in names]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tracer.trace(tracer.load(), PROMPT, nodes=8).save(tmp_path_factory.mktemp("links") / "run"))


def verb(*words: Any) -> str:
    """What a verb says on standard error; a traceback is raised."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stderr


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """Somebody's file, which nobody may write."""
    path = tmp_path / "victim"
    path.write_bytes(SECRET)
    return path


EVALUATE = ["evaluate", "RUN", "--sizes", "2", "--ablation", "zero", "--seed", "0"]
OUTPUTS: dict[str, tuple[list[str], list[str]]] = {
    "view": (["view", "RUN"], ["graph.html"]),
    "view --out": (["view", "RUN", "--out", "RUN/x.html"], ["x.html"]),
    "export": (["export", "RUN"], ["neuronpedia.json"]),
    "mib": (["export", "RUN", "--format", "mib"], ["mib.json"]),
    "graphml": (["export", "RUN", "--format", "graphml"], ["graphml.graphml"]),
    "csv": (["export", "RUN", "--format", "csv"], ["csv.nodes.csv", "csv.edges.csv"]),
    "evaluate": (EVALUATE, ["evaluation.json", "evaluation.png", "report.html"]),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_no_output_is_written_through_a_link(
    single: Path, tmp_path: Path, victim: Path, kind: str, attack: Attack
) -> None:
    words, names = [word.replace("RUN", str(tmp_path / "run")) for word in OUTPUTS[kind][0]], OUTPUTS[kind][1]
    links = [victim, tmp_path / "made", Path("../victim")]
    with attack("links and names") as tally:
        for link in links[:1] if kind == "evaluate" else links:
            shutil.copytree(single, tmp_path / "run")
            for name in names:
                (tmp_path / "run" / name).symlink_to(link)
                tally.tried += 1
            error = verb(*words)
            assert "error:" not in error, error
            tally.marks += victim.read_bytes() != SECRET or (tmp_path / "made").exists()
            for name in names:
                tally.marks += (tmp_path / "run" / name).is_symlink()
                assert (tmp_path / "run" / name).stat().st_size > 100
            shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize("kind", ["view", "export", "csv", "evaluate"])
def test_a_folder_a_pipe_or_a_device_where_an_output_goes_is_named(
    single: Path, tmp_path: Path, kind: str, attack: Attack
) -> None:
    words, names = [word.replace("RUN", str(tmp_path / "run")) for word in OUTPUTS[kind][0]], OUTPUTS[kind][1]
    makes: list[Callable[[Path], Any]] = [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/null")]
    with attack("links and names") as tally:
        for name in names:
            for make in makes:
                shutil.copytree(single, tmp_path / "run")
                make(path := tmp_path / "run" / name)
                before = stat.S_IFMT(path.lstat().st_mode)
                tally.tried += 1
                error = verb(*words)
                if not (error.startswith("error:") and name in error and error.count("\n") == 1):
                    tally.silent += 1
                    tally.worst = error
                tally.marks += stat.S_IFMT(path.lstat().st_mode) != before
                assert [one.name for one in (tmp_path / "run").iterdir() if one.name.startswith(f".{name}")] == []
                shutil.rmtree(tmp_path / "run")


def test_what_is_written_again_keeps_its_rights(single: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.touch(0o600)
    verb("view", single, "--out", page)
    assert stat.S_IMODE(page.stat().st_mode) == 0o600
    verb("view", single, "--out", tmp_path / "new.html")
    assert stat.S_IMODE((tmp_path / "new.html").stat().st_mode) == 0o666 & ~_umask()


def _umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


# ------------------------------------------------------------------------------------------------- run folders


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tracer.Run:
    return runs.tiny(tmp_path_factory.mktemp("folder"))


def again(done: tracer.Run, folder: Path, **how: Any) -> None:
    run(done.job, folder, pool=InlinePool(), factory="fake_runs:Tiny", **how)


def harmless(tally: Tally, what: str, act: Callable[[], Any]) -> None:
    """It ends, in success or in a line."""
    try:
        act()
    except TracerError as error:
        tally.tracebacks += "\n" in str(error)
    except Exception as error:  # noqa: BLE001  what must not be
        tally.tracebacks += 1
        tally.worst = f"{what}: {type(error).__name__}: {error}"


def everything(tally: Tally, done: tracer.Run, folder: Path) -> None:
    """Every reader and every writer of a run folder, one after the other."""
    for words in (["status"], ["query", "FROM nodes"], ["compact"], ["show", "--prompt=1"], ["evaluate"]):
        harmless(tally, words[0], lambda words=words: verb(words[0], folder, *words[1:]))
    for how in ({}, {"retry_failed": True}, {"overwrite": True}):
        harmless(tally, f"run {how}", lambda how=how: again(done, folder, **how))


FILES = ["run.json", "_SUCCESS.json", "progress.json", "input.parquet", "neurons.parquet"]
PARTS = ["nodes", "edges", "prompts", "_commits", "_journal", "compact", "run.json", "input.parquet", "progress.json"]
PARTS += ["_SUCCESS.json", "neurons.parquet", "failed.parquet", ".lock", "_commits/0.json", "nodes/0-*.parquet"]


@pytest.mark.parametrize("part", some(PARTS, "nodes", "_commits", "run.json", "input.parquet", ".lock"))
def test_no_file_or_folder_of_a_run_may_be_a_link(done: tracer.Run, tmp_path: Path, part: str, attack: Attack) -> None:
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    shutil.copytree(done.address, folder)
    path = next(iter(folder.glob(part)), folder / part)
    if path.exists():
        shutil.move(path, elsewhere)
    elif path.suffix or part.startswith("."):
        elsewhere.write_bytes(SECRET)
    else:
        elsewhere.mkdir()
    path.symlink_to(elsewhere)
    before = contents(elsewhere)
    with attack("links and names") as tally:
        tally.tried += 1
        everything(tally, done, folder)
        tally.marks += contents(elsewhere) != before


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    return {str(one): one.read_bytes() for one in files}


@pytest.mark.parametrize("name", some(FILES, "run.json", "_SUCCESS.json"))
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_a_folder_or_a_pipe_where_a_file_should_be_is_named(
    done: tracer.Run, tmp_path: Path, name: str, make: Callable[[Path], Any], attack: Attack
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(done.address, folder)
    (folder / name).unlink()
    make(folder / name)
    with attack("links and names") as tally:
        tally.tried += 1
        said = CliRunner().invoke(app, ["status", str(folder)])
        tally.silent += name not in said.output and name != "progress.json"
        everything(tally, done, folder)


NAMES = [
    "../../victim/x.parquet",
    "/etc/hostname",
    "nodes/../../victim/x.parquet",
    "victim/x.parquet",
    "nodes/x.parquet",
]
NAMES += ["prompts/0-000000000000.parquet", "nodes/1-000000000000.parquet", "nodes/0-00000000000g.parquet", "", "nodes"]
NAMES += ["nodes/0-000000000000.parquet\n", "nodes\\0-000000000000.parquet", "run.json", "_commits/0.json", "nodes//0"]


@pytest.mark.parametrize("name", some(NAMES, *NAMES[:3], "victim/x.parquet", "nodes/x.parquet"))
def test_a_commit_that_names_anothers_file_reads_and_deletes_none(
    done: tracer.Run, tmp_path: Path, name: str, attack: Attack
) -> None:
    folder = tmp_path / "a" / "run"
    shutil.copytree(done.address, folder)
    (theirs := tmp_path / "victim").mkdir()
    shutil.copyfile(next(folder.glob("nodes/0-*")), theirs / "x.parquet")
    before = contents(theirs)
    commit = json.loads((folder / "_commits" / "0.json").read_text())
    commit.pop("digest", None)
    commit["files"]["nodes"] = name
    commit["statuses"] = {"ok": 1, "failed": 3}  # for --retry-failed
    (folder / "_commits" / "0.json").write_text(json.dumps(commit))
    (folder / "_SUCCESS.json").unlink()
    with attack("links and names") as tally:
        tally.tried += 1
        try:
            list(RunFolder(folder).commits())
            tally.silent += 1
        except TracerError:
            pass
        everything(tally, done, folder)
        tally.marks += contents(theirs) != before


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "a//b", "./a", "a/.", "a\0b"])
def test_a_name_that_leads_out_of_a_place_is_refused(tmp_path: Path, name: str, attack: Attack) -> None:
    place = Storage(tmp_path / "run")
    place.write("a/b", b"x")
    with attack("links and names") as tally:
        for act in (place.read, place.exists, place.size, place.files, place.path):
            tally.tried += 1
            try:
                act(name)
                tally.silent += 1
            except TracerError:
                pass


def test_a_success_that_names_anothers_file_is_damaged(done: tracer.Run, tmp_path: Path, attack: Attack) -> None:
    folder = tmp_path / "run"
    shutil.copytree(done.address, folder)
    sealed = json.loads((folder / "_SUCCESS.json").read_text())
    with attack("links and names") as tally:
        for name in ("../../../dev/zero", "nodes/../../x", "/dev/zero"):
            (folder / "_SUCCESS.json").write_text(json.dumps({**sealed, "files": {name: "0"}}))
            tally.tried += 1
            tally.silent += "_SUCCESS.json is damaged" not in " ".join(RunFolder(folder).check_outputs())


def test_a_name_that_is_not_utf8_is_said(tmp_path: Path, attack: Attack) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    with attack("links and names") as tally:
        for words in (["status", odd], ["show", odd], ["query", odd, "FROM nodes"], ["compact", odd], ["view", odd]):
            tally.tried += 1
            harmless(tally, words[0], lambda words=words: verb(*words))
        (tmp_path / "run").mkdir()
        Path(os.fsdecode(os.fsencode(tmp_path / "run") + b"/\xff")).touch()
        tally.tried += 1
        try:
            RunFolder(tmp_path / "run").check()
            tally.silent += 1
        except TracerError:
            pass
