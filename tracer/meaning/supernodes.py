"""Supernodes: the neurons of a circuit grouped by what drives them and what they do (method.md section 7).

Knows which neurons of a circuit are compared, and how many groups there are to be. Refuses to know likeness
(meaning/similarity.py), clustering (meaning/clusters.py), and what becomes of the groups (meaning/grouping.py).
"""

from __future__ import annotations

import builtins
import functools
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from tracer.choices import Clustering
from tracer.circuit.circuit import Graph, Traced
from tracer.circuit.from_run import read_graph
from tracer.circuit.said import polarities
from tracer.circuit.supernodes_file import ANYWHERE
from tracer.errors import JobError, option, quoted, say
from tracer.meaning import profiles
from tracer.meaning.clusters import alone, best_of, stability
from tracer.meaning.grouping import Found, Grouping
from tracer.meaning.similarity import Counted, Items, Likeness, Parts, count, likeness
from tracer.records import Count, Natural, Record, is_list
from tracer.store.run_folder import RunFolder

MOST = 4096
"""Items that are compared: each pair of them is held several times."""


def _ends(value: Any) -> Any:
    """A range of numbers of clusters: ``2:20`` or [2, 20]."""
    if isinstance(value, str) and len(parts := value.split(":")) == 2 and all(part.isdecimal() for part in parts):
        return tuple(int(part) for part in parts)
    if is_list(value) and len(value) == 2:
        return tuple(value)
    raise ValueError("must be the smallest and the largest number of clusters, such as 2:20")


class Asked(Record):
    """How neurons are grouped.

    Attributes:
        clusters: how many groups; by the mean silhouette over `range` if None.
        range: the smallest and the largest number of groups that is tried.
        method: ``spectral`` clustering of similarities, or ``agglomerative`` with average linkage of 1 - similarity.
        free: a neuron counts wherever it is: its profiles within a prompt are summed over positions. As the circuit is
            if None.
        bootstraps: of the prompts, by which the groups' stability is measured; 0 for none.
        seed: of k-means and the bootstraps.
    """

    clusters: Count | None = None
    range: Annotated[tuple[Count, Count], BeforeValidator(_ends)] = (2, 20)
    method: Clustering = "spectral"
    free: bool | None = None
    bootstraps: Annotated[int, Field(ge=0, le=1000, strict=True)] = 20
    seed: Natural = 0

    @model_validator(mode="after")
    def _agrees(self) -> Asked:
        if not 2 <= self.range[0] <= self.range[1]:
            raise ValueError("range must begin at 2 or more, and not fall")
        if self.seed >= 2**32:
            raise ValueError("seed must be below 2**32")
        return self


def supernodes(
    source: Any,
    clusters: int | None = None,
    *,
    range: tuple[int, int] | str = (2, 20),
    method: Clustering | str = "spectral",
    free: bool | None = None,
    bootstraps: int = 20,
    seed: int = 0,
    prompt: int | None = None,
    tokens: pa.Table | None = None,
    descriptions: pa.Table | None = None,
) -> Grouping:
    """Group a circuit's neurons by their attribution profiles.

    Args:
        source: a circuit that was traced with profiles, or the folder of a run that was.
        clusters: how many groups; by the mean silhouette over `range` if None.
        range: the smallest and the largest number of groups that is tried, or both as ``"2:20"``.
        method: ``spectral`` or ``agglomerative``.
        free: a neuron counts wherever it is, its profiles within a prompt summed; as the circuit is if None.
        bootstraps: of the prompts, for the groups' stability.
        seed: of k-means and the bootstraps.
        prompt: of a run over many, one prompt's circuit instead of the dataset's.
        tokens, descriptions: tables to name groups by, such as `tracer.promoted` and `tracer.describe` make; those in
            the run's folder if None.

    Returns:
        The groups with their names (`Grouping.file`), and the circuit with them (`Grouping.graph`).

    Raises:
        JobError: fewer neurons that are alike than clusters, a setting out of range, no profiles. RunError: the run
            cannot be read.

    Source: ADAG, arXiv 2604.07615.
    """
    given = {"clusters": clusters, "range": range, "method": method, "free": free, "bootstraps": bootstraps}
    asked = checked(**given, seed=seed)
    if isinstance(source, Graph):
        if prompt is not None:
            raise JobError(option("prompt", prompt), "has no effect on a circuit", "leave it out")
        graph, parts = source, functools.partial(profiles.parts, source)
    else:
        graph = read_graph(source, prompt)
        parts = functools.partial(profiles.parts, source if "circuit" in graph.notes else graph)
        tokens = table_of(source, "tokens") if tokens is None else tokens
        descriptions = table_of(source, "descriptions") if descriptions is None else descriptions
    if not isinstance(graph, Traced):
        raise JobError("an imported graph", "has no attribution profiles", "trace the prompt")
    found = grouped(graph, parts, asked, tokens, descriptions)
    say(found.notes)
    return found


def checked(**given: Any) -> Asked:
    """Settings of a grouping.

    Raises:
        JobError: one that cannot be, in the words of the surface.
    """
    try:
        return Asked(**given)
    except ValidationError as error:
        first = error.errors()[0]
        rule = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        value = option(str(first["loc"][0]), quoted(first["input"])) if first["loc"] else "supernodes"
        raise JobError(value, rule, "change or leave out that setting") from None


def grouped(
    graph: Traced,
    parts: Parts,
    asked: Asked,
    tokens: pa.Table | None = None,
    descriptions: pa.Table | None = None,
) -> Grouping:
    """The same as `supernodes`, of a circuit and the profiles of its prompts.

    Args:
        parts: gives the profiles from their beginning, each time it is called; of a dataset's circuit those of its
            prompts.
    """
    items, counted = _items(graph, parts, asked.free)
    weights = np.ones((1, counted.n_prompts))
    if counted.n_prompts > 1 and asked.bootstraps:
        chances = np.full(counted.n_prompts, 1 / counted.n_prompts)
        drawn = np.random.default_rng(asked.seed).multinomial(counted.n_prompts, chances, asked.bootstraps)
        weights = np.vstack([weights, drawn])
    likenesses = likeness(parts, items, weights)
    whole = next(likenesses)
    found = best_of(whole.similarity, _counts(whole, asked), asked.method, asked.seed)
    again = (one.similarity for one in likenesses)
    stable = stability(found, again, asked.method, asked.seed) if len(weights) > 1 else None
    settings = asked.model_dump(mode="json", exclude={"clusters", "range"})
    settings["chosen_by"] = "user" if asked.clusters is not None else "silhouette"
    return Found(graph, items, whole, counted, found, stable).grouping(settings, tokens, descriptions)


# ------------------------------------------------------------------------------------------- what is compared


def _items(graph: Traced, parts: Parts, free: bool | None) -> tuple[Items, Counted]:
    """The circuit's neurons, each of the polarity that it has, and how often they occur.

    Of a dataset's node that is the sign of its mean activation; where that is not kept, which it has in more prompts.
    """
    kind = graph.notes.get("circuit")
    if kind == "free" and free is False:
        rule, step = "has no positions: its neurons count wherever they are", "leave it out"
        raise JobError(f"{option('free', False)} of a free circuit", rule, step)
    anywhere = kind == "free" or bool(free)
    found, open_signs = set[tuple[int, int, int, int]](), False
    for row in graph.neurons.select(["layer", "position", "neuron", "activation"]).to_pylist():
        open_signs |= row["activation"] is None
        position = ANYWHERE if anywhere else row["position"]
        found |= {(row["layer"], position, row["neuron"], sign) for sign in polarities(row["activation"])}
    if len(found) > MOST:
        rule = f"are more than the {MOST:,} that are compared at a time"
        raise JobError(f"{len(found):,} neurons", rule, "group a circuit of fewer nodes")
    if not found:
        raise JobError("circuit", "has no neuron to group", "trace it with more nodes")
    items = Items.of(found, len(graph.tokens) if kind == "aligned" and not anywhere else None)
    counted = count(parts, items)
    if not open_signs:
        return items, counted
    best = dict[tuple[int, int, int], tuple[int, int]]()
    for (layer, position, neuron, sign), times in zip(items.rows(), counted.times.tolist(), strict=True):
        place = layer, position, neuron
        best[place] = max(best.get(place, (-1, 0)), (times, sign))
    chosen = np.array([best[row[:3]][1] == row[3] for row in items.rows()])
    return items.take(chosen), replace(counted, times=counted.times[chosen])


def _counts(whole: Likeness, asked: Asked) -> list[int]:
    """The numbers of clusters that are tried."""
    n_alike = int((~alone(whole.similarity)).sum())
    if not n_alike:
        rule = "no two of its neurons occur in one prompt with profiles that point the same way on both sides"
        raise JobError("circuit", rule, "trace more nodes, or more prompts")
    if asked.clusters is not None:
        if asked.clusters > n_alike:
            rule = f"only {n_alike} of {len(whole.similarity)} neurons are like another"
            raise JobError(option("clusters", asked.clusters), rule, f"ask for at most {n_alike}")
        return [asked.clusters]
    low, high = asked.range
    return list(builtins.range(low, min(high, n_alike - 1) + 1)) or [1]


def table_of(address: Any, name: str) -> pa.Table | None:
    """A table of a whole run, such as ``tokens``; None where the run has none.

    Raises:
        RunError: it is damaged.
    """
    return RunFolder(address).find_output(f"{name}.parquet")
