"""Settings of every test process: offline, one thread, reproducible hypothesis; and the loop-back server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
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


@pytest.fixture(scope="module")
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
