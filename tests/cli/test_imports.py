"""Verbs that read files import nothing that computes: looked up in `sys.modules`, not on a clock."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import tracer
from loaded import COMPUTES, loaded_by

VERBS = {
    "show": ("show", "{run}"),
    "view": ("view", "{run}"),
    "export": ("export", "{run}", "--format", "graphml"),
    "help": ("trace", "--help"),
    "version": ("--version",),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "one"
    tracer.trace(tracer.load("demo"), tracer.Prompt("The parents", target=" are"), nodes=20).save(folder)
    return folder


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_that_reads_files_does_not_import_what_computes(verb: str, run: Path) -> None:
    assert loaded_by(*(word.format(run=run) for word in VERBS[verb])) & COMPUTES == set()


def test_importing_tracer_imports_nothing() -> None:
    code = "import sys, tracer; sys.exit(len({'torch', 'pyarrow', 'rich', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
