"""Which job a folder's run is of: whether another job is the same, is the same with more prompts, or is another.

Knows run.json's keys that tell, and what commits say of the job that they are a part of. Refuses to know how a run is
driven.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tracer import data
from tracer.circuit.circuit import provenance
from tracer.data.source import Source
from tracer.errors import RunError, option, quoted
from tracer.meaning.strongest import Strongest, strongest
from tracer.runs.jobs import TOP_NEURONS, BenchmarkJob, ExemplarsJob, Job
from tracer.store import parquet
from tracer.store.run_folder import RunFolder
from tracer.store.schemas import SCHEMA_VERSION

PACKAGES = ("neuron-tracer", "torch", "transformers", "nnsight")
"""Those whose version decides numbers."""
MADE_BY = ("model", "threads", "memory")
"""What else decides them, and is settled when a run begins."""


def digests_of(job: Job) -> list[str]:
    """Hashes by content of everything that a job reads; a dataset's prompts come first."""
    if isinstance(job, BenchmarkJob):
        return [data.digest(Source(path=(file,))) for one in job.input or () for file in (one.train, one.test)]
    if isinstance(job, ExemplarsJob):
        return [data.digest(job.source), parquet.fingerprint({"neurons": neurons_of(job).neurons})]
    tests = () if job.evaluate is None else (job.evaluate.test, job.evaluate.reference)
    others = [] if job.always_on is None else [job.always_on.unrelated]
    if job.steering is not None and isinstance(job.steering.prompts, Source):
        others.append(job.steering.prompts)
    return [data.digest(source) for source in (job.source, job.reference, *tests, *others) if source is not None]


def neurons_of(job: ExemplarsJob) -> Strongest:
    """The neurons that a job names, or that are strongest in the run that it names.

    Raises:
        RunError: that is none that says so.
    """
    return Strongest(job.neurons, None) if job.of is None else strongest(job.of, job.top or TOP_NEURONS)


def joined(digests: list[str]) -> str:
    """One hash of all that a job reads."""
    if not digests:
        return "none"
    return digests[0] if len(digests) == 1 else parquet.fingerprint({"sources": digests})


def grows(there: Mapping[str, Any], job: Job, others: list[str]) -> bool:
    """Whether a job is that of a run but for how many of the prompts it takes."""
    if there.get("kind") != job.kind or isinstance(job, BenchmarkJob) or not is_resumable(there):
        return False
    was, now = there.get("numbers") or {}, job.numbers()
    differs = was != now or "extended_from" in there
    return differs and there.get("others") == others and unlimited(was) == unlimited(now)


def unlimited(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """A job's numbers without how many prompts it takes."""
    source = numbers.get("input")
    if isinstance(source, dict):
        source = {name: value for name, value in source.items() if name not in ("limit", "count")}
    return {name: value for name, value in numbers.items() if name != "limit"} | {"input": source}


def as_far(job: Job, there: Mapping[str, Any] | None) -> Job:
    """A job that names no limit as far as the run that is there goes: what failed is to be done again, and no more."""
    if there is None or isinstance(job, BenchmarkJob) or there.get("kind") != job.kind:
        return job
    was = there.get("numbers") or {}
    if job.limit is not None or job.input.limit is not None or unlimited(was) != unlimited(job.numbers()):
        return job
    source = job.input.model_copy(update={"limit": was["input"].get("limit")})
    return job.model_copy(update={"limit": was.get("limit"), "input": source})


def fingerprint_of(job: Job, content: str) -> str:
    return parquet.fingerprint({"job": job.numbers(), "input": content, "schema": SCHEMA_VERSION})


def is_resumable(there: Mapping[str, Any]) -> bool:
    """Whether the versions that decide numbers are those of now."""
    now = provenance()["packages"]
    return all(there.get("packages", {}).get(name) == now[name] for name in PACKAGES)


def check_same(folder: RunFolder, there: Mapping[str, Any], job: Job, content: str) -> None:
    """Refuse to resume anything but the same job on the same input with the same packages."""
    value, again = f"folder {quoted(str(folder.place), 300)}", f"choose another, or give {option('overwrite', True)}"
    if there.get("kind") != job.kind:
        raise RunError(value, f"holds a run of another kind ({there.get('kind')})", again)
    if there.get("numbers") != (mine := job.numbers()):
        known = there.get("numbers") or {}
        differing = sorted(name for name in {*mine, *known} if mine.get(name) != known.get(name))
        raise RunError(value, f"holds another run: {', '.join(differing)} differ", again)
    if there.get("input") != content:
        raise RunError("the input", f"has changed since the run in {folder.place} was planned", again)
    if not is_resumable(there):
        was, now = there.get("packages", {}), provenance()["packages"]
        differing = ", ".join(
            f"{name} {was.get(name)}, now {now[name]}" for name in PACKAGES if was.get(name) != now[name]
        )
        raise RunError(
            value,
            f"was started with other versions ({differing})",
            f"install those, or give {option('overwrite', True)}",
        )


def made_by(job: Job, record: Mapping[str, Any]) -> dict[str, Any]:
    """What a commit says of the run that it is a part of: all by which a lost record can be made again."""
    return {"job": _part_of(job, record.get("packages", {}))} | {
        name: record[name] for name in MADE_BY if name in record
    }


def is_part_of(job: Job, said: Mapping[str, Any]) -> bool:
    """Whether what a commit says is of this job and of the versions of now, whatever the number of prompts."""
    return said.get("job") == _part_of(job, provenance()["packages"])


def _part_of(job: Job, packages: Mapping[str, Any]) -> str:
    versions = {name: packages.get(name) for name in PACKAGES}
    return parquet.fingerprint({"job": unlimited(job.numbers()), "packages": versions, "schema": SCHEMA_VERSION})
