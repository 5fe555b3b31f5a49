"""The tests of test_remote.py and test_remote_evaluation.py that need nothing but a server, against a real NDIF one.

What a server does wrong (busy, lying, dying) only the loop-back server can be told to do.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("test_remote")
import httpx
import test_remote
import torch
from test_remote import (  # noqa: F401  collected here, with the fixtures below
    METHODS,
    test_a_batch_of_circuits_is_one_request,
    test_a_circuit_of_here_is_used_in_a_sandbox_where_the_weights_are_here,
    test_a_hidden_weight_never_becomes_a_number,
    test_a_model_without_weights_holds_none,
    test_a_prompt_without_target_asks_for_the_top_token_alone,
    test_a_sandbox_gives_the_same_numbers_where_the_weights_are_here,
    test_a_sandbox_is_detected_and_refused_by_permission,
    test_commands_run_remotely,
    test_doctor_remote,
    test_edges_are_the_local_ones,
    test_edges_of_a_batch_are_those_of_each_prompt,
    test_evaluation_is_the_local_one,
    test_forward_only_work_needs_no_permission,
    test_metrics_bases_and_baselines_are_the_local_ones,
    test_nodes_are_selected_there_by_the_same_rules,
    test_only_what_a_circuit_says_comes_back,
    test_steering_is_the_local_one,
    test_the_package_is_not_on_the_server,
    test_what_we_use_besides_torch_is_not_on_the_server,
)
from test_remote_evaluation import (  # noqa: F401
    test_a_sandboxed_key_is_enough,
    test_an_evaluation_is_one_small_request,
    test_every_ablation_measures_what_it_does_here,
    test_swapped_states_are_the_local_ones,
)

import tiny as t
import tracer
from helpers import refused
from inline import InlinePool
from loopback import FAMILIES, LIMITS, Loopback
from tracer.errors import RemoteError
from tracer.model import passes
from tracer.ndif import probe as remote
from tracer.ndif import server as ndif
from tracer.prompts import Batch
from truth import close

pytestmark = [
    pytest.mark.ndif,
    pytest.mark.skipif("NDIF_HOST" not in os.environ, reason="no NDIF_HOST: run make test-ndif"),
]
KEYS = {name: os.environ.get(name, "") for name in ("NDIF_API_KEY", "NDIF_SANDBOXED_KEY")}
PATIENT = ndif.Limits(wait=300.0, patience=30.0)
"""A sandboxed request starts a process of its own, some seconds on two cores."""


class Real(Loopback):
    """A server that does what it does: only the key can be chosen."""

    def mode(self, **how: Any) -> None:
        if how not in ({}, {"sandboxed": True}):
            pytest.skip("only the loop-back server can be told to")
        os.environ["NDIF_API_KEY"] = KEYS["NDIF_SANDBOXED_KEY" if how else "NDIF_API_KEY"]

    def seen(self) -> dict[str, int]:
        pytest.skip("only the loop-back server tells")

    def load(self, name: str = "demo", limits: ndif.Limits = LIMITS, **options: Any) -> tracer.Model:
        return super().load(name, PATIENT if limits == LIMITS else limits, **options)


@pytest.fixture(scope="module")
def running() -> Iterator[Real]:
    host = os.environ["NDIF_HOST"]
    served = [one.get("repo_id", "") for one in httpx.get(f"{host}/status", timeout=60).json()["deployments"].values()]
    folders = {Path(one).name: one for one in served if Path(one).name in FAMILIES}
    if missing := {"demo", *FAMILIES} - {*folders, *served}:
        pytest.skip(f"the server does not serve {', '.join(sorted(missing))}: run make test-ndif")
    yield Real(host, None, folders)  # type: ignore[arg-type]
    os.environ["NDIF_API_KEY"] = KEYS["NDIF_API_KEY"]


@pytest.fixture
def server(running: Real, monkeypatch: pytest.MonkeyPatch) -> Real:
    monkeypatch.setenv("NDIF_API_KEY", KEYS["NDIF_API_KEY"])
    running.mode()
    return running


@pytest.mark.parametrize("method", [method for method in METHODS if method != "exact"])
@pytest.mark.parametrize("name", ["demo", *FAMILIES])
def test_attributions_are_the_local_ones(server: Real, name: str, method: str) -> None:
    test_remote.test_attributions_are_the_local_ones(server, name, method)


@pytest.mark.parametrize("name", ["demo", *FAMILIES])
def test_exact_effects_are_the_local_ones(server: Real, name: str) -> None:
    """To the rounding of a logit, of which they are differences: the server has another build of torch, and nnsight
    0.8.0 there runs its own attention kernel whatever is asked for."""
    there, here = server.pair(name)
    asked = [tracer.Prompt(token_ids=[1, 44], target=7, foil=8)]
    got, wanted = (tracer.attribute(model, asked, "exact").nodes for model in (there, here))
    step = torch.finfo(torch.float32).eps * float(passes.logits(here, Batch(((1, 44),))).abs().max())
    assert float((got - wanted).abs().max()) < 16 * step


def test_a_model_that_is_not_deployed(server: Real, tmp_path: Path) -> None:
    t.save(t.tiny("llama"), tmp_path / "other")
    with refused(RemoteError, "is not deployed", "demo"):
        server.load(str(tmp_path / "other"))


def test_the_probe_says_what_a_request_weighs(server: Real) -> None:
    _, probe = remote.connect(remote.skeleton("demo"), ndif.Server(server.host))
    assert 1000 < probe.request < 10**6
    assert probe.there["nnsight"].rpartition(".")[0] == probe.here["nnsight"].rpartition(".")[0]


def test_a_run_of_many_prompts_is_the_local_one(server: Real, tmp_path: Path) -> None:
    """48 prompts in 12 requests, 4 of them at the server at a time."""
    asked = {"input": {"task": "sva", "structure": "simple", "count": 48}, "shard_size": 16, "batch": 4}
    here = tracer.run(test_remote.job(**asked), tmp_path / "here", pool=InlinePool())
    there = tracer.run(test_remote.job(**asked, remote=True, in_flight=4), tmp_path / "there", pool=InlinePool())
    assert there.status.statuses == {"ok": 48}
    nodes = [run.table("nodes").to_pandas() for run in (there, here)]
    keys = ["prompt_id", "kind", "layer", "position", "neuron"]
    got, wanted = (one.sort_values(keys).reset_index(drop=True) for one in nodes)
    assert (got[keys] == wanted[keys]).to_numpy().all()
    assert close(*(torch.tensor(one["attribution"].to_numpy()) for one in (got, wanted)))


def test_an_interactive_wait_is_short(server: Real) -> None:
    """A trace of a warm server is a matter of a second: polling must not add more."""
    there, _ = server.pair("demo")
    prompt = tracer.Prompt("The secretaries near the car", target=" are", foil=" is")
    tracer.trace(there, prompt, 20, edges=False)
    started = time.monotonic()
    tracer.trace(there, prompt, 20, edges=False)
    assert time.monotonic() - started < 10
