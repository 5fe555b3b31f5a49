"""Contrastive search: values against plain PyTorch hooks, and what it finds, refuses and leaves out."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from typer.testing import CliRunner

import tracer
from helpers import load, refused
from tracer.cli.app import app
from tracer.data.tasks import sva
from tracer.errors import JobError, TracerWarning
from tracer.meaning.separation import Labels, halved
from tracer.model import passes
from tracer.prompts import Batch, encode
from truth import close

HOW: dict[str, Any] = {"permutations": 499}
POSITIONS = ("last", "mean", "max")


def by_hooks(model: tracer.Model, ids: tuple[int, ...], basis: str) -> Tensor:
    """Values of one prompt's neurons [layer, pos, neuron], in plain PyTorch."""
    kept: list[Tensor] = []
    downs = [one for name, one in model.module.named_modules() if name.endswith(model.layouts[0].down)]
    handles = [
        down.register_forward_hook(lambda _, given, out: kept.append(given[0] if basis == "activation" else out))
        for down in downs
    ]
    with torch.no_grad():
        model.module(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    assert len(kept) == model.n_layers
    return torch.stack([one[0].detach().float() for one in kept])


def sides(values: Tensor, how: str) -> Tensor:
    both = torch.stack([values.clamp_min(0), (-values).clamp_min(0)])  # [side, layer, pos, neuron]
    pooled = {"last": both[:, :, -1], "mean": both.mean(2), "max": both.amax(2)}[how]
    return pooled.transpose(0, 1)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi3"])
@pytest.mark.parametrize("basis", ["activation", "output"])
def test_values_are_those_of_each_prompt_alone_in_plain_pytorch(family: str, basis: str) -> None:
    model = load(family)
    ids = ((5, 6, 7), (8, 9, 10, 11, 12), (13, 14))
    for how in POSITIONS:
        found = passes.pooled(model, Batch(ids), how, basis=basis)
        wanted = torch.stack([sides(by_hooks(model, one, basis), how) for one in ids])
        assert close(found, wanted)


@functools.cache
def prompts(count: int = 40) -> tuple[list[str], list[str]]:
    """Plural and singular subjects, minimal pairs, each once."""
    pairs = {tuple(sorted((one.prompt, one.counterfactual))): one for one in sva.generate("simple", "train", count)}
    plural, singular = [], []
    for one in pairs.values():
        both = [one.prompt, one.counterfactual]
        plural.append(both[one.case != "plural"])
        singular.append(both[one.case == "plural"])
    return plural, singular


@pytest.mark.parametrize("position", POSITIONS)
def test_number_neurons_are_found_without_a_target(position: str) -> None:
    model = tracer.load("demo")
    plural, singular = prompts()
    found = tracer.contrast(model, plural, singular, position=position, paired=position == "max", **HOW)
    assert found.concepts[0].n_columns == 2 * model.n_layers * model.n_neurons("activation")
    assert found.concepts[0].n_found >= 20
    rows = found.table.to_pylist()
    assert rows[0]["auroc"] in (0.0, 1.0)
    assert {row["polarity"] for row in rows} == {1, -1}
    if position != "last":
        return
    ids = [encode(tracer.Prompt(one), model).token_ids for one in (*plural, *singular)]
    values = torch.stack([sides(by_hooks(model, one, "activation"), "last") for one in ids])
    codes = np.repeat([1, 0], len(plural))
    other = ~halved(Labels(codes, (1,)), 0)
    for row in rows[:10]:
        one = values[:, row["layer"], 0 if row["polarity"] > 0 else 1, row["neuron"]].numpy()
        assert row["auroc"] == pytest.approx(roc_auc_score(codes[other], one[other]), abs=0.02)


def test_two_sets_of_one_kind_are_not_told_apart() -> None:
    model = tracer.load("demo")
    plural, singular = prompts()
    one, other = [*plural[::2], *singular[::2]], [*plural[1::2], *singular[1::2]]
    found = tracer.contrast(model, one, other, **HOW)
    assert found.concepts[0].n_found == 0
    first = found.table.to_pylist()[0]
    assert abs(first["auroc_chosen_on"] - 0.5) > 0.2
    assert first["low"] <= 0.5 <= first["high"]


def test_batches_change_nothing_and_are_told() -> None:
    model = load("llama")
    draw = torch.Generator().manual_seed(0)
    ids = [tracer.Prompt(token_ids=row) for row in torch.randint(4, 90, (24, 5), generator=draw).tolist()]
    told: list[tuple[int, int]] = []
    whole = tracer.contrast(model, ids[:12], ids[12:], **HOW)
    small = tracer.contrast(model, ids[:12], ids[12:], memory=1, progress=lambda *one: told.append(one), **HOW)
    assert told == [(i + 1, 24) for i in range(24)]
    assert whole.table.select(["layer", "neuron"]).equals(small.table.select(["layer", "neuron"]))


def test_a_prompt_that_comes_again_is_left_out_and_said() -> None:
    model = load("llama")
    draw = torch.Generator().manual_seed(0)
    ids = [tracer.Prompt(token_ids=row) for row in torch.randint(4, 90, (16, 5), generator=draw).tolist()]
    with pytest.warns(TracerWarning, match="3 of 19 prompts came before in their set: left out"):
        found = tracer.contrast(model, [*ids[:8], *ids[:3]], ids[8:], **HOW)
    assert found.concepts[0].n_prompts == 16
    with pytest.warns(TracerWarning, match="2 of 18 prompts came before as pairs: left out"):
        tracer.contrast(model, [*ids[:8], ids[0]], [*ids[8:], ids[8]], paired=True, **HOW)
    with refused(JobError, "4 positive", "too few"):
        tracer.contrast(model, ids[:4] * 3, [ids[9]] * 12, **HOW)


@pytest.mark.parametrize(
    ("sizes", "how", "parts"),
    [
        ((3, 9), {}, ["3 positive and 9 negative", "too few"]),
        ((8, 9), {"paired": True}, ["not pairs", "paired"]),
        ((8, 8), {"position": "first"}, ["position='first'", "last, mean, max"]),
        ((8, 8), {"basis": "input"}, ["basis='input'"]),
        ((8, 8), {"permutations": 5}, ["permutations=5"]),
    ],
)
def test_what_cannot_be_compared_is_refused(sizes: tuple[int, int], how: dict[str, Any], parts: list[str]) -> None:
    with refused(JobError, *parts):
        tracer.contrast(load("llama"), ["a"] * sizes[0], ["b"] * sizes[1], **how)


def test_the_verb_compares_two_files(tmp_path: Path) -> None:
    for name, texts in zip(("plural", "singular"), prompts(), strict=True):
        (tmp_path / f"{name}.txt").write_text("\n".join(texts))
    files = [str(tmp_path / f"{name}.txt") for name in ("plural", "singular")]
    given = ["contrast", *files, "--paired", "--permutations", "499", "--out", str(tmp_path / "c.parquet")]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    assert "set = positive: 10 of 50 candidates" in done.output
    assert pq.read_table(tmp_path / "c.parquet").num_rows == 50
    wrong = CliRunner().invoke(app, ["contrast", *files, "--position", "first"])
    assert wrong.exit_code == 2
    assert "--position first" in wrong.output
    (tmp_path / "few.txt").write_text("a\nb\n")
    assert "too few" in CliRunner().invoke(app, ["contrast", files[0], str(tmp_path / "few.txt")]).output
