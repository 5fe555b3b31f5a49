"""Edges against the plain-PyTorch oracle, against interventions, and against the identities they must obey."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import reference
import tiny
import tracer
from tracer.attribution.edges import Edges, direct_edges
from tracer.attribution.selection import select
from tracer.errors import JobError, ModelError
from tracer.model.model import Model
from tracer.settings import LINEAR_GATE, RULES

IDS = (1, 6, 7, 8, 9, 10, 11)
LOGITS = torch.tensor([[6, 20], [6, 30], [4, 22]])
CASES = [
    (family, attn) for family in tiny.FAMILIES for attn in ("eager", "sdpa") if family in tiny.SDPA or attn == "eager"
]


GATED = tuple(family for family in tiny.FAMILIES if family not in tiny.UNGATED)


def loaded(family: str, attn: str = "eager", **over: Any) -> Model:
    return tracer.load(tiny.tiny(family, attn=attn, **over), tokenizer=tiny.tokenizer(101))


def some_nodes(model: Model, basis: str = "activation", count: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    sizes = (model.n_layers, len(IDS), model.n_neurons(basis))
    nodes = torch.stack([torch.randint(0, size, (count,), generator=generator) for size in sizes], -1).unique(dim=0)
    return nodes[torch.randperm(len(nodes), generator=generator)]


def gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def by_oracle(model: Model, nodes: Tensor, basis: str, rules: frozenset[str] = RULES) -> reference.Edges:
    targets = [tuple(node) for node in nodes.tolist()] + [(model.n_layers, *pair) for pair in LOGITS.tolist()]
    return reference.edges(model.module, torch.tensor([IDS]), targets, basis=basis, rules=rules)


@pytest.mark.parametrize("basis", ["activation", "output"])
@pytest.mark.parametrize(("family", "attn"), CASES)
def test_both_engines_equal_the_oracle(family: str, attn: str, basis: str) -> None:
    model = loaded(family, attn)
    nodes = some_nodes(model, basis)
    expected = by_oracle(model, nodes, basis)
    weight = torch.cat([expected.neurons[:, *nodes.unbind(-1)], expected.embeddings], 1)
    for engine in ("replay", "autograd"):
        found = direct_edges(model, IDS, nodes, LOGITS, basis=basis, engine=engine)
        assert gap(found.weight, weight) < 1e-5, engine
        assert gap(found.target_values, expected.values) < 1e-5


@pytest.mark.parametrize("basis", ["activation", "output"])
@pytest.mark.parametrize(("family", "attn"), [case for case in CASES if case[0] in GATED])
def test_both_engines_equal_the_oracle_with_a_linear_gate(family: str, attn: str, basis: str) -> None:
    model = loaded(family, attn)
    nodes = some_nodes(model, basis)
    expected = by_oracle(model, nodes, basis, LINEAR_GATE)
    weight = torch.cat([expected.neurons[:, *nodes.unbind(-1)], expected.embeddings], 1)
    for engine in ("replay", "autograd"):
        found = direct_edges(model, IDS, nodes, LOGITS, basis=basis, engine=engine, rules=LINEAR_GATE)
        assert gap(found.weight, weight) < 1e-5, engine
        assert gap(found.target_values, expected.values) < 1e-5
        if family in tiny.BIAS_FREE:
            assert gap(found.incoming, found.target_values) < 1e-4, engine
    assert gap(direct_edges(model, IDS, nodes, LOGITS, basis=basis).weight, weight) > 0.01


@pytest.mark.parametrize("family", [family for family in tiny.FAMILIES if family not in GATED])
def test_a_linear_gate_is_refused_where_there_is_no_gate(family: str) -> None:
    with pytest.raises(JobError, match=f"has no effect on a {family} model"):
        direct_edges(loaded(family), IDS, some_nodes(loaded(family)), LOGITS, rules=LINEAR_GATE)


@pytest.mark.parametrize("parallel", [True, False])
def test_sequential_and_parallel_residuals(parallel: bool) -> None:
    model = loaded("gpt_neox", use_parallel_residual=parallel)
    nodes = some_nodes(model)
    replayed = direct_edges(model, IDS, nodes, LOGITS, engine="replay")
    truth = direct_edges(model, IDS, nodes, LOGITS, engine="autograd")
    assert gap(replayed.weight, truth.weight) < 1e-5
    assert gap(replayed.incoming, truth.incoming) < 1e-5


@pytest.mark.parametrize("family", tiny.BIAS_FREE)
def test_incoming_weights_add_up_to_the_target(family: str) -> None:
    model = loaded(family)
    found = direct_edges(model, IDS, some_nodes(model), LOGITS, engine="replay")
    assert gap(found.incoming, found.target_values) < 1e-4


@pytest.mark.parametrize("family", [family for family in tiny.FAMILIES if family not in tiny.BIAS_FREE])
def test_biases_leave_a_remainder_in_the_sum(family: str) -> None:
    found = direct_edges(loaded(family), IDS, some_nodes(loaded(family)), LOGITS)
    assert gap(found.incoming, found.target_values) > 1e-3


def test_incoming_is_the_sum_over_every_source_of_the_model() -> None:
    model = loaded("llama", n_layers=2)
    every = torch.cartesian_prod(torch.arange(2), torch.arange(len(IDS)), torch.arange(model.d_mlp))
    found = direct_edges(model, IDS, every, LOGITS)
    assert gap(found.weight.sum(-1), found.incoming) < 1e-5


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_nudged_source_changes_its_target_by_the_weight(family: str) -> None:
    """Truth by intervention: everything between is held at its value, in plain forward arithmetic."""
    model = loaded(family)
    nodes = some_nodes(model)
    found = direct_edges(model, IDS, nodes, LOGITS)
    strongest = found.weight.abs().flatten().topk(12).indices
    places = [tuple(node) for node in nodes.tolist()]
    sources = places + [(-1, pos) for pos in range(len(IDS))]
    targets = places + [(model.n_layers, *pair) for pair in LOGITS.tolist()]
    for index in strongest.tolist():
        target, source = divmod(index, len(sources))
        for epsilon in (1.0, -0.5):
            change = reference.nudge(model.module, torch.tensor([IDS]), sources[source], targets[target], epsilon)
            assert change == pytest.approx(epsilon * float(found.weight[target, source]), rel=2e-3, abs=1e-5)


def test_nudges_on_the_demo_model() -> None:
    model = tracer.load("demo", attention="eager")
    circuit = tracer.trace(model, tracer.Prompt("The keys near the cabinet", target=" are", foil=" is"), nodes=60)
    ids = torch.tensor([circuit.token_ids])
    rows = circuit.edges.slice(0, 20).to_pylist()
    assert len(rows) == 20

    def place(row: dict[str, int | str], end: str) -> tuple[int, ...]:
        if row[f"{end}_kind"] == "embedding":
            return -1, int(row[f"{end}_position"])
        return tuple(int(row[f"{end}_{name}"]) for name in ("layer", "position", "neuron"))

    for row in rows:
        change = reference.nudge(model.module, ids, place(row, "source"), place(row, "target"), 0.1)
        assert change == pytest.approx(0.1 * row["weight"], rel=1e-2, abs=1e-5)


@pytest.mark.parametrize("way", ["replay", "autograd"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma3"])
def test_nothing_flows_backwards_in_layers_or_positions(family: str, way: str) -> None:
    model = loaded(family)
    nodes = some_nodes(model)
    options: dict[str, Any] = {"engine": way}
    weight = direct_edges(model, IDS, nodes, LOGITS, **options).weight
    layer = torch.cat([nodes[:, 0], torch.full((len(LOGITS),), model.n_layers)])
    position = torch.cat([nodes[:, 1], LOGITS[:, 0]])
    source_layer = torch.cat([nodes[:, 0], torch.full((len(IDS),), -1)])
    source_position = torch.cat([nodes[:, 1], torch.arange(len(IDS))])
    forbidden = (source_layer[None] >= layer[:, None]) | (source_position[None] > position[:, None])
    assert forbidden.any()
    assert (weight[forbidden] == 0).all()


@pytest.mark.parametrize("max_bytes", [1, 20_000, 10**9])
def test_the_workspace_changes_no_edge(max_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded("llama")
    nodes = some_nodes(model)
    wanted = direct_edges(model, IDS, nodes, LOGITS).weight
    monkeypatch.setattr("tracer.attribution.edges.workspace", lambda model, by_replay: max_bytes)
    assert torch.equal(direct_edges(model, IDS, nodes, LOGITS, engine="replay").weight, wanted)


def test_order_of_nodes_is_kept_and_none_is_allowed() -> None:
    model = loaded("llama")
    nodes = some_nodes(model)
    forwards = direct_edges(model, IDS, nodes, LOGITS).weight
    backwards = direct_edges(model, IDS, nodes.flip(0), LOGITS).weight
    size = len(nodes)
    assert gap(backwards[:size, :size].flip(0, 1), forwards[:size, :size]) < 1e-6
    alone: Edges = direct_edges(model, IDS, nodes[:0], LOGITS)
    assert alone.weight.shape == (3, len(IDS))
    assert direct_edges(model, IDS, nodes, LOGITS[:0]).weight.shape == (size, size + len(IDS))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_edges_of_a_prompt_do_not_depend_on_what_was_traced_before(family: str) -> None:
    model = loaded(family)
    nodes = some_nodes(model)
    first = direct_edges(model, IDS, nodes, LOGITS).weight
    direct_edges(model, tuple(reversed(IDS)), nodes, LOGITS)
    assert torch.equal(direct_edges(model, IDS, nodes, LOGITS).weight, first)


def test_rules_switched_off_go_through_autograd_and_change_the_edges() -> None:
    model = loaded("llama")
    nodes = some_nodes(model)
    without = direct_edges(model, IDS, nodes, LOGITS, rules=frozenset({"norm", "attention", "activation"}))
    assert gap(without.weight, direct_edges(model, IDS, nodes, LOGITS).weight) > 0.1
    with pytest.raises(ModelError, match="all four rules"):
        direct_edges(model, IDS, nodes, LOGITS, rules=frozenset(), engine="replay")


def test_the_pattern_is_the_models_own_in_every_kernel() -> None:
    """Gemma 2's soft-capped, sliding pattern, and sdpa's, against what eager attention returns."""
    from tracer.attribution import backward
    from tracer.prompts import Batch

    for family, attn in (("gemma2", "eager"), ("mistral", "sdpa"), ("gpt2", "sdpa")):
        model = loaded(family, attn)
        frozen = backward.constants(model, Batch((IDS,)), torch.zeros(0, 3, dtype=torch.long))
        eager = tiny.tiny(family, attn="eager")
        expected = eager(input_ids=torch.tensor([IDS]), output_attentions=True).attentions
        for block, weights in zip(frozen.blocks, expected, strict=True):
            assert gap(block.pattern, weights[0]) < 1e-5


def test_bfloat16_edges_are_close_to_float32() -> None:
    nodes = some_nodes(loaded("llama"))
    exact = direct_edges(loaded("llama"), IDS, nodes, LOGITS).weight
    half = direct_edges(loaded("llama", dtype=torch.bfloat16), IDS, nodes, LOGITS).weight
    assert torch.nn.functional.cosine_similarity(exact.flatten(), half.flatten(), dim=0) > 0.98


@pytest.mark.parametrize(
    ("nodes", "logits", "options"),
    [
        ([[9, 0, 0]], [[6, 20]], {}),
        ([[0, 99, 0]], [[6, 20]], {}),
        ([[0, 0, 99999]], [[6, 20]], {}),
        ([[-1, 0, 0]], [[6, 20]], {}),
        ([[0, 0, 0]], [[6, 99999]], {}),
        ([[0, 0, 0]], [[-1, 20]], {}),
        ([[0, 0, 0]], [[6, 20]], {"engine": "bogus"}),
        ([[0, 0, 0]], [[6, 20]], {"basis": "bogus"}),
        ([[0, 0, 40]], [[6, 20]], {"basis": "output"}),
    ],
)
def test_what_lies_outside_the_model_is_refused(
    nodes: list[list[int]], logits: list[list[int]], options: dict[str, Any]
) -> None:
    with pytest.raises(JobError):
        direct_edges(loaded("llama"), IDS, torch.tensor(nodes), torch.tensor(logits), **options)


def test_biases_are_reported_target_by_target() -> None:
    """Without biases nothing remains; with them the remainder is what the shares of all sources leave."""
    prompt = tracer.Prompt(token_ids=list(IDS), target=20)
    for family, biased in (("llama", False), ("gpt2", True)):
        circuit = tracer.trace(loaded(family), prompt, nodes=10**6, pruning=tracer.Pruning(share=0.0))
        found = [row["bias_share"] for row in circuit.rows("logit")]
        assert all((abs(one) > 1e-2) == biased for one in found)
        incoming = sum(row["share"] for row in circuit.edges.to_pylist() if row["target_kind"] == "logit")
        assert 1 - incoming == pytest.approx(found[0], abs=1e-3)


def test_several_prompts_give_the_edges_each_gives_alone() -> None:
    """Edges are taken prompt by prompt; what was attributed in one batch leads to the same ones."""
    model = loaded("llama")
    prompts = [tracer.Prompt(token_ids=ids, target=20, foil=30) for ids in (list(IDS), [1, 8, 9])]
    together = tracer.attribute(model, prompts)
    for i, prompt in enumerate(prompts):
        alone = tracer.trace(model, prompt, nodes=30)
        kept = select(together.nodes[i], float(together.metric[i]), nodes=30)
        ids = together.token_ids[i]
        logits = torch.tensor([[len(ids) - 1, 20], [len(ids) - 1, 30]])
        found = direct_edges(model, ids, kept, logits).weight
        assert alone.links is not None
        rows = {(row["source"], row["target"]): row["weight"] for row in alone.links.to_pylist()}
        neurons = len(kept)
        for (source, target), weight in rows.items():
            line = target if target < neurons else target - len(ids)
            assert float(found[line, source]) == pytest.approx(weight, rel=1e-3, abs=1e-6)


def test_edges_that_do_not_add_up_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from tracer.attribution import replay

    monkeypatch.setattr(replay, "attend", lambda run, mixed, maps, last: None)
    with pytest.raises(ModelError, match="add up"):
        direct_edges(loaded("llama"), IDS, some_nodes(loaded("llama")), LOGITS, engine="replay")
