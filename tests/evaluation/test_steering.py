"""Steering against plain hooks, its random control, its files, and one state put in another's place."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tracer
from helpers import Change, fresh, hooked, load, refused
from tracer.attribution.running import Running
from tracer.circuit.circuit import Circuit
from tracer.circuit.supernodes_file import Supernodes, of_graph, write, write_to_run
from tracer.data.tasks import capitals
from tracer.data.tasks.pairs import Pair
from tracer.errors import JobError, RunError
from tracer.evaluation.steering import Action, drawn_alike, read_nodes, steer
from tracer.evaluation.swap import swap, wilson
from tracer.model.model import Model
from tracer.prompts import Prompt, decode, encode

SECRETARIES = Prompt("The secretaries near the car", target=" are", foil=" is")
TINY = Prompt(token_ids=(1, 20, 30, 40, 50), target=7, foil=8)


@cache
def demo() -> Model:
    return tracer.load("demo")


@cache
def circuit() -> Circuit:
    return tracer.trace(demo(), SECRETARIES, nodes=50, edges=False)


def on(nodes: Sequence[Any], act: Callable[[Tensor], Tensor]) -> Change:
    """`act` on each node; a pair at every position, a triple at its own while the prompt is read."""

    def change(layer: int, value: Tensor) -> Tensor:
        value = value.clone()
        for at, *position, neuron in nodes:
            if at == layer and not position:
                value[..., neuron] = act(value[..., neuron])
            elif at == layer and value.shape[1] > 1:
                value[0, position[0], neuron] = act(value[0, position[0], neuron])
        return value

    return change


def plain(model: Model, prompt: Prompt, change: Change, basis: str = "activation") -> Tensor:
    """The next token's logits under hooks."""
    with hooked(model, change, basis):
        return model.module(torch.tensor([encode(prompt, model).token_ids])).logits[0, -1].float()


def plain_text(model: Model, prompt: Prompt, change: Change, count: int) -> tuple[int, ...]:
    """Greedy tokens under hooks, by a loop without a cache: a change at prompt positions is made each time."""
    ids = list(encode(prompt, model).token_ids)
    start = len(ids)
    with hooked(model, change):
        while len(ids) < start + count:
            ids.append(int(model.module(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] == model.module.generation_config.eos_token_id:
                break
    return tuple(ids[start:])


ACTIONS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = {
    "ablate": ({"factor": 0.0}, lambda value: value * 0),
    "invert": ({"factor": -1.5}, lambda value: value * -1.5),
    "set": ({"set_to": 0.7}, lambda value: torch.full_like(value, 0.7)),
    "add": ({"add": -2.0}, lambda value: value - 2),
}
TRIPLES = [(0, 1, 3), (0, 2, 5), (1, 4, 3), (2, 0, 40), (2, 4, 1)]
PAIRS = [(0, 3), (1, 7), (2, 47)]


@pytest.mark.parametrize("action", sorted(ACTIONS))
@pytest.mark.parametrize("nodes", [TRIPLES, PAIRS], ids=["positions", "everywhere"])
@pytest.mark.parametrize("name", ["demo", "qwen2", "gemma2"])
def test_next_token_and_text_equal_plain_hooks(name: str, nodes: Any, action: str) -> None:
    model, prompt = (demo(), SECRETARIES) if name == "demo" else (load(name), TINY)
    given, act = ACTIONS[action]
    got = steer(model, nodes, prompt, tokens=[30, 31], max_new_tokens=6, random=1, **given)
    wanted = plain(model, prompt, on(nodes, act))
    untouched = plain(model, prompt, lambda _, value: value)
    for effect in got.effects:
        assert effect.logit.after == pytest.approx(float(wanted[effect.token_id]), abs=1e-6, rel=1e-6)
        assert effect.logit.before == pytest.approx(float(untouched[effect.token_id]), abs=1e-6, rel=1e-6)
        assert effect.probability.after == pytest.approx(float(wanted.softmax(-1)[effect.token_id]), abs=1e-6)
        assert effect.token == decode(model, effect.token_id)
    assert got.after == decode(model, int(wanted.argmax()))
    assert got.changed == (wanted.argmax() != untouched.argmax())
    assert got.steered is not None
    assert got.unsteered is not None
    assert got.steered.token_ids == plain_text(model, prompt, on(nodes, act), 6)
    assert got.unsteered.token_ids == plain_text(model, prompt, lambda _, value: value, 6)
    assert got.everywhere == (nodes is PAIRS)
    length = len(encode(prompt, model).token_ids)
    assert got.n_nodes == (len(PAIRS) * length if nodes is PAIRS else len(TRIPLES))
    assert got.n_neurons == len(nodes)


def test_the_output_basis_equals_hooks() -> None:
    got = steer(load("gpt2"), [(1, 2, 30), (2, 4, 31)], TINY, factor=-1, basis="output", max_new_tokens=0)
    wanted = plain(load("gpt2"), TINY, on([(1, 2, 30), (2, 4, 31)], lambda value: -value), "output")
    for effect in got.effects:
        assert effect.logit.after == pytest.approx(float(wanted[effect.token_id]), abs=1e-6, rel=1e-6)
    assert got.unsteered is got.steered is got.control is None


def test_factor_one_and_adding_nothing_change_nothing() -> None:
    ways: list[dict[str, Any]] = [{"factor": 1}, {"add": 0.0}]
    for how in ways:
        for everywhere in (False, True):
            got = steer(demo(), circuit(), SECRETARIES, everywhere=everywhere, max_new_tokens=5, **how)
            for effect in got.effects:
                assert effect.logit.before == effect.logit.after
                assert effect.probability.before == effect.probability.after
                assert effect.probability.control is not None
                assert effect.probability.control.high == pytest.approx(effect.probability.before, abs=1e-6)
            assert got.unsteered == got.steered == got.control
            assert not got.changed
            assert got.control_changed == 0


def test_places_compose() -> None:
    """A circuit, its rows as triples, its neurons as pairs and everywhere, and positions: the same sets."""
    run = partial(steer, demo(), prompt=SECRETARIES, factor=-1, max_new_tokens=3)
    rows = [(row["layer"], row["position"], row["neuron"]) for row in circuit().neurons.to_pylist()]
    assert run(circuit(), top=10) == run(rows[:10]) == run(rows[:10] * 2) == run(rows, top=10)
    pairs = list(dict.fromkeys((layer, neuron) for layer, _, neuron in rows[:10]))
    everywhere = run(circuit(), top=10, everywhere=True)
    assert everywhere == run(pairs) == run(pairs, everywhere=True)
    last = run(pairs, positions=[-1])
    assert last == run([(layer, 5, neuron) for layer, neuron in pairs]) == run(rows[:10], positions=[5])
    every = run(pairs, positions=range(6))
    assert every.n_nodes == everywhere.n_nodes == 6 * len(pairs)
    assert [one.logit.after for one in every.effects] == [one.logit.after for one in everywhere.effects]
    assert not every.everywhere
    assert last.effects != every.effects
    longer = Prompt("The secretaries near the car that the car", target=" are")
    assert steer(demo(), circuit(), longer, factor=0, max_new_tokens=0).n_nodes == 50


def test_what_is_reported() -> None:
    got = steer(demo(), circuit(), SECRETARIES, factor=0, tokens=[" was", " are"], max_new_tokens=4, random=3)
    assert [effect.role for effect in got.effects[:3]] == ["target", "foil", "asked"]
    assert [effect.token for effect in got.effects[:3]] == [" are", " is", " was"]
    ids = [effect.token_id for effect in got.effects]
    assert len(set(ids)) == len(ids)
    before = plain(demo(), SECRETARIES, lambda _, value: value)
    assert set(before.topk(5).indices.tolist()) <= set(ids)
    assert got.tokens == ("<s>", "The", " secretaries", " near", " the", " car")
    assert got.action == Action("factor", 0.0)
    assert got.before == " are"
    assert got.unsteered is not None
    assert got.unsteered.text == " are pretty."
    assert got.random == 3
    assert sum(got.per_layer) == got.n_nodes == 50
    one = steer(demo(), circuit(), SECRETARIES, factor=0, tokens=" was", max_new_tokens=0, random=0)
    assert one.effects[2].token == " was"
    assert all(effect.logit.control is None for effect in one.effects)


def test_the_control_is_seeded_and_has_as_many_neurons_in_each_layer_at_each_position() -> None:
    run = partial(steer, demo(), circuit(), SECRETARIES, factor=-3, max_new_tokens=3)
    assert run(seed=1) == run(seed=1)
    one, two = run(seed=1).effects[0].logit, run(seed=2).effects[0].logit
    assert one.control != two.control
    assert one.after == two.after
    assert one.control is not None
    assert one.control.low < one.control.mean < one.control.high
    places = [(row["layer"], row["position"], row["neuron"]) for row in circuit().neurons.to_pylist()]
    drawn = drawn_alike(places, Running((384,) * 4, (None,) * 4, {}), torch.Generator().manual_seed(0))
    assert len(set(drawn)) == len(places)
    assert Counter(node[:2] for node in drawn) == Counter(node[:2] for node in places)
    assert set(drawn) != set(places)
    single = steer(demo(), places, SECRETARIES, factor=-3, max_new_tokens=0, random=1)
    wanted = plain(demo(), SECRETARIES, on(drawn, lambda value: value * -3))
    for effect in single.effects:
        assert effect.logit.control is not None
        assert effect.logit.control.mean == pytest.approx(float(wanted[effect.token_id]), abs=1e-5)


def test_the_plural_becomes_singular() -> None:
    """The ten strongest nodes, inverted at every position, flip the verb; as many random neurons do nothing."""
    got = steer(demo(), circuit(), SECRETARIES, factor=-1, top=10, everywhere=True, max_new_tokens=8)
    assert (got.before, got.after, got.changed) == (" are", " is", True)
    assert got.steered is not None
    assert got.control is not None
    assert got.steered.text.startswith(" is ")
    assert got.control.text == " are pretty."
    assert got.control_changed == 0
    are, is_ = (effect.probability for effect in got.effects[:2])
    assert are.after < 0.05 < 0.5 < are.before
    assert is_.after > 0.05 > 0.005 > is_.before
    assert are.control is not None
    assert are.control.low > 0.5


def asked(pairs: Sequence[Pair]) -> list[Prompt]:
    return [pair.to_prompt() for pair in pairs]


def test_one_state_in_place_of_another() -> None:
    pairs = capitals.pairs("test", 12, vocabulary=demo())
    got = swap(demo(), asked(pairs), ks=(5, 20, 50))
    assert got.n_pairs == 12
    assert got.answered.estimate > 0.9
    assert got.swapped.becomes.estimate[1:].min() >= 0.7
    assert got.swapped.becomes.low[1:].min() > got.random.becomes.high.max()
    assert got.random.becomes.estimate.max() == 0
    assert got.zeroed.becomes.estimate.max() < 0.2
    assert got.random.stays.estimate.min() > 0.9
    assert got.n_nodes.tolist() == sorted(got.n_nodes.tolist())
    again = swap(demo(), asked(pairs), ks=(5, 20, 50), memory=1)
    assert torch.equal(again.swapped.answers, got.swapped.answers)
    assert torch.equal(again.random.answers, got.random.answers)
    one = swap(demo(), asked(pairs[:1]), ks=(50,))
    assert one.swapped.answers.tolist() == got.swapped.answers[:1, 2:].tolist()
    foil = encode(Prompt(pairs[0].prompt, target=pairs[0].foil), demo()).target_ids
    assert tuple(one.swapped.answers[0].tolist()) == foil


@pytest.mark.parametrize("baseline", ["zero", "counterfactual"])
def test_the_swap_equals_plain_hooks(baseline: str) -> None:
    """On a tiny random model, with pairs of two lengths in one padded batch."""
    model, k = load("llama"), 8
    texts = [("the car near", "the key near"), ("the capital of state near car", "the cabinet of state near man")]
    pairs = [Pair(str(i), one, two, " is", " are", "") for i, (one, two) in enumerate(texts)]
    got = swap(model, asked(pairs), ks=(k,), baseline=baseline)
    for row, pair in enumerate(pairs):
        found = [
            tracer.attribute(
                model,
                [
                    Prompt(text, target=target)
                    if baseline == "zero"
                    else Prompt(text, target=target, foil=foil, counterfactual=other)
                ],
                baseline=baseline,
            )
            for text, target, other, foil in (
                (pair.prompt, pair.target, pair.counterfactual, pair.foil),
                (pair.counterfactual, pair.foil, pair.prompt, pair.target),
            )
        ]
        shape = found[0].nodes.shape[1:]
        sets = [{tuple(x.tolist()) for x in _top(one.nodes[0], k, shape)} for one in found]
        values = found[1].activations[0]

        def put(layer: int, value: Tensor, nodes: Any = sets[0] | sets[1], values: Tensor = values) -> Tensor:
            value = value.clone()
            for at, position, neuron in nodes:
                if at == layer:
                    value[0, position, neuron] = values[at, position, neuron]
            return value

        zero = on(sorted(sets[0]), lambda value: value * 0)
        assert int(got.swapped.answers[row, 0]) == int(plain(model, Prompt(pair.prompt), put).argmax())
        assert int(got.zeroed.answers[row, 0]) == int(plain(model, Prompt(pair.prompt), zero).argmax())


def _top(nodes: Tensor, k: int, shape: Sequence[int]) -> Tensor:
    return torch.stack(torch.unravel_index(nodes.abs().flatten().topk(k).indices, tuple(shape)), -1)


def test_wilson_intervals() -> None:
    got = wilson(torch.tensor([[True, False, True]] * 10 + [[True, False, False]] * 30))
    assert got.estimate.tolist() == [1.0, 0.0, 0.25]
    assert got.low.tolist() == pytest.approx([0.9124, 0.0, 0.1419], abs=1e-4)  # statsmodels' proportion_confint
    assert got.high.tolist() == pytest.approx([1.0, 0.0876, 0.4019], abs=1e-4)


def test_files_of_nodes(tmp_path: Path) -> None:
    rows = [{"layer": layer, "position": position, "neuron": neuron} for layer, position, neuron in TRIPLES]
    other = [{"kind": "embedding", "layer": -1, "position": 0, "neuron": 9}]
    lines, table = tmp_path / "nodes.jsonl", tmp_path / "nodes.csv"
    lines.write_text("\n\n".join(json.dumps(row) for row in [*rows, *other]))
    assert read_nodes(lines) == TRIPLES
    table.write_text(
        "\ufefflayer, position, neuron, attribution\n" + "".join(f"{a}, {b}, {c}, .5\n" for a, b, c in TRIPLES)
    )
    assert read_nodes(str(table)) == TRIPLES
    table.write_text("neuron,layer\n" + "".join(f"{neuron},{layer}\n" for layer, neuron in PAIRS))
    assert read_nodes(table) == PAIRS
    lines.write_text('{"layer": 1, "neuron": 2, "position": null}')
    assert read_nodes(lines) == [(1, 2)]
    folder = read_nodes(circuit().save(tmp_path / "run"))
    how = {"factor": 0.0, "top": 7, "max_new_tokens": 2}
    assert steer(demo(), folder, SECRETARIES, **how) == steer(demo(), circuit(), SECRETARIES, **how)  # type: ignore[arg-type]


def test_one_group_is_steered_alone(tmp_path: Path) -> None:
    folder, own = circuit().save(tmp_path / "run"), circuit().neurons.to_pylist()
    with refused(JobError, "no supernodes.json"):
        read_nodes(folder, "a")
    groups = of_graph(circuit().model_copy(update={"groups": {"a": (2, 5), "b": (1,)}}))
    write_to_run(folder, groups)
    picked = read_nodes(folder, "a")
    assert isinstance(picked, Circuit)
    wanted = [(own[node]["layer"], own[node]["position"], own[node]["neuron"]) for node in (2, 5)]
    file = tmp_path / "run" / "supernodes.json"
    assert read_nodes(file, "a") == wanted
    how = {"factor": 0.0, "max_new_tokens": 2}
    steered = steer(demo(), picked, SECRETARIES, **how)  # type: ignore[arg-type]
    assert steered == steer(demo(), wanted, SECRETARIES, **how)  # type: ignore[arg-type]
    assert steered.n_nodes == 2
    with refused(JobError, "the groups are 'a', 'b'"):
        read_nodes(folder, "c")
    with refused(JobError, "holds groups of nodes: 'a', 'b'"):
        read_nodes(file)
    groups = groups.model_dump()
    for node in groups["groups"][0]["nodes"]:
        node["position"] = -1
    anywhere = write(tmp_path / "free.json", Supernodes.model_validate(groups))
    assert read_nodes(anywhere, "a") == [(layer, neuron) for layer, _, neuron in wanted]
    groups["groups"][0]["nodes"][0]["position"] = 1
    write(anywhere, Supernodes.model_validate(groups))
    with refused(JobError, "some of its nodes have a position"):
        read_nodes(anywhere, "a")


BAD_FILES = {
    "": "no column 'layer'",
    "layer,position\n1,2\n": "no column 'neuron'",
    "layer,position,neuron\n": "holds no node",
    "layer,position,neuron\n1,2,3\n1,,3\n": "line 3",
    "layer,position,neuron\n1,2,x\n": "its neuron is 'x'",
    "layer,neuron\n1\n": "its neuron is None",
    '{"layer": 1}': "its neuron is None",
    '{"layer": 1, "neuron": true}': "its neuron is True",
    '{"layer": 1, "neuron": 1.5}': "its neuron is 1.5",
    '{"layer": 1, "neuron": 2}\n[1, 2]': "line 2",
    '{"layer": 1, ': "is not JSON",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_bad_file_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "nodes").write_text(text)
    with refused(JobError, BAD_FILES[text]):
        read_nodes(tmp_path / "nodes")


def test_no_file_and_no_run_are_errors(tmp_path: Path) -> None:
    with refused(JobError, "cannot be read"):
        read_nodes(tmp_path / "nothing")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x80")
    with refused(JobError, "not UTF-8"):
        read_nodes(tmp_path / "bytes")
    with refused(RunError, "no run"):
        read_nodes(tmp_path)


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (PAIRS, {}, "exactly one"),
    (PAIRS, {"factor": 0, "add": 1}, "factor=0 and add=1"),
    (PAIRS, {"factor": 0, "set_to": 0}, "factor=0 and set_to=0"),
    (PAIRS, {"factor": float("nan")}, "finite"),
    (PAIRS, {"factor": True}, "finite"),
    (PAIRS, {"add": float("-inf")}, "finite"),
    (PAIRS, {"set_to": 10**400}, "finite"),
    (PAIRS, {"factor": 1e38}, "smaller amount"),
    ([], {"factor": 0}, "none to steer"),
    ([(0, 1), (0, 1, 2)], {"factor": 0}, "some have none"),
    ([(3, 1)], {"factor": 0}, "3 layers"),
    ([(-1, 1)], {"factor": 0}, "3 layers"),
    ([(0, 48)], {"factor": 0}, "48 in the basis activation"),
    ([(0, 40)], {"factor": 0, "basis": "output"}, "32 in the basis output"),
    ([(0, 5, 1)], {"factor": 0}, "5 tokens"),
    ([(0, -1, 1)], {"factor": 0}, "5 tokens"),
    ([(0, True)], {"factor": 0}, "whole numbers"),
    (PAIRS, {"factor": 0, "basis": "mlp"}, "activation, output, residual, attention"),
    (PAIRS, {"factor": 0, "top": 4}, "3 nodes"),
    (PAIRS, {"factor": 0, "top": 0}, "3 nodes"),
    (PAIRS, {"factor": 0, "positions": [5]}, "position 5"),
    (PAIRS, {"factor": 0, "positions": []}, "empty"),
    (PAIRS, {"factor": 0, "positions": [0], "everywhere": True}, "contradict"),
    (PAIRS, {"factor": 0, "tokens": [101]}, "vocabulary"),
    (PAIRS, {"factor": 0, "max_new_tokens": -1}, "0 or more"),
    (PAIRS, {"factor": 0, "max_new_tokens": 60}, "at most 59"),
    (PAIRS, {"factor": 0, "random": -1}, "0 or more"),
]


@pytest.mark.parametrize(("nodes", "how", "part"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_input_is_an_error(nodes: Any, how: dict[str, Any], part: str) -> None:
    with refused(JobError, part):
        steer(load("llama"), nodes, TINY, **how)


def test_a_circuit_that_does_not_fit_is_an_error() -> None:
    with refused(JobError, "another model"):
        steer(load("llama"), circuit(), TINY, factor=0)
    with refused(JobError, "position", "longer prompt"):
        steer(demo(), circuit(), Prompt("The secretaries"), factor=0)
    with refused(JobError, "circuit's is 'activation'"):
        steer(demo(), circuit(), SECRETARIES, factor=0, basis="output")
    with refused(JobError, "nowhere else"):
        steer(demo(), circuit(), Prompt("The secretaries near the car", positions=2), factor=0)


def test_a_swap_that_cannot_be_is_an_error() -> None:
    pairs = capitals.pairs("test", 2, vocabulary=demo())
    with refused(JobError, "nothing to swap"):
        swap(demo(), [])
    for ks in ((), (0, 5), (5, 5), (10, 5), (4 * 9 * 384 + 1,)):
        with refused(JobError, "must rise"):
            swap(demo(), asked(pairs), ks=ks)
    with refused(JobError, "equally long"):
        swap(demo(), asked([Pair("x", "The key", "The key near the car", " is", " are", "")]))


# ---------------------------------------------------------------------------------- what a generation_config says

BENT: dict[str, dict[str, Any]] = {
    "repetition penalty": {"repetition_penalty": 1.8},
    "sampling": {"do_sample": True, "temperature": 5.0, "top_k": 0},
    "beams": {"num_beams": 4, "length_penalty": 3.0, "num_return_sequences": 2},
    "no repeats": {"no_repeat_ngram_size": 1},
    "a forced end": {"forced_eos_token_id": 5},
    "a forced beginning": {"forced_bos_token_id": 5, "decoder_start_token_id": 5},
    "suppressed": {"suppress_tokens": [], "begin_suppress_tokens": []},  # filled with the greedy tokens
    "bad words": {"bad_words_ids": []},  # likewise
    "shortest": {"min_length": 60, "min_new_tokens": 50},
    "longest": {"max_length": 3, "max_new_tokens": 1, "max_time": 1e-6},
    "bias": {"sequence_bias": [[[40], 100.0]]},
    "guidance": {"guidance_scale": 3.0},
    "decay": {"exponential_decay_length_penalty": [0, 100.0]},
    "no cache": {"use_cache": False, "cache_implementation": "static"},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "more output": {"return_dict_in_generate": True, "output_scores": True, "output_attentions": True},
}


def greedy(model: Model, prompt: Prompt, count: int) -> list[int]:
    """The tokens of the largest logits, one whole forward each, without a cache."""
    ids = list(encode(prompt, model).token_ids)
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + count and (len(ids) == start or ids[-1] not in model.end_tokens):
            ids.append(int(model.module(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[start:]


@pytest.mark.parametrize("bent", sorted(BENT))
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_texts_are_greedy_whatever_a_generation_config_says(family: str, bent: str) -> None:
    model = fresh(family)
    wanted = greedy(model, TINY, 6)
    config = model.module.generation_config
    for name, value in BENT[bent].items():
        forbidden = sorted(set(wanted))
        given = [[token] for token in forbidden] if name == "bad_words_ids" else forbidden
        setattr(config, name, given if value == [] else value)
    before = config.to_dict()
    found = steer(model, [(0, 1)], TINY, factor=1, max_new_tokens=6)
    assert found.unsteered is not None
    assert found.steered == found.unsteered
    assert list(found.unsteered.token_ids) == wanted
    assert decode(model, wanted[0]) == found.before
    assert model.module.generation_config.to_dict() == before


def test_a_text_ends_at_any_of_the_models_end_tokens() -> None:
    model = fresh("llama")
    wanted = greedy(model, TINY, 6)
    assert wanted[1] not in wanted[:1]
    model.module.generation_config.eos_token_id = [99, wanted[1]]
    found = steer(model, [(0, 1)], TINY, factor=1, max_new_tokens=6)
    assert found.unsteered is not None
    assert list(found.unsteered.token_ids) == wanted[:2]
