"""Options as people meet them: panels, choices with what was meant, completion; and one list of each choice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import typer
from typer.core import TyperOption
from typer.testing import CliRunner

from tracer import choices
from tracer.circuit import exchange
from tracer.cli import dressing
from tracer.cli.app import VERBS, app
from tracer.model import model
from tracer.runs.jobs import load_job

NAMES = [one.__name__.rstrip("_") for one in VERBS]


@pytest.mark.parametrize("verb", NAMES)
def test_help_fits_80_columns_and_is_in_panels(verb: str) -> None:
    done = CliRunner().invoke(app, [verb, "-h"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert done.exit_code == 0, done.output
    assert max(map(len, done.output.splitlines())) <= 80
    assert "2147483647" not in done.output
    assert "…" not in done.output.partition("Options")[2].replace("...", "")
    panels = [line for line in done.output.splitlines() if line.startswith("╭─")]
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    if len([one for one in command.params if isinstance(one, TyperOption) and not one.hidden]) > 10:
        assert len(panels) >= 3


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trace", "x", "--method", "grd"], "--method grd: must be one of relp, grad"),
        (["trace", "x", "--without-rule", "nrm"], "did you mean 'norm'?"),
        (["evaluate", "x", "--ablation", "resampl"], "did you mean 'resample'?"),
        (["export", "x", "--format", "graphm"], "did you mean 'graphml'?"),
        (["group", "x", "--method", "spectra"], "did you mean 'spectral'?"),
        (["swap", "--task", "state"], "did you mean 'states'?"),
        (["run", "x", "--out", "y", "--dtype", "bfloat"], "did you mean 'bfloat16'?"),
        (["neuron", "1", "3", "--top", "5000"], "--top 5000: must be at most 1,000"),
        (["init", "dataste"], "KIND dataste: must be one of dataset, sva"),
    ],
)
def test_values_are_checked_before_anything_is_imported(words: list[str], expected: str) -> None:
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2
    assert refused.stderr.count("\n") == 1
    assert expected in refused.stderr


def test_choices_are_those_that_the_package_knows() -> None:
    assert set(get_args(choices.GraphFormat)) == set(exchange.FORMATS)
    assert get_args(choices.Dtype) == (*model.DTYPES, *model.QUANTIZED)
    assert get_args(choices.AttentionKernel) == model.KERNELS
    assert set(get_args(choices.MetricName)) < set(get_args(choices.MetricKind))
    assert set(get_args(choices.PlainRule)) < set(get_args(choices.Rule))
    both = (*get_args(choices.Structure), *get_args(choices.Opposites))
    assert get_args(choices.PairStructure) == both


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"kind": "datset"}, "did you mean 'dataset'?"),
        (
            {"kind": "dataset", "input": {"task": "sva"}, "nods": 3},
            "key 'nods': is not known to a dataset job; did you",
        ),
        ({"kind": "dataset", "input": {"taks": "sva"}}, "key 'input.taks': is not known in input of"),
        ({"kind": "dataset", "input": {"path": "x.jsonl"}, "method": "grd"}, "did you mean 'grad'?"),
        ({"kind": "dataset", "input": {"task": "sva"}, "zzz": 3}, "use model, bos"),
    ],
)
def test_keys_and_values_of_jobs_say_what_was_meant(content: dict[str, object], expected: str) -> None:
    with pytest.raises(Exception, match=r".") as refused:
        load_job(content)
    assert expected in str(refused.value)


def completed(*words: str) -> list[str]:
    """What a shell gets for the last word."""
    asked = {
        "_TRACER_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(("tracer", *words)),
        "COMP_CWORD": str(len(words)),
    }
    code = "import sys; sys.argv = ['tracer']; from tracer.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout.split()


def test_verbs_choices_and_run_folders_are_completed(tmp_path: Path) -> None:
    for name in ("run-1", "run-2"):
        (tmp_path / name).mkdir()
    (tmp_path / "run-1" / "run.json").write_text("{}")
    assert completed("sho") == ["show"]
    assert completed("trace", "x", "--method", "ig") == ["ig", "ig-activation"]
    assert completed("show", f"{tmp_path}/ru") == [f"{tmp_path}/run-1", f"{tmp_path}/run-2/"]
    assert list(dressing.job_files(f"{tmp_path}/run-1/")) == []


def test_old_names_are_taken_for_one_release_with_the_new_one_said(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = CliRunner().invoke(app, ["trace", "x", "--local-weights"])
    assert "note: --local-weights is now --weights local" in refused.stderr
    assert "error: --weights local: has no effect without --remote" in refused.stderr
    assert "--local-weights" not in CliRunner().invoke(app, ["trace", "-h"]).output
