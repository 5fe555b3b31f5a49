"""The README's tree is the package: check it, or write it with --write.

Every room and module directly in tracer/ has a line with its docstring's first clause, in the order of the import
contract; what is inside a room is said at its door (its ``__init__.py``).
"""

from __future__ import annotations

import ast
import difflib
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- tree -->", "<!-- /tree -->"
LONGEST = 30


def first_clause(module: Path) -> str:
    """What a module says it is: its docstring up to the first full stop, semicolon or line end."""
    docstring = ast.get_docstring(ast.parse(module.read_text())) or ""
    return docstring.splitlines()[0].split(";")[0].rstrip(".,")


def tree() -> str:
    """The package as the import contract orders it."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    lines = ["```", "tracer/"]
    for layer in contracts[0]["layers"]:
        for name in layer.split(" | "):
            module, package = ROOT / "tracer" / f"{name}.py", ROOT / "tracer" / name / "__init__.py"
            shown, source = (f"{name}.py", module) if module.exists() else (f"{name}/", package)
            lines.append(f"  {shown:<14}{first_clause(source)}")
    assert len(lines) < LONGEST, "a tree that nobody reads: gather modules into rooms"
    return "\n".join([*lines, "```"])


def main() -> int:
    """Exit code 0 where the README agrees."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    found, after = rest.split(END)
    wanted = f"\n{tree()}\n"
    if "--write" in sys.argv:
        readme.write_text(before + BEGIN + wanted + END + after)
        return 0
    if found != wanted:
        print("README.md: its tree is not the package; run: python tools/readme_tree.py --write")
        print(
            "\n".join(difflib.unified_diff(found.splitlines(), wanted.splitlines(), "README", "package", lineterm=""))
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
