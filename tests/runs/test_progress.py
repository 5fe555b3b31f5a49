"""Runs that take long say how far they are: within a unit, at what speed, and how long it still takes."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import tracer
from helpers import load as tiny_model
from inline import InlinePool
from tracer.attribution.attribute import attribute
from tracer.cli import terminal
from tracer.data import tasks
from tracer.prompts import Prompt
from tracer.runs import driver, report
from tracer.runs.jobs import BenchmarkJob, Combination, load_job
from tracer.runs.status import Condition, Status, condition
from tracer.runs.units import benchmark, progress
from tracer.runs.units.benchmark import Benchmark
from tracer.runs.units.progress import Stages
from tracer.runs.workers.messages import Began, Done, Report, Setup, Stage, Task
from tracer.runs.workers.scheduler import RetryLimits, Runner, _Busy

JOB = Path(__file__).parents[2] / "jobs" / "sva.yaml"
SMALL = ("structures=nounpp", "train=10", "test=6", "bases=activation", "baselines=counterfactual", "sizes=[3, 30]")


@functools.cache
def demo() -> tracer.Model:
    return tracer.load("demo")


def bench(*more: str) -> BenchmarkJob:
    job = load_job(JOB, [*SMALL, *more])
    assert isinstance(job, BenchmarkJob)
    return job


# ------------------------------------------------------------------------------------------- within a unit


def test_stages_are_told_about_once_a_second_with_their_share_of_the_work() -> None:
    told: list[Stage] = []
    now = [0.0]
    stages = Stages(told.append, [("pairs", 30.0), ("circuits", 10.0)], clock=lambda: now[0])
    pairs, circuits = stages.progress(0), stages.progress(1)
    for i in range(1, 31):  # four a second
        now[0] += 0.25
        pairs(i, 30)
    assert [one.done for one in told] == [1, 5, 9, 13, 17, 21, 25, 29]
    assert [one.share for one in told] == [pytest.approx(one.done / 40) for one in told]
    circuits(1, 100)  # another stage is told at once
    circuits(2, 100)
    assert [str(one) for one in told[-1:]] == ["1 of 100 circuits"]
    assert told[-1].share == pytest.approx(0.75 + 0.25 / 100)
    now[0] += 5
    circuits(100, 100)
    assert told[-1].share == 1.0


def test_work_grows_with_what_a_method_passes() -> None:
    cost = {name: progress.attribution_work(name, 10, 4, 500) for name in tracer.settings.METHODS}
    assert cost["random"] < cost["delta"] < cost["relp"] == cost["grad"]
    assert cost["relp"] < cost["ig"] == cost["conductance"] < cost["ig-activation"] < cost["exact"]
    assert progress.attribution_work("ig", 20, 4, 500) > cost["ig"]
    whole = progress.combination_work(bench(), Combination("nounpp", "ig", "activation", "zero"), 4, 100)
    assert whole == 10 * cost["ig"] + 2 * progress.curves_work(6, 2)


@pytest.mark.parametrize("memory", [None, 1])
def test_prompts_of_many_batches_are_counted_together(memory: int | None) -> None:
    prompts = [Prompt(token_ids=ids, target=(7,)) for ids in ((1, 5, 6, 9), (1, 8), (1, 4, 3))]
    seen: list[tuple[int, int]] = []
    attribute(tiny_model("llama"), prompts, "ig", steps=4, memory=memory, progress=lambda *at: seen.append(at))
    done = [one for one, _ in seen]
    assert done == sorted(done)
    assert {total for _, total in seen} == {4 if memory is None else 3}
    assert seen[-1][0] == seen[-1][1]
    assert len(seen) == (4 if memory is None else 12)


@pytest.mark.parametrize("method", ["relp", "ig-activation", "random"])
def test_a_combination_tells_its_pairs_and_circuits_and_no_number_changes(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)  # every report
    monkeypatch.setattr(benchmark, "_ATTRIBUTED", 1)  # pair by pair
    job, told = bench(f"methods={method}", "steps=2" if method == "ig-activation" else "seed=0"), list[Stage]()
    (one,) = job.combinations()
    heard, silent = Benchmark(job, demo()).outcome(one, told.append), Benchmark(job, demo()).outcome(one)
    without = {"attribution_seconds", "evaluation_seconds"}
    assert heard.model_dump(exclude=without) == silent.model_dump(exclude=without)
    shares = [at.share for at in told]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    names = list(dict.fromkeys(at.what for at in told))
    assert names == ["train pairs attributed", *(f"circuits ablated ({name} ranking)" for name in job.rankings)]
    pairs = [at for at in told if at.what == names[0]]
    assert {at.total for at in pairs} == {10}
    assert pairs[-1].done == 10
    for name in names[1:]:
        last = [at for at in told if at.what == name][-1]
        assert last.done == last.total == 3 * 6 * len(heard.rankings["absolute"].sizes)


# --------------------------------------------------------------------------------------------- of a run


class Clock:
    """The driver's clock: a second later each time it is asked."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        self.now += 1.0
        return self.now

    perf_counter = monotonic

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(driver, "time", made)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    return made


def watched(job: Any, out: Path) -> list[Status]:
    seen: list[Status] = []
    tracer.run(job, out, pool=InlinePool(), watch=seen.append)
    return seen


def test_a_benchmark_says_where_it_is_and_how_long_it_takes_from_its_first_combination_on(
    tmp_path: Path, clock: Clock
) -> None:
    seen = watched(bench("methods=[relp, random]"), tmp_path)
    running = [status for status in seen if status.state == "running" and status.at]
    first = [status for status in running if not status.done]
    assert first
    assert first[-1].at[0].startswith("nounpp/relp/activation/counterfactual: ")
    assert any("of 10 train pairs attributed" in status.at[0] for status in running)
    assert any("circuits ablated (signed ranking)" in status.at[0] for status in running)
    for status in running:
        assert 0 < status.partial <= 1
        assert status.rate
        assert status.eta is not None
        assert "0.0 combinations/s" not in report.line(status)
        assert f"{report.duration(status.eta)} to go" in report.line(status)
    parts = [status.partial for status in first]
    assert parts == sorted(parts)
    work = [progress.combination_work(bench(), one, demo().n_layers, demo().d_mlp)
            for one in bench("methods=[relp, random]").combinations()]  # fmt: skip
    status = first[-1]
    done = status.partial * work[0]
    # The rate is of combinations since the worker was ready: so long ago, by the clock.
    elapsed = status.partial / (status.rate or 1)
    assert status.eta == pytest.approx((sum(work) - done) * elapsed / done, abs=5)
    assert seen[-1].at == ()
    assert seen[-1].eta is None


def test_a_datasets_evaluation_says_where_it_is(tmp_path: Path, clock: Clock) -> None:
    source = {"task": "sva", "structure": "nounpp", "count": 4}
    asked = {"test": source | {"split": "test"}, "sizes": [3, 30], "minimality": 3}
    job = {"kind": "dataset", "input": source, "nodes": 10, "edges": False, "baseline": "counterfactual",
           "circuit": "aligned", "evaluate": asked, "quality": 2}  # fmt: skip
    seen = watched(job, tmp_path)
    places = [status.at[0] for status in seen if status.state == "finishing" and status.at]
    for what in ("circuits ablated", "circuits without one node ablated", "2 of 2 prompts' estimates checked"):
        assert any(what in place for place in places), what
    finishing = [status for status in seen if status.state == "finishing" and status.at]
    assert all(status.eta is not None for status in finishing)
    assert finishing[-1].eta == 0
    assert "to go" in report.line(finishing[0])


def test_places_are_of_busy_workers_and_news_of_a_service_keeps_them() -> None:
    at = Stage(what="pairs", done=3, total=10, share=0.3)
    setup = Setup(folder="", job={})
    runner = Runner(pool=InlinePool(), setup=setup, workers=1, limits=RetryLimits(prompt=None))
    runner._busy["w0"] = _Busy(Task(unit=4), 0.0)
    assert runner.places == []
    runner._handle(Began(worker="w0", prompts=(4,), done=0, at=at))
    assert [(one.unit, one.prompts, one.at) for one in runner.places] == [(4, 1, at)]
    runner._handle(
        Began.model_validate_json(Began(worker="w0", prompts=(4,), done=0, note="x", at=at).model_dump_json())
    )
    assert (runner.places[0].at, runner.waiting) == (at, "x")
    runner._handle(Done(worker="w0", report=Report(unit=4)))
    assert runner.places == []


def test_a_verb_outside_a_terminal_says_how_far_it_is_every_ten_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    with terminal.ProgressBar("ablating", clock=lambda: now[0]) as bar:
        for done in range(1, 61):  # half a second each
            now[0] += 0.5
            bar(done, 120)
        now[0] += 2
        bar(10, 50)  # the next thing that is counted
        now[0] += 8
        bar(30, 50)
    out, err = capsys.readouterr()
    assert not out
    assert err.splitlines() == [
        "ablating: 20 of 120, 50 s to go",
        "ablating: 40 of 120, 40 s to go",
        "ablating: 60 of 120, 30 s to go",
        "ablating: 30 of 50, 8 s to go",
    ]


# ----------------------------------------------------------------------------------------- wall seconds


def unsealed(out: Path, **changes: float) -> None:
    """A run as a driver leaves it that is killed before its end."""
    (out / "_SUCCESS.json").unlink()
    said = json.loads((out / "progress.json").read_text())
    (out / "progress.json").write_text(json.dumps(said | changes))


def test_seconds_are_by_the_clock_and_add_up_over_calls(tmp_path: Path, clock: Clock) -> None:
    job = bench("methods=random")
    begun = clock.now
    first = tracer.run(job, tmp_path, pool=InlinePool())
    assert 0 < first.status.total_seconds <= first.seconds <= clock.now - begun
    assert condition(tmp_path).status.total_seconds == pytest.approx(first.status.total_seconds, abs=10)
    again = tracer.run(job, tmp_path, pool=InlinePool())  # is done: takes no time
    assert again.status.total_seconds == condition(tmp_path).status.total_seconds
    unsealed(tmp_path, total_seconds=5000.0)
    resumed = tracer.run(job, tmp_path, pool=InlinePool())
    assert resumed.status.total_seconds == pytest.approx(5000 + resumed.seconds, abs=10)
    text = report.run_summary(resumed.status, "there", resumed.seconds, resumed.resumed)
    assert f"in {report.duration(resumed.seconds)}, 1 h 2" in text
    assert "over all calls" in text
    anew = tracer.run(job, tmp_path, pool=InlinePool(), overwrite=True)
    assert anew.status.total_seconds < 1000


def test_a_run_from_before_there_were_seconds_goes_on(tmp_path: Path) -> None:
    job = bench("methods=random")
    tracer.run(job, tmp_path, pool=InlinePool())
    (tmp_path / "_SUCCESS.json").unlink()
    said = json.loads((tmp_path / "progress.json").read_text())
    for name in ("seconds", "total_seconds", "left", "partial", "at"):
        said.pop(name)
    (tmp_path / "progress.json").write_text(json.dumps(said))
    assert condition(tmp_path).status.total_seconds == 0
    assert tracer.run(job, tmp_path, pool=InlinePool()).resumed == 1


# ------------------------------------------------------------------------------------------ how it is said


@pytest.mark.parametrize(
    ("per_second", "said"),
    [
        (12.54, "12.5 combinations/s"),
        (1.0, "1.0 combinations/s"),
        (0.7, "42.0 combinations a minute"),
        (1 / 14, "14 s each"),
        (1 / 200, "3 min 20 s each"),
        (1e-12, "277777 h 46 min each"),
    ],
)
def test_a_speed_is_readable_below_one_a_second(per_second: float, said: str) -> None:
    assert report.rate(per_second, "combinations") == said


def told(**fields: Any) -> Status:
    return Status(**{"kind": "benchmark", "state": "running", "n_prompts": 8, "started": 0.0, "updated": 0.0} | fields)


def test_a_line_and_a_table_say_place_speed_and_time() -> None:
    status = told(
        statuses={"ok": 2},
        at=("rc/relp/activation/zero: 37 of 98 train pairs attributed",),
        partial=0.4,
        rate=0.01,
        left=560.0,
        workers=1,
        seconds=240.0,
        total_seconds=840.0,
    )
    assert report.line(status) == (
        "running: 2 of 8 combinations, rc/relp/activation/zero: 37 of 98 train pairs attributed, 1 min 40 s each, "
        "9 min 20 s to go"
    )
    console = Console(width=160, file=io.StringIO())
    console.print(report.condition_table(Condition(status=status, problems=(), age=1.0, held=True, record={})))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in (
        "37 of 98 train pairs",
        "1 min 40 s each with 1 worker, 9 min 20 s to go",
        "14 min 0 s in all, 4 min 0 s",
    ):
        assert part in text
    assert told(state="finishing", rate=3.0).eta is None
    assert told(state="done", left=3.0).eta is None
    assert told(rate=2.0, n_prompts=10).eta == 5.0  # as of a run from before there was `left`


def test_seconds_of_train_pairs_are_no_secret_of_one_batch() -> None:
    """All pairs in one call of attribute are counted as its batches are."""
    job, seen = bench("methods=relp", "train=10"), list[tuple[int, int]]()
    pairs = tasks.load("sva", structure="nounpp", split="train", count=10)
    one = job.combinations()[0]
    loud = benchmark.mean_attribution(job, demo(), pairs, one, lambda *at: seen.append(at))
    assert torch.equal(loud, benchmark.mean_attribution(job, demo(), pairs, one))
    assert seen[-1] == (10, 10)
