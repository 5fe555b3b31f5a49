"""Circuits out of tracer and graphs into it: Neuronpedia (circuit-tracer) JSON, MIB, GraphML, CSV.

Knows those formats and what each cannot hold. Every file is checked against the shipped JSON schema, on its way out
too; a file that is not whole is refused whole. Refuses to know how a graph was computed, and reads no pickle.

Source: Neuronpedia's graph schema and circuit-tracer's graph files, as of 2026; MIB's circuit files (EAP-IG).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

import fastjsonschema
import numpy as np
from pydantic import BaseModel, ValidationError

from tracer.circuit.circuit import Circuit, Graph, edges_table, nodes_table
from tracer.errors import JobError, RunError, quoted, writing

FLOAT32_MAX = float(np.finfo(np.float32).max)
MAX_BYTES = 256 * 2**20
LARGE_FOR_A_PAGE = 20 * 2**20

# The page knows no neurons: this is the kind of node it draws as a feature.
FEATURE = "cross layer transcoder"
KIND_OF = {"embedding": "embedding", "logit": "logit", "mlp reconstruction error": "error"}
NODE_ID = re.compile(r"(-?\d+)_(-?\d+)_(\d+)")


class Exported(NamedTuple):
    """What an export wrote, and what the format could not hold."""

    files: list[Path]
    lost: list[str]


class _Place(NamedTuple):
    kind: str
    layer: int
    position: int
    neuron: int


def export(graph: Graph, path: str | Path, format: str = "neuronpedia") -> Exported:
    """Write a circuit for another tool.

    Args:
        graph: a circuit, or an imported graph.
        path: the file; for ``csv`` two files are written beside it, ``.nodes.csv`` and ``.edges.csv``.
        format: ``neuronpedia``, ``mib``, ``graphml`` or ``csv``.

    Returns:
        The files, and by name what was lost.

    Raises:
        JobError: an unknown format, or a circuit that lacks what it needs. RunError: a file cannot be written.
    """
    if format not in FORMATS:
        raise JobError(f"format={format!r}", f"must be one of {', '.join(FORMATS)}", "choose one")
    path = Path(path)
    if path.is_dir():
        raise RunError(f"path {quoted(str(path), 300)}", "is a folder", "give a file name")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return FORMATS[format](graph, path)


def import_graph(path: str | Path, max_bytes: int = MAX_BYTES) -> Graph:
    """Read a Neuronpedia graph file as data; one that tracer wrote comes back as the very circuit.

    Args:
        max_bytes: a larger file is refused unread.

    Raises:
        RunError: the file cannot be read, is too large, breaks the schema, repeats a node or names an unknown one.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise RunError(
                f"file {quoted(path.name)} of {size / 2**20:.0f} MiB",
                f"is larger than {max_bytes / 2**20:.0f} MiB",
                "prune the graph where it was made, or raise --max-mib",
            )
        content = json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=_no_constant)
    except RecursionError as error:
        raise RunError(f"file {quoted(path.name)}", "is nested too deeply", "give a graph file") from error
    except OSError as error:
        raise RunError(
            f"file {quoted(str(path), 300)}", f"cannot be read ({error.strerror})", "check its name"
        ) from error
    except ValueError as error:
        raise RunError(f"file {quoted(path.name)}", f"is not JSON ({error})", "give a graph file") from error
    return from_neuronpedia(content, path.name)


def read_groups(path: str | Path, graph: Graph) -> dict[str, tuple[int, ...]]:
    """The named groups that the page saved, as node ids of `graph`.

    Raises:
        RunError: the file cannot be read, is not a groups file, or names a node the graph does not have.
    """
    path = Path(path)
    try:
        found = _Groups.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(
            f"file {quoted(str(path), 300)}", f"cannot be read ({error.strerror})", "check its name"
        ) from error
    except ValueError as error:
        raise RunError(
            f"file {quoted(path.name)}", "is not a groups file", "save one from the page of 'tracer view'"
        ) from error
    rows = graph.nodes.select(["layer", "position", "neuron", "node_id"]).to_pylist()
    number = {(row["layer"], row["position"], row["neuron"]): row["node_id"] for row in rows}
    groups: dict[str, tuple[int, ...]] = {}
    for group in found.groups:
        places = [(node.layer, node.position, node.neuron) for node in group.nodes]
        if unknown := [place for place in places if place not in number]:
            raise RunError(
                f"group {quoted(group.name)}",
                f"names {unknown[0]}, which is not a node here",
                "save the groups from this circuit's page",
            )
        groups[group.name] = tuple(number[place] for place in places)
    return groups


class _GroupNode(BaseModel):
    layer: int
    position: int
    neuron: int


class _Group(BaseModel):
    name: str
    nodes: list[_GroupNode]


class _Groups(BaseModel):
    """The file that the page of `tracer view` saves."""

    format: Literal["tracer-groups"]
    version: Literal[1]
    groups: list[_Group]


def to_neuronpedia(graph: Graph) -> dict[str, Any]:
    """A graph in Neuronpedia's form, valid by the shipped schema. Shares are left out: weight over activation.

    Raises:
        JobError: the graph has no edges table.
    """
    if graph.links is None:
        raise JobError("circuit", "was traced without edges, which this format needs", "trace it with edges")
    rows = graph.nodes.to_pylist()
    if graph.original:
        return _as_it_came(graph)
    ids = [_node_id(row) for row in rows]
    cumulative = _cumulative([None if row["kind"] == "logit" else row["influence"] for row in rows])
    probabilities = iter(graph.probabilities if isinstance(graph, Circuit) else ())
    targets = set(graph.target_ids) if isinstance(graph, Circuit) else set()
    nodes = [
        _node(row, one, cumulative[i], probabilities, targets)
        for i, (row, one) in enumerate(zip(rows, ids, strict=True))
    ]
    links = graph.links.to_pydict()
    content = {
        "metadata": _metadata(graph),
        "qParams": {
            "pinnedIds": [],
            "supernodes": [[name, *(ids[node] for node in members)] for name, members in graph.groups.items()],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": nodes,
        "links": [
            {"source": ids[source], "target": ids[target], "weight": weight}
            for source, target, weight in zip(links["source"], links["target"], links["weight"], strict=True)
        ],
    }
    if isinstance(graph, Circuit):
        content["metadata"]["tracer"]["digest"] = _digest(content)
    _validate(content, "export")
    return content


def _as_it_came(graph: Graph) -> dict[str, Any]:
    """An imported graph in the form it came in, every field of its nodes kept; groups as they are now."""
    nodes = graph.original["nodes"]
    ids = [node["node_id"] for node in nodes]
    links = graph.links.to_pydict() if graph.links is not None else {"source": [], "target": [], "weight": []}
    content = {
        "metadata": graph.original["metadata"],
        "qParams": graph.original["qParams"]
        | {"supernodes": [[name, *(ids[node] for node in members)] for name, members in graph.groups.items()]},
        "nodes": nodes,
        "links": [
            {"source": ids[source], "target": ids[target], "weight": weight}
            for source, target, weight in zip(links["source"], links["target"], links["weight"], strict=True)
        ],
    }
    _validate(content, "export")
    return content


def _digest(content: Mapping[str, Any]) -> str:
    """A hash of nodes and links, by which a file that was edited is told from the circuit it was."""
    return hashlib.sha256(json.dumps([content["nodes"], content["links"]], sort_keys=True).encode()).hexdigest()


def _is_ours(content: Mapping[str, Any]) -> bool:
    record = content["metadata"].get("tracer")
    return isinstance(record, dict) and record.get("digest") == _digest(content)


def _no_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which is not a JSON number")


def from_neuronpedia(content: Any, name: str = "graph") -> Graph:
    """The graph in a file's content; see `import_graph`."""
    _validate(content, name)
    places = [_place(node, content["metadata"], name) for node in content["nodes"]]
    number: dict[str, int] = {}
    for index, node in enumerate(content["nodes"]):
        if node["node_id"] in number:
            raise _bad(name, f"node {node['node_id']!r} is there twice")
        number[node["node_id"]] = index
    if repeated := [place for place, times in Counter(places).items() if times > 1]:
        raise _bad(name, f"two nodes are {tuple(repeated[0])}")
    tokens = tuple(content["metadata"]["prompt_tokens"])
    if beyond := [place for place in places if place.position >= len(tokens)]:
        raise _bad(name, f"position {beyond[0].position} lies beyond the {len(tokens)} prompt tokens")
    n_layers = _n_layers(content, places)
    if n_layers < 1 or any(place.layer >= n_layers for place in places if place.kind in ("neuron", "error")):
        raise _bad(name, f"its nodes do not fit a model of {n_layers} layers")
    places = [place._replace(layer=n_layers) if place.kind == "logit" else place for place in places]
    nodes = _nodes_of(content["nodes"], places, tokens)
    ours = _is_ours(content)
    links = _links_of(content["links"], number, nodes, name, ours)
    fields = {
        "nodes": nodes_table(nodes),
        "links": edges_table(links),
        "text": content["metadata"]["prompt"],
        "tokens": tokens,
        "n_layers": n_layers,
        "groups": _groups(content["qParams"].get("supernodes", []), number, name),
    }
    if ours:
        return _as_circuit(fields, content["metadata"]["tracer"], name)
    about, params = content["metadata"], content["qParams"]
    notes = {"scan": about["scan"], "slug": about["slug"], "file": name}
    if "tracer" in about:
        notes["edited"] = "after tracer wrote it, so it is not that circuit any more"
    original = {"metadata": about, "qParams": params, "nodes": content["nodes"]}
    return Graph(**fields, notes=notes, original=original)


def _node_id(row: Mapping[str, Any]) -> str:
    if row["kind"] == "embedding":
        return f"E_{row['neuron']}_{row['position']}"
    layer = row["layer"] + 1 if row["kind"] == "logit" else row["layer"]
    return f"{layer}_{row['neuron']}_{row['position']}"


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
        "tracer": {name: row[name] for name in ("attribution", "gradient", "explained", "influence", "bias_share")},
    }
    if kind == "embedding":
        return node | {"feature": position, "layer": "E", "feature_type": kind, "jsNodeId": f"E_{neuron}-{position}"}
    if kind == "logit":
        probability = next(probabilities, None)
        shown = f" (p={probability:.3f})" if probability is not None else ""
        return node | {
            "feature": neuron,
            "layer": str(layer + 1),
            "feature_type": kind,
            "jsNodeId": f"L_{neuron}-{position}",
            "clerp": f'Output "{row["token"]}"{shown}',
            "token_prob": probability or 0.0,
            "is_target_logit": neuron in targets,
        }
    feature_type = "mlp reconstruction error" if kind == "error" else FEATURE
    feature = -1 if kind == "error" else cantor(layer, neuron)
    return node | {
        "feature": feature,
        "layer": str(layer),
        "feature_type": feature_type,
        "jsNodeId": f"{layer}_{neuron}-0",
        "clerp": "" if kind == "error" else f"L{layer} N{neuron}",
    }


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
            exclude={"nodes", "links", "settings", "text", "tokens", "n_layers", "groups", "notes", "original"},
        )
        content["settings"] = graph.settings.record()
        found |= {"scan": graph.model.name, "generation_settings": content["settings"], "tracer": content}
    return found


def _cumulative(influence: list[float | None]) -> list[float | None]:
    """Each node's place in the running total of influence, strongest first: what the page's threshold acts on."""
    values = np.array([value or 0.0 for value in influence])
    order = np.argsort(-values, kind="stable")
    running = np.empty(len(values))
    running[order] = np.cumsum(values[order]) / max(float(values.sum()), np.finfo(float).tiny)
    return [None if value is None else float(one) for value, one in zip(influence, running, strict=True)]


def _place(node: Mapping[str, Any], about: Mapping[str, Any], name: str) -> _Place:
    """Kind, layer, position and index of a node, from its id; from its feature number where the id is of another
    form. Fields that contradict each other are refused: one of them would be a wrong place."""
    kind, position, node_id = KIND_OF.get(node["feature_type"], "neuron"), int(node["ctx_idx"]), node["node_id"]
    if kind == "embedding":
        parts = node_id.split("_")
        token = int(parts[1]) if len(parts) == 3 and parts[1].isdecimal() else position
        return _bounded(_Place(kind, -1, position, token), node_id, name)
    layer = int(node["layer"]) if str(node["layer"]).isdecimal() else None
    if kind == "error":
        if layer is None:
            raise _bad(name, f"error node {node_id!r} has no layer")
        return _bounded(_Place(kind, layer, position, -1), node_id, name)
    if match := NODE_ID.fullmatch(node_id):
        place = _Place(kind, int(match[1]), position, int(match[2]))
        if int(match[3]) != position or (layer is not None and layer != place.layer):
            raise _bad(name, f"node {node_id!r} contradicts its layer {node['layer']!r} or position {position}")
        return _bounded(place, node_id, name)
    if layer is None or node["feature"] is None:
        raise _bad(name, f"node {node_id!r} has no layer or no feature number")
    feature = int(node["feature"])
    if kind == "neuron" and about.get("schema_version") == 1 and feature >= 0:
        layer, feature = uncantor(feature)
    return _bounded(_Place(kind, layer, position, feature), node_id, name)


def _bounded(place: _Place, node_id: str, name: str) -> _Place:
    """Refuse numbers that no model has and no table holds."""
    lowest, first = (-1 if place.kind == "embedding" else 0), (-1 if place.kind == "error" else 0)
    if not (lowest <= place.layer < 2**15 - 1 and 0 <= place.position < 2**31 and first <= place.neuron < 2**31):
        raise _bad(name, f"node {node_id!r} has a layer, position or number out of any model's range")
    return place


def _n_layers(content: Mapping[str, Any], places: list[_Place]) -> int:
    """Layers of the model: ours says so; elsewhere logits lie one above the last."""
    ours = content["metadata"].get("tracer", {}).get("model", {})
    if isinstance(ours, dict) and isinstance(ours.get("n_layers"), int):
        return ours["n_layers"]
    logits = [place.layer - 1 for place in places if place.kind == "logit"]
    return max([*logits, *(place.layer + 1 for place in places if place.kind in ("neuron", "error")), 0])


def _nodes_of(nodes: list[dict[str, Any]], places: list[_Place], tokens: tuple[str, ...]) -> dict[str, list[Any]]:
    ours = [node.get("tracer", {}) for node in nodes]
    influence = _apart([node.get("influence") for node in nodes])
    output = [re.fullmatch(r'Output "(.*)"(?: \(p=[\d.]+\))?', node["clerp"], re.DOTALL) for node in nodes]
    names = [
        match[1] if place.kind == "logit" and match else tokens[place.position]
        for place, match in zip(places, output, strict=True)
    ]
    return {
        "kind": [place.kind for place in places],
        "layer": [place.layer for place in places],
        "position": [place.position for place in places],
        "neuron": [place.neuron for place in places],
        "token": names,
        "activation": [_float32(node.get("activation")) for node in nodes],
        "attribution": [_float32(record.get("attribution")) for record in ours],
        "gradient": [_float32(record.get("gradient")) for record in ours],
        "explained": [_float32(record.get("explained")) for record in ours],
        "influence": [
            _float32(record.get("influence") if record else alone)
            for record, alone in zip(ours, influence, strict=True)
        ],
        "bias_share": [_float32(record.get("bias_share", record.get("remainder"))) for record in ours],
    }


def _float32(value: float | None) -> float | None:
    """A number that float32 can hold; others are refused."""
    if value is not None and not abs(value) < FLOAT32_MAX:
        raise _bad("values", f"{value!r} is not a finite float32 number")
    return value


def _apart(cumulative: list[float | None]) -> list[float | None]:
    """Single influences from the running total that circuit-tracer writes, strongest first."""
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
    if unknown := next((link[end] for link in links for end in ("source", "target") if link[end] not in number), None):
        raise _bad(name, f"a link names the unknown node {unknown!r}")
    source = np.array([number[link["source"]] for link in links], np.int32)
    target = np.array([number[link["target"]] for link in links], np.int32)
    if len(set(zip(source.tolist(), target.tolist(), strict=True))) < len(links):
        raise _bad(name, "a link is there twice")
    weight = np.array([_float32(link["weight"]) for link in links], np.float32)
    layers = np.array(nodes["layer"])
    if bool((layers[source] >= layers[target]).any()) if links else False:
        raise _bad(name, "a link does not rise from a lower layer to a higher one")
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
        if unknown := next((member for member in members if member not in number), None):
            raise _bad(name, f"supernode {title!r} names the unknown node {unknown!r}")
        free, times = title, 1
        while free in groups:
            times += 1
            free = f"{title} ({times})"
        groups[free] = tuple(number[member] for member in members)
    return groups


def _as_circuit(fields: dict[str, Any], record: Mapping[str, Any], name: str) -> Circuit:
    """Our own file as the circuit it was."""
    try:
        return Circuit.model_validate({**{key: value for key, value in record.items() if key != "digest"}, **fields})
    except ValidationError as error:
        first = error.errors()[0]
        raise _bad(name, f"its tracer record is damaged at {'.'.join(map(str, first['loc']))}") from error


def _bad(name: str, rule: str) -> RunError:
    return RunError(f"graph {quoted(name)}", rule, "nothing was imported; fix or re-export the file")


@cache
def _validator() -> Callable[[Any], Any]:
    schema = json.loads(resources.files("tracer.circuit").joinpath("neuronpedia.schema.json").read_text())
    return fastjsonschema.compile(schema)


def _validate(content: Any, name: str) -> None:
    try:
        _validator()(content)
        json.dumps([content["metadata"], content["qParams"]], ensure_ascii=False).encode()
    except fastjsonschema.JsonSchemaValueException as error:
        raise _bad(name, f"breaks the schema: {error.message}") from error
    except UnicodeEncodeError as error:
        raise _bad(name, "holds half a character (a lone surrogate)") from error


def cantor(layer: int, neuron: int) -> int:
    """The Cantor pairing that numbers a (layer, index) in ``feature``."""
    return (layer + neuron) * (layer + neuron + 1) // 2 + neuron


def uncantor(number: int) -> tuple[int, int]:
    """The (layer, index) of a Cantor number."""
    diagonal = (math.isqrt(8 * number + 1) - 1) // 2
    neuron = number - diagonal * (diagonal + 1) // 2
    return diagonal - neuron, neuron


def _write_neuronpedia(graph: Graph, path: Path) -> Exported:
    text = json.dumps(to_neuronpedia(graph), ensure_ascii=False, allow_nan=False)
    path.write_text(text, encoding="utf-8")
    lost = ["share (worked out again on import, as weight / activation)"]
    if path.stat().st_size > LARGE_FOR_A_PAGE:
        lost.append(f"nothing more, but {path.stat().st_size / 2**20:.0f} MiB may be too large for the page: prune")
    return Exported([path], lost)


def _write_mib(graph: Graph, path: Path) -> Exported:
    """MIB's circuit file rolled up to MLPs: the score of ``m{L}`` is the summed attribution of its kept neurons."""
    if not isinstance(graph, Circuit):
        raise JobError("imported graph", "lacks the attributions this format needs", "export a traced circuit")
    scores = dict.fromkeys(range(graph.n_layers), 0.0)
    kept = set()
    for row in graph.neurons.to_pylist():
        scores[row["layer"]] += row["attribution"]
        kept.add(row["layer"])
    content = {
        "cfg": {
            "n_layers": graph.n_layers,
            "n_heads": graph.model.n_heads,
            "parallel_attn_mlp": graph.model.parallel,
            "d_model": graph.model.d_model,
        },
        "nodes": {f"m{layer}": {"in_graph": layer in kept, "score": score} for layer, score in scores.items()},
        "edges": {},
    }
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return Exported([path], ["neurons and positions (summed per MLP)", "edges", "attention nodes (tracer has none)"])


def _write_graphml(graph: Graph, path: Path) -> Exported:
    import networkx

    networkx.write_graphml(graph.to_networkx(), path)
    return Exported([path], ["settings and checks (they are in run.json)"])


def _write_csv(graph: Graph, path: Path) -> Exported:
    nodes, edges = graph.to_pandas()
    files = [path.with_suffix(".nodes.csv")]
    nodes.drop(columns="prompt_id").to_csv(files[0], index=False)
    if edges is not None:
        files.append(path.with_suffix(".edges.csv"))
        edges.to_csv(files[1], index=False)
    return Exported(files, ["settings and checks (they are in run.json)"])


FORMATS: dict[str, Callable[[Graph, Path], Exported]] = {
    "neuronpedia": _write_neuronpedia,
    "mib": _write_mib,
    "graphml": _write_graphml,
    "csv": _write_csv,
}
