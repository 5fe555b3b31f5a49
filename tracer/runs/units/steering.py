"""Steering at the end of a run: its supernodes and its whole circuit, on its own prompts or on others.

Knows which groups and prompts those are, and what is kept of a stage that is stopped: every prompt that is measured,
so that a repeated command goes on with the next and ends with the same bytes. Refuses to know how a prompt is steered
(evaluation/sweep.py).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from tracer.attribution.exact import Progress
from tracer.circuit import supernodes_file
from tracer.circuit.from_run import circuit_of, length_of
from tracer.errors import JobError
from tracer.evaluation import sweep
from tracer.evaluation.groups import WHOLE, groups_of, nodes_of, whole_of
from tracer.evaluation.sweep import Measured, Plan, Sweep
from tracer.model.model import Model
from tracer.prompts import Encoded
from tracer.reports import sweeps
from tracer.runs.jobs import DatasetJob, SteeringRules
from tracer.runs.units import checkpoint
from tracer.runs.units.tested import asked_prompts, own_prompts
from tracer.store.run_folder import RunFolder

CHECKPOINT = "_journal/steering.safetensors"
KEPT_EVERY = 10.0
"""Seconds after which what is measured is written."""
TABLES = ("steering", "steering_groups")


def check_steering(model: Model, rules: SteeringRules) -> None:
    """Refuse, before anything is computed, tokens that the model does not have.

    Raises:
        JobError: text that is several tokens, or an id out of the vocabulary.
    """
    sweep.asked_tokens(model, rules.tokens)


def groups_of_run(folder: RunFolder) -> dict[str, Any]:
    """The nodes of a run's supernodes, where it has any, and of its whole circuit, by name.

    Raises:
        RunError, JobError: it has no circuit, or a file is damaged.
    """
    graph = circuit_of(folder.place.local or folder.place.address)
    file = supernodes_file.of_run(folder.place.address)
    return ({} if file is None else nodes_of(file, graph.numbering)) | {WHOLE: whole_of(graph)}


def prompts_of_run(
    model: Model, job: DatasetJob, folder: RunFolder, rules: SteeringRules
) -> tuple[list[int], list[Encoded]]:
    """The prompts that are steered, and their ids: of the run's own those that they have there. Where nodes act at
    their positions, those of the circuit's length.

    Raises:
        JobError: none that fits.
    """
    aligned = job.circuit == "aligned" and not rules.everywhere
    length = length_of(folder, folder.commits()) if aligned else None
    if isinstance(rules.prompts, int):
        found = list(islice(own_prompts(model, job, folder, length), rules.prompts))
    else:
        asked = asked_prompts(model, job, rules.prompts, length).prompts
        found = [(at, one) for at, one in enumerate(asked) if length in (None, len(one.token_ids))]
    if not found:
        rule = "there is none" + (f" of the circuit's {length} tokens" if length is not None else "")
        raise JobError("steering.prompts", rule, "choose other prompts, or everywhere: true")
    return [number for number, _ in found], [one for _, one in found]


def write_steering(
    model: Model, job: DatasetJob, folder: RunFolder, max_bytes: int | None = None, progress: Progress | None = None
) -> None:
    """Write steering.parquet and steering_groups.parquet of a run that has a circuit.

    Args:
        max_bytes: bytes one batch may use, as for the run's units; the model's own default if None.
        progress: called with (prompts done, all prompts).

    Raises:
        JobError: no prompt that fits, nodes that the model does not have, logits no longer finite.
    """
    rules = job.steering
    if rules is None or not folder.place.exists("circuit.parquet"):
        return
    if not folder.read_output("circuit.parquet").num_rows:
        return
    groups = groups_of(groups_of_run(folder))
    ids = sweep.asked_tokens(model, rules.tokens)
    where, drawn = (rules.everywhere, job.basis), (rules.random, rules.seed)
    numbers, prompts = prompts_of_run(model, job, folder, rules)
    plan = sweep.planned(model, groups, [one.token_ids for one in prompts], rules.factors, ids, where, drawn)
    for one in prompts:
        sweep.check_length(plan, one)
    kept = _Kept.of(folder, _key(plan, prompts, max_bytes))
    for _ in kept.rest(model, prompts, plan, max_bytes):
        if progress is not None:
            progress(len(kept.done), len(prompts))
    made = sweep.tables(plan, numbers, prompts, kept.done, model)
    for name, table in zip(TABLES, (made.tokens, made.groups), strict=True):
        folder.write_table(f"{name}.parquet", table)


def sweep_of(folder: RunFolder) -> Sweep | None:
    """What a run's steering measured; None where it has none."""
    if not all(folder.place.exists(f"{name}.parquet") for name in TABLES):
        return None
    tokens, groups = (folder.read_output(f"{name}.parquet") for name in TABLES)
    return Sweep(tokens, groups)


def draw_steering(folder: RunFolder, job: DatasetJob) -> None:
    """Write steering.png of a run whose tables of steering are there."""
    if job.steering is None or (found := sweep_of(folder)) is None:
        return
    shown = found.responses(job.steering.seed)
    n = max(one.n_prompts for one in shown)
    title = f"Change of probability, {n:,} prompts"
    folder.place.write("steering.png", sweeps.heat_map_png(shown, title))


# ------------------------------------------------------------------------------------------------ what is kept


def _key(plan: Plan, prompts: Sequence[Encoded], max_bytes: int | None) -> str:
    """A hash of what decides the numbers."""
    asked = [[one.token_ids, one.target_ids, one.foil_ids] for one in prompts]
    done = [[group.name, group.places] for group in (*plan.groups, *(one for draws in plan.controls for one in draws))]
    content = json.dumps([asked, done, plan.factors, plan.asked, plan.basis, max_bytes])
    return hashlib.sha256(content.encode()).hexdigest()


@dataclass
class _Kept:
    """What is measured so far, of the first prompts."""

    folder: RunFolder
    key: str
    done: list[Measured]

    NAMES = ("logits", "probabilities", "greedy", "kl", "kept")

    @staticmethod
    def of(folder: RunFolder, key: str) -> _Kept:
        """What an earlier call measured with the same key; nothing where that is not so, or damaged."""
        held = checkpoint.read(folder, CHECKPOINT, key) or {}
        try:
            every = range(len(held) // len(_Kept.NAMES))
            parts = [{name: held[f"{at}.{name}"] for name in _Kept.NAMES} for at in every]
        except KeyError:
            parts = []
        return _Kept(folder, key, [Measured(**part) for part in parts])

    def save(self) -> None:
        """Keep what is measured."""
        content = {f"{at}.{name}": getattr(one, name) for at, one in enumerate(self.done) for name in self.NAMES}
        checkpoint.write(self.folder, CHECKPOINT, self.key, content)

    def rest(self, model: Model, prompts: Sequence[Encoded], plan: Plan, max_bytes: int | None) -> Iterator[Measured]:
        """Measure the prompts that are left."""
        due, left = time.monotonic() + KEPT_EVERY, prompts[len(self.done) :]
        for one in sweep.measured(model, left, plan, max_bytes):
            self.done.append(one)
            yield one
            if time.monotonic() > due:
                self.save()
                due = time.monotonic() + KEPT_EVERY
