"""The comparison of a run over revisions, made again from its parts' folders.

Knows which files it is, and that they are a function of the parts' tables alone. Refuses to know how parts are run.
"""

from __future__ import annotations

from tracer.comparison import sides
from tracer.comparison.compare import Comparison, compared
from tracer.comparison.differences import Design
from tracer.errors import RunError, quoted
from tracer.reports import comparison as reports
from tracer.reports.page import Link
from tracer.runs.jobs import RevisionsJob, load_job
from tracer.store.run_folder import PARTS, RunFolder


def comparison_of(folder: RunFolder) -> Comparison:
    """What differs between the parts of a run, all of which are done.

    Raises:
        RunError: no run over revisions, or a part that is not done or damaged. JobError: what `compared` refuses.
    """
    record = folder.record() or {}
    if record.get("kind") != "revisions":
        value = f"run {quoted(str(folder.place), 300)}"
        raise RunError(value, "is not one over revisions", "give the folder of one")
    job = load_job(record["job"])
    assert isinstance(job, RevisionsJob)
    made = [sides.of_run(folder.part(name), name) for name in record["parts"]]
    design = Design(job.compare.permutations, job.compare.seed)
    return compared(made, positions=job.compare.positions, groups=job.compare.groups, design=design)


def files_of(folder: RunFolder) -> dict[str, bytes]:
    """Every file of the comparison by name, the report with links to those of the parts."""
    record = folder.record() or {}
    links = [
        Link(f"{PARTS}/{name}/report.html", name, "the report of this part")
        for name in record.get("parts", ())
        if RunFolder(folder.part(name)).place.exists("report.html")
    ]
    return reports.files(comparison_of(folder), links)


def refresh(folder: RunFolder) -> list[str]:
    """Write the comparison again into a run's folder that is locked; the names of its pages."""
    made = files_of(folder)
    for name, content in made.items():
        folder.place.write(name, content)
    folder.reseal(made)
    return [reports.REPORT, reports.GRAPHS]


def report_text(folder: RunFolder) -> str:
    """The report alone, to be written elsewhere: without links."""
    return reports.document(comparison_of(folder))
