"""Neurons of experts: values, gradients, ablations and memory, against plain PyTorch written here (or in
tracer/testing/plain.py, whose linearisation knows operations and no modules)."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

import tiny
import tracer
from helpers import refused
from mixtures import D_EXPERT, FAMILIES, N_EXPERTS, N_USED, mixture
from tracer import ModelError, RemoteError
from tracer.attribution.running import Running
from tracer.model import experts, interventions, passes
from tracer.ndif import probe
from tracer.ndif.server import Server
from tracer.prompts import Batch
from tracer.settings import RULES
from tracer.testing import plain as by_operations
from tracer.testing.case import Case
from tracer.testing.checks import gap
from tracer.testing.configs import configurations
from tracer.testing.family import check_family
from tracer.testing.models import random_model
from tracer.testing.plain import batch

ROWS = [[1, 7, 9, 20, 33, 12], [1, 8, 5]]
MORE = ("mixtral", "qwen2_moe", "olmoe", "glm4_moe", "deepseek_v2", "deepseek_v3", "llama4_text")
EVERY = [*FAMILIES, *(pytest.param(family, marks=pytest.mark.slow) for family in MORE)]


@cache
def case(family: str, attention: str = "eager") -> Case:
    """A tiny random model in tracer, and a plain copy of it."""
    config = configurations(family)[family]
    return Case(config, random_model(config, attention=attention), None, 0)


# ------------------------------------------------------------------------------------------------ values


def by_hand(model: tracer.Model, layer: int, row: list[int]) -> tuple[Tensor, Tensor]:
    """The neurons of a mixture at each token [token, neuron], 0 of experts that did not run, from the fused weights and
    what the router itself chose; and which experts these are [token, slot]."""
    mlp, seen = model.module.model.layers[layer].mlp, dict[str, Any]()
    router = mlp.router if hasattr(mlp, "router") else mlp.gate
    hooks = [
        mlp.register_forward_pre_hook(lambda _, args: seen.update(state=args[0][0])),
        router.register_forward_hook(lambda _, __, out: seen.update(expert=out[-1])),
    ]
    try:
        model.module(input_ids=torch.tensor([row]))
    finally:
        for hook in hooks:
            hook.remove()
    found = torch.zeros(len(row), N_EXPERTS * D_EXPERT)
    for token, chosen in enumerate(seen["expert"].tolist()):
        for expert in chosen:
            span = slice(expert * D_EXPERT, (expert + 1) * D_EXPERT)
            found[token, span] = neurons_of(mlp.experts, expert, seen["state"][token], model.family.name)
    return found, seen["expert"]


def neurons_of(held: Any, expert: int, state: Tensor, family: str) -> Tensor:
    if family == "qwen3_moe":
        gate, up = (held.gate_up_proj[expert] @ state).split(D_EXPERT)
        return torch.nn.functional.silu(gate) * up
    both = state @ held.gate_up_proj[expert] + held.gate_up_proj_bias[expert]
    gate, up = both[0::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_those_of_the_experts_that_ran_and_of_no_others(family: str) -> None:
    model = mixture(family)
    found = tracer.attribute(model, [tracer.Prompt(token_ids=row, target=11) for row in ROWS])
    layers = [layer for layer, one in enumerate(model.experts) if one is not None]
    assert len(layers) == (2 if family == "qwen3_moe" else 3)
    for layer in layers:
        for at, row in enumerate(ROWS):
            wanted, chosen = by_hand(model, layer, row)
            got = found.activations[at, layer, : len(row)]
            assert gap(got, wanted) < 1e-5
            ran = torch.zeros(len(row), N_EXPERTS, dtype=torch.bool).scatter(1, chosen, True)
            idle = ~ran.repeat_interleave(D_EXPERT, 1)
            assert int(idle.sum()) == len(row) * (N_EXPERTS - N_USED) * D_EXPERT
            assert not got[idle].any()
            assert not found.nodes[at, layer, : len(row)][idle].any()
            assert bool((got[~idle] != 0).all())
            assert bool((found.nodes[at, layer, len(row) - 1][~idle[-1]] != 0).all())
    routed = passes.routed(model, Batch(tuple(map(tuple, ROWS))))
    assert [sorted(one[1, -1].tolist()) for one in routed] == [
        sorted(by_hand(model, layer, ROWS[1])[1][-1].tolist()) for layer in layers
    ]


@pytest.mark.parametrize("family", EVERY)
def test_however_transformers_runs_experts_the_numbers_are_the_same(family: str) -> None:
    config = configurations(family)[family]
    wanted = case(family).relp
    for how in ("grouped_mm", "batched_mm"):
        module = random_model(config)
        if not module._can_set_experts_implementation():
            pytest.skip("its experts run in one way")
        module.set_experts_implementation(how)
        other = Case(config, module, None, 0)
        assert other.model.module.config._experts_implementation == how
        assert max(gap(other.relp.nodes, wanted.nodes), gap(other.relp.metric, wanted.metric)) < 1e-5
        found, known = other.edges("autograd", nodes=case(family).nodes), case(family).direct
        assert max(gap(found.weight, known.weight), gap(found.target_values, known.values)) < 1e-5
        found = other.edges("replay", nodes=case(family).nodes)
        assert gap(found.weight, known.weight) < 1e-5


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", EVERY)
def test_every_identity_holds(family: str, attention: str) -> None:
    """Gradients, conservation, edges by both engines and by interventions, padding, other company, bits in bfloat16."""
    if attention == "eager":
        check_family(configurations(family)[family], seed=1).require()
        return
    if not getattr(type(case(family).bare), "_supports_sdpa", False):
        pytest.skip("it has no sdpa kernel")
    found, wanted = case(family, "sdpa"), case(family)
    assert gap(found.relp.nodes, wanted.linearised.nodes) < 1e-5
    assert gap(found.edges("replay").weight, wanted.direct.weight) < 1e-5


# ------------------------------------------------------------------------------------------------ methods


def along_the_path(of: Case, row: int, steps: int) -> tuple[list[Tensor], list[Tensor]]:
    """Values and gradients of all neurons [layer, pos, neuron] with the embeddings at 0, 1/steps, ..., 1, in plain
    PyTorch: at each step the router chooses anew."""
    inputs = batch(of.rows[row : row + 1])
    entry = of.plain.run(inputs).embedding.detach()
    values, slopes = [], []
    for step in range(steps + 1):
        found = of.plain.run(inputs, entry=entry * (step / steps))
        (each, _) = found.gradients(found.logits[0, -1, of.targets[row]])
        widest = max(one.shape[-1] for one in each)
        padded = [torch.nn.functional.pad(one[0], (0, widest - one.shape[-1])) for one in each]
        values.append(torch.stack([torch.nn.functional.pad(v[0], (0, widest - v.shape[-1])) for v in found.values]))
        slopes.append(torch.stack(padded))
    return values, slopes


@pytest.mark.parametrize("family", ["gpt_oss", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_methods_of_a_path_are_plain_autograd_at_each_step(family: str) -> None:
    of, steps = case(family), 3
    values, slopes = along_the_path(of, 0, steps)
    wanted = {
        "ig": torch.stack(slopes[1:]).mean(0) * (values[-1] - values[0]),
        "conductance": sum(slopes[at] * (values[at] - values[at - 1]) for at in range(1, steps + 1)),
    }
    for method, nodes in wanted.items():
        got = tracer.attribute(of.model, of.prompts((0,)), method, steps=steps)
        ran = Running.of(of.model, [tuple(of.rows[0])]).mask(len(of.rows[0]))
        assert ran is not None
        there = torch.where(ran, nodes, 0)  # of experts that ran at an earlier step alone there are no nodes
        assert gap(got.nodes[0], there) < 1e-5, method


@pytest.mark.parametrize("family", ["qwen3_moe", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_exact_is_what_ablating_each_neuron_that_ran_alone_does(family: str) -> None:
    of = case(family)
    row = 2  # of two tokens
    got = of.attributed("exact", rows=(row,)).nodes[0]
    inputs, token = batch(of.rows[row : row + 1]), of.targets[row]
    whole = of.plain.run(inputs)
    values = [one[0].detach() for one in whole.values]
    scale = float(whole.logits[0, -1, token].detach().abs())
    for layer, value in enumerate(values):
        idle = value == 0
        assert not got[layer][:, : value.shape[-1]][idle].any()
    nodes = [(layer, *node) for layer, value in enumerate(values) for node in value.nonzero().tolist()]
    for layer, position, neuron in nodes[:: max(1, len(nodes) // 40)]:

        def put(at: int, value: Tensor, where: tuple[int, int, int] = (layer, position, neuron)) -> Tensor:
            value = value.clone()
            if at == where[0]:
                value[0, where[1], where[2]] = 0
            return value

        fall = float((whole.logits - of.plain.run(inputs, change=put).logits)[0, -1, token].detach())
        assert float(got[layer, position, neuron]) == pytest.approx(fall, rel=1e-3, abs=1e-5 * max(scale, 1))


class Partly(by_operations.Linearised):
    """The plain linearisation without one of its rules: the half rule is then only for what an activation gives."""

    def __init__(self, off: str, held: Any = None) -> None:
        super().__init__(held)
        self.off, self._gates = off, list[Tensor]()

    def times_constant(self, function: Any, z: Tensor) -> Tensor:
        out = function(z) if self.off == "activation" else super().times_constant(function, z)
        self._gates.append(out)
        return out

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, name = dict(kwargs or {}), getattr(function, "__name__", "")
        both = name in by_operations.PRODUCTS and all(isinstance(part, Tensor) for part in args[:2])
        gates = both and any(part is gate for part in args for gate in self._gates)
        attention = {"softmax", "topk", *by_operations.QUOTIENTS, *by_operations.MATRIX_PRODUCTS}
        as_it_is = {"norm": {"rsqrt"}, "attention": attention}.get(self.off, set())
        if name in as_it_is or (both and (self.off == "product" or not gates)):
            return function(*args, **given)
        return super().__torch_function__(function, types, args, given)


@pytest.mark.parametrize("off", sorted(RULES))
def test_each_rule_alone_can_be_off(off: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without rule 2 the router's weights carry gradient too."""
    of = case("qwen3_moe")
    got = tracer.attribute(of.model, of.prompts(), rules=RULES - {off})
    monkeypatch.setattr(by_operations, "Linearised", partial(Partly, off))
    wanted = of._numbers(linear=True)
    assert gap(got.nodes, wanted.nodes) < 1e-5
    assert gap(got.embeddings, wanted.embeddings) < 1e-5
    assert gap(got.nodes, of.relp.nodes) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_without_rules_a_routers_weights_carry_gradient(family: str) -> None:
    of = case(family)
    got = of.attributed("grad")
    assert gap(got.nodes, of.gradients.nodes) < 1e-5
    held = Case(of.config, random_model(of.config), None, 0)
    for block in held.bare.model.layers:  # the same with the router held, which must differ
        router = getattr(block.mlp, "router", getattr(block.mlp, "gate", None))
        if router is not None:
            router.register_forward_hook(lambda _, __, out: tuple(part.detach() for part in out))
    assert gap(held.gradients.nodes, got.nodes) > 1e-3


# ------------------------------------------------------------------------------------------------ ablation


def ablated(of: Case, row: list[int], keep: set[tuple[int, ...]], to: list[Tensor] | None) -> float:
    """The last logit of the target with all nodes but some replaced, by plain PyTorch: by 0, or by values [pos, neuron]
    of each layer."""

    def put(layer: int, value: Tensor) -> Tensor:
        new = torch.zeros_like(value) if to is None else to[layer][None].clone()
        for at, position, neuron in keep:
            if at == layer:
                new[0, position, neuron] = value[0, position, neuron]
        return new

    with torch.no_grad():
        return float(of.plain.run(batch([row]), change=put).logits[0, -1, of.targets[0]])


@pytest.mark.parametrize("ablation", ["zero", "mean", "counterfactual"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ablations_are_plain_hooks_on_experts(family: str, ablation: str) -> None:
    of = case(family)
    row, other = of.rows[0], [*of.rows[0][:-4], *reversed(of.rows[0][-4:])]
    third = [*reversed(of.rows[0])]
    values = [[one[0].detach() for one in of.plain.run(batch([ids])).values] for ids in (row, other, third)]
    to = {
        "zero": None,
        "counterfactual": values[1],
        "mean": [(one + two) / 2 for one, two in zip(*values[1:], strict=True)],
    }[ablation]
    target = int(of.targets[0])
    prompt = tracer.Prompt(token_ids=row, target=target, counterfactual=other if ablation == "counterfactual" else None)
    circuit = tracer.trace(of.model, prompt, 60, baseline="zero", edges=False)
    keep = {(one["layer"], one["position"], one["neuron"]) for one in circuit.rows("neuron")}
    reference = [tracer.Prompt(token_ids=ids, target=target) for ids in (other, third)]
    more: dict[str, Any] = {"reference": reference} if ablation == "mean" else {}
    found = tracer.evaluate(of.model, circuit, prompts=[prompt], ablation=ablation, sizes=[60], **more)
    with torch.no_grad():
        whole = float(of.plain.run(batch([row])).logits[0, -1, target])
    empty, part = (ablated(of, row, some, to) for some in (set[tuple[int, ...]](), keep))
    assert float(found.whole[0]) == pytest.approx(whole, rel=1e-4)
    assert float(found.empty[0]) == pytest.approx(empty, rel=1e-4, abs=1e-5)
    assert float(found.faithfulness.estimate[-1]) == pytest.approx((part - empty) / (whole - empty), rel=1e-3, abs=1e-4)


# ------------------------------------------------------------------------------------------------ memory


def held_by(score: Tensor, model: tracer.Model) -> int:
    """Bytes of everything that the graph behind a number keeps for its backward, but for parameters."""
    seen = {value.untyped_storage().data_ptr() for value in model.module.parameters()}
    size, done, left = 0, set[Any](), [score.grad_fn]
    while left:
        step = left.pop()
        if step is None or step in done:
            continue
        done.add(step)
        left += [before for before, _ in step.next_functions]
        kept = [getattr(step, name) for name in dir(step) if name.startswith("_saved_")]
        kept += [*getattr(step, "saved_tensors", ())]
        for value in [one for some in kept for one in (some if isinstance(some, list | tuple) else [some])]:
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in seen:
                seen.add(value.untyped_storage().data_ptr())
                size += value.untyped_storage().nbytes()
    return size


def refuse_numbers(*_: Any) -> Tensor:
    raise AssertionError("neurons of all experts side by side")


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_grows_with_the_experts_that_ran_and_not_with_all(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held = dict[int, int]()
    real = interventions.score
    for count in (4, 64):
        model = mixture(family, **{"num_local_experts" if family == "gpt_oss" else "num_experts": count})
        assert model.d_mlp == count * D_EXPERT

        def score(*args: Any, at: int = count, of: tracer.Model = model) -> Any:
            found = real(*args)
            held[at] = held_by(found[0], of)
            return found

        with monkeypatch.context() as patched:
            patched.setattr(interventions, "score", score)
            patched.setattr(experts, "numbered", refuse_numbers)
            tracer.trace(model, tracer.Prompt(token_ids=ROWS[0] * 4, target=11), 40)
    assert 10_000 < held[64] < 1.2 * held[4]


# ------------------------------------------------------------------------------------------------ what is refused


def offloaded(module: Any) -> Any:
    import accelerate

    accelerate.cpu_offload(module.model.layers[2].mlp.experts, execution_device="cpu")  # type: ignore[arg-type]
    return module


def of_bytes(module: Any) -> Any:
    held = module.model.layers[2].mlp.experts
    held.down_proj = torch.nn.Parameter(held.down_proj.to(torch.uint8), requires_grad=False)
    return module


def by_other_kernels(module: Any) -> Any:
    """As transformers' MXFP4 kernels are in the place of experts."""
    held = module.model.layers[2].mlp.experts
    held.__class__ = type("Mxfp4GptOssExperts", (type(held),), {})
    return module


UNREAD = {
    "offloaded": (offloaded, ("model.layers.2.mlp.experts.", "offloaded", "device_map")),
    "bytes": (of_bytes, ("model.layers.2.mlp.experts.down_proj", "is uint8", "bfloat16")),
    "other kernels": (by_other_kernels, ("model.layers.2.mlp.experts (Mxfp4GptOssExperts)", "no RelP rule covers it")),
}


@pytest.mark.parametrize("kind", sorted(UNREAD))
def test_experts_whose_weights_cannot_be_read_are_refused_when_they_are_loaded(kind: str) -> None:
    make, said = UNREAD[kind]
    module = make(random_model(configurations("gpt_oss")["gpt_oss"]))
    with refused(ModelError, *said):
        tracer.load(module, tokenizer=case("gpt_oss").tokenizer)


def test_experts_on_a_disk_are_refused(tmp_path: Path) -> None:
    module = mixture("qwen3_moe").module
    folder = tiny.save(module, tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{layer}": "cpu" for layer in range(2)}
    with refused(ModelError, "offload"):
        tracer.load(folder, device_map={**places, "model.layers.2": "disk"})


@pytest.mark.parametrize("shown", [(False, True), (True, False)])
def test_experts_whose_weights_a_server_hides_are_refused_when_it_is_probed(
    shown: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = torch.zeros(9), torch.zeros(9, tiny.VOCAB), 1.0, "torch.float32", (*shown, "")
    monkeypatch.setattr(passes, "probe", lambda *_: answer)
    server = Mock(spec=Server, host="example.org")
    with refused(RemoteError, "Qwen3MoeForCausalLM", "not readable on example.org", "without remote"):
        probe._Measured(mixture("qwen3_moe"), server)


# ------------------------------------------------------------------------------------------------ long prompts


@pytest.fixture
def tempered() -> Case:
    """Queries are scaled by their column from 4 tokens on, in layers without rotation, padding included."""
    options: dict[str, Any] = {"floor_scale": 4, "attn_temperature_tuning": True, "attn_scale": 2.0}
    config = configurations("llama4_text")["llama4_text"]
    config.update({**options, "no_rope_layers": [0, 0, 1], "attention_chunk_size": 32})
    return Case(config, random_model(config), None, 0)


def test_prompts_whose_queries_are_scaled_by_their_column_are_never_padded(tempered: Case) -> None:
    model = tempered.model
    rows = [[*range(5, 5 + length)] for length in (3, 2, 5, 7, 5)]
    assert [model.side(length) for length in (2, 3, 4, 5, 7)] == [0, 0, 1, 2, 4]
    prompts = [tracer.Prompt(token_ids=row, target=11) for row in rows]
    together = tracer.attribute(model, prompts)
    for at, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        alone = tracer.attribute(model, [prompt])
        assert gap(together.nodes[at, :, : len(row)], alone.nodes[0]) < 1e-5
        with torch.no_grad():
            logit = tempered.bare(torch.tensor([row])).logits[0, -1, 11]
        assert float(together.metric[at]) == pytest.approx(float(logit), rel=1e-4)
    with torch.no_grad():  # or it would show nothing
        padded = tempered.bare(**batch([rows[3], rows[2]])).logits[1, -1, 11]
    assert abs(float(padded) - float(together.metric[2])) > 1e-3
    with pytest.raises(ValueError, match="must not share"):
        passes.logits(model, Batch((tuple(rows[2]), tuple(rows[3]))))
    steered = tracer.steer(model, [(1, 1)], prompts[0], factor=0.0, max_new_tokens=6).steered
    assert steered is not None
    assert steered.text
