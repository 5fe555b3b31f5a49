"""The concept scores of a run: checked when its prompts are planned, written when all of them are done.

Knows where a run's labels and nodes are. Refuses to know how neurons are scored (meaning/concepts.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from tracer.meaning.concepts import FILE, scored
from tracer.meaning.labels import Asked, Labelled, questions_of
from tracer.meaning.separation import Design
from tracer.runs.jobs import ConceptRules
from tracer.store.run_folder import Commit, RunFolder

_PROMPT = ("text", "token_ids", "messages", "seed")
"""Columns of the input that tell prompts apart."""


def check_ahead(folder: RunFolder, rules: ConceptRules) -> list[str]:
    """What the planned prompts' labels do not allow to score, in sentences.

    Raises:
        JobError: a label or a value that no prompt has, or a label of too few prompts.
    """
    rows = folder.read_table("input.parquet", [*_PROMPT, "labels", "error"]).to_pylist()
    rows = [row for row in rows if row["error"] is None]
    prompts = [repr([row[name] for name in _PROMPT]) for row in rows]
    return questions_of(Labelled(prompts, [dict(row["labels"] or ()) for row in rows]), _asked(rules))[1]


def write_concepts(folder: RunFolder, rules: ConceptRules, commits: Sequence[Commit]) -> None:
    """Write concepts.parquet from the committed tables; a value that too few prompts came through for has no rows."""
    place = folder.place
    prompts, nodes = (
        [place.path(commit.files[name]) for commit in commits if name in commit.files] for name in ("prompts", "nodes")
    )
    folder.write_table(FILE, scored(prompts, nodes, place.fs, _asked(rules), strict=False).table)


def _asked(rules: ConceptRules) -> Asked:
    return Asked(rules.labels, rules.values, rules.group, Design(rules.candidates, rules.permutations, rules.seed))
