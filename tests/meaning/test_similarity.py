"""Likeness against the formula written out, pair by pair; in parts, in any order, with whatever is missing."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pyarrow as pa
import pytest

from tracer.errors import RunError
from tracer.meaning import similarity
from tracer.meaning.profiles import SCHEMA
from tracer.meaning.similarity import Items, count, likeness


def rows(n_prompts: int = 7, free: bool = False) -> list[dict]:
    """Prompts of 3 to 5 tokens with some of 9 neurons, at two positions each where `free`."""
    rng, found = np.random.default_rng(3), []
    for prompt in range(n_prompts):
        length = 3 + prompt % 3
        for neuron in range(9):
            for position in (1, 2) if free else (2,):
                if rng.random() < 0.3:
                    continue
                into, out_of = rng.normal(size=length), rng.normal(size=2)
                into[position + 1 :] = 0
                found.append(
                    {"prompt_id": prompt, "node_id": neuron, "layer": neuron % 3, "position": position}
                    | {"neuron": neuron, "polarity": 1, "n_tokens": length}
                    | {"input": into.tolist(), "output": out_of.tolist()}
                )
    return found


def table(found: list[dict]) -> pa.Table:
    return pa.Table.from_pylist(found, SCHEMA)


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    size = math.sqrt(float(one @ one)) * math.sqrt(float(other @ other))
    return float(one @ other) / size if size else 0.0


def by_pairs(found: list[dict], items: Items, weights: np.ndarray) -> np.ndarray:
    """The formula, written out."""
    places = items.rows()
    summed: dict[tuple[int, int], list[np.ndarray]] = {}
    for row in found:
        place = row["layer"], -1 if items.free else row["position"], row["neuron"], row["polarity"]
        if row["input"] is None or place not in places:
            continue
        sides = [np.float32(row["input"]).astype(float), np.float32(row["output"]).astype(float)]
        key = row["prompt_id"], places.index(place)
        summed[key] = [a + b for a, b in zip(summed[key], sides, strict=True)] if key in summed else sides
    wanted = np.eye(len(items))
    for i in range(len(items)):
        for j in set(range(len(items))) - {i}:
            both = [prompt for prompt in range(len(weights)) if {(prompt, i), (prompt, j)} <= summed.keys()]
            total = sum(weights[prompt] for prompt in both)
            if not total:
                wanted[i, j] = 0
                continue
            a, b = (
                max(0.0, sum(weights[p] * cosine(summed[p, i][side], summed[p, j][side]) for p in both) / total)
                for side in (0, 1)
            )
            wanted[i, j] = 2 * a * b / (a + b) if a and b else 0.0
    return wanted


@pytest.mark.parametrize("free", [False, True])
def test_likeness_is_the_formula(free: bool) -> None:
    found = rows(free=free)
    items = Items.of((row["layer"], -1 if free else row["position"], row["neuron"], 1) for row in found)
    weights = np.vstack([np.ones(7), np.random.default_rng(4).integers(0, 4, (3, 7))])
    made = list(likeness(lambda: [table(found)], items, weights))
    assert len(made) == 4
    for one, weight in zip(made, weights, strict=True):
        np.testing.assert_allclose(one.similarity, by_pairs(found, items, weight), atol=2e-6)
    assert 0 < (made[0].similarity > 0).sum() < len(items) ** 2


def test_parts_and_the_order_of_nodes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = rows()
    items = Items.of((row["layer"], row["position"], row["neuron"], 1) for row in found)
    weights = np.vstack([np.ones(7), np.random.default_rng(4).integers(0, 4, (5, 7))])
    whole = [one.similarity for one in likeness(lambda: [table(found)], items, weights)]
    turned = sorted(found, key=lambda row: (row["prompt_id"], -row["node_id"]))
    again = [one.similarity for one in likeness(lambda: [table(turned)], items, weights)]
    assert all(np.array_equal(one, other) for one, other in zip(whole, again, strict=True))
    monkeypatch.setattr(similarity, "CELLS", 1)
    monkeypatch.setattr(similarity, "ROOM", 24 * 81 * 2)
    parts = [table([row for row in found if row["prompt_id"] in own]) for own in ((0, 1), (2,), (3, 4, 5, 6))]
    few = [one.similarity for one in likeness(lambda: iter(parts), items, weights)]
    for one, other in zip(whole, few, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_what_is_missing_is_counted_and_like_nothing() -> None:
    found = [row for row in rows() if row["neuron"] < 6]
    found[0]["input"] = None
    found[1]["output"] = []
    silent = [{**row, "neuron": 20, "layer": 0, "input": [0.0] * row["n_tokens"]} for row in found[:6:2]]
    pairs = [(row["layer"], row["position"], row["neuron"], 1) for row in found + silent]
    items = Items.of([*pairs, (2, 2, 99, 1)])
    source = table(sorted(found + silent, key=lambda row: row["prompt_id"]))
    counted = count(lambda: [source], items)
    assert counted.n_prompts == 7
    assert counted.without == 2
    assert counted.times[[row[2] for row in items.rows()].index(99)] == 0
    (made,) = likeness(lambda: [source], items, np.ones((1, 7)))
    for neuron in (20, 99):
        place = [row[2] for row in items.rows()].index(neuron)
        assert made.similarity[place].sum() == 1.0  # with itself


def test_only_prompts_of_an_aligned_circuits_length_count() -> None:
    found = rows()
    items = Items.of(((row["layer"], row["position"], row["neuron"], 1) for row in found), n_tokens=4)
    counted = count(lambda: [table(found)], items)
    own = [row for row in found if row["n_tokens"] == 4]
    assert (counted.n_prompts, counted.elsewhere) == (2, 5)
    (made,) = likeness(lambda: [table(found)], items, np.ones((1, 2)))
    renumbered = [{**row, "prompt_id": row["prompt_id"] // 3} for row in own]
    np.testing.assert_allclose(made.similarity, by_pairs(renumbered, items, np.ones(2)), atol=2e-6)


def test_the_size_of_a_profile_does_not_matter() -> None:
    found = rows(n_prompts=2)
    for row, power in zip(found, itertools.cycle((-30, 0, 30)), strict=False):
        scale = 10.0**power
        row["input"] = [value * scale for value in row["input"]]
    items = Items.of((row["layer"], row["position"], row["neuron"], 1) for row in found)
    (made,) = likeness(lambda: [table(found)], items, np.ones((1, 2)))
    assert np.isfinite(made.similarity).all()
    np.testing.assert_allclose(made.similarity, by_pairs(found, items, np.ones(2)), atol=2e-6)


@pytest.mark.parametrize(("value", "said"), [([1.0] * 9, "different lengths"), ([math.nan] * 3, "not finite")])
def test_damaged_profiles_are_refused(value: list[float], said: str) -> None:
    found = rows(n_prompts=1)
    found[1]["input"] = value
    items = Items.of((row["layer"], row["position"], row["neuron"], 1) for row in found)
    with pytest.raises(RunError, match=said):
        count(lambda: [table(found)], items)
