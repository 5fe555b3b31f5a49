"""Rows of prompts as data, before any tokenizer has seen them.

Knows the fields of a prompt, which columns they come from and which values they may have; an invalid value is
recorded in its row, never raised. Refuses to know files, networks and models.
"""

from __future__ import annotations

import datetime
import decimal
import itertools
import json
import math
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tracer.data import names as known
from tracer.data.source import MAPPED_ONLY, ROW_FIELDS
from tracer.errors import JobError, quoted
from tracer.records import is_list
from tracer.text import is_text

Hear = Callable[[str, str], None]
"""Is told what a user should know of how a source is read: a key, by which it is said once, and a sentence."""

_NUMBERS = frozenset({"token_ids", "target_ids", "foil_ids", "counterfactual_ids", "positions"})
_TOKENS = ("target", "foil")
_EITHER = (
    ("text", "token_ids", "messages"),
    *((name, f"{name}_ids") for name in _TOKENS),
    ("counterfactual", "counterfactual_ids", "counterfactual_messages"),
)
"""Fields that say the same, as text, as ids and as messages; a row gives one of them."""

_NEEDED = (*_EITHER[1:3], ("positions",), ("answer",))
"""Fields whose absence has a meaning of its own: where they are mapped, an empty one is a mistake."""
_LONGEST = 1 << 22
"""Characters, bytes or items of a value: a million tokens, which no attribution can be computed for."""
_SHOWN = 20  # of the columns that an error names
_LARGEST = 2**31 - 1  # of a token id or a position: far beyond any vocabulary, and kept by every integer column
_SCALARS = (str, int, float, decimal.Decimal, datetime.date, datetime.time, datetime.timedelta, uuid.UUID)
_WHOLE = re.compile(r"-?[0-9]{1,10}")


@dataclass(frozen=True)
class Row:
    """One prompt as its source has it: text or token ids, neither tokenized nor checked against a vocabulary.

    Attributes:
        user_id: the user's own name for it.
        text, token_ids, messages: the prompt; one of them, unless there is an `error`.
        seed: how the answer to `messages` begins.
        target, foil: tokens, each as text or as an id. answer: a text of any number of tokens.
        counterfactual: the paired prompt, as text, as token ids or as messages.
        positions: token indices where the logits are read.
        labels: the columns kept beside it, as text; a null has no entry.
        error: what is wrong with the row as data, and where; it keeps its place and counts as a failed prompt.
    """

    user_id: str | None = None
    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    target: tuple[str | int, ...] | None = None
    foil: tuple[str | int, ...] | None = None
    counterfactual: str | tuple[int, ...] | tuple[dict[str, str], ...] | None = None
    positions: tuple[int, ...] | None = None
    labels: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    messages: tuple[dict[str, str], ...] | None = None
    seed: str | None = None
    answer: str | None = None


def row_error(row: Row | Mapping[str, Any]) -> JobError:
    """The error of a row, read from a source or back from a table."""
    problem = row.error if isinstance(row, Row) else row["error"]
    return JobError("row", str(problem), "fix it where the prompts come from")


@dataclass(frozen=True)
class Unreadable:
    """A cell or a whole record that cannot be read, and why: ``"is not UTF-8 text"``."""

    problem: str


@dataclass(frozen=True)
class Columns:
    """Where fields and labels come from.

    Attributes:
        fields: field to column. labels: the columns kept. mapped: whether the user named the columns.
        unused: the columns that are there and not read.
    """

    fields: dict[str, str]
    labels: tuple[str, ...] = ()
    mapped: bool = False
    unused: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """Every column that is read, once."""
        return list(dict.fromkeys([*self.fields.values(), *self.labels]))

    def row(
        self, record: Mapping[str, Any] | Unreadable, where: str, *, written: bool = False, hear: Hear | None = None
    ) -> Row:
        """A record as a row.

        Args:
            where: the record's place, for its error.
            written: cells are text as a CSV file has them: none is empty text, and ids are written out.
            hear: is told how numbers and empty cells were read.
        """
        if isinstance(record, Unreadable):
            return Row(error=f"{record.problem} ({where})")
        problems: list[str] = []
        values: dict[str, Any] = {}
        spoken = self.mapped or record.get(self.fields.get("messages", "messages")) is not None
        for name, column in self.fields.items():
            if name == "seed" and not spoken:  # of a text it is somebody's random one
                continue
            try:
                values[name] = _field(name, record.get(column), written)
            except ValueError as error:
                problems.append(str(error))
        labels = self._labels(record, problems)
        if not problems:
            problems.extend((*_conflicts(values), *self._empty(values)))
        if hear is not None and not problems:
            self._tell(record, values, where, written, hear)
        return Row(
            user_id=values.get("id"),
            text=values.get("text"),
            token_ids=values.get("token_ids"),
            target=_either(values, "target"),
            foil=_either(values, "foil"),
            counterfactual=_either(values, "counterfactual"),
            positions=values.get("positions"),
            labels=labels,
            error=f"{problems[0]} ({where})" if problems else None,
            messages=values.get("messages"),
            seed=values.get("seed"),
            answer=values.get("answer"),
        )

    def _labels(self, record: Mapping[str, Any], problems: list[str]) -> dict[str, str]:
        """The columns that are kept beside the prompt, as text; what is wrong with one joins the `problems`."""
        labels = dict[str, str]()
        for name in self.labels:
            try:
                value = _plain(f"label {quoted(name)}", record.get(name))
                if value is not None:
                    labels[name] = _scalar(f"label {quoted(name)}", value)
            except ValueError as error:
                problems.append(str(error))
        return labels

    def _empty(self, values: Mapping[str, Any]) -> Iterable[str]:
        """Mapped fields that hold nothing: without them something else would be asked, and nobody told."""
        for group in _NEEDED if self.mapped else ():
            named = [name for name in group if name in self.fields]
            if named and all(values.get(name) is None for name in named):
                empty = " and ".join(f"{name} (column {quoted(self.fields[name])})" for name in named)
                yield f"{empty} is empty; give it a value, leave the row out, or map no column to {named[0]}"

    def _tell(
        self, record: Mapping[str, Any], values: Mapping[str, Any], where: str, written: bool, hear: Hear
    ) -> None:
        for name in _TOKENS:
            value, column = values.get(name), self.fields.get(name, name)
            shown = f"column {quoted(column)} ({name})"
            whole = [token for token in value or () if isinstance(token, str) and _WHOLE.fullmatch(token.strip())]
            ids = [token for token in value or () if isinstance(token, int)]
            if written and whole:
                hear(
                    f"{name} text",
                    f"{shown} holds {quoted(whole[0])} ({where}), which is read as text, as every cell of a CSV file; "
                    f"name the column {name}_ids if its numbers are token ids",
                )
            if ids:
                hear(
                    f"{name} id",
                    f"{shown} holds the number {ids[0]} ({where}), which is read as a token id; "
                    "write it as text if it is text",
                )
            if value is None and not self.mapped and column in record and values.get(f"{name}_ids") is None:
                rest = "the model's own top token is asked about" if name == "target" else "the target alone is"
                hear(f"{name} empty", f"{shown} is empty in some rows (the first: {where}); there {rest}")


def columns(
    given: Mapping[Any, str] | None, labels: Iterable[str], there: Sequence[str], where: str, *, may_grow: bool = False
) -> Columns:
    """Which columns are read, checked against the existing ones.

    Args:
        given: field to column; None or empty takes every column named like a field, or those of Marks et al.'s pairs.
        there: the columns there are.
        where: the file or dataset, for errors.
        may_grow: a record may have columns that `there` does not name, as JSON lines may.

    Raises:
        JobError: a column that is not there or there twice, no column of a prompt.
    """
    kept = tuple(labels)
    shown = ", ".join(quoted(name) for name in there[:_SHOWN]) + (", ..." if len(there) > _SHOWN else "")
    next_step = f"the columns there are: {shown or 'none'}"
    for name in [*(given or {}).values(), *kept]:
        if name not in there:
            raise JobError(f"column {quoted(name)}", f"is not in {where}", next_step)
    if not given and not {*_EITHER[0]} & {*there} and {*known.PAIRS.values()} <= {*there}:
        given, kept = known.PAIRS, tuple(dict.fromkeys([*kept, *({"case"} & {*there})]))
    fields = dict(given) if given else {name: name for name in _SAME_NAME if may_grow or name in there}
    if not given and not may_grow and "messages" not in there:
        fields.pop("seed", None)
    if not {*_EITHER[0]} & (set(fields) if given else set(there)):
        name, field = known.prompt_among(there) or ("COLUMN", "text")
        rule = "has no column for text or token_ids, nor messages"
        raise JobError(where, rule, f"name it under columns, such as {field}: {_key(name)}; {next_step}")
    chosen = Columns(fields, kept, bool(given))
    if twice := [name for name in chosen.names if there.count(name) > 1]:
        raise JobError(f"column {quoted(twice[0])}", f"is in {where} more than once", "give each column its own name")
    return replace(chosen, unused=tuple(name for name in dict.fromkeys(there) if name not in chosen.names))


def check_unused(chosen: Columns, there: Sequence[str], where: str) -> None:
    """Refuse to pass over a column that looks like a field, where the user named none: a target that is silently left
    out would change the metric.

    Raises:
        JobError: names the column, the field and how to say what it is.
    """
    read = {name for name, column in chosen.fields.items() if column in there}
    found = None if chosen.mapped else known.looks_like(chosen.unused, read)
    if found is None:
        return
    name, field = found
    if known.plain(name) == field:
        rule = f"of {where} is not named {field} exactly, and would not be read"
    else:
        rule = f"of {where} looks like {field}, and would not be read"
    wanted = {**{one: chosen.fields[one] for one in ROW_FIELDS if one in read and one != field}, field: name}
    mapping = ", ".join(f"{one}: {_key(column)}" for one, column in wanted.items())
    raise JobError(
        f"column {quoted(name)}",
        rule,
        f"list all that are to be read, as in columns: {{{mapping}}}, or keep it beside the prompts: "
        f"labels: [{_key(name)}]",
    )


def _key(name: str) -> str:
    """A column's name as YAML takes it."""
    return name if re.fullmatch(r"[A-Za-z_][\w.-]*", name) else quoted(name)


# ------------------------------------------------------------------------------------------------- values


def _plain(name: str, value: Any) -> Any:
    """The value, with other writers' nulls as None and bytes as text."""
    if isinstance(value, Unreadable):
        raise ValueError(f"{name} {value.problem}")
    if isinstance(value, str | bytes | list) and len(value) > _LONGEST:
        raise ValueError(f"{name} is {len(value):,} long, beyond any prompt ({_LONGEST:,} characters, bytes or items)")
    if isinstance(value, float) and math.isnan(value):  # how pandas writes a null among numbers
        return None
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{name} {quoted(value, 40)} is not UTF-8 text") from None
    return value


def _field(name: str, value: Any, written: bool) -> Any:
    """A field's value; None where there is none."""
    value = _plain(name, value)
    if written and name in _NUMBERS and value is not None:
        value = _written(name, value)
    return None if value is None else _READERS[name](name, value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {quoted(value)}, not text")
    if not is_text(value):
        raise ValueError(f"{name} {quoted(value)} holds a character that is not Unicode text")
    return value


def _scalar(name: str, value: Any) -> str:
    """One value of any kind as text; booleans as JSON writes them."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, _SCALARS):
        raise ValueError(f"{name} is {quoted(value)}, not a single value")
    return _text(name, str(value))


def _whole(name: str, value: Any, lowest: int) -> int:
    """A whole number; 1.0 counts, since pandas writes ids so where the column holds a null."""
    if isinstance(value, float | decimal.Decimal) and abs(value) <= _LARGEST and value == int(value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= _LARGEST:
        kind = "a token id is a whole number from 0" if lowest == 0 else "a position is a whole number"
        raise ValueError(f"{name} holds {quoted(value)}; {kind}")
    return value


def _list(name: str, value: Any) -> Sequence[Any]:
    if not is_list(value):
        raise ValueError(f"{name} is {quoted(value)}, not a list of whole numbers")
    if not value:
        raise ValueError(f"{name} is an empty list")
    return value


def _ids(name: str, value: Any) -> tuple[int, ...]:
    return tuple(_whole(name, item, 0) for item in _list(name, value))


def _positions(name: str, value: Any) -> tuple[int, ...]:
    return tuple(_whole(name, item, -_LARGEST) for item in _list(name, value if is_list(value) else [value]))


def _some_ids(name: str, value: Any) -> tuple[int, ...]:
    """One token id or several."""
    return _ids(name, value if is_list(value) else [value])


def _tokens(name: str, value: Any) -> tuple[str | int, ...]:
    """One token or several: text is text, and a number is a token id."""
    values = [_plain(name, item) for item in _list(name, value if is_list(value) else [value])]
    return tuple(_text(name, item) if isinstance(item, str) else _whole(name, item, 0) for item in values)


def _messages(name: str, value: Any) -> tuple[dict[str, str], ...]:
    """Messages with a role and a content each, as a list or as its JSON text; keys that hold nothing are left out."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError(f"{name} is {quoted(value)}, not JSON text of a list of messages") from None
    if not is_list(value) or not value or not all(isinstance(one, Mapping) for one in value):
        raise ValueError(f"{name} is {quoted(value)}, not a list of messages with a role and a content")
    found = []
    for one in value:
        given = {key: kept for key, kept in one.items() if kept is not None}
        if set(given) != {"role", "content"}:
            raise ValueError(f"{name} holds {quoted(given)}; a message has a role and a content, and no more")
        found.append({key: _text(f"{name}: {key}", given[key]) for key in ("role", "content")})
    return tuple(found)


def _written(name: str, value: str) -> list[int]:
    """Whole numbers as a CSV cell has them: ``1 2 3``, ``1,2,3`` or ``[1, 2, 3]``."""
    inner = value.strip()
    if inner.startswith("[") and inner.endswith("]"):
        inner = inner[1:-1].strip()
    parts = re.split(r"\s*,\s*|\s+", inner) if inner else []
    if not all(_WHOLE.fullmatch(part) for part in parts):
        raise ValueError(f"{name} is {quoted(value)}, not whole numbers such as 1 2 3 or [1, 2, 3]")
    return [int(part) for part in parts]


def _conflicts(values: Mapping[str, Any]) -> Iterable[str]:
    """Fields that contradict each other."""
    given = {name for name, value in values.items() if value is not None}
    for group in _EITHER:
        for one, other in itertools.combinations(group, 2):
            if {one, other} <= given:
                value = values[one][0] if isinstance(values[one], tuple) else values[one]
                yield f"{one} {quoted(value)} and {other} are both given; only one can be the {_CALLED[group[0]]}"
    if not {*_EITHER[0]} & given:
        yield "neither text nor token_ids is given"
    if "messages" not in given and (alone := sorted({"seed", "counterfactual_messages"} & given)):
        yield f"{alone[0]} has no effect without messages"
    if "answer" in given and (both := sorted({"target", "target_ids", "foil", "foil_ids", "positions"} & given)):
        yield f"answer and {both[0]} are both given; the answer's own tokens are what is asked about"


def _either(values: Mapping[str, Any], name: str) -> Any:
    """What a field holds, as text, as ids or as messages."""
    forms = (values.get(one) for one in (name, f"{name}_ids", f"{name}_messages"))
    return next((value for value in forms if value is not None), None)


_SAME_NAME = [name for name in ROW_FIELDS if name not in MAPPED_ONLY]
"""Fields that a column of the same name is."""

_CALLED = {"text": "prompt", "target": "target", "foil": "foil", "counterfactual": "paired prompt"}


_READERS: dict[str, Callable[[str, Any], Any]] = {
    "text": _text,
    "token_ids": _ids,
    "target": _tokens,
    "target_ids": _some_ids,
    "foil": _tokens,
    "foil_ids": _some_ids,
    "counterfactual": _text,
    "counterfactual_ids": _ids,
    "positions": _positions,
    "id": _scalar,
    "messages": _messages,
    "seed": _text,
    "counterfactual_messages": _messages,
    "answer": _text,
}
