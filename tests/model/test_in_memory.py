"""A module in memory and torch's global state: the same numbers at every call, or one line that says why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrizations, prune
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import tiny as t
import tracer
from helpers import fresh, load, refused
from tracer import JobError, ModelError
from truth import close, same_bits

# torch.compile imports parts of torch that warn of others.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

PROMPT = tracer.Prompt(token_ids=(1, 20, 30, 40, 50), target=7, foil=8)
TESTS = [tracer.Prompt(token_ids=(1, first, 30, 40, 50), target=7, foil=8) for first in (21, 21)]

CALLS: dict[str, Callable[[tracer.Model, tracer.Circuit], Any]] = {
    "attribute": lambda model, circuit: tracer.attribute(model, [PROMPT]),
    "trace": lambda model, circuit: tracer.trace(model, PROMPT),
    "evaluate": lambda model, circuit: tracer.evaluate(model, circuit, TESTS, "zero"),
    "steer": lambda model, circuit: tracer.steer(model, circuit, PROMPT, factor=0, max_new_tokens=2),
    "minimality": lambda model, circuit: tracer.minimality(model, circuit, TESTS, "zero"),
    "estimate_quality": lambda model, circuit: tracer.estimate_quality(model, circuit, n_each=5),
}


def columns(circuit: tracer.Circuit) -> torch.Tensor:
    """Every attribution, of nodes and of edges."""
    assert circuit.links is not None
    both = (circuit.nodes["attribution"].to_pylist(), circuit.links["attribution"].to_pylist())
    return torch.tensor([value for part in both for value in part])


# ----------------------------------------------------------------------------------------- torch's global state


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Of matrix products; the numbers change where the processor knows bfloat16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
        assert torch.get_float32_matmul_precision() == name
    finally:
        torch.set_float32_matmul_precision(before)


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device": lambda: default_device("meta"),
    "device context": lambda: torch.device("meta"),
    "bfloat16 products": lambda: precision("medium"),
    "TF32 products": lambda: precision("high"),
}


@pytest.mark.parametrize("state", sorted(STATES))
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_torchs_global_state_changes_no_number(family: str, state: str, tmp_path: Path) -> None:
    model, folder = load(family), t.save(t.tiny(family), tmp_path)
    wanted = tracer.trace(model, PROMPT)
    steered = tracer.steer(model, wanted, PROMPT, factor=0, max_new_tokens=3)
    curves = tracer.evaluate(model, wanted, TESTS, "zero")
    path = tracer.attribute(model, [PROMPT], "ig").nodes
    with STATES[state]():
        before = torch.get_default_dtype(), torch.get_default_device(), torch.is_inference_mode_enabled()
        got = tracer.trace(model, PROMPT)
        assert tracer.steer(model, wanted, PROMPT, factor=0, max_new_tokens=3) == steered
        again = tracer.evaluate(model, wanted, TESTS, "zero")
        ig = tracer.attribute(model, [PROMPT], "ig").nodes
        loaded = tracer.load(folder, attention="eager", device="cpu")
        there = tracer.trace(loaded, PROMPT)
        assert (torch.get_default_dtype(), torch.get_default_device(), torch.is_inference_mode_enabled()) == before
    assert same_bits(columns(got), columns(wanted))
    assert close(columns(there), columns(wanted))
    assert loaded.fingerprint == model.fingerprint
    assert same_bits(again.inside, curves.inside)
    assert ig.dtype == path.dtype
    assert same_bits(ig, path)


def test_weights_made_under_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        module = t.tiny("llama")
    with refused(ModelError, "model.embed_tokens.weight", "inference_mode"):
        tracer.load(module, tokenizer=t.tokenizer())


def test_weights_that_require_a_gradient_again_change_no_number() -> None:
    wanted, model = tracer.trace(load("llama"), PROMPT), fresh("llama")
    model.module.requires_grad_(True)
    assert close(columns(tracer.trace(model, PROMPT)), columns(wanted))


# ----------------------------------------------------------------------------------- changed after it was loaded


class Doubled(nn.Module):
    """A linear map in another: its weight is readable, and is not what it computes."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    @property
    def weight(self) -> torch.Tensor:
        return self.inner.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(x)


def doubled(module: Any) -> None:
    module.model.layers[1].self_attn.v_proj = Doubled(module.model.layers[1].self_attn.v_proj).eval()


def own_forward(module: Any) -> None:
    module.model.layers[0].mlp.forward = lambda x: x


def hook(name: str) -> Callable[[Any], Any]:
    return lambda module: getattr(module.model.layers[1], name)(lambda *_: None)


def compiled_part(module: Any) -> None:
    module.model.layers[1].mlp.compile()


def compiled_layer(module: Any) -> None:
    module.model.layers[1] = torch.compile(module.model.layers[1])


CHANGES: dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
    "training": (lambda module: module.train(), ("LlamaForCausalLM", "training mode", ".eval()")),
    "a part in training": (lambda module: module.model.layers[2].mlp.train(), ("model.layers.2.mlp", "training mode")),
    "forward hook": (hook("register_forward_hook"), ("model.layers.1 ", "forward hook", "remove")),
    "forward pre-hook": (hook("register_forward_pre_hook"), ("model.layers.1 ", "forward pre-hook", "remove")),
    "backward hook": (hook("register_full_backward_hook"), ("model.layers.1 ", "backward hook", "remove")),
    "backward pre-hook": (hook("register_full_backward_pre_hook"), ("model.layers.1 ", "backward pre-hook", "remove")),
    "another part": (doubled, ("model.layers.1.self_attn.v_proj (Doubled)", "tracer.load")),
    "another forward": (own_forward, ("model.layers.0.mlp (LlamaMLP)", "tracer.load")),
    "compiled part": (compiled_part, ("model.layers.1.mlp", "compiled")),
    "compiled layer": (compiled_layer, ("model.layers.1 (OptimizedModule)", "wrapper", "_orig_mod")),
}


@pytest.mark.parametrize("call", sorted(CALLS))
def test_every_call_asks_what_the_module_is_now(call: str) -> None:
    model = fresh("llama")
    circuit = tracer.trace(model, PROMPT, nodes=20)
    CALLS[call](model, circuit)
    model.module.train()
    with refused(ModelError, "training mode"):
        CALLS[call](model, circuit)
    model.module.eval()
    handle = model.module.lm_head.register_forward_hook(lambda *_: None)
    with refused(ModelError, "lm_head", "forward hook"):
        CALLS[call](model, circuit)
    handle.remove()
    CALLS[call](model, circuit)


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_a_module_that_was_changed_after_loading_is_refused(change: str) -> None:
    model = fresh("llama")
    make, parts = CHANGES[change]
    make(model.module)
    with refused(ModelError, *parts):
        tracer.attribute(model, [PROMPT])


@pytest.mark.parametrize("change", sorted(set(CHANGES) - {"training", "a part in training"}))
def test_a_module_that_was_changed_before_loading_is_refused(change: str) -> None:
    module = t.tiny("llama")
    make, parts = CHANGES[change]
    make(module)
    with refused(ModelError, parts[0]):
        tracer.load(module, tokenizer=t.tokenizer())


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
def test_a_hook_on_every_module_is_refused(register: Callable[..., Any]) -> None:
    handle = register(lambda *_: None)
    try:
        with refused(ModelError, "on every module", "remove"):
            tracer.attribute(load("llama"), [PROMPT])
    finally:
        handle.remove()


@pytest.mark.parametrize("how", ["in place", "data", "replaced", "optimiser"])
def test_the_fingerprint_is_of_the_weights_as_they_are_now(how: str) -> None:
    model = fresh("llama")
    circuit = tracer.trace(model, PROMPT, nodes=20)
    weight = model.module.model.layers[1].mlp.up_proj.weight
    if how == "in place":
        weight.add_(0.1)
    elif how == "data":
        weight.data[3, 5] += 0.5
    elif how == "replaced":
        model.module.model.layers[1].mlp.up_proj.weight = nn.Parameter(weight + 0.1, requires_grad=False)
    else:
        weight.requires_grad_(True).grad = torch.ones_like(weight)
        torch.optim.SGD([weight], 0.1).step()
    again = tracer.trace(model, PROMPT, nodes=20)
    assert again.model.fingerprint == tracer.load(model.module, tokenizer=t.tokenizer()).fingerprint
    assert again.model.fingerprint != circuit.model.fingerprint
    for call in ("evaluate", "steer", "minimality"):
        with refused(JobError, "was traced on another model"):
            CALLS[call](model, circuit)
        CALLS[call](model, again)


# -------------------------------------------------------------------------------------------- what is no model


def parametrised(module: Any) -> Any:
    parametrizations.weight_norm(module.model.layers[0].mlp.up_proj)
    return module


def pruned(module: Any) -> Any:
    prune.l1_unstructured(module.model.layers[0].mlp.up_proj, "weight", amount=0.5)
    return module


def with_adapter(module: Any) -> Any:
    peft = pytest.importorskip("peft")
    try:
        module.add_adapter(peft.LoraConfig(target_modules=["v_proj"]))
    except ValueError as error:  # transformers 5.24 asks for a peft that is not out
        pytest.skip(str(error))
    return module


def around_adapter(module: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(module, peft.LoraConfig(target_modules=["v_proj"]))


def offloaded(module: Any) -> Any:
    import accelerate

    accelerate.cpu_offload(module, execution_device="cpu")  # type: ignore[arg-type]
    return module


def mixed(module: Any) -> Any:
    import accelerate

    return accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare_model(module)


def cast(module: Any) -> Any:
    from accelerate.hooks import LayerwiseCastingHook, add_hook_to_module

    add_hook_to_module(module.model.layers[0], LayerwiseCastingHook(torch.bfloat16, torch.float32, False))
    return module


KINDS: dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
    "compiled": (torch.compile, ("OptimizedModule", "_orig_mod")),
    "data parallel": (nn.DataParallel, ("DataParallel", "module.module")),
    "classifier": (
        lambda module: AutoModelForSequenceClassification.from_config(module.config),
        ("LlamaForSequenceClassification", "no lm_head", "AutoModelForCausalLM"),
    ),
    "backbone": (
        lambda module: AutoModel.from_config(module.config),
        ("LlamaModel", "no model.embed_tokens", "AutoModelForCausalLM"),
    ),
    "adapter": (around_adapter, ("PeftModel", "not merged", "merge_and_unload")),
    "adapter inside": (with_adapter, ("v_proj", "not merged", "merge_and_unload")),
    "parametrised": (parametrised, ("up_proj (ParametrizedLinear)", "one linear map")),
    "pruned": (pruned, ("up_proj", "forward pre-hook")),
    "offloaded": (offloaded, ("no weight in memory", "device_map")),
    "mixed precision": (mixed, ("forward of its own",)),
    "cast": (cast, ("LayerwiseCastingHook", "remove")),
}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_is_no_plain_language_model_is_refused_on_one_line(kind: str) -> None:
    make, parts = KINDS[kind]
    with refused(ModelError, *parts):
        tracer.load(make(t.tiny("llama")), tokenizer=t.tokenizer())


def test_a_module_without_memory_is_refused() -> None:
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(t.tiny("llama").config)
    with refused(ModelError, "no weight in memory"):
        tracer.load(module, tokenizer=t.tokenizer())


def recorded(module: Any) -> None:
    module(torch.tensor([[1, 2]]), output_hidden_states=True, output_attentions=True)


def placed(module: Any) -> None:
    import accelerate

    accelerate.dispatch_model(module, {"": "cpu"}, force_hooks=True)


def checkpointing(module: Any) -> None:
    module.gradient_checkpointing_enable()
    module.enable_input_require_grads()


@pytest.mark.parametrize("harmless", [recorded, placed, checkpointing])
def test_what_changes_no_number_is_allowed(harmless: Callable[[Any], None]) -> None:
    module = t.tiny("llama")
    harmless(module)
    model = tracer.load(module, tokenizer=t.tokenizer())
    assert close(columns(tracer.trace(model, PROMPT)), columns(tracer.trace(load("llama"), PROMPT)))


def test_hidden_states_may_be_asked_for_after_loading() -> None:
    model = fresh("llama")
    recorded(model.module)
    assert close(columns(tracer.trace(model, PROMPT)), columns(tracer.trace(load("llama"), PROMPT)))


def test_a_tokenizer_may_be_named(tmp_path: Path) -> None:
    t.save(t.tiny("llama"), tmp_path)
    for name in (tmp_path, str(tmp_path)):
        model = tracer.load(t.tiny("llama"), tokenizer=name)
        assert model.tokenizer.encode("The car") == t.tokenizer().encode("The car")
    with refused(ModelError, "nobody/nothing-here-at-all"):
        tracer.load(t.tiny("llama"), tokenizer="nobody/nothing-here-at-all")
    with refused(ModelError, "tokenizer=3", "is not a tokenizer"):
        tracer.load(t.tiny("llama"), tokenizer=3)
