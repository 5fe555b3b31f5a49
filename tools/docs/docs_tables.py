"""The reference of the tables in a run folder: every column, its type, and what the schema's own docstring says.

Knows ``tracer/store/schemas.py`` as source and as data. Refuses to know what is in a table.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pyarrow as pa

from tracer.store import schemas

FILES = {
    "PROMPTS": ("prompts", "`prompts/`, a file per shard"),
    "NODES": ("nodes", "`nodes/`"),
    "EDGES": ("edges", "`edges/`"),
    "PROFILES": ("profiles", "`profiles/`, with `profiles: true`"),
    "VALUES": ("values", "`values/`, with `values: true`"),
    "INPUT": ("input", "`input.parquet`"),
    "CIRCUIT": ("circuit", "`circuit.parquet`"),
    "CIRCUIT_NODES": ("circuit_nodes", "`circuit_nodes.parquet`"),
    "CIRCUIT_EDGES": ("circuit_edges", "`circuit_edges.parquet`"),
    "TOKENS": ("tokens", "`tokens.parquet`"),
    "DESCRIPTIONS": ("descriptions", "`descriptions.parquet`"),
    "EXEMPLARS": ("exemplars", "`exemplars.parquet`"),
    "DENSITIES": ("densities", "`densities.parquet`"),
    "CONCEPTS": ("concepts", "`concepts.parquet`"),
    "STEERING": ("steering", "`steering.parquet`"),
    "STEERING_GROUPS": ("steering_groups", "`steering_groups.parquet`"),
    "COMPARISON": ("comparison", "`comparison.parquet`"),
    "COMPARED": ("compared", "`compared.parquet`"),
    "COURSES": ("courses", "`courses.parquet`"),
}
"""Tables by the name of their schema: the table's name, and where it lies. Parts of a shard that no reader opens
(MEANS, CANDIDATES, COUNTS) come last, under their schema's name."""


EDGES = """\
`source` and `target` are node_ids of `NODES` of the same prompt. What `weight`, `share` and `attribution` are, and
which of them add up: [edges](../concepts/edges.md)."""


def documented() -> dict[str, str]:
    """What the source says below each schema."""
    tree = ast.parse(Path(schemas.__file__).read_text(encoding="utf-8"))
    found, last = {}, None
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            last = node.targets[0].id
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and last:
            found[last] = str(node.value.value)
            last = None
        else:
            last = None
    return {"EDGES": EDGES} | found


def tables() -> dict[str, pa.Schema]:
    """Every schema in the module, those of FILES first."""
    there = {name: value for name, value in vars(schemas).items() if isinstance(value, pa.Schema)}
    return {name: there[name] for name in [*FILES, *(set(there) - set(FILES))] if name in there}


def said(text: str) -> str:
    """A schema's docstring as Markdown; names of other schemas as their tables'."""
    text = " ".join(text.split())
    text = re.sub(r"``([^`]*)``", r"`\1`", text)
    return re.sub(r"`([A-Z_]{4,})`", lambda found: f"`{FILES.get(found[1], (found[1].lower(), ''))[0]}`", text)


def page() -> str:
    """The page of all tables."""
    text = documented()
    lines = ["# Tables", "", INTRODUCTION, ""]
    for name, schema in tables().items():
        title, where = FILES.get(name, (name.lower(), "a shard's part, which readers do not open"))
        lines += [f"## {title}", "", f"{where[:1].upper()}{where[1:]}.", "", said(text.get(name, "")), ""]
        lines += ["| column | type |", "| --- | --- |"]
        lines += [f"| `{field.name}` | {kind(field.type)} |" for field in schema] + [""]
    return "\n".join(lines)


def kind(of: pa.DataType) -> str:
    """An Arrow type in a few words."""
    return str(of).replace("<element: ", " of ").replace("<item: ", " of ").replace("<", "&lt;").rstrip(">")


INTRODUCTION = f"""\
A run folder is Parquet and `run.json`; every column of every table is here. The schema's version is
{schemas.SCHEMA_VERSION}; folders of version {", ".join(sorted(schemas.READABLE))} can be read. `tracer query FOLDER
"select ..."` asks them in SQL, `tracer.run(...).table("nodes")` reads one in Python, and any tool reads the files:
[the tables of a run](../runs.md#the-tables) says which files count after a crash."""
