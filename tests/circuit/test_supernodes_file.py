"""The file of named groups: written, edited, read by all who use it, refused where it is not whole or of another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tracer
from tracer.circuit import supernodes_file
from tracer.circuit.circuit import Circuit
from tracer.circuit.exchange import from_neuronpedia, to_neuronpedia
from tracer.circuit.supernodes_file import Group, Member, Supernodes, apply, encoded, of_graph, parsed, read, write
from tracer.errors import JobError, RunError


@pytest.fixture(scope="module")
def circuit() -> Circuit:
    prompt = tracer.Prompt("The keys near the cabinet", target=" are", foil=" is")
    return tracer.trace(tracer.load("demo"), prompt, nodes=40)


members = st.builds(
    Member,
    layer=st.integers(-1, 40),
    position=st.integers(-1, 30),
    neuron=st.integers(-2, 10_000),
    polarity=st.sampled_from([1, -1, None]),
)
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)


@given(
    groups=st.lists(st.tuples(texts, st.text(st.characters(exclude_categories=["Cs"]), max_size=30)), max_size=4),
    nodes=st.lists(members, min_size=8, max_size=8, unique=True),
    how=st.dictionaries(texts, st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts | st.none()),
    whose=st.none() | texts,
)
def test_what_is_written_is_read(groups: Any, nodes: list[Member], how: dict[str, Any], whose: str | None) -> None:
    named = {name: (said, nodes[2 * i : 2 * i + 2]) for i, (name, said) in enumerate(groups)}
    given = Supernodes(
        circuit=whose,
        groups=tuple(Group(name=name, description=said, nodes=tuple(own)) for name, (said, own) in named.items()),
        pinned=tuple(nodes[:3]),
        how=how,
    )
    content = encoded(given)
    assert parsed(content) == given
    assert encoded(parsed(content)) == content
    assert json.loads(content)["format"] == "tracer-supernodes"


def test_a_member_has_a_line_of_its_own(tmp_path: Path) -> None:
    nodes = (Member(layer=1, position=2, neuron=3, polarity=-1), Member(layer=1, position=-1, neuron=4, polarity=1))
    path = write(tmp_path / "g.json", Supernodes(groups=(Group(name="a", nodes=nodes),)))
    lines = path.read_text().splitlines()
    assert '   {"layer": 1, "position": 2, "neuron": 3, "polarity": -1},' in lines
    assert read(path).group("a").nodes == nodes
    with pytest.raises(JobError, match="the groups are 'a'"):
        read(path).group("b")


def test_a_graphs_groups_come_back(circuit: Circuit) -> None:
    grouped = circuit.model_copy(update={"groups": {"plural": (0, 2), "ends": (1, 45)}, "pins": (3,)})
    file = of_graph(grouped)
    assert file.circuit == circuit.fingerprint
    assert {member.polarity for member in file.groups[0].nodes} <= {1, -1}
    assert apply(file, circuit) == grouped
    found = from_neuronpedia(to_neuronpedia(apply(file, circuit)))
    assert found.groups == grouped.groups
    content = to_neuronpedia(apply(file, circuit))["qParams"]
    assert [name for name, *_ in content["supernodes"]] == ["plural", "ends"]
    assert len(content["pinnedIds"]) == 5  # the page shows members only where they are pinned


def test_a_member_may_be_anywhere_and_has_a_sign(circuit: Circuit) -> None:
    row = circuit.neurons.to_pylist()[0]
    same = [
        other["node_id"]
        for other in circuit.neurons.to_pylist()
        if (other["layer"], other["neuron"]) == (row["layer"], row["neuron"])
        and (other["activation"] < 0) == (row["activation"] < 0)
    ]
    sign = -1 if row["activation"] < 0 else 1
    member = Member(layer=row["layer"], position=-1, neuron=row["neuron"], polarity=sign)
    assert apply(Supernodes(groups=(Group(name="g", nodes=(member,)),)), circuit).groups == {"g": tuple(same)}
    other = member.model_copy(update={"position": row["position"], "polarity": -sign})
    with pytest.raises(RunError, match="not a node here"):
        apply(Supernodes(groups=(Group(name="g", nodes=(other,)),)), circuit)


def test_of_a_part_of_a_circuit_what_is_there_is_taken(circuit: Circuit) -> None:
    file = of_graph(circuit.model_copy(update={"groups": {"a": (0, 1), "b": (2,)}}))
    missing = Member(layer=0, position=1, neuron=999_999, polarity=1)
    more = file.model_copy(update={"groups": (*file.groups, Group(name="c", nodes=(missing,)))})
    with pytest.raises(RunError, match=r"group 'c'.*L0 N999999 \+ at position 1"):
        apply(more, circuit)
    assert apply(more, circuit, partial=True).groups == {"a": (0, 1), "b": (2,)}
    assert apply(Supernodes(groups=(Group(name="c", nodes=(missing,)),)), circuit, partial=True).groups == {}


def test_groups_of_another_circuit_are_refused(circuit: Circuit) -> None:
    file = of_graph(circuit.model_copy(update={"groups": {"a": (0, 1)}})).model_copy(update={"circuit": "f" * 64})
    with pytest.raises(RunError, match="another circuit"):
        apply(file, circuit)
    assert apply(file.model_copy(update={"circuit": None}), circuit).groups == {"a": (0, 1)}


def test_a_file_that_the_page_of_older_versions_saved_is_read(circuit: Circuit, tmp_path: Path) -> None:
    rows = circuit.nodes.to_pylist()
    nodes = [{name: rows[i][name] for name in ("layer", "position", "neuron")} for i in (3, 1)]
    saved = {"format": "tracer-groups", "version": 1, "title": "x", "pins": nodes[:1]}
    path = tmp_path / "groups.json"
    path.write_text(json.dumps(saved | {"groups": [{"name": "g", "nodes": nodes}]}))
    found = apply(read(path), circuit)
    assert (found.groups, found.pins) == ({"g": (3, 1)}, (3,))


NODE = {"layer": 0, "position": 1, "neuron": 2, "polarity": 1}
GROUP = {"name": "a", "description": "", "nodes": [NODE]}
FILE = {"format": "tracer-supernodes", "version": 1, "circuit": None, "groups": [GROUP], "pinned": [], "how": {}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not JSON"),
        ("[]", "not a groups file"),
        ({}, "not a groups file"),
        ({**FILE, "version": 3}, "has version 3, this tracer reads 1 to 2"),
        ({**FILE, "more": 1}, "more=1"),
        ({**FILE, "groups": [GROUP, GROUP]}, "two groups are called 'a'"),
        ({**FILE, "groups": [GROUP, {**GROUP, "name": "b"}]}, "is in 'a' and in 'b'"),
        ({**FILE, "groups": [{**GROUP, "nodes": []}]}, "groups.0.nodes"),
        ({**FILE, "groups": [{**GROUP, "nodes": [{**NODE, "polarity": 0}]}]}, "groups.0.nodes.0.polarity=0"),
        ({**FILE, "groups": [{**GROUP, "nodes": [{**NODE, "layer": 1.5}]}]}, "groups.0.nodes.0.layer=1.5"),
        ({**FILE, "groups": [{**GROUP, "nodes": [{**NODE, "layer": True}]}]}, "groups.0.nodes.0.layer=True"),
        ({**FILE, "groups": [{**GROUP, "name": ""}]}, "groups.0.name"),
        ({**FILE, "groups": [{**GROUP, "name": "\ud800"}]}, "valid string"),
        ({**FILE, "groups": {}}, "groups="),
    ],
)
def test_a_file_that_is_damaged_says_where(content: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "supernodes.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(RunError) as raised:
        read(path)
    assert said in str(raised.value)
    with pytest.raises(RunError, match="cannot be read"):
        read(tmp_path / "none.json")


def test_a_run_folders_file_may_be_edited(circuit: Circuit, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    circuit.save(folder)
    assert supernodes_file.of_run(folder) is None
    file = of_graph(circuit.model_copy(update={"groups": {"a": (0, 1)}}))
    supernodes_file.write_to_run(folder, file)
    assert supernodes_file.of_run(folder) == read(folder) == file
    text = (folder / "supernodes.json").read_text()
    (folder / "supernodes.json").write_text(text.replace('"a"', '"my name"'))
    assert Circuit.load(folder) == circuit
    assert [group.name for group in read(folder).groups] == ["my name"]
    circuit.save(folder)  # again: what was made of the old one goes
    assert supernodes_file.of_run(folder) is None
