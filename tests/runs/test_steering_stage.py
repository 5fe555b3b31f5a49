"""Steering at the end of a run: the numbers of `tracer.sweep`, the same bytes after a stop, what is refused early."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import tracer
from helpers import refused
from inline import InlinePool
from tracer.circuit.from_run import circuit_of
from tracer.data import tasks
from tracer.errors import JobError
from tracer.evaluation import sweep as sweeping
from tracer.evaluation.groups import WHOLE, whole_of
from tracer.runs.jobs import DatasetJob, load_job
from tracer.runs.units import ending, steering
from tracer.runs.units.ending import Ending, Step
from tracer.store.run_folder import RunFolder

INPUT = {"task": "sva", "structure": "nounpp", "count": 6}
RULES: dict[str, Any] = {"prompts": 4, "factors": [-1, 2], "tokens": [" was"], "random": 2, "seed": 5}
SUPERNODES = {"plural": [(0, 2, 5), (1, 2, 40)], "any": [{"layer": 2, "position": -1, "neuron": 7, "polarity": 1}]}


@functools.cache
def demo() -> tracer.Model:
    return tracer.load("demo")


def _grouped(end: Ending) -> Step:
    """A stage that leaves supernodes, as one of the meaning room does."""
    nodes = [node if isinstance(node, dict) else dict(zip(("layer", "position", "neuron"), node, strict=True))
             for named in SUPERNODES.values() for node in named]  # fmt: skip
    groups = [{"name": "plural", "nodes": nodes[:2]}, {"name": "any", "nodes": nodes[2:]}]
    content = {"format": "tracer-supernodes", "version": 1, "groups": groups, "pinned": []}
    return Step("grouped", 1.0, lambda _: end.folder.place.write("supernodes.json", json.dumps(content).encode()))


def run(path: Path, **changes: Any) -> Path:
    """A run whose supernodes are there when it is steered."""
    made = {"kind": "dataset", "input": INPUT, "shard_size": 4, "nodes": 15, "edges": False, "circuit": "aligned"}
    rules = RULES | changes.pop("steering", {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ending, "STEPS", (_grouped, *ending.STEPS))
        tracer.run(made | {"baseline": "counterfactual", "steering": rules} | changes, path, pool=InlinePool())
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("steered") / "whole")


def rows(path: Path, name: str = "steering") -> list[dict[str, Any]]:
    return pq.read_table(path / f"{name}.parquet").to_pylist()


def test_it_is_the_librarys_sweep_of_supernodes_and_the_whole_circuit(whole: Path) -> None:
    prompts = [pair.to_prompt() for pair in tasks.load("sva", structure="nounpp", split="train", count=4)]
    groups = SUPERNODES | {WHOLE: whole_of(circuit_of(whole))}
    wanted = tracer.sweep(demo(), groups, prompts, factors=[-1, 2], tokens=" was", random=2, seed=5)
    for name, table in (("steering", wanted.tokens), ("steering_groups", wanted.groups)):
        got = rows(whole, name)
        assert len(got) == table.num_rows > 0
        for one, other in zip(got, table.to_pylist(), strict=True):
            for column, value in other.items():
                alike = (
                    one[column] == pytest.approx(value, abs=1e-5) if isinstance(value, float) else one[column] == value
                )
                assert alike, column
    assert list(dict.fromkeys(row["group"] for row in rows(whole))) == ["plural", "any", WHOLE]
    assert (whole / "steering.png").read_bytes().startswith(b"\x89PNG")
    assert not (whole / steering.CHECKPOINT).exists()
    found = steering.sweep_of(RunFolder(str(whole)))
    assert found is not None
    names = [(one.group, one.factor, one.token) for one in wanted.responses()]
    assert [(one.group, one.factor, one.token) for one in found.responses()] == names


def test_a_stopped_stage_goes_on_and_ends_with_the_same_bytes(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped, measured, asked = tmp_path / "stopped", sweeping.measured, list[int]()

    def breaks(model: Any, prompts: Any, *more: Any) -> Iterator[Any]:
        asked.append(len(prompts))
        for number, one in enumerate(measured(model, prompts, *more)):
            if number == 2 and len(asked) == 1:
                raise JobError("stopped", "in the middle", "go on")
            yield one

    with monkeypatch.context() as patch:
        patch.setattr(sweeping, "measured", breaks)
        patch.setattr(steering, "KEPT_EVERY", -1.0)
        with refused(JobError, "in the middle"):
            run(stopped)
        assert (stopped / steering.CHECKPOINT).exists()
        run(stopped)
    assert asked == [4, 2]
    for name in ("steering.parquet", "steering_groups.parquet", "steering.png"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes(), name
    assert not (stopped / steering.CHECKPOINT).exists()


def test_a_checkpoint_of_something_else_or_a_damaged_one_is_left_alone(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = (whole / "steering.parquet").read_bytes()
    save = steering._Kept.save
    monkeypatch.setattr(steering, "KEPT_EVERY", -1.0)
    monkeypatch.setattr(steering._Kept, "save", lambda kept: save(steering._Kept(kept.folder, "other", kept.done)))
    write = ending.write_steering

    def twice(*given: Any) -> None:
        write(*given)
        assert given[2].place.exists(steering.CHECKPOINT)
        write(*given)
        given[2].place.write(steering.CHECKPOINT, b"no safetensors")
        write(*given)

    monkeypatch.setattr(ending, "write_steering", twice)
    assert (run(tmp_path / "again") / "steering.parquet").read_bytes() == wanted


def test_other_prompts(whole: Path) -> None:
    folder = RunFolder(str(whole))

    def asked(**rules: Any) -> tuple[list[int], list[str]]:
        job = load_job(json.loads((whole / "run.json").read_text())["job"] | {"steering": rules})
        assert isinstance(job, DatasetJob)
        assert job.steering is not None
        numbers, prompts = steering.prompts_of_run(demo(), job, folder, job.steering)
        return numbers, [one.text for one in prompts]

    own = [pair.prompt for pair in tasks.load("sva", structure="nounpp", split="train", count=6)]
    assert asked(prompts=100) == ([0, 1, 2, 3, 4, 5], own)
    test = {"task": "sva", "structure": "nounpp", "count": 3, "split": "test"}
    pairs = tasks.load("sva", structure="nounpp", split="test", count=3)
    assert asked(prompts=test) == ([0, 1, 2], [pair.prompt for pair in pairs])
    simple = {"task": "sva", "structure": "simple", "count": 3, "split": "test"}
    with refused(JobError, "steering.prompts", "none of the circuit's 6 tokens"):
        asked(prompts=simple)
    assert len(asked(prompts=simple, everywhere=True)[0]) == 3


def test_a_free_circuit_acts_at_every_position(tmp_path: Path) -> None:
    run(tmp_path, circuit="free", steering={"prompts": 1})
    found = [row for row in rows(tmp_path) if row["group"] == WHOLE]
    assert {row["n_nodes"] for row in found} == {15 * 6}


def test_what_a_job_cannot_steer_is_refused_before_anything_is_traced(tmp_path: Path) -> None:
    with refused(JobError, "token", "one is needed"):
        run(tmp_path / "a", steering={"tokens": [" several words"]})
    assert not list((tmp_path / "a").glob("_commits/*.json"))
    for rules, part in (
        ({"prompts": 0}, "how many of the run's own prompts"),
        ({"prompts": {"task": "sva"}}, "needs a count"),
        ({"factors": []}, "at least one"),
        ({"factors": [1, 1]}, "each once"),
        ({"factors": [float("nan")]}, "finite"),
        ({"tokens": [1.5]}, "token ids"),
        ({"prompt": 3}, "steering.prompt"),
    ):
        with refused(JobError, part):
            load_job({"kind": "dataset", "input": INPUT, "circuit": "free", "steering": rules})
    with refused(JobError, "steering has no effect without a circuit"):
        load_job({"kind": "dataset", "input": INPUT, "steering": RULES})
    with refused(JobError, "filter needs the prompts' targets"):
        source = {"path": "x.jsonl", "filter": "correct"}
        load_job(
            {"kind": "dataset", "input": INPUT, "circuit": "free", "metric": "topk", "steering": {"prompts": source}}
        )
