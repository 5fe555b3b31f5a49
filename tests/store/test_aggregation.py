"""Sums over a run's tables: against plain Python, to the bit, however the rows are cut and the memory bounded."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow.fs import FSSpecHandler, LocalFileSystem, PyFileSystem

from tracer import RunError
from tracer.errors import JobError
from tracer.store import columns, compaction, edge_means
from tracer.store import query as store_query
from tracer.store.aggregation import NEURONS, TOP_PROMPTS, neurons, top_prompts
from tracer.store.edge_means import EDGES_MEAN, write_edges_mean
from tracer.store.query import query
from tracer.store.schemas import EDGES, NODES, PROMPTS
from tracer.store.storage import Storage

FS = LocalFileSystem()
Row = dict[str, Any]
Prompt = tuple[list[Row], list[Row]]
SLOW = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)

# Few values, so that neurons, prompts and strengths meet; sums of these floats are not exact.
FLOATS = st.sampled_from([0.1, -0.1, 0.3, 7e-3, -1e6, 1 / 3, 0.0, 3e-20]) | st.floats(-1e3, 1e3, width=32)


def expert(layer: int, neuron: int) -> int | None:
    """Layer 1 is a mixture of three experts of two neurons, and further neurons that are shared."""
    return neuron // 2 if layer == 1 and neuron < 6 else None


def f32(value: float) -> float:
    return float(np.float32(value))


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    """The nodes and edges of one prompt, without its id."""
    neuron = st.tuples(st.just("neuron"), st.integers(0, 2), st.sampled_from([0, 1, 5, 2**31 - 1]))
    other = st.tuples(st.just("embedding"), st.just(-1), st.integers(0, 3))
    logit = st.tuples(st.just("logit"), st.just(3), st.integers(0, 3))
    error = st.tuples(st.just("error"), st.integers(0, 2), st.integers(0, 1))
    nodes = [
        {
            "node_id": number,
            "kind": kind,
            "layer": layer,
            "neuron": index,
            "expert": expert(layer, index) if kind == "neuron" else None,
            "position": draw(st.integers(0, 2)),
            "token": draw(st.sampled_from(["a", "ö", "", " the"])),
            "activation": f32(draw(FLOATS)) if kind == "neuron" else None,
            "attribution": f32(draw(FLOATS)) if kind == "neuron" else None,
        }
        for number, (kind, layer, index) in enumerate(draw(st.lists(neuron | other | logit | error, max_size=8)))
    ]
    if not nodes:
        return [], []
    end = st.integers(0, len(nodes) - 1)
    edges = [
        {
            "source": source,
            "target": target,
            "weight": f32(draw(FLOATS)),
            "share": share,
            "attribution": None if share is None else f32(draw(FLOATS)),
        }
        for source, target in draw(st.lists(st.tuples(end, end), max_size=8))
        for share in [draw(st.none() | FLOATS.map(f32))]
    ]
    return nodes, edges


SHARDS = st.lists(st.lists(prompts(), max_size=3), max_size=4)


def write(folder: Path, shards: Sequence[Sequence[Prompt]]) -> tuple[list[str], list[str]]:
    """Nodes and edges files of shards; prompts are numbered through."""
    folder.mkdir(parents=True, exist_ok=True)
    files: tuple[list[str], list[str]] = ([], [])
    number = 0
    for shard, many in enumerate(shards):
        rows: tuple[list[Row], list[Row]] = ([], [])
        for prompt in many:
            for place, part in zip(rows, prompt, strict=True):
                place.extend({"prompt_id": number, **row} for row in part)
            number += 1
        for name, schema, part, paths in zip(("nodes", "edges"), (NODES, EDGES), rows, files, strict=True):
            paths.append(str(folder / f"{name}-{shard}.parquet"))
            pq.write_table(pa.Table.from_pylist(part, schema=schema), paths[-1], row_group_size=16)
    return files


def flat(shards: Sequence[Sequence[Prompt]]) -> list[Prompt]:
    return [prompt for shard in shards for prompt in shard]


def fold(values: Sequence[float]) -> float:
    """A plain left fold: `sum` of newer Pythons compensates."""
    total = 0.0
    for value in values:
        total += value
    return total


def neuron_oracle(many: Sequence[Prompt]) -> list[Row]:
    seen: dict[tuple[int, int], dict[int, list[Row]]] = {}
    for number, (nodes, _) in enumerate(many):
        for row in nodes:
            if row["kind"] == "neuron":
                seen.setdefault((row["layer"], row["neuron"]), {}).setdefault(number, []).append(row)
    return [
        {
            "layer": layer,
            "neuron": neuron,
            "expert": expert(layer, neuron),
            "n_prompts": len(by_prompt),
            "n_occurrences": len(all_rows),
            "mean_attribution": fold([row["attribution"] for row in all_rows]) / len(all_rows),
            "mean_abs_attribution": fold([abs(row["attribution"]) for row in all_rows]) / len(all_rows),
            "std": float(np.std([row["attribution"] for row in all_rows])),
            "max_abs": max(abs(row["attribution"]) for row in all_rows),
            "mean_activation": fold([row["activation"] for row in all_rows]) / len(all_rows),
            "prompt_mean_attribution": fold([row["attribution"] for row in all_rows]) / len(by_prompt),
            "prompt_mean_abs": fold([abs(fold([row["attribution"] for row in rows])) for rows in by_prompt.values()])
            / len(by_prompt),
        }
        for (layer, neuron), by_prompt in sorted(seen.items())
        for all_rows in [[row for rows in by_prompt.values() for row in rows]]
    ]


def top_oracle(many: Sequence[Prompt], count: int) -> list[Row]:
    seen: dict[tuple[int, int], list[Row]] = {}
    for number, (nodes, _) in enumerate(many):
        mine: dict[tuple[int, int], list[Row]] = {}
        for row in nodes:
            if row["kind"] == "neuron":
                mine.setdefault((row["layer"], row["neuron"]), []).append(row)
        for key, rows in mine.items():
            strongest = max(rows, key=lambda row: abs(row["attribution"]))  # the first of equal ones
            found = {name: strongest[name] for name in ("layer", "neuron", "expert", "position", "token", "activation")}
            total = f32(fold([row["attribution"] for row in rows]))
            seen.setdefault(key, []).append(found | {"prompt_id": number, "attribution": total})
    return [
        {name: (row | {"rank": rank})[name] for name in TOP_PROMPTS.names}
        for _, rows in sorted(seen.items())
        for rank, row in enumerate(sorted(rows, key=lambda row: -abs(row["attribution"]))[:count], 1)
    ]


def edge_oracle(many: Sequence[Prompt]) -> list[Row]:
    order = {kind: number for number, kind in enumerate(columns.KINDS)}
    seen: dict[Any, list[tuple[int, Row]]] = {}
    for number, (nodes, edges) in enumerate(many):
        for edge in edges:
            ends = [nodes[edge[name]] for name in ("target", "source")]
            key = tuple((end["layer"], order[end["kind"]], end["neuron"]) for end in ends)
            seen.setdefault(key, []).append((number, edge))

    def mean(values: list[float | None], count: int | None = None) -> float | None:
        there = [value for value in values if value is not None]
        return fold(there) / (count or len(there)) if there else None

    found = []
    for (target, source), rows in sorted(seen.items()):
        row: Row = {}
        for name, end in (("source", source), ("target", target)):
            row |= {f"{name}_kind": columns.KINDS[end[1]], f"{name}_layer": end[0], f"{name}_neuron": end[2]}
        parts = [edge["attribution"] for _, edge in rows]
        n_prompts = len({number for number, _ in rows})
        row |= {"n_prompts": n_prompts, "n_occurrences": len(rows)}
        row |= {f"mean_{name}": mean([edge[name] for _, edge in rows]) for name in ("weight", "share", "attribution")}
        row["mean_abs_attribution"] = mean([None if part is None else abs(part) for part in parts])
        row["prompt_mean_attribution"] = mean(parts, n_prompts)
        found.append(row)
    return found


def edges_mean(node_files: list[str], edge_files: list[str], memory: int = 2**30) -> pa.Table:
    out = io.BytesIO()
    rows = write_edges_mean(node_files, edge_files, FS, out, memory)
    found = pq.read_table(pa.BufferReader(out.getvalue())).replace_schema_metadata(None)
    assert (found.num_rows, found.schema) == (rows, EDGES_MEAN)
    return found


@SLOW
@given(SHARDS)
def test_neurons_are_what_plain_python_finds(tmp_path: Path, shards: list[list[Prompt]]) -> None:
    found = neurons(write(tmp_path, shards)[0], FS)
    assert found.schema == NEURONS
    wanted = neuron_oracle(flat(shards))
    for row, other in zip(found.to_pylist(), wanted, strict=True):
        assert row.pop("std") == pytest.approx(other.pop("std"), rel=1e-9, abs=1e-9 * other["max_abs"])
        assert row == other


@SLOW
@given(SHARDS, st.integers(1, 3))
def test_top_prompts_are_what_plain_python_finds(tmp_path: Path, shards: list[list[Prompt]], count: int) -> None:
    found = top_prompts(write(tmp_path, shards)[0], FS, count)
    assert found.schema == TOP_PROMPTS
    assert found.to_pylist() == top_oracle(flat(shards), count)


def test_nodes_of_before_there_were_experts_are_summed_and_looked_up_as_of_none(tmp_path: Path) -> None:
    nodes, edges = write(tmp_path, example())
    for path in nodes:
        pq.write_table(pq.read_table(path).drop_columns("expert"), path)
    found = neurons(nodes, FS)
    assert (found.schema, found["expert"].null_count) == (NEURONS, found.num_rows)
    assert top_prompts(nodes, FS)["expert"].null_count == top_prompts(nodes, FS).num_rows
    compaction.compact(nodes, edges, FS, Storage(str(tmp_path)))
    assert compaction.lookup(Storage(str(tmp_path)), 0, 0).schema == NODES
    assert query({"nodes": nodes}, FS, "SELECT count(expert) AS n FROM nodes").to_pylist() == [{"n": 0}]


@SLOW
@given(SHARDS)
def test_edge_means_are_what_plain_python_finds(tmp_path: Path, shards: list[list[Prompt]]) -> None:
    assert edges_mean(*write(tmp_path, shards)).to_pylist() == edge_oracle(flat(shards))


@settings(SLOW, max_examples=10)
@given(SHARDS, st.integers(1, 9))
def test_neither_cut_nor_memory_changes_a_bit(tmp_path: Path, shards: list[list[Prompt]], chunk: int) -> None:
    cuts = [shards, [[prompt] for prompt in flat(shards)], [flat(shards)]]
    files = [write(tmp_path / str(number), cut) for number, cut in enumerate(cuts)]
    wanted = [neurons(files[0][0], FS), top_prompts(files[0][0], FS, 2), edges_mean(*files[0])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "CHUNK", chunk)
        patch.setattr("tracer.store.aggregation.CHUNK", chunk)
        for nodes, edges in files:
            found = [neurons(nodes, FS), top_prompts(nodes, FS, 2)]
            found += [edges_mean(nodes, edges, memory) for memory in (0, 500, 1500)]
            for one, other in zip(found, [*wanted, wanted[2], wanted[2]], strict=True):
                assert one.equals(other)
                assert repr(one.to_pylist()) == repr(other.to_pylist())  # tells -0.0 from 0.0


def example(n_prompts: int = 40, per_shard: int = 8, seed: int = 0) -> list[list[Prompt]]:
    """Shards with many rows per neuron."""
    rng = np.random.default_rng(seed)
    many: list[Prompt] = []
    for _ in range(n_prompts):
        size = int(rng.integers(0, 60))
        layers, ids = rng.integers(0, 3, size), rng.integers(0, 6, size)
        nodes = [
            {"node_id": i, "kind": "neuron", "layer": int(layers[i]), "neuron": int(ids[i]),
             "position": int(rng.integers(0, 9)), "token": f"t{rng.integers(0, 5)}",
             "activation": f32(rng.normal()), "attribution": f32(rng.normal() + 3)}
            for i in range(size)
        ]  # fmt: skip
        edges = [
            {"source": int(a), "target": int(b), "weight": f32(rng.normal()), "share": f32(rng.normal()),
             "attribution": f32(rng.normal())}
            for a, b in (rng.integers(0, size, (100, 2)) if size else [])
        ]  # fmt: skip
        many.append((nodes, edges))
    return [many[at : at + per_shard] for at in range(0, n_prompts, per_shard)]


def test_passes_are_taken_when_memory_is_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, passes = write(tmp_path, example()), []
    wanted = edges_mean(*files)
    plain = edge_means._edge_pass
    monkeypatch.setattr(edge_means, "_edge_pass", lambda *args: passes.append(args[1]) or plain(*args))
    assert edges_mean(*files, memory=30 * edge_means._PAIR_BYTES).equals(wanted)
    assert len(passes) > wanted.num_rows // 30
    assert passes == sorted(set(passes))


def test_the_old_columns_are_those_of_arrows_group_by(tmp_path: Path) -> None:
    files, _ = write(tmp_path, example())
    rows = pa.concat_tables([pq.read_table(file) for file in files]).to_pandas()
    rows["size"] = rows["attribution"].abs().astype("float64")
    groups = rows.astype({"attribution": "float64", "activation": "float64"}).groupby(["layer", "neuron"])
    wanted = {
        "n_prompts": groups["prompt_id"].nunique(),
        "n_occurrences": groups.size(),
        "mean_attribution": groups["attribution"].mean(),
        "mean_abs_attribution": groups["size"].mean(),
        "std": groups["attribution"].std(ddof=0),
        "max_abs": groups["size"].max(),
        "mean_activation": groups["activation"].mean(),
    }
    found = neurons(files, FS).to_pandas().set_index(["layer", "neuron"])
    assert list(found.columns[:8]) == ["expert", *wanted]
    for name, column in wanted.items():
        np.testing.assert_allclose(found[name], column, rtol=1e-12, atol=1e-14)


def test_a_small_spread_about_a_large_mean_is_not_lost(tmp_path: Path) -> None:
    values = [f32(4096 + 2**-11 * (k % 3)) for k in range(3000)]
    row = {"kind": "neuron", "layer": 0, "neuron": 0, "position": 0, "activation": 1.0}
    many = [([row | {"node_id": 0, "attribution": value}], []) for value in values]
    found = neurons(write(tmp_path, [many])[0], FS)
    assert found["std"][0].as_py() == pytest.approx(np.std(np.array(values) - 4096), rel=1e-9)
    same = neurons(write(tmp_path / "same", [many[:1] * 1000])[0], FS)
    assert same["std"][0].as_py() == 0


def test_what_is_not_finite_shows_and_comes_last(tmp_path: Path) -> None:
    row = {"node_id": 0, "kind": "neuron", "layer": 0, "neuron": 0, "position": 0, "activation": 1.0}
    many = [([row | {"attribution": value}], []) for value in (math.nan, 1.0, -math.inf)]
    files, _ = write(tmp_path, [many])
    assert math.isnan(neurons(files, FS)["mean_attribution"][0].as_py())
    assert math.isnan(neurons(files, FS)["std"][0].as_py())
    assert top_prompts(files, FS)["prompt_id"].to_pylist() == [2, 1, 0]


def test_nothing_gives_empty_tables(tmp_path: Path) -> None:
    for files in (([], []), write(tmp_path, [[], [([], [])]])):
        assert neurons(files[0], FS).equals(NEURONS.empty_table())
        assert top_prompts(files[0], FS).equals(TOP_PROMPTS.empty_table())
        assert edges_mean(*files).equals(EDGES_MEAN.empty_table())
    nodes, _ = write(tmp_path, example())
    assert edges_mean(nodes, []).num_rows == 0


def test_damage_is_refused(tmp_path: Path) -> None:
    nodes, edges = write(tmp_path, example())
    with pytest.raises(RunError, match="shard order"):
        neurons([nodes[1], nodes[0]], FS)
    with pytest.raises(RunError, match="every file once"):
        top_prompts([nodes[0], nodes[0]], FS)
    with pytest.raises(RunError, match="is not a nodes table"):
        neurons(edges, FS)
    with pytest.raises(RunError, match="missing or damaged"):
        neurons([*nodes, str(tmp_path / "gone.parquet")], FS)
    with pytest.raises(RunError, match="not a node of its shard"):
        edges_mean(nodes, edges[::-1])
    with pytest.raises(ValueError, match="same shards"):
        edges_mean(nodes, edges[1:])
    Path(nodes[0]).write_bytes(Path(nodes[0]).read_bytes()[:-9])
    with pytest.raises(RunError, match="missing or damaged"):
        edges_mean(nodes, edges)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attribution": None}, "without a value"),
        ({"layer": None}, "without a value"),
        ({"kind": None}, "unknown kind"),
        ({"kind": "neuro"}, "unknown kind"),
    ],
)
def test_rows_that_cannot_be_counted_are_refused(tmp_path: Path, change: Row, message: str) -> None:
    shards = example()
    shards[2][1][0][0].update(change)
    files, _ = write(tmp_path, shards)
    for function in (neurons, top_prompts):
        with pytest.raises(RunError, match=message):
            function(files, FS)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("source", -1, "not a node"),
        ("target", 999, "not a node"),
        ("prompt_id", 77, "not a node"),
        ("weight", None, "value"),
    ],
)
def test_edges_that_end_nowhere_are_refused(tmp_path: Path, name: str, value: int | None, message: str) -> None:
    shards = example()
    shards[4][-1][1][-1].update({name: value})
    with pytest.raises(RunError, match=message):
        edges_mean(*write(tmp_path, shards))


def test_prompts_must_ascend(tmp_path: Path) -> None:
    path = str(tmp_path / "nodes.parquet")
    rows = [{"prompt_id": number, "kind": "neuron"} for number in (4, 4, 6, 5)]
    pq.write_table(pa.Table.from_pylist(rows, schema=NODES), path)
    with pytest.raises(RunError, match="prompt 5: comes after prompt 6 of the same file"):
        neurons([path], FS)


def test_node_ids_must_be_places(tmp_path: Path) -> None:
    shards = example()
    shards[1][1][0][1]["node_id"] = 7
    with pytest.raises(RunError, match="run from 0"):
        edges_mean(*write(tmp_path, shards))


@given(st.lists(st.integers(-(2**62), 2**62) | st.integers(-3, 3), max_size=50))
def test_the_order_of_keys_is_stable(keys: list[int]) -> None:
    found = columns.ordered(np.array(keys, np.int64))
    assert found.tolist() == sorted(range(len(keys)), key=keys.__getitem__)


def compact_oracle(many: Sequence[Prompt], layer: int, neuron: int) -> tuple[list[Row], list[Row]]:
    """The rows of a neuron, and of the edges into it, in the order of a look-up."""
    nodes: list[Row] = []
    edges: list[Row] = []
    for number, (part, links) in enumerate(many):
        nodes += [{"prompt_id": number, **row} for row in part if (row["layer"], row["neuron"]) == (layer, neuron)]
        for edge in links:
            row: Row = {"prompt_id": number}
            for end in ("source", "target"):
                row |= {f"{end}_{name}": part[edge[end]][name] for name in ("kind", "layer", "position", "neuron")}
            if (row["target_layer"], row["target_neuron"]) == (layer, neuron):
                edges.append(row | {name: edge[name] for name in ("weight", "share", "attribution")})
    nodes.sort(key=lambda row: (row["prompt_id"], row["position"]))
    edges.sort(key=lambda row: (row["prompt_id"], row["target_position"]))
    return nodes, edges


@SLOW
@given(SHARDS, st.sampled_from([0, 1000, 2**30]))
def test_a_look_up_finds_what_a_filter_finds(tmp_path: Path, shards: list[list[Prompt]], memory: int) -> None:
    files, out = write(tmp_path, shards), Storage(tmp_path)
    rows = compaction.compact(*files, FS, out, memory)
    many = flat(shards)
    assert rows == {"nodes": sum(len(one[0]) for one in many), "edges": sum(len(one[1]) for one in many)}
    for key in {(row["layer"], row["neuron"]) for nodes, _ in many for row in nodes} | {(0, 77), (9, 9)}:
        for name, wanted in zip(("nodes", "edges"), compact_oracle(many, *key), strict=True):
            found = compaction.lookup(out, *key, name)
            assert found.schema == compaction.SCHEMAS[name]
            rest = dict.fromkeys(found.column_names)
            assert found.to_pylist() == [rest | row for row in wanted]
    assert compaction.compacted(out) == compaction.digest(*files)


def test_compaction_is_sorted_small_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "_ROW_GROUP", 10)
    out, files = Storage(tmp_path), write(tmp_path / "nodes", example())
    compaction.compact(*files, FS, out, 5000)
    file = pq.ParquetFile(tmp_path / "compact/nodes/layer_1.parquet")
    table = file.read().to_pandas()
    keys = ["neuron", "prompt_id", "position"]
    assert table.equals(table.sort_values(keys, kind="stable", ignore_index=True))
    assert file.metadata.num_row_groups > 10
    assert file.metadata.row_group(0).column(0).has_column_index
    assert [one.column_index for one in file.metadata.row_group(0).sorting_columns] == [
        file.schema_arrow.get_field_index(key) for key in keys
    ]
    other = write(tmp_path / "other", [[([], [])]])
    compaction.compact(*other, FS, out)
    assert compaction.compacted(out) == compaction.digest(*other) != compaction.digest(*files)
    assert compaction.lookup(out, 1, 1).num_rows == 0
    assert not out.files("compact/nodes")
    assert all(Path(path).exists() for paths in (*files, *other) for path in paths)


def test_what_was_not_compacted_whole_is_refused(tmp_path: Path) -> None:
    nodes, edges = write(tmp_path, example())
    out = Storage(tmp_path)
    with pytest.raises(RunError, match="no compacted"):
        compaction.lookup(out, 0, 0)
    assert compaction.compacted(out) is None
    assert compaction.compact(nodes, [], FS, out)["edges"] == 0
    assert compaction.lookup(out, 0, 0, "edges").num_rows == 0
    with pytest.raises(RunError, match="not a node"):
        compaction.compact(nodes, edges[::-1], FS, out)
    with pytest.raises(RunError, match="no compacted"):
        compaction.lookup(out, 0, 0)
    compaction.compact(nodes, edges, FS, out)
    (tmp_path / "compact/nodes/layer_0.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunError, match="compact the run again"):
        compaction.lookup(out, 0, 0)


@pytest.fixture
def tables(tmp_path: Path) -> dict[str, list[str]]:
    nodes, edges = write(tmp_path / "it's here", example())
    rows = [{"prompt_id": number, "status": "ok", "labels": [("verb", "is")]} for number in range(40)]
    path = str(tmp_path / "prompts.parquet")
    pq.write_table(pa.Table.from_pylist(rows, schema=PROMPTS), path)
    return {"prompts": [path], "nodes": nodes, "edges": edges}


def remote() -> PyFileSystem:
    """A file system that is not this machine's, as far as anyone can tell."""
    return PyFileSystem(FSSpecHandler(pytest.importorskip("fsspec").filesystem("file")))


@pytest.mark.parametrize("make", [LocalFileSystem, remote])
def test_a_folder_that_is_called_like_a_column_changes_none(tmp_path: Path, make: Any) -> None:
    """DuckDB and Arrow take layer=3/ in a path for a value of the column, in every row."""
    nodes, edges = write(tmp_path / "layer=3" / "kind=logit", example())
    found = query({"nodes": nodes, "edges": edges}, make(), "SELECT DISTINCT layer, kind FROM nodes ORDER BY ALL")
    stored = pa.concat_tables([pq.read_table(pa.BufferReader(Path(file).read_bytes())) for file in nodes])
    wanted = sorted(set(zip(stored["layer"].to_pylist(), stored["kind"].to_pylist(), strict=True)))
    assert list(zip(found["layer"].to_pylist(), found["kind"].to_pylist(), strict=True)) == wanted
    assert len(wanted) > 2
    assert neurons(nodes, make()).equals(neurons([str(file) for file in nodes], FS))


@pytest.mark.parametrize("make", [LocalFileSystem, remote])
def test_a_query_reads_the_tables(tables: dict[str, list[str]], make: Any) -> None:
    fs = make()
    everything = sum(pq.read_metadata(file).num_rows for file in tables["nodes"])
    assert query(tables, fs, "SELECT count(*) AS n FROM nodes").to_pylist() == [{"n": everything}]
    joined = (
        "WITH p AS (FROM prompts WHERE labels['verb'] = 'is') SELECT DISTINCT kind FROM nodes JOIN p USING (prompt_id)"
    )
    assert query(tables, fs, joined)["kind"].to_pylist() == ["neuron"]
    for name in ("edges_mean", "neurons", "top_prompts"):
        assert query(tables, fs, f"SELECT count(*) AS n FROM {name}")["n"].to_pylist() == [0]
    found = query(tables, fs, "SHOW TABLES")["name"].to_pylist()
    assert found == sorted(store_query.SCHEMAS)
    assert {"circuit", "concepts", "descriptions", "edges", "exemplars", "nodes", "profiles", "prompts", "tokens"} < {
        *found
    }
    assert query(tables, fs, "DESCRIBE nodes").num_rows == len(NODES)
    assert query(tables, fs, "SUMMARIZE edges").num_rows == len(EDGES)
    assert neurons(tables["nodes"], fs).equals(neurons(tables["nodes"], FS))


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("", "0 statements"),
        ("SELECT 1; SELECT 2", "2 statements"),
        ("DROP VIEW nodes", "kind DROP"),
        ("CREATE TABLE x AS FROM nodes", "kind CREATE"),
        ("INSERT INTO nodes FROM nodes", "kind INSERT"),
        ("SET enable_external_access = true", "kind SET"),
        ("ATTACH 'x.db'", "kind ATTACH"),
        ("INSTALL httpfs", "kind LOAD"),
        ("EXPLAIN ANALYZE SELECT 1", "kind EXPLAIN"),
        ("SELEC 1", "Parser Error: syntax error at or near"),
        ("SELECT nothing FROM nodes", "Binder Error: Referenced column"),
        ("FROM sql_of_this_frame", "Catalog Error"),
        ("SELECT * FROM query('COPY nodes TO ''x.csv''')", "Expected a single SELECT"),
    ],
)
def test_a_query_only_reads(tables: dict[str, list[str]], sql: str, message: str) -> None:
    sql_of_this_frame = pa.table({"a": [1]})
    with pytest.raises(JobError, match=message):
        query(tables, FS, sql)
    del sql_of_this_frame


def test_a_query_reaches_no_other_file(tables: dict[str, list[str]], tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    other.write_text("a\n1\n")
    for source in (f"'{other}'", f"read_csv('{other}')", f"read_text('{other}')", f"glob('{tmp_path}/*')"):
        with pytest.raises(JobError, match="fails"):
            query(tables, FS, f"FROM {source}")
    with pytest.raises(JobError, match="kind COPY"):
        query(tables, FS, f"COPY nodes TO '{tmp_path}/copy.csv'")
    assert not (tmp_path / "copy.csv").exists()
    with pytest.raises(RunError, match="cannot be read"):
        query({"nodes": [str(tmp_path / "gone.parquet")]}, FS, "FROM nodes")


def test_a_query_without_duckdb_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(JobError, match=r"pip install 'neuron-tracer\[query\]'"):
        query({}, FS, "SELECT 1")
