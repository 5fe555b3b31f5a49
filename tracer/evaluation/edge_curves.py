"""What is left of a circuit when its weakest edges go: its nodes, and what they do (the paper's section 2.5).

Knows which nodes keep a way from an embedding to a logit, and how their sets become curves beside the ranking by
attribution. Refuses to know how edges were found and how prompts are measured (evaluation/testset.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tracer.attribution.exact import Progress
from tracer.choices import Ablation
from tracer.circuit.circuit import ENDS, Circuit, Graph
from tracer.errors import JobError, quoted
from tracer.evaluation.curves import Curves, Evaluation, columns, control, count_nodes, measure
from tracer.evaluation.faithfulness import How, asked_of, ready
from tracer.evaluation.testset import NEVER, Ranks, TestSet
from tracer.model.named import AnyModel, model_of
from tracer.model.state import undisturbed
from tracer.prompts import Asked
from tracer.system import bars
from tracer.system.display import Plotted

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
"""Of all edges, strongest |attribution| first."""
_CURVES = ("faithfulness", "completeness", "control_faithfulness")


@dataclass(frozen=True, repr=False)
class EdgeCurves(Plotted):
    """A circuit by how many of its edges are kept.

    Attributes:
        shares: of all edges, strongest ``|attribution|`` first, rising. n_edges: kept of them.
        n_nodes: neurons that lie on a path of kept edges from an embedding to a logit.
        by_edges: the curves of these sets of neurons, by their size; `sizes` are the different `n_nodes` above 0.
        by_attribution: of as many neurons, strongest attribution first.
    """

    shares: tuple[float, ...]
    n_edges: tuple[int, ...]
    n_nodes: tuple[int, ...]
    by_edges: Curves
    by_attribution: Curves

    def rows(self) -> Iterator[dict[str, Any]]:
        """The curves as a table, a row per share of edges; null where no neuron is left."""
        both = (("", self.by_edges.record()), ("attribution_", self.by_attribution.record()))
        for share, n_edges, n_nodes in zip(self.shares, self.n_edges, self.n_nodes, strict=True):
            row: dict[str, Any] = {"share": share, "n_edges": n_edges, "n_nodes": n_nodes}
            at = self.by_edges.sizes.index(n_nodes) if n_nodes else None
            for prefix, record in both:
                for name in ("faithfulness", "completeness", "control"):
                    ends = {end: None if at is None else values[at] for end, values in record[name].items()}
                    row |= columns(prefix + name, ends)
            yield row

    @staticmethod
    def of(record: Mapping[str, Any]) -> EdgeCurves:
        """Edge curves from their `record`."""
        named = {name: tuple(record[name]) for name in ("shares", "n_edges", "n_nodes")}
        return EdgeCurves(
            **named, by_edges=Curves.of(record["by_edges"]), by_attribution=Curves.of(record["by_attribution"])
        )

    def to_pandas(self) -> Any:
        """The curves as a pandas DataFrame, a row per share of edges: `share`, `n_edges`, `n_nodes`; then, each with
        its `_low` and `_high`, `faithfulness`, `completeness` and `control` (random nodes) of what the edges leave, and
        with `attribution_` before them those of as many of the strongest neurons."""
        import pandas

        return pandas.DataFrame(list(self.rows()))

    def record(self) -> dict[str, Any]:
        """As files hold it."""
        named = {name: list(getattr(self, name)) for name in ("shares", "n_edges", "n_nodes")}
        return named | {"by_edges": self.by_edges.record(), "by_attribution": self.by_attribution.record()}


@undisturbed()
def edge_curves(
    model: AnyModel,
    circuit: Circuit,
    prompts: Asked | Sequence[Asked] | None = None,
    ablation: Ablation | str | None = None,
    shares: Sequence[float] | None = None,
    *,
    reference: Sequence[Asked] | None = None,
    train: Sequence[Asked] = (),
    allow_overlap: bool = False,
    seed: int = 0,
    memory: int | None = None,
    progress: Progress | bool | None = None,
) -> EdgeCurves:
    """Faithfulness and completeness of what is left of a circuit when only its strongest edges are kept, and with them
    the neurons that still lie on a path from an embedding to a logit.

    Args:
        model: from `tracer.load`, or the name of a model (``"demo"``, a folder, a Hugging Face id), which is loaded and
            kept until a call names another.
        circuit: with its edges.
        prompts: test prompts, all as long as the circuit's. They are asked what the circuit's metric asks: they need
            targets, and foils where it is a difference; a text alone asks about the circuit's own tokens. The circuit's
            own prompt if None, which shows what suffices there and nothing of other prompts.
        ablation: what nodes are set to: ``zero``; ``mean``, per position over `reference`; ``counterfactual``, the
            value on each prompt's counterfactual; ``resample``, the value on a random reference prompt. If None,
            ``mean`` on test prompts; on the circuit's own ``mean`` if there is a reference, else ``counterfactual`` if
            it has one, else ``zero``.
        shares: of the circuit's edges that are kept, strongest ``|attribution|`` first, rising, above 0 and at most 1;
            from 1 % to all if None.
        reference: prompts behind ``mean`` and ``resample``, as long as the test prompts; the test prompts'
            counterfactuals if they all have one, else the test prompts themselves.
        train: prompts that the circuit was found on; one of them among the test prompts is an error, unless
            `allow_overlap`.
        allow_overlap: test on prompts of `train` as well.
        seed: of the random control, the resampled prompts and the intervals.
        memory: bytes one batch may use; by default a GiB, or a quarter of a GPU.
        progress: a bar appears on a terminal and in a notebook after half a second; False for none, or a function
            that is called with (done, total).

    Returns:
        The curves by how many edges are kept, beside as many of the strongest neurons; `EdgeCurves.plot` draws them.

    Raises:
        JobError: prompts that do not fit, an ablation that changes nothing, a circuit without edges, or none of them on
            a path; shares out of range.

    Source: Arora et al. 2026 (arXiv 2601.22594), section 2.5.
    """
    model, prompts = model_of(model), asked_of(circuit, prompts)
    left = surviving(circuit, shares)
    how = How.of(reference, train, allow_overlap, seed=seed, memory=memory)
    test = ready(model, circuit, prompts, ablation, how)
    with bars.shown(progress, "keeping the strongest edges") as report:
        return measured(test, circuit, left, seed, report)


@dataclass(frozen=True)
class Left:
    """What a share of the edges leaves: how many they are, and the `node_id` of each neuron on a path."""

    share: float
    n_edges: int
    nodes: tuple[int, ...]


def surviving(graph: Graph, shares: Sequence[float] | None = None) -> list[Left]:
    """What each share of a graph's edges leaves of its neurons; each holds what a smaller one does.

    Raises:
        JobError: no edges, or none of them on a path; shares out of range.
    """
    shares = SHARES if shares is None else tuple(shares)
    if not shares or list(shares) != sorted({*shares}) or not 0 < shares[0] <= shares[-1] <= 1:
        raise JobError(
            f"shares={quoted(list(shares))}", "must rise from above 0 to at most 1", "0.01, 0.1, 1 are usual"
        )
    if graph.links is None:
        raise graph.without_edges("trace it again with edges (the default)", ", and these curves are of edges")
    strength = [abs(value) if value is not None else 0.0 for value in graph.links["attribution"].to_pylist()]
    order = sorted(range(len(strength)), key=lambda edge: -strength[edge])
    ends = list(zip(graph.links["source"].to_pylist(), graph.links["target"].to_pylist(), strict=True))
    left = []
    for share in shares:
        count = math.ceil(share * len(order) - 1e-9)
        left.append(Left(share, count, on_paths(graph, [ends[edge] for edge in order[:count]])))
    if not left[-1].nodes:
        rule = "no neuron lies on a path of them from an embedding to a logit"
        raise JobError(f"{graph.n_edges:,} edges", rule, "trace it with more nodes, or prune fewer edges")
    return left


def on_paths(graph: Graph, edges: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """The neurons that an embedding reaches by these edges, and that reach a logit, strongest first."""
    kinds = graph.nodes["kind"].to_pylist()
    forward, back = dict[int, list[int]](), dict[int, list[int]]()
    for source, target in edges:
        forward.setdefault(source, []).append(target)
        back.setdefault(target, []).append(source)
    down = _reached(forward, [node for node, kind in enumerate(kinds) if kind == "embedding"])
    up = _reached(back, [node for node, kind in enumerate(kinds) if kind in ENDS])
    return tuple(node for node in sorted(down & up) if kinds[node] == "neuron")


def _reached(steps: dict[int, list[int]], starts: Sequence[int]) -> set[int]:
    seen, waiting = set(starts), list(starts)
    while waiting:
        for node in steps.get(waiting.pop(), ()):
            if node not in seen:
                seen.add(node)
                waiting.append(node)
    return seen


def measured(
    test: TestSet, graph: Graph, left: Sequence[Left], seed: int, progress: Progress | None = None
) -> EdgeCurves:
    """The curves of what is `left` on test prompts. A node at position -1 is its neuron at every position.

    Args:
        left: from `surviving`.
    """
    test = test if test.known is not None else test.with_known_ends()
    sizes = sorted({len(one.nodes) for one in left} - {0})
    by_edges = list(dict.fromkeys(node for one in left for node in one.nodes))
    by_attribution = graph.neurons["node_id"].to_pylist()
    found = [_curves(test, graph, order, sizes, seed, progress) for order in (by_edges, by_attribution)]
    return EdgeCurves(
        tuple(one.share for one in left),
        tuple(one.n_edges for one in left),
        tuple(len(one.nodes) for one in left),
        *found,
    )


def _curves(
    test: TestSet, graph: Graph, order: Sequence[int], sizes: Sequence[int], seed: int, progress: Progress | None
) -> Evaluation:
    """The curves of the first so many of the nodes in an order."""
    ranks = _ranks(test, graph, order)
    others, total = control(ranks, seed, test.there), count_nodes(ranks, test.there)
    return measure(test, ranks, others, sizes, total, seed, progress=progress)


def _ranks(test: TestSet, graph: Graph, order: Sequence[int]) -> Ranks:
    """Each node's place in an order of node_ids, from 0."""
    ranks = torch.full(test.shape, NEVER, dtype=torch.int32)
    layer, position, neuron = (graph.nodes[name].to_pylist() for name in ("layer", "position", "neuron"))
    for place, node in enumerate(order):
        at = slice(None) if position[node] < 0 else position[node]
        ranks[layer[node], at, neuron[node]] = place
    return ranks
