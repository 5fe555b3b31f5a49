"""Nodes of other tools' graph files: their kind, place and label, in every form that public writers give them.

Knows the forms of circuit-tracer, of Neuronpedia's other engine (CRM, with attention features), of EleutherAI's
`attribute`, and of tools that trace MLP neurons by RelP. A place that a file contradicts itself about is refused; a
token id or a label that it does not give is not made up. Refuses to know files, edges and what is made of nodes.

Source: circuit-tracer's graph_models.py, Neuronpedia's apps/graph/format_converter.py, EleutherAI/attribute's
mlp_attribution.py, as of 2026.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tracer.circuit.names import ATTENTION_ERROR
from tracer.errors import RunError, quoted

Node = Mapping[str, Any]

# A feature's layer, index and position; `intermediate` counts positions without the tokens that its writer left out.
_PLAIN = re.compile(r"(?P<layer>-?\d+)_(?P<index>-?\d+)_(?P<position>\d+)")
_TYPED = re.compile(r"(?P<layer>\d+)_[a-z]+_(?P<index>\d+)_(?P<position>\d+)")
_ATTRIBUTE = re.compile(r"intermediate_\d+_(?P<layer>\d+)_(?P<index>\d+)")
_NEURON = re.compile(r"L(?P<layer>\d+)_N(?P<index>\d+)")
_FORMS = (_PLAIN, _TYPED, _ATTRIBUTE, _NEURON)
_TOKEN = re.compile(r"(?:E|L|logit|-?\d+)_(?P<token>\d+)_\d+")  # of embeddings and logits
_NAMED = re.compile(r"""(?:output|logit)?:?\s*(?P<quote>["'])(?P<token>.*)(?P=quote)\s*(?:\(p=[^)]*\))?""", re.I | re.S)
_PREFIX, _SUFFIX = re.compile(r"(?:output|logit):\s?", re.I), re.compile(r"\s?\(p=[^)]*\)\s*")


class Place(NamedTuple):
    """What a node is, and where; `neuron` is its index, or a token id, and negative where the file gives none."""

    kind: str
    layer: int
    position: int
    neuron: int


def bad(name: str, rule: str) -> RunError:
    """A file that is refused as a whole."""
    return RunError(f"graph {quoted(name)}", rule, "nothing was imported; fix or re-export the file")


def cantor(layer: int, neuron: int) -> int:
    """The Cantor pairing that numbers a (layer, index) in ``feature``."""
    return (layer + neuron) * (layer + neuron + 1) // 2 + neuron


def uncantor(number: int) -> tuple[int, int]:
    """The (layer, index) of a Cantor number."""
    diagonal = (math.isqrt(8 * number + 1) - 1) // 2
    neuron = number - diagonal * (diagonal + 1) // 2
    return diagonal - neuron, neuron


def places(nodes: Sequence[Node], about: Mapping[str, Any], name: str) -> tuple[list[Place], int]:
    """The place of every node, and how many layers the model has; logits lie in the layer above the last.

    Raises:
        RunError: a node without a place, or one that contradicts itself or the others.
    """
    coded = _coded(nodes, about)
    found = [_place(node, about, coded, name) for node in nodes]
    for place, node in zip(found, nodes, strict=True):
        _check_bounds(place, node["node_id"], name)
    n_layers = _n_layers(nodes, found, about)
    if not 1 <= n_layers < 2**15 or any(
        place.layer >= n_layers for place in found if place.kind not in ("embedding", "logit")
    ):
        raise bad(name, f"its nodes do not fit a model of {n_layers} layers")
    return _apart([one._replace(layer=n_layers) if one.kind == "logit" else one for one in found]), n_layers


def token_of(node: Node, place: Place, tokens: Sequence[str]) -> str:
    """The token that a node stands at; of a logit the one it is of, as the file labels it: empty where it does not."""
    if place.kind != "logit":
        return tokens[place.position]
    given, label = node.get("token"), str(node["clerp"])
    if isinstance(given, str):
        return given
    if match := _NAMED.fullmatch(label):
        return match["token"]
    return _SUFFIX.sub("", _PREFIX.sub("", label, count=1)) if label.strip() else ""


def label_of(node: Node, place: Place) -> str:
    """What the file calls a node, beside the token that stands for it; empty where it says nothing."""
    return "" if place.kind in ("embedding", "logit") else str(node["clerp"]).strip()


# ------------------------------------------------------------------------------------------------- places


def _kind(node: Node) -> str:
    kind = str(node["feature_type"]).lower()
    if kind in ("embedding", "logit"):
        return kind
    if "error" in kind:
        return "error"
    if kind in ("bias", "unknown"):
        return "other"
    return "attention" if kind == "lorsa" else "neuron"


def _place(node: Node, about: Mapping[str, Any], coded: bool, name: str) -> Place:
    kind, position, layer = _kind(node), int(node["ctx_idx"]), _layer(node)
    if kind == "embedding":
        return Place(kind, -1, position, _token_id(node, kind))
    if kind == "logit":
        return Place(kind, 0, position, _token_id(node, kind))
    if kind in ("error", "other"):
        if layer is None:
            raise bad(name, f"{kind} node {quoted(node['node_id'])} has no layer")
        attention = "lorsa" in node["feature_type"].lower()
        return Place(kind, layer, position, ATTENTION_ERROR if kind == "error" and attention else -1)
    return Place(kind, *_feature(node, about, coded, name))


def _layer(node: Node) -> int | None:
    """The layer that a node states as a number; None for ``E``, ``embedding``, ``logit``, ``-1``."""
    stated = str(node["layer"])
    return int(stated) if stated.isascii() and stated.isdecimal() else None


def _token_id(node: Node, kind: str) -> int:
    """The token id of an embedding or a logit; -1 where neither its id nor its feature number gives it."""
    if match := _TOKEN.fullmatch(node["node_id"]):
        return int(match["token"])
    # circuit-tracer numbers an embedding's feature by its position.
    return max(-1, int(node["feature"])) if kind == "logit" and node["feature"] is not None else -1


def _form(node: Node) -> re.Match[str] | None:
    return next((match for form in _FORMS if (match := form.fullmatch(node["node_id"]))), None)


def _feature(node: Node, about: Mapping[str, Any], coded: bool, name: str) -> tuple[int, int, int]:
    """Layer, position and index of a feature, from its id; from its feature number where the id is of another form."""
    position, layer, feature, node_id = int(node["ctx_idx"]), _layer(node), node["feature"], node["node_id"]
    if match := _form(node):
        found, index = int(match["layer"]), int(match["index"])
        elsewhere = "position" in match.re.groupindex and int(match["position"]) != position
        if elsewhere or (layer is not None and layer != found):
            raise bad(
                name, f"node {quoted(node_id)} contradicts its layer {quoted(node['layer'])} or position {position}"
            )
        whole = about.get("schema_version") == 1 and isinstance(feature, int) and feature >= 0
        if whole and feature not in (index, cantor(found, index)):
            raise bad(name, f"node {quoted(node_id)} contradicts its feature number {feature}")
        return found, position, index
    if layer is None or feature is None:
        raise bad(name, f"node {quoted(node_id)} has no layer or no feature number")
    if not coded or is_neuron(node) or feature < 0:
        return layer, position, int(feature)
    found, index = uncantor(int(feature))
    if found != layer:
        raise bad(
            name,
            f"node {quoted(node_id)} contradicts its layer {quoted(node['layer'])}: its feature number is of {found}",
        )
    return found, position, index


def is_neuron(node: Node) -> bool:
    """Whether a tool says that it numbers neurons, as those that trace MLP neurons do, not a dictionary's features."""
    return "neuron" in str(node["feature_type"]).lower()


def _coded(nodes: Sequence[Node], about: Mapping[str, Any]) -> bool:
    """Whether feature numbers are Cantor pairs: the schema says so, or every one of them names its own layer."""
    if about.get("schema_version") == 1:
        return True
    pairs = [
        (_layer(node), node["feature"])
        for node in nodes
        if _kind(node) in ("neuron", "attention") and not is_neuron(node) and isinstance(node["feature"], int)
    ]
    return bool(pairs) and all(number >= 0 and uncantor(number)[0] == layer for layer, number in pairs)


def _n_layers(nodes: Sequence[Node], found: Sequence[Place], about: Mapping[str, Any]) -> int:
    """Layers of the model: as the file says, else as its logits' layer says, else the highest there is."""
    ours = about.get("tracer", {}).get("model", {})
    stated = ours.get("n_layers") if isinstance(ours, dict) else None
    stated = about.get("n_layers") if stated is None else stated
    if isinstance(stated, int):
        return stated
    inner = max((place.layer + 1 for place in found if place.kind not in ("embedding", "logit")), default=0)
    logits = [(node, layer) for node in nodes if _kind(node) == "logit" and (layer := _layer(node)) is not None]
    # circuit-tracer leaves a layer free below the logits; CRM and those that write L_ put them right above the last.
    typed = any(_TYPED.fullmatch(node["node_id"]) or _kind(node) == "attention" for node in nodes)
    above = [layer if typed or node["node_id"].startswith("L") else layer - 1 for node, layer in logits]
    return max([inner, *above])


def _check_bounds(place: Place, node_id: str, name: str) -> None:
    """Refuse numbers that no model has and no table holds."""
    lowest, first = (-1 if place.kind == "embedding" else 0), (0 if place.kind in ("neuron", "attention") else -2)
    if not (lowest <= place.layer < 2**15 - 1 and 0 <= place.position < 2**31 and first <= place.neuron < 2**31):
        raise bad(name, f"node {quoted(node_id)} has a layer, position or number out of any model's range")


def _apart(found: Sequence[Place]) -> list[Place]:
    """Nodes of unknown number told apart: the second at a place is -2, and so on."""
    seen: Counter[Place] = Counter()
    apart: list[Place] = []
    for place in found:
        unknown = place.neuron < 0 and place.kind in ("logit", "embedding", "other")
        seen[place] += unknown
        apart.append(place._replace(neuron=-seen[place]) if unknown else place)
    return apart
