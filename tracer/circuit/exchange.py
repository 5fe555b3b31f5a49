"""Circuits out of tracer and graphs into it: Neuronpedia (circuit-tracer) JSON, MIB, GraphML, CSV.

Knows those files and what each cannot hold; a file that is not whole is refused whole. Refuses to know how a graph was
computed, and what is in Neuronpedia's form (circuit/neuronpedia.py), and reads no pickle.

Source: MIB's circuit files (EAP-IG).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tracer.choices import GraphFormat
from tracer.circuit.circuit import Graph, Traced, edges_table
from tracer.circuit.foreign import cantor, uncantor
from tracer.circuit.neuronpedia import from_neuronpedia, lost, to_neuronpedia
from tracer.errors import JobError, RunError, option, quoted, writing
from tracer.store.schemas import EDGES
from tracer.system import jsontext, wholefile
from tracer.text import frame_csv, xml_text

__all__ = [
    "Exported",
    "cantor",
    "export",
    "from_neuronpedia",
    "import_graph",
    "to_neuronpedia",
    "uncantor",
]

MAX_BYTES = 256 * 2**20
LARGE_FOR_A_PAGE = 20 * 2**20


class Exported(NamedTuple):
    """What an export wrote, and what the format could not hold."""

    files: list[Path]
    lost: list[str]


def export(
    graph: Graph,
    path: str | Path,
    format: GraphFormat | str = "neuronpedia",
    *,
    scan: str | None = None,
    slug: str | None = None,
) -> Exported:
    """Write a circuit for another tool. No path of this machine is in the file: a model that is a folder is called by
    its last part.

    Args:
        graph: a circuit, or an imported graph.
        path: the file; for ``csv`` two files are written beside it, ``.nodes.csv`` and ``.edges.csv``.
        format: ``neuronpedia``, ``mib``, ``graphml`` or ``csv``.
        scan, slug: the model and the graph as Neuronpedia calls them, of letters, digits, - and _; made from the
            model's name and the prompt if None. An imported graph keeps its own.

    Returns:
        The files, and by name what was lost.

    Raises:
        JobError: an unknown format, a name that cannot be or has no effect, or a circuit that lacks what it needs.
            RunError: a file cannot be written.
    """
    if format not in FORMATS:
        raise JobError(f"format={format!r}", f"must be one of {', '.join(FORMATS)}", "choose one")
    names = {name: value for name, value in (("scan", scan), ("slug", slug)) if value is not None}
    if names and format != "neuronpedia":
        raise JobError(option(next(iter(names))), f"has no effect with format {format!r}", "leave it out")
    path = Path(path)
    if path.is_dir():
        raise RunError(f"path {quoted(str(path), 300)}", "is a folder", "give a file name")
    with writing(path):
        return FORMATS[format](graph, path, **names)


def import_graph(path: str | Path, max_bytes: int = MAX_BYTES) -> Graph:
    """Read a Neuronpedia graph file as data; one that tracer wrote comes back as the very circuit.

    Args:
        path: the file.
        max_bytes: a larger file is refused unread.

    Returns:
        The graph; a `Circuit` where tracer wrote the file.

    Raises:
        RunError: the file cannot be read, is too large, breaks the schema, repeats a node or names an unknown one.
    """
    path = Path(path)
    try:
        text = wholefile.read(path, max_bytes) if path.stat().st_size <= max_bytes else None
        if text is None or len(text) > max_bytes:
            rule = f"is larger than {max_bytes / 2**20:.0f} MiB"
            step = f"prune the graph where it was made, or raise {option('max_mib')}"
            raise RunError(f"file {quoted(path.name)}", rule, step)
        content = jsontext.parse(text, constants=False)
    except jsontext.JsonError as error:
        raise RunError(f"file {quoted(path.name)}", str(error), "give a graph file") from error
    except OSError as error:
        raise RunError(
            f"file {quoted(str(path), 300)}", f"cannot be read ({error.strerror})", "check its name"
        ) from error
    return from_neuronpedia(content, path.name)


def _write_neuronpedia(graph: Graph, path: Path, **names: str) -> Exported:
    content = to_neuronpedia(graph, **names)
    wholefile.write(path, json.dumps(content, ensure_ascii=False, allow_nan=False))
    missing = lost(graph, content)
    if path.stat().st_size > LARGE_FOR_A_PAGE:
        missing.append(f"nothing more, but {path.stat().st_size / 2**20:.0f} MiB may be too large for the page: prune")
    return Exported([path], missing)


def _write_mib(graph: Graph, path: Path) -> Exported:
    """MIB's circuit file rolled up to MLPs: the score of ``m{L}`` is the summed attribution of its kept neurons."""
    if not isinstance(graph, Traced):
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
    wholefile.write(path, json.dumps(content, indent=1))
    return Exported([path], ["neurons and positions (summed per MLP)", "edges", "attention nodes (tracer has none)"])


def _write_graphml(graph: Graph, path: Path) -> Exported:
    import networkx

    bare = ["edges (it has none)"] if graph.links is None else []
    if graph.links is None:
        graph = graph.model_copy(update={"links": edges_table({name: [] for name in EDGES.names})})
    made, altered = graph.to_networkx(), False
    for attributes in (made.graph, *(data for _, data in made.nodes(data=True))):
        for name, value in attributes.items():
            if isinstance(value, str) and (plain := xml_text(value)) != value:
                attributes[name], altered = plain, True
    with wholefile.writing(path) as file:
        # The writer of the standard library: the same bytes with lxml and without.
        networkx.write_graphml_xml(made, file)
    characters = ["characters that XML cannot hold (spelt out, such as \\x00)"] if altered else []
    return Exported([path], [*bare, "settings and checks (they are in run.json)", *characters])


def _write_csv(graph: Graph, path: Path) -> Exported:
    nodes, edges = graph.to_pandas()
    tables = {".nodes.csv": nodes.drop(columns="prompt_id"), **({} if edges is None else {".edges.csv": edges})}
    files = []
    for ending, table in tables.items():
        files.append(path.with_suffix(ending))
        wholefile.write(files[-1], frame_csv(table))
    bare = ["edges (it has none)"] if edges is None else []
    return Exported(files, [*bare, "settings and checks (they are in run.json)"])


FORMATS: dict[str, Callable[..., Exported]] = {
    "neuronpedia": _write_neuronpedia,
    "mib": _write_mib,
    "graphml": _write_graphml,
    "csv": _write_csv,
}
