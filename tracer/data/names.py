"""What other people call their columns: which field of a prompt a name most likely means.

Knows names alone. Refuses to know files and values; that a column means something is said, never assumed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable

from tracer.data.source import ROW_FIELDS

FOREIGN: dict[str, tuple[str, ...]] = {
    "text": ("prompt", "prompt_text", "clean", "clean_prompt", "clean_prefix", "clean_text", "input_text"),
    "token_ids": ("prompt_ids", "input_ids", "prompt_tokens", "input_tokens"),
    "target": (
        *("answer", "answers", "answer_token", "clean_answer", "correct_answer", "correct_answers"),
        *("correct", "correct_token", "target_token", "target_text", "target_true"),
        *("label", "gold", "expected", "completion", "output"),
    ),
    "target_ids": ("answer_id", "answer_ids", "answer_token_id", "correct_id", "correct_ids", "label_ids"),
    "foil": (
        *("wrong", "wrong_answer", "wrong_token", "wrong_answers", "incorrect", "incorrect_answer", "distractor"),
        *("patch_answer", "corrupted_answer", "corrupt_answer", "foil_token", "target_false", "target_new"),
    ),
    "foil_ids": ("wrong_id", "wrong_ids", "incorrect_id", "incorrect_ids", "wrong_token_id", "distractor_ids"),
    "counterfactual": (
        *("corrupted", "corrupt", "corrupted_prompt", "corrupt_prompt", "corrupted_prefix", "corrupted_text"),
        *("patch", "patch_prefix", "patch_prompt", "counterfactual_prompt", "counterfactual_text", "cf"),
    ),
    "counterfactual_ids": ("corrupted_ids", "corrupt_ids", "patch_ids", "cf_ids"),
}
"""Names in use for each field, in the form that `plain` gives."""

VAGUE = ("question", "sentence", "input", "query", "statement", "instruction", "context", "source")
"""Names that often are the prompt, and as often something else beside it: suggested where there is no prompt."""

PAIRS = {
    "text": "clean_prefix",
    "counterfactual": "patch_prefix",
    "target": "clean_answer",
    "foil": "patch_answer",
}
"""The columns of Marks et al.'s pairs, by field."""

_EXACT = frozenset({"id", "seed", "messages", "counterfactual_messages", "answer"})
"""Fields that no other name is taken for."""
_NEAR = 0.83  # of difflib's ratio: one letter more, less or other in a short word
_FIELD = {name: field for field, names in FOREIGN.items() for name in names}


def plain(name: str) -> str:
    """A name in lower case, its words joined by ``_``: ``Prompt IDs`` and ``promptIds`` are ``prompt_ids``."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return re.sub(r"[^a-z0-9]+", "_", words.lower()).strip("_")


def meant(name: str) -> str | None:
    """The field that a column's name looks like; None where it looks like none. An ``id`` is never looked for, and a
    ``seed``, which without messages is somebody's random one."""
    own = plain(name)
    if own in ("id", "seed"):
        return None
    if own in ROW_FIELDS or own in _FIELD:
        return _FIELD.get(own, own)
    near = difflib.get_close_matches(own, [field for field in ROW_FIELDS if field not in _EXACT], 1, _NEAR)
    return near[0] if near else None


def looks_like(names: Iterable[str], read: Collection[str]) -> tuple[str, str] | None:
    """The first of these columns that looks like a field, and that field. A second name for what is read (`read`:
    fields that have a column) is nothing to ask about, but for the prompt, of which there is one."""
    given = {field.removesuffix("_ids") for field in read}
    for name in names:
        field = meant(name)
        if field is not None and (field in ("text", "token_ids") or field.removesuffix("_ids") not in given):
            return name, field
    return None


def prompt_among(names: Iterable[str]) -> tuple[str, str] | None:
    """The column that most likely is the prompt, and its field, where none has the name of one."""
    several = list(names)
    sure = [(name, field) for name in several if (field := meant(name)) in ("text", "token_ids")]
    return next(iter(sure + [(name, "text") for name in several if plain(name) in VAGUE]), None)
