"""The benchmark of what users call: it runs, its shares are whole, and it counts operations as one does by hand."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

import scripts

BENCHMARK = scripts.benchmark("trace")
PARTS = BENCHMARK.parts
CALLS = {"attribute", "trace, edges=False", "trace", "trace_all, edges=False", "trace_all"}


def _check(rows: list[dict[str, Any]]) -> None:
    """What must hold of the figures of a toy."""
    by_call = {row["call"]: row for row in rows}
    assert set(by_call) == CALLS | {BENCHMARK.BARE}
    for call in CALLS:
        assert sum(by_call[call]["shares"].values()) == pytest.approx(1)
        assert all(share >= 0 for share in by_call[call]["shares"].values())
    assert all(by_call["trace"]["shares"][part] > 0 for part in PARTS.PARTS)
    assert by_call["trace, edges=False"]["shares"]["edges"] == 0
    assert by_call["trace_all"]["gflop"] == pytest.approx(2 * by_call["trace"]["gflop"], rel=0.5)
    assert by_call["trace"]["rate"] > 0
    assert by_call["attribute"]["gflop"] is None


@pytest.mark.slow
@pytest.mark.long
def test_a_toy_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(BENCHMARK.Bench, "peak", lambda *_: None)  # a process each
    bench = BENCHMARK.Bench(BENCHMARK.parsed(["--toy", "--device", "cpu"]))
    _check(BENCHMARK.measure(bench)["rows"])
    assert len(capsys.readouterr().out.splitlines()) == 12
    assert BENCHMARK.tracer.trace.__module__ == "tracer.attribution.trace"


def _product(left: tuple[int, ...], right: tuple[int, ...], formula: str) -> Callable[[], object]:
    return lambda: torch.einsum(formula, torch.ones(left), torch.ones(right))


@pytest.mark.parametrize("inference", [False, True])
def test_operations_are_those_of_the_part_alone(monkeypatch: pytest.MonkeyPatch, inference: bool) -> None:
    """Edges call a pass, and the pass, as nnsight does, other edges in a thread of its own."""
    played = ModuleType("tracer.played")
    products = {
        "mixed": _product((8, 6, 7), (4, 7, 8, 5), "hqk,ekhd->eqhd"),
        "forward": _product((3, 4), (4, 5), "ij,jk->ik"),
        "inner": _product((2, 3), (3, 7), "ij,jk->ik"),
    }

    def inner() -> None:
        products["inner"]()

    def forward() -> None:
        products["forward"]()
        thread = threading.Thread(target=vars(played)["inner"])
        thread.start()
        thread.join()

    def edges() -> None:
        products["mixed"]()
        vars(played)["forward"]()
        torch.nn.functional.linear(torch.ones(2, 3, 4), torch.ones(5, 4), torch.ones(5))

    def call() -> None:
        vars(played)["edges"]()

    for function in (inner, forward, edges):
        function.__module__ = played.__name__
        setattr(played, function.__name__, function)
    monkeypatch.setitem(sys.modules, played.__name__, played)
    places = {
        "passes": ("tracer.played:forward",),
        "edges": ("tracer.played:inner", "tracer.played:edges", "tracer.absent"),
    }
    monkeypatch.setattr(PARTS, "PARTS", places)
    with torch.inference_mode(inference):
        found = PARTS.metered(call, operations=True)
    assert found.operations["passes"] == 2 * 3 * 4 * 5
    assert found.operations["edges"] == 2 * 4 * 8 * 6 * 7 * 5 + 2 * 2 * 3 * 7 + 2 * (2 * 3) * 4 * 5
    assert vars(played)["edges"] is edges


def test_plain_hooks_agree() -> None:
    common, peers = BENCHMARK.common, BENCHMARK.peers
    model = common.random_model(common.SHAPES["toy"])
    (prompt,) = common.random_prompts(model, 5, 1)
    ids = torch.tensor([prompt.token_ids])
    nodes = BENCHMARK.tracer.attribute(model, [prompt]).nodes
    peers.agree(nodes, peers.by_hooks(model.module, ids, common.TARGET, common.FOIL))
    neurons, logits, weight = peers.graph(model, prompt, 20)
    assert weight.shape == (20 + 2, 20 + 5)
    peers.agree(weight, peers.one_backward_each(model.module, ids, neurons, logits))
    with pytest.raises(AssertionError, match="disagree"):
        peers.agree(weight, 1.01 * weight)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the kernel's high-water mark")
def test_the_script_runs(tmp_path: Any) -> None:
    command = [sys.executable, str(scripts.FOLDER / "trace.py"), "--toy", "--device", "cpu", "--throughput"]
    written = tmp_path / "figures.json"
    subprocess.run([*command, "--json", str(written)], check=True, timeout=500)
    figures = json.loads(written.read_text())
    _check(figures["rows"])
    assert all(row["peak"] >= 0 for row in figures["rows"])
    assert figures["throughput"][0]["graphs_per_hour"] > 0
