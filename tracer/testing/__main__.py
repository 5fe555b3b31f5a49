"""``python -m tracer.testing``: check every family, or those that are asked for, and say what holds."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from transformers.utils import logging

from tracer.errors import JobError, TracerError, TracerWarning
from tracer.model.families import FAMILIES
from tracer.testing.configs import OPTIONS, configurations
from tracer.testing.family import check_family
from tracer.testing.report import FamilyReport

SHARE = re.compile(r"\d+%")
"""How a note about biases begins."""
GROUPS = ("parity", "conservation", "edges", "state")


def chosen(families: Sequence[str]) -> list[str]:
    """The families to check, by default all that have a tiny configuration.

    Raises:
        JobError: one that has none.
    """
    for name in families:
        if name not in OPTIONS:
            known = ", ".join(OPTIONS)
            step = "check your own with tracer.testing.check_family(config)"
            raise JobError(f"--family {name}", f"has no tiny configuration here; there are {known}", step)
    return list(families) or [name for name in FAMILIES if name in OPTIONS]


def cell(report: FamilyReport, group: str) -> Text:
    """How a group of checks went: the value that is closest to its bound, or what failed."""
    failed = [check for check in report.failed if check.group == group]
    if failed:
        return Text(", ".join(check.name for check in failed), style="bold red")
    worst = report.worst(group)
    shares = [found[0] for check in report.checks if check.group == group and (found := SHARE.match(check.note))]
    if worst is None or worst.value is None:
        return Text("-", style="yellow")
    return Text(f"{worst.value:.1e}{f', biases {shares[0]}' if shares else ''}", style="green")


def table(reports: dict[str, FamilyReport]) -> Table:
    """One line for each configuration."""
    shown = Table(title="families: furthest off in each group of checks, relative to the largest number")
    for name in ("family", *GROUPS, "time"):
        shown.add_column(name, justify="left" if name == "family" else "right")
    for name, report in reports.items():
        shown.add_row(Text(name), *(cell(report, group) for group in GROUPS), f"{report.seconds:.1f} s")
    return shown


def checked(families: Sequence[str], seed: int, console: Console) -> dict[str, FamilyReport]:
    """Every configuration of the families, checked, by name."""
    configs = {name: config for family in families for name, config in configurations(family).items()}
    reports = {}
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("checking", total=len(configs))
        for name, config in configs.items():
            progress.update(task, description=name)
            reports[name] = check_family(config, seed=seed)
            progress.advance(task)
    return reports


def main(
    family: Annotated[
        list[str] | None, typer.Option(help="A family to check; may be given again. All, if none.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every check as JSON instead of a table.")] = False,
    seed: Annotated[int, typer.Option(help="Of the weights and the prompts.")] = 0,
) -> None:
    """Check every identity that RelP must obey on a tiny random model of each family. Exit code 1 if one fails."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", TracerWarning)
    logging.set_verbosity_error()
    console = Console(stderr=as_json)
    try:
        reports = checked(chosen(family or []), seed, console)
    except TracerError as error:
        Console(stderr=True).print(str(error), markup=False)
        raise typer.Exit(2) from None
    if as_json:
        records: list[dict[str, Any]] = [{"name": name, **report.record()} for name, report in reports.items()]
        sys.stdout.write(json.dumps(records, indent=1) + "\n")
    else:
        console.print(table(reports))
        for name, report in reports.items():
            for check in report.failed:
                console.print(f"{name}: {check}", markup=False, style="red")
    if not all(report.passed for report in reports.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
