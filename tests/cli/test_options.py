"""Options in records: typer sees them one by one, a verb gets them together."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from tracer.cli.options import flat


@dataclass(frozen=True)
class Size:
    wide: Annotated[int, typer.Option(min=1)] = 2
    high: Annotated[bool, typer.Option("--high")] = False


@dataclass(frozen=True, kw_only=True)
class Look:
    colour: Annotated[str | None, typer.Option(help="Its colour.")] = None
    size: Size
    word: Annotated[list[str] | None, typer.Option("--say")] = None


GIVEN: list[Any] = []


@flat
def draw(name: Annotated[str, typer.Argument()], look: Look, times: Annotated[int, typer.Option()] = 1) -> None:
    """Draw it."""
    GIVEN.append((name, look, times))


app = typer.Typer()
app.command()(draw)


@pytest.mark.parametrize(
    ("words", "look", "times"),
    [
        ([], Look(size=Size()), 1),
        (["--high", "--wide", "5", "--times", "3"], Look(size=Size(5, True)), 3),
        (["--say", "a", "--say", "b", "--colour", "red"], Look(colour="red", size=Size(), word=["a", "b"]), 1),
    ],
)
def test_a_verb_gets_its_options_in_records(words: list[str], look: Look, times: int) -> None:
    GIVEN.clear()
    result = CliRunner().invoke(app, [*words, "it"])
    assert (result.exit_code, GIVEN) == (0, [("it", look, times)])


def test_options_stand_where_their_record_does() -> None:
    assert list(signature(draw).parameters) == ["name", "colour", "wide", "high", "word", "times"]
    assert draw.__doc__ == "Draw it."


@pytest.mark.parametrize("words", [["--wide", "0", "it"], ["it", "--size", "3"], []])
def test_what_typer_refuses_is_refused(words: list[str]) -> None:
    assert CliRunner().invoke(app, words).exit_code == 2


def test_two_options_of_one_name_are_refused() -> None:
    def verb(size: Size, wide: Annotated[int, typer.Option()] = 1) -> None: ...

    with pytest.raises(ValueError, match="wide"):
        flat(verb)
