"""One shard of prompts: read, traced in batches of like length, written as tables; every prompt gets its row.

Knows what may happen to a prompt and what it ends as: its circuit, or a row that says why there is none. A batch that
runs out of memory is halved; transient errors are retried; what a prompt raises alone is that prompt's failure. On a
remote model several batches are in flight at a time; what is written does not depend on how many. Refuses to
know other shards, processes and who gives the tasks.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from tracer import data
from tracer.attribution.attribute import Reference, check_question, notes
from tracer.attribution.graph import FIRST_SHARE, first_note, much_at_first
from tracer.attribution.trace import trace_all
from tracer.batching import batches, chunked
from tracer.circuit.circuit import Circuit
from tracer.errors import JobError, RemoteError, TracerError, writing
from tracer.evaluation import answers
from tracer.evaluation.answers import Answer
from tracer.model.folder import out_of_memory
from tracer.model.model import Model
from tracer.ndif.server import JobFailedError, TooLargeError
from tracer.prompts import Encoded, Prompt, encode, with_bos
from tracer.runs.jobs import DatasetJob
from tracer.runs.workers.messages import Beat, Part, Report, Stage, Task
from tracer.settings import OWN_METRICS, RULED_METHODS
from tracer.store import schemas
from tracer.store.file import File
from tracer.store.run_folder import RunFolder

log = logging.getLogger(__name__)

STICKY = 70  # exit code of a process whose device is unusable
PASSING = (ConnectionError, TimeoutError)
"""Transient errors, which are retried."""
KEPT_EVERY, KEPT_AFTER_DEATH, KEPT_SHARE = 10.0, 1.0, 0.1
"""Seconds after which what is done of a shard is written, so that a process that dies costs no more; fewer where one
has died. Never more of the time than this share of it."""
LOOKED_AT = 1000
"""Prompts of the input that are looked at before a run for whether any can be asked."""
UNLIKELY = "the target is not among the model's ten likeliest next tokens: the circuit is not of what the model says"
_SCHEMAS = schemas.SCHEMAS | {"means": schemas.MEANS}
NO_ROOM = "make room or choose another folder; what is committed is kept, repeat the command to resume"
"""What to do where a run's folder cannot be written."""


@dataclass(frozen=True)
class _Item:
    """A prompt with its row of the input and its tokens."""

    row: dict[str, Any]
    prompt: Prompt
    encoded: Encoded

    @property
    def id(self) -> int:
        return int(self.row["prompt_id"])


@dataclass(frozen=True)
class _Made:
    """What a prompt ended as: its row and tables, its attributions with their length where these are summed, and what
    should be known of it."""

    row: dict[str, Any]
    tables: dict[str, pa.Table] = field(default_factory=dict)
    part: tuple[Tensor, int] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Traced:
    """A successful batch: of each prompt what the model answers, where a filter asks; its circuit, unless it is left
    out; and its attributions [layer, pos, neuron], where they are summed."""

    answers: list[Answer] | None
    circuits: list[Circuit]
    nodes: list[Tensor] | None

    def each(self, items: Sequence[_Item]) -> Iterator[tuple[_Item, Answer | None, Circuit | None, Tensor | None]]:
        """The outcomes by prompt."""
        circuits, nodes = iter(self.circuits), iter(self.nodes or ())
        for row, item in enumerate(items):
            answer = None if self.answers is None else self.answers[row]
            if answer is None or answer.kept:
                yield item, answer, next(circuits), next(nodes, None)
            else:
                yield item, answer, None, None


@dataclass
class _Sums:
    """Attributions of all nodes summed over prompts, by their length; -1 where positions are summed as well."""

    kind: str
    skip_first: bool
    sums: dict[int, Tensor] = field(default_factory=dict)
    counts: Counter[int] = field(default_factory=Counter)

    def part(self, nodes: Tensor, length: int) -> tuple[Tensor, int]:
        """What is added of one prompt's [layer, pos, neuron]: little, where it is summed over positions."""
        mine = nodes[:, :length]
        if self.kind == "free":
            mine, length = mine.double()[:, int(self.skip_first) :].sum(1, keepdim=True), -1
        return mine, length

    def add(self, part: Tensor, length: int) -> None:
        """Add one prompt's part; sums depend, in their last bits, on the order of this."""
        mine = part.double()
        self.sums[length] = self.sums[length] + mine if length in self.sums else mine
        self.counts[length] += 1

    def table(self) -> pa.Table:
        """The rows of `schemas.MEANS`."""
        rows = [
            {
                "length": length,
                "layer": layer,
                "position": -1 if length < 0 else position,
                "n_prompts": self.counts[length],
                "sums": self.sums[length][layer, position].numpy(),
            }
            for length in sorted(self.sums)
            for layer in range(self.sums[length].shape[0])
            for position in range(self.sums[length].shape[1])
        ]
        return pa.Table.from_pylist(rows, schemas.MEANS)


class Pulse:
    """Heartbeats of a shard to the driver: the prompts in flight, over all threads, and how many are done.

    A process's death counts against the prompts in flight, so every change is sent.
    """

    def __init__(self, began: Beat) -> None:
        self._began, self._done = began, 0
        self._under_way: dict[int, None] = {}  # a set that keeps its order
        self._told, self._lock = 0.0, threading.Lock()

    def begin(self, ids: Iterable[int]) -> None:
        """Prompts are in flight."""
        with self._lock:
            self._under_way |= dict.fromkeys(ids)
            self._tell()

    def alive(self, done: int = 0, total: int = 0) -> None:
        """Send a heartbeat now and then, to show that the shard does not hang; with how many steps of a batch that is
        in flight alone are done, if that is known."""
        with self._lock:
            if time.monotonic() - self._told > 1.0:
                at = Stage(what="steps of a batch", done=done, total=total, share=done / total) if total else None
                self._tell(at=at)

    def end(self, ids: Iterable[int], done: int) -> None:
        """Prompts are no longer in flight, and `done` of them are finished."""
        with self._lock:
            for prompt_id in ids:
                self._under_way.pop(prompt_id, None)
            self._done += done
            if self._under_way:  # otherwise the next `begin` reports
                self._tell()

    def keep(self, part: Part) -> None:
        """A part of the shard is kept."""
        with self._lock:
            self._tell(part)

    def _tell(self, part: Part | None = None, at: Stage | None = None) -> None:
        self._told = time.monotonic()
        self._began([*self._under_way], self._done, part=part, at=at)


class ShardWork:
    """The shards of a dataset job, on one model.

    Args:
        model, job, folder: what is traced, how, and where the input is and the tables go.
    """

    def __init__(self, model: Model, job: DatasetJob, folder: RunFolder) -> None:
        self.model, self.folder = model, folder
        self.job = job = job.numbered(model.numbering(job.basis))
        self._options = options(job)
        model.check_rules(job.settings().rules)
        for layer, *_, neuron in job.exclude:
            model.check_neuron(f"exclude {layer}/{neuron}", layer, neuron, job.basis)

    def run(self, task: Task, began: Beat) -> Report:
        """Trace one shard and write its tables.

        Args:
            began: called with (prompts, prompts that are done) before each batch.

        Raises:
            RunError: the folder cannot be written or read.
        """
        started = time.perf_counter()
        shard = _Shard(self.model, self.job, task, began, self._options)
        rows = self.folder.read_input(task.unit)
        if task.only is not None:
            shard.keep({name: self.folder.read_table(file) for name, file in task.files.items()}, task.only)
            rows = [row for row in rows if row["prompt_id"] in task.only]
        for part in task.parts:
            shard.keep({name: self.folder.read_table(file.name) for name, file in part.files.items()})
            shard.notes.update(part.notes)
            shard.halved += part.halved
        shard.trace(rows, lambda: self._written(task.unit, shard.tables(new=True)))
        began((), len(shard.rows))  # a process that dies while it writes dies without a prompt to blame
        statuses: Counter[str] = Counter(row["status"] for row in shard.rows)
        errors: Counter[str] = Counter(row["error_type"] for row in shard.rows if row.get("error_type"))
        return Report(
            unit=task.unit,
            files=self._written(task.unit, shard.tables()),
            statuses=dict(statuses),
            errors=dict(errors),
            seconds=time.perf_counter() - started,
            halved=shard.halved,
            notes=dict(shard.notes),
        )

    def _written(self, unit: int, tables: dict[str, pa.Table]) -> dict[str, File]:
        with writing(self.folder.place, "folder", NO_ROOM):
            return {name: self.folder.write_shard(name, unit, table, _SCHEMAS[name]) for name, table in tables.items()}


def options(job: DatasetJob) -> dict[str, Any]:
    """The arguments of `trace_all` that a job settles."""
    chosen = job.settings()
    names = ("method", "baseline", "basis", "metric", "steps", "top_k", "share", "of", "seed")
    made: dict[str, Any] = {name: getattr(chosen, name) for name in names}
    made |= {"rules": chosen.rules if chosen.method in RULED_METHODS else None, "edges": job.edges}
    made |= {"pruning": job.pruning_rules(), "profiles": job.profiles, **job.selection()}
    if job.reference is not None:
        made["reference"] = Reference([with_bos(_prompt_of(row), job.bos) for row in data.read(job.reference)])
    return made


def _prompt_of(row: data.Row) -> Prompt:
    if row.error is not None:
        raise data.row_error(row)
    return Prompt(row.text, token_ids=row.token_ids, messages=row.messages, seed=row.seed)


class _Shard:
    """One shard being traced."""

    def __init__(self, model: Model, job: DatasetJob, task: Task, began: Beat, chosen: dict[str, Any]) -> None:
        self.model, self.job, self.task, self.options = model, job, task, chosen
        self.rows: list[dict[str, Any]] = []
        self.halved, self.sums = 0, None if job.circuit == "none" else _Sums(job.circuit, job.skip_first)
        asked = {"nodes": True, "edges": chosen["edges"], "profiles": chosen["profiles"], "values": job.values}
        self._tables: dict[str, list[tuple[int, pa.Table]]] = {name: [] for name, wanted in asked.items() if wanted}
        self.notes: Counter[str] = Counter()
        # Worded here: threads know no surface. One sentence for all prompts, so that they can be counted.
        self._first = {no_foil: first_note(f"more than {FIRST_SHARE:.0%}", no_foil) for no_foil in (False, True)}
        self._pulse, self._counting = Pulse(began), threading.Lock()
        apart = (*(task.only or ()), *task.quarantined)
        self._most = task.most | dict.fromkeys(apart, 1)
        self._done = set[int]()  # kept of what others did, of the prompts to do
        self._kept = (
            0,
            dict.fromkeys(self._tables, 0),
            Counter[str](),
            0,
        )  # rows, tables, notes and halvings already kept

    def trace(self, rows: Sequence[dict[str, Any]], write: Callable[[], dict[str, File]]) -> None:
        """Every prompt of the shard that is not kept from others, in batches of like length.

        Args:
            write: what is new in the tables, now and then.
        """
        items, left = [], len(rows) - len(self._done)
        every = KEPT_AFTER_DEATH if self.task.attempt > 1 else KEPT_EVERY
        due = time.monotonic() + every
        self._mark()
        for row in rows:
            try:
                items.append(self._item(row))
            except TracerError as error:
                if row["prompt_id"] not in self._done:
                    self._record(self._unasked(row, error))
                    left -= 1
        self._pulse.end((), len(self.rows))
        with closing(self._outcomes(self._batches(items))) as outcomes:
            for batch in outcomes:
                for made in batch:
                    self._record(made)
                    left -= 1
                if left and (now := time.monotonic()) > due:
                    self._pulse.keep(self._part(write()))
                    due = now + max(every, (time.monotonic() - now) / KEPT_SHARE)

    def _part(self, files: dict[str, File]) -> Part:
        """What was written just now; from here on the rest is new."""
        _, _, notes, halved = self._kept
        part = Part(files=files, notes=dict(self.notes - notes), halved=self.halved - halved)
        self._mark()
        return part

    def _mark(self) -> None:
        sizes = {name: len(tables) for name, tables in self._tables.items()}
        self._kept = len(self.rows), sizes, self.notes.copy(), self.halved

    def keep(self, tables: dict[str, pa.Table], only: Sequence[int] | None = None) -> None:
        """Take over what was committed, but for the prompts that are done again (`only`); or what was kept since."""
        for name, table in tables.items():
            if name == "prompts":
                rows = [row for row in table.to_pylist() if row["prompt_id"] not in (only or ())]
                self.rows += rows
                self._done.update(row["prompt_id"] for row in rows if only is None)
            elif name in self._tables:  # the rows of a prompt are together
                found = np.unique(table["prompt_id"].to_numpy(), return_index=True, return_counts=True)
                for prompt_id, first, count in zip(*(part.tolist() for part in found), strict=True):
                    if prompt_id not in (only or ()):
                        self._tables[name].append((prompt_id, table.slice(first, count)))
            elif self.sums is not None:
                self.sums.sums.clear()
                for row in table.to_pylist():
                    self._take_over(row)

    def _take_over(self, row: dict[str, Any]) -> None:
        assert self.sums is not None
        length, kept = row["length"], torch.tensor(row["sums"], dtype=torch.float64)
        if length not in self.sums.sums:
            shape = (self.model.n_layers, max(1, length), len(kept))
            self.sums.sums[length], self.sums.counts[length] = torch.zeros(shape, dtype=torch.float64), row["n_prompts"]
        self.sums.sums[length][row["layer"], max(0, row["position"])] = kept

    def tables(self, new: bool = False) -> dict[str, pa.Table]:
        """The tables, in order of prompts: of all of them, or of those that are not kept yet (`new`)."""
        first, sizes = self._kept[:2] if new else (0, dict.fromkeys(self._tables, 0))
        rows = sorted(self.rows[first:], key=lambda row: row["prompt_id"])
        if new:  # who is left out may change
            rows = [row for row in rows if row["status"] != "quarantined"]
        made = {"prompts": pa.Table.from_pylist(rows, schemas.PROMPTS)}
        for name, parts in self._tables.items():
            made[name] = _joined(parts[sizes[name] :], schemas.SCHEMAS[name])
        return made if self.sums is None else made | {"means": self.sums.table()}

    # ----------------------------------------------------------------------------------------- batches

    def _item(self, row: dict[str, Any]) -> _Item:
        prompt = with_bos(as_prompt(row, self.job.asks, paired=self.job.baseline == "counterfactual"), self.job.bos)
        encoded = encode(prompt, self.model)
        if self.job.input.filter is not None:
            answers.check_filter(prompt, self.job.input.filter, encoded)
        return _Item(row, prompt, encoded)

    def _batches(self, items: Sequence[_Item]) -> Iterator[list[_Item]]:
        """Prompts of like length together. What is in a batch does not depend on who died before, but that the
        batches of those who did are halved, nor on what is done: numbers stay the same to the last bit."""
        with_foil = [item for item in items if item.encoded.foil_ids]
        without = [item for item in items if not item.encoded.foil_ids]
        for some in (without, with_foil):  # their metrics differ, and a batch has one
            for batch in self._of_like_length(some):
                if left := [item for item in batch if item.id not in self._done]:
                    yield left

    def _of_like_length(self, items: Sequence[_Item]) -> Iterator[list[_Item]]:
        ordered = sorted(items, key=lambda item: (len(item.encoded.token_ids), item.id))
        lengths = [len(item.encoded.token_ids) for item in ordered]
        each = self.model.bytes_per_token(length=max(lengths, default=1))
        for part in batches(lengths, each, self.task.max_bytes or self.model.budget(), self.model.borders):
            for batch in chunked(ordered[part.start : part.stop], self.job.batch or len(part)):
                yield from self._halved(batch)

    def _halved(self, batch: list[_Item]) -> Iterator[list[_Item]]:
        """A batch as it is, or in halves as long as it is larger than one of its prompts allows."""
        if len(batch) <= max(1, min(self._most.get(item.id, self.task.batch or len(batch)) for item in batch)):
            yield batch
            return
        for half in chunked(batch, (len(batch) + 1) // 2):
            yield from self._halved(half)

    def _outcomes(self, batches: Iterable[list[_Item]]) -> Generator[Iterable[_Made], None, None]:
        """The outcomes of every batch, in the order of the batches, whichever finishes first."""
        for alone, some in groupby(batches, self._is_alone):
            if alone:
                yield from map(self._batch, some)
            else:
                yield from self.model.stream(lambda batch: list(self._batch(batch)), list(some))

    def _is_alone(self, batch: list[_Item]) -> bool:
        """Whether a batch must run alone: local computation fills the memory that was planned for it, and prompts that
        processes died on must be told apart from others in flight."""
        here = self.model.remote is None or self.job.weights is not None
        return here or any(item.id in self.task.most for item in batch)

    def _batch(self, items: list[_Item]) -> Iterator[_Made]:
        """The outcomes of a batch. Runs in several threads at a time, without side effects."""
        ids = [item.id for item in items]
        if len(items) == 1 and ids[0] in self.task.quarantined:
            self._pulse.end((), 1)
            yield self._lost(items[0].row, "quarantined", *self.task.quarantined[ids[0]])
            return
        self._pulse.begin(ids)
        result, attempt = self._tried(items)
        if isinstance(result, _Traced):
            self._pulse.end(ids, len(ids))
            for item, answer, circuit, nodes in result.each(items):
                if circuit is None:
                    yield self._left_out(item.row, "filtered", answer)
                else:
                    made = self._found(item, circuit, nodes, attempt)
                    yield made if answer is None else replace(made, row=made.row | {"answer": answer.token})
            return
        if is_sticky(result):
            os._exit(STICKY)
        self._pulse.end(ids, int(len(ids) == 1))
        yield from self._raised(items, result, attempt)

    def _tried(self, items: list[_Item]) -> tuple[_Traced | Exception, int]:
        """A batch's result or error, and in which attempt; transient errors are retried."""
        attempt = 0
        while True:
            attempt += 1
            try:
                return self._traced(items), attempt
            except RemoteError as error:
                # A server that is gone or refuses everything is no prompt's failure: the run ends, and can be resumed.
                if not isinstance(error, JobFailedError | TooLargeError):
                    raise
                return error, attempt
            except PASSING as error:
                if attempt > self.job.retries:
                    return error, attempt
                self.model.sleep(min(60.0, 2.0 ** (attempt - 1)) * random.uniform(0.5, 1.5))
                self._pulse.begin(item.id for item in items)  # a heartbeat, since waiting is not hanging
            except Exception as error:  # noqa: BLE001  a prompt's failure is a row, the others continue
                return error, attempt

    def _raised(self, items: list[_Item], error: Exception, attempt: int) -> Iterator[_Made]:
        """An error of several prompts is retried on fewer; of one prompt, it is that prompt's failure."""
        memory = out_of_memory(error) or isinstance(error, TooLargeError)
        if memory:
            free_memory()
        if len(items) == 1:
            name = "OutOfMemory" if memory else type(error).__name__
            yield self._lost(items[0].row, "failed", name, str(error), attempt)
            return
        half = (len(items) + 1) // 2 if memory else 1
        log.warning("%d prompts failed together (%s): again, %d at a time", len(items), type(error).__name__, half)
        with self._counting:
            self.halved += memory
        for part in chunked(items, half):
            yield from self._batch(part)

    def _traced(self, items: list[_Item]) -> _Traced:
        nodes: list[Tensor] = []
        said = self._answers(items)
        if said is not None:
            items = [item for item, answer in zip(items, said, strict=True) if answer.kept]
            if not items:
                return _Traced(said, [], [])
        each = self.model.bytes_per_token(length=max(len(item.encoded.token_ids) for item in items))
        room = len(items) * max(len(item.encoded.token_ids) for item in items) * each  # it was split before: one batch
        circuits = []
        for circuit in trace_all(
            self.model,
            [item.prompt for item in items],
            **self.options,
            memory=max(room, self.task.max_bytes or self.model.budget()),
            whole=nodes.append if self._needs_all else None,
            progress=self._steps,
        ):
            circuits.append(circuit)
            self._pulse.alive()
        return _Traced(said, circuits, nodes if self._needs_all else None)

    @property
    def _needs_all(self) -> bool:
        """Whether the attributions of all nodes are asked for."""
        return self.sums is not None or self.job.values

    def _answers(self, items: list[_Item]) -> list[Answer] | None:
        """What the model answers to each prompt; None where no filter asks."""
        if self.job.input.filter is None:
            return None
        encoded = [item.encoded for item in items]
        found = answers.asked(self.model, encoded, self.job.input.filter, self.task.max_bytes)
        self._pulse.alive()
        return found

    def _steps(self, done: int, total: int) -> None:
        """A method's steps; of a model on a server the requests, of which several are in flight."""
        if self.model.backend.near and total > 1:
            self._pulse.alive(done, total)
        else:
            self._pulse.alive()

    # -------------------------------------------------------------------------------------------- rows

    def _found(self, item: _Item, circuit: Circuit, nodes: Tensor | None, attempt: int) -> _Made:
        tables = {"nodes": _numbered(circuit.nodes, item.id)}
        if circuit.links is not None:
            tables["edges"] = _numbered(circuit.links, item.id)
        if circuit.profiles is not None:
            tables["profiles"] = _numbered(circuit.profiles, item.id)
        if nodes is not None and self.job.values:
            tables["values"] = _values(nodes[:, int(self.job.skip_first) : len(circuit.token_ids)], item.id)
        row = circuit.prompt_row() | {"prompt_id": item.id, "attempts": attempt + self.task.deaths.get(item.id, 0)}
        part = None if nodes is None or self.sums is None else self.sums.part(nodes, len(circuit.token_ids))
        said = notes((item.encoded,), self.model)
        if much_at_first(circuit):
            said = (*said, self._first[circuit.settings.metric == "logit"])
        if circuit.unlikely:
            said = (*said, UNLIKELY)
        return _Made(row | {"user_id": item.row["user_id"], "labels": item.row["labels"]}, tables, part, said)

    def _unasked(self, row: dict[str, Any], error: TracerError) -> _Made:
        """A prompt that the model cannot be asked. Built-in pairs are made for any tokenizer: no fault of theirs."""
        if self.job.input.task is not None:
            return self._left_out(row, "skipped", error=str(error))
        return self._lost(row, "failed", type(error).__name__, str(error))

    def _left_out(self, row: dict[str, Any], status: str, answer: Answer | None = None, error: str = "") -> _Made:
        """A prompt that nothing went wrong with, but that is not one to trace."""
        made = self._lost(row, status, None, error if answer is None else answer.otherwise)
        return replace(made, row=made.row | {"answer": None if answer is None else answer.token})

    def _lost(self, row: dict[str, Any], status: str, error_type: str | None, error: str, attempt: int = 1) -> _Made:
        attempts = self.task.deaths.get(row["prompt_id"], 0) + (attempt if status == "failed" else 0)
        kept = {name: row[name] for name in ("prompt_id", "user_id", "text", "token_ids", "labels")}
        ids = {name: row[name] or [] for name in ("target_ids", "foil_ids")}
        outcome = {"status": status, "error_type": error_type, "error": error[:2000], "attempts": attempts}
        return _Made(kept | ids | outcome | {"n_nodes": 0, "n_edges": 0})

    def _record(self, made: _Made) -> None:
        """Keep what is written; called in one thread, in the order of the batches."""
        self.rows.append(made.row)
        self.notes.update(made.notes)
        for name, table in made.tables.items():
            self._tables[name].append((made.row["prompt_id"], table))
        if made.part is not None:
            assert self.sums is not None
            self.sums.add(*made.part)


def as_prompt(row: dict[str, Any], metric: str, paired: bool) -> Prompt:
    """The prompt of a row of the input, with only the fields that the job uses. A foil is used by the
    metrics ``difference`` and ``auto``, a target or an answer by all that do not find their own, a counterfactual where
    prompts are `paired`.

    Args:
        metric: what the job asks; see `DatasetJob.asks`.

    Raises:
        JobError: what is wrong with the row as data.
    """
    if row["error"] is not None:
        raise data.row_error(row)

    def either(name: str) -> Any:
        return [*(row[name] or ()), *(row[f"{name}_ids"] or ())] or None

    forms = (row[name] for name in ("counterfactual", "counterfactual_ids", "counterfactual_messages"))
    other = next((form for form in forms if form is not None), None)
    return Prompt(
        row["text"],
        target=None if metric in OWN_METRICS else either("target"),
        foil=either("foil") if metric in ("auto", "difference") else None,
        counterfactual=other if paired else None,
        token_ids=row["token_ids"],
        positions=row["positions"],
        id=row["user_id"],
        messages=row["messages"],
        seed=row["seed"],
        answer=None if metric in OWN_METRICS else row["answer"],
    )


def askable(rows: Iterable[dict[str, Any]], job: DatasetJob) -> Iterator[dict[str, Any]]:
    """Rows of the input as they come; the first of them are looked at for whether the job can ask any.

    Raises:
        JobError: at the end, where it cannot, for a reason that no model decides: all would fail.
    """
    reason, seen, good = None, 0, False
    for row in rows:
        if not good and seen < LOOKED_AT:
            seen += 1
            try:
                prompt = as_prompt(row, job.asks, paired=job.baseline == "counterfactual")
                check_question(prompt, job.settings(), [] if job.baseline == "mean" else None)
                if job.input.filter is not None:
                    answers.check_filter(prompt, job.input.filter)
                good = True
            except TracerError as error:
                reason = reason or error
        yield row
    if reason is not None and not good:
        count = f"none of the first {seen:,} prompts" if seen > 1 else "the prompt"
        raise JobError("input", f"{count} can be asked so, the first: {reason.value}: {reason.rule}", reason.next_step)


def input_row(row: data.Row) -> dict[str, Any]:
    """A row of the dataset as a row of input.parquet."""

    def texts(values: Sequence[str | int] | None) -> list[str] | None:
        return [token for token in values if isinstance(token, str)] if values is not None else None

    def ids(values: Sequence[str | int] | None) -> list[int] | None:
        return [token for token in values if isinstance(token, int)] if values is not None else None

    other = row.counterfactual
    spoken = isinstance(other, tuple) and isinstance(other[0], dict)
    return {
        "user_id": row.user_id,
        "text": row.text,
        "token_ids": None if row.token_ids is None else list(row.token_ids),
        "target": texts(row.target),
        "target_ids": ids(row.target),
        "foil": texts(row.foil),
        "foil_ids": ids(row.foil),
        "counterfactual": other if isinstance(other, str) else None,
        "counterfactual_ids": None if other is None or isinstance(other, str) or spoken else list(other),
        "positions": None if row.positions is None else list(row.positions),
        "labels": list(row.labels.items()),
        "error": row.error,
        "messages": None if row.messages is None else list(row.messages),
        "seed": row.seed,
        "counterfactual_messages": list(other) if spoken and other is not None else None,
        "answer": row.answer,
    }


def _values(nodes: Tensor, prompt_id: int) -> pa.Table:
    """A prompt's rows of `schemas.VALUES` from its attributions [layer, pos, neuron]."""
    summed = nodes.double().sum(1).float().cpu().numpy()
    columns = {"prompt_id": [prompt_id] * len(summed), "layer": range(len(summed)), "attributions": list(summed)}
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in schemas.VALUES}, schemas.VALUES)


def _numbered(table: pa.Table, prompt_id: int) -> pa.Table:
    return table.set_column(0, "prompt_id", pa.array([prompt_id] * table.num_rows, pa.int64()))


def _joined(parts: list[tuple[int, pa.Table]], schema: pa.Schema) -> pa.Table:
    parts.sort(key=lambda part: part[0])
    return pa.concat_tables([part for _, part in parts]).combine_chunks() if parts else schema.empty_table()


def is_sticky(error: Exception) -> bool:
    """Whether a device is unusable until its process ends."""
    broken = getattr(torch, "AcceleratorError", None)
    return (broken is not None and isinstance(error, broken)) and not out_of_memory(error)


def free_memory() -> None:
    """Give a GPU's unused memory back."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
