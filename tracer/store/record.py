"""What the records of a run folder must hold, and the hash by which each is known to be as it was written.

run.json is read by everything that reads a run: a key that is gone, or of another type, is told before anything is
made of it. Knows the keys that are read. Refuses to know files, and what a job is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tracer.errors import RunError, option, quoted

DIGEST = "digest"
"""The key of a record's own hash; records that older versions wrote have none."""

_Whole = Annotated[int, Field(ge=0, le=2**62, strict=True)]


class _Record(BaseModel):
    """Of any run."""

    model_config = ConfigDict(extra="allow", strict=True)

    fingerprint: str


class _Many(_Record):
    """Of a run over many prompts."""

    job: dict[str, Any]
    numbers: dict[str, Any]
    input: str
    n_prompts: _Whole
    n_units: _Whole
    packages: dict[str, str]
    threads: Annotated[int, Field(ge=1, strict=True)] = 1
    plan: str | None = None
    others: list[str] = []
    notes: list[str] = []
    warnings: list[str] = []
    prompt_notes: dict[str, int] = {}
    model: dict[str, Any] | None = None
    memory: _Whole = 0
    extended_from: _Whole = 0


class _Revisions(_Record):
    """Of a run over revisions, whose parts are runs of their own."""

    job: dict[str, Any]
    numbers: dict[str, Any]
    parts: list[str]


MANY = ("dataset", "benchmark", "exemplars")
"""Kinds of runs that a job makes, in units."""
_KINDS: dict[Any, type[_Record]] = {
    **dict.fromkeys(MANY, _Many),
    "revisions": _Revisions,
    "trace": _Record,
    "graph": _Record,
}


def check_record(record: Mapping[str, Any]) -> None:
    """Refuse what no run's record is.

    Raises:
        RunError: it has no kind of ours, or a key is gone or of another type.
    """
    kind = record.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise damaged_record(f"its kind is {quoted(kind)}")
    try:
        _KINDS[kind].model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise damaged_record(f"{name} is {_wrong(first)}", kind) from error


def _wrong(first: Any) -> str:
    return "missing" if first["type"] == "missing" else f"{quoted(first['input'])}, which it cannot be"


def damaged_record(rule: str, kind: str | None = None) -> RunError:
    """A run.json that cannot be used."""
    many = f"repeat the run command with {option('repair', True)}, which makes it again from what is committed"
    one = f"make it again with {option('overwrite', True)}"
    step = {**dict.fromkeys((*MANY, "revisions"), many), "trace": one, "graph": one}.get(kind or "")
    return RunError("file 'run.json'", f"is damaged: {rule}", step or f"{many}; of a run of one prompt {one}")


def signed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A record with its own hash."""
    return {**content, DIGEST: _digest(content)}


def is_as_written(content: dict[str, Any]) -> bool:
    """Whether a record is the one whose hash it holds, which is taken out; one without is taken as it is."""
    digest = content.pop(DIGEST, None)
    return digest is None or digest == _digest(content)


def _digest(content: Mapping[str, Any]) -> str:
    plain = {name: value for name, value in content.items() if name != DIGEST}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
