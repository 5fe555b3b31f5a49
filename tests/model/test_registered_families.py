"""A family that is not in the package: registered, checked, traced, refused where it is wrong, found by workers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
import toy_family as toy
import tracer
from helpers import refused
from tracer import Layout, ModelError, Step, Weight
from tracer.model import families, rules
from tracer.testing import check_family
from tracer.testing.models import random_model

NORMS: dict[str, Any] = {"rms_norm": [toy.ToyRMSNorm]}
ACTIVATIONS: dict[Any, Any] = {toy.ToyAct: toy.factor}


@pytest.fixture(autouse=True)
def _nothing_stays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    toy.known_to_transformers()
    monkeypatch.setattr(families, "LINEAR", set(families.LINEAR))
    kept: list[dict[Any, Any]] = [families.FAMILIES, families.NORM_CLASSES, rules.FACTORS]
    before = [dict(one) for one in kept]
    yield
    for one, was in zip(kept, before, strict=True):
        one.clear()
        one.update(was)


def registered(**over: Any) -> tracer.Family:
    return tracer.register_family(toy.family(**over), norms=NORMS, activations=ACTIVATIONS)


def test_a_family_of_ones_own_holds_every_identity() -> None:
    registered()
    report = check_family(toy.config()).require()
    assert report.family == "toy_outside"
    assert report["embeddings add up"].passed


def test_a_module_of_ones_own_is_checked_as_it_is() -> None:
    registered()
    report = check_family(random_model(toy.config())).require()
    assert report["attention kernels"].passed is None
    assert "a module was given" in report["attention kernels"].note


def test_a_circuit_of_it_is_traced() -> None:
    registered()
    model = tracer.load(random_model(toy.config()), tokenizer=tiny.tokenizer())
    circuit = tracer.trace(model, tracer.Prompt(token_ids=[1, 6, 7, 8], target=20), nodes=10)
    assert circuit.model.family == "toy_outside"
    assert circuit.edges.num_rows


def test_what_is_not_registered_is_refused_and_says_how() -> None:
    with refused(ModelError, "'toy_outside'", "tracer.register_family", "docs/families.md"):
        check_family(toy.config())


@pytest.mark.parametrize("missing", ["norms", "activations"])
def test_classes_without_a_rule_are_refused(missing: str) -> None:
    given: dict[str, Any] = {"norms": NORMS, "activations": ACTIVATIONS} | {missing: None}
    tracer.register_family(toy.family(), **given)
    with refused(ModelError, {"norms": "ToyRMSNorm", "activations": "ToyAct"}[missing]):
        check_family(toy.config())


def test_registering_twice_changes_nothing_and_another_of_that_name_is_refused() -> None:
    assert registered() is registered()
    with refused(ModelError, "'toy_outside'", "a family that is known"):
        registered(norm_offset=1.0)
    with refused(ModelError, "'gpt2'", "a family that is known"):
        registered(name="gpt2")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"norms": {"layer_norm": [toy.LlamaRMSNorm]}}, "LlamaRMSNorm"),
        ({"norms": {"group_norm": ["Mine"]}}, "no kind of norm"),
        ({"activations": {"SiLU": toy.factor}}, "SiLU"),
        ({"activations": {"Mine": lambda z: torch.tanh(z) / z}}, "factor of Mine"),
        ({"linear": ["LayerNorm"]}, "LayerNorm"),
    ],
)
def test_classes_that_have_a_rule_keep_it(given: dict[str, Any], says: str) -> None:
    before = dict(families.FAMILIES), dict(families.NORM_CLASSES), dict(rules.FACTORS), set(families.LINEAR)
    with refused(ModelError, says):
        tracer.register_family(toy.family(), **given)
    assert before == (families.FAMILIES, families.NORM_CLASSES, rules.FACTORS, families.LINEAR)


def layout(drop: str = "", **wiring: Any) -> Layout:
    (given,) = toy.family().layouts
    steps = tuple(step for step in given.steps if drop not in (step.kind, step.path))
    return Layout(steps, families.replace(given.wiring, **wiring))


SWAPPED = layout(gate=Weight("mlp.up_proj"), up=Weight("mlp.gate_proj"))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (layout(drop="attention"), "0 steps 'attention'"),
        (layout(drop="neurons"), "0 steps 'neurons'"),
        (layout(drop="product"), "a gate without the step"),
        (layout(gate=None), "without a gate"),
        (layout(drop="input_layernorm"), "input_layernorm"),
        (layout(value=Weight("self_attn.v_proj", "middle")), "'middle'"),
        (Layout((*layout().steps, Step("maxout", "mlp")), layout().wiring), "maxout"),
    ],
)
def test_a_layout_that_cannot_be_right_is_refused(wrong: Layout, says: str) -> None:
    with refused(ModelError, "Layout", says):
        registered(layouts=(wrong,))


@pytest.mark.parametrize(
    ("over", "broken"),
    [
        ({"norm_offset": 1.0}, "edges by replay"),
        ({"layouts": (SWAPPED,)}, "edges by replay"),
        ({"layouts": (layout(value=Weight("self_attn.k_proj")),)}, "edges by replay"),
    ],
)
def test_the_check_finds_what_is_wrong_in_a_family(over: dict[str, Any], broken: str) -> None:
    registered(**over)
    report = check_family(toy.config())
    assert not report.passed
    assert report[broken].passed is False
    with refused(ModelError, "'toy_outside'", broken):
        report.require()


def test_the_check_finds_a_wrong_factor() -> None:
    tracer.register_family(toy.family(), norms=NORMS, activations={toy.ToyAct: torch.sigmoid})
    report = check_family(toy.config())
    assert report["linearised gradients"].passed is False
    assert report["embeddings add up"].passed is False


# ---------------------------------------------------------------- other processes

LOADS = """
import sys, tracer, torch
model = tracer.load(sys.argv[1])
circuit = tracer.trace(model, tracer.Prompt(token_ids=[1, 6, 7, 8], target=20), nodes=10)
print(model.family.name, circuit.edges.num_rows > 0)
"""


def package(folder: Path, entry: str) -> dict[str, str]:
    """The environment of a process in which a package that names `entry` is installed."""
    info = folder / "toy_outside-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-outside\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{families.GROUP}]\ntoy = {entry}\n")
    where = [str(folder), str(Path(toy.__file__).parent), str(Path(tracer.__file__).parent.parent)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(where), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def loaded(folder: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LOADS, str(folder)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_process_of_its_own_finds_it_by_its_entry_point(tmp_path: Path) -> None:
    folder = tiny.save(random_model(toy.config()), tmp_path / "model")
    there = loaded(folder, package(tmp_path / "there", "toy_family:register"))
    assert there.stdout.split() == ["toy_outside", "True"], there.stderr
    broken = loaded(folder, package(tmp_path / "broken", "toy_family:nothing"))
    assert "entry point neuron_tracer.families toy of the package toy-outside" in broken.stderr
    without = loaded(folder, dict(os.environ)).stderr.splitlines()[-1]
    assert "ModelError" in without
    assert "'toy_outside'" in without
