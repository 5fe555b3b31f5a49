"""The base of our records: strict fields, and values that are read as lists and integers."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from typing import Annotated, Any, TypeGuard

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

_OF_ALL = frozenset(dir(object)) | {"_repr_html_"}
_INHERITED = frozenset(dir(BaseModel)) - _OF_ALL


class Record(BaseModel):
    """Never changes, and takes no field that it does not have."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __dir__(self) -> list[str]:
        """Its own names: what pydantic brings along is of no use to whoever completes one."""
        own = {name for name in super().__dir__() if name not in _INHERITED}
        return [name for name in own if not name.startswith("_") or name in _OF_ALL]


def is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    """Whether a value is several: a sequence, but not text."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def as_list(value: Any) -> Any:
    """One name, number or path where a list is wanted is a list of one: ``--set methods=relp``."""
    return [value] if isinstance(value, str | int | float | os.PathLike) else value


def as_python(value: Any) -> Any:
    """An array or a tensor as Python numbers and lists; anything else unchanged."""
    return value.tolist() if hasattr(value, "tolist") else value


def as_int(value: Any) -> int | None:
    """An integer of any library as an int; None for anything else, booleans included."""
    try:
        return None if isinstance(value := as_python(value), bool) else operator.index(value)
    except TypeError:
        return None


LARGEST = 2**63 - 1
"""What an integer of 64 bits can be: torch and Arrow take no larger one."""
Count = Annotated[int, Field(ge=1, le=LARGEST, strict=True)]
Natural = Annotated[int, Field(ge=0, le=LARGEST, strict=True)]
Name = Annotated[str, Field(min_length=1)]
Names = Annotated[tuple[Name, ...], BeforeValidator(as_list)]
