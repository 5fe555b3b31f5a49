"""``python -m tracer.testing``: a table, JSON, an exit code; and a tiny configuration of every family."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer import Typer
from typer.testing import CliRunner

from tracer.model.families import FAMILIES
from tracer.testing import __main__ as command
from tracer.testing import checks
from tracer.testing.configs import OPTIONS, configurations


@pytest.fixture
def run() -> Any:
    app = Typer()
    app.command()(command.main)
    return lambda *given: CliRunner().invoke(app, list(given))


def test_every_family_has_a_tiny_configuration() -> None:
    assert set(OPTIONS) == set(FAMILIES)
    for name in OPTIONS:
        for config in configurations(name).values():
            assert config.model_type == name


def test_a_table_of_what_was_asked_for(run: Any) -> None:
    found = run("--family", "gpt_neox")
    assert found.exit_code == 0
    for word in ("gpt_neox", "sequential", "parity", "conservation", "biases", "edges", "time"):
        assert word in found.stdout


def test_json_has_every_check(run: Any) -> None:
    found = run("--family", "qwen3", "--json")
    records = json.loads(found.stdout)
    assert [one["name"] for one in records] == ["qwen3", "qwen3 (biases)"]
    assert [check["name"] for check in records[0]["checks"]] == [name for name, _, _ in checks.CHECKS]
    assert all(one["passed"] for one in records)


def test_a_failed_check_is_named_and_the_exit_code_is_one(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "PARITY", 0.0)
    found = run("--family", "mistral")
    assert found.exit_code == 1
    assert "mistral: parity: linearised gradients: FAILED" in " ".join(found.stdout.split())


def test_an_unknown_family_is_refused(run: Any) -> None:
    found = run("--family", "nothing")
    assert found.exit_code == 2
    assert "check_family(config)" in found.output
