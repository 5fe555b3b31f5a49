"""Changes to what a JSON file holds, by the path of keys and indices to a place in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Content = dict[str, Any]
Edit = Callable[[Content], None]


def _place(content: Content, path: tuple[str | int, ...]) -> Any:
    at: Any = content
    for step in path[:-1]:
        at = at[step]
    return at


def put(value: Any, *path: str | int) -> Edit:
    """Put a value at a place."""

    def change(content: Content) -> None:
        _place(content, path)[path[-1]] = value

    return change


def drop(*path: str | int) -> Edit:
    """Take a place out."""

    def change(content: Content) -> None:
        del _place(content, path)[path[-1]]

    return change
