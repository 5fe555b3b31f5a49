"""Results at a prompt and in a notebook: short, escaped, bounded, and the numbers of the tables."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from test_viewer import MALICIOUS

import tracer
from helpers import load, refused
from runs import tiny as tiny_run
from tracer import Circuit, Evaluation, JobError, Prompt
from tracer.circuit.circuit import Graph, edges_table, nodes_table
from tracer.reports import notebook, plots
from tracer.system import bars, display
from tracer.text import is_text

PROMPT = Prompt("The secretaries near the car", target=" are", foil=" is")
FORMULAS = [r"$$\href{javascript:alert(1)}{x}$$", r"\(x\)", r"\begin{equation}x\end{equation}", "`x` $y$", "x" * 5000]
VOID = {"br", "img", "meta"}


@pytest.fixture(scope="module")
def circuit() -> Circuit:
    return tracer.trace(load("llama"), PROMPT, nodes=20)


@pytest.fixture(scope="module")
def evaluation(circuit: Circuit) -> Evaluation:
    return tracer.evaluate(load("llama"), circuit, sizes=[1, 5, 20], ablation="zero")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A notebook's IPython, as far as it is asked; what was displayed."""
    shown: list[Any] = []
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=object())))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=shown.append))
    return shown


class Read(HTMLParser):
    """The elements and the text of HTML, which must be closed in order."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.names, self.attributes, self.open, self.text = set[str](), dict[str, Any](), list[str](), ""
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.names.add(tag)
        self.attributes |= dict(attrs)
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def graph(text: str) -> Graph:
    """An imported graph in which everything that can be a text is this one."""
    rows: dict[str, list[Any]] = {
        "kind": ["neuron", "embedding", "logit"],
        "layer": [0, -1, 1],
        "position": [0, 0, 0],
        "neuron": [3, 1, 2],
        "token": [text] * 3,
        "activation": [1.0, None, 2.0],
        "attribution": [0.5, 0.2, 1.0],
        **{name: [None] * 3 for name in ("gradient", "explained", "influence", "bias_share")},
    }
    links = {"source": [1, 0], "target": [0, 2], "weight": [1.0, 2.0], "share": [0.5, 1.0], "attribution": [0.1, 0.4]}
    made: dict[str, Any] = {
        "text": text,
        "tokens": (text,),
        "n_layers": 1,
        "labels": {0: text},
        "notes": {"scan": text},
    }
    return Graph(nodes=nodes_table(rows), links=edges_table(links), **made)


def many(graph: Graph, count: int) -> Graph:
    """The same with so many edges, its own again and again."""
    assert graph.links is not None
    links = graph.links.take(pa.array(np.arange(count) % graph.n_edges))
    return graph.model_copy(update={"links": links})


# ------------------------------------------------------------------------------------------------ short and whole


def test_reprs_are_a_line_and_tables_are_small(circuit: Circuit, evaluation: Evaluation) -> None:
    model = load("llama")
    grouped = circuit.model_copy(update={"groups": {"a": (0, 1), "b": (2,)}})
    asked: dict[str, Any] = {"random": 1, "basis": "activation"}
    results = [
        circuit,
        graph("plain"),
        tracer.attribute(model, [PROMPT]),
        evaluation,
        tracer.edge_curves(model, circuit, shares=[0.5, 1.0], ablation="zero"),
        tracer.knockouts(model, grouped, ablation="zero"),
        tracer.steer(model, circuit, PROMPT, factor=0, max_new_tokens=2, random=2),
        tracer.sweep(model, grouped, [PROMPT], factors=[0.0], random=asked["random"]),
        tracer.compare(circuit, tracer.trace(model, "The keys near the car", 20, target=" are", foil=" is")),
        tracer.neuron_tokens(model, [(0, 1, 1)], 3)[0],
        tracer.filter_prompts(model, [PROMPT]),
        tracer.estimate_quality(model, circuit, n_each=4),
        model,
    ]
    for one in results:
        name = type(one).__name__
        line, page = repr(one), one._repr_html_()
        assert "\n" not in line, name
        assert len(line) < 400, name
        assert "pyarrow" not in line + page, name
        assert "tensor(" not in line + page, name
        assert len(page) < 60_000, name
        read = Read(page)
        assert read.names <= {"div", "table", "thead", "tbody", "tr", "th", "td", "caption", "span"}, name
        assert "color:" not in page.replace("currentColor", ""), f"{name}: the notebook's colours, light or dark"
        assert (name in line) or name in ("Quality",), line


def test_a_circuits_table_has_its_numbers(circuit: Circuit) -> None:
    strongest = circuit.neurons.slice(0, 1).to_pylist()[0]
    for content in (repr(circuit), Read(circuit._repr_html_()).text):
        assert f"{circuit.metric:+.4f} logits" in content
    assert f"{strongest['attribution']:+.4f}" in circuit._repr_html_()
    assert circuit.edges["source_name"][0].as_py().replace(" ", "") in circuit._repr_html_().replace(" ", "")


@pytest.mark.parametrize("text", [one for one in (*MALICIOUS, *FORMULAS) if is_text(one)])
def test_hostile_text_is_shown_and_runs_nothing(text: str) -> None:
    made = graph(text)
    page = made._repr_html_()
    read = Read(page)
    assert read.names <= {"div", "table", "thead", "tbody", "tr", "th", "td", "caption", "span"}
    assert set(read.attributes) <= {"class", "style", "scope"}
    assert len(page) < 60_000
    assert (repr(made) + read.text).isprintable()
    outside = page.replace("<span>$</span>", "").replace("<span>\\</span>", "")
    assert "$" not in outside
    assert "\\" not in outside
    frame = notebook.framed(made)._repr_html_()
    assert Read(frame).names <= {"iframe", "div"}
    assert "<script" not in frame.partition("srcdoc=")[0]


def test_names_in_edges_and_paths_are_those_of_the_nodes(circuit: Circuit) -> None:
    nodes, edges = circuit.to_pandas()
    assert edges is not None
    for end in ("source", "target"):
        assert edges[f"{end}_name"].tolist() == nodes["name"].iloc[edges[end]].tolist()
    row = circuit.neurons.to_pylist()[0]
    token = row["token"].replace(" ", "␣")
    assert nodes["name"][0] == f"L{row['layer']} N{row['neuron']} @{row['position']} {token}"
    for way in circuit.paths(3):
        assert list(way.names) == nodes["name"].iloc[list(way.nodes)].tolist()
        assert " -> ".join(way.names) in repr(way)


def test_dir_has_no_attic(circuit: Circuit) -> None:
    names = set(dir(circuit))
    assert {"nodes", "edges", "paths", "show", "plot", "view", "to_pandas", "model", "_repr_html_"} <= names
    ours = {name for name in names if not name.startswith("__")}
    assert not {
        name for name in ours if name.startswith("model_") or name in ("construct", "parse_obj", "copy", "json")
    }
    assert {name for name in ours if name.startswith("_")} == {"_repr_html_"}
    assert circuit.model_copy() == circuit  # they are there for whoever knows them


# ------------------------------------------------------------------------------------------------ frames


def test_show_prints_the_terminals_table(circuit: Circuit, capsys: pytest.CaptureFixture[str]) -> None:
    assert circuit.show(3) is None
    said = capsys.readouterr().out
    assert "Strongest nodes" in said
    assert f"{circuit.neurons['attribution'][2].as_py():+.4f}" in said


def test_a_notebook_shows_html(circuit: Circuit, kernel: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    circuit.show(3)
    (frame,) = kernel
    assert "<table" in frame._repr_html_()
    assert capsys.readouterr().out == ""


def test_view_in_a_notebook_is_a_frame_that_reaches_nothing(
    circuit: Circuit, kernel: list[Any], tmp_path: Path
) -> None:
    frame = circuit.view(height=400)
    read = Read(frame._repr_html_())
    assert read.names == {"iframe"}
    assert read.attributes["sandbox"] == "allow-scripts allow-downloads"  # no origin: neither the notebook nor storage
    assert read.attributes["height"] == "400"
    assert read.attributes["srcdoc"] == tracer.view(circuit, tmp_path / "page.html").read_text()
    assert "default-src 'none'" in read.attributes["srcdoc"]
    circuit.view(tmp_path / "own.html")
    assert (tmp_path / "own.html").read_text() == read.attributes["srcdoc"]
    assert repr(frame).startswith("<graph page of <Circuit")


def test_a_large_graph_is_framed_by_its_strongest_edges(circuit: Circuit) -> None:
    large = many(circuit, 200_000)
    content = notebook.framed(large)._repr_html_()
    assert notebook.INLINE / 2 < len(content) < notebook.INLINE + 2000
    said = Read(content).text
    assert "strongest of 200,000 edges" in said
    assert "circuit.view('graph.html')" in said
    few = notebook.framed(circuit, most=1000)
    assert "too much for a notebook" in few._repr_html_()


def test_view_elsewhere_is_a_file(circuit: Circuit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened: list[str] = []
    monkeypatch.setattr(notebook.webbrowser, "open", opened.append)
    monkeypatch.setattr(notebook, "_has_browser", lambda: True)
    monkeypatch.setattr(notebook.tempfile, "tempdir", str(tmp_path))
    file = circuit.view()
    assert file.parent == tmp_path
    assert "<script" in file.read_text()
    assert opened == [file.as_uri()]
    assert circuit.view(tmp_path / "a.html", open=False) == tmp_path / "a.html"
    assert len(opened) == 1


# ------------------------------------------------------------------------------------------------ figures and frames


def test_plots_draw_the_numbers(circuit: Circuit, evaluation: Evaluation) -> None:
    sums = plots.by_place(circuit)
    rows = circuit.neurons.to_pylist()
    assert sums.sum() == pytest.approx(sum(row["attribution"] for row in rows))
    for at in {(row["layer"], row["position"]) for row in rows}:
        alike = (row["attribution"] for row in rows if (row["layer"], row["position"]) == at)
        assert sums[at] == pytest.approx(sum(alike))
    places, bars_of = circuit.plot().axes[:2]
    assert np.array_equal(places.images[0].get_array(), sums)
    widths = [patch.get_width() for patch in bars_of.patches]
    assert widths == pytest.approx([row["attribution"] for row in rows[: plots.BARS]])
    drawn = evaluation.plot().axes[0].lines[0].get_ydata()
    assert np.array_equal(drawn, evaluation.faithfulness.estimate.numpy())
    axes = evaluation.plot().axes[0]
    assert evaluation.plot(axes) is axes.figure
    assert circuit.plot()._repr_png_().startswith(b"\x89PNG")
    assert len(circuit.plot(kind="nodes").axes) == 1
    with refused(JobError, "one of the two"):
        circuit.plot(axes)
    with refused(JobError, "positions"):
        circuit.plot(kind="no")


def test_frames_are_the_tables(circuit: Circuit, evaluation: Evaluation) -> None:
    nodes, edges = circuit.to_pandas()
    assert pa.Table.from_pandas(nodes.drop(columns="name"), schema=circuit.nodes.schema).equals(circuit.nodes)
    assert edges is not None
    assert edges["weight"].tolist() == circuit.edges["weight"].to_pylist()
    curves = evaluation.to_pandas()
    assert curves["size"].tolist() == list(evaluation.sizes)
    assert curves["faithfulness"].tolist() == evaluation.faithfulness.estimate.tolist()
    found = tracer.attribute(load("llama"), [PROMPT, Prompt("The car", " are", " is")])
    frame = found.to_pandas(top=5)
    assert len(frame) == 10
    for row in frame.itertuples():
        assert row.attribution == found.nodes[row.prompt, row.layer, row.position, row.neuron]
        assert row.activation == found.activations[row.prompt, row.layer, row.position, row.neuron]
    assert abs(frame["attribution"][0]) == float(found.nodes[0].abs().max())
    steered = tracer.steer(load("llama"), circuit, PROMPT, factor=0, max_new_tokens=0, random=2)
    assert steered.to_pandas()["probability_after"].tolist() == [one.probability.after for one in steered.effects]


# ------------------------------------------------------------------------------------------------ names and texts


def test_texts_and_names_are_the_records_and_models(circuit: Circuit, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[Any] = []
    named = sys.modules["tracer.model.named"]
    monkeypatch.setattr(named, "load", lambda name: loads.append(name) or load("llama"))
    monkeypatch.setattr(named, "_kept", named._Kept())
    asked: dict[str, Any] = {"target": " are", "foil": " is"}
    again = tracer.trace("some/model", "The secretaries near the car", 20, **asked)
    assert again == circuit.model_copy(update={"seconds": again.seconds})
    by_text = tracer.attribute("some/model", "The secretaries near the car", **asked)
    by_record = tracer.attribute(load("llama"), [PROMPT])
    assert bool((by_text.nodes == by_record.nodes).all())
    tests = ["The secretaries near the man", Prompt("The secretaries near the man", " are", " is")]
    one, other = (tracer.evaluate("some/model", circuit, [test], "zero", [5]) for test in tests)
    assert one.faithfulness.estimate.tolist() == other.faithfulness.estimate.tolist()
    how: dict[str, Any] = {"factor": 0, "max_new_tokens": 0, "random": 0}
    steered = [
        tracer.steer("some/model", circuit, "The secretaries near the car", **asked, **how),
        tracer.steer(load("llama"), circuit, PROMPT, **how),
    ]
    assert steered[0].effects == steered[1].effects
    assert loads == ["some/model"]  # once, for all of them
    tracer.neuron_tokens("another/model", [(0, 1)], 2)
    assert loads == ["some/model", "another/model"]


def test_a_folder_that_changed_is_loaded_again(tmp_path: Path) -> None:
    from tracer.model import named

    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = named._key(tmp_path)
    assert named._key(str(tmp_path)) == before
    (tmp_path / "model.safetensors").write_bytes(b"22")
    assert named._key(tmp_path) != before


def test_what_is_asked_twice_is_refused() -> None:
    with refused(JobError, "target=' was'", "tracer.Prompt(..., target=...)"):
        tracer.trace(load("llama"), PROMPT, target=" was")
    with refused(JobError, "target=' was'"):
        tracer.attribute(load("llama"), [PROMPT], target=" was")


# ------------------------------------------------------------------------------------------------ progress


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the bars that were shown, on a terminal that is watched."""
    made: list[str] = []

    class Bar:
        n = last_print_n = 0

        def __init__(self, total: int, desc: str, **_: Any) -> None:
            made.append(desc)

        def update(self, count: int) -> None:
            self.n += count

        def close(self) -> None:
            made.append("closed")

    monkeypatch.setattr(bars, "_tqdm", lambda: Bar)
    monkeypatch.setattr(bars, "DELAY", -1)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    return made


def test_a_terminal_has_one_bar(circuit: Circuit, drawn: list[str]) -> None:
    tracer.estimate_quality(load("llama"), circuit, n_each=4)  # which attributes, and then ablates
    assert drawn == ["checking the estimate", "closed"]


def test_a_bar_is_switched_off_or_replaced(circuit: Circuit, drawn: list[str]) -> None:
    told: list[tuple[int, int]] = []
    model = load("llama")
    tracer.evaluate(model, circuit, sizes=[5], ablation="zero", progress=False)
    tracer.evaluate(model, circuit, sizes=[5], ablation="zero", progress=lambda *count: told.append(count))
    assert drawn == []
    assert told[-1][0] == told[-1][1] > 0
    from tracer.errors import surface

    with surface("shell"):
        tracer.evaluate(model, circuit, sizes=[5], ablation="zero")
    assert drawn == []  # the command line has its own


def test_nothing_is_printed_where_nobody_watches(circuit: Circuit, capfd: pytest.CaptureFixture[str]) -> None:
    assert not bars.is_watched()
    with bars.shown(None, "something") as report:
        assert report is None
    tracer.evaluate(load("llama"), circuit, sizes=[5], ablation="zero")
    assert capfd.readouterr() == ("", "")


def test_a_terminals_ipython_is_no_notebook(kernel: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert display.in_notebook()
    assert bars.is_watched()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=SimpleNamespace))
    assert not display.in_notebook()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    assert not display.in_notebook()


# ------------------------------------------------------------------------------------------------ run folders


def test_open_run_reads_one_prompts_run(circuit: Circuit, evaluation: Evaluation, tmp_path: Path) -> None:
    from tracer.reports.tables import evaluation_json

    circuit.save(tmp_path / "run")
    run = tracer.open_run(tmp_path / "run")
    assert (run.kind, run.status.state, run.status.done) == ("trace", "done", 1)
    assert run.circuit() == circuit
    assert run.table("nodes").equals(circuit.nodes)
    assert run.sizes["nodes"] == circuit.nodes.num_rows
    assert run.to_pandas("neurons").shape[0] == circuit.n_neurons
    assert run.evaluation is None
    assert run.report is None
    (tmp_path / "run" / "evaluation.json").write_text(evaluation_json(evaluation))
    assert run.evaluation is not None
    assert run.evaluation.record() == {**evaluation.record()}
    assert "The secretaries near the car" in Read(run._repr_html_()).text
    with refused(JobError, "no effect"):
        run.circuit(0)


def test_open_run_reads_an_imported_graphs(tmp_path: Path) -> None:
    graph("plain").save(tmp_path / "run")
    run = tracer.open_run(tmp_path / "run")
    assert run.kind == "graph"
    assert run.circuit().n_edges == 2
    assert run.model is None


def test_open_run_reads_a_run_over_many_prompts(tmp_path: Path) -> None:
    done = tiny_run(tmp_path, 5)
    run = tracer.open_run(done.address)
    assert (run.kind, run.job, run.status.done) == ("dataset", done.job, 5)
    assert run.sizes["prompts"] == 5
    assert run.table("prompts").equals(done.table("prompts"))
    assert "5 of 5 committed: 5 ok" in Read(run._repr_html_()).text
    assert repr(run).startswith("<Run ")
    with refused(tracer.RunError, "nonsense"):
        run.table("nonsense")


def test_open_run_says_what_is_not_there(tmp_path: Path) -> None:
    with refused(tracer.RunError, "holds no run"):
        tracer.open_run(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with refused(tracer.RunError):
        tracer.open_run(tmp_path)
