"""Names and notes of nodes in the groups file: back as they went in, in older files, in exports, and made anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tracer
from helpers import refused
from tracer.circuit import supernodes_file
from tracer.circuit.circuit import Circuit
from tracer.circuit.exchange import from_neuronpedia, to_neuronpedia
from tracer.circuit.neuronpedia import lost
from tracer.circuit.notes import Notes, with_marks
from tracer.circuit.supernodes_file import Note, apply, encoded, of_graph, parsed
from tracer.errors import RunError


@pytest.fixture(scope="module")
def circuit() -> Circuit:
    return tracer.trace(tracer.load("demo"), tracer.Prompt("The keys near", target=" are", foil=" is"), nodes=20)


def marked(circuit: Circuit) -> Any:
    update = {"called": {0: "plural </script>", 3: "\u732b"}, "remarks": {0: "line\nline", 5: "text"}, "pins": (4,)}
    return circuit.model_copy(update=update)


def test_names_and_notes_come_back(circuit: Circuit) -> None:
    graph = marked(circuit)
    content = encoded(of_graph(graph))
    assert json.loads(content)["version"] == 2
    found = apply(parsed(content), circuit)
    assert (found.called, found.remarks, found.pins) == (graph.called, graph.remarks, graph.pins)
    assert encoded(of_graph(found)) == content
    assert (graph.fingerprint, graph.model_dump_json(exclude={"nodes", "links", "profiles"})) == (
        circuit.model_copy(update={"pins": (4,)}).fingerprint,
        circuit.model_copy(update={"pins": (4,)}).model_dump_json(exclude={"nodes", "links", "profiles"}),
    )


def test_a_file_without_notes_is_of_the_version_that_others_read(circuit: Circuit) -> None:
    content = json.loads(encoded(of_graph(circuit)))
    assert (content["version"], "notes" in content) == (1, False)
    assert parsed(json.dumps(content).encode()) == of_graph(circuit)
    for version in (0, 3, True, "1", 1.0):
        with refused(RunError, "this tracer reads 1 to 2"):
            parsed(json.dumps(content | {"version": version}).encode())


def test_a_note_says_something_of_a_node_that_is_there(circuit: Circuit) -> None:
    whole = of_graph(marked(circuit))
    with pytest.raises(ValueError, match="neither a name nor a text"):
        Note(layer=0, position=0, neuron=1)
    elsewhere = whole.model_copy(update={"notes": (Note(layer=0, position=2, neuron=10**6, name="x"),)})
    with refused(RunError, "which is not a node here"):
        apply(elsewhere, circuit)
    assert apply(elsewhere, circuit, partial=True).called == {}


def test_neuronpedia_gets_names_and_is_said_to_lose_notes(circuit: Circuit) -> None:
    graph = marked(circuit)
    content = to_neuronpedia(graph)
    assert content["nodes"][0]["clerp"] == "plural </script>"
    assert content["nodes"][0]["clerp"] != to_neuronpedia(circuit)["nodes"][0]["clerp"]
    assert any("notes of nodes" in one for one in lost(graph, content))
    assert not any("notes of nodes" in one for one in lost(circuit, content))
    back = from_neuronpedia(content)
    assert isinstance(back, Circuit)
    assert back.fingerprint == circuit.fingerprint


def test_groups_that_are_found_anew_keep_pins_and_notes(circuit: Circuit, tmp_path: Path) -> None:
    circuit.save(tmp_path / "run")
    old = of_graph(marked(circuit))
    supernodes_file.write_to_run(tmp_path / "run", old)
    made = of_graph(circuit)
    kept = with_marks(tmp_path / "run", made)
    assert (kept.notes, kept.pinned) == (old.notes, old.pinned)
    supernodes_file.write_to_run(tmp_path / "run", old.model_copy(update={"circuit": "another"}))
    with pytest.warns(UserWarning, match="of another circuit"):
        assert with_marks(tmp_path / "run", made) == made
    (tmp_path / "run" / "supernodes.json").write_text("{")
    with pytest.warns(UserWarning, match="made anew"):
        assert with_marks(tmp_path / "run", made) == made


def test_a_prompts_notes_have_a_file_of_their_own(circuit: Circuit, tmp_path: Path) -> None:
    circuit.save(tmp_path / "run")
    supernodes_file.write_to_run(tmp_path / "run", of_graph(marked(circuit)))
    notes = Notes(tmp_path / "run", circuit, prompt=3)
    assert notes.shown()[0].called == marked(circuit).called, "the dataset's, until it has its own"
    assert notes.write(encoded(of_graph(circuit)), notes.read()[1]) is not None
    assert (tmp_path / "run" / "supernodes-3.json").exists()
    assert notes.shown()[0].called == {}
    assert supernodes_file.read(tmp_path / "run").notes != ()
