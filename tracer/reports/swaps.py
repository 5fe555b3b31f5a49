"""A swap as a person or a script reads it: a table on a terminal, JSON, CSV.

Knows layout. Computes no number, and of a model reads its tokens only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tracer.prompts import Prompt, Vocabulary, decode, encode
from tracer.reports.folded import Folded, folded
from tracer.reports.parts import Sheet
from tracer.reports.sheet import token

if TYPE_CHECKING:
    from tracer.evaluation.swap import Swap

_SAYS = {
    "swapped": "both prompts' nodes, to the other's values",
    "random": "as many random nodes, to the other's values",
    "zeroed": "the prompt's own nodes, to 0",
}


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
    return json.dumps(about | {"seed": found.seed, "rows": found.rows(), "pairs": pairs}, indent=1)


def _answers(found: Swap, name: str, number: int, vocabulary: Vocabulary) -> list[str]:
    return [decode(vocabulary, answer) for answer in found.arms[name].answers[number].tolist()]


def table(found: Swap, vocabulary: Vocabulary) -> Folded:
    """A swap for a terminal; of one pair the answers themselves."""
    alone = found.n_pairs == 1
    heads = ["k", "nodes", "<what is set", *(["<answer"] if alone else ["the other's answer", "its own still"])]
    cells = []
    for at, row in enumerate(found.rows()):
        shares = [f"{row[one]:.2f} [{row[f'{one}_low']:.2f}, {row[f'{one}_high']:.2f}]" for one in ("becomes", "stays")]
        size = at // len(found.arms)
        last = [token(_answers(found, row["done"], 0, vocabulary)[size])] if alone else []
        cells.append((str(row["k"]), f"{row['nodes']:.0f}", _SAYS[row["done"]], *(last or shares)))
    share = float(found.answered.estimate)
    if alone:
        about = f"The untouched model {'answers' if share else 'does not answer'} both prompts as wanted."
    else:
        about = (
            f"The untouched model answers both prompts of {share:.0%} of {found.n_pairs:,} pairs rightly. Shares of "
            "pairs, with 95 % Wilson intervals."
        )
    return folded([Sheet.of("swap", "What is answered then", heads, cells), about])
