"""What each supernode of a circuit is worth: the circuit without it, it alone, and the model without it.

Knows a circuit with groups, and test prompts. Refuses to know how groups came about, and how prompts are measured
(evaluation/testset.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tracer.attribution.exact import Progress
from tracer.choices import Ablation
from tracer.circuit.circuit import Circuit, Graph
from tracer.errors import JobError
from tracer.evaluation import statistics
from tracer.evaluation.faithfulness import How, asked_of, ready
from tracer.evaluation.statistics import Interval
from tracer.evaluation.testset import NEVER, Job, Ranks, TestSet
from tracer.model.named import AnyModel, model_of
from tracer.model.state import undisturbed
from tracer.prompts import Asked
from tracer.system import bars
from tracer.system.display import Shown


@dataclass(frozen=True, repr=False)
class Knockouts(Shown):
    """Shares of F(model) - F(empty), with intervals over the test prompts; one prompt alone has none.

    Attributes:
        names: of the groups. n_nodes: of each, the circuit's nodes.
        circuit: of the whole circuit, with everything outside it ablated.
        without: [group], of the circuit without the group. cost: `circuit` minus that: what the group is worth there.
        alone: [group], of the group with everything else ablated.
        left: [group], of the model with the group ablated.
    """

    names: tuple[str, ...]
    n_nodes: tuple[int, ...]
    circuit: Interval
    without: Interval
    cost: Interval
    alone: Interval
    left: Interval

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        values = {name: getattr(self, name).record() for name in ("circuit", "without", "cost", "alone", "left")}
        return {"names": list(self.names), "n_nodes": list(self.n_nodes)} | values

    def to_pandas(self) -> Any:
        """A pandas DataFrame with a row for each group: `name`, `n_nodes`, and `without`, `cost`, `alone` and `left`,
        each with its `_low` and `_high`."""
        import pandas

        return pandas.DataFrame(list(self.rows()))

    def rows(self) -> Iterator[dict[str, Any]]:
        """A row for each group, with the ends of the intervals."""
        record = self.record()
        for number, (name, size) in enumerate(zip(self.names, self.n_nodes, strict=True)):
            row: dict[str, Any] = {"name": name, "n_nodes": size}
            for column in ("without", "cost", "alone", "left"):
                ends = record[column]
                row |= {column: ends["estimate"][number]}
                row |= {f"{column}_{end}": ends[end][number] for end in ("low", "high")}
            yield row


@undisturbed()
def knockouts(
    model: AnyModel,
    circuit: Circuit,
    prompts: Asked | Sequence[Asked] | None = None,
    ablation: Ablation | str | None = None,
    *,
    reference: Sequence[Asked] | None = None,
    train: Sequence[Asked] = (),
    allow_overlap: bool = False,
    seed: int = 0,
    memory: int | None = None,
    progress: Progress | bool | None = None,
) -> Knockouts:
    """What each group of a circuit is worth, by ablation.

    Args:
        model: from `tracer.load`, or the name of a model (``"demo"``, a folder, a Hugging Face id), which is loaded and
            kept until a call names another.
        circuit: with its groups (`Graph.groups`).
        prompts: test prompts, all as long as the circuit's. They are asked what the circuit's metric asks: they need
            targets, and foils where it is a difference; a text alone asks about the circuit's own tokens. The circuit's
            own prompt if None, which shows what suffices there and nothing of other prompts.
        ablation: what nodes are set to: ``zero``; ``mean``, per position over `reference`; ``counterfactual``, the
            value on each prompt's counterfactual; ``resample``, the value on a random reference prompt. If None,
            ``mean`` on test prompts; on the circuit's own ``mean`` if there is a reference, else ``counterfactual`` if
            it has one, else ``zero``.
        reference: prompts behind ``mean`` and ``resample``, as long as the test prompts; the test prompts'
            counterfactuals if they all have one, else the test prompts themselves.
        train: prompts that the circuit was found on; one of them among the test prompts is an error, unless
            `allow_overlap`.
        allow_overlap: test on prompts of `train` as well.
        seed: of the resampled prompts and the intervals.
        memory: bytes one batch may use; by default a GiB, or a quarter of a GPU.
        progress: a bar appears on a terminal and in a notebook after half a second; False for none, or a function
            that is called with (done, total).

    Returns:
        Of each group what the circuit is worth without it, it alone, and the model without it.

    Raises:
        JobError: a circuit without groups, prompts that do not fit, or an ablation that changes nothing.
    """
    model, prompts = model_of(model), asked_of(circuit, prompts)
    check_grouped(circuit)
    how = How.of(reference, train, allow_overlap, seed=seed, memory=memory)
    test = ready(model, circuit, prompts, ablation, how)
    with bars.shown(progress, "leaving out each supernode") as report:
        return measured(test, circuit, seed, report)


def check_grouped(graph: Graph) -> None:
    """Refuse a circuit without groups of neurons, before a model is loaded.

    Raises:
        JobError: that, or a node that is in two groups.
    """
    neurons, seen = set(graph.neurons["node_id"].to_pylist()), set[int]()
    if not any(neurons & set(members) for members in graph.groups.values()):
        raise JobError("the circuit", "has no groups of neurons", "group it first: tracer group, tracer.supernodes")
    for name, members in graph.groups.items():
        if seen & set(members):
            raise JobError(f"group {name!r}", "shares a node with another group", "put each node into one")
        seen |= set(members)


def measured(test: TestSet, graph: Graph, seed: int, progress: Progress | None = None) -> Knockouts:
    """The same of test prompts that are ready, of a prompt's or a dataset's circuit; groups without neurons are left
    out.

    Args:
        seed: of the intervals.
    """
    neurons = {row["node_id"]: row for row in graph.neurons.to_pylist()}
    groups = {name: own for name, ids in graph.groups.items() if (own := [node for node in ids if node in neurons])}
    grouped = [node for own in groups.values() for node in own]
    order = [*grouped, *(node for node in neurons if node not in set(grouped))]
    ranks: Ranks = torch.full(test.shape, NEVER, dtype=torch.int32)
    for number, node in enumerate(order):
        row = neurons[node]
        where = slice(None) if row["position"] < 0 else row["position"]
        ranks[row["layer"], where, row["neuron"]] = number
    ends = torch.tensor([0, *map(len, groups.values())]).cumsum(0).tolist()
    spans = list(itertools.pairwise(ends))
    whole, rows, n = len(order), range(len(test.prompts)), len(spans)

    def jobs(row: int) -> Iterator[Job]:
        yield Job(row, ranks, whole, True)
        yield from (Job(row, ranks, whole, True, low, high - low) for low, high in spans)
        for stays in (True, False):
            yield from (
                Job(row, ranks, high, stays, 0, low) if low else Job(row, ranks, high, stays) for low, high in spans
            )

    full, empty, found = test.measure_with_ends([job for row in rows for job in jobs(row)], progress)
    every = torch.cat([empty[:, None], full[:, None], found.view(len(rows), 1 + 3 * n)], -1)
    shares = statistics.resample(every, _restored, seed=seed)
    parts = [shares.map(lambda values, i=i: values[..., 1 + i * n : 1 + (i + 1) * n]).interval() for i in range(3)]
    cost = shares.map(lambda values: values[..., :1] - values[..., 1 : 1 + n]).interval()
    return Knockouts(
        names=tuple(groups),
        n_nodes=tuple(map(len, groups.values())),
        circuit=shares.map(lambda values: values[..., 0]).interval(),
        without=parts[0],
        cost=cost,
        alone=parts[1],
        left=parts[2],
    )


def _restored(rows: torch.Tensor) -> statistics.Ratio:
    return statistics.restored(rows[..., 2:], rows[..., 0], rows[..., 1])
