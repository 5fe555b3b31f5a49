"""Descriptions of a run's neurons by a language model, or from a file; kept beside the run.

    descriptions.parquet   `schemas.DESCRIPTIONS`: of each neuron the best candidate, with its score
    descriptions.json      all candidates, what they were measured on, why a neuron has none, and what was spent
    _journal/answers/      what the language model answered: the same command repeated asks for nothing again

Knows the order of questions and what is kept. Refuses to know what is asked (simulation) and how (endpoint).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from tracer.errors import JobError, RemoteError, RunError, option, quoted, say, writing
from tracer.meaning import descriptions as imported
from tracer.meaning import endpoint as llm
from tracer.meaning import simulation
from tracer.meaning.answers import Answers
from tracer.meaning.budget import BoundError, Bounds, Spent
from tracer.meaning.chat import object_of
from tracer.meaning.descriptions import Key
from tracer.meaning.endpoint import Endpoint, NoAnswerError
from tracer.meaning.evidence import Evidence, evidence
from tracer.meaning.simulation import Score
from tracer.settings import ModelRecord
from tracer.store import one_prompt
from tracer.store.parquet import encoded
from tracer.store.run_folder import KEPT, RunFolder
from tracer.store.schemas import DESCRIPTIONS
from tracer.store.storage import Storage
from tracer.system import bars
from tracer.system.display import Shown

TABLE, RECORD = KEPT
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Candidate:
    """A description of a neuron, and how well it says where the neuron is active."""

    description: str
    score: Score


@dataclass(frozen=True)
class Outcome:
    """What came of a neuron.

    Attributes:
        candidates: in the order in which they were asked for, each text once.
        none: why there is none, or not all of them.
        stopped: what ended the asking.
    """

    known: Evidence
    candidates: tuple[Candidate, ...] = ()
    none: str = ""
    stopped: RemoteError | None = None

    @property
    def best(self) -> Candidate | None:
        """The one of the highest score; the first where none has one."""
        return max(self.candidates, key=lambda one: _rank(one.score.value), default=None)

    def as_record(self, model: str) -> dict[str, Any]:
        """As JSON holds it."""
        held = self.known.held_out
        return {
            **self.known.key._asdict(),
            "model": model,
            "candidates": [
                {"description": one.description, "score": one.score.value, "no_score": one.score.why}
                for one in self.candidates
            ],
            "none": self.none,
            "texts_shown": len(self.known.shown),
            "texts_held_out": len(held),
            "tokens_held_out": sum(len(piece.tokens) for piece in held),
        }


@dataclass(frozen=True, repr=False)
class Described(Shown):
    """Descriptions that were made or read.

    Attributes:
        table: of these neurons, `schemas.DESCRIPTIONS`. address: the folder they are in.
        outcomes: what came of each neuron that a language model was asked about. spent: on that.
        stopped: what ended the asking before all was asked; what there is was kept.
    """

    table: pa.Table
    address: str
    outcomes: tuple[Outcome, ...] = ()
    spent: Spent = field(default_factory=Spent)
    stopped: RemoteError | None = None

    def to_pandas(self) -> Any:
        """The table as a pandas DataFrame: `layer`, `neuron`, `polarity`, `description`, its `score`, and where it is
        from."""
        return self.table.to_pandas()


@dataclass(frozen=True)
class Cost:
    """What describing would cost at most, as we estimate it; answers that are there already are left out.

    Attributes:
        neurons: that there is something to describe by.
    """

    neurons: int
    calls: int
    prompt_tokens: int
    completion_tokens: int
    kept: int


def describe(
    run: str | Path,
    file: str | Path | None = None,
    *,
    exemplars: str | Path | None = None,
    top: int = 20,
    candidates: int = 3,
    out: str | Path | None = None,
    max_calls: int = Bounds.max_calls,
    max_tokens_total: int = Bounds.max_tokens_total,
    parallel: int = Bounds.parallel,
    bounds: Bounds | None = None,
    progress: Progress | bool | None = None,
    report: Callable[[str], None] | None = None,
) -> Described:
    """Describe the strongest neurons of a run in words, by a language model, or take descriptions from a file.

    The model is asked at an OpenAI-compatible endpoint: ``TRACER_LLM_URL``, ``TRACER_LLM_MODEL``, ``TRACER_LLM_KEY``.
    Of each neuron it gives several candidates from texts where the neuron is most active and from the tokens that it
    promotes; from each candidate alone it simulates the neuron on texts that were held out, and the candidate of the
    highest correlation with the true activations is kept. Calls and tokens are bounded; what was answered is kept on
    disk, so that a call that was interrupted and is repeated asks for nothing again.

    Args:
        run: a run folder: of one prompt, of a dataset, or of exemplars.
        file: read descriptions from there (JSON lines or CSV of layer, neuron, description); no model is
            asked.
        exemplars: the folder of a run that collected texts (``tracer exemplars``); the run's own by default.
        top: strongest neurons to describe. candidates: descriptions of each.
        out: the folder for descriptions, by default the run's; one that holds some is added to.
        max_calls: requests. max_tokens_total: tokens in and out, where the server does not count them by an estimate.
        parallel: requests at a time. bounds: these three and all waits, as a record.
        progress: a bar appears on a terminal and in a notebook; False for none, or a function that is called with the
            number of neurons done, and of all.
        report: called with each wait for another try.

    Returns:
        What was described; `Described.stopped` says which bound ended it early.

    Raises:
        JobError: no endpoint is set, nothing is known of the neurons, or the file is wrong.
        RunError: no run there, or a folder that cannot be written.
        RemoteError: the endpoint cannot be used; what it answered before is kept.
    """
    _check(top, candidates)
    folder = RunFolder(run)
    record = one_prompt.read_record(run)
    place = folder.place if out is None else Storage(out)
    if file is not None:
        found = imported.read(file, _size(record))
        with _held(place):
            _keep(place, found, [])
        return Described(found, str(place))
    if not llm.is_set():
        raise _none_set()
    bounds = bounds or Bounds(max_calls=max_calls, max_tokens_total=max_tokens_total, parallel=parallel)
    with (
        Endpoint(bounds=bounds, answers=Answers(place), report=report) as asked,
        _held(place),
        bars.shown(progress, "neurons described") as shown,
    ):
        return _asked(asked, evidence(folder, exemplars, top), candidates, place, shown)


def _asked(
    asked: Endpoint, known: Sequence[Evidence], candidates: int, place: Storage, progress: Progress | None
) -> Described:
    """Ask about every neuron, and keep what there is however that ends."""
    outcomes = list[Outcome]()
    try:
        for outcome in asked.each(lambda one: described(asked, one, candidates), known):
            outcomes.append(outcome)
            if progress is not None:
                progress(len(outcomes), len(known))
    finally:
        table = table_of(outcomes, asked.model)
        _keep(place, table, [one.as_record(asked.model) for one in outcomes], asked.spent)
    stops = [one.stopped for one in outcomes if one.stopped is not None]
    for stopped in stops:
        if not isinstance(stopped, BoundError):
            raise stopped
    say(f"stopped early: {stopped}" for stopped in stops[:1])
    return Described(table, str(place), tuple(outcomes), asked.spent, stops[0] if stops else None)


def described(asked: Endpoint, known: Evidence, candidates: int) -> Outcome:
    """Candidates for one neuron, each with its score; once asking has ended, those whose answers are there."""
    found, none, stopped = dict[str, Candidate](), "", None
    if known.is_empty:
        return Outcome(known, none="there are neither texts nor promoted tokens of it")
    for sample in range(candidates):
        try:
            text = asked.ask(simulation.explaining(known.shown, known.tokens, sample), simulation.description_of)
        except NoAnswerError as error:
            none = none or error.rule
            continue
        except RemoteError as error:
            stopped = stopped or error
            continue
        if text in found:
            continue
        try:
            score = _scored(asked, known, text)
        except RemoteError as error:
            score, stopped = Score(None, "it was not asked"), stopped or error
        found[text] = Candidate(text, score)
    none = none or (stopped.rule if stopped is not None else "")
    return Outcome(known, tuple(found.values()), none, stopped)


def _scored(asked: Endpoint, known: Evidence, text: str) -> Score:
    if not known.held_out:
        return Score(None, "no text is held out")
    request = simulation.simulating(text, known.held_out)
    try:
        simulated = asked.ask(request, lambda content: simulation.activations_of(content, known.held_out))
    except NoAnswerError as error:
        return Score(None, error.rule)
    return simulation.score(simulated, known.held_out)


def cost(
    run: str | Path,
    *,
    exemplars: str | Path | None = None,
    top: int = 20,
    candidates: int = 3,
    out: str | Path | None = None,
) -> Cost:
    """What `describe` would cost at most; nothing is sent, and no endpoint is needed."""
    _check(top, candidates)
    folder = RunFolder(run)
    known = [one for one in evidence(folder, exemplars, top) if not one.is_empty]
    answers, model = Answers(folder.place if out is None else Storage(out)), llm.model_name()
    calls = tokens = completion = kept = 0
    for one in known:
        for sample in range(candidates):
            request = simulation.explaining(one.shown, one.tokens, sample)
            requests, text = [request], "x" * simulation.LONGEST
            if (answer := answers.get(request.name(model))) is not None:
                with suppress(ValueError):
                    text = simulation.description_of(object_of(answer))
            if one.held_out:
                requests.append(simulation.simulating(text, one.held_out))
            left = [each for each in requests if answers.get(each.name(model)) is None]
            kept += len(requests) - len(left)
            calls += len(left)
            tokens += sum(each.tokens() for each in left)
            completion += sum(each.max_tokens for each in left)
    return Cost(len(known), calls, tokens, completion, kept)


def table_of(outcomes: Sequence[Outcome], model: str) -> pa.Table:
    """The best description of each neuron that has one."""
    rows = [
        {**one.known.key._asdict(), "description": best.description, "score": best.score.value, "source": model}
        for one in outcomes
        if (best := one.best) is not None
    ]
    return _sorted(rows)


def rows(address: Any) -> list[dict[str, Any]]:
    """What a report shows of the descriptions in a folder: of each neuron ``neuron`` (``L3 N1414+``), ``description``,
    ``score`` (or None), ``measured`` (on what) and ``source``, plain text throughout; none where there are none."""
    place = Storage(address)
    about = {_key(row): row for row in _record(place).get("neurons", [])}
    found = []
    for row in _there(place).to_pylist():
        key, told = _key(row), about.get(_key(row), {})
        measured = ""
        if row["score"] is not None and told.get("candidates"):
            texts, tokens = (told.get(name, 0) for name in ("texts_held_out", "tokens_held_out"))
            measured = f"best of {len(told['candidates'])} on {tokens:,} held-out tokens of {texts} texts"
        found.append(
            {"neuron": str(key), "measured": measured, **{n: row[n] for n in ("description", "score", "source")}}
        )
    return found


# ------------------------------------------------------------------------------------------------------ the files


def _keep(place: Storage, table: pa.Table, about: Sequence[Mapping[str, Any]], spent: Spent | None = None) -> None:
    """Add descriptions to those in a folder: a neuron's new one takes the place of the old."""
    new = table.to_pylist()
    there = {_key(row): row for row in _there(place).to_pylist()} | {_key(row): row for row in new}
    before = {_key(row): row for row in _record(place).get("neurons", [])}
    told = {key: row for key, row in before.items() if key not in {_key(row) for row in new}}
    told |= {_key(row): dict(row) for row in about}
    content: dict[str, Any] = {"neurons": [told[key] for key in sorted(told)]}
    content["spent"] = _record(place).get("spent") if spent is None else spent.as_record()
    with writing(place, "folder", f"write them elsewhere: {option('out')}"):
        place.write(TABLE, encoded(_sorted(list(there.values()))))
        place.write_json(RECORD, content)
    if place.exists("run.json"):
        RunFolder(place.address).reseal(KEPT)


def _there(place: Storage) -> pa.Table:
    """The descriptions in a folder, none if it has none.

    Raises:
        RunError: they are damaged.
    """
    folder = RunFolder(place.address)
    if not place.exists(TABLE):
        return DESCRIPTIONS.empty_table()
    try:
        return folder.read_output(TABLE).select(DESCRIPTIONS.names).cast(DESCRIPTIONS)
    except (pa.ArrowException, KeyError, ValueError) as error:
        step = "delete it and repeat the command: what a language model answered is kept"
        raise RunError(f"file {TABLE!r}", "is damaged, or has other columns than descriptions", step) from error


def _record(place: Storage) -> dict[str, Any]:
    """What descriptions.json holds; nothing where it is missing or not ours: the table alone counts."""
    try:
        found = place.read_json(RECORD) if place.exists(RECORD) else {}
        for row in found.get("neurons", []):
            _key(row)
    except (RunError, KeyError, TypeError, ValueError):
        return {}
    return found


def _sorted(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    order = sorted(rows, key=lambda row: (row["layer"], row["neuron"], -row["polarity"]))
    return pa.Table.from_pylist([dict(row) for row in order], DESCRIPTIONS)


@contextmanager
def _held(place: Storage) -> Iterator[None]:
    """Hold a folder alone: of two calls at a time each would pay for what the other is asking."""
    with ExitStack() as stack:
        with writing(place, "folder", f"write them elsewhere: {option('out')}"):
            stack.enter_context(place.locked())
        yield


def _key(row: Mapping[str, Any]) -> Key:
    return Key(int(row["layer"]), int(row["neuron"]), int(row["polarity"]))


def _rank(score: float | None) -> float:
    return -math.inf if score is None else score


def _size(record: Mapping[str, Any]) -> tuple[int, int] | None:
    """Layers of the model and neurons of one, where the record says so."""
    try:
        model = ModelRecord.model_validate((record.get("circuit") or record)["model"])
    except (KeyError, TypeError, ValidationError):
        return None
    return model.n_layers, model.d_mlp


def _none_set() -> JobError:
    step = (
        f"set {llm.URL} to the base of an OpenAI-compatible server, such as http://127.0.0.1:11434/v1, {llm.MODEL} to "
    )
    step += f"a model there, {llm.KEY} if it wants a key; without one read descriptions that there are: "
    step += "file='descriptions.csv'; 'tracer neuron' shows promoted tokens"
    return JobError("no language model", f"{llm.URL} is not set", step)


def _check(top: int, candidates: int) -> None:
    for name, value in (("top", top), ("candidates", candidates)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise JobError(f"{option(name)} {quoted(value)}", "must be a whole number, 1 or more", "change it")
