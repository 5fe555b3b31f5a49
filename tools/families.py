"""The families in README and docs/families.md are those of the data: check them, or write them with --write.

A family's line says what its tiny configurations (tracer/testing/configs.py) are made of, on the meta device, and what
model/about.py says of it.
"""

from __future__ import annotations

import difflib
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from tracer.model.about import ABOUT, OLDEST
from tracer.model.families import FAMILIES, Family, Layout, family_of, is_biased
from tracer.model.wholes import TEXT_PARTS, UNREAD
from tracer.testing.configs import configurations

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 118


def built(name: str) -> list[tuple[Any, tuple[Layout, ...]]]:
    """A family's tiny models without weights, with the layouts of their blocks."""
    found = []
    for config in configurations(name).values():
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(config)
        found.append((module, family_of(module, module.config).laid_out(module)))
    return found


def conserves(models: list[tuple[Any, tuple[Layout, ...]]]) -> str:
    """What of identities 2 to 4 holds."""
    kinds = {is_biased(module) for module, _ in models}
    if kinds == {True}:
        return "no: biases"
    return "yes" if kinds == {False} else "yes, but for biases where they are switched on"


def inside(models: list[tuple[Any, tuple[Layout, ...]]]) -> str:
    """What the blocks are made of, in few words."""
    layouts = [layout for _, laid in models for layout in laid]
    kinds = {step.kind for layout in layouts for step in layout.steps}
    words = [said for kind, said in (("mixture", "experts"), ("product", "gated MLP")) if kind in kinds]
    words = words or ["plain MLP"]
    if any(layout.experts is not None and layout.experts.shared is not None for layout in layouts):
        words[0] = "experts, some shared"
    words += [
        said for kind, said in (("delta", "gated delta nets"), ("output_gate", "gated attention")) if kind in kinds
    ]
    words += [name for kind, name in (("rms_norm", "RMSNorm"), ("layer_norm", "LayerNorm")) if kind in kinds]
    if any(layout.wiring.attention_out for layout in layouts):
        words.append("norms behind branches")
    if any("norm" in step.path and step.path.startswith(("self_attn.", "attention.")) for step in layouts[0].steps):
        words.append("norms of queries and keys")
    parallel = {layout.wiring.parallel for layout in layouts} - {False}
    words += [f"parallel branches by `{one}`" for one in sorted(parallel - {True})]
    words += ["parallel branches"] * (True in parallel)
    return ", ".join(words)


def refused(family: Family) -> str:
    """Options that are refused, each with its reason."""
    return "; ".join(f"`{one.option}`: {one.rule}" for one in family.refused) or "-"


def table() -> str:
    """A line for each family."""
    lines = [
        "| model_type | models | since transformers | blocks | conserves | refused options | to know |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, family in FAMILIES.items():
        models, about = built(name), ABOUT[name]
        cells = (f"`{name}`", about.title, about.since or f"{OLDEST} or before", inside(models))
        rest = (conserves(models), refused(family), about.note or "-")
        lines.append("| " + " | ".join((*cells, *rest)) + " |")
    return "\n".join(lines)


def images() -> str:
    """Types that take more than text: those whose text part is loaded, and those that are refused, by reason."""
    by_input: dict[str, list[str]] = {}
    for name, part in TEXT_PARTS.items():
        by_input.setdefault(part.takes, []).append(f"`{name}`")
    lines = ["| takes beside text | types whose text part is loaded, where it is a family above |", "|---|---|"]
    lines += [f"| {takes} | {', '.join(names)} |" for takes, names in by_input.items()]
    by_reason: dict[str, list[str]] = {}
    for name, reason in UNREAD.items():
        by_reason.setdefault(reason, []).append(f"`{name}`")
    lines += ["", "| refused because it | types |", "|---|---|"]
    lines += [f"| {reason} | {', '.join(names)} |" for reason, names in by_reason.items()]
    return "\n".join(lines)


def listed() -> str:
    """All models in a sentence, as the README has them."""
    words = ", ".join(ABOUT[name].title for name in FAMILIES).split(" ")
    lines = [""]
    for word in words:
        if len(lines[-1]) + len(word) > WIDTH:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return "\n".join(lines) + "."


PLACES = (
    ("README.md", "families", listed),
    ("docs/families.md", "families", table),
    ("docs/families.md", "images", images),
)
"""The file, the name of the markers around the text, and what makes the text."""


def main() -> int:
    """Exit code 0 where both files agree with the data."""
    wrong = 0
    logging.set_verbosity_error()
    for name, mark, make in PLACES:
        path, begin, end = ROOT / name, f"<!-- {mark} -->", f"<!-- /{mark} -->"
        before, rest = path.read_text().split(begin)
        found, after = rest.split(end)
        wanted = f"\n{make()}\n"
        if "--write" in sys.argv:
            path.write_text(before + begin + wanted + end + after)
        elif found != wanted:
            wrong += 1
            print(f"{name}: its {mark} are not the data; run: python tools/families.py --write")
            diff = difflib.unified_diff(found.splitlines(), wanted.splitlines(), name, "data", lineterm="")
            print("\n".join(diff))
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
