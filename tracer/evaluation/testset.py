"""Test prompts of one length, ready to be measured with any sets of their nodes ablated.

Knows which prompts can be measured together, what their nodes are ablated to, and how measurements share passes.
Refuses to know where sets of nodes come from, and what is made of the numbers (evaluation/curves.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tracer.attribution.attribute import check_reach, metric_of, with_metric, with_targets
from tracer.attribution.methods import Progress
from tracer.batching import chunked
from tracer.errors import JobError, option, quoted
from tracer.evaluation import ablations, statistics
from tracer.evaluation.ablations import AblatedRow, Replacement, listed
from tracer.model import passes
from tracer.model.model import Model
from tracer.prompts import Batch, Encoded, Prompt, encode
from tracer.settings import DEFAULT_TOP_K, Settings, settings
from tracer.shapes import PerPrompt

ABLATIONS = ("zero", "mean", "counterfactual", "resample")
NEVER = torch.iinfo(torch.int32).max
"""The rank of a node that is in no set."""

_ROWS = 256  # of one batch, where many rankings are measured: more gain nothing on a CPU

Ranks = Int[Tensor, "layer pos neuron"]


class Job(NamedTuple):
    """One number to measure.

    Attributes:
        row: the test prompt. ranks: of its nodes.
        size: the set is the first `size` ranks. without: but for the node (or neuron) of this rank; -1 for none.
        stays: whether the set is what stays, or what is ablated.
    """

    row: int
    ranks: Ranks
    size: int
    stays: bool
    without: int = -1


@dataclass(frozen=True)
class TestSet:
    """Test prompts of one length, what their nodes are ablated to, and how their metric is read.

    Attributes:
        values: what each node of each prompt is ablated to; of a remote model where that comes from.
        memory: bytes one batch may use.
        ablation: the name of what `values` are.
        known: the metric of each prompt of the full model, and of the empty one, with every node ablated, if measured.
        n_shared: of the prompts, how many circuits were found on as well.
    """

    __test__ = False  # pytest: nothing to collect

    model: Model
    prompts: tuple[Encoded, ...]
    metric: str
    values: Float[Tensor, "prompt layer pos neuron"] | Replacement
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
        basis: str,
        seed: int,
        reference: Sequence[Prompt] | None = None,
        *,
        metric: str = "auto",
        top_k: int = DEFAULT_TOP_K,
        train: Sequence[Encoded] = (),
        allow_overlap: bool = False,
        length: int | None = None,
        least: int = 2,
        memory: int | None = None,
    ) -> TestSet:
        """Check test prompts and work out what their nodes are ablated to.

        Args:
            ablation, reference: as in `faithfulness.evaluate`. seed: of the prompts that ``resample`` draws.
            metric: as in `attribute`; ``auto`` is the difference where the prompts have foils, else the target's logit.
                ``topk`` sums a prompt's targets, or the `top_k` tokens that the whole model puts first on it.
            train: prompts that circuits were found on; one of them among the test prompts is an error, unless
                `allow_overlap`: then they are counted.
            length: in tokens, that the test prompts must have; one length, whichever, if None.
            least: prompts that there must be.
            memory: bytes one batch may use; the model's own default if None.

        Raises:
            JobError: prompts that do not fit, a reference without effect.
        """
        check_ablation(ablation, reference is not None)
        chosen = settings(metric=metric, top_k=top_k)
        n_shared = _check(prompts, train, length, allow_overlap, least, chosen)
        if chosen.metric == "topk":
            prompts = _with_top_tokens(model, prompts, chosen, memory)
        else:
            chosen = with_metric(chosen, prompts)
        to = _replacement(model, prompts, ablation, reference, seed)
        values = to if model.remote is not None else to.values(model, len(prompts), len(prompts[0].token_ids), basis)
        budget = memory or model.budget()
        return TestSet(model, tuple(prompts), chosen.metric, values, basis, budget, ablation, n_shared=n_shared)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Nodes of a prompt: (layers, positions, neurons)."""
        return self.model.n_layers, len(self.prompts[0].token_ids), self.model.n_neurons(self.basis)

    def measure(self, jobs: Sequence[Job], progress: Progress | None = None) -> Tensor:
        """The metric of each job [job]."""
        if isinstance(self.values, Replacement):
            rows = self._rows(jobs, self.values)
            return ablations.measure_on_server(
                self.model, rows, self.values, self.metric, self.basis, self.memory, progress=progress
            )
        values, length = self.values, len(self.prompts[0].token_ids)
        each = self.model.bytes_per_token(gradient=False, length=length) * length
        size = max(1, self.memory // each)

        def some(part: range) -> Tensor:
            measured = self._measure([jobs[i] for i in part], values)
            if progress is not None:
                progress(part.stop, len(jobs))
            return measured

        return torch.cat(self.model.each(some, chunked(range(len(jobs)), size)))

    def measure_apart(self, groups: Sequence[Sequence[Job]]) -> Float[Tensor, "group job"]:
        """The metric of groups of as many jobs. Here they do not share batches, so that none depends on another; on a
        server, where each batch is a request, they do."""
        if self.model.remote is None:
            return torch.stack([self.measure(group) for group in groups])
        return self.measure([job for group in groups for job in group]).view(len(groups), -1)

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
        jobs = self.ends(torch.full(self.shape, NEVER, dtype=torch.int32))
        full, empty = test.measure_apart([jobs[:n], jobs[n:]])
        # Refuses an ablation that changes nothing, before anything else is measured.
        statistics.faithfulness(full[:, None], empty, full)
        return replace(test, known=(full, empty))

    def _rows(self, jobs: Sequence[Job], to: Replacement) -> list[AblatedRow]:
        """The jobs as a server takes them; those of one ranking and size share one set, which travels once."""
        sets = {(id(job.ranks), job.size, job.without): job for job in jobs}
        found = {key: listed((job.ranks < job.size) & (job.ranks != job.without)) for key, job in sets.items()}
        drawn = to.drawn or (0,) * len(self.prompts)
        return [
            AblatedRow(self.prompts[row], found[id(ranks), size, without], stays, drawn[row])
            for row, ranks, size, stays, without in jobs
        ]

    def _measure(self, jobs: Sequence[Job], values: Tensor) -> Tensor:
        rows = torch.tensor([job.row for job in jobs])
        ranks = torch.stack([job.ranks for job in jobs])
        size, stays, without = (
            torch.tensor(part)[:, None, None, None]
            for part in zip(*((job.size, job.stays, job.without) for job in jobs), strict=True)
        )
        ablated = ((ranks < size) & (ranks != without)) != stays
        edits = [
            passes.Edit(layer, ablated[:, layer], 0.0, values[rows, layer])
            for layer in range(self.model.n_layers)
            if bool(ablated[:, layer].any())
        ]
        prompts = [self.prompts[row] for row in rows.tolist()]
        metric = metric_of(prompts, settings(metric=self.metric))
        batch = Batch(tuple(prompt.token_ids for prompt in prompts))
        return metric.read(passes.intervened(self.model, batch, edits, basis=self.basis, kept=metric.kept))


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


def _check(
    encoded: Sequence[Encoded],
    train: Sequence[Encoded],
    length: int | None,
    allow_overlap: bool,
    least: int,
    chosen: Settings,
) -> int:
    """Refuse test prompts that cannot be measured together; how many of them were trained on.

    Args:
        train: prompts that the circuit was found on. length: in tokens, that the test prompts must have.

    Raises:
        JobError: fewer than `least`, one without a target or of another length, one that was trained on.
    """
    if len(encoded) < least:
        rule = "intervals need at least 2" if least > 1 else "there is nothing to test on"
        raise JobError(f"{len(encoded)} test prompts", rule, "give more test prompts")
    if missing := [one for one in encoded if not one.target_ids and chosen.metric != "topk"]:
        raise JobError(f"prompt {quoted(missing[0].text)}", "has no target to measure", "give every test prompt one")
    lengths = {len(one.token_ids) for one in encoded}
    wanted = min(lengths) if length is None else length
    if lengths != {wanted}:
        other = next(one for one in encoded if len(one.token_ids) != wanted)
        raise JobError(
            f"prompt {quoted(other.text)}",
            f"is {len(other.token_ids)} tokens, {wanted} are needed: nodes are ablated position by position",
            "give test prompts of one length, the circuit's own unless aligned=False",
        )
    seen = {one.token_ids for one in train}
    both = [one for one in encoded if one.token_ids in seen]
    if both and not allow_overlap:
        raise JobError(
            f"{len(both)} of {len(encoded)} test prompts (the first: {quoted(both[0].text)})",
            "are both a train and a test prompt",
            f"hold them out of one, or give {option('allow_overlap', True)}, which every result says",
        )
    return len(both)


def _replacement(
    model: Model, encoded: Sequence[Encoded], ablation: str, reference: Sequence[Prompt] | None, seed: int
) -> Replacement:
    """What the prompts' nodes are ablated to.

    Raises:
        JobError: a prompt without its counterfactual, a reference of another length or without effect.
    """
    length = len(encoded[0].token_ids)
    if ablation == "zero":
        return Replacement()
    paired = [one.counterfactual_ids for one in encoded if one.counterfactual_ids is not None]
    if ablation == "counterfactual":
        if len(paired) < len(encoded):
            rule, step = "a test prompt has no counterfactual", "give every one its pair"
            raise JobError(option("ablation", ablation), rule, step)
        return Replacement(tuple(paired), tuple(range(len(paired))))
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
        return Replacement(tuple(others))
    drawn = torch.randint(len(others), (len(encoded),), generator=torch.Generator().manual_seed(seed))
    return Replacement(tuple(others), tuple(drawn.tolist()))
