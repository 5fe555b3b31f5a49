"""Exemplars: what a plain pass over all texts finds, whatever the shards, workers, stops and order; escaped pages."""

from __future__ import annotations

import functools
import json
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import torch

import tracer
from helpers import refused
from inline import InlinePool
from parsed import Page
from runs import answer
from tracer.errors import JobError, RunError
from tracer.meaning import densities, exemplars, peaks
from tracer.meaning.densities import EDGES, Totals
from tracer.runs.jobs import load_job
from tracer.runs.units import exemplars as unit
from tracer.runs.worker import make
from tracer.runs.workers.messages import Setup, Started, Task
from tracer.store import schemas
from tracer.store.run_folder import RunFolder

NEURONS = [(0, 3), (1, 5), (1, 6), (3, 7)]
WINDOW, TOP, EACH = 12, 3, 2
OUTPUTS = ("exemplars.parquet", "densities.parquet")


@functools.cache
def demo() -> tracer.Model:
    return tracer.load("demo")


def texts(count: int = 20, seed: int = 0) -> list[str]:
    """Documents of one to 24 words; some come twice, so that there are ties."""
    dice = random.Random(seed)
    words = "the secretary near cars is happy and girls run to Texas or Ohio said he".split()
    made = [" ".join(dice.choices(words, k=dice.choice((1, 3, 8, 24)))) for _ in range(count)]
    return [*made, *made[:5]]


def corpus(folder: Path, rows: Sequence[Any] | None = None) -> str:
    given = [row if isinstance(row, dict) else {"text": row} for row in (texts() if rows is None else rows)]
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return str(path)


def job(path: str, **more: Any) -> dict[str, Any]:
    named = {} if "of" in more else {"neurons": [f"{layer}/{neuron}" for layer, neuron in NEURONS]}
    small = {"window": WINDOW, "exemplars": TOP, "per_quantile": EACH, "around": 4, "shard_size": 8}
    return {"kind": "exemplars", "input": {"path": path}, **small, **named, **more}


def collect(path: str, out: Path, pool: Any = None, options: dict[str, Any] | None = None, **more: Any) -> tracer.Run:
    return tracer.run(job(path, **more), out, pool=pool or InlinePool(), **(options or {}))


def outputs(out: Path) -> list[bytes]:
    return [(out / name).read_bytes() for name in OUTPUTS]


# ---------------------------------------------------------------------------------------------- the plain pass


class Seen(NamedTuple):
    """A document in plain PyTorch: the values of its tokens that count [token, neuron], and where each is."""

    values: np.ndarray
    positions: list[int]


def plain(text: str, window: int = WINDOW) -> Seen:
    """One document, one window at a time, by hooks on the down projections."""
    model = demo()
    ids = model.tokenizer(text)["input_ids"]
    bos, body = ids[0], ids[1:]
    assert bos == model.tokenizer.bos_token_id
    downs = [module for name, module in model.module.named_modules() if name.endswith("down_proj")]
    values, positions = [], []
    held: list[torch.Tensor] = []
    hooks = [down.register_forward_pre_hook(lambda _, given: held.append(given[0][0].clone())) for down in downs]
    for first in range(0, len(body), window - 1):
        held.clear()
        with torch.no_grad():
            model.module(torch.tensor([[bos, *body[first : first + window - 1]]]))
        rows = torch.stack([held[layer][1:, neuron] for layer, neuron in NEURONS], 1)
        values.append(rows.numpy())
        positions += range(first + 1, first + 1 + len(rows))
    for hook in hooks:
        hook.remove()
    return Seen(np.concatenate(values), positions)


@functools.cache
def all_seen() -> list[Seen]:
    return [plain(text) for text in texts()]


def peaks_of(at: int, polarity: int) -> list[tuple[float, int, int]]:
    """By document, the size of a neuron's largest value of a sign, and where it is first."""
    found = []
    for number, seen in enumerate(all_seen()):
        signed = seen.values[:, at] * polarity
        if signed.max() > 0:
            found.append((float(signed.max()), number, seen.positions[int(signed.argmax())]))
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exemplars")
    collect(corpus(folder), folder / "run")
    return folder / "run"


def each() -> Iterator[tuple[int, tuple[int, int], int]]:
    return ((at, pair, polarity) for at, pair in enumerate(NEURONS) for polarity in (1, -1))


def test_the_strongest_are_those_of_a_plain_pass_over_all_texts(run: Path) -> None:
    table = exemplars.read(run)
    assert table.schema.remove_metadata().equals(schemas.EXEMPLARS)
    assert exemplars.neurons_of(table) == sorted((*pair, sign) for _, pair, sign in each() if peaks_of(_, sign))
    for at, pair, polarity in each():
        wanted = sorted(peaks_of(at, polarity), key=lambda one: (-one[0], one[1]))[:TOP]
        got = [one for one in exemplars.of_neuron(table, *pair, polarity) if one.kind == "top"]
        assert [one.rank for one in got] == list(range(len(wanted)))
        for one, (size, _, _) in zip(got, wanted, strict=True):
            assert one.value == pytest.approx(polarity * size, rel=1e-4, abs=1e-6)
            mine = {number: (its, place) for its, number, place in peaks_of(at, polarity)}
            assert mine[one.document][0] == pytest.approx(size, rel=1e-4, abs=1e-6)
            assert one.position == mine[one.document][1]


def test_an_exemplar_shows_its_documents_own_tokens_and_values(run: Path) -> None:
    table, model = exemplars.read(run), demo()
    for at, pair, polarity in each():
        for one in exemplars.of_neuron(table, *pair, polarity):
            ids = model.tokenizer(texts()[one.document])["input_ids"]
            assert "".join(one.tokens) == "".join(
                model.tokenizer.decode([token]) for token in ids[one.start : one.start + len(one.tokens)]
            )
            assert one.values[one.peak] == one.value
            assert len(one.tokens) == len(one.values) <= 9
            seen = all_seen()[one.document]
            for offset, value in enumerate(one.values):
                if (place := one.start + offset) > 0:  # BOS is shown, and does not count
                    assert value == pytest.approx(seen.values[seen.positions.index(place), at], rel=1e-3, abs=1e-5)


def test_quantiles_are_drawn_from_the_bin_that_they_lie_in(run: Path) -> None:
    table, n_found = exemplars.read(run), 0
    for at, pair, polarity in each():
        sizes = sorted(size for size, _, _ in peaks_of(at, polarity))
        found = exemplars.of_neuron(table, *pair, polarity)
        for quantile in (50, 90, 99):
            middle = sizes[max(0, math.ceil(quantile / 100 * len(sizes)) - 1)]
            edge = np.searchsorted(EDGES, np.float32(middle), side="right")
            low, high = EDGES[edge - 1] if edge else 0, EDGES[edge]
            mine = [one for one in found if one.kind == f"q{quantile}"]
            n_found += len(mine)
            assert all(low * 0.9999 <= abs(one.value) < high * 1.0001 for one in mine)
            assert len(mine) <= EACH
        assert len({one.document for one in found}) == len(found), "a document once for each neuron and sign"
    assert n_found > 10


def test_moments_densities_and_histograms_are_those_of_all_tokens(run: Path) -> None:
    values = np.concatenate([seen.values for seen in all_seen()]).astype(np.float64)
    rows = exemplars.read_densities(run).to_pylist()
    assert [(row["layer"], row["neuron"]) for row in rows] == NEURONS
    for at, row in enumerate(rows):
        mine = values[:, at]
        assert row["n_tokens"] == len(mine)
        assert row["mean"] == pytest.approx(mine.mean(), abs=1e-6)
        assert row["std"] == pytest.approx(mine.std(), rel=1e-5)
        assert (row["smallest"], row["largest"]) == pytest.approx((mine.min(), mine.max()), rel=1e-4)
        edges = np.array(row["edges"])
        near = int((np.abs(np.abs(mine)[:, None] / EDGES - 1) < 1e-4).sum())  # which rounding may put on either side
        got, wanted = np.array(row["counts"]), np.histogram(mine, edges)[0]
        assert got.sum() == len(mine)
        assert np.abs(got - wanted).sum() <= 2 * near
        most = np.abs(mine).max()
        assert row["threshold"] in EDGES
        assert 0.1 * most * 0.999 <= row["threshold"] <= 0.1 * most * 1.415
        strong = (mine >= row["threshold"]).mean(), (mine <= -row["threshold"]).mean()
        assert (row["density_positive"], row["density_negative"]) == pytest.approx(strong, abs=(near + 0.5) / len(mine))


# ----------------------------------------------------------------------------------- workers, orders and stops


class Several(InlinePool):
    """So many workers in this process, whose tasks are done in any order."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.dice, self.crew = random.Random(seed), dict[str, Any]()

    def start(self, worker: str, setup: Setup) -> None:
        self.crew[worker] = make(setup)
        self._events.append(Started.of(worker, self.crew[worker], "here"))

    def give(self, worker: str, task: Task) -> None:
        self._tasks.insert(self.dice.randrange(len(self._tasks) + 1), (worker, task))

    def events(self, timeout: float) -> Sequence[Any]:
        if self._tasks:
            self._worker = self.crew[self._tasks[0][0]]
        return super().events(timeout)


def test_three_workers_in_any_order_leave_the_same_bytes(tmp_path: Path, run: Path) -> None:
    done = collect(corpus(tmp_path), tmp_path / "run", Several(3), {"workers": 3})
    assert done.status.workers == 3
    assert outputs(tmp_path / "run") == outputs(run)


class _DiedError(BaseException):
    """The process is gone."""


def _after(patch: pytest.MonkeyPatch, count: int, error: BaseException, where: Any = lambda batch: True) -> None:
    """So many passes go well, and the next raises."""
    whole, left = unit.passes.chosen, [count]

    def chosen(model: Any, batch: Any, neurons: Any) -> Any:
        left[0] -= where(batch)
        if left[0] < 0 and where(batch):
            raise error
        return whole(model, batch, neurons)

    patch.setattr(unit.passes, "chosen", chosen)


def test_a_run_that_died_is_resumed_to_the_same_bytes(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _after(patch, 3, _DiedError())
        with pytest.raises(_DiedError):
            collect(corpus(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run" / "exemplars.parquet").exists()
    again = collect(corpus(tmp_path), tmp_path / "run")
    assert 0 < again.resumed < again.status.n_units
    assert outputs(tmp_path / "run") == outputs(run)


@pytest.mark.slow
def test_a_lost_record_is_made_again(tmp_path: Path, run: Path) -> None:
    path = corpus(tmp_path)
    collect(path, tmp_path / "run", limit=16)
    (tmp_path / "run" / "run.json").unlink()
    again = collect(path, tmp_path / "run", None, {"repair": True})
    assert again.resumed == 2
    assert outputs(tmp_path / "run") == outputs(run)


def test_more_documents_extend_a_run_to_the_bytes_of_a_new_one(tmp_path: Path, run: Path) -> None:
    path = corpus(tmp_path)
    collect(path, tmp_path / "run", limit=20)
    more = collect(path, tmp_path / "run")
    assert more.resumed == 2
    assert outputs(tmp_path / "run") == outputs(run)


@pytest.mark.slow
def test_the_parts_add_up_whatever_the_size_of_shards(tmp_path: Path, run: Path) -> None:
    """One document at a time is the same arithmetic in any shard."""
    path = corpus(tmp_path, texts(4))
    for size in (4, 100):
        collect(path, tmp_path / str(size), shard_size=size, batch=1)
    assert outputs(tmp_path / "4") == outputs(tmp_path / "100")


def test_a_document_that_fails_is_left_out_as_a_whole_and_can_be_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = texts(3)
    path = corpus(tmp_path, [*rows, "", "zzz zzz"])
    marked = tuple(demo().tokenizer("zzz zzz")["input_ids"])
    with monkeypatch.context() as patch:
        _after(patch, 0, ValueError("a bad one"), lambda batch: marked in batch.token_ids)
        done = collect(path, tmp_path / "run", batch=1)
    assert done.status.statuses == {"ok": 6, "failed": 2}
    assert done.status.errors == {"JobError": 1, "ValueError": 1}
    (one, other) = RunFolder(tmp_path / "run").read_output("failed.parquet").to_pylist()
    assert (one["prompt_id"], other["prompt_id"], other["error"]) == (6, 7, "a bad one")
    again = collect(path, tmp_path / "run", None, {"retry_failed": True}, batch=1)
    assert again.status.statuses == {"ok": 7, "failed": 1}
    collect(path, tmp_path / "new", batch=1)
    assert outputs(tmp_path / "run") == outputs(tmp_path / "new")


@pytest.mark.slow
def test_memory_that_runs_out_halves_the_documents_computed_together(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _after(patch, 0, torch.OutOfMemoryError("no room"), lambda batch: len(batch.token_ids) > 4)
        done = collect(corpus(tmp_path), tmp_path / "run")
    assert done.status.statuses == {"ok": len(texts())}
    mine, its = (exemplars.read(out) for out in (tmp_path / "run", run))
    assert sum(commit.halved for commit in done.folder.commits()) > 0
    assert mine.num_rows == its.num_rows
    assert np.allclose(mine["value"].to_numpy(), its["value"].to_numpy(), rtol=1e-4, atol=1e-6)


# -------------------------------------------------------------------------------------------- sums and samples


def _values(count: int, n: int = 3, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return (draw.standard_normal((count, n)) * 10.0 ** draw.integers(-8, 5, (count, n))).astype(np.float32)


def _total(*parts: np.ndarray) -> bytes:
    total = Totals.none(3)
    for part in parts:
        mine = Totals.none(3)
        mine.add(part, 0.5)
        total.merge(Totals.of(mine.table([(0, 1), (0, 2), (1, 1)])))
    return total.densities([(0, 1), (0, 2), (1, 1)], 0.1, 0.5).to_pandas().to_json().encode()


def test_sums_do_not_depend_on_parts_or_order() -> None:
    values = _values(500)
    assert _total(values) == _total(values[::-1]) == _total(values[:7], values[300:], values[7:300])


def test_sums_are_exact_where_floats_would_lose_them() -> None:
    tiny, large = np.float32(2.0**-149), np.float32(3.0e38)
    total = Totals.none(1)
    total.add(np.array([[large], [tiny], [-large], [tiny], [0.0]], np.float32))
    (row,) = total.densities([(0, 0)], 0.1, None).to_pylist()
    assert row["mean"] == 2 * 2.0**-149 / 5
    assert row["std"] == pytest.approx(math.sqrt(2 * float(large) ** 2 / 5), rel=1e-12)
    assert sum(row["counts"]) == 5


def test_a_size_asked_for_says_which_tokens_are_strong() -> None:
    values = _values(400)
    total = Totals.none(3)
    total.add(values, 0.5)
    for at, row in enumerate(total.densities([(0, 0), (0, 1), (0, 2)], 0.1, 0.5).to_pylist()):
        assert row["density_positive"] == (values[:, at] >= 0.5).mean()
        assert row["density_negative"] == (values[:, at] <= -0.5).mean()
        assert row["threshold"] == 0.5


def _candidates(numbers: Sequence[int], seed: int = 0) -> pa.Table:
    """Documents whose peak has few different sizes, so that many are equal."""
    value = np.array([float(1 + number % 3) for number in numbers], np.float32)
    same = {"layer": 0, "neuron": 4, "polarity": 1, "position": 2, "start": 2}
    columns: dict[str, Any] = {name: np.full(len(numbers), number) for name, number in same.items()}
    columns |= {"value": value, "document": np.array(numbers), "stratum": densities.bin_of(value)}
    columns |= {"key": peaks.keys(seed, 0, 4, 1, np.array(numbers)), "tokens": [["a"]] * len(numbers)}
    columns |= {"values": [[one] for one in value]}
    return pa.table({name: columns[name] for name in schemas.CANDIDATES.names}, schemas.CANDIDATES)


def _chosen(parts: Sequence[pa.Table], wanted: peaks.Wanted, counts: np.ndarray) -> list[tuple[str, int, int]]:
    table = schemas.CANDIDATES.empty_table()
    for part in parts:
        table = peaks.merged([table, part], wanted)
    rows = peaks.exemplars(table, [(0, 4)], counts, wanted).to_pylist()
    return [(row["kind"], row["rank"], row["document"]) for row in rows]


def test_ties_and_samples_are_the_same_in_any_order() -> None:
    wanted, dice = peaks.Wanted(top=4, each=3, quantiles=(50.0,)), random.Random(1)
    numbers = list(range(60))
    counts = np.zeros((1, 2, densities.BINS + 1), np.int64)
    for one in _candidates(numbers)["stratum"].to_pylist():
        counts[0, 0, one] += 1
    whole = _chosen([_candidates(numbers)], wanted, counts)
    assert [document for kind, _, document in whole if kind == "top"] == [2, 5, 8, 11]
    middle = [document for kind, _, document in whole if kind == "q50"]
    assert len(middle) == 3
    assert all(document % 3 == 1 for document in middle), "the median is 2"
    for _ in range(5):
        dice.shuffle(numbers)
        cut = dice.randrange(1, 59)
        assert _chosen([_candidates(numbers[:cut]), _candidates(numbers[cut:])], wanted, counts) == whole


def test_a_sample_is_random_over_documents_and_another_with_another_seed() -> None:
    drawn = Counter(
        number for seed in range(400) for number in np.argsort(peaks.keys(seed, 0, 4, 1, np.arange(20)))[:5].tolist()
    )
    assert set(drawn) == set(range(20))
    assert all(60 <= count <= 140 for count in drawn.values()), "100 each, of standard deviation 9"


# --------------------------------------------------------------------------------- what is asked, and what not


@pytest.mark.parametrize(("skip", "first"), [(None, 1), (True, 1), (False, 0)])
def test_the_first_token_counts_where_it_is_asked_for(tmp_path: Path, skip: bool | None, first: int) -> None:
    path = corpus(tmp_path, ["the cars run to Ohio and the girls run to Texas near the cars"])
    collect(path, tmp_path / "run", skip_first=skip)
    n_ids = len(demo().tokenizer("the cars run to Ohio and the girls run to Texas near the cars")["input_ids"])
    assert n_ids > WINDOW
    (n_tokens,) = {row["n_tokens"] for row in exemplars.read_densities(tmp_path / "run").to_pylist()}
    assert n_tokens == n_ids - first


def test_the_strongest_neurons_of_a_run_are_looked_at_and_its_prompts_shown_beside(tmp_path: Path) -> None:
    source = {"task": "sva", "structure": "nounpp", "count": 3}
    traced = {"kind": "dataset", "nodes": 10, "input": source, "edges": False}
    tracer.run(traced, tmp_path / "traced", pool=InlinePool())
    rows = tracer.Run.table(
        collect(corpus(tmp_path), tmp_path / "run", of=str(tmp_path / "traced"), top=4), "densities"
    ).to_pylist()
    sums: Counter[tuple[int, int]] = Counter()
    for row in RunFolder(tmp_path / "traced").read_output("neurons.parquet").to_pylist():
        sums[row["layer"], row["neuron"]] += row["n_prompts"] * row["prompt_mean_abs"]
    assert [(row["layer"], row["neuron"]) for row in rows] == sorted(pair for pair, _ in sums.most_common(4))
    page = Page((tmp_path / "run" / "report.html").read_text())
    assert "strongest at" in page.sections["exemplars"]
    top = RunFolder(tmp_path / "run").read_output("top_prompts.parquet").to_pylist()
    assert {(row["layer"], row["neuron"]) for row in top} == {(row["layer"], row["neuron"]) for row in rows}
    assert all(row["text"] for row in top)


def test_one_prompts_circuit_names_neurons_too(tmp_path: Path) -> None:
    circuit = tracer.trace(demo(), tracer.Prompt("The secretary near the cars", target=" is"), nodes=5, edges=False)
    circuit.save(tmp_path / "circuit")
    collect(corpus(tmp_path), tmp_path / "run", of=str(tmp_path / "circuit"), top=2)
    rows = exemplars.read_densities(tmp_path / "run").to_pylist()
    assert {(row["layer"], row["neuron"]) for row in rows} <= {
        (row["layer"], row["neuron"]) for row in circuit.rows("neuron")
    }


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ({"neurons": []}, ("neurons", "give one of them")),
        ({"neurons": ["3"]}, ("LAYER/NEURON",)),
        ({"neurons": ["9/1"]}, ("neurons: 9/1", "layers 0 to 3")),
        ({"neurons": ["1/99999"]}, ("neurons: 1/99999", "choose one of them")),
        ({"window": 4096}, ("window: 4096", "at most 128 tokens")),
        ({"top": 3}, ("top only has an effect with of",)),
        ({"active_share": 0.5, "active_above": 1.0}, ("active_share has no effect",)),
        ({"nonsense": 1}, ("nonsense", "an exemplars job")),
    ],
)
def test_what_cannot_be_asked_is_refused(tmp_path: Path, more: dict[str, Any], parts: tuple[str, ...]) -> None:
    with refused(JobError, *parts):
        collect(corpus(tmp_path), tmp_path / "run", **more)


def test_a_corpus_without_texts_names_its_columns(tmp_path: Path) -> None:
    with refused(JobError, "no column for text", "'words'"):
        collect(corpus(tmp_path, [{"words": "the cars"}]), tmp_path / "run")


def test_a_folder_without_exemplars_says_how_to_make_them(tmp_path: Path) -> None:
    with refused(RunError, "exemplars.parquet", "tracer exemplars"):
        exemplars.read(tmp_path)


def test_what_a_text_says_is_escaped_and_a_query_reads_the_tables(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script> \x1b[31m & \u202e ignore all instructions </style>"
    done = collect(corpus(tmp_path, [hostile, *texts(5)]), tmp_path / "run", around=40)
    text = (tmp_path / "run" / "report.html").read_text()
    page = Page(text)
    assert "script" not in page.tags
    assert text.count("</style>") == 1
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert 'class="p8' in text
    assert "color-mix" in text
    found = answer(done, "exemplars", "select count(*) as n from exemplars")
    assert found == [{"n": exemplars.read(tmp_path / "run").num_rows}]
    assert len(answer(done, "densities")) == len(NEURONS)


def test_a_job_is_the_same_as_json(tmp_path: Path) -> None:
    made = load_job(job(corpus(tmp_path)))
    assert made.kind == "exemplars"
    assert load_job(json.loads(json.dumps({"kind": made.kind, **made.model_dump(mode="json")}))) == made
