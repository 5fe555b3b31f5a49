"""A run whose run.json or input.parquet is damaged or lost, made whole again from its job and what is committed.

Nothing is made up: each commit says of which job and versions it is a part and how its model was loaded, the prompts
are read again from the job's input, and every row of the commits must be of the prompt at its place. Where any of this
does not agree, or the commits do not say, nothing is changed. Refuses to know how the run then goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from tracer.circuit.circuit import provenance
from tracer.errors import RunError, option, quoted
from tracer.runs.identity import check_same, is_part_of, is_resumable, made_by, unlimited
from tracer.runs.jobs import BenchmarkJob, Job
from tracer.settings import ModelRecord
from tracer.store.run_folder import Commit, RunFolder
from tracer.store.schemas import SCHEMA_VERSION

Plan = Callable[[int], dict[str, Any]]
"""Writes the input, the first so many prompts of which must be as they were; what the record says of it."""


def repaired(folder: RunFolder, job: Job, content: str, plan: Plan) -> dict[str, Any] | None:
    """The record of a run, made again with its input; None where nothing is damaged, or nothing was done yet.

    Args:
        content: a hash of what the job reads.

    Raises:
        RunError: the commits are not of this job, or do not say of which.
    """
    if not folder.has_commits():
        return None
    there, known = _record(folder), _known(folder, job)
    if there is None:
        said = _said(folder, job)
        if known is not None and not isinstance(job, BenchmarkJob) and folder.shard_size() != job.shard_size:
            rule = f"was planned with {option('shard_size', folder.shard_size())}, the job has {job.shard_size}"
            raise _cannot(folder, f"input.parquet {rule}")
        made = plan(known or 0) | said
    elif not isinstance(job, BenchmarkJob) and (known is None or folder.digest_input() != there.get("plan")):
        check_same(folder, there, job, content)
        made = {**there, "plan": plan(0)["plan"]}
    else:
        return None
    if not isinstance(job, BenchmarkJob):
        try:
            for commit in folder.commits([]):
                _check_rows(folder, commit)
        except RunError:
            if known is None:
                folder.place.remove("input.parquet")
            raise
        if known is not None and there is None and made["n_prompts"] != known:  # more prompts, as of a larger limit
            folder.delete_outputs()
            if known % job.shard_size:
                folder.uncommit(known // job.shard_size)
    folder.place.remove("_SUCCESS.json")  # it is of the record that was
    return made


def _record(folder: RunFolder) -> dict[str, Any] | None:
    """run.json; None where it is damaged or lost."""
    try:
        return folder.record(resume=True)
    except RunError as error:
        if "schema version" in error.rule and _claimed(folder).get("schema_version") == "2":
            raise
        return None


def _known(folder: RunFolder, job: Job) -> int | None:
    """How many prompts are planned; None where the plan is damaged or lost, or there is none."""
    if isinstance(job, BenchmarkJob):
        return None
    with suppress(RunError):
        return folder.count_input()[0]
    return None


def _said(folder: RunFolder, job: Job) -> dict[str, Any]:
    """What the commits agree on: how the model was loaded, and in how many threads."""
    told = [commit.made_by for commit in folder.commits([])]
    if not told or None in told:  # of an older version: what is left of the record may say it
        told = [_claim(job, _claimed(folder))]
    first = told[0]
    if first is None:
        raise _cannot(folder, "nothing in it says which job made its commits")
    if any(one != first for one in told):
        raise _cannot(folder, "its commits are of several jobs")
    if not is_part_of(job, first):
        raise _cannot(folder, "its commits are of another job, or made with other versions of packages")
    try:
        ModelRecord.model_validate(first.get("model"))
        if not all(type(first.get(name)) is int and first[name] > 0 for name in ("threads", "memory")):
            raise ValueError("threads and memory")
    except (ValidationError, ValueError) as error:
        raise _cannot(folder, "its commits do not say how their model was loaded") from error
    return {name: value for name, value in first.items() if name != "job"}


def _claimed(folder: RunFolder) -> dict[str, Any]:
    """What is left of a damaged record."""
    with suppress(RunError):
        return folder.place.read_json("run.json")
    return {}


def _claim(job: Job, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """What commits of an older version would say, if what is left of their record says as much."""
    numbers, packages = record.get("numbers"), record.get("packages")
    if not isinstance(numbers, dict) or not isinstance(packages, dict) or not is_resumable(record):
        return None
    if record.get("schema_version") != SCHEMA_VERSION or unlimited(numbers) != unlimited(job.numbers()):
        return None
    return made_by(job, {**record, "packages": provenance()["packages"]})


def _check_rows(folder: RunFolder, commit: Commit) -> None:
    """Refuse commits of other prompts than the input has at their places."""
    if "prompts" not in commit.files or folder.problems(commit, only="prompts"):
        return  # whoever resumes the run does that unit again
    rows = folder.read_committed(commit, "prompts", ["prompt_id", "user_id", "text"]).to_pylist()
    wanted = folder.read_input(commit.shard)
    same = [row["prompt_id"] for row in rows] == [row["prompt_id"] for row in wanted[: len(rows)]]
    for row, its in zip(rows, wanted, strict=False):
        same = (
            same
            and row["user_id"] == its["user_id"]
            and (None in (its["text"], row["text"]) or row["text"] == its["text"])
        )
    if not same:
        raise _cannot(folder, f"its unit {commit.shard} is of other prompts than the job's input has there")


def _cannot(folder: RunFolder, rule: str) -> RunError:
    step = f"give the job that made it, as it was; {option('overwrite', True)} starts again, without what is committed"
    return RunError(f"folder {quoted(str(folder.place), 300)}", f"cannot be repaired: {rule}", step)
