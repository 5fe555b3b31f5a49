"""Graphs out of a run over many prompts: one prompt's, from its rows of the tables, and the circuit of the dataset.

Knows which unit holds a prompt, and what the run's record says of how it was made. Refuses to know how graphs are
shown. A run's tables hold no predictions and no checks of single prompts, so that these are graphs to look at, draw,
export and steer by; `tracer trace` makes a whole circuit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tracer.circuit.circuit import Graph, Traced, edges_table, load_graph, nodes_table, read_beside
from tracer.errors import JobError, RunError, first_line, option, quoted
from tracer.settings import ModelRecord, Settings, settings
from tracer.store import one_prompt
from tracer.store.record import MANY
from tracer.store.run_folder import Commit, RunFolder
from tracer.store.schemas import CIRCUIT, CIRCUIT_EDGES, CIRCUIT_NODES, FOIL, NODES, SCHEMAS, TARGET

_SETTINGS = ("method", "baseline", "basis", "rules", "steps", "metric", "top_k", "seed")
_FORMS = {"text": "", "token_ids": "_ids", "messages": "_messages"}
"""How a prompt is given, and the ends of the names of its counterfactual's columns."""


class OfRun(Traced):
    """A graph out of a run over many prompts.

    Attributes:
        fingerprint: of that run.
    """

    fingerprint: str


def read_graph(address: Any, prompt_id: int | None = None) -> Graph:
    """What a run folder holds: a `Circuit`, an imported `Graph`, a dataset's circuit, or one prompt's graph of a run.

    Args:
        prompt_id: of a run over many, as in the prompts table, from 0; the dataset's own circuit if None.

    Raises:
        JobError: no such prompt, or one without a result. RunError: no such run, one that has not come that far or has
            no circuit, or a damaged one.
    """
    if prompt_id is not None:
        return graph_of(address, prompt_id)
    if one_prompt.read_record(address).get("kind") in MANY:
        return circuit_of(address)
    return load_graph(address)


def graph_of(address: Any, prompt_id: int) -> OfRun:
    """The graph of one prompt of a dataset run.

    Args:
        prompt_id: as in the prompts table, from 0.

    Raises:
        JobError: no such prompt, or one without a result. RunError: no such run, or one that has not come that far.
    """
    folder = RunFolder(address)
    record = folder.record()
    if record is None or record.get("kind") != "dataset":
        rule = "holds no run of a dataset"
        step = f"leave out {option('prompt')}, or give another folder"
        raise RunError(f"folder {quoted(str(folder.place), 300)}", rule, step)
    count = int(record["n_prompts"])
    if not 0 <= prompt_id < count:
        raise JobError(f"prompt {quoted(prompt_id)}", f"the run has prompts 0 to {count - 1}", "choose one of them")
    with _readable(folder):
        commit = folder.find(prompt_id // record["job"]["shard_size"])
        if commit is None:
            raise RunError(f"prompt {prompt_id}", "is not done yet", "wait, or repeat the run command")
        if commit.made_by is not None and commit.made_by.get("model") != record.get("model"):
            rule = "its run.json is of another model than its commits"
            raise RunError(f"run {quoted(str(folder.place), 300)}", rule, "it is damaged: repeat the run command")
        rows = {
            name: _rows(folder.read_committed(commit, name).cast(SCHEMAS[name]), prompt_id)
            for name in commit.files
            if name not in ("means", "values")
        }
        (prompt,) = rows["prompts"].to_pylist()
        if prompt["status"] != "ok":
            rule = f"{prompt['status']} ({prompt['error']})"
            raise JobError(f"prompt {prompt_id}", rule, "choose one that went well")
        nodes = rows["nodes"]
        return OfRun(
            nodes=_own(nodes),
            links=_own(rows["edges"]) if "edges" in rows else None,
            profiles=_own(rows["profiles"]) if "profiles" in rows else None,
            text=prompt["text"],
            tokens=_tokens(nodes),
            **_made(record),
            notes={"run": str(folder.place), "prompt_id": prompt_id, "user_id": prompt["user_id"]},
            **read_beside(address),
        )


def counterfactual_of(address: Any, prompt_id: int) -> int:
    """The number of the prompt, of the same run, that is the counterfactual of this one.

    Raises:
        JobError: no such prompt, one without a counterfactual, or one whose counterfactual the run was not asked.
        RunError: no run over many prompts, or a damaged one.
    """
    folder = RunFolder(address)
    record = folder.record()
    if record is None or record.get("kind") != "dataset":
        step = "trace the counterfactual too, then name both folders: tracer view ONE OTHER"
        raise RunError(f"folder {quoted(str(folder.place), 300)}", "holds no run of a dataset", step)
    count, size = int(record["n_prompts"]), int(record["job"]["shard_size"])
    if not 0 <= prompt_id < count:
        raise JobError(f"prompt {quoted(prompt_id)}", f"the run has prompts 0 to {count - 1}", "choose one of them")
    (own,) = (row for row in folder.read_input(prompt_id // size) if row["prompt_id"] == prompt_id)
    wanted = {name: own[f"counterfactual{end}"] for name, end in _FORMS.items() if own[f"counterfactual{end}"]}
    if not wanted:
        raise JobError(f"prompt {prompt_id}", "has no counterfactual in the run's input", "name two prompts")
    for shard in range(-(-count // size)):
        for row in folder.read_input(shard):
            if row["prompt_id"] != prompt_id and any(row[name] == value for name, value in wanted.items()):
                return int(row["prompt_id"])
    rule = "is not among the run's prompts, so that its graph is not there"
    raise JobError(f"the counterfactual of prompt {prompt_id}", rule, "add it to the job's input, or name two prompts")


def _made(record: dict[str, Any]) -> dict[str, Any]:
    """How a run was made, as fields of a `Traced`."""
    model = ModelRecord.model_validate(record["model"])
    fields = {"n_layers": model.n_layers, "settings": settings_of(record), "model": model}
    return fields | {"fingerprint": str(record["fingerprint"])}


@contextmanager
def _readable(folder: RunFolder) -> Iterator[None]:
    """What does not fit together inside was not written so."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, pa.ArrowException) as error:
        rule = f"its tables or run.json do not fit together ({first_line(error)})"
        raise RunError(
            f"run {quoted(str(folder.place), 300)}", rule, "it is damaged: repeat the run command"
        ) from error


def circuit_of(address: Any) -> OfRun:
    """The circuit of a whole dataset, strongest mean first, with the edges that are left of their means over prompts;
    without edges where the job has none, or an older version made the run.

    A node of an aligned circuit is at its position. Its token is the one that all prompts have there; where they
    differ, how many there are (``any-of-12``). A free circuit's neurons have the position -1: they count wherever they
    are. With edges there is an embedding for each position (of a free circuit: for all), whose token id is -1, and the
    metric's target (-1) and foil (-2), which are other tokens for other prompts; activations are means, and a share is
    the mean weight over the target's mean activation.

    Raises:
        RunError: no run of a dataset, one without a circuit, or one that is not finished or damaged.
    """
    folder = RunFolder(address)
    record, name = one_prompt.read_record(address), f"run {quoted(str(folder.place), 300)}"
    if record.get("kind") != "dataset":
        raise RunError(
            name, f"is a {record.get('kind')}, which keeps no circuit", "give the run of a dataset or prompt"
        )
    kind, step = record["job"].get("circuit"), f"name one of its prompts: {option('prompt', 0)}"
    if kind == "none":
        raise RunError(name, "has no circuit of the dataset (circuit: none in its job)", step)
    if not folder.place.exists("circuit.parquet"):
        rule = "has no circuit.parquet: it is not finished, or no prompt went well"
        raise RunError(name, rule, f"repeat the run command, or {step}")
    linked = folder.place.exists("circuit_edges.parquet")
    files = [f"{name}.parquet" for name in ("circuit", *(("circuit_nodes", "circuit_edges") if linked else ()))]
    for problem in folder.check_outputs(files):
        raise RunError(name, problem, "it is damaged: repeat the run command")
    with _readable(folder):
        rows, links = _with_links(folder) if linked else (_neurons_alone(folder), None)
        n_prompts = max(rows["n_prompts"], default=0)
        tokens = _common_tokens(folder) if kind == "aligned" else ("any-position",)
        return OfRun(
            nodes=nodes_table(_columns(rows, tokens)),
            links=links,
            text=f"{kind} circuit of {n_prompts:,} prompts",
            tokens=tokens,
            **_made(record),
            notes={"run": str(folder.place), "circuit": kind, "n_prompts": n_prompts},
            **read_beside(address),
        )


def _neurons_alone(folder: RunFolder) -> dict[str, list[Any]]:
    """The circuit's nodes where it has no edges."""
    rows = folder.read_output("circuit.parquet").cast(CIRCUIT).to_pydict()
    return rows | {"kind": ["neuron"] * len(rows["layer"])}


def _with_links(folder: RunFolder) -> tuple[dict[str, list[Any]], pa.Table]:
    """The circuit's nodes and edges."""
    rows = folder.read_output("circuit_nodes.parquet").cast(CIRCUIT_NODES).to_pydict()
    links = folder.read_output("circuit_edges.parquet").cast(CIRCUIT_EDGES).to_pydict()
    named = {"weight": links["mean_weight"], "attribution": links["mean_attribution"]}
    return rows, edges_table({name: links[name] for name in ("source", "target", "share")} | named)


def _columns(rows: dict[str, list[Any]], tokens: tuple[str, ...]) -> dict[str, list[Any]]:
    """A dataset's nodes as columns of the nodes table."""
    empty = [None] * len(rows["layer"])
    same = ("kind", "layer", "position", "neuron", "expert", "explained", "influence", "bias_share")
    roles = {TARGET: "target", FOIL: "foil"}
    return {
        **dict.fromkeys(NODES.names[2:], empty),
        **{name: rows[name] for name in same if name in rows},
        "activation": rows.get("mean_activation", empty),
        "attribution": rows["mean_attribution"],
        "token": [
            roles[neuron] if kind == "logit" else tokens[at] if at >= 0 else "any" if kind == "embedding" else ""
            for kind, at, neuron in zip(rows["kind"], rows["position"], rows["neuron"], strict=True)
        ],
    }


def settings_of(record: dict[str, Any]) -> Settings:
    """How a dataset run attributed its prompts; the metric may be ``auto``, which each prompt settled."""
    job = record["job"]
    return settings(**{name: job[name] for name in _SETTINGS}, share=job.get("share"), of=job.get("of"))


def most_frequent(lengths: Counter[int]) -> int:
    """The length that an aligned circuit is of, by how many prompts have each: the shorter of two that are equal."""
    return min(lengths, key=lambda one: (-lengths[one], one))


def length_of(folder: RunFolder, commits: Iterable[Commit]) -> int | None:
    """Tokens of the prompts that a run's aligned circuit is of; None where no prompt went well."""
    lengths = Counter[int]()
    for commit in commits:
        table = folder.read_committed(commit, "prompts", ["status", "token_ids"]).filter(pc.field("status") == "ok")
        lengths.update(len(ids) for ids in table["token_ids"].to_pylist())
    return most_frequent(lengths) if lengths else None


def _common_tokens(folder: RunFolder) -> tuple[str, ...]:
    """The tokens of the prompts that an aligned circuit is of: those of the length that is most frequent."""
    seen: dict[int, list[set[int]]] = {}
    counts, first = Counter[int](), dict[int, tuple[int, int]]()
    for commit in folder.commits():
        table = folder.read_committed(commit, "prompts", ["prompt_id", "status", "token_ids"])
        for row in table.filter(pc.field("status") == "ok").to_pylist():
            length = len(row["token_ids"])
            counts[length] += 1
            first.setdefault(length, (commit.shard, row["prompt_id"]))
            for ids, token in zip(
                seen.setdefault(length, [set() for _ in range(length)]), row["token_ids"], strict=True
            ):
                ids.add(token)
    length = most_frequent(counts)
    unit, prompt_id = first[length]
    commit = folder.find(unit)
    assert commit is not None
    tokens = _tokens(_rows(folder.read_committed(commit, "nodes"), prompt_id))
    return tuple(
        token if len(ids) == 1 else f"any-of-{len(ids)}" for token, ids in zip(tokens, seen[length], strict=True)
    )


def _tokens(nodes: pa.Table) -> tuple[str, ...]:
    return tuple(nodes.filter(pc.field("kind") == "embedding").sort_by("position")["token"].to_pylist())


def _rows(table: pa.Table, prompt_id: int) -> pa.Table:
    return table.filter(pc.field("prompt_id") == prompt_id)


def _own(table: pa.Table) -> pa.Table:
    """As the tables of a single prompt are: it is number 0."""
    return table.set_column(0, "prompt_id", pa.array([0] * table.num_rows, pa.int64())).combine_chunks()
