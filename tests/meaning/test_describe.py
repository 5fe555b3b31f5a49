"""Descriptions of a run's neurons: their scores, what stays when asking is interrupted, what works without a model."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import chat_stub
import children
import described
import tracer
from chat_stub import Raw, Silence, Stub, completion, data_of
from faulty import MODEL
from helpers import refused
from tracer.cli.app import app
from tracer.errors import JobError, RemoteError, RunError
from tracer.meaning import describe as describing
from tracer.meaning.budget import BoundError, Bounds
from tracer.meaning.evidence import strongest
from tracer.store import one_prompt, schemas
from tracer.store.run_folder import RunFolder

KEY = "sk-0badc0de5ec24e708a115ec2e7a11cee"


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    with chat_stub.served() as made:
        monkeypatch.setenv("TRACER_LLM_URL", made.url)
        monkeypatch.setenv("TRACER_LLM_MODEL", "stub-1")
        monkeypatch.setenv("TRACER_LLM_KEY", KEY)
        made.answers = described.model
        yield made


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRACER_LLM_URL", "TRACER_LLM_MODEL", "TRACER_LLM_KEY"):
        monkeypatch.delenv(name, raising=False)


def table(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "descriptions.parquet").to_pylist()


def truth(key: tuple[int, int, int], description: str) -> float:
    """The score of a description, from the exemplars and the stub's model alone: of six strongest texts 1, 3 and 5 are
    held out, and all others."""
    rows = described.exemplars(*key)
    held = [row for row in rows if row["kind"] != "top" or row["rank"] % 2 == 1]
    true = np.array([max(0.0, key[2] * value) for row in held for value in row["values"]], np.float32)
    guessed = [float(described.guess(description, token)) for row in held for token in row["tokens"]]
    return float(np.corrcoef(true.astype(float), guessed)[0, 1])


# ------------------------------------------------------------------------------------------------ a whole run


def test_each_neuron_has_the_candidate_that_says_best_where_it_is_active(stub: Stub, tmp_path: Path) -> None:
    run = described.write(tmp_path / "run", tokens=True)
    seen: list[tuple[int, int]] = []
    found = tracer.describe(run.place.address, candidates=3, progress=lambda *at: seen.append(at))
    assert found.stopped is None
    assert seen == [(1, 3), (2, 3), (3, 3)]
    rows = table(tmp_path / "run")
    assert rows == found.table.to_pylist()
    assert found.table.schema.equals(schemas.DESCRIPTIONS)
    assert [(row["layer"], row["neuron"], row["polarity"]) for row in rows] == sorted(described.NEURONS)
    about = json.loads((tmp_path / "run" / "descriptions.json").read_text())
    for row, told in zip(rows, about["neurons"], strict=True):
        key = (row["layer"], row["neuron"], row["polarity"])
        scores = {one["description"]: one["score"] for one in told["candidates"]}
        assert scores == pytest.approx({text: truth(key, text) for text in scores}, rel=1e-9)
        assert len(scores) == 3
        assert row["description"] == max(scores, key=lambda text: scores[text])
        assert row["score"] == pytest.approx(max(scores.values()), rel=1e-6)
        assert row["source"] == told["model"] == "stub-1"
        assert (told["texts_shown"], told["texts_held_out"], told["tokens_held_out"]) == (3, 7, 84)
    assert about["spent"]["calls"] == stub.calls == found.spent.calls == 18
    assert found.spent.tokens == 18 * 460
    for body in stub.asked:  # a describer sees what promotes, a simulator sees words alone
        assert data_of(body).keys() in ({"texts", "promoted"}, {"description", "texts"})
    assert describing.rows(tmp_path / "run")[0] == {
        "neuron": "L0 N2-",
        "description": rows[0]["description"],
        "score": rows[0]["score"],
        "measured": "best of 3 on 84 held-out tokens of 7 texts",
        "source": "stub-1",
    }


def test_what_a_simulator_gets_was_not_shown_to_the_describer(stub: Stub, tmp_path: Path) -> None:
    tracer.describe(described.write(tmp_path / "run").place.address, candidates=1)
    shown, held = list[set[tuple[str, ...]]](), list[set[tuple[str, ...]]]()
    for body in stub.asked:
        asked = data_of(body)
        if "description" in asked:
            held.append({tuple(token for _, token in text) for text in asked["texts"]})
        else:
            shown.append({tuple(token for token, _ in text) for text in asked["texts"]})
    assert (len(shown), len(held)) == (3, 3)
    assert set().union(*shown).isdisjoint(set().union(*held))


def test_a_run_that_ended_stays_whole_and_its_key_is_nowhere(stub: Stub, tmp_path: Path) -> None:
    run = described.write(tmp_path / "run")
    tracer.describe(tmp_path / "run", candidates=1)
    assert run.check_outputs() == []
    assert run.read_output("descriptions.parquet").num_rows == 3
    one_prompt.read_run(tmp_path / "run")
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(KEY.encode() in content for content in files)
    assert not list(tmp_path.rglob(".*.json.*"))
    path = tmp_path / "run" / "descriptions.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with refused(RunError, "descriptions.parquet"):
        tracer.describe(tmp_path / "run", candidates=1)


def test_descriptions_of_other_neurons_stay_and_can_be_elsewhere(stub: Stub, tmp_path: Path) -> None:
    described.write(tmp_path / "run")
    tracer.describe(tmp_path / "run", top=1, candidates=1)
    (first,) = table(tmp_path / "run")
    assert (first["layer"], first["neuron"]) == (3, 7)  # the strongest
    tracer.describe(tmp_path / "run", top=3, candidates=1)
    assert first in table(tmp_path / "run")
    assert stub.calls == 6
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    tracer.describe(tmp_path / "run", top=2, candidates=1, out=tmp_path / "other")
    assert len(table(tmp_path / "other")) == 2
    assert stub.calls == 10  # other answers are not in that folder
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_tokens_alone_give_descriptions_without_a_score(stub: Stub, tmp_path: Path) -> None:
    described.write(tmp_path / "run", texts=False, tokens=True)
    tracer.describe(tmp_path / "run", candidates=2)
    assert [row["score"] for row in table(tmp_path / "run")] == [None] * 3
    assert stub.calls == 6
    told = json.loads((tmp_path / "run" / "descriptions.json").read_text())["neurons"][0]
    assert {one["no_score"] for one in told["candidates"]} == {"no text is held out"}
    assert describing.rows(tmp_path / "run")[0]["measured"] == ""


def test_exemplars_can_come_from_another_folder(stub: Stub, tmp_path: Path) -> None:
    described.write(tmp_path / "run", texts=False)
    with refused(JobError, "neither texts nor promoted tokens", "exemplars="):
        tracer.describe(tmp_path / "run")
    with refused(RunError, "no exemplars.parquet"):
        tracer.describe(tmp_path / "run", exemplars=tmp_path / "run")
    described.write(tmp_path / "texts")
    tracer.describe(tmp_path / "run", exemplars=tmp_path / "texts", candidates=1)
    assert len(table(tmp_path / "run")) == 3


def test_refusals_are_no_description_with_their_reason(stub: Stub, tmp_path: Path) -> None:
    first = described.exemplars(*described.NEURONS[1])[0]["tokens"]

    def answers(body: dict[str, Any], before: int) -> Any:
        if first in [[token for token, _ in text] for text in data_of(body)["texts"]]:
            return completion(None, message={"refusal": "it is \x1b[2J private"})
        return described.model(body, before)

    stub.answers = answers
    described.write(tmp_path / "run")
    for calls in (10, 0):  # a refusal is an answer, and kept
        stub.asked.clear()
        found = tracer.describe(tmp_path / "run", candidates=2)
        assert [(row["layer"], row["neuron"]) for row in table(tmp_path / "run")] == [(1, 5), (3, 7)]
        (none,) = [one for one in found.outcomes if not one.candidates]
        assert none.none == "refused (it is \\x1b[2J private)"
        assert (stub.calls, found.spent.refused) == (calls, 2)


def test_a_simulation_that_cannot_be_read_leaves_a_description_without_score(stub: Stub, tmp_path: Path) -> None:
    described.write(tmp_path / "run")
    stub.answers = lambda body, n: (
        '{"active": [[99, 0, 5]]}' if "description" in data_of(body) else described.model(body, n)
    )
    found = tracer.describe(tmp_path / "run", top=1, candidates=1)
    ((candidate,),) = [one.candidates for one in found.outcomes]
    assert candidate.score.value is None
    assert "answered 3 times otherwise than asked" in candidate.score.why
    assert table(tmp_path / "run")[0]["score"] is None


# ------------------------------------------------------------------------------------------------ interrupted


def whole(stub: Stub, folder: Path) -> tuple[list[dict[str, Any]], Counter[str]]:
    """What an uninterrupted run gives, and which answers it took."""
    described.write(folder)
    tracer.describe(folder, candidates=2)
    rows, answered = table(folder), Counter(stub.answered)
    stub.answered.clear()
    stub.asked.clear()
    return rows, answered


@pytest.mark.parametrize("how", ["down", "cut", "bound", "interrupt"])
def test_interrupted_at_random_points_and_repeated_nothing_is_paid_twice(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    rows, answered = whole(stub, tmp_path / "whole")
    dice = random.Random(how)
    for number in range(2):
        stub.answered.clear()
        folder, sessions = tmp_path / str(number), 0
        described.write(folder)
        while True:
            stub.asked.clear()
            stop, sessions = dice.randrange(1, 6), sessions + 1
            fault = {"down": Raw(503), "cut": Raw(body=b'{"cho', length=99)}.get(how)
            if fault is not None:
                stub.answers = lambda body, n, at=stop, fault=fault: (
                    fault if stub.calls > at else described.model(body, n)
                )
            bounds = Bounds(attempts=1, parallel=dice.choice((1, 3)), max_calls=stop if how == "bound" else 1000)

            def progress(done: int, _: int, at: int = dice.randrange(1, 4), last: bool = sessions > 2) -> None:
                if how == "interrupt" and done == at and not last:
                    raise KeyboardInterrupt

            try:
                found = tracer.describe(folder, candidates=2, bounds=bounds, progress=progress)
            except (RemoteError, KeyboardInterrupt):
                assert all(row["source"] == "stub-1" for row in table(folder))  # what there is was kept
                continue
            assert found.stopped is None or isinstance(found.stopped, BoundError)
            if found.stopped is None:
                break
        assert sessions > 1
        assert stub.answered == answered
        assert table(folder) == rows


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_whole_answers(stub: Stub, tmp_path: Path) -> None:
    rows, answered = whole(stub, tmp_path / "whole")
    described.write(tmp_path / "run")
    there = threading.Event()

    def answers(body: dict[str, Any], before: int) -> Any:
        if stub.calls <= 5:
            return described.model(body, before)
        there.set()
        return Silence()

    stub.answers = answers
    words = ["describe", str(tmp_path / "run"), "--candidates", "2", "--parallel", "1"]
    child = children.begin([sys.executable, "-m", "tracer", *words], env=dict(os.environ))
    assert there.wait(120)
    os.kill(child.pid, signal.SIGKILL)
    children.end(child)
    stub.answers = described.model
    found = tracer.describe(tmp_path / "run", candidates=2)
    assert (found.spent.kept, found.spent.calls) == (5, 7)
    assert stub.answered == answered
    assert table(tmp_path / "run") == rows


def test_a_bound_ends_it_and_what_there_is_stays(stub: Stub, tmp_path: Path) -> None:
    described.write(tmp_path / "run")
    found = tracer.describe(tmp_path / "run", candidates=1, max_calls=3, parallel=1)
    assert isinstance(found.stopped, BoundError)
    assert stub.calls == 3
    assert [(row["neuron"], row["score"] is None) for row in table(tmp_path / "run")] == [(2, True), (7, False)]
    found = tracer.describe(tmp_path / "run", candidates=1, max_tokens_total=3000, parallel=1)
    assert found.spent.tokens <= 3000
    assert "max_tokens_total=3000" in str(found.stopped)


def test_a_folder_is_described_by_one_at_a_time(stub: Stub, tmp_path: Path) -> None:
    run = described.write(tmp_path / "run")
    with run.place.locked(), refused(RunError, "is being written by"):
        tracer.describe(tmp_path / "run")
    assert stub.calls == 0


# ------------------------------------------------------------------------------------------------ without a model


def test_without_an_endpoint_it_is_said_what_works_without(nobody: None, tmp_path: Path) -> None:
    described.write(tmp_path / "run")
    with refused(JobError, "TRACER_LLM_URL is not set", "file='descriptions.csv'", "tracer neuron"):
        tracer.describe(tmp_path / "run")
    answer = CliRunner().invoke(app, ["describe", str(tmp_path / "run")])
    assert answer.exit_code == 2
    assert "--import descriptions.csv" in answer.stderr
    assert not (tmp_path / "run" / "descriptions.parquet").exists()


def test_descriptions_of_a_file_are_taken(nobody: None, tmp_path: Path) -> None:
    run = described.write(tmp_path / "run")
    file = tmp_path / "mine.csv"
    file.write_text("layer,neuron,polarity,description\n3,7,1,says Texas\n9,9,-1,\"a <b> 'c'\"\n")
    answer = CliRunner().invoke(app, ["describe", str(tmp_path / "run"), "--import", str(file), "--format", "json"])
    assert answer.exit_code == 0, answer.output
    rows = table(tmp_path / "run")
    assert [json.loads(line) for line in answer.stdout.splitlines()] == rows
    assert [(row["neuron"], row["description"], row["source"]) for row in rows] == [
        (7, "says Texas", "mine.csv"),
        (9, "a <b> 'c'", "mine.csv"),
    ]
    assert run.check_outputs() == []
    file.write_text("layer,neuron,polarity,description\n3,7,1,says Austin\n")
    tracer.describe(tmp_path / "run", file)
    assert [row["description"] for row in table(tmp_path / "run")] == ["says Austin", "a <b> 'c'"]
    file.write_text("layer,neuron\n3,7\n")
    with refused(JobError, "has no column 'description'"):
        tracer.describe(tmp_path / "run", file)


def test_a_file_is_of_neurons_that_the_model_has(nobody: None, tmp_path: Path) -> None:
    dataset(tmp_path / "run", circuit=False)
    file = tmp_path / "mine.csv"
    for layer, neuron in ((MODEL.n_layers, 0), (0, MODEL.d_mlp)):
        file.write_text(f"layer,neuron,description\n{layer},{neuron},nothing\n")
        with refused(JobError, "mine.csv"):
            tracer.describe(tmp_path / "run", file)


def test_a_dry_run_sends_nothing_and_bounds_what_is_sent(nobody: None, tmp_path: Path) -> None:
    described.write(tmp_path / "run", tokens=True)
    cost = describing.cost(tmp_path / "run", candidates=2)
    assert (cost.neurons, cost.calls, cost.kept) == (3, 12, 0)
    with chat_stub.served() as stub:
        stub.answers = described.model
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRACER_LLM_URL", stub.url)
            patch.setenv("TRACER_LLM_MODEL", "stub-1")
            tracer.describe(tmp_path / "run", candidates=2, max_calls=5)
            left = describing.cost(tmp_path / "run", candidates=2)
            assert (left.calls, left.kept) == (7, 5)
            words = ["describe", str(tmp_path / "run"), "--candidates", "2", "--dry-run"]
            answer = CliRunner().invoke(app, words)
            assert "at most 7 calls" in answer.stdout
            assert "5 answers are there already" in answer.stdout
            assert stub.calls == 5
            tracer.describe(
                tmp_path / "run", candidates=2, max_tokens_total=left.prompt_tokens + left.completion_tokens
            )
            assert stub.calls == 12
            assert describing.cost(tmp_path / "run", candidates=2).calls == 0


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_shows_descriptions_and_what_they_took(stub: Stub, tmp_path: Path) -> None:
    described.write(tmp_path / "run")
    words = ["describe", str(tmp_path / "run"), "--top", "2", "--candidates", "1"]
    answer = CliRunner().invoke(app, words)
    assert answer.exit_code == 0, answer.output
    assert "words like" in answer.stdout
    assert "2 descriptions in" in answer.stdout
    assert "note: asked: 4 calls, 1,600 tokens in and 240 out" in answer.stderr
    answer = CliRunner().invoke(app, [*words, "--candidates", "2", "--max-calls", "1"])
    assert answer.exit_code == 0
    assert "note: stopped early: --max-calls 1: is reached" in answer.stderr
    stub.answers = lambda *_: Raw(401)
    answer = CliRunner().invoke(app, [*words, "--candidates", "3"])
    assert answer.exit_code == 2
    assert "check TRACER_LLM_KEY" in answer.stderr
    assert KEY not in answer.output
    assert len(table(tmp_path / "run")) == 2
    for wrong in (["--top", "0"], ["--max-calls", "0"], ["--dry-run", "--import", "x.csv"]):
        assert CliRunner().invoke(app, [*words, *wrong]).exit_code == 2


@pytest.mark.parametrize(("name", "value"), [("top", 0), ("candidates", True)])
def test_counts_are_whole_numbers(nobody: None, tmp_path: Path, name: str, value: Any) -> None:
    with refused(JobError, name, "1 or more"):
        tracer.describe(tmp_path, **{name: value})


# ------------------------------------------------------------------------------------------------ which neurons


def dataset(folder: Path, circuit: bool) -> RunFolder:
    """The outputs of a dataset's run."""
    run = RunFolder(folder)
    job: dict[str, Any] = {"job": {}, "numbers": {}, "input": "", "n_prompts": 1, "n_units": 1, "packages": {}}
    job["model"] = MODEL.model_dump()
    run.begin({"kind": "dataset", "fingerprint": "f", **job})
    from tracer.store.aggregation import NEURONS

    rows = [
        {"layer": 0, "neuron": 1, "n_prompts": 2, "prompt_mean_abs": 9.0, "mean_activation": -0.5},
        {"layer": 0, "neuron": 2, "n_prompts": 3, "prompt_mean_abs": 1.0, "mean_activation": 0.5},
    ]
    run.write_table("neurons.parquet", pa.Table.from_pylist(rows, NEURONS))
    if circuit:
        strong = [
            {"node_id": i, "layer": layer, "position": i, "neuron": neuron, "mean_attribution": value}
            for i, (layer, neuron, value) in enumerate([(0, 1, -4.0), (4, 4, 3.0), (4, 4, -2.0), (0, 2, 1.0)])
        ]
        run.write_table("circuit.parquet", pa.Table.from_pylist(strong, schemas.CIRCUIT))
    return run


def test_the_strongest_neurons_of_each_kind_of_run(tmp_path: Path) -> None:
    assert strongest(dataset(tmp_path / "a", circuit=False)) == [(0, 1, -1), (0, 2, 1)]
    circuit = dataset(tmp_path / "b", circuit=True)
    assert strongest(circuit) == [(4, 4, 1), (4, 4, -1), (0, 1, -1), (0, 2, 1)]
    assert strongest(circuit, top=3) == [(4, 4, 1), (4, 4, -1), (0, 1, -1)]
    texts = pa.Table.from_pylist(described.exemplars(2, 2, -1), schemas.EXEMPLARS)
    bare = dataset(tmp_path / "c", circuit=False)
    bare.place.remove("neurons.parquet")
    assert strongest(bare, texts) == [(2, 2, -1)]
    with refused(RunError, "names no neurons"):
        strongest(bare)
    with refused(RunError, "holds no run"):
        strongest(RunFolder(tmp_path / "none"))
