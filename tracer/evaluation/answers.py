"""Which prompts a model answers rightly: asked before anything is said of how it does so.

Knows what a right answer is, and the forward that asks for it, here or on a server. Refuses to know where prompts come
from, and what becomes of those that are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor

from tracer.data.source import Keep
from tracer.errors import JobError, option, quoted
from tracer.evaluation import ablations
from tracer.evaluation.ablations import AblatedRow, Replacement
from tracer.model.model import Model
from tracer.model.named import AnyModel, model_of
from tracer.model.state import undisturbed
from tracer.prompts import Asked, Encoded, Prompt, Vocabulary, as_prompt, decode, encode
from tracer.settings import settings
from tracer.system.display import Shown
from tracer.text import kept_of


@dataclass(frozen=True)
class Answer:
    """What a model says after a prompt.

    Attributes:
        token_id, token: its greedy next token.
        kept: whether the prompt is one to keep.
        otherwise: what it answers instead, as a sentence; empty where the prompt is kept.
    """

    token_id: int
    token: str
    kept: bool
    otherwise: str = ""


@undisturbed()
def rollout(model: AnyModel, prompt: Asked, n: int = 1) -> Prompt:
    """A prompt that asks about the model's own continuation: its greedy `n`-th next token is the target, and those
    before it are put at the end of the prompt (and of a counterfactual, so that the two stay equally long).

    Greedy from the logits, as ``filter`` asks: no generation settings of the model's come in. One forward a token.

    Args:
        model: from `tracer.load`, or the name of a model (``"demo"``, a folder, a Hugging Face id), which is loaded and
            kept until a call names another.
        prompt: a `tracer.Prompt` without a target, read at its last position, or its text.
        n: which token is asked about, from 1.

    Returns:
        A prompt of token ids with one target.

    Raises:
        JobError: `n` below 1, a prompt that cannot be encoded, with a target or read elsewhere, or a model that ends
            its answer before.
    """
    model, prompt = model_of(model), as_prompt(prompt)
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise JobError(f"n={n!r}", "must be a whole number from 1", "use 1 for the next token")
    value = f"prompt {quoted(prompt.shown)}"
    if prompt.target is not None:
        raise JobError(value, "has a target, which a rollout finds itself", "leave it out")
    one = encode(prompt, model)
    if one.positions != (len(one.token_ids) - 1,):
        raise JobError(value, "is read elsewhere than at its end, where it goes on", "leave positions out")
    said, ends = list[int](), _ends(model)
    for _ in range(n):
        if said and said[-1] in ends:
            text = "".join(decode(model, token) for token in said)
            rule = f"the model ends its answer after {len(said)} tokens, {quoted(text)}"
            raise JobError(option("n", n), rule, f"use at most {len(said)}")
        said += greedy(model, [encode(Prompt(token_ids=[*one.token_ids, *said]), model)])
    before, other = said[:-1], one.counterfactual_ids
    return Prompt(
        token_ids=[*one.token_ids, *before],
        target=said[-1],
        counterfactual=None if other is None else [*other, *before],
        id=prompt.id,
    )


def _ends(model: Model) -> set[int]:
    """Tokens after which the model says no more."""
    given = [getattr(model.tokenizer, "eos_token_id", None), getattr(model.config, "eos_token_id", None)]
    several = [value if isinstance(value, list | tuple) else [value] for value in given]
    return {token for some in several for token in some if token is not None}


@dataclass(frozen=True, repr=False)
class Filtered(Shown):
    """The prompts that a model answers as wanted, and what it answers to each.

    Attributes:
        kept: those prompts, in their order. answers: of every prompt that was given, in order.
    """

    kept: tuple[Prompt, ...]
    answers: tuple[Answer, ...]

    def to_pandas(self) -> Any:
        """The answers as a pandas DataFrame, a row for each prompt that was given: `token_id`, `token`, `kept`, and
        `otherwise`, what it answers instead."""
        import pandas

        return pandas.DataFrame([vars(one) for one in self.answers])

    @property
    def summary(self) -> str:
        """One line: ``61 of 80 prompts kept: 19 answered otherwise``."""
        return kept_of(len(self.kept), {"filtered": len(self.answers) - len(self.kept)})


@undisturbed()
def filter_prompts(model: AnyModel, prompts: Sequence[Prompt], keep: Keep | str = "correct") -> Filtered:
    """Ask the model every prompt, and keep those that it answers rightly.

    The same as ``filter:`` of a job's prompts. Nothing is changed in a prompt, and the same call keeps the same ones.

    Args:
        model: from `tracer.load`, or the name of a model (``"demo"``, a folder, a Hugging Face id), which is loaded and
            kept until a call names another.
        prompts: each with a target; read at the last position.
        keep: ``correct``, the greedy next token is a target; ``preferred``, the logit of the target is above that of
            the foil (the mean of several), whatever token is on top.

    Returns:
        The prompts that are kept, and what the model answers to each.

    Raises:
        JobError: another `keep`, no prompts, a prompt without a target (or a foil, for ``preferred``), that is read
            elsewhere or cannot be encoded.
    """
    if keep not in get_args(Keep):
        raise JobError(f"keep={quoted(keep)}", "is not known", f"use {' or '.join(get_args(Keep))}")
    if not prompts:
        raise JobError("prompts=[]", "there is nothing to ask", "give at least one prompt")
    model = model_of(model)
    encoded = [encode(prompt, model) for prompt in prompts]
    for prompt, one in zip(prompts, encoded, strict=True):
        check_filter(prompt, keep, one)
    answers = asked(model, encoded, keep)
    kept = tuple(prompt for prompt, answer in zip(prompts, answers, strict=True) if answer.kept)
    return Filtered(kept, tuple(answers))


def asked(model: Model, encoded: Sequence[Encoded], keep: str, memory: int | None = None) -> list[Answer]:
    """What the model answers to each prompt; one forward of each, two for ``preferred``.

    Args:
        encoded: prompts that `check_filter` lets pass.
        memory: bytes one forward may use.
    """
    said = greedy(model, encoded, memory)
    if keep == "preferred":
        ahead = _read(model, encoded, "difference", memory).tolist()
        return [_answer(model, one, token, lead > 0) for one, token, lead in zip(encoded, said, ahead, strict=True)]
    return [_answer(model, one, token, token in one.target_ids) for one, token in zip(encoded, said, strict=True)]


def greedy(model: Model, encoded: Sequence[Encoded], memory: int | None = None) -> list[int]:
    """The token that the model says next to each prompt. One forward of each."""
    return _read(model, encoded, None, memory).long().tolist()


def _read(model: Model, encoded: Sequence[Encoded], metric: str | None, memory: int | None) -> Tensor:
    rows = [AblatedRow(one, ablations.EMPTY, (0, 0, 0)) for one in encoded]
    asked = None if metric is None else settings(metric=metric)
    return ablations.measured(model, rows, Replacement(), asked, "activation", memory or model.budget())


def check_filter(prompt: Prompt, keep: str, encoded: Encoded | None = None) -> None:
    """Refuse a prompt of which it cannot be said whether it is answered rightly.

    Args:
        encoded: the prompt's tokens, where they are known.

    Raises:
        JobError: it has no target, no foil (for ``preferred``), or is not read at its last position alone.
    """
    value = f"prompt {quoted(prompt.shown)}"
    if prompt.target is None:
        raise JobError(value, f"has no target, by which filter {keep} decides", "give a target, or no filter")
    if keep == "preferred" and prompt.foil is None:
        raise JobError(value, "has no foil, over which filter preferred wants the target", "give a foil, or no filter")
    if encoded is not None and encoded.positions != (len(encoded.token_ids) - 1,):
        raise JobError(
            value, "is read elsewhere than at its end, which a filter asks about", "give no positions, or no filter"
        )


def _answer(vocabulary: Vocabulary, prompt: Encoded, token: int, kept: bool) -> Answer:
    text = decode(vocabulary, token)
    if kept:
        return Answer(token, text, True)
    wanted = " or ".join(quoted(decode(vocabulary, one)) for one in prompt.target_ids)
    rather = f"answers {quoted(text)}, not {wanted}"
    if token in prompt.target_ids:  # only of several, whose mean is behind
        rather = f"answers {quoted(text)}, but does not prefer {wanted} to the foil"
    return Answer(token, text, False, f"the model {rather}")
