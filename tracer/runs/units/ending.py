"""What needs the model when all units are done: stages, one after the other, by one worker.

Knows which stages a job has, in which order, and how much work each is about. Refuses to know how a stage computes (its
own module), and who asks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tracer.attribution.exact import Progress
from tracer.model.model import Model
from tracer.runs.jobs import DatasetJob
from tracer.runs.units.dataset_circuit import evaluated, qualities, tested_on
from tracer.runs.units.mean_edges import write_mean_edges
from tracer.runs.units.neuron_tokens import write_tokens
from tracer.runs.units.progress import Stages, Told, curves_work
from tracer.runs.units.steering import write_steering
from tracer.runs.units.supernodes import write_supernodes
from tracer.store.run_folder import RunFolder

LINKED = 20
"""Forward passes, about, that a prompt's edges among given nodes take."""
GROUPS = 8
"""Groups that are steered, about: how many supernodes there are is not known yet."""
NODES_CHECKED = 300
"""Single ablations, about, behind the estimate of a prompt's quality."""


GROUPED = 0.1
"""Of comparing a prompt's profiles, in forward passes."""
TOKENS_READ = 0.05
"""Forward passes, about, that the tokens of a neuron take: three rows of the head."""


@dataclass(frozen=True)
class Step:
    """A stage of the end of a run.

    Attributes:
        what: it counts, for whoever watches. work: about how many forward passes of one prompt.
        do: given the progress of each of its counts, writes its tables or returns what goes into JSON files, by name.
        also: what it counts after that, with its work.
    """

    what: str
    work: float
    do: Callable[..., Mapping[str, Any] | None]
    also: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Ending:
    """What a stage is given.

    Attributes:
        n_prompts: of the run. max_bytes: bytes one batch may use, as for the run's units.
    """

    model: Model
    job: DatasetJob
    folder: RunFolder
    n_prompts: int
    max_bytes: int | None


def end_run(
    model: Model, job: DatasetJob, folder: RunFolder, max_bytes: int | None = None, told: Told = lambda _: None
) -> dict[str, Any]:
    """Everything that a job asks for once its units are done: tables are written into the folder, the rest is returned
    as JSON holds it, by the name of its file.

    Args:
        max_bytes: bytes one batch may use, as for the run's units.
        told: is given how far it is, about once a second.

    Raises:
        JobError: what a stage refuses, such as test prompts that do not fit.
    """
    ending = Ending(model, job, folder, int((folder.record() or {}).get("n_prompts", 0)), max_bytes)
    steps = [step for make in STEPS if (step := make(ending)) is not None]
    stages = Stages(told, [work for step in steps for work in ((step.what, step.work), *step.also)])
    found, at = dict[str, Any](), 0
    for step in steps:
        count = 1 + len(step.also)
        found |= step.do(*(stages.progress(at + each) for each in range(count))) or {}
        at += count
    return found


def _linked(end: Ending) -> Step | None:
    """The edges of the dataset's circuit: see `mean_edges`."""
    if not end.job.links_circuit:
        return None

    def do(progress: Progress) -> None:
        write_mean_edges(end.model, end.job, end.folder, end.max_bytes, progress)

    return Step("prompts linked", float(end.n_prompts * LINKED), do)


def _grouped(end: Ending) -> Step | None:
    """``supernodes``: the circuit's neurons grouped; it needs no model, but what names groups may."""
    if end.job.supernodes is None:
        return None

    def do(progress: Progress) -> None:
        progress(0, 1)
        write_supernodes(end.job, end.folder)
        progress(1, 1)

    return Step("circuits grouped", end.n_prompts * GROUPED, do)


def _evaluated(end: Ending) -> Step | None:
    """``evaluation``: the curves of the dataset's circuit on other prompts."""
    if end.job.evaluate is None or (tested := tested_on(end.model, end.job, end.folder)) is None:
        return None
    n_test, alone = len(tested.prompts), end.job.evaluate.minimality

    def do(ablated: Progress, left_out: Progress) -> dict[str, Any]:
        return {"evaluation": evaluated(end.model, end.job, end.folder, tested, ablated, left_out)}

    also = ("circuits without one node ablated", float(n_test * (alone + 1)) if alone else 0.0)
    return Step("circuits ablated", curves_work(n_test, len(end.job.evaluate.sizes)), do, (also,))


def _checked(end: Ending) -> Step | None:
    """``quality``: how estimates follow exact ablations."""
    if not end.job.quality:
        return None

    def do(progress: Progress) -> dict[str, Any]:
        return {"quality": list(qualities(end.model, end.job, end.folder, progress))}

    return Step("prompts' estimates checked", float(end.job.quality * NODES_CHECKED), do)


def _said(end: Ending) -> Step | None:
    """tokens.parquet: what the weights say of the strongest neurons."""
    if end.job.tokens is None:
        return None

    def do(progress: Progress) -> None:
        write_tokens(end.model, end.job, end.folder)
        progress(1, 1)

    return Step("tokens read of neurons", float(end.job.tokens) * TOKENS_READ, do)


def _steered(end: Ending) -> Step | None:
    """steering.parquet: the circuit and its groups multiplied; see `steering`."""
    rules = end.job.steering
    if rules is None:
        return None

    def do(progress: Progress) -> None:
        write_steering(end.model, end.job, end.folder, end.max_bytes, progress)

    count = rules.prompts if isinstance(rules.prompts, int) else rules.prompts.most or end.n_prompts
    return Step("prompts steered", float(count * len(rules.factors) * (1 + rules.random) * GROUPS), do)


STEPS: tuple[Callable[[Ending], Step | None], ...] = (_linked, _said, _grouped, _evaluated, _checked, _steered)
"""The stages in their order; each is None where the job does not ask for it."""
