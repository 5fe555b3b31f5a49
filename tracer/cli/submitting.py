"""The verb submit: a run on a Ray cluster, sent there, followed, asked about or stopped.

Knows which words of `tracer run` its options become. Refuses to know Ray (runs/workers/cluster).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from tracer.cli import terminal
from tracer.cli.options import flat
from tracer.cli.runs import Change, Gpus, Part, Workers, changes
from tracer.errors import JobError

if TYPE_CHECKING:
    from tracer.runs.workers.cluster import Submission


@dataclass(frozen=True)
class Sent:
    """Which cluster, and which job on it; the run's folder there."""

    PANEL: ClassVar[str] = "Cluster"

    address: Annotated[
        str | None,
        typer.Option(
            help="The cluster's job server: http://HOST:8265. Default: RAY_API_SERVER_ADDRESS, or this machine."
        ),
    ] = None
    out: Annotated[
        str | None, typer.Option(help="The run folder as the cluster sees it: a shared path, s3:// or gs://.")
    ] = None
    follow: Annotated[str | None, typer.Option(help="Show the logs of a job that was submitted, by its id.")] = None
    state: Annotated[str | None, typer.Option("--status", help="How a submitted job is doing, by its id.")] = None
    stop: Annotated[str | None, typer.Option(help="Stop a job by its id; what it committed stays.")] = None
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the logs, and end with its exit code.")] = True
    submission_id: Annotated[str | None, typer.Option(help="A name of your own for the submission.")] = None

    def answered(self) -> Submission | None:
        """A job that is on the cluster already: stopped, followed or asked about; None if none is named."""
        from tracer.runs.workers import cluster

        if self.stop is not None:
            return cluster.stop(self.address, self.stop)
        if self.follow is not None:
            return cluster.follow(self.address, self.follow, terminal.line)
        return None if self.state is None else cluster.status(self.address, self.state)


@terminal.report_errors
@flat
def submit(
    job: Annotated[str | None, typer.Argument(help="A job file; none with --follow or --stop.", metavar="JOB")] = None,
    *,
    sent: Sent,
    workers: Workers = None,
    gpus_per_worker: Gpus = None,
    part: Part,
    change: Change = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail if any prompt failed.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Do failed prompts again.")] = False,
) -> None:
    """Run a job on a Ray cluster from here: submit, follow its log, stop it, resume it by submitting it again.

    Example: tracer submit jobs/dataset.yaml --address http://HOST:8265 --out /shared/runs/dataset
    """
    from tracer.runs.workers import cluster

    if sum(given is not None for given in (job, sent.follow, sent.stop, sent.state)) != 1:
        raise JobError("submit", "needs one of JOB, --follow, --status and --stop", "see tracer submit --help")
    if (there := sent.answered()) is not None:
        terminal.line(f"{there.id}: {there.state}" + (f" ({there.message})" if there.message else ""))
        raise typer.Exit((there.exit_code or 0) if sent.follow is not None else 0)
    if sent.out is None:
        raise JobError("submit without --out", "the cluster must know where to write", "give --out")
    assert job is not None
    words = [
        *(word for override in changes(change, **vars(part)) for word in ("--set", override)),
        *(["--workers", str(workers)] if workers is not None else []),
        *(["--gpus-per-worker", f"{gpus_per_worker:g}"] if gpus_per_worker is not None else []),
        *(["--strict"] if strict else []),
        *(["--retry-failed"] if retry_failed else []),
    ]
    how: dict[str, Any] = {"options": words, "submission_id": sent.submission_id, "wait": sent.wait}
    submission = cluster.submit(Path(job), sent.address, out=sent.out, **how, log=terminal.line)
    if not sent.wait:
        terminal.line(f"follow it with: tracer submit --address {submission.address} --follow {submission.id}")
    elif submission.state != "SUCCEEDED":
        raise typer.Exit(submission.exit_code or 1)
