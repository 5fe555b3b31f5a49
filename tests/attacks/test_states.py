"""185 corrupted states of a run folder: each is one line, or repaired, or the right numbers; none is lost by reading.

Every file of a run, of one that ended, one that did not and one of one prompt, is missing, empty, cut, another's, of
another JSON type, without a key, nested, a folder, a link...; each is read by `status`, `query`, `show`, then gone on
with, and repaired where that was refused.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

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

PROMPT = tracer.Prompt("The secretaries near the car", target=" are", foil=" is")


class Folders(NamedTuple):
    """A run that ended, one that did not, the graphs of a real one, one of one prompt; another job's; and the job."""

    done: Path
    stopped: Path
    graphs: Path
    single: Path
    other: Path
    job: dict[str, Any]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    at = tmp_path_factory.mktemp("states")

    def job(name: str) -> dict[str, Any]:
        rows = ({"id": f"{name}/{number}", "text": f"{name} {number}"} for number in range(6))
        return {"kind": "dataset", "input": {"path": runs.lines(at / f"{name}.jsonl", rows)}, "shard_size": 2}

    for name in ("done", "other"):
        run(job("prompt" if name == "done" else name), at / name, pool=InlinePool(), factory="fake_runs:Tiny")
    shutil.copytree(at / "done", at / "stopped")
    RunFolder(at / "stopped").delete_outputs()
    RunFolder(at / "stopped").uncommit(1)
    source = {"task": "sva", "structure": "simple", "count": 4}
    real = {"kind": "dataset", "input": source, "shard_size": 2, "nodes": 15, "circuit": "aligned"}
    run(real, at / "graphs", pool=InlinePool())
    tracer.trace(tracer.load(), PROMPT, nodes=12).save(at / "single")
    return Folders(at / "done", at / "stopped", at / "graphs", at / "single", at / "other", job("prompt"))


# ------------------------------------------------------------------------------------------------- corruptions


def _json(change: Callable[[Any], Any]) -> Callable[[Path, Path], Any]:
    def corrupt(path: Path, _other: Path) -> None:
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return corrupt


def _text(change: Callable[[str], str]) -> Callable[[Path, Path], Any]:
    return lambda path, _other: path.write_text(change(path.read_text())) and None


def _without(at: int) -> Callable[[Any], Any]:
    """The JSON without the key at this place."""
    return lambda content: {key: value for index, (key, value) in enumerate(content.items()) if index != at}


def _other_type(at: int) -> Callable[[Any], Any]:
    def change(content: Any) -> Any:
        return {key: [7] if index == at else value for index, (key, value) in enumerate(content.items())}

    return change


def _folder(path: Path, _other: Path) -> None:
    path.unlink()
    path.mkdir()


def _link(path: Path, other: Path) -> None:
    path.unlink()
    path.symlink_to(other)


ANY: dict[str, Callable[[Path, Path], Any]] = {
    "missing": lambda path, _other: path.unlink(),
    "empty": lambda path, _other: path.write_bytes(b"") and None,
    "cut": lambda path, _other: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]) and None,
    "garbage": lambda path, _other: path.write_bytes(random.Random(1).randbytes(300)) and None,
    "another's": lambda path, other: shutil.copyfile(other, path) and None,
    "a folder": _folder,
    "a link": _link,
    "a link to nothing": lambda path, _other: _link(path, Path("nowhere")),
}
JSON: dict[str, Callable[[Path, Path], Any]] = {
    "a list": _json(lambda _: [1]),
    "null": _json(lambda _: None),
    "no keys": _json(lambda _: {}),
    "brackets": lambda path, _other: path.write_text("[" * 200_000) and None,
    "nested": _json(lambda content: {**content, "x": json.loads("[" * 900 + "]" * 900)}),
    "a key twice": _text(lambda text: text.replace("{", '{"schema_version": "3", "schema_version": "2",', 1)),
    "a long number": _text(lambda text: re.sub(r"\b\d+\b(?=[,\n ])", "9" * 5000, text, count=1)),
    "a large number": _text(lambda text: re.sub(r"(?<=: )\d+\b", "9" * 30, text, count=1)),
    "not a number": _text(lambda text: re.sub(r"(?<=: )\d+\b", "NaN", text, count=1)),
    "endless": _text(lambda text: re.sub(r"(?<=: )\d+(\.\d+)?\b", "1e999", text)),
    **{f"without key {at}": _json(_without(at)) for at in range(6)},
    **{f"key {at} of another type": _json(_other_type(at)) for at in range(6)},
}


class State(NamedTuple):
    """A file of one of the folders, and what happened to it."""

    folder: str
    file: str
    how: str

    def corrupt(self, folders: Folders, folder: Path) -> None:
        found, others = (sorted(at.glob(self.file)) for at in (folder, folders.other))
        kinds = ANY | JSON
        kinds[self.how](found[0], others[0] if others else folders.other / "input.parquet")


def states() -> list[State]:
    found: list[State] = []
    names = {
        "done": ["run.json", "_commits/0.json", "_SUCCESS.json", "progress.json", "input.parquet"],
        "stopped": ["run.json", "_commits/0.json", "input.parquet", "nodes/0-*.parquet", "prompts/0-*.parquet"],
        "graphs": ["run.json", "_commits/0.json", "nodes/0-*.parquet", "edges/0-*.parquet", "circuit.parquet"],
        "single": ["run.json", "_commits/0.json", "nodes/0-*.parquet", "_SUCCESS.json"],
    }
    for folder, files in names.items():
        for file in files:
            kinds = list(ANY) + (list(JSON) if file.endswith(".json") else [])
            found += [State(folder, file, how) for how in kinds]
    found.remove(State("stopped", "_commits/0.json", "missing"))  # a unit that is not done
    return found


STATES = states()


# ------------------------------------------------------------------------------------------------------- reads

VERBS: dict[str, list[list[str]]] = {
    "done": [
        ["status", "--format", "json"],
        ["query", "FROM nodes"],
        ["query", "FROM neurons"],
        ["show", "--prompt=1"],
    ],
    "stopped": [["status", "--format", "json"], ["query", "FROM prompts"], ["show", "--prompt=1"]],
    "graphs": [["show", "--prompt=1", "--format=json"], ["show", "--format=json"], ["status"]],
    "single": [["show", "--format=json"], ["query", "FROM nodes"]],
}


def asked(verb: list[str], folder: Path) -> tuple[str, Any]:
    """What a verb says: ("error", line), ("traceback", it), or ("ok", its answer); notes belong to the answer."""
    result = CliRunner().invoke(app, [verb[0], str(folder), *verb[1:]])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return "traceback", f"{type(result.exception).__name__}: {result.exception}"
    lines = result.stderr.strip().splitlines()
    if result.exit_code == 2:
        return ("error" if len(lines) == 1 and len(lines[0]) < 2000 else "traceback"), result.stderr[:500]
    if "note:" in result.stderr or "damaged" in result.stdout:
        return "error", result.stderr
    if verb == ["status", "--format", "json"] and result.exit_code in (0, 1):
        seen = json.loads(result.stdout)
        kept = {name: seen["status"][name] for name in ("n_prompts", "n_units", "committed", "statuses", "rows")}
        return ("error", "") if seen["problems"] else ("ok", kept)
    return "ok", re.sub(r"\d+ m?s ago|in [\d.]+ s", "", result.stdout)


def held(folder: Path) -> set[str]:
    """The table files of a folder that are as they were committed."""
    found = RunFolder(folder)
    return {
        name
        for commit in found.commits([])
        for table, name in commit.files.items()
        if not (folder / name).is_symlink() and not found.problems(commit, only=table)
    }


def gone_on_with(state: State, folders: Folders, folder: Path, tally: Tally) -> None:
    """The run command again; then with --repair."""
    how: dict[str, Any] = {"pool": InlinePool(), "factory": "fake_runs:Tiny"}
    try:
        before = held(folder)
    except TracerError:
        before = set()
    repairs: tuple[dict[str, Any], ...] = ({}, {"repair": True})
    for repair in repairs:
        try:
            run(folders.job, folder, **how, **repair)
        except TracerError as error:
            if "\n" in str(error):
                tally.tracebacks += 1
            if lost := {name for name in before if not (folder / name).is_file()}:
                tally.lost += 1
                tally.worst = f"{state}: {sorted(lost)[0]} is gone: {error}"
        except TypeError as error:  # an older version repairs nothing
            if "repair" not in str(error):
                raise
        else:
            try:
                runs.same(folder, folders.done)
            except AssertionError as error:
                tally.silent += 1
                tally.worst = f"{state}: {error}"
            return
    if state.how in ("missing", "empty", "cut", "garbage") and state.file in ("run.json", "input.parquet"):
        tally.lost += 1  # what can be repaired is
        tally.worst = f"{state}: not repaired"


def attacked(state: State, folders: Folders, right: dict[str, list[Any]], tally: Tally, folder: Path) -> None:
    shutil.copytree(getattr(folders, state.folder), folder, symlinks=True)
    state.corrupt(folders, folder)
    tally.tried += 1
    for verb, wanted in zip(VERBS[state.folder], right[state.folder], strict=True):
        kind, said = asked(verb, folder)
        if kind == "traceback":
            tally.tracebacks += 1
            tally.worst = f"{state} {verb}: {said}"
        elif kind == "ok" and (kind, said) != wanted:
            tally.silent += 1
            tally.worst = f"{state} {verb}: {str(said)[:300]}"
    if state.folder in ("done", "stopped"):
        try:
            gone_on_with(state, folders, folder, tally)
        except TracerError:
            raise
        except Exception as error:  # noqa: BLE001  what must not be
            tally.tracebacks += 1
            tally.worst = f"{state} run: {type(error).__name__}: {error}"


@pytest.fixture(scope="module")
def right(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[Any]]]:
    """What every verb says of folders that are as they were written: under one name, which is printed."""
    at = tmp_path_factory.mktemp("right") / "run"
    found: dict[str, list[Any]] = {}
    for name, verbs in VERBS.items():
        shutil.copytree(getattr(folders, name), at)
        found[name] = [asked(verb, at) for verb in verbs]
        shutil.rmtree(at)
    os.environ["TRACER_TEST_STATES"] = str(at)
    yield found
    del os.environ["TRACER_TEST_STATES"]


@pytest.mark.parametrize(
    "count", [16, pytest.param(len(STATES), marks=[pytest.mark.slow, pytest.mark.long])], ids=["some", "all"]
)
def test_a_corrupted_state_is_said_repaired_or_does_no_harm(
    folders: Folders, right: dict[str, list[Any]], attack: Attack, count: int
) -> None:
    assert len(STATES) >= 185
    at = Path(os.environ["TRACER_TEST_STATES"])
    with attack("185 corrupted states") as tally:
        for state in random.Random(13).sample(STATES, count):
            attacked(state, folders, right, tally, at)
            shutil.rmtree(at)
