"""What the records that people write have in common: strict fields, and one value where a list is wanted."""

from __future__ import annotations

import os
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Record(BaseModel):
    """Never changes, and takes no field that it does not have."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def is_list(value: Any) -> bool:
    """A list or a tuple: what YAML and Python write for several values."""
    return isinstance(value, list | tuple)


def as_list(value: Any) -> Any:
    """One name, number or path where a list is wanted is a list of one: ``--set methods=relp``."""
    return [value] if isinstance(value, str | int | float | os.PathLike) else value


Count = Annotated[int, Field(ge=1, strict=True)]
Natural = Annotated[int, Field(ge=0, strict=True)]
Name = Annotated[str, Field(min_length=1)]
Names = Annotated[tuple[Name, ...], BeforeValidator(as_list)]
