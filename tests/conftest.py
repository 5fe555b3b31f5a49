"""Settings of every test process: offline, one thread, reproducible hypothesis; its tiers; and the loop-back server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ |= {"TRACER_FORMAT": "table", "COLUMNS": "140"}  # what a person sees on a wide terminal, unless a test asks
os.environ["TRACER_CONFIG"] = ""  # no defaults of whoever runs the tests
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile(
    "tracer",
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("tracer")


TIERS = {
    ".": "unit",
    "./test_benchmarks.py": "model",
    "./test_cases.py": "model",
    "./test_docstrings.py": "model",
    "./test_reference.py": "model",
    "attacks": "process",
    "attribution": "model",
    "attribution/test_pruning.py": "unit",
    "attribution/test_selection.py": "unit",
    "circuit": "model",
    "cli": "model",
    "cli/test_cli_runs.py": "process",
    "cli/test_options.py": "unit",
    "comparison": "model",
    "comparison/test_differences.py": "unit",
    "data": "unit",
    "data/test_tasks.py": "model",
    "demo": "model",
    "docs": "unit",
    "evaluation": "model",
    "evaluation/test_statistics.py": "unit",
    "examples": "model",
    "meaning": "model",
    "model": "model",
    "ndif": "server",
    "reports": "model",
    "reports/test_folded.py": "unit",
    "reports/test_viewer.py": "unit",
    "runs": "process",
    "runs/test_benchmark.py": "model",
    "runs/test_dataset_circuit.py": "model",
    "runs/test_expert_runs.py": "model",
    "runs/test_filter.py": "model",
    "runs/test_jobs.py": "unit",
    "runs/test_pages.py": "model",
    "runs/test_planner.py": "model",
    "runs/test_progress.py": "model",
    "runs/test_scheduling.py": "unit",
    "runs/test_shards.py": "model",
    "runs/test_yamlfile.py": "unit",
    "slow": "process",
    "store": "unit",
    "store/test_damage.py": "model",
    "store/test_folder.py": "process",
    "store/test_places.py": "process",
    "system": "unit",
    "testing": "model",
}
"""What the tests of a room, or of one of its files, need; a test may say otherwise of itself."""


UNLIKE = frozenset("apertus cohere falcon gemma4 granite nemotron qwen3_5_hybrid youtu".split())
"""Of the families after `tiny.MAIN`, those whose blocks hold something that no other's do: an activation with weights,
one norm for attention and MLP, scaled layers, multipliers, norms around 1, delta nets, latent attention."""
UNLIKE_BASES = frozenset({"residual", "attention"})
"""Bases whose nodes are no neurons, so that what an MLP is made of makes no difference to them."""
SWEEP = 5
"""On so many of the families after `tiny.MAIN` a test is tried on all; fewer were chosen for what they are."""
EACH = frozenset({"test_every_option_of_every_family_was_looked_at"})
DEAR = frozenset(
    (
        "test_a_batch_is_its_prompts_alone test_a_nudged_source_changes_its_target_by_the_weight "
        "test_each_rule_changes_the_attributions"
    ).split()
)
"""Tests of what each family has of its own; and those that take seconds where `tests/testing` shows the same sooner."""


def _tier(path: Path) -> str:
    file = path.relative_to(Path(__file__).parent)
    return TIERS.get(f"{file.parent}/{file.name}") or TIERS[str(file.parent)]


def _given(item: pytest.Item) -> dict[str, Any]:
    return getattr(getattr(item, "callspec", None), "params", {})


def _repeats(items: list[pytest.Item]) -> Iterator[pytest.Item]:
    """What shows on one more family what others show. A test that is tried on all families keeps everything on those of
    `tiny.MAIN`, but one family for each of `UNLIKE_BASES`, its first parameters on each of `UNLIKE`, and nothing on
    others, all of which tests/testing checks."""
    if not any("family" in _given(item) for item in items):
        return
    import tiny  # with transformers: where only units are run nothing asks for it

    later, seen = frozenset(tiny.FAMILIES) - frozenset(tiny.MAIN), set()
    swept: dict[str, list[pytest.Item]] = {}
    for item in items:
        if "family" in _given(item) and not item.get_closest_marker("slow"):
            swept.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for test, those in swept.items():
        name = test.rpartition("::")[2]
        if name in EACH or len({_given(item)["family"] for item in those} & later) < SWEEP:
            continue
        for item in those:
            family, others = _given(item)["family"], {**_given(item), "family": None, "attn": None}
            if family in later:
                kept = (test, family) if family in UNLIKE and name not in DEAR else None
            else:
                kept = (test, *map(str, others.values())) if others.get("basis") in UNLIKE_BASES else item.nodeid
            if kept is None or kept in seen:
                yield item
            seen.add(kept)


def pytest_configure(config: pytest.Config) -> None:
    """What a result is said of is no error of a test: random models say none of the targets that they are asked for."""
    config.addinivalue_line("filterwarnings", "ignore::tracer.errors.TracerWarning")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Where the units alone are run, what others import (nnsight, transformers, servers) is not."""
    units = config.option.markexpr.startswith("unit")
    return True if units and collection_path.name.startswith("test_") and _tier(collection_path) != "unit" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not any(item.get_closest_marker(tier) for tier in set(TIERS.values())):
            item.add_marker(_tier(item.path))
    for item in _repeats(items):
        item.add_marker("slow")
        item.add_marker("long")


@pytest.fixture(scope="session", autouse=True)
def machine() -> Iterator[None]:
    """This machine; or the one that `make shifted` asks for: see support/truth.py."""
    asked = {name: os.environ.get(f"TRACER_TEST_{name.upper()}") for name in ("shift", "threads")}
    if not any(asked.values()):
        yield
        return
    from truth import other_machine

    with other_machine(int(asked["shift"] or 0), int(asked["threads"] or 1)):
        yield


@pytest.fixture(autouse=True)
def _no_child_outlives_its_test() -> Iterator[None]:
    import children

    try:
        yield
    finally:
        children.end_all()


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A `loopback.Loopback`: imported here, since tracer is to be imported after its type checks are on."""
    import loopback

    yield from loopback.served(tmp_path_factory.mktemp("ndif"))


@pytest.fixture
def server(running: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The server, as it behaves by default."""
    monkeypatch.delenv("NDIF_API_KEY", raising=False)
    monkeypatch.setenv("NDIF_HOST", running.host)
    running.mode()
    return running
