"""One shard of documents for an exemplars job: read in windows, neurons' values reduced at once, written as tables.

A document is a row of the input; every one gets its row in ``prompts``. It counts as a whole or, where any of its
windows fails, not at all. What is kept of a shard adds up exactly with what is kept of others. Refuses to know other
shards, and which of its candidates become exemplars (meaning/peaks.py).
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from tracer import data
from tracer.batching import batches, chunked
from tracer.errors import JobError, RemoteError, TracerError, option, writing
from tracer.meaning import peaks
from tracer.meaning.densities import Totals, bin_of
from tracer.meaning.peaks import Wanted
from tracer.model import passes
from tracer.model.folder import out_of_memory
from tracer.model.model import Model
from tracer.ndif.server import JobFailedError, TooLargeError
from tracer.prompts import Batch, Document, bos_of, decode, document
from tracer.runs.jobs import ExemplarsJob
from tracer.runs.units.shards import NO_ROOM, PASSING, STICKY, Pulse, free_memory, is_sticky
from tracer.runs.workers.messages import Beat, Report, Task
from tracer.settings import ModelRecord
from tracer.store import schemas
from tracer.store.file import File
from tracer.store.run_folder import RunFolder

_SCHEMAS = {"prompts": schemas.PROMPTS, "candidates": schemas.CANDIDATES, "counts": schemas.COUNTS}
MOST_WINDOWS = 4096
"""In one pass."""
_MOST_PEAKS = 2**22
"""Values around peaks that are held of the documents computed together."""


def wanted_of(job: ExemplarsJob) -> Wanted:
    """How many exemplars a job keeps."""
    return Wanted(job.exemplars, job.per_quantile, job.quantiles)


@dataclass(frozen=True)
class _Item:
    """A document with its row of the input, and its windows: where each begins, and its tokens."""

    row: dict[str, Any]
    document: Document
    windows: list[tuple[int, tuple[int, ...]]]

    @property
    def id(self) -> int:
        return int(self.row["prompt_id"])


Columns = dict[str, np.ndarray]
"""Documents at their peaks, a row each: the plain columns of `schemas.CANDIDATES`; `group` is twice the neuron's place
among those looked at, and one more where the peak is positive; `tokens` (ids, -1 where there is none) and `values`
around it [row, place]."""


@dataclass
class _Found:
    """What is known of some documents."""

    totals: Totals
    columns: Columns


_Outcome = tuple[list[_Item], _Found | tuple[str, str, str]]
"""Documents, and what was found in them, or their status, error type and error."""


class ExemplarWork:
    """The shards of an exemplars job, on one model.

    Raises:
        JobError: a neuron that the model lacks, a run of another model, or a window that it cannot read.
    """

    def __init__(self, model: Model, job: ExemplarsJob, folder: RunFolder) -> None:
        self.model, self.job, self.folder = model, job, folder
        record = folder.record() or {}
        self.neurons = sorted(set(map(model.numbering().of_parts, record.get("neurons", job.neurons))))
        _check(model, job, self.neurons, record.get("neurons_model"))
        self.window = job.window_of(model.context_length)
        self.bos = bos_of(model)
        self._texts: dict[int, str] = {}

    def run(self, task: Task, began: Beat) -> Report:
        """Read one shard and write its tables.

        Raises:
            RunError: the folder cannot be written or read.
        """
        started = time.perf_counter()
        shard = _Shard(self, task, began)
        rows = self.folder.read_input(task.unit)
        if task.only is not None:
            shard.keep({name: self.folder.read_table(file) for name, file in task.files.items()}, task.only)
            rows = [row for row in rows if row["prompt_id"] in task.only]
        shard.work(rows)
        began((), len(shard.rows))  # a process that dies while it writes dies without a document to blame
        with writing(self.folder.place, "folder", NO_ROOM):
            files: dict[str, File] = {
                name: self.folder.write_shard(name, task.unit, table, _SCHEMAS[name])
                for name, table in shard.tables().items()
            }
        statuses: Counter[str] = Counter(row["status"] for row in shard.rows)
        errors: Counter[str] = Counter(row["error_type"] for row in shard.rows if row.get("error_type"))
        return Report(
            unit=task.unit,
            files=files,
            statuses=dict(statuses),
            errors=dict(errors),
            seconds=time.perf_counter() - started,
            halved=shard.halved,
        )

    def token(self, number: int) -> str:
        """The text of a token."""
        if number not in self._texts:
            self._texts[number] = decode(self.model, number)
        return self._texts[number]


def _check(model: Model, job: ExemplarsJob, neurons: Sequence[tuple[int, int]], traced: Any) -> None:
    if traced is not None and job.of is not None:
        model.check_traced(ModelRecord.model_validate(traced), job.of)
    for layer, neuron in neurons:
        model.check_neuron(option("neurons", f"{layer}/{neuron}"), layer, neuron)


class _Shard:
    """One shard being read."""

    def __init__(self, work: ExemplarWork, task: Task, began: Beat) -> None:
        self.of, self.task, self._pulse = work, task, Pulse(began)
        self.rows: list[dict[str, Any]] = []
        self.halved = 0
        self._totals = Totals.none(len(work.neurons))
        self._before = schemas.CANDIDATES.empty_table()
        self._parts: list[Columns] = []

    def keep(self, tables: dict[str, pa.Table], only: Sequence[int]) -> None:
        """Take over what was committed, but for the documents that are done again: those have left nothing else."""
        self.rows += [row for row in tables["prompts"].to_pylist() if row["prompt_id"] not in only]
        self._totals.merge(Totals.of(tables["counts"]))
        self._before = tables["candidates"].cast(schemas.CANDIDATES)

    def work(self, rows: Sequence[dict[str, Any]]) -> None:
        """Every document, those of like length together."""
        items = []
        for row in rows:
            try:
                items.append(self._item(row))
            except TracerError as error:
                self._lost(row, "failed", type(error).__name__, str(error))
        self._pulse.end((), len(self.rows))
        groups, model = list(self._groups(items)), self.of.model
        if model.backend.near or self.task.most:
            outcomes: Any = map(self._tried, groups)
        else:
            outcomes = model.stream(self._tried, groups)
        for made in outcomes:
            for group, result in made:
                self._record(group, result)

    def tables(self) -> dict[str, pa.Table]:
        """The shard's tables, in the order of documents and neurons."""
        prompts = pa.Table.from_pylist(sorted(self.rows, key=lambda row: row["prompt_id"]), schemas.PROMPTS)
        new = [self._table(_pruned(self._parts, self.of.job))] if self._parts else []
        candidates = peaks.merged([self._before, *new], wanted_of(self.of.job))
        return {"prompts": prompts, "candidates": candidates, "counts": self._totals.table(self.of.neurons)}

    # -------------------------------------------------------------------------------------- documents

    def _item(self, row: dict[str, Any]) -> _Item:
        if row["error"] is not None:
            raise data.row_error(row)
        given = row["text"] if row["text"] is not None else row["token_ids"]
        made = document(given, self.of.model, self.of.job.bos and row["text"] is not None)
        return _Item(row, made, made.windows(self.of.window))

    def _groups(self, items: Sequence[_Item]) -> Iterator[list[_Item]]:
        """Documents that are computed together: of like length, in batches that memory holds. What is in one depends
        on the shard alone, but for those that processes died on."""
        model, task = self.of.model, self.task
        ordered = sorted(items, key=lambda one: (len(one.windows), len(one.windows[0][1]), one.id))
        most = max(1, _MOST_PEAKS // (2 * len(self.of.neurons) * (2 * self.of.job.around + 1)))
        lengths = [len(one.windows) * len(one.windows[0][1]) for one in ordered]
        for part in batches(lengths, self._each(), task.max_bytes or model.budget()):
            for some in chunked(ordered[part.start : part.stop], min(most, self.of.job.batch or most)):
                yield from self._halved(some)

    def _each(self) -> int:
        """Bytes of a token, about: of the forward pass, and of the values that are kept of it."""
        return self.of.model.bytes_per_token(gradient=False, length=self.of.window) + 8 * len(self.of.neurons)

    def _halved(self, group: list[_Item]) -> Iterator[list[_Item]]:
        """Documents that processes died on together are taken in halves, or alone."""
        apart = dict.fromkeys((*(self.task.only or ()), *self.task.quarantined), 1)
        allowed = self.task.most | apart
        if len(group) <= max(1, min(allowed.get(one.id, self.task.batch or len(group)) for one in group)):
            yield group
            return
        for half in chunked(group, (len(group) + 1) // 2):
            yield from self._halved(half)

    # ------------------------------------------------------------------------------------------ passes

    def _tried(self, group: list[_Item], most: int | None = None) -> list[_Outcome]:
        """What is found in some documents, or why nothing is: fewer at a time where several fail together. Without side
        effects on what is kept, in several threads at a time.

        Args:
            most: windows of them in one pass.
        """
        ids = [one.id for one in group]
        if len(group) == 1 and ids[0] in self.task.quarantined:
            self._pulse.end((), 1)
            return [(group, ("quarantined", *self.task.quarantined[ids[0]]))]
        attempt = 0
        while True:
            attempt += 1
            self._pulse.begin(ids)
            try:
                found = self._found(group, most)
                self._pulse.end(ids, len(ids))
                return [(group, found)]
            except RemoteError as error:
                if not isinstance(error, JobFailedError | TooLargeError):
                    raise  # a server that is gone is no document's failure
                failure: Exception = error
            except PASSING as error:
                if attempt <= self.of.job.retries:
                    self.of.model.sleep(min(60.0, 2.0 ** (attempt - 1)) * random.uniform(0.5, 1.5))
                    continue
                failure = error
            except Exception as error:  # noqa: BLE001  a document's failure is a row, the others continue
                failure = error
            return self._failed(group, failure, most)

    def _failed(self, group: list[_Item], error: Exception, most: int | None) -> list[_Outcome]:
        if is_sticky(error):
            os._exit(STICKY)
        memory = out_of_memory(error) or isinstance(error, TooLargeError)
        if memory:
            free_memory()
        n_windows = min(len(group[0].windows), most or MOST_WINDOWS)
        again = memory and n_windows > 1  # a long document alone, fewer of its windows at a time
        self._pulse.end([one.id for one in group], int(len(group) == 1 and not again))
        if len(group) == 1 and again:
            self.halved += 1
            return self._tried(group, n_windows // 2)
        if len(group) == 1:
            name = "OutOfMemory" if memory else type(error).__name__
            return [(group, ("failed", name, str(error)))]
        self.halved += memory
        half = (len(group) + 1) // 2 if memory else 1
        return [made for some in chunked(group, half) for made in self._tried(some)]

    def _found(self, group: list[_Item], most: int | None) -> _Found:
        """The reduced values of all windows of some documents; memory is that of one batch of them."""
        model, totals = self.of.model, Totals.none(len(self.of.neurons))
        windows = [(len(ids), item.id, start, ids, item) for item in group for start, ids in item.windows]
        windows.sort(key=lambda one: one[:3])
        best: list[Columns] = []
        lengths = [one[0] for one in windows]
        parts = batches(lengths, self._each(), self.task.max_bytes or model.budget(), model.borders)
        for some in (some for at in parts for some in chunked(windows[at.start : at.stop], most or MOST_WINDOWS)):
            batch = Batch(tuple(ids for _, _, _, ids, _ in some))
            values = passes.chosen(model, batch, self.of.neurons).numpy()
            counted = []
            for (length, _, start, ids, item), row in zip(some, values, strict=True):
                best.append(self._peaks(item, start, ids, row[-length:]))
                counted.append(row[-length:][self._skipped(item, start, ids) :])
            totals.add(np.concatenate(counted), self.of.job.active_above)
            best = [_first(_joined(best))]
            self._pulse.alive()
        bins, groups = bin_of(np.abs(best[0]["value"])), best[0]["group"]
        np.add.at(totals.peaks, (groups // 2, 1 - groups % 2, bins), 1)
        totals.n_documents = len(group)
        return _Found(totals, best[0] | {"stratum": bins.astype(np.int16)})

    def _skipped(self, item: _Item, start: int, ids: tuple[int, ...]) -> int:
        """Tokens at the beginning of a window that do not count: the first, where it is left out; and of any window but
        a document's first what stands before it again."""
        before, asked = len(item.document.before), self.of.job.skip_first
        first = ids[0] == self.of.bos if asked is None else asked
        return max(int(first), before if start > before else 0)

    def _peaks(self, item: _Item, start: int, ids: tuple[int, ...], values: np.ndarray) -> Columns:
        """Where each neuron of each sign is largest in a window.

        Args:
            start: where the window's own tokens begin in the document. values: [token, neuron].
        """
        before, skipped, around = len(item.document.before), self._skipped(item, start, ids), self.of.job.around
        if not np.isfinite(values).all():
            rule = "has values that are not finite"
            raise JobError(f"document {item.id}", rule, "use another dtype, such as float32")
        counted = values[skipped:] if skipped < len(values) else np.zeros((1, values.shape[1]), np.float32)
        at = np.stack([counted.argmin(0), counted.argmax(0)], 1).ravel()  # the first of equal ones
        value = counted[at, np.arange(len(at)) // 2]
        group = np.flatnonzero(np.where(np.arange(len(at)) % 2 == 1, value > 0, value < 0))
        at, value = at[group] + skipped, value[group]
        first = before if start > before else 0  # what stands before a later window is not the document's there
        place = at[:, None] + np.arange(-around, around + 1)
        inside, clipped = (place >= first) & (place < len(ids)), place.clip(0, len(ids) - 1)
        layer, neuron = (np.array([one[part] for one in self.of.neurons])[group // 2] for part in (0, 1))
        polarity = np.where(group % 2 == 1, 1, -1)
        return {
            "group": group,
            "layer": layer,
            "neuron": neuron,
            "polarity": polarity,
            "value": value,
            "document": np.full(len(group), item.id, np.int64),
            "position": at + start - before,
            "key": peaks.keys(self.of.job.seed, layer, neuron, polarity, item.id),
            "start": np.maximum(at - around, first) + start - before,
            "tokens": np.where(inside, np.asarray(ids, np.int32)[clipped], np.int32(-1)),
            "values": np.where(inside, values[clipped, (group // 2)[:, None]], np.float32(0)),
        }

    # -------------------------------------------------------------------------------------------- rows

    def _record(self, group: list[_Item], result: _Found | tuple[str, str, str]) -> None:
        """Keep what a group came to; called in one thread."""
        if not isinstance(result, _Found):
            for item in group:
                self._lost(item.row, *result)
            return
        self._totals.merge(result.totals)
        self._parts.append(result.columns)
        if len(self._parts) > 8:
            self._parts = [_pruned(self._parts, self.of.job)]
        for item in group:
            given = {name: item.row[name] for name in ("prompt_id", "user_id", "labels")}
            self.rows.append(given | {"status": "ok", "attempts": 1 + self.task.deaths.get(item.id, 0)})

    def _table(self, of: Columns) -> pa.Table:
        """Candidates in `schemas.CANDIDATES`."""
        inside = of["tokens"] >= 0
        texts = [
            [self.of.token(number) for number in row[shown].tolist()]
            for row, shown in zip(of["tokens"], inside, strict=True)
        ]
        values = [row[shown] for row, shown in zip(of["values"], inside, strict=True)]
        plain = {name: of[name] for name in schemas.CANDIDATES.names}
        return pa.table(plain | {"tokens": texts, "values": values}, schemas.CANDIDATES)

    def _lost(self, row: dict[str, Any], status: str, error_type: str, error: str) -> None:
        """A document that nothing is known of."""
        kept = {name: row[name] for name in ("prompt_id", "user_id", "labels")}
        attempts = 1 + self.task.deaths.get(row["prompt_id"], 0)
        said = {"status": status, "error_type": error_type, "error": error[:2000], "attempts": attempts}
        self.rows.append(kept | said)


def _joined(parts: Sequence[Columns]) -> Columns:
    return {name: np.concatenate([one[name] for one in parts]) for name in parts[0]}


def _first(of: Columns) -> Columns:
    """One row of each group and document."""
    best = peaks.one_a_document(of["group"], of["value"], of["document"], of["position"])
    return {name: column[best] for name, column in of.items()}


def _pruned(parts: Sequence[Columns], job: ExemplarsJob) -> Columns:
    """The rows of several parts that may still be exemplars."""
    of = _joined(parts)
    chosen = peaks.kept(of["group"], of["value"], of["document"], (of["stratum"], of["key"]), wanted_of(job))
    return {name: column[chosen] for name, column in of.items()}
