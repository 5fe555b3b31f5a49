"""What tracer asks of an NDIF server, asked with plain nnsight of a real one. Run by `make test-ndif`."""

from __future__ import annotations

from tracer import demo  # isort: skip  brings beartype, which must come before nnsight puts .save on every object

import json
import os
import time
from collections.abc import Callable
from typing import Any

import nnsight
import pytest
import torch
from nnsight import TransformersModel
from nnsight.intervention.backends.remote import RemoteBackend, RemoteError
from transformers import AutoModelForCausalLM, AutoTokenizer

from truth import close

pytestmark = [
    pytest.mark.ndif,
    pytest.mark.skipif("NDIF_HOST" not in os.environ, reason="no NDIF_HOST: run make test-ndif"),
]
KEY = 'nnsight.modeling.transformers.TransformersModel:{"repo_id": "demo", "revision": null, "task": "text-generation"}'
PROMPT = "The secretaries near the car"
straight = lambda value, linear: value.detach() + (linear - linear.detach())  # noqa: E731


@pytest.fixture(scope="module")
def model() -> TransformersModel:
    module: Any = AutoModelForCausalLM.from_pretrained(demo.path(), dtype=torch.float32)
    module.eval().requires_grad_(False)
    return TransformersModel(module, task="text-generation", tokenizer=AutoTokenizer.from_pretrained(demo.path()))


@pytest.fixture(scope="module")
def ids(model: TransformersModel) -> torch.Tensor:
    return model.tokenizer(PROMPT, return_tensors="pt")["input_ids"]


def remote(key: str = "NDIF_API_KEY", **options: Any) -> RemoteBackend:
    return RemoteBackend(KEY, host=os.environ["NDIF_HOST"], api_key=os.environ[key], **options)


def both(run: Callable[[Any], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return run(None), run(remote())


def test_status_and_environment() -> None:
    status = nnsight.status(raw=True)["deployments"]
    (entry,) = [entry for entry in status.values() if entry.get("repo_id") == "demo"]
    assert (entry["model_key"], entry["application_state"], entry["dtype"]) == (KEY, "RUNNING", "float32")
    assert "tracer" not in nnsight.compare().remote["packages"]
    torch_there = nnsight.compare().packages["torch"]["remote"]
    assert torch_there.split("+")[0] == torch.__version__.split("+")[0]


def test_forward(model: TransformersModel, ids: torch.Tensor) -> None:
    def run(backend: Any) -> torch.Tensor:
        with model.trace(ids, backend=backend):
            logits = nnsight.save(model.lm_head.output[:, -1])
        return logits

    local, far = both(run)
    assert close(far, local)


def test_gradient(model: TransformersModel, ids: torch.Tensor) -> None:
    def run(backend: Any) -> torch.Tensor:
        with model.trace(ids, backend=backend):
            start = model.model.embed_tokens.output.requires_grad_(True)
            neurons = model.model.layers[1].mlp.down_proj.input
            logits = model.lm_head.output[0, -1]
            (slope,) = torch.autograd.grad(logits[3] - logits[4], neurons)
            product = nnsight.save(neurons.detach() * slope + 0 * start.sum().detach())
        return product

    local, far = both(run)
    torch.testing.assert_close(far, local, rtol=1e-6, atol=1e-9)
    assert float(local.abs().max()) > 0


def test_rules_from_the_clients_own_functions(model: TransformersModel, ids: torch.Tensor) -> None:
    def run(backend: Any) -> torch.Tensor:
        with model.trace(ids, backend=backend):
            start = model.model.embed_tokens.output.requires_grad_(True)
            for layer in model.model.layers:
                gate = layer.mlp.gate_proj.output
                layer.mlp.act_fn.output = straight(layer.mlp.act_fn.output, gate * torch.sigmoid(gate).detach())
            logits = model.lm_head.output[0, -1]
            (slope,) = torch.autograd.grad(logits[3], start)
            slope = nnsight.save(slope)
        return slope

    local, far = both(run)
    torch.testing.assert_close(far, local, rtol=1e-6, atol=1e-9)


def test_intervention(model: TransformersModel, ids: torch.Tensor) -> None:
    def run(backend: Any) -> torch.Tensor:
        with model.trace(ids, backend=backend):
            down = model.model.layers[2].mlp.down_proj
            value = down.input.clone()
            value[:, -1, :50] = 0
            down.input = value
            logits = nnsight.save(model.lm_head.output[:, -1])
        return logits

    local, far = both(run)
    assert close(far, local)
    with model.trace(ids):
        untouched = nnsight.save(model.lm_head.output[:, -1])
    assert not torch.equal(far, untouched)


def test_generation_under_intervention(model: TransformersModel, ids: torch.Tensor) -> None:
    def run(backend: Any) -> torch.Tensor:
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        with model.generate(ids, backend=backend, **options) as tracer:
            kept = nnsight.save([])
            for _ in tracer.iter[:6]:
                value = model.model.layers[2].mlp.down_proj.input.clone()
                value[:, -1, :200] *= 3
                model.model.layers[2].mlp.down_proj.input = value
                kept.append(model.lm_head.output[:, -1])
        return torch.cat(kept)

    local, far = both(run)
    assert close(far, local)
    assert local.shape[0] == 6


def test_non_blocking(model: TransformersModel, ids: torch.Tensor) -> None:
    backend = remote(blocking=False)
    with model.trace(ids, backend=backend):
        logits = nnsight.save(model.lm_head.output[:, -1])  # noqa: F841
    until, result = time.monotonic() + 60, None
    while result is None and time.monotonic() < until:
        result = backend.poll()
        time.sleep(0.1)
    assert result is not None
    with model.trace(ids):
        local = nnsight.save(model.lm_head.output[:, -1])
    assert close(result["logits"], local)


def test_a_result_above_8_mib_comes_by_the_object_store(model: TransformersModel, ids: torch.Tensor) -> None:
    with model.trace(ids, backend=remote()):
        logits = model.lm_head.output
        large = nnsight.save(logits.sum() + torch.arange(6_000_000, dtype=torch.float32))
    assert large.numel() * 4 > 20 * 2**20
    assert float(large[1] - large[0]) == pytest.approx(1, abs=0.1)


def test_an_error_in_the_body_names_itself(model: TransformersModel, ids: torch.Tensor) -> None:
    with pytest.raises(RemoteError, match=r"shape|size"), model.trace(ids, backend=remote()):
        wrong = model.lm_head.output @ torch.ones(3)
        nnsight.save(wrong)


def test_sandboxed_keys_run_forwards_only(model: TransformersModel, ids: torch.Tensor) -> None:
    """The public service may run a key so: what fails there is what the probe of tracer must find."""
    with model.trace(ids, backend=remote("NDIF_SANDBOXED_KEY")):
        logits = nnsight.save(model.lm_head.output[:, -1])
        weight = model.lm_head.weight
        place = nnsight.save(str(weight.device))
    with model.trace(ids):
        local = nnsight.save(model.lm_head.output[:, -1])
    torch.testing.assert_close(logits, local)
    assert place == "meta"
    # Torch multiplies a real matrix by a hidden one without a word, into a CPU tensor of whatever the memory held:
    # only the weight's own device tells, never the result's.
    with model.trace(ids, backend=remote("NDIF_SANDBOXED_KEY")):
        garbage = nnsight.save(model.lm_head.input[0, -1:] @ model.lm_head.weight.T)
    assert garbage.device.type == "cpu"
    assert not torch.allclose(garbage, local, rtol=0.1, atol=0.1)
    with pytest.raises(RemoteError), model.trace(ids, backend=remote("NDIF_SANDBOXED_KEY")):
        start = model.model.embed_tokens.output.requires_grad_(True)
        (slope,) = torch.autograd.grad(model.lm_head.output[0, -1, 3], start)
        nnsight.save(slope)


def test_the_key_is_in_no_answer() -> None:
    assert os.environ["NDIF_API_KEY"] not in json.dumps(nnsight.status(raw=True))
