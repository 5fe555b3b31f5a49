"""The verb report: a run over many prompts in words, tables and drawings, made again from its folder.

Knows where the page goes. Refuses to know what it says (runs/pages).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tracer.cli import terminal
from tracer.cli.runs import RunDir


@terminal.report_errors
def report_(
    folder: RunDir,
    out: Annotated[
        Path | None,
        typer.Option(help="The page. Default: report.html in the run folder, with the graph pages that it links to."),
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Write the report of a run over many prompts, finished or half-finished: one HTML file, the verdict first.

    Example: tracer report runs/sva --out sva.html
    """
    from tracer.errors import JobError, quoted
    from tracer.reports.tables import write_page
    from tracer.runs.pages import write
    from tracer.store.storage import is_remote

    terminal.quiet()
    if out is None:
        if open_page and is_remote(folder):
            raise JobError(f"--open of {quoted(folder, 200)}", "is not on this machine", "name a file with --out")
        names = write.refresh(folder)
        page = Path(folder) / names[0]
        graphs = f", {len(names) - 1} graph pages" if len(names) > 1 else ""
        terminal.line(f"wrote {names[0]} in {folder}{graphs}; open it in a browser")
    else:
        page = write_page(write.report_text(folder, out), out)
        terminal.line(f"wrote {page} ({page.stat().st_size / 1024:,.1f} KiB); open it in a browser")
    if open_page:
        typer.launch(page.resolve().as_uri())
