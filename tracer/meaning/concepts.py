"""Which neurons tell prompts with one value of a label from the others: concept scores of a run.

A column is a (layer, neuron, polarity): its attributions summed over the positions of a prompt where its activation has
that sign (0 counts as positive), 0 where it is not among the prompt's nodes. A neuron that occurs with both signs in
one prompt is in both columns there, each with its own occurrences. Knows runs' tables and labels; how columns are
chosen, scored and tested is meaning/separation.py. Refuses to know models, and how scores look.

Source: Arora et al. 2026 (the area, summed over positions, absent = 0); halves and false discoveries are ours.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow.fs import FileSystem

from tracer.errors import RunError, option, quoted, say, writing
from tracer.meaning.labels import Asked, Labelled, Question, asked_of, questions_of
from tracer.meaning.separation import Array, Block, Design, Scores, Sparse, separate
from tracer.store.columns import changes, filled, neuron_rows, split_key
from tracer.store.parquet import opened, rows_of
from tracer.store.run_folder import RunFolder
from tracer.store.schemas import CONCEPTS
from tracer.system.display import Plotted

FILE = "concepts.parquet"
RATE = 0.05
"""The false discovery rate at which a neuron counts as found."""


@dataclass(frozen=True)
class Concept:
    """A value of a label that neurons were scored for.

    Attributes:
        against: the other value, where there are two; else the prompts with any other.
        n_prompts: with the label. n_columns: (layer, neuron, polarity) that any of them has.
        n_found: neurons with a q of at most `RATE`.
    """

    label: str
    value: str
    against: str | None
    n_prompts: int
    n_columns: int
    n_found: int


@dataclass(frozen=True, eq=False, repr=False)
class Concepts(Plotted):
    """Neurons that tell prompts apart, by label and value.

    Attributes:
        table: an Arrow table; of each label and value the neurons chosen on one half of the prompts, the
            farthest from .5 there first, with their area on the other half, which they were not chosen on.
        concepts: what they were scored for. left_out: values that could not be, and prompts without a label, in
            sentences. design, group: how they were chosen and tested.
    """

    table: pa.Table
    concepts: tuple[Concept, ...]
    left_out: tuple[str, ...]
    design: Design
    group: str | None = None

    def to_pandas(self) -> Any:
        """The table as a pandas DataFrame: `label`, `value`, `layer`, `neuron`, `polarity`; `auroc` with its `low` and
        `high` on the half of the prompts that the neuron was not chosen on, `auroc_chosen_on` on the other; `p`, `q`;
        `n_positive` and `n_negative` prompts."""
        return self.table.to_pandas()

    def found(self, label: str, value: str) -> list[dict[str, Any]]:
        """The neurons of a value whose q is at most .05, as rows of the table.

        Args:
            label: of the prompts. value: of the label.
        """
        rows = self.table.to_pylist()
        return [row for row in rows if (row["label"], row["value"]) == (label, value) and row["q"] <= RATE]

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "concepts": [vars(one) for one in self.concepts],
            "left_out": list(self.left_out),
            **vars(self.design),
            "group": self.group,
            "rate": RATE,
            "rows": self.table.to_pylist(),
        }


def concepts(
    run: Any,
    label: str | Sequence[str],
    values: str | Sequence[str] | None = None,
    *,
    group: str | None = None,
    candidates: int = 50,
    permutations: int = 10_000,
    seed: int = 0,
) -> Concepts:
    """Score the neurons of a run's prompts for values of their labels, each value against all other prompts.

    For every (layer, neuron, polarity) the area under the ROC curve of its attribution: P(larger on a prompt with the
    value than on one without) + P(equal) / 2. The `candidates` farthest from .5 on one half of the prompts are scored
    on the other half, with a 95 % interval, a permutation p-value in the direction of the first half, and Benjamini and
    Hochberg's q over all candidates of all values of a label. Nothing is taken from the half of the choice: the best of
    thousands of neurons looks good there whatever it is.

    Args:
        run: from `tracer.run`, or a run's folder or address.
        label: a label of the run's prompts, or several, each scored by itself.
        values: of one label, the values to score; by default all that enough prompts have, and of two the last.
        group: a label whose values name prompts that belong together, such as those of one sentence: they stay in one
            half, count as one observation, and are permuted together (where `label` varies within groups, it is
            permuted within them). By default prompts that are the same, with the same value.
        candidates: neurons tested for each value. permutations, seed: of the test.

    Returns:
        The neurons that were tested, with their areas, p and q.

    Raises:
        JobError: no such label or value, or too few prompts.
        RunError: no run there, or a damaged one.
    """
    asked = asked_of(label, values, group, candidates, permutations, seed)
    folder = RunFolder(getattr(run, "address", run))
    files, gaps = folder.tables(("prompts", "nodes"))
    say(gaps)
    fs = folder.place.fs
    found = scored(files.get("prompts", ()), files.get("nodes", ()), fs, asked)
    say(found.left_out)
    return found


def write(run: Any, found: Concepts) -> bool:
    """Write the table into a run's folder, in place of one that is there; nothing is done where the run has not ended.

    Raises:
        RunError: the folder cannot be written, or a driver is writing it now.
    """
    folder = RunFolder(getattr(run, "address", run))
    if not folder.place.exists("_SUCCESS.json"):
        return False
    with writing(folder.place, "folder", f"name a file: {option('out')}"), folder.place.locked():
        folder.write_table(FILE, found.table)
        folder.reseal([FILE])
    return True


def tokens_of(run: Any) -> pa.Table | None:
    """The run's table of what neurons promote, in `schemas.TOKENS`; None where it has none.

    Raises:
        RunError: it is damaged.
    """
    return RunFolder(getattr(run, "address", run)).find_output("tokens.parquet")


# ------------------------------------------------------------------------------------------------ of a run


def scored(prompts: Sequence[str], nodes: Sequence[str], fs: FileSystem, asked: Asked, strict: bool = True) -> Concepts:
    """Concept scores from table files in shard order.

    Memory is that of the nodes, summed over positions, 20 bytes each. The same tables give the same bytes.

    Args:
        strict: refuse what cannot be scored; else leave it out, with a sentence.

    Raises:
        JobError: as `concepts`. RunError: a file is damaged.
    """
    ids, given = _prompts(prompts, fs)
    questions, left_out = questions_of(given, asked, strict)
    keys, values = _columns(nodes, fs, ids) if questions else (np.empty((0, 3), np.int64), None)
    tables, told = [CONCEPTS.empty_table()], list[Concept]()
    for one in questions:
        block = Block(keys, values.tocsr()[one.rows].tocsc())  # type: ignore[union-attr]
        used = np.diff(block.values.indptr) > 0
        scores, count = separate([Block(keys[used], block.values[:, used])], one.rest, asked.design)
        more, which = table_of(one, scores, count)
        tables.append(more)
        told += which
    return Concepts(pa.concat_tables(tables), tuple(told), tuple(left_out), asked.design, asked.group)


def table_of(question: Question, scores: Sequence[Scores], n_columns: int) -> tuple[pa.Table, list[Concept]]:
    """A label's scores as rows in `schemas.CONCEPTS`, with q over all of them, and what they are of."""
    from scipy.stats import false_discovery_control

    p = np.concatenate([one.p for one in scores])
    q = np.split(false_discovery_control(p) if len(p) else p, np.cumsum([len(one.p) for one in scores])[:-1])
    tables, told = [CONCEPTS.empty_table()], []
    for one, value, each in zip(scores, question.values, q, strict=True):
        n = len(one.p)
        columns: dict[str, Any] = dict(zip(("layer", "neuron", "polarity"), one.keys.T, strict=True))
        columns |= {"label": [question.label] * n, "value": [value] * n, "q": each, "p": one.p}
        columns |= {"auroc": one.auroc, "auroc_chosen_on": one.chosen_on, "low": one.low, "high": one.high}
        columns |= {"n_positive": [one.n_positive] * n, "n_negative": [one.n_negative] * n}
        arrays = [pa.array(columns[column.name], column.type) for column in CONCEPTS]
        tables.append(pa.Table.from_arrays(arrays, schema=CONCEPTS))
        found = int((each <= RATE).sum())
        told.append(Concept(question.label, value, question.against, len(question.rows), n_columns, found))
    return pa.concat_tables(tables), told


def _prompts(files: Sequence[str], fs: FileSystem) -> tuple[Array, Labelled]:
    """Ids of the prompts that have a result, and these prompts.

    Raises:
        RunError: a file is damaged.
    """
    ids, tokens, labels = [np.empty(0, np.int64)], list[Hashable](), list[dict[str, str]]()
    for path in files:
        try:
            with opened(path, fs) as file:
                table = rows_of(file, ["prompt_id", "status", "token_ids", "labels"])
        except (OSError, pa.ArrowException, KeyError) as error:
            raise RunError(f"file {quoted(path, 200)}", "is missing or damaged", "repeat the run command") from error
        table = table.filter(pa.array([status == "ok" for status in table["status"].to_pylist()], pa.bool_()))
        ids.append(filled(table, ["prompt_id"])["prompt_id"])
        tokens += [tuple(one or ()) for one in table["token_ids"].to_pylist()]
        labels += [dict(one or ()) for one in table["labels"].to_pylist()]
    return np.concatenate(ids), Labelled(tokens, labels)


def _columns(files: Sequence[str], fs: FileSystem, ids: Array) -> tuple[Array, Sparse]:
    """The columns (layer, neuron, polarity), sorted, and their values [prompt, column]."""
    from scipy.sparse import csc_array

    keys, rows, values = [np.empty(0, np.int64)], [np.empty(0, np.int32)], [np.empty(0)]
    with closing(neuron_rows(files, fs, ["attribution", "activation"])) as parts:
        for part in parts:
            if not np.isfinite(part["attribution"]).all():
                raise RunError("a nodes table", "has an attribution that is not finite", "run it again")
            column = 2 * part["key"] + (part["activation"] < 0)
            order = np.lexsort((part["prompt"], column))
            column, prompt = column[order], part["prompt"][order]
            start = np.flatnonzero(changes(column, prompt))
            if not len(start):
                continue
            keys.append(column[start])
            rows.append(np.searchsorted(ids, prompt[start]).astype(np.int32))
            values.append(np.add.reduceat(part["attribution"][order].astype(np.float64), start))
    columns, of = np.unique(np.concatenate(keys), return_inverse=True)
    table = csc_array((np.concatenate(values), (np.concatenate(rows), of)), shape=(len(ids), len(columns)))
    layer, neuron = split_key(columns // 2)
    return np.stack([layer, neuron, 1 - 2 * (columns % 2)], axis=1), table
