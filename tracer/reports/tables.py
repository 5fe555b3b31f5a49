"""What a person reads: a circuit as a table on a terminal, as JSON, as CSV, or as the graph page.

Knows layout and files. Refuses to know units and wording (reports/sheet.py); computes no number and reads no model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tracer.circuit.circuit import ENDS, Circuit, Graph, Traced
from tracer.circuit.names import ATTENTION_ERROR, node_name
from tracer.errors import JobError, option, say, writing
from tracer.meaning.around import Around, around
from tracer.reports import figures, meanings, sheet, viewer
from tracer.reports.facts import facts
from tracer.reports.folded import Folded, folded
from tracer.reports.parts import Facts, Part, Sheet
from tracer.reports.sheet import token, unit
from tracer.system import wholefile
from tracer.text import Rows, csv_text, printable

if TYPE_CHECKING:
    from tracer.evaluation.curves import Evaluation
    from tracer.evaluation.edge_curves import EdgeCurves
    from tracer.evaluation.knockouts import Knockouts
    from tracer.evaluation.quality import AlwaysOn, Quality
    from tracer.evaluation.steering import Steering

CURVES = ("faithfulness", "completeness", "control_faithfulness", "cpr", "cmd")


def circuit_table(circuit: Circuit, rows: int = 20, paths: int | None = None) -> Folded:
    """The circuit for a terminal: prompt, metric, conservation, tokens, and the strongest `rows` nodes and edges.

    Args:
        paths: how many are shown; by default five, and no more than `rows`.
    """
    parts: list[Part] = [heading(circuit), sheet.embeddings(circuit, rows), sheet.nodes(circuit, rows)]
    if circuit.links is not None:
        parts += [sheet.edges(circuit, rows), sheet.paths(circuit, min(rows, sheet.PATHS) if paths is None else paths)]
    return folded([*parts, footer(circuit)])


def graph_table(graph: Graph, rows: int = 20) -> Folded:
    """An imported graph, or one out of a run over many prompts, for a terminal: what it holds, and its strongest edges;
    of a dataset's circuit the strongest nodes too, and without edges these alone."""
    shown = [sheet.graph_nodes(graph, rows)] if graph.links is None or "circuit" in graph.notes else []
    return folded([graph_heading(graph), *shown, *([] if graph.links is None else [sheet.edges(graph, rows)])])


def graph_heading(graph: Graph) -> Facts:
    """What a graph that is no circuit of one prompt's holds, and where it comes from."""
    free = graph.notes.get("circuit") == "free"
    length = "at any position" if free else f"{len(graph.tokens)} tokens"
    origin = "of" if isinstance(graph, Traced) else "imported from"
    rows = [
        ("prompt", f"{sheet.prompt_text(graph.text)}  ({length})"),
        (origin, ", ".join(f"{name} {value}" for name, value in graph.notes.items())),
    ]
    if isinstance(graph, Traced):
        made = graph.settings
        how = f"{made.method}, baseline {made.baseline}, basis {made.basis}{sheet.options_text(made)}"
        rows.append(("model", f"{graph.model.name} ({graph.model.dtype}), metric {made.metric}, {how}"))
    holds = f"{graph.nodes.num_rows:,} nodes, {graph.n_edges:,} edges, {len(graph.groups)} groups"
    return Facts.of([*rows, ("holds", holds)])


def view(graph: Graph, path: str | Path, *, exemplars: str | Path | None = None, run: str | Path | None = None) -> Path:
    """Write the graph as one self-contained HTML page that needs no network; one without edges shows nodes alone, which
    is said.

    Args:
        graph: a circuit, or any graph.
        path: the file; its folder is made.
        exemplars: the folder of a run that collected texts where its neurons are strong (`tracer exemplars`); the
            page shows some of each neuron's. Default: those in the folder `run`, if there are any.
        run: the folder that the graph is of, which may say which neurons are always on.

    Returns:
        The file.

    Raises:
        JobError: the graph has more than the page can draw, or no positions, by which it is drawn; or the texts are of
            another model.
        RunError: the file cannot be written, or a folder holds no texts or is damaged.
    """
    known = around(graph, run, exemplars)
    content = graph_page(graph, known=known, whole=facts(graph, run, Path(path)))
    if graph.links is None:
        say(["the graph has no edges: the page shows nodes alone"])
    return write_page(content, path)


def graph_page(
    graph: Graph,
    most: int = viewer.MOST_EDGES,
    known: Around | None = None,
    whole: viewer.Facts | None = None,
    served: str | None = None,
) -> str:
    """The page of `view`.

    Args:
        most: edges that it may have. known: what folders know of its neurons.
        whole: what is known of the graph as a whole, as `facts.facts` finds it; of the graph alone if None.
        served: as of `viewer.page`.

    Raises:
        JobError: the graph has more than that, more nodes than the page can draw, or no positions.
    """
    for what, count, limit in (
        ("edges", graph.n_edges, min(most, viewer.MOST_EDGES)),
        ("nodes", len(graph.nodes), viewer.MOST_NODES),
    ):
        if count > limit:
            step = f"trace it with fewer: Pruning(top={limit // 4})" if what == "edges" else "trace it with fewer nodes"
            raise JobError("graph", f"has {count:,} {what}, the page draws at most {limit:,}", step)
    if min(graph.nodes["position"].to_pylist(), default=0) < 0:
        step = f"see it with 'tracer show', or name one of the run's prompts: {option('prompt', 0)}"
        raise JobError("a free circuit", "has no positions, by which the page draws", step)
    return viewer.page(payload(graph, known, whole), served)


def write_page(content: str | bytes, path: str | Path) -> Path:
    """Write a page or a picture, making its folder.

    Raises:
        RunError: the file cannot be written.
    """
    with writing(path):
        return wholefile.write(path, content)


def payload(graph: Graph, known: Around | None = None, whole: viewer.Facts | None = None) -> viewer.Payload:
    """What the page draws; `known` and `whole` as of `graph_page`."""
    known = around(graph) if known is None else known
    circuit = graph if isinstance(graph, Circuit) else None
    return viewer.Payload(
        title=graph.text,
        model=graph.model.name if isinstance(graph, Traced) else str(graph.notes.get("scan", "imported")),
        method=graph.settings.method if isinstance(graph, Traced) else "imported graph",
        metric_text=_metric_text(graph),
        settings=_about(graph) | _left_out(known),
        tokens=list(graph.tokens),
        n_layers=graph.n_layers,
        metric=circuit.metric if circuit is not None else np.nan,
        cancels=circuit is not None and circuit.cancels,
        flows=isinstance(graph, Traced) and graph.settings.method == "relp" and "circuit" not in graph.notes,
        circuit=getattr(graph, "fingerprint", None),
        nodes=_nodes(graph, known),
        edges=_edges(graph),
        groups=graph.groups,
        pins=graph.pins,
        called=graph.called,
        remarks=graph.remarks,
        facts=facts(graph) if whole is None else whole,
    )


def _about(graph: Graph) -> dict[str, Any]:
    """What the page says of how a graph was made."""
    if not isinstance(graph, Traced):
        return _plain_notes(graph)
    how = {name: value for name, value in graph.settings.model_dump(mode="json").items() if name != "rules"}
    if not isinstance(graph, Circuit):
        kept = {name: value for name, value in how.items() if value is not None}
        return _plain_notes(graph) | kept
    how |= {
        "rules": ", ".join(sorted(graph.settings.rules)),
        "asked": sheet.chances_text(graph),
        "conservation": sheet.conservation_text(graph),
    }
    how |= {f"model {name}": value for name, value in graph.model.model_dump(mode="json").items()}
    how |= {f"kept by {name}": value for name, value in graph.selection.items()}
    how = {name: value for name, value in how.items() if value is not None}
    return how | {f"note {number}": text for number, text in enumerate(graph.warnings, 1)}


def _plain_notes(graph: Graph) -> dict[str, Any]:
    """Where it came from; what is of its neurons is said at these."""
    return {name: value for name, value in graph.notes.items() if name != "always_on"}


def _left_out(known: Around) -> dict[str, str]:
    """What the page says of texts that it has no room for."""
    if not known.left_out:
        return {}
    return {"texts": f"of the strongest neurons alone; those of {known.left_out:,} others are left out"}


def _nodes(graph: Graph, known: Around) -> viewer.Nodes:
    nodes = graph.nodes.to_pydict()
    kinds = {
        "embedding": viewer.EMBEDDING,
        **dict.fromkeys(ENDS, viewer.LOGIT),
        "error": viewer.ERROR,
        "other": viewer.ERROR,
    }
    named = ("embedding", *ENDS)
    return viewer.Nodes(
        kind=np.array([kinds.get(kind, viewer.NEURON) for kind in nodes["kind"]], np.uint8),
        layer=np.array(nodes["layer"], np.int16),
        position=np.array(nodes["position"], np.int32),
        neuron=np.array(nodes["neuron"], np.int32),
        activation=_floats(nodes["activation"]),
        attribution=_floats(nodes["attribution"]),
        explained=_floats(nodes["explained"]),
        labels=[name for name, kind in zip(nodes["token"], nodes["kind"], strict=True) if kind in named],
        influence=_floats(nodes["influence"]),
        names=dict(_names(graph)),
        says=dict(meanings.says(graph, known)),
        experts=_experts(graph),
        always_on=meanings.always_on(graph, known),
    )


def _edges(graph: Graph) -> viewer.Edges:
    columns = ("source", "target", "weight", "share", "attribution")
    edges = graph.edges.to_pydict() if graph.links is not None else {name: list[Any]() for name in columns}
    return viewer.Edges(
        source=np.array(edges["source"], np.int32),
        target=np.array(edges["target"], np.int32),
        weight=_floats(edges["weight"]),
        share=_floats(edges["share"]),
        attribution=_floats(edges["attribution"]),
    )


def _floats(values: list[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], np.float32)


def _metric_text(graph: Graph) -> str:
    if isinstance(graph, Circuit):
        return sheet.metric_text(graph)
    return f"mean over {graph.notes['n_prompts']:,} prompts" if "circuit" in graph.notes else "no metric"


def _names(graph: Graph) -> Iterator[tuple[int, str]]:
    """What the page calls nodes that are no neurons of an MLP, or that their file has a name for."""
    numbering = graph.numbering
    for row, node in enumerate(graph.nodes.select(["kind", "layer", "neuron", "token"]).to_pylist()):
        if node["kind"] == "target":
            yield row, f"target {node['token']}"
        label = graph.labels.get(row, "")
        of_attention = node["kind"] == "error" and node["neuron"] == ATTENTION_ERROR
        if label or node["kind"] in ("attention", "other") or of_attention:
            yield row, node_name(node, numbering) + (f": {label}" if label else "")


def _experts(graph: Graph) -> dict[int, tuple[int, int]]:
    """The expert, and the number in it, of its neurons that belong to one, by row of the nodes."""
    if not (numbering := graph.numbering):
        return {}
    rows = graph.nodes.select(["kind", "layer", "neuron"]).to_pylist()
    split = {at: numbering.split(row["layer"], row["neuron"]) for at, row in enumerate(rows) if row["kind"] == "neuron"}
    return {at: (one.expert, one.neuron) for at, one in split.items() if one.expert is not None}


def evaluation_table(
    found: Evaluation,
    qualities: Sequence[Quality] = (),
    constant: Sequence[AlwaysOn] | None = None,
    edges: EdgeCurves | None = None,
    groups: Knockouts | None = None,
) -> Folded:
    """An evaluation for a terminal: the curves with their intervals, sizes for given faithfulness, how good the
    estimate was, what the strongest edges alone hold, and what each group of nodes is worth."""
    levels = list[tuple[str, str]]()
    named = [(f"faithfulness {level:g}", size) for level, size in found.sizes_for.items()]
    for name, size in (*named, (sheet.SETTLES, found.settles)):
        reached = "not reached" if size.estimate is None else f"{size.estimate} nodes"
        span = "" if sheet.is_alone(found) else f"  [{size.low or '-'}, {size.high or 'not reached'}]"
        levels.append((name, reached + span))
    how = "one prompt has no intervals" if sheet.is_alone(found) else "intervals are over test prompts (bootstrap)"
    whole, empty = float(found.whole.mean()), float(found.empty.mean())
    about = (
        f"{sheet.tested_text(found)}, {found.ablation} ablation, {found.n_total:,} "
        f"nodes in all. F(model) {whole:+.3f}, F(empty) {empty:+.3f}. Faithfulness is wanted 1, completeness 0; "
        f"{how}; random nodes are as many in each layer. Ranking by absolute attribution."
    )
    estimate = [("estimate", str(one)) for one in qualities] + [("always on", str(one)) for one in constant or ()]
    if constant is not None and not constant:
        estimate.append(("always on", "no neuron is strong on unrelated prompts without an effect there"))
    parts: list[Part] = [sheet.curves(found), Facts.of(levels), about]
    parts += [Facts.of(estimate)] if estimate else []
    parts += [] if edges is None else [sheet.edge_curves(edges)]
    return folded(parts if groups is None else [*parts, sheet.knockouts(groups)])


def steering_table(found: Steering) -> Folded:
    """A steering for a terminal: probabilities before and after, beside random nodes, and the texts."""
    where = "every position, new tokens included" if found.everywhere else "their own positions"
    how = f"{found.action.kind} {found.action.amount:g} on {found.n_neurons} neurons at {where}"
    cells = []
    for effect in found.effects:
        shift = effect.probability
        spread = shift.control
        control = ("-", "-") if spread is None else (f"{spread.mean:.4f}", f"[{spread.low:.4f}, {spread.high:.4f}]")
        cells.append((token(effect.token), effect.role, f"{shift.before:.4f}", f"{shift.after:.4f}", *control))
    heads = ["<token", "<asked as", "before", "after", "random nodes", "&their range"]
    verdict = "changed" if found.changed else "did not change"
    return folded(
        [
            Facts.of([("prompt", sheet.prompt_text(found.text)), ("action", how)]),
            Sheet.of("effects", "Next token", heads, cells),
            *([texts] if (texts := Facts.of(_texts(found))).rows else []),
            f"The most probable token {verdict}; it did with {found.control_changed} of {found.random} random draws.",
        ]
    )


def _texts(found: Steering) -> Iterator[tuple[str, str]]:
    """What the model goes on to say, greedy and drawn."""
    for name, one in (("unsteered", found.unsteered), ("steered", found.steered), ("random nodes", found.control)):
        if one is not None:
            yield name, token(one.text)
    if (drawn := found.samples) is not None:
        yield "", f"drawn at temperature {drawn.temperature:g}, top_p {drawn.top_p:g}, seed {drawn.seed}:"
        for name, kind in (("unsteered", "unsteered"), ("steered", "steered"), ("random nodes", "control")):
            for one in getattr(drawn, kind):
                yield name, token(one.text)


def steering_rows(found: Steering) -> Rows:
    """The effects of a steering, a row for each token."""
    rows = []
    for effect in found.effects:
        row: dict[str, Any] = {"token": effect.token, "token_id": effect.token_id, "role": effect.role}
        for name, shift in (("probability", effect.probability), ("logit", effect.logit)):
            spread = shift.control
            row |= {f"{name}_before": shift.before, f"{name}_after": shift.after}
            for end in ("mean", "low", "high"):
                row[f"{name}_random_{end}"] = None if spread is None else getattr(spread, end)
        rows.append(row)
    return Rows.of(rows)


def steering_json(found: Steering) -> str:
    """A steering as JSON: all that it holds."""
    return json.dumps(asdict(found), indent=1, ensure_ascii=False, allow_nan=False)


def evaluation_rows(found: Evaluation) -> Rows:
    """The curves of an evaluation, a row for each size."""
    return Rows.of(list(found.rows()))


def evaluation_json(
    found: Evaluation,
    qualities: Sequence[Quality] = (),
    constant: Sequence[AlwaysOn] | None = None,
    edges: EdgeCurves | None = None,
    groups: Knockouts | None = None,
) -> str:
    """An evaluation as JSON: every curve with its interval, the metric of every prompt, the estimate's quality."""
    content: dict[str, Any] = {name: getattr(found, name).record() for name in CURVES}
    content |= {
        name: getattr(found, name)
        for name in ("sizes", "n_neurons", "n_total", "ablation", "seed", "n_shared", "warnings")
    }
    content |= {name: getattr(found, name).tolist() for name in ("whole", "empty", "inside", "outside", "control")}
    content["estimate"] = [one.record() for one in qualities]
    content["always_on"] = None if constant is None else [vars(one) for one in constant]
    content["sizes_for"] = {f"{level:g}": size.record() for level, size in found.sizes_for.items()}
    content["settles"] = found.settles.record()
    if edges is not None:
        content["edge_curves"] = edges.record()
    if groups is not None:
        content["supernodes"] = groups.record()
    return json.dumps(content, indent=1, allow_nan=False)


def plot_evaluation(found: Evaluation, path: str | Path, title: str) -> Path:
    """Faithfulness and completeness against circuit size, 95 % intervals shaded, random nodes beside them, as a PNG.

    Raises:
        RunError: the file cannot be written.
    """
    lines = figures.three(found, ("faithfulness", "completeness", "random nodes"))
    labels = {"xlabel": "nodes in the circuit", "ylabel": "share of F(model) - F(empty)"}
    return write_page(figures.evaluation_png(lines, printable(title, 90), **labels), path)


def graph_json(graph: Graph) -> str:
    """The whole graph as JSON: the run.json record with nodes and edges in it."""
    content: dict[str, Any] = graph.model_dump(mode="json", exclude={"nodes", "links", "profiles", "settings"})
    content |= {"n_nodes": graph.n_nodes, "n_neurons": graph.n_neurons}
    if isinstance(graph, Traced):
        content["settings"] = graph.settings.record()
    if isinstance(graph, Circuit):
        content["fingerprint"] = graph.fingerprint
    content["nodes"] = graph.nodes.drop_columns("prompt_id").to_pylist()
    for name in ("neuron_tokens", "descriptions"):
        if (known := getattr(graph, name)) is not None:
            content[name] = known.to_pylist()
    if graph.links is not None:
        content["edges"] = graph.links.drop_columns("prompt_id").to_pylist()
    return json.dumps(content, indent=1, ensure_ascii=False)


def graph_rows(graph: Graph, rows: int | None = None) -> Rows:
    """The nodes in the columns of the nodes table; all, or the strongest neurons alone."""
    nodes = graph.nodes.drop_columns("prompt_id")
    if rows is not None:
        nodes = graph.neurons.select(nodes.column_names).slice(0, rows)
    return Rows(nodes.column_names, nodes.to_pylist())


def csv_bytes(rows: Sequence[Mapping[str, Any]], names: Sequence[str] | None = None) -> bytes:
    """Rows as CSV; the first one's keys are the columns, if they are not given."""
    return csv_text(rows, list(rows[0]) if names is None else names).encode()


def heading(circuit: Circuit) -> Facts:
    """What was asked of which model, and whether the answer adds up."""
    chosen, model = circuit.settings, circuit.model
    how = f"{chosen.method}, baseline {chosen.baseline}, basis {chosen.basis}{sheet.options_text(chosen)}"
    size = f"{model.family}, {model.n_layers} layers, d_model {model.d_model}, d_mlp {model.d_mlp}, {model.dtype}"
    metric, places = sheet.metric_text(circuit), sheet.positions_text(circuit)
    return Facts.of(
        [
            ("prompt", f"{sheet.prompt_text(circuit.text)}  ({len(circuit.token_ids)} tokens)"),
            ("model", f"{model.shown} ({size})"),
            ("metric", f"{metric} = {circuit.metric:+.4f} {unit(circuit)}, read at {places}"),
            ("asked", sheet.chances_text(circuit)),
            ("model says", sheet.predictions_text(circuit)),
            ("method", how),
            ("conservation", sheet.conservation_text(circuit)),
        ]
    )


def footer(circuit: Circuit) -> str:
    """How much of the model the circuit is, and what its numbers are."""
    edges = ""
    if circuit.links is not None:
        edges = (
            f"{circuit.n_edges:,} edges kept of {circuit.n_links:,} between the selected nodes; explained is the "
            "part of a node's incoming weight that they hold. "
        )
        if circuit.n_nodes < circuit.n_selected:
            edges += f"{circuit.n_selected - circuit.n_nodes} of the {circuit.n_selected} selected nodes were pruned. "
        if alone := circuit.n_unconnected:
            edges += f"{alone} of the nodes have no kept edge. "
    return (
        f"{circuit.n_nodes} nodes kept of {circuit.n_total:,} ({circuit.n_neurons} unique neurons). "
        f"They hold {circuit.kept_mass:.1%} of the summed |attribution|. {edges}{sheet.nature_text(circuit)}"
    )
