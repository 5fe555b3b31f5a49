"""A swap as a person or a script reads it: a table on a terminal, JSON, CSV.

Knows layout. Computes no number, and of a model reads its tokens only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table

from tracer.prompts import Prompt, Vocabulary, decode, encode
from tracer.reports.sheet import token
from tracer.reports.tables import cell, csv_bytes

if TYPE_CHECKING:
    from tracer.evaluation.swap import Swap

_SAYS = {
    "swapped": "both prompts' nodes, to the other's values",
    "random": "as many random nodes, to the other's values",
    "zeroed": "the prompt's own nodes, to 0",
}


def rows(found: Swap) -> list[dict[str, Any]]:
    """A swap as rows, one for each size and each of what was done: shares of prompts with 95 % intervals."""
    made = []
    for i, k in enumerate(found.ks):
        for name, outcome in found.arms.items():
            row: dict[str, Any] = {"k": k, "nodes": k if name == "zeroed" else float(found.n_nodes[i]), "done": name}
            for kind in ("becomes", "stays"):
                share = getattr(outcome, kind)
                row |= {kind: float(share.estimate[i])}
                row |= {f"{kind}_{end}": float(getattr(share, end)[i]) for end in ("low", "high")}
            made.append(row)
    return made


def as_csv(found: Swap) -> str:
    """The rows of a swap as CSV."""
    return csv_bytes(rows(found)).decode()


def as_json(found: Swap, prompts: Sequence[Prompt], vocabulary: Vocabulary) -> str:
    """The rows of a swap, and of each prompt what was answered at each size, as JSON."""
    pairs = []
    for number, prompt in enumerate(prompts):
        one = encode(prompt, vocabulary)
        other = prompt.counterfactual
        if prompt.messages is not None and one.counterfactual_ids is not None:
            other = "".join(decode(vocabulary, token) for token in one.counterfactual_ids)
        asked = {"text": one.text, "counterfactual": other}
        asked |= {"target": decode(vocabulary, one.target_ids[0]), "foil": decode(vocabulary, one.foil_ids[0])}
        pairs.append(asked | {name: _answers(found, name, number, vocabulary) for name in found.arms})
    about = {"ks": list(found.ks), "n_pairs": found.n_pairs, "answered": float(found.answered.estimate)}
    return json.dumps(about | {"seed": found.seed, "rows": rows(found), "pairs": pairs}, indent=1)


def _answers(found: Swap, name: str, number: int, vocabulary: Vocabulary) -> list[str]:
    return [decode(vocabulary, answer) for answer in found.arms[name].answers[number].tolist()]


def table(found: Swap, vocabulary: Vocabulary) -> RenderableType:
    """A swap for a terminal; of one pair the answers themselves."""
    alone = found.n_pairs == 1
    made = Table(title="What is answered then", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("k", "nodes", "what is set", *(["answer"] if alone else ["the other's answer", "its own still"])):
        left = name in ("what is set", "answer")
        made.add_column(name, justify="left" if left else "right", no_wrap=name != "what is set")
    for at, row in enumerate(rows(found)):
        shares = [f"{row[one]:.2f} [{row[f'{one}_low']:.2f}, {row[f'{one}_high']:.2f}]" for one in ("becomes", "stays")]
        size = at // len(found.arms)
        last = [cell(token(_answers(found, row["done"], 0, vocabulary)[size]))] if alone else []
        made.add_row(str(row["k"]), f"{row['nodes']:.0f}", _SAYS[row["done"]], *(last or shares))
    share = float(found.answered.estimate)
    if alone:
        about = f"The untouched model {'answers' if share else 'does not answer'} both prompts as wanted."
        return Group(made, "", about)
    about = f"The untouched model answers both prompts of {share:.0%} of {found.n_pairs:,} pairs rightly."
    return Group(made, "", about, "Shares of pairs, with 95 % Wilson intervals.")
