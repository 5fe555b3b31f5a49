"""Runs over revisions: each part an ordinary run; killed and resumed they end with the same bytes; what differs."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import runs
import tiny
import tracer
from helpers import refused
from inline import InlinePool
from tracer.cli.app import app
from tracer.errors import JobError, RunError
from tracer.runs.driver import Run, run
from tracer.runs.jobs import RevisionsJob, load_job
from tracer.runs.pages.compared import comparison_of
from tracer.runs.status import condition
from tracer.store.run_folder import RunFolder, is_ours

TINY = "fake_runs:Tiny"
NAMES = ("a", "b", "c")
MADE = (
    *(f"{name}.{kind}" for name in ("comparison", "compared", "courses") for kind in ("parquet", "csv")),
    *("courses.png", "graphs.html", "report.html"),
)


@pytest.fixture(scope="module", autouse=True)
def _environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(runs.TESTS))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("FAKE_RUNS_STATE", str(tmp_path_factory.mktemp("state")))
        yield


def job(path: Path, count: int = 12, slow: bool = False, names: tuple[str, ...] = NAMES, **more: Any) -> dict[str, Any]:
    """A job of parts by a worker without a model."""
    rows = ({"id": f"slow/{at}" if slow else f"p/{at}", "text": f"prompt {at}"} for at in range(count))
    file = runs.lines(path / f"prompts-{count}-{slow}.jsonl", rows)
    part = {"input": {"path": file}, "shard_size": 4}
    return {"kind": "revisions", "checkpoints": [*names], "trace": part} | more


def inline(made: dict[str, Any], out: Path, **how: Any) -> Run:
    return run(made, out, pool=InlinePool(), factory=TINY, **how)


def same(one: Path, other: Path) -> None:
    """Two runs hold the same parts and the same comparison, byte for byte."""
    for name in NAMES:
        runs.same(one / "revisions" / name, other / "revisions" / name)
    for name in MADE:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


# ------------------------------------------------------------------------------------------------ killed, resumed


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_a_driver_that_is_killed_at_any_moment_is_followed(tmp_path: Path, seed: int) -> None:
    made, dice = job(tmp_path, slow=True), random.Random(seed)
    driver = runs.Driver(made, tmp_path / "run", workers=1, factory=TINY)
    driver.committed(dice.choice([4, 12, 20, 28]))
    time.sleep(dice.random() * 0.3)
    driver.end(signal.SIGKILL)
    done = inline(made, tmp_path / "run")
    assert done.resumed > 0
    assert done.status.done == 36
    inline(made, tmp_path / "whole")
    same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_a_driver_that_is_stopped_says_so_and_goes_on(tmp_path: Path) -> None:
    made = job(tmp_path, slow=True)
    driver = runs.Driver(made, tmp_path / "run", workers=1, factory=TINY)
    driver.committed(16)
    assert driver.end(signal.SIGTERM) == 128 + signal.SIGTERM
    seen = condition(tmp_path / "run").status
    assert seen.kind == "revisions"
    assert seen.state == "stopped"
    assert 16 <= seen.done < 36
    inline(made, tmp_path / "run")
    inline(made, tmp_path / "whole")
    same(tmp_path / "run", tmp_path / "whole")


def test_a_run_that_is_done_is_done_again_in_no_time_with_the_same_bytes(tmp_path: Path) -> None:
    made = job(tmp_path)
    inline(made, tmp_path / "run")
    before = {name: (tmp_path / "run" / name).read_bytes() for name in (*MADE, "run.json", "_SUCCESS.json")}
    again = inline(made, tmp_path / "run")
    assert again.resumed == 9
    assert before == {name: (tmp_path / "run" / name).read_bytes() for name in before}


# ------------------------------------------------------------------------------------------------ which run it is


def test_more_revisions_can_be_added_and_what_is_done_stays(tmp_path: Path) -> None:
    inline(job(tmp_path, names=("a", "c")), tmp_path / "run")
    more = inline(job(tmp_path), tmp_path / "run")
    assert more.resumed == 6
    inline(job(tmp_path), tmp_path / "whole")
    same(tmp_path / "run", tmp_path / "whole")


def test_another_job_is_refused_and_overwritten_if_asked(tmp_path: Path) -> None:
    inline(job(tmp_path), tmp_path / "run")
    other = job(tmp_path, compare={"seed": 7})
    with refused(RunError, "compare.seed"):
        inline(other, tmp_path / "run")
    fewer = job(tmp_path, count=8)
    with refused(RunError, "trace.input"):
        inline(fewer, tmp_path / "run")
    inline(fewer, tmp_path / "run", overwrite=True)
    inline(fewer, tmp_path / "whole")
    same(tmp_path / "run", tmp_path / "whole")
    dataset = {"kind": "dataset"} | fewer["trace"]
    with refused(RunError, "another kind"):
        inline(dataset, tmp_path / "run")
    inline(dataset, tmp_path / "run", overwrite=True)
    assert not list((tmp_path / "run" / "revisions").rglob("*.parquet"))
    with refused(RunError, "not a run"):
        (tmp_path / "else").mkdir()
        (tmp_path / "else" / "mine.txt").write_text("mine")
        inline(fewer, tmp_path / "else")


def test_damage_in_a_part_or_in_the_comparison_is_seen(tmp_path: Path) -> None:
    inline(job(tmp_path), tmp_path / "run")
    assert condition(tmp_path / "run").problems == ()
    (tmp_path / "run" / "comparison.parquet").write_bytes(b"no")
    nodes = next((tmp_path / "run" / "revisions" / "b" / "nodes").iterdir())
    nodes.write_bytes(nodes.read_bytes()[:-9] + b"123456789")
    said = " ".join(condition(tmp_path / "run").problems)
    assert "comparison.parquet" in said
    assert "b: nodes/" in said
    inline(job(tmp_path), tmp_path / "run")
    assert condition(tmp_path / "run").problems == ()


def test_a_record_that_is_lost_is_made_again_if_asked_and_nothing_takes_its_parts(tmp_path: Path) -> None:
    made = job(tmp_path)
    inline(made, tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    for other in (made, {"kind": "dataset"} | made["trace"]):
        with refused(RunError, "not a run"):
            inline(other, tmp_path / "run")
    assert inline(made, tmp_path / "run", repair=True).resumed == 9
    assert condition(tmp_path / "run").problems == ()


def test_only_a_parts_own_files_are_ours() -> None:
    assert is_ours("revisions/step-100/run.json")
    assert is_ours("revisions/a/nodes/3-0123456789ab.parquet")
    assert not is_ours("revisions/a/mine.txt")
    assert not is_ours("revisions/a b/run.json")


# ------------------------------------------------------------------------------------------------ its numbers


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A run over two random models."""
    root = tmp_path_factory.mktemp("real")
    folders = [tiny.save(tiny.tiny("llama", seed=seed), root / f"step{10 * seed}") for seed in (1, 2)]
    rows = [{"token_ids": [1, 5 + at, 7, 8 + at, 9], "target_ids": [40], "foil_ids": [50]} for at in range(6)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    part = {"input": {"path": str(root / "prompts.jsonl")}, "nodes": 15, "circuit": "aligned", "shard_size": 4}
    made = {"kind": "revisions", "checkpoints": [str(folder) for folder in folders], "trace": part}
    run(made, root / "run", pool=InlinePool())
    return root / "run", folders


def test_it_is_what_the_library_says_of_the_same_models(real: tuple[Path, list[Path]]) -> None:
    out, folders = real
    prompts = [tracer.Prompt(token_ids=[1, 5 + at, 7, 8 + at, 9], target=40, foil=50) for at in range(6)]
    wanted = tracer.compare(*(tracer.load(str(folder)) for folder in folders), prompts, nodes=15)
    found = comparison_of(RunFolder(out))
    assert found.every
    assert found.names == ("step10", "step20") == wanted.names
    mine, its = (
        {(row["layer"], row["neuron"]): row for row in one.to_pylist()}
        for one in (pq.read_table(out / "comparison.parquet"), wanted.nodes)
    )
    assert mine.keys() == its.keys()
    for key, row in mine.items():
        for name in ("attribution_first", "attribution_last", "difference", "low", "high"):
            assert row[name] == pytest.approx(its[key][name], abs=1e-4)
        assert row["change"] == its[key]["change"]
    again = tracer.compare(out)
    assert again.nodes.equals(found.nodes)


def test_its_verbs(real: tuple[Path, list[Path]], tmp_path: Path) -> None:
    out, _ = real
    before = (out / "report.html").read_bytes()
    for words, wanted in (
        (["status", str(out)], "6 of 6"),
        (["query", str(out), "select name, overlap from compared"], "step20"),
        (["report", str(out)], "report.html"),
        (["report", str(out), "--out", str(tmp_path / "page.html")], "page.html"),
        (["compare", str(out)], "step10 and step20"),
        (["show", str(out / "revisions" / "step10")], "step10"),
    ):
        said = CliRunner().invoke(app, words)
        assert said.exit_code == 0, said.output
        assert wanted in said.output or words[0] == "status", said.output
    assert (out / "report.html").read_bytes() == before


def test_a_plan_is_that_of_one_part(real: tuple[Path, list[Path]]) -> None:
    _, folders = real
    made = {"kind": "revisions", "checkpoints": [str(folder) for folder in folders]}
    planned = tracer.plan(
        made | {"trace": {"input": {"task": "sva", "structure": "nounpp", "count": 4}}, "values": False}
    )
    assert any("one of 2 revisions" in note for note in planned.notes)


# ------------------------------------------------------------------------------------------------ its job


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"checkpoints": []}, "give one of them"),
        ({"revisions": ["x", "y"]}, "give one of them"),
        ({"checkpoints": ["a"]}, "two or more"),
        ({"checkpoints": ["a", "a"]}, "each once"),
        ({"trace": {"input": {"task": "sva", "structure": "rc", "count": 4}, "model": "x"}}, "no effect"),
        ({"trace": {"input": {"task": "sva", "structure": "rc", "count": 4}, "node": 5}}, "'trace.node'"),
        ({"compare": {"permutations": 5}}, "permutations"),
        ({"compare": {"rate": 5}}, "'compare.rate'"),
        ({"trace": None}, "trace"),
    ],
)
def test_a_job_that_makes_no_sense_is_refused(change: dict[str, Any], said: str) -> None:
    content = {
        "kind": "revisions",
        "checkpoints": ["a", "b"],
        "trace": {"input": {"task": "sva", "structure": "rc", "count": 4}},
    }
    with refused(JobError, said):
        load_job(content | change)


def test_parts_are_named_by_what_tells_them_apart() -> None:
    part = {"input": {"task": "sva", "structure": "rc", "count": 4}}
    for given, names in (
        ({"checkpoints": ["x/step-1", "x/step-2"]}, ["step-1", "step-2"]),
        ({"checkpoints": ["x/1/last", "x/2/last"]}, ["1-last", "2-last"]),
        ({"revisions": ["refs/pr/1", "main"]}, ["1", "main"]),
        ({"adapters": ["lora/legal"]}, ["base", "legal"]),
    ):
        made = load_job({"kind": "revisions", "trace": part} | given)
        assert isinstance(made, RevisionsJob)
        assert list(made.parts()) == names
    both = made.parts()
    assert (both["base"].adapter, both["legal"].adapter) == (None, "lora/legal")
    assert all(one.values for one in both.values())


def test_the_job_in_the_repository_is_one() -> None:
    made = load_job("jobs/revisions.yaml")
    assert isinstance(made, RevisionsJob)
    assert len(made.parts()) == 3
