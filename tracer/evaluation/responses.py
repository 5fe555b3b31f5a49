"""What a sweep comes to over prompts: mean changes with bootstrap intervals, beside those of random groups.

Knows the rows of the tables `schemas.STEERING` and `STEERING_GROUPS`. Refuses to know models.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tracer.evaluation import statistics
from tracer.evaluation.statistics import Interval

_Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Response:
    """What multiplying a group by a factor did to a token, over prompts.

    A target, foil or top token that is another one on other prompts goes by its role; several of a prompt count
    together: their probabilities' sum and their logits' mean.

    Attributes:
        n_prompts: behind the means. n_nodes: mean (position, neuron) pairs that were acted on.
        before, after: mean probability.
        change, logit_change: means over prompts; 95 % bootstrap intervals over prompts, NaN of one alone.
        control, control_logit: the same of random groups, each prompt's mean over draws; None without any.
        changed: share of prompts whose greedy token is another. control_changed: the same, of prompts and draws.
        kl: mean KL(unsteered, steered), in nats. control_kl: of random groups.
    """

    group: str
    factor: float
    token: str
    role: str
    n_prompts: int
    n_nodes: float
    before: float
    after: float
    change: Interval
    logit_change: Interval
    control: Interval | None
    control_logit: Interval | None
    changed: float
    control_changed: float | None
    kl: float
    control_kl: float | None


@dataclass(frozen=True)
class GroupResponse:
    """What multiplying a group by a factor left of another's activations, over prompts: 1 is all, 0 nothing.

    Attributes:
        kept: mean over prompts with its 95 % interval, NaN of one alone. control: of random groups; None without any.
    """

    group: str
    factor: float
    other: str
    n_prompts: int
    kept: Interval
    control: Interval | None


def responses(rows: _Rows, seed: int = 0) -> list[Response]:
    """The rows of a table `schemas.STEERING` over prompts, in their order.

    Args:
        seed: of the bootstrap.
    """
    names = _names(rows)
    by: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        name = names[row["role"], row["token_id"]]
        by.setdefault((row["group"], row["factor"], name, row["role"]), []).append(row)
    return [_response(key, mine, seed) for key, mine in by.items()]


def _names(rows: _Rows) -> dict[tuple[str, int], str]:
    """What each token is called: itself where all prompts have the same of its role, or it was asked for; else its
    role."""
    held: dict[str, dict[int, set[int]]] = {}
    words: dict[int, str] = {}
    for row in rows:
        held.setdefault(row["role"], {}).setdefault(row["token_id"], set()).add(row["prompt_id"])
        words[row["token_id"]] = row["token"]
    alike = {role for role, tokens in held.items() if len({frozenset(prompts) for prompts in tokens.values()}) == 1}
    return {
        (role, token): words[token] if role == "asked" or role in alike else role
        for role, tokens in held.items()
        for token in tokens
    }


def _response(key: tuple[Any, ...], rows: _Rows, seed: int) -> Response:
    own, drawn = _by_prompt(row for row in rows if row["draw"] < 0), _by_prompt(row for row in rows if row["draw"] >= 0)
    group, factor, token, role = key
    table = torch.stack([_numbers(own[prompt]) for prompt in own])
    probability, logit = (_interval(table[:, place], seed) for place in (2, 3))
    control = torch.stack([_numbers(drawn[prompt]) for prompt in drawn]) if drawn else None
    by = [None if control is None else _interval(control[:, place], seed) for place in (2, 3)]
    mean = table.mean(0).tolist()
    at_random = None if control is None else control.mean(0).tolist()
    return Response(
        group=group,
        factor=factor,
        token=token,
        role=role,
        n_prompts=len(own),
        n_nodes=mean[6],
        before=mean[0],
        after=mean[1],
        change=probability,
        logit_change=logit,
        control=by[0],
        control_logit=by[1],
        changed=mean[4],
        control_changed=None if at_random is None else at_random[4],
        kl=mean[5],
        control_kl=None if at_random is None else at_random[5],
    )


def _by_prompt(rows: Iterable[Mapping[str, Any]]) -> dict[int, list[list[Mapping[str, Any]]]]:
    """Each prompt's rows, by draw."""
    found: dict[int, dict[int, list[Mapping[str, Any]]]] = {}
    for row in rows:
        found.setdefault(row["prompt_id"], {}).setdefault(row["draw"], []).append(row)
    return {prompt: list(draws.values()) for prompt, draws in found.items()}


def _numbers(draws: Sequence[_Rows]) -> Tensor:
    """A prompt's probability before and after, its change and the logit's, whether the greedy token changed, KL and the
    number of nodes: means over draws."""
    each = []
    for rows in draws:
        before, after = (sum(row[f"probability_{when}"] for row in rows) for when in ("before", "after"))
        logit = sum(row["logit_after"] - row["logit_before"] for row in rows) / len(rows)
        one = rows[0]
        each.append([before, after, after - before, logit, float(one["changed"]), one["kl"], float(one["n_nodes"])])
    return torch.tensor(each, dtype=torch.double).mean(0)


def _interval(values: Tensor, seed: int) -> Interval:
    """The mean over prompts with its percentile bootstrap interval."""
    return statistics.resample(values, statistics.mean, seed=seed).interval()


def group_responses(rows: _Rows, seed: int = 0) -> list[GroupResponse]:
    """The rows of a table `schemas.STEERING_GROUPS` over prompts, in their order; prompts on which a group has no
    activation at all do not count.

    Args:
        seed: of the bootstrap.
    """
    by: dict[tuple[Any, ...], tuple[dict[int, list[float]], dict[int, list[float]]]] = {}
    for row in rows:
        if row["kept"] is not None:
            own, drawn = by.setdefault((row["group"], row["factor"], row["other"]), ({}, {}))
            (own if row["draw"] < 0 else drawn).setdefault(row["prompt_id"], []).append(row["kept"])
    return [
        GroupResponse(group, factor, other, len(own), _of(own, seed), _of(drawn, seed) if drawn else None)
        for (group, factor, other), (own, drawn) in by.items()
    ]


def _of(kept: Mapping[int, Sequence[float]], seed: int) -> Interval:
    means = [sum(values) / len(values) for values in kept.values()]
    return _interval(torch.tensor(means, dtype=torch.double), seed)
