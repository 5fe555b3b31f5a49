"""The reference of the Python interface: a page for each room that has public names, an entry for each name.

The names are those of ``tracer.__all__``, and their pages follow from where they live, so that a new name is there as
soon as it is public. What is said of each is its docstring, which mkdocstrings renders. Refuses to know docstrings.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping

import tracer

TITLES = {
    "prompts": "Prompts",
    "model": "Models",
    "ndif": "Loading a model",
    "attribution": "Attribution and circuits",
    "circuit": "The result",
    "evaluation": "Does it hold, steering",
    "meaning": "What neurons mean",
    "comparison": "Comparison",
    "runs": "Runs over many prompts",
    "reports": "Pages",
    "errors": "Errors",
}
"""Rooms in the order of the reference; one that is not here comes last, by its own name."""


def rooms() -> dict[str, list[str]]:
    """Each room's public names: classes and functions, the functions first, as `tracer.__all__` orders them."""
    found: dict[str, list[str]] = {}
    for name in tracer.__all__:
        if not name.startswith("_"):
            found.setdefault(home(name).split(".")[0], []).append(name)
    order = [room for room in TITLES if room in found] + sorted(set(found) - set(TITLES))
    return {room: sorted(found[room], key=lambda name: (name[0].isupper(), name)) for room in order}


def home(name: str) -> str:
    """The module in which a public name lives, below ``tracer``."""
    homes: Mapping[str, str] = vars(tracer).get("_HOME", {})
    return homes.get(name) or "errors"


def title(room: str) -> str:
    """A room's title in the reference."""
    return TITLES.get(room, room.capitalize())


def path(room: str) -> str:
    """Where its page lies."""
    return f"reference/python/{room}.md"


def page(room: str, names: list[str]) -> str:
    """A room's page."""
    door = (importlib.import_module(f"tracer.{room}").__doc__ or "").strip().splitlines()[0]
    lines = [
        f"# {title(room)}",
        "",
        f"{door.split(':', 1)[-1].strip()[:1].upper()}{door.split(':', 1)[-1].strip()[1:]}",
    ]
    lines += ["", " · ".join(f"[`{name}`](#tracer.{name})" for name in names), ""]
    for name in names:
        lines += [f"::: tracer.{name}", ""]
    return "\n".join(lines)


def pages() -> dict[str, tuple[str, str]]:
    """Every page by its path: title and text."""
    return {path(room): (title(room), page(room, names)) for room, names in rooms().items()}


def index() -> str:
    """A table of all names: what each is, in its docstring's first sentence."""
    lines = ["| name | what it is |", "| --- | --- |"]
    for room, names in rooms().items():
        for name in names:
            said = (getattr(tracer, name).__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
            first = said.split(". ")[0].rstrip(".").replace("|", "\\|").replace("``", "`")
            lines.append(f"| [`tracer.{name}`](python/{room}.md#tracer.{name}) | {' '.join(first.split())} |")
    return "\n".join(lines)
