"""The user's defaults of options: the file tracer.toml and variables TRACER_*, what they may say, and which holds.

An option that is given wins over a variable, that over the file, that over what is built in. Knows which verbs take a
default: those that read a circuit take its own model, and a job file says all of what it does. A key or a variable that
is not known is an error with what was meant. Refuses to know secrets: it says whether they are there.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from tracer.choices import Dtype
from tracer.cli.defaults import ELSEWHERE, FILE, PREFIX, config_file
from tracer.errors import JobError, first_line, meant, quoted


class Defaults(BaseSettings):
    """What a user may set for all verbs."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    model: str | None = Field(
        default=None, min_length=1, description="'demo', a folder, a GGUF file or a Hugging Face id"
    )
    device: str | None = Field(default=None, min_length=1, description="cpu, cuda, cuda:1")
    dtype: Dtype | None = Field(default=None, description="of the weights")
    bos: bool | None = Field(default=None, description="begin texts with the beginning-of-sequence token")
    format: Literal["auto", "table", "tsv", "csv", "json"] | None = Field(
        default=None, description="how results are printed"
    )
    rows: int | None = Field(default=None, ge=1, lt=2**31, description="shown of a table")
    workers: int | None = Field(default=None, ge=1, lt=2**31, description="processes of a run")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Variables, then the file."""
        del init_settings, dotenv_settings, file_secret_settings
        return env_settings, TomlConfigSettingsSource(settings_cls, config_file())


class Found(NamedTuple):
    """The value of a key, and where it comes from; None where nothing says it."""

    key: str
    value: Any
    source: str | None


ONLY: dict[str, frozenset[str]] = {
    "model": frozenset({"trace", "contrast"}),
    "device": frozenset(),
    "dtype": frozenset(),
    "bos": frozenset({"trace", "steer", "sweep", "swap", "contrast", "compare"}),
}
"""Verbs that take a default as they take the option. Others read a circuit, whose record says its model, its numbers
and how its prompt begins: they take what is a fallback where no record says it, as all do with device and dtype."""
JOBS = frozenset({"run", "plan", "submit", "exemplars"})
"""Verbs of job files, which say all that decides a run's numbers: of defaults they take how many processes work and how
results are printed."""
PRINTED = frozenset({"workers", "format", "rows"})


def read() -> list[Found]:
    """Every key, its value and where that comes from.

    Raises:
        JobError: a file that cannot be read, a key or a variable that is not known, a value that cannot be.
    """
    path = config_file()
    content = _content(path)
    _check_variables()
    known = Defaults.model_fields
    for key in content:
        if key not in known:
            step = meant(key, known) or f"use {', '.join(known)}"
            raise JobError(f"key {quoted(key)} in {_place(path, key)}", "is not known", step)
    try:
        merged = Defaults()
    except ValidationError as error:
        raise _refused(error, path, content) from None
    return [_found(key, getattr(merged, key), content, path) for key in known]


def given(found: list[Found]) -> dict[str, Any]:
    """Those that something says."""
    return {one.key: one.value for one in found if one.source is not None}


def fallback(values: Mapping[str, Any]) -> dict[str, Any]:
    """What stands for the built-in model, its device and its numbers where no option and no circuit says others."""
    return {name: values[name] for name in ("model", "device", "dtype", "bos") if name in values}


def of_verbs(values: Mapping[str, Any], verbs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The defaults of each verb, by its name and the names of its options' arguments.

    Args:
        verbs: the commands by their names.
    """
    return {name: dict(_of_verb(name, verb, values)) for name, verb in verbs.items()}


def _of_verb(name: str, verb: Any, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for option in verb.params:
        key = next((one[2:] for one in option.opts if one.startswith("--")), "")
        if key not in values or (key in ONLY and name not in ONLY[key]) or (name in JOBS and key not in PRINTED):
            continue
        if key == "format" and option.name != "style":
            continue
        yield option.name, values[key]


def _found(key: str, value: Any, content: Mapping[str, Any], path: Path | None) -> Found:
    variable = PREFIX + key.upper()
    if any(name.upper() == variable for name in os.environ):
        return Found(key, value, variable)
    return Found(key, value, _place(path, key) if key in content else None)


def _content(path: Path | None) -> dict[str, Any]:
    """What the file holds; nothing where there is none."""
    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise JobError(f"{FILE} {str(path)!r}", f"cannot be read ({error.strerror or error})", "check it") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise JobError(f"{FILE} {str(path)!r}", f"is not TOML ({first_line(error)})", "fix that line") from None


def _check_variables() -> None:
    """Refuse a variable that no part of tracer reads."""
    known = {PREFIX + key.upper() for key in Defaults.model_fields} | ELSEWHERE
    for name in sorted(os.environ):
        upper = name.upper()
        if upper.startswith(PREFIX) and upper not in known and not upper.startswith(f"{PREFIX}TEST_"):
            step = meant(upper, known) or f"unset it; there are {', '.join(sorted(known))}"
            raise JobError(f"variable {name}", "is not known", step)


def _refused(error: ValidationError, path: Path | None, content: Mapping[str, Any]) -> JobError:
    """A value that cannot be, with the variable or the line of the file that gives it."""
    first = error.errors()[0]
    key = str(first["loc"][0])
    rule = first["msg"].replace("Input should be", "must be").partition(", unable")[0]
    names = re.findall(r"'([^']*)'", rule) if first["type"] == "literal_error" else []
    source = _found(key, None, content, path).source
    step = meant(first["input"], names) or "change it, or leave it out"
    return JobError(f"{key} = {quoted(first['input'])} of {source}", rule, step)


def _place(path: Path | None, key: str) -> str:
    """The file and the line where a key is set."""
    try:
        lines = [] if path is None else path.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    form = re.compile(rf"\s*(?:\[+\s*)?[\"']?{re.escape(key)}[\"']?\s*[=.\]]")
    number = next((number for number, line in enumerate(lines, 1) if form.match(line)), None)
    return f"{path}" if number is None else f"{path}, line {number}"
