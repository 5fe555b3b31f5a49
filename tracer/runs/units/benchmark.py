"""The agreement benchmark: attribution methods compared by what their circuits do on held-out pairs.

Knows which pairs a model can be asked, the mean attribution over them, and how one combination becomes an outcome.
Refuses to know the job file (runs/jobs.py), how a ranking is measured (evaluation/curves.py), nodes attributed
(attribution/attribute.py) and outcomes shown (runs/units/benchmark_report.py), and what agreement is (tasks).
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tracer.attribution.attribute import attribute, notes
from tracer.attribution.exact import Progress
from tracer.data import tasks
from tracer.data.tasks import Pair, sva
from tracer.errors import JobError, TracerError
from tracer.evaluation.answers import filter_prompts
from tracer.evaluation.curves import Evaluation, curves, ordered
from tracer.evaluation.testset import TestSet
from tracer.model.model import Model
from tracer.prompts import Encoded, Prompt, encode, with_bos
from tracer.runs.jobs import NO_BASELINE, BenchmarkJob, Combination, Ranking
from tracer.runs.split import train_and_test
from tracer.runs.units.benchmark_report import Outcome
from tracer.runs.units.progress import Stages, Told, attribution_work, curves_work
from tracer.settings import PATH_METHODS, RULED_METHODS, rules_of, settings

METRIC = "difference"
_ATTRIBUTED = 1 << 30  # bytes of attributions held at once


@dataclass(frozen=True)
class _Data:
    """The pairs of one structure that the model can be asked, and how many of the test pairs are trained on as well."""

    train: tuple[Pair, ...]
    test: tuple[Encoded, ...]
    skipped: dict[str, int]
    n_shared: int


class Benchmark:
    """A job on a model. Pairs are made once for all combinations of a structure; the test set, which is large, is
    kept until a combination of another structure or basis comes.

    Raises:
        JobError: a variant of the rules has no effect on the model.
    """

    def __init__(self, job: BenchmarkJob, model: Model) -> None:
        for rules in job.rules:
            model.check_rules(rules_of(rules))
        self.job, self.model = job, model
        self._data: Callable[[str], _Data] = functools.cache(lambda structure: _pairs(job, model, structure))
        self._test: Callable[[str, str], TestSet] = functools.lru_cache(maxsize=1)(
            lambda structure, basis: TestSet.of(
                model, self._data(structure).test, job.ablation, settings(basis=basis, metric=METRIC), job.seed
            ).with_known_ends()
        )

    def notes(self, combination: Combination) -> dict[str, int]:
        """What should be known of how the test prompts were read: each sentence, and of how many."""
        test = self._data(combination.structure).test
        return dict(Counter(text for one in test for text in notes((one,), self.model)))

    def outcome(self, combination: Combination, told: Told | None = None) -> Outcome:
        """Attribute the train pairs and measure the rankings on the test pairs.

        Args:
            told: is given how far it is, about once a second.

        Raises:
            JobError: too few pairs, a pair in train and test, an ablation that changes nothing.
            TracerError: any other, with the combination named.
        """
        try:
            return self._outcome(combination, told or (lambda _: None))
        except TracerError as error:
            raise type(error)(f"{combination}: {error.value}", error.rule, error.next_step) from error

    def _outcome(self, combination: Combination, told: Told) -> Outcome:
        job, structure = self.job, combination.structure
        data, test = self._data(structure), self._test(structure, combination.basis)
        stages = self._stages(combination, told)
        started = time.perf_counter()
        attributions = mean_attribution(job, self.model, data.train, combination, stages.progress(0))
        attributed = time.perf_counter()
        rankings: dict[Ranking, Evaluation] = {
            name: curves(test, ordered(attributions, name), job.sizes, job.seed, stages.progress(stage))
            for stage, name in enumerate(job.rankings, 1)
        }
        measured = rankings[job.rankings[0]]
        return Outcome(
            **combination._asdict(),
            n_train=len(data.train),
            n_test=len(data.test),
            n_shared=data.n_shared,
            skipped=data.skipped,
            n_total=attributions.numel(),
            whole=float(measured.whole.double().mean()),
            empty=float(measured.empty.double().mean()),
            rankings={**rankings},
            attribution_seconds=attributed - started,
            evaluation_seconds=time.perf_counter() - attributed,
        )

    def _stages(self, combination: Combination, told: Told) -> Stages:
        """What a combination takes: attribution of the train pairs, then each ranking's curves."""
        job, data = self.job, self._data(combination.structure)
        nodes = self.model.n_layers * self.model.n_neurons(combination.basis) * len(data.test[0].token_ids)
        each = attribution_work(combination.method, job.steps, self.model.n_layers, nodes)
        curved = curves_work(len(data.test), len(job.sizes))
        work = [("train pairs attributed", len(data.train) * each)]
        return Stages(told, [*work, *((f"circuits ablated ({name} ranking)", curved) for name in job.rankings)])


def _pairs(job: BenchmarkJob, model: Model, structure: str) -> _Data:
    """Train and test pairs, apart from one another unless the job allows otherwise, of one length, that the model's
    tokenizer can be asked; of files the first so many of these."""
    splits: dict[str, list[Pair]] = dict(zip(("train", "test"), train_and_test(job, structure), strict=True))
    most = {"train": job.train, "test": job.test}
    lengths = Counter(sva.n_tokens(pair.prompt, model) for pair in splits["train"])
    length = lengths.most_common(1)[0][0]
    skipped: Counter[str] = Counter()
    kept: dict[str, list[Pair]] = {"train": [], "test": []}
    for split, pairs in splits.items():
        for pair in pairs:
            if len(kept[split]) == most[split]:
                break
            if reason := next(sva.reasons(pair, model, length), None):
                skipped[f"{split}: {reason[0]}"] += 1
            else:
                kept[split].append(pair)
        kept[split] = _answered(job, model, kept[split], skipped, split)
    for split, least in (("train", 1), ("test", 2)):
        if len(kept[split]) < least:
            why = "; ".join(f"{count} skipped because {reason}" for reason, count in skipped.items())
            raise JobError(
                f"{len(kept[split])} of {len(splits[split])} {split} pairs of {structure}",
                f"can be asked, {least} are needed ({why})",
                "ask for more pairs, or use a model whose tokenizer keeps the answers whole",
            )
    shared = tasks.check_split(kept["train"], kept["test"], job.allow_overlap, structure)
    test = tuple(encode(with_bos(one.to_prompt(), job.bos), model) for one in kept["test"])
    return _Data(tuple(kept["train"]), test, dict(skipped), shared)


def _answered(job: BenchmarkJob, model: Model, pairs: list[Pair], skipped: Counter[str], split: str) -> list[Pair]:
    """The pairs that the model answers as the job's filter wants; the others are counted."""
    if job.filter is None or not pairs:
        return pairs
    prompts = [with_bos(pair.to_prompt(paired=False), job.bos) for pair in pairs]
    answers = filter_prompts(model, prompts, job.filter).answers
    kept = [pair for pair, answer in zip(pairs, answers, strict=True) if answer.kept]
    if len(kept) < len(pairs):
        skipped[f"{split}: the model answers otherwise"] += len(pairs) - len(kept)
    return kept


def mean_attribution(
    job: BenchmarkJob,
    model: Model,
    pairs: Sequence[Pair],
    combination: Combination,
    progress: Progress | None = None,
) -> Float[Tensor, "layer pos neuron"]:
    """The mean over pairs of each node's attribution, with its sign.

    The baseline ``mean`` is over the patch side of the pairs, as the ablation's is over that of the test pairs.
    """
    _, method, basis, baseline, rules = combination
    prompts = [with_bos(pair.to_prompt(paired=baseline == "counterfactual"), job.bos) for pair in pairs]
    options: dict[str, Any] = {"steps": job.steps} if method in PATH_METHODS else {}
    if method in RULED_METHODS:
        options["rules"] = rules_of(rules)
    if method == "random":
        options["seed"] = job.seed
    if baseline == "mean":
        options["reference"] = [Prompt(pair.counterfactual, bos=job.bos) for pair in pairs]
    baseline = "zero" if baseline == NO_BASELINE else baseline
    length = len(encode(prompts[0], model).token_ids)
    step = max(1, _ATTRIBUTED // (8 * model.n_layers * length * model.n_neurons(basis)))
    total = torch.zeros(model.n_layers, length, model.n_neurons(basis), dtype=torch.float64)
    for first in range(0, len(prompts), step):
        part = prompts[first : first + step]
        options["progress"] = None if progress is None else _of_pairs(progress, first, len(part), len(prompts))
        total += attribute(model, part, method, baseline, basis, metric=METRIC, **options).nodes.double().sum(0)
    return (total / len(prompts)).float()


def _of_pairs(progress: Progress, first: int, count: int, total: int) -> Progress:
    """What a call on `count` of `total` pairs, from `first` on, reports to: how many pairs are done."""
    return lambda done, steps: progress(first + count * done // max(steps, 1), total)
