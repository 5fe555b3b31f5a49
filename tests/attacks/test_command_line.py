"""Arguments that name no file, or one that cannot be read or written: a line each, in bounded memory and time."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import children
import tracer
from tally import Attack

TEXT = "The keys"
COMMANDS = [
    "show {odd}",
    "view {odd}",
    "export {odd} --out x.json",
    "import {odd} --out imported",
    "evaluate {odd}",
    "evaluate good --pairs {odd}",
    "evaluate good --reference {odd}",
    "evaluate good --unrelated {odd}",
    "evaluate good --model {odd}",
    "evaluate good --out {odd}",
    "steer The --nodes {odd}",
    "steer The --nodes good --model {odd}",
    "plan {odd}",
    "plan job.yaml --set input.path={odd}",
    "plan job.yaml --set model={odd}",
    "run {odd} --out run",
    "run job.yaml --out {odd}",
    "run job.yaml --out run --set input.path={odd}",
    "run job.yaml --out run --set shard_size={odd}",
    "run job.yaml --out run --workers {odd}",
    "status {odd}",
    "query {odd} FROM_prompts",
    "query good {odd}",
    "compact {odd}",
    "compact good --neuron {odd}",
    "doctor --model {odd}",
    "trace The --no-edges --model {odd}",
    "trace The --no-edges --adapter {odd}",
    "trace The --no-edges --out {odd}",
    "trace The --no-edges --nodes {odd}",
    "trace The --no-edges --target {odd}",
    "trace The --no-edges --revision {odd}",
    "submit {odd}",
]
ODD = ["/dev/zero", "/dev/null", "/proc/self/mem", "folder", "9" * 5000, "", "-1", "a\nb", "nowhere/at/all", "-"]


def bounded() -> None:
    """3 GiB: what reads a file without an end fails soon."""
    resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30))


def said_by(commands: Sequence[Sequence[str]], folder: Path) -> list[tuple[str, str]]:
    """What commands print, in one process, each with its exit code."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb"}
    (folder / "commands.json").write_text(json.dumps(commands))
    script = children.command("terminal", folder / "commands.json")
    ran = subprocess.run(
        script,
        check=False,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
        preexec_fn=bounded,
    )
    parts = re.split(r"^ended (\S+)$", ran.stdout, flags=re.MULTILINE)
    return list(zip(parts[:-1:2], parts[1::2], strict=True))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    (folder / "folder").mkdir()
    (folder / "prompts.jsonl").write_text('{"text": "The keys", "target": " are", "foil": " is"}\n')
    job = {"kind": "dataset", "model": "demo", "input": {"path": "prompts.jsonl"}, "edges": False}
    (folder / "job.yaml").write_text(json.dumps(job))
    prompt = tracer.Prompt(TEXT, target=" are", foil=" is")
    tracer.trace(tracer.load(), prompt, nodes=8, edges=False).save(folder / "good")
    return folder


LONG = [pytest.mark.slow, pytest.mark.long]


@pytest.mark.parametrize("odd", ODD[:1] + [pytest.param(one, marks=LONG) for one in ODD[1:]])
def test_an_odd_argument_is_a_line(odd: str, place: Path, attack: Attack) -> None:
    commands = [[part.replace("{odd}", odd) for part in command.split()] for command in COMMANDS]
    with attack("odd arguments") as tally:
        said = said_by(commands, place)
        tally.tried, tally.hung = len(commands), len(commands) - len(said)
        for command, (text, code) in zip(commands, said, strict=False):
            errors = [line for line in text.splitlines() if line.startswith("error: ")]
            if "Traceback" in text or (code != "0" and not errors) or any(len(line) > 2000 for line in errors):
                tally.tracebacks += 1
                tally.worst = f"{' '.join(command)[:200]} ({code}): {text[-400:]}"


@pytest.mark.slow
@pytest.mark.long
def test_what_cannot_be_printed_is_a_line(attack: Attack) -> None:
    script = Path(sys.executable).parent / "tracer"
    with attack("standard output that cannot be written") as tally:
        for command in (["--help"], ["--version"], ["trace", TEXT, "--no-edges"], ["trace", TEXT, "--format", "json"]):
            with Path("/dev/full").open("w") as full:
                ran = subprocess.run(
                    [script, *command], check=False, stdout=full, stderr=subprocess.PIPE, text=True, timeout=200
                )
            tally.tried += 1
            if "Traceback" in ran.stderr or not ran.stderr.startswith("error: standard output") or ran.returncode != 2:
                tally.tracebacks += 1
                tally.worst = f"{command}: {ran.returncode} {ran.stderr[-300:]}"


def test_bytes_that_are_no_text_are_a_line(tmp_path: Path, attack: Attack) -> None:
    script = Path(sys.executable).parent / "tracer"
    commands = [["show", b"run\xff"], ["trace", b"The \xff"], ["run", b"\xff.yaml", "--out", "run"]]
    with attack("arguments that are not UTF-8") as tally:
        for command in commands:
            ran = subprocess.run(
                [script, *command], check=False, capture_output=True, text=True, timeout=200, cwd=tmp_path
            )
            tally.tried += 1
            if "Traceback" in ran.stderr or "UTF-8" not in ran.stderr or ran.returncode != 2:
                tally.tracebacks += 1
                tally.worst = f"{command}: {ran.returncode} {ran.stderr[-300:]}"
