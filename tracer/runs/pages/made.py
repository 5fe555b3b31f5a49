"""The end of every report of a run: with which versions and which job it was made, so that a second one can be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tracer.reports import page as pages
from tracer.reports.page import Section
from tracer.reports.sheet import Sheet
from tracer.runs.jobs import Job
from tracer.text import printable

LONGEST = 20_000  # characters of a job


def section(record: Mapping[str, Any], job: Job) -> Section:
    """How a run was made.

    Args:
        record: what run.json holds.
    """
    model = record.get("model") or {}
    rows = [
        ("planned", str(record.get("created", "-"))),
        ("run fingerprint", str(record.get("fingerprint", "-"))),
        ("weights fingerprint", str(model.get("fingerprint", "-"))),
        *((name, str(version)) for name, version in sorted((record.get("packages") or {}).items())),
    ]
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in _keys(job).items()]
    listed = "\n".join(map(printable, lines))
    if len(listed) > LONGEST:
        listed = listed[:LONGEST] + "\n... (the rest is in run.json)"
    return Section(
        "made",
        "How it was made",
        (
            pages.table(Sheet.of("made", "Versions and fingerprints", ("<what", "<value"), rows)),
            pages.text("The job, for “tracer run JOB --out DIR”; defaults are left out:"),
            pages.code(listed),
            pages.text("“tracer report DIR” writes this page again from what is in the folder."),
        ),
    )


def _keys(job: Job) -> dict[str, Any]:
    return {"kind": job.kind, **job.model_dump(mode="json", exclude_defaults=True)}
