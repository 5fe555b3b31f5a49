"""Prompts that a model answers otherwise are left out, counted and kept with its answer; what is left is as if the
others had never been there."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import runs
import tracer
from helpers import refused
from inline import InlinePool
from tracer.data import tasks
from tracer.errors import JobError, RunError
from tracer.evaluation import answers
from tracer.prompts import Prompt, encode
from tracer.runs import report
from tracer.runs.jobs import load_job
from tracer.runs.status import condition
from tracer.store.run_folder import RunFolder

N = 8


@functools.cache
def demo() -> tracer.Model:
    return tracer.load("demo")


@functools.cache
def rows() -> tuple[dict[str, Any], ...]:
    """Two hops that the demo knows; of every third the answers are exchanged, so that it says the other, and of one
    both are wrong, so that it prefers one and says neither."""
    found = []
    for number, pair in enumerate(tasks.load("capitals", split="train", count=N, vocabulary=demo())):
        right, wrong = (pair.target, pair.foil) if number % 3 else (pair.foil, pair.target)
        one = {"id": f"p{number}", "text": pair.prompt, "target": right, "foil": wrong}
        found.append(one | {"counterfactual": pair.counterfactual})
    return (
        *found[:-1],
        found[-1] | {"target": " Texas"},
    )


@functools.cache
def said() -> dict[str, tuple[int, float]]:
    """By prompt, in plain PyTorch: the model's next token, and by how much it prefers the target to the foil."""
    found = {}
    for row in rows():
        one = encode(Prompt(row["text"], target=row["target"], foil=row["foil"]), demo())
        with torch.no_grad():
            logits = demo().module(torch.tensor([one.token_ids])).logits[0, -1]
        lead = float(logits[one.target_ids[0]] - logits[one.foil_ids[0]])
        found[row["id"]] = int(logits.argmax()), lead
    return found


def kept(keep: str) -> list[str]:
    """The ids of the prompts to keep, by plain PyTorch."""
    every = {row["id"]: encode(Prompt("a", target=row["target"]), demo()).target_ids[0] for row in rows()}
    if keep == "correct":
        return [name for name, target in every.items() if said()[name][0] == target]
    return [name for name in every if said()[name][1] > 0]


def job(folder: Path, some: Sequence[dict[str, Any]] | None = None, keep: str | None = "correct", **more: Any) -> Any:
    source = {"path": runs.lines(folder / "prompts.jsonl", rows() if some is None else some)}
    source |= {} if keep is None else {"filter": keep}
    made = {"kind": "dataset", "input": source, "shard_size": 3, "nodes": 10, "batch": 1, "circuit": "aligned"}
    return made | {"baseline": "counterfactual"} | more


def go(folder: Path, name: str = "run", **more: Any) -> tracer.Run:
    return tracer.run(job(folder, **more), folder / name, pool=InlinePool(), retry_failed=False)


def outcomes(run: tracer.Run) -> dict[str, dict[str, Any]]:
    return {row["user_id"]: row for row in runs.tables(str(run.folder.place))["prompts"].to_pylist()}


# ------------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("keep", ["correct", "preferred"])
def test_prompts_are_kept_that_plain_pytorch_says_are_answered_so(tmp_path: Path, keep: str) -> None:
    found = go(tmp_path, keep=keep)
    wanted = kept(keep)
    assert 2 < len(wanted) < N
    for name, row in outcomes(found).items():
        assert row["answer"] == demo().tokenizer.decode([said()[name][0]])
        assert row["error_type"] is None
        if name in wanted:
            assert (row["status"], row["error"]) == ("ok", None)
        else:
            assert (row["status"], row["n_nodes"], row["n_edges"], row["metric"]) == ("filtered", 0, 0, None)
            assert repr(row["answer"]) in row["error"]
            assert "answers" in row["error"]
    assert found.status.statuses == {"ok": len(wanted), "filtered": N - len(wanted)}
    assert (found.status.failed, found.status.errors) == (0, {})


@pytest.mark.parametrize("circuit", ["aligned", "free"])
def test_numbers_are_those_of_a_run_of_the_kept_prompts_alone(tmp_path: Path, circuit: str) -> None:
    some = [row for row in rows() if row["id"] in kept("correct")]
    (tmp_path / "alone").mkdir()
    with_filter, alone = go(tmp_path, circuit=circuit), go(tmp_path / "alone", some=some, keep=None, circuit=circuit)
    columns = ["layer", "position", "neuron", "mean_attribution", "n_prompts"]
    one, other = (run.table("circuit").select(columns).to_pydict() for run in (with_filter, alone))
    assert one["n_prompts"] == other["n_prompts"]
    assert [one[name] for name in columns[:3]] == [other[name] for name in columns[:3]]
    assert one["mean_attribution"] == pytest.approx(other["mean_attribution"], rel=1e-12)
    names = ["layer", "position", "neuron", "attribution", "token"]
    nodes = [runs.tables(str(run.folder.place))["nodes"].select(names).to_pylist() for run in (with_filter, alone)]
    assert nodes[0] == nodes[1]


def test_the_same_job_twice_and_one_that_was_killed_are_the_same(tmp_path: Path) -> None:
    class _Killed(BaseException):
        pass

    plain, calls = answers.asked, [0]

    def asked(*given: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == 5:
            raise _Killed
        return plain(*given, **options)

    go(tmp_path, "one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "asked", asked)
        with pytest.raises(_Killed):
            go(tmp_path, "killed")
    assert list(RunFolder(tmp_path / "killed").commits())
    resumed = go(tmp_path, "killed")
    assert resumed.resumed == 1
    go(tmp_path, "two")
    for other in ("killed", "two"):
        runs.same(tmp_path / "one", tmp_path / other)


def test_what_is_left_out_is_said_and_is_no_failure(tmp_path: Path) -> None:
    found = go(tmp_path, max_error_rate=0)
    n_kept = len(kept("correct"))
    sentence = f"{n_kept} of {N} prompts kept: {N - n_kept} answered otherwise"
    assert sentence in report.run_summary(found.status, "there", 1.0, 0)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report.condition_table(condition(tmp_path / "run")))
    text = console.export_text()
    assert sentence in text
    assert "failed" not in text
    assert found.table("failed").num_rows == 0
    assert found.reasons == []
    again = tracer.run(job(tmp_path), tmp_path / "run", pool=InlinePool(), retry_failed=True)  # nothing is done again
    assert again.resumed == again.status.n_units


def test_failures_beside_them_are_counted_apart(tmp_path: Path) -> None:
    bad = {"id": "bad", "text": "The keys", "target": " are is", "foil": " is", "counterfactual": "The key"}
    found = go(tmp_path, some=[*rows(), bad])
    assert (found.status.failed, found.status.left_out) == (1, {"filtered": N - len(kept("correct"))})
    assert [row["user_id"] for row in found.table("failed").to_pylist()] == ["bad"]
    assert [reason.prompts for reason in found.reasons] == [1]
    assert "1 failed" in report.left_out(found.status)


def test_a_run_that_keeps_nothing_says_so(tmp_path: Path) -> None:
    some = [row for row in rows() if row["id"] not in kept("correct")]
    with refused(RunError, f"none of {len(some)} prompts", f"{len(some)} answered otherwise", "tracer query"):
        go(tmp_path, some=some)


def test_built_in_pairs_that_the_tokenizer_cannot_be_asked_are_skipped(tmp_path: Path) -> None:
    pairs = tasks.load("states", split="train", count=12)

    def length(text: str) -> int:
        return len(demo().tokenizer.encode(text))

    uneven = sum(length(pair.prompt) != length(pair.counterfactual) for pair in pairs)
    source = {"task": "states", "count": 12}
    made = {"kind": "dataset", "input": source, "nodes": 5, "edges": False, "baseline": "counterfactual"}
    found = tracer.run(made, tmp_path / "run", pool=InlinePool())
    assert found.status.statuses.get("skipped", 0) == uneven
    assert found.status.failed == 0
    texts = [row["error"] for row in outcomes(found).values() if row["status"] == "skipped"]
    assert all("equally long" in text for text in texts)


# ------------------------------------------------------------------------------------------------ test prompts


def test_test_prompts_are_filtered_and_counted(tmp_path: Path) -> None:
    test = {"path": runs.lines(tmp_path / "test.jsonl", rows()), "filter": "correct"}
    train = [
        {"text": pair.prompt, "target": pair.target, "foil": pair.foil, "counterfactual": pair.counterfactual}
        for pair in tasks.load("capitals", split="test", count=4, vocabulary=demo())
    ]
    go(tmp_path, some=train, keep=None, evaluate={"test": test, "sizes": [5]}, edges=False)
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    wanted = kept("correct")
    assert found["n_test"] == found["tested"]["kept"] == len(wanted)
    left = {row["text"]: said()[row["id"]][0] for row in rows() if row["id"] not in wanted}
    told = {one["text"]: one["answer"] for one in found["tested"]["answered_otherwise"]}
    assert told == {text: demo().tokenizer.decode([token]) for text, token in left.items()}
    assert f"test: {len(wanted)} of {N} prompts kept: {N - len(wanted)} answered otherwise" in found["warnings"]
    some = [row for row in rows() if row["id"] in wanted]
    (tmp_path / "alone").mkdir()
    alone = {"path": runs.lines(tmp_path / "alone" / "test.jsonl", some)}
    go(tmp_path / "alone", some=train, keep=None, evaluate={"test": alone, "sizes": [5]}, edges=False)
    other = json.loads((tmp_path / "alone" / "run" / "evaluation.json").read_text())
    assert found["curves"] == other["curves"]
    assert other["tested"] == {"kept": len(wanted), "skipped": {}, "answered_otherwise": []}


def test_a_benchmark_leaves_out_pairs_that_are_answered_otherwise(tmp_path: Path) -> None:
    made = {"kind": "benchmark", "task": "sva", "structures": "within_rc", "train": 30, "test": 20, "methods": "random"}
    made |= {"bases": "activation", "rankings": "absolute", "sizes": [5]}
    (plain,), (some,) = (
        json.loads((tracer.run(one, tmp_path / name, pool=InlinePool()).folder.place.read("results.json")).decode())[
            "outcomes"
        ]
        for name, one in (("all", made), ("some", made | {"filter": "correct"}))
    )
    assert (plain["n_train"], plain["n_test"], plain["skipped"]) == (30, 20, {})
    left = {
        f"{split}: the model answers otherwise": sum(
            not answer.kept
            for answer in tracer.filter_prompts(
                demo(),
                [one.to_prompt() for one in tasks.load("sva", structure="within_rc", split=split, count=count)],
            ).answers
        )
        for split, count in (("train", 30), ("test", 20))
    }
    assert some["skipped"] == {name: count for name, count in left.items() if count}
    assert some["n_train"] == 30 - left["train: the model answers otherwise"]
    assert some["n_test"] == 20 - left["test: the model answers otherwise"]


# ------------------------------------------------------------------------------------------------------ in Python


@pytest.mark.parametrize("keep", ["correct", "preferred"])
def test_python_keeps_the_same_prompts(keep: str) -> None:
    prompts = [Prompt(row["text"], target=row["target"], foil=row["foil"], id=row["id"]) for row in rows()]
    found = tracer.filter_prompts(demo(), prompts, keep)
    assert [prompt.id for prompt in found.kept] == kept(keep)
    assert [answer.token_id for answer in found.answers] == [said()[row["id"]][0] for row in rows()]
    assert found.summary == f"{len(kept(keep))} of {N} prompts kept: {N - len(kept(keep))} answered otherwise"


def test_of_several_targets_one_is_enough_to_be_correct() -> None:
    both = Prompt("The keys near the cabinet", target=[" are", " were"], foil=" is")
    assert tracer.filter_prompts(demo(), [both]).kept == (both,)


@pytest.mark.parametrize(
    ("prompts", "keep", "parts"),
    [
        ([], "correct", ("nothing to ask",)),
        ([Prompt("The keys", target=" are")], "right", ("'right'", "correct or preferred")),
        ([Prompt("The keys")], "correct", ("has no target",)),
        ([Prompt("The keys", target=" are")], "preferred", ("has no foil",)),
        ([Prompt("The keys", target=" are", positions=0)], "correct", ("elsewhere",)),
    ],
)
def test_what_cannot_be_asked_is_refused(prompts: list[Prompt], keep: str, parts: tuple[str, ...]) -> None:
    with refused(JobError, *parts):
        tracer.filter_prompts(demo(), prompts, keep)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"input": {"filter": "right"}}, ("filter", "correct")),
        ({"metric": "topk", "edges": False}, ("targets", "topk")),
        ({"input": {"filter": "preferred"}, "metric": "logit"}, ("preferred", "foils")),
        ({"baseline": "mean", "reference": {"path": "x", "filter": "correct"}}, ("filter has no effect on reference",)),
    ],
)
def test_jobs_whose_filter_could_not_decide_are_refused(
    tmp_path: Path, change: dict[str, Any], parts: tuple[str, ...]
) -> None:
    made = job(tmp_path)
    made |= change | {"input": made["input"] | change.get("input", {})}
    with refused(JobError, *parts):
        load_job(made)


def test_a_dataset_without_targets_is_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tracer.ndif.probe.load", lambda *_, **__: pytest.fail("loaded"))
    with refused(JobError, "none of the first 2 prompts", "has no target"):
        go(tmp_path, some=[{"text": "The keys"}, {"text": "The key"}], baseline="zero")


def test_a_job_without_a_filter_is_the_one_it_was(tmp_path: Path) -> None:
    plain = load_job(job(tmp_path, keep=None)).numbers()
    assert "filter" not in plain["input"]
    assert load_job(job(tmp_path)).numbers()["input"] == plain["input"] | {"filter": "correct"}
