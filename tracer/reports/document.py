"""The report: one HTML file that tells someone who was not there what was asked, what was found, and whether it held.

Knows wording, units and the tables of a report, and when there is too little to say something. Refuses to know how any
number was computed, and computes none itself beyond shares and ranges; needs no model and no network.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tracer.circuit.circuit import Circuit, versions
from tracer.errors import JobError
from tracer.evaluation.curves import Evaluation
from tracer.evaluation.edge_curves import EdgeCurves
from tracer.evaluation.faithfulness import as_prompt, own_prompt
from tracer.evaluation.quality import STRATA, AlwaysOn, Correlation, Quality
from tracer.evaluation.statistics import Size
from tracer.reports import figures, sheet, tables
from tracer.reports.page import render
from tracer.reports.sheet import ABLATIONS, PAGE, Sheet, decimal, ends, quoted_token, unit
from tracer.reports.verdict import RULE, Verdict, judged, percent, point
from tracer.settings import BASIS_NAMES, RULED_METHODS, RULES, TargetNeuron
from tracer.text import printable as shown

NODES, EDGES, PATHS = 30, 20, 5
CONTROL = "control_faithfulness"
WORDS = ((0.9, "follow the true effects closely"), (0.7, "follow them broadly"), (0.4, "follow them loosely"))
"""What a Pearson correlation of at least so much is called."""

_WIDE = 0.4  # an interval this wide leaves the word open
_METHODS = {
    "relp": "gradient of a linearised model that gives the same output (RelP)",
    "grad": "plain gradient",
    "ig": "integrated gradients over the embeddings",
    "conductance": "conductance along a path of embeddings",
    "ig-activation": "integrated gradients over each layer's neurons",
    "relp-ig": "RelP's gradient, averaged along a path of embeddings",
    "exact": "each node ablated alone, no estimate",
    "delta": "size of the change of activation, a control",
    "random": "noise, a control",
}
_QUESTIONS = {
    "logit": "how strongly does it favour {target}?",
    "difference": "how much more does it favour {target} than {foil}?",
    "topk": "how strongly does it favour its own most likely tokens, {target}?",
    "logprob": "how probable does it find {target}?",
    "centred": "how far above the average token of its vocabulary does it put {target}?",
    "share": "how strongly does it favour the tokens that hold {share} of its probability, {target}?",
    "neuron": "how strong is the neuron {target}?",
    "direction": "how far does its state go along the {target}?",
}


def document(
    circuit: Circuit,
    evaluation: Evaluation | None = None,
    quality: Quality | None = None,
    always_on: Sequence[AlwaysOn] | None = None,
    edge_curves: EdgeCurves | None = None,
    *,
    date: datetime.date | None = None,
) -> str:
    """The report as one self-contained HTML page: no script, no address, drawings inside.

    Args:
        circuit: what is reported.
        evaluation, quality, always_on, edge_curves: what is known of it; the page says what is missing and how to get
            it.
        date: printed as the day it was written; today (UTC) if None.
    """
    return render(
        "report.html.jinja",
        title=shown(circuit.text),
        model=shown(circuit.model.name),
        question=_question(circuit),
        finding=_finding(circuit),
        verdict=_verdict(circuit, evaluation),
        cards=tuple(_cards(circuit, evaluation, quality)),
        settings=_settings(circuit),
        conservation=_conservation(circuit),
        quality=_quality(circuit, quality),
        evaluation=_evaluation(evaluation),
        always_on=_always_on(circuit, always_on),
        edge_curves=edge_curves
        and {"picture": figures.edge_curves_svg(edge_curves), "table": sheet.edge_curves(edge_curves)},
        nodes=_strongest(sheet.nodes(circuit, NODES, always_on or ()), circuit.n_nodes),
        edges=None if circuit.links is None else _strongest(sheet.edges(circuit, EDGES), circuit.n_edges),
        paths=_paths(circuit),
        embeddings=sheet.embeddings(circuit).on(PAGE),
        nature=sheet.nature_text(circuit),
        made=_made(circuit, date or datetime.datetime.now(datetime.UTC).date()),
        python=_python(circuit),
        rule=RULE,
    )


def write_document(
    circuit: Circuit,
    evaluation: Evaluation | None = None,
    quality: Quality | None = None,
    always_on: Sequence[AlwaysOn] | None = None,
    edge_curves: EdgeCurves | None = None,
    *,
    path: str | Path,
    date: datetime.date | None = None,
) -> Path:
    """Write `document` to a file.

    Raises:
        RunError: the file cannot be written.
    """
    return tables.write_page(document(circuit, evaluation, quality, always_on, edge_curves, date=date), path)


# ------------------------------------------------------------------------------------------ in plain words


def _question(circuit: Circuit) -> str:
    name = {row["neuron"]: quoted_token(row["token"]) for row in circuit.rows("logit")}
    tokens = {
        "target": " or ".join(name[one] for one in circuit.target_ids),
        "foil": " or ".join(name[one] for one in circuit.foil_ids),
        "share": circuit.settings.share,
    }
    if circuit.settings.of is not None:
        tokens["target"] = shown(circuit.settings.of.name)
    if circuit.answer:
        tokens["target"] = quoted_token("".join(row["token"] for row in circuit.rows("logit")))
    asked = _QUESTIONS[circuit.settings.metric].format(**tokens)
    if circuit.positions == (len(circuit.tokens) - 1,):
        return f"After these words, {asked}"
    return f"Read at {_places(circuit)}, {asked}"


def _finding(circuit: Circuit) -> str:
    """What the model says, and how much of it was kept."""
    says = ""
    if circuit.predictions:
        first = circuit.predictions[0]
        says = f"Its most likely next token is {quoted_token(first.token)} (probability {first.probability:.3f}). "
    return (
        f"{says}The number that was traced, the {_metric(circuit)}, is {circuit.metric:+.4f} {unit(circuit)}. "
        f"Of the {circuit.n_total:,} nodes that the model has on this prompt (a node is one neuron at one token), "
        f"{circuit.n_nodes:,} were kept, {circuit.n_neurons:,} different neurons; they hold "
        f"{circuit.kept_mass:.1%} of the summed size of all attributions."
    )


def _verdict(circuit: Circuit, found: Evaluation | None) -> Verdict:
    if found is None:
        return Verdict(
            "Not tested",
            "Nobody has switched the rest of the model off to see whether these nodes are enough, so this is an "
            "estimate and no proof. Run tracer evaluate on its folder.",
            "open",
        )
    size, whole = found.sizes[-1], point(found.faithfulness, -1)
    control = point(found.control_faithfulness, -1)
    which = "these" if size >= circuit.n_nodes else "the strongest"
    facts = (
        f"With everything outside {which} {size:,} nodes replaced by {ABLATIONS[found.ablation]}, {percent(whole)} "
        f"of the model's behaviour remains on {sheet.tested_text(found)} (faithfulness; "
        f"1 is all of it). As many random nodes keep {percent(control)}. With the circuit itself switched off "
        f"instead, {percent(point(found.completeness, -1))} remains (completeness; 0 is wanted)."
    )
    if sheet.is_alone(found):
        text = f"Whether these nodes are enough on other prompts is open: it was tested on one alone. {facts}"
        return Verdict("Tested on one prompt", text, "open")
    return judged(whole, control, facts)


def _cards(circuit: Circuit, found: Evaluation | None, quality: Quality | None) -> Iterator[tuple[str, str, str]]:
    """The numbers to remember: name, value, what goes with it."""
    yield _metric(circuit), f"{circuit.metric:+.3f}", unit(circuit)
    yield "nodes kept", f"{circuit.n_nodes:,}", f"of {circuit.n_total:,}; {circuit.n_neurons:,} unique neurons"
    if found is not None:
        curves = {"faithfulness": "faithfulness", "completeness": "completeness", "random nodes": CONTROL}
        for name, field in curves.items():
            estimate, low, high = point(getattr(found, field), -1)
            span = "one prompt" if sheet.is_alone(found) else f"95 % interval {decimal(low)} to {decimal(high)}"
            yield name, decimal(estimate), f"{span}, {found.sizes[-1]:,} nodes"
    if quality is not None and quality.whole.agreement is not None:
        one = quality.whole.agreement.pearson
        ends = f"{decimal(float(one.low))} to {decimal(float(one.high))}"
        yield "estimate against truth", decimal(float(one.estimate)), f"Pearson correlation, 95 % interval {ends}"


# ------------------------------------------------------------------------------------------ sections


def _settings(circuit: Circuit) -> Sheet:
    """What was asked, of what, and how."""
    model, chosen = circuit.model, circuit.settings
    rows = {
        "prompt": f"{shown(circuit.text)} ({len(circuit.tokens)} tokens)",
        "number traced": f"{_metric(circuit)}, read at {_places(circuit)}",
        "model": f"{shown(model.name)}{'' if model.revision is None else f', revision {shown(model.revision)}'}"
        f"{'' if model.gguf is None else f', {shown(model.gguf.shown)}'}"
        f"{'' if model.adapter is None else f', with the adapter {shown(model.adapter)} merged'}",
        "architecture": f"{shown(model.family)}: {model.n_layers} layers, {model.d_mlp:,} MLP neurons each, width "
        f"{model.d_model:,}, {model.n_heads} heads, {model.dtype}",
        "asked": sheet.chances_text(circuit, quoted_token),
        "model says": sheet.predictions_text(circuit, quoted_token) or "-",
        "method": _method(circuit),
        "baseline": f"{chosen.baseline}: attributions are relative to {_against(circuit)}",
        "basis": BASIS_NAMES[chosen.basis] + " (input of the down projection)" * (chosen.basis == "activation"),
        "selection": _selection(circuit),
    }
    if circuit.links is not None:
        rows["edges"] = f"{circuit.n_edges:,} kept of {circuit.n_links:,} between the selected nodes{_pruning(circuit)}"
    if circuit.warnings:
        rows["to know"] = " ".join(f"{shown(text)}." for text in circuit.warnings)
    if circuit.counterfactual_ids is not None:
        rows["counterfactual"] = "token ids " + ", ".join(map(str, circuit.counterfactual_ids))
    return Sheet.of("settings", "What was asked, and how", ("<setting", "<value"), tuple(rows.items()))


def _conservation(circuit: Circuit) -> str:
    """The check that the prompt's own tokens account for the metric."""
    return (
        f"The attributions of the prompt's tokens sum to {circuit.metric - circuit.unexplained:+.4f} {unit(circuit)}; "
        f"the model's number is {circuit.metric:+.4f}. In full: {sheet.conservation_text(circuit)}."
    )


def _quality(circuit: Circuit, found: Quality | None) -> dict[str, Any] | None:
    """How well attributions follow what really happens when a node alone is ablated."""
    if found is None:
        return None
    parts = {"all sampled nodes": found.whole, **{f"{name} nodes": found.strata[name] for name in STRATA}}
    heads = ("<nodes", "n", "Pearson", "95 % interval", "Spearman", "95 % interval", "<in words")
    text = (
        f"{len(found.sample):,} nodes were, one at a time, replaced by {ABLATIONS[found.ablation]}, and the true fall "
        f"of the {_metric(circuit)} was compared with the attribution ({found.method}, baseline {found.baseline}). "
        f"Over the whole sample the attributions {_in_words(found.whole)}."
    )
    rows = tuple((name, f"{one.n:,}", *_correlations(one), _in_words(one)) for name, one in parts.items())
    return {
        "text": text,
        "table": Sheet.of("correlations", "Attribution against exact ablation of single nodes", heads, rows),
        "picture": figures.scatter_svg(found, unit(circuit)),
        "differs": found.ablation != found.baseline,
        "seed": found.seed,
    }


def _correlations(one: Correlation) -> tuple[str, ...]:
    if one.agreement is None:
        return ("-",) * 4
    sides = (one.agreement.pearson, one.agreement.spearman)
    return tuple(text for side in sides for text in (f"{float(side.estimate):.3f}", ends(*point(side)[1:])))


def _in_words(one: Correlation) -> str:
    if one.agreement is None:
        return f"cannot be compared: {one.reason}"
    estimate, low, high = point(one.agreement.pearson)
    word = next((word for least, word in WORDS if estimate >= least), "hardly follow them")
    return f"{word} (wide interval: uncertain)" if high - low > _WIDE else word


def _evaluation(found: Evaluation | None) -> dict[str, Any] | None:
    """The curves, as a drawing and as numbers."""
    if found is None:
        return None
    text = (
        f"Tested on {sheet.tested_text(found)}, ablation {found.ablation}: a node that is "
        f"switched off is replaced by {ABLATIONS[found.ablation]}. The measured number averages "
        f"{float(found.whole.mean()):+.4f} in the whole model and "
        f"{float(found.empty.mean()):+.4f} with all {found.n_total:,} nodes switched off; faithfulness and "
        "completeness are shares of the way between the two, so they have no unit."
        + "".join(f" {shown(said[:1].upper() + said[1:])}." for said in found.warnings)
    )
    return {
        "text": text,
        "picture": figures.curves_svg(found),
        "sizes": _levels(found),
        "table": sheet.curves(found),
        "areas": _areas(found),
        "seed": found.seed,
    }


def _levels(found: Evaluation) -> Sheet:
    heads = ("faithfulness of at least", "nodes needed", "95 % interval", "share of all nodes")
    rows = []
    named = [(f"{level:g}", size) for level, size in found.sizes_for.items()]
    for name, size in (*named, (sheet.SETTLES, found.settles)):
        share = "-" if size.estimate is None else f"{size.estimate / found.n_total:.2%}"
        span = "-" if sheet.is_alone(found) else _span(size)
        rows.append((name, "not reached" if size.estimate is None else f"{size.estimate:,}", span, share))
    return Sheet.of("sizes", "How many nodes it takes", heads, tuple(rows))


def _areas(found: Evaluation) -> str:
    """CPR and CMD where the sizes allow them; not a number elsewhere."""
    areas = [(name, point(getattr(found, name.lower()))) for name in ("CPR", "CMD")]
    if any(math.isnan(value) for _, values in areas for value in values):
        return ""  # with one size, or one prompt
    shown_areas = ", ".join(f"{name} {decimal(values[0])} {ends(*values[1:])}" for name, values in areas)
    return (
        f"Areas over the share of nodes, ranked by absolute attribution: {shown_areas}; CPR lies under faithfulness, "
        "CMD between faithfulness and 1."
    )


def _always_on(circuit: Circuit, found: Sequence[AlwaysOn] | None) -> Sheet | None:
    """Neurons that look strong everywhere; None where nobody looked, without rows where there are none."""
    if found is None:
        return None
    of = unit(circuit)
    heads = ("<neuron", f"attribution ({of})", f"exact effect ({of})", "strong on", "nodes of this circuit")
    rows = tuple(
        (
            circuit.numbering.name(one.layer, one.neuron),
            f"{one.attribution:.4f}",
            f"{one.exact:.4f}",
            f"{one.share:.0%} of prompts",
            f"{one.n_nodes:,}",
        )
        for one in found
    )
    return Sheet.of("always-on", "Looks strong, does little", heads, rows)


def _strongest(found: Sheet, total: int) -> Sheet:
    """The strongest nodes or edges, as the page shows them."""
    return replace(found.on(PAGE), title=f"The {len(found.rows)} strongest of {total:,} {found.name}")


def _paths(circuit: Circuit) -> Sheet | str:
    """The strongest paths, or why there are none."""
    try:
        found = sheet.paths(circuit, PATHS)
    except JobError as error:
        return f"None: {error.rule}. To have them, {error.next_step}."
    if not found.rows:
        return "None: no chain of kept edges leads from a token to a logit. Keep more nodes, or weaker edges."
    return found


def _made(circuit: Circuit, date: datetime.date) -> Sheet:
    """What it takes to check that a second run is the same."""
    rows = [
        ("written", f"{date.isoformat()} (UTC)"),
        ("circuit fingerprint", circuit.fingerprint),
        ("weights fingerprint", circuit.model.fingerprint),
        ("tracing took", f"{circuit.seconds:.1f} s"),
        *((f"{name} (at writing)", version) for name, version in versions().items()),
    ]
    if circuit.reference is not None:
        rows.append(("reference prompts", f"hash {circuit.reference}"))
    return Sheet.of("made", "Versions and fingerprints", ("<what", "<value"), tuple(rows))


def _python(circuit: Circuit) -> str:
    """Python that traces the same circuit."""
    chosen, kept = circuit.settings, circuit.selection
    prompt = as_prompt(own_prompt(circuit), chosen)
    names = ("token_ids", "target", "foil", "counterfactual", "positions", "answer")
    asked: dict[str, Any] = {name: getattr(prompt, name) for name in names}
    how = {name: value for name, value in chosen.model_dump().items() if name not in ("rules", "of")}
    if chosen.of is not None:
        how["of"] = chosen.of.name if isinstance(chosen.of, TargetNeuron) else ...
        del how["metric"]  # which it is
    how |= {"rules": sorted(chosen.rules)} if chosen.method in RULED_METHODS and chosen.rules != RULES else {}
    how |= {name: kept[name] for name in ("nodes", "threshold", "mass", "skip_first", "exclude") if kept.get(name)}
    pruning = {name: value for name, value in (kept.get("pruning") or {}).items() if value}
    words = [f"    {name}={value!r}," for name, value in how.items()]
    if how.get("of") is ...:
        words[words.index("    of=Ellipsis,")] = f"    of=...,  # the {shown(sheet.metric_text(circuit))}"
    words += [f"    pruning=tracer.Pruning({_arguments(pruning)}),"] if pruning else []
    words += ["    edges=False,"] if circuit.links is None else []
    words += ["    reference=[...],  # the prompts behind the mean"] if chosen.baseline == "mean" else []
    place = "".join(f", {name}={value!r}" for name, value in circuit.model.loading().items())
    lines = [
        "import tracer",
        "",
        f"model = tracer.load({circuit.model.name!r}{place})",
        f"prompt = tracer.Prompt({_arguments({name: value for name, value in asked.items() if value is not None})})",
        "circuit = tracer.trace(",
        "    model,",
        "    prompt,",
        *words,
        ")",
    ]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------ wording


def _metric(circuit: Circuit) -> str:
    return sheet.metric_text(circuit, quoted_token)


def _places(circuit: Circuit) -> str:
    return f"position{'s' * (len(circuit.positions) > 1)} {sheet.positions_text(circuit, quoted_token)}"


def _method(circuit: Circuit) -> str:
    chosen = circuit.settings
    return f"{chosen.method}: {_METHODS[chosen.method]}{sheet.options_text(chosen)}"


def _against(circuit: Circuit) -> str:
    names = {"zero": "an activation of zero", "mean": "its mean over reference prompts"}
    return names.get(circuit.settings.baseline, "its activation on the counterfactual prompt")


def _selection(circuit: Circuit) -> str:
    kept = circuit.selection
    forms = {"nodes": "the {:,} strongest", "threshold": "at least {:g} of the |metric|", "mass": "{:.0%} of the mass"}
    words = [form.format(kept[name]) for name, form in forms.items() if kept.get(name) is not None]
    words += ["first position left out"] if kept.get("skip_first") else []
    words += [f"{len(kept['exclude'])} neurons left out by name"] if kept.get("exclude") else []
    dropped = circuit.n_selected - circuit.n_nodes
    words += [f"{dropped:,} of {circuit.n_selected:,} then pruned"] if dropped else []
    return ", ".join(words) or "-"


def _pruning(circuit: Circuit) -> str:
    rules = {name: value for name, value in (circuit.selection.get("pruning") or {}).items() if value}
    return f" ({', '.join(f'{name} {value}' for name, value in rules.items())})" if rules else ""


def _arguments(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def _span(size: Size) -> str:
    return " to ".join("not reached" if end is None else f"{end:,}" for end in (size.low, size.high))
