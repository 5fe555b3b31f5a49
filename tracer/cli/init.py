"""The verb init: commented job files, written where one works, ready for the shipped model.

Knows where the templates are, and which command comes next. Refuses to know what their keys mean (runs/jobs.py).
"""

from __future__ import annotations

import re
import shlex
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from tracer.choices import Template
from tracer.cli import terminal
from tracer.cli.options import Overwrite
from tracer.errors import RunError, quoted, writing

_ABOUT: dict[str, str] = {
    "sva": "the agreement benchmark: which attribution finds small circuits that hold",
    "dataset": "the circuits of many prompts, and the one they share",
    "exemplars": "where in a corpus neurons are strong",
    "revisions": "one job on several checkpoints: name yours under checkpoints first",
    "cases": "the paper's case studies; capitals-demo.yaml runs on the shipped model, the others name theirs",
}
_FIRST = {"cases": "capitals-demo.yaml"}


@terminal.report_errors
def init(
    kind: Annotated[Template, typer.Argument(help="What the job is to be.", metavar="KIND")],
    out: Annotated[
        Path | None, typer.Option(help="The file; of cases the folder. Default: KIND.yaml here, or cases.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a commented job file to start from: every key, what it may be, and the commands that run it.

    Example: tracer init dataset, then tracer plan dataset.yaml
    """
    place = out or Path("cases" if kind == "cases" else f"{kind}.yaml")
    texts = templates(kind, place)
    for path in texts:
        if path.exists() and not overwrite:
            raise RunError(
                f"file {quoted(str(path), 300)}", "is there already", "name another with --out, or --overwrite"
            )
    from tracer.system import wholefile

    for path, text in texts.items():
        with writing(path, "file", "choose another with --out"):
            wholefile.write(path, text)
    first = place / _FIRST[kind] if kind in _FIRST else place
    terminal.line(f"wrote {place}: {_ABOUT[kind]}")
    terminal.line(f"next: tracer plan {shlex.quote(str(first))}")
    terminal.line(f"then: tracer run {shlex.quote(str(first))} --out {shlex.quote(f'runs/{first.stem}')}")


def templates(kind: str, place: Path) -> dict[Path, str]:
    """The files of a kind of job, as they are written at a place: their commands name it."""
    folder = resources.files("tracer.runs") / "templates"
    if kind != "cases":
        return {place: _placed((folder / f"{kind}.yaml").read_text(encoding="utf-8"), f"jobs/{kind}.yaml", place)}
    found = {}
    for one in sorted((folder / "cases").iterdir(), key=lambda one: one.name):
        text, path = one.read_text(encoding="utf-8"), place / one.name
        found[path] = _placed(text, f"jobs/cases/{one.name}", path)
    return found


def _placed(text: str, mine: str, place: Path) -> str:
    """A template with its own name in its commands, and the command that writes it for every other."""
    named = text.replace(mine, shlex.quote(str(place)))
    return re.sub(r"(?<![\w/])jobs/(sva|dataset|exemplars|revisions)\.yaml", r"'tracer init \1'", named)
