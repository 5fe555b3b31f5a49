"""Faithfulness, areas, intervals, correlations: what is said about an evaluation, as arithmetic on plain tensors.

Knows tables with one row per test prompt (or per node), and how to resample those rows. Refuses to know models,
tokens and where the numbers came from. A number that does not exist is a `JobError` or None, never inf, never clipped.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tracer.errors import JobError, quoted

MIB_SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Circuit sizes of the MIB benchmark, as shares of all nodes."""

_ENDS = ("estimate", "low", "high")
_NEGLIGIBLE = 1e-6  # of the values' own size: where a float32 difference is rounding
_CHUNK = 1 << 23  # resampled values held at once (64 MB)
_DECADE = 10  # the middle stratum reaches to this many times the strong one


# ------------------------------------------------------------------------------------- ratios of means


@dataclass(frozen=True)
class Ratio:
    """Numerators and denominators, kept apart so that a denominator near 0 can be told from a large ratio.

    Attributes:
        numerator, denominator: broadcast against one another.
        scale: the size of what the denominator is a difference of; it counts as 0 when it is rounding of that.
    """

    numerator: Float[Tensor, "*statistic"]
    denominator: Float[Tensor, "*#statistic"]
    scale: Float[Tensor, "*#statistic"]

    @property
    def negligible(self) -> Tensor:
        """Where the denominator is 0 up to rounding."""
        return self.denominator.abs() <= _NEGLIGIBLE * self.scale

    def value(self) -> Float[Tensor, "*statistic"]:
        """numerator / denominator.

        Raises:
            JobError: a denominator of 0 up to rounding.
        """
        if bool(self.negligible.any()):
            raise JobError(
                "F(model) - F(empty)",
                "is 0 up to rounding: ablating every node does not change the metric, so there is no share of it",
                "use prompts on which the ablation matters, a foil, or another ablation",
            )
        return self.numerator / self.denominator


Statistic = Callable[[Tensor], Tensor | Ratio]


def mean(rows: Shaped[Tensor, "resample prompt *rest"]) -> Float[Tensor, "resample *rest"]:
    """The mean over prompts of each resample; equal columns have bitwise equal means."""
    # One addition after the other: a reduction's order depends on the layout, and equal values would differ in a bit.
    return functools.reduce(torch.add, rows.double().unbind(1)) / rows.shape[1]


def restored(
    ablated: Float[Tensor, "resample prompt *size"],
    empty: Float[Tensor, "resample prompt"],
    full: Float[Tensor, "resample prompt"],
) -> Ratio:
    """(F(ablated) - F(empty)) / (F(model) - F(empty)) of each resample, F the mean over prompts.

    The form for `bootstrap`, whose rows hold every condition of a prompt so that a resample is paired::

        bootstrap(table, lambda rows: restored(rows[..., 2:], rows[..., 0], rows[..., 1]))
    """
    empty, full, ablated = empty.double(), full.double(), ablated.double()
    trailing = (1,) * (ablated.dim() - 2)
    numerator = mean(ablated - empty.view(*empty.shape, *trailing))
    denominator, scale = mean(full - empty), mean(full.abs() + empty.abs())
    return Ratio(numerator, denominator.view(-1, *trailing), scale.view(-1, *trailing))


def faithfulness(
    circuit: Float[Tensor, "prompt *size"], empty: Float[Tensor, " prompt"], full: Float[Tensor, " prompt"]
) -> Float[Tensor, "*size"]:
    """How much of the metric the circuit alone keeps; 1 for the whole model and 0 for nothing, exactly.

    A ratio of means over prompts (method.md section 5), not a mean of ratios.

    Args:
        circuit: the metric with everything outside the circuit ablated, per prompt and circuit size.
        empty: the metric with every node ablated.
        full: the metric of the model as it is.

    Raises:
        JobError: F(model) - F(empty) is 0 up to rounding, no prompt, or a value that is not finite.
    """
    for name, values in (("circuit", circuit), ("empty", empty), ("full", full)):
        _check_rows(values, 1, name)
    return restored(circuit[None], empty[None], full[None]).value()[0]


def completeness(
    without: Float[Tensor, "prompt *size"], empty: Float[Tensor, " prompt"], full: Float[Tensor, " prompt"]
) -> Float[Tensor, "*size"]:
    """How much of the metric is left without the circuit; 0 without the whole model and 1 without nothing, exactly.

    Args:
        without: the metric with the circuit's own nodes ablated, per prompt and circuit size.
        empty, full: as for `faithfulness`, whose formula this is.

    Raises:
        JobError: as for `faithfulness`.
    """
    return faithfulness(without, empty, full)


# ------------------------------------------------------------------------------------------- bootstrap


@dataclass(frozen=True, eq=False)
class Interval:
    """A number, or several, with the ends of its confidence interval; float64. The ends are NaN where there is none,
    which a record writes as None."""

    low: Float[Tensor, "*statistic"]
    high: Float[Tensor, "*statistic"]
    estimate: Float[Tensor, "*statistic"]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Interval) and self.record() == other.record()

    def __hash__(self) -> int:
        return hash(str(self.record()))

    def record(self) -> dict[str, Any]:
        """As plain numbers, or lists of them; None where there is none."""
        return {name: _plain(getattr(self, name).tolist()) for name in _ENDS}

    @staticmethod
    def of(record: Mapping[str, Any]) -> Interval:
        """An interval from its `record`."""
        return Interval(**{name: torch.from_numpy(np.array(record[name], dtype=float)) for name in _ENDS})


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return None if math.isnan(value) else value


@dataclass(frozen=True)
class Resamples:
    """A statistic of the sample and of its resamples; NaN where one is degenerate. One prompt has no resamples."""

    estimate: Float[Tensor, "*statistic"]
    values: Float[Tensor, "resample *statistic"]

    def map(self, function: Callable[[Tensor], Tensor]) -> Resamples:
        """The same resamples of a function of the statistic, e.g. ``partial(cpr, sizes)`` of a curve.

        The function must work on any leading axes and give NaN for NaN.
        """
        return Resamples(function(self.estimate[None])[0], function(self.values))

    def interval(self, confidence: float = 0.95) -> Interval:
        """The percentile interval; without ends where there are no resamples.

        A degenerate resample counts as beyond both ends, so it can only widen the interval.

        Raises:
            JobError: so many resamples are degenerate that an end would be one, which is when the denominator's own
                interval holds 0 and the ratio's is unbounded (Fieller 1954).
        """
        if not len(self.values):
            none = torch.full_like(self.estimate, math.nan)
            return Interval(none, none, self.estimate)
        tail = _tail(confidence, len(self.values))
        share = self.values.isnan().double().mean(0)
        if bool((share >= tail).any()):
            raise JobError(
                f"{float(share.max()):.1%} of the resamples",
                f"have no value: the denominator is 0 or has the other sign, allowed is less than {tail:.1%}; "
                "F(model) - F(empty) cannot be told from 0",
                "use more prompts, or prompts on which the ablation matters",
            )
        return Interval(*_ends(self.values, share, tail), self.estimate)


def bootstrap(
    values: Shaped[Tensor, "prompt *rest"],
    statistic: Statistic,
    *,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The percentile bootstrap interval of a statistic over test prompts (Efron 1979).

    Whole rows are drawn, so what stands in one row stays paired. With the same seed and number of prompts the same
    rows are drawn, whatever they hold. An interval of a constant has width 0. In simulation a 95 % interval of a ratio
    of means covers 95 % at 40 prompts, 92 % at 20 and 90 % at 10; BCa is no better there, so the simpler one is used.

    Args:
        values: one row per prompt.
        statistic: from rows [resample, prompt, ...] to one value, or `Ratio`, per resample [resample, ...].

    Raises:
        JobError: one prompt, a value that is not finite, a denominator near 0 in the sample or in too many resamples.
    """
    _check_rows(values, 2, "values")
    return resample(values, statistic, n_resamples=n_resamples, seed=seed).interval(confidence)


def resample(
    values: Shaped[Tensor, "prompt *rest"], statistic: Statistic, *, n_resamples: int = 2000, seed: int = 0
) -> Resamples:
    """A statistic of the sample and of `n_resamples` resamples of its rows, of one row none; else as `bootstrap`.

    Where the statistic is a `Ratio`, a resample whose denominator is 0 or has the other sign is degenerate: NaN.
    """
    _check_rows(values, 1, "values")
    rows = values.detach().cpu().double()
    sample = statistic(rows[None])
    estimate = sample.value() if isinstance(sample, Ratio) else sample
    if not bool(estimate.isfinite().all()):
        raise JobError("the statistic", "is not finite on the sample", "check the values it is made of")
    if len(rows) == 1:
        return Resamples(estimate[0], estimate[:0])
    drawn = torch.from_numpy(np.random.default_rng(seed).integers(len(rows), size=(n_resamples, len(rows))))
    step = max(1, _CHUNK // max(1, rows.numel()))
    parts = [_divided(statistic(rows[index]), sample) for index in drawn.split(step)]
    return Resamples(estimate[0], torch.cat(parts))


def resampled_means(values: Float[Tensor, "prompt column"], *, n_resamples: int = 2000, seed: int = 0) -> Resamples:
    """The mean over prompts of each column and of its resamples: `resample` of `mean`, of the same draws, for many
    columns: as one product, whose last bits are its own. One prompt has no resamples.

    Raises:
        JobError: no prompt, or a value that is not finite.
    """
    _check_rows(values, 1, "values")
    rows = values.detach().cpu().double()
    if len(rows) == 1:
        return Resamples(rows[0], rows[:0])
    drawn = np.random.default_rng(seed).integers(len(rows), size=(n_resamples, len(rows)))
    places = drawn + len(rows) * np.arange(n_resamples)[:, None]
    counts = np.bincount(places.ravel(), minlength=n_resamples * len(rows)).reshape(n_resamples, len(rows))
    return Resamples(rows.mean(0), torch.from_numpy(counts).double() @ rows / len(rows))


def _divided(found: Tensor | Ratio, sample: Tensor | Ratio) -> Tensor:
    if not isinstance(found, Ratio) or not isinstance(sample, Ratio):
        assert isinstance(found, Tensor), "a statistic is a Ratio on the sample and its resamples, or on neither"
        return found
    lost = found.negligible | (found.denominator.sign() != sample.denominator.sign())
    return torch.where(lost, torch.nan, found.numerator / torch.where(lost, 1.0, found.denominator))


def _tail(confidence: float, n_resamples: int) -> float:
    if not 0 < confidence < 1:
        raise JobError(f"confidence={confidence}", "must be between 0 and 1", "0.95 is usual")
    tail = (1 - confidence) / 2
    if n_resamples * tail < 1:
        needed = math.ceil(1 / tail)
        raise JobError(f"n_resamples={n_resamples}", f"at confidence {confidence} needs {needed}", "use 2000")
    return tail


def _ends(values: Tensor, share: Tensor, tail: float) -> tuple[Tensor, Tensor]:
    """The tail quantiles of each column when its NaNs, a `share` of it, lie beyond both ends."""
    ordered = values.sort(dim=0).values  # NaNs last
    last = (~values.isnan()).sum(0) - 1

    def at(quantile: Tensor) -> Tensor:
        place = quantile.clamp(0, 1) * last
        below = place.floor().long()
        above = torch.minimum(below + 1, last)
        lower, upper = (ordered.gather(0, index[None])[0] for index in (below, above))
        return torch.lerp(lower, upper, place - below)

    return at((tail - share) / (1 - share)), at((1 - tail) / (1 - share))


def _check_rows(values: Tensor, least: int, what: str) -> None:
    if len(values) < least:
        rule = "an interval needs at least two prompts" if least > 1 else "there is no prompt"
        raise JobError(f"{what} of {len(values)} prompts", rule, "give more prompts")
    if not bool(values.isfinite().all()):
        bad = (~values.isfinite()).flatten(1).any(1) if values.dim() > 1 else ~values.isfinite()
        raise JobError(f"{what} of prompt {int(bad.nonzero()[0])}", "is not finite", "find out why its metric is not")


# ------------------------------------------------------------------------------------- areas and sizes


def cpr(sizes: Sequence[float | int], faithfulness: Float[Tensor, "*rest size"]) -> Float[Tensor, "*rest"]:
    """Circuit performance ratio: the area under faithfulness over circuit size; larger is better.

    As MIB's circuit track computes it (Mueller et al. 2025, arXiv 2504.13151; `evaluate_area_under_curve` of its
    code): trapezoids between the measured sizes on a *linear* axis, from the smallest size to the largest, not
    extended to 0 and not divided by the range. On `MIB_SIZES` a circuit that is perfect at every size has .999, and
    half of that lies between 50 % and 100 % of the nodes. Whether nodes are ranked by signed or absolute scores is an
    option there (`absolute`) and the caller's choice here, to be stated with the number.

    Args:
        sizes: circuit sizes as shares of all nodes, increasing; MIB takes the nominal ones, `MIB_SIZES`.
        faithfulness: at those sizes.

    Raises:
        JobError: fewer than two sizes, not increasing or not shares, or another number of values.
    """
    at = _shares(sizes, faithfulness)
    return torch.trapezoid(faithfulness.double(), at, dim=-1)


def cmd(sizes: Sequence[float | int], faithfulness: Float[Tensor, "*rest size"]) -> Float[Tensor, "*rest"]:
    """Circuit-model distance: the area of ``|1 - faithfulness|`` over circuit size; 0 is best.

    As in MIB, the distance is taken at the measured sizes and joined by straight lines. Arguments and axis as of `cpr`.
    """
    at = _shares(sizes, faithfulness)
    return torch.trapezoid((1 - faithfulness.double()).abs(), at, dim=-1)


def _shares(sizes: Sequence[float | int], curve: Tensor) -> Tensor:
    _check_sizes(sizes, curve)
    if len(sizes) < 2:
        raise JobError(f"sizes={quoted(list(sizes))}", "an area needs at least two", "MIB uses .001 to 1")
    if not (sizes[0] >= 0 and sizes[-1] <= 1):
        raise JobError(f"sizes={quoted(list(sizes))}", "must be shares of all nodes, 0 to 1", "divide by their number")
    return torch.tensor(list(sizes), dtype=torch.double)


def _check_sizes(sizes: Sequence[float | int], curve: Tensor) -> None:
    if len(sizes) != curve.shape[-1]:
        raise JobError(f"{len(sizes)} sizes", f"but {curve.shape[-1]} values", "give one value per size")
    if not all(one < two for one, two in itertools.pairwise(sizes)):
        raise JobError(f"sizes={quoted(list(sizes))}", "must increase", "sort them and name each once")


WITHIN = 0.1
"""How far from 1 a faithfulness may be that stays."""


@dataclass(frozen=True)
class Size:
    """The circuit size that reaches a level of faithfulness, or from which it stays near 1; None means that no measured
    size does.

    A `high` of None says that, within the confidence, none may at all.
    """

    low: int | None
    high: int | None
    estimate: int | None

    def record(self) -> dict[str, int | None]:
        """As plain numbers."""
        return {name: getattr(self, name) for name in _ENDS}


def first_size(sizes: Sequence[int], faithfulness: Float[Tensor, " size"], level: float | int) -> int | None:
    """The smallest measured size whose faithfulness is at least `level`; None if there is none.

    The first crossing, which is also where the monotone envelope (running maximum) crosses. Nothing is interpolated:
    a size that was not measured was not shown to suffice. A later dip below the level does not count against it.
    """
    _check_sizes(sizes, faithfulness)
    index = int(_first(faithfulness[None], level)[0])
    return sizes[index] if index < len(sizes) else None


def size_for(sizes: Sequence[int], faithfulness: Resamples, level: float | int, confidence: float = 0.95) -> Size:
    """`first_size` with its percentile interval over resamples of the test prompts; without ends where there are none.

    Not reached counts as larger than every size. The ends are measured sizes, rounded outwards; a degenerate
    resample counts as beyond both ends.

    Args:
        sizes: numbers of nodes, increasing.
        faithfulness: resampled curves, [resample, size].
        level: such as .5, .8, .9, .95.
    """
    return _sized(sizes, faithfulness, lambda curves: _first(curves, level), confidence)


def settled_size(sizes: Sequence[int], faithfulness: Float[Tensor, " size"]) -> int | None:
    """The smallest measured size from which faithfulness stays within `WITHIN` of 1: there, and at every larger size
    that was measured. None if it is outside at the largest; what is not a number is outside.

    Where `first_size` is smaller, the curve passes 1, or comes back below, before it stays.
    """
    _check_sizes(sizes, faithfulness)
    index = int(_settled(faithfulness[None])[0])
    return sizes[index] if index < len(sizes) else None


def settles(sizes: Sequence[int], faithfulness: Resamples, confidence: float = 0.95) -> Size:
    """`settled_size` with its percentile interval over resamples of the test prompts, as `size_for` has it."""
    return _sized(sizes, faithfulness, _settled, confidence)


def _sized(
    sizes: Sequence[int], faithfulness: Resamples, index_of: Callable[[Tensor], Tensor], confidence: float
) -> Size:
    """A size that a curve has, with its interval; `index_of` curves [resample, size] tells which [resample]."""
    _check_sizes(sizes, faithfulness.values)
    mine = int(index_of(faithfulness.estimate[None])[0])
    estimate = sizes[mine] if mine < len(sizes) else None
    if not len(faithfulness.values):
        return Size(None, None, estimate)
    tail = _tail(confidence, len(faithfulness.values))
    lost = faithfulness.values.isnan().any(-1)
    index = index_of(faithfulness.values)
    low = torch.where(lost, 0, index).sort().values[math.floor(tail * (len(index) - 1))]
    high = torch.where(lost, len(sizes), index).sort().values[math.ceil((1 - tail) * (len(index) - 1))]
    ends = [sizes[int(i)] if int(i) < len(sizes) else None for i in (low, high)]
    return Size(ends[0], ends[1], estimate)


def _first(curves: Tensor, level: float | int) -> Tensor:
    """Index of the first value of at least `level` in each curve; the number of sizes if there is none."""
    reached = curves >= level
    return torch.where(reached.any(-1), reached.int().argmax(-1), curves.shape[-1])


def _settled(curves: Tensor) -> Tensor:
    """Index from which each curve stays near 1 to its end; the number of sizes if it does not end there."""
    near = (curves >= 1 - WITHIN) & (curves <= 1 + WITHIN)
    return curves.shape[-1] - near.flip(-1).int().cumprod(-1).sum(-1)


# ------------------------------------------------------------------------- how good was the estimate


@dataclass(frozen=True)
class Agreement:
    """How well an estimate follows the truth over nodes."""

    pearson: Interval
    spearman: Interval
    n: int


def agreement(
    estimate: Float[Tensor, " node"],
    truth: Float[Tensor, " node"],
    seed: int = 0,
    *,
    n_resamples: int = 2000,
    confidence: float = 0.95,
) -> Agreement:
    """Pearson's and Spearman's correlation over nodes, with bootstrap intervals over nodes.

    A resample in which one side is constant has no correlation; it counts as beyond both ends, and where an end
    falls among such resamples it is -1 or 1: nothing is known.

    Raises:
        JobError: fewer than three nodes, a value that is not finite, or a side that is constant.
    """
    table = torch.stack([estimate.detach().cpu().double(), truth.detach().cpu().double()], dim=-1)
    if len(table) < 3:
        raise JobError(f"{len(table)} nodes", "a correlation needs at least three", "sample more nodes")
    _check_rows(table, 3, "estimate or truth")
    for name, column in (("estimate", table[:, 0]), ("truth", table[:, 1])):
        if bool((column == column[0]).all()):
            raise JobError(f"{name} {quoted(float(column[0]))}", "is the same at every node", "sample other nodes")
    found = [resample(table, one, n_resamples=n_resamples, seed=seed) for one in (_pearson, _spearman)]
    pearson, spearman = (_within_one(one, confidence) for one in found)
    return Agreement(pearson, spearman, len(table))


def _within_one(found: Resamples, confidence: float) -> Interval:
    tail = _tail(confidence, len(found.values))
    share = found.values.isnan().double().mean(0)
    if float(share) >= tail:
        return Interval(torch.full_like(share, -1.0), torch.full_like(share, 1.0), found.estimate)
    return found.interval(confidence)


def _pearson(rows: Float[Tensor, "resample node 2"]) -> Float[Tensor, " resample"]:
    from scipy.stats import ConstantInputWarning, NearConstantInputWarning, pearsonr  # 50 MiB and a second, of workers

    with warnings.catch_warnings():
        for one in (ConstantInputWarning, NearConstantInputWarning):  # a constant side has no correlation: NaN
            warnings.simplefilter("ignore", one)
        return torch.from_numpy(pearsonr(rows[..., 0].numpy(), rows[..., 1].numpy(), axis=1)[0])


def _spearman(rows: Float[Tensor, "resample node 2"]) -> Float[Tensor, " resample"]:
    from scipy.stats import rankdata

    return _pearson(torch.from_numpy(rankdata(rows.numpy(), axis=1)))


@dataclass(frozen=True)
class Strata:
    """Flat indices of nodes, no node twice: the strongest, those ranked next, and others at random."""

    strong: Int[Tensor, " strong"]
    middle: Int[Tensor, " middle"]
    random: Int[Tensor, " random"]


def stratified(strength: Float[Tensor, "*node"], n_each: int, seed: int = 0) -> Strata:
    """A sample of nodes for exact ablation: strong, middle and random ones, or all where there are fewer.

    Strong are the `n_each` largest ``|strength|``, middle is drawn from the ranks up to ``10 * n_each``, where circuits
    end, and random from all others, zeros included: a node the estimate missed can only be found there.
    Ties keep the order of the flattened tensor; the indices are into that.
    """
    if n_each < 1:
        raise JobError(f"n_each={n_each}", "at least one node of each kind is needed", "use 1 or more; 20 is usual")
    if not bool(strength.isfinite().all()):
        raise JobError("strength", "is not finite at every node", "find out why the attribution is not")
    order = strength.detach().cpu().flatten().abs().sort(descending=True, stable=True).indices
    generator = torch.Generator().manual_seed(seed)

    def draw(pool: Tensor) -> Tensor:
        return pool[torch.randperm(len(pool), generator=generator)[:n_each]]

    middle = draw(order[n_each : _DECADE * n_each])
    rest = order[n_each:][~torch.isin(order[n_each:], middle)]
    return Strata(order[:n_each], middle, draw(rest))
