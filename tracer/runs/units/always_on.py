"""The stage before a dataset run's units: neurons that look strong on most prompts and do next to nothing.

Knows which prompts they are looked for on. Refuses to know what makes a neuron one (evaluation/quality.py), and what is
done with them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from tracer import data
from tracer.errors import JobError, TracerError
from tracer.evaluation.quality import Constancy, Question, constant_neurons
from tracer.model.model import Model
from tracer.prompts import Prompt, encode, with_bos
from tracer.runs.jobs import AlwaysOnRules, DatasetJob
from tracer.runs.units.shards import as_prompt, input_row
from tracer.store.run_folder import RunFolder


def always_on_of(model: Model, job: DatasetJob, folder: RunFolder, max_bytes: int | None = None) -> dict[str, Any]:
    """The always-on neurons as run.json keeps them: ``neurons``, each with its evidence, strongest first; how many
    ``prompts`` they were looked for on, and what those are (``of``).

    Args:
        max_bytes: bytes one batch may use.

    Raises:
        JobError: fewer than two prompts that can be asked, or prompts that do not differ.
    """
    rules = job.always_on
    assert rules is not None
    rows = _rows(folder) if rules.unrelated is None else (input_row(row) for row in data.read(rules.unrelated))
    asked = list(itertools.islice(_askable(model, job, rows), rules.prompts))
    asked = [one for one in asked if (one.foil is None) == (asked[0].foil is None)]  # one metric for all
    if len(asked) < 2:
        rule, step = "at least 2 that can be asked are needed", "give more, or leave always_on out"
        raise JobError(f"always_on: {len(asked)} prompts", rule, step)
    limits = Constancy(rules.share, rules.threshold, rules.exact_below)
    how = Question(_settings(job, rules), {"skip_first": job.skip_first})
    found = constant_neurons(model, asked, how, limits, memory=max_bytes)
    of = "prompts of the run" if rules.unrelated is None else "unrelated prompts"
    names = ("layer", "neuron", "share", "attribution", "spread", "exact")
    return {"prompts": len(asked), "of": of, "neurons": [{name: getattr(one, name) for name in names} for one in found]}


def _settings(job: DatasetJob, rules: AlwaysOnRules) -> Any:
    """As the run's; unrelated prompts are asked for their own likeliest token, where they have no target."""
    chosen = job.settings()
    asks_foils = rules.unrelated is not None and job.metric == "difference"
    return chosen.model_copy(update={"metric": "auto"}) if asks_foils else chosen


def _rows(folder: RunFolder) -> Iterator[dict[str, Any]]:
    """The run's own prompts, in their order."""
    for shard in range(int((folder.record() or {})["n_units"])):
        yield from folder.read_input(shard)


def _askable(model: Model, job: DatasetJob, rows: Any) -> Iterator[Prompt]:
    """The prompts that can be asked; what is wrong with one is said by the run itself. Each once."""
    seen = set[tuple[int, ...]]()
    for row in rows:
        with suppress(TracerError):
            prompt = with_bos(as_prompt(row, job.asks, paired=job.baseline == "counterfactual"), job.bos)
            ids = encode(prompt, model).token_ids
            if ids not in seen:
                seen.add(ids)
                yield prompt
