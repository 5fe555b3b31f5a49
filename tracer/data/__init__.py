"""Datasets of prompts: files, Hugging Face datasets and built-in tasks as one stream of rows.

Reads JSON lines, CSV and Parquet (also compressed, in folders, by globs, in buckets) in memory that does not grow with
them. Knows where rows come from, and a digest of it. Refuses to know tokenizers, models and run folders.

    for row in data.read(Source(path="prompts/*.jsonl", columns={"text": "question"}, labels=["topic"])):
        ...

**Numbers.** In `target` and `foil`, text is text and a number is a token id. A CSV cell is text exactly as written,
spaces included, and nothing where it is empty: 7 is the text "7". The fields that end in _ids, and positions, are whole
numbers in every format (in CSV as 1 2 3 or [1, 2, 3]). How numbers were read is told to `heard`, and stands in a run's
record.

Door: `read` and the functions below, `source.Source`, `tasks`; for tables that are not prompts `files.find`,
`formats.columns`, `formats.records` and `rows.Unreadable`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence

from tracer.data import formats, tasks
from tracer.data.files import File, find
from tracer.data.hub import Hub
from tracer.data.rows import Columns, Hear, Row, check_unused, columns
from tracer.data.rows import row_error as row_error
from tracer.data.source import ROW_FIELDS, Source
from tracer.errors import JobError, quoted

_SHOWN = 20  # of the unused columns that are named


def read(source: Source, limit: int | None = None, heard: Callable[[str], None] | None = None) -> Iterator[Row]:
    """The rows of a source, in its order, the files of a folder or glob by name.

    Args:
        limit: no more rows than this, nor than the source's own limit.
        heard: is told once each, while rows are read, what a user should know of how: which columns are not used, and
            how numbers and empty cells were taken.

    Raises:
        JobError: before the first row for a source that is not there, holds none, or lacks a column (the existing ones
            are named), a column that looks like a field and is neither mapped nor a label, and files whose columns
            differ; later, for a file or connection that breaks off. What is wrong with one row is its `Row.error`.
    """
    if limit is not None and limit < 1:
        raise JobError(f"limit={limit}", "at least one prompt is needed", "use 1 or more, or leave it out")
    most = min((given for given in (limit, source.limit) if given is not None), default=None)
    if source.path is not None:
        rows = _of_files(source, find(source.path), _once(heard))
    elif source.dataset is not None:
        hub = Hub(source.dataset, source.config, source.split, source.revision)
        rows = _of_hub(source, hub, _once(heard))
    else:
        rows = _of_task(source)
    first = next(rows, None)
    if first is None:
        raise JobError(_named(source), "holds no prompt", "give at least one row")
    return itertools.islice(itertools.chain([first], rows), most)


def _once(heard: Callable[[str], None] | None) -> Hear:
    """`heard`, told each thing once."""
    said: set[str] = set()

    def hear(key: str, text: str) -> None:
        if heard is not None and key not in said:
            said.add(key)
            heard(text)

    return hear


def digest(source: Source) -> str:
    """SHA-256, in hexadecimal digits, that changes with the content: of files the bytes with their names in order, of a
    task its parameters, of a Hugging Face dataset the commit that its revision means now.

    Raises:
        JobError: a source that is not there or cannot be read.
    """
    if source.path is not None:
        content: list[object] = ["path", *([file.name, file.digest()] for file in find(source.path))]
    elif source.dataset is not None:
        hub = Hub(source.dataset, source.config, source.split, source.revision)
        # A folder may be moved: it is identified by its content.
        content = ["dataset", None if hub.local else hub.name, hub.config, hub.split, hub.digest()]
    else:
        content = ["task", source.task, source.structure, source.split, source.count, source.seed]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _named(source: Source) -> str:
    if source.path is not None:
        return f"path {quoted(source.path[0] if len(source.path) == 1 else list(source.path), 300)}"
    return f"dataset {quoted(source.dataset, 200)}" if source.dataset is not None else f"task {source.task}"


# -------------------------------------------------------------------------------------------------- files


def _of_files(source: Source, files: Sequence[File], hear: Hear) -> Iterator[Row]:
    chosen = _columns_of_files(source, files)
    _tell_unused([name for used in chosen.values() for name in used.unused], hear)
    for file in files:
        if (used := chosen.get(file.path)) is not None:
            for where, record in formats.records(file, used.names):
                yield used.row(record, where, written=file.kind == "csv", hear=hear)


def _tell_unused(names: Iterable[str], hear: Hear) -> None:
    if unused := list(dict.fromkeys(names)):
        some = ", ".join(map(quoted, unused[:_SHOWN])) + (f" and {len(unused) - _SHOWN} more" * (len(unused) > _SHOWN))
        hear("unused", f"unused columns: {some}")


def _columns_of_files(source: Source, files: Sequence[File]) -> dict[str, Columns]:
    """What is read of each file that is not empty, by its path; all files are checked before the first is read."""
    wanted = {*source.columns.values(), *source.labels}
    there = {file.path: names for file in files if (names := formats.columns(file, wanted)) is not None}
    lines = any(file.kind == "json" for file in files)
    if lines and not source.columns:
        # A key missing in some records is a null; one that a whole file lacks is likely a mistake.
        used = {name for names in there.values() for name in names if name in ROW_FIELDS}
        for file in files:
            if file.path in there and not used <= set(there[file.path]):
                there[file.path] = formats.columns(file, wanted | used) or []
    chosen: dict[str, Columns] = {}
    first: tuple[File, list[str]] | None = None
    for file in (file for file in files if file.path in there):
        names = there[file.path]
        chosen[file.path] = columns(source.columns, source.labels, names, file.shown, may_grow=lines)
        kept = [name for name in names if name in ROW_FIELDS and not source.columns] if lines else names
        first = first or (file, kept)
        _check_alike(file, kept, *first)
    for file in (file for file in files if file.path in there):
        check_unused(chosen[file.path], there[file.path], file.shown)
    return chosen


def _check_alike(file: File, names: Iterable[str], first: File, its: Iterable[str]) -> None:
    if differing := sorted({*names} ^ {*its}):
        rule = f"has other columns than {quoted(first.path, 150)}: {', '.join(map(quoted, differing[:5]))}"
        raise JobError(file.shown, rule, "read files of different columns as sources of their own")


# ------------------------------------------------------------------------------------------ other sources


def _of_hub(source: Source, hub: Hub, hear: Hear) -> Iterator[Row]:
    there, may_grow, records = hub.open()
    if not there:
        return
    chosen = columns(source.columns, source.labels, there, hub.shown, may_grow=may_grow)
    hub.check(chosen)
    check_unused(chosen, there, hub.shown)
    _tell_unused(chosen.unused, hear)
    shown = quoted(hub.name, 100)
    for number, record in enumerate(records, start=1):
        yield chosen.row(record, f"row {number} of {shown}, {hub.split}", hear=hear)


def _of_task(source: Source) -> Iterator[Row]:
    assert source.task is not None
    given = {"structure": source.structure, "count": source.count}
    options = {name: value for name, value in given.items() if value is not None}
    kind = {} if source.structure is None else {"structure": source.structure}
    begins = f"{source.structure or source.task}/{source.split}"
    if source.task in tasks.QUESTIONS:
        for number, one in enumerate(tasks.ask(source.task, split=source.split, seed=source.seed, **options)):
            said = None if one.seed is None else ({"role": "user", "content": one.asked},)
            yield Row(
                user_id=f"{begins}/{number}",
                text=one.asked if said is None else None,
                messages=said,
                seed=one.seed,
                target=(one.target,),
                labels={**kind, **one.labels},
            )
        return
    pairs = tasks.load(source.task, split=source.split, seed=source.seed, **options)
    for number, pair in enumerate(pairs):
        yield Row(
            user_id=f"{begins}/{number}",
            text=pair.prompt,
            target=(pair.target,),
            foil=(pair.foil,),
            counterfactual=pair.counterfactual,
            labels={**kind, "case": pair.case, **pair.labels},
        )
