"""A pair: a prompt and its counterfactual, with the right and the wrong next token; and train and test kept apart.

Knows text. Refuses to know tokens, models and what a task is about.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tracer.errors import JobError, quoted
from tracer.prompts import Prompt


@dataclass(frozen=True)
class Pair:
    """Two prompts that differ in one word, for which target and foil change places.

    Attributes:
        id: names the pair within its set.
        prompt: the text asked about; `clean_prefix` in the files of Marks et al.
        counterfactual: the same text with one word changed; `patch_prefix`.
        target: the next token of `prompt`, usually with its leading space; `clean_answer`.
        foil: the next token of `counterfactual`; `patch_answer`.
        case: what kind of pair it is, e.g. ``"plural_singular"``.
    """

    id: str
    prompt: str
    counterfactual: str
    target: str
    foil: str
    case: str

    def to_prompt(self, *, paired: bool = True) -> Prompt:
        """The pair as a `Prompt`, with its counterfactual unless `paired` is False."""
        counterfactual = self.counterfactual if paired else None
        return Prompt(self.prompt, target=self.target, foil=self.foil, counterfactual=counterfactual, id=self.id)


def check_split(train: Iterable[Pair], test: Iterable[Pair], allow: bool = False, name: str = "") -> int:
    """Refuse prompts that are both trained and tested on, unless that is allowed; how many test pairs have one.

    Args:
        name: of the set of pairs, for the error.

    Raises:
        JobError: says how many, and names the first such prompt.
    """
    trained, tested = {pair.prompt for pair in train}, list(test)
    both = [pair.prompt for pair in tested if pair.prompt in trained]
    if both and not allow:
        of, others = f" of {name}" if name else "", len(set(both)) - 1
        more = f" and {others} more" if others else ""
        raise JobError(
            f"{len(both)} of {len(tested)} test pairs{of}, with prompt {quoted(both[0])}{more}",
            "are in both train and test: a circuit must be tested on prompts it was not found on",
            "take them out of one of the two, or allow it with allow_overlap: true in the job, which every result says",
        )
    return len(both)
