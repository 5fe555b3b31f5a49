"""What a person reads: a circuit as a table on a terminal, as JSON or as CSV.

Knows formatting, units and wording. Computes no number beyond shares of the metric, and reads no model.
"""

from __future__ import annotations

import csv
import io
import json
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from tracer.circuit import Circuit
from tracer.config import RULES

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


def circuit_json(circuit: Circuit) -> str:
    """The whole circuit as JSON: the run.json record with nodes and edges in it."""
    content: dict[str, Any] = circuit.model_dump(mode="json", exclude={"nodes", "links", "settings"})
    content["settings"] = circuit.settings.model_dump(mode="json") | {"rules": sorted(circuit.settings.rules)}
    content |= {
        "n_nodes": circuit.n_nodes,
        "n_neurons": circuit.n_neurons,
        "fingerprint": circuit.fingerprint,
    }
    content["nodes"] = circuit.nodes.drop_columns("prompt_id").to_pylist()
    if circuit.links is not None:
        content["edges"] = circuit.links.drop_columns("prompt_id").to_pylist()
    return json.dumps(content, indent=1, ensure_ascii=False)


def circuit_csv(circuit: Circuit) -> str:
    """The nodes as CSV, one row each, in the columns of the nodes table."""
    out = io.StringIO()
    names = [name for name in circuit.nodes.column_names if name != "prompt_id"]
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(circuit.nodes.select(names).to_pylist())
    return out.getvalue()


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
    """The residual, and what it says."""
    scale = sum(abs(row["attribution"]) for row in circuit.rows("embedding"))
    relative = abs(circuit.residual) / scale if scale else float("nan")
    shown = f"residual {circuit.residual:+.2e} ({relative:.1e} of the summed |embedding attributions|)"
    if circuit.conserves:
        return f"{shown}: [green]holds[/] (must be below 1e-3)"
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
    grid.add_row("[bold]metric[/]", f"{metric_text(circuit)} = [bold]{circuit.metric:+.4f}[/] logits, read at {places}")
    grid.add_row("[bold]model says[/]", top)
    grid.add_row("[bold]method[/]", how)
    grid.add_row("[bold]conservation[/]", conservation_text(circuit))
    return grid


def _model_size(circuit: Circuit) -> str:
    model = circuit.model
    return f"{model.family}, {model.n_layers} layers, d_model {model.d_model}, d_mlp {model.d_mlp}, {model.dtype}"


def _tokens(circuit: Circuit) -> Table:
    table = Table(title="Embedding attributions", title_justify="left", box=None, padding=(0, 2, 0, 0))
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
        table.add_column(name, justify="left" if name in ("polarity", "token") else "right")
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
            *([f"{row['explained']:.2f}"] if circuit.links is not None else []),
        )
    return table


def _edges(circuit: Circuit, rows: int) -> Table:
    table = Table(title="Strongest edges", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("source", "", "target", "weight", "share of target", "attribution"):
        table.add_column(name, justify="left" if name in ("source", "", "target") else "right")
    nodes = circuit.nodes.to_pylist()
    for row in circuit.links.slice(0, rows).to_pylist() if circuit.links is not None else ():
        source, target = (node_text(nodes[row[end]]) for end in ("source", "target"))
        values = f"{row['weight']:+.4f}", f"{row['share']:+.1%}", f"{row['attribution']:+.4f}"
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
    return (
        f"{circuit.n_nodes} nodes kept of {circuit.n_total:,} ({circuit.n_neurons} unique neurons){more}. "
        f"They hold {circuit.kept_mass:.1%} of the summed |attribution|. "
        f"{edges}[dim]Attributions are first-order estimates in logits; "
        "they overlap between layers and do not add up.[/]"
    )


def _share(attribution: float, circuit: Circuit) -> str:
    return f"{attribution / circuit.metric:+.1%}" if circuit.metric else "-"
