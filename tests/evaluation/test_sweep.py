"""Sweeps against plain hooks, their random groups, what they come to over prompts, and groups that cannot be."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap
from torch import Tensor

import tracer
from helpers import hooked, load, refused
from tracer.attribution.running import Running
from tracer.circuit.circuit import Circuit
from tracer.errors import JobError, RunError, TracerWarning
from tracer.evaluation.groups import WHOLE, Group, controls, groups_of
from tracer.evaluation.steering import steer
from tracer.evaluation.sweep import Sweep, sweep
from tracer.model.model import Model
from tracer.prompts import Prompt, decode, encode

SECRETARIES = Prompt("The secretaries near the car", target=" are", foil=" is")
PROMPTS = [
    Prompt(token_ids=(1, 20, 30, 40, 50), target=7, foil=8),
    Prompt(token_ids=(1, 60, 31, 9, 77, 12, 40), target=(5, 6)),
]
GROUPS: dict[str, Any] = {
    "placed": [(0, 1, 3), (1, 2, 5), (2, 4, 1)],
    "any": [(0, 7), (1, 7), {"layer": 1, "position": -1, "neuron": 9, "polarity": -1}],
    "both": [(1, None, 11), (1, 3, 11), (2, 0, 40)],
}


@cache
def demo() -> Model:
    return tracer.load("demo")


@cache
def circuit() -> Circuit:
    return tracer.trace(demo(), SECRETARIES, nodes=20, edges=False)


def plain(model: Model, ids: tuple[int, ...], group: Group, factor: float, basis: str) -> tuple[Tensor, list[Tensor]]:
    """The next token's logits and every layer's neurons with a group multiplied by hooks, in a forward of its own."""
    seen: list[Tensor] = []
    nodes = group.on(len(ids))

    def change(layer: int, value: Tensor) -> Tensor:
        value = value.clone()
        for at, position, neuron in nodes:
            if at == layer:
                value[0, position, neuron] = value[0, position, neuron] * factor
        seen.append(value[0])
        return value

    with hooked(model, change, basis):
        logits = model.module(torch.tensor([ids])).logits[0, -1].float()
    return logits, seen


@pytest.mark.parametrize(
    ("name", "basis", "everywhere"),
    [("llama", "activation", False), ("gemma3", "activation", True), ("gpt2", "output", False)],
)
def test_every_number_equals_plain_hooks(name: str, basis: str, everywhere: bool) -> None:
    model = load(name)
    groups = {name: [node for node in nodes if node != (2, 0, 40)] for name, nodes in GROUPS.items()}  # 32 wide output
    got = sweep(
        *(model, groups, PROMPTS),
        factors=[-1.5, 0],
        tokens=[30, 7],
        random=1,
        seed=3,
        basis=basis,
        everywhere=everywhere,
    )
    made = [one.everywhere() if everywhere else one for one in groups_of(groups)]
    drawn = {one.name: controls(one, Running.of(model, [], basis), 1, 3) for one in made}
    encoded = [encode(prompt, model).token_ids for prompt in PROMPTS]
    untouched = [plain(model, ids, Group("", ()), 1.0, basis) for ids in encoded]
    rows, kept = got.tokens.to_pylist(), got.groups.to_pylist()
    tokens = {0: {7: "target", 8: "foil", 30: "asked"}, 1: {5: "target", 6: "target", 30: "asked", 7: "asked"}}
    for number, (ids, (before, _)) in enumerate(zip(encoded, untouched, strict=True)):
        tokens[number].setdefault(int(before.argmax()), "top")
        assert {row["text"] for row in rows if row["prompt_id"] == number} == {
            "".join(decode(model, token) for token in ids)
        }
    assert len(rows) == 3 * 2 * 2 * sum(map(len, tokens.values()))
    assert len(kept) == 3 * 2 * 2 * 2 * 3
    for group in made:
        for factor in (-1.5, 0.0):
            for draw, acted in enumerate([group, *drawn[group.name]], start=-1):
                key = {"group": group.name, "factor": factor, "draw": draw}
                for number, ids in enumerate(encoded):
                    mine = [row for row in rows if key.items() <= row.items() and row["prompt_id"] == number]
                    assert {row["token_id"]: row["role"] for row in mine} == tokens[number]
                    before, was = untouched[number]
                    after, now = plain(model, ids, acted, factor, basis)
                    p, q = before.log_softmax(-1), after.log_softmax(-1)
                    for row in mine:
                        token = row["token_id"]
                        assert row["logit_before"] == pytest.approx(float(before[token]), abs=2e-6, rel=2e-6)
                        assert row["logit_after"] == pytest.approx(float(after[token]), abs=2e-6, rel=2e-6)
                        assert row["probability_before"] == pytest.approx(float(p[token].exp()), abs=1e-6)
                        assert row["probability_after"] == pytest.approx(float(q[token].exp()), abs=1e-6)
                        assert row["token"] == decode(model, token)
                        assert row["greedy_before"] == decode(model, int(before.argmax()))
                        assert row["greedy_after"] == decode(model, int(after.argmax()))
                        assert row["changed"] == bool(before.argmax() != after.argmax())
                        wanted = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")
                        assert row["kl"] == pytest.approx(float(wanted), abs=2e-6)
                        assert row["n_nodes"] == len(acted.on(len(ids)))
                    for other in made:
                        places = other.on(len(ids))
                        old, new = (np.array([vs[at][pos, n] for at, pos, n in places]) for vs in (was, now))
                        (row,) = [
                            row
                            for row in kept
                            if row.items() >= {**key, "other": other.name, "prompt_id": number}.items()
                        ]
                        assert row["kept"] == pytest.approx(np.average(new / old, weights=old**2), abs=1e-5, rel=1e-5)


def test_a_group_that_is_not_above_another_leaves_it_alone() -> None:
    got = sweep(load("llama"), {"low": [(0, 3)], "high": [(2, 5), (2, 6)]}, PROMPTS, factors=[0, 3], random=0)
    kept = {(row["group"], row["factor"], row["other"]): row["kept"] for row in got.groups.to_pylist()}
    assert kept["high", 0.0, "low"] == kept["high", 3.0, "low"] == pytest.approx(1.0, abs=1e-6)
    assert kept["high", 3.0, "high"] == pytest.approx(3.0, abs=1e-5)
    assert kept["low", 0.0, "low"] == 0.0
    assert kept["low", 0.0, "high"] != pytest.approx(1.0, abs=1e-4)


def test_numbers_do_not_depend_on_batches_other_groups_factors_or_prompts() -> None:
    model = load("gemma2")
    whole = sweep(model, GROUPS, PROMPTS, factors=[-1, 0, 2], random=2)
    for memory in (1, 4 * model.bytes_per_token(gradient=False, length=5) * 5):
        assert same(sweep(model, GROUPS, PROMPTS, factors=[-1, 0, 2], random=2, memory=memory), whole)
    one = sweep(model, GROUPS, PROMPTS[1:], factors=[0], random=2, only=["any"]).tokens.to_pylist()
    rows = [
        row | {"prompt_id": 0}
        for row in whole.tokens.to_pylist()
        if (row["group"], row["factor"], row["prompt_id"]) == ("any", 0.0, 1)
    ]
    assert close(one, rows)


def same(got: Sweep, wanted: Sweep) -> bool:
    return close(got.tokens.to_pylist(), wanted.tokens.to_pylist()) and close(
        got.groups.to_pylist(), wanted.groups.to_pylist()
    )


def close(got: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> bool:
    """Equal but for the last bits of numbers."""
    return len(got) == len(wanted) and all(
        row.keys() == other.keys()
        and all(
            value == pytest.approx(other[name], abs=5e-6, rel=5e-6)
            if isinstance(value, float)
            else value == other[name]
            for name, value in row.items()
        )
        for row, other in zip(got, wanted, strict=True)
    )


def test_factor_one_changes_nothing() -> None:
    got = sweep(demo(), circuit(), [SECRETARIES], factors=[1], random=2)
    for row in got.tokens.to_pylist():
        assert row["probability_after"] == pytest.approx(row["probability_before"], abs=1e-6)
        assert row["kl"] == pytest.approx(0, abs=1e-6)
        assert not row["changed"]
    assert [row["kept"] for row in got.groups.to_pylist()] == pytest.approx([1.0] * 3, abs=1e-6)


def test_it_is_steer_on_each_group() -> None:
    """The circuit's own groups and the whole of it, as `tracer.steer` acts on their nodes."""
    ids = circuit().neurons["node_id"].to_pylist()
    grouped = circuit().model_copy(update={"groups": {"first": tuple(ids[:5]), "none": (circuit().n_nodes,)}})
    got = sweep(demo(), grouped, [SECRETARIES], factors=[-1], tokens=" was", random=1)
    rows = circuit().neurons.to_pylist()
    nodes = [(row["layer"], row["position"], row["neuron"]) for row in rows]
    assert list(dict.fromkeys(got.tokens["group"].to_pylist())) == ["first", WHOLE]
    for name, mine in (("first", nodes[:5]), (WHOLE, nodes)):
        wanted = steer(demo(), mine, SECRETARIES, factor=-1, tokens=" was", random=0, max_new_tokens=0)
        found = {row["token_id"]: row for row in got.tokens.to_pylist() if (row["group"], row["draw"]) == (name, -1)}
        assert len(found) == 3
        for effect in wanted.effects[:3]:
            row = found[effect.token_id]
            assert row["role"] == effect.role
            assert row["probability_after"] == pytest.approx(effect.probability.after, abs=1e-6)
            assert row["greedy_after"] == wanted.after


def dense(width: int) -> Running:
    """Of a model without experts."""
    return Running((width,) * 3, (None,) * 3, {})


def test_random_groups_are_of_the_same_size_and_hold_no_member() -> None:
    places = [(0, 1, 3), (0, 1, 4), (0, 2, 9), (1, None, 3), (1, None, 4), (2, 4, 1)]
    (group,) = groups_of({"x": places})
    made = controls(group, dense(48), 20, 1)
    assert len(made) == 20
    members = {(layer, neuron) for layer, _, neuron in group.places}
    for one in made:
        assert len(set(one.places)) == len(places)
        assert Counter(place[:2] for place in one.places) == Counter(place[:2] for place in group.places)
        assert not {(layer, neuron) for layer, _, neuron in one.places} & members
    assert len({one.places for one in made}) == 20
    assert made == controls(group, dense(48), 20, 1)
    assert made[:5] == controls(group, dense(48), 5, 1)
    assert made != controls(group, dense(48), 20, 2)
    (most,) = groups_of({"x": [(0, 1, 0), (0, 1, 1), (0, 1, 2)]})
    assert controls(most, dense(4), 3, 0) == []  # three of four are members, and three others are wanted
    seen = {one.places[-1][2] for one in controls(group, dense(48), 400, 0)}
    assert seen == set(range(48)) - {1}


def test_without_room_for_others_there_is_no_control() -> None:
    model = load("llama")
    groups = {"most": [(0, neuron) for neuron in range(30)], "few": [(0, 1)]}
    with pytest.warns(TracerWarning, match="no random control for 'most': too few other neurons"):
        got = sweep(model, groups, PROMPTS[:1], factors=[0], random=2)
    draws = Counter((row["group"], row["draw"]) for row in got.groups.to_pylist() if row["other"] == "few")
    assert draws == {("most", -1): 1, ("few", -1): 1, ("few", 0): 1, ("few", 1): 1}
    found = {one.group: one for one in got.responses() if one.role == "target"}
    assert found["most"].control is found["most"].control_changed is found["most"].control_kl is None
    assert found["few"].control is not None


# ------------------------------------------------------------------------------------------------ over prompts


def rows_of(n: int, draws: int) -> list[dict[str, Any]]:
    """Rows of a table for n prompts, made up."""
    source = np.random.default_rng(0)
    made = []
    for prompt in range(n):
        for draw in range(-1, draws):
            shared = {"prompt_id": prompt, "group": "g", "factor": 2.0, "draw": draw, "n_nodes": 3 + prompt}
            about = {"changed": bool(source.random() < 0.5), "kl": source.random()}
            for token, role in ((prompt, "target"), (50, "asked"), (51, "target")):
                p, q, a, b = source.random(4)
                numbers = {"probability_before": p, "probability_after": q, "logit_before": a, "logit_after": b}
                made.append(shared | about | numbers | {"token": f"t{token}", "token_id": token, "role": role})
    return made


def test_responses_are_means_over_prompts_with_scipys_interval() -> None:
    from tracer.evaluation.responses import responses

    rows = rows_of(12, 3)
    got = {(one.role, one.token): one for one in responses(rows, seed=0)}
    assert set(got) == {("target", "target"), ("asked", "t50")}

    def of(prompt: int, draw: int, role: str) -> list[dict[str, Any]]:
        wanted = {"prompt_id": prompt, "draw": draw, "role": role}
        return [row for row in rows if wanted.items() <= row.items()]

    def change(prompt: int, draw: int, role: str) -> float:
        return sum(row["probability_after"] - row["probability_before"] for row in of(prompt, draw, role))

    for (role, _), one in got.items():
        changes = [change(prompt, -1, role) for prompt in range(12)]
        at_random = [np.mean([change(prompt, draw, role) for draw in range(3)]) for prompt in range(12)]
        assert one.control is not None
        for interval, values in ((one.change, changes), (one.control, at_random)):
            assert float(interval.estimate) == pytest.approx(np.mean(values))
            wanted = bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=1).confidence_interval
            assert float(interval.low) == pytest.approx(wanted.low, abs=0.03)
            assert float(interval.high) == pytest.approx(wanted.high, abs=0.03)
        assert one.changed == pytest.approx(np.mean([of(prompt, -1, role)[0]["changed"] for prompt in range(12)]))
        flips = [of(prompt, draw, role)[0]["changed"] for prompt in range(12) for draw in range(3)]
        assert one.control_changed == pytest.approx(np.mean(flips))
        assert (one.n_prompts, one.n_nodes) == (12, pytest.approx(8.5))
        logits = [np.mean([row["logit_after"] - row["logit_before"] for row in of(i, -1, role)]) for i in range(12)]
        assert float(one.logit_change.estimate) == pytest.approx(np.mean(logits))
        assert one.before == pytest.approx(
            np.mean([sum(row["probability_before"] for row in of(i, -1, role)) for i in range(12)])
        )


def test_one_prompt_has_no_interval_and_its_own_tokens() -> None:
    found = sweep(load("llama"), GROUPS, PROMPTS[:1], factors=[0], random=1).responses()
    names = [decode(load("llama"), token) for token in (7, 8)]
    assert [(one.role, one.token) for one in found[:2]] == [("target", names[0]), ("foil", names[1])]
    assert all(bool(one.change.low.isnan()) and one.n_prompts == 1 for one in found)


# ------------------------------------------------------------------------------------------------ what cannot be


def supernodes(**changes: Any) -> dict[str, Any]:
    node = {"layer": 0, "position": -1, "neuron": 3, "polarity": -1}
    groups = [{"name": "a", "description": "", "nodes": [node]}, {"name": "b", "nodes": [node | {"position": 2}]}]
    return {"format": "tracer-supernodes", "version": 1, "circuit": None, "groups": groups, "pinned": []} | changes


def test_a_file_of_supernodes(tmp_path: Path) -> None:
    path = tmp_path / "supernodes.json"
    path.write_text(json.dumps(supernodes()))
    assert groups_of(path) == [Group("a", ((0, None, 3),)), Group("b", ((0, 2, 3),))]
    model = load("llama")
    got = sweep(model, path, PROMPTS, factors=[0], random=1)
    assert same(got, sweep(model, {"a": [(0, 3)], "b": [(0, 2, 3)]}, PROMPTS, factors=[0], random=1))
    path.write_text(json.dumps({"format": "other"}))
    with refused(RunError, "is not a groups file"):
        groups_of(path)


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (GROUPS, {"factors": []}, "at least one"),
    (GROUPS, {"factors": [float("nan")]}, "finite"),
    (GROUPS, {"factors": [True]}, "finite"),
    (GROUPS, {"factors": [0, 0.0]}, "once"),
    (GROUPS, {"factors": [1e38]}, "smaller amount"),
    (GROUPS, {"only": ["any", "nope"]}, "'placed', 'any', 'both'"),
    (GROUPS, {"tokens": "several words"}, "one is needed"),
    (GROUPS, {"tokens": [101]}, "vocabulary"),
    (GROUPS, {"random": -1}, "0 or more"),
    (GROUPS, {"basis": "mlp"}, "activation, output, residual, attention"),
    (GROUPS, {"prompts": []}, "at least one prompt"),
    (GROUPS, {"prompts": [Prompt(token_ids=(1, 2, 3, 4, 5), positions=2)]}, "nowhere else"),
    (GROUPS, {"prompts": [PROMPTS[0], Prompt(token_ids=(1, 20))]}, "a node at position 4"),
    ({}, {}, "none to steer"),
    ({"a": []}, {}, "no nodes"),
    ({"a": [(3, 1)]}, {}, "3 layers"),
    ({"a": [(0, 48)]}, {}, "48"),
    ({"a": [(0, 1.5)]}, {}, "whole numbers"),
    ({"a": [(0, -2, 1)]}, {}, "count positions"),
    ({"a": [{"layer": 1}]}, {}, "whole numbers"),
]


@pytest.mark.parametrize(("groups", "how", "part"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_input_is_an_error(groups: Any, how: dict[str, Any], part: str) -> None:
    with refused(JobError, part):
        sweep(load("llama"), groups, **{"prompts": PROMPTS, **how})


def test_a_circuit_of_another_model_is_an_error() -> None:
    with refused(JobError, "another model"):
        sweep(load("llama"), circuit(), PROMPTS)
    with refused(JobError, "circuit's is 'activation'"):
        sweep(demo(), circuit(), [SECRETARIES], basis="output")
