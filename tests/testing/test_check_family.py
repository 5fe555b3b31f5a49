"""The families' own check: everything holds where it must, what is wrong is found, and what cannot be is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

import tracer
from helpers import refused
from tracer import ModelError
from tracer.model import rules
from tracer.testing import Check, FamilyReport, check_family
from tracer.testing.configs import OPTIONS, configurations

QUICK = ("llama", "gpt2", "gemma3_text", "falcon", "granite", "youtu", "qwen3_5_text", "gpt_oss", "qwen3_moe")
"""Those that are the least like another are checked at every change; ``make slow`` checks all."""
CASES = [
    pytest.param(family, name, marks=() if name in QUICK else pytest.mark.slow, id=name)
    for family in OPTIONS
    for name in configurations(family)
]


def small(family: str = "llama", **over: Any) -> Any:
    config = configurations(family)[family]
    return type(config).from_dict({**config.to_dict(), "num_hidden_layers": 2, **over})


@pytest.mark.parametrize(("family", "name"), CASES)
def test_every_identity_holds(family: str, name: str) -> None:
    report = check_family(configurations(family)[name])
    assert report.require() is report
    assert report.family == family
    assert {check.group for check in report.checks} == {"parity", "conservation", "edges", "state"}
    assert all(check.passed is not None or check.note for check in report.checks)


def test_what_comes_of_biases_is_said_and_accounted_for() -> None:
    biased, other = check_family(small("gpt2")), check_family(small("llama"))
    for name in ("embeddings add up", "incoming of neurons", "incoming of logits"):
        assert "comes of biases" in biased[name].note
        assert biased[name].passed
        assert not other[name].note


SABOTAGE = {
    "a norm that is not held": ("norm", "linearised gradients"),
    "a pattern that is not held": ("attention", "linearised gradients"),
    "an activation that is not linear": ("activation", "linearised gradients"),
    "a product without its half": ("product", "linearised gradients"),
}


@pytest.mark.parametrize("what", SABOTAGE)
def test_a_rule_that_does_nothing_is_found(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, broken = SABOTAGE[what]
    kinds = {kind: (name, (lambda _: None) if name == rule else does) for kind, (name, does) in rules.RULE_OF.items()}
    monkeypatch.setattr(rules, "RULE_OF", kinds)
    report = check_family(small())
    assert report[broken].passed is False
    assert not report.passed


def test_a_rule_that_changes_the_forward_pass_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "half", lambda value: 0.5 * value)
    report = check_family(small())
    assert report["forward to the bit"].passed is False
    assert report["forward to the bit in bfloat16"].passed is False


def test_what_cannot_be_checked_is_refused() -> None:
    with refused(ModelError, "'no configuration'"):
        check_family("no configuration")
    with refused(ModelError, "parameters", "few layers"):
        check_family(small(hidden_size=4096, intermediate_size=16384, head_dim=1024))
    with refused(ModelError, "'mamba'", "tracer.register_family"):
        check_family(AutoConfig.for_model("mamba", vocab_size=64, hidden_size=16, num_hidden_layers=1))
    with refused(ModelError, "'vit'", "makes no language model"):
        check_family(AutoConfig.for_model("vit"))


def test_another_tokenizer_and_seed_and_progress() -> None:
    import tiny

    seen: list[tuple[int, int]] = []
    one = check_family(small(), tokenizer=tiny.tokenizer(), seed=3, progress=lambda *at: seen.append(at))
    two = check_family(small(), seed=3)
    assert one.require().checks[0].value == pytest.approx(two.checks[0].value)
    assert seen == [(number + 1, len(one.checks)) for number in range(len(one.checks))]


def test_the_callers_module_is_left_alone() -> None:
    module = tracer.load("demo").module
    before = {name: value.clone() for name, value in module.named_parameters()}
    report = check_family(module)
    assert report.require()["forward to the bit in bfloat16"].passed is None
    assert all(torch.equal(value, before[name]) for name, value in module.named_parameters())


def test_a_report_says_what_is_furthest_off() -> None:
    checks = (
        Check("a", "parity", 1e-6, 1e-5, True),
        Check("b", "parity", 0.0, 0.0, True),
        Check("c", "edges", None, None, False, "it broke"),
        Check("d", "edges", None, None, None, "it has none"),
    )
    report = FamilyReport("mine", checks, 7)
    assert report.worst("parity") is checks[0]
    assert report.worst("edges") is checks[2]
    assert report.worst("state") is None
    assert str(checks[2]) == "edges: c: FAILED: it broke"
    assert str(checks[3]) == "edges: d: does not apply: it has none"
    assert report.record()["checks"][0]["value"] == 1e-6
    with refused(ModelError, "'mine'", "1 of 4 checks failed: c"):
        report.require()
