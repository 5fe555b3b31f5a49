"""Supernodes of a dataset: at the end of its run, by the verb, and for all who read the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tracer
from inline import InlinePool
from tracer.circuit import supernodes_file
from tracer.circuit.from_run import circuit_of, graph_of
from tracer.circuit.supernodes_file import apply, of_run
from tracer.cli.app import app
from tracer.errors import JobError, RunError
from tracer.meaning.collapse import collapse
from tracer.reports import supernodes as shown
from tracer.runs.jobs import load_job

JOB: dict[str, Any] = {
    "kind": "dataset",
    "input": {"task": "sva", "structure": "simple", "count": 4},
    "shard_size": 2,
    "nodes": 24,
    "profiles": True,
    "circuit": "aligned",
    "supernodes": {"clusters": 3, "bootstraps": 4},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("supernodes") / "run"
    tracer.run(JOB, folder, pool=InlinePool())
    return folder


def test_the_end_of_a_run_groups_as_the_function_does(run: Path) -> None:
    file = of_run(run)
    assert file is not None
    found = tracer.supernodes(str(run), 3, bootstraps=4)
    notes = file.how.pop("notes")
    assert file == found.file
    assert list(found.notes) == notes
    assert found.file.how["n_prompts"] == 4
    assert file.circuit == circuit_of(run).fingerprint
    neurons = circuit_of(run).n_nodes
    assert sum(len(group.nodes) for group in file.groups) + len(file.how["ungrouped"]) == neurons


def test_the_same_job_writes_the_same_bytes(run: Path, tmp_path: Path) -> None:
    tracer.run(JOB, tmp_path / "again", pool=InlinePool())
    assert (tmp_path / "again" / "supernodes.json").read_bytes() == (run / "supernodes.json").read_bytes()


def test_a_datasets_collapsed_graph_adds_up(run: Path) -> None:
    file = of_run(run)
    assert file is not None
    grouped = apply(file, circuit_of(run))
    small = collapse(grouped)
    assert grouped.links is not None
    for name in ("weight", "attribution"):
        assert sum(small.edges[name].to_pylist()) == pytest.approx(sum(grouped.links[name].to_pylist()), rel=1e-5)


def test_a_prompts_graph_has_those_that_are_there(run: Path) -> None:
    file = of_run(run)
    assert file is not None
    grouped = apply(file, graph_of(run, 1), partial=True)
    assert grouped.groups
    rows = {row["node_id"]: row for row in grouped.nodes.to_pylist()}
    for name, members in grouped.groups.items():
        known = {(node.layer, node.position, node.neuron) for node in file.group(name).nodes}
        for node in members:
            assert (rows[node]["layer"], rows[node]["position"], rows[node]["neuron"]) in known


def test_the_file_is_read_by_the_verbs(run: Path, tmp_path: Path) -> None:
    def asked(*words: str) -> str:
        done = CliRunner().invoke(app, [*words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    out = tmp_path / "groups.json"
    table = asked("group", str(run), "--clusters", "3", "--bootstraps", "4", "--out", str(out))
    assert "3 groups of" in table
    assert "adjusted Rand" in " ".join(table.split())
    content = json.loads(out.read_text())
    content["groups"][0]["name"] = "mine </script>"
    out.write_text(json.dumps(content))
    page = tmp_path / "page.html"
    asked("view", str(run), "--groups", str(out), "--out", str(page))
    assert "mine \\u003c/script\\u003e" in page.read_text()
    asked("view", str(run), "--prompt", "0", "--out", str(page))
    assert json.loads((run / "supernodes.json").read_text())["groups"][0]["name"] in page.read_text()
    graph = tmp_path / "graph.json"
    asked("export", str(run), "--out", str(graph))
    params = json.loads(graph.read_text())["qParams"]
    file = of_run(run)
    assert file is not None
    assert [name for name, *_ in params["supernodes"]] == [group.name for group in file.groups]
    assert {node for _, *nodes in params["supernodes"] for node in nodes} == set(params["pinnedIds"])
    rows = json.loads(asked("group", str(run), "--clusters", "2", "--out", str(out), "--format", "json"))["rows"]
    assert len(rows) == 2
    told = asked("evaluate", str(run), "--sizes", "5", "--count", "2", "--supernodes", "--out", str(tmp_path))
    assert "What each supernode is worth" in told
    worth = json.loads((tmp_path / "evaluation.json").read_text())["supernodes"]
    assert worth["names"] == [group.name for group in file.groups]


def test_what_a_report_shows(run: Path) -> None:
    file = of_run(run)
    assert file is not None
    table, points = shown.blocks(file, apply(file, circuit_of(run)))
    assert len(table.content.rows) == 3
    assert any("adjusted Rand" in line for line in points.content)
    bare = file.model_copy(update={"how": {"method": "spectral", "groups": 3, "scores": "?"}})
    assert len(shown.blocks(bare, apply(bare, circuit_of(run)))) == 1  # what was edited away is not said
    (none,) = shown.blocks(file.model_copy(update={"groups": ()}), circuit_of(run))
    assert none.kind == "note"


def test_a_run_that_cannot_be_grouped_ends_and_says_why(tmp_path: Path) -> None:
    tracer.run(JOB | {"supernodes": {"clusters": 500}, "edges": False, "circuit": "free"}, tmp_path, pool=InlinePool())
    file = of_run(tmp_path)
    assert file is not None
    assert not file.groups
    assert "neurons are like another" in file.how["problem"]
    free = tracer.supernodes(str(tmp_path), 2, bootstraps=0)
    assert {node.position for group in free.file.groups for node in group.nodes} == {-1}
    with pytest.raises(JobError, match="of a free circuit"):
        tracer.supernodes(str(tmp_path), 2, free=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"profiles": False}, "need profiles: true"),
        ({"circuit": "none"}, "have no effect without a circuit"),
        ({"supernodes": {"range": "20:2"}}, "range must begin at 2"),
        ({"supernodes": {"range": [2]}}, "such as 2:20"),
        ({"supernodes": {"method": "kmeans"}}, "supernodes.method="),
        ({"supernodes": {"k": 3}}, "supernodes.k"),
        ({"circuit": "free", "supernodes": {"free": False}}, "is always true"),
    ],
)
def test_a_job_that_asks_for_what_cannot_be_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(JobError, match=said):
        load_job(JOB | change)


def test_groups_without_profiles_or_file_are_refused(run: Path, tmp_path: Path) -> None:
    prompt = tracer.Prompt("The keys near the cabinet", target=" are", foil=" is")
    tracer.trace(tracer.load("demo"), prompt, nodes=10).save(tmp_path / "one")
    done = CliRunner().invoke(app, ["group", str(tmp_path / "one")])
    assert isinstance(done.exception, RunError | JobError | SystemExit)
    assert "profiles" in (str(done.exception) + done.output)
    with pytest.raises(RunError, match="another circuit"):
        apply(supernodes_file.read(run), circuit_of(run).model_copy(update={"fingerprint": "0" * 64}))
