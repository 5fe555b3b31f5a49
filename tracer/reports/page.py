"""Pages of text, tables and drawings: a verdict first, then sections; and how a template becomes one HTML file.

Knows what a page is made of and in which order its head stands. Refuses to know what it is about: whoever makes one
gives its words and rows. A page is self-contained: no script, no address, drawings inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from tracer.reports.sheet import Sheet
from tracer.reports.verdict import Verdict


class Link(NamedTuple):
    """A file of the run: its address relative to the page, or None where there is none; its name; what it is."""

    address: str | None
    name: str
    text: str


class Block(NamedTuple):
    """A part of a section: what kind of one, as the template has it, and its content."""

    kind: str
    content: Any


def text(words: str) -> Block:
    """A paragraph."""
    return Block("text", words)


def note(words: str) -> Block:
    """A remark in small letters."""
    return Block("note", words)


def missing(what: str, how: str) -> Block:
    """What is not there, and how to get it."""
    return Block("missing", (what, how))


def table(rows: Sheet) -> Block:
    """A table; its name must be its own on the page."""
    return Block("table", rows)


def figure(picture: Markup, caption: str) -> Block:
    """A drawing with what it shows."""
    return Block("figure", (picture, caption))


def points(lines: Sequence[str]) -> Block:
    """A list of sentences."""
    return Block("points", tuple(lines))


def links(files: Sequence[Link]) -> Block:
    """A list of files."""
    return Block("links", tuple(files))


def code(lines: str) -> Block:
    """What to type."""
    return Block("code", lines)


class Shaded(NamedTuple):
    """A line of tokens, each with its class (see `shade`) and a remark; what is said before them."""

    lead: str
    tokens: tuple[tuple[str, str, str], ...]


def shade(value: float, largest: float) -> str:
    """The class of a token by its value: its sign and, in eighths of the largest size, how strong; empty of a weak
    one."""
    level = round(8 * min(1.0, abs(value) / largest)) if largest > 0 else 0
    return f"{'p' if value > 0 else 'n'}{level}" if level else ""


def shaded(title: str, lines: Sequence[Shaded]) -> Block:
    """Lines of tokens under a small heading."""
    return Block("shaded", (title, tuple(lines)))


@dataclass(frozen=True)
class Section:
    """A part of a page under a heading; `name` is its id on the page."""

    name: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    """A whole page.

    Attributes:
        kind: what sort of report it is. title: what it is about. summary: in a sentence or two.
        verdict: what came of it. findings: sentences that bear it out.
        cards: the numbers to remember: name, value, what goes with it.
    """

    kind: str
    title: str
    summary: str
    verdict: Verdict
    findings: tuple[str, ...]
    cards: tuple[tuple[str, str, str], ...]
    sections: tuple[Section, ...]

    def html(self) -> str:
        """The page as text, to be written as UTF-8."""
        return render("page.html.jinja", page=self)


def render(template: str, **values: Any) -> str:
    """One of the templates beside this file with these values; text in them is escaped."""
    room = resources.files("tracer.reports")
    surroundings = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: room.joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return surroundings.get_template(template).render(**values)
