"""The method in plain PyTorch, as examples/ has it: short, without tracer, and with tracer's numbers."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import tracer
from tracer import demo
from tracer.prompts import encode

SCRIPT = Path(__file__).parents[2] / "examples" / "relp_in_100_lines.py"
PROMPTS = (
    ("The secretaries near the car", " are", " is"),
    ("The key near the cabinets", " is", " are"),
    ("the capital of the state containing Dallas is", " Austin", " Boise"),
)


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def plain() -> Any:
    return AutoModelForCausalLM.from_pretrained(demo.path(), dtype=torch.float32)


def test_it_is_100_lines_of_torch_and_transformers() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100
    imported = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names])
    }
    assert imported == {"contextlib", "pathlib", "sys", "torch", "transformers"}


@pytest.mark.parametrize(("text", "target", "foil"), PROMPTS)
def test_its_attributions_are_those_of_attribute(
    script: dict[str, Any], plain: Any, text: str, target: str, foil: str
) -> None:
    model, prompt = tracer.load("demo", device="cpu"), tracer.Prompt(text, target=target, foil=foil)
    asked = encode(prompt, model)
    ids = torch.tensor([asked.token_ids])
    metric, nodes, embeddings = script["relp"](plain, ids, asked.target_ids[0], asked.foil_ids[0])
    found = tracer.attribute(model, [prompt], baseline="zero")
    near: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5 * float(found.nodes.abs().max())}
    torch.testing.assert_close(nodes, found.nodes[0], **near)
    torch.testing.assert_close(embeddings, found.embeddings[0], **near)
    torch.testing.assert_close(metric, found.metric[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(embeddings.sum(), metric, rtol=1e-4, atol=1e-4)


def test_what_its_neurons_keep_is_what_evaluate_measures(script: dict[str, Any], plain: Any) -> None:
    model = tracer.load("demo", device="cpu")
    prompt = tracer.Prompt(*PROMPTS[0])
    asked, sizes = encode(prompt, model), [1, 3, 10, 100]
    question = torch.tensor([asked.token_ids]), asked.target_ids[0], asked.foil_ids[0]
    metric, nodes, _ = script["relp"](plain, *question)
    order = nodes.flatten().abs().argsort(descending=True)
    empty = script["ablated"](plain, *question, torch.zeros_like(nodes))
    kept = []
    for size in sizes:
        keep = torch.zeros(nodes.numel()).index_fill(0, order[:size], 1).view_as(nodes)
        kept.append(float((script["ablated"](plain, *question, keep) - empty) / (metric - empty)))
    circuit = tracer.trace(model, prompt, nodes=100, edges=False)
    found = tracer.evaluate(model, circuit, ablation="zero", sizes=sizes)
    assert kept == pytest.approx(found.faithfulness.estimate.tolist(), abs=1e-4)


def test_a_model_that_is_no_plain_llama_is_not_attributed(script: dict[str, Any]) -> None:
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, hidden_act="gelu",
    )  # fmt: skip
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        script["relp"](LlamaForCausalLM(config).eval(), torch.tensor([[1, 2, 3]]), 4, 5)
