"""What is known of a neuron as tables: its tokens from the weights, and what a run knows of it.

Knows columns and wording. Refuses to know where the numbers come from (meaning/).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tracer.circuit.said import sign
from tracer.experts import DENSE, Numbering
from tracer.reports import sheet
from tracer.reports.folded import Folded, folded
from tracer.reports.parts import Sheet
from tracer.text import Rows

if TYPE_CHECKING:
    from tracer.meaning.known import Known
    from tracer.meaning.tokens import NeuronTokens, Token

ABOUT = (
    "logit: its change per unit of |value|, through the final norm at statistic 1. value, gate, up: with the token's "
    "embedding alone as the residual stream."
)
LISTS = ("promoted", "suppressed", "driven_by", "gate", "up")


def tokens_sheet(one: NeuronTokens, numbering: Numbering = DENSE) -> Sheet:
    """A neuron's tokens: promoted, suppressed, and those whose embeddings drive it with their gate and up."""
    gated = bool(one.gate)
    heads = ["<promotes", "&logit", "<suppresses", "&logit"]
    heads += ["<driven by", "&value", *(["&gate"] if gated else []), "&up"] if one.up else []
    rows = []
    for rank in range(max(len(one.promoted), len(one.driven_by))):
        row = [*_pair(one.promoted, rank), *_pair(one.suppressed, rank)]
        if one.up:
            token = one.driven_by[rank] if rank < len(one.driven_by) else None
            row += _pair(one.driven_by, rank)
            row += ["" if token is None or token.gate is None else _number(token.gate)] if gated else []
            row += ["" if token is None or token.up is None else _number(token.up)]
        rows.append(row)
    return Sheet.of(f"tokens-{one.layer}-{one.neuron}-{one.polarity:+d}", name(one, numbering), heads, rows)


def drives_sheet(one: NeuronTokens, numbering: Numbering = DENSE) -> Sheet:
    """The tokens whose embeddings move gate and up most, before the activation."""
    heads = ["<opens the gate", "&gate"] if one.gate else []
    heads += ["<moves up" if one.gate else "<moves it", "&up"]
    rows = [
        [*(_pair(one.gate, rank) if one.gate else []), *_pair(one.up, rank)]
        for rank in range(max(len(one.gate), len(one.up)))
    ]
    return Sheet.of(
        f"drives-{one.layer}-{one.neuron}-{one.polarity:+d}", f"{name(one, numbering)}: before it", heads, rows
    )


def known_sheets(known: Known) -> list[Sheet]:
    """What a run knows of the neuron, as far as it does."""
    found = []
    if known.neurons:
        heads = ["prompts", "mean attribution", "largest |attribution|", "mean activation"]
        cells = [
            (
                f"{row['n_prompts']:,}",
                *(f"{row[name]:+.4f}" for name in ("mean_attribution", "max_abs", "mean_activation")),
            )
            for row in known.neurons
        ]
        found.append(Sheet.of("in-run", "In the run's circuits", heads, cells))
    if known.top_prompts:
        cells = [
            (
                *(str(row["prompt_id"]), f"{row['attribution']:+.4f}", f"{row['activation']:+.4f}"),
                *(sheet.token(row["token"] or ""), row["text"] or ""),
            )
            for row in known.top_prompts
        ]
        heads = ["prompt", "attribution", "activation", "<at", "<text"]
        found.append(Sheet.of("top-prompts", "Prompts where its attribution is largest", heads, cells))
    if known.descriptions:
        cells = [
            (
                *(sign(row["polarity"]), sheet.number(row["score"], ".2f"), row["source"] or "-"),
                row["description"] or "",
            )
            for row in known.descriptions
        ]
        found.append(Sheet.of("described", "Described as", ["<polarity", "score", "<source", "<description"], cells))
    if known.exemplars:
        cells = [(sign(row["polarity"]), row["kind"], f"{row['value']:+.4f}", _marked(row)) for row in known.exemplars]
        found.append(Sheet.of("exemplars", "On text", ["<polarity", "<kind", "value", "<text"], cells))
    return found


def neuron_table(found: Sequence[NeuronTokens], known: Known | None = None, numbering: Numbering = DENSE) -> Folded:
    """A neuron for a terminal."""
    sheets = [tokens_sheet(one, numbering) for one in found]
    sheets += [drives_sheet(one, numbering) for one in found if one.up]
    sheets += [] if known is None else known_sheets(known)
    return folded([*sheets, ABOUT])


def neuron_json(found: Sequence[NeuronTokens], known: Known | None = None) -> str:
    """A neuron as JSON: a record for each polarity and, of a run, what it knows."""
    content: dict[str, Any] = {"neurons": [one.model_dump(mode="json") for one in found]}
    if known is not None:
        content["run"] = asdict(known)
    return json.dumps(content, indent=1, ensure_ascii=False)


def neuron_rows(found: Sequence[NeuronTokens]) -> Rows:
    """A neuron's lists: a row for each token."""
    names = ["layer", "neuron", "polarity", "list", "rank", "token", "token_id", "value", "gate", "up"]
    rows = [
        {
            **{part: getattr(one, part) for part in names[:3]},
            "list": listed,
            "rank": rank,
            "token": token.text,
            **{part: getattr(token, part) for part in names[6:]},
        }
        for one in found
        for listed in LISTS
        for rank, token in enumerate(getattr(one, listed), start=1)
    ]
    return Rows(names, rows)


def name(one: NeuronTokens, numbering: Numbering = DENSE) -> str:
    """A neuron with its polarity: ``L3 N1414 +``."""
    return f"{numbering.name(one.layer, one.neuron)} {sign(one.polarity)}"


def _pair(tokens: Sequence[Token], rank: int) -> list[str]:
    if rank >= len(tokens):
        return ["", ""]
    return [sheet.token(tokens[rank].text), _number(tokens[rank].value)]


def _number(value: float) -> str:
    """A number in six columns."""
    size = abs(value)
    return f"{value:+.3f}" if 1e-3 <= size < 10 or not size else f"{value:+.0e}" if size < 1e-3 else f"{value:+.4g}"


def _marked(row: dict[str, Any]) -> str:
    """A piece of text with the token of the value in brackets."""
    at = row["position"] - row["start"]
    parts = [f"[{token}]" if i == at else token for i, token in enumerate(row["tokens"])]
    return "".join(parts)
