"""Drawn texts against a plain loop with the same generator, what top_p leaves, and a judge of texts."""

from __future__ import annotations

from collections import Counter
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

import tracer
from helpers import hooked, load, refused
from tracer.errors import JobError
from tracer.evaluation.steering import steer
from tracer.model.model import Model
from tracer.model.traces import draw
from tracer.prompts import Prompt, encode

TINY = Prompt(token_ids=(1, 20, 30, 40, 50), target=7, foil=8)
NODES = [(0, 3), (1, 7), (2, 40)]


@cache
def demo() -> Model:
    return tracer.load("demo")


def plain(model: Model, prompt: Prompt, factor: float, count: int, how: tuple[float, float, int]) -> tuple[int, ...]:
    """A text drawn by a loop without a cache, as transformers bends logits; neurons multiplied at every position."""
    temperature, top_p, seed = how
    source = torch.Generator().manual_seed(seed)
    bends = [TemperatureLogitsWarper(temperature), *([TopPLogitsWarper(top_p)] if top_p < 1 else [])]

    def change(layer: int, value: Tensor) -> Tensor:
        value = value.clone()
        for at, neuron in NODES:
            if at == layer:
                value[..., neuron] *= factor
        return value

    ids = list(encode(prompt, model).token_ids)
    start = len(ids)
    with hooked(model, change):
        while len(ids) < start + count and (len(ids) == start or ids[-1] not in model.end_tokens):
            logits = model.module(torch.tensor([ids]), use_cache=False).logits[:, -1].float()
            for bend in bends:
                logits = bend(None, logits)  # type: ignore[arg-type]
            ids.append(int(torch.multinomial(logits.softmax(-1)[0], 1, generator=source)))
    return tuple(ids[start:])


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_drawn_texts_are_those_of_a_plain_loop(name: str) -> None:
    model = load(name)
    for temperature, top_p in ((1.0, 1.0), (0.7, 0.8)):
        got = steer(
            *(model, NODES, TINY),
            factor=-2,
            max_new_tokens=6,
            random=1,
            temperature=temperature,
            top_p=top_p,
            n=3,
            sample_seed=11,
        )
        assert got.samples is not None
        assert (got.samples.temperature, got.samples.top_p, got.samples.seed) == (temperature, top_p, 11)
        assert len(got.samples.control) == 3
        for texts, factor in ((got.samples.unsteered, 1.0), (got.samples.steered, -2.0)):
            wanted = [plain(model, TINY, factor, 6, (temperature, top_p, 11 + i)) for i in range(3)]
            assert [one.token_ids for one in texts] == wanted
    assert got.steered == steer(model, NODES, TINY, factor=-2, max_new_tokens=6, random=1).steered


def test_texts_do_not_depend_on_how_many_there_are_and_end_each_by_itself() -> None:
    prompt = Prompt("The secretaries near the car")
    run = {"factor": 1, "max_new_tokens": 8, "random": 0, "temperature": 1.5}
    many = steer(demo(), NODES, prompt, n=12, **run).samples  # type: ignore[arg-type]
    few = steer(demo(), NODES, prompt, n=2, sample_seed=3, **run).samples  # type: ignore[arg-type]
    assert many is not None
    assert few is not None
    assert many.unsteered == many.steered
    assert many.unsteered[3:5] == few.unsteered
    assert many.control == ()
    ends = demo().end_tokens
    lengths = {len(one.token_ids) for one in many.unsteered}
    assert len(lengths) > 1
    for one in many.unsteered:
        assert not set(one.token_ids[:-1]) & set(ends)
        assert len(one.token_ids) == 8 or one.token_ids[-1] in ends
    greedy = steer(demo(), NODES, prompt, factor=-1, max_new_tokens=8, random=0, temperature=0)
    assert greedy.samples is not None
    assert greedy.samples.steered == (greedy.steered,)


def test_draws_follow_the_probabilities_and_top_p_cuts_the_tail() -> None:
    logits = torch.tensor([[0.1, 2.0, -1.0, 1.0, 2.0, -3.0]])
    chances = logits.softmax(-1)[0]
    kept = {0.3: {1}, 0.5: {1, 4}, 0.75: {1, 4}, 0.9: {1, 3, 4}, 1.0: set(range(6))}
    for top_p, wanted in kept.items():
        how, source = SimpleNamespace(temperature=1.0, top_p=top_p), torch.Generator().manual_seed(0)
        counts = Counter(draw(logits.expand(3000, -1), how, [source] * 3000).tolist())
        assert set(counts) <= wanted
        total = sum(float(chances[token]) for token in wanted)
        for token in wanted:
            share = float(chances[token]) / total
            assert counts[token] / 3000 == pytest.approx(share, abs=4 * (share * (1 - share) / 3000) ** 0.5 + 1e-9)
    cold = SimpleNamespace(temperature=0.001, top_p=1.0)
    assert int(draw(torch.tensor([[1e4, -1e4, 9.9e3]]), cold, [torch.Generator()])) == 0


def test_a_judge_scores_every_text() -> None:
    heard: list[str] = []

    def judge(text: str) -> float:
        heard.append(text)
        return len(text)

    got = steer(load("llama"), NODES, TINY, factor=0, max_new_tokens=3, random=1, n=2, judge=judge)
    assert got.samples is not None
    texts = [
        got.unsteered,
        got.steered,
        got.control,
        *got.samples.unsteered,
        *got.samples.steered,
        *got.samples.control,
    ]
    assert [one.score for one in texts if one is not None] == [float(len(one.text)) for one in texts if one is not None]
    assert len(heard) == len(texts) == 9
    unscored = steer(load("llama"), NODES, TINY, factor=0, max_new_tokens=3, random=1)
    assert unscored.steered is not None
    assert unscored.steered.score is None

    def fails(_: str) -> float:
        raise ValueError("no answer")

    for bad, part in ((fails, "ValueError: no answer"), (lambda _: "good", "no number"), (lambda _: True, "no number")):
        with refused(JobError, "judge", part):
            steer(load("llama"), NODES, TINY, factor=0, max_new_tokens=3, random=0, judge=bad)  # type: ignore[arg-type]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -1}, "from 0.001"),
    ({"temperature": float("nan")}, "from 0.001"),
    ({"temperature": 1e-9}, "from 0.001"),
    ({"temperature": True}, "from 0.001"),
    ({"top_p": 0}, "above 0"),
    ({"top_p": 1.1}, "at most 1"),
    ({"n": 0}, "whole numbers"),
    ({"n": 2, "sample_seed": -1}, "whole numbers"),
    ({"temperature": 0, "n": 2}, "greedy"),
    ({"temperature": 0, "top_p": 0.5}, "greedy"),
    ({"temperature": 0, "sample_seed": 1}, "greedy"),
    ({"n": 2, "max_new_tokens": 0}, "no text"),
]


@pytest.mark.parametrize(("how", "part"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_sampling_is_an_error(how: dict[str, Any], part: str) -> None:
    with refused(JobError, part):
        steer(load("llama"), NODES, TINY, factor=0, **how)
