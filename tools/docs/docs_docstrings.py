"""Docstrings as the reference shows them: an entry for each argument, and links to the method's sections.

Ours say several arguments in a line (``model, prompt: as in ...``, or ``nodes: ... edges: ...``), which readers of the
Google style take for one. Knows docstrings as text, and griffe, which calls the class below. Refuses to know pages.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import griffe

SECTIONS = ("Args:", "Attributes:")
METHOD = Path(__file__).resolve().parents[2] / "docs" / "method.md"


def entries(docstring: str, names: Collection[str]) -> dict[str, str]:
    """What the sections of arguments and attributes say of each of `names`, each on one line."""
    found: dict[str, str] = {}
    for name, text in _said(docstring, names):
        found[name] = text
    return found


def _said(docstring: str, names: Collection[str]) -> list[tuple[str, str]]:
    lines, inside, text = docstring.splitlines(), False, []
    for line in lines:
        if line.strip() in SECTIONS:
            inside = True
        elif inside and line.strip() and not line.startswith(" "):
            inside = False
        elif inside:
            text.append(line.strip())
    return split(" ".join(text), names)


def split(text: str, names: Collection[str]) -> list[tuple[str, str]]:
    """A run of entries as (name, description): a name of several in one entry has what is said of all of them."""
    known = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    if not known:
        return []
    start = re.compile(rf"(?:^|(?<=[.;] )|(?<=\) ))\*{{0,2}}((?:{known})(?:, \*{{0,2}}(?:{known}))*): ")
    parts = start.split(text)
    found = []
    for given, said in zip(parts[1::2], parts[2::2], strict=True):
        found += [(name.strip(" *"), said.strip()) for name in given.split(",")]
    return found


@functools.cache
def sections() -> dict[str, str]:
    """The numbers of the method's sections, each with the anchor of its heading."""
    from markdown.extensions.toc import slugify

    heads = re.findall(r"^## (\w+)\. (.*)$", METHOD.read_text(encoding="utf-8"), re.MULTILINE)
    return {number: slugify(f"{number}. {title}", "-") for number, title in heads}


def linked(docstring: str) -> str:
    """The docstring with each mention of method.md as a link to its section, which the site resolves by its anchor."""

    def link(found: re.Match[str]) -> str:
        number = found[2]
        anchor = sections().get(number or "", "the-method-exactly")
        return f"[{found[0].strip()}][{anchor}]"

    return re.sub(r"method\.md( sections? | )?(\d\w?)?", link, docstring)


def _rewritten(docstring: str, names: Collection[str]) -> str:
    kept: list[str] = []
    section: list[str] | None = None

    def close() -> None:
        nonlocal section
        if section is not None:
            said = split(" ".join(line.strip() for line in section), names)
            kept.extend([f"    {name}: {text}" for name, text in said] if said else section)
            kept.append("")
        section = None

    for line in docstring.splitlines():
        if line.strip() in SECTIONS:
            close()
            kept.append(line)
            section = []
        elif section is not None and line.strip() and not line.startswith(" "):
            close()
            kept.append(line)
        elif section is not None:
            section.append(line)
        else:
            kept.append(line)
    close()
    return linked("\n".join(kept))


class Readable(griffe.Extension):
    """Rewrites every docstring that griffe reads, before it is parsed."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        self._rewrite(func, [parameter.name.lstrip("*") for parameter in func.parameters])

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        self._rewrite(cls, [name for name, member in cls.members.items() if not member.is_function])

    def _rewrite(self, of: griffe.Function | griffe.Class, names: Collection[str]) -> None:
        if of.docstring is not None:
            of.docstring.value = _rewritten(of.docstring.value, names)
