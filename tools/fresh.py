"""The tests on other versions than those of constraints.txt: the newest, or the oldest, that pyproject.toml allows.

``python tools/fresh.py newest|oldest`` resolves that set, says what moved against constraints.txt, and what a bound of
pyproject.toml holds back; installs it in an environment of its own under .fresh/; and runs there the tests of `make
quick` and `tracer.testing`, the check of all families. Exit code 1 where one of them fails. uv does the resolving: it
knows the oldest set, and takes seconds. It reads nothing of pip's settings, so --find-links is handed to it here.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".fresh"
EXTRAS = ("dev", "ray", "datasets", "query")
"""What `make test` installs besides."""
RESOLUTIONS = {"newest": "highest", "oldest": "lowest-direct"}
"""Of each set, uv's name of it. The oldest is that of the packages named here: what they need in turn is new."""
CHECKS = (("-m", "pytest", "-n", "2", "-m", "unit and not slow"), ("-m", "tracer.testing"))
"""What runs on a set, as `python` takes it."""


def requirements(bounded: bool = True) -> list[Requirement]:
    """What pyproject.toml asks for, the extras of `make test` included; unbounded, without its upper bounds."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    found = [
        Requirement(line) for line in (*project["dependencies"], *(one for name in EXTRAS for one in optional[name]))
    ]
    if not bounded:
        for one in found:
            one.specifier = SpecifierSet(",".join(str(part) for part in one.specifier if "<" not in part.operator))
    return found


def pinned(text: str) -> dict[str, str]:
    """The version of each package in a list of ``name==version`` lines, without what a build adds to it (``+cpu``)."""
    pins = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;+]+)", text, re.MULTILINE)
    return {canonicalize_name(name): version for name, version in pins}


def moves(
    tested: Mapping[str, str], found: Mapping[str, str], beyond: Mapping[str, str]
) -> list[tuple[str, str, str, str]]:
    """Rows of a package, its tested version, its version in a set, and a newer one that a bound holds back ("" where
    there is none), of every package of which these differ. A package in one set alone has a dash in the other."""
    rows = []
    for name in sorted({*tested, *found}):
        then, now, later = tested.get(name, "–"), found.get(name, "–"), beyond.get(name, "")
        held = later if now != "–" and later and Version(later) > max(map(Version, {then, now} - {"–"})) else ""
        if then != now or held:
            rows.append((name, then, now, held))
    return rows


def resolve(kind: str, held: Sequence[str], bounded: bool = True) -> str:
    """uv's answer: a line ``name==version`` of each package of a set.

    Args:
        held: requirements of packages that stay as they are.
    """
    stem = kind if bounded else f"{kind}-unbounded"
    wanted, holding, out = (HOME / f"{stem}.{ending}" for ending in ("in", "hold", "txt"))
    wanted.write_text("\n".join(map(str, requirements(bounded))) + "\n")
    holding.write_text("\n".join(held) + "\n")
    options = ["--resolution", RESOLUTIONS[kind], "-c", str(holding), "--python", sys.executable, "-o", str(out)]
    _uv("pip", "compile", "-q", "--no-header", "--no-annotate", "--upgrade", *options, str(wanted))
    return out.read_text()


def install(kind: str) -> Path:
    """The python of an environment that has a set, and this package, in place."""
    python = HOME / kind / "bin" / "python"
    if not python.exists():
        _uv("venv", "-q", "--python", sys.executable, str(HOME / kind))
    _uv("pip", "sync", "-q", "--python", str(python), str(HOME / f"{kind}.txt"))
    _uv("pip", "install", "-q", "--no-deps", "--python", str(python), "-e", str(ROOT))
    return python


def _uv(*arguments: str) -> None:
    """Run uv.

    Raises:
        SystemExit: it fails; it has said why.
    """
    links = [f"--find-links={one}" for one in os.environ.get("PIP_FIND_LINKS", "").split()] * (arguments[0] == "pip")
    done = subprocess.run([sys.executable, "-m", "uv", *arguments, *links], cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(f"uv {arguments[0]} {arguments[1]} failed, code {done.returncode}")


def _table(kind: str, rows: Sequence[tuple[str, str, str, str]]) -> Table:
    table = Table("package", "tested", kind, "newer, beyond a bound", title=f"Moved against constraints.txt: {kind}")
    for row in rows:
        table.add_row(*row)
    return table


def main() -> int:
    """Exit code 0 where every check passes on the set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=RESOLUTIONS, help="which of the sets that pyproject.toml allows")
    parser.add_argument(
        "--hold",
        default="torch",
        metavar="NAMES",
        help="packages that stay at the version installed here, separated by commas; torch by default: "
        "another brings gigabytes of CUDA. --hold '' holds none",
    )
    parser.add_argument("--resolve-only", action="store_true", help="say what moved, and install nothing")
    asked = parser.parse_args()
    HOME.mkdir(exist_ok=True)
    held = [f"{name}=={importlib.metadata.version(name)}" for name in asked.hold.split(",") if name]
    found, beyond = pinned(resolve(asked.kind, held)), pinned(resolve("newest", held, bounded=False))
    rows = moves(pinned((ROOT / "constraints.txt").read_text()), found, beyond)
    console = Console()
    console.print(_table(asked.kind, rows))
    console.print(f"{len(rows)} of {len(found)} packages differ; held: {', '.join(held) or 'none'}")
    if asked.resolve_only:
        return 0
    python = install(asked.kind)
    failed = [check for check in CHECKS if subprocess.run([python, *check], cwd=ROOT, check=False).returncode]
    for check in CHECKS:
        console.print(f"{'FAILED' if check in failed else 'passed'}  python {' '.join(check)}  ({asked.kind} versions)")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
