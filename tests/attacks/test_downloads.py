"""A run over a network that fails: everything comes, and is what comes without."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import pytest

import runs
import tracer
from inline import InlinePool
from loopback import Loopback
from proxy import Answer, between, cut, refuse
from tally import Attack

SHARE = 0.15
PROMPTS = 40


def job(**changes: Any) -> dict[str, Any]:
    source = {"task": "sva", "structure": "simple", "count": PROMPTS}
    made = {"kind": "dataset", "input": source, "shard_size": 20, "batch": 1, "nodes": 10, "edges": False}
    return made | {"remote": True, "in_flight": 4} | changes


class Failing:
    """Of all answers a share fails, in an order that a seed decides."""

    def __init__(self, kinds: dict[str, list[Any]], share: float) -> None:
        self.kinds, self.share, self.draw = kinds, share, random.Random(1)
        self.lock, self.count = threading.Lock(), 0

    def __call__(self, answer: Answer) -> None:
        with self.lock:
            failing, how = self.draw.random() < self.share, self.draw.random()
            ways = self.kinds.get(answer.kind, self.kinds[""])
            if not failing or not ways:
                return
            self.count += 1
        ways[int(how * len(ways))](answer)


def broken() -> list[Any]:
    """What a download can suffer."""

    def reset(answer: Answer) -> None:
        answer.raw = lambda connection: connection.close()

    ways = [refuse(503), refuse(429, retry_after="1"), refuse(500), refuse(404), reset]
    return [*ways, cut(0.0), cut(0.3), cut(0.95)]


@pytest.fixture(scope="module")
def undisturbed(running: Loopback, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without a proxy."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    running.mode()
    made = tracer.run(job(host=running.host), out, pool=InlinePool())
    assert made.status.statuses == {"ok": PROMPTS}
    return out


BY_HAND = [pytest.mark.slow, pytest.mark.long]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("what", ["503 of everything", pytest.param("broken downloads", marks=BY_HAND)])
def test_a_run_over_a_network_that_fails(
    server: Loopback, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: Attack, what: str
) -> None:
    with between(server.host) as proxy, attack("15 % proxy") as tally:
        monkeypatch.setenv("NDIF_HOST", proxy.host)
        every = what == "503 of everything"
        ways = {"": [refuse(503)]} if every else {"": [], "result": broken()}
        proxy.lie = failing = Failing(ways, SHARE if every else 3 * SHARE)
        try:
            statuses = tracer.run(job(), tmp_path / "run", pool=InlinePool()).status.statuses
        except tracer.TracerError as error:
            statuses, tally.worst = {}, str(error)
        except Exception as error:  # noqa: BLE001  that is what is counted
            statuses, tally.worst, tally.tracebacks = {}, repr(error), 1
        tally.tried, tally.lost = failing.count, PROMPTS - statuses.get("ok", 0)
    assert statuses == {"ok": PROMPTS}
    assert failing.count > 10
    runs.same(undisturbed, tmp_path / "run")
