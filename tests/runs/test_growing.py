"""A run grows: more prompts of the same job, and what was done stays, wherever it was stopped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import runs
from helpers import refused
from inline import InlinePool
from tracer.errors import JobError, RunError
from tracer.runs.driver import Run, run
from tracer.runs.status import condition
from tracer.store.run_folder import RunFolder

TINY = "fake_runs:Tiny"


@pytest.fixture(scope="module", autouse=True)
def _environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAKE_RUNS_STATE", str(tmp_path_factory.mktemp("state")))
        yield


def job(path: Path, limit: int | None = None, text: str = "prompt", count: int = 20, **more: Any) -> dict[str, Any]:
    """Four prompts in a shard."""
    file = runs.lines(path / "prompts.jsonl", ({"id": f"p/{n}", "text": f"{text} {n}"} for n in range(count)))
    return {"kind": "dataset", "input": {"path": file}, "shard_size": 4, **more} | ({"limit": limit} if limit else {})


def done(asked: dict[str, Any], out: Path, **options: Any) -> Run:
    return run(asked, out, pool=InlinePool(), factory=TINY, **options)


@pytest.mark.parametrize("steps", [(3, 10), (4, 8, 20), (10, 11, 12), (1, None), (10, 10)], ids=str)
def test_a_run_that_grew_is_the_run_of_all_at_once(steps: tuple[int | None, ...], tmp_path: Path) -> None:
    out, before = tmp_path / "grown", 0
    for limit in steps:
        grown = done(job(tmp_path, limit), out)
        assert grown.resumed == before // 4 + (before == limit and bool(before % 4)), "full shards are kept"
        before = limit or 20
        assert grown.status.n_prompts == grown.status.done == before
    done(job(tmp_path, steps[-1]), tmp_path / "whole")
    runs.same(out, tmp_path / "whole")
    mine, its = (RunFolder(place).record() or {} for place in (out, tmp_path / "whole"))
    assert [mine[name] for name in ("fingerprint", "numbers", "plan")] == [
        its[name] for name in ("fingerprint", "numbers", "plan")
    ]
    assert set(mine) == set(its)


@pytest.mark.parametrize("limit", ["input.limit", "limit"])
def test_either_limit_can_be_raised_and_taken_away(limit: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done(job(tmp_path), out, set=[f"{limit}=5"])
    assert done(job(tmp_path), out, set=[f"{limit}=9"]).status.done == 9
    assert done(job(tmp_path), out).status.done == 20


class LostError(Exception):
    """The machine was lost."""


@pytest.mark.parametrize("at", range(9))
@pytest.mark.parametrize("then", [10, 18])
def test_growth_that_was_interrupted_is_finished_or_taken_back(
    at: int, then: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, writes = tmp_path / "run", 0
    done(job(tmp_path, 10), out)
    place = type(RunFolder(out).place)

    def counted(name: str) -> Any:
        real = getattr(place, name)

        def call(self: Any, *args: Any, **how: Any) -> Any:
            nonlocal writes
            writes += 1
            if writes > at:
                raise LostError
            return real(self, *args, **how)

        return call

    with monkeypatch.context() as patch:
        for name in ("writing", "remove"):
            patch.setattr(place, name, counted(name))
        with pytest.raises(LostError):
            done(job(tmp_path, 18), out)
    done(job(tmp_path, then), out)
    done(job(tmp_path, then), tmp_path / "whole")
    runs.same(out, tmp_path / "whole")


def test_fewer_prompts_are_refused_and_nothing_changes(tmp_path: Path) -> None:
    out = tmp_path / "run"
    done(job(tmp_path, 10), out)
    before = {path: path.read_bytes() for path in out.rglob("*.json") if path.name != "progress.json"}
    with refused(RunError, "has 10 prompts, the job only 6", "overwrite=True"):
        done(job(tmp_path, 6), out)
    assert {path: path.read_bytes() for path in before} == before
    assert done(job(tmp_path, 10), out).resumed == 3


def test_other_prompts_are_refused_and_nothing_changes(tmp_path: Path) -> None:
    out = tmp_path / "run"
    done(job(tmp_path, 10), out)
    with refused(RunError, "other prompts than the job among its first 4"):
        done(job(tmp_path, 15, text="another"), out)
    assert done(job(tmp_path, 10), out).resumed == 3


def test_growth_with_another_setting_is_another_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    done(job(tmp_path, 10), out)
    with refused(RunError, "holds another run", "nodes"):
        done(job(tmp_path, 15, nodes=3), out)


def test_what_failed_is_done_again_as_far_as_the_run_goes(tmp_path: Path) -> None:
    out = tmp_path / "run"
    done(job(tmp_path, 10), out)
    assert done(job(tmp_path), out, retry_failed=True).status.done == 10
    assert done(job(tmp_path, 12), out, retry_failed=True).status.done == 12


def test_reasons_are_counted_without_what_they_quote(tmp_path: Path) -> None:
    rows = [{"text": "a b", "target": f" {word}"} for word in ("are", "is", "xyzzy", "plugh", "quux")]
    rows += [{"text": "", "target": " are"}, {"text": "a b", "target": " are", "foil": " are"}]
    asked = {"kind": "dataset", "input": {"path": runs.lines(tmp_path / "x.jsonl", rows)}}
    found = run(asked | {"nodes": 5, "edges": False, "max_error_rate": 1}, tmp_path / "run", pool=InlinePool())
    assert [reason.prompts for reason in found.reasons] == [3, 1, 1]
    assert found.reasons[0].message.startswith("target ' xyzzy': is ")
    assert str(found.reasons[0]).startswith("3 prompts, such as: target ' xyzzy'")
    assert condition(tmp_path / "run").reasons == tuple(found.reasons)


def test_a_job_that_can_ask_nothing_is_refused_while_it_is_planned(tmp_path: Path) -> None:
    asked = job(tmp_path, 10, baseline="counterfactual")
    with refused(JobError, "none of the first 10 prompts can be asked so", "needs a counterfactual"):
        done(asked, tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()
