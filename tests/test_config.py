"""Settings: every name known, every value in range, every setting with an effect."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
from pydantic import ValidationError

from helpers import refused
from tracer.errors import JobError
from tracer.settings import (
    ALL_RULES,
    BASELINES,
    BASES,
    LINEAR_GATE,
    LINEAR_METRICS,
    METHODS,
    METRICS,
    PATH_METHODS,
    RULED_METHODS,
    RULES,
    VARIANTS,
    Settings,
    TargetDirection,
    TargetNeuron,
    rules_name,
    rules_of,
    settings,
)

NEURON = TargetNeuron(layer=1, neuron=2)
WITH: dict[str, dict[str, Any]] = {
    "share": {"share": 0.5},
    "neuron": {"of": NEURON},
    "direction": {"of": TargetDirection(vector=(1.0, 0.5), layer=1)},
}
"""What a metric needs beside its name."""
WRONG: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"method": "attnlrp"}, ("method='attnlrp'", *METHODS)),
    ({"baseline": "median"}, ("baseline='median'", *BASELINES)),
    ({"basis": "stream"}, ("basis='stream'", *BASES)),
    ({"metric": "loss"}, ("metric='loss'", *METRICS)),
    ({"rules": ["norm", "softmax"]}, ("rules", "softmax", *sorted(ALL_RULES))),
    ({"rules": ["product", "gate"]}, ("'product' and 'gate'", "act(gate) * up")),
    ({"rules": "half"}, ("rules='half'", *VARIANTS, "rules=['half']")),
    ({"method": "ig", "steps": 0}, ("steps=0", "1")),
    ({"method": "ig", "steps": "many"}, ("steps='many'",)),
    ({"method": "ig", "steps": 2.5}, ("steps=2.5",)),
    ({"metric": "topk", "top_k": 0}, ("top_k=0", "1")),
    ({"method": "random", "seed": -1}, ("seed=-1", "0")),
    ({"layers": 3}, ("layers=3",)),
]
WITHOUT_EFFECT: list[tuple[dict[str, Any], str]] = [
    *[({"method": method, "rules": ["norm"]}, "rules") for method in METHODS if method not in RULED_METHODS],
    *[({"method": method, "steps": 3}, "steps") for method in METHODS if method not in PATH_METHODS],
    ({"method": "random", "baseline": "mean"}, "baseline"),
    ({"method": "random", "baseline": "counterfactual"}, "baseline"),
    ({"method": "conductance", "baseline": "mean"}, "mean"),
    *[({"metric": metric, "top_k": 3, **WITH.get(metric, {})}, "top_k") for metric in METRICS if metric != "topk"],
    *[({"method": method, "seed": 3}, "seed") for method in METHODS if method != "random"],
]


@pytest.mark.parametrize(("values", "parts"), WRONG, ids=lambda value: str(value)[:50])
def test_a_wrong_value_is_refused_by_name_value_and_what_is_allowed(
    values: dict[str, Any], parts: tuple[str, ...]
) -> None:
    with refused(JobError, *parts):
        settings(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(("values", "name"), WITHOUT_EFFECT, ids=str)
def test_a_setting_without_effect_is_refused(values: dict[str, Any], name: str) -> None:
    with refused(JobError, name, "effect"):
        settings(**values)  # type: ignore[arg-type]


def test_all_rules_are_on_for_relp_alone() -> None:
    assert settings().rules == RULES
    for method in METHODS:
        assert settings(method=method).rules == (RULES if method in RULED_METHODS else frozenset())
    assert settings(rules=[]).rules == frozenset()
    assert settings(rules=("norm",)).rules == {"norm"}


def test_every_combination_with_an_effect_is_accepted() -> None:
    for method, baseline, basis, metric in itertools.product(METHODS, BASELINES, BASES, METRICS):
        if (method == "random" and baseline != "zero") or (method == "conductance" and baseline == "mean"):
            continue
        chosen = settings(method=method, baseline=baseline, basis=basis, metric=metric, **WITH.get(metric, {}))
        assert (chosen.method, chosen.baseline, chosen.basis, chosen.metric) == (method, baseline, basis, metric)


def test_settings_are_frozen_and_equal_by_value() -> None:
    chosen = settings(rules=["norm", "product"])
    assert chosen == settings(rules=["product", "norm"])
    assert hash(chosen) == hash(settings(rules=["product", "norm"]))
    with pytest.raises((ValidationError, dataclasses.FrozenInstanceError)):
        chosen.method = "grad"


@pytest.mark.parametrize("metric", METRICS)
def test_conservation_holds_for_relp_with_all_rules_and_a_linear_metric(metric: str) -> None:
    asked: dict[str, Any] = {"metric": metric, **WITH.get(metric, {})}
    assert settings(**asked).conserves == (metric in LINEAR_METRICS)
    assert not settings(**asked, method="grad").conserves
    assert settings(**asked, rules=LINEAR_GATE).conserves == (metric in LINEAR_METRICS)
    for rules in (RULES, LINEAR_GATE):
        assert not any(settings(**asked, rules=rules - {rule}).conserves for rule in rules)


def test_a_set_of_rules_has_one_name_from_which_it_is_made_again() -> None:
    sets = [frozenset(part) for size in range(6) for part in itertools.combinations(ALL_RULES, size)]
    allowed = [one for one in sets if not {"product", "gate"} <= one]
    names = [rules_name(one) for one in allowed]
    assert len(set(names)) == len(allowed)
    assert [rules_of(name) for name in names] == allowed
    assert {"all", "no-half", "linear-gate", "none", "norm+attention"} <= set(names)
    for name, rules in VARIANTS.items():
        assert settings(rules=name).rules == rules
    for wrong in ("", "half", "norm+norm", "norm,attention", "product+gate"):
        with pytest.raises(ValueError, match="rules"):
            rules_of(wrong)


def test_settings_survive_json() -> None:
    for method in METHODS:
        chosen = settings(method=method)
        assert Settings.model_validate_json(chosen.model_dump_json()) == chosen
    for metric, more in WITH.items():
        chosen = settings(metric=metric, **more)
        assert Settings.model_validate_json(chosen.model_dump_json()) == chosen


def test_settings_of_circuits_that_are_of_tokens_are_written_as_before() -> None:
    assert set(settings().record()) == {"method", "baseline", "basis", "metric", "rules", "steps", "top_k", "seed"}
    assert settings(of=NEURON).record()["of"] == {"layer": 1, "neuron": 2, "sign": 1}
