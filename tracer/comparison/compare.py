"""The public call `compare`: sides in, what differs between them out, as tables.

Knows how sides that are given become sides that are compared, and what is said of the first and the last of them, of
each and the one before, and of every node over all. Refuses to know how that is shown.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from tracer.circuit import supernodes_file
from tracer.circuit.circuit import Graph
from tracer.circuit.supernodes_file import Supernodes
from tracer.comparison import sides as sources
from tracer.comparison.differences import (
    PERMUTATIONS,
    RATE,
    Array,
    Design,
    Differences,
    differences,
    interval,
    overlap,
    pearson,
    spearman,
    weighted_overlap,
)
from tracer.comparison.matched import Pairing, circuit_of, counts_at, index_of, mean_of_all, paired, union, values_at
from tracer.comparison.sides import Side
from tracer.errors import JobError, option, quoted
from tracer.evaluation.statistics import Interval, resampled_means
from tracer.experts import DENSE, Numbering
from tracer.model.model import Model
from tracer.prompts import Asked, Prompt, as_prompts
from tracer.store import one_prompt
from tracer.store.parquet import table_of
from tracer.store.run_folder import RunFolder
from tracer.store.schemas import COMPARED, COMPARISON, COURSES
from tracer.system import bars
from tracer.system.display import Plotted

APPEARED, VANISHED, SIGN, BOTH, NEITHER = "appeared", "vanished", "sign", "both", "neither"
CHANGES = (APPEARED, VANISHED, SIGN, BOTH, NEITHER)
FILES = {"nodes": "comparison", "sides": "compared", "courses": "courses"}
"""The tables of a comparison, and the names of their files."""


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Plotted):
    """What differs between sides, of which there are two or more.

    Attributes:
        names: of the sides, in their order.
        nodes: Arrow table: the first and the last side, node by node.
        sides: Arrow table: each side, and what it has in common with the one before.
        courses: Arrow table: every node of any circuit, over all sides.
        metric: last minus first, of the mean metric over prompts, with its interval.
        n_prompts: of the first and the last side that are compared. by: ``id`` or ``text`` where prompts are the same
            and differences are of the same prompt; None where they are two samples.
        n_tested: nodes that were tested. every: whether every neuron's attribution is known, not only kept ones'.
        positions: whether nodes are matched at their positions. design: of the tests.
        notes: what whoever reads it should know, a sentence each.
        graphs: of the first and the last side, where there are any. n_layers: of the model. numbering: of its neurons.
    """

    names: tuple[str, ...]
    nodes: pa.Table
    sides: pa.Table
    courses: pa.Table
    metric: Interval
    n_prompts: tuple[int, int]
    by: str | None
    n_tested: int
    every: bool
    positions: bool
    design: Design
    notes: tuple[str, ...]
    graphs: tuple[Graph | None, Graph | None]
    n_layers: int
    numbering: Numbering = DENSE

    @property
    def found(self) -> int:
        """Nodes whose attribution differs at a false discovery rate of `RATE`."""
        return sum(q is not None and q <= RATE for q in self.nodes["q"].to_pylist())

    @property
    def counts(self) -> dict[str, int]:
        """Nodes by their change."""
        changes = self.nodes["change"].to_pylist()
        return {name: changes.count(name) for name in CHANGES}

    def to_pandas(self) -> Any:
        """The table `nodes` as a pandas DataFrame, the largest difference first: `layer`, `position` (-1: any),
        `neuron`, `expert`, `change`, `attribution_first` and `attribution_last` (metric units), `difference` with its
        `low` and `high`, `p`, `q`, and of each side the prompts that keep the node and its mean activation."""
        return self.nodes.to_pandas()

    def tables(self) -> dict[str, pa.Table]:
        """Its tables, by the names of their files."""
        return {file: getattr(self, name) for name, file in FILES.items()}


def compare(
    *sides: Any,
    prompts: Sequence[Asked] | None = None,
    names: Sequence[str] | None = None,
    positions: bool = False,
    groups: Any = None,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
    progress: bars.Report | bool | None = None,
    **how: Any,
) -> Comparison:
    """What differs between circuits: of two models, checkpoints, adapters or sets of prompts, or of more of them in
    their order, such as the checkpoints of a training.

    Nodes are the same neuron of the same layer, so that all sides must have one architecture. Of each the mean
    attribution over prompts is compared, the first side with the last: with a 95 % interval over prompts, and a
    permutation test whose p-values become q (Benjamini and Hochberg) over all nodes that a prompt of either side keeps.
    Prompts that are on both sides, by the user's id or by their text, are compared pair by pair. A node is in the
    circuit of a side if the side's own rule (`nodes`, `threshold`, `mass`) keeps it of the mean attributions; of a
    single prompt, if its circuit has it.

        tracer.compare("runs/before", "runs/after")             # folders of runs, of one prompt or of many
        tracer.compare(circuit, other)                          # circuits
        tracer.compare(base, tuned, prompts)                    # models; a last list is the prompts
        tracer.compare((model, prompts), (model, others))       # sets of prompts on one model

    Args:
        sides: two or more: run folders, runs, circuits, models, or pairs of a model and its prompts. A run over
            revisions stands for all of them.
        prompts: of the models.
        names: of the sides; by default what tells them apart.
        positions: match nodes at their positions too, which takes prompts of one length.
        groups: supernodes whose summed attribution is followed over the sides: a file supernodes.json, or what
            `tracer.supernodes` returns.
        permutations, seed: of the tests, and of the intervals' resamples.
        progress: a bar appears on a terminal and in a notebook after half a second; False for none, or a function
            that is called with (done, total), of each model.
        how: arguments of `tracer.trace` for models, such as `nodes`, `metric`; edges are traced by default of a single
            prompt alone.

    Returns:
        What differs, as tables; `Comparison.plot` draws the nodes that differ most.

    Raises:
        JobError: other architectures, tokenizers, bases or metrics; sides or prompts that are missing; a setting.
        RunError: no run there, or a damaged one. ModelError, RemoteError: a model cannot be traced.
    """
    design = Design(permutations, seed)
    design.check()
    if sides and prompts is None and _are_prompts(sides[-1]):
        *rest, prompts = sides
        sides = tuple(rest)
    given = [one for side in sides for one in _expanded(side)]
    asks_models = any(isinstance(side, Model | tuple) for side in given)
    if how and not asks_models:
        name = next(iter(how))
        raise JobError(option(name, how[name]), "only has an effect on models, which are traced now", "leave it out")
    if prompts is not None and not any(isinstance(side, Model) for side in given):
        raise JobError("prompts", "only have an effect on models, which are asked them", "leave them out")
    if names is not None and len(names) != len(given):
        raise JobError(f"names={quoted(list(names))}", f"there are {len(given)} sides", "name each")
    told = list(names) if names is not None else apart([_name(side) for side in given])
    with bars.shown(progress, "tracing") as report:
        made = [
            _side(side, name, prompts, positions=positions, progress=report, **how)
            for side, name in zip(given, told, strict=True)
        ]
    return compared(made, positions=positions, groups=groups, design=design)


def _are_prompts(given: Any) -> bool:
    """Whether a last argument is the prompts: a list of them, and not a model with its own."""
    is_list = isinstance(given, list | tuple) and bool(given) and not isinstance(given[0], Model)
    return is_list and all(isinstance(one, Prompt | str) for one in given)


def _expanded(side: Any) -> Iterator[Any]:
    """A side, or the parts of a run over revisions."""
    address = getattr(side, "address", side)
    if isinstance(address, str | PurePath) and (parts := parts_of(address)):
        yield from parts
    else:
        yield address if isinstance(address, str | PurePath) else side


def parts_of(address: Any) -> list[str]:
    """The folders of a run over revisions, in their order; none where it is another run."""
    record = one_prompt.read_record(address)
    if record.get("kind") != "revisions":
        return []
    folder = RunFolder(address)
    return [folder.part(name) for name in record["parts"]]


def _name(side: Any) -> str:
    if isinstance(side, tuple):
        return _name(side[0])
    if isinstance(side, Model):
        record = side.record()
        return model_name(record.name, record.revision, record.adapter)
    if isinstance(side, Graph):
        return side.text or "graph"
    return str(side)


def model_name(name: str, revision: str | None, adapter: str | None) -> str:
    """What a side of a model is called."""
    return "/".join([name, *([f"@{revision}"] if revision else []), *([f"+{adapter}"] if adapter else [])])


def apart(names: Sequence[str]) -> list[str]:
    """Names by which sides are told apart: the last parts of paths, as many as it takes, and numbers where that does
    not help."""
    split = [name.rstrip("/").split("/") for name in names]
    for count in range(1, max(map(len, split), default=1) + 1):
        short = ["/".join(parts[-count:]) for parts in split]
        if len(set(short)) == len(short):
            return short
    return [f"{parts[-1]} ({number})" for number, parts in enumerate(split, 1)]


def _side(side: Any, name: str, prompts: Sequence[Prompt | str] | None, **how: Any) -> Side:
    if isinstance(side, Model | tuple):
        model, asked = side if isinstance(side, tuple) else (side, prompts)
        if not isinstance(model, Model) or not asked:
            step = "give them: compare(model, other, prompts), or (model, prompts) as a side"
            raise JobError(f"side {quoted(name)}", "is a model without prompts", step)
        asked = as_prompts(asked)
        options: dict[str, Any] = {"edges": None if len(asked) == 1 else False} | how
        return sources.of_model(model, asked, name, **options)
    if isinstance(side, Graph):
        return sources.of_graph(side, name)
    if isinstance(side, str | Path | PurePath):
        return sources.of_run(side, name)
    step = "give a run folder, a circuit, a model, or (model, prompts)"
    raise JobError(f"side {quoted(side)}", f"is a {type(side).__name__}, which cannot be compared", step)


# ------------------------------------------------------------------------------------------------ what differs


def compared(
    sides: Sequence[Side], *, positions: bool = False, groups: Any = None, design: Design | None = None
) -> Comparison:
    """What differs between sides that are there already; as `compare`."""
    design = design or Design()
    design.check()
    if len(sides) < 2:
        step = "name one more: a run, a circuit, a model"
        raise JobError(f"{len(sides)} side{'s' * (len(sides) != 1)}", "a comparison is of two or more", step)
    notes = sources.check_alike(sides, positions)
    first, last = sides[0], sides[-1]
    pairs = paired(first, last)
    found = _Found(sides, positions)
    table, n_tested = _nodes(first, last, pairs, positions, design)
    numbering = next((side.numbering for side in sides if side.numbering), DENSE)
    every = all(side.knows_all(positions) for side in sides)
    notes += [note for one, other in itertools.pairwise(sides) for note in paired(one, other).notes]
    notes += pairs.notes if len(sides) > 2 else ()
    one, other = (_metrics(side, rows) for side, rows in ((first, pairs.one), (last, pairs.other)))
    return Comparison(
        names=tuple(side.name for side in sides),
        nodes=_with_experts(table, numbering),
        sides=_compared(found, design),
        courses=_with_experts(
            _courses(found, _groups(groups, first.n_layers, positions, numbering), design), numbering
        ),
        metric=interval(one, other, pairs.paired, design.seed) if _known(one, other) else _NO_INTERVAL,
        n_prompts=(len(pairs.one), len(pairs.other)),
        by=pairs.by,
        n_tested=n_tested,
        every=every,
        positions=positions,
        design=design,
        notes=tuple(dict.fromkeys([*notes, *([] if every else [_only_kept(sides, positions)])])),
        graphs=(first.graph, last.graph),
        n_layers=first.n_layers,
        numbering=numbering,
    )


def _only_kept(sides: Sequence[Side], positions: bool) -> str:
    lacking = [side.name for side in sides if not side.knows_all(positions)]
    names = ", ".join(lacking[:3]) + (f" and {len(lacking) - 3} more" if len(lacking) > 3 else "")
    more = "" if positions else "; values: true in its job keeps every neuron's"
    return f"{names}: a node that a prompt does not keep counts as 0 there{more}"


_NO_INTERVAL = Interval(*(torch.full((1,), math.nan, dtype=torch.float64) for _ in range(3)))


def _known(*tables: Array) -> bool:
    return all(np.isfinite(table).all() for table in tables)


def _metrics(side: Side, rows: Array) -> Array:
    """The metric of these prompts [prompt, 1]."""
    return np.array([[side.prompts[at].metric] for at in rows])


def _nodes(first: Side, last: Side, pairs: Pairing, positions: bool, design: Design) -> tuple[pa.Table, int]:
    """The table of nodes, and how many were tested."""
    ends = (first, pairs.one), (last, pairs.other)
    tested = union([side.kept.of(rows).keys(positions) for side, rows in ends])
    circuits = [circuit_of(side, rows, positions) for side, rows in ends]
    keys = union([tested, *circuits])
    was_tested = index_of(tested, keys) >= 0
    values = [values_at(side, keys, positions)[rows] for side, rows in ends]
    found = _joined(values, was_tested, pairs.paired, design)
    counted = [counts_at(_narrowed(side, rows), keys, positions) for side, rows in ends]
    inside = [index_of(circuit, keys) >= 0 for circuit in circuits]
    order = np.lexsort((keys[:, 2], keys[:, 1], keys[:, 0], -np.abs(found.difference)))
    columns: dict[str, Any] = {name: keys[:, at] for at, name in enumerate(("layer", "position", "neuron"))}
    columns |= {"change": _changes(inside[0], inside[1], found.one, found.other)}
    columns |= {"attribution_first": found.one, "attribution_last": found.other}
    columns |= {name: _or_none(getattr(found, name)) for name in ("difference", "low", "high", "p", "q")}
    for end, (n_prompts, activation) in zip(("first", "last"), counted, strict=True):
        columns |= {f"n_{end}": n_prompts, f"activation_{end}": _or_none(activation)}
    columns["expert"] = [None] * len(keys)
    rows = {name: [_plain(column[at]) for at in order] for name, column in columns.items()}
    return table_of(COMPARISON, rows), int(was_tested.sum())


def _with_experts(table: pa.Table, numbering: Numbering) -> pa.Table:
    """A table of nodes, and of groups that have no neuron, with the experts that they belong to."""
    places = zip(table["layer"].to_pylist(), table["neuron"].to_pylist(), strict=True)
    experts = [None if neuron is None else numbering.expert(layer, neuron) for layer, neuron in places]
    at = table.schema.get_field_index("expert")
    return table.set_column(at, table.schema.field(at), pa.array(experts, pa.int32()))


def _narrowed(side: Side, rows: Array) -> Side:
    """A side of these prompts alone, as far as its kept nodes go."""
    return replace(side, kept=side.kept.of(rows), prompts=tuple(side.prompts[at] for at in rows), parts=None)


def _joined(values: Sequence[Array], tested: Array, is_paired: bool, design: Design) -> Differences:
    """The differences of all columns, of which some are tested: others have no p and q."""
    one, other = values
    found = differences(one[:, tested], other[:, tested], is_paired, design)
    rest = differences(one[:, ~tested], other[:, ~tested], is_paired, design)
    whole = {}
    for name, mine in vars(found).items():
        column = np.full(len(tested), math.nan)
        column[tested], column[~tested] = mine, math.nan if name in ("p", "q") else getattr(rest, name)
        whole[name] = column
    return Differences(**whole)


def _changes(first: Array, last: Array, one: Array, other: Array) -> list[str]:
    """What became of each node, by the circuits that have it and its attributions."""
    flipped = np.sign(one) * np.sign(other) < 0
    return [
        (SIGN if flip else BOTH) if was and now else APPEARED if now else VANISHED if was else NEITHER
        for was, now, flip in zip(first, last, flipped, strict=True)
    ]


def _or_none(values: Array) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


# ----------------------------------------------------------------------------------------------- over all sides


class _Found:
    """The circuits of all sides, and every side's numbers at the nodes of any."""

    def __init__(self, sides: Sequence[Side], positions: bool) -> None:
        self.sides, self.positions = sides, positions
        every = [np.arange(len(side.prompts)) for side in sides]
        circuits = [circuit_of(side, rows, positions) for side, rows in zip(sides, every, strict=True)]
        self.keys = union(circuits)
        self.inside = [index_of(circuit, self.keys) >= 0 for circuit in circuits]
        self.values = [values_at(side, self.keys, positions) for side in sides]
        self.means = [values.mean(0) for values in self.values]

    def in_common(self, one: int, other: int) -> dict[str, Any]:
        """What two sides have in common."""
        mine, its = self.inside[one], self.inside[other]
        both = self.means[one] * mine, self.means[other] * its
        return {"overlap": overlap(mine, its), "weighted_overlap": weighted_overlap(*both)}

    def since(self, before: int, now: int) -> dict[str, Any]:
        """What became of a side's circuit in the next."""
        was, has = self.inside[before], self.inside[now]
        one, other = self.means[before], self.means[now]
        either = was | has
        return {
            "appeared": int((has & ~was).sum()),
            "vanished": int((was & ~has).sum()),
            "changed_sign": int((was & has & (np.sign(one) * np.sign(other) < 0)).sum()),
            **self.in_common(before, now),
            "pearson": pearson(one[either], other[either]),
            "spearman": spearman(one[either], other[either]),
            **self._of_all(before, now),
        }

    def _of_all(self, before: int, now: int) -> dict[str, Any]:
        """Correlations over all neurons, where all are known."""
        every = [
            mean_of_all(side, np.arange(len(side.prompts)), self.positions)
            for side in (self.sides[before], self.sides[now])
        ]
        one, other = every
        if one is None or other is None or one.shape != other.shape:
            return {}
        return {
            "pearson_all": pearson(one.ravel(), other.ravel()),
            "spearman_all": spearman(one.ravel(), other.ravel()),
        }


def _compared(found: _Found, design: Design) -> pa.Table:
    """The table of sides."""
    rows, last = [], len(found.sides) - 1
    for number, side in enumerate(found.sides):
        metrics = _metrics(side, np.arange(len(side.prompts)))
        mean = _mean(metrics, design)
        row: dict[str, Any] = {"side": number, "name": side.name, "n_prompts": len(side.prompts)}
        row |= {"model": None if side.model is None else side.model.shown, "n_nodes": int(found.inside[number].sum())}
        row |= {"metric": mean[0][0], "metric_low": mean[1][0], "metric_high": mean[2][0]}
        if side.faithfulness:
            ends = ("faithfulness_size", "faithfulness", "faithfulness_low", "faithfulness_high")
            row |= dict(zip(ends, max(side.faithfulness), strict=True))
        row |= found.since(number - 1, number) if number else {}
        row |= {f"{name}_last": value for name, value in found.in_common(number, last).items()}
        rows.append({name: None if _is_nan(value) else value for name, value in row.items()})
    columns = {name: [row.get(name) for row in rows] for name in COMPARED.names}
    return table_of(COMPARED, columns)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _mean(values: Array, design: Design) -> tuple[Array, Array, Array]:
    """Means over prompts by column, with both ends of their intervals; NaN where a value is not known."""
    if not _known(values):
        nothing = np.full(values.shape[1], math.nan)
        return nothing, nothing, nothing
    made = resampled_means(torch.from_numpy(values), seed=design.seed).interval()
    return made.estimate.numpy(), made.low.numpy(), made.high.numpy()


def _courses(found: _Found, groups: Mapping[str, Array], design: Design) -> pa.Table:
    """The table of nodes and groups over all sides."""
    parts = []
    for number, side in enumerate(found.sides):
        values, inside = found.values[number], found.inside[number]
        sums, has = [], []
        for keys in groups.values():
            sums.append(values_at(side, keys, found.positions).sum(1, keepdims=True))
            at = index_of(found.keys, keys)
            has.append(bool(inside[at[at >= 0]].any()))
        mean, low, high = _mean(np.concatenate([*sums, values], axis=1), design)
        n, names = len(found.keys), list(groups)
        place = {name: [None] * len(names) + found.keys[:, at].tolist() for at, name in enumerate(_PLACE)}
        columns = {"side": [number] * (n + len(names)), "name": [side.name] * (n + len(names)), **place}
        columns |= {"group": names + [None] * n, "in_circuit": has + inside.tolist()}
        columns["expert"] = [None] * (n + len(names))
        columns |= {"attribution": mean.tolist(), "low": _or_none(low), "high": _or_none(high)}
        parts.append(table_of(COURSES, columns))
    return pa.concat_tables(parts)


_PLACE = ("layer", "position", "neuron")


def _groups(given: Any, n_layers: int, positions: bool, numbering: Numbering) -> dict[str, Array]:
    """Groups of neurons by name, as keys.

    Raises:
        JobError: a group of neurons at any position where positions are matched, or an expert that there is not.
    """
    if given is None:
        return {}
    held = getattr(given, "file", given)  # of what `tracer.supernodes` returns
    file = held if isinstance(held, Supernodes) else supernodes_file.read(held)
    found = {}
    for group in file.groups:
        members = [node for node in group.nodes if 0 <= node.layer < n_layers]
        if positions and any(node.position < 0 for node in members):
            rule = "has neurons at any position, and nodes are matched by position"
            raise JobError(f"group {quoted(group.name)}", rule, "group an aligned circuit, or match neurons anywhere")
        places = [(node.layer, node.position if positions else -1) for node in members]
        keys = [(*place, numbering.numbered(node.written)) for place, node in zip(places, members, strict=True)]
        if keys:
            found[group.name] = union([np.array(keys, np.int64)])
    return found
