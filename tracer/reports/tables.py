"""What a person reads: a circuit as a table on a terminal, as JSON, as CSV, or as the graph page.

Knows layout and files. Refuses to know units and wording (reports/sheet.py); computes no number and reads no model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from tracer.circuit.circuit import ATTENTION_ERROR, ENDS, Circuit, Graph, Traced
from tracer.circuit.said import Said, key_of
from tracer.errors import JobError, option, say, writing
from tracer.reports import figures, sheet, viewer
from tracer.reports.sheet import TERMINAL, Sheet, token, unit
from tracer.system import wholefile
from tracer.text import LONG, csv_text, printable

if TYPE_CHECKING:
    from tracer.evaluation.curves import Evaluation
    from tracer.evaluation.edge_curves import EdgeCurves
    from tracer.evaluation.knockouts import Knockouts
    from tracer.evaluation.quality import AlwaysOn, Quality
    from tracer.evaluation.steering import Steering

PATHS = 5
TOKEN_LISTS = {"promoted": "promotes", "suppressed": "suppresses", "driven_by": "driven by"}
"""Columns of `schemas.TOKENS`, and their headings."""
CURVES = ("faithfulness", "completeness", "control_faithfulness", "cpr", "cmd")


def circuit_table(circuit: Circuit, rows: int = 20) -> RenderableType:
    """The circuit for a terminal: prompt, metric, conservation, tokens, and the strongest `rows` nodes."""
    parts: list[RenderableType] = [_heading(circuit), sheet_table(sheet.embeddings(circuit), no_wrap=False)]
    parts.append(sheet_table(sheet.nodes(circuit, rows)))
    if circuit.links is not None:
        parts += [
            sheet_table(found, no_wrap=False) for found in (sheet.edges(circuit, rows), sheet.paths(circuit, PATHS))
        ]
    parts.append(_footer(circuit, rows))
    return Group(*(Padding(part, (0, 0, 1, 0)) for part in parts))


def sheet_table(found: Sheet, no_wrap: bool = True) -> Table:
    """A sheet for a terminal."""
    shown = found.on(TERMINAL)
    table = Table(title=shown.title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in shown.columns:
        table.add_column(
            column.head, justify="left" if column.left else "right", no_wrap=no_wrap and column != sheet.SAYS
        )
    for row in shown.rows:
        table.add_row(*(cell(str(value)) for value in row))
    return table


def sheets_table(found: Sequence[Sheet]) -> RenderableType:
    """Sheets for a terminal, one under the other."""
    return Group(*(Padding(sheet_table(one, no_wrap=False), (0, 0, 1, 0)) for one in found))


def cell(text: str) -> str:
    """A user's or a model's text for a cell, a title or a line of rich's: nothing in it is a command of a terminal or
    markup, and a very long one is cut."""
    return escape(printable(text, LONG))


def graph_table(graph: Graph, rows: int = 20) -> RenderableType:
    """An imported graph, or one out of a run over many prompts, for a terminal: what it holds, and its strongest edges;
    of a dataset's circuit the strongest nodes too, and without edges these alone."""
    grid = Table.grid(padding=(0, 2))
    free = graph.notes.get("circuit") == "free"
    length = "at any position" if free else f"{len(graph.tokens)} tokens"
    grid.add_row("[bold]prompt[/]", f"{cell(graph.text)}  [dim]({length})[/]")
    origin = "of" if isinstance(graph, Traced) else "imported from"
    grid.add_row(f"[bold]{origin}[/]", cell(", ".join(f"{name} {value}" for name, value in graph.notes.items())))
    if isinstance(graph, Traced):
        made = graph.settings
        how = f"{made.method}, baseline {made.baseline}, basis {made.basis}{sheet.options_text(made)}"
        grid.add_row("[bold]model[/]", cell(f"{graph.model.name} ({graph.model.dtype}), metric {made.metric}, {how}"))
    grid.add_row(
        "[bold]holds[/]", f"{graph.nodes.num_rows:,} nodes, {graph.n_edges:,} edges, {len(graph.groups)} groups"
    )
    if graph.links is None:
        return Group(grid, "", sheet_table(sheet.graph_nodes(graph, rows)))
    if "circuit" in graph.notes:
        both = sheet_table(sheet.graph_nodes(graph, rows)), sheet_table(sheet.edges(graph, rows), no_wrap=False)
        return Group(grid, "", both[0], "", both[1])
    return Group(grid, "", sheet_table(sheet.edges(graph, rows), no_wrap=False))


def view(graph: Graph, path: str | Path) -> Path:
    """Write the graph as one self-contained HTML page that needs no network; one without edges shows nodes alone, which
    is said.

    Raises:
        JobError: the graph has more than the page can draw, or no positions, by which it is drawn.
        RunError: the file cannot be written.
    """
    content = graph_page(graph)
    if graph.links is None:
        say(["the graph has no edges: the page shows nodes alone"])
    return write_page(content, path)


def graph_page(graph: Graph, most: int = viewer.MOST_EDGES) -> str:
    """The page of `view`.

    Args:
        most: edges that it may have.

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
    return viewer.page(payload(graph))


def write_page(content: str | bytes, path: str | Path) -> Path:
    """Write a page or a picture, making its folder.

    Raises:
        RunError: the file cannot be written.
    """
    with writing(path):
        return wholefile.write(path, content)


def payload(graph: Graph) -> viewer.Payload:
    """What the page draws."""
    circuit = graph if isinstance(graph, Circuit) else None
    return viewer.Payload(
        title=graph.text,
        model=graph.model.name if isinstance(graph, Traced) else str(graph.notes.get("scan", "imported")),
        method=graph.settings.method if isinstance(graph, Traced) else "imported graph",
        metric_text=_metric_text(graph),
        settings=_about(graph),
        tokens=list(graph.tokens),
        n_layers=graph.n_layers,
        metric=circuit.metric if circuit is not None else np.nan,
        cancels=circuit is not None and circuit.cancels,
        circuit=getattr(graph, "fingerprint", None),
        nodes=_nodes(graph),
        edges=_edges(graph),
        groups=graph.groups,
    )


def _about(graph: Graph) -> dict[str, Any]:
    """What the page says of how a graph was made."""
    if not isinstance(graph, Traced):
        return dict(graph.notes)
    how = {name: value for name, value in graph.settings.model_dump(mode="json").items() if name != "rules"}
    if not isinstance(graph, Circuit):
        return dict(graph.notes) | how
    how |= {
        "rules": ", ".join(sorted(graph.settings.rules)),
        "asked": sheet.chances_text(graph),
        "conservation": sheet.conservation_text(graph),
    }
    how |= {f"model {name}": value for name, value in graph.model.model_dump().items()}
    how |= {f"kept by {name}": value for name, value in graph.selection.items()}
    return how | {f"note {number}": text for number, text in enumerate(graph.warnings, 1)}


def _nodes(graph: Graph) -> viewer.Nodes:
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
        says=dict(_says(graph)),
        experts=_experts(graph),
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
            yield row, sheet.node_name(node, numbering) + (f": {label}" if label else "")


def _says(graph: Graph) -> Iterator[tuple[int, viewer.Says]]:
    """What is known of its neurons, by row of the nodes."""
    if not (said := Said.of(graph)):
        return
    rows = graph.nodes.select(["kind", "layer", "neuron", "activation"]).to_pylist()
    for at, row in enumerate(rows):
        if row["kind"] == "neuron" and (label := said.label(row)):
            yield at, viewer.Says(label, tuple(_token_lists(said, row)))


def _experts(graph: Graph) -> dict[int, tuple[int, int]]:
    """The expert, and the number in it, of its neurons that belong to one, by row of the nodes."""
    if not (numbering := graph.numbering):
        return {}
    rows = graph.nodes.select(["kind", "layer", "neuron"]).to_pylist()
    split = {at: numbering.split(row["layer"], row["neuron"]) for at, row in enumerate(rows) if row["kind"] == "neuron"}
    return {at: (one.expert, one.neuron) for at, one in split.items() if one.expert is not None}


def _token_lists(said: Said, row: Mapping[str, Any]) -> Iterator[tuple[str, tuple[tuple[str, float], ...]]]:
    """A neuron's lists of tokens with their numbers, each under its heading; those of both polarities where the node's
    is not known."""
    keys = key_of(row)
    for key in keys:
        tokens = said.tokens.get(key, {})
        for name, heading in TOKEN_LISTS.items():
            if tokens.get(name):
                sign = "" if len(keys) == 1 else f" ({'+' if key.polarity > 0 else '-'})"
                yield heading + sign, tuple(zip(tokens[name], tokens[f"{name}_values"], strict=True))


def evaluation_table(
    found: Evaluation,
    qualities: Sequence[Quality] = (),
    constant: Sequence[AlwaysOn] | None = None,
    edges: EdgeCurves | None = None,
    groups: Knockouts | None = None,
) -> RenderableType:
    """An evaluation for a terminal: the curves with their intervals, sizes for given faithfulness, how good the
    estimate was, what the strongest edges alone hold, and what each group of nodes is worth."""
    levels = Table.grid(padding=(0, 2))
    named = [(f"faithfulness {level:g}", size) for level, size in found.sizes_for.items()]
    for name, size in (*named, (sheet.SETTLES, found.settles)):
        reached = "not reached" if size.estimate is None else f"{size.estimate} nodes"
        span = "" if sheet.is_alone(found) else f"[{size.low or '-'}, {size.high or 'not reached'}]"
        levels.add_row(name, reached, span)
    how = "one prompt has no intervals" if sheet.is_alone(found) else "intervals are over test prompts (bootstrap)"
    whole, empty = float(found.whole.mean()), float(found.empty.mean())
    about = (
        f"{sheet.tested_text(found)}, {found.ablation} ablation, {found.n_total:,} "
        f"nodes in all. F(model) {whole:+.3f}, F(empty) {empty:+.3f}. Faithfulness is wanted 1, completeness 0; "
        f"{how}; random nodes are as many in each layer. Ranking by absolute attribution."
    )
    estimate = Table.grid(padding=(0, 2))
    for one in qualities:
        estimate.add_row("[bold]estimate[/]", cell(str(one)))
    for neuron in constant or ():
        estimate.add_row("[bold]always on[/]", cell(str(neuron)))
    if constant is not None and not constant:
        estimate.add_row("[bold]always on[/]", "no neuron is strong on unrelated prompts without an effect there")
    more: list[RenderableType] = [] if edges is None else ["", sheet_table(sheet.edge_curves(edges), no_wrap=False)]
    more += [] if groups is None else ["", sheet_table(sheet.knockouts(groups), no_wrap=False)]
    return Group(sheet_table(sheet.curves(found)), "", levels, "", about, "", estimate, *more)


def steering_table(found: Steering) -> RenderableType:
    """A steering for a terminal: probabilities before and after, beside random nodes, and the texts."""
    grid = Table.grid(padding=(0, 2))
    where = "every position, new tokens included" if found.everywhere else "their own positions"
    grid.add_row("[bold]prompt[/]", cell(found.text))
    grid.add_row(
        "[bold]action[/]", f"{found.action.kind} {found.action.amount:g} on {found.n_neurons} neurons at {where}"
    )
    table = Table(title="Next token", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("token", "asked as", "before", "after", "random nodes", "their range"):
        table.add_column(name, justify="left" if name in ("token", "asked as") else "right", no_wrap=True)
    for effect in found.effects:
        shift = effect.probability
        spread = shift.control
        shown = ("-", "-") if spread is None else (f"{spread.mean:.4f}", f"[{spread.low:.4f}, {spread.high:.4f}]")
        table.add_row(cell(token(effect.token)), effect.role, f"{shift.before:.4f}", f"{shift.after:.4f}", *shown)
    texts = Table.grid(padding=(0, 2))
    for name, one in (("unsteered", found.unsteered), ("steered", found.steered), ("random nodes", found.control)):
        if one is not None:
            texts.add_row(f"[bold]{name}[/]", cell(token(one.text)))
    if found.samples is not None:
        how = f"temperature {found.samples.temperature:g}, top_p {found.samples.top_p:g}, seed {found.samples.seed}"
        texts.add_row("", f"[dim]drawn at {how}:[/]")
        kinds = ("unsteered", "steered", "control")
        for name, kind in zip(("unsteered", "steered", "random nodes"), kinds, strict=True):
            for one in getattr(found.samples, kind):
                texts.add_row(f"[bold]{name}[/]", cell(token(one.text)))
    verdict = "changed" if found.changed else "did not change"
    about = f"The most probable token {verdict}; it did with {found.control_changed} of {found.random} random draws."
    return Group(grid, "", table, "", texts, "", about)


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


def graph_csv(graph: Graph) -> str:
    """The nodes as CSV, one row each, in the columns of the nodes table."""
    nodes = graph.nodes.drop_columns("prompt_id")
    return csv_bytes(nodes.to_pylist(), nodes.column_names).decode()


def csv_bytes(rows: Sequence[Mapping[str, Any]], names: Sequence[str] | None = None) -> bytes:
    """Rows as CSV; the first one's keys are the columns, if they are not given."""
    return csv_text(rows, list(rows[0]) if names is None else names).encode()


def _heading(circuit: Circuit) -> Table:
    grid = Table.grid(padding=(0, 2))
    chosen = circuit.settings
    how = f"{chosen.method}, baseline {chosen.baseline}, basis {chosen.basis}{sheet.options_text(chosen)}"
    metric, places = cell(sheet.metric_text(circuit)), cell(sheet.positions_text(circuit))
    grid.add_row("[bold]prompt[/]", f"{cell(circuit.text)}  [dim]({len(circuit.token_ids)} tokens)[/]")
    grid.add_row("[bold]model[/]", f"{cell(circuit.model.shown)} [dim]({cell(_model_size(circuit))})[/]")
    grid.add_row("[bold]metric[/]", f"{metric} = [bold]{circuit.metric:+.4f}[/] {unit(circuit)}, read at {places}")
    grid.add_row("[bold]asked[/]", cell(sheet.chances_text(circuit)))
    grid.add_row("[bold]model says[/]", cell(sheet.predictions_text(circuit)))
    grid.add_row("[bold]method[/]", how)
    grid.add_row("[bold]conservation[/]", sheet.conservation_text(circuit).replace(" holds ", " [green]holds[/] "))
    return grid


def _model_size(circuit: Circuit) -> str:
    model = circuit.model
    return f"{model.family}, {model.n_layers} layers, d_model {model.d_model}, d_mlp {model.d_mlp}, {model.dtype}"


def _footer(circuit: Circuit, rows: int) -> str:
    more = f"; {circuit.n_nodes - rows} more not shown" if circuit.n_nodes > rows else ""
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
        f"{circuit.n_nodes} nodes kept of {circuit.n_total:,} ({circuit.n_neurons} unique neurons){more}. "
        f"They hold {circuit.kept_mass:.1%} of the summed |attribution|. "
        f"{edges}[dim]{sheet.nature_text(circuit)}[/]"
    )
