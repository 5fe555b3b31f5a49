"""Neurons of experts acted on: by any of their names, against hooks, beside random ones that ran; others refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import tiny
import tracer
from helpers import refused
from mixtures import D_EXPERT, FAMILIES, N_EXPERTS, mixture
from tracer import JobError, Model, Prompt
from tracer.attribution.running import Running
from tracer.cli.app import app
from tracer.errors import TracerWarning
from tracer.evaluation.groups import controls, groups_of
from tracer.evaluation.steering import read_nodes
from tracer.evaluation.sweep import sweep
from tracer.prompts import encode

PROMPT = Prompt("the car near the keys", target=" are", foil=" is")
LAYER = 2


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Model:
    return mixture(request.param)


def ids(model: Model) -> Tensor:
    return torch.tensor([encode(PROMPT, model).token_ids])


def ran(model: Model, layer: int) -> list[set[int]]:
    """By hooks on the router: the experts at each position."""
    module, seen = model.module, list[Tensor]()
    router = module.model.layers[layer].mlp
    router = router.router if hasattr(router, "router") else router.gate
    hook = router.register_forward_hook(lambda _, __, out: seen.append(out[-1]))
    try:
        module(input_ids=ids(model))
    finally:
        hook.remove()
    return [set(row) for row in seen[0].tolist()]


def without(model: Model, layer: int, expert: int, inside: int, positions: list[int] | None = None) -> Tensor:
    """The next token's logits by hooks with one neuron of one expert at 0: its part is taken off the mixture's output,
    worked out from its own weights and the router's."""
    module = model.module
    mlp = module.model.layers[layer].mlp
    held, gpt = mlp.experts, model.family.name == "gpt_oss"
    router = mlp.router if gpt else mlp.gate
    told: dict[str, Any] = {}

    def routed(_: Any, __: Any, out: Any) -> None:
        told["weights"], told["experts"] = out[1], out[2]

    def entered(_: Any, given: Any) -> None:
        told["state"] = given[0][0]

    def changed(_: Any, __: Any, out: Any) -> Any:
        state = told["state"]
        if gpt:
            both = state @ held.gate_up_proj[expert] + held.gate_up_proj_bias[expert]
            gate, up = both[:, 2 * inside].clamp(max=7.0), both[:, 2 * inside + 1].clamp(-7.0, 7.0)
            value, down = gate * (1.702 * gate).sigmoid() * (up + 1), held.down_proj[expert][inside]
        else:
            both = state @ held.gate_up_proj[expert].T
            value = torch.nn.functional.silu(both[:, inside]) * both[:, D_EXPERT + inside]
            down = held.down_proj[expert][:, inside]
        weight = ((told["experts"] == expert) * told["weights"]).sum(-1)
        part = (weight * value)[:, None] * down
        if positions is not None:
            part = part * torch.isin(torch.arange(len(part)), torch.tensor(positions))[:, None]
        first = out[0] if isinstance(out, tuple) else out
        made = first - part.view_as(first)
        return (made, *out[1:]) if isinstance(out, tuple) else made

    hooks = [router.register_forward_hook(routed), mlp.register_forward_pre_hook(entered)]
    hooks.append(mlp.register_forward_hook(changed))
    try:
        return module(input_ids=ids(model)).logits[0, -1]
    finally:
        for hook in hooks:
            hook.remove()


def test_what_ran_is_what_the_router_says(model: Model) -> None:
    there = Running.of(model, [tuple(ids(model)[0].tolist())])
    for position, experts in enumerate(ran(model, LAYER)):
        wanted = [e * D_EXPERT + i for e in sorted(experts) for i in range(D_EXPERT)]
        assert there.numbers(LAYER, position).tolist() == wanted
        assert {n for n in range(N_EXPERTS * D_EXPERT) if there.has(LAYER, position, n)} == {*wanted}
    every = [there.numbers(LAYER, position) for position in range(ids(model).shape[1])]
    assert set(there.numbers(LAYER, None).tolist()) == set(torch.cat(every).tolist())
    mask = there.mask(len(ids(model)[0]))
    assert mask is not None
    assert int(mask.sum()) == model.n_nodes() * ids(model).shape[1]


def test_any_name_steers_the_same_neuron_as_hooks_do(model: Model) -> None:
    expert, inside = min(ran(model, LAYER)[-1]), 3
    number = expert * D_EXPERT + inside
    names: list[Any] = [
        (LAYER, number),
        f"{LAYER}:{number}",
        f"{LAYER}:{expert}:{inside}",
        f"L{LAYER} E{expert} N{inside}",
        (LAYER, f"E{expert} N{inside}"),
    ]
    wanted = without(model, LAYER, expert, inside).softmax(-1)
    before = model.module(input_ids=ids(model)).logits[0, -1].softmax(-1)
    for name in names:
        found = tracer.steer(model, [name], PROMPT, factor=0, max_new_tokens=0, random=0)
        for effect in found.effects:
            assert effect.probability.before == pytest.approx(float(before[effect.token_id]), rel=1e-4)
            assert effect.probability.after == pytest.approx(float(wanted[effect.token_id]), rel=1e-4)
    last = ids(model).shape[1] - 1
    wanted = without(model, LAYER, expert, inside, [last]).softmax(-1)
    placed = tracer.steer(model, [(LAYER, last, f"E{expert} N{inside}")], PROMPT, factor=0, max_new_tokens=0, random=2)
    for effect in placed.effects:
        assert effect.probability.after == pytest.approx(float(wanted[effect.token_id]), rel=1e-4)


def test_a_neuron_that_did_not_run_is_refused_where_it_is_named_and_left_out_of_a_circuit(model: Model) -> None:
    last = ids(model).shape[1] - 1
    experts = ran(model, LAYER)[last]
    idle = next(one for one in range(N_EXPERTS) if one not in experts)
    names = ", ".join(f"E{one}" for one in sorted(experts))
    with refused(JobError, f"L{LAYER} E{idle} N0 at position {last}", "did not run there", f"{names} did"):
        tracer.steer(model, [(LAYER, last, idle * D_EXPERT)], PROMPT, factor=0)
    circuit = tracer.trace(model, PROMPT, nodes=60)
    other = Prompt("What big men have of man in that", target=" are")
    rows = circuit.rows("neuron")
    there = Running.of(model, [encode(other, model).token_ids])
    length = len(encode(other, model).token_ids)
    assert length >= len(circuit.tokens)
    kept = [row for row in rows if there.has(row["layer"], row["position"], row["neuron"])]
    assert 0 < len(kept) < len(rows)
    with pytest.warns(TracerWarning, match=f"{len(rows) - len(kept)} of the {len(rows)} nodes are of experts"):
        found = tracer.steer(model, circuit, other, factor=0, max_new_tokens=0, random=0)
    assert found.n_nodes == len(kept)


@pytest.mark.parametrize(
    ("given", "rules"),
    [
        ("2:8:0", ("the layer has 8 experts", "use E0 to E7")),
        ("2:1:99", ("has 12 neurons", "use N0 to N11")),
        ((2, 96), ("neuron 96", "use 0 to 95")),
        ("2:x", ("LAYER:EXPERT:NEURON",)),
    ],
)
def test_a_neuron_that_there_is_not_is_refused(model: Model, given: Any, rules: tuple[str, ...]) -> None:
    with refused(JobError, *rules):
        tracer.steer(model, [given], PROMPT, factor=0)


def test_random_neurons_are_of_experts_that_ran(model: Model) -> None:
    there = Running.of(model, [tuple(ids(model)[0].tolist())])
    last, expert = ids(model).shape[1] - 1, min(ran(model, LAYER)[-1])
    (group,) = groups_of({"x": [(LAYER, last, expert * D_EXPERT), (LAYER, expert * D_EXPERT + 1)]})
    for one in controls(group, there, 20, 0):
        for layer, position, neuron in one.places:
            assert neuron in there.numbers(layer, position)
    found = sweep(model, {"x": [(LAYER, last, f"{expert}:0")]}, [PROMPT], factors=[0], random=3)
    wanted = without(model, LAYER, expert, 0, [last]).softmax(-1)
    for row in found.tokens.to_pylist():
        if row["draw"] == -1:
            assert row["probability_after"] == pytest.approx(float(wanted[row["token_id"]]), rel=1e-4)
        else:
            assert row["probability_after"] != row["probability_before"]


def test_a_file_may_name_the_expert(model: Model, tmp_path: Path) -> None:
    expert = min(ran(model, LAYER)[-1])
    flat, inside = tmp_path / "flat.csv", tmp_path / "inside.csv"
    flat.write_text(f"layer,neuron,expert\n{LAYER},{expert * D_EXPERT + 3},{expert}\n0,5,\n")
    inside.write_text(f"layer,neuron,expert\n{LAYER},3,{expert}\n0,5,\n")
    effects = [
        tracer.steer(model, read_nodes(path), PROMPT, factor=0, max_new_tokens=0, random=0).effects
        for path in (flat, inside)
    ]
    assert effects[0] == effects[1]
    inside.write_text(f"layer,neuron,expert\n{LAYER},{D_EXPERT * ((expert + 1) % N_EXPERTS) + 3},{expert}\n")
    if expert + 1 < N_EXPERTS:
        with refused(JobError, f"an expert of that layer has {D_EXPERT} neurons"):
            tracer.steer(model, read_nodes(inside), PROMPT, factor=0)


def test_an_evaluation_counts_and_shuffles_what_ran(model: Model) -> None:
    circuit = tracer.trace(model, PROMPT, nodes=60)
    found = tracer.evaluate(model, circuit, ablation="zero")
    assert found.n_total == circuit.n_total
    every = tracer.trace(model, PROMPT, nodes=circuit.n_total, edges=False)
    if every.n_nodes == circuit.n_total:  # all have an attribution
        whole = tracer.evaluate(model, every, ablation="zero", sizes=[every.n_nodes])
        assert float(whole.faithfulness.estimate[-1]) == pytest.approx(1, abs=1e-4)
        assert float(whole.control_faithfulness.estimate[-1]) == pytest.approx(1, abs=1e-4)


def test_the_command_line_steers_by_an_experts_name(tmp_path: Path) -> None:
    folder = str(tiny.save(mixture().module, tmp_path / "model"))
    common = [*("steer", "the car near the keys", "--target", " are", "--model", folder), "--factor", "0"]
    done = CliRunner().invoke(app, [*common, "--neuron", "2:0:3", "--max-new-tokens", "0"])
    assert done.exit_code == 0, done.output
    assert "on 1 neurons at every position" in done.output
    for words, rule in ((["--neuron", "2:9:0"], "has 8 experts"), (["--neuron", "0:1:3"], "layer 0 has no experts")):
        done = CliRunner().invoke(app, [*common, *words])
        assert (done.exit_code, rule in done.output) == (2, True), done.output
    done = CliRunner().invoke(app, ["neuron", "2", "3:4", "--model", folder, "--top", "3"])
    assert done.exit_code == 0, done.output
    assert "L2 E3 N4 +" in done.output
    words = ["trace", "the car near the keys", "--target", " are", "--model", folder, "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, [*words, "--exclude", "2:0:3", "--exclude", "L1 N7"])
    assert done.exit_code == 0, done.output
    left = tracer.Circuit.load(tmp_path / "run")
    assert left.selection["exclude"] == [[1, 7], [2, 3]]
    assert not any((row["layer"], row["neuron"]) in ((1, 7), (2, 3)) for row in left.rows("neuron"))
