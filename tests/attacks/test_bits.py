"""540 flipped bits of a saved circuit, and others of a run: each is said, or changes no number that is read."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import runs
import tracer
from inline import InlinePool
from tally import Attack
from tracer import Circuit, Run, run
from tracer.circuit.from_run import graph_of
from tracer.errors import TracerError
from tracer.store import compaction

PROMPT = tracer.Prompt("The secretaries near the car", target=" are", foil=" is")
SOME = [pytest.param(12, id="some"), pytest.param(90, id="all", marks=[pytest.mark.slow, pytest.mark.long])]


@pytest.fixture(scope="module")
def circuit() -> Circuit:
    return tracer.trace(tracer.load(), PROMPT, nodes=12)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return runs.tiny(tmp_path_factory.mktemp("bits"))


def flip(path: Path, read: Callable[[], Any], count: int, seed: int, begun: Any, equal: Any = None) -> None:
    """Flip bits of a file, one at a time; what is read must be what it was, or an error in a line."""
    right, chance = read(), random.Random(seed)
    with begun as tally:
        for _ in range(count):
            content = runs.flipped(path, chance.randrange(8 * path.stat().st_size))
            tally.tried += 1
            try:
                found = read()
                if not (found == right if equal is None else equal(found, right)):
                    tally.silent += 1
                    tally.worst = f"{path.name}: other numbers"
            except TracerError as error:
                tally.tracebacks += "\n" in str(error)
            except Exception as error:  # noqa: BLE001  what must not be
                tally.tracebacks += 1
                tally.worst = f"{path.name}: {type(error).__name__}: {error}"
            finally:
                path.write_bytes(content)


@pytest.mark.parametrize("count", SOME)
@pytest.mark.parametrize("table", ["run.json", "_commits", "nodes", "edges", "prompts", "_SUCCESS.json"])
def test_no_flipped_bit_of_a_saved_circuit_reads_as_other_numbers(
    circuit: Circuit, table: str, count: int, tmp_path: Path, attack: Attack
) -> None:
    circuit.save(tmp_path / "run")
    place = tmp_path / "run" / table
    path = place if place.is_file() else next(iter(place.iterdir()))
    flip(path, lambda: Circuit.load(tmp_path / "run"), count, 0, attack("540 flipped bits of a circuit"))
    assert Circuit.load(tmp_path / "run") == circuit


READERS: dict[str, Callable[[Run, str], Any]] = {
    "query": runs.answer,
    "table": lambda done, table: done.table(table).to_pylist(),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("table", ["nodes", "edges", "prompts", "neurons", "failed"])
def test_no_flipped_bit_of_a_run_reads_as_other_numbers(done: Run, reader: str, table: str, attack: Attack) -> None:
    folder = Path(done.address)
    path = next(iter((folder / table).iterdir())) if (folder / table).is_dir() else folder / f"{table}.parquet"
    flip(path, lambda: READERS[reader](done, table), 12, 1, attack("flipped bits of a run"))


@pytest.mark.parametrize("name", ["run.json", "_commits/0.json"])
def test_no_flipped_bit_of_an_unfinished_runs_records_reads_as_other_numbers(
    tmp_path: Path, name: str, attack: Attack
) -> None:
    made = runs.tiny(tmp_path)
    made.folder.delete_outputs()
    made.folder.uncommit(1)

    def read() -> Any:
        commits = [commit.model_dump() for commit in made.folder.commits()]
        return made.folder.record(), commits, made.folder.tables(["nodes"])

    flip(Path(made.address) / name, read, 60, 4, attack("flipped bits of a run"))


@pytest.mark.slow
@pytest.mark.long
def test_no_flipped_bit_reads_as_another_graph_of_one_prompt(tmp_path: Path, attack: Attack) -> None:
    job = {"kind": "dataset", "input": {"task": "sva", "structure": "simple", "count": 2}, "nodes": 20}
    made = run(job, tmp_path, pool=InlinePool())
    for table in ("edges", "nodes", "prompts"):
        path = next(iter((tmp_path / table).iterdir()))
        flip(path, lambda: graph_of(made.address, 1), 12, 3, attack("flipped bits of a run"))


def test_no_flipped_bit_of_a_compacted_table_is_looked_up(done: Run, attack: Attack) -> None:
    files, place = done.folder.tables(["nodes", "edges"])[0], done.folder.place
    compaction.compact(files["nodes"], files["edges"], place.fs, place)
    path = next(iter((Path(done.address) / "compact" / "nodes").iterdir()))
    layer = int(path.stem.removeprefix("layer_"))
    neuron = done.table("nodes")["neuron"][0].as_py()
    same = lambda found, right: found.to_pydict() == right.to_pydict()  # noqa: E731  not what a field may be
    flip(path, lambda: compaction.lookup(place, layer, neuron), 60, 2, attack("flipped bits of a run"), same)
