"""The report as a browser sees it: parsed, compared with the circuit number by number, and searched for traps."""

from __future__ import annotations

import datetime
import functools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tracer
from helpers import refused
from parsed import Page
from tracer.circuit.circuit import Circuit
from tracer.data.tasks import sva
from tracer.errors import RunError
from tracer.evaluation.curves import Evaluation
from tracer.evaluation.quality import STRATA, AlwaysOn, Quality, always_on, estimate_quality
from tracer.evaluation.statistics import Interval
from tracer.prompts import Prompt
from tracer.reports.document import EDGES, NODES, PATHS, document, write_document

DAY = datetime.date(2026, 1, 2)
SECTIONS = {
    "holds": "Not measured.",
    "estimate": "Not measured.",
    "always": "Not looked for.",
    "edges": "Not traced.",
    "paths": "No paths.",
}


@functools.cache
def demo() -> tuple[Circuit, Evaluation, Quality, tuple[AlwaysOn, ...]]:
    """A circuit of the demo model with everything known of it."""
    model = tracer.load("demo")
    pair = sva.generate("nounpp", "train", 1)[0].to_prompt()
    circuit = tracer.trace(model, pair, nodes=60, baseline="zero")
    prompts = [one.to_prompt() for one in sva.generate("nounpp", "test", 6)]
    unrelated = [Prompt(one.to_prompt().text) for one in sva.generate("rc", "test", 8)]
    found = tracer.evaluate(model, circuit, prompts, sizes=[1, 5, 20, 60])
    return circuit, found, estimate_quality(model, circuit, n_each=12), tuple(always_on(model, circuit, unrelated))


@functools.cache
def bare() -> Circuit:
    return tracer.trace(
        tracer.load("demo"), sva.generate("simple", "train", 1)[0].to_prompt(), nodes=5, edges=False, baseline="zero"
    )


@functools.cache
def whole() -> Page:
    return Page(document(*demo(), date=DAY))


def page(**over: Any) -> Page:
    if not over:
        return whole()
    circuit, evaluation, quality, constant = demo()
    given = {"circuit": circuit, "evaluation": evaluation, "quality": quality, "always_on": constant, **over}
    return Page(document(**given, date=DAY))  # type: ignore[arg-type]


def numbers(row: list[str]) -> list[float]:
    """Every number of a row's cells, a percentage as a share."""
    found = re.findall(r"[+-]?\d[\d,]*\.?\d*%?", " ".join(row))
    return [float(one.rstrip("%").replace(",", "")) / (100 if one.endswith("%") else 1) for one in found]


def triples(curve: Interval, at: int | None = None) -> list[float]:
    values = (curve.estimate, curve.low, curve.high)
    return [float(one if at is None else one[at]) for one in values]


def test_it_is_well_formed_and_refers_to_nothing_outside() -> None:
    for text in (document(*demo()), document(bare())):
        found = Page(text)
        assert len(found.ids) == len(set(found.ids))
        assert all(link == "graph.html" or (link.startswith("#") and link[1:] in found.ids) for link in found.links)
        assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(found.ids)
        assert not re.search(r"https?:|//\w|@import|<script|javascript:|<link|<img", text)
        assert not found.tags & {"script", "iframe", "object", "link", "img", "form"}
        assert "default-src 'none'" in text
        assert text.startswith("<!DOCTYPE html>")
    assert document(*demo()).count("<svg") == 2


def test_nodes_are_the_circuits() -> None:
    circuit = demo()[0]
    rows = page(always_on=None).tables["nodes"]
    assert len(rows) == NODES
    for rank, (row, node) in enumerate(zip(rows, circuit.neurons.to_pylist(), strict=False), start=1):
        assert row[:4] == [str(one) for one in (rank, node["layer"], node["neuron"], node["position"])]
        assert row[4].replace("␣", " ") == node["token"]
        wanted = [node["activation"], node["attribution"], node["attribution"] / circuit.metric, node["explained"]]
        assert numbers(row[5:]) == pytest.approx(wanted, abs=5.1e-3)
        assert numbers(row[5:7]) == pytest.approx(wanted[:2], abs=5.1e-5)


def test_edges_paths_and_embeddings_are_the_circuits() -> None:
    circuit, found = demo()[0], page()
    assert len(found.tables["edges"]) == EDGES
    for row, edge in zip(found.tables["edges"], circuit.edges.to_pylist(), strict=False):
        assert numbers(row[2:]) == pytest.approx([edge["weight"], edge["share"], edge["attribution"]], abs=5.1e-4)
        for cell, end in zip(row, ("source", "target"), strict=False):
            assert f"@{edge[f'{end}_position']}" in cell
            assert edge[f"{end}_kind"] != "neuron" or cell.startswith(
                f"L{edge[f'{end}_layer']} N{edge[f'{end}_neuron']} "
            )
    for row, path in zip(found.tables["paths"], circuit.paths(PATHS), strict=True):
        assert numbers(row[:2]) == pytest.approx([path.attribution, path.share], abs=1e-4)
        assert row[2].count(" -> ") == len(path.nodes) - 1
    for row, node in zip(found.tables["embeddings"], circuit.rows("embedding"), strict=True):
        share = node["attribution"] / circuit.metric
        wanted = [node["position"], node["attribution"], share]
        assert numbers([row[0], *row[2:]]) == pytest.approx(wanted, abs=5.1e-4)


def test_curves_and_sizes_are_the_evaluations() -> None:
    found, tables = demo()[1], page().tables
    for i, row in enumerate(tables["curves"]):
        curves = (found.faithfulness, found.completeness, found.control_faithfulness)
        wanted = [found.sizes[i], found.n_neurons[i], *(one for curve in curves for one in triples(curve, i))]
        assert numbers(row) == pytest.approx(wanted, abs=5.1e-4)
    assert len(tables["curves"]) == len(found.sizes)
    named = [(f"{level:g}", size) for level, size in found.sizes_for.items()]
    for row, (name, size) in zip(tables["sizes"], [*named, ("stays within .1 of 1", found.settles)], strict=True):
        ends = ["not reached" if one is None else f"{one:,}" for one in (size.estimate, size.low, size.high)]
        assert row[:3] == [name, ends[0], f"{ends[1]} to {ends[2]}"]


def test_correlations_and_always_on_neurons_are_those_measured() -> None:
    _, _, quality, constant = demo()
    tables = page().tables
    wholes = [quality.whole, *(quality.strata[name] for name in STRATA)]
    for row, one in zip(tables["correlations"], wholes, strict=True):
        if one.agreement is None:
            assert row[2:6] == ["-"] * 4
            assert str(one.reason) in row[6]
        else:
            wanted = [one.n, *triples(one.agreement.pearson), *triples(one.agreement.spearman)]
            assert numbers(row[1:6]) == pytest.approx(wanted, abs=5.1e-4)
    assert constant, "the demo model has one"
    for row, neuron in zip(tables["always-on"], constant, strict=True):
        assert row[0] == f"L{neuron.layer} N{neuron.neuron}"
        wanted = [neuron.attribution, neuron.exact, neuron.share, neuron.n_nodes]
        assert numbers(row[1:]) == pytest.approx(wanted, abs=5.1e-3)
    held = {(one.layer, one.neuron) for one in constant}
    rows = demo()[0].neurons.slice(0, NODES).to_pylist()
    noted = [row[-1] == "always on" for row in tables["nodes"]]
    assert noted == [(row["layer"], row["neuron"]) in held for row in rows]


def test_sections_without_data_say_so_and_how_to_get_them() -> None:
    found = Page(document(bare()))
    for name, words in SECTIONS.items():
        assert words in found.sections[name]
    for call in (
        "tracer evaluate DIR",
        "tracer.evaluate(",
        "tracer.estimate_quality(",
        "tracer.always_on(",
    ):
        assert call in found.text
    assert "Not tested." in found.sections["head"]
    assert "none found" in page(always_on=[]).sections["always"]
    assert not any(words in page().sections[name] for name, words in SECTIONS.items())


@pytest.mark.parametrize(
    ("faithful", "control", "word"),
    [
        ((0.9, 0.85, 0.95), (0.1, 0.0, 0.2), "Held."),
        ((0.9, 0.7, 0.95), (0.1, 0.0, 0.2), "Held in part."),
        ((1.4, 1.3, 1.5), (0.1, 0.0, 0.2), "Held in part."),
        ((0.4, 0.3, 0.5), (0.1, 0.0, 0.2), "Did not hold."),
        ((0.9, 0.85, 0.95), (0.8, 0.7, 0.9), "Did not hold."),
        ((0.9, float("nan"), 0.95), (0.1, 0.0, 0.2), "Cannot be said."),
    ],
)
def test_the_verdict_follows_its_rule(faithful: tuple, control: tuple, word: str) -> None:
    def curve(estimate: float, low: float, high: float) -> Interval:
        low_, high_, at = (torch.full((4,), value, dtype=torch.float64) for value in (low, high, estimate))
        return Interval(low=low_, high=high_, estimate=at)

    found = replace(demo()[1], faithfulness=curve(*faithful), control_faithfulness=curve(*control))
    assert word in page(evaluation=found).sections["head"]


def test_tokens_cannot_break_out_of_the_page() -> None:
    circuit = demo()[0]
    nasty = "</script><b>\"'&{{ 7*7 }}\u202e\u2066\n\ud800"
    tokens = (nasty, *circuit.tokens[1:])
    nodes = circuit.nodes.set_column(
        circuit.nodes.column_names.index("token"),
        circuit.nodes.schema.field("token"),
        [["</td>\u202e'\""] * circuit.nodes.num_rows],
    )
    model = circuit.model.model_copy(update={"name": "<i>m</i>\u2067"})
    text = document(circuit.model_copy(update={"text": nasty, "tokens": tokens, "nodes": nodes, "model": model}))
    found = Page(text)
    text.encode("utf-8")
    assert not {"b", "script"} & found.tags
    assert not set("\u202e\u2066\u2067\ud800") & set(text)
    assert "</script><b>\"'&{{ 7*7 }}\\u202e\\u2066\\n\\ud800" in found.sections["head"]
    assert found.tables["nodes"][0][4] == "</td>\\u202e'\""


def test_the_same_report_twice_is_the_same_page() -> None:
    assert document(*demo(), date=DAY) == document(*demo(), date=DAY)
    assert "2026-01-02" in page().sections["made"]
    assert demo()[0].fingerprint in page().sections["made"]


def test_its_python_traces_the_same_circuit() -> None:
    text = re.search(r"<pre><code>(.*?)</code>", document(bare()), re.DOTALL)
    assert text is not None
    names: dict[str, Any] = {}
    exec(__import__("html").unescape(text[1]), names)
    again = names["circuit"]
    assert isinstance(again, Circuit)
    assert again.fingerprint == bare().fingerprint
    assert again.nodes.equals(bare().nodes)


@pytest.mark.parametrize("how", [{"metric": "topk"}, {"metric": "logprob"}, {"method": "random"}, {"method": "ig"}])
def test_every_kind_of_circuit_can_be_reported(how: dict[str, str]) -> None:
    target = None if how.get("metric") == "topk" else " are"
    prompt = Prompt("The lawyers near the car", target=target)
    found = Page(document(tracer.trace(tracer.load("demo"), prompt, nodes=8, **how)))  # type: ignore[arg-type]
    assert ("nats" in found.text) == (how.get("metric") == "logprob")
    assert len(found.tables["nodes"]) == 8


def test_it_is_written_where_asked_or_the_reason_is_told(tmp_path: Path) -> None:
    path = write_document(bare(), path=tmp_path / "new" / "report.html", date=DAY)
    assert path.read_text(encoding="utf-8") == document(bare(), date=DAY)
    with refused(RunError, "is a folder, not a file"):
        write_document(bare(), path=tmp_path)
