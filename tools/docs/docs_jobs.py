"""The reference of job files: every key of every kind of job, and the shipped job files themselves.

Keys, types and defaults are those of the pydantic records that read a job; what is said of a key is its record's
docstring. Refuses to know any key.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

import tracer
from docs_docstrings import entries
from tracer.runs import jobs

ROOT = Path(__file__).resolve().parents[2]
KINDS: tuple[type[BaseModel], ...] = (jobs.DatasetJob, jobs.BenchmarkJob, jobs.RevisionsJob, jobs.ExemplarsJob)
OPTIONS = ("model", "revision", "adapter", "gguf_file", "dtype", "device", "device_map", "attention")
SAID = {
    "model": "`demo`, a folder, a GGUF file or a Hugging Face id.",
    "bos": "Texts begin with the beginning-of-sequence token where the tokenizer does not put it; token ids stay.",
    "remote": "On an NDIF server.",
    "host": "Of a remote model: its address, without a key.",
    "weights": "`local`: of a remote model, load the weights here too, where the server takes no gradients.",
    "wire": "Of a remote model: how dense tensors travel.",
    "in_flight": "Of a remote model: requests that the run has at the server at a time, over all workers; 4 without.",
}
"""Keys of how a model is loaded, of which the records say that they are as in `tracer.load`."""


def records() -> dict[str, type[BaseModel]]:
    """Every record that a job can hold, by its name, each kind of job first."""
    found: dict[str, type[BaseModel]] = {}
    todo = list(KINDS)
    while todo:
        record = todo.pop(0)
        if record.__name__ not in found:
            found[record.__name__] = record
            todo += [one for field in record.model_fields.values() for one in inner(field.annotation)]
    return found


def inner(kind: Any) -> Iterator[type[BaseModel]]:
    """The records in an annotation."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    for part in get_args(kind):
        yield from inner(part)


def shown(kind: Any) -> str:
    """An annotation as a reader of YAML takes it."""
    parts, origin = get_args(kind), get_origin(kind)
    if kind is type(None) or kind is None:
        text = ""
    elif origin is Annotated:
        text = shown(parts[0])
    elif origin is Literal:
        text = ", ".join(f"`{one}`" for one in parts)
    elif origin in (Union, types.UnionType):
        text = " or ".join(dict.fromkeys(said for one in parts if (said := shown(one))))
    elif origin in (tuple, list):
        text = f"list of {shown(parts[0])}"
    elif isinstance(kind, type) and issubclass(kind, BaseModel):
        text = f"[keys](#{kind.__name__.lower()})"
    else:
        text = PLAIN.get(origin or kind, "value")
    return text


PLAIN = {int: "whole number", float: "number", bool: "`true`, `false`", str: "text", dict: "mapping"}


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if value is None or isinstance(value, BaseModel) or (not value and isinstance(value, tuple | dict)):
        return ""
    if isinstance(value, tuple):
        return f"`[{', '.join(str(one) for one in value)}]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def described(record: type[BaseModel]) -> dict[str, str]:
    """What is said of each key of a record: by its own docstring, or by that of the public name which this refers to; a
    key that is explained within another's entry refers there."""
    names = [name for name in record.model_fields if name != "kind"]
    found = entries(record.__doc__ or "", names)
    found |= {name: "As in [`tracer.load`][]." for name in OPTIONS if name in names}
    found |= {name: text for name, text in SAID.items() if name in names}
    for name in names:
        if name not in found:
            within = next((other for other, text in found.items() if f"`{name}`" in text), None)
            found[name] = f"See `{within}`." if within else _elsewhere(record, names).get(name, "")
    return found


def _elsewhere(record: type[BaseModel], names: list[str]) -> dict[str, str]:
    """What the docstring of the public name says that a record's first paragraph refers to."""
    referred = re.search(r"`tracer\.(\w+)`", _first(record))
    return entries(inspect.getdoc(getattr(tracer, referred[1])) or "", names) if referred else {}


def table(record: type[BaseModel]) -> list[str]:
    """A record's keys."""
    said = described(record)
    lines = [
        '<div class="options" markdown>',
        "",
        "| key | value | default | what it says |",
        "| --- | --- | --- | --- |",
    ]
    for name, field in record.model_fields.items():
        if name == "kind":
            continue
        text = re.sub(r"``([^`]*)``", r"`\1`", said.get(name, "")).replace("|", "\\|")
        lines.append(
            f"| `{name}` | {shown(field.annotation).replace('|', chr(92) + '|')} | {_default(field)} | {text} |"
        )
    return [*lines, "", "</div>"]


def _first(record: type[BaseModel]) -> str:
    return " ".join((record.__doc__ or "").strip().split("\n\n")[0].split())


def keys_page() -> str:
    """Every key of every kind of job."""
    lines = ["# Keys of a job file", "", INTRODUCTION, ""]
    kinds = set(KINDS)
    for record in records().values():
        kind = record.model_fields["kind"].default if "kind" in record.model_fields else None
        head = f"kind: {kind}" if record in kinds else f"keys of {record.__name__}"
        lines += [f"## {head} {{ #{record.__name__.lower()} }}", "", _first(record), "", *table(record), ""]
    return "\n".join(lines)


INTRODUCTION = """\
A job file is YAML. Its `kind` says what is run; `tracer run JOB --out FOLDER` runs it. Any key can be changed from the
command line: `--set nodes=500`, one within another with a dot: `--set input.count=200`. A key that nobody knows, or
that would have no effect, is refused before anything is computed. [The shipped files](job-files.md) are commented and
can be copied."""


def files() -> list[Path]:
    """The shipped job files, and those of clusters."""
    return [path for path in sorted((ROOT / "jobs").rglob("*")) if path.is_file()]


def anchor(path: Path) -> str:
    """Where a file stands on their page."""
    return re.sub(r"[^a-z0-9]+", "-", path.relative_to(ROOT).as_posix().lower()).strip("-")


def files_page() -> str:
    """The shipped job files, whole."""
    lines = ["# Shipped job files", "", "As they lie in `jobs/`. Copy one, and change it.", ""]
    for path in files():
        language = {".yaml": "yaml", ".sh": "bash"}.get(path.suffix, "docker" if path.name == "Dockerfile" else "text")
        text = path.read_text(encoding="utf-8").rstrip()
        name = path.relative_to(ROOT).as_posix()
        lines += [f"## {name} {{ #{anchor(path)} }}", "", f"~~~{language}", text, "~~~", ""]
    return "\n".join(lines)


def pages() -> dict[str, tuple[str, str]]:
    """Both pages by their path: title and text."""
    return {
        "reference/job-keys.md": ("Keys", keys_page()),
        "reference/job-files.md": ("Shipped files", files_page()),
    }
