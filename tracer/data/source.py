"""Where prompts come from: the record that a job, or a caller, gives to `data.read`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_serializer, model_validator

from tracer.choices import Attribute, Keep, Opposites, Paired, Structure, Unpaired
from tracer.records import Count, Name, Names, Natural, Record, as_list, is_list

STRUCTURES: dict[str, tuple[str, ...]] = {
    "sva": get_args(Structure),
    "opposites": get_args(Opposites),
    "users": get_args(Attribute),
}
"""Of the tasks that have structures: one of these must be named."""

RowField = Literal[
    "text",
    "token_ids",
    "target",
    "target_ids",
    "foil",
    "foil_ids",
    "counterfactual",
    "counterfactual_ids",
    "positions",
    "id",
    "messages",
    "seed",
    "counterfactual_messages",
    "answer",
]

MAPPED_ONLY = frozenset({"answer"})
"""Fields that a column is only where it is mapped: columns of that name mostly hold a target."""

ROW_FIELDS: tuple[str, ...] = get_args(RowField)
"""What a row of a dataset may give of its prompt."""


def _paths(value: Any) -> Any:
    value = as_list(value)
    return [os.fspath(path) if isinstance(path, os.PathLike) else path for path in value] if is_list(value) else value


TAKES: dict[str, frozenset[str]] = {
    "path": frozenset({"columns", "labels"}),
    "dataset": frozenset({"config", "split", "revision", "columns", "labels"}),
    "task": frozenset({"split", "structure", "count", "seed"}),
}
"""The kinds of sources, and the fields that have an effect on each beside `limit`."""


class Source(Record):
    """Where prompts come from: files, a Hugging Face dataset, or a built-in task.

    Attributes:
        path: files, folders or globs: JSON lines, JSON, Parquet, CSV, also compressed (.gz). Relative ones are relative
            to the current directory.
        dataset: a Hugging Face id or a local builder, with its `config` and `revision`.
        split: of a dataset or a task (``train`` or ``test``).
        task: ``sva``, ``capitals``, ``states``, ``countries``, ``opposites`` or ``indirect``, with `count` pairs drawn
            with `seed`; or ``state-capitals``, ``addition``, ``antonyms`` or ``users``, with prompts that have no
            counterfactual, and the split ``all`` too. sva, opposites and users have a `structure`.
        columns: the column that each field of a prompt is read from, by field. By default every field that has a column
            of the same name; a column whose name only looks like a field's is then an error. A mapped target, foil or
            position that is empty fails its row.
        labels: columns that are kept as labels of the prompt.
        limit: only the first so many rows.
        filter: only prompts that the model answers so, of those that there are: ``correct``, the target is its greedy
            next token; ``preferred``, it gives the target a larger logit than the foil (the mean of several). Reading
            takes no notice of it: whoever has the model asks it, and says what was left out.
    """

    path: Annotated[tuple[Name, ...], BeforeValidator(_paths)] | None = None
    dataset: Name | None = None
    config: Name | None = None
    split: Name = "train"
    revision: Name | None = None
    task: Paired | Unpaired | None = None
    structure: Structure | Opposites | Attribute | None = None
    count: Count | None = None
    seed: Natural = 0
    columns: dict[RowField, Name] = Field(default_factory=dict)
    labels: Names = ()
    limit: Count | None = None
    filter: Keep | None = None

    @model_serializer(mode="wrap")
    def _without_no_filter(self, dump: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Runs from before there was a filter go on."""
        return {name: value for name, value in dump(self).items() if name != "filter" or value is not None}

    @model_validator(mode="after")
    def _has_effect(self) -> Source:
        given = [name for name in ("path", "dataset", "task") if getattr(self, name) is not None]
        if len(given) != 1:
            sources = " and ".join(given) or "none of them"
            raise ValueError(f"prompts come from one of path, dataset and task, not from {sources}")
        for name, default in _DEFAULTS_OF_SOURCE.items():
            if name not in TAKES[given[0]] and getattr(self, name) != default:
                raise ValueError(f"{name} has no effect with {given[0]}")
        if self.path == ():
            raise ValueError("path must name at least one file")
        if len(set(self.labels)) < len(self.labels):
            raise ValueError("labels must name each column once")
        if self.task is not None:
            self._check_task()
        return self

    def _check_task(self) -> None:
        if self.count is None:
            raise ValueError(f"the task {self.task} needs a count of pairs")
        splits = ("train", "test", "all") if self.task in get_args(Unpaired) else ("train", "test")
        if self.split not in splits:
            raise ValueError(f"the split of a task must be {' or '.join(splits)}, not {self.split!r}")
        known = STRUCTURES.get(str(self.task), ())
        if self.structure not in (known or (None,)):
            has = f"needs a structure: {', '.join(known)}" if known else "has no structure"
            raise ValueError(f"the task {self.task} {has}")

    @property
    def origin(self) -> tuple[Any, ...]:
        """What the rows are drawn from, whatever part of them is taken and how it is read."""
        return (
            (self.path, self.dataset, self.config, self.split, self.revision),
            (self.task, self.structure, self.seed),
        )

    @property
    def most(self) -> int | None:
        """No more rows than this; None where that is not known."""
        known = [bound for bound in (self.count, self.limit) if bound is not None]
        return min(known) if known else None


_DEFAULTS_OF_SOURCE: dict[str, Any] = {
    name: Source.model_fields[name].get_default(call_default_factory=True)
    for name in ("config", "split", "revision", "structure", "count", "seed", "columns", "labels")
}
