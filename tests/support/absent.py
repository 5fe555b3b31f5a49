"""Hides, in a process that imports this first, every package that a real NDIF server does not have.

What it has is tools/ndif/requirements.txt and what that requires in turn. All else that happens to be installed here
looks as if it were not, to an import and to who asks `importlib.util.find_spec`, as libraries do for optional packages.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LISTED = Path(__file__).parents[2] / "tools" / "ndif" / "requirements.txt"
OWN = ("tracer",)
"""Installed from its folder, it is in no list of what distributions hold."""
SERVER = ("aiohttp",)
"""What the loop-back server speaks HTTP with."""


def on_a_server() -> set[str]:
    """The distributions there, by canonical name."""
    lines = [line.partition("#")[0].strip() for line in LISTED.read_text(encoding="utf-8").splitlines()]
    waiting = [Requirement(line) for line in [*lines, *SERVER] if line]
    seen: set[tuple[str, str]] = set()
    while waiting:
        asked = waiting.pop()
        name = canonicalize_name(asked.name)
        for extra in {"", *asked.extras}:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                needed = [Requirement(line) for line in requires(name) or ()]
            except PackageNotFoundError:
                continue  # not here either
            waiting += [one for one in needed if one.marker is None or one.marker.evaluate({"extra": extra})]
    return {name for name, _ in seen}


def absent() -> frozenset[str]:
    """The modules that are here and not there, by top-level name."""
    there = on_a_server()
    modules = packages_distributions().items()
    return frozenset(OWN) | {
        module for module, owners in modules if not any(canonicalize_name(owner) in there for owner in owners)
    }


class Without:
    """A finder that does not find some modules; to raise here would break `find_spec` of who only asks."""

    def __init__(self, finder: Any, hidden: frozenset[str]) -> None:
        self.finder, self.hidden = finder, hidden

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return None if name.partition(".")[0] in self.hidden else self.finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


HIDDEN = absent()
for _name in [_name for _name in sys.modules if _name.partition(".")[0] in HIDDEN]:
    del sys.modules[_name]
sys.meta_path[:] = [Without(finder, HIDDEN) for finder in sys.meta_path]  # type: ignore[list-item]
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
