"""The prompts that a dataset's circuit is tested on: those of the job's source that the model is asked.

Knows which of them are left out, and counts them by reason: built-in pairs that the tokenizer cannot be asked or that
have another length than the circuit, and prompts that a filter does not keep. Refuses to know what is measured on them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pyarrow.compute as pc

from tracer import data
from tracer.circuit.from_run import most_frequent
from tracer.data.source import Source
from tracer.data.tasks import Pair, sva
from tracer.errors import JobError, TracerError
from tracer.evaluation import answers
from tracer.model.model import Model
from tracer.prompts import Encoded, Prompt, encode, with_bos
from tracer.records import is_list
from tracer.runs.jobs import DatasetJob
from tracer.runs.units.shards import as_prompt, input_row
from tracer.store.run_folder import RunFolder
from tracer.text import kept_of


@dataclass(frozen=True)
class Tested:
    """Test prompts as tokens.

    Attributes:
        prompts: those that are kept. skipped: how many were not asked, by reason.
        otherwise: of each that the model answers otherwise, its text and what it answers instead.
    """

    prompts: tuple[Encoded, ...]
    skipped: dict[str, int]
    otherwise: tuple[dict[str, str], ...]

    @property
    def summary(self) -> str:
        """How many were kept; empty if all."""
        left = {"filtered": len(self.otherwise), "skipped": sum(self.skipped.values())}
        return f"test: {kept_of(len(self.prompts), left)}" if any(left.values()) else ""

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"kept": len(self.prompts), "skipped": self.skipped, "answered_otherwise": list(self.otherwise)}


def prompts_of(job: DatasetJob, source: Source) -> Iterable[Prompt]:
    """A source's prompts as the job asks them, with their counterfactuals.

    Raises:
        JobError: a row that is none.
    """
    return (with_bos(as_prompt(input_row(row), job.asks, paired=True), job.bos) for row in data.read(source))


def own_prompts(model: Model, job: DatasetJob, folder: RunFolder, length: int | None) -> Iterator[tuple[int, Encoded]]:
    """The prompts of a run that went well, by their ids and in order, asked what they were asked then.

    Args:
        length: only those of so many tokens; any if None.
    """
    for commit in folder.commits():
        rows = folder.read_committed(commit, "prompts").filter(pc.field("status") == "ok").to_pylist()
        good = {row["prompt_id"]: row for row in rows if length in (None, len(row["token_ids"]))}
        for row in folder.read_input(commit.shard) if good else ():
            then = good.get(row["prompt_id"])
            if then is not None:
                one = _again(model, job, row)
                asked = {"target_ids": tuple(then["target_ids"]), "foil_ids": tuple(then["foil_ids"])}
                yield row["prompt_id"], replace(one, **asked)


def _again(model: Model, job: DatasetJob, row: dict[str, Any]) -> Encoded:
    """A prompt that went well, with its counterfactual; without one that a run that pairs nothing did not look at, and
    that cannot be asked."""
    both = with_bos(as_prompt(row, job.asks, paired=True), job.bos)
    try:
        return encode(both, model)
    except JobError:
        return encode(replace(both, counterfactual=None), model)


def test_prompts(model: Model, job: DatasetJob, source: Source, length: int) -> Tested:
    """The test prompts that the model is asked.

    Args:
        length: tokens of an aligned circuit's prompts; -1 of a free one's, whose test prompts need one length for all.

    Raises:
        JobError: a prompt of one's own that the model cannot be asked, or fewer than two that are kept.
    """
    found = asked_prompts(model, job, source, length)
    if len(found.prompts) < 2:
        why = "; ".join([found.summary, *(f"{count} skipped because {rule}" for rule, count in found.skipped.items())])
        step = "give more test prompts, or no filter"
        raise JobError(f"evaluate.test: {len(found.prompts)} prompts", f"at least 2 are needed ({why})", step)
    return found


def asked_prompts(model: Model, job: DatasetJob, source: Source, length: int | None) -> Tested:
    """The prompts of a source that the model is asked.

    Args:
        length: as of `test_prompts`; any if None.

    Raises:
        JobError: a prompt of one's own that the model cannot be asked.
    """
    skipped, fit = Counter[str](), list[Encoded]()
    for prompt in prompts_of(job, source):
        try:
            one = encode(prompt, model)
            if source.filter is not None:
                answers.check_filter(prompt, source.filter, one)
            fit.append(one)
        except TracerError as error:
            if source.task is None:
                raise
            skipped[_reason(prompt, model) or error.rule] += 1
    if source.task is not None and fit and length is not None:
        fit = _of_length(fit, length, skipped)
    kept, otherwise = fit, list[dict[str, str]]()
    if source.filter is not None and fit:
        said = answers.asked(model, fit, source.filter)
        kept = [one for one, answer in zip(fit, said, strict=True) if answer.kept]
        otherwise = [
            {"text": one.text, "answer": answer.token, "why": answer.otherwise}
            for one, answer in zip(fit, said, strict=True)
            if not answer.kept
        ]
    return Tested(tuple(kept), dict(skipped), tuple(otherwise))


def _reason(prompt: Prompt, model: Model) -> str | None:
    """Why a built-in pair cannot be asked, in words that are the same for all such pairs."""
    if not (prompt.text and prompt.counterfactual and is_list(prompt.target) and is_list(prompt.foil)):
        return None  # a question, which is no pair
    pair = Pair("", str(prompt.text), str(prompt.counterfactual), str(prompt.target[0]), str(prompt.foil[0]), "")
    return next((why for why, _ in sva.reasons(pair, model)), None)


def _of_length(fit: list[Encoded], length: int, skipped: Counter[str]) -> list[Encoded]:
    """Those of the circuit's length; for a free circuit of the most frequent one (the shorter of two)."""
    counts = Counter(len(one.token_ids) for one in fit)
    wanted = length if length >= 0 else most_frequent(counts)
    if other := len(fit) - counts[wanted]:
        whose = "the circuit's prompts are" if length >= 0 else "most are"
        skipped[f"it is not {wanted} tokens long, as {whose}"] += other
    return [one for one in fit if len(one.token_ids) == wanted]
