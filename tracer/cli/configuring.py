"""The verb config: which default of an option holds, and where it comes from.

Knows how defaults are shown. Refuses to know what they are (cli/config.py); a secret's value is never shown.
"""

from __future__ import annotations

import os
import re
from typing import Annotated

import typer

from tracer.cli import defaults, output, terminal


@terminal.report_errors
def config(
    path: Annotated[bool, typer.Option("--path", help="Only where the file is, or would be.")] = False,
) -> None:
    """The defaults of options that you have set, and where each comes from: a variable, or the file tracer.toml.

    An option given wins over its variable (TRACER_MODEL), that over the file (model = "..."), that over what is built
    in. A circuit's own model goes before both, and a job file says all that decides its numbers.
    """
    from tracer.cli import config as settings
    from tracer.reports.folded import folded
    from tracer.reports.parts import Facts, Sheet

    if path:
        terminal.line(str(defaults.config_file() or defaults.usual_file()))
        return
    cells = [
        (one.key, "-" if one.value is None else str(one.value), one.source or "built in: each verb's own")
        for one in settings.read()
    ]
    names = (*sorted(defaults.ELSEWHERE), "NDIF_HOST", "NDIF_API_KEY")
    output.show(
        folded(
            [
                Sheet.of("defaults", "Defaults of options", ["<option", "<value", "<from"], cells),
                Facts.of([(name, _shown(name)) for name in names], "Other variables"),
                f'file {about_file()}; a key a line, as in: device = "cuda:1"',
            ]
        )
    )


def about_file() -> str:
    """The file of defaults, and whether it is there."""
    there = defaults.config_file()
    return str(there) if there is not None else f"{defaults.usual_file()} (not there)"


def _shown(name: str) -> str:
    """A variable's value; of a secret only whether it is set."""
    value = os.environ.get(name)
    if value is None:
        return "not set"
    if name in defaults.SECRETS:
        return "set (not shown)"
    return re.sub(r"//[^/@]*@", "//...@", value)  # an address may hold a key
