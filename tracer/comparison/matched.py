"""Nodes and prompts of several sides brought together: which are the same, and the numbers of each.

Knows keys (layer, position, neuron), where -1 stands for all positions. Refuses to know intervals and tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tracer.attribution.selection import select
from tracer.comparison.differences import Array
from tracer.comparison.sides import Asked, Side


@dataclass(frozen=True, eq=False)
class Pairing:
    """The prompts of two sides that are compared.

    Attributes:
        one, other: their numbers. by: ``id`` or ``text``, by which they are the same and stand in the same order; None
            where no two are.
        notes: what should be known of it, a sentence each.
    """

    one: Array
    other: Array
    by: str | None
    notes: tuple[str, ...] = ()

    @property
    def paired(self) -> bool:
        """Whether prompt i of one is prompt i of the other."""
        return self.by is not None


def paired(one: Side, other: Side) -> Pairing:
    """Prompts matched by the user's ids where both have them, else by their text or tokens; all of both, unmatched,
    where no two are the same."""
    for by, name in (("id", _ids), ("text", _texts)):
        mine, its = name(one.prompts), name(other.prompts)
        if mine is None or its is None or not (shared := [key for key in mine if key in its]):
            continue
        rows = np.array([mine[key] for key in shared]), np.array([its[key] for key in shared])
        return Pairing(*rows, by, tuple(_said(one, other, rows, by)))
    said = f"{one.name} and {other.name} have no prompt in common: they are compared as two samples"
    alone = len(one.prompts) == len(other.prompts) == 1
    if alone:
        said = f"{one.name} and {other.name} are of different prompts"
    return Pairing(np.arange(len(one.prompts)), np.arange(len(other.prompts)), None, (said,))


def _ids(prompts: Sequence[Asked]) -> dict[object, int] | None:
    """Prompts by the user's id; None where one lacks it or two share it."""
    found: dict[object, int] = {asked.id: at for at, asked in enumerate(prompts) if asked.id is not None}
    return found if len(found) == len(prompts) else None


def _texts(prompts: Sequence[Asked]) -> dict[object, int]:
    """Prompts by what they are; one that comes several times by which time it is."""
    found, seen = dict[object, int](), dict[object, int]()
    for at, asked in enumerate(prompts):
        key = asked.token_ids or asked.text
        seen[key] = seen.get(key, -1) + 1
        found[key, seen[key]] = at
    return found


def _said(one: Side, other: Side, rows: tuple[Array, Array], by: str) -> list[str]:
    said = []
    for side, mine in ((one, rows[0]), (other, rows[1])):
        if left := len(side.prompts) - len(mine):
            said.append(f"{left:,} of {len(side.prompts):,} prompts of {side.name} are not of both: left out")
    differ = sum(one.prompts[mine].token_ids != other.prompts[its].token_ids for mine, its in zip(*rows, strict=True))
    if by == "id" and differ:
        said.append(f"{differ:,} of {len(rows[0]):,} prompts of the same id have other texts in {other.name}")
    return said


def union(parts: Sequence[Array]) -> Array:
    """The keys [key, 3] of all parts, each once, in order."""
    return np.unique(np.concatenate([np.empty((0, 3), np.int64), *parts]), axis=0)


def index_of(keys: Array, wanted: Array) -> Array:
    """Where `wanted` keys are among sorted `keys`; -1 for one that is not there."""
    if not len(keys):
        return np.full(len(wanted), -1)
    codes, mine = _coded(keys), _coded(wanted)
    at = np.minimum(np.searchsorted(codes, mine), len(codes) - 1)
    return np.where(codes[at] == mine, at, -1)


def _coded(keys: Array) -> Array:
    """One number for each key, in their order: 15 bits for the layer, 20 for the position, 28 for the neuron."""
    layer, position, neuron = keys.T
    return (layer << 48) | ((position + 1) << 28) | neuron


def values_at(side: Side, keys: Array, positions: bool) -> Array:
    """The side's attributions at these keys [prompt, key], float64; where only nodes that are kept are known, 0 for
    others."""
    found = np.zeros((len(side.prompts), len(keys)))
    if side.knows_all(positions) and side.parts is not None:
        layer, position, neuron = keys.T
        for rows, part in side.parts():
            found[rows] = part[:, layer, position if positions else 0, neuron]
        return found
    at = index_of(keys, side.kept.keys(positions))
    there = at >= 0
    np.add.at(found, (side.kept.prompt[there], at[there]), side.kept.attribution[there])
    return found


def counts_at(side: Side, keys: Array, positions: bool) -> tuple[Array, Array]:
    """How many prompts of a side keep each key, and the mean value of the node where it is kept (NaN of none)."""
    at = index_of(keys, side.kept.keys(positions))
    there = at >= 0
    once = np.unique(np.stack([side.kept.prompt[there], at[there]], axis=1), axis=0)
    n_prompts = np.bincount(once[:, 1], minlength=len(keys))
    rows = np.bincount(at[there], minlength=len(keys))
    total = np.bincount(at[there], weights=side.kept.activation[there], minlength=len(keys))
    return n_prompts, np.divide(total, rows, out=np.full(len(keys), math.nan), where=rows > 0)


def mean_of_all(side: Side, prompts: Array, positions: bool) -> Array | None:
    """The mean attribution of every neuron over these prompts [layer, position, neuron], float64; None where only
    nodes that are kept are known."""
    if not side.knows_all(positions) or side.parts is None:
        return None
    chosen, total = np.isin(np.arange(len(side.prompts)), prompts), None
    for rows, part in side.parts():
        mine = part[chosen[rows]].astype(np.float64)
        total = mine.sum(0) if total is None else total + mine.sum(0)
    return None if total is None else total / len(prompts)


def circuit_of(side: Side, prompts: Array, positions: bool) -> Array:
    """The keys [key, 3] of a side's circuit: of one prompt what it keeps; of several what the side's own rule keeps of
    the mean attributions, all neurons' where these are known, else those of kept nodes."""
    kept = side.kept.of(prompts)
    keys = union([kept.keys(positions)])
    if side.rule is None or len(prompts) == 1 or not len(keys):
        return keys
    mean = mean_of_all(side, prompts, positions)
    metric = float(np.mean([side.prompts[at].metric for at in prompts]))
    rule = {"nodes": side.rule.limit, "threshold": side.rule.threshold, "mass": side.rule.mass}
    if mean is None:
        rule["mass"] = None  # of all nodes, of which only some are known here
        if rule["nodes"] is None and rule["threshold"] is None:
            return keys
        at, shape = np.maximum(keys, 0), (side.n_layers, int(max(keys[:, 1].max(), 0)) + 1, int(keys[:, 2].max()) + 1)
        mean = np.zeros(shape)
        mean[tuple(at.T)] = values_at(side, keys, positions)[prompts].mean(0)
    found = select(torch.from_numpy(mean).float(), metric, **rule).numpy().astype(np.int64)
    if not positions:
        found[:, 1] = -1
    return union([found])
