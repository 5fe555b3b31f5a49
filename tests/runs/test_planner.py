"""The planner's arithmetic: exact sizes of models, counts of what is held, and plans that keep within a machine."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import tiny
import tracer
from helpers import refused
from tracer.batching import batches
from tracer.errors import JobError, ModelError
from tracer.model.sizes import Shape
from tracer.runs.jobs import load_job
from tracer.runs.plan import local
from tracer.runs.plan.memory import LIBRARIES, RUNTIME, Workload, _Case, predict
from tracer.runs.plan.planner import USED, Plan, check, on_one_gpu, plan, workloads
from tracer.runs.plan.table import plan_table
from tracer.runs.worker import limit_malloc_retention
from tracer.settings import BASELINES, BASES, METHODS

GIB = 2**30
LARGE = Shape(
    name="llama-8b",
    family="llama",
    n_layers=32,
    d_model=4096,
    d_mlp=14336,
    numbered=14336,
    routed=0,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
    context_length=131072,
    itemsize=2,
    weight_bytes=16_060_522_496,
    block_bytes=436_224_000,
    outer_bytes=2_101_354_496,
    checkpoint_bytes=0,
    attention="sdpa",
    gated=True,
    saved_by_activation=1,
    norms=2,
    norm_itemsize=4,
    qk_norms=False,
    soft_cap=False,
    window=None,
    fused_values=False,
    replays=True,
)


def loaded(family: str, **over: Any) -> tracer.Model:
    return tracer.load(tiny.tiny(family, **over), tokenizer=tiny.tokenizer())  # type: ignore[arg-type]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_shape_of_a_folder_is_that_of_the_loaded_model(family: str, tmp_path: object) -> None:
    folder = str(tiny.save(tiny.tiny(family), str(tmp_path)))
    known, model = Shape.of(folder), tracer.load(folder)
    assert dataclasses.replace(Shape.of_model(model), name=folder) == known
    assert known.weight_bytes == sum(value.nbytes for value in model.module.parameters())
    for gradient in (True, False):
        for length in (1, 30, 1000):
            assert known.bytes_per_token(gradient, length) == model.bytes_per_token(gradient, length)


def test_dtypes_count_by_their_bits_and_a_conversion_holds_the_checkpoint_too(tmp_path: object) -> None:
    folder = str(tiny.save(tiny.tiny("llama"), str(tmp_path)))
    full, half = Shape.of(folder), Shape.of(folder, dtype="bfloat16")
    four, eight = Shape.of(folder, dtype="nf4"), Shape.of(folder, dtype="int8")
    assert (full.checkpoint_bytes, half.checkpoint_bytes) == (0, full.weight_bytes)
    assert 2 * half.weight_bytes == full.weight_bytes
    inside = full.weight_bytes - full.outer_bytes
    assert four.weight_bytes - four.outer_bytes == pytest.approx(inside / 8, rel=0.05)
    assert eight.weight_bytes - eight.outer_bytes == pytest.approx(inside / 4, rel=0.05)
    assert not four.replays
    assert predict(half, Workload(), 8).loading == full.weight_bytes


@pytest.mark.parametrize(
    ("name", "options", "rule"),
    [
        ("./nowhere", {}, "does not exist"),
        ("demo", {"dtype": "float31"}, "must be one of"),
        ("demo", {"attention": "flash"}, "attention='flash'"),
    ],
)
def test_a_model_that_cannot_be_is_refused(name: str, options: dict[str, str], rule: str) -> None:
    with pytest.raises(ModelError, match=rule):
        Shape.of(name, **options)


def test_an_architecture_without_rules_is_refused_by_its_name(tmp_path: object) -> None:
    with open(f"{tmp_path}/config.json", "w") as out:
        out.write('{"model_type": "bert"}')
    with pytest.raises(ModelError, match="bert"):
        Shape.of(str(tmp_path))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "mistral",
        "qwen3",
        "gemma2",
        "phi3",
        "gpt_neox",
        "gpt2",
        "arcee",
        "apertus",
        "stablelm",
        "cohere",
        "phi",
    ],
)
def test_what_a_backward_saves_is_counted_tensor_by_tensor(family: str, attention: str) -> None:
    if family == "gemma2" and attention == "sdpa":
        pytest.skip("gemma2 has no sdpa")
    few, many = (_saved_by_autograd(family, attention, n_layers) for n_layers in (2, 4))
    model = loaded(family, attn=attention)
    grad = Workload(method="grad", nodes=10, edges=False, metric="logit")
    counted = _Case(Shape.of_model(model), grad, length=40, batch=2).saved() * 80 * 2
    product = model.d_mlp * 4 * 80 * 2  # the neurons are held by the trace, not saved by autograd
    assert many - few == pytest.approx(counted - product, rel=0.12)


def _saved_by_autograd(family: str, attention: str, n_layers: int) -> int:
    """Bytes of the distinct tensors, weights apart, that a plain forward keeps for its backward."""
    module = tiny.tiny(family, attn=attention, n_layers=n_layers)
    own = {value.untyped_storage().data_ptr() for value in module.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        if value.untyped_storage().data_ptr() not in own and value.numel() > 80:
            kept[value.untyped_storage().data_ptr()] = value
        return value

    ids = torch.randint(4, 100, (2, 40), generator=torch.Generator().manual_seed(0))
    embedded = module.get_input_embeddings()(ids).detach().requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        module(inputs_embeds=embedded, use_cache=False, logits_to_keep=1)
    return sum(value.untyped_storage().nbytes() for value in kept.values())


@given(
    method=st.sampled_from(METHODS),
    basis=st.sampled_from(BASES),
    baseline=st.sampled_from(BASELINES),
    edges=st.booleans(),
    length=st.integers(1, 4096),
    batch=st.integers(1, 64),
    attention=st.sampled_from(["eager", "sdpa"]),
    cuda=st.booleans(),
)
def test_more_never_takes_less(
    method: str, basis: str, baseline: str, edges: bool, length: int, batch: int, attention: str, cuda: bool
) -> None:
    def peak(length: int = length, batch: int = batch, attention: str = attention, **over: Any) -> int:
        settings = {"method": method, "basis": basis, "baseline": baseline, "edges": edges, "attention": attention}
        work, gpu = Workload(**settings | over), 80 * GIB if cuda else None  # type: ignore[arg-type]
        found = predict(LARGE, work, length, batch, padded=True, gpu=gpu)
        assert found.peak <= found.host + found.device <= 2 * found.peak
        assert found.host >= RUNTIME
        assert found.device == 0 or cuda
        return found.peak

    here = peak()
    assert here <= peak(batch=batch + 1)
    if method != "exact":  # its rows fill a budget, so that longer prompts mean fewer
        assert here <= peak(length=length + 1)
    assert peak(edges=False) <= here <= peak(edges=True, nodes=5000)
    assert peak(attention="sdpa") <= peak(attention="eager") * 1.5


def test_predict_refuses_what_cannot_be() -> None:
    for wrong in ({"method": "magic"}, {"attention": "flash"}, {"positions": 0}, {"top_k": 0}, {"batch": 0}):
        with pytest.raises(JobError, match=next(iter(wrong))):
            Workload(**wrong)  # type: ignore[arg-type]
    for length, batch, named in ((0, 1, "length"), (8, 0, "batch")):
        with pytest.raises(JobError, match=named):
            predict(LARGE, Workload(), length, batch)


def test_what_a_job_asks_for_more_is_counted() -> None:
    def parts(length: int = 64, batch: int = 8, **over: Any) -> Any:
        return predict(LARGE, Workload(edges=False, **over), length, batch)

    plain = parts()
    every = 4 * LARGE.n_layers * LARGE.d_mlp * 64 * 8
    assert parts(whole=True).selection - plain.selection >= every
    assert parts(circuits=False).results >= 4 * every
    assert parts(metric="logprob").peak > plain.peak, "the head in float32, a piece at a time"
    wide = dataclasses.replace(LARGE, vocab_size=2**26)  # logits are held in pieces, however many there are
    assert predict(wide, Workload(), 64, 8).attribution - parts().attribution < 2 * GIB
    assert predict(LARGE, Workload(rules=frozenset({"norm"})), 64).edges > predict(LARGE, Workload(), 64).edges


def test_steady_can_be_had_where_there_is_glibc() -> None:
    assert limit_malloc_retention() in (True, False)


def text(made: Plan) -> str:
    console = Console(file=io.StringIO(), width=110)
    console.print(plan_table(made))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_small_model_fits_many_workers() -> None:
    made = plan(Shape.of("demo"), Workload(), [8, 8, 30], host=8 * GIB, cpus=4)
    assert made.fits
    assert made.workers == 4
    assert [row.length for row in made.rows] == [8, 16, 30]
    assert made.median == 8
    assert all((row.batch.host - LIBRARIES) * made.workers + LIBRARIES <= USED * made.host for row in made.rows)
    check(made)
    assert "workers on this machine: 4" in text(made)
    assert 0 < made.disk < GIB


@pytest.mark.slow
@pytest.mark.long
@settings(max_examples=20)
@given(
    lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=20),
    host=st.integers(1, 600),
    device=st.one_of(st.none(), st.integers(8, 140)),
    n_devices=st.integers(1, 8),
    method=st.sampled_from(["relp", "ig", "exact", "delta"]),
)
def test_every_batch_of_a_plan_keeps_within_the_machine(
    lengths: list[int], host: int, device: int | None, n_devices: int, method: str
) -> None:
    wanted = Workload(method=method, edges=method == "relp")
    gpus = {"device": device * GIB, "n_devices": n_devices} if device else {}
    made = plan(LARGE, wanted, lengths, host=host * GIB, cpus=3, **gpus)  # type: ignore[arg-type]
    if not made.fits:
        assert made.advice
        if made.tight:
            check(made)
            assert made.workers == 1
            return
        with pytest.raises(ModelError, match=r"does not fit into 80%"):
            check(made)
        return
    assert made.workers >= 1
    assert made.workers * made.gpus_per_worker <= (n_devices if device else 0)
    for row in made.rows:
        assert (row.batch.host - LIBRARIES) * made.workers + LIBRARIES <= USED * made.host + 1
        if made.device:
            assert on_one_gpu(LARGE, row.batch, made.gpus_per_worker) <= USED * made.device
        split = batches([row.length] * 5000, LARGE.bytes_per_token(length=row.length), made.memory)
        assert max(map(len, split)) <= row.prompts


def test_what_does_not_fit_is_refused_with_what_to_change() -> None:
    made = plan(LARGE, Workload(nodes=1000), [2000], host=200 * GIB, device=12 * GIB, n_devices=1)
    assert not made.fits
    with pytest.raises(ModelError, match=re.escape("2000 tokens")) as caught:
        check(made)
    assert "device_map='auto'" in caught.value.next_step
    assert "does not fit" not in text(made)
    two = plan(LARGE, Workload(nodes=1000), [32], host=200 * GIB, device=16 * GIB, n_devices=4)
    assert (two.fits, two.gpus_per_worker, two.workers) == (True, 2, 2)
    assert "device_map='auto'" in " ".join(two.advice)


def test_long_prompts_are_told_how_long_they_may_be() -> None:
    made = plan(dataclasses.replace(LARGE, itemsize=4, weight_bytes=2 * LARGE.weight_bytes), Workload(), [10**5],
                host=64 * GIB)  # fmt: skip
    said = " ".join(made.advice)
    assert "bfloat16" in said
    assert re.search(r"prompts of up to \d+ tokens fit", said)


@pytest.mark.parametrize(
    ("over", "named"),
    [
        ({"lengths": []}, "lengths"),
        ({"lengths": [0]}, "length 0"),
        ({"host": 0}, "host=0"),
        ({"n_devices": 2}, "n_devices=2"),
        ({"device": GIB}, "n_devices=0"),
    ],
)
def test_a_plan_refuses_what_cannot_be(over: dict[str, Any], named: str) -> None:
    settings = {"lengths": [8], "host": GIB, **over}
    with pytest.raises(JobError, match=named):
        plan(LARGE, Workload(), settings.pop("lengths"), **settings)  # type: ignore[arg-type]


def test_jobs_say_what_they_demand(tmp_path: object) -> None:
    file = f"{tmp_path}/job.yaml"
    with open(file, "w") as out:
        out.write("kind: dataset\ninput: {task: capitals, count: 4}\nmethod: ig\nmass: 0.5\nbatch: 3\n")
    (one,) = workloads(load_job(file))
    assert (one.method, one.nodes, one.mass, one.edges, one.batch) == ("ig", None, True, True, 3)
    made = plan(Shape.of("demo"), one, [10], host=8 * GIB)
    assert {row.prompts for row in made.rows} == {3}
    assert made.memory == plan(Shape.of("demo"), dataclasses.replace(one, batch=None), [10], host=8 * GIB).memory
    assert "set nodes" in " ".join(made.advice)
    several = workloads(load_job("jobs/sva.yaml"))
    assert {"relp", "random"} <= {one.method for one in several}
    assert not any(one.circuits for one in several)
    assert len(set(several)) == len(several)
    assert plan(Shape.of("demo"), several, [10], host=8 * GIB).fits


def test_a_plan_can_be_had_in_python() -> None:
    job = {"kind": "dataset", "input": {"task": "sva", "structure": "simple", "count": 5}, "nodes": 20}
    made = tracer.plan(job, set=["nodes=30"], workers=1)
    assert (made.fits, made.workers, made.workloads[0].nodes) == (True, 1, 30)
    with refused(JobError, "unknown", "kind"):
        tracer.plan({"kind": "unknown"})


def rows(path: Any, count: int) -> str:
    with open(path, "w") as out:
        for number in range(count):
            out.write(json.dumps({"token_ids": [4 + (number + i) % 90 for i in range(4 + number % 5)]}) + "\n")
    return str(path)


def test_prompts_are_counted_as_far_as_that_is_cheap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "COUNTED", 100)
    monkeypatch.setattr(local, "SAMPLE", 20)
    few, many = rows(tmp_path / "few.jsonl", 120), rows(tmp_path / "many.jsonl", 121)
    for path, limit, prompts, said in [
        (few, None, 120, "prompts: 120, about 6 tokens each"),
        (few, 30, 30, "prompts: 30,"),
        (many, None, None, "how many prompts there are is not known; disk and time are for 1,000"),
        (many, 120, 120, "prompts: 120,"),
        (many, 500, 500, "prompts: up to 500,"),
    ]:
        bound = {} if limit is None else {"limit": limit}
        made = tracer.plan({"kind": "dataset", "input": {"path": path}, **bound})
        assert made.prompts == prompts
        assert said in text(made)


def test_disk_is_of_all_prompts_and_of_what_the_circuit_of_the_dataset_needs(tmp_path: Path) -> None:
    job = {"kind": "dataset", "input": {"path": rows(tmp_path / "p.jsonl", 100)}, "shard_size": 10}
    all_, some = tracer.plan(job), tracer.plan(job | {"limit": 50})
    assert all_.disk == pytest.approx(2 * some.disk, abs=1)
    shape = all_.shape
    assert tracer.plan(job | {"circuit": "free"}).disk - all_.disk == 8 * shape.n_layers * shape.d_mlp * 10
    aligned = tracer.plan(job | {"circuit": "aligned"}).disk - all_.disk
    assert aligned == 8 * shape.n_layers * shape.d_mlp * 10 * sum(range(4, 9)), "every length is in every shard"
    assert tracer.plan("jobs/sva.yaml").disk == 0


def test_time_and_disk_of_a_job_follow_from_prompts_that_are_traced(tmp_path: Path) -> None:
    job = {"kind": "dataset", "input": {"path": rows(tmp_path / "p.jsonl", 40)}, "shard_size": 8, "nodes": 10}
    plain = tracer.plan(job, workers=2)
    assert (plain.measured, plain.seconds) == (None, None)
    assert "time: measure=True traces some of the prompts here" in text(plain)
    made = tracer.plan(job, workers=2, measure=True)
    one = made.measured
    assert one is not None
    assert (one.prompts, one.tokens) == (8, 48), "as many as a shard has, of all lengths"
    assert made.seconds == pytest.approx(one.seconds * 240 / 48 / 2)
    assert made.disk == one.disk * 5
    assert re.search(r"time: about \d+ s with 2 workers", text(made))
    assert made.advice == plain.advice


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    job = {"kind": "dataset", "input": {"path": rows(tmp_path / "p.jsonl", 4)}}
    with refused(JobError, "measure=True", "fewer pairs"):
        tracer.plan("jobs/sva.yaml", measure=True)
    with refused(JobError, "measure=True", "server"):
        tracer.plan(job | {"remote": True}, measure=True)
    (tmp_path / "bad.jsonl").write_text('{"token_ids": [5, 99999]}\n')
    with refused(JobError, "1 of the prompts", "none has a circuit"):
        tracer.plan({"kind": "dataset", "input": {"path": str(tmp_path / "bad.jsonl")}}, measure=True)


def test_what_messages_name_is_public() -> None:
    for name in ("Limits", "always_on", "plan"):
        assert name in tracer.__all__
        assert getattr(tracer, name).__name__ == name
