"""The code blocks of the documentation, and how they are run: as a reader would, in one folder for each page.

A fenced block of ``sh`` or ``python`` is run, and so are the commands of a ``console`` block, whose ``error:`` and
``note:`` lines must come. A ``text`` block behind it holds lines of its output: each must have been printed, numbers to
2 %; ``...`` stands for lines, or words, left out. A comment before a block says otherwise:

    <!-- not run: REASON -->      it is not run: a cluster, a server, a model that is not here
    <!-- slow: REASON -->         it is run by the slow tests, with all before it on its page
    <!-- real model -->           it is run where the weights of `make real` lie in the cache

Verbs of tracer are called in this process, which saves their imports; everything else is bash.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import textwrap
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
RUN = ("sh", "python", "console")
_FENCE = re.compile(
    r"(?:^[ ]*<!-- (?P<mark>[^>]*?) -->\n)?^(?P<indent>[ ]*)(?P<fence>```+|~~~+)(?P<language>[\w-]*)[^\n]*\n"
    r"(?P<code>.*?)^(?P=indent)(?P=fence)[ \t]*$",
    re.MULTILINE | re.DOTALL,
)
_NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*(?:e[-+]\d+)?%?")
_ASSIGNED = re.compile(r"[A-Z_]+=")
CLOSE = 0.02
"""Part by which a printed number may differ: other machines round otherwise."""


@dataclass
class Block:
    """A fenced block: its page and line, how it is marked, and the lines of output that stand behind it."""

    page: Path
    line: int
    language: str
    mark: str
    code: str
    output: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """The mark without its reason: empty, ``not run``, ``slow`` or ``real model``."""
        return self.mark.partition(":")[0]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Every block of a page that is code, in order."""
    text, found = page.read_text(encoding="utf-8"), []
    for one in _FENCE.finditer(text):
        line = text[: one.start("fence")].count("\n") + 1
        if one["language"] == "text" and found:
            found[-1].output += one["code"].splitlines()
        elif one["language"] in RUN:
            found.append(Block(page, line, one["language"], one["mark"] or "", textwrap.dedent(one["code"])))
    return found


def pages() -> list[Path]:
    """Every page that has code."""
    return [page for page in sorted(DOCS.rglob("*.md")) if blocks(page)]


class Reader:
    """Somebody who runs a page's blocks one after the other, in a folder with the repository's job files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: dict[str, object] = {"__name__": "__main__"}
        self.variables = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "150"}
        (folder / "jobs").symlink_to(ROOT / "jobs")

    def run(self, block: Block) -> str:
        """What a block prints.

        Raises:
            AssertionError: it ends with an error that it does not say.
        """
        with contextlib.chdir(self.folder), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if block.language == "python":
                return self._python(block)
            if block.language == "console":
                return self._console(block)
            return "".join(self._command(one, block) for one in commands(block.code))

    def _python(self, block: Block) -> str:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile("\n" * block.line + block.code, str(block.page), "exec"), self.names)
        return said.getvalue()

    def _console(self, block: Block) -> str:
        said = ""
        for line in block.code.splitlines():
            if line.startswith("$ "):
                said += self._command(line[2:], block, fails=True)
            else:
                assert _printed(line, said.splitlines()), f"{block}: {line!r} is not said, but:\n{said}"
        return said

    def _command(self, command: str, block: Block, fails: bool = False) -> str:
        """A line of a shell: in this process where it is a verb of tracer's and nothing else."""
        words = _words(command)
        words = [self._filled(word) for word in words]
        if words[:1] == ["export"]:
            names = [word.partition("=") for word in words[1:]]
            self.variables |= {name: os.path.expanduser(value) for name, _, value in names}
            return ""
        first = next((at for at, word in enumerate(words) if not _ASSIGNED.match(word)), len(words))
        into = words[-1] if words[-2:-1] == [">"] else None
        verb = words[first + 1 : -2] if into else words[first + 1 :]
        if words[first : first + 1] == ["tracer"] and not {"|", ">", "&&", ";", "<"} & set(verb):
            assigned = dict(word.split("=", 1) for word in words[:first])
            said, code = self._verb(verb, assigned, into)
        else:
            piped = {"TRACER_FORMAT": "auto"} if "|" in words else {}
            how = {"capture_output": True, "text": True, "env": {**self.variables, **piped}, "timeout": 300}
            done = subprocess.run(["bash", "-euo", "pipefail", "-c", command], check=False, **how)  # type: ignore[call-overload]
            said, code = done.stdout + done.stderr, done.returncode
        assert fails or code == 0, f"{block}: {command!r} ends with {code}:\n{said}"
        return said

    def _verb(self, words: list[str], assigned: dict[str, str], into: str | None) -> tuple[str, int]:
        from tracer.cli.app import app
        from tracer.errors import TracerError

        told = {"COLUMNS": "150", **({"TRACER_FORMAT": "auto"} if into else {}), **assigned}
        done = CliRunner().invoke(app, words, env=told, prog_name="tracer")
        if done.exception is not None and not isinstance(done.exception, SystemExit | TracerError):
            raise done.exception
        error = f"error: {done.exception}\n" if isinstance(done.exception, TracerError) else ""
        if into:
            Path(into).write_text(done.stdout, encoding="utf-8")
        return (done.stderr if into else done.output) + error, done.exit_code

    def _filled(self, word: str) -> str:
        for name in re.findall(r"\$(\w+)", word):
            word = word.replace(f"${name}", self.variables.get(name, ""))
        return word


def commands(code: str) -> list[str]:
    """The commands of a block of shell: a line each, lines that go on joined; here-documents are one command."""
    text = code.replace("\\\n", " ")
    if "<<" in text:
        first = text.index("cat >")
        end = text.rindex("\nEND\n") + len("\nEND\n")
        return [*commands(text[:first]), text[first:end], *commands(text[end:])]
    return [line for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command, comments=True)
    except ValueError:
        return []


def missing(block: Block, said: str) -> list[str]:
    """Lines of the output that a page shows which were not printed."""
    printed = said.splitlines()
    return [line for line in block.output if line.strip() not in ("", "...") and not _printed(line, printed)]


def _printed(line: str, printed: list[str]) -> bool:
    return any(_same(line, other) for other in printed)


def _same(shown: str, said: str) -> bool:
    """Whether a line is shown as it was said: spaces count once, numbers to CLOSE, ``...`` is anything."""
    before, dots, after = " ".join(shown.split()).partition(" ...")
    text = " ".join(said.split())
    if not dots:
        return _equal(before, text)
    words, after = text.split(" "), after.lstrip(":; ")
    return _equal(before, " ".join(words[: len(before.split())])) and after in text


def _equal(shown: str, said: str) -> bool:
    numbers = [[_value(one) for one in _NUMBER.findall(text)] for text in (shown, said)]
    if _NUMBER.sub("#", shown) != _NUMBER.sub("#", said) or len(numbers[0]) != len(numbers[1]):
        return False
    pairs = zip(*numbers, strict=True)
    return all(abs(one - other) <= max(CLOSE * abs(one), 0.006) for one, other in pairs)


def _value(text: str) -> float:
    return float(text.replace(",", "").rstrip("%").rstrip(".") or 0)
