"""The swap: the strongest neurons of one prompt put in another's place (method.md section 7).

Knows which nodes are set to what, the two controls, and how answers are counted. Refuses to know where prompts come
from, nnsight (model/passes.py), and how a result is printed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tracer.attribution.attribute import attributed, notes, prepared
from tracer.attribution.reduce import nodes_of
from tracer.attribution.request import Request
from tracer.attribution.running import Running
from tracer.attribution.selection import Selection
from tracer.attribution.trace import answers as answers_of
from tracer.attribution.trace import can_ask
from tracer.batching import batches
from tracer.choices import Method, SwapBaseline
from tracer.errors import JobError, option, quoted, say
from tracer.evaluation import ablations
from tracer.evaluation.ablations import AblatedRow, Ranking, Replacement
from tracer.evaluation.statistics import Interval
from tracer.evaluation.steering import drawn_alike, is_index
from tracer.model.model import Model
from tracer.model.named import AnyModel, model_of
from tracer.model.state import undisturbed
from tracer.prompts import Encoded, Prompt, encode
from tracer.settings import settings
from tracer.system import bars
from tracer.system.bars import Report as Progress
from tracer.system.display import Plotted

KS = (5, 10, 20, 50)
"""Sizes by default."""
BASELINES = get_args(SwapBaseline)
"""From which nodes can be ranked."""


@dataclass(frozen=True)
class Outcome:
    """How the answers of all pairs turned out under one intervention, at each size k.

    Attributes:
        answers: the greedy next token of each pair.
        becomes: share of pairs that give the other prompt's answer. stays: their own still. 95 % Wilson intervals.
    """

    answers: Int[Tensor, "pair k"]
    becomes: Interval
    stays: Interval


@dataclass(frozen=True, repr=False)
class Swap(Plotted):
    """What putting one prompt's neurons in another's place did, at each size k.

    Attributes:
        ks: strongest nodes taken of each of a pair's two prompts. n_pairs: pairs measured.
        n_nodes: mean size of the union of the two sets, which is what is set.
        answered: share of pairs whose two prompts the untouched model answers rightly.
        swapped: the union set to the values of the other prompt.
        random: as many random neurons in each layer at the same positions, set to the values of the other prompt.
        zeroed: the source's set alone, set to 0.
        seed: of the random control.
    """

    ks: tuple[int, ...]
    n_pairs: int
    n_nodes: Float[Tensor, " k"]
    answered: Interval
    swapped: Outcome
    random: Outcome
    zeroed: Outcome
    seed: int

    @property
    def arms(self) -> dict[str, Outcome]:
        """The outcomes by name."""
        return {"swapped": self.swapped, "random": self.random, "zeroed": self.zeroed}

    def rows(self) -> list[dict[str, Any]]:
        """A row for each size and each of what was done: shares of pairs with 95 % intervals."""
        made = []
        for i, k in enumerate(self.ks):
            for name, outcome in self.arms.items():
                row: dict[str, Any] = {"k": k, "nodes": k if name == "zeroed" else float(self.n_nodes[i]), "done": name}
                for kind in ("becomes", "stays"):
                    share = getattr(outcome, kind)
                    row |= {kind: float(share.estimate[i])}
                    row |= {f"{kind}_{end}": float(getattr(share, end)[i]) for end in ("low", "high")}
                made.append(row)
        return made

    def to_pandas(self) -> Any:
        """A pandas DataFrame with a row for each size and each of what was done: `k`, `nodes`, `done` (``swapped``,
        ``random``, ``zeroed``), and `becomes` (share of pairs with the other's answer) and `stays` (with their own),
        each with its `_low` and `_high`."""
        import pandas

        return pandas.DataFrame(self.rows())


@undisturbed()
def swap(
    model: AnyModel,
    prompts: Sequence[Prompt],
    ks: Sequence[int] = KS,
    *,
    method: Method | str = "relp",
    baseline: SwapBaseline | str = "zero",
    seed: int = 0,
    memory: int | None = None,
    progress: Progress | bool | None = None,
) -> Swap:
    """Take a prompt's strongest neurons out, put another prompt's in, and count how often the answer follows.

    Of a prompt and of its counterfactual the k nodes with the largest ``|attribution|`` to the logit of their own
    answer are taken, and in the prompt all of these are set to the values they have in the counterfactual.

    Args:
        model: from `tracer.load`, or the name of a model (``"demo"``, a folder, a Hugging Face id), which is loaded and
            kept until a call names another.
        prompts: each with its answer as target, a counterfactual, and that one's answer as foil: a city, and a city of
            another state.
        ks: sizes, increasing.
        method: how nodes are attributed: ``relp``, ``grad``, ``ig``, ``conductance``, ``ig-activation``, ``relp-ig``,
            ``exact``, ``delta`` or ``random``.
        baseline: ``zero``: each prompt's nodes are ranked by what they do for its own answer's logit.
            ``counterfactual``: by what their difference from the other prompt does for the difference of the two
            answers' logits; in large models many strong nodes are the same for every prompt, and swap nothing.
        seed: of the random control.
        memory: bytes one batch may use; by default a GiB, or a quarter of a GPU.
        progress: a bar appears on a terminal and in a notebook after half a second; False for none, or a function
            that is called with (done, total).

    Returns:
        How often the answers follow at each size, beside random neurons'; `Swap.plot` draws it.

    Raises:
        JobError: no prompts, one without target, foil or counterfactual or with several targets, a size the model does
            not have, prompts of a pair that differ in length.
    """
    model = model_of(model)
    if not prompts:
        raise JobError("prompts=[]", "there is nothing to swap", "give at least one pair")
    if baseline not in BASELINES:
        rule = "ranks nodes of one prompt, or of two"
        raise JobError(option("baseline", baseline), rule, f"use {' or '.join(BASELINES)}")
    encoded = [_paired(prompt, model) for prompt in prompts]
    say(notes(encoded, model))
    lengths = [len(one.token_ids) for one in encoded]
    _check_ks(ks, model.n_nodes() * min(lengths))
    generator = torch.Generator().manual_seed(seed)
    budget = model.budget() if memory is None else memory
    each = model.bytes_per_token(length=max(lengths))
    with bars.shown(progress, "swapping") as report:
        parts = [
            _swapped(model, [encoded[i] for i in part], ks, generator, (method, baseline), budget)
            for part in bars.told(batches(lengths, each, budget, model.borders), report, len(encoded))
        ]
    answers, sizes, rightly = (torch.cat([part[i] for part in parts], dim) for i, dim in ((0, 1), (1, 0), (2, 0)))
    source = torch.tensor([one.target_ids[0] for one in encoded])[:, None]
    other = torch.tensor([one.foil_ids[0] for one in encoded])[:, None]
    swapped, random, zeroed = (Outcome(one, wilson(one == other), wilson(one == source)) for one in answers)
    means = sizes.double().mean(0).float()
    return Swap(tuple(ks), len(prompts), means, wilson(rightly), swapped, random, zeroed, seed)


def _paired(prompt: Prompt, model: Model) -> Encoded:
    """A prompt's tokens, with the one answer of each of its two sides."""
    one, value = encode(prompt, model), f"prompt {quoted(prompt.shown)}"
    if one.counterfactual_ids is None:
        raise JobError(value, "has no counterfactual, whose neurons take their place", "give it one of equal length")
    for name, ids, whose in (("target", one.target_ids, "its"), ("foil", one.foil_ids, "the counterfactual's")):
        if len(ids) != 1:
            raise JobError(value, f"has {len(ids)} {name}s; {whose} answer is one token", f"give it one {name}")
    if one.positions != (len(one.token_ids) - 1,):
        raise JobError(value, "is read elsewhere than at its end, where it is answered", "leave positions out")
    return one


def _check_ks(ks: Sequence[int], largest: int) -> None:
    if not ks or not all(is_index(k) for k in ks) or list(ks) != sorted(set(ks)) or ks[0] < 1 or ks[-1] > largest:
        raise JobError(option("ks", list(ks)), f"must rise from 1 to at most {largest}, the nodes", "change them")


def _swapped(
    model: Model,
    encoded: Sequence[Encoded],
    ks: Sequence[int],
    generator: torch.Generator,
    how: tuple[str, str],
    memory: int,
) -> tuple[Int[Tensor, "arm pair k"], Int[Tensor, "pair k"], Bool[Tensor, " pair"]]:
    """Answers swapped, under the control and zeroed; how many nodes were set; which pairs are answered rightly."""
    paired = [_exchanged(one) for one in encoded]
    ours, theirs = (_ranked(model, side, int(ks[-1]), how, memory) for side in (encoded, paired))
    swaps, zeros, sizes = list[AblatedRow](), list[AblatedRow](), list[Tensor]()
    each = [Running.of(model, [one.token_ids for one in both]) for both in zip(encoded, paired, strict=True)]
    for k in ks:
        unions = [torch.cat([mine[:k], other[:k]]).unique(dim=0) for mine, other in zip(ours, theirs, strict=True)]
        controls = [
            drawn_alike([(*node,) for node in nodes.tolist()], there, generator)
            for nodes, there in zip(unions, each, strict=True)
        ]
        for sets in (unions, [torch.tensor(places).view(-1, 3) for places in controls]):
            swaps += [
                AblatedRow(one, Ranking.of(nodes), (0, 0, len(nodes)), other=pair)
                for pair, (one, nodes) in enumerate(zip(encoded, sets, strict=True))
            ]
        sizes.append(torch.tensor([len(nodes) for nodes in unions]))
    rankings = [Ranking.of(nodes) for nodes in ours]
    zeros = [AblatedRow(one, nodes, (0, 0, k)) for k in ks for one, nodes in zip(encoded, rankings, strict=True)]
    untouched = [AblatedRow(one, ablations.EMPTY, (0, 0, 0)) for one in (*encoded, *paired)]

    def answers(rows: list[AblatedRow], to: Replacement) -> Tensor:
        return ablations.measured(model, rows, to, None, "activation", memory).long()

    longest = max(len(one.token_ids) for one in paired)
    values = Replacement(tuple(one.token_ids for one in paired)).here(model, longest, "activation", memory)
    swapped = answers(swaps, values).view(len(ks), 2, len(encoded))
    zeroed, plain = answers([*zeros, *untouched], Replacement()).split([len(zeros), len(untouched)])
    found = torch.cat([swapped, zeroed.view(len(ks), 1, len(encoded))], 1)
    wanted = [one.target_ids[0] for one in (*encoded, *paired)]
    rightly = (plain == torch.tensor(wanted)).view(2, len(encoded)).all(0)
    return found.permute(1, 2, 0), torch.stack(sizes, -1), rightly


def _exchanged(one: Encoded) -> Encoded:
    """The counterfactual as the prompt, and the other way round."""
    return replace(
        one,
        token_ids=one.counterfactual_ids or (),
        counterfactual_ids=one.token_ids,
        target_ids=one.foil_ids,
        foil_ids=one.target_ids,
    )


def _ranked(
    model: Model, prompts: Sequence[Encoded], count: int, how: tuple[str, str], memory: int
) -> list[Int[Tensor, "_ 3"]]:
    """Each prompt's strongest nodes, strongest first."""
    method, baseline = how
    paired = baseline == "counterfactual"
    asked = [
        Prompt(
            token_ids=one.token_ids,
            target=one.target_ids,
            foil=one.foil_ids if paired else None,
            counterfactual=one.counterfactual_ids if paired else None,
        )
        for one in prompts
    ]
    metric = "difference" if paired else "logit"
    chosen, encoded = prepared(model, asked, settings(method=method, baseline=baseline, metric=metric))
    selection = Selection.of(count)
    if can_ask(model, chosen, linearised=False):
        asked_once = Request(chosen, selection, edges=False)
        return [one.nodes for one in answers_of(model, encoded, asked_once, None, memory, None)]
    found = attributed(model, encoded, chosen, None, memory, None)
    return [nodes_of(found, row, selection).nodes[0] for row in range(len(encoded))]


def wilson(held: Bool[Tensor, "pair *k"], z: float = 1.959964) -> Interval:
    """The share of pairs for which it held, and its 95 % Wilson interval, which has a width at 0 and 1 too."""
    n = len(held)
    share = held.double().mean(0)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)).sqrt()
    return Interval((centre - half).clamp(min=0), (centre + half).clamp(max=1), share)
