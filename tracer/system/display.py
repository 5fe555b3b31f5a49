"""What results look like to a person who asks for one at a prompt or in a notebook: the methods, not the looks.

Knows that a result has a short text and a small table, and where it is being looked at. Refuses to know how any of them
is drawn: reports/notebook.py is asked for that, by its name, when somebody looks, since the results lie below it.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

_RENDERER = "tracer.reports.notebook"


class Shown:
    """A result with a short `repr` and, in a notebook, a small table."""

    def __repr__(self) -> str:
        return renderer().text(self)

    __str__ = __repr__

    def _repr_html_(self) -> str:
        return renderer().html(self)


class Plotted(Shown):
    """A result with a figure."""

    def plot(self, axes: Any = None) -> Any:
        """Draw the result.

        Args:
            axes: matplotlib axes to draw into; a figure of its own if None.

        Returns:
            The matplotlib ``Figure``, which a notebook shows and ``savefig`` writes.

        Raises:
            JobError: there is nothing to draw.
        """
        return renderer().plot(self, axes)


def renderer() -> Any:
    """The module that draws results."""
    return importlib.import_module(_RENDERER)


def in_notebook() -> bool:
    """Whether this is a kernel of a notebook (Jupyter, VS Code, Colab), which shows HTML."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None
