"""What a person reads: a circuit as a table on a terminal, as JSON, as CSV, or as the graph page.

Knows formatting, units and wording. Computes no number beyond shares of the metric, and reads no model.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tracer.circuit.circuit import Circuit, Graph
from tracer.errors import writing
from tracer.reports import figures, viewer
from tracer.settings import RULES

if TYPE_CHECKING:
    from tracer.evaluation.curves import Evaluation
    from tracer.evaluation.quality import AlwaysOn, Quality
    from tracer.evaluation.steering import Steering

NO_DECOMPOSITION = frozenset({"exact", "delta", "random"})

CURVES = ("faithfulness", "completeness", "control_faithfulness", "cpr", "cmd")

METRIC_NAMES = {
    "logit": "logit of",
    "difference": "logit difference",
    "topk": "sum of the top logits",
    "logprob": "log-probability of",
    "centred": "logit above the vocabulary mean of",
}


def circuit_table(circuit: Circuit, rows: int = 20) -> RenderableType:
    """The circuit for a terminal: prompt, metric, conservation, tokens, and the strongest `rows` nodes."""
    parts: list[RenderableType] = [_heading(circuit), _tokens(circuit), _nodes(circuit, rows)]
    if circuit.links is not None:
        parts += [_edges(circuit, rows), _paths(circuit)]
    parts.append(_footer(circuit, rows))
    return Group(*(Padding(part, (0, 0, 1, 0)) for part in parts))


def graph_table(graph: Graph, rows: int = 20) -> RenderableType:
    """An imported graph for a terminal: what it holds, and its strongest edges."""
    grid = Table.grid(padding=(0, 2))
    grid.add_row("[bold]prompt[/]", f"{escape(graph.text)}  [dim]({len(graph.tokens)} tokens)[/]")
    grid.add_row("[bold]imported from[/]", escape(", ".join(f"{name} {value}" for name, value in graph.notes.items())))
    grid.add_row(
        "[bold]holds[/]", f"{graph.nodes.num_rows:,} nodes, {graph.n_edges:,} edges, {len(graph.groups)} groups"
    )
    return Group(grid, "", _edges(graph, rows)) if graph.links is not None else grid


def view(graph: Graph, path: str | Path) -> Path:
    """Write the graph as one self-contained HTML page that needs no network.

    Raises:
        JobError: the circuit was traced without edges. RunError: the file cannot be written.
    """
    return write_page(viewer.page(_payload(graph)), path)


def write_page(content: str | bytes, path: str | Path) -> Path:
    """Write a page or a picture, making its folder.

    Raises:
        RunError: the file cannot be written.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def _payload(graph: Graph) -> viewer.Payload:
    nodes = graph.nodes.to_pydict()
    edges = graph.edges.to_pydict()
    kinds = {"embedding": viewer.EMBEDDING, "logit": viewer.LOGIT, "error": viewer.ERROR}
    named = ("embedding", "logit")

    def floats(values: list[float | None]) -> np.ndarray:
        return np.array([np.nan if value is None else value for value in values], np.float32)

    circuit = graph if isinstance(graph, Circuit) else None
    about: dict[str, Any] = dict(graph.notes)
    if circuit is not None:
        about = {name: value for name, value in circuit.settings.model_dump(mode="json").items() if name != "rules"}
        about |= {
            "rules": ", ".join(sorted(circuit.settings.rules)),
            "conservation": _plain(conservation_text(circuit)),
        }
        about |= {f"model {name}": value for name, value in circuit.model.model_dump().items()}
        about |= {f"kept by {name}": value for name, value in circuit.selection.items()}
    return viewer.Payload(
        title=graph.text,
        model=circuit.model.name if circuit is not None else str(graph.notes.get("scan", "imported")),
        method=circuit.settings.method if circuit is not None else "imported graph",
        metric_text=_plain(metric_text(circuit)) if circuit is not None else "no metric",
        settings=about,
        tokens=list(graph.tokens),
        n_layers=graph.n_layers,
        metric=circuit.metric if circuit is not None else np.nan,
        nodes=viewer.Nodes(
            kind=np.array([kinds.get(kind, viewer.NEURON) for kind in nodes["kind"]], np.uint8),
            layer=np.array(nodes["layer"], np.int16),
            position=np.array(nodes["position"], np.int32),
            neuron=np.array(nodes["neuron"], np.int32),
            activation=floats(nodes["activation"]),
            attribution=floats(nodes["attribution"]),
            explained=floats(nodes["explained"]),
            labels=[name for name, kind in zip(nodes["token"], nodes["kind"], strict=True) if kind in named],
            influence=floats(nodes["influence"]),
        ),
        edges=viewer.Edges(
            source=np.array(edges["source"], np.int32),
            target=np.array(edges["target"], np.int32),
            weight=floats(edges["weight"]),
            share=floats(edges["share"]),
            attribution=floats(edges["attribution"]),
        ),
        groups=graph.groups,
    )


def _plain(markup: str) -> str:
    return Text.from_markup(markup).plain


def evaluation_table(
    found: Evaluation, qualities: Sequence[Quality] = (), constant: Sequence[AlwaysOn] | None = None
) -> RenderableType:
    """An evaluation for a terminal: the curves with their intervals, sizes for given faithfulness, and how good the
    estimate was."""
    table = Table(title="Circuit sizes", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("nodes", "neurons", "faithfulness", "95 %", "completeness", "95 %", "random nodes", "95 %"):
        table.add_column(name, justify="right", no_wrap=True)
    curves = (found.faithfulness, found.completeness, found.control_faithfulness)
    for i, size in enumerate(found.sizes):
        cells = [text for curve in curves for text in (f"{curve.estimate[i]:.3f}", _ends(curve.low[i], curve.high[i]))]
        table.add_row(f"{size:,}", f"{found.n_neurons[i]:,}", *cells)
    levels = Table.grid(padding=(0, 2))
    for level, size in found.sizes_for.items():
        reached = "not reached" if size.estimate is None else f"{size.estimate} nodes"
        levels.add_row(f"faithfulness {level:g}", reached, f"[{size.low or '-'}, {size.high or 'not reached'}]")
    whole, empty = float(found.whole.mean()), float(found.empty.mean())
    about = (
        f"{len(found.whole)} test prompts, {found.ablation} ablation, {found.n_total:,} nodes in all. "
        f"F(model) {whole:+.3f}, F(empty) {empty:+.3f}. Faithfulness is wanted 1, completeness 0; intervals are over "
        "test prompts (bootstrap); random nodes are as many in each layer. Ranking by absolute attribution."
    )
    estimate = Table.grid(padding=(0, 2))
    for one in qualities:
        estimate.add_row("[bold]estimate[/]", str(one))
    for neuron in constant or ():
        estimate.add_row("[bold]always on[/]", str(neuron))
    if constant is not None and not constant:
        estimate.add_row("[bold]always on[/]", "no neuron is strong on unrelated prompts without an effect there")
    return Group(table, "", levels, "", about, "", estimate)


def steering_table(found: Steering) -> RenderableType:
    """A steering for a terminal: probabilities before and after, beside random nodes, and the texts."""
    grid = Table.grid(padding=(0, 2))
    where = "every position, new tokens included" if found.everywhere else "their own positions"
    grid.add_row("[bold]prompt[/]", escape(found.text))
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
        table.add_row(token(effect.token), effect.role, f"{shift.before:.4f}", f"{shift.after:.4f}", *shown)
    texts = Table.grid(padding=(0, 2))
    for name, one in (("unsteered", found.unsteered), ("steered", found.steered), ("random nodes", found.control)):
        if one is not None:
            texts.add_row(f"[bold]{name}[/]", token(one.text))
    verdict = "changed" if found.changed else "did not change"
    about = f"The most probable token {verdict}; it did with {found.control_changed} of {found.random} random draws."
    return Group(grid, "", table, "", texts, "", about)


def evaluation_json(
    found: Evaluation, qualities: Sequence[Quality] = (), constant: Sequence[AlwaysOn] | None = None
) -> str:
    """An evaluation as JSON: every curve with its interval, the metric of every prompt, the estimate's quality."""
    content: dict[str, Any] = {name: getattr(found, name).record() for name in CURVES}
    content |= {name: getattr(found, name) for name in ("sizes", "n_neurons", "n_total", "ablation", "seed")}
    content |= {name: getattr(found, name).tolist() for name in ("whole", "empty", "inside", "outside", "control")}
    content["estimate"] = [one.record() for one in qualities]
    content["always_on"] = None if constant is None else [vars(one) for one in constant]
    content["sizes_for"] = {f"{level:g}": size.record() for level, size in found.sizes_for.items()}
    return json.dumps(content, indent=1, allow_nan=False)


def plot_evaluation(found: Evaluation, path: str | Path, title: str) -> Path:
    """Faithfulness and completeness against circuit size, 95 % intervals shaded, random nodes beside them, as a PNG.

    Raises:
        RunError: the file cannot be written.
    """
    lines = figures.three(found, ("faithfulness", "completeness", "random nodes"))
    labels = {"xlabel": "nodes in the circuit", "ylabel": "share of F(model) - F(empty)"}
    return write_page(figures.evaluation_png(lines, title, **labels), path)


def _ends(low: Any, high: Any) -> str:
    return f"[{float(low):.3f}, {float(high):.3f}]"


def graph_json(graph: Graph) -> str:
    """The whole graph as JSON: the run.json record with nodes and edges in it."""
    content: dict[str, Any] = graph.model_dump(mode="json", exclude={"nodes", "links", "settings"})
    content |= {"n_nodes": graph.n_nodes, "n_neurons": graph.n_neurons}
    if isinstance(graph, Circuit):
        content["settings"] = graph.settings.record()
        content["fingerprint"] = graph.fingerprint
    content["nodes"] = graph.nodes.drop_columns("prompt_id").to_pylist()
    if graph.links is not None:
        content["edges"] = graph.links.drop_columns("prompt_id").to_pylist()
    return json.dumps(content, indent=1, ensure_ascii=False)


def graph_csv(graph: Graph) -> str:
    """The nodes as CSV, one row each, in the columns of the nodes table."""
    nodes = graph.nodes.drop_columns("prompt_id")
    return csv_bytes(nodes.to_pylist(), nodes.column_names).decode()


def csv_bytes(rows: Sequence[Mapping[str, Any]], names: Sequence[str] | None = None) -> bytes:
    """Rows as CSV; the first one's keys are the columns, if they are not given."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]) if names is None else names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def token(text: str) -> str:
    """A token as it is shown: spaces and line ends visible, safe as markup."""
    return escape(repr(text)[1:-1].replace(" ", "␣"))


def metric_text(circuit: Circuit) -> str:
    """What the metric is, in words, with its tokens."""
    logits = circuit.rows("logit")
    name = {row["neuron"]: token(row["token"]) for row in logits}
    targets = ", ".join(name[one] for one in circuit.target_ids)
    kind = METRIC_NAMES[circuit.settings.metric]
    if circuit.settings.metric == "difference":
        return f"{kind} {targets} minus {', '.join(name[one] for one in circuit.foil_ids)}"
    return f"{kind} {targets}"


def conservation_text(circuit: Circuit) -> str:
    """What stays unexplained, and what it says."""
    scale = sum(abs(row["attribution"]) for row in circuit.rows("embedding"))
    relative = abs(circuit.unexplained) / scale if scale else float("nan")
    shown = f"unexplained {circuit.unexplained:+.2e} ({relative:.1e} of the summed |embedding attributions|)"
    if circuit.conserves:
        return f"{shown}: [green]holds[/] (must be below 1e-3)"
    if circuit.start_metric is not None:
        left = circuit.unexplained - circuit.start_metric
        return f"{shown}: {circuit.start_metric:+.4f} is the metric where the path begins, {left:+.2e} unexplained"
    if circuit.settings.method in NO_DECOMPOSITION:
        return f"{shown}: no meaning, {circuit.settings.method} does not split the metric into parts"
    return f"{shown}: what this method leaves unexplained here"


def _heading(circuit: Circuit) -> Table:
    grid = Table.grid(padding=(0, 2))
    settings = circuit.settings
    how = f"{settings.method}, baseline {settings.baseline}, basis {settings.basis}"
    if settings.method == "relp" and settings.rules != RULES:
        how += f", rules {', '.join(sorted(settings.rules)) or 'none'}"
    if settings.method in ("ig", "conductance", "ig-activation"):
        how += f", {settings.steps} steps"
    if settings.method == "random":
        how += f", seed {settings.seed}"
    top = "  ".join(f"{token(one.token)} {one.probability:.3f}" for one in circuit.predictions)
    places = ", ".join(f"{pos} ({token(circuit.tokens[pos])})" for pos in circuit.positions)
    grid.add_row("[bold]prompt[/]", f"{escape(circuit.text)}  [dim]({len(circuit.token_ids)} tokens)[/]")
    grid.add_row("[bold]model[/]", f"{escape(circuit.model.name)} [dim]({_model_size(circuit)})[/]")
    grid.add_row(
        "[bold]metric[/]", f"{metric_text(circuit)} = [bold]{circuit.metric:+.4f}[/] {_unit(circuit)}, read at {places}"
    )
    grid.add_row("[bold]model says[/]", top)
    grid.add_row("[bold]method[/]", how)
    grid.add_row("[bold]conservation[/]", conservation_text(circuit))
    return grid


def _model_size(circuit: Circuit) -> str:
    model = circuit.model
    return f"{model.family}, {model.n_layers} layers, d_model {model.d_model}, d_mlp {model.d_mlp}, {model.dtype}"


def _tokens(circuit: Circuit) -> Table:
    against = "the counterfactual" if _paired_path(circuit) else "zero"
    title = f"Embedding attributions, against {against}"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name, justify in (
        ("position", "right"),
        ("token", "left"),
        ("attribution", "right"),
        ("share of metric", "right"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for row in circuit.rows("embedding"):
        table.add_row(
            str(row["position"]),
            token(row["token"]),
            f"{row['attribution']:+.4f}",
            _share(row["attribution"], circuit),
        )
    return table


def _nodes(circuit: Circuit, rows: int) -> Table:
    table = Table(title="Strongest nodes", title_justify="left", box=None, padding=(0, 2, 0, 0))
    names = [
        "",
        "layer",
        "neuron",
        "polarity",
        "position",
        "token",
        "activation",
        "attribution",
        "share of metric",
    ]
    names += ["explained"] if circuit.links is not None else []
    for name in names:
        table.add_column(name, justify="left" if name in ("polarity", "token") else "right", no_wrap=True)
    for number, row in enumerate(circuit.neurons.slice(0, rows).to_pylist(), start=1):
        table.add_row(
            str(number),
            str(row["layer"]),
            str(row["neuron"]),
            "+" if row["activation"] >= 0 else "-",
            str(row["position"]),
            token(row["token"]),
            f"{row['activation']:+.4f}",
            f"{row['attribution']:+.4f}",
            _share(row["attribution"], circuit),
            *([_number(row["explained"], ".2f")] if circuit.links is not None else []),
        )
    return table


def _edges(circuit: Graph, rows: int) -> Table:
    table = Table(title="Strongest edges", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("source", "", "target", "weight", "share of target", "attribution"):
        table.add_column(name, justify="left" if name in ("source", "", "target") else "right")
    nodes = circuit.nodes.to_pylist()
    for row in circuit.links.slice(0, rows).to_pylist() if circuit.links is not None else ():
        source, target = (node_text(nodes[row[end]]) for end in ("source", "target"))
        values = f"{row['weight']:+.4f}", _number(row["share"], "+.1%"), _number(row["attribution"], "+.4f")
        table.add_row(source, "->", target, *values)
    return table


def _paths(circuit: Circuit, count: int = 5) -> Table:
    table = Table(title="Strongest paths", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("attribution", "share", "from embedding to logit"):
        table.add_column(name, justify="left" if name.startswith("from") else "right")
    nodes = circuit.nodes.to_pylist()
    for path in circuit.paths(count):
        way = " -> ".join(node_text(nodes[one]) for one in path.nodes)
        table.add_row(f"{path.attribution:+.4f}", f"{path.share:+.2%}", way)
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def node_text(node: dict[str, Any]) -> str:
    """A node in a word: layer and neuron, or what it embeds or predicts, at its position."""
    if node["kind"] == "neuron":
        return f"L{node['layer']} N{node['neuron']} @{node['position']} {token(node['token'])}"
    return f"{node['kind']} {token(node['token'])} @{node['position']}"


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
        f"{edges}[dim]{_nature(circuit)}[/]"
    )


def _nature(circuit: Circuit) -> str:
    """What the numbers are, in a sentence."""
    kinds = {
        "exact": "Attributions are true changes of the metric, one node at a time",
        "delta": "A control, no attribution",
        "random": "A control, no attribution",
    }
    what = kinds.get(circuit.settings.method, "Attributions are first-order estimates")
    text = f"{what}, in {_unit(circuit)}; they overlap between layers and do not add up."
    if circuit.links is not None and circuit.settings.method != "relp":
        text += " Edges are RelP's, whatever the method."
    if circuit.metric < 0:
        text += " The metric is negative: a positive share pushes it down."
    return text


def _unit(circuit: Circuit) -> str:
    return "nats" if circuit.settings.metric == "logprob" else "logits"


def _paired_path(circuit: Circuit) -> bool:
    """Whether embeddings, too, are compared with the counterfactual's: gradients at the prompt itself are not."""
    return circuit.settings.baseline == "counterfactual" and circuit.settings.method not in ("relp", "grad", "random")


def _share(attribution: float, circuit: Circuit) -> str:
    return f"{attribution / circuit.metric:+.1%}" if circuit.metric else "-"
