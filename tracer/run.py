"""Jobs that run from a file: the agreement benchmark, attribution methods compared by what their circuits do.

Knows the job's record, which combinations it spans, how one becomes curves, and the folder it leaves behind. Refuses to
know how nodes are attributed (attributing.py), ablated (evaluation.py), resampled (statistics.py), and what agreement
is (tasks).
"""

from __future__ import annotations

import csv
import functools
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from rich.console import Group, RenderableType
from rich.table import Table
from torch import Tensor

from tracer import evaluation, statistics, store, tasks
from tracer.attributing import attribute
from tracer.circuit import _provenance, versions
from tracer.config import DEFAULT_STEPS, PATH_METHODS, Baseline, Basis, Method, ModelRecord, as_job_error, settings
from tracer.errors import JobError, RunError, TracerError, quoted
from tracer.evaluation import LEVELS
from tracer.methods import Progress
from tracer.model import Model, load
from tracer.prompts import Encoded, Prompt, encode
from tracer.tasks import Pair, sva

Structure = Literal["simple", "nounpp", "rc", "within_rc"]
Ranking = Literal["absolute", "signed"]

NO_BASELINE = "none"
"""How a method without a baseline, `random`, is listed; it runs once."""

METRIC = "difference"
_ATTRIBUTED = 1 << 30  # bytes of attributions held at once
_ROWS = 256  # of one batch of ablations: more gain nothing on a CPU
_VIEW = (-0.4, 1.6)  # of the plots' share axis

# ------------------------------------------------------------------------------------------------- the job


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _listed(value: Any) -> Any:
    """One name or number where a list is wanted is a list of one: ``--set methods=relp``."""
    return [value] if isinstance(value, str | int | float) else value


class Job(_Record):
    """The agreement benchmark: every structure x method x basis x baseline, found on train pairs, tested on others.

    Attributes:
        kind, task, model: what is run, and on which model (as `tracer.load` takes it).
        structures: of the sentences. train, test: pairs of each.
        methods, bases, baselines: as in `tracer.attribute`; a method is combined with the baselines that have an effect
            on it, and one that has none (``random``) runs once.
        ablation: as in `tracer.evaluate`; ``mean`` and ``resample`` take the patch side of the test pairs.
        sizes: nodes of the circuits, rising. Those above all nodes of a structure are left out there; MIB's shares of
            all nodes are added, for CPR and CMD.
        rankings: ``absolute``, strongest attribution first; ``signed``, largest positive attribution first.
        steps: of the path methods.
        seed: of the pairs, the method ``random``, the random control and the intervals.
    """

    kind: Literal["benchmark"]
    task: Literal["sva"]
    model: str = "demo"
    structures: Annotated[tuple[Structure, ...], BeforeValidator(_listed)] = get_args(Structure)
    train: int = Field(300, ge=1)
    test: int = Field(40, ge=2)
    methods: Annotated[tuple[Method, ...], BeforeValidator(_listed)]
    bases: Annotated[tuple[Basis, ...], BeforeValidator(_listed)] = get_args(Basis)
    baselines: Annotated[tuple[Baseline, ...], BeforeValidator(_listed)] = ("counterfactual",)
    ablation: Literal["zero", "mean", "counterfactual", "resample"] = "mean"
    sizes: Annotated[tuple[int, ...], BeforeValidator(_listed)]
    rankings: Annotated[tuple[Ranking, ...], BeforeValidator(_listed)] = get_args(Ranking)
    steps: int = Field(DEFAULT_STEPS, ge=1)
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _has_effect(self) -> Job:
        for name in ("structures", "methods", "bases", "baselines", "sizes", "rankings"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must name at least one, each once")
        if self.sizes[0] < 1 or list(self.sizes) != sorted(self.sizes):
            raise ValueError("sizes must rise from 1 or more")
        if self.steps != DEFAULT_STEPS and not PATH_METHODS & set(self.methods):
            raise ValueError(f"steps only have an effect with {', '.join(sorted(PATH_METHODS))}")
        for method in self.methods:
            if not self.baselines_of(method):
                raise ValueError(f"none of the baselines has an effect on method {method!r}")
        return self

    def baselines_of(self, method: str) -> tuple[str, ...]:
        """The baselines a method is combined with."""
        if method == "random":
            return (NO_BASELINE,)
        return tuple(one for one in self.baselines if _allowed(method, one))

    def combinations(self) -> list[tuple[str, str, str, str]]:
        """(structure, method, basis, baseline) of everything that is run, in order."""
        return [
            (structure, method, basis, baseline)
            for structure in self.structures
            for basis in self.bases
            for method in self.methods
            for baseline in self.baselines_of(method)
        ]


def _allowed(method: str, baseline: str) -> bool:
    try:
        settings(method=method, baseline=baseline)
    except JobError:
        return False
    return True


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> Job:
    """A job file (YAML), with ``key=value`` overrides whose values are YAML as well.

    Raises:
        JobError: an unreadable file, an unknown key (the known ones are named), or a value that cannot be.
    """
    content = _parsed(Path(path)) | dict(_override(one) for one in overrides)
    for key in content:
        _check_key(key)
    try:
        return Job.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "missing":
            raise JobError(f"job {quoted(str(path), 300)}", f"has no {first['loc'][0]}", "give it a value") from None
        raise as_job_error(error) from None


def _parsed(path: Path) -> dict[Any, Any]:
    where = f"job {quoted(str(path), 300)}"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise JobError(where, f"cannot be read ({error.strerror or error})", "check the path") from error
    except (UnicodeError, yaml.YAMLError, RecursionError) as error:
        raise JobError(where, f"is not YAML ({quoted(str(error), 120)})", "mend that line") from error
    if not isinstance(content, dict):
        raise JobError(where, f"holds a {type(content).__name__}, not keys with values", "see jobs/sva.yaml")
    return content


def _override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise JobError(f"--set {quoted(text)}", "must be key=value", "write e.g. --set train=100")
    _check_key(key.strip())
    try:
        return key.strip(), yaml.safe_load(value)
    except (yaml.YAMLError, RecursionError) as error:
        raise JobError(f"--set {quoted(text)}", "its value is not YAML", "write lists as [a, b]") from error


def _check_key(key: Any) -> None:
    if key not in Job.model_fields:
        raise JobError(f"key {quoted(key)}", "is not known to a benchmark job", f"use {', '.join(Job.model_fields)}")


# ------------------------------------------------------------------------------------------------ its result


class Number(_Record):
    """A number with the ends of its 95 % interval."""

    estimate: float
    low: float
    high: float


class Band(_Record):
    """A curve with the ends of its 95 % intervals, by size."""

    estimate: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


class Reach(_Record):
    """The fewest nodes that reach a level of faithfulness; None where no measured size does."""

    estimate: int | None
    low: int | None
    high: int | None


class Curves(_Record):
    """What the circuits of one ranking do, by size; fields as in `evaluation.Evaluation`.

    `cpr` and `cmd` are areas over MIB's sizes, `sizes_for` is over all sizes measured.
    """

    sizes: tuple[int, ...]
    n_neurons: tuple[int, ...]
    faithfulness: Band
    completeness: Band
    control: Band
    cpr: Number
    cmd: Number
    sizes_for: dict[str, Reach]


class Outcome(_Record):
    """One combination: its curves by ranking, and what they were measured on.

    Attributes:
        n_train, n_test: pairs used; skipped: how many of the others were left out, by reason.
        n_total: nodes the model has on these prompts. whole, empty: F of the model, and with every node ablated.
        attribution_seconds, evaluation_seconds: they took.
    """

    structure: str
    method: str
    basis: str
    baseline: str
    n_train: int
    n_test: int
    skipped: dict[str, int]
    n_total: int
    whole: float
    empty: float
    rankings: dict[Ranking, Curves]
    attribution_seconds: float
    evaluation_seconds: float

    @property
    def combination(self) -> tuple[str, str, str, str]:
        """What it is the outcome of."""
        return self.structure, self.method, self.basis, self.baseline


class _Results(_Record):
    """What results.json holds."""

    fingerprint: str
    packages: dict[str, str]
    outcomes: tuple[Outcome, ...] = ()


@dataclass(frozen=True)
class BenchmarkResult:
    """A benchmark that ran.

    Attributes:
        outcomes: of every combination, in the job's order.
        folder: where it was written. resumed: how many combinations were there already.
        seconds: this call took.
    """

    job: Job
    model: ModelRecord
    outcomes: tuple[Outcome, ...]
    folder: Path
    resumed: int
    seconds: float


# --------------------------------------------------------------------------------------------------- running


def run_benchmark(
    job: Job, out: str | Path, progress: Progress | None = None, *, overwrite: bool = False
) -> BenchmarkResult:
    """Run a benchmark into a folder; each combination is written when it is done, and kept if a later one fails.

    A folder that holds the same job (by fingerprint) is continued: what its results.json holds is not computed again,
    unless packages have changed since. Another job's folder is refused, or replaced with `overwrite`.

    Args:
        progress: called with (done, total) combinations.

    Raises:
        JobError: too few pairs, a pair in train and test, an ablation that changes nothing. ModelError: the model.
        RunError: the folder holds something else, is damaged, or cannot be written.
    """
    started, out = time.perf_counter(), Path(out)
    store.check_place(out)
    model = load(job.model)
    try:
        results = _begin(job, model, out, overwrite)
        resumed = len(results.outcomes)
        found = {one.combination: one for one in results.outcomes}
        for outcome in _outcomes(job, model, frozenset(found)):
            found[outcome.combination] = outcome
            results = results.model_copy(update={"outcomes": tuple(found.values())})
            _write_results(out, results)
            if progress is not None:
                progress(len(found), len(job.combinations()))
        outcomes = tuple(found[one] for one in job.combinations())
        result = BenchmarkResult(job, model.record(), outcomes, out, resumed, time.perf_counter() - started)
        _finish(result)
    except OSError as error:
        rule = f"cannot be written ({error.strerror or error})"
        raise RunError(f"folder {quoted(str(out), 300)}", rule, "choose another with --out") from error
    return result


def _begin(job: Job, model: Model, out: Path, overwrite: bool) -> _Results:
    """Make way for the job in its folder; the results that are there already."""
    content = job.model_dump(mode="json")
    fingerprint = store.fingerprint({"job": content, "model": model.record().model_dump(mode="json")})
    mine = (out / "run.json").is_file() and store._read_record(out).get("fingerprint") == fingerprint
    store._clear(out, fingerprint, overwrite)
    old = out / "results.json"
    if not mine:
        for path in (old, out / "curves.csv", out / "table.csv", *(out / "plots").glob("*.png")):
            path.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    record = {"kind": "benchmark", "fingerprint": fingerprint, **_provenance(), "job": content}
    record |= {"schema_version": store.SCHEMA_VERSION, "model": model.record().model_dump(mode="json")}
    store._write_json(out / "run.json", record)
    fresh = _Results(fingerprint=fingerprint, packages=versions())
    if not old.exists():
        return fresh
    there = read_results(out)
    return there if (there.fingerprint, there.packages) == (fresh.fingerprint, fresh.packages) else fresh


def read_results(folder: str | Path) -> _Results:
    """What results.json of a benchmark's folder holds: ``.outcomes``, finished ones of a run that did not end too.

    Raises:
        RunError: it is not there, or damaged.
    """
    path = Path(folder) / "results.json"
    try:
        return _Results.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"file {quoted(str(path), 300)}", "cannot be read", "give a benchmark's folder") from error
    except (ValidationError, UnicodeError) as error:
        rule = "is damaged, or another version's"
        raise RunError(f"file {quoted(str(path), 300)}", rule, "delete it and run the job again") from error


def _write_results(out: Path, results: _Results) -> None:
    with store._whole(out / "results.json") as temporary:
        temporary.write_text(results.model_dump_json(), encoding="utf-8")


@dataclass(frozen=True)
class _Data:
    """The pairs of one structure that the model can be asked."""

    train: tuple[Pair, ...]
    test: tuple[Encoded, ...]
    skipped: dict[str, int]


@dataclass(frozen=True)
class _Bench:
    """One structure's test prompts in one basis, and the metric of each, of the whole model and of the empty one."""

    test: evaluation._Test
    whole: Tensor
    empty: Tensor


def _outcomes(job: Job, model: Model, done: frozenset[tuple[str, str, str, str]]) -> Iterator[Outcome]:
    """Every combination that is not done, in order; pairs and benches are made once for all that share them."""
    data = functools.cache(lambda structure: _pairs(job, model, structure))
    bench = functools.cache(lambda structure, basis: _bench(job, model, data(structure).test, basis))
    for combination in job.combinations():
        if combination not in done:
            structure, _, basis, _ = combination
            try:
                yield _outcome(job, model, combination, data(structure), bench(structure, basis))
            except TracerError as error:
                where = "/".join(combination)
                raise type(error)(f"{where}: {error.value}", error.rule, error.next_step) from error


def _pairs(job: Job, model: Model, structure: str) -> _Data:
    """Train and test pairs, apart from one another, of one length, that the model's tokenizer can be asked."""
    splits = {
        split: tasks.load(job.task, structure=structure, split=split, count=count, seed=job.seed)
        for split, count in (("train", job.train), ("test", job.test))
    }
    tasks.check_split(splits["train"], splits["test"])
    lengths = Counter(len(model.tokenizer.encode(pair.prompt)) for pair in splits["train"])
    length = lengths.most_common(1)[0][0]
    skipped: Counter[str] = Counter()
    kept: dict[str, list[Pair]] = {"train": [], "test": []}
    for split, pairs in splits.items():
        for pair in pairs:
            if reason := next(sva._reasons(pair, model, length), None):
                skipped[f"{split}: {reason[0]}"] += 1
            else:
                kept[split].append(pair)
    for split, least in (("train", 1), ("test", 2)):
        if len(kept[split]) < least:
            why = "; ".join(f"{count} skipped because {reason}" for reason, count in skipped.items())
            raise JobError(
                f"{len(kept[split])} of {len(splits[split])} {split} pairs of {structure}",
                f"can be asked, {least} are needed ({why})",
                "ask for more pairs, or use a model whose tokenizer keeps the answers whole",
            )
    return _Data(tuple(kept["train"]), tuple(encode(one.to_prompt(), model) for one in kept["test"]), dict(skipped))


def _bench(job: Job, model: Model, test: tuple[Encoded, ...], basis: str) -> _Bench:
    values = evaluation._values(model, test, job.ablation, None, basis, job.seed)
    length = len(test[0].token_ids)
    most = _ROWS * model.bytes_per_token(gradient=False, length=length) * length
    made = evaluation._Test(model, test, METRIC, values, basis, min(most, model.budget()))
    ranks = torch.full(values.shape[1:], evaluation.NEVER, dtype=torch.int32)
    whole, empty = (made.measure([(row, ranks, 0, stays) for row in range(len(test))]) for stays in (False, True))
    statistics.faithfulness(whole[:, None], empty, whole)  # refuses an ablation that changes nothing, before the rest
    return _Bench(made, whole, empty)


def _outcome(job: Job, model: Model, combination: tuple[str, str, str, str], data: _Data, bench: _Bench) -> Outcome:
    structure, method, basis, baseline = combination
    started = time.perf_counter()
    attributions = mean_attribution(job, model, data.train, method, basis, baseline)
    attributed = time.perf_counter()
    rankings: dict[Ranking, Curves] = {name: _curves(job, bench, ordered(attributions, name)) for name in job.rankings}
    return Outcome(
        structure=structure,
        method=method,
        basis=basis,
        baseline=baseline,
        n_train=len(data.train),
        n_test=len(data.test),
        skipped=data.skipped,
        n_total=attributions.numel(),
        whole=float(bench.whole.double().mean()),
        empty=float(bench.empty.double().mean()),
        rankings=rankings,
        attribution_seconds=attributed - started,
        evaluation_seconds=time.perf_counter() - attributed,
    )


def mean_attribution(job: Job, model: Model, pairs: Sequence[Pair], method: str, basis: str, baseline: str) -> Tensor:
    """The mean over pairs of each node's attribution, with its sign [layer, pos, neuron].

    The baseline ``mean`` is over the patch side of the pairs, as the ablation's is over that of the test pairs.
    """
    prompts = [pair.to_prompt(paired=baseline == "counterfactual") for pair in pairs]
    options: dict[str, Any] = {"steps": job.steps} if method in PATH_METHODS else {}
    if method == "random":
        options["seed"] = job.seed
    if baseline == "mean":
        options["reference"] = [Prompt(pair.counterfactual) for pair in pairs]
    baseline = "zero" if baseline == NO_BASELINE else baseline
    length = len(encode(prompts[0], model).token_ids)
    step = max(1, _ATTRIBUTED // (8 * model.n_layers * length * model.n_neurons(basis)))
    total = torch.zeros(model.n_layers, length, model.n_neurons(basis), dtype=torch.float64)
    for first in range(0, len(prompts), step):
        part = prompts[first : first + step]
        total += attribute(model, part, method, baseline, basis, metric=METRIC, **options).nodes.double().sum(0)
    return (total / len(prompts)).float()


def ordered(attributions: Tensor, ranking: str) -> Tensor:
    """The place of every node in a ranking, from 0 [layer, pos, neuron]; ties in order of layer, position, neuron.

    ``absolute``: strongest first, whatever the sign. ``signed``: largest first, so that what speaks against the answer
    comes last.
    """
    strength = attributions.abs() if ranking == "absolute" else attributions
    order = strength.flatten().sort(descending=True, stable=True).indices
    ranks = torch.empty(len(order), dtype=torch.int32)
    ranks[order] = torch.arange(len(order), dtype=torch.int32)
    return ranks.view_as(attributions)


def _curves(job: Job, bench: _Bench, ranks: Tensor) -> Curves:
    """One ranking's curves: all sizes and prompts, circuits, what is without them and random ones, in shared passes."""
    total, n_prompts = ranks.numel(), len(bench.whole)
    areas = sorted({max(1, round(share * total)) for share in statistics.MIB_SIZES})
    sizes = sorted({*(size for size in job.sizes if size <= total), *areas})
    kinds = ((ranks, True), (ranks, False), (evaluation._shuffled(ranks, job.seed), True))
    jobs = [(row, one, size, stays) for one, stays in kinds for row in range(n_prompts) for size in sizes]
    measured = bench.test.measure(jobs).view(3, n_prompts, len(sizes))
    table = torch.cat([bench.empty[:, None], bench.whole[:, None], *measured], -1)
    curves = statistics.resample(
        table, lambda rows: statistics.restored(rows[..., 2:], rows[..., 0], rows[..., 1]), seed=job.seed
    )
    n = len(sizes)
    parts = [curves.map(lambda values, i=i: values[..., i * n : (i + 1) * n]) for i in range(3)]
    at, shares = [sizes.index(one) for one in areas], [one / total for one in areas]
    over = parts[0].map(lambda values: values[..., at])
    levels = {level: statistics.size_for(sizes, parts[0], level) for level in LEVELS}
    return Curves(
        sizes=tuple(sizes),
        n_neurons=_unique(ranks, sizes),
        faithfulness=_band(parts[0]),
        completeness=_band(parts[1]),
        control=_band(parts[2]),
        cpr=_number(over.map(functools.partial(statistics.cpr, shares))),
        cmd=_number(over.map(functools.partial(statistics.cmd, shares))),
        sizes_for={f"{k:g}": Reach(estimate=one.estimate, low=one.low, high=one.high) for k, one in levels.items()},
    )


def _unique(ranks: Tensor, sizes: Sequence[int]) -> tuple[int, ...]:
    """(layer, neuron) pairs among the first nodes: each counts from its best position on."""
    best = ranks.amin(1).flatten()
    return tuple(int((best < size).sum()) for size in sizes)


def _band(found: statistics.Resamples) -> Band:
    one = found.interval()
    return Band(estimate=tuple(one.estimate.tolist()), low=tuple(one.low.tolist()), high=tuple(one.high.tolist()))


def _number(found: statistics.Resamples) -> Number:
    one = found.interval()
    return Number(estimate=float(one.estimate), low=float(one.low), high=float(one.high))


# ---------------------------------------------------------------------------------------------- what is written


def _finish(result: BenchmarkResult) -> None:
    """Curves, table and plots of a run whose combinations are all there; then the mark that it ended."""
    out = result.folder
    _write_csv(out / "curves.csv", list(_curve_rows(result.outcomes)))
    _write_csv(out / "table.csv", list(_table_rows(result.outcomes)))
    (out / "plots").mkdir(exist_ok=True)
    for structure in result.job.structures:
        for basis in result.job.bases:
            plot_benchmark(result, structure, basis, out / "plots" / f"{structure}-{basis}.png")
    store._write_json(out / "_SUCCESS.json", {"combinations": len(result.outcomes)})


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with store._whole(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _names(outcome: Outcome, ranking: str) -> dict[str, Any]:
    names = zip(("structure", "method", "basis", "baseline"), outcome.combination, strict=True)
    return {**dict(names), "ranking": ranking}


def _curve_rows(outcomes: Sequence[Outcome]) -> Iterator[dict[str, Any]]:
    for outcome in outcomes:
        for ranking, curves in outcome.rankings.items():
            for i, size in enumerate(curves.sizes):
                row = {**_names(outcome, ranking), "size": size, "n_neurons": curves.n_neurons[i]}
                for name in ("faithfulness", "completeness", "control"):
                    band: Band = getattr(curves, name)
                    row |= {name: band.estimate[i], f"{name}_low": band.low[i], f"{name}_high": band.high[i]}
                yield row


def _table_rows(outcomes: Sequence[Outcome]) -> Iterator[dict[str, Any]]:
    """One row per combination and ranking; a size that was not reached is empty."""
    for outcome in outcomes:
        for ranking, curves in outcome.rankings.items():
            row = {**_names(outcome, ranking), "n_train": outcome.n_train, "n_test": outcome.n_test}
            row |= {"n_total": outcome.n_total, "whole": outcome.whole, "empty": outcome.empty}
            for level, size in curves.sizes_for.items():
                row |= {f"size_{level}": size.estimate, f"size_{level}_low": size.low, f"size_{level}_high": size.high}
            for name in ("cpr", "cmd"):
                number: Number = getattr(curves, name)
                row |= {name: number.estimate, f"{name}_low": number.low, f"{name}_high": number.high}
            seconds = {"attribution": outcome.attribution_seconds, "evaluation": outcome.evaluation_seconds}
            yield row | {f"{name}_seconds": round(one, 3) for name, one in seconds.items()}


def plot_benchmark(result: BenchmarkResult, structure: str, basis: str, path: str | Path) -> Path:
    """Faithfulness above completeness against circuit size, one line per method, one column per baseline.

    Log x, 95 % intervals shaded, the job's first ranking; what lies far outside 0 to 1 is cut off.
    """
    import matplotlib.figure  # the figure alone: no window, whatever the machine

    ranking = result.job.rankings[0]
    mine = [one for one in result.outcomes if (one.structure, one.basis) == (structure, basis)]
    columns = list(dict.fromkeys(one.baseline for one in mine if one.baseline != NO_BASELINE)) or [NO_BASELINE]
    figure = matplotlib.figure.Figure(figsize=(4.2 * len(columns) + 1, 6.4), layout="constrained")
    grid = figure.subplots(2, len(columns), sharex=True, sharey=True, squeeze=False)
    for column, baseline in enumerate(columns):
        shown = [one for one in mine if one.baseline in (baseline, NO_BASELINE)]
        for axes, name in zip(grid[:, column], ("faithfulness", "completeness"), strict=True):
            _draw(axes, shown, name, ranking, result.job.methods)
        grid[0, column].set_title(f"baseline: {baseline}", fontsize=10)
        grid[1, column].set_xlabel("nodes in the circuit")
    for axes, name in zip(grid[:, 0], ("faithfulness", "completeness"), strict=True):
        axes.set_ylabel(name)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    n_total = f"{mine[0].n_total:,}"
    title = f"{structure}, {basis} basis: {n_total} nodes, {mine[0].n_test} test pairs"
    figure.suptitle(f"{title}\n{result.job.ablation} ablation, {ranking} ranking", fontsize=11)
    figure.savefig(path, dpi=130, format="png")
    return Path(path)


def _draw(axes: Any, outcomes: Sequence[Outcome], name: str, ranking: Ranking, methods: Sequence[str]) -> None:
    for outcome in outcomes:
        curves = outcome.rankings[ranking]
        band: Band = getattr(curves, name)
        colour = "#777777" if outcome.method == "random" else f"C{methods.index(outcome.method)}"
        axes.plot(curves.sizes, band.estimate, color=colour, marker="o", markersize=2.5, label=outcome.method)
        axes.fill_between(curves.sizes, band.low, band.high, color=colour, alpha=0.15, linewidth=0)
    for level in (0.0, 1.0):
        axes.axhline(level, color="#bbbbbb", linewidth=0.8, zorder=0)
    axes.set(xscale="log", ylim=_VIEW)


def benchmark_table(result: BenchmarkResult) -> RenderableType:
    """A benchmark for a terminal: a line per combination, the sizes for .8, .9 and .95, CPR and CMD, seconds."""
    rankings = result.job.rankings
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("structure", "basis", "method", "baseline"):
        table.add_column(name, no_wrap=True)
    first = rankings[0]
    heads = [f"nodes for {level}" for level in ("0.8", "0.9", "0.95")]
    heads += [f"{area} {ranking}" for area in ("CPR", "CMD") for ranking in rankings]
    for name in (*heads, "seconds"):
        table.add_column(name, justify="right")
    for before, outcome in zip((None, *result.outcomes), result.outcomes, strict=False):
        if before is not None and before.structure != outcome.structure:
            table.add_section()
        cells = [_reach(outcome.rankings[first].sizes_for[level]) for level in ("0.8", "0.9", "0.95")]
        cells += [
            f"{getattr(outcome.rankings[ranking], area).estimate:.3f}"
            for area in ("cpr", "cmd")
            for ranking in rankings
        ]
        seconds = f"{outcome.attribution_seconds:.2f} + {outcome.evaluation_seconds:.2f}"
        table.add_row(outcome.structure, outcome.basis, outcome.method, outcome.baseline, *cells, seconds)
    return Group(table, "", _about(result))


def _reach(size: Reach) -> str:
    ends = ("-" if one is None else f"{one:,}" for one in (size.low, size.high))
    return f"{'-' if size.estimate is None else f'{size.estimate:,}'} ({', '.join(ends)})"


def _about(result: BenchmarkResult) -> str:
    job, some = result.job, result.outcomes[0]
    skipped = sum(sum(one.skipped.values()) for one in {one.structure: one for one in result.outcomes}.values())
    return (
        f"{result.model.name}: circuits found on {some.n_train} pairs of a structure, tested on {some.n_test} others "
        f"by {job.ablation} ablation; {skipped} pairs skipped. Nodes, in brackets the 95 % interval over test pairs, "
        f"are the fewest measured that reach that faithfulness, ranked by {job.rankings[0]} attribution; - is not "
        "reached. CPR (large is good) and CMD (0 is best) are areas over MIB's sizes, and half of each lies above 50 % "
        "of all nodes. Seconds: attribution of the train pairs + evaluation. "
        f"{len(result.outcomes)} combinations in {result.seconds:.0f} s"
        + (f", {result.resumed} of them there before." if result.resumed else ".")
    )
