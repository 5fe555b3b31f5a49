"""Neuronpedia's (circuit-tracer's) graph JSON out of circuits, and into them.

Every file is checked against the shipped JSON schema, on its way out too. Ours comes back as the very circuit; what
others write is kept as it came, so that it can be exported again. Refuses to know files, and how a node of another tool
says where it is (circuit/foreign.py).

Source: Neuronpedia's graph schema and its upload's rules, circuit-tracer's graph files, as of 2026.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from importlib import metadata, resources
from typing import Any

import fastjsonschema
import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from tracer.circuit import identities
from tracer.circuit.circuit import BESIDE, ENDS, Circuit, Graph, Traced, edges_table, nodes_table
from tracer.circuit.foreign import Place, bad, cantor, is_neuron, label_of, places, token_of
from tracer.circuit.names import height
from tracer.circuit.said import Said, problem
from tracer.errors import JobError, first_line, option, quoted
from tracer.settings import TargetNeuron, settings

FLOAT32_MAX = float(np.finfo(np.float32).max)
UPLOADS = re.compile(r"[A-Za-z0-9_-]+")
"""What an upload to Neuronpedia takes as scan (the model) and slug (the graph's name there)."""

# The page knows no neurons: this is the kind of node it draws as a feature.
FEATURE = "cross layer transcoder"
_DIGESTS = ("digest", "sha256")
_OLD = (
    "its file is of an older tracer, whose hash was of nodes and edges alone: that its prompt and settings are as they "
    "were is not known"
)
_BESIDES = ("attribution", "gradient", "explained", "influence", "bias_share")
_ROUNDED = 1e-3  # by which a running total of shares may pass 1


def to_neuronpedia(graph: Graph, scan: str | None = None, slug: str | None = None) -> dict[str, Any]:
    """A graph in Neuronpedia's form, valid by the shipped schema. Shares are left out: weight over activation.

    Args:
        scan, slug: the model's and the graph's name there; made from the model's name and the prompt if None.

    Raises:
        JobError: a circuit without edges, a graph without positions, or a name has a character that an upload refuses.
    """
    if graph.links is None and isinstance(graph, Circuit):
        raise graph.without_edges("trace it with edges", ", which this format needs")
    if min(graph.nodes["position"].to_pylist(), default=0) < 0:
        rule, step = "has no positions, which this format needs", "use mib, graphml or csv"
        raise JobError("a free circuit", rule, f"{step}, or name one of the run's prompts: {option('prompt', 0)}")
    names = {name: value for name, value in (("scan", scan), ("slug", slug)) if value is not None}
    for name, value in names.items():
        if not UPLOADS.fullmatch(value):
            rule = "has a character that an upload to Neuronpedia refuses"
            raise JobError(f"{option(name)} {quoted(value)}", rule, "use letters, digits, - and _")
    if graph.original:
        return _as_it_came(graph, names)
    rows = graph.nodes.to_pylist()
    ids = [_node_id(row) for row in rows]
    cumulative = _cumulative([None if row["kind"] in ENDS else row["influence"] for row in rows])
    probabilities = iter(graph.probabilities if isinstance(graph, Circuit) else ())
    targets = set(graph.target_ids) if isinstance(graph, Circuit) else set()
    said = Said.of(graph)
    nodes = [
        _node(row, one, cumulative[i], probabilities, targets)
        | ({"clerp": said.name(row)} if row["kind"] == "neuron" else {})
        | ({"clerp": graph.called[i]} if i in graph.called else {})
        for i, (row, one) in enumerate(zip(rows, ids, strict=True))
    ]
    params = {"linkType": "both", "clickedId": "", "sg_pos": ""} | _chosen(graph, ids)
    content = {"metadata": _metadata(graph) | names, "qParams": params, "nodes": nodes, "links": _links(graph, ids)}
    if isinstance(graph, Circuit):
        content["metadata"]["tracer"]["sha256"] = _digest(content)
    _validate(content, "export")
    return content


def from_neuronpedia(content: Any, name: str = "graph") -> Graph:
    """The graph in a file's content; see `exchange.import_graph`."""
    _validate(content, name)
    about, params, nodes = content["metadata"], content["qParams"], content["nodes"]
    number = _numbered(nodes, name)
    found, n_layers = places(nodes, about, name)
    tokens = tuple(about["prompt_tokens"])
    _check_places(found, len(tokens), name)
    ours = _is_ours(content)
    columns, influence = _nodes_of(nodes, found, tokens)
    groups = _groups(params.get("supernodes", []), number, name)
    fields = {
        "nodes": nodes_table(columns),
        "links": edges_table(_links_of(content["links"], number, columns, name, ours)),
        "text": about["prompt"],
        "tokens": tokens,
        "n_layers": n_layers,
        "groups": groups,
    }
    if ours:
        return _as_circuit(fields, about["tracer"], name)
    members = {member for group in groups.values() for member in group}
    pins = tuple(number[one] for one in params.get("pinnedIds", []) if one in number and number[one] not in members)
    labels = {
        i: label for i, (node, place) in enumerate(zip(nodes, found, strict=True)) if (label := label_of(node, place))
    }
    notes = {"scan": about["scan"], "slug": about["slug"], "file": name}
    if "tracer" in about:
        notes["edited"] = "after tracer wrote it, so it is not that circuit any more"
    if not influence:
        notes["influence"] = "not read: the file's is no running total"
    rest = {key: value for key, value in content.items() if key not in ("metadata", "qParams", "nodes", "links")}
    unseen = [*(["qk_tracing_results"] if any(node.get("qk_tracing_results") for node in nodes) else []), *rest]
    if unseen:
        notes["not shown"] = f"{', '.join(unseen)} (kept for exporting it again)"
    original = {"metadata": about, "qParams": params, "nodes": nodes, "rest": rest}
    return Graph(**fields, notes=notes, original=original, labels=labels, pins=pins)


def lost(graph: Graph, content: Mapping[str, Any]) -> list[str]:
    """What the format could not hold of a graph, and what its readers will refuse."""
    found = ["share (worked out again on import, as weight / activation)"]
    if graph.links is None:
        found = ["edges (it has none)"]
    if isinstance(graph, Traced) and graph.profiles is not None:
        found.append("attribution profiles")
    if graph.remarks:
        found.append("notes of nodes (their names are kept, as the nodes' labels)")
    if not isinstance(graph, Circuit) and Said.of(graph):
        found.append("what neurons do beyond their names (tokens.parquet and descriptions.parquet of the run)")
    if isinstance(graph, Circuit) and public_name(graph.model.name) != graph.model.name:
        found.append(f"the model's folder (it is called {public_name(graph.model.name)!r})")
    for name in ("scan", "slug"):
        if not (isinstance(given := content["metadata"][name], str) and UPLOADS.fullmatch(given)):
            found.append(f"a {name} that an upload to Neuronpedia takes ({quoted(given)}): give {option(name)}")
    return found


def public_name(model: str) -> str:
    """A model's name for others: of a folder on this machine the last part alone."""
    plain = model.replace("\\", "/").rstrip("/")
    is_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", plain) and not plain.startswith(".") and not os.path.isdir(model)
    return model if is_id else plain.rpartition("/")[2] or "model"


# ------------------------------------------------------------------------------------------------- out


def _as_it_came(graph: Graph, names: Mapping[str, str]) -> dict[str, Any]:
    """An imported graph in the form it came in, every field of its nodes kept; groups, pins and the reader's names as
    they are now."""
    original = graph.original
    ids = [node["node_id"] for node in original["nodes"]]
    chosen, known = _chosen(graph, ids), set(ids)
    elsewhere = [one for one in original["qParams"].get("pinnedIds", []) if one not in known]
    chosen["pinnedIds"] = elsewhere + chosen["pinnedIds"]
    content = {
        "metadata": original["metadata"] | names,
        "qParams": original["qParams"] | chosen,
        "nodes": [
            node | ({"clerp": graph.called[i]} if i in graph.called else {}) for i, node in enumerate(original["nodes"])
        ],
        "links": _links(graph, ids),
        **original.get("rest", {}),
    }
    _validate(content, "export")
    return content


def _chosen(graph: Graph, ids: list[str]) -> dict[str, Any]:
    """Pins and groups; the page shows a group's members only where they are pinned too."""
    members = [node for group in graph.groups.values() for node in group]
    return {
        "pinnedIds": [ids[node] for node in dict.fromkeys([*graph.pins, *members])],
        "supernodes": [[name, *(ids[node] for node in group)] for name, group in graph.groups.items()],
    }


def _links(graph: Graph, ids: list[str]) -> list[dict[str, Any]]:
    links = graph.links.to_pydict() if graph.links is not None else {"source": [], "target": [], "weight": []}
    return [
        {"source": ids[source], "target": ids[target], "weight": weight}
        for source, target, weight in zip(links["source"], links["target"], links["weight"], strict=True)
    ]


def _digest(content: Mapping[str, Any]) -> str:
    """A hash of all that the circuit comes back from, by which a file that was edited is told from the circuit it was.
    Names that the page may change (scan, slug), pins and groups are not among it."""
    about = {name: value for name, value in content["metadata"].items() if name not in ("scan", "slug", "info")}
    if isinstance(about.get("tracer"), dict):
        about["tracer"] = {name: value for name, value in about["tracer"].items() if name not in _DIGESTS}
    return _hash([about, content["nodes"], content["links"]])


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _is_ours(content: Mapping[str, Any]) -> bool:
    """Whether a file is as tracer wrote it; the hash of older versions was of nodes and links alone."""
    record = content["metadata"].get("tracer")
    if not isinstance(record, dict):
        return False
    if "sha256" in record:
        return record["sha256"] == _digest(content)
    return record.get("digest") == _hash([content["nodes"], content["links"]])


def _node_id(row: Mapping[str, Any]) -> str:
    if row["kind"] == "embedding":
        return f"E_{row['neuron']}_{row['position']}"
    layer = row["layer"] + 1 if row["kind"] in ENDS else row["layer"]  # circuit-tracer leaves one free
    neuron = max(0, row["neuron"]) if row["kind"] == "target" else row["neuron"]  # a direction has no number
    return f"{layer}_{neuron}_{row['position']}"


def _node(
    row: Mapping[str, Any], node_id: str, influence: float | None, probabilities: Any, targets: set[int]
) -> dict[str, Any]:
    """One node; what the format has no place for goes under ``tracer``, which its readers ignore."""
    kind, layer, neuron, position = row["kind"], row["layer"], row["neuron"], row["position"]
    node: dict[str, Any] = {
        "node_id": node_id,
        "ctx_idx": position,
        "clerp": "",
        "influence": influence,
        "activation": row["activation"],
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "tracer": {name: row[name] for name in _BESIDES} | _expert(row),
    }
    if kind == "embedding":
        return node | {"feature": position, "layer": "E", "feature_type": kind, "jsNodeId": f"E_{neuron}-{position}"}
    if kind == "logit":
        probability = next(probabilities, None)
        shown = "?" if probability is None else f"{probability:.3f}"  # its page looks for a p
        return node | {
            "feature": neuron,
            "layer": str(layer + 1),
            "feature_type": kind,
            "jsNodeId": f"L_{neuron}-{position}",
            "clerp": f'Output "{row["token"]}" (p={shown})',
            "token_prob": probability or 0.0,
            "is_target_logit": neuron in targets,
        }
    if kind == "target":  # which the format has no kind for: it is where its page looks for logits
        same = {"feature": max(0, neuron), "layer": str(layer + 1), "feature_type": "logit", "is_target_logit": True}
        return node | same | {"jsNodeId": f"L_{max(0, neuron)}-{position}", "clerp": f"Target {row['token']}"}
    return node | {
        "feature": None if kind == "error" else cantor(layer, neuron),
        "layer": str(layer),
        "feature_type": "mlp reconstruction error" if kind == "error" else FEATURE,
        "jsNodeId": f"{layer}_{neuron}-0",
        "clerp": "" if kind == "error" else f"L{layer} N{neuron}",
    }


def _expert(row: Mapping[str, Any]) -> dict[str, int]:
    """The expert that a neuron belongs to; nothing where it belongs to none."""
    return {} if row["expert"] is None else {"expert": row["expert"]}


def _metadata(graph: Graph) -> dict[str, Any]:
    found: dict[str, Any] = {
        "slug": re.sub(r"[^a-z0-9]+", "-", graph.text.lower()).strip("-")[:60] or "graph",
        "scan": graph.notes.get("scan", "unknown"),
        "transcoder_list": [],
        "prompt_tokens": list(graph.tokens),
        "prompt": graph.text,
        "schema_version": 1,
        "info": {"generator": {"name": "neuron-tracer", "version": metadata.version("neuron-tracer")}},
    }
    if isinstance(graph, Circuit):
        content = graph.model_dump(
            mode="json",
            exclude={
                "nodes",
                "links",
                "profiles",
                "settings",
                "text",
                "tokens",
                "n_layers",
                "groups",
                "notes",
                "original",
                "labels",
            },
        )
        content["settings"] = graph.settings.record()
        content |= {
            name: table.to_pylist() for name, _ in BESIDE.values() if (table := getattr(graph, name)) is not None
        }
        content["model"]["name"] = public_name(graph.model.name)
        scan = re.sub(r"[^A-Za-z0-9_-]+", "-", content["model"]["name"].rpartition("/")[2]).strip("-") or "model"
        found |= {"scan": scan, "generation_settings": content["settings"], "tracer": content}
    return found


def _cumulative(influence: list[float | None]) -> list[float | None]:
    """Each node's place in the running total of influence, strongest first: what the page's threshold acts on."""
    values = np.array([value or 0.0 for value in influence])
    order = np.argsort(-values, kind="stable")
    running = np.empty(len(values))
    running[order] = np.cumsum(values[order]) / max(float(values.sum()), np.finfo(float).tiny)
    return [None if value is None else float(one) for value, one in zip(influence, running, strict=True)]


# -------------------------------------------------------------------------------------------------- in


def _numbered(nodes: list[dict[str, Any]], name: str) -> dict[str, int]:
    """The rows of the nodes, by their ids in the file."""
    number: dict[str, int] = {}
    for index, node in enumerate(nodes):
        if node["node_id"] in number:
            raise bad(name, f"node {quoted(node['node_id'])} is there twice")
        number[node["node_id"]] = index
    return number


def _check_places(found: list[Place], length: int, name: str) -> None:
    """Every node has a place of its own, at one of the prompt's tokens."""
    if repeated := [place for place, times in Counter(found).items() if times > 1]:
        raise bad(name, f"two nodes are {tuple(repeated[0])}")
    if beyond := [place for place in found if place.position >= length]:
        raise bad(name, f"position {beyond[0].position} lies beyond the {length} prompt tokens")


def _nodes_of(
    nodes: list[dict[str, Any]], found: list[Any], tokens: tuple[str, ...]
) -> tuple[dict[str, list[Any]], bool]:
    """The columns of the nodes table, and whether the file's influence could be read."""
    ours = [node.get("tracer", {}) for node in nodes]
    # Tools that trace neurons write their attributions there.
    others = any(is_neuron(node) and node.get("influence") is not None for node in nodes)
    influence = None if others else _apart([node.get("influence") for node in nodes])
    alone = influence if influence is not None else [None] * len(nodes)
    columns = {
        "kind": [place.kind for place in found],
        "layer": [place.layer for place in found],
        "position": [place.position for place in found],
        "neuron": [place.neuron for place in found],
        "expert": [
            record.get("expert") if place.kind == "neuron" else None for record, place in zip(ours, found, strict=True)
        ],
        "token": [token_of(node, place, tokens) for node, place in zip(nodes, found, strict=True)],
        "activation": [_float32(node.get("activation")) for node in nodes],
        "attribution": [_float32(record.get("attribution")) for record in ours],
        "gradient": [_float32(record.get("gradient")) for record in ours],
        "explained": [_float32(record.get("explained")) for record in ours],
        "influence": [
            _float32(record.get("influence") if record else one) for record, one in zip(ours, alone, strict=True)
        ],
        "bias_share": [_float32(record.get("bias_share", record.get("remainder"))) for record in ours],
    }
    return columns, influence is not None


def _float32(value: float | int | None) -> float | None:
    """A number that float32 can hold; others are refused."""
    if value is None:
        return None
    if not abs(value) < FLOAT32_MAX:
        raise bad("values", f"{quoted(value)} is not a finite float32 number")
    return float(value)


def _apart(cumulative: list[float | None]) -> list[float | None] | None:
    """Single influences from the running total that circuit-tracer writes, strongest first; None where the numbers
    are no shares, so that they cannot be one."""
    if any(value is not None and not 0 <= value <= 1 + _ROUNDED for value in cumulative):
        return None
    order = sorted((value, i) for i, value in enumerate(cumulative) if value is not None)
    apart: list[float | None] = [None] * len(cumulative)
    before = 0.0
    for value, i in order:
        apart[i], before = value - before, value
    return apart


def _links_of(
    links: list[dict[str, Any]], number: Mapping[str, int], nodes: Mapping[str, list[Any]], name: str, ours: bool
) -> dict[str, Any]:
    """Edges as columns: shares and attributions are worked out from the nodes, in float32 as they were. Ours keep
    their order; others' are put strongest first, by weight."""
    if not ours:
        links = sorted(links, key=lambda link: -abs(link["weight"]))
    unknown = next((link[end] for link in links for end in ("source", "target") if link[end] not in number), None)
    if unknown is not None:
        raise bad(name, f"a link names the unknown node {quoted(unknown)}")
    source = np.array([number[link["source"]] for link in links], np.int32)
    target = np.array([number[link["target"]] for link in links], np.int32)
    if len(set(zip(source.tolist(), target.tolist(), strict=True))) < len(links):
        raise bad(name, "a link is there twice")
    weight = np.array([_float32(link["weight"]) for link in links], np.float32)
    heights = list(map(height, nodes["kind"], nodes["layer"], nodes["neuron"]))
    if any(heights[low] >= heights[high] for low, high in zip(source, target, strict=True)):
        raise bad(name, "a link does not rise from a lower layer to a higher one")
    value, attribution = (
        np.array([math.nan if one is None else one for one in nodes[column]], np.float32)
        for column in ("activation", "attribution")
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(value[target] == 0, np.float32(math.nan), weight / value[target])
    columns = {"source": source, "target": target, "weight": weight}
    for key, found in (("share", share), ("attribution", share * attribution[target])):
        columns[key] = np.ma.masked_invalid(found.astype(np.float32)).tolist() if len(found) else found
    return columns


def _groups(supernodes: list[list[str]], number: Mapping[str, int], name: str) -> dict[str, tuple[int, ...]]:
    groups: dict[str, tuple[int, ...]] = {}
    for title, *members in supernodes:
        unknown = next((member for member in members if member not in number), None)
        if unknown is not None:
            raise bad(name, f"supernode {quoted(title)} names the unknown node {quoted(unknown)}")
        free, times = title, 1
        while free in groups:
            times += 1
            free = f"{title} ({times})"
        groups[free] = tuple(number[member] for member in members)
    return groups


def _as_circuit(fields: dict[str, Any], record: Mapping[str, Any], name: str) -> Circuit:
    """Our own file as the circuit it was."""
    known = {key: value for key, value in record.items() if key not in _DIGESTS}
    known |= {key: _table(known[key], schema, name) for key, schema in BESIDE.values() if key in known}
    if isinstance(known.get("settings"), dict) and known["settings"].get("of") is not None:
        fields = fields | {"nodes": _with_targets(fields["nodes"], known["settings"]["of"], name)}
    try:
        circuit = Circuit.model_validate({**known, **fields})
    except ValidationError as error:
        first = error.errors()[0]
        raise bad(name, f"its tracer record is damaged at {'.'.join(map(str, first['loc']))}") from error
    if rule := identities.broken(circuit):
        raise bad(name, f"is not a circuit: {rule}")
    if "sha256" not in record:
        return circuit.model_copy(update={"warnings": tuple(dict.fromkeys((*circuit.warnings, _OLD)))})
    return circuit


def _with_targets(nodes: pa.Table, of: Any, name: str) -> pa.Table:
    """Nodes whose logits are what a circuit is of inside the model, for which the format has no kind."""
    try:
        made = settings(of=of).of
    except JobError as error:
        raise bad(name, "its tracer record is damaged at settings.of") from error
    assert made is not None
    neuron = made.number if isinstance(made, TargetNeuron) else -1
    rows = nodes.to_pylist()
    for row in rows:
        if row["kind"] == "logit":
            row |= {"kind": "target", "neuron": neuron, "token": made.name}
    return pa.Table.from_pylist(rows, schema=nodes.schema)


def _table(rows: Any, schema: pa.Schema, name: str) -> pa.Table:
    """What a file of ours says of what neurons do."""
    try:
        table = pa.Table.from_pylist(rows, schema=schema)
    except (pa.ArrowException, TypeError, ValueError, AttributeError) as error:
        raise bad(name, "its tracer record is damaged at what neurons do") from error
    if wrong := problem(table):
        raise bad(name, f"its tracer record is damaged: {wrong}")
    return table


@cache
def _validator() -> Callable[[Any], Any]:
    schema = json.loads(resources.files("tracer.circuit").joinpath("neuronpedia.schema.json").read_text())
    return fastjsonschema.compile(schema)


def _validate(content: Any, name: str) -> None:
    try:
        _validator()(content)
        json.dumps(content, ensure_ascii=False).encode()
    except fastjsonschema.JsonSchemaValueException as error:
        raise bad(name, f"breaks the schema: {first_line(error.message)}") from error
    except UnicodeEncodeError as error:
        raise bad(name, "holds half a character (a lone surrogate)") from error
