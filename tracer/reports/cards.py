"""Results in short: a line, a few facts, and tables that are made when they are looked at.

Knows what matters of each kind of result. Finds it by the names of its classes, so that nothing is imported for a
circuit that was read from a folder but what draws it. Refuses to know how a card looks (reports/notebook.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from tracer.reports import sheet
from tracer.reports.sheet import Sheet, decimal, ends, number, token
from tracer.text import printable

ROWS = 10
SHORT = 60
"""Characters of a text in a line."""


class Card(NamedTuple):
    """A result in short.

    Attributes:
        line: all of it in a line. facts: names and what they are. tables: makes its tables.
    """

    line: str
    facts: tuple[tuple[str, str], ...] = ()
    tables: Callable[[], Iterable[Sheet]] = tuple


def card_of(result: Any, rows: int = ROWS) -> Card:
    """A result's card; of something else its class alone.

    Args:
        rows: of a circuit's tables.
    """
    for kind in type(result).__mro__:
        if kind.__name__ in _CARDS:
            return _CARDS[kind.__name__](result, rows)
    return Card(f"<{type(result).__name__}>")


def quote(text: str, limit: int = SHORT) -> str:
    """A text in a line, in quotes."""
    return f'"{printable(text, limit)}"'


def count(number: int, what: str) -> str:
    """So many of them."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _circuit(found: Any, rows: int) -> Card:
    nodes = f"{count(found.n_nodes, 'node')}, {count(found.n_edges, 'edge')}"
    metric = f"{sheet.metric_text(found)} = {found.metric:+.4f} {sheet.unit(found)}"
    how = f"{found.settings.method}, baseline {found.settings.baseline}, basis {found.settings.basis}"
    facts = (
        ("prompt", found.text),
        ("model", f"{found.model.shown} ({found.model.dtype})"),
        ("metric", metric),
        ("asked", sheet.chances_text(found)),
        ("model says", sheet.predictions_text(found)),
        ("method", how + sheet.options_text(found.settings)),
        ("conservation", sheet.conservation_text(found)),
        ("holds", f"{nodes}; {found.kept_mass:.1%} of the summed |attribution|"),
    )

    def tables() -> Iterable[Sheet]:
        yield sheet.nodes(found, rows)
        if found.links is not None:
            yield sheet.edges(found, rows)

    return Card(f"<Circuit of {quote(found.text)}: {printable(metric, 120)}; {nodes}; {how}>", facts, tables)


def _graph(found: Any, rows: int) -> Card:
    nodes = f"{count(found.n_nodes, 'neuron')}, {count(found.n_edges, 'edge')}"
    line = f"<{type(found).__name__} of {quote(found.text)}: {nodes}>"
    facts = tuple((str(name), str(value)) for name, value in list(found.notes.items())[:5])

    def tables() -> Iterable[Sheet]:
        yield sheet.graph_nodes(found, rows)
        if found.links is not None:
            yield sheet.edges(found, rows)

    return Card(line, facts, tables)


def _route(found: Any, _: int) -> Card:
    return Card(repr(found))


def _attribution(found: Any, rows: int) -> Card:
    chosen, shape = found.settings, " x ".join(f"{size:,}" for size in found.nodes.shape)
    line = (
        f"<Attribution of {count(len(found.token_ids), 'prompt')}: {chosen.method}, baseline {chosen.baseline}, basis "
        f"{chosen.basis}; nodes {shape} (prompt, layer, position, neuron)>"
    )

    def tables() -> Iterable[Sheet]:
        metrics = zip(found.metric.tolist(), found.unexplained.tolist(), found.lengths, strict=True)
        cells = [
            (str(at), str(length), f"{metric:+.4f}", f"{rest:+.2e}")
            for at, (metric, rest, length) in enumerate(metrics)
        ]
        yield Sheet.of("metrics", "Prompts", ("prompt", "tokens", "metric", "unexplained"), cells)
        heads = ("prompt", "layer", "position", "neuron", "attribution", "activation")
        strongest = found.to_pandas(rows).sort_values("attribution", key=abs, ascending=False)
        cells = [
            (*map(str, row[:4]), f"{row[4]:+.4f}", f"{row[5]:+.4f}")
            for row in strongest.head(rows).itertuples(index=False)
        ]
        yield Sheet.of("nodes", "Strongest nodes", heads, cells)

    return Card(line, (), tables)


def _curves(found: Any, _: int) -> Card:
    last = {name: float(getattr(found, name).estimate[-1]) for name in ("faithfulness", "completeness")}
    said = ", ".join(f"{name} {decimal(value)}" for name, value in last.items())
    name = type(found).__name__
    line = f"<{name} of {count(found.sizes[-1], 'node')}: {said} (wanted 1 and 0)"
    facts: list[tuple[str, str]] = []
    if name == "Evaluation":
        alone = sheet.is_alone(found)
        line += f"; {count(len(found.whole), 'prompt')}, {found.ablation} ablation"
        facts = [("tested", sheet.tested_text(found)), ("intervals", "none of one prompt" if alone else "95 %")]
        facts += [("note", text) for text in found.warnings[:5]]
    for level, size in found.sizes_for.items():
        facts.append((f"nodes for {level:g}", _size(size)))
    facts.append(("settles", _size(found.settles)))
    return Card(line + ">", tuple(facts), lambda: (sheet.curves(found),))


def _size(size: Any) -> str:
    if size.estimate is None:
        return "not reached"
    span = "" if size.low == size.high else f" [{size.low or '-'}, {size.high or 'not reached'}]"
    return f"{size.estimate:,}{span}"


def _edge_curves(found: Any, _: int) -> Card:
    kept = found.by_edges
    line = (
        f"<EdgeCurves: {count(found.n_edges[-1], 'edge')} keep {count(found.n_nodes[-1], 'neuron')}, faithfulness "
        f"{decimal(float(kept.faithfulness.estimate[-1]))}>"
    )
    return Card(line, (), lambda: (sheet.edge_curves(found),))


def _knockouts(found: Any, _: int) -> Card:
    line = f"<Knockouts of {count(len(found.names), 'group')}: the whole circuit holds "
    return Card(f"{line}{decimal(float(found.circuit.estimate))}>", (), lambda: (sheet.knockouts(found),))


def _quality(found: Any, _: int) -> Card:
    cells = [(name, printable(str(one), 120)) for name, one in found.strata.items()]
    return Card(f"<Quality: {found}>", (), lambda: (Sheet.of("strata", "By stratum", ("<nodes", "<agreement"), cells),))


def _steering(found: Any, _: int) -> Card:
    how = f"{found.action.kind} {found.action.amount:g} on {count(found.n_neurons, 'neuron')}"
    verdict = f"{token(found.before)} -> {token(found.after)}" if found.changed else f"still {token(found.before)}"
    texts = (("unsteered", found.unsteered), ("steered", found.steered), ("random nodes", found.control))
    facts = (("prompt", found.text), *((name, token(one.text)) for name, one in texts if one is not None))
    facts += (("changed", f"by {found.control_changed} of {found.random} random draws"),)

    def tables() -> Iterable[Sheet]:
        heads = ("<token", "<asked as", "before", "after", "random nodes", "their range")
        cells = []
        for effect in found.effects:
            shift, spread = effect.probability, effect.probability.control
            control = ("-", "-") if spread is None else (f"{spread.mean:.4f}", f"[{spread.low:.4f}, {spread.high:.4f}]")
            numbers = f"{shift.before:.4f}", f"{shift.after:.4f}"
            cells.append((token(effect.token), effect.role, *numbers, *control))
        yield Sheet.of("effects", "Probability of the next token", heads, cells)

    return Card(f"<Steering of {quote(found.text)}: {how}; {printable(verdict, SHORT)}>", facts, tables)


def _swap(found: Any, _: int) -> Card:
    best = max(found.swapped.becomes.estimate.tolist(), default=0.0)
    line = (
        f"<Swap of {count(found.n_pairs, 'pair')}: the other's answer in {best:.0%} at best, of {list(found.ks)} nodes>"
    )

    def tables() -> Iterable[Sheet]:
        cells = [
            (
                *(str(row["k"]), f"{row['nodes']:.0f}", row["done"]),
                *(f"{row[one]:.2f} [{row[f'{one}_low']:.2f}, {row[f'{one}_high']:.2f}]" for one in _SHARES),
            )
            for row in found.rows()
        ]
        heads = ("k", "nodes", "<what is set", "the other's answer", "its own still")
        yield Sheet.of("swap", "What is answered then", heads, cells)

    facts = (("answered", f"{float(found.answered.estimate):.0%} of the pairs by the untouched model"),)
    return Card(line, facts, tables)


_SHARES = ("becomes", "stays")


def _sweep(found: Any, _: int) -> Card:
    names = ("prompt_id", "group", "factor", "draw")
    prompts, groups, factors = (len(found.tokens[name].unique()) for name in names[:3])
    parts = count(groups, "group"), count(factors, "factor"), count(prompts, "prompt")
    line = f"<Sweep of {', '.join(parts)}: {count(found.tokens.num_rows, 'row')}>"

    def tables() -> Iterable[Sheet]:
        heads = ("<group", "factor", "<token", "before", "after", "change", "95 %", "random nodes")
        cells = [
            (
                *(one.group, f"{one.factor:g}", token(one.token), f"{one.before:.4f}", f"{one.after:.4f}"),
                *(f"{float(one.change.estimate):+.4f}", ends(float(one.change.low), float(one.change.high))),
                "-" if one.control is None else f"{float(one.control.estimate):+.4f}",
            )
            for one in found.responses()
        ]
        yield Sheet.of("responses", "Change of probability, mean over prompts", heads, cells)

    return Card(line, (), tables)


def _comparison(found: Any, rows: int) -> Card:
    from tracer.reports import comparison

    changes = ", ".join(f"{number:,} {name}" for name, number in found.counts.items() if number)
    names = " and ".join(printable(name, SHORT) for name in (found.names[0], found.names[-1]))
    line = f"<Comparison of {names}: {found.found:,} of {found.n_tested:,} nodes differ; {changes}>"
    facts = tuple(("note", text) for text in found.notes[:5])
    return Card(line, facts, lambda: (comparison.sides_sheet(found), comparison.nodes_sheet(found, rows)))


def _concepts(found: Any, _: int) -> Card:
    from tracer.reports import concepts

    told = ", ".join(f"{printable(f'{one.label}={one.value}', 40)}: {one.n_found}" for one in found.concepts[:5])
    more = ", ..." if len(found.concepts) > 5 else ""
    line = f"<Concepts: neurons with q <= {concepts.RATE:g} for {told}{more}>"
    return Card(
        line, tuple(("left out", text) for text in found.left_out[:5]), lambda: (concepts.summary(found.table),)
    )


def _tokens(found: Any, _: int) -> Card:
    from tracer.reports import neurons

    lists = (("promotes", found.promoted), ("driven by", found.driven_by))
    said = "; ".join(f"{name} {', '.join(token(one.text) for one in some[:3])}" for name, some in lists if some)
    line = f"<NeuronTokens of {neurons.name(found)}: {printable(said, 160)}>"
    return Card(line, (), lambda: (neurons.tokens_sheet(found),))


def _grouping(found: Any, _: int) -> Card:
    from tracer.reports import supernodes

    groups = count(len(found.file.groups), "group")
    line = f"<Grouping of {quote(found.graph.text)}: {groups} of {count(found.graph.n_nodes, 'node')}>"
    facts = tuple(("note", text) for text in found.notes[:5])
    return Card(line, facts, lambda: (supernodes.sheet(found.rows()),))


def _described(found: Any, rows: int) -> Card:
    def tables() -> Iterable[Sheet]:
        cells = [
            (
                *(str(row["layer"]), str(row["neuron"]), "+" if row["polarity"] > 0 else "-"),
                *(row["description"], number(row["score"], ".2f")),
            )
            for row in found.table.slice(0, rows).to_pylist()
        ]
        heads = ("layer", "neuron", "<polarity", "<description", "score")
        yield Sheet.of("descriptions", "Descriptions", heads, cells)

    line = f"<Described: {count(found.table.num_rows, 'neuron')} in {quote(found.address, 120)}>"
    return Card(line, (), tables)


def _filtered(found: Any, rows: int) -> Card:
    cells = [(token(one.token), "yes" if one.kept else "no", one.otherwise) for one in found.answers[:rows]]
    heads = ("<answer", "<kept", "<otherwise")
    return Card(f"<Filtered: {found.summary}>", (), lambda: (Sheet.of("answers", "Answers", heads, cells),))


def _model(found: Any, _: int) -> Card:
    shape = f"{found.n_layers} layers, d_model {found.d_model}, d_mlp {found.d_mlp}"
    where = "here" if found.remote is None else f"on {found.backend.host}"
    dtype = str(found.dtype).removeprefix("torch.")
    line = f"<Model {quote(found.name)}: {found.family.name}, {shape}, {dtype}, {where}>"
    named = (("revision", found.revision), ("adapter", found.adapter), ("GGUF file", found.gguf and found.gguf.shown))
    facts: Sequence[tuple[str, str | None]] = (
        ("family", found.family.name),
        ("shape", f"{shape}, vocabulary {found.vocab_size:,}, context {found.context_length:,}"),
        ("dtype", f"{dtype}, {where}"),
        *named,
        *(("note", text) for text in found.warnings[:5]),
    )
    return Card(line, tuple((name, value) for name, value in facts if value))


def _run(found: Any, _: int) -> Card:
    facts = found.facts
    line = f"<Run {quote(found.address, 120)}: {found.kind}, {dict(facts).get('state', 'ended')}>"

    def tables() -> Iterable[Sheet]:
        cells = [(name, f"{rows:,}") for name, rows in found.sizes.items()]
        yield Sheet.of("tables", "Tables: run.table(name)", ("<name", "rows"), cells)

    return Card(line, facts, tables)


_CARDS: dict[str, Callable[[Any, int], Card]] = {
    "Attribution": _attribution,
    "Circuit": _circuit,
    "Comparison": _comparison,
    "Concepts": _concepts,
    "Curves": _curves,
    "Described": _described,
    "EdgeCurves": _edge_curves,
    "Filtered": _filtered,
    "Graph": _graph,
    "Grouping": _grouping,
    "Knockouts": _knockouts,
    "Model": _model,
    "NeuronTokens": _tokens,
    "Quality": _quality,
    "Run": _run,
    "Steering": _steering,
    "Swap": _swap,
    "Sweep": _sweep,
}
