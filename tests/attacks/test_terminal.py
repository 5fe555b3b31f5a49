"""Nothing that a prompt, a file, a folder's name or a statement holds reaches a terminal as a command to it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

import children
import tracer
from tally import Attack

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\x08\x7f\u202e\u2066\r"
STYLES = re.compile(r"\x1b\[(\?25[hl]|[0-9;]*m|[0-9]*[AK]|2K)|\r\n?")
"""What a table and a progress bar send themselves: styles, the cursor, and one line again."""


def on_terminal(commands: list[list[str]], folder: Path, seconds: float = 300) -> list[str]:
    """What commands print on a terminal, each with its exit code at its end."""
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "150", "OMP_NUM_THREADS": "1"}
    (folder / "commands.json").write_text(json.dumps(commands))
    said, _ = children.on_terminal(children.command("terminal", folder / "commands.json"), environment, seconds)
    return re.split(r"(?<=ended) -?\d+\s*", said.decode(errors="replace"))[:-1]


def commands_left(text: str) -> list[str]:
    return [one for one in STYLES.sub("", text) if not one.isprintable() and one not in "\n\t"]


def dataset(folder: Path) -> tuple[Path, Path]:
    """A run with hostile texts, names and labels, and the file it is of."""
    name = HOSTILE.replace("/", "")
    rows = [
        {"text": f"The keys {HOSTILE}", "id": f"a{HOSTILE}", "topic": HOSTILE, "target": " are", "foil": " is"},
        {"text": "The key", "id": "good", "topic": "x", "target": " is", "foil": " are"},
        {"text": "The key", "id": "bad", "topic": "x", "target": f"{HOSTILE} two", "foil": " are"},
    ]
    file = folder / f"rows{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job: dict[str, Any] = {"kind": "dataset", "model": "demo", "input": {"path": str(file), "labels": ["topic"]}}
    (folder / f"job{name}.yaml").write_text(json.dumps(job | {"edges": False}))
    return folder / f"job{name}.yaml", folder / f"run{name}"


def graph(folder: Path) -> Path:
    """A graph of somebody else's, with hostile names."""
    circuit = tracer.trace(tracer.load(), tracer.Prompt("The keys", target=" are", foil=" is"), nodes=8)
    path = tracer.export(circuit, folder / "graph.json", "neuronpedia").files[0]
    content = json.loads(path.read_text())
    content["metadata"] |= {"slug": HOSTILE, "prompt": HOSTILE, "scan": HOSTILE, "note": HOSTILE}
    content["metadata"]["prompt_tokens"] = [HOSTILE for _ in content["metadata"]["prompt_tokens"]]
    content.pop("tracer", None)
    for node in content["nodes"]:
        node |= {"clerp": HOSTILE, "ppClerp": HOSTILE}
    path.write_text(json.dumps(content))
    return path


@pytest.mark.slow
@pytest.mark.long
def test_no_text_is_a_command_to_a_terminal(attack: Attack, tmp_path: Path) -> None:
    job, out = dataset(tmp_path)
    run, imported = str(out), str(graph(tmp_path))
    texts = [f"The keys {HOSTILE}", "--target", " are", "--foil", " is", "--no-edges"]
    commands = [
        ["trace", *texts],
        ["trace", *texts[:1], "--format", "json", "--no-edges"],
        ["trace", *texts[:1], "--format", "csv", "--no-edges"],
        ["trace", *texts[:1], "--format", "tsv", "--no-edges"],
        ["trace", "The keys", "--target", HOSTILE],
        ["trace", "The keys", "--model", f"./none{HOSTILE}"],
        ["trace", "The keys", f"--{HOSTILE}"],
        ["plan", str(job)],
        ["run", str(job), "--out", run],
        ["status", run],
        ["status", run, "--format", "json"],
        ["show", run, "--prompt", "0"],
        ["query", run, "select text, user_id, labels from prompts"],
        ["query", run, f"select '{HOSTILE}' as \"{HOSTILE}\""],
        ["query", run, f"select {HOSTILE}"],
        ["query", run, "--format", "csv", "select text, user_id from prompts"],
        ["query", run, "--format", "tsv", "select text, user_id, labels from prompts"],
        ["query", run, "--format", "json", "select text, error from failed"],
        ["query", run, f'select * from "{HOSTILE}"'],
        ["import", imported, "--out", str(tmp_path / "imported")],
        ["show", imported],
        ["show", imported, "--format", "json"],
        ["evaluate", str(tmp_path / f"no{HOSTILE}")],
        ["status", str(tmp_path / f"no{HOSTILE}")],
        ["steer", f"The keys {HOSTILE}", "--top", "3", "--factor", "0", "--max-new-tokens", "2", "--random", "1"],
        ["doctor", "--model", f"no{HOSTILE}"],
    ]
    with attack("text that commands a terminal") as tally:
        said = on_terminal(commands, tmp_path)
        tally.tried, tally.hung = len(commands), len(commands) - len(said)
        for command, text in zip(commands, said, strict=False):
            tally.tracebacks += "Traceback" in text
            if left := commands_left(text):
                tally.marks += 1
                tally.worst = f"{command[0]} {command[-1]!r}: {left[:5]!r}"
