"""What nodes are called: in a word, with where they are.

Knows the kinds of nodes. Refuses to know graphs, and where a name is put.
"""

from __future__ import annotations

from typing import Any

from tracer.experts import Numbering
from tracer.text import printable

ATTENTION_ERROR = -2
"""The `neuron` of an error node of attention, and not of an MLP."""


def height(kind: str, layer: int, neuron: int) -> tuple[int, int]:
    """Where a node lies in the model: edges rise. Within a layer attention comes before the MLP, biases before both."""
    if kind == "other":
        return layer, -1
    return layer, 0 if kind == "attention" or (kind == "error" and neuron == ATTENTION_ERROR) else 1


def token(text: str) -> str:
    """A token on one line, with its spaces visible."""
    return printable(text).replace(" ", "␣")


def node_text(node: dict[str, Any], numbering: Numbering, label: str = "") -> str:
    """A node in a word: what it is, at its position; an imported graph's own label in brackets."""
    at = f"@{node['position']}" if node["position"] >= 0 else "at any position"
    if node["kind"] == "target":
        return f"target {printable(node['token'])} {at}"
    if node["kind"] in ("embedding", "logit"):
        return f"{node['kind']} {token(node['token']) or '(no label)'} {at}"
    return f"{node_name(node, numbering)} {at} {token(node['token'])}" + (f" ({printable(label)})" if label else "")


def node_name(node: dict[str, Any], numbering: Numbering) -> str:
    """What a node inside the model is, without where."""
    if node["kind"] == "neuron":
        return numbering.name(node["layer"], node["neuron"])
    if node["kind"] == "attention":
        return f"L{node['layer']} A{node['neuron']}"
    what = "attention error" if height(node["kind"], 0, node["neuron"]) == (0, 0) else node["kind"]
    return f"{what} L{node['layer']}"
