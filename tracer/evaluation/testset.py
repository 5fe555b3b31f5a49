"""Test prompts of one length, ready to be measured with any sets of their nodes ablated.

Knows which prompts can be measured together, what their nodes are ablated to, and which sets a ranking's sizes are.
Refuses to know where sets of nodes come from, and what is made of the numbers (evaluation/curves.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tracer.attribution.attribute import check_reach, with_metric, with_share, with_targets
from tracer.attribution.exact import Progress
from tracer.attribution.running import Running
from tracer.batching import chunked
from tracer.errors import JobError, option, quoted
from tracer.evaluation import ablations, statistics
from tracer.evaluation.ablations import AblatedRow, Ranking, Replacement
from tracer.model.model import Model
from tracer.prompts import Batch, Encoded, Prompt, encode
from tracer.settings import ABLATIONS, OWN_METRICS, Settings
from tracer.shapes import PerPrompt

NEVER = torch.iinfo(torch.int32).max
"""The rank of a node that is in no set."""

_ROWS = 256  # of one batch, where many rankings are measured: more gain nothing on a CPU

Ranks = Int[Tensor, "layer pos neuron"]


class Job(NamedTuple):
    """One number to measure.

    Attributes:
        row: the test prompt. ranks: of its nodes.
        size: the set is the first `size` ranks. without: but for `width` of them (nodes, or neurons) from this rank on;
            -1 for none.
        stays: whether the set is what stays, or what is ablated.
    """

    row: int
    ranks: Ranks
    size: int
    stays: bool
    without: int = -1
    width: int = 1

    @property
    def cuts(self) -> tuple[int, int, int]:
        """The set, as `AblatedRow` tells it."""
        if self.without < 0:
            return 0, 0, self.size
        return min(self.without, self.size), min(self.without + self.width, self.size), self.size


@dataclass(frozen=True)
class Fit:
    """What test prompts must be to be measured.

    Attributes:
        train: prompts that circuits were found on; one of them among the test prompts is an error, unless
            `allow_overlap`: then they are counted.
        length: in tokens, that the test prompts must have; one length, whichever, if None.
        least: prompts that there must be.
    """

    train: Sequence[Encoded] = ()
    allow_overlap: bool = False
    length: int | None = None
    least: int = 2

    def check(self, encoded: Sequence[Encoded], asked: Settings) -> int:
        """Refuse test prompts that cannot be measured together; how many of them were trained on.

        Raises:
            JobError: fewer than `least`, one without a target or of another length, one that was trained on.
        """
        if len(encoded) < self.least:
            rule = "intervals need at least 2" if self.least > 1 else "there is nothing to test on"
            raise JobError(f"{len(encoded)} test prompts", rule, "give more test prompts")
        if missing := [one for one in encoded if not one.target_ids and asked.metric not in OWN_METRICS]:
            raise JobError(
                f"prompt {quoted(missing[0].text)}", "has no target to measure", "give every test prompt one"
            )
        lengths = {len(one.token_ids) for one in encoded}
        wanted = min(lengths) if self.length is None else self.length
        if lengths != {wanted}:
            other = next(one for one in encoded if len(one.token_ids) != wanted)
            raise JobError(
                f"prompt {quoted(other.text)}",
                f"is {len(other.token_ids)} tokens, {wanted} are needed: nodes are ablated position by position",
                "give test prompts of one length, the circuit's own unless aligned=False",
            )
        seen = {one.token_ids for one in self.train}
        both = [one for one in encoded if one.token_ids in seen]
        if both and not self.allow_overlap:
            raise JobError(
                f"{len(both)} of {len(encoded)} test prompts (the first: {quoted(both[0].text)})",
                "are both a train and a test prompt",
                f"hold them out of one, or give {option('allow_overlap', True)}, which every result says",
            )
        return len(both)


@dataclass(frozen=True)
class TestSet:
    """Test prompts of one length, what their nodes are ablated to, and how their metric is read.

    Attributes:
        to: what the nodes are ablated to; of each prompt the one of its place in `drawn`.
        memory: bytes one batch may use.
        metric: the settings that it is of. ablation: the name of what `to` is.
        known: the metric of each prompt of the full model, and of the empty one, with every node ablated, if measured.
        n_shared: of the prompts, how many circuits were found on as well.
    """

    __test__ = False  # pytest: nothing to collect

    model: Model
    prompts: tuple[Encoded, ...]
    metric: Settings
    to: Replacement
    drawn: tuple[int, ...]
    basis: str
    memory: int
    ablation: str
    known: tuple[PerPrompt, PerPrompt] | None = None
    n_shared: int = 0

    @staticmethod
    def of(
        model: Model,
        prompts: Sequence[Encoded],
        ablation: str,
        asked: Settings,
        seed: int,
        reference: Sequence[Prompt] | None = None,
        fit: Fit | None = None,
        memory: int | None = None,
    ) -> TestSet:
        """Check test prompts and work out what their nodes are ablated to.

        Args:
            ablation, reference: as in `faithfulness.evaluate`. seed: of the prompts that ``resample`` draws.
            asked: of these the basis and the metric count; ``auto`` is the difference where the prompts have foils,
                else the target's logit. ``topk`` sums a prompt's targets, or the `top_k` tokens that the whole model
                puts first on it; ``share`` is of those that hold the share of its probability.
            memory: bytes one batch may use; the model's own default if None.

        Raises:
            JobError: prompts that do not fit, a reference without effect.
        """
        asked = asked.numbered(model.numbering())
        check_ablation(ablation, reference is not None)
        n_shared = (fit or Fit()).check(prompts, asked)
        if asked.metric == "topk":
            prompts = _with_top_tokens(model, prompts, asked, memory)
        elif asked.metric == "share":
            prompts = with_share(model, prompts, asked, memory)
        else:
            asked = with_metric(asked, prompts)
        budget = memory or model.budget()
        to, drawn = _replacement(model, prompts, ablation, reference, seed)
        to = to.here(model, len(prompts[0].token_ids), asked.basis, budget)
        return TestSet(model, tuple(prompts), asked, to, drawn, asked.basis, budget, ablation, n_shared=n_shared)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Nodes of a prompt: (layers, positions, neurons)."""
        return self.model.n_layers, len(self.prompts[0].token_ids), self.model.n_neurons(self.basis)

    @cached_property
    def there(self) -> Bool[Tensor, "layer pos neuron"] | None:
        """Whether a node is there on any of the prompts; None where all are on every one (a model without experts)."""
        return Running.of(self.model, [one.token_ids for one in self.prompts], self.basis).mask(self.shape[1])

    def measure(self, jobs: Sequence[Job], progress: Progress | None = None) -> Tensor:
        """The metric of each job [job]."""
        rankings = {id(job.ranks): Ranking(job.ranks) for job in jobs}
        rows = [
            AblatedRow(self.prompts[job.row], rankings[id(job.ranks)], job.cuts, job.stays, self.drawn[job.row])
            for job in jobs
        ]
        return ablations.measured(self.model, rows, self.to, self.metric, self.basis, self.memory, progress=progress)

    def ends(self, ranks: Ranks) -> list[Job]:
        """The jobs that measure every prompt in full, then with every node ablated."""
        return [Job(row, ranks, 0, stays) for stays in (False, True) for row in range(len(self.prompts))]

    def measure_with_ends(self, jobs: Sequence[Job], progress: Progress | None = None) -> tuple[Tensor, ...]:
        """The metric of each prompt in full and empty, and of each job; in shared passes, unless the ends are known."""
        if self.known is not None:
            return *self.known, self.measure(jobs, progress)
        n = len(self.prompts)
        return self.measure([*self.ends(jobs[0].ranks), *jobs], progress).split([n, n, len(jobs)])

    def with_known_ends(self) -> TestSet:
        """The same with both ends measured once, for many rankings.

        Raises:
            JobError: an ablation that changes nothing.
        """
        length = len(self.prompts[0].token_ids)
        most = _ROWS * self.model.bytes_per_token(gradient=False, length=length) * length
        test, n = replace(self, memory=min(most, self.memory)), len(self.prompts)
        full, empty = test.measure(self.ends(torch.full(self.shape, NEVER, dtype=torch.int32))).split(n)
        # Refuses an ablation that changes nothing, before anything else is measured.
        statistics.faithfulness(full[:, None], empty, full)
        return replace(test, known=(full, empty))


def check_ablation(ablation: str, has_reference: bool) -> None:
    """Refuse an ablation that there is not, and a reference that has no effect on it.

    Raises:
        JobError: that.
    """
    if ablation not in ABLATIONS:
        raise JobError(option("ablation", ablation), f"must be one of {', '.join(ABLATIONS)}", "choose one")
    if has_reference and ablation in ("zero", "counterfactual"):
        rule = f"has no effect with {option('ablation', ablation)}"
        raise JobError(option("reference", "..."), rule, "leave it out")


def _with_top_tokens(
    model: Model, prompts: Sequence[Encoded], chosen: Settings, memory: int | None
) -> Sequence[Encoded]:
    """Prompts with the tokens that the whole model puts first, which stay those whatever is ablated."""
    length = len(prompts[0].token_ids)
    each = model.bytes_per_token(gradient=False, length=length) * length
    size = max(1, (memory or model.budget()) // each)
    parts = ([prompts[i] for i in part] for part in chunked(range(len(prompts)), size))
    batches = ((part, Batch(tuple(one.token_ids for one in part))) for part in parts)
    return [one for part, batch in batches for one in with_targets(model, batch, part, chosen)]


def _replacement(
    model: Model, encoded: Sequence[Encoded], ablation: str, reference: Sequence[Prompt] | None, seed: int
) -> tuple[Replacement, tuple[int, ...]]:
    """What the prompts' nodes are ablated to, and which of that each prompt's are.

    Raises:
        JobError: a prompt without its counterfactual, a reference of another length or without effect.
    """
    length, same = len(encoded[0].token_ids), (0,) * len(encoded)
    if ablation == "zero":
        return Replacement(), same
    paired = [one.counterfactual_ids for one in encoded if one.counterfactual_ids is not None]
    if ablation == "counterfactual":
        if len(paired) < len(encoded):
            rule, step = "a test prompt has no counterfactual", "give every one its pair"
            raise JobError(option("ablation", ablation), rule, step)
        return Replacement(tuple(paired)), tuple(range(len(paired)))
    if reference is not None:
        others = [encode(prompt, model).token_ids for prompt in reference]
    else:
        others = paired if len(paired) == len(encoded) else [one.token_ids for one in encoded]
        if len(encoded) == 1 and not paired:
            rule, step = "one prompt alone is no reference", f"give {option('reference')} with prompts as long as it"
            raise JobError(option("ablation", ablation), rule, step)
    if bad := [ids for ids in others if len(ids) != length]:
        raise JobError(
            f"a reference prompt of {len(bad[0])} tokens", f"the test prompts have {length}", "give equally long ones"
        )
    check_reach(others, length)
    if ablation == "mean":
        return Replacement(tuple(others), mean=True), same
    drawn = torch.randint(len(others), (len(encoded),), generator=torch.Generator().manual_seed(seed)).tolist()
    used = sorted(set(drawn))
    return Replacement(tuple(others[one] for one in used)), tuple(used.index(one) for one in drawn)
