"""A circuit: the nodes and edges kept for one prompt, with everything needed to read them without the model.

A `Graph` is nodes and edges over tokens, wherever they came from; a `Circuit` is one that tracer made, with its
metric, checks and settings. Both are frozen records with Arrow tables. Knows how they are counted, walked, saved and
loaded (through store/one_prompt.py). Refuses to know how attributions are computed.
"""

from __future__ import annotations

import heapq
import importlib.metadata
import math
import platform
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ConfigDict, Field, ValidationError, model_validator

from tracer.choices import PlotKind
from tracer.circuit import identities
from tracer.circuit.names import height, node_text
from tracer.circuit.said import Said, problem
from tracer.errors import JobError, RunError, option, quoted
from tracer.experts import DENSE, Numbering
from tracer.records import Record
from tracer.settings import OWN_METRICS, ModelRecord, Settings
from tracer.store import one_prompt
from tracer.store.parquet import fingerprint
from tracer.store.schemas import DESCRIPTIONS, EDGES, NODES, PROFILES, PROMPTS, TOKENS
from tracer.store.storage import is_remote
from tracer.system.display import Plotted, renderer

LIKELY = 10
"""A target that is not among so many of the model's likeliest tokens is not what it says."""
NEAR_ZERO = 0.05
"""A metric below this part of what its tokens give it is near 0."""
PACKAGES = ("neuron-tracer", "torch", "transformers", "nnsight", "pyarrow", "numpy")


KINDS = frozenset({"neuron", "embedding", "logit", "target", "error", "attention", "other"})
"""Of nodes; a circuit of ours has the first four."""
ENDS = frozenset({"logit", "target"})
"""Of nodes that a circuit is of: the logits of a metric, or what is asked about inside the model."""

BESIDE = {"tokens.parquet": ("neuron_tokens", TOKENS), "descriptions.parquet": ("descriptions", DESCRIPTIONS)}
"""Tables that may lie in a run folder, the field of a graph each is, and its schema."""


class Prediction(Record):
    """One of the model's top tokens where the metric is read."""

    token: str
    token_id: int
    probability: float


class Route(Record):
    """A way from an embedding to a logit.

    Attributes:
        nodes: by `node_id`. names: what they are, as text. share: the product of its edges' shares.
        attribution: what the embedding's distance from its baseline carries this way, in metric units; None in an
            imported graph that has no attributions.
    """

    nodes: tuple[int, ...]
    share: float
    attribution: float | None
    names: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """The way as a line: ``+1.1954  embedding ␣secretaries @2 -> L1 N13 @5 ␣car -> logit ␣are @5``."""
        way = " -> ".join(self.names or map(str, self.nodes))
        return f"{'-' if self.attribution is None else format(self.attribution, '+.4f')}  {way}"

    __str__ = __repr__


_LATER = ("answer", "weights")
"""Fields of circuits that say nothing in records where they are empty, so that fingerprints stay what they were."""

_Way = tuple[float, float, tuple[int, ...]]
"""How much comes by a way, the product of its shares, and its nodes."""


class _Step(NamedTuple):
    """An edge as a step of paths: what it gives as their first, and what it passes on of the way before it."""

    source: int
    target: int
    share: float
    begins: float
    passes: float


class Graph(Plotted, Record):
    """Nodes and direct edges over the tokens of one prompt.

    Attributes:
        nodes: Arrow table, a row for each node: neurons strongest first, then embeddings by position, then logits.
            `kind` is what it is; `layer`, `position` and `neuron` where, `neuron` being the number in the layer, of
            which `expert` holds a part (null where none does), and of embeddings and logits the token id; `activation`
            its value (null of an embedding); `attribution` what it gives the metric, in the metric's units. `explained`
            is the part of a node's incoming weight that the kept edges hold (signed: edges of opposite sign cancel);
            `influence` the part of the logits' |weight| that flows through it within this graph; `gradient` the
            metric's gradient at a node, by which its distance from its baseline was multiplied (a logit's is its weight
            in the metric), null where it is not kept; `bias_share` the part of its activation that no source gives,
            which is the biases'; all are null without edges. A circuit that is of something inside the model has, in
            the place of logits, nodes of kind ``target``, whose `token` names it and whose `neuron` is the neuron's, or
            -1 of a direction. An imported graph may have nodes of kind ``error``, ``attention`` (a feature of
            attention) and ``other`` (biases); where its file gives no index or token id, `neuron` is negative, and a
            logit without a label has an empty token. A dataset's circuit that is free has no positions: they are -1.
        links: Arrow table, a row for each edge, strongest first; None where edges were not traced. `edges` has both
            ends spelt out.
        text, tokens: the prompt.
        n_layers: of the model; logits are in that layer.
        groups: named sets of nodes (supernodes), by node id. pins: nodes that are pinned on Neuronpedia's page.
        labels: what an imported graph's file calls its nodes, by node id.
        called, remarks: what a reader calls nodes and wrote about them, by node id; no part of what the graph is.
        notes: where an imported graph came from. original: its file's own nodes and settings, for exporting it again.
        neuron_tokens, descriptions: what its neurons do, as `tracer.promoted` and `tracer.describe` make tables of it,
            where that is known; no part of what the graph is, so that no fingerprint depends on them.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    nodes: pa.Table
    links: pa.Table | None = None
    text: str
    tokens: tuple[str, ...]
    n_layers: int
    groups: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    pins: tuple[int, ...] = ()
    labels: dict[int, str] = Field(default_factory=dict)
    notes: dict[str, Any] = Field(default_factory=dict)
    original: dict[str, Any] = Field(default_factory=dict)
    neuron_tokens: pa.Table | None = Field(default=None, exclude=True)
    descriptions: pa.Table | None = Field(default=None, exclude=True)
    called: dict[int, str] = Field(default_factory=dict, exclude=True)
    remarks: dict[int, str] = Field(default_factory=dict, exclude=True)

    @model_validator(mode="after")
    def _whole(self) -> Graph:
        """Tables and fields fit each other; what was read from a damaged file may not."""
        if set(self.nodes["kind"].to_pylist()) - KINDS:
            raise ValueError("a node is of an unknown kind")
        if self.nodes.num_rows and self.nodes["position"].to_numpy().max() >= len(self.tokens):
            raise ValueError("a node lies beyond the tokens")
        if self.nodes["node_id"].to_pylist() != list(range(self.nodes.num_rows)):
            raise ValueError("nodes are missing or out of order")
        ends = [] if self.links is None else [self.links[end].to_numpy() for end in ("source", "target")]
        if any(len(end) and not 0 <= end.min() <= end.max() < self.nodes.num_rows for end in ends):
            raise ValueError("an edge has an unknown end")
        return self

    @property
    def numbering(self) -> Numbering:
        """How its neurons are numbered; in an imported graph no expert is known."""
        return DENSE

    @property
    def neurons(self) -> pa.Table:
        """The neuron nodes alone, strongest first."""
        return self.nodes.filter(pc.field("kind") == "neuron")

    @property
    def n_nodes(self) -> int:
        """Kept (position, neuron) pairs."""
        return self.neurons.num_rows

    @property
    def n_neurons(self) -> int:
        """Kept unique (layer, neuron) pairs."""
        return self.neurons.group_by(["layer", "neuron"]).aggregate([]).num_rows

    @property
    def first_share(self) -> float:
        """The share of the kept neurons' summed |attribution| that is at position 0."""
        neurons = self.neurons
        first = neurons.filter(pc.field("position") == 0)
        total, held = (sum(map(abs, some["attribution"].to_pylist())) for some in (neurons, first))
        return held / total if total else 0.0

    @property
    def n_edges(self) -> int:
        """Kept edges; 0 where edges were not traced."""
        return 0 if self.links is None else self.links.num_rows

    @property
    def n_unconnected(self) -> int:
        """Neurons that no kept edge leads into or out of."""
        ends = set() if self.links is None else {*self.links["source"].to_pylist(), *self.links["target"].to_pylist()}
        return sum(node not in ends for node in self.neurons["node_id"].to_pylist())

    @property
    def edges(self) -> pa.Table:
        """The edges with both ends spelt out, strongest |attribution| first: an Arrow table of `source` and `target`
        (by `node_id`), `weight` (activation units of the target), `share` (of the target's activation), `attribution`
        (metric units); then of either end what it is as text, ``source_name`` such as ``L2 N250 @5 ␣car``, and its
        kind, layer, position and neuron.

        Raises:
            JobError: the circuit was traced without edges.
        """
        table = self._links().drop_columns("prompt_id")
        names = pa.array(self.names, pa.string())
        for end in ("source", "target"):
            table = table.append_column(f"{end}_name", names.take(table[end].combine_chunks()))
        for end in ("source", "target"):
            for name in ("kind", "layer", "position", "neuron"):
                table = table.append_column(f"{end}_{name}", self.nodes[name].take(table[end]))
        return table

    @property
    def names(self) -> list[str]:
        """Of each node what it is and where, as text: ``L2 N250 @5 ␣car``, ``embedding ␣secretaries @2``."""
        numbering = self.numbering
        return [node_text(row, numbering, self.labels.get(at, "")) for at, row in enumerate(self.nodes.to_pylist())]

    def paths(self, count: int = 10) -> list[Route]:
        """The strongest ways from an embedding to a logit, in metric units: what the embedding's distance from its
        baseline carries to the metric by this way alone. From baseline zero that is the product of shares times the
        logit's attribution (by the product alone, where it has none).

        Raises:
            JobError: the circuit was traced without edges, or none into a logit has a share, or `count` is below 1; or
                it is a dataset's, whose edges are means.
        """
        if "circuit" in self.notes:
            rule = "has no paths: its edges are means, and what a path carries on average is no product of them"
            raise JobError("a dataset's circuit", rule, f"name one of the run's prompts: {option('prompt', 0)}")
        if count < 1:
            raise JobError(f"paths({count})", "at least one path must be asked for", "use 1 or more")
        kinds = self.nodes["kind"].to_pylist()
        heights = list(map(height, kinds, self.nodes["layer"].to_pylist(), self.nodes["neuron"].to_pylist()))
        into: dict[int, list[_Step]] = {}
        for step in self._steps():
            into.setdefault(step.target, []).append(step)
        if not any(node in into for node, kind in enumerate(kinds) if kind in ENDS) and self.n_edges:
            raise JobError("graph", "no edge into a logit has a share, so paths cannot be compared", "use its weights")
        best: dict[int, list[_Way]] = {}
        for node in sorted(range(len(kinds)), key=heights.__getitem__):
            ways: list[_Way] = [(1.0, 1.0, (node,))] if kinds[node] == "embedding" else []
            for step in into.get(node, ()):
                first = kinds[step.source] == "embedding"
                for strength, share, nodes in best[step.source]:
                    factor = step.begins if first else step.passes
                    ways.append((strength * factor, share * step.share, (*nodes, node)))
            best[node] = heapq.nlargest(count, ways, key=lambda way: abs(way[0]))
        scale = self._path_scale()
        routes = [
            Route(nodes=nodes, share=share, attribution=None if by is None else strength * by)
            for node, (kind, by) in enumerate(zip(kinds, scale, strict=True))
            if kind in ENDS
            for strength, share, nodes in best[node]
        ]
        strongest = heapq.nlargest(
            count, routes, key=lambda way: abs(way.share if way.attribution is None else way.attribution)
        )
        names = self.names
        return [way.model_copy(update={"names": tuple(names[node] for node in way.nodes)}) for way in strongest]

    def _steps(self) -> Iterator[_Step]:
        """Every edge that has a share, as a step of paths: by its share."""
        links = self._links().to_pydict()
        for source, target, share in zip(links["source"], links["target"], links["share"], strict=True):
            if share is not None and math.isfinite(share):
                yield _Step(source, target, share, share, share)

    def _path_scale(self) -> list[float | None]:
        """What the product of a path's steps is multiplied by, for each logit: its attribution."""
        return self.nodes["attribution"].to_pylist()

    def to_networkx(self) -> Any:
        """The circuit as a networkx DiGraph: node and edge columns as attributes.

        Raises:
            JobError: the circuit was traced without edges.
        """
        import networkx

        graph, said = networkx.DiGraph(text=self.text), Said.of(self)
        for row in self.nodes.drop_columns("prompt_id").to_pylist():
            node = row.pop("node_id")
            row["label"] = self.labels.get(node) or (row["kind"] == "neuron" and said.label(row)) or None
            row["name"] = said.plain(row) if row["expert"] is not None else None
            graph.add_node(node, **{name: value for name, value in row.items() if value is not None})
        for row in self._links().drop_columns("prompt_id").to_pylist():
            ends = row.pop("source"), row.pop("target")
            graph.add_edge(*ends, **{name: value for name, value in row.items() if value is not None})
        return graph

    def _links(self) -> pa.Table:
        if self.links is None:
            raise self.without_edges("trace it again with edges (the default)")
        return self.links

    def without_edges(self, step: str, need: str = "") -> JobError:
        """The error of an edge asked of a graph that has none.

        Args:
            step: what to do where it was traced without. need: why that matters, after the rule.
        """
        if "circuit" in self.notes:
            step = f"run it with edges (the default), or name one of the run's prompts: {option('prompt', 0)}"
            return JobError("a dataset's circuit", f"has no edges{need}", step)
        return JobError("circuit", f"was traced without edges{need}", step)

    @property
    def ends(self) -> list[dict[str, Any]]:
        """The nodes that the circuit is of, as dictionaries."""
        return [row for row in self.nodes.to_pylist() if row["kind"] in ENDS]

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """The nodes of one kind (``neuron``, ``embedding``, ``logit``) as dictionaries."""
        return self.nodes.filter(pc.field("kind") == kind).to_pylist()

    def to_pandas(self) -> tuple[Any, Any]:
        """Nodes and edges as pandas DataFrames; the edges are None where they were not traced.

        Of nodes the columns of `nodes`, a row each: `prompt_id`, `node_id`, `kind`, `layer`, `position`, `neuron`,
        `token`, `activation`, `attribution` (metric units), `explained`, `influence`, `gradient`, `bias_share`,
        `expert`; and `name`, what the node is as text. Of edges the columns of `edges`, with both ends as text in
        `source_name` and `target_name`.
        """
        nodes = self.nodes.to_pandas()
        nodes["name"] = self.names
        return nodes, None if self.links is None else self.edges.to_pandas()

    def show(self, rows: int = 20) -> None:
        """Print the table that the terminal has of it; in a notebook show it there.

        Args:
            rows: nodes and edges, strongest first.
        """
        renderer().show(self, rows)

    def plot(self, axes: Any = None, kind: PlotKind | str = "both") -> Any:
        """Draw where the circuit is: attribution by layer and position, and its strongest nodes as bars.

        Args:
            axes: matplotlib axes to draw into, for one of the two; a figure of its own if None.
            kind: ``positions`` for the summed attribution of the neurons at each layer and position, ``nodes`` for the
                strongest nodes, or both.

        Returns:
            The matplotlib ``Figure``, which a notebook shows and ``savefig`` writes.

        Raises:
            JobError: both in one pair of axes, or a graph without attributions.
        """
        return renderer().plot_circuit(self, axes, kind)

    def view(self, path: str | Path | None = None, *, open: bool = True, height: int = 720) -> Any:
        """Show the graph page: in a notebook (Jupyter, VS Code, Colab) inline, elsewhere in the browser. It needs no
        network.

        A notebook keeps what it shows, so that a large graph is shown there by its strongest edges, which is said; a
        file has all.

        Args:
            path: write the page to this file as well; outside a notebook a temporary file if None.
            open: open the file in the browser, where there is one.
            height: of the frame in a notebook, in pixels.

        Returns:
            In a notebook the frame, else the file's path.

        Raises:
            JobError: the graph has more than the page can draw, or no positions, by which it is drawn.
            RunError: the file cannot be written.
        """
        return renderer().view(self, path, open=open, height=height)

    def save(self, folder: str | Path, overwrite: bool = False) -> str | Path:
        """Write the graph as a run folder, and return where.

        Args:
            folder: a path, or ``s3://`` or ``gs://``.
            overwrite: replace another run that is there.

        Raises:
            RunError: the folder cannot be written, or holds something else.
        """
        beside = {file: table for file, (name, _) in BESIDE.items() if (table := getattr(self, name)) is not None}
        one_prompt.write_run(folder, self._record(), self._tables(), overwrite, beside)
        return folder if is_remote(folder) else Path(folder)

    def _tables(self) -> dict[str, pa.Table]:
        """What is saved beside the record, by the names of `schemas.SCHEMAS`."""
        tables = {"prompts": self._prompts(), "nodes": self.nodes}
        return tables if self.links is None else tables | {"edges": self.links}

    def _record(self) -> dict[str, Any]:
        """What run.json holds."""
        content = self.model_dump(
            mode="json", exclude={"nodes", "links", "profiles", "settings", "model", "fingerprint"}
        )
        return {"kind": "graph", "fingerprint": fingerprint(content), **provenance(), "graph": content}

    def _prompts(self) -> pa.Table:
        """The one row of the prompts table."""
        ids = [row["neuron"] for row in self.rows("embedding")]
        known = ids if min(ids, default=0) >= 0 else None
        row = _prompt_row(text=self.text, token_ids=known, n_nodes=self.n_nodes, n_edges=self.n_edges)
        return pa.Table.from_pylist([row], schema=PROMPTS)


class Traced(Graph):
    """A graph that tracer made of a model: one prompt's of a run over many, or a dataset's own circuit, whose
    attributions, activations and edges are means over prompts.

    Attributes:
        settings, model: how it was made, and from what.
        profiles: Arrow table, a row for each neuron node: its attribution profile; None where
            that was not asked for, and of a dataset's circuit.
    """

    settings: Settings
    model: ModelRecord
    profiles: pa.Table | None = None

    @property
    def numbering(self) -> Numbering:
        """How the neurons of its model are numbered in its basis."""
        return self.model.numbering(self.settings.basis)

    @model_validator(mode="after")
    def _profiled(self) -> Traced:
        """Profiles are those of the neuron nodes, in their order, as long as the prompt and its logits."""
        if self.profiles is None:
            return self
        if self.profiles["node_id"].to_pylist() != self.neurons["node_id"].to_pylist():
            raise ValueError("profiles are not those of the neuron nodes")
        for name, size in (("input", len(self.tokens)), ("output", len(self.ends))):
            if {len(values) for values in self.profiles[name]} - {size}:
                raise ValueError(f"a profile's {name} is of another length than the prompt")
        return self

    def _tables(self) -> dict[str, pa.Table]:
        return super()._tables() | ({} if self.profiles is None else {"profiles": self.profiles})


class Circuit(Traced):
    """The nodes and edges kept for one prompt, and how they were found.

    Attributes:
        nodes: Arrow table, a row for each node: neurons strongest first, then embeddings by position, then logits; with
            `kind`, `layer`, `position`, `neuron`, `token`, `activation` and `attribution` (metric units).
        links: Arrow table, a row for each edge, strongest first; None where edges were not traced. `edges` has both
            ends spelt out.
        text, tokens: the prompt. n_layers: of the model; logits are in that layer.
        groups: named sets of nodes (supernodes), by node id. pins: nodes that are pinned on Neuronpedia's page.
        called, remarks: what a reader calls nodes, and wrote about them, by node id.
        labels, notes, original: of a circuit that was read from another tool's file: what it calls nodes, where it came
            from, and what it takes to export it again.
        neuron_tokens, descriptions: what its neurons do, as `tracer.promoted` and `tracer.describe` make tables of it,
            where that is known.
        user_id: the user's own name of the prompt.
        token_ids: of the prompt.
        target_ids, foil_ids, positions: what was asked, and where. counterfactual_ids: the paired prompt.
        answer: whether the targets are an answer's tokens, each asked about at its own of the `positions`. weights: of
            each target in the metric ``share``. What is asked inside the model is in the `settings`.
        reference: hash of the prompts behind the baseline ``mean``.
        metric: of the prompt. unexplained: metric minus the summed embedding attributions. start_metric: the metric at
            the start of a path method's path, which is part of it.
        kept_mass: share of the summed ``|attribution|`` of all neuron nodes that the kept ones hold.
        n_total: neuron nodes the model has on this prompt.
        n_selected: of them, how many were selected; pruning may have dropped some.
        n_links: direct edges among the selected nodes before pruning.
        conserves: whether `unexplained` had to vanish, and was checked.
        predictions: the model's top tokens at the last position read.
        probabilities: of the logit nodes' tokens, in the order of the nodes. ranks: their places among all tokens, the
            likeliest being 1; empty in circuits that older versions saved.
        selection: which nodes were kept. settings, model: how it was made, and from what.
        profiles: Arrow table, a row for each neuron node: its attribution profile; None where that was not asked for.
        seconds: it took.
        warnings: what whoever reads the circuit should know, a sentence each; `tracer.trace` warns of them too.
    """

    token_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    foil_ids: tuple[int, ...]
    positions: tuple[int, ...]
    answer: bool = False
    weights: tuple[float, ...] = ()
    counterfactual_ids: tuple[int, ...] | None = None
    reference: str | None = None
    metric: float
    unexplained: float
    start_metric: float | None = None
    kept_mass: float
    n_total: int
    n_selected: int
    n_links: int = 0
    conserves: bool
    predictions: tuple[Prediction, ...]
    probabilities: tuple[float, ...]
    ranks: tuple[int, ...] = ()
    selection: dict[str, Any]
    user_id: str | None = None
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, fields: Any) -> Any:
        """Records of schema version 2 call `unexplained` the residual."""
        if isinstance(fields, dict) and "residual" in fields and "unexplained" not in fields:
            return {"unexplained" if name == "residual" else name: value for name, value in fields.items()}
        return fields

    @model_validator(mode="after")
    def _agrees(self) -> Circuit:
        """The fields of a traced circuit agree with its tables."""
        logits = {row["neuron"] for row in self.rows("logit")}
        if logits != {*self.target_ids, *self.foil_ids}:
            raise ValueError("the logits are not the targets and foils")
        if len(self.token_ids) != len(self.tokens) or not all(pos < len(self.tokens) for pos in self.positions):
            raise ValueError("positions or tokens do not fit the prompt")
        return self

    def _steps(self) -> Iterator[_Step]:
        """From another baseline than zero: an edge's attribution, and the part of its source's gradient that it is."""
        if not self._differs:
            yield from super()._steps()
            return
        nodes = {name: self.nodes[name].to_pylist() for name in ("kind", "activation", "attribution", "gradient")}
        for edge in self._links().to_pylist():
            source, target, share = edge["source"], edge["target"], edge["share"]
            passed = 0.0
            if nodes["kind"][source] == "neuron" and nodes["gradient"][source]:
                value, away = nodes["activation"][source], nodes["attribution"][source]
                if value:
                    passed = edge["weight"] / value * nodes["gradient"][target] / nodes["gradient"][source]
                elif away:
                    passed = edge["attribution"] / away
            yield _Step(source, target, math.nan if share is None else share, edge["attribution"], passed)

    def _path_scale(self) -> list[float | None]:
        """From another baseline than zero the steps are in metric units already."""
        return [1.0] * self.nodes.num_rows if self._differs else super()._path_scale()

    @property
    def _differs(self) -> bool:
        """Whether edges are differences from a baseline, of nodes whose gradients are known."""
        return self.settings.baseline != "zero" and all(row["gradient"] is not None for row in self.rows("neuron"))

    @property
    def residual(self) -> float:
        """The old name of `unexplained`, for this version alone: a *residual* is the model's residual stream."""
        warnings.warn("Circuit.residual is now Circuit.unexplained", DeprecationWarning, stacklevel=2)
        return self.unexplained

    @property
    def unlikely(self) -> list[tuple[dict[str, Any], float, int]]:
        """Targets not among the model's ten likeliest next tokens: their logit nodes, probabilities and ranks."""
        if self.settings.metric in OWN_METRICS:
            return []
        asked = zip(self.rows("logit"), self.probabilities, self.ranks, strict=False)  # older circuits have no ranks
        return [(row, p, rank) for row, p, rank in asked if rank > LIKELY and row["neuron"] in self.target_ids]

    @property
    def cancels(self) -> bool:
        """Whether the metric is near 0 only because its parts cancel, so that shares of it say nothing: it is less than
        a twentieth of the summed |embedding attributions|."""
        return abs(self.metric) < NEAR_ZERO * sum(abs(row["attribution"]) for row in self.rows("embedding"))

    @property
    def fingerprint(self) -> str:
        """A hash of what decides the circuit's numbers: prompt, settings, selection and weights."""
        asked = {"token_ids", "target_ids", "foil_ids", "positions", "counterfactual_ids", "reference", "selection"}
        job = self.model_dump(mode="json", include=asked | {name for name in _LATER if getattr(self, name)})
        settings = self.settings.record()
        return fingerprint({**job, "settings": settings, "model": self.model.model_dump(mode="json")})

    def _record(self) -> dict[str, Any]:
        unsaid = {name for name in _LATER if not getattr(self, name)}
        content = self.model_dump(mode="json", exclude={"nodes", "links", "profiles", "settings"} | unsaid)
        content["settings"] = self.settings.record()
        return {"kind": "trace", "fingerprint": self.fingerprint, **provenance(), "circuit": content}

    def prompt_row(self) -> dict[str, Any]:
        """The row of a run's prompts table that says what was asked and how it went."""
        return _prompt_row(
            user_id=self.user_id,
            text=self.text,
            token_ids=list(self.token_ids),
            target_ids=list(self.target_ids),
            foil_ids=list(self.foil_ids),
            metric=self.metric,
            unexplained=self.unexplained,
            n_nodes=self.n_nodes,
            n_edges=self.n_edges,
            seconds=self.seconds,
        )

    def _prompts(self) -> pa.Table:
        return pa.Table.from_pylist([self.prompt_row()], schema=PROMPTS)

    @classmethod
    def load(cls, folder: str | Path) -> Circuit:
        """Read a circuit back, equal to the one saved.

        Raises:
            RunError: no circuit there, or a damaged one.
        """
        graph = load_graph(folder)
        if not isinstance(graph, Circuit):
            rule = "is an imported graph, not a circuit of ours"
            raise RunError(f"run {str(folder)!r}", rule, "view or export it, or trace the prompt")
        return graph


def load_graph(folder: str | Path) -> Graph:
    """Read what a run folder of one prompt holds: a `Circuit`, or an imported `Graph`.

    Raises:
        RunError: neither is there, or it is damaged.
    """
    classes: dict[str, tuple[str, type[Graph]]] = {"trace": ("circuit", Circuit), "graph": ("graph", Graph)}
    if one_prompt.read_record(folder).get("kind") not in classes:
        raise RunError(
            f"run {str(folder)!r}", "is not the run of one prompt", f"name one of its prompts: {option('prompt', 0)}"
        )
    record, tables = one_prompt.read_run(folder)
    name, kind = classes[record["kind"]]
    if tables["prompts"]["n_edges"].to_pylist() != [tables["edges"].num_rows if "edges" in tables else 0]:
        raise RunError(f"run {str(folder)!r}", "its tables do not agree on the number of edges", "run it again")
    try:
        own = {"edges": "links", "profiles": "profiles"}  # by the table's name
        there = {own[name]: table for name, table in tables.items() if name in own}
        graph = kind.model_validate({**record[name], "nodes": tables["nodes"], **there})
    except (ValidationError, KeyError, TypeError) as error:
        raise RunError(
            f"run {str(folder)!r}", f"run.json is damaged ({type(error).__name__})", "run it again"
        ) from error
    if isinstance(graph, Circuit) and (rule := identities.broken(graph)):
        raise RunError(f"run {str(folder)!r}", f"is not a circuit: {rule}", "trace it again")
    return graph.model_copy(update=read_beside(folder))


def read_beside(folder: Any) -> dict[str, pa.Table]:
    """What a run folder says of what neurons do, as fields of a `Graph`.

    Raises:
        RunError: such a table is damaged.
    """
    tables = {name: one_prompt.read_beside(folder, file, schema) for file, (name, schema) in BESIDE.items()}
    found = {name: table for name, table in tables.items() if table is not None}
    for name, table in found.items():
        if wrong := problem(table):
            step = "make it again, or remove it: the run does not need it"
            raise RunError(f"the table {name} of run {quoted(str(folder), 300)}", wrong, step)
    return found


def provenance() -> dict[str, Any]:
    """When and with which versions a record is written."""
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "packages": versions(),
    }


def _prompt_row(**columns: Any) -> dict[str, Any]:
    """The prompts table's row of a prompt that went well; columns left out are null."""
    return {"prompt_id": 0, "target_ids": [], "foil_ids": [], "status": "ok", "attempts": 1, **columns}


def edges_table(columns: dict[str, Any]) -> pa.Table:
    """A table in `schemas.EDGES` for one prompt from its columns."""
    numbered = {"prompt_id": [0] * len(columns["source"]), **columns}
    return pa.table({field.name: pa.array(numbered[field.name], field.type, from_pandas=True) for field in EDGES})


def profiles_table(node_ids: Sequence[int], inputs: Sequence[Any], outputs: Sequence[Any]) -> pa.Table:
    """A table in `schemas.PROFILES` for one prompt, from each node's profile."""
    columns = {"prompt_id": [0] * len(node_ids), "node_id": node_ids, "input": inputs, "output": outputs}
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in PROFILES})


def nodes_table(columns: dict[str, Any]) -> pa.Table:
    """A table in `schemas.NODES` for one prompt from its columns, numbered in their order; `expert` may be left out."""
    size = len(columns["kind"])
    numbered = {"prompt_id": [0] * size, "node_id": list(range(size)), "expert": [None] * size, **columns}
    return pa.table({field.name: pa.array(numbered[field.name], field.type) for field in NODES})


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide numbers."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = "not installed"
    return installed
