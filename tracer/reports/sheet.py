"""Tables of a circuit and its evaluation as rows of text, for a terminal and for a page, and the words both use.

Knows columns, formats, units and wording. Computes no number beyond shares of the metric. Refuses to know how a table
is drawn (reports/tables.py, reports/document.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tracer.circuit.circuit import Circuit, Graph
from tracer.circuit.names import node_text, token
from tracer.circuit.said import Said
from tracer.errors import option
from tracer.reports.parts import PAGE, TERMINAL, Bar, Column, Sheet
from tracer.settings import PATH_METHODS, RULED_METHODS, RULES, Settings, rules_name
from tracer.text import LONG, printable

if TYPE_CHECKING:
    from tracer.evaluation.curves import Curves, Evaluation
    from tracer.evaluation.edge_curves import EdgeCurves
    from tracer.evaluation.knockouts import Knockouts
    from tracer.evaluation.quality import AlwaysOn

METRIC_NAMES = {
    "logit": "logit of",
    "difference": "logit difference",
    "topk": "sum of the top logits",
    "share": "mean logit, weighed by probability, of",
    "logprob": "log-probability of",
    "centred": "logit above the vocabulary mean of",
    "neuron": "value of",
    "direction": "product with the",
}
UNITS = {"logprob": "nats", "neuron": "units of the neuron", "direction": "units of the direction"}
"""Of metrics that are not in logits."""
ABLATIONS = {
    "zero": "zero",
    "mean": "the mean over reference prompts",
    "counterfactual": "the value on the counterfactual prompt",
    "resample": "the value on a random reference prompt",
}
"""What takes the place of a node that is switched off."""
NO_DECOMPOSITION = frozenset({"exact", "delta", "random"})


def embeddings(circuit: Circuit, count: int | None = None) -> Sheet:
    """What each token of the prompt contributes, in their order; of more than `count` those that contribute most."""
    rows = every = circuit.rows("embedding")
    if count is not None:
        strongest = sorted(every, key=lambda row: -abs(row["attribution"]))[:count]
        rows = sorted(strongest, key=lambda row: row["position"])
    against = "the counterfactual" if _paired_path(circuit) else "zero"
    columns = [POSITION, "<token", Column("attribution", unit=unit(circuit)), BAR, "share of metric"]
    drawn = bars([row["attribution"] for row in rows])
    cells = [
        (str(row["position"]), token(row["token"]), f"{row['attribution']:+.4f}", bar, _share(row, circuit))
        for row, bar in zip(rows, drawn, strict=True)
    ]
    few = f", the {len(rows):,} largest of {len(every):,}" if len(rows) < len(every) else ""
    return Sheet.of("embeddings", f"Embedding attributions, against {against}{few}", columns, cells).of_all(len(every))


def nodes(circuit: Circuit, count: int, always_on: Sequence[AlwaysOn] = ()) -> Sheet:
    """The strongest neurons; those that are always on are noted where there is one."""
    rows = circuit.neurons.slice(0, count).to_pylist()
    columns = ["", "layer", "neuron", Column("polarity", left=True, only=TERMINAL, short="sign"), POSITION]
    columns += ["<token", "activation"]
    columns += [Column("attribution", unit=unit(circuit)), BAR, "share of metric"]
    columns += ["explained"] if circuit.links is not None else []
    columns += [SAYS] if (said := Said.of(circuit)) else []
    known = {(one.layer, one.neuron) for one in always_on} & {(row["layer"], row["neuron"]) for row in rows}
    columns += [Column("note", left=True, only=PAGE)] if known else []
    cells = []
    for rank, (row, bar) in enumerate(zip(rows, bars([row["attribution"] for row in rows]), strict=True), start=1):
        cell: list[str | Bar] = [str(rank), str(row["layer"]), said.numbering.short(row["layer"], row["neuron"])]
        cell += ["+" if row["activation"] >= 0 else "-", str(row["position"]), token(row["token"])]
        cell += [f"{row['activation']:+.4f}", f"{row['attribution']:+.4f}", bar, _share(row, circuit)]
        cell += [number(row["explained"], ".2f")] if circuit.links is not None else []
        cell += [says(said, row)] if said else []
        cell += ["always on" if (row["layer"], row["neuron"]) in known else ""] if known else []
        cells.append(cell)
    return Sheet.of("nodes", "Strongest nodes", columns, cells).of_all(circuit.n_nodes)


def graph_nodes(graph: Graph, count: int) -> Sheet:
    """The strongest neurons of a graph that is no circuit of one prompt's."""
    rows = graph.neurons.slice(0, count).to_pylist()
    heads = [
        "",
        "layer",
        "neuron",
        POSITION,
        "<token",
        "mean attribution" if "circuit" in graph.notes else "attribution",
        *([SAYS] if (said := Said.of(graph)) else []),
    ]
    cells = [
        (
            *(str(rank), str(row["layer"]), said.numbering.short(row["layer"], row["neuron"])),
            "any" if row["position"] < 0 else str(row["position"]),
            token(row["token"]),
            number(row["attribution"], "+.4f"),
            *([says(said, row)] if said else []),
        )
        for rank, row in enumerate(rows, start=1)
    ]
    title = f"The {len(rows):,} strongest of {graph.n_nodes:,} nodes"
    return Sheet.of("nodes", title, heads, cells).of_all(len(graph.neurons))


def edges(graph: Graph, count: int) -> Sheet:
    """The strongest edges."""
    places, numbering = graph.nodes.to_pylist(), graph.numbering
    rows = graph.links.slice(0, count).to_pylist() if graph.links is not None else []
    columns = ["<source", Column("", left=True, only=TERMINAL), "<target", "weight", "share of target"]
    columns += [Column("attribution", unit=unit(graph) if isinstance(graph, Circuit) else ""), BAR]
    cells = [
        (
            node_text(places[row["source"]], numbering, graph.labels.get(row["source"], "")),
            "->",
            node_text(places[row["target"]], numbering, graph.labels.get(row["target"], "")),
            f"{row['weight']:+.4f}",
            number(row["share"], "+.1%"),
            number(row["attribution"], "+.4f"),
            bar,
        )
        for row, bar in zip(rows, bars([row["attribution"] for row in rows]), strict=True)
    ]
    return Sheet.of("edges", "Strongest edges", columns, cells).of_all(graph.n_edges)


def paths(circuit: Circuit, count: int) -> Sheet:
    """The strongest paths from a token of the prompt to a logit; that there are more is said, but not how many: there
    can be more than could be counted.

    Raises:
        JobError: as `Circuit.paths`.
    """
    named = [node_text(node, circuit.numbering) for node in circuit.nodes.to_pylist()]
    rows = [
        (number(path.attribution, "+.4f"), f"{path.share:+.2%}", " -> ".join(named[i] for i in path.nodes))
        for path in circuit.paths(count + 1)
    ]
    columns = [Column("attribution", unit=unit(circuit)), "share", "<from embedding to logit"]
    found = Sheet.of("paths", "Strongest paths", columns, rows[:count])
    more = f"there are more; {option('rows', 4 * max(count, PATHS))} shows as many"
    return replace(found, more=more) if len(rows) > count else found


PATHS = 5
"""Paths that are shown where nothing else is asked for."""


def curves(found: Curves) -> Sheet:
    """Every size that was measured."""
    three = (found.faithfulness, found.completeness, found.control_faithfulness)
    columns = ["nodes", "neurons", "faithfulness", "&95 %", "completeness", "&95 %", "random nodes", "&95 %"]
    rows = []
    for i, size in enumerate(found.sizes):
        values = [(float(one.estimate[i]), float(one.low[i]), float(one.high[i])) for one in three]
        cells = (text for estimate, low, high in values for text in (decimal(estimate), ends(low, high)))
        rows.append((f"{size:,}", f"{found.n_neurons[i]:,}", *cells))
    return Sheet.of("curves", "Circuit sizes", columns, rows)


def edge_curves(found: EdgeCurves) -> Sheet:
    """What each share of the edges leaves, and what as many of the strongest neurons do."""
    heads = ("edges kept", "edges", "nodes left", "faithfulness", "&95 %", "completeness", "&95 %")
    heads = (*heads, "strongest nodes' faithfulness", "&95 %", "random nodes")
    rows = []
    for row in found.rows():
        cells = [f"{row['share']:.0%}", f"{row['n_edges']:,}", f"{row['n_nodes']:,}"]
        for name in ("faithfulness", "completeness", "attribution_faithfulness"):
            values = [row[name], row[f"{name}_low"], row[f"{name}_high"]]
            low, high = (math.nan if value is None else value for value in values[1:])
            cells += ["-", ""] if values[0] is None else [decimal(values[0]), ends(low, high)]
        cells.append("-" if row["control"] is None else decimal(row["control"]))
        rows.append(tuple(cells))
    return Sheet.of("edge-curves", "The strongest edges alone", heads, rows)


# ------------------------------------------------------------------------------------------ cells


BAR = Column("", left=True, only=PAGE)
POSITION = Column("position", short="pos")
SAYS = Column("promotes", left=True)
"""What a neuron does: the tokens that it promotes most, or its description."""


def says(said: Said, row: Mapping[str, Any]) -> str:
    """The cell of `SAYS` of a neuron's row: `layer`, `neuron` and its `activation`."""
    return printable(said.label(row))


def knockouts(found: Knockouts) -> Sheet:
    """What each group of a circuit's nodes is worth."""
    whole = found.circuit
    columns = ("<supernode", "nodes", "its cost", "&95 %", "alone", "&95 %", "model without it", "&95 %")
    cells = [
        (
            *(row["name"], f"{row['n_nodes']:,}"),
            *(
                text
                for name in ("cost", "alone", "left")
                for text in (decimal(row[name]), _between(row[f"{name}_low"], row[f"{name}_high"]))
            ),
        )
        for row in found.rows()
    ]
    title = (
        f"What each supernode is worth: shares of F(model) - F(empty). Cost: what the circuit, which holds "
        f"{decimal(float(whole.estimate))}, loses without it"
    )
    return Sheet.of("knockouts", title, columns, cells)


def _between(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else ends(low, high)


def bars(values: Sequence[float | None]) -> list[Bar]:
    """Bars on one scale, which reaches from the lowest value, or 0, to the highest, or 0."""
    known = [value if value is not None and math.isfinite(value) else 0.0 for value in values]
    low, high = min([0.0, *known]), max([0.0, *known])
    span = (high - low) or 1.0

    def percent(length: float) -> float:
        return round(100 * length / span, 1)

    return [
        Bar(percent(min(one, 0.0) - low), percent(abs(one)), percent(-low), "plus" if one >= 0 else "minus")
        for one in known
    ]


def _share(row: dict[str, Any], circuit: Circuit) -> str:
    return "-" if circuit.cancels or not circuit.metric else f"{row['attribution'] / circuit.metric:+.1%}"


def number(value: float | None, form: str) -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else format(value, form)


def probability(value: float) -> str:
    """A probability, small ones with two digits."""
    return f"{value:.3f}" if value >= 0.01 else f"{value:.2g}"


def decimal(value: float) -> str:
    """A share with three decimals."""
    return "undefined" if math.isnan(value) else f"{value:z.3f}"  # z: no minus before 0.000


def ends(low: float, high: float) -> str:
    """An interval; a dash where there is none."""
    return "-" if math.isnan(low) and math.isnan(high) else f"[{decimal(low)}, {decimal(high)}]"


def prompt_text(text: str) -> str:
    """A prompt on one line; of a very long one the beginning, with how much of it that is."""
    if len(text) <= LONG:
        return printable(text)
    return f"{printable(text[:LONG])} ... ({len(text) - LONG:,} more characters, which json holds)"


def quoted_token(text: str) -> str:
    """A token within a sentence."""
    return f"“{token(text)}”"


# ------------------------------------------------------------------------------------------ wording


def metric_text(circuit: Circuit, named: Callable[[str], str] = token) -> str:
    """What the metric is, in words, with its tokens, or with what it is of inside the model."""
    of = circuit.settings.of
    if of is not None:
        return f"{'negative ' * (of.name[-1] == '-')}{METRIC_NAMES[of.kind]} {printable(of.name.rstrip('-'))}"
    if circuit.answer:
        words = "".join(row["token"] for row in sorted(circuit.rows("logit"), key=lambda row: row["position"]))
        return f"summed {METRIC_NAMES[circuit.settings.metric]} the answer {named(words)}"
    name = {row["neuron"]: named(row["token"]) for row in circuit.rows("logit")}
    targets, foils = (", ".join(name[one] for one in ids) for ids in (circuit.target_ids, circuit.foil_ids))
    text = f"{METRIC_NAMES[circuit.settings.metric]} {targets}"
    return f"{text} minus {foils}" if circuit.settings.metric == "difference" else text


def chances_text(circuit: Circuit, named: Callable[[str], str] = token) -> str:
    """How likely the model finds what was asked, and how many tokens it finds likelier; of what is inside the model its
    value."""
    if circuit.settings.of is not None:
        return "  ".join(f"{printable(row['token'])} = {row['activation']:+.4f}" for row in circuit.ends)
    rows, ranks = circuit.rows("logit"), circuit.ranks or (None,) * len(circuit.probabilities)
    several = len(circuit.positions) > 1
    return "  ".join(
        f"p({named(row['token'])}"
        + (f" @{row['position']}" if several else "")
        + f") = {probability(chance)}"
        + (f", number {rank:,}" if rank else "")
        for row, chance, rank in zip(rows, circuit.probabilities, ranks, strict=True)
    )


def positions_text(circuit: Circuit, named: Callable[[str], str] = token) -> str:
    """Where the metric is read."""
    return ", ".join(f"{at} ({named(circuit.tokens[at])})" for at in circuit.positions)


def predictions_text(circuit: Circuit, named: Callable[[str], str] = token) -> str:
    """The most likely next tokens with their probabilities."""
    return "  ".join(f"{named(one.token)} {one.probability:.3f}" for one in circuit.predictions)


SETTLES = "stays within .1 of 1"
"""What is said of the size from which faithfulness does, there and at every larger size that was measured."""


def options_text(chosen: Settings) -> str:
    """What was chosen of a method's own options, if anything; begins with a comma."""
    rules = chosen.method in RULED_METHODS and chosen.rules != RULES
    text = f", rules {rules_name(chosen.rules)}" if rules else ""
    text += f", {chosen.steps} steps" if chosen.method in PATH_METHODS else ""
    return text + (f", seed {chosen.seed}" if chosen.method == "random" else "")


def conservation_text(circuit: Circuit) -> str:
    """What stays unexplained, and what it says."""
    scale = sum(abs(row["attribution"]) for row in circuit.rows("embedding"))
    relative = abs(circuit.unexplained) / scale if scale else float("nan")
    text = f"unexplained {circuit.unexplained:+.2e} ({relative:.1e} of the summed |embedding attributions|)"
    if circuit.conserves:
        return f"{text}: holds (must be below 1e-3)"
    if circuit.start_metric is not None:
        left = circuit.unexplained - circuit.start_metric
        return f"{text}: {circuit.start_metric:+.4f} is the metric where the path begins, {left:+.2e} unexplained"
    if circuit.settings.method in NO_DECOMPOSITION:
        return f"{text}: no meaning, {circuit.settings.method} does not split the metric into parts"
    return f"{text}: what this method leaves unexplained here"


def nature_text(circuit: Circuit) -> str:
    """What the numbers are, in a sentence."""
    kinds = {
        "exact": "Attributions are true changes of the metric, one node at a time",
        "delta": "A control, no attribution",
        "random": "A control, no attribution",
    }
    what = kinds.get(circuit.settings.method, "Attributions are first-order estimates")
    text = f"{what}, in {unit(circuit)}; they overlap between layers and do not add up."
    if circuit.links is not None and circuit.settings.method != "relp":
        text += " Edges are RelP's, whatever the method."
    if circuit.metric < 0:
        text += " The metric is negative: a positive share pushes it down."
    if circuit.cancels:
        text += " The metric is near 0 beside what the tokens give it: shares of it are left out."
    return text


def tested_text(found: Evaluation) -> str:
    """How many test prompts there were, and how many of them the circuit was found on, if any."""
    count, shared = len(found.whole), found.n_shared
    if count == 1:
        return "the prompt that the circuit was found on" if shared else "1 test prompt"
    return f"{count:,} test prompts" + (
        f" ({shared:,} of them prompts that the circuit was found on)" if shared else ""
    )


def is_alone(found: Evaluation) -> bool:
    """Whether there was one test prompt, so that nothing has an interval."""
    return len(found.whole) == 1


def unit(circuit: Circuit) -> str:
    """Of the metric and of attributions."""
    return UNITS.get(circuit.settings.metric, "logits")


def _paired_path(circuit: Circuit) -> bool:
    """Whether embeddings, too, are compared with the counterfactual's: gradients at the prompt itself are not."""
    return circuit.settings.baseline == "counterfactual" and circuit.settings.method not in ("relp", "grad", "random")
