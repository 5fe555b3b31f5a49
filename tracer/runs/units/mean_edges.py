"""The edges of a dataset's circuit: means over its prompts of all edges among its nodes, then pruned as a prompt's are.

The nodes are known once all units are done, so that every prompt is attributed again, with these nodes given. Sums are
left folds in the order of the prompts, in float64, kept after every shard: a stage that was stopped goes on, with the
same bits. Knows which of a prompt's nodes are one node of the circuit. Refuses to know how a prompt's edges are found
(attribution/among.py) and who asks.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from tracer.attribution.among import Links, links_among
from tracer.attribution.exact import Progress
from tracer.attribution.pruning import EdgeColumns, Pruned, Pruning, prune
from tracer.batching import chunked, chunked_alike
from tracer.circuit.from_run import length_of
from tracer.errors import TracerError
from tracer.model.model import Model
from tracer.prompts import Prompt, with_bos
from tracer.runs.jobs import DatasetJob
from tracer.runs.units import checkpoint
from tracer.runs.units.shards import as_prompt, options
from tracer.store.run_folder import RunFolder
from tracer.store.schemas import CIRCUIT_EDGES, CIRCUIT_NODES, FOIL, TARGET

MOST = 4096
"""Nodes of a prompt whose edges are found at a time; a circuit of more (of a free one: neurons times positions) takes
several passes over each prompt, for a pair of groups of its nodes each."""
LARGEST = 2048
"""Nodes of a circuit that has edges: the strongest of it."""
CHECKPOINT, KEPT_EVERY = "_journal/circuit_edges.safetensors", 10.0
"""What is summed so far, and the seconds after which it is written again."""
_BYTES = 2**28
"""What the edges of the prompts of one batch may take."""
_SELECTION = ("edges", "pruning", "profiles", "nodes", "threshold", "mass", "skip_first", "exclude")


@dataclass(frozen=True)
class Shape:
    """A dataset's circuit as rows and columns of a matrix. Sources are its neurons, then an embedding for each position
    (of a free one: for all); targets are its neurons, then the metric's target and foil.

    Attributes:
        nodes: (layer, position, neuron), the position being -1 in a free circuit. length: tokens of its prompts; -1.
        n_layers: of the model.
    """

    nodes: tuple[tuple[int, int, int], ...]
    length: int
    n_layers: int

    @property
    def n_embeddings(self) -> int:
        return max(1, self.length)

    @property
    def matrix(self) -> tuple[int, int]:
        """(targets, sources)."""
        return len(self.nodes) + 2, len(self.nodes) + self.n_embeddings

    def groups(self, n_tokens: int) -> list[range]:
        """The neurons in groups of which two are asked for at a time, on prompts of so many tokens; or all together."""
        each, every = n_tokens if self.length < 0 else 1, range(len(self.nodes))
        return [every] if len(every) * each <= MOST else chunked(every, max(1, MOST // (2 * each)))

    def prompts_at_once(self, n_tokens: int) -> int:
        """How many prompts' edges are held at a time."""
        targets, sources = self.matrix
        each = n_tokens if self.length < 0 else 1
        asked = min(MOST, len(self.nodes) * each) + n_tokens
        return max(1, _BYTES // (12 * asked * asked + 24 * targets * sources))


class OfPrompt:
    """One prompt's edges and nodes, as the circuit's: positions of a free one summed."""

    def __init__(self, shape: Shape) -> None:
        targets, sources = shape.matrix
        self.shape, self.position = shape, 0
        self.weight, self.moved, self.attribution = torch.zeros(3, targets, sources, dtype=torch.float64)
        self.values, self.incoming = torch.zeros(2, targets, dtype=torch.float64)
        self.nodes = torch.zeros(targets + shape.n_embeddings, dtype=torch.float64)

    def add(self, links: Links, mine: Sequence[int], first: range, second: range) -> None:
        """What a pass found whose nodes were `mine` of the circuit, the groups `first` and `second`: edges between the
        two, or within the one, then with embeddings and logits; those between these two with the first group."""
        n, found = len(self.shape.nodes), links.prompt
        neuron = torch.tensor(mine).repeat_interleave(len(found.nodes) // len(mine))
        at, weights = torch.arange(len(found.embeddings)), torch.tensor([weight for _, _, weight in found.terms])
        source = torch.cat([neuron, n + (at if self.shape.length >= 0 else torch.zeros_like(at))])
        foil = (weights < 0) & bool((weights > 0).any())  # all below 0 are a neuron's negative side
        target = torch.cat([neuron, n + foil.long()])
        keep = _wanted(self.shape, first, second)
        for total, part in (
            (self.weight, links.weight),
            (self.moved, links.moved),
            (self.attribution, links.attribution),
        ):
            rows = torch.zeros(total.shape[0], part.shape[1], dtype=torch.float64).index_add_(0, target, part.double())
            total.add_(keep * torch.zeros_like(total).index_add_(1, source, rows))
        if first != second:
            return
        for total, part in ((self.values, links.values), (self.incoming, links.incoming)):
            there = target < n if first.start else torch.ones_like(target, dtype=torch.bool)
            total.index_add_(0, target[there], part[there].double())
        self.nodes.index_add_(0, neuron, found.attributions.double())
        if not first.start:
            self.nodes.index_add_(0, source[len(neuron) :], found.embeddings.double())
            logits = links.values * links.gradients
            self.nodes.index_add_(0, target[len(neuron) :] + self.shape.n_embeddings, logits[len(neuron) :].double())
            self.position = max(place for place, _, _ in found.terms)


def _wanted(shape: Shape, first: range, second: range) -> Tensor:
    """Of which edges a pass over two groups is the one that counts, as a mask [target, source]."""
    n, (targets, sources) = len(shape.nodes), shape.matrix
    masks = []
    for group in (first, second):
        target, source = torch.zeros(targets, dtype=torch.bool), torch.zeros(sources, dtype=torch.bool)
        target[group.start : group.stop] = source[group.start : group.stop] = True
        masks.append((target, source))
    (target, source), (other_target, other_source) = masks
    if first != second:
        return (target[:, None] & other_source) | (other_target[:, None] & source)
    target[n:] = source[n:] = True
    kept = target[:, None] & source
    if first.start:
        kept[n:, n:] = False
    return kept


@dataclass
class Sums:
    """Means over prompts so far (Welford), in the order in which they were added.

    Attributes:
        n: prompts. next: the unit after those that are in. squares: of the edge attributions' distances from their
            mean, summed. position: the last where the metric is read. terms: whether any prompt had a target, a foil.
    """

    shape: Shape
    n: int = 0
    next: int = 0
    position: int = 0
    means: dict[str, Tensor] = field(default_factory=dict)
    squares: Tensor = field(default_factory=lambda: torch.zeros(()))

    NAMES = ("weight", "moved", "attribution", "values", "incoming", "nodes")

    def add(self, found: OfPrompt) -> None:
        """One prompt more."""
        self.n, self.position = self.n + 1, max(self.position, found.position)
        if not self.means:
            self.means = {name: torch.zeros_like(getattr(found, name)) for name in self.NAMES}
            self.squares = torch.zeros_like(found.attribution)
        before = found.attribution - self.means["attribution"]
        for name, mean in self.means.items():
            mean.add_((getattr(found, name) - mean) / self.n)
        self.squares += before * (found.attribution - self.means["attribution"])

    def save(self, folder: RunFolder, key: str) -> None:
        """Keep what is summed so far."""
        counts = torch.tensor([self.n, self.next, self.position])
        checkpoint.write(folder, CHECKPOINT, key, self.means | {"squares": self.squares, "counts": counts})

    @staticmethod
    def kept(folder: RunFolder, key: str, shape: Shape) -> Sums:
        """What an earlier call summed of the same circuit and prompts; nothing where that is not so, or damaged."""
        held = checkpoint.read(folder, CHECKPOINT, key) or {}
        try:
            means = {name: held[name] for name in Sums.NAMES}
            squares, (n, unit, position) = held["squares"], held["counts"].tolist()
        except (ValueError, KeyError, TypeError):
            return Sums(shape)
        if means["weight"].shape != shape.matrix:
            return Sums(shape)
        return Sums(shape, n, unit, position, means, squares)


def write_mean_edges(
    model: Model, job: DatasetJob, folder: RunFolder, max_bytes: int | None = None, progress: Progress | None = None
) -> None:
    """Write circuit_nodes.parquet and circuit_edges.parquet of a run whose circuit.parquet is there.

    Args:
        max_bytes: bytes one batch may use, as for the run's units; the model's own default if None.
        progress: called with (prompts done, all prompts).

    Raises:
        ModelError, RemoteError: as `tracer.trace`.
    """
    if not folder.place.exists("circuit.parquet"):
        return
    rows = folder.read_output("circuit.parquet").slice(0, LARGEST).to_pylist()
    if not rows:
        return
    length = -1 if job.circuit == "free" else length_of(folder, folder.commits())
    assert length is not None  # a circuit has prompts
    places = tuple((row["layer"], row["position"], row["neuron"]) for row in rows)
    shape = Shape(places, length, model.n_layers)
    key = _key(folder, shape, max_bytes)
    sums, due = Sums.kept(folder, key, shape), time.monotonic() + KEPT_EVERY
    for commit in folder.commits():
        if commit.shard < sums.next:
            continue
        for found in _of_unit(model, job, folder, commit, shape, max_bytes):
            sums.add(found)
            if progress is not None:
                progress(sums.n, rows[0]["n_prompts"])
        sums.next = commit.shard + 1
        if sums.n and time.monotonic() > due:
            sums.save(folder, key)
            due = time.monotonic() + KEPT_EVERY
    if not sums.n:
        return
    sums.save(folder, key)  # what follows, an evaluation say, may be stopped too
    nodes, edges = tables(sums, rows, job.pruning_rules() or Pruning())
    folder.write_table("circuit_nodes.parquet", nodes)
    folder.write_table("circuit_edges.parquet", edges)


def _key(folder: RunFolder, shape: Shape, max_bytes: int | None) -> str:
    """A hash of what decides the sums: the circuit, the units' tables, the batches' size."""
    units = [[commit.shard, commit.sha256.get("prompts")] for commit in folder.commits()]
    content = json.dumps([shape.nodes, shape.length, units, max_bytes, MOST, _BYTES])
    return hashlib.sha256(content.encode()).hexdigest()


def _of_unit(
    model: Model, job: DatasetJob, folder: RunFolder, commit: Any, shape: Shape, max_bytes: int | None
) -> Iterator[OfPrompt]:
    """Of every prompt of a unit that went well and is of the circuit's length, in batches of like length."""
    rows = folder.read_committed(commit, "prompts", ["prompt_id", "status", "token_ids"])
    lengths = {
        row["prompt_id"]: len(row["token_ids"])
        for row in rows.filter(pc.field("status") == "ok").to_pylist()
        if shape.length in (-1, len(row["token_ids"]))
    }
    asked = [
        (lengths[row["prompt_id"]], row["prompt_id"], _prompt(row, job))
        for row in folder.read_input(commit.shard)
        if row["prompt_id"] in lengths
    ]
    asked.sort(key=lambda one: (one[2].foil is not None, *one[:2]))
    most = shape.prompts_at_once(max(lengths.values(), default=1))
    how = {name: value for name, value in options(job).items() if name not in _SELECTION}
    for part in chunked_alike(asked, most, lambda one: (one[2].foil is not None, one[0])):
        try:
            yield from _of_batch(
                model, [prompt for *_, prompt in part], part[0][0], shape, job, how | {"memory": max_bytes}
            )
        except TracerError as error:
            where = f"the edges of the circuit, prompts {part[0][1]} to {part[-1][1]}"
            raise type(error)(f"{where}: {error.value}", error.rule, error.next_step) from error


def _prompt(row: dict[str, Any], job: DatasetJob) -> Prompt:
    return with_bos(as_prompt(row, job.asks, paired=job.baseline == "counterfactual"), job.bos)


def _of_batch(
    model: Model, prompts: Sequence[Prompt], n_tokens: int, shape: Shape, job: DatasetJob, how: dict[str, Any]
) -> list[OfPrompt]:
    """Of prompts of one length, in as many passes as their nodes take."""
    found, groups = [OfPrompt(shape) for _ in prompts], shape.groups(n_tokens)
    for number, first in enumerate(groups):
        for second in groups[number:]:
            mine = [*first] if first == second else [*first, *second]
            nodes = [shape.nodes[place] for place in mine]
            skip = job.skip_first and shape.length < 0
            for one, links in zip(found, links_among(model, prompts, nodes, skip_first=skip, **how), strict=True):
                one.add(links, mine, first, second)
    return found


# --------------------------------------------------------------------------------------------------- tables


def tables(sums: Sums, neurons: Sequence[dict[str, Any]], rules: Pruning) -> tuple[pa.Table, pa.Table]:
    """The circuit's nodes and edges, pruned by the mean.

    Args:
        neurons: their rows in circuit.parquet.
    """
    means, n, between = sums.means, len(sums.shape.nodes), sums.shape.n_embeddings
    row, source = ((means["weight"] != 0) | (means["moved"] != 0)).nonzero(as_tuple=True)
    target = torch.where(row < n, row, row + between)
    values, incoming = (_with_embeddings(means[name], n, between) for name in ("values", "incoming"))
    weight, moved, attribution = (means[name][row, source] for name in ("weight", "moved", "attribution"))
    share = torch.where(values[target] == 0, torch.nan, weight / values[target])
    whole = EdgeColumns(source, target, *(part.float() for part in (weight, share, attribution, moved)))
    is_neuron, is_logit = torch.arange(len(values)) < n, torch.arange(len(values)) >= n + between
    by_flow = None if torch.equal(moved, weight) else values.float()
    left = prune(whole, is_neuron, is_logit.float(), incoming.float(), rules, by_flow)
    nodes = _nodes_table(sums, left, neurons, values, incoming)
    return nodes, _edges_table(sums, left)


def _with_embeddings(of_targets: Tensor, n: int, between: int) -> Tensor:
    """Numbers of the targets as numbers of all nodes; embeddings have none."""
    return torch.cat([of_targets[:n], torch.zeros(between, dtype=of_targets.dtype), of_targets[n:]])


def _nodes_table(
    sums: Sums, left: Pruned, neurons: Sequence[dict[str, Any]], values: Tensor, incoming: Tensor
) -> pa.Table:
    shape, kept = sums.shape, left.nodes.tolist()
    embeddings = [("embedding", -1, -1 if shape.length < 0 else at, -1) for at in range(shape.n_embeddings)]
    at = -1 if shape.length < 0 else sums.position
    logits = [("logit", shape.n_layers, at, name) for name in (TARGET, FOIL)]
    places = [*(("neuron", *place) for place in shape.nodes), *embeddings, *logits]
    if not float(values[-1]):  # no prompt has a foil; its node is the last one, without edges
        kept = [number for number in kept if number < len(places) - 1]
    bias = (1 - incoming / values).tolist()
    has_value = [kind != "embedding" and bool(values[number]) for number, (kind, *_) in enumerate(places)]
    rows = [
        {
            "node_id": number,
            **dict(zip(("kind", "layer", "position", "neuron"), places[old], strict=True)),
            "mean_activation": None if places[old][0] == "embedding" else float(values[old]),
            "expert": neurons[old]["expert"] if old < len(neurons) else None,
            "mean_attribution": neurons[old]["mean_attribution"]
            if old < len(neurons)
            else float(sums.means["nodes"][old]),
            "explained": None if math.isnan(explained) else explained,
            "influence": influence,
            "bias_share": bias[old] if has_value[old] else None,
            "n_prompts": sums.n,
        }
        for number, (old, explained, influence) in enumerate(
            zip(kept, left.explained.tolist(), left.influence.tolist(), strict=False)
        )
    ]
    return pa.Table.from_pylist(rows, CIRCUIT_NODES)


def _edges_table(sums: Sums, left: Pruned) -> pa.Table:
    n, between = len(sums.shape.nodes), sums.shape.n_embeddings
    source, target = left.nodes[left.edges.source], left.nodes[left.edges.target]
    row = torch.where(target < n, target, target - between)
    weight, attribution = sums.means["weight"][row, source], sums.means["attribution"][row, source]
    value, squares = sums.means["values"][row], sums.squares[row, source]
    error = (squares / max(1, sums.n - 1) / sums.n).sqrt() if sums.n > 1 else torch.full_like(squares, torch.nan)
    columns = {
        "source": left.edges.source,
        "target": left.edges.target,
        "mean_weight": weight,
        "share": torch.where(value == 0, torch.nan, weight / value),
        "mean_attribution": attribution,
        "standard_error": error,
        "n_prompts": torch.full_like(source, sums.n),
    }
    return pa.table(
        {one.name: pa.array(columns[one.name].numpy(), one.type, from_pandas=True) for one in CIRCUIT_EDGES},
        CIRCUIT_EDGES,
    )
