"""Supernodes: named groups of a circuit's nodes, pins, and names and notes of nodes, as the one file that all who use
them read and write.

``supernodes.json`` is written by `tracer group` and by the page of `tracer view`, is there to be edited by hand, and is
read by the page, `steer --group`, `evaluate --supernodes` and the export. A member is a neuron of one polarity at a
position, or wherever it is. Knows the file's form and which nodes of a graph it names. Refuses to know how groups come
about (meaning/supernodes.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import Field, ValidationError, model_serializer, model_validator

from tracer.circuit.circuit import Graph, Traced
from tracer.circuit.said import polarities
from tracer.errors import JobError, RunError, option, quoted, writing
from tracer.experts import Neuron, parse_within
from tracer.records import Record
from tracer.settings import as_job_error
from tracer.store.run_folder import SUPERNODES, RunFolder
from tracer.system import jsontext, wholefile

FORMAT, PAGE_FORMAT, VERSION = "tracer-supernodes", "tracer-groups", 2
"""`PAGE_FORMAT` is what the page of older versions saved, which is still read. Version 2 has notes; a file without them
says 1, so that older versions read it."""
ANYWHERE = -1
"""The position of a member that stands for its neuron wherever it is."""
MAX_BYTES = 64 * 2**20


class Member(Record):
    """One node, or one neuron wherever it is.

    Attributes:
        layer: of the model; -1 for an embedding, the number of layers for a logit. neuron: for those the token id; else
            its number in the layer, or in the expert (``"neuron": "E17 N45"`` in the file).
        position: of the prompt; -1 for all.
        polarity: the sign of its value, 1 or -1; either if None. expert: that it belongs to, where it is named by it.
    """

    layer: int = Field(ge=-1, lt=2**15, strict=True)
    position: int = Field(ge=-1, lt=2**31, strict=True)
    neuron: int = Field(ge=-(2**31), lt=2**31, strict=True)
    polarity: Literal[1, -1] | None = None
    expert: Annotated[int, Field(ge=0, lt=2**31, strict=True)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        """A neuron that is written by its expert, as its number and the expert's."""
        if not (isinstance(given, dict) and isinstance(given.get("neuron"), str)):
            return given
        try:
            _, expert, neuron = parse_within(0, given["neuron"])
        except JobError as error:
            raise ValueError(f"{error.rule}; {error.next_step}") from None
        return given | {"neuron": neuron} | ({} if expert is None else {"expert": expert})

    @model_serializer(mode="wrap")
    def _without_none(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Without an expert where none is named, as files of before."""
        kept = handler(self)
        return kept if self.expert is not None else {name: kept[name] for name in kept if name != "expert"}

    @property
    def written(self) -> int | Neuron:
        """Its neuron by its number in the layer, or as it is named."""
        return self.neuron if self.expert is None else Neuron(self.layer, self.expert, self.neuron)

    def __str__(self) -> str:
        sign = {1: " +", -1: " -", None: ""}[self.polarity]
        return f"{Neuron(self.layer, self.expert, self.neuron)}{sign} {_place(self.position)}"


class Note(Member):
    """What a reader calls a node, and wrote about it; either may be empty, not both."""

    name: Annotated[str, Field(max_length=200)] = ""
    note: Annotated[str, Field(max_length=10_000)] = ""

    @model_validator(mode="after")
    def _says_something(self) -> Note:
        if not (self.name.strip() or self.note.strip()):
            raise ValueError("a note has neither a name nor a text")
        return self


class Group(Record):
    """A supernode: its name, what is to be said of it, and its members."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    description: Annotated[str, Field(max_length=10_000)] = ""
    nodes: tuple[Member, ...] = Field(min_length=1)


class Supernodes(Record):
    """The groups of one circuit.

    Attributes:
        circuit: its fingerprint; None where the groups are meant for any.
        groups: no member is in two, and no two have the same name. pinned: nodes that the page keeps in view.
        notes: names and notes of nodes.
        how: how they were found: settings, similarity, stability.
    """

    format: Literal["tracer-supernodes"] = FORMAT
    version: Literal[1, 2] = VERSION
    circuit: str | None = None
    groups: tuple[Group, ...] = ()
    pinned: tuple[Member, ...] = ()
    notes: tuple[Note, ...] = ()
    how: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _are_apart(self) -> Supernodes:
        names, seen = set[str](), dict[Member, str]()
        for group in self.groups:
            if group.name in names:
                raise ValueError(f"two groups are called {quoted(group.name)}")
            names.add(group.name)
            for member in group.nodes:
                if member in seen:
                    raise ValueError(f"{member} is in {quoted(seen[member])} and in {quoted(group.name)}")
                seen[member] = group.name
        return self

    def group(self, name: str) -> Group:
        """The group of that name.

        Raises:
            JobError: there is none.
        """
        for group in self.groups:
            if group.name == name:
                return group
        known = ", ".join(quoted(group.name) for group in self.groups) or "none"
        raise JobError(f"{option('group')} {quoted(name)}", f"the groups are {known}", "choose one of them")


def read(path: str | Path) -> Supernodes:
    """The groups in a file, or in the folder of a run.

    Raises:
        RunError: it cannot be read, or is damaged, or the folder has none.
    """
    path = Path(path)
    try:
        content = wholefile.read(path / SUPERNODES if path.is_dir() else path, MAX_BYTES)
    except OSError as error:
        rule = f"cannot be read ({error.strerror or error})"
        raise RunError(
            f"file {quoted(str(path), 300)}", rule, "check its name, or make it with 'tracer group'"
        ) from error
    return parsed(content, path.name)


def of_run(address: Any) -> Supernodes | None:
    """The groups that lie in a run folder, which may be in an object store; None where there are none.

    Raises:
        RunError: they are damaged.
    """
    place = RunFolder(address).place
    return parsed(place.read(SUPERNODES), SUPERNODES) if place.exists(SUPERNODES) else None


def parsed(content: bytes, name: str = SUPERNODES) -> Supernodes:
    """The groups in a file's content.

    Raises:
        RunError: it is not such a file, or damaged: what of it, and where.
    """
    value = f"file {quoted(name)}"
    if len(content) > MAX_BYTES:
        raise RunError(value, f"is larger than {MAX_BYTES >> 20} MiB", "give a groups file")
    try:
        found = jsontext.parse(content, constants=False)
    except jsontext.JsonError as error:
        raise RunError(value, str(error), "mend it, or make it again with 'tracer group'") from error
    if not isinstance(found, dict) or found.get("format") not in (FORMAT, PAGE_FORMAT):
        rule = f'is not a groups file: it does not say "format": "{FORMAT}"'
        raise RunError(value, rule, "make one with 'tracer group', or save one from the page of 'tracer view'")
    if type(found.get("version")) is not int or not 1 <= found["version"] <= VERSION:
        rule = f"has version {quoted(found.get('version'))}, this tracer reads 1 to {VERSION}"
        raise RunError(value, rule, "read it with the version that wrote it, or make it again")
    found = found | {"version": VERSION}
    if found["format"] == PAGE_FORMAT:
        found = {"format": FORMAT, "groups": found.get("groups", []), "pinned": found.get("pins", [])}
    try:
        return Supernodes.model_validate(found)
    except ValidationError as error:
        what = as_job_error(error, "its content")
        raise RunError(value, f"is damaged: {what.value}: {what.rule}", "mend it there, or make it again") from error


def encoded(supernodes: Supernodes) -> bytes:
    """The content of the file, the same for the same groups; a line a member, to be edited by hand."""
    content = supernodes.model_dump(mode="json", exclude={"groups", "pinned", "notes"})
    content["version"] = VERSION if supernodes.notes else 1
    how = json.dumps(content.pop("how"), indent=1, sort_keys=True, allow_nan=False).replace("\n", "\n ")
    lines = ["{", *(f" {_json(name)}: {_json(value)}," for name, value in content.items()), ' "groups": [']
    for number, group in enumerate(supernodes.groups):
        lines.append(f'  {{"name": {_json(group.name)}, "description": {_json(group.description)}, "nodes": [')
        lines += _members(group.nodes)
        lines.append("  ]}" + ("," if number + 1 < len(supernodes.groups) else ""))
    lines += [" ],", ' "pinned": [', *_members(supernodes.pinned), " ],"]
    if supernodes.notes:
        lines += [' "notes": [', *_members(supernodes.notes), " ],"]
    lines += [f' "how": {how}', "}", ""]
    return "\n".join(lines).encode()


def write(path: str | Path, supernodes: Supernodes) -> Path:
    """Write the file in place of one that is there.

    Raises:
        RunError: it cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise RunError(f"path {quoted(str(path), 300)}", "is a folder", "give a file name")
    with writing(path):
        return wholefile.write(path, encoded(supernodes))


def write_to_run(address: Any, supernodes: Supernodes) -> None:
    """Write the file into the folder of a run; the run's seal does not cover it, since it is there to be edited.

    Raises:
        RunError: it cannot be written.
    """
    folder = RunFolder(address)
    try:
        folder.place.write(SUPERNODES, encoded(supernodes))
    except OSError as error:
        rule = f"cannot be written ({error.strerror or error})"
        raise RunError(f"folder {quoted(str(folder.place), 300)}", rule, f"name a file with {option('out')}") from error


def apply(supernodes: Supernodes, graph: Graph, partial: bool = False) -> Graph:
    """The graph with these groups, pins, names and notes, in place of its own.

    Args:
        partial: leave out what the graph does not have, as a prompt's graph has not all of its dataset's nodes.

    Raises:
        RunError: the groups are of another circuit, or name nodes that this one does not have.
    """
    check_circuit(supernodes, graph)
    numbers, taken = _Numbers(graph, partial), set[int]()
    groups = dict[str, tuple[int, ...]]()
    for group in supernodes.groups:
        ids = numbers.of(group.nodes, f"group {quoted(group.name)}")
        groups[group.name] = tuple(node for node in ids if node not in taken)
        taken.update(ids)
    pins = numbers.of(supernodes.pinned, "pinned")
    written: dict[str, dict[int, str]] = {"called": {}, "remarks": {}}
    for one in supernodes.notes:
        for node in numbers.of((one,), "a note"):
            written["called"] |= {node: one.name} if one.name.strip() else {}
            written["remarks"] |= {node: one.note} if one.note.strip() else {}
    kept = {name: ids for name, ids in groups.items() if ids}
    return graph.model_copy(update={"groups": kept, "pins": pins, **written})


def only(supernodes: Supernodes, name: str, graph: Graph) -> Graph:
    """The nodes of one group alone, without edges.

    Raises:
        JobError: no group of that name. RunError: as of `apply`.
    """
    supernodes.group(name)
    nodes = graph.nodes.take(list(apply(supernodes, graph).groups.get(name, ())))
    numbered = nodes.set_column(1, "node_id", pa.array(range(nodes.num_rows), nodes.schema.field("node_id").type))
    update = {
        "nodes": numbered,
        "links": None,
        "groups": {},
        "pins": (),
        "labels": {},
        "original": {},
        "called": {},
        "remarks": {},
    }
    return graph.model_copy(update=update | ({"profiles": None} if isinstance(graph, Traced) else {}))


def check_circuit(supernodes: Supernodes, graph: Graph) -> None:
    """Refuse groups of another circuit: its positions are other tokens, and its neurons may be another model's.

    Raises:
        RunError: that.
    """
    own, given = getattr(graph, "fingerprint", None), supernodes.circuit
    if own is not None and given is not None and own != given:
        rule = f"are of another circuit ({quoted(given[:8])}, this is {quoted(own[:8])})"
        step = "group this one with 'tracer group'; to use them all the same, say \"circuit\": null in the file"
        raise RunError("groups", rule, step)


def of_graph(graph: Graph) -> Supernodes:
    """A graph's groups, pins, names and notes, as the file holds them; what is in two groups stays in the first."""
    rows = graph.nodes.select(["kind", "layer", "position", "neuron", "activation"]).to_pylist()
    taken, groups = set[int](), list[Group]()
    for name, ids in graph.groups.items():
        own = [node for node in dict.fromkeys(ids) if node not in taken]
        taken.update(own)
        if own:
            groups.append(Group(name=name, nodes=tuple(member_of(rows[node]) for node in own)))
    pinned = tuple(member_of(rows[node]) for node in graph.pins)
    notes = tuple(
        Note(**vars(member_of(rows[node])), name=graph.called.get(node, ""), note=graph.remarks.get(node, ""))
        for node in sorted({*graph.called, *graph.remarks})
    )
    fingerprint = getattr(graph, "fingerprint", None)
    return Supernodes(circuit=fingerprint, groups=tuple(groups), pinned=pinned, notes=notes)


def member_of(row: dict[str, Any]) -> Member:
    """The member that a row of the nodes table is."""
    place = {name: row[name] for name in ("layer", "position", "neuron")}
    return Member(**place, polarity=polarity_of(row["activation"]) if row["kind"] == "neuron" else None)


def polarity_of(activation: float | None) -> Literal[1, -1]:
    """The sign of a neuron's value; 1 where it is not known."""
    return -1 if polarities(activation) == (-1,) else 1


class _Numbers:
    """The node ids of a graph by the members that name them; each is named once."""

    def __init__(self, graph: Graph, partial: bool) -> None:
        self._partial, self._numbering = partial, graph.numbering
        self._at: dict[tuple[int, int, int], int] = {}
        self._anywhere: dict[tuple[int, int], list[int]] = {}
        self._polarity: dict[int, int | None] = {}
        for row in graph.nodes.select(["node_id", "kind", "layer", "position", "neuron", "activation"]).to_pylist():
            node, layer, neuron = row["node_id"], row["layer"], row["neuron"]
            self._at[layer, row["position"], neuron] = node
            self._anywhere.setdefault((layer, neuron), []).append(node)
            known = row["kind"] == "neuron" and row["activation"] is not None
            self._polarity[node] = polarity_of(row["activation"]) if known else None

    def of(self, members: tuple[Member, ...], where: str) -> tuple[int, ...]:
        """Each node that a member is, once.

        Raises:
            RunError: a member is no node here, and not all need be.
        """
        found: dict[int, None] = {}
        for member in members:
            own = [node for node in self._places(member) if self._may_be(node, member.polarity)]
            if not own and not self._partial:
                step = "mend the file, or group this circuit with 'tracer group'"
                raise RunError(where, f"names {member}, which is not a node here", step)
            found |= dict.fromkeys(own)
        return tuple(found)

    def _may_be(self, node: int, polarity: int | None) -> bool:
        return None in (polarity, self._polarity[node]) or polarity == self._polarity[node]

    def _places(self, member: Member) -> list[int]:
        try:
            neuron = self._numbering.numbered(member.written)
        except JobError as error:
            raise RunError(f"node {member}", error.rule, error.next_step) from error
        if member.position == ANYWHERE:
            return self._anywhere.get((member.layer, neuron), [])
        node = self._at.get((member.layer, member.position, neuron))
        return [] if node is None else [node]


def _place(position: int) -> str:
    return "anywhere" if position == ANYWHERE else f"at position {position}"


def _members(members: Sequence[Member]) -> list[str]:
    ends = [","] * (len(members) - 1) + [""]
    return [f"   {_json(member.model_dump())}{end}" for member, end in zip(members, ends, strict=False)]


def _json(value: Any) -> str:
    """JSON on one line; a text as it is, for whoever edits it."""
    return json.dumps(value, ensure_ascii=not isinstance(value, str), allow_nan=False)
