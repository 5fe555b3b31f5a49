"""Models by name, for calls that are given a name in the place of a model: loaded once, and kept for the next call.

Knows when what was loaded is still what the name stands for. Keeps one model, the last that was named, so that a second
name does not fill the memory. Refuses to know how a model is loaded (model/model.py), and servers.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from tracer.errors import JobError, quoted
from tracer.model.model import Model, load
from tracer.system.forks import after_fork

AnyModel = Model | str | Path
"""A model, or the name of one: what `tracer.load` takes by name."""


class _Kept:
    """The model that was named last."""

    def __init__(self) -> None:
        self.key: Any = None
        self.model: Model | None = None
        self.renew()
        after_fork(self, _Kept.renew)

    def renew(self) -> None:
        self.loading = threading.Lock()


_kept = _Kept()


def model_of(given: AnyModel) -> Model:
    """A model as it is; of a name the model that `tracer.load` makes of it, which is kept until another name is given,
    or a file of its folder changes.

    Raises:
        JobError: neither a model nor a name. ModelError: no such model.
    """
    if isinstance(given, Model):
        return given
    if not isinstance(given, str | Path):
        rule = "is neither a model nor the name of one"
        raise JobError(f"model {quoted(given)}", rule, "give what tracer.load returns, or a name such as 'demo'")
    with _kept.loading:
        key = _key(given)
        if _kept.model is None or _kept.key != key:
            _kept.key = _kept.model = None  # before the next is loaded: there may be room for one
            _kept.model = load(given)
            _kept.key = key
        return _kept.model


def _key(name: str | Path) -> Any:
    """What a name stands for now: of a folder or a file its place, and when and how large its files were written."""
    path = Path(name)
    if name == "demo" or not path.exists():  # a folder of that name is given as a Path
        return name
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = [(file.name, file.stat()) for file in files]
    return str(path.resolve()), *((file, stat.st_size, stat.st_mtime_ns) for file, stat in stats)
