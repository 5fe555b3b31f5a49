"""What examples/ prints is what its README and its notebooks say, and it uses nothing but public names."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

import run_examples as examples
import tracer

ROOT = examples.ROOT
NOTEBOOKS = (examples.DEMO, examples.REAL)
LIMIT = 300_000
"""Bytes of a notebook."""
LINES = {"relp_in_100_lines": 100}
MACHINE = re.compile(r"/(?:home|root|tmp|work|opt|usr|Users|mnt)/|https?://(?:localhost|127\.)|/simple/|site-packages")
"""What a machine and not the example wrote."""
PUBLIC = {("tracer.testing", "check_family")}
"""What docs/families.md has users import besides."""


def committed(name: str) -> Any:
    return nbformat.read(examples.EXAMPLES / f"{name}.ipynb", as_version=4)


def run(*names: str) -> str:
    """The examples compared with what is committed, in a process of their own: one registers a family."""
    command = [sys.executable, str(ROOT / "tools" / "run_examples.py"), "--check", *names]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.process
def test_scripts_print_what_the_readme_says() -> None:
    names = [name for name in examples.scripts() if name != examples.REMOTE]
    said = run(*names)
    assert [line.removeprefix("== ") for line in said.splitlines() if line.startswith("== ")] == names


@pytest.mark.process
def test_the_demo_notebook_shows_what_is_committed() -> None:
    assert "== demo" in run(examples.DEMO)


@pytest.mark.server
def test_the_remote_script_prints_what_the_readme_says(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    said = examples.excerpt(examples.printed(examples.REMOTE, "demo"))
    assert examples.apart(said, examples.committed(examples.REMOTE)) == []
    assert server.seen()


def test_without_a_server_the_remote_script_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NDIF_HOST", "NDIF_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit, match="NDIF_API_KEY"):
        examples.printed(examples.REMOTE)


# ------------------------------------------------------------------------------------------ what they are


@pytest.mark.parametrize("name", examples.scripts())
def test_a_script_says_what_it_shows_takes_and_needs(name: str) -> None:
    path = examples.EXAMPLES / f"{name}.py"
    text = path.read_text(encoding="utf-8")
    said = ast.get_docstring(ast.parse(text)) or ""
    assert re.search(r"\bTakes\b", said), said
    assert re.search(r"\b[Nn]eeds\b", said), said
    assert f"python examples/{name}.py" in said
    assert len(text.splitlines()) <= LINES.get(name, 80)
    assert f"[{path.name}]({path.name})" in examples.README.read_text(encoding="utf-8")
    assert examples.committed(name).strip()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_its_source_executed(name: str) -> None:
    found, source = committed(name), examples.source(name)
    assert [(cell.cell_type, cell.source) for cell in found.cells] == [
        (cell.cell_type, cell.source) for cell in source.cells
    ]
    code = [cell for cell in found.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [one for cell in code for one in cell.outputs if one.output_type == "error"]
    assert f"[{name}.ipynb]({name}.ipynb)" in examples.README.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_small_and_says_nothing_of_its_machine(name: str) -> None:
    assert (examples.EXAMPLES / f"{name}.ipynb").stat().st_size < LIMIT
    found = committed(name)
    for cell in found.cells:
        for one in cell.get("outputs", ()):
            one.get("data", {}).pop("image/png", None)  # base64 has slashes
    assert MACHINE.findall(nbformat.writes(found)) == []


def private(text: str) -> Iterator[str]:
    """Names of tracer's in a program that users are not told of."""
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Attribute(value=ast.Name(id="tracer"), attr=name) if name not in {*tracer.__all__, "__file__"}:
                yield f"tracer.{name}"
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            yield node.attr
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "tracer":
            yield from (f"{node.module}.{one.name}" for one in node.names if (node.module, one.name) not in PUBLIC)
        if isinstance(node, ast.Import):
            yield from (one.name for one in node.names if one.name.startswith("tracer."))


@pytest.mark.parametrize(
    "path", [*examples.EXAMPLES.glob("*.py"), *examples.SOURCES.glob("*.py")], ids=lambda one: one.stem
)
def test_examples_use_public_names_alone(path: Path) -> None:
    assert list(private(path.read_text(encoding="utf-8"))) == []


def test_private_names_are_found() -> None:
    text = "import tracer.model\nfrom tracer.store import parquet\ntracer.nothing(model._module)"
    assert sorted(private(text)) == ["_module", "tracer.model", "tracer.nothing", "tracer.store.parquet"]


@pytest.mark.parametrize(
    ("now", "before", "same"),
    [
        ("L1 N13 +2.439 (+39%)", "L1 N13 +2.4391 (+39%)", True),
        ("L1 N14 +2.439", "L1 N13 +2.439", False),  # a neuron's number is its name
        ("keep 0.69 of 9,216", "keep 0.63 of 9,216", False),
        ("keep 0.69 of 9,216", "keep 0.69 of 9,300", True),
        ("keep 0.69 of 9,216", "keep 0.69 of 9,600", False),
        ("unexplained +4.8e-07", "unexplained -1.2e-06", True),  # roundings
        ("unexplained +4.8e-01", "unexplained +4.8e-07", False),
        ("' Pierre.'", "' Austin.'", False),
        ("a  1.00", "a 1.00", True),
    ],
)
def test_lines_are_alike_up_to_arithmetic(now: str, before: str, same: bool) -> None:
    assert examples.alike(now, before) is same


def test_missing_lines_are_told() -> None:
    assert examples.apart("a\n", "a\nb\n") == ["1 lines fewer than committed"]
