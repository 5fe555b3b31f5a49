"""The reference has every public name, verb, option, key, table and variable; and the links of README hold."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import tracer

docs_python = pytest.importorskip("docs_python", reason="the extra docs is not installed")
import docs_cli  # noqa: E402
import docs_docstrings  # noqa: E402
import docs_jobs  # noqa: E402
import docs_links  # noqa: E402
import docs_messages  # noqa: E402
import docs_tables  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(tracer.__file__).parent
VARIABLE = re.compile(r"^(?:TRACER|NDIF|RAY|SLURM|CUDA|OMP|MKL|OPENBLAS|NUMEXPR|ARROW|TOKENIZERS)_[A-Z_]+$")
INNER = frozenset({"RAY_REDIS_ADDRESS"})
"""Only taken out of the environment of a Ray that is started: another's address would be asked."""


def test_every_public_name_has_an_entry_on_one_page() -> None:
    entries = [
        name for _, text in docs_python.pages().values() for name in re.findall(r"^::: tracer\.(\w+)$", text, re.M)
    ]
    assert sorted(entries) == sorted(tracer.__all__) == sorted(vars(tracer)["_HOME"])
    for name in tracer.__all__:
        assert f"[`tracer.{name}`]" in docs_python.index()


def test_every_verb_and_option_is_there() -> None:
    from tracer.cli.app import VERBS

    pages = docs_cli.pages()
    assert {verb.__name__.rstrip("_") for verb in VERBS} == set(docs_cli.verbs())
    for verb, command in docs_cli.verbs().items():
        text = pages[docs_cli.path(verb)][1]
        for one in command.params:
            for name in docs_cli.names(one) if one.name != "help" and not one.hidden else ():
                assert f"`{name}`" in text, f"{verb} {name}"


def test_every_key_of_a_job_is_explained() -> None:
    for name, record in docs_jobs.records().items():
        said = docs_jobs.described(record)
        assert [key for key in record.model_fields if key != "kind" and not said[key]] == [], name
    assert {"Source", "Evaluate", "PruningRules", "Asked"} <= set(docs_jobs.records())


def test_every_table_is_explained_and_shown_whole() -> None:
    page, said = docs_tables.page(), docs_tables.documented()
    for name, schema in docs_tables.tables().items():
        assert said.get(name), name
        title = docs_tables.FILES.get(name, (name.lower(), ""))[0]
        section = page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
        assert re.findall(r"^\| `(\w+)` \|", section, re.M) == schema.names


def test_every_variable_that_is_read_or_set_is_listed() -> None:
    listed = (ROOT / "docs" / "reference" / "environment.md").read_text(encoding="utf-8")
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and VARIABLE.match(node.value):
                found.add(node.value)
    assert {"NDIF_HOST", "TRACER_LLM_URL", "SLURM_JOB_ID"} <= found
    assert sorted(name for name in found - INNER if f"`{name}`" not in listed) == []


def test_docstrings_are_split_by_their_arguments() -> None:
    text = "Do.\n\nArgs:\n    a, b: both. c: one more\n        line.\n\nRaises:\n    JobError: no.\n"
    assert docs_docstrings.entries(text, ["a", "b", "c"]) == {"a": "both.", "b": "both.", "c": "one more line."}
    shown = docs_docstrings._rewritten(text + "\nSource: method.md section 5.", ["a", "b", "c"])
    assert "    c: one more line.\n" in shown
    assert "[method.md section 5][5-circuits]" in shown


def test_every_section_of_the_method_that_docstrings_name_is_there() -> None:
    named = set()
    for path in PACKAGE.rglob("*.py"):
        named |= set(re.findall(r"method\.md sections? (\d\w?)", path.read_text(encoding="utf-8")))
    assert named
    assert named <= set(docs_docstrings.sections())


def test_links_out_of_the_docs_lead_to_pages() -> None:
    text = (
        "[job](../jobs/dataset.yaml), [all](../jobs/clusters), [card](../tracer/demo/model/README.md), [x](../x.py)\n"
    )
    shown = docs_links.mended(f"{text}```sh\n{text}```\n", "runs.md")
    assert "[job](reference/job-files.md#jobs-dataset-yaml), [all](reference/job-files.md)" in shown
    assert "[card](reference/demo-model.md), x" in shown
    assert shown.endswith(f"```sh\n{text}```\n")


def test_messages_are_those_that_are_raised() -> None:
    found = docs_messages.messages()
    rules = {one.rule for one in found}
    assert "holds no run (no run.json)" in rules
    assert len(found) > 400


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_of_the_repository_hold(name: str) -> None:
    from markdown.extensions.toc import slugify

    text = re.sub(r"```.*?```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)
    for address in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in address:
            continue
        path, _, anchor = address.partition("#")
        file = ROOT / (path or name)
        assert file.exists(), f"{name} links {address}"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            assert anchor in {slugify(head, "-") for head in heads}, f"{name} links {address}"
